"""The engine against plain torch: every ZeRO stage and precision takes the very same AdamW steps."""

from __future__ import annotations

import copy
import math
import os
import pickle
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from torch import Tensor, nn

from dstrain.checkpoints import Checkpoints, Keep
from dstrain.ds_plan import Facts, read_plan, resolve
from dstrain.engine import (
    Engine,
    NotFinite,
    Place,
    Ranks,
    find_place,
    free_port,
    join_ranks,
    leave_ranks,
    peak_memory_gb,
)
from dstrain.optim import OptimSettings, build_optimizer
from dstrain.precision import DTYPES, LossScaleSettings
from dstrain.schema import UserError

PLANS = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
PRECISIONS = ("fp32", "bf16")
# fp32: both sides do the same arithmetic, in another order. bf16: the masters are fp32 too, and so is the comparison.
CLOSE = {"rtol": 1e-5, "atol": 1e-7}


# ---------------------------------------------------------------------------------------------- who am I


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        (
            {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node7", "MASTER_PORT": "1234"},
            Place(3, 4, 1, "node7", 1234, "RANK variables"),
        ),
        # torchrun inside a step of srun: the inner launcher knows better
        (
            {"RANK": "0", "WORLD_SIZE": "2", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_JOB_ID": "1"},
            Place(0, 2, 0, "127.0.0.1", 29500, "RANK variables"),
        ),
        (
            {
                "SLURM_JOB_ID": "42", "SLURM_STEP_ID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "1",
                "SLURM_PROCID": "2", "SLURM_LOCALID": "2",
            },
            Place(2, 4, 2, "127.0.0.1", 20_000 + 42 * 7 + 3, "srun"),
        ),
        (
            {
                "SLURM_JOB_ID": "42", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "3",
                "SLURM_LOCALID": "1", "MASTER_ADDR": "head", "MASTER_PORT": "777",
            },
            Place(3, 4, 1, "head", 777, "srun"),
        ),
    ],
    ids=["deepspeed-torchrun", "torchrun-in-srun", "srun", "srun-with-address"],
)  # fmt: skip
def test_every_launcher_says_who_a_process_is(environ: dict[str, str], place: Place) -> None:
    assert find_place(environ) == place


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"SLURM_JOB_ID": "42", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},  # sbatch, no srun
        {"SLURM_JOB_ID": "42", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        {"RANK": "5"},  # half of a launcher's words is none
    ],
    ids=["plain", "sbatch-without-srun", "srun-of-one", "rank-without-world"],
)
def test_a_process_that_nobody_multiplied_is_one_rank(environ: dict[str, str]) -> None:
    place = find_place(environ)
    assert (place.rank, place.world, place.local_rank, place.launcher) == (0, 1, 0, "plain python")
    with socket.socket() as listener:
        listener.bind((place.address, place.port))


def test_ranks_of_srun_on_several_nodes_meet_on_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$1 $2 $3" = "show hostnames gpu[07-08]" ] && printf "gpu07\\ngpu08\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    slurm = {
        "SLURM_JOB_ID": "9", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_LOCALID": "0",
    }  # fmt: skip
    places = [find_place({**slurm, "SLURM_PROCID": str(rank)}) for rank in range(2)]
    assert [place.address for place in places] == ["gpu07", "gpu07"]
    assert places[0].port == places[1].port


def test_a_free_port_can_be_listened_on() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", free_port()))


def test_more_ranks_than_gpus_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"2 ranks on this machine, which shows 1 GPU\(s\); start as many ranks"):
        join_ranks()


def test_a_process_can_join_leave_and_join_again(ranks: Ranks, tmp_path: Path) -> None:
    """A second run in one process must not meet groups of the first."""
    assert (ranks.rank, ranks.world, ranks.device.type) == (0, 1, "cpu")
    first = steps_of(open_engine(Layers(), "zero1", ranks))
    leave_ranks()
    assert not torch.distributed.is_initialized()
    leave_ranks()  # once more does no harm
    assert equal(steps_of(open_engine(Layers(), "zero1", join_ranks())), first)


def test_what_rank_0_cannot_do_is_told(ranks: Ranks) -> None:
    with pytest.raises(UserError, match="no such folder"), ranks.first():
        raise UserError("no such folder")
    with ranks.first() as mine:
        assert mine  # and the next time it may work
    ranks.barrier()
    assert ranks.agree({"asked": True}) == {"asked": True}
    assert ranks.sum(torch.tensor([2.0])).item() == 2.0


# --------------------------------------------------------------------------------- the same steps as plain torch


class Layers(nn.Module):
    """Two layers, the first of which can be held still; `forward` as the engine wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)
        self.register_buffer("kept", torch.arange(3.0))
        self.register_buffer("not_kept", torch.zeros(2), persistent=False)
        self.frozen = False
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            hidden = torch.tanh(self.first(features))
        out = self.second(hidden)
        return out.float().square().sum(), out.detach()


def open_engine(
    task: nn.Module, plan: str, ranks: Ranks, precision: str = "fp32", accumulation: int = 1, clip_norm: float = 0.0
) -> Engine:
    facts = Facts(accumulation, ranks.world, clip_norm, precision, LossScaleSettings(), 8, "cpu")  # type: ignore[arg-type]
    groups = [
        {"params": list(task.first.parameters()), "weight_decay": 0.1, "name": "frozen"},
        {"params": list(task.second.parameters()), "weight_decay": 0.1, "name": "free"},
    ]
    optimizer = build_optimizer(groups, OptimSettings(), ranks.device)
    return Engine(task, optimizer, resolve(read_plan(ROOT / "ds_configs" / f"{plan}.json"), facts, plan), ranks)


def batches(number: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(6, 8, generator=generator) for _ in range(number)]


def step(engine: Engine, features: Tensor, share: float = 1.0, lr: float = 1e-2) -> None:
    dtype = next(engine.task.parameters()).dtype
    loss, _ = engine(features.to(dtype))
    engine.backward(loss * share)
    engine.step(lr)


def steps_of(engine: Engine, number: int = 3) -> dict[str, Tensor]:
    for features in batches(number):
        step(engine, features)
    weights = engine.weights()
    engine.close()
    return weights


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Truth:
    """AdamW of torch over fp32 masters, gradients from a copy of the model in the precision at hand."""

    def __init__(self, weights: dict[str, Tensor], precision: str) -> None:
        self.masters = Layers()
        self.masters.load_state_dict(weights)
        self.dtype = DTYPES[precision]
        self.optimizer = torch.optim.AdamW(self.masters.parameters(), lr=1e-2, weight_decay=0.1)
        self.frozen = False
        self.norm = float("nan")

    def step(self, micro_batches: list[Tensor], share: float = 1.0, clip_norm: float = 0.0) -> None:
        low = copy.deepcopy(self.masters).to(self.dtype)
        low.frozen = self.frozen
        self.optimizer.zero_grad()
        for features in micro_batches:
            loss, _ = low(features.to(self.dtype))
            (loss * share).backward()
            for master, parameter in zip(self.masters.parameters(), low.parameters(), strict=True):
                if parameter.grad is not None:
                    master.grad = parameter.grad.float() + (0 if master.grad is None else master.grad)
                    parameter.grad = None
        parameters = list(self.masters.parameters())
        self.norm = float(torch.nn.utils.clip_grad_norm_(parameters, clip_norm or float("inf")))
        self.optimizer.step()


def check_close(engine: Engine, truth: Truth) -> None:
    for name, wanted in truth.masters.state_dict().items():
        torch.testing.assert_close(engine.weights()[name], wanted, **CLOSE)


@pytest.fixture(params=[(plan, precision) for plan in PLANS for precision in PRECISIONS], ids="-".join)
def kind(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    return request.param


def test_every_stage_steps_as_torch_does(kind: tuple[str, str], ranks: Ranks) -> None:
    """From the first step on: a stage that counts a step too many is a quarter off in its first update."""
    plan, precision = kind
    engine = open_engine(Layers(), plan, ranks, precision, clip_norm=0.5)
    truth = Truth(engine.weights(), precision)
    for features in batches(3):
        step(engine, features)
        truth.step([features], clip_norm=0.5)
        check_close(engine, truth)
        assert engine.grad_norm == pytest.approx(truth.norm, rel=1e-5) and truth.norm > 1
    assert (engine.loss_scale, engine.skipped_steps) == (1.0, 0)
    engine.close()


def test_every_stage_adds_up_micro_batches(kind: tuple[str, str], ranks: Ranks) -> None:
    """Weights move at the last micro-batch of a step only, by the gradient of the sum."""
    plan, precision = kind
    engine = open_engine(Layers(), plan, ranks, precision, accumulation=2)
    start = engine.weights()
    truth = Truth(start, precision)
    for pair in zip(batches(2, seed=1), batches(2, seed=2), strict=True):
        before = engine.weights()
        step(engine, pair[0], share=0.25)
        assert equal(engine.weights(), before)
        step(engine, pair[1], share=0.25)
        assert not equal(engine.weights(), before)
        truth.step(list(pair), share=0.25)
    if (plan, precision) == ("zero0", "bf16"):  # adds up in bf16, which ds_plan says of stage 0
        for name, wanted in truth.masters.state_dict().items():
            torch.testing.assert_close(engine.weights()[name], wanted, rtol=1e-2, atol=2e-3)
    else:
        check_close(engine, truth)
    engine.close()


def test_frozen_weights_hold_still_and_thaw_as_if_new(kind: tuple[str, str], ranks: Ranks) -> None:
    plan, precision = kind
    task = Layers()
    engine = open_engine(task, plan, ranks, precision)
    start = engine.weights()
    truth = Truth(start, precision)
    engine.task.frozen = truth.frozen = True
    engine.set_group_scale("frozen", 0.0)
    for features in batches(5):
        step(engine, features)
        truth.step([features])
    for name, weight in engine.weights().items():
        moves = not name.startswith("first.") and name != "kept"
        assert torch.equal(weight, start[name]) != moves, f"{name}: no update and no decay while frozen"
    engine.task.frozen = truth.frozen = False
    engine.set_group_scale("frozen", 1.0)
    engine.restart_moments("frozen")
    for features in batches(3, seed=2):
        step(engine, features)
        truth.step([features])
        check_close(engine, truth)
    engine.close()


def test_moments_restart_even_where_a_frozen_table_had_gradients(ranks: Ranks) -> None:
    """Tied output weights: the table gets a gradient through the logits while it holds still."""
    engine = open_engine(Layers(), "zero1", ranks)
    start = engine.weights()
    engine.set_group_scale("frozen", 0.0)
    for features in batches(4):
        step(engine, features)
    engine.set_group_scale("frozen", 1.0)
    engine.restart_moments("frozen")
    [features] = batches(1, seed=2)
    step(engine, features)
    moved = engine.weights()["first.weight"] - start["first.weight"] * (1 - 1e-2 * 0.1)
    # AdamW's first update is lr in size, whatever the gradient
    torch.testing.assert_close(moved.abs(), torch.full_like(moved, 1e-2), rtol=1e-3, atol=1e-6)
    engine.close()


# ----------------------------------------------------------------------------------------------- to disk and back


def save(engine: Engine, place: Path, state: dict[str, Any]) -> Path:
    """A checkpoint on disk, as a stage writes it."""
    with Checkpoints(place, engine.ranks, Keep(), print) as checkpoints:
        checkpoints.save(engine, 1, 0, lambda: state)
    return place / "step-00000001"


def test_a_loaded_engine_goes_on_bit_for_bit(kind: tuple[str, str], ranks: Ranks, tmp_path: Path) -> None:
    plan, precision = kind
    whole = open_engine(Layers(), plan, ranks, precision)
    for features in batches(5):
        step(whole, features)
    saved = open_engine(Layers(), plan, ranks, precision)
    for features in batches(5)[:3]:
        step(saved, features)
    state = {"step": 3, "best": 0.1 + 0.2, "sums": [float("nan"), 1e-300]}
    folder = save(saved, tmp_path, state)
    saved.close()
    loaded = open_engine(Layers(), plan, ranks, precision)
    assert repr(loaded.load(folder)) == repr(state)
    for features in batches(5)[3:]:
        step(loaded, features)
    assert equal(loaded.weights(), whole.weights())
    loaded.close()
    whole.close()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("plan", ["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"])
def test_shares_that_are_put_together_and_cut_anew_are_the_same(
    plan: str, precision: str, ranks: Ranks, tmp_path: Path
) -> None:
    """What another number of ranks does with a checkpoint, done by one rank with its own: not a bit moves."""
    whole, saved = (open_engine(Layers(), plan, ranks, precision) for _ in range(2))
    for features in batches(3):
        step(whole, features)
        step(saved, features)
    folder = save(saved, tmp_path, {})
    saved.close()
    loaded = open_engine(Layers(), plan, ranks, precision)
    loaded._share_out(*loaded._read(folder), with_scale=True)
    assert equal(loaded.weights(), whole.weights())
    for features in batches(5)[3:]:
        step(loaded, features)
        step(whole, features)
    assert equal(loaded.weights(), whole.weights())
    loaded.close()
    whole.close()


def test_what_cannot_be_loaded_is_one_sentence(ranks: Ranks, tmp_path: Path) -> None:
    engine = open_engine(Layers(), "zero1", ranks)
    with pytest.raises(UserError, match=r"nothing: this checkpoint cannot be read \(\S.*\); remove the folder"):
        engine.load(tmp_path / "nothing")
    folder = save(engine, tmp_path, {})
    [weights] = folder.rglob("*model_states.pt")
    [moments] = folder.rglob("*optim_states.pt")
    intact = weights.read_bytes()
    weights.write_bytes(intact[:100])
    with pytest.raises(UserError, match=r"step-00000001: this checkpoint cannot be read \(\S.*\); remove the folder"):
        engine.load(folder)
    weights.write_bytes(intact)
    moments.unlink()
    with pytest.raises(UserError, match=r"cannot be read \(.*_optim_states.pt"):
        engine.load(folder)
    engine.close()


class Bomb:
    """A pickle that runs code when it is read."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.target),))


def test_no_code_of_a_checkpoint_is_run(ranks: Ranks, tmp_path: Path) -> None:
    engine = open_engine(Layers(), "zero1", ranks)
    folder = save(engine, tmp_path, {})
    target = tmp_path / "opened"
    for file in folder.rglob("*.pt"):
        torch.save({"module": Bomb(target)}, file)
    with pytest.raises(UserError, match="cannot be read"):
        engine.load(folder)
    assert not target.exists()
    pickle.loads(pickle.dumps(Bomb(target)))
    assert target.exists(), "the bomb is a real one"
    engine.close()


def test_weights_are_all_that_a_task_needs(ranks: Ranks) -> None:
    engine = open_engine(Layers(), "zero3", ranks, "bf16")
    weights = engine.weights()
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert set(weights) == set(Layers().state_dict()), "persistent buffers too, others not"
    Layers().load_state_dict(weights)
    engine.close()


# -------------------------------------------------------------------------------------------------- when it ends


def with_a_loss_scale(ranks: Ranks) -> Engine:
    """A CPU has no fp16 training, so DeepSpeed's scaler of fp16 works in an engine of fp32: from 8, not below 2."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    engine = open_engine(Layers(), "zero1", ranks)
    engine._smallest_scale = 2.0
    engine._ds.optimizer.loss_scaler = DynamicLossScaler(
        init_scale=8, scale_window=100, min_scale=2, delayed_shift=1, consecutive_hysteresis=False
    )
    return engine


def test_an_overflow_is_a_fault_only_at_the_smallest_loss_scale(ranks: Ranks) -> None:
    engine = with_a_loss_scale(ranks)
    [features] = batches(1)
    before = engine.weights()
    overflowing = engine.task.second.register_forward_hook(  # type: ignore[union-attr]
        lambda module, given, out: out.register_hook(lambda gradient: gradient * math.inf) and None
    )
    for scale, skipped in ((4, 1), (2, 2)):
        step(engine, features)  # no fault: DeepSpeed skips the step and mends the scale
        assert (engine.loss_scale, engine.skipped_steps) == (scale, skipped)
    with pytest.raises(NotFinite):
        step(engine, features)
    assert equal(engine.weights(), before) and engine.loss_scale == 2
    overflowing.remove()
    step(engine, features)
    assert all(weight.isfinite().all() for weight in engine.weights().values()) and not equal(engine.weights(), before)
    engine.close()


def test_a_loss_that_is_no_number_blames_no_loss_scale(ranks: Ranks) -> None:
    engine = with_a_loss_scale(ranks)
    [features] = batches(1)
    with pytest.raises(NotFinite):
        step(engine, features * math.nan)
    assert (engine.loss_scale, engine.skipped_steps) == (8, 0)
    engine.close()


def test_a_step_that_was_spoilt_blames_no_loss_scale(ranks: Ranks) -> None:
    """With a scale that could still be lowered DeepSpeed takes it for an overflow, on every rank."""
    engine = with_a_loss_scale(ranks)
    [features] = batches(1)
    before = engine.weights()
    with pytest.raises(NotFinite):
        engine.forgo(features)
    assert (engine.loss_scale, engine.skipped_steps) == (8, 0) and equal(engine.weights(), before)
    engine.close()


def test_a_snapshot_is_kept_by_nobody_else(ranks: Ranks) -> None:
    """It takes as much memory as the model and its moments."""
    engine = open_engine(Layers(), "zero1", ranks)
    assert engine.snapshot({}) and not engine._files
    engine.close()


@pytest.mark.parametrize(("place", "value"), [(0, math.nan), (1, math.inf)], ids=["nan first", "inf last"])
def test_a_step_that_is_not_finite_moves_nothing(
    kind: tuple[str, str], place: int, value: float, ranks: Ranks
) -> None:
    """Bad numbers in the first or the last micro-batch: moments and weights are as if the step had never been."""
    plan, precision = kind
    engine, twin = (open_engine(Layers(), plan, ranks, precision, accumulation=2, clip_norm=0.5) for _ in range(2))
    good, bad, last = (batches(2, seed=seed) for seed in range(3))
    bad[place] = bad[place] * value
    for features in (*good, *last):
        step(twin, features)
    for features in good:
        step(engine, features)
    step(engine, bad[0])
    with pytest.raises(NotFinite):
        step(engine, bad[1])
    for features in last:
        step(engine, features)
    assert equal(engine.weights(), twin.weights())
    engine.close()
    twin.close()


def test_a_loss_that_is_not_finite_is_a_fault_even_where_no_gradient_shows_it(kind: tuple[str, str], ranks: Ranks) -> None:
    plan, precision = kind
    engine = open_engine(Layers(), plan, ranks, precision)
    before = engine.weights()
    [features] = batches(1)
    loss, _ = engine(features.to(next(engine.task.parameters()).dtype))
    engine.backward(loss + math.inf)
    with pytest.raises(NotFinite):
        engine.step(1e-2)
    assert equal(engine.weights(), before)
    engine.close()


@pytest.mark.parametrize("how_far", ["forward", "in backward", "between micro-batches"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("plan", ["zero0", "zero1"])
def test_a_step_can_be_given_up_anywhere(plan: str, precision: str, how_far: str, ranks: Ranks) -> None:
    engine, twin = (open_engine(Layers(), plan, ranks, precision, accumulation=2) for _ in range(2))
    dtype = next(engine.task.parameters()).dtype
    good, given_up = (batches(2, seed=seed) for seed in range(2))
    for _ in range(2):
        for features in good:
            step(twin, features)
    for features in good:
        step(engine, features)
    step(engine, given_up[0])
    if how_far != "between micro-batches":
        loss, _ = engine(given_up[1].to(dtype))
    if how_far == "in backward":
        def stop(gradient: Tensor) -> None:
            raise MemoryError("here")

        parameter = next(parameter for name, parameter in engine.task.named_parameters() if name == "first.weight")
        handle = parameter.register_hook(stop)
        with pytest.raises(MemoryError, match="here"):
            engine.backward(loss)
        handle.remove()
    assert engine.can_forgo
    with pytest.raises(NotFinite):
        engine.forgo(given_up[1].to(dtype))
    for features in good:
        step(engine, features)
    assert equal(engine.weights(), twin.weights()) and engine.skipped_steps == 0
    engine.close()
    twin.close()


def test_a_step_has_as_many_micro_batches_as_are_expected(kind: tuple[str, str], ranks: Ranks) -> None:
    plan, precision = kind
    engine, twin = (open_engine(Layers(), plan, ranks, precision, accumulation=count) for count in (1, 3))
    for _ in range(2):
        engine.expect(3)
        for features in batches(3):
            step(engine, features)
            step(twin, features)
    engine.expect(1)
    step(engine, batches(1)[0])
    twin.expect(1)
    step(twin, batches(1)[0])
    assert equal(engine.weights(), twin.weights())
    engine.close()
    twin.close()


def test_deepspeed_does_not_warn_at_every_step(ranks: Ranks, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(record=True) as heard:
        warnings.resetwarnings()
        engine = open_engine(Layers(), "zero3", ranks)  # silences what only DeepSpeed could change
        steps_of(engine)
    assert [str(one.message) for one in heard if "distributed" in str(one.message)] == []
    assert capfd.readouterr().out == "", "standard output belongs to dstrain"


def test_peak_memory_is_at_least_what_torch_takes(ranks: Ranks) -> None:
    before = peak_memory_gb(ranks.device)
    block = torch.ones(int(before * 1e9 / 4) + 25_000_000)
    assert peak_memory_gb(ranks.device) >= before + 0.1 * 0.9
    assert block[0] == 1
