"""A search as files: which trials there are, how each ended, the table, `best.yaml`. Knows nothing of Ray.

    runs/lsh/search.yaml                what is searched, with `when` and the command line worked in
    runs/lsh/trials/<id>/               one run folder per trial, as train.py makes it
    runs/lsh/trials/<id>/ended.json     how the trial ended; a trial without one is started (again) by the next search
    runs/lsh/trials/<id>/faults.jsonl   deaths it was started again after, with their reasons
    runs/lsh/proposed.jsonl             what a learning sampler (tpe) has proposed so far
    runs/lsh/best.yaml                  the winner, for train.py

A trial's id is a hash of what it changes, so the same command finds its finished trials again.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from dstrain.loop import Course
from dstrain.optim import warmup_steps
from dstrain.readings import READINGS_FILE, Reading, amount, duration, read_readings
from dstrain.run import hold, read_record, run_vocabulary, stage_corpus, write_whole
from dstrain.rungs import History, NoSchedulerSettings, Rungs, early_cut, grace_of, open_rungs
from dstrain.schema import UserError, dump_yaml, flatten, read_yaml, together
from dstrain.settings import Document, RunSettings, SearchSettings, differences, load_search, plain, run_settings
from dstrain.space import OpenSpace, Trial, apply, read_space, setting_named

State = Literal["finished", "stopped", "failed"]
FAULTS_FILE = "faults.jsonl"
PROPOSED_FILE = "proposed.jsonl"


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

    @property
    def state(self) -> str:
        """In one word."""
        ended = self.ended()
        return ended.state if ended else "unfinished"

    def end(self, state: State, reason: str) -> Ended:
        """Writes down how it ended."""
        ended = Ended(state, reason)
        write_whole(self.folder / "ended.json", json.dumps(asdict(ended)))
        return ended

    def fault(self, reason: str) -> None:
        """Writes down a death after which it is started again; its node may be lost before it had a folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / FAULTS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": round(time.time(), 3), "reason": reason}) + "\n")

    def faults(self) -> list[str]:
        """The reasons of the deaths so far."""
        return read_faults(self.folder)

    @property
    def configuration(self) -> str:
        """Equal for trials that differ in their seed alone."""
        return json.dumps({address: value for address, value in self.trial.overrides.items() if address != "seed"})

    def readings(self) -> list[Reading]:
        """All it has reported so far."""
        return read_readings(self.folder) if holds(self.folder, READINGS_FILE) else []


def read_faults(folder: Path) -> list[str]:
    """The reasons of the deaths that a trial was started again after, from its run folder."""
    lines = (folder / FAULTS_FILE).read_text(encoding="utf-8").splitlines() if holds(folder, FAULTS_FILE) else []
    return [str(json.loads(line)["reason"]) for line in lines]


def holds(folder: Path, name: str) -> bool:
    """Whether a run folder has this file, which another node may have written. Reads the folder: an NFS client long
    remembers that a name was absent."""
    try:
        return name in os.listdir(folder)
    except FileNotFoundError:
        return False


@dataclass
class Search:
    """A planned search."""

    document: Document
    base: RunSettings
    settings: SearchSettings
    candidates: list[Candidate]
    """In order; a learning sampler adds to them."""
    notes: tuple[str, ...]
    """What the planner wants to be known: constraints that left trials out, rungs that cut too early."""
    space: OpenSpace | None = None
    """Where a learning sampler proposes trials; None when all are known."""
    chosen: list[list[Candidate]] | None = None
    """The finalists, once their turn has come: a final that fails does not let another one in."""
    exhausted: bool = False
    """The sampler has nothing new to propose, though fewer trials than wanted are known."""
    words: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What a learning sampler said when it proposed a trial, by the trial's id."""

    @property
    def folder(self) -> Path:
        """Where the search keeps everything."""
        return self.base.folder

    @property
    def metric(self) -> tuple[str, str, str]:
        """(stage, split, name) of what decides."""
        stage, split, name = self.settings.metric.split("/")
        return stage, split, name

    @property
    def expected(self) -> int:
        """Trials of the search proper, those included that are still to be proposed."""
        known = len(self.candidates)
        return known if self.space is None or self.exhausted else max(self.settings.trials or 0, known)

    def pending(self) -> list[Candidate]:
        """Known trials still to be run: those that have not ended, and those that failed."""
        return [
            candidate
            for candidate in self.candidates
            if (ended := candidate.ended()) is None or ended.state == "failed"
        ]

    def is_over(self) -> bool:
        """Whether nothing is left to run, finalists included."""
        return not self.pending() and len(self.candidates) == self.expected and not self.finals_to_run()

    def adopt(self, said: Mapping[str, Any]) -> Candidate | None:
        """Takes in a trial that a sampler proposed; None when it is known or not allowed.

        `said` has a value for every axis of the space: the number of an option, or what was drawn.
        """
        assert self.space is not None
        trial = self.space.trial(
            {axis.key: axis.options[said[axis.key]] if axis.options else (said[axis.key],) for axis in self.space.axes}
        )
        if trial is None:
            return None
        candidate = candidate_of(self.document, self.base.folder, trial)
        self.candidates.append(candidate)
        self.words[candidate.id] = dict(said)
        if said not in self.proposed():
            with (self.folder / PROPOSED_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(said) + "\n")
        return candidate

    def proposed(self) -> list[dict[str, Any]]:
        """What a learning sampler has proposed so far, in its own words."""
        file = self.folder / PROPOSED_FILE
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def check_space(self) -> None:
        """Raises UserError where trials were proposed in another space: a sampler's words count its options."""
        file, proposed = self.folder / "search.yaml", self.proposed()
        before = _meaning(read_yaml(file) if file.exists() else {})
        now = _meaning({"space": self.document.space, "search": plain(self.settings)})
        changed = [address for address in {**before, **now} if before.get(address) != now.get(address)]
        if proposed and changed:
            raise UserError(
                f"{self.folder}: its {len(proposed)} trials were proposed in another space (changed: {', '.join(changed[:6])}; "
                f"{file.name} there has the old one); change it back, give this search another name=..., "
                "or move the folder away"
            )

    def finalists(self) -> list[list[Candidate]]:
        """The best configurations, best first, each as its runs with several seeds; empty while the search proper runs."""
        if self.chosen is not None:
            return self.chosen
        wanted = self.settings.finalists
        searched = len(self.candidates) == self.expected and all(candidate.ended() for candidate in self.candidates)
        if wanted is None or not searched:
            return []
        best: dict[str, Candidate] = {}
        for row in self.rows():
            if row.value is not None and not math.isnan(row.value) and row.state in ("finished", "stopped"):
                best.setdefault(row.candidate.configuration, row.candidate)
        return [self._with_seeds(candidate, wanted.seeds) for candidate in list(best.values())[: wanted.top]]

    def _with_seeds(self, candidate: Candidate, count: int) -> list[Candidate]:
        first = self.settings.seeds or (self.base.seed,)
        seeds = [*first, *range(max(first) + 1, max(first) + 1 + count)][:count]
        known = {one.settings.seed: one for one in self.candidates if one.configuration == candidate.configuration}
        return [
            known.get(seed)
            or candidate_of(
                self.document, self.base.folder, Trial(candidate.trial.number, {**candidate.trial.overrides, "seed": seed})
            )
            for seed in seeds
        ]

    def choose_finalists(self) -> list[Candidate]:
        """Settles who the finalists are; returns those of their runs that have not come to their end."""
        self.chosen = self.finalists()
        return self.finals_to_run()

    def finals_to_run(self) -> list[Candidate]:
        """Finalists' runs that have not come to their end."""
        return [candidate for runs in self.finalists() for candidate in runs if candidate.state != "finished"]

    def everyone(self) -> list[Candidate]:
        """The trials of the search proper, and those that only the finals added."""
        finals = [candidate for runs in self.finalists() for candidate in runs]
        return list({candidate.id: candidate for candidate in (*self.candidates, *finals)}.values())

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
        return rungs, early_cut(scheduler, warmup, thaw, horizon)

    def clock(self) -> tuple[int, int]:
        """Of the deciding stage, in optimizer steps: the grace before which nothing is decided, and the whole length."""
        scheduler = self.settings.scheduler
        warmup, thaw, horizon = self._pace()
        share = 0.0 if isinstance(scheduler, NoSchedulerSettings) else grace_of(scheduler, warmup, thaw, horizon)
        return math.floor(share * horizon), horizon

    def _pace(self) -> tuple[float, float, int]:
        """Of the deciding stage: longest warm-up and latest thaw of any trial as shares, and its optimizer steps."""
        name = self.metric[0]
        runs = [candidate.settings for candidate in self.candidates] or [self.base]
        stages = [settings.stages[name] for settings in runs]
        horizon = stages[0].steps
        if horizon is None:
            corpus = stage_corpus(stages[0], run_vocabulary(runs[0], _silent), _silent)
            group = self.settings.resources.num_ranks * stages[0].accumulation
            horizon = Course(corpus.splits["train"].lengths, stages[0], runs[0].seed, group).total_steps
        warmup = max(warmup_steps(horizon, stage.optim) / horizon for stage in stages)
        thaw = max((stage.thaw_at for stage in stages if stage.num_frozen_layers), default=0.0)
        return warmup, thaw, horizon

    def finals(self) -> list[Final]:
        """The finalists that have come to their end with every seed, best mean first."""
        found = []
        for runs in self.finalists():
            rows = [self.row(candidate) for candidate in runs]
            if all(row.state == "finished" and row.value is not None for row in rows):
                found.append(Final(runs[0], tuple(float(row.value) for row in rows if row.value is not None)))
        return sorted(found, key=lambda final: final.mean, reverse=self.settings.mode == "max")

    def best(self) -> Candidate | None:
        """The finalist with the best mean; without finalists the finished trial with the best metric; one that was
        stopped only if none finished."""
        if finals := self.finals():
            return finals[0].candidate
        rows = [row for row in self.rows() if row.value is not None and not math.isnan(row.value)]
        return next((row.candidate for row in rows if row.state in ("finished", "stopped")), None)

    def row(self, candidate: Candidate) -> Row:
        """A trial's line of the table."""
        readings = candidate.readings()
        values = [value for _, _, value in self.values(readings) if not math.isnan(value)]
        pick = max if self.settings.mode == "max" else min
        training = [reading for reading in readings if reading.split == "train"]
        stages = {reading.stage: reading for reading in training}
        seconds = sum(reading.seconds for reading in stages.values())
        tokens = sum(reading.tokens for reading in stages.values())
        ended, restarts = candidate.ended(), len(candidate.faults())
        reason = ended.reason if ended else "the same command goes on with it"
        return Row(
            candidate=candidate,
            value=pick(values) if values else None,
            seconds=seconds,
            tokens_per_second=tokens / seconds if seconds else math.nan,
            peak_memory_gb=max((reading.values["peak_memory_gb"] for reading in training), default=math.nan),
            state=candidate.state,
            reason=reason + (f" (after {restarts} restart{'s' * (restarts > 1)})" if restarts else ""),
        )

    def rows(self) -> list[Row]:
        """The table, best first: finished trials, then those on their way, whose best value is of part of a course, then
        those that never reported."""
        return sorted(map(self.row, self.candidates), key=self._order)

    def _order(self, row: Row) -> tuple[bool, bool, float]:
        value = math.nan if row.value is None else row.value
        return math.isnan(value), row.state != "finished", -value if self.settings.mode == "max" else value

    def write_best(self) -> Path | None:
        """Writes the winner as a run of its own; None when there is none."""
        best = self.best()
        if best is None:
            return None
        settings = run_settings_in(best.folder) or plain(best.settings)  # PBT may have changed them on the way
        tree = {**settings, "name": f"{self.base.name}-best", "output_dir": str(self.base.output_dir)}
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
        if file.exists() and (unlike := differences(read_yaml(file).get("base"), self.base)):
            raise UserError(
                f"{self.folder}: holds a search around another base ({'; '.join(unlike[:6])}); "
                "give this one another name=..."
            )
        tree = {
            "base": dict(plain(self.base)),
            "space": self.document.space,
            "search": plain(self.settings),
            "precedence": self.document.precedence,
        }
        write_whole(file, dump_yaml(tree))


@dataclass(frozen=True)
class Final:
    """A finalist: a configuration with the deciding metric of each of its seeds."""

    candidate: Candidate
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds; 0 for one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0


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
    shown.add_column("trial", no_wrap=True)
    for address in dict.fromkeys(address for candidate in search.candidates for address in candidate.trial.overrides):
        shown.add_column(address.rpartition(".")[2], overflow="fold")
    for heading in (search.settings.metric, "time", "tok/s", "GB", "why it ended"):
        shown.add_column(heading, justify="left" if heading == "why it ended" else "right")
    addresses = list(dict.fromkeys(address for candidate in search.candidates for address in candidate.trial.overrides))
    for row in search.rows():
        overrides = row.candidate.trial.overrides
        shown.add_row(row.candidate.id, *(brief(overrides.get(address, "")) for address in addresses), *row.cells())
    return shown


def finals_table(search: Search, finals: Sequence[Final]) -> Any:
    """The finalists as a rich table, best mean first."""
    from rich.table import Table

    shown = Table(title=f"{search.base.name}: finalists at full length, best mean first", title_justify="left")
    for heading in ("trial", search.settings.metric, "spread", "seeds"):
        shown.add_column(heading, justify="left" if heading == "trial" else "right", overflow="fold")
    for final in finals:
        shown.add_row(final.candidate.changes, f"{final.mean:.4f}", f"{final.spread:.4f}", str(len(final.values)))
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
        return setting_named(run_settings(document.changed(overrides, tree)), name, near)

    space: OpenSpace | None = None
    trials: list[Trial] = []
    left_out = 0
    with document.blame("space.", "search."):
        if settings.sampler == "tpe":
            space = OpenSpace(document.space, document.source, named, settings.seed, settings.constraints)
        else:
            trials, left_out = read_space(
                document.space, document.source, named, trials=settings.trials, seed=settings.seed, seeds=settings.seeds,
                constraints=settings.constraints,
            )  # fmt: skip
    candidates: list[Candidate] = []
    problems: dict[str, list[str]] = {}
    for trial in trials:
        try:
            candidates.append(candidate_of(document, base.folder, trial))
        except UserError as error:
            for line in str(error).splitlines():
                problems.setdefault(line, []).append(Candidate(trial, base).changes)
    if problems:
        raise UserError("\n".join(_in_trials(line, trials) for line, trials in problems.items()))
    with document.blame():
        _can_pause(document, settings, [candidate.settings for candidate in candidates] or [base])
    notes = [f"search.constraints leave out {left_out} of {left_out + len(trials)} combinations"] if left_out else []
    search = Search(document, base, settings, candidates, tuple(notes), space)
    search.check_space()
    for said in search.proposed() if space else ():
        search.adopt(said)
    return search


def _meaning(tree: Mapping[str, Any]) -> dict[str, Any]:
    """What gives a sampler's words their meaning, by address: the axes and the constraints of a search."""
    flat = flatten({name: json.loads(json.dumps(tree.get(name), default=str)) for name in ("space", "search")})
    return {address: value for address, value in flat.items() if address.startswith(("space.", "search.constraints"))}


def _can_pause(document: Document, settings: SearchSettings, runs: Sequence[RunSettings]) -> None:
    """Raises UserError where trials would be paused or exchanged at evaluations that write no checkpoint."""
    scheduler, stage = settings.scheduler, settings.metric.partition("/")[0]
    pauses = scheduler.kind in ("hyperband", "pbt") or getattr(scheduler, "on_rung", "") == "pause"
    if pauses and any(run.stages[stage].checkpoint_every for run in runs):
        raise UserError(
            f"{document.source}: stages.{stage}.checkpoint_every: trials wait at their evaluations and go on from the "
            f"checkpoint made there; leave it out, or take a scheduler that does not pause"
        )


def run_settings_in(folder: Path) -> dict[str, Any] | None:
    """The settings that a run folder was last trained with; None before it was."""
    file = folder / "settings.yaml"
    return dict(read_yaml(file)["base"]) if file.exists() else None


def candidate_of(document: Document, folder: Path, trial: Trial) -> Candidate:
    """A trial with the settings of its run, in the search's folder. Raises UserError when they do not go together."""
    tree = apply(document.base, trial.overrides)
    tree |= {"name": trial.id, "output_dir": str(folder / "trials")}
    return Candidate(trial, run_settings(document.changed(trial.overrides, tree)))


def _in_trials(sentence: str, trials: Sequence[str]) -> str:
    more = f" and {len(trials) - 1} more" if len(trials) > 1 else ""
    return f"{sentence} (trial {trials[0]}{more})"


def _silent(sentence: str) -> None:
    """Says nothing."""
