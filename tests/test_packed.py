"""Where each document lies in a packed micro-batch, against the plainest way to say it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dstrain.packed import Batch, Sequences

lengths_of = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@given(lengths_of)
def test_every_token_knows_its_document_and_place(lengths: list[int]) -> None:
    sequences = Sequences.of(lengths)
    tokens = [(number, place) for number, length in enumerate(lengths) for place in range(length)]
    assert sequences.tokens == len(tokens)
    assert sequences.longest == max(lengths)
    assert list(zip(sequences.document_T.tolist(), sequences.position_T.tolist(), strict=True)) == tokens
    assert sequences.lengths_N.tolist() == lengths
    assert list(sequences.starts) == sequences.starts_N1.tolist() == [sum(lengths[:n]) for n in range(len(lengths) + 1)]


def test_types_are_what_kernels_take() -> None:
    sequences = Sequences.of(torch.tensor([3, 2]))
    assert sequences.lengths == (3, 2) and all(type(length) is int for length in sequences.lengths)
    assert sequences.starts_N1.dtype == torch.int32
    assert {tensor.dtype for tensor in (sequences.lengths_N, sequences.document_T, sequences.position_T)} == {
        torch.int64
    }
    assert sequences.starts_N1 is sequences.starts_N1, "made once per micro-batch"


def test_another_device_gets_its_own_tensors() -> None:
    here = Sequences.of([3, 2])
    there = here.to("meta")
    assert there.lengths == here.lengths
    assert there.starts_N1.device.type == there.position_T.device.type == "meta"
    assert here.starts_N1.device.type == "cpu"


def test_a_batch_moves_whole() -> None:
    batch = Batch(torch.arange(5), Sequences.of([3, 2]), torch.tensor([0, 1]), 2)
    moved = batch.to("meta")
    assert {moved.ids_T.device.type, moved.labels.device.type, moved.sequences.device.type} == {"meta"}
    assert moved.weight == 2 and moved.sequences.lengths == (3, 2)


def test_sequences_hold_still() -> None:
    with pytest.raises(AttributeError):
        Sequences.of([1]).lengths = (2,)  # type: ignore[misc]
