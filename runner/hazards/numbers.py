# SPDX-License-Identifier: Apache-2.0
"""Sets of numbers modulo 2^32 that a derivation folds in, and where two overlap.

{offset + sum of coefficient * variable : 0 <= variable < size}  modulo 2^32
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from runner.ops import Affine

__all__ = ["Number", "is_injective", "make_number", "overlap", "share_two"]

_MODULUS = 2**32
_MOST_TRIED = 2**20  # values that are looked at one by one


class Number(NamedTuple):
    """What a number may be.

    Args:
        offset: What it is where every variable is 0.
        terms: (name, coefficient, size) of each variable; a size of None is unknown.
    """

    offset: int = 0
    terms: tuple[tuple[str, int, int | None], ...] = ()

    @property
    def most(self) -> int | None:
        """Its greatest value, not modulo 2^32; None where a size is unknown."""
        if any(size is None for _, _, size in self.terms):
            return None
        return self.offset + sum(max(0, c * ((n or 0) - 1)) for _, c, n in self.terms)

    def put(self, variable: str, value: int) -> "Number":
        """With a value where a variable stood."""
        if all(name != variable for name, _, _ in self.terms):
            return self
        found = sum(c for name, c, _ in self.terms if name == variable)
        rest = tuple(term for term in self.terms if term[0] != variable)
        return Number(self.offset + found * value, rest)

    def plus(self, other: "Number", *, times: int = 1) -> "Number":
        """self + times * other."""
        terms = {name: (c, size) for name, c, size in self.terms}
        for name, c, size in other.terms:
            terms[name] = (terms.get(name, (0, size))[0] + c * times, size)
        kept = tuple((name, c, size) for name, (c, size) in terms.items() if c)
        return Number(self.offset + other.offset * times, kept)


def make_number(value: Any, sizes: Mapping[str, int | None]) -> Number:
    """What the number of an op may be: a constant, a variable, or an `Affine`.

    Args:
        value: As it stands in the op.
        sizes: How many values each variable takes; None is unknown.
    """
    if isinstance(value, Affine):
        terms = [(axis, c, sizes[axis]) for axis, c in value.terms]
        return Number(int(value.offset), tuple(term for term in terms if term[2] != 1))
    if isinstance(value, str):
        size = sizes[value]
        return Number(0, () if size == 1 else ((str(value), 1, size),))
    return Number(int(value))


def overlap(a: Number, b: Number) -> bool:
    """Whether some value of one is a value of the other.

    Exact where all variables but the one with the most values take at most 2^20
    together; else true unless no value can be excluded by divisibility.
    """
    terms = [(c, n) for _, c, n in a.terms] + [(-c, n) for _, c, n in b.terms]
    return _reaches(b.offset - a.offset, terms)


def _reaches(target: int, terms: Iterable[tuple[int, int | None]]) -> bool:
    """Whether sum of coefficient * variable = target modulo 2^32, for some values."""
    positive: list[tuple[int, int]] = []
    for coefficient, size in terms:
        if size == 0:
            return False
        last = (_MODULUS if size is None else size) - 1
        target -= min(0, coefficient * last)  # counted from the other end
        if coefficient and last:
            positive.append((abs(coefficient), last + 1))
    *rest, (by, size) = _merge(positive) or [(1, 1)]
    if math.prod(n for _, n in rest) > _MOST_TRIED:
        return target % math.gcd(_MODULUS, by, *(c for c, _ in rest)) == 0
    left = (target % _MODULUS + _MODULUS - _values(rest)) % _MODULUS
    # by * x = left modulo 2^32 has its least solution x here, if it has any
    common = math.gcd(by, _MODULUS)
    modulus = _MODULUS // common
    inverse = pow(by // common, -1, modulus)
    x = (left // common) * inverse % modulus
    return bool(np.any((left % common == 0) & (x < size)))


def _merge(terms: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same sums from fewer terms, the one with the most values last.

    c * i + d * j takes every multiple of c up to its greatest value, where c divides d
    and d / c is not more than i has values.
    """
    merged: list[tuple[int, int]] = []
    for by, size in sorted(terms):
        if merged and by % (low := merged[-1])[0] == 0 and by <= low[0] * low[1]:
            merged[-1] = (low[0], low[1] + by // low[0] * (size - 1))
        else:
            merged.append((by, size))
    return sorted(merged, key=lambda term: term[1])


def _values(terms: Iterable[tuple[int, int]]) -> np.ndarray:
    """Every sum of coefficient * variable, modulo 2^32."""
    values = np.zeros(1, np.uint64)
    for by, size in terms:
        more = np.arange(size, dtype=np.uint64) * (by % _MODULUS) % _MODULUS
        values = (values[:, None] + more).ravel() % _MODULUS
    return values


def is_injective(number: Number) -> bool:
    """Whether it is another one for each value of its variables.

    Exact up to 2^20 values; beyond, true only where each coefficient is past the reach
    of the smaller ones. A variable of unknown size is taken not to pass 2^32.
    """
    reach: float = 0
    for _, coefficient, size in sorted(number.terms, key=lambda term: abs(term[1])):
        if abs(coefficient) <= reach:
            break
        reach += math.inf if size is None else abs(coefficient) * (size - 1)
    else:
        unknown = any(size is None for _, _, size in number.terms)
        if reach < _MODULUS or unknown:
            return True
    count = math.prod(_MODULUS if n is None else n for _, _, n in number.terms)
    if count > _MOST_TRIED:
        return False
    values = _values((c, n or 0) for _, c, n in number.terms)
    return len(np.unique(values)) == count


def share_two(a: Number, b: Number) -> bool:
    """Whether two values of one are values of the other (true where not known)."""
    if not overlap(a, b):
        return False
    sizes = [
        [_MODULUS if n is None else n for _, _, n in each.terms] for each in (a, b)
    ]
    if max(map(math.prod, sizes)) > _MOST_TRIED:
        return True
    first, second = (
        (_values((c, n or 0) for _, c, n in each.terms) + each.offset % _MODULUS)
        % _MODULUS
        for each in (a, b)
    )
    return len(np.intersect1d(first, second)) > 1
