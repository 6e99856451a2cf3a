# SPDX-License-Identifier: Apache-2.0
"""A chain of layers that hands the training flag to those which take it."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import flax.linen as nn
from jaxtyping import Array, Bool

from .flags import flags_for

__all__ = ["Sequential"]


class Sequential(nn.Module):
    """Calls layers one after the other.

    y = layers[-1](... layers[1](layers[0](x)))

    Paths, keys and bits are those of `flax.linen.Sequential`, a layer without a
    `name` being called `layers_<i>`; but one that has a name keeps it, as under
    `flax_preserve_adopted_names`, which Flax has off. A tuple that a layer returns
    becomes the next layer's positional arguments, a dict its keyword arguments. In
    addition, each layer gets those of the flags that its signature names:

    - `deterministic`, and `use_running_average` (BatchNorm): the flag as given;
    - `train` and `training`: its negation.

    A flag that was already fixed when the layer was made (an attribute of that
    name which is not None, a keyword bound by `functools.partial`) is left alone.

    Attributes:
        layers: Modules, or plain callables such as `flax.linen.relu`.
    """

    layers: Sequence[Callable[..., Any]]

    preserve_adopted_names: ClassVar[bool] = True  # read by Flax

    def __post_init__(self) -> None:
        if not isinstance(self.layers, Sequence):
            raise ValueError(
                "layers: not a list of layers "
                f"(got {type(self.layers).__name__}). Give a list."
            )
        super().__post_init__()

    @nn.compact
    def __call__(
        self, *args: Any, deterministic: bool | Bool[Array, ""] | None = None
    ) -> Any:
        """Calls the layers in order.

        Args:
            *args: What the first layer takes.
            deterministic: Flag for the layers that take one. None hands out no
                flag, which leaves each layer to its own default.

        Returns:
            What the last layer returns.

        Raises:
            ValueError: There are no layers.
        """
        if not self.layers:
            raise ValueError(
                f"layers: nothing to call in '{self.name}' (got []). "
                "Give at least one layer."
            )
        outputs: Any = args
        for layer in self.layers:
            taken = flags_for(layer, deterministic=deterministic)
            if isinstance(outputs, tuple):
                outputs = layer(*outputs, **taken)
            elif isinstance(outputs, dict):
                outputs = layer(**{**taken, **outputs})
            else:
                outputs = layer(outputs, **taken)
        return outputs
