"""A trial's share of a node, as a Ray actor: it keeps a nursery, and has it train one run after the other.

Trials that follow each other in Tune's actor sit on the same seats, so that none but the first waits for imports.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

import ray

from dstrain.tune.rank import Order

END_SECONDS = 10.0
"""A process that is killed is gone within this, or is beyond our reach (a file server that does not answer)."""


class Seat:
    """Where one rank sits: the CPUs and the GPU that Ray gave this actor, and the process that uses them."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        """`environ`: variables of the driver that every rank gets."""
        ours, theirs = socket.socketpair()
        with theirs:
            # A session of its own: a Ctrl-C in the driver's terminal is the driver's business.
            self._nursery = subprocess.Popen(
                [sys.executable, "-m", "dstrain.tune.rank", str(theirs.fileno())],
                pass_fds=[theirs.fileno()], env={**os.environ, **environ}, start_new_session=True,
            )  # fmt: skip
        self._line = Connection(ours.detach())
        self._listener: socket.socket | None = None
        self._news: queue.Queue[dict[str, Any]] = queue.Queue()
        self._run = ""
        self.child: int | None = None
        """The process that trains now."""
        self._empty = threading.Event()
        self._empty.set()
        threading.Thread(target=self._listen, daemon=True, name="news").start()

    def _listen(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                message = json.loads(self._line.recv_bytes())
                self.child = message.pop("began", self.child)
                self._news.put(message)
                if "ended" in message:
                    self.child = None
                    self._empty.set()
        self._news.put({"ended": -signal.SIGKILL})  # the nursery has died, and its child with it
        self._empty.set()

    def address(self) -> tuple[str, int]:
        """Where rank 0 will listen for the others. The port is open from now on, so that nobody else takes it."""
        self._listener = socket.create_server((ray.util.get_node_ip_address(), 0))
        host, port = self._listener.getsockname()
        return str(host), int(port)

    def begin(self, run: str, order: Mapping[str, Any]) -> None:
        """Has a new process train what `order` (an Order, as a mapping) says; `run` is a name that no other run has."""
        assert self._empty.is_set(), "one run at a time"
        while not self._news.empty():
            self._news.get()  # of the run before
        self._run = run
        self._empty.clear()
        listener, self._listener = self._listener, None
        self._send({**Order(**order)._asdict(), "listens": listener is not None})
        if listener is not None:
            with listener, socket.socket(fileno=os.dup(self._line.fileno())) as line, contextlib.suppress(OSError):
                socket.send_fds(line, [b"."], [listener.fileno()])  # fails where the nursery has died, which is told already

    def news(self) -> dict[str, Any]:
        """The next message of the process; waits for it."""
        return self._news.get()

    def go_on(self) -> None:
        """The scheduler lets the trial live."""
        self._send({"do": "go on"})

    def stop(self) -> None:
        """Save before the next step, and end."""
        self._send({"do": "stop"})

    def end(self, run: str) -> bool:
        """Kills the process of this run if there is one; whether the seat can be used again."""
        while not self._empty.wait(0.05) and self._run == run:
            if child := self.child:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
                if not self._empty.wait(END_SECONDS):
                    return False
        return self._nursery.poll() is None

    def close(self) -> None:
        """Ends the nursery, and what is below it."""
        self._nursery.kill()
        self._nursery.wait()
        self._empty.wait(END_SECONDS)

    def _send(self, message: Mapping[str, Any]) -> None:
        try:
            self._line.send_bytes(json.dumps(message).encode())
        except OSError:  # the nursery has died, perhaps while nobody listened to its news
            self._news.put({"ended": -signal.SIGKILL})
            self._empty.set()
