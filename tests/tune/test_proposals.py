"""What a learning sampler is told, and when."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
from searches import search_file

from dstrain.readings import JsonLines, Reading
from dstrain.search import Candidate, Search, plan_search
from dstrain.settings import read_document
from dstrain.tune import proposals

LR = "stages.finetune.optim.lr"


class Listening(proposals.OptunaSearch):  # type: ignore[misc]
    """Ray's Optuna search, which keeps what it was told: the values of trials of an earlier start, and of its own."""

    earlier: ClassVar[dict[float, float]] = {}
    own: ClassVar[list[float | None]] = []

    def add_evaluated_point(self, parameters: dict[str, Any], value: float, **more: Any) -> None:
        self.earlier[parameters[LR]] = value
        super().add_evaluated_point(parameters, value, **more)

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        self.own.append(result and result["value"])
        super().on_trial_complete(trial_id, result, error)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> type[Listening]:
    monkeypatch.setattr(proposals, "OptunaSearch", Listening)
    monkeypatch.setattr(Listening, "earlier", {})
    monkeypatch.setattr(Listening, "own", [])
    return Listening


def report(candidate: Candidate, step: int, value: float) -> None:
    JsonLines(candidate.folder)(Reading("finetune", "valid", step, 8, 100 * step, step, {"f1_macro": value}))


def planned(corpus: Path, folder: Path) -> Search:
    file = search_file(corpus, folder, {LR: {"log_uniform": [1e-4, 1e-2]}})
    search = plan_search(read_document(file, ["search.sampler=tpe", "search.trials=9", "tracking.enabled=false"]))
    search.claim()
    return search


def test_a_trial_is_told_once_with_its_last_value_whatever_start_it_ends_in(
    small_corpus: Path, tmp_path: Path, told: type[Listening]
) -> None:
    """Of an earlier start one has ended, one is under way, one waits without a word, and one failed and is tried again."""
    search = planned(small_corpus, tmp_path)
    for number in range(4):
        assert search.adopt({LR: (1 + number) / 1000})
    ended, under_way, _, failed = search.candidates
    for candidate in (ended, under_way, failed):
        report(candidate, 4, 0.25)
    ended.end("stopped", "behind")
    failed.end("failed", "out of memory")

    search = planned(small_corpus, tmp_path)
    propose = proposals.learn(search)
    new = propose()
    assert new is not None and told.earlier == {0.001: 0.25} and told.own == []
    for candidate in (under_way, failed, new):
        report(candidate, 8, 0.5)
        candidate.end("finished", "finished")
    assert propose() is not None and propose() is not None
    assert told.earlier == {0.001: 0.25, 0.002: 0.5, 0.004: 0.5} and told.own == [0.5]
