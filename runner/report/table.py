# SPDX-License-Identifier: Apache-2.0
"""A table as a value; a page and a terminal show it, each in its way."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

__all__ = ["Table", "Weight", "make_table", "spell"]


class Weight(StrEnum):
    """Whether a page shows a table at once, or when it is asked for."""

    OPEN = "open"
    FOLDED = "folded"


@dataclass(frozen=True)
class Table:
    """Rows under columns; cells are words as they come, escaped by who shows them.

    Args:
        caption: What it is.
        columns: Names of the columns.
        rows: A cell for each column.
        weight: How a page shows it.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    weight: Weight = Weight.OPEN


def make_table(
    caption: str,
    columns: Iterable[str],
    rows: Iterable[Iterable[Any]],
    *,
    weight: Weight = Weight.OPEN,
) -> Table:
    """A table of values; None becomes an empty cell."""
    cells = (tuple("" if v is None else str(v) for v in row) for row in rows)
    return Table(caption, tuple(columns), tuple(cells), weight)


def spell(value: Any) -> str:
    """A leaf of plain data: a string as it is, all else as JSON."""
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)
