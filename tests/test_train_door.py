"""The command line of train.py as a user meets it: what it answers, what it refuses, and what it leaves behind."""
# ruff: noqa: E501  (messages stand verbatim)

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_run

from dstrain import stopping, train
from dstrain.engine import Diverged, Ranks
from dstrain.loop import Interrupted
from dstrain.readings import Reading, read_readings
from dstrain.run import Outcome, Watch
from dstrain.schema import UserError, dump_yaml, read_yaml
from dstrain.settings import RunSettings, load_run

ROOT = Path(__file__).resolve().parents[1]
DOOR = ROOT / "dstrain" / "train.py"
ONE = Ranks(0, 1, torch.device("cpu"), "test")

Write = Callable[..., Path]
Answer = tuple[int, str, str]


@pytest.fixture
def write(tmp_path: Path, small_corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes tiny_run with changes as f.yaml; the test then stands in an empty folder beside it."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in ("RANK", "SLURM_PROCID", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def write(parts: dict[str, Any] | None = None, **changes: Any) -> Path:
        file = tmp_path / "f.yaml"
        tree = {"base": tiny_run(small_corpus, tmp_path / "runs", **changes), **(parts or {})}
        file.write_text(dump_yaml(tree), encoding="utf-8")
        return file

    return write


@pytest.fixture
def answer(capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Runs the door in this process: (exit status, standard output, standard error)."""

    def answer(*argv: object) -> Answer:
        try:
            status = train.main([str(word) for word in argv])
        except SystemExit as end:  # argparse's way out
            status = int(str(end.code))
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return answer


@pytest.fixture(autouse=True)
def _signals_as_they_were() -> Iterator[None]:
    numbers = stopping.SIGNALS
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def command(*argv: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the door as a program of its own."""
    own = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.run(
        [sys.executable, str(DOOR), *map(str, argv)],
        env={**own, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


# ------------------------------------------------------------------------------------------------ as a program


def test_help_answers_at_once_and_imports_nothing_heavy() -> None:
    code = (
        "import runpy, sys; sys.argv = ['train.py', '--help']\n"
        "try: runpy.run_path(sys.path.pop(), run_name='__main__')\n"
        "except SystemExit as end: print(end.code, sorted({'torch', 'numpy', 'yaml', 'pydantic', 'deepspeed', 'ray', 'mlflow'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.append({str(DOOR)!r})\n{code}"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr
    assert "usage: train.py" in done.stdout and "75 come back" in done.stdout
    seconds = []
    for _ in range(3):
        before = used_by_children()
        assert command("--help").returncode == 0
        seconds.append(used_by_children() - before)
    assert min(seconds) < 0.3


def used_by_children() -> float:
    """CPU seconds of the processes that have ended: no clock that others on the machine can slow."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_a_mistake_is_a_sentence_and_exit_status_2(write: Write, tmp_path: Path) -> None:
    file = write(encoder__num_head=3)
    done = command(file)
    assert done.returncode == 2
    assert done.stderr == f"{file}: encoder.num_head: no such setting; did you mean num_heads?\n"
    assert done.stdout == ""
    assert not (tmp_path / "runs").exists() and not list((tmp_path / "here").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("deepspeed=none.json", "none.json: cannot be read (No such file or directory); give the path of a DeepSpeed JSON\n"),
        ("stages.finetune.corpus={path: none}", "corpus none: there is no such file or folder"),
        ("stages.finetune.corpus.labelled=false", "has no labels to classify by"),
        ("stages.pretrain.starts_from=none", "starts_from: none holds no finished stage"),
        ("precision=fp16", "precision: fp16 needs a GPU, and this run is on a CPU; write auto, bf16 or fp32\n"),
        ("stages.pretrain.accumulation=999", "one optimizer step takes 999 micro-batches"),
    ],
)  # fmt: skip
def test_a_refused_start_leaves_nothing_behind(write: Write, tmp_path: Path, override: str, said: str) -> None:
    if torch.cuda.is_available() and "fp16" in override:
        pytest.skip("a GPU has fp16")
    done = command(write(), override)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists() and not list((tmp_path / "here").iterdir())


def test_a_second_signal_ends_at_once() -> None:
    code = (
        "import os, signal; from dstrain.stopping import stop_on_signals; stop = stop_on_signals('saving')\n"
        "os.kill(os.getpid(), signal.SIGTERM); assert stop.is_set(); os.kill(os.getpid(), signal.SIGTERM); print('still here')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "")
    assert done.stderr == "saving (again: at once)\n"


def test_another_signal_at_the_same_time_is_an_echo_of_the_first() -> None:
    """DeepSpeed's launcher sends SIGTERM when it gets the SIGINT of a Ctrl-C, which reaches the ranks too."""
    code = (
        "import os, signal, time; from dstrain import stopping; stop = stopping.stop_on_signals('saving')\n"
        "stopping.ECHO_SECONDS = 0.5\n"
        "os.kill(os.getpid(), signal.SIGINT); assert stop.is_set(); os.kill(os.getpid(), signal.SIGTERM)\n"
        "print('still here', flush=True); time.sleep(0.6); os.kill(os.getpid(), signal.SIGTERM); print('and here')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "still here\n")
    assert done.stderr == "saving (again: at once)\n"


def test_a_rank_stops_when_the_deepspeed_command_above_its_launcher_has_gone(tmp_path: Path) -> None:
    rank = (
        "import time; from dstrain import stopping; stopping.LOOK_SECONDS = 0.05; stopping.follow_launcher()\n"
        "stop = stopping.stop_on_signals('saving'); print('begun', flush=True); print(stop.wait(20))"
    )
    start = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"
    deepspeed = tmp_path / "deepspeed"
    deepspeed.write_text(start)
    command = [sys.executable, str(deepspeed), start, rank, "deepspeed.launcher.launch"]
    above = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert above.stdout is not None and above.stdout.readline() == "begun\n"
    above.terminate()
    assert above.communicate(timeout=30)[0] == "the deepspeed command has gone\nsaving (again: at once)\nTrue\n"


def test_before_training_a_signal_ends_the_program_with_a_sentence() -> None:
    code = (
        "import os, signal; from dstrain.stopping import leave_on_signals; leave_on_signals('nothing begun')\n"
        "os.kill(os.getpid(), signal.SIGTERM); print('still here')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (75, "", "nothing begun\n")


# ------------------------------------------------------------------------------------------------ what it refuses


@pytest.mark.parametrize(
    ("changes", "argv", "said"),
    [
        ({"encoder__num_head": 2}, (), "encoder.num_head: no such setting; did you mean num_heads?"),
        ({}, ("stages.finetune.optim.lr=0",), "stages.finetune.optim.lr: must be greater than 0, but is 0"),
        ({}, ("stages.finetun.optim.lr=1",), "stages: finetun has neither objective nor corpus; did you mean finetune?"),
        ({"encoder__attention": {"kind": "spda"}}, (), "encoder.attention.kind: 'spda' is not a kind there is; did you mean sdpa?"),
        ({"stages": {}}, (), "stages: is empty; name at least one stage"),
    ],
)  # fmt: skip
def test_mistakes_in_the_settings(
    write: Write,
    answer: Callable[..., Answer],
    tmp_path: Path,
    changes: dict[str, Any],
    argv: tuple[str, ...],
    said: str,
) -> None:
    file = write(**changes)
    place = "command line" if argv else file
    assert answer(file, *argv) == (2, "", f"{place}: {said}\n")
    assert not (tmp_path / "runs").exists()


def test_mistakes_in_the_file(tmp_path: Path, answer: Callable[..., Answer]) -> None:
    file = tmp_path / "f.yaml"
    assert answer(file) == (
        2,
        "",
        f"{file}: cannot be read (No such file or directory); give the path of a YAML file\n",
    )
    assert answer(tmp_path) == (2, "", f"{tmp_path}: cannot be read (Is a directory); give the path of a YAML file\n")
    file.write_text("base:\n  name: a\n  name: b\n")
    assert answer(file)[2].endswith(
        "line 3, column 3 not readable as YAML: the key 'name' is given twice; keep one of them\n"
    )
    file.write_bytes(b"base: \xff")
    assert answer(file) == (2, "", f"{file}: byte 6 is not UTF-8; save the file as UTF-8\n")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read (No such file or directory); give the path of a DeepSpeed JSON"),
        ('{"a": ', "line 1, column 7: not readable as JSON: expecting value"),
        ('{"zero_optimisation": {"stage": 1}}', "zero_optimisation: not a key dstrain knows; did you mean zero_optimization?"),
        ('{"train_batch_size": 7}', 'train_batch_size: is 7, but the run has 1 (1 x 1 x 1: micro-batch, accumulation, ranks); write "auto" to follow the run'),
        ('{"gradient_clipping": 0.5}', 'gradient_clipping: is 0.5, but the run has 1.0 (stages.NAME.optim.clip_norm); write "auto" to follow the run'),
        ('{"optimizer": {"type": "Adam"}}', "optimizer: belongs to the run file (stages.NAME.optim: lr, betas, eps, weight_decay); remove this block"),
    ],
)  # fmt: skip
def test_mistakes_in_the_deepspeed_json(
    write: Write, answer: Callable[..., Answer], tmp_path: Path, content: str | None, said: str
) -> None:
    plan = tmp_path / "plan.json"
    if content is not None:
        plan.write_text(content)
    status, out, err = answer(write(), "--dry-run", "--deepspeed_config", plan)
    assert (status, err) == (2, f"{plan}: {said}\n")
    assert "Traceback" not in out and not (tmp_path / "runs").exists()


def test_mistakes_on_the_command_line(write: Write, answer: Callable[..., Answer]) -> None:
    for argv, said in (
        ((), "give a FILE.yaml, or --explain"),
        ((write(), "--resume", "maybe"), "invalid choice: 'maybe'"),
        ((write(), "--dry-rum"), "unrecognized arguments: --dry-rum"),
    ):
        status, _, err = answer(*argv)
        assert status == 2 and said in err and "Traceback" not in err
    assert answer(write(), "seed") == (
        2,
        "",
        "'seed': an override is written key=value, such as stages.finetune.optim.lr=3e-4\n",
    )


def test_a_rank_with_nothing_to_add_waits_for_its_launcher_and_ends_quietly() -> None:
    code = "from dstrain.stopping import wait_to_be_ended; print('waits', flush=True); wait_to_be_ended(2); print('too late')"
    rank = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert rank.stdout is not None and rank.stdout.readline() == "waits\n"
    time.sleep(0.2)
    rank.terminate()
    assert rank.communicate(timeout=30) == ("", None) and rank.returncode == 2


@pytest.mark.parametrize("name", ["RANK", "SLURM_PROCID"])
def test_only_the_first_rank_speaks(
    write: Write, answer: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "1")
    monkeypatch.setattr(stopping, "PATIENCE_SECONDS", 0.0)
    assert answer(write(), "seed=-1") == (2, "", "")


# ------------------------------------------------------------------------------------------- what it explains


def test_explain_shows_every_setting(answer: Callable[..., Answer]) -> None:
    status, out, _ = answer("--explain")
    lines = out.splitlines()
    assert status == 0 and len(lines) % 2 == 0
    assert "stages.<name>.tokens_per_batch  (default 32768, tokens, >= 8)" in lines
    assert "search.metric  (default (required))" in lines
    assert (
        lines[lines.index("seed  (default 0, >= 0)") + 1]
        == "    Every draw of the run (weights, order, masks, dropout, projections) comes from this number."
    )


@pytest.mark.parametrize(
    ("prefix", "shown"),
    [
        ("seed", ["seed"]),
        ("stages.<name>.optim.lr", ["stages.<name>.optim.lr"]),
        ("stages.finetune.optim.lr", ["stages.<name>.optim.lr"]),
        ("encoder.attention.num_hashes", ["encoder.attention<lsh>.num_hashes"]),
        ("encoder.attention<lsh>.num", ["encoder.attention<lsh>.num_hashes", "encoder.attention<lsh>.num_buckets"]),
        ("search.resources", [f"search.resources.{name}" for name in ("ranks", "cpus", "gpus", "nodes")]),
        ("stages.x.objective.pool", ["stages.<name>.objective<classify>.pooling", "stages.<name>.objective<classify>.pooler"]),
    ],
)  # fmt: skip
def test_explain_takes_an_address_as_a_file_has_it(
    answer: Callable[..., Answer], prefix: str, shown: list[str]
) -> None:
    status, out, _ = answer("--explain", prefix)
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()[::2]] == shown


def test_explain_of_nothing_says_what_there_is(answer: Callable[..., Answer]) -> None:
    status, out, err = answer("--explain", "encodr.preset")
    assert (status, out) == (2, "") and err.startswith("--explain encodr.preset: no setting begins like that")
    assert answer("--explain", "seed.x")[0] == 2, "a setting has nothing inside"
    assert "encoder" in err and len(err) < 300


# ---------------------------------------------------------------------------------------------- the dry run


def test_a_dry_run_shows_settings_plan_and_steps_and_leaves_nothing(
    write: Write, answer: Callable[..., Answer], tmp_path: Path
) -> None:
    file = write({"when": {"no_gpu": {"stages.pretrain.steps": 5}, "gpu": {"stages.pretrain.steps": 5}}}, seed=1)
    status, out, err = answer(file, "seed=7", "--dry-run")
    assert (status, err) == (0, "")
    assert "seed: 7\n" in out and "# seed = 7 (command line)" in out
    assert "# stages.pretrain.steps = 5 (when." in out
    plan = json.loads(out.partition(".json):\n")[2].partition("\n\n")[0])
    assert plan["train_batch_size"] == 1 and plan["gradient_clipping"] == 1.0
    assert "auto" not in json.dumps(plan)
    lines = [line.split() for line in out.splitlines() if " steps" in line and " parameters" in line]
    assert [(words[0], words[-2]) for words in lines] == [("pretrain", "5"), ("finetune", "8")]
    assert not (tmp_path / "runs").exists()
    shown = answer(file, "--dry-run", "--full-size")[1]
    assert "# stages" not in shown and "6 steps" in shown


def test_a_dry_run_counts_ranks(write: Write, answer: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, out, _ = answer(write(), "--dry-run")
    assert status == 0 and '"train_batch_size": 2' in out


# -------------------------------------------------------------------------------------------- claiming a folder


def test_a_start_claims_the_folder_and_the_same_start_goes_on(write: Write, tmp_path: Path) -> None:
    settings = load_run(write())
    said: list[str] = []
    train._claim(settings, ONE, False, said.append)
    assert load_run(tmp_path / "runs/tiny/settings.yaml") == settings
    train._claim(settings, ONE, False, said.append)
    (tmp_path / "runs/tiny/stages/finetune/checkpoints/step-00000001").mkdir(parents=True)  # a stage has begun
    with pytest.raises(UserError, match=r"holds a run with other settings \(seed: 0 -> 3\); give this one another name"):
        train._claim(load_run(write(seed=3)), ONE, False, said.append)


def test_starting_anew_sets_the_old_folder_aside(write: Write, tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        train._claim(load_run(write(seed=seed)), ONE, True, lambda sentence: None)
    seeds = {
        folder.name: read_yaml(folder / "settings.yaml")["base"]["seed"] for folder in (tmp_path / "runs").iterdir()
    }
    assert seeds == {"tiny": 3, "tiny.before-1": 1, "tiny.before-2": 2}


def test_a_job_that_slurm_starts_again_does_not_start_over(
    write: Write, answer: Callable[..., Answer], staged: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--resume never` is for the first start: the requeued one has the very same command line."""

    def play(settings: RunSettings, ranks: Ranks, watch: Watch, accept_changed_data: bool) -> Outcome:
        (settings.folder / "stages/finetune/checkpoints/step-00000001").mkdir(parents=True, exist_ok=True)
        raise Interrupted("saved")

    staged(play)
    never = ("--quiet", "--resume", "never")
    said = "saved; the same command without --resume never goes on from there\n"
    assert answer(write(), *never)[::2] == (75, said)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # it was asked to stop before it had begun, as its first start tokenised
    assert answer(write(), *never)[0] == 75
    assert sorted(folder.name for folder in (tmp_path / "runs").glob("tiny*")) == ["tiny", "tiny.before-1"]
    status, _, err = answer(write(), *never)
    assert status == 75 and "was begun anew by this job, which SLURM has started again; it goes on" in err
    assert sorted(folder.name for folder in (tmp_path / "runs").glob("tiny*")) == ["tiny", "tiny.before-1"]
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert answer(write(), *never)[0] == 75
    assert len([*(tmp_path / "runs").glob("tiny*")]) == 3


@pytest.mark.parametrize("anew", [False, True])
def test_a_refusal_neither_makes_nor_moves_a_folder(write: Write, tmp_path: Path, anew: bool) -> None:
    if anew:
        train._claim(load_run(write()), ONE, False, lambda sentence: None)
    before = sorted((tmp_path / "runs").rglob("*"))
    wrong = load_run(write(deepspeed="none.json", stages__finetune__corpus={"path": "none"}))
    with pytest.raises(UserError) as error:
        train._claim(wrong, ONE, anew, lambda sentence: None)
    assert "none" in str(error.value)
    assert sorted((tmp_path / "runs").rglob("*")) == before


# ------------------------------------------------------------------------------------------ how a run ends


@pytest.fixture
def staged(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[RunSettings, Ranks, Watch, bool], Outcome]], None]:
    """Puts a play in place of the training; claiming, watching, reporting and ending stay real."""

    def stage(play: Callable[[RunSettings, Ranks, Watch, bool], Outcome]) -> None:
        monkeypatch.setattr("dstrain.engine.join_ranks", lambda: ONE)
        monkeypatch.setattr("dstrain.engine.leave_ranks", lambda: None)
        monkeypatch.setattr("dstrain.run.run", lambda *given: play(*given[:4]))

    return stage


def test_a_finished_run_says_what_came_of_it(
    write: Write, answer: Callable[..., Answer], staged: Any, tmp_path: Path
) -> None:
    def play(settings: RunSettings, ranks: Ranks, watch: Watch, accept_changed_data: bool) -> Outcome:
        watch.say("fp32: on a CPU")
        watch.tag({"device": "cpu"})
        watch.report(Reading("finetune", "valid", 8, 8, 100, 1.0, {"loss": 0.5}))
        return Outcome(
            {"pretrain": "finished", "finetune": "finished"}, {"pretrain": None, "finetune": 0.75}, {"accuracy": 0.5}
        )

    staged(play)
    status, out, err = answer(write(), "seed=4")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert "seed = 4 (command line)" in lines and "fp32: on a CPU" in lines
    assert any(line.startswith("finetune  valid") for line in lines), "a progress line"
    assert lines[-4:-1] == [
        "pretrain: finished",
        "finetune: finished, best valid f1_macro 0.750",
        "test: accuracy 0.500",
    ]
    assert lines[-1].startswith(f"run folder: {tmp_path}/runs/tiny ")
    assert [reading.values for reading in read_readings(tmp_path / "runs/tiny")] == [{"loss": 0.5}]


def test_quiet_leaves_the_outcome_alone(write: Write, answer: Callable[..., Answer], staged: Any) -> None:
    def play(settings: RunSettings, ranks: Ranks, watch: Watch, accept_changed_data: bool) -> Outcome:
        watch.say("fp32: on a CPU")
        watch.report(Reading("finetune", "train", 8, 8, 100, 1.0, {"loss": 0.5}))
        return Outcome({"finetune": "finished"}, {"finetune": None}, {})

    staged(play)
    status, out, err = answer(write(), "--quiet", "seed=4")
    assert (status, err) == (0, "seed = 4 (command line)\nfp32: on a CPU\n"), "what a run has to say is said, progress is not"
    assert [line.partition(":")[0] for line in out.splitlines()] == ["finetune", "run folder"]


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (
            Interrupted("saved finetune at step 4"),
            75,
            "saved finetune at step 4; the same command goes on from there\n",
        ),
        (Diverged("finetune: the loss is not a number"), 1, "finetune: the loss is not a number\n"),
        (UserError("corpus: broken; mend it"), 2, "corpus: broken; mend it\n"),
    ],
)
def test_each_end_has_its_exit_status(
    write: Write, answer: Callable[..., Answer], staged: Any, error: Exception, status: int, said: str
) -> None:
    def play(settings: RunSettings, ranks: Ranks, watch: Watch, accept_changed_data: bool) -> Outcome:
        raise error

    staged(play)
    assert answer(write(), "--quiet")[::2] == (status, said)


def test_a_signal_is_passed_on_to_the_run(write: Write, answer: Callable[..., Answer], staged: Any) -> None:
    def play(settings: RunSettings, ranks: Ranks, watch: Watch, accept_changed_data: bool) -> Outcome:
        assert not watch.asked_to_stop()
        os.kill(os.getpid(), signal.SIGUSR1)
        deadline = time.monotonic() + 5
        while not watch.asked_to_stop() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert watch.asked_to_stop()
        raise Interrupted("saved")

    staged(play)
    assert answer(write(), "--quiet")[0] == 75


def test_other_ranks_write_and_say_nothing(write: Write, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    settings = load_run(write())
    document: Any = None
    with train._watching(settings, document, speaks=False, quiet=False) as watch:
        watch.report(Reading("finetune", "train", 8, 8, 100, 1.0, {"loss": 0.5}))
        watch.say("hello")
        watch.tag({"a": "b"})
    assert capsys.readouterr() == ("", "")
    assert not (tmp_path / "runs").exists()


def test_endings_have_words_of_mlflow_and_ours() -> None:
    assert train.ending(None) == ("FINISHED", "finished")
    assert train.ending(Interrupted("saved")) == ("KILLED", "Interrupted: saved")
    assert train.ending(KeyboardInterrupt()) == ("KILLED", "KeyboardInterrupt: ")
    assert train.ending(Diverged("nan")) == ("FAILED", "Diverged: nan")
