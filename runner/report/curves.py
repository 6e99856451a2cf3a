# SPDX-License-Identifier: Apache-2.0
"""What a run measured, as curves."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["Curve", "Curves", "read_curves", "thin"]

_MOST_STEPS = 2**53  # beyond, floats skip some

Curve = tuple[list[int], list[float | None]]
Curves = Mapping[tuple[str, str], Curve]  # by phase and metric


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


def thin(curve: Curve, *, most: int = 500) -> Curve:
    """Every k-th point and the last, so that at most `most` are left."""
    steps, values = curve
    if len(steps) <= most:
        return curve
    k = -(-(len(steps) - 1) // (most - 1))
    last = [] if (len(steps) - 1) % k == 0 else [len(steps) - 1]
    kept = [*range(0, len(steps), k), *last]
    return [steps[i] for i in kept], [values[i] for i in kept]
