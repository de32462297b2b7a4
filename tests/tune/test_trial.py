"""One trial: a rank process in this process, and what it leaves when it fails."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import ray
from conftest import tiny_run

from dstrain.engine import free_port, leave_ranks
from dstrain.schema import UserError
from dstrain.tune.trial import RankProcess, Silent, reason_of


@pytest.fixture
def seat(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The launcher's variables of a lone rank; what the rank puts into the environment is gone afterwards."""
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name in (*place, "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    return {**place, "MASTER_PORT": str(free_port())}


def test_a_rank_process_runs_a_trial_and_waits_for_the_word(
    small_corpus: Path, tmp_path: Path, seat: dict[str, str]
) -> None:
    """What the actor does, in this process: every reading of the metric waits until the driver lets the trial live."""
    tree = tiny_run(small_corpus, tmp_path, stages__pretrain=None)
    rank = RankProcess()
    working = threading.Thread(target=rank.train, args=(tree, "tiny.yaml", "finetune/valid/f1_macro", seat))
    working.start()
    try:
        seen = []
        for _ in range(2):
            while (news := rank.news()) is None:
                pass  # another sign of life
            seen.append(news)
            if news.step < news.total_steps:
                assert (tmp_path / "tiny/stages/finetune/checkpoint").exists(), "who is paused now has lost nothing"
            time.sleep(0.1)
            assert working.is_alive()
            rank.go_on()
        working.join(60)
    finally:
        leave_ranks()
    assert [(step, total) for step, total, _ in seen] == [(4, 8), (8, 8)]
    assert (tmp_path / "tiny" / "outcome.json").exists()
    assert (tmp_path / "tiny" / "tags.json").exists()


def test_a_rank_that_is_told_to_stop_saves_and_ends_even_while_it_waits_for_a_word(
    small_corpus: Path, tmp_path: Path, seat: dict[str, str]
) -> None:
    rank = RankProcess()
    tree = tiny_run(small_corpus, tmp_path, stages__pretrain=None)
    working = threading.Thread(target=rank.train, args=(tree, "tiny.yaml", "finetune/valid/f1_macro", seat))
    working.start()
    try:
        while rank.news() is None:
            pass
        rank.stop()
        working.join(60)
    finally:
        leave_ranks()
    assert not working.is_alive()
    assert (tmp_path / "tiny/stages/finetune/checkpoint").exists()
    assert not (tmp_path / "tiny/outcome.json").exists() and not (tmp_path / "tiny/failure.txt").exists()


def test_reasons_are_words_for_people() -> None:
    class Lost(ray.exceptions.ActorDiedError):
        def __str__(self) -> str:
            return "The actor is dead because its node has died. Node Id: 1c2"

    assert reason_of(Lost()) == "its node was lost"
    assert reason_of(ray.exceptions.ActorDiedError()) == "a process died without a word (killed, or out of memory)"
    assert reason_of(ray.exceptions.OutOfMemoryError("x")).startswith("out of memory")
    assert reason_of(Silent("reported nothing for 3 minutes")) == "Silent: reported nothing for 3 minutes"


def test_a_rank_process_leaves_the_reason_of_a_failure(
    small_corpus: Path, tmp_path: Path, seat: dict[str, str]
) -> None:
    tree = tiny_run(small_corpus, tmp_path, stages__pretrain=None, deepspeed=str(tmp_path / "none.json"))
    with pytest.raises(UserError):
        RankProcess().train(tree, "tiny.yaml", "finetune/valid/f1_macro", seat)
    assert (tmp_path / "tiny" / "failure.txt").read_text().startswith("UserError: ")
