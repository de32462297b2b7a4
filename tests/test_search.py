"""A search as files: its trials, what they reported, the table, the winner. Readings are written as a run writes them."""
# ruff: noqa: E501  (messages stand verbatim)

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_run

from dstrain.readings import JsonLines, Reading
from dstrain.rungs import History, open_rungs
from dstrain.schema import UserError, dump_yaml, read_yaml
from dstrain.search import Candidate, Search, brief, plan_search, table
from dstrain.settings import load_run, read_document

SPACE = {"encoder.num_layers": [1, 2], "stages.finetune.optim.lr": {"choice": [1e-3, 3e-3]}}
METRIC = "finetune/valid/f1_macro"

Plan = Callable[..., Search]


@pytest.fixture
def plan(tmp_path: Path, small_corpus: Path) -> Plan:
    """Plans a search of a tiny run; `search` and `space` are parts of the file, other changes are of the base."""

    def plan(
        search: dict[str, Any] | None = None,
        space: dict[str, Any] | None = None,
        overrides: tuple[str, ...] = (),
        **changes: Any,
    ) -> Search:
        tree = {
            "base": tiny_run(small_corpus, tmp_path / "runs", **changes),
            "space": SPACE if space is None else space,
            "search": {"metric": METRIC, **(search or {})},
        }
        file = tmp_path / "f.yaml"
        file.write_text(dump_yaml(tree), encoding="utf-8")
        return plan_search(read_document(file, overrides))

    return plan


def report(
    candidate: Candidate, values: dict[int, float], stage: str = "finetune", total: int = 8, name: str = "f1_macro"
) -> None:
    """What a run of two stages reports: training at each step, and an evaluation with this value."""
    write = JsonLines(candidate.folder)
    write(Reading("pretrain", "train", 6, 6, 3000, 2.0, {"loss": 5.0, "peak_memory_gb": 0.25}))
    for step, value in values.items():
        train = {"loss": 1.0, "peak_memory_gb": 0.5}
        write(Reading(stage, "train", step, total, 1000 * step, 0.5 * step, train))
        write(Reading(stage, "valid", step, total, 1000 * step, 0.5 * step, {name: value, "loss": 1 - value}))


def refused(attempt: Callable[[], object], file: Path) -> list[str]:
    with pytest.raises(UserError) as error:
        attempt()
    return [line.removeprefix(f"{file}: ") for line in str(error.value).splitlines()]


# --------------------------------------------------------------------------------------------------- planning


def test_each_combination_is_a_trial_with_a_folder_of_its_own(plan: Plan, tmp_path: Path) -> None:
    search = plan()
    made = [(c.settings.encoder.num_layers, c.settings.stages["finetune"].optim.lr) for c in search.candidates]
    assert made == [(1, 1e-3), (1, 3e-3), (2, 1e-3), (2, 3e-3)]
    assert {c.folder for c in search.candidates} == {tmp_path / "runs/tiny/trials" / c.id for c in search.candidates}
    assert len({c.id for c in search.candidates}) == 4
    assert [c.changes for c in search.candidates][1] == "num_layers=1 lr=0.003"
    assert search.notes == ()
    assert not (tmp_path / "runs").exists(), "planning writes nothing"


def test_the_same_trials_are_found_again_whatever_the_order_of_keys(plan: Plan) -> None:
    again = plan(space=dict(reversed(SPACE.items())), overrides=("search.max_concurrent=1",))
    assert {c.id for c in again.candidates} == {c.id for c in plan().candidates}


def test_seeds_are_an_axis(plan: Plan) -> None:
    search = plan({"seeds": [5, 6]}, {"encoder.num_layers": [1, 2]})
    assert sorted((c.settings.seed, c.settings.encoder.num_layers) for c in search.candidates) == [
        (5, 1),
        (5, 2),
        (6, 1),
        (6, 2),
    ]


def test_constraints_leave_trials_out_and_it_is_noted(plan: Plan) -> None:
    search = plan({"constraints": ["num_layers * stages.finetune.optim.lr < 0.005"]})
    assert len(search.candidates) == 3
    assert search.notes == ("search.constraints leave out 1 of 4 combinations",)


@pytest.mark.parametrize("scheduler", [{"kind": "asha", "on_rung": "pause"}, {"kind": "hyperband"}, {"kind": "pbt"}])
def test_trials_that_pause_need_a_checkpoint_at_every_evaluation(plan: Plan, scheduler: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"stages\.finetune\.checkpoint_every: trials wait at their evaluations"):
        plan({"scheduler": scheduler}, stages__finetune__checkpoint_every=5)


def test_expressions_follow_the_trial(plan: Plan) -> None:
    search = plan(space={"encoder.num_layers": [1, 2], "encoder.intermediate_size": {"expr": "16 * num_layers"}})
    assert [c.settings.encoder.intermediate_size for c in search.candidates] == [16, 32]


@pytest.mark.parametrize(
    ("search", "space", "said"),
    [
        ({}, {"encoder.num_layer": [1, 2]}, ["encoder.num_layer: no such setting; did you mean num_layers? (trial num_layer=1 and 1 more)"]),
        ({}, {"stages.finetun.optim.lr": [0.1]}, ["stages: finetun has neither objective nor corpus; did you mean finetune? (trial lr=0.1)"]),
        ({}, {"encoder.attention.num_hashes": [2]}, ["encoder.attention.num_hashes: no such setting; there are backend, kind (trial num_hashes=2)"]),
        ({}, {"stages.finetune.optim.lr": [1e-3, -1]}, ["stages.finetune.optim.lr: must be greater than 0, but is -1 (trial lr=-1)"]),
        ({}, {"encoder.num_heads": [2, 3]}, ["encoder: qkv_size = 32 cannot be shared among num_heads = 3 heads; take num_heads from 1, 2, 4, 8, or qkv_size = 33 (trial num_heads=3)"]),
        ({}, {"stages.finetune.num_frozen_layers": [0, 3], "seed": [0, 1]}, ["stages.finetune.num_frozen_layers: is 3, but the encoder has 2 layers; freeze fewer, or raise encoder.num_layers (trial num_frozen_layers=3 seed=0 and 1 more)"]),
        ({}, {"stages.finetune.optim.lr": {"unifrm": [1, 2]}}, ["space.stages.finetune.optim.lr: unifrm: no such distribution; did you mean uniform?"]),
        ({}, {"stages.finetune.optim.lr": {"uniform": [1, 2]}}, ["space.stages.finetune.optim.lr: uniform has no end of values; say how many to draw with search.trials"]),
        ({}, {"name": ["a", "b"]}, ["space.name: every trial has a name and a folder of its own; take it out of the space"]),
        ({}, {"seed, output_dir": [[1, "b"]]}, ["space.output_dir: every trial has a name and a folder of its own; take it out of the space"]),
        ({"constraints": ["stages.finetune.optim.lr > 1"]}, SPACE, ["search.constraints: leave out all 4 combinations, so there is no trial; loosen one of them"]),
        ({"constraints": ["num_layer > 1"]}, SPACE, ["search.constraints: 'num_layer > 1': num_layer is no setting; did you mean num_layers?"]),
        ({"metric": "finetune/valid/f1"}, SPACE, ["search.metric: finetune reports no 'f1'; there are accuracy, balanced_accuracy, f1_macro, loss, precision_macro, recall_macro"]),
    ],
)  # fmt: skip
def test_a_search_that_cannot_be_is_refused_before_it_starts(
    plan: Plan, tmp_path: Path, search: dict[str, Any], space: dict[str, Any], said: list[str]
) -> None:
    assert refused(lambda: plan(search, space), tmp_path / "f.yaml") == said


def test_mistakes_of_base_and_search_come_together(plan: Plan, tmp_path: Path) -> None:
    assert refused(lambda: plan({"metric": "f1", "moed": "max"}, seed=-1), tmp_path / "f.yaml") == [
        "seed: must be greater than or equal to 0, but is -1",
        "search.metric: 'f1' is not stage/split/name, such as finetune/valid/f1_macro",
        "search.moed: no such setting; did you mean mode?",
    ]


# ------------------------------------------------------------------------------------------------- its trials


def test_ended_trials_are_not_run_again_but_failed_ones_are(plan: Plan) -> None:
    search = plan()
    first, second, third, fourth = search.candidates
    assert search.pending() == [first, second, third, fourth] and first.ended() is None
    first.end("finished", "reached its end")
    second.end("stopped", "below the cut")
    third.end("failed", "out of memory")
    again = plan()
    assert [c.id for c in again.pending()] == [third.id, fourth.id]
    ended = again.candidates[1].ended()
    assert ended is not None and (ended.state, ended.reason) == ("stopped", "below the cut")


def test_the_table_is_best_first_and_says_what_each_trial_took(plan: Plan) -> None:
    search = plan()
    report(search.candidates[0], {4: 0.5, 8: 0.6})
    report(search.candidates[1], {4: 0.9, 8: 0.7})
    report(search.candidates[2], {4: math.nan})
    search.candidates[0].end("finished", "reached its end")
    search.candidates[1].end("stopped", "stopped at rung 0.50")
    rows = search.rows()
    assert [row.candidate for row in rows] == search.candidates
    assert [row.value for row in rows] == [0.6, 0.9, None, None], "the best evaluation counts, as its weights are kept"
    assert rows[0].seconds == 2.0 + 4.0 and rows[0].tokens_per_second == (3000 + 8000) / 6.0
    assert rows[0].peak_memory_gb == 0.5
    assert [row.state for row in rows] == ["finished", "stopped", "unfinished", "unfinished"]
    assert rows[1].cells() == ["0.9000", "6s", "1.8k", "0.50", "stopped at rung 0.50"]
    assert rows[0].cells()[-1] == "finished: reached its end"
    assert rows[3].cells() == ["-", "0s", "-", "-", "unfinished: the same command goes on with it"]


def test_a_metric_to_be_small_is_sorted_the_other_way(plan: Plan) -> None:
    search = plan({"metric": "finetune/valid/loss", "mode": "min"})
    for candidate, value in zip(search.candidates, (0.2, 0.6, 0.4, 0.5), strict=True):
        report(candidate, {4: value, 8: value - 0.1})
        candidate.end("finished", "end")
    assert [row.candidate.id for row in search.rows()] == [search.candidates[n].id for n in (1, 3, 2, 0)]
    assert search.rows()[0].value == pytest.approx(1 - 0.6)
    best = search.best()
    assert best is not None and best.id == search.candidates[1].id


def test_the_best_is_one_that_finished(plan: Plan) -> None:
    search = plan()
    for candidate, value in zip(search.candidates, (0.9, 0.8, 0.5, 0.7), strict=True):
        report(candidate, {8: value})
    assert search.best() is None, "none has ended"
    search.candidates[1].end("stopped", "cut")
    assert search.best() is search.candidates[1]
    search.candidates[2].end("finished", "end")
    search.candidates[0].end("failed", "out of memory")
    assert search.best() is search.candidates[2]


def test_best_yaml_is_a_run_of_its_own(plan: Plan, tmp_path: Path) -> None:
    search = plan()
    assert search.write_best() is None and not search.folder.exists()
    report(search.candidates[3], {8: 0.7})
    search.candidates[3].end("finished", "end")
    file = search.write_best()
    assert file == tmp_path / "runs/tiny/best.yaml"
    assert file.read_text().splitlines()[0] == f"# the best of {tmp_path}/f.yaml by {METRIC}: num_layers=2 lr=0.003"
    run = load_run(file)
    assert run.folder == tmp_path / "runs/tiny-best"
    assert (
        run.model_copy(update={"name": search.candidates[3].id, "output_dir": search.folder / "trials"})
        == search.candidates[3].settings
    )


def test_a_folder_is_claimed_once_for_one_base(plan: Plan, tmp_path: Path) -> None:
    search = plan({"trials": None})
    search.claim()
    claimed = read_yaml(tmp_path / "runs/tiny/search.yaml")
    assert claimed["space"] == SPACE and claimed["search"]["metric"] == METRIC and claimed["base"]["name"] == "tiny"
    plan(space={"encoder.num_layers": [1, 2, 3]}).claim()
    assert read_yaml(tmp_path / "runs/tiny/search.yaml")["space"] == {"encoder.num_layers": [1, 2, 3]}, (
        "a space may grow"
    )
    before = (tmp_path / "runs/tiny/search.yaml").read_bytes()
    with pytest.raises(UserError) as error:
        plan(seed=3, precision="fp32").claim()
    folder = tmp_path / "runs/tiny"
    assert (
        str(error.value)
        == f'{folder}: holds a search around another base (seed: 0 -> 3; precision: "auto" -> "fp32"); '
        "give this one another name=..."
    )
    assert (folder / "search.yaml").read_bytes() == before
    plan(seed=3, name="other").claim()


def test_a_claim_over_a_foreign_file_is_refused(plan: Plan, tmp_path: Path) -> None:
    search = plan()
    search.folder.mkdir(parents=True)
    (search.folder / "search.yaml").write_text("base: 3\n")
    with pytest.raises(UserError, match="holds a search around another base"):
        search.claim()


OPEN = {"encoder.num_layers": [1, 2], "stages.finetune.optim.lr": {"log_uniform": [1e-4, 1e-2]}}
TPE = {"sampler": "tpe", "trials": 4}


def propose(search: Search) -> None:
    """As a sampler does, twice."""
    search.claim()
    for layers, lr in ((1, 1e-3), (0, 2e-3)):
        assert search.adopt({"encoder.num_layers": layers, "stages.finetune.optim.lr": lr})


@pytest.mark.parametrize(
    ("space", "constraints", "changed"),
    [
        ({**OPEN, "seed": [0, 1]}, [], "space.seed"),
        ({**OPEN, "encoder.num_layers": [2]}, [], "space.encoder.num_layers"),
        ({**OPEN, "encoder.num_layers": [2, 1]}, [], "space.encoder.num_layers"),
        (OPEN, ["num_layers < 2"], "search.constraints"),
        ({"seed": [0, 1]}, [], "space.encoder.num_layers, space.stages.finetune.optim.lr.log_uniform, space.seed"),
    ],
)
@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_space_in_which_trials_were_proposed_stays_as_it_is(
    plan: Plan, tmp_path: Path, sampler: str, space: dict[str, Any], constraints: list[str], changed: str
) -> None:
    propose(plan(TPE, OPEN))
    kept = {file: file.read_bytes() for file in (tmp_path / "runs/tiny").iterdir()}
    with pytest.raises(UserError) as error:
        plan({**TPE, "sampler": sampler, "constraints": constraints}, space)
    assert str(error.value) == (
        f"{tmp_path}/runs/tiny: its 2 trials were proposed in another space (changed: {changed}; "
        "search.yaml there has the old one); change it back, give this search another name=..., or move the folder away"
    )
    assert {file: file.read_bytes() for file in kept} == kept
    assert plan({**TPE, "constraints": constraints}, space, name="other").candidates == []


def test_proposed_trials_are_found_again_with_what_was_said_of_them(plan: Plan) -> None:
    search = plan(TPE, OPEN)
    propose(search)
    again = plan({**TPE, "trials": 9}, dict(reversed(OPEN.items())))
    assert [one.id for one in again.candidates] == [one.id for one in search.candidates]
    assert again.words == search.words and set(again.words) == {one.id for one in search.candidates}


# ----------------------------------------------------------------------------------------------------- rungs


def test_rungs_are_found_as_they_were(plan: Plan) -> None:
    search = plan({"scheduler": {"kind": "asha", "grace": 0.25, "eta": 2}})
    for number, candidate in enumerate(search.candidates):
        report(candidate, {2: 0.1 * number, 4: 0.2 * number, 8: 0.9})
    rungs, _ = search.rungs()
    assert rungs.places == (0.25, 0.5)
    by_hand = open_rungs(search.settings.scheduler, "max", 0.125, 0.0, 8)
    by_hand.replay(History(c.id, [(0.25, 0.1 * n), (0.5, 0.2 * n)]) for n, c in enumerate(search.candidates))
    assert rungs.state() == by_hand.state()
    assert rungs.state()[0]["values"][search.candidates[2].id] == pytest.approx(0.2)
    assert not rungs.record("new", 0.25, -1.0).keep, "worse than all who came before"


def test_the_default_grace_waits_for_the_latest_thaw_of_any_trial(plan: Plan) -> None:
    space = {"stages.finetune.num_frozen_layers": [0, 1]}
    rungs, warning = plan(space=space, stages__finetune__thaw_at=0.4).rungs()
    assert rungs.places[0] == pytest.approx(0.4 + 0.6 / 3) and warning is None
    unfrozen, _ = plan(space={"seed": [0, 1]}).rungs()
    assert unfrozen.places[0] == pytest.approx(2 / 8), "twice the warm-up of 1 step in 8"
    _, warning = plan({"scheduler": {"kind": "asha", "grace": 1}}, space).rungs()
    assert warning is not None and warning.startswith(
        "search.scheduler.grace: trials are stopped from 0.12 of the stage (step 1 of 8) on"
    )


def test_no_scheduler_has_no_rungs_and_no_warning(plan: Plan) -> None:
    rungs, warning = plan({"scheduler": {"kind": "none"}}).rungs()
    assert rungs.places == () and warning is None


def test_a_stage_counted_in_epochs_is_measured_on_its_text(plan: Plan) -> None:
    search = plan(
        {"scheduler": {"kind": "asha", "grace": 2}, "resources": {"ranks": 1}},
        stages__finetune__steps=None,
        stages__finetune__epochs=2,
    )
    rungs, _ = search.rungs()
    twice = plan({"scheduler": {"kind": "asha", "grace": 2}}, stages__finetune__steps=None, stages__finetune__epochs=4)
    assert 0 < twice.rungs()[0].places[0] < rungs.places[0] < 1
    assert rungs.places[0] == pytest.approx(2 * twice.rungs()[0].places[0], rel=0.2)
    late = plan({"scheduler": {"kind": "asha", "grace": 9}})
    with pytest.raises(
        UserError, match=r"^search\.scheduler\.grace: 9 steps, but the stage has 8, so no trial would be stopped"
    ):
        late.rungs()


# ----------------------------------------------------------------------------------------------------- words


def test_the_table_is_drawn(plan: Plan) -> None:
    from rich.console import Console

    search = plan(
        space={"encoder.attention": [{"kind": "sdpa"}, {"kind": "lsh", "num_hashes": 2}], "encoder.num_layers": [1]}
    )
    report(search.candidates[1], {8: 0.75})
    search.candidates[1].end("finished", "reached its end")
    drawn = io.StringIO()
    Console(file=drawn, width=160).print(table(search))
    lines = drawn.getvalue().splitlines()
    assert lines[0].startswith("tiny: 2 trials, best first")
    head = next(line for line in lines if "attention" in line)
    assert [word in head for word in ("num_layers", METRIC, "time", "tok/s", "GB", "why it ended")] == [True] * 6
    rows = [line for line in lines if "unfinished" in line or "reached its end" in line]
    assert "lsh num_hashes=2" in rows[0] and "0.7500" in rows[0] and "sdpa" in rows[1]
    assert all(candidate.id in row for candidate, row in zip(reversed(search.candidates), rows, strict=True))


def test_a_mistake_in_the_space_is_the_files_whatever_the_command_line_has_said_there(plan: Plan, tmp_path: Path) -> None:
    file = tmp_path / "f.yaml"
    refused(lambda: plan(space={"stages.finetune.optim.lr": [1e-3, -1.0]}), file)
    said = "stages.finetune.optim.lr: must be greater than 0, but is -1.0 (trial lr=-1.0)"
    for words in ((), ("stages.finetune.optim.lr=0.5",), ("encoder.num_layers=1",)):
        assert refused(lambda words=words: plan_search(read_document(file, words)), file) == [said]
    (wrong,) = refused(lambda: plan_search(read_document(file, ["space.stages.finetune.optim.lr=[]"])), file)
    assert wrong.startswith("command line: space.stages.finetune.optim.lr: ")


def test_finished_trials_come_first(plan: Plan) -> None:
    """The best value of one that was stopped is of part of a course; it compares with nothing."""
    search = plan()
    stopped, finished, silent, better = search.candidates
    for candidate, value in ((stopped, 0.9), (finished, 0.5), (better, 0.6)):
        report(candidate, {8: value})
        candidate.end("stopped" if candidate is stopped else "finished", "why")
    assert [row.candidate for row in search.rows()] == [better, finished, stopped, silent]
    assert search.best() is better


def test_brief_values() -> None:
    assert brief({"kind": "lsh", "num_hashes": 2}) == "lsh num_hashes=2"
    assert brief(3e-05) == "3e-05" and brief([1, 2]) == "[1, 2]" and brief(None) == "None"
