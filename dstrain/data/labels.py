"""What counts as a label, and how the labels of all splits become classes 0..K-1.

The rule: the labels of one column are of one kind, either whole numbers from 0 (`1.0` counts as 1), or true/false, or
words. A missing label, a negative one, a fraction and a stray value of another kind are mistakes, never classes. K is
the number of classes.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from dstrain.schema import UserError

Kind = Literal["number", "truth", "word"]
Value = int | str
_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?")
_STRAY_SHARE = 0.1  # more labels of another kind than this are not strays: the column itself is mixed


class Labels(NamedTuple):
    """One value per row (None where the row is bad) and what is wrong with the bad ones, by row number from 0."""

    values: list[Value | None]
    wrong: dict[int, str]


def read_labels(column: Sequence[object], source: str, column_name: str) -> Labels:
    """Whole numbers become int, words stay as they are spelled, true/false become the words "true" and "false".

    Raises UserError when the column as a whole makes no sense: kinds mixed, or nearly as many values as rows.
    """
    judged: dict[tuple[type, object], tuple[Kind | None, Value | str]] = {}
    rows = []
    for value in column:
        key = (type(value), value if isinstance(value, (str, int, float, type(None))) else repr(value))
        if key not in judged:
            judged[key] = _judge(value)
        rows.append(judged[key])
    kinds = Counter(kind for kind, _ in rows if kind)
    main = kinds.most_common(1)[0][0] if kinds else None
    _refuse_mixture(kinds, judged, source, column_name)
    wrong = {
        row: str(value) if kind is None else f"label {value!r} is not a {_SAYS[main]} as the others are"
        for row, (kind, value) in enumerate(rows)
        if kind is None or kind != main
    }
    values = [None if row in wrong else value for row, (_, value) in enumerate(rows)]
    _refuse_identifiers(values, source, column_name)
    return Labels(values, wrong)


_SAYS: dict[str | None, str] = {"number": "whole number", "truth": "true or false", "word": "word", None: "label"}


def _judge(value: object) -> tuple[Kind | None, Value | str]:
    """The kind and value of one label, or None and what is wrong with it."""
    if value is None or value == "" or (isinstance(value, str) and value.isspace()):
        return None, "the label is missing"
    if isinstance(value, (bool, np.bool_)):
        return "truth", str(bool(value)).lower()
    if isinstance(value, str):
        word = value.strip()
        if word.lower() in ("true", "false"):
            return "truth", word.lower()
        if not _NUMBER.fullmatch(word):
            return "word", value
        value = int(word) if word.lstrip("+-").isdecimal() else float(word)
    if isinstance(value, (int, np.integer)):
        return ("number", int(value)) if value >= 0 else (None, f"label {int(value)} is negative; classes count from 0")
    if isinstance(value, (float, np.floating)):
        if math.isnan(value):
            return None, "label NaN is a missing label"
        if not float(value).is_integer():
            return None, f"label {value} is a fraction; a class is a whole number or a word"
        return _judge(int(value))
    return None, f"the label is a {type(value).__name__}; a class is a whole number or a word"


def _refuse_mixture(
    kinds: Counter[Kind],
    judged: Mapping[tuple[type, object], tuple[Kind | None, Value | str]],
    source: str,
    column: str,
) -> None:
    strays = sum(kinds.values()) - max(kinds.values(), default=0)
    if strays > max(3, _STRAY_SHARE * sum(kinds.values())):
        seen = ", ".join(repr(raw) for (_, raw), (kind, _) in list(judged.items())[:8] if kind)
        raise UserError(
            f"{source}: column {column!r} mixes {' and '.join(sorted(_SAYS[kind] for kind in kinds))} labels ({seen}); "
            "write every label as a whole number from 0, or every label as a word"
        )


def _refuse_identifiers(values: Sequence[Value | None], source: str, column: str) -> None:
    """A column with a value of its own for most rows is not a class but a text or a row number."""
    present = [value for value in values if value is not None]
    distinct = len(set(present))
    if len(present) >= 20 and distinct > len(present) / 2:
        example = str(present[0])
        shown = example if len(example) <= 40 else example[:37] + "..."
        raise UserError(
            f"{source}: column {column!r} has {distinct} different values in {len(present)} rows (such as {shown!r}), "
            "which is no label; name the right column with label_column"
        )


# --------------------------------------------------------------------------------------- classes of all splits


class Classes(NamedTuple):
    """The classes of a corpus: their values in order, the names shown for them, and what there is to say about them."""

    order: tuple[Value, ...]
    names: tuple[str, ...]
    notes: tuple[str, ...]

    def number(self, values: Iterable[Value]) -> np.ndarray:
        """(N) int64 class numbers 0..K-1."""
        place = {value: index for index, value in enumerate(self.order)}
        return np.array([place[value] for value in values], dtype=np.int64)


def agree_on_classes(
    splits: Mapping[str, Sequence[Value]], known: Mapping[Value, str], wanted: Sequence[str] | None, source: str
) -> Classes:
    """Classes are the sorted labels of the training split; the other splits may only repeat them.

    `known` names classes (a `label_name` column, a hub's feature), `wanted` is the `label_names` setting. Raises
    UserError for numbers in one split and words in another, one class spelled in several ways, and a class that is
    never trained on.
    """
    train = set(splits["train"])
    everything = set().union(*splits.values())
    if len({type(value) for value in everything}) > 1:
        raise UserError(f"{source}: labels are numbers in one split and words in another; write them alike")
    _refuse_spellings(everything, source)
    order = tuple(sorted(train, key=lambda value: (isinstance(value, str), value)))
    for split, values in splits.items():
        strangers = Counter(value for value in values if value not in train)
        if strangers:
            shown = ", ".join(
                f"{value!r} ({count} documents)" for value, count in sorted(strangers.items(), key=str)[:5]
            )
            raise UserError(
                f"{source}: {split} has labels that train has not: {shown}; a class without training text cannot be "
                "learnt: add such documents to train or take them out"
            )
    return Classes(order, _names(order, known, wanted, source), tuple(_class_notes(order, splits["train"])))


def _refuse_spellings(values: Iterable[Value], source: str) -> None:
    folded: dict[str, list[str]] = {}
    for value in sorted(str(value) for value in values):
        folded.setdefault(" ".join(value.split()).casefold(), []).append(value)
    twins = [spellings for spellings in folded.values() if len(spellings) > 1]
    if twins:
        listed = "; ".join(", ".join(map(repr, spellings)) for spellings in twins[:5])
        raise UserError(f"{source}: one class is spelled in several ways: {listed}; write each class in one way")


def _names(
    order: Sequence[Value], known: Mapping[Value, str], wanted: Sequence[str] | None, source: str
) -> tuple[str, ...]:
    if wanted is None:
        return tuple(known.get(value, str(value)) for value in order)
    if len(wanted) != len(order):
        shown = ", ".join(map(str, order[:10]))
        raise UserError(
            f"{source}: label_names gives {len(wanted)} names for {len(order)} classes ({shown}); give one name each"
        )
    return tuple(wanted)


def _class_notes(order: Sequence[Value], train: Sequence[Value]) -> Iterable[str]:
    if len(order) == 1:
        yield f"warning: train has the single class {order[0]!r}, so there is nothing to tell apart"
    elif isinstance(order[0], int) and order != tuple(range(len(order))):
        listed = ", ".join(map(str, order[:12]))
        yield f"labels {listed} are numbered 0 to {len(order) - 1}; their names keep the old numbers"
    rarest, count = min(Counter(train).items(), key=lambda item: (item[1], str(item[0])))
    if len(order) > 1 and count < 0.02 * len(train):
        yield f"warning: class {rarest!r} has {count} of {len(train)} training documents"
