# SPDX-License-Identifier: Apache-2.0
"""Pure step functions: one update of the state, one batch of an evaluation."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from runner.penalties import find_penalties, is_kernel, split_losses
from runner.tasks import Task

__all__ = [
    "Batch",
    "Parts",
    "State",
    "constrain_norms",
    "make_eval_step",
    "make_grad_fn",
    "make_step",
]

Metrics = dict[str, Float[Array, ""]]


class State(NamedTuple):
    """All that a step changes. Only `carried` holds keys; they follow from `step`.

    Args:
        step: The step about to run, 0-based.
        params: Parameters.
        collections: Every other variable collection of the model.
        opt_state: The optimizer's.
        carried: Key that each stream with `per: {step: carry}` carries.
        failed: First step that was not finite and so was not taken, or -1.
    """

    step: Int[Array, ""]
    params: PyTree
    collections: PyTree
    opt_state: PyTree
    carried: dict[str, Key[Array, ""]]
    failed: Int[Array, ""]


class Batch(NamedTuple):
    """Rows to learn from: inputs `x` and targets `y`, arrays or their shapes."""

    x: Any
    y: Any


@dataclass(frozen=True)
class Parts:
    """What the steps are made of; every function is pure.

    Args:
        apply: (variables, x, rngs, hypers, train) to outputs and the collections
            after the call.
        task: Loss and metrics.
        optimizer: hypers to the optax transform.
        rngs: (base keys, carried, step, microbatch) to each stream's key and what
            is carried on; microbatch is None where there is but one.
        microbatches: Number of parts of a batch.
        unroll: Write the microbatches out instead of looping over them.
        max_norm: Whether `train.max_norm` is among the hypers.
        mean: A tree of each device's own to its mean over those with other rows.
        total: The same to its sum.
    """

    apply: Callable[..., tuple[Array, PyTree]]
    task: Task
    optimizer: Callable[[Mapping[str, Any]], optax.GradientTransformationExtraArgs]
    rngs: Callable[..., tuple[dict[str, Any], dict[str, Any]]]
    microbatches: int = 1
    unroll: bool = False
    max_norm: bool = False
    mean: Callable[[Any], Any] = lambda tree: tree
    total: Callable[[Any], Any] = lambda tree: tree


def make_step(
    parts: Parts, *, gradients: Callable[..., Any] | None = None
) -> Callable[..., tuple[State, Metrics]]:
    """The train step: (state, batch, keys, hypers) to the next state and metrics.

    A step whose loss or update is not finite is not taken: the state stays as it
    was, and `failed` names the step.

    Args:
        parts: What it is made of.
        gradients: (state, batch, keys, hypers) to gradients, collections, metrics and
            carried keys; None takes the microbatches one after the other.
    """

    gradients = gradients or _make_gradients(parts)

    def train_step(
        state: State, batch: Batch, keys: Any, hypers: Any
    ) -> tuple[State, Metrics]:
        *own, carried = gradients(state, batch, keys, hypers)
        grads, collections, metrics = parts.mean(own)
        optimizer = parts.optimizer(hypers)
        updates, opt_state = optimizer.update(
            grads, state.opt_state, state.params, value=metrics["loss"]
        )
        params = optax.apply_updates(state.params, updates)
        if parts.max_norm:
            params = constrain_norms(params, max_norm=hypers["train.max_norm"])
        finite = _all_finite((metrics["loss"], updates))
        taken = finite & (state.failed < 0)
        step = state.step + 1
        after = State(step, params, collections, opt_state, carried, state.failed)
        kept = jax.tree.map(lambda a, b: jnp.where(taken, a, b), after, state)
        failed = jnp.where(taken | (state.failed >= 0), state.failed, state.step)
        metrics["grad_norm"] = optax.tree.norm(grads)
        return kept._replace(failed=failed), metrics

    return train_step


def make_grad_fn(parts: Parts) -> Callable[..., Any]:
    """The gradient of one microbatch.

    Returns:
        (params, collections, batch, rngs, hypers) to gradients, and (collections
        after the call, metrics with the loss).
    """

    def loss_fn(
        params: Any, collections: Any, batch: Batch, rngs: Any, hypers: Any
    ) -> Any:
        variables = {"params": params, **collections}
        outputs, after = parts.apply(variables, batch.x, rngs, hypers, train=True)
        sown, after = split_losses(after)
        loss = parts.task.loss(outputs, batch.y, hypers).mean()
        for penalty in find_penalties(params, sown, hypers):
            loss = loss + penalty
        metrics = jax.tree.map(jnp.mean, parts.task.metrics(outputs, batch.y))
        return loss, (after, {**metrics, "loss": loss})

    return jax.grad(loss_fn, has_aux=True)


def _make_gradients(parts: Parts) -> Callable[..., Any]:
    """(state, batch, keys, hypers) to gradients, collections, metrics, carried keys."""
    grad_fn = make_grad_fn(parts)

    def gradients(state: State, batch: Batch, keys: Any, hypers: Any) -> Any:
        n = parts.microbatches
        if n == 1:
            rngs, carried = parts.rngs(keys, state.carried, state.step, None)
            args = (state.params, state.collections, batch, rngs, hypers)
            grads, (collections, metrics) = grad_fn(*args)
            return grads, collections, metrics, carried

        def one(carry: Any, part: Any) -> Any:
            total, collections = carry
            at, rows = part
            rngs, carried = parts.rngs(keys, state.carried, state.step, at)
            args = (state.params, collections, rows, rngs, hypers)
            grads, (collections, metrics) = grad_fn(*args)
            total = jax.tree.map(jnp.add, total, grads)
            return (total, collections), (metrics, carried)

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        rows = jax.tree.map(lambda a: a.reshape(n, -1, *a.shape[1:]), batch)
        (total, collections), (metrics, carried) = jax.lax.scan(
            one,
            (zeros, state.collections),
            (jnp.arange(n), rows),
            unroll=n if parts.unroll else 1,
        )
        grads = jax.tree.map(lambda g: g / n, total)
        metrics = jax.tree.map(jnp.mean, metrics)
        return grads, collections, metrics, jax.tree.map(lambda k: k[0], carried)

    return gradients


def make_eval_step(parts: Parts) -> Callable[..., Metrics]:
    """One batch of an evaluation: (state, batch, weights, keys, hypers, part) to sums.

    `weights` are 1 for real rows and 0 for those that fill the last batch up.
    """

    def eval_step(
        state: State, batch: Batch, weights: Array, keys: Any, hypers: Any, part: Any
    ) -> Metrics:
        rngs, _ = parts.rngs(keys, {}, state.step, part)
        variables = {"params": state.params, **state.collections}
        outputs, _ = parts.apply(variables, batch.x, rngs, hypers, train=False)
        values = parts.task.metrics(outputs, batch.y)
        sums = {
            name: jnp.sum(jnp.where(weights > 0, v * weights, 0))
            for name, v in values.items()
        }
        return parts.total(sums)

    return eval_step


def constrain_norms(params: PyTree, *, max_norm: float | Array) -> PyTree:
    """Scales each unit's incoming weights down to a norm of at most `max_norm`.

    w * min(1, max_norm / ||w||), ||w|| over all axes of a `kernel` but its last

    Source: Srivastava et al. 2014, "Dropout", section 5.1.
    """

    def constrain(path: Any, leaf: Array) -> Array:
        if not is_kernel(path):
            return leaf
        squares = jnp.sum(leaf**2, axis=range(leaf.ndim - 1), keepdims=True)
        norms = jnp.sqrt(squares)
        return leaf * jnp.where(norms > max_norm, max_norm / norms, 1.0)

    return jax.tree_util.tree_map_with_path(constrain, params)


def _all_finite(tree: PyTree) -> Array:
    leaves = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]
    return jnp.stack(leaves).all()
