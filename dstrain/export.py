"""Makes a model that stands alone out of a run folder, and loads it again.

python -m dstrain.export runs/NAME DIR [--stage NAME] [--weights best|last] [--intervals]

DIR/model.safetensors   full fp32 weights, whatever ZeRO stage and number of ranks trained them
DIR/config.json         everything that builds the model again, and checksums of the other files
DIR/tokenizer.json      the vocabulary
DIR/README.md           a model card made from the run's evidence; no text of any corpus, no host, no path

model = load_model(Path("DIR"))
logits_NK = model.logits([model.ids("some text")])
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import model_validator
from torch import Tensor
from torch.nn import functional as F

from dstrain import __version__
from dstrain.card import SAYS, Facts, Judged, card
from dstrain.consolidate import Source, Which, find
from dstrain.data.batches import evaluation_plan
from dstrain.data.cache import Corpus
from dstrain.data.vocabulary import FILE_NAME as TOKENIZER_FILE
from dstrain.data.vocabulary import Vocabulary
from dstrain.model.encoder import Encoder, EncoderSettings
from dstrain.model.heads import ClassificationHead, MlmHead
from dstrain.objective import Objective, ObjectiveSettings, Task
from dstrain.packed import Batch, Sequences
from dstrain.run import read_record, read_weights, stage_corpus
from dstrain.schema import Settings, UserError, read_yaml, setting, validate
from dstrain.texts import TEXTS_FILE, TextRecord
from dstrain.tracking import program_here

FORMAT = 1
"""Of the files in an export; raised when this module would no longer read the ones written before."""
TOLERANCE = 1e-3
"""An export whose logits differ by more than this from the run's own model is not kept."""
WEIGHTS_FILE, CONFIG_FILE, CARD_FILE = "model.safetensors", "config.json", "README.md"


# --------------------------------------------------------------------------------------------- an export, loaded


class ExportConfig(Settings):
    """config.json of an export."""

    format: int
    """Number of the file format."""
    dstrain: str
    """Version of dstrain that wrote it."""
    run: str
    """Name of the run."""
    stage: str
    """Name of the stage whose weights these are."""
    weights: Which
    """best: chosen by the stage's metric on the validation split; last: those of the last checkpoint."""
    step: int = setting(ge=0, unit="optimizer steps")
    """How long the stage had trained when the weights were taken."""
    seed: int = setting(ge=0)
    """The run's seed; LSH's rotations follow from it."""
    encoder: EncoderSettings
    """The encoder."""
    objective: ObjectiveSettings
    """What the model was trained for; says which head it has."""
    label_names: tuple[str, ...] = ()
    """Names of the classes in the order of the logits; empty for masked words."""
    max_length: int = setting(ge=3, unit="tokens")
    """Tokens of a sequence at most, [CLS] and [SEP] included."""
    long_documents: Literal["truncate", "window"] = "truncate"
    """What happens to longer documents."""
    window_overlap: int = setting(0, ge=0, unit="tokens")
    """Tokens that a window repeats of the one before it."""
    sha256: dict[str, str]
    """Checksums of the weights and the tokenizer, by file name."""

    @model_validator(mode="after")
    def _fits(self) -> ExportConfig:
        if self.window_overlap >= self.max_length - 2:
            raise ValueError(
                f"window_overlap {self.window_overlap} leaves a window of {self.max_length - 2} nothing new"
            )
        if bool(self.label_names) != (self.objective.kind == "classify"):
            raise ValueError(f"{self.objective.kind} does not go with {len(self.label_names)} label_names")
        self.encoder.positions.check_length(self.max_length)
        return self


@dataclass(frozen=True)
class Model:
    """An export that is ready to answer; in eval mode."""

    config: ExportConfig
    vocabulary: Vocabulary
    task: Task
    device: torch.device

    @property
    def fills_masks(self) -> bool:
        """Whether it finds words at [MASK]s; else it classifies."""
        return isinstance(self.task.head, MlmHead)

    @property
    def truncates(self) -> bool:
        """Whether only the start of a long document is read; masked words are only looked for there."""
        return self.fills_masks or self.config.long_documents == "truncate"

    @property
    def dtype(self) -> torch.dtype:
        """The number format it computes in."""
        return next(self.task.parameters()).dtype

    def ids(self, text: str) -> np.ndarray:
        """(L) int64 [CLS] text [SEP] of any length; for masked words every `[MASK]` in the text is one to be found."""
        pieces = self.vocabulary.encode(text.split("[MASK]") if self.fills_masks else [text])
        mask = np.array([self.vocabulary.mask])
        between = [part for piece in pieces for part in (mask, piece)][1:]
        return np.concatenate([[self.vocabulary.cls], *between, [self.vocabulary.sep]]).astype(np.int64)

    def cut(self, ids_L: np.ndarray) -> list[np.ndarray]:
        """A document's tokens as sequences of at most max_length, cut as the stage cut its corpus."""
        config, body = self.config, ids_L[1:-1]
        room = config.max_length - 2
        step = room - config.window_overlap
        count = 1 if self.truncates else 1 + max(0, -((room - len(body)) // step))
        parts = [body[begin : begin + room] for begin in range(0, count * step, step)]
        return [np.concatenate([ids_L[:1], part, ids_L[-1:]]) for part in parts]

    @torch.no_grad()
    def logits(self, sequences: Sequence[np.ndarray]) -> Tensor:
        """(N, K) class logits of token sequences, or (M, V) of the words at their [MASK]s; float32, on the CPU."""
        ids_T = torch.from_numpy(np.concatenate(sequences))
        batch = Batch(ids_T, Sequences.of(map(len, sequences)), torch.empty(0), len(sequences)).to(self.device)
        hidden_TE = self.task.encoder(batch)
        head = self.task.head
        if isinstance(head, MlmHead):
            positions_M = torch.nonzero(ids_T == self.vocabulary.mask).squeeze(1).to(self.device)
            words_ME = head.norm(F.gelu(head.dense(hidden_TE.index_select(0, positions_M))))  # as MlmHead.forward
            return (self.task.encoder.word_embedding(words_ME) + head.bias).float().cpu()
        assert isinstance(head, ClassificationHead)
        logits_NK: Tensor = head(hidden_TE, batch.sequences)
        return logits_NK.cpu()


def load_model(folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Model:
    """The model of an export, in `dtype` on `device`. Reads JSON and safetensors only.

    Raises UserError when the folder is no export, a file is missing or damaged, or its format is newer than this code.
    """
    config = _read_config(folder)
    for name in (WEIGHTS_FILE, TOKENIZER_FILE):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: has no {name}; export the run again, or copy the whole folder")
        if _checksum(folder / name) != config.sha256.get(name):
            raise UserError(
                f"{folder / name}: is damaged (its checksum is not the one in {CONFIG_FILE}); export the run again, "
                "or copy the folder again"
            )
    vocabulary = Vocabulary.load(folder / TOKENIZER_FILE)
    try:
        task = build_task(config, vocabulary)
    except (MemoryError, OverflowError, RuntimeError) as error:
        why = str(error).partition("\n")[0]
        raise UserError(f"{folder / CONFIG_FILE}: no such model can be built ({why}); export the run again") from None
    _fill(task, read_weights(folder / WEIGHTS_FILE), folder / WEIGHTS_FILE)
    task.eval().to(device, dtype)
    return Model(config, vocabulary, task, torch.device(device))


def build_task(config: ExportConfig, vocabulary: Vocabulary) -> Task:
    """The untrained task that a configuration describes."""
    stub = Corpus({}, config.label_names, "", [], config.run)  # a head needs no more of a corpus than its classes
    objective: Objective = config.objective.build(stub, vocabulary, config.encoder, config.seed)
    return Task(Encoder(config.encoder, vocabulary.size, config.seed), objective)


def _read_config(folder: Path) -> ExportConfig:
    file = folder / CONFIG_FILE
    if (folder / "settings.yaml").is_file() and not file.is_file():
        raise UserError(f"{folder}: is the folder of a run; make a model of it: python -m dstrain.export {folder} DIR")
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{file}: cannot be read ({error.strerror}); give a folder that python -m dstrain.export wrote"
        ) from None
    except (ValueError, RecursionError):
        raise UserError(f"{file}: is not JSON; export the run again, or copy the folder again") from None
    if not isinstance(tree, dict) or not {"format", "dstrain"} <= tree.keys():
        raise UserError(f"{file}: is not of dstrain; give a folder that python -m dstrain.export wrote")
    if tree["format"] != FORMAT:
        raise UserError(
            f"{file}: is in format {tree['format']}, written by dstrain {tree['dstrain']}; this is dstrain "
            f"{__version__}, which reads format {FORMAT}: use that version, or export the run again with this one"
        )
    return validate(ExportConfig, tree, str(file))


def _fill(task: Task, weights: Mapping[str, Tensor], file: Path) -> None:
    try:
        task.load_state_dict(dict(weights))
    except RuntimeError as error:  # torch's first line says no more than that there are others
        why = " ".join(str(error).partition("\n")[2].split())[:200]
        raise UserError(f"{file}: does not fit the model that its settings describe ({why}); copy it again") from None


def _checksum(file: Path) -> str:
    return sha256(file.read_bytes()).hexdigest()


# ---------------------------------------------------------------------------------------------------- exporting


def export(run: Path, target: Path, stage: str | None = None, which: Which = "best", intervals: bool = False) -> None:
    """Writes the export of a run's stage into `target`, whole or not at all, and checks it against the run's model.

    `intervals` reads the test split once more, for the card. Raises UserError.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target}: is there already and not an empty folder; give a new one, or remove it")
    source = find(run, stage, which)
    vocabulary = Vocabulary.load(run / "vocabulary" / TOKENIZER_FILE)
    texts = _texts(source, vocabulary)
    config = _config(source, texts[source.name])
    task = build_task(config, vocabulary)
    weights, progress = source.weights(task)
    _fill(task, weights, source.file)
    task.eval()
    judged = judge_documents(task, source, vocabulary) if intervals else None
    with _whole(target) as draft:
        _save(task, draft / WEIGHTS_FILE)
        vocabulary.save(draft)
        checksums = {name: _checksum(draft / name) for name in (WEIGHTS_FILE, TOKENIZER_FILE)}
        config = config.model_copy(update={"step": progress.step, "sha256": checksums})
        (draft / CONFIG_FILE).write_text(config.model_dump_json(indent=1), encoding="utf-8")
        model = load_model(draft)
        difference = largest_difference(Model(config, vocabulary, task, model.device), model)
        if not difference <= TOLERANCE:
            raise UserError(f"{target}: not written: its logits differ by {difference:.2g} from the run's; report this")
        environment = read_yaml(run / "environment.txt") if (run / "environment.txt").is_file() else {}
        parameters = sum(parameter.numel() for parameter in task.parameters())
        facts = Facts(source, progress, texts, environment, parameters, difference, judged)
        (draft / CARD_FILE).write_text(card(facts), encoding="utf-8")
    print(
        f"{target}: {source.name} of {config.run}, {SAYS[which]} (step {progress.step}), {parameters:,} parameters; "
        f"largest difference to the run's logits {difference:.2g}"
    )


def _texts(source: Source, vocabulary: Vocabulary) -> dict[str, TextRecord | None]:
    """What the run wrote down about its stages' text; an older run did not, so there the text is opened again."""
    file = source.folder / TEXTS_FILE
    if file.exists():
        tree = read_record(file)
        return {name: validate(TextRecord, tree.get(name) or {}, str(file), f"{name}.") for name in source.path}
    texts: dict[str, TextRecord | None] = dict.fromkeys(source.path)
    for name in source.path:
        try:
            texts[name] = TextRecord.of(stage_corpus(source.settings.stages[name], vocabulary, print))
        except UserError:  # a run folder may have come from another machine
            if name == source.name and source.stage.objective.kind == "classify":
                raise  # nobody else knows the names of the classes
    return texts


def _config(source: Source, text: TextRecord | None) -> ExportConfig:
    settings, stage, corpus = source.settings, source.stage, source.stage.corpus
    return ExportConfig(
        format=FORMAT, dstrain=__version__, run=settings.name, stage=source.name, weights=source.which, step=0,
        seed=settings.seed, encoder=settings.encoder, objective=stage.objective,
        label_names=text.label_names if text and stage.objective.kind == "classify" else (),
        max_length=stage.max_length, long_documents=corpus.long_documents,
        window_overlap=corpus.window_overlap if corpus.long_documents == "window" else 0, sha256={},
    )  # fmt: skip


def _save(task: Task, file: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: weight.contiguous() for name, weight in task.state_dict().items()}, file)
    except SafetensorError as error:  # what a full disk is to that library
        raise OSError(str(error)) from None
    file.chmod(0o644)


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A folder beside `target` that takes its place once all is in it; nothing stays of one that failed."""
    draft = target.resolve().with_name(f".{target.resolve().name}.draft")
    try:
        shutil.rmtree(draft, ignore_errors=True)  # of an export that was killed
        draft.mkdir(parents=True)
        yield draft
        draft.replace(target.resolve())
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error}); give another folder") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@torch.no_grad()
def largest_difference(one: Model, other: Model) -> float:
    """max |dlogit| of two models over random words in documents of several lengths; NaN when a logit is none."""
    random = np.random.default_rng(0)
    vocabulary, most = one.vocabulary, one.config.max_length
    documents = []
    for length in sorted({min(length, most) for length in (3, 17, 130, 512)}):
        ids = random.integers(0, vocabulary.size, length)
        ids[0], ids[length // 2], ids[-1] = vocabulary.cls, vocabulary.mask, vocabulary.sep
        documents.append(ids)
    return float((one.logits(documents) - other.logits(documents)).abs().max())


@torch.no_grad()
def judge_documents(task: Task, source: Source, vocabulary: Vocabulary) -> Judged:
    """What a classifier takes each test document for; the windows of a document vote, as in `DocumentTally`."""
    if not isinstance(task.head, ClassificationHead):
        raise UserError(f"--intervals: {source.name} does not classify; leave it out")
    split = stage_corpus(source.stage, vocabulary, print).splits["test"]
    assert split.labels is not None
    votes_DK = np.zeros((split.num_documents, task.head.classifier.out_features))
    truth_D = np.zeros(split.num_documents, np.int64)
    truth_D[split.document] = split.labels
    for _, rows, _ in evaluation_plan(split.lengths, source.stage.tokens_per_batch, 1).of_rank(0):
        ids_T = torch.from_numpy(split.gather(rows))
        batch = Batch(ids_T, Sequences.of(split.lengths[rows]), torch.empty(0), len(rows))
        logits_NK = task.head(task.encoder(batch), batch.sequences)
        np.add.at(votes_DK, split.document[rows], torch.log_softmax(logits_NK, dim=-1).double().numpy())
    return Judged(truth_D, votes_DK.argmax(axis=1), votes_DK.shape[1])


# ------------------------------------------------------------------------------------------------------ the door


def parser() -> argparse.ArgumentParser:
    """The command line."""
    words = argparse.ArgumentParser(
        prog="python -m dstrain.export", description="Make a model that stands alone out of a run folder."
    )
    words.add_argument("run", type=Path, metavar="RUN", help="folder of a run, such as runs/NAME")
    words.add_argument("target", type=Path, metavar="DIR", help="where the model goes: a new or empty folder")
    words.add_argument("--stage", metavar="NAME", help="another stage than the last one")
    words.add_argument(
        "--weights", choices=("best", "last"), default="best",
        help="best: chosen on the validation split; last: those of the last checkpoint, from any ZeRO stage",
    )  # fmt: skip
    words.add_argument(
        "--intervals", action="store_true", help="read the test split again, for bootstrap intervals in the card"
    )
    return words


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status: 2 for a mistake, told in a sentence."""
    given = parser().parse_args(argv)
    try:
        export(given.run, given.target, given.stage, given.weights, given.intervals)
        print(f"use it: {program_here('python')} -m dstrain.predict {given.target} FILE")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
