from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.data import cache as module
from dstrain.data.cache import _sequences, cache_home, open_corpus, open_vocabulary
from dstrain.data.corpora import CorpusSettings
from dstrain.data.vocabulary import VocabularySettings, train
from dstrain.schema import UserError

WORDS = ["film", "sport", "business", "science", "news", "the", "a", "of", "cat", "dog"]
SMALL = VocabularySettings(size=200, min_frequency=1)


def _silent(line: str) -> None:
    return None


def _document(length: int, seed: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, length))


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "corpus"
    place.mkdir()
    for split, count in (("train", 24), ("validation", 6), ("test", 6)):
        texts = [_document(1 + 7 * n, 1000 * count + n) for n in range(count)]
        pq.write_table(pa.table({"text": texts, "label": [n % 3 for n in range(count)]}), place / f"{split}.parquet")
    return place


@pytest.fixture(scope="module")
def vocabulary():
    return train(SMALL, [" ".join(WORDS)] * 3)


@pytest.fixture
def home(tmp_path):
    return tmp_path / "cache"


def _texts(folder, split):
    return pq.read_table(folder / f"{split}.parquet").column("text").to_pylist()


def test_sequences_are_the_encoded_texts(folder, vocabulary, home):
    corpus = open_corpus(CorpusSettings(path=folder), vocabulary, 50, home, _silent)
    for split, name in (("train", "train"), ("valid", "validation"), ("test", "test")):
        part = corpus.splits[split]
        expected = [
            [vocabulary.cls, *ids[:48].tolist(), vocabulary.sep] for ids in vocabulary.encode(_texts(folder, name))
        ]
        assert part.lengths.dtype == part.labels.dtype == part.document.dtype == np.int64
        assert part.lengths.tolist() == [len(ids) for ids in expected]
        assert part.labels.tolist() == [n % 3 for n in range(len(expected))]
        assert part.document.tolist() == list(range(len(part))) and part.num_documents == len(expected)
        order = np.random.default_rng(0).permutation(len(part))
        gathered = part.gather(order)
        assert gathered.dtype == np.int64
        assert gathered.tolist() == [number for n in order for number in expected[n]]
        assert part.gather(np.array([], dtype=np.int64)).tolist() == []
    assert corpus.label_names == ("0", "1", "2")
    assert any(
        note.startswith("train: 17 of 24 documents (70.8 %) are longer than 50 tokens; truncated,")
        for note in corpus.notes
    )


def test_windows_cover_every_token_and_overlap(folder, vocabulary, home):
    settings = CorpusSettings(path=folder, long_documents="window", window_overlap=5)
    part = open_corpus(settings, vocabulary, 20, home, _silent).splits["train"]
    texts = vocabulary.encode(_texts(folder, "train"))
    assert part.num_documents == len(texts) == part.document.max() + 1
    assert part.lengths.max() == 20
    for number, ids in enumerate(texts):
        sequences = [part.gather(np.array([place]))[1:-1].tolist() for place in np.flatnonzero(part.document == number)]
        joined = sequences[0] + [number for sequence in sequences[1:] for number in sequence[5:]]
        assert joined == ids.tolist()
        assert {part.labels[place] for place in np.flatnonzero(part.document == number)} == {number % 3}


@given(st.lists(st.integers(1, 60), min_size=1), st.integers(1, 20), st.data())
def test_windows_against_a_plain_loop(lengths, room, data):
    overlap = data.draw(st.integers(0, room - 1))
    starts = np.cumsum([0, *lengths])
    expected = []
    for document, length in enumerate(lengths):
        begin = 0
        while True:
            expected.append((starts[document] + begin, min(room, length - begin), document))
            if begin + room >= length:
                break
            begin += room - overlap
    found = list(zip(*(column.tolist() for column in _sequences(starts, room, overlap)), strict=True))
    assert found == expected
    kept = list(zip(*(column.tolist() for column in _sequences(starts, room, None)), strict=True))
    assert kept == [(starts[n], min(room, length), n) for n, length in enumerate(lengths)]


def test_every_length_shares_one_entry_and_reads_no_text(folder, vocabulary, home, monkeypatch):
    first = open_corpus(CorpusSettings(path=folder), vocabulary, 512, home, _silent)
    monkeypatch.setattr(module.corpora, "documents", lambda *_: pytest.fail("the texts were read again"))
    again = open_corpus(CorpusSettings(path=folder, long_documents="window"), vocabulary, 16, home, _silent)
    assert again.fingerprint == first.fingerprint
    assert len(list((home / "tokens").iterdir())) == 1


def test_equal_content_elsewhere_shares_the_entry_and_other_content_does_not(folder, vocabulary, home, tmp_path):
    first = open_corpus(CorpusSettings(path=folder), vocabulary, 512, home, _silent)
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert open_corpus(CorpusSettings(path=copy), vocabulary, 512, home, _silent).fingerprint == first.fingerprint
    texts = _texts(copy, "test")
    pq.write_table(pa.table({"text": texts, "label": [0] * 6}), copy / "test.parquet")
    assert open_corpus(CorpusSettings(path=copy), vocabulary, 512, home, _silent).fingerprint != first.fingerprint
    other = train(VocabularySettings(size=64, min_frequency=1), WORDS)
    assert open_corpus(CorpusSettings(path=folder), other, 512, home, _silent).fingerprint != first.fingerprint


@pytest.mark.parametrize("damage", ["cut ids", "no starts", "garbled meta", "garbled memo"])
def test_a_damaged_entry_is_noticed_and_built_again(folder, vocabulary, home, damage):
    settings = CorpusSettings(path=folder)
    first = open_corpus(settings, vocabulary, 512, home, _silent)
    entry = home / "tokens" / first.fingerprint
    if damage == "cut ids":
        os.truncate(entry / "train.ids", 10)
    elif damage == "no starts":
        (entry / "test.starts.npy").unlink()
    elif damage == "garbled meta":
        (entry / "meta.json").write_text("{")
    else:
        for memo in (home / "memos").iterdir():
            memo.write_text("[]")
    said = []
    again = open_corpus(settings, vocabulary, 512, home, said.append)
    assert any("damaged" in line for line in said) or damage == "garbled memo"
    everything = np.arange(len(again.splits["train"]))
    fresh = open_corpus(settings, vocabulary, 512, home.with_name("fresh"), _silent)
    assert again.splits["train"].gather(everything).tolist() == fresh.splits["train"].gather(everything).tolist()
    assert again.fingerprint == fresh.fingerprint


def test_documents_without_tokens_are_left_out(tmp_path, vocabulary, home):
    texts = ["\ufffd", *[_document(5, n) for n in range(9)]]  # the normaliser drops U+FFFD: to see, but no token
    for split in ("train", "test", "validation"):
        pq.write_table(
            pa.table({"text": texts, "label": [9, *[n % 2 for n in range(9)]]}), tmp_path / f"{split}.parquet"
        )
    corpus = open_corpus(CorpusSettings(path=tmp_path), vocabulary, 512, home, _silent)
    assert "train: left out 1 of 10 documents: no tokens" in corpus.notes
    assert len(corpus.splits["train"]) == 9 and 2 not in corpus.splits["train"].labels
    pq.write_table(pa.table({"text": ["\ufffd"], "label": [0]}), tmp_path / "test.parquet")
    with pytest.raises(UserError, match="no document of test has a token"):
        open_corpus(CorpusSettings(path=tmp_path), vocabulary, 512, home, _silent)
    assert not [path for path in (home / "tokens").iterdir() if path.name.startswith(".")]


def test_lengths_that_cannot_work(folder, vocabulary, home):
    with pytest.raises(UserError, match="max_length 2 leaves no room"):
        open_corpus(CorpusSettings(path=folder), vocabulary, 2, home, _silent)
    with pytest.raises(UserError, match="window_overlap 8 leaves a window of 8 tokens nothing new"):
        open_corpus(
            CorpusSettings(path=folder, long_documents="window", window_overlap=8), vocabulary, 10, home, _silent
        )
    assert not home.exists()


def test_labels_are_required_only_where_asked(folder, vocabulary, home):
    open_corpus(CorpusSettings(path=folder), vocabulary, 64, home, _silent).require_labels()
    plain = open_corpus(CorpusSettings(path=folder, labelled=False), vocabulary, 64, home, _silent)
    assert plain.splits["train"].labels is None
    with pytest.raises(UserError, match="has no labels to classify by; set labelled: true"):
        plain.require_labels()


def test_large_vocabularies_take_wider_ids(folder, vocabulary, home):
    class Wide:
        size, cls, sep, fingerprint = 70_000, 2, 3, "wide"

        def encode(self, texts):
            return [ids + 65_536 for ids in vocabulary.encode(texts)]

    corpus = open_corpus(CorpusSettings(path=folder), Wide(), 64, home, _silent)
    assert corpus.splits["train"].gather(np.array([3])).max() > 65_536


def test_warm_opening_takes_milliseconds(folder, home):
    settings = CorpusSettings(path=folder)

    def both():
        begin = time.perf_counter()
        open_corpus(settings, open_vocabulary(SMALL, settings, home, _silent), 128, home, _silent)
        return time.perf_counter() - begin

    both()
    assert min(both() for _ in range(5)) < 0.05


SCRIPT = """
import sys
from pathlib import Path
from dstrain.data.cache import open_corpus, open_vocabulary
from dstrain.data.corpora import CorpusSettings
from dstrain.data.vocabulary import VocabularySettings
settings = CorpusSettings(path=Path(sys.argv[1]))
vocabulary = open_vocabulary(VocabularySettings(size=200, min_frequency=1), settings, Path(sys.argv[2]), print)
corpus = open_corpus(settings, vocabulary, 64, Path(sys.argv[2]), print)
print("RESULT", corpus.fingerprint, corpus.splits["train"].lengths.sum())
"""


def test_many_processes_at_once_build_once(folder, home):
    builders = [
        subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder), str(home)], stdout=subprocess.PIPE, text=True)
        for _ in range(5)
    ]
    outputs = [builder.communicate(timeout=120)[0] for builder in builders]
    assert {builder.returncode for builder in builders} == {0}
    assert len({line for output in outputs for line in output.splitlines() if line.startswith("RESULT")}) == 1
    assert sum("tokenising" in output for output in outputs) == 1
    assert sum("training up to" in output for output in outputs) == 1


def test_a_killed_builder_leaves_nothing_in_the_way(folder, vocabulary, home):
    stuck = SCRIPT.replace(
        "settings =",
        "import time\nVocabulary = __import__('dstrain.data.vocabulary', fromlist=['x']).Vocabulary\n"
        "real = Vocabulary.encode\n"
        "def encode(self, texts):\n    print('STUCK', flush=True)\n    time.sleep(600)\n"
        "Vocabulary.encode = encode\nsettings =",
        1,
    )
    with subprocess.Popen(
        [sys.executable, "-c", stuck, str(folder), str(home)], stdout=subprocess.PIPE, text=True
    ) as builder:
        assert builder.stdout is not None
        while "STUCK" not in builder.stdout.readline():
            assert builder.poll() is None
        builder.send_signal(signal.SIGKILL)
    assert [path.name[:10] for path in (home / "tokens").iterdir()] == [".building-"]
    settings = CorpusSettings(path=folder)
    corpus = open_corpus(settings, open_vocabulary(SMALL, settings, home, _silent), 64, home, _silent)
    assert len(corpus.splits["train"]) == 24
    assert [path.name for path in (home / "tokens").iterdir()] == [corpus.fingerprint]


def test_a_cache_that_cannot_be_written(folder, vocabulary, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"the cache cannot be written .*set DSTRAIN_CACHE"):
        open_corpus(CorpusSettings(path=folder), vocabulary, 64, tmp_path / "file" / "cache", _silent)


def test_a_bar_is_drawn_only_on_a_terminal(monkeypatch, capsys):
    with module._progress(3) as advance:
        advance(1)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with module._progress(3) as advance:
        advance(3)
    assert "tokenising" in capsys.readouterr().err


def test_cache_home(monkeypatch, tmp_path):
    monkeypatch.setenv("DSTRAIN_CACHE", str(tmp_path / "own"))
    assert cache_home() == tmp_path / "own"
    monkeypatch.delenv("DSTRAIN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_home() == tmp_path / "dstrain"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_home() == Path.home() / ".cache" / "dstrain"


def test_importing_the_data_half_imports_nothing_heavy():
    heavy = ["pyarrow", "tokenizers", "datasets", "torch", "pandas", "sklearn", "huggingface_hub", "rich"]
    script = f"import sys, json, dstrain.data.cache; print(json.dumps([m for m in {heavy!r} if m in sys.modules]))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == []
