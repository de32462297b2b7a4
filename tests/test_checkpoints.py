"""Checkpoints on a real disk: written beside training, whole or not at all, and the newest whole one is found."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_run, train_here
from distributed.test_ranks import DOOR, end_of, start_ranks, write_run
from test_engine import Layers, batches, equal, open_engine, step

from benchmarks.forker import Forker
from dstrain import checkpoints as checkpoints_module
from dstrain.checkpoints import BEST_BYTES, Checkpoints, Keep, Unsaved, bytes_per_parameter, newest_whole, standing
from dstrain.engine import Engine, Ranks
from dstrain.loop import keep
from dstrain.schema import UserError


@pytest.fixture
def engine(ranks: Ranks) -> Iterator[Engine]:
    made = open_engine(Layers(), "zero1", ranks)
    for features in batches(2):
        step(made, features)
    yield made
    made.close()


def names(folder: Path) -> list[str]:
    return sorted(place.name for place in folder.iterdir())


def three(engine: Engine, folder: Path) -> None:
    """Checkpoints of steps 10, 20 and 30, all of the same weights."""
    with Checkpoints(folder, engine.ranks, Keep(last=3), print) as checkpoints:
        for number in (10, 20, 30):
            checkpoints.save(engine, number, 0, lambda number=number: {"step": number})  # type: ignore[misc]


# ---------------------------------------------------------------------------------------------- what is on disk


def test_a_checkpoint_is_its_files_and_what_they_ought_to_be(engine: Engine, tmp_path: Path) -> None:
    three(engine, tmp_path)
    assert names(tmp_path) == ["step-00000010", "step-00000020", "step-00000030"], "no draft stays"
    place = tmp_path / "step-00000030"
    manifest = json.loads((place / "manifest.json").read_text())
    files = {str(file.relative_to(place)): file.stat().st_size for file in place.rglob("*.pt")}
    assert {name: entry["bytes"] for name, entry in manifest["files"].items()} == files and len(files) == 2
    assert not list(place.rglob("*.py")), "DeepSpeed's converter reads pickle"
    said: list[str] = []
    assert newest_whole(tmp_path, said.append) == place and said == []
    assert newest_whole(tmp_path / "none", said.append) is None


def spoil(checkpoint: Path, how: str) -> str:
    """Damages a checkpoint; returns what is to be said of it."""
    (file,) = checkpoint.rglob("*optim_states.pt")
    content = file.read_bytes()
    if how == "cut":
        file.write_bytes(content[:-7])
        return f"engine/{file.name} has {len(content) - 7} of {len(content)} bytes"
    if how == "flipped":
        file.write_bytes(content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])
        return f"engine/{file.name} holds other bytes than were written"
    if how == "gone":
        file.unlink()
        return f"{file.name} is missing"
    if how == "no manifest":
        (checkpoint / "manifest.json").unlink()
        return "manifest.json is missing"
    (checkpoint / "manifest.json").write_text('{"files": {"engine')
    return "manifest.json cannot be read"


@pytest.mark.parametrize("how", ["cut", "flipped", "gone", "no manifest", "half a manifest"])
def test_a_damaged_one_is_named_and_the_next_older_one_is_used(
    how: str, engine: Engine, ranks: Ranks, tmp_path: Path
) -> None:
    three(engine, tmp_path)
    what = spoil(tmp_path / "step-00000030", how)
    said: list[str] = []
    with Checkpoints(tmp_path, ranks, Keep(last=2), said.append) as checkpoints:
        assert checkpoints.resume(engine) == {"step": 20}
        assert said == [f"{tmp_path}/step-00000030: this checkpoint is damaged ({what}); step-00000020 is taken instead"]
        checkpoints.save(engine, 30, 0, lambda: {"step": "30 again"})
    assert names(tmp_path) == ["step-00000020", "step-00000030"], "the damaged one is no longer among the last"
    assert newest_whole(tmp_path, said.append) == tmp_path / "step-00000030"
    with Checkpoints(tmp_path, ranks, Keep(), said.append) as checkpoints:
        assert checkpoints.resume(engine) == {"step": "30 again"}


def test_when_none_is_whole_that_is_one_sentence_with_a_way_out(engine: Engine, ranks: Ranks, tmp_path: Path) -> None:
    three(engine, tmp_path)
    for place in standing(tmp_path):
        spoil(place, "gone")
    with Checkpoints(tmp_path, ranks, Keep(), print) as checkpoints, pytest.raises(UserError) as error:
        checkpoints.resume(engine)
    assert "none of its checkpoints is whole (step-00000030: " in str(error.value)
    assert str(error.value).endswith("restore one from a copy, or remove the folder to train its stage anew")


def test_what_a_death_left_half_done_is_neither_used_nor_kept(engine: Engine, ranks: Ranks, tmp_path: Path) -> None:
    three(engine, tmp_path)
    draft = tmp_path / "step-00000040.draft"
    shutil.copytree(tmp_path / "step-00000030", draft)
    (draft / "rank-0.json").write_text("{}")  # a part that would make a new checkpoint of this step look complete
    with Checkpoints(tmp_path, ranks, Keep(last=1), print) as checkpoints:
        assert checkpoints.resume(engine) == {"step": 30}
        checkpoints.save(engine, 40, 0, lambda: {"step": 40})
    assert names(tmp_path) == ["step-00000040"] and newest_whole(tmp_path, print)


def test_a_users_copies_are_neither_used_nor_removed(engine: Engine, ranks: Ranks, tmp_path: Path) -> None:
    three(engine, tmp_path)
    copies = ["copies.draft", "step-00000030.bak", "step-00000030 (copy)", "step-00000090.tar.gz", "step-", "step-latest"]
    for name in copies:
        shutil.copytree(tmp_path / "step-00000020", tmp_path / name)
    said: list[str] = []
    with Checkpoints(tmp_path, ranks, Keep(last=1), said.append) as checkpoints:
        assert checkpoints.resume(engine) == {"step": 30}
        checkpoints.save(engine, 40, 0, lambda: {"step": 40})
        checkpoints.settle(needed=True)
    assert said == [] and names(tmp_path) == sorted([*copies, "step-00000040"])


def test_the_newest_is_that_of_the_largest_step(tmp_path: Path) -> None:
    for name in ("step-00000120", "step-99999999", "step-100000000"):
        (tmp_path / name).mkdir()
    assert [place.name for place in standing(tmp_path)] == ["step-100000000", "step-99999999", "step-00000120"]


def test_readings_are_on_disk_before_a_checkpoint_counts(
    engine: Engine, ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss of power must not leave a checkpoint of a step whose readings are gone: a resume computes them no more."""
    folder = tmp_path / "stages/pretrain/checkpoints"
    (tmp_path / "readings.jsonl").write_text("{}\n")
    done: list[str] = []
    real_sync, real_rename = os.fsync, os.rename

    def sync(number: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{number}")).name)
        real_sync(number)

    def rename(old: Path, new: Path) -> None:
        done.append(f"-> {Path(new).name}")
        real_rename(old, new)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "rename", rename)
    with Checkpoints(folder, ranks, Keep(), print) as checkpoints:
        checkpoints.save(engine, 2, 0, dict)
        checkpoints.settle(needed=True)
        assert done.index("readings.jsonl") < done.index(tmp_path.name) < done.index("-> step-00000002")
        done.clear()
    assert done == ["readings.jsonl", tmp_path.name], "and again before the stage is said to be done"


# ------------------------------------------------------------------------------------------------ what is kept


def test_the_last_ones_the_best_and_milestones_stay() -> None:
    places = [Path(f"step-{number:08d}") for number in (70, 60, 50, 40, 30, 20, 10)]

    def gone(keep: Keep, best: int) -> list[int]:
        return [int(place.name[5:]) for place in keep.surplus(places, best)]

    assert gone(Keep(last=2), 0) == [50, 40, 30, 20, 10]
    assert gone(Keep(last=2), 70) == [50, 40, 30, 20, 10]
    assert gone(Keep(last=1, milestone_every=30), 20) == [50, 40, 10]
    assert gone(Keep(last=9), 0) == []


def test_a_stage_keeps_what_its_settings_say(small_corpus: Path, tmp_path: Path, ranks: Ranks) -> None:
    changes: dict[str, Any] = {"stages__pretrain": None, "stages__finetune__checkpoint_every": 1}
    changes |= {"stages__finetune__milestone_every": 3, "stages__finetune__min_delta": 10.0}  # the first is the best
    told = train_here(tiny_run(small_corpus, tmp_path, stages__finetune__evaluate_every_steps=2, **changes), ranks)
    kept = names(told.settings.folder / "stages/finetune/checkpoints")
    assert kept == [f"step-{number:08d}" for number in (2, 3, 6, 7)], "best, two milestones, the last two (6 is both)"
    [cost] = [sentence for sentence in told.sentences if "checkpoints: training waited" in sentence]
    assert cost.startswith("finetune: 7 checkpoints")


def test_the_clock_asks_for_checkpoints_too(small_corpus: Path, tmp_path: Path, ranks: Ranks) -> None:
    changes = {"stages__pretrain": None, "stages__finetune__checkpoint_every": 100, "stages__finetune__keep_checkpoints": 9}
    for name, minutes in {"never": None, "rarely": 60.0, "always": 1e-9}.items():
        more = {"name": name, "stages__finetune__checkpoint_minutes": minutes, **changes}
        folder = train_here(tiny_run(small_corpus, tmp_path, **more), ranks).settings.folder
        kept = [place.name for place in standing(folder / "stages/finetune/checkpoints")]
        assert len(kept) == (8 if name == "always" else 0), "before each of the steps"


@pytest.mark.parametrize(
    ("plan", "precision"),
    [(f"zero{stage}", precision) for stage in range(4) for precision in ("fp32", "bf16")],
)
def test_what_a_checkpoint_takes_is_known_beforehand(plan: str, precision: str, ranks: Ranks, tmp_path: Path) -> None:
    class Large(Layers):
        def __init__(self) -> None:
            super().__init__()
            self.second = torch.nn.Linear(16, 20_000)

    made = open_engine(Large(), plan, ranks, precision)
    step(made, batches(1)[0])
    with Checkpoints(tmp_path, ranks, Keep(), print) as checkpoints:
        checkpoints.save(made, 1, 0, dict)
    parameters = sum(weight.numel() for name, weight in made.weights().items() if name != "kept")
    keep(made, best := tmp_path / "best.safetensors")
    made.close()
    taken = sum(file.stat().st_size for file in tmp_path.rglob("*.pt"))
    wanted = parameters * bytes_per_parameter(int(plan[-1]), precision != "fp32")
    assert taken == pytest.approx(wanted, rel=0.02)
    assert best.stat().st_size == pytest.approx(parameters * BEST_BYTES, rel=0.02)


def test_the_forecast_counts_checkpoints_and_best_weights() -> None:
    said = Keep(last=2, milestone_every=50).on_disk(1_000_000, 1, False, steps=100)
    assert said == (
        "checkpoints of 16.0 MB each, at most 6 at a time (2 last, the best, one being written, 2 milestones), and twice "
        "4.0 MB for the best weights (kept, and being written): 104.0 MB"
    )


# ------------------------------------------------------------------------------------------ beside training


def test_training_goes_on_while_a_checkpoint_is_written(
    engine: Engine, ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk holds everything up until two more steps are taken: what is written is what was when it was asked."""
    may_write, write = threading.Event(), checkpoints_module._write_state

    def slowly(*given: Any) -> Any:
        assert may_write.wait(60)
        return write(*given)

    monkeypatch.setattr(checkpoints_module, "_write_state", slowly)
    before = engine.weights()
    with Checkpoints(tmp_path, ranks, Keep(), print) as checkpoints:
        checkpoints.save(engine, 2, 0, lambda: {"step": 2})
        for features in batches(2, seed=3):
            step(engine, features)
        assert standing(tmp_path) == [], "not before all of it is on disk"
        may_write.set()
        checkpoints.settle()
        assert [place.name for place in standing(tmp_path)] == ["step-00000002"]
    after = engine.weights()
    assert not equal(before, after)
    assert engine.load(tmp_path / "step-00000002") == {"step": 2}
    assert equal(engine.weights(), before)


def test_a_run_that_fails_leaves_the_checkpoint_that_was_being_written(
    engine: Engine, ranks: Ranks, tmp_path: Path
) -> None:
    def fail() -> None:
        with Checkpoints(tmp_path, ranks, Keep(), print) as checkpoints:
            checkpoints.save(engine, 2, 0, dict)
            raise RuntimeError("of something else")

    with pytest.raises(RuntimeError, match="of something else"):
        fail()
    assert newest_whole(tmp_path, print) == tmp_path / "step-00000002"


# ------------------------------------------------------------------------------------------------ a full disk


@pytest.mark.parametrize("noticed", ["before", "while writing"])
def test_a_full_disk_is_told_and_the_last_good_checkpoint_stands(
    noticed: str, engine: Engine, ranks: Ranks, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    if noticed == "while writing":  # another process takes the room meanwhile
        monkeypatch.setattr(checkpoints_module, "bytes_of", lambda state: 0)
    with Checkpoints(small_disk / "checkpoints", ranks, Keep(), said.append) as checkpoints:
        checkpoints.save(engine, 10, 0, lambda: {"step": 10})
        checkpoints.settle(needed=True)
        (small_disk / "other").write_bytes(bytes(shutil.disk_usage(small_disk).free - 4096))
        checkpoints.save(engine, 20, 0, lambda: {"step": 20})
        checkpoints.settle()
        [sentence] = said
        assert sentence.startswith(f"{small_disk}/checkpoints/step-00000020: this checkpoint could not be written (No space ")
        assert "MB are free there; step-00000010 stands; make room, or give another output_dir" in sentence
        assert sentence.endswith("; training goes on")
        assert names(small_disk / "checkpoints") == ["step-00000010"]
        checkpoints.save(engine, 20, 0, lambda: {"step": 20})
        with pytest.raises(Unsaved, match="No space left on device"):
            checkpoints.settle(needed=True)
        (small_disk / "other").unlink()
        checkpoints.save(engine, 20, 0, lambda: {"step": 20})
        checkpoints.settle(needed=True)
        assert checkpoints.resume(engine) == {"step": 20}


def test_best_weights_that_do_not_fit_end_the_run(engine: Engine, small_disk: Path) -> None:
    file = small_disk / "stages/best.safetensors"
    keep(engine, file)
    kept = file.read_bytes()
    (small_disk / "other").write_bytes(bytes(shutil.disk_usage(small_disk).free))
    with pytest.raises(Unsaved, match=r"best\.safetensors: the weights could not be written \(.*MB are free there; make room"):
        keep(engine, file)
    assert file.read_bytes() == kept and names(file.parent) == ["best.safetensors"]


@pytest.mark.slow
def test_a_run_goes_on_without_checkpoints_and_ends_in_a_sentence_where_it_cannot(
    small_corpus: Path, small_disk: Path, tmp_path: Path, forker: Forker
) -> None:
    """Every checkpoint is a milestone, so there is soon no room for another; a second run finds none for its weights."""
    changes = {f"stages__finetune__{name}_every": 1 for name in ("checkpoint", "milestone")}
    file = write_run(small_corpus, small_disk, "run", stages__pretrain=None, stages__finetune__steps=12, **changes)

    def start(*words: str) -> subprocess.CompletedProcess[str]:
        return end_of(start_ranks(forker, 1, tmp_path, DOOR, file, *words), tmp_path)

    done = start()
    assert done.returncode == 0, done.stderr
    assert "this checkpoint could not be written (No space left on device)" in done.stdout
    assert newest_whole(small_disk / "run/stages/finetune/checkpoints", print)
    (small_disk / "other").write_bytes(bytes(shutil.disk_usage(small_disk).free - 100_000))
    done = start("name=two")
    assert done.returncode == 1, done.stderr
    assert "could not be written" in done.stderr and "make room" in done.stderr and "Traceback" not in done.stderr
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    done = start("name=two")
    assert done.returncode == 0, done.stderr


def test_a_folder_that_cannot_be_written_is_told_too(engine: Engine, ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    said: list[str] = []
    with Checkpoints(tmp_path / "checkpoints", ranks, Keep(), said.append) as checkpoints:
        checkpoints.save(engine, 1, 0, dict)
        checkpoints.settle()
    assert "there is no earlier one" in said[0] and len(said) == 1
