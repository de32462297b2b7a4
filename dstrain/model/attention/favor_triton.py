"""FAVOR+ on a GPU: the two softmaxes of `favor.py` as Triton kernels, for packed documents of any lengths.

The features attend to the keys like M queries of a flash kernel whose keys are cut into segments (partial softmaxes,
merged by their log-sum-exp), the queries attend to the M features like a flash kernel with M keys. Scores and features
live in registers only. With s the shift, x the scaled keys and queries, c the constants of the features:

    score_mj = w_m.k_j - |k_j - s|^2/2      lse_m = logsumexp_j score_mj      A_m = softmax_j(score_mj) v_j
    z_m = lse_m + c_m - w_m.s               out_i = softmax_m(w_m.q_i + z_m) A_m

(a constant |s|^2/2 less than `favor.py` has in z, which no softmax over m sees). The backward pass, with weights P:

    D_i = dout_i.out_i    dA_m = sum_i P_im dout_i    e_m = sum_i P_im D_i            (per segment of queries)
    dS_mj = P_mj (dA_m.v_j - e_m)    dv_j = sum_m P_mj dA_m    dk_j = sum_m dS_mj (w_m - (k_j - s))    (per block of keys)
    ds = -sum_j dk_j                 which goes to every row that s is a mean of
    dS_im = P_im (dout_i.A_m - D_i)  dq_i = sum_m dS_im w_m                           (per block of queries)

dz_m = dA_m.A_m - e_m cancels out of dS_mj, and moving s moves nothing but k - s, hence ds. No atomics: partial sums of
segments and blocks are added in a fixed order. How a document is cut depends on its own length only, so its result
has the same bits whatever lies beside it.

Precision: raw q and k are multiplied as they come (bf16 is exact) with W split into two numbers of their dtype (16 or
22 bits of W), and 1/|x| and the scale follow in fp32; sums, scores and masses are fp32; weights are rounded to the dtype
of v forward and to `gradient_dtype` backward.

What an H100 needs at T = 16 384, H = 8, D = 64, M = 256, bf16 (arithmetic, not measured: these kernels never ran on a
GPU). A product of T H M D is 4.3 GFLOP; forward takes 6 of them (scores count twice: W is two numbers), backward 12:
77 GFLOP, .10 ms at the 790 TFLOP/s of dense bf16. 5 T H M = 168 M exponentials, .05 ms. Memory moves 5 tensors of 16.8 MB
forward and 14 backward, .32 GB in all, .10 ms at 3.35 TB/s. Products, exponentials and memory overlap only partly and
Triton's flash kernels reach 40 to 60 % of the peak on such tiles: .25 to .4 ms are to be expected, against 6 ms of
flash attention, and below 4k the 10 launches (about .1 ms) decide. Besides inputs and outputs memory holds, per
document, M (D + 2) numbers, 16 times that for segments of long ones in passing, and 1 fp32 per token and head.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dstrain.model.attention import triton_tools
from dstrain.model.attention.triton_tools import LOG2E, UNIT_EPS, Inputs, jit, load_rows, store_rows, strides, tl
from dstrain.packed import Sequences

Shift = Literal["none", "keys", "queries", "both"]
"""Whose mean s is: nobody's, that of a document's keys, of its queries, or the sum of both."""

SEGMENTS = 16
"""A document's keys are cut into at most this many segments, so that one long document keeps a whole GPU busy."""
SEGMENT = 256
"""Tokens of a segment at least."""
ROWS_AT_LEAST = 4096
"""Points of a wave of documents may take as many rows as there are tokens, and this many anyhow."""


def favor_attention(
    q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, scale_H: Tensor, weights_HMD: Tensor, bias_HM: Tensor,
    sequences: Sequences, normalize: bool, shift: Shift = "none",
) -> Tensor:  # fmt: skip
    """(T, H, D) of v's dtype: FAVOR+ within each document.

    `scale_H` multiplies q and k (their unit vectors when `normalize`); `weights_HMD` are the projections and `bias_HM`
    the constants added to z in natural units, both fp32 and without gradient. q, k and v have one dtype.
    """
    return _FavorTriton.apply(q_THD, k_THD, v_THD, scale_H, weights_HMD, bias_HM, sequences, normalize, shift)


# --------------------------------------------------------------------------------------------- the tables of work


class _Wave(NamedTuple):
    """Documents whose points exist at the same time. Rows of tables: tokens from, tokens to, document of the wave."""

    segments_S3: Tensor
    blocks_B3: Tensor
    documents_N6: Tensor
    """Tokens from, tokens to, first segment, number of segments, first block, number of blocks."""

    @property
    def merges(self) -> bool:
        """Whether some document has several segments."""
        return len(self.segments_S3) > len(self.documents_N6)


@lru_cache(maxsize=32)
def _waves(sequences: Sequences, block: int, segments_together: int) -> tuple[_Wave, ...]:
    """Tables for one micro-batch: its layers share them."""
    starts = np.array(sequences.starts)
    lengths = np.diff(starts)
    wanted = np.maximum(-(-lengths // SEGMENTS), SEGMENT)
    step = 1 << np.ceil(np.log2(wanted)).astype(np.int64)
    total = np.cumsum(-(-lengths // step))
    waves, first = [], 0
    while first < len(lengths):
        before = total[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(total, before + segments_together, side="right")))
        waves.append(_wave(starts[first : last + 1], step[first:last], block, sequences.device))
        first = last
    return tuple(waves)


def _wave(starts: np.ndarray, step: np.ndarray, block: int, device: torch.device) -> _Wave:
    tables, columns = [], [starts[:-1], starts[1:]]
    for size in (step, np.full_like(step, block)):
        first, document = triton_tools.pieces(starts[:-1], starts[1:], size)
        tables.append(np.stack([first, np.minimum(first + size[document], starts[1:][document]), document], 1))
        counts = np.bincount(document, minlength=len(step))
        columns += [np.cumsum(counts) - counts, counts]
    return _Wave(*triton_tools.to_device([*tables, np.stack(columns, 1)], device))


# --------------------------------------------------------------------------------------------------- the kernels


@jit
def _factor(x, scale, NORMALIZE: tl.constexpr):
    """(rows) fp32: what makes the kernel's q or k of the given one."""
    square = tl.sum(x * x, 1)
    if NORMALIZE:
        return scale * tl.rsqrt(square + UNIT_EPS)
    return square * 0.0 + scale


@jit
def _factor_backward(grad, x, factor, scale, NORMALIZE: tl.constexpr):
    """The gradient at the given row: for unit vectors, what lies along the row is lost."""
    if NORMALIZE:
        unit = x * (factor / scale)[:, None]
        grad = grad - unit * tl.sum(unit * grad, 1)[:, None]
    return grad * factor[:, None]


@jit
def _block(blocks, block, ROWS: tl.constexpr):
    """(rows) tokens of a block of rows, which of them exist, and their document."""
    row = blocks + block * 3
    token = tl.load(row) + tl.arange(0, ROWS)
    return token, token < tl.load(row + 1), tl.load(row + 2)


@jit
def _masses(peaks, offsets, group, feature, features):
    """(M) fp32: z in base 2; nothing past the last feature."""
    peak = _load_vector(peaks, group, feature, features, float("-inf"))
    return peak + _load_vector(offsets, group, feature, features, 0.0)


@jit
def _load_matrix(x, group, feature, features, D: tl.constexpr):
    """A tile (M, D) of what each feature has, of one (document and) head; zeros past the last feature."""
    row = (group * features + feature).to(tl.int64)
    return tl.load(x + row[:, None] * D + tl.arange(0, D)[None, :], mask=(feature < features)[:, None], other=0.0)


@jit
def _store_matrix(x, values, group, feature, features, D: tl.constexpr):
    row = (group * features + feature).to(tl.int64)
    tl.store(x + row[:, None] * D + tl.arange(0, D)[None, :], values, mask=(feature < features)[:, None])


@jit
def _load_vector(x, group, feature, features, OTHER: tl.constexpr):
    """A tile (M) likewise; OTHER past the last feature."""
    return tl.load(x + group * features + feature, mask=feature < features, other=OTHER)


@jit
def _store_vector(x, values, group, feature, features):
    tl.store(x + group * features + feature, values, mask=feature < features)


@jit
def _split(w, LOW: tl.constexpr):
    """W as the sum of two numbers of a dtype (fp32 is exact as one; the second is not used)."""
    high = w.to(LOW)
    return high, (w - high.to(tl.float32)).to(LOW)


@jit
def _row_scores(x, w, PRECISION: tl.constexpr):
    """(rows, M) fp32: rows as they came times W."""
    high, low = _split(w, x.dtype)
    scores = tl.dot(x, tl.trans(high), input_precision=PRECISION)
    if x.dtype != tl.float32:
        scores = tl.dot(x, tl.trans(low), scores)
    return scores


@jit
def _feature_scores(high, low, x, PRECISION: tl.constexpr):
    """(M, rows) fp32: the same with W, split before the loop, on the left."""
    scores = tl.dot(high, tl.trans(x), input_precision=PRECISION)
    if x.dtype != tl.float32:
        scores = tl.dot(low, tl.trans(x), scores)
    return scores


@jit
def _shift(sums, documents, document, head, scale, HEADS: tl.constexpr, D: tl.constexpr, SEGMENTS: tl.constexpr):
    """(D) fp32: s, from the sums of the document's segments."""
    row = documents + document * 6
    length = tl.load(row + 1) - tl.load(row)
    first, count = tl.load(row + 2), tl.load(row + 3)
    part = tl.arange(0, SEGMENTS)
    place = ((first + part) * HEADS + head) * D
    values = tl.load(sums + place[:, None] + tl.arange(0, D)[None, :], mask=(part < count)[:, None], other=0.0)
    return tl.sum(values, 0) * (scale / length)


@jit
def _sum_rows(
    q, q_token, q_head, k, k_token, k_head, segments, sums,
    HEADS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, NORMALIZE: tl.constexpr,
    KEYS: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Program (segment, head): the sum of its keys or queries or both, before the scale."""
    segment, head = tl.program_id(0), tl.program_id(1)
    start, stop = tl.load(segments + segment * 3), tl.load(segments + segment * 3 + 1)
    total = tl.full((D,), 0.0, tl.float32)
    for first in range(start, stop, ROWS):
        token = first + tl.arange(0, ROWS)
        if KEYS:
            x = load_rows(k, token, token < stop, head, k_token, k_head, D).to(tl.float32)
            total += tl.sum(x * _factor(x, 1.0, NORMALIZE)[:, None], 0)
        if QUERIES:
            x = load_rows(q, token, token < stop, head, q_token, q_head, D).to(tl.float32)
            total += tl.sum(x * _factor(x, 1.0, NORMALIZE)[:, None], 0)
    tl.store(sums + (segment * HEADS + head) * D + tl.arange(0, D), total)


@jit
def _points(
    k, k_token, k_head, v, v_token, v_head, scales, weights, bias, sums, segments, documents,
    peaks, offsets, values, features,
    HEADS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, SEGMENTS: tl.constexpr,
    NORMALIZE: tl.constexpr, SHIFTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (segment, head, tile of features): the features attend to the segment's keys."""
    segment, head = tl.program_id(0), tl.program_id(1)
    feature = tl.program_id(2) * TILE + tl.arange(0, TILE)
    start, stop = tl.load(segments + segment * 3), tl.load(segments + segment * 3 + 1)
    document = tl.load(segments + segment * 3 + 2)
    scale = tl.load(scales + head)
    w = _load_matrix(weights, head, feature, features, D)
    offset = _load_vector(bias, head, feature, features, 0.0)
    shift = tl.full((D,), 0.0, tl.float32)
    if SHIFTED:
        shift = _shift(sums, documents, document, head, scale, HEADS, D, SEGMENTS)
        offset -= tl.sum(w * shift[None, :], 1)
    high, low = _split(w, k.dtype.element_ty)
    peak = tl.full((TILE,), float("-inf"), tl.float32)
    total = tl.full((TILE,), 0.0, tl.float32)
    attended = tl.full((TILE, D), 0.0, tl.float32)
    for first in range(start, stop, ROWS):
        token = first + tl.arange(0, ROWS)
        valid = token < stop
        x = load_rows(k, token, valid, head, k_token, k_head, D)
        value = load_rows(v, token, valid, head, v_token, v_head, D)
        factor = _factor(x.to(tl.float32), scale, NORMALIZE)
        centred = x.to(tl.float32) * factor[:, None] - shift[None, :]
        constant = tl.where(valid, -0.5 * tl.sum(centred * centred, 1), float("-inf"))
        scores = _feature_scores(high, low, x, PRECISION) * factor[None, :] + constant[None, :]
        scores *= LOG2E  # so that weights are powers of two
        higher = tl.maximum(peak, tl.max(scores, 1))
        shrink = tl.exp2(peak - higher)
        weight = tl.exp2(scores - higher[:, None])
        total = total * shrink + tl.sum(weight, 1)
        attended = tl.dot(weight.to(value.dtype), value, attended * shrink[:, None], input_precision=PRECISION)
        peak = higher
    group = segment * HEADS + head
    _store_vector(peaks, peak + tl.log2(total), group, feature, features)
    _store_matrix(values, attended / total[:, None], group, feature, features, D)
    if segment == tl.load(documents + document * 6 + 2):  # one of the document's segments tells what all know
        _store_vector(offsets, offset * LOG2E, document * HEADS + head, feature, features)


@jit
def _merge(
    parts, part_peaks, documents, values, peaks, features,
    HEADS: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, SEGMENTS: tl.constexpr, SOFTMAX: tl.constexpr,
):  # fmt: skip
    """Program (document, head, tile of features): its segments merged by log-sum-exp, or (gradients) just added."""
    document, head = tl.program_id(0), tl.program_id(1)
    feature = tl.program_id(2) * TILE + tl.arange(0, TILE)
    first, count = tl.load(documents + document * 6 + 2), tl.load(documents + document * 6 + 3)
    part = tl.arange(0, SEGMENTS)
    row = ((first + part) * HEADS + head)[:, None] * features + feature[None, :]
    mask = (part < count)[:, None] & (feature < features)[None, :]
    if SOFTMAX:
        each = tl.load(part_peaks + row, mask=mask, other=float("-inf"))
        top = tl.maximum(tl.max(each, 0), -1e30)  # finite past the last feature too
        peak = top + tl.log2(tl.sum(tl.exp2(each - top[None, :]), 0))
    else:
        peak = tl.sum(tl.load(part_peaks + row, mask=mask, other=0.0), 0)
    merged = tl.full((TILE, D), 0.0, tl.float32)
    for index in range(first, first + count):
        group = index * HEADS + head
        value = _load_matrix(parts, group, feature, features, D)
        if SOFTMAX:
            value *= tl.exp2(_load_vector(part_peaks, group, feature, features, float("-inf")) - peak)[:, None]
        merged += value
    group = document * HEADS + head
    _store_vector(peaks, peak, group, feature, features)
    _store_matrix(values, merged, group, feature, features, D)


@jit
def _queries(
    q, q_token, q_head, scales, weights, peaks, offsets, values, blocks, out, lse, features,
    HEADS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (block of rows, head): its queries attend to the document's points."""
    block, head = tl.program_id(0), tl.program_id(1)
    token, valid, document = _block(blocks, block, ROWS)
    group = document * HEADS + head
    x = load_rows(q, token, valid, head, q_token, q_head, D)
    factor = _factor(x.to(tl.float32), tl.load(scales + head), NORMALIZE) * LOG2E
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.full((ROWS,), 0.0, tl.float32)
    attended = tl.full((ROWS, D), 0.0, tl.float32)
    for first in range(0, features, TILE):
        feature = first + tl.arange(0, TILE)
        w = _load_matrix(weights, head, feature, features, D)
        mass = _masses(peaks, offsets, group, feature, features)
        value = _load_matrix(values, group, feature, features, D)
        scores = _row_scores(x, w, PRECISION) * factor[:, None] + mass[None, :]
        higher = tl.maximum(peak, tl.max(scores, 1))
        shrink = tl.exp2(peak - higher)
        weight = tl.exp2(scores - higher[:, None])
        total = total * shrink + tl.sum(weight, 1)
        attended = tl.dot(weight.to(value.dtype), value, attended * shrink[:, None], input_precision=PRECISION)
        peak = higher
    store_rows(out, attended / total[:, None], token, valid, head, HEADS * D, D, D)
    tl.store(lse + token.to(tl.int64) * HEADS + head, peak + tl.log2(total), mask=valid)


@jit
def _points_backward(
    q, q_token, q_head, grad, grad_token, grad_head, out, lse, scales, weights, peaks, offsets, segments,
    grad_values, along, features,
    HEADS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    NORMALIZE: tl.constexpr, PRECISION: tl.constexpr, GRAD: tl.constexpr,
):  # fmt: skip
    """Program (segment, head, tile of features): dA and e of the segment's queries."""
    segment, head = tl.program_id(0), tl.program_id(1)
    feature = tl.program_id(2) * TILE + tl.arange(0, TILE)
    start, stop = tl.load(segments + segment * 3), tl.load(segments + segment * 3 + 1)
    points = tl.load(segments + segment * 3 + 2) * HEADS + head
    scale = tl.load(scales + head)
    mass = _masses(peaks, offsets, points, feature, features)
    high, low = _split(_load_matrix(weights, head, feature, features, D), q.dtype.element_ty)
    total = tl.full((TILE,), 0.0, tl.float32)
    gathered = tl.full((TILE, D), 0.0, tl.float32)
    for first in range(start, stop, ROWS):
        token = first + tl.arange(0, ROWS)
        valid = token < stop
        x = load_rows(q, token, valid, head, q_token, q_head, D)
        dout = load_rows(grad, token, valid, head, grad_token, grad_head, D)
        o = load_rows(out, token, valid, head, HEADS * D, D, D)
        normalizer = tl.load(lse + token.to(tl.int64) * HEADS + head, mask=valid, other=float("inf"))
        factor = _factor(x.to(tl.float32), scale, NORMALIZE) * LOG2E
        scores = _feature_scores(high, low, x, PRECISION) * factor[None, :] + mass[:, None]
        weight = tl.exp2(scores - normalizer[None, :])
        total += tl.sum(weight * tl.sum(dout.to(tl.float32) * o.to(tl.float32), 1)[None, :], 1)
        gathered = tl.dot(weight.to(GRAD), dout.to(GRAD), gathered, input_precision=PRECISION)
    group = segment * HEADS + head
    _store_vector(along, total, group, feature, features)
    _store_matrix(grad_values, gathered, group, feature, features, D)


@jit
def _keys_backward(
    k, k_token, k_head, v, v_token, v_head, scales, weights, sums, peaks, grad_values, along, blocks, documents,
    grad_k, grad_v, grad_sums, grad_scale, features,
    HEADS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, SEGMENTS: tl.constexpr,
    NORMALIZE: tl.constexpr, SHIFTED: tl.constexpr, PRECISION: tl.constexpr, GRAD: tl.constexpr,
):  # fmt: skip
    """Program (block of rows, head): dv and dk but for the shift's part; the sum of dk, and of k.dk for the scale."""
    block, head = tl.program_id(0), tl.program_id(1)
    token, valid, document = _block(blocks, block, ROWS)
    group = document * HEADS + head
    scale = tl.load(scales + head)
    x = load_rows(k, token, valid, head, k_token, k_head, D)
    value = load_rows(v, token, valid, head, v_token, v_head, D)
    exact = x.to(tl.float32)
    factor = _factor(exact, scale, NORMALIZE)
    centred = exact * factor[:, None]
    if SHIFTED:
        centred -= _shift(sums, documents, document, head, scale, HEADS, D, SEGMENTS)[None, :]
    constant = tl.where(valid, -0.5 * tl.sum(centred * centred, 1), float("-inf"))
    received = tl.full((ROWS,), 0.0, tl.float32)
    dk = tl.full((ROWS, D), 0.0, tl.float32)
    dv = tl.full((ROWS, D), 0.0, tl.float32)
    for first in range(0, features, TILE):
        feature = first + tl.arange(0, TILE)
        w = _load_matrix(weights, head, feature, features, D)
        dvalues = _load_matrix(grad_values, group, feature, features, D)
        peak = _load_vector(peaks, group, feature, features, float("inf"))
        e = _load_vector(along, group, feature, features, 0.0)
        scores = (_row_scores(x, w, PRECISION) * factor[:, None] + constant[:, None]) * LOG2E
        weight = tl.exp2(scores - peak[None, :])
        dv = tl.dot(weight.to(GRAD), dvalues.to(GRAD), dv, input_precision=PRECISION)
        dscores = tl.dot(value.to(GRAD), tl.trans(dvalues.to(GRAD)), input_precision=PRECISION)
        dscores = weight * (dscores - e[None, :])
        received += tl.sum(dscores, 1)
        dk = tl.dot(dscores.to(GRAD), w.to(GRAD), dk, input_precision=PRECISION)
    dk -= received[:, None] * centred
    place = block * HEADS + head
    tl.store(grad_scale + place, tl.sum(tl.sum(dk * exact, 1) * factor, 0))
    if SHIFTED:
        tl.store(grad_sums + place * D + tl.arange(0, D), tl.sum(dk, 0))
    store_rows(grad_v, dv, token, valid, head, HEADS * D, D, D)
    store_rows(grad_k, _factor_backward(dk, exact, factor, scale, NORMALIZE), token, valid, head, HEADS * D, D, D)


@jit
def _shift_backward(
    sums, grad_sums, scales, documents, grad_shift, grad_scale,
    HEADS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """Program (document, head): the shift's gradient over the document's length, and the shift's part of the scale's."""
    document, head = tl.program_id(0), tl.program_id(1)
    row = documents + document * 6
    length = tl.load(row + 1) - tl.load(row)
    first, count = tl.load(row + 4), tl.load(row + 5)
    total = tl.full((D,), 0.0, tl.float32)
    for block in range(first, first + count, ROWS):
        part = block + tl.arange(0, ROWS)
        place = (part * HEADS + head)[:, None] * D + tl.arange(0, D)[None, :]
        total -= tl.sum(tl.load(grad_sums + place, mask=(part < first + count)[:, None], other=0.0), 0)
    shift = _shift(sums, documents, document, head, tl.load(scales + head), HEADS, D, SEGMENTS)
    tl.store(grad_shift + (document * HEADS + head) * D + tl.arange(0, D), total / length)
    tl.store(grad_scale + document * HEADS + head, tl.sum(total * shift, 0))


@jit
def _shift_to_keys(
    k, k_token, k_head, scales, blocks, grad_shift, grad_k,
    HEADS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Program (block of rows, head): adds the shift's part to dk, since s is known only after all of dk."""
    block, head = tl.program_id(0), tl.program_id(1)
    token, valid, document = _block(blocks, block, ROWS)
    group = document * HEADS + head
    scale = tl.load(scales + head)
    x = load_rows(k, token, valid, head, k_token, k_head, D).to(tl.float32)
    shift = tl.load(grad_shift + group * D + tl.arange(0, D))[None, :] + x * 0.0
    dk = load_rows(grad_k, token, valid, head, HEADS * D, D, D).to(tl.float32)
    dk += _factor_backward(shift, x, _factor(x, scale, NORMALIZE), scale, NORMALIZE)
    store_rows(grad_k, dk, token, valid, head, HEADS * D, D, D)


@jit
def _queries_backward(
    q, q_token, q_head, grad, grad_token, grad_head, out, lse, scales, weights, peaks, offsets, values, blocks,
    grad_shift, grad_q, grad_scale, features,
    HEADS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    NORMALIZE: tl.constexpr, SHIFTED: tl.constexpr, PRECISION: tl.constexpr, GRAD: tl.constexpr,
):  # fmt: skip
    """Program (block of rows, head): dq, and the sum of q.dq for the scale."""
    block, head = tl.program_id(0), tl.program_id(1)
    token, valid, document = _block(blocks, block, ROWS)
    group = document * HEADS + head
    scale = tl.load(scales + head)
    x = load_rows(q, token, valid, head, q_token, q_head, D)
    dout = load_rows(grad, token, valid, head, grad_token, grad_head, D)
    o = load_rows(out, token, valid, head, HEADS * D, D, D)
    delta = tl.sum(dout.to(tl.float32) * o.to(tl.float32), 1)
    normalizer = tl.load(lse + token.to(tl.int64) * HEADS + head, mask=valid, other=float("inf"))
    exact = x.to(tl.float32)
    factor = _factor(exact, scale, NORMALIZE)
    dq = tl.full((ROWS, D), 0.0, tl.float32)
    for first in range(0, features, TILE):
        feature = first + tl.arange(0, TILE)
        w = _load_matrix(weights, head, feature, features, D)
        mass = _masses(peaks, offsets, group, feature, features)
        value = _load_matrix(values, group, feature, features, D)
        scores = _row_scores(x, w, PRECISION) * (factor * LOG2E)[:, None] + mass[None, :]
        weight = tl.exp2(scores - normalizer[:, None])
        dscores = tl.dot(dout.to(GRAD), tl.trans(value.to(GRAD)), input_precision=PRECISION)
        dscores = weight * (dscores - delta[:, None])
        dq = tl.dot(dscores.to(GRAD), w.to(GRAD), dq, input_precision=PRECISION)
    tl.store(grad_scale + block * HEADS + head, tl.sum(tl.sum(dq * exact, 1) * factor, 0))
    if SHIFTED:
        dq += tl.load(grad_shift + group * D + tl.arange(0, D))[None, :]
    store_rows(grad_q, _factor_backward(dq, exact, factor, scale, NORMALIZE), token, valid, head, HEADS * D, D, D)


# --------------------------------------------------------------------------------------------------- their launches


class _Sizes(NamedTuple):
    """Tile sizes by dtype and head size: what fits the registers and shared memory of an A100 or H100."""

    rows: int
    """Rows of a block, of kernels that go through the features."""
    features: int
    """Features of a tile there."""
    segment_rows: int
    """Rows of a tile, of kernels that go through a segment."""
    segment_features: int
    """Features of a program there."""
    warps: int


def _sizes(x_THD: Tensor) -> _Sizes:
    if x_THD.dtype == torch.float32:
        return _Sizes(32, 32, 32, 32, 4)
    if x_THD.dtype == torch.float16:  # its gradients are multiplied in tf32: tiles of twice the bytes
        return _Sizes(64, 32, 32, 64, 4)
    return _Sizes(128, 64, 64, 128, 8) if x_THD.shape[2] <= 64 else _Sizes(64, 64, 32, 128, 8)


class _Points(NamedTuple):
    """The inducing points of a wave's documents, fp32 but for the values, which have the dtype of v."""

    sums_SHD: Tensor
    """What each segment adds to the shift, before the scale."""
    peak_NHM: Tensor
    """lse in base 2."""
    offset_NHM: Tensor
    """z - lse in base 2."""
    values_NHMD: Tensor


class _Kernel(Inputs):
    """The launches of one forward or backward pass."""

    def __init__(
        self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, scale_H: Tensor, weights_HMD: Tensor, bias_HM: Tensor,
        sequences: Sequences, normalize: bool, shift: Shift,
    ) -> None:  # fmt: skip
        super().__init__(q_THD, k_THD, v_THD)
        self.scale_H, self.bias_HM = scale_H.float().contiguous(), bias_HM.float().contiguous()
        self.weights_HMD = weights_HMD.float().contiguous()
        self.features, self.sizes, self.normalize = weights_HMD.shape[1], _sizes(q_THD), normalize
        self.shift_keys, self.shift_queries = shift in ("keys", "both"), shift in ("queries", "both")
        self.shifted = shift != "none"
        together = max(1, max(self.tokens, ROWS_AT_LEAST) // self.features)
        self.waves = _waves(sequences, self.sizes.rows, together)
        self.exact = {"NORMALIZE": normalize, "PRECISION": self.precision, **self.launch(self.sizes.warps)}
        self.by_segment = {"ROWS": self.sizes.segment_rows, "TILE": self.sizes.segment_features}
        self.by_block = {"ROWS": self.sizes.rows, "TILE": self.sizes.features}

    def feature_tiles(self) -> int:
        return -(-self.features // self.sizes.segment_features)

    def points(self, wave: _Wave) -> _Points:
        """Features attend to keys."""
        segments, documents, heads = len(wave.segments_S3), len(wave.documents_N6), self.heads
        sums_SHD = self.empty(segments if self.shifted else 0, heads, self.head_dim)
        if self.shifted:
            _sum_rows[segments, heads](
                self.q, *strides(self.q), self.k, *strides(self.k), wave.segments_S3, sums_SHD,
                ROWS=64, NORMALIZE=self.normalize, KEYS=self.shift_keys, QUERIES=self.shift_queries, **self.shape,
            )  # fmt: skip
        peak_SHM = self.empty(segments, heads, self.features)
        values_SHMD = self.empty(*peak_SHM.shape, self.head_dim, dtype=torch.float32 if wave.merges else self.dtype)
        offset_NHM = self.empty(documents, heads, self.features)
        _points[segments, heads, self.feature_tiles()](
            self.k, *strides(self.k), self.v, *strides(self.v), self.scale_H, self.weights_HMD, self.bias_HM, sums_SHD,
            wave.segments_S3, wave.documents_N6, peak_SHM, offset_NHM, values_SHMD, self.features,
            SEGMENTS=SEGMENTS, SHIFTED=self.shifted, **self.shape, **self.exact, **self.by_segment,
        )  # fmt: skip
        peak_NHM, values_NHMD = self.merged(wave, peak_SHM, values_SHMD, self.dtype, softmax=True)
        return _Points(sums_SHD, peak_NHM, offset_NHM, values_NHMD)

    def merged(
        self, wave: _Wave, numbers_SHM: Tensor, values_SHMD: Tensor, dtype: torch.dtype, softmax: bool
    ) -> tuple[Tensor, Tensor]:
        """What segments found, by document."""
        if not wave.merges:
            return numbers_SHM, values_SHMD
        numbers_NHM = self.empty(len(wave.documents_N6), *numbers_SHM.shape[1:])
        values_NHMD = self.empty(*numbers_NHM.shape, self.head_dim, dtype=dtype)
        _merge[len(wave.documents_N6), self.heads, -(-self.features // 32)](
            values_SHMD, numbers_SHM, wave.documents_N6, values_NHMD, numbers_NHM, self.features,
            TILE=32, SEGMENTS=SEGMENTS, SOFTMAX=softmax, **self.shape,
        )  # fmt: skip
        return numbers_NHM, values_NHMD

    def queries(self, wave: _Wave, points: _Points, out_THD: Tensor, lse_TH: Tensor) -> None:
        """Queries attend to features."""
        _queries[len(wave.blocks_B3), self.heads](
            self.q, *strides(self.q), self.scale_H, self.weights_HMD, *points[1:], wave.blocks_B3, out_THD, lse_TH,
            self.features, **self.shape, **self.exact, **self.by_block,
        )  # fmt: skip

    def backward(
        self, wave: _Wave, points: _Points, grad_THD: Tensor, out_THD: Tensor, lse_TH: Tensor, grads: list[Tensor]
    ) -> Tensor:
        """Writes the wave's rows of dq, dk and dv; (H) the sum of q.dq + k.dk."""
        segments, blocks, documents, heads = *map(len, wave), self.heads
        constants = {**self.gradient, **self.shape, **self.exact}
        around = grad_THD, *strides(grad_THD), out_THD, lse_TH, self.scale_H, self.weights_HMD
        along_SHM = self.empty(segments, heads, self.features)
        grad_points_SHMD = self.empty(
            *along_SHM.shape, self.head_dim, dtype=torch.float32 if wave.merges else self.gradient_dtype
        )
        _points_backward[segments, heads, self.feature_tiles()](
            self.q, *strides(self.q), *around, *points[1:3], wave.segments_S3, grad_points_SHMD, along_SHM,
            self.features, **constants, **self.by_segment,
        )  # fmt: skip
        along_NHM, grad_points_NHMD = self.merged(wave, along_SHM, grad_points_SHMD, self.gradient_dtype, softmax=False)

        # rows of blocks of keys, of blocks of queries, of documents: summed at the end, always in this order
        grad_scale_XH = self.empty(2 * blocks + (documents if self.shifted else 0), heads)
        grad_sums_BHD = self.empty(blocks if self.shifted else 0, heads, self.head_dim)
        _keys_backward[blocks, heads](
            self.k, *strides(self.k), self.v, *strides(self.v), self.scale_H, self.weights_HMD, points.sums_SHD,
            points.peak_NHM, grad_points_NHMD, along_NHM, wave.blocks_B3, wave.documents_N6,
            grads[1], grads[2], grad_sums_BHD, grad_scale_XH, self.features,
            SEGMENTS=SEGMENTS, SHIFTED=self.shifted, **constants, **self.by_block,
        )  # fmt: skip
        grad_shift_NHD = self.empty(documents if self.shifted else 0, heads, self.head_dim)
        if self.shifted:
            _shift_backward[documents, heads](
                points.sums_SHD, grad_sums_BHD, self.scale_H, wave.documents_N6, grad_shift_NHD,
                grad_scale_XH[2 * blocks :], ROWS=64, SEGMENTS=SEGMENTS, **self.shape,
            )  # fmt: skip
        if self.shift_keys:
            _shift_to_keys[blocks, heads](
                self.k, *strides(self.k), self.scale_H, wave.blocks_B3, grad_shift_NHD, grads[1],
                ROWS=self.sizes.rows, NORMALIZE=self.normalize, **self.shape,
            )  # fmt: skip
        _queries_backward[blocks, heads](
            self.q, *strides(self.q), *around, *points[1:], wave.blocks_B3, grad_shift_NHD, grads[0],
            grad_scale_XH[blocks:], self.features, SHIFTED=self.shift_queries, **constants, **self.by_block,
        )  # fmt: skip
        return grad_scale_XH.sum(0)


class _FavorTriton(torch.autograd.Function):
    """Saves q, k, v, the output, one number per token and head, and the points where one wave holds them all."""

    @staticmethod
    def forward(
        ctx: Any, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, scale_H: Tensor, weights_HMD: Tensor, bias_HM: Tensor,
        sequences: Sequences, normalize: bool, shift: Shift,
    ) -> Tensor:  # fmt: skip
        with triton_tools.device_of(q_THD):
            kernel = _Kernel(q_THD, k_THD, v_THD, scale_H, weights_HMD, bias_HM, sequences, normalize, shift)
            out_THD = kernel.empty(*v_THD.shape, dtype=v_THD.dtype)
            lse_TH = kernel.empty(*q_THD.shape[:2])
            kept: tuple[Tensor, ...] = ()
            for wave in kernel.waves:
                points = kernel.points(wave)
                kernel.queries(wave, points, out_THD, lse_TH)
                if len(kernel.waves) == 1:
                    kept = points
        ctx.save_for_backward(q_THD, k_THD, v_THD, scale_H, weights_HMD, bias_HM, out_THD, lse_TH, *kept)
        ctx.how = sequences, normalize, shift
        return out_THD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_THD: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, out_THD, lse_TH = ctx.saved_tensors[:8]
        kept = ctx.saved_tensors[8:]
        with triton_tools.device_of(grad_THD):
            kernel = _Kernel(*inputs, *ctx.how)
            grads = [kernel.empty(*x.shape, dtype=x.dtype) for x in inputs[:3]]
            grad_THD = triton_tools.with_unit_stride(grad_THD.to(kernel.dtype))
            along_H = torch.zeros_like(kernel.scale_H)
            for wave in kernel.waves:
                points = _Points(*kept) if kept else kernel.points(wave)
                along_H += kernel.backward(wave, points, grad_THD, out_THD, lse_TH, grads)
        # the kernels see q and k only as scale * x, so the scale's gradient is <x, gradient at x> / scale
        return *grads, (along_H / kernel.scale_H).to(inputs[3].dtype), None, None, None, None, None
