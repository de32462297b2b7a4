"""How a token's place in its document enters the model: rotated queries and keys, or a vector added to the word.

Shape letters: T real tokens of a micro-batch, L length of the longest document, E hidden size, D head size.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from dstrain.packed import Sequences
from dstrain.schema import Settings, UserError, setting


class Rotation(NamedTuple):
    """The angles by which queries and keys turn, one row per token; heads share them."""

    cosine_T1D: Tensor
    """(T, 1, D / 2) float32."""
    sine_T1D: Tensor
    """(T, 1, D / 2) float32."""


def rotate(x_THD: Tensor, rotation: Rotation) -> Tensor:
    """Each pair of features (i, i + D / 2) turned by its token's angle i; same shape and dtype as `x_THD`.

    The turning is done in float32 whatever the dtype of `x_THD`, so a bfloat16 model rounds once, at the end.
    """
    left, right = x_THD.chunk(2, dim=-1)
    cosine, sine = rotation
    return torch.cat((left * cosine - right * sine, right * cosine + left * sine), dim=-1).to(x_THD.dtype)


def _angles_LF(length: int, frequencies: int, base: float, scale: float, device: torch.device) -> Tensor:
    """(L, F) float64: place / scale * base ** (-f / F).

    float64, because in float32 the product of place 16 000 and a frequency is off by up to 5e-4 radians, and by a
    different amount at each place: the turn between two tokens would depend on where in the document they stand.
    """
    places_L = torch.arange(length, dtype=torch.float64, device=device) / scale
    exponents_F = torch.arange(frequencies, dtype=torch.float64, device=device) / frequencies
    return torch.outer(places_L, base**-exponents_F)


class Positions(nn.Module):
    """What all kinds share: by default nothing is added to the words and nothing is rotated."""

    def forward(self, words_TE: Tensor, sequences: Sequences) -> Tensor:
        """(T, E) -> (T, E): the words with their places added, in the dtype of the words."""
        return words_TE

    def rotation(self, sequences: Sequences) -> Rotation | None:
        """The angles for the queries and keys of every layer, or None where nothing is rotated."""
        return None


class NoPositions(Settings):
    """No positions: the encoder sees a bag of words."""

    kind: Literal["none"] = "none"

    def check(self, head_dim: int) -> str | None:
        """What these positions cannot do with heads of this size, or None."""
        return None

    def check_length(self, max_length: int) -> None:
        """Every length will do."""

    def build(self, hidden_size: int, head_dim: int) -> Positions:
        """A module without parameters."""
        return Positions()


class RopePositions(Settings):
    """Rotary positions (Su et al. 2021, eq. 15): queries and keys of every layer turn with the token's place."""

    kind: Literal["rope"] = "rope"
    base: float = setting(10_000.0, gt=1.0)
    """Slowest wavelength in tokens, over 2 pi: feature pair i of D / 2 turns by base ** (-2 i / D) per token."""
    scale: float = setting(1.0, gt=0.0)
    """Places are divided by it (linear interpolation, Chen et al. 2023): 4 reads 2048 tokens at the angles of 512."""

    def check(self, head_dim: int) -> str | None:
        """What these positions cannot do with heads of this size, or None."""
        if head_dim % 2:
            return f"rope turns pairs of features, so head_dim = qkv_size / num_heads must be even, but is {head_dim}"
        return None

    def check_length(self, max_length: int) -> None:
        """Every length will do."""

    def build(self, hidden_size: int, head_dim: int) -> Positions:
        """A module without parameters."""
        return Rope(head_dim, self.base, self.scale)


class Rope(Positions):
    """Makes the angles of a micro-batch once; they are no state: neither saved nor cast with the model."""

    def __init__(self, head_dim: int, base: float, scale: float):
        super().__init__()
        self.head_dim, self.base, self.scale = head_dim, base, scale

    def rotation(self, sequences: Sequences) -> Rotation:
        """Angles in float64, cosines and sines in float32."""
        angles_LD = _angles_LF(sequences.longest, self.head_dim // 2, self.base, self.scale, sequences.device)
        cosine_L1D, sine_L1D = (table.float().unsqueeze(1) for table in (angles_LD.cos(), angles_LD.sin()))
        return Rotation(cosine_L1D[sequences.position_T], sine_L1D[sequences.position_T])


class SinusoidalPositions(Settings):
    """Fixed sines and cosines added to the words (Vaswani et al. 2017, section 3.5)."""

    kind: Literal["sinusoidal"] = "sinusoidal"
    base: float = setting(10_000.0, gt=1.0)
    """Slowest wavelength in tokens, over 2 pi."""

    def check(self, head_dim: int) -> str | None:
        """What these positions cannot do with heads of this size, or None."""
        return None

    def check_length(self, max_length: int) -> None:
        """Every length will do."""

    def build(self, hidden_size: int, head_dim: int) -> Positions:
        """A module without parameters."""
        return Sinusoids(hidden_size, self.base)


class Sinusoids(Positions):
    """Adds [sin, cos] / sqrt(E).

    Vaswani et al. multiply the words by sqrt(E) instead, lest the sinusoids drown them; before the LayerNorm that
    follows the two are the same, and here the words keep the scale that the tied output projection needs.
    """

    def __init__(self, hidden_size: int, base: float):
        super().__init__()
        self.hidden_size, self.base = hidden_size, base

    def forward(self, words_TE: Tensor, sequences: Sequences) -> Tensor:
        """(T, E) -> (T, E)."""
        frequencies = (self.hidden_size + 1) // 2
        angles_LF = _angles_LF(sequences.longest, frequencies, self.base, 1.0, words_TE.device)
        table_LE = torch.cat((angles_LF.sin(), angles_LF.cos()), dim=-1)[:, : self.hidden_size]
        table_LE = (table_LE / self.hidden_size**0.5).to(words_TE.dtype)
        return words_TE + table_LE[sequences.position_T]


class LearnedPositions(Settings):
    """A trained vector for each place (Devlin et al. 2019), up to max_length."""

    kind: Literal["learned"] = "learned"
    max_length: int = setting(512, unit="tokens", ge=1)
    """Places there are vectors for; a longer document cannot be read."""

    def check(self, head_dim: int) -> str | None:
        """What these positions cannot do with heads of this size, or None."""
        return None

    def check_length(self, max_length: int) -> None:
        """Raises UserError when documents of `max_length` tokens do not fit."""
        if max_length > self.max_length:
            raise UserError(
                f"encoder.positions.max_length: is {self.max_length}, but documents have up to {max_length} tokens; "
                f"raise it to {max_length}, lower the documents' length, or use positions of kind rope"
            )

    def build(self, hidden_size: int, head_dim: int) -> Positions:
        """A module with a (max_length, E) table."""
        return LearnedTable(self.max_length, hidden_size)


class LearnedTable(Positions):
    """Adds row `place` of a trained (max_length, E) table."""

    def __init__(self, max_length: int, hidden_size: int):
        super().__init__()
        # filled by `initialise`; nn.Embedding itself would draw from the global generator
        self.table = nn.Embedding.from_pretrained(torch.empty(max_length, hidden_size), freeze=False)

    def forward(self, words_TE: Tensor, sequences: Sequences) -> Tensor:
        """(T, E) -> (T, E)."""
        assert sequences.longest <= self.table.num_embeddings, "check_length was not asked at the door"
        return words_TE + self.table(sequences.position_T)


PositionSettings = Annotated[
    RopePositions | LearnedPositions | SinusoidalPositions | NoPositions, Field(discriminator="kind")
]
