"""A rank that dies takes the run down soon, with its own error before anybody else's."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ROOT
from test_ranks import BIN, _environ, end_of, marked, start_ranks, write_run

from benchmarks.forker import Forked, Forker, surroundings
from dstrain.engine import free_port
from dstrain.lifeline import Lifeline

VICTIM = """\
import os, signal, sys, time
sys.path.insert(0, {root!r})
from dstrain import healing, loop
rank, taken = int(os.environ["RANK"]), 0

def die():
    {death}

learn = healing.Attempt.learn
def dying(self, *given):
    global taken
    taken += 1
    if rank == {rank} and taken == 4:
        die()
    if rank != {rank} and {busy} and taken == 4:
        time.sleep(120)
    return learn(self, *given)
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


Run = Callable[..., tuple[float, int, str]]


@pytest.fixture
def run_until_death(forker: Forker, tmp_path: Path) -> Iterator[Run]:
    """Runs two ranks of which one dies: (seconds from the death to the end of the last rank, exit status, all they said)."""
    script, mark, said = tmp_path / "victim.py", tmp_path / "died", tmp_path / "said"

    def ours() -> list[psutil.Process]:
        return [process for process in psutil.process_iter() if str(script) in _environ(process).values()]

    def run(file: Path, launcher: str, death: str, rank: int, busy: bool = False) -> tuple[float, int, str]:
        code = f"open({str(mark)!r}, 'w').close(); {DEATHS[death]}"
        script.write_text(VICTIM.format(root=str(ROOT), death=code, rank=rank, busy=busy))
        started = start(launcher, file)
        deadline = time.monotonic() + 120
        while not mark.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert mark.exists(), said.read_text()
        died = time.monotonic()
        statuses = [process.wait(60) for process in started]
        psutil.wait_procs(ours(), timeout=60)
        return time.monotonic() - died, max(map(abs, statuses)), said.read_text()

    def start(launcher: str, file: Path) -> Sequence[Forked | subprocess.Popen[bytes]]:
        port = str(free_port())
        if launcher == "nobody":
            place = {**surroundings(), "WORLD_SIZE": "2", "MASTER_PORT": port}
            ranks = [place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
            return [forker.start([script, file], tmp_path, rank, said) for rank in ranks]
        starter = {"torchrun": ["torchrun", "--nproc_per_node"], "deepspeed": ["deepspeed", "--num_accelerators"]}[launcher]
        command = [str(BIN / starter[0]), starter[1], "2", "--master_port", port, str(script), str(file)]
        with said.open("w") as sink:
            return [subprocess.Popen(command, cwd=tmp_path, env=marked(str(script)), stdout=sink, stderr=sink)]

    yield run
    for process in ours():
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
    launcher: str, death: str, rank: int, small_corpus: Path, tmp_path: Path, run_until_death: Run
) -> None:
    file = write_run(small_corpus, tmp_path, "run", stages__finetune=None)
    seconds, status, said = run_until_death(file, launcher, death, rank)
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
def test_a_rank_that_waits_for_no_other_is_ended_too(small_corpus: Path, tmp_path: Path, run_until_death: Run) -> None:
    """Busy for minutes without a word to its peers, as behind a collective of NCCL; nobody started it who could end it."""
    file = write_run(small_corpus, tmp_path, "run", stages__finetune=None)
    seconds, status, said = run_until_death(file, "nobody", "killed", 1, busy=True)
    assert seconds < 30 and status != 0, said
    assert said.count("rank 0 ends: rank 1 was lost; its own error stands above or in its log") == 1, said


PATIENT = """\
import os, time
from dstrain.engine import join_ranks, leave_ranks
ranks = join_ranks(timeout_minutes={minutes})
print("joined", flush=True)
with ranks.first() as mine:
    if mine:
        time.sleep({seconds})
print("waited", flush=True)
leave_ranks()
"""


@pytest.mark.slow
def test_ranks_wait_for_what_the_first_one_does_longer_than_for_each_other(tmp_path: Path, forker: Forker) -> None:
    """As where it has more text to tokenise than anybody would wait for a rank that does not come."""
    script = tmp_path / "patient.py"
    script.write_text(PATIENT.format(minutes=0.4, seconds=30))
    done = end_of(start_ranks(forker, 2, tmp_path, script), tmp_path)
    assert (done.stdout, done.stderr, done.returncode) == ("joined\nwaited\n" * 2, "", 0)


@pytest.mark.slow
@pytest.mark.parametrize("dies", [0, 1])
def test_a_rank_that_dies_is_missed_at_once_by_one_that_would_wait_for_a_day(
    dies: int, tmp_path: Path, forker: Forker
) -> None:
    script = tmp_path / "dying.py"
    code = PATIENT.format(minutes=2, seconds=3)
    script.write_text(code.replace("with ranks", f"if ranks.rank == {dies}:\n    time.sleep(3), os._exit(7)\nwith ranks"))
    ranks = start_ranks(forker, 2, tmp_path, script)
    assert ranks[dies].wait(120) == 7
    died = time.monotonic()
    assert ranks[1 - dies].wait(60), (tmp_path / f"rank{1 - dies}.err").read_text()
    assert time.monotonic() - died < 15


# ------------------------------------------------------------------------------------------------ machines that vanish


@dataclass
class Threads:
    """Ranks that are threads of this process."""

    world: int
    rank: int = 0
    said: dict[int, Any] = field(default_factory=dict)
    meeting: Any = None

    def gather(self, value: Any) -> list[Any]:
        """As `Ranks.gather`."""
        self.said[self.rank] = value
        self.meeting.wait()
        found = [self.said[rank] for rank in range(self.world)]
        self.meeting.wait()
        return found

    def agree(self, value: Any) -> Any:
        """As `Ranks.agree`."""
        return self.gather(value)[0]


def test_the_kernel_asks_after_the_other_side_on_every_link() -> None:
    said, meeting = dict[int, Any](), threading.Barrier(3)
    lines: dict[int, Lifeline] = {}

    def tie(rank: int) -> None:
        lines[rank] = Lifeline(Threads(3, rank, said, meeting))  # type: ignore[arg-type]

    ties = [threading.Thread(target=tie, args=(rank,)) for rank in range(3)]
    for one in ties:
        one.start()
    for one in ties:
        one.join(30)
    links = [link for line in lines.values() for link in line._links.values()]
    assert len(links) == 4, "two at the first rank, one at each other"
    for link in links:
        assert link.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        tcp = [getattr(socket, f"TCP_{name}") for name in ("KEEPIDLE", "KEEPINTVL", "KEEPCNT", "USER_TIMEOUT")]
        idle, interval, count, unanswered = (link.getsockopt(socket.IPPROTO_TCP, option) for option in tcp)
        assert idle + interval * count <= 20 and unanswered <= 20_000
    for line in lines.values():
        line.leave()


ALONE = """\
import json, os, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from dstrain import lifeline
folder, lifeline.GRACE_SECONDS = Path({folder!r}), 0.0

class Machines:
    rank, world = int(sys.argv[1]), 2

    def gather(self, value):
        return ["n0", "n1"]

    def agree(self, value):
        file = folder / "agreed"
        if self.rank == 0:
            file.with_suffix(".draft").write_text(json.dumps(value))
            file.with_suffix(".draft").rename(file)
        while not file.exists():
            time.sleep(0.05)
        return json.loads(file.read_text())

sys.stdin.readline()
tied = lifeline.Lifeline(Machines(), lambda status: os._exit(10 + tied.lost))
print("tied", flush=True)
time.sleep(120)
"""


@pytest.mark.slow
def test_a_machine_that_vanishes_is_missed_within_half_a_minute(tmp_path: Path) -> None:
    """Two ranks in network spaces of their own, and a cable that is cut: no connection is closed, nobody is told."""
    if os.geteuid() or not all(map(shutil.which, ("ip", "unshare", "nsenter"))):
        pytest.skip("network spaces need root, iproute2 and util-linux")
    script = tmp_path / "rank.py"
    script.write_text(ALONE.format(root=str(ROOT), folder=str(tmp_path)))
    ranks = [
        subprocess.Popen(
            ["unshare", "--net", sys.executable, str(script), str(rank)], text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "MASTER_ADDR": "10.99.0.1"},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        own = os.readlink("/proc/self/ns/net")
        while any(os.readlink(f"/proc/{process.pid}/ns/net") == own for process in ranks):
            time.sleep(0.05)

        def on(rank: int, words: str) -> None:
            subprocess.run(["nsenter", "-t", str(ranks[rank].pid), "-n", "ip", *words.split()], check=True)

        first, second = (process.pid for process in ranks)
        cable = f"ip link add eth0 netns {first} type veth peer name eth0 netns {second}"
        made = subprocess.run(cable.split(), capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"no cable: {made.stderr.strip()}")
        for rank in range(2):
            on(rank, f"addr add 10.99.0.{rank + 1}/24 dev eth0")
            on(rank, "link set eth0 up")
        for process in ranks:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        assert [process.stdout.readline() for process in ranks if process.stdout] == ["tied\n"] * 2
        for rank in range(2):  # what is sent goes to a machine that there is not
            on(rank, f"neigh replace 10.99.0.{2 - rank} lladdr 02:00:00:00:00:99 dev eth0 nud permanent")
        cut = time.monotonic()
        assert [process.wait(40) for process in ranks] == [11, 10], "each has missed the other"
        assert 5 < time.monotonic() - cut < 30
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
