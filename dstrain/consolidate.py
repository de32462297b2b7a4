"""The weights of a run's stage as one fp32 state dict: its best ones, or those of its last checkpoint.

source = find(Path("runs/my-run"), stage=None, which="best")
weights, progress = source.weights(task)

A checkpoint of any ZeRO stage and number of ranks is put together in one process and without DeepSpeed, whose own converter
reads pickle; here a file that holds more than tensors and plain data is refused.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dstrain.checkpoints import FOLDER, newest_whole, standing
from dstrain.loop import Progress, StageSettings
from dstrain.objective import Task
from dstrain.partitions import MASTER, files_by_rank, put_together
from dstrain.readings import Reading, read_readings
from dstrain.run import groups, read_record, read_weights
from dstrain.schema import UserError, did_you_mean
from dstrain.settings import RunSettings, load_run

Which = Literal["best", "last"]
_BEST = "best.safetensors"


# -------------------------------------------------------------------------------------------------- which weights


@dataclass(frozen=True)
class Source:
    """A stage of a run folder, and which of its weights are asked for."""

    folder: Path
    settings: RunSettings
    name: str
    which: Which
    done: Mapping[str, Progress]
    """How the stages ended that did."""
    readings: Sequence[Reading]
    """Of this stage."""
    file: Path
    """Where the weights lie: a file, or the folder of a checkpoint."""

    @property
    def stage(self) -> StageSettings:
        """The stage's settings."""
        return self.settings.stages[self.name]

    @property
    def path(self) -> list[str]:
        """Names of the stages up to this one."""
        names = list(self.settings.stages)
        return names[: names.index(self.name) + 1]

    def weights(self, task: Task) -> tuple[dict[str, Tensor], Progress]:
        """Full fp32 weights by name, and where training stood when they were taken; `task` is the run's, untrained."""
        if self.which == "best":
            return read_weights(self.file), self._chosen()
        names = {id(parameter): name for name, parameter in task.named_parameters()}
        order = [[names[id(parameter)] for parameter in group["params"]] for group in groups(task, self.stage)]
        return consolidate(self.file / "engine", order)

    def _chosen(self) -> Progress:
        """The last evaluation that won, as `loop.judge` counts; without a validation split the last reading."""
        metric, mode = self.stage.selection
        best, chosen = -math.inf, self.readings[-1] if self.readings else None
        for reading in self.readings:
            value = reading.values.get(metric, math.nan) * (1 if mode == "max" else -1)
            if reading.split == "valid" and value - best > self.stage.min_delta:
                best, chosen = value, reading
        if chosen is None:
            return self.done.get(self.name, Progress())
        return Progress(chosen.step, chosen.tokens, chosen.seconds)


def find(folder: Path, stage: str | None, which: Which) -> Source:
    """The stage of a run that was asked for, by default the last one. Raises UserError with what there is instead."""
    if (folder / "search.yaml").is_file():
        raise UserError(f"{folder}: is a search; give the folder of one of its trials, {folder / 'trials' / 'ID'}")
    if not (folder / "settings.yaml").is_file():
        raise UserError(f"{folder}: is no run folder (it has no settings.yaml); give one, such as runs/NAME")
    settings = load_run(folder / "settings.yaml")
    if stage is not None and stage not in settings.stages:
        raise UserError(f"--stage {stage}: {folder} has no such stage{did_you_mean(stage, settings.stages)}")
    name = stage or list(settings.stages)[-1]
    readings = [reading for reading in _readings(folder) if reading.stage == name]
    file = _place(folder, name, which)
    if file is None:
        what = "best weights" if which == "best" else "checkpoint"
        offers = [
            f"--stage {each}{' --weights last' if kind == 'last' else ''}"
            for each in settings.stages
            for kind in get_args(Which)
            if _holds(folder, each, kind)
        ]
        way_out = f"export what there is with {' or '.join(offers)}" if offers else "train it first"
        raise UserError(f"{folder}: its stage {name} holds no {what}; {way_out}")
    return Source(folder, settings, name, which, dict(_done(folder, settings)), readings, file)


def _place(folder: Path, stage: str, which: Which) -> Path | None:
    """The stage's best weights, or the newest of its checkpoints that is whole."""
    if not _holds(folder, stage, which):
        return None
    here = folder / "stages" / stage
    if which == "best":
        return here / _BEST
    try:
        return newest_whole(here / FOLDER, lambda text: print(text, file=sys.stderr))
    except UserError as error:
        raise UserError(f"{error}, or export best") from None


def _holds(folder: Path, stage: str, which: Which) -> bool:
    here = folder / "stages" / stage
    return (here / _BEST).exists() if which == "best" else bool(standing(here / FOLDER))


def _done(folder: Path, settings: RunSettings) -> Iterator[tuple[str, Progress]]:
    for name in settings.stages:
        file = folder / "stages" / name / "done.json"
        try:
            if file.exists():
                yield name, Progress(**read_record(file))
        except TypeError:
            raise UserError(f"{file}: is damaged; remove it and start the run again, which makes it anew") from None


def _readings(folder: Path) -> list[Reading]:
    try:
        return read_readings(folder)
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from None


# --------------------------------------------------------------------------------------------------- a checkpoint

_DEEPSPEED_CLASSES = (
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
    "deepspeed.utils.tensor_fragment.tensor_fragment",
)


class _Inert:
    """Stands where a checkpoint has an object of DeepSpeed: holds its attributes, runs nothing."""

    def __init__(self, *given: object) -> None:
        pass


def consolidate(folder: Path, optimizer_names: Sequence[Sequence[str]]) -> tuple[dict[str, Tensor], Progress]:
    """Full fp32 weights (the optimizer's master copies) out of the files of all ranks, and where training stood.

    `folder` is DeepSpeed's, with one file of each rank. `optimizer_names` are the parameters' names in each optimizer
    group: stage 0 in 16 bits does not write them. Raises UserError when a file is missing, damaged, or holds code.
    """
    models, optimizers = _parts(folder, "*model_states.pt"), _parts(folder, "*optim_states.pt")
    try:
        first = models[0]
        world = int(first["dp_world_size"])
        masters = [optimizers[rank]["optimizer_state_dict"] for rank in range(world)] if optimizers else []
        weights = dict(_masters(first, masters, optimizer_names))
        weights |= {name: first["module"][name] for name in first["buffer_names"]}
        return weights, Progress(**json.loads(first["progress"])["progress"])
    except KeyError as error:
        missing = f"the part of rank {error}" if isinstance(error.args[0], int) else str(error)
        raise UserError(f"{folder.parent}: {missing} is missing; copy the whole checkpoint, or export best") from None
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"{folder.parent}: is no checkpoint of a dstrain run ({error}); export best instead") from None


def _masters(
    model: Mapping[str, Any], optimizers: Sequence[Mapping[str, Any]], optimizer_names: Sequence[Sequence[str]]
) -> Iterator[tuple[str, Tensor]]:
    """Name and full fp32 value of each parameter; `optimizers` are the states of ranks 0, 1, ... (none at stage 0)."""
    if optimizers:
        yield from ((name, whole.states[MASTER]) for name, whole in put_together(model, optimizers, False).items())
        return
    yield from ((name, value.float()) for name, value in model["module"].items())
    if copies := model["optimizer"].get("fp32_groups"):  # in 16 bits; the later value of a name wins
        for names, values in zip(optimizer_names, copies, strict=True):
            yield from zip(names, values, strict=True)


def _parts(folder: Path, pattern: str) -> dict[int, dict[str, Any]]:
    """The files that match, by rank; tensors stay on disk until they are used."""
    return {rank: _read_part(file) for rank, file in files_by_rank(folder, pattern).items()}


def _read_part(file: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals([(_Inert, name) for name in _DEEPSPEED_CLASSES]):
            return dict(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
    except Exception as error:  # torch raises anything from KeyError to UnpicklingError
        foreign = re.search(r"(?:GLOBAL|function|class) `?([\w.]+\.\w+)", str(error))
        why = f"it names {foreign[1]}, which was not run" if foreign else (str(error).splitlines() or ["no reason"])[0]
        raise UserError(f"{file}: cannot be read as a checkpoint ({why[:120]}); export best instead") from None
