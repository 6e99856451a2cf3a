# SPDX-License-Identifier: Apache-2.0
"""The loop: calls the compiled program and yields records; it writes nothing.

One call is always queued behind the one that runs, so the device never waits for
Python. Metrics are fetched when the next call is already on its way.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np

from runner.observe.observe import Observation
from runner.program import Construct, Program
from runner.records.events import EvalRecord, TrainRecord
from runner.spec import Phase
from runner.step import Batch, State

__all__ = ["Outcome", "Snapshot", "Watch", "train"]

_SECONDS_PER_CALL = 0.2
_FIRST_STEPS = 8
_STOPPED = "stopped by the user"


@dataclass(frozen=True)
class Snapshot:
    """The state before step `step`; copy it before the next record is asked for."""

    step: int
    state: State


@dataclass(frozen=True)
class Outcome:
    """How the loop ended, with the last good state."""

    status: str
    reason: str
    step: int
    state: State
    seconds: float


class Watch(Protocol):
    """Knows which keys a program should draw from, and looks at those it does."""

    def expect(self, phase: Phase, first: int, *, steps: int = 1) -> Any:
        """The planned keys of some steps; must not wait for the device."""

    def compare(
        self, phase: Phase, first: int, *, planned: Any, observed: list[Observation]
    ) -> str:
        """What differs, in one line; a run in which anything does has failed."""


def train(
    program: Program,
    *,
    stop: Callable[[], bool] = lambda: False,
    watch: Watch | None = None,
) -> Iterator[TrainRecord | EvalRecord | Snapshot | Outcome]:
    """Runs a program to its end, early stop, first non-finite step, or `stop()`.

    Args:
        program: What to run.
        stop: Asked between calls; true ends the run as `interrupted`.
        watch: Compares the keys of a program with `rng.observe`.

    Yields:
        Records in the order of their steps; an `Outcome` last.
    """
    return _Loop(program, stop, watch).run()


class _Loop:
    """The calls under way, and what has been learned from those that are done."""

    def __init__(
        self, program: Program, stop: Callable[[], bool], watch: Watch | None
    ) -> None:
        self.program, self.stop = program, stop
        self.watch = watch if program.spec.rng.observe else None
        self.spec = program.spec
        self.train_data = _on_device(program.data.x_train, program.data.y_train)
        self.test_data = _on_device(program.data.x_test, program.data.y_test)
        self.pending: deque[_Call] = deque()
        self.pace = _Pace(program)
        self.best = _Best(program)
        self.failed: int | None = None
        self.difference = ""  # of keys from those that were planned
        self.reason = ""

    def run(self) -> Iterator[TrainRecord | EvalRecord | Snapshot | Outcome]:
        (state, self.keys, self.hypers), observed = self.program.start_observed()
        call = self.program.calls.train
        jax.block_until_ready(state)  # the clock is that of the steps alone
        planned = self._expect(Phase.INIT, 0)
        self._compare(Phase.INIT, 0, *jax.device_get((planned, [observed])))
        step, begun, steps = 0, time.perf_counter(), self.spec.train.steps
        while step < steps and not self.reason:
            count = min(self.pace.steps, self._next_boundary(step) - step)
            state = self._dispatch(call, state, step, count)
            step += count
            if self._is_due(self.spec.eval.every, step):
                planned = self._expect(Phase.EVAL, step)
                result = self._evaluate(state, step)
                self.pending.append(_Call(step, 0, planned, result))
            waits = self.spec.eval.patience is not None and self._is_due(
                self.spec.eval.every, step
            )
            yield from self._fetch(leave=0 if waits else 1)
            if self._saves(step) and not self.reason:
                yield from self._fetch(leave=0)
                if not self.reason:  # the fetch may have found a failure
                    yield Snapshot(step, state)
            if self.stop() and not self.reason:
                self.reason = _STOPPED
        yield from self._fetch(leave=0)
        yield self._outcome(state, step, time.perf_counter() - begun)

    def _dispatch(self, call: Any, state: State, step: int, count: int) -> State:
        numbers = self.program.order.indices(step, steps=count)
        padded = np.zeros((self.program.window, numbers.shape[1]), np.int32)
        padded[:count] = numbers
        window = jax.device_put(
            {"first": np.int32(step), "rows": padded, "steps": np.int32(count)}
        )
        planned = self._expect(Phase.TRAIN, step, steps=count)
        args = (window, self.train_data, self.keys, self.hypers)
        if self.program.construct is Construct.LOOP:
            state, rows, failed = call(state, *args)
        else:
            rows = []
            for _ in range(count):
                state, row, failed = call(state, *args)
                rows.append(row)
        self.pending.append(_Call(step, count, planned, (rows, failed)))
        return state

    def _evaluate(self, state: State, step: int) -> Any:
        rows, n = self.program.eval_rows, len(self.program.data.x_test)
        sums = dict.fromkeys(self.spec.task.metrics, np.float32(0))
        observed = []
        for part in range(self.program.eval_batches):
            at = np.arange(part * rows, (part + 1) * rows, dtype=np.int32)
            window = {
                "rows": np.minimum(at, n - 1),
                "weights": (at < n).astype(np.float32),
                "part": np.int32(part),
            }
            args = (state, window, self.test_data, self.keys, self.hypers)
            sums, keys = self.program.calls.evaluate(sums, *args)
            observed.append(keys)
        return sums, observed

    def _fetch(self, *, leave: int) -> Iterator[TrainRecord | EvalRecord]:
        """Records of all calls but the last `leave` ones."""
        while len(self.pending) > leave and self.failed is None:
            call = self.pending.popleft()
            planned, result = jax.device_get((call.planned, call.result))
            if call.steps:
                yield self._train_record(call, planned, *result)
            else:
                sums, observed = result
                self._compare(Phase.EVAL, call.step, planned, observed)
                yield self._eval_record(call, sums)

    def _train_record(
        self, call: "_Call", planned: Any, rows: Any, failed: Any
    ) -> TrainRecord:
        if isinstance(rows, list):
            rows = jax.tree.map(lambda *each: np.stack(each), *rows)
        metrics, observed = rows
        self.pace.done(call.steps)
        steps = call.steps
        if failed >= 0:
            self.failed, steps = int(failed), int(failed) - call.step + 1
            self.reason = f"loss or update not finite at step {self.failed}"
        taken = jax.tree.map(lambda row: row[:steps], observed)
        self._compare(Phase.TRAIN, call.step, planned, [taken])
        return TrainRecord(call.step, {k: v[:steps] for k, v in metrics.items()})

    def _eval_record(self, call: "_Call", sums: Any) -> EvalRecord:
        n = len(self.program.data.x_test)
        values = {name: float(np.float32(s / n)) for name, s in sums.items()}
        is_best = self.best.take(values, call.step)
        patience = self.spec.eval.patience
        if patience is not None and self.best.since >= patience:
            what = f"{self.best.metric} not better in {patience} evaluations"
            self.reason = f"early stop at step {call.step}: {what}"
        return EvalRecord(call.step, values, is_best)

    def _expect(self, phase: Phase, first: int, *, steps: int = 1) -> Any:
        return self.watch and self.watch.expect(phase, first, steps=steps)

    def _compare(
        self, phase: Phase, first: int, planned: Any, observed: list[Observation]
    ) -> None:
        if self.watch is None or self.difference:
            return
        self.difference = self.watch.compare(
            phase, first, planned=planned, observed=observed
        )
        self.reason = self.reason or self.difference

    def _outcome(self, state: State, step: int, seconds: float) -> Outcome:
        if self.failed is not None:
            status, step = "failed", self.failed
        elif self.difference:
            status = "failed"
        elif self.reason == _STOPPED:
            status = "interrupted"
        else:
            status = "completed"
        return Outcome(status, self.difference or self.reason, step, state, seconds)

    def _next_boundary(self, step: int) -> int:
        every = [self.spec.eval.every, self.spec.checkpoint.every]
        ends = [step - step % n + n for n in every if n is not None]
        return min([*ends, self.spec.train.steps])

    def _is_due(self, every: int | None, step: int) -> bool:
        return step == self.spec.train.steps or (every is not None and not step % every)

    def _saves(self, step: int) -> bool:
        every = self.spec.checkpoint.every
        return every is not None and not step % every and step < self.spec.train.steps


@dataclass(frozen=True)
class _Call:
    """A call under way: `steps` train steps from `step` on, or (0) an evaluation."""

    step: int
    steps: int
    planned: Any
    result: Any


class _Best:
    """The best value of the objective so far."""

    def __init__(self, program: Program) -> None:
        self.metric = program.spec.objective
        self.sign = 1 if program.spec.task.metrics[self.metric] == "max" else -1
        self.min_delta = program.spec.eval.min_delta
        self.value: float | None = None
        self.since = 0  # evaluations since the last one that was better

    def take(self, values: dict[str, float], step: int) -> bool:
        value = values[self.metric]
        gain = None if self.value is None else self.sign * (value - self.value)
        if not np.isnan(value) and (gain is None or gain > self.min_delta):
            self.value, self.since = value, 0
            return True
        self.since += 1
        return False


class _Pace:
    """How many steps to put into a call: as given, or as many as take 0.2 s."""

    def __init__(self, program: Program) -> None:
        per_call = program.spec.train.steps_per_call
        self.most, self.fixed = program.window, per_call != "auto"
        self.steps = self.most if self.fixed else min(_FIRST_STEPS, self.most)
        self.last: float | None = None

    def done(self, steps: int) -> None:
        now = time.perf_counter()
        seconds, self.last = now - (self.last or now), now
        if not self.fixed and seconds:
            wanted = int(steps * _SECONDS_PER_CALL / max(seconds, 1e-6))
            self.steps = max(1, min(wanted, 4 * self.steps, self.most))


def _on_device(x: np.ndarray, y: np.ndarray) -> Batch:
    return Batch(jax.device_put(x), jax.device_put(y))
