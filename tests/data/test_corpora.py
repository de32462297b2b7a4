from __future__ import annotations

import json
import time
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dstrain.data import corpora, hub
from dstrain.data.corpora import CorpusSettings, documents, identity, is_blank, locate
from dstrain.schema import UserError, validate


def _silent(line: str) -> None:
    return None


def _rows(path, texts, labels=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"text": list(texts)} | ({} if labels is None else {"label": list(labels)})
    pq.write_table(pa.table(columns), path)
    return path


def _texts(count, word="document"):
    return [f"{word} number {n} of its kind" for n in range(count)]


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("DSTRAIN_DATA", str(tmp_path))
    return tmp_path


def test_a_folder_gives_its_splits(home):
    for split, count in (("train", 20), ("validation", 6), ("test", 8)):
        _rows(home / "mine" / f"{split}.parquet", _texts(count, split), [n % 2 for n in range(count)])
    found = documents(CorpusSettings(name="mine"), _silent)
    assert [(split, len(part.texts)) for split, part in found.items()] == [("train", 20), ("valid", 6), ("test", 8)]
    assert found["test"].labels.dtype == np.int64 and found["test"].label_names == ("0", "1")
    same = documents(CorpusSettings(path=home / "mine"), _silent)
    assert list(same["train"].texts) == list(found["train"].texts)


def test_unlabelled_text_takes_the_place_of_train(home):
    _rows(home / "mine" / "train.parquet", _texts(30, "labelled"), [0, 1] * 15)
    without = documents(CorpusSettings(name="mine", labelled=False), _silent)
    assert without["train"].labels is None and without["train"].texts[0].startswith("labelled")
    _rows(home / "mine" / "unlabeled.parquet", _texts(40, "plain"))
    _rows(home / "mine" / "test.parquet", _texts(5, "held"), [0, 1, 0, 1, 0])
    found = documents(CorpusSettings(name="mine", labelled=False), _silent)
    assert all(text.startswith("plain") for text in [*found["train"].texts, *found["valid"].texts])
    assert all(text.startswith("held") for text in found["test"].texts)
    assert documents(CorpusSettings(name="mine"), _silent)["train"].texts[0].startswith("labelled")


def test_carving_is_exact_stable_stratified_and_loses_nothing(tmp_path):
    texts, labels = _texts(200), [int(n % 4 == 0) for n in range(200)]
    path = _rows(tmp_path / "all.parquet", texts, labels)
    found = documents(CorpusSettings(path=path), _silent)
    assert {split: len(part.texts) for split, part in found.items()} == {"train": 160, "valid": 20, "test": 20}
    assert sorted(text for part in found.values() for text in part.texts) == sorted(texts)
    assert all(
        np.bincount(part.labels).tolist() == [3 * len(part.texts) // 4, len(part.texts) // 4] for part in found.values()
    )
    shuffled = np.random.default_rng(0).permutation(200)
    path = _rows(tmp_path / "shuffled.parquet", [texts[n] for n in shuffled], [labels[n] for n in shuffled])
    again = documents(CorpusSettings(path=path), _silent)
    assert set(again["valid"].texts) == set(found["valid"].texts)
    other = documents(CorpusSettings(path=path, split_seed=1), _silent)
    assert set(other["valid"].texts) != set(found["valid"].texts)


def test_repeats_are_carved_together(tmp_path):
    texts = [text for text in _texts(60) for _ in range(3)]
    path = _rows(tmp_path / "all.parquet", [text.upper() if n % 3 else text for n, text in enumerate(texts)])
    found = documents(CorpusSettings(path=path, labelled=False), _silent)
    folded = {split: {text.lower() for text in part.texts} for split, part in found.items()}
    assert (
        not folded["train"] & folded["valid"]
        and not folded["train"] & folded["test"]
        and not folded["valid"] & folded["test"]
    )
    assert len(found["valid"].texts) >= 15


def test_shared_documents_are_noted(home):
    _rows(home / "mine" / "train.parquet", ["The  same, text", "unlike anything", "a third one"] * 1)
    _rows(home / "mine" / "validation.parquet", ["the same text", "new"])
    _rows(home / "mine" / "test.parquet", ["unlike anything", "newer"])
    found = documents(CorpusSettings(name="mine", labelled=False), _silent)
    assert (
        "1 of 2 documents also stand in train" in found["valid"].notes[-1]
        and "(0 of them exactly)" in found["valid"].notes[-1]
    )
    assert "(1 of them exactly)" in found["test"].notes[-1]


def test_filters_and_caps(home):
    words = ["A Film.", "two sports", "filmography only", "short", "  ", "science fiction it is"]
    _rows(home / "wiki" / "train.parquet", words * 10)
    for split in ("validation", "test"):
        _rows(home / "wiki" / f"{split}.parquet", ["business as usual", "sciences, plural"])
    found = documents(CorpusSettings(name="wikipedia"), _silent)
    assert set(found["train"].texts) == {"A Film.", "two sports", "science fiction it is"}
    assert "left out 10 of 60 documents: blank" in found["train"].notes
    assert "left out 20 of 60 documents: without a keyword" in found["train"].notes
    assert not any("label" in note for note in found["train"].notes)
    assert len(documents(CorpusSettings(name="wiki", keywords=()), _silent)["train"].texts) == 50
    capped = CorpusSettings(name="wiki", keywords=(), min_characters=8, max_documents=3, max_eval_documents=1)
    few, again = documents(capped, _silent), documents(capped, _silent)
    assert [len(part.texts) for part in few.values()] == [3, 1, 1]
    assert list(again["train"].texts) == list(few["train"].texts)
    with pytest.raises(UserError, match="train has no documents left"):
        documents(CorpusSettings(name="wiki", keywords=("zebra",)), _silent)


def test_blank_means_nothing_to_see():
    assert all(map(is_blank, ["", " \t\n", "\u200b\u200b", "\ufeff", "\x00\x07"]))
    assert not any(map(is_blank, ["-", "nan", " \u200b.", "漢"]))


def _sentence(settings):
    with pytest.raises(UserError) as caught:
        documents(settings, _silent)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_not_there_is_said(home, tmp_path, monkeypatch):
    assert "did you mean imdb?" in _sentence(CorpusSettings(name="imbd"))
    (home / "mine").mkdir()
    assert "did you mean mine?" in _sentence(CorpusSettings(name="mime"))
    assert "has no train file, only nothing" in _sentence(CorpusSettings(name="mine"))
    _rows(home / "mine" / "train.parquet", ["a"])
    (home / "mine" / "train.csv").write_text("text\na\n")
    assert "train is both train.parquet and train.csv" in _sentence(CorpusSettings(name="mine"))
    assert "no such file or folder" in _sentence(CorpusSettings(path=home / "nowhere"))
    monkeypatch.setenv("DSTRAIN_DATA", str(home / "nowhere"))
    assert "is not a folder" in _sentence(CorpusSettings(name="imdb"))
    monkeypatch.delenv("DSTRAIN_DATA")
    assert "DSTRAIN_DATA is not set" in _sentence(CorpusSettings(name="mine"))
    with pytest.raises(UserError, match="both say where the corpus is"):
        validate(CorpusSettings, {"name": "imdb", "path": "x"}, "x.yaml")


def test_labels_in_one_split_only(home):
    _rows(home / "mine" / "train.parquet", _texts(4), [0, 1, 0, 1])
    _rows(home / "mine" / "test.parquet", _texts(4, "held"))
    assert "test.parquet: has no label column while the other splits have one" in _sentence(CorpusSettings(name="mine"))


def test_identity_changes_with_files_and_settings(home):
    path = _rows(home / "mine" / "train.parquet", _texts(9))
    first = identity(CorpusSettings(name="mine"))
    assert (
        identity(CorpusSettings(path=home / "mine", long_documents="window", window_overlap=3)).split()[1:]
        == first.split()[1:]
    )
    assert identity(CorpusSettings(name="mine", labelled=False)) != first
    _rows(path, _texts(10))
    assert identity(CorpusSettings(name="mine")) != first
    assert "torch==" in identity(CorpusSettings(name="pydocs"))
    assert identity(CorpusSettings(name="imdb")) == identity(CorpusSettings(name="imdb"))


# -------------------------------------------------------------------------------------------------- the hub


@pytest.fixture
def reachable(monkeypatch):
    monkeypatch.delenv("DSTRAIN_DATA", raising=False)
    monkeypatch.setattr(hub, "_answers", lambda endpoint: True)


def test_without_a_network_one_sentence_names_the_layout(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.delenv("DSTRAIN_DATA", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: refused at once
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    said = []
    begin = time.monotonic()
    with pytest.raises(UserError) as caught:
        documents(CorpusSettings(name="arxiv"), said.append)
    assert time.monotonic() - begin < 15
    sentence = str(caught.value)
    assert "\n" not in sentence and "DSTRAIN_DATA" in sentence and "arxiv/train.parquet" in sentence
    assert any("does not answer" in line for line in said)


def _fake_load(tables):
    import datasets

    def load_dataset(repository, config=None, split=None, data_files=None):
        if repository == "parquet":
            return tables[next(iter(data_files.values()))]
        found = tables[(repository, config, split)]
        if isinstance(found, Exception):
            raise found
        return found

    return datasets, load_dataset


def _hub_table(texts, labels=None, names=("neg", "pos")):
    import datasets

    if labels is None:
        return datasets.Dataset.from_dict({"text": texts})
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(names))})
    return datasets.Dataset.from_dict({"text": texts, "label": labels}, features=features)


def test_hub_splits_labels_names_and_left_over_html(reachable, monkeypatch):
    texts = [f"review {n}<br />second line" for n in range(40)]
    datasets, load = _fake_load(
        {
            ("stanfordnlp/imdb", None, "train"): _hub_table(texts, [0, 1] * 20),
            ("stanfordnlp/imdb", None, "test"): _hub_table(["a test", "another"], [1, 0]),
            ("stanfordnlp/imdb", None, "unsupervised"): _hub_table(_texts(50, "unsup"), [-1] * 50),
        }
    )
    monkeypatch.setattr(datasets, "load_dataset", load)
    found = documents(CorpusSettings(name="imdb"), _silent)
    assert {split: len(part.texts) for split, part in found.items()} == {"train": 36, "valid": 4, "test": 2}
    assert found["train"].label_names == ("neg", "pos") and found["test"].labels.tolist() == [1, 0]
    assert "\nsecond line" in found["train"].texts[0] and "<br" not in found["train"].texts[0]
    unlabelled = documents(CorpusSettings(name="imdb", labelled=False), _silent)
    assert unlabelled["train"].labels is None and unlabelled["train"].texts[0].startswith("unsup")


def test_a_repository_with_a_script_is_read_from_the_converted_parquet(reachable, monkeypatch):
    where = "hf://datasets/ccdv/arxiv-classification@refs%2Fconvert%2Fparquet/default/{}/*.parquet"
    tables = {}
    for split, word in (("train", "a"), ("validation", "b"), ("test", "c")):
        tables[("ccdv/arxiv-classification", "default", split)] = RuntimeError(
            "Dataset scripts are no longer supported"
        )
        tables[where.format(split)] = _hub_table(_texts(6, word), [0, 1] * 3)
    datasets, load = _fake_load(tables)
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert documents(CorpusSettings(name="arxiv"), _silent)["valid"].texts[0].startswith("b")
    tables[("ccdv/arxiv-classification", "default", "train")] = RuntimeError("out of disk")
    assert "could not be had from the hub (out of disk)" in _sentence(CorpusSettings(name="arxiv"))


def test_hyperpartisan_is_read_from_its_xml_archives(reachable, monkeypatch, tmp_path):
    import huggingface_hub

    for split, numbers in (("training", range(20)), ("validation", range(20, 24))):
        stem = f"{split}-bypublisher-20181122"
        articles = "".join(
            f'<article id="{n:07}" title="Title {n}"><p>Body <a href="#">of</a> {n}</p></article>' for n in numbers
        )
        truth = "".join(f'<article id="{n:07}" hyperpartisan="{"true" if n % 2 else "false"}"/>' for n in numbers)
        for kind, content in (("articles", articles), ("ground-truth", truth)):
            with zipfile.ZipFile(tmp_path / f"{kind}-{stem}.zip", "w") as archive:
                archive.writestr(f"{kind}-{stem}.xml", f"<articles>{content}</articles>")
    monkeypatch.setattr(
        huggingface_hub,
        "hf_hub_download",
        lambda repository, name, repo_type: str(tmp_path / name.removeprefix("data/")),
    )
    found = documents(CorpusSettings(name="hyperpartisan"), _silent)
    assert {split: len(part.texts) for split, part in found.items()} == {"train": 18, "valid": 4, "test": 2}
    assert found["valid"].texts[1] == "Title 21\nBody of 21" and found["valid"].labels.tolist() == [0, 1, 0, 1]
    assert found["train"].label_names == ("not_hyperpartisan", "hyperpartisan")


def test_the_probe_gives_up_and_takes_any_answer():
    import http.server
    import threading

    assert not hub._answers("http://127.0.0.1:9")
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)  # answers 501 to HEAD
    threading.Thread(target=server.handle_request, daemon=True).start()
    assert hub._answers(f"http://127.0.0.1:{server.server_port}")
    server.server_close()


def test_every_hub_name_is_located_and_jsonl_folders_work(home):
    assert {locate(CorpusSettings(name=name)).kind for name in hub.HUB} == {"hub"}
    (home / "mine").mkdir()
    (home / "mine" / "train.jsonl").write_text(
        "".join(json.dumps({"text": text, "label": "ab"[n % 2]}) + "\n" for n, text in enumerate(_texts(20)))
    )
    assert documents(CorpusSettings(name="mine"), _silent)["train"].label_names == ("a", "b")
    assert len(corpora.training_texts(CorpusSettings(name="mine"), _silent)) == 16
