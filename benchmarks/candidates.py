"""What an attention benchmark runs: one forward and backward pass of a kernel, ours or a peer's, on a packed input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from benchmarks.measure import Footprint, footprint
from benchmarks.peers import Peer, peers_of
from dstrain.model.attention import AttentionSettings
from dstrain.packed import Sequences
from dstrain.schema import Settings, UserError, parse_yaml, validate

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WARM_LENGTH = 256
"""Tokens of the step that loads libraries on a CPU before memory is measured."""


@dataclass(frozen=True)
class Workload:
    """The documents, equally long, and where and how they are attended."""

    length: int
    documents: int
    num_heads: int
    head_dim: int
    dtype: str
    device: str


@dataclass(frozen=True)
class Candidate:
    """A kind of attention with its settings, or a peer that is given the same settings."""

    settings: AttentionSettings
    peer: type[Peer] | None = None

    @property
    def kind(self) -> str:
        """`favor`, or the peer's name."""
        return self.peer.name if self.peer else self.settings.kind

    @property
    def name(self) -> str:
        """The kind and what is not its default, as `--kinds` takes it."""
        changed = self.settings.model_dump(exclude_defaults=True, exclude={"kind"})
        return ":".join(
            [self.kind, *([",".join(f"{key}={value}" for key, value in changed.items())] if changed else [])]
        )

    def build(self, load: Workload) -> nn.Module:
        """The kernel, on the workload's device."""
        module: nn.Module
        if self.peer:
            module = self.peer(self.settings, load.num_heads, load.head_dim, load.length)
        else:
            module = self.settings.build(load.num_heads, load.head_dim, 0, 0)
        return module.to(load.device)


class _Kind(Settings):
    attention: AttentionSettings


def read_candidate(text: str) -> Candidate:
    """`favor` or `lsh:num_hashes=4,chunk_size=64` as a candidate. Raises UserError."""
    source = f"--kinds {text}"
    kind, _, changed = text.partition(":")
    tree: dict[str, Any] = {"kind": kind}
    for word in filter(None, changed.split(",")):
        key, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"{source}: {word!r} is no setting=value; write it as in lsh:num_hashes=4,chunk_size=64")
        tree[key] = parse_yaml(value, source)
    return Candidate(validate(_Kind, {"attention": tree}, source).attention)


def with_peers(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates, and behind them the peers of each."""
    return [*candidates, *(Candidate(own.settings, peer) for own in candidates for peer in peers_of(own.settings))]


class AttentionStep:
    """Forward and backward of a kernel alone. q, k and v lie side by side in one tensor (T, 3 H D), as a fused projection
    leaves them, (T, 2 H D) where keys are queries; their gradients are what the kernel returns."""

    def __init__(self, candidate: Candidate, load: Workload) -> None:
        rng = torch.Generator().manual_seed(load.length)
        self.sequences = Sequences.of([load.length] * load.documents, load.device)
        self.heads_shape = (load.num_heads, load.head_dim)
        self.parts = 2 if candidate.settings.tied_qk else 3
        width = load.num_heads * load.head_dim

        def draw(columns: int) -> torch.Tensor:
            drawn = torch.empty(self.sequences.tokens, columns, dtype=DTYPES[load.dtype])
            return drawn.normal_(generator=rng).to(load.device)

        self.packed = draw(self.parts * width)
        self.gradient = draw(width).unflatten(-1, self.heads_shape)
        self.module = candidate.build(load)

    def __call__(self) -> tuple[torch.Tensor, ...]:
        parts = [x.unflatten(-1, self.heads_shape).requires_grad_() for x in self.packed.chunk(self.parts, -1)]
        out_THD = self.module(parts[0], parts[-2], parts[-1], self.sequences)
        return torch.autograd.grad(out_THD, parts, self.gradient)

    @property
    def kernel(self) -> str:
        """What ran, as the kernel says it."""
        return str(self.module.kernel)


def attention_footprint(candidate: Candidate, load: Workload, threads: int) -> Footprint:
    """The memory of one step; on a CPU to be called in a process of its own."""
    torch.set_num_threads(threads)
    on_gpu = load.device == "cuda"  # a GPU's kernels are compiled for a length, and its memory is counted by the byte
    warm = load if on_gpu else replace(load, length=WARM_LENGTH, documents=1)
    return footprint(
        lambda: AttentionStep(candidate, warm), lambda: AttentionStep(candidate, load), torch.device(load.device)
    )
