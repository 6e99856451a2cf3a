# SPDX-License-Identifier: Apache-2.0
"""The jobs of a sweep as lanes: what `hydra/launcher=vectorized` does with them.

Every job is composed and checked before the first one starts. From then on each is a
run of its own, with all that Hydra promises a job: its directory, its logs, its
callbacks, its place in `HydraConfig`.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, JobStatus, env_override, filter_overrides
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from runner.cli import print_last
from runner.cli.config import read_composed
from runner.cli.hydra_files import write_hydra_files
from runner.cli.job_logs import JobLogs
from runner.cli.jobs import Job, compose_job, read_earlier, standing_in
from runner.cli.running import INTERRUPTED, stop_on_signals
from runner.determinism import settle_backend
from runner.errors import ConfigError, RecordError, RunFailedError, did_you_mean
from runner.records.files import claim_directory
from runner.spec import TerminalSpec

if TYPE_CHECKING:
    from runner.lanes.groups import Group
    from runner.recording import Recorded

__all__ = ["Mode", "Options", "launch_lanes"]

_log = logging.getLogger("runner")
_DONE_BEFORE = "launched before"


class Mode(StrEnum):
    """How the lanes of a group are computed."""

    AUTO = "auto"
    MAP = "map"


@dataclass(frozen=True)
class Options:
    """`hydra.launcher` of a sweep.

    Args:
        mode: How lanes are computed.
        max_lanes: How many are in memory at a time; None finds out.
    """

    mode: str = "auto"
    max_lanes: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in set(Mode):
            raise ConfigError(
                "hydra.launcher.mode",
                "not a choice",
                got=self.mode,
                allowed=f"Choices: {', '.join(Mode)}",
                fix=did_you_mean(self.mode, list(Mode)),
            )
        if self.max_lanes is not None and self.max_lanes < 1:
            raise ConfigError(
                "hydra.launcher.max_lanes", "must be at least 1", got=self.max_lanes
            )


class _Sweep:
    """The jobs of one launch, and the process that they share."""

    def __init__(
        self, context: HydraContext, function: TaskFunction, options: Options
    ) -> None:
        self.context, self.function, self.options = context, function, options
        self.logs = JobLogs()
        self.is_interrupted = False

    def launch(self, jobs: list[Job]) -> None:
        self.jobs = jobs
        self.logs.install(jobs[0].config)
        for job in jobs:
            self._attempt(job, self._check)
        groups = self._group()
        for job in jobs:
            self._attempt(job, self._open)
        with stop_on_signals() as stop:
            self._run(groups, stop)

    def _attempt(self, job: Job, step: Callable[[Job], None]) -> None:
        """A step towards a run; a mistake ends this job, and no other one."""
        if not job.is_open:
            return
        with self._standing_in(job):
            try:
                step(job)
            except Exception as error:  # of a model's code, too
                self._end(job, error)

    def _check(self, job: Job) -> None:
        """Parses the config; nothing is built yet."""
        job.directory.mkdir(parents=True, exist_ok=True)
        job.logging = OmegaConf.to_container(  # type: ignore[assignment]
            job.config.hydra.job_logging, resolve=True
        )
        self.context.callbacks.on_job_start(
            config=job.config, task_function=self.function
        )
        choices = job.config.hydra.runtime.choices
        config: Any = job.returned.cfg
        job.checked = read_composed(config, choices=choices)
        settle_backend(job.spec)

    def _group(self) -> "tuple[Group, ...]":
        """Traces what is to be compiled, and gives each job its program."""
        from runner.lanes.groups import group_runs
        from runner.lanes.lane import Executable, make_lane
        from runner.platforms import set_compile_cache

        jobs = {job.number: job for job in self.jobs if job.is_open}
        for job in jobs.values():
            set_compile_cache(job.spec.train.compile_cache)
        grouping = group_runs({n: job.spec for n, job in jobs.items()})
        for number, error in grouping.errors.items():
            with self._standing_in(jobs[number]):
                self._end(jobs[number], error)
        for group in grouping.groups:
            if group.alone is not None:
                jobs[group.numbers[0]].program = group.alone
                continue
            executable = Executable(group.families[0].program)
            for family in group.families:
                for number in family.numbers:
                    spec = jobs[number].spec
                    lane = make_lane(family.program, spec, executable)
                    jobs[number].program = lane
        return grouping.groups

    def _open(self, job: Job) -> None:
        """Looks for hazards, and takes the directory; the run can begin."""
        from runner.guarantee import refuse_below_strict
        from runner.hazards.find import find_hazards, refuse_hazards

        job.hazards = find_hazards(job.made)
        refuse_hazards(job.hazards, allow=job.spec.rng.allow)
        refuse_below_strict(job.made)
        if (job.directory / "run.json").is_file():
            self._take_up(job)
        else:
            claim_directory(job.directory, exact=True, field="hydra.sweep.dir")
        if job.is_open:
            write_hydra_files(job.directory, job.composed)

    def _take_up(self, job: Job) -> None:
        """A job of a sweep that was launched before: done, or to be gone on with.

        Raises:
            RunnerError: its directory holds another run, or it failed then.
        """
        from runner.program import Program
        from runner.recording import Recorded
        from runner.replay.resuming import find_resumption

        record = read_earlier(job)
        status = record.manifest["status"]
        if status == "failed":
            reason, where = record.manifest["reason"], job.directory
            raise RunFailedError(f"run: {reason}. It failed before, see {where}.")
        if status == "completed":
            name = f"eval/{job.spec.objective}"
            objective = record.manifest["metrics"].get(name)
            self._end(job, Recorded(status, _DONE_BEFORE, objective))
            return
        if not isinstance(job.program, Program):
            what = "was stopped, and a probe has nothing to go on from"
            raise RecordError(f"{job.directory}: {what}. Delete it to run it again.")
        job.resumption = find_resumption(record, job.program)

    def _run(self, groups: "tuple[Group, ...]", stop: Callable[[], str]) -> None:
        from runner.lanes.pool import count_workers, run_beside

        jobs = {job.number: job for job in self.jobs if job.is_open}
        modes = {
            n: "map" if len(g.numbers) > 1 else "job" for g in groups for n in g.numbers
        }
        beside: dict[Any, list[Job]] = {}
        alone: list[Job] = []
        for number in (n for group in groups for n in group.numbers if n in jobs):
            job = jobs[number]
            is_lane = not job.changes_directory and not self._takes_all(job)
            (beside.setdefault(job.environment, []) if is_lane else alone).append(job)
        for environment, lanes in beside.items():
            workers = count_workers(len(lanes), most=self.options.max_lanes)
            tasks = [
                (job, partial(self._train, job, modes[job.number], stop))
                for job in lanes
            ]
            with env_override(dict(environment)):
                for job, recorded in run_beside(tasks, workers=workers):
                    with self._standing_in(job):
                        self._end(job, recorded)
        for job in alone:
            self._attempt(
                job, lambda job: self._end(job, self._train(job, "job", stop))
            )

    @staticmethod
    def _takes_all(job: Job) -> bool:
        from runner.lanes.lane import Lane

        return not isinstance(job.program, Lane)

    def _train(self, job: Job, mode: str, stop: Callable[[], str]) -> "Recorded | None":
        """Runs a job, in any thread; None where the sweep was stopped before."""
        from runner.recording import record_run
        from runner.sinks.base import make_sinks

        if stop():
            return None
        with self.logs.of(job.logging):
            return record_run(
                job.made,
                directory=job.directory,
                secrets=job.composed.secrets,
                hazards=job.hazards,
                sweep=self._place(job, mode),
                resumption=job.resumption,
                stop=stop,
                sinks=make_sinks(self._sinks(job)),
            )

    def _place(self, job: Job, mode: str) -> dict[str, Any]:
        sweep = str(job.config.hydra.sweep.dir)
        return {"id": sweep, "lane": job.number, "lanes": len(self.jobs), "mode": mode}

    def _sinks(self, job: Job) -> Any:
        """Those of the run, without a display: there are other lanes beside it."""
        sinks, sweep = job.spec.sinks, Path(str(job.config.hydra.sweep.dir))
        group = sinks.wandb.group or "-".join(sweep.parts[-3:])
        return replace(
            sinks,
            terminal=TerminalSpec("disabled"),
            wandb=replace(sinks.wandb, group=group),
        )

    def _end(self, job: Job, result: Any) -> None:
        """Says how a job ended, to the user and to Hydra."""
        returned = job.returned
        returned.status = JobStatus.FAILED
        if isinstance(result, Exception):
            returned.return_value = result
        elif result is None or result.status == "interrupted":
            self.is_interrupted = True
            returned.return_value = RunFailedError(
                f"run: stopped. See {job.directory}."
            )
        elif result.status == "failed":
            text = f"run: {result.reason}. See {job.directory}."
            returned.return_value = RunFailedError(text)
        else:
            returned.status = JobStatus.COMPLETED
            returned.return_value = result.objective
        self._tell(job, result)
        self.context.callbacks.on_job_end(config=job.config, job_return=returned)

    def _tell(self, job: Job, result: Any) -> None:
        from runner.sinks.text import clean

        name = clean(" ".join(filter_overrides(job.returned.overrides or [])))
        if isinstance(result, Exception):
            _log.error("job %s (%s): %s", job.number, name, result)
            return
        said = "not begun" if result is None else result.status
        if result is not None and result.objective is not None:
            said += f", {job.spec.objective} {result.objective:.4g}"
        if result is not None and result.reason:
            said += f" ({clean(result.reason)})"
        if job.spec.sinks.terminal.mode != "disabled":
            print_last(f"job {job.number} ({name}): {said}")
        print_last(str(job.directory))

    @contextlib.contextmanager
    def _standing_in(self, job: Job) -> Iterator[None]:
        with standing_in(job), self.logs.of(job.logging):
            yield


def launch_lanes(
    context: HydraContext,
    function: TaskFunction,
    master: DictConfig,
    job_overrides: Sequence[Sequence[str]],
    *,
    first: int,
    options: Options,
) -> list[JobReturn]:
    """Runs the jobs of a sweep; what Hydra's launchers return of each.

    Args:
        context: Hydra's own.
        function: What a job is, for callbacks.
        master: The sweep's config.
        job_overrides: Of each job.
        first: Number of the first one.
        options: `hydra.launcher`.
    """
    jobs = [
        compose_job(context, master, overrides, number)
        for number, overrides in enumerate(job_overrides, start=first)
    ]
    sweep = _Sweep(context, function, options)
    sweep.launch(jobs)
    if sweep.is_interrupted:
        raise SystemExit(INTERRUPTED)
    return [job.returned for job in jobs]
