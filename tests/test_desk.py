"""The driver's desk without Ray: how trials end, what is stopped, what a second start finds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_run

from dstrain.agenda import Agenda
from dstrain.desk import DIED, Board, Desk, catch_up
from dstrain.ledger import WANTED_FILE, Wanted, read_record, write_record
from dstrain.readings import JsonLines, Reading
from dstrain.run import write_whole
from dstrain.schema import dump_yaml
from dstrain.search import Candidate, plan_search
from dstrain.settings import read_document
from dstrain.tracking import SENT_FILE, sent_of


def opened(corpus: Path, folder: Path, tracked: bool = False, **search: Any) -> Desk:
    tree = {
        "base": tiny_run(corpus, folder / "runs", stages__pretrain=None, tracking__enabled=tracked),
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


@pytest.mark.parametrize("left", ["outcome.json", "failure.txt"])
def test_what_another_node_left_is_seen_though_its_name_was_absent_a_moment_ago(
    desk: Desk, left: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An NFS client answers from memory when it is asked for a name; not when the folder is listed."""
    there, absent = Path.exists, ("outcome.json", "failure.txt", "faults.jsonl")
    monkeypatch.setattr(Path, "exists", lambda path: path.name not in absent and there(path))
    with desk:
        name, folder = first(desk).id, first(desk).folder
        desk.started(name)
        assert desk.reported(name, 0.5, 0.1)
        write_failure(folder, "Diverged: loss is not a number")
        (folder / "failure.txt").rename(folder / left)
        first(desk).fault("its node was lost")
        desk.ended(name, None)
    assert first(desk).state == {"outcome.json": "finished", "failure.txt": "failed"}[left]
    assert first(desk).faults() == ["its node was lost"]


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


def test_a_trial_lost_before_it_began_is_started_again(desk: Desk) -> None:
    """By the agenda, or by the driver after the others where one of Ray's schedulers rules."""
    with desk:
        desk.lost(first(desk).id)
        assert desk.left_over == [first(desk)]
        agenda = told_by(desk)
        assert agenda.next() is first(desk)
        desk.lost(first(desk).id)
        assert agenda.next() is first(desk)


# ------------------------------------------------------------------------------------------------ MLflow


def report(candidate: Candidate, step: int) -> None:
    JsonLines(candidate.folder)(Reading("finetune", "valid", step, 8, 100, 1.0, {"f1_macro": step / 10}))


def played(desk: Desk) -> None:
    """Of five trials two finish, one is stopped, one fails, and one is interrupted."""
    with desk:
        for candidate in desk.search.candidates:
            desk.started(candidate.id)
            report(candidate, 4)
        one, two, three, four, _ = desk.search.candidates
        for candidate in (one, two):
            write_whole(candidate.folder / "outcome.json", "{}")
        desk.stopped[three.id] = "behind"
        write_failure(four.folder, "out of memory")
        for candidate in (one, two, three, four):
            desk.ended(candidate.id, None)
        desk.close()


def stored(desk: Desk) -> dict[str, tuple[str, list[int]]]:
    """Status and steps of every run in the store, by name."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{desk.search.base.output_dir / 'mlflow.db'}")
    runs = client.search_runs(["1"])
    metric = "finetune/valid/f1_macro"
    return {
        run.info.run_name: (run.info.status, [row.step for row in client.get_metric_history(run.info.run_id, metric)])
        for run in runs
    }


def test_mlflow_gets_what_an_earlier_start_could_not_send(small_corpus: Path, tmp_path: Path) -> None:
    """The driver was killed, or MLflow too slow: the next start sends it, how a trial ended included."""
    desk = opened(small_corpus, tmp_path, tracked=True)
    played(desk)
    one, two, three, four, five = desk.search.candidates
    statuses = dict(zip((one.id, two.id, three.id, four.id, five.id), ("FINISHED",) * 3 + ("FAILED", "KILLED"), strict=True))
    assert stored(desk) == {"tiny": ("KILLED", [])} | {name: (status, [4]) for name, status in statuses.items()}
    assert [candidate.ended() is not None for candidate in desk.search.candidates] == [True] * 4 + [False]

    for candidate in (one, three, four, five):
        report(candidate, 8)  # which nobody sends
    ended = read_record(one.folder / WANTED_FILE, Wanted)
    (three.folder / SENT_FILE).unlink()
    before = read_record(two.folder / WANTED_FILE, Wanted)
    assert ended and before
    write_record(two.folder / WANTED_FILE, dataclasses.replace(before, revision=99, status="RUNNING", ended=None))
    desk = Desk(plan_search(desk.search.document))
    with desk:
        desk.close()
    found = stored(desk)
    both = {one.id, three.id, four.id, five.id}
    assert found == {"tiny": ("KILLED", [])} | {
        name: (status, [4, 8] if name in both else [4]) for name, status in statuses.items()
    }
    after = read_record(one.folder / WANTED_FILE, Wanted)
    assert after and (after.ended, after.params, after.artifacts) == (ended.ended, ended.params, ended.artifacts)


def test_a_search_that_is_over_sends_what_is_left_and_then_nothing(small_corpus: Path, tmp_path: Path) -> None:
    desk = opened(small_corpus, tmp_path, tracked=True)
    played(desk)
    for candidate in desk.search.candidates[3:]:
        candidate.end("finished", "finished")
    assert desk.search.is_over()
    report(first(desk), 8)
    catch_up(desk.search)
    found = stored(desk)
    assert found["tiny"] == ("FINISHED", []) and found[first(desk).id] == ("FINISHED", [4, 8])
    revision = sent_of(desk.search.folder).revision
    catch_up(desk.search)
    assert sent_of(desk.search.folder).revision == revision and not Desk(desk.search).owes()
