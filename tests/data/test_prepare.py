"""`python -m dstrain.data prepare`: what it makes ready, what it says, and that the run then builds nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny_run

from dstrain.data import __main__ as door
from dstrain.run import run_vocabulary, stage_corpus
from dstrain.schema import dump_yaml
from dstrain.settings import load_run

ROOT = Path(__file__).resolve().parents[2]

Answer = tuple[int, list[str], list[str]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for each test."""
    monkeypatch.setenv("DSTRAIN_CACHE", str(tmp_path / "the cache"))
    monkeypatch.delenv("DSTRAIN_DATA", raising=False)
    return tmp_path / "the cache"


@pytest.fixture
def write(tmp_path: Path, small_corpus: Path) -> Callable[..., Path]:
    """Writes tiny_run with changes, and further parts of the file, as f.yaml."""

    def write(parts: dict[str, Any] | None = None, **changes: Any) -> Path:
        file = tmp_path / "f.yaml"
        base = tiny_run(small_corpus, tmp_path / "runs", **changes)
        file.write_text(dump_yaml({"base": base, **(parts or {})}), encoding="utf-8")
        return file

    return write


@pytest.fixture
def prepare(capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Runs the door in this process: exit status, lines of standard output, lines of standard error."""

    def prepare(*argv: object) -> Answer:
        status = door.main(["prepare", *map(str, argv)])
        shown = capsys.readouterr()
        return status, shown.out.splitlines(), shown.err.splitlines()

    return prepare


def tokenised(lines: list[str]) -> int:
    return sum("tokenising" in line for line in lines)


def test_a_run_finds_all_it_needs_and_a_second_time_there_is_nothing_to_do(
    write: Any, prepare: Any, cache: Path, small_corpus: Path, tmp_path: Path
) -> None:
    file = write(stages__finetune__max_length=32)
    status, lines, errors = prepare(file)
    assert (status, errors) == (0, [])
    assert sum("training up to 300 WordPieces" in line for line in lines) == 1 and tokenised(lines) == 2
    assert [line.partition(":")[0] for line in lines if "sequences of at most" in line] == [f"corpus {small_corpus}"] * 2
    assert any("train 60, valid 30, test 30 sequences of at most 32 tokens" in line for line in lines)
    assert "ready" in lines and not (tmp_path / "runs").exists()
    said: list[str] = []
    settings = load_run(file)
    for stage in settings.stages.values():
        stage_corpus(stage, run_vocabulary(settings, said.append), said.append)
    assert said == [], "the run builds nothing"
    files = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.suffix != ".lock"}
    status, lines, _ = prepare(file)
    assert status == 0 and "everything was there already" in lines and "ready" not in lines and tokenised(lines) == 0
    assert files == {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.suffix != ".lock"}


def test_it_says_what_the_nodes_must_be_told(
    write: Any, prepare: Any, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write()
    _, lines, _ = prepare(file)
    exports = [line.strip() for line in lines if line.startswith("  export")]
    assert exports == [f"export DSTRAIN_CACHE='{cache}'", "export HF_HUB_OFFLINE=1", "export HF_DATASETS_OFFLINE=1"]
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("DSTRAIN_DATA", str(tmp_path / "data"))
    _, lines, _ = prepare(file)
    assert f"  export DSTRAIN_DATA={tmp_path / 'data'}" in lines
    told = subprocess.run(["sh", "-c", f"{lines[-4].strip()}; echo $DSTRAIN_CACHE"], capture_output=True, text=True)
    assert told.stdout.strip() == str(cache), "a shell takes the lines as they are"


def test_every_trial_of_a_search_finds_its_text(write: Any, prepare: Any) -> None:
    parts = {
        "space": {"vocabulary.size": [200, 300], "stages.pretrain.corpus.max_documents": [20, 30], "seed": [1, 2]},
        "search": {"metric": "finetune/valid/f1_macro"},
    }
    status, lines, _ = prepare(write(parts))
    assert status == 0
    assert sum("WordPieces" in line for line in lines) == 4, "the first stage's text makes the vocabulary"
    described = [line for line in lines if "sequences of at most" in line]
    assert len(described) == 8, "two stages of four kinds of trials, whatever the seed"
    assert sum("train 20," in line for line in described) == sum("train 30," in line for line in described) == 2
    assert "everything was there already" in prepare(write(parts))[1]


def test_the_command_line_wins_and_is_told(write: Any, prepare: Any) -> None:
    _, lines, _ = prepare(write(), "stages.pretrain=null", "stages.finetune.max_length=16")
    assert "stages.finetune.max_length = 16 (command line)" in lines
    (described,) = [line for line in lines if "sequences of at most" in line]
    assert "at most 16 tokens" in described


@pytest.mark.parametrize(
    ("words", "length", "hint"), [((), 16, True), (("--gpu",), 24, False), (("--full-size",), 64, False)]
)
def test_the_text_is_that_of_the_nodes_which_need_not_be_like_this_machine(
    write: Any, prepare: Any, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], length: int, hint: bool
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # a login node
    when = {name: {"stages.finetune.max_length": size} for name, size in {"no_gpu": 16, "gpu": 24}.items()}
    status, lines, _ = prepare(write({"when": when}, precision="fp16"), "stages.pretrain=null", *words)
    assert status == 0, "fp16 is for the nodes to judge"
    assert any(f"at most {length} tokens" in line for line in lines)
    assert any("add --gpu" in line for line in lines) == hint


def test_mistakes_come_together_in_a_sentence_each_and_what_can_be_made_is_made(
    write: Any, prepare: Any, tmp_path: Path
) -> None:
    missing = {"path": str(tmp_path / "nowhere")}
    unlabelled = {"objective": {"kind": "classify"}, "corpus": {"path": missing["path"]}, "max_length": 64, "steps": 1}
    file = write(stages__tapt={**unlabelled, "objective": {"kind": "mlm"}}, stages__again=unlabelled)
    status, lines, errors = prepare(file)
    assert status == 2 and tokenised(lines) == 2, "pretrain's and finetune's"
    assert errors == [
        f"corpus {missing['path']}: there is no such file or folder; give a folder with train and test files, or one file"
    ]
    assert "ready" not in lines and not any("export" in line for line in lines)


def test_text_without_labels_is_refused_where_labels_are_needed(write: Any, prepare: Any) -> None:
    status, _, (error,) = prepare(write(stages__finetune__corpus__labelled=False))
    assert status == 2 and "has no labels to classify by" in error


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["nowhere.yaml"], "nowhere.yaml"),
        (["FILE", "encoder.num_layer=3"], "encoder.num_layer: no such setting; did you mean num_layers?"),
        (["FILE", "search.metric=f1"], "search.metric: 'f1' is not stage/split/name"),
    ],
)
def test_a_mistake_in_the_file_is_one_sentence(write: Any, prepare: Any, argv: list[str], said: str) -> None:
    file = str(write())
    status, lines, (error,) = prepare(*(file if word == "FILE" else word for word in argv))
    assert status == 2 and said in error and "the text lies in" not in " ".join(lines)


def test_ctrl_c_says_how_to_go_on(write: Any, prepare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dstrain.run.stage_corpus", interrupted)
    assert prepare(write())[::2] == (75, ["interrupted; the same command goes on"])


@pytest.mark.slow
def test_as_a_command_it_answers(write: Any, cache: Path) -> None:
    def command(*words: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run(
            [sys.executable, "-m", "dstrain.data", *words], cwd=ROOT, env=environment, capture_output=True, text=True
        )

    done = command("prepare", str(write()))
    assert done.returncode == 0 and "ready" in done.stdout.splitlines() and done.stderr == ""
    assert list(cache.glob("tokens/*/meta.json"))
    assert command("prepare", "nowhere.yaml").returncode == 2
    assert "Traceback" not in command("prepare", "nowhere.yaml").stderr
    assert command("prepair", "f.yaml").returncode == 2 and "prepare" in command("--help").stdout


def test_show_prints_documents_by_number(
    write: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """As a run's messages count them: a document's windows end to end, with its label."""
    file = write()
    assert door.main(["show", str(file), "finetune", "0", "3"]) == 0
    out = capsys.readouterr().out
    settings = load_run(file)
    split = stage_corpus(settings.stages["finetune"], run_vocabulary(settings, print), print).splits["train"]
    rows = np.flatnonzero(split.document == 3)
    assert "document 0 of " in out and "document 3 of " in out
    assert f"({split.lengths[rows].sum()} tokens in {len(rows)} sequence(s), " in out
    assert out.count("[CLS]") >= 2
    for words, said in (
        (["fine", "0"], "no stage 'fine'; did you mean finetune?"),
        ([], "show "),
        (["finetune", "100000"], "document 100000: finetune has the training documents 0 to "),
    ):
        assert door.main(["show", str(file), *words]) == 2
        assert said in capsys.readouterr().err
