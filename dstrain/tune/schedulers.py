"""Who is stopped, paused or changed, in Tune's terms: our rungs, and Ray's own Hyperband and PBT."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from ray.tune.schedulers import FIFOScheduler, HyperBandScheduler, PopulationBasedTraining, TrialScheduler

from dstrain.desk import Desk
from dstrain.exchange import settings_now
from dstrain.rungs import HyperbandSettings, PbtSettings
from dstrain.schema import UserError
from dstrain.search import Candidate, Search
from dstrain.space import Axis, read_axes


def name_of(trial: Any) -> str:
    """The id of our candidate behind a trial of Tune's."""
    return str(trial.config["trial"]["id"])


class Unpickled:
    """Tune pickles schedulers, searchers and callbacks beside its own state. Nothing ever reads that back, and what they
    hold (threads, files, locks) cannot travel, so nothing of them is written."""

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Unpickled:
        return self


class RungScheduler(Unpickled, FIFOScheduler):
    """First come, first served; a trial gives its processes back when its rung says so."""

    def __init__(self, desk: Desk) -> None:
        super().__init__()
        self._desk = desk

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Tune's question after every report."""
        if "fault" in result:
            self._desk.died(name_of(trial), result["fault"])
            return str(TrialScheduler.CONTINUE)
        keep = self._desk.reported(name_of(trial), result["progress"], result["value"])
        return str(TrialScheduler.CONTINUE if keep else TrialScheduler.STOP)


def ray_scheduler(search: Search, desk: Desk) -> Any:
    """Ray's Hyperband or PBT; None for the kinds that rungs serve."""
    settings = search.settings.scheduler
    grace, horizon = search.clock()
    if isinstance(settings, HyperbandSettings):
        return Hyperband(settings, horizon - grace, desk)
    if isinstance(settings, PbtSettings):
        interval = settings.interval if isinstance(settings.interval, int) else settings.interval * horizon
        return Pbt(settings, max(1.0, interval), mutable_axes(search), desk)
    return None


class Watched(Unpickled):
    """One of Ray's schedulers with the desk told of every report, and no trial stopped at its end: it is still to be tested."""

    desk: Desk

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Tune's question after every report."""
        self.desk.reported(name_of(trial), result["progress"], result["value"])
        if result["progress"] >= 1.0:
            return str(TrialScheduler.CONTINUE)
        return str(super().on_trial_result(tune_controller, trial, result))  # type: ignore[misc]


class Hyperband(Watched, HyperBandScheduler):
    """Ray's, on a clock that starts at the grace."""

    def __init__(self, settings: HyperbandSettings, length: int, desk: Desk) -> None:
        self.desk = desk
        super().__init__(
            time_attr="credit", max_t=max(1, length), reduction_factor=settings.eta, stop_last_trials=False
        )

    def _process_bracket(self, tune_controller: Any, bracket: Any) -> str:
        """Ray's, again while all trials are past the next milestone already, as they are where evaluations lie further
        apart; and with its flag against re-entry taken back, without which a later death leaves the others paused."""
        while True:
            action = str(super()._process_bracket(tune_controller, bracket))
            bracket.is_being_processed = False
            if action != TrialScheduler.PAUSE or not bracket.current_trials() or not bracket.cur_iter_done():
                return action


class Pbt(Watched, PopulationBasedTraining):
    """Ray's, but a trial that takes over another's weights and settings stays itself: its id and folder are its own."""

    def __init__(self, settings: PbtSettings, interval: float, axes: list[Axis], desk: Desk) -> None:
        self.desk = desk
        super().__init__(
            time_attr="credit", perturbation_interval=interval, burn_in_period=1,
            hyperparam_mutations={"trial": {"mutable": {axis.addresses[0]: _mutation(axis) for axis in axes}}},
            quantile_fraction=settings.quantile, resample_probability=settings.resample, log_config=False,
            custom_explore_fn=_bounded(axes),
        )  # fmt: skip

    def _get_new_config(self, trial: Any, trial_to_clone: Any) -> Any:
        config, operations = super()._get_new_config(trial, trial_to_clone)
        now = config["trial"]["mutable"]
        self.desk.exchanged(name_of(trial), name_of(trial_to_clone), now)
        return {**config, "trial": {**trial.config["trial"], "mutable": now}}, operations


def mutable_axes(search: Search) -> list[Axis]:
    """The axes of a space that PBT may change while a trial runs. Raises UserError for one that shapes the model or the
    data: the weights of another trial would not fit."""
    axes, _ = read_axes(search.document.space)
    for axis in axes:
        (address, *others) = axis.addresses
        if others or not (".optim." in address or address.endswith("dropout")):
            raise UserError(
                f"{search.document.source}: space.{axis.key}: pbt changes settings while a trial trains, and this one "
                "cannot change then; search over optim.* and dropouts, or take another scheduler"
            )
    return axes


def _mutation(axis: Axis) -> Callable[[], Any] | list[Any]:
    if axis.options:
        return [option for (option,) in axis.options]
    return lambda: axis.draw(random.Random())[0]  # Ray's PBT draws from the global generator as well


def _bounded(axes: list[Axis]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Keeps what a factor of 1.2 or 0.8 made within the bounds of its axis, and whole where it is a count."""

    def bound(config: dict[str, Any]) -> dict[str, Any]:
        now = config["trial"]["mutable"]
        for axis in axes:
            if not axis.options:
                (address,) = axis.addresses
                value = min(max(now[address], axis.low), axis.high)
                now[address] = round(value) if axis.kind == "int_uniform" else value
        return config

    return bound


def mutable(search: Search, candidate: Candidate) -> dict[str, Any]:
    """The settings of a trial that PBT may change, as the last exchange left them."""
    first = {axis.addresses[0]: candidate.trial.overrides[axis.addresses[0]] for axis in mutable_axes(search)}
    return {**first, **settings_now(candidate.folder)}
