"""Tracking: a real MLflow on SQLite holds every reading once, whatever is killed, down or resumed in between."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dstrain import tracking
from dstrain.ledger import (
    WANTED_FILE,
    Sent,
    Wanted,
    begins_line,
    locked,
    read_record,
    size_of,
    whole_lines,
    write_record,
)
from dstrain.readings import READINGS_FILE, JsonLines, Reading, read_readings
from dstrain.schema import UserError
from dstrain.tracking import (
    SENT_FILE,
    Courier,
    TrackedRun,
    Tracker,
    TrackingSettings,
    as_params,
    main,
    replay,
    sent_of,
    store_uri,
    ui_command,
    ui_links,
    without_password,
)

ROOT = Path(__file__).parents[1]
REPLAY = [sys.executable, "-m", "dstrain.tracking"]


@pytest.fixture(autouse=True)
def _no_store_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables and nothing in them; making it takes seconds, so the tests copy it."""
    folder = tmp_path_factory.mktemp("schema")
    tracker = Tracker(None, "other", folder)
    tracker.run(folder, "first", {}, {})
    assert tracker.close(120)
    return folder / "mlflow.db"


@pytest.fixture
def output_dir(tmp_path: Path, schema: Path) -> Path:
    """An output folder whose store is ready."""
    folder = tmp_path / "runs"
    folder.mkdir()
    shutil.copy(schema, folder / "mlflow.db")
    return folder


@pytest.fixture
def said() -> list[str]:
    return []


def open_tracker(output_dir: Path, said: list[str] | None = None, uri: str | None = None) -> Tracker:
    say = print if said is None else said.append
    return Tracker(uri, "dstrain", output_dir, say=say, interval_seconds=0.02)


def client(output_dir: Path) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(f"sqlite:///{output_dir / 'mlflow.db'}")


def report(folder: Path, steps: range, **values: float) -> None:
    sink = JsonLines(folder)
    for step in steps:
        sink(Reading("tapt", "train", step, 100, step * 10, step * 0.5, values or {"loss": 1 / (step + 1)}))


def history(output_dir: Path, run_id: str, key: str) -> list[tuple[int, float]]:
    return sorted((row.step, row.value) for row in client(output_dir).get_metric_history(run_id, key))


def assert_every_reading_once(output_dir: Path, folder: Path) -> None:
    """The store's rows are the file's, exactly: nothing missing, nothing twice."""
    written: dict[str, list[tuple[int, float]]] = {}
    for reading in read_readings(folder):
        source = f"{reading.stage}/{reading.split}"
        for key, value in {
            **reading.keyed(),
            f"{source}/tokens": reading.tokens,
            f"{source}/seconds": reading.seconds,
        }.items():
            written.setdefault(key, []).append((reading.step, value))
    assert written
    run_id = sent_of(folder).run_id
    assert set(client(output_dir).get_run(run_id).data.metrics) == set(written)
    for key, rows in written.items():
        assert history(output_dir, run_id, key) == sorted(rows), key


def all_runs(output_dir: Path) -> list[Any]:
    store = client(output_dir)
    experiment = store.get_experiment_by_name("dstrain")
    return list(store.search_runs([experiment.experiment_id])) if experiment else []


# ------------------------------------------------------------------------------------------- the usual way


def test_parent_and_child_with_all_that_a_reader_needs(output_dir: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    tracker = open_tracker(output_dir)
    search = tracker.run(output_dir / "search", "search", {"space": {"lr": [1, 2]}}, {})
    folder = output_dir / "search" / "trial_0"
    trial = tracker.run(
        folder, "trial 0", {"optim": {"lr": 3e-4, "kind": "adamw", "clip": None}}, {"git_commit": "abc"}, search
    )
    before = time.time()
    report(folder, range(1, 6))
    (folder / "settings.yaml").write_text("a: 1\n")
    trial.tag({"world_size": 2})
    trial.finish(
        "KILLED", {"stop_reason": "asha"}, [folder / "settings.yaml", folder / READINGS_FILE, folder / "missing"]
    )
    search.finish("FINISHED")
    assert tracker.close(60)

    assert_every_reading_once(output_dir, folder)
    run = client(output_dir).get_run(trial.run_id)
    assert run.data.params == {"optim.lr": "0.0003", "optim.kind": "adamw", "optim.clip": "null"}
    assert run.data.tags.items() >= {
        "mlflow.parentRunId": search.run_id, "mlflow.source.git.commit": "abc", "mlflow.runName": "trial 0",
        "world_size": "2", "stop_reason": "asha", "mlflow.source.type": "LOCAL",
    }.items()  # fmt: skip
    assert run.info.status == "KILLED" and abs(run.info.end_time / 1000 - before) < 60
    assert {file.path for file in client(output_dir).list_artifacts(trial.run_id)} == {"settings.yaml", READINGS_FILE}
    parent = client(output_dir).get_run(search.run_id)
    assert parent.info.status == "FINISHED" and parent.data.params == {"space.lr": "[1, 2]"}
    assert "mlflow.parentRunId" not in parent.data.tags
    assert trial.experiment_id == run.info.experiment_id
    row = client(output_dir).get_metric_history(trial.run_id, "tapt/train/loss")[0]
    assert before - 1 < row.timestamp / 1000 < time.time()  # when it was measured, not when it was sent
    experiment = client(output_dir).get_experiment(run.info.experiment_id)
    assert experiment.artifact_location == (output_dir / "mlflow-artifacts").as_uri()
    assert list(tmp_path.iterdir()) == [output_dir]  # MLflow's habit is an mlruns folder where one stands


def test_readings_arrive_while_the_run_goes_on(output_dir: Path) -> None:
    tracker = open_tracker(output_dir)
    run = tracker.run(output_dir / "a", "a", {}, {})
    for last in (3, 6):
        report(output_dir / "a", range(last + 1))
        assert tracker.flush(30)
        assert [step for step, _ in history(output_dir, str(run.run_id), "tapt/train/loss")] == list(range(last + 1))
    assert client(output_dir).get_run(run.run_id).info.status == "RUNNING"
    tracker.close(30)


def test_a_line_that_is_still_being_written_waits_for_its_end(output_dir: Path) -> None:
    tracker = open_tracker(output_dir)
    tracker.run(output_dir / "a", "a", {}, {})
    report(output_dir / "a", range(3))
    path = output_dir / "a" / READINGS_FILE
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    assert tracker.flush(30)
    assert sent_of(output_dir / "a").offset == whole[:-30].rfind(b"\n") + 1
    path.write_bytes(whole)
    assert tracker.close(30)
    assert_every_reading_once(output_dir, output_dir / "a")


# ------------------------------------------------------------------------------------ kills and resumed runs


def test_a_resumed_run_goes_on_as_the_same_run(output_dir: Path, said: list[str]) -> None:
    folder = output_dir / "a"
    first = open_tracker(output_dir)
    run = first.run(folder, "a", {"lr": 1, "epochs": 3}, {"attempt": "1"})
    report(folder, range(5))
    run.finish("KILLED", {"stop_reason": "preempted"})
    assert first.close(30)
    run_id = run.run_id

    second = open_tracker(output_dir, said)
    again = second.run(folder, "a", {"lr": 2, "epochs": 3, "new": True}, {"attempt": "2"})
    assert again.run_id == run_id  # known before the store is asked
    report(folder, range(3, 9))
    assert second.flush(30)
    assert client(output_dir).get_run(run_id).info.status == "RUNNING"
    again.finish("FINISHED")
    assert second.close(30)

    assert_every_reading_once(output_dir, folder)
    (found,) = all_runs(output_dir)
    assert found.info.run_id == run_id and found.info.status == "FINISHED"
    assert found.data.params == {"lr": "1", "epochs": "3", "new": "true"}
    assert found.data.tags.items() >= {"resumed.lr": "2", "attempt": "2", "stop_reason": "preempted"}.items()
    assert len(said) == 1 and "lr" in said[0] and "epochs" not in said[0]


@pytest.mark.parametrize("lost", ["offset", "run_id", "file"])
def test_a_kill_between_sending_and_writing_it_down(output_dir: Path, lost: str) -> None:
    folder = output_dir / "a"
    first = open_tracker(output_dir)
    first.run(folder, "a", {"lr": 1}, {})
    report(folder, range(40), loss=0.25, odd=float("nan"), endless=float("inf"))
    assert first.close(30)
    run_id = sent_of(folder).run_id
    if lost == "file":
        (folder / SENT_FILE).unlink()
    else:
        state = json.loads((folder / SENT_FILE).read_text())
        (folder / SENT_FILE).write_text(json.dumps({**state, lost: type(state[lost])(), "revision": 0}))

    second = open_tracker(output_dir)
    run = second.run(folder, "a", {"lr": 1}, {})
    report(folder, range(40, 45), loss=0.25, odd=float("nan"), endless=float("inf"))
    assert second.close(30)
    assert run.run_id == run_id and len(all_runs(output_dir)) == 1
    for key in ("loss", "odd", "endless", "tokens", "seconds"):
        assert [step for step, _ in history(output_dir, run_id, f"tapt/train/{key}")] == list(range(45))


@pytest.mark.slow
def test_a_process_killed_at_any_moment_leaves_what_a_replay_completes(output_dir: Path) -> None:
    program = f"""
import os, time
from pathlib import Path
from dstrain.readings import JsonLines, Reading
from dstrain.tracking import Tracker
folder = Path({str(output_dir / "a")!r})
run = Tracker(None, "dstrain", Path({str(output_dir)!r}), interval_seconds=0.01).run(folder, "a", {{"lr": 1}}, {{}})
sink = JsonLines(folder)
step = 0
while True:
    step += 1
    sink(Reading("tapt", "train", step, 10**6, step, step * 0.1, {{"loss": 1 / step}}))
    time.sleep(0.002)
    if run.sent.offset > 20000 and step % 7 == 0:
        os.kill(os.getpid(), 9)
"""
    killed = subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60, check=False)
    assert killed.returncode == -9
    done = subprocess.run([*REPLAY, str(output_dir)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert done.stderr == "dstrain: 1 of 1 runs are wholly in MLflow\n"
    assert_every_reading_once(output_dir, output_dir / "a")
    assert [run.info.status for run in all_runs(output_dir)] == ["RUNNING"]  # it may be resumed


def test_a_run_deleted_in_the_ui_is_made_anew_in_full(output_dir: Path) -> None:
    folder = output_dir / "a"
    tracker = open_tracker(output_dir)
    run = tracker.run(folder, "a", {"lr": 1}, {})
    report(folder, range(5))
    assert tracker.flush(30)
    deleted = run.run_id
    client(output_dir).delete_run(deleted)
    report(folder, range(5, 8))
    assert tracker.close(30)
    assert run.run_id != deleted
    assert_every_reading_once(output_dir, folder)
    assert client(output_dir).get_run(run.run_id).data.params == {"lr": "1"}


def test_moved_to_another_place_the_runs_are_still_the_same(output_dir: Path, tmp_path: Path) -> None:
    tracker = open_tracker(output_dir)
    search = tracker.run(output_dir / "s", "search", {}, {})
    trial = tracker.run(output_dir / "s" / "a", "a", {}, {}, search)
    report(output_dir / "s" / "a", range(5))
    assert tracker.close(30)
    moved = tmp_path / "archive"
    output_dir.rename(moved)
    report(moved / "s" / "a", range(5, 8))
    assert replay([moved])
    assert {run.info.run_id for run in all_runs(moved)} == {search.run_id, trial.run_id}
    assert_every_reading_once(moved, moved / "s" / "a")


def test_readings_begun_afresh_are_sent_from_the_start(output_dir: Path) -> None:
    tracker = open_tracker(output_dir)
    run = tracker.run(output_dir / "a", "a", {}, {})
    report(output_dir / "a", range(5))
    assert tracker.flush(30)
    (output_dir / "a" / READINGS_FILE).unlink()
    report(output_dir / "a", range(5, 7))
    assert tracker.close(30)
    assert [step for step, _ in history(output_dir, str(run.run_id), "tapt/train/loss")] == list(range(7))


@pytest.mark.parametrize("seen", ["shorter", "grown again"])
def test_steps_computed_again_after_a_power_cut_are_not_doubled(output_dir: Path, seen: str) -> None:
    """The file has lost its end, which was sent: a resumed run computes those steps again, and writes other times."""
    folder = output_dir / "a"
    tracker = open_tracker(output_dir)
    run = tracker.run(folder, "a", {}, {})
    report(folder, range(8))
    assert tracker.close(30)
    path = folder / READINGS_FILE
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:5]))
    if seen == "grown again":  # while the store was away
        sink = JsonLines(folder)
        for step in range(5, 12):
            sink(Reading("tapt", "train", step, 100, step * 10, step * 0.5 + 0.0625, {"loss": 1 / (step + 1)}))
    again = open_tracker(output_dir)
    again.run(folder, "a", {}, {})
    if seen == "shorter":
        assert again.flush(30)
        time.sleep(0.01)
        report(folder, range(5, 12))
    assert again.close(30)
    rows = history(output_dir, str(run.run_id), "tapt/train/loss")
    assert rows == [(step, 1 / (step + 1)) for step in range(12)]
    assert [step for step, _ in history(output_dir, str(run.run_id), "tapt/train/seconds")] == [*range(12)]


def test_tags_after_the_end_still_arrive(output_dir: Path) -> None:
    tracker = open_tracker(output_dir)
    run = tracker.run(output_dir / "a", "a", {}, {})
    run.finish("FINISHED")
    assert tracker.flush(30)
    time.sleep(0.1)  # long enough for the thread to have let go of the run
    run.tag({"rank": 1})
    assert tracker.close(30)
    found = client(output_dir).get_run(run.run_id)
    assert found.data.tags["rank"] == "1" and found.info.status == "FINISHED"


# -------------------------------------------------------------------------------------- stores that fail


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def silent_server() -> Iterator[int]:
    """A port that takes a connection and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(16)
        yield int(server.getsockname()[1])


def test_an_unreachable_server_stops_and_slows_nothing(tmp_path: Path, said: list[str], monkeypatch: Any) -> None:
    uri = f"http://127.0.0.1:{closed_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    start = time.perf_counter()
    tracker = TrackingSettings().open(tmp_path, said.append)
    run = tracker.run(tmp_path / "a", "a", {"lr": 1}, {})
    report(tmp_path / "a", range(200))
    run.tag({"x": 1})
    run.finish("FINISHED")
    assert time.perf_counter() - start < 2.0
    assert not tracker.flush(0.3)
    assert not tracker.close(30)
    assert time.perf_counter() - start < 15.0
    assert run.run_id is None
    assert len(said) == 2, said
    assert uri in said[0] and "Connection refused" in said[0] and "training goes on" in said[0]
    assert f"-m dstrain.tracking {tmp_path / 'a'}" in said[1] and "1 run(s)" in said[1]
    assert main([str(tmp_path)]) == 1


def test_close_waits_no_longer_than_it_was_told(tmp_path: Path, said: list[str], silent_server: int) -> None:
    tracker = open_tracker(tmp_path, said, f"http://127.0.0.1:{silent_server}")
    tracker.run(tmp_path / "a", "a", {}, {})
    start = time.perf_counter()
    assert not tracker.close(0.5)
    assert time.perf_counter() - start < 3.0
    assert "send them later" in said[-1]


@pytest.mark.parametrize("patient", [True, False])
def test_close_is_patient_while_runs_get_through(
    tmp_path: Path, schema: Path, said: list[str], monkeypatch: pytest.MonkeyPatch, patient: bool
) -> None:
    shutil.copy(schema, tmp_path / "mlflow.db")
    tracker = open_tracker(tmp_path, said)
    tracker.run(tmp_path / "first", "first", {}, {})
    assert tracker.flush(60)  # it has imported mlflow
    deliver = Courier.deliver
    monkeypatch.setattr(Courier, "deliver", lambda *given: time.sleep(0.5) or deliver(*given))
    for name in "abcde":
        tracker.run(tmp_path / name, name, {}, {}).finish("FINISHED")
    assert tracker.close(2, patient=patient) == patient
    assert any("send them later" in sentence for sentence in said) != patient


def test_a_store_that_comes_back_gets_everything_once(tmp_path: Path, schema: Path, said: list[str]) -> None:
    place = tmp_path / "store"
    place.write_text("not a folder yet")
    tracker = open_tracker(tmp_path / "runs", said, f"sqlite:///{place / 'mlflow.db'}")
    search = tracker.run(tmp_path / "runs", "search", {}, {})
    runs = [tracker.run(tmp_path / "runs" / str(i), str(i), {"i": i}, {}, search) for i in range(3)]
    for run in runs:
        report(run.folder, range(20))
    deadline = time.monotonic() + 30
    while not said and time.monotonic() < deadline:
        time.sleep(0.02)
    runs[0].finish("FINISHED")
    place.unlink()
    place.mkdir()
    shutil.copy(schema, place / "mlflow.db")
    assert tracker.flush(30)
    report(runs[1].folder, range(20, 25))
    assert tracker.close(30)
    assert len(said) == 2 and "fails" in said[0] and "is back" in said[1], said
    for run in runs:
        assert_every_reading_once(place, run.folder)
        assert client(place).get_run(run.run_id).data.tags["mlflow.parentRunId"] == search.run_id
    assert client(place).get_run(runs[0].run_id).info.status == "FINISHED"
    assert len(all_runs(place)) == 4


def test_a_store_on_a_full_disk_gets_everything_when_there_is_room(
    small_disk: Path, tmp_path: Path, schema: Path, said: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    logging.getLogger("mlflow").setLevel("INFO")  # as where another library imported MLflow first
    shutil.copy(schema, small_disk / "mlflow.db")
    tracker = open_tracker(tmp_path / "runs", said, f"sqlite:///{small_disk / 'mlflow.db'}")
    run = tracker.run(tmp_path / "runs/a", "a", {"i": 1}, {})
    report(run.folder, range(20))
    assert tracker.flush(30)
    other = small_disk / "other"
    other.write_bytes(bytes(shutil.disk_usage(small_disk).free))
    for first in range(20, 620, 200):
        report(run.folder, range(first, first + 200))
        assert not tracker.flush(0.2)
    assert len(said) == 1 and "fails (database or disk is full); training goes on" in said[0], said
    other.unlink()
    assert tracker.close(60)
    assert len(said) == 2 and "is back" in said[1], said
    assert_every_reading_once(small_disk, run.folder)
    assert "Traceback" not in capfd.readouterr().err, "MLflow would tell it in pages"


def test_a_store_lost_between_two_runs_is_filled_by_the_replay_command(
    output_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = output_dir / "a"
    ready = (output_dir / "mlflow.db").rename(tmp_path / "ready.db")
    (output_dir / "mlflow.db").mkdir()  # SQLite cannot open a folder
    tracker = open_tracker(output_dir, [])
    run = tracker.run(folder, "a", {"lr": 1}, {"t": "u"})
    report(folder, range(30))
    run.finish("FAILED", artifacts=[folder / READINGS_FILE])
    assert not tracker.close(30)
    (output_dir / "mlflow.db").rmdir()
    ready.rename(output_dir / "mlflow.db")
    assert main([str(folder)]) == 0
    assert capsys.readouterr() == ("", "dstrain: 1 of 1 runs are wholly in MLflow\n")
    assert_every_reading_once(output_dir, folder)
    (found,) = all_runs(output_dir)
    assert found.info.status == "FAILED" and found.data.params == {"lr": "1"} and found.data.tags["t"] == "u"
    assert [file.path for file in client(output_dir).list_artifacts(found.info.run_id)] == [READINGS_FILE]


def test_the_replay_command_sends_to_another_store_when_told(
    output_dir: Path, tmp_path: Path, schema: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server of a job that has ended will never come back."""
    gone = f"http://me:hunter2@127.0.0.1:{closed_port()}"
    tracker = open_tracker(output_dir, [], gone)
    search = tracker.run(output_dir / "s", "search", {}, {})
    run = tracker.run(output_dir / "s/a", "a", {"lr": 1}, {}, search)
    report(run.folder, range(30))
    run.finish("FINISHED")
    assert not tracker.close(30)
    assert main([str(output_dir)]) == 2 and "needs its password" in capsys.readouterr().err
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(schema, other / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{other}/mlflow.db")
    assert main([str(output_dir)]) == 0
    told = f"dstrain: sending to MLFLOW_TRACKING_URI, sqlite:///{other}/mlflow.db, wherever the runs have begun\n"
    assert capsys.readouterr() == ("", told + "dstrain: 2 of 2 runs are wholly in MLflow\n")
    assert_every_reading_once(other, run.folder)
    parent = sent_of(output_dir / "s").run_id
    assert client(other).get_run(sent_of(run.folder).run_id).data.tags["mlflow.parentRunId"] == parent
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "MLFLOW_TRACKING_URI" in capsys.readouterr().out


def test_one_run_the_store_will_not_have_does_not_keep_back_the_others(
    output_dir: Path, said: list[str], monkeypatch: Any
) -> None:
    real = tracking.Courier._advance

    def advance(self: Any, folder: Path, wanted: Wanted, sent: Sent) -> None:
        if folder.name == "bad":
            raise RuntimeError("no")
        real(self, folder, wanted, sent)

    monkeypatch.setattr(tracking.Courier, "_advance", advance)
    tracker = open_tracker(output_dir, said)
    tracker.run(output_dir / "bad", "bad", {}, {})
    good = [tracker.run(output_dir / str(i), str(i), {}, {}) for i in range(3)]
    for run in good:
        report(run.folder, range(3))
    assert not tracker.close(30)
    for run in good:
        assert_every_reading_once(output_dir, run.folder)
    assert "1 run(s)" in said[-1]


def test_mlflows_limits_cost_no_metric(output_dir: Path, said: list[str]) -> None:
    folder = output_dir / "a"
    params = {f"p{i}": i for i in range(230)} | {"long": "x" * 9000, "list": ["a"] * 3000, "odd[key]/../é": 1}
    tracker = open_tracker(output_dir, said)
    run = tracker.run(folder, "a", params, {"long tag": "y" * 9000, "odd[tag]": 1})
    sink = JsonLines(folder)
    sink(Reading("tapt", "valid", 1, 9, 1, 1.0, {f"m{i}": float(i) for i in range(2500)}))
    sink(Reading("tapt", "valid", 2, 9, 1, 1.0, {"f1[macro]": 0.5}))
    run.finish("FINISHED")
    assert tracker.close(60)
    found = client(output_dir).get_run(run.run_id).data
    assert len(found.params) == 233 and len(found.params["long"]) == 6000
    assert found.params["odd_key_/_/é"] == "1" and found.tags["odd_tag_"] == "1"
    assert len(found.tags["long tag"]) == 8000
    assert len([key for key in found.metrics if "/m" in key]) == 2500
    assert found.metrics["tapt/valid/f1_macro_"] == 0.5
    assert said == []


def test_what_mlflow_refuses_is_said_and_the_rest_of_its_batch_arrives(
    output_dir: Path, said: list[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(tracking, "PARAM_CHARACTERS", 10**6)
    monkeypatch.setattr(tracking, "_clean", lambda key: key)
    monkeypatch.setenv("MLFLOW_TRUNCATE_LONG_VALUES", "false")
    folder = output_dir / "a"
    tracker = open_tracker(output_dir, said)
    run = tracker.run(folder, "a", {"a": 1, "long": "x" * 7000, "z": 2}, {})
    report(folder, range(3), loss=1.0, **{"bad[key]": 2.0})
    with (folder / READINGS_FILE).open("a") as file:
        file.write("a foreign line\n")
    assert tracker.close(60)
    found = client(output_dir).get_run(run.run_id).data
    assert found.params == {"a": "1", "z": "2"}
    assert [step for step, _ in history(output_dir, str(run.run_id), "tapt/train/loss")] == [0, 1, 2]
    assert any("'long'" in sentence for sentence in said) and any("bad[key]" in sentence for sentence in said)
    assert any("a line is passed over" in sentence for sentence in said)
    assert len(said) == len(set(said)) == 3


def test_a_run_folder_that_cannot_be_written_is_tracked_from_memory(output_dir: Path, said: list[str]) -> None:
    (output_dir / "file").write_text("")
    tracker = open_tracker(output_dir, said)
    run = tracker.run(output_dir / "file" / "a", "a", {"lr": 1}, {})
    run.finish("FINISHED")
    assert tracker.close(30)
    assert client(output_dir).get_run(run.run_id).info.status == "FINISHED"
    assert len(said) == 2 and all("Not a directory" in sentence for sentence in said)


def test_a_child_whose_parents_folder_is_gone(output_dir: Path, said: list[str]) -> None:
    tracker = open_tracker(output_dir, said)
    elsewhere = TrackedRun(tracker, output_dir / "gone", None, Sent())  # type: ignore[arg-type]
    run = tracker.run(output_dir / "a", "a", {}, {}, elsewhere)
    assert tracker.close(30)
    assert "mlflow.parentRunId" not in client(output_dir).get_run(run.run_id).data.tags
    assert len(said) == 1 and "without a parent" in said[0]


@pytest.mark.slow
def test_processes_that_start_together_on_an_empty_store(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from dstrain.readings import JsonLines, Reading
from dstrain.tracking import Tracker
output_dir, name = Path(sys.argv[1]), sys.argv[2]
tracker = Tracker(None, "dstrain", output_dir)
run = tracker.run(output_dir / name, name, {"name": name}, {})
sink = JsonLines(output_dir / name)
for step in range(50):
    sink(Reading("tapt", "train", step, 50, step, step * 0.1, {"loss": step / 7}))
run.finish("FINISHED")
sys.exit(0 if tracker.close(120) else 1)
"""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path), f"p{i}"], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        for i in range(4)
    ]
    noise = [process.communicate(timeout=180)[1] for process in started]
    assert [process.returncode for process in started] == [0] * 4, noise
    assert noise == [""] * 4
    assert len(all_runs(tmp_path)) == 4
    for i in range(4):
        assert_every_reading_once(tmp_path, tmp_path / f"p{i}")


# ------------------------------------------------------------------------------------ settings and secrets


def test_not_enabled_nothing_is_written_or_started(tmp_path: Path) -> None:
    tracker = TrackingSettings(enabled=False).open(tmp_path)
    run = tracker.run(tmp_path / "a", "a", {"lr": 1}, {})
    run.tag({"x": 1})
    run.finish("FINISHED")
    assert tracker.flush(1) and tracker.close(1)
    assert list(tmp_path.iterdir()) == [] and run.run_id is None and run.experiment_id is None


def test_the_store_is_the_setting_then_the_variable_then_sqlite(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert store_uri(None, Path("runs")) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///other.db")
    assert store_uri(None, Path("runs")) == f"sqlite:///{tmp_path}/other.db"  # a replay may stand elsewhere
    assert store_uri("http://h:5000", Path("runs")) == "http://h:5000"


def test_importing_the_module_imports_no_mlflow() -> None:
    program = "import sys, dstrain.tracking; print(sorted(n for n in ('mlflow', 'torch', 'numpy') if n in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_password_is_written_and_said_nowhere(tmp_path: Path, said: list[str], monkeypatch: Any) -> None:
    uri = f"http://me:hunter2@127.0.0.1:{closed_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    tracker = open_tracker(tmp_path, said)
    tracker.run(tmp_path / "a", "a", {}, {})
    assert not tracker.close(30)
    assert said and "me:***@" in said[-1]
    for text in [*said, *(path.read_text() for path in tmp_path.rglob("*") if path.is_file())]:
        assert "hunter2" not in text
    assert main([str(tmp_path)]) == 1  # the variable still has it: the store fails, nothing else
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(UserError, match="set MLFLOW_TRACKING_URI"):
        replay([tmp_path])
    assert without_password("postgresql+psycopg2://u:p@h/db") == "postgresql+psycopg2://u:***@h/db"
    assert without_password("sqlite:////a/b:c@d.db") == "sqlite:////a/b:c@d.db"


def test_the_replay_of_nothing_is_a_mistake_with_a_way_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / WANTED_FILE).write_text("{}")  # of something else
    assert main([str(tmp_path)]) == 2
    assert "give a run's folder or its output_dir" in capsys.readouterr().err


def test_params_are_flat_text() -> None:
    tree = {"a": {"b": [1, "x"], "c": True, "d": 3e-4, "e": None, "f": Path("/p")}, "g": {}, "h": "text"}
    flat = {"a.b": '[1, "x"]', "a.c": "true", "a.d": "0.0003", "a.e": "null", "a.f": '"/p"', "g": "{}", "h": "text"}
    assert as_params(tree) == flat
    assert as_params(flat) == flat


def test_a_job_of_a_cluster_says_so(monkeypatch: Any) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert tracking._source_tags({})["mlflow.source.type"] == "JOB"


# ------------------------------------------------------------------------------------------------- the UI


def test_links_carry_json_in_their_queries() -> None:
    links = ui_links("http://127.0.0.1:5000/", "7", ["r1", "r2"], "finetune/valid/f1_macro")
    base, page, query = links.compare.partition("#/compare-runs?")
    assert (base, page) == ("http://127.0.0.1:5000/", "#/compare-runs?")
    assert {key: json.loads(value) for key, value in urllib.parse.parse_qsl(query)} == {
        "runs": ["r1", "r2"],
        "experiments": ["7"],
    }
    curves = dict(urllib.parse.parse_qsl(links.curves.partition("#/metric?")[2]))
    assert curves["x_axis"] == "step"  # the page reads this one without quotes
    assert json.loads(curves["metric"]) == "finetune/valid/f1_macro"
    assert json.loads(curves["plot_metric_keys"]) == ["finetune/valid/f1_macro"]
    assert not set(links.compare + links.curves) & set(' "[]{}')


def test_the_command_of_the_ui(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    inside = ui_command(f"sqlite:///{tmp_path}/my runs/mlflow.db", 5055)
    assert inside.endswith("mlflow ui --backend-store-uri 'sqlite:///my runs/mlflow.db' --host 127.0.0.1 --port 5055")
    assert "sqlite:////elsewhere/mlflow.db" in ui_command("sqlite:////elsewhere/mlflow.db")
    assert "u:***@h" in ui_command("postgresql://u:p@h/db")
    assert ui_command("http://u:p@h:5000") == "http://u:***@h:5000"
    monkeypatch.setenv("PATH", "")
    assert ui_command("sqlite:////elsewhere/mlflow.db").startswith(str(Path(sys.executable).with_name("mlflow")))


# ----------------------------------------------------------------------------------------- the small files


def test_records_read_back_and_anything_else_is_none(tmp_path: Path) -> None:
    sent = Sent("sqlite:///x", "k", "1", "r", 12, 3)
    write_record(tmp_path / SENT_FILE, sent)
    assert read_record(tmp_path / SENT_FILE, Sent) == sent
    assert [path.name for path in tmp_path.iterdir()] == [SENT_FILE]
    for text in ("", "[1]", "3", '{"unknown": 1}', "\x00"):
        (tmp_path / SENT_FILE).write_text(text)
        assert read_record(tmp_path / SENT_FILE, Sent) is None
    assert sent_of(tmp_path / "missing") == Sent()


def test_whole_lines_come_in_portions_from_an_offset(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("dstrain.ledger.CHUNK_BYTES", 10)
    path = tmp_path / "f"
    path.write_bytes(b"".join(b"%06d\n" % i for i in range(9)) + b"torn")
    got, offset = [], 0
    while lines := whole_lines(path, offset):
        assert len(lines) <= 2
        got += lines
        offset += sum(map(len, lines))
    assert got == [b"%06d\n" % i for i in range(9)]
    assert size_of(path) == offset + 4 and size_of(tmp_path / "missing") == 0


def test_where_a_line_begins(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"ab\ncd")
    assert [begins_line(tmp_path / "f", offset) for offset in range(8)] == [True, False, False, True] + 4 * [False]
    assert begins_line(tmp_path / "none", 0) and not begins_line(tmp_path / "none", 1)


def test_a_lock_keeps_another_process_out(tmp_path: Path) -> None:
    lock = str(tmp_path / "lock")
    program = f"from pathlib import Path; from dstrain.ledger import locked\nwith locked(Path({lock!r})): print('in')"
    with locked(tmp_path / "lock"):
        other = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(1.0)
    assert other.communicate(timeout=30)[0] == "in\n"
    with locked(Path(os.devnull) / "impossible"):  # no lock to be had is no reason to stop
        pass


DIES_IN_A_MIGRATION = """
import os, sys
from pathlib import Path
from sqlalchemy import event
from sqlalchemy.engine import Engine
from dstrain.tracking import Tracker

@event.listens_for(Engine, "before_cursor_execute")
def die(connection, cursor, statement, *rest):
    if statement.startswith("INSERT INTO _alembic_tmp_"):
        os._exit(9)

tracker = Tracker(None, "first", Path(sys.argv[1]))
tracker.run(Path(sys.argv[1]) / "first", "first", {}, {})
tracker.close(120)
"""


@pytest.mark.slow
def test_a_death_while_the_tables_are_made_costs_nothing(tmp_path: Path) -> None:
    """MLflow can neither use nor mend a database that it was killed in the middle of making."""
    (tmp_path / "first").mkdir()
    died = subprocess.run([sys.executable, "-c", DIES_IN_A_MIGRATION, str(tmp_path)], cwd=ROOT, timeout=120)
    assert died.returncode == 9
    tracker = Tracker(None, "first", tmp_path)
    tracker.run(tmp_path / "first", "first", {}, {}).finish("FINISHED", {}, [])
    assert tracker.close(120)
    assert sent_of(tmp_path / "first").run_id


def test_a_program_is_named_so_that_it_can_be_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its path where the environment is not activated, whatever this process has put on its own PATH."""
    home = Path(sys.executable).parent
    monkeypatch.setenv("PATH", str(home))
    monkeypatch.setattr(sys, "base_prefix", "elsewhere")
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    monkeypatch.chdir(home.parent)
    assert tracking.program_here("python") == f"{home.name}/python"
    assert tracking.program_here("no-such-program") == "no-such-program"
    monkeypatch.setenv("VIRTUAL_ENV", sys.prefix)
    assert tracking.program_here("python") == "python"
