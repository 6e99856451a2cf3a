# SPDX-License-Identifier: Apache-2.0
"""The jobs of a sweep as lanes: what `hydra/launcher=vectorized` does with them.

Every job is composed and checked before the first one starts. From then on each is a
run of its own, with all that Hydra promises a job: its directory, its logs, its
callbacks, its place in `HydraConfig`.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from threading import Thread
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, JobStatus, env_override, filter_overrides
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from runner.cli import print_last
from runner.cli.config import read_composed
from runner.cli.job_logs import JobLogs
from runner.cli.jobs import Job, compose_job, standing_in
from runner.cli.opening import open_job
from runner.cli.running import INTERRUPTED, refuse_processes, stop_on_signals
from runner.cli.sweep import Sweeps
from runner.cli.training import train_job
from runner.determinism import settle_backend
from runner.errors import RunFailedError, StoppedError, in_one_line
from runner.lanes.mode import Mode, Options

if TYPE_CHECKING:
    from runner.lanes.choose import Chosen
    from runner.lanes.groups import Group
    from runner.lanes.lane import Executable
    from runner.recording import Recorded

__all__ = ["launch_lanes"]

_log = logging.getLogger("runner")
Stops = Callable[[], contextlib.AbstractContextManager[Callable[[], str]]]
_Batch = list[tuple[Job, Callable[[], Any]]]
_Batches = list[_Batch]


class _Sweep:
    """The jobs of one launch, and the process that they share."""

    def __init__(
        self,
        context: HydraContext,
        function: TaskFunction,
        *,
        lanes: int,
        options: Options,
        stops: Stops,
    ) -> None:
        self.context, self.function, self.options = context, function, options
        self.lanes, self.stops = lanes, stops
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
        with self.stops() as stop:
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
        refuse_processes(config)
        job.checked = read_composed(config, choices=choices)
        settle_backend(job.spec)

    def _group(self) -> "list[Group]":
        """Traces what is to be compiled, and gives each job its program."""
        from runner.lanes.groups import group_runs
        from runner.platforms import set_compile_cache

        groups: list[Group] = []
        alike: dict[Any, list[Job]] = {}
        for job in self.jobs:
            if job.is_open:
                where = job.number if job.changes_directory else None
                alike.setdefault((job.environment, where), []).append(job)
        for jobs in alike.values():  # a model's code may look at either
            set_compile_cache(jobs[0].spec.train.compile_cache)
            with standing_in(jobs[0]):
                grouping = group_runs({job.number: job.spec for job in jobs})
            groups += grouping.groups
            for job in jobs:
                if job.number in grouping.errors:
                    with self._standing_in(job):
                        self._end(job, grouping.errors[job.number])
        self._make_programs(groups)
        return groups

    def _make_programs(self, groups: "list[Group]") -> None:
        from runner.lanes.lane import Executable, make_lane

        jobs = {job.number: job for job in self.jobs}
        executables = []
        for group in groups:
            if group.alone is not None:
                jobs[group.numbers[0]].program = group.alone
                continue
            executable = Executable(group.families[0].program)
            executables.append(executable)
            for family in group.families:
                for number in family.numbers:
                    spec = jobs[number].spec
                    lane = make_lane(family.program, spec, executable)
                    jobs[number].program = lane
        # Compiling takes longer than what is left to be looked at before the start.
        Thread(target=_compile_all, args=(executables,), daemon=True).start()

    def _open(self, job: Job) -> None:
        done = open_job(job, self.options)
        if done is not None:
            self._end(job, done)

    def _run(self, groups: "list[Group]", stop: Callable[[], str]) -> None:
        from runner.lanes.lane import Lane

        jobs = {job.number: job for job in self.jobs if job.is_open}
        beside: dict[Any, list[list[Job]]] = {}
        alone: list[Job] = []
        for group in groups:
            members = [jobs[n] for n in group.numbers if n in jobs]
            if not members:
                continue
            first = members[0]
            if first.changes_directory or not isinstance(first.program, Lane):
                alone += members
            else:
                beside.setdefault(first.environment, []).append(members)
        for environment, sharing in beside.items():
            with env_override(dict(environment)):
                self._run_lanes(sharing, stop)
        for job in alone:
            self._attempt(job, lambda job: self._end(job, self._task(job, stop)()))

    def _task(self, job: Job, stop: Callable[[], str]) -> "partial[Recorded | None]":
        return partial(train_job, job, lanes=self.lanes, logs=self.logs, stop=stop)

    def _run_lanes(self, sharing: list[list[Job]], stop: Callable[[], str]) -> None:
        """Runs jobs of one environment, each list of which shares its programs."""
        from runner.lanes.choose import choose
        from runner.lanes.pool import count_workers, run_beside

        options = self.options
        workers = count_workers(
            sum(map(len, sharing)),
            most=options.max_lanes,
            each=max(map(_bytes_of, sharing)),
            processes=options.processes or 1,
        )
        single: _Batches = []
        stacked: list[tuple[_Batches, int]] = []
        for jobs in sharing:
            lanes: list[Any] = [job.program for job in jobs]
            chosen = choose(lanes, options=options, workers=workers)
            for job in jobs:
                job.mode = str(chosen.mode) if len(jobs) > 1 else "job"
            if chosen.mode is Mode.MAP and chosen.why and options.mode is Mode.VMAP:
                what = "hydra.launcher.mode: map, not vmap, since %s"
                _log.warning(what, chosen.why)
            if chosen.mode is Mode.MAP:
                single += [[(job, self._task(job, stop))] for job in jobs]
            else:
                batches = list(self._stack(jobs, chosen, stop))
                stacked.append((batches, chosen.workers))
        for batches, threads in [(single, workers), *stacked]:
            for job, recorded in run_beside(batches, workers=threads):
                with self._standing_in(job):
                    self._end(job, recorded)

    def _stack(
        self, jobs: list[Job], chosen: "Chosen", stop: Callable[[], str]
    ) -> "Iterator[_Batch]":
        """Jobs that are computed together, as many at a time as their programs take."""
        from runner.lanes.together import Together

        assert chosen.stacked is not None
        width = chosen.stacked.width
        for i in range(0, len(jobs), width):
            some = jobs[i : i + width]
            steps = [job.spec.train.steps for job in some]
            together = Together(chosen.stacked, steps=steps, why=chosen.why)
            batch: _Batch = []
            for lane, job in enumerate(some):
                program: Any = job.program
                job.program = replace(program, place=together.place(lane))
                leave = partial(together.leave, lane)
                batch.append((job, partial(self._task(job, stop), leave=leave)))
            yield batch

    def _end(self, job: Job, result: Any) -> None:
        """Says how a job ended, to the user and to Hydra."""
        returned = job.returned
        returned.status = JobStatus.FAILED
        if isinstance(result, Exception):
            returned.return_value = result
        elif result is None or (result.status == "interrupted" and not job.is_pruned):
            self.is_interrupted = True
            returned.return_value = StoppedError(f"run: stopped. See {job.directory}.")
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
            if job.number not in Sweeps.named:
                _log.error("job %s (%s): %s", job.number, name, in_one_line(result))
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


def _compile_all(executables: "list[Executable]") -> None:
    with contextlib.suppress(Exception):  # whoever needs it is told
        for executable in executables:
            _ = executable.calls


def _bytes_of(jobs: list[Job]) -> int:
    """Of the state of one of the lanes."""
    import jax

    program: Any = jobs[0].program
    leaves = jax.tree.leaves(program.initial)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def launch_lanes(
    context: HydraContext,
    function: TaskFunction,
    master: DictConfig,
    job_overrides: Mapping[int, Sequence[str]],
    *,
    lanes: int,
    options: Options,
    stops: Stops = stop_on_signals,
) -> list[JobReturn]:
    """Runs jobs of a sweep; what Hydra's launchers return of each.

    Args:
        context: Hydra's own.
        function: What a job is, for callbacks.
        master: The sweep's config.
        job_overrides: Of each job, by its number.
        lanes: How many there are, with those that another process runs.
        options: `hydra.launcher`.
        stops: Yields what says why to stop, while they run.

    Raises:
        SystemExit: a signal stopped them.
    """
    jobs = [
        compose_job(context, master, overrides, number)
        for number, overrides in job_overrides.items()
    ]
    sweep = _Sweep(context, function, lanes=lanes, options=options, stops=stops)
    if jobs:
        sweep.launch(jobs)
    if sweep.is_interrupted:
        raise SystemExit(INTERRUPTED)
    return [job.returned for job in jobs]
