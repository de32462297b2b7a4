from __future__ import annotations

import subprocess
import sys
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from dstrain.data.vocabulary import (
    _PIECE,
    SPECIAL_TOKENS,
    Vocabulary,
    VocabularySettings,
    _without_monsters,
    _word_pieces,
    open_vocabulary,
    train,
)
from dstrain.schema import UserError

TEXTS = [
    f"The {animal} sees the {thing}; naïve {animal}s, {thing}ing."
    for animal in ("cat", "dog", "newt")
    for thing in ("film", "sport")
] * 4
SMALL = VocabularySettings(size=400, min_frequency=1)


@pytest.fixture(scope="module")
def vocabulary():
    return train(SMALL, TEXTS)


def _silent(line: str) -> None:
    return None


def test_special_tokens_come_first_and_stand_for_no_text(vocabulary):
    assert [vocabulary.pad, vocabulary.unk, vocabulary.cls, vocabulary.sep, vocabulary.mask] == [0, 1, 2, 3, 4]
    assert vocabulary.special_ids == (0, 1, 2, 3, 4)
    (ids,) = vocabulary.encode(["[MASK] [CLS] film [SEP] [PAD]"])
    assert not set(ids.tolist()) & {vocabulary.pad, vocabulary.cls, vocabulary.sep, vocabulary.mask}


def test_encodes_and_decodes(vocabulary):
    (ids,) = vocabulary.encode(["The newt sees the film"])
    assert ids.dtype == np.uint32 and ids.max() < vocabulary.size <= 400
    assert vocabulary.decode(ids) == "the newt sees the film"
    assert vocabulary.encode(["\u6f22"])[0].tolist() == [vocabulary.unk]
    assert [len(ids) for ids in vocabulary.encode(["", "cat"])] == [0, 1]


def test_two_processes_train_the_same_vocabulary(vocabulary):
    # The trainer's hash maps are seeded per process; this test fails in most runs without the fixed alphabet.
    script = (
        "from dstrain.data.vocabulary import *\n"
        f"texts = {TEXTS!r}\nprint(train(VocabularySettings(size=400, min_frequency=1), texts).fingerprint)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True) for _ in range(3)
    ]
    assert {run.stdout.strip() for run in runs} == {vocabulary.fingerprint}


@given(st.lists(st.text(st.sampled_from("ab c\n\u0301\u6f22"), max_size=30), min_size=1, max_size=5))
def test_long_texts_encode_as_in_one_piece(texts):
    vocabulary = train(VocabularySettings(size=64, min_frequency=1), ["ab c abc"])
    text = " ".join(texts)
    whole = vocabulary._tokenizer.encode(text, add_special_tokens=False).ids
    from dstrain.data import vocabulary as module

    original, module._PIECE = module._PIECE, 7
    try:
        assert vocabulary.encode([text])[0].tolist() == whole
    finally:
        module._PIECE = original


def test_monsters_take_seconds(vocabulary):
    begin = time.monotonic()
    (one_token,) = vocabulary.encode(["x" * 1_000_000])
    (long,) = vocabulary.encode([TEXTS[0] * (2_000_000 // len(TEXTS[0]))])
    assert one_token.tolist() == [vocabulary.unk]
    assert len(long) > 2_000_000 // _PIECE
    assert time.monotonic() - begin < 20


CHARACTERS = "xÉ \n\x0c\x1f\x85\u00a0\u200b\u3000\ufeff.-/_`~[{@:!\u3002\u4e2d\u3400\uac00\u0301"
RUNS = st.tuples(st.sampled_from(CHARACTERS), st.integers(1, 120))


@given(st.lists(RUNS, max_size=8), st.booleans())
def test_text_loses_its_longest_words_and_nothing_else(runs, lowercase):
    tokenizer = _word_pieces({"[UNK]": 0}, lowercase)

    def words(text):
        normal = tokenizer.normalizer.normalize_str(text)
        return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal)]

    text = "".join(character * count for character, count in runs)
    kept, all_of_them = words(_without_monsters(text, tokenizer)), words(text)
    assert [word for word in kept if len(word) <= 100] == [word for word in all_of_them if len(word) <= 100]
    assert all(unicodedata.normalize("NFC", word) != word for word in kept if len(word) > 100), "syllables that fall apart"


def test_what_is_too_long_to_be_read_is_not_learned_from():
    """A word of 200 000 characters took a trainer 49 seconds, and one of 5 MB a day (found by the fuzzer)."""
    settings = VocabularySettings(size=150)
    words = "https://example.org/films/" + "good-film/" * 20
    plain = train(settings, [*TEXTS, words.replace("/", " / "), "y"])
    begin = time.process_time()
    monstrous = train(settings, [*TEXTS, words, "y " + "x" * 1_000_000, ("x" * 60 + "\x0c") * 5000])
    assert time.process_time() - begin < 5
    assert monstrous._tokenizer.to_str() == plain._tokenizer.to_str()
    limit = "ab" * 50
    for word, learned in ((limit, True), (limit + "a", False)):
        found = train(VocabularySettings(size=400, min_frequency=1), [word, "cat"])
        assert (found.encode(["ab"])[0].tolist() != [found.unk]) == learned


def test_the_size_is_kept_even_where_the_alphabet_is_larger():
    texts = ["".join(chr(code) for code in range(0x4E00, 0x4E00 + 500)), "abc " * 50]
    assert train(VocabularySettings(size=64, min_frequency=1), texts).size <= 64


def test_case_and_sampling():
    cased = train(VocabularySettings(size=200, min_frequency=1, lowercase=False), ["Cat cat"] * 3)
    assert cased.decode(cased.encode(["Cat"])[0]) == "Cat"
    few = train(VocabularySettings(size=200, min_frequency=1, training_characters=3), ["aaa", "bbb", "ccc", "ddd"])
    assert few.encode(["aaa"])[0].tolist() != [few.unk] and few.encode(["ddd"])[0].tolist() == [few.unk]
    assert train(VocabularySettings(size=64), iter([""])).size == len(SPECIAL_TOKENS)


def test_saves_and_loads(vocabulary, tmp_path):
    path = vocabulary.save(tmp_path / "run")
    for place in (path, tmp_path / "run"):
        again = Vocabulary.load(place)
        assert again.fingerprint == vocabulary.fingerprint
        assert again.encode(TEXTS[:3])[2].tolist() == vocabulary.encode(TEXTS[:3])[2].tolist()


def test_loads_a_vocab_txt(tmp_path):
    (tmp_path / "vocab.txt").write_bytes("\r\n".join([*SPECIAL_TOKENS, "cat", "##s", ""]).encode())
    vocabulary = open_vocabulary(VocabularySettings(path=tmp_path), lambda: [], "", tmp_path, _silent)
    assert vocabulary.encode(["Cats"])[0].tolist() == [5, 6] and vocabulary.size == 7


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", b"{", "is not a tokenizer file"),
        ("vocab.txt", b"[UNK]\ncat\n", r"has no \[PAD\], \[CLS\], \[SEP\], \[MASK\]"),
        ("vocab.txt", b"cat\n", r"has no line \[UNK\]"),
        ("vocab.txt", b"[UNK]\ncat\ncat\n", "line 3: 'cat' stands already on line 2"),
        ("vocab.txt", b"[UNK]\n\xff\n", "byte 6 is not UTF-8"),
    ],
)
def test_files_that_are_no_vocabulary(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        Vocabulary.load(tmp_path)


def _tokenizer_file(model, added=()):
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(list(added))
    return tokenizer.to_str()


@pytest.mark.parametrize(
    "text",
    [
        _tokenizer_file(models.WordPiece(dict(zip(SPECIAL_TOKENS, range(5), strict=True)), unk_token="<unk>")),
        _tokenizer_file(models.WordPiece({"cat": 0}, unk_token="[UNK]"), SPECIAL_TOKENS),  # added beside the model
        _tokenizer_file(models.Unigram([(token, -1.0) for token in SPECIAL_TOKENS])),
    ],
)
def test_a_tokenizer_that_fails_at_an_unknown_character_is_refused_at_once(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match=r"tokenizer\.json: fails at a character it does not know .*; make \[UNK\] its"):
        Vocabulary.load(tmp_path)


def test_missing_files(tmp_path):
    with pytest.raises(UserError, match="there is no such file"):
        Vocabulary.load(tmp_path / "none.json")
    with pytest.raises(UserError, match=r"holds neither tokenizer.json nor vocab.txt"):
        Vocabulary.load(tmp_path)


def test_many_askers_train_once(tmp_path):
    calls = []

    def texts():
        calls.append(1)
        time.sleep(0.1)
        return TEXTS

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: open_vocabulary(SMALL, texts, "key", tmp_path, _silent).fingerprint, range(6)))
    assert len(calls) == 1 and len(set(found)) == 1
    open_vocabulary(SMALL, texts, "other text", tmp_path, _silent)
    assert len(calls) == 2


def test_a_damaged_cached_vocabulary_is_trained_again(tmp_path):
    said = []
    first = open_vocabulary(SMALL, lambda: TEXTS, "key", tmp_path, said.append)
    (file,) = (tmp_path / "vocabularies").glob("*.json")
    file.write_text(file.read_text()[:100])
    assert open_vocabulary(SMALL, lambda: TEXTS, "key", tmp_path, said.append).fingerprint == first.fingerprint
    assert any("damaged" in line for line in said)
    assert [path.name for path in (tmp_path / "vocabularies").iterdir() if path.suffix not in (".json", ".lock")] == []
