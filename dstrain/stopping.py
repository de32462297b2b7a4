"""How a person, a scheduler or a time limit asks a program to stop: SIGTERM, SIGUSR1 or SIGINT, or the end of its launcher."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil

SAVED_COME_BACK = 75
"""Exit status of what was asked to stop and saved, or has to begin again at its checkpoint: EX_TEMPFAIL, on which a
scheduler's script may requeue."""
ECHO_SECONDS = 2.0
"""Another signal so soon after the first is the same wish: on a Ctrl-C, DeepSpeed's launcher sends SIGTERM after it."""
LOOK_SECONDS = 1.0
"""So often a rank looks whether its launcher still belongs to somebody."""
PATIENCE_SECONDS = 10.0
"""So long a rank with nothing to add waits for the first to speak."""
LAUNCHER_GONE = signal.SIGUSR2
"""What a rank sends itself; it never ends a process that is saving."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, LAUNCHER_GONE)


def stop_on_signals(answer: str) -> threading.Event:
    """An event that SIGTERM, SIGUSR1 and SIGINT set, answering with a sentence; a second one ends the process at once,
    unless it is a launcher's echo of the first."""
    stop = threading.Event()
    answer_signals(stop, answer)
    return stop


def answer_signals(stop: threading.Event, answer: str) -> None:
    """Has the signals set `stop`, also where a library has meanwhile put handlers of its own on them."""

    first, asked = 0, 0.0

    def handle(number: int, frame: object) -> None:
        nonlocal first, asked
        if stop.is_set():
            if number != LAUNCHER_GONE and (number == first or time.monotonic() - asked > ECHO_SECONDS):
                os._exit(128 + number)
            return
        first, asked = number, time.monotonic()
        stop.set()
        os.write(2, f"{answer} (again: at once)\n".encode())

    for number in SIGNALS:
        signal.signal(number, handle)


def follow_launcher() -> None:
    """Has this rank asked to stop when the `deepspeed` command above its launcher has gone.

    That command passes a Ctrl-C on but dies of a SIGTERM by itself: its ranks would train on without anybody knowing.
    """
    import psutil

    with contextlib.suppress(psutil.Error):
        launcher = psutil.Process(os.getppid())
        command = launcher.parent()
        above = {os.path.basename(word) for word in command.cmdline()[:3]} if command else set()
        if "deepspeed.launcher.launch" in launcher.cmdline() and above & {"deepspeed", "deepspeed.launcher.runner"}:
            threading.Thread(target=_follow, args=(launcher, launcher.ppid()), name="launcher", daemon=True).start()


def _follow(launcher: psutil.Process, command: int) -> None:
    import psutil

    with contextlib.suppress(psutil.Error):  # the launcher itself has gone
        while launcher.ppid() == command:
            time.sleep(LOOK_SECONDS)
    os.write(2, b"the deepspeed command has gone\n")
    os.kill(os.getpid(), LAUNCHER_GONE)


def wait_to_be_ended(status: int) -> None:
    """Waits some seconds for the launcher to end this rank, and keeps quiet about it.

    A launcher ends all ranks as soon as one has ended, and the first rank might not have spoken yet.
    """
    for number in SIGNALS:
        signal.signal(number, lambda *_: os._exit(status))
    time.sleep(PATIENCE_SECONDS)


def leave_on_signals(sentence: str) -> None:
    """Until there is anything to save, each of the signals ends the process with a sentence and "come back"."""

    def handle(number: int, frame: object) -> None:
        os.write(2, f"{sentence}\n".encode())
        os._exit(SAVED_COME_BACK)

    for number in SIGNALS:
        signal.signal(number, handle)
