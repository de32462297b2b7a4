"""Asynchronous successive halving: who is stopped, who never is, and that no order of reports changes a rung."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.rungs import (
    AshaSettings,
    History,
    NoSchedulerSettings,
    Rungs,
    default_grace,
    early_cut,
    open_rungs,
    rung_places,
)
from dstrain.schema import UserError, validate

values = st.floats(-10, 10)
figures = st.dictionaries(st.text("abc", min_size=1, max_size=4), values, min_size=1, max_size=20)


def test_keeps_the_best_third_and_says_why_the_others_stop() -> None:
    rungs = Rungs((0.5,), 3, "max")
    for number in range(8):
        rungs.record(f"t{number}", 0.5, 0.5 + number / 100)
    decision = rungs.record("late", 0.55, 0.412)
    assert not decision.keep
    assert decision.reason == "stopped at rung 0.50: 0.412 below the best third of 9, cut at 0.55"


def test_a_small_value_is_good_when_the_mode_is_min() -> None:
    rungs = Rungs((0.5,), 3, "min")
    for value in (1.0, 2.0, 3.0):
        rungs.record(str(value), 0.5, value)
    assert rungs.record("good", 0.5, 0.5).keep
    decision = rungs.record("bad", 0.5, 2.5)
    assert decision == (False, "stopped at rung 0.50: 2.5 above the best third of 5, cut at 1")


@settings(max_examples=60)
@given(figures, st.integers(2, 6), st.sampled_from(["min", "max"]), st.randoms())
def test_the_best_two_of_a_rung_are_never_stopped(
    figures: dict[str, float], eta: int, mode: str, chance: random.Random
) -> None:
    rungs = Rungs((0.3,), eta, mode)  # type: ignore[arg-type]
    order = list(figures)
    chance.shuffle(order)
    stopped = {trial for trial in order if not rungs.record(trial, 0.3, figures[trial]).keep}
    best = sorted(figures, key=lambda trial: figures[trial], reverse=mode == "max")[:2]
    assert not stopped & set(best)


@settings(max_examples=60)
@given(figures, st.integers(2, 6))
def test_once_all_have_come_exactly_those_behind_the_cut_are_stopped(figures: dict[str, float], eta: int) -> None:
    rungs = Rungs((0.3,), eta, "max")
    rungs.replay([History(trial, [(0.3, value)]) for trial, value in figures.items()])
    ranked = sorted(figures.values(), reverse=True)
    kept = min(len(ranked), max(2, math.ceil(len(ranked) / eta)))
    for trial, value in figures.items():
        assert rungs.record(trial, 0.4, 99.0).keep == (value >= ranked[kept - 1])


def test_a_rung_of_three_stops_its_last_though_a_third_would_be_one() -> None:
    rungs = Rungs((0.25,), 3, "max")
    assert rungs.record("a", 0.25, 0.3).keep and rungs.record("b", 0.25, 0.2).keep
    assert rungs.record("c", 0.25, 0.1).reason == "stopped at rung 0.25: 0.1 below the best two of 3, cut at 0.2"


def test_a_trial_that_passed_an_empty_rung_is_stopped_when_the_rung_has_filled() -> None:
    rungs = Rungs((0.2,), 3, "max")
    assert rungs.record("first", 0.2, 0.1).keep
    for number in range(5):
        rungs.record(str(number), 0.2, 0.5)
    assert not rungs.record("first", 0.4, 0.9).keep


def test_a_report_enters_only_the_highest_rung_it_has_passed() -> None:
    rungs = Rungs((0.2, 0.6), 3, "max")
    rungs.record("quick", 0.3, 0.1)
    rungs.record("coarse", 0.7, 0.9)
    assert rungs.state() == [{"place": 0.2, "values": {"quick": 0.1}}, {"place": 0.6, "values": {"coarse": 0.9}}]
    rungs.record("coarse", 0.3, 0.2)  # it went on from an older checkpoint
    assert "coarse" not in rungs.state()[0]["values"]


def test_nothing_is_stopped_before_the_grace_or_at_the_end() -> None:
    rungs = Rungs((0.5,), 3, "max")
    for number in range(9):
        assert rungs.record(f"good{number}", 0.5, 1.0).keep
    assert rungs.record("slow", 0.49, 0.0) == (True, "before the first rung at 0.50")
    assert not rungs.record("slow", 0.51, 0.0).keep
    assert rungs.record("slow", 1.0, 0.0) == (True, "reached its end")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_value_that_is_no_number_stops_the_trial_and_ranks_last(value: float, mode: str) -> None:
    rungs = Rungs((0.2,), 2, mode)  # type: ignore[arg-type]
    assert rungs.record("early", 0.1, value) == (False, f"stopped at 0.10 of the stage: the metric is {value}")
    assert not rungs.record("lost", 0.2, value).keep
    assert rungs.state()[0]["values"] == {"lost": None}
    assert rungs.record("a", 0.2, 1e9).keep and rungs.record("b", 0.2, -1e9).keep


def test_equal_values_are_not_told_apart() -> None:
    rungs = Rungs((0.2,), 3, "max")
    assert all(rungs.record(str(number), 0.2, 0.25).keep for number in range(9))


@settings(max_examples=60)
@given(
    st.dictionaries(
        st.text("abc", min_size=1, max_size=3), st.lists(st.tuples(st.floats(0.01, 1), values), max_size=6), max_size=8
    ),
    st.randoms(),
)
def test_rungs_are_rebuilt_whatever_the_order_of_the_trials(
    reports: dict[str, list[tuple[float, float]]], chance: random.Random
) -> None:
    lived, rebuilt = Rungs((0.2, 0.5, 0.8), 3, "max"), Rungs((0.2, 0.5, 0.8), 3, "max")
    history = [History(trial, sorted(points)) for trial, points in reports.items()]
    turns = [number for number, trial in enumerate(history) for _ in trial.reports]
    chance.shuffle(turns)
    feeds = [iter(trial.reports) for trial in history]
    for number in turns:  # reports of different trials between one another, as they came
        lived.record(history[number].trial_id, *next(feeds[number]))
    chance.shuffle(history)
    rebuilt.replay(history)
    rebuilt.replay(history)  # a trial that goes on repeats itself
    assert rebuilt.state() == lived.state()
    assert json.loads(json.dumps(lived.state())) == lived.state()


def test_places_are_shares_or_steps() -> None:
    assert rung_places(AshaSettings(grace=0.1), 0.1, 0.0, 100) == pytest.approx((0.1, 0.3, 0.9))
    assert rung_places(AshaSettings(grace=25, eta=2), 0.1, 0.0, 100) == (0.25, 0.5)
    assert rung_places(AshaSettings(rungs=(0.5, 30)), 0.1, 0.0, 100) == (0.3, 0.5)
    assert rung_places(AshaSettings(grace=1), 0.1, 0.0, 90)[0] == pytest.approx(1 / 90)


@pytest.mark.parametrize("grace", [1.0, 0.0, 0, -3, 2.5, True, "half", None])
def test_a_grace_that_is_neither_steps_nor_share_is_one_sentence(grace: object) -> None:
    with pytest.raises(UserError) as error:
        validate(AshaSettings, {"grace": grace}, "f.yaml", "search.scheduler.")
    shown = "'true'" if grace is True else repr(grace)  # truth values are told as the words they are in YAML
    assert str(error.value).startswith(f"f.yaml: search.scheduler.grace: {shown} is neither")
    assert "\n" not in str(error.value)


def test_grace_and_rungs_exclude_each_other_and_must_lie_before_the_end() -> None:
    with pytest.raises(UserError, match="both grace and rungs"):
        validate(AshaSettings, {"grace": 0.5, "rungs": [0.5]}, "f.yaml")
    with pytest.raises(UserError, match=r"search\.scheduler\.grace: 100 steps, but the stage has 100"):
        rung_places(AshaSettings(grace=100), 0.1, 0.0, 100)


@settings(max_examples=60)
@given(st.floats(0, 1), st.floats(0, 1))
def test_the_default_grace_lies_after_warm_up_and_after_the_latest_thaw(warmup: float, thaw: float) -> None:
    grace = default_grace(warmup, thaw)
    assert 0 < grace <= 1
    assert grace > warmup or warmup == 1 or grace == pytest.approx(warmup)
    assert grace > thaw or thaw == 1 or grace == pytest.approx(thaw)
    assert all(place < 1 for place in rung_places(AshaSettings(), warmup, thaw, 100))


def test_default_grace_by_hand() -> None:
    assert default_grace(0.1, 0.0) == pytest.approx(0.2)
    assert default_grace(0.0, 0.0) == pytest.approx(0.1)
    assert default_grace(0.1, 0.5) == pytest.approx(2 / 3)


def test_an_early_cut_is_warned_of_with_the_numbers() -> None:
    assert early_cut(AshaSettings(), 0.1, 0.5, 300) is None
    assert early_cut(AshaSettings(grace=0.7), 0.1, 0.5, 300) is None
    warning = early_cut(AshaSettings(grace=1), 0.1, 0.5, 300)
    assert warning is not None
    for words in (
        "search.scheduler.grace",
        "(step 1 of 300)",
        "(step 30 of 300)",
        "(step 150 of 300)",
        "(step 200 of 300)",
    ):
        assert words in warning
    assert "thaw" not in str(early_cut(AshaSettings(rungs=(0.15, 0.5)), 0.1, 0.0, 300))


def test_no_scheduler_stops_nothing() -> None:
    rungs = open_rungs(NoSchedulerSettings(), "max", 0.1, 0.0, 100)
    assert all(rungs.record(str(n), 0.5, v).keep for n, v in enumerate([1.0, 0.9, 0.1, math.nan]))


def test_open_rungs_takes_the_settings_places() -> None:
    assert open_rungs(AshaSettings(), "max", 0.1, 0.0, 100).places == pytest.approx((0.2, 0.6))


def test_eighteen_trials_two_at_a_time_lose_more_than_a_third() -> None:
    for seed in range(50):
        chance = random.Random(seed)
        worth = {f"t{number}": chance.random() for number in range(18)}
        rungs = open_rungs(AshaSettings(), "max", 0.1, 0.0, 60)
        waiting, stopped = list(worth), 0
        running: list[tuple[str, Iterator[int]]] = []
        while waiting or running:
            while waiting and len(running) < 2:
                running.append((waiting.pop(), iter(range(6, 66, 6))))
            trial, steps = running.pop(0)
            step = next(steps)
            keep = rungs.record(trial, step / 60, worth[trial] + chance.gauss(0, 0.1)).keep
            stopped += not keep
            if keep and step < 60:
                running.append((trial, steps))
        assert stopped >= 6
