# SPDX-License-Identifier: Apache-2.0
"""The four idx files of MNIST, or of a data set published in its form.

bytes 0 1     zero
byte  2       kind of the values; 0x08: unsigned bytes
byte  3       number of dimensions
4 bytes each  dimensions, big-endian
the rest      values, the last dimension fastest
"""

import math
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from runner.data.dataset import Dataset
from runner.data.paths import find_directory, read_bytes
from runner.errors import DataError
from runner.spec import MnistSpec

__all__ = ["load_mnist"]

_PATH = "data.path"
_STEMS = {
    f"{part}-{kind}": f"idx{ndim}-ubyte"
    for part in ("train", "t10k")
    for kind, ndim in (("images", 3), ("labels", 1))
}
_FIX = (
    f"Put the four files of the MNIST database there, as published by LeCun et al.: "
    f"{', '.join(f'{stem}-{idx}' for stem, idx in _STEMS.items())}, with or without .gz"
)
_UNSIGNED_BYTE = 0x08
_WHITE = np.float32(255)


def load_mnist(spec: MnistSpec) -> Dataset:
    """60,000 and 10,000 images of 28 x 28, from 0 (paper) to 1 (ink).

    Y. LeCun, L. Bottou, Y. Bengio and P. Haffner, "Gradient-based learning applied
    to document recognition", Proceedings of the IEEE, 1998.

    Raises:
        DataError: a file is absent or damaged, two of them disagree, or there are
            fewer rows than `train_rows`.
    """
    files = _find(spec.path)
    x_train, y_train = _read_part(files["train-images"], files["train-labels"])
    x_test, y_test = _read_part(files["t10k-images"], files["t10k-labels"])
    if x_train.shape[1:] != x_test.shape[1:]:
        raise DataError(
            _PATH,
            "train and test images must be of one size",
            got=(x_train.shape[1:], x_test.shape[1:]),
        )
    kept = len(x_train) if spec.train_rows is None else spec.train_rows
    if kept > len(x_train):
        raise DataError(
            "data.train_rows",
            f"must not exceed the {len(x_train)} rows to train on",
            got=kept,
            fix="Set data.train_rows=null for all of them",
        )
    return Dataset(
        np.divide(x_train[:kept], _WHITE),
        y_train[:kept].astype(np.int32),
        np.divide(x_test, _WHITE),
        y_test.astype(np.int32),
        classes=int(max(y_train.max(), y_test.max())) + 1,
    )


def _find(text: str) -> dict[str, Path]:
    folder = find_directory(text, path=_PATH, fix=_FIX)
    found = {stem: _first_file(folder, stem, idx) for stem, idx in _STEMS.items()}
    missing = [f"{s}-{_STEMS[s]}" for s, file in found.items() if file is None]
    if missing:
        raise DataError(
            _PATH,
            f"no {' and no '.join(missing)} there",
            got=text,
            allowed=f"Looked in {folder}",
            fix=_FIX,
        )
    return {stem: file for stem, file in found.items() if file is not None}


def _first_file(folder: Path, stem: str, idx: str) -> Path | None:
    names = [f"{stem}{dot}{idx}{gz}" for dot in "-." for gz in ("", ".gz")]
    return next((folder / n for n in names if (folder / n).is_file()), None)


def _read_part(
    images: Path, labels: Path
) -> tuple[UInt8[np.ndarray, "rows height width"], UInt8[np.ndarray, " rows"]]:
    x, y = _read_idx(images, ndim=3), _read_idx(labels, ndim=1)
    if len(x) != len(y):
        raise DataError(
            _PATH,
            f"{images.name} and {labels.name} must have equal numbers of rows",
            got=(len(x), len(y)),
            fix="Fetch both files again, from one place",
        )
    return x, y


def _read_idx(file: Path, *, ndim: int) -> UInt8[np.ndarray, "..."]:
    data = read_bytes(file, path=_PATH)
    start = 4 + 4 * ndim
    if data[:2] != bytes(2):
        start_bytes = data[:4].hex(" ")
        raise _damaged(file, "must start with two zero bytes, as idx", start_bytes)
    if len(data) < start:
        raise _damaged(file, f"ends within its {start}-byte header", len(data))
    if data[2] != _UNSIGNED_BYTE:
        raise _damaged(file, "must hold unsigned bytes, kind 0x08", f"0x{data[2]:02x}")
    if data[3] != ndim:
        raise _damaged(file, f"must have {ndim} dimensions", data[3])
    shape = tuple(int(n) for n in np.frombuffer(data[4:start], dtype=">u4"))
    size = math.prod(shape)
    if size == 0:
        raise _damaged(file, "must not be empty", shape)
    if len(data) < start + size:
        raise _damaged(file, f"ends before its {size} values", len(data) - start)
    if len(data) > start + size:
        raise _damaged(file, f"goes on after its {size} values", len(data) - start)
    return np.frombuffer(data, dtype=np.uint8, offset=start).reshape(shape)


def _damaged(file: Path, rule: str, got: object) -> DataError:
    return DataError(_PATH, f"{file.name} {rule}", got=got, fix="Fetch the file again")
