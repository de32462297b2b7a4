"""Programs that start without their imports: a process that has imported everything forks them.

A start of `train.py` imports for five CPU seconds and may then work for one. Who starts hundreds asks a `Forker`, whose
server runs a program's file in a process, folder and environment of its own. Strings hash alike in all of them, and nothing
that a program leaves to the interpreter's end (atexit) happens.

    with Forker() as forker:
        rank = forker.start(["dstrain/train.py", "run.yaml"], folder, environ, folder / "log.txt")
        rank.wait(60)
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_LOOK_SECONDS = 0.01
_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "CROSS_RANK", "CROSS_SIZE")


def surroundings() -> dict[str, str]:
    """The environment of a rank on a CPU, but for its place among the others."""
    kept = {name: value for name, value in os.environ.items() if name not in _PLACE}
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "DS_ACCELERATOR": "cpu"}
    return kept | quiet | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class Forked:
    """A program under way; as much of `subprocess.Popen` as its users need."""

    def __init__(self, forker: Forker, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._forker = forker

    def poll(self) -> int | None:
        """The exit status, -N after signal N, None while it runs."""
        if self.returncode is None:
            self.returncode = self._forker.ask({"of": self.pid})
        return self.returncode

    def wait(self, seconds: float) -> int:
        """The exit status. Raises TimeoutExpired."""
        deadline = time.monotonic() + seconds
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", seconds)
            time.sleep(_LOOK_SECONDS)
        return status

    def send_signal(self, number: int) -> None:
        """Sends a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)


class Forker:
    """Starts programs for as long as it is open; those that still run are killed when it closes."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=surroundings(), cwd=ROOT,
        )  # fmt: skip
        self._asked = 0
        self._started: list[Forked] = []

    def __enter__(self) -> Forker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(
        self, program: Sequence[object], folder: Path, environ: Mapping[str, str], out: Path, err: Path | None = None
    ) -> Forked:
        """Runs `program`, a file of Python and its words, in `folder`; what it says is appended to `out` and `err`."""
        told = {"program": [*map(str, program)], "folder": str(folder), "environ": dict(environ)}
        started = Forked(self, int(self.ask({**told, "out": str(out), "err": str(err or out)})))
        self._started.append(started)
        return started

    def ask(self, what: dict[str, Any]) -> Any:
        """The server's answer."""
        assert self._server.stdin is not None and self._server.stdout is not None
        self._asked += 1
        self._server.stdin.write(json.dumps([self._asked, what]) + "\n")
        self._server.stdin.flush()
        mark = f"[{self._asked}, "
        for answer in self._server.stdout:  # before it: libraries' words, and what somebody asked who was interrupted
            if answer.startswith(mark):
                return json.loads(answer)[1]
        raise RuntimeError("the process that starts programs has died")

    def kill_all(self) -> None:
        """Kills what was started and still runs."""
        for started in self._started:
            started.send_signal(signal.SIGKILL)
        for started in self._started:
            started.wait(30)
        self._started.clear()

    def close(self) -> None:
        """Ends the server, and with it what still runs."""
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.close()
        try:
            self._server.wait(30)
        except subprocess.TimeoutExpired:  # somebody else holds the other end open
            self._server.kill()
            self._server.wait()
        self._server.stdout.close()


# ------------------------------------------------------------------------------------------------------ the server


def serve() -> None:
    """Answers lines of standard input: a program to start with its process id, {"of": id} with an exit status."""
    from dstrain.engine import preload

    preload()
    import mlflow.store.tracking.sqlalchemy_store
    import mlflow.tracking  # noqa: F401

    from dstrain import run, settings, stopping, tracking, train, vitals  # noqa: F401

    for line in sys.stdin:
        number, asked = json.loads(line)
        answer = _status(asked["of"]) if "of" in asked else _start(**asked)
        print(json.dumps([number, answer]), flush=True)


def _status(pid: int) -> int | None:
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def _start(program: list[str], folder: str, environ: dict[str, str], out: str, err: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        _take_place(folder, environ, out, err)
        status = _run(program)
    finally:
        os._exit(status)


def _take_place(folder: str, environ: dict[str, str], out: str, err: str) -> None:
    from dstrain.tune.rank import die_with_parent

    die_with_parent()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    said = [os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644) for name in (out, err)]
    for target, source in enumerate((os.open(os.devnull, os.O_RDONLY), *said)):
        os.dup2(source, target, inheritable=True)
        os.close(source)
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(folder)


def _run(program: list[str]) -> int:
    """The exit status of a program that does not end the process itself."""
    sys.argv[:] = program
    status: object = None
    try:
        runpy.run_path(program[0], run_name="__main__")
    except SystemExit as end:
        status = end.code
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    if not isinstance(status, int | None):
        print(status, file=sys.stderr)
        status = 1
    sys.stdout.flush(), sys.stderr.flush()
    return status or 0


if __name__ == "__main__":
    sys.path[:] = [str(ROOT), *(entry for entry in sys.path if Path(entry or ".").resolve() != ROOT / "benchmarks")]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever asks, whose end is ours
    serve()
    os._exit(0)  # without the second in which all that was imported is put away
