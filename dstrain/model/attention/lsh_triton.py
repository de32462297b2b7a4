"""LSH attention on a GPU: the chunks of `lsh.py` as Triton kernels, for packed documents of any lengths.

Hashing and sorting give, for every head and round, the tokens in the order of (document, bucket, position). A chunk is
C neighbouring places of that order, its window the chunks around it, so each round is banded attention in places: a
program owns some places of one chunk, fetches their rows by token number, and walks through its window. Nothing sorted,
padded or scored is ever in memory.

Rounds run one after the other. Forward, a round goes on where the last one stopped: its running softmax starts from the
output and the log-sum-exp so far, fetched for the program's own tokens. Backward, weights are taken against the
log-sum-exp of all rounds, so that

    P_ij = exp(s_ij - lse_i)    D_i = dout_i.out_i    dS_ij = P_ij (dout_i.v_j - D_i)

and shares just add: a program walks through the keys its queries see for dq, then through the queries that see its keys
for dk and dv (7 products where 5 would do, if it could add to rows of others). Every row is written by one program of a
round and rounds are separate launches: no atomics, the same bits every time. Between rounds sums are kept in fp32, forward
for all heads, backward for some heads at a time, so that they take no more memory than flash attention's own fp32 dq.
The other way, all rounds of a row in one program by the inverse order, would share no tile between neighbours: each
query would fetch its W C keys alone, C times the traffic.

What an H100 needs at T = 16 384, H = 8, D = 64, 2 rounds, C = 64, W = 3, shared q and k, bf16 (arithmetic, not measured:
these kernels never ran on a GPU). A product is 6.4 GFLOP for both rounds; 2 forward, 7 backward: 58 GFLOP, .07 ms at
790 TFLOP/s. 150 M exponentials, .04 ms. Rows pass from L2 to the programs 7 times a round forward and 16 times backward,
.77 GB, .14 ms at 5.5 TB/s; from memory at least .47 GB, .14 ms at 3.35 TB/s. With the 40 to 60 % of those that gathered
tiles reach: .4 to .6 ms are to be expected, against 6 ms of flash attention. Hashing is one launch (13 GFLOP of tf32,
.03 ms, and 16.8 MB), sorting 262 144 numbers a few (about .05 ms); the plain hash takes dozens of launches, which would
decide below 4k tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dstrain.model.attention import triton_tools
from dstrain.model.attention.hashing import DIRECTIONS, Order, factors
from dstrain.model.attention.triton_tools import LOG2E, UNIT_EPS, Inputs, jit, load_rows, store_rows, strides, tl
from dstrain.packed import Sequences

if TYPE_CHECKING:
    from dstrain.model.attention.lsh import LshSettings

PROGRAMS = 512
"""Programs that a launch keeps when heads are worked on in groups: about two for each multiprocessor at a time."""


def supported(q_THD: Tensor, settings: LshSettings) -> str | None:
    """Why the kernels cannot take this; None: they can."""
    chunk = settings.chunk_size
    if chunk < 16 or chunk & (chunk - 1):
        return f"the kernels take chunk sizes that are powers of two from 16, not {chunk}"
    if settings.count_keys != "every_round":
        return "the kernels count a key once for every round"
    return triton_tools.why_not(q_THD)


def lsh_attention(
    q_THD: Tensor, k_THD: Tensor | None, v_THD: Tensor, query_order: Order, key_order: Order, sequences: Sequences,
    settings: LshSettings,
) -> Tensor:  # fmt: skip
    """(T, H, D) of v's dtype: one softmax over the union of all rounds' keys, within each document.

    `k_THD` is None where queries are the keys; then both orders are one. q, k and v have one dtype.
    """
    return _LshTriton.apply(
        q_THD, k_THD, v_THD, query_order.token_HRT, query_order.bucket_HRT, key_order.token_HRT, key_order.bucket_HRT,
        sequences, settings,
    )  # fmt: skip


@lru_cache(maxsize=32)
def _tiles(sequences: Sequences, chunk: int, rows: int) -> Tensor:
    """(programs, 4): first place of its own, of its chunk, of its document, and the document's end."""
    starts = np.array(sequences.starts)
    chunks, document = triton_tools.pieces(starts[:-1], starts[1:], chunk)
    stops = np.minimum(chunks + chunk, starts[1:][document])
    tiles, in_chunk = triton_tools.pieces(chunks, stops, rows)
    of_document = document[in_chunk]
    table = np.stack([tiles, chunks[in_chunk], starts[:-1][of_document], starts[1:][of_document]], 1)
    return triton_tools.to_device([table], sequences.device)[0]


@lru_cache(maxsize=32)
def _hash_blocks(sequences: Sequences, counts: tuple[int, ...], rows: int) -> Tensor:
    """(programs, 5): tokens from, tokens to, coarse and fine buckets, buckets of all documents before."""
    starts = np.array(sequences.starts)
    first, document = triton_tools.pieces(starts[:-1], starts[1:], rows)
    each = np.array([(*factors(count), before) for count, before in zip(counts, accumulate(counts, initial=0), strict=False)])
    stops = np.minimum(first + rows, starts[1:][document])
    return triton_tools.to_device([np.column_stack([first, stops, each[document]])], sequences.device)[0]


def sort_tokens(x_THD: Tensor, rotations: Tensor, sequences: Sequences, settings: LshSettings) -> Order:
    """What `hashing.sort_tokens` gives, in one launch for all hashes and one sort; buckets have other numbers."""
    x_THD = triton_tools.with_unit_stride(x_THD.detach())
    tokens, heads, head_dim = x_THD.shape
    rounds, counts = rotations.shape[2], tuple(map(settings.buckets_of, sequences.lengths))
    assert heads * rounds * sum(counts) < 2**31, "the sort's keys are int32"
    blocks = _hash_blocks(sequences, counts, 64)
    keys_HRT = torch.empty(heads, rounds, tokens, dtype=torch.int32, device=x_THD.device)
    with triton_tools.device_of(x_THD):
        _hash[len(blocks), heads](
            x_THD, *strides(x_THD), rotations.contiguous(), blocks, keys_HRT, rounds, tokens, sum(counts),
            D=head_dim, ROWS=64, DIRECTIONS=DIRECTIONS // 2, num_warps=4,
        )  # fmt: skip
    bucket_F, place_F = torch.sort(keys_HRT.flatten(), stable=True)
    token_HRT = torch.empty_like(keys_HRT)
    before_S1 = torch.arange(0, heads * rounds * tokens, tokens, device=x_THD.device).unsqueeze(1)
    torch.sub(place_F.view(-1, tokens), before_S1, out=token_HRT.view(-1, tokens))
    return Order(token_HRT, bucket_F.view_as(keys_HRT))


# --------------------------------------------------------------------------------------------------- the kernels


@jit
def _nearest(x, directions, stride, count, D: tl.constexpr, DIRECTIONS: tl.constexpr):
    """(rows) int32: the index of the nearest among `count` directions and their opposites, as `hashing._nearest`."""
    column = tl.arange(0, DIRECTIONS)
    row = directions + tl.arange(0, D)[:, None] * stride
    near = tl.dot(x, tl.load(row + column[None, :]), input_precision="tf32x3")  # three products make up for fp32
    bits = near.to(tl.int32, bitcast=True)
    code = (bits & (0x80000000 - 2 * DIRECTIONS)) | ((bits >> 31) & count) | column[None, :]
    return tl.max(tl.where(column[None, :] < count, code, 0), 1) & (2 * count - 1)


@jit
def _hash(
    x, x_token, x_head, rotations, blocks, keys, rounds, tokens, buckets,
    D: tl.constexpr, ROWS: tl.constexpr, DIRECTIONS: tl.constexpr,
):  # fmt: skip
    """Program (rows of a document, head): what each round sorts by, (head, round, document, bucket) in one number."""
    block, head = blocks + tl.program_id(0) * 5, tl.program_id(1)
    token = tl.load(block) + tl.arange(0, ROWS)
    valid = token < tl.load(block + 1)
    coarse, fine, before = tl.load(block + 2), tl.load(block + 3), tl.load(block + 4)
    rows = load_rows(x, token, valid, head, x_token, x_head, D).to(tl.float32)
    stride = rounds * 2 * DIRECTIONS
    for number in range(0, rounds):
        directions = rotations + head * D * stride + number * 2 * DIRECTIONS
        bucket = _nearest(rows, directions, stride, coarse // 2, D, DIRECTIONS)
        if fine > 1:
            bucket = bucket * fine + _nearest(rows, directions + DIRECTIONS, stride, fine // 2, D, DIRECTIONS)
        segment = head * rounds + number
        tl.store(keys + segment * tokens + token, bucket + before + segment * buckets, mask=valid)


@jit
def _key_scales(k, k_token, k_head, scales, tokens, HEADS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr):
    """Program (rows, head): 1 / |k|."""
    token, head = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    x = load_rows(k, token, token < tokens, head, k_token, k_head, D).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, 1) + UNIT_EPS)
    tl.store(scales + token.to(tl.int64) * HEADS + head, inverse, mask=token < tokens)


@jit
def _deltas(
    grad, grad_token, grad_head, out, deltas, tokens, HEADS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr
):
    """Program (rows, head): D, dout.out of each row."""
    token, head = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    x = load_rows(grad, token, token < tokens, head, grad_token, grad_head, D).to(tl.float32)
    y = load_rows(out, token, token < tokens, head, HEADS * D, D, D).to(tl.float32)
    tl.store(deltas + token.to(tl.int64) * HEADS + head, tl.sum(x * y, 1), mask=token < tokens)


@jit
def _of_row(x, token, valid, head, HEADS: tl.constexpr, OTHER: tl.constexpr):
    """(rows) of a (T, H) tensor."""
    return tl.load(x + token.to(tl.int64) * HEADS + head, mask=valid, other=OTHER)


@jit
def _scale_of(scales, token, valid, head, HEADS: tl.constexpr, D: tl.constexpr, NORMALIZE: tl.constexpr):
    """(rows) fp32: what makes q.k the score."""
    if NORMALIZE:
        return _of_row(scales, token, valid, head, HEADS, 0.0)
    return tl.full(token.shape, D**-0.5, tl.float32)


@jit
def _own_places(tiles, ROWS: tl.constexpr):
    """(rows) places of this program and which of them exist; first place of their chunk, of their document, its end."""
    tile = tiles + tl.program_id(0) * 4
    place, stop = tl.load(tile) + tl.arange(0, ROWS), tl.load(tile + 3)
    return place, place < stop, tl.load(tile + 1), tl.load(tile + 2), stop


@jit
def _window(chunk, start, stop, BACK: tl.constexpr, FORWARD: tl.constexpr, CHUNK: tl.constexpr):
    """The first place of a chunk's window and its end."""
    return tl.maximum(start, chunk - BACK * CHUNK), tl.minimum(stop, chunk + (1 + FORWARD) * CHUNK)


@jit
def _at(tokens, buckets, place, exists, OTHER: tl.constexpr):
    """(places) the token and the bucket at each place of an order; bucket OTHER where there is none."""
    return tl.load(tokens + place, mask=exists, other=0), tl.load(buckets + place, mask=exists, other=OTHER)


@jit
def _seen(
    query_place, key_place, valid, query_bucket, key_bucket, SHARED: tl.constexpr, WITHIN: tl.constexpr
):
    """Which keys of the window a query sees, whichever of the two is the row."""
    seen = valid
    if SHARED:  # a token is its own best match: it sees itself only when nothing else
        seen = seen & (query_place != key_place)
    if WITHIN:
        seen = seen & (query_bucket == key_bucket)
    return seen


@jit
def _attend(
    q, q_token, q_head, k, k_token, k_head, v, v_token, v_head, scales,
    query_tokens, query_buckets, key_tokens, key_buckets, tiles, so_far, out, lse, round_, rounds, tokens,
    HEADS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr, BACK: tl.constexpr, FORWARD: tl.constexpr,
    NORMALIZE: tl.constexpr, SHARED: tl.constexpr, WITHIN: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (places, head): one round of its queries."""
    head, order = tl.program_id(1), (tl.program_id(1) * rounds + round_) * tokens
    place, valid, chunk, start, stop = _own_places(tiles, ROWS)
    token, bucket = _at(query_tokens, query_buckets, order + place, valid, -1)
    x = load_rows(q, token, valid, head, q_token, q_head, D)
    if FIRST:
        peak = tl.full((ROWS,), float("-inf"), tl.float32)
        attended = tl.full((ROWS, D), 0.0, tl.float32)
    else:
        peak = _of_row(lse, token, valid, head, HEADS, float("-inf"))
        attended = load_rows(so_far, token, valid, head, HEADS * D, D, D)
    total = tl.where(peak == float("-inf"), 0.0, 1.0)

    foremost, last = _window(chunk, start, stop, BACK, FORWARD, CHUNK)
    for first in range(foremost, last, COLUMNS):
        key_place = first + tl.arange(0, COLUMNS)
        exists = key_place < last
        key_token, key_bucket = _at(key_tokens, key_buckets, order + key_place, exists, -2)
        key = load_rows(k, key_token, exists, head, k_token, k_head, D)
        value = load_rows(v, key_token, exists, head, v_token, v_head, D)
        scale = _scale_of(scales, key_token, exists, head, HEADS, D, NORMALIZE) * LOG2E
        scores = tl.dot(x, tl.trans(key), input_precision=PRECISION) * scale[None, :]
        seen = _seen(
            place[:, None], key_place[None, :], exists[None, :], bucket[:, None], key_bucket[None, :], SHARED, WITHIN
        )
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp2(peak - finite)
        weight = tl.exp2(scores - finite[:, None])
        total = total * shrink + tl.sum(weight, 1)
        attended = tl.dot(weight.to(value.dtype), value, attended * shrink[:, None], input_precision=PRECISION)
        peak = higher

    alone = total == 0.0
    attended = attended / tl.where(alone, 1.0, total)[:, None]
    normalizer = peak + tl.log2(tl.where(alone, 1.0, total))
    if LAST:  # no round showed it anything: it sees itself, and an infinite sum makes its weights zero in backward
        own = load_rows(v, token, valid & alone, head, v_token, v_head, D)
        attended = tl.where(alone[:, None], own.to(tl.float32), attended)
        normalizer = tl.where(alone, float("inf"), normalizer)
        store_rows(out, attended, token, valid, head, HEADS * D, D, D)
    else:
        store_rows(so_far, attended, token, valid, head, HEADS * D, D, D)
    tl.store(lse + token.to(tl.int64) * HEADS + head, normalizer, mask=valid)


@jit
def _add(
    values, so_far, grad, token, valid, head, local,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Adds a round's share to the sums of the rounds before; the last round's sum is the gradient."""
    if not FIRST:
        values += load_rows(so_far, token, valid, local, GROUP * D, D, D)
    if LAST:
        store_rows(grad, values, token, valid, head, HEADS * D, D, D)
    else:
        store_rows(so_far, values, token, valid, local, GROUP * D, D, D)


@jit
def _backward(
    q, q_token, q_head, k, k_token, k_head, v, v_token, v_head, grad, grad_token, grad_head, scales, deltas, lse,
    query_tokens, query_buckets, key_tokens, key_buckets, tiles,
    q_so_far, k_so_far, v_so_far, grad_q, grad_k, grad_v, first_head, round_, rounds, tokens,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr, BACK: tl.constexpr, FORWARD: tl.constexpr,
    NORMALIZE: tl.constexpr, SHARED: tl.constexpr, WITHIN: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, PRECISION: tl.constexpr, GRAD: tl.constexpr,
):  # fmt: skip
    """Program (places, head of a group): one round's share of its queries' dq and of its keys' dk and dv."""
    local = tl.program_id(1)
    head = first_head + local
    order = (head * rounds + round_) * tokens
    place, valid, chunk, start, stop = _own_places(tiles, ROWS)

    token, bucket = _at(query_tokens, query_buckets, order + place, valid, -1)
    x = load_rows(q, token, valid, head, q_token, q_head, D)
    dout = load_rows(grad, token, valid, head, grad_token, grad_head, D).to(GRAD)
    normalizer = _of_row(lse, token, valid, head, HEADS, float("inf"))
    delta = _of_row(deltas, token, valid, head, HEADS, 0.0)
    dq = tl.full((ROWS, D), 0.0, tl.float32)
    foremost, last = _window(chunk, start, stop, BACK, FORWARD, CHUNK)
    for first in range(foremost, last, COLUMNS):
        key_place = first + tl.arange(0, COLUMNS)
        exists = key_place < last
        key_token, key_bucket = _at(key_tokens, key_buckets, order + key_place, exists, -2)
        key = load_rows(k, key_token, exists, head, k_token, k_head, D)
        value = load_rows(v, key_token, exists, head, v_token, v_head, D)
        scale = _scale_of(scales, key_token, exists, head, HEADS, D, NORMALIZE)
        scores = tl.dot(x, tl.trans(key), input_precision=PRECISION) * (scale * LOG2E)[None, :]
        seen = _seen(
            place[:, None], key_place[None, :], exists[None, :], bucket[:, None], key_bucket[None, :],
            SHARED, WITHIN,
        )  # fmt: skip
        weight = tl.exp2(tl.where(seen, scores, float("-inf")) - normalizer[:, None])
        dscores = tl.dot(dout, tl.trans(value.to(GRAD)), input_precision=PRECISION)
        dscores = weight * (dscores - delta[:, None]) * scale[None, :]
        dq = tl.dot(dscores.to(GRAD), key.to(GRAD), dq, input_precision=PRECISION)
    if not SHARED:
        _add(dq, q_so_far, grad_q, token, valid, head, local, HEADS, GROUP, D, FIRST, LAST)

    token, bucket = _at(key_tokens, key_buckets, order + place, valid, -2)
    key = load_rows(k, token, valid, head, k_token, k_head, D)
    value = load_rows(v, token, valid, head, v_token, v_head, D).to(GRAD)
    scale = _scale_of(scales, token, valid, head, HEADS, D, NORMALIZE)
    dk = tl.full((ROWS, D), 0.0, tl.float32)
    dv = tl.full((ROWS, D), 0.0, tl.float32)
    foremost, last = _window(chunk, start, stop, FORWARD, BACK, CHUNK)
    for first in range(foremost, last, COLUMNS):
        query_place = first + tl.arange(0, COLUMNS)
        asks = query_place < last
        query_token, query_bucket = _at(query_tokens, query_buckets, order + query_place, asks, -1)
        query = load_rows(q, query_token, asks, head, q_token, q_head, D)
        query_grad = load_rows(grad, query_token, asks, head, grad_token, grad_head, D).to(GRAD)
        query_sum = _of_row(lse, query_token, asks, head, HEADS, float("inf"))
        query_delta = _of_row(deltas, query_token, asks, head, HEADS, 0.0)
        scores = tl.dot(key, tl.trans(query), input_precision=PRECISION) * (scale * LOG2E)[:, None]
        seen = _seen(
            query_place[None, :], place[:, None], valid[:, None], query_bucket[None, :], bucket[:, None],
            SHARED, WITHIN,
        )  # fmt: skip
        weight = tl.exp2(tl.where(seen, scores, float("-inf")) - query_sum[None, :])
        dv = tl.dot(weight.to(GRAD), query_grad, dv, input_precision=PRECISION)
        dscores = weight * (tl.dot(value, tl.trans(query_grad), input_precision=PRECISION) - query_delta[None, :])
        dk = tl.dot(dscores.to(GRAD), query.to(GRAD), dk, input_precision=PRECISION)
    if NORMALIZE:  # what lies along the key is lost
        unit = key.to(tl.float32) * scale[:, None]
        dk -= unit * tl.sum(unit * dk, 1)[:, None]
    dk *= scale[:, None]
    if SHARED:
        _add(dq + dk, q_so_far, grad_q, token, valid, head, local, HEADS, GROUP, D, FIRST, LAST)
    else:
        _add(dk, k_so_far, grad_k, token, valid, head, local, HEADS, GROUP, D, FIRST, LAST)
    if FIRST:
        alone = _of_row(lse, token, valid, head, HEADS, 0.0) == float("inf")
        dv += load_rows(grad, token, alone, head, grad_token, grad_head, D).to(tl.float32)
    _add(dv, v_so_far, grad_v, token, valid, head, local, HEADS, GROUP, D, FIRST, LAST)


# --------------------------------------------------------------------------------------------------- their launches


class _Sizes(NamedTuple):
    rows: int
    columns: int
    warps: int


def _sizes(x_THD: Tensor, chunk: int) -> _Sizes:
    """Tile sizes by dtype and head size: what fits the registers and shared memory of an A100 or H100."""
    if x_THD.dtype == torch.float32:
        return _Sizes(min(chunk, 32), 32, 4)
    return _Sizes(min(chunk, 64), 64 if x_THD.dtype == torch.bfloat16 else 32, 4 if x_THD.shape[2] <= 64 else 8)


class _Kernel(Inputs):
    """The launches of one forward or backward pass."""

    def __init__(
        self, q_THD: Tensor, k_THD: Tensor | None, v_THD: Tensor, orders: list[Tensor], sequences: Sequences,
        settings: LshSettings,
    ) -> None:  # fmt: skip
        super().__init__(q_THD, q_THD if k_THD is None else k_THD, v_THD)
        self.shared, self.orders, self.rounds = k_THD is None, orders, settings.num_hashes
        sizes = _sizes(q_THD, settings.chunk_size)
        self.tiles = _tiles(sequences, settings.chunk_size, sizes.rows)
        self.normalize = settings.normalize_keys
        self.by_row = {"ROWS": 64, **self.shape}
        self.constants = {
            "ROWS": sizes.rows, "COLUMNS": sizes.columns,
            "CHUNK": settings.chunk_size, "BACK": settings.look_back, "FORWARD": settings.look_forward,
            "NORMALIZE": self.normalize, "SHARED": self.shared, "WITHIN": settings.mask_within_chunks,
            "PRECISION": self.precision, **self.shape, **self.launch(sizes.warps),
        }  # fmt: skip

    def key_scales(self) -> Tensor:
        """(T, H) 1 / |k|, or nothing where keys are not normalised."""
        if not self.normalize:
            return self.empty(0)
        scales_TH = self.empty(self.tokens, self.heads)
        _key_scales[-(-self.tokens // 64), self.heads](
            self.k, *strides(self.k), scales_TH, self.tokens, **self.by_row
        )
        return scales_TH

    def forward(self, scales_TH: Tensor) -> tuple[Tensor, Tensor]:
        """(T, H, D) output and (T, H) log2 of the sum of exponentials."""
        out_THD, lse_TH = self.empty(*self.v.shape, dtype=self.dtype), self.empty(self.tokens, self.heads)
        so_far_THD = self.empty(*self.v.shape) if self.rounds > 1 else out_THD
        for round_ in range(self.rounds):
            _attend[len(self.tiles), self.heads](
                self.q, *strides(self.q), self.k, *strides(self.k), self.v, *strides(self.v), scales_TH, *self.orders,
                self.tiles, so_far_THD, out_THD, lse_TH, round_, self.rounds, self.tokens,
                FIRST=round_ == 0, LAST=round_ == self.rounds - 1, **self.constants,
            )  # fmt: skip
        return out_THD, lse_TH

    def head_groups(self) -> Iterator[tuple[int, int]]:
        """(first head, heads) such that fp32 sums of a group are no larger than one fp32 tensor of all heads."""
        wanted = 1 if self.rounds == 1 else min(2 if self.shared else 3, len(self.tiles) * self.heads // PROGRAMS)
        size = -(-self.heads // max(1, wanted))
        for first in range(0, self.heads, size):
            yield first, min(size, self.heads - first)

    def backward(self, grad_THD: Tensor, out_THD: Tensor, lse_TH: Tensor, scales_TH: Tensor) -> list[Tensor]:
        """The gradients at q, at k (nothing when shared) and at v."""
        deltas_TH = torch.empty_like(lse_TH)
        _deltas[-(-self.tokens // 64), self.heads](
            grad_THD, *strides(grad_THD), out_THD, deltas_TH, self.tokens, **self.by_row
        )
        shape, none = self.q.shape, (0,)
        grads = [self.empty(*each, dtype=self.dtype) for each in (shape, none if self.shared else shape, shape)]
        for first, group in self.head_groups():
            self.backward_of(first, group, grad_THD, lse_TH, scales_TH, deltas_TH, grads)
        return grads

    def backward_of(
        self, first_head: int, group: int, grad_THD: Tensor, lse_TH: Tensor, scales_TH: Tensor, deltas_TH: Tensor,
        grads: list[Tensor],
    ) -> None:  # fmt: skip
        """All rounds of some heads."""
        shape = (self.tokens, group, self.head_dim) if self.rounds > 1 else (0,)
        sums = [self.empty(*(shape if len(grad) else (0,))) for grad in grads]
        for round_ in range(self.rounds):
            _backward[len(self.tiles), group](
                self.q, *strides(self.q), self.k, *strides(self.k), self.v, *strides(self.v),
                grad_THD, *strides(grad_THD), scales_TH, deltas_TH, lse_TH, *self.orders, self.tiles, *sums, *grads,
                first_head, round_, self.rounds, self.tokens, GROUP=group,
                FIRST=round_ == 0, LAST=round_ == self.rounds - 1, **self.gradient, **self.constants,
            )  # fmt: skip


class _LshTriton(torch.autograd.Function):
    """Saves q, k, v, the output, two numbers per token and head, and each round's integer order."""

    @staticmethod
    def forward(
        ctx: Any, q_THD: Tensor, k_THD: Tensor | None, v_THD: Tensor, query_tokens: Tensor, query_buckets: Tensor,
        key_tokens: Tensor, key_buckets: Tensor, sequences: Sequences, settings: LshSettings,
    ) -> Tensor:  # fmt: skip
        orders = [query_tokens, query_buckets, key_tokens, key_buckets]
        with triton_tools.device_of(q_THD):
            kernel = _Kernel(q_THD, k_THD, v_THD, orders, sequences, settings)
            scales_TH = kernel.key_scales()
            out_THD, lse_TH = kernel.forward(scales_TH)
        ctx.save_for_backward(q_THD, k_THD, v_THD, *orders, out_THD, lse_TH, scales_TH)
        ctx.sequences, ctx.settings = sequences, settings
        return out_THD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_THD: Tensor) -> tuple[Tensor | None, ...]:
        q_THD, k_THD, v_THD, *orders, out_THD, lse_TH, scales_TH = ctx.saved_tensors
        with triton_tools.device_of(grad_THD):
            kernel = _Kernel(q_THD, k_THD, v_THD, orders, ctx.sequences, ctx.settings)
            grad_THD = triton_tools.with_unit_stride(grad_THD.to(kernel.dtype))
            grad_q, grad_k, grad_v = kernel.backward(grad_THD, out_THD, lse_TH, scales_TH)
        return grad_q, None if k_THD is None else grad_k, grad_v, None, None, None, None, None, None
