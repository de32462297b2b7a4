"""Masked words and classes on a real corpus: what is counted, that packing has no say, that draws follow the step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from dstrain.data.cache import Corpus, cache_home, open_corpus, open_vocabulary
from dstrain.data.corpora import CorpusSettings
from dstrain.data.vocabulary import Vocabulary, VocabularySettings
from dstrain.metrics import CountTally, DocumentTally
from dstrain.model.block import Dropout
from dstrain.model.encoder import Encoder, EncoderSettings
from dstrain.objective import ClassifySettings, MlmSettings, Objective, Task
from dstrain.schema import UserError, validate

CPU = torch.device("cpu")
ENCODER = EncoderSettings(num_layers=2, hidden_size=32, intermediate_size=64, num_heads=2, qkv_size=32)


def _silent(sentence: str) -> None:
    """Says nothing."""


@pytest.fixture(scope="module")
def vocabulary(small_corpus: Path) -> Vocabulary:
    return open_vocabulary(VocabularySettings(size=300), CorpusSettings(path=small_corpus), cache_home(), _silent)


@pytest.fixture(scope="module")
def corpus(small_corpus: Path, vocabulary: Vocabulary) -> Corpus:
    settings = CorpusSettings(path=small_corpus, long_documents="window")
    return open_corpus(settings, vocabulary, 32, cache_home(), _silent)


def objective_of(kind: str, corpus: Corpus, vocabulary: Vocabulary, **changes: Any) -> Objective:
    settings = MlmSettings(**changes) if kind == "mlm" else ClassifySettings(**changes)
    return settings.build(corpus, vocabulary, ENCODER, seed=3)


@pytest.fixture(params=["mlm", "classify"])
def objective(request: pytest.FixtureRequest, corpus: Corpus, vocabulary: Vocabulary) -> Objective:
    return objective_of(request.param, corpus, vocabulary)


def task_of(objective: Objective, vocabulary: Vocabulary) -> Task:
    return Task(Encoder(ENCODER, vocabulary.size, seed=3), objective)


# -------------------------------------------------------------------------------------------- the micro-batch


def test_a_masked_batch_weighs_its_masked_tokens(corpus: Corpus, vocabulary: Vocabulary) -> None:
    split, rows = corpus.splits["train"], np.array([5, 0, 9])
    batch = objective_of("mlm", corpus, vocabulary, mask_rate=0.5).batch(split, rows, epoch=0)
    positions_M, targets_M = batch.labels
    assert batch.weight == len(positions_M) > 0
    assert batch.sequences.lengths == tuple(split.lengths[rows])
    assert torch.equal(targets_M, torch.from_numpy(split.gather(rows))[positions_M])
    untouched = torch.ones(len(batch.ids_T), dtype=torch.bool)
    untouched[positions_M] = False
    assert torch.equal(batch.ids_T[untouched], torch.from_numpy(split.gather(rows))[untouched])
    assert (batch.ids_T[positions_M] == vocabulary.mask).float().mean() > 0.5


def test_masks_change_with_the_epoch_and_not_with_the_company(corpus: Corpus, vocabulary: Vocabulary) -> None:
    split, objective = corpus.splits["train"], objective_of("mlm", corpus, vocabulary)
    alone = objective.batch(split, np.array([7]), epoch=1)
    among = objective.batch(split, np.array([2, 7, 1]), epoch=1)
    begin = int(split.lengths[2])
    assert torch.equal(among.ids_T[begin : begin + len(alone.ids_T)], alone.ids_T)
    assert not torch.equal(objective.batch(split, np.arange(8), 1).ids_T, objective.batch(split, np.arange(8), 2).ids_T)


def test_the_settings_of_masking_are_heard(corpus: Corpus, vocabulary: Vocabulary) -> None:
    split, rows = corpus.splits["train"], np.arange(20)
    kept = objective_of("mlm", corpus, vocabulary, mask_rate=0.4, mask_share=0.0, random_share=0.0).batch(
        split, rows, 0
    )
    assert torch.equal(kept.ids_T, torch.from_numpy(split.gather(rows)))
    every = objective_of("mlm", corpus, vocabulary, mask_rate=0.4, mask_share=1.0, random_share=0.0).batch(
        split, rows, 0
    )
    assert (every.ids_T[every.labels[0]] == vocabulary.mask).all()
    assert every.weight == kept.weight
    assert every.weight / len(every.ids_T) == pytest.approx(0.4, abs=0.1)


def test_a_labelled_batch_weighs_its_documents(corpus: Corpus, vocabulary: Vocabulary) -> None:
    split, rows = corpus.splits["train"], np.array([3, 11])
    batch = objective_of("classify", corpus, vocabulary).batch(split, rows, epoch=0)
    assert batch.weight == 2
    assert split.labels is not None and batch.labels.tolist() == split.labels[rows].tolist()
    assert torch.equal(batch.ids_T, torch.from_numpy(split.gather(rows)))


# ------------------------------------------------------------------------------------------------- the loss


def test_the_loss_does_not_depend_on_the_packing(objective: Objective, corpus: Corpus, vocabulary: Vocabulary) -> None:
    split, task = corpus.splits["train"], task_of(objective, vocabulary).eval()
    rows = np.arange(12)

    def total(groups: list[np.ndarray]) -> tuple[float, int, list[torch.Tensor]]:
        task.zero_grad()
        batches = [objective.batch(split, group, epoch=0) for group in groups]
        losses = [task(batch)[0] for batch in batches]
        torch.stack(losses).sum().backward()
        return (
            sum(loss.item() for loss in losses),
            sum(b.weight for b in batches),
            [p.grad.clone() for p in task.parameters()],
        )  # type: ignore[union-attr]

    loss, weight, gradients = total([rows])
    for groups in (np.split(rows, 4), [rows[::-1]], [np.array([row]) for row in rows]):
        other_loss, other_weight, other_gradients = total(list(groups))
        assert other_weight == weight
        assert other_loss == pytest.approx(loss, rel=1e-5)
        for mine, theirs in zip(gradients, other_gradients, strict=True):
            torch.testing.assert_close(theirs, mine, rtol=1e-3, atol=1e-5)


def test_an_untrained_model_knows_nothing(objective: Objective, corpus: Corpus, vocabulary: Vocabulary) -> None:
    """The loss is a sum of cross entropies in nats, so at the start each term is near the log of the choices."""
    batch = objective.batch(corpus.splits["train"], np.arange(16), epoch=0)
    loss, _ = task_of(objective, vocabulary).eval()(batch)
    choices = vocabulary.size if isinstance(objective.tally(corpus.splits["valid"], CPU), CountTally) else 2
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert loss.item() / batch.weight == pytest.approx(math.log(choices), rel=0.1)


def test_only_the_loss_carries_a_gradient(objective: Objective, corpus: Corpus, vocabulary: Vocabulary) -> None:
    loss, evidence = task_of(objective, vocabulary)(objective.batch(corpus.splits["train"], np.arange(4), 0))
    assert loss.requires_grad and not evidence.requires_grad


# ---------------------------------------------------------------------------------------------- the tallies


def test_tallies_name_what_the_settings_promise(corpus: Corpus, vocabulary: Vocabulary) -> None:
    for kind, settings in (("mlm", MlmSettings()), ("classify", ClassifySettings())):
        objective = objective_of(kind, corpus, vocabulary)
        figures = objective.tally(corpus.splits["valid"], CPU).figures()
        assert set(figures) == set(settings.metrics)
        assert settings.selection[0] in figures
        assert set(objective.running_tally(CPU).figures()) <= set(figures)


def test_right_guesses_are_counted(corpus: Corpus, vocabulary: Vocabulary) -> None:
    split, rows = corpus.splits["train"], np.arange(6)
    objective = objective_of("classify", corpus, vocabulary)
    batch = objective.batch(split, rows, 0)
    logits = torch.nn.functional.one_hot(batch.labels, 2).float()
    logits[0] = 1 - logits[0]
    tally = objective.running_tally(CPU)
    tally.add(batch, torch.tensor(3.0), logits, split.document[rows])
    assert tally.figures() == {"loss": 0.5, "accuracy": 5 / 6}
    masked = objective_of("mlm", corpus, vocabulary).batch(split, rows, 0)
    words = objective_of("mlm", corpus, vocabulary).running_tally(CPU)
    words.add(masked, torch.tensor(0.0), torch.tensor(masked.weight), split.document[rows])
    assert words.figures()["accuracy"] == 1.0


def test_an_evaluation_is_over_documents_and_not_windows(corpus: Corpus, vocabulary: Vocabulary) -> None:
    split = corpus.splits["valid"]
    assert len(split) > split.num_documents, "the corpus has documents of several windows"
    objective = objective_of("classify", corpus, vocabulary)
    tally = objective.tally(split, CPU)
    assert isinstance(tally, DocumentTally)
    assert split.labels is not None
    rows = np.arange(len(split))
    tally.add(
        objective.batch(split, rows, -1),
        torch.tensor(0.0),
        torch.nn.functional.one_hot(torch.from_numpy(split.labels), 2).float(),
        split.document,
    )
    assert tally.figures()["accuracy"] == tally.figures()["f1_macro"] == 1.0


# --------------------------------------------------------------------------------------------------- draws


def test_the_step_reaches_every_dropout(objective: Objective, vocabulary: Vocabulary) -> None:
    task = task_of(objective, vocabulary)
    task.set_step(41, 5)
    dropouts = [module for module in task.modules() if isinstance(module, Dropout)]
    assert len(dropouts) >= 5
    assert {(module.step, module.micro_batch) for module in dropouts} == {(41, 5)}


def test_losses_differ_from_step_to_step_and_come_back(corpus: Corpus, vocabulary: Vocabulary) -> None:
    objective = objective_of("classify", corpus, vocabulary)
    task, batch = task_of(objective, vocabulary), objective.batch(corpus.splits["train"], np.arange(8), 0)

    def loss(step: int, micro_batch: int) -> float:
        task.set_step(step, micro_batch)
        return task(batch)[0].item()

    first = loss(0, 0)
    assert first != loss(1, 0) and first != loss(0, 1)
    assert loss(0, 0) == first


# ------------------------------------------------------------------------------------------------ refusals


def test_shares_above_one_are_refused() -> None:
    with pytest.raises(UserError) as error:
        validate(MlmSettings, {"mask_share": 0.8, "random_share": 0.3}, "f")
    assert str(error.value) == "f: mask_share 0.8 and random_share 0.3 are more than 1 together; lower one"
    assert MlmSettings(mask_share=0.7, random_share=0.3).random_share == 0.3, "0.7 + 0.3 is 1"
    with pytest.raises(ValidationError):
        MlmSettings(mask_rate=1.0)


def test_classes_need_labels(small_corpus: Path, vocabulary: Vocabulary) -> None:
    unlabelled = open_corpus(CorpusSettings(path=small_corpus, labelled=False), vocabulary, 32, cache_home(), _silent)
    with pytest.raises(UserError, match=r"has no labels to classify by"):
        ClassifySettings().build(unlabelled, vocabulary, ENCODER, seed=0)
    MlmSettings().build(unlabelled, vocabulary, ENCODER, seed=0)
