"""Replays published learning curves through the scheduler that ships: what does stopping early save, what does it lose?

    python -m benchmarks.replay_search --curves curves.parquet --runs runs.parquet [--json]

Every grid (experiment, stage, data set) is searched again by some workers that take trials in a random order; a trial
reports at the true seconds of its published epochs (an optimizer step is an epoch here), and `dstrain.rungs` decides
with its shipped defaults. This happens for many orders. Printed per grid: the share of GPU time saved (mean over the
orders), and the regret: how much worse the search's winner is than the full grid's, for the worst of the orders.
Nothing is decided on values that a search could not have seen.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dstrain.rungs import AshaSettings, early_cut, open_rungs
from dstrain.schema import UserError, parse_yaml, validate

WARMUP = 0.1
"""Share of a stage that warms up, in all published runs (the files have no column for it)."""
METRICS: tuple[tuple[str, Literal["min", "max"], float, str], ...] = (
    ("eval/f1_macro", "max", 100.0, "F1 points"),
    ("eval/loss", "min", 1.0, "loss"),
    ("train/avg_epoch_loss", "min", 1.0, "train loss"),
)
"""Metric, mode, factor and unit of the regret; a grid is judged by the first that all its runs report."""
_GRID = ("experiment", "stage", "dataset")
_RUN_COLUMNS = (*_GRID, "run_id", "freeze_n_layers", "freeze_epochs", "epochs")
_CURVE_COLUMNS = ("run_id", "epoch", "elapsed_s", "metric", "value")


class Point(NamedTuple):
    """One report of a published run."""

    progress: float
    seconds: float
    value: float


@dataclass(frozen=True)
class Curve:
    """A published run: its reports in order, and the share of its epochs in which layers were frozen."""

    run_id: str
    epochs: int
    thaw: float
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Grid:
    """Runs that were compared with one another."""

    name: str
    mode: Literal["min", "max"]
    factor: float
    unit: str
    curves: tuple[Curve, ...]

    @property
    def thaw(self) -> float:
        """The latest thaw of any trial."""
        return max(curve.thaw for curve in self.curves)

    @property
    def horizon(self) -> int:
        """The longest trial's epochs."""
        return max(curve.epochs for curve in self.curves)

    @property
    def seconds(self) -> float:
        """What all runs took."""
        return sum(curve.points[-1].seconds for curve in self.curves)

    def best(self, values: Sequence[float]) -> float:
        """The best of some values of the metric."""
        return max(values) if self.mode == "max" else min(values)


class Outcome(NamedTuple):
    """One search: seconds of GPU time used, best value seen, share of the trials stopped early."""

    seconds: float
    best: float
    stopped: float


@dataclass(frozen=True)
class Row:
    """A grid in the table."""

    grid: str
    trials: int
    saved_share: float
    regret: float
    regret_mean: float
    regret_unit: str
    stopped_share: float
    rungs: tuple[float, ...]
    gpu_hours: float


def read_grids(curves: Path, runs: Path) -> list[Grid]:
    """The grids of two parquet files, by name; a grid of one trial is left out. Raises UserError for unusable files."""
    run_rows = _read(runs, _RUN_COLUMNS)
    points: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in _read(curves, _CURVE_COLUMNS):
        points.setdefault((row["run_id"], row["metric"]), []).append(row)
    run_rows.sort(key=lambda row: (*(row[key] for key in _GRID), row["run_id"]))
    grids = []
    for key, group in groupby(run_rows, lambda row: tuple(row[key] for key in _GRID)):
        rows = list(group)
        if len(rows) > 1:
            grids.append(_grid("/".join(key), rows, points))
    if not grids:
        raise UserError(f"{runs}: no experiment, stage and data set has two runs or more; there is nothing to search")
    return grids


def _read(path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        said = str(error).splitlines()[0]
        raise UserError(f"{path}: not readable as parquet ({said}); give the published file") from None
    missing = [column for column in columns if column not in table.column_names]
    if missing:
        raise UserError(f"{path}: has no column {', '.join(missing)}; it has {', '.join(table.column_names)}")
    return table.select(list(columns)).to_pylist()


def _grid(
    name: str, rows: Sequence[Mapping[str, Any]], points: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]
) -> Grid:
    for metric, mode, factor, unit in METRICS:
        if all((row["run_id"], metric) in points for row in rows):
            return Grid(name, mode, factor, unit, tuple(_curve(row, points[row["run_id"], metric]) for row in rows))
    raise UserError(f"{name}: its runs share none of the metrics {', '.join(metric for metric, *_ in METRICS)}")


def _curve(run: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Curve:
    epochs = run["epochs"]
    reports = sorted((row["epoch"] / epochs, row["elapsed_s"], row["value"]) for row in rows)
    thaw = run["freeze_epochs"] / epochs if run["freeze_n_layers"] else 0.0
    return Curve(run["run_id"], epochs, thaw, tuple(Point(*report) for report in reports))


def search(grid: Grid, settings: AshaSettings, workers: int, order: Sequence[Curve]) -> Outcome:
    """One search: `workers` at once, in the order given, stopped by the shipped scheduler."""
    rungs = open_rungs(settings, grid.mode, WARMUP, grid.thaw, grid.horizon)
    waiting = iter(enumerate(order))
    reports: list[tuple[float, int, int, float]] = []  # clock of the report, trial, its index, the trial's start

    def start(now: float) -> None:
        for trial, curve in waiting:
            heapq.heappush(reports, (now + curve.points[0].seconds, trial, 0, now))
            return

    for _ in range(workers):
        start(0.0)
    used, stopped, seen = 0.0, 0, []
    while reports:
        now, trial, index, started = heapq.heappop(reports)
        curve, point = order[trial], order[trial].points[index]
        seen.append(point.value)
        keep = rungs.record(curve.run_id, point.progress, point.value).keep
        if keep and index + 1 < len(curve.points):
            heapq.heappush(reports, (started + curve.points[index + 1].seconds, trial, index + 1, started))
            continue
        used += point.seconds
        stopped += not keep
        start(now)
    return Outcome(used, grid.best(seen), stopped / len(order))


def replay(grid: Grid, settings: AshaSettings, workers: int = 4, orders: int = 200, seed: int = 0) -> Row:
    """The grid's line of the table, over `orders` random orders of arrival."""
    outcomes = [search(grid, settings, workers, order) for order in _orders(grid, orders, seed)]
    full = grid.best([point.value for curve in grid.curves for point in curve.points])
    regrets = [abs(full - outcome.best) * grid.factor for outcome in outcomes]
    return Row(
        grid=grid.name,
        trials=len(grid.curves),
        saved_share=1 - statistics.fmean(outcome.seconds for outcome in outcomes) / grid.seconds,
        regret=max(regrets),
        regret_mean=statistics.fmean(regrets),
        regret_unit=grid.unit,
        stopped_share=statistics.fmean(outcome.stopped for outcome in outcomes),
        rungs=open_rungs(settings, grid.mode, WARMUP, grid.thaw, grid.horizon).places,
        gpu_hours=grid.seconds / 3600,
    )


def _orders(grid: Grid, orders: int, seed: int) -> Iterator[list[Curve]]:
    for number in range(orders):
        order = list(grid.curves)
        random.Random(f"{seed}/{grid.name}/{number}").shuffle(order)
        yield order


def total(rows: Sequence[Row]) -> float:
    """The saved share of the GPU time of all grids together."""
    return sum(row.saved_share * row.gpu_hours for row in rows) / sum(row.gpu_hours for row in rows)


def table(rows: Sequence[Row]) -> str:
    """The rows as text."""
    head = f"{'grid':<28} {'trials':>6} {'saved':>6} {'stopped':>7} {'regret: worst':>13} {'mean':>7}  {'in':<10} rungs"
    lines = [head]
    for row in rows:
        places = " ".join(f"{place:.2f}" for place in row.rungs)
        lines.append(
            f"{row.grid:<28} {row.trials:>6} {row.saved_share:>6.1%} {row.stopped_share:>7.0%} "
            f"{row.regret:>13.3f} {row.regret_mean:>7.3f}  {row.regret_unit:<10} {places}"
        )
    return "\n".join([*lines, f"{'all GPU time':<28} {sum(row.trials for row in rows):>6} {total(rows):>6.1%}"])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Replays published learning curves through the shipped scheduler.")
    parser.add_argument("--curves", type=Path, required=True, help="parquet, one row per run, epoch and metric")
    parser.add_argument("--runs", type=Path, required=True, help="parquet, one row per run")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--workers", type=int, default=4, help="trials at once (default 4)")
    parser.add_argument("--orders", type=int, default=200, help="random orders of arrival (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the orders (default 0)")
    parser.add_argument("--scheduler", default="{}", help="instead of the shipped settings: '{grace: 0.25, eta: 4}'")
    given = parser.parse_args(arguments)
    try:
        if min(given.workers, given.orders) < 1:
            raise UserError(f"--workers {given.workers} --orders {given.orders}: both must be 1 or more")
        settings = validate(AshaSettings, parse_yaml(given.scheduler, "--scheduler"), "--scheduler")
        grids = read_grids(given.curves, given.runs)
        rows = [replay(grid, settings, given.workers, given.orders, given.seed) for grid in grids]
        warnings = [(grid.name, early_cut(settings, WARMUP, grid.thaw, grid.horizon)) for grid in grids]
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    for name, warning in warnings:
        if warning:
            print(f"{name}: {warning}", file=sys.stderr)
    print(json.dumps([asdict(row) for row in rows], indent=1) if given.json else table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
