# SPDX-License-Identifier: Apache-2.0
"""The record itself: `metrics.jsonl` in the run directory."""

from runner.records.events import EvalRecord, RunEnd, RunStart, TrainRecord
from runner.records.metrics import MetricsWriter

__all__ = ["JsonlSink"]


class JsonlSink:
    """Writes every step; the one sink whose failure ends the run."""

    def start(self, run: RunStart) -> None:
        """Opens the file."""
        self._writer = MetricsWriter(run.directory / "metrics.jsonl")

    def write(self, record: TrainRecord | EvalRecord) -> None:
        """Appends a line for each step."""
        self._writer.write(record)

    def finish(self, end: RunEnd) -> None:
        """Waits until the disk has it all."""
        self._writer.close()
