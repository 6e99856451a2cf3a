# SPDX-License-Identifier: Apache-2.0
"""A child process that mirrors runs elsewhere, fed without ever waiting for it.

One JSON object a line goes over a socket that does not block: what the child does
not take yet stays in a buffer here, until the next call.
"""

import atexit
import json
import logging
import select
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

__all__ = ["Mirror", "MirrorError"]

_CHILD = Path(__file__).with_name("_wandb_child.py")
_BUFFER_LIMIT = 64 * 2**20  # bytes
_SLICE = 0.1  # seconds
_log = logging.getLogger("runner")


class MirrorError(Exception):
    """The child failed a run, ended, or does not keep up."""


class Mirror:
    """The child, and the near end of the socket; for several threads, too."""

    _shared: ClassVar["Mirror | None"] = None
    _lock: ClassVar[threading.RLock] = threading.RLock()

    @classmethod
    def shared(cls) -> "Mirror":
        """The child of this process; a new one where there is none that lives."""
        with cls._lock:
            if cls._shared is None or cls._shared._end is not None:
                cls._shared = cls()
            return cls._shared

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._child = subprocess.Popen(
                [sys.executable, "-P", str(_CHILD), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is the trainer's; rows are kept
            )
        self._socket.setblocking(False)
        self._out, self._in = bytearray(), bytearray()
        self._done: dict[str, str | None] = {}  # run to error
        self._end: str | None = None  # why there is no child any more
        atexit.register(self.close)

    def send(self, run_id: str, verb: str, content: Any) -> None:
        """Queues a message and moves what the socket takes.

        Raises:
            MirrorError: this run failed, or the child did.
        """
        line = json.dumps([run_id, verb, content], default=str).encode() + b"\n"
        with self._lock:
            if len(self._out) > _BUFFER_LIMIT:
                self._stop("does not take what it is sent")
            self._out += line
            self._move()
            self._check(run_id)

    def wait(self, run_id: str, *, seconds: float) -> None:
        """Waits until the child has finished a run; stops a child that does not.

        Raises:
            MirrorError: it failed, or took longer.
        """
        deadline = time.monotonic() + seconds
        while True:
            with self._lock:
                self._move()
                if run_id in self._done or self._end is not None:
                    return self._check(run_id)
                left = deadline - time.monotonic()
                if left <= 0:
                    self._stop(f"was not done within {seconds:g} s")
                    return self._check(run_id)
                poll = select.poll()
                events = select.POLLIN | (select.POLLOUT if self._out else 0)
                poll.register(self._socket, events)
            poll.poll(min(left, _SLICE) * 1000)  # another thread may take the answer

    def close(self) -> None:
        """Lets the child end by itself, also after us: it sees the socket close."""
        atexit.unregister(self.close)
        self._socket.close()
        if self._end is None:
            self._end = "was closed"
            self._child.returncode = 0  # nobody waits for it: no ResourceWarning

    def _move(self) -> None:
        if self._end is not None:
            return
        try:
            while data := self._socket.recv(65_536):
                self._in += data
            self._stop("ended")
        except BlockingIOError:
            pass
        except OSError:
            self._stop("ended")
        *lines, self._in = self._in.split(b"\n")
        for line in lines:
            run_id, verb, content = json.loads(line)
            if verb == "note":
                _log.warning("sinks.wandb: %s", content)
            else:
                self._done[run_id] = content
        try:
            while self._out and self._end is None:
                del self._out[: self._socket.send(self._out[:65_536])]
        except BlockingIOError:
            pass
        except OSError:
            self._stop("ended")

    def _check(self, run_id: str) -> None:
        if run_id in self._done:
            if error := self._done.pop(run_id):
                raise MirrorError(error)
        elif self._end is not None:
            raise MirrorError(f"the process that runs wandb {self._end}")

    def _stop(self, why: str) -> None:
        self._child.kill()
        self._child.wait()
        self._end, self._out = why, bytearray()
        self.close()
