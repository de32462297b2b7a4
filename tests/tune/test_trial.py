"""One trial's processes: a real seat with its nursery, what a run does on it, and every way in which it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from conftest import ROOT, tiny_run
from safetensors.torch import load_file

from dstrain.engine import free_port
from dstrain.tune.driver import NO_GPU
from dstrain.tune.seat import Seat
from dstrain.tune.trial import Fault, Hopeless, _check, reason_of

METRIC = "finetune/valid/f1_macro"


@pytest.fixture(scope="module")
def seat() -> Iterator[Seat]:
    """One seat for all: a run leaves nothing behind on it."""
    seat = Seat({"OMP_NUM_THREADS": "1"})
    yield seat
    seat.close()


def order(tree: Mapping[str, Any]) -> dict[str, Any]:
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return {"run": tree, "source": "tiny.yaml", "metric": METRIC, "texts": {}, "environ": place}


def next_of(seat: Seat, kind: str) -> Any:
    """What the next message of this kind says; signs of life are passed over."""
    while True:
        message = seat.news()
        if kind in message:
            return message[kind]
        assert not message, message


def tree(corpus: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    return tiny_run(corpus, folder, **{"stages__pretrain": None, **changes})


def gone(*processes: psutil.Process) -> bool:
    return not psutil.wait_procs(processes, timeout=10)[1]


def test_a_run_waits_for_the_word_after_every_reading_of_the_metric(
    seat: Seat, small_corpus: Path, tmp_path: Path
) -> None:
    seat.begin("one", order(tree(small_corpus, tmp_path)))
    seen = []
    for _ in range(2):
        seen.append(next_of(seat, "progress")[:2])
        checkpoints = list(tmp_path.glob("tiny/stages/finetune/checkpoint*"))
        assert checkpoints or seen[-1] == [8, 8], "who is paused now has lost nothing"
        time.sleep(0.1)
        assert seat.child is not None, "it waits"
        seat.go_on()
    assert next_of(seat, "ended") == 0
    assert seen == [[4, 8], [8, 8]]
    assert (tmp_path / "tiny" / "outcome.json").exists()
    assert (tmp_path / "tiny" / "tags.json").exists()
    assert seat.end("one") and seat.child is None


def test_the_metric_of_an_earlier_stage_is_told_before_the_next_one_trains(
    seat: Seat, small_corpus: Path, tmp_path: Path
) -> None:
    seat.begin("two", order(tiny_run(small_corpus, tmp_path)) | {"metric": "pretrain/valid/loss"})
    assert next_of(seat, "progress")[:2] == [3, 6]
    seat.go_on()
    assert next_of(seat, "progress")[:2] == [6, 6]
    time.sleep(0.2)
    assert "finetune" not in (tmp_path / "tiny/readings.jsonl").read_text()
    seat.go_on()
    assert next_of(seat, "ended") == 0


def test_what_the_driver_says_wins_over_what_the_node_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    seat = Seat(NO_GPU)
    assert psutil.Process(seat._nursery.pid).environ()["CUDA_VISIBLE_DEVICES"] == ""
    seat.close()


def test_runs_that_follow_each_other_are_processes_of_their_own_and_do_not_differ(
    seat: Seat, small_corpus: Path, tmp_path: Path
) -> None:
    weights, processes = [], set()
    for name in "ab":
        seat.begin(name, order(tree(small_corpus, tmp_path / name)))
        for _ in range(2):
            next_of(seat, "progress")
            processes.add(seat.child)
            seat.go_on()
        assert next_of(seat, "ended") == 0
        weights.append(load_file(tmp_path / name / "tiny/stages/finetune/best.safetensors"))
    assert len(processes) == 2 and os.getpid() not in processes
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


def test_a_run_that_is_told_to_stop_saves_and_ends_even_while_it_waits_for_a_word(
    seat: Seat, small_corpus: Path, tmp_path: Path
) -> None:
    seat.begin("stopped", order(tree(small_corpus, tmp_path)))
    next_of(seat, "progress")
    seat.stop()
    assert next_of(seat, "ended") == 0
    assert list(tmp_path.glob("tiny/stages/finetune/checkpoint*"))
    assert not (tmp_path / "tiny/outcome.json").exists() and not (tmp_path / "tiny/failure.txt").exists()


def test_a_failure_leaves_its_reason_and_a_mistake_is_hopeless(seat: Seat, small_corpus: Path, tmp_path: Path) -> None:
    seat.begin("wrong", order(tree(small_corpus, tmp_path, deepspeed=str(tmp_path / "none.json"))))
    assert next_of(seat, "ended") == 2
    assert (tmp_path / "tiny" / "failure.txt").read_text().startswith("UserError: ")


def test_a_run_that_is_ended_is_gone_and_only_the_run_that_was_meant(
    seat: Seat, small_corpus: Path, tmp_path: Path
) -> None:
    seat.begin("first", order(tree(small_corpus, tmp_path)))
    next_of(seat, "progress")
    assert seat.child is not None
    process = psutil.Process(seat.child)
    assert seat.end("another, long ago") and process.is_running()
    assert seat.end("first") and gone(process)
    assert next_of(seat, "ended") == -signal.SIGKILL


@pytest.mark.slow
def test_nobody_takes_the_port_on_which_a_first_rank_is_going_to_listen(
    seat: Seat, small_corpus: Path, tmp_path: Path
) -> None:
    """It is open from the moment it is known, and what the rank listens on: two ranks on two seats meet there."""
    seats = (seat, Seat({"OMP_NUM_THREADS": "1"}))
    host, port = seat.address()
    with pytest.raises(OSError, match="in use"):
        socket.create_server((host, port))
    for rank, one in enumerate(seats):
        told = order(tree(small_corpus, tmp_path))
        told["environ"] |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": host, "MASTER_PORT": str(port)}
        told["environ"] |= {"DSTRAIN_LAUNCHER": "ray"}
        one.begin("pair", told)
    for _ in range(2):
        next_of(seat, "progress")
        seat.go_on()
    assert [next_of(one, "ended") for one in seats] == [0, 0]
    seats[1].close()
    socket.create_server((host, port)).close()  # and free again


@pytest.mark.slow
def test_whoever_dies_takes_along_what_is_below(small_corpus: Path, tmp_path: Path) -> None:
    """The nursery killed under its child, then a process that holds a seat: nothing stays behind."""
    seat = Seat({"OMP_NUM_THREADS": "1"})
    seat.begin("run", order(tree(small_corpus, tmp_path)))
    next_of(seat, "progress")
    assert seat.child is not None
    child = psutil.Process(seat.child)
    nursery = child.parent()
    assert nursery is not None
    nursery.kill()
    assert next_of(seat, "ended") == -signal.SIGKILL
    assert gone(child)
    seat.begin("after", order(tree(small_corpus, tmp_path)))
    assert next_of(seat, "ended") == -signal.SIGKILL, "nobody waits for a nursery that died while it had nothing to do"
    assert not seat.end("after"), "a seat without a nursery is of no use to anybody"
    seat.close()

    program = f"""
from tests.tune.test_trial import METRIC, order, next_of, tree
from dstrain.tune.seat import Seat
from pathlib import Path
seat = Seat({{}})
seat.begin("run", order(tree(Path({str(small_corpus)!r}), Path({str(tmp_path / "other")!r}))))
next_of(seat, "progress")
print(seat.child, flush=True)
next_of(seat, "ended")
"""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    holder = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert holder.stdout is not None
    child = psutil.Process(int(holder.stdout.readline()))
    nursery = child.parent()
    assert nursery is not None
    holder.kill()
    holder.wait()
    assert gone(child, nursery)


def test_reasons_are_words_for_people() -> None:
    class Lost(ray.exceptions.ActorDiedError):
        def __str__(self) -> str:
            return "The actor is dead because its node has died. Node Id: 1c2"

    assert reason_of(Lost()) == "its node was lost"
    assert reason_of(ray.exceptions.ActorDiedError()) == "a process died without a word (killed, or out of memory)"
    assert reason_of(ray.exceptions.OutOfMemoryError("x")).startswith("out of memory")
    assert reason_of(Fault("hung: reported nothing")) == "hung: reported nothing"
    with pytest.raises(Fault, match=r"killed by SIGKILL \(out of memory, if nobody sent it\)"):
        _check(-9)
    with pytest.raises(Hopeless):
        _check(2)
    _check(0)
