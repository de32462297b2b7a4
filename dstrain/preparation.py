"""What trials share is made once, before they start together and wait for each other: vocabulary and tokenised text."""

from __future__ import annotations

import hashlib
import json

from dstrain.engine import Ranks
from dstrain.precision import choose
from dstrain.run import Say, make_ready, read_record, run_vocabulary, write_whole
from dstrain.schema import validate
from dstrain.search import Search
from dstrain.settings import RunSettings, plain
from dstrain.texts import TEXTS_FILE, TextRecord, keep_or_refuse


def prepare(
    search: Search, ranks: int, gpu: bool, say: Say, accept_changed_data: bool = False
) -> dict[str, dict[str, TextRecord]]:
    """Makes what the trials of a search need, in sight, and returns a record of their text, to be kept with `remember`.

    `ranks` are the processes of a trial, `gpu` whether they have GPUs. Raises UserError with what is wrong with a trial's
    text, labels, DeepSpeed JSON or starting weights, and for text that has changed since earlier trials read it, unless
    that is accepted: trials on other text compare with nothing.
    """
    import torch

    place = Ranks(0, ranks, torch.device("cuda" if gpu else "cpu"), "search")
    before, texts = _remembered(search), {}
    noted: set[str] = set()
    for settings in [candidate.settings for candidate in search.candidates] or [search.base]:
        if (key := _needs(settings)) in texts:
            continue
        precision = choose(settings.precision, place.device)
        ready = make_ready(settings, run_vocabulary(settings, say), precision, place, say)
        for stage in ready.values():
            for note in stage.corpus.notes:
                if note not in noted:
                    noted.add(note)
                    say(note)
        now = {name: TextRecord.of(stage.corpus) for name, stage in ready.items()}
        to_be_read = [] if search.is_over() else [*now]
        start_over = "give the search another name=..."
        texts[key] = keep_or_refuse(before.get(key, {}), now, to_be_read, accept_changed_data, say, start_over)
    return texts


def remember(search: Search, texts: dict[str, dict[str, TextRecord]]) -> None:
    """Keeps the records in the search's folder."""
    tree = {key: {name: plain(text) for name, text in stages.items()} for key, stages in texts.items()}
    write_whole(search.folder / TEXTS_FILE, json.dumps(tree, indent=1))


def _remembered(search: Search) -> dict[str, dict[str, TextRecord]]:
    file = search.folder / TEXTS_FILE
    found = read_record(file) if file.exists() else {}
    return {
        key: {name: validate(TextRecord, tree, str(file), f"{key}.{name}.") for name, tree in stages.items()}
        for key, stages in found.items()
    }


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
    wanted = repr((settings.vocabulary, settings.precision, settings.deepspeed, stages))
    return hashlib.blake2b(wanted.encode(), digest_size=8).hexdigest()
