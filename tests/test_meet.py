# SPDX-License-Identifier: Apache-2.0
"""Whether derivations meet, against every key of both as JAX makes it."""

import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import runner.hazards.meet
from runner.hazards.meet import Link, SplitRule, is_distinct, link_ops, meet, split_rule
from runner.hazards.numbers import Number
from runner.keys import derive_key
from runner.ops import Affine, Op
from runner.spec import Coordinate, Impl, RngSpec

SIZES: dict[str, int | None] = {"step": 3, "i": 2, "j": 3, "turn": 3}
GENERATORS = [(impl, flag) for impl in Impl for flag in (True, False)]

MANY = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)

constants = st.integers(0, 3)
affines = st.builds(
    lambda offset, i, j: Affine(
        offset, tuple((n, c) for n, c in (("i", i), ("j", j)) if c)
    ),
    st.integers(-1, 2),
    st.integers(-1, 3),
    st.integers(-1, 2),
)
folds = st.builds(
    lambda value: Op("fold_in", value),
    st.one_of(constants, st.just(Coordinate.STEP), affines),
)
splits = st.one_of(
    st.integers(1, 4).flatmap(
        lambda of: st.builds(
            lambda index: Op("split", index=index, of=of), st.integers(0, of - 1)
        )
    ),
    st.sampled_from([Op("split", index="i", of=2), Op("split", index="j", of=3)]),
    st.sampled_from([Op("split", index="j", of=4), Op("split", index="i", of=4)]),
)
inside = st.one_of(
    st.builds(lambda value: Op("fold_in", value), constants | affines),
    splits,
    st.sampled_from([Op("fold_in", Affine(0, (("turn", 1),)))]),
    st.sampled_from([Op("split", index=Affine(1, (("turn", 1),)), of=4)]),
)
turns = st.one_of(constants, st.sampled_from(["i", "j", Affine(1, (("j", 1),))]))
repeats = st.builds(
    lambda body, index: Op("repeat", index=index, body=tuple(body), counter="turn"),
    st.lists(inside, min_size=1, max_size=2),
    turns,
)
carries = st.just(Op("carry", Coordinate.STEP))
derivations = st.builds(
    lambda seed, ops: (Op("seed", seed), *ops),
    st.integers(0, 1),
    st.lists(st.one_of(folds, splits, repeats, carries), max_size=3),
)


# What two derivations give, by trying everything --------------------------------------


def variables(ops: tuple[Op, ...]) -> list[str]:
    names = [str(op.coordinate) for op in ops if op.coordinate]
    return sorted({*names, *(axis for op in ops for axis in op.axes)})


def assignments(ops: tuple[Op, ...]) -> Iterator[dict[str, int]]:
    names = variables(ops)
    for at in itertools.product(*(range(SIZES[name] or 0) for name in names)):
        yield dict(zip(names, at, strict=True))


def flatten(ops: tuple[Op, ...], at: Mapping[str, int]) -> Iterator[tuple[Any, ...]]:
    """Each fold and each split, after all turns."""

    def value(number: Any) -> int:
        if isinstance(number, Affine):
            return int(number.offset + sum(c * at[n] for n, c in number.terms))
        return at[number] if isinstance(number, str) else int(number)

    for op in ops:
        if op.op == "carry":
            yield from [("split", 2, 1)] * value(op.value)
            yield ("split", 2, 0)
        elif op.op == "repeat":
            for turn in range(value(op.index)):
                yield from flatten(op.body, {**at, op.counter: turn})
        elif op.op == "split":
            yield ("split", op.of, value(op.index))
        else:
            yield (op.op, value(op.value) % 2**32)


@functools.cache
def key_of(impl: Impl, partitionable: bool, steps: tuple[tuple[Any, ...], ...]) -> Any:
    *before, (kind, *numbers) = steps
    if kind == "seed":
        return jax.random.key(numbers[0], impl=str(impl))
    key = key_of(impl, partitionable, tuple(before))
    with jax.threefry_partitionable(partitionable):
        if kind == "fold_in":
            return jax.random.fold_in(key, np.uint32(numbers[0]))
        return jax.random.split(key, numbers[0])[numbers[1]]


@functools.cache
def words_of(impl: Impl, partitionable: bool, steps: tuple[Any, ...]) -> bytes:
    key = key_of(impl, partitionable, steps)
    return np.asarray(jax.random.key_data(key)).tobytes()


def keys(ops: tuple[Op, ...], impl: Impl, partitionable: bool) -> list[bytes]:
    """The key of each assignment."""
    return [
        words_of(impl, partitionable, tuple(flatten(ops, at)))
        for at in assignments(ops)
    ]


def chain(ops: tuple[Op, ...], rule: SplitRule) -> tuple[Link, ...]:
    return link_ops(ops, sizes=SIZES, rule=rule)


# Tests --------------------------------------------------------------------------------


def test_what_is_tried_is_what_the_runner_derives() -> None:
    body = (
        Op("fold_in", Affine(1, (("turn", 2), ("i", 1)))),
        Op("split", index=1, of=3),
    )
    ops = (
        Op("seed", 1),
        Op("carry", Coordinate.STEP),
        Op("repeat", index="j", body=body, counter="turn"),
        Op("fold_in", Affine(-1, (("i", -3),))),
    )
    for at in [*assignments(ops)][::5]:
        key = derive_key(ops, impl="threefry2x32", coordinates=at)
        words = np.asarray(jax.random.key_data(key)).tobytes()
        assert words_of(Impl.THREEFRY2X32, True, tuple(flatten(ops, at))) == words


@pytest.mark.parametrize(("impl", "partitionable"), GENERATORS)
def test_split_rule_is_what_jax_does(impl: Impl, partitionable: bool) -> None:
    rule = split_rule(RngSpec(impl=impl, partitionable=partitionable))
    seed = ("seed", 5)

    def words(*steps: tuple[Any, ...]) -> bytes:
        return words_of(impl, partitionable, (seed, *steps))

    children = {(n, i): words(("split", n, i)) for n in (1, 2, 3, 8) for i in range(n)}
    folded = {i: words(("fold_in", i)) for i in range(9)}
    for (n, i), child in children.items():
        same = {m for (m, at), other in children.items() if at == i and other == child}
        assert same == (
            {n} if rule is SplitRule.COUNT else {m for m in (1, 2, 3, 8) if m > i}
        )
        met = [number for number, key in folded.items() if key == child]
        one = [1] if rule is SplitRule.COUNT and n == 1 else []
        assert met == ([i] if rule is SplitRule.FOLD else one)
    swapped = words(("fold_in", 1), ("fold_in", 2)) == words(
        ("fold_in", 2), ("fold_in", 1)
    )
    undone = words(("fold_in", 1), ("fold_in", 1)) == words()
    assert swapped == undone == (rule is SplitRule.INDEX)


@pytest.mark.parametrize(
    ("impl", "partitionable"),
    [(Impl.THREEFRY2X32, True), (Impl.THREEFRY2X32, False), (Impl.RBG, True)],
)
@given(a=derivations, b=derivations)
@MANY
def test_meet_exactly_where_keys_are_equal(
    impl: Impl, partitionable: bool, a: Any, b: Any
) -> None:
    rule = split_rule(RngSpec(impl=impl, partitionable=partitionable))
    first, second = (keys(ops, impl, partitionable) for ops in (a, b))
    links = chain(a, rule), chain(b, rule)
    assert meet(*links) == meet(*reversed(links)) == bool({*first} & {*second})
    assert is_distinct(links[0], rule=rule) == (len({*first}) == len(first))


def literal(steps: tuple[tuple[Any, ...], ...]) -> tuple[Op, ...]:
    """A derivation of known numbers."""
    return tuple(
        Op("split", of=step[1], index=step[2])
        if step[0] == "split"
        else Op(step[0], step[1])
        for step in steps
    )


@given(a=derivations, data=st.data())
@MANY
def test_each_of_its_keys_is_met_and_no_other(a: Any, data: Any) -> None:
    """Against one of its own chains, and the same with another number at one place."""
    at = data.draw(st.sampled_from(list(assignments(a))))
    steps = tuple(flatten(a, at))
    links, rule = chain(a, SplitRule.FOLD), SplitRule.FOLD
    assert meet(links, chain(literal(steps), rule))
    i = data.draw(st.integers(0, len(steps) - 1))
    other = ("fold_in", data.draw(st.integers(0, 4)))
    near = (*steps[:i], *([other] if i else [("seed", 2)]), *steps[i + 1 :])
    all_keys = {*keys(a, Impl.THREEFRY2X32, True)}
    met = words_of(Impl.THREEFRY2X32, True, near) in all_keys
    assert meet(links, chain(literal(near), rule)) is met


@given(a=derivations, b=derivations)
@MANY
def test_beyond_what_is_tried_nothing_is_missed(a: Any, b: Any) -> None:
    first, second = (keys(ops, Impl.THREEFRY2X32, True) for ops in (a, b))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner.hazards.meet, "_MOST_TURNS", 0)
        patch.setattr(runner.hazards.meet, "_MOST_CASES", 0)
        links = chain(a, SplitRule.FOLD), chain(b, SplitRule.FOLD)
        if {*first} & {*second}:
            assert meet(*links)
        if is_distinct(links[0], rule=SplitRule.FOLD):
            assert len({*first}) == len(first)


SEED = Op("seed", 0)
ON, HERE = Op("split", index=0, of=2), Op("split", index=1, of=2)


def looped(*after: Op, start: int = 0, axis: str = "i", size: int = 2) -> Any:
    """for i in range(size): key, here = split(key), from `start` such splits on."""
    before = Op("repeat", index=start, body=(ON,), counter="turn")
    loop = Op("repeat", index=axis, body=(ON,), counter="turn")
    sizes = {axis: size}
    ops = (SEED, before, loop, *after)
    return link_ops(ops, sizes=sizes, rule=SplitRule.FOLD)


def fixed(turns: int, *after: Op) -> Any:
    loop = Op("repeat", index=turns, body=(ON,), counter="turn")
    return link_ops((SEED, loop, *after), sizes={}, rule=SplitRule.FOLD)


@pytest.mark.parametrize("size", [1, 2, 3000])
def test_the_key_that_leaves_a_loop_is_not_one_of_those_within(size: int) -> None:
    loop = looped(HERE, size=size)
    assert meet(loop, fixed(size - 1, HERE))
    assert not meet(loop, fixed(size, HERE))
    assert not meet(loop, looped(HERE, start=size, axis="j", size=size))
    assert meet(loop, looped(HERE, start=size - 1, axis="j", size=size))


def test_a_loop_of_unknown_length_may_have_any() -> None:
    loop = link_ops(
        (SEED, Op("repeat", index="i", body=(ON,), counter="turn"), HERE),
        sizes={"i": None},
        rule=SplitRule.FOLD,
    )
    assert meet(loop, fixed(12345, HERE))
    assert not meet(loop, fixed(3, Op("split", index=2, of=3)))


@pytest.mark.parametrize("steps", [3, 10**6])
def test_a_carried_stream_against_folds(steps: int) -> None:
    """After two steps its key is fold_in(fold_in(fold_in(key, 1), 1), 0)."""
    sizes = {"step": steps}
    ops = (SEED, Op("carry", Coordinate.STEP))
    carried = link_ops(ops, sizes=sizes, rule=SplitRule.FOLD)
    twice = tuple(Op("fold_in", n) for n in (1, 1, 0))
    assert meet(carried, link_ops((SEED, *twice), sizes={}, rule=SplitRule.FOLD))
    four = tuple(Op("fold_in", n) for n in (1, 1, 1, 0))
    found = meet(carried, link_ops((SEED, *four), sizes={}, rule=SplitRule.FOLD))
    assert found is (steps > 3)
    assert is_distinct(carried, rule=SplitRule.FOLD)


def test_a_number_that_tells_the_turn() -> None:
    """fold_in of the turn itself: what is equal has equal turns."""
    turn = Op("fold_in", Affine(5, (("i", 1),)))
    assert meet(looped(turn), fixed(1, Op("fold_in", 6)))
    assert not meet(looped(turn), fixed(1, Op("fold_in", 5)))


@pytest.mark.parametrize("turns", [3, 10**5])
def test_a_turn_that_is_folded_in(turns: int) -> None:
    """key = fold_in(key, turn): 0, then 1, then 2; of many turns any order is told."""
    turn = Op("fold_in", Affine(0, (("turn", 1),)))
    loop = Op("repeat", index=turns, body=(turn,), counter="turn")
    links = link_ops((SEED, loop), sizes={}, rule=SplitRule.FOLD)
    for numbers, same in (((0, 1, 2), turns == 3), ((0, 0, 0), False)):
        folds = tuple(Op("fold_in", n) for n in numbers)
        other = link_ops((SEED, *folds), sizes={}, rule=SplitRule.FOLD)
        assert meet(links, other) is (same or turns > 3)


def test_distinct_in_nested_loops() -> None:
    """A key carried through an inner loop of n turns in each turn of an outer one."""
    inner = Op("repeat", index=4, body=(ON,), counter="a")
    outer = Op("repeat", index="i", body=(inner,), counter="b")
    here = Op("repeat", index="j", body=(ON,), counter="c")
    for size, distinct in ((4, True), (5, False)):
        links = link_ops(
            (SEED, outer, here, HERE),
            sizes={"i": 10**6, "j": size},
            rule=SplitRule.FOLD,
        )
        assert is_distinct(links, rule=SplitRule.FOLD) is distinct


def test_distinct_when_other_numbers_tell() -> None:
    """i + j alone says neither; beside i it says j."""
    both = Op("fold_in", Affine(0, (("i", 1), ("j", 1))))
    alone = Op("fold_in", Affine(0, (("i", 1),)))
    sizes = {"i": 10**6, "j": 10**6}
    rule = SplitRule.FOLD
    for ops, distinct in (((both,), False), ((both, alone), True)):
        links = link_ops((SEED, *ops), sizes=sizes, rule=rule)
        assert is_distinct(links, rule=rule) is distinct


def test_unsafe_rbg_swaps_folds() -> None:
    """key ^ f(i) ^ f(j): step and microbatch may change places."""
    rule = SplitRule.INDEX
    step, part = Op("fold_in", Coordinate.STEP), Op("fold_in", Coordinate.MICROBATCH)
    sizes = {"step": 9, "microbatch": 2}
    folded = link_ops((SEED, step, part), sizes=sizes, rule=rule)
    assert not is_distinct(folded, rule=rule)
    apart = link_ops((SEED, step, HERE, part), sizes=sizes, rule=rule)
    assert is_distinct(apart, rule=rule)
    one, two = Op("fold_in", 1), Op("fold_in", 2)
    for other, same in (
        ((two, one), True),
        ((one, two, two, two), True),
        ((one,), False),
    ):
        links = [
            link_ops((SEED, *ops), sizes={}, rule=rule) for ops in ((one, two), other)
        ]
        assert meet(*links) is same


def test_the_only_child_without_counters() -> None:
    """split(key, 1)[0] is fold_in(key, 1) there; no other child is any fold."""
    one, first = Op("split", index=0, of=1), Op("split", index=0, of=2)
    for child, number, same in ((one, 1, True), (one, 0, False), (first, 1, False)):
        ops = (SEED, child), (SEED, Op("fold_in", number))
        links = [link_ops(each, sizes={}, rule=SplitRule.COUNT) for each in ops]
        assert meet(*links) is same


def test_chains_of_nothing_in_common() -> None:
    ops = (SEED, Op("fold_in", Coordinate.STEP))
    links = link_ops(ops, sizes={"step": 0}, rule=SplitRule.FOLD)
    assert not meet(links, links)  # a coordinate without values
    assert links == (
        Link("seed", Number(0)),
        Link("fold", Number(0, (("step", 1, 0),))),
    )
