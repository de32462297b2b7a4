"""The command line of a search, and what it shows when it ends.

    python -m dstrain.tune search_spaces/lsh.yaml [key=value ...]

All that must outlive a process lies in the search's folder (see dstrain.search), so going on is the same command, and no
pickle is ever read back. SIGUSR1, SIGTERM or Ctrl-C: every running trial saves at its next step, and the search exits 75.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dstrain.preparation import Records
    from dstrain.search import Search
    from dstrain.tune.resources import Needs, Room

_EPILOG = """\
examples
  python -m dstrain.tune search_spaces/lsh.yaml
  python -m dstrain.tune search_spaces/favor.yaml --dry-run
  python -m dstrain.tune my.yaml search.scheduler.eta=2 search.resources.ranks=2

The same command goes on with an interrupted search; finished trials are not run again.

exit status
  0 all trials ended   1 some failed   2 a mistake in the settings or the data   75 interrupted: the same command goes on
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    words = argparse.ArgumentParser(
        prog="python -m dstrain.tune", description="Search a space of training runs with Ray Tune and ASHA.",
        epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    words.add_argument("file", type=Path, metavar="FILE.yaml", help="base, space and search")
    words.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings that win over the file's; search.x reaches the search",
    )
    words.add_argument(
        "--full-size", action="store_true", help="leave out the file's `when` overrides for this machine"
    )
    words.add_argument(
        "--accept-changed-data", action="store_true", help="go on though text has changed since trials read it"
    )
    words.add_argument("--dry-run", action="store_true", help="show trials, resources and concurrency, then stop")
    return words


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    given = parser().parse_intermixed_args(words)
    from dstrain.schema import UserError
    from dstrain.stopping import leave_on_signals

    leave_on_signals("asked to stop before any trial started; the same command starts again")
    try:
        return _search(given, words)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


def _search(given: argparse.Namespace, words: Sequence[str]) -> int:
    import torch

    from dstrain.desk import catch_up
    from dstrain.preparation import prepare, remember
    from dstrain.stopping import SAVED_COME_BACK
    from dstrain.tracking import program_here
    from dstrain.tune.resources import Room

    search, needs = _plan(given, torch.cuda.is_available())
    for line in (*search.document.precedence, *search.notes):
        print(line)
    if given.dry_run:
        return _dry_run(search, needs, Room.here())
    if "RAY_ADDRESS" not in os.environ:
        Room.here().check(needs, search)
    records = prepare(search, needs.ranks, bool(needs.gpus), print, given.accept_changed_data)
    search.claim()
    remember(search, records)
    over = search.is_over()
    if over:
        print(f"{search.folder}: all {len(search.candidates)} trials have ended")
        catch_up(search)
    interrupted = not over and _run(search, needs, records)
    close(search, in_haste=interrupted)
    if interrupted:
        again = shlex.join([program_here("python"), "-m", "dstrain.tune", *words])
        print(f"interrupted, and saved; go on with: {again}", file=sys.stderr)
        return SAVED_COME_BACK
    return int(any(candidate.state == "failed" for candidate in search.everyone()))


def _plan(given: argparse.Namespace, gpu: bool) -> tuple[Search, Needs]:
    """The search and what a trial takes. One whose trials take no GPU is planned as on a machine that has none."""
    from dstrain.search import plan_search
    from dstrain.settings import read_document
    from dstrain.tune.resources import Needs

    search = plan_search(read_document(given.file, given.overrides, gpu, given.full_size))
    needs = Needs.of(search.settings.resources, gpu)
    return _plan(given, gpu=False) if gpu and not needs.gpus else (search, needs)


def _run(search: Search, needs: Needs, records: Records) -> bool:
    """Runs what is left on a cluster; True when that was interrupted."""
    from dstrain.stopping import answer_signals, stop_on_signals
    from dstrain.tune.driver import Driver
    from dstrain.tune.resources import Room, ray_cluster

    answer = "asked to stop: every running trial saves at its next step"
    stop = stop_on_signals(answer)
    with ray_cluster(Room.here()):
        answer_signals(stop, answer)  # ray.init has put a handler of its own on SIGTERM
        room = Room.of_cluster()
        room.check(needs, search)
        concurrent = room.concurrent(needs, search.settings.max_concurrent)
        left = len(search.pending()) + search.expected - len(search.candidates)
        print(f"{left} of {search.expected} trials to run, {concurrent} at a time, {needs.describe()}")
        return Driver(search, needs, stop, records).run()


def _dry_run(search: Search, needs: Needs, room: Room) -> int:
    for candidate in search.candidates:
        print(f"{candidate.id}  {candidate.changes}" + (f"  ({candidate.state})" if candidate.ended() else ""))
    if search.space is not None:
        print(f"{search.expected - len(search.candidates)} more to be proposed by {search.settings.sampler}")
    concurrent = room.concurrent(needs, search.settings.max_concurrent)
    print(f"{search.expected} trials, {concurrent} at a time on {room.describe()}; {needs.describe()}")
    if not concurrent:
        print("this machine alone is too small for it: ask for less, or start it where there is more (cluster/README.md)")
    print(f"scheduler: {search.settings.scheduler}")
    if search.settings.finalists:
        print(f"finalists: {search.settings.finalists}")
    return 0


def close(search: Search, in_haste: bool = False) -> None:
    """What a search shows when it ends: the table, the winner and how to train it again, the pages that compare the runs.

    `in_haste`, because a time limit is near, leaves out the pictures.
    """
    from rich.console import Console

    from dstrain.search import finals_table, table
    from dstrain.tracking import program_here

    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table(search))
    if finals := search.finals():
        console.print(finals_table(search, finals))
    for file in [] if in_haste else leave_evidence(search):
        print(f"wrote:   {file}")
    best = search.write_best()
    if best:
        print(f"best:    {best}")
        print(f"retrain: {program_here('deepspeed')} dstrain/train.py {best}")
    if search.base.tracking.enabled:
        _show_pages(search)


def leave_evidence(search: Search) -> list[Path]:
    """The trials as a table for programs, and two pictures of them: those that there is anything to see on."""
    from dstrain.pictures import draw_curves, draw_parallel, write_trials

    return [file for write in (write_trials, draw_parallel, draw_curves) if (file := write(search)) is not None]


def _show_pages(search: Search) -> None:
    """How to open the MLflow UI, and its pages that compare exactly these trials."""
    from dstrain.tracking import sent_of, store_uri, ui_command, ui_links

    tracking = search.base.tracking
    uri = store_uri(tracking.uri, search.base.output_dir)
    print(f"MLflow:  {ui_command(uri)}")
    sent = [sent for candidate in search.everyone() if (sent := sent_of(candidate.folder)).run_id]
    if sent:
        base_url = uri if uri.startswith("http") else "http://127.0.0.1:5000"
        links = ui_links(base_url, sent[0].experiment_id, [one.run_id for one in sent], search.settings.metric)
        print(f"         compare: {links.compare}")
        print(f"         curves:  {links.curves}")


if __name__ == "__main__":
    sys.exit(main())
