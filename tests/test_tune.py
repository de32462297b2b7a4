"""A search as its user runs it: a real Ray cluster, real DeepSpeed trials, a real MLflow store."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ROOT, tiny_run

from dstrain.desk import Board, Desk
from dstrain.readings import JsonLines, Reading, read_readings
from dstrain.schema import UserError, dump_yaml
from dstrain.search import Search, plan_search
from dstrain.settings import ResourceSettings, read_document
from dstrain.tune.__main__ import main
from dstrain.tune.resources import Needs, Room
from dstrain.tune.trial import RankProcess, write_failure


def search_file(corpus: Path, folder: Path, space: dict[str, Any], **changes: Any) -> Path:
    """A YAML of a search over `tiny_run` without its pretraining."""
    tree = tiny_run(corpus, folder / "runs", **{"stages__pretrain": None, "tracking__enabled": True, **changes})
    file = folder / "search.yaml"
    search = {"metric": "finetune/valid/f1_macro", "max_failures": 1}
    file.write_text(dump_yaml({"base": tree, "space": space, "search": search}))
    return file


def tune(file: Path, *overrides: str, check: int | None = 0) -> subprocess.CompletedProcess[str]:
    """`python -m dstrain.tune` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "dstrain.tune", str(file), *overrides],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=400,
    )
    assert check is None or done.returncode == check, done.stdout + done.stderr
    return done


def our_processes() -> list[psutil.Process]:
    """Live Ray and trial processes below or left behind by this test."""
    found = []
    for process in psutil.process_iter(["name", "cmdline", "status"]):
        words = " ".join(process.info["cmdline"] or [])
        if process.info["status"] != psutil.STATUS_ZOMBIE and (
            "raylet" in words or "ray::" in words or "gcs_server" in words
        ):
            found.append(process)
    return found


# ------------------------------------------------------------------------------------------------ resources


def test_needs_follow_the_machine() -> None:
    assert Needs.of(ResourceSettings(), gpu=False) == Needs(1, 1.0, 0.0)
    assert Needs.of(ResourceSettings(), gpu=True) == Needs(1, 4.0, 1.0)
    assert Needs.of(ResourceSettings(ranks=2, cpus=3, gpus=0.5), gpu=True).bundle == {"CPU": 3.0, "GPU": 0.5}


def test_as_many_trials_at_once_as_fit() -> None:
    assert Room(8, 0).concurrent(Needs(2, 1, 0), None) == 4
    assert Room(8, 2).concurrent(Needs(1, 2, 1), None) == 2
    assert Room(8, 0).concurrent(Needs(1, 1, 0), 3) == 3
    assert Room(1, 0).concurrent(Needs(2, 1, 0), None) == 0


def test_a_trial_that_fits_nowhere_is_refused(small_corpus: Path, tmp_path: Path) -> None:
    file = search_file(small_corpus, tmp_path, {"seed": [0, 1]})
    search = plan_search(read_document(file))
    with pytest.raises(
        UserError, match=r"search\.resources: each takes 4 rank\(s\) of 1 CPU\(s\), and there are 2 CPUs"
    ):
        Room(2, 0).check(Needs(4, 1, 0), search)


# ------------------------------------------------------------------------------------- the driver, without Ray


@pytest.fixture
def desk(small_corpus: Path, tmp_path: Path) -> Desk:
    file = search_file(
        small_corpus, tmp_path, {"stages.finetune.optim.lr": [1e-3, 2e-3, 3e-3, 4e-3, 5e-3]}, tracking__enabled=False
    )
    return Desk(plan_search(read_document(file)))


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
        folder = desk.candidates[names[0]].folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "outcome.json").write_text("{}")
        (folder / "tags.json").write_text('{"device": "cpu"}')
        desk.ended(names[0], None)
        write_failure(desk.candidates[names[1]].folder, ValueError("the disk is full"))
        desk.ended(names[1], "died")
        desk.ended(names[2], None)
    ends = [desk.candidates[name].ended() for name in names]
    assert [end.state if end else None for end in ends] == ["finished", "failed", "stopped", None, None]
    assert ends[1] and ends[1].reason == "ValueError: the disk is full"
    assert ends[2] and ends[2].reason.startswith("stopped at rung 0.25: 0.7 below the best two of 3")


def test_a_trial_without_a_word_is_failed_and_an_interrupted_one_has_not_ended(desk: Desk) -> None:
    with desk:
        one, two = (candidate.id for candidate in desk.search.candidates[:2])
        desk.started(one)
        desk.started(two)
        desk.ended(one, "its processes died")
        desk.ended(two, None)
    assert desk.candidates[one].ended() and not desk.candidates[two].ended()
    assert {candidate.id for candidate in desk.search.pending()} == {
        candidate.id for candidate in desk.search.candidates
    }


def test_a_new_attempt_forgets_the_old_failure(desk: Desk) -> None:
    with desk:
        folder = first(desk).folder
        write_failure(folder, ValueError("old"))
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


def test_the_desk_is_pickled_empty(desk: Desk) -> None:
    """Tune pickles callbacks; threads and files must not travel, and nothing reads them back."""
    assert desk.__getstate__() == {}


def test_the_board_prints_a_line_per_ended_trial(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    board = Board(desk.search)
    board.started(first(desk))
    board.reported(first(desk), 0.5, 0.3)
    board.ended(first(desk), first(desk).end("finished", "finished"))
    assert "lr=0.001" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------- a rank process


def test_a_rank_process_runs_a_trial_and_waits_for_the_word(small_corpus: Path, tmp_path: Path) -> None:
    """What the actor does, in this process: every reading of the metric waits until the driver lets the trial live."""
    import threading

    from dstrain.engine import free_port, leave_ranks

    tree = tiny_run(small_corpus, tmp_path, stages__pretrain=None)
    rank = RankProcess()
    seat = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    working = threading.Thread(target=rank.train, args=(tree, "tiny.yaml", "finetune/valid/f1_macro", seat))
    working.start()
    try:
        seen = []
        for _ in range(2):
            seen.append(rank.next_reading())
            time.sleep(0.1)
            assert working.is_alive()
            rank.go_on()
        working.join(60)
    finally:
        leave_ranks()
        for name in seat:
            os.environ.pop(name, None)
    assert [(step, total) for step, total, _ in seen] == [(4, 8), (8, 8)]
    assert (tmp_path / "tiny" / "outcome.json").exists()
    assert (tmp_path / "tiny" / "tags.json").exists()


def test_a_rank_process_leaves_the_reason_of_a_failure(
    small_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tiny_run(small_corpus, tmp_path, stages__pretrain=None, deepspeed=str(tmp_path / "none.json"))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    from dstrain.engine import free_port

    seat = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    with pytest.raises(UserError):
        RankProcess().train(tree, "tiny.yaml", "finetune/valid/f1_macro", seat)
    assert (tmp_path / "tiny" / "failure.txt").read_text().startswith("UserError: ")


# ---------------------------------------------------------------------------------------------- the real thing


def test_dry_run_trains_nothing(small_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = search_file(small_corpus, tmp_path, {"stages.finetune.optim.lr": [1e-3, 2e-3]})
    assert main([str(file), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "2 trials, " in said and "lr=0.001" in said
    assert not (tmp_path / "runs").exists()


def test_a_mistake_is_one_sentence(small_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = search_file(small_corpus, tmp_path, {"stages.finetune.optim.learning_rate": [1e-3, 2e-3]})
    assert main([str(file)]) == 2
    said = capsys.readouterr().err
    assert "stages.finetune.optim.learning_rate: no such setting" in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_search_to_its_end_and_again(small_corpus: Path, tmp_path: Path) -> None:
    """Two ranks a trial; one parent with a child per trial in MLflow; the second start runs nothing again."""
    from mlflow import MlflowClient

    file = search_file(small_corpus, tmp_path, {"stages.finetune.optim.lr": [1e-3, 4e-3], "seed": [0, 1]})
    before = {process.pid for process in our_processes()}
    done = tune(file, "search.resources.ranks=2", "search.resources.cpus=0.5")
    assert "4 of 4 trials to run" in done.stdout and "retrain: deepspeed dstrain/train.py" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    client = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == 4 and len(runs) == 5
    for child in children:
        assert child.info.status == "FINISHED"
        assert child.data.params["encoder.attention.kind"] == "sdpa"
        assert (
            child.data.tags["stop_reason"]
            and child.data.tags["attention_kernel"]
            and child.data.tags["world_size"] == "2"
        )
        assert {row.step for row in client.get_metric_history(child.info.run_id, "finetune/valid/f1_macro")} <= {4, 8}
    time.sleep(3)
    assert not [process for process in our_processes() if process.pid not in before]
    again = tune(file, "search.resources.ranks=2", "search.resources.cpus=0.5")
    assert "all 4 trials have ended" in again.stdout
    wider = tmp_path / "wider.yaml"
    wider.write_text(file.read_text().replace("- 0\n  - 1\n", "- 0\n  - 1\n  - 2\n"))
    more = tune(wider, "search.resources.ranks=2", "search.resources.cpus=0.5")
    assert "2 of 6 trials to run" in more.stdout
    assert len(client.search_runs([parent.info.experiment_id])) == 7


@pytest.mark.slow
def test_an_interrupted_search_goes_on(small_corpus: Path, tmp_path: Path) -> None:
    """Ctrl-C in the middle: exit status 75, no process left, and the same command ends all trials without a doubled step."""
    file = search_file(small_corpus, tmp_path, {"stages.finetune.optim.lr": [1e-3, 4e-3]}, stages__finetune__steps=400)
    before = {process.pid for process in our_processes()}
    searching = subprocess.Popen(
        [sys.executable, "-m", "dstrain.tune", str(file)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    trials = tmp_path / "runs" / "tiny" / "trials"
    deadline = time.monotonic() + 120
    while not list(trials.glob("*/stages/finetune/checkpoint")) and time.monotonic() < deadline:
        time.sleep(0.2)
    os.killpg(searching.pid, signal.SIGINT)  # a terminal's Ctrl-C reaches every process of the search
    said, _ = searching.communicate(timeout=60)
    assert searching.returncode == 75, said
    assert "go on with: python -m dstrain.tune" in said
    time.sleep(3)
    assert not [process for process in our_processes() if process.pid not in before]
    tune(file, "stages.finetune.steps=400")
    search: Search = plan_search(read_document(file))
    for candidate in search.candidates:
        assert candidate.ended()
        steps = [reading.step for reading in read_readings(candidate.folder) if reading.split == "valid"]
        assert steps == sorted(set(steps))


@pytest.mark.slow
def test_a_failed_trial_is_told_and_the_others_go_on(small_corpus: Path, tmp_path: Path) -> None:
    """An absurd learning rate diverges: the search ends the others, says so, exits with 1, and tries it again next time."""
    file = search_file(small_corpus, tmp_path, {"stages.finetune.optim.lr": [1e-3, 1e30]})
    done = tune(file, check=1)
    assert "failed: Diverged: finetune: loss is not a number" in done.stdout
    assert "finished" in done.stdout
    assert "1 of 2 trials to run" in tune(file, check=1).stdout
