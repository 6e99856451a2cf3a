# SPDX-License-Identifier: Apache-2.0
"""Brings the keys that a jaxpr draws from out of it, as more outputs.

Each equation that consumes a key gets its key as an output of the program, through
calls, scans, branches and loops. All else stays as it was, equation by equation, so
that no number of the program changes.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import (
    ClosedJaxpr,
    Jaxpr,
    JaxprEqn,
    Literal,
    Var,
    jaxprs_in_params,
    primitives,
)
from jax.sharding import PartitionSpec
from jaxtyping import Array

from runner.audit.walk import Use

__all__ = ["LOOP_AXIS", "Hidden", "Opened", "Place", "open_jaxpr"]

LOOP_AXIS = "while"
_ITERATIONS = 64  # of a `while` loop, whose length nobody knows
_CONSUMERS = ("random_bits", "random_gamma")
_BELOW = ("rng_bit_generator", "rng_uniform", "threefry2x32")
# Name of the inner jaxpr of what is no loop and no branch.
_CALLS = {
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "jit": "jaxpr",
    "remat2": "jaxpr",
    "shard_map": "jaxpr",
}


@dataclass(frozen=True)
class Place:
    """An equation that draws.

    Args:
        path: Flax module path, from the names in the program; for messages.
        use: What the key is consumed by.
        axes: Name and size of each axis that it is repeated over, outermost first.
        words: 32-bit words of a key.
    """

    path: tuple[str, ...]
    use: Use
    axes: tuple[tuple[str, int], ...]
    words: int

    @property
    def keys(self) -> int:
        """Number of keys that it may draw from in one call."""
        return int(np.prod([size for _, size in self.axes], dtype=int))


@dataclass(frozen=True)
class Hidden:
    """An equation that draws from a key which can't be brought out, and why."""

    path: tuple[str, ...]
    primitive: str
    why: str


@dataclass(frozen=True)
class Opened:
    """A jaxpr whose last outputs are the keys of `places`.

    An output is of shape [axes, words + 1]: the words of a key and a 1; all are zeros
    where the branch was not taken, or the loop had ended.
    """

    jaxpr: Any
    places: tuple[Place, ...]
    hidden: tuple[Hidden, ...]


@dataclass(frozen=True)
class _Replaced:
    """What stands in an equation's stead, and the variables that hold its keys."""

    eqns: Sequence[JaxprEqn]
    keys: Sequence[Any] = ()
    places: tuple[Place, ...] = ()
    hidden: tuple[Hidden, ...] = ()


def open_jaxpr(jaxpr: Any, outside: tuple[str, ...] = ()) -> Opened:
    """A jaxpr, closed or not, with the key of each draw in it as an output.

    Args:
        jaxpr: Of a program that nothing differentiates any more.
        outside: Names of the modules that it is in.
    """
    if isinstance(jaxpr, ClosedJaxpr):
        opened = open_jaxpr(jaxpr.jaxpr, outside)
        return replace(opened, jaxpr=ClosedJaxpr(opened.jaxpr, jaxpr.consts))
    done = [_replace(eqn, (*outside, *_names(eqn))) for eqn in jaxpr.eqns]
    inner = jaxpr.replace(
        eqns=[eqn for each in done for eqn in each.eqns],
        outvars=[*jaxpr.outvars, *(key for each in done for key in each.keys)],
    )
    places = tuple(place for each in done for place in each.places)
    return Opened(inner, places, tuple(h for each in done for h in each.hidden))


def _replace(eqn: JaxprEqn, path: tuple[str, ...]) -> _Replaced:
    name = eqn.primitive.name
    if name in _CONSUMERS:
        return _show_key(eqn, path)
    if name in _BELOW:
        hidden = Hidden(path[1:], name, f"drawn by {name} itself")
        return _Replaced([eqn], hidden=(hidden,))
    if not any(map(_draws, jaxprs_in_params(eqn.params))):
        return _Replaced([eqn])
    if name in _CALLS:
        return _open_call(eqn, path)
    if name in _OPENERS:
        return _OPENERS[name](eqn, path)
    inner = jaxprs_in_params(eqn.params)
    return _Replaced([eqn], hidden=_hide(inner, path, f"inside {name}"))


def _show_key(eqn: JaxprEqn, path: tuple[str, ...]) -> _Replaced:
    key, out = eqn.invars[0], eqn.outvars[-1]

    def words(key: Any) -> Array:
        data = jax.random.key_data(key)
        return jnp.concatenate([data, jnp.ones_like(data[..., :1])], axis=-1)

    eqns, (shown,) = _graft(words, key)
    *batch, size = shown.aval.shape
    drawn: Any = out.aval
    shape = tuple(eqn.params.get("shape", ())) or drawn.shape[len(batch) :]
    bits = eqn.params.get("bit_width") or drawn.dtype.itemsize * 8
    use = Use(eqn.primitive.name, shape, bits)
    axes = tuple(("vmap", int(n)) for n in batch)
    place = Place(path[1:], use, axes, words=size - 1)
    return _Replaced([*eqns, eqn], [shown], (place,))


def _open_call(eqn: JaxprEqn, path: tuple[str, ...]) -> _Replaced:
    name = eqn.primitive.name
    opened = open_jaxpr(eqn.params[_CALLS[name]], path)
    if name == "shard_map":
        return _open_shards(eqn, opened)
    params = {**eqn.params, _CALLS[name]: opened.jaxpr}
    if name == "jit":
        for field, value in _unspecified().items():
            params[field] = eqn.params[field] + value * len(opened.places)
    if name.startswith("custom_"):  # nothing is left to differentiate
        params = {"call_jaxpr": opened.jaxpr}
        eqn = eqn.replace(primitive=primitives.closed_call_p)
    return _rebuild(eqn, params, opened)


def _unspecified() -> dict[str, tuple[Any, ...]]:
    """What `jit` says of one output that nobody said anything of."""
    (eqn,) = jax.make_jaxpr(jax.jit(lambda: jnp.uint32(0)))().eqns
    return {name: eqn.params[name] for name in ("out_shardings", "out_layouts")}


def _open_shards(eqn: JaxprEqn, opened: Opened) -> _Replaced:
    """Keys of all shards: each has its own, along a new first axis."""
    manual, mesh = eqn.params["newly_manual_axes"], eqn.params["mesh"]
    names = tuple(name for name in mesh.axis_names if name in manual)
    shards = int(np.prod([mesh.shape[name] for name in names], dtype=int))
    inner, n = opened.jaxpr, len(opened.places)
    keys = inner.outvars[len(inner.outvars) - n :]
    eqns, stacked = _graft(lambda *keys: [key[None] for key in keys], *keys)
    outvars = [*inner.outvars[: len(inner.outvars) - n], *stacked]
    inner = inner.replace(eqns=[*inner.eqns, *eqns], outvars=outvars)
    specs = (*eqn.params["out_specs"], *[PartitionSpec(names)] * n)
    params = {**eqn.params, "jaxpr": inner, "out_specs": specs}
    return _rebuild(eqn, params, _along(replace(opened, jaxpr=inner), "mesh", shards))


def _open_scan(eqn: JaxprEqn, path: tuple[str, ...]) -> _Replaced:
    opened = open_jaxpr(eqn.params["jaxpr"], path)
    params = {**eqn.params, "jaxpr": opened.jaxpr}
    return _rebuild(eqn, params, _along(opened, "scan", eqn.params["length"]))


def _open_cond(eqn: JaxprEqn, path: tuple[str, ...]) -> _Replaced:
    """The keys of every branch; zeros for those that were not taken."""
    opened = [open_jaxpr(branch, path) for branch in eqn.params["branches"]]
    places = tuple(place for each in opened for place in each.places)
    hidden = tuple(h for each in opened for h in each.hidden)
    branches, before = [], 0
    for each in opened:
        jaxpr, n = each.jaxpr.jaxpr, len(each.places)
        outvars, own = _cut(jaxpr.outvars, -n)
        eqns, zeros = _zeros(places)
        outvars += [*zeros[:before], *own, *zeros[before + n :]]
        jaxpr = jaxpr.replace(eqns=[*jaxpr.eqns, *eqns], outvars=outvars)
        branches.append(ClosedJaxpr(jaxpr, each.jaxpr.consts))
        before += n
    params = {**eqn.params, "branches": tuple(branches)}
    return _rebuild(eqn, params, Opened(branches[0], places, hidden))


def _open_while(eqn: JaxprEqn, path: tuple[str, ...]) -> _Replaced:
    """The loop carries a count and, for each place, room for the keys it draws."""
    asked = eqn.params["cond_jaxpr"]
    lost = _hide([asked.jaxpr], path, "in the condition of a while loop")
    opened = open_jaxpr(eqn.params["body_jaxpr"], path)
    n, wide = len(opened.places), _along(opened, LOOP_AXIS, _ITERATIONS)

    def first() -> list[Array]:
        return [jnp.int32(0), *_make_zeros(wide.places)]

    def add(count: Array, *arrays: Array) -> list[Array]:
        room, keys = arrays[:n], arrays[n:]
        at = jnp.minimum(count, jnp.int32(_ITERATIONS - 1))
        put = jax.lax.dynamic_update_index_in_dim
        pairs = zip(room, keys, strict=True)
        return [count + jnp.int32(1), *(put(all_, key, at, 0) for all_, key in pairs)]

    before, init = _graft(first)
    more = [Var(var.aval) for var in init]
    outvars, keys = _cut(opened.jaxpr.jaxpr.outvars, -n)
    after, carried = _graft(add, *more, *keys)
    body = opened.jaxpr.jaxpr
    body = body.replace(
        invars=[*body.invars, *more],
        eqns=[*body.eqns, *after],
        outvars=[*outvars, *carried],
    )
    given = [Var(var.aval) for var in init]
    cond = asked.jaxpr.replace(invars=[*asked.jaxpr.invars, *given])
    params = {
        **eqn.params,
        "cond_jaxpr": ClosedJaxpr(cond, asked.consts),
        "body_jaxpr": ClosedJaxpr(body, opened.jaxpr.consts),
    }
    outs = [Var(var.aval) for var in init]
    new = eqn.replace(
        invars=[*eqn.invars, *init], outvars=[*eqn.outvars, *outs], params=params
    )
    hidden = (*opened.hidden, *lost)
    return _Replaced([*before, new], outs[1:], wide.places, hidden)


_OPENERS = {"scan": _open_scan, "cond": _open_cond, "while": _open_while}


def _rebuild(eqn: JaxprEqn, params: dict[str, Any], opened: Opened) -> _Replaced:
    """The equation with other `params` and the keys of `opened` as more outputs."""
    like = _graft(partial(_make_zeros, opened.places))[1]
    keys = [Var(var.aval) for var in like]
    new = eqn.replace(outvars=[*eqn.outvars, *keys], params=params)
    return _Replaced([new], keys, opened.places, opened.hidden)


def _along(opened: Opened, axis: str, size: int) -> Opened:
    """The places of a jaxpr that is run `size` times."""
    places = [replace(p, axes=((axis, size), *p.axes)) for p in opened.places]
    return replace(opened, places=tuple(places))


def _graft(function: Callable[..., Any], *given: Any) -> tuple[list[JaxprEqn], Any]:
    """The equations of `function` on variables of another jaxpr, and its outputs."""
    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in given]
    closed = jax.make_jaxpr(function)(*shapes)
    known = dict(zip(closed.jaxpr.invars, given, strict=True))

    def rename(atoms: Iterable[Any]) -> list[Any]:
        return [a if isinstance(a, Literal) else known.get(a, a) for a in atoms]

    eqns = [eqn.replace(invars=rename(eqn.invars)) for eqn in closed.jaxpr.eqns]
    return eqns, rename(closed.jaxpr.outvars)


def _make_zeros(places: Iterable[Place]) -> list[Array]:
    shapes = [(*(size for _, size in p.axes), p.words + 1) for p in places]
    return [jnp.zeros(shape, jnp.uint32) for shape in shapes]


def _zeros(places: Iterable[Place]) -> tuple[list[JaxprEqn], Any]:
    return _graft(partial(_make_zeros, places))


def _cut(atoms: Sequence[Any], at: int) -> tuple[list[Any], list[Any]]:
    """A list up to an index from its end, and the rest; 0 is the very end."""
    end = len(atoms) + at
    return list(atoms[:end]), list(atoms[end:])


def _draws(jaxpr: Any) -> bool:
    inner = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    return any(
        eqn.primitive.name in (*_CONSUMERS, *_BELOW)
        or any(map(_draws, jaxprs_in_params(eqn.params)))
        for eqn in inner.eqns
    )


def _hide(
    jaxprs: Iterable[Jaxpr], path: tuple[str, ...], why: str
) -> tuple[Hidden, ...]:
    """Every draw of these jaxprs, as one whose key stays inside."""
    opened = [open_jaxpr(jaxpr, path) for jaxpr in jaxprs]
    shown = (Hidden(p.path, p.use.primitive, why) for o in opened for p in o.places)
    return (*shown, *(hidden for each in opened for hidden in each.hidden))


def _names(eqn: JaxprEqn) -> tuple[str, ...]:
    """Names of modules on a name stack; `jvp(x)` is x, `Coder.encode` is Coder."""
    parts = str(eqn.source_info.name_stack).split("/")
    names = [part.rpartition("(")[2].rstrip(")").partition(".")[0] for part in parts]
    return tuple(name for name in names if name and name != "rematted_computation")
