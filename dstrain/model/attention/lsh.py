"""LSH attention: each query attends to keys that a random rotation puts near it (Kitaev, Kaiser and Levskaya 2020,
Reformer, https://arxiv.org/abs/2001.04451), in time and memory linear in the length.

One round: hash every token to the nearest of the directions +-r_1 ... +-r_b/2, sort by (document, bucket, position),
cut each document's sorted tokens into chunks of C, and let a chunk's queries see the keys of its own chunk and of the
`look_back` chunks before and `look_forward` chunks after it. Several rounds with independent rotations catch what one
misses. They merge into one softmax over the union of their keys, so with n_ij the number of rounds that show j to i

    out_i = sum_j n_ij exp(s_ij) v_j / sum_j n_ij exp(s_ij)        (`count_keys: once` puts 1 for every n_ij > 0)

Queries and keys share a projection by default, so a token is its own best match: it sees itself only when nothing else.
Kept for the backward pass are the inputs, the output, one number per token and head, and each round's integer order.

Shapes: T tokens, H heads, D head size, R rounds (num_hashes), C chunk size, W = look_back + 1 + look_forward chunks,
S slots: the T tokens of one round in sorted order, each document filled up to whole chunks; G rows of some heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dstrain.model.attention.blocked import LOG2E, product_dtype, unit, unit_backward, work_dtype
from dstrain.model.attention.draws import generator
from dstrain.packed import Sequences
from dstrain.schema import Settings, setting

DIRECTIONS = 128
"""Buckets that one rotation can tell apart; more buckets are pairs of two independent rotations' buckets."""

HIDDEN = -1e20
"""What a hidden key's score becomes at least: below any real score, and its square still fits fp32."""


class LshSettings(Settings):
    """LSH attention; time grows linearly with num_hashes, chunk_size and length."""

    kind: Literal["lsh"] = "lsh"
    num_hashes: int = setting(2, unit="rounds", ge=1, le=64)
    """Rounds of hashing; more rounds see more of the attention's mass, at proportional cost."""
    chunk_size: int = setting(64, unit="tokens", ge=1)
    """Tokens per chunk; a query sees at most (look_back + 1 + look_forward) * chunk_size keys per round."""
    mask_within_chunks: bool = False
    """Inside its window a query sees only keys of its own bucket; false: every key of the window."""
    shared_qk: bool = True
    """One projection for queries and keys, as Reformer has it; false: each its own, sorted separately."""
    look_back: int = setting(1, unit="chunks", ge=0)
    """Chunks before its own that a chunk sees; the first chunk of a document has none (no wrap-around)."""
    look_forward: int = setting(1, unit="chunks", ge=0)
    """Chunks after its own that a chunk sees."""
    normalize_keys: bool = True
    """Score q.k/|k| as Reformer does, so that a token with a long key does not win everywhere; false: q.k / sqrt(D)."""
    num_buckets: int | None = setting(None, unit="buckets", ge=1, le=DIRECTIONS * DIRECTIONS)
    """Buckets per document, a power of two; null: so many that a bucket holds half a chunk to a chunk on average."""
    count_keys: Literal["every_round", "once"] = "every_round"
    """Weigh a key by the rounds in which the query saw it (Reformer's log-sum-exp), or count each key once."""
    redraw_interval: int | None = setting(1, unit="optimizer steps", ge=1)
    """Draw new rotations every so many steps of training; null keeps the first. Evaluation always has its own."""

    @property
    def tied_qk(self) -> bool:
        """Whether the block passes its queries as keys."""
        return self.shared_qk

    def model_post_init(self, _: Any) -> None:
        if self.num_buckets is not None and self.num_buckets & (self.num_buckets - 1):
            raise ValueError(f"num_buckets is {self.num_buckets}; give a power of two, or null: the length decides")

    def build(self, num_heads: int, head_dim: int, layer: int, seed: int) -> Lsh:
        """The kernel with the rotations of (seed, layer)."""
        return Lsh(self, num_heads, head_dim, layer, seed)

    def buckets_of(self, length: int) -> int:
        """Buckets of a document, from its own length alone."""
        return self.num_buckets or 1 << (math.ceil(length / self.chunk_size) - 1).bit_length()


class Lsh(nn.Module):
    """LSH attention within each document. It holds no weights: its rotations follow from (seed, layer, step)."""

    def __init__(self, settings: LshSettings, num_heads: int, head_dim: int, layer: int, seed: int) -> None:
        super().__init__()
        self.settings, self.num_heads, self.head_dim, self.layer, self.seed = settings, num_heads, head_dim, layer, seed
        self._redraw = 0
        self._rotations: dict[tuple[str, int, torch.device], Tensor] = {}

    def forward(self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, sequences: Sequences) -> Tensor:
        """(T, H, D) of v's dtype. With shared_qk the keys are not looked at: they are the queries."""
        with torch.no_grad(), torch.autocast(q_THD.device.type, enabled=False):
            rotations = self.rotations(q_THD.device)
            shared = self.settings.shared_qk
            queries = sort_tokens(q_THD, rotations, sequences, self.settings)
            keys = queries if shared else sort_tokens(k_THD, rotations, sequences, self.settings)
        return _LshAttention.apply(q_THD, None if shared else k_THD, v_THD, *queries, *keys, sequences, self.settings)

    def set_step(self, step: int) -> None:
        """The rotations of this step, for training; called between optimizer steps, so a recomputation hashes alike."""
        interval = self.settings.redraw_interval
        self._redraw = 0 if interval is None else step // interval

    def rotations(self, device: torch.device) -> Tensor:
        """(H, D, R, 2, DIRECTIONS / 2) fp32: of this step in training, of no step at all in evaluation."""
        key = ("train", self._redraw, device) if self.training else ("eval", 0, device)
        if key not in self._rotations:
            self._rotations = {old: kept for old, kept in self._rotations.items() if old[0] != key[0]}
            rng = generator("lsh", self.seed, self.layer, *key[:2])
            shape = (self.num_heads, self.head_dim, self.settings.num_hashes, 2, DIRECTIONS // 2)
            self._rotations[key] = torch.randn(shape, generator=rng, dtype=torch.float32).to(device)
        return self._rotations[key]

    @property
    def kernel(self) -> str:
        """What runs here."""
        s = self.settings
        return f"blocked LSH, {s.num_hashes} rounds of {s.chunk_size}-token chunks (PyTorch, recomputed in backward)"

    def flops(self, lengths: Sequence[int]) -> int:
        """Multiplications and additions of one forward pass over documents of these lengths: hashing, two products."""
        s = self.settings
        window = (s.look_back + 1 + s.look_forward) * s.chunk_size
        slots = sum(_slots_of(length, s.chunk_size) for length in lengths)
        directions = sum(length * sum(_factors(s.buckets_of(length))) // 2 for length in lengths)
        return self.num_heads * s.num_hashes * self.head_dim * (4 * slots * window + 2 * directions)


# ---------------------------------------------------------------------------------------- hashing and sorting


class Order(NamedTuple):
    """The tokens of every head and round in the order of (document, bucket, position)."""

    token_HRT: Tensor
    """int32: which token stands at each place. Only tokens of one document trade places."""
    bucket_HRT: Tensor
    """int32: the bucket of the token at each place, numbered through all documents."""


def sort_tokens(x_THD: Tensor, rotations: Tensor, sequences: Sequences, settings: LshSettings) -> Order:
    """One stable sort for all heads and rounds; documents own disjoint bucket numbers and so never mix."""
    counts = [settings.buckets_of(length) for length in sequences.lengths]
    total = sum(counts)
    bucket_HRT = hash_tokens(x_THD, rotations, sequences, counts)
    heads, rounds, tokens = bucket_HRT.shape
    assert heads * rounds * total < 2**31, "the sort's keys are int32"
    segment_HR1 = torch.arange(heads * rounds, dtype=torch.int32, device=x_THD.device).view(heads, rounds, 1)
    keys, places = torch.sort((bucket_HRT + segment_HR1 * total).flatten(), stable=True)
    return Order(
        places.int().view(heads, rounds, tokens) - segment_HR1 * tokens,
        keys.view(heads, rounds, tokens) - segment_HR1 * total,
    )


def hash_tokens(x_THD: Tensor, rotations: Tensor, sequences: Sequences, counts: Sequence[int]) -> Tensor:
    """(H, R, T) int32: the nearest direction of each token, plus the number of buckets of all documents before its own.

    A document of b buckets uses the first directions of its rotation, so its hash does not depend on its batch-mates.
    """
    tokens, heads, _ = x_THD.shape
    bucket_HRT = torch.empty(heads, rotations.shape[2], tokens, dtype=torch.int32, device=x_THD.device)
    x_HTD = x_THD.detach().transpose(0, 1)
    for count, first, last in _runs_of_equal_count(sequences, counts):
        coarse, fine = _factors(count)
        for start in range(first, last, 4096):
            rows = slice(start, min(start + 4096, last))
            block_HLD = x_HTD[:, rows].float()
            bucket = _nearest(block_HLD, rotations[:, :, :, 0, : coarse // 2])
            if fine > 1:
                bucket = bucket * fine + _nearest(block_HLD, rotations[:, :, :, 1, : fine // 2])
            bucket_HRT[:, :, rows] = bucket.permute(0, 2, 1)
    before_N = torch.tensor([0, *accumulate(counts)][:-1], dtype=torch.int32, device=x_THD.device)
    return bucket_HRT + before_N[sequences.document_T]


def _nearest(x_HLD: Tensor, directions_HDRK: Tensor) -> Tensor:
    """(H, L, R): the index of the nearest among the K directions and their K opposites; 0 when there are none."""
    if not directions_HDRK.shape[-1]:
        return torch.zeros(*x_HLD.shape[:2], directions_HDRK.shape[2], dtype=torch.int64, device=x_HLD.device)
    near = torch.matmul(x_HLD, directions_HDRK.flatten(2)).unflatten(2, directions_HDRK.shape[2:])
    most, along = near.max(-1)
    least, against = near.min(-1)
    return torch.where(most >= -least, along, against + near.shape[-1])


def _factors(buckets: int) -> tuple[int, int]:
    """buckets = coarse * fine, both powers of two and at most DIRECTIONS; fine is 1 while one rotation is enough."""
    if buckets <= DIRECTIONS:
        return buckets, 1
    bits = buckets.bit_length() - 1
    return 1 << math.ceil(bits / 2), 1 << bits // 2


def _runs_of_equal_count(sequences: Sequences, counts: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(buckets, first token, end) of each longest run of adjacent documents with the same number of buckets."""
    start = 0
    for count, run in groupby(zip(counts, sequences.lengths, strict=True), key=lambda pair: pair[0]):
        end = start + sum(length for _, length in run)
        yield count, start, end
        start = end


def _slots_of(length: int, chunk_size: int) -> int:
    return math.ceil(length / chunk_size) * chunk_size


# ------------------------------------------------------------------------------------------------- the kernel


class _Rows(NamedTuple):
    """Queries or keys of one round laid out in slots, all heads at work one after the other."""

    row_S: Tensor
    """int64: the row of (heads * T, D) that stands in each slot; fillers repeat row 0 and are hidden."""
    code_S: Tensor
    """A query sees keys of its own code: (head, bucket) or (head, document); fillers see and are seen by nothing."""
    slot_G: Tensor
    """int64: the slot of each row."""


class _Kernel:
    """Layout and blocks of one forward or backward pass over some heads at a time."""

    def __init__(self, q_THD: Tensor, sequences: Sequences, settings: LshSettings) -> None:
        self.settings, self.sequences, self.device = settings, sequences, q_THD.device
        self.work, self.low = work_dtype(q_THD), product_dtype(q_THD)
        self.tokens, self.num_heads, self.head_dim = q_THD.shape
        self.chunk, self.back, self.forward = settings.chunk_size, settings.look_back, settings.look_forward
        self.window = self.back + 1 + self.forward
        self.scale = LOG2E if settings.normalize_keys else LOG2E * self.head_dim**-0.5
        slots = [_slots_of(length, self.chunk) for length in sequences.lengths]
        self.slots = sum(slots)
        first_slot_N = torch.tensor([0, *accumulate(slots)][:-1], device=self.device)
        self.slot_T = first_slot_N[sequences.document_T] + sequences.position_T
        on_cpu = self.device.type == "cpu"
        self.heads_together = 1 if on_cpu else self.num_heads  # a CPU wants its caches, a GPU few launches
        scores = 400_000 if on_cpu else 1 << 26
        self.chunks_together = max(1, scores // (self.chunk * self.chunk * self.window))

    def heads(self) -> Iterator[slice]:
        """Slices of heads that are worked on together."""
        for first in range(0, self.num_heads, self.heads_together):
            yield slice(first, min(first + self.heads_together, self.num_heads))

    def read(self, x_THD: Tensor, heads: slice) -> Tensor:
        """(G, D): these heads one after the other, in the working dtype."""
        view = x_THD[:, heads].transpose(0, 1)
        return torch.empty(view.shape, dtype=self.work, device=self.device).copy_(view).flatten(0, 1)

    def write(self, x_THD: Tensor, heads: slice, values_GD: Tensor) -> None:
        """The reverse of `read`."""
        x_THD[:, heads].transpose(0, 1).copy_(values_GD.unflatten(0, (-1, self.tokens)))

    def scaled_keys(self, keys_GD: Tensor) -> Tensor:
        """Keys such that q.k is the score in base 2."""
        return (unit(keys_GD)[0] if self.settings.normalize_keys else keys_GD) * self.scale

    def scaled_keys_backward(self, grad_GD: Tensor, keys_GD: Tensor) -> Tensor:
        """The gradient at the keys from LOG2E times that at the scaled keys (scores enter exp2, softmax knows exp)."""
        grad_GD = grad_GD * (self.scale / LOG2E)
        return unit_backward(grad_GD, *unit(keys_GD)) if self.settings.normalize_keys else grad_GD

    def rows(self, order: Order, heads: slice, round_: int, filler: int) -> _Rows:
        """One round of these heads in slots."""
        token_HT = order.token_HRT[heads, round_].long()
        count = token_HT.shape[0]
        head_H1 = torch.arange(count, device=self.device).unsqueeze(1)
        slot_HT = self.slot_T + head_H1 * self.slots
        row_S = torch.zeros(count * self.slots, dtype=torch.int64, device=self.device)
        row_S[slot_HT] = token_HT + head_H1 * self.tokens
        if self.settings.mask_within_chunks:
            code_HT = order.bucket_HRT[heads, round_] * count + head_H1
        else:
            code_HT = self.sequences.document_T * count + head_H1
        code_S = torch.full((count * self.slots,), filler, dtype=torch.float32, device=self.device)
        code_S[slot_HT] = code_HT.float()  # exact: fewer than 2^24 codes
        slot_G = torch.empty(count * self.tokens, dtype=torch.int64, device=self.device)
        slot_G[row_S[slot_HT]] = slot_HT
        return _Rows(row_S, code_S.to(self.work), slot_G)

    def pad(self, x_SX: Tensor, value: float = 0.0) -> Tensor:
        """`look_back` chunks before and `look_forward` chunks after, so that every chunk has a whole window."""
        before = x_SX.new_full((self.back * self.chunk, *x_SX.shape[1:]), value)
        after = x_SX.new_full((self.forward * self.chunk, *x_SX.shape[1:]), value)
        return torch.cat([before, x_SX, after])

    def windows(self, padded: Tensor, chunks: slice) -> Tensor:
        """(chunks, W * C, ...): overlapping views of each chunk's window, nothing is copied."""
        span = padded[chunks.start * self.chunk : (chunks.stop + self.window - 1) * self.chunk]
        return span.unfold(0, self.window * self.chunk, self.chunk).movedim(-1, 1)

    def blocks(self, slots: int) -> Iterator[tuple[slice, slice]]:
        """(chunks, their slots), as many as fit a block."""
        chunks = slots // self.chunk
        for first in range(0, chunks, self.chunks_together):
            last = min(first + self.chunks_together, chunks)
            yield slice(first, last), slice(first * self.chunk, last * self.chunk)

    def by_chunk(self, x_SX: Tensor) -> Tensor:
        """(chunks, C, ...)."""
        return x_SX.unflatten(0, (-1, self.chunk))

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """a @ b, multiplied in the product dtype, kept in the working dtype."""
        return torch.bmm(a.to(self.low), b.to(self.low)).to(self.work)


class _Round:
    """One round of some heads in slots. Rows are gathered block by block: a round's sorted copies never exist whole."""

    def __init__(self, kernel: _Kernel, query_order: Order, key_order: Order, heads: slice, round_: int) -> None:
        self.kernel = kernel
        self.queries = kernel.rows(query_order, heads, round_, filler=-2)
        self.keys = kernel.rows(key_order, heads, round_, filler=-1)
        self.padded_rows = kernel.pad(self.keys.row_S)
        self.padded_codes = kernel.pad(self.keys.code_S, value=-1.0)

    @property
    def slots(self) -> int:
        """S times the heads at work."""
        return len(self.queries.row_S)

    def of_queries(self, x_GX: Tensor, slots: slice) -> Tensor:
        """(chunks, C, ...): what belongs to the queries of these slots."""
        return self.kernel.by_chunk(x_GX.index_select(0, self.queries.row_S[slots]))

    def of_windows(self, x_GX: Tensor, chunks: slice) -> Tensor:
        """(chunks, W * C, ...): what belongs to the keys that these chunks see, gathered once and viewed in windows."""
        kernel = self.kernel
        span = self.padded_rows[chunks.start * kernel.chunk : (chunks.stop + kernel.window - 1) * kernel.chunk]
        return kernel.windows(x_GX.index_select(0, span), slice(0, chunks.stop - chunks.start))

    def scores(self, q: Tensor, keys: Tensor, chunks: slice, slots: slice, seen: _Seen | None) -> Tensor:
        """(chunks, C, W * C) in base 2, with what a query must not see far below everything else."""
        kernel = self.kernel
        scores = torch.bmm(q, keys.mT)
        codes = kernel.by_chunk(self.queries.code_S[slots])
        # arithmetic instead of a boolean mask: on a CPU a fifth of the time, and exact, since equal codes add 0
        differ = codes.unsqueeze(2) - kernel.windows(self.padded_codes, chunks).unsqueeze(1)
        scores.addcmul_(differ, differ, value=HIDDEN)
        if kernel.settings.shared_qk:
            scores.diagonal(kernel.back * kernel.chunk, 1, 2).fill_(HIDDEN)
        if seen is not None:
            scores -= seen.rounds(self, chunks, slots).log2()
        return scores


class _Seen:
    """For `count_keys: once`: in how many rounds a query sees a key, from both's chunks (and buckets) in all."""

    def __init__(self, kernel: _Kernel, query_order: Order, key_order: Order, heads: slice) -> None:
        self.kernel = kernel
        rounds = range(kernel.settings.num_hashes)
        self.queries = [self._place(kernel.rows(query_order, heads, r, -2)) for r in rounds]
        self.keys = [self._place(kernel.rows(key_order, heads, r, -1)) for r in rounds]

    def _place(self, rows: _Rows) -> tuple[Tensor, Tensor]:
        """(chunk, code) of each row."""
        return rows.slot_G // self.kernel.chunk, rows.code_S[rows.slot_G]

    def rounds(self, this: _Round, chunks: slice, slots: slice) -> Tensor:
        """(chunks, C, W * C): at least 1, and right wherever this round shows the key."""
        kernel = self.kernel
        query_rows = kernel.by_chunk(this.queries.row_S[slots]).unsqueeze(2)
        key_rows = kernel.windows(kernel.pad(this.keys.row_S), chunks).unsqueeze(1)
        shape = torch.broadcast_shapes(query_rows.shape, key_rows.shape)
        count = torch.zeros(shape, dtype=kernel.work, device=kernel.device)
        for (query_chunk, query_code), (key_chunk, key_code) in zip(self.queries, self.keys, strict=True):
            apart = key_chunk[key_rows] - query_chunk[query_rows]
            within = (apart >= -kernel.back) & (apart <= kernel.forward)
            count += within & (key_code[key_rows] == query_code[query_rows])
        return count.clamp_min_(1)


class _LshAttention(torch.autograd.Function):
    """One softmax over the union of all rounds' keys."""

    @staticmethod
    def forward(
        ctx: Any, q_THD: Tensor, k_THD: Tensor | None, v_THD: Tensor, query_tokens: Tensor, query_buckets: Tensor,
        key_tokens: Tensor, key_buckets: Tensor, sequences: Sequences, settings: LshSettings,
    ) -> Tensor:  # fmt: skip
        orders = Order(query_tokens, query_buckets), Order(key_tokens, key_buckets)
        with torch.autocast(q_THD.device.type, enabled=False):
            kernel = _Kernel(q_THD, sequences, settings)
            out_THD = torch.empty(v_THD.shape, dtype=v_THD.dtype, device=v_THD.device)
            lse_TH1 = torch.empty(*q_THD.shape[:2], 1, dtype=kernel.work, device=q_THD.device)
            for heads in kernel.heads():
                q_GD, v_GD = kernel.read(q_THD, heads), kernel.read(v_THD, heads)
                values_GD = v_GD.to(kernel.low)
                keys_GD = kernel.scaled_keys(q_GD if k_THD is None else kernel.read(k_THD, heads))
                seen = _Seen(kernel, *orders, heads) if settings.count_keys == "once" else None
                out_GD, lse_G1 = torch.zeros_like(v_GD), torch.full_like(v_GD[:, :1], HIDDEN)
                for round_ in range(settings.num_hashes):
                    one = _Round(kernel, *orders, heads, round_)
                    round_out, round_lse = _attend(one, q_GD, keys_GD, values_GD, seen)
                    merged = torch.logaddexp2(lse_G1, round_lse)
                    out_GD.mul_((lse_G1 - merged).exp2_()).add_(round_out.mul_((round_lse - merged).exp2_()))
                    lse_G1 = merged
                alone = lse_G1 < HIDDEN / 2  # no round showed it anything: it sees itself
                kernel.write(out_THD, heads, torch.where(alone, v_GD, out_GD))
                kernel.write(lse_TH1, heads, lse_G1.masked_fill_(alone, -HIDDEN))
        ctx.save_for_backward(q_THD, k_THD, v_THD, out_THD, lse_TH1, *orders[0], *orders[1])
        ctx.sequences, ctx.settings = sequences, settings
        return out_THD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_THD: Tensor) -> tuple[Tensor | None, ...]:
        q_THD, k_THD, v_THD, out_THD, lse_TH1, *order = ctx.saved_tensors
        orders = Order(*order[:2]), Order(*order[2:])
        grad_q_THD, grad_v_THD = torch.empty_like(q_THD), torch.empty_like(v_THD)
        grad_k_THD = None if k_THD is None else torch.empty_like(k_THD)
        with torch.autocast(q_THD.device.type, enabled=False):
            kernel = _Kernel(q_THD, ctx.sequences, ctx.settings)
            for heads in kernel.heads():
                q_GD, grad_GD, lse_G1 = (kernel.read(x, heads) for x in (q_THD, grad_THD, lse_TH1))
                k_GD = q_GD if k_THD is None else kernel.read(k_THD, heads)
                values_GD = kernel.read(v_THD, heads).to(kernel.low)
                along_G1 = (grad_GD * kernel.read(out_THD, heads)).sum(-1, keepdim=True)
                known = _Known(q_GD, kernel.scaled_keys(k_GD), values_GD, grad_GD, along_G1, lse_G1)
                seen = _Seen(kernel, *orders, heads) if ctx.settings.count_keys == "once" else None
                grad_q_GD, grad_keys_GD = torch.zeros_like(q_GD), torch.zeros_like(q_GD)
                grad_v_GD = grad_GD * (lse_G1 == -HIDDEN)
                for round_ in range(ctx.settings.num_hashes):
                    one = _Round(kernel, *orders, heads, round_)
                    _attend_backward(one, known, seen, (grad_q_GD, grad_keys_GD, grad_v_GD))
                grad_q_GD /= LOG2E  # the scores' base 2 lies in the scaled keys that these were multiplied by
                grad_k_GD = kernel.scaled_keys_backward(grad_keys_GD, k_GD)
                if grad_k_THD is None:
                    grad_q_GD += grad_k_GD
                else:
                    kernel.write(grad_k_THD, heads, grad_k_GD)
                kernel.write(grad_q_THD, heads, grad_q_GD)
                kernel.write(grad_v_THD, heads, grad_v_GD)
        return grad_q_THD, grad_k_THD, grad_v_THD, None, None, None, None, None, None


def _attend(
    one: _Round, q_GD: Tensor, keys_GD: Tensor, values_GD: Tensor, seen: _Seen | None
) -> tuple[Tensor, Tensor]:
    """One round's output (G, D) and its log2 of the sum of exponentials (G, 1), row by row."""
    kernel = one.kernel
    out_SD, lse_S1 = q_GD.new_empty(one.slots, kernel.head_dim), q_GD.new_empty(one.slots, 1)
    for chunks, slots in kernel.blocks(one.slots):
        q, keys = one.of_queries(q_GD, slots), one.of_windows(keys_GD, chunks)
        scores = one.scores(q, keys, chunks, slots, seen)
        peak = scores.amax(-1, keepdim=True)
        weight = scores.sub_(peak).exp2_()
        total = weight.sum(-1, keepdim=True)
        out = kernel.product(weight, one.of_windows(values_GD, chunks)).div_(total)
        out_SD[slots] = out.flatten(0, 1)
        lse_S1[slots] = peak.add_(total.log2_()).flatten(0, 1)
    return out_SD.index_select(0, one.queries.slot_G), lse_S1.index_select(0, one.queries.slot_G)


class _Known(NamedTuple):
    """What the backward pass of some heads knows of every row."""

    q_GD: Tensor
    keys_GD: Tensor
    values_GD: Tensor
    grad_GD: Tensor
    along_G1: Tensor
    """The gradient's product with the output."""
    lse_G1: Tensor


def _attend_backward(one: _Round, known: _Known, seen: _Seen | None, totals: tuple[Tensor, Tensor, Tensor]) -> None:
    """Adds one round's share to the gradients (G, D) at the queries, the scaled keys and the values.

    Weights are taken against the log-sum-exp of all rounds, so they are the final softmax weights and shares just add.
    Gradients go back to their rows by a gather through the inverse order: no atomics, the same bits every time.
    """
    kernel, width = one.kernel, known.q_GD.shape[1]
    grad_q_SD = known.q_GD.new_empty(one.slots, width)
    grad_keys, grad_values = (known.q_GD.new_zeros(len(one.padded_rows), width) for _ in range(2))
    for chunks, slots in kernel.blocks(one.slots):
        q, keys = one.of_queries(known.q_GD, slots), one.of_windows(known.keys_GD, chunks)
        weight = one.scores(q, keys, chunks, slots, seen).sub_(one.of_queries(known.lse_G1, slots)).exp2_()
        grad_out = one.of_queries(known.grad_GD, slots)
        _fold(kernel, grad_values, kernel.product(weight.mT, grad_out), chunks)
        grad_scores = kernel.product(grad_out, one.of_windows(known.values_GD, chunks).mT)
        grad_scores.sub_(one.of_queries(known.along_G1, slots)).mul_(weight)
        _fold(kernel, grad_keys, kernel.product(grad_scores.mT, q), chunks)
        grad_q_SD[slots] = kernel.product(grad_scores, keys).flatten(0, 1)
    first = kernel.back * kernel.chunk
    totals[0].add_(grad_q_SD.index_select(0, one.queries.slot_G))
    totals[1].add_(grad_keys.index_select(0, one.keys.slot_G + first))
    totals[2].add_(grad_values.index_select(0, one.keys.slot_G + first))


def _fold(kernel: _Kernel, padded: Tensor, windows: Tensor, chunks: slice) -> None:
    """Adds (chunks, W * C, D) where `windows` took it from: window by window, since windows overlap."""
    by_chunk = kernel.by_chunk(padded)
    for offset in range(kernel.window):
        part = windows[:, offset * kernel.chunk : (offset + 1) * kernel.chunk]
        by_chunk[chunks.start + offset : chunks.stop + offset] += part
