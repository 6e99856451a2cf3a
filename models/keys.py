# SPDX-License-Identifier: Apache-2.0
"""Modules that show the keys they draw: for looking at streams, not for training."""

from collections.abc import Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Num

__all__ = ["Keys", "RandomInteger"]


class Keys(nn.Module):
    """Asks for keys, and returns them with one number drawn from each.

    keys[i] = key_data(make_rng(streams[i]));  bits[i] = bits(make_rng's key)

    The numbers are there because a key that nothing is drawn from is no draw.

    Attributes:
        streams: What to ask for, in order; a stream may come several times.
        modules: What to call after that. One that has no name is called
            `modules_<i>`.
    """

    streams: Sequence[str]
    modules: Sequence[nn.Module] = ()

    preserve_adopted_names: ClassVar[bool] = True  # read by Flax

    @nn.compact
    def __call__(self) -> dict[str, Any]:
        """Draws.

        Returns:
            `keys` (uint32, a row for each key) and `bits` (uint32), and what each
            module returns under its name.
        """
        keys = [self.make_rng(stream) for stream in self.streams]
        shown = {
            "keys": jnp.stack([jax.random.key_data(key) for key in keys]),
            "bits": jnp.stack([jax.random.bits(key) for key in keys]),
        }
        return shown | {str(module.name): module() for module in self.modules}


class RandomInteger(nn.Module):
    """Adds a random whole number.

    y = x + randint(make_rng(stream), low, high)

    Attributes:
        low: Smallest number.
        high: The number above the largest.
        stream: Stream to draw from.
    """

    low: int = 0
    high: int = 100
    stream: str = "params"

    @nn.compact
    def __call__(self, x: Num[Array, "..."]) -> Num[Array, "..."]:
        """Adds the number.

        Args:
            x: Values of any shape; all get the same number.

        Returns:
            Values of the input's shape and dtype.
        """
        drawn: Int[Array, ""]
        drawn = jax.random.randint(self.make_rng(self.stream), (), self.low, self.high)
        return x + drawn.astype(x.dtype)
