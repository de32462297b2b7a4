"""The encoder: words and places in, one vector per token out.

Shape letters: T real tokens of a micro-batch, N documents, E hidden size, M masked tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from pydantic import model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dstrain.model.block import Block, BlockSettings, Dropout, initialise, set_dropout_step
from dstrain.model.positions import PositionSettings, RopePositions, Rotation
from dstrain.packed import Batch, Rows, Sequences
from dstrain.schema import setting


class Shape(NamedTuple):
    """What a preset says."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    qkv_size: int


PRESETS = {
    "bert_tiny": Shape(2, 128, 512, 2, 128),
    "bert_mini": Shape(4, 256, 1024, 4, 256),
    "bert_small": Shape(4, 512, 2048, 8, 512),
    "bert_base": Shape(12, 768, 3072, 12, 768),
    "autotinybert_1": Shape(5, 564, 1054, 8, 512),
    "autotinybert_2": Shape(4, 396, 624, 6, 384),
    "autotinybert_3": Shape(4, 432, 384, 4, 256),
    "autotinybert_4": Shape(3, 320, 608, 4, 256),
}
"""BERT shapes of Turc et al. 2019 and Devlin et al. 2019; AutoTinyBERT shapes of Yin et al. 2021."""


class EncoderSettings(BlockSettings):
    """The encoder. `preset` gives the five sizes; a size that is given as well wins over the preset's."""

    preset: Literal[
        "bert_tiny", "bert_mini", "bert_small", "bert_base",
        "autotinybert_1", "autotinybert_2", "autotinybert_3", "autotinybert_4",
    ] = "bert_small"  # fmt: skip
    """Where num_layers, hidden_size, intermediate_size, num_heads and qkv_size come from when they are not given."""
    num_layers: int = setting(4, ge=1)
    """Blocks on top of each other."""
    positions: PositionSettings = setting(RopePositions())
    """How a token's place enters the model."""
    init_std: float = setting(0.02, gt=0.0)
    """Standard deviation of the normal distribution that weights start from."""
    activation_checkpointing: bool = False
    """Keep only each block's input and run its forward again in the backward: less memory, about a third more time."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        name = given.get("preset", cls.model_fields["preset"].default)
        shape = PRESETS.get(name) if isinstance(name, str) else None
        return {**shape._asdict(), **given} if shape else given

    @model_validator(mode="after")
    def _check_heads(self) -> EncoderSettings:
        if self.qkv_size % self.num_heads:
            near = [heads for heads in range(1, self.qkv_size + 1) if self.qkv_size % heads == 0]
            near = sorted(sorted(near, key=lambda heads: abs(heads - self.num_heads))[:4])
            raise ValueError(
                f"qkv_size = {self.qkv_size} cannot be shared among num_heads = {self.num_heads} heads; "
                f"take num_heads from {', '.join(map(str, near))}, "
                f"or qkv_size = {-(-self.qkv_size // self.num_heads) * self.num_heads}"
            )
        problem = self.positions.check(self.head_dim)
        if problem:
            raise ValueError(f"{problem} ({self.qkv_size} / {self.num_heads})")
        return self


class WordEmbedding(nn.Embedding):
    """The (V, E) table of words in both directions: ids to vectors, and vectors to logits (the tied output weights).

    Both run inside this module's own forward, because ZeRO-3 gathers a module's parameters around its forward and
    leaves them empty at all other times: a head that took `.weight` would multiply by nothing.
    """

    def forward(self, words: Tensor) -> Tensor:
        """(...) int64 ids -> (..., E) vectors; (M, E) floating point vectors -> (M, V) logits, no bias."""
        return F.linear(words, self.weight) if words.is_floating_point() else super().forward(words)

    def reset_parameters(self) -> None:
        """Leaves the table to `initialise`: torch would fill it from the global generator."""


class Encoder(nn.Module):
    """`forward(batch) -> hidden_TE`. Equal (settings, vocabulary_size, seed) give equal weights on every rank."""

    def __init__(self, settings: EncoderSettings, vocabulary_size: int, seed: int):
        super().__init__()
        self.settings = settings
        hidden = settings.hidden_size
        self.word_embedding = WordEmbedding(vocabulary_size, hidden)
        self.positions = settings.positions.build(hidden, settings.head_dim)
        self.embedding_norm = nn.LayerNorm(hidden, settings.layer_norm_eps)
        self.embedding_dropout = Dropout(settings.dropout, seed, "embeddings")
        self.blocks = nn.ModuleList(Block(settings, layer, seed) for layer in range(settings.num_layers))
        self.final_norm = nn.LayerNorm(hidden, settings.layer_norm_eps) if settings.norm == "pre" else nn.Identity()
        self.frozen_layers = 0
        """While n > 0, nothing flows back into the embeddings and the first n blocks (see `first_parameters`)."""
        initialise(self, seed, settings.init_std)

    def forward(self, batch: Batch) -> Tensor:
        """(T, E) in the dtype of the weights: the last layer's vector of each token of `batch`."""
        sequences = batch.sequences
        rotation = self.positions.rotation(sequences)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen_layers):
            words_TE = self.positions(self.word_embedding(batch.ids_T), sequences)
            hidden_TE = self.embedding_dropout(self.embedding_norm(words_TE))
        for layer, block in enumerate(self.blocks):
            with torch.set_grad_enabled(torch.is_grad_enabled() and layer >= self.frozen_layers):
                hidden_TE = self._through(block, hidden_TE, sequences, rotation)
        return self.final_norm(hidden_TE)

    def _through(self, block: nn.Module, hidden_TE: Tensor, sequences: Sequences, rotation: Rotation | None) -> Tensor:
        if self.settings.activation_checkpointing and torch.is_grad_enabled():
            # Nothing below draws from the global generators, so there is no state of theirs to keep and restore.
            return checkpoint(block, hidden_TE, sequences, rotation, use_reentrant=False, preserve_rng_state=False)
        return block(hidden_TE, sequences, rotation)

    def set_step(self, step: int, micro_batch: int = 0, tokens: Rows | None = None) -> None:
        """Called before each training micro-batch: what is random in it depends on these two numbers and the seed.

        `step` is the run-wide optimizer step; `micro_batch` the number of the micro-batch among all those of that step
        over all ranks (`EpochPlan.of_rank` tells it); `tokens` are those of a piece, None is all of it.
        """
        set_dropout_step(self, step, micro_batch, tokens)
        for block in self._layers:
            block.attention.set_step(step)

    def first_parameters(self, num_frozen_layers: int) -> list[nn.Parameter]:
        """The parameters that freezing the first n layers stops: embeddings and n blocks; none for n = 0."""
        if num_frozen_layers == 0:
            return []
        assert num_frozen_layers <= len(self.blocks), "more frozen layers than layers"
        first = [self.word_embedding, self.positions, self.embedding_norm, *self.blocks[:num_frozen_layers]]
        return [parameter for module in first for parameter in module.parameters()]

    @property
    def kernel(self) -> str:
        """The attention kernel that runs here, and why."""
        return self._layers[0].attention.kernel

    def parameter_counts(self) -> dict[str, int]:
        """Numbers of parameters by part; ask before ZeRO-3 takes them apart."""
        blocks = sum(parameter.numel() for parameter in self.blocks.parameters())
        return {"embeddings": sum(parameter.numel() for parameter in self.parameters()) - blocks, "blocks": blocks}

    def flops(self, lengths: Sequence[int]) -> int:
        """Floating point operations of one forward over documents of these lengths; a backward takes twice as many."""
        return sum(block.flops(lengths) for block in self._layers)

    @property
    def _layers(self) -> list[Block]:
        return list(self.blocks)  # type: ignore[arg-type]
