"""The packed micro-batch: documents lie end to end in one token axis, so nothing is ever padded.

Shape letters used in the whole project: T real tokens of a micro-batch, N documents in it, L length of one document,
E hidden size, H heads, D head size, V vocabulary, F random features, C chunk, M masked tokens, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """Where each document lies in the token axis T.

    `lengths` stays on the host as plain numbers, so that no kernel has to ask a GPU how long anything is; the tensors
    below are made once per micro-batch, on `device`, when a kernel first wants them.
    """

    lengths: tuple[int, ...]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def of(cls, lengths: Iterable[int], device: torch.device | str = "cpu") -> Sequences:
        """Sequences of the given lengths (each at least 1)."""
        return cls(tuple(int(length) for length in lengths), torch.device(device))

    def to(self, device: torch.device | str) -> Sequences:
        """The same documents with index tensors on another device."""
        return Sequences(self.lengths, torch.device(device))

    @property
    def tokens(self) -> int:
        """T, the number of tokens of all documents."""
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        """The length of the longest document."""
        return max(self.lengths)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First token of each document and, last, T: N + 1 plain numbers."""
        return tuple(accumulate(self.lengths, initial=0))

    @cached_property
    def starts_N1(self) -> Tensor:
        """(N + 1) int32, as variable-length flash kernels take them (`cu_seqlens`)."""
        return torch.tensor(self.starts, dtype=torch.int32, device=self.device)

    @cached_property
    def lengths_N(self) -> Tensor:
        """(N) int64."""
        return torch.tensor(self.lengths, dtype=torch.int64, device=self.device)

    @cached_property
    def document_T(self) -> Tensor:
        """(T) int64: the number of the document each token belongs to."""
        documents_N = torch.arange(len(self.lengths), device=self.device)
        return torch.repeat_interleave(documents_N, self.lengths_N, output_size=self.tokens)

    @cached_property
    def position_T(self) -> Tensor:
        """(T) int64: the place of each token within its document, from 0."""
        return torch.arange(self.tokens, device=self.device) - self.starts_N1.long()[self.document_T]


class Rows(NamedTuple):
    """Which of a whole micro-batch's rows (tokens, or sequences) a piece of it has: those from `first` on, of so many."""

    first: int
    of: int


class Batch(NamedTuple):
    """One packed micro-batch as an encoder and an objective take it."""

    ids_T: Tensor
    """(T) int64 token ids, documents end to end, each with its [CLS] and [SEP]."""
    sequences: Sequences
    labels: Tensor
    """What the objective is told: (N) int64 classes; or (2, M) int64, positions in T and the original ids there."""
    weight: int
    """How many terms the loss sums over (documents or masked tokens); known on the host before any computing."""

    def to(self, device: torch.device | str) -> Batch:
        """The same micro-batch on another device."""
        return Batch(
            self.ids_T.to(device, non_blocking=True),
            self.sequences.to(device),
            self.labels.to(device, non_blocking=True),
            self.weight,
        )
