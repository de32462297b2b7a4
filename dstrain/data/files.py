"""Strict readers of parquet, CSV and JSON Lines: a row is read exactly as it was written, or it is reported.

No reader guesses a value: "nan" and "NA" are text, a row with a stray quote is a bad row and never swallows its
neighbours, and undecodable bytes are not replaced. Bad rows stop the run unless `bad_rows: skip` was asked for.
"""

from __future__ import annotations

import codecs
import json
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import numpy as np
from pydantic import field_validator

from dstrain.data.labels import Value, read_labels
from dstrain.schema import Settings, UserError, did_you_mean, setting

FORMATS = (".parquet", ".csv", ".tsv", ".jsonl")
_LISTED = 5  # bad rows named in an error or a note; the others are counted


class TableSettings(Settings):
    """How the files of a corpus are read."""

    text_column: str = setting("text", min_length=1)
    """The column (parquet, CSV) or key (JSON Lines) that holds the document."""
    label_column: str = setting("label", min_length=1)
    """The column or key that holds the class: whole numbers, true/false, or words. Not read when `labelled: false`."""
    label_name_column: str | None = None
    """A column with a readable name of each class; default: `label_name` where a file has it."""
    label_names: tuple[str, ...] | None = None
    """Names of the classes in the order of their sorted labels, in place of what the files say."""
    delimiter: str | None = setting(None, min_length=1, max_length=1)
    """What separates the fields of a CSV file; default: the one of , ; tab | with which the header has "
    "`text_column`."""
    quoting: bool = True
    """false: a quote in a CSV file is a plain character (as in many tab-separated files)."""
    encoding: str = "utf-8"
    """Encoding of CSV and JSON Lines files, such as cp1252; a byte order mark is recognised by itself."""
    bad_rows: Literal["error", "skip"] = "error"
    """error: a row that cannot be used stops the run and is named; skip: it is left out, counted and noted."""

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, name: str) -> str:
        try:
            "a".encode(name).decode(name)  # which base64, a codec too, cannot
        except (LookupError, ValueError):
            raise ValueError(
                f"{name!r} is not an encoding Python knows; common ones are utf-8, cp1252, latin-1"
            ) from None
        return name


class ArrowTexts(Sequence[str]):
    """The texts of an Arrow column, made into Python strings only when asked for; null is the empty text."""

    def __init__(self, column: Any, rows: np.ndarray | None = None) -> None:
        self._column = column
        self._rows = rows
        self._starts = np.cumsum([0, *(len(chunk) for chunk in column.chunks)]).tolist()

    def __len__(self) -> int:
        return len(self._column) if self._rows is None else len(self._rows)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        row = range(len(self))[index] if self._rows is None else int(self._rows[index])
        chunk = bisect_right(self._starts, row) - 1
        return self._column.chunk(chunk)[row - self._starts[chunk]].as_py() or ""

    def pick(self, rows: np.ndarray) -> ArrowTexts:
        """The texts at these places, without copying any."""
        return ArrowTexts(self._column, rows if self._rows is None else self._rows[rows])


def pick(texts: Sequence[str], rows: np.ndarray) -> Sequence[str]:
    """The texts at `rows` (int64 places), in that order."""
    return texts.pick(rows) if isinstance(texts, ArrowTexts) else [texts[row] for row in rows.tolist()]


@dataclass(frozen=True)
class Rows:
    """The usable rows of one file."""

    texts: Sequence[str]
    labels: list[Value] | None
    """Whole numbers or words as they stand in the file, one per text; None where there is no label column."""
    names: dict[Value, str] = field(default_factory=dict)
    """Readable names of labels, where the file has them."""
    notes: tuple[str, ...] = ()


class _Bad(NamedTuple):
    line: int
    reason: str


@dataclass
class _Raw:
    """What a format's reader found: columns of good rows with the line each stands on, and the rows it could not "
    "read."""

    unit: str
    texts: Sequence[str]
    labels: list[object] | None
    names: list[object] | None
    lines: Sequence[int]
    bad: list[_Bad] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    bytes_wrong: str = ""


def read_table(path: Path, settings: TableSettings, labelled: bool = True) -> Rows:
    """The texts (and labels when `labelled`) of a .parquet, .csv, .tsv or .jsonl file.

    Labels are None when the file has no column of the default name; a column named in the settings must exist. Raises
    UserError: one sentence with the file, the line or row, the value and a way out.
    """
    readers = {".parquet": _read_parquet, ".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_jsonl}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(
            f"{path}: {path.suffix or 'no extension'} is not a format dstrain reads; give one of {', '.join(FORMATS)}"
        )
    try:
        if not path.stat().st_size:
            raise UserError(f"{path}: the file is empty (0 bytes); write it again")
        raw = reader(path, settings, labelled)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error}); check the path and its permissions"
        ) from None
    return _usable(path, raw, settings)


def _usable(path: Path, raw: _Raw, settings: TableSettings) -> Rows:
    """The good rows; the bad ones are refused or, when asked, left out and noted."""
    bad = {row: _Bad(raw.lines[row], reason) for row, reason in _unwritable(raw)}
    values: list[Value | None] | None = None
    if raw.labels is not None:
        labels = read_labels(raw.labels, str(path), settings.label_column)
        values = labels.values
        for row, reason in labels.wrong.items():
            bad.setdefault(row, _Bad(raw.lines[row], reason))
    wrong = sorted([*raw.bad, *bad.values()])
    total = len(raw.texts) + len(raw.bad)
    if not total:
        raise UserError(f"{path}: has no rows; write at least one document into it")
    notes = [f"{path.name}: {note}" for note in raw.notes]
    if wrong:
        notes.append(_refuse_or_note(path, raw, wrong, total, settings))
    good = np.array([row for row in range(len(raw.texts)) if row not in bad], dtype=np.int64)
    texts = pick(raw.texts, good) if bad else raw.texts
    if values is None:
        return Rows(texts, None, notes=tuple(notes))
    kept = [value for row in good.tolist() if (value := values[row]) is not None]
    assert len(kept) == len(texts)  # a row without a value is a bad row
    names = {} if raw.names is None else _names_of(path, kept, raw.names, good)
    return Rows(texts, kept, names, tuple(notes))


def _refuse_or_note(path: Path, raw: _Raw, wrong: list[_Bad], total: int, settings: TableSettings) -> str:
    listed = "; ".join(f"{raw.unit} {row.line}: {row.reason}" for row in wrong[:_LISTED])
    more = f"; and {len(wrong) - _LISTED} more" if len(wrong) > _LISTED else ""
    count = f"{len(wrong)} of {total} rows"
    if settings.bad_rows == "error":
        raise UserError(
            f"{path}: {count} cannot be used{raw.bytes_wrong}: {listed}{more}; mend them, or leave them out with "
            "bad_rows: skip"
        )
    if 2 * len(wrong) > total:
        raise UserError(
            f"{path}: {count} cannot be used{raw.bytes_wrong}, too many to skip: {listed}{more}; look at the file "
            "and at the "
            "settings that say how it is read"
        )
    return f"{path.name}: left out {count}{raw.bytes_wrong}: {listed}{more}"


def _unwritable(raw: _Raw) -> Iterator[tuple[int, str]]:
    """Rows whose text has code points that no UTF-8 can carry: undecodable bytes, or half of a surrogate pair."""
    if isinstance(raw.texts, ArrowTexts):  # the parquet reader has validated them
        return
    for row, text in enumerate(raw.texts):
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                code = ord(text[error.start])
                what = (
                    f"byte 0x{code - 0xDC00:02x}"
                    if 0xDC80 <= code <= 0xDCFF
                    else f"half a surrogate pair (U+{code:04X})"
                )
                yield row, f"the text holds {what}, which is no character"


def _names_of(path: Path, labels: Sequence[Value], column: Sequence[object], rows: np.ndarray) -> dict[Value, str]:
    names: dict[Value, str] = {}
    for label, row in zip(labels, rows.tolist(), strict=True):
        name = column[row]
        if name is not None and names.setdefault(label, str(name)) != str(name):
            raise UserError(
                f"{path}: label {label!r} is named both {names[label]!r} and {name!r}; give each label one name, or "
                "name "
                "another column with label_name_column"
            )
    return names


# ------------------------------------------------------------------------------------------------- columns


class _Columns(NamedTuple):
    """The places of the wanted columns in a header."""

    text: int
    label: int | None
    name: int | None
    note: str | None


def _find_columns(path: Path, header: Sequence[str], settings: TableSettings, labelled: bool) -> _Columns:
    """Where the wanted columns stand. Raises UserError for one that is missing or stands there twice."""
    text = _find(path, header, settings.text_column, "text_column")
    if not labelled:
        return _Columns(text, None, None, None)
    asked = "label_column" in settings.model_fields_set
    if settings.label_column not in header and not asked:
        return _Columns(
            text, None, None, f"no column {settings.label_column!r} among {_listed(header)}, so there are no labels"
        )
    label = _find(path, header, settings.label_column, "label_column")
    wanted = settings.label_name_column or ("label_name" if "label_name" in header else None)
    return _Columns(text, label, None if wanted is None else _find(path, header, wanted, "label_name_column"), None)


def _find(path: Path, header: Sequence[str], name: str, key: str) -> int:
    places = [place for place, column in enumerate(header) if column == name]
    if len(places) > 1:
        numbers = " and ".join(str(place + 1) for place in places)
        raise UserError(
            f"{path}: column {name!r} stands there {len(places)} times (columns {numbers}); rename all but one"
        )
    if not places:
        raise UserError(
            f"{path}: there is no column {name!r}, only {_listed(header)}{_guess(name, header)}; name the right one "
            f"with {key}"
        )
    return places[0]


def _guess(name: str, header: Sequence[str]) -> str:
    near = did_you_mean(name, header)
    return near.rstrip("?") if near.startswith("; did you mean") else ""


def _listed(header: Sequence[str]) -> str:
    shown = [repr(column if len(column) <= 30 else column[:27] + "...") for column in header[:12]]
    return ", ".join(shown) + (f" and {len(header) - 12} more" if len(header) > 12 else "")


# ------------------------------------------------------------------------------------------------- parquet


def _read_parquet(path: Path, settings: TableSettings, labelled: bool) -> _Raw:
    import pyarrow as pa
    import pyarrow.parquet as pq

    _refuse_foreign_parquet(path)
    try:
        # Checksums and full validation: a flipped byte must be an error, not garbage text.
        file = pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)
        columns = _find_columns(path, file.schema_arrow.names, settings, labelled)
        places = [place for place in columns[:3] if place is not None]
        # Each wanted column alone: a file may repeat the names of columns that nobody asked for.
        read = {
            place: file.read(columns=[file.schema_arrow.names[place]], use_pandas_metadata=False).column(0)
            for place in places
        }
        texts = read[columns.text]
        _expect_text(path, texts.type, settings.text_column)
        texts = texts.cast(pa.large_string()) if not pa.types.is_large_string(texts.type) else texts
        texts.validate(full=True)
        labels = None if columns.label is None else _plain_values(path, read[columns.label], settings.label_column)
        names = None if columns.name is None else read[columns.name].to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        told = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"{path}: the parquet file is damaged ({told}); copy or write it again") from None
    notes = [columns.note] if columns.note else []
    return _Raw("row", ArrowTexts(texts), labels, names, range(1, len(texts) + 1), notes=notes)


def _refuse_foreign_parquet(path: Path) -> None:
    with path.open("rb") as stream:
        head = stream.read(4)
        stream.seek(max(0, path.stat().st_size - 4))
        tail = stream.read(4)
    if head != b"PAR1":
        raise UserError(
            f"{path}: is not a parquet file (it starts with {head!r}); give it the extension of what it is, such as "
            ".csv"
        )
    if tail != b"PAR1":
        raise UserError(f"{path}: is cut short: a parquet file's end is missing; copy or write it again")


def _expect_text(path: Path, kind: Any, column: str) -> None:
    import pyarrow as pa

    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(inner) or pa.types.is_large_string(inner) or pa.types.is_string_view(inner)):
        raise UserError(
            f"{path}: column {column!r} holds {kind}, not text; write it as strings, or name another column with "
            "text_column"
        )


def _plain_values(path: Path, column: Any, name: str) -> list[object]:
    import pyarrow as pa

    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_null(kind):
        raise UserError(f"{path}: column {name!r} has no value in any row; fill it in, or set labelled: false")
    simple = (
        pa.types.is_integer,
        pa.types.is_floating,
        pa.types.is_boolean,
        pa.types.is_string,
        pa.types.is_large_string,
    )
    if not any(test(kind) for test in simple):
        raise UserError(
            f"{path}: column {name!r} holds {column.type}, which is no label; write whole numbers or words, or name "
            "another "
            "column with label_column"
        )
    return column.to_pylist()


# ---------------------------------------------------------------------------------------------------- text


def _read_text(path: Path, settings: TableSettings) -> tuple[str, str]:
    """The text of a file, undecodable bytes as lone surrogates, and a clause about the first of them (or "")."""
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        raise UserError(f"{path}: is gzip-compressed; unpack it first (gunzip), or name it for what it is")
    if data[:4] == b"PAR1":
        raise UserError(f"{path}: is a parquet file; give it the extension .parquet")
    encoding = _encoding(data, settings.encoding)
    try:
        return data.decode(encoding), ""
    except UnicodeDecodeError as error:
        first = f"byte 0x{data[error.start]:02x} at offset {error.start} is not {encoding.removesuffix('-sig')}"
        hint = ": if the file was written by Windows, set encoding: cp1252" if encoding.startswith("utf-8") else ""
        if not encoding.startswith(("utf-16", "utf-32")):
            with suppress(UnicodeError):  # idna and its like have no place for a byte that is not theirs
                return data.decode(encoding, "surrogateescape"), f" ({first}{hint})"
    except UnicodeError as error:
        first = f"is not {encoding} ({error})"
    raise UserError(f"{path}: {first}; set the encoding the file was written in, such as encoding: cp1252")


def _encoding(data: bytes, wanted: str) -> str:
    if codecs.lookup(wanted).name == "utf-8":
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return "utf-16"
        return "utf-8-sig" if data.startswith(codecs.BOM_UTF8) else "utf-8"
    return wanted


# ----------------------------------------------------------------------------------------------------- CSV

_MISQUOTED = "a stray quote (inside quotes it is doubled; quoting: false makes it plain text)"


def csv_records(text: str, delimiter: str, quoting: bool = True) -> Iterator[tuple[int, list[str] | None]]:
    """Each record of a CSV text (RFC 4180; LF, CRLF or CR) with the line it starts on; None for one that is misquoted.

    After a misquoted record reading goes on at the next line, so that one stray quote costs one record.
    """
    stop = re.escape(delimiter)
    plain = rf'[^{stop}"\r\n]*' if quoting else rf"[^{stop}\r\n]*"
    quoted = r'"([^"]*(?:""[^"]*)*)"' if quoting else r"(?!)()"
    matcher = re.compile(rf"(?:{quoted}|({plain}))({stop}|\r\n|\n|\r|\Z)")
    position, line = 0, 1
    while position < len(text):
        start, fields, ending = position, [], delimiter
        found = None
        while ending == delimiter:
            found = matcher.match(text, position)
            if found is None:
                break
            inside, outside, ending = found.groups()
            fields.append(outside if inside is None else inside.replace('""', '"'))
            position = found.end()
        if found is None:
            position = _after_line(text, position)
            yield line, None
        elif fields != [""] or text[start] == '"':  # a blank line is no record; a quoted nothing is one
            yield line, fields
        line += (
            text.count("\n", start, position) + text.count("\r", start, position) - text.count("\r\n", start, position)
        )


_LINE_END = re.compile(r"\r\n|\n|\r|\Z")


def _after_line(text: str, position: int) -> int:
    found = _LINE_END.search(text, position)
    assert found is not None  # \Z always matches
    return found.end()


def _read_csv(path: Path, settings: TableSettings, labelled: bool) -> _Raw:
    text, bytes_wrong = _read_text(path, settings)
    delimiter = settings.delimiter or _detect_delimiter(path, text, settings)
    records = csv_records(text, delimiter, settings.quoting)
    _, header = next(records, (1, None))
    if header is None:
        raise UserError(f"{path}: line 1: the header cannot be read: {_MISQUOTED}")
    columns = _csv_columns(path, header, settings, labelled)
    texts: list[str] = []
    labels: list[object] = []
    names: list[object] = []
    lines: list[int] = []
    bad: list[_Bad] = []
    for line, record in records:
        if record is None:
            bad.append(_Bad(line, _MISQUOTED))
            continue
        if len(record) != len(header):
            bad.append(
                _Bad(
                    line,
                    f"{len(record)} {'field' if len(record) == 1 else 'fields'} where the header has {len(header)}",
                )
            )
            continue
        texts.append(record[columns.text])
        lines.append(line)
        if columns.label is not None:
            labels.append(record[columns.label])
        if columns.name is not None:
            names.append(record[columns.name] or None)
    notes = [columns.note] if columns.note else []
    if settings.delimiter is None and delimiter not in (",", _usual_delimiter(path)):
        notes.append(f"read with delimiter {delimiter!r}")
    return _Raw(
        "line",
        texts,
        None if columns.label is None else labels,
        None if columns.name is None else names,
        lines,
        bad,
        notes,
        bytes_wrong,
    )


def _csv_columns(path: Path, header: Sequence[str], settings: TableSettings, labelled: bool) -> _Columns:
    if settings.text_column not in header:
        raise UserError(
            f"{path}: line 1: there is no column {settings.text_column!r}, only "
            f"{_listed(header)}{_guess(settings.text_column, header)}; "
            "name the right one with text_column, set delimiter, or put a header line at the top if there is none"
        )
    return _find_columns(path, header, settings, labelled)


def _usual_delimiter(path: Path) -> str:
    return "\t" if path.suffix.lower() == ".tsv" else ","


def _detect_delimiter(path: Path, text: str, settings: TableSettings) -> str:
    """The usual one of the extension, unless only another one makes `text_column` a column of the header."""
    usual = _usual_delimiter(path)
    for delimiter in dict.fromkeys([usual, ",", ";", "\t", "|"]):
        _, header = next(csv_records(text, delimiter, settings.quoting), (1, None))
        if header and settings.text_column in header:
            return delimiter
    return usual


# -------------------------------------------------------------------------------------------------- JSON Lines


def _read_jsonl(path: Path, settings: TableSettings, labelled: bool) -> _Raw:
    text, bytes_wrong = _read_text(path, settings)
    if text.lstrip()[:1] == "[":
        raise UserError(f"{path}: is one JSON array, not JSON Lines; write one object per line (jq -c '.[]' does that)")
    records, bad = _json_records(text)
    if not records:
        first = f" (line {bad[0].line}: {bad[0].reason})" if bad else ""
        raise UserError(f"{path}: has no usable row{first}; write one JSON object per line")
    keys = list(dict.fromkeys(key for _, record in records for key in record))
    columns = _find_columns(path, keys, settings, labelled)
    name = None if columns.name is None else keys[columns.name]
    raw = _Raw(
        "line",
        texts := [],
        labels := [],
        names := [],
        lines := [],
        bad,
        [columns.note] if columns.note else [],
        bytes_wrong,
    )
    for line, record in records:
        document = record.get(settings.text_column)
        if document is not None and not isinstance(document, str):
            bad.append(_Bad(line, f"{settings.text_column!r} is a {type(document).__name__}, not text"))
        elif settings.text_column not in record:
            bad.append(_Bad(line, f"there is no key {settings.text_column!r}, only {_listed(list(record))}"))
        else:
            texts.append(document or "")
            lines.append(line)
            labels.append(record.get(settings.label_column))
            names.append(None if name is None else record.get(name))
    raw.labels = None if columns.label is None else labels
    raw.names = None if name is None else names
    return raw


def _json_records(text: str) -> tuple[list[tuple[int, dict[str, Any]]], list[_Bad]]:
    records: list[tuple[int, dict[str, Any]]] = []
    bad: list[_Bad] = []
    # Not splitlines: U+2028 and its kin are legal inside a JSON string.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            bad.append(_Bad(number, f"is not JSON{column} ({reason.lower()})"))
            continue
        if isinstance(record, dict):
            records.append((number, record))
        else:
            bad.append(_Bad(number, f"is a JSON {type(record).__name__}, not an object"))
    return records, bad
