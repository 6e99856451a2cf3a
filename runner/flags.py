# SPDX-License-Identifier: Apache-2.0
"""JAX's and Flax's settings that a run's programs are traced and lowered under."""

import contextlib
from collections.abc import Iterator

import jax

from runner.keys import rng_flags
from runner.spec import RunSpec

__all__ = ["trace_flags"]


@contextlib.contextmanager
def trace_flags(spec: RunSpec) -> Iterator[None]:
    """Sets the generator's flags and the precision of products, for a while.

    They count while a program is traced; a compiled one carries them within.
    """
    precision = spec.train.matmul_precision
    with rng_flags(spec.rng), contextlib.ExitStack() as stack:
        if precision is not None:
            stack.enter_context(jax.default_matmul_precision(precision))
        yield
