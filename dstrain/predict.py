"""Classifies text with an exported model, or finds the words at its [MASK]s.

python -m dstrain.predict DIR texts.txt                 # one document per line
... | python -m dstrain.predict DIR - --json            # standard input; one JSON object per document
python -m dstrain.predict DIR reviews.csv --text-column review
python -m dstrain.predict DIR texts.txt --latency       # and p50, p95 of each length, on standard error

A line of output is: answer, tab, its probability, tab, the other answers. Documents without text are refused, because the
answers would no longer stand beside their lines; --skip-empty leaves them out. What is cut is said on standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from dstrain.export import Model

_AT_ONCE = 1000  # documents that are sorted by length together; answers appear after each so many
_MEASUREMENTS = 20  # per length bucket, at least; of fewer the 95th percentile is the slowest
_BUDGET = 16_384  # tokens of a micro-batch, or one sequence where that is longer


@dataclass(frozen=True)
class Document:
    """One document of the input."""

    line: int
    """Its line, or its row among the documents of a table, from 1."""
    text: str


# ----------------------------------------------------------------------------------------------------- the input


def read_documents(place: str, text_column: str, stdin: Any) -> list[Document]:
    """The documents of a file, or of standard input for `-`. Raises UserError when they cannot be read.

    A .parquet, .csv, .tsv or .jsonl file is a table, read as a corpus is; everything else holds one document per line.
    """
    from dstrain.schema import UserError

    if place != "-" and Path(place).suffix.lower() in (".parquet", ".csv", ".tsv", ".jsonl"):
        from dstrain.data.files import TableSettings, read_table

        rows = read_table(Path(place), TableSettings(text_column=text_column), labelled=False)
        return [Document(row, text) for row, text in enumerate(rows.texts, 1)]
    name = "standard input" if place == "-" else place
    try:
        data = stdin.read() if place == "-" else Path(place).read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise UserError(
            f"{name}: cannot be read ({error.strerror}); give a text file, or - for standard input"
        ) from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{name}: line {line}: byte 0x{data[error.start]:02x} is not UTF-8; save the text as UTF-8"
        ) from None
    lines = text.removesuffix("\n").split("\n")  # not splitlines: a document may hold U+2028
    documents = [Document(number, line.removesuffix("\r")) for number, line in enumerate(lines, 1)] if text else []
    if not documents:
        raise UserError(f"{name}: is empty; write one document per line")
    return documents


def with_text(documents: Sequence[Document], ids: Sequence[np.ndarray], skip: bool) -> list[int]:
    """Places of the documents that hold a token. Raises UserError for the others, unless they are to be skipped."""
    from dstrain.schema import UserError

    kept = [place for place, found in enumerate(ids) if len(found) > 2]  # more than [CLS] and [SEP]
    if len(kept) < len(documents):
        empty = [documents[place].line for place in sorted(set(range(len(documents))) - set(kept))]
        said = f"{_lines(empty)} of {len(documents)} without text"
        if not skip:
            raise UserError(f"{said}: there is nothing to classify; take such lines out, or give --skip-empty")
        if not kept:
            raise UserError(f"{said}: nothing is left; write at least one document with text")
        print(f"{said}, skipped", file=sys.stderr)
    return kept


def _lines(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
    return f"{len(numbers)} {'line' if len(numbers) == 1 else 'lines'} ({shown})"


# ----------------------------------------------------------------------------------------------------- answering


def answers(model: Model, documents: Sequence[np.ndarray], budget: int = _BUDGET) -> list[Tensor]:
    """Log-probabilities of each document, given as token ids of any length: (K) of classes or (masks, V) of words.

    Sequences of like length share a micro-batch of at most `budget` tokens. The windows of a long document vote with the
    product of their probabilities, as they do in the run's figures; here its length-th root, so that more windows
    are not more certainty.
    """
    import numpy as np
    import torch

    from dstrain.data.batches import evaluation_plan

    cut = [model.cut(ids) for ids in documents]
    sequences = [part for parts in cut for part in parts]
    lengths = np.array([len(part) for part in sequences], np.int64)
    found: list[Tensor] = [torch.empty(0)] * len(sequences)
    for _, rows, _ in evaluation_plan(lengths, max(budget, int(lengths.max())), 1).of_rank(0):
        chosen = [sequences[row] for row in rows]
        scores = torch.log_softmax(model.logits(chosen), dim=-1)
        sizes = [int((part == model.vocabulary.mask).sum()) if model.fills_masks else 1 for part in chosen]
        for row, part in zip(rows, scores.split(sizes), strict=True):
            found[row] = part
    if model.fills_masks:
        return found
    following = iter(found)
    votes = [torch.cat([next(following) for _ in parts]) for parts in cut]
    return [torch.log_softmax(votes_WK.mean(dim=0), dim=-1) for votes_WK in votes]


def best(log_probabilities_K: Tensor, names: Sequence[str] | None, model: Model, top: int) -> list[tuple[str, float]]:
    """The most probable classes or words with their probabilities, best first."""
    values, places = log_probabilities_K.exp().topk(min(top, len(log_probabilities_K)))
    found = zip(places.tolist(), values.tolist(), strict=True)
    return [(model.vocabulary.decode([place]) if names is None else names[place], value) for place, value in found]


def as_text(found: Sequence[Sequence[tuple[str, float]]]) -> str:
    """`answer <tab> probability <tab> others`, once for each [MASK] of a document."""
    return "\t".join(
        "\t".join([ranked[0][0], f"{ranked[0][1]:.4f}", "  ".join(f"{name} {value:.4f}" for name, value in ranked[1:])])
        for ranked in found
    )


def as_json(
    document: Document, tokens: int, cut: bool, found: Sequence[Sequence[tuple[str, float]]], masks: bool
) -> str:
    """One object: line, tokens that were read, whether the text was cut, and the answer."""
    record: dict[str, Any] = {"line": document.line, "tokens": tokens, "cut": cut}
    if masks:
        record["masks"] = found
    else:
        record |= {"label": found[0][0][0], "probabilities": dict(found[0])}
    return json.dumps(record, ensure_ascii=False)


# ------------------------------------------------------------------------------------------------------- latency


@dataclass(frozen=True)
class Latency:
    """Seconds from text to answer of single documents up to a length."""

    longest: int
    """Documents of the bucket have at most this many tokens, and more than the bucket before."""
    documents: int
    seconds: tuple[float, ...]

    def percentile(self, share: float) -> float:
        """Milliseconds that a share of the answers took at most."""
        import numpy as np

        return 1000 * float(np.percentile(self.seconds, share))


def latencies(model: Model, documents: Sequence[Document]) -> Iterator[Latency]:
    """Asks for one document at a time, as a service would, and each bucket at least 20 times after one for warmth."""
    buckets: dict[int, list[Document]] = {}
    for document in documents:
        length = sum(map(len, model.cut(model.ids(document.text))))
        buckets.setdefault(max(32, 1 << (length - 1).bit_length()), []).append(document)
    for longest, members in sorted(buckets.items()):
        rounds = -(-_MEASUREMENTS // len(members))
        _timed(model, members[0])
        yield Latency(longest, len(members), tuple(_timed(model, each) for _ in range(rounds) for each in members))


def _timed(model: Model, document: Document) -> float:
    begin = time.perf_counter()
    answers(model, [model.ids(document.text)])[0].exp()  # on the CPU: the device has been waited for
    return time.perf_counter() - begin


def latency_table(found: Sequence[Latency], model: Model) -> str:
    """One line per length bucket."""
    import torch

    gpu = model.device.type == "cuda"
    where = torch.cuda.get_device_name(model.device) if gpu else f"cpu, {torch.get_num_threads()} threads"
    rows = [
        f"{each.longest:>9,}  {each.documents:>9,}  {len(each.seconds):>12,}  {each.percentile(50):>9.2f}  "
        f"{each.percentile(95):>9.2f}"
        for each in found
    ]
    head = f"{'tokens <=':>9}  {'documents':>9}  {'measurements':>12}  {'p50 ms':>9}  {'p95 ms':>9}"
    return "\n".join(
        [f"latency of one document at a time, tokenisation included ({where}, {model.dtype})", head, *rows]
    )


# ------------------------------------------------------------------------------------------------------ the door


def parser() -> argparse.ArgumentParser:
    """The command line."""
    words = argparse.ArgumentParser(
        prog="python -m dstrain.predict", description="Classify text with a model that python -m dstrain.export wrote."
    )
    words.add_argument("model", type=Path, metavar="DIR", help="the exported model")
    words.add_argument(
        "file", nargs="?", default="-", metavar="FILE",
        help="one document per line, or a .csv, .tsv, .jsonl or .parquet table; - (default) reads standard input",
    )  # fmt: skip
    words.add_argument("--text-column", default="text", metavar="NAME", help="where a table has the documents")
    words.add_argument("--json", action="store_true", help="one JSON object per document")
    words.add_argument("--top", type=_positive, metavar="N", help="answers shown: all classes, or 5 words, by default")
    words.add_argument("--skip-empty", action="store_true", help="leave out documents without text, and say which")
    words.add_argument("--latency", action="store_true", help="time one document at a time, by length")
    words.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto (default) takes a GPU where there is one",
    )
    words.add_argument(
        "--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
        help="auto: bf16 or fp16 where the GPU has it, fp32 on a CPU",
    )  # fmt: skip
    return words


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status: 2 for a mistake, told in a sentence."""
    given = parser().parse_args(argv)
    from dstrain.schema import UserError

    try:
        predict(given, sys.stdout)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 130
    return 0


def predict(given: argparse.Namespace, out: TextIO) -> None:
    """Reads everything, refuses what must be refused, and only then answers, in the order of the input."""
    from dstrain.export import load_model
    from dstrain.precision import choose

    device = find_device(given.device)
    model = load_model(given.model, device, choose(given.precision, device).dtype)
    if given.file == "-" and sys.stdin.isatty():
        print("type one document per line; Ctrl-D ends", file=sys.stderr)
    documents = read_documents(given.file, given.text_column, sys.stdin.buffer)
    ids = [model.ids(document.text) for document in documents]
    kept = with_text(documents, ids, given.skip_empty)
    documents, ids = [documents[place] for place in kept], [ids[place] for place in kept]
    _check_masks(model, documents, ids)
    _say_cut(model, documents, ids)
    for begin in range(0, len(documents), _AT_ONCE):
        part = slice(begin, begin + _AT_ONCE)
        for document, tokens, found in zip(documents[part], ids[part], answers(model, ids[part]), strict=True):
            out.write(_told(given, model, document, tokens, found) + "\n")
        out.flush()
    if given.latency:
        print(latency_table(list(latencies(model, documents)), model), file=sys.stderr)


def _told(given: argparse.Namespace, model: Model, document: Document, ids: np.ndarray, found: Tensor) -> str:
    names = None if model.fills_masks else model.config.label_names
    top = given.top or (5 if names is None else len(names))
    ranked = [best(each, names, model, top) for each in (found if found.ndim == 2 else found[None])]
    if not given.json:
        return as_text(ranked)
    read = min(len(ids), model.config.max_length) if model.truncates else len(ids)
    return as_json(document, read, read < len(ids), ranked, model.fills_masks)


def _check_masks(model: Model, documents: Sequence[Document], ids: Sequence[np.ndarray]) -> None:
    from dstrain.schema import UserError

    if not model.fills_masks:
        return
    for document, tokens in zip(documents, ids, strict=True):
        places = (tokens == model.vocabulary.mask).nonzero()[0]
        if not len(places):
            raise UserError(
                f"line {document.line}: has no [MASK]; this model finds masked words and does not classify: write "
                "[MASK] where a word is asked for, or export a classifier's stage"
            )
        if places[-1] >= model.config.max_length - 1:
            raise UserError(
                f"line {document.line}: a [MASK] stands beyond the {model.config.max_length} tokens that the model "
                "reads; shorten the text before it"
            )


def _say_cut(model: Model, documents: Sequence[Document], ids: Sequence[np.ndarray]) -> None:
    most = model.config.max_length
    long = [document.line for document, tokens in zip(documents, ids, strict=True) if len(tokens) > most]
    if long and model.truncates:
        print(f"{_lines(long)} of {len(documents)} longer than {most} tokens: only the start was read", file=sys.stderr)


def find_device(name: str) -> torch.device:
    """The device of that name; auto takes a GPU where there is one. Raises UserError when it is not there."""
    import torch

    from dstrain.schema import UserError

    gpu = torch.cuda.is_available()
    if name == "cuda" and not gpu:
        raise UserError("--device cuda: this machine shows no GPU; give cpu, or look at CUDA_VISIBLE_DEVICES")
    return torch.device("cuda" if gpu and name != "cpu" else "cpu")


if __name__ == "__main__":
    sys.exit(main())
