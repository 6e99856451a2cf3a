# SPDX-License-Identifier: Apache-2.0
"""Penalties: their formulas, and what they are in a run."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import KLSparsity
from runner.compile import compile_run
from runner.ledger import make_ledger
from runner.loop import Outcome, train
from runner.penalties import find_penalties
from runner.program import Program
from runner.records.events import TrainRecord
from runner.spec import RunSpec, parse_spec

SMALL = ("+experiment=dropout", "model.features=[5]", "eval.every=null")


def test_weights_that_are_penalized_are_those_of_kernels() -> None:
    w, v = np.array([[1.0, -2.0]], np.float32), np.array([[-0.5]], np.float32)
    params = {
        "a": {"kernel": w, "bias": np.float32([9, 9])},
        "b": {"kernel": v, "scale": np.float32([7])},
    }
    hypers = {"train.l1": jnp.float32(0.1), "train.l2": jnp.float32(0.01)}
    l1, l2 = find_penalties(params, {}, hypers)
    assert float(l1) == pytest.approx(0.1 * 3.5)
    assert float(l2) == pytest.approx(0.01 * 5.25)
    assert find_penalties(params, {}, {}) == []
    assert find_penalties({"a": {"bias": w}}, {}, hypers) == []


def test_what_is_sown_is_added() -> None:
    sown = {"a": {"x": (jnp.float32(2), jnp.float32(3))}, "b": {"x": jnp.ones(4)}}
    assert sum(map(float, find_penalties({}, sown, {}))) == 9


def divergence(t: float, a: float) -> float:
    return t * math.log(t / a) + (1 - t) * math.log((1 - t) / (1 - a))


def sown_by(module: nn.Module, x: Any) -> tuple[Any, Any]:
    y, after = module.apply({}, x, mutable=["losses"])
    return y, after


def test_sparsity_is_the_divergence_of_the_means() -> None:
    x = np.array([[0.2, 0.9, 0.05], [0.4, 0.7, 0.05]], np.float32)
    y, after = sown_by(KLSparsity(weight=2.0, target=0.05), x)
    np.testing.assert_array_equal(y, x)
    by_hand = 2 * sum(divergence(0.05, a) for a in (0.3, 0.8, 0.05))
    assert float(after["losses"]["sparsity"][0]) == pytest.approx(by_hand, rel=1e-5)


def test_sparsity_of_unbounded_units_and_of_many_axes() -> None:
    x = np.array([0.0, 3.0, 50.0, 0.5], np.float32).reshape(2, 2, 1)
    _, after = sown_by(KLSparsity(weight=1.0, target=0.1, squash=nn.tanh), x)
    by_hand = divergence(0.1, float(np.tanh(x).mean()))
    assert float(after["losses"]["sparsity"][0]) == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_sparsity_of_silent_and_full_units_is_finite(value: float) -> None:
    def penalty(x: Any) -> Any:
        _, after = sown_by(KLSparsity(weight=1.0), x)
        return after["losses"]["sparsity"][0]

    x = np.full((4, 3), value, np.float32)
    assert np.isfinite(penalty(x))
    assert np.isfinite(jax.grad(penalty)(x)).all()


def test_a_target_is_a_probability() -> None:
    with pytest.raises(ValueError, match=r"target: must lie between 0 and 1 \(got 1"):
        sown_by(KLSparsity(weight=1.0, target=1.0), np.ones((2, 2), np.float32))


def test_nothing_is_sown_where_nobody_asks() -> None:
    x = np.ones((2, 2), np.float32)
    np.testing.assert_array_equal(KLSparsity(weight=1.0).apply({}, x), x)


# ---- in a run


def run(spec: RunSpec) -> tuple[Program, list[float], Any]:
    """The program, the loss of each step, and the last state."""
    program = compile_run(spec)
    assert isinstance(program, Program)
    losses: list[float] = []
    for event in train(program):
        if isinstance(event, TrainRecord):
            losses += map(float, event.metrics["loss"])
        if isinstance(event, Outcome):
            return program, losses, event.state
    raise AssertionError


def entropy(params: Any, x: Any, y: Any) -> Any:
    h = jax.nn.relu(x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"])
    logits = h @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"]
    chosen = jnp.take_along_axis(-jax.nn.log_softmax(logits), y[:, None], axis=-1)
    return chosen.mean()


@pytest.mark.parametrize("parts", [1, 2])
def test_one_step_is_that_by_hand(make_spec: Any, parts: int) -> None:
    """The gradient of the loss with both penalties, also where a batch is cut up."""
    program, losses, state = run(
        make_spec(
            *(*SMALL, "train.steps=1", "optimizer=sgd", "optimizer.momentum=null"),
            *("model.dropout_rate=0", "train.l1=0.02", "train.l2=0.3"),
            f"train.accumulation_steps={parts}",
        )
    )
    (first, _, _), rows = program.start(), program.order.indices(0, steps=1)[0]
    data, params = program.data, first.params
    x, y = data.x_train[rows].reshape(len(rows), -1), data.y_train[rows]

    def loss(params: Any) -> Any:
        kernels = [params[name]["kernel"] for name in ("Dense_0", "Dense_1")]
        l1, l2 = (sum(f(w).sum() for w in kernels) for f in (jnp.abs, jnp.square))
        return entropy(params, x, y) + 0.02 * l1 + 0.3 * l2

    value, grads = jax.value_and_grad(loss)(params)
    assert losses == [pytest.approx(float(value), rel=1e-5)]
    by_hand = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    for name, layer in by_hand.items():
        for leaf, theirs in layer.items():
            ours = state.params[name][leaf]
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.promotes
def test_factors_are_inputs_of_the_program(make_spec: Any) -> None:
    program = compile_run(make_spec(*SMALL, "train.l1=0.5", "train.l2=0.25"))
    assert isinstance(program, Program)
    assert (program.hypers["train.l1"], program.hypers["train.l2"]) == (0.5, 0.25)
    plain = compile_run(make_spec(*SMALL))
    assert not {"train.l1", "train.l2"} & set(plain.hypers)
    assert make_ledger(program)["draws"] == make_ledger(plain)["draws"]


def sparse(compose_config: Any, *overrides: str, **sparsity: float) -> RunSpec:
    """A network of five logistic units whose means are penalized."""
    layers = [
        {"_target_": "models.Flatten"},
        {"_target_": "flax.linen.Dense", "features": 5},
        {"_target_": "flax.linen.sigmoid"},
        {"_target_": "models.KLSparsity", **sparsity},
        {"_target_": "flax.linen.Dense", "features": 10},
    ]
    config = compose_config("+experiment=dropout", "eval.every=null", *overrides)
    model = {"_target_": "models.Sequential", "layers": layers}
    return parse_spec({**config, "model": model})


@pytest.mark.promotes
def test_sparsity_is_learned_and_is_no_state(compose_config: Any) -> None:
    """Units become as rare as they should; what is sown is carried nowhere."""
    means = {}
    for weight in (0.0, 10.0):
        words = ("train.steps=200", "optimizer.learning_rate=0.02")
        program, losses, state = run(
            sparse(compose_config, *words, weight=weight, target=0.1)
        )
        assert "model.layers[3].weight" in program.hypers
        assert state.collections == program.initial.collections == {}
        layer = state.params["layers_1"]
        x = program.data.x_train.reshape(-1, 64)
        means[weight] = jax.nn.sigmoid(x @ layer["kernel"] + layer["bias"]).mean(axis=0)
        assert losses[-1] < losses[0]
    assert (abs(means[10.0] - 0.1) < 0.03).all()
    assert means[0.0].max() > 0.3


@pytest.mark.promotes
def test_sparsity_is_added_to_the_loss(compose_config: Any) -> None:
    losses = {
        weight: run(sparse(compose_config, "train.steps=1", weight=weight))[1][0]
        for weight in (0.0, 0.5)
    }
    program = compile_run(sparse(compose_config, weight=0.5))
    (state, _, _), rows = program.start(), program.order.indices(0, steps=1)[0]
    x, layer = program.data.x_train[rows].reshape(-1, 64), state.params["layers_1"]
    a = jax.nn.sigmoid(x @ layer["kernel"] + layer["bias"]).mean(axis=0)
    by_hand = 0.5 * sum(divergence(0.05, float(mean)) for mean in a)
    assert losses[0.5] - losses[0.0] == pytest.approx(by_hand, rel=1e-4)
