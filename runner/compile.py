# SPDX-License-Identifier: Apache-2.0
"""From a spec to a program: builds, traces and checks a run; runs nothing."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from runner.audit import Trace
from runner.data import BatchOrder, Dataset, load_data
from runner.hypers import find_hypers
from runner.keys import KeyPlan, derive_base_keys, host_generator, plan_keys, rng_flags
from runner.model import Model, split_variables, trace_model
from runner.program import Program, build_run_optimizer, hyper_shapes
from runner.spec import Phase, RunSpec
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
        outputs, _ = traces[Phase.EVAL].outputs
        make_task(spec.task).check(outputs, data.y_train, data.classes)
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
        model, plan=plan, fallback=spec.rng.fallback, x=x, keys=keys, hypers=hypers
    )
    params, _ = split_variables(traces[Phase.INIT].outputs)

    def update(params: Any, hypers: Any) -> Any:
        optimizer = build_run_optimizer(spec, hypers)
        state = optimizer.init(params)
        return optimizer.update(params, state, params, value=jnp.float32(0))

    jax.eval_shape(update, params, hypers)
    return traces


def _trace_with_most(
    trace: Callable[[Mapping[str, float]], Any], candidates: Mapping[str, float]
) -> tuple[dict[str, float], Any]:
    """Traces with as many candidates as inputs as the program takes.

    One that Python code must know the value of (an `if`, a `float()`) is a constant.
    """
    try:
        return dict(candidates), trace(candidates)
    except jax.errors.ConcretizationTypeError:
        taken = {}
    for path, value in candidates.items():
        try:
            trace({path: value})
        except jax.errors.ConcretizationTypeError:
            continue
        taken[path] = value
    return taken, trace(taken)
