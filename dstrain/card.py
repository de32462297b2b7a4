"""The model card of an export, made from the evidence of its run: no host, no path, and no text of any corpus."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dstrain.consolidate import Source, Which
from dstrain.loop import Progress
from dstrain.metrics import scores
from dstrain.readings import amount, duration, number
from dstrain.schema import dump_yaml
from dstrain.settings import plain
from dstrain.texts import TextRecord

SAYS: Mapping[Which, str] = {"best": "best weights", "last": "weights of the last checkpoint"}


@dataclass(frozen=True)
class Judged:
    """Classes of the test documents, and what the model takes them for: (D) int64 each."""

    truth_D: np.ndarray
    guess_D: np.ndarray
    num_classes: int

    def figures(self) -> dict[str, float]:
        """Accuracy and macro averages."""
        return scores(self.truth_D, self.guess_D, self.num_classes)


@dataclass(frozen=True)
class Facts:
    """All that a card is made from."""

    source: Source
    progress: Progress
    """Where training stood when the weights were taken."""
    texts: Mapping[str, TextRecord | None]
    """By stage, this one's last; None where neither the run nor this machine knows any more."""
    environment: Mapping[str, Any]
    """What environment.txt of the run says."""
    parameters: int
    difference: float
    """Largest |dlogit| between the export and the run's own model."""
    judged: Judged | None = None
    """The test documents, judged again with these weights."""

    @property
    def text(self) -> TextRecord | None:
        """Of the stage itself."""
        return self.texts[self.source.name]


def card(facts: Facts) -> str:
    """Markdown, with the front matter that model hubs read."""
    sections = (_what, _figures, _training, _data, _environment, _limits)
    return "\n".join(line for section in sections for line in (*section(facts), ""))


def _what(facts: Facts) -> list[str]:
    source, settings = facts.source, facts.source.settings
    encoder, classifies = settings.encoder, source.stage.objective.kind == "classify"
    names = facts.text.label_names if facts.text else ()
    purpose = f"Tells {len(names)} classes apart: {', '.join(names)}." if classifies else "Finds the words at `[MASK]`."
    front = {"library_name": "dstrain", "pipeline_tag": "text-classification" if classifies else "fill-mask"}
    unfinished = [] if source.name in source.done else ["**The stage had not finished when this was exported.**", ""]
    return [
        "---", dump_yaml(front).rstrip(), "---", "", f"# {settings.name}: {source.name}", "", *unfinished,
        f"{purpose} A {encoder.num_layers}-layer encoder of width {encoder.hidden_size} with {encoder.num_heads} heads, "
        f"attention `{encoder.attention.kind}`, positions `{encoder.positions.kind}`; {facts.parameters:,} "
        f"parameters, {source.stage.max_length} tokens at most. {SAYS[source.which].capitalize()}, step "
        f"{facts.progress.step}; trained with dstrain, seed {settings.seed}.", "",
        "```", "python -m dstrain.predict THIS_FOLDER texts.txt        # one document per line", "```", "",
        f"On random words the logits of this export differ by at most {facts.difference:.2g} from those of the run's "
        "own model (fp32, CPU). Weights are safetensors; no file here is a pickle.",
    ]  # fmt: skip


# ----------------------------------------------------------------------------------------------------- figures


def _figures(facts: Facts) -> list[str]:
    """Validation at the step of these weights, and the test figures where they are of these weights."""
    metric, mode = facts.source.stage.selection
    valid, test = _valid(facts), _test(facts)
    remarks = []
    if facts.source.which == "best" and valid:
        remarks.append(f"The weights were chosen by valid {metric} ({mode}), so the valid figures flatter.")
    if not test:
        remarks.append("The test split was not read with these weights.")
    if facts.judged is not None:
        again = ", ".join(f"{name} {number(value)}" for name, value in facts.judged.figures().items())
        remarks.append(f"Read again with this export: {again}. Test intervals: bootstrap over documents, 1000 draws.")
    remarks.append("An interval covers which documents were drawn, not another seed's training.")
    if most := _classes(facts, "test"):
        remarks.append(f"Always saying the most frequent class has a test accuracy of {max(most) / sum(most):.3f}.")
    table = ["| split | figure | value | 95 % interval |", "|---|---|---|---|"]
    for split, values in (("valid", valid), ("test", test)):
        intervals = _intervals(facts, split, values)
        for name, value in values.items():
            low_high = " to ".join(f"{end:.3f}" for end in intervals.get(name, ()))
            table.append(f"| {split} | {name} | {number(value)} | {low_high} |")
    return ["## Figures", "", *table, "", *remarks]


def _valid(facts: Facts) -> Mapping[str, float]:
    for reading in facts.source.readings:
        if (reading.split, reading.step) == ("valid", facts.progress.step):
            return reading.values
    return {}


def _test(facts: Facts) -> Mapping[str, float]:
    """The run reads the test split once, with the best weights of its last stage."""
    if facts.source.which == "best":
        for reading in facts.source.readings:
            if reading.split == "test":
                return reading.values
    return facts.judged.figures() if facts.judged is not None else {}


def _intervals(facts: Facts, split: str, values: Mapping[str, float]) -> Mapping[str, tuple[float, float]]:
    """Bootstrap where the test documents were judged again, Wilson's for an accuracy over documents, else none."""
    if split == "test" and facts.judged is not None:
        return bootstrap(facts.judged)
    count, accuracy = sum(_classes(facts, split)), values.get("accuracy", math.nan)
    return {"accuracy": wilson(accuracy, count)} if count and 0 <= accuracy <= 1 else {}


def _classes(facts: Facts, split: str) -> tuple[int, ...]:
    """Documents of each class in a split; empty where nothing was classified."""
    if facts.source.stage.objective.kind != "classify" or facts.text is None or split not in facts.text.splits:
        return ()
    return facts.text.splits[split].classes


def wilson(share: float, count: int) -> tuple[float, float]:
    """95 % interval of a share seen in `count` trials (Wilson 1927)."""
    z2 = 1.959964**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = math.sqrt(z2 * (share * (1 - share) / count + z2 / (4 * count**2))) / (1 + z2 / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(judged: Judged, draws: int = 1000) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals of the scores over documents drawn with replacement; the same numbers every time."""
    random = np.random.default_rng(0)
    count = len(judged.truth_D)
    drawn = (random.integers(0, count, count) for _ in range(draws))
    table = [scores(judged.truth_D[rows], judged.guess_D[rows], judged.num_classes) for rows in drawn]
    ends = {name: np.percentile([row[name] for row in table], [2.5, 97.5]) for name in table[0]}
    return {name: (float(low), float(high)) for name, (low, high) in ends.items()}


# ---------------------------------------------------------------------------------------------- where it is from


def _training(facts: Facts) -> list[str]:
    source = facts.source
    table = ["| stage | objective | starts from | steps | tokens read | time | ended |", "|---|---|---|---|---|---|---|"]
    for name in source.path:
        stage, done = source.settings.stages[name], source.done.get(name)
        ended = done.stopped if done else "not finished"
        if name == source.name and (done is None or source.which == "last"):
            done, ended = facts.progress, "these weights were taken here"
        if done is not None:
            table.append(
                f"| {name} | {stage.objective.kind} | {_short(stage.starts_from)} | {done.step:,} "
                f"| {amount(done.tokens)} | {duration(done.seconds)} | {ended} |"
            )
    settings = dict(plain(source.settings))
    for whose in ("output_dir", "tracking", "deepspeed", "loss_scale"):
        settings.pop(whose)
    return [
        "## Training", "", *table, "",
        "<details><summary>Settings</summary>", "", "```yaml", dump_yaml(_without_paths(settings)).rstrip(), "```", "",
        "</details>",
    ]  # fmt: skip


def _short(name: str) -> str:
    """The last part of a path: where somebody keeps a file is not the reader's business."""
    return Path(name).name or name


def _without_paths(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {
            key: _short(value) if key in ("path", "starts_from") and isinstance(value, str) else _without_paths(value)
            for key, value in tree.items()
        }
    return tree


def _data(facts: Facts) -> list[str]:
    return ["## Data", "", *(line for name, text in facts.texts.items() for line in _text(name, text))]


def _text(name: str, text: TextRecord | None) -> Iterator[str]:
    if text is None:
        yield f"- **{name}**: its text was not at hand when this card was written"
        return
    counts = (
        f"{split} {part.documents:,} documents, {amount(part.tokens)} tokens" for split, part in text.splits.items()
    )
    yield f"- **{name}**: {_short(text.title)}: {'; '.join(counts)}; fingerprint `{text.fingerprint}`"
    yield from (f"  - {bare(note)}" for note in text.notes)


def bare(note: str) -> str:
    """A note about a corpus without what it quotes from it: bad rows one by one, headers, labels."""
    note = re.split(r": (?:line|row) \d+:| among ", note, maxsplit=1)[0]
    return " ".join(re.sub(r"\"[^\"]*\"|'[^']*'", "...", note).split())


def _environment(facts: Facts) -> list[str]:
    """Code, machine and packages of the run: no host name, command line or variable, which are its owner's."""
    found = facts.environment
    parts = (found.get(key) for key in ("code", "machine", "packages"))
    code, machine, packages = (part if isinstance(part, dict) else {} for part in parts)
    kept = ("torch", "deepspeed", "tokenizers", "numpy", "safetensors")
    said = {
        "precision": facts.source.settings.precision,
        "device": f"{found.get('device', 'unknown')}, {found.get('world_size', 'unknown number of')} ranks",
        "code": f"{code.get('commit', 'unknown')}{' with changes' if code.get('dirty') else ''}",
        "python": machine.get("python", "unknown"),
        "packages": ", ".join(f"{name} {packages[name]}" for name in kept if name in packages) or "unknown",
        "cpu": machine.get("cpu", "unknown"),
    }
    return ["## Environment", "", *(f"- {name}: {value}" for name, value in said.items())]


def _limits(facts: Facts) -> list[str]:
    stage, count = facts.source.stage, sum(_classes(facts, "test"))
    longer = "is read in windows that vote" if stage.corpus.long_documents == "window" else "is cut"
    few = f"- {count} test documents: an accuracy is known to within {98 / math.sqrt(count or 1):.0f} points."
    return [
        "## Limits", "",
        f"- Text beyond {stage.max_length} tokens {longer}. Text unlike the training text gets an answer too.",
        "- Probabilities are a softmax and were not calibrated. One seed was trained for this card.",
        "- Nothing was measured about fairness, safety, other languages or other kinds of text: measure before use.",
        "- Weights and vocabulary derive from the data above, whose licences say who may have and use them. This card "
        "quotes none of their text; tokenizer.json holds pieces of their words.",
        *([few] if 0 < count < 1000 else []),
    ]  # fmt: skip
