# SPDX-License-Identifier: Apache-2.0
"""How the declared model is called, and what it draws when it is."""

import contextlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Key, PyTree

from runner.audit.trace import Trace, trace_draws
from runner.build import build_module
from runner.errors import ConfigError, RunnerError
from runner.hypers import insert_hypers
from runner.keys import KeyPlan, key_shape
from runner.mesh import ONE_DEVICE, Layout
from runner.parse import Node
from runner.penalties import LOSSES, split_losses
from runner.spec import Phase, RunSpec, StreamKind
from runner.targets import NEEDS_VALUE, first_line

__all__ = ["Inputs", "Model", "split_variables", "trace_model", "trace_phase"]

Inputs = Array | tuple[Array, ...]
"""What a model is called with: one array, or several in order."""


@dataclass(frozen=True)
class Model:
    """The declared model as pure functions of its variables and hypers.

    Args:
        node: Its config.
        trusted: Packages whose code may run.
        dtype: Type in which it computes; parameters and outputs are float32.
        layout: What logical names of its activations mean in training.
    """

    node: Node
    trusted: tuple[str, ...]
    dtype: str = "float32"
    layout: Layout = ONE_DEVICE

    @classmethod
    def of(cls, spec: RunSpec, layout: Layout = ONE_DEVICE) -> "Model":
        """The model of a run."""
        return cls(spec.model, spec.trusted, spec.train.compute_dtype, layout)

    def build(self, hypers: Mapping[str, Any]) -> nn.Module:
        """The module, with hypers (which may be traced) in their places."""
        node = insert_hypers(self.node, hypers, path="model")
        return build_module(node, path="model", trusted=self.trusted)

    def init(
        self, rngs: Mapping[str, Key[Array, ""]], x: Inputs, hypers: Mapping[str, Any]
    ) -> PyTree:
        """Every variable collection, by a call that is not for training."""
        return nn.meta.unbox(self.init_named(rngs, x, hypers))

    def init_named(
        self, rngs: Mapping[str, Key[Array, ""]], x: Inputs, hypers: Mapping[str, Any]
    ) -> PyTree:
        """The same, in boxes that name the axes where the model names any.

        What modules sow into `losses` is of a step, and no variable.
        """
        module = self.build(hypers)
        variables = module.init(dict(rngs), *_as_args(x), **_flags(module, train=False))
        return split_losses(flax.core.unfreeze(variables))[1]

    def apply(
        self,
        variables: PyTree,
        x: Inputs,
        rngs: Mapping[str, Key[Array, ""]],
        hypers: Mapping[str, Any],
        *,
        train: bool,
    ) -> tuple[Array, PyTree]:
        """Outputs, and the collections other than `params` after the call.

        In training, what modules sowed into `losses` is among them.
        """
        module = self.build(hypers)
        params, collections = split_variables(variables)
        variables = {"params": _cast(params, self.dtype), **collections}
        x = _cast(x, self.dtype)
        mutable = [*collections, LOSSES] if train else []
        with self.layout.naming() if train else contextlib.nullcontext():
            outputs, after = module.apply(
                variables,
                *_as_args(x),
                **_flags(module, train=train),
                rngs=dict(rngs),
                mutable=mutable,
            )
        after = _cast_like(flax.core.unfreeze(after), collections)
        return _cast(outputs, "float32"), {**collections, **after}


def split_variables(variables: Mapping[str, Any]) -> tuple[PyTree, dict[str, PyTree]]:
    """Parameters, and every other collection."""
    rest = {name: tree for name, tree in variables.items() if name != "params"}
    return variables.get("params", {}), rest


def trace_model(
    model: Model,
    *,
    plan: KeyPlan,
    x: Any,
    eval_rows: int,
    keys: Any,
    hypers: Any,
    spread: Callable[[Any], Any] = lambda function: function,
) -> dict[Phase, Trace]:
    """Traces the model in every phase; runs nothing.

    Args:
        model: What to trace.
        plan: Resolved streams; a phase is given those that name it, and `init` all,
            so that a draw there which no variable depends on moves nothing else.
        x: Shape and dtype of a microbatch of inputs.
        eval_rows: Rows in one batch of an evaluation.
        keys: Shapes of the streams' keys.
        hypers: Shapes of the hypers.
        spread: Has each device run a function by itself.

    Raises:
        ConfigError: its own code raised, or a stream's phases leave one out.
    """

    trace = partial(trace_phase, plan=plan, keys=keys)

    def init(rngs: Any, x: Any, hypers: Any) -> Any:
        return model.init(rngs, x, hypers)

    def call(train: bool) -> Any:
        return spread(
            lambda rngs, x, v, hypers: model.apply(v, x, rngs, hypers, train=train)
        )

    first = trace(Phase.INIT, init, x, hypers)
    test_x = jax.ShapeDtypeStruct((eval_rows, *x.shape[1:]), x.dtype)
    variables = first.outputs
    return {
        Phase.INIT: first,
        Phase.TRAIN: trace(Phase.TRAIN, call(train=True), x, variables, hypers),
        Phase.EVAL: trace(Phase.EVAL, call(train=False), test_x, variables, hypers),
    }


def trace_phase(
    phase: Phase, function: Any, *args: Any, plan: KeyPlan, keys: Any
) -> Trace:
    """Traces `function(rngs, x, ...)` with the streams that the phase is given.

    An evaluation is given a stream that its model asks for, also where `phases`
    leaves it out; `runner.hazards.find` warns of it.

    Raises: as `trace_model`.
    """
    names = tuple(keys if phase is Phase.INIT else plan.in_phase(phase))
    trace = partial(_trace, phase, function, *args, plan=plan, keys=keys)
    found = trace(names=names)
    late = [m.stream for m in found.missing if m.lift is None and m.stream in keys]
    if phase is Phase.EVAL and late:
        found = trace(names=(*names, *dict.fromkeys(late)))
    for missing in found.missing:
        if missing.lift is None and missing.stream in plan.streams:
            _refuse(missing.stream, missing.path, plan, phase)
    for draw in found.draws:
        stream = draw.stream
        if stream is not None and phase not in (Phase.EVAL, *_phases_of(plan, stream)):
            _refuse(stream, draw.path, plan, phase)
    return found


def _trace(
    phase: Phase,
    function: Any,
    *args: Any,
    names: tuple[str, ...],
    plan: KeyPlan,
    keys: Any,
) -> Trace:
    rngs = {name: keys[name] for name in names}
    try:
        return trace_draws(function, rngs, *args, spare=key_shape(plan.impl))
    except (RunnerError, *NEEDS_VALUE):
        raise
    except Exception as error:
        kind, _, said = first_line(error).partition(": ")
        raise ConfigError(
            "model",
            f"its code raised {kind} in {phase}: {said}",
            allowed=f"It was called with {_spell_shapes(args[0])}",
            fix="HYDRA_FULL_ERROR=1 shows where",
        ) from error


def _phases_of(plan: KeyPlan, name: str) -> tuple[Phase, ...]:
    """The phases of a stream; none when it is not declared."""
    return plan.streams[name].spec.phases if name in plan.streams else ()


def _refuse(name: str, path: tuple[str, ...], plan: KeyPlan, phase: Phase) -> None:
    where = f"{'/'.join(path) or 'the model itself'} draws from it in {phase}"
    if plan.streams[name].spec.kind is StreamKind.HOST:
        raise ConfigError(
            f"rng.streams.{name}.kind",
            "a host stream is not for the compiled program",
            got="host",
            allowed=where,
            fix=f"Set rng.streams.{name}.kind=jax",
        )
    raise ConfigError(
        f"rng.streams.{name}.phases",
        f"must include {phase}",
        got=[str(p) for p in _phases_of(plan, name)],
        allowed=where,
        fix=f"Set rng.streams.{name}.phases to a list with {phase} in it",
    )


def _as_args(x: Inputs) -> tuple[Array, ...]:
    return x if isinstance(x, tuple) else (x,)


def _spell_shapes(x: Any) -> str:
    if not isinstance(x, tuple):
        return f"x of shape {x.shape}"
    shapes = ", ".join(str(tuple(array.shape)) for array in x)
    return f"arrays of shapes {shapes}" if x else "no arrays"


def _cast(tree: PyTree, dtype: str) -> PyTree:
    """Floating-point leaves in another type; others as they are."""

    def cast(leaf: Array) -> Array:
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(dtype) if floating else leaf

    return jax.tree.map(cast, tree)


def _cast_like(tree: dict[str, PyTree], like: dict[str, PyTree]) -> dict[str, PyTree]:
    """Collections in the types that they had; one of another shape is left alone."""

    def cast(name: str, after: PyTree) -> PyTree:
        structures: list[Any] = [jax.tree.structure(t) for t in (after, like.get(name))]
        if structures[0] != structures[1]:
            return after
        return jax.tree.map(lambda new, old: new.astype(old.dtype), after, like[name])

    return {name: cast(name, after) for name, after in tree.items()}


def _flags(module: nn.Module, *, train: bool) -> dict[str, Any]:
    """Whichever of Flax's words for the mode the module's `__call__` takes."""
    words = {"deterministic": not train, "train": train, "training": train}
    taken = inspect.signature(type(module).__call__).parameters
    return {word: value for word, value in words.items() if word in taken}
