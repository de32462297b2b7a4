"""The quality benchmark: its statistics against slow truths, its recipes, and one small corpus from YAML to table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import quality
from benchmarks.quality import Guesses, half_interval, macro_f1, main, paired_difference, read_kinds, verdict
from dstrain.metrics import scores

RECIPES = sorted(path.stem for path in quality.RECIPES.glob("*.yaml"))


def answers(seed: int, right: float, documents: int = 300, classes: int = 3) -> Guesses:
    """Guesses of which about a share `right` is right, on the same documents whatever the seed."""
    truth = np.random.default_rng(0).integers(0, classes, documents)
    random = np.random.default_rng(seed + 1)
    return Guesses(truth, np.where(random.random(documents) < right, truth, random.integers(0, classes, documents)))


def test_macro_f1_is_the_trainers() -> None:
    for classes in (2, 3, 5):
        truth, guess = answers(1, 0.6, 40, classes)
        confusion = np.bincount(truth * classes + guess, minlength=classes**2).reshape(1, classes, classes)
        assert macro_f1(confusion)[0] == pytest.approx(scores(truth, guess, classes)["f1_macro"])
    nobody_says_2 = np.array([[[5, 1, 0], [1, 5, 0], [0, 0, 0]]])
    assert macro_f1(nobody_says_2)[0] == pytest.approx(5 / 6)


def test_the_difference_is_that_of_the_means_and_its_interval_that_of_resampled_documents() -> None:
    better, worse = [answers(seed, 0.8) for seed in range(3)], [answers(seed, 0.6) for seed in range(10, 13)]
    difference, low, high = paired_difference(better, worse)

    def mean(side: list[Guesses], rows: np.ndarray, seeds: np.ndarray) -> float:
        return float(np.mean([scores(side[s].truth_D[rows], side[s].guess_D[rows], 3)["f1_macro"] for s in seeds]))

    assert difference == pytest.approx(
        mean(better, np.arange(300), np.arange(3)) - mean(worse, np.arange(300), np.arange(3))
    )
    random, slow = np.random.default_rng(5), []
    for _ in range(1000):
        rows, seeds = random.integers(0, 300, 300), random.integers(0, 3, 3)
        slow.append(mean(better, rows, seeds) - mean(worse, rows, seeds))
    assert (low, high) == pytest.approx(tuple(np.quantile(slow, (0.025, 0.975))), abs=0.01)


def test_pairing_takes_out_what_both_kinds_get_wrong() -> None:
    hard = [answers(seed, 0.7) for seed in range(2)]
    assert paired_difference(hard, hard) == (0.0, 0.0, 0.0)


def test_the_interval_over_seeds_is_students() -> None:
    assert half_interval([0.8, 0.9]) == pytest.approx(12.706 * 0.05, rel=1e-3)
    assert half_interval([1.0, 2.0, 3.0]) == pytest.approx(4.303 / 3**0.5, rel=1e-3)
    assert np.isnan(half_interval([0.5]))


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (-0.009, 0.02, "within a point"),
        (-0.03, -0.011, "loses more"),
        (-0.03, 0.01, "undecided"),
        (-0.03, -0.005, "undecided"),
    ],
)
def test_verdicts(low: float, high: float, said: str) -> None:
    assert verdict(low, high, 3) == said
    assert verdict(low, high, 2) == "too few seeds"


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_gives_every_kind_the_same_search(recipe: str, tmp_path: Path) -> None:
    kinds = read_kinds(recipe, tmp_path)
    assert [kind.label for kind in kinds][:3] == ["sdpa", "favor", "lsh"]
    changes = [{each.changes.removeprefix(f"attention={kind.label} ") for each in kind.candidates} for kind in kinds]
    assert len(changes[0]) > 1 and all(same == changes[0] for same in changes)
    names = [kind.run(candidate, number).name for kind in kinds for candidate in kind.candidates for number in (0, 1)]
    assert len(set(names)) == len(names)
    assert {kind.run(kind.candidates[0], 2).seed for kind in kinds} == {2}


SMALL = """
base:
  name: small
  encoder: {{preset: bert_tiny, num_layers: 1, hidden_size: 16, intermediate_size: 32, num_heads: 1, qkv_size: 16}}
  vocabulary: {{size: 256}}
  precision: fp32
  deepspeed: ds_configs/zero0.json
  tracking: {{enabled: false}}
  stages:
    finetune:
      objective: {{kind: classify}}
      corpus: {{path: {corpus}}}
      max_length: 64
      tokens_per_batch: 512
space:
  encoder.attention: {{choice: [{{kind: sdpa}}, {{kind: favor, nb_features: 4}}]}}
  stages.finetune.optim.lr: {{choice: [1e-3, 1e-2]}}
search: {{metric: finetune/valid/f1_macro, scheduler: {{kind: none}}}}
"""


@pytest.fixture
def small_recipe(tmp_path: Path, small_corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe folder with one corpus, and where its runs go."""
    monkeypatch.setattr(quality, "RECIPES", tmp_path / "recipes")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "small.yaml").write_text(SMALL.format(corpus=small_corpus))
    return tmp_path / "out"


@pytest.mark.slow
def test_from_recipe_to_table_plot_and_rows_and_no_run_twice(
    small_recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, plot = small_recipe / "rows.json", small_recipe / "plot.png"
    command = [
        "--corpus",
        "small",
        "--seeds",
        "2",
        "--out",
        str(small_recipe),
        "--json",
        str(rows),
        "--plot",
        str(plot),
    ]
    assert main(command) == 0
    said = capsys.readouterr()
    assert said.err.count("training small-") == 6  # two kinds, two rates at one seed, and one more seed
    assert "now give" not in said.err  # the weights kept answer as the run reported
    sdpa, favor = json.loads(rows.read_text())["rows"]
    assert (sdpa["kind"], favor["kind"], len(favor["f1"])) == ("sdpa", "favor nb_features=4", 2)
    assert sdpa["difference"] is None and favor["difference"] == pytest.approx(favor["mean"] - sdpa["mean"])
    best = max(favor["valid_of_choices"], key=favor["valid_of_choices"].get)
    assert f"lr={favor['chosen']['stages.finetune.optim.lr']}" in best
    assert (favor["pairs"], favor["verdict"]) == (2, "too few seeds")
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert main(command) == 0
    assert "training" not in capsys.readouterr().err
    assert main([*command, "--set", "stages.finetune.epochs=2"]) == 2
    assert "is finished, with other settings" in capsys.readouterr().err


def test_a_dry_run_and_an_empty_table(small_recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--corpus", "small", "--out", str(small_recipe)]
    assert main([*command, "--dry-run"]) == 0
    assert capsys.readouterr().out.count("to train") == 4  # further seeds wait for the choice
    assert main([*command, "--only-finished"]) == 2
    assert "holds no kind" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--seeds", "0"], "--seeds 0"),
        (["--corpus", "imbd"], "did you mean"),
        (["--corpus", "imdb", "--kinds", "fovor"], "did you mean favor?"),
        (["--corpus", "imdb", "--set", "stages.finetune.epoch=2"], "epoch"),
    ],
)
def test_mistakes_are_sentences(
    more: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out", str(tmp_path), "--dry-run", *more]) == 2
    assert sentence in capsys.readouterr().err
