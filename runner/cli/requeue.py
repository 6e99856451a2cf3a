# SPDX-License-Identifier: Apache-2.0
"""A job that a cluster's queue runs again, in the directory that it has begun."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from runner.errors import RecordError
from runner.records.files import lock_directory, refuse_links

if TYPE_CHECKING:
    from runner.cli.train import Prepared
    from runner.recording import Resumption
    from runner.records.record import Record

__all__ = ["find_again", "is_requeued", "reopen"]

_RESTARTS = "SLURM_RESTART_COUNT"  # SLURM's, of a job that it has put back


def is_requeued(directory: Path) -> bool:
    """Whether this job was put back into the queue after its record was begun."""
    count = os.environ.get(_RESTARTS, "")
    return count.isdecimal() and int(count) > 0 and (directory / "run.json").exists()


def reopen(directory: Path, prepared: "Prepared") -> "Record":
    """What the job has left so far; its directory is ours from here on.

    Raises:
        RecordError: another process writes it, or it is the record of another run.
    """
    from runner.parse import to_plain
    from runner.probe.probe import Probe
    from runner.records.digests import digest_config
    from runner.records.record import read_record

    refuse_links(directory)
    composed = prepared.composed
    config = composed.secrets.redact(to_plain(composed.spec))
    is_same = digest_config(config) == read_record(str(directory)).digests["config"]
    if not is_same or isinstance(prepared.program, Probe):
        what = "holds another run" if not is_same else "holds a probe already"
        fix = "Set hydra.sweep.dir to a new directory"
        raise RecordError(f"hydra.sweep.dir: {what} (got '{directory}'). {fix}.")
    if not lock_directory(directory):
        what = "another process is writing it"
        raise RecordError(f"{directory}: {what}. Wait for it, or stop it.")
    return read_record(str(directory))


def find_again(record: "Record", prepared: "Prepared") -> "Resumption | None":
    """Where the job goes on; None of one that had completed by then.

    Args:
        record: As `reopen` gives it.
        prepared: The job, composed again.

    Raises:
        RecordError: it can't go on.
    """
    from runner.program import Program
    from runner.replay.resuming import find_resumption

    if record.manifest["status"] == "completed":
        return None
    assert isinstance(prepared.program, Program)  # no probe
    return find_resumption(record, prepared.program)
