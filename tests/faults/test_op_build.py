"""The first start on a machine compiles DeepSpeed's op; one that is killed there must not make the next ones wait for ever."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


def start(folder: Path) -> subprocess.Popen[str]:
    environ = {**os.environ, "TORCH_EXTENSIONS_DIR": str(folder), "DS_ACCELERATOR": "cpu", "MAX_JOBS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "dstrain.engine"], env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


@pytest.mark.slow
def test_a_start_killed_while_it_compiles_leaves_nothing_to_wait_for(tmp_path: Path) -> None:
    """It leaves a lock file that torch would wait for; the next start compiles, and one beside it says that it waits."""
    baton = tmp_path / "deepspeed_shm_comm" / "lock"
    first = start(tmp_path)
    deadline = time.monotonic() + 120
    while not baton.exists() and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert baton.exists(), first.communicate()
    time.sleep(1)  # the compiler is at work
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert baton.exists() and not list(baton.parent.glob("*.so")), "killed half way"
    both = [start(tmp_path), start(tmp_path)]
    said = [each.communicate(timeout=500) for each in both]
    assert [each.returncode for each in both] == [0, 0], said
    assert all("DeepSpeed is ready" in out for out, _ in said)
    assert sum("waiting for another process that compiles DeepSpeed's op" in err for _, err in said) == 1, said
    assert not baton.exists()
