# SPDX-License-Identifier: Apache-2.0
"""A job of a sweep from its first step to its last, in any thread."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.cli.hydra_files import write_hydra_files
from runner.cli.job_logs import JobLogs
from runner.cli.jobs import Job
from runner.cli.pruning import prune_by
from runner.spec import SinksSpec, TerminalSpec

if TYPE_CHECKING:
    from runner.recording import Recorded

__all__ = ["train_job"]


def train_job(
    job: Job,
    *,
    lanes: int,
    logs: JobLogs,
    stop: Callable[[], str],
    leave: Callable[[], None] = lambda: None,
) -> "Recorded | None":
    """Runs a job, and records it; None where the sweep was stopped before.

    Args:
        job: The job.
        lanes: How many jobs the sweep has.
        logs: Where what it logs goes.
        stop: Says why to stop.
        leave: Called at its end, for lanes that wait for each other.
    """
    from runner.recording import record_run
    from runner.sinks.base import make_sinks

    try:
        if stop():
            return None
        own: Any = job.returned.hydra_cfg
        pruning = prune_by(own.hydra, metric=job.spec.objective)
        with logs.of(job.logging):
            write_hydra_files(job.directory, job.composed, job=own.hydra)
            recorded = record_run(
                job.made,
                directory=job.directory,
                secrets=job.composed.secrets,
                hazards=job.hazards,
                sweep=_place(job, lanes),
                resumption=job.resumption,
                stop=lambda: stop() or pruning.reason,
                sinks=make_sinks(_sinks(job)),
                listen=pruning.listen,
            )
        job.is_pruned = pruning.stopped(recorded.reason)
        return recorded
    finally:
        leave()


def _place(job: Job, lanes: int) -> dict[str, Any]:
    sweep = str(job.config.hydra.sweep.dir)
    return {"id": sweep, "lane": job.number, "lanes": lanes, "mode": job.mode}


def _sinks(job: Job) -> SinksSpec:
    """Those of the run, without a display: there are other lanes beside it."""
    sinks, sweep = job.spec.sinks, Path(str(job.config.hydra.sweep.dir))
    group = sinks.wandb.group or "-".join(sweep.parts[-3:])
    return replace(
        sinks,
        terminal=TerminalSpec("disabled"),
        wandb=replace(sinks.wandb, group=group),
    )
