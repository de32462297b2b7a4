"""Search spaces: grids, samples, expressions, conditions, constraints, ids, and the sentences for mistakes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.schema import Settings, UserError, parse_yaml, setting, validate
from dstrain.space import Trial, apply, evaluate, names_in, read_axes, read_space, setting_named


class Attention(Settings):
    kind: str = "lsh"
    num_hashes: int = 2


class Encoder(Settings):
    hidden_size: int = 512
    num_heads: int = 8
    attention: Attention = Attention()

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


class Stage(Settings):
    max_length: int = 512
    tokens: int = 0


class Tree(Settings):
    encoder: Encoder = Encoder()
    stages: dict[str, Stage] = setting({"pretrain": Stage(max_length=128), "finetune": Stage(max_length=4096)})
    dropout: float = 0.1
    width: int | None = None


def names(overrides: Mapping[str, Any], name: str, near: str) -> Any:
    return setting_named(validate(Tree, apply(Tree().model_dump(), overrides), "f.yaml"), name, near)


def read(text: str, **search: Any) -> tuple[list[Trial], int]:
    return read_space(parse_yaml(text, "f.yaml"), "f.yaml", names, **search)


def overrides(text: str, **search: Any) -> list[dict[str, Any]]:
    return [trial.overrides for trial in read(text, **search)[0]]


def refused(text: str, **search: Any) -> str:
    with pytest.raises(UserError) as error:
        read(text, **search)
    return str(error.value)


# ------------------------------------------------------------------------------------------------- grids


def test_choices_alone_are_all_combinations_in_the_order_written() -> None:
    found = overrides("{a: [2, 4, 8], b: {choice: [32, 64, 128]}, c: {values: [true, false]}}")
    assert found == [
        dict(zip("abc", row, strict=True)) for row in itertools.product([2, 4, 8], [32, 64, 128], [True, False])
    ]
    assert [trial.number for trial in read("{a: [1, 2, 3]}")[0]] == [0, 1, 2]


@pytest.mark.parametrize(
    "said", ["[1, 2]", "{choice: [1, 2]}", "{grid: [1, 2]}", "{grid_search: [1, 2]}", "{values: [1, 2]}"]
)
def test_ways_to_say_a_choice(said: str) -> None:
    assert overrides(f"a: {said}") == [{"a": 1}, {"a": 2}]


def test_values_that_go_together_and_whole_mappings() -> None:
    found = overrides('{"encoder.hidden_size, encoder.num_heads": [[256, 4], [512, 8]], d: [{kind: sdpa}]}')
    assert found == [
        {"encoder.hidden_size": 256, "encoder.num_heads": 4, "d": {"kind": "sdpa"}},
        {"encoder.hidden_size": 512, "encoder.num_heads": 8, "d": {"kind": "sdpa"}},
    ]


def test_a_repeated_value_is_one_trial() -> None:
    assert overrides("a: [1, 1, 2]") == [{"a": 1}, {"a": 2}]


def test_seeds_are_the_outermost_axis() -> None:
    assert overrides("a: [5, 6]", seeds=[1, 2]) == [
        {"seed": 1, "a": 5},
        {"seed": 1, "a": 6},
        {"seed": 2, "a": 5},
        {"seed": 2, "a": 6},
    ]


# --------------------------------------------------------------------------------------------- conditions


def test_a_conditional_key_is_there_only_where_its_condition_holds() -> None:
    found = overrides(
        """
        nb_features: {choice: [64, 128], if: {encoder.attention.kind: favor}}
        encoder.attention.num_hashes: {choice: [2, 4], if: {encoder.attention.kind: [lsh, other]}}
        encoder.attention.kind: [sdpa, favor, lsh]
        """
    )
    assert found == [
        {"encoder.attention.kind": "sdpa"},
        {"encoder.attention.kind": "favor", "nb_features": 64},
        {"encoder.attention.kind": "favor", "nb_features": 128},
        {"encoder.attention.kind": "lsh", "encoder.attention.num_hashes": 2},
        {"encoder.attention.kind": "lsh", "encoder.attention.num_hashes": 4},
    ]


def test_a_condition_may_ask_the_base_and_never_holds_for_a_setting_that_is_not_there() -> None:
    text = "{dropout: {choice: [1, 2], if: {encoder.num_heads: 8}}, width: {choice: [1, 2], if: {encoder.layers: 8}}}"
    assert overrides(text) == [{"dropout": 1}, {"dropout": 2}]


def test_a_setting_that_is_not_there_says_so_itself() -> None:
    said = refused("encoder.num_heds: [7, 9]", constraints=["512 % num_heads == 0"])
    assert said == "f.yaml: encoder.num_heds: no such setting; did you mean num_heads?"


def test_conditions_in_a_circle_or_on_an_expression_are_refused() -> None:
    assert "waits for itself" in refused("{a: {choice: [1], if: {b: 1}}, b: {choice: [1], if: {a: 1}}}")
    assert "is an expression" in refused('{a: ["2 * head_dim"], b: {choice: [1], if: {a: 1}}}')


# -------------------------------------------------------------------------------------------- expressions


def test_expressions_follow_the_same_trial() -> None:
    found = overrides(
        """
        encoder.num_heads: [4, 8]
        encoder.attention.num_hashes: ["0.25 * head_dim", "max(2, head_dim // 100)"]
        """
    )
    assert [trial["encoder.attention.num_hashes"] for trial in found] == [32, 2, 16, 2]
    assert all(isinstance(trial["encoder.attention.num_hashes"], int) for trial in found)


def test_a_name_is_looked_for_beside_the_asking_setting_first() -> None:
    found = overrides(
        """
        stages.finetune.tokens: {expr: "32768 / max_length"}
        stages.pretrain.tokens: [{expr: "stages.finetune.tokens * 2"}]
        """
    )
    assert found == [{"stages.finetune.tokens": 8, "stages.pretrain.tokens": 16}]
    assert "max_length is not one setting: stages.pretrain.max_length = 128" in refused('dropout: ["1 / max_length"]')


def test_an_expression_that_asks_for_itself_is_refused() -> None:
    said = refused(
        '{encoder.num_heads: {expr: "encoder.hidden_size / 64"}, encoder.hidden_size: ["encoder.num_heads * 64"]}'
    )
    assert "asks for itself, by way of encoder.num_heads, encoder.hidden_size" in said


@pytest.mark.parametrize(
    "word", ["mean", "bert-small", "data/a.csv", "ds_configs/zero1.json", "2024-01-05", "a b", "model-2", "a * b"]
)
def test_words_stay_words(word: str) -> None:
    assert overrides(f'pooling: ["{word}"]') == [{"pooling": word}]


@settings(max_examples=60)
@given(
    st.recursive(
        st.integers(-9, 9).map(str),
        lambda e: st.tuples(e, st.sampled_from(["+", "-", "*", "<", "=="]), e).map(" ".join).map("({})".format),
        max_leaves=8,
    )
)
def test_arithmetic_is_pythons(text: str) -> None:
    assert evaluate(text, str) == eval(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7 // 2 + 7 % 4 + 2 ** 3", 14),
        ("round(2.6) + int(2.9) + float(1) + abs(-3)", 9),
        ("1 / 4", 0.25),
        ("1 < 2 < 3 and not 2 in [1, 3]", True),
        ("kind == 'lsh' or 1 > 2", True),
        ("kind not in ('lsh', 'favor')", False),
    ],
)
def test_what_an_expression_can_say(text: str, value: object) -> None:
    assert evaluate(text, {"kind": "lsh"}.__getitem__) == value


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "open('x')",
        "(1).real",
        "[x for x in (1, 2)]",
        "lambda: 1",
        "x.y()",
        "1 / 0",
        "9 ** 9 ** 9",
        "10 ** 60 * 1e300 * 1e300",
        "(-8) ** 0.5",
        "'a' * 1000000000",
        "[0] * 1000000000",
        "1 +",
        "1" * 400,
        "-" * 299 + "1 +",
        "max(1, 'a')",
        "f'{1}'",
    ],
)
def test_what_an_expression_cannot_say_is_a_sentence(text: str) -> None:
    with pytest.raises(ValueError) as error:
        evaluate(text, {"x": 1}.__getitem__)
    assert "\n" not in str(error.value) and len(str(error.value)) > 10


def test_names_in_an_expression() -> None:
    assert names_in("max(8, encoder.head_dim) * scale") == {"encoder.head_dim", "scale"}


def test_setting_named_finds_settings_and_properties() -> None:
    tree = Tree()
    assert setting_named(tree, "head_dim") == 64
    assert setting_named(tree, "encoder.attention.kind") == "lsh"
    assert setting_named(tree, "max_length", "stages.finetune.tokens") == 4096
    for missing in ("nothing", "width", "attention", "model_dump"):
        with pytest.raises(KeyError):
            setting_named(tree, missing)


# ------------------------------------------------------------------------------------- constraints, ids


def test_constraints_leave_combinations_out_and_count_them() -> None:
    trials, left_out = read(
        "{encoder.hidden_size: [500, 512], encoder.num_heads: [8, 5]}", constraints=["hidden_size % num_heads == 0"]
    )
    assert [tuple(trial.overrides.values()) for trial in trials] == [(500, 5), (512, 8)]
    assert left_out == 2
    assert "leave out all 2 combinations" in refused("encoder.num_heads: [7, 9]", constraints=["512 % num_heads == 0"])
    assert "search.constraints: 'hiden > 1': hiden is no setting" in refused(
        "dropout: [0.1]", constraints=["hiden > 1"]
    )


plain_values = st.one_of(st.integers(), st.booleans(), st.text(max_size=3), st.floats(allow_nan=False))


@settings(max_examples=60)
@given(st.dictionaries(st.text("abc.", min_size=1, max_size=5), plain_values, max_size=5), st.randoms())
def test_an_id_depends_on_content_not_on_order(content: dict[str, Any], chance: Any) -> None:
    items = list(content.items())
    chance.shuffle(items)
    name = Trial(0, content).id
    assert name == Trial(7, dict(items)).id
    assert isinstance(parse_yaml(name, "f"), str) and len(name) == 9
    assert name != Trial(0, {**content, "more": 1}).id


def test_ids_do_not_change_between_versions() -> None:
    assert Trial(0, {"encoder.attention.num_hashes": 4}).id == "t9ef4124a"


def test_apply_sets_kinds_before_what_lies_beside_them() -> None:
    base = {"encoder": {"attention": {"kind": "sdpa", "window": 3}}}
    tree = apply(
        base,
        {"encoder.attention.num_hashes": 4, "encoder.attention.kind": "lsh", "encoder": {"attention": {"kind": "x"}}},
    )
    assert tree == {"encoder": {"attention": {"kind": "lsh", "num_hashes": 4}}}
    assert base == {"encoder": {"attention": {"kind": "sdpa", "window": 3}}}


# ------------------------------------------------------------------------------------------------ samples

SAMPLED = "{a: {uniform: [0, 1]}, b: {loguniform: [1e-5, 1e-2]}, c: {randint: [3, 5]}, d: {choice: [x, y]}}"


def test_samples_repeat_and_more_of_them_leave_the_first_ones_alone() -> None:
    ten = overrides(SAMPLED, trials=10, seed=3)
    assert len(ten) == 10
    assert overrides(SAMPLED, trials=20, seed=3)[:10] == ten
    assert overrides(SAMPLED, trials=10, seed=4) != ten
    wider = overrides(SAMPLED[:-1] + ", e: {uniform: [0, 9]}}", trials=10, seed=3)
    assert [{key: trial[key] for key in "abcd"} for trial in wider] == ten


def test_samples_do_not_touch_the_global_generator() -> None:
    import random

    before = random.getstate()
    overrides(SAMPLED, trials=5)
    assert random.getstate() == before


@settings(max_examples=60)
@given(
    st.sampled_from(["uniform", "log_uniform", "int_uniform"]),
    st.integers(1, 50),
    st.integers(1, 200),
    st.sampled_from([None, 1, 2, 3]),
    st.integers(0, 9),
)
def test_samples_lie_within_their_bounds_on_their_steps(
    kind: str, low: int, width: int, step: int | None, seed: int
) -> None:
    said: dict[str, Any] = {kind: [low, low + width + 3]} | ({"step": step} if step else {})
    trials, _ = read_space({"a": said}, "f", names, trials=5, seed=seed)
    for trial in trials:
        value = trial.overrides["a"]
        assert low <= value <= low + width + 3
        assert step is None or value % step == 0
        assert kind != "int_uniform" or isinstance(value, int)


def test_samples_cover_their_range() -> None:
    drawn = [trial["a"] for trial in overrides("a: {log_uniform: [1e-6, 1]}", trials=400)]
    assert 0.4 < sum(value < 1e-3 for value in drawn) / 400 < 0.6
    assert {trial["a"] for trial in overrides("a: {int_uniform: [1, 4]}", trials=4)} == {1, 2, 3, 4}
    assert {trial["a"] for trial in overrides("a: {uniform: [0, 1], step: 0.25}", trials=5)} == {0, 0.25, 0.5, 0.75, 1}
    assert {trial["a"] for trial in overrides("a: {log_uniform: [0.1, 0.9], step: 0.4}", trials=9)} == {0.4, 0.8}


def test_a_grid_is_taken_whole_for_every_sample_a_choice_is_not() -> None:
    found = overrides("{a: {uniform: [0, 1]}, b: {grid: [1, 2, 3]}, c: {choice: [7, 8]}}", trials=4)
    assert len(found) == 12
    assert len({trial["a"] for trial in found}) == 4
    assert [trial["b"] for trial in found] == [1, 2, 3] * 4


def test_samples_that_break_a_constraint_are_drawn_again() -> None:
    trials, left_out = read("dropout: {uniform: [0, 1]}", trials=10, constraints=["dropout < 0.3"])
    assert len(trials) == 10 and left_out > 5
    assert all(trial.overrides["dropout"] < 0.3 for trial in trials)


def test_a_space_with_fewer_points_than_trials_gives_them_all() -> None:
    assert sorted(trial["a"] for trial in overrides("a: [1, 2, 3]", trials=50)) == [1, 2, 3]


# ------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ("[]", "its choices are []"),
        ("{choice: 3}", "its choices are 3"),
        ("5", "5 is no distribution"),
        ("{unifrom: [1, 2]}", "unifrom: no such distribution; did you mean uniform?"),
        ("{}", "no distribution; give one of"),
        ("{choice: [1], uniform: [1, 2]}", "has choice and uniform"),
        ("{uniform: [2, 1]}", "uniform from 2 to 1"),
        ("{uniform: [a, 1]}", "takes two numbers"),
        ("{uniform: [1, .inf]}", "takes two numbers"),
        ("{uniform: [true, 2]}", "takes two numbers"),
        ("{log_uniform: [0, 1]}", "bounds above 0"),
        ("{int_uniform: [1, 2.5]}", "whole numbers"),
        ("{uniform: [1, 2], step: 0}", "step is 0"),
        ("{uniform: [11, 19], step: 10}", "no multiple of the step 10"),
        ("{choice: [1], step: 2}", "a choice has no step"),
        ("{choice: [1], if: favor}", "if is 'favor'"),
        ("{expr: 5}", "expr is 5"),
        ("{expr: '2 *'}", "is not an expression"),
        ("['2 * hed_dim']", "hed_dim is no setting"),
        ("['2 * kind']", "is not a number"),
    ],
)
def test_a_mistake_is_a_sentence_with_its_address(said: str, sentence: str) -> None:
    message = refused(f"dropout: {said}")
    assert message.startswith("f.yaml: space.dropout: ")
    assert sentence in message and "\n" not in message


def test_mistakes_of_several_keys_come_together() -> None:
    said = refused(
        '{a: [], b: {uniform: [2, 1]}, "c, d": [[1]], "e,": [1], "f, g": {uniform: [1, 2]}, '
        '"h, i": {expr: "1 + 1"}, seed: [1]}',
        seeds=[1],
        constraints=["1 +"],
    )
    assert [line.split(": ")[1] for line in said.splitlines()] == [
        "space.a",
        "space.b",
        "space.c, d",
        "space.e,",
        "space.f, g",
        "space.h, i",
        "search.seeds",
        "search.constraints",
    ]


def test_an_address_searched_twice_an_endless_and_a_huge_space_are_refused() -> None:
    assert "b is searched by 'a, b' too" in refused('{"a, b": [[1, 2]], b: [3]}')
    assert "space.a: uniform has no end of values; say how many to draw with search.trials" in refused(
        "a: {uniform: [0, 1]}"
    )
    axis = list(range(30))
    assert "27,000 combinations" in refused(f"{{a: {axis}, b: {axis}, c: {axis}}}")
    assert len(overrides(f"{{a: {axis}, b: {axis}, c: {axis}}}", trials=3)) == 3


def test_a_space_of_nothing_is_the_base_alone() -> None:
    assert read_axes({}) == ([], [])
    assert overrides("{}") == [{}]
