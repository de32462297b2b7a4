"""What a healthy step pays for being watched: the look at its loss and gradient, the common stop, the way back.

    python -m benchmarks.checks [--presets bert_tiny bert_small] [--zero 0 1 2 3] [--rounds 200] [--json FILE]

One engine takes the same micro-batch again and again, in turn as a run does (`Healer.step`) and as DeepSpeed alone would. The
ratio is taken within each pair, of the CPU time of all threads, which neighbours on the machine do not change.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.checkpoints import Trainer, settings_of
from benchmarks.measure import environment, race
from dstrain.engine import Diverged, Ranks, join_ranks, leave_ranks
from dstrain.healing import Attempt, Healer, HealingSettings, Health
from dstrain.loop import Meter, Progress, take_step
from dstrain.optim import set_lr

LR = 1e-5


@dataclass(frozen=True)
class Row:
    """One model at one ZeRO stage."""

    preset: str
    zero: int
    tokens: int
    """Of the micro-batch."""
    bare_ms: float
    """CPU time of a step without any check, the median."""
    extra_percent: float
    """What the checks add to it: the median over the pairs, with the 95 % interval of a bootstrap of that median."""
    low_percent: float
    high_percent: float


class Steps:
    """The same step in two ways."""

    def __init__(self, trainer: Trainer, ranks: Ranks, folder: Path) -> None:
        self._engine, self._ranks, self._mine = trainer.engine, ranks, next(trainer.shares)
        self._healer = Healer(trainer.engine, HealingSettings(), "pretrain", folder, Diverged)
        self._health = Health()
        stage = trainer.settings.stages["pretrain"]
        self._meter = Meter("pretrain", trainer.course, trainer.objective, trainer.engine, stage, Progress())
        self.tokens = self._mine.tokens

    def watched(self) -> None:
        """As `fit` takes it."""
        weight, _, _ = self._ranks.add(self._mine.weight, False, False)
        attempt = Attempt(self._engine, self._mine.step, self._mine.batches, weight)
        self._health = self._healer.step(attempt, 1, self._health, partial(take_step, attempt, self._meter, LR))

    def bare(self) -> None:
        """The same draws, gradient, update and figures, and nothing else."""
        ds, task = self._engine._ds, self._engine.task
        for place, piece in enumerate(self._mine.batches):
            task.set_step(self._mine.step, piece.micro_batch)  # type: ignore[operator]
            on_device = piece.batch.to(self._ranks.device)
            loss_sum, evidence = ds(on_device)
            ds.set_gradient_accumulation_boundary(place + 1 == len(self._mine.batches))
            ds.backward(loss_sum / self._mine.weight, scale_wrt_gas=False)
            set_lr(ds.optimizer, LR)
            ds.step()
            self._meter.tally.add(on_device, loss_sum, evidence, piece.documents)


def measure(preset: str, zero: int, rounds: int, folder: Path, ranks: Ranks) -> Row:
    """One row of the table."""
    trainer = Trainer(settings_of(preset, zero, folder, steps=1), ranks)
    steps = Steps(trainer, ranks, folder)
    samples = race([steps.watched, steps.bare], rounds, budget=300.0, device=ranks.device)
    trainer.engine.close()
    watched, bare = np.array([[sample.cpu_seconds for sample in pair] for pair in samples]).T
    extra = 100 * (watched / bare - 1)
    draws = np.random.default_rng(0).choice(extra, (2000, len(extra)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return Row(preset, zero, steps.tokens, 1000 * float(np.median(bare)), float(np.median(extra)), float(low), float(high))


def table(rows: list[Row]) -> str:
    """The rows for a reader."""
    lines = ["preset       ZeRO  tokens  bare step   checks add"]
    lines += [
        f"{row.preset:<12} {row.zero:>4} {row.tokens:>7} {row.bare_ms:>7.1f} ms  {row.extra_percent:>+6.2f} % "
        f"[{row.low_percent:+.2f}, {row.high_percent:+.2f}]"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> int:
    """Measures, prints, and keeps what was asked for."""
    words = argparse.ArgumentParser(prog="python -m benchmarks.checks", description="What watching healthy steps costs.")
    words.add_argument("--presets", nargs="+", default=["bert_tiny", "bert_small"])
    words.add_argument("--zero", nargs="+", type=int, choices=range(4), default=[0, 1, 2, 3], help="ZeRO stages")
    words.add_argument("--rounds", type=int, default=200, help="pairs of steps at most (default 200, or 300 s)")
    words.add_argument("--json", type=Path, help="write rows and environment here")
    given = words.parse_args()
    ranks = join_ranks()
    rows = []
    for preset in given.presets:
        for zero in given.zero:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(measure(preset, zero, given.rounds, Path(folder), ranks))
    print(table(rows))
    if given.json:
        found: dict[str, Any] = {"environment": environment(ranks.device, torch.get_num_threads(), ("deepspeed",))}
        found["rows"] = [asdict(row) for row in rows]
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    leave_ranks()
    return 0


if __name__ == "__main__":
    sys.exit(main())
