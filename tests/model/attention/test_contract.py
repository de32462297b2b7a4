"""What every kind of attention owes, whatever its kernel: a new member of the union is tested by being one."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dstrain.engine import free_port
from dstrain.model.attention import AttentionSettings
from dstrain.packed import Sequences

KINDS = typing.get_args(typing.get_args(AttentionSettings)[0])
MORE = {  # small enough that a document of ten tokens already has several chunks, blocks and features fewer than tokens
    "sdpa": [{"backend": "reference"}],
    "favor": [
        {"nb_features": 7, "temperature": 2.0, "center_queries": True, "projections": "fitted", "redraw_interval": 3},
        {"nb_features": 6, "normalize_qk": False, "feature_norm": "chi", "center_keys": False, "redraw_interval": 2},
        {"nb_features": 5, "normalize_qk": False, "center_queries": True, "antithetic": False},
    ],
    "lsh": [
        {"chunk_size": 4, "num_hashes": 3},
        {"chunk_size": 4, "mask_within_chunks": True, "normalize_keys": False, "look_forward": 0},
        {"chunk_size": 4, "mask_within_chunks": True, "shared_qk": False, "count_keys": "once"},
    ],
}
CASES = [kind(**more) for kind in KINDS for more in ({}, *MORE.get(kind().kind, []))]
H, D = 2, 8


def name(case):
    return "-".join(map(str, [case.kind, *case.model_dump(exclude_defaults=True).values()]))


every_case = pytest.mark.parametrize("case", CASES, ids=name)


def build(case, layer=0, seed=0):
    return case.build(H, D, layer, seed).eval()


def tokens(case, lengths, seed=0, scale=1.0, dtype=torch.float64):
    """q, k, v of documents; each document's numbers depend on its length alone, k is q where the kind ties them."""
    rngs = [torch.Generator().manual_seed(1000 * seed + n) for n in lengths]
    draws = [torch.randn(3, n, H, D, generator=rng, dtype=torch.float64) for n, rng in zip(lengths, rngs, strict=True)]
    q, k, v = torch.cat(draws, 1).to(dtype)
    q = q * scale
    return q, q if case.tied_qk else k * scale, v


def attend(case, module, q, k, v, lengths):
    return module(q, q if case.tied_qk else k, v, Sequences.of(lengths))


def relative(x: Tensor, truth: Tensor) -> float:
    return float((x.double() - truth).norm() / truth.norm())


@every_case
@settings(max_examples=6)
@given(lengths=st.lists(st.integers(1, 21), min_size=1, max_size=5, unique=True), data=st.data())
def test_a_document_is_attended_alone_whatever_lies_beside_it_and_in_which_order(case, lengths, data):
    module = build(case)
    packed = attend(case, module, *tokens(case, lengths), lengths).split(lengths)
    others = data.draw(st.permutations(lengths))
    shuffled = dict(zip(others, attend(case, module, *tokens(case, others), others).split(others), strict=True))
    for length, out in zip(lengths, packed, strict=True):
        alone = attend(case, module, *tokens(case, [length]), [length])
        torch.testing.assert_close(out, alone, rtol=0, atol=1e-12)
        torch.testing.assert_close(shuffled[length], alone, rtol=0, atol=1e-12)


@every_case
def test_nothing_leaks_between_documents_forward_or_backward(case):
    lengths = [6, 6, 11, 3]
    module, inner = build(case), slice(12, 23)
    q, k, v = (x.clone() for x in tokens(case, lengths))
    before = attend(case, module, q, k, v, lengths)[inner]
    for x in (q, k, v):
        x[:12] = 1e4
        x[23:] = -1e4
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    after = attend(case, module, q, k, v, lengths)[inner]
    torch.testing.assert_close(after, before, rtol=0, atol=1e-12)
    (after**2).sum().backward()
    for x in (q, v) if case.tied_qk else (q, k, v):
        assert x.grad[:12].abs().max() == 0 and x.grad[23:].abs().max() == 0
        assert x.grad[inner].abs().max() > 0


@every_case
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 61, 63, 64, 65, 131])
def test_every_length_works_and_the_output_lies_among_the_values(case, length):
    q, k, v = tokens(case, [length], dtype=torch.float32)
    out = attend(case, build(case), q, k, v, [length])
    assert out.shape == v.shape and out.dtype == v.dtype
    assert (out <= v.amax(0) + 1e-5).all() and (out >= v.amin(0) - 1e-5).all()


@pytest.mark.parametrize("case", [case for case in CASES if case.kind != "sdpa"], ids=name)
def test_16384_tokens_work_like_any_other_length(case):
    test_every_length_works_and_the_output_lies_among_the_values(case, 16_384)


@every_case
def test_constant_values_come_back_and_values_enter_linearly(case):
    lengths, module = [13, 1, 30], build(case)
    q, k, v = tokens(case, lengths)
    ones = torch.ones_like(v)
    torch.testing.assert_close(attend(case, module, q, k, ones, lengths), ones, rtol=0, atol=1e-12)
    out = attend(case, module, q, k, v, lengths)
    torch.testing.assert_close(attend(case, module, q, k, 3 * v - 2, lengths), 3 * out - 2, rtol=0, atol=1e-11)


@every_case
def test_permuting_a_document_permutes_its_output(case):
    length = min(getattr(case, "chunk_size", 40), 40)  # beyond a chunk LSH depends on positions: ties, chunk borders
    module, order = build(case), torch.randperm(length, generator=torch.Generator().manual_seed(0))
    q, k, v = tokens(case, [length])
    out = attend(case, module, q, k, v, [length])
    permuted = attend(case, module, q[order], k[order], v[order], [length])
    torch.testing.assert_close(permuted, out[order], rtol=0, atol=1e-12)


PRECISIONS = [(torch.float32, 2e-5), (torch.bfloat16, 1.5e-2), (torch.float16, 2e-3)]


@every_case
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("scale", [1.0, 10.0, 30.0])
def test_every_precision_stays_close_to_fp64_at_every_norm(case, dtype, tolerance, scale):
    lengths, module = [33, 5, 130], build(case)
    low = [x.to(dtype) for x in tokens(case, lengths, scale=scale)]
    weight = torch.randn(low[2].shape, generator=torch.Generator().manual_seed(5)).to(dtype)

    def run(inputs, weight):
        inputs = [x.detach().clone().requires_grad_() for x in inputs]
        out = attend(case, module, *inputs, lengths)
        out.backward(weight)
        return out.detach(), [x.grad for x in inputs if x.grad is not None]

    out, grads = run(low, weight)
    true_out, true_grads = run([x.double() for x in low], weight.double())
    assert out.dtype == dtype and relative(out, true_out) < tolerance
    for grad, true_grad in zip(grads, true_grads, strict=True):
        assert grad.dtype == dtype and grad.isfinite().all()
        if scale == 1.0:
            assert relative(grad, true_grad) < 4 * tolerance


@every_case
def test_gradients_are_those_of_finite_differences(case):
    lengths = [5, 5, 1, 9]
    module = build(case)
    q, k, v = (x.detach().clone().requires_grad_() for x in tokens(case, lengths, seed=3))
    inputs = (q, v) if case.tied_qk else (q, k, v)

    def run(*x):
        return attend(case, module, x[0], x[-2], x[-1], lengths)

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("case", [case for case in CASES if list(build(case).parameters())], ids=name)
def test_gradients_of_parameters_are_those_of_finite_differences(case):
    lengths, module = [5, 5, 9], build(case).double()
    names, values = zip(*module.named_parameters(), strict=True)
    q, k, v = tokens(case, lengths)

    def run(*values):
        weights = dict(zip(names, values, strict=True))
        return torch.func.functional_call(module, weights, (q, k, v, Sequences.of(lengths)))

    inputs = tuple(value.detach().clone().requires_grad_() for value in values)
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@every_case
def test_evaluation_does_not_depend_on_the_step_unless_the_weights_do(case):
    module, lengths = build(case), [40, 9]
    inputs = tokens(case, lengths, dtype=torch.float32)
    first = attend(case, module, *inputs, lengths)
    assert torch.equal(first, attend(case, module, *inputs, lengths))
    assert torch.equal(first, attend(case, build(case), *inputs, lengths))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module.set_step(11)
    if all(torch.equal(before[name], value) for name, value in module.state_dict().items()):
        assert torch.equal(first, attend(case, module, *inputs, lengths))


@every_case
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_no_bit(case, reentrant):
    module, lengths = build(case).train(), [40, 9]
    module.set_step(3)

    def grads(run):
        q, k, v = (x.clone().requires_grad_() for x in tokens(case, lengths, dtype=torch.float32))
        out = run(lambda q, k, v: attend(case, module, q, k, v, lengths), q, k, v)
        out.square().sum().backward()
        return [out, *(x.grad for x in (q, k, v) if x.grad is not None)]

    plain = grads(lambda f, *x: f(*x))
    recomputed = grads(lambda f, *x: checkpoint(f, *x, use_reentrant=reentrant, preserve_rng_state=False))
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


RANKS = """
import os, sys, torch
from torch import distributed
sys.path.insert(0, sys.argv[1])
import test_contract as contract
torch.set_num_threads(1)
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
distributed.init_process_group("gloo")
torch.manual_seed(rank)  # ranks differ in this, and it must not matter
outs = []
for case in contract.CASES:
    module = contract.build(case).train()
    for step in (0, 7):
        module.set_step(step)
        mine = contract.LENGTHS_OF_RANKS[rank::world]
        q, k, v = (x.requires_grad_() for x in contract.tokens(case, mine))
        out = contract.attend(case, module, q, k, v, mine)
        out.square().sum().backward()
        outs.append(dict(zip(mine, zip(out.split(mine), v.grad.split(mine), strict=True), strict=True)))
every = [None] * world
distributed.all_gather_object(every, outs)
if rank == 0:
    torch.save([{key: value for part in parts for key, value in part.items()} for parts in zip(*every)], sys.argv[2])
distributed.destroy_process_group()
"""
LENGTHS_OF_RANKS = [40, 9, 70, 13]


@pytest.mark.slow
def test_two_ranks_compute_what_one_does(tmp_path):
    def on_ranks(world):
        port, file = str(free_port()), tmp_path / f"{world}.pt"
        command = [sys.executable, "-c", RANKS, str(Path(__file__).parent), str(file)]
        shared = {**os.environ, "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks = [subprocess.Popen(command, env={**shared, "RANK": str(rank)}) for rank in range(world)]
        assert [rank.wait(120) for rank in ranks] == [0] * world
        return torch.load(file, weights_only=True)

    for alone, shared in zip(on_ranks(1), on_ranks(2), strict=True):
        assert alone.keys() == shared.keys()
        for length in alone:
            torch.testing.assert_close(shared[length], alone[length], rtol=0, atol=1e-12)


OWN_KERNELS = [case for case in CASES if case.kind != "sdpa"]  # torch's own follows autocast


@pytest.mark.parametrize("case", OWN_KERNELS, ids=name)
def test_autocast_around_the_kernel_does_not_reach_inside(case):
    module, lengths = build(case), [40]
    q, k, v = (x.clone().requires_grad_() for x in tokens(case, lengths, dtype=torch.float32))
    plain = attend(case, module, q, k, v, lengths)
    (plain_grad,) = torch.autograd.grad(plain.square().sum(), q)
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(case, module, q, k, v, lengths)
        (grad,) = torch.autograd.grad(out.square().sum(), q)
    assert torch.equal(out, plain) and torch.equal(grad, plain_grad)


@every_case
def test_the_global_generator_is_left_alone_and_does_not_matter(case):
    lengths, outs = [20], []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        state = torch.random.get_rng_state()
        module = build(case).train()
        module.set_step(5)
        outs.append(attend(case, module, *tokens(case, lengths, dtype=torch.float32), lengths))
        assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(*outs)


@every_case
def test_saved_weights_bring_everything_back(case):
    lengths, trained = [40, 9], build(case).train()
    trained.set_step(7)
    for parameter in trained.parameters():
        parameter.data += 0.25
    resumed = build(case).train()
    resumed.load_state_dict(trained.state_dict())
    inputs = tokens(case, lengths, dtype=torch.float32)
    for step in (7, 8, 9):
        trained.set_step(step)
        resumed.set_step(step)
        assert torch.equal(attend(case, trained, *inputs, lengths), attend(case, resumed, *inputs, lengths))


@every_case
def test_equal_tokens_attend_finitely(case):
    lengths = [9, 70]
    q, k, v = (x[:1].expand(sum(lengths), H, D).clone().requires_grad_() for x in tokens(case, [1]))
    out = attend(case, build(case), q, k, v, lengths)
    torch.testing.assert_close(out, v, rtol=0, atol=1e-12)
    out.square().sum().backward()
    assert q.grad.isfinite().all() and v.grad.isfinite().all()


@every_case
def test_settings_say_whether_keys_are_queries(case):
    assert isinstance(case.tied_qk, bool)


@every_case
def test_zero_queries_and_keys_are_finite(case):
    v = tokens(case, [30])[2]
    q = torch.zeros_like(v, requires_grad=True)
    out = attend(case, build(case), q, q, v, [30])
    out.square().sum().backward()
    assert out.isfinite().all() and q.grad.isfinite().all()


@every_case
def test_strided_views_are_read_in_place(case):
    lengths = [12, 12, 7]
    fused = torch.randn(31, 3, H, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    q, k, v = fused.unbind(1)
    expected = attend(case, build(case), q.contiguous(), k.contiguous(), v.contiguous(), lengths)
    torch.testing.assert_close(attend(case, build(case), q, k, v, lengths), expected, rtol=0, atol=1e-13)


@every_case
def test_kernel_says_what_runs_and_flops_grow_with_length(case):
    module = build(case)
    assert len(module.kernel) > 10
    assert module.flops([100, 200]) == module.flops([100]) + module.flops([200]) > 0
    if case.kind != "sdpa":
        assert module.flops([16_384]) < 2.6 * module.flops([8_192]), "linear in the length"


def saved_bytes(module, case, lengths):
    """Bytes kept for the backward pass, each storage once."""
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    q, k, v = (x.clone().requires_grad_() for x in tokens(case, lengths, dtype=torch.float32))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = attend(case, module, q, k, v, lengths)
    assert out.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind().kind != "sdpa"])
def test_no_more_than_twice_of_sdpa_is_kept_for_backward(kind):
    lengths = [700, 300]
    exact = KINDS[0]()
    assert exact.kind == "sdpa"
    assert saved_bytes(build(kind()), kind(), lengths) <= 2 * saved_bytes(build(exact), exact, lengths)


PEAK = """
import resource, sys, torch
from pydantic import TypeAdapter
from dstrain.model.attention import AttentionSettings
from dstrain.packed import Sequences
torch.set_num_threads(1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
case, length = TypeAdapter(AttentionSettings).validate_json(sys.argv[1]), int(sys.argv[2])
module = case.build(4, 64, 0, 0)
def step(length):
    q, k, v = (torch.randn(length, 4, 64, requires_grad=True) for _ in range(3))
    out = module(q, q if case.tied_qk else k, v, Sequences.of([length]))
    out.backward(torch.ones_like(out))
    assert all(x.grad.isfinite().all() for x in (q, v))
step(256)
before = peak()
step(length)
print(peak() - before)
"""


@functools.cache
def peak_kilobytes(case, length):
    command = [sys.executable, "-c", PEAK, case.model_dump_json(), str(length)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind().kind != "sdpa"])
def test_16384_tokens_take_little_more_memory_than_sdpa(kind):
    assert peak_kilobytes(kind(), 16_384) <= 1.5 * peak_kilobytes(KINDS[0](), 16_384)
