# SPDX-License-Identifier: Apache-2.0
"""Flax Linen modules that a config reaches by `_target_`.

Float hyperparameters (`rate`, `dropout_rate`, `scale`) may be Python numbers or
traced scalars of any float dtype: neither changes the dtype of what a module
returns, so that one compiled program serves every value.
"""

from .cnn import CNN
from .dropout import Dropout
from .flatten import Flatten
from .mlp import MLP
from .noise import Noise
from .residual import ResidualMLPBlock
from .sequential import Sequential
from .variable import Variable

__all__ = [
    "CNN",
    "MLP",
    "Dropout",
    "Flatten",
    "Noise",
    "ResidualMLPBlock",
    "Sequential",
    "Variable",
]
