"""Figures against scikit-learn and against plain arithmetic; sums that may be added up in any company."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dstrain.metrics import CountTally, DocumentTally, scores
from dstrain.packed import Batch, Sequences

CPU = torch.device("cpu")


def batch_of(count: int) -> Batch:
    """A micro-batch of `count` documents of one token; only its weight and labels matter here."""
    return Batch(
        torch.zeros(count, dtype=torch.int64), Sequences.of([1] * count), torch.zeros(count, dtype=torch.int64), count
    )


def by_sklearn(truth: np.ndarray, guess: np.ndarray) -> dict[str, float]:
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support, recall_score

    precision, recall, f1, _ = precision_recall_fscore_support(truth, guess, average="macro", zero_division=0.0)
    return {
        "accuracy": accuracy_score(truth, guess),
        "balanced_accuracy": recall_score(truth, guess, average="macro", labels=np.unique(truth), zero_division=0.0),
        "precision_macro": precision,
        "recall_macro": recall,
        "f1_macro": f1,
    }


@given(st.data(), st.integers(2, 6), st.integers(1, 60))
def test_scores_are_those_of_scikit_learn(data: st.DataObject, classes: int, documents: int) -> None:
    draw = st.lists(st.integers(0, classes - 1), min_size=documents, max_size=documents)
    truth, guess = np.array(data.draw(draw)), np.array(data.draw(draw))
    found, wanted = scores(truth, guess, classes), by_sklearn(truth, guess)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, abs=1e-12), name


def test_balanced_accuracy_is_what_scikit_learn_calls_so() -> None:
    from sklearn.metrics import balanced_accuracy_score

    random = np.random.default_rng(0)
    truth, guess = random.integers(0, 5, 200), random.integers(0, 5, 200)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert scores(truth, guess, 5)["balanced_accuracy"] == pytest.approx(
            balanced_accuracy_score(truth, guess), abs=1e-12
        )


class Votes:
    """Windows of documents: random logits, and the plain truth about them."""

    def __init__(self, seed: int, documents: int = 40, classes: int = 4) -> None:
        random = np.random.default_rng(seed)
        self.labels = random.integers(0, classes, documents)
        self.documents = np.repeat(np.arange(documents), random.integers(1, 5, documents))
        self.logits = torch.from_numpy(random.normal(size=(len(self.documents), classes)) * 3).float()
        self.losses = torch.from_numpy(random.random(len(self.documents)))
        self.classes = classes

    def tally(self, windows: Sequence[np.ndarray]) -> DocumentTally:
        """What one rank counts that sees these groups of windows."""
        tally = DocumentTally(self.labels, self.classes, CPU)
        for rows in windows:
            tally.add(batch_of(len(rows)), self.losses[rows].sum(), self.logits[rows], self.documents[rows])
        return tally


def test_windows_of_a_document_vote_together() -> None:
    votes = Votes(0)
    figures = votes.tally([np.arange(len(votes.documents))]).figures()
    chances = torch.log_softmax(votes.logits.double(), dim=1).numpy()
    guess = np.array([chances[votes.documents == document].sum(axis=0).argmax() for document in range(40)])
    for name, value in by_sklearn(votes.labels, guess).items():
        assert figures[name] == pytest.approx(value, abs=1e-12)
    assert figures["loss"] == pytest.approx(votes.losses.mean().item())


def test_one_sure_window_outvotes_two_unsure_ones() -> None:
    tally = DocumentTally(np.array([1]), 2, CPU)
    tally.add(batch_of(2), torch.tensor(0.0), torch.tensor([[0.2, 0.0], [0.2, 0.0]]), np.array([0, 0]))
    tally.add(batch_of(1), torch.tensor(0.0), torch.tensor([[0.0, 5.0]]), np.array([0]))
    assert tally.figures()["accuracy"] == 1.0


@pytest.mark.parametrize("ranks", [2, 3])
def test_sums_of_ranks_give_the_figures_of_one(ranks: int) -> None:
    votes = Votes(1)
    rows = np.random.default_rng(2).permutation(len(votes.documents))
    alone = votes.tally([rows]).figures()
    parts = [votes.tally(np.array_split(rows[rank::ranks], 3)) for rank in range(ranks)]
    joined = DocumentTally(votes.labels, votes.classes, CPU)
    joined.sums += torch.stack([part.sums for part in parts]).sum(dim=0)
    assert joined.figures() == pytest.approx(alone, abs=1e-9)


def test_documents_never_seen_stay_out() -> None:
    votes = Votes(3)
    rows = np.flatnonzero(votes.documents < 10)
    figures = votes.tally([rows]).figures()
    chances = torch.log_softmax(votes.logits.double(), dim=1).numpy()
    guess = np.array([chances[votes.documents == document].sum(axis=0).argmax() for document in range(10)])
    assert figures["accuracy"] == pytest.approx((guess == votes.labels[:10]).mean())


def test_no_document_gives_no_number() -> None:
    figures = DocumentTally(np.array([0, 1]), 2, CPU).figures()
    assert set(figures) == {"loss", "accuracy", "balanced_accuracy", "precision_macro", "recall_macro", "f1_macro"}
    assert all(math.isnan(value) for value in figures.values())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_give_no_score(value: float) -> None:
    tally = DocumentTally(np.array([0, 1]), 2, CPU)
    tally.add(batch_of(2), torch.tensor(3.0), torch.tensor([[1.0, 0.0], [0.0, value]]), np.array([0, 1]))
    figures = tally.figures()
    assert math.isnan(figures["f1_macro"]) and math.isnan(figures["accuracy"])
    assert figures["loss"] == 1.5


def test_gradients_end_at_the_tally() -> None:
    tally = DocumentTally(np.array([0, 1]), 2, CPU)
    logits = torch.zeros(2, 2, requires_grad=True)
    tally.add(batch_of(2), logits.sum(), logits, np.array([0, 1]))
    assert not tally.sums.requires_grad


def right(batch: Batch, evidence: torch.Tensor) -> torch.Tensor:
    return (evidence > 0).sum()


def test_counts_become_means_once() -> None:
    tally, other = (CountTally(CPU, right, perplexity=True) for _ in range(2))
    tally.add(batch_of(3), torch.tensor(6.0, requires_grad=True), torch.tensor([1, -1, 1]), np.arange(3))
    other.add(batch_of(1), torch.tensor(1.0), torch.tensor([1]), np.arange(1))
    tally.sums += other.sums
    assert not tally.sums.requires_grad
    assert tally.figures() == {"loss": 7 / 4, "perplexity": math.exp(7 / 4), "accuracy": 3 / 4}


def test_perplexity_belongs_to_language_models() -> None:
    tally = CountTally(CPU, right, perplexity=False)
    tally.add(batch_of(2), torch.tensor(1.0), torch.tensor([1, -1]), np.arange(2))
    assert tally.figures() == {"loss": 0.5, "accuracy": 0.5}


def test_counts_of_nothing_are_not_a_number() -> None:
    assert all(math.isnan(value) for value in CountTally(CPU, right, perplexity=True).figures().values())


@pytest.mark.parametrize(("loss", "perplexity"), [(math.inf, True), (1e9, True), (math.nan, False)])
def test_a_loss_beyond_bounds_is_told_and_not_thrown(loss: float, perplexity: bool) -> None:
    tally = CountTally(CPU, right, perplexity=True)
    tally.add(batch_of(1), torch.tensor(loss), torch.tensor([1]), np.arange(1))
    figures = tally.figures()
    assert figures["loss"] == loss or (math.isnan(figures["loss"]) and math.isnan(loss))
    assert math.isfinite(figures["perplexity"]) == perplexity


def test_many_small_losses_are_not_lost() -> None:
    """float64 sums: a hundred thousand tokens in half precision would stop counting at 2048."""
    tally = CountTally(CPU, right, perplexity=True)
    for _ in range(5000):
        tally.add(batch_of(1), torch.tensor(1.0, dtype=torch.bfloat16), torch.tensor([1]), np.arange(1))
    assert tally.figures()["loss"] == 1.0
