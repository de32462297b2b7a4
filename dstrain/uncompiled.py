"""A start without torch's compiler, which nothing here uses and which takes as long to import as torch and DeepSpeed together.

torch's optimizers and DeepSpeed's hooks import `torch._dynamo` only to tell it where not to compile. Until somebody wants
more of it than that, a stand-in takes such words; then the real one is loaded, and everything is as it would have been.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

_NAME = "torch._dynamo"


class _StandIn(ModuleType):
    """What `import torch._dynamo` finds."""

    trace_rules = SimpleNamespace(clear_lru_cache=lambda: None)
    """torch.distributed clears it when ranks meet."""

    @staticmethod
    def graph_break(msg: str = "") -> None:
        """Outside of a compilation there is none to break."""

    @staticmethod
    def disable(fn: Any = None, recursive: bool = True, **options: Any) -> Any:
        """What is never compiled needs no guard against it."""
        return _as_it_is(fn)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # asked by whoever lists all modules, such as inspect
            raise AttributeError(name)
        return getattr(_real(), name)


def put_off_the_compiler() -> None:
    """From here on `import torch._dynamo` costs nothing, unless it has been paid for."""
    if _NAME not in sys.modules:
        sys.modules[_NAME] = torch._dynamo = _StandIn(_NAME)


def _real() -> ModuleType:
    """Loads the compiler in the stand-in's place."""
    if isinstance(sys.modules.get(_NAME), _StandIn):
        del sys.modules[_NAME]
        del torch._dynamo
    return importlib.import_module(_NAME)


@contextlib.contextmanager
def nothing_compiled() -> Iterator[None]:
    """Functions that ask for `@torch.compile` meanwhile stay as they are."""
    compiling = torch.compile
    torch.compile = _as_it_is  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiling


def _as_it_is(fn: Any = None, *args: Any, **options: Any) -> Any:
    """A decorator, given its function at once or after its options."""
    decorated: Callable[[Any], Any] = lambda function: function  # noqa: E731
    return decorated if fn is None else fn
