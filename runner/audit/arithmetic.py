# SPDX-License-Identifier: Apache-2.0
"""Integers of a program that are affine in the counters of its loops.

A number is followed through what JAX does to an index or to the data of a `fold_in`:
sums, products with constants, conversions, comparisons. An integer of b bits is known
modulo 2^b; where its value matters (a comparison, an index) it must be seen to fit.
"""

import itertools
import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from runner.audit.indexing import align, combine
from runner.audit.refs import (
    Box,
    LostError,
    Ref,
    Refs,
    Space,
    check_count,
    exact,
    intersect,
    solve,
)
from runner.ops import Affine

__all__ = ["ARITHMETIC", "known_array", "number"]

_LARGEST = 1 << 12  # elements of a constant array that are looked at
_MOST_ELEMENTS = 64  # that are written one by one


def number(value: int) -> Refs:
    """A scalar that is known."""
    return Refs((), (Ref(number=Affine(int(value))),))


def known_array(value: Any, space: Space) -> Refs | None:
    """A constant array of integers; None for any other constant."""
    if isinstance(value, bool | int):
        return number(value)
    dtype, size = getattr(value, "dtype", None), getattr(value, "size", 0)
    known = isinstance(dtype, np.dtype) and not isinstance(value, jax.core.Tracer)
    if not known or not _is_integer(dtype) or not 0 < size <= _LARGEST:
        return None
    array = np.asarray(value).astype(object)
    dims = space.dims(array.shape)
    affine = _fit(array, dims)
    if affine is not None:
        return Refs(dims, (Ref(number=affine),))
    if array.size > _MOST_ELEMENTS:
        return None
    rules = []
    for place in itertools.product(*map(range, array.shape)):
        bounds = tuple((dim, i, i + 1) for dim, i in zip(dims, place, strict=True))
        box = intersect((), bounds, space)
        rules.append(Ref(number=Affine(int(array[place])), box=box or ()))
    return Refs(dims, tuple(rules))


def _fit(array: Any, dims: tuple[str, ...]) -> Affine | None:
    """The array as an affine number of its indices, if it is one."""
    origin = [0] * array.ndim
    first = array[tuple(origin)]
    affine, rest = Affine(int(first)), array - first
    for i, (dim, size) in enumerate(zip(dims, array.shape, strict=True)):
        if size > 1:
            step = int(array[(*origin[:i], 1, *origin[i + 1 :])] - first)
            affine = affine + Affine(0, ((dim, 1),)) * step
            rest = rest - np.indices(array.shape)[i].astype(object) * step
    return None if np.any(rest != 0) else affine


def _is_integer(dtype: Any) -> bool:
    return _is_bool(dtype) or np.issubdtype(dtype, np.integer)


def _is_bool(dtype: Any) -> bool:
    return np.dtype(dtype) == np.dtype(bool)


def _each(
    function: Callable[..., Affine],
) -> Callable[[Any, list[Refs], Space], list[Refs]]:
    """The function, wherever rules of all operands hold."""

    def follow(eqn: Any, ins: list[Refs], space: Space) -> list[Refs]:
        dims, arrays = align(ins, space)
        dtype, rules = eqn.outvars[0].aval.dtype, []
        for found in combine(arrays, space):
            number = function(*(rule.number or Affine() for rule in found))
            if number.is_constant:
                number = exact(number, dtype, (), space)
            rules.append(replace(found[0], number=number))
        return [Refs(dims, check_count(rules))]

    return follow


def _multiply(a: Affine, b: Affine) -> Affine:
    if a.is_constant:
        return b * int(a.offset)
    if b.is_constant:
        return a * int(b.offset)
    raise LostError("a product of two counters")


def _convert(eqn: Any, ins: list[Refs], space: Space) -> list[Refs]:
    (array,), old, new = ins, eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
    if not _is_integer(new):
        raise LostError("a number that is no integer")
    wider = np.dtype(new).itemsize > np.dtype(old).itemsize
    rules = []
    for rule in array.rules:
        number = rule.number or Affine()
        if wider or _is_bool(new) or number.is_constant:
            number = exact(number, old, rule.box, space)
        if _is_bool(new) and not set(space.range(number, rule.box)) <= {0, 1}:
            raise LostError("a number as a truth value")
        if number.is_constant:
            number = exact(number, new, (), space)
        rules.append(replace(rule, number=number))
    return [replace(array, rules=tuple(rules))]


def _compare(
    less: Callable[[Affine, Affine], Affine], *, negate: bool = False
) -> Callable[[Any, list[Refs], Space], list[Refs]]:
    """Where less(a, b) < 0, and where it is not."""

    def follow(eqn: Any, ins: list[Refs], space: Space) -> list[Refs]:
        dims, arrays = align(ins, space)
        rules: list[Ref] = []
        for a, b in combine(arrays, space):
            dtype, both = eqn.invars[0].aval.dtype, (a.number, b.number)
            x, y = (exact(n or Affine(), dtype, a.box, space) for n in both)
            for bounds, holds in _signs(less(x, y), a.box, space):
                box = intersect(a.box, bounds, space)
                if box is not None:
                    value = Affine(int(holds is not negate))
                    rules.append(replace(a, number=value, box=box))
        return [Refs(dims, check_count(rules))]

    return follow


def _signs(value: Affine, box: Box, space: Space) -> Iterator[tuple[Box, bool]]:
    """(bounds, whether value < 0 within them)."""
    low, high = space.range(value, box)
    if math.isinf(low) and math.isinf(high):
        raise LostError("a number that may be any")
    if high < 0 or low >= 0:
        yield (), high < 0
        return
    stop = None if math.isinf(high) else int(high) + 1
    if math.isinf(low):
        low = -1 << 64
    yield from ((part, True) for part in solve(box, int(low), 0, value, space))
    yield from ((part, False) for part in solve(box, 0, stop, value, space))


def _equal(eqn: Any, ins: list[Refs], space: Space) -> list[Refs]:
    """1 where a <= b and b <= a."""
    one, other = (_compare(f, negate=True) for f in (_less, _more))
    (low,), (high,) = one(eqn, ins, space), other(eqn, ins, space)
    return _each(lambda a, b: a if b.offset else Affine())(eqn, [low, high], space)


def _unequal(eqn: Any, ins: list[Refs], space: Space) -> list[Refs]:
    (same,) = _equal(eqn, ins, space)
    flipped = (replace(r, number=(r.number or Affine()) * -1 + 1) for r in same.rules)
    return [replace(same, rules=tuple(flipped))]


def _less(a: Affine, b: Affine) -> Affine:
    return a + b * -1


def _more(a: Affine, b: Affine) -> Affine:
    return b + a * -1


def _clamp(eqn: Any, ins: list[Refs], space: Space) -> list[Refs]:
    """The least and the greatest where the number is beyond them."""
    dims, arrays = align(ins, space)
    rules: list[Ref] = []
    for low, middle, high in combine(arrays, space):
        dtype, ends = eqn.invars[1].aval.dtype, (low, middle, high)
        least, value, greatest = (
            exact(end.number or Affine(), dtype, low.box, space) for end in ends
        )
        for under, is_under in _signs(_less(value, least), low.box, space):
            for over, is_over in _signs(_less(greatest, value), low.box, space):
                box = intersect(low.box, under, space)
                box = None if box is None else intersect(box, over, space)
                number = greatest if is_over else least if is_under else value
                if box is not None:
                    rules.append(replace(middle, number=number, box=box))
    return [Refs(dims, check_count(rules))]


def _constants(function: Callable[[int, int], int]) -> Any:
    def follow(a: Affine, b: Affine) -> Affine:
        if a.terms or b.terms:
            raise LostError("a number that is not affine in a counter")
        return Affine(int(function(int(a.offset), int(b.offset))))

    return _each(follow)


def _iota(eqn: Any, ins: list[Refs], space: Space) -> list[Refs]:
    dims, i = space.dims(eqn.params["shape"]), eqn.params["dimension"]
    if not _is_integer(eqn.params["dtype"]):
        raise LostError("a number that is no integer")
    many = eqn.params["shape"][i] > 1
    counter = Affine(0, ((dims[i], 1),)) if many else Affine()
    return [Refs(dims, (Ref(number=counter),))]


ARITHMETIC: dict[str, Callable[[Any, list[Refs], Space], list[Refs]]] = {
    "add": _each(operator.add),
    "sub": _each(_less),
    "mul": _each(_multiply),
    "neg": _each(lambda a: a * -1),
    "convert_element_type": _convert,
    "lt": _compare(_less),
    "gt": _compare(_more),
    "le": _compare(_more, negate=True),
    "ge": _compare(_less, negate=True),
    "eq": _equal,
    "ne": _unequal,
    "clamp": _clamp,
    "and": _constants(operator.and_),
    "or": _constants(operator.or_),
    "iota": _iota,
}
"""By the name of the primitive: (equation, its numbers, space) to what it gives."""
