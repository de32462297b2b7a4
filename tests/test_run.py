"""run(): stages hand their weights on, mistakes are told before anything trains, a folder knows whose it is."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Told, tiny_run, train_here
from safetensors.torch import load_file, save_file
from torch import Tensor

from dstrain import run as run_module
from dstrain.engine import Engine, Ranks
from dstrain.loop import Interrupted, evaluate
from dstrain.model.encoder import Encoder
from dstrain.objective import Task
from dstrain.precision import choose
from dstrain.run import claim, forecast, groups, make_ready, run_files, run_vocabulary, set_aside, stage_corpus
from dstrain.schema import UserError, read_yaml, set_path, validate
from dstrain.settings import RunSettings, load_run


def silent(sentence: str) -> None:
    """Says nothing."""


def settings_of(corpus: Path, output_dir: Path, **changes: Any) -> RunSettings:
    return validate(RunSettings, tiny_run(corpus, output_dir, **changes), "test")


def three_stages(corpus: Path, output_dir: Path, **changes: Any) -> dict[str, Any]:
    """pretrain and tapt with masked words, then finetune, of few steps."""
    tree = tiny_run(corpus, output_dir)
    stages = tree["stages"]
    short = {"steps": 3, "evaluate_every_steps": 3}
    stages["pretrain"] |= short
    stages["finetune"] |= short
    tapt = deepcopy(stages["pretrain"])
    tree["stages"] = {"pretrain": stages["pretrain"], "tapt": tapt, "finetune": stages["finetune"]}
    for address, value in changes.items():
        set_path(tree, address.replace("__", "."), value)
    return tree


@pytest.fixture
def first_weights(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """The weights every engine began with, in order."""
    found: list[dict[str, Tensor]] = []

    class Noting(Engine):
        def __init__(self, task: Task, *given: Any) -> None:
            found.append({name: weight.clone() for name, weight in task.state_dict().items()})
            super().__init__(task, *given)

    monkeypatch.setattr(run_module, "Engine", Noting)
    return found


def fresh(settings: RunSettings, stage: str, ranks: Ranks) -> Task:
    """The task of a stage before anybody trained it."""
    vocabulary = run_vocabulary(settings, silent)
    ready = make_ready(settings, vocabulary, choose("fp32", ranks.device), ranks, silent)
    return Task(Encoder(settings.encoder, vocabulary.size, settings.seed), ready[stage].objective)


def same(one: dict[str, Tensor], other: dict[str, Tensor], prefix: str = "") -> bool:
    names = {name for name in one if name.startswith(prefix)}
    assert names == {name for name in other if name.startswith(prefix)} and names
    return all(torch.equal(one[name], other[name]) for name in names)


# ------------------------------------------------------------------------------------------- weights handed on


def test_each_stage_starts_from_the_best_weights_before_it(
    small_corpus: Path, tmp_path: Path, ranks: Ranks, first_weights: list[dict[str, Tensor]]
) -> None:
    told = train_here(three_stages(small_corpus, tmp_path), ranks)
    folder = told.settings.folder / "stages"
    best = {stage: load_file(folder / stage / "best.safetensors") for stage in told.settings.stages}
    pretrain, tapt, finetune = first_weights
    assert same(pretrain, fresh(told.settings, "pretrain", ranks).state_dict()), "nothing lies before the first stage"
    assert same(tapt, best["pretrain"]), "encoder and the same head"
    assert same(finetune, best["tapt"], "encoder.")
    assert same(finetune, fresh(told.settings, "finetune", ranks).state_dict(), "head."), "another objective's is new"
    assert not same(best["tapt"], best["pretrain"])
    assert "tapt: starts from the previous weights, with their head" in told.sentences
    assert "finetune: starts from the previous weights, with a new head" in told.sentences


def test_a_stage_from_scratch_forgets_the_ones_before(
    small_corpus: Path, tmp_path: Path, ranks: Ranks, first_weights: list[dict[str, Tensor]]
) -> None:
    told = train_here(three_stages(small_corpus, tmp_path, stages__finetune__starts_from="scratch"), ranks)
    assert same(first_weights[2], fresh(told.settings, "finetune", ranks).state_dict())


def test_a_stage_can_start_from_another_runs_folder(
    small_corpus: Path, tmp_path: Path, ranks: Ranks, first_weights: list[dict[str, Tensor]]
) -> None:
    donor = train_here(tiny_run(small_corpus, tmp_path, name="donor", stages__finetune=None), ranks)
    train_here(
        tiny_run(
            small_corpus, tmp_path, name="heir", seed=1, stages__pretrain=None,
            stages__finetune__starts_from=str(donor.settings.folder),
        ),
        ranks,
    )  # fmt: skip
    best = load_file(donor.settings.folder / "stages/pretrain/best.safetensors")
    assert same(first_weights[1], best, "encoder.")


def test_the_last_finished_stage_of_a_folder_counts(small_corpus: Path, tmp_path: Path, ranks: Ranks) -> None:
    donor = train_here(three_stages(small_corpus, tmp_path, name="donor"), ranks)
    heir = settings_of(small_corpus, tmp_path, stages__finetune__starts_from=str(donor.settings.folder))
    given = run_module.starting_weights("finetune", heir.stages["finetune"], None)
    assert given is not None
    assert same(given, load_file(donor.settings.folder / "stages/finetune/best.safetensors"))


def test_weights_of_another_encoder_are_refused_in_one_sentence(
    small_corpus: Path, tmp_path: Path, ranks: Ranks
) -> None:
    donor = train_here(tiny_run(small_corpus, tmp_path, name="donor", stages__finetune=None), ranks)
    from_donor = {"stages__finetune__starts_from": str(donor.settings.folder)}
    for name, change, complaint in [
        ("wide", {"encoder__intermediate_size": 128}, r"\(64, 32\) != .* and \d+ more|!= \(64, 32\)"),
        ("deep", {"encoder__num_layers": 3}, r"missing encoder\.blocks\.2\..* and \d+ more"),
        ("shallow", {"encoder__num_layers": 1}, r"unknown encoder\.blocks\.1\..* and \d+ more"),
    ]:
        with pytest.raises(UserError, match=complaint) as caught:
            train_here(tiny_run(small_corpus, tmp_path, name=name, **from_donor, **change), ranks)
        message = str(caught.value)
        assert message.startswith("stages.finetune.starts_from: those weights are of another encoder (")
        assert message.endswith("give it the same encoder settings, or starts_from: scratch") and "\n" not in message
        assert not (tmp_path / name / "stages").exists(), "told before the first stage trained"


def test_damaged_weights_are_one_sentence(small_corpus: Path, tmp_path: Path, ranks: Ranks) -> None:
    tree = tiny_run(small_corpus, tmp_path)
    settings = train_here(tree, ranks).settings
    (settings.folder / "outcome.json").unlink()
    weights = settings.folder / "stages/pretrain/best.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"best\.safetensors: cannot be read as weights \(.+\); train the stage again"):
        train_here(tree, ranks)


# ------------------------------------------------------------------------------------ told before anything trains


def test_mistakes_of_all_stages_are_told_before_the_first_trains(
    small_corpus: Path, tmp_path: Path, ranks: Ranks
) -> None:
    tree = three_stages(
        small_corpus, tmp_path, stages__tapt__corpus__path=str(tmp_path / "nowhere"),
        stages__finetune__starts_from=str(tmp_path / "no_run"),
    )  # fmt: skip
    with pytest.raises(UserError) as caught:
        train_here(tree, ranks)
    first, second = str(caught.value).splitlines()
    assert "nowhere" in first
    assert second.startswith(f"stages.finetune.starts_from: {tmp_path / 'no_run'} holds no finished stage; give")
    assert not (tmp_path / "tiny/stages").exists()
    mended = train_here(three_stages(small_corpus, tmp_path), ranks)
    assert mended.outcome is not None, "the folder is no hindrance to the run put right"


def test_one_broken_file_in_two_stages_is_one_mistake(small_corpus: Path, tmp_path: Path, ranks: Ranks) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text('{"zero_optimisation": {}}')
    with pytest.raises(UserError, match="zero_optimisation") as caught:
        train_here(tiny_run(small_corpus, tmp_path, deepspeed=str(plan)), ranks)
    assert len(str(caught.value).splitlines()) == 1


def test_what_is_not_read_is_said(tmp_path: Path, ranks: Ranks) -> None:
    """Long documents that are cut, and sequences that fill no whole step; each sentence once."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    words = "one two three four five six seven eight nine ten eleven twelve " * 4
    for split, number in {"train": 7, "validation": 4, "test": 4}.items():
        rows = [f'"{words} {row}",{"ab"[row % 2]}' for row in range(number)]
        (corpus / f"{split}.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    size = {"max_length": 32, "tokens_per_batch": 32, "accumulation": 3, "steps": None, "epochs": 2}
    changes = {f"stages__{stage}__{name}": value for stage in ("pretrain", "finetune") for name, value in size.items()}
    told = train_here(tiny_run(corpus, tmp_path, **changes), ranks)
    left_out = [sentence for sentence in told.sentences if "are in no step" in sentence]
    assert len(left_out) == 1 and left_out[0].startswith("pretrain: train: 2 of 14 sequences (over 2 epochs)")
    assert len([sentence for sentence in told.sentences if "longer than 32 tokens" in sentence]) == 3


def test_a_forecast_is_what_happens(small_corpus: Path, tmp_path: Path, ranks: Ranks) -> None:
    tree = tiny_run(small_corpus, tmp_path, stages__pretrain__steps=None, stages__pretrain__epochs=2)
    settings = validate(RunSettings, tree, "test")
    pretrain, finetune = forecast(settings, 1, ranks.device, silent)
    two_ranks = forecast(settings, 2, ranks.device, silent)[0]
    assert pretrain.steps / 2 <= two_ranks.steps <= pretrain.steps / 2 + 1 and two_ranks.plan["train_batch_size"] == 2
    assert not settings.folder.exists()
    told = train_here(tree, ranks)
    totals = {reading.stage: reading.total_steps for reading in told.readings}
    assert {found.name: found.steps for found in (pretrain, finetune)} == totals
    last = max((found for found in told.readings if found.stage == "pretrain"), key=lambda found: found.step)
    assert pretrain.tokens_per_epoch * 2 == last.tokens
    assert pretrain.documents == 60
    assert str(pretrain.parameters) == told.tags["parameters"]
    assert pretrain.plan == json.loads((settings.folder / "ds_config.pretrain.json").read_text())
    assert any("longer than 64 tokens" in note for note in pretrain.notes)
    assert forecast(settings, 2, ranks.device, silent)[0].steps == pretrain.steps, "what has begun keeps its steps"


def test_parameter_groups_hold_every_parameter_once(small_corpus: Path, tmp_path: Path, ranks: Ranks) -> None:
    settings = settings_of(small_corpus, tmp_path, stages__finetune__num_frozen_layers=1)
    task = fresh(settings, "finetune", ranks)
    found = groups(task, settings.stages["finetune"])
    members = [parameter for group in found for parameter in group["params"]]
    assert sorted(map(id, members)) == sorted(map(id, task.parameters()))
    assert [(group["name"], group["weight_decay"]) for group in found] == [
        ("frozen", 0.01), ("frozen", 0.0), ("free", 0.01), ("free", 0.0)
    ]  # fmt: skip
    frozen = {id(parameter) for group in found[:2] for parameter in group["params"]}
    assert frozen == {id(parameter) for parameter in task.encoder.first_parameters(1)}
    assert all(parameter.ndim == 1 for group in (found[1], found[3]) for parameter in group["params"])
    pretrain = settings.stages["pretrain"]
    assert {group["name"] for group in groups(fresh(settings, "pretrain", ranks), pretrain)} == {"free"}


# ------------------------------------------------------------------------------------------------- what it comes to


@pytest.mark.parametrize(
    ("zero", "precision"),
    [
        ("zero1", "fp32"), ("zero3", "fp32"), ("zero0", "bf16"),
        *(pytest.param(zero, "bf16", marks=pytest.mark.slow) for zero in ("zero1", "zero3")),
    ],
)
def test_test_figures_are_those_of_the_kept_weights(
    zero: str, precision: str, small_corpus: Path, tmp_path: Path, ranks: Ranks
) -> None:
    tree = tiny_run(small_corpus, tmp_path, precision=precision, deepspeed=f"ds_configs/{zero}.json")
    told = train_here(tree, ranks)
    settings, stage = told.settings, told.settings.stages["finetune"]
    task = fresh(settings, "finetune", ranks)
    task.load_state_dict(load_file(settings.folder / "stages/finetune/best.safetensors"))
    task.to(choose(settings.precision, ranks.device).dtype)
    vocabulary = run_vocabulary(settings, silent)
    corpus = stage_corpus(stage, vocabulary, silent)
    objective = make_ready(settings, vocabulary, choose("fp32", ranks.device), ranks, silent)["finetune"].objective
    assert told.outcome is not None
    assert evaluate(task, objective, corpus.splits["test"], stage.tokens_per_batch, ranks) == told.outcome.test


def check_agree(curves: dict[str, Told], tolerance: float) -> None:
    (first, truth), *others = curves.items()
    for name, told in others:
        for stage in ("pretrain", "finetune"):
            for split in ("train", "valid"):
                wanted = truth.losses(stage, split)
                assert told.losses(stage, split) == pytest.approx(wanted, rel=tolerance), f"{name} and {first}, {stage}"


@pytest.mark.parametrize(
    ("precision", "tolerance", "kinds"),
    [
        ("fp32", 1e-5, ("zero0", "zero1", "zero2", "zero3")),
        pytest.param("fp32", 1e-5, ("zero0", "zero2_offload", "zero3_offload"), marks=pytest.mark.slow),
        pytest.param("bf16", 2e-2, ("zero0", "zero1", "zero2", "zero3", "zero3_offload"), marks=pytest.mark.slow),
    ],
)
def test_all_zero_stages_train_the_same_run(
    precision: str, tolerance: float, kinds: tuple[str, ...], small_corpus: Path, tmp_path: Path, ranks: Ranks
) -> None:
    """fp32: the losses agree to 1e-5. bf16: to 2e-2 (weights are rounded to 3 digits after sums in another order)."""
    frozen = {"stages__finetune__num_frozen_layers": 1, "stages__pretrain__accumulation": 2}
    curves = {
        zero: train_here(
            tiny_run(
                small_corpus, tmp_path, name=zero, precision=precision, deepspeed=f"ds_configs/{zero}.json", **frozen
            ),
            ranks,
        )
        for zero in kinds
    }
    check_agree(curves, tolerance)


def test_a_run_leaves_evidence(small_corpus: Path, tmp_path: Path, ranks: Ranks) -> None:
    told = train_here(tiny_run(small_corpus, tmp_path), ranks)
    folder = told.settings.folder
    names = {file.relative_to(folder).as_posix() for file in run_files(folder)}
    assert {"settings.yaml", "environment.txt", "readings.jsonl", "ds_config.pretrain.json"} <= names
    assert load_run(folder / "settings.yaml") == told.settings, "the folder's settings are the run's"
    assert (folder / "vocabulary").is_dir()
    assert told.tags["device"] == "cpu" and told.tags["world_size"] == "1"
    assert "fp32" in told.tags["precision"] and told.tags["attention_kernel"]
    assert told.outcome is not None
    assert told.outcome.stopped == {"pretrain": "finished", "finetune": "finished"}
    assert set(told.outcome.best) == {"pretrain", "finetune"} and "f1_macro" in told.outcome.test
    assert not list(folder.rglob("*.draft"))


# --------------------------------------------------------------------------------------------------- run again


def test_a_finished_run_answers_from_its_folder(
    small_corpus: Path, tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train_here(tiny_run(small_corpus, tmp_path), ranks)
    monkeypatch.setattr(run_module, "make_ready", None)  # nothing is opened or trained again
    again = train_here(tiny_run(small_corpus, tmp_path), ranks)
    assert again.outcome == first.outcome
    assert again.sentences == [f"{tmp_path / 'tiny'}: already finished"] and again.readings == []


def test_finished_stages_are_not_trained_again(
    small_corpus: Path, tmp_path: Path, ranks: Ranks, first_weights: list[dict[str, Tensor]]
) -> None:
    tree = three_stages(small_corpus, tmp_path)
    first = train_here(tree, ranks)
    folder = first.settings.folder
    (folder / "outcome.json").unlink()
    (folder / "stages/finetune/done.json").unlink()
    again = train_here(tree, ranks)
    assert len(first_weights) == 4, "three stages, then the last one alone"
    assert same(first_weights[3], first_weights[2])
    assert again.outcome == first.outcome
    assert {reading.stage for reading in again.readings} == {"finetune"}


def test_a_folder_belongs_to_its_settings(small_corpus: Path, tmp_path: Path, ranks: Ranks) -> None:
    train_here(tiny_run(small_corpus, tmp_path), ranks)
    own = (tmp_path / "tiny/settings.yaml").read_text()
    claim(settings_of(small_corpus, tmp_path), print)
    with pytest.raises(UserError) as caught:
        claim(settings_of(small_corpus, tmp_path, seed=7, stages__finetune__optim__lr=0.5), print)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'tiny'}: holds a run with other settings (")
    assert "seed: 0 -> 7" in message and "stages.finetune.optim.lr: " in message and "\n" not in message
    assert message.endswith("give this one another name=..., or start over with --resume never")
    assert (tmp_path / "tiny/settings.yaml").read_text() == own


def begun(corpus: Path, folder: Path, ranks: Ranks, **changes: Any) -> dict[str, Any]:
    """A run that was asked to stop in its second stage."""
    tree, left = tiny_run(corpus, folder, **changes), iter([False] * 7)
    with pytest.raises(Interrupted):
        train_here(tree, ranks, lambda: next(left, True))
    return tree


def test_a_run_goes_on_in_the_number_format_it_began_in(
    small_corpus: Path, tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left to the device, it is the first device that decides."""
    best = choose("bf16", ranks.device)
    monkeypatch.setattr(run_module, "choose", lambda wanted, device: best if wanted == "auto" else choose(wanted, device))
    tree = begun(small_corpus, tmp_path, ranks)
    monkeypatch.undo()
    told = train_here(tree, ranks)
    assert told.tags["precision"] == "bf16: this run was begun in it"
    tree = begun(small_corpus, tmp_path, ranks, name="other")
    record = tmp_path / "other/ranks.json"
    record.write_text(record.read_text().replace('"fp32"', '"fp16"'))
    with pytest.raises(UserError, match=r"other: this run was begun in fp16, which the device here has not got; go on where"):
        train_here(tree, ranks)


def test_another_deepspeed_json_than_at_the_start_is_refused(small_corpus: Path, tmp_path: Path, ranks: Ranks) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text('{"zero_optimization": {"stage": 1}}')
    tree = begun(small_corpus, tmp_path, ranks, deepspeed=str(plan))
    plan.write_text('{"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": "auto"}')
    says = r"plan\.json: is not what .*tiny was begun with \(zero_optimization\.stage: 1 -> 2\); put it back"
    with pytest.raises(UserError, match=says):
        train_here(tree, ranks)
    plan.write_text('{"zero_optimization": {"stage": 1}, "communication_data_type": "bf16"}')
    with pytest.raises(UserError, match=r"\(communication_data_type: not there -> bf16\)"):
        train_here(tree, ranks)
    plan.write_text('{"zero_optimization": {"stage": 1}, "steps_per_print": "auto"}')
    assert train_here(tree, ranks).outcome is not None


def test_a_folder_without_a_stage_can_be_taken_over(small_corpus: Path, tmp_path: Path) -> None:
    claim(settings_of(small_corpus, tmp_path), print)
    claim(settings_of(small_corpus, tmp_path, seed=7), print)
    assert read_yaml(tmp_path / "tiny/settings.yaml")["base"]["seed"] == 7


def test_what_a_run_told_that_died_early_is_set_aside_for_other_settings(
    small_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It left readings and best weights, and no checkpoint."""
    claim(settings_of(small_corpus, tmp_path), print)
    folder = tmp_path / "tiny"
    (folder / "stages/pretrain").mkdir(parents=True)
    for name in ("readings.jsonl", "stages/pretrain/best.safetensors", "fp16-gave-out.txt"):
        (folder / name).write_text("left")
    claim(settings_of(small_corpus, tmp_path), print)
    assert (folder / "readings.jsonl").exists(), "the same settings take the same steps again"
    assert not (folder / "fp16-gave-out.txt").exists()
    assert capsys.readouterr().out == ""
    claim(settings_of(small_corpus, tmp_path, seed=7), print)
    assert capsys.readouterr().out == f"{folder}: what a run with other settings left there is now in {folder}.before-1\n"
    assert (tmp_path / "tiny.before-1/readings.jsonl").exists() and not (folder / "readings.jsonl").exists()
    claim(settings_of(small_corpus, tmp_path, seed=7), print)


def test_starting_over_loses_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    set_aside(folder)  # nothing there, nothing to do
    assert list(tmp_path.iterdir()) == []
    for number in (1, 2):
        folder.mkdir()
        (folder / "readings.jsonl").write_text(str(number))
        set_aside(folder)
    assert {path.name: (path / "readings.jsonl").read_text() for path in tmp_path.iterdir()} == {
        "run.before-1": "1", "run.before-2": "2",
    }  # fmt: skip


def test_a_head_of_another_size_is_made_new(small_corpus: Path, tmp_path: Path, ranks: Ranks) -> None:
    """The same objective over other classes: the encoder is taken, the head is not."""
    donor = train_here(tiny_run(small_corpus, tmp_path, name="donor", stages__pretrain=None), ranks)
    file = donor.settings.folder / "stages/finetune/best.safetensors"
    weights = load_file(file)
    [last] = [name for name in weights if name.startswith("head.") and weights[name].shape == (2,)]
    weights[last] = torch.zeros(3)
    save_file(weights, file)
    from_donor = {"stages__pretrain": None, "stages__finetune__starts_from": str(donor.settings.folder)}
    heir = train_here(tiny_run(small_corpus, tmp_path, name="heir", **from_donor), ranks)
    assert "finetune: starts from the previous weights, with a new head" in heir.sentences


def test_another_kind_of_attention_takes_the_weights_and_keeps_its_own_draws(
    small_corpus: Path, tmp_path: Path, ranks: Ranks, first_weights: list[dict[str, Tensor]]
) -> None:
    """The hybrid study: pretrained with sdpa, tuned with favor, whose projections no sdpa run can have."""
    donor = train_here(tiny_run(small_corpus, tmp_path, name="donor", stages__finetune=None), ranks)
    from_donor = {"stages__pretrain": None, "stages__finetune__starts_from": str(donor.settings.folder)}
    favor = {"encoder__attention": {"kind": "favor"}}
    heir = train_here(tiny_run(small_corpus, tmp_path, name="heir", **from_donor, **favor), ranks)
    best = load_file(donor.settings.folder / "stages/pretrain/best.safetensors")
    own = fresh(heir.settings, "finetune", ranks).state_dict()
    draws = {name for name in own if ".attention." in name}
    assert draws and not draws & best.keys()
    assert all(torch.equal(first_weights[1][name], own[name]) for name in draws)
    given = {name for name in best if name.startswith("encoder.")}
    assert all(torch.equal(first_weights[1][name], best[name]) for name in given)


def test_a_folder_in_use_is_refused_with_the_name_of_its_user(small_corpus: Path, tmp_path: Path) -> None:
    settings = validate(RunSettings, tiny_run(small_corpus, tmp_path), "tiny.yaml")
    program = f"from pathlib import Path; from dstrain.run import hold; hold(Path({str(settings.folder)!r})); input()"
    other = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, text=True)
    try:
        mark = settings.folder / "in-use"
        while other.poll() is None and not (mark.exists() and mark.read_text()):
            time.sleep(0.05)
        with pytest.raises(UserError, match=rf"is in use by process {other.pid} on \S+; wait for it, end it, or give name"):
            claim(settings, print)
    finally:
        other.communicate("\n")
    claim(settings, print)
    claim(settings, print)


@pytest.mark.parametrize("text", ['{"st', "3", "\x00"])
def test_a_damaged_record_is_a_sentence(text: str, tmp_path: Path) -> None:
    file = tmp_path / "done.json"
    file.write_text(text)
    with pytest.raises(UserError, match=r"done\.json: is damaged; remove it, and the same command does that part again"):
        run_module.read_record(file)
