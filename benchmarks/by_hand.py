# SPDX-License-Identifier: Apache-2.0
"""The opponents: the same training in plain Flax, as well as it can be written.

Every loop here has its data, its row numbers and its keys on the device, donates
its state, and fetches metrics once, at the end; only the tutorial's does not.

Two amounts of work:

    same   the runner's: rate and learning rate are inputs, smoothed loss, accuracy,
           norm of the gradients, and a step that is not finite is not taken
    less   what people write: constants, and the loss alone
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from jax.lax import with_sharding_constraint
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from runner.spec import RunSpec

__all__ = [
    "Problem",
    "Timed",
    "leaf_bytes",
    "make_chunks",
    "make_sharded",
    "make_shards",
    "make_steps",
    "make_tutorial",
]

_SCAN = 100  # steps in a scan


@dataclass(frozen=True)
class Problem:
    """What both sides are given.

    Args:
        make_model: Dropout rate to the module.
        rate: Dropout rate.
        learning_rate: Adam's.
        x: Inputs to train on.
        y: Their labels.
        batch_size: Rows in a batch.
        steps: Number of updates.
        seed: Root seed.
    """

    make_model: Callable[[Any], nn.Module]
    rate: float
    learning_rate: float
    x: np.ndarray
    y: np.ndarray
    batch_size: int
    steps: int
    seed: int

    @classmethod
    def of(cls, spec: RunSpec, x: np.ndarray, y: np.ndarray) -> "Problem":
        """The problem of a run with an MLP or a CNN, and Adam."""
        from runner.models import CNN, MLP

        node = dict(spec.model)
        rate = node.pop("dropout_rate")
        module = {"models.MLP": MLP, "models.CNN": CNN}[node.pop("_target_")]
        return cls(
            make_model=lambda rate: module(**node, dropout_rate=rate),
            rate=rate,
            learning_rate=spec.optimizer["learning_rate"],
            x=x,
            y=y,
            batch_size=spec.data.batch_size,
            steps=spec.train.steps,
            seed=spec.seed,
        )

    def rows(self) -> np.ndarray:
        """Row numbers of every batch, shape [steps, batch_size]."""
        per_epoch = len(self.x) // self.batch_size
        epochs = range(-(-self.steps // per_epoch))
        orders = [self._permute(e)[: per_epoch * self.batch_size] for e in epochs]
        rows = np.concatenate(orders).reshape(-1, self.batch_size)
        return rows[: self.steps].astype(np.int32)

    def _permute(self, epoch: int) -> np.ndarray:
        words = (_name_id("shuffle"), epoch)
        sequence = np.random.SeedSequence(self.seed, spawn_key=words)
        return np.random.Generator(np.random.Philox(sequence)).permutation(len(self.x))

    def key(self, stream: str) -> jax.Array:
        """Base key of a stream."""
        return jax.random.fold_in(jax.random.key(self.seed), _name_id(stream))


@dataclass(frozen=True)
class Timed:
    """One timing.

    Args:
        seconds: From the first call to the last metric and parameter.
        params: The last parameters; None where none were kept.
    """

    seconds: float
    params: Any


class State(NamedTuple):
    """What a step changes; the runner's, without the collections."""

    step: jax.Array
    params: Any
    opt_state: Any
    failed: jax.Array


class Inputs(NamedTuple):
    """What no step changes, on the device."""

    rows: jax.Array
    x: jax.Array
    y: jax.Array
    key: jax.Array
    rate: jax.Array
    learning_rate: jax.Array


Step = Callable[[State, jax.Array, Inputs], tuple[State, dict[str, jax.Array]]]
Loop = Callable[[], Timed]


def make_steps(problem: Problem, *, work: str) -> Loop:
    """A call of a jitted step for each step, and nothing else in between."""
    step = _make_step(problem, work)

    @partial(jax.jit, donate_argnums=0)
    def call(state: State, inputs: Inputs) -> Any:
        return step(state, inputs.rows[state.step], inputs)

    def run(state: State, inputs: Inputs) -> tuple[State, Any]:
        metrics = []
        for _ in range(problem.steps):
            state, new = call(state, inputs)
            metrics.append(new)
        return state, metrics

    return _timing(problem, run)


def make_chunks(problem: Problem, *, work: str) -> Loop:
    """A jitted `lax.scan` over 100 steps, called until all are taken."""
    step, size = _make_step(problem, work), min(_SCAN, problem.steps)
    assert problem.steps % size == 0, "the last scan would be compiled of its own"

    @partial(jax.jit, donate_argnums=0)
    def call(state: State, inputs: Inputs) -> Any:
        rows = jax.lax.dynamic_slice_in_dim(inputs.rows, state.step, size)
        return jax.lax.scan(lambda s, at: step(s, at, inputs), state, rows)

    def run(state: State, inputs: Inputs) -> tuple[State, Any]:
        metrics = []
        for _ in range(problem.steps // size):
            state, new = call(state, inputs)
            metrics.append(new)
        return state, metrics

    return _timing(problem, run)


def make_sharded(problem: Problem, mesh: Mesh) -> Loop:
    """The same scan, data parallel over the first axis of a mesh; the same work."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    parts = NamedSharding(mesh, PartitionSpec(mesh.axis_names[0]))
    step = _make_same(problem, place=lambda rows: with_sharding_constraint(rows, parts))
    size = min(_SCAN, problem.steps)
    assert problem.steps % size == 0, "the last scan would be compiled of its own"

    @partial(jax.jit, donate_argnums=0, out_shardings=everywhere)
    def call(state: State, inputs: Inputs) -> Any:
        rows = jax.lax.dynamic_slice_in_dim(inputs.rows, state.step, size)
        return jax.lax.scan(lambda s, at: step(s, at, inputs), state, rows)

    def run(state: State, inputs: Inputs) -> tuple[State, Any]:
        metrics = []
        for _ in range(problem.steps // size):
            state, new = call(state, inputs)
            metrics.append(new)
        return state, metrics

    return _timing(problem, run, layout=everywhere)


def make_shards(problem: Problem, mesh: Mesh) -> Loop:
    """The same scan in a program for each device of a mesh, under `shard_map`.

    Each takes its part of the rows, draws from the step's key folded with its number,
    and averages what it found over all; the same work.
    """
    (axis,), same = mesh.axis_names, PartitionSpec()
    step = _make_same(problem, axis=axis)
    size = min(_SCAN, problem.steps)
    assert problem.steps % size == 0, "the last scan would be compiled of its own"

    def shard(state: State, inputs: Inputs) -> Any:
        rows = jax.lax.dynamic_slice_in_dim(inputs.rows, state.step, size)
        return jax.lax.scan(lambda s, at: step(s, at, inputs), state, rows)

    takes = Inputs(*[same] * 6)._replace(rows=PartitionSpec(None, axis))
    spread: Any = jax.shard_map(
        shard, mesh=mesh, in_specs=(same, takes), out_specs=same, check_vma=False
    )
    call = jax.jit(spread, donate_argnums=0)

    def run(state: State, inputs: Inputs) -> tuple[State, Any]:
        metrics = []
        for _ in range(problem.steps // size):
            state, new = call(state, inputs)
            metrics.append(new)
        return state, metrics

    return _timing(problem, run, layout=NamedSharding(mesh, same))


def make_tutorial(problem: Problem) -> Loop:
    """As tutorials have it: a batch from NumPy and `float(loss)` in every step."""
    model = problem.make_model(problem.rate)
    rows, init = problem.rows(), _make_init(problem)

    @jax.jit
    def train_step(state: TrainState, x: Any, y: Any, key: Any) -> Any:
        key = jax.random.fold_in(key, state.step)

        def loss_fn(params: Any) -> jax.Array:
            logits = state.apply_fn({"params": params}, x, rngs={"dropout": key})
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
            return losses.mean()

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads), loss

    def run() -> Timed:
        tx = optax.adam(problem.learning_rate)
        state = TrainState.create(apply_fn=model.apply, params=init(), tx=tx)
        key = problem.key("dropout")
        begun = time.perf_counter()
        losses = []
        for at in rows:
            state, loss = train_step(state, problem.x[at], problem.y[at], key)
            losses.append(float(loss))
        jax.block_until_ready(state.params)
        return Timed(time.perf_counter() - begun, jax.device_get(state.params))

    return run


def _timing(
    problem: Problem, run: Callable[[State, Inputs], Any], *, layout: Any = None
) -> Loop:
    x, y, rows = jax.device_put((problem.x, problem.y, problem.rows()))
    hypers = map(jnp.asarray, (problem.rate, problem.learning_rate))
    inputs = Inputs(rows, x, y, problem.key("dropout"), *hypers)
    inputs = jax.device_put(inputs, layout)

    init = _make_init(problem)

    def timed() -> Timed:
        params = init()
        opt_state = optax.adam(problem.learning_rate).init(params)
        state = State(jnp.int32(0), params, opt_state, jnp.int32(-1))
        state = jax.device_put(state, layout)
        jax.block_until_ready((state, inputs))
        begun = time.perf_counter()
        state, metrics = run(state, inputs)
        jax.device_get(metrics)
        jax.block_until_ready(state)
        return Timed(time.perf_counter() - begun, jax.device_get(state.params))

    return timed


def _make_init(problem: Problem) -> Callable[[], Any]:
    model = problem.make_model(problem.rate)
    shape = (problem.batch_size, *problem.x.shape[1:])

    @jax.jit
    def init(key: jax.Array) -> Any:
        with _separator():
            rngs = {"params": key}
            return model.init(rngs, jnp.zeros(shape), deterministic=True)["params"]

    return lambda: init(problem.key("params"))


def _make_step(problem: Problem, work: str) -> Step:
    return {"same": _make_same, "less": _make_less}[work](problem)


def _make_same(
    problem: Problem,
    *,
    place: Callable[[Any], Any] = lambda rows: rows,
    axis: str | None = None,
) -> Step:
    smoothing = jnp.asarray(0.0)

    def loss_fn(params: Any, x: Any, y: Any, key: Any, rate: Any) -> Any:
        model = problem.make_model(rate)
        logits: Any = model.apply({"params": params}, x, rngs={"dropout": key})
        losses = -jax.nn.log_softmax(logits)
        plain = jnp.take_along_axis(losses, y[:, None], axis=-1)[:, 0]
        smooth = (1 - smoothing) * plain + smoothing * losses.mean(axis=-1)
        right = (jnp.argmax(logits, axis=-1) == y).astype(jnp.float32)
        loss = smooth.mean()
        return loss, {"loss": loss, "accuracy": right.mean()}

    def step(state: State, rows: Any, inputs: Inputs) -> Any:
        x, y = jnp.take(inputs.x, rows, axis=0), jnp.take(inputs.y, rows, axis=0)
        x, y = place((x, y))
        key = jax.random.fold_in(inputs.key, state.step)
        if axis is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis))
        grads, metrics = jax.grad(loss_fn, has_aux=True)(
            state.params, x, y, key, inputs.rate
        )
        if axis is not None:
            grads, metrics = jax.lax.pmean((grads, metrics), axis)
        tx = optax.adam(inputs.learning_rate)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        finite = jnp.stack(
            [jnp.isfinite(a).all() for a in jax.tree.leaves((metrics["loss"], updates))]
        ).all()
        taken = finite & (state.failed < 0)
        after = State(state.step + 1, params, opt_state, state.failed)
        kept = jax.tree.map(lambda a, b: jnp.where(taken, a, b), after, state)
        failed = jnp.where(taken | (state.failed >= 0), state.failed, state.step)
        metrics["grad_norm"] = optax.tree.norm(grads)
        return kept._replace(failed=failed), metrics

    return _with_separator(step)


def _make_less(problem: Problem) -> Step:
    model, tx = problem.make_model(problem.rate), optax.adam(problem.learning_rate)

    def step(state: State, rows: Any, inputs: Inputs) -> Any:
        x, y = inputs.x[rows], inputs.y[rows]
        key = jax.random.fold_in(inputs.key, state.step)

        def loss_fn(params: Any) -> jax.Array:
            logits = model.apply({"params": params}, x, rngs={"dropout": key})
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
            return losses.mean()

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(state.step + 1, params, opt_state, state.failed), {"loss": loss}

    return _with_separator(step)


def _with_separator(step: Step) -> Step:
    """Traces a step as the runner does: Flax hashes paths with a separator."""

    def traced(state: State, rows: Any, inputs: Inputs) -> Any:
        with _separator():
            return step(state, rows, inputs)

    return traced


def _separator() -> Any:
    return flax.config.temp_flip_flag("fix_rng_separator", True)


def _name_id(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


def leaf_bytes(params: Any) -> Iterator[bytes]:
    """Every leaf's bytes, in the order of the tree."""
    return (np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params))
