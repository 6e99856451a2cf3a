# SPDX-License-Identifier: Apache-2.0
"""The jobs of a sweep, read back, and how each of them ended."""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from runner import CONF_DIR
from runner.differences.leaves import list_leaves
from runner.errors import RecordError
from runner.records.files import refuse_writer
from runner.records.plain import read_plain_json, read_plain_yaml
from runner.records.record import Record, read_record
from runner.sweep.objective import Objective, objective_of

__all__ = [
    "FAILURE",
    "MULTIRUN",
    "SHARES",
    "Job",
    "Status",
    "command_of",
    "find_below",
    "find_jobs",
    "natural_order",
    "read_job",
]

FAILURE = "failure.json"  # in the directory of a job that failed before its record
MULTIRUN = "multirun.yaml"  # Hydra's, in the directory of a sweep
SHARES = ".shares"  # there, too: what other processes than the sweep's own leave
_OVERRIDES = Path(".hydra", "overrides.yaml")
_LOG = "runner.log"  # Hydra opens it before the job begins
_DEPTH = 3  # of a sweep's jobs: date, time, number
_MOST = 2**22  # bytes of a file that is none of a record
_OURS = ("hydra", "main", "schema")  # where a config comes from without `-cd`
_OWN = re.compile(r"[+~]*hydra[./@=]")


class Status(StrEnum):
    """How a job ended, or that it did not."""

    COMPLETED = "completed"
    FAILED = "failed"
    INTERRUPTED = "interrupted"
    RUNNING = "running"
    KILLED = "killed"
    DAMAGED = "damaged"


@dataclass(frozen=True)
class Job:
    """One job of a sweep.

    Args:
        label: Its directory, below that of the sweep.
        directory: Where it is.
        status: How it ended.
        reason: Why, in one line; empty where there is nothing to say.
        record: What it left; None where that can't be read, or was never begun.
        leaves: Its config, leaf by leaf.
        objective: The metric that counts in it.
    """

    label: str
    directory: Path
    status: Status
    reason: str = ""
    record: Record | None = None
    leaves: Mapping[str, Any] | None = None
    objective: Objective | None = None


def find_jobs(sweep: Path) -> list[Path]:
    """Directories of the jobs below a sweep's, also of those that left no record."""
    return find_below(sweep, ("run.json", FAILURE, _LOG), past=MULTIRUN)


def find_below(where: Path, names: Sequence[str], *, past: str = "") -> list[Path]:
    """Directories that hold one of some files, down to three below; 9 before 10.

    What lies below one of them is not looked at, nor below a link.

    Args:
        where: The directory to look into.
        names: Of the files.
        past: A directory that holds this file is not looked into.

    Raises:
        RecordError: a directory can't be read.
    """
    return sorted(_walk(where, names, past, _DEPTH), key=natural_order)


def _walk(where: Path, names: Sequence[str], past: str, depth: int) -> Iterator[Path]:
    if depth == 0:
        return
    try:
        found = [child for child in where.iterdir() if child.name != SHARES]
        children = [child for child in found if child.is_dir()]
    except OSError as error:
        raise RecordError(f"{where}: can't be read ({error.strerror}).") from error
    for child in children:
        if any((child / name).exists() for name in names):
            yield child
        elif not child.is_symlink() and not (past and (child / past).exists()):
            yield from _walk(child, names, past, depth - 1)


def natural_order(path: Path) -> list[tuple[int, str]]:
    """Orders 9 before 10."""
    words = re.split(r"(\d+)", str(path))
    return [(int(w), "") if w.isdecimal() else (-1, w) for w in words]


def read_job(directory: Path, *, label: str) -> Job:
    """Reads one job; what is wrong with it is its status, not an error."""
    if not (directory / "run.json").exists():
        return _unrecorded(directory, label)
    try:
        record = read_record(str(directory))
        objective = objective_of(record.config, record.manifest)
        leaves = list_leaves(record.config)
    except RecordError as error:
        return Job(label, directory, Status.DAMAGED, str(error))
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError) as e:
        what = f"a field is missing or of another kind ({e!r})"
        return Job(label, directory, Status.DAMAGED, what)
    status, reason = Status(record.manifest["status"]), record.manifest["reason"]
    if status is Status.RUNNING:
        status, reason = _unfinished(directory, "before it ended")
    return Job(label, directory, status, reason, record, leaves, objective)


def _unrecorded(directory: Path, label: str) -> Job:
    """A job that ended before its record began, or is about to begin it."""
    if not (directory / FAILURE).exists():
        return Job(label, directory, *_unfinished(directory, "before its record began"))
    try:
        failure = read_plain_json(_read_small(directory / FAILURE), name=FAILURE)
        reason = str(failure["reason"])
        status = Status(failure.get("status", Status.FAILED))
    except (RecordError, OSError, LookupError, TypeError, ValueError) as error:
        status, reason = Status.FAILED, f"{FAILURE} can't be read ({error!r})"
    return Job(label, directory, status, reason)


def _unfinished(directory: Path, when: str) -> tuple[Status, str]:
    """Whoever runs has its directory locked; a kill takes the lock away."""
    try:
        refuse_writer(directory)
    except RecordError:
        return Status.RUNNING, ""
    except OSError as error:
        return Status.KILLED, f"no telling whether it runs ({error.strerror})"
    return Status.KILLED, when


def command_of(job: Job, *, sweep: Path) -> str:
    """The command that repeats a job, for a shell.

    It is the job's own, as a run alone. A config that came from elsewhere than the
    runner's own files, or a setting of Hydra's, stands in no override that is safe to
    repeat: then it is the one that repeats the record.
    """
    overrides = _overrides(job)
    if overrides is not None and _is_composed_of_ours(sweep):
        return shlex.join(["python", "-m", "runner", *overrides])
    return shlex.join(["python", "-m", "runner", "reproduce", str(job.directory)])


def _overrides(job: Job) -> list[str] | None:
    """What the job was told on the command line; None where that is not all."""
    words = _read_yaml(job.directory / _OVERRIDES)
    if not isinstance(words, list) or not all(isinstance(w, str) for w in words):
        return None
    odd = [w for w in words if _OWN.match(w) or "<secret>" in w or "=" not in w]
    return None if odd or not all(w.isprintable() for w in words) else words


def _is_composed_of_ours(sweep: Path) -> bool:
    config = _read_yaml(sweep / MULTIRUN)
    try:
        sources = config["hydra"]["runtime"]["config_sources"]
        name = config["hydra"]["job"]["config_name"]
        main = [s["path"] for s in sources if s["provider"] == "main"]
        known = all(source["provider"] in _OURS for source in sources)
    except (LookupError, TypeError):
        return False
    return known and name == "config" and main == [str(CONF_DIR)]


def _read_yaml(path: Path) -> Any:
    try:
        return read_plain_yaml(_read_small(path), name=path.name)
    except (OSError, RecordError):
        return None


def _read_small(path: Path) -> bytes:
    """A file that may be a stranger's: a pipe or a device might never end."""
    if not path.is_file() or path.stat().st_size > _MOST:
        raise RecordError(f"{path}: not a file of a sweep.")
    return path.read_bytes()
