# SPDX-License-Identifier: Apache-2.0
"""What a run measured, as curves; and the metric that counts in it."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from runner.spec import ClassificationSpec, ProbeSpec, RegressionSpec

__all__ = ["Curves", "Objective", "objective_of", "read_curves", "thin"]

_MOST_STEPS = 2**53  # beyond, floats skip some

Curve = tuple[list[int], list[float | None]]
Curves = Mapping[tuple[str, str], Curve]  # by phase and metric

_TASKS = {t.name: t.metrics for t in (ClassificationSpec, RegressionSpec, ProbeSpec)}


@dataclass(frozen=True)
class Objective:
    """The metric that counts.

    Args:
        metric: Its name; empty where the record does not say.
        sign: 1 where more is better, -1 where less is.
        last: Its last value, over the test rows; None before the first.
        best: Its best value, None before the first.
        step: The step of `best`.
    """

    metric: str
    sign: int
    last: float | None
    best: float | None
    step: int | None


def read_curves(rows: Iterable[Mapping[str, Any]]) -> Curves:
    """Steps and values of each metric; None where a value is not finite."""
    curves: dict[tuple[str, str], Curve] = {}
    for row in rows:
        for metric, value in row.items():
            if metric in ("phase", "step"):
                continue
            steps, values = curves.setdefault((row["phase"], metric), ([], []))
            steps.append(row["step"])
            values.append(_finite(value))
        if abs(row["step"]) >= _MOST_STEPS:
            raise ValueError(f"step {row['step']}")
    return curves


def _finite(value: Any) -> float | None:
    number = math.nan if value is None else float(value)
    return number if math.isfinite(number) else None


def objective_of(config: Mapping[str, Any], manifest: Mapping[str, Any]) -> Objective:
    """The objective of a recorded run."""
    metrics = _TASKS.get(config.get("task", {}).get("name", ""), {})
    metric = config.get("eval", {}).get("metric") or next(iter(metrics), "")
    best = manifest.get("best") or {}
    return Objective(
        metric=str(metric),
        sign=1 if metrics.get(metric) == "max" else -1,
        last=manifest["metrics"].get(f"eval/{metric}"),
        best=best.get("value"),
        step=best.get("step"),
    )


def thin(curve: Curve, *, most: int = 500) -> Curve:
    """Every k-th point and the last, so that at most `most` are left."""
    steps, values = curve
    if len(steps) <= most:
        return curve
    k = -(-(len(steps) - 1) // (most - 1))
    last = [] if (len(steps) - 1) % k == 0 else [len(steps) - 1]
    kept = [*range(0, len(steps), k), *last]
    return [steps[i] for i in kept], [values[i] for i in kept]
