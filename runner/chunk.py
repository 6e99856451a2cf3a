# SPDX-License-Identifier: Apache-2.0
"""Many steps in one call of the compiled program, or one."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from runner.step import Batch, State

__all__ = ["make_loop", "make_single", "take_rows"]

Step = Callable[..., tuple[State, Any]]
Place = Callable[[Batch], Batch]  # lays out the rows of a batch


def make_loop(
    step: Step, *, place: Place = lambda batch: batch
) -> Callable[..., tuple[State, Any, Any]]:
    """Takes `window["steps"]` steps in a `while` loop of the compiled program.

    The count is an input, so that one program serves every length of a chunk, and
    no length changes a bit.

    Returns:
        (state, window, data, keys, hypers) to state, rows, and the first step that
        was not finite (or -1). The rows are what a step returns beside the state,
        any pytree, with a leading dimension [steps]; beyond the count they are zeros.
    """

    def call(
        state: State, window: Mapping[str, Any], data: Batch, keys: Any, hypers: Any
    ) -> tuple[State, Any, Any]:
        one_step = jax.jit(step, inline=True)  # traced once: for shapes and the loop

        def one(i: Any, carry: Any) -> Any:
            state, rows = carry
            batch = place(take_rows(data, window["rows"][i]))
            state, new = one_step(state, batch, keys, hypers)
            return state, jax.tree.map(lambda all_, row: all_.at[i].set(row), rows, new)

        batch = take_rows(data, window["rows"][0])
        _, shapes = jax.eval_shape(one_step, state, batch, keys, hypers)
        size = window["rows"].shape[0]
        rows = jax.tree.map(lambda s: jnp.zeros((size, *s.shape), s.dtype), shapes)
        state, rows = jax.lax.fori_loop(0, window["steps"], one, (state, rows))
        return state, rows, state.failed

    return call


def make_single(
    step: Step, *, place: Place = lambda batch: batch
) -> Callable[..., tuple[State, Any, Any]]:
    """Takes one step, the next one of the window; what it returns is one row."""

    def call(
        state: State, window: Mapping[str, Any], data: Batch, keys: Any, hypers: Any
    ) -> tuple[State, Any, Any]:
        rows = window["rows"][state.step - window["first"]]
        state, row = step(state, place(take_rows(data, rows)), keys, hypers)
        return state, row, state.failed

    return call


def take_rows(data: Batch, rows: Any) -> Batch:
    """The rows of a data set with the given numbers."""
    return Batch(*(jnp.take(array, rows, axis=0) for array in data))
