# SPDX-License-Identifier: Apache-2.0
"""Plain data to frozen dataclasses, by their type hints, and back. No JAX.

One recursive builder, since OmegaConf's structured configs can't merge into
nested frozen dataclasses and turn tuples into lists. Bounds stand beside the
type: `Annotated[int, Bounds(...)]`.
"""

import dataclasses
import math
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Annotated, Any, Literal, TypeVar, Union

from runner.errors import ConfigError, did_you_mean

__all__ = [
    "Bounds",
    "Count",
    "Fraction",
    "Frozen",
    "Natural",
    "Node",
    "Positive",
    "Rate",
    "Seed",
    "Word",
    "build_dataclass",
    "freeze",
    "to_plain",
]

T = TypeVar("T")
V = TypeVar("V")


class Frozen(Mapping[Any, V]):
    """A hashable mapping; the order of its keys counts."""

    __slots__ = ("_data", "_hash")

    def __init__(self, data: Mapping[Any, V] | None = None) -> None:
        self._data: dict[Any, V] = dict(data or {})
        self._hash: int | None = None

    def __getitem__(self, key: Any) -> V:
        return self._data[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._data)

    def __len__(self) -> int:
        return len(self._data)

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash(_identity(self))
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mapping):
            return NotImplemented
        return bool(_identity(self) == _identity(other))

    def __repr__(self) -> str:
        return repr(self._data)


def _identity(value: Any) -> Any:
    """What a value is told apart by: 1, 1.0 and True are three values in a config."""
    if isinstance(value, Mapping):
        return tuple((_identity(k), _identity(v)) for k, v in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_identity, value))
    return ("str", str(value)) if isinstance(value, str) else (type(value), value)


class Node(Frozen[Any]):
    """A tree of plain data with `_target_` nodes; `runner.build` makes it real."""


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What a number may be, `low` and `high` included unless `open`."""

    low: float
    high: float = math.inf
    open: bool = False

    def __contains__(self, value: float) -> bool:
        inside = self.low < value if self.open else self.low <= value
        return inside and (value < self.high if self.open else value <= self.high)

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"above {self.low:g}" if self.open else f"at least {self.low:g}"
        between = f"{self.low} to {self.high}"
        return f"from {between}, without the ends" if self.open else f"from {between}"


Seed = Annotated[int, Bounds(-(2**63), 2**63 - 1)]  # beyond 32 bits: hazard R007
Word = Annotated[int, Bounds(0, 2**32 - 1)]
Count = Annotated[int, Bounds(1, 2**31 - 1)]
Whole = Annotated[int, Bounds(0, 2**31 - 1)]
Rate = Annotated[float, Bounds(0, 1)]
Fraction = Annotated[float, Bounds(0, 1, open=True)]
Positive = Annotated[float, Bounds(0, open=True)]
Natural = Annotated[float, Bounds(0)]

_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}


def build_dataclass(cls: type[T], data: Any, *, path: str = "") -> T:
    """Builds a frozen dataclass, and those within it, from plain data.

    Raises:
        ConfigError: an unknown or missing key, or a value of the wrong type.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(path or "config", "must be a mapping", got=data)
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            raise ConfigError(
                _join(path, key),
                "unknown key",
                got=data[key],
                allowed=f"Known: {', '.join(fields)}",
                fix=did_you_mean(key, fields),
            )
    for name, f in fields.items():
        missing = f.default is f.default_factory is dataclasses.MISSING
        if missing and name not in data:
            raise ConfigError(_join(path, name), "must be given")
    values = {k: _build(hints[k], v, _join(path, k)) for k, v in data.items()}
    return cls(**values)


def _build(hint: Any, value: Any, path: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if value == "???":
        raise ConfigError(path, "must be set", fix=f"Add {path}=... to the command")
    if origin is Annotated:
        return _bounded(_build(args[0], value, path), args[1], path)
    if origin in (Union, types.UnionType):
        return _build_union(args, value, path)
    if origin is Literal:
        return _one_of(args, value, path)
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, list | tuple):
            raise ConfigError(path, "must be a list", got=value)
        return tuple(_build(args[0], v, f"{path}[{i}]") for i, v in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        return _build_mapping(args, value, path)
    if hint is Node:
        return _build_node(value, path)
    if hint is object:
        return freeze(value, path=path)
    if dataclasses.is_dataclass(hint):
        return build_dataclass(typing.cast(type, hint), value, path=path)
    if issubclass(hint, StrEnum):
        return hint(_one_of(tuple(str(m) for m in hint), value, path))
    return _scalar(hint, value, path)


def _build_union(hints: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is None and type(None) in hints:
        return None
    some = [h for h in hints if h is not type(None)]
    if len(some) > 1 and all(dataclasses.is_dataclass(h) for h in some):
        return _build_tagged(some, value, path)
    words = tuple(
        w for h in some if typing.get_origin(h) is Literal for w in typing.get_args(h)
    )
    if value in words:
        return value
    rest = [h for h in some if typing.get_origin(h) is not Literal]
    if not rest:
        return _one_of(words, value, path)
    try:
        return _build(rest[0], value, path)
    except ConfigError as error:
        others = [repr(w) for w in words] + ["null"] * (type(None) in hints)
        if not others or error.path != path:
            raise
        either = [error.allowed, "Or: " + ", ".join(others)]
        allowed = ". ".join(filter(None, either))
        raise ConfigError(
            path, error.rule, got=value, allowed=allowed, fix=error.fix
        ) from None


def _build_tagged(classes: list[Any], value: Any, path: str) -> Any:
    """A union of dataclasses, told apart by their field `name`."""
    known = {c.__dataclass_fields__["name"].default: c for c in classes}
    if not isinstance(value, Mapping) or "name" not in value:
        raise ConfigError(path, "must be a mapping with a `name`", got=value)
    name = _one_of(tuple(known), value["name"], _join(path, "name"))
    return build_dataclass(known[name], value, path=path)


def _build_mapping(hints: tuple[Any, ...], value: Any, path: str) -> Frozen[Any]:
    key_hint, value_hint = hints
    default = _default_rule(value_hint)
    if isinstance(value, list | tuple) and default is not None:
        value = {_build(key_hint, key, path): default for key in value}
    if not isinstance(value, Mapping):
        raise ConfigError(path, "must be a mapping", got=value)
    return Frozen(
        {
            _build(key_hint, k, path): _build(value_hint, v, _join(path, k))
            for k, v in value.items()
        }
    )


def _default_rule(hint: Any) -> str | None:
    """A mapping to an enum may be written as a list: the first member for each."""
    is_enum = isinstance(hint, type) and issubclass(hint, StrEnum)
    return str(next(iter(hint))) if is_enum else None


def _build_node(value: Any, path: str) -> Node:
    if not isinstance(value, Mapping):
        raise ConfigError(path, "must be a `_target_` node", got=value)
    frozen = freeze(value, path=path)
    return Node(frozen)


def freeze(value: Any, *, path: str) -> Any:
    """Plain data as nested `Frozen` mappings and tuples; anything else is refused."""
    if value == "???":
        raise ConfigError(path, "must be set", fix=f"Add {path}=... to the command")
    if isinstance(value, Mapping):
        return Frozen({k: freeze(v, path=_join(path, k)) for k, v in value.items()})
    if isinstance(value, list | tuple):
        return tuple(freeze(v, path=f"{path}[{i}]") for i, v in enumerate(value))
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(path, "must be finite", got=value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ConfigError(path, "must be plain data", got=value)


def to_plain(value: Any) -> Any:
    """A spec, or part of one, as the plain data that would build it again."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value)]
        return {name: to_plain(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {to_plain(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, tuple):
        return [to_plain(v) for v in value]
    return str(value) if isinstance(value, StrEnum) else value


def _scalar(hint: type, value: Any, path: str) -> Any:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if hint is float and is_integer and abs(value) <= sys.float_info.max:
        value = float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(path, f"must be {_NAMES[hint]}", got=value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(path, "must be finite", got=value)
    return value


def _bounded(value: Any, bounds: Bounds, path: str) -> Any:
    if value not in bounds:
        raise ConfigError(path, "out of range", got=value, allowed=f"Allowed: {bounds}")
    return value


def _one_of(known: tuple[Any, ...], value: Any, path: str) -> Any:
    if value not in known or isinstance(value, bool):
        raise ConfigError(
            path,
            "not a choice",
            got=value,
            allowed=f"Choices: {', '.join(map(str, known))}",
            fix=did_you_mean(str(value), known),
        )
    return value


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)
