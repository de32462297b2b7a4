"""What a search leaves to look at: the table's content, and of the pictures what can be told without eyes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib.figure
import pyarrow.parquet as pq
import pytest
from conftest import tiny_run

from dstrain import pictures
from dstrain.pictures import draw_curves, draw_parallel, setting_axis, write_trials
from dstrain.readings import JsonLines, Reading
from dstrain.schema import dump_yaml
from dstrain.search import Candidate, Search, plan_search
from dstrain.settings import read_document

Plan = Callable[..., Search]
GRID = {"encoder.num_layers": [1, 2], "stages.finetune.objective.pooling": ["cls", "mean"]}


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Plans a search of a tiny run over a space; nothing of it is run, so there need be no corpus."""

    def plan(space: dict[str, Any] | None = None, **search: Any) -> Search:
        search = {"metric": "finetune/valid/f1_macro", "scheduler": {"kind": "asha", "grace": 0.25}, **search}
        tree = {"base": tiny_run(tmp_path, tmp_path / "runs"), "space": space or GRID, "search": search}
        (tmp_path / "f.yaml").write_text(dump_yaml(tree), encoding="utf-8")
        return plan_search(read_document(tmp_path / "f.yaml"))

    return plan


def report(search: Search, candidate: Candidate, values: Iterable[float], state: Any = "finished") -> None:
    """Training at steps 2, 4, .. of 8 with an evaluation each, and then the end; a state of None leaves it running."""
    stage, _, name = search.metric
    write = JsonLines(candidate.folder)
    write(Reading("pretrain", "train", 6, 6, 3000, 2.0, {"loss": 5.0, "peak_memory_gb": 0.25}))
    for number, value in enumerate(values, 1):
        at = (2 * number, 8, 2000 * number, 1.0 * number)
        write(Reading(stage, "train", *at, {"loss": 1.0, "peak_memory_gb": 0.5}))
        write(Reading(stage, "valid", *at, {name: value}))
    if state:
        candidate.end(state, f"{state} because")


def filled(search: Search) -> Search:
    """Each trial finished with values that rise by its number."""
    for number, candidate in enumerate(search.candidates):
        report(search, candidate, [0.1 * (number + 1), 0.2, 0.3, 0.1 * (number + 2)])
    return search


class Seen:
    """The figures that were saved, kept for a look at what is in them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.figures: list[matplotlib.figure.Figure] = []
        save = matplotlib.figure.Figure.savefig

        def keep(figure: matplotlib.figure.Figure, *args: Any, **kwargs: Any) -> None:
            self.figures.append(figure)
            save(figure, *args, **kwargs)

        monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)

    @property
    def panel(self) -> Any:
        return self.figures[-1].axes[0]

    def texts(self) -> list[str]:
        """All that is written in the last picture."""
        figure = self.figures[-1]
        found = [text.get_text() for text in (*figure.texts, *self.panel.texts, self.panel.xaxis.label, self.panel.yaxis.label)]
        return [*found, *(text.get_text() for legend in figure.legends for text in legend.get_texts())]

    def lines(self, points: int) -> list[Any]:
        """The lines of so many points."""
        return [line for line in self.panel.lines if len(line.get_xdata()) == points]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    return Seen(monkeypatch)


# ------------------------------------------------------------------------------------------------ the table


def test_a_row_per_trial_with_what_it_changed_and_what_it_came_to(plan: Plan) -> None:
    search = plan()
    first, second, third, _ = search.candidates
    report(search, first, [0.5, 0.7, 0.6, 0.4])
    report(search, second, [0.8, math.nan], "stopped")
    report(search, third, [], "failed")
    third.fault("killed")
    (first.folder / "mlflow.json").write_text('{"run_id": "abc"}')
    file = write_trials(search)
    assert file == search.folder / "trials.parquet"
    table = pq.read_table(file)
    assert table.schema.metadata == {b"dstrain.metric": b"finetune/valid/f1_macro", b"dstrain.mode": b"max"}
    assert table.column_names[:3] == ["id", *GRID]
    rows = {row["id"]: row for row in table.to_pylist()}
    assert list(rows)[:2] == [first.id, second.id] and set(rows) == {c.id for c in search.candidates}
    assert rows[first.id] == {
        "id": first.id, "encoder.num_layers": 1, "stages.finetune.objective.pooling": "cls", "state": "finished",
        "reason": "finished because", "value": 0.7, "last_value": 0.4, "step": 8, "total_steps": 8, "seconds": 6.0,
        "tokens": 11000, "tokens_per_second": 11000 / 6, "peak_memory_gb": 0.5, "attempts": 1, "seed": 0,
        "folder": str(first.folder), "mlflow_run_id": "abc",
    }  # fmt: skip
    assert rows[second.id]["value"] == 0.8 and math.isnan(rows[second.id]["last_value"]) and rows[second.id]["step"] == 4
    assert rows[third.id]["attempts"] == 2 and rows[third.id]["value"] is None and rows[third.id]["step"] is None
    silent = rows[search.candidates[3].id]
    assert silent["state"] == "unfinished" and silent["peak_memory_gb"] is silent["tokens_per_second"] is None


def test_columns_are_typed_and_a_setting_that_is_not_there_is_null(plan: Plan) -> None:
    space = {
        "encoder.attention": [{"kind": "lsh", "num_hashes": 2}],
        "encoder.attention.chunk_size": [16],
        "stages.finetune.optim.lr": [1, 0.5],
        "stages.finetune.corpus.labelled": [True],
    }
    search = plan(space)
    table = pq.read_table(write_trials(search))
    assert {name: str(table.schema.field(name).type) for name in space} == {
        "encoder.attention": "string",
        "encoder.attention.chunk_size": "int64",
        "stages.finetune.optim.lr": "double",
        "stages.finetune.corpus.labelled": "bool",
    }
    assert table.column("encoder.attention").to_pylist() == ["lsh num_hashes=2"] * 2
    features = {"choice": [16], "if": {"encoder.attention.kind": "favor"}}
    search = plan({"encoder.attention.kind": ["sdpa", "favor"], "encoder.attention.nb_features": features})
    table = pq.read_table(write_trials(search))
    assert sorted(table.column("encoder.attention.nb_features").to_pylist(), key=str) == [16, None]


def test_truth_values_beside_numbers_are_text_as_nothing_else_holds_both() -> None:
    assert pictures._column([True, 2, None]).to_pylist() == ["True", "2", None]
    assert str(pictures._column([None, None]).type) == "string"


def test_the_further_seeds_of_the_finalists_are_rows_too(plan: Plan) -> None:
    search = filled(plan(finalists={"top": 1, "seeds": 2}))
    assert len(pq.read_table(write_trials(search))) == 4
    ((first, second),) = search.finalists()
    report(search, second, [0.1, 0.1, 0.1, 0.9])
    rows = pq.read_table(write_trials(search)).to_pylist()
    assert len(rows) == 5 and rows[-1]["id"] == second.id and rows[-1]["seed"] == 1 and rows[-1]["value"] == 0.9
    assert first.id in {row["id"] for row in rows[:4]}


# -------------------------------------------------------------------------------------------- all three files


def test_made_again_they_are_the_same_and_no_draft_stays(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    search = filled(plan())
    made = [make(search) for make in (write_trials, draw_parallel, draw_curves)]
    assert [file and file.name for file in made] == ["trials.parquet", "parallel.png", "curves.png"]
    before = [file.read_bytes() for file in made if file]
    matplotlib.rcParams["axes.facecolor"] = "red"  # as a matplotlibrc of the user's would
    try:
        again = [file.read_bytes() for make in (write_trials, draw_parallel, draw_curves) if (file := make(search))]
    finally:
        matplotlib.rcdefaults()
    assert again == before
    assert before[1][:4] == before[2][:4] == b"\x89PNG"
    assert not list(search.folder.glob("*.draft"))


@pytest.mark.parametrize("draw", [draw_parallel, draw_curves])
def test_a_picture_that_fails_leaves_the_old_one(plan: Plan, draw: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    search = filled(plan())
    file = draw(search)
    before = file.read_bytes()

    def torn(figure: object, path: Path, **words: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", torn)
    with pytest.raises(OSError, match="no space"):
        draw(search)
    assert file.read_bytes() == before and not list(search.folder.glob("*.draft"))


@pytest.mark.parametrize("values", [[], [math.nan, math.nan], [math.inf]])
def test_without_a_value_there_is_no_picture(plan: Plan, values: list[float]) -> None:
    search = plan()
    for candidate in search.candidates[1:]:
        report(search, candidate, values, None)
    assert draw_parallel(search) is None and draw_curves(search) is None
    assert not list(search.folder.glob("*.png"))
    assert len(pq.read_table(write_trials(search))) == 4


# ---------------------------------------------------------------------------------------- parallel coordinates


def test_a_line_per_trial_through_an_axis_per_setting_that_varies(plan: Plan, seen: Seen) -> None:
    draw_parallel(filled(plan({**GRID, "stages.finetune.corpus.labelled": [True]})))
    assert {"num_layers", "pooling", "finetune/valid/f1_macro", "cls", "mean", "1", "2"} <= set(seen.texts())
    assert "labelled" not in seen.texts(), "what does not vary has no axis"
    lines = seen.lines(3)
    assert len(lines) == 4
    ends = sorted(line.get_ydata()[-1] for line in lines)
    assert ends == pytest.approx([0, 0, 0.5, 1]), "best values .3 .3 .4 .5"
    best = max(lines, key=lambda line: line.get_linewidth())
    assert best.get_ydata()[-1] == 1 and sum(best.get_color()[:3]) == min(sum(line.get_color()[:3]) for line in lines)
    assert "best 0.5: num_layers=2 pooling=mean" in seen.figures[-1].get_suptitle()


def test_a_small_metric_is_dark_where_small_is_good(plan: Plan, seen: Seen) -> None:
    search = plan(metric="finetune/valid/loss", mode="min")
    for number, candidate in enumerate(search.candidates):
        report(search, candidate, [3.0, 2.0 + number])
    draw_parallel(search)
    best = max(seen.lines(3), key=lambda line: line.get_linewidth())
    assert best.get_ydata()[-1] == 0
    assert sum(best.get_color()[:3]) == min(sum(line.get_color()[:3]) for line in seen.lines(3))


def test_who_did_not_finish_is_thin_and_who_failed_is_counted(plan: Plan, seen: Seen) -> None:
    search = plan()
    for candidate, state in zip(search.candidates, ("finished", "stopped", "failed", None), strict=True):
        report(search, candidate, [0.5, 0.6], state)
    draw_parallel(search)
    widths = sorted((line.get_linewidth(), line.get_alpha()) for line in seen.lines(3))
    assert widths == [(0.8, 0.4), (0.8, 0.4), (3.0, 0.9)]
    said = next(text for text in seen.texts() if "3 of 4 trials" in text)
    assert "thin: 2" in said and "left out: 1 failed" in said and "without a value" not in said


def test_one_trial_shows_its_settings(plan: Plan, seen: Seen) -> None:
    assert draw_parallel(filled(plan({"encoder.num_layers": [2]}))) and "num_layers" in seen.texts()
    assert len(seen.lines(2)) >= 1


def test_two_settings_of_one_name_are_told_apart(plan: Plan, seen: Seen) -> None:
    draw_parallel(filled(plan({"stages.finetune.optim.lr": [1e-3, 2e-3], "stages.pretrain.optim.lr": [1e-3, 2e-3]})))
    assert {"finetune.optim.lr", "pretrain.optim.lr"} <= set(seen.texts())


def test_few_numbers_have_a_place_each_and_those_who_share_it_are_fanned_out() -> None:
    axis = setting_axis("n", [8, 2, 2, 4], ["2", "4", "8"])
    assert axis.ticks == [(pytest.approx(1 / 6), "2"), (pytest.approx(1 / 2), "4"), (pytest.approx(5 / 6), "8")]
    assert axis.places[0] == pytest.approx(5 / 6) and axis.places[3] == pytest.approx(1 / 2)
    assert axis.places[1] > 1 / 6 > axis.places[2], "the better one lies higher"


def test_words_stand_in_the_order_of_the_space() -> None:
    axis = setting_axis("kind", ["b", True, None], ["None", "b", "True", "c"])
    assert [word for _, word in axis.ticks] == ["None", "b", "True"]


def test_many_words_are_not_all_written() -> None:
    words = [f"w{number}" for number in range(100)]
    assert len(setting_axis("path", words, words).ticks) <= pictures.MOST_TICKS


def test_many_numbers_have_a_scale() -> None:
    rates = [10 ** (-5 + number / 10) for number in range(31)]
    axis = setting_axis("lr", rates, [])
    assert axis.places == pytest.approx([number / 30 for number in range(31)]), "evenly drawn on a log scale, evenly spread"
    assert "0.0001" in [word for _, word in axis.ticks]
    shares = [0.001 + number / 60 for number in range(31)]
    linear = setting_axis("dropout", shares, [])
    assert linear.places[15] == pytest.approx(0.5), "a wide range alone makes no log scale"
    assert all(0 <= place <= 1 for place, _ in [*axis.ticks, *linear.ticks])
    layers = setting_axis("layers", list(range(1, 13)), [])
    assert all(word.isdigit() for _, word in layers.ticks)


@pytest.mark.parametrize("count", [3, 20])
def test_trials_without_the_setting_pass_below_its_axis(count: int) -> None:
    values = [*(float(n + 1) for n in range(count)), pictures._ABSENT]
    axis = setting_axis("lr", values, [])
    assert axis.ticks[0] == (pictures._BELOW, "not set") and axis.places[-1] == pictures._BELOW
    assert all(place >= 0 for place in axis.places[:-1])


# ------------------------------------------------------------------------------------------- learning curves


def test_a_line_per_trial_over_the_share_of_the_stage_with_the_rungs(plan: Plan, seen: Seen) -> None:
    search = filled(plan())
    draw_curves(search)
    lines = seen.lines(4)
    assert len(lines) == 4 and all(list(line.get_xdata()) == [0.25, 0.5, 0.75, 1.0] for line in lines)
    best = max(lines, key=lambda line: line.get_linewidth())
    assert list(best.get_ydata()) == pytest.approx([0.4, 0.2, 0.3, 0.5])
    rungs = [line.get_xdata()[0] for line in seen.panel.lines if line.get_linestyle() == ":"]
    assert rungs == [0.25, 0.75] == list(search.rungs()[0].places)
    legend = [text.get_text() for text in seen.figures[-1].legends[0].get_texts()]
    assert legend[0] == "best 0.5: num_layers=2 pooling=mean" and "0.3: num_layers=1 pooling=cls" in legend
    assert legend[-1] == "rungs at 0.25, 0.75 of the stage"
    (above,) = seen.panel.child_axes
    assert above.get_xlabel() == "optimizer steps" and above.get_xlim() == pytest.approx((0, 8.08))


def test_without_rungs_none_are_marked(plan: Plan, seen: Seen) -> None:
    draw_curves(filled(plan(scheduler={"kind": "none"})))
    assert not [line for line in seen.panel.lines if line.get_linestyle() == ":"]
    assert not [text for text in seen.texts() if "rung" in text]


def test_ends_are_marked_where_the_last_number_was(plan: Plan, seen: Seen) -> None:
    search = plan()
    first, second, third, fourth = search.candidates
    report(search, first, [0.5, 0.6], "stopped")
    report(search, second, [0.9, 0.95, math.nan], "failed")
    report(search, third, [0.1, 0.2, 0.3, 0.4])
    report(search, fourth, [0.2], None)
    draw_curves(search)
    marks = {line.get_marker(): (line.get_xdata()[0], line.get_ydata()[0]) for line in seen.lines(1)}
    assert marks == {"x": (0.5, 0.6), "v": (0.5, 0.95), ".": (0.25, 0.2)}, "one evaluation alone is a dot"
    legend = [text.get_text() for text in seen.figures[-1].legends[0].get_texts()]
    assert legend[0] == "best 0.4: num_layers=2 pooling=cls", "the winner first: it came to its end"
    assert legend[3] == "0.95: num_layers=1 pooling=mean", "a failed trial last, however good it was"
    assert {"1 stopped early", "1 failed"} <= set(legend)


@pytest.mark.parametrize(
    ("space", "search"),
    [({"encoder.num_layers": list(range(1, 14))}, {}), ({"encoder.num_layers": [1, 2]}, {"seeds": [1, 2, 3]})],
)
def test_of_many_trials_and_of_several_seeds_the_best_three_are_named(
    plan: Plan, seen: Seen, space: dict[str, Any], search: dict[str, Any]
) -> None:
    planned = filled(plan(space, **search))
    draw_curves(planned)
    legend = [text.get_text() for text in seen.figures[-1].legends[0].get_texts()]
    assert sum("num_layers" in text for text in legend) == 3 and f"{len(planned.candidates) - 3} others" in legend
    assert len({line.get_color() for line in seen.lines(4)}) == 4


def test_a_loss_that_blew_up_does_not_flatten_the_others(plan: Plan, seen: Seen) -> None:
    search = plan(metric="finetune/valid/loss", mode="min")
    for number, candidate in enumerate(search.candidates):
        report(search, candidate, [2.0, 1e6 if number == 0 else 1.5, 1.4, 1.3])
    draw_curves(search)
    assert seen.panel.get_yscale() == "log"


def test_stages_of_different_lengths_say_whose_steps_are_above(plan: Plan, seen: Seen) -> None:
    search = plan()
    filled(search)
    longer = search.candidates[0]
    JsonLines(longer.folder)(Reading("finetune", "valid", 10, 10, 1, 1.0, {"f1_macro": 0.1}))
    draw_curves(search)
    (above,) = seen.panel.child_axes
    assert "of the first trial named below" in above.get_xlabel()


def test_the_best_finalist_is_told_with_its_spread(plan: Plan, seen: Seen) -> None:
    search = filled(plan(finalists={"top": 1, "seeds": 2}))
    report(search, search.finalists()[0][1], [0.1, 0.1, 0.1, 0.7])
    draw_curves(search)
    title = seen.figures[-1].get_suptitle()
    assert "best finalist 0.6 ± 0.14 over 2 seeds: num_layers=2 pooling=mean" in title


def test_signs_of_mathematics_in_a_setting_are_written_as_they_are(plan: Plan) -> None:
    """matplotlib would take what stands between two $ for TeX, and fail."""
    search = filled(plan({"vocabulary.path": ["a$\\frac$", "b$x_$"]}))
    assert draw_curves(search) and draw_parallel(search)
