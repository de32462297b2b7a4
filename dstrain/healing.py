"""A step that fails: what is tried, in which order, and what is said when nothing helps.

A number that is not finite: the batch is skipped; then attention computes in fp32; then fp16 gives way to bf16; then the
stage is given up. Memory that runs out: every micro-batch is cut into twice as many pieces, and the same step is taken
again. Both show where the ranks meet anyway, in the norm of their common gradient, before any weight has moved: a healthy
step costs next to nothing more, and all ranks decide alike.
"""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from dstrain.diagnosis import Watched
from dstrain.engine import Diverged, Engine, NotFinite, peak_memory_gb
from dstrain.packed import Batch
from dstrain.readings import say_aloud
from dstrain.schema import Settings, setting
from dstrain.splitting import Piece, beginning, split

_PIECES_FILE = "pieces.json"


class HealingSettings(Settings):
    """What is tried before a stage whose numbers break is given up."""

    skips_in_a_row: int = setting(3, ge=0, unit="optimizer steps")
    """So many failing batches one after another are left out; one more, and the next remedy is tried."""
    skips_in_all: int = setting(10, ge=0, unit="optimizer steps")
    """The same for all failing batches of the stage."""
    attention_in_fp32: bool = True
    """Whether in 16 bits attention alone goes over to fp32 for the rest of the stage before the stage is given up."""
    bf16_for_fp16: bool = True
    """Whether fp16 then gives way to bf16 for the rest of the run, on a device that has it."""


@dataclass(frozen=True)
class Health:
    """What a stage has come through. A checkpoint has it, so that a resumed run takes the same steps."""

    skipped: int = 0
    """Batches left out so far, without those for which fp16 lowered its loss scale."""
    in_a_row: int = 0
    """Of them, since the last good step or remedy."""
    attention_in_fp32: bool = False
    """Whether attention has gone over to fp32."""
    pieces: int = 1
    """Into how many pieces each micro-batch is cut."""


# ---------------------------------------------------------------------------------------------------- one attempt


class RanShort(Exception):
    """This rank's memory ran out over a piece of a micro-batch."""

    def __init__(self, piece: Piece, asked: str) -> None:
        super().__init__(asked)
        self.piece = piece


class OutOfMemory(Exception):
    """Memory ran out where a rank cannot give up a step alone: the stage begins again at its checkpoint, in more pieces."""


class GaveOut(Exception):
    """fp16 cannot hold a step's numbers, and bf16 is at hand: the run goes on from here in bf16. Raised on all ranks."""


class TooLarge(Exception):
    """Memory runs out though no micro-batch can be cut any finer. This rank alone may know."""


@contextmanager
def short_of_memory(piece: Piece) -> Iterator[None]:
    """Turns what torch raises when memory runs out into RanShort."""
    try:
        yield
    except Exception as error:
        if not is_shortage(error):
            raise
        raise RanShort(piece, first_line(error)) from error


def first_line(error: BaseException) -> str:
    """What an error says, without the traceback that torch may add."""
    return str(error).partition("\n")[0]


def is_shortage(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the host."""
    # The last one is what oneDNN says when it gets no memory.
    words = ("can't allocate memory", "not enough memory", "out of memory", "could not create a primitive")
    shortage = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return shortage or (isinstance(error, RuntimeError) and any(word in str(error) for word in words))


@dataclass(frozen=True)
class Attempt:
    """What this rank does in one optimizer step, so that it can be done again."""

    engine: Engine
    step: int
    """Run-wide: what draws depends on it."""
    batches: Sequence[Piece]
    weight: float
    """Terms of the loss in all micro-batches of all ranks."""

    def pieces(self, pieces: int) -> Iterator[Piece]:
        """All that is to be learned from, cut so many times finer."""
        for batch in self.batches:
            yield from split(batch, pieces)

    def learn(self, piece: Piece) -> tuple[Batch, Tensor, Tensor]:
        """Adds the gradient of a piece: (the piece on the device, its summed loss, the objective's evidence)."""
        task: Any = self.engine.task
        with short_of_memory(piece):
            task.set_step(self.step, piece.micro_batch, piece.tokens, piece.sequences)
            on_device = piece.batch.to(self.engine.ranks.device)
            loss_sum, evidence = self.engine(on_device)
            self.engine.backward(loss_sum / self.weight if piece.counts else loss_sum * 0.0)
        return on_device, loss_sum, evidence

    def smallest(self) -> Batch:
        """A few tokens, which learn nothing but can be learned from."""
        task: Any = self.engine.task
        task.set_step(self.step, self.batches[0].micro_batch)
        return beginning(self.batches[0].batch, tokens=8).to(self.engine.ranks.device)


# -------------------------------------------------------------------------------------------------- what is tried


class Healer:
    """Takes the steps of one stage, and what helps when one fails. All ranks call it alike and do alike."""

    def __init__(
        self, engine: Engine, settings: HealingSettings, name: str, folder: Path, diverged: Callable[[str], Diverged],
        bf16_at_hand: bool = False,
    ) -> None:  # fmt: skip
        """`diverged` words the end of the stage `name`, whose folder is `folder`; `bf16_at_hand`: another engine could be
        built that computes in bf16."""
        self._engine, self._settings, self._name, self._diverged = engine, settings, name, diverged
        self._bf16_at_hand = bf16_at_hand
        self._folder = folder
        self._scale = engine.loss_scale
        self.events: dict[str, float] = {}
        """What happened in the last step, as values of a reading; empty when nothing did."""
        self._carried: dict[str, float] = {}  # what happened between the starts, told with the first step

    def begin(self, health: Health) -> Health:
        """Puts the task into the state that a checkpoint tells of, or that a start which ran out of memory left, or the end
        of fp16: what was tried in its last step is in no checkpoint, so that whoever goes on from there tries the same."""
        if self._engine.gave_out:
            widened = self._settings.attention_in_fp32
            if widened and not health.attention_in_fp32:
                self._carried["attention_in_fp32"] = 1.0
            self._carried["bf16_for_fp16"] = 1.0
            health = replace(health, in_a_row=0, attention_in_fp32=widened)
        if health.attention_in_fp32:
            attend_in_fp32(self._engine.task)
        pieces = self._engine.ranks.agree(max(health.pieces, noted_pieces(self._folder)))
        if pieces > health.pieces:
            self._carried["pieces"] = float(pieces)
        return replace(health, pieces=pieces)

    def step(self, attempt: Attempt, number: int, health: Health, take: Callable[[int], None]) -> Health:
        """Has optimizer step `number` of the stage taken by `take(pieces)`, or left out, and says what was done.

        Raises Diverged when nothing helps any more, OutOfMemory or GaveOut when only a new start does.
        """
        self.events, self._carried = self._carried, {}
        while True:
            shortage, failed = self._try(attempt, health, take)
            if not failed:
                break
            shortages = [found for found in self._engine.ranks.gather(shortage) if found]
            if shortages:
                health = self._cut_finer(shortages, number, health)
                continue
            health, again = self._next_rung(attempt, number, health)
            if not again:
                self._note_scale()
                return health
        self._note_scale()
        return replace(health, in_a_row=0)

    def _try(self, attempt: Attempt, health: Health, take: Callable[[int], None]) -> tuple[dict[str, Any] | None, bool]:
        """(where this rank's memory ran out, whether the step failed on all ranks)."""
        try:
            take(health.pieces)
            return None, False
        except NotFinite:
            return None, True
        except RanShort as error:
            shortage = self._described(error)
        except Exception as error:
            if not is_shortage(error):
                raise
            raise self._begin_anew(attempt, health, str(error)) from error
        if not self._engine.can_forgo:
            raise self._begin_anew(attempt, health, shortage["asked"])
        # Only here is the error gone, and with it what its frames held on to.
        gc.collect()
        if self._engine.ranks.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            self._engine.forgo(attempt.smallest())
        except NotFinite:
            return shortage, True
        raise AssertionError("forgo always raises")

    def _described(self, error: RanShort) -> dict[str, Any]:
        piece = error.piece
        return {
            "sequences": len(piece.documents), "document": int(piece.documents[0]), "tokens": piece.batch.sequences.tokens,
            "held": peak_memory_gb(self._engine.ranks.device), "asked": str(error),
        }  # fmt: skip

    def _cut_finer(self, shortages: list[dict[str, Any]], number: int, health: Health) -> Health:
        alone = next((found for found in shortages if found["sequences"] == 1), None)
        if alone:
            raise Diverged(self._too_large(alone, f"at step {number}"))
        pieces = 2 * health.pieces
        self.events["pieces"] = float(pieces)
        self._say(
            f"step {number} ran out of memory; from now on each micro-batch is taken in {pieces} pieces, with the same "
            "gradient, and this step is taken again"
        )
        return replace(health, pieces=pieces)

    def _begin_anew(self, attempt: Attempt, health: Health, asked: str) -> OutOfMemory | TooLarge:
        if health.pieces >= max(len(batch.documents) for batch in attempt.batches):
            tokens, document = max(
                (length, int(document))
                for batch in attempt.batches
                for length, document in zip(batch.batch.sequences.lengths, batch.documents, strict=True)
            )
            held = peak_memory_gb(self._engine.ranks.device)
            found = {"document": document, "tokens": tokens, "held": held, "asked": asked}
            return TooLarge(self._too_large(found, "the longest of this step"))
        where = f"{self._name}: memory ran out in the middle of a step that the ranks take together ({asked})"
        return in_more_pieces(self._folder, self._engine.ranks.rank, health.pieces, where)

    def _too_large(self, found: dict[str, Any], which: str) -> str:
        """That the document that was `found` cannot be learned from."""
        tokens, task = found["tokens"], cast(Any, self._engine.task)
        return (
            f"{self._name}: document {found['document']} of the training split, counted from 0 ({tokens} tokens in one "
            f"sequence, {which}), does not fit into memory even alone: it takes about "
            f"{activations_gb(task.encoder, tokens):.1f} GB beside the model by estimate, {found['held']:.1f} GB were "
            f"held in all at most, and then: {found['asked']}; {way_out(self._name)}"
        )

    def _next_rung(self, attempt: Attempt, number: int, health: Health) -> tuple[Health, bool]:
        """The state after the next remedy, and whether the step is to be taken again."""
        what, where = self._diagnose(attempt, health)
        settings = self._settings
        if health.in_a_row < settings.skips_in_a_row and health.skipped < settings.skips_in_all:
            health = replace(health, skipped=health.skipped + 1, in_a_row=health.in_a_row + 1)
            self.events["skipped_batches"] = float(health.skipped)
            self._say(f"{what} is not a number at step {number}, and its batch is skipped: {where}")
            return health, False
        dtype = next(self._engine.task.parameters()).dtype
        if dtype != torch.float32 and settings.attention_in_fp32 and not health.attention_in_fp32:
            attend_in_fp32(self._engine.task)
            self.events["attention_in_fp32"] = 1.0
            self._say(f"{what} is not a number at step {number}, and from here on attention computes in fp32: {where}")
            return replace(health, attention_in_fp32=True, in_a_row=0), True
        if dtype == torch.float16 and settings.bf16_for_fp16 and self._bf16_at_hand:
            raise GaveOut(f"{self._name}: {what} is not a number at step {number}, and the run goes on in bf16: {where}")
        tried = f" ({health.skipped} batches were skipped before)" if health.skipped else ""
        raise self._diverged(f"{what} is not a number at step {number}{tried}: {where}")

    def _diagnose(self, attempt: Attempt, health: Health) -> tuple[str, str]:
        """(loss or gradient, where it broke): takes the step again under watch, and moves nothing."""
        engine = self._engine
        pieces = list(attempt.pieces(health.pieces))
        engine.expect(len(pieces) + 1)
        loss_is_finite, end = True, engine.spoil
        with Watched(engine.task) as watched:
            try:
                for piece in pieces:
                    _, loss_sum, _ = attempt.learn(piece)
                    engine.step(0.0)
                    loss_is_finite &= bool(torch.isfinite(loss_sum))
            except RanShort as error:  # watching takes memory too
                if not engine.can_forgo:
                    raise self._begin_anew(attempt, health, str(error)) from error
                end = engine.forgo
        with contextlib.suppress(NotFinite):
            end(attempt.smallest())
        mine: dict[str, Any] = {"loss": loss_is_finite, "rank": engine.ranks.rank, "order": None}
        if (finding := watched.finding) is not None:
            documents = ids(pieces[finding.call].documents)
            mine |= {"order": [finding.call, not finding.forward], "said": finding.sentence, "documents": documents}
        seen = engine.ranks.gather(mine)
        what = "loss" if not all(one["loss"] for one in seen) else "gradient"
        found = min((one for one in seen if one["order"]), key=lambda one: one["order"], default=None)
        if found is None:
            return "gradient", "taken again under watch, the step had nothing but finite numbers in each module"
        rank = f"on rank {found['rank']} " if engine.ranks.world > 1 else ""
        return what, f"{rank}{found['said']}; documents {found['documents']}"

    def _note_scale(self) -> None:
        """fp16's loss scale has a history of its own: a reading at every change."""
        if self._engine.loss_scale != self._scale:
            self._scale = self._engine.loss_scale
            self.events |= {"loss_scale": self._scale, "skipped_steps": float(self._engine.skipped_steps)}

    def _say(self, sentence: str) -> None:
        if self._engine.ranks.rank == 0:
            say_aloud(f"{self._name}: {sentence}")


def way_out(name: str) -> str:
    """What helps where memory runs out in a stage and nothing can be cut any finer."""
    return f"lower stages.{name}.max_length, set encoder.activation_checkpointing, or take a device with more memory"


# ------------------------------------------------------------------------------- what only a new start can put right


def noted_pieces(folder: Path) -> int:
    """Into how many pieces an earlier start says that this stage's micro-batches are to be cut."""
    try:
        return int(json.loads((folder / _PIECES_FILE).read_text())["pieces"])
    except (OSError, ValueError, KeyError, TypeError):
        return 1


def in_more_pieces(folder: Path, rank: int, pieces: int, where: str) -> OutOfMemory:
    """Leaves word that a stage's micro-batches are to be cut twice as fine as into `pieces`."""
    file = folder / _PIECES_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(f".{rank}.draft")
    draft.write_text(json.dumps({"pieces": 2 * pieces}))
    draft.replace(file)
    return OutOfMemory(
        f"{where}; the same command goes on from the last checkpoint, with each micro-batch in {2 * pieces} pieces"
    )


@contextmanager
def evaluating(name: str, folder: Path, rank: int, pieces: int, finest: int) -> Iterator[None]:
    """Turns memory that runs out in an evaluation into OutOfMemory, or TooLarge where its batches, already cut into `pieces`,
    are no smaller than when cut into `finest`."""
    try:
        yield
    except Exception as error:
        if not is_shortage(error):
            raise
        where = f"{name}: memory ran out in an evaluation ({first_line(error)})"
        if pieces >= finest:
            raise TooLarge(f"{where}, whose batches cannot be any smaller; {way_out(name)}") from error
        raise in_more_pieces(folder, rank, pieces, where) from error


def ids(documents: np.ndarray, most: int = 12) -> str:
    """`3, 17, 44 and 5 more of the training split, counted from 0`."""
    found = np.unique(documents).tolist()
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(map(str, found[:most])) + more + " of the training split, counted from 0"


def activations_gb(encoder: nn.Module, tokens: int) -> float:
    """About what an encoder keeps of a sequence for its backward pass, without what is in the attention kernel.

    In each layer: the inputs of the linear maps, of the norms and of the activation, and the dropouts' masks; with
    activation checkpointing each layer's input, and all this of one layer.
    """
    shape: Any = encoder.settings
    width = next(encoder.parameters()).element_size()
    layer = width * (6 * shape.hidden_size + 4 * shape.qkv_size + 2 * shape.intermediate_size) + 2 * shape.hidden_size
    layers = shape.num_layers * layer
    if shape.activation_checkpointing:
        layers = shape.num_layers * width * shape.hidden_size + layer
    return tokens * layers / 1e9


def attend_in_fp32(task: nn.Module) -> None:
    """Has every attention kernel of the task compute in fp32, whatever the precision around it."""
    encoder: Any = task.encoder
    around = next(task.parameters()).dtype

    def widen(kernel: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(value.float() if isinstance(value, Tensor) else value for value in given)

    def narrow(kernel: nn.Module, given: tuple[Any, ...], out_THD: Tensor) -> Tensor:
        return out_THD.to(around)

    for block in encoder.blocks:
        block.attention.register_forward_pre_hook(widen)
        block.attention.register_forward_hook(narrow)
