"""The same steps on another number of ranks: a run that goes on with fewer or more of them accumulates more or less.

A step is `ranks x accumulation` micro-batches, whose order and draws do not depend on who computes them. So a run that was
begun by 2 ranks with 1 micro-batch each goes on as 1 rank with 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from dstrain.schema import UserError
from dstrain.settings import RunSettings


def regrouped(settings: RunSettings, began_with: int, world: int, unfinished: Iterable[str]) -> RunSettings:
    """The settings with which `world` ranks take the steps of a run that `began_with` ranks began.

    Raises UserError when the micro-batches of a step can't be shared out evenly in every `unfinished` stage.
    """
    if world == began_with:
        return settings
    groups = {name: began_with * settings.stages[name].accumulation for name in unfinished}
    shared = math.gcd(*groups.values())
    if shared % world:
        fitting = [str(ranks) for ranks in range(1, shared + 1) if shared % ranks == 0]
        sizes = ", ".join(f"{name}: {group}" for name, group in groups.items())
        raise UserError(
            f"{settings.folder}: was begun by {began_with} rank(s), and {world} cannot share out the micro-batches "
            f"of its steps evenly ({sizes}); start it with {' or '.join(fitting)} of them"
        )
    stages = {
        name: stage.model_copy(update={"accumulation": groups[name] // world}) if name in groups else stage
        for name, stage in settings.stages.items()
    }
    return settings.model_copy(update={"stages": stages})
