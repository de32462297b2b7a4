"""How near an approximate attention comes to the softmax attention it stands for, in a model at work.

Any kernel is linear in V: with one-hot values its output is its own attention matrix. So a kernel is asked what it does
and nobody else has to know how; all that is said here about a kind is which exact softmax it approximates.

A sample bounds the cost: of at most DOCUMENTS documents, POINTS tokens look at all tokens of their document, and the
attention among the POINTS themselves is looked at entry by entry. Nothing is drawn; equal inputs give equal figures.

Shapes: T tokens, H heads, D head size, L length of one document, P points.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dstrain.model.attention.favor import Favor
from dstrain.model.attention.lsh import Lsh
from dstrain.model.encoder import Encoder
from dstrain.packed import Batch, Sequences

DOCUMENTS = 4
POINTS = 128
"""Tokens of a document that are looked at, evenly spaced; all of a shorter one."""

Figures = dict[str, float]
"""What is known of one layer:

`error`                 |out - exact| / |exact| (Frobenius) over the sampled queries of all heads
`uniform_error`         the same for the mean of all values: an estimate that is no better than this says nothing
`captured_share`        share of the exact attention among the points that falls on keys to which the kernel gives any
                        weight (1 for favor)
`effective_rank`        of the kernel's attention matrix among the points, mean over heads
`exact_effective_rank`  of the exact one
`logit_std`             standard deviation of a query's logits, root mean square over queries
`max_norm`              length of the longest query or key, where q.k is the logit: favor's error grows exponentially
"""


# ------------------------------------------------------------------------------- which softmax is approximated


def _of_favor(attention: Favor, q_XHD: Tensor, k_XHD: Tensor) -> tuple[Tensor, Tensor]:
    if not attention.settings.normalize_qk:
        return q_XHD * attention.head_dim**-0.25, k_XHD * attention.head_dim**-0.25
    root_H1 = torch.exp(attention.log_temperature_H.float() / 2).unsqueeze(-1)
    return F.normalize(q_XHD, dim=-1) * root_H1, F.normalize(k_XHD, dim=-1) * root_H1


def _of_lsh(attention: Lsh, q_XHD: Tensor, k_XHD: Tensor) -> tuple[Tensor, Tensor]:
    if attention.settings.normalize_keys:
        return q_XHD, F.normalize(k_XHD, dim=-1)
    return q_XHD * attention.head_dim**-0.25, k_XHD * attention.head_dim**-0.25


SOFTMAX_OF: dict[type[nn.Module], Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    Favor: _of_favor,
    Lsh: _of_lsh,
}
"""For each kind that approximates: queries and keys whose inner products are the logits. Others are exact."""


# ------------------------------------------------------------------------------------------------ one layer


@torch.no_grad()
def measure(attention: nn.Module, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, sequences: Sequences) -> Figures:
    """Figures of a kernel at these inputs, in the mode it is in; none for a kernel that is exact."""
    if type(attention) not in SOFTMAX_OF:
        return {}
    chosen = evenly(len(sequences.lengths), DOCUMENTS).tolist()
    documents = [slice(sequences.starts[number], sequences.starts[number + 1]) for number in chosen]
    seen = [_Document(attention, *(x[tokens] for x in (q_THD, k_THD, v_THD))) for tokens in documents]
    exact = sum(document.exact_square for document in seen)
    queries = sum(document.queries for document in seen)
    return {
        "error": math.sqrt(sum(document.error_square for document in seen) / exact) if exact else 0.0,
        "uniform_error": math.sqrt(sum(document.uniform_square for document in seen) / exact) if exact else 0.0,
        "captured_share": sum(document.captured for document in seen) / len(seen),
        "effective_rank": sum(document.rank for document in seen) / len(seen),
        "exact_effective_rank": sum(document.exact_rank for document in seen) / len(seen),
        "logit_std": math.sqrt(sum(document.logit_variance * document.queries for document in seen) / queries),
        "max_norm": max(document.max_norm for document in seen),
    }


class _Document:
    """What one document shows."""

    def __init__(self, attention: nn.Module, q_LHD: Tensor, k_LHD: Tensor, v_LHD: Tensor) -> None:
        points_P = evenly(len(q_LHD), POINTS).to(q_LHD.device)
        logits_HPL, self.max_norm = exact_logits(attention, q_LHD, k_LHD, points_P)
        weights_HPL = logits_HPL.softmax(-1)
        alone = Sequences.of([len(q_LHD)], q_LHD.device)
        out_PHD = attention.forward(q_LHD, k_LHD, v_LHD, alone)[points_P].float()
        exact_PHD = torch.einsum("hpl,lhd->phd", weights_HPL, v_LHD.float())
        self.error_square = float((out_PHD - exact_PHD).square().sum())
        self.uniform_square = float((v_LHD.float().mean(0) - exact_PHD).square().sum())
        self.exact_square = float(exact_PHD.square().sum())
        self.queries = len(points_P)
        self.logit_variance = _variance(logits_HPL)
        own_HPP = attention_matrix(attention, q_LHD, k_LHD, points_P)
        exact_HPP = weights_HPL[:, :, points_P]
        self.captured = float((exact_HPP * (own_HPP > 0)).sum() / exact_HPP.sum().clamp_min(1e-30))
        self.rank, self.exact_rank = (float(effective_rank(x).mean()) for x in (own_HPP, exact_HPP))


def _variance(logits_HPL: Tensor) -> float:
    """Mean over queries of the variance of their logits, hidden ones left out."""
    shown = logits_HPL.isfinite()
    count = shown.sum(-1).clamp_min(1)
    centred = logits_HPL - (logits_HPL.masked_fill(~shown, 0.0).sum(-1) / count).unsqueeze(-1)
    return float((centred.masked_fill(~shown, 0.0).square().sum(-1) / count).mean())


def exact_logits(attention: nn.Module, q_LHD: Tensor, k_LHD: Tensor, points_P: Tensor) -> tuple[Tensor, float]:
    """((H, P, L) fp32 logits of these queries with all keys of their document, and the longest of their vectors).

    Where queries are their own keys a token sees itself only when there is nothing else: that entry is -inf.
    """
    queries, keys = SOFTMAX_OF[type(attention)](attention, q_LHD.float(), k_LHD.float())
    logits_HPL = torch.einsum("phd,lhd->hpl", queries[points_P], keys)
    settings: Any = attention.settings
    if settings.tied_qk and len(q_LHD) > 1:
        logits_HPL[:, torch.arange(len(points_P), device=points_P.device), points_P] = -math.inf
    return logits_HPL, float(max(x.norm(dim=-1).max() for x in (queries, keys)))


def attention_matrix(attention: nn.Module, q_LHD: Tensor, k_LHD: Tensor, points_P: Tensor) -> Tensor:
    """(H, P, P) fp32: how much weight the kernel gives to each point, asked of it D one-hot values at a time."""
    length, heads, width = q_LHD.shape
    alone = Sequences.of([length], q_LHD.device)
    columns = []
    for asked in points_P.split(width):
        one_hot_LHD = torch.zeros(length, heads, width, dtype=q_LHD.dtype, device=q_LHD.device)
        one_hot_LHD[asked, :, torch.arange(len(asked), device=asked.device)] = 1.0
        answer_LHD = attention.forward(q_LHD, k_LHD, one_hot_LHD, alone)
        columns.append(answer_LHD[points_P, :, : len(asked)].float())
    return torch.cat(columns, -1).transpose(0, 1)


def effective_rank(matrix_XPP: Tensor) -> Tensor:
    """(...): exp of the entropy of the singular values divided by their sum (Roy and Vetterli, "The effective rank",
    EUSIPCO 2007): 1 where all rows are alike up to a factor, as in plain averaging; the size for the identity."""
    if not matrix_XPP.isfinite().all():  # LAPACK refuses these
        return matrix_XPP.new_full(matrix_XPP.shape[:-2], math.nan)
    values = torch.linalg.svdvals(matrix_XPP.cpu())
    share = values / values.sum(-1, keepdim=True).clamp_min(1e-30)
    return torch.special.entr(share).sum(-1).exp()


def evenly(count: int, most: int) -> Tensor:
    """At most `most` of the numbers 0 .. count - 1, evenly spaced from the first to the last."""
    return torch.linspace(0, count - 1, min(count, most), dtype=torch.float64).round().long()


# ----------------------------------------------------------------------------------------------- all layers


@torch.no_grad()
def report_attention(
    encoder: Encoder, batch: Batch, forward: Callable[[Batch], Any] | None = None, adapt: bool = False
) -> dict[str, Figures]:
    """{"layer_0": figures, ...} of an encoder in evaluation; {} when all its layers are exact.

    Each layer is looked at just before it runs, where ZeRO-3 has its weights together, so nothing has to be kept. With
    `adapt` a kernel may first fit itself to what it is about to be given. `forward` is what to
    run the batch through when the encoder is a part of something larger (a DeepSpeed engine). Apart from what is fitted,
    weights, modes and random numbers are afterwards what they were before.
    """
    found: dict[str, Figures] = {}

    def look(layer: int, attention: Any, inputs: tuple[Any, ...]) -> None:
        if adapt:
            q_THD, k_THD, _, sequences = inputs
            attention.adapt(q_THD, k_THD, sequences)
        if figures := measure(attention, *inputs):
            found[f"layer_{layer}"] = figures

    kernels = [block.get_submodule("attention") for block in encoder.blocks]
    if not any(type(kernel) in SOFTMAX_OF for kernel in kernels):
        return {}
    hooks = [kernel.register_forward_pre_hook(partial(look, layer)) for layer, kernel in enumerate(kernels)]
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    try:
        (forward or encoder)(batch)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode
    return found


def summed_up(layers: dict[str, Figures]) -> Figures:
    """The figures of all layers under `layer_0/error` and so on, and under `error` their mean."""
    if not layers:
        return {}
    names = next(iter(layers.values()))
    means = {name: sum(figures[name] for figures in layers.values()) / len(layers) for name in names}
    return means | {f"{layer}/{name}": value for layer, figures in layers.items() for name, value in figures.items()}
