# SPDX-License-Identifier: Apache-2.0
"""The fields of `lift:` nodes: what each transform takes, and which names are known.

They are the arguments of the transform in `flax.linen`, read from its signature.
`runner.lift.values` says what YAML gives for each.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from flax import linen as nn
from flax.core import DenyList
from flax.core.scope import in_filter

from runner.errors import ConfigError, TargetError, UnknownStreamError, did_you_mean
from runner.lift.values import (
    read_axes,
    read_axis,
    read_bool,
    read_count,
    read_counts,
    read_filter,
    read_map,
    read_mapping,
    read_names,
    read_numbers,
    read_policy,
    read_string,
)

__all__ = [
    "CONTROL",
    "KINDS",
    "Lift",
    "check_collections",
    "check_streams",
    "find_lifts",
    "matches",
    "read_lift",
]

KINDS = (
    *("scan", "vmap", "remat", "remat_scan", "jit", "while_loop", "cond", "switch"),
    *("map_variables", "add_metadata_axis"),
)
CONTROL = ("cond", "switch", "while_loop")

_NOT_FIELDS = ("target", "mdl", "operands", "init_carry", "device")
_STREAM_FILTERS = ("rngs", "split_rngs")
_COLLECTION_FILTERS = (
    *("variables", "variable_axes", "variable_broadcast", "variable_carry"),
    *("carry_variables", "broadcast_variables", "mapped_collections"),
)
_PARTS = ("cond_fn", "body_fn", "true_fun", "false_fun", "pred", "index")
_FUNCTIONS = ("trans_in_fn", "trans_out_fn", "data_transform")
_LIBRARIES = ("jax", "jaxlib", "flax")
_SOWN = ("intermediates", "losses")  # made by `sow`, in no model's variables


@dataclass(frozen=True)
class Lift:
    """A `lift:` node, read.

    Args:
        kind: Name of the transform in `flax.linen`.
        path: Where it stands in the config.
        name: Flax module name; None takes that of the module.
        module: What is lifted, built; None for control flow.
        arguments: The transform's arguments.
        at: Where they stand: `path`, or a method's entry under `methods`.
    """

    kind: str
    path: str
    name: str | None
    module: Any
    arguments: Mapping[str, Any]
    at: str


def read_lift(node: Mapping[str, Any], *, path: str, build: Callable[..., Any]) -> Lift:
    """Reads a node, building the nodes in it by `build(value, path=...)`.

    Raises:
        TargetError: an unknown transform or field, or a value that it can't have.
    """
    kind = node["lift"]
    if kind not in KINDS:
        raise TargetError(
            f"{path}.lift",
            "not a lifted transform",
            got=kind,
            allowed=f"Transforms: {', '.join(KINDS)}",
            fix=did_you_mean(str(kind), KINDS),
        )
    fields = _fields(kind)
    needed = _needed(kind)
    _check_known(node, ("lift", *fields, "name", *needed), path, kind)
    for key in needed:
        if key not in node:
            rule, fix = f"nn.{kind} needs {key}", f"Set {path}.{key}"
            raise TargetError(path, rule, fix=fix)
    if isinstance(node.get("methods"), Mapping):
        _check_alone(node, fields, path)
    name = read_string(node.get("name"), f"{path}.name")
    module = None if kind in CONTROL else build(node["module"], path=f"{path}.module")
    arguments = {
        key: _read(key, node[key], path=f"{path}.{key}", build=build, kind=kind)
        for key in fields
        if key in node
    }
    return Lift(kind, path, name, module, arguments, at=path)


def _check_known(
    given: Iterable[Any], known: tuple[str, ...], path: str, kind: str
) -> None:
    for key in given:
        if key not in known:
            shown = [name for name in dict.fromkeys(known) if name != "lift"]
            raise TargetError(
                f"{path}.{key}",
                f"not an argument of nn.{kind}",
                got=key,
                allowed=f"Arguments: {', '.join(shown)}",
                fix=did_you_mean(str(key), shown),
            )


def _check_alone(node: Mapping[str, Any], fields: tuple[str, ...], path: str) -> None:
    """Beside a mapping of methods, Flax ignores every other argument."""
    for key in fields:
        if key != "methods" and key in node:
            rule = "has no effect beside a mapping of methods"
            fix = f"Move it into {path}.methods"
            raise TargetError(f"{path}.{key}", rule, got=node[key], fix=fix)


def _fields(kind: str) -> tuple[str, ...]:
    """The arguments of the transform that a config can give."""
    names = inspect.signature(getattr(nn, kind)).parameters
    left = (*_NOT_FIELDS, *(["init"] if kind == "while_loop" else []))
    ours = ("chunk",) if kind == "scan" else ()
    return (*(name for name in names if name not in left), *ours)


def _needed(kind: str) -> tuple[str, ...]:
    parts = {
        "cond": ("true_fun", "false_fun"),
        "switch": ("branches",),
        "while_loop": ("cond_fn", "body_fn"),
        "remat_scan": ("module", "lengths"),
    }
    return parts.get(kind, ("module",))


def _read(
    key: str, value: Any, *, path: str, build: Callable[..., Any], kind: str
) -> Any:
    if key in (*_PARTS, *_FUNCTIONS):
        return _read_function(key, value, path, build)
    if key == "branches":
        if not isinstance(value, list | tuple) or not value:
            raise TargetError(path, "must be a list of modules", got=value)
        each = enumerate(value)
        return [_read_function(key, v, f"{path}[{i}]", build) for i, v in each]
    if key == "methods":
        return _read_methods(value, path, build, kind)
    if key in ("in_axes", "out_axes"):
        unmapped = "broadcast" if kind == "scan" else None
        return read_axes(value, path, unmapped=unmapped)
    reader = _READERS[key]
    if key == "variable_axes" and kind in ("scan", "remat_scan"):
        reader = partial(read_map, read=partial(read_axis, allow_none=False))
    return reader(value, path)


def _read_function(key: str, value: Any, path: str, build: Callable[..., Any]) -> Any:
    if value is None and key in ("pred", "index"):
        return None
    made = build(value, path=path)
    if key in _FUNCTIONS and (isinstance(made, nn.Module) or not callable(made)):
        raise TargetError(path, "must be a function", got=value)
    if not callable(made):
        raise TargetError(path, "must be a module or a function", got=value)
    inner = made.func if isinstance(made, partial) else made
    package = str(getattr(inner, "__module__", "")).partition(".")[0]
    if key in ("trans_in_fn", "trans_out_fn") and package in _LIBRARIES:
        return partial(jax.tree.map, made)  # of arrays, where Flax gives a tree
    return made


def _read_methods(value: Any, path: str, build: Callable[..., Any], kind: str) -> Any:
    if not value:
        raise TargetError(path, "must name a method", got=value)
    if not isinstance(value, Mapping):
        return read_names(value, path)
    fields = tuple(name for name in _fields(kind) if name != "methods")
    methods = {}
    for method, arguments in value.items():
        where = f"{path}.{method}"
        given = read_mapping(arguments, where)
        _check_known(given, fields, where, kind)
        methods[str(method)] = {
            key: _read(key, v, path=f"{where}.{key}", build=build, kind=kind)
            for key, v in given.items()
        }
    return methods


_READERS: dict[str, Callable[..., Any]] = {
    "variable_axes": partial(read_map, read=read_axis),
    "split_rngs": partial(read_map, read=read_bool),
    "length": read_count,
    "chunk": read_count,
    "lengths": read_counts,
    "axis_size": read_count,
    "unroll": read_count,
    "policy": read_policy,
    "metadata_params": read_mapping,
    "static_argnums": read_numbers,
    "donate_argnums": read_numbers,
    "static_argnames": read_names,
    **dict.fromkeys(("axis_name", "spmd_axis_name", "backend"), read_string),
    **dict.fromkeys(
        (
            *("variables", "rngs", "variable_broadcast", "variable_carry"),
            *("carry_variables", "broadcast_variables", "mapped_collections"),
        ),
        read_filter,
    ),
    **dict.fromkeys(
        (
            *("reverse", "concrete", "prevent_cse", "init", "mutable"),
            *("_split_transpose", "check_constancy_invariants"),
        ),
        read_bool,
    ),
}


def matches(key: Any, name: str) -> bool:
    """Whether a filter takes a collection or stream, as Flax decides."""
    return bool(in_filter(key, name))


def check_streams(node: Any, *, path: str, streams: Iterable[str]) -> None:
    """Refuses a lift in a model's config that names a stream nobody declared.

    Raises:
        UnknownStreamError: naming the field.
    """
    known = list(streams)
    for where, key in _filters(node, path, _STREAM_FILTERS):
        for name in _names(key):
            if name not in known:
                raise UnknownStreamError(
                    where,
                    "not a declared stream",
                    got=name,
                    allowed=f"Declared: {', '.join(known) or 'none'}",
                    fix=did_you_mean(name, known),
                )
        _check_some(where, key, known, "stream")


def check_collections(node: Any, *, path: str, collections: Iterable[str]) -> None:
    """Refuses a lift that names a collection which the model doesn't have.

    Raises:
        ConfigError: naming the field.
    """
    known = list(collections)
    for where, key in _filters(node, path, _COLLECTION_FILTERS):
        for name in _names(key):
            if name not in (*known, *_SOWN):
                raise ConfigError(
                    where,
                    "not a collection of this model",
                    got=name,
                    allowed=f"Collections: {', '.join(known) or 'none'}",
                    fix=did_you_mean(name, known),
                )
        _check_some(where, key, (*known, *_SOWN), "collection")


def _check_some(path: str, key: Any, known: Iterable[str], what: str) -> None:
    if isinstance(key, bool) or not key:
        return
    if not any(matches(key, name) for name in known):
        allowed = f"There is {', '.join(known)}"
        rule = f"a filter that matches no {what}"
        raise ConfigError(path, rule, got=_plain(key), allowed=allowed)


def find_lifts(node: Any, *, path: str) -> Iterator[tuple[str, str, str | None]]:
    """Path, transform and module name of each lift in a config, outermost first."""
    if isinstance(node, list | tuple):
        for i, child in enumerate(node):
            yield from find_lifts(child, path=f"{path}[{i}]")
    if not isinstance(node, Mapping):
        return
    if "lift" in node and "_target_" not in node:
        yield path, str(node["lift"]), node.get("name")
    for key, child in node.items():
        yield from find_lifts(child, path=f"{path}.{key}")


def _filters(
    node: Any, path: str, fields: tuple[str, ...]
) -> Iterator[tuple[str, Any]]:
    """Each filter in the lifts of a config, with its path."""
    if isinstance(node, list | tuple):
        for i, child in enumerate(node):
            yield from _filters(child, f"{path}[{i}]", fields)
    if not isinstance(node, Mapping):
        return
    is_lift = "lift" in node and "_target_" not in node
    for key, value in node.items():
        if is_lift and key == "methods" and isinstance(value, Mapping):
            for name, given in value.items():
                own = {"lift": node["lift"], **read_mapping(given, f"{path}.methods")}
                yield from _filters(own, f"{path}.methods.{name}", fields)
            continue
        yield from _filters(value, f"{path}.{key}", fields)
        if not is_lift or key not in fields:
            continue
        where = f"{path}.{key}"
        if _READERS[key] is read_filter:
            yield where, read_filter(value, where)
        else:
            for each in read_map(value, where, read=lambda v, _: v):
                yield where, each


def _names(key: Any) -> tuple[str, ...]:
    """The names in a filter."""
    if isinstance(key, DenyList):
        return _names(key.deny)
    if isinstance(key, bool):
        return ()
    return (key,) if isinstance(key, str) else tuple(key)


def _plain(key: Any) -> Any:
    return {"deny": _plain(key.deny)} if isinstance(key, DenyList) else key
