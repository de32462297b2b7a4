"""One trial under Tune: an actor that has its run trained on its seats, passes on what is reported, and frees them.

Tune gives its actor, and with it the seats, to the next trial; the processes that trained are gone by then. All that must
outlive a process lies in the run folder, so a trial that is started again goes on from its last checkpoint.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray import tune
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from dstrain.tune.bell import BELL
from dstrain.tune.rank import write_failure
from dstrain.tune.seat import Seat

_seats: list[Any] = []
"""The seats of this actor, one a rank, which trial after trial uses."""
os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", "60")  # so long Tune waits for a trial to have freed them
IMPORT_SECONDS = 300.0
"""Before its first word a trial on a new seat imports, which on a busy machine takes longer than some silences."""


class Progress(NamedTuple):
    """A reading of the deciding metric."""

    step: int
    total_steps: int
    value: float


class Fault(Exception):
    """A trial cannot go on, and may be started again."""


class Hopeless(Exception):
    """A trial cannot go on, and another attempt would end the same."""


def trial(config: dict[str, Any]) -> None:
    """A Tune function trainable: has the ranks trained, reports what they report, ends when they end.

    A mistake of the user's or a diverged loss ends the trial for good. Anything else is a fault after which it goes on from
    its checkpoint: on the same seats, which have imported everything; where that has not helped, or a seat is lost, and under
    Ray's own schedulers, by Tune, on new ones. After search.max_failures faults it ends as failed.
    """
    asked = config["trial"]
    fault = _attempt(asked, retry=False)
    while fault:
        tune.report({"fault": fault})
        fault = _attempt(asked, retry=True)


def _attempt(asked: Mapping[str, Any], retry: bool) -> str:
    """Has the run trained to its end; returns the fault that ended it if it is to go on on the same seats, else nothing."""
    bell, start = ray.get_actor(BELL), uuid.uuid4().hex
    told: Any = ray.get(bell.begin.remote(asked["id"]))
    if told is None:
        return ""
    plan = {**told, **asked}  # with what PBT has changed
    folder, progressed = Path(plan["run"]["output_dir"]) / plan["run"]["name"], False
    try:
        run = _run_of(plan, folder)
        seats = _take_seats(plan)
        threading.Thread(target=_free_when_dismissed, args=(bell, plan["id"], seats, start), daemon=True).start()
        _begin(seats, start, plan, run)
        for step, total, value in _progress(seats, bell, plan["silence_seconds"]):
            figures = {
                "progress": step / total, "steps": step, "value": value, "credit": max(0, step - plan["grace_steps"]),
            }  # fmt: skip
            with _exchanged(folder, plan) as checkpoint:
                tune.report(figures, checkpoint=checkpoint)  # raises SystemExit when Tune is done with this trial
            ray.get(seats[0].go_on.remote())
            progressed = True
        return ""
    except Hopeless:
        return ""
    except Exception as error:
        write_failure(folder, error, reason_of(error))  # unless a rank has written its own
        _free(_seats, start)
        if own_faults(folder) >= plan["faults_allowed"]:
            return ""
        if isinstance(error, Fault) and _seats and plan["on_same_seats"] and (progressed or not retry):
            return str(error)
        _give_up_seats(_seats)
        raise
    finally:
        _free(_seats, start)


# ------------------------------------------------------------------------------------------------ the seats


def _take_seats(plan: Mapping[str, Any]) -> Sequence[Any]:
    """This actor's seats; new ones where it has none yet or lost one with its node."""
    if not _seats:
        group = ray.util.get_current_placement_group()
        assert group is not None, "a trial runs in the placement group that Tune reserved for it"
        actor, bundle = ray.remote(Seat), plan["bundle"]
        _seats.extend(
            actor.options(
                num_cpus=bundle["CPU"], num_gpus=bundle.get("GPU", 0), max_concurrency=8,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
            ).remote(plan["environ"])
            for rank in range(plan["ranks"])
        )  # fmt: skip
    return tuple(_seats)


def _begin(seats: Sequence[Any], start: str, plan: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Gives every seat its order. LOCAL_RANK is 0 because Ray shows each seat its own device only."""
    address, port = ray.get(seats[0].address.remote())
    place = {
        "WORLD_SIZE": str(len(seats)), "LOCAL_RANK": "0", "MASTER_ADDR": address, "MASTER_PORT": str(port),
        "DSTRAIN_LAUNCHER": "ray",
    }  # fmt: skip
    order = {"run": run, **{name: plan[name] for name in ("source", "metric", "texts")}}
    ray.get([
        seat.begin.remote(start, {**order, "environ": {**place, "RANK": str(rank)}})
        for rank, seat in enumerate(seats)
    ])  # fmt: skip


def _free(seats: Sequence[Any], start: str) -> None:
    """Ends what still trains on the seats since this start; where one is beyond our reach all are given up."""
    try:
        free = ray.get([seat.end.remote(start) for seat in seats], timeout=30)
    except Exception:
        free = [False]
    if not all(free):
        _give_up_seats(seats)


def _give_up_seats(seats: Sequence[Any]) -> None:
    for seat in tuple(seats):
        ray.kill(seat)
        if seat in _seats:  # and not those that a later trial took
            _seats.remove(seat)


def _free_when_dismissed(bell: Any, name: str, seats: Sequence[Any], start: str) -> None:
    """Frees the seats of a trial that Tune has stopped or paused: Tune itself tells only when it needs the actor again."""
    ray.get(bell.dismissed.remote(name))
    _free(seats, start)


def _progress(seats: Sequence[Any], bell: Any, silence_seconds: float) -> Iterator[Progress]:
    """The readings of rank 0 until all ranks have ended.

    When the search's bell rings all ranks are told to stop. Raises Fault or Hopeless with the first rank that fails.
    """
    rung = bell.rung.remote()
    asked = {seat.news.remote(): seat for seat in seats}
    heard, patience = time.monotonic(), max(silence_seconds, IMPORT_SECONDS)
    while asked:
        listening = [*asked, *([rung] if rung is not None else [])]
        done, _ = ray.wait(listening, num_returns=1, timeout=max(0.0, heard + patience - time.monotonic()))
        if not done:
            raise Fault(f"hung: reported nothing for {patience / 60:g} minutes (search.silence_minutes)")
        found = ray.get(done[0])
        if done[0] == rung:
            rung = None
            ray.get([seat.stop.remote() for seat in seats])
            continue
        seat = asked.pop(done[0])
        if "ended" in found:
            _check(found["ended"])
            continue
        if "progress" in found:
            yield Progress(*found["progress"])
        heard, patience = time.monotonic(), silence_seconds  # what Tune took to answer is not the trial's silence
        asked[seat.news.remote()] = seat


def _check(status: int) -> None:
    """Raises what the exit status of a rank says."""
    if status == 2:
        raise Hopeless
    if status < 0:
        raise Fault(f"a process was killed by {signal.Signals(-status).name} (out of memory, if nobody sent it)")
    if status:
        raise Fault(f"a process ended with status {status} and without a word")


# -------------------------------------------------------------------------------------------------- the run


def _run_of(plan: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The settings of the trial's run; under PBT with the state of the trial it was told to follow."""
    from dstrain.space import apply

    changed = plan.get("mutable", {})
    run = apply(plan["run"], changed)
    checkpoint = tune.get_checkpoint() if changed else None
    if checkpoint is not None:
        from dstrain.exchange import take_over

        with checkpoint.as_directory() as pack:
            take_over(folder, run, Path(pack), changed)
    return run


class _exchanged:
    """Under PBT, the checkpoint as others may take it over; nothing otherwise."""

    def __init__(self, folder: Path, plan: Mapping[str, Any]) -> None:
        self._folder, self._plan = folder, plan
        self._place: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Any:
        if "mutable" not in self._plan:
            return None
        from dstrain.exchange import pack

        self._place = tempfile.TemporaryDirectory(prefix=".pack-", dir=self._folder)  # the file system of what is linked
        pack(self._folder, self._plan["metric"].partition("/")[0], Path(self._place.name))
        return tune.Checkpoint.from_directory(self._place.name)

    def __exit__(self, *error: object) -> None:
        if self._place is not None:
            self._place.cleanup()


def own_faults(folder: Path) -> int:
    """The deaths so far that were the trial's own; those of its actor, which goes with its node, Tune counts."""
    from dstrain.desk import DIED
    from dstrain.search import read_faults

    return sum(reason != DIED for reason in read_faults(folder))


def reason_of(error: BaseException) -> str:
    """What to say of a trial that did not end by itself."""
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return "out of memory: Ray ended a process because its node had none left"
    if isinstance(error, ray.exceptions.RayActorError):
        lost = "its node has died" in str(error)
        return "its node was lost" if lost else "a process died without a word (killed, or out of memory)"
    return str(error) if isinstance(error, Fault) else f"{type(error).__name__}: {error}"
