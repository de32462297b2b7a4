"""From sums to figures. Sums add over micro-batches and ranks; they become means once, here, before anyone reads them.

A tally is a flat float64 vector, so one all-reduce joins the ranks whatever the objective counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dstrain.packed import Batch


class Tally(Protocol):
    """Counts over micro-batches; `sums` is the vector that ranks add up."""

    sums: Tensor

    def add(self, batch: Batch, loss_sum: Tensor, evidence: Tensor, documents: np.ndarray) -> None:
        """Counts one micro-batch, without asking the device for a number."""
        ...

    def figures(self) -> dict[str, float]:
        """The named figures of everything counted; the only place that waits for the device."""
        ...


class CountTally:
    """Mean loss and share of right answers; `right(batch, evidence)` counts those of a micro-batch, () int64."""

    def __init__(self, device: torch.device, right: Callable[[Batch, Tensor], Tensor], perplexity: bool) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)
        self._right, self._perplexity = right, perplexity

    def add(self, batch: Batch, loss_sum: Tensor, evidence: Tensor, documents: np.ndarray) -> None:
        """Adds [loss, terms, right answers]."""
        self.sums[0] += loss_sum.detach()
        self.sums[1] += batch.weight
        self.sums[2] += self._right(batch, evidence.detach())

    def figures(self) -> dict[str, float]:
        """`loss` in nats per term, `accuracy` as a share, and perplexity for language models."""
        loss_sum, terms, right = self.sums.tolist()
        loss, accuracy = _ratio(loss_sum, terms), _ratio(right, terms)
        if not self._perplexity:
            return {"loss": loss, "accuracy": accuracy}
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "accuracy": accuracy}


class DocumentTally:
    """One row of class scores per original document, so that the windows of a long document vote together.

    `evidence` is (N, K) logits; the log-probabilities of a document's windows are summed into its row, and the row's
    largest entry is the prediction. Documents that were never seen stay out of every figure.
    """

    def __init__(self, labels: np.ndarray, num_classes: int, device: torch.device) -> None:
        self._labels = labels
        self._shape = (len(labels), num_classes + 1)
        self.sums = torch.zeros(2 + len(labels) * (num_classes + 1), dtype=torch.float64, device=device)

    def add(self, batch: Batch, loss_sum: Tensor, evidence: Tensor, documents: np.ndarray) -> None:
        """Adds the votes of a micro-batch whose sequences belong to `documents` (N) int64."""
        self.sums[0] += loss_sum.detach()
        self.sums[1] += batch.weight
        rows_N = torch.from_numpy(documents).to(self.sums.device)
        votes_NK = torch.log_softmax(evidence.detach().float(), dim=-1).double()
        seen_N1 = torch.ones(len(documents), 1, dtype=torch.float64, device=self.sums.device)
        self.sums[2:].view(self._shape).index_add_(0, rows_N, torch.cat([votes_NK, seen_N1], dim=1))

    def figures(self) -> dict[str, float]:
        """`loss` in nats per sequence; of documents accuracy, balanced accuracy and macro averages, as shares."""
        sums = self.sums.cpu()
        table_DK = sums[2:].view(self._shape).numpy()
        seen = table_DK[:, -1] > 0
        truth, guess = self._labels[seen], table_DK[seen, :-1].argmax(axis=1)
        loss = _ratio(float(sums[0]), float(sums[1]))
        if not len(truth) or not np.isfinite(table_DK[seen]).all():
            return {"loss": loss} | dict.fromkeys(_SCORES, math.nan)
        return {"loss": loss} | scores(truth, guess, self._shape[1] - 1)


def scores(truth: np.ndarray, guess: np.ndarray, num_classes: int) -> dict[str, float]:
    """Shares of right guesses and macro averages, from (D) int64 classes; as scikit-learn counts them.

    Macro averages go over the classes that occur in `truth` or `guess`; a class nobody guessed has precision 0.
    scikit-learn itself is not used because importing it takes a trial longer than its first step.
    """
    confusion_KK = np.bincount(truth * num_classes + guess, minlength=num_classes**2).reshape(num_classes, num_classes)
    right_K, true_K, guessed_K = confusion_KK.diagonal(), confusion_KK.sum(axis=1), confusion_KK.sum(axis=0)
    recall_K = right_K / np.maximum(true_K, 1)
    precision_K = right_K / np.maximum(guessed_K, 1)
    f1_K = 2 * right_K / np.maximum(true_K + guessed_K, 1)
    occurs_K = true_K + guessed_K > 0
    figures = (
        right_K.sum() / len(truth),
        recall_K[true_K > 0].mean(),
        *(macro_K[occurs_K].mean() for macro_K in (precision_K, recall_K, f1_K)),
    )
    return {name: float(figure) for name, figure in zip(_SCORES, figures, strict=True)}


_SCORES = ("accuracy", "balanced_accuracy", "precision_macro", "recall_macro", "f1_macro")


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan
