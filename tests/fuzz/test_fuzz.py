"""Broken files through the doors: a random sample in every test run, and proof that the fuzzer sees what it looks for."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from benchmarks.fuzz import Finding, Tally, check, fuzz, grounds
from benchmarks.fuzz_cases import CASES, DATA_CSV, RUN_FILE, Case, _dumped, small_run, small_search
from dstrain import train
from dstrain.schema import UserError

SAMPLE = settings(max_examples=20, deadline=None, database=None, print_blob=True, suppress_health_check=list(HealthCheck))


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
