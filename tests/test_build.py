# SPDX-License-Identifier: Apache-2.0
"""What a config builds equals the same program by hand; all else is refused."""

import functools
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner import models
from runner.build import build_module, build_optimizer
from runner.errors import TargetError
from runner.parse import freeze

TRUSTED = "Trusted: flax.linen, jax, models, optax."
DENSE = {"_target_": "flax.linen.Dense", "features": 3}
DENSE_SIGNATURE = (
    "Signature: Dense(features, use_bias=True, dtype=None, param_dtype=float32, "
    "precision=None, ...)."
)
ADAM = {"_target_": "optax.adam", "learning_rate": 0.1}

MYLAB = '''
"""A package of a user's."""
import functools, os
from collections.abc import Mapping, Sequence
from os import system as alias_to_os_system
from subprocess import run
from typing import TYPE_CHECKING, Any, Literal
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.linen import Dense as OurDense
from jax.numpy import load
if TYPE_CHECKING:
    from nowhere import Nothing

bound_system = functools.partial(os.system, "true")
number = 3

class Net(nn.Module):
    features: int
    mode: Literal["a", "b"] = "a"
    block: Any = nn.Dense
    act: "Nothing" = nn.relu
    tree: Any = None

    @nn.compact
    def __call__(self, x):
        return self.act(self.block(features=self.features)(x))

class Silent(nn.Module):
    """Has no `__call__`."""

class Hinted(nn.Module):
    part: nn.Module | None = None
    rates: Sequence[float] = ()
    table: Mapping[str, int] | None = None

class Plain:
    def __init__(self, size: int) -> None:
        self.size = size

class Failing(nn.Module):
    def __post_init__(self):
        raise ValueError("first line\\nsecond line")

class Holder(nn.Module):
    value: Any = None

    def __call__(self, x):
        return x

def squash(x, scale=1.0):
    return jnp.tanh(x * scale)

@jax.jit
def jitted(x):
    return x + 1

def net(features: int = 4) -> nn.Module:
    return Net(features)

def sized(features: int) -> nn.Module:
    return Net(features)

def optimizer(rate: float) -> optax.GradientTransformation:
    return optax.sgd(rate)

def no_optimizer(rate: float = 0.1):
    return rate

def decay_mask(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)

def typed(dtype: str = "a"):
    return dtype

def anything(*args, **kwargs):
    return args, kwargs
'''


@pytest.fixture
def mylab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str]]:
    (tmp_path / "mylab.py").write_text(MYLAB)
    monkeypatch.syspath_prepend(tmp_path)
    yield ("mylab",)
    sys.modules.pop("mylab", None)


def module(node: Any, trusted: tuple[str, ...] = ()) -> nn.Module:
    return build_module(freeze(node, path="model"), path="model", trusted=trusted)


def optimizer(node: Any, trusted: tuple[str, ...] = ()) -> optax.GradientTransformation:
    frozen = freeze(node, path="optimizer")
    return build_optimizer(frozen, path="optimizer", trusted=trusted)


def value(node: Any, trusted: tuple[str, ...] = ("mylab",)) -> Any:
    """What a node is as an argument: any attribute of any type may hold it."""
    node = {"_target_": "mylab.Holder", "value": node}
    return build_module(node, path="model", trusted=trusted).value  # type: ignore


def refusal(node: Any, trusted: tuple[str, ...] = ()) -> str:
    with pytest.raises(TargetError) as caught:
        module(node, trusted)
    return str(caught.value)


def optimizer_refusal(node: Any, trusted: tuple[str, ...] = ()) -> str:
    with pytest.raises(TargetError) as caught:
        optimizer(node, trusted)
    return str(caught.value)


def assert_same(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


# Flax's pooling and optax's bias corrections promote dtypes implicitly.
@jax.numpy_dtype_promotion("standard")
def outcome(made: nn.Module, x: Any) -> Any:
    """Parameters, and outputs with dropout on, both with keys of the stream's."""
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = made.init(rngs, x)
    outputs, _ = made.apply(variables, x, rngs=rngs, mutable=True)
    return variables, outputs


# --- modules that are built -------------------------------------------------------


def target(name: str, /, **arguments: Any) -> dict[str, Any]:
    return {"_target_": name, **arguments}


GOOD = {
    "dense": (DENSE, nn.Dense(3)),
    "positional": (target("flax.linen.Dense", _args_=[3]), nn.Dense(3)),
    "named": ({"_target_": "flax.linen.Sequential", "layers": [{**DENSE, "name": "a"}]},
              nn.Sequential([nn.Dense(3, name="a")])),
    "conv": (target("flax.linen.Conv", features=2, kernel_size=[3], strides=2),
             nn.Conv(2, (3,), strides=2)),
    "conv padding": (
        target("flax.linen.Conv", features=2, kernel_size=[3], padding=[[1, 1]]),
        nn.Conv(2, (3,), padding=((1, 1),)),
    ),
    "public place": (target("flax.linen.linear.Dense", features=3), nn.Dense(3)),
    "int for float": (target("flax.linen.Dropout", rate=0, deterministic=True),
                      nn.Dropout(0, deterministic=True)),
    "factory": (
        {**DENSE, "kernel_init": target("jax.nn.initializers.normal", stddev=0.5)},
        nn.Dense(3, kernel_init=nn.initializers.normal(0.5)),
    ),
    "factory without arguments": (
        {**DENSE, "kernel_init": target("flax.linen.initializers.he_normal"),
         "bias_init": target("flax.linen.initializers.ones_init")},
        nn.Dense(3, kernel_init=nn.initializers.he_normal(),
                 bias_init=nn.initializers.ones),
    ),
    "initializer": (
        {**DENSE, "kernel_init": target("flax.linen.initializers.ones")},
        nn.Dense(3, kernel_init=nn.initializers.ones),
    ),
    "initializer of jax": (
        {**DENSE, "bias_init": target("flax.linen.ones")},
        nn.Dense(3, bias_init=nn.initializers.ones),
    ),
    "partitioned": (
        {**DENSE, "kernel_init": target(
            "flax.linen.with_logical_partitioning",
            fn=target("flax.linen.initializers.he_normal"), names=["embed", None])},
        nn.Dense(3, kernel_init=nn.with_logical_partitioning(
            nn.initializers.he_normal(), ("embed", None))),
    ),
    "dtypes": (
        {**DENSE, "dtype": "bfloat16", "param_dtype": "float16"},
        nn.Dense(3, dtype=jnp.bfloat16, param_dtype=jnp.float16),
    ),
    "activations": (
        target("flax.linen.Sequential", layers=[
            DENSE,
            target("flax.linen.relu"),
            target("flax.linen.gelu", approximate=False),
            target("jax.nn.leaky_relu", negative_slope=0.3),
            target("jax.numpy.tanh"),
            target("flax.linen.avg_pool", window_shape=[2], strides=[2]),
            DENSE,
        ]),
        nn.Sequential([
            nn.Dense(3),
            nn.relu,
            functools.partial(nn.gelu, approximate=False),
            functools.partial(nn.leaky_relu, negative_slope=0.3),
            jnp.tanh,
            functools.partial(nn.avg_pool, window_shape=(2,), strides=(2,)),
            nn.Dense(3),
        ]),
    ),
    "mlp": (
        target("models.MLP", features=[8, 8], num_outputs=2, dropout_rate=0.5,
               activation=target("jax.nn.silu"),
               kernel_init=target("jax.nn.initializers.orthogonal")),
        models.MLP((8, 8), 2, 0.5, nn.silu, nn.initializers.orthogonal()),
    ),
    "place within models": (
        target("models.mlp.MLP", features=[], num_outputs=2), models.MLP((), 2)
    ),
    "nested": (
        target("models.Sequential", layers=[
            target("models.ResidualMLPBlock", dropout_rate=0.5),
            target("models.Dropout", rate=0.25, deterministic=False, name="drop"),
            target("flax.linen.Sequential", layers=[DENSE, target("flax.linen.relu")]),
        ]),
        models.Sequential([
            models.ResidualMLPBlock(dropout_rate=0.5),
            models.Dropout(0.25, deterministic=False, name="drop"),
            nn.Sequential([nn.Dense(3), nn.relu]),
        ]),
    ),
    "attention": (
        target("flax.linen.MultiHeadDotProductAttention", num_heads=2, qkv_features=4,
               dropout_rate=0.5, deterministic=False,
               attention_fn=target("flax.linen.dot_product_attention")),
        nn.MultiHeadDotProductAttention(2, qkv_features=4, dropout_rate=0.5,
                                        deterministic=False),
    ),
    "recurrent": (
        target("flax.linen.RNN", cell=target("flax.linen.LSTMCell", features=3),
               split_rngs={"params": False}, reverse=True),
        nn.RNN(nn.LSTMCell(3), split_rngs={"params": False}, reverse=True),
    ),
    "wrapped": (
        {"module": DENSE, "features": 3, "word": "a", "none": None, "sizes": [1, [2]]},
        nn.Dense(3),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("node", "by_hand"), GOOD.values(), ids=GOOD)
def test_a_built_module_equals_the_one_by_hand(node: Any, by_hand: nn.Module) -> None:
    x = jnp.linspace(-1, 1, 2 * 6 * 4).reshape(2, 6, 4)
    assert_same(outcome(module(node), x), outcome(by_hand, x))


def test_dropout_is_drawn_in_the_comparison() -> None:
    x = jnp.ones((4, 16))
    _, outputs = outcome(module(GOOD["mlp"][0]), x)
    assert len(np.unique(outputs)) > 2


layers = st.one_of(
    st.builds(
        lambda f, b: (
            target("flax.linen.Dense", features=f, use_bias=b),
            nn.Dense(f, use_bias=b),
        ),
        st.integers(1, 4),
        st.booleans(),
    ),
    st.builds(
        lambda s: (
            target("flax.linen.Dense", features=2, kernel_init=target(
                "flax.linen.initializers.normal", stddev=s)),
            nn.Dense(2, kernel_init=nn.initializers.normal(s)),
        ),
        st.floats(0.125, 2, width=16),
    ),
    st.sampled_from(["relu", "gelu", "tanh", "silu", "softmax"]).map(
        lambda n: (target(f"flax.linen.{n}"), getattr(nn, n))
    ),
    st.floats(-1, 1, width=16).map(
        lambda s: (
            target("jax.nn.leaky_relu", negative_slope=s),
            functools.partial(jax.nn.leaky_relu, negative_slope=s),
        )
    ),
)  # fmt: skip
trees = st.recursive(
    layers,
    lambda inner: st.lists(inner, min_size=1, max_size=3).flatmap(
        lambda pairs: st.sampled_from(["flax.linen", "models"]).map(
            lambda place: (
                target(f"{place}.Sequential", layers=[node for node, _ in pairs]),
                {"flax.linen": nn, "models": models}[place].Sequential(
                    tuple(by_hand for _, by_hand in pairs)
                ),
            )
        )
    ),
    max_leaves=6,
)


@settings(max_examples=40, deadline=None)
@given(trees)
def test_any_tree_equals_the_one_by_hand(pair: Any) -> None:
    node, by_hand = (target("models.Sequential", layers=[pair[0]]), pair[1])
    x = jnp.linspace(-1, 1, 6).reshape(2, 3)
    assert_same(outcome(module(node), x), outcome(models.Sequential((by_hand,)), x))


def test_traced_scalars_stand_in_for_floats() -> None:
    def loss(rate: Any) -> Any:
        node = target("models.MLP", features=[8], num_outputs=2, dropout_rate=rate)
        made = build_module(node, path="model", trusted=())
        return outcome(made, jnp.ones((2, 4)))

    by_hand = jax.jit(lambda r: outcome(models.MLP((8,), 2, r), jnp.ones((2, 4))))
    assert_same(jax.jit(loss)(jnp.float32(0.5)), by_hand(jnp.float32(0.5)))


def test_leaves_pass_untouched(mylab: Any) -> None:
    array = jnp.ones(2)
    tree = {"a": [1, 2.5, None, True, "x"], "b": {"c": DENSE}, 3: array}
    made = value(tree)
    assert made["a"] == (1, 2.5, None, True, "x")
    assert isinstance(made["b"]["c"], nn.Dense)
    assert made[3] is array


def test_hints_let_modules_arrays_and_mappings_through(mylab: Any) -> None:
    rates = jnp.ones(2)
    node = target(
        "mylab.Hinted", part=target("mylab.Silent"), rates=rates, table={"a": 1}
    )
    made: Any = build_module(node, path="model", trusted=mylab)
    assert type(made.part).__name__ == "Silent"
    assert made.rates is rates
    assert made.table == {"a": 1}


# --- optimizers that are built ----------------------------------------------------

SCHEDULE = target(
    "optax.warmup_cosine_decay_schedule",
    init_value=0.0, peak_value=0.1, warmup_steps=2, decay_steps=5,
)  # fmt: skip
GOOD_OPTIMIZERS = {
    "adam": (ADAM, lambda: optax.adam(0.1)),
    "partial of optax": (
        target("optax.nadam", learning_rate=0.1), lambda: optax.nadam(0.1)
    ),
    "int for float": (target("optax.sgd", learning_rate=1), lambda: optax.sgd(1)),
    "schedule": (
        target("optax.adamw", learning_rate=SCHEDULE, mu_dtype="bfloat16"),
        lambda: optax.adamw(
            optax.warmup_cosine_decay_schedule(0.0, 0.1, 2, 5), mu_dtype=jnp.bfloat16
        ),
    ),
    "chain": (
        target("optax.chain", _args_=[
            target("optax.clip_by_global_norm", max_norm=0.5),
            target("optax.sgd", learning_rate=target(
                "optax.piecewise_constant_schedule", init_value=0.1,
                boundaries_and_scales={1: 0.5, 2: 0.1})),
        ]),
        lambda: optax.chain(
            optax.clip_by_global_norm(0.5),
            optax.sgd(optax.piecewise_constant_schedule(0.1, {1: 0.5, 2: 0.1})),
        ),
    ),
    "schedules": (
        target("optax.sgd", learning_rate=target(
            "optax.join_schedules", boundaries=[2], schedules=[
                target("optax.linear_schedule", init_value=0, end_value=1,
                       transition_steps=2),
                target("optax.constant_schedule", value=1.0),
            ])),
        lambda: optax.sgd(optax.join_schedules(
            [optax.linear_schedule(0, 1, 2), optax.constant_schedule(1.0)], [2])),
    ),
    "transforms in a mapping": (
        target("optax.partition", transforms={
            "a": target("optax.sgd", learning_rate=1.0),
            "b": target("optax.set_to_zero")}, param_labels={"w": "a", "b": "b"}),
        lambda: optax.partition(
            {"a": optax.sgd(1.0), "b": optax.set_to_zero()}, {"w": "a", "b": "b"}),
    ),
    "transforms in pairs": (
        target("optax.named_chain", _args_=[["one", ADAM]]),
        lambda: optax.named_chain(("one", optax.adam(0.1))),
    ),
    "no annotation": (
        target("optax.scale_by_factored_rms"), optax.scale_by_factored_rms
    ),
    "contrib": (
        target("optax.contrib.adopt", learning_rate=0.1),
        lambda: optax.contrib.adopt(0.1),
    ),
    "wrapped": ({"transform": ADAM, "learning_rate": 0.1}, lambda: optax.adam(0.1)),
}  # fmt: skip


@jax.numpy_dtype_promotion("standard")
def steps(made: optax.GradientTransformation) -> Any:
    params = {"w": jnp.linspace(0, 1, 6).reshape(2, 3), "b": jnp.ones(3)}
    state = made.init(params)
    seen = []
    for scale in (1.0, -0.5, 2.0, 0.1):
        grads = jax.tree.map(lambda p, s=scale: p * s, params)
        updates, state = made.update(grads, state, params)
        seen.append(updates)
    return seen, state


@pytest.mark.parametrize(
    ("node", "by_hand"), GOOD_OPTIMIZERS.values(), ids=GOOD_OPTIMIZERS
)
def test_a_built_optimizer_equals_the_one_by_hand(node: Any, by_hand: Any) -> None:
    assert_same(steps(optimizer(node)), steps(by_hand()))


def test_a_traced_learning_rate() -> None:
    @jax.jit
    def built(rate: Any) -> Any:
        node = target("optax.adam", learning_rate=rate)
        return steps(build_optimizer(node, path="optimizer", trusted=()))

    by_hand = jax.jit(lambda rate: steps(optax.adam(rate)))
    assert_same(built(jnp.float32(0.1)), by_hand(jnp.float32(0.1)))


def test_optax_is_imported_for_optimizers_alone() -> None:
    code = (
        "import sys; from runner.build import build_module\n"
        "node = {'_target_': 'models.MLP', 'features': [2], 'num_outputs': 1}\n"
        "build_module(node, path='model', trusted=())\n"
        "assert 'optax' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# --- packages of the user's -------------------------------------------------------


def test_a_trusted_module(mylab: Any) -> None:
    from mylab import Net  # type: ignore[import-not-found]

    x = jnp.ones((2, 3))
    node = target(
        "mylab.Net",
        features=4,
        block=target("flax.linen.Dense", _partial_=True, use_bias=False),
        act=target("mylab.squash", scale=2.0),
    )
    by_hand = Net(
        4,
        block=functools.partial(nn.Dense, use_bias=False),
        act=lambda x: jnp.tanh(x * 2.0),
    )
    assert_same(outcome(module(node, mylab), x), outcome(by_hand, x))


@pytest.mark.parametrize(
    ("node", "check"),
    [
        (target("mylab.squash"), lambda made, lab: made is lab.squash),
        (target("mylab.jitted"), lambda made, lab: made is lab.jitted),
        (target("mylab.squash", scale=2.0), lambda made, lab: made.func is lab.squash),
        (target("mylab.net"), lambda made, lab: made.features == 4),
        (target("mylab.net", _partial_=True), lambda made, lab: made is lab.net),
        (target("mylab.net", features=5), lambda made, lab: made.features == 5),
        (target("mylab.net", _args_=[6]), lambda made, lab: made.features == 6),
        (target("mylab.sized"), lambda made, lab: made is lab.sized),
        (target("mylab.Plain", size=1), lambda made, lab: made.size == 1),
        (target("mylab.Net", _partial_=True), lambda made, lab: made is lab.Net),
        (target("mylab.OurDense", features=1), lambda made, lab: made.features == 1),
        (target("mylab.typed", dtype="b"), lambda made, lab: type(made) is str),
        (
            target("mylab.anything", _args_=[1, [2]], a=3),
            lambda made, lab: made == ((1, (2,)), {"a": 3}),
        ),
    ],
)
def test_what_a_trusted_target_becomes(node: Any, check: Any, mylab: Any) -> None:
    made = value(node)
    assert check(made, sys.modules["mylab"])


def test_a_trusted_factory_of_modules(mylab: Any) -> None:
    made = module(target("mylab.net", features=7), mylab)
    assert made.features == 7  # type: ignore[attr-defined]


def test_a_trusted_factory_of_optimizers(mylab: Any) -> None:
    made = optimizer(target("mylab.optimizer", rate=0.5), mylab)
    assert_same(steps(made), steps(optax.sgd(0.5)))


def test_a_trusted_mask(mylab: Any) -> None:
    node = target("optax.adamw", learning_rate=0.1, mask=target("mylab.decay_mask"))
    by_hand = optax.adamw(0.1, mask=lambda p: {"w": True, "b": False})
    assert_same(steps(optimizer(node, mylab)), steps(by_hand))


def test_models_are_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models.py").write_text("raise SystemExit('not ours')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "models", raising=False)
    made = module(target("models.MLP", features=[], num_outputs=1))
    assert type(made) is models.MLP


# --- what is refused --------------------------------------------------------------

REFUSED = {
    "root number": (3, "model: must be a mapping with a _target_, or with one under "
                    "module (got 3)."),
    "root without target": (
        {"features": 3}, "model: must be a mapping with a _target_, or with one under "
        "module (got {'features': 3})."),
    "root with a mapping beside": (
        {"module": DENSE, "other": {"a": 1}},
        "model.other: only plain values may stand beside module (got {'a': 1})."),
    "root with a list of mappings beside": (
        {"module": DENSE, "other": [{"a": 1}]},
        "model.other: only plain values may stand beside module (got ({'a': 1},))."),
    "root in a root": (
        {"module": {"module": DENSE}},
        "model.module: must be a mapping with a _target_, or with one under module "
        "(got {'module': {'_target_': 'flax.linen.Dense', 'features': 3}})."),
    "root that is a function": (
        target("flax.linen.relu"),
        "model._target_: must make a Flax module (got 'flax.linen.relu')."),
    "root that is bound": (
        {**DENSE, "_partial_": True},
        "model._target_: must make a Flax module (got 'flax.linen.Dense')."),
    "root that is a transform": (
        ADAM, "model._target_: must make a Flax module (got 'optax.adam')."),
    "wrapped": (
        {"module": {**DENSE, "features": "3"}},
        "model.module.features: must be int for Dense (got '3')."),
    "lift": (
        {"lift": "scan"}, "model: nn.scan needs module. Set model.module."),
    "lift within": (
        target("models.Sequential", layers=[{"lift": "vmap", "module": DENSE,
                                             "length": 3}]),
        "model.layers[0].length: not an argument of nn.vmap (got 'length'). "
        "Arguments: variable_axes, split_rngs, in_axes, out_axes, axis_size, "
        "axis_name, spmd_axis_name, metadata_params, methods, name, module."),
    "target number": (
        target(3),  # type: ignore[arg-type]
        "model._target_: must be a name such as flax.linen.Dense (got 3)."),
    "target without package": (
        target("Dense"),
        "model._target_: must be a name such as flax.linen.Dense (got 'Dense')."),
    "target with spaces": (
        target("flax.linen. Dense"), "model._target_: must be a name such as "
        "flax.linen.Dense (got 'flax.linen. Dense')."),
    "target relative": (
        target(".flax.Dense"), "model._target_: must be a name such as "
        "flax.linen.Dense (got '.flax.Dense')."),
    "untrusted": (
        target("otherlab.Net"),
        f"model._target_: not a trusted package (got 'otherlab.Net'). {TRUSTED} "
        "Add its package to trusted: [otherlab] if it is yours and you know what it "
        "runs."),
    "untrusted namesake": (
        target("modelsx.Net"),
        f"model._target_: not a trusted package (got 'modelsx.Net'). {TRUSTED} "
        "Add its package to trusted: [modelsx] if it is yours and you know what it "
        "runs."),
    "standard library": (
        target("models.Sequential", layers=[DENSE, target("os.system", _args_=["a"])]),
        "model.layers[1]._target_: not a trusted package (got 'os.system'). "
        f"{TRUSTED} Python's own modules are never built."),
    "nnx": (
        target("flax.nnx.Linear"),
        f"model._target_: not a trusted package (got 'flax.nnx.Linear'). {TRUSTED} "
        "The rest of that package is never built."),
    "ours": (
        target("runner.cli.main"),
        f"model._target_: not a trusted package (got 'runner.cli.main'). {TRUSTED} "
        "The rest of that package is never built."),
    "habit": (
        target("nn.Dense"),
        f"model._target_: not a trusted package (got 'nn.Dense'). {TRUSTED} "
        "Did you mean 'flax.linen.Dense'?"),
    "models by their full name": (
        target("runner.models.MLP"),
        f"model._target_: not a trusted package (got 'runner.models.MLP'). {TRUSTED} "
        "Did you mean 'models.MLP'?"),
    "private": (
        target("flax.linen._Dense"),
        "model._target_: private names are never built (got 'flax.linen._Dense')."),
    "rest of jax": (
        target("jax.random.normal"),
        "model._target_: not built (got 'jax.random.normal'). "
        "Of jax: jax.nn, jax.nn.initializers, jax.numpy."),
    "unknown name": (
        target("flax.linen.Dens"),
        "model._target_: flax.linen has no Dens (got 'flax.linen.Dens'). "
        "Did you mean 'Dense'?"),
    "unknown name in models": (
        target("models.Sequentail"),
        "model._target_: models has no Sequentail (got 'models.Sequentail'). "
        "Did you mean 'Sequential'?"),
    "unknown module": (
        target("models.nothing.Net"),
        "model._target_: no module models.nothing (got 'models.nothing.Net')."),
    "package": (
        target("flax.linen"),
        "model._target_: neither a class nor a function (got 'flax.linen')."),
    "method": (
        target("flax.linen.Dense.apply"),
        "model._target_: no module flax.linen.Dense (got 'flax.linen.Dense.apply')."),
    "base class": (
        target("flax.linen.Module"),
        "model._target_: is or makes neither a Flax module, an initializer nor an "
        "array function (got 'flax.linen.Module')."),
    "unknown argument": (
        {**DENSE, "featurs": 3},
        f"model.featurs: not an argument of Dense (got 'featurs'). {DENSE_SIGNATURE} "
        "Did you mean 'features'?"),
    "parent": (
        {**DENSE, "parent": None},
        f"model.parent: not an argument of Dense (got 'parent'). {DENSE_SIGNATURE}"),
    "Hydra's other keys": (
        {**DENSE, "_recursive_": False},
        "model._recursive_: not an argument of Dense (got '_recursive_'). "
        f"{DENSE_SIGNATURE}"),
    "too many arguments": (
        target("models.Sequential", _args_=[[DENSE], "name"]),
        "model._args_[1]: not an argument of Sequential (got 'name'). "
        "Signature: Sequential(layers)."),
    "argument twice": (
        target("flax.linen.Dense", _args_=[3], features=3),
        "model: Dense failed with TypeError: Dense.__init__() got multiple values for "
        "argument 'features'."),
    "missing": (
        target("flax.linen.Conv", strides=2),
        "model: Conv needs features, kernel_size. Signature: Conv(features, "
        "kernel_size, strides=1, padding='SAME', input_dilation=1, "
        "kernel_dilation=1, ...)."),
    "args not a list": (
        {**DENSE, "_args_": 3}, "model._args_: must be a list (got 3)."),
    "partial not a bool": (
        {**DENSE, "_partial_": "yes"},
        "model._partial_: must be true or false (got 'yes')."),
    "str for int": (
        {**DENSE, "features": "3"}, "model.features: must be int for Dense (got '3')."),
    "bool for int": (
        {**DENSE, "features": True},
        "model.features: must be int for Dense (got True)."),
    "float for int": (
        {**DENSE, "features": 3.0}, "model.features: must be int for Dense (got 3.0)."),
    "null for int": (
        {**DENSE, "features": None},
        "model.features: must be int for Dense (got None)."),
    "int for bool": (
        {**DENSE, "use_bias": 1}, "model.use_bias: must be bool for Dense (got 1)."),
    "int for name": (
        {**DENSE, "name": 1}, "model.name: must be str | null for Dense (got 1)."),
    "str for float": (
        target("flax.linen.Dropout", rate="0.5"),
        "model.rate: must be float for Dropout (got '0.5')."),
    "bool for float": (
        target("flax.linen.Dropout", rate=True),
        "model.rate: must be float for Dropout (got True)."),
    "str for float or array": (
        target("models.Dropout", rate="0.5"),
        "model.rate: must be float for Dropout (got '0.5')."),
    "str in sequence": (
        target("flax.linen.Conv", features=1, kernel_size=[3, "3"]),
        "model.kernel_size: must be int | list of int for Conv (got (3, '3'))."),
    "int for sequence": (
        target("models.MLP", features=3, num_outputs=1),
        "model.features: must be list of int for MLP (got 3)."),
    "str for function": (
        target("models.MLP", features=[3], num_outputs=1, activation="relu"),
        "model.activation: must be function for MLP (got 'relu')."),
    "str for initializer": (
        {**DENSE, "kernel_init": "he_normal"},
        "model.kernel_init: must be Initializer | function for Dense "
        "(got 'he_normal')."),
    "module for int": (
        {**DENSE, "features": DENSE},
        "model.features: must be int for Dense (got 'flax.linen.Dense')."),
    "number for module": (
        target("flax.linen.RNN", cell=3),
        "model.cell: must be RNNCellBase for RNN (got 3)."),
    "str annotations": (
        target("flax.linen.MultiHeadDotProductAttention", num_heads="2"),
        "model.num_heads: must be int for MultiHeadDotProductAttention (got '2')."),
    "dtype": (
        {**DENSE, "dtype": "bf16"}, "model.dtype: not a dtype (got 'bf16'). "
        "For example: bfloat16, float16, float32, int32."),
    "dtype of no number": (
        {**DENSE, "param_dtype": "object"},
        "model.param_dtype: not a dtype (got 'object'). "
        "For example: bfloat16, float16, float32, int32."),
    "array of an activation": (
        target("models.MLP", features=[3], num_outputs=1,
               activation=target("flax.linen.relu", x=1)),
        "model.activation.x: relu gets x when it is called (got 'x'). "
        "Signature: relu(x)."),
    "positional array of an activation": (
        target("models.MLP", features=[3], num_outputs=1,
               activation=target("jax.numpy.tanh", _args_=[1])),
        "model.activation._args_[0]: tanh gets x when it is called (got 1). "
        "Signature: tanh(x)."),
    "shape of an initializer": (
        {**DENSE, "bias_init": target("jax.nn.initializers.zeros", shape=[3])},
        "model.bias_init.shape: zeros gets shape when it is called (got 'shape'). "
        "Signature: zeros(key, shape, dtype=None, out_sharding=None)."),
    "failing deep within": (
        target("models.Sequential", layers=[DENSE, {**DENSE, "kernel_init": target(
            "jax.nn.initializers.variance_scaling", scale=1.0, mode="fan_inn",
            distribution="normal")}]),
        "model.layers[1].kernel_init.mode: must be 'fan_in' | 'fan_out' | 'fan_avg' | "
        "'fan_geo_avg' for variance_scaling (got 'fan_inn')."),
}  # fmt: skip


@pytest.mark.parametrize(("node", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(node: Any, message: str) -> None:
    assert refusal(node) == message


REFUSED_OPTIMIZERS = {
    "root": ([ADAM], "optimizer: must be a mapping with a _target_, or with one under "
             "transform (got ({'_target_': 'optax.adam', 'learning_rate': 0.1},))."),
    "beside": (
        {"transform": ADAM, "other": ADAM},
        "optimizer.other: only plain values may stand beside transform "
        "(got {'_target_': 'optax.adam', 'learning_rate': 0.1})."),
    "module": (
        DENSE,
        "optimizer._target_: must make an optax transform (got 'flax.linen.Dense')."),
    "bare schedule": (
        target("optax.constant_schedule", value=1.0),
        "optimizer._target_: must make an optax transform "
        "(got 'optax.constant_schedule')."),
    "missing": (
        target("optax.sgd"), "optimizer: sgd needs learning_rate. Signature: "
        "sgd(learning_rate, momentum=None, nesterov=False, accumulator_dtype=None)."),
    "unknown": (
        {**ADAM, "beta1": 0.9}, "optimizer.beta1: not an argument of adam "
        "(got 'beta1'). Signature: adam(learning_rate, b1=0.9, b2=0.999, eps=1e-08, "
        "eps_root=0.0, mu_dtype=None, nesterov=False)."),
    "str for float": (
        {**ADAM, "learning_rate": "0.1"},
        "optimizer.learning_rate: must be float | function for adam (got '0.1')."),
    "link of a chain": (
        target("optax.chain", _args_=[ADAM, 3]),
        "optimizer._args_[1]: must be GradientTransformation for chain (got 3)."),
    "keyword of a chain": (
        target("optax.chain", first=ADAM),
        "optimizer.first: not an argument of chain (got 'first'). "
        "Signature: chain(*args)."),
    "failing": (
        {**ADAM, "learning_rate": target(
            "optax.cosine_decay_schedule", init_value=0.1, decay_steps=0)},
        "optimizer.learning_rate: cosine_decay_schedule failed with ValueError: The "
        "cosine_decay_schedule requires positive decay_steps, got decay_steps=0."),
    "loss": (
        target("optax.l2_loss", predictions=1.0),
        "optimizer._target_: is or makes neither a transform nor a schedule "
        "(got 'optax.l2_loss')."),
    "class": (
        target("optax.MultiSteps", opt=ADAM, every_k_schedule=2),
        "optimizer._target_: is or makes neither a transform nor a schedule "
        "(got 'optax.MultiSteps')."),
    "inject": (
        target("optax.inject_hyperparams", inner_factory=ADAM),
        "optimizer._target_: is or makes neither a transform nor a schedule "
        "(got 'optax.inject_hyperparams')."),
    "makes a number": (
        target("optax.update_moment", updates=1.0, moments=1.0, decay=0.1, order=1),
        "optimizer._target_: makes neither a transform nor a schedule "
        "(got 'update_moment')."),
    "lift": (
        {"transform": {"lift": "vmap"}},
        "optimizer.transform: must be a mapping with a _target_, or with one under "
        "transform (got {'lift': 'vmap'})."),
}  # fmt: skip


@pytest.mark.parametrize(
    ("node", "message"), REFUSED_OPTIMIZERS.values(), ids=REFUSED_OPTIMIZERS
)
def test_refused_optimizers(node: Any, message: str) -> None:
    assert optimizer_refusal(node) == message


REFUSED_OF_MYLAB = {
    "alias": (
        target("mylab.alias_to_os_system", _args_=["true"]),
        "model._target_: leads to posix.system, which is not of a trusted package "
        "(got 'mylab.alias_to_os_system'). "
        "Trusted: flax.linen, jax, models, mylab, optax."),
    "alias of Python": (
        target("mylab.run", _args_=["true"]),
        "model._target_: leads to subprocess.run, which is not of a trusted package "
        "(got 'mylab.run'). Trusted: flax.linen, jax, models, mylab, optax."),
    "bound alias": (
        target("mylab.bound_system"),
        "model._target_: leads to posix.system, which is not of a trusted package "
        "(got 'mylab.bound_system'). Trusted: flax.linen, jax, models, mylab, optax."),
    "alias of jax": (
        target("mylab.load", file="a"),
        "model._target_: is or makes neither a Flax module, an initializer nor an "
        "array function (got 'mylab.load')."),
    "number": (
        target("mylab.number"),
        "model._target_: neither a class nor a function (got 'mylab.number')."),
    "through a module": (
        target("mylab.os.system"),
        "model._target_: no module mylab.os (got 'mylab.os.system')."),
    "missing in a class": (
        target("mylab.Holder", value=target("mylab.Plain")),
        "model.value: Plain needs size. Signature: Plain(size)."),
    "missing at the root": (
        target("mylab.sized"),
        "model: sized needs features. Signature: sized(features)."),
    "no module": (
        target("mylab.typed"),
        "model._target_: must make a Flax module (got 'mylab.typed')."),
    "failing": (
        target("mylab.Failing"),
        "model: Failing failed with ValueError: first line."),
    "list for mapping": (
        target("mylab.Hinted", table=[1]),
        "model.table: must be mapping | null for Hinted (got (1,))."),
    "mapping for sequence": (
        target("mylab.Hinted", rates={"a": 1}),
        "model.rates: must be list of float for Hinted (got {'a': 1})."),
    "str for module": (
        target("mylab.Hinted", part="a"),
        "model.part: must be Module | null for Hinted (got 'a')."),
    "Hydra's other keys": (
        target("mylab.anything", _recursive_=False),
        "model._recursive_: not an argument of anything (got '_recursive_'). "
        "Signature: anything(*args, **kwargs)."),
    "literal": (
        target("mylab.Net", features=1, mode="c"),
        "model.mode: must be 'a' | 'b' for Net (got 'c')."),
}  # fmt: skip


@pytest.mark.parametrize(
    ("node", "message"), REFUSED_OF_MYLAB.values(), ids=REFUSED_OF_MYLAB
)
def test_refused_of_a_trusted_package(node: Any, message: str, mylab: Any) -> None:
    assert refusal(node, mylab) == message


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (
            target("mylab.no_optimizer"),
            "optimizer._target_: must make an optax transform "
            "(got 'mylab.no_optimizer').",
        ),
        (
            target("mylab.optimizer"),
            "optimizer: optimizer needs rate. Signature: optimizer(rate).",
        ),
        (
            target("optax.chain", _args_=[target("mylab.optimizer")]),
            "optimizer._args_[0]: must be GradientTransformation for chain "
            "(got 'mylab.optimizer').",
        ),
    ],
)
def test_refused_optimizers_of_a_trusted_package(
    node: Any, message: str, mylab: Any
) -> None:
    assert optimizer_refusal(node, mylab) == message


def test_an_absent_package() -> None:
    assert refusal(target("nolab.nets.Net"), ("nolab",)) == (
        "model._target_: no module nolab.nets (got 'nolab.nets.Net'). "
        "Is it installed, or its folder on PYTHONPATH?"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import nolab", "ModuleNotFoundError: No module named 'nolab'"),
        ("raise ValueError('one\\ntwo')", "ValueError: one"),
        ("raise ValueError", "ValueError"),
    ],
)
def test_a_broken_package(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "brokenlab.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    assert refusal(target("brokenlab.Net"), ("brokenlab",)) == (
        f"model._target_: brokenlab can't be imported: {said} (got 'brokenlab.Net')."
    )


def test_a_refusal_carries_its_parts() -> None:
    with pytest.raises(TargetError) as caught:
        module({**DENSE, "featurs": 3})
    error = caught.value
    assert (error.path, error.got) == ("model.featurs", "featurs")
    assert error.fix == "Did you mean 'features'?"


# --- security ---------------------------------------------------------------------


def nasty(sentinel: str) -> dict[str, tuple[Any, ...]]:
    """Targets, and arguments with which each would leave the sentinel behind."""
    touch = f"touch {sentinel}"
    python = f"open({sentinel!r}, 'w').close()"
    pickled = pickle.dumps(_Touch(sentinel))
    return {
        "os.system": (touch,),
        "os.popen": (touch,),
        "os.mkdir": (sentinel,),
        "os.execv": ("/usr/bin/touch", ["touch", sentinel]),
        "posix.system": (touch,),
        "subprocess.run": (["touch", sentinel],),
        "subprocess.Popen": (["touch", sentinel],),
        "subprocess.check_output": (["touch", sentinel],),
        "builtins.exec": (python,),
        "builtins.eval": (python,),
        "builtins.open": (sentinel, "w"),
        "builtins.__import__": ("evil",),
        "importlib.import_module": ("evil",),
        "runpy.run_module": ("evil",),
        "pickle.loads": (pickled,),
        "shutil.copy": (__file__, sentinel),
        "pathlib.Path.touch": (sentinel,),
        "io.open": (sentinel, "w"),
        "timeit.timeit": (python,),
        "code.InteractiveInterpreter.runsource": (python,),
        "numpy.save": (sentinel, 1),
        "evil.Net": (),
        "evil": (),
        "evil.sub.Net": (),
        "hydra.utils.instantiate": ({"_target_": "os.system", "_args_": [touch]},),
        "flax.linen.module.os.system": (touch,),
        "flax.linen.module.sys.modules": (),
        "flax.linen.module.functools.partial": (),
        "flax.linen.Dense.__init__.__globals__": (),
        "flax.linen.__builtins__.exec": (python,),
        "flax.linen.module.__loader__.load_module": ("evil",),
        "flax.linen.jit": (DENSE,),
        "flax.linen.apply": (DENSE, DENSE),
        "flax.linen.summary.io.open": (sentinel, "w"),
        "flax.core.freeze": ({},),
        "flax.training.checkpoints.save_checkpoint": (sentinel, {}, 0),
        "flax.serialization.os.mkdir": (sentinel,),
        "jax.numpy.save": (sentinel, 1),
        "jax.numpy.savez": (sentinel, 1),
        "jax.numpy.load": (sentinel,),
        "jax.numpy.fromfile": (sentinel,),
        "jax.numpy.set_printoptions": (),
        "jax.numpy.vectorize": (DENSE,),
        "jax.numpy.os.system": (touch,),
        "jax.debug.callback": (DENSE,),
        "jax.profiler.start_trace": (sentinel,),
        "jax.config.update": ("jax_enable_x64", True),
        "jax.experimental.io_callback": (DENSE,),
        "jax._src.lib.os.system": (touch,),
        "jax.os.system": (touch,),
        "optax.os.system": (touch,),
        "optax._src.base.Callable": (),
        "optax.transforms._combining.chain": (),
        "optax.contrib.functools.reduce": (),
        "optax.tree_utils.tree_map_params": (DENSE,),
        "models.mlp.math.sqrt": (4,),
        "models.mlp.math": (),
        "models.sequential.inspect.getsource": (),
        "models.sequential.Callable": (),
        "models.__loader__": (),
        "models..mlp.MLP": (),
        "runner.models.sequential.inspect.getsource": (),
        "runner.errors.sys.exit": (),
        "mylab.alias_to_os_system": (touch,),
        "mylab.run": (["touch", sentinel],),
        "mylab.bound_system": (),
        "mylab.os.system": (touch,),
        "mylab._private": (),
        "mylab.jax.config.update": ("jax_enable_x64", True),
    }


class _Touch:
    """Unpickling it creates a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (self.path, "w"))


@pytest.mark.parametrize("name", nasty(""))
def test_nasty_targets_are_refused_and_never_run(
    name: str, mylab: Any, tmp_path: Path
) -> None:
    sentinel = tmp_path / "sentinel"
    (tmp_path / "evil.py").write_text(f"open({str(sentinel)!r}, 'w').close()")
    node = {"_target_": name, "_args_": nasty(str(sentinel))[name]}
    roots = [
        node,
        {"module": node},
        {**DENSE, "kernel_init": node},
        target("models.Sequential", layers=[DENSE, {**node, "_partial_": True}]),
        target("mylab.Holder", value={"a": [{"b": node}]}),
    ]
    for root in roots:
        with pytest.raises(TargetError, match=r"_target_: "):
            build_module(root, path="model", trusted=mylab)
    for root in [node, {"transform": node}, {**ADAM, "learning_rate": node}]:
        with pytest.raises(TargetError, match=r"_target_: "):
            build_optimizer(root, path="optimizer", trusted=mylab)
    assert not sentinel.exists()
    assert "evil" not in sys.modules


@pytest.mark.parametrize("name", ["os.system", "mylab.alias_to_os_system"])
def test_trusting_python_itself_opens_nothing(
    name: str, mylab: Any, tmp_path: Path
) -> None:
    node = target(name, _args_=[f"touch {tmp_path / 'sentinel'}"])
    refused = "Python's own modules are never built|leads to posix.system"
    with pytest.raises(TargetError, match=refused):
        build_module(node, path="model", trusted=(*mylab, "os", "posix"))
    assert not (tmp_path / "sentinel").exists()
