"""Every broken or odd file of ../shared/data/nasty loads right, or one sentence says what is wrong and a way out."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from dstrain.data.corpora import CorpusSettings, documents
from dstrain.data.files import TableSettings, csv_records, read_table
from dstrain.schema import UserError

DATA = Path(os.environ.get("DSTRAIN_DATA") or Path(__file__).parents[3] / "shared" / "data")
NASTY = DATA / "nasty"
pytestmark = pytest.mark.skipif(
    not (NASTY / "MANIFEST.json").is_file(), reason="no nasty/MANIFEST.json in DSTRAIN_DATA or ../shared/data"
)

# file: (rows, number of distinct labels) as read with default settings
LOADS = {
    "utf16_bom.csv": (20, 2),
    "utf8_bom.csv": (20, 2),
    "empty_text.csv": (40, 2),
    "null_text.parquet": (20, 2),
    "string_labels.csv": (100, 2),
    "label_offset_1_to_5.csv": (80, 5),
    "label_gaps.csv": (60, 3),
    "single_class.csv": (80, 1),
    "imbalance_199_to_1.csv": (200, 2),
    "one_row.csv": (1, 1),
    "huge_doc_5mb.parquet": (10, 2),
    "csv_field_over_131072.csv": (5, 2),
    "one_token_1mb.jsonl": (1, 1),
    "mixed_lengths.parquet": (30, 2),
    "multiscript_emoji_rtl.jsonl": (212, 2),
    "duplicates.csv": (105, 2),
    "leak_train.parquet": (200, 2),
    "leak_test.parquet": (90, 2),
    "dictionary_and_index_cols.parquet": (40, 2),
    "semicolon.csv": (20, 2),
    "tab_named.csv": (20, 2),
    "mixed_newlines.csv": (30, 2),
    "naïve file (1) été.csv": (10, 2),
    "string_labels_messy.csv": (100, 8),  # refused when classes are made of them, see below
}
# file: (rows left with bad_rows: skip, or None where nothing may be skipped; what the sentence must hold)
REFUSED = {
    "broken_quotes.csv": (
        55,
        [
            "5 of 60 rows",
            "line 9: a stray quote",
            "line 21: 7 fields where the header has 2",
            "line 33",
            "line 45",
            "line 52: 1 field",
        ],
    ),
    "cp1252_bytes.csv": (18, ["byte 0xe9 at offset 16", "encoding: cp1252", "line 2", "line 3"]),
    "mixed_bad_bytes.csv": (18, ["2 of 20 rows", "byte 0xff at offset 1348", "line 7", "line 13"]),
    "null_labels.parquet": (27, ["3 of 30 rows", "row 4: the label is missing", "row 5", "row 18"]),
    "null_labels.csv": (27, ["line 4: the label is missing", "line 11", "line 14: label 'NA' is not a whole number"]),
    "label_negative.csv": (53, ["7 of 60 rows", "line 2: label -1 is negative", "line 7: label -100 is negative"]),
    "broken_line.jsonl": (
        24,
        [
            "6 of 30 rows",
            "line 7: is not JSON",
            "line 12",
            "line 16: there is no key 'text', only 'body'",
            "line 21: is a JSON list",
            "line 28: label NaN",
        ],
    ),
    "label_float_bool.csv": (None, ["mixes true or false and whole number labels", "'1e0'"]),
    "header_only.csv": (None, ["has no rows"]),
    "zero_bytes.csv": (None, ["is empty (0 bytes)"]),
    "zero_bytes.jsonl": (None, ["is empty (0 bytes)"]),
    "wrong_columns.parquet": (None, ["there is no column 'text', only 'review', 'sentiment'", "text_column"]),
    "wrong_types.parquet": (None, ["column 'text' holds binary, not text", "text_column"]),
    "text_is_list.parquet": (None, ["column 'text' holds list<element: string>, not text"]),
    "truncated.parquet": (None, ["is cut short", "copy or write it again"]),
    "corrupt_page.parquet": (None, ["the parquet file is damaged", "copy or write it again"]),
    "csv_named.parquet": (None, ["is not a parquet file", "b'text'", ".csv"]),
    "gzip_named.csv": (None, ["is gzip-compressed", "gunzip"]),
    "array_not_lines.jsonl": (None, ["is one JSON array, not JSON Lines", "one object per line"]),
    "no_header.csv": (None, ["line 1: there is no column 'text'", "'Too small, too", "put a header line at the top"]),
    "dup_header_index.csv": (None, ["column 'label' stands there 2 times (columns 3 and 4)", "rename"]),
}


def test_every_file_of_the_manifest_has_an_expected_outcome():
    listed = json.loads((NASTY / "MANIFEST.json").read_text(encoding="utf-8"))
    names = {name.strip() for entry in listed for part in entry["file"].split(" + ") for name in part.split(" / ")}
    assert names - {"csv_spectrum/*.csv"} == set(LOADS) | set(REFUSED)


@pytest.mark.parametrize("name", LOADS)
def test_loads_every_row(name):
    rows = read_table(NASTY / name, TableSettings())
    assert rows.labels is not None
    assert (len(rows.texts), len(set(rows.labels))) == LOADS[name]
    assert len(rows.labels) == len(rows.texts)
    assert all(isinstance(text, str) for text in rows.texts)


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_in_one_sentence_with_the_place_and_a_way_out(name):
    left, words = REFUSED[name]
    with pytest.raises(UserError) as caught:
        read_table(NASTY / name, TableSettings())
    sentence = str(caught.value)
    assert sentence.startswith(f"{NASTY / name}: ")
    assert "\n" not in sentence
    for word in words:
        assert word in sentence, sentence
    skipping = TableSettings(bad_rows="skip")
    if left is None:
        with pytest.raises(UserError):
            read_table(NASTY / name, skipping)
    else:
        rows = read_table(NASTY / name, skipping)
        assert rows.labels is not None
        assert len(rows.texts) == len(rows.labels) == left
        assert any("left out" in note and name in note for note in rows.notes)
        assert set(rows.labels) == {0, 1}


def test_cp1252_loads_with_its_encoding():
    rows = read_table(NASTY / "cp1252_bytes.csv", TableSettings(encoding="cp1252"))
    assert len(rows.texts) == 20
    assert "é" in rows.texts[0] and "\ufffd" not in "".join(rows.texts)


def test_wrong_columns_load_when_named():
    rows = read_table(NASTY / "wrong_columns.parquet", TableSettings(text_column="review", label_column="sentiment"))
    assert len(rows.texts) == 20


def test_words_that_pandas_takes_for_missing_stay_text():
    texts = read_table(NASTY / "empty_text.csv", TableSettings()).texts
    assert {"nan", "NaN", "null", "None", "NA"} <= set(texts)


def test_mixed_newlines_keep_newlines_inside_quotes():
    texts = read_table(NASTY / "mixed_newlines.csv", TableSettings()).texts
    assert sum("\n" in text or "\r" in text for text in texts) > 0
    assert all(text.strip() for text in texts)


@pytest.mark.parametrize(("name", "delimiter"), [("semicolon.csv", ";"), ("tab_named.csv", "\t")])
def test_an_unusual_delimiter_is_found_and_said(name, delimiter):
    assert any(f"delimiter {delimiter!r}" in note for note in read_table(NASTY / name, TableSettings()).notes)


def _corpus(name: str, **settings):
    return documents(CorpusSettings(path=NASTY / name, **settings), lambda line: None)


def test_messy_spellings_of_a_class_are_refused():
    with pytest.raises(UserError, match=r"spelled in several ways: ' NEG ', 'neg'; 'Negative', 'negative'"):
        _corpus("string_labels_messy.csv")


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("string_labels.csv", ("neg", "pos")),
        ("label_gaps.csv", ("0", "2", "7")),
        ("label_offset_1_to_5.csv", ("1", "2", "3", "4", "5")),
    ],
)
def test_labels_become_classes_from_zero_with_their_names(name, names):
    splits = _corpus(name)
    for part in splits.values():
        assert part.label_names == names
        assert set(part.labels.tolist()) <= set(range(len(names)))
    assert set(splits["train"].labels.tolist()) == set(range(len(names)))


@pytest.mark.parametrize(("name", "dropped"), [("empty_text.csv", 5), ("null_text.parquet", 3)])
def test_blank_documents_are_counted_and_dropped(name, dropped):
    splits = _corpus(name)
    assert f"left out {dropped} of" in " ".join(splits["train"].notes)
    assert all(text.strip() for part in splits.values() for text in part.texts)


def test_single_class_and_imbalance_are_said():
    assert "single class" in " ".join(_corpus("single_class.csv")["train"].notes)
    splits = _corpus("imbalance_199_to_1.csv")
    assert "class 0 has 1 of" in " ".join(splits["train"].notes)
    assert np.bincount(splits["train"].labels)[0] == 1  # the one member stays where it can be learnt from


def test_one_row_is_too_few_to_split():
    with pytest.raises(UserError, match="too few to carve valid"):
        _corpus("one_row.csv")


def test_leaks_between_train_and_test_are_counted(tmp_path):
    shutil.copy(NASTY / "leak_train.parquet", tmp_path / "train.parquet")
    shutil.copy(NASTY / "leak_test.parquet", tmp_path / "test.parquet")
    splits = documents(CorpusSettings(path=tmp_path, valid_share=0.01), lambda line: None)
    note = " ".join(splits["test"].notes)
    shared = set(splits["train"].texts) & set(splits["test"].texts)
    assert f"({len(shared)} of them exactly)" in note
    assert 17 <= len(shared) <= 20  # 20 less those that went to valid


def test_duplicates_and_conflicts_are_counted():
    note = " ".join(_corpus("duplicates.csv")["train"].notes)
    assert "repeat another one" in note and "with another label" in note


@pytest.mark.parametrize("path", sorted((NASTY / "csv_spectrum").glob("*.csv")), ids=lambda path: path.name)
def test_csv_spectrum_reads_as_the_standard_module_does(path):
    import csv
    import io

    text = path.read_bytes().decode()
    expected = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row]
    assert [record for _, record in csv_records(text, ",")] == expected
