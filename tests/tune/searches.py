"""Searches of tiny runs, and looking at what they leave behind. Shared by the tests of this folder."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from conftest import ROOT, tiny_run

from dstrain.schema import dump_yaml


def search_file(corpus: Path, folder: Path, space: dict[str, Any], **changes: Any) -> Path:
    """A YAML of a search over `tiny_run` without its pretraining."""
    tree = tiny_run(corpus, folder / "runs", **{"stages__pretrain": None, "tracking__enabled": True, **changes})
    file = folder / "search.yaml"
    search = {"metric": "finetune/valid/f1_macro", "max_failures": 1}
    file.write_text(dump_yaml({"base": tree, "space": space, "search": search}))
    return file


MARK = {"DSTRAIN_TEST": str(os.getpid())}
"""In the environment of every process that these tests start, and of all below: others may run a Ray of their own."""


def tune(file: Path, *overrides: str, check: int | None = 0) -> subprocess.CompletedProcess[str]:
    """`python -m dstrain.tune` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "dstrain.tune", str(file), *overrides], capture_output=True, text=True, cwd=ROOT,
        timeout=500, env=os.environ | MARK,
    )  # fmt: skip
    assert check is None or done.returncode == check, done.stdout + done.stderr
    return done


def our_processes() -> list[psutil.Process]:
    """Live processes that these tests have started, directly or not."""
    found = []
    for process in psutil.process_iter(["status"]):
        with contextlib.suppress(psutil.Error):
            marked = process.environ().get("DSTRAIN_TEST") == MARK["DSTRAIN_TEST"]
            if marked and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def begin(file: Path, *overrides: str) -> subprocess.Popen[str]:
    """A search in the background, in a process group of its own as a terminal would start it."""
    return subprocess.Popen(
        [sys.executable, "-m", "dstrain.tune", str(file), *overrides],
        cwd=ROOT, env=os.environ | MARK, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def wait_for(what: Callable[[], object], searching: subprocess.Popen[str] | None, seconds: float = 240) -> None:
    """Until something has happened; a search that ends before is a failure."""
    deadline = time.monotonic() + seconds
    while not what():
        assert searching is None or searching.poll() is None, searching and searching.communicate()[0]
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def ranks_of(trial: str) -> list[psutil.Process]:
    """The rank processes of a trial: those that hold its log open."""
    found = []
    for process in our_processes():
        with contextlib.suppress(psutil.Error):
            if any(f"/{trial}/train.log" in file.path for file in process.open_files()):
                found.append(process)
    return found
