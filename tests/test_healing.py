"""Steps that fail in a real run, by numbers or by memory: what is tried, what is said, and that nothing else changes."""

from __future__ import annotations

import contextlib
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

from dstrain.engine import Diverged, Ranks
from dstrain.healing import Attempt, OutOfMemory, TooLarge, activations_gb, ids, is_shortage
from dstrain.loop import Interrupted
from dstrain.model.block import Block
from dstrain.model.encoder import Encoder, EncoderSettings
from dstrain.packed import Batch, Sequences
from dstrain.schema import validate

Hook = Callable[..., Any]


def run_of(corpus: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """One stage of eight classification steps, a reading at each."""
    stage = {"stages__pretrain": None, "stages__finetune__report_every": 1}
    return tiny_run(corpus, folder, **(stage | changes))


def events(told: Told) -> list[tuple[int, dict[str, float]]]:
    return [(reading.step, dict(reading.values)) for reading in told.readings if reading.split == "events"]


def break_at(monkeypatch: pytest.MonkeyPatch, steps: set[int], value: float = math.nan, layer: int = 1) -> None:
    """In these training steps (counted from 0) the MLP of a layer gives out numbers that are none."""
    intact = Block._mlp

    def broken(self: Block, x_TE: Tensor) -> Tensor:
        out_TE = intact(self, x_TE)
        here = self.training and self.mlp_dropout.place == f"block {layer} mlp" and self.mlp_dropout.step in steps
        return out_TE * value if here else out_TE

    monkeypatch.setattr(Block, "_mlp", broken)


def need_fp32(monkeypatch: pytest.MonkeyPatch, from_step: int) -> list[torch.dtype]:
    """Attention that cannot do in bf16, from this training step on; tells in what it was asked to compute."""
    intact, dtypes = Block._attend, []

    def attend(self: Block, x_TE: Tensor, *rest: Any) -> Tensor:
        def forward(kernel: Any, given: Any, out_THD: Tensor) -> Tensor:
            dtypes.append(given[0].dtype)
            breaks = self.training and given[0].dtype == torch.bfloat16 and self.mlp_dropout.step >= from_step
            return out_THD * math.nan if breaks else out_THD

        handle = self.attention.register_forward_hook(forward, prepend=True)
        try:
            return intact(self, x_TE, *rest)
        finally:
            handle.remove()

    monkeypatch.setattr(Block, "_attend", attend)
    return dtypes


@pytest.mark.parametrize(
    ("zero", "precision"), [("zero0", "fp32"), ("zero1", "bf16"), ("zero2", "fp32"), ("zero3", "bf16")]
)
def test_a_batch_that_breaks_is_skipped_and_named(
    zero: str, precision: str, small_corpus: Path, tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    break_at(monkeypatch, {2})
    tree = run_of(small_corpus, tmp_path, deepspeed=f"ds_configs/{zero}.json", precision=precision)
    told = train_here(tree, ranks)
    assert events(told) == [(3, {"skipped_batches": 1.0})]
    losses = told.losses("finetune")
    assert len(losses) == 8 and math.isnan(losses[2]), "nothing was learnt in the third step, and nothing counted"
    assert all(math.isfinite(loss) for number, loss in enumerate(losses) if number != 2)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "finetune: loss is not a number at step 3, and its batch is skipped" in said
    assert "was given to encoder.blocks.1.mlp_norm (LayerNorm, layer 1) in the forward pass" in said
    assert "of the training split" in said
    done = json.loads((tmp_path / "tiny/stages/finetune/done.json").read_text())
    assert done["health"] == {"skipped": 1, "in_a_row": 0, "attention_in_fp32": False, "pieces": 1}


def test_after_some_skips_the_stage_is_given_up(
    small_corpus: Path, tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_at(monkeypatch, {1, 2, 4, 5, 6})
    told = Told(None)  # type: ignore[arg-type]
    with pytest.raises(Diverged, match=r"finetune: loss is not a number at step 7 \(4 batches were skipped before\): the"):
        train_here(run_of(small_corpus, tmp_path, stages__finetune__healing={"skips_in_a_row": 2}), ranks, told=told)
    assert [step for step, _ in events(told)] == [2, 3, 5, 6, 7]
    assert events(told)[-1] == (7, {"given_up": 1.0})
    with pytest.raises(Diverged, match=r"at step 6 \(3 batches were skipped before\)"):
        train_here(run_of(small_corpus, tmp_path, name="all", stages__finetune__healing={"skips_in_all": 3}), ranks)
    assert list((tmp_path / "all/stages/finetune").rglob("*optim_states.pt")), "the checkpoint of step 4 stays"


def test_documents_of_the_broken_batch_are_named(
    small_corpus: Path, tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One document whose words have infinite vectors: it is in every message, once an epoch."""
    seen: list[list[int]] = []
    intact = Attempt.learn

    def learn(self: Attempt, piece: Any) -> Any:
        if 5 in piece.documents:
            seen.append(sorted(set(piece.documents.tolist())))
            place = piece.documents.tolist().index(5)
            start = piece.batch.sequences.starts[place]
            handle = self.engine.task.encoder.word_embedding.register_forward_hook(
                lambda module, given, out: out.index_fill(0, torch.tensor([start]), math.inf), prepend=True
            )
            try:
                return intact(self, piece)
            finally:
                handle.remove()
        return intact(self, piece)

    monkeypatch.setattr(Attempt, "learn", learn)
    train_here(run_of(small_corpus, tmp_path), ranks)
    said = [line for line in capsys.readouterr().err.splitlines() if "is skipped" in line]
    assert said and len(seen) == 2 * len(said), "once, and once more to find out"
    for line, documents in zip(said, seen[::2], strict=True):
        assert "came out of encoder.word_embedding" in line or "embedding" in line
        assert f"documents {ids(torch.tensor(documents).numpy())}" in line


@pytest.mark.parametrize("kind", [{"kind": "sdpa"}, {"kind": "favor"}, {"kind": "lsh", "num_hashes": 2, "chunk_size": 16}])
def test_in_16_bits_attention_goes_over_to_fp32(
    kind: dict[str, Any], small_corpus: Path, tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention that cannot do in bf16: after the skips it computes in fp32, and the very step is taken."""
    dtypes = need_fp32(monkeypatch, from_step=2)
    changes = {"precision": "bf16", "encoder__attention": kind, "stages__finetune__healing": {"skips_in_a_row": 1}}
    told = train_here(run_of(small_corpus, tmp_path, **changes), ranks)
    assert events(told) == [(3, {"skipped_batches": 1.0}), (4, {"attention_in_fp32": 1.0})]
    assert all(math.isfinite(loss) for loss in told.losses("finetune")[3:])
    assert dtypes[-1] == torch.float32, "the test split is read with it too"


@pytest.mark.slow
def test_what_was_done_is_in_the_checkpoint(
    small_corpus: Path, tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after micro-batches were cut, a skip and the change to fp32: the same to the last bit."""
    limit_memory(monkeypatch, tokens=300)
    need_fp32(monkeypatch, from_step=2)
    changes = {"precision": "bf16", "stages__finetune__healing": {"skips_in_a_row": 1}}
    whole = train_here(run_of(small_corpus, tmp_path, name="whole", **changes), ranks)
    assert [sorted(values) for _, values in events(whole)] == [["pieces"], ["skipped_batches"], ["attention_in_fp32"]]
    cut = run_of(small_corpus, tmp_path, name="cut", **changes)
    for before in (1, 3, 5):
        asked = iter([False] * (before if before == 1 else 2) + [True])
        with pytest.raises(Interrupted, match=f"at step {before}"):
            train_here(cut, ranks, lambda: next(asked))  # noqa: B023
    train_here(cut, ranks)
    done = [json.loads((tmp_path / name / "stages/finetune/done.json").read_text())["health"] for name in ("whole", "cut")]
    assert done[0] == done[1] == {"skipped": 1, "in_a_row": 0, "attention_in_fp32": True, "pieces": 2}
    files = [tmp_path / name / "stages/finetune/best.safetensors" for name in ("whole", "cut")]
    assert files[0].read_bytes() == files[1].read_bytes()


# ------------------------------------------------------------------------------------------------------- memory


def limit_memory(monkeypatch: pytest.MonkeyPatch, tokens: int, in_backward: bool = False) -> list[int]:
    """A training forward over more tokens asks torch for more memory than any machine has; tells the sizes asked for."""
    intact = Encoder.forward
    sizes: list[int] = []

    def forward(self: Encoder, batch: Batch) -> Tensor:
        hidden_TE = intact(self, batch)
        if self.training:
            sizes.append(batch.sequences.tokens)
        if self.training and batch.sequences.tokens > tokens:
            if not in_backward:
                torch.empty(1 << 50)
            hidden_TE.register_hook(lambda gradient: torch.empty(1 << 50))
        return hidden_TE

    monkeypatch.setattr(Encoder, "forward", forward)
    return sizes


@pytest.mark.parametrize(
    ("zero", "objective", "in_backward"),
    [
        ("zero0", "mlm", False), ("zero1", "classify", True), ("zero2", "classify", False),
        pytest.param("zero3", "mlm", True, marks=pytest.mark.slow),
    ],
)
def test_where_memory_runs_out_the_same_step_is_taken_in_pieces(
    zero: str, objective: str, in_backward: bool, small_corpus: Path, tmp_path: Path, ranks: Ranks,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The pieces have the gradient of the whole; up to ZeRO-1 in place, then from the checkpoint."""
    changes = {
        "deepspeed": f"ds_configs/{zero}.json", "encoder__dropout": 0.0, "stages__finetune__accumulation": 2,
        "stages__finetune__objective": {"kind": objective} | ({"classifier_dropout": 0.0} if objective == "classify" else {}),
    }  # fmt: skip
    whole = train_here(run_of(small_corpus, tmp_path, name="whole", **changes), ranks)
    sizes = limit_memory(monkeypatch, 200, in_backward)
    tree, told = run_of(small_corpus, tmp_path, name="cut", **changes), Told(None)  # type: ignore[arg-type]
    restarts: list[str] = []
    for _ in range(3):
        try:
            train_here(tree, ranks, told=told)
            break
        except OutOfMemory as error:
            restarts.append(str(error))
    assert max(sizes[-20:]) <= 200 < max(sizes)
    assert len(restarts) == (2 if zero in ("zero2", "zero3") else 0)
    assert all("the same command goes on from the last checkpoint, with each micro-batch in" in said for said in restarts)
    assert told.losses("finetune")[-8:] == pytest.approx(whole.losses("finetune"), rel=1e-5)
    for one, other in zip(*(
        load_file(tmp_path / name / "stages/finetune/best.safetensors").values() for name in ("whole", "cut")
    ), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert events(told) == [(1, {"pieces": 4.0})]
    if zero in ("zero0", "zero1"):
        assert "step 1 ran out of memory; from now on each micro-batch is taken in 4 pieces" in capsys.readouterr().err


@pytest.mark.parametrize("objective", [{"kind": "mlm"}, {"kind": "classify", "pooler": "roberta"}])
def test_pieces_drop_what_the_whole_drops(
    objective: dict[str, Any], small_corpus: Path, tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The curve is the same with dropout. Weights are not compared: Adam makes whole steps of gradients that are rounding."""
    changes = {"encoder__dropout": 0.3, "stages__finetune__objective": objective, "stages__finetune__accumulation": 2}
    whole = train_here(run_of(small_corpus, tmp_path, name="whole", **changes), ranks)
    limit_memory(monkeypatch, 200)
    cut = train_here(run_of(small_corpus, tmp_path, name="cut", **changes), ranks)
    assert events(cut) == [(1, {"pieces": 4.0})]
    assert cut.losses("finetune") == pytest.approx(whole.losses("finetune"), rel=1e-5)


def test_where_only_a_new_start_helps_there_is_an_end_to_new_starts(
    small_corpus: Path, tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_memory(monkeypatch, 60)
    tree = run_of(small_corpus, tmp_path, deepspeed="ds_configs/zero2.json")

    def start_again() -> None:
        for _ in range(10):
            with contextlib.suppress(OutOfMemory):
                train_here(tree, ranks)

    with pytest.raises(TooLarge, match=r"finetune: document \d+ of .* \(6\d tokens in one sequence, the longest of this"):
        start_again()


@pytest.mark.parametrize("tokens", [200, 60])
def test_memory_that_runs_out_in_an_evaluation_makes_its_batches_smaller(
    tokens: int, small_corpus: Path, tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """In the middle of a stage and in the test split, with the same figures; until a batch is one document."""
    whole = train_here(run_of(small_corpus, tmp_path, name="whole"), ranks)
    intact = Encoder.forward

    def forward(self: Encoder, batch: Batch) -> Tensor:
        if not self.training and batch.sequences.tokens > tokens:
            torch.empty(1 << 50)
        return intact(self, batch)

    monkeypatch.setattr(Encoder, "forward", forward)
    tree = run_of(small_corpus, tmp_path, name="cut")
    if tokens < 64:
        with pytest.raises(TooLarge, match=r"finetune: memory ran out in an evaluation \(.*batches cannot be any smaller"):
            train_here(tree, ranks, patiently=True)
        return
    cut = train_here(tree, ranks, patiently=True)
    assert "ran out in an evaluation" in (said := capsys.readouterr().err) and "with each micro-batch in 4 pieces" in said
    assert cut.losses("finetune", "valid")[-2:] == pytest.approx(whole.losses("finetune", "valid"), rel=1e-5)
    assert cut.outcome is not None and whole.outcome is not None
    assert cut.outcome.test == pytest.approx(whole.outcome.test, rel=1e-5)


def test_a_document_that_does_not_fit_alone_is_named(
    small_corpus: Path, tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_memory(monkeypatch, 60)
    says = (
        r"finetune: document \d+ of the training split, counted from 0 \(6\d tokens in one sequence, at step 1\), does not fit "
        r"into memory even alone: it takes about 0\.0 GB beside the model by estimate, \d+\.\d GB were held in all at most, and "
        r"then: .*allocate.*; lower stages.finetune.max_length"
    )
    with pytest.raises(Diverged, match=says):
        train_here(run_of(small_corpus, tmp_path), ranks)


@pytest.mark.parametrize("changes", [{}, {"norm": "pre", "intermediate_size": 1024}])
def test_the_estimate_of_what_a_document_takes_is_near(changes: dict[str, Any]) -> None:
    """Against what autograd keeps of a sequence, each storage once."""
    encoder = Encoder(validate(EncoderSettings, {"preset": "bert_tiny", **changes}, "test"), 300, 0).train()
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {parameter.untyped_storage().data_ptr() for parameter in encoder.parameters()}
    batch = Batch(torch.full((1024,), 7), Sequences.of([1024]), torch.tensor([0]), 1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden_TE = encoder(batch)
    found = sum(size for place, size in kept.items() if place not in weights) / 1e9
    estimate = activations_gb(encoder, 1024)
    assert hidden_TE.requires_grad and 0.8 * found < estimate < 1.2 * found
    encoder.settings = encoder.settings.model_copy(update={"activation_checkpointing": True, "num_layers": 24})
    assert activations_gb(encoder, 1024) < 2 * estimate, "each layer's input, and one layer"


@pytest.mark.parametrize(
    ("error", "shortage"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried ..."), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_a_shortage_is_told_from_other_errors(error: Exception, shortage: bool) -> None:
    assert is_shortage(error) == shortage


def test_torch_says_what_is_looked_for() -> None:
    with pytest.raises(RuntimeError) as found:
        torch.empty(1 << 50)
    assert is_shortage(found.value)
