"""Door: makes ready, where there is internet, all the text that a run or a search will read where there is none, and shows
the documents of which a run speaks by their numbers.

    python -m dstrain.data prepare FILE.yaml [key=value ...]
    python -m dstrain.data show runs/NAME/settings.yaml STAGE NUMBER ...

A door lies above all layers, so this file may import what the rest of dstrain.data may not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dstrain.data.cache import Corpus
    from dstrain.loop import StageSettings
    from dstrain.readings import Say
    from dstrain.settings import Document, RunSettings

INTERRUPTED = 75
"""Exit status after Ctrl-C: the same command goes on."""

_EPILOG = """\
examples
  python -m dstrain.data prepare search_spaces/lsh.yaml --gpu
  python -m dstrain.data prepare my.yaml stages.finetune.corpus.path=my_data/
  python -m dstrain.data show runs/my-run/settings.yaml finetune 17 42

prepare downloads, trains vocabularies and tokenises into $DSTRAIN_CACHE (by default ~/.cache/dstrain), which the nodes must
see. What is there already is left as it is. Give the same FILE.yaml and key=value as the run will get.

exit status
  0 all is ready   2 a mistake in the settings or the data   75 interrupted: the same command goes on
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    words = argparse.ArgumentParser(
        prog="python -m dstrain.data", description="Make text ready before a run or a search on nodes without internet.",
        epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    words.add_argument("task", choices=("prepare", "show"), help="make all text ready; print training documents by number")
    words.add_argument("file", type=Path, metavar="FILE.yaml", help="settings of a run or a search")
    words.add_argument(
        "words", nargs="*", metavar="key=value", help="settings that win over the file's; for show: STAGE NUMBER ..."
    )
    words.add_argument(
        "--gpu", action="store_true", help="read the file's `when` as nodes with a GPU will, though this machine has none"
    )
    words.add_argument("--full-size", action="store_true", help="leave out the file's `when` overrides")
    return words


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    given = parser().parse_intermixed_args(argv)
    from dstrain.schema import UserError

    try:
        return (_prepare if given.task == "prepare" else _show)(given)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return INTERRUPTED


def _prepare(given: argparse.Namespace) -> int:
    import torch

    from dstrain.settings import load_search, read_document

    gpu = given.gpu or torch.cuda.is_available()
    document = read_document(given.file, given.words, gpu, given.full_size)
    if gpu and document.search is not None and load_search(document).resources.gpus == 0:  # its trials see none
        document = read_document(given.file, given.words, False, given.full_size)
    for line in document.precedence:
        print(line)
    if any(line.endswith("(when.no_gpu)") for line in document.precedence):
        print("This machine has no GPU, so when.no_gpu holds; for nodes with one, add --gpu.")
    done: list[str] = []

    def say(sentence: str) -> None:
        done.append(sentence)
        print(sentence, flush=True)

    for corpus, max_length in texts(planned_runs(document), say):
        print(_described(corpus, max_length))
    print("ready" if done else "everything was there already")
    print("\n".join(_for_the_nodes()))
    return 0


def _show(given: argparse.Namespace) -> int:
    import numpy as np

    from dstrain.run import own_vocabulary, run_vocabulary, stage_corpus
    from dstrain.schema import UserError, did_you_mean
    from dstrain.settings import load_run

    settings = load_run(given.file)
    name, *numbers = given.words or [""]
    if name not in settings.stages:
        raise UserError(f"show {given.file} STAGE NUMBER ...: no stage {name!r}{did_you_mean(name, settings.stages)}")
    vocabulary = own_vocabulary(settings.folder) or run_vocabulary(settings, print)
    corpus = stage_corpus(settings.stages[name], vocabulary, print)
    split = corpus.splits["train"]
    for number in numbers:
        if not number.isdecimal() or int(number) >= split.num_documents:
            raise UserError(f"document {number}: {name} has the training documents 0 to {split.num_documents - 1}")
        rows = np.flatnonzero(split.document == int(number))
        label = f", {corpus.label_names[split.labels[rows[0]]]}" if split.labels is not None else ""
        print(f"document {number} of {corpus.title} ({split.lengths[rows].sum()} tokens in {len(rows)} sequence(s){label}):")
        print(vocabulary.decode(split.gather(rows)))
    return 0


def planned_runs(document: Document) -> list[RunSettings]:
    """The run of a file, or the run of each trial where it has a search. Raises UserError."""
    from dstrain.search import plan_search
    from dstrain.settings import run_settings

    if document.search is None:
        return [run_settings(document)]
    search = plan_search(document)
    # Trials that are proposed while the search runs are not known yet: the base stands for them.
    return [candidate.settings for candidate in search.candidates] or [search.base]


def texts(runs: Sequence[RunSettings], say: Say) -> Iterator[tuple[Corpus, int]]:
    """Every tokenised corpus of the runs with its `max_length`, once; builds what is missing and says so.

    Looks at text and labels alone: precision and DeepSpeed JSON are for the device to judge, which is not here. Raises
    UserError with all that is wrong, once the rest is ready.
    """
    from dstrain.run import run_vocabulary, stage_corpus
    from dstrain.schema import UserError

    problems: dict[str, None] = {}
    for same_vocabulary in _grouped(runs):
        try:
            vocabulary = run_vocabulary(same_vocabulary[0][0], say)
        except UserError as error:
            problems[str(error)] = None
            continue
        for settings, stage in same_vocabulary:
            try:
                corpus = stage_corpus(stage, vocabulary, say)
                stage.objective.build(corpus, vocabulary, settings.encoder, settings.seed)  # it knows what labels it needs
                yield corpus, stage.max_length
            except UserError as error:
                problems[str(error)] = None
    if problems:
        raise UserError("\n".join(problems))


def _grouped(runs: Sequence[RunSettings]) -> list[list[tuple[RunSettings, StageSettings]]]:
    """The stages that need different text, once each, those of one vocabulary together."""
    groups: dict[str, dict[str, tuple[RunSettings, StageSettings]]] = {}
    for settings in runs:
        first = next(iter(settings.stages.values()))
        group = groups.setdefault(repr((settings.vocabulary, first.corpus)), {})
        for stage in settings.stages.values():
            group.setdefault(repr((stage.corpus, stage.max_length, stage.objective.kind)), (settings, stage))
    return [list(group.values()) for group in groups.values()]


def _described(corpus: Corpus, max_length: int) -> str:
    from dstrain.readings import amount

    counts = ", ".join(f"{name} {len(split):,}" for name, split in corpus.splits.items())
    tokens = sum(int(split.lengths.sum()) for split in corpus.splits.values())
    return f"{corpus.title}: {counts} sequences of at most {max_length} tokens, {amount(tokens)} tokens in all"


def _for_the_nodes() -> list[str]:
    """Where the text lies, and what nodes without internet need to know."""
    import os
    import shlex

    from dstrain.data.cache import cache_home

    exports = {"DSTRAIN_CACHE": str(cache_home().resolve())}
    if data := os.environ.get("DSTRAIN_DATA"):
        exports["DSTRAIN_DATA"] = str(Path(data).expanduser().resolve())
    exports |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return [
        f"the text lies in {exports['DSTRAIN_CACHE']}; on nodes without internet, which must see that folder:",
        *(f"  export {name}={shlex.quote(value)}" for name, value in exports.items()),
    ]


if __name__ == "__main__":
    sys.exit(main())
