# SPDX-License-Identifier: Apache-2.0
"""The course of a run: where it begins, how far a call goes, when it saves, stops."""

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from runner.data import BatchOrder
from runner.records.events import EvalRecord, StateRecord
from runner.spec import RunSpec

__all__ = ["BEGINNING", "Batches", "Best", "Pace", "Saves", "Start"]

_SECONDS_PER_CALL = 0.2
_SECONDS_PER_SAVE = 600.0
_FIRST_STEPS = 8


@dataclass(frozen=True)
class Start:
    """Where a run goes on from; by default, at its beginning.

    Args:
        step: The step about to run.
        kept: `params`, `collections` and `opt_state` before it; None before step 0.
        evaluated: The evaluations before it, in their order.
        said: The last digest of the state before it, if any.
    """

    step: int = 0
    kept: Mapping[str, Any] | None = None
    evaluated: tuple[EvalRecord, ...] = ()
    said: StateRecord | None = None


BEGINNING = Start()


class Batches:
    """A rolling digest of the row numbers that the steps read."""

    def __init__(self, order: BatchOrder, start: Start) -> None:
        said = start.said or StateRecord(0, "", "")
        self.digest = hashlib.sha256(said.batches.encode())
        if start.step > said.step:
            steps = start.step - said.step
            self.take(order.indices(said.step, steps=steps))

    def take(self, numbers: np.ndarray) -> None:
        self.digest.update(numbers.astype("<i4").tobytes())

    def say(self) -> str:
        said = self.digest.hexdigest()
        self.digest = hashlib.sha256(said.encode())
        return said


class Saves:
    """When the state is to be saved."""

    def __init__(self, spec: RunSpec) -> None:
        self.every = spec.checkpoint.every
        self.keeps_best = spec.checkpoint.keep_best > 0
        self.waits = self.keeps_best or spec.eval.patience is not None
        self.last = time.monotonic()

    def is_due(self, step: int, *, best: bool) -> bool:
        now = time.monotonic()
        if self.every == "auto":
            due = now - self.last >= _SECONDS_PER_SAVE
        else:
            due = self.every is not None and step % self.every == 0
        due = due or (best and self.keeps_best)
        self.last = now if due else self.last
        return due


class Best:
    """The best value of the objective so far."""

    def __init__(self, spec: RunSpec, start: Start) -> None:
        self.metric = spec.objective
        self.sign = 1 if spec.task.metrics[self.metric] == "max" else -1
        self.min_delta, self.patience = spec.eval.min_delta, spec.eval.patience
        self.value: float | None = None
        self.since = 0  # evaluations since the last one that was better
        self.step = start.step
        for record in start.evaluated:
            self.take(record.metrics, record.step)

    def take(self, values: Mapping[str, float], step: int) -> bool:
        value, self.step = values[self.metric], step
        gain = None if self.value is None else self.sign * (value - self.value)
        if np.isfinite(value) and (gain is None or gain > self.min_delta):
            self.value, self.since = value, 0
            return True
        self.since += 1
        return False

    def stop_early(self) -> str:
        if self.patience is None or self.since < self.patience:
            return ""
        what = f"{self.metric} not better in {self.patience} evaluations"
        return f"early stop at step {self.step}: {what}"


class Pace:
    """How many steps to put into a call: as given, or as many as take 0.2 s."""

    def __init__(self, *, most: int, fixed: bool) -> None:
        self.most, self.fixed = most, fixed
        self.steps = self.most if self.fixed else min(_FIRST_STEPS, self.most)
        self.last: float | None = None

    def done(self, steps: int) -> None:
        now = time.perf_counter()
        seconds, self.last = now - (self.last or now), now
        if not self.fixed and seconds:
            wanted = int(steps * _SECONDS_PER_CALL / max(seconds, 1e-6))
            self.steps = max(1, min(wanted, 4 * self.steps, self.most))
