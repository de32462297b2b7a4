"""What the fuzzer tries: valid files with a few mistakes in them, as hypothesis strategies, so that a finding shrinks.

Three kinds: the settings (YAML), the DeepSpeed JSON, and the data. A mistake is made in the tree (a wrong value, a key too
many, too few or misspelt) or in the file's bytes (a cut, a repeated line, a stray character).
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("settings", "deepspeed", "data")
RUN_FILE = "run.yaml"
ROWS = [(f"the {noun} is {how} number {n}", str(n % 2)) for n, (noun, how) in enumerate(
    [(noun, how) for noun in ("film", "book", "actor", "plot", "music", "ending") for how in ("good", "bad", "long", "dull")]
)]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Files in an empty folder, and what is typed there."""

    kind: str
    door: str
    """train or tune"""
    words: tuple[str, ...]
    files: dict[str, bytes]
    mistakes: int
    """How many were made; each may cost a few lines of the answer."""


# ---------------------------------------------------------------------------------------------------- what is valid


def small_run(**changes: Any) -> dict[str, Any]:
    """The `base` of a run that would train in a second."""
    stage = {
        "corpus": {"path": "data.csv"}, "max_length": 32, "tokens_per_batch": 128, "steps": 3, "report_every": 1,
        "optim": {"lr": 1e-3, "warmup": 0.1, "betas": [0.9, 0.98]},
    }  # fmt: skip
    return {
        "name": "small",
        "vocabulary": {"size": 120},
        "encoder": {
            "preset": "bert_tiny", "num_layers": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "qkv_size": 16,
            "attention": {"kind": "lsh", "num_hashes": 2, "chunk_size": 16},
        },
        "stages": {
            "pretrain": {**stage, "objective": {"kind": "mlm", "mask_rate": 0.2}},
            "finetune": {**stage, "objective": {"kind": "classify", "pooling": "mean"}, "num_frozen_layers": 1},
        },
        "tracking": {"enabled": False},
        **changes,
    }  # fmt: skip


def small_search() -> dict[str, Any]:
    """A whole file: a run, overrides, a space and a search."""
    return {
        "base": small_run(),
        "when": {"no_gpu": {"stages.pretrain.steps": 2}},
        "space": {
            "encoder.attention": {"choice": [{"kind": "sdpa"}, {"kind": "favor", "nb_features": 16}]},
            "stages.finetune.optim.lr": {"log_uniform": [1e-4, 1e-2]},
            "encoder.num_layers": [1, 2],
            "stages.finetune.num_frozen_layers": {"expr": "num_layers // 2"},
        },
        "search": {
            "metric": "finetune/valid/f1_macro", "trials": 4, "scheduler": {"kind": "asha", "grace": 1, "eta": 3},
            "constraints": ["hidden_size % num_heads == 0"], "resources": {"cpus": 1}, "finalists": {"top": 1, "seeds": 2},
        },
    }  # fmt: skip


def shipped_searches() -> list[dict[str, Any]]:
    """The files of search_spaces/, at the size of a test."""
    found = []
    for file in sorted((ROOT / "search_spaces").glob("*.yaml")):
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
        tree["base"]["encoder"] = {**tree["base"]["encoder"], "num_layers": 2}
        tree["base"]["vocabulary"] = {"size": 120}
        found.append(tree)
    return found


HUGGING_FACE_ZERO3 = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto"}},
    "zero_optimization": {
        "stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True}, "overlap_comm": True, "sub_group_size": 1e9,
        "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto", "stage3_max_live_parameters": 1e9,
    },
    "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "steps_per_print": 2000,
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "wall_clock_breakdown": False,
}  # fmt: skip
"""The example of Hugging Face's documentation, which names an optimizer and a scheduler."""


def plans() -> list[dict[str, Any]]:
    """The shipped DeepSpeed files, and one of Hugging Face's."""
    own = [json.loads(file.read_text()) for file in sorted((ROOT / "ds_configs").glob("*.json"))]
    return [*own, HUGGING_FACE_ZERO3]


# ------------------------------------------------------------------------------------------------ mistakes in a tree

WRONG: list[Any] = [
    None, True, False, 0, -1, 1, 2, 0.5, -0.0, 10**6, 1_000_000_007, 2**63, -(2**63), 10**30, 1e308,
    float("nan"), float("inf"), float("-inf"), "", " ", "auto", "none", "1e-3", "sdpa", "mlm", "previous", "no/such/file",
    "data.csv", "../x", "é\u202e\U0001f600", "\u2028", "\ud800", "\x00", "a" * 5000, "{", "%s %d {0}", [], [[]], {},
    {"kind": "nope"}, {"kind": 3}, {"choice": []}, {"uniform": [2, 1]}, [1, "a", None], {"": 1}, {"a": {"b": {"c": {"d": 1}}}},
]  # fmt: skip
WORDS = ["lr", "kind", "path", "steps", "nmae", "learning_rate", "<<", "é", "", "a.b", "stage", "0", "*", "enabled", "auto"]


def places(tree: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The address of everything inside a tree, as keys and indices."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [place for key, value in inner for place in ((*at, key), *places(value, (*at, key)))]


Change = Callable[[Any], None]


@st.composite
def tree_mistake(draw: st.DrawFn) -> tuple[str, int, Any]:
    """(what, which place, with what): applied by `spoil`, whatever tree it meets."""
    what = draw(st.sampled_from(["set", "drop", "add", "rename", "deepen", "move", "repeat"]))
    value: Any = None
    if what == "set":
        value = draw(st.sampled_from(WRONG) | st.integers() | st.floats() | st.text(max_size=8))
    elif what in ("add", "rename"):
        value = draw(st.sampled_from(WORDS) | st.text(max_size=6))
    elif what == "deepen":
        value = draw(st.sampled_from([1, 3, 40, 100]))
    else:
        value = draw(st.integers(0, 200))
    return what, draw(st.integers(0, 200)), value


def spoil(tree: dict[str, Any], mistake: tuple[str, int, Any]) -> None:
    """Makes one mistake in the tree."""
    what, number, value = mistake
    known = places(tree)
    if not known:
        return
    *path, last = known[number % len(known)]
    owner: Any = tree
    for key in path:
        owner = owner[key]
    if what == "set":
        owner[last] = deepcopy(value)
    elif what == "drop":
        del owner[last]
    elif what == "deepen":
        for _ in range(value):
            owner[last] = {"a": owner[last]}
    elif what in ("move", "repeat"):
        other: Any = tree
        for key in known[value % len(known)]:
            other = other[key]
        owner[last] = deepcopy(other)
    elif isinstance(owner, dict):
        owner[value] = owner.pop(last) if what == "rename" else 1


# ------------------------------------------------------------------------------------------------ mistakes in bytes

STRAY = [
    b"\x00", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\xed\xa0\x80", b"\xc3", b"\t", b"\r", b"\n", b"\n\n",
    b'"', b"'", b"&a ", b"*a", b"&a [*a]", b"<<: *a\n", b"!!python/object:os.system ", b"!!binary ", b"- ", b": ", b"? ", b"{",
    b"}", b"[", b"]", b"%YAML 9\n", b"---\n", b"...\n", b"#", b"|", b">", b",", b";", b",,,", b"\\", b"\\u12", b"1e999", b"0x",
    b"nan", b"'''", b'""', b'"\n', b"x" * 70_000, b"[" * 3000,
]  # fmt: skip


@st.composite
def byte_mistake(draw: st.DrawFn) -> tuple[str, float, float, bytes]:
    """(what, where, how far, with what), places as shares of the file."""
    share = st.integers(0, 1000).map(lambda whole: whole / 1000)
    what = draw(st.sampled_from(["insert", "cut", "end", "repeat", "flip", "swap"]))
    return what, draw(share), draw(share), draw(st.sampled_from(STRAY) | st.binary(min_size=1, max_size=4))


def damage(content: bytes, mistake: tuple[str, float, float, bytes]) -> bytes:
    """The bytes with one mistake in them."""
    what, where, far, stray = mistake
    begin = int(where * len(content))
    end = min(len(content), begin + 1 + int(far * 40))
    if what == "insert":
        return content[:begin] + stray + content[begin:]
    if what == "cut":
        return content[:begin] + content[end:]
    if what == "end":
        return content[:begin]
    if what == "repeat":
        lines = content.split(b"\n")
        line = int(where * (len(lines) - 1))
        return b"\n".join([*lines[: line + 1], lines[line], *lines[line + 1 :]])
    if what == "swap":
        return content[:begin] + stray + content[end:]
    return content[:begin] + bytes(byte ^ 0x80 for byte in content[begin:end]) + content[end:]


# ---------------------------------------------------------------------------------------------------- the three kinds

_TREES = st.lists(tree_mistake(), max_size=2)
_BYTES = st.lists(byte_mistake(), max_size=1)
_OVERRIDES = st.lists(
    st.sampled_from(
        ["seed=1", "seed=-1", "stages.finetune=null", "encoder.num_layers=0", "a.b.c=1", "=", "name=", "seed={", "stages=[]"]
    ),
    max_size=1,
)


def table(rows: list[tuple[Any, Any]], format: str, header: tuple[str, str] = ("text", "label")) -> bytes:
    """The rows as a file of a format."""
    if format == ".jsonl":
        return b"".join(json.dumps(dict(zip(header, row, strict=True))).encode() + b"\n" for row in rows)
    if format == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        sink = io.BytesIO()
        try:
            columns = {name: pa.array([row[place] for row in rows]) for place, name in enumerate(header)}
        except (pa.ArrowException, UnicodeEncodeError):  # mixed types have no parquet column
            columns = {name: pa.array([ascii(row[place]) for row in rows]) for place, name in enumerate(header)}
        pq.write_table(pa.table(columns), sink)
        return sink.getvalue()
    stream = io.StringIO()
    csv.writer(stream, delimiter="\t" if format == ".tsv" else ",").writerows([header, *rows])
    return stream.getvalue().encode("utf-8", "surrogatepass")


def _dumped(tree: Any) -> bytes:
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    return text.encode("utf-8", "surrogatepass")


DATA_CSV = table(ROWS, ".csv")


@st.composite
def settings_cases(draw: st.DrawFn) -> Case:
    """A run or search file with mistakes, through either door."""
    tree = deepcopy(draw(st.sampled_from([small_search(), {"base": small_run()}, *shipped_searches()])))
    mistakes, bytes_wrong, words = draw(_TREES), draw(_BYTES), draw(_OVERRIDES)
    for mistake in mistakes:
        spoil(tree, mistake)
    content = _dumped(tree)
    for wrong in bytes_wrong:
        content = damage(content, wrong)
    door = draw(st.sampled_from(["train", "tune"]))
    files = {RUN_FILE: content, "data.csv": DATA_CSV}
    return Case("settings", door, tuple(words), files, len(mistakes) + len(bytes_wrong) + len(words))


@st.composite
def deepspeed_cases(draw: st.DrawFn) -> Case:
    """A DeepSpeed JSON with mistakes."""
    plan = deepcopy(draw(st.sampled_from(plans())))
    mistakes, bytes_wrong = draw(_TREES), draw(_BYTES)
    for mistake in mistakes:
        spoil(plan, mistake)
    content = json.dumps(plan, indent=1).encode()
    for wrong in bytes_wrong:
        content = damage(content, wrong)
    files = {RUN_FILE: _dumped({"base": small_run()}), "data.csv": DATA_CSV, "plan.json": content}
    return Case("deepspeed", "train", ("--deepspeed_config", "plan.json"), files, len(mistakes) + len(bytes_wrong))


_LABELS: list[Any] = [
    "0", "1", 0, 1, -1, -100, 1.0, 1.5, True, None, "", "nan", "pos", " pos", "POS", "1e0", 10**20, [1], {"a": 1}, "\x00",
]  # fmt: skip
_TEXTS: list[Any] = [
    "", " ", "\u200b", "nan", "x", "a b", 'say "no"', "two\nlines", "\x00", "\ud800", "é\U0001f600", "w " * 30_000, "x" * 200_000,
    5, None, ["a"],
]  # fmt: skip
_READ: list[dict[str, Any]] = [
    {"bad_rows": "skip"}, {"quoting": False}, {"labelled": False}, {"min_characters": 5}, {"min_characters": 10**6},
    {"max_documents": 1}, {"max_documents": 8, "max_eval_documents": 1}, {"keywords": ["film", "("]}, {"keywords": []},
    {"valid_share": 0.49, "test_share": 0.49}, {"long_documents": "window"}, {"long_documents": "window", "window_overlap": 29},
    {"window_overlap": 30, "long_documents": "window"}, {"text_column": "label", "label_column": "text"},
    *({"delimiter": mark} for mark in (";", "\t", "|", "a", '"', "\n")),
    *({"encoding": name} for name in ("cp1252", "utf-16", "utf-8-sig", "base64", "idna", "undefined", "utf-7", "")),
    *({"label_column": name} for name in ("label", "y", "text")),
    *({"label_names": names} for names in (["a"], ["a", "b"], ["a", "a"])),
]  # fmt: skip
"""What a corpus' settings may say about its files."""


@st.composite
def data_cases(draw: st.DrawFn) -> Case:
    """Data files with mistakes, and settings that say how they are read."""
    rarely = st.sampled_from([False] * 5 + [True])  # most of a case is right, so that one mistake is not hidden by the next
    format = draw(st.sampled_from([".csv", ".tsv", ".jsonl", ".parquet"]))
    rows: list[tuple[Any, Any]] = list(ROWS[: draw(st.sampled_from([12, 3, 1, 0])) if draw(rarely) else len(ROWS)])
    wrong_rows = draw(st.lists(st.tuples(st.sampled_from(_TEXTS), st.sampled_from(_LABELS)), max_size=2))
    rows += wrong_rows
    header = ("text", "label")
    if draw(rarely):
        header = draw(st.sampled_from([("text", "text"), ("review", "label"), ("text", "y"), ("", "")]))
    content = table(rows, format, header)
    bytes_wrong = draw(_BYTES)
    for wrong in bytes_wrong:
        content = damage(content, wrong)
    if draw(rarely):
        content = draw(st.sampled_from(_WRAPPINGS))(content)
    corpus: dict[str, Any] = {}
    for said in draw(st.lists(st.sampled_from(_READ), max_size=2)):
        corpus |= said
    name = f"data{format}"
    if draw(rarely):
        odd = [f"sub/train{format}", f"data{format}.gz", f"DATA{format.upper()}", "data.txt", "data", f"d\u00e4ta (1){format}"]
        name = draw(st.sampled_from(odd))
    files = {name: content}
    if name.startswith("sub/"):
        other = draw(st.sampled_from(["test.csv", "validation.jsonl", "train.csv", "notes.md"]))
        files[f"sub/{other}"] = DATA_CSV if other.endswith("csv") else table(ROWS, ".jsonl")
        name = "sub"
    run = small_run()
    for stage in run["stages"].values():
        stage["corpus"] = {"path": name, **corpus}
    if corpus.get("labelled") is False:
        del run["stages"]["finetune"]
    files[RUN_FILE] = _dumped({"base": run})
    return Case("data", "train", (), files, max(1, len(wrong_rows) + len(bytes_wrong) + len(corpus)))


_WRAPPINGS: list[Callable[[bytes], bytes]] = [
    gzip.compress,
    lambda whole: gzip.compress(whole)[:-9],
    lambda whole: b"\xef\xbb\xbf" + whole,
    lambda whole: whole.decode("utf-8", "replace").encode("utf-16"),
    lambda whole: whole.decode("utf-8", "replace").encode("cp1252", "replace"),
    lambda whole: whole.replace(b"\n", b"\r"),
    lambda whole: b"",
]
CASES = {"settings": settings_cases, "deepspeed": deepspeed_cases, "data": data_cases}
