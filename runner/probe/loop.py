# SPDX-License-Identifier: Apache-2.0
"""Runs a probe: its updates one by one, then the call whose output is kept."""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from runner.keys import rng_flags
from runner.ledger import expand, first_step, rng_of
from runner.loop import Outcome, Snapshot, Watch
from runner.probe.probe import Probe
from runner.records.events import (
    EvalRecord,
    KeyRow,
    Outputs,
    StateRecord,
    TrainRecord,
)
from runner.spec import Phase
from runner.step import State

__all__ = ["Event", "key_rows", "run_probe"]

Event = TrainRecord | EvalRecord | StateRecord | Snapshot | Outputs | Outcome

_KEYS_SHOWN = 40


def run_probe(
    probe: Probe,
    *,
    stop: Callable[[], str] = lambda: "",
    watch: Watch | None = None,
) -> Iterator[Event]:
    """Runs a probe to its end, its first non-finite step, or `stop()`.

    Args:
        probe: What to run.
        stop: Asked between updates; a reason ends the run as `interrupted`.
        watch: Compares the keys of a probe with `rng.observe`.

    Yields:
        Records in the order of their steps, then `Outputs`; an `Outcome` last.
    """
    return _Loop(probe, stop, watch).run()


class _Loop:
    """The calls one after the other, and what has been learned from them."""

    def __init__(
        self, probe: Probe, stop: Callable[[], str], watch: Watch | None
    ) -> None:
        self.probe, self.stop, self.watch = probe, stop, watch
        self.losses = _Losses()
        self.reason = self.difference = self.stopped = ""

    def run(self) -> Iterator[Event]:
        (state, self.batch, self.keys), observed = self.probe.start()
        self._compare(Phase.INIT, 0, observed)
        jax.block_until_ready(state)
        step, begun, every = 0, time.perf_counter(), self.probe.spec.checkpoint.every
        while step < self.probe.steps and not self.reason:
            state, metrics = self._update(state, step)
            yield self.losses.take(step, metrics)
            if state.failed >= 0:
                self._end(f"loss or update not finite at step {step}")
                break
            step += 1
            if _is_due(self.probe.spec.eval.every, step) and step < self.probe.steps:
                yield self.losses.take_eval(step, self._call(state, step)[1])
            if _is_due(every, step) and step < self.probe.steps:
                yield Snapshot(step, state)
            self._ask_to_stop()
        outputs, loss = self._call(state, step)
        if loss is not None and state.failed < 0:
            yield self.losses.take_eval(step, loss)
        variables = {"params": state.params, **state.collections}
        named = {**_named("variables", variables), **_named("output", outputs)}
        yield Outputs({**named, **self.losses.arrays()})
        yield self._outcome(state, step, time.perf_counter() - begun)

    def _ask_to_stop(self) -> None:
        if not self.reason:
            self.reason = self.stopped = self.stop()

    def _update(self, state: State, step: int) -> tuple[State, Any]:
        update = self.probe.calls.update
        assert update is not None  # there are steps
        (state, metrics), observed = update(state, self.batch, self.keys)
        self._compare(Phase.TRAIN, step, observed)
        return state, jax.device_get(metrics)

    def _call(self, state: State, step: int) -> tuple[Any, Any]:
        result, observed = self.probe.calls.call(state, self.batch, self.keys)
        self._compare(self.probe.phase, step, observed)
        return result

    def _compare(self, phase: Phase, step: int, observed: Any) -> None:
        if self.watch is None or self.difference:
            return
        planned, found = jax.device_get((self.watch.expect(phase, step), observed))
        self.difference = self.watch.compare(
            phase, step, planned=planned, observed=[found]
        )
        self._end(self.difference)

    def _end(self, reason: str) -> None:
        self.reason = self.reason or reason

    def _outcome(self, state: State, step: int, seconds: float) -> Outcome:
        status = "failed" if self.reason else "completed"
        if self.stopped and not self.difference:
            status = "interrupted"
        reason = self.difference or self.reason
        return Outcome(status, reason, step, state, seconds)


class _Losses:
    """The losses so far, as records and as arrays."""

    def __init__(self) -> None:
        self._seen: dict[str, list[Any]] = {}

    def take(self, step: int, metrics: Mapping[str, Any]) -> TrainRecord:
        self._seen.setdefault("train/loss", []).append(metrics["loss"])
        return TrainRecord(step, {k: np.asarray(v)[None] for k, v in metrics.items()})

    def take_eval(self, step: int, loss: Any) -> EvalRecord:
        seen = self._seen.setdefault("eval/loss", [])
        seen.append(np.asarray(loss))
        best = bool(seen[-1] == min(seen))
        return EvalRecord(step, {"loss": float(seen[-1])}, best=best)

    def arrays(self) -> dict[str, np.ndarray]:
        return {name: np.stack(values) for name, values in self._seen.items()}


def _is_due(every: int | str | None, step: int) -> bool:
    return isinstance(every, int) and step % every == 0


def _named(prefix: str, tree: Any) -> dict[str, np.ndarray]:
    """Leaves by their paths; a key as its words, bfloat16 as float32."""
    named = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        array = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
        is_plain = array.dtype.kind in "biufc"
        named["/".join(filter(None, (prefix, name)))] = (
            array if is_plain else array.astype(np.float32)
        )
    return named


def key_rows(ledger: Mapping[str, Any]) -> tuple[KeyRow, ...]:
    """Every key of a probe at the first step of its phase; of many, the first ones."""
    with rng_flags(rng_of(ledger)):
        entries = (
            entry
            for draw in ledger["draws"]
            for entry in expand(ledger, draw, step=first_step(ledger, draw))
        )
        shown = tuple(map(_key_row, itertools.islice(entries, _KEYS_SHOWN)))
    every = sum(math.prod(draw["axes"].values()) for draw in ledger["draws"])
    more = every - len(shown)
    if more <= 0:
        return shown
    rest = KeyRow("", "", "", "", "", "", f"and {more:,} more: runner keys RUN", "")
    return (*shown, rest)


def _key_row(entry: Mapping[str, Any]) -> KeyRow:
    words = entry["key"] or []
    return KeyRow(
        phase=entry["phase"],
        step="" if entry["step"] is None else str(entry["step"]),
        stream=entry["stream"] or "(none)",
        path="/".join(entry["path"]) or "(root)",
        call="" if entry["call"] is None else str(entry["call"]),
        index=", ".join(f"{name} {i}" for name, i in entry["index"].items()),
        key=" ".join(f"{word:08x}" for word in words) or "not known",
        draws=", ".join(f"{u['primitive']} {u['shape']}" for u in entry["uses"]),
    )
