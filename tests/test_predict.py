"""predict: the run's own answers in the order of the lines, and a sentence for every input that has none."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_run, train_here

from dstrain.consolidate import find
from dstrain.data.files import TableSettings, read_table
from dstrain.engine import join_ranks
from dstrain.export import judge_documents, load_model
from dstrain.export import main as export_main
from dstrain.predict import answers, latencies, latency_table, main, read_documents
from dstrain.settings import RunSettings


@dataclass(frozen=True)
class Exports:
    """A run and what was exported of it."""

    settings: RunSettings
    classifier: Path
    masked: Path
    windows: Path


@pytest.fixture(scope="module")
def exports(small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exports]:
    """A classifier that cuts, one that reads windows, and a model of masked words."""
    before = dict(os.environ)
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    ranks = join_ranks()
    changes: dict[str, Any] = {"stages__finetune__steps": 24, "stages__finetune__evaluate_every_steps": 8}
    told = train_here(tiny_run(small_corpus, folder, **changes), ranks)
    changes |= {"stages__pretrain": None, "stages__finetune__max_length": 24, "name": "windows"}
    changes |= {"stages__finetune__corpus__long_documents": "window", "stages__finetune__corpus__window_overlap": 4}
    windows = train_here(tiny_run(small_corpus, folder, **changes), ranks)
    for run, name, words in (
        (told, "classifier", []), (told, "masked", ["--stage", "pretrain"]), (windows, "read-in-windows", [])
    ):  # fmt: skip
        assert export_main([str(run.settings.folder), str(folder / name), *words]) == 0
    yield Exports(windows.settings, folder / "classifier", folder / "masked", folder / "read-in-windows")
    os.environ.clear()
    os.environ.update(before)


@dataclass(frozen=True)
class Said:
    """What a command line came to."""

    status: int
    lines: list[str]
    aside: str


class Asking:
    """Calls the door."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys, self._monkeypatch = capsys, monkeypatch

    def __call__(self, *words: object, stdin: str | bytes = "") -> Said:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        self._monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
        self._capsys.readouterr()
        status = main([str(word) for word in words])
        out, err = self._capsys.readouterr()
        return Said(status, out.splitlines(), err)

    def refused(self, *words: object, stdin: str | bytes = "") -> str:
        """The one sentence of a refusal, with status 2 and no answers before it."""
        said = self(*words, stdin=stdin)
        assert (said.status, said.lines, said.aside.count("\n")) == (2, [], 1), said
        return said.aside.rstrip()


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Asking:
    return Asking(capsys, monkeypatch)


@pytest.fixture(scope="module")
def texts(small_corpus: Path) -> list[str]:
    """The test documents, each on one line."""
    return [" ".join(text.split()) for text in read_table(small_corpus / "test.csv", TableSettings()).texts]


# ------------------------------------------------------------------------------------------------------ answers


def test_each_line_gets_its_own_answer_in_the_order_of_the_input(
    exports: Exports, ask: Asking, texts: list[str]
) -> None:
    said = ask(exports.classifier, "-", "--json", stdin="\n".join(texts) + "\n")
    assert said.status == 0 and len(said.lines) == len(texts)
    model = load_model(exports.classifier)
    for number, (text, line) in enumerate(zip(texts, said.lines, strict=True), 1):
        alone = torch.softmax(model.logits(model.cut(model.ids(text)))[0], dim=-1)
        told = json.loads(line)
        assert told["line"] == number and list(told) == ["line", "tokens", "cut", "label", "probabilities"]
        assert told["label"] == model.config.label_names[int(alone.argmax())]
        shares = [told["probabilities"][name] for name in model.config.label_names]
        assert shares == pytest.approx(alone.tolist(), abs=1e-5) and sum(shares) == pytest.approx(1)
    assert len({json.loads(line)["probabilities"]["net"] for line in said.lines}) > 20, "the documents differ"


def test_plain_lines_hold_the_answer_its_probability_and_the_others(
    exports: Exports, ask: Asking, texts: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "texts"
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(texts[:3]).encode())
    plain, told = ask(exports.classifier, file), ask(exports.classifier, file, "--json")
    for line, record in zip(plain.lines, map(json.loads, told.lines), strict=True):
        label, share, others = line.split("\t")
        assert label == record["label"] and float(share) == pytest.approx(
            max(record["probabilities"].values()), abs=1e-4
        )
        assert others == "  ".join(
            f"{name} {value:.4f}" for name, value in record["probabilities"].items() if name != label
        )
    assert ask(exports.classifier, file, "--top", "1").lines[0].endswith("\t")


def test_tables_are_read_as_a_corpus_is(exports: Exports, ask: Asking, texts: list[str], tmp_path: Path) -> None:
    with (tmp_path / "t.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("id", "review"), *enumerate(texts)])
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "t.txt").write_text("\n".join(texts))
    plain = ask(exports.classifier, tmp_path / "t.txt").lines
    assert ask(exports.classifier, tmp_path / "t.csv", "--text-column", "review").lines == plain
    assert ask(exports.classifier, tmp_path / "t.jsonl").lines == plain
    assert "there is no column 'text', only 'id', 'review'" in ask.refused(exports.classifier, tmp_path / "t.csv")


def test_a_long_line_is_cut_and_said(exports: Exports, ask: Asking) -> None:
    model = load_model(exports.classifier)
    start = "the name of a header and its value are read " * 5
    assert len(model.ids(start)) > 64
    said = ask(exports.classifier, "-", "--json", stdin=f"short\n{start}\n{start} and an end that nobody reads\n")
    first, second, third = map(json.loads, said.lines)
    assert second["probabilities"] == third["probabilities"]
    assert [(told["tokens"], told["cut"]) for told in (second, third)] == [(64, True)] * 2 and not first["cut"]
    assert said.aside == "2 lines (2, 3) of 3 longer than 64 tokens: only the start was read\n"


def test_windows_vote_as_they_do_in_the_runs_figures(exports: Exports, ask: Asking, small_corpus: Path) -> None:
    model = load_model(exports.windows)
    judged = judge_documents(model.task, find(exports.settings.folder, None, "best"), model.vocabulary)
    texts = read_table(small_corpus / "test.csv", TableSettings()).texts
    mine = answers(model, [model.ids(text) for text in texts], 300)
    assert [int(found.argmax()) for found in mine] == judged.guess_D.tolist()
    assert all(float(found.exp().sum()) == pytest.approx(1) for found in mine)
    said = ask(exports.windows, "-", "--json", stdin="a long line of many words that are read in windows " * 9)
    assert said.aside == "" and json.loads(said.lines[0])["cut"] is False


def test_masked_words_are_found(exports: Exports, ask: Asking) -> None:
    said = ask(exports.masked, "-", stdin="return the [MASK] of [MASK] object\na [MASK]\n")
    assert said.status == 0 and [line.count("\t") for line in said.lines] == [5, 2]
    told = [
        json.loads(line)
        for line in ask(exports.masked, "-", "--json", "--top", "3", stdin="the [MASK]\na [MASK] [MASK]").lines
    ]
    assert [len(each["masks"]) for each in told] == [1, 2]
    model = load_model(exports.masked)
    logits = model.logits([model.ids("a [MASK] [MASK]")])
    words = [model.vocabulary.decode([place]) for place in logits[1].topk(3).indices.tolist()]
    assert [word for word, _ in told[1]["masks"][1]] == words
    long = "word " * 100
    assert "has no [MASK]; this model finds masked words and does not" in ask.refused(exports.masked, "-", stdin="a\n")
    assert "line 2: a [MASK] stands beyond the 64 tokens" in ask.refused(
        exports.masked, "-", stdin=f"[MASK]\n{long} [MASK]"
    )
    assert ask(exports.masked, "-", stdin=f"[MASK] {long}").aside.endswith("only the start was read\n")


def test_a_mask_in_a_text_to_classify_is_text(exports: Exports) -> None:
    model = load_model(exports.classifier)
    assert model.vocabulary.mask not in model.ids("the [MASK] is text")


# ----------------------------------------------------------------------------------------------------- bad input


def test_lines_without_text_are_refused_or_skipped_and_said(exports: Exports, ask: Asking) -> None:
    hollow = "one\n\ntwo\n \t\n\u200b\n"
    assert ask.refused(exports.classifier, "-", stdin=hollow) == (
        "3 lines (2, 4, 5) of 5 without text: there is nothing to classify; take such lines out, or give --skip-empty"
    )
    said = ask(exports.classifier, "-", "--json", "--skip-empty", stdin=hollow)
    assert [json.loads(line)["line"] for line in said.lines] == [1, 3]
    assert said.aside == "3 lines (2, 4, 5) of 5 without text, skipped\n"
    assert "nothing is left" in ask.refused(exports.classifier, "-", "--skip-empty", stdin=" \n")
    assert ask.refused(exports.classifier, stdin="") == "standard input: is empty; write one document per line"


def test_bad_input_is_told_in_a_sentence(exports: Exports, ask: Asking, tmp_path: Path) -> None:
    assert "line 2: byte 0xe9 is not UTF-8" in ask.refused(exports.classifier, "-", stdin=b"one\ncaf\xe9\n")
    assert "cannot be read (No such file or directory)" in ask.refused(exports.classifier, tmp_path / "no.txt")
    assert "cannot be read (Is a directory)" in ask.refused(exports.classifier, tmp_path)
    assert "config.json: cannot be read" in ask.refused(tmp_path, "-", stdin="one")
    assert "fp16 needs a GPU" in ask.refused(
        exports.classifier, "-", "--device", "cpu", "--precision", "fp16", stdin="a"
    )
    if not torch.cuda.is_available():
        assert "--device cuda: this machine shows no GPU" in ask.refused(exports.classifier, "--device", "cuda")
    with pytest.raises(SystemExit) as left:
        main([str(exports.classifier), "--top", "0"])
    assert left.value.code == 2


def test_a_line_may_hold_any_character(exports: Exports, ask: Asking) -> None:
    odd = "one \u2028 two \x0b three\x85 \0 \U0001f600 \x1c four"
    assert len(ask(exports.classifier, "-", stdin=f"{odd}\n{odd}\n").lines) == 2
    assert [document.text for document in read_documents("-", "text", io.BytesIO(odd.encode()))] == [odd]


def test_a_reader_who_has_seen_enough_is_no_error(exports: Exports) -> None:
    command = f"yes some text | head -4000 | {sys.executable} -m dstrain.predict {exports.classifier} | head -1"
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.count("\n") == 1 and done.stderr == ""


# ------------------------------------------------------------------------------------------------------- latency


def test_latency_is_measured_by_length(exports: Exports, ask: Asking) -> None:
    model = load_model(exports.classifier)
    documents = read_documents(
        "-", "text", io.BytesIO(b"one two\nthree four\n" + b"word " * 40 + b"\n" + b"word " * 99)
    )
    found = list(latencies(model, documents))
    assert [(each.longest, each.documents) for each in found] == [(32, 2), (64, 2)]
    for each in found:
        assert len(each.seconds) == 20 and 0 < each.percentile(50) <= each.percentile(95)
    table = latency_table(found, model).splitlines()
    assert len(table) == 4 and table[0].endswith("(cpu, 1 threads, torch.float32)") and "p95 ms" in table[1]
    said = ask(exports.classifier, "-", "--latency", stdin="one\n")
    assert len(said.lines) == 1 and "p50 ms" in said.aside, "answers and timings do not mix"


def test_percentiles_are_of_the_measurements() -> None:
    from dstrain.predict import Latency

    measured = Latency(32, 1, tuple(np.arange(1, 102) / 1000))
    assert (measured.percentile(50), measured.percentile(95)) == pytest.approx((51.0, 96.0))
