"""What the blocked kernels share: the precision they work in, unit vectors, and heads of documents as one batch.

A blocked kernel reads a tile of the packed (T, H, D) tensors into its own precision, works on it, and writes the
result back; what lies between (features, scores, probabilities) never exists for more than one block.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dstrain.packed import Sequences

LOG2E = math.log2(math.e)
"""Kernels work in base 2: on a CPU `exp2` costs a quarter of `exp`, and it does not slow down where it underflows."""

UNIT_EPS = 1e-6
"""Added to a squared length, so that a zero vector has a unit vector (zero) and a finite gradient."""


class Tile(NamedTuple):
    """All heads of a run of equally long, adjacent documents: one batched matrix product (B = documents x heads)."""

    start: int
    documents: int
    length: int

    def _view(self, x_THD: Tensor, rows: slice) -> Tensor:
        """(documents, heads, rows, D) without a copy."""
        tokens = x_THD[self.start : self.start + self.documents * self.length]
        return tokens.unflatten(0, (self.documents, self.length))[:, rows].transpose(1, 2)

    def read(self, x_THD: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
        """(B, rows, D) in `dtype`: a view where that is possible, so nobody may write to it."""
        return self._view(x_THD, rows).to(dtype).flatten(0, 1)

    def write(self, x_THD: Tensor, rows: slice, values_BLD: Tensor) -> None:
        """Puts (B, rows, D) where `read` found them."""
        target = self._view(x_THD, rows)
        target.copy_(values_BLD.unflatten(0, target.shape[:2]))

    def per_head(self, x_HXX: Tensor) -> Tensor:
        """(H, ...) as (B, ...): each head's share, once for each document."""
        return x_HXX.expand(self.documents, *x_HXX.shape).flatten(0, 1)


def equal_length_runs(sequences: Sequences) -> Iterator[tuple[int, int, int]]:
    """(first token, documents, length) of each longest run of adjacent documents that are equally long."""
    start, index, lengths = 0, 0, sequences.lengths
    while index < len(lengths):
        end = index + 1
        while end < len(lengths) and lengths[end] == lengths[index]:
            end += 1
        yield start, end - index, lengths[index]
        start += (end - index) * lengths[index]
        index = end


def tiles(sequences: Sequences, rows: int) -> Iterator[Tile]:
    """All documents, in tiles of about `rows` tokens (a tile holds at least one document)."""
    for start, documents, length in equal_length_runs(sequences):
        together = max(1, rows // length)
        for first in range(0, documents, together):
            yield Tile(start + first * length, min(together, documents - first), length)


class _Scratch(threading.local):
    """A thread's flat tensors, by name and dtype."""

    def __init__(self) -> None:
        self.tensors: dict[tuple[str, torch.dtype], Tensor] = {}


_scratch = _Scratch()


def scratch(name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory with anything in it, for what lives until the next call with this name.

    On a CPU it is kept, because fresh pages may cost more than what is done in them; a GPU's allocator keeps its own.
    """
    if device.type != "cpu":
        return torch.empty(*shape, dtype=dtype, device=device)
    size, key = math.prod(shape), (name, dtype)
    if key not in _scratch.tensors or len(_scratch.tensors[key]) < size:
        _scratch.tensors[key] = torch.empty(size, dtype=dtype)
    return _scratch.tensors[key][:size].view(*shape)


def work_dtype(x: Tensor) -> torch.dtype:
    """What logits and sums are kept in: fp64 for fp64 inputs, otherwise fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def product_dtype(x: Tensor) -> torch.dtype:
    """What probabilities are multiplied in: bf16 for bf16 inputs where the hardware does it, otherwise as logits.

    Not fp16: its products of small gradients vanish, and its matrix products crawl on a CPU.
    """
    return torch.bfloat16 if x.dtype == torch.bfloat16 and multiplies_bf16(x.device) else work_dtype(x)


def multiplies_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products are faster than fp32 here; a CPU without the instructions is 20 times slower."""
    return device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()


def unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """x / |x| along the last axis, and 1 / |x|."""
    inverse = torch.rsqrt(x.square().sum(-1, keepdim=True) + UNIT_EPS)
    return x * inverse, inverse
