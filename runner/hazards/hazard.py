# SPDX-License-Identifier: Apache-2.0
"""What a hazard says."""

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

__all__ = ["Hazard", "Severity", "error", "warning"]


class Severity(StrEnum):
    """Whether a hazard stops a run."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True)
class Hazard:
    """One hazard.

    Args:
        code: `R001` to `R015`; `rng.allow` takes it.
        severity: An error stops the run unless its code is allowed.
        what: What is wrong, in words that follow the path.
        path: Config path to change.
        fix: One change that mends it.
        draws: Places in the program, as `train Dropout_0`.
        is_fatal: Whether the program can't run with it, allowed or not.
    """

    code: str
    severity: Severity
    what: str
    path: str
    fix: str
    draws: tuple[str, ...] = ()
    is_fatal: bool = False

    def to_plain(self) -> dict[str, Any]:
        """As `run.json` and `plan --json` have it."""
        fields = asdict(self)
        del fields["is_fatal"]
        return {**fields, "severity": str(self.severity)}

    def __str__(self) -> str:
        at = f" ({', '.join(self.draws)})" if self.draws else ""
        stop = "" if self.fix.endswith("?") else "."
        return f"{self.code}: {self.path}: {self.what}{at}. {self.fix}{stop}"


def error(code: str, path: str, what: str, fix: str, **more: Any) -> Hazard:
    """One that stops a run."""
    return Hazard(code, Severity.ERROR, what, path, fix, **more)


def warning(code: str, path: str, what: str, fix: str, **more: Any) -> Hazard:
    """One that is only told."""
    return Hazard(code, Severity.WARNING, what, path, fix, **more)
