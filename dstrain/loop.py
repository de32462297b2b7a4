"""One stage: take a step, report, evaluate, save, stop when told. No logging library, no `deepspeed`, no rank test.

A stage is data (StageSettings); `fit` is the only loop there is, whatever the objective.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import model_validator

from dstrain.checkpoints import Checkpoints, Keep, Unsaved, bytes_of, free_bytes, put_in_place, size
from dstrain.data.batches import EpochPlan, epoch_plan, evaluation_plan
from dstrain.data.cache import Corpus, TokenSplit
from dstrain.data.corpora import CorpusSettings
from dstrain.engine import Diverged, Engine, Ranks, peak_memory_gb
from dstrain.healing import Attempt, GaveOut, Healer, HealingSettings, Health, evaluating
from dstrain.metrics import Tally
from dstrain.model.attention.report import DOCUMENTS, evenly, report_attention, summed_up
from dstrain.objective import Objective, ObjectiveSettings, Task
from dstrain.optim import OptimSettings, lr_factor
from dstrain.readings import Reading, Report
from dstrain.schema import Settings, setting
from dstrain.splitting import Piece
from dstrain.splitting import split as cut_up


class StageSettings(Settings):
    """One stage of training: what is asked (objective), of which text (corpus), for how long (epochs or steps)."""

    objective: ObjectiveSettings
    """What the model learns: mlm (masked words) or classify."""
    corpus: CorpusSettings
    """The text."""
    starts_from: str = "previous"
    """Where the encoder's weights come from: previous (stage), scratch, or the folder of a finished run."""
    max_length: int = setting(512, ge=8, unit="tokens")
    """Longer documents are truncated, or split into windows of this length (see corpus.long_documents)."""
    tokens_per_batch: int = setting(32_768, ge=8, unit="tokens")
    """Real tokens of a micro-batch at most; nothing is padded, so this is what decides memory."""
    accumulation: int = setting(1, ge=1, unit="micro-batches")
    """Micro-batches per rank and optimizer step."""
    epochs: int = setting(1, ge=1)
    """Passes over the corpus; not used when steps is given."""
    steps: int | None = setting(None, ge=1, unit="optimizer steps")
    """Ends the stage after this many steps instead."""
    optim: OptimSettings = OptimSettings()
    """Optimizer, schedule and clipping."""
    num_frozen_layers: int = setting(0, ge=0)
    """The embeddings and this many first layers hold still until thaw_at (0: nothing is frozen)."""
    thaw_at: float = setting(0.5, ge=0, le=1, unit="share of the stage")
    """When frozen layers start to learn."""
    evaluate_every: float = setting(1.0, gt=0, unit="epochs")
    """Distance between evaluations on the validation split; 0.25 is four times an epoch."""
    evaluate_every_steps: int | None = setting(None, ge=1, unit="optimizer steps")
    """The same in steps; wins over evaluate_every."""
    metric: str | None = None
    """What decides which weights are kept; by default loss for mlm and f1_macro for classify."""
    mode: Literal["min", "max"] | None = None
    """Whether a small or a large metric is good; by default what suits the metric."""
    patience: int | None = setting(None, ge=1, unit="evaluations")
    """Stops after this many evaluations without a better metric; null never stops early."""
    min_delta: float = setting(0.0, ge=0)
    """An evaluation is better when it wins by more than this."""
    report_every: int = setting(10, ge=1, unit="optimizer steps")
    """Distance between progress lines."""
    checkpoint_every: int | None = setting(None, ge=1, unit="optimizer steps")
    """Distance between checkpoints to resume from; by default one after every evaluation."""
    checkpoint_minutes: float | None = setting(None, gt=0, unit="minutes")
    """Also a checkpoint at the first step that ends so long after the last one; null: the clock asks for none."""
    keep_checkpoints: int = setting(2, ge=1)
    """The last checkpoints that stay, besides that of the best evaluation; the others go when a new one is on disk."""
    milestone_every: int | None = setting(None, ge=1, unit="optimizer steps")
    """Distance between checkpoints that stay for good; null: there are none."""
    healing: HealingSettings = HealingSettings()
    """What is tried when a step fails."""
    attention_report_interval: int | None = setting(None, ge=1, unit="optimizer steps")
    """Distance between measurements of how near favor or lsh comes to exact attention; null: at start and end only."""

    @model_validator(mode="after")
    def _fits(self) -> StageSettings:
        if self.max_length > self.tokens_per_batch:
            raise ValueError(
                f"max_length {self.max_length} is more than tokens_per_batch {self.tokens_per_batch}: one document "
                "would not fit in a micro-batch; lower the one or raise the other"
            )
        return self

    @property
    def keep(self) -> Keep:
        """Which checkpoints stay."""
        return Keep(self.keep_checkpoints, self.milestone_every, self.checkpoint_minutes)

    @property
    def selection(self) -> tuple[str, str]:
        """The metric that decides, and whether `max` or `min` of it is best."""
        metric, mode = self.objective.selection
        if self.metric and self.metric != metric:
            metric, mode = self.metric, "min" if self.metric in ("loss", "perplexity") else "max"
        return metric, self.mode or mode


# ----------------------------------------------------------------------------------------- the order of the data


class Due(NamedTuple):
    """What follows an optimizer step."""

    report: bool
    evaluation: bool
    checkpoint: bool
    attention: bool
    end: bool


class Course:
    """Which documents make up each optimizer step of a stage: a pure function of (lengths, settings, seed, group).

    `group` = ranks x accumulation. Micro-batch `place` of a step is the same documents however the group is shared
    out, so 1 rank x 2 accumulations and 2 ranks x 1 see the same step.
    """

    def __init__(self, lengths: np.ndarray, stage: StageSettings, seed: int, group: int, cut: int = 1) -> None:
        """With `cut` every micro-batch is taken in so many pieces, which ranks may share."""
        self._lengths, self._stage, self._seed = lengths, stage, seed
        self.group, self.cut = group, cut
        self._last: tuple[int, EpochPlan] | None = None
        self._first_steps = [0]
        self.left_out = 0
        while not self._complete():
            plan = self.plan(len(self._first_steps) - 1)
            self.left_out += len(plan.left_out)
            self._first_steps.append(self._first_steps[-1] + plan.steps)

    def _complete(self) -> bool:
        if self._stage.steps is not None:
            return self._first_steps[-1] >= self._stage.steps
        return len(self._first_steps) > self._stage.epochs

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the stage."""
        return self._stage.steps or self._first_steps[-1]

    @property
    def notes(self) -> list[str]:
        """What is not read, in a sentence."""
        if not self.left_out:
            return []
        epochs = len(self._first_steps) - 1
        return [
            f"train: {self.left_out} of {epochs * len(self._lengths)} sequences (over {epochs} epochs) are in no step: "
            f"an epoch is whole steps of {self.group} micro-batches (ranks x accumulation); others each epoch"
        ]

    @property
    def steps_per_epoch(self) -> int:
        """Steps of the first epoch; later ones differ by a step or two at most."""
        return self._first_steps[1]

    @property
    def thaw_step(self) -> int:
        """The first step in which frozen layers learn."""
        return math.floor(self.total_steps * self._stage.thaw_at) if self._stage.num_frozen_layers else 0

    @property
    def evaluation_distance(self) -> int:
        """Optimizer steps between evaluations."""
        return self._stage.evaluate_every_steps or max(1, round(self._stage.evaluate_every * self.steps_per_epoch))

    def due(self, step: int) -> Due:
        """What is to be done once `step` steps are taken. A report goes before everything else: it empties the sums."""
        end = step == self.total_steps
        evaluation = end or step % self.evaluation_distance == 0
        checkpoint = step % (self._stage.checkpoint_every or self.evaluation_distance) == 0
        checkpoint = checkpoint or self._stage.keep.is_milestone(step)
        attention = end or step % (self._stage.attention_report_interval or self.total_steps) == 0
        report = evaluation or checkpoint or attention or step % self._stage.report_every == 0
        return Due(report, evaluation, checkpoint, attention, end)

    def plan(self, epoch: int) -> EpochPlan:
        """The micro-batches of one epoch (the last one asked for is kept)."""
        if self._last is None or self._last[0] != epoch:
            plan = epoch_plan(self._lengths, self._stage.tokens_per_batch, self._seed, epoch, self.group)
            self._last = (epoch, plan)
        return self._last[1]

    def step(self, step: int) -> tuple[EpochPlan, int, int]:
        """(plan of its epoch, that epoch, step within it) of an optimizer step of the stage."""
        epoch = int(np.searchsorted(self._first_steps, step, side="right")) - 1
        return self.plan(epoch), epoch, step - self._first_steps[epoch]


@dataclass(frozen=True)
class Mine:
    """What one rank does in one optimizer step."""

    step: int
    batches: list[Piece]
    tokens: int
    """Real tokens of the whole step, over all ranks."""

    @property
    def weight(self) -> float:
        """Terms of the loss in this rank's micro-batches."""
        return float(sum(piece.batch.weight for piece in self.batches if piece.counts))


def prepared(course: Course, split: TokenSplit, objective: Objective, ranks: Ranks, steps: range) -> Iterator[Mine]:
    """This rank's share of each step, made one step ahead in a thread so that the device never waits for the host."""

    def prepare(step: int) -> Mine:
        plan, epoch, inner = course.step(step)
        group = plan.of_rank(inner, 0, 1)
        tokens = sum(int(split.lengths[planned.sequences_N].sum()) for planned in group)
        batches = []
        for share in range(ranks.rank, course.group * course.cut, ranks.world):
            planned = group[share % course.group]
            batch = objective.batch(split, planned.sequences_N, epoch)
            whole = Piece.whole(batch, split.document[planned.sequences_N], planned.micro_batch)
            batches.append([*cut_up(whole, course.cut)][share // course.group])
        return Mine(step, batches, tokens)

    with ThreadPoolExecutor(1, thread_name_prefix="batches") as ahead:
        following = ahead.submit(prepare, steps.start) if steps else None
        for step in steps:
            assert following is not None
            current = following.result()
            following = ahead.submit(prepare, step + 1) if step + 1 < steps.stop else None
            yield current


# ------------------------------------------------------------------------------------------------- the loop


@dataclass(frozen=True)
class Progress:
    """Where a stage is; with the engine's own state, all that a resume needs."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best: float | None = None
    best_step: int = 0
    stale: int = 0
    stopped: str = ""
    """Why the stage ended; empty while it runs."""
    unjudged: bool = False
    """Whether it was asked to stop within the evaluation that follows this step."""
    health: Health = field(default_factory=Health)
    """What failing steps have changed."""

    def __post_init__(self) -> None:
        if isinstance(self.health, dict):  # as JSON has it
            object.__setattr__(self, "health", Health(**self.health))


class Interrupted(Exception):
    """The run was asked to stop, has saved, and may go on later."""


Asked = Callable[[], bool]


def never() -> bool:
    """Nobody asks to stop."""
    return False


@dataclass(frozen=True)
class Site:
    """Where a stage stands in its run: its name and folder, its first run-wide step, and the seed of all its draws."""

    name: str
    folder: Path
    first_step: int
    seed: int


def fit(
    engine: Engine, objective: Objective, corpus: Corpus, stage: StageSettings, course: Course, site: Site,
    checkpoints: Checkpoints, report: Report, asked_to_stop: Asked = never, told_to_stop: Asked = never,
    at_rest: Callable[[str, int], object] = lambda stage, step: None, bf16_at_hand: bool = False,
) -> Progress:  # fmt: skip
    """Trains one stage to its end, from its checkpoint where there is one.

    Leaves `best.safetensors` (the weights that the selection metric chose; the last ones without a validation split)
    in the stage's folder. `asked_to_stop` is called before every step on every rank, `told_to_stop` between the batches of
    an evaluation; one rank that is asked stops them all. `at_rest(stage, step)` is called where no checkpoint of this rank's
    is on its way to the disk, before a step or another checkpoint: all up to that step is saved, or will not be.
    Raises Interrupted after saving when that happens, GaveOut after saving when fp16 is to give way to `bf16_at_hand`,
    Diverged when the loss is not a number, Unsaved when the disk does not take what it must.
    """
    ranks, split = engine.ranks, corpus.splits["train"]
    saved = checkpoints.resume(engine)
    progress = Progress(**saved["progress"]) if saved else Progress()
    if progress.step == 0:
        look_at_attention(engine, objective, split, stage, site, progress, course.total_steps, report, adapt=True)
    meter = Meter(site.name, course, objective, engine, stage, progress)
    if saved:
        meter.restore(saved["unreported"])
    end = partial(diverged, site.name, stage)
    healer = Healer(engine, stage.healing, site.name, site.folder, end, bf16_at_hand)
    progress = replace(progress, health=healer.begin(progress.health))
    hold_still(engine, stage, frozen=progress.step < course.thaw_step)

    def follow_up(progress: Progress) -> Progress:
        """What is due after a step, before its checkpoint."""
        due = course.due(progress.step)
        with meter.paused():
            if due.evaluation:
                try:
                    progress = judge(engine, objective, corpus, stage, site, progress, course.total_steps, report, told_to_stop)
                except Interrupted:
                    save(engine, checkpoints, replace(progress, unjudged=True), meter, needed=True)
                    raise Interrupted(f"saved {site.name} at step {progress.step}, before its evaluation") from None
            if due.attention or progress.stopped:
                look_at_attention(engine, objective, split, stage, site, progress, course.total_steps, report)
        return replace(progress, stopped="finished") if due.end and not progress.stopped else progress

    if progress.unjudged:
        task: Any = engine.task
        task.set_step(site.first_step + progress.step - 1, 0)  # the evaluation draws as it would have after that step
        progress = follow_up(replace(progress, unjudged=False))
        checkpoints.outdate()
        if not progress.stopped:
            save(engine, checkpoints, progress, meter)
    steps = range(progress.step, progress.step if progress.stopped else course.total_steps)
    for mine in prepared(course, split, objective, ranks, steps):
        if checkpoints.at_rest:
            at_rest(site.name, progress.step)
        weight, asked, late = ranks.add(mine.weight, asked_to_stop(), checkpoints.late)
        if asked or late:
            with meter.paused():
                save(engine, checkpoints, progress, meter, needed=bool(asked))
        if asked:
            raise Interrupted(f"saved {site.name} at step {progress.step}")
        if mine.step == course.thaw_step and course.thaw_step:
            hold_still(engine, stage, frozen=False)
            engine.restart_moments("frozen")
        lr = lr_factor(mine.step, course.total_steps, stage.optim) * stage.optim.lr
        attempt = Attempt(engine, site.first_step + mine.step, mine.batches, max(weight, 1.0))
        try:
            health = healer.step(attempt, mine.step + 1, progress.health, partial(take_step, attempt, meter, lr))
        except GaveOut:
            with meter.paused():
                save(engine, checkpoints, progress, meter, needed=True)
            raise
        except Diverged:
            report(events(site, replace(progress, step=mine.step + 1), course, healer.events | {"given_up": 1.0}))
            raise
        progress = replace(progress, step=mine.step + 1, tokens=progress.tokens + mine.tokens, health=health)
        if healer.events:
            report(events(site, progress, course, healer.events))
        due = course.due(progress.step)
        if due.report:
            progress = meter.report(progress, report)
        progress = follow_up(progress)
        if progress.stopped:
            return progress
        if due.checkpoint:
            with meter.paused():
                checkpoints.settle()
                at_rest(site.name, progress.step - 1)
                save(engine, checkpoints, progress, meter)
    return replace(progress, stopped=progress.stopped or "finished")  # resumed after its last step


def events(site: Site, progress: Progress, course: Course, figures: dict[str, float]) -> Reading:
    """What was tried, as a reading."""
    return Reading(site.name, "events", progress.step, course.total_steps, progress.tokens, progress.seconds, figures)


def save(
    engine: Engine, checkpoints: Checkpoints, progress: Progress, meter: Meter, needed: bool = False
) -> None:
    """A checkpoint from which the stage goes on as if nothing had been, unless there is one of this step.

    With `needed` it is on disk afterwards, or Unsaved is raised.
    """

    def state() -> dict[str, Any]:
        return {"progress": asdict(progress), "unreported": meter.unreported()}

    checkpoints.save(engine, progress.step, progress.best_step, state, needed)


def take_step(attempt: Attempt, meter: Meter, lr: float, pieces: int = 1) -> None:
    """One optimizer step: the gradient of the mean over all terms of all micro-batches of all ranks.

    Raises NotFinite on all ranks or RanShort on this one; then nothing is counted.
    """
    engine = attempt.engine
    engine.expect(len(attempt.batches) * pieces)
    with counting(engine, meter.tally) as tally:
        for piece in attempt.pieces(pieces):
            on_device, loss_sum, evidence = attempt.learn(piece)
            engine.step(lr)
            if piece.counts:
                tally.add(on_device, loss_sum, evidence, piece.documents)
    meter.lr = lr


@contextmanager
def counting(engine: Engine, tally: Tally) -> Iterator[Tally]:
    """A step counts as a whole or not at all."""
    before, skipped = tally.sums.clone(), engine.skipped_steps
    try:
        yield tally
    except BaseException:
        tally.sums.copy_(before)
        raise
    if engine.skipped_steps > skipped and not torch.isfinite(tally.sums).all():  # fp16 overflowed, and waits already
        tally.sums.copy_(before)


def hold_still(engine: Engine, stage: StageSettings, frozen: bool) -> None:
    """Freezes or thaws the embeddings and first layers: no backward pass through them, and no learning rate."""
    task: Any = engine.task
    task.encoder.frozen_layers = stage.num_frozen_layers if frozen else 0
    engine.set_group_scale("frozen", 0.0 if frozen else 1.0)


def judge(
    engine: Engine, objective: Objective, corpus: Corpus, stage: StageSettings, site: Site, progress: Progress,
    total_steps: int, report: Report, told_to_stop: Asked,
) -> Progress:  # fmt: skip
    """Evaluates on the validation split, keeps the weights when they are the best so far, counts patience."""
    best_file = site.folder / "best.safetensors"
    if "valid" not in corpus.splits:
        keep(engine, best_file)
        return progress
    split, pieces = corpus.splits["valid"], progress.health.pieces
    with evaluating(site.name, site.folder, engine.ranks.rank, pieces, finest(stage, split)):
        figures = evaluate(engine, objective, split, budget(stage, split, pieces), engine.ranks, told_to_stop)
    metric, mode = stage.selection
    value = figures[metric]
    if progress.best is None:
        better = not math.isnan(value)
    else:
        gain = value - progress.best if mode == "max" else progress.best - value
        better = gain > stage.min_delta  # never so for a nan
    if better:
        keep(engine, best_file)
        progress = replace(progress, best=value, best_step=progress.step, stale=0)
    else:
        progress = replace(progress, stale=progress.stale + 1)
    ends = progress.step == total_steps or bool(stage.patience and progress.stale >= stage.patience)
    report(Reading(site.name, "valid", progress.step, total_steps, progress.tokens, progress.seconds, figures))
    if ends and progress.best is None:
        raise diverged(site.name, stage, f"valid/{metric} was never a number, up to step {progress.step}")
    if ends and progress.step < total_steps:
        best = f"best {progress.best:.4g} at step {progress.best_step}"
        progress = replace(progress, stopped=f"no better {metric} in {stage.patience} evaluations ({best})")
    return progress


def look_at_attention(
    engine: Engine, objective: Objective, split: TokenSplit, stage: StageSettings, site: Site, progress: Progress,
    total_steps: int, report: Report, adapt: bool = False,
) -> None:  # fmt: skip
    """Reports how near each layer's attention comes to exact attention, on the same few documents all through a stage.

    Split "attention", names `layer_0/error` and so on (`dstrain.model.attention.report`); nothing for an exact kind.
    With `adapt` the kernels may first fit themselves to these documents. Every rank runs the same forward pass, because
    ZeRO-3 gathers in each.
    """
    task: Any = engine.task
    rows = evenly(len(split.lengths), DOCUMENTS).numpy()
    most = budget(stage, split, progress.health.pieces)
    rows = rows[: max(1, int(np.searchsorted(split.lengths[rows].cumsum(), most, side="right")))]
    batch = objective.batch(split, rows, epoch=-1).to(engine.ranks.device)
    figures = engine.ranks.agree(summed_up(report_attention(task.encoder, batch, engine, adapt)))
    if adapt:  # what was fitted may differ in its last bits between devices: the first rank's counts
        for block in task.encoder.blocks:
            for buffer in block.attention.buffers():
                engine.ranks.sum(buffer if engine.ranks.rank == 0 else buffer.zero_())
    if figures:
        step, tokens, seconds = progress.step, progress.tokens, progress.seconds
        report(Reading(site.name, "attention", step, total_steps, tokens, seconds, figures))


def diverged(name: str, stage: StageSettings, what: str) -> Diverged:
    """What to say when a stage has no more numbers to go on with."""
    way_out = f"lower stages.{name}.optim.lr ({stage.optim.lr:g}), lengthen its warmup, or train in fp32"
    return Diverged(f"{name}: {what}; {way_out}")


def keep(engine: Engine, file: Path) -> None:
    """Writes the full fp32 weights, whole or not at all. Raises Unsaved, on every rank."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    weights, problem, draft = engine.weights(), None, file.with_suffix(".draft")
    if engine.ranks.rank == 0:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(weights, draft)
            put_in_place(draft, file)
        except (OSError, SafetensorError) as error:
            problem = f"{file}: the weights could not be written ({error}): it takes {size(bytes_of(weights))}, and "
            problem += f"{size(free_bytes(draft))} are free there; make room"
            draft.unlink(missing_ok=True)
    if problem := engine.ranks.agree(problem):
        raise Unsaved(problem)


def budget(stage: StageSettings, split: TokenSplit, pieces: int) -> int:
    """Tokens of a batch that learns nothing: those of a micro-batch's pieces, which fit into memory, but a document at least."""
    return max(stage.tokens_per_batch // pieces, int(split.lengths.max()))


def finest(stage: StageSettings, split: TokenSplit) -> int:
    """From so many pieces on such batches are as small as they get."""
    return math.ceil(stage.tokens_per_batch / int(split.lengths.max()))


@torch.no_grad()
def evaluate(
    forward: Engine | Task, objective: Objective, split: TokenSplit, tokens_per_batch: int, ranks: Ranks,
    told_to_stop: Asked = never,
) -> dict[str, float]:  # fmt: skip
    """Figures over a whole split, the same on every rank: fixed masks, no dropout, each sequence counted once.

    `forward` is the engine while training, or a bare task afterwards. Raises Interrupted, on every rank, when one of them is
    told to stop.
    """
    module: Any = forward.task if isinstance(forward, Engine) else forward
    was_training = module.training
    module.eval()
    tally = objective.tally(split, ranks.device)
    # Every rank does the same number of forward passes (ZeRO-3 gathers in each); repeats are not counted.
    for _, rows, counted in evaluation_plan(split.lengths, tokens_per_batch, ranks.world).of_rank(ranks.rank):
        (told,) = ranks.add(told_to_stop())
        if told:
            raise Interrupted("within an evaluation")
        batch = objective.batch(split, rows, epoch=-1).to(ranks.device)
        loss_sum, evidence = forward(batch)
        if counted:
            tally.add(batch, loss_sum, evidence, split.document[rows])
    ranks.sum(tally.sums)
    module.train(was_training)
    return tally.figures()


class Meter:
    """Times and counts training between two reports; evaluations and checkpoints are not training time."""

    def __init__(
        self, name: str, course: Course, objective: Objective, engine: Engine, stage: StageSettings, progress: Progress
    ) -> None:
        self._name, self._course, self._objective, self._engine, self._stage = name, course, objective, engine, stage
        self.lr = 0.0
        self._start(progress)

    def _start(self, progress: Progress) -> None:
        self._reported = progress
        self.tally: Tally = self._objective.running_tally(self._engine.ranks.device)
        self._seconds = 0.0
        self._since = time.perf_counter()

    def unreported(self) -> dict[str, Any]:
        """What every rank has counted since the last report, for a checkpoint between two of them. Collective."""
        sums = self._engine.ranks.gather(self.tally.sums.tolist())
        return {"since": asdict(self._reported), "sums": sums, "seconds": self._seconds, "lr": self.lr}

    def restore(self, unreported: dict[str, Any]) -> None:
        """Goes on counting where `unreported` was asked."""
        ranks, sums = self._engine.ranks, torch.tensor(unreported["sums"], dtype=torch.float64)
        if len(sums) != ranks.world:  # saved by another number of ranks: the first one takes all
            sums = torch.stack([sums.sum(0), *[torch.zeros_like(sums[0])] * (ranks.world - 1)])
        self._reported = Progress(**unreported["since"])
        self.tally.sums += sums[ranks.rank].to(self.tally.sums.device)
        self._seconds, self.lr = unreported["seconds"], unreported.get("lr", 0.0)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the clock: what happens inside is not training."""
        self._seconds += time.perf_counter() - self._since
        yield
        self._since = time.perf_counter()

    def report(self, progress: Progress, report: Report) -> Progress:
        """Sends a reading of everything since the last one."""
        engine, before = self._engine, self._reported
        engine.ranks.sum(self.tally.sums)
        figures = self.tally.figures()  # waits for the device, so the clock below is honest
        seconds = max(self._seconds + time.perf_counter() - self._since, 1e-9)
        tokens, steps = progress.tokens - before.tokens, progress.step - before.step
        progress = replace(progress, seconds=progress.seconds + seconds)
        budget = steps * self._course.group * self._stage.tokens_per_batch
        figures |= {
            "lr": self.lr,
            "grad_norm": engine.grad_norm,
            "tokens_per_second": tokens / seconds,
            "useful_share": tokens / budget,
            "peak_memory_gb": peak_memory_gb(engine.ranks.device),
        }
        if engine.loss_scale != 1.0 or engine.skipped_steps:
            figures |= {"loss_scale": engine.loss_scale, "skipped_steps": float(engine.skipped_steps)}
        self._start(progress)
        total = self._course.total_steps
        report(Reading(self._name, "train", progress.step, total, progress.tokens, progress.seconds, figures))
        return progress
