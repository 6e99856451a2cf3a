# SPDX-License-Identifier: Apache-2.0
"""Whether a program draws the keys and reads the rows that a record says."""

import math
from collections.abc import Mapping
from typing import Any

from runner.errors import ConfigError
from runner.ledger import make_ledger, spell_derivation
from runner.program import Compiled
from runner.records.digests import digest_plain
from runner.records.record import Record
from runner.replay.verdict import Check

__all__ = ["check_data", "compare_keys"]


def check_data(record: Record, program: Compiled) -> None:
    """Refuses rows that are not those of the record.

    Raises:
        ConfigError: their digest is another.
    """
    if program.data_digest == record.digests.get("data"):
        return
    has_path = hasattr(program.spec.data, "path")
    raise ConfigError(
        "data.path" if has_path else "data",
        "the rows are not those of the record: their digest is another",
        got=getattr(program.spec.data, "path", program.spec.data.name),
        fix="Point to the data that it was trained on: --set data.path=...",
    )


def compare_keys(record: Record, program: Compiled) -> Check:
    """Holds the ledger of a program against the recorded one: every key, any step."""
    recorded, here = record.ledger, make_ledger(program)
    number = sum(math.prod(draw["axes"].values()) for draw in here["draws"])
    what = f"{len(here['draws']):,} draws, {number:,} keys a step, at all steps"
    if digest_plain(_comparable(recorded)) == digest_plain(_comparable(here)):
        return Check("keys", True, what)
    return Check("keys", False, what, _first_difference(recorded, here))


def _comparable(ledger: Mapping[str, Any]) -> dict[str, Any]:
    """A ledger without the number of steps, which may be another."""
    return {**ledger, "sizes": {**ledger.get("sizes", {}), "steps": None}}


def _first_difference(recorded: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    for part in ("rng", "streams", "draws"):
        if digest_plain(recorded.get(part)) == digest_plain(here[part]):
            continue
        if part == "rng":
            return f"the generator is {here['rng']}, recorded {recorded.get('rng')}"
        return _first_row(part, recorded.get(part) or [], here[part])
    return "the sizes of the run are others"


def _first_row(part: str, recorded: list[Any], here: list[Any]) -> str:
    known = {digest_plain(row) for row in recorded}
    for row in here:
        if digest_plain(row) not in known:
            if part == "streams":
                return f"stream {row['name']} is not as recorded"
            path = "/".join(row["path"]) or "(root)"
            rule = spell_derivation(row.get("derivation") or []) or "untraced"
            return f"{row['phase']} {path} draws from {rule}, not recorded"
    return f"{len(recorded) - len(here)} of the recorded {part} are not there"
