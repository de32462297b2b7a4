"""What a checkpoint costs: the time that training waits for the copy, the writing beside it, and a resume.

    python -m benchmarks.checkpoints [--presets bert_tiny bert_small] [--zero 1] [--rounds 5] [--json FILE] [--folder DIR]

Every round takes some steps, asks for a checkpoint (its copy is what training waits for), takes steps while it is written, and
waits for the disk. `apart_s` is how far checkpoints must lie apart for the waiting to be 1 % of the time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import environment
from dstrain.checkpoints import FOLDER, Checkpoints, Keep, damage_of, standing
from dstrain.engine import Engine, Ranks, join_ranks, leave_ranks
from dstrain.loop import prepared
from dstrain.model.encoder import Encoder
from dstrain.objective import Task
from dstrain.optim import build_optimizer
from dstrain.precision import choose
from dstrain.run import groups, make_ready, run_vocabulary
from dstrain.schema import validate
from dstrain.settings import RunSettings

ROOT = Path(__file__).resolve().parents[1]
STEPS = 3


@dataclass(frozen=True)
class Row:
    """One model; seconds are medians over the rounds."""

    preset: str
    zero: int
    parameters: int
    megabytes: float
    step_s: float
    step_beside_writing_s: float
    blocked_s: float
    written_s: float
    checked_s: float
    """Sizes and checksums, before a resume."""
    loaded_s: float

    @property
    def apart_s(self) -> float:
        """Training between two checkpoints of which the waiting is 1 %."""
        return 99 * self.blocked_s


def settings_of(preset: str, zero: int, folder: Path, steps: int) -> RunSettings:
    """Masked words over the documentation of Python itself: a corpus that every machine has."""
    stage = {
        "objective": {"kind": "mlm"}, "corpus": {"name": "pydocs", "labelled": False}, "max_length": 128,
        "tokens_per_batch": 2048, "steps": steps,
    }  # fmt: skip
    tree = {
        "name": preset, "output_dir": str(folder), "encoder": {"preset": preset}, "vocabulary": {"size": 8192},
        "deepspeed": str(ROOT / f"ds_configs/zero{zero}.json"), "stages": {"pretrain": stage}, "precision": "fp32",
    }  # fmt: skip
    return validate(RunSettings, tree, "benchmark")


class Trainer:
    """A model, and its steps one by one."""

    def __init__(self, settings: RunSettings, ranks: Ranks) -> None:
        self.settings, stage = settings, settings.stages["pretrain"]
        vocabulary = run_vocabulary(settings, print)
        ready = make_ready(settings, vocabulary, choose(settings.precision, ranks.device), ranks, print)["pretrain"]
        task = Task(Encoder(settings.encoder, vocabulary.size, settings.seed), ready.objective)
        self.parameters = sum(parameter.numel() for parameter in task.parameters())
        optimizer = build_optimizer(groups(task, stage), stage.optim, ranks.device)
        self.engine = Engine(task, optimizer, ready.plan, ranks)
        self.course, self.objective = ready.course, ready.objective
        steps = range(ready.course.total_steps)
        self.shares: Iterator[Any] = prepared(ready.course, ready.corpus.splits["train"], ready.objective, ranks, steps)

    def steps(self) -> float:
        """Takes STEPS steps and returns the median of their seconds."""
        return statistics.median(self._step() for _ in range(STEPS))

    def _step(self) -> float:
        mine, began = next(self.shares), time.perf_counter()
        task: Any = self.engine.task
        for piece in mine.batches:
            task.set_step(mine.step, piece.micro_batch)
            loss, _ = self.engine(piece.batch.to(self.engine.ranks.device))
            self.engine.backward(loss / mine.weight)
            self.engine.step(1e-4)
        if self.engine.ranks.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began


def measure(preset: str, zero: int, rounds: int, folder: Path, ranks: Ranks) -> Row:
    """One row of the table."""
    settings = settings_of(preset, zero, folder, steps=2 * STEPS * rounds + STEPS)
    trainer = Trainer(settings, ranks)
    trainer.steps()
    taken: list[tuple[float, float, float, float]] = []
    for number in range(rounds):
        with Checkpoints(folder / FOLDER, ranks, Keep(last=1), print) as checkpoints:
            alone = trainer.steps()
            checkpoints.save(trainer.engine, number + 1, 0, dict)
            blocked = checkpoints.blocked_seconds
            beside = trainer.steps()
            checkpoints.settle(needed=True)
            taken.append((alone, beside, blocked, checkpoints.written_seconds))
    [place] = standing(folder / FOLDER)
    began = time.perf_counter()
    assert not damage_of(place)
    checked = time.perf_counter()
    trainer.engine.load(place)
    loaded = time.perf_counter()
    trainer.engine.close()
    megabytes = sum(file.stat().st_size for file in place.rglob("*.pt")) / 1e6
    alone, beside, blocked, written = (statistics.median(column) for column in zip(*taken, strict=True))
    return Row(
        preset, zero, trainer.parameters, megabytes, alone, beside, blocked, written, checked - began, loaded - checked
    )


def table(rows: list[Row]) -> str:
    """The rows for a reader."""
    lines = [
        "preset       ZeRO  parameters      MB   step s  beside  blocked s  written s  checked s  loaded s  1 % when apart"
    ]
    lines += [
        f"{row.preset:<12} {row.zero:>4}  {row.parameters:>10,} {row.megabytes:>7.1f} {row.step_s:>8.3f} "
        f"{row.step_beside_writing_s:>7.3f} {row.blocked_s:>10.3f} {row.written_s:>10.3f} {row.checked_s:>10.3f} "
        f"{row.loaded_s:>9.3f} {row.apart_s:>13.1f} s"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> int:
    """Measures, prints, and keeps what was asked for."""
    words = argparse.ArgumentParser(prog="python -m benchmarks.checkpoints", description="What a checkpoint costs.")
    words.add_argument("--presets", nargs="+", default=["bert_tiny", "bert_small"])
    words.add_argument("--zero", type=int, choices=range(4), default=1, help="ZeRO stage (default 1)")
    words.add_argument("--rounds", type=int, default=5, help="checkpoints of each model (default 5)")
    words.add_argument("--folder", type=Path, help="where they are written, on the disk to be measured")
    words.add_argument("--json", type=Path, help="write rows and environment here")
    given = words.parse_args()
    ranks = join_ranks()
    rows = []
    for preset in given.presets:
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            rows.append(measure(preset, given.zero, given.rounds, Path(folder), ranks))
    print(table(rows))
    if given.json:
        found = {"environment": environment(ranks.device, torch.get_num_threads(), ("deepspeed",))}
        found["rows"] = [{**asdict(row), "apart_s": row.apart_s} for row in rows]  # type: ignore[assignment]
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    leave_ranks()
    return 0


if __name__ == "__main__":
    sys.exit(main())
