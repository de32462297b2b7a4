"""Time and memory of the attention kinds, forward and backward of the kernel alone, as ratios to exact attention."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstrain.schema import UserError

if TYPE_CHECKING:  # --help answers before torch is imported
    from benchmarks.candidates import Candidate, Workload

LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
KINDS = ("sdpa", "favor", "favor:nb_features=64", "lsh", "lsh:num_hashes=4")
PICTURES = (".png", ".svg", ".pdf")
EPILOG = """\
examples:
  python -m benchmarks.attention
  python -m benchmarks.attention --peers --threads 2 --json rows.json --plot rows.png
  python -m benchmarks.attention --lengths 4096 --kinds favor:nb_features=64 lsh:num_hashes=4,chunk_size=32
  python -m benchmarks.attention --lengths 512 --documents 32
  python -m benchmarks.attention --device cuda --dtype bf16 --lengths 4096 16384 65536
  python -m benchmarks.attention --accuracy --help

Ratios are medians over rounds in which every candidate runs once, in rotated order. sdpa is always among them. On a CPU the
memory of each candidate is the growth of a process of its own. exit status: 0 done, 2 a mistake in what was asked.
"""


@dataclass(frozen=True)
class Row:
    """One candidate at one length."""

    name: str
    kind: str
    settings: dict[str, Any]
    length: int
    documents: int
    num_heads: int
    head_dim: int
    dtype: str
    device: str
    threads: int
    rounds: int
    """How many the medians are over."""
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    saved_bytes: int
    time_vs_sdpa: float
    time_vs_sdpa_cpu: float
    memory_vs_sdpa: float
    saved_vs_sdpa: float
    time_vs_peer: dict[str, float]
    """To each peer that was given the same settings."""
    peer: bool
    kernel: str


# ----------------------------------------------------------------------------------------------- measuring


def measure(
    candidates: Sequence[Candidate], load: Workload, threads: int, repeats: int, budget: float
) -> Iterator[Row]:
    """The rows of one length; the first candidate is what the others are compared with."""
    import statistics

    import torch

    from benchmarks.candidates import AttentionStep, attention_footprint
    from benchmarks.measure import in_a_process, median_ratio, race

    device = torch.device(load.device)
    preload = ["benchmarks.candidates", *(candidate.peer.module for candidate in candidates if candidate.peer)]
    prints = [
        attention_footprint(candidate, load, threads)
        if device.type == "cuda"
        else in_a_process(preload, attention_footprint, candidate, load, threads)
        for candidate in candidates
    ]
    torch.set_num_threads(threads)
    steps = [AttentionStep(candidate, load) for candidate in candidates]
    rounds = race(steps, repeats, budget, device)
    wall = [[samples[i].seconds for samples in rounds] for i in range(len(steps))]
    cpu = [[samples[i].cpu_seconds for samples in rounds] for i in range(len(steps))]
    for i, candidate in enumerate(candidates):
        twins = {
            other.kind: wall[j]
            for j, other in enumerate(candidates)
            if other.peer and not candidate.peer and other.settings == candidate.settings
        }
        yield Row(
            name=candidate.name,
            kind=candidate.kind,
            settings=candidate.settings.model_dump(exclude={"kind"}),
            length=load.length,
            documents=load.documents,
            num_heads=load.num_heads,
            head_dim=load.head_dim,
            dtype=load.dtype,
            device=load.device,
            threads=threads,
            rounds=len(rounds),
            seconds=statistics.median(wall[i]),
            cpu_seconds=statistics.median(cpu[i]),
            peak_bytes=prints[i].peak_bytes,
            saved_bytes=prints[i].saved_bytes,
            time_vs_sdpa=median_ratio(wall[i], wall[0]),
            time_vs_sdpa_cpu=median_ratio(cpu[i], cpu[0]),
            memory_vs_sdpa=prints[i].peak_bytes / prints[0].peak_bytes,
            saved_vs_sdpa=prints[i].saved_bytes / prints[0].saved_bytes,
            time_vs_peer={name: median_ratio(wall[i], seconds) for name, seconds in twins.items()},
            peer=candidate.peer is not None,
            kernel=steps[i].kernel,
        )


# ------------------------------------------------------------------------------------------------- showing


def crossovers(rows: Sequence[Row]) -> dict[str, float | None]:
    """For each name the length from which on it is faster than sdpa, None where no measured length is long enough."""
    from benchmarks.measure import crossover

    return {
        name: crossover([row.length for row in line], [row.time_vs_sdpa for row in line])
        for name, line in _lines(rows).items()
        if name != "sdpa"
    }


def _lines(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each name, by length."""
    names = dict.fromkeys(row.name for row in rows)
    return {name: sorted((row for row in rows if row.name == name), key=lambda row: row.length) for name in names}


def _pays_from(crossing: float | None, shortest: int) -> str:
    if crossing is None:
        return "not faster at any of these lengths"
    at_most = "at most " if crossing <= shortest else ""
    return f"faster from {at_most}{crossing:.0f} tokens"


def show(rows: Sequence[Row], environment: dict[str, Any]) -> None:
    """Prints the table, what ran, and where."""
    from rich.console import Console
    from rich.table import Table

    peers = list(dict.fromkeys(name for row in rows for name in row.time_vs_peer))
    table = Table(title=_title(rows[0], environment), title_justify="left")
    table.add_column("length", justify="right")
    table.add_column("kind", no_wrap=True)
    beside = [f"/ {name.replace('-', ' ')}" for name in peers]
    for head in ("ms", "/ sdpa", "cpu / sdpa", *beside, "peak MiB", "/ sdpa", "saved MiB", "/ sdpa", "rounds"):
        table.add_column(head, justify="right")
    for length in dict.fromkeys(row.length for row in rows):
        for row in (row for row in rows if row.length == length):
            table.add_row(*_cells(row, peers))
        table.add_section()
    console = Console()
    if not console.is_terminal:
        console = Console(width=170)
    console.print(table)
    shortest, crossed = min(row.length for row in rows), crossovers(rows)
    for name, kernel in {row.name: row.kernel for row in rows}.items():
        pays = f"{_pays_from(crossed[name], shortest)}; " if name in crossed else ""
        console.print(f"{name}: {pays}{kernel}", highlight=False)
    for key in ("torch", "commit", "date", "load_average", "allocator"):
        console.print(f"{key}: {environment[key]}", highlight=False)


def _title(row: Row, environment: dict[str, Any]) -> str:
    documents = f"{row.documents} document{'s' if row.documents > 1 else ''}"
    where = f"{environment['device']}, {row.threads} thread{'s' if row.threads > 1 else ''}"
    return f"Attention, forward + backward: {documents}, H={row.num_heads}, D={row.head_dim}, {row.dtype}, {where}"


def _cells(row: Row, peers: Sequence[str]) -> list[str]:
    return [
        f"{row.length}",
        row.name,
        f"{1000 * row.seconds:.1f}",
        f"{row.time_vs_sdpa:.3f}",
        f"{row.time_vs_sdpa_cpu:.3f}",
        *(f"{row.time_vs_peer[name]:.3f}" if name in row.time_vs_peer else "" for name in peers),
        f"{row.peak_bytes / 2**20:.1f}",
        f"{row.memory_vs_sdpa:.2f}",
        f"{row.saved_bytes / 2**20:.1f}",
        f"{row.saved_vs_sdpa:.2f}",
        f"{row.rounds}",
    ]


def plot(rows: Sequence[Row], environment: dict[str, Any], path: Path) -> None:
    """Two panels over the length: time and peak memory as ratios to sdpa; a diamond marks where a line crosses 1.

    A colour is one choice of settings: ours drawn through, peers broken.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    time, memory = figure.subplots(1, 2)
    crossed = crossovers(rows)
    lengths = sorted({row.length for row in rows})
    colours: dict[str, str] = {}
    strokes: dict[str, Any] = {}
    for name, line in _lines(rows).items():
        if name == "sdpa":
            continue
        colour = colours.setdefault(json.dumps(line[0].settings, sort_keys=True), f"C{len(colours)}")
        if line[0].peer:
            strokes.setdefault(line[0].kind, ("--", ":", "-.")[len(strokes) % 3])
        style = {"color": colour, "linestyle": strokes.get(line[0].kind, "-"), "marker": "o", "markersize": 3}
        xs = [row.length for row in line]
        label = f"{name}: {_pays_from(crossed[name], lengths[0])}"
        time.plot(xs, [row.time_vs_sdpa for row in line], label=label, **style)
        memory.plot(xs, [row.memory_vs_sdpa for row in line], **style)
        crossing = crossed[name]
        if crossing is not None and crossing > lengths[0]:
            time.plot([crossing], [1], color=colour, marker="D", markersize=8, markeredgecolor="white", zorder=5)
    for axes, what in ((time, "time"), (memory, "peak memory")):
        axes.axhline(1, color="black", linewidth=1)
        axes.set(xscale="log", yscale="log", xlabel="tokens per document", ylabel=f"{what} / {what} of sdpa")
        axes.set_xticks(lengths, [str(length) for length in lengths], rotation=45)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.grid(alpha=0.3)
    origin = f"torch {environment['torch']}, commit {environment['commit'][:12]}, {environment['date'][:10]}"
    figure.suptitle(f"{_title(rows[0], environment)}\n{origin}", fontsize=10)
    legend = "a diamond marks the crossover with sdpa; a colour is one choice of settings, broken lines are peers"
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, handlelength=4, title=legend, title_fontsize=9)
    figure.savefig(path, dpi=150)


# ------------------------------------------------------------------------------------------------ the door


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if "--accuracy" in words:  # a command of its own behind the same door
        from benchmarks.accuracy import main as accuracy

        return accuracy([word for word in words if word != "--accuracy"])
    given = _parser().parse_args(words)
    try:
        rows, environment = run(given)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    show(rows, environment)
    if given.json:
        written = {"environment": environment, "crossover": crossovers(rows), "rows": [asdict(row) for row in rows]}
        given.json.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    if given.plot:
        plot(rows, environment, given.plot)
    return 0


def run(given: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    """All rows and where they were measured. Raises UserError before anything is measured."""
    for path in (given.json, given.plot):
        if path and not path.parent.is_dir():
            raise UserError(f"{path}: there is no folder {path.parent}; make it first")
    if given.plot and given.plot.suffix not in PICTURES:
        raise UserError(
            f"--plot {given.plot}: no picture is written as that; end the name with {' or '.join(PICTURES)}"
        )
    import torch

    from benchmarks.candidates import Candidate, Workload, read_candidate, with_peers
    from benchmarks.measure import environment
    from benchmarks.peers import PEERS, check_peers
    from dstrain.model.attention.sdpa import SdpaSettings

    if given.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device that torch can use; use --device cpu")
    lengths = sorted(set(given.lengths))
    candidates = list(dict.fromkeys([Candidate(SdpaSettings()), *map(read_candidate, given.kinds)]))
    if given.peers:
        for candidate in candidates:
            check_peers(candidate.settings, lengths)
        candidates = with_peers(candidates)
    threads = given.threads or torch.get_num_threads()
    packages = [peer.name for peer in PEERS] if given.peers else []
    facts = environment(torch.device(given.device), threads, packages)
    facts |= {"repeats": given.repeats, "budget_seconds_per_length": given.budget}
    rows: list[Row] = []
    for length in lengths:
        print(f"measuring {len(candidates)} candidates on {length} tokens", file=sys.stderr)
        load = Workload(length, given.documents, given.heads, given.head_dim, given.dtype, given.device)
        rows += measure(candidates, load, threads, given.repeats, given.budget)
    return rows, facts


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,  # --acc would run the timings
        prog="python -m benchmarks.attention",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--lengths", type=_count, nargs="+", default=LENGTHS, metavar="L", help="tokens per document (256 ... 16384)")
    add("--kinds", nargs="+", default=KINDS, metavar="KIND", help=f"kind or kind:setting=value,... ({' '.join(KINDS)})")
    add("--peers", action="store_true", help="also published implementations, given the same settings (extra `peers`)")
    add("--documents", type=_count, default=1, metavar="N", help="equally long documents in the packed batch (1)")
    add("--heads", type=_count, default=8, metavar="H", help="attention heads (8)")
    add("--head-dim", type=_count, default=64, metavar="D", help="size of a head (64)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(cpu)")
    add("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of q, k, v and their gradients (fp32)")
    add("--threads", type=_count, metavar="N", help="CPU threads (what torch takes)")
    add("--repeats", type=_count, default=30, metavar="N", help="rounds at most (30)")
    add(
        "--budget", type=float, default=60.0, metavar="SECONDS", help="of rounds per length; two rounds always run (60)"
    )
    add("--json", type=Path, metavar="FILE", help="write rows, crossovers and environment")
    add("--plot", type=Path, metavar="FILE.png", help="draw time and memory over the length")
    add("--accuracy", action="store_true", help="instead: error against exact attention; has options of its own")
    return parser


def _count(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
