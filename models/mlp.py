# SPDX-License-Identifier: Apache-2.0
"""A multilayer perceptron with dropout."""

import math
from collections.abc import Callable, Sequence

import flax.linen as nn
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

from .dropout import Dropout
from .named import name_axes

__all__ = ["MLP"]


class MLP(nn.Module):
    """Dense layers with an activation and dropout between them.

    h = flatten(x);  h = dropout(activation(dense(h))) per width;  y = dense(h)

    Modules are called `Dense_<i>` and `Dropout_<i>`. The logical axes of h are named
    `batch` and `mlp`.

    Attributes:
        features: Widths of the hidden layers; none gives a linear model.
        num_outputs: Width of the output.
        dropout_rate: Probability to drop a hidden unit.
        activation: Nonlinearity after each hidden layer.
        kernel_init: Initializer of the kernels.
        bias_init: Initializer of the biases.
        dtype: Dtype to compute in; None infers it from inputs and parameters.
    """

    features: Sequence[int]
    num_outputs: int
    dropout_rate: float | Float[Array, ""] = 0.0
    activation: Callable[[Array], Array] = nn.relu
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros_init()
    dtype: Dtype | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch ..."], *, deterministic: bool = False
    ) -> Float[Array, "batch outputs"]:
        """Computes the outputs.

        Args:
            x: Inputs of any shape, flattened but for the batch.
            deterministic: Switches dropout off.

        Returns:
            One row of outputs per input.
        """
        x = x.reshape(x.shape[0], math.prod(x.shape[1:]))
        for features in self.features:
            x = self.activation(self._dense(features)(x))
            x = Dropout(self.dropout_rate)(x, deterministic=deterministic)
            x = name_axes(x, "batch", "mlp")
        return self._dense(self.num_outputs)(x)

    def _dense(self, features: int) -> nn.Dense:
        return nn.Dense(
            features,
            dtype=self.dtype,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
        )
