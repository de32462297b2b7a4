"""What every settings class is made of: the base class, the YAML reader, and the text of an error.

A settings class stands directly above what it configures. This module turns a YAML tree into such an object, or into
one message that lists every mistake as `address: what is wrong, the value, a way out`.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticUndefined


class UserError(ValueError):
    """A mistake of the person at the keyboard, told in one sentence per mistake; a door prints it and exits with 2.

    Quoted from files, it may hold anything; what a terminal would obey or could not show is escaped.
    """

    def __init__(self, sentences: str) -> None:
        super().__init__("\n".join(map(visible, sentences.split("\n"))))


def visible(text: str) -> str:
    """The text in one line: control characters, line breaks and half surrogates as the escapes that stand for them."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


class Settings(BaseModel):
    """Base of all settings: unknown keys are refused, values are frozen, docstrings under fields become `--explain`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _true_is_no_number(cls, given: Any) -> Any:
        """pydantic takes `true` for a 1; as a word it is refused where a number is asked for, and told as a mistake."""
        if not isinstance(given, dict):
            return given
        counts = {name for name, field in cls.model_fields.items() if {int, float} & {*_arguments(field.annotation)}}
        return {
            name: str(value).lower() if isinstance(value, bool) and name in counts else value
            for name, value in given.items()
        }


def setting(default: Any = ..., *, unit: str = "", **bounds: Any) -> Any:
    """A field with a unit (shown by `--explain`) and pydantic's bounds (`gt`, `ge`, `lt`, `le`, `min_length`)."""
    return Field(default, json_schema_extra={"unit": unit} if unit else None, **bounds)


# ---------------------------------------------------------------------------------------------------- YAML


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 numbers (`3e-4` is a float, `on` is a word) that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *defaults`
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (list, dict)):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice; keep one of them", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_int(self, node: yaml.ScalarNode) -> int:
        """YAML 1.2: 010 is ten, 0o10 eight and 0x10 sixteen."""
        word = node.value.replace("_", "")
        return int(word, 0 if word[:2].lower() in ("0x", "0o") else 10)


_INT, _FLOAT, _BOOL = (f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "bool"))
_WORDS = {
    _INT: (r"[-+]?\d[\d_]*|0x[0-9a-fA-F]+|0o[0-7]+", "-+0123456789"),
    _FLOAT: (
        r"[-+]?(?:\d[\d_]*\.[\d_]*|\.\d[\d_]*|\d[\d_]*(?=[eE]))(?:[eE][-+]?\d+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    _BOOL: (r"true|True|TRUE|false|False|FALSE", "tTfF"),
}
"""What YAML 1.2 (and PyYAML not) takes for a number or a truth value, and the characters these begin with."""
_YAML_1_1 = (_INT, _FLOAT, _BOOL, "tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:value")

_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _YAML_1_1]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Dumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or 1.2 would take for something else, so that any reader reads it back."""

    def represent_text(self, text: str) -> yaml.Node:
        """Unicode's line breaks are escaped; PyYAML would write them as they are and read back a space."""
        return self.represent_scalar(
            "tag:yaml.org,2002:str", text, style='"' if set(text) & set("\x85\u2028\u2029") else None
        )


_Loader.add_constructor(_INT, _Loader.construct_int)
_Dumper.add_representer(str, _Dumper.represent_text)
for _tag_name, (_pattern, _first) in _WORDS.items():
    for _reader_or_writer in (_Loader, _Dumper):
        _reader_or_writer.add_implicit_resolver(_tag_name, re.compile(f"^(?:{_pattern})$"), list(_first))


def parse_yaml(text: str, source: str) -> Any:
    """The value that `text` stands for; `source` names it in the error. Raises UserError."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        if problem.startswith("but "):  # the second half of PyYAML's sentence
            problem = f"{getattr(error, 'context', None)}, {problem}"
        raise UserError(f"{source}:{place} not readable as YAML: {problem}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError when there is no such file or it holds something else."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of a YAML file") from None
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds {_name_of(tree)}; a file of settings is a mapping, such as `base: ...`")
    return tree


def dump_yaml(tree: Mapping[str, Any]) -> str:
    """YAML text that `parse_yaml` reads back as the same tree, keys in the order given."""
    return yaml.dump(_plain(tree), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value


# ------------------------------------------------------------------------------------------- dotted addresses


def set_path(tree: dict[str, Any], address: str, value: Any) -> None:
    """Sets `a.b.c` in a nested mapping, making the levels that are missing.

    A new `kind` starts its mapping afresh, because the old kind's keys mean nothing to the new one. The levels on the way
    are copied first: with YAML anchors one mapping may stand in several places. Raises UserError when a level is not a
    mapping.
    """
    *parents, last = address.split(".")
    for depth, parent in enumerate(parents):
        inner = tree.get(parent, {})
        if not isinstance(inner, dict):
            inside = ".".join(parents[: depth + 1])
            # One mistake however many addresses lie below it: the same sentence for each.
            raise UserError(
                f"{inside}: is {_short(inner)}, which has no settings inside; set {inside} itself, or name another"
            )
        copied = dict(inner)
        tree[parent] = copied
        tree = copied
    if last == "kind" and tree.get("kind", value) != value:
        tree.clear()
    tree[last] = value


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        address = f"{prefix}{key}"
        flat.update(flatten(value, f"{address}.") if isinstance(value, Mapping) and value else {address: value})
    return flat


def split_override(text: str) -> tuple[str, Any]:
    """`key=value` of a command line as (address, value); the value is read as YAML."""
    address, equals, value = text.partition("=")
    if not equals or not address.strip():
        raise UserError(f"{text!r}: an override is written key=value, such as stages.finetune.optim.lr=3e-4")
    return address.strip(), parse_yaml(value, address)


# --------------------------------------------------------------------------------------------------- errors


class Problem(NamedTuple):
    """One mistake: where it stands and what to do about it."""

    address: str
    sentence: str


def complain(source: str, problems: Iterable[Problem]) -> UserError:
    """All problems in one error, a line each: `file: address: sentence`."""
    return UserError(
        "\n".join(
            f"{source}: {visible(p.address)}: {p.sentence}" if p.address else f"{source}: {p.sentence}" for p in problems
        )
    )


def together(*attempts: Callable[[], Any]) -> list[Any]:
    """The result of each attempt; when some raise UserError, one UserError with each of their sentences once."""
    results: list[Any] = []
    sentences: list[str] = []
    for attempt in attempts:
        try:
            results.append(attempt())
        except UserError as error:
            sentences += str(error).splitlines()
    if sentences:
        raise UserError("\n".join(dict.fromkeys(sentences)))
    return results


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?`, or the list of what there is when nothing is near."""
    names = sorted(set(known))
    listed = f"; there {'is' if len(names) == 1 else 'are'} {', '.join(names)}" if names else ""
    return _nearest(word, names) or listed


def _nearest(word: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(word), list(names), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


S = typing.TypeVar("S", bound=Settings)


def validate(kind: type[S], tree: Mapping[str, Any], source: str, prefix: str = "") -> S:
    """The settings object of a tree. Raises UserError that lists every mistake with its address."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        found = (_problem(kind, item, prefix) for item in error.errors(include_url=False))
        raise complain(source, unique(line for problem in found for line in _lines(problem))) from None


def _lines(problem: Problem) -> list[Problem]:
    """A validator that sees several mistakes raises them as lines, that of a whole class with their addresses."""
    if problem.address.endswith("."):  # a prefix and nothing else
        return [Problem("", f"{problem.address}{line}") for line in problem.sentence.splitlines()]
    return [Problem(problem.address, line) for line in problem.sentence.splitlines()]


def unique(problems: Iterable[Problem]) -> list[Problem]:
    """The problems in order, each once (a union reports one mistake for every branch it tried)."""
    return list(dict.fromkeys(problems))


_MUST_BE = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "a text (put it in quotes)",
    "path": "a path (put it in quotes)",
    "dict": "a mapping",
    "tuple": "a list",
    "list": "a list",
}
"""In words of YAML, what pydantic's errors `int_type`, `int_parsing`, `int_from_float`, ... ask for."""


def _problem(root: type[Settings], error: ErrorDetails, prefix: str) -> Problem:
    words, owner = _locate(root, error["loc"])
    address = prefix + ".".join(words)
    value, kind, context = error["input"], error["type"], error.get("ctx", {})
    field = owner.model_fields.get(words[-1]) if owner and words else None
    tags = sorted(tag for tag, _ in kinds_of(field.annotation)) if field else []
    if kind in ("extra_forbidden", "invalid_key"):
        known = owner.model_fields if owner else ()
        return Problem(address, f"no such setting{did_you_mean(words[-1], known)}")
    if kind == "missing":
        return Problem(address, "is missing and has no default; give it a value")
    if kind == "union_tag_invalid":
        return Problem(
            f"{address}.kind", f"{context['tag']!r} is not a kind there is{did_you_mean(context['tag'], tags)}"
        )
    if kind == "union_tag_not_found":
        return Problem(
            f"{address}.kind", f"is missing: {_short(value)} does not say which kind it is; there are {', '.join(tags)}"
        )
    if kind == "model_attributes_type":
        example = value if value in tags else tags[0]
        return Problem(
            address, f"is {_short(value)}; it takes a mapping that says its kind, such as {{kind: {example}}}"
        )
    if kind == "literal_error":
        choices = [choice.strip(" '") for choice in re.split(r",| or ", str(context["expected"]))]
        near = _nearest(value, choices) if isinstance(value, str) else ""
        return Problem(address, f"{_short(value)} is not one of {context['expected']}{near}")
    if kind == "value_error":
        return Problem(address, str(context["error"]))
    if kind == "model_type":
        return Problem(address, f"is {_short(value)}; it takes a mapping of settings")
    return Problem(address, f"must {_asked(kind, error['msg'])}, but is {_short(value)}")


def _asked(kind: str, said: str) -> str:
    what, _, why = kind.partition("_")
    if what in _MUST_BE and why in ("type", "parsing", "from_float"):
        return f"be {_MUST_BE[what]}"
    return said.rpartition(" should ")[2].partition(" after validation")[
        0
    ]  # "Tuple should have at most 2 items after ..."


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _name_of(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def _locate(root: type[Settings], location: tuple[int | str, ...]) -> tuple[list[str], type[Settings] | None]:
    """The address without pydantic's union tags, and the class whose field the last word should be."""
    words: list[str] = []
    here: Any = root
    owner: type[Settings] | None = root
    for word in location:
        if word == "[key]":  # pydantic's way to say that the key itself is wrong
            break
        members = dict(kinds_of(here))
        if len(members) > 1 and str(word) in members:  # a union's tag is not part of what the user wrote
            here = owner = members[str(word)]
            continue
        words.append(str(word))
        plain = settings_class(here)
        if plain:
            owner = plain
            field = plain.model_fields.get(str(word))
            here = field.annotation if field else None
        else:
            here = item_of(here)
            owner = settings_class(here)
    return words, owner


# -------------------------------------------------------------------------------------- reading the classes


def _arguments(annotation: Any) -> tuple[Any, ...]:
    """What a union or Annotated is made of, without None; any other type alone."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _arguments(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return tuple(
            part
            for argument in typing.get_args(annotation)
            if argument is not type(None)
            for part in _arguments(argument)
        )
    return (annotation,)


def settings_class(annotation: Any) -> type[Settings] | None:
    """The one Settings class an annotation holds, or None (plain values, unions of several)."""
    found = [part for part in _arguments(annotation) if isinstance(part, type) and issubclass(part, Settings)]
    return found[0] if len(found) == 1 else None


def item_of(annotation: Any) -> Any:
    """The value type of `dict[str, X]` or the item type of `list[X]` and `tuple[X, ...]`; otherwise None."""
    for part in _arguments(annotation):
        arguments = typing.get_args(part)
        if typing.get_origin(part) in (dict, Mapping) and len(arguments) == 2:
            return arguments[1]
        if typing.get_origin(part) in (list, tuple) and arguments:
            return arguments[0]
    return None


def kinds_of(annotation: Any) -> list[tuple[str, type[Settings]]]:
    """The members of a union of settings classes as (kind, class)."""
    members = [part for part in _arguments(annotation) if isinstance(part, type) and issubclass(part, Settings)]
    return [(_tag(member), member) for member in members]


def _tag(member: type[Settings]) -> str:
    field = member.model_fields.get("kind")
    return str(typing.get_args(field.annotation)[0]) if field else member.__name__


class Explained(NamedTuple):
    """One setting as `--explain` shows it."""

    address: str
    default: str
    unit: str
    bounds: str
    doc: str


def explain(root: type[Settings], prefix: str = "") -> Iterator[Explained]:
    """Every setting below `root`, depth first; the members of a union follow one another as `address<kind>`."""
    for name, field in root.model_fields.items():
        address = f"{prefix}{name}"
        kinds = kinds_of(field.annotation)
        item = item_of(field.annotation)
        if len(kinds) == 1 and item is None:
            yield from explain(kinds[0][1], f"{address}.")
        elif kinds:
            for tag, member in kinds:
                yield from explain(member, f"{address}<{tag}>.")
        elif item is not None and kinds_of(item):
            for tag, member in kinds_of(item):
                yield from explain(
                    member, f"{address}.<name>." if len(kinds_of(item)) == 1 else f"{address}.<name><{tag}>."
                )
        else:
            yield _explained(address, field)


def _explained(address: str, field: Any) -> Explained:
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    bounds = [
        f"{signs[name]} {getattr(rule, name)}"
        for rule in field.metadata
        for name in signs
        if getattr(rule, name, None) is not None
    ]
    choices = [
        repr(choice)
        for part in _arguments(field.annotation)
        if typing.get_origin(part) is typing.Literal
        for choice in typing.get_args(part)
    ]
    default = (
        field.get_default(call_default_factory=True)
        if field.default is not PydanticUndefined or field.default_factory
        else ...
    )
    return Explained(
        address,
        "(required)" if default is ... else str(default),
        str(extra.get("unit", "")),
        " ".join(bounds) if bounds else " | ".join(choices),
        " ".join((field.description or "").split()),
    )
