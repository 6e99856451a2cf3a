# SPDX-License-Identifier: Apache-2.0
"""The handwritten digits that lie inside scikit-learn, read without importing it."""

import importlib.util
import io
from pathlib import Path

import numpy as np

from runner.data.dataset import Dataset
from runner.data.paths import read_bytes
from runner.data.split import split_rows
from runner.errors import DataError
from runner.spec import DigitsSpec

__all__ = ["load_digits"]

_SIDE, _CLASSES = 8, 10
_INK = np.float32(16)


def load_digits(spec: DigitsSpec, *, split: np.random.Generator | None) -> Dataset:
    """1,797 images of 8 x 8, as counts of ink from 0 to 16, divided by 16.

    E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI
    Machine Learning Repository, 1998.

    Raises:
        DataError: scikit-learn is absent, or its file is damaged.
    """
    file = _find()
    text = read_bytes(file, path="data.name")
    try:
        table = np.loadtxt(io.BytesIO(text), delimiter=",", dtype=np.uint8)
    except ValueError as error:
        raise _damaged(file) from error
    if table.ndim != 2 or table.shape[1] != _SIDE**2 + 1:
        raise _damaged(file)
    x = table[:, :-1].reshape(-1, _SIDE, _SIDE) / _INK
    y = table[:, -1].astype(np.int32)
    train, test = split_rows(len(x), test_fraction=spec.test_fraction, generator=split)
    return Dataset(x[train], y[train], x[test], y[test], classes=_CLASSES)


def _find() -> Path:
    # Importing scikit-learn takes a second; finding it does not.
    package = importlib.util.find_spec("sklearn")
    if package is None or not package.submodule_search_locations:
        raise DataError(
            "data.name",
            "scikit-learn, which holds these images, is not installed",
            got="digits",
            fix="Run: pip install scikit-learn",
        )
    home = Path(next(iter(package.submodule_search_locations)))
    return home / "datasets" / "data" / "digits.csv.gz"


def _damaged(file: Path) -> DataError:
    return DataError(
        "data.name",
        "the images within scikit-learn are damaged",
        got=str(file),
        fix="Run: pip install --force-reinstall scikit-learn",
    )
