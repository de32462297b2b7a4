"""FAVOR+: softmax attention approximated by positive orthogonal random features (Choromanski et al. 2021,
https://arxiv.org/abs/2009.14794), in time and memory linear in the length.

The textbook estimates exp(q.k) by phi(q).phi(k) with phi_m(x) = exp(w_m.x - |x|^2/2), and computes

    out_i = phi(q_i) (sum_j phi(k_j)^T v_j) / phi(q_i) (sum_j phi(k_j)^T).

Without a causal mask this is exactly two softmax attentions through M "inducing points", one for each feature:

    z_m = log sum_j exp(w_m.k_j - |k_j|^2/2)        how much key mass feature m sees
    A_m = sum_j softmax_j(w_m.k_j - |k_j|^2/2) v_j  features attend to keys
    out_i = sum_m softmax_m(w_m.q_i + z_m) A_m      queries attend to features

exp(-|q_i|^2/2) stands in numerator and denominator and cancels. Every weight is a softmax weight: nothing overflows, no
denominator can vanish, so there is no epsilon and no clamp, and out_i lies among the rows of V. Both attentions are
computed in blocks that the backward pass computes anew; the features, M numbers per token, are never stored.

Shapes: T tokens, H heads, D head size, M features, L length, B documents x heads of one tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dstrain.model.attention.blocked import LOG2E, Tile, product_dtype, tiles, unit, unit_backward, work_dtype
from dstrain.model.attention.draws import generator
from dstrain.packed import Sequences
from dstrain.schema import Settings, setting


class FavorSettings(Settings):
    """FAVOR+ attention; time and memory grow linearly with the length. docs/attention.md holds the measured errors."""

    kind: Literal["favor"] = "favor"
    nb_features: int = setting(256, unit="features", ge=1)
    """Random features per head; the error shrinks with their square root, time grows with their number."""
    redraw_interval: int | None = setting(None, unit="optimizer steps", ge=1)
    """Draw new projections every so many optimizer steps; null keeps the first draw for good."""
    normalize_qk: bool = True
    """Queries and keys become unit vectors times a learned temperature per head: the estimator's error grows
    exponentially with their norms, and this bounds them. false: plain q.k / sqrt(D), as sdpa computes it."""
    temperature: float = setting(1.0, unit="logits", gt=0)
    """Where the learned temperature starts when normalize_qk is true; logits lie between minus and plus this."""
    feature_norm: Literal["sqrt_d", "chi"] = "sqrt_d"
    """Length of a projection: always sqrt(D) (less variance, slight bias) or that of a Gaussian vector (unbiased)."""
    antithetic: bool = True
    """Draw projections as pairs w, -w; each counts as a feature."""
    center_keys: bool = True
    """Subtract a document's mean key. Softmax is blind to it, the estimator is not: a shared bias is pure variance."""

    @property
    def tied_qk(self) -> bool:
        """Queries and keys have projections of their own."""
        return False

    def build(self, num_heads: int, head_dim: int, layer: int, seed: int) -> Favor:
        """The kernel with the projections of (seed, layer, redraw 0)."""
        return Favor(self, num_heads, head_dim, layer, seed)


class Favor(nn.Module):
    """FAVOR+ within each document. Its projections are saved with the weights and stay fp32 in a half model."""

    projection_HMD: Tensor
    redraw: Tensor

    def __init__(self, settings: FavorSettings, num_heads: int, head_dim: int, layer: int, seed: int) -> None:
        super().__init__()
        self.settings, self.num_heads, self.head_dim, self.layer, self.seed = settings, num_heads, head_dim, layer, seed
        self.register_buffer("projection_HMD", self._draw(0))
        self.register_buffer("redraw", torch.zeros((), dtype=torch.int64))
        self._drawn = 0  # what `redraw` holds, known without asking a GPU
        self.register_load_state_dict_post_hook(_remember_redraw)
        if settings.normalize_qk:
            self.log_temperature_H = nn.Parameter(torch.full((num_heads,), math.log(settings.temperature)))

    def forward(self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, sequences: Sequences) -> Tensor:
        """(T, H, D) of v's dtype."""
        settings = self.settings
        if settings.normalize_qk:
            scale_H = torch.exp(self.log_temperature_H.to(work_dtype(q_THD)) / 2)
        else:
            scale_H = self.projection_HMD.new_full((self.num_heads,), self.head_dim**-0.25, dtype=work_dtype(q_THD))
        return _TwoSoftmaxes.apply(
            q_THD, k_THD, v_THD, scale_H, self.projection_HMD, sequences, settings.normalize_qk, settings.center_keys
        )

    def set_step(self, step: int) -> None:
        """New projections when the schedule asks for them; called between optimizer steps, never inside one."""
        if self.settings.redraw_interval is None:
            return
        number = step // self.settings.redraw_interval
        if number != self._drawn:
            self.projection_HMD.copy_(self._draw(number))
            self.redraw.fill_(number)
            self._drawn = number

    @property
    def kernel(self) -> str:
        """What runs here."""
        return f"two softmaxes through {self.settings.nb_features} features (blocked PyTorch, recomputed in backward)"

    def flops(self, lengths: Sequence[int]) -> int:
        """Multiplications and additions of one forward pass over documents of these lengths: four products."""
        return 8 * sum(lengths) * self.num_heads * self.settings.nb_features * self.head_dim

    def _draw(self, number: int) -> Tensor:
        rng = generator("favor", self.seed, self.layer, number)
        return draw_projection(self.settings, self.num_heads, self.head_dim, rng)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Favor:
        exact = self.projection_HMD  # .half() and .bfloat16() would round it, and orthogonality with it
        super()._apply(fn, recurse)
        self.projection_HMD = exact.to(self.projection_HMD.device)
        return self


def _remember_redraw(module: nn.Module, _: Any) -> None:
    assert isinstance(module, Favor)
    module._drawn = int(module.redraw)


def draw_projection(settings: FavorSettings, num_heads: int, head_dim: int, rng: torch.Generator) -> Tensor:
    """(H, M, D) fp32: blocks of D orthogonal directions, uniform (Haar), of the length the settings ask for."""
    pairs = 2 if settings.antithetic else 1
    count = math.ceil(settings.nb_features / pairs)
    shape = (num_heads, math.ceil(count / head_dim), head_dim, head_dim)
    gaussian = torch.randn(shape, generator=rng, dtype=torch.float64)
    basis, triangle = torch.linalg.qr(gaussian)
    basis = basis * triangle.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)  # without this QR is not uniform
    rows = basis.mT.flatten(1, 2)[:, :count]
    if settings.feature_norm == "chi":
        lengths = torch.randn(num_heads, count, head_dim, generator=rng, dtype=torch.float64).norm(dim=-1, keepdim=True)
        rows = rows * lengths
    else:
        rows = rows * math.sqrt(head_dim)
    if settings.antithetic:
        rows = torch.cat([rows, -rows], 1)[:, : settings.nb_features]
    return rows.float()


# ------------------------------------------------------------------------------------------------- the kernel


class _Points(NamedTuple):
    """The M inducing points of each document and head."""

    mass_B1M: Tensor
    """z in base 2."""
    values_BMD: Tensor
    """A."""


class _Side(NamedTuple):
    """Queries or keys of a tile before the scale: as given or as unit vectors, keys less their mean."""

    x_BLD: Tensor
    unit_BLD: Tensor | None
    inverse_BL1: Tensor | None


def _read_side(tile: Tile, x_THD: Tensor, normalize: bool, center: bool) -> _Side:
    x_BLD = tile.read(x_THD, work_dtype(x_THD))
    unit_BLD = inverse_BL1 = None
    if normalize:
        x_BLD, inverse_BL1 = unit(x_BLD)
        unit_BLD = x_BLD
    if center:
        x_BLD = x_BLD - x_BLD.mean(1, keepdim=True)
    return _Side(x_BLD, unit_BLD, inverse_BL1)


def _side_backward(grad_BLD: Tensor, side: _Side, center: bool) -> Tensor:
    if center:
        grad_BLD = grad_BLD - grad_BLD.mean(1, keepdim=True)
    if side.unit_BLD is None or side.inverse_BL1 is None:
        return grad_BLD
    return unit_backward(grad_BLD, side.unit_BLD, side.inverse_BL1)


def _with_ones(x_BND: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """[x, 1 ...]: row sums and per-row constants ride along in a matrix product instead of taking extra passes."""
    wide = torch.ones(*x_BND.shape[:2], x_BND.shape[2] + columns, dtype=dtype, device=x_BND.device)
    wide[:, :, : x_BND.shape[2]] = x_BND
    return wide


class _Kernel:
    """The blocks of one forward or backward pass: precision, sizes, and the two attentions tile by tile."""

    def __init__(self, q_THD: Tensor, scale_H: Tensor, projection_HMD: Tensor, sequences: Sequences) -> None:
        self.work, self.low = work_dtype(q_THD), product_dtype(q_THD)
        self.scale_H11 = scale_H.to(self.work)[:, None, None]
        self.weights_HMD = projection_HMD.to(self.work) * self.scale_H11
        self.sequences, (self.num_heads, self.features, _) = sequences, projection_HMD.shape
        on_cpu = q_THD.device.type == "cpu"
        self.rows_per_tile = 2048 if on_cpu else 1 << 20  # a CPU wants a tile near its caches, a GPU wants few launches
        self.scores_per_block = 1 << 18 if on_cpu else 1 << 26

    def tiles(self) -> Iterator[tuple[Tile, Tensor, Tensor]]:
        """Each tile with its heads' scaled projections (B, M, D) and scales (B, 1, 1)."""
        for tile in tiles(self.sequences, self.num_heads, self.rows_per_tile):
            yield tile, tile.per_head(self.weights_HMD), tile.per_head(self.scale_H11)

    def blocks(self, x_BLD: Tensor) -> Iterator[slice]:
        batch, length, _ = x_BLD.shape
        rows = max(16, self.scores_per_block // (batch * self.features))
        return (slice(first, min(first + rows, length)) for first in range(0, length, rows))

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """a @ b, multiplied in the product dtype, kept in the working dtype."""
        return torch.bmm(a.to(self.low), b.to(self.low)).to(self.work)

    def key_scores(self, keys_BLD: Tensor, scale_B11: Tensor, weights_BMD: Tensor, rows: slice) -> Tensor:
        """(B, M, rows): w_m.k_j - |k_j|^2/2 in base 2."""
        keys = keys_BLD[:, rows]
        half_squares_B1L = keys.square().sum(-1).unsqueeze(1) * (scale_B11.square() * (-0.5 * LOG2E))
        return torch.baddbmm(half_squares_B1L, weights_BMD, keys.mT, alpha=LOG2E)

    def query_scores(self, offset: Tensor, queries_BLD: Tensor, weights_BMD: Tensor, rows: slice) -> Tensor:
        """(B, rows, M): w_m.q_i + offset in base 2."""
        return torch.baddbmm(offset, queries_BLD[:, rows], weights_BMD.mT, alpha=LOG2E)

    def features_attend_to_keys(
        self, keys_BLD: Tensor, values_BLD: Tensor, scale_B11: Tensor, weights_BMD: Tensor
    ) -> _Points:
        values = _with_ones(values_BLD, 1, self.low)
        shape = (*weights_BMD.shape[:2], 1)
        peak = torch.full(shape, -math.inf, dtype=self.work, device=values.device)
        sums = torch.zeros(*shape[:2], values.shape[2], dtype=self.work, device=values.device)
        for rows in self.blocks(keys_BLD):
            scores = self.key_scores(keys_BLD, scale_B11, weights_BMD, rows)
            higher = torch.maximum(peak, scores.amax(-1, keepdim=True))
            sums *= torch.exp2(peak - higher)
            sums += self.product(scores.sub_(higher).exp2_(), values[:, rows])
            peak = higher
        weighted, total = sums[..., :-1], sums[..., -1:]
        return _Points((peak + total.log2()).mT, weighted / total)

    def queries_attend_to_features(
        self, queries_BLD: Tensor, points: _Points, weights_BMD: Tensor
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(rows, their outputs, their log2 of the sum of exponentials) block by block."""
        values = _with_ones(points.values_BMD, 1, self.low)
        for rows in self.blocks(queries_BLD):
            scores = self.query_scores(points.mass_B1M, queries_BLD, weights_BMD, rows)
            peak = scores.amax(-1, keepdim=True)
            sums = self.product(scores.sub_(peak).exp2_(), values)
            weighted, total = sums[..., :-1], sums[..., -1:]
            yield rows, weighted / total, peak + total.log2()

    def queries_backward(
        self, queries_BLD: Tensor, points: _Points, weights_BMD: Tensor,
        grad_BLD: Tensor, out_BLD: Tensor, lse_BL1: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients at the queries (B, L, D), at A (B, M, D) and at z (B, M, 1)."""
        grad_queries = torch.empty_like(queries_BLD)
        grad_values = torch.zeros_like(points.values_BMD)
        grad_mass = torch.zeros_like(points.mass_B1M)
        values = _with_ones(points.values_BMD, 2, self.low)
        grads = self._with_row_constant(grad_BLD, -(grad_BLD * out_BLD).sum(-1, keepdim=True))
        for rows in self.blocks(queries_BLD):
            weight = self.query_scores(points.mass_B1M - lse_BL1[:, rows], queries_BLD, weights_BMD, rows).exp2_()
            grad_values += self.product(weight.mT, grads[:, rows, :-2])
            grad_scores = self.product(grads[:, rows], values.mT).mul_(weight)
            grad_mass += grad_scores.sum(1, keepdim=True)
            grad_queries[:, rows] = self.product(grad_scores, weights_BMD)
        return grad_queries, grad_values, grad_mass.mT

    def keys_backward(
        self, keys_BLD: Tensor, values_BLD: Tensor, points: _Points, scale_B11: Tensor, weights_BMD: Tensor,
        grad_points_BMD: Tensor, grad_mass_BM1: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Gradients at the keys and at the values, (B, L, D) each."""
        grad_keys, grad_values = torch.empty_like(keys_BLD), torch.empty_like(values_BLD)
        constant = grad_mass_BM1 - (grad_points_BMD * points.values_BMD).sum(-1, keepdim=True)
        grads = self._with_row_constant(grad_points_BMD, constant)
        values = _with_ones(values_BLD, 2, self.low)
        weights = _with_ones(weights_BMD, 1, self.low)
        mass_BM1 = points.mass_B1M.mT
        for rows in self.blocks(keys_BLD):
            weight = self.key_scores(keys_BLD, scale_B11, weights_BMD, rows).sub_(mass_BM1).exp2_()
            grad_values[:, rows] = self.product(weight.mT, grads[:, :, :-2])
            grad_scores = self.product(grads, values[:, rows].mT).mul_(weight)
            sums = self.product(grad_scores.mT, weights)
            grad_keys[:, rows] = sums[..., :-1] - keys_BLD[:, rows] * (scale_B11.square() * sums[..., -1:])
        return grad_keys, grad_values

    def _with_row_constant(self, x_BND: Tensor, constant_BN1: Tensor) -> Tensor:
        """[x, high, low] with constant = high + low: a bf16 product then adds a constant that was not rounded."""
        high = constant_BN1.to(self.low).to(self.work)
        return torch.cat([x_BND, high, constant_BN1 - high], -1).to(self.low)


class _TwoSoftmaxes(torch.autograd.Function):
    """Saves q, k, v, the output and one number per token and head; the points only where they are smaller than that."""

    @staticmethod
    def forward(
        ctx: Any, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, scale_H: Tensor, projection_HMD: Tensor,
        sequences: Sequences, normalize: bool, center: bool,
    ) -> Tensor:  # fmt: skip
        with torch.autocast(q_THD.device.type, enabled=False):
            kernel = _Kernel(q_THD, scale_H, projection_HMD, sequences)
            out_THD = torch.empty(v_THD.shape, dtype=v_THD.dtype, device=v_THD.device)
            lse_TH1 = torch.empty(*q_THD.shape[:2], 1, dtype=kernel.work, device=q_THD.device)
            kept: list[Tensor] = []
            for tile, weights_BMD, scale_B11 in kernel.tiles():
                keys_BLD = _read_side(tile, k_THD, normalize, center).x_BLD
                points = kernel.features_attend_to_keys(keys_BLD, tile.read(v_THD, kernel.work), scale_B11, weights_BMD)
                queries_BLD = _read_side(tile, q_THD, normalize, center=False).x_BLD
                for rows, out, lse in kernel.queries_attend_to_features(queries_BLD, points, weights_BMD):
                    tile.write(out_THD, rows, out)
                    tile.write(lse_TH1, rows, lse)
                if _worth_keeping(tile, kernel):
                    kept.extend(points)
        ctx.save_for_backward(q_THD, k_THD, v_THD, scale_H, projection_HMD, out_THD, lse_TH1, *kept)
        ctx.sequences, ctx.normalize, ctx.center = sequences, normalize, center
        return out_THD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_THD: Tensor) -> tuple[Tensor | None, ...]:
        q_THD, k_THD, v_THD, scale_H, projection_HMD, out_THD, lse_TH1, *kept = ctx.saved_tensors
        normalize, center = ctx.normalize, ctx.center
        grad_q_THD, grad_k_THD, grad_v_THD = (
            torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_THD, k_THD, v_THD)
        )
        saved = iter(kept)
        with torch.autocast(q_THD.device.type, enabled=False):
            kernel = _Kernel(q_THD, scale_H, projection_HMD, ctx.sequences)
            grad_scale_H = torch.zeros_like(kernel.scale_H11).flatten()
            for tile, weights_BMD, scale_B11 in kernel.tiles():
                if _worth_keeping(tile, kernel):
                    points = _Points(next(saved), next(saved))
                else:
                    keys_BLD = _read_side(tile, k_THD, normalize, center).x_BLD
                    values_BLD = tile.read(v_THD, kernel.work)
                    points = kernel.features_attend_to_keys(keys_BLD, values_BLD, scale_B11, weights_BMD)

                queries = _read_side(tile, q_THD, normalize, center=False)
                around = (tile.read(x, kernel.work) for x in (grad_THD, out_THD, lse_TH1))
                grad_BLD, grad_points, grad_mass = kernel.queries_backward(queries.x_BLD, points, weights_BMD, *around)
                along_B = _along(grad_BLD, queries.x_BLD)
                tile.write(grad_q_THD, slice(None), _side_backward(grad_BLD, queries, center=False))
                del queries, grad_BLD  # a tile of one long document is large: only one side of it is held at a time

                keys = _read_side(tile, k_THD, normalize, center)
                grad_BLD, grad_values_BLD = kernel.keys_backward(
                    keys.x_BLD, tile.read(v_THD, kernel.work), points, scale_B11, weights_BMD, grad_points, grad_mass
                )
                along_B += _along(grad_BLD, keys.x_BLD)
                tile.write(grad_v_THD, slice(None), grad_values_BLD)
                tile.write(grad_k_THD, slice(None), _side_backward(grad_BLD, keys, center))
                del keys, grad_BLD, grad_values_BLD

                # the kernel sees q and k only as scale * x, so the scale's gradient is <x, gradient at x> / scale
                along_B /= scale_B11.flatten()
                grad_scale_H[tile.heads] += along_B.unflatten(0, (tile.documents, -1)).sum(0)
        return grad_q_THD, grad_k_THD, grad_v_THD, grad_scale_H.to(scale_H.dtype), None, None, None, None


def _along(grad_BLD: Tensor, x_BLD: Tensor) -> Tensor:
    """(B): the inner product of each document's and head's rows."""
    return torch.linalg.vecdot(grad_BLD, x_BLD).sum(1)


def _worth_keeping(tile: Tile, kernel: _Kernel) -> bool:
    """A document shorter than the number of features has points larger than its output: those are computed twice."""
    return tile.length >= kernel.features
