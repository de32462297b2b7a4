"""A search space in YAML, and the trials it stands for.

    encoder.attention.num_hashes: [2, 4, 8]                         a list is a choice
    encoder.attention.chunk_size: {choice: [32, 64, 128]}           every value once, or one of them when sampling
    encoder.attention.nb_features: {choice: ["0.25 * head_dim", 64], if: {encoder.attention.kind: favor}}
    stages.finetune.optim.lr: {log_uniform: [1e-5, 1e-3]}           uniform, log_uniform, int_uniform; step: q rounds
    stages.finetune.tokens_per_batch: {expr: "32768 / max_length"}  follows other settings of the same trial
    "encoder.hidden_size, encoder.num_heads": [[256, 4], [512, 8]]  values that go together

Choices alone are a grid: all combinations. With `search.trials: N` there are N random samples instead, where a `grid`
(not a `choice`) is still taken whole for each sample, as in Ray Tune. `search.seeds` is one more axis, the outermost.
A key with `if` exists only in trials where each condition holds; combinations that come to the same are one trial.

A text in a choice is an expression when it is arithmetic with a number or a call ("2 * head_dim", "max(8, a)");
other text is text, and {expr: ...} is always computed. Names are addresses, or a setting's last word.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import json
import math
import operator
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from dstrain.schema import Problem, Settings, UserError, complain, did_you_mean, flatten, set_path, unique

SYNONYMS = {
    "values": "choice",
    "grid_search": "grid",
    "loguniform": "log_uniform",
    "log_uniform_values": "log_uniform",
    "randint": "int_uniform",
}
"""What W&B and Ray call a distribution: what it is called here (the bounds of int_uniform both belong to it)."""
DISTRIBUTIONS = ("choice", "grid", "uniform", "log_uniform", "int_uniform", "expr")
MOST_TRIALS = 10_000
_DRAWS_PER_TRIAL = 100
_LONGEST = 300  # characters of an expression: bounds how deeply it can nest

Names = Callable[[Mapping[str, Any], str, str], Any]
"""(overrides so far, name, asking address) -> the value of that name in such a trial; KeyError when there is none, a
ValueError when there are several. `setting_named` looks in a settings object. A UserError goes through as it is."""


@dataclass(frozen=True)
class Trial:
    """One combination: settings by dotted address. The id depends on the overrides alone, not on their order."""

    number: int
    overrides: dict[str, Any]

    @property
    def id(self) -> str:
        """Nine characters, a letter first, so that no YAML reader takes it for a number."""
        content = json.dumps(self.overrides, sort_keys=True, separators=(",", ":"), default=str)
        return "t" + hashlib.sha256(content.encode()).hexdigest()[:8]


def apply(tree: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the tree with the overrides in it: outer addresses before inner ones, `kind` and `preset` before the
    settings beside them, because they start their mapping afresh."""
    copy = deepcopy(dict(tree))
    for address in sorted(overrides, key=lambda a: (a.count("."), a.rpartition(".")[2] not in ("kind", "preset"))):
        set_path(copy, address, deepcopy(overrides[address]))
    return copy


# ---------------------------------------------------------------------------------------------- expressions


class Expression(NamedTuple):
    """Arithmetic over the trial's settings, still to be computed."""

    text: str


_BINARY: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
_CALLS: dict[str, Callable[..., Any]] = {"min": min, "max": max, "round": round, "int": int, "float": float, "abs": abs}


def evaluate(text: str, name: Callable[[str], Any]) -> Any:
    """The value of an expression: + - * / // % **, comparisons, in, and / or / not, min max round int float abs.

    `name` gives the value of a (dotted) name. Raises ValueError in one sentence for anything else in the text.
    """
    try:
        value = _value(_parse(text), name)
    except (ArithmeticError, TypeError) as error:
        raise ValueError(f"{text!r} cannot be computed ({error})") from None
    if isinstance(value, complex) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"{text!r} comes to {value}, which is no usable number")
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _parse(text: str) -> ast.expr:
    if len(text) > _LONGEST:
        raise ValueError(f"an expression of {len(text)} characters is too long; {_LONGEST} is the limit")
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"{text!r} is not an expression; write arithmetic such as 0.25 * head_dim") from None


def _value(node: ast.expr, name: Callable[[str], Any]) -> Any:
    def value(inner: ast.expr) -> Any:
        return _value(inner, name)

    match node:
        case ast.Constant(value=bool() | int() | float() | str() as constant):
            return constant
        case ast.Name() | ast.Attribute():
            return name(_dotted(node))
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [value(item) for item in items]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -value(operand)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not value(operand)
        case ast.BoolOp(op=ast.And(), values=parts):
            return all(value(part) for part in parts)
        case ast.BoolOp(op=ast.Or(), values=parts):
            return any(value(part) for part in parts)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_number(value(left)), _number(value(right)))
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _BINARY:
            return _BINARY[type(sign)](_number(value(left)), _number(value(right)))
        case ast.Compare(left=first, ops=signs, comparators=others):
            chain = [value(part) for part in (first, *others)]
            return all(_BINARY[type(sign)](a, b) for sign, (a, b) in zip(signs, itertools.pairwise(chain), strict=True))
        case ast.Call(func=ast.Name(id=function), args=arguments, keywords=[]) if function in _CALLS:
            return _CALLS[function](*(value(argument) for argument in arguments))
    known = f"+ - * / // % **, comparisons, {', '.join(_CALLS)}"
    raise ValueError(f"{ast.unparse(node)!r} has no meaning here; there are {known}")


def _number(value: Any) -> Any:
    if not isinstance(value, int | float):
        raise TypeError(f"{value!r} is not a number")
    return value


def _power(base: float, exponent: float) -> Any:
    if abs(exponent) > 64 or abs(base) > 1e6:
        raise ValueError(f"{base} ** {exponent} is too large")
    return base**exponent


def _dotted(node: ast.expr) -> str:
    match node:
        case ast.Name(id=word):
            return word
        case ast.Attribute(value=inner, attr=word):
            return f"{_dotted(inner)}.{word}"
    raise ValueError(f"{ast.unparse(node)!r} is not a setting's name")


def names_in(text: str) -> set[str]:
    """The (dotted) names an expression asks for."""

    def walk(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Name | ast.Attribute):
            yield _dotted(node)
            return
        for child in ast.iter_child_nodes(node):
            yield from walk(child)

    return {name for name in walk(_parse(text)) if name not in _CALLS}


def _reads_as_expression(text: str) -> bool:
    # "mean", "bert-small" and "data/a.csv" are words; "2 * head_dim", "max(a, b)" and "32768/max_length" are not.
    if not (text[:1].isdigit() or any(sign in text for sign in " *(")):
        return False
    try:
        tree = _parse(text)
    except ValueError:
        return False
    counts = any(isinstance(node, ast.Call) or _is_number(getattr(node, "value", None)) for node in ast.walk(tree))
    return counts and isinstance(tree, ast.BinOp | ast.Call | ast.UnaryOp | ast.Compare)


def setting_named(settings: Settings, name: str, near: str = "") -> Any:
    """The value of a setting or a property of the settings, by dotted address or by last word.

    A last word is looked for beside `near` first, then further and further out; KeyError when there is none, ValueError
    when the nearest ones disagree.
    """
    scope = near.split(".")[:-1]
    for depth in range(len(scope), -1, -1):
        outer = ".".join(scope[:depth])
        found = dict(_named(_at(settings, outer), name, outer))
        if found:
            values = list(found.values())
            if any(value != values[0] for value in values):
                said = ", ".join(f"{address} = {value}" for address, value in found.items())
                raise ValueError(f"{name} is not one setting: {said}; write the whole address")
            return values[0]
    raise KeyError(name)


def _at(root: Any, address: str) -> Any:
    for word in address.split(".") if address else ():
        root = root.get(word) if isinstance(root, Mapping) else getattr(root, word, None)
    return root


def _named(node: Any, name: str, address: str) -> Iterator[tuple[str, Any]]:
    value = _at(node, name) if isinstance(node, Settings | Mapping) else None
    if value is not None and not callable(value) and not isinstance(value, Settings | Mapping):
        yield f"{address}.{name}".lstrip("."), value
    for word, inner in _inside(node):
        yield from _named(inner, name, f"{address}.{word}".lstrip("."))


def _inside(node: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(node, Settings):
        return [(word, getattr(node, word)) for word in type(node).model_fields]
    return list(node.items()) if isinstance(node, Mapping) else []


# ------------------------------------------------------------------------------------------------- the axes


@dataclass(frozen=True)
class Axis:
    """One key of a space: the settings it sets, and what they may be."""

    key: str
    addresses: tuple[str, ...]
    kind: Literal["choice", "grid", "uniform", "log_uniform", "int_uniform"]
    options: tuple[tuple[Any, ...], ...] = ()
    """Of a choice or grid: each a value per address."""
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    condition: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    """(address, allowed values): the key exists only where all of these hold."""

    def draw(self, generator: random.Random) -> tuple[Any, ...]:
        """A random value per address."""
        if self.options:
            return generator.choice(self.options)
        if self.kind == "int_uniform" or (self.kind == "uniform" and self.step):
            step = self.step or 1
            return (_multiple(generator.randint(math.ceil(self.low / step), math.floor(self.high / step)), step),)
        if self.kind == "uniform":
            return (self._readable(generator.uniform(self.low, self.high)),)
        value = math.exp(generator.uniform(math.log(self.low), math.log(self.high)))
        if self.step is None:
            return (self._readable(value),)
        count = min(max(round(value / self.step), math.ceil(self.low / self.step)), math.floor(self.high / self.step))
        return (_multiple(count, self.step),)

    def _readable(self, value: float) -> float:
        return min(max(float(f"{value:.6g}"), self.low), self.high)


def _multiple(count: int, step: float) -> float:
    return count * step if isinstance(step, int) else float(f"{count * step:.12g}")


def read_axes(space: Mapping[str, Any]) -> tuple[list[Axis], list[Problem]]:
    """The axes of a `space`, and every mistake in it."""
    axes, problems = [], []
    for key, said in space.items():
        try:
            axes.append(_axis(str(key), said))
        except ValueError as error:
            problems.append(Problem(f"space.{key}", str(error)))
    taken: dict[str, str] = {}
    for axis in axes:
        for address in axis.addresses:
            if taken.setdefault(address, axis.key) != axis.key:
                sentence = f"{address} is searched by {taken[address]!r} too; keep one of them"
                problems.append(Problem(f"space.{axis.key}", sentence))
    computed = {
        a for axis in axes for a in axis.addresses if any(isinstance(v, Expression) for o in axis.options for v in o)
    }
    for axis in axes:
        for address in computed & {address for address, _ in axis.condition}:
            sentence = f"its `if` asks about {address}, which is an expression; ask about what that is computed from"
            problems.append(Problem(f"space.{axis.key}", sentence))
    return (axes, problems) if problems else _in_order(axes)


def _axis(key: str, said: Any) -> Axis:
    addresses = tuple(word.strip() for word in key.split(","))
    if not all(addresses):
        raise ValueError("an address is empty; a key is a dotted address, or several with commas between")
    if isinstance(said, list):
        return Axis(key, addresses, "choice", _options(said, addresses))
    if not isinstance(said, dict):
        raise ValueError(f"{said!r} is no distribution; write a list such as [{said!r}], or {{uniform: [a, b]}}")
    parts = {SYNONYMS.get(str(word), str(word)): value for word, value in said.items()}
    kinds = [word for word in parts if word not in ("step", "if")]
    unknown = [word for word in kinds if word not in DISTRIBUTIONS]
    if unknown:
        raise ValueError(
            f"{unknown[0]}: no such distribution{did_you_mean(unknown[0], (*DISTRIBUTIONS, 'step', 'if'))}"
        )
    if len(kinds) != 1:
        raise ValueError(f"has {' and '.join(kinds) or 'no distribution'}; give one of {', '.join(DISTRIBUTIONS)}")
    kind, value = kinds[0], parts[kinds[0]]
    condition = _condition(parts["if"]) if "if" in parts else ()
    if kind in ("choice", "grid", "expr"):
        if "step" in parts:
            raise ValueError(f"a {kind} has no step; leave it out, or give bounds with uniform or int_uniform")
        options = _options(value, addresses) if kind != "expr" else ((_expression(value),),)
        if len(options[0]) != len(addresses):
            raise ValueError("an expr sets one setting; give each address a key of its own")
        return Axis(key, addresses, "grid" if kind == "grid" else "choice", options, condition=condition)
    if len(addresses) > 1:
        raise ValueError(f"{kind} draws one number; values that go together are a list of lists")
    low, high, step = _bounds(kind, value, parts.get("step"))
    return Axis(key, addresses, kind, low=low, high=high, step=step, condition=condition)  # type: ignore[arg-type]


def _options(values: Any, addresses: Sequence[str]) -> tuple[tuple[Any, ...], ...]:
    if not isinstance(values, list) or not values:
        raise ValueError(f"its choices are {values!r}; list at least one value")
    if len(addresses) == 1:
        return tuple((_item(value),) for value in values)
    for value in values:
        if not isinstance(value, list) or len(value) != len(addresses):
            count = len(addresses)
            raise ValueError(f"{value!r} does not give {count} values; each choice is a list, one value per address")
    return tuple(tuple(_item(inner) for inner in value) for value in values)


def _item(value: Any) -> Any:
    if isinstance(value, dict) and set(value) == {"expr"}:
        return _expression(value["expr"])
    return Expression(value) if isinstance(value, str) and _reads_as_expression(value) else value


def _expression(text: Any) -> Expression:
    if not isinstance(text, str):
        raise ValueError(f'expr is {text!r}; it takes a text such as "0.25 * head_dim"')
    _parse(text)
    return Expression(text)


def _condition(said: Any) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    if not isinstance(said, dict) or not said:
        raise ValueError(
            f"if is {said!r}; it maps addresses to values allowed, such as {{encoder.attention.kind: favor}}"
        )
    return tuple((str(address), tuple(one) if isinstance(one, list) else (one,)) for address, one in said.items())


def _bounds(kind: str, value: Any, step: Any) -> tuple[float, float, float | None]:
    if not isinstance(value, list) or len(value) != 2 or not all(map(_is_number, value)):
        raise ValueError(f"{kind} is {value!r}; it takes two numbers, [lowest, highest]")
    low, high = value
    if low >= high:
        raise ValueError(f"{kind} from {low} to {high}: the lowest must be below the highest")
    if kind == "log_uniform" and low <= 0:
        raise ValueError(f"log_uniform from {low}: it takes bounds above 0")
    if step is not None and not (_is_number(step) and step > 0):
        raise ValueError(f"step is {step!r}; it takes a number above 0")
    if kind == "int_uniform" and not all(isinstance(number, int) for number in (low, high, step or 1)):
        raise ValueError(f"int_uniform from {low} to {high}{f' by {step}' if step else ''}: it takes whole numbers")
    if step and math.ceil(low / step) > math.floor(high / step):
        raise ValueError(f"no multiple of the step {step} lies between {low} and {high}")
    return low, high, step


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _in_order(axes: Sequence[Axis]) -> tuple[list[Axis], list[Problem]]:
    """The axes with every condition after what it asks about, otherwise as written."""
    waiting, ready = list(axes), []
    while waiting:
        blocked = {address for axis in waiting for address in axis.addresses}
        free = [axis for axis in waiting if not blocked & {address for address, _ in axis.condition}]
        if not free:
            keys = ", ".join(axis.key for axis in waiting)
            return [], [
                Problem(f"space.{waiting[0].key}", f"its `if` waits for itself, by way of {keys}; break the circle")
            ]
        ready += free
        waiting = [axis for axis in waiting if axis not in free]
    return ready, []


# ----------------------------------------------------------------------------------------------- the trials


def read_space(
    space: Mapping[str, Any],
    source: str,
    names: Names,
    *,
    trials: int | None = None,
    seed: int = 0,
    seeds: Sequence[int] = (),
    constraints: Sequence[str] = (),
) -> tuple[list[Trial], int]:
    """The trials of a space, and how many combinations the constraints left out.

    `source` names the file in errors; `trials`, `seed`, `seeds` and `constraints` are those of `search`. Raises
    UserError with every mistake in one message.
    """
    axes, problems = read_axes(space)
    if seeds:
        axes.insert(0, Axis("seed", ("seed",), "grid", tuple((number,) for number in seeds)))
        if any("seed" in axis.addresses for axis in axes[1:]):
            problems.append(Problem("search.seeds", "the space has a seed of its own; keep one of them"))
    for text in constraints:
        try:
            _parse(text)
        except ValueError as error:
            problems.append(Problem("search.constraints", str(error)))
    if trials is None:
        problems += [
            Problem(f"space.{axis.key}", f"{axis.kind} has no end of values; say how many to draw with search.trials")
            for axis in axes
            if not axis.options
        ]
        size = math.prod(len(axis.options) for axis in axes)
        if size > MOST_TRIALS:
            problems.append(Problem("space", f"has {size:,} combinations; draw some of them with search.trials"))
    if problems:
        raise complain(source, unique(problems))
    found = _Found(axes, names, constraints)
    if trials is None:
        found.add(itertools.product(*(axis.options for axis in axes)))
    else:
        _sample(found, axes, trials, seed)
    if found.problems:
        raise complain(source, unique(found.problems))
    if not found.trials:
        sentence = f"leave out all {found.left_out} combinations, so there is no trial; loosen one of them"
        raise complain(source, [Problem("search.constraints", sentence)])
    return list(found.trials.values()), found.left_out


class OpenSpace:
    """A space whose trials are proposed one by one, by somebody who learns from the earlier ones."""

    def __init__(
        self, space: Mapping[str, Any], source: str, names: Names, seed: int = 0, constraints: Sequence[str] = ()
    ) -> None:
        """As for `read_space`, which raises the UserErrors: one random trial is made to find the mistakes."""
        read_space(space, source, names, trials=1, seed=seed, constraints=constraints)
        self.axes, _ = read_axes(space)
        self._source = source
        self._found = _Found(self.axes, names, constraints)

    def trial(self, option_of: Mapping[str, tuple[Any, ...]]) -> Trial | None:
        """The trial of one option per axis key; None when it is known already or breaks a constraint."""
        new = self._found.add([[option_of[axis.key] for axis in self.axes]])
        if self._found.problems:
            raise complain(self._source, unique(self._found.problems))
        return list(self._found.trials.values())[-1] if new else None


def _sample(found: _Found, axes: Sequence[Axis], trials: int, seed: int) -> None:
    """Draws until there are `trials` samples that differ, or until there seem to be no more."""
    samples = 0
    for number in range(trials * _DRAWS_PER_TRIAL):
        # A generator per key and sample: another key in the space, or more trials, leave the other draws as they were.
        drawn = [
            axis.options if axis.kind == "grid" else (axis.draw(random.Random(f"{seed}/{number}/{axis.key}")),)
            for axis in axes
        ]
        samples += found.add(itertools.product(*drawn))
        if samples == trials or found.problems:
            return


class _Found:
    """The trials found so far, by id, with what went wrong."""

    def __init__(self, axes: Sequence[Axis], names: Names, constraints: Sequence[str]) -> None:
        self._axes, self._names, self._constraints = axes, names, constraints
        self._refused: set[str] = set()
        self.trials: dict[str, Trial] = {}
        self.problems: list[Problem] = []

    @property
    def left_out(self) -> int:
        """Different combinations that break a constraint."""
        return len(self._refused)

    def add(self, combinations: Iterable[Sequence[tuple[Any, ...]]]) -> bool:
        """Takes in combinations (an option per axis); whether any was new and allowed."""
        before = len(self.trials)
        for combination in combinations:
            try:
                trial = Trial(len(self.trials), self._overrides(combination))
                if trial.id in self.trials or trial.id in self._refused:
                    continue
                if all(self._holds(text, trial.overrides) for text in self._constraints):
                    self.trials[trial.id] = trial
                else:
                    self._refused.add(trial.id)
            except _Wrong as wrong:
                self.problems.append(wrong.problem)
        return len(self.trials) > before

    def _overrides(self, combination: Sequence[tuple[Any, ...]]) -> dict[str, Any]:
        chosen: dict[str, Any] = {}
        for axis, option in zip(self._axes, combination, strict=True):
            if all(self._condition_holds(chosen, address, allowed) for address, allowed in axis.condition):
                chosen.update(zip(axis.addresses, option, strict=True))
        done = {address: value for address, value in chosen.items() if not isinstance(value, Expression)}
        waiting = {address: value for address, value in chosen.items() if isinstance(value, Expression)}
        while waiting:
            free = [address for address in waiting if not self._waits(address, waiting)]
            if not free:
                asker, circle = min(waiting), ", ".join(waiting)
                raise _Wrong(f"space.{asker}", f"{waiting[asker].text!r} asks for itself, by way of {circle}")
            for address in free:
                done[address] = self._compute(f"space.{address}", waiting.pop(address).text, done, address)
        return {address: done[address] for address in chosen}

    def _condition_holds(self, chosen: Mapping[str, Any], address: str, allowed: Sequence[Any]) -> bool:
        if address in chosen:
            return chosen[address] in allowed
        try:
            plain = {key: value for key, value in chosen.items() if not isinstance(value, Expression)}
            return self._names(plain, address, address) in allowed
        except KeyError:
            return False

    @staticmethod
    def _waits(address: str, waiting: Mapping[str, Expression]) -> bool:
        asked = names_in(waiting[address].text)
        return any(other in asked or other.rpartition(".")[2] in asked for other in waiting)

    def _holds(self, text: str, overrides: Mapping[str, Any]) -> bool:
        return bool(self._compute("search.constraints", text, overrides, ""))

    def _compute(self, address: str, text: str, overrides: Mapping[str, Any], near: str) -> Any:
        def name(word: str) -> Any:
            if word in overrides:
                return overrides[word]
            try:
                return self._names(overrides, word, near)
            except KeyError:
                known = [key.rpartition(".")[2] for key in flatten(dict(overrides))]
                raise ValueError(f"{text!r}: {word} is no setting{did_you_mean(word, known)}") from None

        try:
            return evaluate(text, name)
        except UserError:  # the trial's settings themselves are wrong, and say so better
            raise
        except ValueError as error:
            raise _Wrong(address, str(error)) from None


class _Wrong(Exception):
    def __init__(self, address: str, sentence: str) -> None:
        super().__init__(sentence)
        self.problem = Problem(address, sentence)
