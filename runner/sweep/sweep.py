# SPDX-License-Identifier: Apache-2.0
"""A sweep: its jobs in groups, a group for each setting of the fields swept over.

    mean = sum(x) / n        deviation = sqrt(sum((x - mean)^2) / (n - 1))

over the completed jobs of a group, which differ in seeds alone. `x` is the last value
of the objective: what a job returns to Hydra, not the best that it ever had, which a
longer run would better by chance.
"""

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.errors import RecordError
from runner.sweep.fields import ABSENT, Field, differing_leaves, fields_of, is_seed
from runner.sweep.jobs import Job, Status, command_of, find_jobs, read_job

__all__ = ["Group", "Sweep", "read_sweep", "value_of"]

_MOST = 1000


@dataclass(frozen=True)
class Group:
    """Jobs that differ in seeds alone.

    Args:
        values: What was set, by path; `ABSENT` where a config has no such leaf.
        jobs: The jobs, in the order of their directories.
        scores: Values of the objective of those that completed with one.
        mean: Of the scores; None without one.
        deviation: Of the sample; None for fewer than two.
        best: The job with the best score.
    """

    values: Mapping[str, Any]
    jobs: tuple[Job, ...]
    scores: tuple[float, ...]
    mean: float | None
    deviation: float | None
    best: Job | None


@dataclass(frozen=True)
class Sweep:
    """What a sweep left behind.

    Args:
        name: What the user called it.
        directory: Where it is.
        metric: The objective.
        sign: 1 where more of it is better, -1 where less is.
        leaves: Paths in which the configs differ, seeds too.
        fields: The axes that these leaves make.
        seeds: Those of the leaves that are seeds.
        jobs: All jobs, in the order of their directories.
        groups: The best first; those without a score last.
        best: The best job; None where none completed.
        command: Repeats that job; empty where there is none.
    """

    name: str
    directory: Path
    metric: str
    sign: int
    leaves: tuple[str, ...]
    fields: tuple[Field, ...]
    seeds: tuple[str, ...]
    jobs: tuple[Job, ...]
    groups: tuple[Group, ...]
    best: Job | None
    command: str

    @property
    def counts(self) -> dict[Status, int]:
        """How many jobs ended in each way."""
        counts = Counter(job.status for job in self.jobs)
        return {status: counts[status] for status in Status if counts[status]}

    @property
    def of_train(self) -> str:
        """The objective over rows to train on; empty where no job evaluated them."""
        name = f"train_{self.metric}"
        return name if any(value_of(j, name) is not None for j in self.jobs) else ""

    @property
    def repeats(self) -> int:
        """Jobs of the largest group."""
        return max((len(group.jobs) for group in self.groups), default=0)


def read_sweep(path: str) -> Sweep:
    """Reads the directory of a sweep.

    Raises:
        RecordError: there is no job in it, or too many.
    """
    directory = Path(path).expanduser()
    found = find_jobs(directory)
    if not found:
        raise RecordError(f"{path}: no job of a sweep in it.")
    if len(found) > _MOST:
        raise RecordError(f"{path}: {len(found):,} jobs in it. At most {_MOST:,}.")
    jobs = [read_job(job, label=job.relative_to(directory).as_posix()) for job in found]
    return _make_sweep(path, directory, jobs)


def value_of(job: Job, metric: str) -> float | None:
    """A completed job's last value of a metric, if it is a number."""
    if job.status is not Status.COMPLETED or job.record is None:
        return None
    value = job.record.manifest["metrics"].get(f"eval/{metric}")
    return None if value is None or not math.isfinite(value) else float(value)


def _make_sweep(name: str, directory: Path, jobs: Sequence[Job]) -> Sweep:
    known = [job for job in jobs if job.leaves is not None]
    leaves = differing_leaves([job.leaves for job in known if job.leaves is not None])
    metric, sign = _objective(known)
    paths = [path for path in leaves if not is_seed(path)]
    groups = _groups(known, paths, metric=metric, sign=sign)
    best = _best(known, metric=metric, sign=sign)
    return Sweep(
        name=name,
        directory=directory,
        metric=metric,
        sign=sign,
        leaves=tuple(leaves),
        fields=fields_of(leaves),
        seeds=tuple(path for path in leaves if is_seed(path)),
        jobs=tuple(jobs),
        groups=groups,
        best=best,
        command="" if best is None else command_of(best, sweep=directory),
    )


def _objective(jobs: Iterable[Job]) -> tuple[str, int]:
    """The objective of most jobs, and its sign."""
    found = Counter((o.metric, o.sign) for o in (job.objective for job in jobs) if o)
    return found.most_common(1)[0][0] if found else ("", -1)


def _groups(
    jobs: Sequence[Job], paths: Sequence[str], *, metric: str, sign: int
) -> tuple[Group, ...]:
    gathered: dict[str, list[Job]] = {}
    for job in jobs:
        assert job.leaves is not None
        values = [job.leaves.get(path, repr(ABSENT)) for path in paths]
        gathered.setdefault(json.dumps(values, default=repr), []).append(job)
    groups = [
        _group(each, paths, metric=metric, sign=sign) for each in gathered.values()
    ]
    return tuple(
        sorted(groups, key=lambda g: (g.mean is None, -sign * (g.mean or 0.0)))
    )


def _group(
    jobs: Sequence[Job], paths: Sequence[str], *, metric: str, sign: int
) -> Group:
    leaves = jobs[0].leaves or {}
    scores = [x for job in jobs if (x := value_of(job, metric)) is not None]
    return Group(
        values={path: leaves.get(path, ABSENT) for path in paths},
        jobs=tuple(jobs),
        scores=tuple(scores),
        mean=statistics.fmean(scores) if scores else None,
        deviation=statistics.stdev(scores) if len(scores) > 1 else None,
        best=_best(jobs, metric=metric, sign=sign),
    )


def _best(jobs: Iterable[Job], *, metric: str, sign: int) -> Job | None:
    """The completed job with the best score; of equal ones the first."""
    scored = [(x, job) for job in jobs if (x := value_of(job, metric)) is not None]
    return max(scored, key=lambda pair: sign * pair[0], default=(0.0, None))[1]
