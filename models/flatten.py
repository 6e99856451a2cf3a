# SPDX-License-Identifier: Apache-2.0
"""One row of numbers for each input."""

import math

import flax.linen as nn
from jaxtyping import Array, Num

__all__ = ["Flatten"]


class Flatten(nn.Module):
    """Reshapes inputs to (batch, everything else)."""

    def __call__(self, x: Num[Array, "batch ..."]) -> Num[Array, "batch values"]:
        """Flattens all dimensions but the first."""
        return x.reshape(x.shape[0], math.prod(x.shape[1:]))
