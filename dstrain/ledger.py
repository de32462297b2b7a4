"""A run's record of itself, and how far somebody else's store has got with it: small JSON files in the run folder.

    tracking.json   what the run says about itself: store, name, parent, params, tags, how it ended. Written ahead.
    (the store's)   how far the store has got: run id, bytes of the readings sent, revision of tracking.json sent.

Both are replaced in one step, so that a kill leaves the old or the new one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

WANTED_FILE = "tracking.json"
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Wanted:
    """What a run says about itself. Paths are relative to the run folder, so that both can be moved together."""

    key: str
    revision: int
    uri: str | None  # None: SQLite in output_dir
    experiment: str
    output_dir: str
    name: str
    parent: str | None
    started: float
    params: dict[str, str]
    tags: dict[str, str]
    status: str = "RUNNING"
    ended: float | None = None
    artifacts: list[str] = field(default_factory=list)


@dataclass
class Sent:
    """How far a store has got with a run; `offset` in bytes of readings.jsonl."""

    uri: str = ""
    key: str = ""
    experiment_id: str = ""
    run_id: str = ""
    offset: int = 0
    revision: int = 0

    def become(self, other: Sent) -> None:
        """Takes over what another record says."""
        vars(self).update(vars(other))


R = TypeVar("R", Wanted, Sent)


def read_record(path: Path, kind: type[R]) -> R | None:
    """The record in a file, or None when there is none that can be read."""
    try:
        return kind(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write_record(path: Path, record: Wanted | Sent) -> None:
    """Replaces the file. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(asdict(record), indent=1), encoding="utf-8")
    os.replace(temporary, path)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock file against other processes; a file system without locks is taken as it is."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError:
        yield
        return
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def size_of(path: Path) -> int:
    """Bytes in a file, 0 when there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def whole_lines(path: Path, offset: int) -> list[bytes]:
    """The next whole lines after `offset` bytes, about CHUNK_BYTES of them, with their newlines."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            lines = file.readlines(CHUNK_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return lines if not lines or lines[-1].endswith(b"\n") else lines[:-1]


def begins_line(path: Path, offset: int) -> bool:
    """Whether a line begins, or may be appended, after `offset` bytes; False behind the end of the file."""
    if offset == 0:
        return True
    try:
        with path.open("rb") as file:
            file.seek(offset - 1)
            return file.read(1) == b"\n"
    except (FileNotFoundError, NotADirectoryError):
        return False
