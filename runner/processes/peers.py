# SPDX-License-Identifier: Apache-2.0
"""What a process of a run knows of the others, and settles with them.

    share(value)     process 0's value, in all of them
    meet()           returns when all have come here
    stop_reason()    why one of them was told to stop

All of them run one program and call these in one order. A fault of any ends all: what
waits here raises it, and what waits elsewhere is ended.
"""

import contextlib
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from runner.errors import RunFailedError
from runner.processes.wire import Wire, WireError

__all__ = ["ALONE", "PeerLostError", "Peers", "enter", "peers"]

_GRACE = 1.0  # seconds in which the main thread may find out by itself
T = TypeVar("T")


class PeerLostError(RunFailedError):
    """Another process of the run has failed; the line says which, and why."""

    def __init__(self, text: str, code: int) -> None:
        self.exit_code = code
        super().__init__(text)


class Peers:
    """A run in one process: what is shared is one's own, and nobody is waited for."""

    index = 0
    count = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes the record and speaks to the user."""
        return self.index == 0

    def share(self, value: T) -> T:
        """The value that process 0 has; plain data as JSON knows it."""
        return value

    def meet(self) -> None:
        """Waits until every process is here."""

    def stop_reason(self) -> str:
        """Why the run is to stop; empty while it is to go on."""
        return ""

    def begin(self, directory: Path) -> None:
        """From here on a signal asks the run to stop, and does not end it."""

    def end(self) -> None:
        """The run has ended as all processes know; what follows is no one's fault."""

    def fail(self, line: str, code: int) -> None:
        """Ends all processes; does nothing where this is the only one, or the last."""

    @contextlib.contextmanager
    def closing(self, close: Callable[[str], None]) -> Iterator[None]:
        """Calls `close(line)` where a fault of another ends this process within."""
        yield


ALONE = Peers()
_entered: list[Peers] = []


def peers() -> Peers:
    """The processes of this run; `ALONE` where this is the only one."""
    return _entered[-1] if _entered else ALONE


def enter(company: Peers) -> None:
    """Makes this process one of several, for good."""
    _entered.append(company)


class Connected(Peers):
    """One process of several, through its supervisor.

    Args:
        wire: To the supervisor.
        index: Number of this process.
        count: Number of processes.
        words: File that the libraries of this process write to, until a run begins.
    """

    def __init__(self, wire: Wire, *, index: int, count: int, words: Path) -> None:
        self.index, self.count = index, count
        self._wire, self._words = wire, words
        self._values: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._gone: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._stop, self._fault = "", None  # type: str, PeerLostError | None
        self._close: Callable[[str], None] | None = None
        self._ended = self._stopping = False
        self._lock = threading.Lock()  # one thread closes the record
        threading.Thread(target=self._hear, name="peers", daemon=True).start()

    def share(self, value: T) -> T:
        if self.leads:
            self._raise()
            self._send(value=value)
            return value
        return self._await(self._values)

    def meet(self) -> None:
        self._raise()
        self._send(arrived=1)
        self._await(self._gone)

    def stop_reason(self) -> str:
        if self._stop and not self._stopping:
            self._stopping = True
            self._send(stopping=1)
        return self._stop

    def begin(self, directory: Path) -> None:
        folder = directory / "processes"
        folder.mkdir(exist_ok=True)
        file = folder / f"{self.index}.log"
        with file.open("ab") as log:
            log.write(self._words.read_bytes())
            for number in (1, 2):
                os.dup2(log.fileno(), number)
        self._send(training=str(directory.resolve()))

    def end(self) -> None:
        import jax

        if self._ended:
            return
        self.meet()  # JAX gives the others 15 s to come; the record may take longer
        jax.distributed.shutdown()
        self._send(ended=1)
        self._ended = True

    def fail(self, line: str, code: int) -> None:
        """Tells all, and ends this process: JAX would wait for the others at its exit.

        Where the fault is another's already, that one holds.
        """
        if self._ended:
            return
        fault = {"process": self.index, "line": line, "code": code, "is_said": True}
        with contextlib.suppress(OSError, RunFailedError):
            self._send(fault=fault)
        _leave(code)

    @contextlib.contextmanager
    def closing(self, close: Callable[[str], None]) -> Iterator[None]:
        self._close = close
        try:
            yield
        except PeerLostError:
            raise
        except Exception as error:
            # A computation fails, too, when a process that shares it is lost.
            lost = self._wait_for_fault(_GRACE)
            if lost is None:
                raise
            raise lost from error
        finally:
            with self._lock:
                self._close = None

    def _hear(self) -> None:
        while True:
            try:
                message = self._wire.receive()
            except WireError:  # the supervisor was killed
                os._exit(1)
            if "beat" in message:
                self._answer()
            elif "value" in message:
                self._values.put(message["value"])
            elif "go" in message:
                self._gone.put(None)
            elif "stop" in message:
                self._stop = self._stop or message["stop"]
            elif "fault" in message:
                self._end_by(message["fault"])

    def _answer(self) -> None:
        with contextlib.suppress(RunFailedError):
            self._send(beat=1)

    def _end_by(self, fault: dict[str, Any]) -> None:
        self._fault = PeerLostError(fault["line"], fault["code"])
        for each in (self._values, self._gone):
            each.put(self._fault)
        if fault["process"] == self.index:
            return  # our own words come back
        threading.Event().wait(_GRACE)
        with self._lock:
            if self._close is None:  # the main thread knows, or has no record to close
                return
            self._close(fault["line"])
        _leave(fault["code"])

    def _await(self, answers: "queue.SimpleQueue[Any]") -> Any:
        answer = answers.get()
        if isinstance(answer, PeerLostError):
            answers.put(answer)
            raise answer
        return answer

    def _wait_for_fault(self, seconds: float) -> PeerLostError | None:
        end = threading.Event()
        for _ in range(10):
            if self._fault is not None:
                break
            end.wait(seconds / 10)
        return self._fault

    def _raise(self) -> None:
        if self._fault is not None:
            raise self._fault

    def _send(self, **message: Any) -> None:
        try:
            self._wire.send(**message)
        except WireError as error:
            raise RunFailedError(f"its supervisor is gone ({error})") from error


def _leave(code: int) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
