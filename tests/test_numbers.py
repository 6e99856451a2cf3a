# SPDX-License-Identifier: Apache-2.0
"""Sets of numbers against all of their values."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import runner.hazards.numbers
from runner.hazards.numbers import Number, is_injective, make_number, overlap, share_two
from runner.ops import Affine
from runner.spec import Coordinate

M = 2**32

coefficients = st.one_of(
    st.integers(-6, 6),
    st.sampled_from([M - 1, M // 2, M // 3, 2**31, 2**30, -(2**31), 2**16, M, 7 * M]),
)
offsets = st.one_of(st.integers(-9, 9), st.sampled_from([M - 1, M // 2, M, 5 * M + 2]))
numbers = st.builds(
    lambda offset, terms: Number(
        offset, tuple((f"v{i}", c, n) for i, (c, n) in enumerate(terms))
    ),
    offsets,
    st.lists(st.tuples(coefficients, st.integers(1, 5)), max_size=3),
)


def values(number: Number) -> np.ndarray:
    """Every value, modulo 2^32, by trying all."""
    ranges = [range(size or 0) for _, _, size in number.terms]
    found = [
        number.offset
        + sum(c * i for (_, c, _), i in zip(number.terms, at, strict=True))
        for at in itertools.product(*ranges)
    ]
    return np.array([value % M for value in found], np.int64)


@given(numbers, numbers)
@settings(max_examples=500, deadline=None, derandomize=True)
@example(Number(0, (("i", -1, 3),)), Number(M - 2))  # -2 is 2^32 - 2
@example(Number(0, (("i", 2, 2), ("j", 3, 2))), Number(1))  # 0, 2, 3, 5
@example(Number(0, (("i", 2**31, 4),)), Number(2**31))  # more than once around
def test_overlap_is_that_of_the_values(a: Number, b: Number) -> None:
    shared = np.intersect1d(values(a), values(b))
    assert overlap(a, b) == overlap(b, a) == bool(len(shared))
    assert share_two(a, b) == (len(shared) > 1)


@given(numbers)
@settings(max_examples=500, deadline=None, derandomize=True)
@example(Number(0, (("i", 2, 3), ("j", 3, 2))))  # 3 is within the reach of 4
@example(Number(0, (("i", 2**31, 3),)))  # 0 and 2^32
@example(Number(0, (("i", 0, 2),)))
def test_injective_when_all_values_differ(number: Number) -> None:
    found = values(number)
    assert is_injective(number) == (len(np.unique(found)) == len(found))


@given(numbers, numbers)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_beyond_what_is_tried_nothing_is_missed(a: Number, b: Number) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner.hazards.numbers, "_MOST_TRIED", 0)
        if len(np.intersect1d(values(a), values(b))):
            assert overlap(a, b)
        if len(np.intersect1d(values(a), values(b))) > 1:
            assert share_two(a, b)
        if is_injective(a):
            assert len(np.unique(values(a))) == len(values(a))


def test_large_sizes_take_no_time_and_no_memory() -> None:
    steps = Number(0, (("step", 1, 10**9),))
    assert overlap(steps, Number(10**9 - 1))
    assert not overlap(steps, Number(10**9))
    assert overlap(steps, Number(5 * 10**8, (("step", 1, 10**9),)))
    assert not overlap(steps, Number(10**9, (("step", 1, 10**9),)))
    odd, even = (Number(i, (("step", 2, 10**9),)) for i in range(2))
    assert not overlap(odd, even)
    assert overlap(Number(3, (("i", 4, 10**9), ("j", 2, 9))), odd) is False
    assert is_injective(steps)
    assert is_injective(Number(0, (("i", 10, 10**6), ("j", 1, 10))))
    assert not is_injective(Number(0, (("i", 10, 10**6), ("j", 1, 11))))


def test_unknown_sizes() -> None:
    turns = Number(0, (("turn", 1, None),))
    assert overlap(turns, Number(M - 1))
    assert turns.most is None
    assert is_injective(turns)
    assert is_injective(Number(0, (("turn", 4, None), ("i", 1, 4))))
    assert not is_injective(Number(0, (("turn", 4, None), ("i", 1, 5))))
    assert not is_injective(Number(0, (("turn", 1, None), ("i", 4, 4))))


def test_no_values_overlap_with_nothing() -> None:
    assert not overlap(Number(0, (("step", 1, 0),)), Number(0))
    assert is_injective(Number(0, (("step", 1, 0),)))


@pytest.mark.parametrize(
    ("value", "made"),
    [
        (7, Number(7)),
        (np.uint32(7), Number(7)),
        ("i", Number(0, (("i", 1, 3),))),
        ("one", Number(0)),
        (Coordinate.STEP, Number(0, (("step", 1, 9),))),
        (Affine(2, (("i", -4), ("one", 5))), Number(2, (("i", -4, 3),))),
        (Affine(2, (("unknown", 1),)), Number(2, (("unknown", 1, None),))),
    ],
)
def test_numbers_of_ops(value: Any, made: Number) -> None:
    sizes = {"i": 3, "one": 1, "step": 9, "unknown": None}
    assert make_number(value, sizes) == made


def test_most_put_and_plus() -> None:
    number = Number(1, (("i", 2, 3), ("j", -5, 2)))
    assert number.most == 5
    assert number.put("i", 2) == Number(5, (("j", -5, 2),))
    assert number.put("k", 2) is number
    more = number.plus(Number(1, (("j", 1, 2), ("k", 1, 4))), times=5)
    assert more == Number(6, (("i", 2, 3), ("k", 5, 4)))
