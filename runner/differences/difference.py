# SPDX-License-Identifier: Apache-2.0
"""All in which two runs differ, as one value."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from runner.differences.arrays import ArrayDifferences
from runner.differences.config import ConfigDifferences
from runner.differences.keys import KeyDifferences
from runner.differences.leaves import Leaf
from runner.differences.metrics import MetricDifferences, StateDifferences

__all__ = ["Differences", "RunName"]


@dataclass(frozen=True)
class RunName:
    """Which run it is; none of this is compared but `status` and `steps`."""

    name: str
    run_id: str
    experiment: str
    status: str
    reason: str
    steps: int


@dataclass(frozen=True)
class Differences:
    """All in which two runs differ, part by part.

    Args:
        a, b: The runs.
        outcome: `status` and `steps`, where they differ.
        config: Leaves of the config.
        environment: Leaves of generator, versions, platform, code and guarantee.
        data: SHA-256 hex of the data that each read.
        keys: Streams and entries of the ledger.
        metrics: Rows of `metrics.jsonl`.
        states: Rows of `states.jsonl`: rows read, and the state's fingerprint.
        params: Final parameters.
        outputs: What came out of a probe.
        summary: What it most likely comes from, in a sentence or two.
    """

    a: RunName
    b: RunName
    outcome: tuple[Leaf, ...]
    config: ConfigDifferences
    environment: tuple[Leaf, ...]
    data: tuple[str | None, str | None]
    keys: KeyDifferences
    metrics: MetricDifferences
    states: StateDifferences
    params: ArrayDifferences
    outputs: ArrayDifferences
    summary: str = ""

    @property
    def equal(self) -> Mapping[str, bool]:
        """Whether each part is equal; what can't matter to a bit does not count."""
        metrics, states = self.metrics, self.states
        return {
            "outcome": not self.outcome,
            "config": not self.config.matters,
            "environment": not self.environment,
            "data": self.data[0] == self.data[1],
            "keys": not self.keys.streams and not self.keys.draws,
            "metrics": not (metrics.metrics or metrics.only_a or metrics.only_b),
            "states": states.batches is None and states.state is None,
            "params": self.params.equal is not False,
            "outputs": self.outputs.equal is not False,
        }

    @property
    def are_equal(self) -> bool:
        """Whether every part is."""
        return all(self.equal.values())

    @property
    def have_equal_results(self) -> bool:
        """Whether all that was computed is equal, whatever led to it."""
        parts = ("metrics", "states", "params", "outputs")
        return all(self.equal[part] for part in parts)

    def to_plain(self) -> dict[str, Any]:
        """As `diff --json` prints it."""
        fields = asdict(self)
        runs = {"a": fields.pop("a"), "b": fields.pop("b")}
        parts = {"parts": dict(self.equal)}
        return {
            "equal": self.are_equal,
            "summary": fields.pop("summary"),
            **parts,
            "runs": runs,
            **fields,
        }
