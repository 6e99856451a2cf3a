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
from runner.mesh import Layout, make_layout
from runner.model import Model, split_variables, trace_model
from runner.penalties import split_losses
from runner.probe.declared import make_arrays
from runner.probe.probe import Probe, trace_probe
from runner.program import (
    Program,
    build_run_optimizer,
    eval_rows,
    hyper_shapes,
    rows_of_call,
)
from runner.spec import NoDataSpec, Phase, ProbeSpec, RunSpec, Strategy, StreamKind
from runner.targets import NEEDS_VALUE, first_line
from runner.tasks import make_task
from runner.whole import trace_whole

__all__ = ["compile_run", "load_rows", "make_order"]


def compile_run(spec: RunSpec) -> Program | Probe:
    """Builds, traces and checks a run; runs and writes nothing.

    Raises:
        ConfigError: the model, the data or the streams don't fit together.
    """
    plan = plan_keys(spec.rng, axes=spec.mesh.axes)
    if isinstance(spec.task, ProbeSpec):
        return _compile_probe(spec, spec.task, plan)
    layout = make_layout(spec)
    data = load_rows(spec, plan)
    order = make_order(spec, plan, rows=len(data.x_train))
    _check_train_rows(spec, rows=len(data.x_train))
    model = Model.of(spec, layout)
    seeds = {name: jax.ShapeDtypeStruct((), jnp.uint32) for name in plan.streams}
    with trace_flags(spec):
        keys = jax.eval_shape(lambda s: derive_base_keys(plan, seeds=s), seeds)

        def trace(hypers: Mapping[str, float]) -> dict[Phase, Trace]:
            return _trace(spec, model, plan, data, keys, hyper_shapes(hypers), layout)

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
            layout=layout,
        )
        program = replace(program, traces=trace_whole(program))
        _ = program.shardings  # refuses rules that nothing answers to
        if spec.mesh.strategy is Strategy.EXACT:
            _refuse_changing(program)
        return program


def _compile_probe(spec: RunSpec, task: ProbeSpec, plan: KeyPlan) -> Probe:
    layout = make_layout(spec)
    model, arrays = Model.of(spec, layout), make_arrays(task, plan)
    _check_rows(task, arrays, layout)
    constants = find_hypers(spec)
    if task.loss is None:  # nothing is updated
        constants = {k: v for k, v in constants.items() if k.startswith("model.")}

    def trace(_: Mapping[str, float]) -> dict[Phase, Trace]:
        traces = trace_probe(
            task,
            plan=plan,
            model=model,
            arrays=arrays,
            constants=constants,
            layout=layout,
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
    return Probe(spec, task, plan, model, arrays, constants, traces, layout)


def _check_train_rows(spec: RunSpec, *, rows: int) -> None:
    more = spec.eval.train_rows
    if isinstance(more, int) and more > rows:
        raise ConfigError(
            "eval.train_rows",
            f"must not exceed the {rows} rows to train on",
            got=more,
            fix="Set eval.train_rows=all",
        )


def _check_rows(task: ProbeSpec, arrays: tuple[Any, ...], layout: Layout) -> None:
    """Each array of a probe is a batch, whose rows are cut up over the mesh."""
    for path, array in zip(task.arrays, arrays, strict=True):
        if layout.row_axes and (not array.ndim or len(array) % layout.row_shards):
            raise ConfigError(
                path,
                f"its rows must divide into {layout.row_shards} parts over the mesh",
                got=f"shape {list(array.shape)}",
                fix="Declare more rows, or set mesh=none",
            )


def load_rows(spec: RunSpec, plan: KeyPlan) -> Dataset:
    """The rows of a run; a stream of the plan chooses those to test on."""
    assert not isinstance(spec.data, NoDataSpec)  # `runner.spec` refuses it
    name = getattr(spec.data, "split", None)
    split = host_generator(plan.stream(name)) if name else None
    return load_data(spec.data, split=split)


def make_order(spec: RunSpec, plan: KeyPlan, *, rows: int) -> BatchOrder:
    """Which of its rows each step of a run reads."""
    shuffle = plan.stream(spec.data.shuffle) if spec.data.shuffle else None
    return BatchOrder(
        rows=rows,
        batch_size=spec.data.batch_size,
        generator_of_epoch=lambda epoch: (
            host_generator(shuffle, epoch=epoch) if shuffle else None
        ),
    )


def _trace(
    spec: RunSpec,
    model: Model,
    plan: KeyPlan,
    data: Dataset,
    keys: Any,
    hypers: Any,
    layout: Layout,
) -> dict[Phase, Trace]:
    rows = rows_of_call(spec, layout)
    x = jax.ShapeDtypeStruct((rows, *data.x_train.shape[1:]), data.x_train.dtype)
    traces = trace_model(
        model,
        plan=plan,
        x=x,
        eval_rows=eval_rows(spec, data, layout) // layout.own_shards,
        keys=keys,
        hypers=hypers,
        spread=layout.on_shards,
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


def _refuse_changing(program: Program) -> None:
    """Refuses collections that microbatches hand on, which devices do not.

    Raises:
        ConfigError: the model changes one in training.
    """

    def after(collections: Any, params: Any, x: Any, rngs: Any, hypers: Any) -> Any:
        variables = {"params": params, **collections}
        _, after = program.model.apply(variables, x, rngs, hypers, train=True)
        return split_losses(after)[1]

    state, names = program.initial, program.traces[Phase.TRAIN].streams
    rngs = {name: program.keys[name] for name in names}
    hypers = hyper_shapes(program.hypers)
    args = (state.collections, state.params, program.microbatch, rngs, hypers)
    jaxpr = jax.make_jaxpr(after)(*args).jaxpr
    paths, _ = jax.tree_util.tree_flatten_with_path(state.collections)
    changed = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, _), before, now in zip(
            paths, jaxpr.invars[: len(paths)], jaxpr.outvars, strict=True
        )
        if before is not now
    ]
    if changed:
        raise ConfigError(
            "mesh.strategy",
            "exact spreads microbatches over devices, and this model hands "
            f"{changed[0]} on from one to the next",
            got=str(Strategy.EXACT),
            fix=f"Set mesh.strategy={Strategy.JIT}",
        )


def _check_collections(traces: Mapping[Phase, Trace]) -> None:
    _, before = split_variables(traces[Phase.INIT].outputs)
    _, after = traces[Phase.TRAIN].outputs
    _, after = split_losses(after)
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
