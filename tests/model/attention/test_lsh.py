"""LSH attention: the chunked kernel against a dense table of who sees whom, and the life of its rotations."""

from __future__ import annotations

import math

import pytest
import torch

from dstrain.model.attention import blocked, lsh
from dstrain.model.attention.hashing import hash_tokens, sort_tokens
from dstrain.model.attention.lsh import LshSettings
from dstrain.packed import Sequences

LENGTHS = [37, 5, 16, 1, 9]


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def chunk_of(bucket_L, chunk_size):
    """The chunk of each token of one document once its tokens are sorted by (bucket, position)."""
    order = sorted(range(len(bucket_L)), key=lambda token: (int(bucket_L[token]), token))
    chunk = torch.empty(len(order), dtype=torch.int64)
    for place, token in enumerate(order):
        chunk[token] = place // chunk_size
    return chunk


def times_seen(module, q, k, lengths):
    """(H, T, T): in how many rounds query i sees key j, by plain loops over heads, rounds and documents."""
    settings, sequences = module.settings, Sequences.of(lengths)
    counts = [settings.buckets_of(length) for length in lengths]
    q_bucket = k_bucket = hash_tokens(q, module.rotations(q.device), sequences, counts)
    if k is not q:
        k_bucket = hash_tokens(k, module.rotations(k.device), sequences, counts)
    seen = torch.zeros(q.shape[1], len(q), len(q))
    for head, round_ in ((h, r) for h in range(q.shape[1]) for r in range(settings.num_hashes)):
        for start, length in zip(sequences.starts, lengths, strict=False):
            here = slice(start, start + length)
            bq, bk = q_bucket[head, round_, here], k_bucket[head, round_, here]
            apart = chunk_of(bk, settings.chunk_size)[None] - chunk_of(bq, settings.chunk_size)[:, None]
            visible = (apart >= -settings.look_back) & (apart <= settings.look_forward)
            if settings.mask_within_chunks:
                visible &= bq[:, None] == bk[None]
            if settings.shared_qk:
                visible.fill_diagonal_(False)
            seen[head, here, here] += visible
    return seen


def reference(module, q, k, v, lengths):
    """One dense softmax over the multiset of keys that the rounds show; a query that was shown none sees itself."""
    settings = module.settings
    seen = times_seen(module, q, k, lengths).to(q.dtype)
    if settings.count_keys == "once":
        seen = seen.clamp_max(1)
    seen = torch.where((seen.sum(-1, keepdim=True) == 0) & torch.eye(len(q), dtype=torch.bool), 1.0, seen)
    lengths_of_keys = (k.square().sum(-1, keepdim=True) + blocked.UNIT_EPS).sqrt()
    keys = k / (lengths_of_keys if settings.normalize_keys else math.sqrt(k.shape[-1]))
    scores = torch.einsum("ihd,jhd->hij", q, keys) + seen.log()
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("count", ["every_round", "once"])
@pytest.mark.parametrize(
    "more",
    [
        {"num_hashes": 1},
        {"num_hashes": 4},
        {"num_hashes": 3, "mask_within_chunks": True},
        {"num_hashes": 2, "look_forward": 0, "normalize_keys": False},
        {"num_hashes": 2, "look_back": 2, "look_forward": 0, "mask_within_chunks": True},
        {"num_hashes": 2, "look_back": 0, "look_forward": 0, "num_buckets": 8},
    ],
)
def test_equals_the_dense_table_of_who_sees_whom(shared, count, more):
    module = LshSettings(chunk_size=4, shared_qk=shared, count_keys=count, **more).build(2, 8, 0, 0)
    q, k, v = normal(3, sum(LENGTHS), 2, 8)
    k = q if shared else k
    equals_reference(module, q, k, v, LENGTHS)


def equals_reference(module, q, k, v, lengths):
    """The output, and the gradients of a weighted sum of it."""
    inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    if module.settings.shared_qk:
        inputs[1] = inputs[0]
    outs = [module(*inputs, Sequences.of(lengths)), reference(module, *inputs, lengths)]
    wanted = inputs[int(module.settings.shared_qk) :]
    grads = [torch.autograd.grad(out, wanted, normal(*v.shape, seed=4)) for out in outs]
    for mine, true in zip([outs[0], *grads[0]], [outs[1], *grads[1]], strict=True):
        torch.testing.assert_close(mine, true, rtol=0, atol=1e-11)


@pytest.mark.parametrize("more", [{}, {"mask_within_chunks": True, "shared_qk": False}])
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33, 61, 127])
def test_equals_it_at_every_length_around_a_chunk(length, more):
    module = LshSettings(chunk_size=16, **more).build(2, 8, 0, 0)
    q, k, v = normal(3, length, 2, 8)
    equals_reference(module, q, q if module.settings.shared_qk else k, v, [length])


def test_equals_it_at_16384_tokens():
    module = LshSettings().build(1, 8, 0, 0)
    q, _, v = normal(3, 16_384, 1, 8)
    out = module(q, q, v, Sequences.of([16_384]))
    some = torch.randint(16_384, (40,), generator=torch.Generator().manual_seed(0))
    buckets = hash_tokens(q, module.rotations(q.device), Sequences.of([16_384]), [256])[0]
    seen = torch.zeros(40, 16_384)
    for bucket_L in buckets:
        chunk = chunk_of(bucket_L, 64)
        seen += (chunk[None] - chunk[some, None]).abs() <= 1
    seen[torch.arange(40), some] = 0
    scores = q[some, 0] @ torch.nn.functional.normalize(q[:, 0]).mT + seen.log()
    torch.testing.assert_close(out[some, 0], scores.softmax(-1) @ v[:, 0], rtol=0, atol=1e-6)


def test_copies_of_one_round_are_one_round():
    q, _, v = normal(3, 61, 2, 8)
    one, five = (LshSettings(num_hashes=rounds, chunk_size=8).build(2, 8, 0, 0) for rounds in (1, 5))
    rotations = one.rotations(q.device)
    five.rotations = lambda device: rotations.expand(-1, -1, 5, -1, -1)
    outs = [module(q, q, v, Sequences.of([61])) for module in (one, five)]
    torch.testing.assert_close(outs[1], outs[0], rtol=0, atol=1e-13)


def exact(q, v, scale, keys):
    scores = torch.einsum("ihd,jhd->hij", q, keys) * scale
    scores.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v)


@pytest.mark.parametrize(
    "more",
    [
        {"chunk_size": 64},
        {"chunk_size": 8, "num_buckets": 1, "look_back": 5, "look_forward": 5, "mask_within_chunks": True},
    ],
)
@pytest.mark.parametrize("rounds", [1, 3])
def test_one_chunk_or_one_bucket_is_exact_attention_without_the_diagonal(more, rounds):
    q, _, v = normal(3, 40, 2, 8)
    module = LshSettings(num_hashes=rounds, normalize_keys=False, **more).build(2, 8, 0, 0)
    torch.testing.assert_close(module(q, q, v, Sequences.of([40])), exact(q, v, 8**-0.5, q), rtol=0, atol=1e-12)


def test_separate_keys_in_one_chunk_are_plain_attention():
    q, k, v = normal(3, 40, 2, 8)
    module = LshSettings(normalize_keys=False, shared_qk=False).build(2, 8, 0, 0)
    expected = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v))).transpose(0, 1)
    torch.testing.assert_close(module(q, k, v, Sequences.of([40])), expected, rtol=0, atol=1e-12)


def test_a_token_alone_in_its_bucket_sees_itself_and_nobody_elses_values():
    """All tokens along one axis, one opposite to them: the reference study averaged that one's whole window."""
    q = torch.zeros(40, 1, 8, dtype=torch.float64)
    q[:, 0, 0] = 1
    q[17] *= -1
    v = normal(40, 1, 8)
    module = LshSettings(chunk_size=16, num_buckets=2, mask_within_chunks=True).build(1, 8, 0, 0)
    out = module(q, q, v, Sequences.of([40]))
    assert torch.equal(out[17], v[17])
    others = v + 5
    others[17] = v[17]
    assert torch.equal(module(q, q, others, Sequences.of([40]))[17], v[17])
    q.requires_grad_()
    v.requires_grad_()
    module(q, q, v, Sequences.of([40])).backward(normal(40, 1, 8, seed=2))
    assert torch.equal(v.grad[17], normal(40, 1, 8, seed=2)[17]) and q.grad[17].abs().max() == 0


def test_a_token_alone_in_one_round_is_what_the_other_round_makes_of_it():
    """A round that shows nothing has no weight at all, not even of rounding errors."""
    q, _, v = normal(3, 40, 1, 8)
    lonely, other = (LshSettings(num_hashes=1).build(1, 8, 0, seed).rotations(q.device) for seed in (0, 1))
    settings = LshSettings(chunk_size=4, num_buckets=64, mask_within_chunks=True, num_hashes=2)
    both, last = settings.build(1, 8, 0, 0), settings.model_copy(update={"num_hashes": 1}).build(1, 8, 0, 0)
    both.rotations, last.rotations = (lambda device: torch.cat([lonely, other], 2)), (lambda device: other)
    counts, sequences = [64], Sequences.of([40])
    bucket = hash_tokens(q, lonely, sequences, counts)[0, 0]
    alone = (bucket[:, None] == bucket).sum(1) == 1
    assert 0 < alone.sum() < 40
    outs = [module(q, q, v, sequences) for module in (both, last)]
    assert torch.equal(outs[0][alone], outs[1][alone])


def test_buckets_ignore_the_length_of_a_vector_and_neighbours_share_them():
    lengths, counts = [300, 50], [256, 4]
    module = LshSettings().build(2, 8, 0, 0)
    x = normal(350, 2, 8, dtype=torch.float32)
    buckets = hash_tokens(x, module.rotations(x.device), Sequences.of(lengths), counts)
    assert buckets.min() >= 0 and buckets[..., :300].max() < 256 <= buckets[..., 300:].min() and buckets.max() < 260
    assert len(buckets[0, 0, :300].unique()) > 64, "many buckets come from two rotations"
    assert torch.equal(buckets, hash_tokens(8 * x, module.rotations(x.device), Sequences.of(lengths), counts))
    x = x + 1e-4 * normal(350, 2, 8, seed=1).float()
    near = hash_tokens(x, module.rotations(x.device), Sequences.of(lengths), counts)
    assert (near == buckets).float().mean() > 0.98


@pytest.mark.parametrize("count", [1, 2, 8, 128, 256, 512])
def test_a_bucket_is_the_nearest_of_the_directions_and_their_opposites(count):
    lengths = [20, 1500, 7]
    rotations, x = LshSettings().build(2, 8, 0, 0).rotations(torch.device("cpu")), normal(1527, 2, 8).float()
    coarse, fine = (count, 1) if count <= 128 else (16, count // 16) if count == 256 else (32, 16)

    def nearest(which, kinds):
        along = torch.einsum("thd,hdrk->hrtk", x, rotations[:, :, :, which, : kinds // 2])
        return torch.cat([along, -along], -1).argmax(-1) if kinds > 1 else torch.zeros(2, 2, 1527, dtype=torch.int64)

    expected = (nearest(0, coarse) * fine + nearest(1, fine))[:, :, 20:1520] + 4
    buckets = hash_tokens(x, rotations, Sequences.of(lengths), [4, count, 2])
    assert buckets.dtype == torch.int32
    assert (buckets[:, :, 20:1520] == expected).float().mean() > 0.999, "all but near ties"
    assert buckets[:, :, :20].max() < 4 and buckets[:, :, 1520:].min() >= 4 + count
    alone = hash_tokens(x[20:1520], rotations, Sequences.of([1500]), [count])
    assert torch.equal(alone + 4, buckets[:, :, 20:1520]), "batch-mates do not matter"


def test_sorting_permutes_within_documents_by_bucket_then_position():
    settings, sequences = LshSettings(chunk_size=4), Sequences.of(LENGTHS)
    counts = [settings.buckets_of(length) for length in LENGTHS]
    x, rotations = normal(sum(LENGTHS), 2, 8), settings.build(2, 8, 0, 0).rotations(torch.device("cpu"))
    order = sort_tokens(x, rotations, sequences, settings)
    assert order.token_HRT.dtype == order.bucket_HRT.dtype == torch.int32
    hashed = hash_tokens(x, rotations, sequences, counts).flatten(0, 1)
    orders = zip(order.token_HRT.flatten(0, 1), order.bucket_HRT.flatten(0, 1), hashed, strict=True)
    for token_T, bucket_T, hashed_T in orders:
        assert torch.equal(bucket_T, hashed_T[token_T.long()])
        for start, length in zip(sequences.starts, LENGTHS, strict=False):
            tokens, buckets = token_T[start : start + length], bucket_T[start : start + length]
            assert sorted(tokens.tolist()) == list(range(start, start + length))
            pairs = list(zip(buckets.tolist(), tokens.tolist(), strict=True))
            assert pairs == sorted(pairs)


def test_the_number_of_buckets_follows_a_documents_own_length():
    settings = LshSettings(chunk_size=64)
    counts = {length: settings.buckets_of(length) for length in (1, 64, 65, 128, 129, 256, 257, 16_384)}
    assert counts == {1: 1, 64: 1, 65: 2, 128: 2, 129: 4, 256: 4, 257: 8, 16_384: 256}
    assert LshSettings(num_buckets=16).buckets_of(3) == 16
    with pytest.raises(ValueError, match="num_buckets is 12; give a power of two"):
        LshSettings(num_buckets=12)


TILED = [
    {"mask_within_chunks": True, "count_keys": "once", "shared_qk": False},
    {"look_forward": 0},
    {"look_back": 0, "shared_qk": False},
]


@pytest.mark.parametrize("more", TILED)
def test_blocks_of_chunks_and_heads_at_once_are_only_a_tiling(monkeypatch, more):
    module = LshSettings(chunk_size=4, num_hashes=3, **more).build(3, 8, 0, 0)

    def run():
        q, k, v = normal(3, sum(LENGTHS), 3, 8).requires_grad_().unbind(0)
        inputs = (q, v) if module.settings.shared_qk else (q, k, v)
        out = module(q, k, v, Sequences.of(LENGTHS))
        return [out, *torch.autograd.grad((out * normal(*out.shape, seed=9)).sum(), inputs)]

    whole = run()
    kernel = lsh._Kernel
    for heads, chunks in ((1, 1), (2, 5), (3, 2)):

        class Other(kernel):
            def __init__(self, *inputs, heads=heads, chunks=chunks):
                super().__init__(*inputs)
                self.heads_together, self.chunks_together = heads, chunks

        monkeypatch.setattr(lsh, "_Kernel", Other)
        for mine, one in zip(run(), whole, strict=True):
            torch.testing.assert_close(mine, one, rtol=1e-10, atol=1e-11)


def test_only_chunks_whose_windows_hold_what_they_must_not_see_are_masked():
    q, sequences = normal(13 + 8, 1, 8), Sequences.of([13, 8])
    masked = lsh._Kernel(q, sequences, LshSettings(chunk_size=2, look_back=2, look_forward=1)).masked
    assert masked == [*(True, True, False, False, False, True, True), *(True, True, False, True)]
    assert not any(lsh._Kernel(q[:8], Sequences.of([8]), LshSettings(chunk_size=2, look_back=0, look_forward=0)).masked)
    assert all(lsh._Kernel(q, sequences, LshSettings(chunk_size=2, mask_within_chunks=True)).masked)


def test_blocks_fit_the_caches_and_short_documents_share_them():
    def together(length, **more):
        kernel = lsh._Kernel(torch.empty(length, 8, 4), Sequences.of([length]), LshSettings(**more))
        assert kernel.chunks_together * kernel.chunk * kernel.window <= max(800_000, 3 * kernel.chunk**2)
        return kernel.heads_together

    assert together(16_384) == together(16_384, chunk_size=1024) == 1
    assert together(1024) == 4 and together(64) == 8


STRIDED = {
    "heads of zero stride": lambda x: x[:, :1].expand(-1, 2, -1),
    "every other head": lambda x: x[:, ::2],
    "head size not last": lambda x: x[:, :2].transpose(1, 2).contiguous().transpose(1, 2),
    "one of three": lambda x: x.unflatten(0, (-1, 3))[:, 1][:, :2],
}


@pytest.mark.parametrize("strides", STRIDED)
def test_tensors_of_any_strides_are_read_right(strides):
    q, k, v = (STRIDED[strides](x) for x in normal(3, 45, 3, 8))
    module = LshSettings(chunk_size=4, shared_qk=False).build(2, 8, 0, 0)
    equals = [module(*(change(x) for x in (q, k, v)), Sequences.of([len(q)])) for change in (torch.clone, lambda x: x)]
    torch.testing.assert_close(*equals, rtol=0, atol=1e-13)
    inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    grad = STRIDED[strides](normal(45, 3, 8, seed=3))
    grads = [torch.autograd.grad(module(*inputs, Sequences.of([len(q)])), inputs, g) for g in (grad.contiguous(), grad)]
    for mine, true in zip(*grads, strict=True):
        torch.testing.assert_close(mine, true, rtol=0, atol=1e-13)


@pytest.mark.parametrize("more", [{}, {"shared_qk": False}, {"mask_within_chunks": True}])
def test_a_round_adds_nothing_to_what_is_kept_but_its_order(more):
    def kept(rounds):
        module, storages = LshSettings(num_hashes=rounds, **more).build(2, 8, 0, 0), {}
        q, k, v = (x.requires_grad_() for x in normal(3, 200, 2, 8).unbind(0))
        with torch.autograd.graph.saved_tensors_hooks(lambda x: storages.update({x.data_ptr(): x}), lambda x: x):
            module(q, k, v, Sequences.of([200]))
        return sum(x.nbytes for x in storages.values())

    rounds, heads, int32, orders = 3, 2, 4, 2 if more else 1  # tokens, or tokens and buckets; of queries (and keys)
    assert kept(5) - kept(2) == rounds * heads * int32 * orders * 200


def test_flops_are_hashing_and_two_products_of_every_window():
    settings = LshSettings(num_hashes=3, chunk_size=4, look_forward=0)
    slots, window = 12 + 4, 8  # 9 tokens in 3 chunks, 4 tokens in 1
    directions = 9 * (4 + 1) // 2 + 4 * (1 + 1) // 2  # 4 buckets and 1
    assert settings.build(2, 8, 0, 0).flops([9, 4]) == 2 * 3 * 8 * (4 * slots * window + 2 * directions)


def test_bf16_products_on_hardware_that_has_them_stay_close(monkeypatch):
    low = [x.bfloat16() for x in normal(3, sum(LENGTHS), 2, 8)]

    def run(q, _, v):
        q, v = q.detach().clone().requires_grad_(), v.detach().clone().requires_grad_()
        out = LshSettings(chunk_size=4).build(2, 8, 0, 0)(q, q, v, Sequences.of(LENGTHS))
        out.square().sum().backward()
        return [out.detach(), q.grad, v.grad]

    truth = run(*(x.double() for x in low))
    monkeypatch.setattr(blocked, "multiplies_bf16", lambda device: True)
    for mine, true in zip(run(*low), truth, strict=True):
        assert mine.dtype == torch.bfloat16 and float((mine.double() - true).norm() / true.norm()) < 2e-2


def test_rotations_change_with_the_step_in_training_and_stay_in_evaluation():
    device = torch.device("cpu")
    module = LshSettings(redraw_interval=2).build(2, 8, 0, 0)

    def at(step):
        module.set_step(step)
        return module.rotations(device).clone()

    train = [at(step) for step in (0, 1, 2)]
    assert torch.equal(train[0], train[1]) and not torch.equal(train[0], train[2])
    module.eval()
    fixed = at(0)
    assert torch.equal(fixed, at(9)) and not any(torch.equal(fixed, one) for one in train)
    module.train()
    assert torch.equal(at(2), train[2]), "what was drawn for a step is drawn again"
    assert not torch.equal(train[0][0], train[0][1]), "heads have rotations of their own"
    for other in (LshSettings().build(2, 8, 1, 0), LshSettings().build(2, 8, 0, 1)):
        assert not torch.equal(other.rotations(device), train[0])
    assert len(module._rotations) == 2, "of all that were drawn only the last are kept, for training and for evaluation"
    never = LshSettings(redraw_interval=None).build(2, 8, 0, 0)
    first = never.rotations(device)
    never.set_step(50)
    assert torch.equal(never.rotations(device), first)


def test_more_rounds_catch_more_of_the_exact_attention():
    """Clustered tokens: the share of exact attention's mass that lies on keys some round shows."""
    centres = normal(32, 1, 16, seed=3)
    q = centres[torch.arange(256) % 32] * 2 + 0.5 * normal(256, 1, 16)
    scores = torch.einsum("ihd,jhd->hij", q, q / q.norm(dim=-1, keepdim=True))
    scores.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    mass = scores.softmax(-1)

    def caught(rounds):
        module = LshSettings(chunk_size=8, num_hashes=rounds, mask_within_chunks=True).build(1, 16, 0, 0)
        return float(mass[times_seen(module, q, q, [256]) > 0].sum() / mass.sum())

    shares = [caught(rounds) for rounds in (1, 2, 4)]
    assert shares == sorted(shares) and shares[0] > 3 * 8 / 256 and shares[-1] > 0.5
