# SPDX-License-Identifier: Apache-2.0
"""metrics.jsonl and states.jsonl: a JSON object a line.

    {"phase": "train", "step": 3, "loss": 0.6931471824645996}
    {"step": 50, "batches": "9f86d081...", "state": "52a9d865fca5510e"}

A float32 is written as the shortest decimal that gives its float64 value back, so
no bit is lost. A value that is not finite is null, since JSON knows none.
"""

import hashlib
import json
import math
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from runner.errors import RecordError
from runner.records.events import EvalRecord, StateRecord, TrainRecord

__all__ = ["LineWriter", "Written", "format_record", "parse_lines", "read_metrics"]


@dataclass(frozen=True)
class Written:
    """What a file holds so far: its bytes, and SHA-256 hex over them."""

    size: int
    sha256: str


class LineWriter:
    """Appends lines, so that a kill leaves one partial line at most.

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
            self._size, self._digest = _read_digest(self._file)
        except OSError as error:
            raise _unwritable(path, error) from error

    @property
    def written(self) -> Written:
        """What the file holds."""
        return Written(self._size, self._digest.hexdigest())

    def write(self, text: str) -> None:
        """Appends whole lines; where the disk takes a part, none of them stays."""
        content = text.encode()
        rest = memoryview(content)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._file, self._size)
            raise _unwritable(self._path, error) from error
        self._size += len(content)
        self._digest.update(content)

    def sync(self) -> None:
        """Waits until the disk has every line."""
        try:
            os.fsync(self._file)
        except OSError as error:
            raise _unwritable(self._path, error) from error

    def close(self) -> None:
        """Waits until the disk has every line; writes no more."""
        try:
            self.sync()
        finally:
            os.close(self._file)


def format_record(record: TrainRecord | EvalRecord | StateRecord) -> str:
    """A line for each step of a record."""
    if isinstance(record, TrainRecord):
        columns = {k: _json_column(v) for k, v in record.metrics.items()}
        return _lines("train", record.first_step, columns)
    if isinstance(record, EvalRecord):
        cells = {k: [_json_cell(float(v))] for k, v in record.metrics.items()}
        return _lines("eval", record.step, cells)
    row = {"step": record.step, "batches": record.batches, "state": record.state}
    return json.dumps(row) + "\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads every finished line; null stays None, so that equal runs compare equal.

    Raises:
        RecordError: the file is absent, or a line is not a JSON object.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RecordError(f"{path}: can't be read ({error.strerror}).") from error
    return parse_lines(content, name=str(path))


def parse_lines(content: bytes, *, name: str) -> list[dict[str, Any]]:
    """The rows of a file; what follows its last newline is none.

    Raises:
        RecordError: a line is not a JSON object with a step.
    """
    *lines, _ = content.split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line, parse_constant=_refuse)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise RecordError(f"{name}: line {number} is not a JSON object.")
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


def _read_digest(file: int) -> tuple[int, Any]:
    size, digest = 0, hashlib.sha256()
    if os.fstat(file).st_size:  # no device, which might never end
        while content := os.pread(file, 2**20, size):
            digest.update(content)
            size += len(content)
    return size, digest


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
