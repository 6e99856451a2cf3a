# SPDX-License-Identifier: Apache-2.0
"""What a `shard_map` does to keys: each shard has its part, by its place."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from runner.audit.indexing import flat_index, merge_dims
from runner.audit.refs import LostError, Refs, Space, Taint
from runner.audit.walker import Value, Walker, put_value, run_at

__all__ = ["shard_map"]


def shard_map(walk: Walker, eqn: Any, ins: list[Value]) -> list[Value]:
    params, here = eqn.params, walk.here.at(eqn)
    mesh, manual = params["mesh"], params["newly_manual_axes"]
    axes = {
        name: _mesh_axis(name, mesh.shape[name], walk.space)
        for name in mesh.axis_names
        if name in manual
    }
    walk.log.loops.update(axes.values())
    inner = replace(
        here,
        within=(*here.within, *axes.values()),
        mesh=tuple({**dict(here.mesh), **axes}.items()),
    )
    given = [
        _shard(value, spec, axes, walk.space)
        for value, spec in zip(ins, params["in_specs"], strict=True)
    ]
    outs = run_at(inner, walk, params["jaxpr"], given)
    return [
        _gather_shards(out, spec, axes, walk.space)
        for out, spec in zip(outs, params["out_specs"], strict=True)
    ]


def _mesh_axis(name: str, size: int, space: Space) -> str:
    """The variable of a mesh axis: its name, the same in every `shard_map`."""
    while space.sizes.setdefault(name, size) != size:
        name = f"{name}'"
    return name


def _spec_axes(spec: Any, axes: dict[str, str]) -> Iterator[tuple[int, list[str]]]:
    """(dimension, variables of the mesh axes that cut it)."""
    for i, entry in enumerate(spec):
        names = entry if isinstance(entry, tuple) else (entry,)
        cut = [axes[name] for name in names if name in axes]
        if cut:
            yield i, cut


def _shard(value: Value, spec: Any, axes: dict[str, str], space: Space) -> Value:
    """The part of an array that a shard is given."""
    for i, cut in _spec_axes(spec, axes):
        if isinstance(value, Taint):
            return value
        whole, dims = value.dims[i], list(value.dims)
        dims[i] = space.like(
            whole, (space.sizes[whole] or 0) // math.prod(space.shape(cut))
        )
        place = flat_index([*cut, dims[i]], space)
        value = put_value(value, whole, place, space)
        if isinstance(value, Refs):
            value = replace(value, dims=tuple(dims))
    return value


def _gather_shards(
    value: Value, spec: Any, axes: dict[str, str], space: Space
) -> Value:
    """An array of which each shard gave a part."""
    if isinstance(value, Taint):
        return value
    dims = list(value.dims)
    try:
        for i, cut in _spec_axes(spec, axes):
            value, dims[i] = merge_dims(value, [*cut, dims[i]], space)
    except LostError as lost:
        value = value.lost(str(lost))
    left = {name for rule in value.rules for name in rule.variables}
    left |= {bound[0] for rule in value.rules for bound in rule.box}
    if left & set(axes.values()):
        value = value.lost("differs between the shards of a mesh")
    return replace(value, dims=tuple(dims))
