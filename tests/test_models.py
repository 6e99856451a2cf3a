# SPDX-License-Identifier: Apache-2.0
"""`runner.models` against Flax and against the same modules by hand, in bits."""

import functools
import importlib
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import config, errors, traverse_util
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.extend.core import jaxprs_in_params
from runner.models import (
    CNN,
    MLP,
    Branches,
    Compact,
    Declare,
    Dropout,
    Identity,
    Keys,
    Noise,
    RandomInteger,
    ResidualMLPBlock,
    Sequential,
    Variable,
)

RATES = (0.0, 0.1, 0.3, 0.5, 0.9, 1.0)
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
KEYS = {"params": 1, "dropout": 2, "noise": 3}


def rngs(*streams: str) -> dict[str, jax.Array]:
    return {name: jax.random.key(KEYS[name]) for name in streams or KEYS}


def values(*shape: int, dtype: Any = jnp.float32, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def to_bits(tree: Any) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path): (str(x.dtype), x.shape, np.asarray(x).tobytes())
        for path, x in leaves
    }


def assert_same(ours: Any, theirs: Any) -> None:
    """Same paths, shapes, dtypes, bytes."""
    ours, theirs = to_bits(ours), to_bits(theirs)
    assert ours.keys() == theirs.keys()
    assert not [path for path in ours if ours[path] != theirs[path]]


def paths(variables: Any) -> set[str]:
    return set(traverse_util.flatten_dict(dict(variables), sep="/"))


def draws(function: Callable[..., Any], *args: Any) -> list[str]:
    """The draws and key derivations in the traced program, in order."""

    def walk(jaxpr: Any) -> list[str]:
        found = []
        for eqn in jaxpr.eqns:
            if eqn.primitive.name in ("random_bits", "random_fold_in"):
                found.append(f"{eqn.primitive.name} {eqn.params} {eqn.invars[1:]}")
            for inner in jaxprs_in_params(eqn.params):
                found += walk(inner)
        return found

    return walk(jax.make_jaxpr(function)(*args).jaxpr)


def drop(layer: nn.Module, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Output of a dropout layer, and the gradient of its input."""

    def run(x):
        return layer.apply({}, x, deterministic=False, rngs=rngs("dropout"))

    y, vjp = jax.vjp(run, x)
    return y, vjp(values(*y.shape, dtype=y.dtype, seed=1))[0]


@functools.cache
def drop_jit(kind: Any, rates: tuple[float, ...], dtype: Any) -> Any:
    """The same for (40, 50) inputs in one program, with the rates baked in."""

    @jax.jit
    def run(x):
        return [drop(kind(rate), x) for rate in rates]

    return dict(zip(rates, run(values(40, 50, dtype=dtype)), strict=True))


def round_to_float32(rates: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(float(np.float32(rate)) for rate in rates)


# --- Dropout


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "broadcast_dims"),
    [((), ()), ((0, 3), ()), ((57,), ()), ((9, 8), (0,)), ((5, 4, 3), (0, -1))],
)
def test_dropout_eager(rate, dtype, shape, broadcast_dims):
    x = values(*shape, dtype=dtype)
    ours = Dropout(rate, broadcast_dims=broadcast_dims)
    theirs = nn.Dropout(rate, broadcast_dims=broadcast_dims)
    assert_same(drop(ours, x), drop(theirs, x))


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_jit(rate, dtype):
    ours, theirs = (drop_jit(kind, RATES, dtype) for kind in (Dropout, nn.Dropout))
    assert_same(ours[rate], theirs[rate])


@jax.jit
def traced(x, rate):
    return drop(Dropout(rate), x)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_traced_rate(rate, dtype):
    # An array holds the rate as float32: Flax is given just that number.
    theirs = drop_jit(nn.Dropout, round_to_float32(RATES), dtype)
    theirs = theirs[float(np.float32(rate))]
    x = values(40, 50, dtype=dtype)
    for given_rate in (rate, jnp.float32(rate)):  # weakly and strongly typed
        assert_same(traced(x, given_rate), theirs)
    assert_same(drop(Dropout(jnp.float32(rate)), x), theirs)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_dropout_lanes(dtype):
    alone = drop_jit(nn.Dropout, round_to_float32(RATES), dtype).values()
    stacked = jax.tree.map(lambda *lanes: np.stack(lanes), *jax.device_get([*alone]))
    x, rates = values(40, 50, dtype=dtype), jnp.array(RATES)
    assert_same(jax.jit(jax.vmap(traced, (None, 0)))(x, rates), stacked)
    mapped = jax.jit(lambda x, rates: lax.map(lambda rate: traced(x, rate), rates))
    assert_same(mapped(x, rates), stacked)


@settings(max_examples=50, deadline=None)
@given(rate=st.floats(0, 1))
def test_dropout_any_rate(rate):
    x = values(11, 7)
    assert_same(drop(Dropout(rate), x), drop(nn.Dropout(rate), x))


@settings(max_examples=50, deadline=None)
@given(rate=st.floats(0, 1))
def test_dropout_any_traced_rate(rate):
    x, theirs = values(11, 7), nn.Dropout(float(np.float32(rate)), deterministic=False)
    assert_same(traced(x, rate)[0], theirs.apply({}, x, rngs=rngs("dropout")))
    assert abs((1 - np.float32(rate)) - np.float32(1 - rate)) <= 2**-24


@settings(max_examples=6, deadline=None)
@given(rate=st.floats(0, 1, width=32))
def test_dropout_any_traced_rate_gradient(rate):
    x = values(11, 7)
    theirs = jax.jit(functools.partial(drop, nn.Dropout(rate)))(x)
    assert_same(traced(x, rate), theirs)


SURVIVE = (0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 0.75)
DO_NOT = (0.6, 0.8, 0.9)


@pytest.mark.parametrize("rate", SURVIVE + DO_NOT)
def test_dropout_rates_that_survive_tracing(rate):
    theirs = drop_jit(nn.Dropout, SURVIVE + DO_NOT, jnp.float32)[rate]
    ours = traced(values(40, 50), rate)
    assert (to_bits(ours) == to_bits(theirs)) == (rate in SURVIVE)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), ours, theirs)


@pytest.mark.parametrize("as_array", [False, True])
@pytest.mark.parametrize("rate", [0, 1, 0.5])
def test_dropout_makes_no_nan(rate, as_array):
    x = jnp.array([0.0, -0.0, 3e38, -3e38, 1e-37, 1.0])
    layer = Dropout(jnp.float32(rate)) if as_array else Dropout(rate)
    with jax.debug_nans(True):
        y, grad = drop(layer, x)
        jitted = jax.jit(functools.partial(drop, layer))(x)
    assert np.isfinite([grad, jitted[1]]).all()
    if rate in (0, 1):
        assert_same((y, grad), drop(nn.Dropout(rate), x))


def test_dropout_of_everything_drops_nan_and_infinity():
    x = jnp.array([jnp.nan, jnp.inf, -jnp.inf])
    for rate in (1, jnp.float32(1)):
        assert_same(drop(Dropout(rate), x), drop(nn.Dropout(1.0), x))


def test_dropout_subnormal_inputs():
    x = jnp.array([1e-40, 1.0])
    assert_same(drop(Dropout(0.0), x), drop(nn.Dropout(0.0), x))
    assert drop(Dropout(jnp.float32(0)), x)[0].tolist() == [0.0, 1.0]  # as documented


@pytest.mark.parametrize(
    "rate", [0, 1, np.float32(0.3), np.float64(0.3), np.array(0.3)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_number_types(rate, dtype):
    x = values(20, dtype=dtype)
    assert_same(drop(Dropout(rate), x), drop(nn.Dropout(float(rate)), x))


@pytest.mark.parametrize("rate_dtype", [*DTYPES, float])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_array_types(rate_dtype, dtype):
    # 0.3125 is the same number in every dtype.
    theirs = drop_jit(nn.Dropout, (0.3125,), dtype)[0.3125]
    ours = drop(Dropout(jnp.asarray(0.3125, rate_dtype)), values(40, 50, dtype=dtype))
    assert_same(ours, theirs)


def test_dropout_with_64_bits():
    with jax.enable_x64(True):
        dtype = jnp.float64
        theirs = drop_jit(nn.Dropout, (0.9,), dtype)
        assert_same(drop_jit(Dropout, (0.9,), dtype), theirs)
        assert_same({0.9: jax.jit(traced)(values(40, 50, dtype=dtype), 0.9)}, theirs)


@pytest.mark.parametrize("rate", [*RATES, "traced"])
def test_dropout_draws_whatever_the_rate(rate):
    def loss(x, traced_rate):
        layer = Dropout(traced_rate if rate == "traced" else rate)
        return jnp.sin(drop(layer, x)[0]).sum()

    x, half = values(4), jnp.float32(0.5)
    reference = draws(lambda x: drop(nn.Dropout(0.5), x), x)
    assert len([draw for draw in reference if draw.startswith("random_bits")]) == 1
    assert draws(loss, x, half) == reference
    assert draws(jax.jit(jax.grad(loss)), x, half) == reference
    # Also where a partial evaluation removes what is not used.
    assert set(draws(jax.grad(jax.checkpoint(loss)), x, half)) == set(reference)


@pytest.mark.parametrize("rate", [*RATES, jnp.float32(0.5)])
def test_dropout_deterministic(rate):
    x = values(4)
    assert_same(Dropout(rate, deterministic=True).apply({}, x), x)
    assert_same(Dropout(rate).apply({}, x, deterministic=True), x)
    assert not draws(lambda x: Dropout(rate).apply({}, x, deterministic=True), x)


def test_dropout_deterministic_is_set_once():
    with pytest.raises(ValueError, match="deterministic"):
        Dropout(0.5).apply({}, values(4), rngs=rngs())
    with pytest.raises(ValueError, match="deterministic"):
        Dropout(0.5, deterministic=True).apply({}, values(4), deterministic=True)


@pytest.mark.parametrize("rate", [-0.1, 1.5, math.nan, math.inf])
def test_dropout_refuses_what_is_no_probability(rate):
    with pytest.raises(ValueError, match=r"rate: not a probability \(got .+\)"):
        Dropout(rate).apply({}, values(4), deterministic=False, rngs=rngs())


def test_dropout_needs_its_stream():
    with pytest.raises(errors.InvalidRngError, match="dropout"):
        Dropout(0.0).apply({}, values(4), deterministic=False)


def test_dropout_stream_and_key():
    x = values(30)
    ours, theirs = (
        kind(0.5, rng_collection="noise", deterministic=False)
        for kind in (Dropout, nn.Dropout)
    )
    assert_same(ours.apply({}, x, rngs=rngs()), theirs.apply({}, x, rngs=rngs()))
    key = jax.random.key(9)
    assert_same(ours.apply({}, x, rng=key), theirs.apply({}, x, rng=key))


class Nest(nn.Module):
    """Dropout at many paths; `kind` is ours or Flax's."""

    kind: Any
    rate: Any

    @nn.compact
    def __call__(self, x):
        drop = functools.partial(self.kind, self.rate, deterministic=False)
        twice = drop()
        x = twice(twice(x))
        x = drop(name="named")(x)
        x = nn.Dense(8)(drop()(x))
        x = nn.Sequential([nn.Dense(8), drop(), Inner(self.kind, self.rate)])(x)
        scan = nn.scan(
            Carry,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=3,
        )
        x, _ = scan(self.kind, self.rate)(x, None)
        x = nn.remat(Inner)(self.kind, self.rate)(x)
        return nn.vmap(
            Inner,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
        )(self.kind, self.rate)(x)


class Inner(nn.Module):
    kind: Any
    rate: Any

    @nn.compact
    def __call__(self, x):
        return self.kind(self.rate, deterministic=False)(nn.Dense(8)(x))


class Carry(Inner):
    @nn.compact
    def __call__(self, x, _):
        return self.kind(self.rate, deterministic=False)(nn.Dense(8)(x)), None


def test_dropout_at_any_path():
    def run(kind, rate, x):
        return Nest(kind, rate).init_with_output(rngs("params", "dropout"), x)

    x, rate = values(6, 8), jnp.float32(0.3)
    # One program, not only one result: for rates that Flax does not special-case.
    ours, theirs = (
        str(jax.make_jaxpr(functools.partial(run, kind, 0.3))(x))
        for kind in (Dropout, nn.Dropout)
    )
    assert ours == theirs
    by_hand = draws(functools.partial(run, nn.Dropout, 0.3), x)
    assert draws(functools.partial(run, Dropout), rate, x) == by_hand


# --- Sequential


class Two(nn.Module):
    """Returns two values, as a tuple or as a dict for `Add`."""

    as_dict: bool = False

    @nn.compact
    def __call__(self, x):
        a, b = nn.Dense(4)(x), nn.Dense(4)(x)
        return {"b": b, "a": a} if self.as_dict else (a, b)


class Add(nn.Module):
    @nn.compact
    def __call__(self, a, b):
        return nn.Dense(3)(a) + b[..., :3]


LAYERS = {
    "dense": lambda: [nn.Dense(4)],
    "activation": lambda: [nn.Dense(4), nn.relu, nn.Dense(3), jnp.tanh],
    "named": lambda: [nn.Dense(4, name="first"), nn.gelu, nn.Dense(4), nn.Dense(2)],
    "tuple": lambda: [Two(), Add()],
    "dict": lambda: [Two(as_dict=True), Add()],
    "nested": lambda: [nn.Dense(4), nn.Sequential([nn.Dense(3), nn.relu])],
    "inline": lambda: [nn.Dense(4), lambda x: nn.Dense(x.shape[-1])(x)],
    "no signature": lambda: [nn.Dense(4), lambda x: [x], max],
}


@pytest.mark.parametrize("deterministic", [None, False, True])
@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
def test_sequential_is_flax_sequential(layers, deterministic):
    x = values(5, 4)
    ours = Sequential(layers()).init_with_output(
        rngs("params"), x, deterministic=deterministic
    )
    with config.temp_flip_flag("preserve_adopted_names", True):
        theirs = nn.Sequential(layers()).init_with_output(rngs("params"), x)
    assert_same(ours, theirs)


class Parent(nn.Module):
    kind: Any
    layers: Any

    @nn.compact
    def __call__(self, x):
        return self.kind(self.layers)(self.kind([nn.Dense(4), nn.Dense(4)])(x))


@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
def test_sequential_in_a_module(layers):
    with config.temp_flip_flag("preserve_adopted_names", True):
        ours, theirs = (
            Parent(kind, layers()).init_with_output(rngs("params"), values(5, 4))
            for kind in (Sequential, nn.Sequential)
        )
    assert_same(ours, theirs)


def test_sequential_names():
    layers = [nn.Dense(4), nn.relu, nn.Dense(4, name="head"), [nn.Dense(2)]]
    layers[3] = Sequential(layers[3])
    variables = Sequential(layers).init(rngs("params"), values(1, 4))
    assert paths(variables) == {
        f"params/{name}/{leaf}"
        for name in ("layers_0", "head", "layers_3/layers_0")
        for leaf in ("kernel", "bias")
    }


def test_sequential_with_several_inputs():
    ours = Sequential([Add(), nn.relu])
    x = values(2, 4), values(2, 4, seed=1)
    assert_same(
        ours.init_with_output(rngs("params"), *x, deterministic=True),
        nn.Sequential([Add(), nn.relu]).init_with_output(rngs("params"), *x),
    )


def test_sequential_dropout_is_flax_dropout():
    def layers(kind, **fixed):
        return [
            nn.Dense(8),
            nn.relu,
            kind(0.5, **fixed),
            nn.Dense(3),
            kind(0.1, **fixed),
        ]

    x = values(5, 8)
    theirs = nn.Sequential(layers(nn.Dropout, deterministic=False))
    theirs = theirs.init_with_output(rngs(), x)
    for kind in (Dropout, nn.Dropout):
        ours = Sequential(layers(kind))
        assert_same(ours.init_with_output(rngs(), x, deterministic=False), theirs)
        nested = Sequential([ours])
        for deterministic in (False, True):
            _, deep = nested.init_with_output(rngs(), x, deterministic=deterministic)
            flat = {f"params/layers_0{path[6:]}" for path in paths(theirs[1])}
            assert paths(deep) == flat
        with pytest.raises(ValueError, match="deterministic"):
            ours.init(rngs(), x)


SEEN: list[dict[str, Any]] = []


class Flagged(nn.Module):
    """Takes every flag; may have some of them fixed."""

    deterministic: bool | None = None
    train: bool | None = None

    def __call__(
        self, x, train="-", *, deterministic="-", training="-", use_running_average="-"
    ):
        SEEN.append(
            {
                "deterministic": deterministic,
                "train": train,
                "training": training,
                "use_running_average": use_running_average,
            }
        )
        return x


class Catching(nn.Module):
    def __call__(self, x, **flags):
        SEEN.append(flags)
        return x


def flagged(x, train="-"):
    SEEN.append({"train": train})
    return x


@pytest.fixture
def seen():
    SEEN.clear()
    return SEEN


@pytest.mark.parametrize("deterministic", [False, True])
def test_sequential_hands_out_flags(seen, deterministic):
    d, t = deterministic, not deterministic
    every = {
        "deterministic": d,
        "train": t,
        "training": t,
        "use_running_average": d,
    }
    cases = {
        Flagged(): every,
        Flagged(deterministic=False): {**every, "deterministic": "-"},
        Flagged(train=True): {**every, "train": "-"},
        Catching(): {},
        flagged: {"train": t},
        functools.partial(flagged): {"train": t},
        functools.partial(flagged, train="kept"): {"train": "kept"},
        jax.jit(flagged, static_argnames="train"): {"train": t},
    }
    for layer, expected in cases.items():
        seen.clear()
        Sequential([layer]).apply({}, values(1), deterministic=deterministic)
        assert seen == [expected]


def test_sequential_without_a_flag(seen):
    Sequential([Flagged(), flagged]).apply({}, values(1))
    assert [set(flags.values()) for flags in seen] == [{"-"}, {"-"}]


def test_sequential_traced_flag(seen):
    @jax.jit
    def run(flag):
        layers = [Noise(0.5), Flagged(), lambda x, train: jnp.where(train, x, -x)]
        model = Sequential(layers)
        return model.apply({}, values(3), deterministic=flag, rngs=rngs("noise"))

    noisy = Sequential([Noise(0.5)]).apply({}, values(3), rngs=rngs("noise"))
    np.testing.assert_allclose(run(False), noisy, rtol=1e-6)
    assert_same(run(True), -values(3))
    assert all(isinstance(flag, jax.Array) for flag in seen[0].values())


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("fixed", [None, False, True])
def test_sequential_batch_norm(deterministic, fixed):
    x = values(6, 4)
    average = deterministic if fixed is None else fixed
    ours = Sequential([nn.BatchNorm(use_running_average=fixed), nn.Dense(2)])
    theirs = nn.Sequential([nn.BatchNorm(use_running_average=average), nn.Dense(2)])
    variables = ours.init(rngs("params"), x, deterministic=deterministic)
    assert_same(variables, theirs.init(rngs("params"), x))
    assert_same(
        ours.apply(variables, x, deterministic=deterministic, mutable=["batch_stats"]),
        theirs.apply(variables, x, mutable=["batch_stats"]),
    )


def test_sequential_attention():
    x, attention = (
        values(2, 3, 8),
        functools.partial(nn.MultiHeadDotProductAttention, num_heads=2),
    )
    ours = Sequential([attention(dropout_rate=0.5)])
    for deterministic in (False, True):
        fixed = attention(dropout_rate=0.5, deterministic=deterministic)
        assert_same(
            ours.init_with_output(rngs(), x, deterministic=deterministic),
            nn.Sequential([fixed]).init_with_output(rngs(), x),
        )


@pytest.mark.parametrize("layers", [nn.relu, None, 3])
def test_sequential_refuses_what_is_no_list(layers):
    with pytest.raises(ValueError, match="layers: not a list"):
        Sequential(layers)


def test_sequential_refuses_no_layers():
    with pytest.raises(ValueError, match="layers: nothing to call"):
        Sequential([]).apply({}, values(1))


# --- MLP, CNN, ResidualMLPBlock against the same by hand


class HandMLP(nn.Module):
    rate: Any
    dtype: Any = None

    @nn.compact
    def __call__(self, x, *, deterministic):
        x = x.reshape((x.shape[0], -1))
        x = nn.Dense(16, dtype=self.dtype)(x)
        x = nn.relu(x)
        x = nn.Dropout(self.rate, deterministic=deterministic)(x)
        x = nn.Dense(8, dtype=self.dtype)(x)
        x = nn.relu(x)
        x = nn.Dropout(self.rate, deterministic=deterministic)(x)
        return nn.Dense(3, dtype=self.dtype)(x)


class HandCNN(nn.Module):
    rate: Any
    dtype: Any = None

    @nn.compact
    def __call__(self, x, *, deterministic):
        if x.ndim == 3:
            x = jnp.expand_dims(x, -1)
        # nn.avg_pool divides by an int64.
        with jax.numpy_dtype_promotion("standard"):
            x = nn.relu(nn.Conv(4, (3, 3), dtype=self.dtype)(x))
            x = nn.avg_pool(x, (2, 2), (2, 2))
            x = nn.relu(nn.Conv(6, (3, 3), dtype=self.dtype)(x))
            x = nn.avg_pool(x, (2, 2), (2, 2))
        x = x.reshape((x.shape[0], -1))
        x = nn.relu(nn.Dense(16, dtype=self.dtype)(x))
        x = nn.Dropout(self.rate)(x, deterministic=deterministic)
        return nn.Dense(3, dtype=self.dtype)(x)


class HandBlock(nn.Module):
    rate: Any
    dtype: Any = None

    @nn.compact
    def __call__(self, x, *, deterministic):
        h = nn.Dense(features=x.shape[-1], dtype=self.dtype)(x)
        h = nn.relu(h)
        h = nn.Dropout(self.rate)(h, deterministic=deterministic)
        return x + h


MODELS = {
    "mlp": (functools.partial(MLP, (16, 8), 3), HandMLP, (6, 4, 5)),
    "cnn": (functools.partial(CNN, 3, (4, 6), (16,)), HandCNN, (4, 8, 8)),
    "cnn rgb": (functools.partial(CNN, 3, (4, 6), (16,)), HandCNN, (4, 8, 9, 3)),
    "block": (ResidualMLPBlock, HandBlock, (6, 5, 8)),
    "block width": (functools.partial(ResidualMLPBlock, 8), HandBlock, (6, 8)),
}


def value_and_grad(module, x, params):
    """Output and parameter gradients of a train step."""

    def loss(params, x):
        y = module.apply(params, x, deterministic=False, rngs=rngs("dropout"))
        return jnp.sin(y.astype(jnp.float32)).sum(), y

    (_, y), grad = jax.value_and_grad(loss, has_aux=True)(params, x)
    return y, grad


@functools.cache
def by_hand(name: str) -> tuple[Any, ...]:
    """Inputs, parameters, and a train step with the rate 0.3 baked in."""
    _, hand, shape = MODELS[name]
    x = values(*shape)
    init = functools.partial(hand(0.3).init, deterministic=True)
    params = jax.jit(init)(rngs("params"), x)
    step = jax.jit(functools.partial(value_and_grad, hand(0.3)))
    return x, params, step(x, params)


@functools.cache
def with_traced_rate(name: str) -> Callable[..., Any]:
    def run(rate, x, params):
        return value_and_grad(MODELS[name][0](dropout_rate=rate), x, params)

    return jax.jit(run)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("mlp", jnp.float32),
        ("block", jnp.bfloat16),
        ("block width", jnp.float32),
    ],
)
def test_model_by_hand(name, dtype):
    def run(module):
        y, params = module.init_with_output(rngs(), x, deterministic=True)
        return params, y, module.apply(params, x, deterministic=False, rngs=rngs())

    ours, hand, shape = MODELS[name]
    x = values(*shape, dtype=dtype)
    got = run(ours(dropout_rate=0.3, dtype=dtype))
    assert_same(got, run(hand(0.3, dtype=dtype)))


@pytest.mark.parametrize("name", ["mlp", "cnn", "block"])
def test_model_by_hand_jit(name):
    x, params, expected = by_hand(name)
    ours = MODELS[name][0](dropout_rate=0.3)
    got = jax.jit(functools.partial(value_and_grad, ours))(x, params)
    assert_same(got, expected)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_model_traces_as_by_hand(name, dtype):
    def run(module, x):
        y, params = module.init_with_output(rngs(), x, deterministic=True)
        return y, value_and_grad(module, x, params)

    ours, hand, shape = MODELS[name]
    traces = (
        str(jax.make_jaxpr(functools.partial(run, module))(values(*shape, dtype=dtype)))
        for module in (ours(dropout_rate=0.3, dtype=dtype), hand(0.3, dtype=dtype))
    )
    assert next(traces) == next(traces)


@pytest.mark.parametrize("name", ["mlp", "cnn", "block"])
def test_model_traced_rate(name):
    x, params, expected = by_hand(name)
    assert_same(with_traced_rate(name)(0.3, x, params), expected)


@pytest.mark.parametrize("name", ["mlp", "block"])  # convolutions in a loop differ
def test_model_lanes_of_traced_rates(name):
    x, params, _ = by_hand(name)
    rates, run = jnp.array([0.0, 0.1, 0.6, 0.9]), with_traced_rate(name)
    lanes = jax.jit(lambda *args: lax.map(lambda rate: run(rate, *args), rates))
    lanes = jax.device_get(lanes(x, params))
    for i, rate in enumerate(rates):
        lane = jax.tree.map(lambda leaf, i=i: leaf[i], lanes)
        assert_same(lane, run(rate, x, params))


def test_traced_rate_next_to_other_constants():
    def run(kind, rate, x):
        layers = [nn.LayerNorm(), kind(rate), nn.Dense(8), kind(rate), nn.LayerNorm()]
        model = Sequential(layers)
        params = model.init(rngs("params"), x, deterministic=True)
        return value_and_grad(model, x, params)

    # XLA folds a baked rate into them: same masks, but floats may round otherwise.
    x = values(16, 8)
    traced = jax.jit(functools.partial(run, Dropout))(0.1, x)
    baked = jax.jit(functools.partial(run, nn.Dropout, 0.1))(x)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, traced, baked)


@pytest.mark.parametrize("name", ["mlp", "cnn", "block"])
def test_model_draws_whatever_the_rate(name):
    ours, hand, _ = MODELS[name]
    x, params, _ = by_hand(name)

    def found(module):
        return draws(functools.partial(value_and_grad, module), x, params)

    assert found(ours()) == found(ours(dropout_rate=0.9)) == found(hand(0.5))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_model_dtype(name, dtype):
    def run(rate, x):
        module = ours(dropout_rate=rate, dtype=dtype)
        return module.init_with_output(rngs(), x, deterministic=False)

    ours, _, shape = MODELS[name]
    for rate in (0.5, jnp.float32(0.5)):
        y, variables = jax.eval_shape(run, rate, values(*shape, dtype=dtype))
        assert y.dtype == dtype
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(variables)} == {"float32"}


def test_model_features_from_lists():
    def shapes_of(model):
        x = jnp.zeros((2, 8, 8))
        shapes = jax.eval_shape(lambda: model.init(rngs(), x, deterministic=True))
        return {
            path: leaf.shape
            for path, leaf in traverse_util.flatten_dict(shapes, sep="/").items()
        }

    assert shapes_of(MLP([4, 5], 3)) == shapes_of(MLP((4, 5), 3))
    assert shapes_of(CNN(3, [4], [5, 6])) == shapes_of(CNN(3, (4,), (5, 6)))
    assert shapes_of(MLP([], 3)) == {
        "params/Dense_0/kernel": (64, 3),
        "params/Dense_0/bias": (3,),
    }


@pytest.mark.parametrize("name", MODELS)
def test_model_options(name):
    make, _, shape = MODELS[name]
    model = make(
        activation=jnp.tanh,
        kernel_init=nn.initializers.constant(0.5),
        bias_init=nn.initializers.ones,
    )
    init = functools.partial(model.init, deterministic=True)
    variables = jax.jit(init)(rngs("params"), values(*shape))
    for path, leaf in traverse_util.flatten_dict(variables, sep="/").items():
        assert (leaf == (1 if path.endswith("bias") else 0.5)).all()
    traced = str(jax.make_jaxpr(init)(rngs("params"), values(*shape)))
    assert "tanh" in traced
    assert "relu" not in traced


def test_cnn_default_is_the_mnist_network():
    shapes = jax.eval_shape(
        lambda: CNN(10).init(rngs(), jnp.zeros((2, 28, 28)), deterministic=True)
    )
    shapes = traverse_util.flatten_dict(shapes["params"], sep="/")
    assert {path: leaf.shape for path, leaf in shapes.items() if "kernel" in path} == {
        "Conv_0/kernel": (3, 3, 1, 32),
        "Conv_1/kernel": (3, 3, 32, 64),
        "Dense_0/kernel": (7 * 7 * 64, 256),
        "Dense_1/kernel": (256, 10),
    }


@pytest.mark.parametrize("shape", [(8, 8), (1, 2, 8, 8, 1)])
def test_cnn_refuses_what_is_no_image(shape):
    with pytest.raises(ValueError, match="x: not a batch of images"):
        CNN(3).init(rngs(), values(*shape))


@pytest.mark.parametrize("features", [1, 7])
def test_block_refuses_another_width(features):
    with pytest.raises(ValueError, match="features: not the input's width"):
        ResidualMLPBlock(features).init(rngs(), values(2, 8))


def test_block_is_the_guides_block():
    class Guide(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.Dense(features=2)(x)
            h = nn.relu(h)
            return x + h

    x = values(4, 2)
    ours = ResidualMLPBlock().init_with_output(rngs(), x)
    assert_same(ours, Guide().init_with_output(rngs("params"), x))


# --- Noise


class HandNoise(nn.Module):
    scale: Any

    @nn.compact
    def __call__(self, x):
        key = self.make_rng("noise")
        return x + self.scale * jax.random.normal(key, x.shape, x.dtype)


def add_noise(scale, x, **flags):
    return Noise(scale).apply({}, x, rngs=rngs("noise"), **flags)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.0, 0.1, 2.0])
def test_noise_by_hand(scale, dtype):
    x = values(20, 30, dtype=dtype)
    by_hand = HandNoise(scale).apply({}, x, rngs=rngs("noise"))
    assert_same(add_noise(scale, x), by_hand)
    assert_same(add_noise(jnp.float32(scale), x), by_hand)


def test_noise_by_hand_jit():
    x = values(20, 30)
    by_hand = jax.jit(lambda x: HandNoise(0.1).apply({}, x, rngs=rngs("noise")))(x)
    assert_same(jax.jit(functools.partial(add_noise, 0.1))(x), by_hand)
    assert_same(jax.jit(add_noise)(0.1, x), by_hand)


@pytest.mark.parametrize("wrap", [bool, jnp.bool_], ids=["python", "traced"])
def test_noise_switch(wrap):
    x = values(20)
    assert_same(add_noise(0.5, x, deterministic=wrap(True)), x)
    assert_same(add_noise(0.5, x, deterministic=wrap(False)), add_noise(0.5, x))
    run = jax.jit(lambda flag: add_noise(0.5, x, deterministic=flag))
    assert_same(run(wrap(True)), x)
    assert not np.array_equal(run(wrap(False)), x)


def test_noise_draws_whatever_flag_and_scale():
    x = values(20)
    reference = draws(lambda x: HandNoise(0.5).apply({}, x, rngs=rngs("noise")), x)
    assert reference
    for deterministic in (False, True, jnp.bool_(True)):
        for scale in (0.0, 0.5, jnp.float32(0.5)):
            ours = functools.partial(add_noise, deterministic=deterministic)
            assert draws(functools.partial(ours, scale), x) == reference


def test_noise_stream():
    x = values(20)
    key = jax.random.key(3)
    assert_same(
        Noise(0.5, stream="dropout").apply({}, x, rngs={"dropout": key}),
        Noise(0.5).apply({}, x, rngs={"noise": key}),
    )
    with pytest.raises(errors.InvalidRngError, match="noise"):
        Noise(0.5).apply({}, x, rngs=rngs("dropout"))


# --- Variable


class HandVariable(nn.Module):
    @nn.compact
    def __call__(self):
        def init():
            return jax.random.normal(self.make_rng("noise"), (2, 3))

        return self.variable("stats", "value", init).value


class Holder(nn.Module):
    kind: Any

    @nn.compact
    def __call__(self):
        return self.kind(name="a")(), self.kind(name="b")()


def test_variable_by_hand():
    ours = functools.partial(Variable, (2, 3), "stats", jax.random.normal, "noise")
    got, expected = (
        Holder(kind).init_with_output(rngs()) for kind in (ours, HandVariable)
    )
    assert_same(got, expected)
    assert paths(got[1]) == {"stats/a/value", "stats/b/value"}
    assert_same(got[0], (got[1]["stats"]["a"]["value"], got[1]["stats"]["b"]["value"]))


def test_variable_as_a_parameter():
    class Parameter(nn.Module):
        @nn.compact
        def __call__(self):
            return self.param("value", nn.initializers.normal(), (2, 3))

    ours = Variable((2, 3), "params", nn.initializers.normal())
    assert_same(
        ours.init_with_output(rngs("params")),
        Parameter().init_with_output(rngs("params")),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_variable_is_added(dtype):
    variable = Variable([3], "buffers", nn.initializers.ones, "noise")
    x = values(2, 3, dtype=dtype)
    y, variables = variable.init_with_output(rngs("noise"), x)
    assert_same(y, x + 1)
    assert_same(variables, {"buffers": {"value": jnp.ones(3)}})
    assert_same(variable.apply(variables, x), y)


def test_variable_draws_where_it_is_made_alone():
    variable = Variable((3,), "buffers", jax.random.normal)
    assert draws(lambda: variable.init(rngs("params")))
    variables = variable.init(rngs("params"))
    assert not draws(lambda v: variable.apply(v, rngs=rngs("params")), variables)
    with pytest.raises(errors.ScopeCollectionNotFound):
        variable.apply({}, rngs=rngs("params"))


def test_variable_in_a_sequential():
    make = functools.partial(Variable, (4,), "buffers", nn.initializers.ones)
    model = Sequential([nn.Dense(4), make(name="offset"), make()])
    y, variables = model.init_with_output(rngs("params"), values(2, 4))
    assert paths(variables) >= {"buffers/offset/value", "buffers/layers_2/value"}
    assert_same(
        y,
        nn.Dense(4).apply({"params": variables["params"]["layers_0"]}, values(2, 4))
        + 1
        + 1,
    )


# --- The package


def test_exports():
    models = importlib.import_module("runner.models")
    assert models.__all__ == sorted(
        models.__all__, key=lambda name: (not name.isupper(), name)
    )
    for name in models.__all__:
        assert getattr(models, name).__module__.startswith("runner.models.")


def test_modules_take_a_traced_rate_with_nothing_else_compiled():
    traces = []

    @jax.jit
    def run(rate, x):
        traces.append(rate)
        layers = [MLP((4,), 3, rate), ResidualMLPBlock(None, rate), Dropout(rate)]
        model = Sequential([*layers, Noise(rate)])
        return model.init_with_output(rngs(), x, deterministic=False)[0]

    for rate in RATES:
        assert np.isfinite(run(rate, values(2, 3))).all()
    assert len(traces) == 1


# --- Keys, RandomInteger, Branches, Identity, Compact


def test_keys_shows_what_make_rng_gives():
    inner = Keys(("noise",), name="inner")
    module = Keys(("noise", "dropout", "noise"), modules=(inner, Keys(("dropout",))))
    shown = module.apply({}, rngs=rngs("noise", "dropout"))
    assert set(shown) == {"keys", "bits", "inner", "modules_1"}

    class ByHand(nn.Module):
        @nn.compact
        def __call__(self):
            return [self.make_rng(name) for name in ("noise", "dropout", "noise")]

    keys = ByHand().apply({}, rngs=rngs("noise", "dropout"))
    for i, key in enumerate(keys):
        assert shown["keys"][i].tolist() == jax.random.key_data(key).tolist()
        assert shown["bits"][i] == jax.random.bits(key)
    assert shown["inner"]["keys"].shape == (1, 2)


def test_random_integer():
    module = RandomInteger(low=5, high=9, stream="noise")
    for x in (jnp.int32(10), jnp.zeros((3, 2))):
        y = module.apply({}, x, rngs=rngs("noise"))
        assert (y.dtype, y.shape) == (x.dtype, x.shape)
        assert set((y - x).ravel().tolist()) <= {5, 6, 7, 8}
        assert len(set((y - x).ravel().tolist())) == 1


def test_branches_hand_on_the_flag():
    module = Branches((Dropout(0.5), nn.relu, Dropout(0.5, name="mine")))
    x = values(64)
    same = module.apply({}, x, deterministic=True)
    assert_same(same, (x, nn.relu(x), x))
    dropped = module.apply({}, x, deterministic=False, rngs=rngs("dropout"))
    assert [bool((y == 0).any()) for y in dropped] == [True, True, True]
    assert not jnp.array_equal(dropped[0], dropped[2])


def test_identity():
    x, y = values(3), values(2)
    assert_same(Identity().apply({}, x), x)
    assert_same(Identity().apply({}, x, y), (x, y))


class HandCompact(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic):
        x = (
            x
            + self.variable(
                "noise",
                "shift",
                lambda: nn.initializers.normal()(self.make_rng("noise"), x.shape),
            ).value
        )
        self.param("unused", nn.initializers.normal(), (3,))
        x = nn.Dense(4)(x)
        x = x + self.param("gain", nn.initializers.normal(), x.shape)
        return nn.Dropout(0.5)(x, deterministic=deterministic)


def test_compact_is_a_compact_body():
    init = nn.initializers.normal()
    steps = (
        Declare("shift", init, collection="noise", stream="noise", add=True),
        Declare("unused", init, shape=(3,)),
        nn.Dense(4, name="Dense_0"),
        Declare("gain", init, add=True),
        Dropout(0.5, name="Dropout_0"),
    )
    x, keys = values(2, 3), rngs("params", "noise")
    ours, theirs = Compact(steps), HandCompact()
    variables = ours.init(keys, x, deterministic=True)
    assert_same(variables, theirs.init(keys, x, True))
    call = {"rngs": rngs("dropout")}
    dropped = ours.apply(variables, x, deterministic=False, **call)
    assert_same(dropped, theirs.apply(variables, x, False, **call))


def test_declare_refuses_another_stream_for_a_parameter():
    with pytest.raises(ValueError, match=r"stream: self.param draws from params"):
        Declare("w", nn.initializers.normal(), stream="noise")
