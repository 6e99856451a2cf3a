# SPDX-License-Identifier: Apache-2.0
"""The choice of test rows, for a source that has no split of its own."""

import numpy as np
from jaxtyping import Int

from runner.errors import DataError

__all__ = ["split_rows"]


def split_rows(
    rows: int, *, test_fraction: float, generator: np.random.Generator | None
) -> tuple[Int[np.ndarray, " train"], Int[np.ndarray, " test"]]:
    """Cuts the rows in two; each part keeps the order in which the rows stand.

    test = sorted(permutation(rows)[-round(rows * test_fraction):])

    Args:
        rows: Number of rows there are.
        test_fraction: Part of them to be tested on.
        generator: Draws the one permutation.

    Returns:
        Row numbers to train on, and to be tested on.

    Raises:
        DataError: a part would be empty, or there is no generator.
    """
    tests = round(rows * test_fraction)
    if not 0 < tests < rows:
        raise DataError(
            "data.test_fraction",
            f"leaves {tests} of {rows} rows to be tested on, {rows - tests} to train",
            got=test_fraction,
            allowed="Each part needs a row",
            fix="Set data.test_fraction=0.5" if rows > 1 else "Give more rows",
        )
    if generator is None:
        raise DataError(
            "data.split",
            "this source has no test rows of its own, so a stream must choose them",
            got=None,
            fix="Set data.split=split",
        )
    order = generator.permutation(rows)
    return np.sort(order[:-tests]), np.sort(order[-tests:])
