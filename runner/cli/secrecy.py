# SPDX-License-Identifier: Apache-2.0
"""What this process must not say: the secrets of every config that it has read."""

import logging
import threading

from runner.records.secrets import Secrets

__all__ = ["BlottingFormatter", "blot", "keep_secret"]

_known = Secrets({}, ())
_lock = threading.Lock()


def keep_secret(secrets: Secrets) -> Secrets:
    """Adds to what is blotted from now on; returns its argument."""
    global _known  # noqa: PLW0603 - stderr and the log are the process's, too
    with _lock:
        _known = _known | secrets
    return secrets


def blot(text: str) -> str:
    """The text without any secret that this process has read."""
    return _known.blot(text)


class BlottingFormatter(logging.Formatter):
    """Formats records, of ours and of any library, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        """The lines, blotted; what does not print in them is escaped."""
        from runner.sinks.text import clean

        return "\n".join(map(clean, blot(super().format(record)).split("\n")))
