"""The same steps on another number of ranks: a run that goes on with fewer or more of them accumulates more or less.

A step is `ranks x accumulation` micro-batches, whose order and draws do not depend on who computes them. So a run that was
begun by 2 ranks with 1 micro-batch each goes on as 1 rank with 2; and where the ranks are too many to share the micro-batches
out evenly, each micro-batch is cut, and they share the pieces.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from dstrain.settings import RunSettings


def regrouped(
    settings: RunSettings, began_with: int, world: int, unfinished: Iterable[str]
) -> tuple[RunSettings, dict[str, int]]:
    """The settings with which `world` ranks take the steps of a run that `began_with` ranks began, and into how many pieces
    each `unfinished` stage then cuts its micro-batches: the fewest that can be shared out evenly."""
    stages, cuts = dict(settings.stages), {}
    for name in unfinished if world != began_with else ():
        group = began_with * stages[name].accumulation
        cuts[name] = world // math.gcd(group, world)
        stages[name] = stages[name].model_copy(update={"accumulation": group * cuts[name] // world})
    return settings.model_copy(update={"stages": stages}), cuts
