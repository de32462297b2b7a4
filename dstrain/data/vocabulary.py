"""The WordPiece vocabulary: trained once from the corpus' training text, or loaded from a file.

N documents; ids are below V, the size of the vocabulary.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import field_validator

from dstrain.data.locking import locked
from dstrain.schema import Settings, UserError, setting

Say = Callable[[str], None]
PAD, UNK, CLS, SEP, MASK = SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
FILE_NAME = "tokenizer.json"
_FORMAT = 2  # part of every cache key; raised when the same settings would train another vocabulary
_WORD = 100  # characters; longer words read [UNK], as BERT's
# Between two of what separates words for sure: spaces, ASCII punctuation, Chinese characters (each is a word).
_LONG_RUN = re.compile(rf"[^ \t\n\r!-/:-@\[-`{{-~\u4e00-\u9fff]{{{_WORD + 1},}}")
_PIECE = 50_000  # characters encoded at a time: a tokenizer needs hundreds of bytes for each


class VocabularySettings(Settings):
    """Which vocabulary the encoder reads with."""

    path: Path | None = None
    """A tokenizer.json or a vocab.txt (one WordPiece per line), or a folder that holds one; default: train one."""
    size: int = setting(30522, unit="tokens", ge=64, le=2**31 - 1)
    """Most tokens a trained vocabulary has, the five special ones included; a small corpus may fill fewer."""
    lowercase: bool = True
    """Lower-case the text and strip accents (as BERT uncased). Also said of a vocab.txt; a tokenizer.json knows it."""
    min_frequency: int = setting(2, ge=1)
    """A pair of pieces is joined when it occurs at least this often."""
    alphabet_size: int = setting(1000, unit="characters", ge=1)
    """The most frequent characters that get tokens of their own (at most an eighth of `size`, alone and inside words);
    words with others read [UNK]."""
    training_characters: int = setting(200_000_000, unit="characters", ge=1)
    """Of more text than this, evenly spaced documents are trained on."""

    @field_validator("path")
    @classmethod
    def _home(cls, path: Path | None) -> Path | None:
        return None if path is None else path.expanduser()


class Vocabulary:
    """Text to token ids and back. The special tokens are [PAD], [UNK], [CLS], [SEP] and [MASK]."""

    def __init__(self, tokenizer: Any, source: str) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # `[MASK]` written in a document is text, not the special token
        self._tokenizer = tokenizer
        ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
        missing = [token for token, number in ids.items() if number is None]
        if missing:
            raise UserError(
                f"{source}: the vocabulary has no {', '.join(missing)}; add them, or leave path out to train one"
            )
        try:
            tokenizer.model.tokenize("\U0010fffd")  # for private use: no vocabulary has it, and no normalizer drops it here
        except Exception as error:  # the Rust library raises plain Exception
            raise UserError(
                f"{source}: fails at a character it does not know ({error}); make {UNK} its unk_token, in the model's "
                "own vocabulary"
            ) from None
        self.pad, self.unk, self.cls, self.sep, self.mask = (ids[token] for token in SPECIAL_TOKENS)
        self.special_ids: tuple[int, ...] = tuple(sorted(ids.values()))
        """Ids that stand for no text; a mask never falls on them and never draws one."""
        self.size: int = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        """V: one more than the largest id."""

    @cached_property
    def fingerprint(self) -> str:
        """Equal for vocabularies that encode alike; 32 hexadecimal digits."""
        return _digest(self._tokenizer.to_str())

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """(N) arrays of uint32 ids, without [CLS] and [SEP]. Time and memory are linear in the length of a text."""
        pieces = [list(_pieces(text)) for text in texts]
        encodings = iter(
            self._tokenizer.encode_batch_fast([piece for parts in pieces for piece in parts], add_special_tokens=False)
        )
        return [np.concatenate([np.array(next(encodings).ids, dtype=np.uint32) for _ in parts]) for parts in pieces]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids, special tokens included."""
        return self._tokenizer.decode([int(number) for number in ids], skip_special_tokens=False)

    def save(self, folder: Path) -> Path:
        """Writes `tokenizer.json` into a folder (made where missing) and returns its path."""
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / FILE_NAME, self._tokenizer.to_str(pretty=True))
        return folder / FILE_NAME

    @classmethod
    def load(cls, path: Path, lowercase: bool = True) -> Vocabulary:
        """From a tokenizer.json, a vocab.txt, or a folder that holds one. Raises UserError."""
        file = _find_file(path)
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{file}: byte {error.start} is not UTF-8, so this is no vocabulary; give a tokenizer.json or vocab.txt"
            ) from None
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror}); give a tokenizer.json or vocab.txt") from None
        return cls(
            _parse_json(text, file) if file.suffix == ".json" else _parse_pieces(text, file, lowercase), str(file)
        )


def open_vocabulary(
    settings: VocabularySettings, training_texts: Callable[[], Iterable[str]], key: str, cache: Path, say: Say
) -> Vocabulary:
    """The vocabulary of the settings: loaded from `path`, else from the cache, else trained on `training_texts()`.

    `key` identifies the training texts without reading them (`corpora.identity`). Many processes may ask at once: one
    trains, the others wait for it. Raises UserError.
    """
    if settings.path is not None:
        return Vocabulary.load(settings.path, settings.lowercase)
    folder = cache / "vocabularies"
    file = folder / f"{_digest(f'{_FORMAT} {_tokenizers_version()} {settings.model_dump_json()} {key}')}.json"
    if (found := _cached(file, say)) is not None:
        return found
    with locked(file.with_suffix(".lock")):
        if (found := _cached(file, _silent)) is not None:  # another process was faster
            return found
        say(f"vocabulary: training up to {settings.size} WordPieces from the training text (kept in {folder})")
        vocabulary = train(settings, training_texts())
        write_atomically(file, vocabulary._tokenizer.to_str())
    return vocabulary


def _cached(file: Path, say: Say) -> Vocabulary | None:
    if not file.is_file():
        return None
    try:
        return Vocabulary.load(file)
    except UserError:
        say(f"vocabulary: {file} is damaged and is trained again")
        return None


def _silent(line: str) -> None:
    return None


# ---------------------------------------------------------------------------------------------------- training


def train(settings: VocabularySettings, texts: Iterable[str]) -> Vocabulary:
    """A WordPiece vocabulary; the same texts and settings give the same ids, whatever the order of threads.

    Words of over 100 characters, which it reads as [UNK], are not learned from.
    """
    from tokenizers import trainers

    texts = _sampled(texts if isinstance(texts, Sequence) else list(texts), settings.training_characters)
    tokenizer = _word_pieces({UNK: 0}, settings.lowercase)
    reader = _word_pieces({UNK: 0}, settings.lowercase)  # one that is being trained waits for itself when it is asked

    def readable() -> Iterator[str]:  # texts may lie on a disk
        return (_without_monsters(text, reader) for text in texts)

    alphabet = _alphabet(readable(), tokenizer.normalizer, min(settings.alphabet_size, settings.size // 8))
    # The trainer numbers characters inside words (`##a`) in the order of a randomly seeded hash map, and ties between
    # pairs go by number. Named as special tokens they have fixed numbers, and the result is the same every time.
    specials = [*SPECIAL_TOKENS, *(f"##{character}" for character in alphabet)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=settings.size,
        min_frequency=settings.min_frequency,
        special_tokens=specials,
        initial_alphabet=alphabet,
        limit_alphabet=max(1, len(alphabet)),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sliced(readable()), trainer)
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return Vocabulary(
        _word_pieces({token: place for place, (token, _) in enumerate(tokens)}, settings.lowercase), "training text"
    )


def _sampled(texts: Sequence[str], most: int) -> Sequence[str]:
    """Evenly spaced documents that hold about `most` characters, or all of them."""
    total = sum(len(text) for text in texts)
    if total <= most:
        return texts
    count = max(1, len(texts) * most // total)
    return [texts[place * len(texts) // count] for place in range(count)]


def _without_monsters(text: str, tokenizer: Any) -> str:
    """The text without words that are too long to be read: a trainer takes the square of a word's length to learn from it."""

    def kept(run: re.Match[str]) -> str:
        words = tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(run[0]))
        return " ".join(word for word, _ in words if len(word) <= _WORD)

    return _LONG_RUN.sub(kept, text)


def _alphabet(texts: Iterable[str], normalizer: Any, most: int) -> list[str]:
    """The most frequent characters of the normalised texts, in the order of their code points."""
    counts = np.zeros(0x110000, dtype=np.int64)
    for piece in _sliced(texts):
        points = np.frombuffer(normalizer.normalize_str(piece).encode("utf-32-le"), dtype=np.uint32)
        numbers, found = np.unique(points, return_counts=True)
        counts[numbers] += found
    counts[[ord(space) for space in " \t\n\r"]] = 0
    order = np.argsort(-counts, kind="stable")[:most]
    return [chr(point) for point in np.sort(order[counts[order] > 0]).tolist()]


def _sliced(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from _pieces(text)


def _word_pieces(vocabulary: dict[str, int], lowercase: bool) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token=UNK, max_input_chars_per_word=_WORD))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _pieces(text: str) -> Iterator[str]:
    """The text cut at spaces into pieces of about 50 000 characters, which encode to the same ids."""
    begin = 0
    while len(text) - begin > _PIECE:
        end = text.find(" ", begin + _PIECE)
        if end < 0:
            break
        yield text[begin:end]
        begin = end
    yield text[begin:]


# ------------------------------------------------------------------------------------------------------- files


def _find_file(path: Path) -> Path:
    if not path.is_dir():
        if not path.exists():
            raise UserError(
                f"{path}: there is no such file; give a tokenizer.json or vocab.txt, or leave path out to train one"
            )
        return path
    for name in (FILE_NAME, "vocab.txt"):
        if (path / name).is_file():
            return path / name
    raise UserError(f"{path}: holds neither {FILE_NAME} nor vocab.txt; give the file itself")


def _parse_json(text: str, file: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the Rust library raises plain Exception
        raise UserError(f"{file}: is not a tokenizer file ({str(error)[:150]}); write it with Tokenizer.save") from None


def _parse_pieces(text: str, file: Path, lowercase: bool) -> Any:
    tokens = text.split("\n")
    tokens = [token.rstrip("\r") for token in (tokens[:-1] if tokens[-1] == "" else tokens)]
    places: dict[str, int] = {}
    for place, token in enumerate(tokens):
        if places.setdefault(token, place) != place:
            raise UserError(
                f"{file}: line {place + 1}: {token!r} stands already on line {places[token] + 1}; keep one of them"
            )
    if UNK not in places:
        raise UserError(
            f"{file}: has no line {UNK}; a vocab.txt holds one WordPiece per line, {', '.join(SPECIAL_TOKENS)} "
            "among them"
        )
    return _word_pieces(places, lowercase)


def write_atomically(path: Path, text: str) -> None:
    """Writes a file so that a reader sees all of it or none."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _tokenizers_version() -> str:
    from importlib.metadata import version

    return version("tokenizers")


def _digest(text: str) -> str:
    return blake2b(text.encode(), digest_size=16).hexdigest()
