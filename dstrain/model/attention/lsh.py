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
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dstrain.model.attention.blocked import LOG2E, product_dtype, scratch, unit, work_dtype
from dstrain.model.attention.draws import generator
from dstrain.model.attention.hashing import DIRECTIONS, Order, factors, sort_tokens
from dstrain.packed import Sequences
from dstrain.schema import Settings, setting

HIDDEN = -1e20
"""What a hidden key's score becomes at least: below any real score, and its square still fits fp32."""

ITSELF = HIDDEN / 2
"""A token's score with itself where it is the key of last resort: any other key outweighs it, no hidden key does."""


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
        self._program = "Triton where it can" if torch.cuda.is_available() else "PyTorch, recomputed in backward"
        self._rotations: dict[tuple[str, int, torch.device], Tensor] = {}

    def forward(self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, sequences: Sequences) -> Tensor:
        """(T, H, D) of v's dtype. With shared_qk the keys are not looked at: they are the queries."""
        k_or_none = None if self.settings.shared_qk else k_THD
        if q_THD.is_cuda:
            from dstrain.model.attention import lsh_triton  # triton takes a second to import

            obstacle = lsh_triton.supported(q_THD, self.settings)
            self._program = "Triton" if obstacle is None else f"PyTorch: {obstacle}"
            if obstacle is None:
                orders = self._orders(lsh_triton.sort_tokens, q_THD, k_THD, sequences)
                return lsh_triton.lsh_attention(q_THD, k_or_none, v_THD, *orders, sequences, self.settings)
        queries, keys = self._orders(sort_tokens, q_THD, k_THD, sequences)
        return _LshAttention.apply(q_THD, k_or_none, v_THD, *queries, *keys, sequences, self.settings)

    @torch.no_grad()
    def _orders(
        self, sort: Callable[..., Order], q_THD: Tensor, k_THD: Tensor, sequences: Sequences
    ) -> tuple[Order, Order]:
        """Of queries and of keys."""
        rotations, settings = self.rotations(q_THD.device), self.settings

        def order(x_THD: Tensor) -> Order:
            found = sort(x_THD, rotations, sequences, settings)
            # otherwise buckets have done their work in the sort: they are not read, so not kept
            return found if settings.mask_within_chunks else Order(found.token_HRT, found.token_HRT)

        with torch.autocast(q_THD.device.type, enabled=False):
            queries = order(q_THD)
            return queries, queries if settings.shared_qk else order(k_THD)

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

    def adapt(self, q_THD: Tensor, k_THD: Tensor, sequences: Sequences) -> None:
        """Nothing here is fitted to queries and keys."""

    @property
    def kernel(self) -> str:
        """What runs here."""
        s = self.settings
        return f"blocked LSH, {s.num_hashes} rounds of {s.chunk_size}-token chunks ({self._program})"

    def flops(self, lengths: Sequence[int]) -> int:
        """Multiplications and additions of one forward pass over documents of these lengths: hashing, two products."""
        s = self.settings
        window = (s.look_back + 1 + s.look_forward) * s.chunk_size
        slots = sum(_slots_of(length, s.chunk_size) for length in lengths)
        directions = sum(length * sum(factors(s.buckets_of(length))) // 2 for length in lengths)
        return self.num_heads * s.num_hashes * self.head_dim * (4 * slots * window + 2 * directions)


def _slots_of(length: int, chunk_size: int) -> int:
    return math.ceil(length / chunk_size) * chunk_size


# ------------------------------------------------------------------------------------------------- the kernel


class _Kernel:
    """Precision, layout and block size of one forward or backward pass."""

    def __init__(self, q_THD: Tensor, sequences: Sequences, settings: LshSettings) -> None:
        self.settings, self.sequences, self.device = settings, sequences, q_THD.device
        self.work, self.low = work_dtype(q_THD), product_dtype(q_THD)
        self.tokens, self.num_heads, self.head_dim = q_THD.shape
        self.chunk, self.before = settings.chunk_size, settings.look_back * settings.chunk_size
        self.window = (settings.look_back + 1 + settings.look_forward) * self.chunk
        slots = [_slots_of(length, self.chunk) for length in sequences.lengths]
        self.slots = sum(slots)
        first_slot_N = torch.tensor([0, *accumulate(slots)][:-1], device=self.device)
        self.slot_T = first_slot_N[sequences.document_T] + sequences.position_T
        self.masked = [masked for length in sequences.lengths for masked in self._masked(length)]
        scores = 800_000 if self.device.type == "cpu" else 1 << 26  # a CPU wants its caches, a GPU few launches
        self.chunks_together = max(1, scores // (self.chunk * self.window))
        self.heads_together = max(1, min(self.num_heads, self.chunks_together // len(self.masked)))

    def _masked(self, length: int) -> Iterator[bool]:
        """For each chunk of a document: whether its window holds what it must not see (but for a token itself)."""
        s = self.settings
        for chunk in range(math.ceil(length / self.chunk)):
            yield s.mask_within_chunks or chunk < s.look_back or chunk + s.look_forward >= length // self.chunk

    def groups(self, queries: Order, keys: Order) -> Iterator[_Group]:
        """All heads, some at a time."""
        for first in range(0, self.num_heads, self.heads_together):
            yield _Group(self, queries, keys, slice(first, min(first + self.heads_together, self.num_heads)))

    def scaled(self, key_SD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys such that q.k is the score, and what each was multiplied by."""
        if self.settings.normalize_keys:
            return unit(key_SD)
        scale = key_SD.new_tensor(self.head_dim**-0.5)
        return key_SD * scale, scale

    def scaled_backward(self, grad_SD: Tensor, scaled_SD: Tensor, scale: Tensor) -> Tensor:
        """The gradient at the keys from that at the scaled keys, in place."""
        if self.settings.normalize_keys:  # what lies along a key is lost
            grad_SD.addcmul_(scaled_SD, (scaled_SD * grad_SD).sum(-1, keepdim=True), value=-1)
        return grad_SD.mul_(scale)

    def scratch(self, name: str, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """Memory that blocks use one after the other."""
        return scratch(f"lsh {name}", shape, dtype or self.work, self.device)

    def product(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """a @ b, multiplied in the product dtype, kept in the working dtype."""
        out = self.scratch(name, (*a.shape[:2], b.shape[2]), self.low)
        return torch.bmm(a.to(self.low), b.to(self.low), out=out).to(self.work)

    def add_product(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        """total += a @ b."""
        if self.low == self.work:
            total.baddbmm_(a, b)
        else:
            total += torch.bmm(a.to(self.low), b.to(self.low))

    def dots(self, a_THD: Tensor, b_THD: Tensor) -> Tensor:
        """(T, H, 1): each row of a times its row of b; on a CPU some tokens at a time, to keep the products small."""
        rows = 512 if self.device.type == "cpu" else self.tokens
        parts = zip(a_THD.split(rows), b_THD.split(rows), strict=True)
        return torch.cat([(a.to(self.work) * b.to(self.work)).sum(-1, keepdim=True) for a, b in parts])


class _Flat(NamedTuple):
    """Some heads of a (T, H, D) tensor as one list of rows to gather from and to add to."""

    rows: Tensor
    """Token t of head h is row t * step + h: a view wherever strides allow it."""
    step: int

    @classmethod
    def of(cls, x_THD: Tensor) -> _Flat:
        """Rows of all heads of x."""
        tokens, heads, width = x_THD.shape
        by_token, by_head, along = x_THD.stride()
        if along != 1 or by_head < 1 or by_token % by_head:
            return cls(x_THD.reshape(-1, width), heads)
        step = by_token // by_head
        return cls(x_THD.as_strided(((tokens - 1) * step + heads, width), (by_head, 1)), step)


class _Group:
    """Heads that are worked on together, one after the other in slots, and empty slots around for the outer windows."""

    def __init__(self, kernel: _Kernel, queries: Order, keys: Order, heads: slice) -> None:
        self.kernel, self.orders, self.heads = kernel, (queries, keys), heads
        self.count = heads.stop - heads.start
        head_H1 = torch.arange(self.count, device=kernel.device).unsqueeze(1)
        self.slot_G = (kernel.before + head_H1 * kernel.slots + kernel.slot_T).flatten()
        self.slots = self.count * kernel.slots + kernel.window - kernel.chunk
        self.head_G = head_H1.expand(-1, kernel.tokens).flatten()
        self.head_S = self.lay(self.head_G, 0)
        documents = len(kernel.sequences.lengths)
        self.document_S = self.lay((kernel.sequences.document_T + head_H1 * documents).flatten(), -1)

    def lay(self, values_G: Tensor, filler: int) -> Tensor:
        """What belongs to the places of an order in slots."""
        return values_G.new_full((self.slots,), filler).index_copy_(0, self.slot_G, values_G)

    def round(self, number: int) -> _Round:
        """One round of hashing; shared queries and keys share their slots."""
        keys = self._slots(self.orders[1], number)
        return _Round(self, keys if self.kernel.settings.shared_qk else self._slots(self.orders[0], number), keys)

    def _slots(self, order: Order, number: int) -> _Slots:
        token_S = self.lay(order.token_HRT[self.heads, number].flatten().long(), 0)
        code_S = self.document_S
        if self.kernel.settings.mask_within_chunks:
            buckets = sum(map(self.kernel.settings.buckets_of, self.kernel.sequences.lengths))
            assert self.count * buckets < 1 << 24, "codes are compared as fp32"
            bucket_HT = order.bucket_HRT[self.heads, number] * self.count
            code_S = self.lay(bucket_HT.flatten() + self.head_G, -1)
        return _Slots(token_S, self.head_S, code_S.to(self.kernel.work))

    def seen(self) -> _Seen | None:
        """Who saw whom in all rounds, where that matters."""
        settings = self.kernel.settings
        return _Seen(self, range(settings.num_hashes)) if settings.count_keys == "once" else None


class _Slots:
    """Queries or keys of one round in slots."""

    def __init__(self, token_S: Tensor, head_S: Tensor, code_S: Tensor) -> None:
        self.token_S, self.head_S = token_S, head_S
        self.code_S = code_S
        """A query sees keys of its own (head, document) or (head, bucket); fillers have -1. Exact: fewer than 2^24."""
        self._rows: dict[int, Tensor] = {}

    def rows(self, step: int) -> Tensor:
        """The row of each slot in a `_Flat` of this step; fillers have the first row, and weigh nothing."""
        if step not in self._rows:
            self._rows[step] = self.token_S * step + self.head_S
        return self._rows[step]

    def add(self, x: _Flat, slots: slice, values_SD: Tensor) -> None:
        """Adds (slots, D). A row has one slot in a round and fillers add zeros, so no order of adding matters."""
        x.rows.index_add_(0, self.rows(x.step)[slots], values_SD)


class _Round:
    """One round of a group. Rows are gathered block by block: sorted copies never exist whole."""

    def __init__(self, group: _Group, queries: _Slots, keys: _Slots) -> None:
        self.group, self.kernel, self.queries, self.keys = group, group.kernel, queries, keys

    def blocks(self) -> Iterator[_Block]:
        """As many chunks at a time as fit the caches."""
        masked = self.kernel.masked * self.group.count
        for first in range(0, len(masked), self.kernel.chunks_together):
            yield _Block(self, first, masked[first : first + self.kernel.chunks_together])

    def slot_of_rows(self, slots: _Slots) -> Tensor:
        """(G): where token t of head h stands, at t * count + h."""
        slot_G = self.group.slot_G
        return torch.empty_like(slot_G).index_copy_(0, slots.rows(self.group.count)[slot_G], slot_G)


class _Block:
    """Some chunks of a round, their queries and the keys in their windows."""

    def __init__(self, one: _Round, first: int, masked: list[bool]) -> None:
        self.one, self.kernel = one, one.kernel
        start, stop = first * self.kernel.chunk, (first + len(masked)) * self.kernel.chunk
        self.span = slice(start, stop + self.kernel.window - self.kernel.chunk)
        """The slots of all windows."""
        self.mine = slice(self.kernel.before, self.kernel.before + stop - start)
        """The slots of queries, counted within the span."""
        self.slots = slice(start + self.mine.start, start + self.mine.stop)
        """The slots of queries."""
        which = [chunk for chunk, mask in enumerate(masked) if mask]
        self.masked = slice(which[0], which[-1] + 1) if which else None
        """The chunks that need a mask, and those between them."""

    def keys(self, name: str, x: _Flat) -> Tensor:
        """(span, D) of the keys, in the working dtype."""
        return self._read(name, x, self.one.keys.rows(x.step)[self.span])

    def queries(self, name: str, x: _Flat) -> Tensor:
        """(slots, D) of the queries, in the working dtype."""
        return self._read(name, x, self.one.queries.rows(x.step)[self.slots])

    def _read(self, name: str, x: _Flat, rows: Tensor) -> Tensor:
        out = self.kernel.scratch(name, (len(rows), x.rows.shape[1]), x.rows.dtype)
        return torch.index_select(x.rows, 0, rows, out=out).to(self.kernel.work)

    def by_chunk(self, x_SX: Tensor) -> Tensor:
        """(chunks, C, ...)."""
        return x_SX.unflatten(0, (-1, self.kernel.chunk))

    def windows(self, span_SX: Tensor) -> Tensor:
        """(chunks, W * C, ...): overlapping views of each chunk's window, nothing is copied."""
        return span_SX.unfold(0, self.kernel.window, self.kernel.chunk).movedim(-1, 1)

    def scores(self, query: Tensor, scaled_SD: Tensor, plus: Tensor | None, seen: _Seen | None) -> Tensor:
        """(chunks, C, W * C) in base 2, and `plus`, with what a query must not see far below everything else."""
        scores = self.kernel.scratch("scores", (*query.shape[:2], self.kernel.window))
        keys = self.windows(scaled_SD).mT
        if plus is None:
            torch.baddbmm(scores, query, keys, beta=0, alpha=LOG2E, out=scores)
        else:
            torch.baddbmm(plus, query, keys, alpha=LOG2E, out=scores)
        if self.masked is not None:
            code_S = self.one.queries.code_S[self.slots]
            query_codes = self.by_chunk(torch.where(code_S < 0, -2, code_S))[self.masked].unsqueeze(2)
            key_codes = self.windows(self.one.keys.code_S[self.span])[self.masked].unsqueeze(1)
            # arithmetic instead of a boolean mask: on a CPU a fifth of the time, and exact, since equal codes add 0
            differ = self.kernel.scratch("differ", scores[self.masked].shape)
            torch.sub(query_codes, key_codes, out=differ)
            scores[self.masked].addcmul_(differ, differ, value=HIDDEN)
        if self.kernel.settings.shared_qk:
            scores.diagonal(self.kernel.before, 1, 2).fill_(HIDDEN)
        if seen is not None:
            scores -= seen.rounds(self).log2()
        return scores

    def fold(self, name: str, weight: Tensor, x: Tensor) -> Tensor:
        """(span, D): weight^T x, (chunks, W * C, D), added up where windows overlap."""
        total_SD = self.kernel.scratch(name, (self.span.stop - self.span.start, x.shape[-1])).zero_()
        chunks = self.by_chunk(total_SD)
        for place, part in enumerate(weight.split(self.kernel.chunk, -1)):
            self.kernel.add_product(chunks[place : place + len(x)], part.mT, x)
        return total_SD


class _Seen:
    """For `count_keys: once`: in how many rounds a query sees a key, from both's chunks (and buckets) in all."""

    def __init__(self, group: _Group, rounds: Iterable[int]) -> None:
        self.places = [(self._place(one, one.queries), self._place(one, one.keys)) for one in map(group.round, rounds)]

    def _place(self, one: _Round, slots: _Slots) -> tuple[Tensor, Tensor]:
        """(chunk, code) of each row."""
        slot_G = one.slot_of_rows(slots)
        return slot_G // one.kernel.chunk, slots.code_S[slot_G]

    def rounds(self, block: _Block) -> Tensor:
        """(chunks, C, W * C): at least 1, and right wherever this round shows the key."""
        one, settings, step = block.one, block.kernel.settings, block.one.group.count
        query_rows = block.by_chunk(one.queries.rows(step)[block.slots]).unsqueeze(2)
        key_rows = block.windows(one.keys.rows(step)[block.span]).unsqueeze(1)
        shape = torch.broadcast_shapes(query_rows.shape, key_rows.shape)
        count = torch.zeros(shape, dtype=block.kernel.work, device=key_rows.device)
        for (query_chunk, query_code), (key_chunk, key_code) in self.places:
            apart = key_chunk[key_rows] - query_chunk[query_rows]
            within = (apart >= -settings.look_back) & (apart <= settings.look_forward)
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
        out_THD = torch.empty(v_THD.shape, dtype=v_THD.dtype, device=v_THD.device)
        with torch.autocast(q_THD.device.type, enabled=False):
            kernel = _Kernel(q_THD, sequences, settings)
            lse_TH1 = torch.empty(*q_THD.shape[:2], 1, dtype=kernel.work, device=q_THD.device)
            for group in kernel.groups(*orders):
                q, k, v = (_Flat.of(x[:, group.heads]) for x in (q_THD, q_THD if k_THD is None else k_THD, v_THD))
                # before any round a token has seen itself, with a weight that vanishes beside any other key's
                out = v_THD[:, group.heads].to(kernel.work, copy=True, memory_format=torch.contiguous_format)
                lse = out.new_full((*out.shape[:2], 1), ITSELF)
                seen = group.seen()
                for number in range(settings.num_hashes):
                    round_out, round_lse = _attend(group.round(number), q, k, v, seen)
                    merged = torch.logaddexp2(lse, round_lse.view_as(lse))
                    out.lerp_(round_out.view_as(out), (round_lse.view_as(lse) - merged).exp2_())
                    lse = merged
                out_THD[:, group.heads] = out
                lse_TH1[:, group.heads] = lse
        ctx.save_for_backward(q_THD, k_THD, v_THD, out_THD, lse_TH1, *orders[0], *orders[1])
        ctx.sequences, ctx.settings = sequences, settings
        return out_THD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_THD: Tensor) -> tuple[Tensor | None, ...]:
        q_THD, k_THD, v_THD, out_THD, lse_TH1, *order = ctx.saved_tensors
        keys_THD = q_THD if k_THD is None else k_THD
        grads = [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q_THD, k_THD, v_THD) if x is not None]
        with torch.autocast(q_THD.device.type, enabled=False):
            kernel = _Kernel(q_THD, ctx.sequences, ctx.settings)
            against_TH2 = torch.cat([-lse_TH1, kernel.dots(grad_THD, out_THD)], -1)
            for group in kernel.groups(Order(*order[:2]), Order(*order[2:])):
                every = (q_THD, keys_THD, v_THD, grad_THD, against_TH2)
                known = _Known(*(_Flat.of(x[:, group.heads]) for x in every))
                mine = [grad[:, group.heads] for grad in grads]
                # gradients add up where they are returned, unless that is too coarse for sums
                sums = [x if x.dtype == kernel.work else torch.zeros_like(x, dtype=kernel.work) for x in mine]
                torch.mul(grad_THD[:, group.heads], lse_TH1[:, group.heads] == ITSELF, out=sums[-1])
                seen, flat = group.seen(), [_Flat.of(x) for x in sums]
                for number in range(ctx.settings.num_hashes):
                    _attend_backward(group.round(number), known, flat, seen)
                for x, total in zip(mine, sums, strict=True):
                    x.copy_(total)  # nothing to do where they are one
        return grads[0], None if k_THD is None else grads[1], grads[-1], None, None, None, None, None, None


def _attend(one: _Round, q: _Flat, k: _Flat, v: _Flat, seen: _Seen | None) -> tuple[Tensor, Tensor]:
    """One round's output (G, D) and its log2 of the sum of exponentials (G, 1), row by row."""
    kernel, group = one.kernel, one.group
    out_SD = q.rows.new_empty(group.slots, kernel.head_dim, dtype=kernel.work)
    lse_S1 = q.rows.new_empty(group.slots, 1, dtype=kernel.work)
    for block in one.blocks():
        key_SD = block.keys("k", k)
        query = block.by_chunk(key_SD[block.mine] if kernel.settings.shared_qk else block.queries("q", q))
        scores = block.scores(query, kernel.scaled(key_SD)[0], None, seen)
        peak = scores.amax(-1, keepdim=True)
        weight = scores.sub_(peak).exp2_()
        total = weight.sum(-1, keepdim=True)
        out = kernel.product("out", weight, block.windows(block.keys("v", v))).div_(total)
        out_SD[block.slots] = out.flatten(0, 1)
        lse_S1[block.slots] = peak.add_(total.log2_()).flatten(0, 1)
    slot_G = one.slot_of_rows(one.queries)
    return out_SD.index_select(0, slot_G), lse_S1.index_select(0, slot_G)


class _Known(NamedTuple):
    """What the backward pass of a group knows of every row."""

    q: _Flat
    k: _Flat
    v: _Flat
    grad: _Flat
    against: _Flat
    """Two numbers: less the log2 of the sum of exponentials, and the gradient's product with the output."""


def _attend_backward(one: _Round, known: _Known, sums: Sequence[_Flat], seen: _Seen | None) -> None:
    """Adds one round's share to the gradients at queries, (keys,) and values.

    Weights are taken against the log-sum-exp of all rounds, so they are the final softmax weights and shares just add.
    """
    kernel, shared = one.kernel, one.kernel.settings.shared_qk
    for block in one.blocks():
        key_SD, value_SD = block.keys("k", known.k), block.keys("v", known.v)
        query = block.by_chunk(key_SD[block.mine] if shared else block.queries("q", known.q))
        grad = block.by_chunk(block.queries("grad", known.grad))
        against = block.by_chunk(block.queries("against", known.against))
        less, along = against.split(1, -1)
        scaled_SD, scale = kernel.scaled(key_SD)
        weight = block.scores(query, scaled_SD, less, seen).exp2_()
        one.keys.add(sums[-1], block.span, block.fold("grad values", weight, grad))
        grad_scores = kernel.product("grad scores", grad, block.windows(value_SD).mT).sub_(along).mul_(weight)
        grad_keys = kernel.scaled_backward(block.fold("grad keys", grad_scores, query), scaled_SD, scale)
        grad_queries = kernel.product("grad queries", grad_scores, block.windows(scaled_SD)).flatten(0, 1)
        if shared:
            grad_keys[block.mine] += grad_queries
        else:
            one.queries.add(sums[0], block.slots, grad_queries)
        one.keys.add(sums[-2], block.span, grad_keys)
