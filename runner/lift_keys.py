# SPDX-License-Identifier: Apache-2.0
"""How many distinct keys come out of each lifted transform of a program."""

from typing import Any

from runner.audit.lifted import Crossing, Rule
from runner.hazards.places import Place, find_places
from runner.program import Compiled

__all__ = ["count_lift_keys"]

_NOTES = {
    "fold_rngs": "forks every stream: other keys than without it",
    "jit": "forks every stream: other keys than without it",
    "remat": "changes no key",
    "while_loop": "a key that is split is folded with the turn",
}


def count_lift_keys(program: Compiled) -> list[dict[str, Any]]:
    """A row for each phase and lift that something is drawn inside of.

        {"phase": "train", "lift": "scan", "path": ["layers"], "axis": "scan:layers",
         "streams": [{"stream": "dropout", "keys": 4, "rule": "split"}], "note": ""}

    `keys` is the number of keys over the lift's index for each place that draws: its
    size where the stream is split, else 1; null where the size isn't known.
    """
    rows: dict[Any, dict[str, Any]] = {}
    for place in find_places(program):
        for crossing in place.crossings:
            row = rows.setdefault(
                (place.phase, crossing.kind, crossing.axis),
                {
                    "phase": str(place.phase),
                    "lift": crossing.kind,
                    "path": list(crossing.path),
                    "axis": crossing.axis,
                    "streams": [],
                    "note": _NOTES.get(crossing.kind, ""),
                },
            )
            stream = _stream_row(place, crossing)
            if stream not in row["streams"]:
                row["streams"].append(stream)
    return list(rows.values())


def _stream_row(place: Place, crossing: Crossing) -> dict[str, Any]:
    split = crossing.rule is Rule.SPLIT
    keys = place.sizes.get(crossing.axis) if split else 1
    return {"stream": place.draw.stream, "keys": keys, "rule": str(crossing.rule)}
