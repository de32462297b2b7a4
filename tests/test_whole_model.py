"""The whole-model benchmark: both sides are the same BERT on the same texts, and the command runs on a tiny one."""

from __future__ import annotations

import importlib.util
import json
import mmap
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.whole_model import main, make_rows
from benchmarks.whole_model_sides import (
    Job,
    Memory,
    Step,
    documents_of_steps,
    encoder_settings,
    hf_model,
    objective_settings,
)
from dstrain.data.cache import cache_home, open_corpus, open_vocabulary
from dstrain.data.corpora import CorpusSettings
from dstrain.data.vocabulary import VocabularySettings
from dstrain.model.encoder import Encoder
from dstrain.objective import Task
from dstrain.packed import Batch, Sequences

hugging_face = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None or importlib.util.find_spec("accelerate") is None,
    reason="transformers and accelerate are not installed",
)
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def data(small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small corpus under the three names."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("wiki", "imdb", "longsci"):
        shutil.copytree(small_corpus, folder / name)
    return folder


def job(task: str = "mlm", length: int = 32, **changes: Any) -> Job:
    given: dict[str, Any] = {
        "side": "dstrain", "task": task, "kind": "sdpa", "length": length, "dtype": "fp32", "preset": "bert_tiny",
        "corpus": CorpusSettings(), "data": "", "vocabulary": Path(), "deepspeed": ROOT / "ds_configs" / "zero0.json",
        "documents_per_step": 4, "steps": 5, "threads": 1, "grouped": False,
    }  # fmt: skip
    return Job(**given | changes)


def step(tokens: int, seconds: float, peak: int, computed: int = 100) -> Step:
    return Step(tokens, computed, seconds, 2 * seconds, peak)


# ------------------------------------------------------------------------------------------------- the same work


def test_steps_read_other_documents_each_and_long_ones_come_first() -> None:
    lengths = np.arange(3, 1000)
    short = documents_of_steps(job(length=512), lengths)
    assert len(short) == 5 and all(len(documents) == 4 for documents in short)
    assert len(np.unique(np.concatenate(short))) == 20
    assert np.ptp(lengths[np.concatenate(short)]) > 500  # a mixture of lengths, as random sampling gives
    long = np.concatenate(documents_of_steps(job(length=513), lengths))
    assert lengths[long].tolist() == sorted(lengths, reverse=True)[:20]


def test_a_small_corpus_is_read_again() -> None:
    read = np.concatenate(documents_of_steps(job(), np.full(7, 10)))
    assert np.bincount(read, minlength=7).min() >= 2


def test_grouped_steps_hold_documents_of_like_length() -> None:
    lengths = np.random.default_rng(1).integers(3, 512, 400)
    spread = [np.ptp(lengths[documents]) for documents in documents_of_steps(job(grouped=True), lengths)]
    assert max(spread) < 60


@hugging_face
@pytest.mark.parametrize("task", ["mlm", "classification"])
def test_both_sides_are_the_same_bert(task: str, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With equal weights and no dropout both have the same loss on padded and on packed documents."""
    monkeypatch.setenv("DSTRAIN_DATA", str(data))
    asked = job(task, corpus=CorpusSettings(name="imdb"))
    vocabulary = open_vocabulary(VocabularySettings(size=300), asked.corpus, cache_home(), print)
    corpus = open_corpus(asked.corpus, vocabulary, asked.length, cache_home(), print)
    objective = objective_settings(asked).build(corpus, vocabulary, encoder_settings(asked), seed=3)
    ours = Task(Encoder(encoder_settings(asked), vocabulary.size, seed=3), objective).eval()
    theirs = hf_model(asked, vocabulary, len(corpus.label_names)).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())) / 20
            )
    copy_weights(ours, theirs)

    documents = np.arange(6)
    batch: Batch = objective.batch(corpus.splits["train"], documents, epoch=0)
    assert len(set(batch.sequences.lengths)) > 1
    ids, mask = padded(batch.ids_T, batch.sequences, vocabulary.pad)
    if task == "mlm":
        positions, targets = batch.labels
        wanted = torch.full_like(batch.ids_T, -100)
        wanted[positions] = targets
        labels = padded(wanted, batch.sequences, -100)[0]
    else:
        labels = batch.labels
    expected = theirs(input_ids=ids, attention_mask=mask, labels=labels).loss
    loss_sum, _ = ours(batch)
    torch.testing.assert_close(loss_sum / batch.weight, expected, rtol=1e-5, atol=1e-5)


def padded(x_T: torch.Tensor, sequences: Sequences, fill: int) -> tuple[torch.Tensor, torch.Tensor]:
    parts = list(x_T.split(list(sequences.lengths)))
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(part) for part in parts], batch_first=True)
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=fill), mask


def copy_weights(ours: Task, theirs: Any) -> None:
    """Our weights under their names; their token types, which we do not have, become nothing."""
    own = ours.state_dict()
    state = theirs.state_dict()
    names = {
        "bert.embeddings.word_embeddings": "encoder.word_embedding",
        "bert.embeddings.position_embeddings": "encoder.positions.table",
        "bert.embeddings.LayerNorm": "encoder.embedding_norm",
        "bert.pooler.dense": "head.dense",
        "classifier": "head.classifier",
        "cls.predictions.transform.dense": "head.dense",
        "cls.predictions.transform.LayerNorm": "head.norm",
        "cls.predictions.decoder": "encoder.word_embedding",
        "cls.predictions": "head",
    }
    layer = {
        "attention.output.dense": "attention_output",
        "attention.output.LayerNorm": "attention_norm",
        "intermediate.dense": "mlp_inner",
        "output.dense": "mlp_output",
        "output.LayerNorm": "mlp_norm",
    }
    for name, value in state.items():
        module, _, kind = name.rpartition(".")
        if module.startswith("bert.encoder.layer."):
            number, part = module.removeprefix("bert.encoder.layer.").split(".", 1)
            block = f"encoder.blocks.{number}"
            if part.startswith("attention.self."):
                third = ("query", "key", "value").index(part.removeprefix("attention.self."))
                value.copy_(own[f"{block}.projections.{kind}"].chunk(3)[third])
            else:
                value.copy_(own[f"{block}.{layer[part]}.{kind}"])
        elif name == "cls.predictions.decoder.bias":
            value.copy_(own["head.bias"])
        elif module in names:
            value.copy_(own[f"{names[module]}.{kind}"])
        else:
            assert "token_type" in name or "_ids" in name, name
            value.zero_() if "token_type_embeddings" in name else None


# ------------------------------------------------------------------------------------------------------ the rows


def test_ratios_are_of_medians_and_peaks() -> None:
    jobs = [job(side="hf"), job(), job(kind="favor")]
    steps = [
        [step(50, 1.0, 400), step(50, 2.0, 800), step(50, 9.0, 600)],
        [step(50, 0.5, 200, 50), step(50, 0.5, 100, 50), step(50, 0.1, 100, 50)],
        [step(50, 0.25, 100, 50)] * 3,
    ]
    hf, sdpa, favor = make_rows(jobs, steps, "wall")
    assert (hf.tokens_per_s, hf.speedup_vs_hf, hf.memory_vs_sdpa, hf.useful_share) == (25.0, 1.0, None, 0.5)
    assert (sdpa.tokens_per_s, sdpa.speedup_vs_hf, sdpa.memory_vs_hf, sdpa.memory_vs_sdpa) == (100.0, 4.0, 0.25, 1.0)
    assert (favor.speedup_vs_hf, favor.memory_vs_sdpa, favor.seconds_per_step, favor.rounds) == (8.0, 0.5, 0.25, 3)
    assert make_rows(jobs[1:2], steps[1:2], "cpu")[0].tokens_per_s == 50.0
    assert make_rows(jobs[1:2], steps[1:2], "wall")[0].speedup_vs_hf is None


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="only Linux tells a process' peak since a moment"
)
def test_memory_counts_what_was_there_for_a_moment() -> None:
    memory, megabyte = Memory(torch.device("cpu")), b"1" * (1 << 20)
    with mmap.mmap(-1, 32 << 20) as fresh:  # a tensor might get pages that an earlier test left resident
        for _ in range(32):
            fresh.write(megabyte)
    assert 30 << 20 < memory.peak() < 60 << 20
    assert Memory(torch.device("cpu")).peak() < 8 << 20


# --------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--kinds", "favour"], "--kinds favour: there is no such attention; did you mean favor?"),
        (["--lengths", "4"], "--lengths 4: a document has 16"),
        (["--threads", "0"], "--threads 0: this machine lends 1 to"),
        (["--budget", "-1"], "--budget -1: give seconds above 0"),
        (["--tokens-per-step", "1"], "--tokens-per-step 1: give at least 16"),
        (["--preset", "bert_smal"], "--preset bert_smal: there is no such shape; did you mean bert_small"),
        (["--plot", "nowhere/x.png"], "--plot nowhere/x.png: there is no folder"),
        (["--data", "nowhere"], "nowhere is not a folder"),
        ([], "DSTRAIN_DATA is not set: give --data"),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DSTRAIN_DATA", "OMP_NUM_THREADS", "DS_ACCELERATOR", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "")  # so that what the command sets is undone
        monkeypatch.delenv(name)
    assert main(["--sides", "dstrain", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.slow
def test_the_command_on_a_tiny_model(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = run(data, tmp_path, monkeypatch, ["--sides", "dstrain", "--lengths", "32", "600"])
    assert [(row["task"], row["length"], row["kind"]) for row in rows] == [
        (task, length, kind)
        for task in ("mlm", "classification")
        for length in (32, 600)
        for kind in ("sdpa", "favor", "lsh")
    ]
    for row in rows:
        assert row["tokens_per_s"] > 0 and row["peak_bytes"] > 0 and row["useful_share"] == 1.0
        assert row["speedup_vs_hf"] is None and row["memory_vs_sdpa"] > 0


@pytest.mark.slow
@hugging_face
def test_the_command_against_hugging_face(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = run(data, tmp_path, monkeypatch, ["--kinds", "sdpa", "--lengths", "32"])
    for task in ("mlm", "classification"):
        theirs, ours = (row for row in rows if row["task"] == task)
        assert (theirs["side"], ours["side"]) == ("hf", "dstrain")
        assert theirs["tokens_per_step"] == ours["tokens_per_step"] and theirs["rounds"] == ours["rounds"]
        assert theirs["useful_share"] <= 1.0 and theirs["speedup_vs_hf"] == 1.0 and ours["speedup_vs_hf"] > 0


def run(data: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> list[dict[str, Any]]:
    for name in ("DSTRAIN_DATA", "OMP_NUM_THREADS", "DS_ACCELERATOR", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "")  # so that what the command sets is undone
        monkeypatch.delenv(name)
    tiny = [
        "--preset",
        "bert_tiny",
        "--vocabulary",
        "300",
        "--tokens-per-step",
        "128",
        "--threads",
        "1",
        "--budget",
        "1",
    ]
    out = ["--json", str(folder / "rows.json"), "--plot", str(folder / "rows.png")]
    assert main(["--data", str(data), *tiny, *out, *arguments]) == 0
    assert (folder / "rows.png").stat().st_size > 5_000
    answer = json.loads((folder / "rows.json").read_text())
    assert answer["environment"]["threads"] == 1 and answer["targets"] == {"mlm": 3.0, "classification": 2.0}
    return answer["rows"]
