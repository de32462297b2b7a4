"""Where documents come from: a folder, a file, a name, or the Python packages on this machine.

A corpus is three splits, "train", "valid" and "test". Whatever is missing is carved out of the training split by a
hash of the text, so that the same file gives the same splits on every machine and equal texts stay together.
N documents, K classes.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import field_validator, model_validator

from dstrain.data.files import FORMATS, Rows, TableSettings, pick, read_table
from dstrain.data.hub import HUB, read_hub
from dstrain.data.labels import Value, agree_on_classes
from dstrain.data.pydocs import identity as pydocs_identity
from dstrain.data.pydocs import read_pydocs
from dstrain.schema import UserError, did_you_mean, setting

Say = Callable[[str], None]
SPLITS = ("train", "valid", "test")
WIKIPEDIA_KEYWORDS = ("film", "sport", "business", "science", "technology", "news")
_ALIASES = {"wiki": "wikipedia"}
_FOLDERS = {"wikipedia": ("wikipedia", "wiki")}
_FILE_NAMES = {
    "train": ("train",),
    "valid": ("validation", "valid", "dev"),
    "test": ("test",),
    "unlabeled": ("unlabeled", "unlabelled"),
}
_CARVED_AT_MOST = 10_000  # documents; a tenth of Wikipedia would be evaluated for hours


class CorpusSettings(TableSettings):
    """Which documents a stage reads, and how many of them."""

    name: str = setting("pydocs", min_length=1)
    """wikipedia, imdb, ag_news, hyperpartisan, arxiv, yelp_polarity, pydocs, or any folder in DSTRAIN_DATA. A folder of
    that name in DSTRAIN_DATA comes before the hub."""
    path: Path | None = None
    """In place of a name: a folder with train, validation, test (and unlabeled) files of .parquet, .csv, .tsv or
    .jsonl, or one such file, which is split."""
    labelled: bool = True
    """false: text only, for a language model. The `unlabeled` file is the training text where there is one; otherwise
    it is the text of train. valid and test keep their texts."""
    keywords: tuple[str, ...] | None = None
    """Keep the documents that hold one of these words (or its plural), in any case; default for wikipedia: film, sport,
    business, science, technology, news; for others: no filter. An empty list turns the filter off."""
    min_characters: int = setting(0, unit="characters", ge=0)
    """Documents shorter than this are left out."""
    max_documents: int | None = setting(None, unit="documents", ge=1)
    """At most this many training documents, chosen by `split_seed`."""
    max_eval_documents: int | None = setting(None, unit="documents", ge=1)
    """At most this many documents in valid and in test, chosen by `split_seed`."""
    valid_share: float = setting(0.1, gt=0, lt=0.5)
    """Share of the training documents that becomes valid where there is no such file (at most 10 000 documents)."""
    test_share: float = setting(0.1, gt=0, lt=0.5)
    """Share of the training documents that becomes test where there is no such file (at most 10 000 documents)."""
    split_seed: int = setting(0, ge=0)
    """Decides which documents are carved out or kept by a cap; independent of the run's seed, so that seeds compare."""
    long_documents: Literal["truncate", "window"] = "truncate"
    """What happens to a document of more tokens than the stage's max_length: its start is kept, or it becomes several
    sequences."""
    window_overlap: int = setting(0, unit="tokens", ge=0)
    """Tokens that a window repeats of the one before it."""

    @field_validator("path")
    @classmethod
    def _home(cls, path: Path | None) -> Path | None:
        return None if path is None else path.expanduser()

    @model_validator(mode="after")
    def _one_origin(self) -> CorpusSettings:
        default = type(self).model_fields["name"].default  # settings that were written down name it beside a path
        if self.path is not None and self.name != default:
            raise ValueError(
                f"name ({self.name}) and path ({self.path}) both say where the corpus is; give one of them"
            )
        return self

    @property
    def title(self) -> str:
        """What messages call this corpus."""
        return f"corpus {self.path or self.name}"


@dataclass(frozen=True)
class Documents:
    """One split of a corpus."""

    texts: Sequence[str]
    labels: np.ndarray | None
    """(N) int64 classes 0..K-1, or None."""
    label_names: tuple[str, ...] = ()
    """(K) names of the classes."""
    notes: tuple[str, ...] = ()
    """What was left out, mapped, doubled or shared, in sentences."""


# ------------------------------------------------------------------------------------------------- where it is


@dataclass(frozen=True)
class Origin:
    """Where a corpus was found: local files per split, or a name to be read by its own code."""

    kind: Literal["files", "single", "hub", "pydocs"]
    name: str
    files: Mapping[str, Path]

    def identity(self) -> str:
        """Changes whenever the documents may have changed; costs no reading of text."""
        if self.kind == "pydocs":
            return f"pydocs {pydocs_identity()}"
        if self.kind == "hub":
            return f"hub {HUB[self.name]}"
        stats = [(split, path.resolve(), path.stat()) for split, path in sorted(self.files.items())]
        return " ".join(f"{split}={path}:{stat.st_size}:{stat.st_mtime_ns}" for split, path, stat in stats)


def locate(settings: CorpusSettings) -> Origin:
    """Finds the corpus: `path`, else a folder in DSTRAIN_DATA, else pydocs, else the hub. Raises UserError."""
    if settings.path is not None:
        return _at_path(settings.path)
    name = _ALIASES.get(settings.name, settings.name)
    home = _data_home()
    for folder in _FOLDERS.get(name, (name,)):
        if home is not None and (home / folder).is_dir():
            return Origin("files", name, _split_files(home / folder))
    if name == "pydocs":
        return Origin("pydocs", name, {})
    if name in HUB:
        return Origin("hub", name, {})
    here = [entry.name for entry in sorted(home.iterdir()) if entry.is_dir()] if home else []
    where = f"in {home} or on the hub" if home else "on the hub, and DSTRAIN_DATA is not set"
    raise UserError(
        f"corpus {settings.name}: there is no such corpus "
        f"{where}{did_you_mean(settings.name, [*HUB, 'pydocs', *_ALIASES, *here])}"
    )


def _data_home() -> Path | None:
    value = os.environ.get("DSTRAIN_DATA")
    if not value:
        return None
    home = Path(value).expanduser()
    if not home.is_dir():
        raise UserError(
            f"DSTRAIN_DATA: {value} is not a folder; set it to the folder that holds imdb/, wiki/ and so on, or "
            "unset it"
        )
    return home


def _at_path(path: Path) -> Origin:
    if path.is_dir():
        return Origin("files", str(path), _split_files(path))
    if path.is_file():
        return Origin("single", str(path), {"train": path})
    raise UserError(
        f"corpus {path}: there is no such file or folder; give a folder with train and test files, or one file"
    )


def _split_files(folder: Path) -> dict[str, Path]:
    """The one file of each split in a folder. Raises UserError when train is missing or a split has two files."""
    files: dict[str, Path] = {}
    for split, stems in _FILE_NAMES.items():
        found = [
            folder / f"{stem}{suffix}" for stem in stems for suffix in FORMATS if (folder / f"{stem}{suffix}").is_file()
        ]
        if len(found) > 1:
            raise UserError(f"{folder}: {split} is both {' and '.join(path.name for path in found)}; keep one of them")
        if found:
            files[split] = found[0]
    if "train" not in files:
        names = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise UserError(
            f"{folder}: has no train file, only {names}; call it train{'|'.join(FORMATS)}, or set path to the one file"
        )
    return files


def identity(settings: CorpusSettings) -> str:
    """A key of the documents that `documents(settings)` gives, without reading them."""
    said = settings.model_dump_json(exclude={"long_documents", "window_overlap", "name", "path"})
    origin = locate(settings)
    return f"{origin.name} {origin.identity()} {said} {'label_column' in settings.model_fields_set}"


# ---------------------------------------------------------------------------------------------------- reading


def documents(settings: CorpusSettings, say: Say) -> dict[str, Documents]:
    """The splits "train", "valid" and "test", cleaned, filtered, capped and with classes 0..K-1.

    Order: rows are read; blank documents are dropped; too short ones and those without a keyword are left out; missing
    splits are carved out; labels of all splits become classes; caps are applied. Raises UserError.
    """
    origin = locate(settings)
    notes: dict[str, list[str]] = {split: [] for split in SPLITS}
    found = _read(origin, settings, say)
    kept = {
        split: _filtered(rows, _keywords(settings, origin), settings, notes[split]) for split, rows in found.items()
    }
    complete = _carve(kept, settings, notes)
    for split, rows in complete.items():
        if not len(rows.texts):
            raise UserError(
                f"{settings.title}: {split} has no documents left; loosen keywords or min_characters, or add text"
            )
    return _numbered(complete, settings, notes)


def _read(origin: Origin, settings: CorpusSettings, say: Say) -> dict[str, Rows]:
    """Rows of every split there is; `unlabeled` has taken the place of train when only text is wanted."""
    labelled = settings.labelled and (origin.name not in HUB or HUB[origin.name].labelled)
    wanted = ("train", "valid", "test") if labelled else ("unlabeled", "train", "valid", "test")
    if origin.kind == "pydocs":
        found = read_pydocs()
    elif origin.kind == "hub":
        found = read_hub(origin.name, wanted, labelled, say)
    else:
        # train is not read at all where `unlabeled` takes its place
        skipped = "train" if "unlabeled" in wanted and "unlabeled" in origin.files else ""
        files = {split: path for split, path in origin.files.items() if split in wanted and split != skipped}
        found = {split: read_table(path, settings, labelled) for split, path in files.items()}
    if "unlabeled" in found:
        found["train"] = found.pop("unlabeled")
    if not labelled:
        return {split: replace(rows, labels=None) for split, rows in found.items()}
    return _labels_everywhere_or_nowhere(found, origin)


def _labels_everywhere_or_nowhere(found: dict[str, Rows], origin: Origin) -> dict[str, Rows]:
    without = [split for split, rows in found.items() if rows.labels is None]
    if without and len(without) < len(found):
        files = ", ".join(str(origin.files.get(split, split)) for split in without)
        raise UserError(f"{files}: has no label column while the other splits have one; add it, or set labelled: false")
    return found


def _keywords(settings: CorpusSettings, origin: Origin) -> tuple[str, ...]:
    if settings.keywords is not None:
        return settings.keywords
    return WIKIPEDIA_KEYWORDS if origin.name == "wikipedia" else ()


def _filtered(rows: Rows, keywords: Sequence[str], settings: CorpusSettings, notes: list[str]) -> Rows:
    notes.extend(rows.notes)
    keep = np.ones(len(rows.texts), dtype=bool)
    matches = _matcher(keywords)
    blank = short = unmatched = 0
    for place, text in enumerate(rows.texts):
        if is_blank(text):
            blank += 1
        elif len(text) < settings.min_characters:
            short += 1
        elif matches is not None and not matches(text):
            unmatched += 1
        else:
            continue
        keep[place] = False
    total = len(rows.texts)
    for count, what in (
        (blank, "blank"),
        (short, f"shorter than {settings.min_characters} characters"),
        (unmatched, "without a keyword"),
    ):
        if count:
            notes.append(f"left out {count} of {total} documents: {what}")
    return rows if keep.all() else _rows_at(rows, np.flatnonzero(keep))


def _matcher(keywords: Sequence[str]) -> Callable[[str], object] | None:
    if not keywords:
        return None
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, keywords))})s?\b", re.IGNORECASE).search


def is_blank(text: str) -> bool:
    """Whether nothing in the text can be seen: spaces, control and zero-width characters only."""
    return all(unicodedata.category(character)[0] in "ZC" for character in text)  # stops at the first that shows


def _rows_at(rows: Rows, places: np.ndarray) -> Rows:
    labels = None if rows.labels is None else [rows.labels[place] for place in places.tolist()]
    return replace(rows, texts=pick(rows.texts, places), labels=labels)


# ---------------------------------------------------------------------------------------------------- splitting


def _carve(found: dict[str, Rows], settings: CorpusSettings, notes: dict[str, list[str]]) -> dict[str, Rows]:
    """Train, valid and test; those that are missing come out of train, class by class."""
    missing = [split for split in ("valid", "test") if split not in found]
    train = found["train"]
    if not missing:
        return {split: found[split] for split in SPLITS}
    shares = {"valid": settings.valid_share, "test": settings.test_share}
    split_of = _drawn(train, {split: shares[split] for split in missing}, settings.split_seed)
    for number, split in enumerate(missing, 1):
        places = np.flatnonzero(split_of == number)
        if not len(places):
            raise UserError(
                f"{settings.title}: {len(train.texts)} training documents are too few to carve {split} out of (share "
                f"{shares[split]}); give a file for it, or set {split}_share higher"
            )
        found[split] = _rows_at(train, places)
        notes[split].append(
            f"carved {len(places)} of {len(train.texts)} documents out of train (split_seed {settings.split_seed})"
        )
    found["train"] = _rows_at(train, np.flatnonzero(split_of == 0))
    return {split: found[split] for split in SPLITS}


def _drawn(rows: Rows, shares: Mapping[str, float], seed: int) -> np.ndarray:
    """(N) int64: 0 for train, 1.. for the n-th split of `shares`.

    Within each class the texts with the smallest seeded hashes are drawn, so that shares are exact and a class keeps at
    least one training document. The hash is of the normalised start, so texts that repeat another fall together.
    """
    order = np.array([_hash(_start(text), f"split {seed}") for text in rows.texts], dtype=np.uint64)
    labels = np.zeros(len(order), dtype=np.int64)
    if rows.labels is not None:
        labels = np.unique(np.array([str(label) for label in rows.labels], dtype=object), return_inverse=True)[1]
    split_of = np.zeros(len(order), dtype=np.int64)
    largest = np.bincount(labels).argmax() if len(labels) else -1
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        members = members[np.argsort(order[members], kind="stable")]
        begin = 0
        for number, share in enumerate(shares.values(), 1):
            wanted = min(round(share * len(members)), _CARVED_AT_MOST * len(members) // len(order))
            end = _edge(order[members], begin, min(begin + max(wanted, int(label == largest)), len(members) - 1))
            split_of[members[begin:end]] = number
            begin = end
    return split_of


def _edge(hashes: np.ndarray, begin: int, end: int) -> int:
    """The end of a share that cuts no run of equal hashes in two: moved back, or on where nothing would be left."""
    back = end
    while begin < back and hashes[back] == hashes[back - 1]:
        back -= 1
    if back > begin or end == begin:
        return back
    while end < len(hashes) - 1 and hashes[end] == hashes[end - 1]:
        end += 1
    return end


def _hash(text: str, salt: str = "") -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8, key=salt.encode()).digest(), "big")


# ------------------------------------------------------------------------------------------------ classes, caps


def _numbered(splits: dict[str, Rows], settings: CorpusSettings, notes: dict[str, list[str]]) -> dict[str, Documents]:
    labels = {split: rows.labels for split, rows in splits.items() if rows.labels is not None}
    names: tuple[str, ...] = ()
    numbers: dict[str, np.ndarray | None] = dict.fromkeys(splits)
    if labels:
        known: dict[Value, str] = {}
        for split in ("test", "valid", "train"):  # train's names win
            known.update(splits[split].names)
        classes = agree_on_classes(labels, known, settings.label_names, settings.title)
        names = classes.names
        notes["train"].extend(classes.notes)
        numbers = {split: classes.number(values) for split, values in labels.items()}
    _note_repeats({split: rows.texts for split, rows in splits.items()}, numbers, notes)
    return {
        split: _capped(split, rows.texts, numbers[split], names, settings, notes[split])
        for split, rows in splits.items()
    }


def _capped(
    split: str,
    texts: Sequence[str],
    labels: np.ndarray | None,
    names: tuple[str, ...],
    settings: CorpusSettings,
    notes: list[str],
) -> Documents:
    most = settings.max_documents if split == "train" else settings.max_eval_documents
    if most is not None and len(texts) > most:
        chosen = np.sort(
            np.random.default_rng([settings.split_seed, SPLITS.index(split)]).permutation(len(texts))[:most]
        )
        notes.append(f"kept {most} of {len(texts)} documents, as the cap in the settings says")
        texts, labels = pick(texts, chosen), None if labels is None else labels[chosen]
    return Documents(texts, labels, names, tuple(notes))


# ---------------------------------------------------------------------------------------------------- repeats


def _note_repeats(
    texts: Mapping[str, Sequence[str]], labels: Mapping[str, np.ndarray | None], notes: dict[str, list[str]]
) -> None:
    """Notes documents of valid and test that train holds too, and documents that train holds more than once."""
    seen: dict[int, list[int]] = {}
    repeats = conflicts = 0
    train, train_labels = texts["train"], labels["train"]
    for place, text in enumerate(train):
        twins = seen.setdefault(_hash(_start(text)), [])
        if twins and (twin := _twin(text, train, twins)) is not None:
            repeats += 1
            conflicts += train_labels is not None and bool(train_labels[twin] != train_labels[place])
            continue
        twins.append(place)
    if repeats:
        conflict = f", {conflicts} of them with another label" if conflicts else ""
        notes["train"].append(
            f"{repeats} of {len(train)} documents repeat another one up to case, space and punctuation{conflict}"
        )
    for split in ("valid", "test"):
        shared = [
            (text, train[twin])
            for text in texts[split]
            if (twin := _twin(text, train, seen.get(_hash(_start(text)), ()))) is not None
        ]
        if shared:
            exact = sum(text == twin for text, twin in shared)
            notes[split].append(
                f"warning: {len(shared)} of {len(texts[split])} documents also stand in train up to case, space and "
                f"punctuation ({exact} of them exactly), so scores on {split} flatter"
            )


def _normal(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def _start(text: str) -> str:
    """The first 100 characters of the normalised text: what is compared before whole texts are."""
    short = _normal(text[:400])
    return short[:100] if len(short) > 100 else _normal(text)[:100]


def _twin(text: str, others: Sequence[str], places: Iterable[int]) -> int | None:
    candidates = list(places)
    if not candidates:
        return None
    normal = _normal(text)
    return next((place for place in candidates if _normal(others[place]) == normal), None)


def training_texts(settings: CorpusSettings, say: Say) -> Sequence[str]:
    """The texts a vocabulary is trained on."""
    return documents(settings, say)["train"].texts
