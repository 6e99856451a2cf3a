# SPDX-License-Identifier: Apache-2.0
"""From a spec to a `Program`: its properties, its inputs, its refusals."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from runner.compile import compile_run
from runner.errors import ConfigError
from runner.keys import derive_base_keys
from runner.parse import Node, freeze
from runner.program import Construct
from runner.spec import Coordinate, Phase, RunSpec

PACKAGE = "lab_of_test_compile"
C = Coordinate

pytestmark = pytest.mark.promotes


class ByFloat(nn.Module):
    """Python knows its rate."""

    rate: Any

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(10)(x.reshape(x.shape[0], -1) * float(self.rate))


class ByNumpy(nn.Module):
    """NumPy does."""

    rate: Any

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(10)(x.reshape(x.shape[0], -1) * np.sqrt(self.rate))


class ByCheck(nn.Module):
    """A check of its arguments does."""

    rate: Any

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.rate <= 1:
            raise ValueError("rate")

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(10)(x.reshape(x.shape[0], -1) * self.rate)


class Pair(nn.Module):
    """Two outputs in training."""

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        y = nn.Dense(10)(x.reshape(x.shape[0], -1))
        return (y, y) if train else y


class Grows(nn.Module):
    """A variable that is first made in training."""

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        self.variable("stats", "a", lambda: jnp.float32(0))
        if train:
            self.variable("stats", "b", lambda: jnp.float32(0))
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


def wants_more() -> optax.GradientTransformationExtraArgs:
    def update(grads: Any, state: Any, params: Any = None, *, hessian: Any) -> Any:
        return grads, state

    return optax.GradientTransformationExtraArgs(lambda params: (), update)


@pytest.fixture(scope="module", autouse=True)
def lab() -> Iterator[None]:
    package = ModuleType(PACKAGE)
    for value in (ByFloat, ByNumpy, ByCheck, Pair, Grows, wants_more):
        value.__module__ = PACKAGE
        setattr(package, value.__name__, value)
    sys.modules[PACKAGE] = package
    yield
    del sys.modules[PACKAGE]


@pytest.fixture(scope="module")
def spec_of(make_spec: Any) -> Callable[..., RunSpec]:
    """Overrides, and perhaps another node in a group's place."""
    small = ("model.features=[16]", "data.batch_size=32", "train.steps=6")

    def spec_of(*overrides: str, **nodes: Any) -> RunSpec:
        spec = make_spec(*small, f"trusted=[{PACKAGE}]", *overrides)
        frozen = {k: Node(freeze(v, path=k)) for k, v in nodes.items()}
        return replace(spec, **frozen)

    return spec_of


def lab_node(name: str, **arguments: Any) -> dict[str, Any]:
    return {"_target_": f"{PACKAGE}.{name}", **arguments}


# --- properties


def test_program_of_digits(spec_of: Any) -> None:
    program = compile_run(spec_of())
    assert program.construct is Construct.LOOP
    assert (len(program.data.x_train), len(program.data.x_test)) == (1438, 359)
    assert program.microbatch.shape == (32, 8, 8)
    assert (program.window, program.eval_rows, program.eval_batches) == (6, 359, 1)
    assert program.parameters == 64 * 16 + 16 + 16 * 10 + 10
    assert program.order.steps_per_epoch == 1438 // 32
    assert program.baked == ()
    assert set(program.hypers) == {
        "model.dropout_rate",
        "optimizer.learning_rate",
        "task.label_smoothing",
    }
    both = frozenset({C.STEP, C.EPOCH})
    want = {Phase.INIT: frozenset(), Phase.TRAIN: both, Phase.EVAL: both}
    assert program.coordinates == want


@pytest.mark.parametrize(
    ("per_call", "steps", "window"),
    [("auto", 6, 6), ("auto", 9999, 512), (7, 100, 7), (600, 1000, 600), (50, 13, 13)],
)
def test_window(per_call: int | str, steps: int, window: int, spec_of: Any) -> None:
    program = compile_run(
        spec_of(f"train.steps_per_call={per_call}", f"train.steps={steps}")
    )
    assert program.window == window


@pytest.mark.parametrize(
    ("batch_size", "rows", "batches"),
    [(None, 359, 1), (1, 1, 359), (100, 100, 4), (359, 359, 1), (5000, 359, 1)],
)
def test_eval_batches(batch_size: Any, rows: int, batches: int, spec_of: Any) -> None:
    given = "null" if batch_size is None else batch_size
    program = compile_run(spec_of(f"eval.batch_size={given}"))
    assert (program.eval_rows, program.eval_batches) == (rows, batches)
    in_parts = C.MICROBATCH in program.coordinates[Phase.EVAL]
    assert in_parts == (batches > 1)
    assert C.MICROBATCH not in program.coordinates[Phase.TRAIN]


def test_rows_to_train_on_are_batches_of_an_evaluation(spec_of: Any) -> None:
    """They have numbers of their own, and so keys of their own."""
    program = compile_run(spec_of("eval.train_rows=400"))
    assert program.eval_sets == {"": range(359), "train_": range(359, 759)}
    assert (program.eval_rows, program.eval_batches) == (359, 3)
    assert C.MICROBATCH in program.coordinates[Phase.EVAL]
    whole = compile_run(spec_of("eval.train_rows=all"))
    assert len(whole.eval_sets["train_"]) == 1438
    rule = r"eval\.train_rows: must not exceed the 1438 rows to train on \(got 1439\)"
    with pytest.raises(ConfigError, match=rule):
        compile_run(spec_of("eval.train_rows=1439"))


def test_microbatches(spec_of: Any) -> None:
    program = compile_run(spec_of("train.accumulation_steps=4"))
    assert program.microbatch.shape == (8, 8, 8)
    assert C.MICROBATCH in program.coordinates[Phase.TRAIN]
    assert C.MICROBATCH not in program.coordinates[Phase.EVAL]
    (draw,) = program.traces[Phase.TRAIN].draws
    assert draw.use.shape == (8, 16)


def test_convolutions_take_single_steps(
    spec_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = compile_run(spec_of("model=cnn", "model.channels=[2]"))
    assert program.construct is Construct.STEP
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert program.construct is Construct.LOOP


def test_start_is_the_seed_s(spec_of: Any) -> None:
    program = compile_run(spec_of("seed=5"))
    state, keys, hypers = program.start()
    assert (int(state.step), int(state.failed)) == (0, -1)
    assert set(keys) == {"params", "dropout"}
    want = derive_base_keys(program.plan, seeds={"params": 5, "dropout": 5})
    for name, key in keys.items():
        assert jax.random.key_data(key).tolist() == (
            jax.random.key_data(want[name]).tolist()
        )
    assert {k: float(v) for k, v in hypers.items()} == pytest.approx(program.hypers)
    shapes = jax.tree.map(lambda a: (a.shape, a.dtype), state)
    assert shapes == jax.tree.map(lambda a: (a.shape, a.dtype), program.initial)


def test_a_program_is_traced_and_not_compiled(spec_of: Any) -> None:
    program = compile_run(spec_of())
    assert not {"calls", "initial"} & set(vars(program))


# --- inputs and constants


@pytest.mark.parametrize("name", ["ByFloat", "ByNumpy", "ByCheck"])
def test_rate_that_python_must_know(name: str, spec_of: Any) -> None:
    program = compile_run(spec_of(model=lab_node(name, rate=0.5)))
    assert program.baked == ("model.rate",)
    assert set(program.hypers) == {"optimizer.learning_rate", "task.label_smoothing"}


def test_schedule_that_python_must_know_the_peak_of(spec_of: Any) -> None:
    """optax.warmup_cosine_decay_schedule asks whether its peak is 0."""
    schedule = {
        "_target_": "optax.warmup_cosine_decay_schedule",
        "init_value": 0.0,
        "peak_value": 1e-3,
        "warmup_steps": 2,
        "decay_steps": 6,
    }
    node = {"_target_": "optax.adamw", "learning_rate": schedule, "weight_decay": 1e-4}
    program = compile_run(spec_of(optimizer=node))
    assert program.baked == ("optimizer.learning_rate.peak_value",)
    assert "optimizer.weight_decay" in program.hypers


# --- refusals, one line each, before anything is compiled


def refusal(spec: RunSpec) -> str:
    with pytest.raises(ConfigError) as caught:
        compile_run(spec)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_too_few_logits(spec_of: Any) -> None:
    assert "10 classes" in refusal(spec_of("model.num_outputs=9"))


def test_regression_on_labels_needs_one_value(spec_of: Any) -> None:
    assert "1 value for each row" in refusal(spec_of("task=regression"))


def test_batch_larger_than_the_data(spec_of: Any) -> None:
    assert "data.batch_size" in refusal(spec_of("data.batch_size=5000"))


def test_labels_of_two_axes(make_spec: Any, spec_of: Any, tmp_path: Path) -> None:
    x, y = np.zeros((40, 3), np.float32), np.arange(40).reshape(40, 1) % 3
    np.savez(tmp_path / "data.npz", x=x, y=y)
    refusal(spec_of("data=arrays", f"data.path={tmp_path}/data.npz"))


@pytest.mark.parametrize("name", ["Pair", "Grows"])
def test_model_that_is_another_in_training(name: str, spec_of: Any) -> None:
    assert refusal(spec_of(model=lab_node(name))).startswith("model")


@pytest.mark.parametrize("name", ["optax.lbfgs", f"{PACKAGE}.wants_more"])
def test_optimizer_that_wants_more_than_gradients(name: str, spec_of: Any) -> None:
    text = refusal(spec_of(optimizer={"_target_": name}))
    assert text.startswith("optimizer")
