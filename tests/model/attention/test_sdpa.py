"""Exact attention: the choice of kernel, and the fused path against the definition."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from dstrain.model.attention.sdpa import SdpaSettings, choose_kernel
from dstrain.packed import Sequences

LENGTHS = [5, 5, 1, 12, 5]


def inputs(dtype=torch.float64, heads=2, head_dim=8):
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(sum(LENGTHS), heads, head_dim, generator=rng, dtype=torch.float64).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_equals_the_dense_definition_with_a_document_mask(backend):
    q, k, v = inputs()
    document = torch.repeat_interleave(torch.arange(5), torch.tensor(LENGTHS))
    scores = torch.einsum("ihd,jhd->hij", q, k) / 8**0.5
    scores = scores.masked_fill(document[:, None] != document[None], -torch.inf)
    expected = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v)
    out = SdpaSettings(backend=backend).build(2, 8, 0, 0)(q, k, v, Sequences.of(LENGTHS))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)


def test_equally_long_neighbours_share_one_call_and_no_call_has_a_mask(monkeypatch):
    calls = []

    def record(q, k, v, **more):
        calls.append((q.shape[0], q.shape[2], more))
        return scaled_dot_product_attention(q, k, v, **more)

    monkeypatch.setattr("dstrain.model.attention.sdpa.scaled_dot_product_attention", record)
    SdpaSettings().build(2, 8, 0, 0)(*inputs(), Sequences.of(LENGTHS))
    assert calls == [(2, 5, {}), (1, 1, {}), (1, 12, {}), (1, 5, {})]


def test_fp16_on_a_cpu_is_computed_in_fp32_and_says_so():
    low = inputs(torch.float16)
    module = SdpaSettings().build(2, 8, 0, 0)
    out = module(*low, Sequences.of(LENGTHS))
    wide = SdpaSettings().build(2, 8, 0, 0)(*(x.float() for x in low), Sequences.of(LENGTHS))
    assert torch.equal(out, wide.half())
    assert module.kernel == "flash per document (a CPU has no variable-length kernel; fp16 is computed in fp32)"


@pytest.mark.parametrize(
    ("dtype", "head_dim", "capability", "varlen", "kernel", "reason"),
    [
        (torch.bfloat16, 64, (9, 0), True, "varlen flash", "one call"),
        (torch.float16, 64, (8, 0), True, "varlen flash", "one call"),
        (torch.float32, 64, (9, 0), True, "sdpa per document", "not float32"),
        (torch.bfloat16, 66, (9, 0), True, "sdpa per document", "multiples of 8 up to 256, not 66"),
        (torch.bfloat16, 264, (9, 0), True, "sdpa per document", "not 264"),
        (torch.bfloat16, 64, (7, 5), True, "sdpa per document", "Turing has less"),
        (torch.bfloat16, 64, (9, 0), False, "flash per document", "has no torch.nn.attention.varlen"),
    ],
)
def test_a_gpu_takes_flash_or_says_why_not(monkeypatch, dtype, head_dim, capability, varlen, kernel, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Turing")
    if not varlen:
        monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    chosen, why = choose_kernel("auto", torch.device("cuda"), dtype, head_dim)
    assert chosen == kernel and reason in why


def test_the_reference_runs_when_asked_for():
    assert SdpaSettings(backend="reference").build(2, 8, 0, 0).kernel == "reference (asked for by backend: reference)"


def test_variable_length_flash_is_called_with_all_documents_at_once(monkeypatch):
    """The GPU path on a CPU: a stand-in with varlen_attn's signature checks what it is handed."""

    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k):
        assert cu_q.dtype == torch.int32 and cu_q.tolist() == [0, 5, 10, 11, 23, 28] == cu_k.tolist()
        assert max_q == max_k == 12 and q.shape == k.shape == v.shape == (28, 2, 8)
        return v + 1

    monkeypatch.setattr("dstrain.model.attention.sdpa.choose_kernel", lambda *_: ("varlen flash", "a test"))
    monkeypatch.setattr("dstrain.model.attention.sdpa._find_varlen_attn", lambda: varlen_attn)
    q, k, v = inputs()
    assert torch.equal(SdpaSettings().build(2, 8, 0, 0)(q, k, v, Sequences.of(LENGTHS)), v + 1)


@pytest.mark.gpu
def test_flash_on_a_gpu_equals_the_reference():
    q, k, v = (x.cuda() for x in inputs(torch.bfloat16))
    sequences = Sequences.of(LENGTHS, "cuda")
    module = SdpaSettings().build(2, 8, 0, 0)
    out = module(q, k, v, sequences)
    assert module.kernel.startswith("varlen flash")
    truth = SdpaSettings(backend="reference").build(2, 8, 0, 0)(q.double(), k.double(), v.double(), sequences)
    torch.testing.assert_close(out.double(), truth, rtol=0, atol=2e-2)
