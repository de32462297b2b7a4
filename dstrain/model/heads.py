"""What sits on top of the encoder: the masked-word head and the classifier over pooled documents.

Shape letters: T real tokens of a micro-batch, N documents, E hidden size, M masked tokens, V vocabulary, K classes,
P pieces of documents.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dstrain.model.block import Dropout, Linear, initialise, set_dropout_step
from dstrain.packed import Rows, Sequences

Pooling = Literal["cls", "mean", "max", "min"]
Pooler = Literal["bert", "roberta", "none"]

_PIECE = 64  # tokens that one thread of a segment reduction walks through


class MlmResult(NamedTuple):
    """Sums over the masked tokens of one micro-batch, still on the device."""

    loss_sum: Tensor
    """() float32: cross entropy in nats."""
    correct: Tensor
    """() int64: tokens whose most probable word is the original one."""


class MlmHead(nn.Module):
    """Predicts original words at masked positions (Devlin et al. 2019): dense, GELU, LayerNorm, tied output weights."""

    def __init__(self, hidden_size: int, vocabulary_size: int, seed: int, init_std: float, layer_norm_eps: float):
        super().__init__()
        self.dense = Linear(hidden_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(vocabulary_size))
        initialise(self, seed, init_std)

    def forward(self, hidden_TE: Tensor, masked_2M: Tensor, word_embedding: nn.Module) -> MlmResult:
        """The loss at masked positions only; no other token ever meets the vocabulary.

        `masked_2M` is (2, M) int64: positions in T, each once, and the original ids there. They come from the host,
        because finding them here would make the host wait for the device. `word_embedding` is the encoder's, called as
        a module (see `WordEmbedding`). M may be 0: the loss is then 0 and still reaches all parameters, which
        keeps ZeRO-3 ranks in step.
        """
        positions_M, targets_M = masked_2M
        masked_ME = self.norm(F.gelu(self.dense(hidden_TE.index_select(0, positions_M))))
        logits_MV = word_embedding(masked_ME).add_(self.bias)
        return MlmResult(*_SummedCrossEntropy.apply(logits_MV, targets_M))


class _SummedCrossEntropy(torch.autograd.Function):
    """-sum_m log softmax(logits_m)[target_m], and how many targets have the largest logit.

    The (M, V) log-probabilities become the gradient in place, so there is one table of that size where the textbook's
    chain of log-softmax and gather has three.
    """

    @staticmethod
    def forward(ctx: Any, logits_MV: Tensor, targets_M: Tensor) -> tuple[Tensor, Tensor]:
        log_MV = torch.log_softmax(logits_MV, -1, dtype=torch.float32)
        correct = (log_MV.argmax(-1) == targets_M).sum()
        ctx.save_for_backward(log_MV, targets_M)
        ctx.mark_non_differentiable(correct)
        ctx.dtype = logits_MV.dtype
        return -log_MV.gather(-1, targets_M.unsqueeze(-1)).sum(), correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:
        log_MV, targets_M = ctx.saved_tensors
        grad_MV = log_MV.exp_()  # autograd notices if anybody asks for log_MV a second time
        grad_MV.scatter_add_(-1, targets_M.unsqueeze(-1), grad_MV.new_full((len(targets_M), 1), -1.0))
        return grad_MV.mul_(grad).to(ctx.dtype), None


def pool(hidden_TE: Tensor, sequences: Sequences, pooling: Pooling) -> Tensor:
    """(T, E) -> (N, E) float32: each document's first vector, or the mean, maximum or minimum over its tokens.

    Deterministic on every device and without padding. A segment reduction gives each (segment, feature) one thread
    that walks through the segment, so documents are first reduced in pieces and the pieces then to documents: two
    documents of 16 000 tokens keep a whole GPU busy. Where several tokens share a maximum they share its gradient.
    """
    if pooling == "cls":
        return hidden_TE.index_select(0, sequences.starts_N1[:-1]).float()
    pieces = [_pieces(length) for length in sequences.lengths]
    piece_lengths_P = _on(sequences.device, [length for document in pieces for length in document])
    pieces_N = _on(sequences.device, [len(document) for document in pieces])
    reduce = "sum" if pooling == "mean" else pooling
    # `unsafe` leaves out a check that would make the host wait for the device
    pooled_PE = torch.segment_reduce(hidden_TE.float(), reduce, lengths=piece_lengths_P, unsafe=True)
    pooled_NE = torch.segment_reduce(pooled_PE, reduce, lengths=pieces_N, unsafe=True)
    return pooled_NE / sequences.lengths_N.unsqueeze(1) if pooling == "mean" else pooled_NE


def _pieces(length: int) -> list[int]:
    full, rest = divmod(length, _PIECE)
    return [_PIECE] * full + [rest] * bool(rest)


def _on(device: torch.device, numbers: list[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64).to(device, non_blocking=True)


class ClassificationHead(nn.Module):
    """Pooled documents to class logits.

    pooler bert: dense, tanh, dropout (Devlin et al. 2019); roberta: dropout, dense, tanh, dropout (Liu et al. 2019);
    none: dropout alone. A linear map to the classes follows.
    """

    def __init__(
        self,
        hidden_size: int,
        num_classes: int,
        pooling: Pooling,
        pooler: Pooler,
        classifier_dropout: float,
        seed: int,
        init_std: float,
    ):
        super().__init__()
        self.pooling, self.pooler = pooling, pooler
        if pooler != "none":
            self.dense = Linear(hidden_size, hidden_size)
        self.pooled_dropout = Dropout(classifier_dropout, seed, "classifier pooled")
        self.dropout = Dropout(classifier_dropout, seed, "classifier")
        self.classifier = Linear(hidden_size, num_classes)
        initialise(self, seed, init_std)

    def forward(self, hidden_TE: Tensor, sequences: Sequences) -> Tensor:
        """(T, E) -> logits (N, K) float32."""
        pooled_NE = pool(hidden_TE, sequences, self.pooling).to(hidden_TE.dtype)
        if self.pooler == "roberta":
            pooled_NE = self.pooled_dropout(pooled_NE)
        if self.pooler != "none":
            pooled_NE = torch.tanh(self.dense(pooled_NE))
        return self.classifier(self.dropout(pooled_NE)).float()

    def set_step(self, step: int, micro_batch: int = 0, sequences: Rows | None = None) -> None:
        """As `Encoder.set_step`."""
        set_dropout_step(self, step, micro_batch, sequences)
