# SPDX-License-Identifier: Apache-2.0
"""What is said at the end of a sweep, whatever launched its jobs.

Hydra tells no callback that a sweep ended in which a job failed, so the sweep's
directory is kept at its start, and read back when Hydra returns.
"""

import contextlib
import json
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from runner.cli import print_last
from runner.cli.secrecy import blot
from runner.errors import (
    ConfigError,
    RecordError,
    RunFailedError,
    RunnerError,
    StoppedError,
    printable,
)
from runner.records.files import write_atomically

if TYPE_CHECKING:
    from runner.sweep.jobs import Job

__all__ = ["Sweeps", "concluding_sweep"]

_SHOWN = 20  # rows of a table; sweep.csv has all
_GOOD = ("completed", "running")
_NAMED = 5  # reasons that stand in the last line


class Sweeps(Callback):
    """Keeps where a sweep is, and why a job of it failed that left no record."""

    directory: Path | None = None
    named: ClassVar[set[int]] = set()  # invalid jobs that the sweeper has named

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Called before the first job, in the process that launches them."""
        Sweeps.directory = Path(str(OmegaConf.select(config, "hydra.sweep.dir")))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Called after each job, in the process that ran it."""
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        directory = Path(str(config.hydra.runtime.output_dir))
        is_recorded = (directory / "run.json").exists()
        if job_return.status is not JobStatus.FAILED or is_recorded:
            return
        from runner.sweep.jobs import FAILURE, Status

        error = job_return._return_value
        said = {"reason": blot(" ".join(str(error).split()) or type(error).__name__)}
        if isinstance(error, StoppedError):
            said = {"reason": "before it began", "status": Status.INTERRUPTED}
        with contextlib.suppress(OSError):  # the sweep goes on
            write_atomically(directory / FAILURE, json.dumps(said) + "\n")


@contextlib.contextmanager
def concluding_sweep() -> Iterator[None]:
    """Says what came of a sweep when it ends, however it ends.

    Raises:
        RunFailedError: a job of it failed; it names all that did.
    """
    Sweeps.directory = None
    Sweeps.named.clear()
    try:
        yield
    except Exception as error:
        failed = [job for job in _conclude() if job.status not in _GOOD]
        if isinstance(error, HydraException):
            raise
        if not failed and isinstance(error, RunnerError):
            raise RunFailedError(str(error)) from error  # in another run's directory
        if not failed:
            raise
        if not isinstance(error, RunnerError):  # of a model's code, or a launcher's
            for line in blot("".join(traceback.format_exception(error))).splitlines():
                print(printable(line), file=sys.stderr)
        raise _failure(failed, error) from error
    except BaseException as stop:  # by its user, or by the sweeper
        if not isinstance(getattr(stop, "error", None), ConfigError):
            _conclude()
        raise
    _conclude()


def _conclude() -> "tuple[Job, ...]":
    """Writes `sweep.json` and `sweep.csv`, prints the tables, and the directory last.

    Returns:
        The jobs; none where there was no sweep.
    """
    directory, Sweeps.directory = Sweeps.directory, None
    if directory is None or not directory.is_dir():
        return ()
    from runner.cli.report import show
    from runner.report.sweep_tables import sweep_tables
    from runner.sweep.files import write_sweep
    from runner.sweep.jobs import find_jobs
    from runner.sweep.sweep import read_sweep

    try:
        if not find_jobs(directory):
            return ()
        sweep = read_sweep(str(directory))
        write_sweep(sweep)
    except (RecordError, OSError) as error:
        print(f"warning: {printable(str(error))}", file=sys.stderr)
        return ()
    with contextlib.suppress(OSError):
        for table in sweep_tables(sweep, most=_SHOWN):
            show(table)
    print_last(printable(str(directory)))
    return sweep.jobs


def _failure(failed: "Sequence[Job]", error: Exception) -> RunFailedError:
    """The line that names all jobs that failed, not the first alone.

    Args:
        failed: The jobs.
        error: Of the first of them; said where no record does.
    """
    alike: dict[str, list[str]] = {}
    for job in failed:
        alike.setdefault(_why(job), []).append(job.label)
    names = [", ".join(labels) for labels in alike.values()]
    said = [f"{n} ({why})" for n, why in zip(names, alike, strict=True)]
    said = [*said[:_NAMED], *names[_NAMED:]]
    count = f"{len(failed)} jobs" if len(failed) > 1 else "a job"
    verb = "failed" if all(job.status == "failed" for job in failed) else "did not end"
    known = any(job.reason.rstrip(".") in str(error) for job in failed if job.reason)
    more = "" if known or not isinstance(error, RunnerError) else f" {error}"
    return RunFailedError(f"sweep: {count} {verb}: {', '.join(said)}.{more}")


def _why(job: "Job") -> str:
    reason = job.reason.rstrip(".")
    if job.status == "failed":
        return reason
    between = " " if job.status == "killed" else ": "
    return f"{job.status}{between}{reason}".rstrip(": ")
