"""What a trial takes and what there is to take."""

from __future__ import annotations

from pathlib import Path

import pytest
from searches import search_file

from dstrain.schema import UserError
from dstrain.search import plan_search
from dstrain.settings import ResourceSettings, read_document
from dstrain.tune.resources import Needs, Room


def test_needs_are_a_ranks_share_and_follow_the_machine() -> None:
    assert Needs.of(ResourceSettings(), gpu=False) == Needs(1, 1.0, 0.0)
    assert Needs.of(ResourceSettings(), gpu=True) == Needs(1, 4.0, 1.0)
    assert Needs.of(ResourceSettings(ranks=2, cpus=3), gpu=True) == Needs(2, 1.5, 1.0)
    assert Needs.of(ResourceSettings(gpus=4, cpus=8, nodes="one"), gpu=True) == Needs(4, 2.0, 1.0, together=True)
    assert Needs.of(ResourceSettings(gpus=0.5), gpu=True).bundle == {"CPU": 4.0, "GPU": 0.5}


@pytest.mark.parametrize(
    ("nodes", "needs", "bound", "at_once"),
    [
        ([(8, 0)], Needs(2, 1, 0), None, 4),
        ([(8, 2)], Needs(1, 2, 1), None, 2),
        ([(8, 0)], Needs(1, 1, 0), 3, 3),
        ([(1, 0)], Needs(2, 1, 0), None, 0),
        ([(3, 0), (3, 0)], Needs(2, 1, 0), None, 3),  # one trial's ranks lie on both nodes
        ([(3, 0), (3, 0)], Needs(2, 1, 0, together=True), None, 2),
        ([(3, 0)], Needs(4, 1, 0, together=True), None, 0),
        ([(16, 4), (16, 4)], Needs(8, 4, 1), None, 1),
        ([], Needs(1, 1, 0), None, 0),
    ],
)
def test_as_many_trials_at_once_as_fit(
    nodes: list[tuple[float, float]], needs: Needs, bound: int | None, at_once: int
) -> None:
    assert Room(tuple(nodes)).concurrent(needs, bound) == at_once


def test_a_trial_that_fits_nowhere_is_refused(small_corpus: Path, tmp_path: Path) -> None:
    file = search_file(small_corpus, tmp_path, {"seed": [0, 1]})
    search = plan_search(read_document(file))
    with pytest.raises(
        UserError, match=r"search\.resources: each takes 4 rank\(s\) of 1 CPU\(s\), and there are 2 CPUs"
    ):
        Room(((2, 0),)).check(Needs(4, 1, 0), search)
    with pytest.raises(UserError, match=r"on one node, and there are 4 CPUs and 0 GPUs on 2 nodes"):
        Room(((2, 0), (2, 0))).check(Needs(4, 1, 0, together=True), search)
