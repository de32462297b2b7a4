from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.data.batches import EpochPlan, epoch_plan, evaluation_plan
from dstrain.schema import UserError

BUDGET = 100
lengths_of_splits = st.lists(st.integers(1, BUDGET), min_size=16, max_size=120).map(np.array)


def read_by_all(plan: EpochPlan, world: int) -> list[list[int]]:
    """What all ranks together read in each optimizer step, sorted."""
    return [
        sorted(int(n) for rank in range(world) for piece in plan.of_rank(step, rank, world) for n in piece.sequences_N)
        for step in range(plan.steps)
    ]


@given(lengths_of_splits, st.integers(1, 16), st.integers(0, 5))
def test_every_sequence_is_read_once_or_named_as_left_out(lengths, group, epoch):
    plan = epoch_plan(lengths, BUDGET, 7, epoch, group)
    read = np.concatenate([plan.micro_batch(number) for number in range(len(plan))])
    assert sorted([*read, *plan.left_out]) == list(range(len(lengths)))
    assert len(plan) == plan.steps * group > 0
    assert all(0 < lengths[plan.micro_batch(number)].sum() <= BUDGET for number in range(len(plan)))
    assert plan.tokens == lengths[read].sum()
    assert plan.useful_share == pytest.approx(plan.tokens / (len(plan) * BUDGET))


@given(lengths_of_splits, st.integers(1, 16))
def test_something_is_left_out_only_where_splitting_cannot_help(lengths, group):
    plan = epoch_plan(lengths, BUDGET, 7, 0, group)
    if len(plan.left_out):
        assert len(plan.left_out) < group
        assert len(lengths) < len(plan) + group  # one more step would need more micro-batches than there are sequences


@given(lengths_of_splits, st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16]))
def test_ranks_and_accumulation_are_interchangeable(lengths, world):
    group = 48 if world in (3, 6, 12) else 16
    lengths = np.concatenate([lengths, lengths, lengths])
    plan = epoch_plan(lengths, BUDGET, 3, 2, group)
    assert read_by_all(plan, world) == read_by_all(plan, 1)
    counts = {len(plan.of_rank(step, rank, world)) for step in range(plan.steps) for rank in range(world)}
    assert counts == {group // world}


def test_a_micro_batch_keeps_its_number_whoever_reads_it():
    plan = epoch_plan(np.full(40, 30), BUDGET, 0, 0, 4)
    alone = {piece.micro_batch: piece.sequences_N.tolist() for piece in plan.of_rank(1, 0, 1)}
    both = {p.micro_batch: p.sequences_N.tolist() for rank in range(2) for p in plan.of_rank(1, rank, 2)}
    assert alone == both and sorted(alone) == [0, 1, 2, 3]


def test_a_plan_repeats_itself_and_epochs_and_seeds_differ():
    lengths = np.random.default_rng(0).integers(1, BUDGET, 300)
    plans = [epoch_plan(lengths, BUDGET, *key, 2).order.tolist() for key in [(1, 0), (1, 0), (1, 1), (2, 0)]]
    assert plans[0] == plans[1]
    assert plans[0] != plans[2] != plans[3] != plans[0]


def test_like_lengths_share_a_micro_batch_and_long_ones_do_not_come_first():
    lengths = np.random.default_rng(0).integers(8, 512, 20_000)
    plan = epoch_plan(lengths, 8192, 0, 0, 8)
    spread = np.mean([np.ptp(lengths[plan.micro_batch(number)]) for number in range(len(plan))])
    assert spread < 40  # unsorted: nearly 500
    assert plan.useful_share > 0.95
    means = [lengths[plan.micro_batch(number)].mean() for number in range(len(plan))]
    place = np.arange(len(plan))
    assert abs(np.corrcoef(place, means)[0, 1]) < 0.15


def test_the_heaviest_micro_batches_are_halved():
    plan = epoch_plan(np.full(12, 25), BUDGET, 0, 0, 4)  # three of four sequences; the fourth comes of halving one
    assert sorted(len(plan.micro_batch(number)) for number in range(4)) == [2, 2, 4, 4]


def test_what_is_left_out_changes_from_epoch_to_epoch():
    plans = [epoch_plan(np.full(17, 60), BUDGET, 0, epoch, 16) for epoch in range(12)]
    assert all(len(plan.left_out) == 1 and plan.steps == 1 for plan in plans)
    assert len({int(plan.left_out[0]) for plan in plans}) > 4


def test_impossible_plans_are_refused_with_their_numbers():
    with pytest.raises(UserError, match=r"tokens_per_batch: is 100, but the longest sequence has 101 tokens"):
        epoch_plan(np.array([5, 101]), BUDGET, 0, 0, 1)
    with pytest.raises(UserError, match=r"has 3 training sequences, but one optimizer step takes 4"):
        epoch_plan(np.array([5, 6, 7]), BUDGET, 0, 0, 4)
    with pytest.raises(UserError, match="no sequences"):
        evaluation_plan(np.array([], np.int64), BUDGET, 2)


@given(st.lists(st.integers(1, BUDGET), min_size=1, max_size=60).map(np.array), st.integers(1, 16))
def test_evaluation_reads_everything_once_in_as_many_forwards_on_each_rank(lengths, world):
    plan = evaluation_plan(lengths, BUDGET, world)
    ranks = [plan.of_rank(rank) for rank in range(world)]
    assert {len(pieces) for pieces in ranks} == {plan.steps}
    pieces = [piece for pieces in ranks for piece in pieces]
    counted = [piece.sequences_N.tolist() for piece in pieces if piece.counts]
    assert sorted(n for numbers in counted for n in numbers) == list(range(len(lengths)))
    assert all(0 < lengths[piece.sequences_N].sum() <= BUDGET for piece in pieces)
    alone = [piece.sequences_N.tolist() for piece in evaluation_plan(lengths, BUDGET, 1).pieces]
    assert sorted(counted) == sorted(alone)  # the micro-batches, and with them every sum, do not depend on the ranks
