"""Deletes every statement of a module, one at a time, and asks the tests whether anybody missed it.

    python -m tests.mutate dstrain/model/attention/favor.py tests/model/attention/test_favor.py ... [--jobs N] [--lines N ...]

Each deletion runs the tests in a child that stops at the first failure; the module's file is never touched. Printed are
the statements that no test missed; the exit status is 1 if there are any. A survivor is a missing test, a line that is
not needed, or one that only makes things faster.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.abc
import importlib.util
import io
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

LIMIT_S = 60
"""A deletion that makes a test run for longer than this has been noticed."""


def statements(tree: ast.Module) -> Iterator[ast.stmt]:
    """What can be deleted: all but imports, definitions, docstrings, bare annotations, assertions, `pass` and `raise`."""
    for node in ast.walk(tree):
        for block in ("body", "orelse"):
            for each in getattr(node, block, []) if not isinstance(node, ast.Lambda | ast.IfExp) else []:
                text = isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant)
                text |= isinstance(each, ast.AnnAssign) and each.value is None
                kept = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef | ast.Assert | ast.Pass | ast.Raise
                if not text and not isinstance(each, kept):
                    yield each


def without(source: str, number: int) -> tuple[ast.Module, ast.stmt]:
    """The module without its statement of that number, and the statement."""
    tree = ast.parse(source)
    victim = list(statements(tree))[number]

    class Delete(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> Any:
            return ast.copy_location(ast.Pass(), victim) if node is victim else super().visit(node)

    return ast.fix_missing_locations(Delete().visit(tree)), victim


class _Mutant(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Puts a changed module in the place of the one of that name."""

    def __init__(self, name: str, path: Path, tree: ast.Module) -> None:
        self.name, self.path, self.tree = name, path, tree

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        return importlib.util.spec_from_file_location(name, self.path, loader=self)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self.tree, str(self.path), "exec"), module.__dict__)


def survives(path: Path, number: int, tests: list[str]) -> bool:
    """Whether the tests still pass without that statement; they run in a forked child, torch already imported."""
    child = os.fork()
    if child == 0:
        os.setsid()
        import pytest

        name = ".".join(path.with_suffix("").parts)
        sys.meta_path.insert(0, _Mutant(name, path, without(path.read_text(), number)[0]))
        quiet = io.StringIO()
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            arguments = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow and not gpu", f"--timeout={LIMIT_S}"]
            status = pytest.main([*arguments, *tests])
        os._exit(0 if status == 0 else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", type=Path)
    parser.add_argument("tests", nargs="+")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--lines", type=int, nargs="+", help="only statements that begin on these lines, say survivors")
    given = parser.parse_args()
    import hypothesis  # noqa: F401  (children inherit what is slow to import)
    import pydantic  # noqa: F401
    import pytest  # noqa: F401
    import torch

    torch.set_num_threads(1)
    source = given.module.read_text()
    every = enumerate(statements(ast.parse(source)))
    chosen = [number for number, victim in every if not given.lines or victim.lineno in given.lines]
    survivors = 0
    with ThreadPoolExecutor(given.jobs) as pool:
        outcomes = pool.map(lambda number: survives(given.module, number, given.tests), chosen)
        for number, alive in zip(chosen, outcomes, strict=True):
            if alive:
                survivors += 1
                victim = without(source, number)[1]
                print(f"{given.module}:{victim.lineno}: nobody missed `{ast.unparse(victim).splitlines()[0]}`", flush=True)
    print(f"{survivors} of {len(chosen)} deletions went unnoticed")
    return int(bool(survivors))


if __name__ == "__main__":
    sys.exit(main())
