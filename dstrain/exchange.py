"""Population based training between run folders: one trial goes on from another's checkpoint, with other settings."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dstrain.checkpoints import FOLDER, standing
from dstrain.run import write_whole
from dstrain.schema import dump_yaml, validate
from dstrain.settings import RunSettings, plain

EXCHANGES_FILE = "exchanges.jsonl"
"""A line per exchange: whose state was taken over, and the settings from then on."""
_ORIGIN = "origin.json"
_BEST = "best.safetensors"


def pack(folder: Path, stage: str, into: Path) -> None:
    """Puts what another trial needs to go on from here into `into`: the stage's newest checkpoint and its best weights.

    Hard links where the file system has them: a checkpoint is never written to once it stands.
    """
    here = folder / "stages" / stage
    (into / _ORIGIN).write_text(json.dumps({"trial": folder.name, "stage": stage}), encoding="utf-8")
    for newest in standing(here / FOLDER)[:1]:
        shutil.copytree(newest, into / FOLDER / newest.name, copy_function=_link)
    if (here / _BEST).exists():
        _link(str(here / _BEST), str(into / _BEST))


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def take_over(folder: Path, run: Mapping[str, Any], pack: Path, changed: Mapping[str, Any]) -> None:
    """Replaces the state of the run in `folder` by a pack's, unless the pack is its own, and writes that down."""
    origin = json.loads((pack / _ORIGIN).read_text(encoding="utf-8"))
    if origin["trial"] == folder.name or not (pack / FOLDER).exists():
        return
    here = folder / "stages" / origin["stage"]
    here.mkdir(parents=True, exist_ok=True)
    draft = here / f"{FOLDER}.draft"
    shutil.rmtree(draft, ignore_errors=True)
    shutil.copytree(pack / FOLDER, draft)
    shutil.rmtree(here / FOLDER, ignore_errors=True)
    draft.rename(here / FOLDER)
    if (pack / _BEST).exists():
        shutil.copy2(pack / _BEST, here / _BEST)
    write_whole(folder / "settings.yaml", dump_yaml({"base": plain(validate(RunSettings, run, str(folder)))}))
    with (folder / EXCHANGES_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"from": origin["trial"], "settings": dict(changed)}) + "\n")


def settings_now(folder: Path) -> dict[str, Any]:
    """The settings that the last exchange left a trial with, by address; empty before the first."""
    file = folder / EXCHANGES_FILE
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return dict(json.loads(lines[-1])["settings"]) if lines else {}
