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
        """Opens an event file; of a resumed run's points, those it takes again go."""
        from tensorboardX import SummaryWriter

        # the evaluation at the step where it goes on stays, and is not made again
        again = run.first_step + 1 if run.first_step else None
        folder = str(run.directory / "tensorboard")
        self._writer = SummaryWriter(folder, purge_step=again)

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
