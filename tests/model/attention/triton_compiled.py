"""The Triton kernels compiled for an H100 and an A100, on a machine without a GPU. `test_triton.py` runs this file in a
process of its own, because launches are recorded instead of made.
"""

from __future__ import annotations

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime.jit import JITFunction

from dstrain.model.attention.favor_triton import favor_attention
from dstrain.model.attention.lsh import LshSettings
from dstrain.model.attention.lsh_triton import lsh_attention, sort_tokens
from dstrain.packed import Sequences

POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"}
T, H, M = 4096, 8, 256
SHARED_MEMORY = {90: 232_448, 80: 166_912}  # bytes that a program may take, by compute capability


def launches(monkeypatch, dtype, head_dim):
    """(kernel, arguments, keywords) of a forward and backward pass of both kinds."""
    made = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, grid, warmup, **more: made.append((self, args, more)))
    q, k, v = torch.zeros(T, 3, H, head_dim, dtype=dtype, requires_grad=True).unbind(1)
    sequences = Sequences.of([T - 512, 500, 12])
    weights_HMD, bias_HM = torch.zeros(H, M, head_dim), torch.zeros(H, M)
    out = favor_attention(q, k, v, torch.ones(H, requires_grad=True), weights_HMD, bias_HM, sequences, True, "both")
    out.backward(torch.zeros_like(out))
    settings = LshSettings(mask_within_chunks=True)
    rotations = settings.build(H, head_dim, 0, 0).rotations(q.device)
    order = sort_tokens(q, rotations, sequences, settings)
    out = lsh_attention(q, None, v, order, order, sequences, settings)
    out.backward(torch.zeros_like(out))
    return made


def compiled(kernel, args, keywords, capability):
    given = dict(zip(kernel.arg_names, args, strict=False)) | keywords
    signature, constants, aligned = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = given.pop(parameter.name)
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[(index,)] = "constexpr", value
        elif isinstance(value, int):
            signature[parameter.name] = "i32"
        else:
            signature[parameter.name], aligned[(index,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return compile(source, target=GPUTarget("cuda", capability, 32), options=given)  # launch options are left


@pytest.mark.parametrize(
    ("dtype", "head_dim", "capability"), [(torch.bfloat16, 64, 90), (torch.bfloat16, 64, 80), (torch.float16, 128, 80)]
)
def test_every_launch_compiles_and_fits(monkeypatch, dtype, head_dim, capability):
    seen = set()
    for kernel, args, keywords in launches(monkeypatch, dtype, head_dim):
        constants = repr((kernel.__name__, sorted(keywords.items(), key=repr)))
        if constants in seen:
            continue
        seen.add(constants)
        program = compiled(kernel, args, keywords, capability)
        assert program.metadata.shared <= SHARED_MEMORY[capability], kernel.__name__
        if dtype == torch.bfloat16 and capability == 90 and keywords.get("PRECISION"):
            assert "wgmma.mma_async" in program.asm["ptx"], f"{kernel.__name__} does not use Hopper's tensor cores"
    assert len(seen) > 10
