# SPDX-License-Identifier: Apache-2.0
"""The metric that counts in a recorded run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runner.errors import ConfigError, did_you_mean
from runner.spec import ClassificationSpec, ProbeSpec, RegressionSpec

__all__ = ["Objective", "direction_of", "objective_of"]

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


def direction_of(config: Mapping[str, Any]) -> str:
    """Whether a search is to `minimize` or to `maximize`, as the task's metric says.

    Args:
        config: A job's; one without a task is another application's.

    Raises:
        ConfigError: the task does not compute the metric.
    """
    metrics = _TASKS.get((config.get("task") or {}).get("name", ""), {})
    metric = (config.get("eval") or {}).get("metric") or next(iter(metrics), None)
    if metrics and metric not in metrics:
        raise ConfigError(
            "eval.metric",
            f"not computed by task {config['task']['name']}",
            got=metric,
            allowed=f"Computed: {', '.join(sorted(metrics))}",
            fix=did_you_mean(str(metric), metrics),
        )
    return "maximize" if metric and metrics.get(metric) == "max" else "minimize"
