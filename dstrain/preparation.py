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

Records = dict[str, TextRecord]
"""Records of the texts of a search, by what makes them what they are."""


def prepare(search: Search, ranks: int, gpu: bool, say: Say, accept_changed_data: bool = False) -> Records:
    """Makes what the trials of a search need, in sight, and returns records of their text, to be kept with `remember`.

    `ranks` are the processes of a trial, `gpu` whether they have GPUs. Raises UserError with what is wrong with a trial's
    text, labels, DeepSpeed JSON or starting weights, and for text that has changed since earlier trials read it, unless
    that is accepted: trials on other text compare with nothing.
    """
    import torch

    place = Ranks(0, ranks, torch.device("cuda" if gpu else "cpu"), "search")
    records, over = _remembered(search), search.is_over()
    before = dict(records)
    said: set[str] = set()
    seen: set[str] = set()

    def say_once(sentence: str) -> None:
        if sentence not in said:
            said.add(sentence)
            say(sentence)

    for settings in [candidate.settings for candidate in search.candidates] or [search.base]:
        if (needs := _needs(settings)) in seen:
            continue
        seen.add(needs)
        precision = choose(settings.precision, place.device)
        ready = make_ready(settings, run_vocabulary(settings, say), precision, place, say)
        for stage in ready.values():
            for note in stage.corpus.notes:
                say_once(note)
        now = {name: TextRecord.of(stage.corpus) for name, stage in ready.items()}
        known, accepted = texts_of(before, settings), now if accept_changed_data else ()
        kept = keep_or_refuse(known, now, () if over else now, accepted, say_once, "give the search another name=...")
        records |= {_key(settings, name): kept[name] for name in now}
    return records


def remember(search: Search, records: Records) -> None:
    """Keeps the records in the search's folder."""
    write_whole(search.folder / TEXTS_FILE, json.dumps({key: plain(text) for key, text in records.items()}, indent=1))


def texts_of(records: Records, settings: RunSettings) -> dict[str, TextRecord]:
    """What is recorded of the text of a trial's stages, by their names."""
    keys = {name: _key(settings, name) for name in settings.stages}
    return {name: records[key] for name, key in keys.items() if key in records}


def _remembered(search: Search) -> Records:
    file = search.folder / TEXTS_FILE
    found = read_record(file) if file.exists() else {}
    return {key: validate(TextRecord, tree, str(file), f"{key}.") for key, tree in found.items()}


def _key(settings: RunSettings, stage: str) -> str:
    """Equal for stages that read the same text with the same words, which those of the first stage decide."""
    first = next(iter(settings.stages.values()))
    wanted = repr((settings.vocabulary, first.corpus, settings.stages[stage].corpus))
    return f"{stage}-{hashlib.blake2b(wanted.encode(), digest_size=8).hexdigest()}"


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
