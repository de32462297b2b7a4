"""A search in which every tenth trial meets a fault, on a real Ray cluster of three nodes on this machine.

    python -m benchmarks.search_faults [--trials 200] [--share 0.1] [--seed 0] [--steps 60] [--json FILE]

The trials are tiny DeepSpeed runs, the search is `python -m dstrain.tune` as a user starts it. The faults come from
outside, in the middle of a trial's training:

    killed         SIGKILL to the process that trains
    out of memory  its address space is closed (RLIMIT_AS), so that its next allocation fails
    hung           SIGSTOP: it lives and reports nothing
    node lost      SIGKILL to everything of a Ray node; another node takes its place
    overflow       no injection: its learning rate is absurd, and the loss is soon no number

Printed at the end: how the trials ended by fault (and how many met it: one that is struck in its last moment, or stopped before
it allocates again, ends as if nothing had happened), what is left behind (processes of the search, placement groups of the
cluster, which outlives the search), and the idle share: of the slots' time between the first step of any trial and the last
start of one, how much passed without a process that trains. Exit status 1 when a trial has no end or anything is left.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import random
import resource
import runpy
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
from ray.cluster_utils import Cluster

from benchmarks.measure import environment
from dstrain.readings import READINGS_FILE
from dstrain.schema import dump_yaml
from dstrain.search import Candidate, plan_search
from dstrain.settings import ROOT, read_document

OUTSIDE = ("killed", "out of memory", "hung", "node lost")
KINDS = (*OUTSIDE, "overflow")
NODES = 3
SAMPLES_PER_SECOND = 10
LONGEST_LOOK_SECONDS = 1.0
MARK = "DSTRAIN_FAULTS"
"""In the environment of every process that this one starts, so that another's Ray is not taken for ours."""
CLUSTERS_OWN = ("ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray::IDLE")


# ------------------------------------------------------------------------------------------------- the search


def search_file(folder: Path, trials: int, share: float, steps: int) -> Path:
    """A grid of `trials` tiny classifiers over learning rates and seeds; `share` / 5 of them have an absurd rate."""
    absurd = max(1, round(trials * share / len(KINDS)))
    good = [round(1e-3 * 1.01**number, 8) for number in range(trials - absurd)]
    bad = [1e30 * (1 + number) for number in range(absurd)]
    rates = good + bad
    random.Random(0).shuffle(rates)
    stage = {
        "objective": {"kind": "classify"},
        "corpus": {"name": "pydocs", "max_documents": 256, "max_eval_documents": 32},
        "max_length": 128, "tokens_per_batch": 2048, "steps": steps, "evaluate_every_steps": steps // 3,
        "report_every": 1, "optim": {"lr": 1e-3},
    }  # fmt: skip
    encoder = {
        "preset": "bert_tiny", "num_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "qkv_size": 64,
        "attention": {"kind": "sdpa"},
    }  # fmt: skip
    base = {
        "name": "faults", "output_dir": str(folder / "runs"), "vocabulary": {"size": 512}, "encoder": encoder,
        "stages": {"finetune": stage},
    }  # fmt: skip
    search = {
        "metric": "finetune/valid/f1_macro", "scheduler": {"kind": "asha"}, "max_failures": 2, "silence_minutes": 0.5,
        "resources": {"ranks": 1, "cpus": 1},
    }  # fmt: skip
    file = folder / "search.yaml"
    file.write_text(dump_yaml({"base": base, "space": {"stages.finetune.optim.lr": rates}, "search": search}))
    return file


def as_under_slurm() -> dict[str, str]:
    """How soon Ray gives a silent node up: as set in a cluster of cluster/node.py."""
    environ = runpy.run_path(str(ROOT / "cluster" / "node.py"))["RAY_ENVIRON"]
    return {name: value for name, value in environ.items() if name.startswith("RAY_health_check")}


@contextlib.contextmanager
def ray_nodes() -> Iterator[Cluster]:
    """A head without CPUs, where the driver runs, and three nodes of one CPU."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(NODES):
            cluster.add_node(num_cpus=1)
        yield cluster
    finally:
        cluster.shutdown()


# ------------------------------------------------------------------------------------------------- the faults


@dataclass
class Stay:
    """A process that trained, and when it was first and last there."""

    trial: str
    nursery: int
    created: float
    last_seen: float = 0.0


@dataclass
class Slots:
    """Which trial trains in which process, seen from outside, and how long how many did."""

    trials: Path
    seen: list[tuple[float, int]] = field(default_factory=list)
    """(time, processes that trained then), several times a second."""
    stays: dict[int, Stay] = field(default_factory=dict)
    """By process."""

    def idle_share(self, until: float) -> float:
        """Of the slots' time from the first training to `until`; while a node was replaced nobody looked."""
        busy, total, since = 0.0, 0.0, next(moment for moment, count in self.seen if count)
        for (moment, count), (following, _) in pairwise(self.seen):
            if since <= moment and following <= until and following - moment < LONGEST_LOOK_SECONDS:
                busy += min(count, NODES) * (following - moment)
                total += NODES * (following - moment)
        return 1 - busy / total

    def look(self) -> dict[str, psutil.Process]:
        """Notes who is there now; the process of each trial that has begun to work, which holds the trial's log open."""
        found, now = {}, time.time()
        ranks = [process for process in psutil.process_iter() if _trains(process)]
        known = {process.pid for process in ranks}
        children = [process for process in ranks if _parent(process) in known]
        self.seen.append((now, len(children)))
        for process in children:
            with contextlib.suppress(psutil.Error):
                for file in process.open_files():
                    if file.path.startswith(str(self.trials)) and file.path.endswith("/train.log"):
                        trial = Path(file.path).parent.name
                        found[trial] = process
                        stay = Stay(trial, process.ppid(), process.create_time())
                        self.stays.setdefault(process.pid, stay).last_seen = now
        return found

    def starts(self) -> dict[str, list[float]]:
        """Seconds from one trial's end to the next one's process on the same seat (or, after a fault, to its own next one),
        and from there to its first step."""
        handed: list[float] = []
        resumed: list[float] = []
        begun: list[float] = []
        cold: list[float] = []
        followed: dict[int, Stay] = {}
        for stay in sorted(self.stays.values(), key=lambda stay: stay.created):
            before = followed.get(stay.nursery)
            followed[stay.nursery] = stay
            if before is not None:
                (resumed if before.trial == stay.trial else handed).append(max(0.0, stay.created - before.last_seen))
            file = self.trials / stay.trial / READINGS_FILE
            lines = file.read_text().splitlines() if file.exists() else []
            steps = [line["time"] for line in map(json.loads, lines) if line["split"] == "train"]
            first = next((moment for moment in steps if moment >= stay.created), None)
            if first is not None:
                (begun if before is not None else cold).append(first - stay.created)
        return {"handed over": handed, "started again": resumed, "first step": begun, "first step on a new seat": cold}


def _trains(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return "dstrain.tune.rank" in process.cmdline()
    return False


def _parent(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.Error):
        return process.ppid()
    return 0


@dataclass
class Faults:
    """Injects its plan, one fault for each chosen trial, once the trial has saved something to go on from."""

    plan: dict[str, str]
    """The kind of fault by trial."""
    cluster: Cluster
    slots: Slots
    injected: dict[str, str] = field(default_factory=dict)

    def look(self, training: dict[str, psutil.Process]) -> None:
        """Injects what is due."""
        for trial, process in training.items():
            kind = self.plan.get(trial)
            if kind is None or trial in self.injected or not self._has_saved(trial):
                continue
            with contextlib.suppress(psutil.Error):
                if self._inject(kind, process):
                    self.injected[trial] = kind

    def _has_saved(self, trial: str) -> bool:
        return any((self.slots.trials / trial / "stages").glob("*/checkpoints/step-*[0-9]"))

    def _inject(self, kind: str, process: psutil.Process) -> bool:
        if kind == "killed":
            process.kill()
        elif kind == "hung":
            process.suspend()
        elif kind == "out of memory":
            process.rlimit(resource.RLIMIT_AS, (process.memory_info().vms, resource.RLIM_INFINITY))
        else:
            return self._lose_node(process)
        return True

    def _lose_node(self, process: psutil.Process) -> bool:
        above = {parent.pid for parent in process.parents()}
        for node in self.cluster.worker_nodes:
            raylet = node.all_processes["raylet"][0].process.pid
            if raylet in above:
                self.cluster.remove_node(node, allow_graceful=False)
                self.cluster.add_node(num_cpus=1)
                return True
        return False


# ------------------------------------------------------------------------------------------------- the run


def watch(searching: subprocess.Popen[str], slots: Slots, faults: Faults) -> None:
    """Looks at the processes until the search has ended, and has the faults injected."""
    while searching.poll() is None:
        now = time.monotonic()
        faults.look(slots.look())
        time.sleep(max(0.0, 1 / SAMPLES_PER_SECOND - (time.monotonic() - now)))


def left_behind() -> list[str]:
    """Processes of the search that still live; those of the cluster itself are to stay."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            line = " ".join(process.cmdline())
            own = "dstrain.tune" in line or (line.startswith("ray::") and not line.startswith(CLUSTERS_OWN))
            if own and process.environ().get(MARK) == str(os.getpid()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{process.pid} {line[:80]}")
    return found


def groups_left(address: str) -> int:
    """Placement groups that still hold resources of the cluster."""
    ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    try:
        return sum(group["state"] != "REMOVED" for group in ray.util.placement_group_table().values())
    finally:
        ray.shutdown()


def told(candidates: Sequence[Candidate], faults: Faults) -> list[dict[str, Any]]:
    """One row per kind of fault: for how many trials it was meant, how many met it, how they ended, and the reasons that were
    written down."""
    rows = []
    for kind in (*KINDS, "none"):
        mine = [one for one in candidates if kind_of(one, faults) == kind]
        ends = Counter(one.state for one in mine)
        reasons = Counter(reason for one in mine for reason in {*one.faults(), *_failure(one)})
        rows.append({
            "fault": kind, "trials": len(mine), "met": sum(_met(one, faults.slots) for one in mine), "ends": dict(ends),
            "reasons": dict(reasons), "doubled": sum(_doubled(one) for one in mine),
        })  # fmt: skip
    return rows


def kind_of(candidate: Candidate, faults: Faults) -> str:
    """The fault that was meant for a trial, and set off."""
    if candidate.settings.stages["finetune"].optim.lr > 1:
        return "overflow"
    return faults.injected.get(candidate.id, "none")


def _met(candidate: Candidate, slots: Slots) -> bool:
    """Whether a fault struck the trial: one was written down, or another process had to go on with it."""
    processes = sum(stay.trial == candidate.id for stay in slots.stays.values())
    return bool(candidate.faults() or _failure(candidate)) or processes > 1


def _failure(candidate: Candidate) -> set[str]:
    ended = candidate.ended()
    return {ended.reason} if ended and ended.state == "failed" else set()


def _doubled(candidate: Candidate) -> bool:
    """Whether a step was reported twice: what was computed again after a death must replace what was reported before."""
    steps = [(r.stage, r.split, r.step) for r in candidate.readings()]
    return len(steps) != len(set(steps))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    words = argparse.ArgumentParser(prog="python -m benchmarks.search_faults", description=__doc__.partition("\n")[0])
    words.add_argument("--trials", type=int, default=200)
    words.add_argument("--share", type=float, default=0.1, help="of the trials that meet a fault")
    words.add_argument("--steps", type=int, default=60, help="optimizer steps of a trial")
    words.add_argument("--seed", type=int, default=0, help="draws which trials meet which fault")
    words.add_argument("--json", type=Path, help="also writes the figures here")
    given = words.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="dstrain-faults-") as folder:
        figures = measure(Path(folder), given.trials, given.share, given.steps, given.seed)
    show(figures)
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1) + "\n")
    return int(bool(figures["left processes"] or figures["left placement groups"] or figures["without an end"]))


def measure(folder: Path, trials: int, share: float, steps: int, seed: int) -> dict[str, Any]:
    """Runs the search and returns what is to be told of it."""
    file = search_file(folder, trials, share, steps)
    candidates = plan_search(read_document(file)).candidates
    healthy = [one.id for one in candidates if one.settings.stages["finetune"].optim.lr < 1]
    wanted = round(trials * share) - (len(candidates) - len(healthy))
    chosen = random.Random(seed).sample(healthy, max(0, wanted))
    plan = {trial: OUTSIDE[number % len(OUTSIDE)] for number, trial in enumerate(chosen)}
    slots = Slots(folder / "runs" / "faults" / "trials")
    os.environ |= {MARK: str(os.getpid()), "OMP_NUM_THREADS": "1", **as_under_slurm()}
    with ray_nodes() as cluster:
        faults = Faults(plan, cluster, slots)
        log = (folder / "log").open("w")
        searching = subprocess.Popen(
            [sys.executable, "-m", "dstrain.tune", str(file)], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "RAY_ADDRESS": cluster.address},
        )  # fmt: skip
        started = time.monotonic()
        try:
            watch(searching, slots, faults)
        finally:
            searching.terminate()  # when this process is interrupted
            searching.wait()
        time.sleep(10)
        left, groups = left_behind(), groups_left(cluster.address)
    search = plan_search(read_document(file))
    last_start = max(_first_time(one) for one in search.candidates)
    print((folder / "log").read_text()[-3000:], file=sys.stderr)
    return {
        "environment": environment(torch.device("cpu"), 1, ("ray", "deepspeed")),
        "trials": len(search.candidates),
        "wall seconds": round(time.monotonic() - started - 10, 1),
        "exit status": searching.returncode,
        "idle share": round(slots.idle_share(last_start), 4),
        "seconds": {name: quartiles(found) for name, found in slots.starts().items()},
        "without an end": [one.id for one in search.candidates if one.ended() is None],
        "left processes": left,
        "left placement groups": groups,
        "planned": dict(Counter(plan.values())),
        "rows": told(search.candidates, faults),
    }


def quartiles(seconds: list[float]) -> list[float]:
    """[number, median, nineteen of twenty are no longer than]."""
    if not seconds:
        return [0]
    ordered = sorted(seconds)
    return [len(ordered), *(round(ordered[int(share * (len(ordered) - 1))], 2) for share in (0.5, 0.95))]


def _first_time(candidate: Candidate) -> float:
    file = candidate.folder / "settings.yaml"
    return file.stat().st_mtime if file.exists() else 0.0


def show(figures: dict[str, Any]) -> None:
    """The table on the terminal."""
    print(f"{figures['trials']} trials in {figures['wall seconds']:.0f} s; exit status {figures['exit status']}")
    for row in figures["rows"]:
        ends = ", ".join(f"{count} {state}" for state, count in row["ends"].items())
        count = f"{row['trials']:>4} trials, {row['met']} struck"
        print(f"{row['fault']:<14} {count}: {ends or '-'}; readings doubled in {row['doubled']}")
        for reason, count in row["reasons"].items():
            print(f"{'':<14} {count:>4} x {reason[:110]}")
    for name, (count, *rest) in figures["seconds"].items():
        print(f"{name}: {count:.0f} times, median and 95 % seconds {rest}")
    print(f"idle share of {NODES} slots: {figures['idle share']:.1%}")
    print(
        f"left behind: {len(figures['left processes'])} processes, {figures['left placement groups']} placement groups, "
        f"{len(figures['without an end'])} trials without an end"
    )


if __name__ == "__main__":
    sys.exit(main())
