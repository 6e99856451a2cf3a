# SPDX-License-Identifier: Apache-2.0
"""The compiled programs of lanes that are computed together.

    calls = compile(vmap(setup), vmap(train), vmap(evaluate), vmap(digest))

Keys and draws are those of the run alone (with `threefry2x32`); floats are not, since
the compiler adds and multiplies stacked arrays in another order.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from runner.costs import estimate_costs
from runner.fingerprint import fingerprint
from runner.flags import trace_flags
from runner.lanes.lane import Executable
from runner.program import Calls, Program
from runner.step import Batch

__all__ = ["Stacked"]

_STEPS = 100  # in one call, at most; the usual steps between evaluations
# FLOPs saved that pay for compiling for fewer lanes. That took 1.3 to 3 s on four cores
# of an x86 CPU, which save 4e10 FLOPs a second with a layer of 64, 2e11 with layers of
# 512 and 256. Nearer to the small model, since those are the ones that `vmap` is for.
_COMPILING = 1e11


class Stacked:
    """The compiled programs of a number of lanes.

    Args:
        executable: The group, whose lanes read the same rows.
        width: How many lanes.
    """

    def __init__(self, executable: Executable, *, width: int) -> None:
        self.executable, self.width = executable, width
        self.program: Program = executable.program
        self.window = min(_STEPS, executable.window)
        self._lock, self._moving = threading.Lock(), threading.Lock()
        self._narrower: dict[int, Stacked | None] = {}

    def narrower(self, width: int, *, steps: int) -> "Stacked | None":
        """The programs of fewer lanes, compiled once for all who move; or None.

            FLOPs of a step * (1 - width / self.width) * steps > compiling

        On CPU alone: elsewhere nobody has measured what a lane less saves.

        Args:
            width: How many lanes are left; half of ours, or fewer, since each move
                compiles.
            steps: That the last of them still takes.
        """
        if jax.default_backend() != "cpu" or width > self.width // 2:
            return None
        if self._flops * (1 - width / self.width) * steps <= _COMPILING:
            return None
        with self._moving:
            if width not in self._narrower:
                self._narrower[width] = self._compile(width)
            return self._narrower[width]

    def _compile(self, width: int) -> "Stacked | None":
        made = Stacked(self.executable, width=width)
        try:
            _ = made.calls
        except Exception:  # the lanes go on where they are
            return None
        return made

    @property
    def calls(self) -> Calls:
        """The programs; others who ask wait for the one who compiles."""
        with self._lock:
            return self._calls

    @cached_property
    def _flops(self) -> int:
        """Of a step of all lanes; 0 where XLA gives none."""
        return estimate_costs({"train": self.calls.train})["train"]["flops"] or 0

    @cached_property
    def _calls(self) -> Calls:
        with trace_flags(self.program.spec):
            lowered = [
                self._lower_train(),
                self._lower_eval(),
                jax.jit(jax.vmap(fingerprint)).lower(self._lanes(self.program.initial)),
            ]
        with ThreadPoolExecutor() as pool:
            return Calls(self._set_up, *pool.map(lambda each: each.compile(), lowered))

    def _set_up(self, *args: Any) -> Any:
        """Compiled when it is called: lanes that move here are set up already."""
        with self._lock:
            setup = self._setup
        return setup(*args)

    @cached_property
    def _setup(self) -> Any:
        setup, args = self.program.setup_call()
        with trace_flags(self.program.spec):
            lowered = jax.jit(jax.vmap(setup)).lower(*map(self._lanes, args))
        return lowered.compile()

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
