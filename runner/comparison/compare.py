# SPDX-License-Identifier: Apache-2.0
"""Whether the keys that a program drew from are those of its ledger.

At each step of each phase, every key that was drawn from is planned, for that use; and
every planned key was drawn from, but for branches that were not taken.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from runner.comparison.matching import Matching, Words
from runner.observe.observe import Observation
from runner.spec import Phase

__all__ = ["Agreement", "Comparison"]


class Agreement(StrEnum):
    """How the keys compare.

    `equal`: all of them, each way. `partial`: no difference, but the ledger has no
    derivation for some draws, or their keys can't be observed. `different`: the run
    failed.
    """

    EQUAL = "equal"
    PARTIAL = "partial"
    DIFFERENT = "different"


_VERDICTS = {
    Agreement.EQUAL: "equal to the ledger",
    Agreement.PARTIAL: "equal to the ledger, which lacks some draws",
    Agreement.DIFFERENT: "not those of the ledger",
}


class Comparison:
    """Compares what a run draws from with its ledger, call by call.

    Args:
        ledger: As `make_ledger` returns it.
        window: Most train steps in one call.
    """

    def __init__(self, ledger: Mapping[str, Any], *, window: int) -> None:
        self._phases = {
            phase: Matching(ledger, phase, window=window if phase is Phase.TRAIN else 1)
            for phase in Phase
        }
        self._differs = False

    def expect(self, phase: Phase, first: int, *, steps: int = 1) -> Any:
        """The planned keys of some steps, on the device; nothing waits for them."""
        return self._phases[phase].planned.derive(first, steps=steps)

    def compare(
        self, phase: Phase, first: int, *, planned: Words, observed: list[Observation]
    ) -> str:
        """What differs, in one line; empty where nothing does.

        Args:
            phase: Phase of the calls.
            first: Their first step.
            planned: What `expect` returned for it; more rows than steps do no harm.
            observed: Of calls that make up the same steps, such as the batches of an
                evaluation. Their words are of shape [steps, n], or [n] for one step.
        """
        found = self._phases[phase].compare(planned, observed)
        if found is None:
            return ""
        self._differs = True
        at = "" if phase is Phase.INIT else f" at step {first + found[0]}"
        return f"keys differ from the ledger in {phase}{at}: {found[1]}"

    @property
    def agreement(self) -> Agreement:
        """How they compare so far."""
        if self._differs:
            return Agreement.DIFFERENT
        lacks = any(phase.beyond() for phase in self._phases.values())
        return Agreement.PARTIAL if lacks else Agreement.EQUAL

    def to_plain(self) -> dict[str, Any]:
        """As `run.json` has it."""
        named = {str(p): found for p, found in self._phases.items() if found.has_draws}
        return {
            "status": str(self.agreement),
            "draws": sum(found.draws for found in named.values()),
            "keys": sum(found.keys for found in named.values()),
            "phases": {
                name: {"draws": found.draws, "keys": found.keys}
                for name, found in named.items()
            },
            "beyond": [
                {"phase": name, **row}
                for name, found in named.items()
                for row in found.beyond()
            ],
        }

    def __str__(self) -> str:
        """`12,345 keys at 3 draws in train, ...: equal to the ledger`."""
        counts = ", ".join(
            f"{found.keys:,} keys at {found.draws} draws in {phase}"
            for phase, found in self._phases.items()
            if found.keys
        )
        return f"{counts or 'no keys'}: {_VERDICTS[self.agreement]}"
