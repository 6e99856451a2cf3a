# SPDX-License-Identifier: Apache-2.0
"""Primitives that only move elements, as rules of what lies where afterwards.

A slice puts `start + stride * j` where `i` stood, a gather puts its indices there, and
a concatenation gives each part a box. What can't be put so raises `LostError`.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from runner.audit.refs import (
    MOST_RULES,
    Box,
    LostError,
    Ref,
    Refs,
    Space,
    check_count,
    intersect,
    put,
)
from runner.ops import Affine

__all__ = [
    "INDEXING",
    "align",
    "at",
    "combine",
    "flat_index",
    "merge_dims",
    "renew",
]


def at(variable: str, space: Space) -> Affine:
    """A variable as a number; one of a single value is 0."""
    one = space.sizes.get(variable) == 1
    return Affine() if one else Affine(0, ((variable, 1),))


def align(arrays: Sequence[Refs], space: Space) -> tuple[tuple[str, ...], list[Refs]]:
    """Arrays that are broadcast together, over one variable for each dimension.

    Raises:
        LostError: their shapes don't fit.
    """
    ranks = {len(array.dims) for array in arrays if array.dims}
    if len(ranks) > 1:
        raise LostError("arrays of other ranks")
    dims: list[str] = []
    for column in zip(*(array.dims for array in arrays if array.dims), strict=True):
        widest = max(column, key=lambda dim: space.sizes[dim] or 0)
        taken = widest in dims  # one variable may be a dimension at two places
        dims.append(space.like(widest, space.sizes[widest]) if taken else widest)
    return tuple(dims), [_onto(array, tuple(dims), space) for array in arrays]


def _onto(array: Refs, dims: tuple[str, ...], space: Space) -> Refs:
    """The array over the given variables; a dimension of size 1 is stretched."""
    if array.dims in (dims, ()):
        return replace(array, dims=dims)
    array = renew(array, dims, space)
    for old, new in zip(array.dims, dims, strict=True):
        same = space.sizes[old] == space.sizes[new]
        array = array.put(old, at(new, space) if same else Affine(), space)
    return replace(array, dims=dims)


def renew(array: Refs, taken: tuple[str, ...], space: Space) -> Refs:
    """The array over variables that are not taken."""
    if not set(array.dims) & set(taken):
        return array
    dims = tuple(space.like(dim, space.sizes[dim]) for dim in array.dims)
    for old, new in zip(array.dims, dims, strict=True):
        array = array.put(old, at(new, space), space)
    return replace(array, dims=dims)


def combine(arrays: Sequence[Refs], space: Space) -> Iterator[tuple[Ref, ...]]:
    """One rule of each array, wherever all of them hold; boxes are then shared."""
    if math.prod(len(array.rules) for array in arrays) > MOST_RULES:
        raise LostError("too many derivations in one array")
    for rules in itertools.product(*(array.rules for array in arrays)):
        box: Box | None = ()
        branches: dict[int, int] = {}
        for rule in rules:
            box = None if box is None else intersect(box, rule.box, space)
            for cond, branch in rule.branches:
                if branches.setdefault(cond, branch) != branch:
                    box = None
        if box is not None:
            taken = tuple(sorted(branches.items()))
            yield tuple(replace(rule, box=box, branches=taken) for rule in rules)


def _take_window(
    array: Refs, i: int, start: Affine, size: int, space: Space, *, stride: int = 1
) -> Refs:
    """Elements start, start + stride, ... of dimension `i`."""
    old = array.dims[i]
    if start == Affine() and stride == 1 and space.sizes[old] == size:
        return array
    new = space.like(old, size)
    moved = array.put(old, start + at(new, space) * stride, space)
    return replace(moved, dims=(*array.dims[:i], new, *array.dims[i + 1 :]))


def _bound(rules: Sequence[Ref], bounds: Box, space: Space) -> tuple[Ref, ...]:
    """Rules, where they hold within the bounds."""
    boxes = [(rule, intersect(rule.box, bounds, space)) for rule in rules]
    return tuple(replace(rule, box=box) for rule, box in boxes if box is not None)


def _slice(eqn: Any, ins: list[Refs], space: Space) -> list[Refs]:
    (array,), params = ins, eqn.params
    strides = params["strides"] or (1,) * len(array.dims)
    sizes = eqn.outvars[0].aval.shape
    for i, start in enumerate(params["start_indices"]):
        array = _take_window(
            array, i, Affine(int(start)), sizes[i], space, stride=int(strides[i])
        )
    return [array]


def _rev(eqn: Any, ins: list[Refs], space: Space) -> list[Refs]:
    (array,) = ins
    for i in eqn.params["dimensions"]:
        size = space.sizes[array.dims[i]] or 0
        if size > 1:
            array = _take_window(array, i, Affine(size - 1), size, space, stride=-1)
    return [array]


def _transpose(eqn: Any, ins: list[Refs], space: Space) -> list[Refs]:
    (array,) = ins
    dims = tuple(array.dims[i] for i in eqn.params["permutation"])
    return [replace(array, dims=dims)]


def _squeeze(eqn: Any, ins: list[Refs], space: Space) -> list[Refs]:
    (array,) = ins
    gone = {i % len(array.dims) for i in eqn.params["dimensions"]}
    dims = tuple(dim for i, dim in enumerate(array.dims) if i not in gone)
    return [replace(array, dims=dims)]


def _broadcast(eqn: Any, ins: list[Refs], space: Space) -> list[Refs]:
    array, shape = ins[0], eqn.params["shape"]
    places = [int(i) for i in eqn.params["broadcast_dimensions"]]
    dims = list(space.dims(shape))
    for i, old in zip(places, array.dims, strict=True):
        if space.sizes[old] == shape[i]:
            dims[i] = old
    return [replace(array, dims=tuple(dims))]


def _reshape(eqn: Any, ins: list[Refs], space: Space) -> list[Refs]:
    (array,), params = ins[:1], eqn.params
    if params["dimensions"] is not None:
        raise LostError("reshape of permuted dimensions")
    left = [dim for dim in array.dims if space.sizes[dim] != 1]
    sizes = [int(size) for size in params["new_sizes"]]
    dims = {i: space.new(1) for i, size in enumerate(sizes) if size == 1}
    wanted = [i for i in range(len(sizes)) if i not in dims]
    while left and wanted:
        olds, news = [left.pop(0)], [wanted.pop(0)]
        while (have := math.prod(space.shape(olds))) != (
            want := math.prod(sizes[i] for i in news)
        ):
            if have < want:
                olds.append(left.pop(0))
            else:
                news.append(wanted.pop(0))
        array, whole = merge_dims(array, olds, space)
        parts = [whole]
        if len(news) > 1:
            parts = [space.like(whole, sizes[i]) for i in news]
            array = array.put(whole, flat_index(parts, space), space)
        dims |= dict(zip(news, parts, strict=True))
    if left or wanted:
        raise LostError("reshape of an empty array")
    return [Refs(tuple(dims[i] for i in range(len(sizes))), array.rules)]


def flat_index(dims: Sequence[str], space: Space) -> Affine:
    """(i * m + j) * n + k: where an element of [l, m, n] lies when it is flat."""
    total = Affine()
    for dim in dims:
        total = total * (space.sizes[dim] or 0) + at(dim, space)
    return total


def merge_dims(array: Refs, dims: Sequence[str], space: Space) -> tuple[Refs, str]:
    """The array with a new variable in the place of several, and its name.

    Raises:
        LostError: there are too many rows to write them one by one.
    """
    if len(dims) == 1:
        return array, dims[0]
    (*outer, last), inner = dims, space.sizes[dims[-1]] or 0
    array, first = merge_dims(array, outer, space)
    rows = space.sizes[first] or 0
    whole = space.like(last, rows * inner)
    rules: list[Ref] = []
    for rule in array.rules:
        if _is_flat(rule, first, last, inner):
            ones = put(
                put([rule], first, Affine(), space), last, at(whole, space), space
            )
            rules += ones
            continue
        if rows > MOST_RULES:
            raise LostError("reshape of more rows than are followed")
        for row in range(rows):  # element `whole` is [row, whole - row * inner]
            low = row * inner
            ones = put([rule], first, Affine(row), space)
            ones = put(ones, last, at(whole, space) + -low, space)
            rules += _bound(ones, ((whole, low, low + inner),), space)
    return replace(array, rules=check_count(rules)), whole


def _is_flat(rule: Ref, first: str, last: str, inner: int) -> bool:
    """Whether it depends on first * inner + last alone."""
    if any(bound[0] in (first, last) for bound in rule.box):
        return False
    numbers = [n for n in (rule.number, rule.word) if n is not None]
    for op in rule.ops:
        if first not in op.axes and last not in op.axes:
            continue
        if op.body or isinstance(op.index, str):
            return False
        numbers += [n for n in (op.value, op.index) if isinstance(n, Affine)]
    terms = [dict(number.terms) for number in numbers]
    return all(t.get(first, 0) == inner * t.get(last, 0) for t in terms)


def _concatenate(eqn: Any, ins: list[Refs], space: Space) -> list[Refs]:
    i = eqn.params["dimension"]
    return [_join(ins, i, [space.sizes[a.dims[i]] or 0 for a in ins], space)]


def _join(ins: Sequence[Refs], i: int, sizes: list[int], space: Space) -> Refs:
    whole = space.like(ins[0].dims[i], sum(sizes))
    dims = (*ins[0].dims[:i], whole, *ins[0].dims[i + 1 :])
    rules: list[Ref] = []
    for array, size, stop in zip(ins, sizes, itertools.accumulate(sizes), strict=True):
        start, own = stop - size, space.like(whole, size)
        part = _onto(array, (*dims[:i], own, *dims[i + 1 :]), space)
        place = at(whole, space) + -start if size > 1 else Affine()
        moved = part.put(own, place, space).rules
        rules += _bound(moved, ((whole, start, stop),), space)
    return Refs(dims, check_count(rules))


def _stack(eqn: Any, ins: list[Refs], space: Space) -> list[Refs]:
    i = eqn.params["axis"]
    rows = [Refs((*a.dims[:i], space.new(1), *a.dims[i:]), a.rules) for a in ins]
    return [_join(rows, i, [1] * len(rows), space)]


def _tile(eqn: Any, ins: list[Refs], space: Space) -> list[Refs]:
    (array,) = ins
    for i, times in enumerate(eqn.params["reps"]):
        size = space.sizes[array.dims[i]] or 0
        if size == 1:
            dims = (*array.dims[:i], space.new(times), *array.dims[i + 1 :])
            array = replace(array, dims=dims)
        elif times != 1:
            array = _join([array] * times, i, [size] * times, space)
    return [array]


def _split(eqn: Any, ins: list[Refs], space: Space) -> list[Refs]:
    (array,), i = ins, eqn.params["axis"]
    stops = itertools.accumulate(int(size) for size in eqn.params["sizes"])
    return [
        _take_window(array, i, Affine(stop - int(size)), int(size), space)
        for size, stop in zip(eqn.params["sizes"], stops, strict=True)
    ]


INDEXING: dict[str, Callable[[Any, list[Refs], Space], list[Refs]]] = {
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "reshape": _reshape,
    "rev": _rev,
    "slice": _slice,
    "split": _split,
    "squeeze": _squeeze,
    "stack": _stack,
    "tile": _tile,
    "transpose": _transpose,
}
"""By the name of the primitive: (equation, its arrays, space) to what it gives."""
