"""The driver where the cluster is not as it was: nodes that come and go, GPUs that nobody asked for."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster
from searches import begin, our_processes, ranks_of, search_file, wait_for

from dstrain.memory_limit import SHARES
from dstrain.search import plan_search
from dstrain.settings import read_document
from dstrain.tune import driver
from dstrain.tune.resources import Needs, Room

PAIR = Needs(2, 1, 1)


class Clock:
    """Time that passes when it is told to, and a cluster whose nodes are what it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.nodes, self.asked = 0.0, 2, 0
        monkeypatch.setattr(driver.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(driver.Room, "of_cluster", self.room)

    def room(self) -> Room:
        self.asked += 1
        return Room(((4.0, 1.0),) * self.nodes)


def test_a_search_says_that_no_trial_fits_and_does_not_wait_for_ever(
    small_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = search_file(small_corpus, tmp_path, {"seed": [0, 1]})
    settings = plan_search(read_document(file, ["search.silence_minutes=25"])).settings
    clock, said = Clock(monkeypatch), []
    vacancies = driver.Vacancies(settings, PAIR)

    def minutes(count: float) -> list[bool]:
        """What a driver hears that looks every second for so long."""
        found = []
        for _ in range(round(60 * count)):
            clock.now += 1
            found.append(vacancies.look(said.append))
        return found

    assert not any(minutes(60)) and said == []
    assert clock.asked <= 3600 / driver.ROOM_SECONDS + 1
    clock.nodes = 1
    assert not any(minutes(15))
    missing = (
        "no trial fits any more: each takes 2 rank(s) of 1 CPU(s) and 1 GPU(s), and the cluster has 4 CPUs and 1 GPUs; "
        "waiting 25 minutes for a node to come back (search.silence_minutes)"
    )
    assert said == [missing, missing], "at once, and after ten minutes"
    clock.nodes = 2
    assert not any(minutes(1)) and said[2:] == ["a trial fits again"] and vacancies() == 1
    clock.nodes = 0
    assert not any(minutes(25)) and any(minutes(0.2))
    assert said[-1] == "no trial has fitted for 25 minutes (search.silence_minutes); the search ends for now"


def test_ranks_of_trials_without_gpus_see_none(
    small_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr(driver.Room, "of_cluster", lambda: Room(((2.0, 0.0), (4.0, 1.0))))
    search = plan_search(read_document(search_file(small_corpus, tmp_path, {"seed": [0, 1]})))
    (without, with_one) = (
        driver.Driver(search, needs, threading.Event())._plan(search.candidates[0])["environ"]
        for needs in (Needs(1, 1, 0), Needs(1, 1, 1))
    )
    assert without == {**with_one, "CUDA_VISIBLE_DEVICES": "", SHARES: "2"}, "two trials, where four would fit"
    assert with_one[SHARES] == "1"
    assert with_one["NCCL_DEBUG"] == "WARN" and not {"CUDA_VISIBLE_DEVICES", "HF_TOKEN"} & set(with_one)


@pytest.mark.slow
def test_a_search_whose_node_is_gone_for_good_ends_and_asks_to_come_back(
    small_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial of two ranks on two nodes, one of which is lost in the middle: exit status 75, and nothing left behind."""
    file = search_file(
        small_corpus, tmp_path, {"seed": [0, 1]}, stages__finetune__steps=4000, stages__finetune__checkpoint_every=20
    )
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        searching = begin(file, "search.resources.ranks=2", "search.resources.cpus=2", "search.silence_minutes=0.3")
        trial = plan_search(read_document(file)).candidates[0].id
        wait_for(lambda: ranks_of(trial), searching)
        cluster.remove_node(nodes[1], allow_graceful=False)
        said, _ = searching.communicate(timeout=200)
        assert searching.returncode == 75, said
        assert "no trial fits any more: each takes 2 rank(s) of 1 CPU(s), and the cluster has 1 CPUs" in said
        assert "no trial has fitted for 0.3 minutes" in said and f"-m dstrain.tune {file}" in said
        assert "Traceback" not in said
        assert plan_search(read_document(file)).candidates[0].ended() is None
    finally:
        cluster.shutdown()
    wait_for(lambda: not our_processes(), None, 30)
