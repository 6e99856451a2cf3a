# SPDX-License-Identifier: Apache-2.0
"""Finds the runs that a report is about, and reads them."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from runner.errors import RecordError
from runner.records.record import Record, read_record
from runner.report.curves import Curves, Objective, objective_of, read_curves
from runner.report.table import Table
from runner.report.tables import run_tables

__all__ = ["Damaged", "Run", "Runs", "collect_runs"]

_DEPTH = 3  # a sweep's directories: date, time, number
_MOST = 1000
_MISSHAPEN = (
    *(LookupError, TypeError, AttributeError, ValueError),
    *(OverflowError, RecursionError),
)


@dataclass(frozen=True)
class Run:
    """One run, ready to be shown.

    Args:
        label: Names it among the others of the report.
        record: What it left behind.
        objective: The metric that counts in it.
        curves: What it measured.
        tables: What is shown of it.
    """

    label: str
    record: Record
    objective: Objective
    curves: Curves
    tables: tuple[Table, ...]


@dataclass(frozen=True)
class Damaged:
    """One that can't be read, and why, in one line."""

    label: str
    reason: str


@dataclass(frozen=True)
class Runs:
    """All that a report is about."""

    read: tuple[Run, ...]
    damaged: tuple[Damaged, ...] = ()


def collect_runs(paths: Sequence[str]) -> Runs:
    """Reads runs, archives of runs, and the runs in directories of sweeps.

    A run that is damaged does not keep the others from being shown.

    Args:
        paths: As the user gave them.

    Raises:
        RecordError: none of them can be read.
    """
    found, damaged = _find(paths)
    read: list[Run] = []
    for path, label in zip(found, _labels(found), strict=True):
        try:
            read.append(_read(path, label))
        except RecordError as error:
            damaged.append(Damaged(label, str(error)))
    if not read:
        more = len(damaged) - 1
        others = f" {more} more can't be read." if more else ""
        raise RecordError(f"{damaged[0].reason}{others}")
    return Runs(tuple(read), tuple(damaged))


def _find(paths: Sequence[str]) -> tuple[list[str], list[Damaged]]:
    """Each run once, and the paths at which there is none."""
    found: dict[str, str] = {}
    damaged = []
    for path in paths:
        try:
            for run in _runs_at(path):
                where = os.path.realpath(os.path.expanduser(run.replace("\0", "")))
                found.setdefault(where, run)
        except RecordError as error:
            damaged.append(Damaged(path, str(error)))
    return list(found.values()), damaged


def _read(path: str, label: str) -> Run:
    record = read_record(path)
    try:
        curves = read_curves(record.metrics)
        objective = objective_of(record.config, record.manifest)
        tables = run_tables(record, curves=curves)
    except _MISSHAPEN as error:
        what = f"a field is missing or of another kind ({error!r})"
        raise RecordError(f"{path}: damaged: {what}.") from error
    return Run(label, record, objective, curves, tables)


def _runs_at(path: str) -> Iterator[str]:
    """The path itself, or the runs below it; what is neither is left to the reader."""
    where = Path(os.path.expanduser(path))
    if "\0" in path or not where.is_dir() or (where / "run.json").exists():
        yield path
        return
    below = sorted(_below(where, _DEPTH), key=_natural)
    if not below:
        raise RecordError(
            f"{path}: no run in it, down to {_DEPTH} directories below. "
            "Give a run directory, an archive of one, or a sweep's directory."
        )
    if len(below) > _MOST:
        raise RecordError(f"{path}: {len(below):,} runs in it. At most {_MOST:,}.")
    yield from map(str, below)


def _below(where: Path, depth: int) -> Iterator[Path]:
    if depth == 0:
        return
    try:
        children = [child for child in where.iterdir() if child.is_dir()]
    except OSError as error:
        raise RecordError(f"{where}: can't be read ({error.strerror}).") from error
    for child in children:
        if (child / "run.json").exists():
            yield child
        elif not child.is_symlink():
            yield from _below(child, depth - 1)


def _natural(path: Path) -> list[tuple[int, str]]:
    """Orders 9 before 10."""
    words = re.split(r"(\d+)", str(path))
    return [(int(w), "") if w.isdecimal() else (-1, w) for w in words]


def _labels(paths: Sequence[str]) -> list[str]:
    """What tells the paths apart: all but the directories that they share."""
    if len(paths) < 2:
        return list(paths)
    whole = [os.path.abspath(os.path.expanduser(p.replace("\0", ""))) for p in paths]
    shared = os.path.commonpath([os.path.dirname(path) for path in whole])
    return [os.path.relpath(path, shared) for path in whole]
