"""The Triton kernels: in Triton's interpreter and compiled for GPUs that are not here, on a GPU where there is one, and
what is said where they cannot run.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dstrain.model.attention import lsh, lsh_triton, triton_tools
from dstrain.model.attention.favor import FavorSettings
from dstrain.packed import Sequences

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")


def in_a_process_of_its_own(name, **environment):
    """Another process, so that no other test meets an interpreted or a recording triton."""
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", str(HERE / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@needs_triton
@pytest.mark.slow
def test_the_kernels_are_right_in_the_interpreter():
    in_a_process_of_its_own("triton_cases.py", TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.slow
def test_the_kernels_compile_for_gpus(tmp_path):
    in_a_process_of_its_own("triton_compiled.py", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))


def test_without_triton_the_kernels_import_and_say_why_they_cannot_run():
    code = """if True:
        import sys, torch
        sys.modules["triton"] = None
        from dstrain.model.attention import favor_triton, lsh_triton, triton_tools
        from dstrain.model.attention.lsh import LshSettings
        q = torch.zeros(1, 1, 16)
        print(triton_tools.why_not(q), lsh_triton.supported(q, LshSettings()), sep="|")
    """
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == "triton is not installed|triton is not installed\n"


@needs_triton
def test_what_the_kernels_cannot_take_has_a_reason(monkeypatch):
    q = torch.zeros(3, 2, 64, dtype=torch.bfloat16)
    assert "run on a GPU, not on cpu" in triton_tools.why_not(q)
    gpu = type("Rows", (), {"device": torch.device("cuda"), "dtype": q.dtype, "shape": q.shape})()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    settings = lsh.LshSettings()
    assert triton_tools.why_not(gpu) is lsh_triton.supported(gpu, settings) is None
    for chunk in (8, 48):
        assert f"not {chunk}" in lsh_triton.supported(gpu, lsh.LshSettings(chunk_size=chunk))
    assert "every round" in lsh_triton.supported(gpu, lsh.LshSettings(count_keys="once"))
    gpu.shape = torch.Size([3, 2, 48])
    assert "not 48" in triton_tools.why_not(gpu)
    gpu.dtype = torch.float64
    assert "not float64" in triton_tools.why_not(gpu)
    gpu.dtype, gpu.shape = q.dtype, q.shape
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Turing")
    assert "Turing has less" in triton_tools.why_not(gpu)


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize("kind", [FavorSettings(center_queries=True), lsh.LshSettings(), lsh.LshSettings(shared_qk=False)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 1.5e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_on_a_gpu_the_kernels_equal_the_plain_ones(kind, dtype, tolerance, head_dim):
    lengths = [1, 2, 15, 16, 17, 63, 64, 65, 130, 1021, 5000]
    rng = torch.Generator().manual_seed(0)
    fused, grad = (torch.randn(sum(lengths), n, 4, head_dim, generator=rng).to(dtype) for n in (3, 1))
    module = kind.build(4, head_dim, 0, 0).eval()

    def run(fused, grad, device):
        fused = fused.to(device).requires_grad_()
        q, k, v = fused.unbind(1)
        out = module.to(device)(q, q if kind.tied_qk else k, v, Sequences.of(lengths, device))
        out.backward(grad.squeeze(1).to(device))
        return [x.detach().cpu().double() for x in (out, *(fused.grad[:, part] for part in range(3)))]

    found = run(fused, grad, "cuda")
    assert "triton" in module.kernel.lower(), module.kernel
    truth = run(fused.double(), grad.double(), "cpu")  # fp64 is the plain kernel on any device
    for part, (one, other) in enumerate(zip(found, truth, strict=True)):
        assert (one - other).norm() <= (tolerance if part == 0 else 4 * tolerance) * other.norm()
    again = run(fused, grad, "cuda")
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
