"""The memory that a job was given, on the CPU: past it an allocation fails here, which a step can answer, and nobody is killed.

A cluster bounds a job by a cgroup. The kernel kills a process that goes over it, without a word to anybody, and the next
start would meet the same batch and die of it again. The limit of a process's data (setrlimit(2), RLIMIT_DATA) says no
before it comes to that, as an exception.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

SHARES = "DSTRAIN_MEMORY_SHARES"
"""The variable that says how many processes share this machine's part of the job, where the launcher does not."""
_USABLE = 0.95
"""Of the limit; the rest is for what the kernel counts and a process does not: page tables, shared memory, its other threads."""
_LEAST_BYTES = 64 * 2**20


def job_limit(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """The least memory limit of the control groups this process is in, in bytes; None where that is all the machine has."""
    try:
        lines = own.read_text().splitlines()
    except OSError:  # not Linux
        return None
    limits = [limit for line in lines for file in _limit_files(line, groups) if (limit := _read(file)) is not None]
    least = min(limits, default=None)
    return least if least is not None and least < psutil.virtual_memory().total else None


def _limit_files(line: str, groups: Path) -> Iterator[Path]:
    """Where the limits of one hierarchy stand: those of a group, and of all above it (cgroups(7), versions 1 and 2)."""
    _, controllers, path = line.split(":", 2)
    place = Path(path.lstrip("/"))
    if not controllers:
        top, name = groups, "memory.max"
    elif "memory" in controllers.split(","):
        top, name = groups / "memory", "memory.limit_in_bytes"
    else:
        return
    for group in (place, *place.parents):
        yield top / group / name


def _read(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # "max"; a group that is not shown in here
        return None


def share_of(limit: int, ranks_here: int) -> int:
    """This process's part of its job's limit, in bytes; `ranks_here` share it, unless others do as well (SHARES)."""
    return int(_USABLE * limit / int(os.environ.get(SHARES, ranks_here)))


def _held() -> tuple[int, int]:
    """What this process has asked for and what of it lies in memory, in bytes (proc_pid_status(5)).

    Pages of files do not count, since the kernel drops them to make room; where it does not tell them apart they do.
    """
    lines = [line.partition(":") for line in Path("/proc/self/status").read_text().splitlines()]
    sizes = {name: 1024 * int(value.split()[0]) for name, _, value in lines if value.endswith("kB")}
    resident = sizes["RssAnon"] + sizes["RssShmem"] if "RssAnon" in sizes else sizes["VmRSS"]
    return sizes["VmData"], resident


@contextmanager
def at_most(share: int | None) -> Iterator[None]:
    """Inside, allocations of this process fail once it holds `share` bytes; None bounds nothing.

    The kernel bounds what is asked for and a cgroup what is touched: what was asked for before and never touched (stacks of
    threads) comes on top.
    """
    if share is None:
        yield
        return
    import resource

    before, most = resource.getrlimit(resource.RLIMIT_DATA)
    data, resident = _held()
    soft = data + max(share - resident, _LEAST_BYTES)
    unbounded = resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_DATA, (min((soft, *(one for one in (before, most) if one != unbounded))), most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (before, most))
