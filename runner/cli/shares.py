# SPDX-License-Identifier: Apache-2.0
"""A sweep in shares: `hydra/launcher/over` ships groups of lanes, each as one job.

Whatever becomes of a share, each of its jobs has a record or has not begun. So what a
launcher loses is read back from there.
"""

import logging
import math
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from runner.cli.jobs import Job, compose_job
from runner.cli.running import INTERRUPTED
from runner.cli.share import Share, ShareTask
from runner.errors import RecordError, RunFailedError, in_one_line
from runner.lanes.mode import Options
from runner.records.files import refuse_writer
from runner.sweep.jobs import SHARES, Status, read_job

__all__ = ["cut_shares", "launch_shares"]

_log = logging.getLogger("runner")
_QUIET = 10.0  # seconds without a share that runs: no other one begins
_SAVING = 10.0  # seconds that shares of this machine may take, after Ctrl-C

Overrides = Mapping[int, Sequence[str]]


def launch_shares(
    context: HydraContext,
    function: TaskFunction,
    master: DictConfig,
    job_overrides: Overrides,
    *,
    over: Launcher,
    options: Options,
) -> list[JobReturn]:
    """Runs the jobs of a sweep; what Hydra's launchers return of each.

    Args:
        context: Hydra's own.
        function: What a job is, for callbacks.
        master: The sweep's config.
        job_overrides: Of each job, by its number.
        over: What ships the shares.
        options: `hydra.launcher`.

    Raises:
        RecordError: another process runs shares of it.
        SystemExit: the user stopped it.
    """
    lanes, where = len(job_overrides), str(Path.cwd())
    root = Path(str(master.hydra.sweep.dir)).absolute()
    _refuse_second(root, said=str(master.hydra.sweep.dir))
    options = _with_processes(options, lanes, master)
    cut = cut_shares(job_overrides, size=_size(lanes, options))
    shares = tuple(
        Share(context, function, master, each, lanes, options, where) for each in cut
    )
    bare = HydraContext(context.config_loader, Callbacks())  # a share is no job
    over.setup(hydra_context=bare, task_function=ShareTask(shares), config=master)
    _log.info("Launching %s jobs in %s shares", lanes, len(shares))
    returned = _launch(over, [_own(root, share) for share in shares], root)
    found: dict[int, JobReturn] = {}
    for share, each in zip(shares, returned, strict=True):
        if each.status is JobStatus.COMPLETED:
            found.update(zip(share.job_overrides, each.return_value, strict=True))
        else:
            found.update(_read_back(context, share, each._return_value))
    return [found[number] for number in job_overrides]


def cut_shares(job_overrides: Overrides, *, size: int) -> list[Overrides]:
    """Shares of a number of jobs, in the order of the sweep, with one exception.

    Jobs that differ in more than numbers rarely have a program in common, so all that
    differ in numbers alone come first, then the next kind.
    """
    kinds: dict[tuple[str, ...], list[int]] = {}
    for number, words in job_overrides.items():
        kind = tuple(word for word in words if not _is_number(word))
        kinds.setdefault(kind, []).append(number)
    ordered = [number for kind in kinds.values() for number in kind]
    cuts = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    return [{number: job_overrides[number] for number in cut} for cut in cuts]


def _is_number(word: str) -> bool:
    try:
        float(word.partition("=")[2])
    except ValueError:
        return False
    return True


def _with_processes(options: Options, lanes: int, master: DictConfig) -> Options:
    """With how many shares this machine runs at a time, where that is known."""
    at_once = OmegaConf.select(master, "hydra.launcher.over.n_jobs")  # of joblib alone
    if at_once is None:
        return options
    import joblib

    most = (
        lanes if options.lanes_per_job is None else -(-lanes // options.lanes_per_job)
    )
    return replace(options, processes=min(joblib.effective_n_jobs(int(at_once)), most))


def _size(lanes: int, options: Options) -> int:
    """Jobs of a share: as told, or so that all shares run at a time; else all."""
    return options.lanes_per_job or math.ceil(lanes / (options.processes or 1))


def _own(root: Path, share: Share) -> list[str]:
    """Overrides of the job that a share is, whose directory is no run's."""
    sweep = str(root).replace("'", "\\'")
    place = f"{SHARES}/{next(iter(share.job_overrides))}"
    return [
        f"hydra.sweep.dir='{sweep}'",
        f"hydra.sweep.subdir={place}",
        "hydra.job.chdir=false",
    ]


def _launch(
    over: Launcher, overrides: Sequence[Sequence[str]], root: Path
) -> Sequence[JobReturn]:
    """What the launcher returns; where it gives up for one share, the others end.

    It may have lost a node, or a process of its pool. A launcher says so at once,
    whatever else it has under way.
    """
    with _interruptible(root):
        try:
            return over.launch(overrides, initial_job_idx=0)
        except Exception as error:
            _log.warning("hydra.launcher: %s", in_one_line(error))
            _await_shares(root, quiet=_QUIET)
            lost = JobReturn(status=JobStatus.FAILED)
            lost.return_value = RunFailedError(in_one_line(error))
            return [lost] * len(overrides)
        except (KeyboardInterrupt, SystemExit):
            raise SystemExit(INTERRUPTED) from None


@contextmanager
def _interruptible(root: Path) -> Iterator[None]:
    """Ctrl-C leaves once the shares have saved their lanes that it told, too.

    A launcher that it reaches at once kills its processes. A second one does not wait.
    """

    def leave(*_: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _await_shares(root, quiet=1.0, seconds=_SAVING)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _await_shares(root: Path, *, quiet: float, seconds: float = math.inf) -> None:
    """Waits until no share has run for some seconds, or at most as many."""
    if not (root / SHARES).exists():
        return
    now = seen = begun = time.monotonic()
    while now - seen <= quiet and now - begun <= seconds:
        if any(_runs(share) for share in (root / SHARES).glob("*")):
            seen = time.monotonic()
        time.sleep(0.2)
        now = time.monotonic()


def _refuse_second(root: Path, *, said: str) -> None:
    """Shares that were told to stop may take a while.

    Raises:
        RecordError: another process runs some.
    """
    end = time.monotonic() + _SAVING
    while any(_runs(share) for share in (root / SHARES).glob("*")):
        if time.monotonic() > end:
            what = "another process runs this sweep"
            fix = "Wait for it, or stop it"
            raise RecordError(f"hydra.sweep.dir: {what} (got {said!r}). {fix}.")
        time.sleep(0.1)


def _runs(share: Path) -> bool:
    try:
        refuse_writer(share)
    except RecordError:
        return True
    return False


def _read_back(
    context: HydraContext, share: Share, error: Exception
) -> Iterator[tuple[int, JobReturn]]:
    """How the jobs of a share ended whose process can't say so."""
    for number, overrides in share.job_overrides.items():
        job = compose_job(context, share.master, overrides, number)
        job.directory.mkdir(parents=True, exist_ok=True)
        _settle(job, error)
        if isinstance(error, RunFailedError):
            (job.directory / "runner.log").touch()  # so that it is listed as a job
        else:  # the share was refused as a whole
            context.callbacks.on_job_end(config=job.config, job_return=job.returned)
        yield number, job.returned


def _settle(job: Job, error: Exception) -> None:
    found: Any = read_job(job.directory, label=str(job.number))
    returned = job.returned
    if found.status is Status.COMPLETED:
        returned.status = JobStatus.COMPLETED
        returned.return_value = found.objective.last
        return
    returned.status = JobStatus.FAILED
    if found.status is Status.FAILED:
        returned.return_value = RunFailedError(f"run: {found.reason}.")
        return
    returned.return_value = error
    if isinstance(error, RunFailedError):
        said = f"{found.status}, since {str(error).rstrip('.')}. See {job.directory}."
        returned.return_value = RunFailedError(f"run: {said}")
