"""Whether two run folders tell the same story to the last bit, apart from clocks: the first difference, in words."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dstrain.readings import Reading, read_readings

CLOCKS = {"tokens_per_second", "peak_memory_gb", "seconds"}
"""Figures that no two runs have in common."""
CLOCK_SPLITS = {"system"}


def differences(whole: Path, cut: Path) -> Iterator[str]:
    """Each difference between the folder of an undisturbed run and that of a disturbed one; none is what is wanted.

    Both hold `NAME/`, their run folder, `tensors/`, what the engines held at each stage's end, and `mlflow.db` if tracked.
    """
    yield from compare_readings(whole / "run", cut / "run")
    for file in sorted((whole / "run").glob("stages/*/best.safetensors")):
        yield from compare_tensors(file, cut / "run" / file.relative_to(whole / "run"))
    for file in sorted((whole / "tensors").glob("*.safetensors")):
        yield from compare_tensors(file, cut / "tensors" / file.name)
    for name in ("outcome.json", "settings.yaml", "data.json"):
        mine, yours = (folder / "run" / name for folder in (whole, cut))
        if mine.read_bytes().replace(bytes(whole), b"") != yours.read_bytes().replace(bytes(cut), b""):
            yield f"{name} differs"
    if (whole / "mlflow.db").exists():
        yield from compare_tracking(whole / "mlflow.db", cut / "mlflow.db")


def compare_readings(whole: Path, cut: Path) -> Iterator[str]:
    """The same readings in the same order, none doubled, none missing, every figure equal but clocks."""
    mine, yours = _told(read_readings(whole)), _told(read_readings(cut))
    keys, others = [key for key, _ in mine], [key for key, _ in yours]
    for key, count in Counter(others).items():
        if count > 1:
            yield f"readings: {key} stands there {count} times"
    for missing in [key for key in keys if key not in set(others)]:
        yield f"readings: {missing} is missing"
    for extra in [key for key in others if key not in set(keys)]:
        yield f"readings: {extra} is one too many"
    if keys == others:
        for (key, figures), (_, found) in zip(mine, yours, strict=True):
            for name in figures.keys() | found.keys():
                if figures.get(name) != found.get(name):
                    yield f"readings: {key} {name} is {found.get(name)!r} and not {figures.get(name)!r}"
    elif sorted(keys) == sorted(others):
        yield "readings: stand in another order"


def _told(readings: list[Reading]) -> list[tuple[tuple[Any, ...], dict[str, str]]]:
    return [
        (
            (one.stage, one.split, one.step, one.total_steps, one.tokens),
            {name: repr(value) for name, value in one.values.items() if name not in CLOCKS},
        )
        for one in readings
        if one.split not in CLOCK_SPLITS
    ]


def compare_tensors(whole: Path, cut: Path) -> Iterator[str]:
    """The same tensors, bit for bit."""
    from safetensors.numpy import load_file

    name = f"{whole.parent.name}/{whole.name}"
    if not cut.exists():
        yield f"{name}: was not written"
        return
    try:
        mine, yours = load_file(whole), load_file(cut)
    except (KeyError, TypeError):  # numpy has no bf16
        from safetensors.torch import load_file as load_torch

        mine, yours = ({key: value.float().numpy() for key, value in load_torch(file).items()} for file in (whole, cut))
    for key in sorted(mine.keys() ^ yours.keys()):
        yield f"{name}: {key} is in one of them only"
    for key in sorted(mine.keys() & yours.keys()):
        if mine[key].shape != yours[key].shape:
            yield f"{name}: {key} has shape {yours[key].shape} and not {mine[key].shape}"
        elif mine[key].tobytes() != yours[key].tobytes():
            apart = np.abs(mine[key].astype(np.float64) - yours[key].astype(np.float64)).max()
            yield f"{name}: {key} differs by up to {apart:.3g}"


def compare_tracking(whole: Path, cut: Path) -> Iterator[str]:
    """One MLflow run, finished, with every metric once per step and the same values."""
    mine, yours = _tracked(whole), _tracked(cut)
    if len(yours) != 1:
        yield f"MLflow: {len(yours)} runs in place of one"
        return
    [(status, metrics)], [(found_status, found)] = mine, yours
    if status != found_status:
        yield f"MLflow: the run is {found_status} and not {status}"
    doubled = [key for key, count in Counter((key, step) for key, step, _ in found).items() if count > 1]
    yield from (f"MLflow: {key} has step {step} twice" for key, step in doubled)
    apart = {row for row in {*metrics} ^ {*found} if row[0].split("/")[-1] not in CLOCKS and row[0].split("/")[1:2] != ["system"]}
    yield from (f"MLflow: {row} is in one of them only" for row in sorted(apart))


def _tracked(database: Path) -> list[tuple[str, list[tuple[str, int, str]]]]:
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as store:
        runs = store.execute("select run_uuid, status from runs").fetchall()
        return [
            (status, [(key, step, repr(value)) for key, step, value in store.execute(
                "select key, step, case when is_nan then 'nan' else value end from metrics where run_uuid = ?", (run,)
            )])
            for run, status in runs
        ]  # fmt: skip
