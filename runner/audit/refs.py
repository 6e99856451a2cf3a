# SPDX-License-Identifier: Apache-2.0
"""What is known of an array of keys or of integers, element by element.

    split(key, 6).reshape(2, 3)     element [i, j]: split(key, 6)[3 * i + j]
    stack([a, b])                   element [v]:    a where v is 0, b where v is 1

An array is a tuple of rules, `Ref`s, over a variable for each of its dimensions; the
axes of the loops around are variables, too. Each rule is a derivation (or a number)
that is affine in them, and holds in a box. So slices, gathers, stacks and loops all
come down to putting one affine expression where a variable stood.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from runner.ops import Affine, Op, rename_axes

__all__ = [
    "MOST_RULES",
    "Box",
    "LostError",
    "Ref",
    "Refs",
    "Space",
    "Taint",
    "check_count",
    "exact",
    "find_cases",
    "intersect",
    "put",
    "solve",
]

MOST_RULES = 4096  # of one array; more are not followed

Box = tuple[tuple[str, int, int | None], ...]
"""(variable, first value, one past the last or None), of each that is bounded."""


class LostError(Exception):
    """What is done to an array can't be written as rules; the message says what."""


@dataclass(frozen=True)
class Ref:
    """The rule of some elements of an array.

    Args:
        stream: The stream that the keys come from; None when from no stream.
        ops: From the stream's key to theirs.
        number: The integers that they are; None where they are keys.
        word: Which word of the key they are; None where they are whole keys.
        path: Module path of the last `make_rng`.
        call: Its count; None when there was none.
        untraced: Why `ops` is not the whole derivation; empty when it is.
        box: Where the rule holds.
        branches: Each `cond` that chose them, by number, and the branch.
    """

    stream: str | None = None
    ops: tuple[Op, ...] = ()
    number: Affine | None = None
    word: Affine | None = None
    path: tuple[str, ...] = ()
    call: int | None = None
    untraced: str = ""
    box: Box = ()
    branches: tuple[tuple[int, int], ...] = ()

    def add(self, op: Op) -> "Ref":
        return self if self.untraced else replace(self, ops=(*self.ops, op))

    def lost(self, why: str) -> "Ref":
        return replace(self, untraced=self.untraced or why, ops=(), word=None)

    @property
    def variables(self) -> frozenset[str]:
        """Dimensions and axes that the elements differ along."""
        names = [axis for op in self.ops for axis in op.axes]
        for number in (self.number, self.word):
            names += number.axes if number is not None else ()
        return frozenset(names)


@dataclass(frozen=True)
class Refs:
    """An array: a variable for each dimension, and rules that cover its elements."""

    dims: tuple[str, ...]
    rules: tuple[Ref, ...]

    @property
    def is_number(self) -> bool:
        return all(rule.number is not None for rule in self.rules)

    @property
    def is_uniform(self) -> bool:
        """Whether one rule holds for all of it."""
        whole = len(self.rules) == 1
        return whole and not self.rules[0].box and not self.rules[0].branches

    @property
    def constant(self) -> int | None:
        """The number that every element is, if it is one and known."""
        number = self.rules[0].number if self.is_uniform else None
        return None if number is None or number.terms else int(number.offset)

    @property
    def stream(self) -> str | None:
        """The stream of all keys in it; None when they are of several."""
        streams = {rule.stream for rule in self.rules}
        return streams.pop() if len(streams) == 1 else None

    def put(self, variable: str, value: Affine, space: "Space") -> "Refs":
        """The elements where `variable` has the value; dimensions are left alone."""
        return replace(self, rules=put(self.rules, variable, value, space))

    def lost(self, why: str) -> "Refs":
        return replace(self, rules=(Ref(self.stream).lost(self._reason or why),))

    @property
    def _reason(self) -> str:
        return next((rule.untraced for rule in self.rules if rule.untraced), "")


@dataclass(frozen=True)
class Taint:
    """A value that is not followed: what it was computed from.

    Args:
        streams: Streams of the keys that went into it.
        is_drawn: Whether random bits did.
        is_given: Whether an input of the program did that is no stream.
        why: What was first done to a key; empty when none went into it.
    """

    streams: frozenset[str | None] = frozenset()
    is_drawn: bool = False
    is_given: bool = False
    why: str = ""

    @property
    def stream(self) -> str | None:
        """The stream that it is of; None when of none, or of several."""
        return next(iter(self.streams)) if len(self.streams) == 1 else None

    def join(self, other: "Taint") -> "Taint":
        """What is computed from both."""
        if other in (self, Taint()):
            return self
        return Taint(
            self.streams | other.streams,
            self.is_drawn or other.is_drawn,
            self.is_given or other.is_given,
            self.why or other.why,
        )


@dataclass
class Space:
    """The variables of a walk: their sizes, and the places that they stand for.

    Args:
        sizes: Number of values of each; None when not known.
        origins: Module path where each dimension arose.
        names: Axis that a dimension is called by, once a draw has it.
        users: Streams whose draws have an axis.
        unknown: Variables that may be any number, also below 0.
        is_asking: Whether the length of a loop is being looked for: its counter is
            taken not to overflow, and looked at again when the length is known.
    """

    sizes: dict[str, int | None] = field(default_factory=dict)
    origins: dict[str, tuple[str, ...]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    users: dict[str, set[str | None]] = field(default_factory=dict)
    unknown: set[str] = field(default_factory=set)
    is_asking: bool = False
    count: int = 0

    def new(self, size: int | None, origin: tuple[str, ...] = ()) -> str:
        """A variable of its own."""
        self.count += 1
        name = f"%{self.count}"
        self.sizes[name], self.origins[name] = size, origin
        return name

    def like(self, variable: str, size: int | None) -> str:
        """A variable for a part of a dimension."""
        return self.new(size, self.origins.get(variable, ()))

    def dims(
        self, shape: Sequence[int], origin: tuple[str, ...] = ()
    ) -> tuple[str, ...]:
        return tuple(self.new(size, origin) for size in shape)

    def shape(self, dims: Iterable[str]) -> tuple[int, ...]:
        return tuple(self.sizes[dim] or 0 for dim in dims)

    def range(self, number: Affine, box: Box = ()) -> tuple[float, float]:
        """Least and greatest value, where its variables are in the box."""
        bounds = {variable: (start, stop) for variable, start, stop in box}
        low = high = float(number.offset)
        for variable, coefficient in number.terms:
            if variable in self.unknown:
                return -math.inf, math.inf
            start, stop = bounds.get(variable, (0, self.sizes.get(variable)))
            ends = start * coefficient, math.inf * coefficient
            if stop is not None:
                ends = start * coefficient, (stop - 1) * coefficient
            low, high = low + min(ends), high + max(ends)
        return low, high


def exact(number: Affine, dtype: Any, box: Box, space: Space) -> Affine:
    """A number as the value that it is, where it is known modulo 2^bits.

    Raises:
        LostError: it may overflow.
    """
    is_bool = np.dtype(dtype) == np.dtype(bool)
    least, most = (0, 1) if is_bool else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    if number.is_constant:
        count = int(most) - int(least) + 1
        return Affine((int(number.offset) - int(least)) % count + int(least))
    low, high = space.range(number, box)
    endless = space.is_asking and math.isinf(high - low) and low != -high
    if not endless and (low < least or high > most):
        raise LostError("a number that may overflow")
    return number


def intersect(box: Box, other: Box, space: Space) -> Box | None:
    """Where both hold; None when that is nowhere."""
    bounds = {variable: (start, stop) for variable, start, stop in box}
    for variable, start, stop in other:
        low, high = bounds.get(variable, (0, space.sizes.get(variable)))
        stops = [s for s in (high, stop) if s is not None]
        bounds[variable] = max(low, start), min(stops) if stops else None
    if any(stop is not None and start >= stop for start, stop in bounds.values()):
        return None
    kept = {
        variable: (start, stop)
        for variable, (start, stop) in bounds.items()
        if (start, stop) != (0, space.sizes.get(variable))
    }
    return tuple((v, *kept[v]) for v in sorted(kept))


def put(
    rules: Iterable[Ref], variable: str, value: Affine, space: Space
) -> tuple[Ref, ...]:
    """Rules with `value` where `variable` stood; some hold nowhere after that.

    Raises:
        LostError: one holds where no boxes can say.
    """
    return tuple(
        replace(
            rule,
            ops=rename_axes(rule.ops, {variable: value}),
            number=rule.number and rule.number.put(variable, value),
            word=rule.word and rule.word.put(variable, value),
            box=box,
        )
        for rule in rules
        for box in _put_box(rule.box, variable, value, space)
    )


def _put_box(box: Box, variable: str, value: Affine, space: Space) -> list[Box]:
    found = [bound for bound in box if bound[0] == variable]
    if not found:
        return [box]
    rest = tuple(bound for bound in box if bound[0] != variable)
    ((_, start, stop),) = found
    return solve(rest, start, stop, value, space)


def find_cases(
    rule: Ref, dtype: Any, count: int, space: Space
) -> list[tuple[int, Box]]:
    """(case, where it is chosen) by a number; one beyond them chooses the nearest.

    Raises:
        LostError: no boxes can say where.
    """
    if rule.number is None:
        raise LostError("by what is no number")
    number = exact(rule.number, dtype, rule.box, space)
    low, high = space.range(number, rule.box)
    if math.isinf(low):
        raise LostError("by a number that has no end")
    found = []
    for case in range(count):
        start = case if case else int(min(low, 0))
        stop = case + 1 if case < count - 1 else None
        if high >= start and (stop is None or low < stop):
            boxes = solve(rule.box, start, stop, number, space)
            found += [(case, box) for box in boxes]
    return found


def solve(
    rest: Box, start: int, stop: int | None, value: Affine, space: Space
) -> list[Box]:
    """Where start <= value < stop."""
    low, high = space.range(value, rest)
    if high < start or (stop is not None and low >= stop):
        return []
    if low >= start and (stop is None or high < stop):
        return [rest]
    if len(value.terms) > 1:
        return _solve_digits(rest, start, stop, value, space)
    ((axis, by),) = value.terms
    first, last = start - value.offset, None
    if stop is not None:
        last = stop - 1 - value.offset
    if by < 0:  # the bounds change places
        if last is None:
            last = int(high) - value.offset
        first, last = last, first
    bounds = (axis, max(0, -(-first // by)), None if last is None else last // by + 1)
    both = intersect(rest, (bounds,), space)
    return [] if both is None else [both]


def _solve_digits(
    rest: Box, start: int, stop: int | None, value: Affine, space: Space
) -> list[Box]:
    """For 3 * i + j: the end of a row, whole rows, the start of a row."""
    (axis, by) = max(value.terms, key=lambda term: abs(term[1]))
    if by < 0 and stop is not None:
        return _solve_digits(rest, 1 - stop, 1 - start, value * -1, space)
    inner, start = value.put(axis, Affine()) + -value.offset, start - value.offset
    stop = None if stop is None else stop - value.offset
    low, high = space.range(inner, rest)
    if by <= 0 or stop is None or low < 0 or high >= by:
        raise LostError("a part of an array that two counters choose")
    first, last = -(-start // by), stop // by
    parts = [(first, last, 0, by)]  # rows, and places within them
    if first > last:
        parts = [(last, first, start % by, stop % by)]
    else:
        parts += [(first - 1, first, start % by, by)] if start % by else []
        parts += [(last, last + 1, 0, stop % by)] if stop % by else []
    out = []
    for row, end, begin, finish in parts:
        box = intersect(rest, ((axis, row, end),), space) if row < end else None
        out += [] if box is None else solve(box, begin, finish, inner, space)
    return out


def check_count(rules: Sequence[Ref]) -> tuple[Ref, ...]:
    """The rules, if they are not too many to follow."""
    if len(rules) > MOST_RULES:
        raise LostError(f"more than {MOST_RULES} derivations in one array")
    return tuple(rules)
