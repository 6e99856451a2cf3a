# SPDX-License-Identifier: Apache-2.0
"""From a spec to a program: builds, traces and checks a run; runs nothing."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from runner.audit.trace import Trace
from runner.data import BatchOrder, Dataset, load_data
from runner.errors import ConfigError, RunnerError
from runner.flags import trace_flags
from runner.hypers import find_hypers
from runner.keys import KeyPlan, derive_base_keys, host_generator, plan_keys
from runner.lift.fields import check_collections, check_streams
from runner.model import Model, split_variables, trace_model
from runner.probe.declared import make_arrays
from runner.probe.probe import Probe, trace_probe
from runner.program import Program, build_run_optimizer, eval_rows, hyper_shapes
from runner.spec import NoDataSpec, Phase, ProbeSpec, RunSpec, StreamKind
from runner.targets import NEEDS_VALUE, first_line
from runner.tasks import make_task
from runner.whole import trace_whole

__all__ = ["compile_run"]


def compile_run(spec: RunSpec) -> Program | Probe:
    """Builds, traces and checks a run; runs and writes nothing.

    Raises:
        ConfigError: the model, the data or the streams don't fit together.
    """
    plan = plan_keys(spec.rng)
    if isinstance(spec.task, ProbeSpec):
        return _compile_probe(spec, spec.task, plan)
    data, order = _load(spec, plan)
    model = Model.of(spec)
    seeds = {name: jax.ShapeDtypeStruct((), jnp.uint32) for name in plan.streams}
    with trace_flags(spec):
        keys = jax.eval_shape(lambda s: derive_base_keys(plan, seeds=s), seeds)

        def trace(hypers: Mapping[str, float]) -> dict[Phase, Trace]:
            return _trace(spec, model, plan, data, keys, hyper_shapes(hypers))

        check_streams(spec.model, path="model", streams=keys)
        candidates = find_hypers(spec)
        hypers, traces = _trace_with_most(trace, candidates)
        collections = traces[Phase.INIT].outputs
        check_collections(spec.model, path="model", collections=collections)
        for phase in (Phase.TRAIN, Phase.EVAL):
            outputs, _ = traces[phase].outputs
            make_task(spec.task).check(outputs, data.y_train, data.classes)
        _check_collections(traces)
        program = Program(
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
        return replace(program, traces=trace_whole(program))


def _compile_probe(spec: RunSpec, task: ProbeSpec, plan: KeyPlan) -> Probe:
    model, arrays = Model.of(spec), make_arrays(task, plan)
    constants = find_hypers(spec)
    if task.loss is None:  # nothing is updated
        constants = {k: v for k, v in constants.items() if k.startswith("model.")}

    def trace(_: Mapping[str, float]) -> dict[Phase, Trace]:
        traces = trace_probe(
            task, plan=plan, model=model, arrays=arrays, constants=constants
        )
        if task.loss is not None:
            _check_optimizer(spec, traces, constants)
        return traces

    streams = [s.name for s in plan.streams.values() if s.spec.kind is StreamKind.JAX]
    check_streams(spec.model, path="model", streams=streams)
    with trace_flags(spec):
        _, traces = _trace_with_most(trace, {})
    collections = traces[Phase.INIT].outputs
    check_collections(spec.model, path="model", collections=collections)
    if task.loss is not None:
        outputs, _ = traces[Phase.EVAL].outputs
        make_task(task).check(outputs, arrays[-1], None)
        _check_collections(traces)
    return Probe(spec, task, plan, model, arrays, constants, traces)


def _load(spec: RunSpec, plan: KeyPlan) -> tuple[Dataset, BatchOrder]:
    assert not isinstance(spec.data, NoDataSpec)  # `runner.spec` refuses it
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
        x=x,
        eval_rows=eval_rows(spec, data),
        keys=keys,
        hypers=hypers,
    )
    _check_optimizer(spec, traces, hypers)
    return traces


def _check_optimizer(spec: RunSpec, traces: Mapping[Phase, Trace], hypers: Any) -> None:
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
