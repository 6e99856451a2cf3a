# SPDX-License-Identifier: Apache-2.0
"""What came of a sweep, as what there is to draw: nothing is drawn here."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runner.report.charts import Chart, Line, is_wide
from runner.report.curves import Curve, Curves
from runner.report.drawing import STYLES
from runner.report.table import spell
from runner.sinks.text import clean
from runner.sweep.fields import ABSENT, Field
from runner.sweep.jobs import Job
from runner.sweep.sweep import Sweep, value_of

__all__ = [
    "HeatMap",
    "Parallel",
    "Points",
    "Series",
    "curves_by_value",
    "heat_map",
    "parallel",
    "points",
]

_VALUES = len({color for color, _ in STYLES})  # of a field, that get a curve each
_FIELDS = 4  # that get curves
_AXES = 10
_LINES = 300
_TICKS = 8
_WORD = 14  # letters of a tick


@dataclass(frozen=True)
class Series:
    """A metric against a number.

    Args:
        metric: Its name.
        jobs: Number and value of each completed job.
        means: Number, mean and deviation for each that several jobs have.
    """

    metric: str
    jobs: tuple[tuple[float, float], ...]
    means: tuple[tuple[float, float, float], ...]


@dataclass(frozen=True)
class Points:
    """The objective against a number that was swept.

    Args:
        field: Path of the number.
        series: The objective; then, where it was evaluated, that of rows to train on.
    """

    field: str
    series: tuple[Series, ...]


@dataclass(frozen=True)
class HeatMap:
    """The mean of the objective for each pair of values of two fields.

    Args:
        rows, columns: Paths of the two.
        row_values, column_values: Their values, in order.
        cells: Mean by row and column; None where no job completed.
        heat: From 0, the worst cell, to 1, the best; None where there is no mean.
    """

    rows: str
    columns: str
    row_values: tuple[str, ...]
    column_values: tuple[str, ...]
    cells: tuple[tuple[float | None, ...], ...]
    heat: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class Parallel:
    """A line for each setting, through its value of each field to its mean.

    Args:
        names: What stands above each axis; the objective's last.
        ticks: For each axis, height from 0 to 1 and word.
        lines: For each setting, the worst first, its heights.
        heat: For each setting, from 0, the worst, to 1, the best.
    """

    names: tuple[str, ...]
    ticks: tuple[tuple[tuple[float, str], ...], ...]
    lines: tuple[tuple[float, ...], ...]
    heat: tuple[float, ...]


def points(sweep: Sweep) -> Iterator[Points]:
    """For each field of numbers, the objective against it."""
    for field in sweep.fields[:_FIELDS]:
        by_value = _by_value(sweep, field)
        numbers = [v for v in by_value if _is_number(v)]
        if len(numbers) < 3 or len(numbers) != len(by_value):
            continue
        metrics = filter(None, (sweep.metric, sweep.of_train))
        series = [_series(by_value, metric) for metric in metrics]
        if series and series[0].jobs:
            yield Points(field.path, tuple(series))


def _series(by_value: Mapping[Any, Sequence[Job]], metric: str) -> Series:
    scores = {
        float(v): [x for job in jobs if (x := value_of(job, metric)) is not None]
        for v, jobs in by_value.items()
    }
    jobs = tuple((v, x) for v, xs in scores.items() for x in xs)
    means = tuple(
        (v, statistics.fmean(xs), statistics.stdev(xs) if len(xs) > 1 else 0.0)
        for v, xs in scores.items()
        if xs
    )
    is_search = len(means) == len(jobs) and len(jobs) > _VALUES
    return Series(metric, jobs, () if is_search else means)


def curves_by_value(sweep: Sweep, curves: Mapping[str, Curves]) -> Iterator[Chart]:
    """For each field, a curve for each of its values: the mean over completed jobs.

    Args:
        sweep: The sweep.
        curves: What each job measured, by its label.
    """
    for field in sweep.fields[:_FIELDS]:
        by_value = _by_value(sweep, field)
        if not 1 < len(by_value) <= _VALUES:
            continue
        for metric in dict.fromkeys((sweep.metric, "loss")):
            lines = []
            for (value, jobs), style in zip(by_value.items(), STYLES, strict=False):
                found = [
                    curves.get(job.label, {}).get(("eval", metric)) for job in jobs
                ]
                scored = [value_of(job, sweep.metric) is not None for job in jobs]
                kept = [c for c, ok in zip(found, scored, strict=True) if c and ok]
                if kept:
                    curve, band = _mean_curve(kept)
                    lines.append(Line(_spelled(value), curve, *style, band))
            if lines and len(lines[0].curve[0]) > 1:
                title = f"eval {metric} by {field.path}, mean and deviation"
                yield Chart(title, tuple(lines))


def _mean_curve(curves: Sequence[Curve]) -> tuple[Curve, tuple[float, ...]]:
    """Mean and deviation at the steps that all of them have a value for."""
    known = [
        {s: v for s, v in zip(*curve, strict=True) if v is not None} for curve in curves
    ]
    steps = [s for s in known[0] if all(s in other for other in known)]
    columns = [[each[s] for each in known] for s in steps]
    means: list[float | None] = [statistics.fmean(column) for column in columns]
    if len(curves) < 2:
        return (steps, means), ()
    return (steps, means), tuple(map(statistics.stdev, columns))


def heat_map(sweep: Sweep) -> HeatMap | None:
    """The map of two fields; None of more or fewer, and where most of it is empty."""
    if len(sweep.fields) != 2:
        return None
    first, second = sweep.fields
    rows, columns = _by_value(sweep, first), _by_value(sweep, second)
    if len(rows) < len(columns):  # the longer one goes down
        first, second, rows, columns = second, first, columns, rows
    means = {
        (_spelled(g.values[first.path]), _spelled(g.values[second.path])): g.mean
        for g in sweep.groups
    }
    if 2 * len(means) < len(rows) * len(columns):
        return None
    down, across = list(map(_spelled, rows)), list(map(_spelled, columns))
    cells = [[means.get((r, c)) for c in across] for r in down]
    heat = _heat([mean for row in cells for mean in row], sign=sweep.sign)
    warm = [heat[i : i + len(across)] for i in range(0, len(heat), len(across))]
    return HeatMap(
        rows=first.path,
        columns=second.path,
        row_values=tuple(down),
        column_values=tuple(across),
        cells=tuple(map(tuple, cells)),
        heat=tuple(map(tuple, warm)),
    )


def parallel(sweep: Sweep) -> Parallel | None:
    """The settings side by side; None of fewer than two fields, or of a map."""
    groups = [group for group in sweep.groups if group.mean is not None][:_LINES]
    if len(sweep.fields) < 2 or heat_map(sweep) is not None or len(groups) < 2:
        return None
    fields = sweep.fields[:_AXES]
    columns = [[group.values[field.path] for group in groups] for field in fields]
    columns.append([group.mean for group in groups])
    placed = [_place(column) for column in columns]
    heat = _heat([group.mean for group in groups], sign=sweep.sign)
    rows = list(zip(*(heights for heights, _ in placed), strict=True))
    return Parallel(
        names=(*_short([field.path for field in fields]), sweep.metric),
        ticks=tuple(ticks for _, ticks in placed),
        lines=tuple(reversed(rows)),
        heat=tuple(x or 0.0 for x in reversed(heat)),
    )


def _place(values: Sequence[Any]) -> tuple[list[float], tuple[tuple[float, str], ...]]:
    """Heights of values on one axis, and the words that stand beside it."""
    if all(map(_is_number, values)):
        few = sorted(set(values))
        heights = _heights(few)
        if len(few) > _TICKS:
            few = [few[0], few[len(few) // 2], few[-1]]
        return [heights[v] for v in values], tuple(
            (heights[v], f"{v:.4g}") for v in few
        )
    numbers = {_spelled(v): v for v in values if _is_number(v)}
    others = sorted({_spelled(v) for v in values} - set(numbers))
    words = [*sorted(numbers, key=lambda word: numbers[word]), *others]
    heights = {word: i / max(1, len(words) - 1) for i, word in enumerate(words)}
    ticks = tuple((heights[word], _cut(word)) for word in words[: 3 * _TICKS])
    return [heights[_spelled(v)] for v in values], ticks


def _heights(numbers: Sequence[float]) -> dict[Any, float]:
    """Each number's height, from 0 to 1; equal factors apart where they are wide."""
    at = (
        [math.log(v) for v in numbers]
        if is_wide(numbers)
        else list(map(float, numbers))
    )
    spread = at[-1] - at[0]
    return {
        v: (x - at[0]) / spread if spread else 0.5
        for v, x in zip(numbers, at, strict=True)
    }


def _heat(means: Sequence[float | None], *, sign: int) -> list[float | None]:
    known = [sign * mean for mean in means if mean is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    spread = (high - low) or 1.0
    return [None if m is None else (sign * m - low) / spread for m in means]


def _by_value(sweep: Sweep, field: Field) -> dict[Any, list[Job]]:
    """Jobs by their value of a field, numbers in order; a list or mapping as JSON."""
    found: dict[Any, list[Job]] = {}
    for group in sweep.groups:
        value = group.values[field.path]
        key = value if _is_number(value) else _spelled(value)
        found.setdefault(key, []).extend(group.jobs)
    numbers = sorted(v for v in found if _is_number(v))
    return {
        v: found[v] for v in (*numbers, *sorted(v for v in found if isinstance(v, str)))
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _spelled(value: Any) -> str:
    return "absent" if value is ABSENT else spell(value)


def _short(paths: Sequence[str]) -> list[str]:
    """The last word of each path, or all of it where two end alike."""
    last = [path.removesuffix("._target_").rsplit(".", 1)[-1] for path in paths]
    return [
        short if last.count(short) == 1 else path
        for short, path in zip(last, paths, strict=True)
    ]


def _cut(word: str) -> str:
    word = clean(word)
    return word if len(word) <= _WORD else f"{word[: _WORD - 1]}…"
