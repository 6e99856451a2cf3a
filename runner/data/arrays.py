# SPDX-License-Identifier: Apache-2.0
"""Arrays of anyone's, as NumPy saves them; nothing is ever unpickled."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from runner.data.convert import check_rows, count_classes, to_inputs, to_targets
from runner.data.dataset import Dataset
from runner.data.paths import find_file, open_file
from runner.data.split import split_rows
from runner.errors import DataError
from runner.spec import ArraysSpec

__all__ = ["load_arrays"]

_PATH, _TARGET_PATH = "data.path", "data.target_path"
_NPY, _ZIPS, _PICKLE = b"\x93NUMPY", (b"PK\x03\x04", b"PK\x05\x06"), b"\x80"
_WHOLE, _PARTS = ("x", "y"), ("x_train", "y_train", "x_test", "y_test")


def load_arrays(spec: ArraysSpec, *, split: np.random.Generator | None) -> Dataset:
    """An `.npz` of four arrays or two, or an `.npy` of inputs and one of targets.

    Inputs become float32, unscaled. Whole targets become int32 labels, others
    float32. Shapes stay: whether a target is (rows,) or (rows, 1) is the task's.

    Raises:
        DataError: a file that is absent, not NumPy's, damaged or misshapen.
    """
    file = find_file(spec.path, path=_PATH)
    if not _is_npz(file, path=_PATH):
        return _split(*_read_pair(file, spec.target_path), spec=spec, split=split)
    if spec.target_path is not None:
        raise DataError(
            _TARGET_PATH,
            f"{file.name} holds targets of its own",
            got=spec.target_path,
            fix="Set data.target_path=null",
        )
    arrays = _read_npz(file)
    if "x" in arrays:
        _check_npz_rows(file, arrays, "x", "y")
        return _split(arrays["x"], arrays["y"], spec=spec, split=split)
    for part in ("train", "test"):
        _check_npz_rows(file, arrays, f"x_{part}", f"y_{part}")
    for kind in ("x", "y"):
        _check_npz_parts(file, arrays, f"{kind}_train", f"{kind}_test")
    classes = count_classes(arrays["y_train"], arrays["y_test"])
    return Dataset(**arrays, classes=classes)


def _split(
    x: np.ndarray, y: np.ndarray, *, spec: ArraysSpec, split: np.random.Generator | None
) -> Dataset:
    train, test = split_rows(len(x), test_fraction=spec.test_fraction, generator=split)
    return Dataset(x[train], y[train], x[test], y[test], classes=count_classes(y))


def _check_npz_rows(file: Path, arrays: dict[str, Any], x: str, y: str) -> None:
    names = f"{x} and {y} in {file.name}"
    check_rows(arrays[x], arrays[y], path=_PATH, names=names)


def _check_npz_parts(file: Path, arrays: dict[str, Any], train: str, test: str) -> None:
    both = [(arrays[n].dtype.name, *arrays[n].shape[1:]) for n in (train, test)]
    if both[0] != both[1]:
        raise DataError(
            _PATH,
            f"{train} and {test} in {file.name} must have rows of one kind and shape",
            got=tuple(both),
        )


def _read_npz(file: Path) -> dict[str, np.ndarray]:
    """The arrays that a run takes, converted; others are not read."""
    with open_file(file, path=_PATH) as stream:
        archive = _attempt(
            lambda: np.load(stream, allow_pickle=False), name=file.name, path=_PATH
        )
        wanted = _PARTS if set(_PARTS).intersection(archive.files) else _WHOLE
        missing = [name for name in wanted if name not in archive.files]
        if missing:
            raise DataError(
                _PATH,
                f"{file.name} lacks {', '.join(missing)}",
                got=sorted(archive.files),
                allowed=f"Needed: {', '.join(_PARTS)}; or {', '.join(_WHOLE)}",
                fix="Save them by these names with numpy.savez",
            )
        return {name: _read_member(archive, name, file) for name in wanted}


def _read_member(archive: Any, name: str, file: Path) -> np.ndarray:
    called = f"{name} in {file.name}"
    array = _attempt(lambda: archive[name], name=called, path=_PATH)
    if not isinstance(array, np.ndarray):  # NumPy hands out anything as bytes
        raise DataError(_PATH, f"{called} is not an array")
    convert = to_inputs if name.startswith("x") else to_targets
    return convert(array, path=_PATH, name=called)


def _read_pair(file: Path, target_path: str | None) -> tuple[np.ndarray, np.ndarray]:
    if target_path is None:
        raise DataError(
            _TARGET_PATH,
            "inputs in an .npy file need another of targets",
            got=None,
            fix="Set data.target_path, or save both as x and y with numpy.savez",
        )
    target = find_file(target_path, path=_TARGET_PATH)
    if _is_npz(target, path=_TARGET_PATH):
        raise DataError(_TARGET_PATH, "must be .npy, and is an .npz", got=target_path)
    x = to_inputs(_read_npy(file, path=_PATH), path=_PATH, name=file.name)
    raw = _read_npy(target, path=_TARGET_PATH)
    y = to_targets(raw, path=_TARGET_PATH, name=target.name)
    check_rows(x, y, path=_TARGET_PATH, names=f"{file.name} and {target.name}")
    return x, y


def _read_npy(file: Path, *, path: str) -> np.ndarray:
    with open_file(file, path=path) as stream:
        array: np.ndarray = _attempt(
            lambda: np.load(stream, allow_pickle=False), name=file.name, path=path
        )
        if stream.read(1):
            raise DataError(path, f"{file.name} goes on after its array")
    return array


def _attempt(read: Callable[[], Any], *, name: str, path: str) -> Any:
    try:
        return read()
    except Exception as error:  # damage raises whatever is met first: zlib.error, ...
        if "Object arrays" in str(error):
            raise DataError(
                path,
                f"{name} holds Python objects, and loading them would run code",
                fix="Save it with a dtype of numbers",
            ) from error
        raise DataError(
            path,
            f"{name} is truncated or damaged",
            allowed=f"NumPy: {str(error)[:120] or type(error).__name__}",
            fix="Save or fetch it again",
        ) from error


def _is_npz(file: Path, *, path: str) -> bool:
    """Whether it is an `.npz`, else an `.npy`: by its first bytes, not its name."""
    with open_file(file, path=path) as stream:
        start = stream.read(len(_NPY))
    if start == _NPY:
        return False
    if start.startswith(_ZIPS):
        return True
    rule = "is neither .npz nor .npy" if start else "is empty"
    if start.startswith(_PICKLE):
        rule = "is a pickle, and loading one would run code"
    fix = "Save the arrays with numpy.savez"
    raise DataError(path, f"{file.name} {rule}", fix=fix)
