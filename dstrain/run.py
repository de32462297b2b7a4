"""run(): the one composition every door calls. Stages in order, weights handed on, the test split read once."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import torch
from torch import Tensor

from dstrain.checkpoints import FOLDER as CHECKPOINTS
from dstrain.checkpoints import Checkpoints, put_in_place, standing
from dstrain.data.cache import Corpus, cache_home, open_corpus, open_vocabulary
from dstrain.data.vocabulary import Vocabulary
from dstrain.ds_plan import Facts, read_plan, resolve
from dstrain.engine import Engine, Ranks, adding_in_order, local_size
from dstrain.evidence import collect
from dstrain.healing import GaveOut, OutOfMemory, attend_in_fp32, evaluating, noted_pieces
from dstrain.loop import (
    Asked,
    Course,
    Interrupted,
    Progress,
    Site,
    StageSettings,
    budget,
    evaluate,
    finest,
    fit,
    never,
)
from dstrain.memory_limit import at_most, job_limit, share_of
from dstrain.model.encoder import Encoder
from dstrain.objective import Objective, Task
from dstrain.optim import build_optimizer, parameter_groups
from dstrain.precision import Precision, choose, in_place_of_fp16
from dstrain.readings import READINGS_FILE, Reading, Report, say_aloud
from dstrain.regroup import regrouped
from dstrain.schema import UserError, dump_yaml, flatten, read_yaml, validate
from dstrain.settings import ROOT, RunSettings, differences, plain
from dstrain.texts import TEXTS_FILE, TextRecord, keep_or_refuse
from dstrain.vitals import Vitals, with_vitals

Say = Callable[[str], None]
Texts = Mapping[str, TextRecord]
"""By the name of a stage."""


@dataclass(frozen=True)
class Outcome:
    """What a run came to: why each stage ended, its best selection metric, and the test figures of the last stage."""

    stopped: dict[str, str] = field(default_factory=dict)
    best: dict[str, float | None] = field(default_factory=dict)
    test: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Watch:
    """Who is told what while a run works."""

    report: Report
    say: Say
    tag: Callable[[dict[str, str]], None]
    asked_to_stop: Asked = never
    """Called before every step, on every rank."""
    told_to_stop: Asked = never
    """Called between the batches of an evaluation, on every rank."""
    at_rest: Callable[[str, int], object] = lambda stage, step: None
    """Called where no checkpoint is on its way to the disk, with the stage and the step up to which all is saved, or will not
    be: whoever ends the process there loses little."""


def run(
    settings: RunSettings, ranks: Ranks, watch: Watch, accept_changed_data: bool = False, agreed: Texts | None = None
) -> Outcome:
    """Trains every stage of a run, or goes on where its folder says it was, and reads the test split once.

    The door has claimed the folder. Raises UserError for what only now shows (data, weights; text that has changed since
    the run began, unless that is accepted; text that is not the one `agreed` on by a search), Interrupted or GaveOut after
    saving, Diverged.
    """
    folder = settings.folder
    if (folder / "outcome.json").exists():
        watch.say(f"{folder}: already finished")
        return Outcome(**read_record(folder / "outcome.json"))
    precision, before = precision_of(settings, ranks), beginning(folder)
    began_with = before.get("ranks", ranks.world)
    unfinished = [name for name in settings.stages if not (folder / "stages" / name / "done.json").exists()]
    settings, cuts = regrouped(settings, began_with, ranks.world, unfinished)
    if began_with != ranks.world:
        shared = " and shared micro-batches" if max(cuts.values(), default=1) > 1 else ""
        watch.say(f"begun by {began_with} rank(s), goes on with {ranks.world}: accumulation{shared} keep every step as it was")
    vocabulary = own_vocabulary(folder) or run_vocabulary(settings, watch.say)
    with ranks.alike():
        ready = make_ready(settings, vocabulary, precision, ranks, watch.say, cuts)
    with ranks.first() as mine:
        if mine:
            same_deepspeed(settings, before)
            began = {"ranks": began_with, "precision": precision.name, **beginning_of(settings)}
            write_whole(folder / RANKS_FILE, json.dumps(began, indent=1))
            texts = settle_texts(settings, ready, unfinished, accept_changed_data, agreed or {}, watch.say)
            leave_evidence(settings, vocabulary, {name: ready[name] for name in unfinished}, texts, ranks)
    outcome, first_step, weights = Outcome(), 0, None
    report = with_vitals(watch.report, Vitals(ranks.device, watch.say), ranks.gather)
    noted: set[str] = set()
    for name, stage in settings.stages.items():
        corpus, objective = ready[name].corpus, ready[name].objective
        for note in ready[name].notes:
            if note not in noted:
                noted.add(note)
                watch.say(f"{name}: {note}")
        task = Task(Encoder(settings.encoder, vocabulary.size, settings.seed), objective)
        site = Site(name, folder / "stages" / name, first_step, settings.seed)
        with ranks.alike():
            inherit(task, starting_weights(name, stage, weights), watch.say, site.name)
        if first_step == 0:
            known = facts(task, precision, ranks)
            watch.tag(known)
            watch.say(f"{precision.reason}; attention: {task.encoder.kernel}")
        progress = finished(site) or train(stage, ready[name], task, site, ranks, replace(watch, report=report))
        watch.tag(known | {"attention_kernel": task.encoder.kernel})  # what ran; before, what was expected
        with ranks.alike():
            weights = read_weights(site.folder / "best.safetensors")
        first_step += progress.step
        outcome.stopped[name], outcome.best[name] = progress.stopped, progress.best
    assert weights is not None
    if "test" in corpus.splits:
        # a task of its own: ZeRO-3 leaves the trained one in pieces
        objective = stage.objective.build(corpus, vocabulary, settings.encoder, settings.seed)
        task = Task(Encoder(settings.encoder, vocabulary.size, settings.seed), objective)
        task.load_state_dict(weights)
        task.to(ranks.device, precision.dtype)
        if progress.health.attention_in_fp32:
            attend_in_fp32(task)
        split, pieces = corpus.splits["test"], ranks.agree(max(progress.health.pieces, noted_pieces(site.folder)))
        try:
            with (
                at_most(memory_share(ranks)),
                evaluating(name, site.folder, ranks.rank, pieces, finest(stage, split)),
            ):
                figures = evaluate(task, objective, split, budget(stage, split, pieces), ranks, watch.told_to_stop)
        except Interrupted:
            raise Interrupted("every stage is trained and kept; the test split is yet to be read") from None
        outcome.test.update(figures)
        watch.report(Reading(name, "test", progress.step, progress.step, progress.tokens, progress.seconds, figures))
    with ranks.first() as mine:
        if mine:
            write_whole(folder / "outcome.json", json.dumps(asdict(outcome), indent=1))
    return outcome


def run_patiently(
    settings: RunSettings, ranks: Ranks, watch: Watch, accept_changed_data: bool = False, agreed: Texts | None = None
) -> Outcome:
    """`run`, which begins again at its checkpoint: in smaller pieces where a lone rank's memory ran out, in bf16 where fp16
    gave out."""
    while True:
        try:
            with adding_in_order(settings.deterministic and ranks.device.type == "cuda"):
                return run(settings, ranks, watch, accept_changed_data, agreed)
        except GaveOut as error:
            with ranks.first() as mine:
                if mine:
                    write_whole(settings.folder / GAVE_OUT_FILE, f"{error}\n")
                    say_aloud(str(error))
        except OutOfMemory as error:
            if ranks.world > 1:
                raise
            say_aloud(str(error))
        gc.collect()  # the engine that failed lies in cycles
        if ranks.device.type == "cuda":
            torch.cuda.empty_cache()


def train(
    stage: StageSettings, ready: Ready, task: Task, site: Site, ranks: Ranks, watch: Watch
) -> Progress:
    """One stage on a DeepSpeed engine of its own."""
    if not standing(site.folder / CHECKPOINTS):
        watch.say(f"{site.name}: {on_disk(stage, ready, task)}")
    optimizer = build_optimizer(groups(task, stage), stage.optim, ranks.device)
    engine = Engine(task, optimizer, ready.plan, ranks)
    share = memory_share(ranks)
    if share:
        watch.say(f"{site.name}: memory of this rank: {share / 1e9:.1f} GB, its share of the job's limit")
    checkpoints = Checkpoints(site.folder / CHECKPOINTS, ranks, stage.keep, watch.say)
    try:
        with at_most(share), checkpoints:
            progress = fit(
                engine, ready.objective, ready.corpus, stage, ready.course, site, checkpoints, watch.report,
                watch.asked_to_stop, watch.told_to_stop, watch.at_rest, all(ranks.gather(ready.bf16_at_hand)),
            )  # fmt: skip
    finally:
        engine.close()
    if checkpoints.count:
        watch.say(f"{site.name}: {checkpoints.cost}")
    with ranks.first() as mine:
        if mine:
            write_whole(site.folder / "done.json", json.dumps(asdict(progress)))
    return progress


def memory_share(ranks: Ranks) -> int | None:
    """This rank's part of what the job may hold on this machine, in bytes; None on a GPU, and where there is no limit."""
    limit = job_limit() if ranks.device.type == "cpu" else None
    return limit and share_of(limit, local_size(os.environ))


# ----------------------------------------------------------------------------------------------- before training


@dataclass(frozen=True)
class Ready:
    """A stage of which everything that a user could have got wrong was found right."""

    corpus: Corpus
    objective: Objective
    plan: dict[str, Any]
    course: Course
    bf16_at_hand: bool
    """Whether the stage could go over from fp16 to bf16: the device has it, and the DeepSpeed JSON leaves it free."""

    @property
    def notes(self) -> list[str]:
        """What of the text is not read, and why."""
        return [*self.corpus.notes, *self.course.notes]


def make_ready(
    settings: RunSettings, vocabulary: Vocabulary, precision: Precision, ranks: Ranks, say: Say,
    cuts: Mapping[str, int] = MappingProxyType({}),
) -> dict[str, Ready]:  # fmt: skip
    """Text, labels, steps, DeepSpeed plan and starting weights of every stage, before the first one trains.

    `cuts`: into how many pieces a stage cuts its micro-batches (1).

    Raises UserError with the mistakes of all stages.
    """
    ready: dict[str, Ready] = {}
    problems: list[str] = []
    for name, stage in settings.stages.items():
        try:
            plan = stage_plan(settings, stage, precision, ranks)
            corpus = stage_corpus(stage, vocabulary, say)
            objective: Objective = stage.objective.build(corpus, vocabulary, settings.encoder, settings.seed)
            cut = cuts.get(name, 1)
            group = ranks.world * stage.accumulation // cut
            course = Course(corpus.splits["train"].lengths, stage, settings.seed, group, cut)
            if (given := starting_weights(name, stage, None)) is not None:
                own = Task(Encoder(settings.encoder, vocabulary.size, settings.seed), objective).state_dict()
                same_encoder(own, given, name)
            ready[name] = Ready(corpus, objective, plan, course, bf16_at_hand(settings, stage, precision, ranks))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))  # two stages on one broken file are one mistake
    return ready


def stage_plan(settings: RunSettings, stage: StageSettings, precision: Precision, ranks: Ranks) -> dict[str, Any]:
    """The DeepSpeed JSON of a stage with every "auto" filled. Raises UserError with all that is wrong in the file."""
    source = settings.deepspeed_path
    stage_facts = Facts(
        accumulation=stage.accumulation, world=ranks.world, clip_norm=stage.optim.clip_norm, precision=precision.name,
        loss_scale=settings.loss_scale, hidden_size=settings.encoder.hidden_size, device=ranks.device.type,
    )  # fmt: skip
    return resolve(read_plan(source), stage_facts, str(source))


def on_disk(stage: StageSettings, ready: Ready, task: Task) -> str:
    """What a stage's checkpoints will take, in words."""
    sixteen_bit = any(ready.plan.get(kind, {}).get("enabled") for kind in ("bf16", "fp16"))
    parameters = sum(parameter.numel() for parameter in task.parameters())
    return stage.keep.on_disk(parameters, ready.plan["zero_optimization"]["stage"], sixteen_bit, ready.course.total_steps)


def bf16_at_hand(settings: RunSettings, stage: StageSettings, precision: Precision, ranks: Ranks) -> bool:
    """Whether a stage in fp16 could go on in bf16."""
    instead = in_place_of_fp16(ranks.device) if precision.name == "fp16" else None
    try:
        return instead is not None and bool(stage_plan(settings, stage, instead, ranks))
    except UserError:
        return False


def groups(task: Task, stage: StageSettings) -> list[dict[str, Any]]:
    """Parameter groups, those that stage.num_frozen_layers holds still apart, so that they can thaw together."""
    frozen = {id(parameter) for parameter in task.encoder.first_parameters(stage.num_frozen_layers)}
    named = list(task.named_parameters())
    parts = {
        "frozen": [(name, parameter) for name, parameter in named if id(parameter) in frozen],
        "free": [(name, parameter) for name, parameter in named if id(parameter) not in frozen],
    }
    return [
        {**group, "name": part}
        for part, members in parts.items()
        if members
        for group in parameter_groups(members, stage.optim.weight_decay)
    ]


# ------------------------------------------------------------------------------------------------- text


def run_vocabulary(settings: RunSettings, say: Say) -> Vocabulary:
    """The run's vocabulary: loaded, or trained on the training text of the first stage."""
    first = next(iter(settings.stages.values()))
    return open_vocabulary(settings.vocabulary, first.corpus, cache_home(), say)


def own_vocabulary(folder: Path) -> Vocabulary | None:
    """The vocabulary that a run has begun with, whatever has become of the text it was trained on; None before."""
    return Vocabulary.load(folder / "vocabulary") if has_begun(folder) and (folder / "vocabulary").exists() else None


def stage_corpus(stage: StageSettings, vocabulary: Vocabulary, say: Say) -> Corpus:
    """A stage's text, tokenised once for all runs on this machine."""
    return open_corpus(stage.corpus, vocabulary, stage.max_length, cache_home(), say)


# ----------------------------------------------------------------------------------------------- weights


def starting_weights(
    name: str, stage: StageSettings, previous: dict[str, Tensor] | None
) -> dict[str, Tensor] | None:
    """The weights a stage begins with: the previous stage's, a finished run's, or none (scratch)."""
    if stage.starts_from == "scratch":
        return None
    if stage.starts_from == "previous":
        return previous
    folder = Path(stage.starts_from)
    finished = [json_file.parent for json_file in folder.glob("stages/*/done.json")]
    if not finished:
        address = f"stages.{name}.starts_from"
        raise UserError(f"{address}: {folder} holds no finished stage; give the folder of a run, such as runs/NAME")
    newest = max(finished, key=lambda stage_folder: (stage_folder / "done.json").stat().st_mtime_ns)
    return read_weights(newest / "best.safetensors")


def read_weights(file: Path) -> dict[str, Tensor]:
    """Weights by name, on the CPU."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        way_out = "train the stage again or restore the file"
        raise UserError(f"{file}: cannot be read as weights ({error}); {way_out}") from None


def same_encoder(own: dict[str, Tensor], weights: dict[str, Tensor], stage: str) -> set[str]:
    """The names of an encoder's weights. Raises UserError when the given weights are of another encoder.

    A kernel's own state (`.attention.`, such as FAVOR's projections) may be missing on either side: that is the hybrid
    study, pretrained with sdpa and tuned with favor. What both have is inherited.
    """
    encoder = {name for name in own if name.startswith("encoder.")}
    given = {name for name in weights if name.startswith("encoder.")}
    unshared = {name for name in encoder ^ given if ".attention." in name}
    encoder, given = encoder - unshared, given - unshared
    problems = [f"missing {name}" for name in sorted(encoder - given)]
    problems += [f"unknown {name}" for name in sorted(given - encoder)]
    problems += [
        f"{name} {tuple(own[name].shape)} != {tuple(weights[name].shape)}"
        for name in sorted(encoder & given)
        if own[name].shape != weights[name].shape
    ]
    if problems:
        shown = ", ".join(problems[:4]) + (f" and {len(problems) - 4} more" if len(problems) > 4 else "")
        raise UserError(
            f"stages.{stage}.starts_from: those weights are of another encoder ({shown}); "
            "give it the same encoder settings, or starts_from: scratch"
        )
    return encoder


def inherit(task: Task, weights: dict[str, Tensor] | None, say: Say, stage: str) -> None:
    """Gives a task the weights of another: the encoder strictly; the head where it is the same kind of head."""
    if weights is None:
        return
    own = task.state_dict()
    encoder = same_encoder(own, weights, stage)
    head = {name for name in own if not name.startswith("encoder.")}
    same_head = all(name in weights and weights[name].shape == own[name].shape for name in head)
    taken = encoder | (head if same_head else set())
    task.load_state_dict({name: weights[name] if name in taken else own[name] for name in own})
    say(f"{stage}: starts from the previous weights, {'with their head' if same_head else 'with a new head'}")


# ----------------------------------------------------------------------------------------------- the folder


_held: dict[Path, IO[str]] = {}


def hold(folder: Path, wait_seconds: float = 0.0) -> None:
    """Keeps other processes out of a run or search folder until this one ends.

    Raises UserError that names who is in there (still, after `wait_seconds`), or when nothing can be written there.
    """
    path = folder.resolve() / "in-use"
    if path in _held:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); give another output_dir=...") from None
    if not _lock(file, wait_seconds):
        file.seek(0)
        raise UserError(
            f"{folder}: is in use by {file.read().strip() or 'another process'}; wait for it, end it, or give name=..."
        )
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    _held[path] = file


def _lock(file: IO[str], wait_seconds: float) -> bool:
    """Whether the file is locked for this process from now on; the lock goes with the process, however it dies."""
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.5)
        except OSError:
            say_aloud(f"{file.name}: this file system has no locks; make sure that no other process works in that folder")
            return True
        else:
            return True


def claim(settings: RunSettings, say: Say, wait_seconds: float = 0.0) -> None:
    """Makes the run folder, or checks that the one there belongs to a run with these very settings.

    A folder in which no stage has left anything to go on from is taken over: a mistake in the data or the settings can be
    put right. What a run with other settings has told before it died there is set aside.
    """
    hold(settings.folder, wait_seconds)
    file = settings.folder / "settings.yaml"
    kept = None
    with contextlib.suppress(UserError):  # there is none, or it is damaged
        kept = read_yaml(file).get("base")
    unlike = differences(kept, settings)
    if has_begun(settings.folder):
        if unlike:
            raise UserError(
                f"{settings.folder}: holds a run with other settings ({'; '.join(unlike[:6])}); "
                "give this one another name=..., or start over with --resume never"
            )
        return
    if unlike and file.exists() and (settings.folder / READINGS_FILE).exists():
        say(f"{settings.folder}: what a run with other settings left there is now in {set_aside(settings.folder)}")
        hold(settings.folder)
    (settings.folder / GAVE_OUT_FILE).unlink(missing_ok=True)
    write_whole(file, dump_yaml({"base": plain(settings)}))


def set_aside(folder: Path) -> Path:
    """Renames a run folder out of the way, and returns its new name: starting over loses nothing."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.before-{number}")).exists():
        number += 1
    if folder.exists():
        hold(folder)
        held = _held.pop(folder.resolve() / "in-use", None)
        folder.rename(aside)
        if held:
            held.close()
    return aside


def settle_texts(
    settings: RunSettings, ready: dict[str, Ready], unfinished: list[str], accept_changed: bool, agreed: Texts, say: Say
) -> dict[str, TextRecord]:
    """A record of every stage's text. Raises UserError when one that is still to be read has changed on the way."""
    now = {name: TextRecord.of(stage.corpus) for name, stage in ready.items()}
    to_be_read = {*unfinished, [*ready][-1]}  # the last one's test split
    keep_or_refuse(agreed, now, to_be_read, (), say, "give the search another name=...")
    file = settings.folder / TEXTS_FILE
    if not has_begun(settings.folder) or not file.exists():
        return now
    before = {name: validate(TextRecord, tree, str(file), f"{name}.") for name, tree in read_record(file).items()}
    return keep_or_refuse(before, now, to_be_read, now if accept_changed else agreed, say)


def leave_evidence(
    settings: RunSettings, vocabulary: Vocabulary, ready: dict[str, Ready], texts: dict[str, TextRecord], ranks: Ranks
) -> None:
    """What made the run: code, environment, vocabulary, every stage's text, and the DeepSpeed JSON of every stage."""
    for name, stage in ready.items():
        write_whole(settings.folder / f"ds_config.{name}.json", json.dumps(stage.plan, indent=1))
    write_whole(settings.folder / TEXTS_FILE, json.dumps({name: plain(text) for name, text in texts.items()}, indent=1))
    collect(ROOT, device=device_name(ranks), world_size=ranks.world).write(settings.folder)
    vocabulary.save(settings.folder / "vocabulary")


def run_files(folder: Path) -> list[Path]:
    """The small files of a run folder that are worth an artifact."""
    here = ("settings.yaml", "environment.txt", "code.diff", "readings.jsonl", "failure.txt", GAVE_OUT_FILE)
    return [file for name in (*here, "ds_config.*.json") for file in sorted(folder.glob(name))]


def has_begun(folder: Path) -> bool:
    """Whether some stage of the run has left what another start goes on from."""
    stages = list((folder / "stages").glob("*"))
    return any((stage / "done.json").exists() or standing(stage / CHECKPOINTS) for stage in stages)


def finished(site: Site) -> Progress | None:
    """The end of a stage that an earlier start of this run completed."""
    file = site.folder / "done.json"
    return Progress(**read_record(file)) if file.exists() else None


GAVE_OUT_FILE = "fp16-gave-out.txt"
"""Is there when fp16 has given way to bf16, and says why."""

RANKS_FILE = "ranks.json"
"""How many ranks began the run, which with their accumulation says what a step is, in which number format, and with which
DeepSpeed JSON."""


def beginning(folder: Path) -> dict[str, Any]:
    """What RANKS_FILE says of a run that has begun; nothing before."""
    file = folder / RANKS_FILE
    return read_record(file) if file.exists() and has_begun(folder) else {}


def beginning_of(settings: RunSettings) -> dict[str, Any]:
    """What the settings do not say themselves, to be kept: the DeepSpeed JSON as it is now."""
    return {"deepspeed_file": str(settings.deepspeed), "deepspeed": read_plan(settings.deepspeed_path)}


def precision_of(settings: RunSettings, ranks: Ranks) -> Precision:
    """The run's number format: what the settings ask for; auto is what it was begun in, and fp16 bf16 once it gave way.

    Raises UserError where the device has not got it.
    """
    gave_out, before = ranks.agree([(settings.folder / GAVE_OUT_FILE).exists(), beginning(settings.folder)])
    with ranks.alike():
        return number_format(settings, ranks.device, gave_out, before)
    raise AssertionError("alike raises on all ranks")


def number_format(settings: RunSettings, device: torch.device, gave_out: bool, before: Mapping[str, Any]) -> Precision:
    """`precision_of`, by what is known of the run's beginning."""
    folder, instead = settings.folder, in_place_of_fp16(device)
    if gave_out:
        if instead is None:
            file = folder / GAVE_OUT_FILE
            raise UserError(f"{file}: this run goes on in bf16, which the GPU here has not got; start it on one that has")
        return instead
    found, began_in = choose(settings.precision, device), before.get("precision")
    if settings.precision != "auto" or began_in in (None, found.name):
        return found
    try:
        return choose(began_in, device)._replace(reason=f"{began_in}: this run was begun in it")
    except UserError:
        raise UserError(
            f"{folder}: this run was begun in {began_in}, which the device here has not got; go on where there is such a "
            "one, or give name=... for a new run"
        ) from None


def same_deepspeed(settings: RunSettings, before: Mapping[str, Any]) -> None:
    """Raises UserError when the DeepSpeed JSON of a run says other things than `before`, at its beginning.

    What is left to us ("auto") and what follows from the number of ranks may differ.
    """
    now = beginning_of(settings)
    if before.get("deepspeed_file") != now["deepspeed_file"]:  # an exchange between trials: the state came with other settings
        return
    free = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"}
    kept, given = (
        {"zero_optimization.stage": 0} | {key: value for key, value in flatten(found["deepspeed"]).items() if value != "auto"}
        for found in (before, now)
    )
    unlike = [key for key in sorted(kept.keys() | given.keys()) if kept.get(key) != given.get(key) and key not in free]
    if unlike:
        changes = "; ".join(f"{key}: {kept.get(key, 'not there')} -> {given.get(key, 'not there')}" for key in unlike[:4])
        raise UserError(
            f"{settings.deepspeed_path}: is not what {settings.folder} was begun with ({changes}); put it back, give "
            "name=... for a new run, or start over with --resume never"
        )


def read_record(file: Path) -> dict[str, Any]:
    """What `write_whole` left as JSON. Raises UserError when somebody else has been at it."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise UserError(f"{file}: is damaged; remove it, and the same command does that part again") from None


def write_whole(file: Path, text: str) -> None:
    """Writes a file whole or not at all; it is on disk afterwards."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(file.name + ".draft")
    draft.write_text(text, encoding="utf-8")
    put_in_place(draft, file)


def device_name(ranks: Ranks) -> str:
    """The GPU's model, or cpu."""
    return torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "cpu"


def facts(task: Task, precision: Precision, ranks: Ranks) -> dict[str, str]:
    """Tags that say on what and how the run really ran."""
    return {
        "device": device_name(ranks),
        "world_size": str(ranks.world),
        "launcher": ranks.launcher,
        "precision": precision.reason,
        "attention_kernel": task.encoder.kernel,
        "parameters": str(sum(parameter.numel() for parameter in task.parameters())),
    }


# ------------------------------------------------------------------------------------------------- looking ahead


@dataclass(frozen=True)
class StageForecast:
    """What a stage will do, before it does it."""

    name: str
    documents: int
    tokens_per_epoch: int
    steps: int
    parameters: int
    plan: dict[str, Any]
    disk: str
    notes: list[str]


def forecast(settings: RunSettings, world: int, device: torch.device, say: Say) -> list[StageForecast]:
    """Every stage's plan, parameters, tokens and steps. Tokenises what is not tokenised yet, trains nothing."""
    ranks = Ranks(0, world, device, "dry run")
    before = beginning(settings.folder)
    precision = number_format(settings, device, (settings.folder / GAVE_OUT_FILE).exists(), before)
    settings, cuts = regrouped(settings, before.get("ranks", world), world, [*settings.stages])
    vocabulary = own_vocabulary(settings.folder) or run_vocabulary(settings, say)
    found = []
    for name, ready in make_ready(settings, vocabulary, precision, ranks, say, cuts).items():
        task = Task(Encoder(settings.encoder, vocabulary.size, settings.seed), ready.objective)
        parameters = sum(parameter.numel() for parameter in task.parameters())
        lengths, steps = ready.corpus.splits["train"].lengths, ready.course.total_steps
        disk = on_disk(settings.stages[name], ready, task)
        found.append(
            StageForecast(name, len(lengths), int(lengths.sum()), steps, parameters, ready.plan, disk, ready.notes)
        )
    return found
