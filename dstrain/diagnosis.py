"""Where the first number that is not finite came from: one step watched module by module, forward and backward."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Finding:
    """The first number that is not finite, as one rank saw it."""

    call: int
    """In which forward pass of the whole task, counted from 0, or in that one's backward pass."""
    forward: bool
    """Whether it was there before any backward pass of that call."""
    module: str
    """The module it came out of, by its name in the task, such as `encoder.blocks.1.attention`."""
    kind: str
    """The module's class."""
    between: bool
    """Whether it stood in what the module was given: then it arose between this module and its neighbour."""
    largest: dict[str, str]
    """The largest magnitudes of what went in and came out, and of the module's weights."""

    @property
    def sentence(self) -> str:
        """In words."""
        layer = re.search(r"blocks\.(\d+)\b", self.module)
        what = f"{self.module or 'the task'} ({self.kind}{f', layer {layer[1]}' if layer else ''})"
        way = "was given to" if self.between else "came out of"
        passing = "forward" if self.forward else "backward"
        sizes = ", ".join(f"{name} {said}" for name, said in self.largest.items())
        return f"the first number that is not finite {way} {what} in the {passing} pass (largest magnitudes: {sizes})"


_FORWARD = ("input", "output", "weights")
_BACKWARD = ("gradient of the output", "gradient of the input", "gradient of the weights", "weights")


class Watched:
    """`with Watched(task) as watched: ...`, then `watched.finding`. Slow: for a step that is known to fail."""

    def __init__(self, task: nn.Module) -> None:
        self._task = task
        self._call = -1
        self._handles: list[Any] = []
        self._sizes: dict[tuple[int, str], dict[str, str]] = {}
        self._suspects: list[tuple[int, Finding]] = []

    def __enter__(self) -> Watched:
        for name, module in self._task.named_modules():
            self._handles.append(module.register_forward_pre_hook(self._entering(name)))
            self._handles.append(module.register_forward_hook(self._leaving(name)))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    @property
    def finding(self) -> Finding | None:
        """The first one; None when every number was finite.

        A gradient arrives at a module's output and leaves the module that the output went into: where both are
        modules, the latter made it, and of modules within each other the innermost.
        """
        if not self._suspects:
            return None
        tensor = self._suspects[0][0]
        first = [finding for same, finding in self._suspects if same == tensor]
        return max(first, key=lambda finding: (not finding.between, len(finding.module)))

    # In the backward pass a module is "given" the gradient of its output, and the gradient of its input "comes out".

    def _entering(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: Any) -> None:
            self._call += module is self._task
            sizes = self._sizes[self._call, name] = {}
            weights = list(module.parameters(recurse=False))  # ZeRO-3 has them here in this module's forward only
            if weights:
                sizes["weights"] = size(weights)
            for tensor in _floats(given):
                self._look(tensor, name, module, "input", forward=True, between=True)
                self._follow(tensor, name, module, "gradient of the input", between=False)

        return hook

    def _leaving(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            for tensor in _floats(output):
                self._look(tensor, name, module, "output", forward=True, between=False)
                self._follow(tensor, name, module, "gradient of the output", between=True)
            for parameter in module.parameters(recurse=False):
                if not hasattr(parameter, "ds_tensor"):  # ZeRO-3's are not there to be followed
                    self._follow(parameter, name, module, "gradient of the weights", between=False)

        return hook

    def _follow(self, tensor: Tensor, name: str, module: nn.Module, what: str, between: bool) -> None:
        """Looks at a gradient when it comes by."""
        if not tensor.requires_grad:
            return
        call, identity = self._call, id(tensor)

        def hook(gradient: Tensor) -> None:
            self._look(gradient, name, module, what, forward=False, between=between, call=call, identity=identity)

        self._handles.append(tensor.register_hook(hook))

    def _look(
        self, tensor: Tensor, name: str, module: nn.Module, what: str, forward: bool, between: bool,
        call: int | None = None, identity: int = 0,
    ) -> None:  # fmt: skip
        if self._suspects and (forward or self._suspects[0][0] != identity):
            return
        call = self._call if call is None else call
        sizes = self._sizes[call, name]
        sizes[what] = size([tensor])
        if not bool(torch.isfinite(tensor).all()):
            shown = {said: sizes[said] for said in (_FORWARD if forward else _BACKWARD) if said in sizes}
            finding = Finding(call, forward, name, type(module).__name__, between, shown)
            self._suspects.append((identity, finding))


def size(tensors: Sequence[Tensor]) -> str:
    """The largest finite magnitude, and how many numbers are not finite: `3.4e+38 and 2 of 128 not finite`."""
    largest, broken, total = 0.0, 0, 0
    for tensor in tensors:
        finite = torch.isfinite(tensor)
        here = tensor.detach()[finite]
        largest = max(largest, float(here.abs().max()) if here.numel() else 0.0)
        broken, total = broken + int((~finite).sum()), total + tensor.numel()
    return f"{largest:.3g}" + (f" and {broken} of {total} not finite" if broken else "")


def _floats(values: Any) -> Iterator[Tensor]:
    """The tensors with a fraction among what a module is given or gives."""
    if isinstance(values, Tensor):
        if values.is_floating_point():
            yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _floats(value)
