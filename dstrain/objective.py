"""What a stage asks of the model. Settings, micro-batch, loss and figures of one objective lie together.

TAPT is `mlm` on the task's text, not a third objective. A new objective is one settings class in the union below and
one class with the methods of `Objective`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Protocol

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from dstrain.data.cache import Corpus, TokenSplit
from dstrain.data.masking import mask_tokens
from dstrain.data.vocabulary import Vocabulary
from dstrain.metrics import CountTally, DocumentTally, Tally
from dstrain.model.encoder import Encoder, EncoderSettings
from dstrain.model.heads import ClassificationHead, MlmHead, Pooler, Pooling
from dstrain.packed import Batch, Rows, Sequences
from dstrain.schema import Settings, setting


class Objective(Protocol):
    """One way of learning from a corpus."""

    @property
    def head(self) -> nn.Module:
        """What the encoder's vectors go into."""
        ...

    def batch(self, split: TokenSplit, sequences: np.ndarray, epoch: int) -> Batch:
        """The packed micro-batch of these sequences, on the CPU; epoch -1 is evaluation."""
        ...

    def loss(self, encoder: Encoder, batch: Batch) -> tuple[Tensor, Tensor]:
        """(summed loss () float32, the evidence that the tallies count)."""
        ...

    def running_tally(self, device: torch.device) -> Tally:
        """Counts while training: cheap."""
        ...

    def tally(self, split: TokenSplit, device: torch.device) -> Tally:
        """Counts for an evaluation of a split."""
        ...


class Task(nn.Module):
    """An encoder and a head under one objective: what DeepSpeed wraps. `forward(batch) -> (loss_sum, evidence)`."""

    def __init__(self, encoder: Encoder, objective: Objective) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = objective.head
        self._loss = objective.loss

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The batch must lie on the module's device."""
        return self._loss(self.encoder, batch)

    def set_step(
        self, step: int, micro_batch: int, tokens: Rows | None = None, sequences: Rows | None = None
    ) -> None:
        """Tells every part that draws (dropout, projections, rotations) which micro-batch of the run this is, or which
        tokens and sequences of it."""
        self.encoder.set_step(step, micro_batch, tokens)
        if isinstance(self.head, ClassificationHead):
            self.head.set_step(step, micro_batch, sequences)


# ------------------------------------------------------------------------------------------------- masked words


class MlmSettings(Settings):
    """Predict masked words (Devlin et al. 2019, section 3.1)."""

    kind: Literal["mlm"] = "mlm"
    mask_rate: float = setting(0.15, gt=0, lt=1, unit="share of the tokens")
    """How many tokens are asked for; drawn afresh every epoch."""
    mask_share: float = setting(0.8, ge=0, le=1)
    """Of those, how many are replaced by [MASK]."""
    random_share: float = setting(0.1, ge=0, le=1)
    """Of those, how many are replaced by a random word; the rest stay as they are."""
    metrics: ClassVar[tuple[str, ...]] = ("loss", "perplexity", "accuracy")
    selection: ClassVar[tuple[str, str]] = ("loss", "min")

    @model_validator(mode="after")
    def _shares(self) -> MlmSettings:
        if self.mask_share + self.random_share > 1 + 1e-9:
            raise ValueError(
                f"mask_share {self.mask_share} and random_share {self.random_share} are more than 1 together; lower one"
            )
        return self

    def build(self, corpus: Corpus, vocabulary: Vocabulary, encoder: EncoderSettings, seed: int) -> Mlm:
        """The objective over a vocabulary; the corpus needs no labels."""
        return Mlm(self, vocabulary, encoder, seed)


class Mlm:
    """`labels` of a batch are (2, M): where in T a word is asked for, and which it was."""

    def __init__(self, settings: MlmSettings, vocabulary: Vocabulary, encoder: EncoderSettings, seed: int) -> None:
        self._settings, self._vocabulary, self._seed = settings, vocabulary, seed
        self.head = MlmHead(encoder.hidden_size, vocabulary.size, seed, encoder.init_std, encoder.layer_norm_eps)

    def batch(self, split: TokenSplit, sequences: np.ndarray, epoch: int) -> Batch:
        """Masks depend on (seed, epoch, sequence) alone, not on who computes them with whom."""
        lengths_N = split.lengths[sequences]
        masked = mask_tokens(
            split.gather(sequences), lengths_N, sequences, self._seed, epoch, self._settings.mask_rate,
            self._vocabulary.size, self._vocabulary.mask, self._vocabulary.special_ids,
            self._settings.mask_share, self._settings.random_share,
        )  # fmt: skip
        labels_2M = torch.from_numpy(np.stack([masked.positions_M, masked.targets_M]))
        return Batch(torch.from_numpy(masked.inputs_T), Sequences.of(lengths_N), labels_2M, len(masked.positions_M))

    def loss(self, encoder: Encoder, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cross entropy summed over the masked tokens, and how many were guessed."""
        found = self.head(encoder(batch), batch.labels, encoder.word_embedding)
        return found.loss_sum, found.correct

    def running_tally(self, device: torch.device) -> Tally:
        """Loss, perplexity and accuracy."""
        return CountTally(device, _as_counted, perplexity=True)

    def tally(self, split: TokenSplit, device: torch.device) -> Tally:
        """The same over a split."""
        return self.running_tally(device)


def _as_counted(batch: Batch, evidence: Tensor) -> Tensor:
    return evidence


# ----------------------------------------------------------------------------------------------- classification


class ClassifySettings(Settings):
    """Predict each document's label."""

    kind: Literal["classify"] = "classify"
    pooling: Pooling = "mean"
    """How the tokens of a document become one vector."""
    pooler: Pooler = "bert"
    """What happens to that vector: bert (dense, tanh), roberta (with dropout before) or none."""
    classifier_dropout: float = setting(0.1, ge=0, lt=1)
    """Dropout in front of the classifier."""
    metrics: ClassVar[tuple[str, ...]] = (
        "loss",
        "accuracy",
        "balanced_accuracy",
        "precision_macro",
        "recall_macro",
        "f1_macro",
    )
    selection: ClassVar[tuple[str, str]] = ("f1_macro", "max")

    def build(self, corpus: Corpus, vocabulary: Vocabulary, encoder: EncoderSettings, seed: int) -> Classify:
        """The objective over a labelled corpus. Raises UserError when it has no labels."""
        corpus.require_labels()
        return Classify(self, len(corpus.label_names), encoder, seed)


class Classify:
    """`labels` of a batch are (N) classes. The loss is a mean over sequences, the figures are over whole documents."""

    def __init__(self, settings: ClassifySettings, num_classes: int, encoder: EncoderSettings, seed: int) -> None:
        self._num_classes = num_classes
        self.head = ClassificationHead(
            encoder.hidden_size,
            num_classes,
            settings.pooling,
            settings.pooler,
            settings.classifier_dropout,
            seed,
            encoder.init_std,
        )

    def batch(self, split: TokenSplit, sequences: np.ndarray, epoch: int) -> Batch:
        """The sequences as they are."""
        assert split.labels is not None
        labels_N = torch.from_numpy(np.ascontiguousarray(split.labels[sequences]))
        ids_T = torch.from_numpy(split.gather(sequences))
        return Batch(ids_T, Sequences.of(split.lengths[sequences]), labels_N, len(sequences))

    def loss(self, encoder: Encoder, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cross entropy summed over the documents, and their logits (N, K)."""
        logits_NK = self.head(encoder(batch), batch.sequences)
        # detached: DeepSpeed hangs hooks on every output that carries a gradient, and only the loss may
        return F.cross_entropy(logits_NK, batch.labels, reduction="sum"), logits_NK.detach()

    def running_tally(self, device: torch.device) -> Tally:
        """Loss and accuracy per sequence."""
        return CountTally(device, _right_guesses, perplexity=False)

    def tally(self, split: TokenSplit, device: torch.device) -> Tally:
        """All figures, per document."""
        assert split.labels is not None
        labels_D = np.zeros(split.num_documents, np.int64)
        labels_D[split.document] = split.labels
        return DocumentTally(labels_D, self._num_classes, device)


def _right_guesses(batch: Batch, evidence: Tensor) -> Tensor:
    return (evidence.argmax(dim=1) == batch.labels).sum()


ObjectiveSettings = Annotated[MlmSettings | ClassifySettings, Field(discriminator="kind")]
