# SPDX-License-Identifier: Apache-2.0
"""What must be true of a lifted call, said in terms of its `lift:` node.

Flax and JAX refuse the same, but with a message about their own insides. All raise
`TargetError`.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax import linen as nn
from flax.typing import In, Out

from runner.errors import TargetError
from runner.lift.fields import Lift, matches

__all__ = [
    "check_arguments",
    "check_lifted",
    "check_out_axes",
    "check_variables",
    "shape_of",
]

_SIZES = {"scan": "length", "vmap": "axis_size"}
_STACKS = ("scan", "vmap", "remat_scan")


def check_arguments(module: nn.Module, args: tuple[Any, ...], lift: Lift) -> None:
    """Refuses axes that the arguments don't have, and sizes that disagree."""
    if lift.kind not in _SIZES:
        return
    is_scan = lift.kind == "scan"
    if is_scan and not args:
        rule = "nn.scan needs to be called with what it carries"
        raise TargetError(lift.path, rule)
    mapped, after = (args[1:], " after the carry") if is_scan else (args, "")
    axes, path = lift.arguments.get("in_axes", 0), f"{lift.at}.in_axes"
    has_each = isinstance(axes, tuple) and len(axes) == len(mapped)
    if isinstance(axes, tuple | Mapping) and not has_each:
        rule = f"must have an axis for each argument{after}"
        raise TargetError(path, rule, got=axes, allowed=f"There are {len(mapped)}")
    sizes: dict[str, int] = {}
    for where, axis, name, leaf in _mapped(axes, mapped, path, ""):
        label, shape = f"argument {name}{after}", getattr(leaf, "shape", ())
        if not -len(shape) <= axis < len(shape):
            rule = "not an axis of what the module is called with"
            raise TargetError(where, rule, got=axis, allowed=f"{label} has {shape}")
        sizes[label] = shape[axis]
    _check_sizes(sizes, lift)
    if not sizes and lift.arguments.get(_SIZES[lift.kind]) is None:
        _check_has_size(module, lift)


def _check_sizes(sizes: dict[str, int], lift: Lift) -> None:
    field = _SIZES[lift.kind]
    where, wanted = f"{lift.at}.{field}", lift.arguments.get(field)
    first, size = next(iter(sizes.items()), ("", wanted))
    for label, other in sizes.items():
        what = f"{label} has {other} along the mapped axis"
        if wanted not in (None, other):
            rule = "must be the size of the mapped axis"
            raise TargetError(where, rule, got=wanted, allowed=what)
        if other != size:
            rule = f"must be axes of one size, and {first} has {size}"
            raise TargetError(f"{lift.at}.in_axes", rule, allowed=what)
    chunk = lift.arguments.get("chunk")
    if chunk is not None and size is not None and size % chunk:
        rule = f"must divide the number of iterations, {size}"
        raise TargetError(f"{lift.at}.chunk", rule, got=chunk)


def _check_has_size(module: nn.Module, lift: Lift) -> None:
    """Flax takes the size of a vmap from variables, too, where they are there."""
    axes = lift.arguments.get("variable_axes", {}).values()
    has_axis = lift.kind == "vmap" and any(axis is not None for axis in axes)
    if not has_axis or module.is_initializing():
        field = _SIZES[lift.kind]
        rule = f"nn.{lift.kind} of no mapped argument needs {field}"
        raise TargetError(lift.path, rule, fix=f"Set {lift.at}.{field}")


def _mapped(
    axes: Any, args: Any, path: str, name: str
) -> Iterator[tuple[str, int, str, Any]]:
    """Config path, axis, name and value of each array that is mapped over."""
    if isinstance(axes, int):
        for at, leaf in jax.tree_util.tree_leaves_with_path(args):
            yield path, axes, f"{name}{jax.tree_util.keystr(at)}", leaf
    elif isinstance(axes, tuple) and isinstance(args, list | tuple):
        for i, (axis, arg) in enumerate(zip(axes, args, strict=False)):
            yield from _mapped(axis, arg, f"{path}[{i}]", f"{name}[{i}]")
    elif isinstance(axes, Mapping) and isinstance(args, Mapping):
        for key in axes.keys() & args.keys():
            where = f"{path}.{key}"
            yield from _mapped(axes[key], args[key], where, f"{name}[{key!r}]")


def check_variables(module: nn.Module, lift: Lift) -> None:
    """Refuses a `variable_axes` beyond the rank of a variable."""
    axes: Mapping[Any, Any] = lift.arguments.get("variable_axes", {})
    if lift.kind not in _STACKS or not axes:
        return
    for collection, tree in module.variables.items():
        names = [key for key in axes if matches(key, collection)]
        for axis in {axes[key] for key in names[:1]}:
            number = axis.axis if isinstance(axis, In | Out) else axis
            for at, leaf in jax.tree_util.tree_leaves_with_path(tree):
                rank = len(getattr(leaf, "shape", ()))
                if number is None or -rank - 1 <= number <= rank:
                    continue
                name = jax.tree_util.keystr(at, simple=True, separator="/")
                key = f".{names[0]}" if isinstance(names[0], str) else ""
                raise TargetError(
                    f"{lift.at}.variable_axes{key}",
                    "not an axis that every variable can be stacked along",
                    got=number,
                    allowed=f"{name} has shape {leaf.shape}: {-rank - 1} to {rank}",
                )


def check_out_axes(outputs: Any, lift: Lift) -> None:
    """Refuses an axis along which an output can't be stacked."""
    axes = lift.arguments.get("out_axes", 0)
    if not isinstance(axes, int):
        return
    for leaf in jax.tree.leaves(outputs):
        rank = len(getattr(leaf, "shape", ()))
        if not -rank - 1 <= axes <= rank:
            raise TargetError(
                f"{lift.at}.out_axes",
                "not an axis that every output can be stacked along",
                got=axes,
                allowed=f"{shape_of(leaf)} has {-rank - 1} to {rank}",
            )


def check_lifted(error: Exception, lift: Lift) -> None:
    """Refuses a lift that leaves out the collection which an error is about."""
    found = re.search(r'from collection "(.*?)"', str(error))
    if found is None:
        return
    makes = lift.arguments.get("init") or lift.arguments.get("mutable")
    if lift.kind == "map_variables" and not makes:
        rule = "nn.map_variables makes variables only with init or mutable"
        fix = f"Set {lift.at}.init=true"
        raise TargetError(lift.path, rule, fix=fix) from error
    if _lifts(found[1], lift):
        return
    field = "variable_axes" if lift.kind in _STACKS else "variables"
    raise TargetError(
        lift.path,
        f"nn.{lift.kind} leaves out a collection that its module has",
        got=found[1],
        fix=f"Add it to {lift.at}.{field}",
    ) from error


def _lifts(collection: str, lift: Lift) -> bool:
    given = lift.arguments
    if lift.kind in _STACKS:
        every = {True: 0} if lift.kind == "remat_scan" else {}
        loops = (given.get("variable_broadcast"), given.get("variable_carry"))
        filters = [*given.get("variable_axes", every), *loops]
    else:
        mapped = given.get("mapped_collections", lift.kind == "map_variables")
        filters = [given.get("variables", True), mapped]
    return any(matches(key or False, collection) for key in filters)


def shape_of(leaf: Any) -> str:
    """`float32[3,4]`."""
    return str(jax.typeof(leaf).str_short())
