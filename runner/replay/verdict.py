# SPDX-License-Identifier: Apache-2.0
"""What was reproduced, how far, and why no more than that."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from runner.differences.arrays import ArrayDifferences
from runner.guarantee import Level
from runner.replay.compare import FloatDifference
from runner.replay.environment import Difference

__all__ = ["Check", "Reached", "Verdict"]


class Reached(StrEnum):
    """How much of a run was found again."""

    BIT_EXACT = "bit-exact"
    KEY_EXACT = "key-exact"
    DIFFERENT = "different"


_ORDER = (Reached.DIFFERENT, Level.STATISTICAL, Level.KEY_EXACT, Level.BIT_EXACT)


@dataclass(frozen=True)
class Check:
    """One comparison, as a row of the verdict.

    Args:
        what: `generator`, `keys`, `data`, `batches`, `train`, `eval`, `states`,
            `params` or `outputs`.
        equal: The finding; None where there was nothing to compare.
        compared: How much was compared, in words.
        found: What differs, in words; empty where nothing does.
    """

    what: str
    equal: bool | None
    compared: str
    found: str = ""


@dataclass(frozen=True)
class Verdict:
    """The verdict on one reproduction.

    Args:
        level: What was reached: `bit-exact`, `key-exact` or `different`.
        promised: The guarantee stored with the run.
        reason: Why it is that level, in one sentence.
        run: {run_id, name, experiment, status} of the run.
        directory: Where it ran again; None where it did not.
        steps: Steps that were compared.
        recorded: Steps that the record has.
        checks: The comparisons made.
        first: The first float that differs.
        largest: The largest difference of each metric.
        params: How the final parameters differ.
        environment: Where this machine is another one.
        restored: What was set for this process to be like the record's machine.
    """

    level: Reached
    promised: str
    reason: str
    run: dict[str, Any]
    directory: str | None = None
    steps: int = 0
    recorded: int = 0
    checks: tuple[Check, ...] = ()
    first: FloatDifference | None = None
    largest: tuple[FloatDifference, ...] = ()
    params: ArrayDifferences | None = None
    environment: tuple[Difference, ...] = ()
    restored: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of_altered(cls, name: str, what: str) -> "Verdict":
        """The verdict on a record whose files are not those that were written."""
        reason = f"a file of the record was altered: {what}"
        return cls(Reached.DIFFERENT, "unknown", reason, {"name": name})

    @property
    def is_kept(self) -> bool:
        """Whether no less was reached than was promised."""
        order = [str(level) for level in _ORDER]
        if self.promised not in order:
            return False
        return order.index(self.level) >= order.index(self.promised)

    def to_plain(self) -> dict[str, Any]:
        """Itself as the JSON document that `reproduce --json` prints."""
        return {
            "level": str(self.level),
            "promised": self.promised,
            "kept": self.is_kept,
            "reason": self.reason,
            "run": self.run,
            "directory": self.directory,
            "steps": {"compared": self.steps, "recorded": self.recorded},
            "checks": [vars(check) for check in self.checks],
            "first": self.first and self.first.to_plain(),
            "largest": [each.to_plain() for each in self.largest],
            "params": self.params and _plain(self.params),
            "restored": dict(self.restored),
            "environment": [each.to_plain() for each in self.environment],
        }


def _plain(found: ArrayDifferences) -> dict[str, Any]:
    return {
        "first": found.first,
        "first_largest": found.first_largest,
        "differing": found.differing,
        "leaves": found.leaves,
        "largest": found.largest,
        "largest_leaf": found.largest_leaf,
        "ulps": found.ulps,
    }
