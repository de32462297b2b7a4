"""FAVOR+: the blocked two-softmax kernel against the textbook, its estimator, and the life of its projections."""

from __future__ import annotations

import math

import pytest
import torch

from dstrain.model.attention import blocked, favor
from dstrain.model.attention.draws import generator
from dstrain.model.attention.favor import FavorSettings, draw_projection
from dstrain.packed import Sequences

PLAIN = {"normalize_qk": False, "center_keys": False, "center_queries": False}


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def reference(module, q_LHD, k_LHD, v_LHD):
    """The textbook: phi(q) (phi(k)^T v) over phi(q) sum phi(k), with phi(x) = exp(w.x - |x|^2/2); one document."""
    settings = module.settings
    if settings.normalize_qk:
        scale = (module.log_temperature_H.double() / 2).exp()[:, None]
        q, k = (x / (x.square().sum(-1, keepdim=True) + blocked.UNIT_EPS).sqrt() * scale for x in (q_LHD, k_LHD))
    else:
        q, k = (x * x.shape[-1] ** -0.25 for x in (q_LHD, k_LHD))
    held_back = torch.ones(q.shape[1], len(k), 1, dtype=q.dtype)
    if settings.center_queries:
        held_back = torch.einsum("hd,lhd->hl", q.mean(0), k).exp().unsqueeze(-1)
        q = q - q.mean(0, keepdim=True)
    if settings.center_keys:
        k = k - k.mean(0, keepdim=True)

    def phi(x):
        along = torch.einsum("lhd,hmd->hlm", x, module.projection_HMD.double())
        return torch.exp(along - x.square().sum(-1).T[..., None] / 2)

    phi_k = phi(k) * held_back * module.offset_HM.double().exp().unsqueeze(1)
    numerator = phi(q) @ (phi_k.mT @ v_LHD.transpose(0, 1))
    denominator = phi(q) @ phi_k.sum(1)[..., None]
    return (numerator / denominator).transpose(0, 1)


def exact(q, k, v, scale):
    weights = (torch.einsum("ihd,jhd->hij", q, k) * scale).softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, v)


def relative(x, truth):
    return float((x.double() - truth).norm() / truth.norm())


VARIANTS = [
    {}, PLAIN, {"feature_norm": "chi", "antithetic": False}, {"normalize_qk": False}, {"center_keys": False},
    {"center_queries": True}, {"center_queries": True, "center_keys": False, "normalize_qk": False},
    {"projections": "fitted"}, {"projections": "fitted", "normalize_qk": False, "feature_norm": "chi"},
]  # fmt: skip


@pytest.mark.parametrize("more", VARIANTS)
@pytest.mark.parametrize("features", [5, 40])
def test_equals_the_textbook_where_the_textbook_does_not_overflow(more, features):
    lengths = [23, 23, 70]
    module = FavorSettings(nb_features=features, **more).build(2, 8, 0, 0)
    q, k, v = normal(3, sum(lengths), 2, 8)
    module.adapt(q, k, Sequences.of(lengths))
    out = module(q, k, v, Sequences.of(lengths)).split(lengths)
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    for mine, part in zip(out, parts, strict=True):
        torch.testing.assert_close(mine, reference(module, *part), rtol=0, atol=1e-12)


def test_blocks_and_tiles_are_only_a_tiling(monkeypatch):
    lengths = [50, 50, 50, 9, 200]
    module = FavorSettings(nb_features=12).build(4, 8, 0, 0)
    weight = normal(sum(lengths), 4, 8, seed=9)

    def run():
        q, k, v = normal(3, sum(lengths), 4, 8).requires_grad_().unbind(0)
        out = module(q, k, v, Sequences.of(lengths))
        return [out, *torch.autograd.grad((out * weight).sum(), [q, k, v, module.log_temperature_H])]

    whole = run()

    class Tiny(favor._Kernel):
        def __init__(self, *inputs):
            super().__init__(*inputs)
            self.rows_per_block = 16

    monkeypatch.setattr(favor, "_Kernel", Tiny)
    for mine, one in zip(run(), whole, strict=True):
        torch.testing.assert_close(mine, one, rtol=1e-9, atol=1e-10)


def test_bf16_products_on_hardware_that_has_them_stay_close(monkeypatch):
    low = [x.bfloat16() for x in normal(3, 90, 2, 8)]

    def run(*inputs):
        module = FavorSettings(nb_features=32, **PLAIN).build(2, 8, 0, 0)
        inputs = [x.detach().clone().requires_grad_() for x in inputs]
        out = module(*inputs, Sequences.of([90]))
        out.square().sum().backward()
        return [out.detach(), *(x.grad for x in inputs)]

    truth = run(*(x.double() for x in low))
    monkeypatch.setattr(blocked, "multiplies_bf16", lambda device: True)
    for mine, true in zip(run(*low), truth, strict=True):
        assert mine.dtype == torch.bfloat16 and relative(mine, true) < 2e-2


def test_no_denominator_vanishes_where_the_textbook_has_nothing_left():
    """At these norms exp(-|q|^2/2) underflows even in fp64; the reference study's clamp made such outputs zero."""
    q, k, v = normal(3, 50, 2, 8, dtype=torch.float32)
    module = FavorSettings(nb_features=64, **PLAIN).build(2, 8, 0, 0)
    out = module(100 * q, 100 * k, v, Sequences.of([50]))
    assert reference(module, 100 * q.double(), 100 * k.double(), v.double()).isnan().any()
    assert (out <= v.amax(0) + 1e-5).all() and (out >= v.amin(0) - 1e-5).all() and out.norm() > 0.3 * v.norm()


def test_duplicating_every_key_changes_nothing():
    module = FavorSettings(nb_features=16).build(2, 8, 0, 0)
    q, k, v = normal(3, 30, 2, 8)
    once = module(q, k, v, Sequences.of([30]))
    twice = module(*(torch.cat([x, x]) for x in (q, k, v)), Sequences.of([60]))
    torch.testing.assert_close(twice[:30], once, rtol=0, atol=1e-12)


def test_centred_keys_are_blind_to_a_shared_bias():
    module = FavorSettings(nb_features=16, normalize_qk=False).build(2, 8, 0, 0)
    q, k, v = normal(3, 30, 2, 8)
    shifted = module(q, k + normal(1, 2, 8, seed=4), v, Sequences.of([30]))
    torch.testing.assert_close(shifted, module(q, k, v, Sequences.of([30])), rtol=0, atol=1e-12)


def biased(scale):
    """Queries and keys with means of their own, and most of their variance in a quarter of the directions."""
    q, k, v = normal(3, 256, 4, 32)
    wide = torch.tensor([2.0] * 8 + [0.3] * 24, dtype=torch.float64)
    return (q * wide + normal(4, 32, seed=1)) * scale, (k * wide + normal(4, 32, seed=2)) * scale, v


def test_centring_and_fitting_each_bring_the_estimate_closer():
    q, k, v = biased(0.6)
    truth = exact(q, k, v, 32**-0.5)

    def error(**more):
        module = FavorSettings(nb_features=128, normalize_qk=False, **more).build(4, 32, 0, 0)
        module.adapt(q, k, Sequences.of([256]))
        return relative(module(q, k, v, Sequences.of([256])), truth)

    plain, keys, both = error(center_keys=False), error(), error(center_queries=True)
    fitted = error(center_queries=True, projections="fitted")
    assert fitted < 0.95 * both and both < 0.85 * keys and keys < 0.95 * plain, (fitted, both, keys, plain)


def test_fitted_projections_estimate_the_kernel_without_bias():
    x, y = normal(2, 6, seed=2) * 0.5
    settings = FavorSettings(nb_features=6, feature_norm="chi", antithetic=False, projections="fitted")
    module = settings.build(20_000, 6, 0, 0)
    q = (normal(50, 1, 6) * torch.tensor([1.5, 1, 1, 0.8, 0.6, 0.5])).expand(50, 20_000, 6)
    module.adapt(q, q, Sequences.of([50]))
    assert abs(float(module.spread_HDD[0].double().det()) - 1) < 1e-5
    w, c = module.projection_HMD.double(), module.offset_HM.double()
    estimate = (torch.exp(w @ (x + y) - x @ x / 2 - y @ y / 2 + c)).mean()
    assert abs(estimate / torch.exp(x @ y) - 1) < 0.06  # three standard errors
    assert abs(c.exp().mean() - 1) < 0.01, "how often, times how much each counts"


def test_fitted_projections_are_saved_and_redrawn_with_what_they_were_fitted_to():
    q, k, _ = biased(1.0)
    settings = FavorSettings(nb_features=8, projections="fitted", redraw_interval=10)
    module = settings.build(4, 32, 0, 0)
    before = module.projection_HMD.clone()
    module.adapt(q, k, Sequences.of([200, 56]))
    assert not torch.equal(module.projection_HMD, before)
    resumed = settings.build(4, 32, 0, 0)
    resumed.load_state_dict(module.state_dict())
    for step in (5, 15):
        module.set_step(step)
        resumed.set_step(step)
        assert torch.equal(resumed.projection_HMD, module.projection_HMD)
        assert torch.equal(resumed.offset_HM, module.offset_HM) and module.offset_HM.abs().max() > 0


def test_fitting_looks_at_unit_vectors_where_the_kernel_does():
    q, k, _ = biased(1.0)
    long = normal(256, 1, 1, seed=3).exp() ** 3
    module, other = (FavorSettings(nb_features=8, projections="fitted").build(4, 32, 0, 0) for _ in range(2))
    module.adapt(q, k, Sequences.of([256]))
    other.adapt((q * long).requires_grad_(), k * 7, Sequences.of([256]))
    torch.testing.assert_close(module.spread_HDD, other.spread_HDD, rtol=1e-4, atol=1e-4)


def test_fitting_is_done_in_fp64_whatever_the_model_computes_in():
    low = [x.bfloat16() for x in biased(1.0)[:2]]
    module, other = (FavorSettings(nb_features=8, projections="fitted").build(4, 32, 0, 0) for _ in range(2))
    module.adapt(*low, Sequences.of([256]))
    other.adapt(*(x.double() for x in low), Sequences.of([256]))
    assert torch.equal(module.spread_HDD, other.spread_HDD)


def test_the_shift_is_named_after_whose_means_are_subtracted():
    named = {(c, q): FavorSettings(center_keys=c, center_queries=q).shift for c in (False, True) for q in (False, True)}
    assert list(named.values()) == ["none", "queries", "keys", "both"]


def test_isotropic_projections_do_not_adapt():
    q, k, _ = biased(1.0)
    module = FavorSettings(nb_features=8).build(4, 32, 0, 0)
    before = module.projection_HMD.clone()
    module.adapt(q, k, Sequences.of([256]))
    assert torch.equal(module.projection_HMD, before) and module.offset_HM.abs().max() == 0


def test_isotropic_projections_drawn_over_inherited_fitted_ones_count_alike():
    q, k, _ = biased(1.0)
    fitted = FavorSettings(nb_features=8, projections="fitted").build(4, 32, 0, 0)
    fitted.adapt(q, k, Sequences.of([256]))
    inherited = {name: value for name, value in fitted.state_dict().items() if name != "spread_HDD"}
    module = FavorSettings(nb_features=8, redraw_interval=10).build(4, 32, 0, 0)
    module.load_state_dict(inherited)
    assert module.offset_HM.abs().max() > 0
    module.set_step(10)
    assert module.offset_HM.abs().max() == 0


def error(features, scale, **more):
    q, k, v = normal(3, 256, 4, 32)
    q, k = q * scale, k * scale
    module = FavorSettings(nb_features=features, normalize_qk=False, **more).build(4, 32, 0, 0)
    with torch.no_grad():
        out = module(q, k, v, Sequences.of([256]))
    return relative(out, exact(q, k, v, 32**-0.5))


def test_more_features_come_closer_to_softmax_and_the_defaults_beat_the_textbook_draw():
    errors = [error(features, 0.25) for features in (16, 64, 256, 1024)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0] / 8
    for scale in (0.25, 0.5, 0.75):
        assert error(256, scale) < error(256, scale, feature_norm="chi", antithetic=False)


def test_at_the_starting_temperature_the_estimator_beats_uniform_averaging():
    q, k, v = normal(3, 256, 4, 32)
    with torch.no_grad():
        out = FavorSettings().build(4, 32, 0, 0)(q, k, v, Sequences.of([256]))
    truth = exact(*(x / x.norm(dim=-1, keepdim=True) for x in (q, k)), v, FavorSettings().temperature)
    assert relative(out, truth) < 0.6 * relative(v.mean(0, keepdim=True).expand_as(v), truth)


def test_the_textbook_draw_estimates_the_kernel_without_bias():
    x, y = normal(2, 6, seed=2) * 0.5
    settings = FavorSettings(nb_features=6, feature_norm="chi", antithetic=False)
    w = draw_projection(settings, 4000, 6, generator("test")).double()
    estimate = (torch.exp(w @ x - x @ x / 2) * torch.exp(w @ y - y @ y / 2)).mean()
    assert abs(estimate / torch.exp(x @ y) - 1) < 0.02


def test_projections_are_orthogonal_paired_uniform_and_of_the_right_length():
    w = draw_projection(FavorSettings(nb_features=32), 500, 8, generator("test")).double()
    assert w.shape == (500, 32, 8)
    products = w[:, :8] @ w[:, :8].mT
    torch.testing.assert_close(products, 8 * torch.eye(8).double().expand_as(products), rtol=0, atol=1e-5)
    assert torch.equal(w[:, 16:], -w[:, :16])
    one_sided = draw_projection(FavorSettings(nb_features=8, antithetic=False), 3000, 8, generator("test"))
    assert one_sided.mean(0).abs().max() < 5 * math.sqrt(1 / 3000), "Haar: no direction is preferred"
    gaussian = FavorSettings(nb_features=8, antithetic=False, feature_norm="chi")
    chi = draw_projection(gaussian, 3000, 8, generator("test"))
    assert abs(float(chi.square().sum(-1).mean()) - 8) < 0.2 and chi.norm(dim=-1).std() > 0.5
    assert draw_projection(FavorSettings(nb_features=5), 2, 8, generator("test")).shape == (2, 5, 8)


def test_heads_layers_seeds_and_redraws_have_projections_of_their_own():
    def projection(layer=0, seed=0, step=0):
        module = FavorSettings(nb_features=8, redraw_interval=10).build(2, 8, layer, seed)
        module.set_step(step)
        return module.projection_HMD

    assert not torch.equal(projection()[0], projection()[1])
    assert torch.equal(projection(), projection()) and torch.equal(projection(step=9), projection())
    others = [projection(layer=1), projection(seed=1), projection(step=10), projection(step=20)]
    assert len({float(w.abs().sum()) for w in [projection(), *others]}) == 5


def test_redraws_follow_the_schedule_and_a_resumed_run_goes_on_with_it():
    settings = FavorSettings(nb_features=8, redraw_interval=10)
    module = settings.build(2, 8, 0, 0)
    module.set_step(25)
    assert int(module.redraw) == 2
    resumed = settings.build(2, 8, 0, seed=99)  # another seed: what was saved counts until the next redraw
    resumed.load_state_dict(module.state_dict())
    resumed.set_step(29)
    assert torch.equal(resumed.projection_HMD, module.projection_HMD)
    resumed.set_step(30)
    assert int(resumed.redraw) == 3 and not torch.equal(resumed.projection_HMD, module.projection_HMD)
    never = FavorSettings(nb_features=8).build(2, 8, 0, 0)
    first = never.projection_HMD.clone()
    never.set_step(10**6)
    assert torch.equal(never.projection_HMD, first)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_projections_stay_fp32_in_a_model_that_is_cast(cast):
    module = torch.nn.Sequential(FavorSettings(nb_features=8).build(2, 8, 0, 0))
    before = module[0].projection_HMD.clone()
    getattr(module, cast)()
    assert module[0].projection_HMD.dtype == torch.float32 and torch.equal(module[0].projection_HMD, before)
    assert module[0].log_temperature_H.dtype != torch.float32
    assert module.state_dict()["0.projection_HMD"].dtype == torch.float32
    module.to("meta")
    assert module[0].projection_HMD.device.type == "meta"


def test_short_documents_do_not_keep_points_larger_than_themselves():
    kept = []
    module = FavorSettings(nb_features=64).build(2, 8, 0, 0)
    q, k, v = normal(3, 80, 2, 8).requires_grad_().unbind(0)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        module(q, k, v, Sequences.of([40, 40]))
        assert kept.count((2, 64, 8)) == 1, "only the projections"
        kept.clear()
        module(q, k, v, Sequences.of([80]))
        assert kept.count((2, 64, 8)) == 2, "and the points' values"
