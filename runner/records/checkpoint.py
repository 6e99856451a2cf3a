# SPDX-License-Identifier: Apache-2.0
"""The state of a run on disk, by Orbax. No key is ever saved: they follow from it."""

from pathlib import Path
from typing import Any

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
        """Copies the state from the device, then writes it in the background."""
        import orbax.checkpoint as ocp

        if self._manager is None:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=self._keep, todelete_subdir=".deleted"
            )
            self._manager = ocp.CheckpointManager(
                self._directory.resolve(), options=options
            )
        self._manager.save(step, args=ocp.args.StandardSave(state), force=True)

    def close(self) -> None:
        """Waits for what is being written.

        Raises:
            Exception: whatever went wrong while a checkpoint was written.
        """
        if self._manager is not None:
            self._manager.wait_until_finished()
            self._manager.close()
