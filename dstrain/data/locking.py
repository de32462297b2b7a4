"""A lock between processes that dies with its holder, so that a killed builder leaves nothing to clean up."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from dstrain.schema import UserError


@contextmanager
def locked(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Waits until no other process (or thread) holds the lock file `path`, and holds it inside the `with`.

    `waiting` is called once when that takes more than ten seconds. Raises UserError where the file cannot be made.

    The file itself stays: removing it would let two holders lock two different files of the same name.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = path.open("a")
    except OSError as error:
        raise UserError(
            f"{path.parent}: the cache cannot be written ({error.strerror}); set DSTRAIN_CACHE to a folder that can"
        ) from None
    with handle:
        if waiting is not None and not _soon(handle):
            waiting()
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _soon(handle: IO[str], patience_seconds: float = 10.0) -> bool:
    """Whether the lock is had within a moment."""
    deadline = time.monotonic() + patience_seconds
    while time.monotonic() < deadline:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
        else:
            return True
    return False
