"""Readings: what is written is read back, a torn or full disk costs no line, and the console says it in one line."""

from __future__ import annotations

import io
import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain import readings
from dstrain.readings import (
    READINGS_FILE,
    Console,
    JsonLines,
    Reading,
    amount,
    describe,
    duration,
    fan_out,
    from_line,
    number,
    read_readings,
    spoken,
    to_line,
)


def reading(step: int, stage: str = "tapt", split: str = "train", **values: float) -> Reading:
    return Reading(stage, split, step, 1000, step * 32768, step * 0.29, values or {"loss": 2.0 + step})


names = st.text(st.characters(codec="utf-8"), max_size=12)
any_reading = st.builds(
    Reading,
    stage=names,
    split=st.sampled_from(["train", "valid", "test"]),
    step=st.integers(0, 10**12),
    total_steps=st.integers(0, 10**12),
    tokens=st.integers(0, 10**15),
    seconds=st.floats(0, 1e9),
    values=st.dictionaries(names, st.floats()),
)


def same(a: Reading, b: Reading) -> bool:
    """Equality that holds for NaN too: JSON keeps a float's shortest digits, so repr is exact."""
    return repr(a) == repr(b)


@given(any_reading, st.floats(0, 4e9))
def test_a_line_is_strict_json_of_one_line_and_reads_back(one: Reading, written: float) -> None:
    line = to_line(one, written)
    assert len(line.splitlines()) == 1 and "\n" not in line
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    back, when = from_line(line)
    assert same(back, one)
    assert abs(when - written) < 1e-3


@pytest.mark.parametrize(
    "line",
    [
        "",
        "nonsense",
        "[]",
        "{}",
        "3",
        '{"time": 1}',
        to_line(reading(1), 0)[:-20],
        to_line(reading(1), 0).replace("step", "pets"),
    ],
)
def test_what_is_no_reading_is_a_value_error(line: str) -> None:
    with pytest.raises(ValueError, match="not a reading"):
        from_line(line)


def test_metric_keys_are_stage_split_name() -> None:
    assert reading(3, "finetune", "valid", f1_macro=0.5).keyed() == {"finetune/valid/f1_macro": 0.5}


def test_fan_out_hands_every_reading_to_every_sink_in_order() -> None:
    seen: list[tuple[str, int]] = []
    report = fan_out(lambda r: seen.append(("a", r.step)), lambda r: seen.append(("b", r.step)))
    report(reading(1))
    report(reading(2))
    assert seen == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]


# --------------------------------------------------------------------------------------------- readings.jsonl


def test_every_line_is_on_disk_as_soon_as_it_is_reported(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path / "new" / "run")
    for step in range(1, 4):
        sink(reading(step))
        assert [r.step for r in read_readings(tmp_path / "new" / "run")] == list(range(1, step + 1))


@pytest.mark.parametrize("torn", [1, 7, 60, 150])
def test_a_torn_last_line_is_dropped_and_written_anew(tmp_path: Path, torn: int) -> None:
    sink = JsonLines(tmp_path)
    for step in (1, 2, 3):
        sink(reading(step))
    path = tmp_path / READINGS_FILE
    os.truncate(path, path.stat().st_size - torn)  # the kill came while the third line was being written
    assert [r.step for r in read_readings(tmp_path)] == [1, 2]
    again = JsonLines(tmp_path)
    for step in (3, 4):
        again(reading(step))
    assert [r.step for r in read_readings(tmp_path)] == [1, 2, 3, 4]


def test_a_resumed_run_doubles_no_step_of_any_source(tmp_path: Path) -> None:
    first = JsonLines(tmp_path)
    for step in (100, 200, 300):
        first(reading(step))
        first(reading(step, split="valid"))
    first(reading(400))
    resumed = JsonLines(tmp_path)  # its checkpoint was made at step 200
    for step in (300, 400, 500):
        resumed(reading(step, loss=-1.0))
        resumed(reading(step, split="valid", loss=-1.0))
    resumed(reading(100, stage="finetune"))  # another stage counts its own steps
    steps = [(r.stage, r.split, r.step) for r in read_readings(tmp_path)]
    assert len(steps) == len(set(steps)) == 5 + 5 + 1
    assert {r.step for r in read_readings(tmp_path) if r.values == {"loss": -1.0}} == {400, 500}
    kept = {r.step: r.values["loss"] for r in read_readings(tmp_path) if r.split == "train" and r.stage == "tapt"}
    assert kept == {100: 102.0, 200: 202.0, 300: 302.0, 400: 402.0, 500: -1.0}


def test_a_foreign_line_keeps_its_place_but_the_reader_names_it(tmp_path: Path) -> None:
    (tmp_path / READINGS_FILE).write_text(to_line(reading(1), 0) + "\nhello\n")
    JsonLines(tmp_path)(reading(2))
    with pytest.raises(ValueError, match="line 2: not a reading"):
        read_readings(tmp_path)
    assert len((tmp_path / READINGS_FILE).read_text().splitlines()) == 3


def test_a_full_disk_is_said_once_and_every_line_arrives_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    sink = JsonLines(tmp_path, said.append)
    sink(reading(1))
    real_write = os.write

    def half(file: int, data: bytes) -> int:  # what a file system does as it runs out of room
        return real_write(file, data[: len(data) // 2])

    monkeypatch.setattr(readings.os, "write", half)
    sink(reading(2))
    sink(reading(3))
    assert [r.step for r in read_readings(tmp_path)] == [1]
    assert (tmp_path / READINGS_FILE).read_bytes().endswith(b"\n")
    monkeypatch.setattr(readings.os, "write", real_write)
    sink(reading(4))
    assert [r.step for r in read_readings(tmp_path)] == [1, 2, 3, 4]
    assert len(said) == 1 and str(tmp_path / READINGS_FILE) in said[0] and "training goes on" in said[0]


def test_the_end_of_a_run_is_the_last_attempt_and_what_is_lost_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    sink = JsonLines(tmp_path, said.append)
    sink.close()
    assert not (tmp_path / READINGS_FILE).exists() and said == [], "nothing was reported"
    sink(reading(1))
    real_write = os.write
    monkeypatch.setattr(readings.os, "write", lambda file, data: real_write(file, data[:5]))
    sink(reading(2))
    sink(reading(3))
    sink.close()
    assert len(said) == 2 and "readings wait in memory" in said[0]
    assert "cannot be written at the end either" in said[1] and "the 2 readings in memory are lost; make room" in said[1]
    monkeypatch.setattr(readings.os, "write", real_write)
    sink.close()
    assert [r.step for r in read_readings(tmp_path)] == [1, 2, 3] and len(said) == 2


def test_a_folder_that_cannot_be_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said: list[str] = []
    sink = JsonLines(tmp_path / "file" / "run", said.append)
    sink(reading(1))
    assert len(said) == 1 and "Not a directory" in said[0]


def test_without_a_file_there_is_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_readings(tmp_path)


# ------------------------------------------------------------------------------------------------- the console


def test_the_line_of_the_readme() -> None:
    before = Reading("tapt", "train", 300, 1000, 9_000_000, 75.0)
    now = Reading("tapt", "train", 400, 1000, 11_800_000, 100.0, {"loss": 2.314, "acc": 0.487, "peak_gb": 18.21})
    assert describe(now, before) == (
        "tapt      step    400/1000  loss 2.314  acc 0.487  peak 18.2 GB  112k tok/s  eta 2m30s"
    )
    valid = Reading("tapt", "valid", 400, 1000, 11_800_000, 100.0, {"loss": 2.2914, "acc": 0.5})
    assert describe(valid, before) == "tapt      valid   400/1000  loss 2.291  acc 0.500"
    looked = reading(400, "tapt", "attention", **{"error": 0.25, "layer_0/error": 0.25})
    assert "error 0.250" in describe(looked, before) and "layer_0" not in describe(looked, before), "details are for MLflow"


def test_speed_is_since_the_last_line_of_the_same_stage() -> None:
    out = io.StringIO()
    console = Console(out)
    console(Reading("a", "train", 1, 10, 1000, 1.0))
    console(Reading("a", "valid", 1, 10, 1000, 1.0))
    console(Reading("a", "train", 2, 10, 4000, 2.0))
    console(Reading("b", "train", 1, 10, 500, 1.0))
    console(Reading("b", "train", 2, 10, 500, 1.0))  # no time has passed: no speed to tell
    console(Reading("b", "train", 3, 10, 500, 2.0, {"tokens_per_second": 7.0}))
    speeds = [
        line.partition(" tok/s")[0].split()[-1] if "tok/s" in line else None for line in out.getvalue().splitlines()
    ]
    assert speeds == ["1.0k", None, "3.0k", "500", None, "7"]


def test_lines_of_one_run_are_aligned() -> None:
    lines = [
        describe(Reading(stage, split, step, 12000, 10, 1.0))
        for stage in ("pretrain", "tapt")
        for split in ("train", "test")
        for step in (1, 12000)
    ]
    assert len({line.index("/12000") for line in lines}) == 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colour_only_on_a_terminal_and_not_against_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal, pipe, plain = Terminal(), io.StringIO(), Terminal()
    Console(terminal)(reading(1))
    Console(pipe)(reading(1))
    monkeypatch.setenv("NO_COLOR", "1")
    Console(plain)(reading(1))
    assert "\033[1mtapt\033[0m" in terminal.getvalue()
    assert pipe.getvalue() == plain.getvalue() == terminal.getvalue().replace("\033[1m", "").replace("\033[0m", "")


def test_quiet_says_nothing_and_a_closed_stream_stops_nothing() -> None:
    out = io.StringIO()
    Console(out, quiet=True)(reading(1))
    assert out.getvalue() == ""
    console = Console(out)
    out.close()
    console(reading(1))
    console(reading(2))


def test_say_aloud_survives_a_closed_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    monkeypatch.setattr(readings.sys, "stderr", closed)
    readings.say_aloud("hello")
    assert closed.getvalue() == "dstrain: hello\n"
    closed.close()
    readings.say_aloud("nobody hears this")


def test_a_stream_without_isatty_is_no_terminal() -> None:
    assert not readings._is_terminal(object())


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2.3141, "2.314"),
        (0.487, "0.487"),
        (3e-5, "3.00e-05"),
        (0.0, "0"),
        (12.0, "12"),
        (1.2e6, "1.20e+06"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (950.4, "950"),
        (999.7, "1.0k"),
        (1234, "1.2k"),
        (9949, "9.9k"),
        (9950, "10k"),
        (112_400, "112k"),
        (999_600, "1.0M"),
        (3.4e6, "3.4M"),
        (2.5e9, "2.5G"),
        (math.inf, "inf"),
    ],
)
def test_amounts(value: float, text: str) -> None:
    assert amount(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (-3, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (250, "4m10s"),
        (3599.6, "1h00m"),
        (7500, "2h05m"),
        (273_600, "3d04h"),
        (math.nan, "?"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_names_carry_their_units() -> None:
    assert spoken("peak_gb", 18.24) == "peak 18.2 GB"
    assert spoken("useful_share", 0.987) == "useful 98.7 %"
    assert spoken("evaluation_seconds", 75.0) == "evaluation 1m15s"
    assert spoken("overflows", 3.0) == "overflows 3"
