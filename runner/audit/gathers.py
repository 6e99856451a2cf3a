# SPDX-License-Identifier: Apache-2.0
"""Elements whose places the program computes: dynamic slices and gathers."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from runner.audit.indexing import at, combine, renew
from runner.audit.refs import Box, LostError, Ref, Refs, Space, check_count, exact, put
from runner.ops import Affine

__all__ = ["GATHERS"]


def _start(
    rule: Ref, dtype: Any, box: Box, most: int, space: Space, *, clamps: bool
) -> Affine:
    """A start of a window that may be `most` at most."""
    start = exact(rule.number or Affine(), dtype, box, space)
    low, high = space.range(start, box)
    if low >= 0 and high <= most:
        return start
    if start.is_constant and clamps:
        return Affine(min(max(int(start.offset), 0), most))
    raise LostError("an index that may lie outside")


def _dynamic_slice(eqn: Any, ins: list[Refs], space: Space) -> list[Refs]:
    array, *starts = ins
    sizes = [int(size) for size in eqn.params["slice_sizes"]]
    news = [
        dim if space.sizes[dim] == size else space.like(dim, size)
        for dim, size in zip(array.dims, sizes, strict=True)
    ]
    rules: list[Ref] = []
    for rule, *numbers in combine([array, *starts], space):
        ones: tuple[Ref, ...] = (rule,)
        for i, (old, new) in enumerate(zip(array.dims, news, strict=True)):
            if old != new:
                most = (space.sizes[old] or 0) - (space.sizes[new] or 0)
                dtype = eqn.invars[1 + i].aval.dtype
                start = _start(numbers[i], dtype, rule.box, most, space, clamps=True)
                ones = put(ones, old, start + at(new, space), space)
        rules += ones
    return [Refs(tuple(news), check_count(rules))]


def _gather(eqn: Any, ins: list[Refs], space: Space) -> list[Refs]:
    array, dn = ins[0], eqn.params["dimension_numbers"]
    indices = renew(ins[1], array.dims, space)
    sizes = [int(size) for size in eqn.params["slice_sizes"]]
    clamps, dtype = "CLIP" in str(eqn.params["mode"]), eqn.invars[1].aval.dtype
    *batch, component = indices.dims
    starts: dict[int, Refs] = {
        int(d): replace(indices.put(component, Affine(c), space), dims=())
        for c, d in enumerate(dn.start_index_map)
    }
    for d, i in zip(
        dn.operand_batching_dims, dn.start_indices_batching_dims, strict=True
    ):
        starts[int(d)] = Refs((), (Ref(number=at(batch[i], space)),))
    gone = {*dn.collapsed_slice_dims, *dn.operand_batching_dims}
    kept = [d for d in range(len(sizes)) if d not in gone]
    news = {
        d: dim
        if d not in starts and space.sizes[dim := array.dims[d]] == sizes[d]
        else space.like(array.dims[d], sizes[d])
        for d in kept
    }
    rules: list[Ref] = []
    for rule, *found in combine([array, *starts.values()], space):
        ones: tuple[Ref, ...] = (rule,)
        numbers = dict(zip(starts, found, strict=True))
        for d, old in enumerate(array.dims):
            place = at(news[d], space) if d in news else Affine()
            if d in numbers:
                most = (space.sizes[old] or 0) - sizes[d]
                found_at = numbers[d], dtype, rule.box, most, space
                place = place + _start(*found_at, clamps=clamps)
            ones = put(ones, old, place, space)
        rules += ones
    window, rest = iter(news.values()), iter(batch)
    rank = len(kept) + len(batch)
    dims = (next(window if i in dn.offset_dims else rest) for i in range(rank))
    return [Refs(tuple(dims), check_count(rules))]


GATHERS: dict[str, Callable[[Any, list[Refs], Space], list[Refs]]] = {
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
}
"""By the name of the primitive: (equation, its arrays, space) to what it gives."""
