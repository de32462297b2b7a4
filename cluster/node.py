"""One node's part of a Ray cluster that lives and dies with one SLURM job; `srun` starts it once per node.

    srun --ntasks-per-node=1 python cluster/node.py FOLDER -- COMMAND...

The first node leads: it makes the token, starts Ray's head, waits for the others, runs COMMAND with RAY_ADDRESS set and
exits with its status. The others follow: they start Ray's workers and leave when COMMAND has ended. The nodes meet
through small files in FOLDER, which all of them must see. Every node prints one sentence per event.

Nothing that is not ours is touched: no `ray stop`, no default port, no default folder, no address "auto". All that this
process starts, and all that is orphaned below it, is killed when it ends.

    FOLDER/stop.ATTEMPT      made by the batch script on SIGUSR1: COMMAND gets SIGUSR1, saves and exits with 75;
                             where it has not begun, it does not begin, and 75 is what is said for it
    FOLDER/status.ATTEMPT    COMMAND's exit status, whatever srun makes of it
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.util
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SAVED_COME_BACK = 75
POLL_SECONDS = 0.2
GRACE_SECONDS = 5.0
REJOINS = 3
HEADS = 3
DATABASE = "runs/mlflow.db"  # where nobody names another
REVIVE_SECONDS = 30.0  # an MLflow server that cannot live dies no more often than this
OBJECT_STORE_BYTES = 100_000_000  # trials hand Ray a few numbers; weights and text go through files
LONGEST_TMP = 30  # characters; Ray adds 70 to a socket's path, and the kernel takes 107
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36

RAY_ENVIRON = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # of 30, which is all the time SLURM gives between TERM and KILL
    "RAY_gcs_rpc_server_reconnect_timeout_s": "15",  # of 60: how long a worker waits for a head that is gone
    "RAY_memory_monitor_refresh_ms": "0",  # it would kill our trials for the memory of other people on the host
    # A node that falls silent is given up after half a minute; by default it takes more than one.
    "RAY_health_check_period_ms": "2000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "4",
}


# ------------------------------------------------------------------------------------------ the job, seen from here


@dataclass(frozen=True)
class Attempt:
    """One start of a SLURM job, seen from one of its nodes, and the files through which its nodes meet."""

    folder: Path
    job: str
    restart: str
    node: str
    nodes: tuple[str, ...]

    @classmethod
    def here(cls, folder: Path, environ: Mapping[str, str]) -> Attempt:
        """Reads SLURM's variables."""
        nodes = hostnames(environ["SLURM_JOB_NODELIST"])
        restart = environ.get("SLURM_RESTART_COUNT", "0")
        return cls(folder, environ["SLURM_JOB_ID"], restart, environ["SLURMD_NODENAME"], nodes)

    def path(self, word: str) -> Path:
        """A file of this attempt: `word.JOB.RESTART`."""
        return self.folder / f"{word}.{self.job}.{self.restart}"

    def has(self, word: str) -> bool:
        """Whether a file of this attempt is there. Reads the folder: an NFS client long remembers that a name was absent."""
        return self.path(word).name in os.listdir(self.folder)

    def write(self, word: str, text: str = "", mode: int = 0o644) -> Path:
        """Makes a file of this attempt, whole or not at all."""
        path = self.path(word)
        draft = path.with_name(f"{path.name}.{self.node}.draft")
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w") as stream:
            stream.write(text)
        draft.rename(path)
        return path

    def say(self, sentence: str) -> None:
        """One event, for the job's log."""
        with contextlib.suppress(OSError):  # srun may be gone; what is still to be ended here is not
            print(f"{time.strftime('%H:%M:%S')} {self.node}: {sentence}", flush=True)


def hostnames(listed: str) -> tuple[str, ...]:
    """SLURM's `n[1-3]` in full."""
    done = subprocess.run(["scontrol", "show", "hostnames", listed], capture_output=True, text=True, check=True)
    return tuple(done.stdout.split())


@dataclass(frozen=True)
class Share:
    """What SLURM gave us of this node."""

    cpus: int
    gpus: int
    memory_mb: int | None

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Share:
        """Reads SLURM's variables and this process's CPUs, whichever is less."""
        bound = len(os.sched_getaffinity(0))
        cpus = min(bound, int(environ.get("SLURM_CPUS_ON_NODE", bound)))
        listed = environ.get("SLURM_STEP_GPUS", "")  # not CUDA_VISIBLE_DEVICES: it may be of the shell that submitted
        gpus = int(environ.get("SLURM_GPUS_ON_NODE") or len(listed.split(",") if listed else []))
        per_cpu = int(environ.get("SLURM_MEM_PER_CPU", "0")) * cpus
        return cls(cpus, gpus, int(environ.get("SLURM_MEM_PER_NODE", "0")) or per_cpu or None)

    def flags(self) -> list[str]:
        """As `ray start` takes it."""
        memory_bytes = (self.memory_mb or 0) * 2**20 - OBJECT_STORE_BYTES
        memory = ["--memory", str(memory_bytes)] if memory_bytes > 0 else []
        return ["--num-cpus", str(self.cpus), "--num-gpus", str(self.gpus), *memory]

    def describe(self) -> str:
        """In words."""
        return f"{self.cpus} CPUs, {self.gpus} GPUs" + (f", {self.memory_mb} MB" if self.memory_mb else "")


def own_address(attempt: Attempt) -> str:
    """The address by which the job's other nodes reach this one: that of the interface that leads to them.

    A host's own name often stands for 127.0.1.1 in /etc/hosts, so it is asked only where there is no other node.
    """
    for other in attempt.nodes:
        if other != attempt.node:
            with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect((other, 9))  # which sends nothing
                return str(probe.getsockname()[0])
    return socket.gethostbyname(socket.gethostname())


def free_port(address: str, wanted: int = 0) -> int:
    """`wanted` when nobody listens there, else any free TCP port."""
    with socket.socket() as probe:
        try:
            probe.bind((address, wanted))
        except OSError:
            probe.bind((address, 0))
        return int(probe.getsockname()[1])


def answers(address: str) -> bool:
    """Whether somebody listens at HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError:
        return False
    return True


# ----------------------------------------------------------------------------------------------------- processes


def start(words: Sequence[str], environ: Mapping[str, str], log: Path | None = None) -> subprocess.Popen[bytes]:
    """Starts a program that is told to end when this process ends, however that ends.

    One with a log of its own serves in the background, deaf to SIGUSR1 as we are. Any other hears it from its first moment:
    it would be lost before the program has a handler, and the program would go on as if nobody had asked.
    """
    libc = ctypes.CDLL(None)

    def prepare() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if log is None:
            signal.signal(signal.SIGUSR1, signal.SIG_DFL)

    with contextlib.ExitStack() as files:
        out = files.enter_context(open(log, "ab")) if log else None
        return subprocess.Popen(
            words, env=environ, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=log is not None,
            preexec_fn=prepare,
        )  # fmt: skip


def adopt_orphans() -> None:
    """Makes this process the parent of whatever is orphaned below it, so that nothing gets out of `kill_below`."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def below(pid: int) -> list[int]:
    """All processes under `pid`, dead ones that were not yet buried included."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                # The name in brackets may hold anything; state and parent come after it.
                after = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
                children.setdefault(int(after[1]), []).append(int(entry))
    found = list(children.get(pid, []))
    for child in found:
        found += children.get(child, [])
    return found


def kill_below(seconds: float = 10.0) -> None:
    """Kills every process under this one, and buries them."""
    deadline = time.monotonic() + seconds
    while (pids := below(os.getpid())) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.02)


def ended_within(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Waits for a process, but not for ever."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    return process.returncode is not None


@contextlib.contextmanager
def private_folder(attempt: Attempt) -> Iterator[Path]:
    """A folder on this node that only we can read, gone afterwards; what a killed earlier attempt left goes with it."""
    given = Path(os.environ.get("TMPDIR", "/tmp"))
    base = given if len(str(given)) <= LONGEST_TMP and given.is_dir() else Path("/tmp")
    for old in base.glob(f"d{attempt.job}.*-*"):
        if not old.name.startswith(f"d{attempt.job}.{attempt.restart}-"):
            shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"d{attempt.job}.{attempt.restart}-", dir=base))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# --------------------------------------------------------------------------------------------------------- MLflow


class MlflowServer:
    """A tracking server on this node's loopback while the job runs, on a database that outlives it."""

    def __init__(self, attempt: Attempt, environ: Mapping[str, str], database: str) -> None:
        """`database` is the path of a SQLite file, or the address of any database that MLflow takes."""
        self._attempt = attempt
        self._is_file = "://" not in database
        file = Path(database if self._is_file else DATABASE).absolute()  # of an address only the folder counts
        file.parent.mkdir(parents=True, exist_ok=True)
        self._store = f"sqlite:///{file}" if self._is_file else database
        # Files go to the shared disk directly, where they are found as well when no server runs.
        self._artifacts = (file.parent / "mlflow-artifacts").as_uri()
        self._environ = {
            **environ,
            "MLFLOW_BACKEND_STORE_URI": self._store,  # on the command line anybody could read its password
            # Its job runner for language models is four more processes, with files in /dev/shm that a kill leaves there.
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        self._port = free_port("127.0.0.1", 40_000 + int(attempt.job) % 20_000)  # after a requeue mostly the same
        self.address = f"127.0.0.1:{self._port}"
        self._start()

    def _start(self) -> None:
        words = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self._port), "--workers", "1",
            "--no-serve-artifacts", "--default-artifact-root", self._artifacts,
        ]  # fmt: skip
        self._process, self._started = start(words, self._environ, self._attempt.path("mlflow")), time.monotonic()

    def has_died(self) -> bool:
        """Whether its process is gone."""
        return self._process.poll() is not None

    def revive(self) -> None:
        """Starts one that has died again, on the same port. Readings wait in the run folders meanwhile."""
        if self.has_died() and time.monotonic() - self._started > REVIVE_SECONDS:
            self._attempt.say("MLflow's server has died; starting it again, readings wait in the run folders")
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # what is left of it may hold the port
            self._start()

    def end(self) -> None:
        """Ends it."""
        self._process.terminate()
        ended_within(self._process, GRACE_SECONDS)

    def successor(self) -> str:
        """The command that shows the same pages at the same address once this server is gone."""
        program = Path(sys.executable).with_name("mlflow")
        store = shlex.quote(self._store) if self._is_file else '"$MLFLOW_DB"'  # which may have a password in it
        return f"{program} ui --backend-store-uri {store} --host 127.0.0.1 --port {self._port}"


# ------------------------------------------------------------------------------------------------------ the agent


class Agent:
    """What this node does from the job's start to its end."""

    def __init__(self, attempt: Attempt, patience_seconds: float, tmp: Path) -> None:
        self._attempt, self._patience, self._tmp = attempt, patience_seconds, tmp
        self._share = Share.of(os.environ)
        self._ended = False
        self._last_word = "status"  # a file that ends all waiting: the command has ended
        own = {"RAY_AUTH_TOKEN_PATH": str(attempt.path("token")), "TMPDIR": str(tmp)}
        self._environ = {**os.environ, **RAY_ENVIRON, **own}
        self._environ.pop("RAY_ADDRESS", None)  # of another cluster of this user's
        if not self._share.gpus:  # where SLURM does not shut them off, we would work on those of others
            self._environ["CUDA_VISIBLE_DEVICES"] = ""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # the batch script's affair; it makes the file `stop`

    def _end(self, number: int, frame: object) -> None:
        self._ended = True

    def _over(self) -> bool:
        """Whether there is nothing to wait for any more."""
        return self._ended or self._attempt.has(self._last_word)

    def _waited(self, true: Callable[[], object], seconds: float) -> bool:
        """Waits until `true()` is; False when that took too long or all is over."""
        deadline = time.monotonic() + seconds
        while not self._over() and time.monotonic() < deadline:
            if true():
                return True
            time.sleep(POLL_SECONDS)
        return False

    # ------------------------------------------------------------------------------------------------- Ray

    def _start_ray(self, *role: str) -> subprocess.Popen[bytes]:
        """`ray start --block` with ports, folder and resources of our own."""
        words = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats",
            "--log-style=record", "--include-log-monitor=false", "--temp-dir", str(self._tmp),
            "--node-name", self._attempt.node, "--node-ip-address", own_address(self._attempt),
            "--object-store-memory", str(OBJECT_STORE_BYTES), "--min-worker-port=0", "--max-worker-port=0",
            f"--dashboard-agent-listen-port={free_port('')}",
            *self._share.flags(), *role,
        ]  # fmt: skip
        self._log.touch()
        self._log_offset = self._log.stat().st_size
        return start(words, self._environ, self._log)

    @property
    def _log(self) -> Path:
        return self._attempt.path(f"ray.{self._attempt.node}")

    def _is_up(self, ray: subprocess.Popen[bytes]) -> bool:
        """Waits for `ray start`'s word that this node's Ray is known to the head."""

        def said() -> bytes:
            with self._log.open("rb") as stream:
                stream.seek(self._log_offset)
                return stream.read()

        up = self._waited(lambda: ray.poll() is not None or b"Ray runtime started" in said(), self._patience)
        if up and ray.poll() is None:
            return True
        if not self._over():
            end = b"\n    ".join(said().strip().splitlines()[-8:]).decode(errors="replace")
            self._attempt.say(f"Ray does not start; the last words of {self._log}:\n    {end}")
        return False

    def _requeue(self, why: str) -> None:
        """Asks SLURM to start the job again: with --no-kill it keeps a job whose head is gone running for nothing.

        Every node sees the same loss; the first to write it down asks.
        """
        try:
            self._attempt.path("head-lost").touch(exist_ok=False)
        except FileExistsError:
            self._attempt.say(f"{why}; leaving")
            return
        losses = sum(name.startswith("head-lost.") for name in os.listdir(self._attempt.folder))
        if losses > HEADS:
            self._attempt.say(f"{why}, for the {losses}th time; not started again, the same sbatch line goes on")
            return
        done = subprocess.run(["scontrol", "requeue", self._attempt.job], capture_output=True, text=True)
        refused = f", which SLURM refuses: {done.stderr.strip()}" if done.returncode else ""
        self._attempt.say(f"{why}; asked SLURM to start the job again{refused}")

    # ---------------------------------------------------------------------------------------------- follow

    def follow(self) -> int:
        """Runs Ray's worker until the first node's command has ended; returns this node's exit status."""
        if not self._waited(lambda: self._attempt.has("address"), self._patience) and not self._over():
            head = self._attempt.nodes[0]
            self._attempt.say(f"no word from {head}, which leads, for {self._patience:g} s; leaving")
            return 1
        if self._over():
            self._attempt.say("leaving")
            return 0
        address = self._attempt.path("address").read_text()
        for left in range(REJOINS, -1, -1):
            self._serve(address)
            if self._over():
                self._attempt.say("leaving")
                return 0
            kill_below()
            if not answers(address):
                self._requeue(f"Ray's head at {address} is gone")
                return 1
            self._attempt.say("Ray has died here; " + ("joining again" if left else "leaving, the others go on"))
        return 1

    def _serve(self, address: str) -> None:
        """Runs Ray's worker until it dies, the command has ended, or this node is to end."""
        ray = self._start_ray("--address", address)
        if self._is_up(ray):
            self._attempt.write(f"up.{self._attempt.node}")
            self._attempt.say(f"Ray's worker is up: {self._share.describe()}")
            self._waited(lambda: ray.poll() is not None, float("inf"))

    # ------------------------------------------------------------------------------------------------ lead

    def lead(self, command: Sequence[str], database: str | None, dashboard: bool) -> int:
        """Runs Ray's head, then the command; returns the command's exit status."""
        self._last_word = "stop"  # until the command runs: then it is the command's to hear
        status, server = 1, MlflowServer(self._attempt, self._environ, database) if database else None
        try:
            status = self._lead(command, server, dashboard)
        finally:
            self._attempt.write("status", str(status))
            self._attempt.path("token").unlink(missing_ok=True)
            if server:
                server.end()
        return status

    def _lead(self, command: Sequence[str], server: MlflowServer | None, dashboard: bool) -> int:
        self._attempt.write("token", secrets.token_hex(32), 0o600)
        host = own_address(self._attempt)
        address = f"{host}:{free_port(host)}"
        ray = self._start_ray("--head", f"--port={address.rpartition(':')[2]}", *self._doors(dashboard))
        up = self._is_up(ray)
        if up:
            self._attempt.write("address", address)
            self._attempt.say(f"Ray's head is up at {address}: {self._share.describe()}")
            self._wait_for_others()
            server = self._told_of(server) if server else None
        if self._ended:
            return 128 + signal.SIGTERM
        if self._attempt.has("stop"):
            self._attempt.say("asked to stop before anything began")
            return SAVED_COME_BACK
        if not up:
            return 1
        status = self._run(command, {**self._environ, "RAY_ADDRESS": address}, ray, server)
        self._attempt.say(f"the command has ended with {status}")
        if server:
            self._attempt.say(f"MLflow's server ends with the job; its links work again with: {server.successor()}")
        return status

    def _doors(self, dashboard: bool) -> list[str]:
        """The dashboard on loopback or not at all; Ray's client server, where there is one, off its default port."""
        if dashboard and importlib.util.find_spec("aiohttp_cors") is None:
            self._attempt.say("no dashboard without its packages: pip install 'ray[default]'")
            dashboard = False
        flags = [f"--include-dashboard={str(dashboard).lower()}"]
        if dashboard:
            port = free_port("127.0.0.1", 20_000 + int(self._attempt.job) % 20_000)
            flags += ["--dashboard-host=127.0.0.1", f"--dashboard-port={port}"]
            self._attempt.say(f"Ray's dashboard: http://127.0.0.1:{port}, on this node only")
        if importlib.util.find_spec("grpc"):
            flags.append(f"--ray-client-server-port={free_port('')}")
        return flags

    def _wait_for_others(self) -> None:
        others = [node for node in self._attempt.nodes if node != self._attempt.node]

        def missing() -> list[str]:
            return [node for node in others if not self._attempt.has(f"up.{node}")]

        if self._waited(lambda: not missing(), self._patience):
            self._attempt.say(f"all {len(self._attempt.nodes)} nodes are up")
        elif not self._over():
            late = ", ".join(missing())
            self._attempt.say(
                f"not up within {self._patience:g} s: {late}; going on without, until they are up "
                f"(PATIENCE=600 waits longer, where a trial needs them)"
            )

    def _run(
        self, command: Sequence[str], environ: Mapping[str, str], ray: subprocess.Popen[bytes], server: MlflowServer | None
    ) -> int:
        """The command to its end: told to save when the job is to stop, killed when Ray or the job is gone."""
        running, told = start(command, environ), False
        while running.poll() is None and not self._ended:
            if ray.poll() is not None:
                running.kill()
                running.wait()
                self._requeue("Ray's head has died")
                return 1
            if not told and self._attempt.has("stop"):
                told = True
                self._attempt.say("asked to stop: the command gets SIGUSR1")
                running.send_signal(signal.SIGUSR1)
            if server:
                server.revive()
            time.sleep(POLL_SECONDS)
        if self._ended and not ended_within(running, GRACE_SECONDS):  # scancel has told it as it told us
            running.kill()
            running.wait()
        if running.returncode == -signal.SIGUSR1:  # it was too young to hear, and had nothing to save
            return SAVED_COME_BACK
        return running.returncode if running.returncode >= 0 else 128 - running.returncode

    def _told_of(self, server: MlflowServer) -> MlflowServer | None:
        """Waits for the server and has the command told of it; None where it does not start.

        The command is told of one that is late as well: readings wait in the run folders until it answers.
        """
        up = self._waited(lambda: server.has_died() or answers(server.address), self._patience)
        if self._over():
            return None
        if server.has_died():
            self._attempt.say(f"MLflow's server does not start, see {self._attempt.path('mlflow')}; going on without it")
            return None
        self._attempt.say(f"MLflow is {'up' if up else 'late'} at http://{server.address}, on this node only")
        self._environ["MLFLOW_TRACKING_URI"] = f"http://{server.address}"
        return server


# ---------------------------------------------------------------------------------------------------- command line


def parser() -> argparse.ArgumentParser:
    """The command line."""
    words = argparse.ArgumentParser(prog="cluster/node.py", description="One node of a Ray cluster inside a SLURM job.")
    words.add_argument("folder", type=Path, metavar="FOLDER", help="where the job's nodes meet; on a shared disk")
    words.add_argument("command", nargs="+", metavar="COMMAND", help="what the first node runs, after --")
    words.add_argument("--patience", type=float, default=120, metavar="SECONDS", help="how long to wait for other nodes")
    words.add_argument("--mlflow", action="store_true", help="run an MLflow server meanwhile, on the database $MLFLOW_DB")
    words.add_argument("--dashboard", action="store_true", help="run Ray's dashboard on the first node's loopback")
    return words


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    given = parser().parse_args(argv)
    if "SLURM_PROCID" not in os.environ:
        print("cluster/node.py: not in a step of a SLURM job; start it with: sbatch cluster/tune.sbatch", file=sys.stderr)
        return 2
    given.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    attempt = Attempt.here(given.folder.absolute(), os.environ)
    adopt_orphans()
    with private_folder(attempt) as tmp:
        agent = Agent(attempt, given.patience, tmp)
        try:
            if os.environ["SLURM_PROCID"] == "0":
                database = os.environ.get("MLFLOW_DB", DATABASE) if given.mlflow else None
                return agent.lead(given.command, database, given.dashboard)
            return agent.follow()
        finally:
            kill_below()


if __name__ == "__main__":
    sys.exit(main())
