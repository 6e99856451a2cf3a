# SPDX-License-Identifier: Apache-2.0
"""A probe: the model called with declared arrays, and all that comes out.

    arrays    = declared; those of a jax stream are drawn from its key
    variables = model.init(every stream, *inputs)                   in eval mode
    output    = model.apply(variables, *inputs, rngs of step 0)     in `task.mode`

With `task.loss`, `train.steps` updates come between (`runner.step`, as in training),
each with the keys of its step, and the output is that of the last evaluation.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from runner.audit.trace import Trace
from runner.flags import trace_flags
from runner.keys import KeyPlan, derive_base_keys, make_rngs
from runner.mesh import ONE_DEVICE, Layout
from runner.model import Model, split_variables, trace_phase
from runner.observe.observe import observe
from runner.probe.declared import draw_arrays, host_uses, list_legacy_draws
from runner.program import Construct, Sizes, build_run_optimizer
from runner.records.digests import digest_leaves
from runner.spec import Coordinate, Phase, ProbeSpec, RunSpec
from runner.step import Batch, Parts, State, make_step
from runner.tasks import make_task

__all__ = ["Probe", "trace_probe"]


class Calls(NamedTuple):
    """The compiled programs of a probe.

    Each returns beside its result an `Observation` of the keys that were drawn from;
    None unless `rng.observe` asks for it.

    Args:
        setup: (seeds, arrays) to (the state, the batch, the base keys).
        update: (state, batch, keys) to (the next state, metrics); None where nothing
            is updated.
        call: (state, batch, keys) to (the outputs, the loss or None).
    """

    setup: Callable[..., tuple[tuple[State, Batch, dict[str, Any]], Any]]
    update: Callable[..., tuple[tuple[State, dict[str, Any]], Any]] | None
    call: Callable[..., tuple[tuple[Any, Any], Any]]


@dataclass(frozen=True, eq=False)
class Probe:
    """A probe, as a value.

    Args:
        spec: What was asked for.
        task: Its `task`.
        plan: Resolved streams.
        model: How the model is called.
        arrays: Declared arrays, targets last; zeros for those of a jax stream.
        constants: Numbers that would be inputs of a program that trains, by config
            path. Here they are constants, as in a program by hand: XLA folds them
            into others nearby, which rounds otherwise.
        traces: What is drawn in each phase.
        layout: How arrays lie on the devices.
    """

    spec: RunSpec
    task: ProbeSpec
    plan: KeyPlan
    model: Model
    arrays: tuple[np.ndarray, ...]
    constants: Mapping[str, float]
    traces: Mapping[Phase, Trace]
    layout: Layout = ONE_DEVICE

    @property
    def hypers(self) -> dict[str, float]:
        """Numbers that enter the program: none."""
        return {}

    @property
    def baked(self) -> tuple[str, ...]:
        """Config paths of the constants."""
        return tuple(self.constants)

    @property
    def steps(self) -> int:
        """Number of updates."""
        return self.spec.train.steps if self.task.loss else 0

    @property
    def phase(self) -> Phase:
        """The phase of the call whose output is kept."""
        is_eval = self.task.loss is not None or self.task.mode == "eval"
        return Phase.EVAL if is_eval else Phase.TRAIN

    @property
    def sizes(self) -> Sizes:
        """How many values each coordinate takes; a call without updates is step 0."""
        calls = self.steps or int(self.phase is Phase.TRAIN)
        return Sizes(steps=calls, eval_every=self.spec.eval.every)

    @property
    def coordinates(self) -> dict[Phase, frozenset[str]]:
        """The coordinates that each phase has; a step takes all there is: an epoch."""
        called = frozenset({Coordinate.STEP, Coordinate.EPOCH, *self.layout.own_axes})
        return {Phase.INIT: frozenset(), Phase.TRAIN: called, Phase.EVAL: called}

    @property
    def host_uses(self) -> dict[str, tuple[str, ...]]:
        """Config paths that draw from each host stream."""
        return host_uses(self.task, self.plan)

    @property
    def construct(self) -> Construct:
        """One call after the other."""
        return Construct.CALL

    @cached_property
    def initial(self) -> State:
        """Shapes and dtypes of the state."""
        return self._shapes[0]

    @property
    def parameters(self) -> int:
        """Number of trainable scalars."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.initial.params))

    @property
    def data_digest(self) -> str:
        """SHA-256 hex of the arrays that are made on the host."""
        names = self.task.arrays
        return digest_leaves(dict(zip(names, self.arrays, strict=True)))

    @property
    def programs(self) -> dict[str, Any]:
        """The compiled programs, by name."""
        return {name: call for name, call in self.calls._asdict().items() if call}

    def start(self) -> tuple[tuple[State, Batch, dict[str, Any]], Any]:
        """The state before step 0, the arrays, the base keys; and what was observed."""
        seeds = {name: np.uint32(s.seed) for name, s in self.plan.streams.items()}
        return self.calls.setup(seeds, self.arrays)

    @cached_property
    def calls(self) -> Calls:
        """The programs, compiled beside each other when first asked for."""
        args, same = self._shapes, self.layout.replicated
        lies = (same, self.layout.rows, same)
        with trace_flags(self.spec):  # they count while a program is traced
            setup = self._jit(_make_setup(self), takes=(same, same), gives=lies)
            lowered = [setup.lower(self._seeds, self.arrays), None]
            if self.steps:
                update = self._jit(_make_update(self), takes=lies, gives=same)
                lowered[1] = update.lower(*args)
            lowered.append(self._jit(_make_call(self), takes=lies).lower(*args))
        with ThreadPoolExecutor() as pool:
            return Calls(*pool.map(lambda each: each and each.compile(), lowered))

    def _jit(
        self, function: Callable[..., Any], *, takes: Any, gives: Any = None
    ) -> Any:
        def unobserved(*args: Any) -> tuple[Any, None]:
            return function(*args), None

        observed = observe(function) if self.spec.rng.observe else unobserved
        if self.layout.mesh is None:
            return jax.jit(observed)
        return jax.jit(observed, in_shardings=takes, out_shardings=(gives, None))

    @property
    def _seeds(self) -> dict[str, jax.ShapeDtypeStruct]:
        seed = jax.ShapeDtypeStruct((), jnp.uint32)
        return dict.fromkeys(self.plan.streams, seed)

    @cached_property
    def _shapes(self) -> tuple[State, Batch, dict[str, Any]]:
        with trace_flags(self.spec):
            shapes: tuple[State, Batch, dict[str, Any]]
            shapes = jax.eval_shape(_make_setup(self), self._seeds, self.arrays)
        return shapes


def trace_probe(
    task: ProbeSpec,
    *,
    plan: KeyPlan,
    model: Model,
    arrays: tuple[np.ndarray, ...],
    constants: Mapping[str, float],
    layout: Layout = ONE_DEVICE,
) -> dict[Phase, Trace]:
    """Traces the phases that a probe has; runs nothing.

    Raises: as `runner.model.trace_model`.
    """
    seeds = {name: jax.ShapeDtypeStruct((), jnp.uint32) for name in plan.streams}
    keys = jax.eval_shape(lambda s: derive_base_keys(plan, seeds=s), seeds)
    trace = partial(trace_phase, plan=plan, keys=keys)
    inputs = arrays[: len(task.inputs)]

    def init(rngs: Any, _: Any, arrays: Any) -> Any:
        drawn = draw_arrays(task, plan, keys=rngs, arrays=arrays)
        called = layout.first_rows(drawn[: len(task.inputs)])
        return model.init(rngs, called, constants), drawn

    rows, same = layout.row_spec, P()

    def call(train: bool) -> Any:
        def shard(rngs: Any, x: Any, variables: Any) -> Any:
            outputs, after = model.apply(variables, x, rngs, constants, train=train)
            return layout.as_rows(outputs), after

        return layout.on_shards(shard, takes=(same, rows, same), gives=(rows, same))

    first = trace(Phase.INIT, init, inputs, arrays)
    variables, _ = first.outputs
    draws = (*first.draws, *list_legacy_draws(task))
    found = {Phase.INIT: replace(first, draws=draws, outputs=variables)}
    if task.mode == "train":
        found[Phase.TRAIN] = trace(Phase.TRAIN, call(train=True), inputs, variables)
    if task.mode == "eval" or task.loss is not None:
        found[Phase.EVAL] = trace(Phase.EVAL, call(train=False), inputs, variables)
    return found


def _make_setup(probe: Probe) -> Callable[..., tuple[State, Batch, dict[str, Any]]]:
    task, constants = probe.task, probe.constants

    def setup(seeds: Any, arrays: Any) -> Any:
        base = derive_base_keys(probe.plan, seeds=seeds)
        drawn = draw_arrays(task, probe.plan, keys=base, arrays=arrays)
        inputs, targets = drawn[: len(task.inputs)], drawn[len(task.inputs) :]
        called = probe.layout.first_rows(inputs)
        variables = probe.model.init(base, called, constants)
        params, collections = split_variables(variables)
        state = State(
            step=jnp.int32(0),
            params=params,
            collections=collections,
            opt_state=(),
            carried={},
            failed=jnp.int32(-1),
        )
        if probe.steps:
            state = state._replace(
                opt_state=build_run_optimizer(probe.spec, constants).init(params),
                carried={name: base[name] for name in probe.plan.carried()},
            )
        return state, Batch(inputs, targets[0] if targets else None), base

    return setup


def _make_update(probe: Probe) -> Callable[..., tuple[State, dict[str, Any]]]:
    parts = Parts(
        apply=probe.model.apply,
        task=make_task(probe.task),
        optimizer=partial(build_run_optimizer, probe.spec),
        rngs=_rngs(probe, Phase.TRAIN),
        max_norm=probe.spec.train.max_norm is not None,
        mean=probe.layout.mean,
    )
    step, rows, same = make_step(parts), probe.layout.row_spec, P()
    return probe.layout.on_shards(
        lambda state, batch, keys: step(state, batch, keys, probe.constants),
        takes=(same, rows, same),
    )


def _make_call(probe: Probe) -> Callable[..., tuple[Any, Any]]:
    rngs_of, task = _rngs(probe, probe.phase), probe.task
    train, layout = probe.phase is Phase.TRAIN, probe.layout

    def call(state: State, batch: Batch, keys: Any) -> tuple[Any, Any]:
        rngs, _ = rngs_of(keys, {}, state.step, None)
        variables = {"params": state.params, **state.collections}
        given = (variables, batch.x, rngs, probe.constants)
        outputs, _ = probe.model.apply(*given, train=train)
        if task.loss is None:
            return layout.as_rows(outputs), None
        loss = make_task(task).loss(outputs, batch.y, probe.constants)
        return layout.as_rows(outputs), layout.mean(loss)

    rows, same = layout.row_spec, P()
    return layout.on_shards(call, takes=(same, rows, same), gives=(rows, same))


def _rngs(probe: Probe, phase: Phase) -> Callable[..., Any]:
    return make_rngs(
        probe.plan,
        phase=phase,
        names=probe.traces[phase].streams,
        coordinates=probe.coordinates[phase],
        steps_per_epoch=probe.sizes.steps_per_epoch,
    )
