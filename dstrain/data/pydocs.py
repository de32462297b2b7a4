"""The embedded default corpus: the source and documentation of Python packages that lie on every machine.

A document is one module, its class the package it comes from. What would give the class away for nothing is taken
out: the leading comment (licence and copyright) goes, and the package's own name reads `package`. The same
environment gives the same documents in the same splits, whatever the order of the file system and the time of day.
"""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Iterator
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from dstrain.data.files import Rows
from dstrain.data.labels import Value
from dstrain.schema import UserError

DOCUMENTS_PER_CLASS = 220
BYTES_PER_CLASS = 2_500_000
"""Bounds that keep the classes alike in size; modules are taken in the order of a hash until either is reached."""
_SHORTEST, _LONGEST = 400, 100_000  # characters of a document: from about 100 to about 30 000 tokens
_HELD_OUT = {"valid": 0.15, "test": 0.15}
_CLASSES_WANTED = 6


class _Package(NamedTuple):
    distribution: str
    module: str
    own_names: str


# The names a package goes by in its own text. Short ones count only as a word of their own, also in camel case: `ray`
# is not in `array`, but it is in `RayActor`.
_PACKAGES = (
    _Package("deepspeed", "deepspeed", r"(?i:deep[-_ ]?speed(?:ai|examples)?|microsoft)"),
    _Package("matplotlib", "matplotlib", r"(?i:matplotlib)|(?<![A-Za-z])(?:mpl|pyplot|plt)(?![a-z])"),
    _Package("mlflow", "mlflow", r"(?i:ml[-_ ]?flow|databricks)"),
    _Package("numpy", "numpy", r"(?i:numpy)|(?<![A-Za-z])np(?![a-z])"),
    _Package(
        "ray",
        "ray",
        r"(?<![A-Za-z])ray(?:lets?|s)?(?![a-z])|Ray(?:let)?(?![a-z])|(?<![A-Z])RAY(?![A-Z])|(?i:rllib|anyscale)",
    ),
    _Package("scikit-learn", "sklearn", r"(?i:sklearn|scikit[-_ ]?learn)"),
    _Package("torch", "torch", r"(?i:(?:py)?torch)|(?<![A-Za-z])(?:aten|ATen)(?![a-z])"),
    _Package("", "stdlib", r"(?i:c?python)"),
)
_SKIPPED_FOLDERS = re.compile(
    r"tests?|testing|.*_tests?|_?vendor(?:ed)?|.*third_?party.*|site-packages|dist-packages|__pycache__|generated|_?protos?|"
    r"node_modules|idlelib|lib2to3|static|.*\.dist-info"
)
_SKIPPED_FILES = re.compile(r"test_.*|.*_tests?\.py|.*_pb2(?:_grpc)?\.py|conftest\.py|_?version\.py|.*generated.*")
_GENERATED = re.compile(
    r"(?i)\b(?:auto-?|automatically )?generated (?:by|from|code|file|with)|do not (?:edit|modify)|machine.generated"
)


def identity() -> str:
    """What the corpus of this environment depends on: the versions of the packages it is made of."""
    return " ".join(f"{package.module}=={_version(package)}" for package in _PACKAGES)


def read_pydocs() -> dict[str, Rows]:
    """Splits "train", "valid" and "test" of the installed packages' modules; labels are the packages' names.

    Raises UserError when fewer than six of the packages lie here as source.
    """
    texts: dict[str, list[str]] = {"train": [], **{split: [] for split in _HELD_OUT}}
    labels: dict[str, list[Value]] = {split: [] for split in texts}
    found = []
    for package in _PACKAGES:
        modules = list(_documents(package))
        if modules:
            found.append(package.module)
        for path, text in modules:
            split = _split_of(f"{package.module}/{path}")
            texts[split].append(text)
            labels[split].append(package.module)
    if len(found) < _CLASSES_WANTED:
        raise UserError(
            f"corpus pydocs: needs the source of {_CLASSES_WANTED} packages but found {len(found)} "
            f"({', '.join(found)}); "
            f"install {', '.join(package.distribution for package in _PACKAGES if package.module not in found)}, or "
            "name another corpus"
        )
    return {split: Rows(texts[split], labels[split]) for split in texts}


def _version(package: _Package) -> str:
    if not package.distribution:
        import platform

        return platform.python_version()
    try:
        return version(package.distribution)
    except PackageNotFoundError:
        return "absent"


def _split_of(path: str) -> str:
    place = int.from_bytes(blake2b(f"split {path}".encode(), digest_size=8).digest(), "big") / 2**64
    for split, share in _HELD_OUT.items():
        if place < share:
            return split
        place -= share
    return "train"


def _documents(package: _Package) -> Iterator[tuple[str, str]]:
    """(relative path, text) of the modules chosen for one package."""
    root = _root(package)
    if root is None:
        return
    own_name = re.compile(package.own_names)
    documents = size = 0
    for path in sorted(_modules(root), key=lambda path: blake2b(path.encode(), digest_size=8).digest()):
        text = _document(root / path, own_name)
        if text is None:
            continue
        if documents == DOCUMENTS_PER_CLASS or size + len(text) > BYTES_PER_CLASS:
            return
        documents += 1
        size += len(text)
        yield path, text


def _root(package: _Package) -> Path | None:
    """The folder of a package, found without importing it."""
    if not package.distribution:
        return Path(sysconfig.get_path("stdlib"))
    spec = find_spec(package.module)
    return Path(spec.origin).parent if spec and spec.origin else None


def _modules(root: Path) -> Iterator[str]:
    """Relative paths of a package's own modules, without tests, other people's code and generated files."""
    pending = [root]
    while pending:
        folder = pending.pop()
        for entry in folder.iterdir():
            if entry.suffix == ".py" and not _SKIPPED_FILES.fullmatch(entry.name):
                yield entry.relative_to(root).as_posix()
            elif (
                not entry.suffix
                and not _SKIPPED_FOLDERS.fullmatch(entry.name)
                and entry.is_dir()
                and not entry.is_symlink()
            ):
                pending.append(entry)


def _document(path: Path, own_name: re.Pattern[str]) -> str | None:
    """The masked text of one module, or None when it is generated, undecodable or too short to say anything."""
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    if "\0" in source or _GENERATED.search(source, 0, 2000):
        return None
    text = own_name.sub("package", _without_leading_comment(source)).strip()
    if len(text) < _SHORTEST:
        return None
    return text if len(text) <= _LONGEST else text[: text.rfind("\n", 0, _LONGEST)]


def _without_leading_comment(source: str) -> str:
    lines = source.split("\n")
    first = next(
        (place for place, line in enumerate(lines) if line.strip() and not line.lstrip().startswith("#")), len(lines)
    )
    return "\n".join(lines[first:])
