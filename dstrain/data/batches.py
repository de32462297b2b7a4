"""Which sequences form which packed micro-batch: by a budget of real tokens, and the same on every rank.

A plan is computed by every rank for itself from the same (lengths, seed, epoch), so ranks need not talk. Shape
letters: S sequences of a split, B micro-batches, N sequences of one micro-batch.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dstrain.schema import UserError

Numbers = NDArray[np.int64]

_POOL = 64  # micro-batches within whose span sequences are sorted by length


class Planned(NamedTuple):
    """One micro-batch of one rank."""

    micro_batch: int
    """Its number among all micro-batches of the same optimizer step, over all ranks (in evaluation: of the split)."""
    sequences_N: Numbers
    """Numbers of its sequences in the split."""
    counts: bool = True
    """False for a repeat that only keeps the ranks in step: compute it, and leave it out of every sum."""


@dataclass(frozen=True)
class EpochPlan:
    """The micro-batches of one training epoch; a slice of `group` of them makes one optimizer step."""

    order: Numbers
    """Numbers of the sequences, micro-batch after micro-batch."""
    starts_B1: Numbers
    """Where in `order` each micro-batch begins, and where the last one ends."""
    left_out: Numbers
    """The sequences this epoch does not read, sorted; empty unless nearly every micro-batch is a single sequence."""
    tokens: int
    """Real tokens of all micro-batches."""
    tokens_per_batch: int
    """The budget of each."""
    group: int
    """Micro-batches of one optimizer step: ranks * accumulation."""

    def __len__(self) -> int:
        """B, the number of micro-batches: a multiple of `group`."""
        return len(self.starts_B1) - 1

    @property
    def steps(self) -> int:
        """Optimizer steps of the epoch."""
        return len(self) // self.group

    @property
    def useful_share(self) -> float:
        """Real tokens over the tokens there was room for."""
        return self.tokens / (len(self) * self.tokens_per_batch)

    def micro_batch(self, number: int) -> Numbers:
        """(N) numbers of the sequences of one micro-batch of the epoch."""
        return self.order[self.starts_B1[number] : self.starts_B1[number + 1]]

    def of_rank(self, step: int, rank: int, world: int) -> list[Planned]:
        """What `rank` of `world` reads in optimizer step `step` of this epoch: group / world micro-batches.

        The ranks of a step together read the same sequences whatever `world` is, as long as `group` stays.
        """
        assert self.group % world == 0 and 0 <= rank < world and 0 <= step < self.steps
        return [Planned(slot, self.micro_batch(step * self.group + slot)) for slot in range(rank, self.group, world)]


def epoch_plan(lengths: Numbers, tokens_per_batch: int, seed: int, epoch: int, group: int) -> EpochPlan:
    """The micro-batches of epoch `epoch`: every sequence once, at most `tokens_per_batch` real tokens in each.

    Sequences are shuffled, sorted by length within pools of 64 micro-batches, cut greedily, and the micro-batches are
    shuffled. Their number is made a multiple of `group` by halving the heaviest; where there are too few sequences
    for that, up to group - 1 micro-batches of a single sequence, drawn afresh each epoch, are left out.

    lengths: (S) tokens of each sequence. Raises UserError when the longest exceeds the budget or S < group.
    """
    _check(lengths, tokens_per_batch, group)
    random = np.random.default_rng((seed, epoch))
    order = _length_grouped(lengths, tokens_per_batch, random)
    pieces = np.split(order, _cuts(lengths[order], tokens_per_batch)[1:-1])
    missing = -len(pieces) % group
    if len(pieces) + missing <= len(lengths):
        pieces, left_out = _split_heaviest(pieces, lengths, missing), np.zeros(0, np.int64)
    else:
        pieces, left_out = _leave_out(pieces, len(pieces) % group, random)
    pieces = [pieces[number] for number in random.permutation(len(pieces))]
    order = np.concatenate(pieces)
    starts_B1 = np.cumsum([0, *(len(piece) for piece in pieces)], dtype=np.int64)
    return EpochPlan(order, starts_B1, left_out, int(lengths[order].sum()), tokens_per_batch, group)


def _check(lengths: Numbers, tokens_per_batch: int, group: int) -> None:
    if len(lengths) == 0:
        raise UserError("corpus: the split has no sequences; check its path, its columns and its filters")
    longest = int(lengths.max())
    if longest > tokens_per_batch:
        raise UserError(
            f"tokens_per_batch: is {tokens_per_batch}, but the longest sequence has {longest} tokens; "
            f"raise it to at least {longest}, or cut the sequences shorter with max_length"
        )
    if len(lengths) < group:
        raise UserError(
            f"corpus: has {len(lengths)} training sequences, but one optimizer step takes {group} micro-batches "
            f"(ranks * gradient accumulation) of at least one each; use fewer ranks, accumulate less, or add text"
        )


def _length_grouped(lengths: Numbers, tokens_per_batch: int, random: np.random.Generator) -> Numbers:
    """(S) all numbers: shuffled, then sorted by length within pools, every second pool from long to short.

    Turning every second pool round puts sequences of like length next to each other where two pools meet.
    """
    order = random.permutation(len(lengths))
    pool = (np.cumsum(lengths[order]) - 1) // (_POOL * tokens_per_batch)
    return order[np.lexsort((np.where(pool % 2, -lengths[order], lengths[order]), pool))]


def _cuts(lengths: Numbers, tokens_per_batch: int) -> list[int]:
    """0, the first sequence of each following micro-batch, and S: as many in each as the budget takes."""
    ends = np.cumsum(lengths).tolist()
    cuts = [0]
    while cuts[-1] < len(ends):
        before = ends[cuts[-1] - 1] if cuts[-1] else 0
        cuts.append(bisect_right(ends, before + tokens_per_batch, lo=cuts[-1]))
    return cuts


def _split_heaviest(pieces: list[Numbers], lengths: Numbers, times: int) -> list[Numbers]:
    """The micro-batches after halving, `times` times, the one with the most tokens among those of two or more."""
    heap = [(-int(lengths[piece].sum()), number) for number, piece in enumerate(pieces) if times and len(piece) > 1]
    heapify(heap)
    for _ in range(times):
        _, number = heappop(heap)
        ends = np.cumsum(lengths[pieces[number]])
        middle = int(np.abs(ends[:-1] - ends[-1] / 2).argmin()) + 1
        pieces.append(pieces[number][middle:])
        pieces[number] = pieces[number][:middle]
        for half in (number, len(pieces) - 1):
            if len(pieces[half]) > 1:
                heappush(heap, (-int(lengths[pieces[half]].sum()), half))
    return pieces


def _leave_out(pieces: list[Numbers], times: int, random: np.random.Generator) -> tuple[list[Numbers], Numbers]:
    """Without `times` micro-batches of a single sequence, drawn at random, and which sequences those are."""
    single = [number for number, piece in enumerate(pieces) if len(piece) == 1]
    dropped = set(random.choice(single, times, replace=False).tolist())
    kept = [piece for number, piece in enumerate(pieces) if number not in dropped]
    return kept, np.sort(np.concatenate([pieces[number] for number in dropped]))


@dataclass(frozen=True)
class EvaluationPlan:
    """Every sequence of a split exactly once, in micro-batches that do not depend on the number of ranks."""

    pieces: list[Planned]
    """All micro-batches, in the order of their sequences' lengths, then the repeats."""
    world: int

    @property
    def steps(self) -> int:
        """Forwards that every rank runs: the same number on each, for ZeRO-3's sake."""
        return len(self.pieces) // self.world

    def of_rank(self, rank: int) -> list[Planned]:
        """What `rank` reads, in order."""
        return self.pieces[rank :: self.world]


def evaluation_plan(lengths: Numbers, tokens_per_batch: int, world: int) -> EvaluationPlan:
    """Sequences sorted by length, cut greedily; the lightest micro-batch is repeated until every rank has as many.

    lengths: (S) tokens of each sequence. Raises UserError when the longest exceeds the budget or there are none.
    """
    _check(lengths, tokens_per_batch, group=1)
    order = np.argsort(lengths, kind="stable")
    pieces = np.split(order, _cuts(lengths[order], tokens_per_batch)[1:-1])
    lightest = min(pieces, key=lambda piece: int(lengths[piece].sum()))
    repeats = -len(pieces) % world
    plan = [Planned(number, piece) for number, piece in enumerate(pieces)]
    plan += [Planned(len(pieces) + extra, lightest, counts=False) for extra in range(repeats)]
    return EvaluationPlan(plan, world)
