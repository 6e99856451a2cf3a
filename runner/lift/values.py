# SPDX-License-Identifier: Apache-2.0
"""What YAML says for the values that lifted transforms take.

filter      true, false, a name, a list of names, {deny: filter}
axis        a number, null, {in: axis}, {out: axis}
axes        a number, or a list with one for each argument; for no axis null (vmap),
            broadcast (scan)
filter map  {name: value}; or [[filter, value], ...] for other filters than names
policy      a name of `jax.checkpoint_policies`, or {name: [arguments]}
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import linen as nn
from flax.core import DenyList
from flax.typing import In, Out

from runner.errors import TargetError, did_you_mean

__all__ = [
    "read_axes",
    "read_axis",
    "read_bool",
    "read_count",
    "read_counts",
    "read_filter",
    "read_map",
    "read_mapping",
    "read_names",
    "read_numbers",
    "read_policy",
    "read_string",
]


def read_filter(value: Any, path: str) -> Any:
    if isinstance(value, bool | str):
        return value
    if isinstance(value, list | tuple) and all(isinstance(v, str) for v in value):
        return tuple(value)
    if isinstance(value, Mapping) and list(value) == ["deny"]:
        return DenyList(read_filter(value["deny"], f"{path}.deny"))
    allowed = "true, false, a name, a list of names, or {deny: ...}"
    raise TargetError(path, "not a filter", got=value, allowed=allowed)


def read_map(value: Any, path: str, *, read: Callable[..., Any]) -> dict[Any, Any]:
    if isinstance(value, Mapping):
        return {
            read_filter(key, path): read(v, f"{path}.{key}") for key, v in value.items()
        }
    if isinstance(value, list | tuple) and all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in value
    ):
        return {
            read_filter(key, f"{path}[{i}][0]"): read(v, f"{path}[{i}][1]")
            for i, (key, v) in enumerate(value)
        }
    allowed = "{name: value}, or a list of pairs [filter, value]"
    raise TargetError(path, "must be a mapping", got=value, allowed=allowed)


def read_axis(value: Any, path: str, *, allow_none: bool = True) -> Any:
    if isinstance(value, Mapping) and list(value) in (["in"], ["out"]):
        ((side, axis),) = value.items()
        wrap = In if side == "in" else Out
        return wrap(read_axis(axis, f"{path}.{side}", allow_none=allow_none))
    if _is_int(value) or (value is None and allow_none):
        return value
    allowed = "A number, null for no axis" if allow_none else "A number"
    extra = ", {in: axis}, {out: axis}"
    raise TargetError(path, "not an axis", got=value, allowed=allowed + extra)


def read_axes(value: Any, path: str, *, unmapped: str | None) -> Any:
    """Axes of arguments: one for all, or a tree with one for each.

    Args:
        value: What the config says.
        path: Where.
        unmapped: How the transform spells no axis: None, or `broadcast`.
    """
    if value == unmapped:
        return None if unmapped is None else nn.broadcast
    if _is_int(value):
        return value
    if isinstance(value, list | tuple):
        each = enumerate(value)
        return tuple(read_axes(v, f"{path}[{i}]", unmapped=unmapped) for i, v in each)
    if isinstance(value, Mapping):
        every = value.items()
        return {k: read_axes(v, f"{path}.{k}", unmapped=unmapped) for k, v in every}
    allowed = f"A number, {unmapped or 'null'}, or a list of these"
    raise TargetError(path, "not an axis", got=value, allowed=allowed)


def read_bool(value: Any, path: str) -> bool:
    if not isinstance(value, bool):
        raise TargetError(path, "must be true or false", got=value)
    return value


def read_count(value: Any, path: str) -> int:
    if not _is_int(value) or value < 1:
        raise TargetError(path, "must be an integer above 0", got=value)
    return int(value)


def read_counts(value: Any, path: str) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not value:
        raise TargetError(path, "must be a list of integers", got=value)
    return tuple(read_count(v, f"{path}[{i}]") for i, v in enumerate(value))


def read_numbers(value: Any, path: str) -> tuple[int, ...]:
    values = value if isinstance(value, list | tuple) else (value,)
    if not all(_is_int(v) for v in values):
        rule = "must be a number or a list of numbers of arguments"
        raise TargetError(path, rule, got=value)
    return tuple(values)


def read_string(value: Any, path: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise TargetError(path, "must be a string", got=value)
    return value


def read_names(value: Any, path: str) -> tuple[str, ...]:
    values = (value,) if isinstance(value, str) else value
    if not isinstance(values, list | tuple) or not all(
        isinstance(v, str) for v in values
    ):
        raise TargetError(path, "must be a list of names", got=value)
    return tuple(values)


def read_mapping(value: Any, path: str) -> dict[Any, Any]:
    if not isinstance(value, Mapping):
        raise TargetError(path, "must be a mapping", got=value)
    return dict(value)


def read_policy(value: Any, path: str) -> Any:
    """A rematerialization policy of JAX, or one that is made from arguments."""
    if value is None:
        return None
    name, given = value, None
    if isinstance(value, Mapping) and len(value) == 1:
        ((name, given),) = value.items()
    known = {n: f for n, f in vars(jax.checkpoint_policies).items() if n[0] != "_"}
    if not isinstance(name, str) or name not in known:
        raise TargetError(
            path,
            "not a policy of jax.checkpoint_policies",
            got=name,
            allowed=f"Policies: {', '.join(sorted(known))}",
            fix=did_you_mean(str(name), known),
        )
    signature = inspect.signature(known[name])
    is_made = "params" not in signature.parameters and "_" not in signature.parameters
    if is_made != (given is not None):
        rule = "is made from arguments" if is_made else "takes no arguments"
        fix = f"Say {{{name}: [...]}}" if is_made else f"Say {name}"
        raise TargetError(path, f"{name} {rule}", got=value, fix=fix)
    if given is None:
        return known[name]
    args, kwargs = _policy_arguments(name, given, f"{path}.{name}")
    try:
        return known[name](*args, **kwargs)
    except TypeError as error:
        rule = str(error).rpartition("() ")[2]
        shown = f"Signature: {name}{signature}"
        raise TargetError(f"{path}.{name}", rule, got=given, allowed=shown) from error


def _policy_arguments(
    name: str, given: Any, path: str
) -> tuple[list[Any], dict[str, Any]]:
    read = read_policy if name == "save_from_both_policies" else lambda value, _: value
    if isinstance(given, Mapping):
        return [], {str(k): read(v, f"{path}.{k}") for k, v in given.items()}
    if not isinstance(given, list | tuple):
        raise TargetError(path, "must be a list of arguments", got=given)
    return [read(v, f"{path}[{i}]") for i, v in enumerate(given)], {}


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
