"""A start without torch's compiler, which takes as long to import as torch and DeepSpeed together.

torch's optimizers and DeepSpeed's hooks import `torch._dynamo` only to tell it where not to compile. Until somebody wants
more of it than that (here only `encoder.activation_checkpointing` does), a stand-in takes such words; then the real one is
loaded in its place.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

_NAME = "torch._dynamo"


def _as_it_is(fn: Any = None, *args: Any, **options: Any) -> Any:
    """A decorator that changes nothing, given its function at once or after its options."""
    return _as_it_is if fn is None else fn


class _StandIn(ModuleType):
    """What `import torch._dynamo` finds."""

    trace_rules = SimpleNamespace(clear_lru_cache=lambda: None)
    """torch.distributed clears it when ranks meet."""
    disable = staticmethod(_as_it_is)
    """What is never compiled needs no guard against it."""

    @staticmethod
    def graph_break(msg: str = "") -> None:
        """Outside of a compilation there is none to break."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked by whoever lists all modules, such as inspect
            raise AttributeError(name)
        return getattr(_real(), name)


class _Finder:
    """Finds the modules of the compiler while the stand-in stands for their package: in the real one."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Called for every import; most are none of the compiler's."""
        if not name.startswith(f"{_NAME}."):
            return None
        _real()
        importlib.import_module(name)
        return ModuleSpec(name, _Loaded(sys.modules.pop(name)))  # or the import system would execute it once more


class _Loaded(Loader):
    """Hands out a module that is already there, as it is."""

    def __init__(self, module: ModuleType) -> None:
        self._module, self._spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """In place of an empty one."""
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        """It has been executed; its own spec was replaced on the way here, unless it lets nobody do that."""
        with contextlib.suppress(AttributeError):
            module.__spec__ = self._spec


def put_off_the_compiler() -> None:
    """From here on `import torch._dynamo` costs nothing, unless it has been paid for."""
    if _NAME not in sys.modules:
        stand_in = _StandIn(_NAME)
        stand_in.__path__ = []  # a package, whose modules are looked for by the finder
        sys.modules[_NAME] = torch._dynamo = stand_in
        sys.meta_path.insert(0, _Finder)


def _real() -> ModuleType:
    """Loads the compiler in the stand-in's place."""
    if isinstance(sys.modules.get(_NAME), _StandIn):
        del sys.modules[_NAME]
        del torch._dynamo
        sys.meta_path.remove(_Finder)
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
