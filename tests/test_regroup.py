"""A run that goes on with another number of ranks takes the same steps."""

from __future__ import annotations

import pytest

from dstrain.regroup import regrouped
from dstrain.schema import validate
from dstrain.settings import RunSettings


def settings_of(**accumulation: int) -> RunSettings:
    stages = {
        name: {"objective": {"kind": "classify"}, "corpus": {"path": "x"}, "accumulation": number}
        for name, number in accumulation.items()
    }
    return validate(RunSettings, {"name": "run", "encoder": {"preset": "bert_tiny"}, "stages": stages}, "test")


@pytest.mark.parametrize(
    ("began_with", "world", "unfinished", "wanted", "cuts"),
    [
        (2, 1, ["first", "second"], {"first": 2, "second": 6}, {"first": 1, "second": 1}),
        (2, 2, ["first", "second"], {"first": 1, "second": 3}, {}),
        (4, 6, ["second"], {"first": 1, "second": 2}, {"second": 1}),
        (1, 3, ["second"], {"first": 1, "second": 1}, {"second": 1}),  # what is finished need not be shared out
        (6, 3, [], {"first": 1, "second": 3}, {}),
        (1, 2, ["first", "second"], {"first": 1, "second": 3}, {"first": 2, "second": 2}),
        (4, 6, ["first"], {"first": 2, "second": 3}, {"first": 3}),
    ],
)
def test_a_step_stays_what_it_was(
    began_with: int, world: int, unfinished: list[str], wanted: dict[str, int], cuts: dict[str, int]
) -> None:
    """Ranks x accumulation, counted in pieces of micro-batches, is what it was."""
    settings = settings_of(first=1, second=3)
    found, cut = regrouped(settings, began_with, world, unfinished)
    assert {name: stage.accumulation for name, stage in found.stages.items()} == wanted
    assert cut == cuts
    for name, pieces in cut.items():
        assert world * wanted[name] == began_with * settings.stages[name].accumulation * pieces
    assert found.model_copy(update={"stages": settings.stages}) == settings
