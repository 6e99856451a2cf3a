# SPDX-License-Identifier: Apache-2.0
"""Where the recorded numbers of two runs part, bit by bit."""

import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from runner.differences.leaves import Presence

__all__ = [
    "MetricDifference",
    "MetricDifferences",
    "StateDifferences",
    "compare_metrics",
    "compare_states",
]

Rows = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class MetricDifference:
    """One metric of one phase whose bits differ at a common step, or that one lacks.

    Args:
        phase: `train` or `eval`.
        metric: Its name.
        presence: Which run has it.
        steps: Common steps at which it differs.
        step: The first of them; None where one run lacks the metric.
        a, b: Its values there; None for one that is not finite.
        difference: |a - b| there; None where one is not finite.
        largest: Largest |a - b| over the common steps.
        largest_step: The step of `largest`.
    """

    phase: str
    metric: str
    presence: Presence
    steps: int = 0
    step: int | None = None
    a: Any = None
    b: Any = None
    difference: float | None = None
    largest: float | None = None
    largest_step: int | None = None


@dataclass(frozen=True)
class MetricDifferences:
    """How the metrics of two runs differ.

    Args:
        common: Rows that both have: steps of a phase.
        only_a, only_b: Rows of one run alone, as [first, last, count] by phase.
        metrics: A row for each metric that differs; the first to part comes first.
    """

    common: int
    only_a: Mapping[str, tuple[int, int, int]]
    only_b: Mapping[str, tuple[int, int, int]]
    metrics: tuple[MetricDifference, ...]

    @property
    def first(self) -> MetricDifference | None:
        """The first in time whose bits differ."""
        found = (m for m in self.metrics if m.step is not None)
        return next(found, None)


@dataclass(frozen=True)
class StateDifferences:
    """How the fingerprints of two runs differ.

    Args:
        common: Steps at which both have one.
        batches: The first step before which other rows were read; or None.
        state: The first step that starts from another state; or None.
        after: The last step before `state` with equal states; None: not even the
            first were equal.
    """

    common: int
    batches: int | None = None
    state: int | None = None
    after: int | None = None


def compare_metrics(a: Rows, b: Rows) -> MetricDifferences:
    """Compares rows of `metrics.jsonl` that belong to one phase and step."""
    ours, theirs = _by_time(a), _by_time(b)
    common = sorted(ours.keys() & theirs.keys(), key=_time)
    names: dict[tuple[str, str], None] = {}
    for place in common:
        for metric in sorted({*ours[place], *theirs[place]} - {"phase", "step"}):
            names.setdefault((place[0], metric))
    pairs = {
        name: [(at[1], ours[at], theirs[at]) for at in common if at[0] == name[0]]
        for name in names
    }
    found = [d for name, rows in pairs.items() for d in _compare(*name, rows)]
    found.sort(key=_rank)
    return MetricDifferences(
        common=len(common),
        only_a=_ranges(ours.keys() - theirs.keys()),
        only_b=_ranges(theirs.keys() - ours.keys()),
        metrics=tuple(found),
    )


def compare_states(a: Rows, b: Rows) -> StateDifferences:
    """Compares rows of `states.jsonl`.

    `batches` chains over the rows before, so it counts as far as both have the same.
    """
    ours, theirs = ({row["step"]: row for row in rows} for rows in (a, b))
    common = sorted(ours.keys() & theirs.keys())
    chained = []
    for left, right in zip(sorted(ours), sorted(theirs), strict=False):
        if left != right:
            break
        chained.append(left)
    batches = (s for s in chained if ours[s]["batches"] != theirs[s]["batches"])
    state = next((s for s in common if ours[s]["state"] != theirs[s]["state"]), None)
    before = [s for s in common if state is not None and s < state]
    return StateDifferences(
        len(common), next(batches, None), state, max(before, default=None)
    )


def _by_time(rows: Rows) -> dict[tuple[str, int], Mapping[str, Any]]:
    return {(row["phase"], row["step"]): row for row in rows}


def _time(place: tuple[str, int]) -> tuple[int, bool, str]:
    """An evaluation at a step comes before the step itself."""
    phase, step = place
    return step, phase != "eval", phase


def _rank(found: MetricDifference) -> tuple[Any, ...]:
    """In time, and the loss first: it is a mean, others of a step may be counts."""
    step = -1 if found.step is None else found.step
    return (*_time((found.phase, step)), found.metric != "loss", found.metric)


def _compare(phase: str, metric: str, rows: list[Any]) -> Iterator[MetricDifference]:
    has_a = any(metric in a for _, a, _ in rows)
    has_b = any(metric in b for _, _, b in rows)
    if not (has_a and has_b):
        presence = Presence.A if has_a else Presence.B
        yield MetricDifference(phase, metric, presence)
        return
    values = [(step, a.get(metric), b.get(metric)) for step, a, b in rows]
    other = [row for row in values if _bits(row[1]) != _bits(row[2])]
    if not other:
        return
    step, a, b = other[0]
    sizes = [(_size(x, y), at) for at, x, y in other]
    known = [(size, at) for size, at in sizes if size is not None]
    largest, at = max(known, key=lambda pair: (pair[0], -pair[1]), default=(None, None))
    yield MetricDifference(
        phase,
        metric,
        Presence.BOTH,
        steps=len(other),
        step=step,
        a=a,
        b=b,
        difference=_size(a, b),
        largest=largest,
        largest_step=at,
    )


def _bits(value: Any) -> Any:
    """-0.0 is not 0.0; 1 is 1.0, as JSON may spell it; null is a value, too."""
    number = _number(value)
    return json.dumps(value) if number is None else struct.pack("<d", number)


def _size(a: Any, b: Any) -> float | None:
    x, y = _number(a), _number(b)
    size = math.inf if x is None or y is None else abs(x - y)
    return size if math.isfinite(size) else None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def _ranges(places: Iterable[tuple[str, int]]) -> dict[str, tuple[int, int, int]]:
    steps: dict[str, list[int]] = {}
    for phase, step in places:
        steps.setdefault(phase, []).append(step)
    return {p: (min(s), max(s), len(s)) for p, s in sorted(steps.items())}
