"""A rank that dies takes the run down soon, with its own error before anybody else's."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT
from test_ranks import BIN, LAUNCHED, _environ, write_run

from dstrain.engine import free_port

VICTIM = """\
import os, signal, sys, time
sys.path.insert(0, {root!r})
from dstrain import healing, loop
rank, taken = int(os.environ["RANK"]), 0

def die():
    {death}

learn = healing.Attempt.learn
def dying(self, number, piece):
    global taken
    taken += 1
    if rank == {rank} and taken == 4:
        die()
    if rank != {rank} and {busy} and taken == 4:
        time.sleep(120)
    return learn(self, number, piece)
healing.Attempt.learn = dying
from dstrain.train import main
status = main()
sys.stdout.flush(), sys.stderr.flush()
os._exit(status)
"""
DEATHS = {
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "gone": "os._exit(7)",
    "raised": 'raise RuntimeError("the ranks own error")',
}


def run_until_death(
    folder: Path, run: Path, launcher: str, death: str, rank: int, busy: bool = False
) -> tuple[float, int, str]:
    """(seconds from the death to the end of the last rank, exit status, all that was said)."""
    script = folder / "victim.py"
    mark = folder / "died"
    code = f"open({str(mark)!r}, 'w').close(); {DEATHS[death]}"
    script.write_text(VICTIM.format(root=str(ROOT), death=code, rank=rank, busy=busy))
    environ = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "DSTRAIN_TEST_MARK": str(script)}
    environ["PATH"] = f"{BIN}{os.pathsep}{environ['PATH']}"
    port, words = str(free_port()), [str(script), str(run)]
    starters = {
        "torchrun": [[str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", port, *words]],
        "deepspeed": [[str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", port, *words]],
        "nobody": [[sys.executable, *words]] * 2,
    }
    said = folder / "said"
    with said.open("w") as sink:
        started = [
            subprocess.Popen(
                starter, cwd=folder, stdout=sink, stderr=sink,
                env=environ if launcher != "nobody" else environ
                | {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "MASTER_PORT": port},
            )
            for number, starter in enumerate(starters[launcher])
        ]  # fmt: skip
        try:
            deadline = time.monotonic() + 120
            while not mark.exists() and time.monotonic() < deadline:
                time.sleep(0.1)
            assert mark.exists(), said.read_text()
            died = time.monotonic()
            statuses = [process.wait(60) for process in started]
            left = [one for one in psutil.process_iter() if str(script) in _environ(one).values()]
            psutil.wait_procs(left, timeout=60)
            return time.monotonic() - died, max(map(abs, statuses)), said.read_text()
        finally:
            for process in [one for one in psutil.process_iter() if str(script) in _environ(one).values()]:
                process.send_signal(signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "death", "rank"),
    [
        ("torchrun", "killed", 1),
        ("torchrun", "raised", 0),
        ("deepspeed", "killed", 0),
        ("deepspeed", "raised", 1),
        ("nobody", "gone", 1),
        ("nobody", "killed", 0),
        ("nobody", "raised", 1),
    ],
)
def test_the_others_end_soon_and_say_little(
    launcher: str, death: str, rank: int, small_corpus: Path, tmp_path: Path
) -> None:
    run = write_run(small_corpus, tmp_path, "run", stages__finetune=None)
    seconds, status, said = run_until_death(tmp_path, run, launcher, death, rank)
    assert seconds < 30 and status != 0, said
    ours = re.sub(r"(?s)\[rank\d\]:.*?\n", "", said)
    if death == "raised":
        assert said.count("the ranks own error") >= 1
        after = said[said.index("the ranks own error"):]
        assert f"rank {rank} was lost" not in said[: said.index("the ranks own error")]
        assert "Connection" not in said[: said.index("the ranks own error")], said
        assert after.count(f"rank {rank} was lost") <= 1
    assert ours.count("was lost") <= 1 and "Connection closed by peer" not in said, said
    assert said.count("Traceback") <= (1 if death == "raised" else 0) + (launcher == "torchrun"), said


@pytest.mark.slow
def test_a_rank_that_waits_for_no_other_is_ended_too(small_corpus: Path, tmp_path: Path) -> None:
    """Busy for minutes without a word to its peers, as behind a collective of NCCL; nobody started it who could end it."""
    run = write_run(small_corpus, tmp_path, "run", stages__finetune=None)
    seconds, status, said = run_until_death(tmp_path, run, "nobody", "killed", 1, busy=True)
    assert seconds < 30 and status != 0, said
    assert said.count("rank 0 ends: rank 1 was lost; its own error stands above or in its log") == 1, said
