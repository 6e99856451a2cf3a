# SPDX-License-Identifier: Apache-2.0
"""A run as a value: its traced model, its data, and its compiled calls.

`runner.compile` makes one; it can be planned, written to a ledger, and run by
`runner.loop`. Nothing is compiled before it is needed.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property, partial, wraps
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import PartitionSpec

from runner.audit.trace import Trace
from runner.build import build_optimizer
from runner.chunk import make_loop, make_single, take_rows
from runner.data import BatchOrder, Dataset
from runner.exact import make_exact_gradients, run_on_each
from runner.fingerprint import fingerprint
from runner.flags import trace_flags
from runner.hypers import insert_hypers
from runner.keys import (
    KeyPlan,
    advance_carry,
    derive_base_keys,
    make_rngs,
    rng_flags,
)
from runner.mesh import BATCH, ONE_DEVICE, Layout
from runner.model import Model, split_variables
from runner.named import (
    Activation,
    check_parameters,
    check_rules,
    find_activations,
)
from runner.observe.observe import Observation, observe
from runner.spec import Coordinate, Phase, RunSpec, Strategy
from runner.step import Batch, Parts, State, make_eval_step, make_step
from runner.tasks import make_task

__all__ = [
    "Compiled",
    "Construct",
    "Program",
    "Sizes",
    "build_run_optimizer",
    "hyper_shapes",
    "make_parts",
    "make_setup",
    "make_start",
    "name_leaves",
    "rows_of_call",
    "spread_step",
]

_AUTO_WINDOW = 512  # steps whose metrics and row numbers one call can hold
_AUTO_EVAL_ROWS = 1024


class Construct(StrEnum):
    """How the compiled program takes its steps; part of the result's bits."""

    LOOP = "loop"
    STEP = "step"
    CALL = "call"


@dataclass(frozen=True)
class Sizes:
    """How many values the coordinates take in the planned run; the ledger has them.

    Args:
        steps: Calls in train mode, but for microbatches.
        steps_per_epoch: Steps in an epoch.
        microbatches: Parts of a batch.
        eval_batches: Batches in an evaluation.
        eval_every: Steps between evaluations; None is at the end alone.
    """

    steps: int
    steps_per_epoch: int = 1
    microbatches: int = 1
    eval_batches: int = 1
    eval_every: int | None = None


class Compiled(Protocol):
    """What the plan, the ledger, the hazards and the record know of a run.

    A `Program` trains; a `Probe` calls its model with declared arrays.
    """

    @property
    def spec(self) -> RunSpec:
        """What was asked for."""

    @property
    def plan(self) -> KeyPlan:
        """Resolved streams."""

    @property
    def hypers(self) -> Mapping[str, float]:
        """Numbers that enter the program, by config path."""

    @property
    def baked(self) -> tuple[str, ...]:
        """Candidates that the program needs as constants."""

    @property
    def traces(self) -> Mapping[Phase, Trace]:
        """What is drawn in each phase."""

    @property
    def coordinates(self) -> Mapping[Phase, frozenset[str]]:
        """The coordinates, and axes of the mesh, that each phase has."""

    @property
    def sizes(self) -> Sizes:
        """How many values they take."""

    @property
    def steps(self) -> int:
        """Number of updates."""

    @property
    def host_uses(self) -> Mapping[str, tuple[str, ...]]:
        """Config paths that draw from each host stream."""

    @property
    def construct(self) -> Construct:
        """How the steps are taken."""

    @property
    def initial(self) -> State:
        """Shapes and dtypes of the state."""

    @property
    def parameters(self) -> int:
        """Number of trainable scalars."""

    @property
    def data_digest(self) -> str:
        """SHA-256 hex of what the model is given."""

    @property
    def programs(self) -> Mapping[str, Any]:
        """The compiled programs (`jax.stages.Compiled`), by name."""

    @property
    def layout(self) -> Layout:
        """How arrays lie on the devices."""


class Calls(NamedTuple):
    """The compiled programs of a run.

    `observed` is an `Observation` of the keys that were drawn from; None unless
    `rng.observe` asks for it, which changes nothing else.

    Args:
        setup: (seeds, hypers) to (the state before step 0, the base keys), observed.
        train: (state, window, data, keys, hypers) to state, (metrics, observed), and
            the first step that was not finite. `window` is {first: step, rows:
            [steps, batch_size], steps: count}. The construct `loop` takes `steps`
            steps and returns metrics of shape [steps]; `step` takes one, and returns
            scalars. The state is donated.
        evaluate: (sums, state, at, data, keys, hypers) to sums of the metrics, and
            observed. `at` is {rows: [rows], weights: [rows], part: number of the
            batch}.
        digest: state to its fingerprint.
    """

    setup: Callable[..., tuple[tuple[State, dict[str, Any]], Any]]
    train: Callable[..., tuple[State, Any, Any]]
    evaluate: Callable[..., tuple[Any, Any]]
    digest: Callable[[State], Any]


@dataclass(frozen=True, eq=False)
class Program:
    """A run, as a value.

    Args:
        spec: What was asked for.
        plan: Resolved streams.
        data: The rows.
        order: Which rows each step takes.
        model: How the model is called.
        hypers: Numbers that enter the program, by config path.
        baked: Candidates that the program needs as constants.
        traces: What the model draws in each phase.
        seeds: Shapes and dtypes of the streams' seeds.
        keys: Shapes and dtypes of the streams' base keys.
        layout: How arrays lie on the devices.
    """

    spec: RunSpec
    plan: KeyPlan
    data: Dataset
    order: BatchOrder
    model: Model
    hypers: Mapping[str, float]
    baked: tuple[str, ...]
    traces: Mapping[Phase, Trace]
    seeds: Mapping[str, Any]
    keys: Mapping[str, Any]
    layout: Layout = ONE_DEVICE

    @property
    def construct(self) -> Construct:
        """Convolutions in a loop are slow on CPU and round otherwise."""
        convolves = "conv_general_dilated" in self.traces[Phase.TRAIN].primitives
        on_cpu = jax.default_backend() == "cpu"
        return Construct.STEP if on_cpu and convolves else Construct.LOOP

    @property
    def sizes(self) -> Sizes:
        """How many values each coordinate takes."""
        return Sizes(
            steps=self.spec.train.steps,
            steps_per_epoch=self.order.steps_per_epoch,
            microbatches=self.spec.train.accumulation_steps,
            eval_batches=self.eval_batches,
            eval_every=self.spec.eval.every,
        )

    @property
    def steps(self) -> int:
        """Number of updates."""
        return self.spec.train.steps

    @property
    def host_uses(self) -> dict[str, tuple[str, ...]]:
        """Config paths that draw from each host stream."""
        named = {f: getattr(self.spec.data, f, None) for f in ("shuffle", "split")}
        return {
            name: tuple(f"data.{field}" for field in named if named[field] == name)
            for name in named.values()
            if name is not None
        }

    @property
    def data_digest(self) -> str:
        """SHA-256 hex of the rows."""
        return self.data.digest()

    @property
    def programs(self) -> dict[str, Any]:
        """The compiled programs, by name."""
        return self.calls._asdict()

    @property
    def microbatch(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of the inputs of one call of the model."""
        rows = rows_of_call(self.spec, self.layout)
        x = self.data.x_train
        return jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype)

    @property
    def window(self) -> int:
        """Most steps in one call."""
        per_call = self.spec.train.steps_per_call
        most = _AUTO_WINDOW if per_call == "auto" else per_call
        return min(most, self.spec.train.steps)

    @property
    def is_paced(self) -> bool:
        """Whether as many steps go into a call as take a while, or always as many."""
        return self.spec.train.steps_per_call == "auto"

    @property
    def rounding(self) -> str:
        """Why floats may round otherwise than in the run alone; empty: they don't."""
        return ""

    @property
    def eval_rows(self) -> int:
        """Rows in one batch of an evaluation."""
        return eval_rows(self.spec, self.data, self.layout)

    @property
    def eval_sets(self) -> dict[str, range]:
        """The rows that an evaluation reads, by what stands before their metrics.

        They are numbered on: the test rows, then those to train on.
        """
        tests, more = len(self.data.x_test), self.spec.eval.train_rows
        more = len(self.data.x_train) if more == "all" else more or 0
        sets = {"": range(tests), "train_": range(tests, tests + more)}
        return {name: rows for name, rows in sets.items() if rows}

    @property
    def eval_batches(self) -> int:
        """Batches in an evaluation; none has rows of two sets."""
        return sum(-(-len(rows) // self.eval_rows) for rows in self.eval_sets.values())

    @property
    def initial(self) -> State:
        """Shapes and dtypes of the state."""
        state: State = self.traces[Phase.INIT].outputs
        return state

    @property
    def parameters(self) -> int:
        """Number of trainable scalars."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.initial.params))

    @property
    def coordinates(self) -> dict[Phase, frozenset[str]]:
        """The coordinates, and axes of the mesh, that each phase has."""
        in_train: set[str] = {Coordinate.STEP, Coordinate.EPOCH}
        in_train |= set(self.layout.own_axes)
        in_eval = set(in_train)
        if self.spec.train.accumulation_steps > 1:
            in_train.add(Coordinate.MICROBATCH)
        if self.eval_batches > 1:
            in_eval.add(Coordinate.MICROBATCH)
        return {
            Phase.INIT: frozenset(),
            Phase.TRAIN: frozenset(in_train),
            Phase.EVAL: frozenset(in_eval),
        }

    def place_data(self) -> tuple[Batch, Batch]:
        """The rows to train on, and those of an evaluation, on the device."""
        data, place = self.data, self.layout.place
        train: Batch = place(Batch(data.x_train, data.y_train))
        test = Batch(data.x_test, data.y_test)
        if (more := self.eval_sets.get("train_")) is not None:
            first = Batch(data.x_train[: len(more)], data.y_train[: len(more)])
            test = Batch(*map(np.concatenate, zip(test, first, strict=True)))
        return train, place(test)

    def start(self) -> tuple[State, dict[str, Any], dict[str, Any]]:
        """The state before step 0, the streams' base keys, and the hypers."""
        return self.start_observed()[0]

    def start_observed(self) -> tuple[tuple[State, Any, Any], Observation | None]:
        """The same, and the keys that the initialisation drew from."""
        hypers = {path: jnp.asarray(value) for path, value in self.hypers.items()}
        hypers = self.layout.place(hypers)
        seeds = {name: np.uint32(s.seed) for name, s in self.plan.streams.items()}
        seeds = self.layout.place(seeds)
        (state, keys), observed = self.calls.setup(seeds, hypers)
        return (state, keys, hypers), observed

    def go_on(self, first: State, *, step: int, kept: Mapping[str, Any]) -> State:
        """The state before a step, from what a checkpoint kept of it.

        Args:
            first: The state before step 0.
            step: The step about to run.
            kept: Its `params`, `collections` and `opt_state`.
        """
        with rng_flags(self.spec.rng):
            advance = jax.jit(advance_carry)
            carried = {n: advance(k, np.int32(step)) for n, k in first.carried.items()}
        shardings = self.shardings
        laid = {n: None if shardings is None else getattr(shardings, n) for n in kept}
        on_device = {n: jax.device_put(tree, laid[n]) for n, tree in kept.items()}
        at = self.layout.place(jnp.int32(step))
        return first._replace(step=at, carried=carried, **on_device)

    @cached_property
    def names(self) -> Any:
        """Logical names of the axes of each variable, a tree of `PartitionSpec`s."""
        with trace_flags(self.spec):
            named = jax.eval_shape(
                lambda base, hypers: self.model.init_named(
                    base,
                    jnp.zeros(self.microbatch.shape, self.microbatch.dtype),
                    hypers,
                ),
                self.keys,
                hyper_shapes(self.hypers),
            )
        return nn.get_partition_spec(named)

    @cached_property
    def activations(self) -> tuple[Activation, ...]:
        """What the model names within a call in training; none but under `jit`."""
        state, trace = self.initial, self.traces[Phase.TRAIN]
        is_named = self.layout.strategy is Strategy.JIT
        if not is_named or any(not m.substituted for m in trace.missing):
            return ()  # a call that misses a stream can't be traced: a hazard says so
        variables = {"params": state.params, **state.collections}
        rngs = {name: self.keys[name] for name in trace.streams}
        args = (variables, self.microbatch, rngs, hyper_shapes(self.hypers))
        with trace_flags(self.spec):
            return find_activations(partial(self.model.apply, train=True), *args)

    @cached_property
    def shardings(self) -> Any:
        """How each array of the state lies on the mesh; None without one."""
        return lay_out(self)

    @cached_property
    def lowered(self) -> tuple[Any, ...]:
        """The programs before they are compiled, in the order of `Calls`."""
        with trace_flags(self.spec):  # they count while a program is traced
            return (
                self._lower_setup(),
                self._lower_train(),
                self._lower_eval(),
                self._jit(fingerprint, takes=(self.shardings,)).lower(self.initial),
            )

    @cached_property
    def calls(self) -> Calls:
        """The programs, compiled beside each other when first asked for."""
        lowered = self.lowered
        with ThreadPoolExecutor() as pool:
            return Calls(*pool.map(lambda each: each.compile(), lowered))

    def setup_call(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """What `Calls.setup` compiles, and the shapes of its arguments."""
        return self._observed(make_setup(self)), (
            self.seeds,
            hyper_shapes(self.hypers),
        )

    def _lower_setup(self) -> Any:
        setup, args = self.setup_call()
        gives = ((self.shardings, self.layout.replicated), self.layout.replicated)
        return self._jit(setup, takes=None, gives=gives).lower(*args)

    def _jit(
        self,
        function: Callable[..., Any],
        *,
        takes: Any,
        gives: Any = None,
        **more: Any,
    ) -> Any:
        """A program; on a mesh, with the layouts of what it takes and gives."""
        if self.layout.mesh is None:
            return jax.jit(function, **more)
        if self.spec.mesh.strategy is Strategy.EXACT:
            function = run_on_each(function, self.layout.mesh)
        everywhere = self.layout.replicated
        return jax.jit(
            function,
            in_shardings=everywhere if takes is None else takes,
            out_shardings=everywhere if gives is None else gives,
            **more,
        )

    def _observed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, with its keys beside its outputs, or None in their place."""
        if self.spec.rng.observe:
            return observe(function)

        @wraps(function)
        def unobserved(*args: Any) -> tuple[Any, None]:
            return function(*args), None

        return unobserved

    def train_call(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """What `Calls.train` compiles, and the shapes of its arguments."""
        parts = make_parts(self, Phase.TRAIN)
        gradients: Callable[..., Any] | None = None
        place: Callable[[Batch], Batch] = self.layout.constrain_rows
        if self.spec.mesh.strategy is Strategy.EXACT:
            gradients, place = self._exact_gradients(parts), _as_it_is
        spread = spread_step(make_step(parts, gradients=gradients), self.layout)
        observed = self._observed(spread)

        def step(*args: Any) -> tuple[State, Any]:
            (state, metrics), keys = observed(*args)
            return state, (metrics, keys)

        make = make_loop if self.construct is Construct.LOOP else make_single
        scalar = jax.ShapeDtypeStruct((), jnp.int32)
        shape = (self.window, self.order.batch_size)
        rows = jax.ShapeDtypeStruct(shape, jnp.int32)
        window = {"first": scalar, "rows": rows, "steps": scalar}
        data = Batch(_shape(self.data.x_train), _shape(self.data.y_train))
        args = (self.initial, window, data, self.keys, hyper_shapes(self.hypers))
        return make(step, place=place), args

    def _lower_train(self) -> Any:
        call, args = self.train_call()
        everywhere = self.layout.replicated
        numbers = {
            "first": everywhere,
            "rows": self.layout.columns,
            "steps": everywhere,
        }
        jitted = self._jit(
            call,
            takes=(self.shardings, numbers, *[everywhere] * 3),
            gives=(self.shardings, everywhere, everywhere),
            donate_argnums=0,
        )
        return jitted.lower(*args)

    def _exact_gradients(self, parts: Parts) -> Callable[..., Any]:
        axis = self.spec.mesh.rules[BATCH]
        assert axis is not None  # `runner.spec` refuses it
        return make_exact_gradients(parts, axis=axis, devices=self.layout.row_shards)

    def eval_call(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """What `Calls.evaluate` compiles, and the shapes of its arguments."""
        rows, same = self.layout.row_spec, PartitionSpec()
        alone = make_eval_step(make_parts(self, Phase.EVAL))
        takes = (same, rows, rows, same, same, same)
        step = self._observed(self.layout.on_shards(alone, takes=takes))

        def call(
            sums: Any, state: Any, at: Any, data: Batch, keys: Any, hypers: Any
        ) -> Any:
            batch, weights = take_rows(data, at["rows"]), at["weights"]
            more, observed = step(state, batch, weights, keys, hypers, at["part"])
            return jax.tree.map(jnp.add, sums, more), observed

        at = {
            "rows": jax.ShapeDtypeStruct((self.eval_rows,), jnp.int32),
            "weights": jax.ShapeDtypeStruct((self.eval_rows,), jnp.float32),
            "part": jax.ShapeDtypeStruct((), jnp.int32),
        }
        sum_ = jax.ShapeDtypeStruct((), jnp.float32)
        sums = dict.fromkeys(self.spec.task.metrics, sum_)
        count = sum(map(len, self.eval_sets.values()))
        x, y = _shape(self.data.x_test), _shape(self.data.y_test)
        data = Batch(*(s.update(shape=(count, *s.shape[1:])) for s in (x, y)))
        args = (sums, self.initial, at, data, self.keys, hyper_shapes(self.hypers))
        return call, args

    def _lower_eval(self) -> Any:
        call, args = self.eval_call()
        everywhere = self.layout.replicated
        takes = (everywhere, self.shardings, *[everywhere] * 4)
        return self._jit(call, takes=takes).lower(*args)


def make_setup(program: Program) -> Callable[..., tuple[State, dict[str, Any]]]:
    """(seeds, hypers) to the state before step 0 and the streams' base keys."""
    start = make_start(program, partial(build_run_optimizer, program.spec))

    def setup(seeds: Any, hypers: Any) -> tuple[State, dict[str, Any]]:
        base = derive_base_keys(program.plan, seeds=seeds)
        return start(base, hypers), base

    return setup


def make_start(
    program: Program, optimizer: Callable[..., optax.GradientTransformationExtraArgs]
) -> Callable[[dict[str, Any], Any], State]:
    """(base keys, hypers) to the state before step 0."""
    x, carried = program.microbatch, program.plan.carried()

    def start(base: dict[str, Any], hypers: Any) -> State:
        variables = program.model.init(base, jnp.zeros(x.shape, x.dtype), hypers)
        params, collections = split_variables(variables)
        return State(
            step=jnp.int32(0),
            params=params,
            collections=collections,
            opt_state=optimizer(hypers).init(params),
            carried={name: base[name] for name in carried},
            failed=jnp.int32(-1),
        )

    return start


def lay_out(program: Program) -> Any:
    """How each array of the state lies on the mesh; None without one.

    An array of the optimizer's lies as the parameter that it is kept for.
    """
    layout = program.layout
    if layout.mesh is None:
        return None
    specs = program.names
    _check_names(program)
    params, collections = split_variables(
        jax.tree.map(
            lambda names: layout.of(layout.spec_of(names)), specs, is_leaf=_is_spec
        )
    )
    optimizer = build_run_optimizer(program.spec, program.hypers)
    opt_state = optax.tree_map_params(
        optimizer.init,
        lambda _, sharding: sharding,
        program.initial.opt_state,
        params,
        transform_non_params=lambda _: layout.replicated,
    )
    everywhere: Any = layout.replicated
    return State(
        step=everywhere,
        params=params,
        collections=collections,
        opt_state=opt_state,
        carried=dict.fromkeys(program.initial.carried, everywhere),
        failed=everywhere,
    )


def _check_names(program: Program) -> None:
    state, layout = program.initial, program.layout
    names = name_leaves(program.names, is_leaf=_is_spec)
    check_rules(layout, [*names.values(), *(a.names for a in program.activations)])
    shapes = name_leaves({"params": state.params, **state.collections})
    check_parameters(layout, names, {path: s.shape for path, s in shapes.items()})


def name_leaves(tree: Any, **options: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths, `params/Dense_0/kernel`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, **options)
    spell = partial(jax.tree_util.keystr, simple=True, separator="/")
    return {spell(path): leaf for path, leaf in leaves}


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _is_spec(value: Any) -> bool:
    return isinstance(value, PartitionSpec)


def rows_of_call(spec: RunSpec, layout: Layout) -> int:
    """Rows in one call of the model in training."""
    rows = spec.data.batch_size // spec.train.accumulation_steps
    return rows // layout.own_shards


def eval_rows(spec: RunSpec, data: Dataset, layout: Layout) -> int:
    """Rows in one batch of an evaluation, so many that they divide over devices."""
    rows = min(spec.eval.batch_size or _AUTO_EVAL_ROWS, len(data.x_test))
    return -(-rows // layout.own_shards) * layout.own_shards


def spread_step(step: Callable[..., Any], layout: Layout) -> Callable[..., Any]:
    """A train step whose batch is cut up over the devices of `shard_map`."""
    same = PartitionSpec()
    return layout.on_shards(step, takes=(same, layout.row_spec, same, same))


def make_parts(program: Program, phase: Phase) -> Parts:
    """What the steps of a program are made of."""
    spec = program.spec
    return Parts(
        apply=program.model.apply,
        task=make_task(spec.task),
        optimizer=partial(build_run_optimizer, spec),
        rngs=make_rngs(
            program.plan,
            phase=phase,
            names=program.traces[phase].streams,
            coordinates=program.coordinates[phase],
            steps_per_epoch=program.order.steps_per_epoch,
        ),
        microbatches=spec.train.accumulation_steps,
        unroll=program.construct is Construct.STEP,
        max_norm=spec.train.max_norm is not None,
        mean=program.layout.mean,
        total=program.layout.total,
    )


def build_run_optimizer(
    spec: RunSpec, hypers: Mapping[str, Any]
) -> optax.GradientTransformationExtraArgs:
    node = insert_hypers(spec.optimizer, hypers, path="optimizer")
    optimizer = build_optimizer(node, path="optimizer", trusted=spec.trusted)
    if spec.train.clip_norm is not None:
        norm = hypers.get("train.clip_norm", spec.train.clip_norm)
        clip = optax.clip_by_global_norm(norm)
        optimizer = optax.chain(clip, optimizer)
    return optax.with_extra_args_support(optimizer)


def _shape(array: np.ndarray) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def hyper_shapes(hypers: Mapping[str, float]) -> dict[str, jax.ShapeDtypeStruct]:
    """Floats as a program takes them: weakly typed, as a Python number is."""
    shape = jax.ShapeDtypeStruct((), jnp.float32, weak_type=True)
    return dict.fromkeys(hypers, shape)
