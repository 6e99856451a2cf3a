# SPDX-License-Identifier: Apache-2.0
"""A small convolutional network with dropout."""

import math
from collections.abc import Callable, Sequence

import flax.linen as nn
from flax.typing import Dtype, Initializer
from jax import lax
from jaxtyping import Array, Float

from .dropout import Dropout
from .named import name_axes

__all__ = ["CNN"]


class CNN(nn.Module):
    """Convolutions with pooling, then dense layers with dropout.

    h = avg_pool(activation(conv(h))) per channel count;  h = flatten(h);
    h = dropout(activation(dense(h))) per width;  y = dense(h)

    Convolutions are 3 x 3 and keep the size, pooling is 2 x 2 and halves it. The
    default is the network of Flax's MNIST example, plus dropout. Modules are called
    `Conv_<i>`, `Dense_<i>` and `Dropout_<i>`. The logical axes of h are named `batch`,
    `height`, `width` and `channels`, and in dense layers `batch` and `mlp`.

    Attributes:
        num_outputs: Width of the output.
        channels: Channels of the convolutions.
        features: Widths of the hidden dense layers.
        dropout_rate: Probability to drop a hidden dense unit.
        activation: Nonlinearity after each convolution and hidden layer.
        kernel_init: Initializer of the kernels.
        bias_init: Initializer of the biases.
        conv_kernel_init: Initializer of the kernels of convolutions, which may name
            four axes; None is `kernel_init`.
        dtype: Dtype to compute in; None infers it from inputs and parameters.
    """

    num_outputs: int
    channels: Sequence[int] = (32, 64)
    features: Sequence[int] = (256,)
    dropout_rate: float | Float[Array, ""] = 0.0
    activation: Callable[[Array], Array] = nn.relu
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros_init()
    conv_kernel_init: Initializer | None = None
    dtype: Dtype | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch h w"] | Float[Array, "batch h w c"],
        *,
        deterministic: bool = False,
    ) -> Float[Array, "batch outputs"]:
        """Computes the outputs.

        Args:
            x: Images; without a channel axis they have one channel.
            deterministic: Switches dropout off.

        Returns:
            One row of outputs per image.

        Raises:
            ValueError: The inputs are no batch of images.
        """
        if x.ndim not in (3, 4):
            raise ValueError(
                f"x: not a batch of images (got shape {x.shape}). "
                "Allowed: (batch, h, w), (batch, h, w, c). Add the missing axes."
            )
        if x.ndim == 3:
            x = x[..., None]
        for channels in self.channels:
            x = self.activation(self._conv(channels)(x))
            x = name_axes(_avg_pool(x), "batch", "height", "width", "channels")
        x = x.reshape(x.shape[0], math.prod(x.shape[1:]))
        for features in self.features:
            x = self.activation(self._dense(features)(x))
            x = Dropout(self.dropout_rate)(x, deterministic=deterministic)
            x = name_axes(x, "batch", "mlp")
        return self._dense(self.num_outputs)(x)

    def _conv(self, channels: int) -> nn.Conv:
        return nn.Conv(
            channels,
            kernel_size=(3, 3),
            dtype=self.dtype,
            kernel_init=self.conv_kernel_init or self.kernel_init,
            bias_init=self.bias_init,
        )

    def _dense(self, features: int) -> nn.Dense:
        return nn.Dense(
            features,
            dtype=self.dtype,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
        )


def _avg_pool(x: Float[Array, "batch h w c"]) -> Float[Array, "batch h/2 w/2 c"]:
    # `nn.avg_pool` divides by a NumPy int64, which strict promotion refuses.
    total: Array = nn.pool(x, 0.0, lax.add, (2, 2), (2, 2), "VALID")
    return total / 4
