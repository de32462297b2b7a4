"""Searches of tiny runs, and looking at what they leave behind. Shared by the tests of this folder."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
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
