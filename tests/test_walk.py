# SPDX-License-Identifier: Apache-2.0
"""Every key of a program, whatever is done to key arrays, in loops and on meshes.

The truth is the interpreter of `test_audit`, which runs a traced program for real and
writes down each key that is consumed, and how often.
"""

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from jax import lax
from jax.extend.core import ClosedJaxpr
from jax.interpreters.partial_eval import dce_jaxpr
from test_audit import (
    Block,
    Interpreter,
    Later,
    Words,
    apply_of,
    drop,
    init_of,
    make_rngs,
    model,
    now,
    replayed,
    scanned,
    untraced,
    zeros_of,
)

from runner.audit.trace import Trace, _mark_modules, trace_draws
from runner.audit.walk import walk_jaxpr
from runner.keys import derive_key, key_words
from runner.ops import Affine, Op, bind_ops

P = jax.sharding.PartitionSpec
X = jnp.linspace(-1.0, 1.0, 12).reshape(3, 4)


# The truth ------------------------------------------------------------------------


class MeshInterpreter(Interpreter):
    """Runs the body of a `shard_map` once for each shard, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.place: dict[str, int] = {}

    def step(self, eqn: Any, args: list[Later]) -> list[Later]:
        name, params = eqn.primitive.name, eqn.params
        if name == "axis_index":
            return [now(jnp.int32(self.place[params["axis_name"]]))]
        if name in ("pvary", "pcast", "psum", "psum_invariant"):
            return args[: len(eqn.outvars)]
        if name == "rng_bit_generator":
            self.keys.append(tuple(np.asarray(args[0].value).tolist()))
        if name == "shard_map":
            return self.shards(eqn, args)
        return super().step(eqn, args)

    def shards(self, eqn: Any, args: list[Later]) -> list[Later]:
        params, outs = eqn.params, []
        sizes = dict(params["mesh"].shape)
        outer = self.place
        for place in itertools.product(*(range(n) for n in sizes.values())):
            self.place = {**outer, **dict(zip(sizes, place, strict=True))}
            cut = functools.partial(self.cut, sizes=sizes)
            given = map(cut, args, params["in_specs"])
            outs.append((self.place, self.run(params["jaxpr"], list(given))))
        self.place = outer
        gathered = []
        for i, (var, spec) in enumerate(
            zip(eqn.outvars, params["out_specs"], strict=True)
        ):
            parts = [(place, values[i].value) for place, values in outs]
            gathered.append(now(join_parts(var.aval.shape, parts, spec, sizes)))
        return gathered

    def cut(self, arg: Later, spec: Any, sizes: dict[str, int]) -> Later:
        return now(arg.value[where(arg.value.shape, spec, self.place, sizes)])


def where(
    shape: tuple[int, ...], spec: Any, place: dict[str, int], sizes: dict[str, int]
) -> tuple[slice, ...]:
    """The part of an array that lies on one shard."""
    found = [slice(None)] * len(shape)
    for i, entry in enumerate(spec):
        names = entry if isinstance(entry, tuple) else (entry,)
        names = tuple(name for name in names if name is not None)
        number, count = 0, 1
        for name in names:
            number, count = number * sizes[name] + place[name], count * sizes[name]
        part = shape[i] // count
        found[i] = slice(number * part, (number + 1) * part)
    return tuple(found)


def join_parts(shape: Any, parts: Any, spec: Any, sizes: dict[str, int]) -> Any:
    is_key = jnp.issubdtype(parts[0][1].dtype, jax.dtypes.prng_key)
    rows = [(at, jax.random.key_data(v) if is_key else v) for at, v in parts]
    extra = rows[0][1].shape[len(shape) :]
    whole = np.zeros((*shape, *extra), rows[0][1].dtype)
    for at, value in rows:
        whole[where(shape, spec, at, sizes)] = np.asarray(value)
    return (
        jax.random.wrap_key_data(jnp.asarray(whole)) if is_key else jnp.asarray(whole)
    )


def consumed(function: Any, *args: Any) -> Counter[Words]:
    """How often the running program consumes each key."""
    closed = jax.make_jaxpr(function)(*args)
    outs = [True] * len(closed.jaxpr.outvars)
    live, _ = dce_jaxpr(closed.jaxpr, outs, instantiate=True)
    env = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    interpreter = MeshInterpreter()
    given = list(map(now, jax.tree.leaves(args)))
    consts = [env[v] for v in live.constvars]
    interpreter.run(ClosedJaxpr(live, consts), given)
    return Counter(interpreter.keys)


def planned(trace: Trace, rngs: Any) -> Counter[Words]:
    """How often each key is consumed, by the draws and the axes around them."""
    total: Counter[Words] = Counter()
    for draw in trace.draws:
        if draw.untraced:
            continue
        times = math.prod(size or 0 for _, size in draw.within)
        each = times // math.prod(size for _, size in draw.axes)
        for key in replayed(draw, rngs):
            total[key] += each
    return total


def check(function: Any, *args: Any, also: tuple[Any, ...] = (), **rngs: Any) -> Trace:
    """Every key is traced, and as often as it is consumed."""
    streams = rngs.pop("rngs", None) or make_rngs("noise", "dropout")
    trace = trace_draws(function, streams, *args)
    assert untraced(trace) == set()
    real = [consumed(function, streams, *given) for given in (args, *also)]
    found = planned(trace, streams)
    assert set(found) == set().union(*real)
    if not any(draw.branches for draw in trace.draws):
        assert found == real[0]
    for draw in trace.draws:
        assert set(draw.axes) <= set(draw.within)
        assert len(dict(draw.within)) == len(draw.within)
    return trace


def bits(key: Any) -> Any:
    return jax.random.bits(key)


def all_bits(keys: Any) -> Any:
    """Bits of each key of an array."""
    function = bits
    for _ in range(keys.ndim):
        function = jax.vmap(function)
    return function(keys)


def noise(function: Callable[[Any], Any]) -> Callable[..., Any]:
    """A program of one key and what it draws from keys that are made of it."""
    return lambda rngs, *args: function(rngs["noise"], *args)


# Moving keys about ----------------------------------------------------------------

split, fold_in = jax.random.split, jax.random.fold_in

MOVES: dict[str, Callable[[Any], Any]] = {
    "an index": lambda k: bits(split(k, 4)[2]),
    "an index from the end": lambda k: bits(split(k, 4)[-1]),
    "an index that is an array": lambda k: bits(split(k, 4)[jnp.int32(2)]),
    "several indices": lambda k: all_bits(split(k, 5)[jnp.array([3, 1])]),
    "an index that comes twice": lambda k: all_bits(split(k, 5)[jnp.array([3, 3])]),
    "two indices at once": lambda k: all_bits(
        split(k, (2, 3))[jnp.array([0, 1]), jnp.array([2, 0])]
    ),
    "a grid of indices": lambda k: all_bits(
        split(k, (3, 4))[jnp.array([[0], [2]]), jnp.array([3, 1])]
    ),
    "take": lambda k: all_bits(jnp.take(split(k, 4), jnp.array([2, 0]))),
    "take_along_axis": lambda k: all_bits(
        jnp.take(split(k, (2, 3)), jnp.array([2, 0]), axis=1)
    ),
    "a gather under vmap": lambda k: jax.vmap(lambda i: bits(split(k, 4)[i + 1]))(
        jnp.arange(3)
    ),
    "two vmaps": lambda k: jax.vmap(
        lambda i: jax.vmap(lambda j: bits(fold_in(split(k, 3)[i], j)))(jnp.arange(2))
    )(jnp.arange(3)),
    "one counter for two vmaps": lambda k: outer_fold(split(k, 3), jnp.arange(3)),
    "dynamic_index_in_dim": lambda k: bits(
        lax.dynamic_index_in_dim(split(k, 4), 1, keepdims=False)
    ),
    "dynamic_slice": lambda k: all_bits(lax.dynamic_slice(split(k, 5), (3,), (2,))),
    "a clamped dynamic_slice": lambda k: all_bits(
        lax.dynamic_slice(split(k, 5), (4,), (2,))
    ),
    "a slice with a stride": lambda k: all_bits(split(k, 7)[1:6:2]),
    "from the end": lambda k: all_bits(split(k, 5)[::-1]),
    "every other from the end": lambda k: all_bits(split(k, 6)[::-2]),
    "flip, then one": lambda k: bits(jnp.flip(split(k, 5))[1]),
    "reshape": lambda k: all_bits(split(k, 6).reshape(2, 3)),
    "reshape, then one": lambda k: bits(split(k, 6).reshape(2, 3)[1, 0]),
    "reshape, then a row": lambda k: all_bits(split(k, 12).reshape(2, 3, 2)[1]),
    "flat": lambda k: all_bits(split(k, (2, 3)).reshape(-1)),
    "flat of two splits": lambda k: all_bits(both_split(k).reshape(-1)),
    "one of flat": lambda k: bits(both_split(k).reshape(-1)[4]),
    "other dimensions": lambda k: all_bits(both_split(k).reshape(2, 3)),
    "part of flat": lambda k: all_bits(split(k, (4, 3)).reshape(-1)[3:9].reshape(3, 2)),
    "transpose": lambda k: all_bits(both_split(k).T[1]),
    "swapaxes": lambda k: all_bits(jnp.swapaxes(split(k, (2, 3, 2)), 0, 2)[0]),
    "split of a shape": lambda k: bits(split(k, (2, 3))[1, 2]),
    "split of one": lambda k: all_bits(split(k, 1)),
    "split of no dimension": lambda k: bits(split(k, ())),
    "split of a split": lambda k: all_bits(jax.vmap(lambda s: split(s, 3))(split(k))),
    "a new dimension": lambda k: all_bits(split(k, 3)[:, None][2]),
    "broadcast": lambda k: all_bits(jnp.broadcast_to(fold_in(k, 1), (3,))),
    "broadcast rows": lambda k: all_bits(
        jnp.broadcast_to(split(k, 2)[:, None], (2, 3))
    ),
    "stack": lambda k: all_bits(jnp.stack([fold_in(k, 7), k, split(k)[1]])),
    "stack, then one": lambda k: bits(jnp.stack([fold_in(k, 7), k])[1]),
    "stack of rows": lambda k: all_bits(jnp.stack([split(k, 2), split(k, 3)[1:]], 1)),
    "concatenate": lambda k: all_bits(jnp.concatenate([split(k, 2), split(k, 3)])),
    "part of concatenate": lambda k: all_bits(
        jnp.concatenate([split(k, 2), split(k, 3)])[1:4]
    ),
    "swapped concatenate": lambda k: all_bits(
        jnp.concatenate([split(k, (2, 2)), split(k, (2, 2)).T])
    ),
    "a square and its transpose": lambda k: square_twice(split(k, (2, 2))),
    "one counter, twice": lambda k: square_of_folds(k, jnp.arange(3)),
    "columns by the counter of the rows": lambda k: columns(k, jnp.arange(2)),
    "reshaped concatenate": lambda k: all_bits(
        jnp.concatenate([split(k, 2), split(k, 4)]).reshape(3, 2)[1:]
    ),
    "roll": lambda k: all_bits(jnp.roll(split(k, 5), 2)),
    "tile": lambda k: all_bits(jnp.tile(split(k, 2), 3)),
    "repeat": lambda k: all_bits(jnp.repeat(split(k, 2), 3)),
    "jnp.split": lambda k: all_bits(jnp.split(split(k, 6), 3)[1]),
    "unpacked": lambda k: [bits(one) for one in split(k, 3)],
    "where of counters": lambda k: all_bits(
        jnp.where(jnp.arange(4) > 1, split(k, 4), fold_in(k, 9))
    ),
    "where of an equal counter": lambda k: all_bits(
        jnp.where(jnp.arange(4) == 2, split(k, 4), fold_in(k, 9))
    ),
    "words": lambda k: bits(
        jax.random.wrap_key_data(jax.random.key_data(k).reshape(1, 2)[0])
    ),
    "words of many": lambda k: all_bits(
        jax.random.wrap_key_data(jax.random.key_data(split(k, 4))[1:3])
    ),
    "words turned twice": lambda k: bits(
        jax.random.wrap_key_data(jax.random.key_data(k)[::-1][::-1])
    ),
    "an optimization barrier": lambda k: all_bits(
        lax.optimization_barrier(split(k, 2))
    ),
}


def outer_fold(keys: Any, counter: Any) -> Any:
    """Element [i, j]: keys[i] with j."""
    row = jax.vmap(lambda k, j: bits(fold_in(k, j)), in_axes=(None, 0))
    return jax.vmap(row, in_axes=(0, None))(jax.vmap(fold_in)(keys, counter), counter)


def square_twice(keys: Any) -> Any:
    both = jnp.concatenate([keys, keys.T])
    return all_bits(both), all_bits(
        jnp.where(jnp.arange(4).reshape(2, 2) > 1, keys, keys.T)
    )


def square_of_folds(key: Any, counter: Any) -> Any:
    """Element [i, j]: i, then j folded in."""
    row = jax.vmap(lambda k, j: bits(fold_in(k, j)), in_axes=(None, 0))
    keys = jax.vmap(lambda i: fold_in(key, i))(counter)
    return jax.vmap(row, in_axes=(0, None))(keys, counter)


def columns(key: Any, counter: Any) -> Any:
    """Element [i, j]: column j of keys whose rows have the same counter."""
    row = jax.vmap(lambda j, k: fold_in(k, j), in_axes=(0, None))
    keys = jax.vmap(lambda i: row(jnp.arange(3), fold_in(key, i)))(counter)
    return all_bits(keys[:, counter + 1])


def both_split(key: Any) -> Any:
    """Element [i, j]: split(split(key, 3)[i], 2)[j]."""
    return jax.vmap(lambda k: jax.random.split(k, 2))(jax.random.split(key, 3))


@pytest.mark.parametrize("name", MOVES)
def test_moves(name: str) -> None:
    check(noise(MOVES[name]))


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("partitionable", [True, False])
def test_split_of_a_shape_is_a_split(impl: str, partitionable: bool) -> None:
    """split(key, (l, m))[i, j] is split(key, l * m)[m * i + j], for each generator."""
    with jax.threefry_partitionable(partitionable):
        jax.clear_caches()
        rngs = make_rngs("noise", impl=impl)
        trace = check(noise(lambda k: all_bits(split(k, (2, 3)))), rngs=rngs)
    jax.clear_caches()
    (op,) = trace.draws[0].ops
    assert op.of == 6
    assert sorted(by for _, by in op.index.terms) == [1, 3]  # type: ignore[union-attr]


def test_unsafe_rbg_under_vmap_is_said() -> None:
    """It splits a batch of keys otherwise than one by one."""
    rngs = make_rngs("noise", impl="unsafe_rbg")
    check(noise(lambda k: bits(split(split(k)[1])[0])), rngs=rngs)
    why = "under vmap, which makes other keys of unsafe_rbg"
    both = {
        "split": both_split,
        "folded": lambda k: jax.vmap(fold_in)(split(k), jnp.arange(2)),
    }
    for verb, function in both.items():
        trace = trace_draws(noise(lambda k, f=function: all_bits(f(k))), rngs)
        assert untraced(trace) == {f"{verb} {why}"}
        assert [draw.stream for draw in trace.draws] == ["noise"]


# Numbers --------------------------------------------------------------------------

TABLE = np.array([3, 1, 4, 1, 5], np.int32)
COUNTER = np.arange(4, dtype=np.int32)

NUMBERS: dict[str, Callable[[Any], Any]] = {
    "vmap": fold_in,
    "affine": lambda k, i: fold_in(k, 3 * i + 7),
    "downwards": lambda k, i: fold_in(k, 5 - i),
    "negative": lambda k, i: fold_in(k, -i),
    "a large factor": lambda k, i: fold_in(
        k, i.astype(jnp.uint32) * jnp.uint32(2654435761)
    ),
    "narrow": lambda k, i: fold_in(k, i.astype(jnp.int8).astype(jnp.int32) + 1),
    "a table": lambda k, i: fold_in(k, jnp.asarray(TABLE)[i]),
    "a constant": lambda k, i: fold_in(fold_in(k, jnp.uint32(5)), i),
    "an index": lambda k, i: split(k, 6)[i + 1],
    "an index from the end": lambda k, i: split(k, 6)[-1 - i],
    "a stride": lambda k, i: split(k, 8)[2 * i],
    "where": lambda k, i: jnp.where(i < 2, k, fold_in(k, i)),
    "two of where": lambda k, i: jnp.where(
        i == 2, fold_in(k, 1), jnp.where(i != 0, fold_in(k, i), split(k)[0])
    ),
    "a cond": lambda k, i: lax.cond(i >= 2, lambda: fold_in(k, i), lambda: split(k)[1]),
    "a switch": lambda k, i: lax.switch(
        i, [lambda: k, lambda: fold_in(k, 9), lambda: split(k, 4)[i]]
    ),
    "a slice": lambda k, i: lax.dynamic_slice(split(k, 6), (i,), (2,))[1],
}
LOOPS: dict[str, Callable[[Any], Any]] = {
    "vmap": lambda f: jax.vmap(f)(jnp.arange(4)),
    "map": lambda f: lax.map(f, jnp.arange(4)),
    "scan": lambda f: lax.scan(lambda c, i: (c, f(i)), 0, jnp.arange(4))[1],
    "scan of a constant": lambda f: lax.scan(lambda c, i: (c, f(i)), 0, COUNTER)[1],
    "scan backwards": lambda f: lax.scan(
        lambda c, i: (c, f(i)), 0, jnp.arange(4), reverse=True
    )[1],
    "a counter": lambda f: lax.scan(lambda i, _: (i + 1, f(i)), 0, length=4)[1],
    "a counter backwards": lambda f: lax.scan(
        lambda i, _: (i - 1, f(i)), 3, length=4, reverse=True
    )[1],
    "fori_loop": lambda f: lax.fori_loop(0, 4, lambda i, t: t + f(i), jnp.uint32(0)),
    "while_loop": lambda f: lax.while_loop(
        lambda c: c[0] < 4, lambda c: (c[0] + 1, c[1] + f(c[0])), (0, jnp.uint32(0))
    ),
    "while_loop downwards": lambda f: lax.while_loop(
        lambda c: c[0] >= 0, lambda c: (c[0] - 1, c[1] + f(c[0])), (3, jnp.uint32(0))
    ),
}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_counters(loop: str, name: str) -> None:
    def function(rngs: Any) -> Any:
        return LOOPS[loop](lambda i: bits(NUMBERS[name](rngs["noise"], i)))

    trace = check(function)
    sizes = [math.prod(size or 0 for _, size in draw.within) for draw in trace.draws]
    assert sum(sizes) == 4 or any(draw.branches for draw in trace.draws)


def test_a_draw_in_a_branch_of_a_counter() -> None:
    """Branches that some turns take are drawn in by those turns."""

    def function(rngs: Any) -> Any:
        def turn(i: Any) -> Any:
            draw = lambda: bits(fold_in(rngs["noise"], i))  # noqa: E731
            return lax.cond(i < 3, draw, lambda: jnp.uint32(0))

        return lax.map(turn, jnp.arange(5))

    (draw,) = check(function).draws
    assert draw.within == (("scan[0:3]", 3),)
    (draw,) = check(
        lambda rngs: lax.map(
            lambda i: lax.cond(
                i != 0, lambda: bits(fold_in(rngs["noise"], i)), lambda: jnp.uint32(0)
            ),
            jnp.arange(3),
        )
    ).draws
    assert draw.ops == (Op("fold_in", Affine(1, (("scan[1:3]", 1),)), why="scan[1:3]"),)


def check_said(function: Any, why: str, *args: Any) -> None:
    """No key is listed that is not drawn from; what is not known is said."""
    rngs = make_rngs("noise", "dropout")
    trace = trace_draws(function, rngs, *args)
    assert set(planned(trace, rngs)) <= set(consumed(function, rngs, *args))
    assert any(why in text for text in untraced(trace)), untraced(trace)


def test_a_counter_below_zero() -> None:
    """While a counter is not known yet, nothing is decided by its value."""

    def function(rngs: Any) -> Any:
        def turn(i: Any, _: Any) -> Any:
            return jnp.where(i < 0, i + 5, i + 1), bits(fold_in(rngs["noise"], i))

        return lax.scan(turn, -3, length=3)

    check_said(function, "folded with a number that the program computes")


def test_an_index_that_goes_round() -> None:
    """0 - 1 of 32 bits without a sign is the last key."""

    def function(rngs: Any) -> Any:
        keys = split(rngs["noise"], 4)
        low = lambda i: bits(lax.dynamic_index_in_dim(keys, i - 1, keepdims=False))  # noqa: E731
        return lax.map(low, jnp.arange(1, dtype=jnp.uint32))

    (draw,) = check(function).draws
    assert draw.ops == (Op("split", index=3, of=4, why="split"),)


def test_indices_that_may_go_round() -> None:
    def function(rngs: Any) -> Any:
        keys = split(rngs["noise"], 4)
        at = lambda i: lax.dynamic_index_in_dim(keys, i - 1, keepdims=False)  # noqa: E731
        return lax.map(lambda i: bits(at(i)), jnp.arange(3, dtype=jnp.uint32))

    check_said(function, "a number that may overflow")


@pytest.mark.parametrize("places", [[1, 5], [5]])
def test_an_index_outside(places: list[int]) -> None:
    """`take` gives no key at all there."""

    def function(key: Any) -> Any:
        return all_bits(jnp.take(split(key, 4), jnp.array(places)))

    check_said(noise(function), "an index that may lie outside")


# Carries --------------------------------------------------------------------------


def turns(step: Callable[[Any, Any], Any], **options: Any) -> Callable[[Any], Any]:
    """A scan that carries a key through `step(key, i)`: (next key, key to draw)."""

    def body(key: Any, i: Any) -> Any:
        key, now_ = step(key, i)
        return key, all_bits(now_)

    def function(key: Any) -> Any:
        last, out = lax.scan(body, key, jnp.arange(3), **options)
        return out, all_bits(last)

    return function


STEPS: dict[str, Callable[[Any, Any], Any]] = {
    "split": lambda k, i: tuple(split(k)),
    "split the other way": lambda k, i: (split(k)[1], split(k)[0]),
    "fold_in": lambda k, i: (fold_in(k, 5), fold_in(k, 6)),
    "fold_in of the counter": lambda k, i: (fold_in(k, 2 * i + 1), split(k)[0]),
    "nothing": lambda k, i: (k, fold_in(k, i)),
    "two ops": lambda k, i: (fold_in(split(k, 3)[2], 9), k),
}
WAYS: dict[str, dict[str, Any]] = {
    "forwards": {},
    "backwards": {"reverse": True},
    "unrolled": {"unroll": 2},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", STEPS)
def test_carried_keys(name: str, way: str) -> None:
    check(noise(turns(STEPS[name], **WAYS[way])))


def test_carried_keys_that_change_places() -> None:
    """Their turn is no chain of ops; it is said, with the stream."""

    def function(key: Any) -> Any:
        def turn(keys: Any, _: Any) -> Any:
            return keys.T, all_bits(keys)

        return lax.scan(turn, split(key, (2, 2)), length=3)[1]

    check_said(noise(function), "carried through a scan")


def test_ops_of_a_carried_key() -> None:
    """The body as often as the index says; in the end, as long as the loop is."""
    inner, last = check(noise(turns(STEPS["split the other way"]))).draws
    on = Op("split", index=1, of=2, why="split")
    repeat = Op("repeat", index="scan", body=(on,), counter="turn", why="scan")
    assert inner.ops == (repeat, Op("split", index=0, of=2, why="split"))
    assert inner.axes == inner.within == (("scan", 3),)
    assert last.ops == (
        Op("repeat", index=3, body=(on,), counter="turn", why="carried on"),
    )
    assert last.axes == last.within == ()


def test_a_carry_backwards_counts_places() -> None:
    """The index of a reversed scan is the place in the arrays, not the turn."""
    (draw, _) = check(noise(turns(STEPS["split"], reverse=True))).draws
    assert draw.ops[0].index == Affine(2, (("scan", -1),))


def test_turns_that_count() -> None:
    (draw, _) = check(noise(turns(STEPS["fold_in of the counter"]))).draws
    (fold,) = draw.ops[0].body
    assert fold.value == Affine(1, (("turn", 2),))
    assert draw.axes == (("scan", 3),)


def test_a_counter_backwards_in_a_carry() -> None:
    """The body of turn t folds the place that turn t is at."""
    (draw, _) = check(noise(turns(STEPS["fold_in of the counter"], reverse=True))).draws
    assert draw.ops[0].body[0].value == Affine(5, (("turn", -2),))


def stacked_ys(key: Any) -> Any:
    """Keys that a scan hands out, one of them carried, one from the rows."""

    def body(carry: Any, row: Any) -> Any:
        return split(carry)[0], (split(carry)[1], fold_in(row, 3))

    last, (ones, others) = lax.scan(body, key, split(fold_in(key, 1), 4))
    return (
        all_bits(ones[::-1]),
        bits(others[2]),
        all_bits(ones.reshape(2, 2)),
        bits(last),
    )


def nested_carries(key: Any) -> Any:
    """A carried key in a loop within a loop, each with its own counter."""

    def outer(k: Any, i: Any) -> Any:
        def inner(c: Any, j: Any) -> Any:
            return fold_in(c, 2 * i + 3 * j), bits(c)

        last, out = lax.scan(inner, k, jnp.arange(3))
        return last, out

    last, out = lax.scan(outer, key, jnp.arange(2))
    return out, bits(last)


def carried_arrays(key: Any) -> Any:
    """An array of keys is carried, each of its own."""

    def body(keys: Any, _: Any) -> Any:
        pairs = jax.vmap(split)(keys)
        return pairs[:, 0], all_bits(pairs[:, 1])

    keys, out = lax.scan(body, split(key, 3), length=2)
    return out, all_bits(keys)


def carried_words(key: Any) -> Any:
    """Keys are carried as their words."""

    def body(words: Any, _: Any) -> Any:
        a, b = split(jax.random.wrap_key_data(words))
        return jax.random.key_data(a), bits(b)

    words, out = lax.scan(body, jax.random.key_data(key), length=3)
    return out, bits(jax.random.wrap_key_data(words))


def carried_beside(key: Any) -> Any:
    """The key of the turn before is carried beside the one that goes on."""

    def body(carry: Any, _: Any) -> Any:
        key, before, oldest = carry
        key, now_ = split(key)
        return (key, now_, before), (bits(before), bits(oldest))

    (_, last, _), out = lax.scan(body, (key, fold_in(key, 1), key), length=4)
    return out, bits(last)


def carried_rows(key: Any, *, reverse: bool = False) -> Any:
    """The row of the turn before is carried."""

    def body(before: Any, row: Any) -> Any:
        return row, bits(before)

    rows = split(key, 4)
    last, out = lax.scan(body, fold_in(key, 1), rows, reverse=reverse)
    return out, bits(last)


def no_turns(key: Any) -> Any:
    last = lax.fori_loop(3, 3, lambda i, k: split(k)[0], key)
    return bits(last)


def one_turn(key: Any) -> Any:
    last, out = lax.scan(
        lambda k, i: (split(k)[0], bits(fold_in(k, i))), key, jnp.arange(1)
    )
    return bits(last), out


def fori_carry(key: Any) -> Any:
    def body(i: Any, carry: Any) -> Any:
        key, total = carry
        return fold_in(key, i), total + bits(split(key)[1])

    key, total = lax.fori_loop(2, 6, body, (key, jnp.uint32(0)))
    return total, bits(key)


def while_carry(key: Any) -> Any:
    def body(carry: Any) -> Any:
        i, key, total = carry
        key, now_ = split(key)
        return i + 2, key, total + bits(now_)

    i, key, total = lax.while_loop(lambda c: c[0] <= 7, body, (0, key, jnp.uint32(0)))
    return total, bits(fold_in(key, i))


def vmapped_carries(key: Any) -> Any:
    """A scan under vmap: one array of keys is carried."""

    def one(k: Any) -> Any:
        return lax.scan(lambda c, _: (split(c)[0], bits(split(c)[1])), k, length=3)[1]

    return jax.vmap(one)(split(key, 2))


def carried_rows_backwards(key: Any) -> Any:
    return carried_rows(key, reverse=True)


def replaced_within(key: Any) -> Any:
    """In a loop within, the key of the loop around replaces the one that is carried."""

    def outer(k: Any, _: Any) -> Any:
        def inner(c: Any, _: Any) -> Any:
            return fold_in(k, 1), bits(c)

        last, out = lax.scan(inner, fold_in(k, 7), length=3)
        return split(last)[0], out

    last, out = lax.scan(outer, key, length=2)
    return out, bits(last)


def two_places(key: Any) -> Any:
    """Two carried keys change places at each turn."""

    def turn(carry: Any, _: Any) -> Any:
        a, b = carry
        return (fold_in(b, 1), a), (bits(a), bits(b))

    (a, b), out = lax.scan(turn, (key, fold_in(key, 9)), length=1)
    return out, bits(a), bits(b)


CARRIES = [
    replaced_within,
    two_places,
    stacked_ys,
    nested_carries,
    carried_arrays,
    carried_words,
    carried_beside,
    carried_rows,
    carried_rows_backwards,
    no_turns,
    one_turn,
    fori_carry,
    while_carry,
    vmapped_carries,
]


@pytest.mark.parametrize("function", CARRIES, ids=lambda f: f.__name__)
def test_carries(function: Any) -> None:
    check(noise(function))


def test_bodies_within_bodies_have_counters_of_their_own() -> None:
    trace = check(noise(nested_carries))
    outer = trace.draws[0].ops[0]
    assert outer.counter == "turn2"
    assert outer.body[0].counter == "turn"
    (fold,) = outer.body[0].body
    assert fold.value == Affine(0, (("turn", 3), ("turn2", 2)))


UNKNOWN_LENGTH = {
    "carried": lambda k, n: lax.while_loop(
        lambda c: c[0] < n,
        lambda c: (c[0] + 1, split(c[1])[0], c[2] + bits(c[1])),
        (0, k, jnp.uint32(0)),
    )[2],
    "a counter": lambda k, n: lax.fori_loop(
        0, n, lambda i, t: t + bits(fold_in(k, i)), jnp.uint32(0)
    ),
}


@pytest.mark.parametrize("name", UNKNOWN_LENGTH)
def test_a_loop_of_unknown_length(name: str) -> None:
    """The stream is known, and so is what the draw is within."""
    rngs = make_rngs("noise")
    (draw,) = trace_draws(noise(UNKNOWN_LENGTH[name]), rngs, 3).draws
    assert "while loop of unknown length" in draw.untraced
    assert (draw.stream, draw.ops, draw.axes) == ("noise", (), ())
    assert draw.within == (("while", None),)


def test_one_key_at_each_turn() -> None:
    """A draw in a loop whose key does not depend on it: the loop stands in `within`."""
    rngs = make_rngs("noise")

    def function(rngs: Any, n: Any) -> Any:
        known = lax.map(lambda _: bits(rngs["noise"]), jnp.arange(3))
        again = lambda i, t: t + bits(fold_in(rngs["noise"], 1))  # noqa: E731
        unknown = lax.fori_loop(0, n, again, jnp.uint32(0))
        return known, unknown, all_bits(jnp.broadcast_to(rngs["noise"], (4,)))

    draws = trace_draws(function, rngs, 3).draws
    assert [draw.within for draw in draws] == [
        (("scan", 3),),
        (("while", None),),
        (("vmap", 4),),
    ]
    assert all(draw.axes == () and not draw.untraced for draw in draws)


@pytest.mark.parametrize("step", [50, 100])
def test_a_counter_that_overflows(step: int) -> None:
    """An int8 goes round before it gets there: the length is not known."""

    def function(rngs: Any) -> Any:
        def body(carry: Any) -> Any:
            i, total = carry
            return i + jnp.int8(step), total + bits(fold_in(rngs["noise"], 1))

        start, most = (jnp.int8(0), jnp.uint32(0)), jnp.int8(120)
        return lax.while_loop(lambda c: c[0] < most, body, start)

    (draw,) = trace_draws(function, make_rngs("noise")).draws
    assert draw.within == (("while", None),)


def test_a_condition_that_draws() -> None:
    """What it draws decides: the length is not known, and both places are listed."""

    def function(rngs: Any) -> Any:
        def unlucky(carry: Any) -> Any:
            return jax.random.uniform(fold_in(rngs["noise"], carry)) > 0.5

        return lax.while_loop(unlucky, lambda i: i + 1, 0)

    (draw,) = trace_draws(function, make_rngs("noise")).draws
    assert draw.untraced == "in a while loop of unknown length"


def test_a_condition_is_asked_once_more() -> None:
    """Whatever it draws, if its answer does not depend on it."""

    def function(rngs: Any) -> Any:
        def goes_on(carry: Any) -> Any:
            i, key = carry
            jax.debug.callback(lambda drawn: None, bits(fold_in(key, i)))
            return i < 3

        def body(carry: Any) -> Any:
            return carry[0] + 1, split(carry[1])[0]

        return bits(lax.while_loop(goes_on, body, (0, rngs["noise"]))[1])

    (asked, _) = check(function).draws
    assert asked.within == (("condition", 4),)


# Branches -------------------------------------------------------------------------


def test_a_key_out_of_a_branch() -> None:
    """Either derivation is listed, with the branch that it comes out of."""

    def function(rngs: Any, x: Any) -> Any:
        key = lax.cond(
            x > 0, lambda k: fold_in(k, 1), lambda k: split(k)[1], rngs["noise"]
        )
        return bits(key), bits(split(key, 3)[2])

    trace = check(function, 1.0, also=((-1.0,),))
    assert len(trace.draws) == 4
    assert {draw.branches for draw in trace.draws} == {((1, 0),), ((1, 1),)}


def test_branches_within_branches() -> None:
    def function(rngs: Any, x: Any) -> Any:
        def inner(k: Any) -> Any:
            folds = [lambda k, n=n: fold_in(k, n) for n in (1, 2)]
            return lax.cond(x[1] > 0, *folds, k)

        key = lax.cond(x[0] > 0, inner, lambda k: k, rngs["noise"])
        return bits(jnp.where(x[2] > 0, key, rngs["dropout"]))

    signs = [jnp.array(s) for s in itertools.product((1.0, -1.0), repeat=3)]
    check(function, signs[0], also=tuple((s,) for s in signs))


def test_where_of_two_keys() -> None:
    def function(rngs: Any, x: Any) -> Any:
        return all_bits(jnp.where(x > 0, split(rngs["noise"], 3), rngs["dropout"]))

    check(function, 1.0, also=((-1.0,),))


def test_a_choice_for_each_element_is_said() -> None:
    def function(rngs: Any, x: Any) -> Any:
        return all_bits(jnp.where(x[0] > 0, split(rngs["noise"], 4), rngs["noise"]))

    (draw,) = trace_draws(function, make_rngs("noise"), X).draws
    assert draw.untraced == "passed through select_n: element by element"
    assert draw.stream == "noise"


# Sources --------------------------------------------------------------------------

KEY, TABLE_OF_WORDS = jax.random.key(6), jnp.array([1, 2], jnp.uint32)

SOURCES: dict[str, Callable[..., Any]] = {
    "a constant in the model: key(7)": lambda k, x: bits(fold_in(jax.random.key(7), 3)),
    "a constant in the model": lambda k, x: bits(
        jax.random.wrap_key_data(TABLE_OF_WORDS)
    ),
    "a key array closed over": lambda k, x: bits(split(KEY)[1]),
    "an argument": lambda k, x: bits(jax.random.wrap_key_data(x)),
    "a seed that the program computes": lambda k, x: bits(jax.random.key(x.sum())),
    "another draw's output": lambda k, x: bits(
        jax.random.wrap_key_data(jax.random.bits(k, (2,)) + x)
    ),
}


@pytest.mark.parametrize("why", SOURCES)
def test_sources(why: str) -> None:
    """What a key of no stream comes from."""
    words = jnp.array([3, 4], jnp.uint32)
    trace = trace_draws(noise(SOURCES[why]), make_rngs("noise"), words)
    draw = trace.draws[-1]
    assert (draw.untraced, draw.stream, draw.ops) == (why, None, ())


def test_a_key_that_is_an_argument() -> None:
    (draw,) = trace_draws(
        noise(lambda k, given: bits(given)), make_rngs("noise"), KEY
    ).draws
    assert (draw.untraced, draw.stream) == ("an argument", None)


def test_a_seed_that_is_drawn() -> None:
    def function(key: Any) -> Any:
        return bits(jax.random.key(jax.random.randint(key, (), 0, 9)))

    draw = trace_draws(noise(function), make_rngs("noise")).draws[-1]
    assert draw.untraced == "another draw's output"


def test_drawn_words_that_a_loop_carries() -> None:
    """Words of no key go in, drawn ones come out: it may be either."""

    def function(key: Any) -> Any:
        def body(words: Any, k: Any) -> Any:
            drawn = bits(jax.random.wrap_key_data(words))
            return jax.random.bits(k, (2,)), drawn

        words, drawn = lax.scan(body, TABLE_OF_WORDS, split(key, 3))
        return drawn, bits(jax.random.wrap_key_data(words))

    trace = trace_draws(noise(function), make_rngs("noise"))
    lost = [draw.untraced for draw in trace.draws if draw.untraced]
    assert lost == ["another draw's output"] * 2


def test_words_that_are_changed_keep_their_stream() -> None:
    def function(key: Any) -> Any:
        return bits(jax.random.wrap_key_data(jax.random.key_data(key) + jnp.uint32(1)))

    (draw,) = trace_draws(noise(function), make_rngs("noise")).draws
    assert (draw.stream, draw.untraced) == ("noise", "passed through add as words")


# Consumers ------------------------------------------------------------------------


def generate(key: Any) -> Any:
    return lax.rng_bit_generator(jax.random.key_data(key), (3,))[1]


def test_raw_generator_with_a_whole_key() -> None:
    trace = check(
        noise(lambda k: generate(split(k)[1])), rngs=make_rngs("noise", impl="rbg")
    )
    (draw,) = trace.draws
    assert draw.use.primitive == "rng_bit_generator"
    assert draw.ops[-1].index == 1


def test_gamma_is_a_consumer() -> None:
    (draw,) = trace_draws(
        noise(lambda k: jax.random.gamma(k, 2.0)), make_rngs("noise")
    ).draws
    assert (draw.use.primitive, draw.stream, draw.ops) == ("random_gamma", "noise", ())


def test_whatever_takes_a_key_is_listed() -> None:
    """A primitive that nobody has heard of might draw."""
    primitive = jax.extend.core.Primitive("dice")
    primitive.def_abstract_eval(lambda key: jax.core.ShapedArray((), jnp.float32))
    trace = trace_draws(
        noise(lambda k: primitive.bind(split(k)[1])), make_rngs("noise")
    )
    (draw,) = trace.draws
    assert (draw.untraced, draw.stream) == ("consumed by dice", "noise")
    assert draw.use.primitive == "dice"


def test_a_program_within_an_unknown_primitive() -> None:
    """Draws in it are listed; where its keys come from is not known."""

    def function(rngs: Any, x: Any) -> Any:
        def solve(matvec: Any, b: Any) -> Any:
            return b * jax.random.normal(rngs["noise"])

        return lax.custom_linear_solve(lambda v: v, x, solve=solve, symmetric=True)

    draws = trace_draws(function, make_rngs("noise"), X).draws
    why = "passed through custom_linear_solve"
    assert {(draw.untraced, draw.stream) for draw in draws} == {(why, "noise")}


def test_keys_that_are_compared_are_not_drawn_from() -> None:
    def function(rngs: Any) -> Any:
        return rngs["noise"] == rngs["dropout"], bits(rngs["noise"])

    (draw,) = trace_draws(function, make_rngs("noise", "dropout")).draws
    assert draw.ops == ()


# Calls and gradients --------------------------------------------------------------


@jax.custom_vjp
def masked(x: Any, key: Any) -> Any:
    return jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x, 0.0)


masked.defvjp(
    lambda x, key: (masked(x, key), key),
    # It makes the mask again, instead of keeping it.
    lambda key, g: (jnp.where(jax.random.bernoulli(key, 0.5, g.shape), g, 0.0), None),
)


def dropped(key: Any, x: Any) -> Any:
    keep = jax.random.bernoulli(key, 0.5, x.shape)
    return jnp.where(keep, jnp.sin(x), 0.0)


def over_scan(layer: Any, key: Any, x: Any) -> Any:
    return lax.scan(lambda h, k: (layer(k, h), None), x, split(key, 3))[0]


def over_carry(layer: Any, key: Any, x: Any) -> Any:
    def body(carry: Any, _: Any) -> Any:
        key, h = carry
        key, now_ = split(key)
        return (key, layer(now_, h)), None

    return lax.scan(body, (key, x), length=3)[0][1]


def over_vmap(layer: Any, key: Any, x: Any) -> Any:
    return jax.vmap(layer, in_axes=(0, None))(split(key, 3), x)


def over_fori(layer: Any, key: Any, x: Any) -> Any:
    return lax.fori_loop(0, 3, lambda i, h: layer(fold_in(key, i), h), x)


WRAPS: dict[str, Any] = {
    "plain": lambda f: f,
    "remat": jax.checkpoint,
    "jit": jax.jit,
    "remat of jit": lambda f: jax.checkpoint(jax.jit(f)),
    "jit of remat": lambda f: jax.jit(jax.checkpoint(f)),
    "remat, cse allowed": lambda f: jax.checkpoint(f, prevent_cse=False),
    "custom_vjp": lambda f: lambda key, x: masked(x, key),
    "closed_call": lambda f: jax.named_call(f, name="called"),
}
LAYERS = {
    "once": lambda layer, key, x: layer(key, x),
    "twice": lambda layer, key, x: layer(split(key)[1], layer(split(key)[0], x)),
    "scan": over_scan,
    "carry": over_carry,
    "vmap": over_vmap,
    "fori": over_fori,
    "scan of scan": lambda layer, key, x: over_scan(
        functools.partial(over_scan, layer), key, x
    ),
    "remat of scan": lambda layer, key, x: jax.checkpoint(
        functools.partial(over_scan, layer)
    )(key, x),
    "vmap of scan": lambda layer, key, x: over_vmap(
        functools.partial(over_scan, layer), key, x
    ),
}


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("layers", LAYERS)
def test_a_gradient_draws_what_its_function_draws(layers: str, wrap: str) -> None:
    """What the backward pass computes again is no draw of its own."""
    layer = WRAPS[wrap](dropped)

    def loss(x: Any, rngs: Any) -> Any:
        return jnp.sum(LAYERS[layers](layer, rngs["noise"], x) ** 2)

    rngs = make_rngs("noise")
    forward = check(lambda rngs, x: loss(x, rngs), X, rngs=rngs)

    def step(rngs: Any, x: Any) -> Any:
        return jax.value_and_grad(loss)(x, rngs)

    both = trace_draws(step, rngs, X)
    assert both.draws == forward.draws
    assert set(consumed(step, rngs, X)) == set(planned(both, rngs))


def test_two_draws_from_one_key_are_two() -> None:
    """Even in one place and of one shape; so they are in a gradient."""

    def loss(x: Any, rngs: Any) -> Any:
        key = rngs["noise"]
        return jnp.sum(dropped(key, x) * jax.checkpoint(dropped)(key, x))

    rngs = make_rngs("noise")
    assert len(trace_draws(lambda r, x: loss(x, r), rngs, X).draws) == 2
    assert len(trace_draws(lambda r, x: jax.grad(loss)(x, r), rngs, X).draws) == 2


# Meshes ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mesh() -> Any:
    auto = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((2, 3), ("data", "model"), axis_types=auto)


def shard(function: Any, mesh: Any, in_specs: Any, out_specs: Any) -> Any:
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


DATA, MODEL, BOTH = P("data"), P("model"), P(("data", "model"))
MESHES: dict[str, Any] = {
    "replicated": (lambda k: bits(k)[None], P(), BOTH, lambda k: k),
    "rows": (all_bits, DATA, DATA, lambda k: split(k, 4)),
    "one row": (lambda k: bits(k[1])[None], DATA, DATA, lambda k: split(k, 4)),
    "columns": (
        all_bits,
        P(None, "model"),
        P("data", "model"),
        lambda k: split(k, (2, 3)),
    ),
    "both": (all_bits, BOTH, BOTH, lambda k: split(k, 12)),
    "axis_index": (
        lambda k: bits(fold_in(k, lax.axis_index("data")))[None],
        P(),
        DATA,
        lambda k: k,
    ),
    "two indices": (
        lambda k: bits(
            fold_in(k, lax.axis_index("data") * 3 + lax.axis_index("model"))
        )[None],
        P(),
        BOTH,
        lambda k: k,
    ),
    "a split by the index": (
        lambda k: bits(split(k, 2)[lax.axis_index("data")])[None],
        P(),
        DATA,
        lambda k: k,
    ),
    "a scan": (
        lambda k: lax.map(lambda i: bits(fold_in(k[0], i)), jnp.arange(2)),
        DATA,
        DATA,
        lambda k: split(k, 2),
    ),
}


@pytest.mark.parametrize("name", MESHES)
def test_meshes(mesh: Any, name: str) -> None:
    function, in_specs, out_specs, make = MESHES[name]
    trace = check(
        noise(lambda k: shard(function, mesh, (in_specs,), out_specs)(make(k)))
    )
    (draw,) = trace.draws
    assert dict(draw.within)["data"] == 2
    assert dict(draw.within)["model"] == 3
    assert name == "replicated" or any(
        axis in ("data", "model") for axis, _ in draw.axes
    )


def test_keys_that_shards_give_back(mesh: Any) -> None:
    """Each shard splits its own; outside, they are one array."""

    def function(key: Any) -> Any:
        def inner(k: Any) -> Any:
            return split(fold_in(k, lax.axis_index("data")), 2), split(k, 3)

        ones, others = shard(inner, mesh, (P(),), (DATA, P()))(key)
        return all_bits(ones), bits(ones[3]), all_bits(others)

    check(noise(function))


def test_keys_that_differ_and_are_called_one(mesh: Any) -> None:
    """Which shard's key comes out is not said by the program."""

    def function(key: Any) -> Any:
        def inner(k: Any) -> Any:
            return fold_in(k, lax.axis_index("data"))

        return bits(shard(inner, mesh, (P(),), P())(key))

    (draw,) = trace_draws(noise(function), make_rngs("noise")).draws
    assert draw.untraced == "differs between the shards of a mesh"
    assert draw.stream == "noise"


# Flax: paths and names ------------------------------------------------------------


class Raw(nn.Module):
    """Draws by `jax.random` alone, from a key that it is given."""

    @nn.compact
    def __call__(self, x: Any, key: Any) -> Any:
        return x + jax.random.normal(key, x.shape)


class RawInside(nn.Module):
    @nn.compact
    def __call__(self, x: Any, key: Any) -> Any:
        return Raw(name="inner")(nn.Dense(4)(x), key)


def lifted(wrap: Callable[[Any], Any]) -> Any:
    """Twice one lifted class, in a module; keys come from outside of Flax."""

    @model
    def net(self: Any, args: Any) -> Any:
        x, keys = args
        block = wrap(RawInside)
        return block(name="high")(block(name="low")(x, keys), keys)

    return net()


SPLIT_ALL = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
LIFTS: dict[str, Any] = {
    "plain": (lambda c: c, 1),
    "jit": (nn.jit, 1),
    "remat": (nn.remat, 1),
    "remat of jit": (lambda c: nn.remat(nn.jit(c)), 1),
    "jit of jit": (lambda c: nn.jit(nn.jit(c)), 1),
    "vmap": (lambda c: nn.vmap(c, in_axes=(None, 0), out_axes=0, **SPLIT_ALL), 3),
    "scan": (
        lambda c: nn.scan(Scanned, **SPLIT_ALL, in_axes=0, out_axes=0, length=3),
        3,
    ),
}


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x: Any, key: Any) -> Any:
        return Raw(name="inner")(nn.Dense(4)(x), key), None


@pytest.mark.parametrize("name", LIFTS)
@pytest.mark.parametrize("times", [1, 2])
def test_paths_of_draws_outside_make_rng(name: str, times: int) -> None:
    """Exact under any lift, also where JAX or Flax share a trace, and a second time."""
    wrap, count = LIFTS[name]

    def function(rngs: Any, x: Any) -> Any:
        keys = split(rngs["noise"], 3) if count > 1 else rngs["noise"]
        net = lifted(wrap)
        if name == "scan":
            net = scan_twice(wrap)
        elif name == "vmap":
            net = vmap_twice(wrap)
        return net.init_with_output({"params": rngs["params"]}, (x, keys))

    for _ in range(times):
        trace = trace_draws(function, make_rngs("noise", "params"), X)
    paths = [draw.path for draw in trace.draws if draw.stream == "noise"]
    assert paths == [("low", "inner"), ("high", "inner")]
    assert all(draw.call is None for draw in trace.draws if draw.stream == "noise")


def scan_twice(wrap: Any) -> Any:
    @model
    def net(self: Any, args: Any) -> Any:
        x, keys = args
        block = wrap(None)
        return block(name="high")(block(name="low")(x, keys)[0], keys)[0]

    return net()


def vmap_twice(wrap: Any) -> Any:
    @model
    def net(self: Any, args: Any) -> Any:
        x, keys = args
        block = wrap(RawInside)
        low = block(name="low")(x, keys)
        return block(name="high")(low.sum(0), keys)

    return net()


JITTED = nn.jit(Block)


def test_a_jitted_class_that_was_traced_before() -> None:
    """No trace from before is used, in which Flax wrote no paths."""

    @model
    def twins(self: Any, x: Any) -> Any:
        return JITTED(name="high")(JITTED(name="low")(x)[0])[0]

    rngs = make_rngs("params", "dropout")
    twins().init_with_output(rngs, X)
    traces = [trace_draws(init_of(twins()), rngs, X) for _ in range(2)]
    assert traces[0].draws == traces[1].draws
    assert {(draw.path, draw.call) for draw in traces[0].draws} == {
        ((block, layer), 1)
        for block in ("low", "high")
        for layer in ("Dense_0", "Dropout_0")
    }


@pytest.mark.parametrize("traced_before", [False, True])
def test_a_trace_that_modules_share(traced_before: bool) -> None:
    """Its marks are of the module that came first; a fork says whose it is now."""
    shared = nn.jit(RawInside)

    @model
    def net(self: Any, args: Any) -> Any:
        x, key = args
        return shared(name="high")(shared(name="low")(x, key), key)

    def function(key: Any, params: Any, x: Any) -> Any:
        return net().init_with_output({"params": params}, (x, key))

    rngs = make_rngs("noise", "params")
    given_ = (rngs["noise"], rngs["params"], X)
    if traced_before:
        jax.make_jaxpr(function)(*given_)
    with _mark_modules():
        closed = jax.make_jaxpr(functools.partial(function))(*given_)
    draws, _ = walk_jaxpr(closed.jaxpr, streams=["noise", "params"])
    bodies = {id(e.params["jaxpr"]) for e in closed.eqns if e.primitive.name == "jit"}
    assert len(bodies) == 1
    assert [draw.path for draw in draws] == [
        ("low", "Dense_0"),
        ("low", "inner"),
        ("high", "Dense_0"),
        ("high", "inner"),
    ]


def test_a_module_applied_within_a_module() -> None:
    """Its key is the outer module's, its path goes on from there."""

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            rngs = {"dropout": self.make_rng("noise")}
            return Members().init_with_output({"params": KEY, **rngs}, x)[0]

    @model
    def net(self: Any, x: Any) -> Any:
        return Outer(name="outer")(x)

    trace = trace_draws(apply_of(net(), {}), make_rngs("noise"), X)
    drawn = [draw.path for draw in trace.draws if draw.stream == "noise"]
    assert drawn == [("outer", "Dropout_0"), ("outer", "Dropout_1")]


def test_names_that_need_quoting() -> None:
    @model
    def net(self: Any, x: Any) -> Any:
        return Raw(name="a.b (c):d@%")(x, self.make_rng("noise"))

    trace = trace_draws(apply_of(net(), {}), make_rngs("noise"), X)
    assert [draw.path for draw in trace.draws] == [()]
    assert trace.draws[0].call == 1

    @model
    def given_(self: Any, args: Any) -> Any:
        return Raw(name="a.b (c):d@%")(*args)

    def function(rngs: Any, x: Any) -> Any:
        return given_().apply({}, (x, rngs["noise"]))

    (draw,) = trace_draws(function, make_rngs("noise"), X).draws
    assert draw.path == ("a.b (c):d@%",)


def test_flax_is_put_back() -> None:
    from flax.linen import module, transforms

    names = ("_derive_profiling_name", "fork_rngs", "_module_fingerprint")
    before = [getattr(h, n, None) for h in (module, transforms) for n in names]
    trace_draws(init_of(lifted(nn.jit)), make_rngs("params", "noise"), (X, KEY))
    assert before == [getattr(h, n, None) for h in (module, transforms) for n in names]


def test_the_traced_program_is_the_program() -> None:
    """Marks change no number: same primitives in the same order."""
    rngs, function = make_rngs("params", "dropout"), init_of(scanned()(name="layers"))
    plain = jax.make_jaxpr(function)(rngs, X, None)
    trace = trace_draws(function, rngs, X, None)
    assert trace.primitives >= {"scan", "random_bits"}
    assert str(plain) == str(jax.make_jaxpr(function)(rngs, X, None))


class Members(nn.Module):
    """Two layers that draw, under one vmap."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Dropout(0.5, deterministic=False)(nn.Dense(4)(x))
        return nn.Dropout(0.5, deterministic=False)(x)


def test_axes_of_lifts() -> None:
    """An axis has the path of the lifted module, whoever draws along it."""

    @model
    def net(self: Any, x: Any) -> Any:
        split_rngs = {"params": True, "dropout": True}
        axes: dict[str, Any] = {
            "variable_axes": {"params": 0},
            "split_rngs": split_rngs,
        }
        x = nn.vmap(Members, in_axes=None, axis_size=3, **axes)(name="members")(x)
        x = nn.vmap(Members, in_axes=0, axis_size=3, **axes)(name="others")(x)
        return nn.scan(Block, length=2, **axes)(name="layers")(x.sum(0), None)[0]

    rngs = make_rngs("params", "dropout")
    trace = check(init_of(net()), X, rngs=rngs)
    names = {(draw.path[0], draw.stream, draw.axes) for draw in trace.draws}
    assert names == {
        ("members", "params", (("vmap:members", 3),)),
        ("members", "dropout", (("vmap:members", 3),)),
        ("others", "params", (("vmap:others", 3),)),
        ("others", "dropout", (("vmap:others", 3),)),
        ("layers", "params", (("scan:layers", 2),)),
        ("layers", "dropout", (("scan:layers", 2),)),
    }
    for draw in trace.draws:
        ((name, _),) = draw.axes
        (split_op,) = (op for op in draw.ops if op.op == "split")
        assert (split_op.why, split_op.index) == (name, name)


def test_an_axis_of_functions_in_a_module() -> None:
    """The path of the module that calls `jax.vmap` and `lax.scan`."""

    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            keys = split(self.make_rng("noise"), 3)
            low = jax.vmap(lambda k: jax.random.normal(k, (4,)))(keys).sum()
            more = lax.map(lambda k: jax.random.normal(k, (4,)), keys).sum()
            return x + low + more

    @model
    def net(self: Any, x: Any) -> Any:
        return Noisy(name="b")(Noisy(name="a")(x))

    trace = trace_draws(apply_of(net(), {}), make_rngs("noise"), X)
    axes = [axis for draw in trace.draws for axis, _ in draw.axes]
    assert axes == ["vmap:a", "scan:a", "vmap:b", "scan:b"]


def test_two_splits_at_one_place_have_two_names() -> None:
    def function(rngs: Any) -> Any:
        a, b = split(rngs["noise"], 3), split(fold_in(rngs["noise"], 1), 3)
        return (
            all_bits(a),
            all_bits(b),
            all_bits(a),
            all_bits(split(rngs["dropout"], 3)),
        )

    trace = check(function)
    assert [draw.axes[0][0] for draw in trace.draws] == [
        "vmap",
        "vmap#2",
        "vmap",
        "vmap",
    ]


def test_names_of_axes_in_one_draw_differ() -> None:
    """Two dimensions that other draws call the same."""

    def function(rngs: Any) -> Any:
        count, keys = jnp.arange(3), split(rngs["dropout"], 3)
        low = jax.vmap(lambda i: bits(fold_in(rngs["noise"], i)))(count)
        row = jax.vmap(lambda k, i: bits(fold_in(k, i)), in_axes=(None, 0))
        return low, all_bits(keys), jax.vmap(row, in_axes=(0, None))(keys, count)

    first, second, both = check(function).draws
    assert first.axes == second.axes == (("vmap", 3),)
    assert both.axes == (("vmap", 3), ("vmap#2", 3))


def test_a_gradient_of_flax() -> None:
    """Paths, calls and axes of a forward pass, in the gradient of lifted layers."""

    @model
    def net(self: Any, x: Any) -> Any:
        layers = nn.scan(
            nn.remat(Block),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=3,
        )
        return drop(
            self, nn.remat(Block)(name="last")(layers(name="layers")(x, None)[0])[0]
        )

    variables, rngs = zeros_of(net()), make_rngs("dropout")
    apply = apply_of(net(), variables)
    forward = check(lambda r, x: apply(r, x)[0], X, rngs=rngs)

    def loss(variables: Any, rngs: Any, x: Any) -> Any:
        return (apply_of(net(), variables)(rngs, x)[0] ** 2).sum()

    both = trace_draws(lambda r, x: jax.value_and_grad(loss)(variables, r, x), rngs, X)
    assert both.draws == forward.draws
    assert {(draw.path, draw.call) for draw in forward.draws} == {
        (("layers", "Dropout_0"), 2),
        (("last", "Dropout_0"), 1),
        ((), 1),
    }


def test_streams_that_are_inputs_of_the_jaxpr() -> None:
    """`walk_jaxpr` by itself, over a jaxpr that nobody marked."""
    closed = jax.make_jaxpr(lambda k, x: bits(fold_in(k, 3)) + x)(KEY, 1)
    ((draw,), names) = walk_jaxpr(closed.jaxpr, streams=["noise"])
    assert draw.ops == (Op("fold_in", 3, why="fold_in"),)
    assert "random_bits" in names


# Ops ------------------------------------------------------------------------------


def test_affine() -> None:
    number = Affine(3, (("i", 2), ("j", -1)))
    assert number.at({"i": 5, "j": 4}) == 9
    assert number.at({"i": 0, "j": 4}) == 2**32 - 1
    assert number.bind({"i": 5}) == Affine(13, (("j", -1),))
    assert number.put("i", Affine(1, (("j", 3),))) == Affine(5, (("j", 5),))
    assert number + Affine(0, (("j", 1),)) == Affine(3, (("i", 2),))
    assert number * 0 == Affine()
    with pytest.raises(KeyError, match="j"):
        number.at({"i": 5})
    traced = jax.jit(lambda i, j: number.at({"i": i, "j": j}))(0, 4)
    assert (traced.dtype, int(traced)) == (jnp.uint32, 2**32 - 1)


NESTED = (
    Op(
        "repeat",
        index=Affine(1, (("i", 1),)),
        counter="turn2",
        body=(
            Op("fold_in", Affine(0, (("turn2", 2), ("i", 1)))),
            Op(
                "repeat",
                index="turn2",
                counter="turn",
                body=(Op("split", index=Affine(0, (("turn", 1), ("j", 2))), of=9),),
            ),
        ),
    ),
    Op("fold_in", Affine(7, (("j", 4),))),
)


def nested_by_hand(key: Any, i: int, j: int) -> Any:
    for outer in range(i + 1):
        key = fold_in(key, 2 * outer + i)
        for turn in range(outer):
            key = split(key, 9)[turn + 2 * j]
    return fold_in(key, 7 + 4 * j)


@pytest.mark.parametrize("i", [0, 2, 3])
@pytest.mark.parametrize("j", [0, 2])
def test_repeats_within_repeats(i: int, j: int) -> None:
    """By hand, bound and open, with numbers and with traced ones."""
    key = make_rngs("noise")["noise"]
    truth = key_words(nested_by_hand(key, i, j))
    at: Any = {"i": i, "j": j}
    assert key_words(derive_key(NESTED, impl="", start=key, coordinates=at)) == truth
    bound = bind_ops(NESTED, at)
    assert key_words(derive_key(bound, impl="", start=key)) == truth
    assert not any(op.axes for op in bound)
    derive = jax.jit(
        lambda i, j: derive_key(
            NESTED, impl="", start=key, coordinates={"i": i, "j": j}
        )
    )
    assert key_words(derive(jnp.int32(i), jnp.int32(j))) == truth


def test_axes_of_ops() -> None:
    assert NESTED[0].axes == ("i", "j")
    assert NESTED[1].axes == ("j",)
    with pytest.raises(KeyError, match="j"):
        bind_ops(NESTED, {"i": 1})


# Programs at random ---------------------------------------------------------------

LEAVES = """fold counter split shape pick dynamic window rev flat rows turn stack words
    where draw"""
NODES = "scan vmap map carry fori back cond pick_branch jit remat"

Program = list[tuple[str, int, int, Any]]


def programs(depth: int) -> st.SearchStrategy[Program]:
    numbers = st.integers(0, 7)
    names = st.sampled_from(LEAVES.split())
    leaf = st.tuples(names, numbers, numbers, st.just([]))
    if not depth:
        return st.lists(leaf, min_size=1, max_size=4)
    names = st.sampled_from(NODES.split())
    node = st.tuples(names, numbers, numbers, programs(depth - 1))
    return st.lists(leaf | node, min_size=2, max_size=6)


def run(program: Program, keys: list[Any], numbers: list[Any], x: Any) -> Any:
    """(sum of all bits drawn, the last key array): draws in the end, too."""
    total, keys = jnp.uint32(0), list(keys)
    for name, a, b, body in program:
        key = keys[a % len(keys)]
        if name == "draw":
            total += all_bits(key).sum(dtype=jnp.uint32)
        elif name in NODE:
            drawn, made = NODE[name](key, a, b, body, keys, numbers, x)
            total, keys = total + drawn, [*keys, *made]
        else:
            keys += [
                made for made in LEAF[name](key, b, keys, numbers, x) if made.size <= 24
            ]
    return total + all_bits(keys[-1]).sum(dtype=jnp.uint32), keys[-1]


def each(function: Any, keys: Any) -> Any:
    for _ in range(keys.ndim):
        function = jax.vmap(function)
    return function(keys)


def counter(numbers: list[Any], b: int) -> Any:
    return numbers[b % len(numbers)] * (b % 3 + 1) + b


LEAF: dict[str, Any] = {
    "fold": lambda k, b, *_: [each(lambda one: fold_in(one, b), k)],
    "counter": lambda k, b, _, n, x: [each(lambda one: fold_in(one, counter(n, b)), k)],
    "split": lambda k, b, *_: [each(lambda one: split(one, 1 + b % 3), k)],
    "shape": lambda k, b, *_: [each(lambda one: split(one, (2, 1 + b % 3)), k)],
    "pick": lambda k, b, *_: [k[b % len(k)]] if k.ndim else [],
    "dynamic": lambda k, b, _, n, x: [k[counter(n, b)]] if k.ndim else [],
    "window": lambda k, b, *_: [k[b % 2 :: 1 + b % 2]] if k.ndim and len(k) > 1 else [],
    "rev": lambda k, b, *_: [k[::-1]] if k.ndim else [],
    "flat": lambda k, b, *_: [k.reshape(-1)],
    "rows": lambda k, b, *_: [k.reshape(2, -1)] if k.size % 2 == 0 else [],
    "turn": lambda k, b, *_: [k.T],
    "stack": lambda k, b, keys, *_: [
        jnp.stack(
            [k, *(o for o in keys[: b % 3] if o.shape == k.shape)], b % (k.ndim + 1)
        )
    ],
    "words": lambda k, b, *_: [
        jax.random.wrap_key_data(jax.random.key_data(k[None])[0])
    ],
    "where": lambda k, b, keys, n, x: [
        jnp.where(o, k, keys[0]) for o in ([x[b % 2] > 0] if keys[0].ndim == 0 else [])
    ],
}


def walk_rows(
    key: Any, a: int, b: int, body: Any, keys: Any, n: Any, x: Any, how: Any
) -> Any:
    if not key.ndim:
        return jnp.uint32(0), []
    drawn, made = how(lambda row: run(body, [*keys, row], n, x), key)
    return drawn.sum(dtype=jnp.uint32), [made] if made.size <= 24 else []


def by_scan(function: Any, rows: Any) -> Any:
    return lax.scan(lambda c, row: (c, function(row)), 0, rows)[1]


def by_map(key: Any, a: int, b: int, body: Any, keys: Any, n: Any, x: Any) -> Any:
    many = jnp.arange(1 + b % 3)
    drawn, made = lax.map(lambda i: run(body, [*keys, key], [*n, i], x), many)
    return drawn.sum(dtype=jnp.uint32), [made] if made.size <= 24 else []


def by_carry(
    key: Any,
    a: int,
    b: int,
    body: Any,
    keys: Any,
    n: Any,
    x: Any,
    *,
    reverse: bool = False,
) -> Any:
    def turn(carry: Any, i: Any) -> Any:
        drawn, made = run(body, [*keys, carry], [*n, i], x)
        after = (
            made if made.shape == carry.shape else each(lambda k: fold_in(k, 3), carry)
        )
        return after, (drawn, carry)

    last, (drawn, stacked) = lax.scan(turn, key, jnp.arange(1 + b % 3), reverse=reverse)
    made = [last, stacked] if stacked.size <= 24 else [last]
    return drawn.sum(dtype=jnp.uint32), made


def by_fori(key: Any, a: int, b: int, body: Any, keys: Any, n: Any, x: Any) -> Any:
    def turn(i: Any, carry: Any) -> Any:
        inner, total = carry
        drawn, made = run(body, [*keys, inner], [*n, i], x)
        after = (
            made if made.shape == key.shape else each(lambda k: fold_in(k, i), inner)
        )
        return after, total + drawn

    last, drawn = lax.fori_loop(a % 2, a % 2 + b % 3, turn, (key, jnp.uint32(0)))
    return drawn, [last]


def by_cond(key: Any, a: int, b: int, body: Any, keys: Any, n: Any, x: Any) -> Any:
    def one(k: Any) -> Any:
        return run(body, [*keys, k], n, x)[0], fold_in(keys[0], 5)

    def other(k: Any) -> Any:
        return jnp.uint32(0), split(keys[0])[b % 2]

    drawn, made = lax.cond(x[b % 2] > 0, one, other, key)
    return drawn, [made]


def by_counter(key: Any, a: int, b: int, body: Any, keys: Any, n: Any, x: Any) -> Any:
    def one(k: Any) -> Any:
        return run(body, [*keys, k], n, x)[0], fold_in(keys[0], 5)

    def other(k: Any) -> Any:
        return jnp.uint32(0), split(keys[0])[b % 2]

    drawn, made = lax.cond(counter(n, b) > b + 1, one, other, key)
    return drawn, [made]


def by_call(
    key: Any, a: int, b: int, body: Any, keys: Any, n: Any, x: Any, wrap: Any
) -> Any:
    drawn, made = wrap(lambda keys, k, n, x: run(body, [*keys, k], n, x))(
        keys, key, n, x
    )
    return drawn, [made]


NODE: dict[str, Any] = {
    "scan": functools.partial(walk_rows, how=by_scan),
    "vmap": functools.partial(walk_rows, how=lambda f, rows: jax.vmap(f)(rows)),
    "map": by_map,
    "carry": by_carry,
    "back": functools.partial(by_carry, reverse=True),
    "fori": by_fori,
    "cond": by_cond,
    "pick_branch": by_counter,
    "jit": functools.partial(by_call, wrap=jax.jit),
    "remat": functools.partial(by_call, wrap=jax.checkpoint),
}
INPUTS = [jnp.array(signs) for signs in itertools.product((1.0, -1.0), repeat=2)]
# An index that may lie outside, a choice under vmap, a counter that two decide.
SAID = (
    "may lie outside",
    "element by element",
    "program computes",
    "two counters",
    "several counters",
    "comes out of",
    "carried through",
    "choose",
)


def check_program(program: Program) -> Trace:
    def function(rngs: Any, x: Any) -> Any:
        return run(program, [rngs["noise"], rngs["dropout"]], [jnp.int32(2)], x)[0]

    rngs = make_rngs("noise", "dropout")
    trace = trace_draws(function, rngs, INPUTS[0])
    real = [consumed(function, rngs, x) for x in INPUTS]
    found, ever = planned(trace, rngs), set().union(*real)
    lost = untraced(trace)
    assert all(any(why in text for why in SAID) for text in lost), lost
    assert lost or ever <= set(found)
    if not any(draw.branches for draw in trace.draws):
        assert all(times <= real[0][key] for key, times in found.items())
        assert lost or found == real[0]
    return trace


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(programs(2))
def test_programs_at_random(program: Program) -> None:
    """Every key of any program is traced, or said to be lost."""
    try:
        jax.make_jaxpr(lambda k, x: run(program, [k, k], [jnp.int32(2)], x)[0])(
            KEY, INPUTS[0]
        )
    except (TypeError, ValueError, IndexError):
        assume(False)
    check_program(program)
