"""Published implementations of the same ideas, with their projections taken out, behind the contract of our kinds.

A peer takes equally long documents only, as one padded batch without padding; that is the case it is best at.
"""

from __future__ import annotations

import importlib
from typing import Any, ClassVar

from torch import Tensor, nn

from dstrain.model.attention.favor import FavorSettings
from dstrain.model.attention.lsh import LshSettings
from dstrain.packed import Sequences
from dstrain.schema import Settings, UserError


class Peer(nn.Module):
    """One published implementation; built for documents of one length."""

    name: ClassVar[str]
    """Of its distribution, and of its rows."""
    module: ClassVar[str]
    """What is imported."""
    of: ClassVar[type[Settings]]
    """Whose settings it takes."""
    kernel: str
    """What runs, and what it looks at."""

    @staticmethod
    def multiple_of(settings: Any) -> int:
        """What a document's length must be a multiple of."""
        return 1


class Performer(Peer):
    """FastAttention of performer-pytorch: FAVOR+ with one projection for all heads."""

    name, module, of = "performer-pytorch", "performer_pytorch", FavorSettings

    def __init__(self, settings: FavorSettings, num_heads: int, head_dim: int, length: int) -> None:
        super().__init__()
        from performer_pytorch import FastAttention

        self.attention = FastAttention(head_dim, nb_features=settings.nb_features)
        self.kernel = f"performer-pytorch FastAttention, {settings.nb_features} features shared by all heads"

    def forward(self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, sequences: Sequences) -> Tensor:
        """(T, H, D)."""
        out_NHLD = self.attention(*(_heads(x_THD, sequences) for x_THD in (q_THD, k_THD, v_THD)))
        return out_NHLD.transpose(1, 2).flatten(0, 1)


class ReformerPytorch(Peer):
    """LSHAttention of reformer-pytorch."""

    name, module, of = "reformer-pytorch", "reformer_pytorch", LshSettings

    @staticmethod
    def multiple_of(settings: LshSettings) -> int:
        """Its buckets are even in number."""
        return 2 * settings.chunk_size

    def __init__(self, settings: LshSettings, num_heads: int, head_dim: int, length: int) -> None:
        super().__init__()
        from reformer_pytorch import LSHAttention

        self.attention = LSHAttention(
            bucket_size=settings.chunk_size,
            n_hashes=settings.num_hashes,
            attend_across_buckets=not settings.mask_within_chunks,
            allow_duplicate_attention=settings.count_keys == "every_round",
        )
        self.attention.eval()  # in training it keeps the buckets of the last call for a reversible network
        self.kernel = "reformer-pytorch LSHAttention; window: own chunk and 1 back, around the ends, never forward"

    def forward(self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, sequences: Sequences) -> Tensor:
        """(T, H, D)."""
        q_NHLD, v_NHLD = _heads(q_THD, sequences), _heads(v_THD, sequences)
        out, _, _ = self.attention(q_NHLD.flatten(0, 1), v_NHLD.flatten(0, 1))
        return out.unflatten(0, q_NHLD.shape[:2]).transpose(1, 2).flatten(0, 1)


class HuggingFaceReformer(Peer):
    """LSHSelfAttention of transformers' Reformer."""

    name, module, of = "transformers", "transformers.models.reformer.modeling_reformer", LshSettings

    @staticmethod
    def multiple_of(settings: LshSettings) -> int:
        """Whole chunks."""
        return settings.chunk_size

    def __init__(self, settings: LshSettings, num_heads: int, head_dim: int, length: int) -> None:
        super().__init__()
        from transformers import ReformerConfig, logging
        from transformers.models.reformer.modeling_reformer import LSHSelfAttention

        logging.set_verbosity_error()  # it says the number of buckets that it chooses
        config = ReformerConfig(
            hidden_size=num_heads * head_dim,
            num_attention_heads=num_heads,
            attention_head_size=head_dim,
            lsh_attn_chunk_length=settings.chunk_size,
            lsh_num_chunks_before=settings.look_back,
            lsh_num_chunks_after=settings.look_forward,
            lsh_attention_probs_dropout_prob=0.0,
            num_hashes=settings.num_hashes,
            num_buckets=None,
            max_position_embeddings=length,
            is_decoder=False,
        )
        self.attention = LSHSelfAttention(config)
        self.qk, self.v = _Given(), _Given()
        self.attention.add_module("query_key", self.qk)
        self.attention.add_module("value", self.v)
        self.kernel = (
            f"transformers LSHSelfAttention; window: own chunk, {settings.look_back} back and "
            f"{settings.look_forward} forward, around the ends"
        )

    def forward(self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, sequences: Sequences) -> Tensor:
        """(T, H, D)."""
        q_NLE, v_NLE = (x.flatten(1).unflatten(0, (-1, sequences.longest)) for x in (q_THD, v_THD))
        self.qk.x, self.v.x = q_NLE, v_NLE
        out_NLE = self.attention(v_NLE).hidden_states
        self.qk.x = self.v.x = None
        return out_NLE.flatten(0, 1).unflatten(-1, q_THD.shape[1:])


class _Given(nn.Module):
    """In the place of a projection: what is already projected."""

    x: Tensor | None = None

    def forward(self, _: Tensor) -> Tensor | None:
        return self.x


def _heads(x_THD: Tensor, sequences: Sequences) -> Tensor:
    """(N, H, L, D) without a copy."""
    return x_THD.unflatten(0, (-1, sequences.longest)).transpose(1, 2)


PEERS: tuple[type[Peer], ...] = (Performer, ReformerPytorch, HuggingFaceReformer)


def peers_of(settings: Settings) -> list[type[Peer]]:
    """The peers that do what these settings ask for."""
    return [peer for peer in PEERS if type(settings) is peer.of]


def check_peers(settings: Settings, lengths: list[int]) -> None:
    """Raises UserError when a peer of these settings is not installed or cannot take a length."""
    for peer in peers_of(settings):
        try:
            importlib.import_module(peer.module)
        except ImportError as error:
            raise UserError(
                f"--peers: {peer.name} cannot be imported ({error}); install the peers with: pip install -e '.[peers]'"
            ) from None
        for length in lengths:
            if length % peer.multiple_of(settings):
                raise UserError(
                    f"--lengths {length}: {peer.name} takes only multiples of {peer.multiple_of(settings)} tokens here; "
                    "give such lengths or leave out --peers"
                )
