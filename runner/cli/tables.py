# SPDX-License-Identifier: Apache-2.0
"""Tables for a terminal or a pipe: aligned, never cut."""

from collections.abc import Iterable, Sequence
from typing import Any

from runner.sinks.text import align, clean

__all__ = ["print_table"]


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Prints rows under their columns; what is not printable is escaped."""
    cells = [tuple(columns), *(tuple(map(clean, row)) for row in rows)]
    for line in align(cells):
        print(line)
