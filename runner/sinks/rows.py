# SPDX-License-Identifier: Apache-2.0
"""Records as rows of named scalars, as the mirrors show them."""

from collections.abc import Iterator

from runner.records.events import EvalRecord, TrainRecord

__all__ = ["scalar_rows"]


def scalar_rows(
    record: TrainRecord | EvalRecord, *, every: int
) -> Iterator[tuple[int, dict[str, float]]]:
    """Yields `(step, {"train/loss": 0.69, ...})`.

    Args:
        record: What the loop said.
        every: Train steps between two rows: those with `step % every == 0`.
    """
    if isinstance(record, EvalRecord):
        yield record.step, {f"eval/{k}": float(v) for k, v in record.metrics.items()}
        return
    skip = -record.first_step % every
    names = [f"train/{k}" for k in record.metrics]
    columns = [v[skip::every].tolist() for v in record.metrics.values()]
    for i, row in enumerate(zip(*columns, strict=True)):
        step = record.first_step + skip + i * every
        yield step, dict(zip(names, row, strict=True))
