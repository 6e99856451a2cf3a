# SPDX-License-Identifier: Apache-2.0
"""A table of numbers as text, with a header; one column is the target."""

import csv
import io
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int64

from runner.data.convert import count_classes, to_inputs, to_labels
from runner.data.dataset import Dataset
from runner.data.paths import find_file, read_bytes
from runner.data.split import split_rows
from runner.errors import DataError, did_you_mean
from runner.spec import CsvSpec

__all__ = ["load_table"]

_PATH, _TARGET = "data.path", "data.target"
_DELIMITERS = ",;\t"
_LARGEST = np.finfo(np.float32).max
_SHOWN = 20


@dataclass(frozen=True, eq=False)
class _Table:
    """The numbers of a file.

    Args:
        names: Of the columns, from the header.
        values: One row for each line that is not blank.
        lines: Line of the file at which each row ends, from 1.
        whole: Whether no cell of the target has a decimal point or an exponent.
    """

    names: list[str]
    values: Float64[np.ndarray, "rows columns"]
    lines: Int64[np.ndarray, " rows"]
    whole: bool


def load_table(spec: CsvSpec, *, split: np.random.Generator | None) -> Dataset:
    """All columns but the target are inputs, in the order of the header.

    x = (x - mean(x_train)) / std(x_train)    if `standardize`

    A target of whole numbers holds labels. With a decimal point or an exponent in
    any of its cells, it holds float32 targets.

    Raises:
        DataError: an absent file, an unknown column, a cell that is no number.
    """
    file = find_file(spec.path, path=_PATH)
    table = _read(file, target=spec.target)
    column = table.names.index(spec.target)
    x, y = np.delete(table.values, column, axis=1), table.values[:, column]
    train, test = split_rows(len(x), test_fraction=spec.test_fraction, generator=split)
    if spec.standardize:
        x = _standardize(x, by=x[train])
    x = to_inputs(x, path=_PATH, name=file.name)
    convert = to_labels if table.whole else to_inputs
    y = convert(y, path=_TARGET, name=f"column {spec.target!r} of {file.name}")
    classes = count_classes(y)
    return Dataset(x[train], y[train], x[test], y[test], classes=classes)


def _standardize(
    x: Float64[np.ndarray, "rows columns"], *, by: Float64[np.ndarray, "train columns"]
) -> Float64[np.ndarray, "rows columns"]:
    # The deviation of equal numbers may come out as a rounding error above 0.
    constant = by.min(axis=0) == by.max(axis=0)
    mean = np.where(constant, by[0], by.mean(axis=0))
    scale = np.where(constant, 1.0, by.std(axis=0))
    standardized: np.ndarray = (x - mean) / scale
    return standardized


def _read(file: Path, *, target: str) -> _Table:
    try:
        text = read_bytes(file, path=_PATH).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(_PATH, f"{file.name} must be text in UTF-8") from error
    rows = _rows(text, file)
    names = [name.strip() for name in next(rows, (0, [""]))[1]]
    _check_names(names, file, target=target)
    column, whole = names.index(target), True
    cells, lines = array("d"), array("q")
    for line, row in rows:
        if len(row) != len(names):
            raise DataError(
                _PATH,
                f"line {line} of {file.name} must have {len(names)} cells",
                got=len(row),
            )
        try:
            cells.extend([float(cell) for cell in row])
        except ValueError:
            raise _no_number(row, names, line, file) from None
        lines.append(line)
        whole = whole and row[column].strip().lstrip("+-").isdecimal()
    if not lines:
        raise DataError(_PATH, f"{file.name} has no rows below its header")
    values = np.frombuffer(cells, dtype=np.float64).reshape(-1, len(names))
    table = _Table(names, values, np.frombuffer(lines, dtype=np.int64), whole)
    _check_finite(table, file)
    return table


def _rows(text: str, file: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of each line that is not blank."""
    first = next(io.StringIO(text.lstrip("\r\n"), newline=""), "")
    delimiter = max(_DELIMITERS, key=first.count)
    stream = io.StringIO(text, newline="")
    reader = csv.reader(stream, delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        for row in reader:
            if len(row) > 1 or "".join(row).strip():
                yield reader.line_num, row
    except csv.Error as error:
        raise DataError(
            _PATH,
            f"line {reader.line_num} of {file.name} is no line of a table",
            allowed=f"Python's csv: {error}",
        ) from error


def _check_names(names: list[str], file: Path, *, target: str) -> None:
    if all(_is_number(name) or not name for name in names):
        raise DataError(
            _PATH,
            f"{file.name} must start with the names of its columns",
            got=names,
            fix="Add them as its first line",
        )
    if "" in names:
        raise DataError(
            _PATH,
            f"column {names.index('') + 1} of {file.name} has no name",
            fix="Name it, or remove it if it only counts the rows",
        )
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise DataError(_PATH, f"{file.name} has two columns of one name", got=twice[0])
    if target not in names:
        shown = [repr(name) for name in names[:_SHOWN]]
        if len(names) > _SHOWN:
            shown.append(f"{len(names) - _SHOWN} more")
        raise DataError(
            _TARGET,
            f"not a column of {file.name}",
            got=target,
            allowed=f"Columns: {', '.join(shown)}",
            fix=did_you_mean(target, names),
        )
    if len(names) == 1:
        raise DataError(
            _PATH, f"{file.name} has no column besides the target", got=target
        )


def _check_finite(table: _Table, file: Path) -> None:
    bad = ~(np.abs(table.values) <= _LARGEST)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise DataError(
            _PATH,
            f"line {table.lines[row]}, column {table.names[column]!r} of {file.name} "
            "must be finite, and within float32",
            got=float(table.values[row, column]),
            fix="Drop or fill such rows before the run",
        )


def _no_number(row: list[str], names: list[str], line: int, file: Path) -> DataError:
    name, cell = next(
        (n, c) for n, c in zip(names, row, strict=True) if not _is_number(c)
    )
    empty = not cell.strip()
    return DataError(
        _PATH,
        f"line {line}, column {name!r} of {file.name} must be a number",
        got=cell,
        allowed=None if empty else "Allowed: digits, with a decimal point, as 1.5e-3",
        fix="Drop or fill such rows before the run" if empty else None,
    )


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
