"""The rules of the house that a machine can hold: who may import whom, who may say what, and what nothing may be called."""

from __future__ import annotations

import ast
import importlib.metadata
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "dstrain"
FILES = sorted(PACKAGE.rglob("*.py"))

# An arrow may only point to a lower number; arrows between equals only inside one folder.
LEVELS = [
    {"schema", "packed"},
    {
        "stopping", "readings", "evidence", "ledger", "ds_plan", "optim", "precision", "rungs", "space", "data", "model",
        "splitting", "diagnosis", "partitions", "uncompiled", "memory_limit",
    },
    {"metrics", "engine", "tracking", "vitals"},
    {"objective", "healing", "lifeline", "checkpoints"},
    {"loop"},
    {"settings"},
    {"regroup", "texts"},
    {"run"},
    {"consolidate"},
    {"card"},
    {"search", "export"},
    {"agenda", "preparation", "exchange", "pictures", "predict"},
    {"desk"},
    {"train", "tune", "data door"},
]
OWNERS = {"deepspeed": "engine.py", "ray": "tune", "mlflow": "tracking.py"}


def part(path: Path) -> str:
    """`dstrain/data/files.py` belongs to `data`, `dstrain/run.py` to `run`.

    `python -m dstrain.data` is a door that lies in a package of the lowest layers because of its name: it reads whole
    runs and searches to find their text, of which no other file in data/ may know.
    """
    if path == PACKAGE / "data" / "__main__.py":
        return "data door"
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def level(name: str) -> int:
    return next(number for number, names in enumerate(LEVELS) if name in names)


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Dotted names of all modules that a file imports; those under TYPE_CHECKING are no imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found: set[str] = set()
    for node in nodes:
        if id(node) in guarded:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: a relative import"
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    here = part(path)
    if here == "__init__":
        assert not imports(path)
        return
    for name in imports(path):
        if not name.startswith("dstrain."):
            continue
        there = name.split(".")[1]
        if there == here:
            continue
        assert level(there) < level(here), f"{path.name} imports {name}, which is not below it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_framework_is_said_by_one_module(path: Path) -> None:
    for name in imports(path):
        owner = OWNERS.get(name.split(".")[0])
        assert owner in (None, path.name, part(path)), f"{path} imports {name}; only {owner} may"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_heavy_imports_are_late(path: Path) -> None:
    if part(path) == "tune" and path.name != "__main__.py":
        return  # the door imports these modules late, as a whole
    heavy = {"deepspeed", "ray", "mlflow", "datasets", "sklearn", "matplotlib", "transformers", "pandas"}
    assert not {name.split(".")[0] for name in imports(path, top_level_only=True)} & heavy


def test_the_doors_import_nothing_but_the_standard_library_to_answer_help() -> None:
    for door in ("train.py", "tune/__main__.py", "predict.py", "data/__main__.py"):
        names = {name.split(".")[0] for name in imports(PACKAGE / door, top_level_only=True)}
        assert names <= set(sys.stdlib_module_names), names - set(sys.stdlib_module_names)


def test_no_module_takes_the_name_of_another() -> None:
    """`deepspeed dstrain/train.py` puts dstrain/ first on sys.path: a types.py there would break `import torch`."""
    taken = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    ours = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if not path.name.startswith("_")}
    assert not ours & taken - {"dstrain"}


def test_nothing_is_called_utils() -> None:
    words = ("util", "helper", "common", "manager")
    for path in (*FILES, *ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/*.py")):
        assert not any(word in path.stem for word in words), path


def test_every_module_is_a_level() -> None:
    assert {part(path) for path in FILES} - {"__init__"} == set().union(*LEVELS)


def test_no_pickle_is_read() -> None:
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        for word in (
            "pickle.load",
            "weights_only=False",
            "allow_pickle=True",
            "yaml.unsafe_load",
            "trust_remote_code=True",
            "shell=True",
        ):
            assert word not in text, f"{path}: {word}"


def test_the_library_leaves_the_global_generators_alone() -> None:
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                said = ast.unparse(node.func)
                assert said not in ("torch.manual_seed", "random.seed", "np.random.seed", "numpy.random.seed"), (
                    f"{path}:{node.lineno}"
                )
