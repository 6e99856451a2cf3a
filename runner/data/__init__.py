# SPDX-License-Identifier: Apache-2.0
"""Data sets as arrays in memory, and the order in which their rows are read.

    load_data(spec, split=...)    files -> Dataset: one loader a file
    BatchOrder(...).indices(...)  steps -> rows: no state, so nothing to restore

Which rows are test rows, and how an epoch is shuffled, is a pure function of the
generators that the caller derives from the run's streams. NumPy only.
"""

from runner.data.dataset import Dataset
from runner.data.load import load_data
from runner.data.order import BatchOrder

__all__ = ["BatchOrder", "Dataset", "load_data"]
