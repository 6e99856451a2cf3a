# SPDX-License-Identifier: Apache-2.0
"""Messages between processes: JSON objects, one a line, over a socket."""

import json
import socket
import threading
from collections import deque
from typing import Any

__all__ = ["MOST_BYTES", "Wire", "WireError"]

MOST_BYTES = 2**22  # of one message; a stranger may be at the other end


class WireError(Exception):
    """The other end is gone, or sends what is no message."""


class Wire:
    """One end of a connection; messages come out in the order they were sent in.

    Args:
        connection: A connected socket, ours from now on.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket, self._buffer = connection, b""
        self._messages: deque[dict[str, Any]] = deque()
        self._sending = threading.Lock()
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def fileno(self) -> int:
        """For `select`."""
        return self._socket.fileno()

    def send(self, **message: Any) -> None:
        """Sends one message.

        Raises:
            WireError: the other end is gone, or reads nothing.
        """
        try:
            with self._sending:
                self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise WireError(error.strerror or str(error)) from error

    def receive(self, timeout: float | None = None) -> dict[str, Any]:
        """The next message; waits for it.

        Args:
            timeout: Seconds; None waits for good.

        Raises:
            WireError: the other end is gone, is silent for so long, or sends what is
                no message.
        """
        while not self._messages:
            self.read(timeout)
        return self._messages.popleft()

    def read(self, timeout: float | None = None) -> None:
        """Reads what is there, or waits for it."""
        try:
            self._socket.settimeout(timeout)
            block = self._socket.recv(2**16)
        except OSError as error:
            raise WireError(error.strerror or str(error)) from error
        finally:
            self._socket.settimeout(None)
        if not block:
            raise WireError("its connection closed")
        *lines, self._buffer = (self._buffer + block).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError as error:
            raise WireError("it sends what is no message") from error
        is_well = all(isinstance(message, dict) for message in messages)
        if not is_well or len(self._buffer) > MOST_BYTES:
            raise WireError("it sends what is no message")
        self._messages.extend(messages)

    def take(self) -> list[dict[str, Any]]:
        """The messages that were read and not received."""
        messages = list(self._messages)
        self._messages.clear()
        return messages

    def close(self) -> None:
        """Closes this end."""
        self._socket.close()
