"""A run that is killed anywhere ends bit for bit where it would have ended: runs that die and go on, against ones that do not.

    python -m benchmarks.faults --deaths 100 [--seed S] [--ranks 1 2] [--json FILE]

Each chain is one run of three stages (mlm, tapt, classify) that is started, dies at a moment drawn at random, is started again
by the same command, dies again, and at last is left to finish. Its weights, optimizer states, readings and MLflow run must
equal those of an undisturbed run of the same settings. Exit status: 0 no difference, 1 at the first one, which is named.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.faults_compare import differences
from benchmarks.faults_victim import EXITS_WITH, MOMENTS
from benchmarks.forker import Forked, Forker, surroundings
from dstrain.engine import free_port

VICTIM = Path(__file__).with_name("faults_victim.py")
KINDS = ("sigkill", "sigterm", "sigusr1", "exception", "exit")
POLITE = ("sigterm", "sigusr1")
"""Kinds that ask: the run saves and leaves with status 75."""
SAVED = 75
ATTENTION: dict[str, dict[str, Any]] = {
    "sdpa": {"kind": "sdpa"},
    "favor": {"kind": "favor", "nb_features": 16, "redraw_interval": 2},
    "lsh": {"kind": "lsh", "num_hashes": 2, "chunk_size": 16},
}
PATIENCE_SECONDS = 180.0
GRACE_SECONDS = 2.0
"""How long the other ranks may outlive one that died, before this launcher ends them as SLURM and torchrun do."""
PARTING_SECONDS = 60.0
"""How much longer when the first to go had saved: the first rank still hands its last readings to MLflow."""


class Difference(AssertionError):
    """What should not be: a figure that differs, or a start that ended in another way than it should."""


@dataclass(frozen=True)
class Configuration:
    """What is trained."""

    attention: str
    zero: int
    ranks: int
    precision: str
    tracked: bool

    def __str__(self) -> str:
        ranks = f"{self.ranks} rank{'s' * (self.ranks > 1)}"
        return f"{self.attention} ZeRO-{self.zero} {ranks} {self.precision}{' tracked' * self.tracked}"


@dataclass(frozen=True)
class Fault:
    """What a start is to die of: at the so-many-th event of a moment, or (random) after some seconds."""

    moment: str
    kind: str
    event: int
    rank: int
    seconds: float = 0.0


@dataclass(frozen=True)
class Death:
    """A start that died."""

    fault: Fault
    stage: str
    """The stage it was in; `start` before the first."""
    configuration: Configuration


# -------------------------------------------------------------------------------------------------- what is trained


def write_corpora(folder: Path) -> None:
    """Two small corpora out of docstrings: `general` for the first stage, `task` with two classes for the others."""
    import argparse as one
    import csv
    import email.message as two
    import inspect
    import pathlib as three
    import textwrap as four
    import urllib.request as five

    rows: list[tuple[str, str]] = []
    for label, modules in {"text": (one, four, three), "net": (two, five, socket)}.items():
        classes = [kind for module in modules for _, kind in inspect.getmembers(module, inspect.isclass)]
        members = [member for kind in classes for _, member in inspect.getmembers(kind, callable)]
        docs = {doc: label for member in members if (doc := inspect.getdoc(member)) and len(doc) > 40}
        rows += [(doc[:300], label) for doc in list(docs)[:60]]
    random.Random(0).shuffle(rows)
    for name, part in {"general": rows[:50], "task": rows[50:]}.items():
        (folder / name).mkdir()
        split = {"train": part[0::2], "validation": part[1::4], "test": part[3::4]}
        for file, chosen in split.items():
            with (folder / name / f"{file}.csv").open("w", newline="", encoding="utf-8") as stream:
                csv.writer(stream).writerows([("text", "label"), *chosen])


def settings_of(configuration: Configuration, corpora: Path) -> dict[str, Any]:
    """The run's file."""
    stage = {
        "max_length": 48, "tokens_per_batch": 192, "steps": 6, "accumulation": 2 // configuration.ranks, "report_every": 2,
        "evaluate_every_steps": 3, "checkpoint_every": 2, "patience": 9, "optim": {"lr": 3e-3},
    }  # fmt: skip
    general, task = str(corpora / "general"), str(corpora / "task")
    mlm = {"kind": "mlm"}
    return {
        "base": {
            "name": "run",
            "output_dir": ".",
            "vocabulary": {"size": 250},
            "encoder": {
                "preset": "bert_tiny", "num_layers": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
                "qkv_size": 32, "attention": ATTENTION[configuration.attention],
            },
            "stages": {
                "mlm": {**stage, "objective": mlm, "corpus": {"path": general, "labelled": False}},
                "tapt": {**stage, "objective": mlm, "corpus": {"path": task, "labelled": False}},
                "classify": {**stage, "objective": {"kind": "classify"}, "corpus": {"path": task}, "num_frozen_layers": 1},
            },
            "precision": configuration.precision,
            "deepspeed": f"ds_configs/zero{configuration.zero}.json",
            "tracking": {"enabled": configuration.tracked},
        }
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------- starting


@dataclass
class Ended:
    """How a start ended."""

    statuses: list[int | None]
    struck: dict[str, Any] | None
    """Where and when the fault came, as the victim said, or whoever sent it a signal; None when it never did."""
    stage: str
    seconds: float
    log: str
    events: dict[str, int] = field(default_factory=dict)
    begun: list[float] = field(default_factory=list)
    """When the rank that was to be struck began its optimizer steps; nothing where it was killed."""

    @property
    def went_on(self) -> bool:
        """Whether steps were begun after the fault that cannot have been under way already: it was not heard."""
        struck = self.struck
        return struck is not None and sum(when > struck["at"] for when in self.begun) > struck["spare"]


class Launcher:
    """Starts all ranks of a run and waits for them, as torchrun or srun would."""

    def __init__(self, forker: Forker) -> None:
        self._forker = forker

    def run(self, folder: Path, configuration: Configuration, fault: Fault | None) -> Ended:
        """One start of the run in `folder`, with one rank that is to die of the fault."""
        notes = folder / "tensors"
        for note in notes.glob("*.json") if notes.exists() else ():
            note.unlink()
        log = folder / "log.txt"
        log.write_text("")
        port = free_port()
        began = time.monotonic()
        ranks = []
        for rank in range(configuration.ranks):
            plan = asdict(fault) if fault and fault.rank == rank and fault.moment != "random" else {}
            environ = {
                **surroundings(), "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(configuration.ranks),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DSTRAIN_FAULT": json.dumps(plan),
                "DSTRAIN_FAULT_OUT": str(notes), "DSTRAIN_CACHE": str(folder / "cache"),
            }  # fmt: skip
            ranks.append(self._forker.start([VICTIM, "run.yaml"], folder, environ, log))
        statuses = self._wait(ranks, fault, began, log, notes)
        struck, stage = _note(notes, "struck"), _stage(notes, 0)
        events = {key: value for key, value in (_note(notes, "events", 0) or {}).items() if key in MOMENTS}
        begun = (_note(notes, "events", fault.rank if fault else 0) or {"begun": []})["begun"]
        return Ended(statuses, struck, stage, time.monotonic() - began, log.read_text(errors="replace"), events, begun)

    def _wait(
        self, ranks: list[Forked], fault: Fault | None, began: float, log: Path, notes: Path
    ) -> list[int | None]:
        """The exit statuses; a rank that dies takes the others with it after a grace."""
        hit = fault is None or fault.moment != "random"
        ended_at = None
        while None in (statuses := [rank.poll() for rank in ranks]):
            now = time.monotonic()
            if not hit and now - began >= fault.seconds:  # type: ignore[union-attr]
                hit = True
                assert fault is not None
                if statuses[fault.rank] is None:
                    ranks[fault.rank].send_signal(_SIGNALS[fault.kind])
                    struck = {"stage": _stage(notes, fault.rank), "moment": "random", "at": time.monotonic(), "spare": 1}
                    notes.mkdir(exist_ok=True)
                    (notes / f"struck.rank{fault.rank}.json").write_text(json.dumps(struck))
            if ended_at is None and any(statuses):
                ended_at = now + (PARTING_SECONDS if SAVED in statuses else 0)
            if now - began > PATIENCE_SECONDS or (ended_at is not None and now - ended_at > GRACE_SECONDS):
                for rank in ranks:
                    rank.send_signal(signal.SIGKILL)
                if now - began > PATIENCE_SECONDS + 30:
                    raise Difference(f"a rank cannot be ended; its log is {log}")
            time.sleep(0.01)
        if time.monotonic() - began > PATIENCE_SECONDS:
            raise Difference(f"a start hung for {PATIENCE_SECONDS:.0f} s\n{log.read_text(errors='replace')[-3000:]}")
        return statuses


_SIGNALS = {"sigkill": signal.SIGKILL, "sigterm": signal.SIGTERM, "sigusr1": signal.SIGUSR1}


def _note(folder: Path, name: str, rank: int | None = None) -> dict[str, Any] | None:
    for file in sorted(folder.glob(f"{name}.rank{'*' if rank is None else rank}.json")):
        return dict(json.loads(file.read_text()))
    return None


def _stage(notes: Path, rank: int) -> str:
    return str((_note(notes, "stage", rank) or {"stage": "start"})["stage"])


# --------------------------------------------------------------------------------------------------------- chains


class Harness:
    """Undisturbed runs, each made once, and chains of deaths that are compared with them."""

    def __init__(self, folder: Path, seed: int, say: Callable[[str], None], forker: Forker) -> None:
        self._folder, self._say = folder, say
        self._random = random.Random(seed)
        self._wholes: dict[Configuration, Ended] = {}
        self.deaths: list[Death] = []
        self.starts = self.chains = 0
        corpora = folder / "corpora"
        corpora.mkdir(parents=True)
        write_corpora(corpora)
        self._launcher = Launcher(forker)

    def whole(self, configuration: Configuration) -> tuple[Path, Ended]:
        """The folder of the undisturbed run, and how it went."""
        folder = self._folder / f"whole-{configuration}".replace(" ", "-")
        if configuration not in self._wholes:
            self._begin(folder, configuration)
            ended = self._launcher.run(folder, configuration, None)
            if any(ended.statuses):
                raise Difference(f"{configuration}: the undisturbed run ended with {ended.statuses}\n{ended.log[-3000:]}")
            self._wholes[configuration] = ended
        return folder, self._wholes[configuration]

    def _begin(self, folder: Path, configuration: Configuration) -> None:
        from dstrain.schema import dump_yaml

        folder.mkdir()
        (folder / "run.yaml").write_text(dump_yaml(settings_of(configuration, self._folder / "corpora")))

    def chain(self, configuration: Configuration, wanted: int) -> None:
        """A run that dies about `wanted` times and is then left alone; its end is compared with the undisturbed one's."""
        whole, undisturbed = self.whole(configuration)
        cut = self._folder / f"cut-{self.chains}"
        self.chains += 1
        self._begin(cut, configuration)
        faults = self._faults(configuration, undisturbed, wanted)
        tale = []
        for fault in [*faults, None]:
            ended = self._launcher.run(cut, configuration, fault)
            self.starts += 1
            tale.append(f"{fault or 'left alone'} -> {ended.statuses} in {ended.stage}")
            self._judge(configuration, fault, ended, tale)
            if not any(ended.statuses):
                break
            if fault:
                self.deaths.append(Death(fault, (ended.struck or {"stage": ended.stage})["stage"], configuration))
        found = list(itertools.islice(differences(whole, cut), 8))
        if found:
            raise Difference("\n  ".join([f"{configuration}, run folder {cut / 'run'}", *tale, *found]))
        self._say(f"{configuration}: {len(tale) - 1} deaths, no difference; {len(self.deaths)} deaths in all")

    def _faults(self, configuration: Configuration, undisturbed: Ended, wanted: int) -> list[Fault]:
        """Drawn so that a run gets on between them: early moments first, events spread over the run."""
        early = [moment for moment in ("vocabulary", "tokenisation") if self._random.random() < 0.25]
        later = [m for m in (*MOMENTS, "random") if m not in ("vocabulary", "tokenisation")]
        moments = early + self._random.choices(later, k=max(1, wanted - len(early)))
        return [self._fault(moment, configuration, undisturbed, wanted) for moment in moments]

    def _fault(self, moment: str, configuration: Configuration, undisturbed: Ended, wanted: int) -> Fault:
        rank = self._random.randrange(configuration.ranks)
        if moment == "random":
            seconds = self._random.uniform(0.1, 0.7 * undisturbed.seconds)
            return Fault(moment, self._random.choice([*_SIGNALS]), 0, rank, round(seconds, 2))
        if moment in ("vocabulary", "tokenisation", "between") and configuration.ranks > 1:
            rank = 0  # the first rank writes what all read
        events = undisturbed.events.get(moment, 1)
        share = 1 if moment in ("vocabulary", "tokenisation") else max(1, wanted - 1)
        return Fault(moment, self._random.choice(KINDS), self._random.randint(1, max(1, events // share)), rank)

    def _judge(self, configuration: Configuration, fault: Fault | None, ended: Ended, tale: list[str]) -> None:
        """Whether a start ended as it must: by the fault, or by itself where the fault never came, or too late to matter.

        One that is asked to stop may finish when it was in its last step or past it. It may not take another step.
        """
        allowed: set[int | None] = {0}
        if fault is not None and ended.struck is not None:
            allowed |= {
                "sigkill": {-signal.SIGKILL}, "sigterm": {SAVED}, "sigusr1": {SAVED}, "exception": {1}, "exit": {EXITS_WITH}
            }[fault.kind]  # fmt: skip
            if fault.kind in POLITE and ended.went_on:
                allowed.remove(0)
        status = ended.statuses[fault.rank if fault else 0]
        if status not in allowed or (status == 0 and any(ended.statuses)):
            said = "\n  ".join([f"{configuration}: status {ended.statuses} where {sorted(map(str, allowed))} is right", *tale])
            raise Difference(f"{said}\n{ended.log[-4000:]}")


def configurations(ranks: Sequence[int], generator: random.Random) -> Iterator[Configuration]:
    """All of the matrix, again and again: every dozen has each kind of attention at each ZeRO stage; one in three is tracked."""
    cells = list(itertools.product(ATTENTION, range(4)))
    others = list(itertools.product(ranks, ("fp32", "bf16")))
    while True:
        left = {cell: generator.sample(others, len(others)) for cell in cells}
        for _ in others:
            generator.shuffle(cells)
            for place, cell in enumerate(cells):
                (attention, zero), (world, precision) = cell, left[cell].pop()
                yield Configuration(attention, zero, world, precision, tracked=place % 3 == 0)


# -------------------------------------------------------------------------------------------------- what is shown


def table(title: str, deaths: Sequence[Death], row: Callable[[Death], str], column: Callable[[Death], str]) -> str:
    """Deaths counted by two properties."""
    counts = Counter((row(death), column(death)) for death in deaths)
    rows, columns = sorted({key for key, _ in counts}), sorted({key for _, key in counts})
    width = max(10, *(len(name) + 2 for name in columns))
    lines = [f"{title:<24}" + "".join(f"{name:>{width}}" for name in columns)]
    lines += [f"{name:<24}" + "".join(f"{counts[name, other]:>{width}}" for other in columns) for name in rows]
    return "\n".join(lines)


def tables(deaths: Sequence[Death]) -> str:
    """The deaths by kind, moment, stage, attention, ZeRO stage, ranks and precision."""
    return "\n\n".join(
        [
            table("kind x stage", deaths, lambda d: d.fault.kind, lambda d: d.stage),
            table("moment x kind", deaths, lambda d: d.fault.moment, lambda d: d.fault.kind),
            table(
                "attention x ZeRO", deaths, lambda d: d.configuration.attention, lambda d: f"ZeRO-{d.configuration.zero}"
            ),
            table(
                "ranks x precision", deaths, lambda d: str(d.configuration.ranks), lambda d: d.configuration.precision
            ),
        ]
    )


@contextlib.contextmanager
def harness(seed: int, folder: Path | None, say: Callable[[str], None]) -> Iterator[Harness]:
    """A harness in a folder that goes afterwards, unless one was given or a difference was found."""
    own = Path(tempfile.mkdtemp(prefix="faults-")) if folder is None else folder
    with Forker() as forker:
        yield Harness(own, seed, say, forker)
    if folder is None:
        import shutil

        shutil.rmtree(own, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    words = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=(__doc__ or "").splitlines()[0])
    words.add_argument("--deaths", type=int, default=100, help="chains are begun until there were so many")
    words.add_argument("--seed", type=int, default=0)
    words.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    words.add_argument("--per-chain", type=int, default=5, help="deaths of one run before it is left alone")
    words.add_argument("--folder", type=Path, help="where the runs lie; kept")
    words.add_argument("--json", type=Path, help="where every death is kept")
    given = words.parse_args(argv)
    began, difference = time.monotonic(), ""
    with harness(given.seed, given.folder, lambda sentence: print(sentence, flush=True)) as made:
        drawn = configurations(given.ranks, random.Random(given.seed))
        try:
            while len(made.deaths) < given.deaths:
                made.chain(next(drawn), given.per_chain)
        except Difference as error:
            difference = str(error)
    print(f"\n{tables(made.deaths)}\n" if made.deaths else "")
    minutes = (time.monotonic() - began) / 60
    print(f"{len(made.deaths)} deaths in {made.chains} runs and {made.starts} starts, {minutes:.1f} minutes, seed {given.seed}")
    print(f"DIFFERENCE: {difference}" if difference else "0 differences")
    if given.json:
        _keep(given.json, made, given.seed, difference)
    return int(bool(difference))


def _keep(file: Path, made: Harness, seed: int, difference: str) -> None:
    import torch

    from benchmarks.measure import environment

    record = {
        "seed": seed, "deaths": len(made.deaths), "chains": made.chains, "starts": made.starts, "difference": difference,
        "environment": environment(torch.device("cpu"), 1, ["deepspeed", "mlflow"]),
        "all": [
            {**asdict(death.configuration), **asdict(death.fault), "stage": death.stage} for death in made.deaths
        ],
    }  # fmt: skip
    file.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
