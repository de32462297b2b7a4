"""What a search makes ready before its trials, and that it notices when their text is no longer what it was."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import tiny_run
from test_texts import append_row

from dstrain.engine import Ranks
from dstrain.preparation import prepare, remember, texts_of
from dstrain.run import Watch, claim, run
from dstrain.schema import UserError, dump_yaml
from dstrain.search import Search, plan_search
from dstrain.settings import read_document

Copied = tuple[Search, Path]


@pytest.fixture
def copied(small_corpus: Path, tmp_path: Path) -> Copied:
    """A search of two trials that need the same text, and the folder of that text."""
    corpus = shutil.copytree(small_corpus, tmp_path / "corpus")
    tree = {
        "base": tiny_run(corpus, tmp_path / "runs"),
        "space": {"stages.finetune.optim.lr": [1e-3, 3e-3]},
        "search": {"metric": "finetune/valid/f1_macro"},
    }
    file = tmp_path / "f.yaml"
    file.write_text(dump_yaml(tree), encoding="utf-8")
    return plan_search(read_document(file, ())), corpus


def test_a_search_notices_that_its_text_has_changed(copied: Copied) -> None:
    search, corpus = copied
    remember(search, prepare(search, 1, False, print))
    assert len(prepare(search, 1, False, print)) == 2, "the trials read the same, in two stages"
    whole = (corpus / "train.csv").read_bytes()
    append_row(corpus / "train.csv", "one document more about sockets and strings")
    with pytest.raises(UserError) as refused:
        prepare(search, 1, False, print)
    first, second = str(refused.value).splitlines()
    assert first.startswith(f"stages.pretrain: the text of corpus {corpus} has changed since it was last read: ")
    assert "train 60 -> 61 documents" in second and second.endswith("or give the search another name=...")
    (corpus / "train.csv").write_bytes(whole)
    prepare(search, 1, False, print)


def test_changed_text_is_accepted_once_for_all_trials(copied: Copied) -> None:
    search, corpus = copied
    remember(search, prepare(search, 1, False, print))
    append_row(corpus / "train.csv", "one document more about sockets and strings")
    said: list[str] = []
    remember(search, prepare(search, 1, False, said.append, accept_changed_data=True))
    assert sum("train 60 -> 61 documents" in sentence for sentence in said) == 2
    prepare(search, 1, False, print)


def test_a_search_that_is_over_reads_nothing_any_more(copied: Copied, monkeypatch: pytest.MonkeyPatch) -> None:
    search, corpus = copied
    remember(search, prepare(search, 1, False, print))
    append_row(corpus / "train.csv", "one document more about sockets and strings")
    monkeypatch.setattr(Search, "is_over", lambda self: True)
    prepare(search, 1, False, print)


def test_a_trial_reads_what_the_search_has_agreed_on_or_nothing(copied: Copied, ranks: Ranks) -> None:
    """Text that changes while a search runs, and a trial that begins or goes on then."""
    search, corpus = copied
    texts = prepare(search, 1, False, print)
    trial = search.candidates[0]
    append_row(corpus / "train.csv", "one document more about sockets and strings")
    watch = Watch(lambda reading: None, print, lambda tags: None)
    claim(trial.settings, print)
    with pytest.raises(UserError, match=r"stages\.pretrain: .* has changed since it was last read: .* the search another name"):
        run(trial.settings, ranks, watch, agreed=texts_of(texts, trial.settings))
    texts = prepare(search, 1, False, print, accept_changed_data=True)
    assert run(trial.settings, ranks, watch, agreed=texts_of(texts, trial.settings)).test


def test_trials_that_cut_the_same_text_otherwise_share_its_record(copied: Copied) -> None:
    """So that a sampler's later proposals are known."""
    search, _ = copied
    texts = prepare(search, 1, False, print)
    settings = search.candidates[0].settings
    stages = {name: stage.model_copy(update={"max_length": 32}) for name, stage in settings.stages.items()}
    shorter = settings.model_copy(update={"stages": stages})
    assert texts_of(texts, shorter) == texts_of(texts, settings) != {}
