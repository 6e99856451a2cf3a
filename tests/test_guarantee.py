# SPDX-License-Identifier: Apache-2.0
"""The level of a run, lowered one cause at a time, each with its reason."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import Run
from jax.experimental import io_callback

from runner.compile import compile_run
from runner.errors import ConfigError
from runner.guarantee import Guarantee, Level, guarantee_of, refuse_below_strict
from runner.parse import Node, freeze
from runner.spec import Determinism, RunSpec

PACKAGE = "lab_of_test_guarantee"
DROPOUT = "+experiment=dropout"
STRICT = "--xla_gpu_deterministic_ops=true"
ON_CPU = "on the same versions, flags, vector width and size of XLA's thread pool"
LEGACY = (
    *("task=probe", "data=none", "rng=bare", "model.dropout_rate=0"),
    "task.inputs=[{normal: [2, 3], legacy_seed: 3}]",
)

pytestmark = pytest.mark.promotes


def on_host(x: Any) -> Any:
    return np.asarray(x) * 2


def on_host_and_back(gradient: Any) -> Any:
    shape = jax.ShapeDtypeStruct(gradient.shape, gradient.dtype)
    return jax.pure_callback(on_host, shape, gradient)


@jax.custom_vjp
def double_gradient(x: Any) -> Any:
    """x; its gradient is doubled on the host."""
    return x


double_gradient.defvjp(lambda x: (x, None), lambda _, g: (on_host_and_back(g),))


class Lab(nn.Module):
    """A layer, and one thing that may lower a promise."""

    what: str = ""
    seed: int = 0

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        h = nn.Dense(10)(x.reshape(x.shape[0], -1))
        if not train:
            return h
        change = getattr(self, f"_{self.what}")
        return change(h)

    def _pure(self, h: Any) -> Any:
        return jax.lax.stop_gradient(on_host_and_back(jax.lax.stop_gradient(h))) + h

    def _unused(self, h: Any) -> Any:
        on_host_and_back(jax.lax.stop_gradient(h))
        return h

    def _io(self, h: Any) -> Any:
        shape = jax.ShapeDtypeStruct((), h.dtype)
        return h + io_callback(lambda: np.float32(1), shape)

    def _debug(self, h: Any) -> Any:
        jax.debug.callback(lambda h: None, h)
        jax.debug.print("{}", h[0, 0])
        return h

    def _backward(self, h: Any) -> Any:
        return double_gradient(h)

    def _constant(self, h: Any) -> Any:
        return h + jax.random.normal(jax.random.key(7), h.shape)

    def _declared(self, h: Any) -> Any:
        return h + jax.random.normal(jax.random.key(self.seed), h.shape)

    def _floats(self, h: Any) -> Any:
        number = jax.lax.bitcast_convert_type(h[0, 0], jnp.uint32)
        key = jax.random.fold_in(self.make_rng("dropout"), number)
        return h + jax.random.normal(key, h.shape)


def my_noise(seed: int) -> optax.GradientTransformation:
    """Noise of optax, from a key that nobody else sees."""
    return optax.add_noise(0.1, 0.5, seed)


def host_optimizer() -> optax.GradientTransformation:
    """Doubles updates on the host."""

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return jax.tree.map(on_host_and_back, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


@pytest.fixture(autouse=True, scope="module")
def lab() -> Iterator[None]:
    module: Any = ModuleType(PACKAGE)
    for member in (Lab, host_optimizer, my_noise):
        setattr(module, member.__name__, member)
        member.__module__ = PACKAGE
    sys.modules[PACKAGE] = module
    yield
    del sys.modules[PACKAGE]


@pytest.fixture(autouse=True)
def no_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XLA_FLAGS", raising=False)


def lab_spec(spec: RunSpec, **fields: Any) -> RunSpec:
    node = {"_target_": f"{PACKAGE}.Lab", **fields}
    return replace(spec, model=Node(freeze(node, path="model")), trusted=(PACKAGE,))


def lab_of(make_spec: Any, what: str, **fields: Any) -> Guarantee:
    return guarantee_of(compile_run(lab_spec(make_spec(DROPOUT), what=what, **fields)))


def test_on_cpu(make_spec: Any) -> None:
    guarantee = guarantee_of(compile_run(make_spec(DROPOUT)))
    assert guarantee == Guarantee(Level.BIT_EXACT, (ON_CPU,))


def test_convolutions_say_so(make_spec: Any) -> None:
    guarantee = guarantee_of(compile_run(make_spec("+experiment=cnn")))
    assert guarantee.level is Level.BIT_EXACT
    assert guarantee.reasons[1:] == ("convolutions on CPU: steps are taken one by one",)


@pytest.mark.parametrize(
    ("backend", "flags", "level"),
    [
        ("gpu", "", Level.KEY_EXACT),
        ("gpu", STRICT, Level.BIT_EXACT),
        ("gpu", f"{STRICT} --xla_gpu_deterministic_ops=false", Level.KEY_EXACT),
        ("tpu", "", Level.KEY_EXACT),
        ("tpu", STRICT, Level.KEY_EXACT),
        ("cpu", STRICT, Level.BIT_EXACT),
    ],
)
def test_on_other_backends(
    make_spec: Any, monkeypatch: Any, backend: str, flags: str, level: Level
) -> None:
    program = compile_run(make_spec(DROPOUT))
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setenv("XLA_FLAGS", flags)
    guarantee = guarantee_of(program)
    assert guarantee.level is level
    assert len(guarantee.reasons) == 1
    assert ("never tried" in guarantee.reasons[0]) is (
        backend == "gpu" and level is Level.BIT_EXACT
    )


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_bits_of_a_backend(make_spec: Any, impl: str) -> None:
    guarantee = guarantee_of(compile_run(make_spec(DROPOUT, f"rng.impl={impl}")))
    assert guarantee.level is Level.BIT_EXACT
    assert guarantee.reasons[1].startswith(f"rng.impl {impl}: ")


@pytest.mark.parametrize(
    ("what", "primitive"),
    [("pure", "pure_callback"), ("io", "io_callback"), ("backward", "pure_callback")],
)
def test_values_from_the_host(make_spec: Any, what: str, primitive: str) -> None:
    guarantee = lab_of(make_spec, what)
    assert guarantee.level is Level.KEY_EXACT
    why = f"{primitive}: code outside the program computes part of it"
    assert guarantee.reasons == (ON_CPU, why)


def test_an_optimizer_on_the_host(make_spec: Any) -> None:
    node = Node(freeze({"_target_": f"{PACKAGE}.host_optimizer"}, path="optimizer"))
    spec = replace(make_spec(DROPOUT), optimizer=node, trusted=(PACKAGE,))
    assert guarantee_of(compile_run(spec)).level is Level.KEY_EXACT


@pytest.mark.parametrize("what", ["debug", "unused"])
def test_a_callback_that_returns_nothing(make_spec: Any, what: str) -> None:
    assert lab_of(make_spec, what) == Guarantee(Level.BIT_EXACT, (ON_CPU,))


def test_a_key_that_is_baked_in(make_spec: Any) -> None:
    guarantee = lab_of(make_spec, "constant")
    assert guarantee.level is Level.STATISTICAL
    assert guarantee.reasons[1] == (
        "train (root) draws from a key that no declared stream gives: "
        "a constant in the model: key(7)"
    )


def test_a_key_of_the_config(make_spec: Any) -> None:
    """Its seed stands in the model's node; one that doesn't may be a clock's."""
    assert lab_of(make_spec, "declared", seed=7).level is Level.BIT_EXACT
    assert lab_of(make_spec, "constant", seed=7).level is Level.BIT_EXACT
    assert lab_of(make_spec, "constant", seed=8).level is Level.STATISTICAL


def test_a_key_of_the_optimizers_config(make_spec: Any) -> None:
    noise = ("optimizer._target_=optax.add_noise", "~optimizer.learning_rate")
    more = ("+optimizer.eta=0.1", "+optimizer.gamma=0.5", "+optimizer.key=3")
    guarantee = guarantee_of(compile_run(make_spec(DROPOUT, *noise, *more)))
    assert guarantee.level is Level.BIT_EXACT
    node = {"_target_": f"{PACKAGE}.my_noise", "seed": 3}
    spec = replace(make_spec(DROPOUT), optimizer=Node(freeze(node, path="optimizer")))
    guarantee = guarantee_of(compile_run(replace(spec, trusted=(PACKAGE,))))
    assert guarantee.level is Level.STATISTICAL


def test_legacy_draws_are_of_the_config(make_spec: Any) -> None:
    program = compile_run(make_spec(*LEGACY))
    assert any(draw.untraced for t in program.traces.values() for draw in t.draws)
    assert guarantee_of(program).level is Level.BIT_EXACT


def test_a_key_made_of_floats(make_spec: Any, monkeypatch: Any) -> None:
    """It is what the floats are: exact where they are, and only there."""
    program = compile_run(lab_spec(make_spec(DROPOUT), what="floats"))
    assert guarantee_of(program).level is Level.BIT_EXACT
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    guarantee = guarantee_of(program)
    assert guarantee.level is Level.STATISTICAL
    assert "a key of dropout that the program makes" in guarantee.reasons[1]


# Strict ------------------------------------------------------------------------------


def test_strict_refuses_a_lower_level(make_spec: Any) -> None:
    spec = lab_spec(make_spec(DROPOUT, "determinism=strict"), what="pure")
    with pytest.raises(ConfigError) as caught:
        refuse_below_strict(compile_run(spec))
    assert caught.value.exit_code == 2
    assert str(caught.value) == (
        "determinism: a bit-exact run is asked for, and this one is key-exact: "
        "pure_callback: code outside the program computes part of it (got 'strict'). "
        "Change what lowers it, or set determinism=default."
    )
    refuse_below_strict(compile_run(replace(spec, determinism=Determinism.DEFAULT)))
    refuse_below_strict(compile_run(make_spec(DROPOUT, "determinism=strict")))


MODULE = """
import flax.linen as nn
import jax


class Noisy(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        h = nn.Dense(10)(x.reshape(x.shape[0], -1))
        return h + jax.random.normal(jax.random.key(7), h.shape) if train else h
"""


def test_strict_on_the_command_line(runner: Run, tmp_path: Any) -> None:
    (tmp_path / "mylab.py").write_text(MODULE)
    words = (
        *("+experiment=dropout", "trusted=[mylab]", "rng.allow=[R002,R014]"),
        *("~model", "+model._target_=mylab.Noisy", "determinism=strict"),
        *("train.steps=2", "sinks=none"),
    )
    done = runner(*words)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith(
        "error: determinism: a bit-exact run is asked for, and this one is statistical"
    )
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "outputs").exists()
    plan = runner("plan", "--no-compile", *words)
    assert plan.returncode == 0, plan.stderr
    assert "guarantee: statistical" in plan.stdout
    assert "determinism: strict, refused when run" in plan.stdout
    document = json.loads(runner("plan", "--json", "--no-compile", *words).stdout)
    assert document["determinism"] == "strict"
    assert document["guarantee"]["level"] == "statistical"
    accepted = runner(*words, "determinism=default")
    assert accepted.returncode == 0, accepted.stderr
