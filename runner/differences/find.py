# SPDX-License-Identifier: Apache-2.0
"""Compares two records in every part."""

from dataclasses import replace

from runner.differences.arrays import compare_outputs, compare_params
from runner.differences.causes import summarize
from runner.differences.config import compare_configs, compare_environments
from runner.differences.difference import Differences, RunName
from runner.differences.keys import compare_keys
from runner.differences.leaves import compare_leaves
from runner.differences.metrics import compare_metrics, compare_states
from runner.records.record import Record

__all__ = ["find_differences"]

_OUTCOME = ("status", "steps")


def find_differences(a: Record, b: Record) -> Differences:
    """In what two runs differ, and what it most likely comes from.

    Raises:
        RecordError: a file of either record is missing, altered or damaged.
    """
    outcomes = ({name: r.manifest[name] for name in _OUTCOME} for r in (a, b))
    found = Differences(
        a=_name(a),
        b=_name(b),
        outcome=compare_leaves(*outcomes),
        config=compare_configs(a, b),
        environment=compare_environments(a, b),
        data=(a.digests.get("data"), b.digests.get("data")),
        keys=compare_keys(a, b),
        metrics=compare_metrics(a.metrics, b.metrics),
        states=compare_states(a.states, b.states),
        params=compare_params(a, b),
        outputs=compare_outputs(a, b),
    )
    return replace(found, summary=summarize(found))


def _name(record: Record) -> RunName:
    told = ("run_id", "experiment", "status", "reason", "steps")
    return RunName(record.name, **{name: record.manifest[name] for name in told})
