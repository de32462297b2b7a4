"""The driver's desk: what a search knows of its trials while they run, and what it shows of them. Knows nothing of Ray."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dstrain.evidence import collect
from dstrain.run import run_files
from dstrain.search import Candidate, Ended, Search
from dstrain.settings import ROOT, plain
from dstrain.tracking import Status, TrackedRun, Tracker


class Desk:
    """What the driver knows of its trials while they run: their MLflow runs, their rungs, why they were stopped."""

    def __init__(self, search: Search) -> None:
        self.search = search
        self.candidates = {candidate.id: candidate for candidate in search.candidates}
        self.rungs, warning = search.rungs()
        if warning:
            print(f"warning: {search.document.source}: {warning}", file=sys.stderr)
        self.stopped: dict[str, str] = {}
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
        self._board.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._board.stop()
        search = self.search
        best = search.write_best()
        unfinished = sum(candidate.ended() is None for candidate in search.candidates)
        kept = [search.folder / "search.yaml", *([best] if best else [])]
        self._parent.finish(
            "KILLED" if unfinished else "FINISHED",
            {"trials": str(len(search.candidates)), "unfinished": str(unfinished)},
            kept,
        )
        self._tracker.close()

    def started(self, name: str) -> None:
        """A trial has its processes."""
        candidate = self.candidates[name]
        (candidate.folder / "failure.txt").unlink(missing_ok=True)  # of an earlier attempt
        if name not in self._runs:
            self._runs[name] = self._tracker.run(
                candidate.folder, name, plain(candidate.settings), self._tags, self._parent
            )
            self._runs[name].tag({"changes": candidate.changes})
        self._board.started(candidate)

    def reported(self, name: str, progress: float, value: float) -> bool:
        """Whether a trial goes on after this reading."""
        self._board.reported(self.candidates[name], progress, value)
        decision = self.rungs.record(name, progress, value)
        if not decision.keep:
            self.stopped[name] = decision.reason
        return decision.keep

    def ended(self, name: str, error: str | None) -> None:
        """A trial's processes are gone: finds out why, and writes it down. An interrupted trial has not ended."""
        candidate = self.candidates[name]
        failure = candidate.folder / "failure.txt"
        if (candidate.folder / "outcome.json").exists():
            ended = candidate.end("finished", "finished")
        elif name in self.stopped:
            ended = candidate.end("stopped", self.stopped[name])
        elif failure.exists():
            ended = candidate.end("failed", failure.read_text(encoding="utf-8").partition("\n")[0])
        elif error is not None:
            ended = candidate.end("failed", error)
        else:
            return
        tags_file = candidate.folder / "tags.json"
        tags = json.loads(tags_file.read_text()) if tags_file.exists() else {}
        status: Status = "FAILED" if ended.state == "failed" else "FINISHED"
        tags |= {"state": ended.state, "stop_reason": ended.reason}
        self._runs[name].finish(status, tags, run_files(candidate.folder))
        self._board.ended(candidate, ended)


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
        self._bar = self._progress.add_task("", total=len(search.candidates), completed=done)
        self._running: dict[str, str] = {}

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

    def ended(self, candidate: Candidate, ended: Ended) -> None:
        """A trial ends: one line that stays."""
        self._running.pop(candidate.id, None)
        row = self._search.row(candidate)
        self._progress.console.print(
            f"{candidate.id}  {candidate.changes}  {'  '.join(row.cells())}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        self._progress.advance(self._bar)
        self._refresh()

    def _refresh(self) -> None:
        self._progress.update(self._bar, description="  ".join(self._running.values()))
