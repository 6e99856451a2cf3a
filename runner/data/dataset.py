# SPDX-License-Identifier: Apache-2.0
"""A data set in memory: four arrays."""

import hashlib
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Shaped

__all__ = ["Dataset"]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Inputs and targets, to train on and to be tested on.

    Args:
        x_train, x_test: Inputs, a row first.
        y_train, y_test: int32 labels, or float32 targets; a row first.
        classes: Number of classes where the targets are labels, else None.
    """

    x_train: Float32[np.ndarray, "train *shape"]
    y_train: Shaped[np.ndarray, "train *target"]
    x_test: Float32[np.ndarray, "test *shape"]
    y_test: Shaped[np.ndarray, "test *target"]
    classes: int | None

    def digest(self) -> str:
        """SHA-256, in hex, over dtype, shape and bytes of the four arrays."""
        sha = hashlib.sha256()
        for array in (self.x_train, self.y_train, self.x_test, self.y_test):
            sha.update(f"{array.dtype.str} {array.shape}\n".encode())
            sha.update(np.ascontiguousarray(array).reshape(-1).data)
        return sha.hexdigest()
