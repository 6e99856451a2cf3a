# SPDX-License-Identifier: Apache-2.0
"""How a program lies on its mesh: the layout of each array, and what is exchanged."""

import math
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from runner.mesh import shard_bytes
from runner.program import Program

__all__ = ["draw_shardings", "list_collectives", "list_shardings"]

_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
_CALL = re.compile(rf"= (\S.*?) ({_KINDS})(?:-start)?\(")
_TYPE = re.compile(r"\b([a-z]+\d+\w*|pred)\[([\d,]*)\]")
_BITS = re.compile(r"\d+")
_MOST_DRAWN = 16  # devices; a picture of more is wider than a terminal
_WIDTH = 88


def list_shardings(program: Program) -> list[dict[str, Any]]:
    """A row for each array of the state and of a batch: its axes, bytes per device.

    None without a mesh.
    """
    return [_row(*each) for each in _placed(program)]


def draw_shardings(program: Program) -> None:
    """Prints JAX's picture of the batch, and of each layout that arrays have.

    Parameters alone are drawn, of one or two dimensions; the squares are of one size,
    whatever the arrays'. None on more than 16 devices.
    """
    mesh = program.layout.mesh
    if mesh is None or mesh.size > _MOST_DRAWN:
        return
    drawn: dict[Any, list[str]] = {}
    for path, leaf, sharding in _placed(program):
        is_batch = path.startswith("batch/")
        if is_batch or (path.startswith("params/") and leaf.ndim in (1, 2)):
            spec = sharding.spec[: leaf.ndim]
            cut = tuple([*spec, *[None] * (leaf.ndim - len(spec))][:2])
            is_cut = any(axes is not None for axes in cut)
            key = is_batch, cut if is_cut else (None,)
            drawn.setdefault(key, []).append(path)
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


def _placed(program: Program) -> list[tuple[str, Any, Any]]:
    """(path, shape and dtype, sharding) of the inputs and of the state's arrays."""
    layout = program.layout
    if layout.mesh is None:
        return []
    state = program.initial._asdict(), program.shardings._asdict()
    trees = [{k: s[k] for k in ("params", "collections", "opt_state")} for s in state]
    leaves = jax.tree_util.tree_leaves_with_path(trees[0])
    found = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf, sharding)
        for (path, leaf), sharding in zip(
            leaves, jax.tree.leaves(trees[1]), strict=True
        )
    ]
    data = program.data
    rows = (program.order.batch_size, *data.x_train.shape[1:])
    batch = jax.ShapeDtypeStruct(rows, data.x_train.dtype)
    return [("batch/x", batch, layout.rows), *found]


def _row(path: str, leaf: Any, sharding: Any) -> dict[str, Any]:
    spec = [*sharding.spec, *[None] * (leaf.ndim - len(sharding.spec))]
    return {
        "path": path,
        "shape": list(leaf.shape),
        "dtype": str(leaf.dtype),
        "spec": [list(axis) if isinstance(axis, tuple) else axis for axis in spec],
        "shard": list(sharding.shard_shape(leaf.shape)),
        "bytes": shard_bytes(leaf.shape, np.dtype(leaf.dtype).itemsize, sharding),
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
