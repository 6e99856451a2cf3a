# SPDX-License-Identifier: Apache-2.0
"""The steps of a key's derivation, as values: no key is made here.

    fold_in(split(key(0), 4)[scan:layers], 2 * vmap:members + 1)

is a tuple of three `Op`s. What an axis counts stands in an `Affine`, so that one
tuple says the keys of every turn of a loop; `bind_ops` puts numbers in.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from runner.spec import Coordinate

__all__ = ["Affine", "Op", "as_uint32", "bind_ops", "rename_axes", "simplest"]


@dataclass(frozen=True)
class Affine:
    """offset + sum of coefficient * axis, modulo 2^32.

    Args:
        offset: What it is where every axis is 0.
        terms: (axis, coefficient) pairs in the order of their names; none is 0.
    """

    offset: Any = 0
    terms: tuple[tuple[str, int], ...] = ()

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes that it depends on."""
        return tuple(axis for axis, _ in self.terms)

    @property
    def is_constant(self) -> bool:
        """Whether it is one number, whatever the axes are."""
        return not self.terms

    def __add__(self, other: "Affine | int") -> "Affine":
        if not isinstance(other, Affine):
            return replace(self, offset=self.offset + other)
        both = dict(self.terms)
        for axis, coefficient in other.terms:
            both[axis] = both.get(axis, 0) + coefficient
        terms = tuple(sorted((a, c) for a, c in both.items() if c))
        return Affine(self.offset + other.offset, terms)

    def __mul__(self, factor: int) -> "Affine":
        terms = tuple((axis, c * factor) for axis, c in self.terms) if factor else ()
        return Affine(self.offset * factor, terms)

    def put(self, axis: str, value: "Affine") -> "Affine":
        """The same with `value` where `axis` stood."""
        found = dict(self.terms).get(axis, 0)
        if not found:
            return self
        rest = tuple((a, c) for a, c in self.terms if a != axis)
        return Affine(self.offset, rest) + value * found

    def bind(self, values: Mapping[str, Any]) -> "Affine":
        """With the axes that `values` has replaced; they may be traced numbers."""
        offset, rest = self.offset, []
        for axis, coefficient in self.terms:
            if axis not in values:
                rest.append((axis, coefficient))
            elif isinstance(value := values[axis], int | np.integer):
                offset = offset + coefficient * int(value)
            else:  # traced
                added = value.astype(np.uint32) * as_uint32(coefficient)
                offset = as_uint32(offset) + added
        return Affine(offset, tuple(rest))

    def at(self, values: Mapping[str, Any]) -> Any:
        """Its value modulo 2^32, where every axis has the given value.

        Raises:
            KeyError: an axis has none.
        """
        bound = self.bind(values)
        for axis in bound.axes:
            raise KeyError(axis)
        offset = bound.offset
        return offset % 2**32 if isinstance(offset, int) else offset


@dataclass(frozen=True)
class Op:
    """One step of a derivation.

    Args:
        op: `seed`: key(value). `fold_in`: fold_in(key, value). `split`:
            split(key, of)[index]. `carry`: `value` times split(key)[1], then
            split(key)[0]. `repeat`: `body`, one after the other, `index` times.
        value: A number (it may be traced), the coordinate that gives it, or an
            `Affine` of axes.
        index: Child that a `split` takes, or turns of a `repeat`: a number, the axis
            that gives it, or an `Affine` of axes.
        of: Number of children of a `split`.
        why: What the op stands for, in words.
        body: Ops of one turn of a `repeat`.
        counter: Name by which `body` knows its own turn, 0-based.
    """

    op: Literal["seed", "fold_in", "split", "carry", "repeat"]
    value: Any = 0
    index: "int | str | Affine" = 0
    of: int = 0
    why: str = ""
    body: tuple["Op", ...] = ()
    counter: str = ""

    @property
    def coordinate(self) -> Coordinate | None:
        """The coordinate that this op depends on."""
        return self.value if isinstance(self.value, Coordinate) else None

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes that this op depends on."""
        names = dict.fromkeys([*_axes(self.value), *_axes(self.index)])
        inner = [axis for op in self.body for axis in op.axes if axis != self.counter]
        return tuple(names | dict.fromkeys(inner))


def bind_ops(ops: tuple[Op, ...], coordinates: Mapping[str, Any]) -> tuple[Op, ...]:
    """The ops with each coordinate and axis replaced by its value.

    Raises:
        KeyError: a coordinate or axis that `ops` name has no value.
    """
    return tuple(_bind(op, coordinates) for op in ops)


def _bind(op: Op, coordinates: Mapping[str, Any]) -> Op:
    value, index = op.value, op.index
    if isinstance(value, Affine):
        value = value.at(coordinates)
    elif op.coordinate is not None:
        value = coordinates[op.coordinate]
    if isinstance(index, Affine):
        index = index.at(coordinates)
    elif isinstance(index, str):
        index = coordinates[index]
    within = {name: v for name, v in coordinates.items() if name != op.counter}
    body = tuple(_bind_body(inner, within, (op.counter,)) for inner in op.body)
    return replace(op, value=value, index=index, body=body)


def _bind_body(op: Op, values: Mapping[str, Any], open_: tuple[str, ...]) -> Op:
    """An op of a body: the counters of the repeats around it stay open."""

    def bind(number: Any) -> Any:
        if isinstance(number, str) and number not in open_:
            return values[number]
        if isinstance(number, Affine):
            number = number.bind(values)
            for axis in set(number.axes) - set(open_):
                raise KeyError(axis)
            return number.offset if number.is_constant else number
        return number

    value = op.value if op.op == "repeat" else bind(op.value)
    within = {name: v for name, v in values.items() if name != op.counter}
    body = tuple(_bind_body(b, within, (*open_, op.counter)) for b in op.body)
    return replace(op, value=value, index=bind(op.index), body=body)


def rename_axes(ops: tuple[Op, ...], names: Mapping[str, Affine]) -> tuple[Op, ...]:
    """The ops with axes written by others; constants come out as numbers.

    >>> rename_axes((Op("split", index="i", of=4),), {"i": Affine(1, (("j", 2),))})
    (Op(op='split', ..., index=Affine(offset=1, terms=(('j', 2),)), of=4, ...),)
    """
    if not names:
        return ops
    return tuple(_rename(op, names) for op in ops)


def _rename(op: Op, names: Mapping[str, Affine]) -> Op:
    if not any(axis in names for axis in op.axes):
        return op
    value, index = op.value, op.index
    if isinstance(value, Affine):
        value = _substitute(value, names)
        value = value.offset % 2**32 if value.is_constant else value
    if isinstance(index, str) and index in names:
        index = Affine(0, ((index, 1),))
    if isinstance(index, Affine):
        index = simplest(_substitute(index, names))
    within = {name: v for name, v in names.items() if name != op.counter}
    return replace(op, value=value, index=index, body=rename_axes(op.body, within))


def _substitute(number: Affine, names: Mapping[str, Affine]) -> Affine:
    """All at once, so that a name may also stand on the other side."""
    total = Affine(number.offset)
    for axis, coefficient in number.terms:
        total = total + names.get(axis, Affine(0, ((axis, 1),))) * coefficient
    return total


def simplest(index: Affine) -> int | str | Affine:
    """A number, or an axis by its name, where the index is no more than that."""
    if index.is_constant:
        return int(index.offset)
    if index.offset == 0 and len(index.terms) == 1 and index.terms[0][1] == 1:
        return index.axes[0]
    return index


def _axes(number: Any) -> Iterator[str]:
    if isinstance(number, Affine):
        yield from number.axes
    elif isinstance(number, str) and not isinstance(number, Coordinate):
        yield number


def as_uint32(value: Any) -> Any:
    """A number modulo 2^32, as numpy's or, where it is traced, JAX's uint32."""
    if isinstance(value, int):
        return np.uint32(value % 2**32)
    return value.astype(np.uint32)
