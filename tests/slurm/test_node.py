"""The agent's own parts, with real processes and files, without a SLURM."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

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


def attempt(folder: Path, restart: str = "0") -> Any:
    return node.Attempt(folder, "77", restart, "n1", ("n1",))


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Makes the agent of one of a job's two nodes. Its Ray is played by a script that says a word and waits."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    others = set(psutil.Process().children())
    monkeypatch.setattr(node, "own_address", lambda attempt: "127.0.0.1")

    def make(name: str = "n1", restart: str = "0", word: str = "Ray runtime started") -> Any:
        player = tmp_path / "python"
        player.write_text(f"#!/bin/sh\necho {word}\nexec sleep 60\n")
        player.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(player))
        return node.Agent(node.Attempt(tmp_path, "77", restart, name, ("n1", "n2")), 60.0, tmp_path)

    yield make
    for child in set(psutil.Process().children()) - others:
        child.kill()
        child.wait()
    for number, handler in handlers.items():
        signal.signal(number, handler)


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
    assert node.Share.of({"CUDA_VISIBLE_DEVICES": "0,1"}).gpus == 0, "that is of the shell, and nothing SLURM gave"
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


def test_gpus_that_slurm_did_not_give_are_hidden(agent: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "1")
    assert agent()._environ["CUDA_VISIBLE_DEVICES"] == "0"
    monkeypatch.delenv("SLURM_GPUS_ON_NODE")
    assert agent()._environ["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize("word", ["Ray runtime started", "nothing yet"])
def test_a_stop_while_nodes_come_up_ends_all_with_come_back(tmp_path: Path, agent: Callable[..., Any], word: str) -> None:
    """Whether the other node is waited for or Ray itself; and the other node does not wait for the first any longer."""
    lead, asked = agent(word=word), threading.Timer(0.5, attempt(tmp_path).write, ["stop"])
    asked.start()
    began = time.monotonic()
    assert lead.lead(["true"], None, False) == node.SAVED_COME_BACK
    assert attempt(tmp_path).path("status").read_text() == "75"
    assert agent("n2").follow() == 0
    assert time.monotonic() - began < 10, "of 60 seconds of patience"


def test_a_stop_that_comes_before_the_command_can_hear_it_is_not_lost(tmp_path: Path, agent: Callable[..., Any]) -> None:
    here = attempt(tmp_path)
    here.write("up.n2")
    began = time.monotonic()
    threading.Timer(2.0, here.write, ["stop"]).start()
    assert agent().lead(["sleep", "30"], None, False) == node.SAVED_COME_BACK
    assert 1.5 < time.monotonic() - began < 15


def test_a_command_is_told_once_that_it_is_to_stop(tmp_path: Path, agent: Callable[..., Any]) -> None:
    here = attempt(tmp_path)
    here.write("up.n2")
    counts = "n=0; trap 'n=$((n + 1))' USR1; touch stop.77.0; for _ in $(seq 20); do sleep 0.1; done; exit $n"
    assert agent().lead(["sh", "-c", f"cd {tmp_path}; {counts}"], None, False) == 1


def test_a_lost_head_counts_once_however_many_nodes_see_it(
    tmp_path: Path, agent: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho $@ >>{tmp_path}/asked\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for restart in range(node.HEADS + 1):
        for name in ("n2", "n3"):
            agent(name, str(restart))._requeue("the head is gone")
    assert (tmp_path / "asked").read_text() == "requeue 77\n" * node.HEADS
    said = capsys.readouterr().out
    assert said.count("the head is gone; asked SLURM to start the job again\n") == node.HEADS
    assert said.count("for the 4th time; not started again, the same sbatch line goes on\n") == 1


def test_a_path_becomes_a_database_of_its_own_and_an_address_is_left_as_it_is(
    tmp_path: Path, agent: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And neither the server's command line nor what is said of it has the password."""
    monkeypatch.chdir(tmp_path)
    here, address = attempt(tmp_path), "postgresql://me:se/cr@t@host/runs"
    agent()
    file = node.MlflowServer(here, {}, "runs/own.db")
    assert file._environ["MLFLOW_BACKEND_STORE_URI"] == f"sqlite:///{tmp_path}/runs/own.db"
    assert f"--backend-store-uri sqlite:///{tmp_path}/runs/own.db --host" in file.successor()
    server = node.MlflowServer(here, {}, address)
    assert server._environ["MLFLOW_BACKEND_STORE_URI"] == address
    assert "cr@t" not in " ".join(psutil.Process(server._process.pid).cmdline()) + server.successor()
    assert not list(tmp_path.glob("postgresql*"))


def test_a_server_that_dies_is_started_again_on_its_port(
    tmp_path: Path, agent: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    agent()
    server = node.MlflowServer(attempt(tmp_path), {}, str(tmp_path / "own.db"))
    first, address = server._process, server.address
    server.revive()
    first.kill()
    first.wait()
    server.revive()
    assert server._process is first, "not at once: one that cannot live would die all the time"
    monkeypatch.setattr(node, "REVIVE_SECONDS", 0.0)
    server.revive()
    assert server._process is not first and server.address == address and not server.has_died()
    assert capsys.readouterr().out.count("MLflow's server has died; starting it again") == 1


def test_outside_a_job_it_says_how_it_is_started(tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    words = [sys.executable, str(AGENT), str(tmp_path / "job"), "--", "true"]
    done = subprocess.run(words, env=environ, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "cluster/node.py: not in a step of a SLURM job; start it with: sbatch cluster/tune.sbatch"
    )
    assert not (tmp_path / "job").exists()
