"""Every mistake is answered by a sentence: files broken at random, through the doors `train.py` and `dstrain.tune`.

    python -m benchmarks.fuzz --cases 2000 [--seed S] [--kind settings|deepspeed|data]

A case must either be accepted (`--dry-run`, status 0) or end with status 2 and at most a few lines that each name an address
or a file; then the real start must refuse it alike. Nothing may be left in the folder. What `train.py` accepts is also started
for real (every DeepSpeed JSON, one in ten of the others): it takes an optimizer step, is asked to stop, and saves; or it
answers in a sentence after all. Everything else is a finding, which hypothesis makes as small as it can. Exit status: 0 no
finding, 1 some.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import re
import signal
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.faults import SAVED, VICTIM
from benchmarks.forker import Forked, Forker, surroundings

if TYPE_CHECKING:
    from benchmarks.fuzz_cases import Case

PATIENCE_SECONDS = 20
"""Of the process's own CPU time, which neighbours on the machine do not use up; of waiting, fifteen times as much."""
START_SECONDS = 120
"""Of waiting for a real start, which takes two."""
LARGEST_MODEL = 20_000_000
"""Parameters of a model that is started for real."""
SHRINKING_SECONDS = 60
LINES_PER_MISTAKE = 6
LONGEST_LINE = 1200
NAMED = re.compile(r"^[^\n]*?(?:[\w.<>/-]+|'[^']*')\s?[^\n]*?: ")
"""What a line begins with: a file, an address, a corpus or the word that was typed."""


@dataclass(frozen=True)
class Answer:
    """What a door did."""

    status: int | None
    """None when it did not come back by itself."""
    out: str
    err: str
    broken: str = ""
    """An exception that got out, with the place in dstrain where it began."""
    seconds: float = 0.0


class Finding(AssertionError):
    """An answer that a person should not get. `signature` is equal for what is likely the same defect."""

    def __init__(self, case: Case, signature: str, answer: Answer) -> None:
        self.case, self.signature, self.answer = case, signature, answer
        super().__init__(describe(case, signature, answer))


class _Patience(BaseException):
    """It takes too long."""


def check(case: Case, starts: Starts | None = None) -> str:
    """Tries a case in a folder of its own; the word for its outcome. Raises Finding.

    With `starts` some of what is accepted is started for real, in the same folder.
    """
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        for file, content in case.files.items():
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_bytes(content)
        before = _listing(folder)
        dry = ask(case, folder, "--dry-run")
        _judge(case, dry)
        if _listing(folder) != before:
            raise Finding(case, f"a dry run leaves {sorted(_listing(folder) - before)[:3]}", dry)
        if dry.status == 0:
            return starts.outcome(case, folder) if starts and is_started(case, dry.out) else "accepted"
        started = ask(case, folder)
        _judge(case, started)
        if _listing(folder) != before:
            raise Finding(case, f"a refused start leaves {sorted(_listing(folder) - before)[:3]}", started)
        if (started.status, started.err) != (dry.status, dry.err):
            raise Finding(case, "the dry run and the start give different answers", started)
        return "refused"


def is_started(case: Case, said: str) -> bool:
    """Whether a case that a dry run accepted with these words is also started for real."""
    sizes = [int(number.replace(",", "")) for number in re.findall(r"([\d,]+) parameters", said)]
    chosen = case.kind == "deepspeed" or zlib.crc32(repr(sorted(case.files.items())).encode()) % 10 == 0
    return chosen and case.door == "train" and max(sizes, default=0) <= LARGEST_MODEL


class Starts:
    """Real starts of `train.py`, forked from a process that has imported everything; each is asked to stop in its first step."""

    def __init__(self, forker: Forker) -> None:
        self._forker = forker

    def outcome(self, case: Case, folder: Path) -> str:
        """`ran` (a step, and saved) or `answered` (ended in a sentence). Raises Finding."""
        answer, steps = self._start(case, folder)
        if answer.broken:
            raise Finding(case, answer.broken, answer)
        if answer.status in (0, SAVED):
            if not steps:
                raise Finding(case, "a start that ends well has taken no step", answer)
            return "ran"
        *_, last = ["", *filter(None, answer.err.split("\n"))]
        if answer.status not in (1, 2) or "Traceback" in answer.err or not NAMED.match(last):
            end = re.sub(r"\d+", "N", last)[:80]
            raise Finding(case, f"what a dry run accepts breaks off with status {answer.status}: {end}", answer)
        return "answered"

    def _start(self, case: Case, folder: Path) -> tuple[Answer, int]:
        """(what it came to, how many optimizer steps were begun)."""
        # Whatever the file says, nothing is written elsewhere, and no server is waited for.
        words = ["run.yaml", *case.words, "output_dir=runs", "tracking.enabled=false"]
        plan = {"moment": "step", "event": 1, "kind": "sigterm"}
        with tempfile.TemporaryDirectory(prefix="fuzz-start-") as name:
            log, began = Path(name) / "log.txt", time.monotonic()
            environ = {**surroundings(), "DSTRAIN_FAULT": json.dumps(plan), "DSTRAIN_FAULT_OUT": name}
            status, broken = self._end_of(self._forker.start([VICTIM, *words], folder, environ, log), began)
            events = Path(name) / "events.rank0.json"
            steps = len(json.loads(events.read_text())["begun"]) if events.exists() else 0
            said = log.read_text(errors="replace")
        return Answer(status, said, said[-4000:], broken, time.monotonic() - began), steps

    def _end_of(self, process: Forked, began: float) -> tuple[int, str]:
        """The exit status of a start, and what is wrong when it had to be killed."""
        broken = ""
        while (status := process.poll()) is None:
            time.sleep(0.02)
            if time.monotonic() - began > START_SECONDS and not broken:
                broken = f"a start has not ended within {START_SECONDS} s"
                process.send_signal(signal.SIGKILL)
        return status, broken


def _listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def _judge(case: Case, answer: Answer) -> None:
    said = answer.err.strip("\n").split("\n")
    if answer.broken:
        raise Finding(case, answer.broken, answer)
    if answer.status not in (0, 2):
        raise Finding(case, f"status {answer.status}", answer)
    if "Traceback" in answer.out + answer.err:
        raise Finding(case, "a traceback is printed", answer)
    if answer.status == 2:
        if not said[0]:
            raise Finding(case, "refused without a word", answer)
        if len(said) > LINES_PER_MISTAKE * max(1, case.mistakes):
            raise Finding(case, "more lines than mistakes", answer)
        for line in said:
            if len(line) > LONGEST_LINE:
                raise Finding(case, "a line that nobody reads to its end", answer)
            if not line.isprintable():
                raise Finding(case, "control characters reach the terminal", answer)
            if not NAMED.match(line):
                raise Finding(case, "a line that names neither a file nor an address", answer)


def ask(case: Case, folder: Path, *flags: str) -> Answer:
    """Calls a door in this process, standing in the folder."""
    from dstrain import train
    from dstrain.tune import __main__ as tune

    main = {"train": train.main, "tune": tune.main}[case.door]
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # as strict as a terminal's
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")
    status, broken, began = None, "", time.perf_counter()
    with _own_surroundings(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(["run.yaml", *case.words, *flags])
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        except _Patience:
            broken = f"no answer within {PATIENCE_SECONDS} s at {_place(sys.exc_info()[2])}"
        except BaseException as error:
            broken = f"{type(error).__name__} at {_place(error.__traceback__)}"
            err.write(f"{type(error).__name__}: {str(error)[:300]}\n")
    told, complained = (_text(stream) for stream in (out, err))
    return Answer(status, told, complained, broken, time.perf_counter() - began)


def _text(stream: io.TextIOWrapper) -> str:
    stream.flush()
    stream.seek(0)
    return stream.read()


def _place(trace: Any) -> str:
    """The innermost line of dstrain."""
    frames = [frame for frame in traceback.extract_tb(trace) if "/dstrain/" in frame.filename]
    if not frames:
        return "an unknown place"
    last = frames[-1]
    return f"{Path(last.filename).parent.name}/{Path(last.filename).name}:{last.name}"


@contextlib.contextmanager
def _own_surroundings(folder: Path) -> Iterator[None]:
    """The folder as working directory, the environment and the signals put back afterwards, and an alarm."""
    here, environ, hook = Path.cwd(), dict(os.environ), sys.excepthook
    alarms = (signal.SIGALRM, signal.SIGPROF)
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, *alarms)
    handlers = [signal.getsignal(number) for number in numbers]

    def too_long(number: int, frame: object) -> None:
        raise _Patience

    for number in alarms:
        signal.signal(number, too_long)
    signal.setitimer(signal.ITIMER_PROF, PATIENCE_SECONDS)
    signal.alarm(15 * PATIENCE_SECONDS)
    os.chdir(folder)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        os.chdir(here)
        sys.excepthook = hook  # torch wraps it whenever ranks meet
        os.environ.clear()
        os.environ.update(environ)
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)


def describe(case: Case, signature: str, answer: Answer) -> str:
    """A finding for a reader: what is wrong, what was typed, what the files hold, what was answered."""
    doors = {"train": "python dstrain/train.py", "tune": "python -m dstrain.tune"}
    shown = "\n".join(
        f"--- {name}\n{content[:1500].decode('utf-8', 'backslashreplace')}"
        for name, content in case.files.items()
        if not (name == "data.csv" and case.kind != "data")
    )
    words = " ".join(["run.yaml", *case.words])
    return f"{signature}\n$ {doors[case.door]} {words}\n{shown}\n--- answer, status {answer.status}\n{answer.err[:1500]}"


# --------------------------------------------------------------------------------------------------- many cases


@dataclass
class Tally:
    """What came of the cases so far."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    findings: dict[str, Finding] = field(default_factory=dict)
    """The smallest of each signature."""
    seconds: float = 0.0


def fuzz(
    kind: str, cases: int, seed: int, tally: Tally, say: Callable[[str], None] = print, starts: Starts | None = None
) -> None:
    """Tries so many cases of a kind. A defect is made small and said once; met again it is only counted."""
    began, tried, rounds = time.perf_counter(), 0, 0
    while tried < cases:
        tried += _round(kind, cases - tried, seed * 1000 + rounds, tally, say, starts)
        rounds += 1
    tally.seconds += time.perf_counter() - began


def _round(
    kind: str, cases: int, seed: int, tally: Tally, say: Callable[[str], None], starts: Starts | None
) -> int:
    """Cases up to the first new defect, or all; returns how many that were, those left out that made it small."""
    import hypothesis
    from hypothesis import HealthCheck, Phase, given
    from hypothesis import settings as how

    from benchmarks.fuzz_cases import CASES

    known, found, tried = set(tally.findings), dict[str, Finding](), 0
    until = math.inf

    @hypothesis.seed(seed)
    @how(
        max_examples=cases, deadline=None, database=None, phases=[Phase.generate, Phase.shrink], print_blob=False,
        suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
    )  # fmt: skip
    @given(CASES[kind]())
    def one(case: Case) -> None:
        nonlocal tried, until
        searching = not found
        tried += searching
        if time.monotonic() > until and all(case != other.case for other in found.values()):
            return
        try:
            outcome = check(case, starts)
        except Finding as finding:
            tally.outcomes[kind, "finding"] += searching
            if finding.signature not in known:
                found[finding.signature] = finding
                until = min(until, time.monotonic() + SHRINKING_SECONDS)
                raise
        else:
            tally.outcomes[kind, outcome] += searching

    # Once something was found it stands in `found`, whatever hypothesis makes of a defect that comes and goes.
    with contextlib.suppress(Finding, hypothesis.errors.Flaky):
        one()
    for met in found.values():  # on the way to the smallest another defect may have been met
        tally.findings[met.signature] = met
        say(f"\n=== {met}")
    return max(1, tried)


@contextlib.contextmanager
def grounds() -> Iterator[None]:
    """A cache of its own, and small corpora under the names that shipped files use: nothing is asked of the hub."""
    from benchmarks.fuzz_cases import DATA_CSV

    with tempfile.TemporaryDirectory(prefix="fuzz-grounds-") as name:
        for corpus in ("pydocs", "imdb", "wiki", "ag_news", "arxiv", "hyperpartisan", "yelp_polarity"):
            (Path(name) / "data" / corpus).mkdir(parents=True)
            (Path(name) / "data" / corpus / "train.csv").write_bytes(DATA_CSV)
        ours = {"DSTRAIN_CACHE": f"{name}/cache", "DSTRAIN_DATA": f"{name}/data", "HF_HUB_OFFLINE": "1"}
        before = {key: os.environ.get(key) for key in ours}
        os.environ.update(ours)
        try:
            _warm_up()
            yield
        finally:
            for key, value in before.items():
                os.environ.pop(key) if value is None else os.environ.update({key: value})


def _warm_up() -> None:
    """Imports what the doors need: an alarm in the middle of an import would leave half a library behind."""
    from importlib import import_module

    from dstrain.engine import preload

    for name in ("pyarrow.parquet", "tokenizers", "dstrain.run", "dstrain.train", "dstrain.tune.__main__"):
        import_module(name)
    preload()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    words = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=(__doc__ or "").splitlines()[0])
    words.add_argument("--cases", type=int, default=2000)
    words.add_argument("--seed", type=int, default=0)
    words.add_argument("--kind", choices=("settings", "deepspeed", "data"))
    words.add_argument("--json", type=Path, help="where the counts are kept")
    given = words.parse_args(argv)
    from benchmarks.fuzz_cases import KINDS

    _limit_memory()
    kinds = [given.kind] if given.kind else list(KINDS)
    tally = Tally()
    with grounds(), Forker() as forker:
        for place, kind in enumerate(kinds):
            cases = given.cases // len(kinds) + (place < given.cases % len(kinds))
            fuzz(kind, cases, given.seed, tally, starts=Starts(forker))
    print(f"\n{table(tally, kinds)}")
    print(f"{sum(tally.outcomes.values())} cases in {tally.seconds:.0f} s, {len(tally.findings)} defects")
    if given.json:
        import torch

        from benchmarks.measure import environment

        record = {
            "seed": given.seed,
            "counts": {f"{kind}/{what}": count for (kind, what), count in sorted(tally.outcomes.items())},
            "findings": sorted(tally.findings),
            "environment": environment(torch.device("cpu"), 1),
        }
        given.json.write_text(json.dumps(record, indent=1) + "\n")
    return int(bool(tally.findings))


def table(tally: Tally, kinds: Sequence[str]) -> str:
    """What came of the cases, by kind; of those accepted, how many were started for real and what came of that."""
    counts = tally.outcomes
    lines = [f"{'kind':<10} {'accepted':>9} {'started':>9} {'ran':>9} {'answered':>9} {'refused':>9} {'finding':>9}"]
    for kind in kinds:
        ran, answered, refused, found = (counts[kind, what] for what in ("ran", "answered", "refused", "finding"))
        accepted = counts[kind, "accepted"] + ran + answered
        shown = (accepted, ran + answered, ran, answered, refused, found)
        lines.append(f"{kind:<10} " + " ".join(f"{count:>9}" for count in shown))
    return "\n".join(lines)


def _limit_memory(gigabytes: float = 8) -> None:
    """A setting that asks for a terabyte must be a finding, not the end of the machine."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (int(gigabytes * 2**30), resource.RLIM_INFINITY))


if __name__ == "__main__":
    sys.exit(main())
