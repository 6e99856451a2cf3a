# SPDX-License-Identifier: Apache-2.0
"""Flax Linen modules that a config reaches by `_target_`.

Float hyperparameters (`rate`, `dropout_rate`, `scale`) may be Python numbers or
traced scalars of any float dtype: neither changes the dtype of what a module
returns, so that one compiled program serves every value.
"""

from .branches import Branches, Identity
from .cnn import CNN
from .control import Cond, Switch, WhileLoop
from .declare import AddNoise, Compact, Declare
from .dropout import Dropout
from .flatten import Flatten
from .keys import Keys, RandomInteger
from .mlp import MLP
from .noise import Noise
from .residual import ResidualMLPBlock
from .sequential import Sequential
from .sparsity import KLSparsity
from .variable import Variable

__all__ = [
    "CNN",
    "MLP",
    "AddNoise",
    "Branches",
    "Compact",
    "Cond",
    "Declare",
    "Dropout",
    "Flatten",
    "Identity",
    "KLSparsity",
    "Keys",
    "Noise",
    "RandomInteger",
    "ResidualMLPBlock",
    "Sequential",
    "Switch",
    "Variable",
    "WhileLoop",
]
