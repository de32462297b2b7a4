"""Locks between processes: one at a time, told when it takes long, gone with their holder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dstrain.data import locking
from dstrain.data.locking import locked
from dstrain.schema import UserError

HOLDER = (
    "import sys, time; from pathlib import Path; from dstrain.data.locking import locked\n"
    "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
)


def test_who_waits_is_told_once_and_a_killed_holder_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locking._soon, "__defaults__", (0.1,))
    file = tmp_path / "a.lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(file)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    told: list[str] = []

    def waiting() -> None:
        told.append("waiting")
        os.kill(holder.pid, signal.SIGKILL)

    with locked(file, waiting):
        assert told == ["waiting"]
    holder.wait()
    holder.stdout.close()
    with locked(file, waiting):
        assert told == ["waiting"], "nobody else is there"


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="the cache cannot be written"), locked(tmp_path / "file" / "a.lock"):
        pass
