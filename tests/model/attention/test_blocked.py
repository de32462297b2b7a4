"""What the blocked kernels share, where no kernel shows it: devices that are not here, and memory that is kept."""

from __future__ import annotations

import pytest
import torch

from dstrain.model.attention.blocked import equal_length_runs, multiplies_bf16, product_dtype, scratch, tiles
from dstrain.packed import Sequences

CPU, ELSEWHERE = torch.device("cpu"), torch.device("meta")


def test_adjacent_documents_of_equal_length_are_one_run():
    runs = list(equal_length_runs(Sequences.of([5, 5, 1, 12, 5])))
    assert runs == [(0, 2, 5), (10, 1, 1), (11, 1, 12), (23, 1, 5)]


def test_a_tile_holds_as_many_documents_of_a_run_as_have_so_many_rows():
    cut = list(tiles(Sequences.of([5, 5, 5, 40]), rows=12))
    assert cut == [(0, 2, 5), (10, 1, 5), (15, 1, 40)]


def test_only_a_cpu_keeps_its_scratch_memory():
    kept = scratch("a test", (4, 6), torch.float32, CPU)
    again = scratch("a test", (2, 3), torch.float32, CPU)
    assert again.shape == (2, 3) and again.data_ptr() == kept.data_ptr()
    larger = scratch("a test", (5, 7), torch.float32, CPU)
    assert larger.shape == (5, 7) and scratch("a test", (5, 7), torch.float32, CPU).data_ptr() == larger.data_ptr()
    fresh = scratch("a test", (2, 3), torch.float32, ELSEWHERE)
    assert fresh.shape == (2, 3) and fresh.device == ELSEWHERE


@pytest.mark.parametrize("has_instructions", [True, False])
def test_bf16_is_multiplied_as_such_only_where_the_hardware_does_it(monkeypatch, has_instructions):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_instructions)
    assert multiplies_bf16(CPU) is has_instructions and multiplies_bf16(torch.device("cuda")) is True
    x = torch.zeros(1, dtype=torch.bfloat16)
    assert product_dtype(x) == (torch.bfloat16 if has_instructions else torch.float32)
    assert product_dtype(x.half()) == torch.float32 and product_dtype(x.double()) == torch.float64
