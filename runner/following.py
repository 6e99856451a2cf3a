# SPDX-License-Identifier: Apache-2.0
"""The part of a run in a process that does not write its record.

Where several processes run one program, process 0 records it. The others take the same
steps and save their parts of the state at the same ones.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from runner.comparison.compare import Comparison
from runner.course import BEGINNING, Start
from runner.errors import RunFailedError
from runner.kept import keep
from runner.ledger import make_ledger
from runner.loop import Outcome, Snapshot, train
from runner.processes.peers import peers
from runner.program import Compiled, Program
from runner.records.checkpoint import FOLDER, open_manager, save_parts
from runner.records.digests import digest_plain

__all__ = ["agree_on", "compare_keys", "follow_run"]


def agree_on(program: Compiled, *, ledger: Mapping[str, Any]) -> None:
    """Refuses to begin where processes have other data, or would use other keys.

    Raises:
        RunFailedError: this one has others than process 0.
    """
    mine = {"data": program.data_digest, "keys": digest_plain(ledger)}
    theirs = peers().share(mine)
    for what, digest in mine.items():
        if theirs[what] != digest:
            raise RunFailedError(f"mesh.distributed: other {what} than in process 0.")
    peers().meet()  # all have read what process 0 now writes to


def compare_keys(program: Compiled, ledger: Mapping[str, Any]) -> Comparison | None:
    """What compares the keys of the running program, where `rng.observe` says so."""
    if not program.spec.rng.observe:
        return None
    window = program.window if isinstance(program, Program) else 1
    return Comparison(ledger, window=window)


def follow_run(
    program: Program,
    *,
    directory: Path,
    start: Start = BEGINNING,
    saved: Iterable[int] = (),
) -> Outcome:
    """Takes the steps that process 0 takes and records.

    Args:
        program: What to run.
        directory: The run directory, which process 0 has made.
        start: Where to begin.
        saved: Steps that have a checkpoint already.

    Raises:
        RunFailedError: it has failed here, or in another process.
    """
    company, ledger = peers(), make_ledger(program)
    agree_on(program, ledger=ledger)
    saves = _Saves(directory / FOLDER, saved)
    with company.closing(lambda line: None):
        events = train(
            program,
            start=start,
            watch=compare_keys(program, ledger),
            share=company.share,
        )
        for event in events:
            if isinstance(event, Snapshot | Outcome):
                saves.save(event.step, keep(event.state))
        assert isinstance(event, Outcome)
        program.layout.fetch(event.state.params)
        saves.close()
    return event


class _Saves:
    """Saves at the steps at which process 0 does, which vouches for all files."""

    def __init__(self, directory: Path, saved: Iterable[int]) -> None:
        self._directory, self._saved = directory, set(saved)
        self._manager: Any = None

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        if step in self._saved:
            return
        if self._manager is None:
            self._manager = open_manager(self._directory)
        self._manager.wait_until_finished()
        save_parts(self._manager, step, state)
        self._saved.add(step)

    def close(self) -> None:
        if self._manager is not None:
            self._manager.wait_until_finished()
            self._manager.close()
