# SPDX-License-Identifier: Apache-2.0
"""A penalty on hidden units that are active more often than wanted."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["KLSparsity"]

_EDGE = 1e-6


class KLSparsity(nn.Module):
    """Returns its inputs, and sows a penalty on their means into `losses`.

    penalty = weight * sum over units of  t log(t / a) + (1 - t) log((1 - t) / (1 - a))

    where t is `target` and a the mean of `squash(x)` over all axes but the last, kept
    within [1e-6, 1 - 1e-6]: the divergence of a unit that is active with probability a
    from one that is so with probability t. The runner adds to the loss what is sown; a
    call that is not for training sows nothing.

    Attributes:
        weight: Factor of the penalty.
        target: Wanted mean of each unit, in (0, 1).
        squash: Takes an activation to [0, 1]: none for a logistic unit, tanh for a
            rectified one, which has no upper bound.
    """

    weight: float | Float[Array, ""]
    target: float = 0.05
    squash: Callable[[Array], Array] = lambda x: x

    @nn.compact
    def __call__(self, x: Float[Array, "*batch units"]) -> Float[Array, "*batch units"]:
        """Sows the penalty.

        Raises:
            ValueError: The target is not within (0, 1).
        """
        if not 0 < self.target < 1:
            raise ValueError(
                f"target: must lie between 0 and 1 (got {self.target}). "
                "Give the mean activation that each unit should have."
            )
        active = self.squash(x).astype(jnp.float32)
        means = jnp.mean(active, axis=tuple(range(x.ndim - 1)))
        a, t = jnp.clip(means, _EDGE, 1 - _EDGE), self.target
        divergence = t * jnp.log(t / a) + (1 - t) * jnp.log((1 - t) / (1 - a))
        self.sow("losses", "sparsity", self.weight * divergence.sum())
        return x
