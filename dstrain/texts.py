"""What is known of a run's text: a record of each stage, by which a run that goes on finds out that its text has changed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import numpy as np

from dstrain.data.cache import Corpus
from dstrain.schema import Settings, UserError, setting

TEXTS_FILE = "data.json"
"""A TextRecord of each stage. No artifact: notes may quote the text."""


class SplitRecord(Settings):
    """How much text a split has."""

    documents: int = setting(ge=0)
    """Documents with at least one token."""
    tokens: int = setting(ge=0, unit="tokens")
    """What the model reads of them in one pass, [CLS] and [SEP] of every sequence included."""
    classes: tuple[int, ...] = ()
    """Documents of each class; empty without labels."""


class TextRecord(Settings):
    """What remains to be known of a stage's text when only the run folder is at hand."""

    title: str
    """What the corpus calls itself."""
    fingerprint: str
    """Equal for equal texts, labels and vocabulary."""
    label_names: tuple[str, ...] = ()
    """Names of the classes in the order of the logits."""
    notes: tuple[str, ...] = ()
    """What was left out, mapped, cut or shared between splits."""
    splits: dict[str, SplitRecord]
    """Of train, valid and test those that there are."""

    @classmethod
    def of(cls, corpus: Corpus) -> TextRecord:
        """Of an open corpus."""
        splits = {}
        for name, split in corpus.splits.items():
            classes: tuple[int, ...] = ()
            if split.labels is not None:
                _, firsts = np.unique(split.document, return_index=True)  # a window repeats its document's label
                classes = tuple(np.bincount(split.labels[firsts], minlength=len(corpus.label_names)).tolist())
            splits[name] = SplitRecord(documents=split.num_documents, tokens=int(split.lengths.sum()), classes=classes)
        return cls(
            title=corpus.title, fingerprint=corpus.fingerprint, label_names=corpus.label_names,
            notes=tuple(corpus.notes), splits=splits,
        )  # fmt: skip


def keep_or_refuse(
    before: Mapping[str, TextRecord], now: Mapping[str, TextRecord], to_be_read: Collection[str], accepted: Collection[str],
    say: Callable[[str], None], start_over: str = "start over with --resume never",
) -> dict[str, TextRecord]:  # fmt: skip
    """The records of a run that goes on: of a stage that is over the one it was trained on, of the others today's.

    `to_be_read` names the stages whose text is read from here on. Raises UserError with each of them whose text is
    another one than `before`, and how to `start_over`; where it is `accepted` that is said, and kept in the record's notes.
    """
    records, refused = {**now, **before}, []
    for name, was in before.items():
        if name not in to_be_read or was.fingerprint == now[name].fingerprint:
            continue
        change = f"the text of {now[name].title} has changed since it was last read: {_change(was, now[name])}"
        if name in accepted:
            say(f"{name}: {change}")
            records[name] = now[name].model_copy(update={"notes": (*now[name].notes, change)})
        else:
            refused.append(f"stages.{name}: {change}")
    if refused:
        way_out = f"restore it, go on with the changed text by --accept-changed-data, or {start_over}"
        raise UserError("\n".join(f"{sentence}; {way_out}" for sentence in refused))
    return records


def _change(was: TextRecord, now: TextRecord) -> str:
    """The fingerprints, and what became more or less."""
    counts = []
    for split in sorted(was.splits.keys() | now.splits.keys()):
        old, new = (record.splits.get(split, SplitRecord(documents=0, tokens=0)) for record in (was, now))
        if old.documents != new.documents or old.tokens != new.tokens:
            counts.append(f"{split} {old.documents} -> {new.documents} documents, {old.tokens} -> {new.tokens} tokens")
    size = "; ".join(counts) or "as many documents and tokens, but other ones"
    return f"fingerprint {was.fingerprint} -> {now.fingerprint} ({size})"
