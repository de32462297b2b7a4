from __future__ import annotations

import csv
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.data.files import ArrowTexts, TableSettings, csv_records, pick, read_table
from dstrain.data.labels import agree_on_classes, read_labels
from dstrain.schema import UserError, validate

CELLS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@given(
    st.lists(st.lists(CELLS, min_size=2, max_size=2), min_size=1),
    st.sampled_from([",", ";", "\t"]),
    st.sampled_from(["\n", "\r\n", "\r"]),
)
def test_csv_reads_back_whatever_the_standard_module_writes(rows, delimiter, ending):
    stream = io.StringIO(newline="")
    csv.writer(stream, delimiter=delimiter, lineterminator=ending, quoting=csv.QUOTE_ALL).writerows(rows)
    assert [record for _, record in csv_records(stream.getvalue(), delimiter)] == rows


@given(st.lists(st.text(st.sampled_from('ab"\n'), max_size=6), min_size=1))
def test_csv_names_the_line_each_record_starts_on(texts):
    stream = io.StringIO(newline="")
    csv.writer(stream, lineterminator="\n", quoting=csv.QUOTE_ALL).writerows([[text] for text in texts])
    line = 1
    for text, (found, record) in zip(texts, csv_records(stream.getvalue(), ","), strict=True):
        assert (found, record) == (line, [text])
        line += 1 + text.count("\n")


@pytest.mark.parametrize("broken", ['"open,1', '"junk"x,1', '"5" long, "quoted"",1', 'bare " quote,1'])
def test_csv_loses_only_the_misquoted_record(broken):
    text = f'"one",1\n{broken}\n"two",2\nthree,3\n'
    records = list(csv_records(text, ","))
    assert records == [(1, ["one", "1"]), (2, None), (3, ["two", "2"]), (4, ["three", "3"])]


def test_csv_without_quoting_takes_quotes_as_text():
    assert [record for _, record in csv_records('say "hi"\t1\n"x\t2', "\t", quoting=False)] == [
        ['say "hi"', "1"],
        ['"x', "2"],
    ]


def test_csv_last_field_may_be_empty():
    assert list(csv_records("a,\nb,", ",")) == [(1, ["a", ""]), (2, ["b", ""])]


def _write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def _error(path, **settings):
    with pytest.raises(UserError) as caught:
        read_table(path, TableSettings(**settings))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_jsonl_lines_end_only_at_newlines(tmp_path):
    texts = ["a\u2028b", "c\x85d", "e\x1cf"]
    path = _write(
        tmp_path / "x.jsonl",
        "".join(json.dumps({"text": text, "label": 0}, ensure_ascii=False) + "\n" for text in texts),
    )
    assert list(read_table(path, TableSettings()).texts) == texts


def test_half_a_surrogate_pair_is_a_bad_row(tmp_path):
    lines = ['{"text": "fine", "label": 0}', '{"text": "half \\ud83d", "label": 1}', '{"text": "fine too", "label": 1}']
    path = _write(tmp_path / "x.jsonl", "\n".join(lines))
    assert "line 2: the text holds half a surrogate pair (U+D83D)" in _error(path)
    assert len(read_table(path, TableSettings(bad_rows="skip")).texts) == 2


def test_text_must_be_text_in_json(tmp_path):
    path = _write(
        tmp_path / "x.jsonl", '{"text": 3, "label": 0}\n{"text": null, "label": 0}\n{"text": "a", "label": 0}\n'
    )
    assert "line 1: 'text' is a int, not text" in _error(path)
    assert list(read_table(path, TableSettings(bad_rows="skip")).texts) == [
        "",
        "a",
    ]  # null is blank; blanks are dropped later


def test_nothing_usable_in_jsonl(tmp_path):
    assert "has no usable row (line 1: is not JSON" in _error(_write(tmp_path / "x.jsonl", "text,label\na,0\n"))


def test_most_rows_bad_is_a_wrong_setting_and_never_skipped(tmp_path):
    path = _write(tmp_path / "x.csv", "text,label\na\nb\nc\nd,1\n")
    assert "3 of 4 rows cannot be used, too many to skip" in _error(path, bad_rows="skip")


def test_bad_header_and_missing_file_and_format(tmp_path):
    assert "line 1: the header cannot be read" in _error(
        _write(tmp_path / "x.csv", '"text,label\na,1\n'), delimiter=","
    )
    assert "No such file" in _error(tmp_path / "none.csv")
    assert ".xlsx is not a format dstrain reads" in _error(_write(tmp_path / "x.xlsx", "a"))
    assert "is a parquet file; give it the extension .parquet" in _error(_write(tmp_path / "x.csv", "PAR1..."))
    assert "; did you mean Text; name" in _error(_write(tmp_path / "y.csv", "Text,label\na,1\n"))


def test_wide_encodings_and_bad_encoding_names(tmp_path):
    path = _write(tmp_path / "x.csv", "text,label\nnaïve,1\n", "utf-16")
    assert list(read_table(path, TableSettings()).texts) == ["naïve"]
    path.write_bytes(path.read_bytes()[:-1])
    assert "offset" in _error(path)
    with pytest.raises(UserError, match="not an encoding"):
        validate(TableSettings, {"encoding": "klingon"}, "x.yaml")


def test_label_columns_named_absent_and_not_wanted(tmp_path):
    path = _write(tmp_path / "x.csv", "text,sentiment\na,1\nb,0\n")
    rows = read_table(path, TableSettings())
    assert rows.labels is None and "no column 'label' among 'text', 'sentiment'" in rows.notes[0]
    assert read_table(path, TableSettings(label_column="sentiment")).labels == [1, 0]
    assert "there is no column 'lable'" in _error(path, label_column="lable")
    assert read_table(path, TableSettings(label_column="sentiment"), labelled=False).labels is None


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_label_names_come_along(tmp_path, suffix):
    rows = [("a", 0, "no"), ("b", 1, "yes"), ("c", 1, "yes")]
    path = tmp_path / f"x{suffix}"
    if suffix == ".csv":
        _write(path, "text,label,label_name\n" + "".join(f"{t},{l},{n}\n" for t, l, n in rows))
    elif suffix == ".jsonl":
        _write(path, "".join(json.dumps({"text": t, "label": l, "label_name": n}) + "\n" for t, l, n in rows))
    else:
        pq.write_table(
            pa.table({"text": [r[0] for r in rows], "label": [r[1] for r in rows], "label_name": [r[2] for r in rows]}),
            path,
        )
    assert read_table(path, TableSettings()).names == {0: "no", 1: "yes"}


def test_a_label_with_two_names_is_refused(tmp_path):
    assert "named both 'x' and 'y'" in _error(_write(tmp_path / "x.csv", "text,label,label_name\na,0,x\nb,0,y\n"))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array([1.0, 0.0, 1.0]), [1, 0, 1]),
        (pa.array([True, False, True]), ["true", "false", "true"]),
        (pa.array(["b", "a", "b"]).dictionary_encode(), ["b", "a", "b"]),
        (pa.array([3, 0, 3], pa.uint8()), [3, 0, 3]),
    ],
)
def test_parquet_label_types(tmp_path, values, expected):
    pq.write_table(pa.table({"text": ["x", "y", "z"], "label": values}), tmp_path / "x.parquet")
    assert read_table(tmp_path / "x.parquet", TableSettings()).labels == expected


def test_parquet_label_types_that_are_no_labels(tmp_path):
    pq.write_table(pa.table({"text": ["x"], "label": [[1]]}), tmp_path / "x.parquet")
    assert "which is no label" in _error(tmp_path / "x.parquet")
    pq.write_table(pa.table({"text": ["x"], "label": pa.nulls(1)}), tmp_path / "y.parquet")
    assert "has no value in any row" in _error(tmp_path / "y.parquet")
    pq.write_table(pa.table({"text": ["x", "y"], "label": [0.5, 1.0]}), tmp_path / "z.parquet")
    assert "row 1: label 0.5 is a fraction" in _error(tmp_path / "z.parquet")


def test_a_text_column_is_no_label_column():
    with pytest.raises(UserError, match="30 different values in 30 rows"):
        read_labels([f"sentence {n}" for n in range(30)], "x.csv", "label")
    assert read_labels([[1], "a", "a"], "x", "label").wrong == {
        0: "the label is a list; a class is a whole number or a word"
    }


@given(st.lists(st.one_of(st.none(), CELLS), min_size=1), st.data())
def test_arrow_texts_are_the_list_they_came_from(texts, data):
    cut = data.draw(st.integers(0, len(texts)))
    column = pa.chunked_array([pa.array(texts[:cut], pa.large_string()), pa.array(texts[cut:], pa.large_string())])
    plain = [text or "" for text in texts]
    lazy = ArrowTexts(column)
    assert list(lazy) == plain and lazy[-1] == plain[-1] and list(lazy[::2]) == plain[::2]
    places = np.array(data.draw(st.lists(st.integers(0, len(texts) - 1))), dtype=np.int64)
    again = np.arange(len(places))[::-1]
    assert list(pick(pick(lazy, places), again)) == pick(pick(plain, places), again)
    with pytest.raises(IndexError):
        lazy[len(texts)]


def test_classes_of_all_splits():
    classes = agree_on_classes({"train": [7, 2, 7], "test": [2]}, {2: "two"}, None, "c")
    assert classes.order == (2, 7) and classes.names == ("two", "7")
    assert classes.number([7, 2]).tolist() == [1, 0]
    assert agree_on_classes({"train": [0, 1]}, {}, ("no", "yes"), "c").names == ("no", "yes")
    with pytest.raises(UserError, match="3 names for 2 classes"):
        agree_on_classes({"train": [0, 1]}, {}, ("a", "b", "c"), "c")
    with pytest.raises(UserError, match=r"test has labels that train has not: 5 \(2 documents\)"):
        agree_on_classes({"train": [0, 1], "test": [5, 5]}, {}, None, "c")
    with pytest.raises(UserError, match="numbers in one split and words in another"):
        agree_on_classes({"train": [0, 1], "test": ["a"]}, {}, None, "c")
