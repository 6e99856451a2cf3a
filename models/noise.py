# SPDX-License-Identifier: Apache-2.0
"""Additive noise from a named stream."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

__all__ = ["Noise"]


class Noise(nn.Module):
    """Adds Gaussian noise.

    y = where(deterministic, x, x + scale * normal(key))

    The key is drawn whether the noise is on or off, so that the keys which a
    program uses do not depend on the flag. Flag and scale may both be traced.

    Attributes:
        scale: Standard deviation of the noise.
        stream: Stream to draw from.
    """

    scale: float | Float[Array, ""]
    stream: str = "noise"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "..."],
        *,
        deterministic: bool | Bool[Array, ""] = False,
    ) -> Float[Array, "..."]:
        """Adds the noise.

        Args:
            x: Values of any shape.
            deterministic: Switches the noise off.

        Returns:
            Values of the input's shape and dtype.
        """
        noise = jax.random.normal(self.make_rng(self.stream), x.shape, x.dtype)
        return jnp.where(deterministic, x, x + jnp.asarray(self.scale, x.dtype) * noise)
