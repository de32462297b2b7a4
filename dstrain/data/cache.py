"""Token ids on disk: a corpus is tokenised once, whoever asks first, and opened by everybody else in milliseconds.

An entry is named after its content (texts, labels, vocabulary, format) and holds whole documents without [CLS] and
[SEP]; how they are cut to a stage's `max_length` is decided when it is opened, so that 128 and 16 384 tokens share one
entry. A memo leads from the files' paths, sizes and times to the entry, so that opening reads no text.

    tokens/<key>/meta.json  <split>.ids (raw uint16 or uint32)  <split>.starts.npy  <split>.labels.npy
    memos/<key>.json        locks/<key>.lock

T tokens, N documents, S sequences, K classes.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from dstrain.data import corpora
from dstrain.data.corpora import CorpusSettings, Documents
from dstrain.data.locking import locked
from dstrain.data.vocabulary import Vocabulary, VocabularySettings, write_atomically
from dstrain.data.vocabulary import open_vocabulary as open_from_texts
from dstrain.schema import UserError

Say = Callable[[str], None]
_FORMAT = 1  # raised whenever the same input would give another entry
_SLICE = 2_000_000  # characters tokenised at a time


def cache_home() -> Path:
    """$DSTRAIN_CACHE, else $XDG_CACHE_HOME/dstrain, else ~/.cache/dstrain."""
    if own := os.environ.get("DSTRAIN_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "dstrain"


# -------------------------------------------------------------------------------------------------- the result


@dataclass(frozen=True)
class TokenSplit:
    """One split as sequences of at most `max_length` tokens. Ids stay on disk until they are gathered."""

    lengths: np.ndarray
    """(S) int64 tokens of each sequence, [CLS] and [SEP] included."""
    labels: np.ndarray | None
    """(S) int64 classes (a window has its document's), or None."""
    document: np.ndarray
    """(S) int64: the document each sequence is of; ascending, repeated for windows."""
    num_documents: int
    _starts: np.ndarray
    _ids: np.ndarray
    _cls: int
    _sep: int

    def __len__(self) -> int:
        return len(self.lengths)

    def gather(self, indices: np.ndarray) -> np.ndarray:
        """(T) int64 ids of these sequences end to end, each as [CLS] text [SEP]."""
        lengths = self.lengths[indices]
        bodies = lengths - 2
        ends = np.cumsum(lengths)
        inside = np.arange(bodies.sum()) - np.repeat(np.cumsum(bodies) - bodies, bodies)
        ids = np.empty(int(lengths.sum()), dtype=np.int64)
        ids[ends - lengths] = self._cls
        ids[ends - 1] = self._sep
        ids[np.repeat(ends - lengths + 1, bodies) + inside] = self._ids[
            np.repeat(self._starts[indices], bodies) + inside
        ]
        return ids


@dataclass(frozen=True)
class Corpus:
    """The splits "train", "valid" and "test" of a tokenised corpus."""

    splits: Mapping[str, TokenSplit]
    label_names: tuple[str, ...]
    """(K) names of the classes; empty where there are no labels."""
    fingerprint: str
    """Equal for equal texts, labels and vocabulary; 32 hexadecimal digits."""
    notes: list[str]
    """What was left out, mapped, cut or shared between splits, in sentences."""
    title: str

    def require_labels(self) -> None:
        """Raises UserError when there is nothing to classify by."""
        if not self.label_names:
            why = "; ".join(note for note in self.notes if "no labels" in note)
            raise UserError(
                f"{self.title}: has no labels to classify by{f' ({why})' if why else ''}; set labelled: true and "
                "name the column "
                "with label_column, or take a labelled corpus"
            )


# ----------------------------------------------------------------------------------------------------- opening


def open_vocabulary(settings: VocabularySettings, corpus: CorpusSettings, cache: Path, say: Say) -> Vocabulary:
    """The vocabulary of `settings`, trained on the corpus' training text where it names no file."""
    key = "" if settings.path else corpora.identity(corpus)
    return open_from_texts(settings, lambda: corpora.training_texts(corpus, say), key, cache, say)


def open_corpus(settings: CorpusSettings, vocabulary: Vocabulary, max_length: int, cache: Path, say: Say) -> Corpus:
    """The corpus as sequences of at most `max_length` tokens, tokenised first if nobody has done it yet.

    Safe when many processes start at once: one builds, the others wait. Raises UserError.
    """
    _check_lengths(settings, max_length)
    memo_key = _digest(f"{_FORMAT} {corpora.identity(settings)}", vocabulary.fingerprint)
    memo = cache / "memos" / f"{memo_key}.json"
    entry = _remembered(memo, cache, say)
    if entry is None:
        with locked(cache / "locks" / f"{memo_key}.lock"):
            entry = _remembered(memo, cache, say) or _build(settings, vocabulary, cache, memo, say)
    return _cut(entry, settings, vocabulary, max_length)


def _check_lengths(settings: CorpusSettings, max_length: int) -> None:
    if max_length < 3:
        raise UserError(
            f"{settings.title}: max_length {max_length} leaves no room for text between [CLS] and [SEP]; take at "
            "least 3"
        )
    if settings.long_documents == "window" and settings.window_overlap >= max_length - 2:
        raise UserError(
            f"{settings.title}: window_overlap {settings.window_overlap} leaves a window of {max_length - 2} tokens "
            "nothing new; "
            f"take less than {max_length - 2}"
        )


@dataclass(frozen=True)
class _Entry:
    """An entry of the cache with the notes of the settings it was asked for with."""

    folder: Path
    meta: dict[str, Any]
    notes: list[str]


def _remembered(memo: Path, cache: Path, say: Say) -> _Entry | None:
    """The entry a memo leads to, or None when there is none or it is damaged."""
    try:
        said = json.loads(memo.read_text(encoding="utf-8"))
        folder = cache / "tokens" / said["key"]
        notes = [str(note) for note in said["notes"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    meta = _intact(folder)
    if meta is None:
        if folder.exists():
            say(f"cache: {folder} is damaged and is built again")
        return None
    return _Entry(folder, meta, notes)


def _intact(folder: Path) -> dict[str, Any] | None:
    """The entry's meta data, when every file is there with the size it was written with."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in meta["sizes"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return meta if sizes == meta["sizes"] else None


def _cut(entry: _Entry, settings: CorpusSettings, vocabulary: Vocabulary, max_length: int) -> Corpus:
    splits = {}
    notes = list(entry.notes)
    for split in corpora.SPLITS:
        starts = np.load(entry.folder / f"{split}.starts.npy", allow_pickle=False)
        labels = (
            np.load(entry.folder / f"{split}.labels.npy", allow_pickle=False) if entry.meta["label_names"] else None
        )
        ids = np.memmap(entry.folder / f"{split}.ids", dtype=entry.meta["dtype"], mode="r")
        windows = settings.long_documents == "window"
        begins, bodies, document = _sequences(starts, max_length - 2, settings.window_overlap if windows else None)
        notes.extend(_note_cut(split, np.diff(starts), max_length - 2, windows, len(bodies)))
        splits[split] = TokenSplit(
            bodies + 2,
            None if labels is None else labels[document],
            document,
            len(starts) - 1,
            begins,
            ids,
            vocabulary.cls,
            vocabulary.sep,
        )
    return Corpus(splits, tuple(entry.meta["label_names"]), entry.folder.name, notes, settings.title)


def _sequences(starts: np.ndarray, room: int, overlap: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First token, number of text tokens and document of each sequence; `overlap` None keeps only the start."""
    lengths = np.diff(starts)
    if overlap is None:
        return starts[:-1], np.minimum(lengths, room), np.arange(len(lengths))
    step = room - overlap
    counts = 1 + np.maximum(0, -((room - lengths) // step))
    document = np.repeat(np.arange(len(lengths)), counts)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    return starts[:-1][document] + nth * step, np.minimum(room, lengths[document] - nth * step), document


def _note_cut(split: str, lengths: np.ndarray, room: int, windows: bool, sequences: int) -> Iterator[str]:
    long = lengths > room
    if not long.any():
        return
    share = (
        f"{int(long.sum())} of {len(lengths)} documents ({100 * long.mean():.1f} %) are longer than {room + 2} tokens"
    )
    if windows:
        yield f"{split}: {share}; cut into windows, {sequences} sequences in all"
    else:
        lost = (lengths - room)[long].sum() / lengths.sum()
        yield f"{split}: {share}; truncated, {100 * lost:.1f} % of the tokens are not read"


# ---------------------------------------------------------------------------------------------------- building


def _build(settings: CorpusSettings, vocabulary: Vocabulary, cache: Path, memo: Path, say: Say) -> _Entry:
    """Reads the documents and makes their entry (unless other settings led to it already) and the memo."""
    documents = corpora.documents(settings, say)
    key = _content_key(documents, vocabulary)
    folder = cache / "tokens" / key
    # Two memos may lead to one entry: the second builder waits here and finds it done.
    with locked(cache / "locks" / f"{key}.lock"):
        meta = _intact(folder)
        if meta is None:
            count = sum(len(split.texts) for split in documents.values())
            say(f"{settings.title}: tokenising {count} documents into {folder}")
            meta = _write_entry(documents, vocabulary, folder)
    notes = [f"{split}: {note}" for split in corpora.SPLITS for note in documents[split].notes] + meta["notes"]
    memo.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(memo, json.dumps({"key": key, "notes": notes}))
    return _Entry(folder, meta, notes)


def _content_key(documents: Mapping[str, Documents], vocabulary: Vocabulary) -> str:
    state = blake2b(
        f"{_FORMAT} {sys.byteorder} {vocabulary.fingerprint} {documents['train'].label_names}".encode(), digest_size=16
    )
    for split in corpora.SPLITS:
        part = documents[split]
        state.update(f"{split} {len(part.texts)} {part.labels is not None}".encode())
        for text in part.texts:
            data = text.encode()
            state.update(len(data).to_bytes(8, "little"))
            state.update(data)
        if part.labels is not None:
            state.update(part.labels.astype("<i8").tobytes())
    return state.hexdigest()


def _write_entry(documents: Mapping[str, Documents], vocabulary: Vocabulary, folder: Path) -> dict[str, Any]:
    """Writes an entry beside its place and renames it there whole. The caller holds the lock of this entry."""
    building = folder.with_name(f".building-{folder.name}")
    for leftover in (building, folder):  # of a builder that was killed; of a damaged entry
        shutil.rmtree(leftover, ignore_errors=True)
    building.mkdir(parents=True)
    dtype = "uint16" if vocabulary.size <= 2**16 else "uint32"
    notes: list[str] = []
    try:
        with _progress(sum(len(part.texts) for part in documents.values())) as advance:
            for split in corpora.SPLITS:
                notes.extend(_write_split(split, documents[split], vocabulary, building, dtype, advance))
        sizes = {path.name: path.stat().st_size for path in sorted(building.iterdir())}
        meta = {"dtype": dtype, "label_names": list(documents["train"].label_names), "notes": notes, "sizes": sizes}
        (building / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        os.rename(building, folder)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return meta


def _write_split(
    split: str, part: Documents, vocabulary: Vocabulary, folder: Path, dtype: str, advance: Callable[[int], None]
) -> list[str]:
    """Writes one split. Documents without a token (nothing but characters the vocabulary drops) are left out and "
    "noted."""
    lengths: list[int] = []
    with (folder / f"{split}.ids").open("wb") as stream:
        for texts in _slices(part.texts):
            for ids in vocabulary.encode(texts):
                ids.astype(dtype).tofile(stream)
                lengths.append(len(ids))
            advance(len(texts))
        stream.flush()
        os.fsync(stream.fileno())
    all_lengths = np.array(lengths, dtype=np.int64)
    kept = all_lengths > 0
    if not kept.any():
        raise UserError(
            f"corpus: no document of {split} has a token in this vocabulary; check the vocabulary's path and the text"
        )
    np.save(folder / f"{split}.starts.npy", np.cumsum(np.concatenate([[0], all_lengths[kept]])).astype(np.int64))
    if part.labels is not None:
        np.save(folder / f"{split}.labels.npy", part.labels[kept].astype(np.int64))
    return [] if kept.all() else [f"{split}: left out {int((~kept).sum())} of {len(kept)} documents: no tokens"]


def _slices(texts: Sequence[str]) -> Iterator[list[str]]:
    """Runs of documents of about two million characters, so that memory does not grow with the corpus."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _SLICE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, silence anywhere else."""
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("tokenising", total=total)
        yield lambda count: bar.advance(task, count)


def _digest(*parts: str) -> str:
    return blake2b(" ".join(parts).encode(), digest_size=16).hexdigest()
