# SPDX-License-Identifier: Apache-2.0
"""The loop: calls the compiled program and yields records; it writes nothing.

One call is always queued behind the one that runs, so the device never waits for
Python. Metrics are fetched when the next call is already on its way.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import numpy as np

from runner.course import BEGINNING, Batches, Best, Pace, Saves, Start
from runner.fingerprint import spell_fingerprint
from runner.observe.observe import Observation
from runner.program import Construct, Program
from runner.records.events import EvalRecord, StateRecord, TrainRecord
from runner.spec import Phase
from runner.step import State

__all__ = ["Outcome", "Snapshot", "Watch", "train"]

_MOST_IN_FLIGHT = 8  # calls; 20 at once were well, 50 were not

Record = TrainRecord | EvalRecord | StateRecord


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
    start: Start = BEGINNING,
    stop: Callable[[], str] = lambda: "",
    watch: Watch | None = None,
    share: Callable[[Any], Any] = lambda value: value,
) -> Iterator[Record | Snapshot | Outcome]:
    """Runs a program to its end, early stop, first non-finite step, or `stop()`.

    Args:
        program: What to run.
        start: Where to begin.
        stop: Asked between calls; a reason ends the run as `interrupted`.
        watch: Compares the keys of a program with `rng.observe`.
        share: Gives the value that process 0 has, where several run the program.

    Yields:
        Records in the order of their steps; an `Outcome` last.
    """
    return _Loop(program, start, stop, watch, share).run()


class _Loop:
    """The calls under way, and what has been learned from those that are done."""

    def __init__(
        self,
        program: Program,
        start: Start,
        stop: Callable[[], str],
        watch: Watch | None,
        share: Callable[[Any], Any],
    ) -> None:
        self.program, self.start, self.stop = program, start, stop
        self.share = share
        self.watch = watch if program.spec.rng.observe else None
        self.spec = program.spec
        self.train_data, self.test_data = program.place_data()
        self.pending: deque[_Call] = deque()
        self.in_flight = 0
        self.pace = Pace(most=program.window, fixed=not program.is_paced)
        self.steps_per_call = self.pace.steps
        self.batches = Batches(program.order, start)
        self.best = Best(program.spec, start)
        self.saves = Saves(program.spec)
        self.failed: int | None = None
        self.difference = ""  # of keys from those that were planned
        self.stopped = False
        self.reason = self.best.stop_early()

    def run(self) -> Iterator[Record | Snapshot | Outcome]:
        state, step = self._begin(), self.start.step
        call = self.program.calls.train
        begun, steps = time.perf_counter(), self.spec.train.steps
        while step < steps and not self.reason:
            before = len(self.pending)
            count = min(self.steps_per_call, self._next_boundary(step) - step)
            state = self._dispatch(call, state, step, count)
            step += count
            evaluates = self._is_due(self.spec.eval.every, step)
            if evaluates:
                self._evaluate(state, step)
            if self._is_due(self.spec.checkpoint.digest_every, step):
                self._digest(state, step)
            waits = evaluates and self.saves.waits
            yield from self._fetch(leave=0 if waits else len(self.pending) - before)
            is_best = waits and self.best.since == 0
            saves = step < steps and self.saves.is_due(step, best=is_best)
            saves, stop = self._settle(saves)
            if saves:
                yield from self._fetch(leave=0)
                if not self.reason:  # the fetch may have found a failure
                    yield Snapshot(step, state)
            if stop and not self.reason:
                self.reason, self.stopped = stop, True
        yield from self._fetch(leave=0)
        yield self._outcome(state, step, time.perf_counter() - begun)

    def _settle(self, saves: bool) -> tuple[bool, str]:
        """What a clock or a signal decides: it must be one thing in all processes."""
        mine = [saves, self.stop(), self.pace.steps, self.reason]
        saves, stop, self.steps_per_call, self.reason = self.share(mine)
        return saves, stop

    def _begin(self) -> State:
        (state, self.keys, self.hypers), observed = self.program.start_observed()
        if self.start.kept is not None:
            at = self.start.step
            state = self.program.go_on(state, step=at, kept=self.start.kept)
        jax.block_until_ready(state)  # the clock is that of the steps alone
        planned = self._expect(Phase.INIT, 0)
        self._compare(Phase.INIT, 0, *jax.device_get((planned, [observed])))
        return state

    def _dispatch(self, call: Any, state: State, step: int, count: int) -> State:
        numbers = self.program.order.indices(step, steps=count)
        self.batches.take(numbers)
        padded = np.zeros((self.program.window, numbers.shape[1]), np.int32)
        padded[:count] = numbers
        layout = self.program.layout
        window = layout.place({"first": np.int32(step), "steps": np.int32(count)})
        window["rows"] = layout.put(padded, layout.columns)
        planned = self._expect(Phase.TRAIN, step, steps=count)
        args = (window, self.train_data, self.keys, self.hypers)
        if self.program.construct is Construct.LOOP:
            state, rows, failed = call(state, *args)
        else:
            rows = []
            for _ in range(count):
                state, row, failed = call(state, *args)
                rows.append(row)
                self._breathe(failed)
        take = partial(self._train_record, step, count)
        self.pending.append(_Call(planned, (rows, failed), take))
        return state

    def _breathe(self, last: Any) -> None:
        """Waits, now and then, where too many calls in flight stop each other.

        On CPU a collective of each of them holds a thread while it waits for other
        processes, which may have begun with another call.
        """
        self.in_flight += 1
        if self.in_flight % _MOST_IN_FLIGHT == 0 and self.program.layout.crowds:
            jax.block_until_ready(last)

    def _digest(self, state: State, step: int) -> None:
        def take(_: Any, words: Any) -> StateRecord:
            return StateRecord(step, batches, spell_fingerprint(words))

        batches = self.batches.say()
        self.pending.append(_Call(None, self.program.calls.digest(state), take))

    def _evaluate(self, state: State, step: int) -> None:
        planned = self._expect(Phase.EVAL, step)
        sums: dict[str, Any] = {}
        observed: list[Any] = []
        for name, rows in self.program.eval_sets.items():
            zeros = dict.fromkeys(self.spec.task.metrics, np.float32(0))
            sums[name] = self.program.layout.place(zeros)
            for first in rows[:: self.program.eval_rows]:
                at = np.arange(first, first + self.program.eval_rows, dtype=np.int32)
                window = {
                    "rows": np.minimum(at, rows[-1]),
                    "weights": (at <= rows[-1]).astype(np.float32),
                    "part": np.int32(len(observed)),
                }
                window = self.program.layout.place(window)
                args = (state, window, self.test_data, self.keys, self.hypers)
                sums[name], keys = self.program.calls.evaluate(sums[name], *args)
                observed.append(keys)
                self._breathe(sums[name])
        take = partial(self._eval_record, step)
        self.pending.append(_Call(planned, (sums, observed), take))

    def _fetch(self, *, leave: int) -> Iterator[Record]:
        """Records of all calls but the last `leave` ones."""
        while len(self.pending) > leave and self.failed is None:
            call = self.pending.popleft()
            yield call.take(*jax.device_get((call.planned, call.result)))

    def _train_record(
        self, step: int, steps: int, planned: Any, result: Any
    ) -> TrainRecord:
        rows, failed = result
        if isinstance(rows, list):
            rows = jax.tree.map(lambda *each: np.stack(each), *rows)
        metrics, observed = rows
        self.pace.done(steps)
        if failed >= 0:
            self.failed, steps = int(failed), int(failed) - step + 1
            self.reason = f"loss or update not finite at step {self.failed}"
        taken = jax.tree.map(lambda row: row[:steps], observed)
        self._compare(Phase.TRAIN, step, planned, [taken])
        return TrainRecord(step, {k: v[:steps] for k, v in metrics.items()})

    def _eval_record(self, step: int, planned: Any, result: Any) -> EvalRecord:
        sums, observed = result
        self._compare(Phase.EVAL, step, planned, observed)
        sets = self.program.eval_sets
        values = {
            f"{of}{name}": float(np.float32(s / len(sets[of])))
            for of, each in sums.items()
            for name, s in each.items()
        }
        is_best = self.best.take(values, step)
        self.reason = self.reason or self.best.stop_early()
        return EvalRecord(step, values, is_best)

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
        elif self.stopped:
            status = "interrupted"
        else:
            status = "completed"
        return Outcome(status, self.difference or self.reason, step, state, seconds)

    def _next_boundary(self, step: int) -> int:
        checkpoint = self.spec.checkpoint
        every = [self.spec.eval.every, checkpoint.every, checkpoint.digest_every]
        ends = [step - step % n + n for n in every if isinstance(n, int)]
        return min([*ends, self.spec.train.steps])

    def _is_due(self, every: int | None, step: int) -> bool:
        return step == self.spec.train.steps or (every is not None and not step % every)


@dataclass(frozen=True)
class _Call:
    """A call under way, and what makes a record of (planned, result)."""

    planned: Any
    result: Any
    take: Callable[[Any, Any], Record]
