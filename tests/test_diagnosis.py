"""The first number that is not finite is found where a known fault has put it, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dstrain.diagnosis import Watched, size


class Gradient(torch.autograd.Function):
    """The identity, with a backward that breaks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient * math.inf


class Layer(nn.Module):
    """A linear map, and a break of choice before, in or after it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.after: Callable[[Tensor], Tensor] = lambda x: x

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.inner(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Layer() for _ in range(3))
        self.between: Callable[[Tensor], Tensor] = lambda x: x

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for number, block in enumerate(self.blocks):
            x = block(self.between(x) if number == 2 else x)
        return x.square().sum(), x.detach()


def watch(model: Model, calls: int = 1, broken: int = 0) -> Watched:
    with Watched(model) as watched:
        for call in range(calls):
            loss, _ = model(torch.full((2, 4), math.inf if call == broken - 1 else 1.0))
            loss.backward()
    return watched


def test_nothing_is_found_where_nothing_is_broken() -> None:
    model = Model()
    assert watch(model).finding is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()), "all hooks are gone"


def test_a_weight_that_is_infinite_is_found() -> None:
    model = Model()
    model.blocks[1].inner.weight.data[0, 0] = math.inf
    found = watch(model).finding
    assert found is not None
    assert (found.forward, found.module, found.kind, found.between, found.call) == (True, "blocks.1.inner", "Linear", False, 0)
    assert found.largest["weights"].endswith("1 of 20 not finite") and "2 of 8 not finite" in found.largest["output"]
    assert "not finite" not in found.largest["input"]
    assert found.sentence.startswith(
        "the first number that is not finite came out of blocks.1.inner (Linear, layer 1) in the forward pass (largest "
        "magnitudes: input "
    )


@pytest.mark.parametrize(
    ("place", "module", "between"),
    [("after", "blocks.1", False), ("between", "blocks.2", True)],
)
def test_what_arises_outside_of_inner_modules_is_told_by_its_neighbour(place: str, module: str, between: bool) -> None:
    model = Model()
    setattr(model.blocks[1] if place == "after" else model, place, lambda x: x / 0.0)
    found = watch(model).finding
    assert found is not None and (found.module, found.between, found.forward) == (module, between, True)
    assert ("was given to" in found.sentence) == between


def test_a_gradient_that_breaks_is_found_in_the_backward_pass() -> None:
    model = Model()
    model.blocks[1].after = Gradient.apply
    found = watch(model).finding
    assert found is not None and not found.forward and found.module == "blocks.1.inner" and found.between
    assert "in the backward pass" in found.sentence and "not finite" in found.largest["gradient of the output"]


def test_a_gradient_that_a_module_makes_is_its_own() -> None:
    model = Model()
    model.blocks[1].inner.weight.data.fill_(3e38)  # forward: 1e-30 times it; backward: times a gradient of some size
    model.blocks[1].inner.bias.data.zero_()
    model.blocks[0].after = lambda x: x * 0 + 1e-30
    model.blocks[1].after = lambda x: x * 1e8
    found = watch(model).finding
    assert found is not None and not found.forward
    assert (found.module, found.between) == ("blocks.1.inner", False)
    assert "gradient of the input" in found.largest and "not finite" not in found.largest["gradient of the output"]


def test_the_call_that_broke_is_told() -> None:
    found = watch(Model(), calls=3, broken=2).finding
    assert found is not None and (found.call, found.module, found.between) == (1, "", True)
    assert "was given to the task (Model)" in found.sentence


def test_magnitudes_are_those_of_finite_numbers() -> None:
    assert size([torch.tensor([1.0, -3.5])]) == "3.5"
    assert size([torch.tensor([1.0, math.nan]), torch.tensor([-math.inf])]) == "1 and 2 of 3 not finite"
    assert size([torch.zeros(0)]) == "0"
