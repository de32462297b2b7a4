"""Broken files through the doors: a random sample in every test run, and proof that the fuzzer sees what it looks for."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from benchmarks.forker import Forker
from benchmarks.fuzz import Finding, Starts, Tally, check, fuzz, grounds, is_started, table
from benchmarks.fuzz_cases import CASES, DATA_CSV, RUN_FILE, Case, _dumped, plans, small_run, small_search
from dstrain import train
from dstrain.schema import UserError

SAMPLE = settings(max_examples=20, database=None, print_blob=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module", autouse=True)
def _grounds() -> Iterator[None]:
    with grounds():
        yield


@pytest.mark.parametrize("kind", list(CASES))
def test_a_random_sample_is_accepted_or_refused_in_sentences(kind: str) -> None:
    @SAMPLE
    @given(CASES[kind]())
    def sample(case: Case) -> None:
        check(case)

    sample()


def case_of(content: bytes | None = None, door: str = "train", **base: Any) -> Case:
    run = _dumped({"base": small_run(**base)}) if content is None else content
    return Case("settings", door, (), {RUN_FILE: run, "data.csv": DATA_CSV}, 1)


def test_what_is_valid_is_accepted() -> None:
    assert check(case_of()) == "accepted"
    assert check(case_of(_dumped(small_search()), door="tune")) == "accepted"
    assert check(case_of(name="a/b")) == "refused"


def complaining(sentence: str) -> Any:
    def door(argv: object) -> int:
        print(sentence, file=sys.stderr)
        return 2

    return door


def leaving_something(argv: object) -> int:
    Path("runs").mkdir()
    return 0


def raising(argv: object) -> int:
    raise KeyError("lr")


def tracing(argv: object) -> int:
    print("Traceback (most recent call last):", file=sys.stderr)
    return 2


@pytest.mark.parametrize(
    ("door", "signature"),
    [
        (raising, "KeyError at an unknown place"),
        (lambda argv: 1, "status 1"),
        (lambda argv: 2, "refused without a word"),
        (tracing, "a traceback is printed"),
        (leaving_something, "a dry run leaves"),
        (complaining("something is wrong"), "names neither a file nor an address"),
        (complaining("run.yaml: " + "x" * 2000), "nobody reads to its end"),
        (complaining("run.yaml: \x1b[31mred"), "control characters"),
        (complaining("run.yaml: one\n" * 9), "more lines than mistakes"),
        (lambda argv: complaining(f"run.yaml: {argv}")(argv), "the dry run and the start give different answers"),
    ],
)
def test_what_nobody_should_get_is_found(monkeypatch: pytest.MonkeyPatch, door: Any, signature: str) -> None:
    monkeypatch.setattr(train, "main", door)
    with pytest.raises(Finding) as found:
        check(case_of())
    assert signature in found.value.signature


def test_a_door_that_does_not_answer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def waiting(argv: object) -> int:
        while True:
            pass

    monkeypatch.setattr(train, "main", waiting)
    monkeypatch.setattr("benchmarks.fuzz.PATIENCE_SECONDS", 1)
    with pytest.raises(Finding, match="no answer within 1 s"):
        check(case_of())


def test_a_defect_is_made_small_and_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A door that breaks at one word in the file: the finding is that word in the smallest file there is."""

    def door(argv: object) -> int:
        text = Path(RUN_FILE).read_bytes()
        if b"favor" in text:
            raise ZeroDivisionError
        return 0

    monkeypatch.setattr("dstrain.train.main", door)
    monkeypatch.setattr("dstrain.tune.__main__.main", door)
    tally, said = Tally(), list[str]()
    fuzz("settings", 60, 1, tally, said.append)
    assert len(tally.findings) == len(said) == 1 and "ZeroDivisionError" in said[0]
    assert sum(tally.outcomes.values()) >= 60 and tally.outcomes["settings", "finding"] > 1
    [finding] = tally.findings.values()
    assert finding.case.mistakes == 0, "no mistake is needed for it"


@pytest.mark.parametrize("text", ["\x1b[2J", "a\x00b", "\udc96", "tab\there", "\u2028"])
def test_what_a_file_holds_cannot_write_on_the_terminal(text: str) -> None:
    assert str(UserError(f"{text}: wrong\nsecond line")).replace("\n", "").isprintable()
    assert str(UserError("é 日本 'quoted'\nsecond")) == "é 日本 'quoted'\nsecond"


# ---------------------------------------------------------------------------------------------------- real starts


class Acting:
    """In place of the process that forks real starts: one that ends at once, as it is told."""

    def __init__(self, status: int, said: str, steps: int = 1) -> None:
        self._status, self._said, self._steps = status, said, steps

    def start(self, program: list[str], folder: Path, environ: dict[str, str], log: Path) -> Acting:
        """Leaves what a start would leave."""
        assert program[-2:] == ["output_dir=runs", "tracking.enabled=false"]
        log.write_text(self._said)
        notes = Path(environ["DSTRAIN_FAULT_OUT"])
        (notes / "events.rank0.json").write_text(json.dumps({"begun": [1.0] * self._steps}))
        return self

    def poll(self) -> int:
        """It has ended."""
        return self._status


@pytest.mark.parametrize(
    ("acting", "outcome"),
    [
        (Acting(75, "pretrain step 1/3\n"), "ran"),
        (Acting(0, ""), "ran"),
        (Acting(2, "plan.json: offload: no such device; leave it out\n"), "answered"),
        (Acting(1, "step 1\npretrain: loss is not a number at step 1: lower stages.pretrain.optim.lr\n"), "answered"),
        (Acting(0, "", steps=0), None),
        (Acting(1, "Traceback (most recent call last):\nKeyError: 'lr'\n"), None),
        (Acting(-11, ""), None),
    ],
)
def test_what_is_accepted_is_started_too(acting: Any, outcome: str | None) -> None:
    case = replace(case_of(), kind="deepspeed")
    if outcome is None:
        with pytest.raises(Finding):
            check(case, Starts(acting))
    else:
        assert check(case, Starts(acting)) == outcome


def test_of_other_kinds_few_are_started_and_no_large_ones() -> None:
    cases = [case_of(name=f"run{number}") for number in range(300)]
    assert 15 <= sum(is_started(case, "pretrain  1,234 parameters") for case in cases) <= 50
    assert not any(is_started(replace(case, kind="deepspeed"), "110,000,000 parameters") for case in cases)
    tally = Tally(Counter({("data", "accepted"): 3, ("data", "ran"): 2, ("data", "refused"): 5}))
    assert table(tally, ["data"]).split()[-7:] == ["data", "5", "2", "2", "0", "5", "0"]


@pytest.mark.slow
def test_every_deepspeed_file_takes_a_step(forker: Forker) -> None:
    """The shipped ones and Hugging Face's without its optimizer, through the real door, each up to its first step."""
    for plan in plans():
        plan = {key: value for key, value in plan.items() if key not in ("optimizer", "scheduler")}
        case = case_of()
        files = {**case.files, "plan.json": json.dumps(plan).encode()}
        words = ("--deepspeed_config", "plan.json")
        assert check(replace(case, kind="deepspeed", files=files, words=words), Starts(forker)) in ("ran", "refused")
