"""The two sides of `benchmarks.whole_model`: one optimizer step of the same BERT by dstrain and by Hugging Face.

Each side lives in a process of its own and takes a step whenever the other end of a pipe says so; what it sends back
is a `Step`. Both sides get the same documents in every step, the same DeepSpeed JSON, AdamW settings, number format and
threads, and the same model: learned positions, post-norm, dropout .1 (none on attention weights), the first token pooled.
"""

from __future__ import annotations

import importlib
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch

from dstrain.data.cache import Corpus, cache_home, open_corpus
from dstrain.data.corpora import CorpusSettings
from dstrain.data.vocabulary import Vocabulary
from dstrain.ds_plan import Facts, read_plan, resolve
from dstrain.engine import Engine, free_port, join_ranks
from dstrain.healing import Attempt
from dstrain.loop import Mine, take_step
from dstrain.model.encoder import Encoder, EncoderSettings
from dstrain.objective import ClassifySettings, MlmSettings, ObjectiveSettings, Task
from dstrain.optim import OptimSettings, build_optimizer, parameter_groups
from dstrain.precision import LossScaleSettings, choose
from dstrain.splitting import Piece

SEED = 0
LR = 1e-4
NATURAL = 512
"""Up to this length documents are drawn at random and most are shorter; beyond it, the longest of the corpus are cut."""
WARMUP_LENGTH = 64
"""Tokens of a document in the step that nobody times: it makes the moments and compiles what is compiled once."""


@dataclass(frozen=True)
class Job:
    """One side of one cell of the table; all a process needs to know."""

    side: str
    """dstrain or hf."""
    task: str
    """mlm or classification."""
    kind: str
    """The attention."""
    length: int
    """Longer documents are cut here."""
    dtype: str
    preset: str
    corpus: CorpusSettings
    data: str
    """DSTRAIN_DATA: a fork server's children have the environment of when it started."""
    vocabulary: Path
    deepspeed: Path
    documents_per_step: int
    steps: int
    """The most steps anybody will ask for."""
    threads: int
    grouped: bool
    """Whether a step's documents are of like length."""

    @property
    def name(self) -> str:
        """How people call it."""
        return f"{self.task} {self.length} {self.side} {self.kind}"


class Step(NamedTuple):
    """One optimizer step: forward, backward, clipping and update. Making the batch is not counted on either side."""

    tokens: int
    """Real tokens, [CLS] and [SEP] included; padding is not."""
    computed: int
    """The same with padding."""
    seconds: float
    cpu_seconds: float
    """Of all threads of the process."""
    peak_bytes: int
    """The most memory so far, above what the process held before it built the model (see `Memory`)."""


def serve(job: Job, pipe: Connection) -> None:
    """Runs in a process of its own: "ready" down the pipe, then a Step for each True; False ends it. Errors as text."""
    nowhere = os.open(os.devnull, os.O_WRONLY)  # the libraries talk
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    torch.set_num_threads(job.threads)
    os.environ["DSTRAIN_DATA"] = job.data
    try:
        {"dstrain": _serve_dstrain, "hf": _serve_hf}[job.side](job, pipe)
    except Exception:
        pipe.send(traceback.format_exc())
    finally:
        pipe.close()
        os._exit(0)  # native threads of DeepSpeed and gloo may hold an orderly exit up


# -------------------------------------------------------------------------------------------------- what is counted


class Memory:
    """Growth of the memory in use since this object was made: resident set on a CPU, the allocator's on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts at what is resident now
            self._before = psutil.Process().memory_info().rss

    def peak(self) -> int:
        """Bytes at the highest point since then."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        status = Path("/proc/self/status").read_text()
        kib = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
        return int(kib) * 1024 - self._before


class Clock:
    """Wall and CPU time of one step; on a GPU it waits for the device at both ends."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def start(self) -> None:
        """Begins a step."""
        self._wait()
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def stop(self) -> tuple[float, float]:
        """(seconds, CPU seconds) since `start`."""
        self._wait()
        return time.perf_counter() - self._wall, time.process_time() - self._cpu

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


# ------------------------------------------------------------------------------------------------- the same texts


def documents_of_steps(job: Job, lengths: np.ndarray) -> list[np.ndarray]:
    """Which documents each step reads, the same on both sides; a small corpus is read again from its start.

    Up to 512 tokens they come in random order, as a Trainer draws them; beyond, the longest come first, so that there
    is something of the asked length to read. `grouped` sorts them by length and shuffles the steps.
    """
    random = np.random.default_rng(SEED)
    order = np.argsort(-lengths, kind="stable") if job.length > NATURAL else random.permutation(len(lengths))
    if job.grouped:
        sorted_order = order[np.argsort(lengths[order], kind="stable")]
        whole = len(order) // job.documents_per_step * job.documents_per_step
        order = random.permutation(sorted_order[len(order) - whole :].reshape(-1, job.documents_per_step)).flatten()
    return list(np.resize(order, (job.steps, job.documents_per_step)))


def open_text(job: Job, length: int) -> tuple[Vocabulary, Corpus]:
    """The vocabulary and the corpus cut at `length`, from the cache that the parent has filled."""
    vocabulary = Vocabulary.load(job.vocabulary)
    return vocabulary, open_corpus(job.corpus, vocabulary, length, cache_home(), lambda line: None)


def deepspeed_plan(job: Job, hidden_size: int, device: torch.device) -> dict[str, Any]:
    """The DeepSpeed JSON as dstrain resolves it; Hugging Face gets the same with its own batch sizes."""
    name = choose(job.dtype, device).name  # type: ignore[arg-type]
    facts = Facts(
        accumulation=1, world=1, clip_norm=1.0, precision=name, loss_scale=LossScaleSettings(),
        hidden_size=hidden_size, device=device.type,
    )  # fmt: skip
    return resolve(read_plan(job.deepspeed), facts, str(job.deepspeed))


def max_length(job: Job) -> int:
    """Places that the model has vectors for."""
    return max(job.length, WARMUP_LENGTH)


def encoder_settings(job: Job) -> EncoderSettings:
    """The encoder of dstrain's side. Learned positions, because the other side has them."""
    positions = {"kind": "learned", "max_length": max_length(job)}
    return EncoderSettings.model_validate(
        {"preset": job.preset, "attention": {"kind": job.kind}, "positions": positions}
    )


def objective_settings(job: Job) -> ObjectiveSettings:
    """What is learned; classification pools the first token, as BertForSequenceClassification does."""
    return MlmSettings() if job.task == "mlm" else ClassifySettings(pooling="cls")


# ------------------------------------------------------------------------------------------------------- dstrain


def _serve_dstrain(job: Job, pipe: Connection) -> None:
    ranks = join_ranks()
    vocabulary, short = open_text(job, WARMUP_LENGTH)
    _, corpus = open_text(job, job.length)
    chosen = documents_of_steps(job, corpus.splits["train"].lengths)
    memory, clock = Memory(ranks.device), Clock(ranks.device)
    encoder = encoder_settings(job)
    objective = objective_settings(job).build(corpus, vocabulary, encoder, SEED)
    task = Task(Encoder(encoder, vocabulary.size, SEED), objective)
    settings = OptimSettings()
    optimizer = build_optimizer(
        parameter_groups(task.named_parameters(), settings.weight_decay), settings, ranks.device
    )
    engine = Engine(task, optimizer, deepspeed_plan(job, encoder.hidden_size, ranks.device), ranks)
    meter: Any = SimpleNamespace(tally=objective.running_tally(ranks.device), lr=LR)

    def mine(number: int, text: Corpus, documents: np.ndarray) -> Mine:
        split = text.splits["train"]
        documents = documents[np.argsort(split.lengths[documents], kind="stable")]  # as `epoch_plan` orders them
        batch = objective.batch(split, documents, epoch=0)
        return Mine(number, [Piece.whole(batch, split.document[documents], 0)], batch.sequences.tokens)

    warmup = mine(0, short, chosen[0])
    take_step(Attempt(engine, warmup.step, warmup.batches, warmup.weight), meter, LR)
    pipe.send("ready")
    for number, documents in enumerate(chosen):
        step = mine(number, corpus, documents)
        if not pipe.recv():
            return
        clock.start()
        take_step(Attempt(engine, step.step, step.batches, step.weight), meter, LR)
        pipe.send(Step(step.tokens, step.tokens, *clock.stop(), memory.peak()))


# -------------------------------------------------------------------------------------------------- Hugging Face


def hf_model(job: Job, vocabulary: Vocabulary, num_classes: int) -> Any:
    """The same BERT from `transformers`, with its fused attention.

    Its default of dropping attention weights is turned off: the other side has none, and it would cost this one the
    flash kernel.
    """
    transformers: Any = importlib.import_module("transformers")
    shape = encoder_settings(job)
    config = transformers.BertConfig(
        vocab_size=vocabulary.size, hidden_size=shape.hidden_size, num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads, intermediate_size=shape.intermediate_size,
        max_position_embeddings=max_length(job), hidden_dropout_prob=shape.dropout, attention_probs_dropout_prob=0.0,
        classifier_dropout=0.1, layer_norm_eps=shape.layer_norm_eps, pad_token_id=vocabulary.pad,
        num_labels=max(num_classes, 2),
    )  # fmt: skip
    name = "BertForMaskedLM" if job.task == "mlm" else "BertForSequenceClassification"
    return getattr(transformers, name)._from_config(config, attn_implementation="sdpa")


def _serve_hf(job: Job, pipe: Connection) -> None:
    transformers: Any = importlib.import_module("transformers")
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    vocabulary, short = open_text(job, WARMUP_LENGTH)
    _, corpus = open_text(job, job.length)
    chosen = documents_of_steps(job, corpus.splits["train"].lengths)
    rows = [*_rows(short, chosen[:1]), *_rows(corpus, chosen)]
    memory, clock = Memory(device), Clock(device)
    model = hf_model(job, vocabulary, len(corpus.label_names))
    plan = deepspeed_plan(job, model.config.hidden_size, device)
    batch_keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder, max_steps=job.steps + 1, per_device_train_batch_size=job.documents_per_step,
            learning_rate=LR, weight_decay=OptimSettings().weight_decay, lr_scheduler_type="constant",
            deepspeed=plan | dict.fromkeys(batch_keys, "auto"), bf16=job.dtype == "bf16", use_cpu=device.type == "cpu",
            train_sampling_strategy="sequential",  # of rows that lie in random order already
            report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, seed=SEED,
        )  # fmt: skip
        asked = _Asked(job, pipe, memory, clock, _counts(rows, job.documents_per_step))
        callback = type("Callback", (transformers.TrainerCallback,), {
            "on_step_begin": lambda _, arguments, state, control, **rest: asked.begin(),
            "on_step_end": lambda _, arguments, state, control, **rest: asked.end(),
        })  # fmt: skip
        trainer = transformers.Trainer(
            model=model, args=arguments, train_dataset=rows, data_collator=_collator(job, vocabulary, Path(folder)),
            callbacks=[callback()],
        )  # fmt: skip
        torch.set_num_threads(job.threads)  # `accelerate` has ideas of its own
        try:
            trainer.train()
        except _Enough:
            return


class _Enough(BaseException):
    """Nobody asks for another step."""


class _Asked:
    """Holds the Trainer at the beginning of each step until one is asked for. The first step only warms up."""

    def __init__(
        self, job: Job, pipe: Connection, memory: Memory, clock: Clock, counts: Iterator[tuple[int, int]]
    ) -> None:
        self._pipe, self._memory, self._clock, self._counts = pipe, memory, clock, counts
        self._warm = False

    def begin(self) -> None:
        """The Trainer is about to start the forward pass."""
        if self._warm and not self._pipe.recv():
            raise _Enough
        self._clock.start()

    def end(self) -> None:
        """The Trainer has updated the weights and zeroed the gradients."""
        step = Step(*next(self._counts), *self._clock.stop(), self._memory.peak())
        self._pipe.send(step if self._warm else "ready")
        self._warm = True


def _rows(corpus: Corpus, steps: list[np.ndarray]) -> list[dict[str, Any]]:
    split = corpus.splits["train"]
    rows: list[dict[str, Any]] = []
    for document in np.concatenate(steps):
        row: dict[str, Any] = {"input_ids": split.gather(np.array([document])).tolist()}
        if split.labels is not None:
            row["labels"] = int(split.labels[document])
        rows.append(row)
    return rows


def _counts(rows: list[dict[str, Any]], per_step: int) -> Iterator[tuple[int, int]]:
    """(real tokens, tokens once all are padded to the longest) of each step."""
    for begin in range(0, len(rows), per_step):
        lengths = [len(row["input_ids"]) for row in rows[begin : begin + per_step]]
        yield sum(lengths), max(lengths) * len(lengths)


def _collator(job: Job, vocabulary: Vocabulary, folder: Path) -> Callable[[list[dict[str, Any]]], Any]:
    """What a user of the Trainer takes: pads to the longest document of the batch; for MLM it also masks."""
    transformers: Any = importlib.import_module("transformers")
    names = {f"{word}_token": f"[{word.upper()}]" for word in ("pad", "unk", "cls", "sep", "mask")}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(vocabulary.save(folder)), **names)
    if job.task == "mlm":
        return transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=MlmSettings().mask_rate)
    return transformers.DataCollatorWithPadding(tokenizer)
