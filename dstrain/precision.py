"""Which number format a run trains in, and why: fp32, bf16, or fp16 with a dynamic loss scale."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from dstrain.schema import Settings, UserError, setting

PrecisionName = Literal["auto", "fp32", "bf16", "fp16"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class LossScaleSettings(Settings):
    """Dynamic loss scaling of fp16, under the names of DeepSpeed's `fp16` block.

    The loss is multiplied by 2^initial_scale_power so that small gradients survive fp16. A step whose gradient
    overflows is skipped and the scale halved; after loss_scale_window good steps it is doubled.
    """

    initial_scale_power: int = setting(16, ge=0, le=32, unit="log2")
    """The first scale is 2 to this power."""
    loss_scale_window: int = setting(1000, ge=1, unit="optimizer steps")
    """Steps without an overflow before the scale is doubled."""
    hysteresis: int = setting(2, ge=1, unit="overflows")
    """Overflows before the scale is halved; every one of them skips its step."""
    min_loss_scale: int = setting(1, ge=1)
    """The scale never falls below this; an overflow there is met as any number that is none (stages.NAME.healing)."""


class Precision(NamedTuple):
    """The choice, ready to use and to be told."""

    name: Literal["fp32", "bf16", "fp16"]
    dtype: torch.dtype
    """What the encoder's weights and activations are held in; the optimizer keeps fp32 master copies in any case."""
    reason: str
    """One line for the start of a run, such as `bf16: the GPU has it (compute capability 9.0)`."""


def choose(wanted: PrecisionName, device: torch.device) -> Precision:
    """The number format for `device`: what the settings ask for, or the best it has when they say auto.

    Raises UserError for fp16 on a CPU, which DeepSpeed does not train on, and bf16 on a GPU that would only emulate it.
    """
    found, reason = _best(device)
    if wanted == "auto":
        return Precision(found, DTYPES[found], f"{found}: {reason}")
    if wanted == "fp16" and device.type != "cuda":
        raise UserError("precision: fp16 needs a GPU, and this run is on a CPU; write auto, bf16 or fp32")
    if wanted == "bf16" and device.type == "cuda" and found != "bf16":
        raise UserError(f"precision: bf16 is not there, {reason}; write auto, fp16 or fp32")
    return Precision(wanted, DTYPES[wanted], f"{wanted}: the settings ask for it")


def in_place_of_fp16(device: torch.device) -> Precision | None:
    """bf16, for a run whose numbers fp16 cannot hold; None where the device has only fp16."""
    if device.type == "cuda" and _best(device)[0] != "bf16":
        return None
    return Precision("bf16", DTYPES["bf16"], "bf16: fp16 could not hold the numbers of this run")


def _best(device: torch.device) -> tuple[Literal["fp32", "bf16", "fp16"], str]:
    if device.type != "cuda":
        return "fp32", "on a CPU 16 bits seldom gain speed"
    major, minor = torch.cuda.get_device_capability(device)
    # is_bf16_supported() says True where bf16 is merely emulated; tensor cores have it from Ampere (8.0) on
    if major >= 8:
        return "bf16", f"the GPU has it (compute capability {major}.{minor})"
    return "fp16", f"the GPU is older than bf16 (compute capability {major}.{minor}, bf16 starts at 8.0)"
