"""A run that goes on with another number of ranks takes the same steps, or says with how many it can."""

from __future__ import annotations

import pytest

from dstrain.regroup import regrouped
from dstrain.schema import UserError, validate
from dstrain.settings import RunSettings


def settings_of(**accumulation: int) -> RunSettings:
    stages = {
        name: {"objective": {"kind": "classify"}, "corpus": {"path": "x"}, "accumulation": number}
        for name, number in accumulation.items()
    }
    return validate(RunSettings, {"name": "run", "encoder": {"preset": "bert_tiny"}, "stages": stages}, "test")


@pytest.mark.parametrize(
    ("began_with", "world", "unfinished", "wanted"),
    [
        (2, 1, ["first", "second"], {"first": 2, "second": 6}),
        (2, 2, ["first", "second"], {"first": 1, "second": 3}),
        (4, 6, ["second"], {"first": 1, "second": 2}),
        (1, 3, ["second"], {"first": 1, "second": 1}),  # what is finished need not be shared out
        (6, 3, [], {"first": 1, "second": 3}),
    ],
)
def test_ranks_times_accumulation_stays(
    began_with: int, world: int, unfinished: list[str], wanted: dict[str, int]
) -> None:
    settings = settings_of(first=1, second=3)
    found = regrouped(settings, began_with, world, unfinished)
    assert {name: stage.accumulation for name, stage in found.stages.items()} == wanted
    assert found.model_copy(update={"stages": settings.stages}) == settings


def test_what_cannot_be_shared_out_names_what_can() -> None:
    with pytest.raises(UserError) as error:
        regrouped(settings_of(first=1, second=2), 4, 3, ["first", "second"])
    assert str(error.value) == (
        "runs/run: was begun by 4 rank(s), and 3 cannot share out the micro-batches of its steps evenly "
        "(first: 4, second: 8); start it with 1 or 2 or 4 of them"
    )
