# SPDX-License-Identifier: Apache-2.0
"""From a spec to a program: builds, traces and checks a run; runs nothing."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from runner.audit import Trace
from runner.build import NEEDS_VALUE
from runner.data import BatchOrder, Dataset, load_data
from runner.errors import ConfigError, RunnerError
from runner.hypers import find_hypers
from runner.keys import KeyPlan, derive_base_keys, host_generator, plan_keys, rng_flags
from runner.model import Model, split_variables, trace_model
from runner.program import Program, build_run_optimizer, eval_rows, hyper_shapes
from runner.spec import Phase, RunSpec
from runner.targets import first_line
from runner.tasks import make_task

__all__ = ["compile_run"]


def compile_run(spec: RunSpec) -> Program:
    """Builds, traces and checks a run; runs and writes nothing.

    Raises:
        ConfigError: the model, the data or the streams don't fit together.
    """
    plan = plan_keys(spec.rng)
    data, order = _load(spec, plan)
    model = Model.of(spec)
    seeds = {name: jax.ShapeDtypeStruct((), jnp.uint32) for name in plan.streams}
    with rng_flags(spec.rng):
        keys = jax.eval_shape(lambda s: derive_base_keys(plan, seeds=s), seeds)

        def trace(hypers: Mapping[str, float]) -> dict[Phase, Trace]:
            return _trace(spec, model, plan, data, keys, hyper_shapes(hypers))

        candidates = find_hypers(spec)
        hypers, traces = _trace_with_most(trace, candidates)
        for phase in (Phase.TRAIN, Phase.EVAL):
            outputs, _ = traces[phase].outputs
            make_task(spec.task).check(outputs, data.y_train, data.classes)
        _check_collections(traces)
        return Program(
            spec=spec,
            plan=plan,
            data=data,
            order=order,
            model=model,
            hypers=hypers,
            baked=tuple(path for path in candidates if path not in hypers),
            traces=traces,
            seeds=seeds,
            keys=keys,
        )


def _load(spec: RunSpec, plan: KeyPlan) -> tuple[Dataset, BatchOrder]:
    name = getattr(spec.data, "split", None)
    split = host_generator(plan.stream(name)) if name else None
    data = load_data(spec.data, split=split)
    shuffle = plan.stream(spec.data.shuffle) if spec.data.shuffle else None
    order = BatchOrder(
        rows=len(data.x_train),
        batch_size=spec.data.batch_size,
        generator_of_epoch=lambda epoch: (
            host_generator(shuffle, epoch=epoch) if shuffle else None
        ),
    )
    return data, order


def _trace(
    spec: RunSpec, model: Model, plan: KeyPlan, data: Dataset, keys: Any, hypers: Any
) -> dict[Phase, Trace]:
    rows = spec.data.batch_size // spec.train.accumulation_steps
    x = jax.ShapeDtypeStruct((rows, *data.x_train.shape[1:]), data.x_train.dtype)
    traces = trace_model(
        model,
        plan=plan,
        fallback=spec.rng.fallback,
        x=x,
        eval_rows=eval_rows(spec, data),
        keys=keys,
        hypers=hypers,
    )
    params, _ = split_variables(traces[Phase.INIT].outputs)

    def update(params: Any, hypers: Any) -> Any:
        optimizer = build_run_optimizer(spec, hypers)
        state = optimizer.init(params)
        return optimizer.update(params, state, params, value=jnp.float32(0))

    try:
        jax.eval_shape(update, params, hypers)
    except (RunnerError, *NEEDS_VALUE):
        raise
    except Exception as error:
        raise ConfigError(
            "optimizer",
            f"its update raised {first_line(error)}",
            allowed="It is given gradients, its state, the parameters and the loss",
        ) from error
    return traces


def _check_collections(traces: Mapping[Phase, Trace]) -> None:
    _, before = split_variables(traces[Phase.INIT].outputs)
    _, after = traces[Phase.TRAIN].outputs
    trees = [jax.tree.map(lambda leaf: leaf.shape, tree) for tree in (before, after)]
    if trees[0] != trees[1]:
        raise ConfigError(
            "model",
            "its collections must keep their shapes in training",
            got=trees[1],
            allowed=f"As initialised: {trees[0]}",
        )


def _trace_with_most(
    trace: Callable[[Mapping[str, float]], Any], candidates: Mapping[str, float]
) -> tuple[dict[str, float], Any]:
    """Traces with as many candidates as inputs as the program takes.

    One that Python code must know the value of (an `if`, a `float()`) is a constant.
    """
    try:
        return dict(candidates), trace(candidates)
    except NEEDS_VALUE:
        taken: dict[str, float] = {}
    for path, value in candidates.items():
        try:
            trace({path: value})
        except NEEDS_VALUE:
            continue
        taken[path] = value
    try:
        return taken, trace(taken)
    except NEEDS_VALUE as error:
        raise ConfigError(
            "model",
            f"its Python code must know what the program computes: {first_line(error)}",
            fix="Use jnp.where or jax.lax.cond instead of `if`",
        ) from error
