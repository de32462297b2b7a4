"""A lock between processes that dies with its holder, so that a killed builder leaves nothing to clean up."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Waits until no other process (or thread) holds the lock file `path`, and holds it inside the `with`.

    The file itself stays: removing it would let two holders lock two different files of the same name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
