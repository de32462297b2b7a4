"""The stand-in for torch's compiler, in a process of its own: nothing loads the real one until somebody compiles."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """\
import inspect, sys
from dstrain import engine
engine.preload()
import torch
import torch._dynamo
torch._dynamo.graph_break()
guarded = torch.compiler.disable(lambda x: x)
weight = torch.nn.Parameter(torch.ones(2))
optimizer = torch.optim.AdamW([weight])
weight.sum().backward()
optimizer.step()
optimizer.zero_grad()
inspect.stack()
assert guarded(3) == 3
loaded = [name for name in sys.modules if name.startswith("torch._dynamo.") or name == "sympy"]
assert not loaded, loaded

assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item() == 2
assert torch._dynamo is sys.modules["torch._dynamo"] and torch._dynamo.__file__
import torch._dynamo.convert_frame
optimizer.step()
"""

A_MODULE_FIRST = """\
import sys, torch, dstrain.uncompiled
dstrain.uncompiled.put_off_the_compiler()
import torch._dynamo.config as config
import torch._dynamo.convert_frame
assert config is sys.modules["torch._dynamo.config"] is torch._dynamo.config is torch._dynamo.convert_frame.config
assert config.__spec__.origin == config.__file__ and config.cache_size_limit
"""


@pytest.mark.slow
def test_the_compiler_is_loaded_when_somebody_compiles_and_no_sooner() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_module_of_the_compiler_can_be_imported_first() -> None:
    done = subprocess.run([sys.executable, "-c", A_MODULE_FIRST], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
