"""A stage's checkpoints: written beside training, whole or not at all, and checked before one goes on from them.

with Checkpoints(site.folder / "checkpoints", ranks, Keep(last=2), say) as checkpoints:
    saved = checkpoints.resume(engine)             # {} when there are none
    checkpoints.save(engine, step, best_step, state)   # copies, then lets a thread write
    checkpoints.settle(needed=True)                # the last one is on disk, or Unsaved is raised

On disk: `checkpoints/step-00000120/` with DeepSpeed's files in engine/ and manifest.json, which holds the size and checksum of
each. Until all ranks have written and fsynced their files it is called step-00000120.draft; then it is renamed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC, EROFS
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dstrain.engine import Engine, Ranks
from dstrain.readings import READINGS_FILE
from dstrain.schema import UserError

FOLDER = "checkpoints"
"""Their place in a stage's folder."""
BEST_BYTES = 4
"""Of a parameter in best.safetensors: fp32, whatever the run computes in."""
_MANIFEST = "manifest.json"
_DRAFT = ".draft"
_ROOM = 1.5
"""A checkpoint that can be forgone is written where so many of its size would fit: a run goes on without it, but ends where the
best weights (a third of its size) can no longer be written."""
_GRACE_SECONDS = 10.0
"""How long a run that fails lets a checkpoint that is being written become whole: the other ranks may be gone."""


class Unsaved(Exception):
    """What has to be on disk before a run may go on or end could not be written."""


# ----------------------------------------------------------------------------------------------- what is on disk


def standing(folder: Path) -> list[Path]:
    """The checkpoints in a stage's `checkpoints` folder, the newest first; none of them is looked into.

    What has any other name, such as a copy of one, is somebody else's.
    """
    return sorted(_named(folder, r"step-[0-9]+"), key=_step_of, reverse=True)


def _named(folder: Path, pattern: str) -> list[Path]:
    return [place for place in folder.glob("step-*") if re.fullmatch(pattern, place.name)]


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


def newest_whole(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is as it was written; what is damaged is said by name. None when there are none at all.

    Raises UserError when there are some, and each is damaged.
    """
    damaged: dict[Path, str] = {}
    for place in standing(folder):
        if not (damage := damage_of(place)):
            for other, what in damaged.items():
                say(f"{other}: this checkpoint is damaged ({what}); {place.name} is taken instead")
            return place
        damaged[place] = damage
    if damaged:
        found = ", ".join(f"{place.name}: {what}" for place, what in damaged.items())
        way_out = "restore one from a copy, or remove the folder to train its stage anew"
        raise UserError(f"{folder}: none of its checkpoints is whole ({found}); {way_out}")
    return None


def damage_of(checkpoint: Path) -> str:
    """How its files differ from what the manifest says of them; empty when they do not."""
    try:
        files = json.loads((checkpoint / _MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, entry in files.items():
            found = (checkpoint / name).stat().st_size
            if found != entry["bytes"]:
                return f"{name} has {found} of {entry['bytes']} bytes"
            if checksum(checkpoint / name) != entry["crc32"]:
                return f"{name} holds other bytes than were written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{_MANIFEST} cannot be read"
    return ""


def checksum(file: Path) -> str:
    """CRC-32 of a file: four times as fast as blake2b, and damage is what is looked for; who forges files writes manifests."""
    sum = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            sum = zlib.crc32(block, sum)
    return f"{sum:08x}"


def bytes_of(state: Any) -> int:
    """About what `state` takes on disk: its tensors."""
    if isinstance(state, torch.Tensor):
        return state.nbytes
    parts = state.values() if isinstance(state, Mapping) else state if isinstance(state, (list, tuple)) else ()
    return sum(bytes_of(part) for part in parts)


class _Summed:
    """A file that is written to, and what its manifest will say of it."""

    def __init__(self, file: Path) -> None:
        self._stream = file.open("wb")
        self._size = self._sum = 0
        self.failure: OSError | None = None

    def write(self, block: Any) -> int:
        """Called by torch.save, which would hide an error of the disk behind one of its own."""
        try:
            self._stream.write(block)
        except OSError as error:
            self.failure = error
            raise
        self._sum = zlib.crc32(block, self._sum)
        self._size += len(block)
        return len(block)

    def flush(self) -> None:
        """torch.save asks for it."""

    def close(self) -> dict[str, Any]:
        """Leaves the file on disk, not in the system's cache."""
        with self._stream:
            self._stream.flush()
            os.fsync(self._stream.fileno())
        return {"bytes": self._size, "crc32": f"{self._sum:08x}"}


def _write_state(file: Path, state: Any) -> dict[str, Any]:
    summed = _Summed(file)
    try:
        torch.save(state, summed)  # type: ignore[arg-type]
    except RuntimeError as error:
        raise summed.failure or error from None
    return summed.close()


def _write_json(file: Path, value: Any) -> None:
    """Whole or not at all, and on disk."""
    draft = file.with_suffix(".part")
    with draft.open("w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    draft.rename(file)


def put_in_place(draft: Path, file: Path) -> None:
    """Gives a file or folder that is whole its name; both are on disk afterwards."""
    _sync(draft)
    draft.rename(file)
    _sync(file.parent)


def _sync(folder: Path) -> None:
    """Has a file, or the names in a folder, on disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _sync_readings(folder: Path) -> None:
    """Has what was reported so far on disk: RUN/readings.jsonl, where the checkpoints are in RUN/stages/STAGE/checkpoints."""
    readings = folder.parent.parent.parent / READINGS_FILE
    with contextlib.suppress(FileNotFoundError, PermissionError):  # nothing is written, or by somebody else
        _sync(readings)
        _sync(readings.parent)


# ------------------------------------------------------------------------------------------------- what is kept


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay, and when the clock asks for one."""

    last: int = 2
    milestone_every: int | None = None
    """Steps."""
    minutes: float | None = None

    def on_disk(self, parameters: int, zero_stage: int, sixteen_bit: bool, steps: int) -> str:
        """What a stage's checkpoints and best weights take at most, in words."""
        each, weights = parameters * bytes_per_parameter(zero_stage, sixteen_bit), parameters * BEST_BYTES
        milestones = steps // self.milestone_every if self.milestone_every else 0
        number = self.last + milestones + 2
        return (
            f"checkpoints of {size(each)} each, at most {number} at a time ({self.last} last, the best, one being written"
            f"{f', {milestones} milestones' if milestones else ''}), and twice {size(weights)} for the best weights (kept, "
            f"and being written): {size(each * number + 2 * weights)}"
        )

    def surplus(self, places: list[Path], best_step: int) -> list[Path]:
        """Of whole checkpoints, the newest first, those that are neither among the last nor the best nor a milestone."""
        steps = {place: _step_of(place) for place in places[self.last :]}
        return [
            place
            for place, step in steps.items()
            if step != best_step and not self.is_milestone(step)
        ]

    def is_milestone(self, step: int) -> bool:
        """Whether the checkpoint of a step stays for good."""
        return self.milestone_every is not None and step % self.milestone_every == 0


def bytes_per_parameter(zero_stage: int, sixteen_bit: bool) -> int:
    """What a checkpoint takes: fp32 masters and two moments, and the model's own weights where DeepSpeed adds them."""
    if zero_stage == 3:
        return 12
    return 14 if sixteen_bit else 12 if zero_stage == 0 else 16


# ----------------------------------------------------------------------------------------- written while training


class Room(NamedTuple):
    """What a checkpoint finds on its disk before it is begun, where others would come to harm if it took the last of it."""

    takes_bytes: float
    """On all ranks."""
    wanted_bytes: float
    enough: bool


class _Writing:
    """One checkpoint on its way to the disk. Ranks meet in the file system, never in a collective of a thread."""

    def __init__(self, place: Path, rank: int, world: int, room: Room) -> None:
        self.place, self.room = place, room
        self.draft = place.with_name(place.name + _DRAFT)
        self.given_up = threading.Event()
        self._rank, self._world = rank, world

    def write(self, files: dict[str, Any]) -> float:
        """This rank's files and its part of the manifest. Returns seconds."""
        began = time.perf_counter()
        if not self.room.enough:
            raise OSError(ENOSPC, os.strerror(ENOSPC))
        (self.draft / "engine").mkdir(parents=True, exist_ok=True)
        entries = {}
        while files:
            name, state = files.popitem()  # so that the memory of what is written is free
            entries[name] = _write_state(self.draft / name, state)
        _sync(self.draft / "engine")
        _write_json(self._part(self._rank), entries)
        return time.perf_counter() - began

    def publish(self) -> None:
        """Rank 0: waits for all parts, then makes the draft a checkpoint."""
        parts = [self._part(rank) for rank in range(self._world)]
        while not all(part.exists() for part in parts):
            if self.given_up.wait(0.02):
                return
        entries: dict[str, Any] = {}
        for part in parts:
            entries |= json.loads(part.read_text(encoding="utf-8"))
            part.unlink()
        _write_json(self.draft / _MANIFEST, {"ranks": self._world, "files": entries})
        if self.place.exists():  # it was damaged: a whole one of this step is not written again
            shutil.rmtree(self.place)
        put_in_place(self.draft, self.place)

    def _part(self, rank: int) -> Path:
        return self.draft / f"rank-{rank}.json"


class Checkpoints:
    """The checkpoints of one stage. Every method is called on every rank; `say` is heard from the first."""

    def __init__(
        self, folder: Path, ranks: Ranks, keep: Keep, say: Callable[[str], None]
    ) -> None:
        self._folder, self._ranks, self._keep, self._say = folder, ranks, keep, say
        self._damaged: set[Path] = set()
        self._saved_step: int | None = None
        self._best_step = 0
        self._writing: _Writing | None = None
        self._part: Future[float] | None = None
        self._published: Future[None] | None = None
        self._saved_at = time.monotonic()
        self.blocked_seconds = self.written_seconds = 0.0
        self.count = 0
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Leaves nothing half done: a run that ends well settles, one that fails lets the last one become whole."""
        if error is None:
            self.settle()
            if not self._ranks.rank:  # the word that the stage is done comes after its readings
                with contextlib.suppress(OSError):  # whoever writes them tells
                    _sync_readings(self._folder)
        elif self._part is not None and self._writing is not None:
            wait_for([self._part])
            if self._published is not None:
                wait_for([self._published], timeout=_GRACE_SECONDS)
            self._writing.given_up.set()
        self._threads.shutdown()

    def resume(self, engine: Engine) -> dict[str, Any]:
        """Restores the newest whole checkpoint and returns the state that was saved with it, or {}."""
        found = None
        with self._ranks.first() as mine:
            if mine:
                place = newest_whole(self._folder, self._say)
                found = place and place.name
        name = self._ranks.agree(found)
        if name is None:
            return {}
        place = self._folder / name
        self._saved_step = _step_of(place)
        self._damaged = {other for other in standing(self._folder) if _step_of(other) > self._saved_step}
        return engine.load(place)

    def outdate(self) -> None:
        """The checkpoint that was resumed is behind what has been done since without a step: the next save replaces it."""
        self._saved_step = None

    @property
    def cost(self) -> str:
        """What they took, in words."""
        return (
            f"{self.count} checkpoint{'s' * (self.count > 1)}: training waited {self.blocked_seconds:.2f} s for "
            f"{'them' if self.count > 1 else 'it'}, {self.written_seconds:.2f} s of writing went on beside it"
        )

    @property
    def late(self) -> bool:
        """Whether rank 0's clock asks for a checkpoint."""
        minutes = self._keep.minutes
        return minutes is not None and not self._ranks.rank and time.monotonic() - self._saved_at >= 60 * minutes

    @property
    def at_rest(self) -> bool:
        """Whether no checkpoint is on its way to the disk, as far as this rank knows: the first one makes it whole."""
        return self._published is None or self._published.done()

    def save(
        self, engine: Engine, step: int, best_step: int, state: Callable[[], dict[str, Any]], needed: bool = False
    ) -> None:
        """Makes sure that there is a checkpoint of `step`, now or soon; training waits for the copy only. With `needed` it
        is on disk afterwards, or Unsaved is raised."""
        self._saved_at = time.monotonic()
        if needed:
            self.settle()
        if step != self._saved_step:
            self._begin(engine, step, best_step, state, needed)
        if needed:
            self.settle(needed=True)

    def _begin(
        self, engine: Engine, step: int, best_step: int, state: Callable[[], dict[str, Any]], needed: bool
    ) -> None:
        began, blocked = time.perf_counter(), self.blocked_seconds
        self.settle()
        files = engine.snapshot(state())
        if not self._ranks.rank:
            self._remove(_named(self._folder, rf"step-[0-9]+\{_DRAFT}"))
        (takes,) = self._ranks.add(bytes_of(files))  # and no rank looks or writes before what a death left is gone
        wanted = takes if needed else _ROOM * takes
        room = Room(takes, wanted, self._ranks.agree(free_bytes(self._folder) >= wanted))
        writing = _Writing(self._folder / f"step-{step:08d}", self._ranks.rank, self._ranks.world, room)
        self._best_step, self._saved_step, self._writing = best_step, step, writing
        self._part = self._threads.submit(writing.write, files)
        self._published = None if self._ranks.rank else self._threads.submit(self._publish, writing)
        self.count += 1
        self.blocked_seconds = blocked + time.perf_counter() - began

    def _publish(self, writing: _Writing) -> None:
        _sync_readings(self._folder)  # a resume computes none anew that lie before the checkpoint
        writing.publish()
        self._damaged.discard(writing.place)
        whole = [place for place in standing(self._folder) if place not in self._damaged]
        self._remove([*self._keep.surplus(whole, self._best_step), *self._damaged])

    def settle(self, needed: bool = False) -> None:
        """Waits until the last checkpoint is on disk. When it could not be written, that is said, and the last good one
        stands; with `needed` Unsaved is raised, on every rank."""
        if self._writing is None or self._part is None:
            return
        began = time.perf_counter()
        writing, part, published = self._writing, self._part, self._published
        self._writing = self._part = self._published = None
        problem = next((problem for problem in self._ranks.gather(_problem(part)) if problem), None)
        if published is not None:
            if problem:
                writing.given_up.set()
            problem = _problem(published) or problem
        problem = self._ranks.agree(problem)
        if problem is None:
            self.written_seconds += part.result()
            self.blocked_seconds += time.perf_counter() - began
            return
        self._saved_step = None
        sentence = ""
        if not self._ranks.rank:
            sentence = self._sentence(writing, problem)
            self._remove([writing.draft])
        sentence = self._ranks.agree(sentence)
        if needed:
            raise Unsaved(sentence)
        self._say(f"{sentence}; training goes on")

    def _sentence(self, writing: _Writing, problem: str) -> str:
        last = next((place.name for place in standing(self._folder) if place not in self._damaged), None)
        wanted = writing.room.wanted_bytes
        spare = f" ({size(wanted)} with room for the best weights)" if wanted > writing.room.takes_bytes else ""
        return (
            f"{writing.place}: this checkpoint could not be written ({problem}): it takes {size(writing.room.takes_bytes)}"
            f"{spare}, and {size(free_bytes(writing.draft))} are free there; "
            f"{f'{last} stands' if last else 'there is no earlier one'}; make room, or give another output_dir"
        )

    def _remove(self, places: list[Path]) -> None:
        for place in places:
            shutil.rmtree(place, ignore_errors=True)
        self._damaged -= set(places)


def _problem(future: Future[Any]) -> str | None:
    """What kept a thread from its work."""
    error = future.exception()
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return f"{type(error).__name__}: {error}" if error else None


def full_disk(error: Exception, folder: Path) -> str:
    """What to say when a run ends because nothing more can be written in its folder; empty for any other error."""
    if not isinstance(error, OSError) or error.errno not in (ENOSPC, EDQUOT, EROFS):
        return ""
    free = size(free_bytes(folder))
    return (
        f"{error.filename or folder}: could not be written ({error.strerror}; {free} are free there); make room, and the same "
        "command goes on from the last checkpoint"
    )


def free_bytes(place: Path) -> int:
    """On the disk of a file or folder that may be yet to come."""
    return shutil.disk_usage(next(parent for parent in (place, *place.parents) if parent.exists())).free


def size(bytes: float) -> str:
    """Of a file, in words."""
    return f"{bytes / 1e9:.1f} GB" if bytes >= 1e9 else f"{bytes / 1e6:.1f} MB"
