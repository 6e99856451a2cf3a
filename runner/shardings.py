# SPDX-License-Identifier: Apache-2.0
"""How a program lies on its mesh: the layout of each array, and what is exchanged."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from runner.mesh import BATCH
from runner.program import Program, name_leaves

__all__ = ["draw_shardings", "list_collectives", "list_shardings"]

_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
_CALL = re.compile(rf"= (\S.*?) ({_KINDS})(?:-start)?\(")
_TYPE = re.compile(r"\b([a-z]+\d+\w*|pred)\[([\d,]*)\]")
_BITS = re.compile(r"\d+")
_MOST_DRAWN = 16  # devices; a picture of more is wider than a terminal
_WIDTH = 88
_DRAWN = ("batch", "activations", "params")


def list_shardings(program: Program) -> list[dict[str, Any]]:
    """A row for each array of a batch, a call and the state: axes, bytes per device.

    An activation is one of a call in training; one in a scan is that of one turn.
    None without a mesh.
    """
    mesh = program.layout.mesh
    return [_row(each, mesh) for each in _placed(program)] if mesh else []


def draw_shardings(program: Program) -> None:
    """Prints JAX's picture of the batch, and of each layout that arrays have.

    Drawn are activations and parameters of one or two dimensions, or cut along these
    alone; the squares are of one size, whatever the arrays'. None on more than 16
    devices.
    """
    mesh = program.layout.mesh
    if mesh is None or mesh.size > _MOST_DRAWN:
        return
    drawn: dict[Any, list[str]] = {}
    for placed in _placed(program):
        kind, spec = placed.path.partition("/")[0], placed.spec
        has_more = any(axes is not None for axes in spec[2:])
        if kind in _DRAWN and placed.shape and not has_more:
            cut = spec[:2] if any(axes is not None for axes in spec) else (None,)
            drawn.setdefault((kind, cut), []).append(placed.path)
    for (_, cut), (first, *more) in drawn.items():
        others = f" and {len(more):,} more" if more else ""
        print(f"\n{first}{others}")
        sharding = NamedSharding(mesh, PartitionSpec(*cut))
        jax.debug.visualize_sharding(
            (mesh.size,) * len(cut),
            sharding,
            use_color=False,
            scale=0.4,
            max_width=_WIDTH,
        )


@dataclass(frozen=True)
class _Placed:
    """An array on a mesh; `names` are None where it can have none."""

    path: str
    names: tuple[str | None, ...] | None
    shape: tuple[int, ...]
    dtype: Any
    spec: tuple[str | tuple[str, ...] | None, ...]


def _placed(program: Program) -> list[_Placed]:
    """The rows of a batch, the activations, and the arrays of the state."""
    if program.layout.mesh is None:
        return []
    x = program.data.x_train
    shape, rows = (program.order.batch_size, *x.shape[1:]), program.layout.rows
    batch = _Placed("batch/x", (BATCH,), shape, x.dtype, _whole(rows, shape))
    named = [
        _Placed(f"activations/{a.path}", a.names, a.shape, a.dtype, tuple(a.spec))
        for a in program.activations
    ]
    return [batch, *named, *_placed_state(program)]


def _placed_state(program: Program) -> Iterator[_Placed]:
    names = name_leaves(program.names)
    laid = name_leaves(program.shardings._asdict())
    for kind in ("params", "collections", "opt_state"):
        tree = {kind: getattr(program.initial, kind)}
        for path, leaf in name_leaves(tree).items():
            given = names.get(path.removeprefix("collections/"))
            axes = None if given is None else tuple(given)
            spec = _whole(laid[path], leaf.shape)
            yield _Placed(path, axes, leaf.shape, leaf.dtype, spec)


def _whole(sharding: Any, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """Axes of the mesh for each axis of an array, None for one that is not cut."""
    return (*sharding.spec, *[None] * (len(shape) - len(sharding.spec)))


def _row(placed: _Placed, mesh: Mesh) -> dict[str, Any]:
    names, shard = None, []
    if placed.names is not None:
        names = [*placed.names, *[None] * (len(placed.shape) - len(placed.names))]
    for size, cut in zip(placed.shape, placed.spec, strict=True):
        along = (cut,) if isinstance(cut, str) else cut or ()
        shard.append(-(-size // math.prod(mesh.shape[axis] for axis in along)))
    return {
        "path": placed.path,
        "names": names,
        "shape": list(placed.shape),
        "dtype": str(placed.dtype),
        "spec": [list(c) if isinstance(c, tuple) else c for c in placed.spec],
        "shard": shard,
        "bytes": math.prod(shard) * np.dtype(placed.dtype).itemsize,
    }


def list_collectives(compiled: Any) -> list[dict[str, Any]]:
    """What the devices exchange in one call, from the compiled program's own text.

    Returns:
        {kind, count, bytes}: how many operations of a kind stand in the program, and
        the bytes of their results on one device. In a loop each counts once.
    """
    found: dict[str, list[int]] = {}
    for kind, size in _calls(compiled.as_text()):
        found.setdefault(kind, []).append(size)
    return [
        {"kind": kind, "count": len(sizes), "bytes": sum(sizes)}
        for kind, sizes in sorted(found.items())
    ]


def _calls(text: str) -> Iterator[tuple[str, int]]:
    for line in text.splitlines():
        if match := _CALL.search(line):
            sizes = [_size(*each) for each in _TYPE.findall(match[1])]
            yield match[2], sum(sizes)


def _size(kind: str, shape: str) -> int:
    bits = _BITS.search(kind)
    count = math.prod(int(n) for n in shape.split(",") if n)
    return count * (int(bits[0]) if bits else 8) // 8
