# SPDX-License-Identifier: Apache-2.0
"""Several runs in one table: what was set otherwise, and what came of it."""

from collections.abc import Mapping, Sequence
from typing import Any

from runner.differences.leaves import list_leaves
from runner.report.collect import Run, Runs
from runner.report.table import Table, make_table, spell
from runner.sweep.fields import differing_leaves

__all__ = ["damaged_table", "runs_table"]

_COLUMNS = 8  # leaves that get a column


def runs_table(runs: Sequence[Run]) -> Table:
    """A row for each run, the best first; a column for each leaf that differs."""
    configs = [list_leaves(run.record.config) for run in runs]
    differing = list(differing_leaves(configs))
    shown = differing[:_COLUMNS]
    more = len(differing) - len(shown)
    caption = f"runs (they differ in {more} more leaves)" if more else "runs"
    by_run = {id(run): config for run, config in zip(runs, configs, strict=True)}
    rows = [
        (
            run.label,
            run.record.manifest["status"],
            run.record.manifest["steps"],
            *(_cell(by_run[id(run)], path) for path in shown),
            run.objective.metric,
            _number(run.objective.last),
            _number(run.objective.best),
            run.objective.step,
        )
        for run in sorted(runs, key=_rank)
    ]
    head, tail = ("run", "status", "steps"), ("objective", "last", "best", "at step")
    return make_table(caption, (*head, *shown, *tail), rows)


def damaged_table(runs: Runs) -> Table:
    """The runs that can't be read."""
    rows = [(each.label, each.reason) for each in runs.damaged]
    return make_table("can't be read", ("run", "why"), rows)


def _cell(config: Mapping[str, Any], path: str) -> str:
    return spell(config[path]) if path in config else "absent"


def _rank(run: Run) -> tuple[str, bool, float]:
    """The best of each objective first; what has none comes last."""
    o = run.objective
    return o.metric, o.best is None, -o.sign * (o.best or 0.0)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
