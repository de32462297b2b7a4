"""The loop on real text and a real engine: the numbers of a plain loop over the same micro-batches, and its habits."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Told, tiny_run, train_here
from safetensors.torch import load_file
from torch import Tensor

from dstrain import loop
from dstrain import run as run_module
from dstrain.checkpoints import Checkpoints
from dstrain.data.cache import TokenSplit
from dstrain.engine import Diverged, Engine, Ranks
from dstrain.loop import Course, Interrupted, StageSettings, evaluate, prepared
from dstrain.model.encoder import Encoder
from dstrain.objective import Task
from dstrain.optim import lr_factor
from dstrain.precision import choose
from dstrain.readings import Reading, read_readings
from dstrain.run import Ready, Watch, claim, groups, make_ready, run, run_vocabulary
from dstrain.schema import UserError, validate
from dstrain.settings import RunSettings

CLASSIFY = {"objective": {"kind": "classify"}, "corpus": {"path": "somewhere"}}


def stage_of(**changes: Any) -> StageSettings:
    return validate(StageSettings, {**CLASSIFY, "max_length": 64, "tokens_per_batch": 128, **changes}, "test")


def course_of(sequences: int = 50, group: int = 1, **changes: Any) -> Course:
    lengths = np.random.default_rng(0).integers(8, 65, sequences)
    return Course(lengths, stage_of(**changes), seed=3, group=group)


# --------------------------------------------------------------------------------------------- settings and course


def test_a_document_must_fit_in_a_micro_batch() -> None:
    with pytest.raises(UserError, match=r"max_length 512 is more than tokens_per_batch 128: .*lower the one"):
        stage_of(max_length=512)


@pytest.mark.parametrize(
    ("changes", "selection"),
    [
        ({}, ("f1_macro", "max")),
        ({"metric": "loss"}, ("loss", "min")),
        ({"metric": "accuracy"}, ("accuracy", "max")),
        ({"metric": "f1_macro", "mode": "min"}, ("f1_macro", "min")),
        ({"objective": {"kind": "mlm"}}, ("loss", "min")),
        ({"objective": {"kind": "mlm"}, "metric": "accuracy"}, ("accuracy", "max")),
    ],
)
def test_the_metric_knows_what_is_good(changes: dict[str, Any], selection: tuple[str, str]) -> None:
    assert stage_of(**changes).selection == selection


@pytest.mark.parametrize("group", [1, 3])
def test_every_sequence_once_an_epoch_over_all_steps(group: int) -> None:
    course = course_of(group=group, epochs=3)
    read: dict[int, list[int]] = {}
    for step in range(course.total_steps):
        plan, epoch, inner = course.step(step)
        for piece in plan.of_rank(inner, 0, 1):
            read.setdefault(epoch, []).extend(piece.sequences_N.tolist())
    assert list(read) == [0, 1, 2]
    assert all(sorted(sequences) == list(range(50)) for sequences in read.values())
    assert read[0] != read[1]
    assert course.left_out == 0 and course.notes == []


def test_steps_end_a_stage_in_the_middle_of_an_epoch() -> None:
    whole = course_of(epochs=2)
    cut = course_of(steps=whole.total_steps - 1)
    assert cut.total_steps == whole.total_steps - 1
    for step in range(cut.total_steps):
        (plan, *place), (other, *same) = whole.step(step), cut.step(step)
        assert place == same
        assert np.array_equal(plan.order, other.order)


def test_what_an_epoch_leaves_out_is_said() -> None:
    course = Course(np.full(7, 64), stage_of(tokens_per_batch=64, epochs=2), seed=0, group=3)
    assert (course.total_steps, course.left_out) == (4, 2)
    [note] = course.notes
    assert "2 of 14 sequences (over 2 epochs) are in no step" in note and "3 micro-batches" in note


def test_due_says_when() -> None:
    course = course_of(steps=10, evaluate_every_steps=4, report_every=3, checkpoint_every=5)
    due = {step: course.due(step) for step in range(1, 11)}
    assert [step for step, what in due.items() if what.evaluation] == [4, 8, 10]
    assert [step for step, what in due.items() if what.checkpoint] == [5, 10]
    assert [step for step, what in due.items() if what.report] == [3, 4, 5, 6, 8, 9, 10], "and before all the others"
    assert [step for step, what in due.items() if what.end] == [10]
    assert [step for step, what in due.items() if what.attention] == [10]
    course = course_of(steps=10, attention_report_interval=4)
    assert [step for step in range(1, 11) if course.due(step).attention] == [4, 8, 10]


def test_evaluations_by_epochs_and_checkpoints_with_them() -> None:
    course = course_of(epochs=2, evaluate_every=0.5)
    assert course.evaluation_distance == round(course.steps_per_epoch / 2)
    assert all(course.due(step).checkpoint == course.due(step).evaluation for step in range(1, course.total_steps))
    assert course_of(evaluate_every=0.001).evaluation_distance == 1


def test_the_thaw_is_at_its_share_of_the_steps() -> None:
    assert course_of(steps=9, num_frozen_layers=1).thaw_step == 4
    assert course_of(steps=9, num_frozen_layers=1, thaw_at=1.0).thaw_step == 9
    assert course_of(steps=9, num_frozen_layers=0).thaw_step == 0


# ------------------------------------------------------------------------------------------- one stage in our hands


class Bench:
    """A stage of a tiny run with its engine, as `run.train` makes it."""

    def __init__(self, tree: dict[str, Any], ranks: Ranks, stage: str) -> None:
        self.settings = validate(RunSettings, tree, "test")
        self.stage = self.settings.stages[stage]
        self.ranks = ranks
        vocabulary = run_vocabulary(self.settings, lambda sentence: None)
        precision = choose(self.settings.precision, ranks.device)
        self.ready: Ready = make_ready(self.settings, vocabulary, precision, ranks, lambda sentence: None)[stage]
        self.task = Task(Encoder(self.settings.encoder, vocabulary.size, self.settings.seed), self.ready.objective)
        self.site = loop.Site(stage, self.settings.folder / "stages" / stage, 0, self.settings.seed)

    def engine(self) -> Engine:
        optimizer = run_module.build_optimizer(groups(self.task, self.stage), self.stage.optim, self.ranks.device)
        return Engine(self.task, optimizer, self.ready.plan, self.ranks)

    def fit(self, engine: Engine, report: Callable[[Reading], None] = lambda reading: None) -> loop.Progress:
        ready = self.ready
        with Checkpoints(self.site.folder / "checkpoints", self.ranks, self.stage.keep, lambda sentence: None) as kept:
            return loop.fit(engine, ready.objective, ready.corpus, self.stage, ready.course, self.site, kept, report)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_stage_is_a_plain_loop_over_the_mean_of_all_terms(
    stage: str, small_corpus: Path, tmp_path: Path, ranks: Ranks
) -> None:
    """Two micro-batches a step, frozen until half way, clipped, warmed up: AdamW on the mean of the step's terms."""
    changes = {
        f"stages__{stage}__{name}": value
        for name, value in {"accumulation": 2, "num_frozen_layers": 1, "steps": 8, "optim__clip_norm": 0.5}.items()
    }
    if stage == "pretrain":  # its table is the output matrix too, which a plain loop's freezing would have to detach
        changes["stages__pretrain__num_frozen_layers"] = 0
    tree = tiny_run(small_corpus, tmp_path, **changes)
    bench = Bench(tree, ranks, stage)
    engine = bench.engine()
    start = engine.weights()
    told: list[Reading] = []
    assert bench.fit(engine, told.append).stopped == "finished"
    found = engine.weights()
    engine.close()

    plain, ready, course = Bench(tree, ranks, stage), bench.ready, bench.ready.course
    task, split = plain.task, ready.corpus.splits["train"]
    task.load_state_dict(start)
    settings = plain.stage.optim
    optimizer = torch.optim.AdamW(groups(task, plain.stage), eps=settings.eps, betas=settings.betas)
    losses: list[Tensor] = []
    for step in range(course.total_steps):
        epoch_plan, epoch, inner = course.step(step)
        task.encoder.frozen_layers = plain.stage.num_frozen_layers if step < course.thaw_step else 0
        pieces = [
            plain.ready.objective.batch(split, piece.sequences_N, epoch) for piece in epoch_plan.of_rank(inner, 0, 1)
        ]
        assert len(pieces) == 2
        optimizer.zero_grad()
        for number, batch in enumerate(pieces):
            task.set_step(step, number)
            loss_sum, _ = task(batch)
            (loss_sum / sum(piece.weight for piece in pieces)).backward()
            losses.append(torch.stack([loss_sum.detach(), torch.tensor(float(batch.weight))]))
        torch.nn.utils.clip_grad_norm_(task.parameters(), settings.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * lr_factor(step, course.total_steps, settings)
        optimizer.step()
    assert any(one[1] != other[1] for one, other in zip(losses[::2], losses[1::2], strict=True)), "no mean of means"
    for name, wanted in task.state_dict().items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-4, atol=1e-5)  # a step is 3e-3

    readings = [reading for reading in told if reading.split == "train"]
    ends = [0, *(reading.step for reading in readings)]
    for reading, first, last in zip(readings, ends, ends[1:], strict=False):
        loss_sum, terms = torch.stack(losses[2 * first : 2 * last]).double().sum(dim=0)
        assert reading.values["loss"] == pytest.approx(float(loss_sum / terms), rel=1e-5)
    assert readings[-1].tokens == sum(
        int(split.lengths[piece.sequences_N].sum())
        for step in range(8)
        for piece in course.step(step)[0].of_rank(course.step(step)[2], 0, 1)
    )


def test_ranks_share_a_step_out_as_accumulation_does(small_corpus: Path, tmp_path: Path, ranks: Ranks) -> None:
    """1 rank x 4 micro-batches and 4 ranks x 1 read the same micro-batches by the same numbers (so, same dropout)."""
    bench = Bench(tiny_run(small_corpus, tmp_path, stages__pretrain__accumulation=4), ranks, "pretrain")
    split, objective, course = bench.ready.corpus.splits["train"], bench.ready.objective, bench.ready.course

    def shares(world: int) -> list[dict[int, Tensor]]:
        found: list[dict[int, Tensor]] = [{} for _ in range(course.total_steps)]
        for rank in range(world):
            place = Ranks(rank, world, ranks.device, "test")
            for mine in prepared(course, split, objective, place, range(course.total_steps)):
                assert len(mine.batches) == 4 // world
                assert mine.tokens == sum(
                    int(split.lengths[piece.sequences_N].sum())
                    for piece in course.step(mine.step)[0].of_rank(course.step(mine.step)[2], 0, 1)
                )
                found[mine.step] |= {piece.micro_batch: piece.batch.ids_T for piece in mine.batches}
        return found

    alone = shares(1)
    for world in (2, 4):
        for one, other in zip(alone, shares(world), strict=True):
            assert one.keys() == other.keys() == set(range(4))
            assert all(torch.equal(one[number], other[number]) for number in one)


def test_more_ranks_than_micro_batches_share_the_pieces(small_corpus: Path, tmp_path: Path, ranks: Ranks) -> None:
    """3 ranks take a step of 2 micro-batches, each cut in 3: together all of it, and the same gradient, dropout included."""
    bench = Bench(tiny_run(small_corpus, tmp_path, stages__pretrain__accumulation=2), ranks, "pretrain")
    split, objective, course, task = bench.ready.corpus.splits["train"], bench.ready.objective, bench.ready.course, bench.task
    shared = Course(split.lengths, bench.stage, bench.settings.seed, group=2, cut=3)

    def gradient(course: Course, world: int) -> tuple[dict[str, Tensor], float]:
        task.zero_grad()
        shares = [
            next(prepared(course, split, objective, Ranks(rank, world, ranks.device, "test"), range(3, 4)))
            for rank in range(world)
        ]
        assert {len(mine.batches) for mine in shares} == {2} and len({mine.tokens for mine in shares}) == 1
        for piece in (piece for mine in shares for piece in mine.batches):
            assert piece.counts
            task.set_step(3, piece.micro_batch, piece.tokens, piece.sequences)
            task(piece.batch)[0].backward()
        return {name: p.grad.clone() for name, p in task.named_parameters()}, sum(mine.weight for mine in shares)

    (one, terms), (three, same_terms) = gradient(course, 1), gradient(shared, 3)
    assert terms == same_terms
    for name, wanted in one.items():
        torch.testing.assert_close(three[name], wanted, rtol=1e-4, atol=1e-5)


def test_an_evaluation_can_be_repeated(small_corpus: Path, tmp_path: Path, ranks: Ranks) -> None:
    """The same weights give the same figures to the last bit: fixed masks, no dropout, and training mode comes back."""
    for kind in ("sdpa", "favor", "lsh"):
        bench = Bench(tiny_run(small_corpus, tmp_path, encoder__attention__kind=kind), ranks, "pretrain")
        valid = bench.ready.corpus.splits["valid"]
        engine = bench.engine()
        first = evaluate(engine, bench.ready.objective, valid, 512, ranks)
        engine.task.set_step(17, 3)
        assert evaluate(engine, bench.ready.objective, valid, 512, ranks) == first
        assert engine.task.training
        assert evaluate(bench.task.eval(), bench.ready.objective, valid, 512, ranks) == first, "and without an engine"
        assert not bench.task.training
        other = evaluate(engine, bench.ready.objective, valid, 256, ranks)
        assert other == pytest.approx(first, rel=1e-5), "whatever the micro-batches"
        engine.close()


# ----------------------------------------------------------------------------------------------- habits of a stage


@pytest.mark.parametrize("kind", ["sdpa", pytest.param("favor", marks=pytest.mark.slow), "lsh"])
def test_the_loss_falls_in_every_stage(kind: str, small_corpus: Path, tmp_path: Path, ranks: Ranks) -> None:
    lr = {f"stages__{stage}__optim__lr": 1e-2 for stage in ("pretrain", "finetune")}
    every = {f"stages__{stage}__report_every": 8 for stage in ("pretrain", "finetune")}
    steps = {"stages__pretrain__steps": 24, "stages__finetune__steps": 40}
    told = train_here(tiny_run(small_corpus, tmp_path, encoder__attention__kind=kind, **steps, **lr, **every), ranks)
    assert told.losses("pretrain")[-1] < told.losses("pretrain")[0] - 0.2
    assert told.losses("finetune")[-1] < told.losses("finetune")[0] - 0.1
    assert told.losses("pretrain", "valid")[-1] < told.losses("pretrain", "valid")[0]


@pytest.fixture
def last_weights(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """The weights of every engine when its stage ended, in order."""
    found: list[dict[str, Tensor]] = []
    close = Engine.close

    def noting(engine: Engine) -> None:
        found.append(engine.weights())
        close(engine)

    monkeypatch.setattr(Engine, "close", noting)
    return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_evaluations_and_checkpoints_do_not_disturb_training(
    small_corpus: Path, tmp_path: Path, ranks: Ranks, last_weights: list[dict[str, Tensor]]
) -> None:
    for name, distance in {"often": 1, "never": 100}.items():
        train_here(
            tiny_run(
                small_corpus, tmp_path, name=name, encoder__attention__kind="lsh", stages__finetune=None,
                stages__pretrain__evaluate_every_steps=distance,
            ),
            ranks,
        )  # fmt: skip
    often, never = last_weights
    assert same(often, never)


@pytest.mark.parametrize(
    "zero", ["zero0", "zero1", *(pytest.param(f"zero{stage}", marks=pytest.mark.slow) for stage in (2, 3))]
)
def test_frozen_layers_move_after_the_thaw_only(
    zero: str, small_corpus: Path, tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(
        tiny_run(
            small_corpus, tmp_path, deepspeed=f"ds_configs/{zero}.json", stages__finetune__num_frozen_layers=1,
            stages__finetune__evaluate_every_steps=1, stages__finetune__optim__weight_decay=0.5,
        ),
        ranks, "finetune",
    )  # fmt: skip
    names = {id(parameter): name for name, parameter in bench.task.named_parameters()}
    frozen = {names[id(parameter)] for parameter in bench.task.encoder.first_parameters(1)}
    assert any("word_embedding" in name for name in frozen) and any("blocks.0" in name for name in frozen)
    assert not any("blocks.1" in name or name.startswith("head") for name in frozen)
    engine = bench.engine()
    seen = [engine.weights()]
    judge = loop.judge

    def noting(*given: Any) -> loop.Progress:
        seen.append(engine.weights())
        return judge(*given)

    monkeypatch.setattr(loop, "judge", noting)
    bench.fit(engine)
    engine.close()
    assert len(seen) == 9 and bench.ready.course.thaw_step == 4
    for step in range(1, 9):
        moved = {name for name in names.values() if not torch.equal(seen[step][name], seen[step - 1][name])}
        assert moved >= set(names.values()) - frozen
        assert moved & frozen == (frozen if step > 4 else set()), f"step {step}"


def scripted(monkeypatch: pytest.MonkeyPatch, values: list[float], weights: list[dict[str, Tensor]]) -> None:
    """Evaluations while training say these values of the selection metric; the weights they looked at are noted."""

    def said(engine: Engine, *rest: Any) -> dict[str, float]:
        weights.append(engine.weights())
        return {"f1_macro": values[len(weights) - 1], "loss": 1.0}

    monkeypatch.setattr(loop, "evaluate", said)


def finetune_only(corpus: Path, output_dir: Path, **changes: Any) -> dict[str, Any]:
    own = {f"stages__finetune__{name}": value for name, value in changes.items()}
    return tiny_run(corpus, output_dir, stages__pretrain=None, stages__finetune__evaluate_every_steps=1, **own)


@pytest.mark.parametrize(
    ("values", "changes", "best"),
    [
        ([0.1, 0.5, 0.4, 0.5], {}, 1),
        ([0.1, 0.5, 0.4, 0.6], {"min_delta": 0.2}, 1),
        ([0.4, 0.5, 0.1, 0.3], {"metric": "f1_macro", "mode": "min"}, 2),
        ([math.nan, 0.2, math.nan, 0.1], {}, 1),
    ],
    ids=["first-of-equals", "min-delta", "mode-min", "nan-is-never-best"],
)
def test_the_selection_metric_decides_which_weights_are_kept(
    values: list[float], changes: dict[str, Any], best: int, small_corpus: Path, tmp_path: Path, ranks: Ranks,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    weights: list[dict[str, Tensor]] = []
    scripted(monkeypatch, values, weights)
    told = train_here(finetune_only(small_corpus, tmp_path, steps=4, **changes), ranks)
    kept = load_file(told.settings.folder / "stages/finetune/best.safetensors")
    assert [same(kept, seen) for seen in weights] == [number == best for number in range(4)]
    assert told.outcome is not None and told.outcome.best == {"finetune": values[best]}


def test_patience_ends_a_stage_and_says_so(
    small_corpus: Path, tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, [0.1, 0.5, 0.4, 0.6, 0.2, 0.3, 0.9, 0.9], weights := [])
    told = train_here(finetune_only(small_corpus, tmp_path, patience=2), ranks)
    assert told.outcome is not None
    assert told.outcome.stopped == {"finetune": "no better f1_macro in 2 evaluations (best 0.6 at step 4)"}
    assert len(weights) == 6
    assert max(reading.step for reading in told.readings if reading.split == "train") == 6
    assert told.outcome.test, "the test split is read all the same"


def test_patience_that_ends_with_the_last_step_is_a_finished_stage(
    small_corpus: Path, tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, [0.5, 0.4, 0.3], [])
    told = train_here(finetune_only(small_corpus, tmp_path, patience=2, steps=3), ranks)
    assert told.outcome is not None and told.outcome.stopped == {"finetune": "finished"}


@pytest.mark.parametrize("patience", [None, 2])
def test_a_metric_that_never_was_a_number_is_divergence(
    patience: int | None, small_corpus: Path, tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, [math.nan] * 4, [])
    step = 2 if patience else 4
    with pytest.raises(Diverged, match=f"finetune: valid/f1_macro was never a number, up to step {step}; lower stages"):
        train_here(finetune_only(small_corpus, tmp_path, steps=4, patience=patience), ranks)


@pytest.mark.parametrize("zero", ["zero0", "zero1"])
def test_an_absurd_learning_rate_diverges_once_skipping_does_not_help(
    zero: str, small_corpus: Path, tmp_path: Path, ranks: Ranks
) -> None:
    """Under ZeRO DeepSpeed would skip such steps for ever, in fp32 too, and end with the weights of the start."""
    tree = tiny_run(small_corpus, tmp_path, deepspeed=f"ds_configs/{zero}.json", stages__pretrain__optim__lr=1e6)
    says = r"pretrain: loss is not a number at step 5 \(3 batches .*; lower stages\.pretrain\.optim\.lr"
    with pytest.raises(Diverged, match=says):
        train_here(tree, ranks)
    told = [(reading.step, dict(reading.values)) for reading in read_readings(tmp_path / "tiny") if reading.split == "events"]
    skips = [(step, {"skipped_batches": step - 1.0}) for step in (2, 3, 4)]
    assert told == [*skips, (5, {"given_up": 1.0})], "the readings stand before the run ends"


@pytest.mark.parametrize("attention", [{"kind": "sdpa"}, {"kind": "favor", "nb_features": 8}, {"kind": "lsh"}])
def test_attention_is_looked_at_on_request_and_training_does_not_notice(
    attention: dict[str, Any], small_corpus: Path, tmp_path: Path, ranks: Ranks, last_weights: list[dict[str, Tensor]]
) -> None:
    told = []
    for interval in (None, 3):
        more = {"encoder__attention": attention, "stages__pretrain__attention_report_interval": interval}
        told.append(train_here(tiny_run(small_corpus, tmp_path / f"{interval}", **more), ranks))
    looks = [[(r.stage, r.step) for r in each.readings if r.split == "attention"] for each in told]
    ends = [("finetune", 0), ("finetune", 8)]
    if attention["kind"] == "sdpa":
        assert looks == [[], []]
    else:
        assert looks == [
            [("pretrain", 0), ("pretrain", 6), *ends],
            [("pretrain", 0), ("pretrain", 3), ("pretrain", 6), *ends],
        ]
        [first, *_] = [r for r in told[0].readings if r.split == "attention"]
        assert first.keyed().keys() >= {"pretrain/attention/error", "pretrain/attention/layer_1/captured_share"}
        assert all(math.isfinite(value) for value in first.values.values())
    assert told[0].losses("pretrain") == told[1].losses("pretrain")
    assert same(last_weights[1], last_weights[3]), "after finetune, bit for bit"


def test_projections_are_fitted_to_the_weights_that_a_stage_begins_with(
    small_corpus: Path, tmp_path: Path, ranks: Ranks, last_weights: list[dict[str, Tensor]]
) -> None:
    attention = {"kind": "favor", "nb_features": 8, "projections": "fitted", "temperature": 8.0}
    train_here(tiny_run(small_corpus, tmp_path, encoder__attention=attention), ranks)
    pretrain, finetune = (weights["encoder.blocks.1.attention.spread_HDD"] for weights in last_weights)
    assert not torch.allclose(pretrain, torch.eye(16).expand(2, 16, 16), atol=1e-3)
    assert not torch.equal(pretrain, finetune)


def test_evaluations_are_at_their_cadence_and_the_test_split_is_read_once_at_the_end(
    small_corpus: Path, tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits: dict[int, str] = {}
    read: list[tuple[str, list[int]]] = []
    opened, gather = run_module.stage_corpus, TokenSplit.gather

    def opening(*given: Any) -> Any:
        corpus = opened(*given)
        splits.update({id(split): name for name, split in corpus.splits.items()})
        kept.append(corpus)
        return corpus

    def gathering(split: TokenSplit, indices: Any) -> Any:
        read.append((splits[id(split)], np.asarray(indices).tolist()))
        return gather(split, indices)

    kept: list[Any] = []
    monkeypatch.setattr(run_module, "stage_corpus", opening)
    monkeypatch.setattr(TokenSplit, "gather", gathering)
    told = train_here(tiny_run(small_corpus, tmp_path, stages__finetune__steps=10), ranks)
    cadence = {
        stage: [reading.step for reading in told.readings if (reading.stage, reading.split) == (stage, "valid")]
        for stage in ("pretrain", "finetune")
    }
    assert cadence == {"pretrain": [3, 6], "finetune": [4, 8, 10]}
    order = [name for name, _ in read]
    first = order.index("test")
    assert set(order[first:]) == {"test"}
    test_rows = sorted(row for name, rows in read[first:] for row in rows)
    assert test_rows == list(range(30))
    tests = [reading for reading in told.readings if reading.split == "test"]
    assert len(tests) == 1 and tests[0] is told.readings[-1]
    assert told.outcome is not None and told.outcome.test == tests[0].values


def test_a_report_says_how_fast_and_how_full(small_corpus: Path, tmp_path: Path, ranks: Ranks) -> None:
    told = train_here(finetune_only(small_corpus, tmp_path, steps=4), ranks)
    before = 0
    for reading in (found for found in told.readings if found.split == "train"):
        values = reading.values
        assert 0.5 < values["useful_share"] <= 1
        assert values["useful_share"] == pytest.approx((reading.tokens - before) / 512)
        before = reading.tokens
        assert values["tokens_per_second"] > 0 and values["grad_norm"] > 0 and values["peak_memory_gb"] > 0.05
        assert "loss_scale" not in values, "that is fp16's"
    seconds = [found.seconds for found in told.readings if found.split == "train"]
    assert seconds == sorted(seconds) and seconds[0] > 0


def test_without_a_validation_split_the_last_weights_are_kept(
    small_corpus: Path, tmp_path: Path, ranks: Ranks
) -> None:
    bench = Bench(finetune_only(small_corpus, tmp_path, steps=3), ranks, "finetune")
    bench.ready.corpus.splits.pop("valid")
    engine = bench.engine()
    assert bench.fit(engine).best is None
    assert same(load_file(bench.site.folder / "best.safetensors"), engine.weights())
    engine.close()


# ----------------------------------------------------------------------------------------------- stop and go on


class StopAfter:
    """Asks to stop once the run has taken n steps (it is called before every step)."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


def resumable(corpus: Path, output_dir: Path, zero: str, **changes: Any) -> dict[str, Any]:
    """Everything that a resume could forget: rotations, dropout, masks, a thaw, accumulation, epochs, patience."""
    return tiny_run(
        corpus, output_dir, deepspeed=f"ds_configs/{zero}.json",
        encoder__attention={"kind": "lsh"}, stages__pretrain__accumulation=2, stages__finetune__num_frozen_layers=1,
        stages__finetune__patience=3, stages__finetune__tokens_per_batch=1024, **changes,
    )  # fmt: skip


def lasting(folder: Path) -> list[dict[str, Any]]:
    """The readings of a run folder without what differs from one run to the next: times, speeds, memory."""
    fleeting = ("tokens_per_second", "peak_memory_gb")
    return [
        {
            **{name: value for name, value in vars(reading).items() if name not in ("seconds", "values")},
            **{name: value for name, value in reading.values.items() if name not in fleeting},
        }
        for reading in read_readings(folder)
        if reading.split != "system"
    ]


def check_resume(
    tree: Callable[..., dict[str, Any]], ranks: Ranks, stops: list[int], last_weights: list[dict[str, Tensor]]
) -> None:
    """One run that is stopped after each of these numbers of its steps against one that is not."""
    whole = train_here(tree(name="whole"), ranks)
    wanted, cut = last_weights[-1], Told(whole.settings)
    for before, stop in itertools.pairwise([0, *stops]):
        with pytest.raises(Interrupted, match=r"saved (pretrain|finetune) at step \d+"):
            train_here(tree(name="cut"), ranks, StopAfter(stop - before), cut)
    resumed = train_here(tree(name="cut"), ranks, told=cut)
    assert same(last_weights[-1], wanted)
    assert lasting(resumed.settings.folder) == lasting(whole.settings.folder)
    assert len(cut.readings) == len(whole.readings), "nothing is told twice"
    assert resumed.outcome == whole.outcome


# pretrain has 6 steps (reports and evaluations at 3 and 6), finetune 8 (reports at 2, 4, .., evaluations at 4 and 8)
BETWEEN_REPORTS, AT_AN_EVALUATION, FIRST_OF_STAGE_2, BEFORE_THE_THAW, AFTER_THE_THAW = 2, 3, 7, 10, 11


def test_stopped_and_resumed_is_bit_for_bit_the_same_run(
    small_corpus: Path, tmp_path: Path, ranks: Ranks, last_weights: list[dict[str, Tensor]]
) -> None:
    stops = [BETWEEN_REPORTS, FIRST_OF_STAGE_2, BEFORE_THE_THAW, AFTER_THE_THAW]
    check_resume(lambda **changes: resumable(small_corpus, tmp_path, "zero1", **changes), ranks, stops, last_weights)


@pytest.mark.parametrize("slow", [False, True])
def test_what_is_saved_is_told_whether_or_not_the_disk_keeps_up(
    slow: bool, small_corpus: Path, tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the next step, or on a disk that is never done before the next save, with that."""
    monkeypatch.setattr(Checkpoints, "at_rest", property(lambda checkpoints: not slow))
    told: list[tuple[str, int]] = []
    tree = tiny_run(small_corpus, tmp_path, stages__pretrain=None, stages__finetune__evaluate_every_steps=2)
    settings = validate(RunSettings, tree, "test")
    claim(settings, lambda sentence: None)
    def at_rest(stage: str, step: int) -> None:
        told.append((stage, step))

    run(settings, ranks, Watch(lambda reading: None, lambda said: None, lambda tags: None, at_rest=at_rest))
    assert told == [("finetune", step) for step in ([1, 3, 5] if slow else [0, 1, 1, 2, 3, 3, 4, 5, 5, 6, 7])]


KINDS, STAGES, PRECISIONS = ("sdpa", "favor", "lsh"), ("zero0", "zero1", "zero2", "zero3"), ("fp32", "bf16")
OFFLOADED = (("favor", "zero2_offload"), ("lsh", "zero3_offload"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "zero", "precision"),
    [
        *((kind, zero, PRECISIONS[(one + other) % 2]) for one, kind in enumerate(KINDS) for other, zero in enumerate(STAGES)),
        *((*pair, precision) for pair in OFFLOADED for precision in PRECISIONS),
    ],
)
def test_stopped_and_resumed_in_every_stage_and_precision(
    kind: str, zero: str, precision: str, small_corpus: Path, tmp_path: Path, ranks: Ranks,
    last_weights: list[dict[str, Tensor]],
) -> None:  # fmt: skip
    """Every two of the three meet; benchmarks.faults has all of them, on one and two ranks."""
    def tree(**changes: Any) -> dict[str, Any]:
        return resumable(small_corpus, tmp_path, zero, precision=precision, encoder__attention__kind=kind, **changes)

    check_resume(tree, ranks, [BETWEEN_REPORTS, AT_AN_EVALUATION, BEFORE_THE_THAW], last_weights)


FAVOR = {"kind": "favor", "nb_features": 16, "redraw_interval": 2}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [{"kind": "lsh"}, FAVOR])
def test_stopped_within_an_evaluation_is_the_same_run(
    kind: dict[str, Any], small_corpus: Path, tmp_path: Path, ranks: Ranks, last_weights: list[dict[str, Tensor]]
) -> None:
    """Before some batch of an evaluation, twice in the same one, and while the test split is read."""
    tree = resumable(small_corpus, tmp_path, "zero1", stages__finetune__evaluate_every_steps=2) | {"name": "whole"}
    tree["encoder"]["attention"] = kind
    asked = StopAfter(1_000_000)
    whole = train_here(tree, ranks, told_to_stop=asked)
    wanted, batches = last_weights[-1], 1_000_000 - asked.left
    for stops in ([0], [1, 0], [batches // 2], [batches - 1]):
        cut, told = tree | {"name": f"cut_{stops[0]}"}, Told(whole.settings)
        for stop in stops:
            with pytest.raises(Interrupted, match=r"before its evaluation|the test split is yet to be read"):
                train_here(cut, ranks, told=told, told_to_stop=StopAfter(stop))
        asked = StopAfter(1_000_000)
        with contextlib.suppress(Interrupted):  # where there is a step left; the evaluation that was made up for is not lost
            train_here(cut, ranks, StopAfter(0), told=told)
        resumed = train_here(cut, ranks, told=told, told_to_stop=asked)
        assert same(last_weights[-1], wanted), f"stopped at {stops}"
        assert lasting(resumed.settings.folder) == lasting(whole.settings.folder), f"stopped at {stops}"
        assert len(told.readings) == len(whole.readings), "nothing is told twice"
        assert resumed.outcome == whole.outcome


def test_a_death_between_checkpoints_repeats_steps_without_a_trace(
    small_corpus: Path, tmp_path: Path, ranks: Ranks, last_weights: list[dict[str, Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Dies after the report of finetune's step 6, with its last checkpoint at 4: 5 and 6 are trained again."""
    whole = train_here(resumable(small_corpus, tmp_path, "zero1", name="whole"), ranks)
    wanted = last_weights[-1]

    class Death(list):  # type: ignore[type-arg]
        def append(self, reading: Reading) -> None:
            if (reading.stage, reading.step) == ("finetune", 6):
                raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        train_here(
            resumable(small_corpus, tmp_path, "zero1", name="died"), ranks, told=Told(whole.settings, readings=Death())
        )
    died = lasting(tmp_path / "died")
    assert died[-1]["step"] == 6
    train_here(resumable(small_corpus, tmp_path, "zero1", name="died"), ranks)
    assert same(last_weights[-1], wanted)
    assert lasting(tmp_path / "died") == lasting(tmp_path / "whole")
