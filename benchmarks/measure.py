"""How a benchmark measures: candidates race in rounds inside one process, and each shows its memory in one of its own.

A machine's speed drifts by more than the differences that matter, so only ratios taken within one round are compared:
every round runs each candidate once, each round starts with another one, and the median over the rounds is reported.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch

from dstrain.evidence import collect

ALLOCATOR_VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "PYTORCH_CUDA_ALLOC_CONF", "LD_PRELOAD")
"""What decides how large blocks are got and given back; on a CPU it moves times by up to a factor of two."""

P = ParamSpec("P")
R = TypeVar("R")
Step = Callable[[], object]


# ---------------------------------------------------------------------------------------------------- time


class Sample(NamedTuple):
    """One run of one candidate."""

    seconds: float
    """Wall clock; on a GPU between two events on its stream."""
    cpu_seconds: float
    """Time of all CPU threads of this process, waiting ones included; blind to neighbours on the machine."""


def time_step(step: Step, device: torch.device) -> Sample:
    """Runs the step once."""
    wall, cpu = time.perf_counter(), time.process_time()
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        end.synchronize()
        return Sample(start.elapsed_time(end) / 1000, time.process_time() - cpu)
    step()
    return Sample(time.perf_counter() - wall, time.process_time() - cpu)


def race(steps: Sequence[Step], repeats: int, budget: float, device: torch.device) -> list[list[Sample]]:
    """Rounds of samples, `rounds[r][i]` of `steps[i]`.

    There are at most `repeats` rounds and at least two (one if `repeats` is 1); between these, a round that would
    overrun `budget` seconds is not begun. The first of three or more rounds warms up and is left out.
    """
    rounds: list[list[Sample]] = []
    began = lap = time.perf_counter()
    took = 0.0
    while len(rounds) < repeats and (len(rounds) < 2 or lap - began + took <= budget):
        first = len(rounds) % len(steps)
        order = [*range(first, len(steps)), *range(first)]
        samples = {i: time_step(steps[i], device) for i in order}
        rounds.append([samples[i] for i in range(len(steps))])
        now = time.perf_counter()
        took, lap = now - lap, now
    return rounds[1:] if len(rounds) > 2 else rounds


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """The median of the ratios within each round."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def crossover(lengths: Sequence[int], ratios: Sequence[float]) -> float | None:
    """The length from which on `ratios` stay at or below 1, interpolated between the measured ones on log-log axes.

    `lengths` ascend. The first length when all ratios are there already; None when the last is not.
    """
    above = [i for i, ratio in enumerate(ratios) if ratio > 1]
    if not above:
        return float(lengths[0])
    i = above[-1]
    if i == len(ratios) - 1:
        return None
    share = math.log(ratios[i]) / (math.log(ratios[i]) - math.log(ratios[i + 1]))
    return float(lengths[i] * (lengths[i + 1] / lengths[i]) ** share)


# -------------------------------------------------------------------------------------------------- memory


class Footprint(NamedTuple):
    """The memory of one step."""

    peak_bytes: int
    """From before its inputs exist to the highest point of the step."""
    saved_bytes: int
    """What autograd keeps between forward and backward, inputs included; a storage that is kept twice counts once."""


def in_a_process(preload: Sequence[str], function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """`function` in a process that ends with it, forked from a server that imported `preload` and did nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args, **kwargs).result()


def footprint(make_warm: Callable[[], Step], make: Callable[[], Step], device: torch.device) -> Footprint:
    """The memory of the step that `make` makes, after one that `make_warm` makes has loaded every library.

    On a CPU call it `in_a_process` of its own: what other steps left in the allocator would hide this one's growth.
    """
    make_warm()()
    _forget_peak(device)
    before = _peak_bytes(device)
    step = make()
    with saved_storages() as storages:
        step()
    return Footprint(_peak_bytes(device) - before, sum(storages.values()))


@contextlib.contextmanager
def saved_storages() -> Iterator[Mapping[int, int]]:
    """Fills a mapping from address to bytes of each storage that autograd saves inside the block."""
    storages: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x.detach()  # x itself would be a reference cycle when it is an output

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield storages


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(AttributeError, OSError):  # glibc: give freed blocks back, so that reusing them counts
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):  # Linux: the peak becomes what is held now
        Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    try:  # not getrusage: after fork and exec its peak may be the parent's
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    except (OSError, IndexError, ValueError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# --------------------------------------------------------------------------------------------- environment


def environment(device: torch.device, threads: int, packages: Sequence[str] = ()) -> dict[str, Any]:
    """What a reader needs to judge the numbers and to take them again; `packages` are named with their versions."""
    here = Path(__file__).resolve().parents[1]
    evidence = collect(here)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": evidence.commit + ("-dirty" if evidence.dirty else ""),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else evidence.machine["cpu"],
        "cores": evidence.machine["cores"],
        "threads": threads,
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "system": f"{platform.system()}-{platform.machine()}-{'-'.join(platform.libc_ver())}",
        "python": evidence.machine["python"],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "packages": {name: evidence.packages.get(name, "not installed") for name in packages},
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "default"),
        "allocator": {name: os.environ.get(name, "default") for name in ALLOCATOR_VARIABLES},
    }
