# SPDX-License-Identifier: Apache-2.0
"""`sweep.json` and `sweep.csv`, in the directory of the sweep."""

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runner.errors import printable
from runner.records.files import write_atomically
from runner.sweep.fields import ABSENT
from runner.sweep.jobs import Job
from runner.sweep.sweep import Group, Sweep, value_of

__all__ = ["CSV", "JSON", "write_sweep"]

JSON, CSV = "sweep.json", "sweep.csv"
_SCHEMA = 1
_FORMULA = ("=", "+", "-", "@")


def write_sweep(sweep: Sweep) -> tuple[Path, Path]:
    """Writes both files; equal records give equal bytes.

    Raises:
        OSError: one can't be written.
    """
    paths = sweep.directory / JSON, sweep.directory / CSV
    text = json.dumps(_to_plain(sweep), indent=1, allow_nan=False) + "\n"
    write_atomically(paths[0], text)
    write_atomically(paths[1], _to_csv(sweep))
    return paths


def _to_plain(sweep: Sweep) -> dict[str, Any]:
    best = sweep.best
    return {
        "schema": _SCHEMA,
        "metric": sweep.metric,
        "direction": "max" if sweep.sign > 0 else "min",
        "counts": {str(status): n for status, n in sweep.counts.items()},
        "fields": [
            {"path": field.path, "others": list(field.others)} for field in sweep.fields
        ],
        "seeds": list(sweep.seeds),
        "best": best
        and {
            "job": best.label,
            "objective": value_of(best, sweep.metric),
            "command": sweep.command,
        },
        "groups": [_plain_group(group) for group in sweep.groups],
        "jobs": [_plain_job(job, sweep) for job in sweep.jobs],
    }


def _plain_group(group: Group) -> dict[str, Any]:
    return {
        "values": _present(group.values),
        "jobs": [job.label for job in group.jobs],
        "completed": len(group.scores),
        "mean": group.mean,
        "deviation": group.deviation,
        "best": group.best and group.best.label,
    }


def _plain_job(job: Job, sweep: Sweep) -> dict[str, Any]:
    manifest = job.record.manifest if job.record else {}
    objective = job.objective
    leaves = job.leaves or {}
    return {
        "job": job.label,
        "status": str(job.status),
        "reason": job.reason,
        "run_id": manifest.get("run_id"),
        "values": _present({path: leaves.get(path, ABSENT) for path in sweep.leaves}),
        "objective": value_of(job, sweep.metric),
        "best": objective and objective.best,
        "best_step": objective and objective.step,
        "steps": manifest.get("steps"),
        "seconds": manifest.get("seconds"),
        "metrics": manifest.get("metrics", {}),
    }


def _present(values: Mapping[str, Any]) -> dict[str, Any]:
    return {path: value for path, value in values.items() if value is not ABSENT}


def _to_csv(sweep: Sweep) -> str:
    """A row for each job; a leaf that is no number is JSON, or a word."""
    columns = ["steps", "seconds", "objective", "best", "best_step"]
    rows = [_plain_job(job, sweep) for job in sweep.jobs]
    metrics = sorted({name for row in rows for name in row["metrics"]})
    names = [*sweep.leaves, *columns, *metrics]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["job", "status", *map(_word, names), "reason"])
    for row in rows:
        cells = [
            *(_cell(row["values"].get(path)) for path in sweep.leaves),
            *(row[name] for name in columns),
            *(row["metrics"].get(name) for name in metrics),
        ]
        writer.writerow(
            [_word(row["job"]), row["status"], *cells, _word(row["reason"])]
        )
    return out.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, str):
        return _word(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if value is None or is_number else json.dumps(value)


def _word(text: str) -> str:
    """A record may be a stranger's: no word of it becomes a formula."""
    text = printable(text)
    return f"'{text}" if text.startswith(_FORMULA) else text
