"""BERT's masking, drawn afresh each epoch and yet independent of how sequences are batched or shared among ranks.

Shape letters: T real tokens of a micro-batch, N sequences in it, M masked tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]
Words = NDArray[np.uint64]

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2 ** 64 over the golden ratio, odd: the step of splitmix64

EVALUATION_EPOCH = -1
"""The epoch whose masks every evaluation uses, so that losses can be compared over time."""


class Masked(NamedTuple):
    """What a masked-word objective reads and is asked."""

    inputs_T: Numbers
    """(T) ids, some of them replaced."""
    positions_M: Numbers
    """(M) places in T that are asked for, ascending."""
    targets_M: Numbers
    """(M) the original ids there."""


def mask_tokens(
    ids_T: Numbers,
    lengths: Sequence[int] | Numbers,
    documents: Sequence[int] | Numbers,
    seed: int,
    epoch: int,
    rate: float,
    vocabulary_size: int,
    mask_id: int,
    special_ids: Sequence[int],
    mask_share: float = 0.8,
    random_share: float = 0.1,
) -> Masked:
    """Each token is asked for with probability `rate` (Devlin et al. 2019, section 3.1).

    Of those, `mask_share` become `mask_id`, `random_share` a random word, and the rest stay as they are. Tokens in
    `special_ids` are neither asked for nor put in. What happens to a token depends on (seed, epoch, number of its
    sequence, place in the sequence) alone: those are hashed, no generator runs.

    ids_T: (T) ids end to end; lengths: (N) their lengths; documents: (N) the sequences' numbers in the whole split.
    """
    lengths_N = np.asarray(lengths, np.int64)
    assert lengths_N.sum() == len(ids_T)
    keys_T = _token_keys(lengths_N, np.asarray(documents, np.int64), seed, epoch)
    special = np.zeros(vocabulary_size, bool)
    special[list(special_ids)] = True
    positions_M = np.flatnonzero((_uniform(keys_T) < rate) & ~special[ids_T])
    targets_M = ids_T[positions_M]
    fate_M = _uniform(_mix(keys_T[positions_M] ^ np.uint64(_GOLDEN)))
    words = np.flatnonzero(~special)
    random_M = words[(_uniform(_mix(keys_T[positions_M] + np.uint64(_GOLDEN))) * len(words)).astype(np.int64)]
    inputs_T = ids_T.copy()
    inputs_T[positions_M] = np.where(
        fate_M < mask_share, mask_id, np.where(fate_M < mask_share + random_share, random_M, targets_M)
    )
    return Masked(inputs_T, positions_M, targets_M)


def _token_keys(lengths_N: Numbers, documents_N: Numbers, seed: int, epoch: int) -> Words:
    """(T) a well-mixed 64-bit number for each (seed, epoch, sequence, place)."""
    run = _mix(_mix(np.array([seed & _WORD], np.uint64)) + np.array([epoch & _WORD], np.uint64))
    sequences_N = _mix(run + documents_N.astype(np.uint64) * np.uint64(_GOLDEN))
    starts_N = np.cumsum(lengths_N) - lengths_N
    places_T = np.arange(int(lengths_N.sum())) - np.repeat(starts_N, lengths_N)
    return _mix(np.repeat(sequences_N, lengths_N) + places_T.astype(np.uint64) * np.uint64(_GOLDEN))


def _mix(words: Words) -> Words:
    """splitmix64's output function (Steele, Lea and Flood 2014): each bit moves every bit of the output."""
    words = words + np.uint64(_GOLDEN)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _uniform(words: Words) -> NDArray[np.float64]:
    """Evenly spread numbers in [0, 1), from the upper 53 bits."""
    return np.asarray((words >> np.uint64(11)) * 2.0**-53, np.float64)
