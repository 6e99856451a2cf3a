# SPDX-License-Identifier: Apache-2.0
"""What the lifts of Flax do to streams, as they are met while a program is traced."""

import inspect
from collections.abc import Callable
from typing import Any

import flax.core.lift
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from runner.audit.lifted import Crossing, Rule
from runner.audit.trace import Missing, Trace, trace_draws

X = jax.ShapeDtypeStruct((3, 2), jnp.float32)
KEY = jax.eval_shape(lambda: jax.random.key(0))
AXES = {"params": 0}


class Noise(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return x + jax.random.normal(self.make_rng("noise"), x.shape)


class Block(nn.Module):
    """What is lifted: draws from `params` and `noise`."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return Noise(name="add")(nn.Dense(2)(x))


class Step(nn.Module):
    """The same, as a scan has it."""

    @nn.compact
    def __call__(self, x: Any, _: Any = None) -> Any:
        return Block(name="block")(x), None


class Root(nn.Module):
    call: Callable[..., Any]

    @nn.compact
    def __call__(self, x: Any) -> Any:
        made = self.call(self, x)
        return made[0] if isinstance(made, tuple) else made


def scan(of: Any, *, axes: Any = None, length: int = 3, **split: bool) -> Any:
    given = AXES if axes is None else axes
    return nn.scan(of, variable_axes=given, split_rngs=split, length=length)


def vmap(of: Any, *, axis: int | None = 0, **split: bool) -> Any:
    return nn.vmap(of, variable_axes={"params": axis}, split_rngs=split)


SCANNED = scan(Step, params=True, noise=True)  # these two when the file is imported
JITTED = nn.jit(Block)


def trace(call: Callable[..., Any], *streams: str, spare: Any = None) -> Trace:
    def init(rngs: Any, x: Any) -> Any:
        return Root(call).init(rngs, x)

    rngs = dict.fromkeys(streams or ("params", "noise"), KEY)
    return trace_draws(init, rngs, X, spare=spare)


def crossed(found: Trace, stream: str = "noise") -> set[tuple[Any, ...]]:
    """(module path, (axis, rule), ...) of every draw from a stream."""
    return {
        (path, *((c.axis, str(c.rule)) for c in crossings))
        for (name, path, _), crossings in found.crossings.items()
        if name == stream
    }


def draw(module: nn.Module, x: Any) -> Any:
    return x + jax.random.normal(module.make_rng("noise"), x.shape)


# Each lift, as a class and as a function ----------------------------------------------


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("kind", ["scan", "vmap"])
def test_a_lifted_class(kind: str, split: bool) -> None:
    cls = (
        scan(Step, params=True, noise=split)
        if kind == "scan"
        else vmap(Block, params=True, noise=split)
    )
    found = trace(lambda _, x: cls(name="layers")(x))
    inner = ("block",) if kind == "scan" else ()
    rule = "split" if split else "shared"
    assert crossed(found) == {(("layers", *inner, "add"), (f"{kind}:layers", rule))}
    dense = ("layers", *inner, "Dense_0")
    assert crossed(found, "params") == {(dense, (f"{kind}:layers", "split"))}
    for crossings in found.crossings.values():
        (crossing,) = crossings
        assert (crossing.kind, crossing.path) == (kind, ("layers",))
        assert (crossing.indexed, crossing.loops) == (True, kind == "scan")
        assert crossing.stacks


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("kind", ["scan", "vmap"])
def test_a_lifted_function(kind: str, split: bool) -> None:
    def call(module: nn.Module, x: Any) -> Any:
        if kind == "scan":
            body = scan(lambda m, c: (draw(m, c), None), params=True, noise=split)
        else:
            body = vmap(draw, params=True, noise=split)
        return body(module, x)

    rule = "split" if split else "shared"
    assert crossed(trace(call)) == {((), (kind, rule))}


@pytest.mark.parametrize("kind", ["scan", "vmap"])
def test_a_function_that_closes_over_the_module_outside(kind: str) -> None:
    """Its lift splits, and is not asked."""

    def call(module: nn.Module, x: Any) -> Any:
        if kind == "scan":
            body = scan(lambda _, c: (draw(module, c), None), params=True, noise=True)
        else:
            body = vmap(lambda _, c: draw(module, c), params=True, noise=True)
        return body(module, x)

    assert crossed(trace(call)) == {((), (kind, "ignored"))}


def test_closing_over_the_module_within_another_lift() -> None:
    """The outer lift still reaches what the inner one does not."""

    def inner(module: nn.Module, x: Any) -> Any:
        body = scan(lambda _, c: (draw(module, c), None), params=True, noise=True)
        return body(module, x)[0]

    def call(module: nn.Module, x: Any) -> Any:
        return vmap(inner, params=True, noise=True)(module, x)

    assert crossed(trace(call)) == {((), ("vmap", "split"), ("scan", "ignored"))}


def test_closing_over_the_module_outside_of_both() -> None:
    def call(root: nn.Module, x: Any) -> Any:
        def inner(module: nn.Module, x: Any) -> Any:
            body = scan(lambda _, c: (draw(root, c), None), params=True, noise=True)
            return body(module, x)[0]

        return vmap(inner, params=True, noise=True)(root, x)

    assert crossed(trace(call)) == {((), ("vmap", "ignored"), ("scan", "ignored"))}


@pytest.mark.parametrize("form", ["class", "function"])
@pytest.mark.parametrize("kind", ["remat", "jit"])
def test_without_an_index(kind: str, form: str) -> None:
    lift = getattr(nn, kind)

    def call(module: nn.Module, x: Any) -> Any:
        return lift(Block)(name="one")(x) if form == "class" else lift(draw)(module, x)

    found = trace(call)
    path = ("one", "add") if form == "class" else ()
    axis = f"{kind}:one" if form == "class" else kind
    assert (path, (axis, "passed")) in crossed(found)
    ((crossing,),) = {c for c in found.crossings.values() if c}
    assert (crossing.indexed, crossing.loops, crossing.stacks) == (False,) * 3


@pytest.mark.parametrize("rngs", [True, "params", ["noise"]])
@pytest.mark.parametrize("kind", ["cond", "switch", "remat", "jit"])
def test_a_lift_with_a_filter_of_streams(kind: str, rngs: Any) -> None:
    def call(module: nn.Module, x: Any) -> Any:
        branches = [draw, lambda m, x: x]
        if kind == "cond":
            return nn.cond(x.sum() > 0, *branches, module, x, rngs=rngs)
        if kind == "switch":
            return nn.switch(0, branches, module, x, rngs=rngs)
        return getattr(nn, kind)(draw, rngs=rngs)(module, x)

    found = trace(call)
    if rngs != "params":
        assert ((), (kind, "passed")) in crossed(found)
        assert not found.missing
        return
    lift = Crossing(kind, (), Rule.ABSENT, stacks=False)
    assert found.missing == (Missing("noise", (), lift, substituted=True),)
    assert ((), (kind, "passed")) in crossed(found, "params")


@pytest.mark.parametrize("split", [{"noise": True}, {"noise": False}, {}])
def test_while_loop(split: dict[str, bool]) -> None:
    def call(module: nn.Module, x: Any) -> Any:
        count = module.variable("state", "count", lambda: jnp.int32(0))

        def body(m: nn.Module, c: Any) -> Any:
            m.put_variable("state", "count", m.get_variable("state", "count") + 1)
            return draw(m, c)

        def more(m: nn.Module, _: Any) -> Any:
            return m.get_variable("state", "count") < 3

        assert count.value.shape == ()
        return nn.while_loop(
            more, body, module, x, carry_variables="state", split_rngs=split
        )

    found = trace(call, spare=KEY)
    if not split:
        ((missing,), crossings) = found.missing, found.crossings
        assert not crossings
        assert not missing.substituted
        assert missing.lift == Crossing("while_loop", (), Rule.ABSENT, stacks=False)
        return
    rule = "split" if split["noise"] else "shared"
    assert crossed(found) == {((), ("while", rule))}
    ((crossing,),) = set(found.crossings.values())
    assert (crossing.kind, crossing.indexed, crossing.loops) == (
        "while_loop",
        True,
        True,
    )


def test_axes_are_called_as_in_the_draws() -> None:
    """What a crossing calls its axis is what the walk over the jaxpr calls it."""

    def call(_: nn.Module, x: Any) -> Any:
        lifted = vmap(scan(Step, params=True, noise=True), params=True, noise=True)
        return lifted(name="layers")(x)

    found = trace(call)
    ((axes, key),) = [(dict(d.axes), (d.stream, d.path, d.call)) for d in found.draws]
    assert {c.axis for c in found.crossings[key]} == set(axes)


# Nested -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (
            lambda: scan(nn.remat(Step), params=True, noise=True),
            (("scan:m", "split"), ("remat:m", "passed")),
        ),
        (
            lambda: vmap(scan(Step, params=True, noise=True), params=True, noise=False),
            (("vmap:m", "shared"), ("scan:m", "split")),
        ),
        (
            lambda: scan(scan(Step, params=True, noise=False), params=True, noise=True),
            (("scan:m", "split"), ("scan:m#2", "shared")),
        ),
        (
            lambda: vmap(nn.jit(nn.remat(Block)), params=True, noise=True),
            (("vmap:m", "split"), ("jit:m", "passed"), ("remat:m", "passed")),
        ),
        (
            lambda: nn.remat_scan(Block, lengths=(2, 3)),
            (("scan:m", "split"), ("remat:m", "passed"), ("scan:m#2", "split")),
        ),
    ],
    ids=["scan-remat", "vmap-scan", "scan-scan", "vmap-jit-remat", "remat_scan"],
)
def test_lifts_of_lifts(make: Callable[[], Any], expected: Any) -> None:
    found = crossed(trace(lambda _, x: make()(name="m")(x)))
    within = {row[1:] for row in found if row[0][-1] == "add"}
    assert within == {expected}


def test_lifts_at_several_paths_count_by_themselves() -> None:
    def call(_: nn.Module, x: Any) -> Any:
        for name in ("one", "two"):
            x = vmap(Block, params=True, noise=True)(name=name)(x)
        return x

    assert crossed(trace(call)) == {
        (("one", "add"), ("vmap:one", "split")),
        (("two", "add"), ("vmap:two", "split")),
    }


def test_a_lift_is_over_when_its_call_is() -> None:
    def call(module: nn.Module, x: Any) -> Any:
        return draw(module, vmap(Block, params=True, noise=True)(name="v")(x))

    assert crossed(trace(call)) == {(("v", "add"), ("vmap:v", "split")), ((),)}


@pytest.mark.parametrize("axis", [0, None])
def test_stacks_says_whether_variables_are_stacked(axis: int | None) -> None:
    cls = vmap(Block, axis=axis, params=False, noise=False)
    found = trace(lambda _, x: cls(name="v")(x))
    assert {c.stacks for each in found.crossings.values() for c in each} == {axis == 0}


def test_the_first_filter_that_matches_counts() -> None:
    """As in Flax, which gives each stream to one group."""
    cls = nn.vmap(Block, variable_axes=AXES, split_rngs={"noise": False, True: True})
    found = trace(lambda _, x: cls(name="v")(x))
    assert crossed(found) == {(("v", "add"), ("vmap:v", "shared"))}
    assert crossed(found, "params") == {(("v", "Dense_0"), ("vmap:v", "split"))}


# Streams that are kept out ------------------------------------------------------------


def test_a_stream_that_a_lift_does_not_mention() -> None:
    found = trace(lambda _, x: scan(Step, params=True)(name="layers")(x))
    lift = Crossing("scan", ("layers",), Rule.ABSENT, stacks=True)
    path = ("layers", "block", "add")
    assert found.missing == (Missing("noise", path, lift, substituted=True),)


def test_the_outermost_lift_that_keeps_it_out_is_named() -> None:
    def call(_: nn.Module, x: Any) -> Any:
        return vmap(scan(Step, params=True), params=True)(name="m")(x)

    (missing,) = trace(call).missing
    assert missing.lift is not None
    assert missing.lift.axis == "vmap:m"


def test_a_stream_that_is_nowhere_is_no_lifts_fault() -> None:
    found = trace(lambda _, x: scan(Step, params=True)(name="m")(x), "params")
    assert [m.lift for m in found.missing] == [None]


# The watch itself ---------------------------------------------------------------------


def test_lifts_made_at_import_are_seen_by_every_watch() -> None:
    """Flax and JAX keep what they made of an `nn.jit`: here it is made anew."""

    def call(_: nn.Module, x: Any) -> Any:
        x, _ = SCANNED(name="s")(x)
        return JITTED(name="b")(JITTED(name="a")(x))

    for _ in range(3):
        found = crossed(trace(call))
        assert (("s", "block", "add"), ("scan:s", "split")) in found
        assert (("a", "add"), ("jit:a", "passed")) in found
        assert (("b", "add"), ("jit:b", "passed")) in found


def test_what_a_kept_jit_asks_for_is_missed_each_time() -> None:
    jitted = nn.jit(Block)
    for _ in range(2):
        found = trace(lambda _, x: jitted(name="j")(x), "params")
        assert ("noise", ("j", "add")) in {(m.stream, m.path) for m in found.missing}


def test_a_kept_jit_runs_outside_a_watch() -> None:
    jitted = nn.jit(Block)

    def call(_: nn.Module, x: Any) -> Any:
        return jitted(name="j")(x)

    x, rngs = (
        jnp.ones(X.shape),
        {"params": jax.random.key(0), "noise": jax.random.key(1)},
    )
    alone = Root(call).init_with_output(rngs, x)
    fresh = Root(lambda _, x: nn.jit(Block)(name="j")(x)).init_with_output(rngs, x)
    trace(call)
    again = Root(call).init_with_output(rngs, x)
    for other in (fresh, again):
        jax.tree.map(
            lambda a, b: (a == b).all() or pytest.fail("differs"), alone, other
        )


def test_pack_is_restored_after_an_exception() -> None:
    before = flax.core.lift.pack

    def fails(_: nn.Module, x: Any) -> Any:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        trace(vmap(fails, params=True))
    assert flax.core.lift.pack is before
    assert crossed(trace(draw)) == {((),)}


def test_a_lift_that_raised_is_no_longer_around() -> None:
    def fails(module: nn.Module, x: Any) -> Any:
        raise RuntimeError("mine")

    def call(module: nn.Module, x: Any) -> Any:
        with pytest.raises(RuntimeError, match="mine"):
            vmap(fails, params=True, noise=True)(module, x)
        return draw(module, x)

    assert crossed(trace(call)) == {((),)}


@pytest.mark.parametrize(
    ("lift", "names"),
    [
        (flax.core.lift.scan, {"rng_splits", "variable_out_axes"}),
        (flax.core.lift.vmap, {"rng_splits", "variable_out_axes"}),
        (flax.core.lift.jit, {"jitted"}),
    ],
)
def test_flax_has_what_is_read_from_its_closures(
    lift: Any, names: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails where a new Flax calls them otherwise: then nothing would be seen."""
    taken: list[Any] = []

    def pack(fn: Any, *args: Any, name: str, **rest: Any) -> Any:
        assert name == lift.__name__
        taken.append(inspect.getclosurevars(fn).nonlocals)

    monkeypatch.setattr(flax.core.lift, "pack", pack)
    options: dict[str, Any] = {"variable_axes": AXES, "split_rngs": {"params": True}}
    lift(lambda *_: None, **({} if lift is flax.core.lift.jit else options))
    (known,) = taken
    assert names <= set(known)
    if "rng_splits" in names:
        assert (known["rng_splits"], known["variable_out_axes"]) == ((True,), (0,))


def test_flax_has_the_splits_of_a_while_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []

    def pack(fn: Any, *args: Any, name: str) -> Any:
        taken.append((name, inspect.getclosurevars(fn).nonlocals["rng_splits"]))
        return lambda scope: None

    monkeypatch.setattr(flax.core.lift, "pack", pack)
    split = {"a": True, "b": False}
    flax.core.lift.while_loop(len, len, None, 0, split_rngs=split)  # type: ignore[arg-type]
    assert taken == [("while_loop", (True, False))]
