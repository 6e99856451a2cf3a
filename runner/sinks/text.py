# SPDX-License-Identifier: Apache-2.0
"""What the terminal says, as plain words; shared by its live and its plain form.

Whatever comes from a config passes through `clean`, so that an experiment's name
can't move the cursor, retitle the window or turn text around.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from runner.errors import printable
from runner.records.events import Outputs, RunEnd, RunStart

__all__ = [
    "KEY_COLUMNS",
    "OUTPUT_COLUMNS",
    "STREAM_COLUMNS",
    "align",
    "clean",
    "format_duration",
    "format_metrics",
    "format_rate",
    "key_rows",
    "output_rows",
    "result_rows",
    "stream_rows",
    "summary_rows",
]

STREAM_COLUMNS = ("stream", "kind", "derivation", "key", "phases", "per", "draws")
KEY_COLUMNS = ("phase", "step", "stream", "path", "call", "index", "key", "draws")
OUTPUT_COLUMNS = ("output", "dtype", "shape", "values")
_DRAWS_SHOWN = 3
_VALUES_SHOWN = 24
_EDGE = 3  # values shown at each end of an array that is longer

Row = tuple[str, str]


def clean(value: object) -> str:
    """Text in which whatever does not print is an escape: ESC becomes `\\x1b`."""
    return printable(str(value))


def align(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Rows as lines whose columns stand below each other."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)) for row in rows]
    return [line.rstrip() for line in lines]


def format_duration(seconds: float) -> str:
    """`4.2 s`, `3:07`, `1:02:09`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_rate(steps: int, seconds: float) -> str:
    """`523 steps/s`; empty where nothing was measured."""
    if steps <= 0 or seconds <= 0:
        return ""
    rate = steps / seconds
    return f"{rate:,.0f} steps/s" if rate >= 10 else f"{rate:.2g} steps/s"


def format_metrics(metrics: Mapping[str, Any]) -> str:
    """`loss 0.1234  accuracy 0.975`."""
    return "  ".join(f"{clean(k)} {float(v):.4g}" for k, v in metrics.items())


def summary_rows(run: RunStart) -> list[Row]:
    """What the run is, a name and a value a row."""
    config = run.config
    steps = f"{run.steps:,}" if run.steps else ""
    optimizer = _target(config.get("optimizer"), "learning_rate")
    rows = [
        ("experiment", run.experiment),
        ("run", run.run_id),
        ("model", _target(config.get("model"))),
        ("data", _data(config.get("data"))),
        ("task", _named(config.get("task"))),
        ("optimizer", optimizer if run.steps else ""),
        ("seed", config.get("seed")),
        ("steps", f"{run.first_step:,} to {steps}" if run.first_step else steps),
        ("parameters", f"{run.parameters:,}"),
        *run.notes.items(),
    ]
    return [(clean(k), clean(v)) for k, v in rows if v not in (None, "")]


def stream_rows(run: RunStart, *, between: str = ", ") -> list[tuple[str, ...]]:
    """A row for each stream, under `STREAM_COLUMNS`; `between` parts its draws."""
    rows = []
    for s in run.streams:
        cells = (s.name, s.kind, s.derivation, s.key, s.phases, s.per)
        draws = between.join(_first_few(s.draws)) or "none"
        rows.append((*map(clean, cells), draws))
    return rows


def key_rows(run: RunStart) -> list[tuple[str, ...]]:
    """A row for each key of a probe, under `KEY_COLUMNS`."""
    return [
        tuple(clean(getattr(row, name)) for name in KEY_COLUMNS) for row in run.keys
    ]


def output_rows(outputs: Outputs) -> list[tuple[str, ...]]:
    """A row for each array, under `OUTPUT_COLUMNS`; of a long one, its ends."""
    return [
        (clean(name), str(array.dtype), str(list(array.shape)), _shown(array))
        for name, array in outputs.arrays.items()
    ]


def _shown(array: np.ndarray) -> str:
    """`[[1 2] [3 4]]` on one line; of many values the ends, without their rows."""
    if array.size > _VALUES_SHOWN:
        array = array.reshape(-1)
    with np.printoptions(threshold=_VALUES_SHOWN, edgeitems=_EDGE, linewidth=10**6):
        line = " ".join(str(array).split())
    return line.replace("[ ", "[").replace(" ]", "]")


def result_rows(run: RunStart, end: RunEnd) -> list[Row]:
    """How the run ended, a name and a value a row."""
    taken = end.steps - run.first_step
    status = f"{end.status}: {end.reason}" if end.reason else end.status
    rows = [
        ("status", status),
        ("steps", f"{end.steps:,} of {run.steps:,}" if run.steps else ""),
        ("time", format_duration(end.seconds)),
        ("speed", format_rate(taken, end.seconds)),
        ("observed", end.observed),
        *((name, f"{value:.6g}") for name, value in end.metrics.items()),
    ]
    if end.best is not None:
        value, step = end.best
        rows.append((f"best {run.objective}", f"{value:.6g} at step {step:,}"))
    return [(clean(k), clean(v)) for k, v in rows if v]


def _named(node: Any, *fields: str) -> str:
    return _described(node, "name", fields)


def _data(node: Any) -> str:
    shown = _named(node, "batch_size")
    return "" if shown == "none" else shown


def _target(node: Any, *fields: str) -> str:
    if isinstance(node, Mapping) and "_target_" not in node:  # under names for it
        inner = node.get("module", node.get("transform"))
        node = {**node, **inner} if isinstance(inner, Mapping) else node
    key = "lift" if isinstance(node, Mapping) and "lift" in node else "_target_"
    return _described(node, key, fields)


def _described(node: Any, key: str, fields: Iterable[str]) -> str:
    if not isinstance(node, Mapping):
        return "" if node is None else str(node)
    rest = [f"{name} {node[name]}" for name in fields if name in node]
    return ", ".join([str(node.get(key, "")), *rest])


def _first_few(draws: tuple[str, ...]) -> list[str]:
    more = len(draws) - _DRAWS_SHOWN
    shown = [clean(draw) for draw in draws[:_DRAWS_SHOWN]]
    return [*shown, f"{more} more"] if more > 0 else shown
