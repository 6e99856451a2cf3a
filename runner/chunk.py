# SPDX-License-Identifier: Apache-2.0
"""Many steps in one call of the compiled program, or one."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from runner.step import Batch, State

__all__ = ["make_loop", "make_single", "take_rows"]

Step = Callable[..., tuple[State, dict[str, Any]]]


def make_loop(step: Step) -> Callable[..., tuple[State, Any, Any]]:
    """Takes `window["steps"]` steps in a `while` loop of the compiled program.

    The count is an input, so that one program serves every length of a chunk, and
    no length changes a bit.

    Returns:
        (state, window, data, keys, hypers) to state, metrics of shape [steps], and
        the first step that was not finite (or -1). Rows of the metrics beyond the
        count are zeros.
    """

    def call(
        state: State, window: Mapping[str, Any], data: Batch, keys: Any, hypers: Any
    ) -> tuple[State, Any, Any]:
        one_step = jax.jit(step, inline=True)  # traced once: for shapes and the loop

        def one(i: Any, carry: Any) -> Any:
            state, metrics = carry
            batch = take_rows(data, window["rows"][i])
            state, new = one_step(state, batch, keys, hypers)
            metrics = {name: metrics[name].at[i].set(new[name]) for name in metrics}
            return state, metrics

        batch = take_rows(data, window["rows"][0])
        _, shapes = jax.eval_shape(one_step, state, batch, keys, hypers)
        size = window["rows"].shape[0]
        metrics = {name: jnp.zeros((size,), s.dtype) for name, s in shapes.items()}
        state, metrics = jax.lax.fori_loop(0, window["steps"], one, (state, metrics))
        return state, metrics, state.failed

    return call


def make_single(step: Step) -> Callable[..., tuple[State, Any, Any]]:
    """Takes one step, the next one of the window; metrics are scalars."""

    def call(
        state: State, window: Mapping[str, Any], data: Batch, keys: Any, hypers: Any
    ) -> tuple[State, Any, Any]:
        rows = window["rows"][state.step - window["first"]]
        state, metrics = step(state, take_rows(data, rows), keys, hypers)
        return state, metrics, state.failed

    return call


def take_rows(data: Batch, rows: Any) -> Batch:
    """The rows of a data set with the given numbers."""
    return Batch(*(jnp.take(array, rows, axis=0) for array in data))
