"""What a run was made from: the code's commit and diff, the machine, the installed packages, the command line.

Everything is read from files, package metadata and git, so no heavy library is imported and no GPU is initialised.
Environment variables are taken from a list of names: what is not on it, and whatever sounds like a secret, stays out.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstrain.schema import dump_yaml

UNKNOWN = "unknown"
DIFF_LIMIT_BYTES = 1 << 20
PATIENCE_SECONDS = 10
VARIABLES = re.compile(
    r"CUDA_VISIBLE_DEVICES|CUDA_HOME|LD_PRELOAD|MASTER_ADDR|MASTER_PORT|(LOCAL_|NODE_)?RANK|(LOCAL_)?WORLD_SIZE|TMPDIR|"
    r"(OMP|MKL|OPENBLAS|RAYON)_NUM_THREADS|PYTHONHASHSEED|PYTHONPATH|TOKENIZERS_PARALLELISM|"
    r"(CUBLAS|DS|DSTRAIN|GLOO|HF|NCCL|PYTORCH|SLURM|TORCH|TORCHINDUCTOR|TRITON)_\w+"
)
SECRETS = re.compile(r"TOKEN(?!IZERS)|SECRET|PASSW|CREDENTIAL|COOKIE|AUTH|KEY", re.IGNORECASE)


@dataclass(frozen=True)
class Evidence:
    """Facts that a reader of the results needs to make the run again.

    `commit` is the full hash or "unknown"; `dirty` says that `diff` (against the commit, cut at 1 MiB) or `untracked`
    (new files of the code folder) is not empty; `device` and `world_size` are what the caller trains on.
    """

    commit: str
    dirty: bool
    diff: str
    untracked: tuple[str, ...]
    machine: Mapping[str, Any]
    packages: Mapping[str, str]
    command: tuple[str, ...]
    variables: Mapping[str, str]
    device: str
    world_size: int

    def tags(self) -> dict[str, str]:
        """The facts worth a column in a table of runs."""
        return {
            "git_commit": self.commit,
            "git_dirty": str(self.dirty).lower(),
            "device": self.device,
            "world_size": str(self.world_size),
            "host": str(self.machine["host"]),
        }

    def write(self, folder: Path) -> list[Path]:
        """Writes `environment.txt` (readable as YAML) and, for changed code, `code.diff`; returns the paths.

        Raises OSError when the folder cannot be written.
        """
        environment = folder / "environment.txt"
        environment.write_text(dump_yaml(self._environment()), encoding="utf-8")
        diff = folder / "code.diff"
        if not self.diff:
            diff.unlink(missing_ok=True)  # of an earlier attempt in the same folder
            return [environment]
        diff.write_text(self.diff, encoding="utf-8")
        return [environment, diff]

    def _environment(self) -> dict[str, Any]:
        return {
            "command": list(self.command),
            "code": {"commit": self.commit, "dirty": self.dirty, "untracked": list(self.untracked)},
            "device": self.device,
            "world_size": self.world_size,
            "machine": dict(self.machine),
            "variables": dict(self.variables),
            "packages": dict(self.packages),
        }


def collect(
    code: Path, *, device: str = "cpu", world_size: int = 1, environ: Mapping[str, str] = os.environ
) -> Evidence:
    """Collects the evidence of this process; `code` is the folder that holds the source. Takes well under a second.

    Never raises: without git, outside a repository or in one that does not track `code`, the commit is "unknown".
    """
    commit, diff, untracked = _code(code)
    return Evidence(
        commit=commit,
        dirty=bool(diff or untracked),
        diff=diff,
        untracked=untracked,
        machine=_machine(),
        packages=_packages(),
        command=(sys.executable, *sys.argv),
        variables=_variables(environ),
        device=device,
        world_size=world_size,
    )


def _variables(environ: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value for name, value in sorted(environ.items()) if VARIABLES.fullmatch(name) and not SECRETS.search(name)
    }


@functools.cache
def _packages() -> dict[str, str]:
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name:  # a half-removed package has a folder and no name
            found.setdefault(name.lower(), distribution.version)
    return dict(sorted(found.items()))


# ----------------------------------------------------------------------------------------------------- git


def _code(code: Path) -> tuple[str, str, tuple[str, ...]]:
    """(commit, diff, untracked files) of the folder; ("unknown", "", ()) when no repository tracks it."""
    commit = _git(code, "rev-parse", "--verify", "HEAD").strip()
    # An installed package may lie in a .venv inside somebody's repository, whose commit says nothing about it.
    if not commit or not _git(code, "ls-files", "--", "."):
        return UNKNOWN, "", ()
    # Relative to the folder: a dirty file elsewhere in the repository does not change what runs here.
    diff = _git(code, "diff", "--no-ext-diff", "--no-textconv", "--no-color", "HEAD", "--", ".", limit=DIFF_LIMIT_BYTES)
    untracked = _git(code, "ls-files", "--others", "--exclude-standard", "-z", "--", ".")
    return commit, diff, tuple(name for name in untracked.split("\0") if name)


def _git(folder: Path, *words: str, limit: int | None = None) -> str:
    """What git prints, cut at `limit` bytes; empty when there is no git, no repository or no answer in time."""
    printed = _output(["git", "--no-pager", "--no-optional-locks", "-C", str(folder), *words])
    text = printed[:limit].decode("utf-8", "replace")
    cut = limit is not None and len(printed) > limit
    return f"{text}\n... cut here: the diff is {len(printed)} bytes long\n" if cut else text


def _output(command: list[str]) -> bytes:
    """What a program prints, or nothing when it is missing, fails or takes longer than ten seconds."""
    environ = {**os.environ, "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command, env=environ, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE_SECONDS, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return b""
    return b"" if done.returncode else done.stdout


# ------------------------------------------------------------------------------------------------- machine


def _machine() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "cpu": _cpu_model(),
        "cores": _cores(),
        "memory_gb": _memory_gb(),
        "gpus": _gpus(),
        "nvidia_driver": _nvidia_driver(),
    }


def _cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", _text(cpuinfo), re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def _cores() -> int:
    """Cores this process may use, which a job scheduler makes fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_gb() -> float:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return 0.0


def _gpus(proc: Path = Path("/proc/driver/nvidia/gpus")) -> list[str]:
    """NVIDIA devices of the machine from the driver's own files: asking CUDA would open a context on each of them."""
    cards = sorted(proc.iterdir()) if proc.is_dir() else []
    models = [re.search(r"^Model:\s*(.+)$", _text(card / "information"), re.MULTILINE) for card in cards]
    names = [re.sub(r"\s+", " ", found.group(1)).strip() for found in models if found]
    if names:
        return names
    listed = _output(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"])  # a container may hide those files
    return listed.decode("utf-8", "replace").split("\n")[:-1]


def _nvidia_driver(version: Path = Path("/proc/driver/nvidia/version")) -> str:
    found = re.search(r"Kernel Module[^\n]*?\s(\d+\.\d[\d.]*)\s", _text(version))
    return found.group(1) if found else ""


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
