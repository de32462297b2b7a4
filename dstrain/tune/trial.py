"""One trial under Tune: an actor that starts the rank processes of a run, passes on what they report, and ends with them.

A trial's ranks are children of its actor: when Tune ends the trial, whatever the reason, Ray ends them with it. All that
must outlive a process lies in the run folder, so a trial that is started again goes on from its last checkpoint.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import ray
from ray import tune
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

if TYPE_CHECKING:
    from dstrain.readings import Reading
    from dstrain.settings import RunSettings

BELL = "dstrain-bell"
"""The name of the search's bell among the actors of its Ray job."""
CLAIM_SECONDS = 120.0
"""So long a new attempt waits for the run folder: the lock of a lost node goes when the file server notices."""


class Progress(NamedTuple):
    """A reading of the deciding metric."""

    step: int
    total_steps: int
    value: float


class Silent(Exception):
    """A trial has reported nothing for too long."""


class Bell:
    """An actor that rings once, when the search is asked to stop; all who wait for it hear it."""

    def __init__(self) -> None:
        self._rung = asyncio.Event()

    async def ring(self) -> None:
        """The search is asked to stop."""
        self._rung.set()

    async def rung(self) -> None:
        """Returns once it has rung."""
        await self._rung.wait()

    async def has_rung(self) -> bool:
        """Whether it has rung."""
        return self._rung.is_set()


class RankProcess:
    """One data-parallel process of a trial, as a Ray actor: it trains in one thread and is spoken to in others.

    The deciding metric is handed over at the boundary after its step, when the checkpoint of that step is written:
    whoever is paused or stopped on it has lost nothing.
    """

    def __init__(self) -> None:
        import queue

        self._news: queue.Queue[Progress | None] = queue.Queue()
        self._due: list[Progress] = []
        self._decided = threading.Event()
        self._stop = threading.Event()

    def address(self) -> tuple[str, int]:
        """Where rank 0 listens for the others."""
        from dstrain.engine import free_port

        host = ray.util.get_node_ip_address()
        return host, free_port(host)

    def train(self, tree: Mapping[str, Any], source: str, metric: str, seat: Mapping[str, str]) -> None:
        """Runs the trial's run to its end, or until `stop`; `seat` holds the variables a launcher would set."""
        os.environ.update(seat)
        from dstrain.engine import join_ranks
        from dstrain.loop import Interrupted
        from dstrain.run import run
        from dstrain.schema import validate
        from dstrain.settings import RunSettings

        settings = validate(RunSettings, tree, source)
        try:
            ranks = join_ranks()
            with ranks.first() as mine:
                if mine:
                    _claim(settings)
            run(settings, ranks, self._watch(settings.folder, metric, ranks.rank))
            self._hand_over()
        except Interrupted:
            return
        except Exception as error:
            if os.environ["RANK"] == "0":
                write_failure(settings.folder, error)
            raise

    def _watch(self, folder: Path, metric: str, rank: int) -> Any:
        from dstrain.readings import JsonLines, fan_out
        from dstrain.run import Watch

        if rank:
            return Watch(lambda reading: None, lambda sentence: None, lambda tags: None, self._stop.is_set)
        log = (folder / "train.log").open("a", buffering=1, encoding="utf-8")

        def say(sentence: str) -> None:
            print(sentence, file=log)
            self._news.put(None)

        report = fan_out(JsonLines(folder), lambda reading: self._note(reading, metric))
        return Watch(report, say, lambda tags: write_tags(folder, tags), self._asked_to_stop)

    def _note(self, reading: Reading, metric: str) -> None:
        """Keeps the deciding metric for the next boundary; any reading is a sign of life."""
        keyed = reading.keyed()
        if metric in keyed:
            self._due.append(Progress(reading.step, reading.total_steps, keyed[metric]))
        self._news.put(None)

    def _asked_to_stop(self) -> bool:
        self._hand_over()
        return self._stop.is_set()

    def _hand_over(self) -> None:
        """Gives what is due to the trial's actor and waits for the scheduler's word on it."""
        for progress in self._due:
            self._decided.clear()
            self._news.put(progress)
            self._decided.wait()
        self._due.clear()

    def news(self) -> Progress | None:
        """The next reading of the deciding metric, or None for another sign of life; waits for it."""
        return self._news.get()

    def go_on(self) -> None:
        """The scheduler lets the trial live."""
        self._decided.set()

    def stop(self) -> None:
        """Save before the next step, and end."""
        self._stop.set()
        self._decided.set()


def trial(config: dict[str, Any]) -> None:
    """A Tune function trainable: starts the ranks, reports what they report, ends when they end.

    A mistake of the user's or a diverged loss ends the trial for good. Anything else is written down and raised, and Tune
    starts the trial again from its checkpoint, up to search.max_failures times.
    """
    from dstrain.engine import Diverged
    from dstrain.schema import UserError

    plan = config["trial"]
    bell = ray.get_actor(BELL)
    if ray.get(bell.has_rung.remote()):
        return
    run, folder = _run_of(plan)
    ranks = _start_ranks(plan["ranks"], plan["bundle"])
    try:
        seats = _seats(ranks, plan["environ"])
        working = [
            rank.train.remote(run, plan["source"], plan["metric"], seat)
            for rank, seat in zip(ranks, seats, strict=True)
        ]
        for step, total, value in _progress(ranks, working, bell, plan["silence_seconds"]):
            figures = {
                "progress": step / total, "steps": step, "value": value, "credit": max(0, step - plan["grace_steps"]),
            }  # fmt: skip
            with _exchanged(folder, plan) as checkpoint:
                tune.report(figures, checkpoint=checkpoint)
            ray.get(ranks[0].go_on.remote())
    except Exception as error:
        cause = getattr(error, "cause", error)
        if not (folder / FAILURE_FILE).exists():  # rank 0 writes its own, unless another one was first
            write_failure(folder, cause, reason_of(error))
        if isinstance(cause, (UserError, Diverged)):
            return
        raise
    finally:
        for rank in ranks:
            ray.kill(rank)


def _run_of(plan: Mapping[str, Any]) -> tuple[dict[str, Any], Path]:
    """The settings of the trial's run and its folder; under PBT with the state of the trial it was told to follow."""
    from dstrain.exchange import take_over
    from dstrain.space import apply

    changed = plan.get("mutable", {})
    run = apply(plan["run"], changed)
    folder = Path(run["output_dir"]) / run["name"]
    checkpoint = tune.get_checkpoint() if changed else None
    if checkpoint is not None:
        with checkpoint.as_directory() as pack:
            take_over(folder, run, Path(pack), changed)
    return run, folder


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


def _claim(settings: RunSettings) -> None:
    """Claims the run folder; one that stays locked is no mistake of the user's, and worth another attempt."""
    from dstrain.run import claim, hold
    from dstrain.schema import UserError

    try:
        hold(settings.folder, CLAIM_SECONDS)
    except UserError as error:
        raise TimeoutError(str(error)) from None
    claim(settings)


def _start_ranks(number: int, bundle: dict[str, float]) -> list[Any]:
    group = ray.util.get_current_placement_group()
    assert group is not None, "a trial runs in the placement group that Tune reserved for it"
    actor = ray.remote(RankProcess)
    return [
        actor.options(
            num_cpus=bundle["CPU"], num_gpus=bundle.get("GPU", 0), max_concurrency=8,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
        ).remote()
        for rank in range(number)
    ]  # fmt: skip


def _seats(ranks: list[Any], environ: Mapping[str, str]) -> list[dict[str, str]]:
    """The launcher's variables of each rank. LOCAL_RANK is 0 because Ray shows each actor its own device only."""
    address, port = ray.get(ranks[0].address.remote())
    return [
        {
            **environ,
            "RANK": str(rank),
            "WORLD_SIZE": str(len(ranks)),
            "LOCAL_RANK": "0",
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
            "DSTRAIN_LAUNCHER": "ray",
        }
        for rank in range(len(ranks))
    ]


def _progress(ranks: list[Any], working: list[Any], bell: Any, silence_seconds: float) -> Iterator[Progress]:
    """The readings of rank 0 until all ranks are done; the first rank that fails raises its error here.

    When the search's bell rings all ranks are told to stop. Raises Silent.
    """
    pending, following, rung = list(working), ranks[0].news.remote(), bell.rung.remote()
    heard = time.monotonic()
    while pending:
        listening = [following, *pending, *([rung] if rung is not None else [])]
        done, _ = ray.wait(listening, num_returns=1, timeout=max(0.0, heard + silence_seconds - time.monotonic()))
        if not done:
            raise Silent(f"reported nothing for {silence_seconds / 60:g} minutes (search.silence_minutes)")
        found = ray.get(done[0])
        if done[0] == rung:
            rung = None
            ray.get([rank.stop.remote() for rank in ranks])
        elif done[0] == following:
            heard = time.monotonic()
            if found is not None:
                yield Progress(*found)
            following = ranks[0].news.remote()
        else:
            pending.remove(done[0])


# ------------------------------------------------------------------------------------- what a trial leaves

FAILURE_FILE = "failure.txt"


def reason_of(error: BaseException) -> str:
    """What to say of a trial that did not end by itself."""
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return "out of memory: Ray ended a process because its node had none left"
    if isinstance(error, ray.exceptions.RayActorError):
        lost = "its node has died" in str(error)
        return "its node was lost" if lost else "a process died without a word (killed, or out of memory)"
    cause = getattr(error, "cause", error)
    return f"{type(cause).__name__}: {cause}"


def write_failure(folder: Path, error: BaseException, reason: str | None = None) -> None:
    """Leaves the reason of a failure where the driver finds it, whatever becomes of this process."""
    import traceback

    folder.mkdir(parents=True, exist_ok=True)
    told = "".join(traceback.format_exception(error))
    (folder / FAILURE_FILE).write_text(f"{reason or reason_of(error)}\n\n{told}", encoding="utf-8")


def write_tags(folder: Path, tags: Mapping[str, str]) -> None:
    """Leaves a run's tags where the driver finds them."""
    import json

    (folder / "tags.json").write_text(json.dumps(dict(tags)), encoding="utf-8")
