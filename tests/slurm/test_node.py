"""The agent's own parts, with real processes and files, without a SLURM."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import psutil
import pytest
from conftest import ROOT

AGENT = ROOT / "cluster" / "node.py"


def load() -> ModuleType:
    """cluster/node.py as a module; the folder is no package."""
    spec = importlib.util.spec_from_file_location("node_agent", AGENT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["node_agent"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


node = load()


def attempt(folder: Path, restart: str = "0") -> object:
    return node.Attempt(folder, "77", restart, "n1", ("n1",))


def test_only_the_standard_library_is_imported() -> None:
    words = [sys.executable, "-I", "-X", "importtime", str(AGENT), "--help"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    names = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines() if "import time:" in line}
    assert "argparse" in names and not names & {"ray", "torch", "numpy", "psutil", "dstrain", "mlflow"}


def test_the_share_is_what_slurm_gave() -> None:
    cpus = len(os.sched_getaffinity(0))
    given = {"SLURM_CPUS_ON_NODE": "1", "SLURM_GPUS_ON_NODE": "2", "SLURM_MEM_PER_NODE": "3000"}
    assert node.Share.of(given) == node.Share(1, 2, 3000)
    assert node.Share.of({"SLURM_CPUS_ON_NODE": "999"}) == node.Share(cpus, 0, None), "never more than we may run on"
    assert node.Share.of({"SLURM_MEM_PER_CPU": "500", "SLURM_STEP_GPUS": "0,3"}) == node.Share(cpus, 2, 500 * cpus)
    assert node.Share(4, 1, 1000).flags() == ["--num-cpus", "4", "--num-gpus", "1", "--memory", str(1000 * 2**20 - 10**8)]
    assert node.Share(4, 1, None).flags() == ["--num-cpus", "4", "--num-gpus", "1"]


def test_a_token_is_ours_alone_and_a_file_is_whole(tmp_path: Path) -> None:
    here = attempt(tmp_path)
    assert not here.has("token")
    path = here.write("token", "secret", 0o600)
    assert path.name == "token.77.0" and path.stat().st_mode & 0o777 == 0o600 and path.read_text() == "secret"
    assert here.has("token") and not attempt(tmp_path, "1").has("token"), "a restart begins with nothing"
    assert [entry.name for entry in tmp_path.iterdir()] == ["token.77.0"]


def test_a_private_folder_goes_and_takes_those_of_killed_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = Path("/tmp") / f"p{os.getpid()}"
    base.mkdir()
    try:
        monkeypatch.setenv("TMPDIR", str(base))
        stale, foreign = base / "d77.0-gone", base / "d78.0-alive"
        stale.mkdir()
        foreign.mkdir()
        with node.private_folder(attempt(tmp_path, "1")) as folder:
            assert folder.parent == base and folder.stat().st_mode & 0o777 == 0o700
            (folder / "session").mkdir()
        assert sorted(base.iterdir()) == [foreign]
        monkeypatch.setenv("TMPDIR", str(tmp_path / ("long" * 10)))
        with node.private_folder(attempt(tmp_path, "1")) as folder:
            assert folder.parent == Path("/tmp"), "a socket's path must fit"
    finally:
        for left in base.glob("*"):
            left.rmdir()
        base.rmdir()


def test_a_port_that_is_taken_is_not_given() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert node.free_port("127.0.0.1", port) != port
        assert node.answers(f"127.0.0.1:{port}")
    assert node.free_port("127.0.0.1", port) == port
    assert not node.answers(f"127.0.0.1:{port}")


AGENT_WITH_FAMILY = """
import importlib.util, subprocess, sys, time
spec = importlib.util.spec_from_file_location("node_agent", sys.argv[1])
node = sys.modules["node_agent"] = importlib.util.module_from_spec(spec); spec.loader.exec_module(node)
node.adopt_orphans()
# A child that leaves a grandchild behind in a session of its own, and one that ignores SIGTERM.
left = "import subprocess; print(subprocess.Popen(['sleep', '600'], start_new_session=True, stdout=-3).pid, flush=True)"
subprocess.run([sys.executable, "-c", left])
deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
print(node.start([sys.executable, "-c", deaf], {}).pid, flush=True)
sys.stdin.readline()
node.kill_below()
print("below", node.below(__import__("os").getpid()), flush=True)
"""


def test_nothing_outlives_the_agent() -> None:
    """Orphans in a session of their own and children that are deaf to SIGTERM are killed."""
    words = [sys.executable, "-c", AGENT_WITH_FAMILY, str(AGENT)]
    agent = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert agent.stdout
    said = [agent.stdout.readline().strip() for _ in range(3)]
    pids = [int(word) for word in said if word.isdigit()]
    assert len(pids) == 2 and all(psutil.pid_exists(pid) for pid in pids)
    rest, _ = agent.communicate("\n", timeout=20)
    assert "below []" in rest and agent.returncode == 0
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_what_the_agent_started_ends_when_it_is_killed() -> None:
    code = AGENT_WITH_FAMILY.replace("signal.signal(signal.SIGTERM, signal.SIG_IGN); ", "")
    agent = subprocess.Popen([sys.executable, "-c", code, str(AGENT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert agent.stdout
    said = [agent.stdout.readline().strip() for _ in range(3)]
    orphan, child = sorted(int(word) for word in said if word.isdigit())
    try:
        agent.send_signal(signal.SIGKILL)
        agent.wait()
        deadline = time.monotonic() + 10
        while psutil.pid_exists(child) and psutil.Process(child).status() != "zombie" and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie"
    finally:
        os.kill(orphan, signal.SIGKILL)


def test_outside_a_job_it_says_how_it_is_started(tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    words = [sys.executable, str(AGENT), str(tmp_path / "job"), "--", "true"]
    done = subprocess.run(words, env=environ, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "cluster/node.py: not in a step of a SLURM job; start it with: sbatch cluster/tune.sbatch"
    )
    assert not (tmp_path / "job").exists()
