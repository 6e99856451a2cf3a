# SPDX-License-Identifier: Apache-2.0
"""What `hydra.launcher` may say. No JAX."""

from dataclasses import dataclass
from enum import StrEnum

from runner.errors import ConfigError, did_you_mean

__all__ = ["Mode", "Options"]


class Mode(StrEnum):
    """How the lanes of a group are computed."""

    AUTO = "auto"
    MAP = "map"
    VMAP = "vmap"


@dataclass(frozen=True)
class Options:
    """`hydra.launcher` of a sweep.

    Args:
        mode: How lanes are computed.
        max_lanes: How many are in memory at a time; None finds out.
        lanes_per_job: How many another launcher ships at a time; None finds out.
        processes: How many processes of this machine run lanes; None finds out.
    """

    mode: Mode = Mode.AUTO
    max_lanes: int | None = None
    lanes_per_job: int | None = None
    processes: int | None = None

    @classmethod
    def parse(cls, mode: str, **counts: int | None) -> "Options":
        """What the config says.

        Raises:
            ConfigError: it is out of range.
        """
        if mode not in set(Mode):
            raise ConfigError(
                "hydra.launcher.mode",
                "not a choice",
                got=mode,
                allowed=f"Choices: {', '.join(Mode)}",
                fix=did_you_mean(mode, list(Mode)),
            )
        for name, count in counts.items():
            if count is not None and count < 1:
                rule = "must be at least 1"
                raise ConfigError(f"hydra.launcher.{name}", rule, got=count)
        return cls(Mode(mode), **counts)
