"""Ranks that are processes, under the launchers that users have: the same curve, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ROOT, tiny_run, train_here

from benchmarks.forker import Forked, Forker, surroundings
from dstrain.engine import Ranks, free_port
from dstrain.readings import read_readings
from dstrain.schema import dump_yaml

BIN = Path(sys.executable).parent
SHARED_MEMORY = Path("/dev/shm")
DOOR = ROOT / "dstrain" / "train.py"


def command(launcher: str, ranks: int, port: int, *words: str) -> list[str]:
    """How a user starts the door with several ranks."""
    starter = {"deepspeed": "--num_accelerators", "torchrun": "--nproc_per_node"}
    return [str(BIN / launcher), starter[launcher], str(ranks), "--master_port", str(port), str(DOOR), *words]


def launch(folder: Path, launcher: str, ranks: int, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs the door to its end in a folder of its own; fails when a process of it lives on."""
    port = free_port()
    mark = f"{folder}-{launcher}-{ranks}-{port}"
    with no_memory_left(port):
        done = subprocess.run(
            command(launcher, ranks, port, *words), cwd=folder, env=marked(mark), capture_output=True, text=True, timeout=300
        )
        ours = [process for process in psutil.process_iter() if mark in _environ(process).values()]
        _, left = psutil.wait_procs(ours, timeout=10)  # the launcher does not wait for a rank's own last breath
        assert left == [], f"processes are left: {left}"
    return done


@contextmanager
def no_memory_left(port: int) -> Iterator[None]:
    """Fails when what ranks share outlives them: it would stay until the machine is started again."""
    yield
    assert not [*SHARED_MEMORY.glob(f"deepspeed_*_{port}_*")], "shared memory is left"


def start_ranks(forker: Forker, world: int, folder: Path, *program: object, port: int | None = None) -> list[Forked]:
    """Ranks as `deepspeed` starts them (LOCAL_SIZE has them add up in shared memory), without the seconds of their imports."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port or free_port())}
    place |= {"WORLD_SIZE": str(world), "LOCAL_SIZE": str(world)}
    started = []
    for rank in range(world):
        said = [folder / f"rank{rank}.{end}" for end in ("out", "err")]
        for file in said:
            file.unlink(missing_ok=True)
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        started.append(forker.start(program, folder, {**surroundings(), **place, **own}, *said))
    return started


def end_of(ranks: list[Forked], folder: Path) -> subprocess.CompletedProcess[str]:
    """Waits for all of them: the worst status, and what they said one after the other."""
    try:
        statuses = [rank.wait(300) for rank in ranks]
    except subprocess.TimeoutExpired as error:
        pytest.fail("\n".join([str(error), *((folder / f"rank{rank}.err").read_text() for rank in range(len(ranks)))]))
    out, err = ("".join((folder / f"rank{rank}.{end}").read_text() for rank in range(len(ranks))) for end in ("out", "err"))
    return subprocess.CompletedProcess([], max(statuses, key=abs), out, err)


def run_ranks(forker: Forker, world: int, file: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """The door with a run's file, to its end."""
    port = free_port()
    with no_memory_left(port):
        return end_of(start_ranks(forker, world, file.parent, DOOR, file, *words, port=port), file.parent)


def marked(mark: str) -> dict[str, str]:
    """The environment of a launcher whose processes are to be found again."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return {**surroundings(), "DSTRAIN_TEST_MARK": mark, "PATH": path}


def _environ(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


def write_run(corpus: Path, folder: Path, name: str, **changes: Any) -> Path:
    file = folder / f"{name}.yaml"
    file.write_text(dump_yaml({"base": tiny_run(corpus, folder, name=name, **changes)}))
    return file


def curve(folder: Path) -> list[tuple[str, str, int, int, float]]:
    """(stage, split, step, tokens, loss) of every reading."""
    return [
        (reading.stage, reading.split, reading.step, reading.tokens, reading.values["loss"])
        for reading in read_readings(folder)
        if "loss" in reading.values
    ]


def check_same_curve(one: Path, other: Path, tolerance: float) -> None:
    mine, yours = curve(one), curve(other)
    assert [row[:4] for row in mine] == [row[:4] for row in yours] and mine
    assert [row[4] for row in mine] == pytest.approx([row[4] for row in yours], rel=tolerance)


DOUBLE = {"stages__pretrain__accumulation": 2, "stages__finetune__accumulation": 2}
"""One rank with these takes the steps of two ranks without."""
HARD = {"encoder__attention__kind": "lsh", "stages__finetune__num_frozen_layers": 1}
"""Draws per layer and step, and a thaw: what ranks could disagree about."""


def test_two_ranks_take_the_steps_of_one_with_twice_the_accumulation(
    small_corpus: Path, tmp_path: Path, ranks: Ranks
) -> None:
    """fp32: losses to 1e-5 relative, under torchrun and ZeRO-1; each rank's own words stay unsaid."""
    two = write_run(small_corpus, tmp_path, "two", **HARD)
    done = launch(tmp_path, "torchrun", 2, str(two))
    assert done.returncode == 0, done.stderr
    train_here(tiny_run(small_corpus, tmp_path, name="one", **HARD, **DOUBLE), ranks)
    check_same_curve(tmp_path / "two", tmp_path / "one", 1e-5)
    assert done.stdout.count("run folder: ") == 1, "one rank speaks"
    assert "warn" not in done.stderr.lower() and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("zero", "precision", "tolerance"),
    [
        *((zero, "fp32", 1e-5) for zero in ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")),
        # bf16 rounds every weight to 3 digits, and a sum over two ranks in another order may fall on the other side
        *((zero, "bf16", 2e-2) for zero in ("zero0", "zero1", "zero2", "zero3")),
    ],
)
def test_at_every_stage_two_ranks_are_one_with_twice_the_accumulation(
    zero: str, precision: str, tolerance: float, small_corpus: Path, tmp_path: Path, ranks: Ranks, forker: Forker
) -> None:
    """Under deepspeed, whose launcher takes ten seconds, once for all."""
    plan = {"deepspeed": f"ds_configs/{zero}.json", "precision": precision}
    two = write_run(small_corpus, tmp_path, "two", **HARD, **plan)
    real = (zero, precision) == ("zero2", "fp32")
    done = launch(tmp_path, "deepspeed", 2, str(two)) if real else run_ranks(forker, 2, two)
    assert done.returncode == 0, done.stderr
    assert "finetune" in done.stdout and "test: " in done.stdout and "FutureWarning" not in done.stderr
    train_here(tiny_run(small_corpus, tmp_path, name="one", **HARD, **DOUBLE, precision=precision), ranks)
    check_same_curve(tmp_path / "two", tmp_path / "one", tolerance)


def test_one_rank_needs_no_port(tmp_path: Path) -> None:
    """Two runs of `deepspeed` or `torchrun` on one machine are given the same one where nobody says otherwise."""
    with socket.create_server(("127.0.0.1", 0)) as others:
        place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        program = "from dstrain.engine import *; ranks = join_ranks(); print(ranks.agree(ranks.world)); leave_ranks()"
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT,
            env={**surroundings(), **place, "MASTER_PORT": str(others.getsockname()[1])},
        )
    assert done.returncode == 0 and done.stdout == "1\n", done.stderr


def stopped_after(forker: Forker, file: Path, world: int, stage: str, step: int) -> str:
    """Asks all ranks to stop once a step was told, and returns what the first said."""
    folder = file.with_suffix("")
    ranks = start_ranks(forker, world, file.parent, DOOR, file, "--quiet")
    while all(rank.poll() is None for rank in ranks):
        if (folder / "readings.jsonl").exists() and any(row[0] == stage and row[2] >= step for row in curve(folder)):
            break
        time.sleep(0.02)
    for rank in ranks:
        rank.send_signal(signal.SIGTERM)
    end_of(ranks, file.parent)
    said = [(file.parent / f"rank{rank}.err").read_text() for rank in range(world)]
    assert [rank.returncode for rank in ranks] == [75] * world, said
    return said[0]


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2", "zero3"])
def test_two_ranks_stop_on_a_signal_and_go_on(zero: str, small_corpus: Path, tmp_path: Path, forker: Forker) -> None:
    """SIGTERM to both ranks: status 75, and the same command ends where an undisturbed run ends, to the last bit.

    One by torchrun: its ranks hash strings each in their own way, and those that are forked all alike.
    """
    plan = {"deepspeed": f"ds_configs/{zero}.json", "stages__finetune__steps": 60}
    plan |= {"stages__finetune__evaluate_every_steps": 20}
    whole = write_run(small_corpus, tmp_path, "whole", **HARD, **plan)
    cut = write_run(small_corpus, tmp_path, "cut", **HARD, **plan)
    by_itself = launch(tmp_path, "torchrun", 2, str(whole)) if zero == "zero1" else run_ranks(forker, 2, whole)
    assert by_itself.returncode == 0, by_itself.stderr
    said = stopped_after(forker, cut, 2, "finetune", 10)
    assert "saved finetune at step" in said and "the same command goes on from there" in said
    assert run_ranks(forker, 2, cut, "--quiet").returncode == 0
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    kept = [(tmp_path / name / "stages/finetune/best.safetensors").read_bytes() for name in ("cut", "whole")]
    assert kept[0] == kept[1]


@pytest.mark.slow
def test_ranks_save_and_end_when_the_deepspeed_command_is_killed(small_corpus: Path, tmp_path: Path) -> None:
    """It passes no SIGTERM on, and dies at once of a SIGKILL: its ranks must not train on unseen."""
    file = write_run(small_corpus, tmp_path, "run", stages__pretrain=None, stages__finetune__steps=4000)
    log, words = tmp_path / "log", command("deepspeed", 2, free_port(), str(file), "--quiet")
    with log.open("w") as out:
        running = subprocess.Popen(words, cwd=tmp_path, env=marked(str(tmp_path)), stdout=out, stderr=out)
    while running.poll() is None and not (tmp_path / "run/readings.jsonl").exists():
        time.sleep(0.1)
    running.terminate()
    running.wait()
    ours = [process for process in psutil.process_iter() if str(tmp_path) in _environ(process).values()]
    assert ours, log.read_text()
    assert psutil.wait_procs(ours, timeout=60)[1] == [], log.read_text()
    said = log.read_text()
    assert "the deepspeed command has gone" in said and "saved finetune at step" in said
    assert any((tmp_path / "run/stages/finetune/checkpoints").glob("step-*[0-9]"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("zero", "precision", "tolerance"),
    [*((f"zero{stage}", "fp32", 1e-5) for stage in range(4)), ("zero2_offload", "fp32", 1e-5), ("zero1", "bf16", 2e-2)],
)
def test_other_numbers_of_ranks_go_on_by_themselves(
    zero: str, precision: str, tolerance: float, small_corpus: Path, tmp_path: Path, forker: Forker
) -> None:
    """1 -> 2 -> 1 ranks, before and after a thaw, against two ranks that nobody disturbed. 17 wide: shares are padded."""
    plan: dict[str, Any] = {"deepspeed": f"ds_configs/{zero}.json", "precision": precision, "stages__pretrain": None}
    plan |= {"stages__finetune__steps": 64, "stages__finetune__accumulation": 2, "encoder__hidden_size": 17, **HARD}
    whole = write_run(small_corpus, tmp_path, "whole", **plan)
    cut = write_run(small_corpus, tmp_path, "cut", **plan)
    assert run_ranks(forker, 1, whole, "--quiet").returncode == 0
    stopped_after(forker, cut, 1, "finetune", 6)
    stopped_after(forker, cut, 2, "finetune", 24)
    done = run_ranks(forker, 1, cut)
    assert done.returncode == 0, done.stderr
    check_same_curve(tmp_path / "cut", tmp_path / "whole", tolerance)
    assert len({step for *_, step, _, _ in curve(tmp_path / "cut")}) == len(range(2, 65, 2))


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero1", "zero3"])
def test_more_ranks_than_micro_batches_share_them(
    zero: str, small_corpus: Path, tmp_path: Path, forker: Forker
) -> None:
    """1 -> 2 -> 1 ranks with one micro-batch a step, dropout and all, against one rank that nobody disturbed."""
    plan: dict[str, Any] = {"deepspeed": f"ds_configs/{zero}.json", "stages__pretrain": None, "stages__finetune__steps": 64}
    whole = write_run(small_corpus, tmp_path, "whole", **plan, **HARD)
    cut = write_run(small_corpus, tmp_path, "cut", **plan, **HARD)
    assert run_ranks(forker, 1, whole, "--quiet").returncode == 0
    stopped_after(forker, cut, 1, "finetune", 6)
    said = stopped_after(forker, cut, 2, "finetune", 24)
    assert "begun by 1 rank(s), goes on with 2: accumulation and shared micro-batches keep every step as it was" in said
    done = run_ranks(forker, 1, cut)
    assert done.returncode == 0, done.stderr
    check_same_curve(tmp_path / "cut", tmp_path / "whole", 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "change", "sentence"),
    [
        ("deepspeed", {"encoder__num_layer": 2}, "encoder.num_layer: no such setting; did you mean num_layers?"),
        ("deepspeed", {"stages__finetune__corpus__path": "no/such/folder"}, "no/such/folder"),
        ("torchrun", {"stages__finetune__corpus__path": "no/such/folder"}, "no/such/folder"),
    ],
    ids=["setting", "data", "data-torchrun"],
)
def test_a_mistake_is_told_once(
    launcher: str, change: dict[str, Any], sentence: str, small_corpus: Path, tmp_path: Path
) -> None:
    """The ranks end by themselves, without a traceback of ours (torchrun adds a report of its own)."""
    done = launch(tmp_path, launcher, 2, str(write_run(small_corpus, tmp_path, "run", **change)))
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if sentence in line]
    assert len(told) == 1, done.stderr
    tracebacks = [line for line in done.stderr.splitlines() if "dstrain/" in line and line.lstrip().startswith("File ")]
    assert tracebacks == []
    assert not (tmp_path / "run" / "stages").exists()


@pytest.mark.slow
def test_divergence_ends_with_status_1_and_a_sentence(small_corpus: Path, tmp_path: Path, forker: Forker) -> None:
    file = write_run(small_corpus, tmp_path, "run", stages__pretrain__optim__lr=1e6)
    done = run_ranks(forker, 1, file)
    assert done.returncode == 1
    assert "pretrain: loss is not a number at step 5 (3 batches were skipped before): the first number" in done.stderr
    assert "; lower stages.pretrain.optim.lr" in done.stderr
    assert "Traceback" not in done.stderr
    two = run_ranks(forker, 2, file, "name=two")
    assert two.returncode == 1 and two.stderr.count("is not a number at step 5") == 1


@pytest.mark.slow
def test_deepspeeds_own_flags_are_understood(small_corpus: Path, tmp_path: Path) -> None:
    """`--deepspeed --deepspeed_config FILE` is how every DeepSpeed script is called."""
    file = write_run(small_corpus, tmp_path, "run", stages__finetune=None)
    done = launch(
        tmp_path, "deepspeed", 2, str(file), "--deepspeed", "--deepspeed_config", str(ROOT / "ds_configs/zero2.json")
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "run/ds_config.pretrain.json").read_text())
    assert (plan["zero_optimization"]["stage"], plan["train_batch_size"]) == (2, 2)
