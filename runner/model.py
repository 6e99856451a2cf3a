# SPDX-License-Identifier: Apache-2.0
"""How the declared model is called, and what it draws when it is."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Key, PyTree

from runner.audit import Missing, Trace, trace_draws
from runner.build import NEEDS_VALUE, build_module
from runner.errors import ConfigError, RunnerError, UnknownStreamError, did_you_mean
from runner.hypers import insert_hypers
from runner.keys import KeyPlan
from runner.parse import Node
from runner.spec import Phase, RunSpec
from runner.targets import first_line

__all__ = ["Model", "split_variables", "trace_model"]


@dataclass(frozen=True)
class Model:
    """The declared model as pure functions of its variables and hypers.

    Args:
        node: Its config.
        trusted: Packages whose code may run.
        dtype: Type in which it computes; parameters and outputs are float32.
    """

    node: Node
    trusted: tuple[str, ...]
    dtype: str = "float32"

    @classmethod
    def of(cls, spec: RunSpec) -> "Model":
        """The model of a run."""
        return cls(spec.model, spec.trusted, spec.train.compute_dtype)

    def build(self, hypers: Mapping[str, Any]) -> nn.Module:
        """The module, with hypers (which may be traced) in their places."""
        node = insert_hypers(self.node, hypers, path="model")
        return build_module(node, path="model", trusted=self.trusted)

    def init(
        self, rngs: Mapping[str, Key[Array, ""]], x: Array, hypers: Mapping[str, Any]
    ) -> PyTree:
        """Every variable collection, by a call that is not for training."""
        module = self.build(hypers)
        return flax.core.unfreeze(
            module.init(dict(rngs), x, **_flags(module, train=False))
        )

    def apply(
        self,
        variables: PyTree,
        x: Array,
        rngs: Mapping[str, Key[Array, ""]],
        hypers: Mapping[str, Any],
        *,
        train: bool,
    ) -> tuple[Array, PyTree]:
        """Outputs, and the collections other than `params` after the call."""
        module = self.build(hypers)
        params, collections = split_variables(variables)
        variables = {"params": _cast(params, self.dtype), **collections}
        x = _cast(x, self.dtype)
        mutable = list(collections) if train else []
        outputs, after = module.apply(
            variables,
            x,
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
    fallback: str,
    x: Any,
    eval_rows: int,
    keys: Any,
    hypers: Any,
) -> dict[Phase, Trace]:
    """Traces the model in every phase; runs nothing.

    Args:
        model: What to trace.
        plan: Resolved streams; a phase is given those that name it, and `init` all,
            so that a draw there which no variable depends on moves nothing else.
        fallback: `rng.fallback`.
        x: Shape and dtype of a microbatch of inputs.
        eval_rows: Rows in one batch of an evaluation.
        keys: Shapes of the streams' keys.
        hypers: Shapes of the hypers.

    Raises:
        UnknownStreamError: the model draws from a stream that nobody declared.
        ConfigError: its own code raised, or a stream's phases leave one out.
    """

    trace = partial(_trace_phase, plan=plan, keys=keys, fallback=fallback)

    def init(rngs: Any, x: Any, hypers: Any) -> Any:
        return model.init(rngs, x, hypers)

    def call(train: bool) -> Any:
        return lambda rngs, x, v, hypers: model.apply(v, x, rngs, hypers, train=train)

    first = trace(Phase.INIT, init, x, hypers)
    test_x = jax.ShapeDtypeStruct((eval_rows, *x.shape[1:]), x.dtype)
    variables = first.outputs
    return {
        Phase.INIT: first,
        Phase.TRAIN: trace(Phase.TRAIN, call(train=True), x, variables, hypers),
        Phase.EVAL: trace(Phase.EVAL, call(train=False), test_x, variables, hypers),
    }


def _trace_phase(
    phase: Phase, function: Any, *args: Any, plan: KeyPlan, keys: Any, fallback: str
) -> Trace:
    """Traces `function(rngs, x, ...)` with the streams that the phase is given."""
    names = keys if phase is Phase.INIT else plan.in_phase(phase)
    rngs = {name: keys[name] for name in names}
    try:
        found = trace_draws(function, rngs, *args)
    except flax.errors.InvalidRngError as error:
        _refuse(error.missing, plan, phase)  # type: ignore[attr-defined]
        raise
    except (RunnerError, *NEEDS_VALUE):
        raise
    except Exception as error:
        kind, _, said = first_line(error).partition(": ")
        raise ConfigError(
            "model",
            f"its code raised {kind} in {phase}: {said}",
            allowed=f"It was called with x of shape {args[0].shape}",
            fix="HYDRA_FULL_ERROR=1 shows where",
        ) from error
    if fallback == "error" or Phase.INIT not in _phases_of(plan, "params"):
        _refuse(found.missing, plan, phase)
    _refuse(_out_of_phase(found, plan, phase), plan, phase)
    return found


def _out_of_phase(trace: Trace, plan: KeyPlan, phase: Phase) -> tuple[Missing, ...]:
    return tuple(
        Missing(draw.stream, draw.path)
        for draw in trace.draws
        if draw.stream is not None and phase not in _phases_of(plan, draw.stream)
    )


def _phases_of(plan: KeyPlan, name: str) -> tuple[Phase, ...]:
    """The phases of a stream; none when it is not declared."""
    return plan.streams[name].spec.phases if name in plan.streams else ()


def _refuse(missing: tuple[Missing, ...], plan: KeyPlan, phase: Phase) -> None:
    if not missing:
        return
    name, path = missing[0].stream, "/".join(missing[0].path) or "the model itself"
    where = f"{path} draws from it in {phase}"
    if name in plan.streams:
        raise ConfigError(
            f"rng.streams.{name}.phases",
            f"must include {phase}",
            got=[str(p) for p in _phases_of(plan, name)],
            allowed=where,
            fix=f"Set rng.streams.{name}.phases to a list with {phase} in it",
        )
    new = f"Set +rng.streams.{name}={{phases: [{phase}], per: [step]}}"
    raise UnknownStreamError(
        "rng.streams",
        "the model asks for a stream that is not declared",
        got=name,
        allowed=f"{where}; declared: {', '.join(plan.streams) or 'none'}",
        fix=did_you_mean(name, plan.streams) or new,
    )


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
