"""What a search runs next, played through without Ray: trials report made-up curves, in any order."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_run

from dstrain.agenda import Agenda
from dstrain.readings import JsonLines, Reading
from dstrain.rungs import Promotions, Rungs
from dstrain.schema import dump_yaml
from dstrain.search import Candidate, Search, plan_search
from dstrain.settings import read_document

STEPS = 8
PAUSE = {"kind": "asha", "on_rung": "pause", "eta": 2, "rungs": [0.25, 0.5]}


@pytest.fixture
def planned(small_corpus: Path, tmp_path: Path) -> Any:
    """Plans a search over so many learning rates."""

    def plan(rates: int, **search: Any) -> Search:
        tree = {
            "base": tiny_run(small_corpus, tmp_path / "runs", stages__pretrain=None),
            "space": {"stages.finetune.optim.lr": [round(1e-3 * (1 + number), 6) for number in range(rates)]},
            "search": {"metric": "finetune/valid/f1_macro", **search},
        }
        file = tmp_path / "f.yaml"
        file.write_text(dump_yaml(tree))
        return plan_search(read_document(file))

    return plan


def worth(candidate: Candidate) -> float:
    """What a trial is worth: the larger its learning rate, the better."""
    return 10 * candidate.settings.stages["finetune"].optim.lr


class Player:
    """Plays the cluster: runs up to `slots` trials at once, each reporting at steps 2, 4, 6 and 8 from where it was."""

    def __init__(self, search: Search, slots: int, seed: int = 0, **given: Any) -> None:
        self.search, self.rungs = search, search.rungs()[0]
        self.dismissed: dict[str, str] = {}
        self.agenda = Agenda(search, self.rungs, lambda: slots, self._dismiss, search.pending(), **given)
        self.running: list[Candidate] = []
        self.most_running = 0
        self.started: Counter[str] = Counter()
        self._random = random.Random(seed)

    def _dismiss(self, candidate: Candidate, reason: str) -> None:
        candidate.end("stopped", reason)
        self.dismissed[candidate.id] = reason

    def play(self, reports: int | None = None) -> None:
        """Until nothing is left to do, or so many reports have come."""
        while reports is None or reports:
            while (candidate := self.agenda.next()) is not None:
                self.running.append(candidate)
                self.started[candidate.id] += 1
            self.most_running = max(self.most_running, len(self.running))
            if not self.running:
                break
            self._report(self._random.choice(self.running))
            reports = None if reports is None else reports - 1

    def _report(self, candidate: Candidate) -> None:
        step = max((reading.step for reading in candidate.readings()), default=0) + 2
        JsonLines(candidate.folder)(
            Reading("finetune", "valid", step, STEPS, 100 * step, step, {"f1_macro": worth(candidate)})
        )
        keep = self.agenda.finalists or self.rungs.record(candidate.id, step / STEPS, worth(candidate)).keep
        if step < STEPS and keep:
            return
        self.running.remove(candidate)
        if step == STEPS:
            candidate.end("finished", "finished")
        elif not isinstance(self.rungs, Promotions):
            candidate.end("stopped", "behind")
        self.agenda.returned(candidate, waits=candidate.ended() is None)

    def last_steps(self) -> list[int]:
        """How far each trial of the search got, best configuration last."""
        return [max(reading.step for reading in candidate.readings()) for candidate in self.search.candidates]


def test_without_rungs_every_trial_runs_once_and_no_more_at_a_time_than_fit(planned: Any) -> None:
    player = Player(planned(7, scheduler={"kind": "none"}), slots=3)
    assert not player.agenda.is_over()
    player.play()
    assert player.agenda.is_over() and player.most_running == 3
    assert player.last_steps() == [STEPS] * 7 and set(player.started.values()) == {1}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("slots", [1, 3])
def test_one_slot_is_enough_for_true_successive_halving(planned: Any, slots: int, seed: int) -> None:
    """Of 16 trials 8 pass the first rung and 4 the second; on more slots those that were promoted before the last came are
    added. Whoever waits in vain is told why."""
    player = Player(planned(16, scheduler=PAUSE), slots, seed)
    player.play()
    assert player.agenda.is_over()
    steps = player.last_steps()
    assert steps[-1] == STEPS, "the best reaches the end"
    assert all(step in (2, 4, STEPS) for step in steps), "nobody is trained past a rung that keeps them"
    early = slots - 1
    assert 8 <= sum(step > 2 for step in steps) <= 8 + early
    assert 4 <= sum(step > 4 for step in steps) <= 4 + 2 * early
    if slots == 1:
        assert steps == [2] * 8 + [4] * 4 + [STEPS] * 4
    assert all(candidate.ended() for candidate in player.search.candidates)
    waited = next(iter(player.dismissed.values()))
    assert waited.startswith("stopped at rung 0.") and "one in 2 goes on" in waited


def test_a_trial_that_was_paused_goes_on_and_is_not_begun_anew(planned: Any) -> None:
    player = Player(planned(4, scheduler=PAUSE), slots=1)
    player.play()
    best = player.search.candidates[-1]
    assert [reading.step for reading in best.readings()] == [2, 4, 6, 8]


def test_few_trials_still_have_a_winner(planned: Any) -> None:
    """With fewer trials than eta nobody earns a promotion; at the end the best of the rung gets it all the same."""
    player = Player(planned(2, scheduler={**PAUSE, "eta": 4}), slots=2)
    player.play()
    assert player.last_steps() == [2, STEPS]


@pytest.mark.parametrize("after", [3, 10, 17])
def test_an_interrupted_search_with_waiting_trials_ends_as_an_undisturbed_one_could(planned: Any, after: int) -> None:
    """The second start finds who waits on which rung in the readings alone, and starts nobody twice who need not."""
    search = planned(8, scheduler=PAUSE)
    first = Player(search, slots=1)
    first.play(reports=after)
    waiting = {
        candidate.id
        for candidate in search.candidates
        if candidate.ended() is None and first.rungs.waits(candidate.id)
    }
    second = Player(search, slots=1)
    assert set(second.agenda._waiting) == waiting
    second.play()
    assert second.last_steps()[-1] == STEPS
    assert all(candidate.ended() for candidate in search.candidates)
    for candidate in search.candidates:
        steps = [reading.step for reading in candidate.readings()]
        assert steps == sorted(set(steps))


def test_a_closed_agenda_starts_nobody(planned: Any) -> None:
    player = Player(planned(4), slots=2)
    player.play(reports=1)
    player.agenda.close()
    assert player.agenda.next() is None and not player.agenda.is_over()
    for candidate in player.running:
        player.agenda.returned(candidate)
    assert player.agenda.is_over()


def test_a_trial_that_lost_its_processes_is_the_next_to_start(planned: Any) -> None:
    player = Player(planned(4, scheduler={"kind": "none"}), slots=2)
    player.play(reports=1)
    lost = player.running.pop()
    player.agenda.again(lost)
    assert player.agenda.next() is lost
    player.running.append(lost)
    player.play()
    assert player.agenda.is_over() and player.last_steps() == [STEPS] * 4


def test_finalists_run_again_at_full_length_with_every_seed(planned: Any) -> None:
    search = planned(6, scheduler={"kind": "asha", "eta": 2, "rungs": [0.25]}, finalists={"top": 2, "seeds": 3})
    assert search.finalists() == [] and not search.is_over()
    player = Player(search, slots=2)
    player.play()
    assert player.agenda.is_over() and search.is_over()
    runs = search.finalists()
    assert [len(seeds) for seeds in runs] == [3, 3]
    assert [[candidate.settings.seed for candidate in seeds] for seeds in runs] == [[0, 1, 2]] * 2
    assert runs[0][0] is search.candidates[-1], "the search's own run counts as the first seed"
    assert all(candidate.state == "finished" for seeds in runs for candidate in seeds)
    assert player.started[search.candidates[-1].id] == 1
    finals = search.finals()
    assert [len(final.values) for final in finals] == [3, 3] and finals[0].mean > finals[1].mean
    assert finals[0].spread == pytest.approx(0.0)
    assert search.best() is finals[0].candidate
    assert len(search.everyone()) == 6 + 4


def test_finalists_of_a_search_with_seeds_share_them(planned: Any) -> None:
    search = planned(2, scheduler={"kind": "none"}, seeds=[5, 9], finalists={"top": 1, "seeds": 3})
    Player(search, slots=2).play()
    ((*runs,),) = search.finalists()
    assert [candidate.settings.seed for candidate in runs] == [5, 9, 10]


def test_a_failed_trial_does_not_keep_the_finals_back(planned: Any) -> None:
    search = planned(3, scheduler={"kind": "none"}, finalists={"top": 1, "seeds": 2})
    for candidate in search.candidates[:2]:
        candidate.end("failed", "out of memory")
    player = Player(search, slots=1)
    for candidate in search.candidates[:2]:
        player.agenda._new.remove(candidate)
    player.play()
    assert [candidate.state for seeds in search.finalists() for candidate in seeds] == ["finished", "finished"]


def test_a_sampler_proposes_until_there_are_enough_or_nothing_new(planned: Any) -> None:
    search = planned(5, trials=4, sampler="tpe", scheduler={"kind": "none"})
    assert search.candidates == [] and search.expected == 4
    options = iter([0, 3, 1])

    def propose() -> Candidate | None:
        number = next(options, None)
        return None if number is None else search.adopt({"stages.finetune.optim.lr": number})

    search.claim()
    player = Player(search, slots=1, propose=propose)
    player.play()
    assert [worth(candidate) for candidate in search.candidates] == pytest.approx([0.01, 0.04, 0.02])
    assert search.exhausted and search.expected == 3 and player.agenda.is_over()
    again = plan_search(search.document)
    assert [candidate.id for candidate in again.candidates] == [candidate.id for candidate in search.candidates]
    assert search.adopt({"stages.finetune.optim.lr": 3}) is None, "known already"


def test_rungs_that_stop_have_nobody_waiting(planned: Any) -> None:
    player = Player(planned(6), slots=2)
    assert type(player.rungs) is Rungs
    player.play()
    assert not player.agenda._waiting and not player.dismissed


def test_a_final_that_fails_lets_nobody_else_in(planned: Any) -> None:
    search = planned(3, scheduler={"kind": "none"}, finalists={"top": 1, "seeds": 2})
    player = Player(search, slots=1)
    player.play()
    ((first, second),) = search.finalists()
    first.end("failed", "out of memory")
    assert search.finalists() == [[first, second]] and search.finals() == []
    assert first in search.everyone() and len(search.everyone()) == 4


def test_a_failed_trial_gives_its_place_on_the_rungs_back(planned: Any) -> None:
    """The promoted one dies for good: with few trials nobody would reach the end if its place stayed taken."""
    search = planned(3, scheduler={**PAUSE, "eta": 3, "rungs": [0.25]})
    player = Player(search, slots=1)
    player.play(reports=3)
    doomed = player.agenda.next()
    assert doomed is search.candidates[-1]
    doomed.end("failed", "out of memory")
    player.rungs.forget(doomed.id)  # type: ignore[attr-defined]
    player.agenda.returned(doomed)
    player.play()
    assert [candidate.state for candidate in search.candidates] == ["stopped", "finished", "failed"]
