"""A step that fails on one rank is left out, or taken again in pieces, on all of them; no rank waits for another."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import tiny_run, train_here
from test_ranks import DOUBLE, check_same_curve, end_of, start_ranks, write_run

from benchmarks.forker import Forker
from dstrain.engine import Ranks
from dstrain.readings import read_readings

VICTIM = """\
import math, os, sys, torch
from dstrain.model.encoder import Encoder
rank, intact = int(os.environ["RANK"]), Encoder.forward

def forward(self, batch):
    hidden_TE = intact(self, batch)
    if self.training and rank == 1:
        {fault}
    return hidden_TE
Encoder.forward = forward
{first}from dstrain.train import main
status = main()
sys.stdout.flush(), sys.stderr.flush()
os._exit(status)
"""
FP16 = """\
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from dstrain import precision, run
CPU_Accelerator.is_fp16_supported = lambda self: True
choose = precision.choose
precision.choose = run.choose = lambda wanted, device: (
    precision.Precision("fp16", torch.float16, "fp16: a test") if wanted == "fp16" else choose(wanted, device)
)
"""
BEYOND_FP16 = "hidden_TE = hidden_TE * (math.inf if hidden_TE.dtype == torch.float16 and self.embedding_dropout.step >= 2 else 1)"
NAN = "hidden_TE = hidden_TE * (math.nan if self.embedding_dropout.step == 2 else 1)"
SHORT = "if batch.sequences.tokens > 300: {where}"
FORWARD, BACKWARD = "torch.empty(1 << 50)", "hidden_TE.register_hook(lambda gradient: torch.empty(1 << 50))"


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def two_ranks(forker: Forker, tmp_path: Path) -> Run:
    """Runs the door with a fault on its second rank: (the run's file, the fault, what comes before the door)."""

    def run(file: Path, fault: str, first: str = "") -> subprocess.CompletedProcess[str]:
        script = tmp_path / "victim.py"
        script.write_text(VICTIM.format(fault=fault, first=first))
        return end_of(start_ranks(forker, 2, tmp_path, script, file), tmp_path)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2", "zero3"])
def test_a_number_that_breaks_on_one_rank_is_skipped_by_both(
    zero: str, small_corpus: Path, tmp_path: Path, two_ranks: Run
) -> None:
    run = write_run(small_corpus, tmp_path, "run", stages__finetune=None, deepspeed=f"ds_configs/{zero}.json")
    done = two_ranks(run, NAN)
    assert done.returncode == 0, done.stderr
    [said] = [line for line in done.stderr.splitlines() if "is skipped" in line]
    assert "pretrain: loss is not a number at step 3, and its batch is skipped: on rank 1 the first number" in said
    told = [reading for reading in read_readings(tmp_path / "run") if reading.split == "events"]
    assert [(reading.step, reading.values) for reading in told] == [(3, {"skipped_batches": 1.0})]


MISSING = """\
import dstrain.run, dstrain.schema

def missing(*given):
    raise dstrain.schema.UserError("there is no such file on this machine")

if rank == 1:
    dstrain.run.stage_corpus = missing
"""


@pytest.mark.slow
def test_a_mistake_that_only_one_rank_meets_is_told_once(small_corpus: Path, tmp_path: Path, two_ranks: Run) -> None:
    done = two_ranks(write_run(small_corpus, tmp_path, "run"), "pass", MISSING)
    assert done.returncode != 0
    assert done.stderr.count("on rank 1: there is no such file on this machine") == 1, done.stderr
    assert "was lost" not in done.stderr and "Connection closed" not in done.stderr and not (tmp_path / "run/stages").exists()


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero1", "zero3"])
def test_fp16_that_gives_out_on_one_rank_gives_way_to_bf16_on_both(
    zero: str, small_corpus: Path, tmp_path: Path, two_ranks: Run
) -> None:
    changes = {"deepspeed": f"ds_configs/{zero}.json", "precision": "fp16", "stages__pretrain__healing__skips_in_a_row": 1}
    run = write_run(small_corpus, tmp_path, "run", stages__finetune__steps=2, **changes)
    done = two_ranks(run, BEYOND_FP16, FP16)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("pretrain: loss is not a number at step 5, and the run goes on in bf16: on rank 1 ") == 1
    told = [reading for reading in read_readings(tmp_path / "run") if reading.split == "events"]
    assert [(reading.step, reading.values) for reading in told] == [
        (3, {"skipped_batches": 1.0}), (4, {"attention_in_fp32": 1.0, "skipped_batches": 2.0}), (5, {"bf16_for_fp16": 1.0}),
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("where", [FORWARD, BACKWARD], ids=["forward", "backward"])
@pytest.mark.parametrize("zero", ["zero0", "zero1"])
def test_memory_that_runs_out_on_one_rank_cuts_on_both(
    zero: str, where: str, small_corpus: Path, tmp_path: Path, ranks: Ranks, two_ranks: Run
) -> None:
    changes = {"stages__finetune": None, "encoder__dropout": 0.0, "deepspeed": f"ds_configs/{zero}.json"}
    done = two_ranks(write_run(small_corpus, tmp_path, "run", **changes), SHORT.format(where=where))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("ran out of memory; from now on each micro-batch is taken in 2 pieces") == 1
    one = {**changes, **{key: value for key, value in DOUBLE.items() if "pretrain" in key}}
    train_here(tiny_run(small_corpus, tmp_path, name="one", **one), ranks)
    check_same_curve(tmp_path / "run", tmp_path / "one", 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_where_ranks_meet_in_the_middle_of_a_step_the_same_command_goes_on_in_pieces(
    zero: str, small_corpus: Path, tmp_path: Path, ranks: Ranks, two_ranks: Run
) -> None:
    changes = {"stages__finetune": None, "encoder__dropout": 0.0, "deepspeed": f"ds_configs/{zero}.json"}
    run = write_run(small_corpus, tmp_path, "run", **changes)
    done = two_ranks(run, SHORT.format(where=FORWARD))
    assert done.returncode != 0
    assert "goes on from the last checkpoint, with each micro-batch in 2 pieces" in done.stderr
    assert json.loads((tmp_path / "run/stages/pretrain/pieces.json").read_text()) == {"pieces": 2}
    again = two_ranks(run, SHORT.format(where=FORWARD))
    assert again.returncode == 0, again.stderr
    one = {**changes, **{key: value for key, value in DOUBLE.items() if "pretrain" in key}}
    train_here(tiny_run(small_corpus, tmp_path, name="one", **one), ranks)
    check_same_curve(tmp_path / "run", tmp_path / "one", 1e-5)
