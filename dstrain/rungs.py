"""Which trials a search stops early: asynchronous successive halving (Li et al. 2018, arXiv 1810.05934).

A rung is a place on the way through the stage that owns the search's metric, as a share of that stage (its horizon).
The first report at or past a rung enters the trial there; a trial goes on while it is among the best 1/eta of all that
have entered, on every rung it has passed. Nobody waits for anybody. Where trials are stopped (`on_rung: stop`) three
things differ from the paper's pseudocode:

- The best two of a rung always stay: with fewer than 2 * eta values the best 1/eta would be a single trial, and chance
  decides which of two equals comes first.
- Each report asks all rungs passed so far again. The first trials to arrive find a rung empty and pass it whatever they
  are worth; they are stopped later, when it has filled.
- The first rung (the grace) stands, unless the file says otherwise, at twice the warm-up, and where layers are frozen
  a third of the way from the latest thaw of any trial to the end. Trials with frozen layers start behind and overtake
  after the thaw: a rung before it throws the winner away, and a rung right after it is a coin toss.

With `on_rung: pause` a trial that enters a rung waits there. Once every trial has begun, and whenever there is room, the
best waiting trial among the best 1/eta of its rung goes on from its checkpoint, from the lowest rung that has one. On one
GPU that is successive halving itself; on many nobody waits for a rung to be complete.

docs/search.md has the replay of published curves that these defaults rest on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, PlainValidator, model_validator

from dstrain.schema import Settings, UserError, setting

LEAST_GRACE = 0.1
"""Share of the stage before which no default grace lies, however short the warm-up."""
ALWAYS_KEPT = 2
"""So many of a rung's best are never stopped."""
_ROUNDING = 1e-9


def _place(value: Any) -> int | float:
    steps = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    share = isinstance(value, float) and 0 < value < 1
    if not (steps or share):
        raise ValueError(
            f"{value!r} is neither a whole number of optimizer steps (1 or more) nor a share of the stage "
            "(a number with a point, above 0.0 and below 1.0)"
        )
    return value


def _grace(value: Any) -> int | float | Literal["auto"]:
    return "auto" if value == "auto" else _place(value)


Place = Annotated[int | float, PlainValidator(_place)]
"""Where a rung stands: a whole number counts optimizer steps, a number with a point is a share of the stage."""


class AshaSettings(Settings):
    """Asynchronous successive halving: trials that fall behind are stopped."""

    kind: Literal["asha"] = "asha"
    on_rung: Literal["stop", "pause"] = "stop"
    """stop ends who falls behind; pause lets every trial wait on its rung, and the best go on from their checkpoints."""
    grace: Annotated[int | float | Literal["auto"], PlainValidator(_grace)] = "auto"
    """No trial is stopped before this: optimizer steps (an integer) or a share of the stage (0.5); auto is twice the
    warm-up, and a third of the way from the latest thaw to the end where any trial freezes layers."""
    eta: int = setting(3, ge=2, le=100)
    """One in eta trials passes a rung, and each rung stands eta times as far as the one before."""
    rungs: tuple[Place, ...] = ()
    """Where the rungs stand instead of grace, grace * eta, grace * eta^2, ...; steps or shares, as for grace."""

    @model_validator(mode="after")
    def _said_once(self) -> AshaSettings:
        if self.rungs and self.grace != "auto":
            raise ValueError("has both grace and rungs; the first of the rungs is the grace, so leave grace out")
        return self


class NoSchedulerSettings(Settings):
    """Every trial runs to its end."""

    kind: Literal["none"] = "none"


class HyperbandSettings(Settings):
    """Ray's synchronous Hyperband (Li et al. 2018, arXiv 1603.06560): brackets that trade trials against their length.

    Its clock starts at the grace, so that nothing is decided before (see AshaSettings).
    """

    kind: Literal["hyperband"] = "hyperband"
    grace: Annotated[int | float | Literal["auto"], PlainValidator(_grace)] = "auto"
    """As for asha."""
    eta: int = setting(3, ge=2, le=100)
    """One in eta trials goes on at each halving."""


class PbtSettings(Settings):
    """Ray's population based training (Jaderberg et al. 2017, arXiv 1711.09846).

    At every interval the worst trials go on from the checkpoints of the best, with their hyperparameters changed.
    """

    kind: Literal["pbt"] = "pbt"
    interval: Place = 0.1
    """Distance between exchanges: optimizer steps (an integer) or a share of the stage."""
    grace: Annotated[int | float | Literal["auto"], PlainValidator(_grace)] = "auto"
    """No exchange before this; as for asha."""
    quantile: float = setting(0.25, gt=0, le=0.5)
    """This share of the population is replaced by, and chosen from, the share at the other end."""
    resample: float = setting(0.25, ge=0, le=1)
    """How often a value is drawn anew instead of being changed by a factor of 1.2 or 0.8."""


SchedulerSettings = Annotated[
    AshaSettings | HyperbandSettings | PbtSettings | NoSchedulerSettings, Field(discriminator="kind")
]


def default_grace(warmup: float, thaw: float) -> float:
    """The first rung as a share of the stage, where nobody said otherwise.

    `warmup` is the share of the stage that warms up, `thaw` the latest share at which any trial's layers thaw (0.0: no
    trial freezes any).
    """
    return max(LEAST_GRACE, min(2 * warmup, (1 + warmup) / 2), thaw + (1 - thaw) / 3 if thaw else 0.0)


def rung_places(settings: AshaSettings, warmup: float, thaw: float, horizon: int) -> tuple[float, ...]:
    """Where the rungs stand, as ascending shares of the stage; `horizon` is the stage's length in optimizer steps.

    Raises UserError for a rung at or past the end, which would stop nothing.
    """
    if settings.rungs:
        return tuple(sorted({_share("search.scheduler.rungs", place, horizon) for place in settings.rungs}))
    first = grace_of(settings, warmup, thaw, horizon)
    count = math.ceil(math.log(1 / first, settings.eta) - _ROUNDING) if first < 1 else 0
    return tuple(first * settings.eta**power for power in range(count))


def grace_of(
    settings: AshaSettings | HyperbandSettings | PbtSettings, warmup: float, thaw: float, horizon: int
) -> float:
    """The share of the stage before which nothing is decided. Raises UserError for one at or past the end."""
    if settings.grace == "auto":
        return default_grace(warmup, thaw)
    return _share("search.scheduler.grace", settings.grace, horizon)


def _share(address: str, place: Any, horizon: int) -> float:
    if isinstance(place, int) and place >= horizon:
        raise UserError(
            f"{address}: {place} steps, but the stage has {horizon}, so no trial would be stopped; "
            "take a smaller number, a share such as 0.5, or scheduler: {kind: none}"
        )
    return place / horizon if isinstance(place, int) else float(place)


def early_cut(settings: SchedulerSettings, warmup: float, thaw: float, horizon: int) -> str | None:
    """The warning for a first rung that stands before the default one, with the numbers; None when there is none."""
    if isinstance(settings, NoSchedulerSettings):
        return None
    default = default_grace(warmup, thaw)
    places = rung_places(settings, warmup, thaw, horizon) if isinstance(settings, AshaSettings) else ()
    first = min(places, default=grace_of(settings, warmup, thaw, horizon))
    if first >= default - _ROUNDING:
        return None

    def step(share: float) -> str:
        return f"{share:.2g} of the stage (step {math.ceil(share * horizon - _ROUNDING)} of {horizon})"

    thawed = f" and the last frozen layers thaw at {step(thaw)}" if thaw else ""
    place = "rungs" if getattr(settings, "rungs", ()) else "grace"
    return (
        f"search.scheduler.{place}: trials are stopped from {step(first)} on, but "
        f"warm-up ends at {step(warmup)}{thawed}; who starts behind overtakes later, so the winner may be thrown away; "
        f"grace: auto waits until {step(default)}"
    )


class Decision(NamedTuple):
    """Whether a trial goes on, and why."""

    keep: bool
    reason: str


class History(NamedTuple):
    """What one trial has reported: (share of the stage, value of the metric), in order."""

    trial_id: str
    reports: Sequence[tuple[float, float]]


class Rungs:
    """The rungs of one search and who stands on them.

    What stands on a rung depends only on the trials' reports, not on their order or on how often a report comes, so a
    search that goes on after an interruption, and a trial that goes on from a checkpoint, find the rungs as they were.
    """

    def __init__(self, places: Sequence[float], eta: int, mode: Literal["min", "max"]) -> None:
        """`places` are ascending shares of the stage (none of them: nothing is ever stopped)."""
        assert list(places) == sorted(places)
        self.places = tuple(places)
        self._eta = eta
        self._sign = 1.0 if mode == "max" else -1.0
        self._scores: tuple[dict[str, float], ...] = tuple({} for _ in places)

    def record(self, trial_id: str, progress: float, value: float) -> Decision:
        """Takes in a report and decides. `progress` is the share of the trial's stage that is done, in (0, 1].

        A value that is not a finite number ranks last and stops the trial at once; a trial at its end is never stopped.
        """
        if not self.places or progress >= 1 - _ROUNDING:
            return Decision(True, "reached its end" if progress >= 1 - _ROUNDING else "nothing is stopped early")
        self._enter(trial_id, progress, value)
        if not math.isfinite(value):
            return Decision(False, f"stopped at {progress:.2f} of the stage: the metric is {value}")
        passed = [index for index, scores in enumerate(self._scores) if trial_id in scores]
        for index in passed:
            if self._scores[index][trial_id] < self._cut(index):
                return Decision(False, self._why(trial_id, index))
        return Decision(True, self._standing(trial_id, passed))

    def replay(self, history: Iterable[History]) -> None:
        """Puts earlier reports back on their rungs, deciding nothing."""
        for trial in history:
            for progress, value in trial.reports:
                if progress < 1 - _ROUNDING:
                    self._enter(trial.trial_id, progress, value)

    def state(self) -> list[dict[str, Any]]:
        """The rungs as plain data: place, and value by trial (None for a value that was no number)."""
        return [
            {"place": place, "values": {trial: self._value(score) for trial, score in sorted(scores.items())}}
            for place, scores in zip(self.places, self._scores, strict=True)
        ]

    def _value(self, score: float) -> float | None:
        return self._sign * score if math.isfinite(score) else None

    def _enter(self, trial_id: str, progress: float, value: float) -> None:
        # Only the highest rung newly passed: a late value on an early rung would be unfair to all who stand there.
        index = max((i for i, place in enumerate(self.places) if progress >= place - _ROUNDING), default=-1)
        if index >= 0 and not any(trial_id in scores for scores in self._scores[index:]):
            self._scores[index][trial_id] = self._sign * value if math.isfinite(value) else -math.inf

    def _cut(self, index: int) -> float:
        ranked = sorted(self._scores[index].values(), reverse=True)
        return ranked[min(len(ranked), self._kept(index)) - 1]

    def _kept(self, index: int) -> int:
        return max(ALWAYS_KEPT, math.ceil(len(self._scores[index]) / self._eta))

    def _why(self, trial_id: str, index: int) -> str:
        count = len(self._scores[index])
        part = {2: "half", 3: "third", 4: "quarter"}.get(self._eta, f"1/{self._eta}")
        best = part if math.ceil(count / self._eta) >= ALWAYS_KEPT else "two"
        own, cut = self._sign * self._scores[index][trial_id], self._sign * self._cut(index)
        side = "below" if self._sign > 0 else "above"
        rung = f"{self.places[index]:.2f}"
        return f"stopped at rung {rung}: {own:.4g} {side} the best {best} of {count}, cut at {cut:.4g}"

    def _standing(self, trial_id: str, passed: Sequence[int]) -> str:
        if not passed:
            return f"before the first rung at {self.places[0]:.2f}"
        scores = self._scores[passed[-1]]
        rank = 1 + sum(score > scores[trial_id] for score in scores.values())
        return f"rank {rank} of {len(scores)} at rung {self.places[passed[-1]]:.2f}"


class Promotions(Rungs):
    """Rungs on which trials wait: the best 1/eta of a rung go on from there, when somebody asks for work.

    Here `keep` of a decision means that the trial need not wait: it is between two rungs.
    """

    def __init__(self, places: Sequence[float], eta: int, mode: Literal["min", "max"]) -> None:
        """As for `Rungs`."""
        super().__init__(places, eta, mode)
        self._gone_on: tuple[set[str], ...] = tuple(set() for _ in places)

    def record(self, trial_id: str, progress: float, value: float) -> Decision:
        """Takes in a report and decides whether the trial goes on at once."""
        if not self.places or progress >= 1 - _ROUNDING:
            return Decision(True, "reached its end" if progress >= 1 - _ROUNDING else "nothing waits")
        self._enter(trial_id, progress, value)
        if not math.isfinite(value):
            return Decision(False, f"stopped at {progress:.2f} of the stage: the metric is {value}")
        if not self.waits(trial_id):
            return Decision(True, "is on its way to the next rung")
        return Decision(False, f"waits at rung {self.places[self._highest(trial_id)]:.2f}")

    def replay(self, history: Iterable[History]) -> None:
        """Puts earlier reports back on their rungs; who reported past a rung had gone on from it."""
        for trial in history:
            for progress, value in trial.reports:
                here = self._highest(trial.trial_id)
                if here >= 0:
                    self._gone_on[here].add(trial.trial_id)
                if progress < 1 - _ROUNDING:
                    self._enter(trial.trial_id, progress, value)

    def waits(self, trial_id: str) -> bool:
        """Whether the trial stands on a rung from which it has not gone on."""
        index = self._highest(trial_id)
        return index >= 0 and math.isfinite(self._scores[index][trial_id]) and trial_id not in self._gone_on[index]

    def promote(self, waiting: Iterable[str], last_chance: bool) -> str | None:
        """The waiting trial that goes on next, from the lowest rung that has one; None when none has earned it.

        `last_chance` says that no other trial will come: then the best of every rung goes on, however few stand there.
        """
        wanted = set(waiting)
        for index in range(len(self.places)):
            for trial_id in self._best_waiting(index, last_chance):
                if trial_id in wanted:
                    self._gone_on[index].add(trial_id)
                    return trial_id
        return None

    def forget(self, trial_id: str) -> None:
        """A trial has failed: its place on the rungs is free for another."""
        for scores, gone_on in zip(self._scores, self._gone_on, strict=True):
            scores.pop(trial_id, None)
            gone_on.discard(trial_id)

    def why_not(self, trial_id: str) -> str:
        """Why a waiting trial is not trained any further."""
        index = self._highest(trial_id)
        scores = self._scores[index]
        rank = 1 + sum(score > scores[trial_id] for score in scores.values())
        return f"stopped at rung {self.places[index]:.2f}: rank {rank} of {len(scores)}, one in {self._eta} goes on"

    def _highest(self, trial_id: str) -> int:
        return max((index for index, scores in enumerate(self._scores) if trial_id in scores), default=-1)

    def _best_waiting(self, index: int, last_chance: bool) -> list[str]:
        scores = self._scores[index]
        ranked = sorted((one for one in scores if math.isfinite(scores[one])), key=lambda one: (-scores[one], one))
        passing = max(len(scores) // self._eta, int(last_chance))
        return [one for one in ranked[:passing] if one not in self._gone_on[index]]


def open_rungs(
    settings: SchedulerSettings, mode: Literal["min", "max"], warmup: float, thaw: float, horizon: int
) -> Rungs:
    """The empty rungs of a search; `warmup`, `thaw` and `horizon` as for `rung_places`. Raises UserError.

    Hyperband and PBT keep their own account within Ray: for them there are no rungs here.
    """
    if not isinstance(settings, AshaSettings):
        return Rungs((), 2, mode)
    kind = Promotions if settings.on_rung == "pause" else Rungs
    return kind(rung_places(settings, warmup, thaw, horizon), settings.eta, mode)
