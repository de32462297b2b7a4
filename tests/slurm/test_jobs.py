"""Searches and runs through `sbatch` on a real SLURM: to the end, interrupted, cancelled, with a node's power cut.

After each job nothing of it is left on any node, and MLflow holds what the run folders hold.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ROOT, tiny_run
from namespaces import Job, Slurm, missing, wait_until

from dstrain.readings import Reading, read_readings
from dstrain.schema import dump_yaml
from dstrain.search import Search, plan_search
from dstrain.settings import read_document
from dstrain.tracking import sent_of

pytestmark = pytest.mark.slurm

METRIC = "finetune/valid/f1_macro"
MEASURED = {"tokens_per_second", "peak_memory_gb"}  # values that differ from run to run
STEPS = {
    "stages__finetune__steps": 400,
    "stages__finetune__evaluate_every_steps": 50,
    "stages__finetune__report_every": 25,
}
LONGER = {**STEPS, "stages__finetune__steps": 500}
TWO_NODES = ("--nodes=2", "--cpus-per-task=1", "--mem=2000", "--gpus-per-node=1", "--time=10")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Three idle nodes; they share pytest's folder, the checkout and the environment with this process."""
    if why := missing():
        pytest.skip(why)
    shared = [tmp_path_factory.getbasetemp(), ROOT, Path(sys.prefix)]
    with Slurm(tmp_path_factory.mktemp("slurm"), shared) as running:
        yield running


@pytest.fixture(autouse=True)
def _nothing_is_left(slurm: Slurm) -> Iterator[None]:
    """No process, no port and no private folder on any node, ten seconds after a job's end."""
    yield
    try:
        look_for_leavings(slurm)
    finally:
        slurm.on_login("scancel", "--user=root")  # what a failed test left must not fail the next


def look_for_leavings(slurm: Slurm) -> None:
    for node in slurm.nodes.values():
        with contextlib.suppress(AssertionError):
            wait_until("nothing runs", lambda node=node: not node.processes() and not node.ports(), 10)
        left = [" ".join(process.cmdline()) for process in node.processes()]
        assert (left, node.ports()) == ([], set()), node.name
        assert not list((slurm.folder / "nodes" / node.name / "tmp").glob("d[0-9]*")), node.name


class Office:
    """Where the tests' searches are written, submitted and kept."""

    def __init__(self, slurm: Slurm, folder: Path, corpus: Path) -> None:
        self.slurm, self.folder, self._corpus = slurm, folder, corpus

    def search_file(self, name: str) -> Path:
        """Two trials that take some seconds each, with a rung for neither."""
        base = tiny_run(self._corpus, self.folder / "runs", stages__pretrain=None, tracking__enabled=True, **STEPS)
        search = {"metric": METRIC, "scheduler": {"kind": "none"}, "max_failures": 2}
        space = {"stages.finetune.optim.lr": [1e-3, 4e-3]}
        return self._write(name, {"base": {**base, "name": name}, "space": space, "search": search})

    def halving_file(self, name: str) -> Path:
        """Three trials over both nodes at once, so one after the other; the last is the worst, and stopped on its rung.

        SLURM looks for time limits twice a minute only: so long there must be something to interrupt.
        """
        base = tiny_run(self._corpus, self.folder / "runs", stages__pretrain=None, tracking__enabled=True, **LONGER)
        halving = {"kind": "asha", "rungs": [250]}
        search = {"metric": METRIC, "scheduler": halving, "max_failures": 2, "resources": {"ranks": 2}}
        space = {"stages.finetune.optim.lr": [base["stages"]["finetune"]["optim"]["lr"], 4e-3, 1e-6]}
        return self._write(name, {"base": {**base, "name": name}, "space": space, "search": search})

    def run_file(self, name: str) -> Path:
        """One run, the same as the first trial of `halving_file`."""
        base = tiny_run(self._corpus, self.folder / "runs", stages__pretrain=None, tracking__enabled=True, **LONGER)
        return self._write(name, {"base": {**base, "name": name}})

    def _write(self, name: str, tree: dict[str, Any]) -> Path:
        file = self.folder / f"{name}.yaml"
        file.write_text(dump_yaml(tree))
        return file

    def submit(self, script: str, *words: str | Path, options: Sequence[str] = (), **environ: str) -> Job:
        """`sbatch OPTIONS cluster/SCRIPT WORDS` from the checkout."""
        own = {"VENV": sys.prefix, "JOBS": str(self.folder / "jobs"), "OMP_NUM_THREADS": "1", **environ}
        given = [*TWO_NODES, f"--output={self.folder}/%x-%j.log", *options, f"cluster/{script}", *map(str, words)]
        return Job.submit(self.slurm, ROOT, *given, environ=own)


@pytest.fixture(scope="module")
def office(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory, small_corpus: Path) -> Office:
    return Office(slurm, tmp_path_factory.mktemp("office"), small_corpus)


def planned(file: Path) -> Search:
    return plan_search(read_document(file))


def folders(file: Path) -> list[Path]:
    return [candidate.folder for candidate in planned(file).candidates]


def in_mid_trial(folder: Path) -> bool:
    """Whether a trial has something to go on from, and has not ended."""
    return any((folder / "stages/finetune/checkpoints").glob("step-*[0-9]")) and not (folder / "ended.json").exists()


def host_of(folder: Path) -> str:
    """The node on which a trial began."""
    return re.findall(r"^ +host: (\w+)$", (folder / "environment.txt").read_text(), re.MULTILINE)[0]


def lessons(file: Path) -> dict[str, list[tuple[Any, ...]]]:
    """What every trial learned: all it reported, but for what a clock or the machine had a part in."""
    return {folder.name: learned(folder) for folder in folders(file)}


def learned(folder: Path) -> list[tuple[Any, ...]]:
    return [lesson(one) for one in read_readings(folder) if one.split != "system"]


def lesson(reading: Reading) -> tuple[Any, ...]:
    values = {name: value for name, value in reading.values.items() if name not in MEASURED}
    return reading.stage, reading.split, reading.step, reading.tokens, values


def assert_ended_well(file: Path, database: Path) -> None:
    """All trials have finished, and each is one finished run in MLflow with every value of its folder."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{database}")
    for candidate in planned(file).candidates:
        ended = candidate.ended()
        assert ended and ended.state == "finished", f"{candidate.id}: {ended}"
        assert read_readings(candidate.folder)[-1].split == "test"
        assert_in_mlflow(client, candidate.folder)


def evaluated(folder: Path) -> list[int]:
    """The steps at which a run was evaluated: each once, however often the run was interrupted."""
    return [reading.step for reading in read_readings(folder) if reading.split == "valid"]


def assert_in_mlflow(client: Any, folder: Path) -> None:
    sent = sent_of(folder)
    run = client.get_run(sent.run_id)
    assert run.info.status == "FINISHED"
    key = run.data.tags["dstrain.key"]
    assert len(client.search_runs([sent.experiment_id], f"tags.`dstrain.key` = '{key}'")) == 1
    readings = read_readings(folder)
    for name in {name for reading in readings for name in reading.keyed()}:
        ours = {(reading.step, value) for reading in readings if (value := reading.keyed().get(name)) is not None}
        assert {(row.step, row.value) for row in client.get_metric_history(sent.run_id, name)} == ours, name


# ------------------------------------------------------------------------------------------------------ the tests


@pytest.fixture(scope="module")
def side_by_side(office: Office) -> tuple[Job, Job]:
    """Two searches at the same time on the same two nodes; the second is cancelled in mid-trial."""
    first = office.submit("tune.sbatch", office.search_file("first"))
    file = office.search_file("second")
    second, trials = office.submit("tune.sbatch", file), folders(file)
    second.until("a trial is under way", lambda: any(map(in_mid_trial, trials)), 240)
    assert processes_of(second) and first.field("NodeList") == second.field("NodeList")
    second.signal()
    assert second.wait(60) == "CANCELLED"
    second.until("nothing of it runs", lambda: not processes_of(second), 10)
    assert first.wait(300) == "COMPLETED", first.said()
    return first, second


def processes_of(job: Job) -> list[str]:
    """What runs of a job on any node: its processes bear its number in their environment."""
    found = []
    for node in job.slurm.nodes.values():
        for process in node.processes():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SLURM_JOB_ID") == job.number:
                    found.append(" ".join(process.cmdline()))
    return found


def test_a_search_over_two_nodes_to_its_end(office: Office, side_by_side: tuple[Job, Job]) -> None:
    said = side_by_side[0].said()
    assert "1 CPUs, 1 GPUs, 2000 MB" in said and "all 2 nodes are up" in said
    assert "2 of 2 trials to run, 2 at a time" in said
    assert "Traceback" not in said and "asking SLURM" not in said
    file = office.folder / "first.yaml"
    assert_ended_well(file, office.folder / "runs" / "mlflow.db")
    assert sorted(map(host_of, folders(file))) == ["n1", "n2"]


def test_a_cancelled_search_is_gone_and_stays_away(office: Office, side_by_side: tuple[Job, Job]) -> None:
    job = side_by_side[1]
    assert job.field("Restarts") == "0" and "asking SLURM" not in job.said()
    assert [candidate.ended() for candidate in planned(office.folder / "second.yaml").candidates] == [None, None]


def test_no_token_outlives_its_job(office: Office, side_by_side: tuple[Job, Job]) -> None:
    assert list((office.folder / "jobs").glob("*/address.*"))
    assert not list((office.folder / "jobs").glob("*/token.*"))


@pytest.fixture(scope="module")
def trained(office: Office) -> Job:
    """A run over two nodes, interrupted in the middle. SLURM's second start of its job is none for `--resume never`."""
    job = office.submit("train.sbatch", office.run_file("trained"), "--resume", "never")
    folder = office.folder / "runs" / "trained"
    job.until("the run is under way", lambda: any((folder / "stages/finetune/checkpoints").glob("step-*[0-9]")), 240)
    job.signal("--signal=USR1", "--batch")
    job.until("the job is queued again", lambda: job.field("Restarts") == "1", 120)
    assert not (folder / "outcome.json").exists()
    assert job.wait(240) == "COMPLETED", job.said()
    return job


def test_a_run_over_two_nodes_is_interrupted_and_goes_on(office: Office, trained: Job) -> None:
    from mlflow import MlflowClient

    folder = office.folder / "runs" / "trained"
    assert "test: " in trained.said() and "Traceback" not in trained.said()
    assert evaluated(folder) == list(range(50, 501, 50))
    client = MlflowClient(f"sqlite:///{office.folder / 'runs' / 'mlflow.db'}")
    assert client.get_run(sent_of(folder).run_id).data.tags["world_size"] == "2"
    assert_in_mlflow(client, folder)


def test_a_search_that_meets_its_time_limit_goes_on_as_if_nothing_had_been(office: Office, trained: Job) -> None:
    """Trials of two ranks on two nodes under successive halving. The first learns what the same run learned by itself."""
    from mlflow import MlflowClient

    file = office.halving_file("limited")
    job, trials = office.submit("tune.sbatch", file, options=["--signal=B:USR1@30"]), folders(file)
    job.until("a trial is under way", lambda: any(map(in_mid_trial, trials)), 240)
    limit(job, "EndTime=" + time.strftime("%FT%T", time.localtime(time.time() + 60)))
    job.until("the job is queued again", lambda: job.field("Restarts") == "1", 120)
    limit(job, "TimeLimit=10")
    assert not all(candidate.ended() for candidate in planned(file).candidates)
    assert job.wait(300) == "COMPLETED", job.said()
    assert "3 of 3 trials to run, 1 at a time, each takes 2 rank(s) of 1 CPU(s)" in job.said()
    assert "the command gets SIGUSR1" in job.said() and "asking SLURM to start job" in job.said()
    assert "Traceback" not in job.said()

    same, other, worst = planned(file).candidates
    assert [ended and ended.state for ended in (same.ended(), other.ended(), worst.ended())] == ["finished"] * 2 + ["stopped"]
    assert learned(same.folder) == learned(office.folder / "runs" / "trained")
    assert evaluated(other.folder) == list(range(50, 501, 50)) and evaluated(worst.folder) == list(range(50, 251, 50))
    client = MlflowClient(f"sqlite:///{office.folder / 'runs' / 'mlflow.db'}")
    for folder in trials:
        assert_in_mlflow(client, folder)


def limit(job: Job, words: str) -> None:
    """Changes a job's time limit. Before it SLURM sends the signal asked for, at one of its two looks a minute."""
    job.slurm.on_login("scontrol", "update", f"JobId={job.number}", words)


def test_a_node_that_dies_costs_what_ran_there_since_its_checkpoint(
    office: Office, slurm: Slurm, side_by_side: tuple[Job, Job]
) -> None:
    """First Ray dies there and comes back, then the power is cut. An MLflow server of the job's own dies as well."""
    file, database = office.search_file("bereft"), office.folder / "bereft" / "mlflow.db"
    job = office.submit("tune.sbatch", file, MLFLOW="server", MLFLOW_DB=str(database))
    trials = folders(file)

    def on_worker() -> bool:
        return any(in_mid_trial(folder) and host_of(folder) == "n2" for folder in trials)

    job.until("a trial is under way on n2", on_worker, 240)
    kill(slurm, "n2", "raylet")
    kill(slurm, "n1", "mlflow server")
    job.until("n2 is back", lambda: job.said().count("n2: Ray's worker is up") == 2, 60)
    slurm.power_off("n2")
    try:
        assert job.wait(300) == "COMPLETED", job.said()
    finally:
        slurm.power_on("n2")
        wait_until("n2 is idle", lambda: slurm.idle() == slurm.number, 60)
    said = job.said()
    assert "n2: Ray has died here; joining again" in said and job.field("Restarts") == "0"
    assert "MLflow is up at http://127.0.0.1:" in said and "MLflow's server has died; starting it again" in said
    assert f"mlflow ui --backend-store-uri sqlite:///{database} " in said
    assert_ended_well(file, database)
    assert lessons(file) == lessons(office.folder / "first.yaml")


def kill(slurm: Slurm, name: str, words: str) -> None:
    """Kills what runs on a node under these words."""
    found = [process for process in slurm.nodes[name].processes() if words in " ".join(process.cmdline())]
    assert found, f"no {words} on {name}"
    for process in found:
        process.kill()


def test_a_search_that_is_to_stop_before_it_has_begun_is_queued_again_at_once(office: Office) -> None:
    """And again when a job that is more urgent takes its nodes, which its steps learn by SIGTERM and its script not at all."""
    file = office.search_file("early")
    job, trials = office.submit("tune.sbatch", file), folders(file)
    logs = office.folder / "jobs" / job.number
    job.until("Ray is being started", lambda: any(logs.glob("ray.n1.*")), 60)
    job.signal("--signal=USR1", "--batch")
    job.until("the job is queued again", lambda: job.field("Restarts") == "1", 30)
    assert "asked to stop before anything began" in job.said() and "trials to run" not in job.said()
    assert not (office.folder / "runs" / "early").exists()
    job.until("a trial is under way", lambda: any(map(in_mid_trial, trials)), 240)
    log = f"--output={office.folder}/urgent.log"
    urgent = Job.submit(office.slurm, ROOT, "--partition=urgent", "--nodes=3", "--exclusive", log, "--wrap=sleep 1", environ={})
    job.until("the job is queued again", lambda: job.field("Restarts") == "2", 60)
    assert urgent.wait(30) == "COMPLETED" and job.field("JobState") == "PENDING"
    assert not all(candidate.ended() for candidate in planned(file).candidates)


def test_every_gpu_has_a_rank_and_a_run_that_asks_to_come_back_does(office: Office) -> None:
    """With ranks that only say who they are; at first one runs out of memory, and the others end with it."""
    program = office.folder / "played" / "bin" / "python"
    program.parent.mkdir(parents=True)
    program.write_text(RANKS)
    program.chmod(0o755)
    venv = str(program.parents[1])
    job = office.submit("train.sbatch", "any.yaml", options=["--gpus-per-node=2", "--cpus-per-task=2"], VENV=venv)
    assert job.wait(90) == "COMPLETED", job.said()
    for start in ("0", "1"):
        ranks = re.findall(rf"rank (\d) of 4 on (n\d), start {start}", job.said())
        assert sorted(ranks) == [("0", "n1"), ("1", "n1"), ("2", "n2"), ("3", "n2")], job.said()
    assert job.field("Restarts") == "1"


RANKS = f"""#!/bin/sh
[ "$1" = -c ] && exec {sys.executable} "$@"
start=${{SLURM_RESTART_COUNT:-0}}
echo "rank $SLURM_PROCID of $SLURM_STEP_NUM_TASKS on $SLURMD_NODENAME, start $start"
[ "$start" -gt 0 ] && exit 0
[ "$SLURM_PROCID" = 2 ] && exit 75
exit 1
"""


def test_a_job_submitted_from_elsewhere_says_where_it_belongs(office: Office) -> None:
    log = f"--output={office.folder}/%x-%j.log"
    script = str(ROOT / "cluster" / "tune.sbatch")
    job = Job.submit(office.slurm, office.folder, *TWO_NODES, log, script, "any.yaml", environ=dict(os.environ))
    assert job.wait(60) == "FAILED" and job.field("ExitCode") == "2:0"
    assert "submit from the checkout, after make setup" in job.said()
