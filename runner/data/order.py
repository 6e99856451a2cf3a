# SPDX-License-Identifier: Apache-2.0
"""Which rows a step reads, as a pure function of the step."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from jaxtyping import Int32

from runner.errors import DataError

__all__ = ["BatchOrder", "epoch_order"]


def epoch_order(
    generator: np.random.Generator | None, *, rows: int
) -> Int32[np.ndarray, " rows"]:
    """All rows, permuted; as they stand where there is no generator."""
    order = np.arange(rows) if generator is None else generator.permutation(rows)
    return order.astype(np.int32)


@dataclass(frozen=True)
class BatchOrder:
    """The rows of every batch.

    n = rows // batch_size                           steps in an epoch
    batch(step) = order(step // n)[batch_size * (step % n) : ...][:batch_size]

    The rows that are left at the end of an epoch are not read in it.

    Args:
        rows: Number of rows there are.
        batch_size: Rows in a batch.
        generator_of_epoch: Makes an epoch's generator, always in the same state;
            or None, for rows as they stand.

    Raises:
        DataError: there are not enough rows for one batch.
    """

    rows: int
    batch_size: int
    generator_of_epoch: Callable[[int], np.random.Generator | None]
    _order: Callable[[int], Int32[np.ndarray, " rows"]] = field(
        init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if self.batch_size > self.rows:
            raise DataError(
                "data.batch_size",
                f"must not exceed the {self.rows} rows to train on",
                got=self.batch_size,
                fix=f"Set data.batch_size={self.rows} or less",
            )
        # A chunk ends within an epoch and the next one goes on there: keep it.
        object.__setattr__(self, "_order", lru_cache(maxsize=2)(self._make_order))

    @property
    def steps_per_epoch(self) -> int:
        """Number of whole batches in an epoch."""
        return self.rows // self.batch_size

    def indices(
        self, first_step: int, *, steps: int
    ) -> Int32[np.ndarray, "steps batch"]:
        """The rows that a number of steps read, from one step on.

        Args:
            first_step: Global step, 0-based.
            steps: Number of steps, at least 1.
        """
        if first_step < 0 or steps < 1:
            raise ValueError(f"no such steps: {steps} from {first_step}")
        end, n = first_step + steps, self.steps_per_epoch
        parts = []
        for epoch in range(first_step // n, (end - 1) // n + 1):
            batches = self._order(epoch)[: n * self.batch_size].reshape(n, -1)
            start = epoch * n
            parts.append(batches[max(first_step - start, 0) : end - start])
        return np.concatenate(parts)

    def _make_order(self, epoch: int) -> Int32[np.ndarray, " rows"]:
        return epoch_order(self.generator_of_epoch(epoch), rows=self.rows)
