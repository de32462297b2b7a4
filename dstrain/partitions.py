"""ZeRO's partitions put together again: each parameter's fp32 value, AdamW's moments and step count, by name.

DeepSpeed's universal checkpoint in memory: what a stage's ranks wrote as flat shares becomes one `Whole` a parameter, which
fits any number of ranks. DeepSpeed's own converter reads pickle without an allow-list and writes the model to disk again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

MASTER = "fp32"
"""The optimizer's copy of a parameter, among its states such as exp_avg and exp_avg_sq."""


@dataclass
class Whole:
    """A parameter as the optimizer sees it."""

    states: dict[str, Tensor] = field(default_factory=dict)
    """MASTER, exp_avg, exp_avg_sq: each of the parameter's shape, in fp32."""
    counts: dict[str, Any] = field(default_factory=dict)
    """What there is once for all elements: AdamW's step."""


class _Share(NamedTuple):
    """A rank's part of a parameter."""

    name: str
    states: dict[str, Tensor]
    counts: dict[str, Any]


def files_by_rank(folder: Path, pattern: str) -> dict[int, Path]:
    """DeepSpeed's files of a kind, in the order of the ranks that wrote them."""
    found = {}
    for file in folder.glob(pattern):
        rank = re.search(r"zero_pp_rank_(\d+)_", file.name)
        found[int(rank[1]) if rank else 0] = file
    return dict(sorted(found.items()))


def put_together(
    model: Mapping[str, Any], optimizers: Sequence[Mapping[str, Any]], moments: bool = True
) -> dict[str, Whole]:
    """Every parameter whole, on request without its moments.

    `model` is DeepSpeed's file of rank 0, `optimizers` the states of ranks 0, 1, ... of ZeRO 1 to 3.
    """
    shapes = {name: shape for group in model["param_shapes"] for name, shape in group.items()}
    shares: dict[str, list[_Share]] = {name: [] for name in shapes}
    for state in optimizers:
        inner = state.get("optimizer_state_dict") or state.get("base_optimizer_state")
        vectors = inner["state"] if inner and moments else {}
        three = "fp32_flat_groups" in state
        for share in _of_stage_3(state, vectors, shapes) if three else _of_stage_1_or_2(state, vectors):
            shares[share.name].append(share)
    missing = [name for name, found in shares.items() if not found]
    if missing:
        raise ValueError(f"no rank holds {missing[0]}")
    return {name: _joined(shares[name], shape) for name, shape in shapes.items()}


def _joined(shares: Sequence[_Share], shape: torch.Size) -> Whole:
    states = {
        key: torch.cat([share.states[key] for share in shares])[: shape.numel()].view(shape) for key in shares[0].states
    }
    return Whole(states, shares[0].counts)


def _of_stage_1_or_2(state: Mapping[str, Any], moments: Mapping[int, Any]) -> Iterator[_Share]:
    """A rank holds one flat piece of each group, and a map of which parameters (or parts of them) lie in it."""
    flats = zip(state["single_partition_of_fp32_groups"], state["param_slice_mappings"], strict=True)
    for number, (flat, places) in enumerate(flats):
        for name, place in places.items():
            yield _share(name, flat, moments.get(number, {}), place.start, place.numel)


def _of_stage_3(
    state: Mapping[str, Any], moments: Mapping[int, Any], shapes: Mapping[str, torch.Size]
) -> Iterator[_Share]:
    """A rank holds an equal share of every parameter, in order; the last rank's share is padded."""
    names = iter(shapes)
    for number, flat in enumerate(state["fp32_flat_groups"]):
        begin = 0
        while begin < flat.numel():
            name = next(names)
            length = math.ceil(shapes[name].numel() / int(state["partition_count"]))
            yield _share(name, flat, moments.get(number, {}), begin, length)
            begin += length


def _share(name: str, flat: Tensor, moments: Mapping[str, Any], begin: int, length: int) -> _Share:
    """Moments lie in flat tensors as the weights do; what is no vector counts for all of them."""
    vectors = {key: value for key, value in moments.items() if isinstance(value, Tensor) and value.ndim}
    states = {key: value[begin : begin + length] for key, value in {MASTER: flat, **vectors}.items()}
    return _Share(name, states, {key: value for key, value in moments.items() if key not in vectors})
