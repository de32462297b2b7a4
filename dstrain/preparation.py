"""What trials share is made once, before they start together and wait for each other: vocabulary and tokenised text."""

from __future__ import annotations

from dstrain.engine import Ranks
from dstrain.precision import choose
from dstrain.run import Say, make_ready, run_vocabulary
from dstrain.search import Search
from dstrain.settings import RunSettings


def prepare(search: Search, ranks: int, gpu: bool, say: Say) -> None:
    """Makes what the trials of a search need, in sight.

    `ranks` are the processes of a trial, `gpu` whether they have GPUs. Raises UserError with what is wrong with a trial's
    text, labels, DeepSpeed JSON or starting weights.
    """
    import torch

    place = Ranks(0, ranks, torch.device("cuda" if gpu else "cpu"), "search")
    runs = [candidate.settings for candidate in search.candidates] or [search.base]
    seen: set[str] = set()
    noted: set[str] = set()
    for settings in runs:
        if (key := _needs(settings)) in seen:
            continue
        seen.add(key)
        precision = choose(settings.precision, place.device)
        for stage in make_ready(settings, run_vocabulary(settings, say), precision, place, say).values():
            for note in stage.corpus.notes:
                if note not in noted:
                    noted.add(note)
                    say(note)


def _needs(settings: RunSettings) -> str:
    """Equal for trials that need the same text, cut the same way, for the same stages and DeepSpeed JSON."""
    stages = [
        (
            name,
            stage.corpus,
            stage.max_length,
            stage.tokens_per_batch,
            stage.accumulation,
            stage.starts_from,
            stage.objective.kind,
        )
        for name, stage in settings.stages.items()
    ]
    return repr((settings.vocabulary, settings.precision, settings.deepspeed, stages))
