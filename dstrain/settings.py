"""The whole settings of a run or a search, composed of the leaves' settings, and how a YAML file becomes them.

Precedence, lowest first: defaults < file (`base`) < `when` (what this machine lacks) < `key=value` of the command line.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import PlainValidator, field_validator, model_validator

from dstrain.data.vocabulary import VocabularySettings
from dstrain.loop import StageSettings
from dstrain.model.encoder import EncoderSettings
from dstrain.precision import LossScaleSettings, PrecisionName
from dstrain.rungs import AshaSettings, SchedulerSettings
from dstrain.schema import (
    Problem,
    Settings,
    UserError,
    complain,
    did_you_mean,
    flatten,
    read_yaml,
    set_path,
    setting,
    split_override,
    together,
    validate,
)
from dstrain.tracking import TrackingSettings, without_password

ROOT = Path(__file__).resolve().parent.parent
"""The checkout: shipped files such as ds_configs/zero1.json are found from any working directory."""


class RunSettings(Settings):
    """One run: an encoder that goes through stages, each handing its weights on to the next."""

    name: str = setting(min_length=1)
    """Names the run folder, output_dir/name, and the MLflow run."""
    seed: int = setting(0, ge=0)
    """Every draw of the run (weights, order, masks, dropout, projections) comes from this number."""
    output_dir: Path = Path("runs")
    """Where run folders and the default MLflow store lie."""
    encoder: EncoderSettings
    """The model all stages share."""
    vocabulary: VocabularySettings = VocabularySettings()
    """WordPiece vocabulary, trained on the first stage's text unless a path is given."""
    stages: dict[str, StageSettings]
    """Stages by name, in order; `stages.tapt=null` on the command line leaves one out."""
    precision: PrecisionName = "auto"
    """auto takes bf16 or fp16 where the device has it, else fp32, and says why."""
    loss_scale: LossScaleSettings = LossScaleSettings()
    """Dynamic loss scaling; only fp16 uses it."""
    deepspeed: Path = Path("ds_configs/zero1.json")
    """DeepSpeed JSON: memory and precision only; "auto" follows this file."""
    deterministic: bool = False
    """On a GPU, only kernels that add up in the same order every time: slower, and a resumed run then ends bit for bit where
    an undisturbed one does. On CPUs that is so anyway."""
    tracking: TrackingSettings = TrackingSettings()
    """Where MLflow keeps the readings."""

    @field_validator("name")
    @classmethod
    def _usable_as_folder(cls, name: str) -> str:
        if not re.fullmatch(r"[\w][\w.+@=-]*", name):
            raise ValueError(f"{name!r} names a folder; use letters, digits and . _ - only")
        return name

    @field_validator("stages", mode="before")
    @classmethod
    def _left_out(cls, stages: Any) -> Any:
        if not isinstance(stages, dict):
            return stages
        whole = [
            str(name)
            for name, stage in stages.items()
            if not isinstance(stage, dict) or {"objective", "corpus"} & stage.keys()
        ]
        unlike = [str(name) for name in stages if str(name) not in whole]
        if unlike:  # a misspelt stage in an override looks like a new stage without objective and corpus
            raise ValueError(
                "\n".join(f"{name} has neither objective nor corpus{did_you_mean(name, whole)}" for name in unlike)
            )
        return {name: stage for name, stage in stages.items() if stage is not None}

    @model_validator(mode="after")
    def _fits(self) -> RunSettings:
        problems = list(self._problems())
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _problems(self) -> Sequence[str]:
        found = [] if self.stages else ["stages: is empty; name at least one stage"]
        for name, stage in self.stages.items():
            here = f"stages.{name}"
            if not re.fullmatch(r"\w+", name):
                found.append(f"{here}: a stage's name becomes part of metric keys; use letters, digits and _ only")
            if stage.num_frozen_layers > self.encoder.num_layers:
                found.append(
                    f"{here}.num_frozen_layers: is {stage.num_frozen_layers}, but the encoder has "
                    f"{self.encoder.num_layers} layers; freeze fewer, or raise encoder.num_layers"
                )
            try:
                self.encoder.positions.check_length(stage.max_length)
            except UserError as error:
                found.append(f"{error} ({here}.max_length)")
            if stage.metric is not None and stage.metric not in stage.objective.metrics:
                found.append(
                    f"{here}.metric: {stage.objective.kind} has no {stage.metric!r}"
                    f"{did_you_mean(stage.metric, stage.objective.metrics)}"
                )
        return found

    @property
    def folder(self) -> Path:
        """Where the run leaves everything."""
        return self.output_dir / self.name

    @property
    def deepspeed_path(self) -> Path:
        """The DeepSpeed JSON, from the working directory or else from the checkout."""
        return shipped(self.deepspeed)


def _amount(value: Any) -> float | Literal["auto"]:
    if value == "auto" or (isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf):
        return value
    raise ValueError(f"{value!r} is neither a number of 0 or more nor auto")


def _count(value: Any) -> int | Literal["auto"]:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError(f"{value!r} is neither a whole number of 1 or more nor auto")


Amount = Annotated[int | float | Literal["auto"], PlainValidator(_amount)]
Count = Annotated[int | Literal["auto"], PlainValidator(_count)]


class ResourceSettings(Settings):
    """What one trial takes, all its ranks together."""

    ranks: Count = "auto"
    """Data-parallel processes of a trial; auto is one per GPU, or 1."""
    cpus: Amount = "auto"
    """CPU cores; auto is 1 per rank, and with GPUs 4 per rank."""
    gpus: Amount = "auto"
    """GPUs; auto is one per rank where the machine has any. A part such as 0.5 lets trials of one rank share a GPU."""
    nodes: Literal["any", "one"] = "any"
    """Whether a trial's ranks may lie on several nodes: any takes what is free, one keeps them together."""

    @property
    def num_ranks(self) -> int:
        """Processes of a trial, the same on every machine."""
        if self.ranks != "auto":
            return self.ranks
        return 1 if self.gpus == "auto" else max(1, int(self.gpus))

    @model_validator(mode="after")
    def _a_gpu_each(self) -> ResourceSettings:
        if self.ranks == "auto" or self.gpus == "auto" or self.gpus in (0, self.ranks):
            whole = self.gpus == "auto" or self.gpus <= 1 or self.gpus == int(self.gpus)
            if not whole:
                raise ValueError(f"gpus is {self.gpus:g}; give whole GPUs, or a part of one such as 0.5")
            return self
        if self.ranks == 1 and self.gpus < 1:
            return self
        raise ValueError(
            f"ranks is {self.ranks} and gpus {self.gpus:g}: a rank uses one GPU; leave ranks out, or give them alike"
        )


class FinalistSettings(Settings):
    """Which configurations are run again at full length, once the search is over."""

    top: int = setting(3, ge=1, unit="configurations")
    """The best so many by the search's metric."""
    seeds: int = setting(3, ge=1)
    """Each runs with this many seeds, the base's and those after it; the mean decides."""


class SearchSettings(Settings):
    """How a space is searched."""

    metric: str
    """What decides, as stage/split/name, such as finetune/valid/f1_macro."""
    mode: Literal["min", "max"] = "max"
    """Whether a small or a large metric is good."""
    trials: int | None = setting(None, ge=1)
    """Samples to draw; a space of choices alone is a grid and needs none."""
    sampler: Literal["random", "tpe"] = "random"
    """How samples are drawn: random, or where earlier trials did well (tpe, through Ray and Optuna)."""
    seeds: tuple[int, ...] = ()
    """Every configuration runs once per seed; empty takes the base's seed."""
    seed: int = 0
    """Seed of the random samples."""
    constraints: tuple[str, ...] = ()
    """Expressions that every trial must satisfy, such as `hidden_size % num_heads == 0`."""
    scheduler: SchedulerSettings = AshaSettings()
    """asha stops trials early, or lets them wait (on_rung: pause); hyperband and pbt are Ray's; none runs all to the end."""
    finalists: FinalistSettings | None = None
    """The best configurations once more, at full length and with several seeds; null: none."""
    resources: ResourceSettings = ResourceSettings()
    """What one trial takes; as many run at once as fit."""
    max_concurrent: int | None = setting(None, ge=1, unit="trials")
    """Upper bound on trials at once, whatever fits."""
    max_failures: int = setting(2, ge=0)
    """How often a trial that died, hung or lost its node is started again, from its checkpoint."""
    silence_minutes: float = setting(30.0, gt=0, unit="minutes")
    """A trial that reports nothing for so long is taken for hung: its processes are ended and it counts as a failure. A search
    for whose trials no node is left waits so long for one to come back, then ends with status 75."""

    @model_validator(mode="after")
    def _goes_together(self) -> SearchSettings:
        problems = []
        if self.sampler == "tpe" and self.trials is None:
            problems.append("sampler: tpe draws samples; say how many with trials")
        if self.sampler == "tpe" and self.seeds:
            problems.append("seeds: tpe tries every configuration once; give the best more seeds with finalists")
        if self.sampler == "tpe" and self.scheduler.kind in ("hyperband", "pbt"):
            problems.append(f"sampler: {self.scheduler.kind} needs all trials at its start; take asha or random")
        if self.finalists and self.scheduler.kind == "pbt":
            problems.append("finalists: pbt changes settings on the way, so none are left to run again; leave it out")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @field_validator("metric")
    @classmethod
    def _three_parts(cls, metric: str) -> str:
        if metric.count("/") != 2:
            raise ValueError(f"{metric!r} is not stage/split/name, such as finetune/valid/f1_macro")
        return metric


# ----------------------------------------------------------------------------------------------- from a file

_FILE_KEYS = ("base", "when", "space", "search")
_CONDITIONS: dict[str, Callable[[bool], bool]] = {"no_gpu": lambda gpu: not gpu, "gpu": lambda gpu: gpu}


@dataclass(frozen=True)
class Document:
    """A YAML file with `when` and the command line worked in; not yet checked against the settings classes."""

    source: str
    base: dict[str, Any]
    space: dict[str, Any]
    search: dict[str, Any] | None
    precedence: list[str] = field(default_factory=list)
    """Every change to the file's own words, with the place it came from: printed at the start and kept with the run."""
    origins: Mapping[str, str] = field(default_factory=dict)
    """The same by address, the last change last: where a mistake in its value is to be looked for."""

    def changed(self, overrides: Mapping[str, Any], tree: dict[str, Any]) -> Document:
        """This document with another base, to which the file's space has set these addresses."""
        others = {address: origin for address, origin in self.origins.items() if address not in overrides}
        return replace(self, base=tree, origins=others | dict.fromkeys(overrides, self.source))

    @contextlib.contextmanager
    def blame(self, *parts: str) -> Iterator[None]:
        """Errors that name the file name the command line, or `when`, where the wrong value came from there.

        `parts`: only for addresses that begin so.
        """
        try:
            yield
        except UserError as error:
            raise UserError("\n".join(self._blamed(line, parts) for line in str(error).split("\n"))) from None

    def _blamed(self, line: str, parts: tuple[str, ...]) -> str:
        said = line.removeprefix(f"{self.source}: ")
        address, _, sentence = said.partition(": ")
        if said == line or not address.startswith(parts or ""):
            return line
        for changed in reversed([*self.origins]):
            below = changed.removeprefix(f"{address}.").partition(".")[0]
            if f"{address}.".startswith(f"{changed}.") or (below != changed and below in re.findall(r"\w+", sentence)):
                return f"{self.origins[changed]}: {said}"
        return line


def read_document(path: Path, overrides: Sequence[str] = (), gpu: bool = False, full_size: bool = False) -> Document:
    """Reads a run or search file for a machine with or without a GPU.

    `full_size` leaves `when` out. Raises UserError for unreadable files, unknown parts and conditions.
    """
    tree = read_yaml(shipped(path))
    problems = [
        Problem(str(key), f"no such part of a file{did_you_mean(str(key), _FILE_KEYS)}")
        for key in tree
        if key not in _FILE_KEYS
    ]
    if not tree.get("base"):
        missing = "is missing; a file of settings is `base: {name: ..., encoder: ..., stages: ...}`"
        problems = [Problem("base", missing), *(problem for problem in problems if "did you mean" in problem.sentence)]
    problems += [
        Problem(key, f"is {tree[key]!r}; it takes a mapping")
        for key in _FILE_KEYS
        if key in tree and not isinstance(tree[key] or {}, dict)
    ]
    when = {} if problems else tree.get("when") or {}
    for condition, changes in when.items():
        if condition not in _CONDITIONS:
            problems.append(
                Problem(f"when.{condition}", f"no such condition{did_you_mean(str(condition), _CONDITIONS)}")
            )
        elif not isinstance(changes, dict):
            problems.append(Problem(f"when.{condition}", f"is {changes!r}; it maps dotted addresses to values"))
    if problems:
        raise complain(str(path), problems)
    parts = {key: deepcopy(tree.get(key) or {}) for key in ("base", "space", "search")}
    here = [condition for condition in when if not full_size and _CONDITIONS[condition](gpu)]
    origins: dict[str, str] = {}

    def change(address: str, value: Any, place: str, origin: str) -> str:
        _change(parts, address, value, place)
        address_said = address.removeprefix("base.")
        origins.pop(address_said, None)
        origins[address_said] = place  # the last one to speak stands last
        return f"{address} = {value!r} ({origin})"

    said = together(
        *(
            partial(change, str(address), value, f"{path}: when.{condition}", f"when.{condition}")
            for condition in here
            for address, value in when[condition].items()
        ),
        *(lambda text=text: change(*split_override(text), "command line", "command line") for text in overrides),
    )
    search = parts["search"] if "search" in tree or parts["search"] else None
    return Document(str(path), parts["base"], parts["space"], search, said, origins)


def _change(parts: dict[str, dict[str, Any]], address: str, value: Any, place: str) -> None:
    first, _, rest = address.partition(".")
    try:
        if first == "space" and rest:
            parts["space"][rest] = value  # a space's keys are dotted addresses themselves
        elif first in parts and rest:
            set_path(parts[first], rest, value)
        else:
            set_path(parts["base"], address, value)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


def run_settings(document: Document) -> RunSettings:
    """The checked settings of the file's run. Raises UserError with every mistake."""
    with document.blame():
        return validate(RunSettings, document.base, document.source)


def load_run(path: Path, overrides: Sequence[str] = (), gpu: bool = False, full_size: bool = False) -> RunSettings:
    """`read_document` and `run_settings` in one, for programs."""
    return run_settings(read_document(path, overrides, gpu, full_size))


def load_search(document: Document) -> SearchSettings:
    """The checked settings of the file's search; its metric must name a stage and a figure that there will be."""
    with document.blame():
        return _load_search(document)


def _load_search(document: Document) -> SearchSettings:
    if document.search is None:
        raise UserError(
            f"{document.source}: has no search; add `search: {{metric: finetune/valid/f1_macro}}`, "
            "or train it with train.py"
        )
    search = validate(SearchSettings, document.search, document.source, prefix="search.")
    stage, split, name = search.metric.split("/")
    stages = run_settings(document).stages
    if stage not in stages:
        raise UserError(f"{document.source}: search.metric: there is no stage {stage!r}{did_you_mean(stage, stages)}")
    if split != "valid":
        raise UserError(
            f"{document.source}: search.metric: {split!r} cannot choose; a search is decided on the split valid"
        )
    known = stages[stage].objective.metrics
    if name not in known:
        raise UserError(f"{document.source}: search.metric: {stage} reports no {name!r}{did_you_mean(name, known)}")
    return search


def shipped(path: Path) -> Path:
    """The path itself when it is there (or absolute), else the same path in the checkout."""
    return ROOT / path if not path.is_absolute() and not path.exists() and (ROOT / path).exists() else path


def plain(settings: Settings) -> Mapping[str, Any]:
    """The settings as a tree of plain values, as they are written to settings.yaml."""
    return settings.model_dump(mode="json")


def differences(kept: Any, settings: RunSettings) -> list[str]:
    """How settings differ from the `base` that was kept of a run, as `seed: 1 -> 2`.

    A setting that is younger than what was kept has had its default.
    """
    try:
        before = flatten(plain(validate(RunSettings, kept, "kept")))
    except UserError:  # of another version, or no settings at all
        before = flatten(kept) if isinstance(kept, dict) else {}
    now, nothing = flatten(json.loads(json.dumps(plain(settings)))), object()
    return [
        f"{address}: {_brief(before.get(address))} -> {_brief(now.get(address))}"
        for address in dict.fromkeys((*before, *now))
        if before.get(address, nothing) != now.get(address, nothing)
    ]


def _brief(value: Any) -> str:
    text = without_password(json.dumps(value))
    return text if len(text) <= 60 else text[:57] + "..."
