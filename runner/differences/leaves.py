# SPDX-License-Identifier: Apache-2.0
"""Nested plain data, leaf by leaf."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

__all__ = ["Leaf", "Presence", "compare_leaves", "is_same", "list_leaves"]

_NAME = re.compile(r"[\w-]+")


class Presence(StrEnum):
    """Which of two runs has something."""

    BOTH = "both"
    A = "a"
    B = "b"


@dataclass(frozen=True)
class Leaf:
    """A leaf that differs. One that is absent is told from one that is null.

    Args:
        path: As Hydra overrides spell it.
        presence: Which run has it.
        a: Its value in the first run; None where it is absent, too.
        b: Its value in the second run.
    """

    path: str
    presence: Presence
    a: Any = None
    b: Any = None


def list_leaves(value: Any, *, path: str = "") -> dict[str, Any]:
    """Leaves by path: `model.features[0]`; an empty mapping or list is one."""
    return dict(_walk(value, path))


def compare_leaves(a: Any, b: Any, *, path: str = "") -> tuple[Leaf, ...]:
    """The leaves that differ, in the order of the first, then of the second.

    Of equal mappings whose keys stand in another order, one leaf says the orders.
    """
    ours, theirs = list_leaves(a, path=path), list_leaves(b, path=path)
    ours, theirs = _without_filled(ours, theirs), _without_filled(theirs, ours)
    found = []
    for name in {**ours, **theirs}:
        if name not in theirs:
            found.append(Leaf(name, Presence.A, a=ours[name]))
        elif name not in ours:
            found.append(Leaf(name, Presence.B, b=theirs[name]))
        elif not is_same(ours[name], theirs[name]):
            found.append(Leaf(name, Presence.BOTH, ours[name], theirs[name]))
    return tuple(found or _orders(a, b, path))


def _without_filled(
    leaves: Mapping[str, Any], others: Mapping[str, Any]
) -> dict[str, Any]:
    """Leaves but for what is empty here and has leaves there, which say it all."""
    filled = {
        path
        for path, value in leaves.items()
        if value in ({}, []) and path not in others
        if any(other.startswith((f"{path}.", f"{path}[")) for other in others)
    }
    return {path: value for path, value in leaves.items() if path not in filled}


def is_same(a: Any, b: Any) -> bool:
    """Whether two plain values are spelled the same: 1 is neither 1.0 nor true."""
    return json.dumps(a, default=repr) == json.dumps(b, default=repr)


def _walk(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, child in value.items():
            yield from _walk(child, _join(path, str(key)))
    elif isinstance(value, list | tuple) and value:
        for i, child in enumerate(value):
            yield from _walk(child, f"{path}[{i}]")
    elif path:  # an empty root has no leaf
        yield path, value


def _join(path: str, key: str) -> str:
    if not _NAME.fullmatch(key):
        return f"{path}[{key!r}]"
    return f"{path}.{key}" if path else key


def _orders(a: Any, b: Any, path: str) -> Iterator[Leaf]:
    if isinstance(a, Mapping):
        ours, theirs = list(map(str, a)), list(map(str, b))
        if ours != theirs:
            where = f"{path} (order)" if path else "(order)"
            yield Leaf(where, Presence.BOTH, ours, theirs)
        for key, child in a.items():
            yield from _orders(child, b[key], _join(path, str(key)))
    elif isinstance(a, list | tuple):
        for i, child in enumerate(a):
            yield from _orders(child, b[i], f"{path}[{i}]")
