from __future__ import annotations

import pytest
import torch

from dstrain.model.encoder import PRESETS, Encoder, EncoderSettings, WordEmbedding
from dstrain.packed import Batch, Sequences
from dstrain.schema import UserError, validate

VOCABULARY = 50
TINY = {
    "num_layers": 3, "hidden_size": 24, "intermediate_size": 32, "num_heads": 2, "qkv_size": 32,
}  # fmt: skip
KINDS = ("sdpa", "favor", "lsh")


def settings(**changes) -> EncoderSettings:
    return validate(EncoderSettings, {**TINY, **changes}, "test")


def batch_of(*lengths: int, seed: int = 0) -> Batch:
    ids_T = torch.randint(VOCABULARY, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    return Batch(ids_T, Sequences.of(lengths), torch.zeros(len(lengths), dtype=torch.int64), len(lengths))


def test_presets_give_the_sizes_that_are_not_given():
    assert EncoderSettings().model_dump()["num_layers"] == 4
    for name, shape in PRESETS.items():
        made = validate(EncoderSettings, {"preset": name}, "test")
        assert {key: getattr(made, key) for key in shape._fields} == shape._asdict()
        again = validate(EncoderSettings, made.model_dump(), "test")
        assert again == made
    made = validate(EncoderSettings, {"preset": "autotinybert_1", "num_layers": 2}, "test")
    assert (made.num_layers, made.hidden_size, made.head_dim) == (2, 564, 64)


def test_the_fields_own_defaults_are_the_default_preset():
    fields = EncoderSettings.model_fields
    shape = PRESETS[fields["preset"].default]
    assert {name: fields[name].default for name in shape._fields} == shape._asdict()


def test_head_dimension_is_64_in_all_shapes_of_the_study():
    for name in ("bert_small", *(f"autotinybert_{number}" for number in range(1, 5))):
        assert validate(EncoderSettings, {"preset": name}, "test").head_dim == 64


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_heads": 6}, "qkv_size = 32 cannot be shared among num_heads = 6 heads; take num_heads from 1, 2, 4, 8, "
                           "or qkv_size = 36"),
        ({"num_heads": 32}, r"must be even, but is 1 \(32 / 32\)"),
        ({"preset": "bert_smal"}, "did you mean bert_small?"),
        ({"num_hedas": 2}, "did you mean num_heads?"),
        ({"dropout": 1.0}, "less than 1"),
    ],
)  # fmt: skip
def test_impossible_settings_are_one_sentence_with_the_values(changes, sentence):
    with pytest.raises(UserError, match=sentence.replace("?", r"\?")) as error:
        settings(**changes)
    assert len(str(error.value).splitlines()) == 1


def test_a_mapping_is_asked_for():
    with pytest.raises(UserError, match="takes a mapping"):
        validate(EncoderSettings, 3, "test")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("positions", ["rope", "learned", "sinusoidal", "none"])
def test_a_document_is_encoded_alike_alone_and_in_company(kind, norm, positions):
    made = settings(attention={"kind": kind}, norm=norm, positions={"kind": positions})
    encoder = Encoder(made, VOCABULARY, seed=1).eval()
    together = batch_of(9, 40, 1, 17)
    parts = encoder(together).split(together.sequences.lengths)
    for ids, part in zip(together.ids_T.split(together.sequences.lengths), parts, strict=True):
        alone = encoder(Batch(ids, Sequences.of([len(ids)]), together.labels[:1], 1))
        assert torch.allclose(part, alone, atol=2e-5)
    assert torch.isfinite(torch.cat(parts)).all()


def test_positions_matter_to_the_encoder():
    ids_T = torch.tensor([1, 2, 3, 4, 5, 6])
    for kind, differs in (("rope", True), ("learned", True), ("sinusoidal", True), ("none", False)):
        encoder = Encoder(settings(positions={"kind": kind}, init_std=0.2), VOCABULARY, 1).eval()
        forwards, backwards = (encoder(Batch(ids, Sequences.of([6]), ids, 1)) for ids in (ids_T, ids_T.flip(0)))
        assert (not torch.allclose(forwards, backwards.flip(0), atol=1e-4)) == differs, kind


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_alone_decides_the_weights(kind):
    made = settings(attention={"kind": kind})
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = Encoder(made, VOCABULARY, seed=4).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second, other = Encoder(made, VOCABULARY, seed=4).state_dict(), Encoder(made, VOCABULARY, seed=5).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["word_embedding.weight"], other["word_embedding.weight"])
    assert not torch.equal(first["blocks.0.mlp_inner.weight"], first["blocks.1.mlp_inner.weight"])


def test_runs_that_differ_in_the_attention_start_alike_elsewhere():
    plain, hashed = (
        Encoder(settings(attention={"kind": kind}), VOCABULARY, 4).state_dict() for kind in ("sdpa", "lsh")
    )
    for name in ("word_embedding.weight", "blocks.2.mlp_output.weight", "blocks.1.attention_output.weight"):
        assert torch.equal(plain[name], hashed[name])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_is_decided_by_step_and_micro_batch(kind, checkpointing):
    """Same numbers, same result and gradients, whatever ran in between; checkpointing changes nothing."""
    made = settings(attention={"kind": kind}, activation_checkpointing=checkpointing)
    encoder = Encoder(made, VOCABULARY, seed=1).train()
    batch = batch_of(20, 30)

    def train(step: int, micro_batch: int, module: Encoder = encoder) -> tuple[torch.Tensor, torch.Tensor]:
        module.zero_grad()
        module.set_step(step, micro_batch)
        hidden_TE = module(batch)
        hidden_TE.square().mean(1).exp().sum().backward()
        return hidden_TE.detach(), torch.cat([p.grad.flatten() for p in module.parameters()])

    first, others = train(3, 1), [train(4, 1), train(3, 0)]
    assert all(not torch.equal(first[0], other[0]) for other in others)
    again = train(3, 1, Encoder(made, VOCABULARY, seed=1))
    assert torch.equal(first[0], again[0]) and torch.allclose(first[1], again[1], atol=1e-6)
    plain = Encoder(settings(attention={"kind": kind}), VOCABULARY, seed=1)
    assert torch.equal(first[0], train(3, 1, plain)[0])
    assert torch.allclose(first[1], train(3, 1, plain)[1], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_is_deterministic(kind):
    encoder = Encoder(settings(attention={"kind": kind}), VOCABULARY, 1).eval()
    assert torch.equal(encoder(batch_of(20, 30)), encoder(batch_of(20, 30)))


def test_checkpointing_keeps_less():
    def kept(checkpointing: bool) -> int:
        encoder = Encoder(settings(activation_checkpointing=checkpointing), VOCABULARY, 1)
        held: dict[int, int] = {}

        def hold(x: torch.Tensor) -> torch.Tensor:
            held[x.data_ptr()] = x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda x: x):
            out = encoder(batch_of(200, 300))
        assert out.requires_grad
        return sum(held.values())

    assert kept(True) < kept(False) / 3


def test_bfloat16_encodes_close_to_float32():
    encoder = Encoder(settings(), VOCABULARY, 1).eval()
    exact = encoder(batch_of(30, 40))
    rough = encoder.bfloat16()(batch_of(30, 40))
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).abs().max() < 0.1


def test_first_parameters_are_those_that_freezing_stops():
    encoder = Encoder(settings(positions={"kind": "learned"}), VOCABULARY, 1)
    assert encoder.first_parameters(0) == []
    first = {id(parameter) for parameter in encoder.first_parameters(2)}
    names = {name for name, parameter in encoder.named_parameters() if id(parameter) not in first}
    assert names == {name for name, _ in encoder.named_parameters() if name.startswith("blocks.2.")}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_flows_back_into_frozen_layers_and_values_stay(checkpointing):
    encoder = Encoder(settings(activation_checkpointing=checkpointing), VOCABULARY, 1)
    batch = batch_of(5, 9)
    thawed = encoder(batch)
    encoder.frozen_layers = 2
    frozen = encoder(batch)
    assert torch.equal(frozen, thawed)
    frozen.square().mean(1).exp().sum().backward()
    moved = {id(parameter) for parameter in encoder.parameters() if parameter.grad is not None}
    assert moved == {id(p) for p in encoder.parameters()} - {id(p) for p in encoder.first_parameters(2)}


def test_sizes_are_those_of_the_published_bert_base():
    encoder = Encoder(validate(EncoderSettings, {"preset": "bert_base"}, "test"), 30_522, 0)
    counts = encoder.parameter_counts()
    # 109 482 240 with pooler (590 592), 512 learned places and 2 token types of 768, which are not here
    assert sum(counts.values()) == 109_482_240 - 590_592 - 514 * 768
    assert counts["embeddings"] == 30_522 * 768 + 2 * 768
    per_token = encoder.flops([1]) - 4 * 768 * 12
    weights = sum(p.numel() for name, p in encoder.blocks.named_parameters() if p.dim() == 2)
    assert per_token == 2 * weights


def test_kernel_says_what_runs():
    for kind in KINDS:
        assert len(Encoder(settings(attention={"kind": kind}), VOCABULARY, 1).kernel) > 10


def test_word_embedding_works_both_ways():
    words = WordEmbedding(5, 3)
    words.load_state_dict({"weight": torch.arange(15.0).view(5, 3)})
    assert torch.equal(words(torch.tensor([2, 0])), words.weight[[2, 0]])
    assert torch.equal(words(torch.ones(2, 3)), torch.ones(2, 3) @ words.weight.T)
