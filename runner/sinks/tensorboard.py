# SPDX-License-Identifier: Apache-2.0
"""Event files for TensorBoard, in the run directory."""

from importlib.util import find_spec

from runner.errors import ConfigError
from runner.records.events import EvalRecord, RunEnd, RunStart, TrainRecord
from runner.sinks.rows import scalar_rows
from runner.spec import TensorboardSpec

__all__ = ["TensorboardSink", "make_tensorboard_sink"]


class TensorboardSink:
    """Writes each `every`-th train step, and every evaluation.

    Args:
        every: Train steps between two points.
    """

    def __init__(self, *, every: int) -> None:
        self._every = every

    def start(self, run: RunStart) -> None:
        """Opens an event file."""
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(run.directory / "tensorboard"))

    def write(self, record: TrainRecord | EvalRecord) -> None:
        """Adds points as `train/loss`, `eval/accuracy`."""
        for step, row in scalar_rows(record, every=self._every):
            for tag, value in row.items():
                self._writer.add_scalar(tag, value, step)

    def finish(self, end: RunEnd) -> None:
        """Flushes and closes the file."""
        self._writer.close()


def make_tensorboard_sink(spec: TensorboardSpec) -> TensorboardSink | None:
    """The sink, or None where it is disabled.

    Raises:
        ConfigError: tensorboardX is not installed.
    """
    if spec.mode == "disabled":
        return None
    if find_spec("tensorboardX") is None:
        raise ConfigError(
            "sinks.tensorboard.mode",
            "needs the extra that brings tensorboardX",
            got=spec.mode,
            fix="Run pip install 'jax-runner[tensorboard]'",
        )
    return TensorboardSink(every=spec.every)
