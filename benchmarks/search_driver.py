"""What the driver of a search costs: real Ray, Tune, rungs, desk and MLflow, with trials that only pretend to train.

    python -m benchmarks.search_driver [--trials 1000] [--slots 8] [--reports 10] [--json FILE]

A simulated trial writes the readings a real one would and reports them to Tune, as fast as it is let. For each tenth of the
trials: the driver process's CPU seconds per trial and its resident memory. Then the same search beside trials that say
nothing, for what it costs by itself once it knows so many. From both: the share of one core that the driver takes when the
trials last minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.measure import environment

QUIET_SECONDS = 120.0
MINUTES = (1, 10, 60)
"""Lengths of a trial for which the share of a core is told."""


def simulated(quiet_from: float) -> Callable[[dict[str, Any]], None]:
    """A trial that leaves and reports what a real one does, and computes nothing. From a learning rate on, one that is in
    the middle of a long epoch first."""

    def trial(config: dict[str, Any]) -> None:
        import ray
        from ray import tune

        from dstrain.readings import JsonLines, Reading
        from dstrain.tune.bell import BELL

        plan: Any = ray.get(ray.get_actor(BELL).begin.remote(config["trial"]["id"]))
        run = plan["run"]
        lr, reports = run["stages"]["finetune"]["optim"]["lr"], run["stages"]["finetune"]["steps"]
        if lr >= quiet_from:
            time.sleep(QUIET_SECONDS)
        folder = Path(run["output_dir"]) / run["name"]
        folder.mkdir(parents=True, exist_ok=True)
        readings = JsonLines(folder)
        training = {
            "loss": 1.0, "perplexity": 2.0, "lr": lr, "grad_norm": 1.0, "tokens_per_second": 1e4, "useful_share": 1.0,
            "peak_memory_gb": 0.5,
        }  # fmt: skip
        for step in range(1, reports + 1):
            value = 1 - 1 / (step + 1) + lr
            readings(Reading("finetune", "train", step, reports, 1000 * step, float(step), training))
            figures = {"loss": 1.0, "f1_macro": value}
            readings(Reading("finetune", "valid", step, reports, 1000 * step, float(step), figures))
            tune.report({"progress": step / reports, "steps": step, "value": value, "credit": step})
        (folder / "outcome.json").write_text("{}")

    return trial


def search_file(folder: Path, trials: int, reports: int) -> Path:
    """A grid of `trials` learning rates over a run that is never trained."""
    from dstrain.schema import dump_yaml

    stage = {
        "objective": {"kind": "classify"}, "corpus": {"name": "pydocs", "max_documents": 32, "max_eval_documents": 8},
        "max_length": 64, "tokens_per_batch": 512, "steps": reports, "evaluate_every_steps": 1, "optim": {"lr": 1e-3},
    }  # fmt: skip
    base = {
        "name": "driver", "output_dir": str(folder / "runs"), "vocabulary": {"size": 512},
        "encoder": {"preset": "bert_tiny"}, "stages": {"finetune": stage},
    }  # fmt: skip
    rates = [round(1e-4 * 1.005**number, 10) for number in range(trials)]
    search = {"metric": "finetune/valid/f1_macro", "scheduler": {"kind": "asha"}, "resources": {"cpus": 1}}
    file = folder / "search.yaml"
    file.write_text(dump_yaml({"base": base, "space": {"stages.finetune.optim.lr": rates}, "search": search}))
    return file


class Meter(threading.Thread):
    """Notes this process's CPU seconds and memory whenever another tenth of the trials has ended, and at last how much it
    takes by itself, beside trials that say nothing."""

    def __init__(self, trials: Path, total: int) -> None:
        super().__init__(daemon=True)
        self._trials, self._total, self._step = trials, total, max(1, total // 10)
        self.rows: list[dict[str, float]] = []
        self.idle_core_share = math.nan
        self._process = psutil.Process()

    def run(self) -> None:
        """Looks once a second: a look at a thousand names costs a millisecond."""
        due, ended = 0, 0
        while ended < self._total:
            time.sleep(1.0)
            ended = sum(1 for _ in self._trials.glob("*/ended.json"))
            if ended >= min(due, self._total):
                self.rows.append({"ended": ended, "cpu_seconds": self._used(), "resident_mb": self._resident()})
                due = ended + self._step
        time.sleep(QUIET_SECONDS / 2)  # the last readings are on their way to MLflow
        before, window = self._used(), QUIET_SECONDS / 4
        time.sleep(window)
        self.idle_core_share = (self._used() - before) / window

    def _used(self) -> float:
        times = self._process.cpu_times()
        return times.user + times.system

    def _resident(self) -> float:
        return self._process.memory_info().rss / 1e6


def measure(trials: int, slots: int, reports: int) -> dict[str, Any]:
    """Runs a search of simulated trials in this process; the last ones, one a slot, are those that say nothing."""
    from dstrain.preparation import prepare
    from dstrain.search import plan_search
    from dstrain.settings import read_document
    from dstrain.tune import driver
    from dstrain.tune.resources import Needs, Room, ray_cluster

    with tempfile.TemporaryDirectory(prefix="dstrain-driver-") as name:
        search = plan_search(read_document(search_file(Path(name), trials + slots, reports)))
        quiet_from = search.candidates[trials].settings.stages["finetune"].optim.lr
        driver.trial = simulated(quiet_from)  # type: ignore[assignment]
        prepare(search, 1, False, lambda sentence: None)
        search.claim()
        with ray_cluster(Room(((float(slots), 0.0),))):
            meter = Meter(search.folder / "trials", trials)
            meter.start()
            with contextlib.redirect_stdout(io.StringIO()):
                interrupted = driver.Driver(search, Needs(1, 1.0, 0.0, False), threading.Event()).run()
            meter.join()
    assert not interrupted
    return {
        "environment": environment(torch.device("cpu"), torch.get_num_threads(), ("ray", "mlflow")),
        "trials": trials, "slots": slots, "reports": reports, "rows": meter.rows,
        "idle_core_share": meter.idle_core_share,
    }  # fmt: skip


def show(figures: dict[str, Any]) -> None:
    """The table on the terminal."""
    print(f"{'ended':>6} {'CPU ms a trial':>15} {'resident MB':>12}")
    rows = figures["rows"]
    for before, row in pairwise(rows):
        if row["ended"] > before["ended"]:
            cost = 1000 * (row["cpu_seconds"] - before["cpu_seconds"]) / (row["ended"] - before["ended"])
            print(f"{row['ended']:>6} {cost:>15.1f} {row['resident_mb']:>12.0f}")
    cost = (rows[-1]["cpu_seconds"] - rows[0]["cpu_seconds"]) / figures["trials"]
    print(f"beside silent trials: {figures['idle_core_share']:.2%} of a core")
    for minutes in MINUTES:
        share = figures["idle_core_share"] + cost * figures["slots"] / (60 * minutes)
        print(f"trials of {minutes} minutes on {figures['slots']} slots: {share:.2%} of a core")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    words = argparse.ArgumentParser(prog="python -m benchmarks.search_driver", description=__doc__.partition("\n")[0])
    words.add_argument("--trials", type=int, default=1000)
    words.add_argument("--slots", type=int, default=8)
    words.add_argument("--reports", type=int, default=10, help="readings of the deciding metric per trial")
    words.add_argument("--json", type=Path, help="also writes the figures here")
    given = words.parse_args(argv)
    figures = measure(given.trials, given.slots, given.reports)
    show(figures)
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
