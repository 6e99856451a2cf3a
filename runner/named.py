# SPDX-License-Identifier: Apache-2.0
"""Logical names of axes: which arrays have any, and whether the rules fit them.

Parameters are named by `flax.linen.with_logical_partitioning` and the
`metadata_params` of lifts, activations by `flax.linen.with_logical_constraint`.
"""

import contextlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote

import jax
from flax.linen import spmd
from jax.sharding import PartitionSpec

from runner.audit.control import sub_jaxprs
from runner.errors import ConfigError, did_you_mean
from runner.mesh import BATCH, Layout

__all__ = ["Activation", "check_parameters", "check_rules", "find_activations"]

Names = tuple[str | None, ...]


@dataclass(frozen=True)
class Activation:
    """An array within a program, whose axes the model names.

    Args:
        path: Modules that it stands in, outermost first, and its number there.
        names: Logical name of each axis; () for one that has no names.
        shape: Of the whole array; in a scan, of one turn.
        dtype: Its type.
        spec: Axes of the mesh that each of its axes is cut along.
    """

    path: str
    names: Names
    shape: tuple[int, ...]
    dtype: Any
    spec: PartitionSpec


def find_activations(
    function: Callable[..., Any], *args: Any
) -> tuple[Activation, ...]:
    """The activations of a function that are laid out; traces it, runs nothing."""
    with _marked():
        closed = jax.make_jaxpr(function)(*args)
    found, counts = [], dict[str, int]()
    for scope, eqn in _constraints(closed.jaxpr, ""):
        path, names = _read(scope)
        number = counts[path] = counts.get(path, -1) + 1
        array, spec = eqn.invars[0].aval, eqn.params["sharding"].spec
        loose = PartitionSpec.UNCONSTRAINED
        cut = PartitionSpec(*(None if axes is loose else axes for axes in spec))
        place = f"{path}/{number}" if path else str(number)
        found.append(Activation(place, names, array.shape, array.dtype, cut))
    return tuple(found)


@contextlib.contextmanager
def _marked() -> Iterator[None]:
    """Has Flax write the logical names of each activation in the name stack."""
    name = "_with_sharding_constraint_one_fallback"  # what all ways to it lead to
    constrain = getattr(spmd, name)

    def marked(names: Any, x: Any, *args: Any, **more: Any) -> Any:
        with jax.named_scope(_mark(names)):
            return constrain(names, x, *args, **more)

    setattr(spmd, name, marked)
    try:
        yield
    finally:
        setattr(spmd, name, constrain)


def _mark(names: Any) -> str:
    spelled = [quote(n, safe="") if isinstance(n, str) else "" for n in names or ()]
    return f"axes@{':'.join(spelled)}@"


_MARK = re.compile(r"axes@([^@/]*)@")
_SCOPE = re.compile(r"\w+\((.*)\)")


def _read(scope: str) -> tuple[str, Names]:
    """Module path and names of axes, of a name stack."""
    marks = _MARK.findall(scope)
    names = marks[-1].split(":") if marks and marks[-1] else []
    parts = [_SCOPE.sub(r"\1", part) for part in _MARK.sub("", scope).split("/")]
    return "/".join(filter(None, parts)), tuple(unquote(n) or None for n in names)


def _constraints(jaxpr: Any, scope: str) -> Iterator[tuple[str, Any]]:
    for eqn in jaxpr.eqns:
        at = f"{scope}/{eqn.source_info.name_stack}"
        if eqn.primitive.name == "sharding_constraint":
            yield at, eqn
        for inner in sub_jaxprs(eqn):
            yield from _constraints(getattr(inner, "jaxpr", inner), at)


def check_rules(layout: Layout, names: Iterable[Sequence[str | None]]) -> None:
    """Refuses a rule for a logical axis that no array has.

    Args:
        layout: The layout.
        names: Logical names of the axes of each array.
    """
    known = {BATCH, *(n for axes in names for n in axes if n is not None)}
    for name, _ in layout.rules:
        if name not in known:
            raise ConfigError(
                f"mesh.rules.{name}",
                "no array has this logical axis",
                got=name,
                allowed=f"Logical axes: {', '.join(sorted(known))}",
                fix=did_you_mean(name, known),
            )


def check_parameters(
    layout: Layout, names: Mapping[str, PartitionSpec], shapes: Mapping[str, Any]
) -> None:
    """Refuses names that a variable can't have, or whose rule can't cut it.

    Args:
        layout: The layout.
        names: Logical names of the axes of each variable, by path.
        shapes: Its shape.
    """
    assert layout.mesh is not None
    for path, axes in names.items():
        shape, given = shapes[path], [name for name in axes if name is not None]
        if len(axes) > len(shape) or len(set(given)) < len(given):
            raise ConfigError(
                "model",
                f"each axis of {path} may have one name of its own",
                got=list(axes),
                allowed=f"Its shape is {list(shape)}",
                fix="Mend the names in its initializer, or null for an axis without",
            )
        for name, cut, size in zip(axes, layout.spec_of(axes), shape, strict=False):
            along = (cut,) if isinstance(cut, str) else cut or ()
            parts = math.prod(layout.mesh.shape[axis] for axis in along)
            if size % parts:
                raise ConfigError(
                    f"mesh.rules.{name}",
                    f"must divide {path}, of shape {list(shape)}, into {parts} parts",
                    got=size,
                    fix=f"Change the model, or set mesh.rules.{name}=null",
                )
