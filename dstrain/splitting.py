"""A packed micro-batch cut into pieces that need less memory one at a time and add up to the same gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from dstrain.packed import Batch, Rows, Sequences


class Piece(NamedTuple):
    """A micro-batch, or some sequences of one."""

    batch: Batch
    documents: np.ndarray
    """(N) the document each sequence is of."""
    micro_batch: int
    """Number of the micro-batch within its optimizer step, over all ranks."""
    tokens: Rows
    sequences: Rows
    """Where both lie in the whole micro-batch."""
    counts: bool = True
    """False for a repeat, which keeps the number of pieces equal on all ranks and is worth nothing."""

    @classmethod
    def whole(cls, batch: Batch, documents: np.ndarray, micro_batch: int) -> Piece:
        """All of a micro-batch."""
        return cls(batch, documents, micro_batch, Rows(0, batch.sequences.tokens), Rows(0, len(documents)))


def split(whole: Piece, pieces: int) -> Iterator[Piece]:
    """Exactly `pieces` runs of whole sequences, of about as many tokens each; what cannot be cut again is repeated."""
    if pieces == 1:  # every step of a run to which nothing has happened
        yield whole
        return
    starts = whole.batch.sequences.starts
    ends = np.asarray(starts[1:])
    count = min(pieces, len(ends))
    cuts = [0]
    for number in range(1, count):  # each piece ends nearest to its share, and leaves a sequence for each that follows
        nearest = int(np.abs(ends - number * ends[-1] / count).argmin()) + 1
        cuts.append(min(max(nearest, cuts[-1] + 1), len(ends) - (count - number)))
    cuts.append(len(ends))
    for number in range(pieces):
        first, last = cuts[min(number, count - 1)], cuts[min(number, count - 1) + 1]
        yield whole._replace(
            batch=part(whole.batch, first, last),
            documents=whole.documents[first:last],
            tokens=Rows(whole.tokens.first + starts[first], whole.tokens.of),
            sequences=Rows(whole.sequences.first + first, whole.sequences.of),
            counts=whole.counts and number < count,
        )


def part(batch: Batch, first: int, last: int) -> Batch:
    """The sequences from number `first` up to, without it, number `last` as a micro-batch of their own."""
    starts = batch.sequences.starts
    return _cut(batch, starts[first], batch.sequences.lengths[first:last], slice(first, last))


def beginning(batch: Batch, tokens: int) -> Batch:
    """The first tokens of a sequence: so many, or more up to the first that the objective asks for."""
    starts, lengths, labels = batch.sequences.starts, batch.sequences.lengths, batch.labels
    number = 0
    if labels.ndim == 2 and batch.weight:
        inside = labels[0] - batch.sequences.starts_N1[batch.sequences.document_T[labels[0]]]
        number = int(batch.sequences.document_T[labels[0][inside.argmin()]])
        tokens = max(tokens, int(inside.min()) + 1)
    return _cut(batch, starts[number], (min(tokens, lengths[number]),), slice(number, number + 1))


def _cut(batch: Batch, start: int, lengths: tuple[int, ...], sequences: slice) -> Batch:
    end, labels = start + sum(lengths), batch.labels
    if labels.ndim == 1:  # a class for each sequence
        labels = labels[sequences]
    else:  # (2, M): places in T, and words
        inside = (labels[0] >= start) & (labels[0] < end)
        labels = torch.stack([labels[0][inside] - start, labels[1][inside]])
    return Batch(batch.ids_T[start:end], Sequences(lengths, batch.sequences.device), labels, labels.shape[-1])
