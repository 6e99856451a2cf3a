# SPDX-License-Identifier: Apache-2.0
"""What a run says while it runs: plain values that the sinks take."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

__all__ = [
    "EvalRecord",
    "KeyRow",
    "Outputs",
    "RunEnd",
    "RunStart",
    "StateRecord",
    "StreamRow",
    "TrainRecord",
]


@dataclass(frozen=True)
class StreamRow:
    """One stream, as a table shows it.

    Args:
        name: Name under `rng.streams`.
        kind: `jax` or `host`.
        derivation: How its base key comes about, in words that fit a column,
            as `fold_in(key(0), 'dropout')`.
        key: `key_data` of the base key as hex words; for a host stream its
            `SeedSequence` in words.
        phases: Phases in which it is drawn from.
        per: Coordinates that its keys differ by, as `step, microbatch`.
        draws: Places in the program that draw from it, as `train Dropout_0`.
    """

    name: str
    kind: str
    derivation: str
    key: str
    phases: str
    per: str
    draws: tuple[str, ...] = ()


@dataclass(frozen=True)
class KeyRow:
    """One key, as a table shows it; cells are words, the step may be empty."""

    phase: str
    step: str
    stream: str
    path: str
    call: str
    index: str
    key: str
    draws: str


@dataclass(frozen=True)
class RunStart:
    """What is known before step 0.

    Args:
        directory: The run directory; exists, and is ours alone.
        run_id: Names the run among all others; letters, digits and dashes.
        experiment: Name of the recipe.
        config: Resolved config as plain data, secrets taken out.
        streams: A row for each declared stream.
        parameters: Number of trainable scalars.
        steps: Steps that the run will take.
        first_step: The step about to run: 0, or where a resumed run goes on.
        objective: Metric that counts.
        notes: Facts worth a line: platform, guarantee, construct of the loop, ...
        keys: What a probe draws from, a row for each key.
    """

    directory: Path
    run_id: str
    experiment: str
    config: Mapping[str, Any]
    streams: tuple[StreamRow, ...]
    parameters: int
    steps: int
    objective: str
    first_step: int = 0
    notes: Mapping[str, str] = field(default_factory=dict)
    keys: tuple[KeyRow, ...] = ()


@dataclass(frozen=True)
class TrainRecord:
    """Metrics of consecutive train steps: row `i` belongs to `first_step + i`."""

    first_step: int
    metrics: Mapping[str, Float[np.ndarray, " steps"]]

    @property
    def steps(self) -> int:
        """Number of rows."""
        return len(next(iter(self.metrics.values())))


@dataclass(frozen=True)
class EvalRecord:
    """Metrics over the test rows, with the parameters that step `step` starts from."""

    step: int
    metrics: Mapping[str, float]
    best: bool = False


@dataclass(frozen=True)
class StateRecord:
    """What step `step` starts from, in few words.

    Args:
        step: The step about to run.
        batches: SHA-256 hex over the row numbers of the steps since the last such
            record, and over what that one says here.
        state: Hex of `runner.fingerprint` over the state.
    """

    step: int
    batches: str
    state: str


@dataclass(frozen=True)
class Outputs:
    """What came out of a probe, by flat names: `output`, `variables/params/...`."""

    arrays: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class RunEnd:
    """How the run ended.

    Args:
        status: `completed`, `failed` or `interrupted`.
        reason: Why, in one line; empty for a run that took all its steps.
        steps: Steps taken.
        seconds: Wall time from the first step's start to the last one's end.
        metrics: Last value of each metric, as `train/loss`, `eval/accuracy`.
        best: Best value of the objective, and the step it belongs to; or None.
        outputs: What came out of a probe; None for a run that trains.
        observed: How the keys of the running program compare with the ledger, in
            words; empty where they were not observed.
    """

    status: str
    reason: str
    steps: int
    seconds: float
    metrics: Mapping[str, float]
    best: tuple[float, int] | None
    outputs: Outputs | None = None
    observed: str = ""
