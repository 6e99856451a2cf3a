# SPDX-License-Identifier: Apache-2.0
"""Watches one process of a run, and tells the others how it fares.

What one process says goes through its supervisor to supervisor 0, and from there to
all. The first fault is everyone's: each supervisor says it in one line, and ends its
own process if that does not end by itself.
"""

import contextlib
import os
import select
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from runner.processes.rendezvous import Company
from runner.processes.wire import Wire, WireError

__all__ = ["Fault", "Supervisor"]

_PATIENCE = 5.0  # seconds that a process has for its record after a fault
_FAREWELL = 15.0  # seconds that others have to end after this one
_ANSWER = 60.0  # seconds in which a call must end, so that the run is asked to stop
_BEAT = 1.0  # seconds between two signs of life
_BUSY = 3  # times as long may a process itself be silent: it computes
_INTERRUPTED = 130


@dataclass(frozen=True)
class Fault:
    """Why all end.

    Args:
        process: Whose fault it is.
        line: What it says itself; or, of a process that could not, what became of it.
        code: Exit code of all.
        is_said: Whether it says so itself.
    """

    process: int
    line: str
    code: int
    is_said: bool


class Supervisor:
    """The loop around one process.

    Args:
        company: The processes.
        child: Process id of the one that is watched.
        wire: To it.
        words: File that its libraries write to, until there is a run directory.
        heartbeat: Seconds of silence after which another process is lost.
    """

    def __init__(
        self,
        company: Company,
        *,
        child: int,
        wire: Wire,
        words: Path,
        heartbeat: float,
    ) -> None:
        self.company, self.index = company, company.place.index
        self.child, self.wire, self.heartbeat = child, wire, heartbeat
        self.words = words
        self.asked = False  # to stop
        self.stops: float | None = None  # when it must have begun to
        self.wires = dict(company.wires)  # to those that still run
        self.heard = dict.fromkeys((self.index, *self.wires), time.monotonic())
        self.fault: Fault | None = None
        self.ends: float | None = None  # when patience is over
        self.code: int | None = None  # of the process, when it has ended
        self.ended = False
        self.directory: Path | None = None  # of the run, once it trains
        self.arrived: set[int] = set()  # of those that meet
        self.signals: list[int] = []
        self.heeded = 0  # of the signals

    def run(self) -> int:
        """Returns the exit code when the process and, for 0, all others have ended."""
        for number in (signal.SIGINT, signal.SIGTERM):
            # Noted alone: it may come in the middle of a message that is being sent.
            signal.signal(number, lambda got, _: self.signals.append(got))
        beat = time.monotonic()
        while not self._is_over():
            self._listen(_BEAT / 4)
            self._heed_signals()
            self._look_after_child()
            since = time.monotonic() - beat
            if since >= _BEAT:
                beat = time.monotonic()
                self._tell({"beat": 1})
                self._tell_child({"beat": 1})
                self._miss_the_silent(slept=since > _BEAT + self.heartbeat / 2)
        if self.fault is not None:
            return self.fault.code
        assert self.code is not None
        return self.code if self.code >= 0 else 128 - self.code

    def _is_over(self) -> bool:
        if self.code is None:
            return False
        alone = not self.wires or self.index > 0
        return alone or (self.ends is not None and time.monotonic() > self.ends)

    def _listen(self, seconds: float) -> None:
        mine = [self.wire] if self.code is None else []
        ready, _, _ = select.select([*mine, *self.wires.values()], [], [], seconds)
        if self.wire in ready:
            self._hear_child()
        for index, wire in list(self.wires.items()):
            if wire in ready:
                self._hear(index, wire)

    def _hear_child(self) -> None:
        try:
            self.wire.read()
        except WireError:  # it has ended, or is about to
            time.sleep(_BEAT / 100)
        self.heard[self.index] = time.monotonic()
        for message in self.wire.take():
            self._take(self.index, message)

    def _hear(self, index: int, wire: Wire) -> None:
        try:
            wire.read()
        except WireError as error:
            if self.ended:
                self.wires.pop(index)
            else:
                self._lose(index, f"was lost ({error}): killed, or its host is down")
            return
        self.heard[index] = time.monotonic()
        for message in wire.take():
            self._take(index, message)

    def _take(self, index: int, message: Mapping[str, Any]) -> None:
        """What process `index` says, or process 0 for any."""
        if "beat" in message:
            return
        if "fault" in message:
            self._declare(Fault(**message["fault"]))
        elif "training" in message and index == self.index:
            self.directory = Path(message["training"])
            self.words = self.directory / "processes" / f"{self.index}.log"
        elif "stopping" in message:
            self.stops = None
        elif "ended" in message:
            self._take_end(index)
        elif self.index == 0:
            self._take_as_first(index, message)
        elif index == 0:  # of process 0, for this one
            self._tell_child(message)
        else:  # of this one, for process 0
            self._send(0, message)

    def _take_end(self, index: int) -> None:
        if index == self.index:
            self.ended = True
            self._tell({"ended": 1})
            return
        self.wires.pop(index).close()
        if index == 0 and self.ends is None:  # nothing more can come of this one
            self.ends = time.monotonic() + _FAREWELL

    def _take_as_first(self, index: int, message: Mapping[str, Any]) -> None:
        if "value" in message:
            self._tell(message)
        elif "arrived" in message:
            self.arrived.add(index)
            if len(self.arrived) == self.company.place.count:
                self.arrived.clear()
                self._tell({"go": 1})
                self._tell_child({"go": 1})
        elif "stop" in message:
            self._stop(message)

    def _look_after_child(self) -> None:
        if self.code is not None:
            return
        if self.ends is not None and time.monotonic() > self.ends:
            os.kill(self.child, signal.SIGKILL)
        done, status = os.waitpid(self.child, os.WNOHANG)
        if not done:
            return
        self.code = os.waitstatus_to_exitcode(status)
        with contextlib.suppress(WireError):  # its last words
            while True:
                self.wire.read(0.01)
        for message in self.wire.take():
            self._take(self.index, message)
        if self.fault is None and not self.ended:
            self._lose(self.index, self._say_code(self.code))
        if self.ends is None:
            self.ends = time.monotonic() + _FAREWELL

    def _say_code(self, code: int) -> str:
        if self.signals:
            return f"was stopped ({signal.Signals(self.signals[0]).name})"
        if code >= 0:
            return f"ended with code {code}"
        name = signal.Signals(-code).name
        return f"was killed by {name} (code {128 - code}); see {self.words}"

    def _lose(self, index: int, what: str) -> None:
        self.wires.pop(index, None)
        code = _INTERRUPTED if self.signals else 1
        self._declare(Fault(index, what, code, is_said=False))

    def _declare(self, fault: Fault) -> None:
        """The first fault holds; it is passed on to everyone once.

        What this process says itself in the same words is no one else's.
        """
        if self.fault is not None:
            if fault == replace(self.fault, process=self.index):
                self.fault = fault
            return
        self.fault = fault
        self.ends = time.monotonic() + _PATIENCE
        self._tell({"fault": vars(fault)})
        self._tell_child({"fault": {**vars(fault), "line": self.say(fault)}})

    def say(self, fault: Fault) -> str:
        """The fault in one line."""
        name = self.company.names[fault.process]
        if not fault.is_said:
            return f"{name} {fault.line}"
        return fault.line if fault.process == self.index else f"{name}: {fault.line}"

    def _miss_the_silent(self, *, slept: bool) -> None:
        """Those that can't be alive; not if it was this one that did not listen."""
        now = time.monotonic()
        if slept:
            self.heard = dict.fromkeys(self.heard, now)
        limits = dict.fromkeys(self.wires, self.heartbeat)
        if self.code is None:
            limits[self.index] = _BUSY * self.heartbeat
        if self.stops is not None and now > self.stops and self.code is None:
            self._lose(self.index, f"did not stop within {_ANSWER:g} s")
        for index, limit in limits.items():
            if now - self.heard[index] > limit:
                self._lose(index, f"was not heard of for {limit:g} s")

    def _heed_signals(self) -> None:
        """The first one asks the run to stop, where it can; the second one ends it."""
        before, self.heeded = self.heeded, len(self.signals)
        if self.heeded == before or self.code is not None:
            return
        if self.heeded > 1 or self.directory is None:
            os.kill(self.child, signal.SIGKILL)
            return
        name = signal.Signals(self.signals[0]).name
        message = {
            "stop": f"{self.company.names[self.index]} was told to stop ({name})"
        }
        if self.index:
            self._send(0, message)
        else:
            self._stop(message)

    def _stop(self, message: Mapping[str, Any]) -> None:
        if not self.asked:  # it answers once
            self.asked, self.stops = True, time.monotonic() + _ANSWER
        self._tell_child(message)

    def _tell(self, message: Mapping[str, Any]) -> None:
        for index in list(self.wires):
            self._send(index, message)

    def _send(self, index: int, message: Mapping[str, Any]) -> None:
        with contextlib.suppress(WireError, KeyError):  # reading finds out
            self.wires[index].send(**message)

    def _tell_child(self, message: Mapping[str, Any]) -> None:
        with contextlib.suppress(WireError):
            self.wire.send(**message)
