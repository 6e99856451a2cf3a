# SPDX-License-Identifier: Apache-2.0
"""Dropout whose rate may be traced."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key

__all__ = ["Dropout"]


class Dropout(nn.Module):
    """Zeroes entries with probability `rate` and rescales the others.

    y = where(bernoulli(key, 1 - rate), x / (1 - rate), 0)

    `flax.linen.Dropout` with two differences:

    - It draws whenever it is not deterministic, also where the rate is 0 or 1
      (Flax then draws nothing), so that the keys which a program uses do not
      depend on the value of a rate.
    - The rate may be a traced scalar, so that programs which differ in nothing
      else are compiled once, or run as lanes of one program.

    Bits, as measured on CPU for float32, bfloat16 and float16. A Python number as
    rate gives Flax's output and gradient, eager and under `jit`. An array as rate
    gives those of jitted Flax with the Python float `float(rate)`, whether eager or
    under `jit`, `vmap`, `lax.map`. Three things set it apart from the baked rate:

    - An array holds a float32, and 1 - p rounded is not always 1 - (p rounded): for
      p = 0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7 they agree; for 0.6, 0.8, 0.9 the scale
      is off by a rounding, and at most every 8 millionth mask entry differs.
    - In a larger program XLA may fold a baked rate into other constants nearby (of
      a LayerNorm, a second dropout, a constant factor), and then rounds otherwise:
      there, compare runs only that both trace the rate, or both bake it.
    - At an array's rate of 0, subnormal inputs become 0, as in any product on CPU.

    Attributes:
        rate: Probability to drop an entry, in [0, 1].
        broadcast_dims: Dimensions along which the mask is shared.
        deterministic: Returns the inputs as they are; to be set here or in the
            call.
        rng_collection: Stream to draw the mask from.
    """

    rate: float | Float[Array, ""]
    broadcast_dims: Sequence[int] = ()
    deterministic: bool | None = None
    rng_collection: str = "dropout"

    @nn.compact
    def __call__(
        self,
        inputs: Float[Array, "..."],
        deterministic: bool | None = None,
        rng: Key[Array, ""] | None = None,
    ) -> Float[Array, "..."]:
        """Drops entries of the inputs.

        Args:
            inputs: Values of any shape.
            deterministic: As the attribute.
            rng: Key to draw with, in place of one from `rng_collection`.

        Returns:
            Values of the inputs' shape and dtype.

        Raises:
            ValueError: The rate is a number outside [0, 1], or `deterministic`
                is set twice or nowhere.
        """
        keep_prob = _keep_prob(self.rate)
        if nn.merge_param("deterministic", self.deterministic, deterministic):
            return inputs
        if rng is None:
            rng = self.make_rng(self.rng_collection)
        shape = list(inputs.shape)
        for dim in self.broadcast_dims:
            shape[dim] = 1
        mask = jax.random.bernoulli(rng, p=keep_prob, shape=shape)
        mask = jnp.broadcast_to(mask, inputs.shape)
        return lax.select(mask, _rescale(inputs, keep_prob), jnp.zeros_like(inputs))


def _keep_prob(rate: float | Float[Array, ""]) -> float | Float[Array, ""]:
    if isinstance(rate, jax.Array):
        # The default float dtype, as for a Python float: it decides how many
        # random bits an entry takes.
        return 1.0 - jnp.asarray(rate, dtype=float)
    rate = float(rate)
    if not 0.0 <= rate <= 1.0:
        raise ValueError(
            f"rate: not a probability (got {rate}). Allowed: 0 to 1. "
            "Give the share of entries to drop."
        )
    return 1.0 - rate


def _rescale(
    inputs: Float[Array, "..."], keep_prob: float | Float[Array, ""]
) -> Float[Array, "..."]:
    # Where everything is dropped, any finite scale does: 0 / 0 would be the
    # gradient's NaN.
    if not isinstance(keep_prob, jax.Array):
        return inputs if keep_prob in (0.0, 1.0) else inputs / keep_prob
    keep_prob = keep_prob.astype(inputs.dtype)
    # XLA makes a division by a constant a product with the reciprocal, on CPU that
    # of the float32 for bfloat16. It does so for a traced scalar only where that
    # has one use, so not in a program with a gradient: hence the product here.
    wide = jnp.float32 if inputs.dtype == jnp.bfloat16 else inputs.dtype
    scale = 1 / jnp.where(keep_prob == 0, 1, keep_prob).astype(wide)
    return (inputs.astype(wide) * scale).astype(inputs.dtype)
