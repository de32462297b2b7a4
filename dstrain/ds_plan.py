"""A DeepSpeed JSON and the facts of a run, made into the dictionary that DeepSpeed gets. Arithmetic only, no DeepSpeed.

DeepSpeed 0.19 accepts any unknown top-level key, reads `"stage": "auto"` as stage 0, fails on `"gradient_clipping":
"auto"`, clips at 1.0 when nothing is said, and trusts a batch size that is not the run's. So every key is looked up in
`KNOWN`, which lists what `deepspeed/runtime/config.py` and the classes it composes read (a test compares), "auto" is
filled from the run, and whatever clashes with the run is refused. All problems of a file are told together.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union

from dstrain.schema import Problem, Settings, UserError, complain, did_you_mean, flatten, set_path


@dataclass(frozen=True)
class Facts:
    """What the run has already decided. The JSON follows it; it never decides any of this again."""

    accumulation: int
    """Micro-batches per rank and optimizer step."""
    world: int
    """Ranks, all of them data-parallel."""
    clip_norm: float
    """Global gradient norm; 0 never clips."""
    precision: Literal["fp32", "bf16", "fp16"]
    loss_scale: Settings
    """Dynamic loss scaling, its fields named as in DeepSpeed's `fp16` block (precision.LossScaleSettings)."""
    hidden_size: int
    """E of the encoder; communication buckets are sized by it."""
    device: str
    """cuda or cpu."""
    micro_batch: int = 1
    """A formality: micro-batches are packed by tokens, so DeepSpeed sees one packed micro-batch at a time."""


# ----------------------------------------------------------------------------------------- kinds of values


class Kind(NamedTuple):
    """What a value must be: the words for the error, and the value in its proper type (ValueError when it is not)."""

    words: str
    take: Callable[[Any], Any]


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError
    return value


def _number_in(low: float, high: float = math.inf) -> Callable[[Any], float]:
    def take(value: Any) -> float:
        if not low <= _number(value) <= high:
            raise ValueError
        return float(value)

    return take


def _whole(low: int, high: float = math.inf) -> Callable[[Any], int]:
    def take(value: Any) -> int:
        if _number(value) != int(value) or not low <= value <= high:  # 5e8 is how DeepSpeed's examples write a size
            raise ValueError
        return int(value)

    return take


def _even(value: Any) -> int:
    return 2 * _whole(1)(_number(value) / 2)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list):
        raise ValueError
    return [_text(item) for item in value]


def _one_of(*choices: str) -> Kind:
    def take(value: Any) -> str:
        if not isinstance(value, str) or value.lower() not in choices:
            raise ValueError
        return value.lower()

    return Kind("one of " + ", ".join(choices), take)


FLAG = Kind("true or false", _bool)
AMOUNT = Kind("a number of at least 0", _number_in(0))
SHARE = Kind("a number between 0 and 1", _number_in(0, 1))
COUNT = Kind("a whole number of at least 0", _whole(0))
SIZE = Kind("a whole number of at least 1", _whole(1))
TEXT = Kind("text", _text)
TEXTS = Kind("a list of texts", _texts)
DTYPE = _one_of("fp32", "bf16", "fp16")

# ----------------------------------------------------------------------------------- what DeepSpeed reads

Tree = Mapping[str, Union[Kind, "Tree"]]

KNOWN: Tree = {
    "train_batch_size": SIZE,
    "train_micro_batch_size_per_gpu": SIZE,
    "gradient_accumulation_steps": SIZE,
    "managed_gradient_accumulation": FLAG,
    "gradient_clipping": AMOUNT,
    "gradient_predivide_factor": AMOUNT,
    "gradient_allreduce_op": _one_of("mean", "sum"),
    "prescale_gradients": FLAG,
    "communication_data_type": DTYPE,
    "disable_allgather": FLAG,
    "zero_allow_untested_optimizer": FLAG,
    "zero_force_ds_cpu_optimizer": FLAG,
    "steps_per_print": SIZE,
    "wall_clock_breakdown": FLAG,
    "memory_breakdown": FLAG,
    "dump_state": FLAG,
    "disable_python_gc": FLAG,
    "log_level": _one_of("debug", "info", "warning", "error", "critical"),
    "fp16": {
        "enabled": FLAG,
        "auto_cast": FLAG,
        "loss_scale": AMOUNT,
        "initial_scale_power": COUNT,
        "loss_scale_window": SIZE,
        "hysteresis": SIZE,
        "consecutive_hysteresis": FLAG,
        "min_loss_scale": SIZE,
        "fp16_master_weights_and_grads": FLAG,
    },
    "bf16": {
        "enabled": FLAG,
        "immediate_grad_update": FLAG,
        "check_grad_overflow": FLAG,
        "bf16_master_weights_and_grads": FLAG,
        "bf16_optimizer_states": FLAG,
    },
    "zero_optimization": {
        "stage": Kind("0, 1, 2 or 3", _whole(0, 3)),
        "contiguous_gradients": FLAG,
        "reduce_scatter": FLAG,
        "reduce_bucket_size": SIZE,
        "use_multi_rank_bucket_allreduce": FLAG,
        "allgather_partitions": FLAG,
        "allgather_bucket_size": Kind("an even number of at least 2", _even),  # ZeRO asserts it, to align its buffers
        "overlap_comm": FLAG,
        "compute_grad_norm": FLAG,
        "load_from_fp32_weights": FLAG,
        "elastic_checkpoint": FLAG,
        "sub_group_size": SIZE,
        "stage3_prefetch_bucket_size": COUNT,
        "stage3_param_persistence_threshold": COUNT,
        "stage3_model_persistence_threshold": COUNT,
        "stage3_max_live_parameters": COUNT,
        "stage3_max_reuse_distance": COUNT,
        "stage3_gather_16bit_weights_on_model_save": FLAG,
        "stage3_module_granularity_threshold": COUNT,
        "stage3_use_all_reduce_for_fetch_params": FLAG,
        "stage3_allgather_sequential": FLAG,
        "ignore_unused_parameters": FLAG,
        "legacy_stage1": FLAG,
        "round_robin_gradients": FLAG,
        "parameter_alignment": FLAG,
        "zero_hpz_partition_size": COUNT,
        "zero_quantized_weights": FLAG,
        "zero_quantized_nontrainable_weights": FLAG,
        "zero_quantized_gradients": FLAG,
        "memory_efficient_linear": FLAG,
        "pipeline_loading_checkpoint": FLAG,
        "override_module_apply": FLAG,
        "log_trace_cache_warnings": FLAG,
        "enable_sanity_checks": FLAG,
        "leaf_module": {"classes": TEXTS, "names": TEXTS, "name_suffixes": TEXTS},
        "offload_optimizer": {
            "device": _one_of("none", "cpu"),
            "nvme_path": TEXT,
            "buffer_count": COUNT,
            "pin_memory": FLAG,
            "pipeline_read": FLAG,
            "pipeline_write": FLAG,
            "fast_init": FLAG,
            "ratio": SHARE,
            "super_offload": FLAG,
            "cpuadam_cores_perc": SHARE,
        },
        "offload_param": {
            "device": _one_of("none", "cpu"),
            "nvme_path": TEXT,
            "buffer_count": COUNT,
            "buffer_size": COUNT,
            "max_in_cpu": COUNT,
            "pin_memory": FLAG,
        },
    },
    "data_types": {
        "grad_accum_dtype": DTYPE,
        "param_dtype": DTYPE,
        "buffer_dtype": DTYPE,
        "keep_in_fp32_modules": TEXTS,
    },
    "activation_checkpointing": {
        "partition_activations": FLAG,
        "number_checkpoints": COUNT,
        "contiguous_memory_optimization": FLAG,
        "synchronize_checkpoint_boundary": FLAG,
        "profile": FLAG,
        "cpu_checkpointing": FLAG,
    },
    "flops_profiler": {
        "enabled": FLAG,
        "recompute_fwd_factor": AMOUNT,
        "profile_step": SIZE,
        "module_depth": Kind("a whole number of at least -1", _whole(-1)),
        "top_modules": SIZE,
        "detailed": FLAG,
        "output_file": TEXT,
    },
    "comms_logger": {"enabled": FLAG, "prof_all": FLAG, "prof_ops": TEXTS, "verbose": FLAG, "debug": FLAG},
    "timers": {"throughput": {"enabled": FLAG, "synchronized": FLAG}},
    "aio": {
        "block_size": SIZE,
        "queue_depth": SIZE,
        "intra_op_parallelism": SIZE,
        "single_submit": FLAG,
        "overlap_events": FLAG,
        "use_gds": FLAG,
    },
    "checkpoint": {
        "tag_validation": _one_of("ignore", "warn", "fail"),
        "checkpoint_serialization": FLAG,
        "load_universal": FLAG,
        "use_node_local_storage": FLAG,
        "parallel_write": {"pipeline_stage": FLAG},
    },
}

_OWNER = "belongs to the run file ({}); remove this block"
_ELSEWHERE = "DeepSpeed has this, dstrain does not train that way; remove it"
_GONE = "DeepSpeed 0.19 no longer has this; remove it"
_LOSSY = "all ZeRO stages train the same run, and quantized ones would not"
_MONITOR = "dstrain reports to MLflow by itself; remove this block"

REFUSED: Mapping[str, str] = {
    "optimizer": _OWNER.format("stages.NAME.optim: lr, betas, eps, weight_decay"),
    "scheduler": _OWNER.format("stages.NAME.optim: warmup, schedule, min_lr_ratio"),
    "bfloat16": "is the old name; write bf16",
    "torch_autocast": "the run's precision decides how numbers are held; remove this block",
    "dataloader_drop_last": "dstrain packs its own micro-batches; remove it",
    **dict.fromkeys(("tensorboard", "wandb", "csv_monitor", "comet"), _MONITOR),
    **dict.fromkeys(
        (
            "autotuning", "compile", "data_efficiency", "datastates_ckpt", "expert_parallel", "hybrid_engine",
            "pipeline", "seq_parallel_communication_data_type", "sequence_parallel_size", "tensor_parallel",
            "use_data_before_expert_parallelism", "vocabulary_size", "weight_quantization", "checkpoint.writer",
            "zero_optimization.zenflow", "zero_optimization.save_muon_momentum_buffer_in_memory",
        ),
        _ELSEWHERE,
    ),
    **dict.fromkeys(
        (
            "amp", "compression_training", "curriculum_learning", "eigenvalue", "elasticity", "graph_harvesting",
            "nebula", "progressive_layer_drop", "quantize_training", "sparse_attention", "sparse_gradients",
            "zero_optimization.mics_shard_size", "zero_optimization.mics_hierarchical_params_gather",
            "zero_optimization.zeropp_loco_param",
        ),
        _GONE,
    ),
    "zero_optimization.cpu_offload": 'is the old name; write "offload_optimizer": {"device": "cpu"}',
    "zero_optimization.cpu_offload_param": 'is the old name; write "offload_param": {"device": "cpu"}',
    "zero_optimization.cpu_offload_use_pin_memory": "is the old name; write pin_memory in the offload block",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": (
        "is the old name; write stage3_gather_16bit_weights_on_model_save"
    ),
}  # fmt: skip
"""Keys that DeepSpeed knows and a run cannot use. Switched off (false, null, `"enabled": false`) they are dropped."""

FIXED: Mapping[str, tuple[Any, str]] = {
    "managed_gradient_accumulation": (True, "the engine counts on DeepSpeed to count micro-batches"),
    "gradient_allreduce_op": ("mean", "the loss is scaled for a mean over ranks"),
    "prescale_gradients": (False, "the loss is scaled for a mean over ranks"),
    "gradient_predivide_factor": (1.0, "the loss is scaled for a mean over ranks"),
    "zero_force_ds_cpu_optimizer": (False, "the optimizer is torch.optim.AdamW, on the CPU too"),
    "fp16.fp16_master_weights_and_grads": (False, "AdamW keeps its master weights in fp32"),
    "bf16.bf16_master_weights_and_grads": (False, "AdamW keeps its master weights in fp32"),
    "bf16.bf16_optimizer_states": (False, "AdamW keeps its moments in fp32"),
    "bf16.check_grad_overflow": (True, "a step that is not finite is found there"),
    "zero_optimization.compute_grad_norm": (True, "clipping and the readings need the norm"),
    "zero_optimization.ignore_unused_parameters": (True, "frozen layers have no gradient"),
    "zero_optimization.elastic_checkpoint": (False, "dstrain itself shares out what other ranks saved"),
    "zero_optimization.legacy_stage1": (False, "DeepSpeed no longer has it"),
    "zero_optimization.zero_hpz_partition_size": (1, "dstrain has no second partition group"),
    "zero_optimization.zero_quantized_weights": (False, _LOSSY),
    "zero_optimization.zero_quantized_nontrainable_weights": (False, _LOSSY),
    "zero_optimization.zero_quantized_gradients": (False, _LOSSY),
    "zero_optimization.offload_optimizer.super_offload": (False, "it needs DeepSpeed's own CPU Adam"),
    "zero_optimization.offload_optimizer.ratio": (1.0, "a partial offload needs DeepSpeed's own CPU Adam"),
    "checkpoint.load_universal": (False, "a run resumes from its own checkpoints"),
}
"""Keys with one value that a run works with, and why."""

# ---------------------------------------------------------------------------------------------- the file


def read_plan(path: Path) -> dict[str, Any]:
    """The object in a DeepSpeed JSON file. Raises UserError with line and column, or for a key given twice."""
    try:
        plan = json.loads(
            path.read_text(encoding="utf-8-sig"), object_pairs_hook=_once_each, parse_constant=_no_such_number
        )
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{path}: {where}: not readable as JSON: {error.msg[0].lower()}{error.msg[1:]}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of a DeepSpeed JSON") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(plan, dict):
        raise UserError(f'{path}: holds {_shown(plan)}; a DeepSpeed JSON is an object, such as {{"bf16": ...}}')
    return plan


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is given twice in one object; keep one of them")
        found[key] = value
    return found


def _no_such_number(word: str) -> float:
    raise ValueError(f"{word} is not a number that JSON has; write a number")


# ------------------------------------------------------------------------------------------------ the plan


def resolve(plan: Mapping[str, Any], facts: Facts, source: str) -> dict[str, Any]:
    """The plan with every "auto" filled from the run, ready for `deepspeed.initialize(config=...)`.

    `source` names the file in errors. Raises one UserError that lists all problems: unknown keys, wrong types, what the
    run file owns, and numbers that differ from the run's. The plan given is left as it is.
    """
    problems: list[Problem] = []
    given = flatten(_checked(plan, KNOWN, "", problems))
    given = {address: value for address, value in given.items() if value != "auto"}
    problems += _not_the_only_value(given)
    problems += _both_precisions(given)
    problems += _clashes(given, facts)
    if not any(problem.address in ("zero_optimization", "zero_optimization.stage") for problem in problems):
        problems += _impossible(given, facts)
    if problems:
        raise complain(source, problems)
    resolved: dict[str, Any] = {}
    for address, value in {**_usual(given, facts), **given, **_decided(facts)}.items():
        set_path(resolved, address, value)
    return resolved


def _checked(block: Mapping[str, Any], known: Tree, prefix: str, problems: list[Problem]) -> dict[str, Any]:
    """The keys of a block whose name and type are right, values in their proper type; the rest goes to `problems`."""
    taken: dict[str, Any] = {}
    for key, value in block.items():
        address = f"{prefix}{key}"
        if address in REFUSED:
            if not _switched_off(value):
                problems.append(Problem(address, REFUSED[address]))
        elif key not in known:
            problems.append(Problem(address, f"not a key dstrain knows{did_you_mean(key, known)}"))
        elif value is not None:  # DeepSpeed's files write null for "not set"
            kind = known[key]
            if isinstance(kind, Kind):
                taken.update(_taken(key, value, kind, address, problems))
            elif not isinstance(value, Mapping):
                block_of = f'{{"{next(iter(kind))}": ...}}'
                problems.append(Problem(address, f"is {_shown(value)}; it takes a block, such as {block_of}"))
            elif inner := _checked(value, kind, f"{address}.", problems):
                taken[key] = inner
    return taken


def _taken(key: str, value: Any, kind: Kind, address: str, problems: list[Problem]) -> dict[str, Any]:
    if value == "auto" and address in FILLED:
        return {key: value}
    if value == "auto" and address == "data_types.keep_in_fp32_modules":
        return {}  # DeepSpeed's own word there, and its default
    if value == "auto":
        problems.append(Problem(address, f'dstrain cannot fill "auto" here; give {kind.words}'))
        return {}
    try:
        return {key: kind.take(value)}
    except (ValueError, OverflowError):
        problems.append(Problem(address, f"is {_shown(value)}; give {kind.words}"))
        return {}


def _switched_off(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, Mapping) and value.get("enabled") is False)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


# ------------------------------------------------------------------------------------- what the run decides


def _decided(facts: Facts) -> dict[str, Any]:
    """By address: values that are the run's alone. The JSON may leave them out, say "auto", or repeat them."""
    decided = {
        "train_micro_batch_size_per_gpu": facts.micro_batch,
        "gradient_accumulation_steps": facts.accumulation,
        "train_batch_size": facts.micro_batch * facts.accumulation * facts.world,
        "gradient_clipping": facts.clip_norm,
        "bf16.enabled": facts.precision == "bf16",
        "fp16.enabled": facts.precision == "fp16",
    }
    if facts.precision == "fp16":
        decided.update({f"fp16.{key}": value for key, value in facts.loss_scale.model_dump().items()})
    return decided


def _usual(given: Mapping[str, Any], facts: Facts) -> dict[str, Any]:
    """By address: what is written where the JSON leaves something out or says "auto"."""
    stage = given.get("zero_optimization.stage", 0)
    block = 12 * facts.hidden_size**2  # parameters of one encoder block: 4 E^2 of attention, 8 E^2 of MLP
    usual: dict[str, Any] = {
        "zero_optimization.stage": 0,
        # DeepSpeed's 5e8 elements would allocate 2 GB up front; a block at a time keeps transfers large enough
        "zero_optimization.reduce_bucket_size": block,
        "zero_optimization.allgather_bucket_size": block,
        "zero_optimization.overlap_comm": stage == 3,
        # gradients are added up and averaged in fp32, so that splitting a step over ranks or micro-batches changes
        # nothing; DeepSpeed cannot do so at stage 0, where there is no buffer but the parameter's own gradient
        "communication_data_type": "fp32",
        "data_types.grad_accum_dtype": facts.precision if stage == 0 else "fp32",
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
        "timers.throughput.enabled": False,  # it waits for the device at every step
    }
    if stage == 3:
        usual["zero_optimization.stage3_prefetch_bucket_size"] = block
        usual["zero_optimization.stage3_param_persistence_threshold"] = 10 * facts.hidden_size
    for offload in ("offload_optimizer", "offload_param"):
        if given.get(f"zero_optimization.{offload}.device", "none") != "none":
            usual[f"zero_optimization.{offload}.pin_memory"] = facts.device == "cuda"
    return usual


FILLED = frozenset(
    {
        "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
        "communication_data_type", "data_types.grad_accum_dtype", "steps_per_print", "wall_clock_breakdown",
        "fp16.enabled", "fp16.loss_scale", "fp16.initial_scale_power", "fp16.loss_scale_window", "fp16.hysteresis",
        "fp16.min_loss_scale", "bf16.enabled",
        "zero_optimization.reduce_bucket_size", "zero_optimization.allgather_bucket_size",
        "zero_optimization.overlap_comm", "zero_optimization.stage3_prefetch_bucket_size",
        "zero_optimization.stage3_param_persistence_threshold", "zero_optimization.offload_optimizer.pin_memory",
        "zero_optimization.offload_param.pin_memory",
    }
)  # fmt: skip
"""Addresses where the JSON may say "auto"."""


def _clashes(given: Mapping[str, Any], facts: Facts) -> Iterable[Problem]:
    """Values of the JSON that are not the run's, each with where the run's comes from."""
    product = f"{facts.micro_batch} x {facts.accumulation} x {facts.world}"
    origin = {
        "train_batch_size": f"{product}: micro-batch, accumulation, ranks",
        "train_micro_batch_size_per_gpu": "a packed micro-batch counts as one; tokens_per_batch sets its size",
        "gradient_accumulation_steps": "stages.NAME.accumulation",
        "gradient_clipping": "stages.NAME.optim.clip_norm",
        "bf16.enabled": f"precision {facts.precision}",
        "fp16.enabled": f"precision {facts.precision}",
    }
    for address, own in _decided(facts).items():
        if given.get(address, own) != own:
            why = origin.get(address, f"loss_scale.{address.removeprefix('fp16.')}")
            clash = f"is {_shown(given[address])}, but the run has {_shown(own)} ({why})"
            yield Problem(address, f'{clash}; write "auto" to follow the run')


def _not_the_only_value(given: Mapping[str, Any]) -> Iterable[Problem]:
    for address, (only, why) in FIXED.items():
        if given.get(address, only) != only:
            yield Problem(address, f"is {_shown(given[address])}, but must be {_shown(only)}: {why}")


def _both_precisions(given: Mapping[str, Any]) -> Iterable[Problem]:
    if given.get("fp16.enabled") is True and given.get("bf16.enabled") is True:
        yield Problem("bf16.enabled", 'fp16 and bf16 are both true; a run has one precision, write "auto" in both')


def _impossible(given: Mapping[str, Any], facts: Facts) -> Iterable[Problem]:
    """What DeepSpeed would meet with a traceback, or would get wrong in silence."""
    stage = given.get("zero_optimization.stage", 0)
    if stage == 0 and facts.precision == "fp16":
        yield Problem(
            "zero_optimization.stage",
            "is 0, where DeepSpeed 0.19 divides fp16 gradients by a loss scale it never applied (its issue 8393); "
            "give stage 1 or more, or train in bf16 or fp32",
        )
    for name, lowest in (("offload_optimizer", 1), ("offload_param", 3)):
        if given.get(f"zero_optimization.{name}.device", "none") != "none" and stage < lowest:
            sentence = f"needs ZeRO stage {lowest} or more, and the stage is {stage}; remove it or raise the stage"
            yield Problem(f"zero_optimization.{name}", sentence)
    possible = {facts.precision} if stage == 0 else {facts.precision, "fp32"}
    accumulated = given.get("data_types.grad_accum_dtype", facts.precision)
    if accumulated not in possible:
        yield Problem(
            "data_types.grad_accum_dtype",
            f"is {accumulated}, but {facts.precision} at ZeRO stage {stage} adds gradients up in "
            f'{" or ".join(sorted(possible))}; write "auto"',
        )
    held = given.get("data_types.param_dtype", facts.precision)
    if held != facts.precision:
        yield Problem("data_types.param_dtype", f"is {held}, but the run trains in {facts.precision}; remove it")
