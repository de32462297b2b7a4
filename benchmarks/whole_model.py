"""One training step of a whole BERT by dstrain and by Hugging Face: useful tokens per second and peak memory.

    python -m benchmarks.whole_model --data DATA [--lengths 512 4096 16384] [--tasks mlm classification]
        [--kinds sdpa favor lsh] [--json FILE] [--plot FILE.png] [--threads N] [--budget SECONDS]

The other side is the same BERT of `transformers` under its Trainer, with the same DeepSpeed JSON, on the same texts
(benchmarks/whole_model_sides.py says what "same" means). Every side of a cell (task and length) has a process of its
own; they take their steps in turns, round after round until the cell's share of the budget is used, and each round
reads other documents, the same for all. A ratio is one of medians over the rounds. Documents up to 512 tokens are
wiki's (mlm) or imdb's (classification), at their natural lengths; longer ones are the longest of longsci, cut.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from dstrain.schema import UserError

if TYPE_CHECKING:
    from benchmarks.whole_model_sides import Job, Step

ROOT = Path(__file__).resolve().parents[1]
TASKS = ("mlm", "classification")
SIDES = ("dstrain", "hf")
TARGETS = {"mlm": 3.0, "classification": 2.0}
"""Useful tokens per second over Hugging Face's that dstrain sets out to reach."""
MOST_ROUNDS = 9
CORPORA = {"mlm": "wiki", "classification": "imdb"}
LONG_CORPUS = "longsci"
PRELOADED = (
    "benchmarks.whole_model_sides", "deepspeed", "transformers.trainer", "transformers.models.bert.modeling_bert",
    "transformers.data.data_collator", "transformers.integrations.deepspeed", "accelerate",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One side of one cell."""

    side: str
    task: str
    kind: str
    length: int
    dtype: str
    tokens_per_s: float
    """Real tokens, never padding."""
    seconds_per_step: float
    cpu_seconds_per_step: float
    peak_bytes: int
    rounds: int
    tokens_per_step: float
    useful_share: float
    """Real tokens over the tokens computed with; the rest is padding."""
    speedup_vs_hf: float | None
    memory_vs_hf: float | None
    memory_vs_sdpa: float | None


class Cell(NamedTuple):
    """What all sides do in turns."""

    task: str
    length: int


# ----------------------------------------------------------------------------------------------------- the rounds


class Worker:
    """One side at work in a process of its own."""

    def __init__(self, context: Any, job: Job) -> None:
        from benchmarks.whole_model_sides import serve

        self.job, self.steps = job, list[Any]()
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=serve, args=(job, other), daemon=True)
        self._process.start()
        other.close()

    def wait(self) -> Any:
        """What the process says next. Raises UserError when it failed."""
        try:
            said = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise UserError(
                f"{self.job.name}: its process died (exit status {self._process.exitcode}), as the system does when memory "
                "runs out; give shorter --lengths or fewer --tokens-per-step"
            ) from None
        if isinstance(said, str) and said != "ready":
            raise UserError(f"{self.job.name}: failed ({said.strip().splitlines()[-1]}); where it did:\n{said}")
        return said

    def step(self) -> None:
        """Takes one step."""
        self._pipe.send(True)
        self.steps.append(self.wait())

    def end(self) -> None:
        """Lets the process go."""
        if self._process.is_alive():
            try:
                self._pipe.send(False)
            except OSError:
                pass
            self._process.join(10)
        if self._process.is_alive():
            self._process.terminate()


def take_rounds(context: Any, jobs: Sequence[Job], seconds: float) -> list[list[Step]]:
    """The steps of each job: rounds over all jobs, each round beginning with another one, for about `seconds`."""
    workers: list[Worker] = []
    try:
        began = time.monotonic()
        workers += [Worker(context, job) for job in jobs]
        for worker in workers:
            worker.wait()
        last = 0.0
        for number in range(MOST_ROUNDS):
            if number and time.monotonic() - began + last > seconds:
                break
            round_began = time.monotonic()
            for place in range(len(workers)):
                workers[(place + number) % len(workers)].step()
            last = time.monotonic() - round_began
        return [worker.steps for worker in workers]
    finally:
        for worker in workers:
            worker.end()


def make_rows(jobs: Sequence[Job], steps: Sequence[Sequence[Step]], clock: str) -> list[Row]:
    """The rows of one cell, with ratios against Hugging Face's and dstrain's sdpa where they were there."""
    speed, memory = {}, {}
    for job, taken in zip(jobs, steps, strict=True):
        seconds = [step.seconds if clock == "wall" else step.cpu_seconds / job.threads for step in taken]
        speed[job.side, job.kind] = statistics.median(
            step.tokens / took for step, took in zip(taken, seconds, strict=True)
        )
        memory[job.side, job.kind] = max(step.peak_bytes for step in taken)
    hf, sdpa = ("hf", "sdpa"), ("dstrain", "sdpa")
    return [
        Row(
            job.side, job.task, job.kind, job.length, job.dtype,
            tokens_per_s=speed[me := (job.side, job.kind)],
            seconds_per_step=statistics.median(step.seconds for step in taken),
            cpu_seconds_per_step=statistics.median(step.cpu_seconds for step in taken),
            peak_bytes=memory[me],
            rounds=len(taken),
            tokens_per_step=statistics.fmean(step.tokens for step in taken),
            useful_share=sum(step.tokens for step in taken) / sum(step.computed for step in taken),
            speedup_vs_hf=_ratio(speed[me], speed.get(hf)),
            memory_vs_hf=_ratio(memory[me], memory.get(hf)),
            memory_vs_sdpa=_ratio(memory[me], memory.get(sdpa)) if job.side == "dstrain" else None,
        )
        for job, taken in zip(jobs, steps, strict=True)
    ]  # fmt: skip


def _ratio(value: float, over: float | None) -> float | None:
    return None if over is None else value / over


# ---------------------------------------------------------------------------------------------------- the request


def check(given: argparse.Namespace) -> None:
    """Raises UserError with the first thing that makes no sense."""
    from dstrain.model.attention import AttentionSettings
    from dstrain.model.encoder import PRESETS
    from dstrain.schema import did_you_mean

    known = [kind.model_fields["kind"].default for kind in get_args(get_args(AttentionSettings)[0])]
    for kind in given.kinds:
        if kind not in known:
            raise UserError(f"--kinds {kind}: there is no such attention{did_you_mean(kind, known)}")
    if given.preset not in PRESETS:
        raise UserError(f"--preset {given.preset}: there is no such shape{did_you_mean(given.preset, PRESETS)}")
    for length in given.lengths:
        if not 16 <= length <= 2**20:
            raise UserError(f"--lengths {length}: a document has 16 to {2**20} tokens here")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not 1 <= given.threads <= cores:
        raise UserError(f"--threads {given.threads}: this machine lends 1 to {cores} cores")
    if not (given.budget > 0 and math.isfinite(given.budget)):
        raise UserError(f"--budget {given.budget:g}: give seconds above 0")
    if given.tokens_per_step < 16:
        raise UserError(f"--tokens-per-step {given.tokens_per_step}: give at least 16")
    for option, path in (("--json", given.json), ("--plot", given.plot)):
        if path is not None and not path.resolve().parent.is_dir():
            raise UserError(f"{option} {path}: there is no folder {path.resolve().parent}; make it first")
    if "hf" in given.sides and (missing := _missing("transformers", "accelerate")):
        print(f"Hugging Face's side is left out: {missing} is not installed (pip install {missing})", file=sys.stderr)
        given.sides = [side for side in given.sides if side != "hf"]
    if not given.sides:
        raise UserError(
            "--sides hf: there is no other side, and it is not installed; pip install transformers accelerate"
        )


def _missing(*modules: str) -> str:
    return " ".join(module for module in modules if importlib.util.find_spec(module) is None)


def make_jobs(given: argparse.Namespace, cell: Cell, vocabulary: Path) -> list[Job]:
    """Hugging Face first, then each kind."""
    from benchmarks.whole_model_sides import NATURAL, Job
    from dstrain.data.corpora import CorpusSettings

    name = CORPORA[cell.task] if cell.length <= NATURAL else LONG_CORPUS
    corpus = CorpusSettings(name=name, labelled=cell.task == "classification", keywords=())
    sides = [("hf", "sdpa")] * ("hf" in given.sides)
    sides += [("dstrain", kind) for kind in given.kinds if "dstrain" in given.sides]
    return [
        Job(
            side=side, task=cell.task, kind=kind, length=cell.length, dtype=given.dtype, preset=given.preset,
            corpus=corpus, data=os.environ["DSTRAIN_DATA"], vocabulary=vocabulary,
            deepspeed=ROOT / "ds_configs" / f"zero{given.zero}.json",
            documents_per_step=max(1, given.tokens_per_step // cell.length), steps=MOST_ROUNDS, threads=given.threads,
            grouped=given.grouped,
        )
        for side, kind in sides
    ]  # fmt: skip


def prepare_texts(jobs: Iterable[Job], size: int, folder: Path) -> None:
    """Trains the vocabulary (on wiki) and tokenises all corpora before anything is timed; both are kept in the cache."""
    from dstrain.data.cache import cache_home, open_corpus, open_vocabulary
    from dstrain.data.corpora import CorpusSettings
    from dstrain.data.vocabulary import VocabularySettings

    wiki = CorpusSettings(name=CORPORA["mlm"], labelled=False, keywords=())
    vocabulary = open_vocabulary(VocabularySettings(size=size), wiki, cache_home(), _say)
    vocabulary.save(folder)
    for job in jobs:
        corpus = open_corpus(job.corpus, vocabulary, job.length, cache_home(), _say)
        if job.task == "classification":
            corpus.require_labels()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def describe(given: argparse.Namespace) -> dict[str, Any]:
    """What a reader needs to judge the figures: the machine, the request, and what is counted."""
    import torch

    from benchmarks.measure import environment

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    asked = ("preset", "dtype", "clock", "zero", "grouped", "tokens_per_step", "vocabulary", "budget")
    return {
        **environment(device, given.threads, ("deepspeed", "transformers", "accelerate", "numpy")),
        "request": {name: getattr(given, name) for name in asked},
        "peak_bytes": "growth of the resident set (CPU) or of the allocator (GPU) from before the model is built to the "
        "highest point: weights, gradients, AdamW's moments, DeepSpeed's buffers, activations, temporaries",
        "seconds": "forward, backward, clipping, update; making the batch is left out on both sides",
    }


# ----------------------------------------------------------------------------------------------------- the answer


def table(rows: Sequence[Row]) -> str:
    """The rows as text."""
    head = (
        f"{'task':<15}{'length':>7}  {'side':<8}{'kind':<7}{'tokens/s':>9}{'x hf':>7}{'s/step':>9}{'cpu s':>8}"
        f"{'rounds':>7}{'useful':>8}{'peak MiB':>10}{'x hf':>6}{'x sdpa':>8}"
    )
    return "\n".join([head, *(_line(row) for row in rows)])


def _line(row: Row) -> str:
    return (
        f"{row.task:<15}{row.length:>7}  {row.side:<8}{row.kind:<7}{row.tokens_per_s:>9.0f}{_figure(row.speedup_vs_hf):>7}"
        f"{row.seconds_per_step:>9.2f}{row.cpu_seconds_per_step:>8.1f}{row.rounds:>7}{row.useful_share:>8.0%}"
        f"{row.peak_bytes / 2**20:>10.0f}"
        f"{_figure(row.memory_vs_hf):>6}{_figure(row.memory_vs_sdpa):>8}"
    )


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def plot(rows: Sequence[Row], path: Path, title: str) -> None:
    """Speed (above) and memory (below) as multiples of Hugging Face's, or as they are without it, for each task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    tasks = [task for task in TASKS if any(row.task == task for row in rows)]
    names = list(dict.fromkeys((row.side, row.kind) for row in rows))
    colours = dict(zip(names, ("0.6", "tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple"), strict=False))
    relative = all(row.speedup_vs_hf is not None for row in rows)
    panels = (
        (
            "useful tokens/s" + (", times Hugging Face" if relative else ""),
            "speedup_vs_hf" if relative else "tokens_per_s",
        ),
        (
            "peak memory" + (", times Hugging Face" if relative else ", GiB"),
            "memory_vs_hf" if relative else "peak_bytes",
        ),
    )
    figure, axes = plt.subplots(2, len(tasks), figsize=(5.5 * len(tasks) + 0.5, 7), squeeze=False, sharey="row")
    for (label, name), line in zip(panels, axes, strict=True):
        for task, axis in zip(tasks, line, strict=True):
            lengths = sorted({row.length for row in rows if row.task == task})
            width = 0.8 / len(names)
            for place, (side, kind) in enumerate(names):
                found = {
                    row.length: getattr(row, name) / (2**30 if name == "peak_bytes" else 1)
                    for row in rows
                    if (row.task, row.side, row.kind) == (task, side, kind)
                }
                at = [lengths.index(length) + (place - (len(names) - 1) / 2) * width for length in found]
                called = "Hugging Face, sdpa" if side == "hf" else f"dstrain, {kind}"
                bars = axis.bar(at, list(found.values()), width * 0.92, color=colours[side, kind], label=called)
                axis.bar_label(bars, fmt="%.2g" if max(found.values()) < 100 else "%.0f", fontsize=7, padding=1)
            axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
            axis.set_xlabel("tokens of a document, at most")
            axis.spines[["top", "right"]].set_visible(False)
            if relative and name == "speedup_vs_hf":
                axis.axhline(TARGETS[task], color="black", linewidth=0.8, linestyle="--")
                axis.annotate(f"target {TARGETS[task]:g}", (1, TARGETS[task]), xycoords=("axes fraction", "data"),
                              ha="right", va="bottom", fontsize=8)  # fmt: skip
            axis.set_title(task if name in ("speedup_vs_hf", "tokens_per_s") else "")
        line[0].set_ylabel(label)
    figure.suptitle(title, fontsize=10)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(names), frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    given = _parser().parse_args(arguments)
    try:
        check(given)
        if given.data is not None:
            os.environ["DSTRAIN_DATA"] = str(given.data)
        if not os.environ.get("DSTRAIN_DATA"):
            raise UserError("DSTRAIN_DATA is not set: give --data, a folder that holds wiki/, imdb/ and longsci/")
        rows = measure(given)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(table(rows))
    facts = describe(given)
    if given.json is not None:
        answer = {"environment": facts, "targets": TARGETS, "rows": [asdict(row) for row in rows]}
        given.json.write_text(json.dumps(answer, indent=1) + "\n", encoding="utf-8")
    if given.plot is not None:
        where = f"{facts['device']}, threads: {given.threads}"
        plot(rows, given.plot, f"One training step of {given.preset} in {given.dtype}; {where}")
    return 0 if len({(row.task, row.length) for row in rows}) == len(cells_of(given)) else 1


def cells_of(given: argparse.Namespace) -> list[Cell]:
    """The cells asked for, the longest first: short ones then share what is left of the budget."""
    return [
        Cell(task, length) for length in sorted(set(given.lengths), reverse=True) for task in dict.fromkeys(given.tasks)
    ]


def measure(given: argparse.Namespace) -> list[Row]:
    """The rows of all cells that could be measured, from short to long; what went wrong in others is said."""
    import tempfile

    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ["OMP_NUM_THREADS"] = str(given.threads)  # read by the processes below when they start
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    cells = cells_of(given)
    with tempfile.TemporaryDirectory() as folder:
        jobs = {cell: make_jobs(given, cell, Path(folder)) for cell in cells}
        prepare_texts((jobs[cell][0] for cell in cells), given.vocabulary, Path(folder))
        context = multiprocessing.get_context("forkserver")  # the libraries are imported once
        context.set_forkserver_preload(list(PRELOADED))
        began = time.monotonic()
        found: dict[Cell, list[Row]] = {}
        for number, cell in enumerate(cells):
            share = (given.budget - (time.monotonic() - began)) / (len(cells) - number)
            try:
                found[cell] = make_rows(jobs[cell], take_rounds(context, jobs[cell], share), given.clock)
            except UserError as error:  # what the other cells showed is not lost with it
                _say(str(error))
                continue
            _say("\n".join(_line(row) for row in found[cell]))
    if not found:
        raise UserError("nothing could be measured; the sentences above say why")
    order = sorted(found, key=lambda cell: (TASKS.index(cell.task), cell.length))
    return [row for cell in order for row in found[cell]]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.whole_model", description="A training step of a whole BERT against Hugging Face's."
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[512, 4096, 16384], help="tokens of a document at most"
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--kinds", nargs="+", default=["sdpa", "favor", "lsh"], help="attention of dstrain's side")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--data", type=Path, help="folder with wiki/, imdb/ and longsci/ (default: DSTRAIN_DATA)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=cores, help=f"of each process (default {cores})")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall",
        help="tokens/s by wall time, or (where others use the machine too; take --threads 1) by CPU time over threads",
    )  # fmt: skip
    parser.add_argument(
        "--budget", type=float, default=600.0, help="seconds to spend, one round at least (default 600)"
    )
    parser.add_argument("--tokens-per-step", type=int, default=8192, help="documents x length of a step (default 8192)")
    parser.add_argument(
        "--zero", type=int, choices=(0, 1), default=0,
        help="ZeRO stage of both sides; with one rank there is nothing to partition and 1 only copies (default 0)",
    )  # fmt: skip
    parser.add_argument(
        "--grouped", action="store_true",
        help="both sides read batches of like lengths, as a Trainer's group_by_length draws them; its default is random",
    )  # fmt: skip
    parser.add_argument("--preset", default="bert_small", help="shape of the model (default bert_small)")
    parser.add_argument("--vocabulary", type=int, default=30522, help="most tokens of the vocabulary (default 30522)")
    parser.add_argument("--json", type=Path, help="write rows and environment here")
    parser.add_argument("--plot", type=Path, help="draw them here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
