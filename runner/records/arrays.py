# SPDX-License-Identifier: Apache-2.0
"""Named arrays in one `.npz`, whose bytes depend on nothing but them."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from runner.records.files import write_atomically

__all__ = ["write_arrays"]


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays, in the order of their names; the file appears as a whole."""
    content = io.BytesIO()  # NumPy dates every member 1980-01-01
    named: dict[str, Any] = {name: arrays[name] for name in sorted(arrays)}
    np.savez(content, **named)
    write_atomically(path, content.getvalue())
