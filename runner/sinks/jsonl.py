# SPDX-License-Identifier: Apache-2.0
"""The record itself: `metrics.jsonl` and `states.jsonl` in the run directory."""

from runner.records.events import (
    EvalRecord,
    RunEnd,
    RunStart,
    StateRecord,
    TrainRecord,
)
from runner.records.metrics import LineWriter, Written, format_record

__all__ = ["FILES", "JsonlSink"]

FILES = {"metrics": "metrics.jsonl", "states": "states.jsonl"}


class JsonlSink:
    """Writes every step; the one sink whose failure ends the run."""

    def start(self, run: RunStart) -> None:
        """Opens the files; a resumed run goes on behind what they hold."""
        self._files = {
            name: LineWriter(run.directory / file) for name, file in FILES.items()
        }

    def write(self, record: TrainRecord | EvalRecord | StateRecord) -> None:
        """Appends a line for each step."""
        name = "states" if isinstance(record, StateRecord) else "metrics"
        self._files[name].write(format_record(record))

    def sync(self) -> dict[str, Written]:
        """What the files hold, when the disk has it."""
        for file in self._files.values():
            file.sync()
        return {name: file.written for name, file in self._files.items()}

    def finish(self, end: RunEnd) -> None:
        """Waits until the disk has it all."""
        for file in self._files.values():
            file.close()
