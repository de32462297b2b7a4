"""A process that has imported everything forks starts that import next to nothing."""

from __future__ import annotations

from pathlib import Path

from conftest import ROOT
from distributed.test_ranks import end_of, start_ranks, write_run

from benchmarks.forker import Forker

COUNTING = """\
import os, runpy, sys
before, leave = {*sys.modules}, os._exit

def count(status):
    print("imported:", *sorted({*sys.modules} - before), flush=True)
    leave(status)

os._exit = count
sys.argv[:] = [sys.argv[1], *sys.argv[2:]]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_forked_start_imports_next_to_nothing(small_corpus: Path, tmp_path: Path, forker: Forker) -> None:
    """212 modules were half of the CPU time of a small one (1.17 s to .58). Seats of trials call the same `preload`."""
    script = tmp_path / "counting.py"
    script.write_text(COUNTING)
    file = write_run(small_corpus, tmp_path, "run", stages__finetune=None, stages__pretrain__steps=2)
    done = end_of(start_ranks(forker, 1, tmp_path, script, ROOT / "dstrain/train.py", file), tmp_path)
    assert done.returncode == 0, done.stderr
    _, counted, imported = done.stdout.partition("imported:")
    assert counted and len(imported.split()) < 50 and "setuptools" not in imported, imported
