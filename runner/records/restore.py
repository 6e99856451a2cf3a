# SPDX-License-Identifier: Apache-2.0
"""Reads checkpoints back; no byte of one is used before its digest was checked."""

import hashlib
import math
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from runner.errors import AlteredRecordError, RecordError
from runner.records.checkpoint import FOLDER, ITEM, Saved
from runner.records.digests import digest_plain, digest_stream
from runner.records.metrics import Written
from runner.records.reading import RunFiles
from runner.records.shapes import CHECKPOINT, check_shape

__all__ = [
    "check_written",
    "list_saved",
    "named_leaves",
    "read_saved",
    "restore_leaves",
]

_BLOCK = 2**20  # bytes
_MOST = 16 * 2**30  # bytes of all arrays together
_SAVED = re.compile(FOLDER + r"/(0|[1-9][0-9]{0,9})\.json")


def list_saved(files: RunFiles) -> tuple[int, ...]:
    """Steps that have a checkpoint, the newest first; none of them is checked yet."""
    found = map(_SAVED.fullmatch, files.names)
    return tuple(sorted((int(name[1]) for name in found if name), reverse=True))


def read_saved(files: RunFiles, step: int, *, run_id: str) -> Saved:
    """What is known of a checkpoint; its files are checked, every byte.

    Raises:
        RecordError: a file of it is missing, was added, altered or damaged.
    """
    name = f"{FOLDER}/{step}.json"
    saved = _parse_saved(files, name)
    if saved.step != step or saved.run_id != run_id:
        raise AlteredRecordError(f"{files.name}: {name} is of another run or step.")
    listed = {f"{FOLDER}/{step}/{file}": d for file, d in saved.files.items()}
    there = {n for n in files.names if n.startswith(f"{FOLDER}/{step}/")}
    for odd in sorted(there.symmetric_difference(listed)):
        what = "is missing" if odd in listed else "was added"
        raise AlteredRecordError(f"{files.name}: {odd} {what}. It was altered.")
    for file, digest in listed.items():
        with files.open(file) as stream:
            if digest_stream(stream) != digest:
                raise _damaged(files, file)
    return saved


def _parse_saved(files: RunFiles, name: str) -> Saved:
    plain = files.read_json(name)
    check_shape(plain, {"digest": str}, name=f"{files.name}: {name}")
    rest = {key: value for key, value in plain.items() if key != "digest"}
    if plain["digest"] != digest_plain(rest):
        raise _damaged(files, name)
    check_shape(plain, CHECKPOINT, name=f"{files.name}: {name}")
    written = {
        key: Written(size=each["size"], sha256=each["sha256"])
        for key, each in plain["written"].items()
    }
    names = ("run_id", "step", "objective", "files")
    return Saved(written=written, **{key: plain[key] for key in names})


def check_written(saved: Saved, contents: Mapping[str, bytes], *, run: str) -> None:
    """Refuses files of a run that do not begin as they stood at a checkpoint.

    Args:
        saved: The checkpoint.
        contents: The files, by their parts: `metrics` and `states`.
        run: What the user called the run.

    Raises:
        RecordError: one of them is cut short, or altered.
    """
    for part, content in contents.items():
        written = saved.written[part]
        begin = memoryview(content)[: written.size]
        if hashlib.sha256(begin).hexdigest() != written.sha256:
            what = f"{part}.jsonl is not what was written before step {saved.step:,}"
            raise AlteredRecordError(f"{run}: {what}. It was altered or damaged.")


def restore_leaves(
    files: RunFiles, step: int, *, most: int = _MOST
) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint that `read_saved` found whole, by their paths.

    `params/Dense_0/kernel`, `opt_state/0/mu/Dense_0/kernel`, ...

    Args:
        files: The run.
        step: The checkpoint.
        most: Bytes that all arrays together may have.

    Raises:
        RecordError: Orbax can't read it, or it holds more.
    """
    import jax
    import orbax.checkpoint as ocp

    with _on_disk(files, step) as folder:
        try:
            reader = ocp.PyTreeCheckpointHandler()
            tree = reader.metadata(folder).tree
            need = sum(
                math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(tree)
            )
            if need > most:
                raise ValueError(f"{need:,} bytes of arrays, at most {most:,}")
            numpy = ocp.RestoreArgs(restore_type=np.ndarray)
            asked = jax.tree.map(lambda _: numpy, tree)
            restored = reader.restore(
                folder, args=ocp.args.PyTreeRestore(restore_args=asked)
            )
            reader.close()
        except Exception as error:  # Orbax and TensorStore raise what they like
            what = " ".join(str(error).split())[:200]
            where = f"{files.name}: {FOLDER}/{step}"
            raise RecordError(f"{where} can't be read ({what}).") from error
    return named_leaves(restored)


def named_leaves(tree: Any) -> dict[str, np.ndarray]:
    """Leaves as arrays on the host, by their paths."""
    import jax

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in leaves
    }


@contextmanager
def _on_disk(files: RunFiles, step: int) -> Iterator[Path]:
    """The folder of a checkpoint for a while, with the files that were checked alone.

    A run directory may hold what is no file, which Orbax would open, too.
    """
    prefix = f"{FOLDER}/{step}/"
    with tempfile.TemporaryDirectory(prefix="runner-") as temporary:
        try:
            for name in (n for n in files.names if n.startswith(prefix)):
                copy = Path(temporary, name.removeprefix(prefix))
                copy.parent.mkdir(parents=True, exist_ok=True)
                _place(files, name, copy)
        except OSError as error:  # a full disk, or a name that is a directory's, too
            what = f"{FOLDER}/{step} can't be unpacked ({error.strerror})"
            raise RecordError(f"{files.name}: {what}.") from error
        yield Path(temporary, ITEM)


def _place(files: RunFiles, name: str, copy: Path) -> None:
    if files.directory is not None:
        copy.symlink_to((files.directory / name).resolve())
        return
    with files.open(name) as source, copy.open("wb") as target:
        shutil.copyfileobj(source, target, _BLOCK)


def _damaged(files: RunFiles, name: str) -> AlteredRecordError:
    what = "is not the file that was recorded"
    return AlteredRecordError(
        f"{files.name}: {name} {what}. It was altered or damaged."
    )
