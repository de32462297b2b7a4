from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from dstrain.model.encoder import Encoder, EncoderSettings
from dstrain.model.heads import ClassificationHead, MlmHead, pool
from dstrain.packed import Batch, Sequences
from dstrain.schema import validate

VOCABULARY, HIDDEN = 30, 16
TINY = {"num_layers": 1, "hidden_size": HIDDEN, "intermediate_size": 32, "num_heads": 2, "qkv_size": 16}


def tiny_encoder() -> Encoder:
    return Encoder(validate(EncoderSettings, {**TINY, "init_std": 0.2}, "test"), VOCABULARY, 1)


def mlm_head() -> MlmHead:
    return MlmHead(HIDDEN, VOCABULARY, seed=1, init_std=0.2, layer_norm_eps=1e-12)


def classifier(pooling="cls", pooler="bert", dropout=0.5) -> ClassificationHead:
    return ClassificationHead(HIDDEN, 3, pooling, pooler, dropout, seed=1, init_std=0.2)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def all_logits(head: MlmHead, hidden_TE: torch.Tensor, encoder: Encoder) -> torch.Tensor:
    """Logits of every token, as the paper writes the head."""
    return head.norm(F.gelu(head.dense(hidden_TE))) @ encoder.word_embedding.weight.T + head.bias


def test_masked_positions_alone_give_the_loss_of_the_full_computation():
    encoder, head, hidden_TE = tiny_encoder(), mlm_head(), noise(40, HIDDEN)
    positions, targets = torch.tensor([3, 4, 17, 39]), torch.tensor([5, 0, 29, 7])
    result = head(hidden_TE, torch.stack((positions, targets)), encoder.word_embedding)
    labels_T = torch.full((40,), -100)
    labels_T[positions] = targets
    logits_TV = all_logits(head, hidden_TE, encoder)
    truth = F.cross_entropy(logits_TV, labels_T, ignore_index=-100, reduction="sum")
    assert torch.allclose(result.loss_sum, truth, rtol=1e-6)
    assert result.correct == (logits_TV.argmax(-1) == labels_T).sum()
    right = torch.stack((positions, logits_TV[positions].argmax(-1)))
    assert head(hidden_TE, right, encoder.word_embedding).correct == 4


def test_no_unmasked_token_meets_the_vocabulary():
    encoder, head, shapes = tiny_encoder(), mlm_head(), []
    encoder.word_embedding.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape)))
    head(noise(40, HIDDEN), torch.tensor([[1, 2], [3, 4]]), encoder.word_embedding)
    assert shapes == [(2, VOCABULARY)]


def test_the_output_weights_are_the_words():
    encoder, head = tiny_encoder(), mlm_head()
    head(noise(4, HIDDEN), torch.tensor([[1], [3]]), encoder.word_embedding).loss_sum.backward()
    assert encoder.word_embedding.weight.grad.abs().sum() > 0
    assert not any(parameter.shape == (VOCABULARY, HIDDEN) for parameter in head.parameters())


def test_nothing_masked_gives_zero_and_still_reaches_every_parameter():
    encoder, head = tiny_encoder(), mlm_head()
    batch = Batch(torch.arange(10), Sequences.of([10]), torch.zeros(2, 0, dtype=torch.int64), 0)
    result = head(encoder(batch), batch.labels, encoder.word_embedding)
    result.loss_sum.backward()
    assert result.loss_sum == 0 and result.correct == 0
    assert all(p.grad is not None and not p.grad.isnan().any() for p in (*encoder.parameters(), *head.parameters()))


def test_the_loss_is_float32_in_a_bfloat16_model():
    encoder, head = tiny_encoder().bfloat16(), mlm_head().bfloat16()
    masked = torch.stack((torch.arange(1000), torch.arange(1000) % VOCABULARY))
    result = head(noise(1000, HIDDEN).bfloat16(), masked, encoder.word_embedding)
    assert result.loss_sum.dtype == torch.float32
    exact = copy.deepcopy(head).float()(noise(1000, HIDDEN), masked, copy.deepcopy(encoder.word_embedding).float())
    assert torch.allclose(result.loss_sum, exact.loss_sum, rtol=0.01)


def looped_pool(hidden_TE: torch.Tensor, lengths: list[int], pooling: str) -> torch.Tensor:
    take = {
        "cls": lambda x: x[0],
        "mean": lambda x: x.mean(0),
        "max": lambda x: x.amax(0),
        "min": lambda x: x.amin(0),
    }[pooling]
    return torch.stack([take(document) for document in hidden_TE.split(lengths)])


@pytest.mark.parametrize("pooling", ["cls", "mean", "max", "min"])
@given(lengths=st.lists(st.integers(1, 200), min_size=1, max_size=6))
@settings(max_examples=25)
def test_pooling_agrees_with_a_loop_over_documents(pooling, lengths):
    ours, looped = (noise(sum(lengths), 5, seed=len(lengths)).requires_grad_() for _ in range(2))
    pooled, truth = pool(ours, Sequences.of(lengths), pooling), looped_pool(looped, lengths, pooling)
    assert torch.allclose(pooled, truth, atol=1e-6)
    weight = noise(len(lengths), 5, seed=9)
    (pooled * weight).sum().backward()
    (truth * weight).sum().backward()
    assert torch.allclose(ours.grad, looped.grad, atol=1e-6)


def test_mean_over_16_000_bfloat16_tokens_is_summed_in_float32():
    hidden_TE = (noise(16_000, 2) * 0.1 + 1).bfloat16()
    pooled = pool(hidden_TE, Sequences.of([16_000]), "mean")
    assert torch.allclose(pooled, hidden_TE.double().mean(0, keepdim=True).float(), atol=1e-5)


def test_poolers_are_those_of_the_papers():
    hidden_TE, sequences = noise(9, HIDDEN), Sequences.of([4, 5])
    first_NE = hidden_TE[[0, 4]]
    for pooler in ("bert", "roberta"):
        head = classifier(pooler=pooler).eval()
        truth = head.classifier(torch.tanh(head.dense(first_NE)))
        assert torch.allclose(head(hidden_TE, sequences), truth, atol=1e-6)
    bare = classifier(pooler="none").eval()
    assert torch.allclose(bare(hidden_TE, sequences), bare.classifier(first_NE), atol=1e-6)
    assert not hasattr(bare, "dense")


def test_only_roberta_drops_before_the_dense_map():
    before = {}
    for pooler in ("bert", "roberta"):
        head, seen = classifier(pooler=pooler), []
        head.dense.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        head.classifier.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        head(noise(9, HIDDEN), Sequences.of([4, 5]))
        before[pooler] = [bool((into == 0).any()) for into in seen]
    assert before == {"bert": [False, True], "roberta": [True, True]}


def test_classifier_dropout_follows_the_step():
    head, hidden_TE, sequences = classifier(), noise(9, HIDDEN), Sequences.of([4, 5])

    def logits(step: int, micro_batch: int) -> torch.Tensor:
        head.set_step(step, micro_batch)
        return head(hidden_TE, sequences)

    assert torch.equal(logits(1, 0), logits(1, 0))
    assert not torch.equal(logits(1, 0), logits(2, 0)) and not torch.equal(logits(1, 0), logits(1, 1))


def test_heads_are_decided_by_their_seed_and_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    for make in (mlm_head, classifier):
        one, two = make().state_dict(), make().state_dict()
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert torch.equal(torch.get_rng_state(), state)


def test_logits_are_float32_whatever_the_model():
    head = classifier(pooling="mean").bfloat16()
    assert head(noise(9, HIDDEN).bfloat16(), Sequences.of([4, 5])).dtype == torch.float32
