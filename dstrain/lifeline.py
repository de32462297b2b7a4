"""Each rank knows when another has died, whatever it is waiting for: a closed connection tells, or 20 s of a machine's silence.

Every rank keeps a connection to rank 0 that says nothing until somebody leaves. A collective of gloo fails when a peer
dies; one of NCCL waits on, and so does a rank that is busy by itself. Rank 0 passes on who was lost. A rank that is left
gives its main thread some seconds to end by itself, so that the error of the rank that died is the first to be seen.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from dstrain.stopping import SIGNALS

if TYPE_CHECKING:
    from dstrain.engine import Ranks

GRACE_SECONDS = 10.0
"""How long a rank that is left may go on before it is ended."""
KEEP_ALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 3, "TCP_KEEPCNT": 5, "TCP_USER_TIMEOUT": 20_000}
"""Seconds without a word, then seconds between questions, how many; milliseconds for an answer to our own words. After 20 s
a machine without power or network, which closes no connection, counts as lost."""
_BYE = b"bye"


class Lifeline:
    """What ties the ranks together from here to `leave`. Made by all ranks at the same time."""

    def __init__(self, ranks: Ranks, end: Callable[[int], None] = os._exit) -> None:
        self._ranks, self._end = ranks, end
        self._links: dict[int, socket.socket] = {}
        self._known = threading.Event()
        self._over = False
        self.lost: int | None = None
        """The rank that died, once one has."""
        if ranks.world > 1:
            self._meet()
        for rank, link in self._links.items():
            threading.Thread(target=self._listen, args=(rank, link), name="lifeline", daemon=True).start()

    def ending(self) -> None:
        """This rank is about to end; who is gone before is no news any more."""
        self._over = True

    def leave(self) -> None:
        """Tells the others that this rank ends as it should, and they have nothing to fear."""
        self._over = True
        for link in self._links.values():
            _send(link, _BYE)

    def broke(self, error: BaseException, patience_seconds: float = 3.0) -> bool:
        """Whether an error is only what a rank sees of another's death; waits a little for the news of it."""
        words = ("Connection closed by peer", "Connection reset", "Broken pipe", "Socket Timeout", "NCCL", "gloo")
        if self._ranks.world == 1 or not any(word in str(error) for word in words):
            return False
        _keep_quiet()
        return self._known.wait(patience_seconds)

    @property
    def sentence(self) -> str:
        """What a rank that is left says."""
        return f"rank {self._ranks.rank} ends: rank {self.lost} was lost; its own error stands above or in its log"

    def _meet(self) -> None:
        """Connects every rank to rank 0. A word that only they know keeps others out."""
        ranks = self._ranks
        one_machine = len(set(ranks.gather(socket.gethostname()))) == 1
        here = socket.create_server(("127.0.0.1" if one_machine else "", 0)) if ranks.rank == 0 else None
        port, word = ranks.agree([here.getsockname()[1], secrets.token_hex(8)] if here else None)
        if here is None:
            address = "127.0.0.1" if one_machine else os.environ["MASTER_ADDR"]
            self._links[0] = socket.create_connection((address, port), timeout=60)
            self._links[0].settimeout(None)
            _keep_alive(self._links[0])
            _send(self._links[0], f"{word} {ranks.rank:08d}".encode())
        else:
            here.settimeout(60)
            while len(self._links) < ranks.world - 1:
                link, _ = here.accept()
                link.settimeout(60)
                said = _receive(link, len(word) + 9).decode(errors="replace").split(" ")
                link.settimeout(None)
                if said[0] == word:
                    _keep_alive(link)
                    self._links[int(said[1])] = link
            here.close()

    def _listen(self, rank: int, link: socket.socket) -> None:
        said = _receive(link, 8)
        if said[:3] == _BYE or self._over:
            return
        self.lost = int(said) if len(said) == 8 else rank
        self._known.set()
        for other, line in self._links.items():
            if other != self.lost:
                _send(line, f"{self.lost:08d}".encode())
        time.sleep(GRACE_SECONDS)
        if not self._over:
            print(self.sentence, file=sys.stderr, flush=True)
            self._end(1)


def _keep_quiet() -> None:
    """A launcher that saw the death ends the other ranks with signals, and their answer would only hide the cause."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _keep_alive(link: socket.socket) -> None:
    """Has the kernel ask the other one's whether it is still there, whatever the processes are doing."""
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEP_ALIVE.items():
        if hasattr(socket, name):  # not every system has all of them
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _send(link: socket.socket, words: bytes) -> None:
    try:
        link.sendall(words)
    except OSError:  # nobody is there any more
        pass


def _receive(link: socket.socket, count: int) -> bytes:
    """So many bytes; fewer when the other side is gone or has said goodbye."""
    found = b""
    try:
        while len(found) < count and found != _BYE:
            more = link.recv(count - len(found))
            if not more:
                break
            found += more
    except OSError:
        pass
    return found
