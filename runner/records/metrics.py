# SPDX-License-Identifier: Apache-2.0
"""metrics.jsonl: a JSON object a line, for each train step and each evaluation.

    {"phase": "train", "step": 3, "loss": 0.6931471824645996}

A float32 is written as the shortest decimal that gives its float64 value back, so
no bit is lost. A value that is not finite is null, since JSON knows none.
"""

import json
import math
import os
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from runner.errors import RecordError
from runner.records.events import EvalRecord, TrainRecord

__all__ = ["MetricsWriter", "read_metrics"]


class MetricsWriter:
    """Appends records, each by one `write`: a kill leaves one partial line at most.

    Args:
        path: The file; made if absent. A line that an earlier writer left
            unfinished is cut off.

    Raises:
        RecordError: it can't be opened or written; from every method.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            _cut_unfinished_line(self._file)
        except OSError as error:
            raise _unwritable(path, error) from error

    def write(self, record: TrainRecord | EvalRecord) -> None:
        """Appends a line for each step of the record."""
        if isinstance(record, TrainRecord):
            columns = {k: _json_column(v) for k, v in record.metrics.items()}
            text = _lines("train", record.first_step, columns)
        else:
            cells = {k: [_json_cell(float(v))] for k, v in record.metrics.items()}
            text = _lines("eval", record.step, cells)
        rest = memoryview(text.encode())
        try:
            while rest:  # a disk that is nearly full takes a part
                rest = rest[os.write(self._file, rest) :]
        except OSError as error:
            raise _unwritable(self._path, error) from error

    def close(self) -> None:
        """Waits until the disk has every line."""
        try:
            os.fsync(self._file)
        except OSError as error:
            raise _unwritable(self._path, error) from error
        finally:
            os.close(self._file)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads every finished line; null stays None, so that equal runs compare equal.

    Raises:
        RecordError: the file is absent, or a line is not a JSON object.
    """
    try:
        *lines, _ = path.read_bytes().split(b"\n")  # what follows the last newline
    except OSError as error:
        raise RecordError(f"{path}: can't be read ({error.strerror}).") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line, parse_constant=_refuse)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise RecordError(f"{path}: line {number} is not a JSON object.")
        rows.append(row)
    return rows


def _lines(phase: str, first_step: int, columns: dict[str, list[str]]) -> str:
    names = [json.dumps(k).replace("%", "%%") for k in columns]
    fields = "".join(f", {name}: %s" for name in names)
    line = f'{{"phase": "{phase}", "step": %s{fields}}}\n'
    steps = range(first_step, first_step + len(next(iter(columns.values()))))
    return "".join(map(line.__mod__, zip(steps, *columns.values(), strict=True)))


def _json_column(values: np.ndarray) -> list[str]:
    cells = values.tolist()  # float64, whose repr is its shortest decimal
    if np.isfinite(values).all():
        return list(map(repr, cells))
    return list(map(_json_cell, cells))


def _json_cell(value: float) -> str:
    return repr(value) if math.isfinite(value) else "null"


def _cut_unfinished_line(file: int) -> None:
    size = end = os.fstat(file).st_size
    while end:
        start = max(0, end - 65_536)
        kept = start + os.pread(file, end - start, start).rfind(b"\n") + 1
        if kept > start or not start:
            if kept < size:
                os.ftruncate(file, kept)
            return
        end = start


def _unwritable(path: Path, error: OSError) -> RecordError:
    return RecordError(f"{path}: can't be written ({error.strerror or error}).")


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)
