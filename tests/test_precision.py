from __future__ import annotations

import pytest
import torch

from dstrain.precision import LossScaleSettings, choose
from dstrain.schema import UserError, validate

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def capability(monkeypatch):
    """Pretends that the GPU has some compute capability."""

    def pretend(major: int, minor: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))

    return pretend


def test_auto_on_a_cpu_is_fp32():
    found = choose("auto", CPU)
    assert (found.name, found.dtype) == ("fp32", torch.float32)
    assert found.reason == "fp32: on a CPU 16 bits seldom gain speed"


@pytest.mark.parametrize(
    ("version", "name", "dtype", "reason"),
    [
        ((9, 0), "bf16", torch.bfloat16, "bf16: the GPU has it (compute capability 9.0)"),
        ((8, 0), "bf16", torch.bfloat16, "bf16: the GPU has it (compute capability 8.0)"),
        (
            (7, 5),
            "fp16",
            torch.float16,
            "fp16: the GPU is older than bf16 (compute capability 7.5, bf16 starts at 8.0)",
        ),
    ],
)
def test_auto_on_a_gpu_takes_the_best_it_has(capability, version, name, dtype, reason):
    capability(*version)
    assert choose("auto", GPU) == (name, dtype, reason)


@pytest.mark.parametrize(("wanted", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_what_is_asked_for_is_taken_on_a_cpu(wanted, dtype):
    assert choose(wanted, CPU) == (wanted, dtype, f"{wanted}: the settings ask for it")


def test_fp16_is_taken_on_any_gpu(capability):
    capability(7, 0)
    assert choose("fp16", GPU).dtype == torch.float16


def test_fp16_on_a_cpu_is_one_sentence_with_a_way_out():
    with pytest.raises(UserError) as error:
        choose("fp16", CPU)
    assert str(error.value) == "precision: fp16 needs a GPU, and this run is on a CPU; write auto, bf16 or fp32"


def test_bf16_that_a_gpu_would_emulate_is_refused(capability):
    capability(7, 0)
    with pytest.raises(UserError, match=r"precision: bf16 .*compute capability 7\.0.*write auto, fp16 or fp32"):
        choose("bf16", GPU)


@pytest.mark.parametrize(
    ("mistake", "address"),
    [
        ({"initial_scale_power": 33}, "initial_scale_power"),
        ({"loss_scale_window": 0}, "loss_scale_window"),
        ({"hysteresis": 0}, "hysteresis"),
        ({"min_loss_scale": 0}, "min_loss_scale"),
        ({"initial_scale": 8}, "initial_scale"),
    ],
)
def test_loss_scale_has_bounds(mistake, address):
    with pytest.raises(UserError, match=rf"^run\.yaml: {address}: "):
        validate(LossScaleSettings, mistake, "run.yaml")
