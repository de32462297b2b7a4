"""What is shipped works: every YAML and JSON loads, every setting is explained, the README's commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dstrain.schema import explain
from dstrain.search import plan_search
from dstrain.settings import RunSettings, SearchSettings, read_document, run_settings

ROOT = Path(__file__).resolve().parents[2]
SPACES = sorted(ROOT.glob("search_spaces/*.yaml"))
TRIALS = {"lsh": 18, "favor": 6, "finetune": 12, "smoke": 6}


def test_these_spaces_are_shipped() -> None:
    assert {path.stem for path in SPACES} == set(TRIALS)


@pytest.mark.parametrize("gpu", [False, True], ids=["laptop", "gpu"])
@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_a_shipped_space_plans_its_trials(path: Path, gpu: bool) -> None:
    search = plan_search(read_document(path, gpu=gpu))
    assert len(search.candidates) == TRIALS[path.stem]
    assert len({candidate.id for candidate in search.candidates}) == TRIALS[path.stem]


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_full_size_is_the_published_study(path: Path) -> None:
    settings = run_settings(read_document(path, full_size=True))
    if path.stem != "smoke":
        assert settings.encoder.preset == "bert_small"
        assert next(iter(settings.stages.values())).corpus.name == "wikipedia"
        assert all(stage.tokens_per_batch == 32_768 for stage in settings.stages.values())


def test_favor_features_are_multiples_of_the_head_dimension() -> None:
    search = plan_search(read_document(ROOT / "search_spaces/favor.yaml", gpu=True))
    features = [candidate.settings.encoder.attention.nb_features for candidate in search.candidates]  # type: ignore[union-attr]
    assert sorted(features) == [8, 16, 32, 64, 128, 256]


@pytest.mark.parametrize("root", [RunSettings, SearchSettings])
def test_every_setting_says_what_it_is(root: type) -> None:
    for row in explain(root):
        if not re.search(r"[.>]kind$", row.address):
            assert row.doc, f"{row.address} has no docstring"


def test_files_named_in_the_readme_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in re.findall(r"\b(?:dstrain|search_spaces|ds_configs|docs|benchmarks|tests)/[\w./-]*\w\.\w+", text):
        assert (ROOT / name).exists(), name
