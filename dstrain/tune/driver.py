"""The driver: Tune's loop around a search, the work it is given, and how it is interrupted."""

from __future__ import annotations

import math
import os
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import ray
from ray import tune
from ray.tune import Stopper
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.search import Searcher
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dstrain.agenda import Agenda
from dstrain.desk import DIED, Desk
from dstrain.memory_limit import SHARES
from dstrain.preparation import Records, texts_of
from dstrain.rungs import HyperbandSettings, PbtSettings
from dstrain.search import Candidate, Search
from dstrain.settings import SearchSettings, plain
from dstrain.tune.bell import BELL, Bell
from dstrain.tune.proposals import learn
from dstrain.tune.resources import Needs, Room
from dstrain.tune.schedulers import RungScheduler, Unpickled, mutable, name_of, ray_scheduler
from dstrain.tune.trial import own_faults, trial

ROOM_SECONDS, REMINDER_SECONDS = 5.0, 600.0
"""So old may be what the driver believes of the cluster's room; so often it says that there is none."""
NODE_PATIENCE = 8
"""So many more deaths of a trial's actor than of its own processes: for half a minute after its end Ray takes a node for
alive, and starts trials there that die at once."""
CALM_SHARE, LONGEST_CALM_SECONDS = 0.02, 1.0
"""Tune's loop would turn ten times a second for days. It waits for this share of the time in which no trial has said anything,
which so comes to an end at most so much later."""
CARRIED = ("DSTRAIN_", "HF_", "NCCL_", "GLOO_", "OMP_", "XDG_CACHE_HOME", "TORCH_EXTENSIONS_DIR")
"""Variables of the driver that every rank gets."""
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
"""What a rank gets whose trial takes no GPU: Ray, as `ray_cluster` starts it, hides none from who asked for none."""


class Driver:
    """Runs what is left of a search under Tune."""

    def __init__(self, search: Search, needs: Needs, stop: threading.Event, records: Records | None = None) -> None:
        """`stop` is set from outside to have every trial save and the search end; `records` are what `prepare` returned."""
        self._search, self._needs, self._stop, self._records = search, needs, stop, records or {}
        self._grace_steps, _ = search.clock()
        self._vacancies = Vacancies(search.settings, needs)

    def run(self) -> bool:
        """True when the search was interrupted before all trials ended."""
        # On the driver's own node: where that ends, the search ends.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        bell = ray.remote(Bell).options(name=BELL, num_cpus=0, max_concurrency=100_000, scheduling_strategy=here).remote()
        with Desk(self._search) as desk:
            trials = self._search.pending()
            while trials and (own := ray_scheduler(self._search, desk)) is not None and not self._stop.is_set():
                known = tune.grid_search([self._announce(bell, candidate) for candidate in trials])
                self._fit(desk, bell, own, param_space={"trial": known})  # Ray's schedulers want all from the start
                trials, desk.left_over = desk.left_over, []
            if not self._stop.is_set():
                self._by_agenda(desk, bell, trials)
        unended = any(candidate.ended() is None for candidate in self._search.everyone())
        return unended or (self._stop.is_set() and not self._search.is_over())

    def _by_agenda(self, desk: Desk, bell: Any, trials: list[Candidate]) -> None:
        propose = learn(self._search) if self._search.space is not None else None
        agenda = Agenda(self._search, desk.rungs, self._vacancies, desk.dismissed, trials, propose)
        desk.agenda = agenda
        self._fit(desk, bell, RungScheduler(desk), search_alg=Asking(agenda, partial(self._announce, bell), self._stop))

    def _fit(self, desk: Desk, bell: Any, scheduler: Any, search_alg: Any = None, param_space: Any = None) -> None:
        search, grid = self._search, search_alg is None
        bundles = [{"CPU": 0.0}] + [self._needs.bundle] * self._needs.ranks
        strategy = "STRICT_PACK" if self._needs.together else "PACK"
        tuner = tune.Tuner(
            tune.with_resources(trial, tune.PlacementGroupFactory(bundles, strategy=strategy)),
            param_space=param_space,
            tune_config=tune.TuneConfig(
                metric="value", mode=search.settings.mode, scheduler=scheduler, search_alg=search_alg, reuse_actors=True,
                num_samples=1 if grid else -1, max_concurrent_trials=search.settings.max_concurrent if grid else None,
                trial_name_creator=name_of, trial_dirname_creator=_folder_name,
            ),
            run_config=tune.RunConfig(
                name=time.strftime("%Y%m%d-%H%M%S"), storage_path=str((search.folder / "ray").resolve()), verbose=0,
                callbacks=[Events(desk, bell, self._stop, self._vacancies)], stop=Until(desk, self._stop),
                failure_config=tune.FailureConfig(max_failures=search.settings.max_failures + NODE_PATIENCE),
                checkpoint_config=tune.CheckpointConfig(num_to_keep=4),  # only PBT hands Tune any
            ),
        )  # fmt: skip
        # In the main thread Tune would take our signals. Its warnings are advice on what is done on purpose.
        with ThreadPoolExecutor(1, thread_name_prefix="tune") as thread, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            thread.submit(tuner.fit).result()

    def _announce(self, bell: Any, candidate: Candidate) -> dict[str, Any]:
        """Tells the bell what a trial is to do, and returns what Tune is to know of it."""
        ray.get(bell.expect.remote(candidate.id, self._plan(candidate)))
        exchanging = isinstance(self._search.settings.scheduler, PbtSettings)
        return {"id": candidate.id, **({"mutable": mutable(self._search, candidate)} if exchanging else {})}

    def _share(self) -> dict[str, str]:
        return {SHARES: str(self._vacancies.sharing(self._search.expected))}

    def _plan(self, candidate: Candidate) -> dict[str, Any]:
        """All that a trial's actor needs, as plain data."""
        search = self._search
        return {
            "id": candidate.id,
            "run": dict(plain(candidate.settings)),
            "source": search.document.source,
            "metric": search.settings.metric,
            "texts": {name: plain(text) for name, text in texts_of(self._records, candidate.settings).items()},
            "ranks": self._needs.ranks,
            "bundle": self._needs.bundle,
            "grace_steps": self._grace_steps,
            "faults_allowed": own_faults(candidate.folder) + search.settings.max_failures,  # anew with every start
            "on_same_seats": not isinstance(search.settings.scheduler, (HyperbandSettings, PbtSettings)),
            "silence_seconds": 60 * search.settings.silence_minutes,
            "environ": {**_carried(os.environ), **self._share(), **({} if self._needs.gpus else NO_GPU)},
        }


def _carried(environ: Mapping[str, str]) -> dict[str, str]:
    """What goes with every rank; no secret does, since Tune writes what trials are given to disk."""
    return {name: value for name, value in environ.items() if name.startswith(CARRIED) and "TOKEN" not in name}


def _folder_name(trial: Any) -> str:
    """A folder of Tune's own for each start: a trial that waited on a rung starts more than once."""
    return f"{name_of(trial)}-{trial.trial_id}"


class Vacancies:
    """How many trials fit, asked of the cluster now and then, and what is to be said while none does."""

    def __init__(self, settings: SearchSettings, needs: Needs) -> None:
        self._settings, self._needs = settings, needs
        self._room, self._asked = Room(()), -math.inf
        self._empty_since: float | None = None
        self._reminded = 0.0

    def __call__(self) -> int:
        """How many trials fit."""
        if time.monotonic() - self._asked > ROOM_SECONDS:
            self._asked, self._room = time.monotonic(), Room.of_cluster()
        return self._room.concurrent(self._needs, self._settings.max_concurrent)

    def sharing(self, trials: int) -> int:
        """How many ranks of so many trials may come to share a node and its memory."""
        self()
        finalists = self._settings.finalists
        most = max(trials, finalists.top * finalists.seeds if finalists else 0)
        return self._room.ranks_on_a_node(self._needs, min(most, self._settings.max_concurrent or most))

    def look(self, say: Callable[[str], None]) -> bool:
        """Says now and then that no trial fits any more, as when a node was lost; whether that lasts too long to wait on."""
        now, minutes = time.monotonic(), self._settings.silence_minutes
        if self():
            if self._empty_since is not None:
                say("a trial fits again")
            self._empty_since = None
            return False
        if self._empty_since is None:
            self._empty_since, self._reminded = now, -math.inf
        if now - self._empty_since > 60 * minutes:
            say(f"no trial has fitted for {minutes:g} minutes (search.silence_minutes); the search ends for now")
            return True
        if now - self._reminded > REMINDER_SECONDS:
            self._reminded = now
            say(
                f"no trial fits any more: {self._needs.describe()}, and the cluster has {self._room.describe()}; "
                f"waiting {minutes:g} minutes for a node to come back (search.silence_minutes)"
            )
        return False


# ------------------------------------------------------------------------------------------- Tune's hooks


class Asking(Unpickled, Searcher):
    """Tune's view of the agenda."""

    def __init__(
        self, agenda: Agenda, announce: Callable[[Candidate], dict[str, Any]], stop: threading.Event
    ) -> None:
        super().__init__()
        self._agenda, self._announce, self._stop = agenda, announce, stop

    def set_search_properties(self, metric: str | None, mode: str | None, config: Any, **spec: Any) -> bool:
        """Nothing to set: the agenda knows what it searches."""
        return True

    def suggest(self, trial_id: str) -> Any:
        """Whom to start now: None for nobody just now, or that all is done."""
        if self._stop.is_set():
            self._agenda.close()  # while nothing runs Tune asks here only, and no event comes
        candidate = self._agenda.next()
        if candidate is not None:
            return {"trial": self._announce(candidate)}
        return Searcher.FINISHED if self._agenda.is_over() else None

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """The desk is told by `Events`."""

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Nothing to save: the search's folder is the state."""


class Until(Unpickled, Stopper):
    """Ends the loop of an interrupted search once every running trial has saved and gone."""

    def __init__(self, desk: Desk, stop: threading.Event) -> None:
        self._desk, self._stop = desk, stop

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No trial is stopped on its own here."""
        return False

    def stop_all(self) -> bool:
        """Whether all is over."""
        return self._stop.is_set() and self._desk.idle


class Events(Unpickled, TrialProgressCallback):
    """Tune's events, told to the desk; when the search is asked to stop, the bell rings.

    A TrialProgressCallback only by name: without one Tune adds its own, which prints.
    """

    def __init__(self, desk: Desk, bell: Any, stop: threading.Event, vacancies: Vacancies) -> None:
        self._desk, self._bell, self._stop, self._vacancies = desk, bell, stop, vacancies
        self._rung = False
        self._paused: set[str] = set()
        self._failed: set[str] = set()
        self._happened = time.monotonic()

    def _dismiss(self, trial: Any, for_good: bool) -> None:
        """Has a trial that Tune will not ask again, or not soon, give its seats back."""
        ray.get(self._bell.dismiss.remote(name_of(trial), for_good))
        if for_good:  # Tune keeps means of every number that a trial has reported, which nobody asks for
            trial.run_metadata.metric_analysis.clear()
            trial.run_metadata.metric_n_steps.clear()

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Before every turn of Tune's loop."""
        if self._stop.is_set() and not self._rung:
            self._rung = True
            self._desk.close()
            self._bell.ring.remote()

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """After every turn of Tune's loop."""
        for one in trials:
            if one.status == "ERROR" and one.trial_id not in self._failed:  # Tune does not tell of all that it fails
                self.on_trial_error(iteration, trials, one)
        paused = {one.trial_id: one for one in trials if one.status == "PAUSED"}
        for trial_id in paused.keys() - self._paused:
            self._dismiss(paused[trial_id], for_good=False)
        self._paused = set(paused)
        if self._rung:
            self._desk.idle = not any(trial.status == "RUNNING" for trial in trials)
        elif self._vacancies.look(self._desk.say):
            self._stop.set()
        else:
            calm = CALM_SHARE * (time.monotonic() - self._happened)
            self._stop.wait(min(calm, LONGEST_CALM_SECONDS))

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
        """A trial has reported."""
        self._happened = time.monotonic()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial's actor lives."""
        self._happened = time.monotonic()
        self._desk.started(name_of(trial))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has returned, or was stopped."""
        self._happened = time.monotonic()
        self._dismiss(trial, for_good=True)
        self._desk.ended(name_of(trial), None)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial died and is started again."""
        self._happened = time.monotonic()
        self._desk.died(name_of(trial))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial died and Tune does not start it again.

        One that has failures to spare we do: it was about to reuse an actor that is gone with its node. Tune may have tried to
        recover that, but gives up when it hears of the same death a second time, from the task that was to begin the trial.
        """
        self._happened = time.monotonic()
        self._failed.add(trial.trial_id)
        self._dismiss(trial, for_good=True)
        if trial.should_recover():
            self._desk.lost(name_of(trial))
        else:
            self._desk.ended(name_of(trial), DIED)
