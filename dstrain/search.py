"""A search as files: which trials there are, how each ended, the table, `best.yaml`. Knows nothing of Ray.

    runs/lsh/search.yaml                what is searched, with `when` and the command line worked in
    runs/lsh/trials/<id>/               one run folder per trial, as train.py makes it
    runs/lsh/trials/<id>/ended.json     how the trial ended; a trial without one is started (again) by the next search
    runs/lsh/best.yaml                  the winner, for train.py

A trial's id is a hash of what it changes, so the same command finds its finished trials again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from dstrain.loop import Course
from dstrain.optim import warmup_steps
from dstrain.readings import READINGS_FILE, Reading, amount, duration, read_readings
from dstrain.run import hold, read_record, run_vocabulary, stage_corpus, write_whole
from dstrain.rungs import History, NoSchedulerSettings, Rungs, early_cut, open_rungs
from dstrain.schema import UserError, dump_yaml, read_yaml, together
from dstrain.settings import Document, RunSettings, SearchSettings, load_search, plain, run_settings
from dstrain.space import Trial, apply, read_space, setting_named

State = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True)
class Ended:
    """How a trial ended, and why."""

    state: State
    reason: str


@dataclass(frozen=True)
class Candidate:
    """One trial: what it changes, and the run that makes it."""

    trial: Trial
    settings: RunSettings

    @property
    def id(self) -> str:
        """Names the trial in Ray, in MLflow and on disk."""
        return self.trial.id

    @property
    def folder(self) -> Path:
        """The trial's run folder."""
        return self.settings.folder

    @property
    def changes(self) -> str:
        """What the trial changes, as a person would say it: `num_hashes=4 chunk_size=64`."""
        return " ".join(
            f"{address.rpartition('.')[2]}={brief(value)}" for address, value in self.trial.overrides.items()
        )

    def ended(self) -> Ended | None:
        """How it ended; None while it has not."""
        file = self.folder / "ended.json"
        return Ended(**read_record(file)) if file.exists() else None

    def end(self, state: State, reason: str) -> Ended:
        """Writes down how it ended."""
        ended = Ended(state, reason)
        write_whole(self.folder / "ended.json", json.dumps(asdict(ended)))
        return ended

    def readings(self) -> list[Reading]:
        """All it has reported so far."""
        return read_readings(self.folder) if (self.folder / READINGS_FILE).exists() else []


@dataclass(frozen=True)
class Search:
    """A planned search."""

    document: Document
    base: RunSettings
    settings: SearchSettings
    candidates: tuple[Candidate, ...]
    notes: tuple[str, ...]
    """What the planner wants to be known: constraints that left trials out, rungs that cut too early."""

    @property
    def folder(self) -> Path:
        """Where the search keeps everything."""
        return self.base.folder

    @property
    def metric(self) -> tuple[str, str, str]:
        """(stage, split, name) of what decides."""
        stage, split, name = self.settings.metric.split("/")
        return stage, split, name

    def pending(self) -> list[Candidate]:
        """Trials still to be run: those that have not ended, and those that failed."""
        return [
            candidate
            for candidate in self.candidates
            if (ended := candidate.ended()) is None or ended.state == "failed"
        ]

    def values(self, readings: Iterable[Reading]) -> list[tuple[int, int, float]]:
        """(step, total steps, value) of the deciding metric, in order."""
        stage, split, name = self.metric
        return [(r.step, r.total_steps, r.values[name]) for r in readings if (r.stage, r.split) == (stage, split)]

    def rungs(self) -> tuple[Rungs, str | None]:
        """The rungs with all that earlier trials reported on them, and a warning where they cut too early."""
        scheduler, mode = self.settings.scheduler, self.settings.mode
        warmup, thaw, horizon = self._pace()
        rungs = open_rungs(scheduler, mode, warmup, thaw, horizon)
        rungs.replay(
            History(candidate.id, [(step / total, value) for step, total, value in self.values(candidate.readings())])
            for candidate in self.candidates
        )
        return rungs, None if isinstance(scheduler, NoSchedulerSettings) else early_cut(
            scheduler, warmup, thaw, horizon
        )

    def _pace(self) -> tuple[float, float, int]:
        """Of the deciding stage: longest warm-up and latest thaw of any trial as shares, and its optimizer steps."""
        name = self.metric[0]
        stages = [candidate.settings.stages[name] for candidate in self.candidates]
        horizon = stages[0].steps
        if horizon is None:
            settings = self.candidates[0].settings
            corpus = stage_corpus(stages[0], run_vocabulary(settings, _silent), _silent)
            group = self.settings.resources.ranks * stages[0].accumulation
            horizon = Course(corpus.splits["train"].lengths, stages[0], settings.seed, group).total_steps
        warmup = max(warmup_steps(horizon, stage.optim) / horizon for stage in stages)
        thaw = max((stage.thaw_at for stage in stages if stage.num_frozen_layers), default=0.0)
        return warmup, thaw, horizon

    def best(self) -> Candidate | None:
        """The finished trial with the best metric; one that was stopped only if none finished."""
        rows = [row for row in map(self.row, self.candidates) if row.value is not None and not math.isnan(row.value)]
        rows = [row for row in rows if row.state == "finished"] or [row for row in rows if row.state == "stopped"]
        return sorted(rows, key=self._order)[0].candidate if rows else None

    def row(self, candidate: Candidate) -> Row:
        """A trial's line of the table."""
        readings = candidate.readings()
        values = [value for _, _, value in self.values(readings) if not math.isnan(value)]
        pick = max if self.settings.mode == "max" else min
        training = [reading for reading in readings if reading.split == "train"]
        stages = {reading.stage: reading for reading in training}
        seconds = sum(reading.seconds for reading in stages.values())
        tokens = sum(reading.tokens for reading in stages.values())
        ended = candidate.ended()
        return Row(
            candidate=candidate,
            value=pick(values) if values else None,
            seconds=seconds,
            tokens_per_second=tokens / seconds if seconds else math.nan,
            peak_memory_gb=max((reading.values["peak_memory_gb"] for reading in training), default=math.nan),
            state=ended.state if ended else "unfinished",
            reason=ended.reason if ended else "the same command goes on with it",
        )

    def rows(self) -> list[Row]:
        """The table, best first; trials that never reported last."""
        return sorted(map(self.row, self.candidates), key=self._order)

    def _order(self, row: Row) -> tuple[bool, float]:
        value = math.nan if row.value is None else row.value
        return math.isnan(value), -value if self.settings.mode == "max" else value

    def write_best(self) -> Path | None:
        """Writes the winner as a run of its own; None when there is none."""
        best = self.best()
        if best is None:
            return None
        tree = {**plain(best.settings), "name": f"{self.base.name}-best", "output_dir": str(self.base.output_dir)}
        file = self.folder / "best.yaml"
        write_whole(
            file,
            f"# the best of {self.document.source} by {self.settings.metric}: {best.changes}\n"
            + dump_yaml({"base": tree}),
        )
        return file

    def claim(self) -> None:
        """Makes the search's folder, or checks that the one there searches around the same base."""
        hold(self.folder)
        file = self.folder / "search.yaml"
        base = dict(plain(self.base))
        if file.exists() and (there := read_yaml(file).get("base")) != json.loads(json.dumps(base)):
            unlike = sorted(
                key
                for key in base
                if not isinstance(there, dict) or there.get(key) != json.loads(json.dumps(base[key]))
            )
            raise UserError(
                f"{self.folder}: holds a search around another base ({', '.join(unlike)} differ); "
                "give this one another name=..."
            )
        tree = {
            "base": base,
            "space": self.document.space,
            "search": plain(self.settings),
            "precedence": self.document.precedence,
        }
        write_whole(file, dump_yaml(tree))


@dataclass(frozen=True)
class Row:
    """A trial in the table."""

    candidate: Candidate
    value: float | None
    seconds: float
    tokens_per_second: float
    peak_memory_gb: float
    state: str
    reason: str

    def cells(self) -> list[str]:
        """The figures after the hyperparameters, as text."""
        return [
            "-" if self.value is None else f"{self.value:.4f}",
            duration(self.seconds),
            "-" if math.isnan(self.tokens_per_second) else amount(self.tokens_per_second),
            "-" if math.isnan(self.peak_memory_gb) else f"{self.peak_memory_gb:.2f}",
            self.reason if self.reason.startswith(self.state) else f"{self.state}: {self.reason}",
        ]


def brief(value: Any) -> str:
    """A setting's value in few characters: `{kind: lsh, num_hashes: 2}` as `lsh num_hashes=2`."""
    if isinstance(value, Mapping):
        return " ".join(str(inner) if key == "kind" else f"{key}={inner}" for key, inner in value.items())
    return str(value)


def table(search: Search) -> Any:
    """The search as a rich table, best first: hyperparameters, metric, seconds, tokens/s, peak memory, why it ended."""
    from rich.table import Table

    shown = Table(title=f"{search.base.name}: {len(search.candidates)} trials, best first", title_justify="left")
    for address in dict.fromkeys(address for candidate in search.candidates for address in candidate.trial.overrides):
        shown.add_column(address.rpartition(".")[2], overflow="fold")
    for heading in (search.settings.metric, "time", "tok/s", "GB", "why it ended"):
        shown.add_column(heading, justify="left" if heading == "why it ended" else "right")
    addresses = list(dict.fromkeys(address for candidate in search.candidates for address in candidate.trial.overrides))
    for row in search.rows():
        overrides = row.candidate.trial.overrides
        shown.add_row(*(brief(overrides.get(address, "")) for address in addresses), *row.cells())
    return shown


# ----------------------------------------------------------------------------------------------- planning


def plan_search(document: Document) -> Search:
    """The trials of a search file. Raises UserError with every mistake in its base, its space and its trials."""
    base, settings = together(lambda: run_settings(document), lambda: load_search(document))
    own = sorted({"name", "output_dir"} & {word.strip() for key in document.space for word in str(key).split(",")})
    if own:
        raise UserError(
            f"{document.source}: space.{own[0]}: every trial has a name and a folder of its own; "
            "take it out of the space"
        )

    def named(overrides: Mapping[str, Any], name: str, near: str) -> Any:
        tree = apply(document.base, overrides)
        return setting_named(run_settings(Document(document.source, tree, {}, None)), name, near)

    trials, left_out = read_space(
        document.space, document.source, named, trials=settings.trials, seed=settings.seed, seeds=settings.seeds,
        constraints=settings.constraints,
    )  # fmt: skip
    folder = base.folder / "trials"
    candidates: list[Candidate] = []
    problems: dict[str, list[str]] = {}
    for trial in trials:
        tree = apply(document.base, trial.overrides)
        tree |= {"name": trial.id, "output_dir": str(folder)}
        try:
            candidates.append(Candidate(trial, run_settings(Document(document.source, tree, {}, None))))
        except UserError as error:
            for line in str(error).splitlines():
                problems.setdefault(line, []).append(Candidate(trial, base).changes)
    if problems:
        raise UserError("\n".join(_in_trials(line, trials) for line, trials in problems.items()))
    notes = [f"search.constraints leave out {left_out} of {left_out + len(trials)} combinations"] if left_out else []
    return Search(document, base, settings, tuple(candidates), tuple(notes))


def _in_trials(sentence: str, trials: Sequence[str]) -> str:
    more = f" and {len(trials) - 1} more" if len(trials) > 1 else ""
    return f"{sentence} (trial {trials[0]}{more})"


def _silent(sentence: str) -> None:
    """Says nothing."""
