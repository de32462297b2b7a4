"""What a search runs next. Knows nothing of Ray: the driver asks for work whenever it has room."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from dstrain.rungs import Promotions, Rungs
from dstrain.search import Candidate, Search

Propose = Callable[[], "Candidate | None"]
"""A learning sampler's next trial; None when it has nothing new."""


class Agenda:
    """Who starts next: new trials, then whoever waits on a rung and has earned it, and at last the finalists.

    `fits` is asked how many trials fit at once, which may change while nodes come and go; `dismiss` is told who has
    waited on a rung in vain, and why.
    """

    def __init__(
        self, search: Search, rungs: Rungs, fits: Callable[[], int], dismiss: Callable[[Candidate, str], None],
        trials: Iterable[Candidate], propose: Propose | None = None,
    ) -> None:  # fmt: skip
        """`trials` are the known ones still to be run; a sampler's come on top."""
        self._search, self._rungs, self._fits, self._dismiss, self._propose = search, rungs, fits, dismiss, propose
        unended = list(trials)
        waits = rungs.waits if isinstance(rungs, Promotions) else lambda trial_id: False
        self._waiting = {candidate.id: candidate for candidate in unended if waits(candidate.id)}
        self._new = deque(candidate for candidate in unended if candidate.id not in self._waiting)
        self._finals: deque[Candidate] | None = None
        self._running: set[str] = set()
        self._closed = False

    @property
    def finalists(self) -> bool:
        """Whether the finalists' turn has come: nothing of theirs is stopped early."""
        return self._finals is not None

    def next(self) -> Candidate | None:
        """The trial to start now, which then counts as running; None while there is no room or nothing to do."""
        if self._closed or len(self._running) >= self._fits():
            return None
        candidate = self._unseen() or self._promoted() or self._last_chance() or self._final()
        if candidate is not None:
            self._running.add(candidate.id)
        return candidate

    def returned(self, candidate: Candidate, waits: bool = False) -> None:
        """A trial has given its processes back; it has ended, or waits on a rung."""
        self._running.discard(candidate.id)
        if waits:
            self._waiting[candidate.id] = candidate

    def again(self, candidate: Candidate) -> None:
        """A trial lost its processes through no fault of its own: it is the next to start."""
        self._running.discard(candidate.id)
        (self._new if self._finals is None else self._finals).appendleft(candidate)

    def close(self) -> None:
        """Nothing starts any more."""
        self._closed = True

    def is_over(self) -> bool:
        """Whether nothing runs and nothing will."""
        return not self._running and (self._closed or (self._finals is not None and not self._finals))

    def _promoted(self, last_chance: bool = False) -> Candidate | None:
        if not isinstance(self._rungs, Promotions):
            return None
        name = self._rungs.promote(self._waiting, last_chance)
        return self._waiting.pop(name) if name is not None else None

    def _unseen(self) -> Candidate | None:
        if self._new:
            return self._new.popleft()
        if self._propose is None or len(self._search.candidates) >= self._search.expected:
            return None
        candidate = self._propose()
        self._search.exhausted = candidate is None
        return candidate

    def _last_chance(self) -> Candidate | None:
        return None if self._running else self._promoted(last_chance=True)

    def _final(self) -> Candidate | None:
        if self._finals is None:
            if self._running:
                return None
            for candidate in self._waiting.values():
                assert isinstance(self._rungs, Promotions)
                self._dismiss(candidate, self._rungs.why_not(candidate.id))
            self._waiting.clear()
            self._finals = deque(self._search.choose_finalists())
        return self._finals.popleft() if self._finals else None
