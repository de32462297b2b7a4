"""The driver's desk: what a search knows of its trials while they run, and what it shows of them. Knows nothing of Ray."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dstrain.agenda import Agenda
from dstrain.evidence import collect
from dstrain.ledger import WANTED_FILE, Wanted, read_record
from dstrain.run import run_files
from dstrain.rungs import Promotions
from dstrain.search import Candidate, Ended, Search, brief, holds
from dstrain.settings import ROOT, plain
from dstrain.tracking import Status, TrackedRun, Tracker, sent_of

DIED = "its processes died without a word (killed, out of memory, or their node was lost)"


class Desk:
    """What the driver knows of its trials while they run: their MLflow runs, their rungs, why they were stopped."""

    def __init__(self, search: Search) -> None:
        self.search = search
        self._candidates = {candidate.id: candidate for candidate in search.candidates}
        self._progress: dict[str, float] = {}
        self.rungs, warning = search.rungs()
        if warning:
            print(f"warning: {search.document.source}: {warning}", file=sys.stderr)
        self.stopped: dict[str, str] = {}
        self.agenda: Agenda | None = None
        """Where trials that give their processes back are told; None while one of Ray's schedulers rules."""
        self.left_over: list[Candidate] = []
        """Trials that one of Ray's schedulers lost before they began."""
        self.idle = False
        """Set by the driver once an interrupted search has nothing running any more."""
        self._closed = False
        self._begun: set[str] = set()
        """Trials that were started and have not ended since."""
        self._runs: dict[str, TrackedRun] = {}
        self._tags = collect(ROOT).tags()
        self._tracker: Tracker = search.base.tracking.open(search.base.output_dir)
        self._board = Board(search)

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its callbacks beside its own state. Nothing reads that back; the search's folder is the state."""
        return {}

    def __enter__(self) -> Desk:
        search = self.search
        params = {
            "base": search.document.base,
            "space": search.document.space,
            "search": search.settings.model_dump(mode="json"),
        }
        self._parent = self._tracker.run(search.folder, search.base.name, params, self._tags)
        self._catch_up()
        self._board.start()
        return self

    def _catch_up(self) -> None:
        """Has MLflow told of what an earlier start could not tell: it was killed, or MLflow did not answer in time."""
        for candidate in self.search.everyone():
            run, ended = self._as_left(candidate.folder), candidate.ended()
            if run is not None and ended and not run.wanted.ended:
                _tell(run, candidate, ended)
            elif run is not None and run.is_due():
                self._tracker.change(run, {})  # follows it as it stands: how and when it ended are kept

    def owes(self) -> bool:
        """Whether MLflow lacks anything of an earlier start."""
        folders = [self.search.folder, *(candidate.folder for candidate in self.search.everyone())]
        runs = [run for folder in folders if (run := self._as_left(folder)) is not None]
        return self.search.base.tracking.enabled and any(run.is_due() or not run.wanted.ended for run in runs)

    def _as_left(self, folder: Path) -> TrackedRun | None:
        """A run as an earlier start left it; None where there was none."""
        wanted = read_record(folder / WANTED_FILE, Wanted)
        return TrackedRun(self._tracker, folder, wanted, sent_of(folder)) if wanted else None

    def __exit__(self, *error: object) -> None:
        self._board.stop()
        search = self.search
        best = search.write_best()
        for name in self._begun:
            self._runs[name].finish("KILLED", {"state": "interrupted"})
        ended = sum(candidate.ended() is not None for candidate in search.candidates)
        unfinished = search.expected - ended + len(search.finals_to_run())
        kept = [search.folder / "search.yaml", *([best] if best else [])]
        self._parent.finish(
            "KILLED" if unfinished else "FINISHED",
            {"trials": str(len(search.candidates)), "unfinished": str(unfinished)},
            kept,
        )
        self._tracker.close(patient=not self._closed)  # an interrupted search has its lead time only

    def say(self, sentence: str) -> None:
        """One line that stays."""
        self._board.say(sentence)

    def candidate(self, name: str) -> Candidate:
        """The trial with this id; a sampler or the finals may have added it since the start."""
        if name not in self._candidates:
            finals = [candidate for runs in self.search.finalists() for candidate in runs]
            self._candidates |= {candidate.id: candidate for candidate in (*finals, *self.search.candidates)}
        return self._candidates[name]

    def close(self) -> None:
        """The search was asked to stop: from now on a trial that gives its processes back is interrupted."""
        self._closed = True
        if self.agenda is not None:
            self.agenda.close()

    def started(self, name: str) -> None:
        """A trial has its processes."""
        candidate = self.candidate(name)
        candidate.folder.mkdir(parents=True, exist_ok=True)
        (candidate.folder / "failure.txt").unlink(missing_ok=True)  # of an earlier attempt
        self.stopped.pop(name, None)  # a finalist may have been stopped before
        self._begun.add(name)
        self._run(candidate)
        self._board.started(candidate)

    def _run(self, candidate: Candidate) -> TrackedRun:
        """The trial's run in MLflow."""
        if candidate.id not in self._runs:
            settings = plain(candidate.settings)
            run = self._tracker.run(candidate.folder, candidate.id, settings, self._tags, self._parent)
            run.tag({"changes": candidate.changes})
            self._runs[candidate.id] = run
        return self._runs[candidate.id]

    def reported(self, name: str, progress: float, value: float) -> bool:
        """Whether a trial goes on after this reading."""
        self._board.reported(self.candidate(name), progress, value)
        self._progress[name] = progress
        if self.agenda is not None and self.agenda.finalists:
            return True
        decision = self.rungs.record(name, progress, value)
        if not decision.keep and not self._waits(name):
            self.stopped[name] = decision.reason
        return decision.keep

    def _waits(self, name: str) -> bool:
        return isinstance(self.rungs, Promotions) and self.rungs.waits(name)

    def exchanged(self, name: str, other: str, settings: dict[str, Any]) -> None:
        """PBT had a trial take over another's state, with these settings from now on."""
        said = " ".join(f"{address.rpartition('.')[2]}={brief(value)}" for address, value in settings.items())
        self._run(self.candidate(name)).tag({f"exchange_at_{self._progress[name]:.2f}": f"from {other}, {said}"})
        self._board.say(f"{name} goes on from {other} with {said}")

    def died(self, name: str, reason: str = DIED) -> None:
        """A trial's processes died and are started again: what they said of it, else the reason, is kept."""
        candidate = self.candidate(name)
        reason = self._failure(candidate) or reason
        (candidate.folder / "failure.txt").unlink(missing_ok=True)  # the next attempt's failure is its own
        candidate.fault(reason)
        self._board.say(f"{name} {'is interrupted' if self._closed else 'starts again from its checkpoint'}: {reason}")

    def lost(self, name: str) -> None:
        """A trial's processes died before it began: the agenda starts it again, or the driver once Ray's scheduler is done."""
        if self.agenda is not None:
            self.agenda.again(self.candidate(name))
        else:
            self.left_over.append(self.candidate(name))

    def dismissed(self, candidate: Candidate, reason: str) -> None:
        """A trial has waited on a rung in vain."""
        self._finish(candidate, candidate.end("stopped", reason))

    def ended(self, name: str, error: str | None) -> None:
        """A trial's processes are gone: finds out why, and writes it down. Who is interrupted or waits has not ended."""
        candidate = self.candidate(name)
        waits = False
        if holds(candidate.folder, "outcome.json"):
            self._finish(candidate, candidate.end("finished", "finished"))
        elif name in self.stopped:
            self._finish(candidate, candidate.end("stopped", self.stopped[name]))
        elif failure := self._failure(candidate) or error:
            if isinstance(self.rungs, Promotions):
                self.rungs.forget(name)
            self._finish(candidate, candidate.end("failed", failure))
        elif not self._closed and self._waits(name):
            waits = True
            self._board.paused(candidate)
        elif not self._closed:
            kind = self.search.settings.scheduler.kind
            progress = self._progress.get(name, 0.0)
            self._finish(candidate, candidate.end("stopped", f"stopped by {kind} at {progress:.2f} of the stage"))
        if self.agenda is not None:
            self.agenda.returned(candidate, waits)

    def _failure(self, candidate: Candidate) -> str:
        if not holds(candidate.folder, "failure.txt"):
            return ""
        return (candidate.folder / "failure.txt").read_text(encoding="utf-8").partition("\n")[0]

    def _finish(self, candidate: Candidate, ended: Ended) -> None:
        self._begun.discard(candidate.id)
        _tell(self._run(candidate), candidate, ended)
        del self._runs[candidate.id]  # the tracker keeps it until it is sent, and nobody for longer
        self._board.ended(candidate, ended)


def catch_up(search: Search) -> None:
    """Sends MLflow what it lacks of a search that has ended."""
    desk = Desk(search)
    if desk.owes():
        with desk:
            pass  # which follows what is unsent, and waits for it


def _tell(run: TrackedRun, candidate: Candidate, ended: Ended) -> None:
    """Ends a trial's run in MLflow."""
    tags = json.loads((candidate.folder / "tags.json").read_text()) if holds(candidate.folder, "tags.json") else {}
    status: Status = "FAILED" if ended.state == "failed" else "FINISHED"
    tags |= {"state": ended.state, "stop_reason": ended.reason, "restarts": str(len(candidate.faults()))}
    run.finish(status, tags, run_files(candidate.folder))


class Board:
    """The search on the screen: a live line in a terminal, one plain line per event elsewhere."""

    def __init__(self, search: Search) -> None:
        self._search = search
        self._console = Console()
        columns = (
            TextColumn("trials"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
        )
        self._progress = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        done = sum(candidate.ended() is not None for candidate in search.candidates)
        self._bar = self._progress.add_task("", total=search.expected, completed=done)
        self._running: dict[str, str] = {}
        self._headed = False

    def start(self) -> None:
        """Shows itself."""
        self._progress.start()

    def stop(self) -> None:
        """Leaves the screen to others."""
        self._progress.stop()

    def started(self, candidate: Candidate) -> None:
        """A trial begins."""
        self._running[candidate.id] = "starting"
        self._refresh()

    def reported(self, candidate: Candidate, progress: float, value: float) -> None:
        """A running trial reports the deciding metric."""
        self._running[candidate.id] = f"{progress:.0%} {value:.3f}"
        self._refresh()

    def paused(self, candidate: Candidate) -> None:
        """A trial waits on its rung."""
        self._running.pop(candidate.id, None)
        self._refresh()

    def ended(self, candidate: Candidate, ended: Ended) -> None:
        """A trial ends: one line that stays."""
        self._running.pop(candidate.id, None)
        if not self._headed:
            self.say(f"trial  what it changes  {self._search.settings.metric}  time  tok/s  GB  why it ended")
            self._headed = True
        self.say(f"{candidate.id}  {candidate.changes}  {'  '.join(self._search.row(candidate).cells())}")
        self._progress.advance(self._bar)
        self._refresh()

    def say(self, sentence: str) -> None:
        """One line that stays."""
        self._progress.console.print(sentence, markup=False, highlight=False, soft_wrap=True)

    def _refresh(self) -> None:
        self._progress.update(self._bar, description="  ".join(self._running.values()))
