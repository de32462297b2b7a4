"""One layer of the encoder: projections, rotation, the attention kernel, output projection, MLP, norms and dropout.

Shape letters: T real tokens of a micro-batch, E hidden size, H heads, D head size, Q = H * D width of queries, keys
and values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dstrain.model.attention import AttentionSettings
from dstrain.model.attention.draws import generator
from dstrain.model.attention.sdpa import SdpaSettings
from dstrain.model.positions import Rotation, rotate
from dstrain.packed import Rows, Sequences
from dstrain.schema import Settings, setting


class Linear(nn.Linear):
    """A linear map that `initialise` fills: torch would draw its weights from the global generator."""

    def reset_parameters(self) -> None:
        """Leaves the weights unfilled."""


def initialise(root: nn.Module, seed: int, std: float) -> None:
    """Fills every linear map and table below `root`: weights from N(0, std), biases 0 (Devlin et al. 2019).

    Each weight has a generator of its own, made from (seed, its name): a weight starts at the same values whatever
    other modules the model has, so runs that differ in one setting start alike wherever they are alike.
    """
    for name, module in root.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            with torch.no_grad():
                module.weight.normal_(0.0, std, generator=generator("weight", seed, name))
                if isinstance(module, nn.Linear) and module.bias is not None:
                    module.bias.zero_()


class Dropout(nn.Module):
    """Dropout whose mask depends on nothing but (seed, place in the model, optimizer step, micro-batch).

    Neither the number of ranks nor what ran before has a say, activation checkpointing, which runs the forward a second
    time, finds the same mask again, and a piece of a micro-batch drops what the whole would drop there. The rate is rounded
    to a multiple of 2^-16, and what is kept is scaled for it.
    """

    def __init__(self, rate: float, seed: int, place: str):
        super().__init__()
        self.rate, self.seed, self.place = rate, seed, place
        self.step = self.micro_batch = 0
        self.rows: Rows | None = None

    def forward(self, x: Tensor) -> Tensor:
        """`x` with a share `rate` of it set to 0 and the rest divided by 1 - rate; `x` itself in eval()."""
        if not self.training or self.rate == 0.0:
            return x
        seed = generator("dropout", self.seed, self.place, self.step, self.micro_batch).initial_seed()
        here = torch.Generator(x.device).manual_seed(seed)
        chances = min(round(self.rate * _CHANCES), _CHANCES - 1)
        first, of = self.rows or Rows(0, len(x))
        dropped = _draw((of, *x.shape[1:]), here)[first : first + len(x)] < chances - _CHANCES // 2
        return x.masked_fill(dropped, 0.0).mul_(_CHANCES / (_CHANCES - chances))


_CHANCES = 1 << 16


def _draw(shape: tuple[int, ...], here: torch.Generator) -> Tensor:
    """int16, each value equally likely: a generator's word makes four of them, and `bernoulli_` would take one each."""
    count = math.prod(shape)
    words = torch.empty((count + 3) // 4, dtype=torch.int64, device=here.device)
    words.random_(torch.iinfo(torch.int64).min, None, generator=here)
    return words.view(torch.int16)[:count].view(shape)


def set_dropout_step(root: nn.Module, step: int, micro_batch: int, rows: Rows | None = None) -> None:
    """Tells every dropout below `root` where training stands.

    `step` is the run-wide optimizer step and `micro_batch` the number of the micro-batch among all those of that step,
    over all ranks: then 1 rank with 2 accumulations and 2 ranks with 1 drop the same entries. `rows` are those of a piece.
    """
    for module in root.modules():
        if isinstance(module, Dropout):
            module.step, module.micro_batch, module.rows = step, micro_batch, rows


class BlockSettings(Settings):
    """The shape of one layer; all layers of an encoder have the same."""

    hidden_size: int = setting(512, ge=1)
    """Width E of the stream between layers."""
    intermediate_size: int = setting(2048, ge=1)
    """Width of the MLP's inner layer."""
    num_heads: int = setting(8, ge=1)
    """Attention heads H."""
    qkv_size: int = setting(512, ge=1)
    """Width of queries, keys and values over all heads; independent of hidden_size. head_dim = qkv_size / num_heads."""
    attention: AttentionSettings = setting(SdpaSettings())
    """The attention kernel and its settings."""
    norm: Literal["post", "pre"] = "post"
    """post: LayerNorm after each residual sum, as in BERT; pre: before each sublayer, with one more after the last."""
    dropout: float = setting(0.1, ge=0.0, lt=1.0)
    """Share dropped after the embeddings, the attention's output projection and the MLP; attention weights keep all."""
    projection_bias: bool = True
    """Whether the projections to queries, keys, values and from the attention's output have biases."""
    layer_norm_eps: float = setting(1e-12, gt=0.0)
    """Added to the variance in every LayerNorm."""

    @property
    def head_dim(self) -> int:
        """Size D of one head."""
        return self.qkv_size // self.num_heads


class Block(nn.Module):
    """Layer number `layer` of an encoder."""

    def __init__(self, settings: BlockSettings, layer: int, seed: int):
        super().__init__()
        hidden, inner, width = settings.hidden_size, settings.intermediate_size, settings.qkv_size
        self.heads_shape = (settings.num_heads, settings.head_dim)
        self.pre_norm = settings.norm == "pre"
        self.tied_qk = settings.attention.tied_qk
        self.projections = Linear(hidden, (2 if self.tied_qk else 3) * width, settings.projection_bias)
        self.attention = settings.attention.build(settings.num_heads, settings.head_dim, layer, seed)
        self.attention_output = Linear(width, hidden, settings.projection_bias)
        self.attention_dropout = Dropout(settings.dropout, seed, f"block {layer} attention")
        self.attention_norm = nn.LayerNorm(hidden, settings.layer_norm_eps)
        self.mlp_inner = Linear(hidden, inner)
        self.mlp_output = Linear(inner, hidden)
        self.mlp_dropout = Dropout(settings.dropout, seed, f"block {layer} mlp")
        self.mlp_norm = nn.LayerNorm(hidden, settings.layer_norm_eps)

    def forward(self, hidden_TE: Tensor, sequences: Sequences, rotation: Rotation | None) -> Tensor:
        """(T, E) -> (T, E)."""
        if self.pre_norm:
            hidden_TE = hidden_TE + self._attend(self.attention_norm(hidden_TE), sequences, rotation)
            return hidden_TE + self._mlp(self.mlp_norm(hidden_TE))
        hidden_TE = self.attention_norm(hidden_TE + self._attend(hidden_TE, sequences, rotation))
        return self.mlp_norm(hidden_TE + self._mlp(hidden_TE))

    def flops(self, lengths: Sequence[int]) -> int:
        """Multiplications and additions of one forward over documents of these lengths: linear maps and the kernel."""
        maps = (self.projections, self.attention_output, self.mlp_inner, self.mlp_output)
        dense = sum(2 * each.in_features * each.out_features for each in maps)
        return dense * sum(lengths) + self.attention.flops(lengths)

    def _attend(self, x_TE: Tensor, sequences: Sequences, rotation: Rotation | None) -> Tensor:
        parts = self.projections(x_TE).chunk(2 if self.tied_qk else 3, dim=-1)
        q_THD, *k_THD, v_THD = (part.unflatten(-1, self.heads_shape) for part in parts)
        turned = [x if rotation is None else rotate(x, rotation) for x in (q_THD, *k_THD)]
        out_THD = self.attention(turned[0], turned[-1], v_THD, sequences)
        return self.attention_dropout(self.attention_output(out_THD.flatten(-2)))

    def _mlp(self, x_TE: Tensor) -> Tensor:
        return self.mlp_dropout(self.mlp_output(F.gelu(self.mlp_inner(x_TE))))
