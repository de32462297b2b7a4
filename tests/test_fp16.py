"""fp16 in a real run, on a CPU: DeepSpeed refuses it there only where oneDNN is slow at it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Told, tiny_run, train_here
from safetensors.torch import load_file
from torch import Tensor

from dstrain.engine import Diverged, Engine, Ranks
from dstrain.healing import GaveOut
from dstrain.loop import Interrupted
from dstrain.model.block import Block
from dstrain.partitions import Whole, put_together
from dstrain.precision import Precision, choose
from dstrain.schema import UserError

ZERO = ("zero1", *(pytest.param(zero, marks=pytest.mark.slow) for zero in ("zero2", "zero3")))
"""At stage 0 fp16 is refused (docs/log.md)."""


@pytest.fixture(autouse=True)
def fp16_on_a_cpu(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets fp16 pass, in DeepSpeed and in dstrain."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    def lenient(wanted: Any, device: torch.device) -> Precision:
        return Precision("fp16", torch.float16, "fp16: a test") if wanted == "fp16" else choose(wanted, device)

    monkeypatch.setattr(CPU_Accelerator, "is_fp16_supported", lambda self: True)
    monkeypatch.setattr("dstrain.run.choose", lenient)


def run_of(corpus: Path, folder: Path, zero: str, **changes: Any) -> dict[str, Any]:
    """Two stages of 6 and 8 steps, a reading at each."""
    every = {f"stages__{name}__report_every": 1 for name in ("pretrain", "finetune")}
    return tiny_run(corpus, folder, precision="fp16", deepspeed=f"ds_configs/{zero}.json", **(every | changes))


def spoil(monkeypatch: pytest.MonkeyPatch, where: Callable[[int, torch.dtype], float]) -> None:
    """Multiplies what the MLP of layer 1 gives out in a training step by `where(step, dtype)`."""
    intact = Block._mlp

    def spoilt(self: Block, x_TE: Tensor) -> Tensor:
        out_TE = intact(self, x_TE)
        if not self.training or self.mlp_dropout.place != "block 1 mlp":
            return out_TE
        return out_TE * where(self.mlp_dropout.step, out_TE.dtype)

    monkeypatch.setattr(Block, "_mlp", spoilt)


@pytest.fixture
def overflow(monkeypatch: pytest.MonkeyPatch) -> Callable[[set[int], float], None]:
    """`overflow(steps, above)`: the gradient of layer 1 overflows in these training steps while the scale is above that."""
    backward, mlp, scale = Engine.backward, Block._mlp, [1.0]

    def noting(self: Engine, loss: Tensor) -> None:
        scale[0] = self.loss_scale
        backward(self, loss)

    def overflow(steps: set[int], above: float) -> None:
        def overflowing(self: Block, x_TE: Tensor) -> Tensor:
            out_TE = mlp(self, x_TE)
            if self.training and self.mlp_dropout.place == "block 1 mlp" and self.mlp_dropout.step in steps:
                out_TE.register_hook(lambda gradient: gradient * (math.inf if scale[0] > above else 1.0))
            return out_TE

        monkeypatch.setattr(Block, "_mlp", overflowing)

    monkeypatch.setattr(Engine, "backward", noting)
    return overflow


def events(told: Told) -> list[tuple[str, int, dict[str, float]]]:
    found = [reading for reading in told.readings if reading.split == "events"]
    return [(reading.stage, reading.step, dict(reading.values)) for reading in found]


def stop_after(steps: int) -> Callable[[], bool]:
    """Asks to stop when it has been asked so often."""
    left = iter([False] * steps)
    return lambda: next(left, True)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "tiny/stages/finetune/best.safetensors")


@pytest.mark.parametrize("zero", ZERO)
def test_fp16_learns_what_fp32_learns(zero: str, small_corpus: Path, tmp_path: Path, ranks: Ranks) -> None:
    low = train_here(run_of(small_corpus, tmp_path / "low", zero), ranks)
    high = train_here({**run_of(small_corpus, tmp_path / "high", zero), "precision": "fp32"}, ranks)
    for stage in ("pretrain", "finetune"):
        assert low.losses(stage) == pytest.approx(high.losses(stage), rel=5e-3)
    assert {reading.values.get("loss_scale", 65536.0) for reading in low.readings} == {65536.0} and not events(low)


@pytest.mark.parametrize("zero", ZERO)
def test_an_overflow_lowers_the_scale_and_costs_one_step(
    zero: str, small_corpus: Path, tmp_path: Path, ranks: Ranks, overflow: Callable[[set[int], float], None]
) -> None:
    overflow(set(range(14)), 16384.0)
    changes = {"loss_scale": {"hysteresis": 1}}
    told = train_here(run_of(small_corpus, tmp_path, zero, **changes), ranks)
    assert events(told) == [
        (stage, step, {"loss_scale": after, "skipped_steps": float(step)})
        for stage in ("pretrain", "finetune")
        for step, after in ((1, 32768.0), (2, 16384.0))
    ]
    assert all(math.isfinite(loss) for loss in told.losses("finetune"))


@pytest.mark.parametrize("zero", ZERO)
def test_a_loss_that_is_no_number_is_no_matter_of_scale(
    zero: str, small_corpus: Path, tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """It is named and skipped at once; the scale, which had nothing to do with it, stays."""
    spoil(monkeypatch, lambda step, dtype: math.nan if step == 8 else 1.0)
    told = train_here(run_of(small_corpus, tmp_path, zero), ranks)
    assert events(told) == [("finetune", 3, {"skipped_batches": 1.0})]
    assert {reading.values["loss_scale"] for reading in told.readings if reading.split == "train"} == {65536.0}
    assert "finetune: loss is not a number at step 3, and its batch is skipped" in capsys.readouterr().err


@pytest.mark.parametrize("zero", ZERO)
def test_stopped_and_gone_on_with_is_bit_for_bit_the_same(
    zero: str, small_corpus: Path, tmp_path: Path, ranks: Ranks, overflow: Callable[[set[int], float], None]
) -> None:
    """The history of the loss scale included: it falls before the stop, and rises after it."""
    overflow({7, 8}, 16384.0)
    changes = {"loss_scale": {"hysteresis": 1, "loss_scale_window": 3}, "stages__finetune__checkpoint_every": 1}
    whole = train_here(run_of(small_corpus, tmp_path / "whole", zero, **changes), ranks)
    tree, told = run_of(small_corpus, tmp_path / "parts", zero, **changes), Told(None)  # type: ignore[arg-type]
    for steps in (8, 2):
        with pytest.raises(Interrupted):
            train_here(tree, ranks, stop_after(steps), told)
    train_here(tree, ranks, told=told)
    assert events(told) == events(whole) and len(events(whole)) >= 3
    assert told.losses("finetune") == whole.losses("finetune")
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("zero", ZERO)
def test_fp16_that_gives_out_gives_way_to_bf16(
    zero: str, small_corpus: Path, tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Nothing that was learnt is lost, the very step is taken in bf16, and so is every later stage. Stops change nothing, nor
    does a death between the last checkpoint in fp16 and the note of it."""
    spoil(monkeypatch, lambda step, dtype: math.inf if step >= 2 and dtype == torch.float16 else 1.0)
    healing = {f"stages__{name}__healing": {"skips_in_a_row": 1} for name in ("pretrain", "finetune")}
    told = train_here(run_of(small_corpus, tmp_path / "whole", zero, **healing), ranks, patiently=True)
    assert events(told) == [
        ("pretrain", 3, {"skipped_batches": 1.0}),
        ("pretrain", 4, {"attention_in_fp32": 1.0, "skipped_batches": 2.0}),
        ("pretrain", 5, {"bf16_for_fp16": 1.0}),
    ]
    assert "pretrain: loss is not a number at step 5, and the run goes on in bf16" in capsys.readouterr().err
    assert told.tags["precision"] == "bf16: fp16 could not hold the numbers of this run"
    assert [step for step, loss in enumerate(told.losses("pretrain"), 1) if math.isnan(loss)] == [3, 4]
    assert len(told.losses("pretrain")) == 6 and len(told.losses("finetune")) == 8

    reference = train_here({**run_of(small_corpus, tmp_path / "fp32", zero, **healing), "precision": "fp32"}, ranks)
    assert told.losses("pretrain")[:2] == pytest.approx(reference.losses("pretrain")[:2], rel=5e-3)
    assert told.losses("finetune") == pytest.approx(reference.losses("finetune"), rel=5e-2)

    tree, parts = run_of(small_corpus, tmp_path / "parts", zero, **healing), Told(None)  # type: ignore[arg-type]
    with pytest.raises(Interrupted):
        train_here(tree, ranks, stop_after(4), parts, patiently=True)  # there is a checkpoint of the step before
    for _ in range(2):
        with pytest.raises(GaveOut, match="at step 5"):
            train_here(tree, ranks, told=parts)
    for steps in (0, 1, 4):
        with pytest.raises(Interrupted):
            train_here(tree, ranks, stop_after(steps), parts, patiently=True)
    train_here(tree, ranks, told=parts, patiently=True)
    assert events(parts) == events(told) and parts.losses("pretrain") == pytest.approx(told.losses("pretrain"), nan_ok=True)
    assert parts.losses("finetune") == told.losses("finetune")
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("zero", ZERO)
def test_masters_and_moments_survive_the_way_to_bf16(
    zero: str, small_corpus: Path, tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    wholes: list[dict[str, Whole]] = []
    snapshot, load = Engine.snapshot, Engine.load

    def keeping(self: Engine, state: dict[str, Any]) -> dict[str, Any]:
        files = snapshot(self, state)
        states = [content["optimizer_state_dict"] for name, content in files.items() if "optim_states" in name]
        wholes.append(put_together(next(files[name] for name in files if "model_states" in name), states))
        return files

    def loading(self: Engine, folder: Path) -> dict[str, Any]:
        state = load(self, folder)
        keeping(self, state)
        return state

    monkeypatch.setattr(Engine, "snapshot", keeping)
    monkeypatch.setattr(Engine, "load", loading)
    spoil(monkeypatch, lambda step, dtype: math.inf if step >= 5 and dtype == torch.float16 else 1.0)
    changes = {"stages__finetune": None, "stages__pretrain__healing": {"skips_in_a_row": 0}}
    train_here(run_of(small_corpus, tmp_path, zero, **changes), ranks, patiently=True)
    before, after = wholes[-2:]  # as fp16 left them at step 5, as bf16 took them over
    assert before.keys() == after.keys()
    for name, whole in before.items():
        assert whole.counts == after[name].counts and set(whole.states) >= {"fp32", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(value, after[name].states[key]) for key, value in whole.states.items())


@pytest.mark.parametrize("way", ["switched off", "fp16 in the JSON"])
def test_without_bf16_the_stage_is_given_up(
    way: str, small_corpus: Path, tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, lambda step, dtype: math.inf if step >= 3 else 1.0)
    tree = run_of(small_corpus, tmp_path, "zero1", stages__finetune=None, stages__pretrain__healing={"skips_in_a_row": 0})
    if way == "switched off":
        tree["stages"]["pretrain"]["healing"]["bf16_for_fp16"] = False
    else:
        plan = json.loads(Path("ds_configs/zero1.json").read_text())
        plan["fp16"]["enabled"] = True
        plan["bf16"]["enabled"] = False
        (tmp_path / "mine.json").write_text(json.dumps(plan))
        tree["deepspeed"] = str(tmp_path / "mine.json")
    with pytest.raises(Diverged, match="pretrain: loss is not a number at step 4"):
        train_here(tree, ranks, patiently=True)


@pytest.mark.parametrize("zero", ZERO)
def test_what_was_saved_in_bf16_goes_on_in_fp16(
    zero: str, small_corpus: Path, tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where population-based training hands a trial's state to another one."""
    tree = run_of(small_corpus, tmp_path, zero, stages__finetune=None)
    with monkeypatch.context() as patch:
        patch.setattr("dstrain.run.choose", lambda wanted, device: Precision("bf16", torch.bfloat16, ""))
        with pytest.raises(Interrupted):
            train_here(tree, ranks, stop_after(3))
    told = train_here(tree, ranks)
    assert [reading.step for reading in told.readings if "loss_scale" in reading.values] == [4, 5, 6]
    assert all(math.isfinite(loss) for loss in told.losses("pretrain"))


def test_a_run_that_goes_on_in_bf16_is_refused_where_there_is_none(
    small_corpus: Path, tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = run_of(small_corpus, tmp_path, "zero1", stages__finetune=None)
    with pytest.raises(Interrupted):
        train_here(tree, ranks, stop_after(3))
    (tmp_path / "tiny/fp16-gave-out.txt").write_text("once")
    monkeypatch.setattr("dstrain.run.in_place_of_fp16", lambda device: None)
    with pytest.raises(UserError, match=r"fp16-gave-out\.txt: this run goes on in bf16, which the GPU here has not got"):
        train_here(tree, ranks)


def test_numbers_that_bf16_cannot_hold_either_end_the_stage(
    small_corpus: Path, tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, lambda step, dtype: math.inf if step >= 3 else 1.0)
    healing = {"stages__pretrain__healing": {"skips_in_a_row": 0, "skips_in_all": 0}}
    with pytest.raises(Diverged, match="pretrain: loss is not a number at step 4: "):
        train_here(run_of(small_corpus, tmp_path, "zero1", **healing), ranks, patiently=True)
