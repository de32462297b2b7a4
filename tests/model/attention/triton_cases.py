"""The Triton kernels on a CPU, by Triton's interpreter. `test_triton.py` runs this file in a process of its own: whether
kernels are interpreted is decided when triton is imported, for the whole process.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from dstrain.model.attention import blocked, favor_triton, hashing, lsh, lsh_triton, triton_tools
from dstrain.packed import Sequences

LENGTHS = [1, 2, 15, 16, 17, 63, 64, 65, 130]
FEW = [5, 40]
D = 16
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


@pytest.fixture(scope="module", autouse=True)
def _repaired_interpreter():
    """What the interpreter of triton 3.9 lacks: bf16 that is multiplied as such and rounded to nearest; and time: it
    patches the language anew for each call of a helper, a millisecond each."""
    builder = interpreter.InterpreterBuilder
    cast, called = builder.cast_impl, interpreter.InterpretedFunction.__call__
    dot = builder.create_dot

    def cast_impl(self, x, to):
        pair = x.dtype.scalar, to.scalar
        if pair == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        if pair == (tl.float32, tl.bfloat16):
            bits = np.ascontiguousarray(x.data).view(np.uint32)
            nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            return interpreter.TensorHandle(nearest.astype(np.uint16), tl.bfloat16)
        return cast(self, x, to)

    def create_dot(self, a, b, total, *_):
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        product = np.matmul(a.data.astype(np.float32), b.data.astype(np.float32))
        return interpreter.TensorHandle(product + total.data, total.dtype.scalar)

    builder.cast_impl, builder.create_dot = cast_impl, create_dot
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)
    with np.errstate(all="ignore"):
        yield
    builder.cast_impl, builder.create_dot, interpreter.InterpretedFunction.__call__ = cast, dot, called


@pytest.fixture(autouse=True)
def _many_pieces(monkeypatch):
    """Documents of 65 and 130 tokens have several segments, and heads several groups, as long ones have on a GPU."""
    monkeypatch.setattr(favor_triton, "SEGMENT", 32)
    monkeypatch.setattr(lsh_triton, "PROGRAMS", 8)


def packed(lengths, dtype, scale=1.0, heads=1, seed=0):
    """q, k, v as one (T, 3, H, D) tensor and a gradient, fp64 numbers that `dtype` holds exactly."""
    rng = torch.Generator().manual_seed(seed)
    fused = torch.randn(sum(lengths), 3, heads, D, generator=rng, dtype=torch.float64)
    fused[:, :2] *= scale
    grad = torch.randn(sum(lengths), heads, D, generator=rng, dtype=torch.float64)
    return fused.to(dtype).double(), grad.to(dtype).double()


def relative(x, truth):
    return float((x.double() - truth).norm() / truth.norm())


def run(attend, fused, grad, dtype, scale_H=None):
    """Output, gradient at (T, 3, H, D), gradient at the scale: through strided views of the packed projection."""
    fused = fused.to(dtype).clone().requires_grad_()
    if scale_H is not None:
        scale_H = scale_H.to(torch.promote_types(dtype, torch.float32), copy=True).requires_grad_()
    out = attend(*fused.unbind(1), *([] if scale_H is None else [scale_H]))
    out.backward(grad.to(dtype))
    assert out.dtype == dtype and fused.grad.dtype == dtype
    return out.detach(), fused.grad, None if scale_H is None else scale_H.grad


# ------------------------------------------------------------------------------------------------------- FAVOR+


def favor_truth(q, k, v, scale_H, weights_HMD, bias_HM, lengths, normalize, shift):
    """The formulas, document by document, with all scores in memory."""
    outs = []
    for q_LHD, k_LHD, v_LHD in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        queries, keys = (blocked.unit(x)[0] if normalize else x for x in (q_LHD, k_LHD))
        queries, keys = ((x * scale_H[:, None]).transpose(0, 1) for x in (queries, keys))
        s = torch.zeros_like(keys[:, :1])
        if shift in ("keys", "both"):
            s = s + keys.mean(1, keepdim=True)
        if shift in ("queries", "both"):
            s = s + queries.mean(1, keepdim=True)
        scores = weights_HMD @ keys.mT + (s * keys - keys.square() / 2).sum(-1).unsqueeze(1)
        z = scores.logsumexp(-1) - (weights_HMD @ s.mT).squeeze(-1) + bias_HM
        out = (queries @ weights_HMD.mT + z.unsqueeze(1)).softmax(-1) @ (scores.softmax(-1) @ v_LHD.transpose(0, 1))
        outs.append(out.transpose(0, 1))
    return torch.cat(outs)


def favor(lengths, normalize=True, shift="keys", features=24, heads=1):
    """The kernel, its truth, and a scale for both."""
    rng = torch.Generator().manual_seed(7)
    weights_HMD = 2 * torch.randn(heads, features, D, generator=rng)
    bias_HM = torch.randn(heads, features, generator=rng) / 10
    scale_H = torch.linspace(0.9, 1.3, heads) if normalize else torch.full((heads,), D**-0.25)
    sequences = Sequences.of(lengths)

    def kernel(q, k, v, scale_H):
        assert triton_tools.why_not(q) is None
        return favor_triton.favor_attention(q, k, v, scale_H, weights_HMD, bias_HM, sequences, normalize, shift)

    def truth(q, k, v, scale_H):
        return favor_truth(q, k, v, scale_H, weights_HMD.double(), bias_HM.double(), lengths, normalize, shift)

    return kernel, truth, scale_H


def favor_agrees(dtype, lengths, scale=1.0, heads=1, **how):
    kernel, truth, scale_H = favor(lengths, heads=heads, **how)
    fused, grad = packed(lengths, dtype, scale, heads)
    out, grad_fused, grad_scale = run(kernel, fused, grad, dtype, scale_H)
    true_out, true_fused, true_scale = run(truth, fused, grad, torch.float64, scale_H)
    assert relative(out, true_out) < TOLERANCE[dtype]
    assert grad_fused.isfinite().all()
    if scale == 1.0:
        for part in range(3):
            assert relative(grad_fused[:, part], true_fused[:, part]) < 4 * TOLERANCE[dtype]
        assert relative(grad_scale, true_scale) < 4 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_favor_equals_the_formulas_on_every_length(dtype):
    favor_agrees(dtype, LENGTHS)


@pytest.mark.parametrize("shift", ["none", "keys", "queries", "both"])
@pytest.mark.parametrize("normalize", [True, False])
def test_favor_equals_the_formulas_with_every_shift(normalize, shift):
    favor_agrees(torch.float32, [5, 66], normalize=normalize, shift=shift, heads=2 if shift == "both" else 1, features=7)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("scale", [10.0, 30.0])
def test_favor_holds_its_precision_at_every_norm(dtype, scale, normalize):
    favor_agrees(dtype, FEW, scale=scale, normalize=normalize, shift="both")


def test_favor_in_waves_changes_no_bit(monkeypatch):
    """Many short documents: their points are not all in memory at once, and are computed again in backward."""
    lengths = [20, 3, 40]
    kernel, _, scale_H = favor(lengths, shift="both", features=40)
    fused, grad = packed(lengths, torch.bfloat16)
    together = run(kernel, fused, grad, torch.bfloat16, scale_H)
    monkeypatch.setattr(favor_triton, "ROWS_AT_LEAST", 1)
    in_waves = run(kernel, fused, grad, torch.bfloat16, scale_H)
    for one, other in zip(together[:2], in_waves[:2], strict=True):
        assert torch.equal(one, other)
    torch.testing.assert_close(together[2], in_waves[2])


# ---------------------------------------------------------------------------------------------------------- LSH


def lsh_kernels(lengths, heads=1, **how):
    """The kernel and the PyTorch kernel, on the orders of the same rotations."""
    settings = lsh.LshSettings(**{"chunk_size": 16, **how})
    module = settings.build(heads, D, 0, 0).eval()
    sequences, shared = Sequences.of(lengths), settings.shared_qk

    def kernel(q, k, v):
        assert lsh_triton.supported(q, settings) is None
        orders = module._orders(hashing.sort_tokens, q, k, sequences)
        return lsh_triton.lsh_attention(q, None if shared else k, v, *orders, sequences, settings)

    return kernel, lambda q, k, v: module(q, q if shared else k, v, sequences)


def lsh_agrees(dtype, lengths, scale=1.0, heads=1, **how):
    kernel, truth = lsh_kernels(lengths, heads, **how)
    fused, grad = packed(lengths, dtype, scale, heads)
    out, grad_fused, _ = run(kernel, fused, grad, dtype)
    true_out, true_fused, _ = run(truth, fused, grad, torch.float64)
    assert relative(out, true_out) < TOLERANCE[dtype]
    assert grad_fused.isfinite().all()
    if scale == 1.0:
        for part in (0, 2) if how.get("shared_qk", True) else (0, 1, 2):
            assert relative(grad_fused[:, part], true_fused[:, part]) < 4 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("buckets", [None, 1, 512])
def test_tokens_are_sorted_as_the_plain_hash_sorts_them(dtype, buckets):
    lengths, settings = [1, 2, 130, 65], lsh.LshSettings(chunk_size=16, num_buckets=buckets)
    x, sequences = packed(lengths, dtype, heads=2)[0].to(dtype)[:, 0], Sequences.of(lengths)
    rotations = settings.build(2, D, 0, 0).rotations(x.device)
    plain = hashing.sort_tokens(x, rotations, sequences, settings)
    found = lsh_triton.sort_tokens(x, rotations, sequences, settings)
    assert torch.equal(found.token_HRT, plain.token_HRT)
    assert torch.equal(found.bucket_HRT.diff() == 0, plain.bucket_HRT.diff() == 0)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_lsh_equals_the_plain_kernel_on_every_length(dtype):
    lsh_agrees(dtype, LENGTHS, chunk_size=32)


@pytest.mark.parametrize(
    "how",
    [
        {"num_hashes": 1, "chunk_size": 32},
        {"num_hashes": 3, "mask_within_chunks": True, "num_buckets": 8},
        {"shared_qk": False, "look_back": 2, "look_forward": 0},
        {"shared_qk": False, "mask_within_chunks": True, "look_back": 0, "num_buckets": 64, "chunk_size": 64, "heads": 3},
        {"normalize_keys": False, "look_back": 0, "look_forward": 0},
    ],
    ids=str,
)
def test_lsh_equals_the_plain_kernel_with_every_option(how):
    lsh_agrees(torch.float32, FEW, **how)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("scale", [10.0, 30.0])
def test_lsh_holds_its_precision_at_every_norm(dtype, scale, normalize):
    lsh_agrees(dtype, FEW, scale=scale, normalize_keys=normalize, chunk_size=32)


# --------------------------------------------------------------------------------------------------------- both

BOTH = pytest.mark.parametrize("kind", ["favor", "lsh"])


def kernel_of(kind, lengths):
    if kind == "lsh":
        kernel, _ = lsh_kernels(lengths)
        return kernel
    kernel, _, scale_H = favor(lengths, shift="both")
    return lambda q, k, v: kernel(q, k, v, scale_H)


@BOTH
def test_a_document_has_the_same_bits_alone_and_packed_and_every_time(kind):
    lengths = [17, 70, 3]
    fused, grad = packed(lengths, torch.bfloat16)
    inner = slice(17, 87)
    first = run(kernel_of(kind, lengths), fused, grad, torch.bfloat16)
    again = run(kernel_of(kind, lengths), fused, grad, torch.bfloat16)
    alone = run(kernel_of(kind, [70]), fused[inner], grad[inner], torch.bfloat16)
    for one, other, of_document in zip(first[:2], again[:2], alone[:2], strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one[inner], of_document)


@BOTH
def test_nothing_leaks_between_documents(kind):
    lengths = [17, 40, 3]
    fused, grad = packed(lengths, torch.float32)
    before = run(kernel_of(kind, lengths), fused, grad, torch.float32)
    inner, outside = slice(17, 57), torch.tensor([*range(17), *range(57, 60)])
    fused[outside], grad[outside] = 1e4, 0.0
    after = run(kernel_of(kind, lengths), fused, grad, torch.float32)
    for one, other in zip(before[:2], after[:2], strict=True):
        assert torch.equal(one[inner], other[inner])
    assert after[1][outside].abs().max() == 0


@BOTH
def test_a_gradient_without_strides_and_heads_that_lie_apart_are_taken(kind):
    lengths = [17, 20]
    fused, _ = packed(lengths, torch.float32)
    kernel = kernel_of(kind, lengths)
    plain = fused.float().requires_grad_()
    apart = fused.float().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_()
    for x in (plain, apart):
        kernel(*x.unbind(1)).sum().backward()  # the gradient of a sum is one number, expanded
    assert torch.equal(plain.grad, apart.grad)
