"""What a rank's own processes and its own GPU did between two readings: time, memory, power, energy.

A node is shared, so nothing here looks at the whole machine: on the CPU only this process and its children count, on
a GPU only the rank's device, which is found by its UUID: CUDA_VISIBLE_DEVICES renumbers the devices that a process
sees, and the driver's library (NVML) does not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
import torch

from dstrain.readings import Reading, Report, Say, say_aloud

MEANS = frozenset({"gpu_utilisation"})
"""Figures of which a run has the mean over its ranks; of all others it has the sum."""


class Vitals:
    """Reads what a rank used since the reading before. No thread, no sampling: a read costs about a millisecond.

    On the CPU, of this process and all its children: `cpu_seconds` and `resident_gb` (pages shared between them count
    for each). With a CUDA device besides, as far as its driver tells: `gpu_memory_gb` (all that is taken on the
    device), `gpu_utilisation` (0 to 1, the share of time in which any kernel ran), `gpu_power_watts` (the mean since
    the reading before where the device counts its energy, else of this moment) and `gpu_energy_joules`. Where NVML is
    missing or fails, `say` is told once and the figures of the CPU remain. GB are 10^9 bytes.
    """

    def __init__(self, device: torch.device, say: Say = say_aloud, library: Any = None) -> None:
        """`library` stands in for `pynvml`."""
        self._gpu = _open_gpu(device, say, library) if device.type == "cuda" else None
        self._cpu_seconds = _used()[0]

    def read(self) -> dict[str, float]:
        """The figures since the last read, or since this object was made."""
        total, resident = _used()
        spent, self._cpu_seconds = max(0.0, total - self._cpu_seconds), total
        figures = {"cpu_seconds": spent, "resident_gb": resident / 1e9}
        return figures | (self._gpu.read() if self._gpu else {})


def summed(per_rank: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """A run's figures from its ranks': sums, and the mean utilisation.

    What one rank lacks is left out: a sum over some of the ranks would pass for one over all. Ranks that share a GPU
    each count it whole.
    """
    shared = [name for name in per_rank[0] if all(name in figures for figures in per_rank)] if per_rank else []
    sums = {name: sum(figures[name] for figures in per_rank) for name in shared}
    return {name: value / len(per_rank) if name in MEANS else value for name, value in sums.items()}


def with_vitals(report: Report, vitals: Vitals, gather: Callable[[Any], list[Any]]) -> Report:
    """A Report that follows every training reading with one of split "system": what all ranks used since the last.

    `gather` brings every rank's figures to every rank; all of them call the report.
    """

    def both(reading: Reading) -> None:
        report(reading)
        if reading.split == "train":
            report(replace(reading, split="system", values=summed(gather(vitals.read()))))

    return both


# ------------------------------------------------------------------------------------------------- processes


def _used() -> tuple[float, int]:
    """CPU seconds so far, and resident bytes now, of this process and all below it.

    The seconds of a child that has ended and been waited for are in its parent's `children_*`, so the total never
    falls when one ends.
    """
    seconds, resident = 0.0, 0
    own = psutil.Process()
    for process in (own, *map(_process, _below(own.pid))):
        if process is None:
            continue
        try:
            with process.oneshot():
                seconds += sum(process.cpu_times()[:4])  # user, system, and the same of children waited for
                resident += process.memory_info().rss
        except psutil.Error:  # ended this moment
            continue
    return seconds, resident


def _process(pid: int) -> psutil.Process | None:
    try:
        return psutil.Process(pid)
    except psutil.Error:
        return None


def _below(pid: int) -> Iterator[int]:
    """The process ids of all descendants. psutil would read the whole process table, which on a busy node takes long."""
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(word) for word in file.read_text().split()]
        except OSError:  # the thread is gone
            continue
        for child in children:
            yield child
            yield from _below(child)


# ----------------------------------------------------------------------------------------------------- a GPU


def _open_gpu(device: torch.device, say: Say, library: Any) -> Gpu | None:
    """The rank's device in NVML; None, after a word about it, when there is no getting at it."""
    try:
        nvml = import_module("pynvml") if library is None else library
        return Gpu(nvml, str(torch.cuda.get_device_properties(device).uuid))
    except Exception as error:  # no package, no driver, no permission, an AMD card: training must not mind
        reason = str(error) or type(error).__name__
        say(f"the GPU's memory, power and energy are not recorded ({reason}); install nvidia-ml-py where a driver is")
        return None


class Gpu:
    """One device, by UUID, through a library that speaks as `pynvml` does."""

    def __init__(self, library: Any, uuid: str) -> None:
        """Raises the library's error when there is no such device or no driver."""
        self._nvml = library
        library.nvmlInit()
        self._handle = self._find(uuid)
        self._time, self._energy = time.monotonic(), self._told(self._millijoules)
        self._sampled_until = 0  # microseconds, the device's clock
        self._told(self._utilisation)  # samples of the time before are not ours

    def _find(self, uuid: str) -> Any:
        """torch says neither `GPU-` nor, of a slice of a device, `MIG-`."""
        try:
            return self._nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        except self._nvml.NVMLError as error:
            try:
                return self._nvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")
            except self._nvml.NVMLError:
                raise error from None

    def read(self) -> dict[str, float]:
        """The figures since the last read; what this device does not tell is left out."""
        now, energy = time.monotonic(), self._told(self._millijoules)
        elapsed, self._time = now - self._time, now
        figures = {
            "gpu_memory_gb": self._told(lambda: self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used / 1e9),
            "gpu_utilisation": self._told(self._utilisation),
        }
        if energy is not None and self._energy is not None and elapsed > 0:
            joules = max(0.0, energy - self._energy) / 1000  # the counter starts again with the driver
            figures |= {"gpu_power_watts": joules / elapsed, "gpu_energy_joules": joules}
        else:
            figures["gpu_power_watts"] = self._told(lambda: self._nvml.nvmlDeviceGetPowerUsage(self._handle) / 1000)
        self._energy = energy
        return {name: value for name, value in figures.items() if value is not None}

    def _told(self, question: Callable[[], float]) -> float | None:
        """The answer, or None: older cards count no energy, slices of a card know no power."""
        try:
            return float(question())
        except self._nvml.NVMLError:
            return None

    def _millijoules(self) -> float:
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))

    def _utilisation(self) -> float:
        """The mean of what the driver sampled since the last read, or else its latest figure."""
        nvml = self._nvml
        try:
            _, samples = nvml.nvmlDeviceGetSamples(
                self._handle, nvml.NVML_GPU_UTILIZATION_SAMPLES, self._sampled_until
            )
            fresh = [sample for sample in samples if sample.timeStamp > self._sampled_until]
            if fresh:
                self._sampled_until = max(sample.timeStamp for sample in fresh)
                return sum(sample.sampleValue.uiVal for sample in fresh) / len(fresh) / 100
        except nvml.NVMLError:
            pass
        return float(nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu) / 100
