"""AdamW, what it decays, and how its learning rate moves over a stage."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import field_validator
from torch import nn

from dstrain.schema import Settings, setting


class OptimSettings(Settings):
    """AdamW (Loshchilov and Hutter 2019) with warm-up, decay and clipping of the gradient's global norm."""

    lr: float = setting(5e-4, gt=0)
    """Peak learning rate, reached when the warm-up ends."""
    weight_decay: float = setting(0.01, ge=0)
    """Decoupled decay of weight matrices and embeddings; norms and biases are never decayed."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of AdamW's running means of the gradient and of its square, each at least 0 and below 1."""
    eps: float = setting(1e-8, gt=0)
    """Added to the root of the mean square before dividing by it."""
    clip_norm: float = setting(1.0, ge=0)
    """The gradient is scaled down to this global norm; 0 never clips."""
    warmup: float = setting(0.1, ge=0, unit="share of the stage, or steps above 1")
    """Linear warm-up: a share of the stage's steps up to 1 (0.1 is a tenth), a number of steps when larger."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls from lr to min_lr_ratio * lr after the warm-up; constant stays at lr."""
    min_lr_ratio: float = setting(0.1, ge=0, le=1, unit="share of lr")
    """Where the schedule ends, at the last step."""

    @field_validator("betas")
    @classmethod
    def _forgetting(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"{list(betas)}: each must be at least 0 and below 1")
        return betas

    @field_validator("warmup")
    @classmethod
    def _share_or_count(cls, warmup: float) -> float:
        if warmup > 1 and warmup != int(warmup):
            raise ValueError(f"{warmup}: above 1 it counts steps, which are whole; a share of the stage is 1 at most")
        return warmup


def parameter_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Groups for `build_optimizer`: weight matrices and embeddings decay, norms and biases (all 1-d parameters) do not.

    Takes what `module.named_parameters()` gives, before DeepSpeed partitions it. A group without members is left out,
    because DeepSpeed removes empty groups and then counts differently than we do.
    """
    parameters = [parameter for _, parameter in named_parameters]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in parameters if parameter.ndim > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(groups: list[dict[str, Any]], settings: OptimSettings, device: torch.device) -> torch.optim.AdamW:
    """AdamW over parameter groups, with torch's one-pass kernel where `device` has one.

    The learning rate starts at 0, so that nothing moves before the schedule has set it (see `set_lr`).
    """
    # fused runs on ZeRO's flat fp32 masters too, and on their CPU copies when the optimizer is offloaded
    fused = device.type in ("cuda", "cpu")
    return torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, eps=settings.eps, weight_decay=0.0, fused=fused)


def warmup_steps(total_steps: int, settings: OptimSettings) -> int:
    """Steps before the learning rate reaches its peak: `warmup` as a share or as a count, never the whole stage."""
    wanted = settings.warmup if settings.warmup > 1 else math.ceil(settings.warmup * total_steps)
    return min(int(wanted), max(total_steps - 1, 0))


def lr_factor(step: int, total_steps: int, settings: OptimSettings) -> float:
    """What the peak learning rate is multiplied with at `step` (0 is the first of `total_steps`), in 0..1.

    Warm-up rises as (step + 1) / warm-up steps, so the first step already learns and the last of them is at the peak.
    From there the schedule falls to exactly min_lr_ratio at step total_steps - 1, and stays there. A stage of a single
    step takes it at the peak.
    """
    if total_steps <= 1:
        return 1.0
    warmup = warmup_steps(total_steps, settings)
    if step < warmup:
        return (step + 1) / warmup
    if settings.schedule == "constant":
        return 1.0
    peak = max(warmup - 1, 0)  # the last step of the warm-up, which always comes before the stage's last
    progress = min(1.0, (step - peak) / (total_steps - 1 - peak))
    remaining = 1 - progress if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return settings.min_lr_ratio + (1 - settings.min_lr_ratio) * remaining


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of every group of an optimizer (or of DeepSpeed's wrapper around one), times its `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
