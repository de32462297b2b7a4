"""The processes that train a trial's ranks: a nursery that has imported everything once, and a child of it for each run.

    python -m dstrain.tune.rank FD     # a Seat starts it; FD is its end of a socket pair

Importing torch and DeepSpeed takes seconds, forking takes milliseconds, and a child is a process of its own with an
engine of its own that ends with its run. Everything said travels as JSON in frames:

    to the child     {"run": {...}, ...} an Order, followed by an open socket if it "listens"
                     {"do": "go on"}      {"do": "stop"}
    from the child   {"began": pid}    {}, a sign of life    {"progress": [step, total, value]}
                     {"ended": status}, the exit status as `work` returns it, or the negative number of a signal
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from dstrain.readings import JsonLines, Reading
    from dstrain.run import Watch
    from dstrain.settings import RunSettings

CLAIM_SECONDS = 120.0
"""So long a new attempt waits for the run folder: the lock of a lost node goes when the file server notices."""
FAILURE_FILE = "failure.txt"


class Order(NamedTuple):
    """What a rank is to train."""

    run: Mapping[str, Any]
    """Settings of the run, as plain data."""
    source: str
    """The file they come from, for messages."""
    metric: str
    """The metric that decides about the trial."""
    texts: Mapping[str, Any]
    """Records of the text that the search has agreed on, by stage, as plain data."""
    environ: Mapping[str, str]
    """The variables a launcher would set."""


# ------------------------------------------------------------------------------------------------- the nursery


def main(line: Connection) -> None:
    """Forks a child for every order, one at a time, and tells how it ended; returns when the other end is closed."""
    die_with_parent()
    import dstrain.run  # noqa: F401
    from dstrain.engine import preload

    preload()
    while True:
        try:
            message = json.loads(line.recv_bytes())
        except EOFError:
            return
        if "run" not in message:
            continue  # a word to a child that has ended meanwhile
        listener = receive_socket(line) if message.pop("listens") else None
        child = os.fork()
        if child == 0:
            die_with_parent()
            os._exit(work(line, Order(**message), listener))
        if listener is not None:
            listener.close()  # the child's now
        send(line, {"began": child})
        _, status = os.waitpid(child, 0)
        send(line, {"ended": os.waitstatus_to_exitcode(status)})


def die_with_parent() -> None:
    """Has the kernel end this process when its parent ends, however that happens.

    Where the kernel cannot (macOS), the closed connection to the seat ends it, unless it hangs.
    """
    parent, system = os.getppid(), ctypes.CDLL(None)
    if hasattr(system, "prctl"):
        system.prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def receive_socket(line: Connection) -> socket.socket:
    """The open socket that the seat sends after an order."""
    with socket.socket(fileno=os.dup(line.fileno())) as own:
        _, (number,), _, _ = socket.recv_fds(own, 1, 1)
    return socket.socket(fileno=number)


def send(line: Connection, message: Mapping[str, Any]) -> None:
    """Sends one message, if anybody still listens."""
    try:
        line.send_bytes(json.dumps(message).encode())
    except OSError:
        os._exit(1)


# --------------------------------------------------------------------------------------------------- a child


def work(line: Connection, order: Order, listener: socket.socket | None) -> int:
    """Runs an order in this process and returns its exit status: 0 also after a stop, 2 when another attempt is no use.

    `listener`: where this rank listens for the others, on the first one.
    """
    os.environ.update(order.environ)
    try:
        Rank(line, order.metric).train(order, listener)
    except Exception as error:
        from dstrain.engine import Diverged
        from dstrain.healing import TooLarge
        from dstrain.schema import UserError

        write_failure(Path(order.run["output_dir"]) / order.run["name"], error)
        return 2 if isinstance(error, (UserError, Diverged, TooLarge)) else 1
    return 0


class Rank:
    """One data-parallel process of a trial: trains in the main thread and listens in another.

    The deciding metric is handed over once the checkpoint of its step is on disk, some steps later where these are short:
    whoever is paused or stopped on it has lost no more than those.
    """

    def __init__(self, line: Connection, metric: str) -> None:
        self._line, self._metric = line, metric
        self._due: list[Reading] = []
        self._lines: JsonLines | None = None
        self._decided = threading.Event()
        self._stop = threading.Event()
        self._speaking = threading.Lock()
        threading.Thread(target=self._listen, daemon=True, name="words").start()

    def _listen(self) -> None:
        while True:
            try:
                word = json.loads(self._line.recv_bytes())["do"]
            except (EOFError, OSError):
                os._exit(1)  # nobody is there any more to tell
            if word == "stop":
                self._stop.set()
            self._decided.set()

    def _say(self, message: Mapping[str, Any]) -> None:
        with self._speaking:
            send(self._line, message)

    def train(self, order: Order, listener: socket.socket | None) -> None:
        """Runs the run to its end, or until it is told to stop and has saved."""
        from dstrain.engine import join_ranks, leave_ranks
        from dstrain.loop import Interrupted
        from dstrain.run import run_patiently
        from dstrain.schema import validate
        from dstrain.settings import RunSettings
        from dstrain.texts import TextRecord

        settings = validate(RunSettings, dict(order.run), order.source)
        ranks = join_ranks(listener=listener)
        with ranks.first() as mine:
            if mine:
                claim_patiently(settings)
        try:
            watch = self._watch(settings.folder, ranks.rank)
            agreed = {name: validate(TextRecord, tree, "the search's text") for name, tree in order.texts.items()}
            run_patiently(settings, ranks, watch, agreed=agreed)
            self._hand_over()
        except Interrupted:
            pass  # what was asked for
        finally:
            if self._lines is not None:
                self._lines.close()
        ranks.barrier()
        leave_ranks()

    def _watch(self, folder: Path, rank: int) -> Watch:
        from dstrain.readings import JsonLines, fan_out
        from dstrain.run import Watch

        stop = self._stop.is_set
        if rank:
            return Watch(lambda reading: None, lambda sentence: None, lambda tags: None, stop, stop)
        log = (folder / "train.log").open("a", buffering=1, encoding="utf-8")

        def say(sentence: str) -> None:
            with contextlib.suppress(OSError):  # a full disk is no reason to stop, and may be what is said
                print(sentence, file=log)
            self._say({})

        self._lines = JsonLines(folder)
        report = fan_out(self._lines, self._note)
        return Watch(report, say, lambda tags: write_tags(folder, tags), stop, stop, self._hand_over)

    def _note(self, reading: Reading) -> None:
        """Keeps the deciding metric until it may be handed over; any reading is a sign of life."""
        if self._metric in reading.keyed():
            self._due.append(reading)
        self._say({})

    def _hand_over(self, stage: str = "", step: int = 0) -> None:
        """Gives the trial's actor what is due up to a step of a stage, or of any other, and waits for the scheduler's word."""
        while self._due and (self._due[0].stage != stage or self._due[0].step <= step):
            due = self._due.pop(0)
            progress = [due.step, due.total_steps, due.keyed()[self._metric]]
            self._decided.clear()
            if not self._stop.is_set():
                self._say({"progress": progress})
                self._decided.wait()


def claim_patiently(settings: RunSettings) -> None:
    """Claims the run folder; one that stays locked is no mistake of the user's, and worth another attempt."""
    from dstrain.run import claim, hold
    from dstrain.schema import UserError

    try:
        hold(settings.folder, CLAIM_SECONDS)
    except UserError as error:
        raise TimeoutError(str(error)) from None
    claim(settings, lambda sentence: None)


# ------------------------------------------------------------------------------------- what a run leaves


def write_failure(folder: Path, error: BaseException, reason: str | None = None) -> None:
    """Leaves the reason of a failure where the driver finds it; the first one counts, others come of it."""
    import traceback

    folder.mkdir(parents=True, exist_ok=True)
    told = "".join(traceback.format_exception(error))
    reason = reason or f"{type(error).__name__}: {error}"
    with contextlib.suppress(FileExistsError), (folder / FAILURE_FILE).open("x", encoding="utf-8") as file:
        file.write(f"{reason}\n\n{told}")


def write_tags(folder: Path, tags: Mapping[str, str]) -> None:
    """Leaves a run's tags where the driver finds them."""
    (folder / "tags.json").write_text(json.dumps(dict(tags)), encoding="utf-8")


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])))
