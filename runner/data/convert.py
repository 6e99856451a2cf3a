# SPDX-License-Identifier: Apache-2.0
"""Arrays of any kind to the two that a run takes: float32, and int32 labels."""

import numpy as np
from jaxtyping import Float32, Int32, Shaped

from runner.errors import DataError

__all__ = ["check_rows", "count_classes", "to_inputs", "to_labels", "to_targets"]

_LARGEST_LABEL = int(np.iinfo(np.int32).max) - 1


def to_inputs(
    array: np.ndarray, *, path: str, name: str
) -> Float32[np.ndarray, "rows *shape"]:
    """Numbers of any kind as float32; their values are not scaled.

    Args:
        array: What the file holds.
        path: Config leaf that errors name.
        name: What errors call the array.

    Raises:
        DataError: not numbers, no rows, or a value that float32 can't hold.
    """
    _check_numbers(array, path=path, name=name)
    with np.errstate(over="ignore"):
        result = np.ascontiguousarray(array, dtype=np.float32)
    finite = np.isfinite(result)
    if not finite.all():
        where = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise DataError(
            path,
            f"{name} must be finite, and within float32, at {list(where)}",
            got=float(array[where]),
            fix="Drop or fill such rows before the run",
        )
    return result


def to_labels(
    array: np.ndarray, *, path: str, name: str
) -> Int32[np.ndarray, "rows *target"]:
    """Whole numbers as int32 labels; arguments as `to_inputs`.

    Raises:
        DataError: not numbers, no rows, or a label below 0 or beyond int32.
    """
    _check_numbers(array, path=path, name=name)
    for label in (array.min(), array.max()):
        if not 0 <= label <= _LARGEST_LABEL:
            raise DataError(
                path,
                f"{name} holds whole numbers, which are labels and count from 0",
                got=int(label),
                allowed=f"Labels: 0 to {_LARGEST_LABEL}",
                fix="Number the classes from 0; for a regression, give floats (3.0)",
            )
    return np.ascontiguousarray(array, dtype=np.int32)


def to_targets(
    array: np.ndarray, *, path: str, name: str
) -> Shaped[np.ndarray, "rows *target"]:
    """Floats as `to_inputs`, integers and booleans as `to_labels`; shapes stay."""
    convert = to_inputs if array.dtype.kind == "f" else to_labels
    return convert(array, path=path, name=name)


def check_rows(x: np.ndarray, y: np.ndarray, *, path: str, names: str) -> None:
    """Refuses inputs and targets that differ in their number of rows."""
    if len(x) != len(y):
        raise DataError(
            path,
            f"{names} must have equal numbers of rows",
            got=(len(x), len(y)),
        )


def count_classes(*targets: np.ndarray) -> int | None:
    """The highest label and one; None where the targets are not labels."""
    if any(y.dtype != np.int32 for y in targets):
        return None
    return int(max(y.max() for y in targets)) + 1


def _check_numbers(array: np.ndarray, *, path: str, name: str) -> None:
    if array.dtype.kind not in "biuf":
        raise DataError(
            path,
            f"{name} must hold real numbers",
            got=str(array.dtype),
            allowed="Allowed: booleans, integers, floats",
        )
    if array.ndim == 0:
        raise DataError(path, f"{name} must have rows", got=array.item())
    if array.size == 0:
        raise DataError(path, f"{name} must not be empty", got=array.shape)
