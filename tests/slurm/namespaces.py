"""A real SLURM of three nodes on this machine: munge, slurmctld and slurmd, each node in namespaces of its own.

A node has its own host name, address, process space, /tmp and /dev/shm; the folders named as shared are its NFS. No
route leads out of the cluster. Everything hangs on one process: when that ends, nothing of the cluster is left.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

HERE = Path(__file__).resolve().parent
PACKAGES = ("slurm-wlm", "munge", "iproute2", "util-linux")
PROGRAMS = ("slurmctld", "slurmd", "munged", "ip", "unshare", "nsenter")
UNSHARE = ("unshare", "--fork", "--kill-child", "--pid", "--mount-proc", "--net", "--uts", "--ipc", "--mount")
LISTENING = "0A"  # the state's number in /proc/net/tcp
SLURMD_PORT = 6818
FINAL = {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY"}

SLURM_CONF = """\
ClusterName=namespaces
SlurmctldHost=login(10.77.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits as long as a credential lives, and a second.
AuthInfo=socket={folder}/munge/munge.socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/log/slurmctld.pid
SlurmdPidFile={folder}/log/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
SlurmdPort={port}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
GresTypes=gpu
MpiDefault=none
ReturnToService=2
SlurmdTimeout=20
KillWait=10
MinJobAge=3600
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
"""


def missing() -> str | None:
    """Why no such cluster can be had here, as a sentence; None when it can. Installs Debian's packages first."""
    if os.geteuid() != 0:
        return "a SLURM of our own needs root"
    if not all(map(shutil.which, PROGRAMS)):
        if not shutil.which("apt-get"):
            return f"a SLURM of our own needs Debian's packages {' '.join(PACKAGES)}, and there is no apt-get"
        environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for words in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *PACKAGES]):
            done = subprocess.run(["apt-get", *words], env=environ, capture_output=True, text=True)
            if done.returncode:
                return f"apt-get {words[0]} fails: {' '.join(done.stderr.split())[-300:]}"
    trial = "mount --make-rprivate / && ip link add bridge0 type bridge && ip link add cable type veth peer name eth0"
    done = subprocess.run([*UNSHARE, "sh", "-c", trial], capture_output=True, text=True)
    return f"namespaces are not permitted here: {done.stderr.strip()}" if done.returncode else None


def end_with_parent() -> None:
    """Run in a child before its program: it is killed when its parent ends, however that ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def wait_until(what: str, true: Callable[[], object], seconds: float) -> None:
    """Returns once `true()` is; fails with the sentence after that many seconds."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {what}")
        time.sleep(0.1)


def alive(process: psutil.Process) -> bool:
    """Whether a process does anything; one that nobody has buried does not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


@dataclass
class Node:
    """One node while it is powered."""

    name: str
    init: psutil.Process
    power: subprocess.Popen[bytes]

    def processes(self) -> list[psutil.Process]:
        """Whatever runs on the node, but for what makes it a node."""
        own = [child for child in self.init.children() if child.name() in ("slurmd", "sleep")]
        space = os.readlink(f"/proc/{self.init.pid}/ns/pid")
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.NoSuchProcess):
                here = os.readlink(f"/proc/{process.pid}/ns/pid") == space
                if here and process != self.init and process not in own and alive(process):
                    found.append(process)
        return found

    def ports(self) -> set[int]:
        """TCP ports that somebody listens on, slurmd's own left out."""
        found = set()
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/{self.init.pid}/net/{table}").read_text().splitlines()[1:]:
                _, local, _, state, *_ = line.split()
                if state == LISTENING:
                    found.add(int(local.rpartition(":")[2], 16))
        return found - {SLURMD_PORT}


@dataclass
class Slurm:
    """The running cluster. `folder` and all of `shared` are seen by every node."""

    folder: Path
    shared: Sequence[Path]
    number: int = 3
    cpus: int = 4
    memory_mb: int = 6000
    gpus: int = 2
    nodes: dict[str, Node] = field(default_factory=dict)

    def __enter__(self) -> Slurm:
        self._write_files()
        words = [*UNSHARE, "bash", str(HERE / "controller.sh"), str(self.folder)]
        with (self.folder / "log" / "controller.out").open("wb") as log:
            self._power = subprocess.Popen(words, stdout=log, stderr=log, preexec_fn=end_with_parent)
        try:
            self._login = self._child(self._power.pid, "bash")
            wait_until("slurmctld answers", lambda: self.on_login("scontrol", "ping", check=False).returncode == 0, 20)
            for number in self._numbers():
                self.power_on(f"n{number}")
            wait_until("all nodes idle", lambda: self.idle() == self.number, 30)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._power.kill()
        self._power.wait()
        for node in self.nodes.values():
            node.power.wait()

    def _write_files(self) -> None:
        for part in ("state", "log", "munge", "dev", *(f"spool/n{n}" for n in self._numbers())):
            (self.folder / part).mkdir(parents=True)
        for number in self._numbers():
            own_tmp = self.folder / "nodes" / f"n{number}" / "tmp"
            own_tmp.mkdir(parents=True)
            own_tmp.chmod(0o1777)
        (self.folder / "munge").chmod(0o711)
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(1024))
        hosts = ["127.0.0.1 localhost", "10.77.0.1 login", *(f"{self._address(n)} n{n}" for n in self._numbers())]
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")
        conf, gres = [SLURM_CONF.format(folder=self.folder, port=SLURMD_PORT)], []
        for number in self._numbers():
            for gpu in range(self.gpus):  # SLURM counts a GPU only where its device file exists
                (self.folder / "dev" / f"n{number}-gpu{gpu}").touch()
            gres.append(f"NodeName=n{number} Name=gpu File={self.folder}/dev/n{number}-gpu[0-{self.gpus - 1}]\n")
            conf.append(
                f"NodeName=n{number} NodeAddr={self._address(number)} CPUs={self.cpus} RealMemory={self.memory_mb} "
                f"Gres=gpu:{self.gpus} State=UNKNOWN\n"
            )
        common = "Nodes=ALL DefaultTime=10 MaxTime=600 State=UP"
        conf.append(f"PartitionName=all {common} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60\n")
        conf.append(f"PartitionName=urgent {common} PriorityTier=2 PreemptMode=OFF\n")
        (self.folder / "slurm.conf").write_text("".join(conf))
        (self.folder / "gres.conf").write_text("".join(gres))

    def _address(self, number: int) -> str:
        return f"10.77.0.{10 + number}"

    def _numbers(self) -> range:
        return range(1, self.number + 1)

    def _child(self, pid: int, name: str) -> psutil.Process:
        """The child of that name, once it is there."""
        found: list[psutil.Process] = []

        def started() -> bool:
            found[:] = [child for child in psutil.Process(pid).children() if child.name() == name]
            return bool(found)

        try:
            wait_until(f"{name} started", started, 10)
        except (AssertionError, psutil.NoSuchProcess) as error:
            said = "".join(path.read_text() for path in (self.folder / "log").glob("*.out"))
            raise AssertionError(f"{error}: {said}") from None
        return found[0]

    def power_on(self, name: str) -> None:
        """Starts a node."""
        address = self._address(int(name[1:]))
        words = ["bash", str(HERE / "node.sh"), str(self.folder), name, address, str(self.folder), *map(str, self.shared)]
        with (self.folder / "log" / f"node.{name}.out").open("ab") as log:
            power = subprocess.Popen([*self._enter(), *UNSHARE, *words], stdout=log, stderr=log)
        init = self._child(self._child(power.pid, "unshare").pid, "bash")
        self.nodes[name] = Node(name, init, power)
        cable = f"ip link add {name} type veth peer name eth0 netns {self.nodes[name].init.pid}"
        for command in (cable, f"ip link set {name} master bridge0 up"):
            subprocess.run(["nsenter", "-t", str(self._login.pid), "-n", *command.split()], check=True)

    def power_off(self, name: str) -> None:
        """Cuts a node's power: all its processes are gone at once, and nobody is told. Its /tmp was in memory."""
        node = self.nodes.pop(name)
        node.init.kill()
        node.power.wait()
        for left in (self.folder / "nodes" / name / "tmp").glob("d[0-9]*"):
            shutil.rmtree(left)

    def _enter(self) -> list[str]:
        return ["nsenter", "-t", str(self._login.pid), "-m", "-u", "-i", "-n", "-p"]

    def on_login(
        self, *words: str, cwd: Path = HERE, environ: Mapping[str, str] | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command on the login node, in a folder and with variables added to ours."""
        env = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf"), **(environ or {})}
        enter = [*self._enter(), f"--wd={cwd}"]
        done = subprocess.run([*enter, *words], env=env, capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
        return done

    def idle(self) -> int:
        """How many nodes have nothing to do."""
        return len(self.on_login("sinfo", "-h", "-N", "-p", "all", "-t", "idle", "-o", "%N", check=False).stdout.split())


@dataclass
class Job:
    """A submitted job."""

    slurm: Slurm
    number: str

    @classmethod
    def submit(cls, slurm: Slurm, cwd: Path, *words: str, environ: Mapping[str, str]) -> Job:
        """`sbatch WORDS` from a folder; SLURM hands the environment on to the job."""
        return cls(slurm, slurm.on_login("sbatch", "--parsable", *words, cwd=cwd, environ=environ).stdout.strip())

    def field(self, name: str) -> str:
        """A field of `scontrol show job`."""
        shown = self.slurm.on_login("scontrol", "show", "job", self.number, "-o").stdout
        found = re.search(rf"\b{name}=(\S+)", shown)
        assert found, f"{name} is not in {shown}"
        return found[1]

    def said(self) -> str:
        """What the job has printed so far."""
        path = Path(self.field("StdOut"))
        return path.read_text(errors="replace") if path.exists() else ""

    def wait(self, seconds: float) -> str:
        """Waits for the job's end and returns its state."""
        self.until(f"job {self.number} ended", lambda: self.field("JobState") in FINAL, seconds)
        return self.field("JobState")

    def until(self, what: str, true: Callable[[], object], seconds: float) -> None:
        """Waits; what the job has said goes with the failure."""
        try:
            wait_until(what, true, seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.field('JobState')}\n{self.said()}") from None

    def signal(self, *words: str) -> None:
        """`scancel WORDS JOB`."""
        self.slurm.on_login("scancel", *words, self.number)
