"""The replay of learning curves: hand-made grids, and no regret on any published grid at the shipped defaults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.replay_search import main, read_grids, replay, total
from dstrain.rungs import AshaSettings

NOTES = Path(__file__).resolve().parents[2] / "shared" / "notes"
published = pytest.mark.skipif(
    not (NOTES / "curves.parquet").exists(), reason="the published curves do not lie beside the project"
)


def write(
    folder: Path, curves: dict[str, list[float]], frozen: set[str], metric: str = "eval/f1_macro"
) -> tuple[Path, Path]:
    """A grid of runs with one value per epoch, an hour each."""
    epochs = len(next(iter(curves.values())))
    runs = [
        {
            "experiment": "E",
            "stage": "finetune",
            "dataset": "d",
            "run_id": name,
            "freeze_n_layers": int(name in frozen),
            "freeze_epochs": epochs // 2,
            "epochs": epochs,
        }
        for name in curves
    ]
    rows = [
        {"run_id": name, "epoch": epoch, "elapsed_s": 3600.0 * epoch, "metric": metric, "value": value}
        for name, line in curves.items()
        for epoch, value in enumerate(line, 1)
    ]
    paths = folder / "curves.parquet", folder / "runs.parquet"
    for path, content in zip(paths, (rows, runs), strict=True):
        pq.write_table(pa.Table.from_pylist(content), path)
    return paths


@pytest.fixture
def overtaken(tmp_path: Path) -> tuple[Path, Path]:
    """Ten trials; one is last until its layers thaw after 5 of 10 epochs, and then wins."""
    plain = {f"plain{n}": [0.5 + n / 100 + epoch / 100 for epoch in range(10)] for n in range(9)}
    late = [0.1, 0.1, 0.1, 0.1, 0.1, 0.6, 0.95, 0.96, 0.97, 0.98]
    return write(tmp_path, {**plain, "frozen": late}, {"frozen"})


def test_defaults_wait_for_the_thaw_and_an_early_cut_pays_for_it(overtaken: tuple[Path, Path]) -> None:
    (grid,) = read_grids(*overtaken)
    row = replay(grid, AshaSettings(), orders=50)
    assert (row.grid, row.trials, row.regret, row.regret_unit) == ("E/finetune/d", 10, 0.0, "F1 points")
    assert row.rungs == pytest.approx((2 / 3,))
    assert row.gpu_hours == pytest.approx(100)
    assert 0.1 < row.saved_share < 0.3  # at epoch 7 at the earliest, and a third stays
    early = replay(grid, AshaSettings(grace=1), orders=50)
    assert early.saved_share > row.saved_share
    assert early.regret == pytest.approx(100 * (0.98 - 0.67))


def test_one_worker_in_a_known_order_by_hand(tmp_path: Path) -> None:
    (grid,) = read_grids(
        *write(
            tmp_path,
            {name: [loss] * 10 for name, loss in zip("abcd", (1.0, 2.0, 3.0, 4.0), strict=True)},
            set(),
            "eval/loss",
        )
    )
    from benchmarks.replay_search import search

    outcome = search(grid, AshaSettings(rungs=(0.5,)), 1, grid.curves)
    # a and b are the best two, c and d stop at epoch 5 of 10
    assert outcome == (3600 * (10 + 10 + 5 + 5), 1.0, 0.5)


def test_the_same_seed_gives_the_same_row_and_workers_change_it(overtaken: tuple[Path, Path]) -> None:
    (grid,) = read_grids(*overtaken)
    assert replay(grid, AshaSettings(), 4, 20, 1) == replay(grid, AshaSettings(), 4, 20, 1)
    assert replay(grid, AshaSettings(), 1, 20, 1).saved_share != replay(grid, AshaSettings(), 8, 20, 1).saved_share


def test_command_line_prints_rows_as_text_and_json(
    overtaken: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--curves", str(overtaken[0]), "--runs", str(overtaken[1]), "--orders", "5"]
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert "E/finetune/d" in said.out and "all GPU time" in said.out and not said.err
    assert main([*arguments, "--json", "--scheduler", "{grace: 0.1}"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)[0]["trials"] == 10
    assert "E/finetune/d: search.scheduler.grace: trials are stopped from 0.1" in said.err


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--scheduler", "{grace: 2.5}"], "grace: 2.5 is neither"),
        (["--workers", "0"], "--workers 0"),
        (["--curves", "none.parquet"], "none.parquet: not readable as parquet"),
    ],
)
def test_mistakes_are_sentences(
    overtaken: tuple[Path, Path], more: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--curves", str(overtaken[0]), "--runs", str(overtaken[1]), *more]) == 2
    assert sentence in capsys.readouterr().err


def change(path: Path, rows: Any) -> None:
    pq.write_table(rows(pq.read_table(path)), path)


def test_files_that_hold_no_grid_are_sentences(
    overtaken: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    curves, runs = overtaken
    arguments = ["--curves", str(curves), "--runs", str(runs)]
    change(curves, lambda table: table.slice(10))  # the first run has lost its curve
    assert main(arguments) == 2
    assert "share none of the metrics" in capsys.readouterr().err
    change(runs, lambda table: table.slice(0, 1))
    assert main(arguments) == 2
    assert "nothing to search" in capsys.readouterr().err
    change(runs, lambda table: table.drop_columns(["epochs"]))
    assert main(arguments) == 2
    assert "has no column epochs" in capsys.readouterr().err


@published
@pytest.mark.parametrize("workers", [1, 2, 4, 8])
def test_no_regret_on_any_published_grid_at_the_shipped_defaults(workers: int) -> None:
    grids = read_grids(NOTES / "curves.parquet", NOTES / "runs.parquet")
    assert {grid.name for grid in grids} == {
        "E1/finetune/arxiv",
        *(f"E2/{stage}/{data}" for stage in ("finetune", "tapt") for data in ("arxiv", "hyperpartisan", "imdb")),
        "E2/pretrain/wikipedia",
    }
    rows = [replay(grid, AshaSettings(), workers, orders=60) for grid in grids]
    assert {row.grid: row.regret for row in rows} == {row.grid: 0.0 for row in rows}
    assert total(rows) > 0.17


@published
def test_what_was_not_shipped_does_lose() -> None:
    """The same replay tells good settings from bad ones: each of these throws a published winner away."""
    grids = {grid.name: grid for grid in read_grids(NOTES / "curves.parquet", NOTES / "runs.parquet")}
    assert replay(grids["E1/finetune/arxiv"], AshaSettings(grace=1), orders=60).regret > 1
    assert replay(grids["E2/finetune/hyperpartisan"], AshaSettings(grace=0.5), orders=60).regret > 1
