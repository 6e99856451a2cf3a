# SPDX-License-Identifier: Apache-2.0
"""What the rules of a walk over a jaxpr may ask of it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from runner.audit.draws import Log
from runner.audit.marks import Here
from runner.audit.refs import LostError, Refs, Space, Taint
from runner.ops import Affine

__all__ = [
    "BELOW",
    "CONSUMERS",
    "Value",
    "Walker",
    "is_key",
    "put_value",
    "run_at",
]

CONSUMERS = frozenset({"random_bits", "random_gamma"})
"""Primitives that draw from keys."""
BELOW = frozenset({"rng_bit_generator", "rng_uniform", "threefry2x32"})
"""Primitives below `jax.random`, which draw from words of keys."""

Value = Refs | Taint
"""What is known of a variable; of one of keys it is `Refs`."""


class Walker(Protocol):
    """One pass over a jaxpr.

    Args:
        space: Variables of dimensions and axes.
        log: The draws so far.
        here: Where the walk is.
        conds: How many branchings there were so far.
        dtypes: Type of the keys of each stream.
    """

    space: Space
    log: Log
    here: Here
    conds: int
    dtypes: Mapping[str | None, Any]

    def run(
        self, jaxpr: Any, ins: Sequence[Value], consts: Sequence[Value] = ()
    ) -> list[Value]:
        """What comes out of a jaxpr, open or closed."""

    def lose(self, eqn: Any, ins: Iterable[Value], why: str) -> list[Value]:
        """What is left to say of what an equation makes of its inputs."""

    def lost(self, var: Any, stream: str | None, why: str) -> Refs:
        """Keys of a stream of which no more is known."""

    def mix(self, var: Any, ins: Iterable[Value], why: str) -> Refs:
        """Keys that are made of others: of their stream, if it is one."""

    def taint(self, ins: Iterable[Value], name: str = "") -> Taint:
        """What something was computed from; `name` is what did it to keys."""

    def choose(self, cases: Sequence[Refs], *, cond: int | None = None) -> Refs:
        """Keys that are one of several arrays; which, the program decides."""


def is_key(var: Any) -> bool:
    """Whether a variable is of keys."""
    dtype = getattr(var.aval, "dtype", None)
    if dtype is None or isinstance(dtype, np.dtype):
        return False
    return bool(jnp.issubdtype(dtype, jax.dtypes.prng_key))


def run_at(
    here: Here,
    walk: Walker,
    jaxpr: Any,
    ins: Sequence[Value],
    consts: Sequence[Value] = (),
) -> list[Value]:
    """What comes out of a jaxpr that lies at another place."""
    outside, walk.here = walk.here, here
    try:
        return walk.run(jaxpr, ins, consts)
    finally:
        walk.here = outside


def put_value(value: Value, variable: str, number: Affine, space: Space) -> Value:
    """A value with a number where a variable stood; lost where that can't be said."""
    if isinstance(value, Taint):
        return value
    try:
        return value.put(variable, number, space)
    except LostError as lost:
        return value.lost(str(lost))
