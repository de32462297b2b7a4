from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from dstrain.model.attention.lsh import LshSettings
from dstrain.model.block import Block, BlockSettings, Dropout, initialise, set_dropout_step
from dstrain.model.positions import RopePositions, rotate
from dstrain.packed import Sequences

LENGTHS = (7, 3, 5)
SHAPE = {"hidden_size": 24, "intermediate_size": 40, "num_heads": 2, "qkv_size": 16}


def block(**settings) -> Block:
    made = Block(BlockSettings(**{**SHAPE, **settings}), layer=1, seed=3)
    initialise(made, seed=3, std=0.3)
    return made


def stream(tokens: int = sum(LENGTHS)) -> torch.Tensor:
    return torch.randn(tokens, 24, generator=torch.Generator().manual_seed(0))


def slow_truth(made: Block, hidden_LE: torch.Tensor) -> torch.Tensor:
    """One document through the post-norm block of Devlin et al., head by head, as the papers write it."""
    rotation = RopePositions().build(24, 8).rotation(Sequences.of([len(hidden_LE)]))
    assert rotation is not None
    q, k, v = (x.view(-1, 2, 8) for x in made.projections(hidden_LE).split(16, -1))
    heads = []
    for head in range(2):
        q_LD, k_LD = (rotate(x, rotation)[:, head] for x in (q, k))
        heads.append((q_LD @ k_LD.T / math.sqrt(8)).softmax(-1) @ v[:, head])
    hidden_LE = made.attention_norm(hidden_LE + made.attention_output(torch.cat(heads, -1)))
    return made.mlp_norm(hidden_LE + made.mlp_output(F.gelu(made.mlp_inner(hidden_LE))))


def test_packed_documents_give_what_each_gives_alone():
    made = block().eval()
    sequences = Sequences.of(LENGTHS)
    out = made(stream(), sequences, RopePositions().build(24, 8).rotation(sequences))
    for part, alone in zip(out.split(LENGTHS), stream().split(LENGTHS), strict=True):
        assert torch.allclose(part, slow_truth(made, alone), atol=1e-5)


def test_pre_norm_adds_to_an_untouched_stream():
    made = block(norm="pre").eval()
    sequences = Sequences.of(LENGTHS)
    for silent in (made.attention_output, made.mlp_output):
        torch.nn.init.zeros_(silent.weight)
    assert torch.equal(made(stream(), sequences, None), stream())  # nothing normalises the residual path
    made = block(norm="pre").eval()
    torch.nn.init.zeros_(made.mlp_output.weight)
    once, tenfold = (made(factor * stream(), sequences, None) - factor * stream() for factor in (1.0, 10.0))
    assert once.abs().max() > 0.1 and torch.allclose(once, tenfold, atol=1e-4)  # the sublayer sees a normed stream


def test_tied_kinds_get_no_key_projection():
    tied = block(attention=LshSettings())
    assert tied.projections.out_features == 2 * 16 and block().projections.out_features == 3 * 16
    seen = {}

    class Spy(torch.nn.Module):
        def forward(self, q_THD, k_THD, v_THD, sequences):
            seen.update(q=q_THD, k=k_THD, v=v_THD)
            return v_THD

    tied.attention = Spy()
    tied.eval()(stream(), Sequences.of(LENGTHS), None)
    assert torch.equal(seen["q"], seen["k"]) and not torch.equal(seen["q"], seen["v"])
    assert seen["q"].shape == (15, 2, 8)


def test_projection_bias_can_be_left_out():
    without = {name for name, _ in block(projection_bias=False).named_parameters()}
    assert {name for name, _ in block().named_parameters()} - without == {"projections.bias", "attention_output.bias"}


def test_initialisation_has_the_asked_spread_and_no_unfilled_weight():
    big = Block(BlockSettings(), 0, 0)
    for parameter in big.parameters():
        torch.nn.init.constant_(parameter, math.nan)
    big.attention_norm.reset_parameters()
    big.mlp_norm.reset_parameters()
    initialise(big, seed=0, std=0.02)
    for name, parameter in big.state_dict().items():
        if name.endswith("weight") and "norm" not in name:
            assert parameter.std() == pytest.approx(0.02, rel=0.02) and parameter.mean().abs() < 1e-3, name
        else:
            assert parameter.unique().numel() == 1 and not parameter.isnan().any(), name


def test_dropout_keeps_the_mean_and_does_nothing_in_evaluation():
    dropout = Dropout(0.25, seed=1, place="here")
    x = torch.ones(400, 500)
    kept = dropout(x) != 0
    assert kept.float().mean() == pytest.approx(0.75, abs=0.005)
    assert torch.allclose(dropout(x)[kept], torch.tensor(1 / 0.75))
    assert dropout.eval()(x) is x
    assert Dropout(0.0, 1, "here")(x) is x


def test_dropout_masks_follow_from_seed_place_step_and_micro_batch():
    def mask(seed: int = 1, place: str = "here", step: int = 0, micro_batch: int = 0) -> torch.Tensor:
        dropout = Dropout(0.5, seed, place)
        set_dropout_step(torch.nn.Sequential(dropout), step, micro_batch)
        return dropout(torch.ones(1000)) != 0

    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert torch.equal(mask(), mask())
    for other in ({"seed": 2}, {"place": "there"}, {"step": 1}, {"micro_batch": 1}):
        agreement = (mask() == mask(**other)).float().mean()
        assert abs(float(agreement) - 0.5) < 0.08, other
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_gradient_goes_where_the_value_went():
    dropout = Dropout(0.5, 1, "here")
    x = torch.ones(100, requires_grad=True)
    out = dropout(x)
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())


def test_flops_count_the_linear_maps_and_the_kernel():
    made = block()
    dense = 24 * 48 + 16 * 24 + 24 * 40 + 40 * 24
    assert made.flops(LENGTHS) == 2 * dense * 15 + 4 * 16 * (49 + 9 + 25)
