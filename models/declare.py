# SPDX-License-Identifier: Apache-2.0
"""A module whose layers and variables are declared, as in a body with `nn.compact`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, Shaped

from .flags import flags_for

__all__ = ["AddNoise", "Compact", "Declare"]


@dataclass(frozen=True)
class Declare:
    """A variable of the module that it stands in.

    self.param(variable, init_fn, shape)                                  in params
    self.variable(collection, variable, lambda: init_fn(make_rng(stream), shape))

    Args:
        variable: Its name.
        init_fn: Function of a key and a shape.
        collection: Collection to hold it.
        stream: Stream to initialise from; in `params`, Flax takes `params`.
        shape: None is that of the values at this place.
        add: Whether it is added to those values.
    """

    variable: str
    init_fn: Callable[[Key[Array, ""], tuple[int, ...]], Shaped[Array, "..."]]
    collection: str = "params"
    stream: str = "params"
    shape: Sequence[int] | None = None
    add: bool = False

    def __post_init__(self) -> None:
        if self.collection == "params" and self.stream != "params":
            raise ValueError(
                "stream: self.param draws from params "
                f"(got {self.stream!r}). Leave it out, or name another collection."
            )


@dataclass(frozen=True)
class AddNoise:
    """Gaussian noise from a key of the module that it stands in.

    x + scale * normal(make_rng(stream), x.shape);  x where `deterministic` is true

    Args:
        scale: Standard deviation of the noise.
        stream: Stream to draw from.
    """

    scale: float | Float[Array, ""] = 1.0
    stream: str = "noise"


class Compact(nn.Module):
    """Takes steps in order: calls a layer, or does something of its own.

    x = step(x) for a layer;  x, or x + variable, for a `Declare`;
    x + noise for an `AddNoise`

    Paths, call counts and keys are those of a module whose compact body says the
    same. A layer that has no name is called `steps_<i>`: name it as that body would
    (`Dense_0`).

    Attributes:
        steps: Modules, plain functions, `Declare`s and `AddNoise`s. A layer gets the
            training flag if its signature names it.
    """

    steps: Sequence[Callable[..., Any] | Declare | AddNoise]

    preserve_adopted_names: ClassVar[bool] = True  # read by Flax

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "..."],
        *,
        deterministic: bool | Bool[Array, ""] | None = None,
    ) -> Float[Array, "..."]:
        """Takes the steps.

        Args:
            x: What the first step takes.
            deterministic: Flag for the layers that take one; None hands out none.

        Returns:
            What the last step leaves.
        """
        for step in self.steps:
            if isinstance(step, Declare):
                value = self._declare(step, x)
                x = x + value if step.add else x
            elif isinstance(step, AddNoise):
                key = self.make_rng(step.stream)
                noise = jax.random.normal(key, x.shape, x.dtype)
                noise = jnp.asarray(step.scale, x.dtype) * noise
                x = jnp.where(
                    False if deterministic is None else deterministic, x, x + noise
                )
            else:
                x = step(x, **flags_for(step, deterministic=deterministic))
        return x

    def _declare(self, step: Declare, x: Array) -> Array:
        shape = tuple(x.shape if step.shape is None else step.shape)
        if step.collection == "params":
            value: Array = self.param(step.variable, step.init_fn, shape)
            return value
        held = self.variable(
            step.collection,
            step.variable,
            lambda: step.init_fn(self.make_rng(step.stream), shape),
        )
        return held.value
