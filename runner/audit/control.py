# SPDX-License-Identifier: Apache-2.0
"""Calls, branches, loops and meshes: the equations that hold programs of their own."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from runner.audit.carries import Carried, Loop, follow_carries
from runner.audit.indexing import align, at
from runner.audit.marks import Here
from runner.audit.meshes import shard_map
from runner.audit.refs import Box, LostError, Refs, Space, Taint, find_cases, intersect
from runner.audit.walker import (
    BELOW,
    CONSUMERS,
    Value,
    Walker,
    is_key,
    put_value,
    run_at,
)
from runner.ops import Affine

__all__ = ["CONTROL", "sub_jaxprs"]

_CALLS = {
    "checkpoint",
    "closed_call",
    "core_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "jit",
    "pjit",
    "remat",
    "remat2",
}


def sub_jaxprs(eqn: Any) -> list[Any]:
    """The programs that an equation holds."""
    values = list(eqn.params.values())
    values += [v for p in values if isinstance(p, tuple) for v in p]
    return [v for v in values if isinstance(v, Jaxpr | ClosedJaxpr)]


def _plain(jaxpr: Any) -> Any:
    return jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr


def _draws(jaxpr: Any) -> bool:
    """Whether random bits are drawn in a program, or in one within."""
    return any(
        eqn.primitive.name in CONSUMERS | BELOW or any(map(_draws, sub_jaxprs(eqn)))
        for eqn in _plain(jaxpr).eqns
    )


# Calls ----------------------------------------------------------------------------


def _call(walk: Walker, eqn: Any, ins: list[Value]) -> list[Value]:
    here, (inner, *more) = walk.here.at(eqn), sub_jaxprs(eqn)
    body = _plain(inner)
    fits = len(body.invars), len(body.outvars)
    if eqn.primitive.name in _CALLS and fits == (len(ins), len(eqn.outvars)):
        return run_at(here.call(eqn, body), walk, inner, ins)
    # Some other program around a program: what goes where is not known.
    name = eqn.primitive.name
    for jaxpr in (inner, *more):
        body = _plain(jaxpr)
        given = [_unknown(walk, var, ins, name) for var in body.invars]
        known = jaxpr is body  # an open jaxpr: its constants are inputs, too
        consts = [_unknown(walk, v, ins, name) for v in body.constvars if known]
        run_at(here, walk, jaxpr, given, consts)
    return walk.lose(eqn, ins, f"passed through {name}")


def _unknown(walk: Walker, var: Any, ins: list[Value], name: str) -> Value:
    if is_key(var):
        return walk.mix(var, ins, f"passed through {name}")
    return walk.taint(ins, name)


# Branches -------------------------------------------------------------------------


def _cond(walk: Walker, eqn: Any, ins: list[Value]) -> list[Value]:
    walk.conds += 1
    here, cond, branches = walk.here.at(eqn), walk.conds, eqn.params["branches"]
    known = _known_branches(ins[0], len(branches), here, walk.space)
    taken = known or [(number, ()) for number in range(len(branches))]
    runs = []
    for number, box in taken:
        both = intersect(here.box, box, walk.space) or here.box
        tags = ((cond, number),) if known is None else ()
        inner = replace(here, branches=(*here.branches, *tags), box=both)
        runs.append(run_at(inner, walk, branches[number], ins[1:]))
    outs = []
    for i, var in enumerate(eqn.outvars):
        values = [run[i] for run in runs]
        if known is None:
            outs.append(_choose(walk, var, values, cond))
        else:
            outs.append(_piece(walk, var, values, [box for _, box in known]))
    return outs


def _known_branches(
    index: Value, count: int, here: Here, space: Space
) -> list[tuple[int, Box]] | None:
    """(branch, where it is taken); None when the program decides as it runs."""
    if isinstance(index, Taint):
        return None
    if any(rule.branches for rule in index.rules):
        return None
    try:
        found = [
            case for r in index.rules for case in find_cases(r, np.int32, count, space)
        ]
    except LostError:
        return None
    inside = [case for case in found if intersect(here.box, case[1], space) is not None]
    return inside or None


def _choose(walk: Walker, var: Any, values: list[Value], cond: int) -> Value:
    """What comes out of one of several branches."""
    if all(value == values[0] for value in values):
        return values[0]
    refs = [v for v in values if isinstance(v, Refs) and not v.is_number]
    if len(refs) < len(values):
        return walk.taint(values)
    try:
        return walk.choose(refs, cond=cond)
    except LostError as lost:
        return walk.mix(var, values, f"comes out of branches that differ: {lost}")


def _piece(walk: Walker, var: Any, values: list[Value], boxes: Sequence[Box]) -> Value:
    """What comes out of branches of which each is taken in a box of its own."""
    refs = [value for value in values if isinstance(value, Refs)]
    numbers = sum(value.is_number for value in refs)
    if len(refs) < len(values) or 0 < numbers < len(refs):
        return walk.taint(values)
    try:
        dims, arrays = align(refs, walk.space)
    except LostError as lost:
        return walk.mix(var, values, f"comes out of branches that differ: {lost}")
    rules = [
        replace(rule, box=both)
        for array, box in zip(arrays, boxes, strict=True)
        for rule in array.rules
        if (both := intersect(rule.box, box, walk.space)) is not None
    ]
    return Refs(dims, tuple(rules))


# Loops ----------------------------------------------------------------------------


def _scan(walk: Walker, eqn: Any, ins: list[Value]) -> list[Value]:
    params, here = eqn.params, walk.here.at(eqn)
    first, last = params["num_consts"], params["num_consts"] + params["num_carry"]
    axis = walk.log.new_axis("scan", here.path, params["length"])
    rows = [_row(value, axis, walk.space) for value in ins[last:]]
    loop = Loop(
        params["jaxpr"],
        ins[:first],
        ins[first:last],
        rows,
        axis,
        size=params["length"],
        is_reversed=params["reverse"],
    )
    return _loop(walk, eqn, loop, here)


def _row(value: Value, axis: str, space: Space) -> Value:
    if isinstance(value, Taint):
        return value
    row = put_value(value, value.dims[0], at(axis, space), space)
    return replace(row, dims=value.dims[1:]) if isinstance(row, Refs) else row


def _loop(walk: Walker, eqn: Any, loop: Loop, here: Here) -> list[Value]:
    space, count = walk.space, len(loop.init)
    inner = replace(here, within=(*here.within, loop.axis))
    if loop.size == 0:
        rest = walk.lose(eqn, loop.rows, "comes out of an empty loop")
        return [*loop.init, *rest[count:]]
    taint = Taint(is_drawn=_draws(loop.body))
    carried = follow_carries(loop, _quiet_run(walk, inner), space, taint)
    values = [one.value for one in carried]
    outs = run_at(inner, walk, loop.body, [*loop.constants, *values, *loop.rows])
    ends = [
        _final(loop, one, out, space)
        for one, out in zip(carried, outs[:count], strict=True)
    ]
    return [*ends, *(_column(out, loop.axis, space) for out in outs[count:])]


def _quiet_run(walk: Walker, here: Here) -> Callable[[Any, list[Value]], list[Value]]:
    def run(jaxpr: Any, ins: list[Value]) -> list[Value]:
        with walk.log.quietly():
            return run_at(here, walk, jaxpr, ins)

    return run


def _final(loop: Loop, one: Carried, out: Value, space: Space) -> Value:
    if one.final is not None:
        return one.final
    if isinstance(out, Taint):
        return out
    if loop.size is None:
        if out.is_number:
            return Taint()
        return out.lost("comes out of a while loop of unknown length")
    return put_value(out, loop.axis, loop.flip(Affine(loop.size - 1)), space)


def _column(value: Value, axis: str, space: Space) -> Value:
    """What a scan gives at each place, as one array."""
    if isinstance(value, Taint):
        return value
    dim = space.new(space.sizes[axis], space.origins.get(axis, ()))
    column = put_value(value, axis, at(dim, space), space)
    return (
        replace(column, dims=(dim, *value.dims)) if isinstance(column, Refs) else column
    )


def _while(walk: Walker, eqn: Any, ins: list[Value]) -> list[Value]:
    params, here, space = eqn.params, walk.here.at(eqn), walk.space
    first, last = (
        params["cond_nconsts"],
        params["cond_nconsts"] + params["body_nconsts"],
    )
    axis = walk.log.new_axis("while", here.path, None)
    body, asked = params["body_jaxpr"], params["cond_jaxpr"]
    loop = Loop(
        body, ins[first:last], ins[last:], (), axis, size=None, kind="a while loop"
    )
    quiet = _quiet_run(walk, replace(here, within=(*here.within, axis)))
    taint = Taint(is_drawn=_draws(body) or _draws(asked))

    def ask(size: int | None) -> Value:
        before, space.is_asking = space.is_asking, space.is_asking or size is None
        space.sizes[axis] = size
        carried = follow_carries(loop, quiet, space, taint)
        (goes_on,) = quiet(asked, [*ins[:first], *(one.value for one in carried)])
        space.is_asking = before
        return goes_on

    size = _turns(ask(None), axis)
    # Known modulo 2^32 so far: a counter must also be seen to get there.
    if size is not None and _turns(ask(size + 1), axis) != size:
        size = None
    space.sizes[axis] = size
    if _draws(asked):
        more = None if size is None else size + 1  # it is asked once more at the end
        name = axis if more is None else walk.log.new_axis("condition", here.path, more)
        turns = replace(loop, axis=name, size=more)
        carried = follow_carries(turns, quiet, space, taint)
        inner = replace(here, within=(*here.within, name))
        run_at(inner, walk, asked, [*ins[:first], *(one.value for one in carried)])
    return _loop(walk, eqn, replace(loop, size=size), here)


def _turns(goes_on: Value, axis: str) -> int | None:
    """For how many turns, from the first on, a condition holds; None: not known."""
    if isinstance(goes_on, Taint):
        return None
    spans: list[tuple[int, int | None]] = []
    for rule in goes_on.rules:
        others = [bound for bound in rule.box if bound[0] != axis]
        if rule.number is None or rule.number.terms or rule.branches or others:
            return None
        if rule.number.offset:
            spans += [bound[1:] for bound in rule.box] or [(0, None)]
    turns = 0
    for start, stop in sorted(spans):
        if stop is None:
            return None
        turns = max(turns, stop) if start <= turns else turns
    return turns


CONTROL: dict[str, Callable[[Any, Any, list[Value]], list[Value]]] = {
    "call": _call,
    "cond": _cond,
    "scan": _scan,
    "shard_map": shard_map,
    "while": _while,
}
"""By the name of the primitive: (walk, equation, inputs) to what comes out."""
