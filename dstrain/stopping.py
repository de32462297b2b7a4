"""How a person, a scheduler or a time limit asks a program to stop: SIGTERM, SIGUSR1 or SIGINT, or the end of its launcher."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable
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


_ear: _Ear | None = None


_held_back = threading.local()


def _hold_back() -> None:
    """Around a fork no signal comes: the child would take it for its parent's."""
    _held_back.before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _let_come() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _held_back.before)


def _forget() -> None:
    """In a child that was forked: a signal to it is none to its parent, and ends it as it would any process."""
    if _ear is not None:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            if signal.getsignal(number) == _ear.handle:
                signal.signal(number, signal.SIG_DFL)
    _let_come()


os.register_at_fork(before=_hold_back, after_in_parent=_let_come, after_in_child=_forget)


class _Ear:
    """Answers every signal at once and once: here, or in a thread of its own while the main thread sits in native code.

    Python calls a handler between two bytecodes of the main thread only, and a wait for another rank is none. The kernel
    calls the interpreter's own handler at once, and that leaves a byte in a pipe for every signal: who reads it answers.
    """

    def __init__(self) -> None:
        self.process = os.getpid()
        self.answer: Callable[[int], None] = lambda number: None
        self._answering = threading.RLock()  # another signal may come while the main thread answers one
        self._pipe, self._inlet = os.pipe()
        for end in (self._pipe, self._inlet):
            os.set_blocking(end, False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def take_place(self) -> None:
        """From now on signals come here, also where a library has meanwhile put handlers of its own on them."""
        signal.set_wakeup_fd(self._inlet, warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, self.handle)

    def handle(self, *_: object) -> None:
        """What Python is to call at a signal."""
        with self._answering, contextlib.suppress(BlockingIOError):
            while True:
                (number,) = os.read(self._pipe, 1)
                if signal.getsignal(number) == self.handle:  # and nobody else has put a handler on it meanwhile
                    self.answer(number)

    def _listen(self) -> None:
        pipe = select.poll()
        pipe.register(self._pipe, select.POLLIN)
        while True:
            pipe.poll()
            self.handle()


def _answer_by(answer: Callable[[int], None]) -> None:
    """Has `answer(number)` called at each of the signals."""
    global _ear
    if _ear is None or _ear.process != os.getpid():  # a thread does not survive a fork
        _ear = _Ear()
    _ear.answer = answer
    _ear.take_place()


def stop_on_signals(answer: str) -> threading.Event:
    """An event that SIGTERM, SIGUSR1 and SIGINT set, answering with a sentence; a second one ends the process at once,
    unless it is a launcher's echo of the first."""
    stop = threading.Event()
    answer_signals(stop, answer)
    return stop


def answer_signals(stop: threading.Event, answer: str) -> None:
    """Has the signals set `stop`, also where a library has meanwhile put handlers of its own on them."""
    first, asked = 0, 0.0

    def heard(number: int) -> None:
        nonlocal first, asked
        if first:
            if number != LAUNCHER_GONE and (number == first or time.monotonic() - asked > ECHO_SECONDS):
                os._exit(128 + number)
            return
        first, asked = number, time.monotonic()
        stop.set()
        _speak(f"{answer} (again: at once)")

    _answer_by(heard)


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
    _speak("the deepspeed command has gone")
    os.kill(os.getpid(), LAUNCHER_GONE)


def wait_to_be_ended(status: int) -> None:
    """Waits some seconds for the launcher to end this rank, and keeps quiet about it.

    A launcher ends all ranks as soon as one has ended, and the first rank might not have spoken yet.
    """
    _answer_by(lambda number: os._exit(status))
    time.sleep(PATIENCE_SECONDS)


def leave_on_signals(sentence: str) -> None:
    """Until there is anything to save, each of the signals ends the process with a sentence and "come back"."""

    def leave(number: int) -> None:
        _speak(sentence)
        os._exit(SAVED_COME_BACK)

    _answer_by(leave)


def _speak(sentence: str) -> None:
    """Writes to standard error past Python's buffers, in whose middle a signal may have come."""
    with contextlib.suppress(OSError):  # nobody reads it any more
        os.write(2, f"{sentence}\n".encode())
