"""Trials proposed by somebody who learns: Ray's Optuna search (TPE, Bergstra et al. 2011)."""

from __future__ import annotations

import time
from typing import Any

from ray import tune
from ray.tune.search.optuna import OptunaSearch

from dstrain.agenda import Propose
from dstrain.search import Candidate, Search

TRIES = 50
"""So often a sampler may propose what is known or not allowed before the space counts as exhausted."""


def learn(search: Search) -> Propose:
    """Ray's Optuna search (TPE), told of every result and asked for trials that differ from all before."""
    assert search.space is not None
    domains = {}
    for axis in search.space.axes:
        if axis.options:
            domains[axis.key] = tune.choice(list(range(len(axis.options))))
        elif axis.kind == "int_uniform":
            domains[axis.key] = tune.randint(int(axis.low), int(axis.high) + 1)
        else:
            domains[axis.key] = (tune.loguniform if axis.kind == "log_uniform" else tune.uniform)(axis.low, axis.high)
    optuna = OptunaSearch(space=domains, metric="value", mode=search.settings.mode, seed=search.settings.seed)
    asked: dict[str, str] = {}
    told: set[str] = set()

    def tell() -> None:
        for candidate in search.candidates:
            if candidate.id not in told and (ended := candidate.ended()):
                value = search.row(candidate).value
                if candidate.id in asked:
                    optuna.on_trial_complete(
                        asked[candidate.id], None if value is None else {"value": value}, error=value is None
                    )
                elif ended.state != "failed" and value is not None:
                    optuna.add_evaluated_point(search.words[candidate.id], value)
                else:
                    continue  # it failed in an earlier start, and is tried again
                told.add(candidate.id)

    def propose() -> Candidate | None:
        tell()
        for _ in range(TRIES):
            token = f"{len(search.candidates)}.{time.monotonic_ns()}"
            suggested: dict[str, Any] = optuna.suggest(token) or {}
            said = {key: _plain_number(value) for key, value in suggested.items()}
            candidate = search.adopt(said)
            if candidate is not None:
                asked[candidate.id] = token
                return candidate
            optuna.on_trial_complete(token, None, error=True)
        return None

    return propose


def _plain_number(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
