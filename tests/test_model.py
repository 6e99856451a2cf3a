# SPDX-License-Identifier: Apache-2.0
"""How a declared model is called: flags, collections, streams, mistakes."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from runner.audit.trace import NOT_THERE
from runner.errors import ConfigError, RunnerError
from runner.keys import derive_base_keys, plan_keys
from runner.model import Model, split_variables, trace_model
from runner.parse import Node, freeze
from runner.spec import Phase, RngSpec, StreamKind, StreamSpec

PACKAGE = "lab_of_test_model"
X = jax.ShapeDtypeStruct((4, 3), jnp.float32)
ALL = (Phase.INIT, Phase.TRAIN, Phase.EVAL)


class Flags(nn.Module):
    """Outputs the flag that it was called with, as 1 or 0."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return x


class Deterministic(nn.Module):
    @nn.compact
    def __call__(self, x: Any, deterministic: bool) -> Any:
        return jnp.full((), 1.0 if deterministic else 0.0)


class Train(nn.Module):
    @nn.compact
    def __call__(self, x: Any, *, train: bool = False) -> Any:
        return jnp.full((), 0.0 if train else 1.0)


class Training(nn.Module):
    @nn.compact
    def __call__(self, x: Any, training: bool) -> Any:
        return jnp.full((), 0.0 if training else 1.0)


class Both(nn.Module):
    @nn.compact
    def __call__(self, x: Any, deterministic: bool, train: bool) -> Any:
        assert deterministic is not train
        return jnp.full((), 1.0 if deterministic else 0.0)


class Draws(nn.Module):
    stream: str = "noise"

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(2)(x) + jax.random.normal(self.make_rng(self.stream), ())


class Offset(nn.Module):
    """A parameter that is initialised from another stream."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        value = self.variable(
            "offsets", "value", lambda: jax.random.normal(self.make_rng("noise"), ())
        )
        return nn.Dense(2)(x) + value.value


class Outer(nn.Module):
    stream: str = "noise"

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return Draws(self.stream, name="inner")(x)


class DrawsInTraining(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        y = nn.Dense(2)(x)
        return y + jax.random.normal(self.make_rng("noise"), ()) if train else y


class Raises(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        raise ValueError("first line\nsecond line")


class Branches(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return -x if x.sum() > 0 else x


class Counts(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        seen = self.variable("counts", "seen", lambda: jnp.int32(0))
        if train:
            seen.value = seen.value + 1
        self.sow("intermediates", "x", x)
        return nn.Dense(2)(x)


class CountsAlways(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        seen = self.variable("counts", "seen", lambda: jnp.int32(0))
        if not self.is_initializing():
            seen.value = seen.value + 1
        return nn.Dense(2)(x)


@pytest.fixture(scope="module", autouse=True)
def lab() -> Iterator[None]:
    """A trusted package of the user's: the classes above."""
    package = ModuleType(PACKAGE)
    for name, value in list(globals().items()):
        if isinstance(value, type) and issubclass(value, nn.Module):
            value.__module__ = PACKAGE
            setattr(package, name, value)
    sys.modules[PACKAGE] = package
    yield
    del sys.modules[PACKAGE]


def model(name: str, **arguments: Any) -> Model:
    node = {"_target_": f"{PACKAGE}.{name}", **arguments}
    return Model(Node(freeze(node, path="model")), (PACKAGE,))


def trace(made: Model, hypers: Any = None, **streams: StreamSpec) -> Any:
    streams = {"params": StreamSpec((Phase.INIT,)), **streams}
    plan = plan_keys(RngSpec(streams={k: v for k, v in streams.items() if v}))
    seeds = dict.fromkeys(plan.streams, jax.ShapeDtypeStruct((), jnp.uint32))
    keys = jax.eval_shape(lambda s: derive_base_keys(plan, seeds=s), seeds)
    return trace_model(
        made,
        plan=plan,
        x=X,
        eval_rows=X.shape[0],
        keys=keys,
        hypers=hypers or {},
    )


def refusal(call: Callable[[], Any], kind: type[RunnerError] = ConfigError) -> str:
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


# --- calls


@pytest.mark.parametrize("name", ["Deterministic", "Train", "Training", "Both"])
def test_flags(name: str) -> None:
    made, x = model(name), jnp.zeros((4, 3))
    outputs = {
        train: float(made.apply({"params": {}}, x, {}, {}, train=train)[0])
        for train in (True, False)
    }
    assert outputs == {True: 0.0, False: 1.0}
    made.init({"params": jax.random.key(0)}, x, {})


def test_model_without_a_flag() -> None:
    outputs, rest = model("Flags").apply(
        {"params": {}}, jnp.ones(3), {}, {}, train=True
    )
    assert outputs.tolist() == [1, 1, 1]
    assert rest == {}


def test_collections_change_in_training_alone() -> None:
    made, x = model("Counts"), jnp.ones((4, 3))
    variables = made.init({"params": jax.random.key(0)}, x, {})
    params, rest = split_variables(variables)
    assert set(variables) == {"params", "counts"}  # what is sown is not carried
    assert "params" not in rest
    _, after = made.apply(variables, x, {}, {}, train=True)
    _, evaluated = made.apply({"params": params, **after}, x, {}, {}, train=False)
    assert int(rest["counts"]["seen"]) == 0
    assert int(after["counts"]["seen"]) == int(evaluated["counts"]["seen"]) == 1
    assert set(after) == {"counts"}


def test_hypers_stand_in_their_places() -> None:
    layers = [
        {"_target_": "models.Dropout", "rate": 0.5},
        {"_target_": "models.Dropout", "rate": 0.5},
    ]
    node = {"rate": 0.1, "module": {"_target_": "models.Sequential", "layers": layers}}
    made = Model(Node(freeze(node, path="model")), ())
    built = made.build({"model.module.layers[1].rate": 0.25})
    assert [layer.rate for layer in built.layers] == [0.5, 0.25]


def test_split_variables() -> None:
    assert split_variables({"params": 1, "a": 2}) == (1, {"a": 2})
    assert split_variables({"a": 2}) == ({}, {"a": 2})


# --- streams


def missing(traces: Any, phase: Phase) -> list[tuple[str, str, bool]]:
    """Stream, path and whether `params` came instead, of each that was missing."""
    found = traces[phase].missing
    return [(m.stream, "/".join(m.path), m.substituted) for m in found]


def test_undeclared_stream() -> None:
    """The trace goes on without it, so that all that is missing is known."""
    traces = trace(model("Outer"))
    assert missing(traces, Phase.INIT) == [("noise", "inner", True)]
    assert missing(traces, Phase.TRAIN) == [("noise", "inner", False)]
    (draw,) = traces[Phase.TRAIN].draws
    assert (draw.stream, draw.untraced) == (None, NOT_THERE)


def test_undeclared_stream_in_training() -> None:
    traces = trace(model("DrawsInTraining"))
    assert missing(traces, Phase.INIT) == []
    assert missing(traces, Phase.TRAIN) == [("noise", "", False)]


@pytest.mark.parametrize(
    ("name", "left_out"),
    [("Offset", Phase.INIT), ("Draws", Phase.TRAIN)],
)
def test_phase_that_is_left_out(name: str, left_out: Phase) -> None:
    phases = tuple(p for p in ALL if p is not left_out)
    text = refusal(lambda: trace(model(name), noise=StreamSpec(phases)))
    assert text.startswith(f"rng.streams.noise.phases: must include {left_out} (got [")
    assert "draws from it in" in text


def test_draw_in_init_that_no_variable_depends_on() -> None:
    """It is not run, so it needs no stream in `init`, and moves no other key."""
    without = trace(model("Draws"), noise=StreamSpec((Phase.TRAIN, Phase.EVAL)))
    assert {draw.stream for draw in without[Phase.INIT].draws} == {"params"}
    assert without[Phase.INIT].missing == ()


def test_evaluation_is_given_what_it_asks_for() -> None:
    """`phases` leaves it out; a hazard says so, and its keys are still planned."""
    traces = trace(model("Draws"), noise=StreamSpec((Phase.INIT, Phase.TRAIN)))
    assert traces[Phase.EVAL].streams == ("noise",)
    assert {draw.stream for draw in traces[Phase.EVAL].draws} == {"noise"}


def test_host_stream_is_not_for_the_program() -> None:
    host = StreamSpec(ALL, kind=StreamKind.HOST)
    text = refusal(lambda: trace(model("Draws"), noise=host))
    assert text.startswith("rng.streams.noise.kind: a host stream is not for")


def test_no_params_stream() -> None:
    """Flax has nothing to fall back to."""
    traces = trace(model("Draws"), params=None, noise=StreamSpec(ALL))
    assert {name for name, *_ in missing(traces, Phase.INIT)} == {"params"}


def test_params_drawn_in_training() -> None:
    text = refusal(lambda: trace(model("Draws", stream="params")))
    assert "must include train" in text


def test_fallback_to_params() -> None:
    """As in Flax: a key of `params`, whose counter it moves."""
    traces = trace(model("Draws"), params=StreamSpec(ALL))
    for phase in ALL:
        assert {draw.stream for draw in traces[phase].draws} == {"params"}
        assert missing(traces, phase) == [("noise", "", True)]


def test_declared_streams_are_drawn_from() -> None:
    traces = trace(model("Outer"), noise=StreamSpec(ALL))
    for phase in (Phase.TRAIN, Phase.EVAL):
        (draw,) = traces[phase].draws
        assert (draw.stream, draw.path) == ("noise", ("inner",))
    offset = trace(model("Offset"), noise=StreamSpec((Phase.INIT,)))
    assert {d.stream for d in offset[Phase.INIT].draws} == {"noise", "params"}
    assert offset[Phase.TRAIN].draws == offset[Phase.EVAL].draws == ()


# --- mistakes


def test_code_that_raises() -> None:
    text = refusal(lambda: trace(model("Raises")))
    assert text.startswith("model: its code raised ValueError in init: first line.")
    assert "x of shape (4, 3)" in text


def test_collection_that_an_evaluation_would_change() -> None:
    text = refusal(lambda: trace(model("CountsAlways")))
    assert "ModifyScopeVariableError in eval" in text


def test_arguments_that_are_wrong() -> None:
    refusal(lambda: trace(model("Draws", steam="noise")))


@pytest.mark.promotes
def test_code_that_branches_on_data(make_spec: Any) -> None:
    """Python can't know a traced value: the model's mistake, so one line."""
    from runner.compile import compile_run

    spec = replace(make_spec(f"trusted=[{PACKAGE}]"), model=model("Branches").node)
    text = refusal(lambda: compile_run(spec))
    assert "model" in text


def test_traced_model_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = Draws.__call__

    def spy(self: Any, x: Any) -> Any:
        seen.append(type(x))
        return original(self, x)

    monkeypatch.setattr(Draws, "__call__", spy)
    trace(model("Draws"), noise=StreamSpec(ALL))
    assert seen
    assert not any(issubclass(kind, np.ndarray) for kind in seen)
    assert not any(kind is type(jnp.zeros(())) for kind in seen)


# --- dtypes


def test_bfloat16_is_for_the_call_alone(trusted_module: Any) -> None:
    """Parameters and inputs are cast; outputs are float32, collections as they were."""
    seen: list[str] = []

    class Half(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            kernel = self.param("kernel", nn.initializers.ones, (3, 2))
            mean = self.variable("stats", "mean", jnp.ones, (), jnp.float32)
            self.variable("stats", "count", jnp.zeros, (), jnp.int32)
            if not self.is_initializing():
                seen.append(f"{x.dtype} {kernel.dtype} {mean.value.dtype}")
                mean.value = mean.value.astype(jnp.bfloat16)  # a careless model
            return x @ kernel.astype(x.dtype)

    model = trusted_module(Half, dtype="bfloat16")
    x = jnp.ones((4, 3))
    variables = model.init({"params": jax.random.key(0)}, x, {})
    assert variables["params"]["kernel"].dtype == jnp.float32
    outputs, after = model.apply(variables, x, {}, {}, train=True)
    assert outputs.dtype == jnp.float32
    assert after["stats"]["mean"].dtype == jnp.float32
    assert after["stats"]["count"].dtype == jnp.int32
    assert set(seen) == {"bfloat16 bfloat16 float32"}


def test_integer_inputs_are_not_cast(trusted_module: Any) -> None:
    seen = []

    class Table(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            seen.append(x.dtype)
            return self.param("table", nn.initializers.ones, (5, 2))[x]

    model = trusted_module(Table, dtype="bfloat16")
    x = jnp.zeros(4, jnp.int32)
    variables = model.init({"params": jax.random.key(0)}, x, {})
    model.apply(variables, x, {}, {}, train=True)
    assert set(seen) == {jnp.dtype("int32")}


@pytest.fixture
def trusted_module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A `Model` that builds an instance of a class defined in a test."""

    def make(cls: type[nn.Module], *, dtype: str) -> Model:
        monkeypatch.setattr(Model, "build", lambda self, hypers: cls())
        return Model(Node({"_target_": "x"}), (), dtype)

    return make
