# SPDX-License-Identifier: Apache-2.0
"""Logical names for the axes of an activation."""

from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

__all__ = ["name_axes"]


def name_axes(x: Float[Array, "..."], *names: str | None) -> Float[Array, "..."]:
    """Names the axes of an activation, for the rules of a mesh.

    y = x. `flax.linen.with_logical_constraint`: without rules nothing enters the
    program.

    Args:
        x: Values of any shape.
        names: Name of each axis; None for one without.
    """
    linen: Any = nn
    named: Float[Array, ...] = linen.with_logical_constraint(x, names)
    return named
