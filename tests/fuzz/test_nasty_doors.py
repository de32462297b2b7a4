"""All of ../shared/data/nasty through both doors: accepted, or one and the same sentence, status 2, and no folder left."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import SHARED_DATA

from benchmarks.fuzz import ask, grounds
from benchmarks.fuzz_cases import RUN_FILE, Case, _dumped, small_search

NASTY = SHARED_DATA / "nasty"
FILES = sorted(path for path in NASTY.rglob("*") if path.is_file() and path.name != "MANIFEST.json")
ACCEPTED = {
    "utf16_bom.csv", "utf8_bom.csv", "empty_text.csv", "null_text.parquet", "string_labels.csv",
    "label_offset_1_to_5.csv", "label_gaps.csv", "single_class.csv", "csv_field_over_131072.csv",
    "imbalance_199_to_1.csv", "huge_doc_5mb.parquet", "mixed_lengths.parquet", "multiscript_emoji_rtl.jsonl",
    "duplicates.csv", "leak_train.parquet", "leak_test.parquet", "dictionary_and_index_cols.parquet", "semicolon.csv",
    "tab_named.csv", "mixed_newlines.csv", "naïve file (1) été.csv",
}  # fmt: skip
"""Files of which a classifier can be trained as they are, splits carved out of them."""

pytestmark = pytest.mark.skipif(not FILES, reason="no nasty/ in DSTRAIN_DATA or ../shared/data")


@pytest.fixture(scope="module", autouse=True)
def _grounds() -> Iterator[None]:
    with grounds():
        yield


@pytest.mark.parametrize(
    "file",
    [pytest.param(file, marks=pytest.mark.slow) if file.name == "huge_doc_5mb.parquet" else file for file in FILES],
    ids=lambda file: file.name,
)
def test_both_doors_give_the_same_answer(file: Path, tmp_path: Path) -> None:
    tree = small_search()
    for stage in tree["base"]["stages"].values():
        stage["corpus"] = {"path": str(file)}
    (tmp_path / RUN_FILE).write_bytes(_dumped(tree))
    train = ask(Case("data", "train", (), {}, 1), tmp_path, "--dry-run")
    planned = ask(Case("data", "tune", (), {}, 1), tmp_path, "--dry-run")  # reads text only where rungs depend on it
    assert not train.broken and not planned.broken and "Traceback" not in train.err + planned.err
    assert planned.status == 0 or (planned.status, planned.err) == (train.status, train.err)
    if file.name in ACCEPTED:
        assert (train.status, train.err) == (0, "")
    else:
        assert train.status == 2 and str(file) in train.err and train.err.count("\n") == 1, train
        for door in ("train", "tune"):
            started = ask(Case("data", door, (), {}, 1), tmp_path)
            assert (started.status, started.err, started.broken) == (2, train.err, ""), (door, started)
    assert [path.name for path in tmp_path.iterdir()] == [RUN_FILE]
