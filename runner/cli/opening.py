# SPDX-License-Identifier: Apache-2.0
"""What stands between a traced job of a sweep and its first step.

A job may have been launched before, by a sweep that was stopped: then its directory
holds its record, and it is complete, has failed, or is to be gone on with.
"""

from typing import TYPE_CHECKING

from runner.cli.jobs import Job
from runner.errors import ConfigError, RecordError, RunFailedError
from runner.lanes.mode import Mode, Options
from runner.parse import to_plain
from runner.records.digests import digest_config
from runner.records.files import claim_directory, lock_directory, refuse_links
from runner.spec import Determinism, Impl, RunSpec

if TYPE_CHECKING:
    from runner.hazards.hazard import Hazard
    from runner.recording import Recorded
    from runner.records.record import Record

__all__ = ["open_job"]


def open_job(job: Job, options: Options) -> "Recorded | None":
    """Looks for hazards, and takes the directory; the run can begin.

    Returns:
        What came of it where it was launched before and is complete, else None.

    Raises:
        RunnerError: the job is refused, its directory holds another run, or it failed
            when it was launched before.
    """
    from runner.guarantee import refuse_below_strict
    from runner.hazards.find import find_hazards, refuse_hazards

    job.hazards = find_hazards(job.made)
    together = _find_together(job) if options.mode is Mode.VMAP else ()
    refuse_hazards((*job.hazards, *together), allow=job.spec.rng.allow)
    refuse_below_strict(job.made)
    if options.mode is Mode.VMAP:
        _refuse_strict(job.spec)
    if (job.directory / "run.json").is_file():
        return _take_up(job)
    claim_directory(job.directory, exact=True, field="hydra.sweep.dir")
    return None


def _find_together(job: Job) -> "tuple[Hazard, ...]":
    """R011 of a lane that is to be computed by vmap; where it is allowed, it is mapped.

    All lanes would draw from the key of one of them, whatever their ledgers say.
    """
    from runner.hazards.hazard import error
    from runner.lanes.lane import Lane

    impl = job.spec.rng.impl
    if impl is Impl.THREEFRY2X32 or not isinstance(job.program, Lane):
        return ()
    what = f"{impl} draws other bits for lanes under vmap"
    return (error("R011", "rng.impl", what, "Set hydra.launcher.mode=map"),)


def _take_up(job: Job) -> "Recorded | None":
    """A job that was launched before: done, or to be gone on with."""
    from runner.program import Program
    from runner.recording import Recorded
    from runner.replay.resuming import find_resumption

    record = _read_earlier(job)
    status = record.manifest["status"]
    if status == "failed":
        reason, where = record.manifest["reason"], job.directory
        raise RunFailedError(f"run: {reason}. It failed before, see {where}.")
    if status == "completed":
        name = f"eval/{job.spec.objective}"
        objective = record.manifest["metrics"].get(name)
        return Recorded(status, "launched before", objective)
    if not isinstance(job.program, Program):
        what = "was stopped, and a probe has nothing to go on from"
        raise RecordError(f"{job.directory}: {what}. Delete it to run it again.")
    job.resumption = find_resumption(record, job.program)
    return None


def _read_earlier(job: Job) -> "Record":
    """The record of the same job, launched before; nobody else writes it now.

    Raises:
        RecordError: it was altered, is another's, or is being written.
    """
    from runner.records.record import read_record

    if not lock_directory(job.directory):
        what = "another process is writing it"
        raise RecordError(f"{job.directory}: {what}. Wait for it, or stop it.")
    refuse_links(job.directory)
    record = read_record(str(job.directory))
    config = job.composed.secrets.redact(to_plain(job.spec))
    if digest_config(config) != record.digests["config"]:
        raise RecordError(
            f"hydra.sweep.dir: holds another run already (got {str(job.directory)!r}). "
            "Set hydra.sweep.dir to a new directory, or sweep as before to go on."
        )
    return record


def _refuse_strict(spec: RunSpec) -> None:
    if spec.determinism is Determinism.STRICT:
        raise ConfigError(
            "determinism",
            "a bit-exact run is asked for, and lanes under vmap round otherwise",
            got=str(spec.determinism),
            fix="Set hydra.launcher.mode=map",
        )
