# SPDX-License-Identifier: Apache-2.0
"""Named arrays in one `.npz`, whose bytes depend on nothing but them."""

import io
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from runner.errors import RecordError
from runner.records.files import write_atomically

__all__ = ["read_arrays", "write_arrays"]

_MOST = 4 * 2**30  # bytes of all arrays together


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays, in the order of their names; the file appears as a whole."""
    content = io.BytesIO()  # NumPy dates every member 1980-01-01
    named: dict[str, Any] = {name: arrays[name] for name in sorted(arrays)}
    np.savez(content, **named)
    write_atomically(path, content.getvalue())


def read_arrays(content: bytes, *, name: str) -> dict[str, np.ndarray]:
    """The arrays of an `.npz`, by their names; nothing is unpickled.

    Args:
        content: The file's bytes.
        name: What to call it in messages.

    Raises:
        RecordError: it is damaged, or holds what is no array of numbers.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if sum(info.file_size for info in archive.infolist()) > _MOST:
                raise ValueError(f"more than {_MOST >> 30} GiB")
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            found = {each: arrays[each] for each in sorted(arrays.files)}
        if any(not isinstance(array, np.ndarray) for array in found.values()):
            raise ValueError("a member that is no array")
    except _DAMAGED as error:
        what = " ".join(str(error).split())[:200]
        raise RecordError(f"{name} is damaged ({what}).") from error
    return found


_DAMAGED = (
    *(OSError, EOFError, KeyError, ValueError, RuntimeError, MemoryError),
    *(zipfile.BadZipFile, zlib.error, SyntaxError, TypeError),
)
