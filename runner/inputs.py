# SPDX-License-Identifier: Apache-2.0
"""Arrays that a config declares, each by one word and what belongs to it. No JAX.

    {ones: [3, 2]}   {zeros: [2, 5], dtype: int32}   {values: [[1, 2]]}   {arange: 4}
    {uniform: [3], stream: NAME}   {normal: ...}   {randint: [3], low: 0, high: 10, ...}

What is random names the stream that it is drawn from. `legacy_seed` stands in for a
stream: those inputs share one `numpy.random.RandomState`, in the order declared, as
programs share NumPy's global state after `numpy.random.seed`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from runner.errors import ConfigError
from runner.parse import Bounds, Count, Word, to_plain

__all__ = ["DRAWN", "FIXED", "InputSpec", "check_input", "flatten_values"]

FIXED = ("ones", "zeros", "values", "arange")
DRAWN = ("uniform", "normal", "randint")
_INT32 = Bounds(-(2**31), 2**31 - 1)


@dataclass(frozen=True)
class InputSpec:
    """One declared array: exactly one of the first seven fields is given.

    Args:
        ones, zeros: Its shape.
        values: Its values, as nested lists or one number.
        arange: The numbers from 0 up to, without, this one.
        uniform, normal, randint: Its shape; from 0 to 1, standard normal, integers
            from `low` up to, without, `high`.
        stream: What it is drawn from: a `jax` or `host` stream.
        legacy_seed: What it is drawn from instead, see above.
        dtype: Null is float32, or int32 for whole numbers, or bool for truths.
    """

    ones: tuple[Count, ...] | None = None
    zeros: tuple[Count, ...] | None = None
    values: object | None = None
    arange: Count | None = None
    uniform: tuple[Count, ...] | None = None
    normal: tuple[Count, ...] | None = None
    randint: tuple[Count, ...] | None = None
    low: Annotated[int, _INT32] | None = None
    high: Annotated[int, _INT32] | None = None
    stream: str | None = None
    legacy_seed: Word | None = None
    dtype: Literal["float32", "bfloat16", "int32", "bool"] | None = None

    @property
    def kind(self) -> str:
        """The word that declares it."""
        return next(word for word in (*FIXED, *DRAWN) if self._has(word))

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, where its word gives one."""
        shape: tuple[int, ...] = getattr(self, self.kind)
        return shape

    @property
    def is_drawn(self) -> bool:
        """Whether it is random."""
        return self.kind in DRAWN

    @property
    def type_name(self) -> str:
        """The `dtype` in force."""
        return self.dtype or _own_type(self)

    def _has(self, name: str) -> bool:
        return getattr(self, name) is not None


def flatten_values(values: Any) -> Iterator[Any]:
    """The numbers in nested tuples, in order."""
    if isinstance(values, tuple):
        for value in values:
            yield from flatten_values(value)
    else:
        yield values


def _own_type(spec: InputSpec) -> str:
    if spec.kind in ("arange", "randint"):
        return "int32"
    if spec.kind != "values":
        return "float32"
    types = {type(value) for value in flatten_values(spec.values)}
    return "bool" if types == {bool} else "int32" if types == {int} else "float32"


def check_input(spec: InputSpec, *, path: str) -> None:
    """Holds the rules that join the fields of one input.

    Raises:
        ConfigError: it breaks one.
    """
    words = [word for word in (*FIXED, *DRAWN) if spec._has(word)]
    if len(words) != 1:
        raise ConfigError(
            path,
            "must have exactly one word that says what it holds",
            got=words or to_plain(_given(spec)),
            allowed=f"Words: {', '.join((*FIXED, *DRAWN))}",
        )
    if spec.kind == "values":
        _check_values(spec, path)
    _check_source(spec, path)
    _check_bounds(spec, path)
    _check_dtype(spec, path)


def _given(spec: InputSpec) -> dict[str, Any]:
    return {k: v for k, v in to_plain(spec).items() if v is not None}


def _check_values(spec: InputSpec, path: str) -> None:
    where = f"{path}.values"
    numbers = list(flatten_values(spec.values))
    others = [n for n in numbers if not isinstance(n, bool | int | float)]
    if others or not numbers:
        rule = "must be numbers, in nested lists or alone"
        raise ConfigError(where, rule, got=to_plain(spec.values))
    if _shape_of(spec.values) is None:
        rule = "its lists must be of one length on each level"
        raise ConfigError(where, rule, got=to_plain(spec.values))
    if {isinstance(n, bool) for n in numbers} == {True, False}:
        rule = "mixes truths and numbers"
        raise ConfigError(where, rule, got=to_plain(spec.values))
    for number in numbers:
        if isinstance(number, int) and number not in _INT32:
            raise ConfigError(where, "no int32", got=number)


def _shape_of(values: Any) -> tuple[int, ...] | None:
    """The shape of nested tuples; None when they are ragged."""
    if not isinstance(values, tuple):
        return ()
    shapes = {_shape_of(value) for value in values}
    if len(shapes) != 1:
        return None
    (inner,) = shapes
    return None if inner is None else (len(values), *inner)


def _check_source(spec: InputSpec, path: str) -> None:
    sources = [name for name in ("stream", "legacy_seed") if spec._has(name)]
    if spec.is_drawn and len(sources) != 1:
        raise ConfigError(
            f"{path}.stream",
            f"{spec.kind} is drawn from one stream",
            got=sources or None,
            allowed="`legacy_seed` may stand in for it",
            fix=f"Set {path}.stream to a stream of rng.streams",
        )
    if sources and not spec.is_drawn:
        rule = f"{spec.kind} draws nothing"
        got = getattr(spec, sources[0])
        raise ConfigError(f"{path}.{sources[0]}", rule, got=got, fix="Remove it")


def _check_bounds(spec: InputSpec, path: str) -> None:
    given = [name for name in ("low", "high") if spec._has(name)]
    if spec.kind != "randint":
        if given:
            rule = "only randint has bounds"
            got = getattr(spec, given[0])
            raise ConfigError(f"{path}.{given[0]}", rule, got=got, fix="Remove it")
        return
    low, high = spec.low, spec.high
    if low is None or high is None or not low < high:
        rule = "randint needs low < high"
        raise ConfigError(path, rule, got=[low, high], allowed="high is left out")


def _check_dtype(spec: InputSpec, path: str) -> None:
    every = ("float32", "bfloat16", "int32", "bool")
    takes: dict[str, tuple[str, ...]] = {"ones": every, "zeros": every}
    takes |= {"uniform": every[:2], "normal": every[:2], "randint": ("int32",)}
    of_own = {"float32": every[:2], "int32": every[:3], "bool": every}
    takes |= {"arange": every[:3], "values": of_own[_own_type(spec)]}
    if spec.type_name not in takes[spec.kind]:
        allowed = f"Allowed: {', '.join(takes[spec.kind])}"
        rule = f"these {spec.kind} can't be of that type"
        raise ConfigError(f"{path}.dtype", rule, got=spec.dtype, allowed=allowed)
