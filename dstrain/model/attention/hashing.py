"""Locality-sensitive hashing of packed documents: near tokens share buckets, and a sort puts them side by side.

A rotation's bucket is the nearest of the directions +-r_1 ... +-r_b/2 (Andoni et al. 2015, cross-polytope hashing,
https://arxiv.org/abs/1509.02897). Shapes: T tokens, H heads, D head size, R rounds, K directions of one sign, L tokens
of one step, B buckets of all documents.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dstrain.packed import Sequences

if TYPE_CHECKING:
    from dstrain.model.attention.lsh import LshSettings

DIRECTIONS = 128
"""Buckets that one rotation can tell apart; more buckets are pairs of two independent rotations' buckets."""


class Order(NamedTuple):
    """The tokens of every head and round in the order of (document, bucket, position)."""

    token_HRT: Tensor
    """int32: which token stands at each place. Only tokens of one document trade places."""
    bucket_HRT: Tensor
    """int32: the bucket of the token at each place, numbered through all documents."""


def sort_tokens(x_THD: Tensor, rotations: Tensor, sequences: Sequences, settings: LshSettings) -> Order:
    """One stable sort per head for all rounds; documents own disjoint bucket numbers and so never mix."""
    counts = [settings.buckets_of(length) for length in sequences.lengths]
    bucket_HRT = hash_tokens(x_THD, rotations, sequences, counts)
    _, rounds, tokens = bucket_HRT.shape
    assert rounds * sum(counts) < 2**31, "the sort's keys are int32"
    round_R1 = torch.arange(rounds, dtype=torch.int32, device=x_THD.device).unsqueeze(1)
    token_HRT = torch.empty_like(bucket_HRT)
    for token_RT, bucket_RT in zip(token_HRT, bucket_HRT, strict=True):  # all heads' int64 places would be large
        keys, places = torch.sort((bucket_RT + round_R1 * sum(counts)).flatten(), stable=True)
        torch.sub(places.view(rounds, tokens), round_R1 * tokens, out=token_RT)
        torch.sub(keys.view(rounds, tokens), round_R1 * sum(counts), out=bucket_RT)
    return Order(token_HRT, bucket_HRT)


def hash_tokens(x_THD: Tensor, rotations: Tensor, sequences: Sequences, counts: Sequence[int]) -> Tensor:
    """(H, R, T) int32: the nearest direction of each token, plus the number of buckets of all documents before its own.

    `rotations` is (H, D, R, 2, DIRECTIONS / 2) and `counts` the number of buckets of each document. A document of b
    buckets uses the first directions of its rotation, so its hash does not depend on its batch-mates.
    """
    tokens, heads, _ = x_THD.shape
    rounds = rotations.shape[2]
    directions_2HRKD = rotations.permute(3, 0, 2, 4, 1).contiguous()
    bucket_HRT = torch.empty(heads, rounds, tokens, dtype=torch.int32, device=x_THD.device)
    products = 1 << 18 if x_THD.device.type == "cpu" else 1 << 26  # a CPU wants them in its caches, a GPU few launches
    for count, first, last in _runs_of_equal_count(sequences, counts):
        coarse, fine = factors(count)
        step = max(1, products // (heads * rounds * coarse))
        for start in range(first, last, step):
            here = slice(start, min(start + step, last))
            x_HLD = x_THD[here].transpose(0, 1).float()
            bucket = _nearest(x_HLD, directions_2HRKD[0, :, :, : coarse // 2])
            if fine > 1:
                bucket = bucket * fine + _nearest(x_HLD, directions_2HRKD[1, :, :, : fine // 2])
            bucket_HRT[:, :, here] = bucket
    before_N = torch.tensor([0, *accumulate(counts)][:-1], dtype=torch.int32, device=x_THD.device)
    return bucket_HRT.add_(before_N[sequences.document_T])


def _nearest(x_HLD: Tensor, directions_HRKD: Tensor) -> Tensor:
    """(H, R, L) int32: the index of the nearest among K directions (a power of two) and their opposites; 0 of none.

    The largest |product| wins. Its direction and sign ride in the lowest bits of the number that is compared, because
    a maximum without indices is several times faster; products that agree to 16 bits are as near as each other.
    """
    heads, rounds, count, _ = directions_HRKD.shape
    if not count:
        return torch.zeros(heads, rounds, x_HLD.shape[1], dtype=torch.int32, device=x_HLD.device)
    near = torch.bmm(directions_HRKD.flatten(1, 2), x_HLD.mT).unflatten(1, (rounds, count))
    bits = near.view(torch.int32)
    index_K1 = torch.arange(count, dtype=torch.int32, device=x_HLD.device).unsqueeze(1)
    opposite = (bits >> 31) & count  # the sign bit fills an integer that is shifted right
    winner = bits.bitwise_and_(0x7FFFFFFF & -DIRECTIONS).bitwise_or_(opposite).bitwise_or_(index_K1).amax(2)
    return winner & (2 * count - 1)


def factors(buckets: int) -> tuple[int, int]:
    """buckets = coarse * fine, both powers of two and at most DIRECTIONS; fine is 1 while one rotation is enough."""
    if buckets <= DIRECTIONS:
        return buckets, 1
    bits = buckets.bit_length() - 1
    return 1 << math.ceil(bits / 2), 1 << bits // 2


def _runs_of_equal_count(sequences: Sequences, counts: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(buckets, first token, end) of each longest run of adjacent documents with the same number of buckets."""
    start = 0
    for count, run in groupby(zip(counts, sequences.lengths, strict=True), key=lambda pair: pair[0]):
        end = start + sum(length for _, length in run)
        yield count, start, end
        start = end
