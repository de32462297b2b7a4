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

Keys and queries may be centred first, which leaves exact attention alone and makes the estimate better:
exp(q.k) is, up to a factor of q, exp((q - a).(k - b)) exp(a.k). In the formulas above that adds (a + b).k_j to the
scores of the keys and takes w_m.(a + b) from z_m, so only the sum matters: the shift s = mean key (+ mean query).

Shapes: T tokens, H heads, D head size, M features, L length, B documents x heads of one tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dstrain.model.attention.blocked import LOG2E, UNIT_EPS, Tile, product_dtype, scratch, tiles, unit, work_dtype
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
    center_queries: bool = False
    """Subtract a document's mean query too, and hand what it scores back to the keys exactly."""
    projections: Literal["isotropic", "fitted"] = "isotropic"
    """`fitted`: draw more projections along the directions in which a head's queries and keys vary, and weigh each by
    how much oftener it was drawn (importance sampling). What varies is measured at the start of every stage."""

    @property
    def tied_qk(self) -> bool:
        """Queries and keys have projections of their own."""
        return False

    @property
    def shift(self) -> Literal["none", "keys", "queries", "both"]:
        """Whose means are subtracted."""
        if self.center_keys:
            return "both" if self.center_queries else "keys"
        return "queries" if self.center_queries else "none"

    def build(self, num_heads: int, head_dim: int, layer: int, seed: int) -> Favor:
        """The kernel with the projections of (seed, layer, redraw 0)."""
        return Favor(self, num_heads, head_dim, layer, seed)


class Favor(nn.Module):
    """FAVOR+ within each document. Its projections are saved with the weights and stay fp32 in a half model."""

    projection_HMD: Tensor
    offset_HM: Tensor
    """Log of the weight of each projection: 0 unless they are fitted."""
    redraw: Tensor
    spread_HDD: Tensor
    """For fitted projections, the factor that an isotropic draw is multiplied by."""

    def __init__(self, settings: FavorSettings, num_heads: int, head_dim: int, layer: int, seed: int) -> None:
        super().__init__()
        self.settings, self.num_heads, self.head_dim, self.layer, self.seed = settings, num_heads, head_dim, layer, seed
        self.register_buffer("projection_HMD", self._draw(0))
        self.register_buffer("offset_HM", torch.zeros_like(self.projection_HMD[..., 0]))
        self.register_buffer("redraw", torch.zeros((), dtype=torch.int64))
        self._program = "Triton where it can" if torch.cuda.is_available() else "blocked PyTorch, recomputed in backward"
        self._drawn = 0  # what `redraw` holds, known without asking a GPU
        self.register_load_state_dict_post_hook(_remember_redraw)
        if settings.projections == "fitted":
            self.register_buffer("spread_HDD", torch.eye(head_dim).repeat(num_heads, 1, 1))
        if settings.normalize_qk:
            self.log_temperature_H = nn.Parameter(torch.full((num_heads,), math.log(settings.temperature)))

    def forward(self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, sequences: Sequences) -> Tensor:
        """(T, H, D) of v's dtype."""
        settings, inputs = self.settings, (q_THD, k_THD, v_THD, self._scale(q_THD), self.projection_HMD, self.offset_HM)
        if q_THD.is_cuda:
            from dstrain.model.attention import favor_triton, triton_tools  # triton takes a second to import

            obstacle = triton_tools.why_not(q_THD)
            self._program = "Triton" if obstacle is None else f"blocked PyTorch: {obstacle}"
            if obstacle is None:
                return favor_triton.favor_attention(*inputs, sequences, settings.normalize_qk, settings.shift)
        return _TwoSoftmaxes.apply(*inputs, sequences, settings)

    def set_step(self, step: int) -> None:
        """New projections when the schedule asks for them; called between optimizer steps, never inside one."""
        if self.settings.redraw_interval is None:
            return
        number = step // self.settings.redraw_interval
        if number != self._drawn:
            self.redraw.fill_(number)
            self._drawn = number
            self._set_projection()

    @torch.no_grad()
    def adapt(self, q_THD: Tensor, k_THD: Tensor, sequences: Sequences) -> None:
        """Fits the projections, if they are to be fitted, to such queries and keys as these."""
        if self.settings.projections == "fitted":
            normalize, square_H = self.settings.normalize_qk, self._scale(q_THD).double().square().cpu()
            covariance_HDD = _covariance(q_THD, sequences, normalize) + _covariance(k_THD, sequences, normalize)
            if covariance_HDD.isfinite().all():  # the loss of a model that has diverged says so
                self.spread_HDD.copy_(spread(covariance_HDD * square_H[:, None, None]))
                self._set_projection()

    @property
    def kernel(self) -> str:
        """What runs here."""
        return f"two softmaxes through {self.settings.nb_features} features ({self._program})"

    def flops(self, lengths: Sequence[int]) -> int:
        """Multiplications and additions of one forward pass over documents of these lengths: four products, of which
        pairs share two."""
        pairs = math.ceil(self.settings.nb_features / 2) if self.settings.antithetic else self.settings.nb_features
        return 4 * sum(lengths) * self.num_heads * (self.settings.nb_features + pairs) * self.head_dim

    def _scale(self, like: Tensor) -> Tensor:
        if self.settings.normalize_qk:
            return torch.exp(self.log_temperature_H.to(work_dtype(like)) / 2)
        return like.new_full((self.num_heads,), self.head_dim**-0.25, dtype=work_dtype(like))

    def _draw(self, number: int) -> Tensor:
        rng = generator("favor", self.seed, self.layer, number)
        return draw_projection(self.settings, self.num_heads, self.head_dim, rng)

    def _set_projection(self) -> None:
        drawn_HMD = self._draw(self._drawn).to(self.projection_HMD.device)
        if self.settings.projections == "fitted":
            fitted_HMD = drawn_HMD @ self.spread_HDD.mT
            # the density of N(0, I) over that of N(0, B B^T), where B w was drawn
            self.offset_HM.copy_((drawn_HMD.square() - fitted_HMD.square()).sum(-1) / 2)
            drawn_HMD = fitted_HMD
        else:
            self.offset_HM.zero_()  # inherited weights may have been fitted
        self.projection_HMD.copy_(drawn_HMD)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Favor:
        exact = dict(self.named_buffers())  # .half() and .bfloat16() would round them, and orthogonality with them
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
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


def spread(covariance_HDD: Tensor) -> Tensor:
    """(H, D, D) fp32: B such that projections B w follow N(0, B B^T), with B B^T proportional to I + covariance and of
    determinant 1.

    Likhosherstov et al. (2022, https://arxiv.org/abs/2205.15317; 2023, https://arxiv.org/abs/2302.00787) find the
    features of least variance in closed form; this is importance sampling with their quadratic form. The determinant is
    held because without it structureless inputs lose what structured ones win.
    """
    identity = torch.eye(covariance_HDD.shape[-1], dtype=torch.float64)
    factor_HDD = torch.linalg.cholesky(covariance_HDD + identity)
    log_diagonal_HD = factor_HDD.diagonal(dim1=-2, dim2=-1).log()
    return (factor_HDD / log_diagonal_HD.mean(-1).exp()[:, None, None]).float()


def _covariance(x_THD: Tensor, sequences: Sequences, normalize: bool) -> Tensor:
    """(H, D, D) fp64 on the CPU: how queries or keys vary around the mean of their document."""
    x_THD = x_THD.double().cpu()
    if normalize:
        x_THD = unit(x_THD)[0]
    documents = x_THD.split(sequences.lengths)
    centred_THD = torch.cat([document - document.mean(0) for document in documents])
    return torch.einsum("thd,the->hde", centred_THD, centred_THD) / len(centred_THD)


# ------------------------------------------------------------------------------------------------- the kernel


class _Side:
    """Queries or keys before the scale: as given, or as unit vectors."""

    def __init__(self, x_THD: Tensor, normalize: bool) -> None:
        self.x_THD, self.work = x_THD, work_dtype(x_THD)
        square_TH1 = torch.linalg.vector_norm(x_THD, dim=-1, keepdim=True, dtype=self.work).square_()
        self.inverse_TH1 = (square_TH1 + UNIT_EPS).rsqrt_() if normalize else None
        self.half_square_TH1 = square_TH1.mul_(0.5)
        if self.inverse_TH1 is not None:
            self.half_square_TH1 *= self.inverse_TH1.square()

    def read(self, tile: Tile, rows: slice) -> Tensor:
        """(B, L, D)."""
        x_BLD = tile.read(self.x_THD, rows, self.work)
        return x_BLD if self.inverse_TH1 is None else x_BLD * tile.read(self.inverse_TH1, rows, self.work)

    def half_squares(self, tile: Tile, rows: slice) -> Tensor:
        """(B, L, 1): |x|^2 / 2."""
        return tile.read(self.half_square_TH1, rows, self.work)

    def write_gradient(self, tile: Tile, rows: slice, grad_THD: Tensor, grad_BLD: Tensor, x_BLD: Tensor) -> Tensor:
        """Writes the gradient at what was given, from that at what was read, whose part along x is returned: (B, L).

        A unit vector cannot grow, so that part is lost; the rest shrinks by the length that was divided out.
        """
        along_BL = torch.linalg.vecdot(grad_BLD, x_BLD)
        if self.inverse_TH1 is not None:
            grad_BLD.addcmul_(x_BLD, along_BL.unsqueeze(-1), value=-1)
            grad_BLD *= tile.read(self.inverse_TH1, rows, self.work)
        tile.write(grad_THD, rows, grad_BLD)
        return along_BL

    def add_gradient(self, tile: Tile, rows: slice, grad_THD: Tensor, grad_B1D: Tensor) -> None:
        """Adds the gradient at what was given from one that all rows read have in common."""
        x_BLD = self.read(tile, rows)
        total_BLD = tile.read(grad_THD, rows, self.work)
        if self.inverse_TH1 is None:
            total_BLD = total_BLD + grad_B1D
        else:
            lost_BLD = x_BLD * torch.bmm(x_BLD, grad_B1D.mT)
            total_BLD = total_BLD + (grad_B1D - lost_BLD) * tile.read(self.inverse_TH1, rows, self.work)
        tile.write(grad_THD, rows, total_BLD)


class _Points(NamedTuple):
    """The M inducing points of each document and head."""

    shift_B1D: Tensor
    """s, before the scale."""
    peak_BM1: Tensor
    """Each feature's log-sum-exp over the keys, in base 2."""
    mass_BM1: Tensor
    """z in base 2."""
    values_BMD: Tensor
    """A."""


class _Kernel:
    """The blocks of one forward or backward pass: all heads of a tile's documents at once, some rows at a time."""

    def __init__(
        self, settings: FavorSettings, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor,
        scale_H: Tensor, projection_HMD: Tensor, offset_HM: Tensor, sequences: Sequences,
    ) -> None:  # fmt: skip
        self.settings, self.sequences = settings, sequences
        self.work, self.low = work_dtype(q_THD), product_dtype(q_THD)
        self.num_heads, self.features, head_dim = projection_HMD.shape
        self.pairs = math.ceil(self.features / 2) if settings.antithetic else self.features
        self.queries, self.keys = (_Side(x_THD, settings.normalize_qk) for x_THD in (q_THD, k_THD))
        self.v_THD = v_THD
        self.scale_H11 = scale_H.to(self.work)[:, None, None]
        self.weights_HPD = projection_HMD[:, : self.pairs].to(self.work) * self.scale_H11
        self.offset_HM1 = offset_HM.to(self.work).unsqueeze(-1)
        scores = 1 << 20 if q_THD.device.type == "cpu" else 1 << 26  # a CPU wants its caches, a GPU few launches
        self.rows_per_block = max(32, scores // (self.num_heads * max(self.features, 4 * head_dim)))

    def tiles(self) -> Iterator[tuple[Tile, _Attention]]:
        """Each tile and the two attentions in it."""
        for tile in tiles(self.sequences, self.rows_per_block):
            yield tile, _Attention(self, tile)

    def blocks(self, tile: Tile) -> Iterator[slice]:
        """Rows of each of the tile's documents."""
        for first in range(0, tile.length, self.rows_per_block):
            yield slice(first, min(first + self.rows_per_block, tile.length))

    @property
    def centred(self) -> list[_Side]:
        """What the shift is the mean of."""
        return [self.keys] * self.settings.center_keys + [self.queries] * self.settings.center_queries

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """a @ b, multiplied in the product dtype, kept in the working dtype."""
        return torch.bmm(a.to(self.low), b.to(self.low)).to(self.work)

    def score_gradients(self, a_BMD: Tensor, b_BLD: Tensor) -> Tensor:
        """(B, M, L): a @ b^T, as `product`."""
        out = scratch("favor gradients", (*a_BMD.shape[:2], b_BLD.shape[1]), self.low, a_BMD.device)
        return torch.bmm(a_BMD.to(self.low), b_BLD.mT.to(self.low), out=out).to(self.work)


class _Attention:
    """Both attentions of one tile, block by block."""

    def __init__(self, kernel: _Kernel, tile: Tile) -> None:
        self.kernel, self.tile = kernel, tile
        self.weights_BPD = tile.per_head(kernel.weights_HPD)
        self.square_B11 = tile.per_head(kernel.scale_H11).square()

    def scores(self, x_BLD: Tensor, bias: Tensor, bias_of_pair: Tensor) -> Tensor:
        """(B, M, L) in base 2: bias + w_m.x_i. Of a pair w, -w only the first is multiplied out: the two scores add up
        to the sum of their biases, `bias_of_pair`."""
        kernel = self.kernel
        shape = (len(x_BLD), kernel.features, x_BLD.shape[1])
        scores = scratch("favor scores", shape, kernel.work, x_BLD.device)
        first, second = scores[:, : kernel.pairs], scores[:, kernel.pairs :]
        torch.baddbmm(bias, self.weights_BPD, x_BLD.mT, alpha=LOG2E, out=first)
        torch.sub(bias_of_pair, first[:, : second.shape[1]], out=second)
        return scores

    def key_scores(self, keys_BLD: Tensor, rows: slice, shift_B1D: Tensor) -> Tensor:
        """(B, M, L): w_m.k_j + s.k_j - |k_j|^2/2."""
        bias_BL1 = torch.bmm(keys_BLD, shift_B1D.mT) - self.kernel.keys.half_squares(self.tile, rows)
        bias_B1L = bias_BL1.mul_(self.square_B11 * LOG2E).mT
        return self.scores(keys_BLD, bias_B1L, 2 * bias_B1L)

    def query_scores(self, queries_BLD: Tensor, mass_BM1: Tensor) -> Tensor:
        """(B, M, L): w_m.q_i + z_m."""
        first, second = mass_BM1[:, : self.kernel.pairs], mass_BM1[:, self.kernel.pairs :]
        return self.scores(queries_BLD, first, first[:, : second.shape[1]] + second)

    def along_weights(self, x_BMX: Tensor) -> Tensor:
        """(B, X, D): sum_m x_m w_m; overwrites x."""
        first, second = x_BMX[:, : self.kernel.pairs], x_BMX[:, self.kernel.pairs :]
        first[:, : second.shape[1]] -= second
        return self.kernel.product(first.mT, self.weights_BPD)

    def shift(self) -> Tensor:
        """(B, 1, D): s."""
        kernel, tile = self.kernel, self.tile
        total_B1D = self.weights_BPD.new_zeros(len(self.weights_BPD), 1, self.weights_BPD.shape[2])
        for side in kernel.centred:
            for rows in kernel.blocks(tile):
                total_B1D += side.read(tile, rows).sum(1, keepdim=True)
        return total_B1D / tile.length

    def points(self) -> _Points:
        """Features attend to keys, with a running peak as the sums go through the blocks."""
        kernel, tile, shift_B1D = self.kernel, self.tile, self.shift()
        peak = self.weights_BPD.new_full((len(self.weights_BPD), kernel.features, 1), -math.inf)
        total = torch.zeros_like(peak)
        sums = total.new_zeros(*total.shape[:2], kernel.v_THD.shape[2])
        for rows in kernel.blocks(tile):
            scores = self.key_scores(kernel.keys.read(tile, rows), rows, shift_B1D)
            higher = torch.maximum(peak, scores.amax(2, keepdim=True))
            shrink = torch.exp2(peak - higher)
            weight, peak = scores.sub_(higher).exp2_(), higher
            total.mul_(shrink).add_(weight.sum(2, keepdim=True))
            sums.mul_(shrink).add_(kernel.product(weight, tile.read(kernel.v_THD, rows, kernel.work)))
        peak = peak + total.log2()
        along_BP1 = torch.bmm(self.weights_BPD, shift_B1D.mT) * LOG2E
        along_BM1 = torch.cat([along_BP1, -along_BP1[:, : kernel.features - kernel.pairs]], 1)
        mass_BM1 = peak - along_BM1 + tile.per_head(kernel.offset_HM1) * LOG2E
        return _Points(shift_B1D, peak, mass_BM1, sums / total)

    def outputs(self, rows: slice, points: _Points) -> tuple[Tensor, Tensor]:
        """Queries attend to features: outputs (B, L, D) and their log2 of the sum of exponentials (B, L, 1)."""
        kernel = self.kernel
        scores = self.query_scores(kernel.queries.read(self.tile, rows), points.mass_BM1)
        peak = scores.amax(1, keepdim=True)
        weight = scores.sub_(peak).exp2_()
        total = weight.sum(1, keepdim=True)
        return kernel.product(weight.mT, points.values_BMD).div_(total.mT), (peak + total.log2()).mT


class _Gradients:
    """The backward pass of one tile: first the queries, then the keys, then what both owe to the shift."""

    def __init__(self, attention: _Attention, points: _Points) -> None:
        self.attention, self.kernel, self.tile, self.points = attention, attention.kernel, attention.tile, points
        self.values_BMD = torch.zeros_like(points.values_BMD)
        self.mass_BM1 = torch.zeros_like(points.mass_BM1)
        self.shift_B1D = torch.zeros_like(points.shift_B1D)
        self.along_B = torch.zeros_like(points.shift_B1D[:, 0, 0])
        """The sum of <x, gradient at x> over queries and keys."""

    def of_queries(self, grad_THD: Tensor, out_THD: Tensor, lse_TH1: Tensor, grad_q_THD: Tensor) -> None:
        """Writes the gradient at q, collects those at A and z."""
        kernel, tile, attention = self.kernel, self.tile, self.attention
        # features differ little in what they hold; what all hold would drown the differences in a bf16 product
        common_B1D = self.points.values_BMD.mean(1, keepdim=True)
        values_BMD = self.points.values_BMD - common_B1D
        for rows in kernel.blocks(tile):
            queries_BLD = kernel.queries.read(tile, rows)
            grad_BLD, out_BLD, lse_BL1 = (tile.read(x, rows, kernel.work) for x in (grad_THD, out_THD, lse_TH1))
            lse_B1L = lse_BL1.mT.contiguous()
            weight = attention.query_scores(queries_BLD, self.points.mass_BM1).sub_(lse_B1L).exp2_()
            self.values_BMD += kernel.product(weight, grad_BLD)
            along_BL1 = torch.linalg.vecdot(grad_BLD, out_BLD - common_B1D).unsqueeze(-1)
            scores = kernel.score_gradients(values_BMD, grad_BLD).sub_(along_BL1.mT).mul_(weight)
            self.mass_BM1 += scores.sum(2, keepdim=True)
            grad_BLD = attention.along_weights(scores)
            self.along_B += kernel.queries.write_gradient(tile, rows, grad_q_THD, grad_BLD, queries_BLD).sum(1)

    def of_keys(self, grad_k_THD: Tensor, grad_v_THD: Tensor) -> None:
        """Writes the gradients at k and v, collects that at the shift."""
        kernel, tile, attention, points = self.kernel, self.tile, self.attention, self.points
        constant_BM1 = self.mass_BM1 - torch.linalg.vecdot(self.values_BMD, points.values_BMD).unsqueeze(-1)
        for rows in kernel.blocks(tile):
            keys_BLD, values_BLD = kernel.keys.read(tile, rows), tile.read(kernel.v_THD, rows, kernel.work)
            weight = attention.key_scores(keys_BLD, rows, points.shift_B1D).sub_(points.peak_BM1).exp2_()
            tile.write(grad_v_THD, rows, kernel.product(weight.mT, self.values_BMD))
            scores = kernel.score_gradients(self.values_BMD, values_BLD).add_(constant_BM1).mul_(weight)
            bias_B1L = scores.sum(1, keepdim=True).mul_(attention.square_B11)
            grad_BLD = attention.along_weights(scores).addcmul_(bias_B1L.mT, points.shift_B1D - keys_BLD)
            self.shift_B1D -= grad_BLD.sum(1, keepdim=True)  # the kernel sees keys only as k - s
            self.along_B += kernel.keys.write_gradient(tile, rows, grad_k_THD, grad_BLD, keys_BLD).sum(1)

    def of_shift(self, grad_q_THD: Tensor, grad_k_THD: Tensor) -> None:
        """Adds its share of the shift's gradient to every query and key that the shift is a mean of."""
        kernel, tile = self.kernel, self.tile
        share_B1D = self.shift_B1D / tile.length
        grads = {kernel.queries: grad_q_THD, kernel.keys: grad_k_THD}
        for side in kernel.centred:
            for rows in kernel.blocks(tile):
                side.add_gradient(tile, rows, grads[side], share_B1D)
        self.along_B += torch.linalg.vecdot(self.shift_B1D, self.points.shift_B1D).squeeze(1)


class _TwoSoftmaxes(torch.autograd.Function):
    """Saves q, k, v, the output and one number per token and head; the points only where they are smaller than that."""

    @staticmethod
    def forward(
        ctx: Any, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, scale_H: Tensor, projection_HMD: Tensor,
        offset_HM: Tensor, sequences: Sequences, settings: FavorSettings,
    ) -> Tensor:  # fmt: skip
        with torch.autocast(q_THD.device.type, enabled=False):
            kernel = _Kernel(settings, q_THD, k_THD, v_THD, scale_H, projection_HMD, offset_HM, sequences)
            out_THD = torch.empty(v_THD.shape, dtype=v_THD.dtype, device=v_THD.device)
            lse_TH1 = torch.empty(*q_THD.shape[:2], 1, dtype=kernel.work, device=q_THD.device)
            kept: list[Tensor] = []
            for tile, attention in kernel.tiles():
                points = attention.points()
                for rows in kernel.blocks(tile):
                    out_BLD, lse_BL1 = attention.outputs(rows, points)
                    tile.write(out_THD, rows, out_BLD)
                    tile.write(lse_TH1, rows, lse_BL1)
                if _worth_keeping(tile, kernel):
                    kept.extend(points)
        ctx.save_for_backward(q_THD, k_THD, v_THD, scale_H, projection_HMD, offset_HM, out_THD, lse_TH1, *kept)
        ctx.sequences, ctx.settings = sequences, settings
        return out_THD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_THD: Tensor) -> tuple[Tensor | None, ...]:
        q_THD, k_THD, v_THD, scale_H, projection_HMD, offset_HM, out_THD, lse_TH1, *kept = ctx.saved_tensors
        grad_q_THD, grad_k_THD, grad_v_THD = (
            torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_THD, k_THD, v_THD)
        )
        saved = iter(kept)
        with torch.autocast(q_THD.device.type, enabled=False):
            kernel = _Kernel(ctx.settings, q_THD, k_THD, v_THD, scale_H, projection_HMD, offset_HM, ctx.sequences)
            grad_scale_H = torch.zeros_like(kernel.scale_H11).flatten()
            for tile, attention in kernel.tiles():
                keeps = _worth_keeping(tile, kernel)
                points = _Points(*(next(saved) for _ in _Points._fields)) if keeps else attention.points()
                gradients = _Gradients(attention, points)
                gradients.of_queries(grad_THD, out_THD, lse_TH1, grad_q_THD)
                gradients.of_keys(grad_k_THD, grad_v_THD)
                gradients.of_shift(grad_q_THD, grad_k_THD)
                grad_scale_H += gradients.along_B.unflatten(0, (tile.documents, -1)).sum(0)
            # the kernel sees q and k only as scale * x, so the scale's gradient is <x, gradient at x> / scale
            grad_scale_H /= kernel.scale_H11.flatten()
        return grad_q_THD, grad_k_THD, grad_v_THD, grad_scale_H.to(scale_H.dtype), None, None, None, None


def _worth_keeping(tile: Tile, kernel: _Kernel) -> bool:
    """A document shorter than the number of features has points larger than its output: those are computed twice."""
    return tile.length >= kernel.features
