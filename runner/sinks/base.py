# SPDX-License-Identifier: Apache-2.0
"""The sink protocol, and the fan-out that no mirror can bring down.

`metrics.jsonl` is the record: when it can't be written, the run ends. All else
mirrors it: a mirror that fails is dropped with one warning, and the run goes on.
"""

import logging
from collections.abc import Callable
from typing import Protocol

from runner.records.events import (
    EvalRecord,
    RunEnd,
    RunStart,
    StateRecord,
    TrainRecord,
)
from runner.records.metrics import Written
from runner.sinks.jsonl import JsonlSink
from runner.spec import SinksSpec

__all__ = ["Sink", "Sinks", "make_sinks"]

_log = logging.getLogger("runner")


class Sink(Protocol):
    """Takes what a run says: `start` once, `write` often, `finish` once."""

    def start(self, run: RunStart) -> None:
        """Opens what is needed; the run directory exists."""

    def write(self, record: TrainRecord | EvalRecord) -> None:
        """Takes a record; records come in the order of their steps."""

    def finish(self, end: RunEnd) -> None:
        """Writes what is left and closes; also after a failure."""


class Sinks:
    """One sink that hands everything to the record first, then to its mirrors.

    Args:
        record: The sink whose errors are the caller's.
        mirrors: The others, by their name under `sinks` in the config.
    """

    def __init__(self, record: JsonlSink, mirrors: dict[str, Sink]) -> None:
        self._record, self._mirrors = record, mirrors
        self._started = False

    def start(self, run: RunStart) -> None:
        """Opens all.

        Raises:
            RecordError: the record can't be opened; no mirror is, then.
        """
        self._record.start(run)
        self._started = True
        self._each(lambda sink: sink.start(run))

    def write(self, record: TrainRecord | EvalRecord | StateRecord) -> None:
        """Hands on a record; digests of the state are for the record alone.

        Raises:
            RecordError: the record can't be written.
        """
        self._record.write(record)
        if isinstance(record, StateRecord):
            return
        self._each(lambda sink: sink.write(record))

    def sync(self) -> dict[str, Written]:
        """What the files of the record hold, when the disk has it.

        Raises:
            RecordError: the disk does not take it.
        """
        return self._record.sync()

    def finish(self, end: RunEnd) -> None:
        """Closes all; call it whatever happened, it gives the terminal back.

        Raises:
            RecordError: the record is not on the disk; the mirrors are closed.
        """
        if not self._started:
            return
        try:
            self._record.finish(end)
        finally:
            self._each(lambda sink: sink.finish(end))

    def _each(self, call: Callable[[Sink], None]) -> None:
        for name, sink in list(self._mirrors.items()):
            try:
                call(sink)
            except Exception as error:  # anything: it is not worth a run
                del self._mirrors[name]
                what = " ".join(f"{type(error).__name__}: {error}".split())
                _log.warning("sinks.%s: dropped, the run goes on (%s)", name, what)


def make_sinks(spec: SinksSpec) -> Sinks:
    """The record, and the mirrors that the config asks for.

    Raises:
        ConfigError: a mirror needs what is not installed.
    """
    from runner.sinks.tensorboard import make_tensorboard_sink
    from runner.sinks.terminal import LogSink, make_terminal_sink
    from runner.sinks.wandb import make_wandb_sink

    mirrors: dict[str, Sink | None] = {
        "log": LogSink(),
        "terminal": make_terminal_sink(spec.terminal),
        "tensorboard": make_tensorboard_sink(spec.tensorboard),
        "wandb": make_wandb_sink(spec.wandb),
    }
    return Sinks(JsonlSink(), {k: v for k, v in mirrors.items() if v is not None})
