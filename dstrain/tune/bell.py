"""What the driver has to say to running trials: one actor that all of them listen to."""

from __future__ import annotations

import asyncio
from collections import defaultdict

BELL = "dstrain-bell"
"""The bell's name among the actors of its Ray job."""


class Bell:
    """Rings once for all when the search is asked to stop, and for one trial when Tune is done with it."""

    def __init__(self) -> None:
        self._rung = asyncio.Event()
        self._dismissed: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)

    async def ring(self) -> None:
        """The search is asked to stop."""
        self._rung.set()

    async def rung(self) -> None:
        """Returns once it has rung for all."""
        await self._rung.wait()

    async def begin(self, trial: str) -> bool:
        """A trial starts listening; whether it may start at all. What still listens for an earlier start has its answer."""
        self._dismissed[trial].set()
        self._dismissed[trial] = asyncio.Event()
        return not self._rung.is_set()

    async def dismiss(self, trial: str) -> None:
        """Tune is done with this trial: it was stopped, paused, has finished or failed."""
        self._dismissed[trial].set()

    async def dismissed(self, trial: str) -> None:
        """Returns once it has rung for this trial."""
        await self._dismissed[trial].wait()
