# SPDX-License-Identifier: Apache-2.0
"""The compiled programs of lanes that are computed together.

    calls = compile(vmap(setup), vmap(train), vmap(evaluate), vmap(digest))

Keys and draws are those of the run alone (with `threefry2x32`); floats are not, since
the compiler adds and multiplies stacked arrays in another order.
"""

import threading
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from runner.fingerprint import fingerprint
from runner.flags import trace_flags
from runner.lanes.lane import Executable
from runner.program import Calls, Program
from runner.step import Batch

__all__ = ["Stacked"]

_STEPS = 100  # in one call, at most; the usual steps between evaluations


class Stacked:
    """The compiled programs of a number of lanes.

    Args:
        executable: The group, whose lanes read the same rows.
        width: How many lanes.
    """

    def __init__(self, executable: Executable, *, width: int) -> None:
        self.program: Program = executable.program
        self.width = width
        self.window = min(_STEPS, executable.window)
        self._lock = threading.Lock()

    @property
    def calls(self) -> Calls:
        """The programs; others who ask wait for the one who compiles."""
        with self._lock:
            return self._calls

    @cached_property
    def _calls(self) -> Calls:
        with trace_flags(self.program.spec):
            lowered = [
                self._lower_setup(),
                self._lower_train(),
                self._lower_eval(),
                jax.jit(jax.vmap(fingerprint)).lower(self._lanes(self.program.initial)),
            ]
        return Calls(*[each.compile() for each in lowered])

    def _lower_setup(self) -> Any:
        setup, args = self.program.setup_call()
        return jax.jit(jax.vmap(setup)).lower(*map(self._lanes, args))

    def _lower_train(self) -> Any:
        train, (state, window, data, keys, hypers) = self.program.train_call()
        batch = window["rows"].shape[1]
        rows = jax.ShapeDtypeStruct((self.window, batch), jnp.int32)
        over = jax.vmap(
            train, in_axes=(0, {"first": None, "rows": 0, "steps": None}, None, 0, 0)
        )

        def call(
            state: Any, takes: Any, window: Any, data: Batch, keys: Any, hypers: Any
        ) -> Any:
            after, rows, failed = over(state, window, data, keys, hypers)
            return _choose(takes, after, state), rows, failed

        return jax.jit(call, donate_argnums=0).lower(
            self._lanes(state),
            jax.ShapeDtypeStruct((self.width,), jnp.bool_),
            {**window, "rows": self._lanes(rows)},
            data,
            self._lanes(keys),
            self._lanes(hypers),
        )

    def _lower_eval(self) -> Any:
        call, (sums, state, at, data, keys, hypers) = self.program.eval_call()
        over = jax.vmap(call, in_axes=(0, 0, None, None, 0, 0))
        return jax.jit(over).lower(
            *map(self._lanes, (sums, state)),
            at,
            data,
            *map(self._lanes, (keys, hypers)),
        )

    def _lanes(self, tree: Any) -> Any:
        """Shapes with the lanes before all else."""
        return jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(
                (self.width, *s.shape), s.dtype, weak_type=s.weak_type
            ),
            tree,
        )


def _choose(takes: Any, after: Any, before: Any) -> Any:
    """Of each lane, the state after a call that it takes part in, or before it."""

    def choose(new: Any, old: Any) -> Any:
        return jnp.where(takes.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return jax.tree.map(choose, after, before)
