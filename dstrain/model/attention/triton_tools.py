"""What the Triton kernels share: rows of packed tensors, tables of work made on the host, what a pass of launches starts
from, and whether they can run here.

This file and the kernels import without triton; then `why_not` says so and nobody calls them. Set TRITON_INTERPRET=1
before the first import and the same kernels run on a CPU, slowly, for tests.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dstrain.model.attention import blocked

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

HEAD_DIMS = (16, 32, 64, 128)
"""A head is one side of a tile: a power of two, at least the 16 that tensor cores multiply."""

LOG2E, UNIT_EPS = (blocked.LOG2E, blocked.UNIT_EPS) if tl is None else map(tl.constexpr, (blocked.LOG2E, blocked.UNIT_EPS))
"""What the plain kernels use, as Triton wants its constants."""

CHANGING = ("tokens", "round_", "first_head", "buckets")
"""Numbers that differ from launch to launch. Triton would compile a kernel anew where one of them is 1 or divisible by 16;
not for these."""


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, or a plain function that nobody calls where there is no triton."""
    return function if triton is None else triton.jit(function, do_not_specialize=CHANGING)


def why_not(x_THD: Tensor) -> str | None:
    """Why no Triton kernel can take these queries; None: it can."""
    if triton is None:
        return "triton is not installed"
    if x_THD.device.type != "cuda" and not triton.knobs.runtime.interpret:
        return f"triton kernels run on a GPU, not on {x_THD.device.type}"
    if x_THD.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels take fp32, fp16 and bf16, not {str(x_THD.dtype).removeprefix('torch.')}"
    if x_THD.shape[2] not in HEAD_DIMS:
        return f"the kernels take head sizes {', '.join(map(str, HEAD_DIMS))}, not {x_THD.shape[2]}"
    if x_THD.device.type == "cuda" and torch.cuda.get_device_capability(x_THD.device) < (8, 0):
        return f"the kernels need compute capability 8.0, {torch.cuda.get_device_name(x_THD.device)} has less"
    return None


def device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, whatever device its tensors are on."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def with_unit_stride(x_THD: Tensor) -> Tensor:
    """Views of a fused projection are read in place; only a head whose numbers lie apart is copied."""
    return x_THD if x_THD.stride(2) == 1 else x_THD.contiguous()


def strides(x_THD: Tensor) -> tuple[int, int]:
    """Of tokens and heads."""
    return x_THD.stride(0), x_THD.stride(1)


class Inputs:
    """Queries, keys and values as the kernels of a pass read them, and memory for what they write."""

    def __init__(self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor) -> None:
        assert q_THD.dtype == k_THD.dtype == v_THD.dtype, "q, k and v have one dtype"
        self.q, self.k, self.v = (with_unit_stride(x) for x in (q_THD, k_THD, v_THD))
        self.tokens, self.heads, self.head_dim = q_THD.shape
        self.dtype, self.device = q_THD.dtype, q_THD.device
        self.shape = {"HEADS": self.heads, "D": self.head_dim}
        self.precision = "ieee" if self.dtype == torch.float32 else "tf32"
        """How tensor cores may round fp32 operands: not at all where the inputs are fp32."""
        self.gradient_dtype = torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float32
        """What gradients are multiplied in. fp16 would lose small ones and overflow on sums of large ones: tf32 has its
        mantissa and the range of fp32."""
        self.gradient = {"GRAD": tl.bfloat16 if self.gradient_dtype == torch.bfloat16 else tl.float32}

    def launch(self, warps: int) -> dict[str, int]:
        """Warps of a program, and how many tiles a loop fetches ahead: as many as shared memory holds."""
        return {"num_warps": warps, "num_stages": 3 if self.head_dim <= 64 else 2}

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory on their device."""
        return torch.empty(shape, dtype=dtype, device=self.device)


def to_device(tables: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Integer tables as int32 on the device: one copy from pinned memory, which waits for nothing."""
    flat = torch.from_numpy(np.concatenate([table.astype(np.int32).ravel() for table in tables]))
    if device.type == "cuda":
        flat = flat.pin_memory().to(device, non_blocking=True)
    parts = flat.split([table.size for table in tables])
    return [part.view(table.shape) for part, table in zip(parts, tables, strict=True)]


def pieces(starts: np.ndarray, stops: np.ndarray, steps: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts spans into pieces of at most `steps`: (first place of each piece, number of its span)."""
    counts = -(-(stops - starts) // steps)
    span = np.repeat(np.arange(len(starts)), counts)
    index = np.arange(len(span)) - np.repeat(np.cumsum(counts) - counts, counts)
    return starts[span] + index * np.broadcast_to(steps, starts.shape)[span], span


# Inside kernels: tokens are int64 before they meet a stride, since T * H * D passes 2^31 in long packed batches.


@jit
def load_rows(x, token, valid, head, stride_token, stride_head, D: tl.constexpr):
    """(rows, D) of one head, zeros where not valid."""
    row = x + token.to(tl.int64)[:, None] * stride_token + head * stride_head
    return tl.load(row + tl.arange(0, D)[None, :], mask=valid[:, None], other=0.0)


@jit
def store_rows(x, values, token, valid, head, stride_token, stride_head, D: tl.constexpr):
    """The reverse of `load_rows`, rounded to what x holds."""
    row = x + token.to(tl.int64)[:, None] * stride_token + head * stride_head
    tl.store(row + tl.arange(0, D)[None, :], values, mask=valid[:, None])
