"""What a search leaves to look at: `trials.parquet` for a data frame, `parallel.png` and `curves.png` for the eye.

All three are made from the trials' folders alone, at the end of a search or in the middle of one, and made again they
are the same, byte for byte. A picture is drawn on a canvas of its own: no window, no state shared with the caller.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from dstrain.search import Candidate, Row, Search, brief
from dstrain.tracking import sent_of

TRIALS_FILE, PARALLEL_FILE, CURVES_FILE = "trials.parquet", "parallel.png", "curves.png"

FEW_VALUES = 8
"""A numeric setting with no more values than this shows each of them; one with more gets a scale."""
LOG_SPAN = 30
"""A scale whose ends are further apart than this factor is logarithmic."""
NAMED_TRIALS = 12
"""With more trials than this the curves name the best three only."""
MOST_TICKS = 24

_ABSENT = object()  # the value of a setting that a trial has not got; None is a value
_BELOW = -0.12  # where trials without the setting cross its axis
_COLOURS = (
    "tab:red", "tab:blue", "tab:green", "tab:orange", "tab:purple", "tab:brown", "tab:pink", "tab:olive", "tab:cyan",
    "black", "navy", "darkkhaki",
)  # fmt: skip
_MARKS = {"stopped": "x", "failed": "v"}
_RUNG: dict[str, Any] = {"color": "0.4", "linestyle": ":", "linewidth": 1.2, "zorder": 1}


# ------------------------------------------------------------------------------------------------ the table


def write_trials(search: Search) -> Path:
    """Writes `trials.parquet` and returns its path: a row per trial, best first, and then the finalists' further seeds.

    Columns: `id`; every searched address (numbers and truth values typed, all else as text, null where a trial has not
    got the setting); `state`; `reason`; `value`, the best of the deciding metric, and `last_value`, its last (null
    where none was reported); `step` and `total_steps` of the deciding stage; `seconds`, `tokens`, `tokens_per_second`
    and `peak_memory_gb` over all stages; `attempts`, how often it was started; `seed`; `folder`; `mlflow_run_id`. The
    metric and its mode stand in the schema's metadata as `dstrain.metric` and `dstrain.mode`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [*search.rows(), *map(search.row, _finals_only(search))]
    columns = {"id": pa.array([row.candidate.id for row in rows], "string")}
    for address in _addresses([row.candidate for row in rows]):
        columns[address] = _column([row.candidate.trial.overrides.get(address) for row in rows])
    records = [_record(search, row) for row in rows]
    for name, kind in _KINDS.items():
        columns[name] = pa.array([record[name] for record in records], kind)
    table = pa.table(columns).replace_schema_metadata(
        {"dstrain.metric": search.settings.metric, "dstrain.mode": search.settings.mode}
    )
    with _whole(search.folder / TRIALS_FILE) as draft:
        pq.write_table(table, draft)
    return search.folder / TRIALS_FILE


_KINDS = {
    "state": "string",
    "reason": "string",
    "value": "float64",
    "last_value": "float64",
    "step": "int64",
    "total_steps": "int64",
    "seconds": "float64",
    "tokens": "int64",
    "tokens_per_second": "float64",
    "peak_memory_gb": "float64",
    "attempts": "int64",
    "seed": "int64",
    "folder": "string",
    "mlflow_run_id": "string",
}
"""What is known of every trial besides its own settings, and how it is stored."""


def _record(search: Search, row: Row) -> dict[str, Any]:
    candidate = row.candidate
    readings = candidate.readings()
    values = search.values(readings)
    deciding = [reading for reading in readings if reading.stage == search.metric[0]]
    last_of_stage = {reading.stage: reading for reading in readings if reading.split == "train"}
    return {
        "state": row.state,
        "reason": row.reason,
        "value": row.value,
        "last_value": values[-1][2] if values else None,
        "step": deciding[-1].step if deciding else None,
        "total_steps": deciding[-1].total_steps if deciding else None,
        "seconds": row.seconds,
        "tokens": sum(reading.tokens for reading in last_of_stage.values()),
        "tokens_per_second": None if math.isnan(row.tokens_per_second) else row.tokens_per_second,
        "peak_memory_gb": None if math.isnan(row.peak_memory_gb) else row.peak_memory_gb,
        "attempts": 1 + len(candidate.faults()),
        "seed": candidate.settings.seed,
        "folder": str(candidate.folder),
        "mlflow_run_id": sent_of(candidate.folder).run_id or None,
    }


def _finals_only(search: Search) -> list[Candidate]:
    """Runs of the finalists that are no trials of the search proper."""
    known = {candidate.id for candidate in search.candidates}
    runs = (candidate for runs in search.finalists() for candidate in runs)
    return [candidate for candidate in runs if candidate.id not in known and candidate.folder.exists()]


def _column(values: Sequence[Any]) -> Any:
    """A searched setting's values as an Arrow array: truth values, whole numbers, numbers, or else text."""
    import pyarrow as pa

    kinds = {type(value) for value in values} - {type(None)}
    for kind, allowed in (("bool", {bool}), ("int64", {int}), ("float64", {int, float})):
        if kinds and kinds <= allowed:
            return pa.array(values, kind)
    return pa.array([None if value is None else brief(value) for value in values], "string")


def _addresses(candidates: Sequence[Candidate]) -> list[str]:
    return list(dict.fromkeys(address for candidate in candidates for address in candidate.trial.overrides))


# ---------------------------------------------------------------------------------------- parallel coordinates


@dataclass(frozen=True)
class Axis:
    """An upright axis: where each trial crosses it (0 is its foot, 1 its top), and what is written beside it."""

    title: str
    places: list[float]
    ticks: list[tuple[float, str]]


def draw_parallel(search: Search) -> Path | None:
    """Draws `parallel.png`: a line per trial through an axis per searched setting that varies, to the deciding metric.

    The colour is the metric, the best are darkest; trials that did not finish are thin and pale; failed trials are
    left out and counted. Returns None, and draws nothing, while no trial has a value.
    """
    rows, best = search.rows(), search.best()
    drawn = [row for row in rows if _has_value(row) and row.state != "failed"]
    if not drawn:
        return None
    axes = _axes(search, drawn)
    with _canvas(search.folder / PARALLEL_FILE, max(8.0, 2.3 * len(axes) + 1.0), 5.8) as (figure, panel):
        _draw_axes(panel, axes, search.settings.mode == "max")
        for number, row in reversed(list(enumerate(drawn))):  # the best on top
            _draw_trial(panel, [axis.places[number] for axis in axes], row, _is(row, best), search)
        _title(figure, search, rows)
        figure.supxlabel(_parallel_caption(rows, drawn), fontsize=8).set_parse_math(False)
    return search.folder / PARALLEL_FILE


def _is(row: Row, best: Candidate | None) -> bool:
    return best is not None and row.candidate.id == best.id


def _has_value(row: Row) -> bool:
    return row.value is not None and math.isfinite(row.value)


def _axes(search: Search, drawn: Sequence[Row]) -> list[Axis]:
    """The settings' axes as the space has them in order, and the metric's last."""
    trials = [row.candidate.trial for row in drawn]
    addresses = _addresses(search.candidates)
    varying = [a for a in addresses if len({_word(trial.overrides.get(a, _ABSENT)) for trial in trials}) > 1]
    titles = _short(varying or addresses)
    planned = [candidate.trial for candidate in search.candidates]
    axes = []
    for address, title in titles.items():
        order = list(dict.fromkeys(_word(trial.overrides[address]) for trial in planned if address in trial.overrides))
        axes.append(setting_axis(title, [trial.overrides.get(address, _ABSENT) for trial in trials], order))
    values = [row.value for row in drawn if row.value is not None]
    return [*axes, _scale(search.settings.metric, values, search.settings.mode == "min" and _crowded(values))]


def setting_axis(title: str, values: Sequence[Any], order: Sequence[str]) -> Axis:
    """The axis of a searched setting: a scale for many different numbers, else a place for each value.

    `values` belong to the trials from best to worst; those that share a place are fanned out in this order, so that
    lines which would hide one another lie side by side. `order` is that of the words, from the foot; numbers ascend.
    """
    there = [value for value in values if value is not _ABSENT]
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in there)
    if numeric and len(set(there)) > FEW_VALUES:
        scale = _scale(title, there, _crowded(there))
        place_of = dict(zip(there, scale.places, strict=True))
        places, ticks = [_BELOW if value is _ABSENT else place_of[value] for value in values], scale.ticks
    else:
        words = {_word(value): value for value in there}
        ascending = sorted(words, key=words.__getitem__ if numeric else list(order).index)
        gap = 1 / max(1, len(ascending))
        middle = {word: gap * (number + 0.5) for number, word in enumerate(ascending)}
        places = _fanned([_BELOW if value is _ABSENT else middle[_word(value)] for value in values], 0.6 * gap)
        ticks = [(place, word) for word, place in middle.items()][:: math.ceil(len(middle) / MOST_TICKS) or 1]
    return Axis(title, places, ticks if len(there) == len(values) else [(_BELOW, "not set"), *ticks])


def _fanned(places: Sequence[float], width: float) -> list[float]:
    """Trials at one place, spread over a part of the axis: the first at the top."""
    spread = min(width, 0.12)
    found = list(places)
    for place in set(places):
        here = [number for number, other in enumerate(places) if other == place]
        for rank, number in enumerate(here):
            found[number] = place + (spread * (0.5 - rank / (len(here) - 1)) if len(here) > 1 else 0.0)
    return found


def _scale(title: str, values: Sequence[float], logarithmic: bool) -> Axis:
    """An axis from the lowest to the highest value, with round numbers beside it."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    low, high = min(values), max(values)
    if low == high:
        return Axis(title, [0.5] * len(values), [(0.5, f"{low:.4g}")])
    if logarithmic:
        decades = math.log10(high / low)
        locator: Any = LogLocator(subs=(1.0,) if decades > 3 else (1.0, 2.0, 5.0), numticks=MOST_TICKS)
    else:
        locator = MaxNLocator(8, integer=all(isinstance(value, int) for value in values))

    def place(value: float) -> float:
        return math.log(value / low) / math.log(high / low) if logarithmic else (value - low) / (high - low)

    round_numbers = [float(tick) for tick in locator.tick_values(low, high) if low <= tick <= high]
    return Axis(title, [place(value) for value in values], [(place(tick), f"{tick:.4g}") for tick in round_numbers])


def _crowded(values: Sequence[float]) -> bool:
    """Whether most values would crowd at the foot of a linear scale: wide apart, and the middle one in the low quarter."""
    low, high = min(values), max(values)
    return low > 0 and high / low > LOG_SPAN and median(values) < low + (high - low) / 4


def _draw_axes(panel: Any, axes: Sequence[Axis], high_is_good: bool) -> None:
    """Upright lines with their numbers, and the metric's colours along the last."""
    for x, axis in enumerate(axes):
        panel.plot([x, x], [0, 1], color="0.3", linewidth=1, zorder=1)
        for place, word in axis.ticks:
            panel.plot([x - 0.015, x + 0.015], [place, place], color="0.3", linewidth=1, zorder=5)
            last = x == len(axes) - 1
            panel.text(
                x + (0.075 if last else -0.03), place, textwrap.fill(word, 18), ha="left" if last else "right", va="center",
                fontsize=8, zorder=6, parse_math=False, bbox={"facecolor": "white", "alpha": 0.75, "pad": 0.6, "lw": 0},
            )  # fmt: skip
        panel.text(x, 1.06, axis.title, ha="center", va="bottom", fontsize=9, weight="bold", parse_math=False)
    shades = [[_shade(number / 255, high_is_good)] for number in range(256)]
    end = len(axes) - 1
    panel.imshow(shades, extent=(end + 0.02, end + 0.06, 0, 1), origin="lower", aspect="auto", zorder=2)
    foot = min(0.0, *(place for axis in axes for place in axis.places))
    panel.set(xlim=(-0.6, end + 0.7), ylim=(foot - 0.02, 1.15))
    panel.axis("off")


def _draw_trial(panel: Any, places: Sequence[float], row: Row, best: bool, search: Search) -> None:
    full = row.state == "finished"
    panel.plot(
        range(len(places)), places, color=_shade(places[-1], search.settings.mode == "max"),
        linewidth=3.0 if best else 1.6 if full else 0.8, alpha=0.9 if full or best else 0.4, zorder=4 if full else 3,
        marker="o" if len(places) == 1 else "", solid_joinstyle="round",
    )  # fmt: skip


def _shade(place: float, high_is_good: bool) -> Any:
    """Dark for good; the palest tenth of the colours is left out, which would not show on white."""
    from matplotlib import colormaps

    return colormaps["viridis"](0.9 * (1 - place if high_is_good else place))


def _parallel_caption(rows: Sequence[Row], drawn: Sequence[Row]) -> str:
    thin = sum(row.state != "finished" for row in drawn)
    failed = sum(row.state == "failed" for row in rows)
    silent = len(rows) - failed - len(drawn)
    said = [f"{len(drawn)} of {len(rows)} trials: dark is good, the best is thick"]
    said += [f"thin: {thin} not run to the end, with their best so far"] if thin else []
    said += [f"left out: {failed} failed"] if failed else []
    said += [f"{silent} without a value"] if silent else []
    return "; ".join(said)


# ------------------------------------------------------------------------------------------- learning curves


@dataclass(frozen=True)
class Curve:
    """What one trial reported of the deciding metric, and how it is drawn."""

    row: Row
    steps: list[int]
    total_steps: int
    values: list[float]
    """Not a number wherever it was not finite: there the line has a gap."""
    best: bool


def draw_curves(search: Search) -> Path | None:
    """Draws `curves.png`: the deciding metric over the share of its stage, a line per trial, the rungs as upright lines.

    The best trial is thick; ends of trials that were stopped or failed are marked. A few trials are all named, of many
    (or with several seeds) the best three. Returns None, and draws nothing, while no trial has a value.
    """
    rows, best = search.rows(), search.best()
    curves = _curves(search, rows, best)
    if not curves:
        return None
    named = len(curves) if len(curves) <= NAMED_TRIALS and not search.settings.seeds else 3
    with _canvas(search.folder / CURVES_FILE, 10.0, 5.6 + 0.17 * min(named, len(curves))) as (figure, panel):
        for place, curve in reversed(list(enumerate(curves))):  # the best on top
            _draw_curve(panel, curve, _stroke(place, place < named, curve.best))
        places = search.rungs()[0].places
        for share in places:
            panel.axvline(share, **_RUNG)
        _label(panel, search, curves)
        _title(figure, search, rows)
        legend = figure.legend(
            handles=_handles(curves, named, places), loc="outside lower left", fontsize=8, frameon=False, handlelength=3
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
    return search.folder / CURVES_FILE


def _curves(search: Search, rows: Sequence[Row], best: Candidate | None) -> list[Curve]:
    """Of trials with a value, as the table has them; but the winner first, for it finished, and failed ones last."""
    found = []
    for row in rows:
        told = search.values(row.candidate.readings())
        values = [value if math.isfinite(value) else math.nan for _, _, value in told]
        if not all(map(math.isnan, values)):
            found.append(Curve(row, [step for step, _, _ in told], told[-1][1], values, _is(row, best)))
    return sorted(found, key=lambda curve: (not curve.best, curve.row.state == "failed"))


def _draw_curve(panel: Any, curve: Curve, stroke: dict[str, Any]) -> None:
    shares = [step / curve.total_steps for step in curve.steps]
    panel.plot(shares, curve.values, **stroke, marker="." if len(shares) == 1 else "")
    if curve.row.state in _MARKS:
        x, y = next(point for point in zip(shares[::-1], curve.values[::-1], strict=True) if not math.isnan(point[1]))
        panel.plot([x], [y], _MARKS[curve.row.state], color=stroke["color"], markersize=6, zorder=6)


def _stroke(place: int, named: bool, best: bool) -> dict[str, Any]:
    """How the trial at this place among the best is drawn."""
    if not named:
        return {"color": "0.55", "linewidth": 0.8, "alpha": 0.5, "zorder": 2}
    return {"color": _COLOURS[place], "linewidth": 3.0 if best else 1.3, "alpha": 1.0, "zorder": 5 if best else 3}


def _label(panel: Any, search: Search, curves: Sequence[Curve]) -> None:
    """Shares below, optimizer steps above, the metric at the side."""
    high_is_good = search.settings.mode == "max"
    finite = [value for curve in curves for value in curve.values if not math.isnan(value)]
    if not high_is_good and _crowded(finite):  # a loss that blew up must not flatten all others
        panel.set_yscale("log")
    panel.set(xlim=(0, 1.01), xlabel=f"share of the stage {search.metric[0]}")
    panel.set_ylabel(f"{search.settings.metric} ({'high' if high_is_good else 'low'} is good)", parse_math=False)
    panel.grid(alpha=0.25)
    total = curves[0].total_steps
    above = panel.secondary_xaxis("top", functions=(lambda share: share * total, lambda steps: steps / total))
    same = all(curve.total_steps == total for curve in curves)
    above.set_xlabel("optimizer steps" + ("" if same else " (of the first trial named below; others have more or fewer)"))


def _handles(curves: Sequence[Curve], named: int, rungs: Sequence[float]) -> list[Any]:
    """The legend: named trials with their values, all others together, what the marks mean, where the rungs stand."""
    from matplotlib.lines import Line2D

    found = []
    for place, curve in enumerate(curves[:named]):
        candidate = curve.row.candidate
        label = f"{'best ' if curve.best else ''}{curve.row.value:.4g}: {candidate.changes or candidate.id}"
        stroke = _stroke(place, True, curve.best)
        found.append(Line2D([], [], **stroke, label=textwrap.shorten(label, 150, placeholder=" ...")))
    if others := len(curves[named:]):
        found.append(Line2D([], [], **_stroke(named, False, False), label=f"{others} other{'s' if others > 1 else ''}"))
    for state, mark in _MARKS.items():
        if count := sum(curve.row.state == state for curve in curves):
            words = "stopped early" if state == "stopped" else state
            found.append(Line2D([], [], linestyle="", marker=mark, color="0.3", label=f"{count} {words}"))
    if rungs:
        places = ", ".join(f"{place:.2g}" for place in rungs)
        found.append(Line2D([], [], **_RUNG, label=f"rung{'s' if len(rungs) > 1 else ''} at {places} of the stage"))
    return found


# ------------------------------------------------------------------------------------------------- the canvas


@contextmanager
def _canvas(path: Path, width: float, height: float) -> Iterator[tuple[Any, Any]]:
    """A figure of `width` by `height` inches with one panel; becomes the file when all was drawn, whole or not at all."""
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.style.context("default"):  # whatever the user's own matplotlibrc says
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure, figure.subplots()
        with _whole(path) as draft:
            figure.savefig(draft, format="png", dpi=110)


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A draft beside the file, renamed to it at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".draft")
    try:
        yield draft
        draft.rename(path)
    finally:
        draft.unlink(missing_ok=True)


def _title(figure: Any, search: Search, rows: Sequence[Row]) -> None:
    lines = [f"{search.base.name}: {search.settings.metric}", *_winner(search, rows)]
    width = int(11 * figure.get_figwidth())
    text = "\n".join(textwrap.fill(line, width) for line in lines)
    figure.suptitle(text, fontsize=10).set_parse_math(False)


def _winner(search: Search, rows: Sequence[Row]) -> list[str]:
    """The best trial in a line, or the best finalist; nothing while there is none."""
    if finals := search.finals():
        best = finals[0]
        value = f"{best.mean:.4g} ± {best.spread:.2g} over {len(best.values)} seeds"
        return [f"best finalist {value}: {best.candidate.changes or best.candidate.id}"]
    best_trial = search.best()
    return [f"best {row.value:.4g}: {row.candidate.changes or row.candidate.id}" for row in rows if _is(row, best_trial)]


def _short(addresses: Sequence[str]) -> dict[str, str]:
    """Each address by as many of its last words as tell it from the others."""
    found = {}
    for address in addresses:
        words = address.split(".")
        tails = [".".join(words[-count:]) for count in range(1, len(words) + 1)]
        found[address] = next(t for t in tails if sum(f".{other}".endswith(f".{t}") for other in addresses) == 1)
    return found


def _word(value: Any) -> str:
    return "" if value is _ABSENT else brief(value)
