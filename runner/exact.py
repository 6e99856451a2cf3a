# SPDX-License-Identifier: Apache-2.0
"""Data parallel training whose bits do not depend on the number of devices.

gradient = ((g_0 + g_1) + ... + g_(n-1)) / n, over the n microbatches of a batch

Each device computes n / devices of them, one after the other, in a loop that is the
same whatever their number is. All are gathered on every device, which adds them in the
order of the microbatches: so each adds the same numbers in the same order.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from runner.step import Batch, Parts, State, make_grad_fn

__all__ = ["make_exact_gradients", "run_on_each"]


def run_on_each(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Runs a function of replicated arrays whole on every device of a mesh."""
    return jax.shard_map(
        function, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False
    )


def make_exact_gradients(
    parts: Parts, *, axis: str, devices: int
) -> Callable[..., Any]:
    """The gradients of a batch, with the same bits on every device.

    Args:
        parts: What the step is made of; `microbatches` is a multiple of `devices`.
        axis: Axis of the mesh that the microbatches are spread over.
        devices: Its size.

    Returns:
        (state, batch, keys, hypers) to gradients, collections, metrics and carried
        keys, for `make_step`. The collections are those of the state.
    """
    grad_fn = make_grad_fn(parts)
    n = parts.microbatches
    each = n // devices

    def gradients(state: State, batch: Batch, keys: Any, hypers: Any) -> Any:
        rows = jax.tree.map(lambda a: a.reshape(n, -1, *a.shape[1:]), batch)
        first = jax.lax.axis_index(axis) * each

        def compute(at: Any) -> Any:
            part = jax.tree.map(lambda a: _row(a, at), rows)
            number = at if n > 1 else None
            rngs, _ = parts.rngs(keys, state.carried, state.step, number)
            args = (state.params, state.collections, part, rngs, hypers)
            grads, (_, metrics) = grad_fn(*args)
            return grads, metrics

        def one(i: Any, found: Any) -> Any:
            return found.at[first + i].set(ravel_pytree(compute(first + i))[0])

        like = jax.tree.map(jnp.zeros_like, jax.eval_shape(compute, jnp.int32(0)))
        flat, unravel = ravel_pytree(like)
        # The shape of the buffer and the loop around are the same on any number of
        # devices; a bound that XLA can't know keeps it from writing out short loops.
        count = jnp.where(state.failed >= -1, each, 0)
        found = jnp.zeros((n, flat.size), flat.dtype)
        found = jax.lax.fori_loop(0, count, one, found)
        mine = jax.lax.dynamic_slice_in_dim(found, first, each)
        every = jax.lax.all_gather(mine, axis, tiled=True)
        total, _ = jax.lax.scan(
            lambda total, row: (total + row, None), jnp.zeros_like(flat), every
        )
        grads, metrics = unravel(total / n)
        number = jnp.int32(0) if n > 1 else None
        _, carried = parts.rngs(keys, state.carried, state.step, number)
        return grads, state.collections, metrics, carried

    return gradients


def _row(array: Any, at: Any) -> Any:
    return jax.lax.dynamic_index_in_dim(array, at, keepdims=False)
