# SPDX-License-Identifier: Apache-2.0
"""The state of a run on disk, by Orbax. No key is ever saved: they follow from it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runner.errors import RunFailedError

__all__ = ["Checkpoints"]


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: Where they lie; made when the first one is saved.
        keep: How many of the newest stay.
    """

    def __init__(self, directory: Path, *, keep: int) -> None:
        self._directory, self._keep = directory, keep
        self._manager: Any = None

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Copies the state from the device, then writes it in the background.

        Raises:
            RunFailedError: it, or one before it, can't be written.
        """
        with _told():
            self._save(step, state)

    def _save(self, step: int, state: dict[str, Any]) -> None:
        import orbax.checkpoint as ocp

        if self._manager is None:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=self._keep, todelete_subdir=".deleted"
            )
            self._manager = ocp.CheckpointManager(
                self._directory.resolve(), options=options
            )
        if step in self._manager.all_steps():
            return  # a state is a function of its step
        self._manager.save(step, args=ocp.args.StandardSave(state), force=True)

    def close(self) -> None:
        """Waits for what is being written.

        Raises:
            RunFailedError: it can't be written.
        """
        with _told():
            if self._manager is not None:
                self._manager.wait_until_finished()
                self._manager.close()


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What Orbax and the disk say, in one line."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        what = str(error).partition("\n")[0]
        raise RunFailedError(f"checkpoints: can't be written ({what}).") from error
