"""The memory limit of a job: where it is found, that allocations fail before it, and a real run under a real one."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT

from dstrain import memory_limit
from dstrain.healing import is_shortage
from dstrain.memory_limit import SHARES, at_most, job_limit, share_of
from dstrain.readings import read_readings
from dstrain.schema import dump_yaml

MB = 2**20
GROUPS = Path("/sys/fs/cgroup")


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    ("own", "files", "limit"),
    [
        ("0::/job/step\n", {"job/step/memory.max": "max", "job/memory.max": "300000000"}, 300_000_000),
        ("0::/job\n", {"job/memory.max": "300000000", "memory.max": "200000000"}, 200_000_000),
        (
            "5:cpu:/other\n4:hugetlb,memory:/slurm/job\n0::/\n",
            {"memory/slurm/job/memory.limit_in_bytes": "400000000", "memory/memory.limit_in_bytes": str(2**63 - 4096)},
            400_000_000,
        ),
        ("4:memory:/not/shown/in/here\n", {"memory/memory.limit_in_bytes": "500000000"}, 500_000_000),
        ("0::/job\n", {"job/memory.max": "max"}, None),
        ("0::/job\n", {"job/memory.max": str(2**50)}, None),
        ("0::/\n", {}, None),
    ],
)
def test_the_least_limit_above_a_process_is_the_jobs(
    own: str, files: dict[str, str], limit: int | None, tmp_path: Path
) -> None:
    """Versions 1 and 2; a limit above what the machine has is none."""
    for name, text in files.items():
        write(tmp_path / "groups" / name, text)
    assert job_limit(tmp_path / "groups", write(tmp_path / "own", own)) == limit


def test_without_control_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert job_limit(tmp_path, tmp_path / "none") is None


def test_ranks_share_the_limit_and_trials_share_it_with_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SHARES, raising=False)
    assert share_of(1000 * MB, 2) == 475 * MB
    monkeypatch.setenv(SHARES, "4")
    assert share_of(1000 * MB, 1) == int(237.5 * MB)


def test_allocations_fail_past_the_share_and_only_inside() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    _, resident = memory_limit._held()
    with at_most(resident + 300 * MB):
        torch.ones(100 * MB, dtype=torch.uint8)
        with pytest.raises(RuntimeError) as found:
            torch.ones(400 * MB, dtype=torch.uint8)
    assert is_shortage(found.value)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    torch.ones(400 * MB, dtype=torch.uint8)
    with at_most(None):
        assert resource.getrlimit(resource.RLIMIT_DATA) == before


@pytest.fixture
def job() -> Iterator[Path]:
    """The file into which a process writes its number to be in a control group of 1200 MB."""
    first = (GROUPS / "memory").exists()
    group = (GROUPS / "memory" if first else GROUPS) / f"dstrain-test-{os.getpid()}"
    try:
        if not first:
            (GROUPS / "cgroup.subtree_control").write_text("+memory")
        group.mkdir()
        (group / ("memory.limit_in_bytes" if first else "memory.max")).write_text(str(1200 * MB))
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    yield group / "cgroup.procs"
    group.rmdir()


@pytest.mark.slow
def test_a_run_under_a_limit_takes_smaller_pieces_and_lives(job: Path, tmp_path: Path) -> None:
    """Micro-batches that take 2 GB, in a job that may hold 1.2: without our limit the kernel kills it at the first step."""
    if psutil.virtual_memory().total < 1300 * MB:
        pytest.skip("the machine has no more than the job would")
    corpus = {"name": "pydocs", "max_documents": 300, "max_eval_documents": 100}
    stage = {"objective": {"kind": "classify"}, "corpus": corpus, "tokens_per_batch": 65536, "steps": 2, "report_every": 1}
    base = {
        "name": "limited", "output_dir": str(tmp_path), "vocabulary": {"size": 1000}, "encoder": {"preset": "bert_tiny"},
        "tracking": {"enabled": False}, "stages": {"finetune": stage},
    }  # fmt: skip
    file = write(tmp_path / "limited.yaml", dump_yaml({"base": base}))
    train = [sys.executable, str(ROOT / "dstrain/train.py"), str(file)]
    inside = f"import os; open({str(job)!r}, 'w').write(str(os.getpid())); os.execv({train[0]!r}, {train!r})"
    done = subprocess.run(
        [sys.executable, "-c", inside], capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "memory of this rank: 1.2 GB, its share of the job's limit" in done.stdout
    assert "ran out of memory; from now on each micro-batch is taken in 2 pieces" in done.stderr
    events = [reading for reading in read_readings(tmp_path / "limited") if reading.split == "events"]
    assert events and all(2 <= event.values["pieces"] <= 16 for event in events)
