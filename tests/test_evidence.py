"""Evidence: the commit and the diff that ran, no secret, and no repository, machine or tool that it needs to exist."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dstrain import evidence
from dstrain.evidence import UNKNOWN, collect
from dstrain.schema import parse_yaml


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=T", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *words], check=True, capture_output=True, text=True)
    return done.stdout


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with one committed file in `code/` and one outside of it."""
    root = tmp_path / "repository"
    (root / "code").mkdir(parents=True)
    (root / "code" / "a.py").write_text("one = 1\n")
    (root / "notes.txt").write_text("x\n")
    (root / ".gitignore").write_text("*.log\n.venv\n")
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "first")
    return root


def test_a_clean_checkout_is_its_commit(repository: Path, tmp_path: Path) -> None:
    found = collect(repository / "code")
    assert found.commit == git(repository, "rev-parse", "HEAD").strip()
    assert not found.dirty and found.diff == "" and found.untracked == ()
    (tmp_path / "code.diff").write_text("of an earlier attempt")
    assert found.write(tmp_path) == [tmp_path / "environment.txt"]
    assert not (tmp_path / "code.diff").exists()


def test_the_diff_makes_the_commit_into_what_ran(repository: Path, tmp_path: Path) -> None:
    (repository / "code" / "a.py").write_text("one = 2\n")
    (repository / "code" / "new.py").write_text("two = 2\n")
    (repository / "code" / "noise.log").write_text("ignored\n")
    (repository / "notes.txt").write_text("changed, but it is no code\n")
    git(repository, "add", "code/a.py")  # staged or not, it is in the diff
    found = collect(repository / "code")
    assert found.dirty and found.untracked == ("new.py",)
    assert "notes.txt" not in found.diff
    assert found.tags()["git_dirty"] == "true"
    paths = found.write(tmp_path)
    assert [path.name for path in paths] == ["environment.txt", "code.diff"]
    git(repository, "checkout", "-q", "HEAD", "--", "code/a.py")
    git(repository, "apply", str(tmp_path / "code.diff"))
    assert (repository / "code" / "a.py").read_text() == "one = 2\n"


def test_a_new_file_alone_makes_it_dirty(repository: Path) -> None:
    (repository / "code" / "new.py").write_text("two = 2\n")
    found = collect(repository / "code")
    assert found.dirty and found.diff == ""


def test_a_huge_diff_is_cut_and_says_so(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "DIFF_LIMIT_BYTES", 1000)
    (repository / "code" / "a.py").write_text("x = 'é'\n" * 5000)
    found = collect(repository / "code")
    assert len(found.diff) < 1200 and "cut here: the diff is" in found.diff


def test_a_repository_that_does_not_track_the_code_says_nothing_about_it(repository: Path) -> None:
    installed = repository / ".venv" / "site-packages" / "dstrain"
    installed.mkdir(parents=True)
    (installed / "a.py").write_text("")
    assert collect(installed).commit == UNKNOWN


def test_a_repository_without_a_commit(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    assert collect(tmp_path).commit == UNKNOWN


@pytest.mark.parametrize("path", ["", "/nowhere"])
def test_without_git_the_commit_is_unknown(repository: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setenv("PATH", path)
    found = collect(repository / "code")
    assert (found.commit, found.dirty) == (UNKNOWN, False)


def test_outside_a_repository(tmp_path: Path) -> None:
    found = collect(tmp_path, device="NVIDIA A100", world_size=4)
    tags = found.tags()
    assert tags["git_commit"] == UNKNOWN and tags["device"] == "NVIDIA A100" and tags["world_size"] == "4"
    assert all(isinstance(value, str) for value in tags.values())


def test_the_environment_file_reads_back_as_yaml(tmp_path: Path) -> None:
    found = collect(tmp_path, environ={"OMP_NUM_THREADS": "1", "SLURM_JOB_ID": "7"})
    (path,) = found.write(tmp_path)
    tree = parse_yaml(path.read_text(), str(path))
    assert tree["variables"] == {"OMP_NUM_THREADS": "1", "SLURM_JOB_ID": "7"}
    assert tree["packages"]["pytest"] == pytest.__version__
    assert tree["packages"]["torch"] == __import__("importlib.metadata").metadata.version("torch")
    assert tree["machine"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert tree["machine"]["cores"] >= 1 and tree["machine"]["memory_gb"] > 0
    assert tree["command"] == [sys.executable, *sys.argv]


@pytest.mark.parametrize(
    "name",
    [
        "AWS_SECRET_ACCESS_KEY",
        "HF_TOKEN",
        "HF_HUB_TOKEN",
        "DSTRAIN_PASSWORD",
        "SLURM_AUTH_COOKIE",
        "HOME",
        "XNCCL_DEBUG",
    ],
)
def test_no_secret_and_nothing_that_was_not_asked_for(name: str, tmp_path: Path) -> None:
    found = collect(tmp_path, environ={name: "hunter2", "NCCL_DEBUG": "INFO", "TOKENIZERS_PARALLELISM": "false"})
    assert dict(found.variables) == {"NCCL_DEBUG": "INFO", "TOKENIZERS_PARALLELISM": "false"}
    assert "hunter2" not in found.write(tmp_path)[0].read_text()


def test_gpus_are_read_from_the_drivers_files(tmp_path: Path) -> None:
    for slot, model in (("0000:01:00.0", "NVIDIA A100-SXM4-40GB"), ("0000:02:00.0", "NVIDIA H100  PCIe")):
        (tmp_path / "gpus" / slot).mkdir(parents=True)
        (tmp_path / "gpus" / slot / "information").write_text(f"Model: \t\t {model}\nIRQ:   1\nGPU UUID: \t GPU-0\n")
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC version: 12\n"
    )
    assert evidence._gpus(tmp_path / "gpus") == ["NVIDIA A100-SXM4-40GB", "NVIDIA H100 PCIe"]
    assert evidence._nvidia_driver(tmp_path / "version") == "550.54.15"
    assert evidence._nvidia_driver(tmp_path / "missing") == ""


def test_gpus_of_a_container_come_from_the_vendors_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA L4'\necho 'NVIDIA L4'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert evidence._gpus(tmp_path / "missing") == ["NVIDIA L4", "NVIDIA L4"]
    tool.write_text("#!/bin/sh\necho 'failed because it cannot reach the driver'\nexit 9\n")
    assert evidence._gpus(tmp_path / "missing") == []


def test_a_cpu_without_a_model_name_is_its_architecture(tmp_path: Path) -> None:
    assert evidence._cpu_model(tmp_path / "missing") != ""


def test_collecting_is_quick_and_imports_nothing_heavy(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from dstrain.evidence import collect\n"
        "start = time.perf_counter(); collect(Path('.')); took = time.perf_counter() - start\n"
        "print(took, [name for name in ('torch', 'numpy', 'deepspeed', 'ray') if name in sys.modules])"
    )
    start = time.perf_counter()
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    took, heavy = done.stdout.split(maxsplit=1)
    assert heavy.strip() == "[]"
    assert float(took) < 5.0, f"collect took {took} s of {time.perf_counter() - start:.1f} s"
