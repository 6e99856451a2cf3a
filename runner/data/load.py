# SPDX-License-Identifier: Apache-2.0
"""From a `data` spec to its data set: each source has a file of its own."""

import numpy as np

from runner.data.arrays import load_arrays
from runner.data.dataset import Dataset
from runner.data.digits import load_digits
from runner.data.mnist import load_mnist
from runner.data.table import load_table
from runner.spec import ArraysSpec, CsvSpec, DataSpec, DigitsSpec, MnistSpec

__all__ = ["load_data"]


def load_data(spec: DataSpec, *, split: np.random.Generator | None) -> Dataset:
    """Reads a data set; a pure function of its files, `spec` and `split`.

    Args:
        spec: The `data` part of a run's spec.
        split: Chooses the test rows of a source that has none of its own; where
            the source has some (mnist, an `.npz` with `x_train`), not drawn from.

    Raises:
        DataError: a file that is absent, unreadable, damaged or misshapen.
    """
    match spec:
        case DigitsSpec():
            return load_digits(spec, split=split)
        case ArraysSpec():
            return load_arrays(spec, split=split)
        case MnistSpec():
            return load_mnist(spec)
        case CsvSpec():
            return load_table(spec, split=split)
    raise TypeError(f"no loader for {type(spec).__name__}")
