# SPDX-License-Identifier: Apache-2.0
"""Files that a kill at any moment leaves whole; and a directory for each run."""

import contextlib
import fcntl
import itertools
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from runner.errors import RecordError

__all__ = [
    "canonical_json",
    "claim_directory",
    "clear_unfinished",
    "lock_directory",
    "refuse_links",
    "refuse_writer",
    "sync",
    "write_atomically",
]

_OURS = ("config.yaml", "metrics.jsonl", "states.jsonl", "outputs.npz", "checkpoints")
_MIRRORS = ("wandb", "tensorboard")  # directories of what others write


def claim_directory(path: Path, *, exact: bool, field: str = "hydra.run.dir") -> Path:
    """Makes a directory that no other run has, by an exclusive `mkdir`.

    It is locked until this process ends.

    Args:
        path: The wanted name.
        exact: Refuse when it holds a run already, instead of trying `path-1`,
            `path-2`, ... An existing directory without a run is then taken.
        field: Config path that named it, for messages.

    Raises:
        RecordError: it can't be made, can't be written or holds a run.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if exact:
            return _claim_exactly(path, field)
        for n in itertools.count():
            wanted = path if n == 0 else path.with_name(f"{path.name}-{n}")
            with contextlib.suppress(FileExistsError):
                wanted.mkdir()
                lock_directory(wanted)
                return wanted
    except OSError as error:
        raise RecordError(
            f"{field}: can't be written (got {str(path)!r}: {error.strerror}). "
            f"Set {field} to a directory of yours."
        ) from error
    raise AssertionError("unreachable")


def _claim_exactly(path: Path, field: str) -> Path:
    path.mkdir(exist_ok=True)
    if (path / "run.json").exists():
        raise RecordError(
            f"{field}: holds a run already (got {str(path)!r}). "
            f"Set {field} to a new directory."
        )
    for name in _OURS:  # a launch that was killed before its run.json left none
        if (path / name).exists():
            raise RecordError(
                f"{field}: holds a {name} already, which a run would write to "
                f"(got {str(path)!r}). Set {field} to a new directory."
            )
    if not lock_directory(path):
        raise RecordError(
            f"{field}: holds a run already, just begun (got {str(path)!r}). "
            f"Set {field} to a new directory."
        )
    with tempfile.TemporaryFile(dir=path):  # can it be written?
        return path


def lock_directory(path: Path) -> bool:
    """Locks a directory until this process ends; false where another one has.

    Raises:
        OSError: it can't be opened, or its file system knows no locks.
    """
    lock = os.open(path, os.O_RDONLY)  # open, so locked, for as long as we live
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return False
    return True


def refuse_writer(path: Path) -> None:
    """Refuses a run directory that another process is writing just now.

    Raises:
        RecordError: one is.
    """
    opened = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        what = "another process is writing it"
        raise RecordError(f"{path}: {what}. Wait for it, or stop it.") from None
    finally:
        os.close(opened)


def refuse_links(directory: Path) -> None:
    """Refuses a run directory in which a name leads elsewhere, before it is written.

    What comes from elsewhere may hold a link in place of a file that is appended to,
    or of a directory that is cleared. W&B's and TensorBoard's own are let be.

    Raises:
        RecordError: it has a link, or what is neither a file nor a directory.
    """
    pending = [directory]
    while pending:
        with os.scandir(pending.pop()) as found:
            entries = list(found)
        for entry in entries:
            name = os.path.relpath(entry.path, directory)
            if entry.is_dir(follow_symlinks=False):
                pending += [] if name in _MIRRORS else [Path(entry.path)]
            elif not entry.is_file(follow_symlinks=False):
                kind = "a link" if entry.is_symlink() else "no file"
                fix = "Put a file or directory of its own there"
                raise RecordError(f"{directory}: {name} is {kind}. {fix}.")


def write_atomically(
    path: Path, content: str | bytes, *, room: Path | None = None
) -> None:
    """Replaces a file as a whole: readers see the old content or the new one.

    Args:
        path: The file.
        content: Of it.
        room: A file that is given up, and whose place on the disk is written to: on a
            full one, what is freed may be another thread's before it is ours.
    """
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    if room is not None and room.exists():
        room.replace(new)
    try:
        with open(os.open(new, os.O_WRONLY | os.O_CREAT, 0o666), "wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.truncate()
            stream.flush()
            os.fsync(stream.fileno())
    except OSError:
        new.unlink(missing_ok=True)
        raise
    new.replace(path)
    sync(path.parent)


def clear_unfinished(directory: Path) -> None:
    """Deletes what a kill has left of `write_atomically`; the directory is ours."""
    for path in directory.glob(".*.new"):
        path.unlink()


def sync(path: Path) -> None:
    """Waits until the disk has a file, or the names in a directory."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def canonical_json(value: Any) -> str:
    """One spelling for equal values: sorted keys, no spaces, strict JSON."""
    value = json.loads(json.dumps(value, allow_nan=False))  # numbers as keys: strings
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
