# SPDX-License-Identifier: Apache-2.0
"""A run held against a record, record by record, while it runs: bits, not decimals."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from runner.records.events import EvalRecord, StateRecord, TrainRecord
from runner.records.record import Record

__all__ = ["Compared", "FloatDifference", "Replay"]


@dataclass(frozen=True)
class FloatDifference:
    """A number whose bits are not those of the record.

    Args:
        phase: `train` or `eval`.
        step: As in `metrics.jsonl`.
        metric: Its name.
        recorded: The recorded value; None for one that is not finite.
        here: The value of this run.
    """

    phase: str
    step: int
    metric: str
    recorded: float | None
    here: float | None

    @property
    def size(self) -> float:
        """|here - recorded|; infinite where one of them is not finite."""
        if self.recorded is None or self.here is None:
            return math.inf
        return abs(self.here - self.recorded)

    def __str__(self) -> str:
        values = f"{self.recorded!r} recorded, {self.here!r} here"
        return f"{self.phase} {self.metric} of step {self.step:,}: {values}"

    def to_plain(self) -> dict[str, Any]:
        """Itself as plain data; JSON has no infinity."""
        size = self.size if math.isfinite(self.size) else None
        return {**asdict(self), "difference": size}


@dataclass(frozen=True)
class Compared:
    """How far one kind of fact was compared.

    Args:
        number: How many were.
        differ: How many of them differ.
        first: The step of the first one that differs.
    """

    number: int = 0
    differ: int = 0
    first: int | None = None

    def __str__(self) -> str:
        if self.first is None:
            return ""
        return f"{self.differ:,} differ, from step {self.first:,} on"

    def __add__(self, other: "Compared") -> "Compared":
        first = other.first if self.first is None else self.first
        return Compared(self.number + other.number, self.differ + other.differ, first)


class Replay:
    """What a run has been found to have in common with a record.

    Args:
        record: What it is held against.
        goes_on: Whether floats may differ without ending the run: where the machine
            is another one, or no bits were promised.
    """

    def __init__(self, record: Record, *, goes_on: bool) -> None:
        self.goes_on = goes_on
        rows = record.metrics
        self._train = {r["step"]: r for r in rows if r["phase"] == "train"}
        self._eval = {r["step"]: r for r in rows if r["phase"] == "eval"}
        self._states = {r["step"]: r for r in record.states}
        self.compared = {
            name: Compared() for name in ("batches", "train", "eval", "states")
        }
        self.first: FloatDifference | None = None
        self.largest: dict[str, FloatDifference] = {}

    def take(self, event: object) -> None:
        """Compares what the loop said; other events are let by."""
        if isinstance(event, TrainRecord):
            self._take("train", _rows_of(event), self._train)
        elif isinstance(event, EvalRecord):
            self._take("eval", iter([(event.step, event.metrics)]), self._eval)
        elif isinstance(event, StateRecord) and event.step in self._states:
            recorded = self._states[event.step]
            self._note("batches", event.step, event.batches != recorded["batches"])
            self._note("states", event.step, event.state != recorded["state"])

    @property
    def reads_others(self) -> bool:
        """Whether other rows were read than those of the record."""
        return self.compared["batches"].differ > 0

    @property
    def has_other_bits(self) -> bool:
        """Whether any float differs, in metrics or in the state."""
        return any(self.compared[n].differ for n in ("train", "eval", "states"))

    def stop(self) -> str:
        """Why the run need not go on; empty while it is to."""
        if self.reads_others:
            return "reads other rows than the run that it reproduces"
        if self.has_other_bits and not self.goes_on:
            return "differs from the run that it reproduces"
        return ""

    def _take(
        self,
        phase: str,
        rows: Iterator[tuple[int, Mapping[str, Any]]],
        recorded: Mapping[int, Mapping[str, Any]],
    ) -> None:
        for step, row in rows:
            if step not in recorded:
                continue
            names = sorted(recorded[step].keys() - {"phase", "step"})
            pairs = [(n, recorded[step][n], _plain(row.get(n))) for n in names]
            other = [p for p in pairs if p[0] not in row or not _same_bits(p[1], p[2])]
            self._note(phase, step, bool(other))
            for name, before, here in other:
                self._differ(FloatDifference(phase, step, name, before, here))

    def _note(self, name: str, step: int, differs: bool) -> None:
        one = Compared(1, int(differs), step if differs else None)
        self.compared[name] += one

    def _differ(self, found: FloatDifference) -> None:
        self.first = self.first or found
        name = f"{found.phase}/{found.metric}"
        if name not in self.largest or found.size > self.largest[name].size:
            self.largest[name] = found


def _rows_of(record: TrainRecord) -> Iterator[tuple[int, Mapping[str, Any]]]:
    columns = {k: np.asarray(v).tolist() for k, v in record.metrics.items()}
    for i in range(record.steps):
        yield record.first_step + i, {k: v[i] for k, v in columns.items()}


def _plain(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _same_bits(recorded: Any, here: float | None) -> bool:
    if recorded is None or here is None:
        return recorded is here
    return np.float64(recorded).tobytes() == np.float64(here).tobytes()
