"""The driver's desk without Ray: how trials end, what is stopped, what a second start finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_run

from dstrain.agenda import Agenda
from dstrain.desk import DIED, Board, Desk
from dstrain.readings import JsonLines, Reading
from dstrain.schema import dump_yaml
from dstrain.search import Candidate, plan_search
from dstrain.settings import read_document


def opened(corpus: Path, folder: Path, **search: Any) -> Desk:
    tree = {
        "base": tiny_run(corpus, folder / "runs", stages__pretrain=None),
        "space": {"stages.finetune.optim.lr": [1e-3, 2e-3, 3e-3, 4e-3, 5e-3]},
        "search": {"metric": "finetune/valid/f1_macro", **search},
    }
    (folder / "search.yaml").write_text(dump_yaml(tree))
    return Desk(plan_search(read_document(folder / "search.yaml")))


@pytest.fixture
def desk(small_corpus: Path, tmp_path: Path) -> Desk:
    return opened(small_corpus, tmp_path)


def write_failure(folder: Path, reason: str) -> None:
    """As a trial leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "failure.txt").write_text(f"{reason}\n\nTraceback ...")


def first(desk: Desk) -> Any:
    return desk.search.candidates[0]


def test_a_trial_ends_as_finished_stopped_or_failed(desk: Desk) -> None:
    with desk:
        names = [candidate.id for candidate in desk.search.candidates]
        for name in names:
            desk.started(name)
        decisions = [
            desk.reported(name, 0.5, value) for name, value in zip(names, (0.9, 0.8, 0.7, 0.1, 0.6), strict=True)
        ]
        assert decisions == [True, True, False, False, False]
        folder = desk.candidate(names[0]).folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "outcome.json").write_text("{}")
        (folder / "tags.json").write_text('{"device": "cpu"}')
        desk.ended(names[0], None)
        write_failure(desk.candidate(names[1]).folder, "ValueError: the disk is full")
        desk.ended(names[1], "died")
        desk.ended(names[2], None)
    ends = [desk.candidate(name).ended() for name in names]
    assert [end.state if end else None for end in ends] == ["finished", "failed", "stopped", None, None]
    assert ends[1] and ends[1].reason == "ValueError: the disk is full"
    assert ends[2] and ends[2].reason.startswith("stopped at rung 0.25: 0.7 below the best two of 3")


def test_a_trial_without_a_word_is_failed_and_an_interrupted_one_has_not_ended(desk: Desk) -> None:
    with desk:
        one, two = (candidate.id for candidate in desk.search.candidates[:2])
        desk.started(one)
        desk.started(two)
        desk.ended(one, "its processes died")
        desk.close()
        desk.ended(two, None)
    assert desk.candidate(one).ended() and not desk.candidate(two).ended()
    assert {candidate.id for candidate in desk.search.pending()} == {
        candidate.id for candidate in desk.search.candidates
    }


def test_a_new_attempt_forgets_the_old_failure(desk: Desk) -> None:
    with desk:
        folder = first(desk).folder
        write_failure(folder, "ValueError: old")
        desk.started(first(desk).id)
        assert not (folder / "failure.txt").exists()


def test_a_search_that_goes_on_keeps_its_rungs(desk: Desk) -> None:
    for number, candidate in enumerate(desk.search.candidates[:3]):
        report = JsonLines(candidate.folder)
        report(Reading("finetune", "valid", 4, 8, 100, 1.0, {"f1_macro": 0.9 - 0.1 * number}))
    again = Desk(desk.search)
    assert again.rungs.state()[0]["values"] == pytest.approx(
        {candidate.id: 0.9 - 0.1 * number for number, candidate in enumerate(desk.search.candidates[:3])}
    )
    assert not again.reported(desk.search.candidates[3].id, 0.5, 0.1)


def test_a_death_is_kept_with_its_reason_and_shown(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    with desk:
        name = first(desk).id
        desk.started(name)
        desk.died(name)  # before it had so much as a folder
        desk.started(name)
        write_failure(first(desk).folder, "its node was lost")
        desk.died(name)
    assert first(desk).faults() == [DIED, "its node was lost"]
    assert f"{name} starts again from its checkpoint: its node was lost" in capsys.readouterr().out
    first(desk).end("finished", "finished")
    assert desk.search.row(first(desk)).reason == "finished (after 2 restarts)"


def told_by(desk: Desk) -> Agenda:
    agenda = Agenda(desk.search, desk.rungs, lambda: 9, desk.dismissed, desk.search.pending())
    desk.agenda = agenda
    return agenda


def begin(desk: Desk, agenda: Agenda) -> Candidate:
    candidate = agenda.next()
    assert candidate is not None
    desk.started(candidate.id)
    return candidate


def test_a_trial_that_waits_on_its_rung_has_not_ended(small_corpus: Path, tmp_path: Path) -> None:
    desk = opened(small_corpus, tmp_path, scheduler={"kind": "asha", "on_rung": "pause", "eta": 2, "rungs": [0.5]})
    with desk:
        agenda = told_by(desk)
        trials = [begin(desk, agenda) for _ in range(5)]
        for number, candidate in enumerate(trials):
            assert not desk.reported(candidate.id, 0.5, number / 10)
            desk.ended(candidate.id, None)
            assert candidate.ended() is None
        assert [begin(desk, agenda).id for _ in range(2)] == [trials[4].id, trials[3].id]
        for candidate in trials[3:]:
            assert desk.reported(candidate.id, 0.75, 0.9)
            (candidate.folder / "outcome.json").parent.mkdir(parents=True, exist_ok=True)
            (candidate.folder / "outcome.json").write_text("{}")
            desk.ended(candidate.id, None)
        assert agenda.next() is None and agenda.is_over()
    assert [candidate.state for candidate in trials] == ["stopped"] * 3 + ["finished"] * 2
    ended = trials[0].ended()
    assert ended and ended.reason == "stopped at rung 0.50: rank 5 of 5, one in 2 goes on"


def test_a_figure_that_is_no_number_ends_a_trial_that_would_wait(small_corpus: Path, tmp_path: Path) -> None:
    desk = opened(small_corpus, tmp_path, scheduler={"kind": "asha", "on_rung": "pause", "rungs": [0.5]})
    with desk:
        agenda = told_by(desk)
        candidate = begin(desk, agenda)
        assert not desk.reported(candidate.id, 0.5, float("nan"))
        desk.ended(candidate.id, None)
    ended = candidate.ended()
    assert ended and (ended.state, ended.reason) == ("stopped", "stopped at 0.50 of the stage: the metric is nan")


def test_who_is_stopped_by_a_scheduler_of_rays_is_told_so(small_corpus: Path, tmp_path: Path) -> None:
    desk = opened(small_corpus, tmp_path, scheduler={"kind": "hyperband"})
    with desk:
        desk.started(first(desk).id)
        assert desk.reported(first(desk).id, 0.5, 0.1)
        desk.ended(first(desk).id, None)
    ended = first(desk).ended()
    assert ended and ended.reason == "stopped by hyperband at 0.50 of the stage"


def test_finalists_are_never_stopped_early(small_corpus: Path, tmp_path: Path) -> None:
    desk = opened(small_corpus, tmp_path, finalists={"top": 1, "seeds": 2})
    for number, candidate in enumerate(desk.search.candidates):
        JsonLines(candidate.folder)(Reading("finetune", "valid", 8, 8, 100, 1.0, {"f1_macro": number / 10}))
        candidate.end("finished", "finished")
    with desk:
        agenda = told_by(desk)
        final = begin(desk, agenda)
        assert agenda.finalists and final.settings.seed == 1
        assert desk.reported(final.id, 0.5, -1.0)
        assert desk.candidate(final.id) == final


def test_the_board_prints_a_line_per_ended_trial(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    board = Board(desk.search)
    board.started(first(desk))
    board.reported(first(desk), 0.5, 0.3)
    board.ended(first(desk), first(desk).end("finished", "finished"))
    board.ended(desk.search.candidates[1], desk.search.candidates[1].end("finished", "finished"))
    heading, one, _ = capsys.readouterr().out.splitlines()
    assert heading == f"trial  what it changes  {desk.search.settings.metric}  time  tok/s  GB  why it ended"
    assert one.startswith(f"{first(desk).id}  lr=0.001  ")


def test_a_trial_lost_before_it_began_is_put_back_only_where_the_agenda_rules(desk: Desk) -> None:
    with desk:
        name = first(desk).id
        assert not desk.lost(name)
        agenda = told_by(desk)
        assert agenda.next() is first(desk) and desk.lost(name) and agenda.next() is first(desk)
