"""Text that changes under a run which has begun: noticed, named, refused, and gone on with only when that is said."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import tiny_run, train_here

from dstrain.engine import Ranks
from dstrain.loop import Interrupted
from dstrain.readings import read_readings
from dstrain.run import Watch, run
from dstrain.schema import UserError, validate
from dstrain.settings import RunSettings
from dstrain.texts import SplitRecord, TextRecord, keep_or_refuse


def record(fingerprint: str, documents: int = 5) -> TextRecord:
    return TextRecord(
        title="corpus here", fingerprint=fingerprint, splits={"train": SplitRecord(documents=documents, tokens=50)}
    )


def test_a_changed_text_is_refused_with_fingerprints_amounts_and_ways_out() -> None:
    before = {"mlm": record("a1"), "tapt": record("b1"), "classify": record("c1")}
    now = {"mlm": record("a2"), "tapt": record("b2", 6), "classify": record("c1")}
    with pytest.raises(UserError) as refused:
        keep_or_refuse(before, now, {"tapt", "classify"}, (), print)
    assert str(refused.value) == (
        "stages.tapt: the text of corpus here has changed since it was last read: fingerprint b1 -> b2 "
        "(train 5 -> 6 documents, 50 -> 50 tokens); restore it, go on with the changed text by "
        "--accept-changed-data, or start over with --resume never"
    )
    with pytest.raises(UserError, match=r"stages.mlm: .* \(as many documents and tokens, but other ones\)"):
        keep_or_refuse(before, now, {"mlm"}, (), print)


def test_what_a_finished_stage_was_trained_on_stays_on_record() -> None:
    said: list[str] = []
    before, now = {"mlm": record("a1"), "tapt": record("b1")}, {"mlm": record("a2"), "tapt": record("b2")}
    kept = keep_or_refuse(before, now, {"tapt"}, now, said.append)
    assert kept["mlm"] == before["mlm"]
    assert kept["tapt"].fingerprint == "b2" and "fingerprint b1 -> b2" in kept["tapt"].notes[-1]
    assert said == [f"tapt: {kept['tapt'].notes[-1]}"]
    assert keep_or_refuse(kept, now, {"tapt"}, (), said.append) == kept, "told once, and not asked again"


def at_step(number: int) -> Callable[[], bool]:
    """Asks to stop before the so-many-th step."""
    calls = iter(range(1, 1000))
    return lambda: next(calls) == number


def append_row(file: Path, text: str) -> None:
    with file.open("a", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerow([text, "text"])


def test_a_run_notices_that_its_text_has_changed(small_corpus: Path, tmp_path: Path, ranks: Ranks) -> None:
    """Stopped in its second stage; then a document is added: refused, nothing lost; restored: goes on; or accepted."""
    corpus = shutil.copytree(small_corpus, tmp_path / "corpus")
    tree = tiny_run(corpus, tmp_path, vocabulary__size=300)
    with pytest.raises(Interrupted):
        train_here(tree, ranks, at_step(6 + 5))  # of the second stage the fifth
    folder = tmp_path / "tiny"
    before = {str(path): path.stat().st_mtime_ns for path in (folder / "stages").rglob("*")}
    record_before = json.loads((folder / "data.json").read_text())
    vocabulary = (folder / "vocabulary/tokenizer.json").read_bytes()

    append_row(corpus / "train.csv", "one document more about sockets and strings")
    with pytest.raises(UserError) as refused:
        train_here(tree, ranks)
    [sentence] = str(refused.value).splitlines()
    assert sentence.startswith(f"stages.finetune: the text of corpus {corpus} has changed since it was last read: ")
    assert "train 60 -> 61 documents" in sentence and record_before["finetune"]["fingerprint"] in sentence
    assert {str(path): path.stat().st_mtime_ns for path in (folder / "stages").rglob("*")} == before
    assert json.loads((folder / "data.json").read_text()) == record_before

    settings = validate(RunSettings, tree, "test")
    sentences: list[str] = []
    outcome = run(settings, ranks, Watch(lambda reading: None, sentences.append, lambda tags: None), True)
    assert outcome.stopped == {"pretrain": "finished", "finetune": "finished"}
    assert any(said.startswith("finetune: the text of") for said in sentences)
    after = json.loads((folder / "data.json").read_text())
    assert after["pretrain"] == record_before["pretrain"], "what the finished stage was trained on"
    assert after["finetune"]["splits"]["train"]["documents"] == 61 and "61 documents" in after["finetune"]["notes"][-1]
    assert (folder / "vocabulary/tokenizer.json").read_bytes() == vocabulary, "the text it was trained on has changed"


def test_a_restored_text_goes_on_as_if_nothing_had_been(small_corpus: Path, tmp_path: Path, ranks: Ranks) -> None:
    """The same bytes with another time of change are the same text."""
    corpus = shutil.copytree(small_corpus, tmp_path / "corpus")
    tree = tiny_run(corpus, tmp_path)
    with pytest.raises(Interrupted):
        train_here(tree, ranks, at_step(5))
    train = corpus / "train.csv"
    whole = train.read_bytes()
    append_row(train, "one more")
    with pytest.raises(UserError, match="has changed since"):
        train_here(tree, ranks)
    train.write_bytes(whole)
    assert train_here(tree, ranks).outcome is not None
    readings = [reading for reading in read_readings(tmp_path / "tiny") if reading.split == "train"]
    steps = [reading.step for reading in readings if reading.stage == "pretrain"]
    assert steps == sorted(set(steps)) and steps[-1] == 6


def test_before_a_stage_has_left_anything_text_may_be_put_right(small_corpus: Path, tmp_path: Path, ranks: Ranks) -> None:
    corpus = shutil.copytree(small_corpus, tmp_path / "corpus")
    tree = tiny_run(corpus, tmp_path, stages__finetune=None)

    def killed() -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_here(tree, ranks, killed)
    assert (tmp_path / "tiny/data.json").exists()
    append_row(corpus / "train.csv", "one more about strings")
    assert train_here(tree, ranks).outcome is not None
