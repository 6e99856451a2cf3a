# SPDX-License-Identifier: Apache-2.0
"""Finds the runs that a report is about, and reads them."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from runner.errors import RecordError
from runner.records.record import Record, read_record
from runner.report.curves import Curves, read_curves
from runner.report.table import Table
from runner.report.tables import run_tables
from runner.sweep.jobs import MULTIRUN, find_below, find_jobs
from runner.sweep.objective import Objective, objective_of
from runner.sweep.sweep import Sweep, read_sweep

__all__ = ["Damaged", "Run", "Runs", "SweepRuns", "collect_runs"]

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
class SweepRuns:
    """A sweep, and what its jobs measured, by their labels in it."""

    sweep: Sweep
    curves: Mapping[str, Curves]


@dataclass(frozen=True)
class Runs:
    """All that a report is about.

    Args:
        read: The runs that could be read.
        damaged: Those that could not.
        sweeps: The sweeps that they come from, as far as these were given.
    """

    read: tuple[Run, ...]
    damaged: tuple[Damaged, ...] = ()
    sweeps: tuple[SweepRuns, ...] = ()

    @property
    def is_a_sweep(self) -> bool:
        """Whether it is one sweep, and nothing else."""
        jobs = [each.curves for each in self.sweeps]
        return len(jobs) == 1 and len(jobs[0]) == len(self.read)


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
    sweeps = [_join(sweep, read) for sweep in _sweeps(paths)]
    if not read and not sweeps:
        more = len(damaged) - 1
        others = f" {more} more can't be read." if more else ""
        raise RecordError(f"{damaged[0].reason}{others}")
    return Runs(tuple(read), tuple(damaged), tuple(sweeps))


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


def _sweeps(paths: Sequence[str]) -> Iterator[Sweep]:
    """The sweeps at the paths, or below them; each once."""
    found: dict[str, Path] = {}
    for path in paths:
        where = _place(path)
        if where is not None:
            for sweep in _sweeps_at(where):
                found.setdefault(os.path.realpath(sweep), sweep)
    for sweep in found.values():
        if find_jobs(sweep):
            yield read_sweep(str(sweep))


def _sweeps_at(where: Path) -> list[Path]:
    """The directory itself, or the sweeps below it."""
    if (where / MULTIRUN).exists():
        return [where]
    return find_below(where, (MULTIRUN,), past="run.json")


def _join(sweep: Sweep, runs: Sequence[Run]) -> SweepRuns:
    where = {os.path.realpath(run.record.name): run for run in runs}
    curves = {
        job.label: where[real].curves
        for job in sweep.jobs
        if (real := os.path.realpath(job.directory)) in where
    }
    return SweepRuns(sweep, curves)


def _place(path: str) -> Path | None:
    """The directory that a path names; None for a file, a run, or none."""
    where = Path(os.path.expanduser(path))
    is_other = "\0" in path or not where.is_dir() or (where / "run.json").exists()
    return None if is_other else where


def _runs_at(path: str) -> Iterator[str]:
    """The path itself, or the runs below it; what is neither is left to the reader."""
    where = _place(path)
    if where is None:
        yield path
        return
    below = find_below(where, ("run.json",))
    if not below and not any(map(find_jobs, _sweeps_at(where))):
        raise RecordError(
            f"{path}: no run in it, down to 3 directories below. "
            "Give a run directory, an archive of one, or a sweep's directory."
        )
    if len(below) > _MOST:
        raise RecordError(f"{path}: {len(below):,} runs in it. At most {_MOST:,}.")
    yield from map(str, below)


def _labels(paths: Sequence[str]) -> list[str]:
    """What tells the paths apart: all but the directories that they share."""
    if len(paths) < 2:
        return list(paths)
    whole = [os.path.abspath(os.path.expanduser(p.replace("\0", ""))) for p in paths]
    shared = os.path.commonpath([os.path.dirname(path) for path in whole])
    return [os.path.relpath(path, shared) for path in whole]
