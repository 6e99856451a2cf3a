# SPDX-License-Identifier: Apache-2.0
"""What can go wrong, as one tree.

RunnerError                 a user's mistake, told in one line; exit code 2
  ConfigError               a config leaf that breaks a rule
    UnknownStreamError      a stream that nobody declared
    TargetError             a `_target_` that may not, or can not, be built
      UntrustedTargetError  one of a package that nobody trusts
    DataError               a data set that is absent, damaged or misshapen
  RecordError               a run directory that can't be claimed or read
    AlteredRecordError      a file of a record that is not the one that was written
  HazardsRefusedError       a program with key hazards; exit code 1 (2: see there)
  RunFailedError            a run that could not go on; exit code 1
    StoppedError            one that its user stopped
"""

import difflib
from collections.abc import Iterable
from enum import Enum
from typing import Any

__all__ = [
    "AlteredRecordError",
    "ConfigError",
    "DataError",
    "HazardsRefusedError",
    "RecordError",
    "RunFailedError",
    "RunnerError",
    "StoppedError",
    "TargetError",
    "UnknownStreamError",
    "UntrustedTargetError",
    "did_you_mean",
    "in_one_line",
    "printable",
]


class _Nothing(Enum):
    """Stays itself where an error goes to another process."""

    NO_VALUE = "no value"


class RunnerError(Exception):
    """A mistake that its user can mend: one line, no traceback."""

    exit_code = 2

    def __reduce__(self) -> tuple[Any, ...]:
        """Comes back whole from another process, whatever its class is made from."""
        return _restore, (type(self), self.args, self.__dict__)


class ConfigError(RunnerError):
    """`<path>: <rule> (got <value>). <allowed>. <fix>.`

    Args:
        path: Where it stands in the config, as Hydra overrides spell it.
        rule: The rule that it breaks, in words that follow the path.
        got: The value given; left out of the message when it is `NO_VALUE`.
        allowed: What would be accepted, as a sentence without its full stop.
        fix: One change that mends it, as a sentence without its full stop.
    """

    NO_VALUE: Any = _Nothing.NO_VALUE

    def __init__(
        self,
        path: str,
        rule: str,
        *,
        got: Any = NO_VALUE,
        allowed: str | None = None,
        fix: str | None = None,
    ) -> None:
        self.path, self.rule, self.got = path, rule, got
        self.allowed, self.fix = allowed, fix
        shown = "" if got is self.NO_VALUE else f" (got {_show(got)})"
        sentences = [f"{path}: {rule}{shown}", allowed, fix]
        text = " ".join(_end(s) for s in sentences if s)
        super().__init__(" ".join(text.split()))


class UnknownStreamError(ConfigError):
    """A stream that is asked for and not declared under `rng.streams`."""


class TargetError(ConfigError):
    """A `_target_` that is untrusted, missing, of the wrong kind or misused."""


class UntrustedTargetError(TargetError):
    """A `_target_` of a package that is not ours and that nobody named as trusted."""


class DataError(ConfigError):
    """A data set that is absent, truncated or of the wrong shape."""


class RecordError(RunnerError):
    """A run directory that can't be claimed, written or read.

    Names in it may be a stranger's: whatever does not print is an escape.
    """

    def __init__(self, text: str) -> None:
        super().__init__(printable(text))


class AlteredRecordError(RecordError):
    """A file that is not what its digest says: missing, added, altered, damaged."""


class HazardsRefusedError(RunnerError):
    """A program whose keys are not what they should be; a line for each hazard.

    Args:
        is_config: Whether it is the config that asks for them; exit code 2, not 1.
    """

    def __init__(self, text: str, *, is_config: bool = False) -> None:
        self.exit_code = 2 if is_config else 1
        super().__init__(text)


class RunFailedError(RunnerError):
    """A run that stopped before its end; its record says where and why."""

    exit_code = 1


class StoppedError(RunFailedError):
    """A run that its user stopped, before it began or after."""


def in_one_line(error: BaseException) -> str:
    """What an error says; of one that is not ours, its type, first and last line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, RunnerError):
        return " ".join(lines)
    said = [*lines[:1], *lines[-1:]] if len(lines) > 1 else lines
    return ": ".join(filter(None, (type(error).__name__, " ... ".join(said))))


def printable(text: str) -> str:
    """Text on one line that moves no cursor: ESC becomes `\\x1b`."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text
    )


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """The sentence that names the nearest known word, or None if none is near."""
    near = difflib.get_close_matches(str(name), [str(k) for k in known], n=1)
    return f"Did you mean {near[0]!r}?" if near else None


def _restore(
    kind: type[RunnerError], args: tuple[Any, ...], attributes: dict[str, Any]
) -> RunnerError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(attributes)
    return error


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _end(sentence: str) -> str:
    return sentence if sentence[-1] in ".?!" else f"{sentence}."
