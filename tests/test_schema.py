"""YAML that comes back as it went, addresses that find their way, and one sentence for each way to be wrong."""
# ruff: noqa: E501  (messages stand verbatim)

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import Field, model_validator

from dstrain.schema import (
    Problem,
    Settings,
    UserError,
    complain,
    did_you_mean,
    dump_yaml,
    explain,
    flatten,
    parse_yaml,
    read_yaml,
    set_path,
    setting,
    split_override,
    together,
    validate,
)

# ------------------------------------------------------------------------------------------------------- YAML

TRICKY = [
    "on", "off", "yes", "no", "y", "n", "true", "False", "null", "~", "", " ", "1e3", "1e-05", "3E4", "2020-01-01", "=",
    "<<", "12:30", "1:2:3", "0o17", "0x1F", "010", "1_000", "+1", ".5", "5.", ".inf", "-.INF", ".nan", "- a", "a: b",
    "#", "'", '"', "*a", "&a", "!x", "%y", "@z", "`", "{a}", "[1]", "|", ">", "?", "a\nb", "a\n", "\ttab", "é", "\x85", "a\u2029b",
    "\u2028", "\ufeff", "\x00", "\x7f", "😀", "2020-01-01T00:00:00Z", "0b1", "1.5e", "e5", "1e+", "0x", "---", "...",
]  # fmt: skip
words = st.sampled_from(TRICKY) | st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
numbers = st.floats(allow_nan=False) | st.integers()
leaves = st.none() | st.booleans() | numbers | words
trees = st.dictionaries(
    words,
    st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3)),
    max_size=4,
)


def same(left: Any, right: Any) -> bool:
    """Equal in value and in type: 1, 1.0 and True are three things."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


@settings(max_examples=400)
@given(trees)
@example({"lr": 1e-05, "big": 1e22, "word": "1e-05", "list": TRICKY})
def test_a_tree_survives_yaml(tree: dict[str, Any]) -> None:
    assert same(parse_yaml(dump_yaml(tree), "f"), tree)


@pytest.mark.parametrize("word", TRICKY)
def test_a_text_that_looks_like_something_else_stays_text(word: str) -> None:
    text = dump_yaml({word: word})
    assert parse_yaml(text, "f") == {word: word}
    if word != "1.5e":
        assert yaml.safe_load(text) == {word: word}, "and another YAML reader agrees"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4), ("1e3", 1000.0), ("1E3", 1000.0), (".5", 0.5), ("5.", 5.0), ("-1.5e+2", -150.0), ("1_000.5", 1000.5),
        ("-.inf", -math.inf), ("7", 7), ("-7", -7), ("+7", 7), ("32_768", 32768), ("010", 10), ("0o10", 8), ("0x1F", 31),
        ("true", True), ("FALSE", False), ("on", "on"), ("yes", "yes"), ("n", "n"), ("12:30", "12:30"), ("2020-01-01", "2020-01-01"),
        ("=", "="), ("1e", "1e"), ("e5", "e5"), ("null", None), ("~", None), ("", None), ("'7'", "7"), ("[1, 2e0]", [1, 2.0]),
    ],
)  # fmt: skip
def test_values_are_read_as_in_yaml_1_2(text: str, value: Any) -> None:
    assert same(parse_yaml(text, "f"), value)


def test_not_a_number_is_read() -> None:
    assert math.isnan(parse_yaml(".nan", "f"))


def test_paths_and_tuples_are_written_plainly() -> None:
    assert parse_yaml(dump_yaml({"a": Path("x/y"), "b": (1, (2, 3)), 4: "z"}), "f") == {
        "a": "x/y",
        "b": [1, [2, 3]],
        "4": "z",
    }


def test_a_merge_key_brings_its_settings_along() -> None:
    assert parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}", "f")["b"] == {"x": 1, "y": 3}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base:\n  name: a\n  name: b\n", "f.yaml: line 3, column 3 not readable as YAML: the key 'name' is given twice; keep one of them"),
        ("base:\n  name: [a\n  b: c\n", "f.yaml: line 3, column 4 not readable as YAML: expected ',' or ']', but got ':'"),
        ("{[1]: 2}", "f.yaml: line 1, column 2 not readable as YAML: a key must be a word"),
        ("a: 1\n---\nb: 1\n", "f.yaml: line 2, column 1 not readable as YAML: expected a single document in the stream, but found another document"),
        ("a: *x", "f.yaml: line 1, column 4 not readable as YAML: found undefined alias 'x'"),
        ("a: \x00", "f.yaml: not readable as YAML: unacceptable character #x0000: special characters are not allowed"),
        ("!!python/object/apply:os.getcwd []", "f.yaml: line 1, column 1 not readable as YAML: could not determine a constructor for the tag 'tag:yaml.org,2002:python/object/apply:os.getcwd'"),
    ],
    ids=["twice", "syntax", "key", "documents", "alias", "control", "object"],
)  # fmt: skip
def test_broken_yaml_is_told_with_its_place(text: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        parse_yaml(text, "f.yaml")
    assert str(error.value) == said


def test_very_deep_yaml_is_refused() -> None:
    with pytest.raises(UserError, match=r"^f: not readable as YAML: maximum recursion"):
        parse_yaml("[" * 5000, "f")


def test_a_file_is_read_with_or_without_byte_order_mark(tmp_path: Path) -> None:
    for number, encoding in enumerate(("utf-8", "utf-8-sig")):
        file = tmp_path / f"{number}.yaml"
        file.write_text("name: café\n", encoding=encoding)
        assert read_yaml(file) == {"name": "café"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a: \xff\n", "byte 3 is not UTF-8; save the file as UTF-8"),
        (b"- 1\n", "holds a list; a file of settings is a mapping, such as `base: ...`"),
        (b"", "holds nothing; a file of settings is a mapping, such as `base: ...`"),
        (b"words", "holds a str; a file of settings is a mapping, such as `base: ...`"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "f.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_yaml(file)
    assert str(error.value) == f"{file}: {said}"


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path, why in ((tmp_path / "none.yaml", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(UserError) as error:
            read_yaml(path)
        assert str(error.value) == f"{path}: cannot be read ({why}); give the path of a YAML file"


# -------------------------------------------------------------------------------------------------- addresses

keys = st.text("abc_", min_size=1, max_size=4) | st.just("kind")
plain_leaves = st.none() | st.integers() | st.lists(st.integers(), max_size=2) | st.just({})
nested = st.dictionaries(
    keys,
    st.recursive(plain_leaves, lambda inner: st.dictionaries(keys, inner, min_size=1, max_size=3), max_leaves=6),
    max_size=4,
)


@given(nested, st.randoms(use_true_random=False))
def test_a_tree_is_rebuilt_from_its_addresses_in_any_order(tree: dict[str, Any], random: Any) -> None:
    flat = list(flatten(tree).items())
    random.shuffle(flat)
    rebuilt: dict[str, Any] = {}
    # `kind` starts its mapping afresh only when it changes one that is there, so here it may come last
    for address, value in flat:
        set_path(rebuilt, address, value)
    assert rebuilt == tree


@given(nested, st.lists(keys, min_size=1, max_size=3).map(".".join), st.integers())
def test_what_is_set_is_there_and_nothing_else_changes(tree: dict[str, Any], address: str, value: int) -> None:
    before = flatten(tree)
    parents = [".".join(address.split(".")[:depth]) for depth in range(1, address.count(".") + 1)]
    try:
        set_path(tree, address, value)
    except UserError:
        assert any(parent in before and before[parent] != {} for parent in parents)
        return
    after = flatten(tree)
    assert after[address] == value
    if address.rpartition(".")[2] != "kind":
        others = {
            a: v for a, v in before.items() if a != address and not a.startswith(f"{address}.") and a not in parents
        }
        assert others.items() <= after.items()


def test_a_new_kind_starts_afresh_and_the_same_kind_does_not() -> None:
    tree = {"attention": {"kind": "lsh", "num_hashes": 4}}
    set_path(tree, "attention.kind", "lsh")
    assert tree == {"attention": {"kind": "lsh", "num_hashes": 4}}
    set_path(tree, "attention.kind", "favor")
    assert tree == {"attention": {"kind": "favor"}}


def test_a_value_has_no_settings_inside() -> None:
    with pytest.raises(UserError) as error:
        set_path({"a": {"b": 3}}, "a.b.c", 1)
    assert str(error.value) == "a.b: is 3, which has no settings inside; set a.b itself, or name another"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a.b=3e-4", ("a.b", 3e-4)), (" a =on", ("a", "on")), ("a=", ("a", None)), ("a=b=c", ("a", "b=c")),
        ("a={kind: lsh}", ("a", {"kind": "lsh"})), ("a=[1, 2]", ("a", [1, 2])),
    ],
)  # fmt: skip
def test_an_override_is_address_and_yaml(text: str, parts: tuple[str, Any]) -> None:
    assert split_override(text) == parts


@pytest.mark.parametrize("text", ["seed", "=3", "  =3"])
def test_an_override_without_equals_or_address_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=f"^{text!r}: an override is written key=value, such as "):
        split_override(text)


def test_an_override_of_broken_yaml_names_its_address() -> None:
    with pytest.raises(UserError, match=r"^optim\.betas: line 1, column 3 not readable as YAML: expected"):
        split_override("optim.betas=[1")


# ------------------------------------------------------------------------------------------------- validation


class Circle(Settings):
    kind: Literal["circle"] = "circle"
    radius: float = setting(1.0, gt=0, unit="m")
    """How far out."""


class Square(Settings):
    kind: Literal["square"] = "square"
    side: float = setting(1.0, gt=0)

    @model_validator(mode="after")
    def _not_two(self) -> Square:
        if self.side == 2:
            raise ValueError("side is 2; take 3\ncolour is missing; take red")
        return self


Shape = Annotated[Circle | Square, Field(discriminator="kind")]


class Inner(Settings):
    size: int = setting(3, ge=1, le=10, unit="tokens")
    """How many,
    at most."""
    share: float = setting(0.5, ge=0, lt=1)
    names: tuple[str, ...] = ()
    pair: tuple[int, int] = (1, 2)
    colour: Literal["red", "green"] = "red"


class Outer(Settings):
    title: str = setting(min_length=1)
    flag: bool = True
    path: Path | None = None
    limit: int | None = setting(None, ge=1)
    inner: Inner = Inner()
    shape: Shape = Circle()
    parts: dict[str, Inner] = setting(default_factory=dict)
    shapes: list[Shape] = setting(default_factory=list)


def complaint(tree: Any, prefix: str = "") -> list[str]:
    with pytest.raises(UserError) as error:
        validate(Outer, tree, "f.yaml", prefix)
    return str(error.value).splitlines()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"titel": 1}, "titel: no such setting; did you mean title?"),
        ({"inner.sise": 1}, "inner.sise: no such setting; did you mean size?"),
        ({"inner.zzz": 1}, "inner.zzz: no such setting; there are colour, names, pair, share, size"),
        ({"parts.a.sise": 1}, "parts.a.sise: no such setting; did you mean size?"),
        ({"shape": {"kind": "square", "radius": 1}}, "shape.radius: no such setting; there are kind, side"),
        ({"shapes": [{"kind": "circle"}, {"kind": "square", "sid": 1}]}, "shapes.1.sid: no such setting; did you mean side?"),
        ({"inner.size": 0}, "inner.size: must be greater than or equal to 1, but is 0"),
        ({"inner.size": 11}, "inner.size: must be less than or equal to 10, but is 11"),
        ({"shape": {"kind": "circle", "radius": 0}}, "shape.radius: must be greater than 0, but is 0"),
        ({"inner.share": 1}, "inner.share: must be less than 1, but is 1"),
        ({"title": ""}, "title: must have at least 1 character, but is ''"),
        ({"limit": 0}, "limit: must be greater than or equal to 1, but is 0"),
        ({"inner.size": 1.5}, "inner.size: must be a whole number, but is 1.5"),
        ({"inner.size": "many"}, "inner.size: must be a whole number, but is 'many'"),
        ({"inner.size": None}, "inner.size: must be a whole number, but is None"),
        ({"inner.size": True}, "inner.size: must be a whole number, but is 'true'"),
        ({"inner.share": False}, "inner.share: must be a number, but is 'false'"),
        ({"inner.share": "1e"}, "inner.share: must be a number, but is '1e'"),
        ({"inner.share": math.nan}, "inner.share: must be a finite number, but is nan"),
        ({"inner.share": math.inf}, "inner.share: must be a finite number, but is inf"),
        ({"flag": "perhaps"}, "flag: must be true or false, but is 'perhaps'"),
        ({"title": 3}, "title: must be a text (put it in quotes), but is 3"),
        ({"path": 3}, "path: must be a path (put it in quotes), but is 3"),
        ({"parts": [1]}, "parts: must be a mapping, but is [1]"),
        ({"parts": {1: {}}}, "parts.1: must be a text (put it in quotes), but is 1"),
        ({"inner.names": "a"}, "inner.names: must be a list, but is 'a'"),
        ({"inner.pair": [1]}, "inner.pair.1: is missing and has no default; give it a value"),
        ({"inner.pair": [1, 2, 3]}, "inner.pair: must have at most 2 items, but is [1, 2, 3]"),
        ({"inner": 5}, "inner: is 5; it takes a mapping of settings"),
        ({"inner.colour": "gren"}, "inner.colour: 'gren' is not one of 'red' or 'green'; did you mean green?"),
        ({"inner.colour": "blue"}, "inner.colour: 'blue' is not one of 'red' or 'green'"),
        ({"inner.colour": 3}, "inner.colour: 3 is not one of 'red' or 'green'"),
        ({"shape": {"kind": "squar"}}, "shape.kind: 'squar' is not a kind there is; did you mean square?"),
        ({"shape": {"kind": "line"}}, "shape.kind: 'line' is not a kind there is; there are circle, square"),
        ({"shape": {"side": 1}}, "shape.kind: is missing: {'side': 1} does not say which kind it is; there are circle, square"),
        ({"shape": "square"}, "shape: is 'square'; it takes a mapping that says its kind, such as {kind: square}"),
        ({"shape": 3}, "shape: is 3; it takes a mapping that says its kind, such as {kind: circle}"),
        ({"inner.names": ["x" * 99, 3]}, "inner.names.1: must be a text (put it in quotes), but is 3"),
    ],
)  # fmt: skip
def test_each_mistake_is_one_sentence_with_address_and_value(changes: dict[str, Any], said: str) -> None:
    tree: dict[str, Any] = {"title": "t"}
    for address, value in changes.items():
        set_path(tree, address, value)
    assert complaint(tree) == [f"f.yaml: {said}"]


def test_all_mistakes_come_in_one_message_each_once() -> None:
    tree = {"titel": 1, "inner": {"size": 0}, "shape": {"kind": "square", "side": 2}, 3: 4}
    assert complaint(tree, "search.") == [
        "f.yaml: search.title: is missing and has no default; give it a value",
        "f.yaml: search.inner.size: must be greater than or equal to 1, but is 0",
        "f.yaml: search.shape: side is 2; take 3",
        "f.yaml: search.shape: colour is missing; take red",
        "f.yaml: search.titel: no such setting; did you mean title?",
        "f.yaml: search.3: no such setting; there are flag, inner, limit, parts, path, shape, shapes, title",
    ]


def test_a_long_value_is_shortened() -> None:
    (line,) = complaint({"title": "t", "inner": {"size": "x" * 200}})
    assert line.endswith("xxx...") and len(line) < 130


def test_right_settings_come_through_and_hold_still() -> None:
    made = validate(Outer, {"title": "t", "inner": {"size": 4, "pair": [3, 4]}, "shape": {"kind": "square"}}, "f")
    assert made.inner.size == 4 and made.inner.pair == (3, 4) and isinstance(made.shape, Square)
    with pytest.raises(ValueError):
        made.title = "u"  # type: ignore[misc]


def test_complaints_without_address_have_no_empty_place() -> None:
    said = str(complain("f", [Problem("", "is empty"), Problem("a", "is 1")]))
    assert said == "f: is empty\nf: a: is 1"


def test_did_you_mean() -> None:
    assert did_you_mean("num_hash", ["num_hashes", "chunk"]) == "; did you mean num_hashes?"
    assert did_you_mean("zzz", ["b", "a", "b"]) == "; there are a, b"
    assert did_you_mean("zzz", ["only"]) == "; there is only"
    assert did_you_mean("zzz", []) == ""


def test_together_gives_all_results_or_all_mistakes() -> None:
    def wrong(text: str) -> Any:
        raise UserError(text)

    assert together(lambda: 1, lambda: 2) == [1, 2]
    assert together() == []
    with pytest.raises(UserError) as error:
        together(lambda: wrong("a\nb"), lambda: 1, lambda: wrong("b\nc"))
    assert str(error.value) == "a\nb\nc"


# ---------------------------------------------------------------------------------------------------- explain


def test_explain_shows_every_setting_once() -> None:
    rows = {row.address: row for row in explain(Outer)}
    assert list(rows) == [
        "title", "flag", "path", "limit", "inner.size", "inner.share", "inner.names", "inner.pair", "inner.colour",
        "shape<circle>.kind", "shape<circle>.radius", "shape<square>.kind", "shape<square>.side",
        "parts.<name>.size", "parts.<name>.share", "parts.<name>.names", "parts.<name>.pair", "parts.<name>.colour",
        "shapes.<name><circle>.kind", "shapes.<name><circle>.radius", "shapes.<name><square>.kind", "shapes.<name><square>.side",
    ]  # fmt: skip
    assert rows["title"].default == "(required)"
    assert rows["inner.size"] == ("inner.size", "3", "tokens", ">= 1 <= 10", "How many, at most.")
    assert rows["inner.share"].bounds == ">= 0 < 1"
    assert rows["inner.colour"].bounds == "'red' | 'green'"
    assert rows["shape<circle>.radius"].unit == "m"
    assert next(row.address for row in explain(Inner, "x.")) == "x.size"
