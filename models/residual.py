# SPDX-License-Identifier: Apache-2.0
"""The residual block of Flax's guides, with dropout."""

from collections.abc import Callable

import flax.linen as nn
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

from .dropout import Dropout
from .named import name_axes

__all__ = ["ResidualMLPBlock"]


class ResidualMLPBlock(nn.Module):
    """A dense layer, an activation and dropout, added to the input.

    y = x + dropout(activation(dense(x)))

    `ResidualMLPBlock` of the Flax guides on lifted transforms, plus dropout. Its
    modules are called `Dense_0` and `Dropout_0`. The first axis of the branch is named
    `batch`, the last one `mlp`, where it has both.

    Attributes:
        features: Width; None is the input's, the only one that can be added.
        dropout_rate: Probability to drop a unit of the branch.
        activation: Nonlinearity of the branch.
        kernel_init: Initializer of the kernel.
        bias_init: Initializer of the bias.
        dtype: Dtype to compute in; None infers it from inputs and parameters.
    """

    features: int | None = None
    dropout_rate: float | Float[Array, ""] = 0.0
    activation: Callable[[Array], Array] = nn.relu
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros_init()
    dtype: Dtype | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "... features"], *, deterministic: bool = False
    ) -> Float[Array, "... features"]:
        """Adds the branch to the input.

        Args:
            x: Inputs of any number of axes.
            deterministic: Switches dropout off.

        Returns:
            Outputs of the input's shape.

        Raises:
            ValueError: `features` is not the input's width.
        """
        width = x.shape[-1]
        if self.features not in (None, width):
            raise ValueError(
                f"features: not the input's width (got {self.features}, "
                f"have {width}). Leave it out."
            )
        h = nn.Dense(
            width,
            dtype=self.dtype,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
        )(x)
        h = Dropout(self.dropout_rate)(self.activation(h), deterministic=deterministic)
        if h.ndim > 1:
            h = name_axes(h, "batch", *[None] * (h.ndim - 2), "mlp")
        return x + h
