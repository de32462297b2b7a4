"""Runs that die and go on equal runs that do not: a short random sample in every test run, and proof that a difference shows."""

from __future__ import annotations

import contextlib
import json
import random
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks.faults import ATTENTION, Configuration, Difference, Ended, Fault, Harness, tables
from benchmarks.faults_compare import compare_readings, compare_tensors, compare_tracking
from benchmarks.forker import Forker
from dstrain.readings import Reading, to_line

PLAIN = Configuration("sdpa", 1, 1, "fp32", tracked=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, fork_server: Forker) -> Harness:
    return Harness(tmp_path_factory.mktemp("faults"), random.SystemRandom().randrange(10**6), print, fork_server)


def test_a_run_that_dies_at_random_ends_as_if_it_had_not(made: Harness) -> None:
    """One rank, two deaths, whatever is drawn; a failure prints the moments, and the seed makes them again."""
    drawn = random.SystemRandom()
    configuration = replace(PLAIN, attention=drawn.choice([*ATTENTION]), zero=drawn.randrange(4))
    made.chain(configuration, 2)


def test_a_start_that_ends_in_another_way_than_it_should_is_a_difference(made: Harness) -> None:
    """The exception that is raised on purpose ends a start with status 1; a start without a fault must end with 0."""
    whole, undisturbed = made.whole(PLAIN)
    assert (whole / "run/outcome.json").exists() and undisturbed.statuses == [0]
    assert set(undisturbed.events) == {"vocabulary", "tokenisation", "step", "evaluation", "checkpoint", "between"}
    assert undisturbed.events["step"] == 3 * 6 * 2 * 2, "stages x steps x micro-batches, before and after each"
    fault = Fault("step", "sigkill", 1, 0)
    with pytest.raises(Difference, match="status"):
        made._judge(PLAIN, fault, replace(undisturbed, statuses=[1], struck={"stage": "mlm", "at": 0.0, "spare": 0}), [])
    with pytest.raises(Difference, match="status"):
        made._judge(PLAIN, None, replace(undisturbed, statuses=[75]), [])


@pytest.mark.parametrize(("later", "spare", "wrong"), [(0, 0, False), (1, 0, True), (1, 1, False), (2, 1, True)])
def test_a_wish_to_stop_that_nobody_hears_is_a_difference(made: Harness, later: int, spare: int, wrong: bool) -> None:
    """A start may finish when it was asked in its last step, not when it takes another one."""
    struck = {"stage": "classify", "moment": "step", "at": 10.0, "spare": spare}
    ended = Ended([0], struck, "classify", 1.0, "", begun=[8.0, 9.0, *[11.0] * later])
    fault = Fault("step", "sigterm", 1, 0)
    with pytest.raises(Difference, match="'75'") if wrong else contextlib.nullcontext():
        made._judge(PLAIN, fault, ended, [])
    made._judge(PLAIN, fault, replace(ended, statuses=[75]), [])
    made._judge(PLAIN, None, replace(ended, struck=None), [])


def test_a_start_that_is_asked_takes_no_further_step(made: Harness) -> None:
    made._begin(folder := made._folder / "asked", PLAIN)
    ended = made._launcher.run(folder, PLAIN, Fault("step", "sigterm", 5, 0))
    assert ended.statuses == [75] and ended.struck and not ended.went_on, ended.log
    assert len(ended.begun) == 2 and ended.begun[1] < ended.struck["at"], "of two micro-batches each, with two events"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("zero", range(4))
def test_two_ranks(made: Harness, zero: int) -> None:
    """Any attention and precision at each ZeRO stage, tracked by MLflow; the rank that dies takes the other with it."""
    drawn = random.SystemRandom()
    precision = drawn.choice(["fp32", "bf16"])
    made.chain(Configuration(drawn.choice([*ATTENTION]), zero, 2, precision, tracked=True), 3)
    assert made.deaths and "ZeRO" in tables(made.deaths)


# ------------------------------------------------------------------------------------------ what counts as different


def told(folder: Path, *readings: Reading) -> Path:
    folder.mkdir()
    (folder / "readings.jsonl").write_text("".join(to_line(one, 0.0) + "\n" for one in readings))
    return folder


ONE = Reading("mlm", "train", 2, 6, 100, 1.0, {"loss": 0.5, "tokens_per_second": 1.0})
TWO = Reading("mlm", "valid", 2, 6, 100, 1.0, {"loss": float("nan")})


@pytest.mark.parametrize(
    ("readings", "found"),
    [
        ([replace(ONE, seconds=2.0, values={"loss": 0.5, "tokens_per_second": 9.0}), TWO], []),
        ([ONE], ["readings: ('mlm', 'valid', 2, 6, 100) is missing"]),
        ([ONE, ONE, TWO], ["readings: ('mlm', 'train', 2, 6, 100) stands there 2 times"]),
        ([ONE, TWO, replace(ONE, step=3)], ["readings: ('mlm', 'train', 3, 6, 100) is one too many"]),
        ([TWO, ONE], ["readings: stand in another order"]),
        (
            [replace(ONE, values={"loss": 0.5000000000000001}), TWO],
            ["readings: ('mlm', 'train', 2, 6, 100) loss is '0.5000000000000001' and not '0.5'"],
        ),
        ([ONE, replace(TWO, values={})], ["readings: ('mlm', 'valid', 2, 6, 100) loss is None and not 'nan'"]),
    ],
)
def test_readings(tmp_path: Path, readings: list[Reading], found: list[str]) -> None:
    assert list(compare_readings(told(tmp_path / "a", ONE, TWO), told(tmp_path / "b", *readings))) == found


def test_tensors(tmp_path: Path) -> None:
    mine = {"a": np.arange(4, dtype=np.float32), "b": np.zeros(2)}
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    save_file(mine, whole)
    assert list(compare_tensors(whole, whole)) == []
    assert "was not written" in next(compare_tensors(whole, cut))
    yours = {"a": np.nextafter(mine["a"], 9), "c": np.zeros(2)}
    save_file(yours, cut)
    name = f"{tmp_path.name}/whole.safetensors"
    assert list(compare_tensors(whole, cut)) == [
        f"{name}: b is in one of them only", f"{name}: c is in one of them only", f"{name}: a differs by up to 2.38e-07"
    ]  # fmt: skip
    save_file({"a": -0.0 * mine["a"], "b": mine["b"]}, cut)
    assert "a differs" in next(compare_tensors(whole, cut))


def store(file: Path, runs: dict[str, list[tuple[str, int, float]]], status: str = "FINISHED") -> Path:
    with sqlite3.connect(file) as database:
        database.execute("create table runs (run_uuid text, status text)")
        database.execute("create table metrics (run_uuid text, key text, step int, value real, is_nan int)")
        for run, rows in runs.items():
            database.execute("insert into runs values (?, ?)", (run, status))
            database.executemany("insert into metrics values (?, ?, ?, ?, 0)", [(run, *row) for row in rows])
    return file


def test_tracked_runs(tmp_path: Path) -> None:
    rows = [("mlm/train/loss", 2, 0.5), ("mlm/train/loss", 4, 0.25), ("mlm/system/cpu", 2, 1.0)]
    whole = store(tmp_path / "whole.db", {"a": rows})

    def found(name: str, runs: dict[str, Any], **how: str) -> list[str]:
        return list(compare_tracking(whole, store(tmp_path / name, runs, **how)))

    assert found("same.db", {"b": [*rows[:2], ("mlm/system/cpu", 2, 9.0)]}) == []
    assert found("two.db", {"b": rows, "c": rows}) == ["MLflow: 2 runs in place of one"]
    assert found("killed.db", {"b": rows}, status="KILLED") == ["MLflow: the run is KILLED and not FINISHED"]
    assert found("twice.db", {"b": [*rows, rows[0]]}) == ["MLflow: mlm/train/loss has step 2 twice"]
    assert found("doubled.db", {"b": [*rows, ("mlm/train/loss", 2, 0.75)]})[0] == "MLflow: mlm/train/loss has step 2 twice"
    assert len(found("less.db", {"b": rows[1:]})) == 1


def test_every_death_is_kept(made: Harness, tmp_path: Path) -> None:
    from benchmarks.faults import _keep

    _keep(tmp_path / "faults.json", made, 3, "")
    kept = json.loads((tmp_path / "faults.json").read_text())
    assert kept["deaths"] == len(kept["all"]) == len(made.deaths) and kept["difference"] == ""
    assert all({"moment", "kind", "stage", "attention", "zero"} <= death.keys() for death in kept["all"])
