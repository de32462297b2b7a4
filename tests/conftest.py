"""What many tests share: a cache of their own, the shared corpora, and a small real corpus that any machine can make."""

from __future__ import annotations

import csv
import inspect
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

if TYPE_CHECKING:
    from benchmarks.forker import Forker
    from dstrain.engine import Ranks
    from dstrain.readings import Reading
    from dstrain.run import Outcome
    from dstrain.settings import RunSettings

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = Path(os.environ.get("DSTRAIN_DATA") or ROOT.parent / "shared" / "data")

# One thread per process: tests start several processes on machines with few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Other jobs may have the machine for a while, so that no example's time says anything.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests neither read nor fill the user's cache of tokenised text."""
    before = os.environ.get("DSTRAIN_CACHE")
    os.environ["DSTRAIN_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["DSTRAIN_CACHE"]
    else:
        os.environ["DSTRAIN_CACHE"] = before


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real corpora beside the project."""
    if not (SHARED_DATA / "README.md").exists():
        pytest.skip(f"no corpora at {SHARED_DATA}; set DSTRAIN_DATA")
    return SHARED_DATA


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train, validation and test CSV: 120 docstrings of the standard library, classes `text` and `net`."""
    import argparse
    import email.message
    import http.client
    import pathlib
    import string
    import textwrap
    import urllib.request

    families = {"text": (string, textwrap, argparse, pathlib), "net": (email.message, http.client, urllib.request)}
    rows = []
    for label, modules in families.items():
        texts = [text for module in modules for text in _docstrings(module)]
        assert len(texts) >= 60
        rows += [(text, label) for text in texts[:60]]
    folder = tmp_path_factory.mktemp("corpus")
    for name, chosen in {"train": rows[0::2], "validation": rows[1::4], "test": rows[3::4]}.items():
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([("text", "label"), *chosen])
    return folder


@pytest.fixture(scope="session")
def fork_server() -> Iterator[Forker]:
    """Starts programs without the seconds that their imports take; one process for all tests that ask for it."""
    from benchmarks.forker import Forker

    with Forker() as one:
        yield one


@pytest.fixture
def forker(fork_server: Forker) -> Iterator[Forker]:
    """The same, and nothing that a test has started outlives it."""
    yield fork_server
    fork_server.kill_all()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no mount: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)  # a database may still be open


def _docstrings(module: Any) -> list[str]:
    """The longer docstrings of a module, its classes and their methods, in a fixed order."""
    found = {}
    for name, value in sorted(vars(module).items()):
        members = [(name, value), *(sorted(vars(value).items()) if inspect.isclass(value) else [])]
        for inner, member in members:
            doc = inspect.getdoc(member) if callable(member) else None
            if doc and len(doc) > 40:
                found.setdefault(doc, inner)
    return list(found)


def tiny_run(corpus: Path, output_dir: Path, **changes: Any) -> dict[str, Any]:
    """A `base` of two stages (mlm, classify) that trains in a second or two; `changes` are dotted addresses with `__`."""
    from dstrain.schema import set_path

    tree: dict[str, Any] = {
        "name": "tiny",
        "output_dir": str(output_dir),
        "vocabulary": {"size": 300},
        "encoder": {
            "preset": "bert_tiny", "num_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "qkv_size": 32,
            "attention": {"kind": "sdpa"},
        },
        "stages": {
            "pretrain": {
                "objective": {"kind": "mlm"}, "corpus": {"path": str(corpus), "labelled": False}, "max_length": 64,
                "tokens_per_batch": 512, "steps": 6, "report_every": 3, "evaluate_every_steps": 3, "optim": {"lr": 3e-3},
            },
            "finetune": {
                "objective": {"kind": "classify"}, "corpus": {"path": str(corpus)}, "max_length": 64, "tokens_per_batch": 512,
                "steps": 8, "report_every": 2, "evaluate_every_steps": 4, "optim": {"lr": 3e-3},
            },
        },
        "tracking": {"enabled": False},
    }  # fmt: skip
    for address, value in changes.items():
        set_path(tree, address.replace("__", "."), value)
    return tree


# ------------------------------------------------------------------------------------- runs in this very process


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    """One rank, in this process; the launcher's variables are gone afterwards, so that other processes may start."""
    import torch

    from dstrain.engine import join_ranks

    before = dict(os.environ)
    torch.set_num_threads(1)
    yield join_ranks()
    os.environ.clear()
    os.environ.update(before)


@dataclass
class Told:
    """What a run told while it worked, and what it came to."""

    settings: RunSettings
    readings: list[Reading] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    outcome: Outcome | None = None

    def losses(self, stage: str, split: str = "train") -> list[float]:
        """The losses of a stage in the order told."""
        return [found.values["loss"] for found in self.readings if (found.stage, found.split) == (stage, split)]


def train_here(
    tree: dict[str, Any], ranks: Ranks, asked_to_stop: Callable[[], bool] = lambda: False, told: Told | None = None,
    patiently: bool = False, told_to_stop: Callable[[], bool] = lambda: False,
) -> Told:  # fmt: skip
    """`claim` and `run` (or `run_patiently`) as the door calls them, readings.jsonl included; `told` is filled even when the
    run raises."""
    from dstrain.readings import JsonLines, fan_out
    from dstrain.run import Watch, claim, run, run_patiently
    from dstrain.schema import validate
    from dstrain.settings import RunSettings

    settings = validate(RunSettings, tree, "test")
    told = Told(settings) if told is None else told
    told.settings = settings
    claim(settings, told.sentences.append)
    report = fan_out(JsonLines(settings.folder), told.readings.append)
    watch = Watch(report, told.sentences.append, told.tags.update, asked_to_stop, told_to_stop)
    told.outcome = (run_patiently if patiently else run)(settings, ranks, watch)
    return told
