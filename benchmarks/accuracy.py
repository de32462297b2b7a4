"""How near the approximate kinds come to exact attention, on tokens whose structure is known.

The error is |out - exact| / |exact| (Frobenius), where `exact` is softmax attention over the same queries, keys and
temperature; `uniform` is the error of averaging all values: a kernel that is no better than this says nothing. The modules
are the shipped ones, built through the settings union, in fp32.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # --help answers before torch is imported
    from torch import Tensor

FEATURES = (16, 32, 64, 128, 256, 512, 1024)
STDS = (0.25, 0.5, 0.75, 1.0)
TEMPERATURES = (0.5, 1.0, 2.0, 4.0, 8.0)
TEXTBOOK: dict[str, Any] = {"feature_norm": "chi", "antithetic": False, "center_keys": False, "center_queries": False}
LADDER: dict[str, dict[str, Any]] = {
    "textbook": {},
    "+ sqrt_d": {"feature_norm": "sqrt_d"},
    "+ antithetic": {"antithetic": True},
    "+ center_keys": {"center_keys": True},
    "+ center_queries": {"center_queries": True},
    "+ fitted": {"projections": "fitted"},
}
"""From the published draw to all that is offered, one setting more on each rung; fitted to another document's tokens."""
ROUNDS = (1, 2, 4, 8)
CHUNKS = (16, 32, 64, 128)
TITLES = {
    "norms": "favor, q.k / sqrt(D) of structureless tokens",
    "temperatures, structureless": "favor, unit q and k, structureless tokens",
    "temperatures, clustered": "favor, unit q and k, clustered tokens",
    "temperatures, biased": "favor, unit q and k, biased tokens",
    "settings": "favor, from the textbook to all that is offered",
    "num_hashes": "lsh, shared q and k",
    "chunk_size": "lsh, shared q and k",
}
CLUSTER = 64
"""Tokens of a cluster, on average."""
EPILOG = """\
tokens: structureless (independent normal q, k, v), clustered (clusters of about 64 tokens that q, k and v share) or biased
(all queries have a mean in common, and all keys another). `std` is that of the entries of q and k, whose logits are
q.k / sqrt(D); `t` is the temperature of unit vectors.
exit status: 0 done, 2 a mistake in what was asked.
"""


@dataclass(frozen=True)
class Case:
    """One module on one kind of tokens."""

    study: str
    line: str
    x: str
    tokens: str
    std: float
    softmax: dict[str, Any]
    """The settings that say which exact attention is meant."""
    estimator: dict[str, Any]
    """The settings that only say how it is approximated."""


@dataclass(frozen=True)
class Row:
    """What came out, mean over seeds."""

    study: str
    line: str
    x: str
    tokens: str
    std: float
    settings: dict[str, Any]
    length: int
    num_heads: int
    head_dim: int
    seeds: int
    logit_std: float
    error: float
    error_std: float
    """Standard deviation over seeds (tokens and projections are new in each)."""
    uniform_error: float
    captured_share: float
    """Share of the exact attention that falls on keys which the kernel looks at."""


# ------------------------------------------------------------------------------------------------ what is asked


def cases() -> Iterator[Case]:
    """All of them."""
    for std in STDS:
        for features in FEATURES:
            yield _favor("norms", f"std {std:g}", str(features), "structureless", {"nb_features": features}, std=std)
    for tokens in ("structureless", "clustered", "biased"):
        for t in TEMPERATURES:
            for features in FEATURES:
                study = f"temperatures, {tokens}"
                yield _favor(study, f"t = {t:g}", str(features), tokens, {"nb_features": features}, temperature=t)
    grounds: list[tuple[str, dict[str, Any]]] = [
        (tokens, scale)
        for scale in ({"std": 0.25}, {"std": 0.5}, {"temperature": 1.0}, {"temperature": 4.0})
        for tokens in ("structureless", "clustered", "biased")
    ]
    for tokens, scale in grounds:
        ground = f"{tokens}, {'std' if 'std' in scale else 't ='} {next(iter(scale.values())):g}"
        estimator = dict(TEXTBOOK)
        for rung, setting in LADDER.items():
            estimator |= setting
            yield _favor("settings", ground, rung, tokens, {"nb_features": 256, **estimator}, **scale)
    for tokens in ("clustered", "structureless"):
        for mode, within in (("window", False), ("bucket", True)):
            for rounds in ROUNDS:
                yield _lsh(
                    "num_hashes", f"{tokens}, {mode}", rounds, tokens, num_hashes=rounds, mask_within_chunks=within
                )
            for chunk in CHUNKS:
                yield _lsh(
                    "chunk_size", f"{tokens}, {mode}", chunk, tokens, chunk_size=chunk, mask_within_chunks=within
                )


def _favor(
    study: str, line: str, x: str, tokens: str, estimator: dict[str, Any], std: float = 0.0, temperature: float = 0.0
) -> Case:
    softmax = {"kind": "favor", "normalize_qk": not std} | ({} if std else {"temperature": temperature})
    return Case(study, line, x, tokens, std or 1.0, softmax, estimator)


def _lsh(study: str, line: str, x: int, tokens: str, **estimator: Any) -> Case:
    return Case(study, line, str(x), tokens, 1.0, {"kind": "lsh"}, estimator)


def make_tokens(
    tokens: str, std: float, shape: tuple[int, int, int], seed: int, document: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of a document, (L, H, D); the entries of q and k have the standard deviation asked for.

    Documents of one seed share their clusters' centres and their means, as a trained head's documents do.
    """
    import torch

    from dstrain.model.attention.draws import generator

    shared, own = generator("accuracy", tokens, seed), generator("accuracy", tokens, seed, document)
    length, heads, width = shape
    q, k, v = torch.randn(3, *shape, generator=own)
    if tokens == "biased":
        q, k = ((x + torch.randn(heads, width, generator=shared)) / 2**0.5 for x in (q, k))
    if tokens == "clustered":
        clusters = -(-length // CLUSTER)
        cluster_LH1 = torch.randint(clusters, (length, heads, 1), generator=own)
        near, held = (
            torch.randn(clusters, heads, width, generator=shared).gather(0, cluster_LH1.expand(shape)) for _ in range(2)
        )
        q, k, v = ((centre + 0.5 * x) / 1.25**0.5 for centre, x in ((near, q), (near, k), (held, v)))
    return q * std, k * std, v


# ------------------------------------------------------------------------------------------------ measuring


class _Seen(NamedTuple):
    """One case with one seed."""

    logit_std: float
    error: float
    uniform_error: float
    captured_share: float


def measure(asked: Sequence[Case], length: int, heads: int, width: int, seeds: int) -> list[Row]:
    """A row for each case; cases that mean the same exact attention share its computing."""
    seen: dict[int, list[_Seen]] = {number: [] for number in range(len(asked))}

    def meant(number: int) -> str:
        return json.dumps([asked[number].tokens, asked[number].std, asked[number].softmax])

    for seed in range(seeds):
        for _, group in groupby(sorted(seen, key=meant), key=meant):
            numbers = list(group)
            alike = [asked[number] for number in numbers]
            for number, found in zip(numbers, _measure_alike(alike, (length, heads, width), seed), strict=True):
                seen[number].append(found)
    return [_row(case, seen[number], (length, heads, width)) for number, case in enumerate(asked)]


def _row(case: Case, seen: Sequence[_Seen], shape: tuple[int, int, int]) -> Row:
    mean = _Seen(*map(statistics.fmean, zip(*seen, strict=True)))
    return Row(
        study=case.study, line=case.line, x=case.x, tokens=case.tokens, std=case.std,
        settings=case.softmax | case.estimator, length=shape[0], num_heads=shape[1], head_dim=shape[2], seeds=len(seen),
        error_std=statistics.pstdev(found.error for found in seen), **mean._asdict(),
    )  # fmt: skip


def _measure_alike(alike: Sequence[Case], shape: tuple[int, int, int], seed: int) -> Iterator[_Seen]:
    import torch

    from dstrain.model.attention.report import POINTS, attention_matrix, evenly
    from dstrain.packed import Sequences

    q, k, v = make_tokens(alike[0].tokens, alike[0].std, shape, seed)
    points_P = evenly(len(q), POINTS)
    with torch.no_grad():
        exact, weights_HPP, logit_std = _exact(build(alike[0], shape, seed), q, k, v, points_P)
        uniform_error = float((v.mean(0, keepdim=True) - exact).norm() / exact.norm())
        for case in alike:
            module = build(case, shape, seed)
            keys = q if module.settings.tied_qk else k
            out = module(q, keys, v, Sequences.of([len(q)]))
            own_HPP = attention_matrix(module, q, keys, points_P)
            captured_share = float((weights_HPP * (own_HPP > 0)).sum() / weights_HPP.sum())
            yield _Seen(logit_std, float((out - exact).norm() / exact.norm()), uniform_error, captured_share)


def _exact(module: Any, q: Tensor, k: Tensor, v: Tensor, points_P: Tensor) -> tuple[Tensor, Tensor, float]:
    """(exact attention (L, H, D), its weights among the points (H, P, P), spread of the logits)."""
    import torch

    from dstrain.model.attention.report import exact_logits

    out, weights, variances = torch.empty_like(v), [], []
    for rows in torch.arange(len(q)).split(256):
        logits, _ = exact_logits(module, q, q if module.settings.tied_qk else k, rows)
        shown = logits.masked_fill(logits.isinf(), torch.nan)
        variances.append((shown - shown.nanmean(-1, keepdim=True)).square().nanmean())
        weight = logits.softmax(-1)
        out[rows] = torch.einsum("hpl,lhd->phd", weight, v)
        weights.append(weight[:, torch.isin(rows, points_P)][:, :, points_P])
    return out, torch.cat(weights, 1), float(torch.stack(variances).mean().sqrt())


def build(case: Case, shape: tuple[int, int, int], seed: int) -> Any:
    """The shipped module, in evaluation; what fits itself is shown another document of the same kind."""
    from pydantic import TypeAdapter

    from dstrain.model.attention import AttentionSettings
    from dstrain.packed import Sequences

    settings: Any = TypeAdapter(AttentionSettings).validate_python(case.softmax | case.estimator)
    module = settings.build(shape[1], shape[2], layer=0, seed=seed).eval()
    if case.estimator.get("projections") == "fitted":
        q, k, _ = make_tokens(case.tokens, case.std, shape, seed, document=1)
        module.adapt(q, k, Sequences.of([len(q)]))
    return module


# ------------------------------------------------------------------------------------------------- showing


def show(rows: Sequence[Row], environment: dict[str, Any]) -> None:
    """Prints a table for each study: lines down, x across."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    for study, part in _by(rows, "study").items():
        table = Table(title=f"{TITLES[study]}: {_what(part[0])}", title_justify="left")
        for head in (_tokens_head(part), "logit std", "uniform", *dict.fromkeys(row.x for row in part)):
            table.add_column(head, justify="left" if head == _tokens_head(part) else "right")
        for line, cells in _by(part, "line").items():
            table.add_row(line, f"{cells[0].logit_std:.2f}", _digits(cells[0].uniform_error), *map(_cell, cells))
        console.print(table)
    row = rows[0]
    console.print(f"{row.length} tokens, H={row.num_heads}, D={row.head_dim}, fp32, mean of {_seeds(row)}")
    for key in ("device", "torch", "commit", "date"):
        console.print(f"{key}: {environment[key]}", highlight=False)


def _by(rows: Sequence[Row], name: str) -> dict[str, list[Row]]:
    """The rows of each value of a column, in order of appearance."""
    return {
        value: [row for row in rows if getattr(row, name) == value]
        for value in dict.fromkeys(getattr(row, name) for row in rows)
    }


def _what(row: Row) -> str:
    if row.settings["kind"] == "lsh":
        return f"error (share of the exact attention that is looked at) over {row.study}"
    over = f"with {row.settings['nb_features']} features" if row.study == "settings" else "over nb_features"
    return f"error {over}"


def _seeds(row: Row) -> str:
    return f"{row.seeds} seed{'s' if row.seeds > 1 else ''}"


def _tokens_head(part: Sequence[Row]) -> str:
    tokens = {row.tokens for row in part}
    return tokens.pop() if len(tokens) == 1 else "tokens"


def _cell(row: Row) -> str:
    share = f" ({100 * row.captured_share:.0f} %)" if row.settings["kind"] == "lsh" else ""
    return _digits(row.error) + share


def _digits(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.2f}"


def plot(rows: Sequence[Row], environment: dict[str, Any], path: Path) -> None:
    """Nine panels: favor over features at norms and temperatures and over its settings, lsh over rounds and chunks.

    A broken line is what uniform averaging scores on the tokens of the line with its colour.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 13), layout="constrained")
    FigureCanvasAgg(figure)
    layout: Any = [
        ["norms"] * 2 + ["temperatures, structureless"] * 2 + ["temperatures, clustered"] * 2,
        ["temperatures, biased"] * 2 + ["settings"] * 4,
        ["num_hashes"] * 2 + ["captured"] * 2 + ["chunk_size"] * 2,
    ]
    panels = figure.subplot_mosaic(layout)
    studies = _by(rows, "study")
    for study, part in studies.items():
        axes = panels[study]
        if study == "settings":
            _draw_rungs(axes, part)
            continue
        _draw_lines(axes, part, sequential=part[0].settings["kind"] == "favor")
        axes.set_title(TITLES[study], fontsize=10)
    _draw_captured(panels["captured"], studies["num_hashes"])
    row = rows[0]
    figure.suptitle(
        f"Error against exact attention: {row.length} tokens, H={row.num_heads}, D={row.head_dim}, fp32, {_seeds(row)}; "
        f"broken lines: uniform averaging\ntorch {environment['torch']}, commit {environment['commit'][:12]}, "
        f"{environment['date'][:10]}",
        fontsize=11,
    )
    figure.savefig(path, dpi=110)


def _draw_lines(axes: Any, part: Sequence[Row], sequential: bool) -> None:
    """Error over x, a line for each line of the study."""
    from matplotlib import colormaps
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    lines = _by(part, "line")
    xs = list(dict.fromkeys(row.x for row in part))
    uniform_drawn = set()
    for number, (line, cells) in enumerate(lines.items()):
        colour = colormaps["viridis"](0.9 * number / max(1, len(lines) - 1)) if sequential else f"C{number // 2}"
        stroke = "-" if sequential or number % 2 == 0 else ":"
        axes.plot(
            [float(row.x) for row in cells],
            [row.error for row in cells],
            stroke,
            color=colour,
            marker="o",
            markersize=4,
            label=line,
        )
        if (level := cells[0].uniform_error) not in uniform_drawn:
            uniform_drawn.add(level)
            axes.axhline(level, color=colour, linestyle="--", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel=_x_label(part[0]), ylabel="error")
    axes.set_xticks([float(x) for x in xs], xs)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _x_label(row: Row) -> str:
    return row.study if row.settings["kind"] == "lsh" else "nb_features"


def _draw_captured(axes: Any, part: Sequence[Row]) -> None:
    """Share of the exact attention that is looked at, over rounds."""
    from matplotlib.ticker import NullLocator, PercentFormatter

    for number, (line, cells) in enumerate(_by(part, "line").items()):
        shares = [row.captured_share for row in cells]
        axes.plot(
            [float(row.x) for row in cells],
            shares,
            "-:"[number % 2],
            color=f"C{number // 2}",
            marker="o",
            markersize=4,
            label=line,
        )
    xs = list(dict.fromkeys(row.x for row in part))
    axes.set(xscale="log", xlabel=_x_label(part[0]), ylabel="exact attention on keys that are looked at", ylim=(0, 1))
    axes.set_xticks([float(x) for x in xs], xs)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    axes.set_title(TITLES["num_hashes"], fontsize=10)


def _draw_rungs(axes: Any, part: Sequence[Row]) -> None:
    """Bars of error / uniform error for every rung, grouped by tokens."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    grounds, rungs = _by(part, "line"), list(dict.fromkeys(row.x for row in part))
    width = 0.8 / len(rungs)
    for number, rung in enumerate(rungs):
        heights = [next(row.error / row.uniform_error for row in cells if row.x == rung) for cells in grounds.values()]
        places = [place + (number - (len(rungs) - 1) / 2) * width for place in range(len(grounds))]
        axes.bar(places, heights, width, label=rung)
    axes.axhline(1, color="black", linewidth=1, linestyle="--")
    axes.set_xticks(range(len(grounds)), [ground.replace(", ", "\n") for ground in grounds], fontsize=8)
    axes.set(yscale="log", ylabel="error / error of uniform averaging")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize=8, ncols=len(rungs))
    axes.set_xlim(-0.6, len(grounds) - 0.4)
    axes.set_title(f"{TITLES['settings']}, {part[0].settings['nb_features']} features", fontsize=10)


# ------------------------------------------------------------------------------------------------ the door


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    given = _parser().parse_args(sys.argv[1:] if arguments is None else arguments)
    for path in (given.json, given.plot):
        if path and not path.parent.is_dir():
            print(f"{path}: there is no folder {path.parent}; make it first", file=sys.stderr)
            return 2
    if given.plot and given.plot.suffix != ".png":
        print(f"--plot {given.plot}: the picture is a PNG; end the name with .png", file=sys.stderr)
        return 2
    import torch

    from benchmarks.measure import environment

    facts = environment(torch.device("cpu"), torch.get_num_threads())
    asked = list(cases())
    print(f"measuring {len(asked)} modules on {given.length} tokens, {given.seeds} seeds", file=sys.stderr)
    rows = measure(asked, given.length, given.heads, given.head_dim, given.seeds)
    show(rows, facts)
    if given.json:
        written = {"environment": facts, "rows": [asdict(row) for row in rows]}
        given.json.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    if given.plot:
        plot(rows, facts, given.plot)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attention --accuracy",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--length", type=_count, default=1024, metavar="L", help="tokens of the document (1024)")
    add("--heads", type=_count, default=8, metavar="H", help="attention heads (8)")
    add("--head-dim", type=_count, default=64, metavar="D", help="size of a head (64)")
    add("--seeds", type=_count, default=2, metavar="N", help="tokens and projections drawn anew this often (2)")
    add("--json", type=Path, metavar="FILE", help="write rows and environment")
    add("--plot", type=Path, metavar="FILE.png", help="draw the panels")
    return parser


def _count(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
