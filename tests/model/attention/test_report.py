"""The report on an approximate attention: figures that can be known otherwise, and that looking changes nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dstrain.model.attention import report
from dstrain.model.attention.favor import FavorSettings
from dstrain.model.attention.lsh import LshSettings
from dstrain.model.attention.report import (
    attention_matrix,
    effective_rank,
    evenly,
    measure,
    report_attention,
    summed_up,
)
from dstrain.model.attention.sdpa import SdpaSettings
from dstrain.model.encoder import Encoder, EncoderSettings
from dstrain.packed import Batch, Sequences

H, D = 2, 8
FIGURES = {
    "error", "uniform_error", "captured_share", "effective_rank", "exact_effective_rank", "logit_std", "max_norm",
}  # fmt: skip


def normal(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def figures(settings, lengths, scale=1.0, seed=0):
    module = settings.build(H, D, 0, 0).eval()
    q, k, v = normal(3, sum(lengths), H, D, seed=seed)
    q, k = q * scale, k * scale
    return measure(module, q, q if settings.tied_qk else k, v, Sequences.of(lengths))


def test_an_exact_kind_has_no_figures():
    assert figures(SdpaSettings(), [10]) == {}


def test_a_kernel_that_sees_everything_has_no_error_and_captures_all():
    for settings in (LshSettings(chunk_size=64, num_hashes=1), LshSettings(chunk_size=64, normalize_keys=False)):
        found = figures(settings, [30, 1, 2, 50, 20])
        assert set(found) == FIGURES
        assert found["error"] < 1e-5 and found["captured_share"] == 1.0 and found["uniform_error"] > 0.1
        assert found["effective_rank"] == pytest.approx(found["exact_effective_rank"], rel=1e-4)


def test_more_rounds_capture_more():
    shares = [figures(LshSettings(chunk_size=8, num_hashes=rounds), [300])["captured_share"] for rounds in (1, 4)]
    assert 0.1 < shares[0] < shares[1] - 0.1 < 0.95


def test_captured_share_counts_the_exact_mass_on_visible_keys():
    """One bucket per document, chunks without neighbours: a query sees its chunk, so the share can be added up by hand."""
    settings = LshSettings(chunk_size=10, num_hashes=1, look_back=0, look_forward=0, num_buckets=1)
    q, v = normal(2, 60, H, D)
    logits_HLL = torch.einsum("lhd,mhd->hlm", q, q / q.norm(dim=-1, keepdim=True))
    logits_HLL.diagonal(dim1=1, dim2=2).fill_(-math.inf)
    chunk_L = torch.arange(60) // 10
    by_hand = (logits_HLL.softmax(-1) * (chunk_L[:, None] == chunk_L)).sum() / (60 * H)
    found = measure(settings.build(H, D, 0, 0).eval(), q, q, v, Sequences.of([60]))
    assert found["captured_share"] == pytest.approx(float(by_hand), rel=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
def test_the_error_of_favor_is_that_of_its_output_against_its_own_softmax(normalize):
    settings = FavorSettings(nb_features=32, normalize_qk=normalize, temperature=2.0)
    module = settings.build(H, D, 0, 0)
    q, k, v = normal(3, 40, H, D)
    queries, keys = ([x / x.norm(dim=-1, keepdim=True) * 2**0.5 for x in (q, k)]) if normalize else (q, k)
    logits_HLL = torch.einsum("lhd,mhd->hlm", queries, keys) * (1.0 if normalize else D**-0.5)
    truth = torch.einsum("hlm,mhd->lhd", logits_HLL.softmax(-1), v)
    with torch.no_grad():
        out = module(q, k, v, Sequences.of([40]))
    found = measure(module, q, k, v, Sequences.of([40]))
    assert found["error"] == pytest.approx(float((out - truth).norm() / truth.norm()), rel=1e-4)
    uniform = (v.mean(0, keepdim=True) - truth).norm() / truth.norm()
    assert found["uniform_error"] == pytest.approx(float(uniform), rel=1e-4)
    assert found["logit_std"] == pytest.approx(float(logits_HLL.var(-1, correction=0).mean().sqrt()), rel=1e-4)
    longest = max(float(x.norm(dim=-1).max()) for x in (queries, keys)) * (1.0 if normalize else D**-0.25)
    assert found["max_norm"] == pytest.approx(longest, rel=1e-4) and found["captured_share"] == 1.0


def test_one_hot_values_show_the_attention_matrix():
    q, k, v = normal(3, 21, H, D)
    module = FavorSettings(nb_features=16).build(H, D, 0, 0)
    with torch.no_grad():
        matrix_HLL = attention_matrix(module, q, k, torch.arange(21))
        out = module(q, k, v, Sequences.of([21]))
    torch.testing.assert_close(matrix_HLL.sum(-1), torch.ones(H, 21))
    torch.testing.assert_close(torch.einsum("hlm,mhd->lhd", matrix_HLL, v), out)


def test_effective_rank_of_known_matrices():
    assert float(effective_rank(torch.eye(7))) == pytest.approx(7)
    assert float(effective_rank(torch.full((7, 7), 1 / 7))) == pytest.approx(1, abs=1e-4)
    assert float(effective_rank(torch.diag(torch.tensor([0.5, 0.25, 0.25, 0.0])))) == pytest.approx(2**1.5)
    assert effective_rank(torch.zeros(2, 3, 3)).tolist() == [1, 1]


def test_few_features_bound_the_rank():
    few = figures(FavorSettings(nb_features=4, normalize_qk=False), [100], scale=2.0)
    assert few["effective_rank"] <= 4 < few["exact_effective_rank"]


def test_the_sample_is_bounded_and_a_document_is_measured_alone(monkeypatch):
    assert evenly(3, 128).tolist() == [0, 1, 2] and evenly(1, 4).tolist() == [0]
    assert evenly(1000, 5).tolist() == [0, 250, 500, 749, 999]
    monkeypatch.setattr(report, "DOCUMENTS", 2)
    monkeypatch.setattr(report, "POINTS", 16)
    settings = FavorSettings(nb_features=8)
    module = settings.build(H, D, 0, 0)
    asked = []
    monkeypatch.setattr(module, "forward", lambda *x: (asked.append(len(x[0])), type(module).forward(module, *x))[1])
    q, k, v = normal(3, 90, H, D)
    both = measure(module, q, k, v, Sequences.of([40, 20, 30]))
    assert asked == [40] * 3 + [30] * 3, "the first and the last document, and two passes for 16 one-hot values"
    ends = [measure(module, *(x[part] for x in (q, k, v)), Sequences.of([len(q[part])])) for part in (slice(40), slice(60, 90))]
    for name in ("captured_share", "effective_rank", "exact_effective_rank"):
        assert both[name] == pytest.approx(sum(end[name] for end in ends) / 2)
    assert min(end["error"] for end in ends) <= both["error"] <= max(end["error"] for end in ends)


def test_nothing_breaks_at_values_of_zero_and_at_half_precision():
    module = FavorSettings(nb_features=8).build(H, D, 0, 0)
    zero = torch.zeros(9, H, D)
    found = measure(module, zero, zero, zero, Sequences.of([9]))
    assert found["error"] == found["uniform_error"] == found["logit_std"] == 0.0
    q, k, v = normal(3, 50, H, D)
    true = measure(module, q, k, v, Sequences.of([50]))
    half = measure(module.bfloat16(), q.bfloat16(), k.bfloat16(), v.bfloat16(), Sequences.of([50]))
    for name, value in true.items():
        assert half[name] == pytest.approx(value, rel=0.05), name


# ------------------------------------------------------------------------------------------------ an encoder


def encoder(**attention):
    settings = EncoderSettings(
        preset="bert_tiny", hidden_size=16, intermediate_size=16, num_heads=H, qkv_size=H * D, attention=attention,
        activation_checkpointing=True,
    )  # fmt: skip
    return Encoder(settings, 30, seed=0)


def batch(lengths=(12, 20)):
    ids = torch.randint(30, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    return Batch(ids, Sequences.of(lengths), torch.zeros(0), 1)


@pytest.mark.parametrize("attention", [{"kind": "favor", "nb_features": 16}, {"kind": "lsh", "chunk_size": 4}])
def test_every_layer_is_reported_and_nothing_else_happens(attention):
    model = encoder(**attention)
    model.set_step(3, 1)
    model.train()
    model.blocks[1].eval()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    modes, rng = [module.training for module in model.modules()], torch.get_rng_state()
    truth = model(batch())

    found = report_attention(model, batch())
    assert list(found) == ["layer_0", "layer_1"] and all(set(layer) == FIGURES for layer in found.values())
    assert report_attention(model, batch()) == found, "nothing is drawn"

    assert torch.equal(torch.get_rng_state(), rng) and [module.training for module in model.modules()] == modes
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert torch.equal(model(batch()), truth), "neither the dropout nor the rotations of this step have moved"
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_exact_encoder_has_nothing_to_report():
    assert report_attention(encoder(kind="sdpa"), batch()) == {} and summed_up({}) == {}


def test_kernels_that_can_are_fitted_to_what_they_are_about_to_be_given():
    model = encoder(kind="favor", nb_features=16, projections="fitted")
    spreads = [block.attention.spread_HDD for block in model.blocks]
    apart = report_attention(model, batch())
    assert all(torch.equal(spread, torch.eye(D).expand(H, D, D)) for spread in spreads), "only on request"
    fitted = report_attention(model, batch(), adapt=True)
    assert fitted != apart and report_attention(model, batch()) == fitted and model.training
    mine, seen = [spread.clone() for spread in spreads], {}
    for layer, block in enumerate(model.blocks):
        block.attention.register_forward_pre_hook(lambda _, inputs, layer=layer: seen.update({layer: inputs}))
    model.eval()(batch())
    for layer, (q, k, _, sequences) in seen.items():
        model.blocks[layer].attention.adapt(q, k, sequences)
        assert torch.equal(spreads[layer], mine[layer]) and not torch.allclose(mine[layer], torch.eye(D), atol=1e-3)
    plain = encoder(kind="favor", nb_features=16)
    assert report_attention(plain, batch(), adapt=True) == report_attention(plain, batch())


def test_the_batch_may_go_through_something_larger():
    inner = encoder(kind="favor", nb_features=16)
    outer = nn.Sequential(inner)
    assert report_attention(inner, batch(), outer) == report_attention(inner, batch())


def test_figures_stand_under_their_layer_and_as_a_mean():
    layers = {"layer_0": {"error": 0.1, "max_norm": 1.0}, "layer_1": {"error": 0.3, "max_norm": 2.0}}
    assert summed_up(layers) == pytest.approx(
        {
            "error": 0.2, "max_norm": 1.5, "layer_0/error": 0.1, "layer_0/max_norm": 1.0, "layer_1/error": 0.3,
            "layer_1/max_norm": 2.0,
        }
    )  # fmt: skip
