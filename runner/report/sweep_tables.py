# SPDX-License-Identifier: Apache-2.0
"""What a report shows of a sweep, as tables. Needs neither jax nor matplotlib."""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from runner.report.table import Table, Weight, make_table, spell
from runner.sweep.fields import ABSENT
from runner.sweep.jobs import Job, Status
from runner.sweep.sweep import Group, Sweep, value_of

__all__ = [
    "groups_table",
    "jobs_table",
    "setting_of",
    "sweep_tables",
    "unfinished_table",
]

_COLUMNS = 8  # leaves that get a column


def sweep_tables(sweep: Sweep, *, most: int | None = None) -> tuple[Table, ...]:
    """What a sweep was and what came of it; a table without rows is left out.

    Args:
        sweep: The sweep.
        most: Rows of a table; the best, or the first.
    """
    tables = (groups_table(sweep, most=most), unfinished_table(sweep, most=most))
    return tuple(table for table in (*tables, _about(sweep)) if table.rows)


def groups_table(sweep: Sweep, *, most: int | None = None) -> Table:
    """A row for each setting, the best first: mean and deviation over its jobs."""
    paths, hidden = _columns(path for path in sweep.leaves if path not in sweep.seeds)
    is_repeated = sweep.repeats > 1
    of_train = [sweep.of_train] if sweep.of_train else []
    head = [*paths, "jobs", "mean", "deviation", *of_train, "best", "of job"]
    plain = [*paths, sweep.metric or "objective", *of_train, "job"]
    row_of = _group_row if is_repeated else _job_row
    rows = [row_of(group, paths, sweep) for group in sweep.groups[:most]]
    notes = [_more(len(sweep.groups) - len(rows), "settings"), _more(hidden, "leaves")]
    caption = f"{sweep.metric or 'no objective'}, the best first"
    if is_repeated and sweep.seeds:
        caption = f"{sweep.metric} over {', '.join(sweep.seeds)}, the best first"
    return make_table(_noted(caption, notes), head if is_repeated else plain, rows)


def _group_row(group: Group, paths: Sequence[str], sweep: Sweep) -> list[Any]:
    done, all_ = len(group.scores), len(group.jobs)
    best = None if group.best is None else value_of(group.best, sweep.metric)
    return [
        *(_cell(group.values, path) for path in paths),
        str(all_) if done == all_ else f"{done} of {all_}",
        _number(group.mean),
        _number(group.deviation, digits=2),
        *_of_train(group, sweep),
        _number(best),
        group.best and group.best.label,
    ]


def _job_row(group: Group, paths: Sequence[str], sweep: Sweep) -> list[Any]:
    (job,) = group.jobs
    return [
        *(_cell(group.values, path) for path in paths),
        _number(value_of(job, sweep.metric)),
        *_of_train(group, sweep),
        job.label,
    ]


def _of_train(group: Group, sweep: Sweep) -> list[str]:
    """The mean over rows to train on, in a sweep that has any."""
    if not sweep.of_train:
        return []
    found = [
        x for job in group.jobs if (x := value_of(job, sweep.of_train)) is not None
    ]
    return [_number(statistics.fmean(found) if found else None)]


def unfinished_table(sweep: Sweep, *, most: int | None = None) -> Table:
    """The jobs that did not complete, and why."""
    jobs = [job for job in sweep.jobs if job.status is not Status.COMPLETED]
    rows = [(job.label, job.status, job.reason) for job in jobs[:most]]
    caption = _noted("not completed", [_more(len(jobs) - len(rows), "jobs")])
    return make_table(caption, ("job", "status", "why"), rows)


def jobs_table(sweep: Sweep) -> Table:
    """Every job, in the order of their directories."""
    paths, hidden = _columns(sweep.leaves)
    rows = [
        (
            job.label,
            job.status,
            *(_cell(job.leaves or {}, path) for path in paths),
            _number(value_of(job, sweep.metric)),
            _number(job.objective.best if job.objective else None),
            job.objective.step if job.objective else None,
            job.record.manifest["steps"] if job.record else None,
        )
        for job in sweep.jobs
    ]
    head = ("job", "status", *paths, sweep.metric or "objective")
    caption = _noted("jobs", [_more(hidden, "leaves")])
    columns = (*head, "best", "at step", "steps")
    return make_table(caption, columns, rows, weight=Weight.FOLDED)


def _about(sweep: Sweep) -> Table:
    return make_table("sweep", ("", ""), [row for row in _facts(sweep) if row[1]])


def _facts(sweep: Sweep) -> Iterator[tuple[str, Any]]:
    yield "directory", sweep.name
    counts = ", ".join(f"{n} {status}" for status, n in sweep.counts.items())
    yield "jobs", f"{len(sweep.jobs)}: {counts}"
    if sweep.metric:
        yield (
            "objective",
            f"{sweep.metric}, {'more' if sweep.sign > 0 else 'less'} is better",
        )
    for field in sweep.fields:
        if field.others:
            yield f"with {field.path}", ", ".join(field.others)
    best = sweep.best
    if best is not None:
        value = _number(value_of(best, sweep.metric))
        yield "best job", f"{best.label}: {sweep.metric} {value}"
        yield "it has", setting_of(best, sweep)
        yield "repeat it", sweep.command


def setting_of(job: Job, sweep: Sweep) -> str:
    """What a job has that others of its sweep have not, in a few words."""
    said = [f"{path}={_cell(job.leaves or {}, path)}" for path in sweep.leaves]
    return " ".join(said[:_COLUMNS])


def _columns(paths: Iterable[str]) -> tuple[list[str], int]:
    """Those that get a column, and how many do not."""
    paths = list(paths)
    return paths[:_COLUMNS], max(0, len(paths) - _COLUMNS)


def _cell(values: Mapping[str, Any], path: str) -> str:
    value = values.get(path, ABSENT)
    return "absent" if value is ABSENT else spell(value)


def _more(count: int, what: str) -> str:
    return f"{count} more {what}" if count > 0 else ""


def _noted(caption: str, notes: Iterable[str]) -> str:
    said = ", ".join(note for note in notes if note)
    return f"{caption} ({said}: sweep.csv)" if said else caption


def _number(value: float | None, *, digits: int = 6) -> str:
    return "" if value is None else f"{value:.{digits}g}"
