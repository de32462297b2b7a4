"""Exact attention, out_i = sum_j softmax_j(q_i . k_j / sqrt(D)) v_j, by the fused kernels that torch brings.

Shapes: T tokens, H heads, D head size, N documents, L length of a document.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from dstrain.model.attention.blocked import equal_length_runs, work_dtype
from dstrain.packed import Sequences
from dstrain.schema import Settings


class SdpaSettings(Settings):
    """Exact softmax attention (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762), quadratic in the length."""

    kind: Literal["sdpa"] = "sdpa"
    backend: Literal["auto", "reference"] = "auto"
    """`auto`: the fastest fused kernel of this device; `reference`: the N x N softmax written out, to test against."""

    @property
    def tied_qk(self) -> bool:
        """Queries and keys have projections of their own."""
        return False

    def build(self, num_heads: int, head_dim: int, layer: int, seed: int) -> Sdpa:
        """The kernel; it has neither parameters nor chance."""
        return Sdpa(self, num_heads, head_dim)


class Sdpa(nn.Module):
    """Softmax attention within each document; never with a mask, which would switch the flash kernels off."""

    def __init__(self, settings: SdpaSettings, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.settings, self.num_heads, self.head_dim = settings, num_heads, head_dim
        here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._kernel, self._why = choose_kernel(settings.backend, here, torch.get_default_dtype(), head_dim)

    def forward(self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, sequences: Sequences) -> Tensor:
        """(T, H, D) of v's dtype."""
        self._kernel, self._why = choose_kernel(self.settings.backend, q_THD.device, q_THD.dtype, self.head_dim)
        if self._kernel == "varlen flash":
            return _varlen_flash(q_THD, k_THD, v_THD, sequences)
        exactly = self._kernel == "reference"
        attend = _naive if exactly else scaled_dot_product_attention
        slow = q_THD.device.type == "cpu" and q_THD.dtype == torch.float16
        upcast = work_dtype(q_THD) if exactly or slow else q_THD.dtype
        return _by_length(attend, q_THD.to(upcast), k_THD.to(upcast), v_THD.to(upcast), sequences).to(v_THD.dtype)

    def set_step(self, step: int) -> None:
        """Nothing here depends on the step."""

    def adapt(self, q_THD: Tensor, k_THD: Tensor, sequences: Sequences) -> None:
        """Nothing here is fitted to queries and keys."""

    @property
    def kernel(self) -> str:
        """The kernel of the last forward pass (before the first: of this machine's best device), and why."""
        return f"{self._kernel} ({self._why})"

    def flops(self, lengths: Sequence[int]) -> int:
        """Multiplications and additions of one forward pass over documents of these lengths."""
        return sum(4 * length * length * self.num_heads * self.head_dim for length in lengths)


def choose_kernel(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, str]:
    """(kernel, reason): "varlen flash" where it can run, else "flash per document" or "sdpa per document"."""
    if backend == "reference":
        return "reference", "asked for by backend: reference"
    if device.type == "cpu":
        widened = "; fp16 is computed in fp32" if dtype == torch.float16 else ""
        return "flash per document", f"a CPU has no variable-length kernel{widened}"
    if dtype not in (torch.float16, torch.bfloat16):
        return "sdpa per document", f"flash takes fp16 and bf16, not {str(dtype).removeprefix('torch.')}"
    if head_dim % 8 or head_dim > 256:
        return "sdpa per document", f"flash takes head sizes that are multiples of 8 up to 256, not {head_dim}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "sdpa per document", f"flash needs compute capability 8.0, {torch.cuda.get_device_name(device)} has less"
    if _find_varlen_attn() is None:
        return "flash per document", f"torch {torch.__version__} has no torch.nn.attention.varlen"
    return "varlen flash", "all documents in one call, no mask and no padding"


def _find_varlen_attn() -> Callable[..., Any] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def _varlen_flash(q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, sequences: Sequences) -> Tensor:
    varlen_attn = _find_varlen_attn()
    assert varlen_attn is not None, "choose_kernel looked"
    starts_N1, longest = sequences.starts_N1, sequences.longest
    return varlen_attn(q_THD, k_THD, v_THD, starts_N1, starts_N1, longest, longest)


def _by_length(
    attend: Callable[..., Tensor], q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, sequences: Sequences
) -> Tensor:
    """`attend` on (N, H, L, D) for each run of equally long documents: they share a call and nothing is copied."""
    runs = list(equal_length_runs(sequences))
    # split, not slices: a slice's gradient is a tensor of all T tokens, once per run
    parts = [x_THD.split([count * length for _, count, length in runs]) for x_THD in (q_THD, k_THD, v_THD)]
    outs = []
    for (_, count, length), *qkv in zip(runs, *parts, strict=True):
        q, k, v = (x.unflatten(0, (count, length)).transpose(1, 2) for x in qkv)
        outs.append(attend(q, k, v).transpose(1, 2).flatten(0, 1))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _naive(q_NHLD: Tensor, k_NHLD: Tensor, v_NHLD: Tensor) -> Tensor:
    """The definition, with all L x L scores in memory."""
    scores_NHLL = q_NHLD @ k_NHLD.mT / math.sqrt(q_NHLD.shape[-1])
    return scores_NHLL.softmax(-1) @ v_NHLD
