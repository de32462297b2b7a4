"""A search as its user runs it: a real Ray cluster, real DeepSpeed trials, a real MLflow store."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from searches import MARK, begin, our_processes, ranks_of, search_file, tune, wait_for

from dstrain.desk import DIED
from dstrain.exchange import settings_now
from dstrain.readings import read_readings
from dstrain.schema import read_yaml
from dstrain.search import Ended, plan_search
from dstrain.settings import read_document
from dstrain.tune.__main__ import main


def test_dry_run_trains_nothing(small_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = search_file(small_corpus, tmp_path, {"stages.finetune.optim.lr": [1e-3, 2e-3]})
    assert main([str(file), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "2 trials, " in said and "lr=0.001" in said
    assert not (tmp_path / "runs").exists()


def test_a_search_without_gpus_is_planned_as_on_a_machine_that_has_none(
    small_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = search_file(small_corpus, tmp_path, {"seed": [0, 1]})
    file.write_text(file.read_text() + "when:\n  no_gpu: {encoder.num_layers: 1}\n")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert main([str(file), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "each takes 1 rank(s) of 4 CPU(s) and 1 GPU(s)" in said and "no_gpu" not in said
    assert main([str(file), "--dry-run", "search.resources.gpus=0"]) == 0
    said = capsys.readouterr().out
    assert "each takes 1 rank(s) of 1 CPU(s)\n" in said and "encoder.num_layers = 1 (when.no_gpu)" in said


def test_a_mistake_is_one_sentence(small_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = search_file(small_corpus, tmp_path, {"stages.finetune.optim.learning_rate": [1e-3, 2e-3]})
    assert main([str(file)]) == 2
    said = capsys.readouterr().err
    assert "stages.finetune.optim.learning_rate: no such setting" in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_search_to_its_end_and_again(small_corpus: Path, tmp_path: Path) -> None:
    """Two ranks a trial; one parent with a child per trial in MLflow; the second start runs nothing again."""
    from mlflow import MlflowClient

    file = search_file(small_corpus, tmp_path, {"stages.finetune.optim.lr": [1e-3, 4e-3], "seed": [0, 1]})
    done = tune(file, "search.resources.ranks=2", "search.resources.cpus=1")
    assert "4 of 4 trials to run" in done.stdout and "deepspeed dstrain/train.py" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    client = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == 4 and len(runs) == 5
    for child in children:
        assert child.info.status == "FINISHED"
        assert child.data.params["encoder.attention.kind"] == "sdpa"
        assert (
            child.data.tags["stop_reason"]
            and child.data.tags["attention_kernel"]
            and child.data.tags["world_size"] == "2"
        )
        assert {row.step for row in client.get_metric_history(child.info.run_id, "finetune/valid/f1_macro")} <= {4, 8}
    time.sleep(3)
    assert not our_processes()
    again = tune(file, "search.resources.ranks=2", "search.resources.cpus=1")
    assert "all 4 trials have ended" in again.stdout
    wider = tmp_path / "wider.yaml"
    wider.write_text(file.read_text().replace("- 0\n  - 1\n", "- 0\n  - 1\n  - 2\n"))
    more = tune(wider, "search.resources.ranks=2", "search.resources.cpus=1")
    assert "2 of 6 trials to run" in more.stdout
    assert len(client.search_runs([parent.info.experiment_id])) == 7


def weights_of(trials: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The kept weights of every trial's last stage."""
    return {file.parents[2].name: load_file(file) for file in trials.glob("*/stages/finetune/best.safetensors")}


@pytest.mark.slow
@pytest.mark.parametrize(("word", "ranks"), [(signal.SIGINT, 1), (signal.SIGUSR1, 2)])
def test_an_interrupted_search_saves_and_ends_bit_for_bit_as_an_undisturbed_one(
    word: signal.Signals, ranks: int, small_corpus: Path, tmp_path: Path
) -> None:
    """Ctrl-C or a time limit in the middle: exit status 75 and no process left; the same command ends all trials."""
    space = {"stages.finetune.optim.lr": [1e-3, 4e-3]}
    paces = {"steps": 150, "evaluate_every_steps": 150, "report_every": 10}
    file = search_file(
        small_corpus, tmp_path, space, name="whole", **{f"stages__finetune__{name}": pace for name, pace in paces.items()}
    )
    options = ("search.scheduler.kind=none", f"search.resources.ranks={ranks}", "search.resources.cpus=1")
    searching = begin(file, "name=cut", *options)
    trials = tmp_path / "runs" / "cut" / "trials"

    def under_way() -> bool:
        return all((trials / name / "readings.jsonl").exists() for name in ids(file))

    wait_for(under_way, searching)
    if word == signal.SIGINT:
        os.killpg(searching.pid, word)  # a terminal's Ctrl-C reaches every process of the search
    else:
        searching.send_signal(word)
    said, _ = searching.communicate(timeout=120)
    assert searching.returncode == 75, said
    assert "asked to stop: every running trial saves" in said and f"-m dstrain.tune {file}" in said
    assert "Traceback" not in said
    time.sleep(3)
    assert not our_processes()
    assert len(list(trials.glob("*/stages/finetune/checkpoints/step-*[0-9]"))) == 2, "both have saved, before any evaluation"
    tune(file, "name=cut", *options)
    tune(file, *options)
    cut, whole = weights_of(trials), weights_of(tmp_path / "runs" / "whole" / "trials")
    assert cut.keys() == whole.keys() and len(cut) == 2
    for name in cut:
        assert all(torch.equal(cut[name][key], whole[name][key]) for key in whole[name])
    for folder in trials.iterdir():
        steps = [reading.step for reading in read_readings(folder) if reading.split == "valid"]
        assert steps == sorted(set(steps))


def ids(file: Path) -> list[str]:
    """The trials of a search file."""
    return [candidate.id for candidate in plan_search(read_document(file)).candidates]


def to_its_end(searching: subprocess.Popen[str], trials: Path, slots: int) -> str:
    """What a search says until it ends. All the while nothing trains ten seconds after its trial's end, whatever the end,
    and whoever waits on a rung has no process either: there are never more for long than there are slots."""
    deadline, fitted = time.monotonic() + 400, time.monotonic()
    while searching.poll() is None and time.monotonic() < deadline:
        for ended in list(trials.glob("*/ended.json")):
            over = time.time() - ended.stat().st_mtime > 10
            assert not (over and (left := ranks_of(ended.parent.name))), f"{ended.read_text()}: {left}"
        if sum(bool(ranks_of(folder.name)) for folder in trials.glob("*")) <= slots:
            fitted = time.monotonic()
        assert time.monotonic() - fitted < 10
        time.sleep(1)
    said = searching.communicate(timeout=60)[0]
    assert psutil.wait_procs(our_processes(), timeout=10)[1] == []
    return said


@pytest.mark.slow
def test_nothing_of_a_trial_that_was_stopped_or_diverged_is_left(small_corpus: Path, tmp_path: Path) -> None:
    """One slot, in which a hopeless learning rate falls behind on its rung and an absurd one breaks before."""
    file = search_file(
        small_corpus, tmp_path, {"stages.finetune.optim.lr": [1e-3, 3e-3, 1e-9, 1e30, 2e-3]}, stages__finetune__steps=16,
        stages__finetune__evaluate_every_steps=8,
    )  # fmt: skip
    options = ("search.metric=finetune/valid/loss", "search.mode=min", "search.scheduler={kind: asha, rungs: [0.5]}")
    searching = begin(file, *options, "search.max_concurrent=1")
    said = to_its_end(searching, tmp_path / "runs" / "tiny" / "trials", slots=1)
    assert searching.returncode == 1, said
    _, _, behind, broken, last = plan_search(read_document(file, options)).candidates
    assert behind.ended() and behind.state == "stopped" and "stopped at rung 0.50" in said
    assert broken.state == "failed" and "failed: Diverged: " in said and broken.faults() == []
    assert last.ended()


@pytest.mark.slow
def test_zero_stages_and_precisions_may_be_searched(small_corpus: Path, tmp_path: Path) -> None:
    """Two ranks a trial, on the CPU: every combination trains to its end, in what it was told to."""
    space = {"deepspeed": ["ds_configs/zero1.json", "ds_configs/zero3.json"], "precision": ["bf16", "fp32"]}
    file = search_file(small_corpus, tmp_path, space, stages__finetune__evaluate_every_steps=8)
    options = ("search.resources.ranks=2", "search.resources.cpus=2", "search.resources.gpus=0", "search.scheduler.kind=none")
    done = tune(file, *options)
    candidates = plan_search(read_document(file, options)).candidates
    assert [one.state for one in candidates] == ["finished"] * 4, done.stdout
    for candidate in candidates:
        tags = json.loads((candidate.folder / "tags.json").read_text())
        assert tags["precision"].startswith(candidate.settings.precision) and tags["world_size"] == "2"
        (plan,) = candidate.folder.glob("ds_config.*.json")
        stage = json.loads(plan.read_text())["zero_optimization"]["stage"]
        assert f"zero{stage}.json" in str(candidate.settings.deepspeed)
        assert {reading.split for reading in candidate.readings()} >= {"train", "valid"}


@pytest.mark.slow
def test_trials_that_die_or_hang_go_on_from_their_checkpoints(small_corpus: Path, tmp_path: Path) -> None:
    """One is killed, one stops in the middle and says nothing, one dies too often: each is told, the others do not care."""
    file = search_file(
        small_corpus, tmp_path, {"stages.finetune.optim.lr": [1e-3, 2e-3, 3e-3]}, stages__finetune__steps=200,
        stages__finetune__checkpoint_every=20, stages__finetune__evaluate_every_steps=100,
    )  # fmt: skip
    killed, silent, doomed = ids(file)
    searching = begin(file, "search.scheduler.kind=none", "search.silence_minutes=0.3", "search.max_failures=1")
    trials = tmp_path / "runs" / "tiny" / "trials"

    def saved(name: str) -> bool:
        return any((trials / name / "stages/finetune/checkpoints").glob("step-*[0-9]")) and bool(ranks_of(name))

    wait_for(lambda: saved(killed), searching)
    first = ranks_of(killed)[0]
    nursery = first.ppid()
    first.kill()
    wait_for(lambda: {one.ppid() for one in ranks_of(killed) if one != first} == {nursery}, searching, 10)
    wait_for(lambda: saved(silent), searching)
    ranks_of(silent)[0].suspend()
    for _ in range(2):
        wait_for(lambda: saved(doomed), searching)
        ranks_of(doomed)[0].kill()
        wait_for(lambda: not ranks_of(doomed), searching)
    said = to_its_end(searching, trials, slots=3)
    assert searching.returncode == 1, said
    search = plan_search(read_document(file))
    assert [candidate.state for candidate in search.candidates] == ["finished", "finished", "failed"], said
    first, second, third = (candidate.faults() for candidate in search.candidates)
    died = "a process was killed by SIGKILL (out of memory, if nobody sent it)"
    assert (first, third) == ([died], [died])
    assert second == ["hung: reported nothing for 0.3 minutes (search.silence_minutes)"]
    assert search.candidates[2].ended() == Ended("failed", died)
    assert "Traceback" not in said and "finished (after 1 restart)" in said and "starts again from its checkpoint" in said
    for candidate in search.candidates[:2]:
        steps = [reading.step for reading in read_readings(candidate.folder) if reading.split == "train"]
        assert steps == sorted(set(steps)) and steps[-1] == 200


ACTOR_LOST_BETWEEN_TRIALS = """
import sys
import ray
from dstrain.tune import driver
from dstrain.tune.__main__ import main

told, actors = driver.Events.on_trial_complete, []

def lose_the_first(self, iteration, trials, trial, **info):
    told(self, iteration, trials, trial, **info)
    actors.append(trial.temporary_state.ray_actor)
    if len(actors) == 1:
        ray.kill(actors[0])

driver.Events.on_trial_complete = lose_the_first
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_trial_whose_actor_is_lost_before_it_begins_is_started_again(small_corpus: Path, tmp_path: Path) -> None:
    file = search_file(small_corpus, tmp_path, {"stages.finetune.optim.lr": [1e-3, 2e-3]})
    words = [str(file), "search.scheduler.kind=none", "search.max_concurrent=1"]
    done = subprocess.run(
        [sys.executable, "-c", ACTOR_LOST_BETWEEN_TRIALS, *words], capture_output=True, text=True, cwd=ROOT, timeout=300,
        env=os.environ | MARK,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = plan_search(read_document(file)).candidates
    assert (first.state, first.faults()) == ("finished", [])
    assert second.state == "finished" and second.faults() in ([], [DIED]), "told of one death at most"
    assert psutil.wait_procs(our_processes(), timeout=30)[1] == []


@pytest.mark.slow
def test_a_learning_sampler_with_rungs_that_pause_and_finalists(small_corpus: Path, tmp_path: Path) -> None:
    """What is proposed is kept, the second start proposes nothing more, and the best run again with more seeds."""
    file = search_file(small_corpus, tmp_path, {"stages.finetune.optim.lr": {"log_uniform": [1e-4, 1e-2]}})
    options = (
        "search.trials=4", "search.sampler=tpe", "search.finalists={top: 1, seeds: 2}",
        "search.scheduler={kind: asha, on_rung: pause, eta: 2, rungs: [0.5]}", "search.max_concurrent=1",
    )  # fmt: skip
    searching = begin(file, *options)
    said = to_its_end(searching, tmp_path / "runs" / "tiny" / "trials", slots=1)
    assert searching.returncode == 0, said
    search = plan_search(read_document(file, options))
    assert len(search.candidates) == 4 and search.is_over()
    assert sorted(candidate.state for candidate in search.candidates) == ["finished"] * 2 + ["stopped"] * 2
    ((one, two),) = search.finalists()
    assert [candidate.state for candidate in (one, two)] == ["finished"] * 2 and two.settings.seed == 1
    assert "finalists at full length" in said and "waits" not in said
    for name in ("trials.parquet", "parallel.png", "curves.png", "best.yaml"):
        assert (search.folder / name).exists()
    assert "all 4 trials have ended" in tune(file, *options).stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "scheduler", ["{kind: hyperband, grace: 2, eta: 2}", "{kind: pbt, interval: 2, grace: 2, quantile: 0.5}"]
)
def test_rays_own_schedulers(scheduler: str, small_corpus: Path, tmp_path: Path) -> None:
    """Hyperband stops some and brings others to their end; PBT has the worst go on from the best, each in its own folder."""
    file = search_file(
        small_corpus, tmp_path, {"stages.finetune.optim.lr": {"log_uniform": [1e-4, 1e-2]}},
        stages__finetune__evaluate_every_steps=2, stages__finetune__steps=16,
    )  # fmt: skip
    options = ("search.trials=3", f"search.scheduler={scheduler}", "search.resources.cpus=0.5")
    tune(file, *options)
    search = plan_search(read_document(file, options))
    states = [candidate.state for candidate in search.candidates]
    assert set(states) <= {"finished", "stopped"} and "finished" in states
    exchanges = list(search.folder.glob("trials/*/exchanges.jsonl"))
    if "pbt" in scheduler:
        assert states == ["finished"] * 3 and exchanges
        for exchange in exchanges:
            rate = read_yaml(exchange.parent / "settings.yaml")["base"]["stages"]["finetune"]["optim"]["lr"]
            assert rate == pytest.approx(settings_now(exchange.parent)["stages.finetune.optim.lr"])
    for candidate in search.candidates:
        steps = [reading.step for reading in read_readings(candidate.folder) if reading.split == "valid"]
        assert steps == sorted(set(steps))


@pytest.mark.slow
def test_a_failed_trial_is_told_and_the_others_go_on(small_corpus: Path, tmp_path: Path) -> None:
    """An absurd learning rate diverges: the search ends the others, says so, exits with 1, and tries it again next time."""
    rates = {"stages.finetune.optim.lr": [1e-3, 1e30]}
    file = search_file(small_corpus, tmp_path, rates, stages__finetune__evaluate_every_steps=8)
    done = tune(file, check=1)
    assert "failed: Diverged: finetune: loss is not a number" in done.stdout
    assert "finished" in done.stdout
    assert "1 of 2 trials to run" in tune(file, check=1).stdout
