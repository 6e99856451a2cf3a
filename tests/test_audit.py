# SPDX-License-Identifier: Apache-2.0
"""What the audit lists, against the keys that the running program consumes.

The truth comes from an interpreter of the traced program that runs it for real,
equation by equation, and writes down each key that reaches a consumer.
"""

import contextlib
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core.scope import Scope
from jax.extend.core import ClosedJaxpr, Literal, primitives
from jax.interpreters.partial_eval import dce_jaxpr
from runner.models import MLP, Dropout, Noise, Variable

from runner.audit.trace import NOT_THERE, Draw, Missing, Trace, Use, trace_draws
from runner.keys import Op, derive_key, key_words

Words = tuple[int, ...]
SEEDS = {"params": 1, "dropout": 2, "noise": 3, "mask": 4}
X = jnp.linspace(-1.0, 1.0, 12).reshape(3, 4)


# The truth ------------------------------------------------------------------------


class Later:
    """A value that is computed when it is asked for, once."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make

    @functools.cached_property
    def value(self) -> Any:
        return self.make()


def now(value: Any) -> Later:
    return Later(lambda: value)


class Interpreter:
    """Runs a jaxpr with concrete values and records the keys that are consumed.

    Each consumer is reached, in the order of the program, as often as it runs. What
    no key and no branch depends on (nearly all of a model) is never computed.
    """

    def __init__(self) -> None:
        self.keys: list[Words] = []

    def run(self, closed: Any, args: list[Later]) -> list[Later]:
        jaxpr = closed.jaxpr if isinstance(closed, ClosedJaxpr) else closed
        consts = closed.consts if isinstance(closed, ClosedJaxpr) else []
        env = dict(zip(jaxpr.constvars, map(now, consts), strict=True))
        env |= dict(zip(jaxpr.invars, args, strict=True))

        def read(atom: Any) -> Later:
            return now(atom.val) if isinstance(atom, Literal) else env[atom]

        for eqn in jaxpr.eqns:
            outs = self.step(eqn, [read(v) for v in eqn.invars])
            env |= dict(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def step(self, eqn: Any, args: list[Later]) -> list[Later]:
        name, params = eqn.primitive.name, eqn.params
        if name in ("random_bits", "random_gamma"):
            words = np.asarray(jax.random.key_data(args[0].value))
            rows = words.reshape(-1, words.shape[-1]).tolist()
            self.keys += map(tuple, rows)
        if name == "scan":
            return self.scan(params, args)
        if name == "while":
            return self.loop(params, args)
        if name == "cond":
            return self.run(params["branches"][int(args[0].value)], args[1:])
        for inner in ("jaxpr", "call_jaxpr"):
            if inner in params:
                return self.run(params[inner], args)

        def bind() -> Any:
            given = eqn.primitive.get_bind_params(params)
            outs = eqn.primitive.bind(*(a.value for a in args), **given)
            return outs if eqn.primitive.multiple_results else [outs]

        outs = Later(bind)
        return [Later(lambda i=i: outs.value[i]) for i in range(len(eqn.outvars))]

    def scan(self, params: Any, args: list[Later]) -> list[Later]:
        n, c = params["num_consts"], params["num_carry"]
        consts, carry, xs = args[:n], args[n : n + c], args[n + c :]
        places = list(range(params["length"]))
        rows: list[Any] = [None] * len(places)
        for i in reversed(places) if params["reverse"] else places:
            at = [Later(lambda x=x, i=i: x.value[i]) for x in xs]
            outs = self.run(params["jaxpr"], [*consts, *carry, *at])
            carry, rows[i] = outs[:c], outs[c:]
        columns = zip(*rows, strict=True)
        stacks = (functools.partial(stack_rows, column) for column in columns)
        return [*carry, *map(Later, stacks)]

    def loop(self, params: Any, carry: list[Later]) -> list[Later]:
        n, m = params["cond_nconsts"], params["body_nconsts"]
        asked, given, carry = carry[:n], carry[n : n + m], carry[n + m :]
        while self.run(params["cond_jaxpr"], [*asked, *carry])[0].value:
            carry = self.run(params["body_jaxpr"], [*given, *carry])
        return carry


def stack_rows(column: Sequence[Later]) -> Any:
    return jnp.stack([row.value for row in column])


def consumed(closed: Any, *args: Any) -> Counter[Words]:
    """How often the running program consumes each key."""
    outs = [True] * len(closed.jaxpr.outvars)
    live, _ = dce_jaxpr(closed.jaxpr, outs, instantiate=True)  # as a compiler does
    env = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    consts = [env[v] for v in live.constvars]
    interpreter = Interpreter()
    given = list(map(now, jax.tree.leaves(args)))
    interpreter.run(ClosedJaxpr(live, consts), given)
    return Counter(interpreter.keys)


# What the audit says --------------------------------------------------------------


def make_rngs(*names: str, impl: str = "threefry2x32") -> dict[str, Any]:
    return {name: jax.random.key(SEEDS[name], impl=impl) for name in names}


def replayed(draw: Draw, rngs: dict[str, Any]) -> list[Words]:
    """The key of a draw at each index of its axes."""
    assert draw.stream is not None
    assert not draw.untraced
    start = rngs[draw.stream]
    names = [name for name, _ in draw.axes]
    keys = []
    for place in itertools.product(*(range(size) for _, size in draw.axes)):
        at: Any = dict(zip(names, place, strict=True))
        key = derive_key(draw.ops, impl="", start=start, coordinates=at)
        keys.append(tuple(key_words(key)))
    return keys


def places(trace: Trace) -> list[tuple[str | None, str, int | None]]:
    return sorted(
        {(d.stream, "/".join(d.path), d.call) for d in trace.draws if not d.untraced},
        key=str,
    )


def untraced(trace: Trace) -> set[str]:
    return {draw.untraced for draw in trace.draws if draw.untraced}


def check_truth(
    function: Any, rngs: Any, *args: Any, also: tuple[Any, ...] = ()
) -> Trace:
    """Compares each traced key with those consumed; every input takes its branch.

    Args:
        function: (rngs, *args) to anything.
        rngs: Concrete keys.
        args: Concrete arguments.
        also: Further tuples of arguments, for the other branches.
    """
    trace = trace_draws(function, rngs, *args)
    closed = jax.make_jaxpr(function)(rngs, *args)
    real: Counter[Words] = Counter()
    for given in (args, *also):
        real |= consumed(closed, rngs, *given)
    traced = Counter(
        k for d in trace.draws if not d.untraced for k in replayed(d, rngs)
    )
    wrong = set(traced) - set(real)
    assert not wrong, f"keys that the program never draws from: {wrong}"
    missed = set(real) - set(traced)
    assert bool(missed) <= bool(untraced(trace)), f"keys that no draw has: {missed}"
    # A loop draws more often from one key than it stands in the program.
    always = Counter(
        k
        for d in trace.draws
        if not d.untraced and not d.branches
        for k in replayed(d, rngs)
    )
    assert all(times <= real[key] for key, times in always.items())
    return trace


# Models ---------------------------------------------------------------------------


def model(function: Callable[..., Any]) -> type[nn.Module]:
    """A module whose call is `function(self, x)`."""

    @nn.compact
    def call(self: Any, x: Any) -> Any:
        return function(self, x)

    call.__name__ = "__call__"  # it stands in the name stack
    return type("Net", (nn.Module,), {"__call__": call, "__module__": __name__})


def drop(self: nn.Module, x: Any, name: str = "dropout") -> Any:
    keep = jax.random.bernoulli(self.make_rng(name), 0.5, x.shape)
    return jnp.where(keep, x, 0.0)


@model
def dense_dropout(self, x):
    x = nn.relu(nn.Dense(5)(x))
    return nn.Dense(2)(nn.Dropout(0.5)(x, deterministic=False))


@model
def several_calls(self, x):
    """One stream three times in one module, one of them unused."""
    first = drop(self, x)
    self.make_rng("dropout")
    return first + drop(self, x)


@model
def same_layer_twice(self, x):
    layer = nn.Dropout(0.5, deterministic=False)
    return layer(x) + layer(2 * x)


class Inner(nn.Module):
    """Names its parts itself, so that paths are not `Class_<i>` alone."""

    def setup(self):
        self.first = nn.Dense(4)
        self.masks = [nn.Dropout(0.5, deterministic=False) for _ in range(2)]

    def __call__(self, x):
        return self.masks[1](self.masks[0](self.first(x)))


@model
def nested(self, x):
    return Inner(name="b")(Inner(name="a")(x))


@model
def own_streams(self, x):
    """A parameter, and a variable that is initialised from a stream of its own."""
    init = nn.initializers.normal()
    w = self.param("w", init, (4,))
    mask = Variable((4,), "masks", init, "mask", name="sieve")
    return Noise(0.1)(x * w + mask(), deterministic=False)


@model
def raw_keys(self, x):
    """A `make_rng` key that the module splits, slices and folds by itself."""
    key = self.make_rng("noise")
    a, b = jax.random.split(key)
    many = jax.random.split(b, 5)
    c = jax.random.fold_in(many[1:4][2], 7)
    d = jax.random.fold_in(jax.random.clone(many[-1]), 2**32 - 1)
    return [jax.random.normal(k, (2,)) for k in (a, many[0], c, d)]


@model
def mapped_keys(self, x):
    """Keys of splits under vmap, one of them a split within a split."""
    key = self.make_rng("noise")
    keys = jax.random.split(key, 3)
    more = jax.vmap(lambda k: jax.random.split(k, 2))(keys)
    low = jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, 1)))(keys)
    return low, jax.vmap(jax.vmap(lambda k: jax.random.uniform(k, (2,))))(more)


class Block(nn.Module):
    """A block with the signature of a scan."""

    rate: float = 0.5

    @nn.compact
    def __call__(self, x, _=None):
        h = nn.Dense(x.shape[-1])(x)
        return x + nn.Dropout(self.rate, deterministic=False)(h), None


def scanned(length: int = 3, **changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "variable_axes": {"params": 0},
        "split_rngs": {"params": True, "dropout": True},
        "length": length,
    }
    return nn.scan(Block, **{**arguments, **changes})


@model
def scan(self, x):
    return scanned()(name="layers")(x, None)[0]


@model
def scan_reverse(self, x):
    return scanned(reverse=True, unroll=2)(name="layers")(x, None)[0]


@model
def scan_shared(self, x):
    """Dropout is not split: each layer draws from one key."""
    split = {"params": True, "dropout": False}
    return scanned(split_rngs=split)(name="layers")(x, None)[0]


@model
def two_scans(self, x):
    """Two scans of one block: within both, `Dropout_0` has one and the same hash."""
    x = scanned()(name="low")(x, None)[0]
    return scanned()(name="high")(x, None)[0]


@model
def vmapped(self, x):
    members = nn.vmap(
        Block,
        in_axes=None,
        axis_size=3,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
    )
    return members(name="members")(x)[0]


class Ensemble(nn.Module):
    """Members of a vmap; each scans over its layers."""

    @nn.compact
    def __call__(self, x):
        return scanned(2)(name="layers")(x, None)[0]


@model
def vmap_of_scan(self, x):
    members = nn.vmap(
        Ensemble,
        in_axes=None,
        axis_size=3,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
    )
    return members(name="members")(x)


@model
def remat(self, x):
    return nn.remat(Block)(name="b")(nn.remat(Block)(name="a")(x)[0])[0]


@model
def attention(self, x):
    layer = nn.MultiHeadDotProductAttention(2, dropout_rate=0.5, deterministic=False)
    return layer(x[None])


@model
def recurrent(self, x):
    return nn.RNN(nn.LSTMCell(3))(x[None])


@model
def batch_norm(self, x):
    x = nn.BatchNorm(use_running_average=False)(x)
    return nn.Dropout(0.5, deterministic=False)(x)


@model
def cond(self, x):
    """A key for both branches, and one branch that draws twice."""
    key = self.make_rng("noise")

    def twice(k: Any) -> Any:
        a, b = jax.random.split(k)
        return jax.random.normal(a) + jax.random.normal(b)

    return jax.lax.cond(x.sum() > 5.0, twice, jax.random.normal, key)


@model
def switch(self, x):
    key = self.make_rng("noise")
    at = (x.sum() > 5.0).astype(jnp.int32) + (x.sum() > 200.0).astype(jnp.int32)
    draws = [
        lambda k, n=n: jax.random.normal(jax.random.fold_in(k, n)) for n in range(3)
    ]
    return jax.lax.switch(at, draws, key)


@model
def scanned_keys(self, x):
    """`lax.scan` over the keys of a split, and over no key at all."""
    keys = jax.random.split(self.make_rng("noise"), 4)
    _, low = jax.lax.scan(lambda c, k: (c, jax.random.normal(k)), 0, keys)
    same = self.make_rng("noise")
    _, high = jax.lax.scan(lambda c, _: (c, jax.random.normal(same)), 0, length=3)
    return low, high, jax.lax.map(lambda k: jax.random.bits(k, (2,)), keys)


@jax.custom_vjp
def noisy(x: Any, key: Any) -> Any:
    return x + jax.random.normal(key, x.shape)


noisy.defvjp(lambda x, key: (noisy(x, key), None), lambda _, g: (g, None))


@jax.custom_jvp
def noisier(x: Any, key: Any) -> Any:
    return x + jax.random.uniform(key, x.shape)


noisier.defjvp(lambda p, t: (noisier(*p), t[0]))


@model
def custom_derivatives(self, x):
    return noisier(noisy(x, self.make_rng("noise")), self.make_rng("noise"))


@model
def samplers(self, x):
    """The samplers of `jax.random` that split or fold within."""
    key = self.make_rng("noise")
    at = iter(jax.random.split(key, 9))
    return (
        jax.random.permutation(next(at), 5),
        jax.random.categorical(next(at), x),
        jax.random.gamma(next(at), 2.0, (3,)),
        jax.random.choice(next(at), 5, (2,)),
        jax.random.choice(next(at), 5, (2,), replace=False),
        jax.random.randint(next(at), (3,), 0, 7),
        jax.random.truncated_normal(next(at), -1.0, 1.0, (3,)),
        jax.random.beta(next(at), 1.0, 2.0, (2,)),
        jax.random.dirichlet(next(at), jnp.ones(3)),
    )


TRACED = {
    "dense_dropout": (
        dense_dropout,
        {
            ("params", "Dense_0", 1),
            ("params", "Dense_1", 1),
            ("dropout", "Dropout_0", 1),
        },
    ),
    "several_calls": (several_calls, {("dropout", "", 1), ("dropout", "", 3)}),
    "same_layer_twice": (
        same_layer_twice,
        {("dropout", "Dropout_0", 1), ("dropout", "Dropout_0", 2)},
    ),
    "nested": (
        nested,
        {
            (stream, f"{block}/{name}", 1)
            for block in "ab"
            for stream, name in (
                ("params", "first"),
                ("dropout", "masks_0"),
                ("dropout", "masks_1"),
            )
        },
    ),
    "own_streams": (
        own_streams,
        {("params", "", 1), ("mask", "sieve", 1), ("noise", "Noise_0", 1)},
    ),
    "raw_keys": (raw_keys, {("noise", "", 1)}),
    "mapped_keys": (mapped_keys, {("noise", "", 1)}),
    "scan": (
        scan,
        {("params", "layers/Dense_0", 3), ("dropout", "layers/Dropout_0", 2)},
    ),
    "scan_reverse": (
        scan_reverse,
        {("params", "layers/Dense_0", 3), ("dropout", "layers/Dropout_0", 2)},
    ),
    "two_scans": (
        two_scans,
        {
            ("params", "low/Dense_0", 3),
            ("params", "high/Dense_0", 3),
            ("dropout", "low/Dropout_0", 2),
            ("dropout", "high/Dropout_0", 2),
        },
    ),
    "vmap": (
        vmapped,
        {("params", "members/Dense_0", 1), ("dropout", "members/Dropout_0", 1)},
    ),
    "vmap_of_scan": (
        vmap_of_scan,
        {
            ("params", "members/layers/Dense_0", 3),
            ("dropout", "members/layers/Dropout_0", 2),
        },
    ),
    "remat": (
        remat,
        {
            (stream, f"{block}/{name}", 1)
            for block in "ab"
            for stream, name in (("params", "Dense_0"), ("dropout", "Dropout_0"))
        },
    ),
    "attention": (
        attention,
        {
            ("dropout", "MultiHeadDotProductAttention_0", 1),
            *(
                ("params", f"MultiHeadDotProductAttention_0/{name}", 1)
                for name in ("query", "key", "value", "out")
            ),
        },
    ),
    "batch_norm": (batch_norm, {("dropout", "Dropout_0", 1)}),
    "cond": (cond, {("noise", "", 1)}),
    "switch": (switch, {("noise", "", 1)}),
    "scanned_keys": (scanned_keys, {("noise", "", 1), ("noise", "", 2)}),
    "custom_derivatives": (custom_derivatives, {("noise", "", 1), ("noise", "", 2)}),
    "samplers": (samplers, {("noise", "", 1)}),
}


@pytest.fixture(params=[True, False], ids=["separator", "no_separator"])
def separator(request: pytest.FixtureRequest) -> Iterator[bool]:
    with flax.config.temp_flip_flag("fix_rng_separator", request.param):
        yield request.param


def init_of(module: nn.Module) -> Any:
    return module.init_with_output


def zeros_of(module: nn.Module) -> Any:
    """Variables of the right shapes: no key depends on their values."""
    shapes = jax.eval_shape(module.init, make_rngs(*SEEDS), X)
    return jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)


def apply_of(module: nn.Module, variables: Any) -> Any:
    return lambda rngs, x: module.apply(
        variables, x, rngs=rngs, mutable=["batch_stats"]
    )


@pytest.mark.promotes  # Flax's attention and normalisation
@pytest.mark.usefixtures("separator")
@pytest.mark.parametrize("name", TRACED)
def test_every_key_and_place(name: str) -> None:
    """In `init` and in `apply`: all keys, each at its path and call."""
    make, expected = TRACED[name]
    module, rngs, also = make(), make_rngs(*SEEDS), ((X + 10.0,), (X + 90.0,))
    trace = check_truth(init_of(module), rngs, X, also=also)
    assert untraced(trace) == set()
    assert set(places(trace)) == expected
    assert trace.missing == ()

    variables = zeros_of(module)
    rngs = make_rngs("dropout", "noise")
    trace = check_truth(apply_of(module, variables), rngs, X, also=also)
    assert untraced(trace) == set()
    drawn = {place for place in expected if place[0] in rngs}
    # Where `init` takes a count for each parameter, `apply` takes none; but those
    # are counts of `params`, so the ones of other streams are the same.
    assert set(places(trace)) == drawn


@pytest.mark.usefixtures("separator")
def test_dead_draws_of_a_scan_are_not_listed() -> None:
    """Flax traces a scan's body twice; what it throws away is not drawn.

    A stream that is not split does not depend on the layer, so that the first pass
    puts its draw before the scan, where nothing reads it.
    """
    module, rngs = scan_shared(), make_rngs("params", "dropout")
    trace = check_truth(init_of(module), rngs, X)
    calls = [draw.call for draw in trace.draws if draw.stream == "dropout"]
    assert calls == [2]


def dead_at_the_top(rngs: Any, x: Any) -> Any:
    jax.random.bits(rngs["dropout"])
    return jax.random.bits(rngs["noise"])


def dead_in_jit(rngs: Any, x: Any) -> Any:
    def both(rngs: Any) -> Any:
        return {name: jax.random.bits(key) for name, key in rngs.items()}

    return jax.jit(both)(rngs)["noise"]


def dead_in_scan(rngs: Any, x: Any) -> Any:
    def body(carry: Any, _: Any) -> Any:
        low, high = carry
        low += jax.random.normal(rngs["noise"])
        return (low, high + jax.random.normal(rngs["dropout"])), None

    return jax.lax.scan(body, (0.0, 0.0), length=2)[0][0]


@pytest.mark.parametrize(
    "function", [dead_at_the_top, dead_in_jit, dead_in_scan], ids=lambda f: f.__name__
)
def test_dead_draws_are_not_listed(function: Any) -> None:
    """The compiled program does not draw what no output depends on."""
    trace = check_truth(function, make_rngs("dropout", "noise"), X)
    assert [draw.stream for draw in trace.draws] == ["noise"]


@pytest.mark.usefixtures("separator")
def test_shared_stream_of_a_scan() -> None:
    """Each layer draws from one key: there is no axis in its derivation."""
    trace = check_truth(init_of(scan_shared()), make_rngs("params", "dropout"), X)
    axes = {draw.stream: draw.axes for draw in trace.draws}
    assert axes["dropout"] == ()
    assert [size for _, size in axes["params"]] == [3]


@pytest.mark.promotes
@pytest.mark.usefixtures("separator")
def test_recurrent_cell() -> None:
    """Parameters of a cell that an RNN scans are all initialised once."""
    trace = check_truth(init_of(recurrent()), make_rngs("params"), X)
    assert untraced(trace) == set()
    gates = {f"{kind}{gate}" for kind in "hi" for gate in "figo"}
    assert {draw.path[-1] for draw in trace.draws} == gates
    assert {draw.stream for draw in trace.draws} == {"params"}


def test_counts_of_consumers() -> None:
    """As many draws as the program has consumers, also of one and the same key."""

    def function(rngs: Any) -> Any:
        key = rngs["noise"]
        return jax.random.bits(key), jax.random.normal(key, (2, 3))

    trace = trace_draws(function, make_rngs("noise"))
    assert [d.use for d in trace.draws] == [
        Use("random_bits", (), 32),
        Use("random_bits", (2, 3), 32),
    ]
    assert [d.ops for d in trace.draws] == [(), ()]
    assert [d.call for d in trace.draws] == [None, None]


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_bits_of_a_use(bits: int) -> None:
    def function(rngs: Any) -> Any:
        return jax.random.bits(rngs["noise"], (5,), f"uint{bits}")

    (draw,) = trace_draws(function, make_rngs("noise")).draws
    assert draw.use == Use("random_bits", (5,), bits)


def test_shape_of_a_use_is_per_key() -> None:
    """Under vmap the axis stands in `axes`, not in the shape."""

    def function(rngs: Any) -> Any:
        keys = jax.random.split(rngs["noise"], 4)
        low = jax.vmap(lambda k: jax.random.bits(k, (2,)))(keys)
        return low, jax.vmap(lambda k: jax.random.gamma(k, 2.0, (3,)))(keys)

    bits, gamma = trace_draws(function, make_rngs("noise")).draws
    assert [size for _, size in bits.axes] == [4]
    assert bits.use == Use("random_bits", (2,), 32)
    assert [size for _, size in gamma.axes] == [4]
    assert gamma.use == Use("random_gamma", (3,), 32)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_impls(impl: str) -> None:
    rngs = make_rngs("params", "dropout", impl=impl)
    module = dense_dropout()
    trace = check_truth(init_of(module), rngs, X)
    assert untraced(trace) == set()
    assert len(places(trace)) == 3


def test_without_partitionable() -> None:
    """Splits and bits have other values, and the same replay."""
    with jax.threefry_partitionable(False):
        jax.clear_caches()
        trace = check_truth(init_of(raw_keys()), make_rngs("params", "noise"), X)
    jax.clear_caches()
    assert untraced(trace) == set()
    assert len(trace.draws) == 4


# What can't be followed -----------------------------------------------------------


def while_carry(rngs: Any, x: Any) -> Any:
    def body(carry: Any) -> Any:
        i, key, total = carry
        key, now = jax.random.split(key)
        return i + 1, key, total + jax.random.normal(now)

    carry = (0, rngs["noise"], 0.0)
    return jax.lax.while_loop(lambda c: c[0] < 3, body, carry)[2]


def while_condition(rngs: Any, x: Any) -> Any:
    def unlucky(carry: Any) -> Any:
        return jax.random.uniform(jax.random.fold_in(rngs["noise"], carry)) > 0.3

    return jax.lax.while_loop(unlucky, lambda i: i + 1, 0)


def fori_fold(rngs: Any, x: Any) -> Any:
    def body(i: Any, total: Any) -> Any:
        return total + jax.random.normal(jax.random.fold_in(rngs["noise"], i))

    return jax.lax.fori_loop(0, 3, body, 0.0)


def scan_carry(rngs: Any, x: Any) -> Any:
    def body(key: Any, _: Any) -> Any:
        key, now = jax.random.split(key)
        return key, jax.random.normal(now)

    key, out = jax.lax.scan(body, rngs["noise"], length=3)
    return out, jax.random.normal(key)


def scan_output(rngs: Any, x: Any) -> Any:
    keys = jax.random.split(rngs["noise"], 3)
    _, out = jax.lax.scan(lambda c, k: (c, jax.random.fold_in(k, 1)), 0, keys)
    return jax.random.normal(out[0])


def traced_fold(rngs: Any, x: Any) -> Any:
    key = jax.random.fold_in(rngs["noise"], (x.sum() * 10).astype(jnp.int32))
    return jax.random.normal(key)


def traced_index(rngs: Any, x: Any) -> Any:
    keys = jax.random.split(rngs["noise"], 4)
    return jax.random.normal(keys[jnp.argmax(x[0])])


def where_of_keys(rngs: Any, x: Any) -> Any:
    key = jnp.where(x.sum() > 0, rngs["noise"], rngs["dropout"])
    return jax.random.normal(key)


def concatenated(rngs: Any, x: Any) -> Any:
    keys = jnp.concatenate([jax.random.split(rngs[n]) for n in ("noise", "dropout")])
    return jax.random.normal(keys[2])


def stacked(rngs: Any, x: Any) -> Any:
    keys = jnp.stack([rngs["dropout"], rngs["noise"]])
    return jax.vmap(jax.random.normal)(keys)


def reversed_keys(rngs: Any, x: Any) -> Any:
    return jax.random.normal(jax.random.split(rngs["noise"], 3)[::-1][0])


def strided_keys(rngs: Any, x: Any) -> Any:
    return jax.random.normal(jax.random.split(rngs["noise"], 5)[::2][1])


def reshaped_keys(rngs: Any, x: Any) -> Any:
    return jax.random.normal(jax.random.split(rngs["noise"], 4).reshape(2, 2)[1, 0])


def split_shape(rngs: Any, x: Any) -> Any:
    return jax.random.normal(jax.random.split(rngs["noise"], (2, 3))[1, 2])


def transposed_keys(rngs: Any, x: Any) -> Any:
    keys = jax.vmap(lambda k: jax.random.split(k, 2))(
        jax.random.split(rngs["noise"], 3)
    )
    return jax.random.normal(keys.T[1, 0])


def part_of_split(rngs: Any, x: Any) -> Any:
    return jax.vmap(jax.random.normal)(jax.random.split(rngs["noise"], 4)[1:])


def head_of_split(rngs: Any, x: Any) -> Any:
    return jax.vmap(jax.random.normal)(jax.random.split(rngs["noise"], 4)[:3])


def word_of_key(rngs: Any, x: Any) -> Any:
    """A word of the key's data, as an integer seed."""
    return jax.random.normal(jax.random.key(jax.random.key_data(rngs["noise"])[0]))


def words_of_split(rngs: Any, x: Any) -> Any:
    """Data of split keys, sliced as words."""
    words = jax.random.key_data(jax.random.split(rngs["noise"], 3))
    return jax.random.normal(jax.random.wrap_key_data(words[2]))


def swapped_words(rngs: Any, x: Any) -> Any:
    words = jax.random.key_data(rngs["noise"])
    return jax.random.normal(jax.random.wrap_key_data(words[::-1]))


def drawn_key(rngs: Any, x: Any) -> Any:
    """A key made of random bits."""
    words = jax.random.bits(rngs["noise"], (2,))
    return jax.random.normal(jax.random.wrap_key_data(words))


def constant_key(rngs: Any, x: Any) -> Any:
    return jax.random.normal(jax.random.key(5))


CONSTANT = jax.random.key(6)


def closed_over_key(rngs: Any, x: Any) -> Any:
    return jax.random.normal(jax.random.fold_in(CONSTANT, 3))


def cond_of_streams(rngs: Any, x: Any) -> Any:
    key = jax.lax.cond(x.sum() > 5.0, lambda: rngs["noise"], lambda: rngs["dropout"])
    return jax.random.normal(key)


def cond_of_folds(rngs: Any, x: Any) -> Any:
    folds = [lambda k, n=n: jax.random.fold_in(k, n) for n in range(2)]
    return jax.random.normal(jax.lax.cond(x.sum() > 5.0, *folds, rngs["noise"]))


def cond_with_constant(rngs: Any, x: Any) -> Any:
    """One branch hands on a stream's key, the other a constant one."""
    key = jax.lax.cond(x.sum() > 5.0, lambda k: CONSTANT, lambda k: k, rngs["noise"])
    return jax.random.normal(key)


def cond_with_drawn(rngs: Any, x: Any) -> Any:
    """One branch hands on a stream's key, the other one made of random bits."""

    def made(key: Any) -> Any:
        return jax.random.wrap_key_data(jax.random.bits(key, (2,)))

    key = jax.lax.cond(x.sum() > 5.0, made, lambda k: k, rngs["noise"])
    return jax.random.normal(key)


def scan_of_constant(rngs: Any, x: Any) -> Any:
    """A carry that starts as a constant and becomes a stream's key."""

    def body(key: Any, _: Any) -> Any:
        return rngs["noise"], jax.random.normal(key)

    key, out = jax.lax.scan(body, CONSTANT, length=2)
    return out, jax.random.normal(key)


def poisson(rngs: Any, x: Any) -> Any:
    return jax.random.poisson(rngs["noise"], 3.0, (4,))


def mapped_fold(rngs: Any, x: Any) -> Any:
    """One key folded with a number for each row."""

    def one(n: Any) -> Any:
        return jax.random.normal(jax.random.fold_in(rngs["noise"], n))

    return jax.vmap(one)(jnp.arange(3))


UNTRACED = [
    (while_condition, "in a while loop of unknown length"),
    (traced_fold, "folded with a number that the program computes"),
    (traced_index, "passed through dynamic_slice: with what the program computes"),
    (swapped_words, "its words are wrapped in another order"),
    (drawn_key, "another draw's output"),
    (constant_key, "a constant in the model: key(5)"),
    (closed_over_key, "a key array closed over"),
    (cond_with_constant, "a key array closed over"),
    (cond_with_drawn, "another draw's output"),
    (scan_of_constant, "a key array closed over"),
    (poisson, "carried through a while loop of unknown length"),
]


@pytest.mark.parametrize(
    ("function", "why"), UNTRACED, ids=lambda v: getattr(v, "__name__", "")
)
def test_untraced_is_said(function: Any, why: str) -> None:
    """Never a wrong key: `ops` is empty and `untraced` says why."""
    rngs = make_rngs("dropout", "noise")
    trace = check_truth(function, rngs, X, also=((X + 10.0,),))
    lost = [draw for draw in trace.draws if draw.untraced]
    assert lost
    assert all(draw.ops == () and draw.axes == () for draw in lost)
    assert any(why in draw.untraced for draw in lost)


@pytest.mark.parametrize(
    "function",
    [
        concatenated,
        cond_of_folds,
        cond_of_streams,
        fori_fold,
        head_of_split,
        mapped_fold,
        part_of_split,
        reshaped_keys,
        reversed_keys,
        scan_carry,
        scan_output,
        split_shape,
        stacked,
        strided_keys,
        transposed_keys,
        where_of_keys,
        while_carry,
        words_of_split,
    ],
    ids=lambda f: f.__name__,
)
def test_what_is_done_to_key_arrays(function: Any) -> None:
    """Moved, computed with counters, carried, chosen: every key is followed."""
    rngs, also = make_rngs("dropout", "noise"), ((X + 10.0,), (X - 10.0,))
    trace = check_truth(function, rngs, X, also=also)
    assert untraced(trace) == set()


def test_words_as_a_seed() -> None:
    """A number made of a key's words is no key of its stream any more."""
    trace = check_truth(word_of_key, make_rngs("noise"), X)
    assert untraced(trace) == {"a seed that the program computes"}


@pytest.mark.parametrize("function", [where_of_keys, cond_of_streams])
def test_a_key_of_either_stream_is_two_draws(function: Any) -> None:
    """One of each, and only one of them is made."""
    trace = trace_draws(function, make_rngs("dropout", "noise"), X)
    assert sorted(draw.stream or "" for draw in trace.draws) == ["dropout", "noise"]
    (first,), (second,) = (draw.branches for draw in trace.draws)
    assert (first[0], first[1]) != (second[0], second[1])
    assert first[0] == second[0]


def test_key_of_another_impl() -> None:
    """Words of one implementation, wrapped as another's, split otherwise."""
    rngs = make_rngs("noise", impl="rbg")

    def function(rngs: Any) -> Any:
        words = jax.random.key_data(rngs["noise"])
        key = jax.random.wrap_key_data(words, impl="unsafe_rbg")
        return jax.random.bits(jax.random.split(key)[1])

    check_truth(function, rngs)


def generate_bits(rngs: Any) -> Any:
    words = jax.random.key_data(rngs["noise"])
    return jax.lax.rng_bit_generator(jnp.concatenate([words, words]), (3,))[1]


def hash_words(rngs: Any) -> Any:
    words = jax.random.key_data(rngs["noise"])
    count = jnp.arange(4, dtype=jnp.uint32)
    outs = primitives.threefry2x32_p.bind(
        *(jnp.broadcast_to(w, 4) for w in words), count, count
    )
    return outs[0]


@pytest.mark.parametrize("function", [generate_bits, hash_words])
def test_low_level_draws_are_listed(function: Any) -> None:
    """A draw below `jax.random` is a draw, too: followed if it is given whole keys."""
    (draw,) = trace_draws(function, make_rngs("noise")).draws
    doubled = "drawn by rng_bit_generator itself"
    assert draw.untraced == (doubled if function is generate_bits else "")
    assert draw.stream == "noise"


def test_shard_map() -> None:
    """Each shard draws from its own children of a split: all of them, or untraced."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")

    def function(rngs: Any) -> Any:
        keys = jax.random.split(rngs["noise"], 4)

        def shard(keys: Any) -> Any:
            return jax.random.uniform(keys[0])[None]

        return jax.shard_map(shard, mesh=mesh, in_specs=spec, out_specs=spec)(keys)

    rngs = make_rngs("noise")
    (draw,) = trace_draws(function, rngs).draws
    keys = jax.random.split(rngs["noise"], 4)
    truth = {tuple(key_words(keys[0])), tuple(key_words(keys[2]))}
    assert draw.untraced or set(replayed(draw, rngs)) == truth


# `make_rng`, watched --------------------------------------------------------------


@pytest.mark.usefixtures("separator")
def test_missing_streams_are_reported() -> None:
    """With `params` to fall back to, the draw is of `params`, at its own count."""
    module = dense_dropout()
    rngs = make_rngs("params")
    trace = check_truth(init_of(module), rngs, X)
    assert trace.missing == (Missing("dropout", ("Dropout_0",), substituted=True),)
    assert ("params", "Dropout_0", 1) in places(trace)
    assert untraced(trace) == set()


def test_missing_stream_moves_the_count_of_params() -> None:
    @model
    def mixed(self, x):
        x = drop(self, x) + drop(self, x, "noise")
        return x * self.param("w", nn.initializers.normal(), (4,))

    trace = check_truth(init_of(mixed()), make_rngs("params"), X)
    names = [(m.stream, m.path, m.substituted) for m in trace.missing]
    assert names == [("dropout", (), True), ("noise", (), True)]
    assert places(trace) == [("params", "", n) for n in (1, 2, 3)]


def test_missing_without_fallback() -> None:
    """Flax raises; with a spare key the trace goes on, and says what was missing."""
    module = dense_dropout()
    variables = zeros_of(module)
    function, rngs = apply_of(module, variables), make_rngs("noise")
    with pytest.raises(flax.errors.InvalidRngError):
        trace_draws(function, rngs, X)
    trace = trace_draws(function, rngs, X, spare=rngs["noise"])
    assert trace.missing == (Missing("dropout", ("Dropout_0",)),)
    (draw,) = trace.draws
    assert (draw.stream, draw.untraced) == (None, NOT_THERE)


@pytest.mark.parametrize("fails", [False, True])
def test_make_rng_is_put_back(fails: bool) -> None:
    before = Scope.make_rng
    with contextlib.suppress(ZeroDivisionError):
        trace_draws(lambda rngs: 1 // (0 if fails else 1), {})
    assert Scope.make_rng is before


def test_two_traces_are_equal() -> None:
    module, rngs = vmap_of_scan(), make_rngs("params", "dropout")
    first, second = (trace_draws(init_of(module), rngs, X) for _ in range(2))
    assert first.draws == second.draws
    assert first.primitives == second.primitives


def test_abstract_keys_give_the_same_trace() -> None:
    module, rngs = dense_dropout(), make_rngs("params", "dropout")
    shapes = jax.eval_shape(lambda: rngs)
    x = jax.ShapeDtypeStruct(X.shape, X.dtype)
    abstract = trace_draws(init_of(module), shapes, x)
    assert abstract.draws == trace_draws(init_of(module), rngs, X).draws
    out, _ = abstract.outputs
    assert out.shape == (3, 2)


def test_a_hash_with_two_paths() -> None:
    """Without the separator ('ab', 'c') and ('a', 'bc') fold one number."""

    class Leaf(nn.Module):
        @nn.compact
        def __call__(self, x):
            return drop(self, x)

    class Branch(nn.Module):
        leaf: str

        @nn.compact
        def __call__(self, x):
            return Leaf(name=self.leaf)(x)

    @model
    def colliding(self, x):
        return Branch("c", name="ab")(x) + Branch("bc", name="a")(x)

    rngs = make_rngs("dropout")
    with flax.config.temp_flip_flag("fix_rng_separator", False):
        trace = check_truth(apply_of(colliding(), {}), rngs, X)
    assert places(trace) == [("dropout", "a/bc", 1), ("dropout", "ab/c", 1)]
    low, high = (replayed(draw, rngs) for draw in trace.draws)
    assert low == high
    with flax.config.temp_flip_flag("fix_rng_separator", True):
        trace = check_truth(apply_of(colliding(), {}), rngs, X)
    low, high = (replayed(draw, rngs) for draw in trace.draws)
    assert low != high


@pytest.mark.usefixtures("separator")
@pytest.mark.parametrize("wrap", [nn.jit, nn.remat])
def test_two_of_one_class(wrap: Any) -> None:
    """Blocks of one class, whose traced body JAX may share, have paths of their own."""

    @model
    def twins(self, x):
        block = wrap(Block)
        return block(name="high")(block(name="low")(x)[0])[0]

    trace = check_truth(init_of(twins()), make_rngs("params", "dropout"), X)
    assert untraced(trace) == set()
    paths = {(draw.stream, "/".join(draw.path)) for draw in trace.draws}
    assert paths == {
        (stream, f"{block}/{name}")
        for block in ("low", "high")
        for stream, name in (("params", "Dense_0"), ("dropout", "Dropout_0"))
    }


def test_method_and_scope_names_are_no_modules() -> None:
    """`named_scope` and methods stand in the name stack; a path has modules alone."""

    class Coder(nn.Module):
        def setup(self):
            self.dense = nn.Dense(4)

        def encode(self, x):
            with jax.named_scope("masking"):
                return drop(self, self.dense(x))

    @model
    def coded(self, x):
        return Coder(name="coder").encode(x)

    trace = check_truth(init_of(coded()), make_rngs("params", "dropout"), X)
    assert set(places(trace)) == {
        ("params", "coder/dense", 1),
        ("dropout", "coder", 1),
    }


def test_a_draw_outside_make_rng_has_no_call() -> None:
    @model
    def given(self, x):
        return Dropout(0.5, name="mask")(x, deterministic=False, rng=CONSTANT)

    (draw,) = trace_draws(apply_of(given(), {}), make_rngs("noise"), X).draws
    assert (draw.stream, draw.call, draw.path) == (None, None, ("mask",))
    assert draw.untraced


def test_why_names_the_place() -> None:
    trace = trace_draws(apply_of(nested(), zeros_of(nested())), make_rngs("dropout"), X)
    assert trace.draws[0].ops[-1].why == "path a/masks_0 call 1"
    trace = trace_draws(apply_of(several_calls(), {}), make_rngs("dropout"), X)
    assert trace.draws[1].ops[-1].why == "path (root) call 3"


def test_axes_have_names_of_their_own() -> None:
    """Scans carry the path they stand at, and no two axes share a name."""
    rngs = make_rngs("params", "dropout")
    trace = trace_draws(init_of(vmap_of_scan()), rngs, X)
    for draw in trace.draws:
        names = [name for name, _ in draw.axes]
        assert len(set(names)) == len(names) == 2
        assert sorted(size for _, size in draw.axes) == [2, 3]
    trace = trace_draws(init_of(two_scans()), rngs, X)
    names_of = {draw.path[0]: draw.axes[0][0] for draw in trace.draws}
    assert names_of == {"low": "scan:low", "high": "scan:high"}


def test_primitives_are_those_of_the_program() -> None:
    trace = trace_draws(init_of(scan()), make_rngs("params", "dropout"), X)
    assert {"scan", "random_bits", "dot_general"} <= trace.primitives
    assert "conv_general_dilated" not in trace.primitives


def test_traced_rates_change_no_key() -> None:
    """A rate that is an input of the program draws what a number draws."""

    def apply(rngs: Any, x: Any, rate: Any) -> Any:
        module = MLP((4,), 2, dropout_rate=rate)
        return module.init_with_output(rngs, x)

    rngs = make_rngs("params", "dropout")
    traced = check_truth(apply, rngs, X, jnp.float32(0.5))
    fixed = trace_draws(lambda r, x: apply(r, x, 0.5), rngs, X)
    assert traced.draws == fixed.draws


def test_records_are_values() -> None:
    draw = Draw(
        "noise", (Op("split", of=2),), ("a",), 1, (), Use("random_bits", (), 32)
    )
    assert draw == Draw(**vars(draw))
    assert hash(draw) == hash(Draw(**vars(draw)))
