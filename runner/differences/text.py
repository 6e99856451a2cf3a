# SPDX-License-Identifier: Apache-2.0
"""Differences as lines for a terminal; what comes from a record is escaped."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from runner.differences.arrays import ArrayDifferences
from runner.differences.causes import spell, spell_side
from runner.differences.difference import Differences
from runner.differences.keys import DrawDifference, KeyDifferences
from runner.differences.leaves import Leaf, Presence
from runner.differences.metrics import MetricDifferences, StateDifferences
from runner.sinks.text import align, clean

__all__ = ["differences_lines"]

_SHOWN = 20  # rows of a table


def differences_lines(found: Differences) -> Iterator[str]:
    """What `runner diff` prints."""
    yield from _table(
        ("", "run", "id", "experiment", "status", "steps"),
        [
            (side, r.name, r.run_id, r.experiment, r.status, r.steps)
            for side, r in (("a", found.a), ("b", found.b))
        ],
        indent="",
    )
    yield from ("", clean(found.summary), "")
    yield from _leaves("config", found.config.matters)
    if found.config.idle:
        yield from _leaves("config that can't change a bit", found.config.idle)
    yield from _leaves("environment", found.environment)
    same = found.data[0] == found.data[1]
    yield "data: equal" if same else "data: other rows or values (their digests differ)"
    yield from _streams(found.keys)
    yield from _draws(found.keys)
    yield from _metrics(found.metrics)
    yield from _states(found.states)
    yield from _arrays("parameters", found.params)
    if found.outputs.equal is not None:
        yield from _arrays("outputs", found.outputs)


def _leaves(title: str, leaves: Sequence[Leaf]) -> Iterator[str]:
    yield f"{title}: {_count(len(leaves), 'leaf', 'leaves')}"
    rows = [
        (x.path, spell_side(x, Presence.A), spell_side(x, Presence.B)) for x in leaves
    ]
    yield from _table(("leaf", "a", "b"), rows)


def _streams(keys: KeyDifferences) -> Iterator[str]:
    yield f"streams: {_count(len(keys.streams), 'stream', 'streams')}"
    rows: list[tuple[Any, ...]] = []
    for stream in keys.streams:
        if stream.presence is not Presence.BOTH:
            rows.append((stream.name, f"only in {stream.presence}", "", ""))
        for leaf in stream.changed:
            sides = (spell_side(leaf, side) for side in (Presence.A, Presence.B))
            rows.append((stream.name, leaf.path, *sides))
    yield from _table(("stream", "what", "a", "b"), rows)


def _draws(keys: KeyDifferences) -> Iterator[str]:
    entries = keys.entries[0]
    if not keys.draws:
        yield f"keys: equal, {_plural(entries, 'draw', 'draws')}"
        return
    yield f"keys: {_count(len(keys.draws), 'draw', 'draws')}"
    rows = [(*_place(draw), *_what(draw)) for draw in keys.draws]
    columns = ("phase", "stream", "path", "call", "what", "step", "index", "a", "b")
    yield from _table(columns, rows)


def _place(draw: DrawDifference) -> tuple[Any, ...]:
    path = "/".join(draw.path) or "(root)"
    call = "" if draw.call is None else draw.call
    return draw.phase, draw.stream or "(none)", path, call


def _what(draw: DrawDifference) -> tuple[Any, ...]:
    if draw.presence is not Presence.BOTH:
        return f"only in {draw.presence}", "", "", *(rule or "" for rule in draw.rules)
    if not draw.other_keys:
        return "same key, other draws", "", "", *map(_uses, draw.uses)
    if draw.keys is None:
        return "other key", "", "", *draw.rules
    index = ", ".join(f"{name} {i}" for name, i in (draw.index or {}).items())
    step = "" if draw.step is None else draw.step
    return "other key", step, index, *(_hex(words) for words in draw.keys)


def _uses(uses: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{use['primitive']} {use['shape']}" for use in uses)


def _hex(words: list[int] | None) -> str:
    return "absent" if words is None else " ".join(f"{word:08x}" for word in words)


def _metrics(found: MetricDifferences) -> Iterator[str]:
    rows = _plural(found.common, "row", "rows")
    if found.metrics:
        differ = _count(len(found.metrics), "metric", "metrics")
        yield f"metrics: {differ} in the {rows} that both have"
    elif found.common:
        yield f"metrics: equal in the {rows} that both have"
    else:
        yield "metrics: no row that both have"
    for side, ranges in (("a", found.only_a), ("b", found.only_b)):
        for phase, (first, last, count) in ranges.items():
            steps = f"steps {first} to {last}" if count > 1 else f"step {first}"
            yield f"  only in {side}: {clean(phase)} {steps} ({count})"
    columns = ("phase", "metric", "first at", "a", "b", "|a - b|", "largest", "at")
    yield from _table((*columns, "steps"), [_metric(m) for m in found.metrics])


def _metric(m: Any) -> tuple[Any, ...]:
    if m.presence is not Presence.BOTH:
        return m.phase, m.metric, f"only in {m.presence}", *[""] * 6
    sizes = (_size(m.difference), _size(m.largest), m.largest_step)
    at = "" if sizes[2] is None else sizes[2]
    values = (spell(m.a), spell(m.b))
    return m.phase, m.metric, m.step, *values, sizes[0], sizes[1], at, m.steps


def _states(found: StateDifferences) -> Iterator[str]:
    steps = _plural(found.common, "step", "steps")
    if found.batches is None and found.state is None:
        yield f"states: equal at {steps}" if found.common else "states: none to compare"
        return
    if found.batches is not None:
        yield f"states: other rows were read before step {found.batches}"
    if found.state is not None:
        since = "" if found.after is None else f", equal at step {found.after}"
        yield f"states: other state at step {found.state}{since}"


def _arrays(title: str, found: ArrayDifferences) -> Iterator[str]:
    if found.equal is None:
        yield f"{title}: none recorded"
        return
    if found.equal:
        yield f"{title}: equal"
        return
    if found.presence in (Presence.A, Presence.B) and not found.leaves:
        yield f"{title}: recorded in {found.presence} alone"
        return
    if not found.leaves and not found.missing:
        yield f"{title}: differ (their digests; there is no common checkpoint)"
        return
    at = "" if found.step is None else f" at step {found.step}"
    yield f"{title}: {found.differing} of {found.leaves} common leaves differ{at}"
    rows = [
        ("first", found.first),
        ("largest |a - b| in it", found.first_largest),
        ("largest |a - b|", _size(found.largest) or None),
        ("of", found.largest_leaf),
        ("float32 values between, at most", found.ulps),
        *((f"only in {side}", name) for name, side in (found.missing or {}).items()),
        *((n, " and ".join(pair)) for n, pair in (found.shapes or {}).items()),
    ]
    yield from _table(None, [row for row in rows if row[1] is not None])


def _size(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _count(n: int, one: str, many: str) -> str:
    return f"{_plural(n, one, many)} differ{'s' * (n == 1)}" if n else "equal"


def _plural(n: int, one: str, many: str) -> str:
    return f"{n:,} {one if n == 1 else many}"


def _table(
    columns: Sequence[str] | None, rows: Iterable[Sequence[Any]], *, indent: str = "  "
) -> Iterator[str]:
    rows = list(rows)
    if not rows:
        return
    cells = [tuple(map(clean, row)) for row in rows[:_SHOWN]]
    for line in align([tuple(columns), *cells] if columns else cells):
        yield f"{indent}{line}".rstrip()
    if len(rows) > _SHOWN:
        yield f"{indent}and {len(rows) - _SHOWN} more (--json has all)"
