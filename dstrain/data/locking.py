"""A lock between processes that dies with its holder, so that a killed builder leaves nothing to clean up."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dstrain.schema import UserError


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Waits until no other process (or thread) holds the lock file `path`, and holds it inside the `with`.

    Raises UserError where the file cannot be made.

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
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
