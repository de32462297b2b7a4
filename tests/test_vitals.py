"""What a rank used: real processes on the CPU; for a GPU a stand-in speaks as NVML does, so that any machine tests it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from dstrain import vitals as module
from dstrain.readings import Reading
from dstrain.vitals import Gpu, Vitals, summed, with_vitals

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
BUSY = "import sys, time\nwhile time.process_time() < {}: pass\nprint('done', flush=True)\nsys.stdin.read()"


# ------------------------------------------------------------------------------------------------- processes


def busy_child(seconds: float, inside: str = "") -> subprocess.Popen[str]:
    """A process that has used this much CPU when it says so, and then waits for its standard input to close."""
    code = inside + BUSY.format(seconds)
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "done\n"
    return child


def end(child: subprocess.Popen[str]) -> None:
    child.communicate()
    assert child.returncode == 0


def test_on_a_cpu_there_are_seconds_and_memory_and_nothing_of_a_gpu() -> None:
    vitals = Vitals(CPU)
    before = time.process_time()
    while time.process_time() < before + 0.3:
        pass
    figures = vitals.read()
    assert set(figures) == {"cpu_seconds", "resident_gb"}
    assert 0.25 <= figures["cpu_seconds"] <= time.process_time() - before + 0.1
    here = psutil.Process()
    resident = sum(process.memory_info().rss for process in (here, *here.children(recursive=True)))
    assert figures["resident_gb"] == pytest.approx(resident / 1e9, rel=0.2)
    assert vitals.read()["cpu_seconds"] < 0.2, "each read counts from the one before"


def test_children_and_their_children_count_while_they_run_and_after() -> None:
    vitals = Vitals(CPU)
    command = f"[{sys.executable!r}, '-c', {BUSY.format(0.4)!r}]"
    inside = f"import subprocess as s\ns.run({command}, stdin=s.DEVNULL, stdout=s.DEVNULL)\n"
    child = busy_child(0.4, inside)
    own = time.process_time()
    figures = vitals.read()
    assert figures["cpu_seconds"] >= 0.75
    assert figures["resident_gb"] > psutil.Process().memory_info().rss / 1e9 + 0.002
    end(child)
    assert 0 <= vitals.read()["cpu_seconds"] < 0.3 + time.process_time() - own, "what was counted is not counted twice"


def test_a_child_between_two_reads_is_not_missed() -> None:
    vitals = Vitals(CPU)
    end(busy_child(0.4))
    assert vitals.read()["cpu_seconds"] >= 0.35


def test_only_our_own_processes_are_looked_at() -> None:
    """The parent and siblings of this process are somebody else's; `cat` ends with its grandparent's pipe."""
    ours = set(module._below(os.getpid()))
    child = busy_child(0.0, "import subprocess as s\ncat = s.Popen(['cat'], stdout=s.DEVNULL)\n")
    below = set(module._below(os.getpid())) - ours
    assert len(below) == 2 and child.pid in below
    assert {psutil.Process(pid).ppid() for pid in below} == {os.getpid(), child.pid}
    end(child)
    assert os.getppid() not in ours and os.getpid() not in ours


def test_a_process_that_ends_while_it_is_looked_at_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = busy_child(0.0)
    end(gone)
    monkeypatch.setattr(module, "_below", lambda pid: iter([gone.pid]))
    assert set(Vitals(CPU).read()) == {"cpu_seconds", "resident_gb"}


# ----------------------------------------------------------------------------------------------------- a GPU


class NvmlError(Exception):
    """As NVMLError of pynvml."""


class Nvml:
    """Two devices under UUIDs, as the driver knows them: the second is busier. `lacks` are functions not supported."""

    NVMLError = NvmlError
    NVML_GPU_UTILIZATION_SAMPLES = 1

    def __init__(self, *lacks: str) -> None:
        self.lacks = set(lacks)
        self.devices = {"GPU-aaaa": 0, "GPU-bbbb": 1, "MIG-cccc": 2}
        self.millijoules = [5_000, 1_000_000, 0]
        self.samples: list[tuple[int, int]] = []

    def _answer(self, name: str, value: Any) -> Any:
        if name in self.lacks:
            raise NvmlError("Not Supported")
        return value

    def nvmlInit(self) -> None:
        self._answer("init", None)

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        if uuid not in self.devices:
            raise NvmlError("Not Found")
        return self.devices[uuid]

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return self._answer("memory", SimpleNamespace(used=(handle + 1) * 2_000_000_000))

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        return self._answer("rates", SimpleNamespace(gpu=10 + 80 * handle, memory=1))

    def nvmlDeviceGetSamples(self, handle: int, kind: int, since: int) -> Any:
        assert kind == self.NVML_GPU_UTILIZATION_SAMPLES
        found = [SimpleNamespace(timeStamp=t, sampleValue=SimpleNamespace(uiVal=v)) for t, v in self.samples if t > since]
        if not found:
            raise NvmlError("Not Found")
        return self._answer("samples", (1, found))

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        return int(self._answer("energy", self.millijoules[handle]))

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        return int(self._answer("power", 100_000 + 50_000 * handle))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Time that passes when told to."""
    told = SimpleNamespace(now=100.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: told.now))
    return told


def test_the_device_is_found_by_its_uuid_whatever_its_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA_VISIBLE_DEVICES=1 makes NVML's second device this process' first."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="bbbb"))
    figures = Vitals(CUDA, library=Nvml()).read()
    assert figures["gpu_memory_gb"] == 4.0 and figures["gpu_utilisation"] == 0.9
    assert {"cpu_seconds", "resident_gb"} < set(figures)


def test_power_is_the_mean_of_the_interval_and_energy_its_sum(clock: SimpleNamespace) -> None:
    nvml = Nvml()
    gpu = Gpu(nvml, "bbbb")
    clock.now += 4
    nvml.millijoules[1] += 1_200_000
    figures = gpu.read()
    assert figures["gpu_energy_joules"] == 1200 and figures["gpu_power_watts"] == 300
    clock.now += 2
    nvml.millijoules[1] += 100_000
    assert gpu.read()["gpu_power_watts"] == 50, "each read counts from the one before"
    clock.now += 2
    nvml.millijoules[1] = 7
    assert gpu.read()["gpu_energy_joules"] == 0, "the counter began again with the driver"


def test_without_an_energy_counter_power_is_of_the_moment(clock: SimpleNamespace) -> None:
    gpu = Gpu(Nvml("energy"), "aaaa")
    clock.now += 1
    figures = gpu.read()
    assert figures["gpu_power_watts"] == 100 and "gpu_energy_joules" not in figures


def test_two_reads_at_one_moment_do_not_divide_by_zero(clock: SimpleNamespace) -> None:
    assert Gpu(Nvml(), "aaaa").read()["gpu_power_watts"] == 100


def test_utilisation_is_the_mean_of_the_samples_since_the_last_read() -> None:
    nvml = Nvml()
    nvml.samples = [(10, 0), (20, 0)]
    gpu = Gpu(nvml, "aaaa")
    nvml.samples += [(30, 100), (40, 50)]
    assert gpu.read()["gpu_utilisation"] == 0.75, "what was sampled before us is not ours"
    nvml.samples += [(50, 20)]
    assert gpu.read()["gpu_utilisation"] == 0.2
    assert gpu.read()["gpu_utilisation"] == 0.1, "no new sample: the latest figure"


def test_a_slice_of_a_device_tells_its_memory_and_no_more() -> None:
    gpu = Gpu(Nvml("energy", "power", "rates", "samples"), "cccc")
    assert gpu.read() == {"gpu_memory_gb": 6.0}


def test_what_fails_in_the_middle_of_a_run_is_left_out_of_that_reading() -> None:
    nvml = Nvml()
    gpu = Gpu(nvml, "aaaa")
    nvml.lacks = {"memory"}
    assert "gpu_memory_gb" not in gpu.read()
    nvml.lacks = set()
    assert gpu.read()["gpu_memory_gb"] == 2.0


@pytest.mark.parametrize(("library", "uuid"), [(Nvml("init"), "aaaa"), (Nvml(), "dddd")])
def test_where_nvml_fails_the_figures_of_the_cpu_remain_and_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch, library: Nvml, uuid: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuid))
    said: list[str] = []
    vitals = Vitals(CUDA, said.append, library)
    assert set(vitals.read()) == set(vitals.read()) == {"cpu_seconds", "resident_gb"}
    assert len(said) == 1 and ("Not Supported" in said[0] or "Not Found" in said[0]) and "nvidia-ml-py" in said[0]


def test_a_missing_package_is_no_reason_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # as Python marks a module that cannot be imported
    said: list[str] = []
    assert set(Vitals(CUDA, said.append).read()) == {"cpu_seconds", "resident_gb"}
    assert "pynvml" in said[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_real_gpu_tells_power_and_memory() -> None:
    pytest.importorskip("pynvml")
    said: list[str] = []
    vitals = Vitals(torch.device("cuda", 0), said.append)
    held = torch.randn(8192, 8192, device="cuda")
    until = time.monotonic() + 2
    while time.monotonic() < until:
        held @ held
        torch.cuda.synchronize()
    figures = vitals.read()
    assert not said
    assert figures["gpu_memory_gb"] > 0.2 and figures["gpu_power_watts"] > 10 and figures["gpu_utilisation"] > 0.3


# ------------------------------------------------------------------------------------------------ over ranks


def test_a_run_has_the_sum_of_its_ranks_and_the_mean_utilisation() -> None:
    first = {"cpu_seconds": 1.0, "gpu_power_watts": 100.0, "gpu_energy_joules": 10.0, "gpu_utilisation": 0.5}
    second = {"cpu_seconds": 2.0, "gpu_power_watts": 200.0, "gpu_energy_joules": 30.0, "gpu_utilisation": 1.0}
    assert summed([first, second]) == {
        "cpu_seconds": 3.0, "gpu_power_watts": 300.0, "gpu_energy_joules": 40.0, "gpu_utilisation": 0.75,
    }  # fmt: skip
    assert summed([first]) == first


def test_a_sum_over_some_of_the_ranks_does_not_pass_for_one_over_all() -> None:
    assert summed([{"cpu_seconds": 1.0, "gpu_power_watts": 100.0}, {"cpu_seconds": 2.0}]) == {"cpu_seconds": 3.0}
    assert summed([{"cpu_seconds": 1.0}, {"cpu_seconds": 2.0, "gpu_power_watts": 1.0}]) == {"cpu_seconds": 3.0}
    assert summed([]) == {}


def test_every_training_reading_is_followed_by_what_all_ranks_used() -> None:
    told: list[Reading] = []
    other = {"cpu_seconds": 100.0, "resident_gb": 1.0}
    report = with_vitals(told.append, Vitals(torch.device("cpu")), lambda own: [own, other])
    report(Reading("finetune", "train", 4, 8, 100, 1.0, {"loss": 2.0}))
    report(Reading("finetune", "valid", 4, 8, 100, 1.0, {"loss": 2.0}))
    assert [(reading.split, reading.step) for reading in told] == [("train", 4), ("system", 4), ("valid", 4)]
    assert told[1].values["cpu_seconds"] >= 100.0 and told[1].values["resident_gb"] > 1.0
