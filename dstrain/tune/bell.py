"""What the driver has to say to running trials: one actor that all of them listen to."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

BELL = "dstrain-bell"
"""The bell's name among the actors of its Ray job."""


class Bell:
    """Tells a trial what it is to do; rings once for all when the search is asked to stop, and for one when Tune is done
    with it.

    Tune knows a trial by its id alone: what it is told of one it copies many times and keeps until the search ends.
    """

    def __init__(self) -> None:
        self._rung = asyncio.Event()
        self._plans: dict[str, Mapping[str, Any]] = {}
        self._dismissed: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)

    async def ring(self) -> None:
        """The search is asked to stop."""
        self._rung.set()

    async def rung(self) -> None:
        """Returns once it has rung for all."""
        await self._rung.wait()

    async def expect(self, trial: str, plan: Mapping[str, Any]) -> None:
        """A trial is going to start, to do what the plan says."""
        self._plans[trial] = plan

    async def begin(self, trial: str) -> Mapping[str, Any] | None:
        """A trial starts listening; its plan, or None where it is not to start (any more). What still listens for an earlier
        start has its answer."""
        self._dismissed[trial].set()
        self._dismissed[trial] = asyncio.Event()
        return None if self._rung.is_set() else self._plans.get(trial)

    async def dismiss(self, trial: str, for_good: bool) -> None:
        """Tune is done with this trial: it was paused, or (`for_good`) was stopped, has finished or failed."""
        self._dismissed[trial].set()
        if for_good:
            self._plans.pop(trial, None)

    async def dismissed(self, trial: str) -> None:
        """Returns once it has rung for this trial."""
        await self._dismissed[trial].wait()
