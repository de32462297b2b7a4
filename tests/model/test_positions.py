from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.model.positions import (
    LearnedPositions,
    NoPositions,
    RopePositions,
    Rotation,
    SinusoidalPositions,
    rotate,
)
from dstrain.packed import Sequences
from dstrain.schema import UserError

HEAD = 64


def rope(length: int, **rope_settings: float) -> Rotation:
    rotation = RopePositions(**rope_settings).build(512, HEAD).rotation(Sequences.of([length]))
    assert rotation is not None
    return rotation


def product(rotation: Rotation, q: torch.Tensor, k: torch.Tensor, first: int, second: int) -> float:
    """q at place `first` times k at place `second`."""
    turned = [
        rotate(x.view(1, 1, -1), Rotation(rotation.cosine_T1D[[place]], rotation.sine_T1D[[place]]))
        for x, place in ((q, first), (k, second))
    ]
    return float((turned[0].double() * turned[1].double()).sum())


@given(st.integers(0, 63), st.integers(0, 10_000))
@settings(max_examples=30)
def test_rope_product_depends_on_the_offset_alone(offset, seed):
    q, k = torch.randn(2, HEAD, generator=torch.Generator().manual_seed(seed))
    rotation = rope(16_384)
    there = [product(rotation, q, k, place + offset, place) for place in (0, 1, 500, 16_000, 16_320)]
    assert max(there) - min(there) < 1e-4


def test_rope_product_changes_with_the_offset_and_length_stays():
    rotation = rope(200)
    q, k = torch.randn(2, HEAD, generator=torch.Generator().manual_seed(0))
    values = [product(rotation, q, k, offset, 0) for offset in (0, 1, 2, 50, 150)]
    assert values[0] == pytest.approx(float(q @ k), abs=1e-5)
    assert len({round(value, 2) for value in values}) == len(values)
    turned = rotate(q.expand(200, 1, HEAD), rotation)
    assert torch.allclose(turned.norm(dim=-1), q.norm().expand(200, 1), rtol=1e-6)


def test_rope_is_the_rotation_of_the_paper():
    """Complex numbers say the same: feature pair i as a + bi times exp(1j * place * base ** (-2 i / D))."""
    x_THD = torch.randn(30, 2, HEAD, generator=torch.Generator().manual_seed(1))
    angles = torch.outer(torch.arange(30.0), 10_000.0 ** (-torch.arange(0, HEAD, 2) / HEAD))
    pairs = torch.complex(*x_THD.chunk(2, dim=-1))
    turned = pairs * torch.polar(torch.ones(()), angles)[:, None]
    assert torch.allclose(rotate(x_THD, rope(30)), torch.cat((turned.real, turned.imag), -1), atol=1e-5)


def test_rope_starts_anew_in_each_document():
    rotation = RopePositions().build(512, HEAD).rotation(Sequences.of([3, 5]))
    assert rotation is not None
    assert torch.equal(rotation.sine_T1D[:3], rotation.sine_T1D[3:6])


def test_rope_scale_reads_long_documents_at_the_angles_of_short_ones():
    assert torch.allclose(rope(400, scale=4.0).sine_T1D[::4], rope(100).sine_T1D, atol=1e-6)
    assert not torch.allclose(rope(100, base=500.0).sine_T1D, rope(100).sine_T1D, atol=1e-2)


def test_rope_keeps_dtype_and_rounds_once():
    x_THD = torch.randn(50, 2, HEAD, generator=torch.Generator().manual_seed(1)).bfloat16()
    turned = rotate(x_THD, rope(50))
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rotate(x_THD.float(), rope(50)).bfloat16())


def test_rope_is_no_state_and_survives_a_cast_of_the_model():
    module = RopePositions().build(512, HEAD).bfloat16()
    assert module.state_dict() == {}
    again = module.rotation(Sequences.of([16_384]))
    assert torch.equal(again.sine_T1D, rope(16_384).sine_T1D) and again.sine_T1D.dtype == torch.float32


def test_rope_needs_an_even_head():
    assert "must be even, but is 5" in str(RopePositions().check(5))
    assert RopePositions().check(6) is None
    assert all(kind.check(5) is None for kind in (NoPositions(), LearnedPositions(), SinusoidalPositions()))


def test_learned_positions_refuse_longer_documents_at_the_door():
    LearnedPositions(max_length=8).check_length(8)
    with pytest.raises(UserError, match="max_length: is 8, but documents have up to 9 tokens"):
        LearnedPositions(max_length=8).check_length(9)
    for kind in (RopePositions(), SinusoidalPositions(), NoPositions()):
        kind.check_length(10**6)


def test_learned_positions_add_the_row_of_the_place():
    module = LearnedPositions(max_length=8).build(4, 2)
    table_LE = torch.arange(32.0).view(8, 4)
    module.load_state_dict({"table.weight": table_LE})
    words_TE = torch.ones(5, 4)
    assert torch.equal(module(words_TE, Sequences.of([3, 2])), words_TE + table_LE[[0, 1, 2, 0, 1]])
    assert module.rotation(Sequences.of([3])) is None


@pytest.mark.parametrize("hidden_size", [16, 15])
def test_sinusoids_are_bounded_distinct_and_per_document(hidden_size):
    module = SinusoidalPositions().build(hidden_size, 2)
    added = module(torch.zeros(60, hidden_size), Sequences.of([50, 10]))
    assert added.abs().max() <= hidden_size**-0.5 + 1e-6
    assert torch.equal(added[:10], added[50:])
    assert torch.pdist(added[:50]).min() > 0.01
    assert torch.allclose(added[:50, 0] * hidden_size**0.5, torch.arange(50.0).sin(), atol=1e-6)


def test_no_positions_leave_the_words_alone():
    words_TE = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    module = NoPositions().build(8, 2)
    assert module(words_TE, Sequences.of([4])) is words_TE and module.rotation(Sequences.of([4])) is None
