from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dstrain.optim import OptimSettings, build_optimizer, lr_factor, parameter_groups, set_lr, warmup_steps
from dstrain.schema import UserError, validate

CPU = torch.device("cpu")


class Small(nn.Module):
    """The kinds of parameters an encoder has."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.project = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3, bias=False)
        self.scale = nn.Parameter(torch.ones(()))


# ------------------------------------------------------------------------------------------------- groups


def test_matrices_and_embeddings_decay_norms_and_biases_do_not():
    module = Small()
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    decay, keep = parameter_groups(module.named_parameters(), 0.3)
    assert {names[id(p)] for p in decay["params"]} == {"tokens.weight", "project.weight", "head.weight"}
    assert {names[id(p)] for p in keep["params"]} == {"norm.weight", "norm.bias", "project.bias", "scale"}
    assert (decay["weight_decay"], keep["weight_decay"]) == (0.3, 0.0)


def test_a_group_without_members_is_left_out():
    assert len(parameter_groups(nn.Linear(2, 2, bias=False).named_parameters(), 0.1)) == 1
    assert len(parameter_groups(nn.LayerNorm(2).named_parameters(), 0.1)) == 1
    assert parameter_groups([], 0.1) == []


def test_only_what_decays_shrinks_when_gradients_are_zero():
    module = Small()
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    optimizer = build_optimizer(parameter_groups(module.named_parameters(), 0.5), OptimSettings(), CPU)
    set_lr(optimizer, 0.1)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in module.named_parameters():
        shrunk = 1 - 0.1 * 0.5 if before[name].ndim > 1 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * shrunk)


# ---------------------------------------------------------------------------------------------- optimizer


def reference_adamw(weight, gradients, lr, settings: OptimSettings, decay: float):
    """Loshchilov and Hutter 2019, algorithm 2, one scalar at a time."""
    (beta1, beta2), mean, square = settings.betas, 0.0, 0.0
    for step, gradient in enumerate(gradients, 1):
        weight -= lr * decay * weight
        mean = beta1 * mean + (1 - beta1) * gradient
        square = beta2 * square + (1 - beta2) * gradient**2
        weight -= lr * (mean / (1 - beta1**step)) / (math.sqrt(square / (1 - beta2**step)) + settings.eps)
    return weight


def test_the_optimizer_is_adamw_with_the_settings_given():
    settings = OptimSettings(betas=(0.7, 0.8), eps=1e-3)
    weight = nn.Parameter(torch.tensor([[2.0]], dtype=torch.float64))
    optimizer = build_optimizer([{"params": [weight], "weight_decay": 0.2}], settings, CPU)
    set_lr(optimizer, 0.05)
    gradients = [0.3, -1.0, 0.02]
    for gradient in gradients:
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
    assert weight.item() == pytest.approx(reference_adamw(2.0, gradients, 0.05, settings, 0.2), rel=1e-12)


def test_nothing_moves_before_a_learning_rate_is_set():
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = build_optimizer([{"params": [weight], "weight_decay": 0.5}], OptimSettings(), CPU)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert torch.equal(weight.detach(), torch.ones(2, 2))


def test_set_lr_reaches_every_group():
    optimizer = build_optimizer(parameter_groups(Small().named_parameters(), 0.1), OptimSettings(), CPU)
    set_lr(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]


# ----------------------------------------------------------------------------------------------- schedule

shapes = st.builds(
    OptimSettings,
    warmup=st.one_of(st.floats(0, 1), st.integers(2, 400).map(float)),
    schedule=st.sampled_from(["cosine", "linear", "constant"]),
    min_lr_ratio=st.floats(0, 1),
)


@given(shapes, st.integers(2, 300))
def test_the_factor_stays_between_0_and_1_and_ends_where_it_should(settings, total):
    factors = [lr_factor(step, total, settings) for step in range(total)]
    assert all(0 <= factor <= 1 for factor in factors)
    end = 1.0 if settings.schedule == "constant" else settings.min_lr_ratio
    assert factors[-1] == pytest.approx(end, abs=1e-12)
    assert lr_factor(total + 5, total, settings) == pytest.approx(end, abs=1e-12)


@given(shapes, st.integers(2, 300))
def test_the_factor_rises_to_the_peak_and_then_never_rises(settings, total):
    factors = [lr_factor(step, total, settings) for step in range(total)]
    peak = max(warmup_steps(total, settings) - 1, 0)
    assert factors[peak] == pytest.approx(1.0)
    assert all(left < right for left, right in pairwise(factors[: peak + 1]))
    assert all(left >= right - 1e-12 for left, right in pairwise(factors[peak:]))


@given(shapes, st.integers(2, 300))
def test_the_factor_has_no_jumps(settings, total):
    """No step is longer than the steepest line of its part: warm-up's 1/w, or pi/2 of the straight way down."""
    warmup = warmup_steps(total, settings)
    down = total - 1 - max(warmup - 1, 0)
    longest = max(1 / warmup if warmup else 0, math.pi / 2 * (1 - settings.min_lr_ratio) / down)
    factors = [lr_factor(step, total, settings) for step in range(total)]
    assert all(abs(right - left) <= longest + 1e-12 for left, right in pairwise(factors))


def test_the_shapes_by_hand():
    linear = OptimSettings(schedule="linear", warmup=0.2, min_lr_ratio=0.5)
    assert [round(lr_factor(step, 10, linear), 4) for step in (0, 1, 5, 9)] == [0.5, 1.0, 0.75, 0.5]
    cosine = OptimSettings(schedule="cosine", warmup=3, min_lr_ratio=0.2)
    assert [round(lr_factor(step, 11, cosine), 4) for step in (0, 1, 2, 6, 10)] == [0.3333, 0.6667, 1.0, 0.6, 0.2]
    constant = OptimSettings(schedule="constant", warmup=2)
    assert [lr_factor(step, 4, constant) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]


def test_warmup_is_a_share_up_to_1_and_a_count_above():
    assert warmup_steps(1000, OptimSettings(warmup=0.1)) == 100
    assert warmup_steps(1000, OptimSettings(warmup=250)) == 250
    assert warmup_steps(1000, OptimSettings(warmup=0)) == 0
    assert warmup_steps(7, OptimSettings(warmup=0.1)) == 1  # rounded up, so that a short stage has one too
    assert warmup_steps(10, OptimSettings(warmup=1)) == warmup_steps(10, OptimSettings(warmup=500)) == 9


def test_a_stage_of_one_step_takes_it_at_the_peak():
    assert lr_factor(0, 1, OptimSettings(min_lr_ratio=0)) == 1.0


# ----------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"lr": 0}, "run.yaml: lr: must be greater than 0, but is 0"),
        ({"betas": [0.9, 1.0]}, "run.yaml: betas: [0.9, 1.0]: each must be at least 0 and below 1"),
        (
            {"warmup": 2.5},
            "run.yaml: warmup: 2.5: above 1 it counts steps, which are whole; a share of the stage is 1 at most",
        ),
        ({"min_lr_ratio": 1.5}, "run.yaml: min_lr_ratio: must be less than or equal to 1, but is 1.5"),
        (
            {"schedule": "cosin"},
            "run.yaml: schedule: 'cosin' is not one of 'cosine', 'linear' or 'constant'; did you mean cosine?",
        ),
        ({"weigth_decay": 0.1}, "run.yaml: weigth_decay: no such setting; did you mean weight_decay?"),
    ],
)
def test_impossible_settings_are_sentences(mistake, message):
    with pytest.raises(UserError) as error:
        validate(OptimSettings, mistake, "run.yaml")
    assert str(error.value) == message
