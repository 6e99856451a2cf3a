# SPDX-License-Identifier: Apache-2.0
"""One variable in any collection, initialised from any stream."""

from collections.abc import Callable, Sequence

import flax.linen as nn
from jaxtyping import Array, Float, Key, Shaped

__all__ = ["Variable"]


class Variable(nn.Module):
    """Holds a variable; returns it, or adds it to an input.

    value = init_fn(key, shape);  y = value, or x + value

    It is found at `[collection][<name of this module>]["value"]`. Its key is
    drawn once, where the variable is made; a program that is given the variable
    draws nothing.

    Attributes:
        shape: Shape of the variable.
        collection: Collection to hold it.
        init_fn: Function of a key and a shape, such as
            `flax.linen.initializers.normal()`. (`init` is a method in Flax.)
        stream: Stream to initialise from.
    """

    shape: Sequence[int]
    collection: str
    init_fn: Callable[[Key[Array, ""], tuple[int, ...]], Shaped[Array, "..."]]
    stream: str = "params"

    @nn.compact
    def __call__(self, x: Float[Array, "..."] | None = None) -> Shaped[Array, "..."]:
        """Reads the variable.

        Args:
            x: Values to add it to, of a shape that it broadcasts to.

        Returns:
            The variable, or with an input the sum, in the input's dtype.
        """
        value = self.variable(
            self.collection,
            "value",
            lambda: self.init_fn(self.make_rng(self.stream), tuple(self.shape)),
        ).value
        return value if x is None else x + value.astype(x.dtype)
