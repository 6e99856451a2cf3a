# SPDX-License-Identifier: Apache-2.0
"""The state of a run on disk, by Orbax. No key is ever saved: they follow from it.

    checkpoints/<step>/       Orbax's, written in the background
    checkpoints/<step>.json   ours, written when that is whole: SHA-256 of every file

A step counts as saved when its `.json` is there, which is written last and deleted
first; whatever else lies there a kill has left, and it is cleared away.
"""

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runner.errors import RecordError, RunFailedError
from runner.records.digests import digest_file, digest_plain
from runner.records.files import sync, write_atomically
from runner.records.metrics import Written

__all__ = [
    "FOLDER",
    "ITEM",
    "Checkpoints",
    "Saved",
    "open_manager",
    "save_parts",
    "told",
]

FOLDER = "checkpoints"
ITEM = "default"  # as `orbax.checkpoint.CheckpointManager` calls what it saves
_LONGEST = 300  # characters of what Orbax says
_SPARE = 16 * 2**20  # bytes that must stay free on the disk


@dataclass(frozen=True)
class Saved:
    """What is known of a checkpoint besides its arrays.

    Args:
        run_id: The run that it belongs to.
        step: The step that starts from it.
        objective: The metric that counts, at this step; None where not evaluated.
        written: What the files of the record held by then, by their names.
        files: SHA-256 hex of each of Orbax's files, by its name.
    """

    run_id: str
    step: int
    objective: float | None
    written: Mapping[str, Written]
    files: Mapping[str, str]

    def to_plain(self) -> dict[str, Any]:
        """Itself as plain data, with a digest of it."""
        plain = asdict(self)
        return {**plain, "digest": digest_plain(plain)}


class Checkpoints:
    """The checkpoints of one run; each is written while the run goes on.

    Args:
        directory: Where they lie; made when the first one is saved.
        run_id: The run.
        keep: How many of the newest stay.
        keep_best: How many of the best by the objective stay besides.
        best: `max` or `min`.
    """

    def __init__(
        self, directory: Path, *, run_id: str, keep: int, keep_best: int, best: str
    ) -> None:
        self._directory, self._run_id, self._best = directory, run_id, best
        self._keep, self._keep_best = keep, keep_best
        self._manager: Any = None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._saved: dict[int, float | None] = {}  # steps and their objectives

    def begin(self, saved: Mapping[int, Saved]) -> None:
        """Clears away what was left unfinished, and all but the given checkpoints.

        Args:
            saved: They, as they are to be known from now on.
        """
        self._saved = {step: each.objective for step, each in saved.items()}
        if not self._directory.is_dir():
            return
        with told():
            _clear(self._directory, self._saved)
            for step, each in saved.items():
                path, text = self._directory / f"{step}.json", _spell(each)
                if path.read_text() != text:
                    write_atomically(path, text)

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        *,
        objective: float | None = None,
        written: Mapping[str, Written],
    ) -> None:
        """Copies the state from the device, then writes it in the background.

        Raises:
            RunFailedError: it, or one before it, can't be written.
        """
        self._wait()
        if step in self._saved:
            return  # a state is a function of its step
        saved = Saved(self._run_id, step, objective, dict(written), {})
        with told():
            self._refuse_full_disk(state)
            self._start(step, state)
        self._pending = self._worker.submit(self._complete, saved)

    def check(self) -> None:
        """Raises what went wrong in the background, without waiting for it."""
        if self._pending is not None and self._pending.done():
            self._wait()

    def close(self) -> None:
        """Waits for what is being written.

        Raises:
            RunFailedError: it can't be written.
        """
        try:
            self._wait()
        finally:
            self._worker.shutdown()
            if self._manager is not None:
                with told():
                    self._manager.close()

    def _start(self, step: int, state: Mapping[str, Any]) -> None:
        if self._manager is None:
            self._manager = open_manager(self._directory)
        save_parts(self._manager, step, state)

    def _complete(self, saved: Saved) -> None:
        """In the background: waits for Orbax, then vouches for what it wrote."""
        with told():
            self._manager.wait_until_finished()
            folder = self._directory / str(saved.step)
            files = _digest_folder(folder)
            whole = Saved(
                saved.run_id, saved.step, saved.objective, saved.written, files
            )
            write_atomically(folder.with_name(f"{saved.step}.json"), _spell(whole))
            self._saved[saved.step] = saved.objective
            for step in set(self._saved) - self._kept():
                del self._saved[step]
                _delete(self._directory, step)

    def _kept(self) -> set[int]:
        newest = sorted(self._saved)[-self._keep :]
        sign = 1 if self._best == "max" else -1
        scores = {s: sign * v for s, v in self._saved.items() if v is not None}
        best = sorted(scores, key=lambda step: (-scores[step], step))
        return {*newest, *best[: self._keep_best]}

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _refuse_full_disk(self, state: Mapping[str, Any]) -> None:
        import jax

        need = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + _SPARE
        self._directory.mkdir(exist_ok=True)
        free = shutil.disk_usage(self._directory).free
        if free < need:
            raise OSError(f"{free >> 20} MiB free, {need >> 20} MiB needed")


def open_manager(directory: Path) -> Any:
    """Orbax's manager; where several processes save, all of them open it together."""
    import orbax.checkpoint as ocp

    for name in ("absl", "asyncio"):  # hundreds of lines on what `told` says
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # Directories made in the background are waited for by a counter of the process: two
    # saves at a time, by runs in two threads, would take each other's for their own.
    background = ocp.AsyncOptions(create_directories_asynchronously=False)
    options = ocp.CheckpointManagerOptions(async_options=background)
    return ocp.CheckpointManager(directory.resolve(), options=options)


def save_parts(manager: Any, step: int, state: Mapping[str, Any]) -> None:
    """Begins to write what this process has of a state."""
    import orbax.checkpoint as ocp

    manager.save(step, args=ocp.args.StandardSave(dict(state)), force=True)


def _spell(saved: Saved) -> str:
    return json.dumps(saved.to_plain(), indent=1) + "\n"


def _digest_folder(folder: Path) -> dict[str, str]:
    """SHA-256 hex of every file; all of them are on the disk then."""
    files = {}
    for path in [folder, *sorted(folder.rglob("*"))]:
        if path.is_file():
            files[path.relative_to(folder).as_posix()] = digest_file(path)
        sync(path)
    if not files:
        raise OSError("Orbax has written nothing")
    return files


def _delete(directory: Path, step: int) -> None:
    """Takes the step off the list, then its files."""
    (directory / f"{step}.json").unlink()
    sync(directory)  # a power cut in between must not bring it back
    shutil.rmtree(directory / str(step))


def _clear(directory: Path, saved: Mapping[int, Any]) -> None:
    names = {str(step) for step in saved} | {f"{step}.json" for step in saved}
    if not directory.is_dir():
        return
    for path in directory.iterdir():
        if path.name not in names:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


@contextlib.contextmanager
def told() -> Iterator[None]:
    """What Orbax and the disk say, in one line."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, RecordError) as error:
        first = str(error).partition("\n")[0].partition(" [tensorstore_spec=")[0]
        what = first if len(first) <= _LONGEST else f"{first[:_LONGEST]}..."
        raise RunFailedError(f"checkpoints: can't be written ({what}).") from error
