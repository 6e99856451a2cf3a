# SPDX-License-Identifier: Apache-2.0
"""The recursive builder: what it takes, what it refuses, and in which words."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.errors import ConfigError
from runner.parse import (
    Bounds,
    Count,
    Fraction,
    Frozen,
    Natural,
    Node,
    Positive,
    Rate,
    Seed,
    build_dataclass,
    freeze,
    to_plain,
)


class Color(StrEnum):
    RED = "red"
    BLUE = "blue"


class Rule(StrEnum):
    FIRST = "first"
    SECOND = "second"


@dataclass(frozen=True)
class Leaf:
    size: Count = 1
    scale: float = 1.0


@dataclass(frozen=True)
class Round:
    name: Literal["round"] = "round"
    radius: Positive = 1.0


@dataclass(frozen=True)
class Square:
    name: Literal["square"] = "square"
    side: Count = 1


@dataclass(frozen=True)
class Needs:
    size: Count
    leaf: Leaf = Leaf()


@dataclass(frozen=True)
class Plain:
    node: Node = field(default_factory=Node)
    flag: bool = False
    number: int = 0
    real: float = 0.0
    text: str = ""
    maybe_text: str | None = None
    maybe_count: Count | None = None
    count_or_auto: Count | Literal["auto"] = "auto"
    any_of: Count | Literal["auto", "never"] | None = None
    maybe_positive: Positive | None = None
    word: Literal["left", "right"] = "left"
    color: Color = Color.RED
    numbers: tuple[int, ...] = ()
    colors: tuple[Color, ...] = ()
    leaf: Leaf = Leaf()
    leaves: tuple[Leaf, ...] = ()
    shape: Round | Square = Round()
    rules: Mapping[Color, Rule] = field(default_factory=Frozen)
    by_name: Mapping[str, Leaf] = field(default_factory=Frozen)
    seed: Seed = 0
    rate: Rate = 0.0
    fraction: Fraction = 0.5
    natural: Natural = 0.0
    positive: Positive = 1.0


def build(**data: Any) -> Any:
    """The one field that is given, built."""
    (name,) = data
    return getattr(build_dataclass(Plain, data), name)


NAN, INF = math.nan, math.inf
SEEDS = "Allowed: from -9223372036854775808 to 9223372036854775807."
COUNTS = "Allowed: from 1 to 2147483647."


@pytest.mark.parametrize(
    ("name", "given", "built"),
    [
        ("flag", True, True),
        ("number", -3, -3),
        ("real", 2, 2.0),
        ("real", -0.5, -0.5),
        ("text", "", ""),
        ("maybe_text", None, None),
        ("maybe_text", "auto", "auto"),
        ("maybe_count", None, None),
        ("maybe_count", 3, 3),
        ("count_or_auto", "auto", "auto"),
        ("count_or_auto", 2**31 - 1, 2**31 - 1),
        ("any_of", "never", "never"),
        ("any_of", None, None),
        ("any_of", 7, 7),
        ("maybe_positive", 1, 1.0),
        ("word", "right", "right"),
        ("color", "blue", Color.BLUE),
        ("colors", (Color.BLUE,), (Color.BLUE,)),
        ("numbers", [1, 2], (1, 2)),
        ("numbers", (), ()),
        ("colors", ["red", "blue"], (Color.RED, Color.BLUE)),
        ("leaf", {"size": 2}, Leaf(2)),
        ("leaves", [{}, {"scale": 3}], (Leaf(), Leaf(1, 3.0))),
        ("shape", {"name": "square", "side": 2}, Square(side=2)),
        ("shape", {"name": "round"}, Round()),
        ("rules", {"blue": "second"}, Frozen({Color.BLUE: Rule.SECOND})),
        ("rules", ["blue", "red"], Frozen({"blue": "first", "red": "first"})),
        ("by_name", {"a": {"size": 5}}, Frozen({"a": Leaf(5)})),
        ("seed", 0, 0),
        ("seed", 2**32 - 1, 2**32 - 1),
        ("rate", 0, 0.0),
        ("rate", 1, 1.0),
        ("fraction", 0.001, 0.001),
        ("natural", 0, 0.0),
        ("positive", 1e-300, 1e-300),
        ("node", {"_target_": "a.B", "c": [1, {"d": None}]}, None),
    ],
)
def test_accepts(name: str, given: Any, built: Any) -> None:
    value = build(**{name: given})
    if name == "node":
        built = Node({"_target_": "a.B", "c": (1, Frozen({"d": None}))})
    assert value == built
    assert type(value) is type(built)
    hash(value)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("flag", 1, "flag: must be true or false (got 1)."),
        ("flag", "true", "flag: must be true or false (got 'true')."),
        ("number", True, "number: must be an integer (got True)."),
        ("number", 3.0, "number: must be an integer (got 3.0)."),
        ("number", "3", "number: must be an integer (got '3')."),
        ("number", None, "number: must be an integer (got None)."),
        ("number", [3], "number: must be an integer (got [3])."),
        ("real", True, "real: must be a number (got True)."),
        ("real", "1e-3", "real: must be a number (got '1e-3')."),
        ("real", NAN, "real: must be finite (got nan)."),
        ("real", -INF, "real: must be finite (got -inf)."),
        ("text", 3, "text: must be a string (got 3)."),
        ("text", None, "text: must be a string (got None)."),
        ("maybe_text", 3, "maybe_text: must be a string (got 3). Or: null."),
        (
            "maybe_count",
            0,
            "maybe_count: out of range (got 0). " + COUNTS + " Or: null.",
        ),
        (
            "maybe_count",
            True,
            "maybe_count: must be an integer (got True). Or: null.",
        ),
        (
            "count_or_auto",
            0,
            "count_or_auto: out of range (got 0). " + COUNTS + " Or: 'auto'.",
        ),
        (
            "count_or_auto",
            "atuo",
            "count_or_auto: must be an integer (got 'atuo'). Or: 'auto'.",
        ),
        (
            "count_or_auto",
            None,
            "count_or_auto: must be an integer (got None). Or: 'auto'.",
        ),
        (
            "any_of",
            1.5,
            "any_of: must be an integer (got 1.5). Or: 'auto', 'never', null.",
        ),
        (
            "maybe_positive",
            0,
            "maybe_positive: out of range (got 0). Allowed: above 0. Or: null.",
        ),
        ("maybe_positive", NAN, "maybe_positive: must be finite (got nan). Or: null."),
        (
            "word",
            "lefft",
            "word: not a choice (got 'lefft'). Choices: left, right. "
            "Did you mean 'left'?",
        ),
        ("word", True, "word: not a choice (got True). Choices: left, right."),
        ("word", [], "word: not a choice (got []). Choices: left, right."),
        (
            "color",
            "rde",
            "color: not a choice (got 'rde'). Choices: red, blue. Did you mean 'red'?",
        ),
        ("color", None, "color: not a choice (got None). Choices: red, blue."),
        ("numbers", "12", "numbers: must be a list (got '12')."),
        ("numbers", 1, "numbers: must be a list (got 1)."),
        ("numbers", {"a": 1}, "numbers: must be a list (got {'a': 1})."),
        ("numbers", [1, True], "numbers[1]: must be an integer (got True)."),
        (
            "colors",
            ["red", "x"],
            "colors[1]: not a choice (got 'x'). Choices: red, blue.",
        ),
        ("leaf", 3, "leaf: must be a mapping (got 3)."),
        ("leaf", None, "leaf: must be a mapping (got None)."),
        (
            "leaf",
            {"sise": 3},
            "leaf.sise: unknown key (got 3). Known: size, scale. Did you mean 'size'?",
        ),
        ("leaf", {"zzz": 3}, "leaf.zzz: unknown key (got 3). Known: size, scale."),
        ("leaf", {1: 3}, "leaf.1: unknown key (got 3). Known: size, scale."),
        (
            "leaves",
            [{}, {"size": 0}],
            "leaves[1].size: out of range (got 0). " + COUNTS,
        ),
        ("shape", "round", "shape: must be a mapping with a `name` (got 'round')."),
        (
            "shape",
            {"side": 1},
            "shape: must be a mapping with a `name` (got {'side': 1}).",
        ),
        (
            "shape",
            {"name": "squar"},
            "shape.name: not a choice (got 'squar'). Choices: round, square. "
            "Did you mean 'square'?",
        ),
        (
            "shape",
            {"name": "round", "side": 1},
            "shape.side: unknown key (got 1). Known: name, radius.",
        ),
        (
            "rules",
            {"green": "first"},
            "rules: not a choice (got 'green'). Choices: red, blue.",
        ),
        (
            "rules",
            {"red": "third"},
            "rules.red: not a choice (got 'third'). Choices: first, second.",
        ),
        ("rules", ["gren"], "rules: not a choice (got 'gren'). Choices: red, blue."),
        ("rules", "red", "rules: must be a mapping (got 'red')."),
        ("by_name", ["a"], "by_name: must be a mapping (got ['a'])."),
        ("by_name", {1: {}}, "by_name: must be a string (got 1)."),
        (
            "by_name",
            {"a": {"size": 0}},
            "by_name.a.size: out of range (got 0). " + COUNTS,
        ),
        ("seed", -(2**63) - 1, f"seed: out of range (got {-(2**63) - 1}). " + SEEDS),
        ("seed", 2**63, f"seed: out of range (got {2**63}). " + SEEDS),
        ("rate", 1.001, "rate: out of range (got 1.001). Allowed: from 0 to 1."),
        ("rate", -0.1, "rate: out of range (got -0.1). Allowed: from 0 to 1."),
        (
            "fraction",
            0,
            "fraction: out of range (got 0.0). Allowed: from 0 to 1, without the ends.",
        ),
        (
            "fraction",
            1.0,
            "fraction: out of range (got 1.0). Allowed: from 0 to 1, without the ends.",
        ),
        ("natural", -1e-9, "natural: out of range (got -1e-09). Allowed: at least 0."),
        ("positive", 0.0, "positive: out of range (got 0.0). Allowed: above 0."),
        ("node", 3, "node: must be a `_target_` node (got 3)."),
        ("node", ["a"], "node: must be a `_target_` node (got ['a'])."),
        ("node", {"a": {1, 2}}, "node.a: must be plain data (got {1, 2})."),
        ("node", {"a": [0, 1j]}, "node.a[1]: must be plain data (got 1j)."),
    ],
)
def test_refuses(name: str, given: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(**{name: given})
    assert str(caught.value) == message
    assert message.startswith(f"{caught.value.path}: {caught.value.rule}")


@pytest.mark.parametrize(
    ("name", "given", "path"),
    [
        ("number", "???", "number"),
        ("maybe_text", "???", "maybe_text"),
        ("word", "???", "word"),
        ("color", "???", "color"),
        ("leaf", "???", "leaf"),
        ("leaf", {"size": "???"}, "leaf.size"),
        ("leaves", "???", "leaves"),
        ("numbers", [1, "???"], "numbers[1]"),
        ("shape", "???", "shape"),
        ("shape", {"name": "square", "side": "???"}, "shape.side"),
        ("rules", "???", "rules"),
        ("rules", {"red": "???"}, "rules.red"),
        ("by_name", {"a": "???"}, "by_name.a"),
        ("node", "???", "node"),
        ("node", {"a": {"b": ["???"]}}, "node.a.b[0]"),
    ],
)
def test_refuses_what_is_not_set(name: str, given: Any, path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(**{name: given})
    expected = f"{path}: must be set. Add {path}=... to the command."
    assert str(caught.value) == expected


def test_a_number_too_large_for_a_float() -> None:
    """YAML has integers of any size; none may end in a traceback."""
    with pytest.raises(ConfigError) as caught:
        build(real=10**400)
    assert caught.value.path == "real"


@pytest.mark.parametrize("data", [None, 3, "x", ["size"]])
def test_the_whole_must_be_a_mapping(data: Any) -> None:
    with pytest.raises(ConfigError, match=r"^config: must be a mapping \(got "):
        build_dataclass(Leaf, data)


def test_a_field_without_a_default_must_be_given() -> None:
    with pytest.raises(ConfigError, match=r"^size: must be given\.$"):
        build_dataclass(Needs, {})
    with pytest.raises(ConfigError, match=r"^a\.b\.size: must be given\.$"):
        build_dataclass(Needs, {"leaf": {}}, path="a.b")
    assert build_dataclass(Needs, {"size": 2}) == Needs(2)


def test_unknown_keys_come_before_missing_ones() -> None:
    """A typo in a required key is named as such."""
    with pytest.raises(ConfigError, match=r"^sise: unknown key .*mean 'size'\?$"):
        build_dataclass(Needs, {"sise": 2})


def test_error_has_its_parts() -> None:
    with pytest.raises(ConfigError) as caught:
        build(word="lefft")
    error = caught.value
    assert (error.path, error.rule, error.got) == ("word", "not a choice", "lefft")
    assert (error.allowed, error.fix) == (
        "Choices: left, right",
        "Did you mean 'left'?",
    )
    assert error.exit_code == 2


def test_long_values_are_cut() -> None:
    with pytest.raises(ConfigError) as caught:
        build(number="x" * 500)
    assert len(str(caught.value)) < 200
    assert "..." in str(caught.value)


@pytest.mark.parametrize(
    ("bounds", "inside", "outside", "text"),
    [
        (Bounds(0), [0, 1e9], [-1e-9], "at least 0"),
        (Bounds(0, open=True), [1e-9, 1e300], [0], "above 0"),
        (Bounds(1, 3), [1, 2, 3], [0.99, 3.01], "from 1 to 3"),
        (
            Bounds(0, 1, open=True),
            [0.5],
            [0, 1],
            "from 0 to 1, without the ends",
        ),
        (Bounds(0, 2**32 - 1), [2**32 - 1], [2**32], "from 0 to 4294967295"),
    ],
)
def test_bounds(bounds: Bounds, inside: Any, outside: Any, text: str) -> None:
    assert all(value in bounds for value in inside)
    assert not any(value in bounds for value in outside)
    assert str(bounds) == text


def test_annotated_bounds_of_ones_own() -> None:
    @dataclass(frozen=True)
    class Small:
        value: Annotated[int, Bounds(2, 4)] = 2

    assert build_dataclass(Small, {"value": 4}).value == 4
    with pytest.raises(ConfigError, match=r"Allowed: from 2 to 4\.$"):
        build_dataclass(Small, {"value": 5})


# Frozen mappings ------------------------------------------------------------------

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
)
plain = st.recursive(
    scalars | st.text(max_size=5).filter(lambda s: s != "???"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=10,
)


@given(plain)
def test_freeze_and_to_plain_are_inverse(value: Any) -> None:
    frozen = freeze(value, path="x")
    assert to_plain(frozen) == value
    assert repr(to_plain(frozen)) == repr(value)  # 1 is not 1.0 is not True
    assert freeze(frozen, path="x") == frozen
    assert hash(freeze(value, path="x")) == hash(frozen)


def test_integer_keys_survive() -> None:
    """YAML has keys that are no strings; a run's record must rebuild the same tree."""
    node = build(node={"_target_": "a.B", "table": {0: "x", 1: "y"}})
    assert build(node=to_plain(node)) == node


@pytest.mark.parametrize("pair", [(1, True), (1, 1.0), (0, False)])
def test_values_of_other_types_are_other_trees(pair: tuple[Any, Any]) -> None:
    """Python takes 1 for True, a program doesn't."""
    left, right = (build(node={"_target_": "a.B", "c": value}) for value in pair)
    assert left != right


def test_frozen() -> None:
    one, other = Frozen({"a": 1, "b": 2}), Frozen({"b": 2, "a": 1})
    assert one == {"a": 1, "b": 2}
    assert one != other  # the order counts
    assert one != Frozen({"a": 1})
    assert one != 3
    assert hash(one) == hash(Frozen({"a": 1, "b": 2}))
    assert (list(one), len(one), one["b"]) == (["a", "b"], 2, 2)
    assert repr(one) == "{'a': 1, 'b': 2}"
    assert Frozen() == {}
    with pytest.raises(TypeError):
        one["a"] = 3  # type: ignore[index]
    assert isinstance(Node({}), Frozen)


def test_frozen_does_not_share_what_it_was_made_of() -> None:
    data = {"a": [1, {"b": 2}]}
    frozen = freeze(data, path="x")
    data["a"].append(3)
    data["a"][1]["b"] = 4  # type: ignore[index]
    assert to_plain(frozen) == {"a": [1, {"b": 2}]}


def test_to_plain_of_a_dataclass() -> None:
    tree = build_dataclass(
        Plain, {"rules": ["blue"], "color": "blue", "shape": {"name": "square"}}
    )
    data = to_plain(tree)
    assert data["rules"] == {"blue": "first"}
    assert type(data["color"]) is str
    assert data["shape"] == {"name": "square", "side": 1}
    assert build_dataclass(Plain, data) == tree
    assert to_plain(Leaf) is Leaf  # a class is no value to be spelled out
