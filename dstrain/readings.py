"""What a training reports, and the sinks that keep or show it: `Reading`, `JsonLines`, `Console`, `fan_out`.

`readings.jsonl` in the run folder is written ahead of everything else: a table, a plot or a tracking store is made from
it, so a lost server or a killed process loses nothing. One line is one reading:

    {"stage": "tapt", "split": "train", "step": 400, "total_steps": 1000, "tokens": 13107200, "seconds": 117.02,
     "values": {"loss": 2.314}, "time": 1795230000.125}

JSON has no NaN: a value that is not finite is written as the string "nan", "inf" or "-inf", so any JSON reader takes
the file and nothing is lost.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

READINGS_FILE = "readings.jsonl"


@dataclass(frozen=True)
class Reading:
    """Numbers of one moment of one stage, equal on every rank.

    `stage` and `split` ("train", "valid", "test", "attention", "system", "events") name the source, `step` counts optimizer steps
    within the stage, `tokens` real tokens of the stage so far over all ranks, `seconds` its training time so far. There
    is at most one reading per (stage, split, step), and steps only grow.
    """

    stage: str
    split: str
    step: int
    total_steps: int
    tokens: int
    seconds: float
    values: Mapping[str, float] = field(default_factory=dict)

    def keyed(self) -> dict[str, float]:
        """The values under their metric keys, `stage/split/name`."""
        return {f"{self.stage}/{self.split}/{name}": value for name, value in self.values.items()}


Report = Callable[[Reading], None]
"""What the loop calls with every reading."""

Say = Callable[[str], None]
"""Where a sink says the one sentence about its own trouble."""


def say_aloud(sentence: str) -> None:
    """Writes a sentence to standard error; a closed one is no reason to stop."""
    try:
        print(f"dstrain: {sentence}", file=sys.stderr, flush=True)
    except (OSError, ValueError):
        pass


def fan_out(*sinks: Report) -> Report:
    """One Report that hands each reading to all sinks in the order given."""

    def report(reading: Reading) -> None:
        for sink in sinks:
            sink(reading)

    return report


# ------------------------------------------------------------------------------------------------ one line


def to_line(reading: Reading, written: float) -> str:
    """One JSON line without its newline; `written` is the wall clock in seconds since 1970."""
    record = asdict(reading)
    record["seconds"] = _to_json(reading.seconds)
    record["values"] = {name: _to_json(float(value)) for name, value in reading.values.items()}
    return json.dumps({**record, "time": round(written, 3)}, allow_nan=False)


def from_line(line: str | bytes) -> tuple[Reading, float]:
    """The reading of a JSON line and when it was written (seconds since 1970). Raises ValueError when it is none."""
    try:
        record = json.loads(line)
        written = float(record.pop("time"))
        record["values"] = {str(name): float(value) for name, value in record["values"].items()}
        reading = Reading(**{**record, "seconds": float(record["seconds"]), "step": int(record["step"])})
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"not a reading: {error}") from None
    return reading, written


def read_readings(folder: Path) -> list[Reading]:
    """All readings of a run folder in the order written; a last line that a kill tore apart is left out.

    Raises ValueError with file and line number for any other line that is no reading, and OSError without a file.
    """
    path = folder / READINGS_FILE
    readings = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        try:
            readings.append(from_line(line)[0])
        except ValueError as error:
            raise ValueError(f"{path}: line {number}: {error}; take the line out to read the rest") from None
    return readings


def _to_json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


# ------------------------------------------------------------------------------------------------- the file


class JsonLines:
    """Appends readings to `folder/readings.jsonl`, one unbuffered write per reading; never raises on a bad disk.

    Reopened after a kill it cuts off a torn last line and passes over every reading at or before the last step written
    for the same (stage, split): a run that resumes from an older checkpoint computes those steps again, and they would
    stand there twice. What cannot be written (full disk) is said once, kept in memory and written when there is room.
    `close` tries a last time.
    """

    def __init__(self, folder: Path, say: Say = say_aloud) -> None:
        self.path = folder / READINGS_FILE
        self._say = say
        self._said = False
        self._unwritten = b""
        self._last_step: dict[tuple[str, str], int] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._reopen()
        except OSError as error:
            self._complain(error)

    def __call__(self, reading: Reading) -> None:
        source = (reading.stage, reading.split)
        if reading.step <= self._last_step.get(source, -1):
            return
        self._last_step[source] = reading.step
        self._unwritten += to_line(reading, time.time()).encode() + b"\n"
        try:
            self._append()
        except OSError as error:
            self._complain(error)

    def close(self) -> None:
        """Has all that was reported on disk. What cannot be written even now is lost, and that is said."""
        lost = self._unwritten.count(b"\n")
        try:
            if lost:
                self._append()
            self._sync()
        except OSError as error:
            if self._unwritten:
                why = f"cannot be written at the end either ({error.strerror or error})"
                self._say(f"{self.path}: {why}, and the {lost} readings in memory are lost; make room before the next run")

    def _sync(self) -> None:
        file = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)

    def _append(self) -> None:
        """Writes all that waits, or leaves the file as it was: half a line would spoil the line after it."""
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            end = os.fstat(file).st_size
            written = os.write(file, self._unwritten)
            if written < len(self._unwritten):
                os.ftruncate(file, end)
                raise OSError(f"only {written} of {len(self._unwritten)} bytes fitted")
        finally:
            os.close(file)
        self._unwritten = b""

    def _reopen(self) -> None:
        """Cuts off a torn last line and learns the last step of each source."""
        if not self.path.exists():
            return
        old = self.path.read_bytes()
        whole = old.rfind(b"\n") + 1
        if whole < len(old):
            os.truncate(self.path, whole)
        for reading in _readable(old[:whole]):
            source = (reading.stage, reading.split)
            self._last_step[source] = max(reading.step, self._last_step.get(source, -1))

    def _complain(self, error: OSError) -> None:
        if not self._said:
            self._said = True
            why = error.strerror or error
            self._say(f"{self.path}: cannot be written ({why}); training goes on, readings wait in memory for room")


def _readable(text: bytes) -> Iterator[Reading]:
    for line in text.splitlines():
        try:
            yield from_line(line)[0]
        except ValueError:  # a foreign line keeps its place in the file, but says nothing about steps
            continue


# ---------------------------------------------------------------------------------------------- the console


class Console:
    """One aligned line per reading, the same words in the same order, so that `grep` and `awk` work on a log:

        tapt      step   400/1000  loss 2.314  accuracy 0.487  112k tok/s  peak 18.2 GB  eta 4m10s
        tapt      valid  400/1000  loss 2.291  accuracy 0.492

    `tok/s` is measured since the last line of the stage; a value called `x_gb` reads `x ... GB`, `x_seconds` a
    duration, `x_share` a percentage; a name with a slash is a detail that is not shown, nor is the split "system". Plain
    text unless `stream` is a terminal (NO_COLOR is honoured); `quiet` shows nothing.
    """

    def __init__(self, stream: TextIO | None = None, quiet: bool = False) -> None:
        self._stream = stream if stream is not None else sys.stdout
        self._quiet = quiet
        self._bold = _is_terminal(self._stream) and "NO_COLOR" not in os.environ
        self._last: dict[str, Reading] = {}

    def __call__(self, reading: Reading) -> None:
        if self._quiet or reading.split == "system":
            return
        line = describe(reading, self._last.get(reading.stage))
        if reading.split == "train":
            self._last[reading.stage] = reading
        if self._bold:
            line = line.replace(reading.stage, f"\033[1m{reading.stage}\033[0m", 1)
        try:
            print(line, file=self._stream, flush=True)
        except (OSError, ValueError):  # the terminal is gone (closed pipe, ended ssh); the training is not
            self._quiet = True


def describe(reading: Reading, before: Reading | None = None) -> str:
    """The console's line of a reading; `before` is the stage's last training reading, for the present speed."""
    word = "step" if reading.split == "train" else reading.split
    total = str(reading.total_steps)
    parts = [f"{reading.stage:<8}  {word:<5}  {reading.step:>{len(total)}}/{total}"]
    parts += [spoken(name, value) for name, value in reading.values.items() if "/" not in name]
    if reading.split == "train":
        speed = "tokens_per_second" not in reading.values and _tokens_per_second(reading, before)
        if speed:
            parts.append(spoken("tokens_per_second", speed))
        if reading.step > 0:
            parts.append(f"eta {duration(reading.seconds / reading.step * (reading.total_steps - reading.step))}")
    return "  ".join(parts)


def _tokens_per_second(reading: Reading, before: Reading | None) -> float:
    tokens = reading.tokens - (before.tokens if before else 0)
    seconds = reading.seconds - (before.seconds if before else 0.0)
    return tokens / seconds if tokens > 0 and seconds > 0 else 0.0


def spoken(name: str, value: float) -> str:
    """A value with its name and unit as a person would say it: `loss 2.314`, `112k tok/s`, `peak 18.2 GB`."""
    if name == "tokens_per_second":
        return f"{amount(value)} tok/s"
    if name.endswith("_gb"):
        return f"{name.removesuffix('_gb')} {value:.1f} GB"
    if name.endswith("_seconds"):
        return f"{name.removesuffix('_seconds')} {duration(value)}"
    if name.endswith("_share"):
        return f"{name.removesuffix('_share')} {100 * value:.1f} %"
    return f"{name} {number(value)}"


def number(value: float) -> str:
    """Four digits or so: `2.314`, `0.487`, `3.00e-05`, `1.20e+06`; whole numbers stay whole."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e5:
        return str(int(value))
    return f"{value:.3f}" if 1e-3 <= abs(value) < 1e5 else f"{value:.2e}"


def amount(value: float) -> str:
    """A count with three digits and k, M or G: `950`, `1.2k`, `112k`, `3.4M`."""
    if not math.isfinite(value):
        return str(value)
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.0f}{unit}" if abs(value) >= 9.95 * size else f"{value / size:.1f}{unit}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """Time with its two largest units: `8s`, `4m10s`, `2h05m`, `3d04h`."""
    if not math.isfinite(seconds):
        return "?"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02}h"


def _is_terminal(stream: Any) -> bool:
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):
        return False
