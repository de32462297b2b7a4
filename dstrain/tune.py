"""Door 2: searches a space of runs with Ray Tune, and the only module that says `ray`.

    python -m dstrain.tune search_spaces/lsh.yaml [key=value ...]

A trial is a placement group of rank processes of its own: the trial's actor starts them, hands their readings of the
deciding metric to Tune one by one, and takes them with it when it is stopped. All that must outlive a process lies in
the search's folder (see dstrain.search), so going on is the same command, and no pickle is ever read back.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dstrain.desk import Desk
    from dstrain.readings import Reading
    from dstrain.search import Candidate, Search
    from dstrain.settings import ResourceSettings, RunSettings

SAVED_COME_BACK = 75
"""Exit status of an interrupted search: the same command goes on."""

_EPILOG = """\
examples
  python -m dstrain.tune search_spaces/lsh.yaml
  python -m dstrain.tune search_spaces/favor.yaml --dry-run
  python -m dstrain.tune my.yaml search.scheduler.eta=2 search.resources.ranks=2

The same command goes on with an interrupted search; finished trials are not run again.

exit status
  0 all trials ended   1 some failed   2 a mistake in the settings or the data   75 interrupted: the same command goes on
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    words = argparse.ArgumentParser(
        prog="python -m dstrain.tune", description="Search a space of training runs with Ray Tune and ASHA.",
        epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    words.add_argument("file", type=Path, metavar="FILE.yaml", help="base, space and search")
    words.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings that win over the file's; search.x reaches the search",
    )
    words.add_argument(
        "--full-size", action="store_true", help="leave out the file's `when` overrides for this machine"
    )
    words.add_argument("--dry-run", action="store_true", help="show trials, resources and concurrency, then stop")
    return words


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    given = parser().parse_intermixed_args(argv)
    from dstrain.schema import UserError

    try:
        return _search(given)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted before any trial started; the same command starts again", file=sys.stderr)
        return SAVED_COME_BACK


def _search(given: argparse.Namespace) -> int:
    import torch

    from dstrain.search import plan_search
    from dstrain.settings import read_document

    search = plan_search(read_document(given.file, given.overrides, torch.cuda.is_available(), given.full_size))
    needs = Needs.of(search.settings.resources, torch.cuda.is_available())
    for line in (*search.document.precedence, *search.notes):
        print(line)
    if given.dry_run:
        return _dry_run(search, needs, Room.here())
    if "RAY_ADDRESS" not in os.environ:
        Room.here().check(needs, search)
    prepare(search, needs)
    search.claim()
    pending = search.pending()
    if not pending:
        print(f"{search.folder}: all {len(search.candidates)} trials have ended")
    interrupted = bool(pending) and _run(search, needs, pending)
    close(search)
    if interrupted:
        again = " ".join([str(given.file), *given.overrides])
        print(f"interrupted; go on with: python -m dstrain.tune {again}", file=sys.stderr)
        return SAVED_COME_BACK
    return int(any((ended := candidate.ended()) and ended.state == "failed" for candidate in search.candidates))


def _run(search: Search, needs: Needs, pending: list[Candidate]) -> bool:
    """Runs the pending trials on a cluster; True when that was interrupted."""
    with ray_cluster(Room.here()):
        room = Room.of_cluster()
        room.check(needs, search)
        concurrent = room.concurrent(needs, search.settings.max_concurrent)
        print(f"{len(pending)} of {len(search.candidates)} trials to run, {concurrent} at a time, {needs.describe()}")
        return Driver(search, needs, concurrent).run(pending)


def _dry_run(search: Search, needs: Needs, room: Room) -> int:
    for candidate in search.candidates:
        ended = candidate.ended()
        print(f"{candidate.id}  {candidate.changes}" + (f"  ({ended.state})" if ended else ""))
    concurrent = room.concurrent(needs, search.settings.max_concurrent)
    print(f"{len(search.candidates)} trials, {concurrent} at a time on {room.describe()}; {needs.describe()}")
    print(f"scheduler: {search.settings.scheduler}")
    return 0


def prepare(search: Search, needs: Needs) -> None:
    """Vocabulary and tokenised text, once and in sight, before trials start together and wait for each other.

    Raises UserError with what is wrong with a trial's text, labels, DeepSpeed JSON or starting weights.
    """
    import torch

    from dstrain.engine import Ranks
    from dstrain.precision import choose
    from dstrain.run import make_ready, run_vocabulary

    ranks = Ranks(0, needs.ranks, torch.device("cuda" if needs.gpus else "cpu"), "search")
    seen: set[str] = set()
    noted: set[str] = set()
    for candidate in search.candidates:
        settings = candidate.settings
        if (key := _preparation(settings)) in seen:
            continue
        seen.add(key)
        precision = choose(settings.precision, ranks.device)
        for stage in make_ready(settings, run_vocabulary(settings, print), precision, ranks, print).values():
            for note in stage.corpus.notes:
                if note not in noted:
                    noted.add(note)
                    print(note)


def _preparation(settings: RunSettings) -> str:
    """Equal for trials that need the same text, cut the same way, for the same stages and DeepSpeed JSON."""
    stages = [
        (
            name,
            stage.corpus,
            stage.max_length,
            stage.tokens_per_batch,
            stage.accumulation,
            stage.starts_from,
            stage.objective.kind,
        )
        for name, stage in settings.stages.items()
    ]
    return repr((settings.vocabulary, settings.precision, settings.deepspeed, stages))


def close(search: Search) -> None:
    """What a finished search shows: the table, the winner and how to train it again, the pages that compare the runs."""
    from rich.console import Console

    from dstrain.search import table

    Console(width=None if sys.stdout.isatty() else 160).print(table(search))
    best = search.write_best()
    if best:
        print(f"best:    {best}")
        print(f"retrain: deepspeed dstrain/train.py {best}")
    if search.base.tracking.enabled:
        _show_pages(search)


def _show_pages(search: Search) -> None:
    """How to open the MLflow UI, and its pages that compare exactly these trials."""
    from dstrain.tracking import sent_of, store_uri, ui_command, ui_links

    tracking = search.base.tracking
    uri = store_uri(tracking.uri, search.base.output_dir)
    print(f"MLflow:  {ui_command(uri)}")
    sent = [sent for candidate in search.candidates if (sent := sent_of(candidate.folder)).run_id]
    if sent:
        base_url = uri if uri.startswith("http") else "http://127.0.0.1:5000"
        links = ui_links(base_url, sent[0].experiment_id, [one.run_id for one in sent], search.settings.metric)
        print(f"         compare: {links.compare}")
        print(f"         curves:  {links.curves}")


# ---------------------------------------------------------------------------------------- resources


@dataclass(frozen=True)
class Needs:
    """What one trial takes: `ranks` bundles of this many CPUs and GPUs."""

    ranks: int
    cpus: float
    gpus: float

    @classmethod
    def of(cls, resources: ResourceSettings, gpu: bool) -> Needs:
        """Fills in what the settings leave to the machine."""
        gpus = float(gpu) if resources.gpus == "auto" else resources.gpus
        cpus = (4.0 if gpus else 1.0) if resources.cpus == "auto" else resources.cpus
        return cls(resources.ranks, cpus, gpus)

    @property
    def bundle(self) -> dict[str, float]:
        """One rank's share, as Ray takes it."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}

    def describe(self) -> str:
        """In words."""
        return f"each takes {self.ranks} rank(s) of {self.cpus:g} CPU(s)" + (
            f" and {self.gpus:g} GPU(s)" if self.gpus else ""
        )


@dataclass(frozen=True)
class Room:
    """What there is to take."""

    cpus: float
    gpus: float

    @classmethod
    def here(cls) -> Room:
        """This machine, or what its SLURM job was given of it."""
        import torch

        return cls(float(len(os.sched_getaffinity(0))), float(torch.cuda.device_count()))

    @classmethod
    def of_cluster(cls) -> Room:
        """The connected Ray cluster."""
        import ray

        there = ray.cluster_resources()
        return cls(there.get("CPU", 0.0), there.get("GPU", 0.0))

    def concurrent(self, needs: Needs, bound: int | None) -> int:
        """How many trials fit at once."""
        fit = [int(self.cpus / (needs.cpus * needs.ranks))] if needs.cpus else []
        fit += [int(self.gpus / (needs.gpus * needs.ranks))] if needs.gpus else []
        return min([*fit, *([bound] if bound else [])], default=1)

    def check(self, needs: Needs, search: Search) -> None:
        """Raises UserError when not even one trial fits: Ray would wait for ever."""
        from dstrain.schema import UserError

        if self.concurrent(needs, None) < 1:
            raise UserError(
                f"{search.document.source}: search.resources: {needs.describe()}, and there are {self.describe()}; "
                "ask for less, or start on more"
            )

    def describe(self) -> str:
        """In words."""
        return f"{self.cpus:g} CPUs and {self.gpus:g} GPUs"


class ray_cluster:
    """The cluster that RAY_ADDRESS names, or one of our own on this machine that ends with the search."""

    def __init__(self, room: Room) -> None:
        self._room = room

    def __enter__(self) -> None:
        # Trials write to their folders; Ray's own reports and usage statistics would only stand in the way.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import ray

            if "RAY_ADDRESS" in os.environ:
                ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level=logging.ERROR)
            else:
                ray.init(
                    address="local", num_cpus=int(self._room.cpus), num_gpus=int(self._room.gpus), include_dashboard=False,
                    log_to_driver=False, logging_level=logging.ERROR, object_store_memory=100_000_000,
                )  # fmt: skip

    def __exit__(self, *error: object) -> None:
        import ray

        ray.shutdown()


# ------------------------------------------------------------------------------------------- the trial's side


class RankProcess:
    """One data-parallel process of a trial, as a Ray actor: it trains in one thread and hands over readings in another."""

    def __init__(self) -> None:
        import queue

        self._readings: queue.Queue[tuple[int, int, float]] = queue.Queue()
        self._decided = threading.Event()

    def address(self) -> tuple[str, int]:
        """Where rank 0 listens for the others."""
        import ray

        from dstrain.engine import free_port

        return ray.util.get_node_ip_address(), free_port()

    def train(self, tree: Mapping[str, Any], source: str, metric: str, seat: Mapping[str, str]) -> None:
        """Runs the trial's run to its end. `seat` holds the variables a launcher would set, and the driver's own."""
        os.environ.update(seat)
        from dstrain.engine import join_ranks
        from dstrain.run import claim, run
        from dstrain.schema import validate
        from dstrain.settings import RunSettings

        settings = validate(RunSettings, tree, source)
        try:
            ranks = join_ranks()
            with ranks.first() as mine:
                if mine:
                    claim(settings)
            run(settings, ranks, self._watch(settings.folder, metric, ranks.rank))
        except Exception as error:
            if os.environ["RANK"] == "0":
                write_failure(settings.folder, error)
            raise

    def _watch(self, folder: Path, metric: str, rank: int) -> Any:
        from dstrain.readings import JsonLines, fan_out
        from dstrain.run import Watch

        if rank:
            return Watch(lambda reading: None, lambda sentence: None, lambda tags: None)
        log = (folder / "train.log").open("a", buffering=1, encoding="utf-8")
        report = fan_out(JsonLines(folder), lambda reading: self._hand_over(reading, metric))
        return Watch(report, lambda sentence: print(sentence, file=log), lambda tags: write_tags(folder, tags))

    def _hand_over(self, reading: Reading, metric: str) -> None:
        """Gives the deciding metric to the trial's actor and waits for the scheduler's word on it."""
        keyed = reading.keyed()
        if metric in keyed:
            self._decided.clear()
            self._readings.put((reading.step, reading.total_steps, keyed[metric]))
            self._decided.wait()

    def next_reading(self) -> tuple[int, int, float]:
        """The next (step, total steps, value); waits for it."""
        return self._readings.get()

    def go_on(self) -> None:
        """The scheduler lets the trial live."""
        self._decided.set()


def trial(config: dict[str, Any]) -> None:
    """A Tune function trainable: starts the ranks, reports what they report, ends when they end.

    The ranks are children of this actor: when Tune stops the trial, Ray ends them with it. A mistake of the user's or
    a diverged loss ends the trial for good; anything else is raised, and Tune starts the trial again from its
    checkpoint, up to search.max_failures times.
    """
    import ray
    from ray import tune

    from dstrain.engine import Diverged
    from dstrain.schema import UserError

    config = config["trial"]
    ranks = _start_ranks(config["ranks"], config["bundle"])
    address, port = ray.get(ranks[0].address.remote())
    seats = [
        {
            **config["environ"],
            "RANK": str(rank),
            "WORLD_SIZE": str(len(ranks)),
            "LOCAL_RANK": "0",
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
            "DSTRAIN_LAUNCHER": "ray",
        }
        for rank in range(len(ranks))
    ]  # LOCAL_RANK is 0 because Ray shows each actor its own device only
    working = [
        rank.train.remote(config["run"], config["source"], config["metric"], seat)
        for rank, seat in zip(ranks, seats, strict=True)
    ]
    try:
        for step, total, value in _readings(ranks[0], working):
            tune.report({"progress": step / total, "steps": step, "value": value})
            ray.get(ranks[0].go_on.remote())
    except ray.exceptions.RayTaskError as error:
        if not isinstance(error.cause, (UserError, Diverged)):
            raise
    finally:
        for rank in ranks:
            ray.kill(rank)


def _start_ranks(number: int, bundle: dict[str, float]) -> list[Any]:
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = ray.util.get_current_placement_group()
    assert group is not None, "a trial runs in the placement group that Tune reserved for it"
    actor = ray.remote(RankProcess)
    return [
        actor.options(
            num_cpus=bundle["CPU"], num_gpus=bundle.get("GPU", 0), max_concurrency=4,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
        ).remote()
        for rank in range(number)
    ]  # fmt: skip


def _readings(first: Any, working: list[Any]) -> Iterator[tuple[int, int, float]]:
    """The readings of rank 0 until all ranks are done; the first rank that fails raises its error here."""
    import ray

    pending, following = list(working), first.next_reading.remote()
    while pending:
        (done,), _ = ray.wait([following, *pending], num_returns=1)
        found = ray.get(done)
        if done == following:
            yield found
            following = first.next_reading.remote()
        else:
            pending.remove(done)


def write_failure(folder: Path, error: Exception) -> None:
    """Leaves the reason of a failure where the driver finds it, whatever becomes of this process."""
    import traceback

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "failure.txt").write_text(
        f"{type(error).__name__}: {error}\n\n{traceback.format_exc()}", encoding="utf-8"
    )


def write_tags(folder: Path, tags: Mapping[str, str]) -> None:
    """Leaves a run's tags where the driver finds them."""
    import json

    (folder / "tags.json").write_text(json.dumps(dict(tags)), encoding="utf-8")


# ------------------------------------------------------------------------------------------ the driver's side


class Driver:
    """Runs the pending trials of a search under Tune."""

    def __init__(self, search: Search, needs: Needs, concurrent: int) -> None:
        self._search, self._needs, self._concurrent = search, needs, concurrent

    def run(self, pending: list[Candidate]) -> bool:
        """True when the search was interrupted before all trials ended."""
        from ray import tune

        from dstrain.desk import Desk

        search = self._search
        bundles = [{"CPU": 0.0}] + [self._needs.bundle] * self._needs.ranks
        with Desk(search) as desk:
            tuner = tune.Tuner(
                tune.with_resources(trial, tune.PlacementGroupFactory(bundles, strategy="PACK")),
                param_space={"trial": tune.grid_search([self._config(candidate) for candidate in pending])},
                tune_config=tune.TuneConfig(
                    metric="value", mode=search.settings.mode, scheduler=_scheduler(desk), reuse_actors=False,
                    max_concurrent_trials=self._concurrent, trial_name_creator=_id, trial_dirname_creator=_id,
                ),
                run_config=tune.RunConfig(
                    name=time.strftime("%Y%m%d-%H%M%S"), storage_path=str((search.folder / "ray").resolve()), verbose=0,
                    callbacks=[_callback(desk)], failure_config=tune.FailureConfig(max_failures=search.settings.max_failures),
                ),
            )  # fmt: skip
            tuner.fit()
        return any(candidate.ended() is None for candidate in pending)

    def _config(self, candidate: Candidate) -> dict[str, Any]:
        """All that a trial's actor needs, as plain data."""
        from dstrain.settings import plain

        carried = ("DSTRAIN_", "HF_", "NCCL_", "GLOO_", "OMP_", "XDG_CACHE_HOME")
        return {
            "id": candidate.id,
            "run": dict(plain(candidate.settings)),
            "source": self._search.document.source,
            "metric": self._search.settings.metric,
            "ranks": self._needs.ranks,
            "bundle": self._needs.bundle,
            "environ": {name: value for name, value in os.environ.items() if name.startswith(carried)},
        }


def _id(trial: Any) -> str:
    return str(trial.config["trial"]["id"])


def _scheduler(desk: Desk) -> Any:
    """Tune's view of our rungs: first come, first served, and a trial ends when its rung says so."""
    from ray.tune.schedulers import FIFOScheduler, TrialScheduler

    class RungScheduler(FIFOScheduler):
        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            keep = desk.reported(_id(trial), result["progress"], result["value"])
            return str(TrialScheduler.CONTINUE if keep else TrialScheduler.STOP)

    return RungScheduler()


def _callback(desk: Desk) -> Any:
    """Tune's events, told to the desk."""
    from ray.tune import Callback

    class Events(Callback):
        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            desk.started(_id(trial))

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            desk.ended(_id(trial), None)

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            desk.ended(_id(trial), "its processes died without a word (killed, or out of memory)")

    return Events()


if __name__ == "__main__":
    # Run as a module this file is `__main__`, and what Ray pickles would be too; the importable twin does the work.
    from dstrain.tune import main as imported_main

    sys.exit(imported_main())
