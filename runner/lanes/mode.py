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
    """

    mode: Mode = Mode.AUTO
    max_lanes: int | None = None

    @classmethod
    def parse(cls, mode: str, max_lanes: int | None) -> "Options":
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
        if max_lanes is not None and max_lanes < 1:
            rule = "must be at least 1"
            raise ConfigError("hydra.launcher.max_lanes", rule, got=max_lanes)
        return cls(Mode(mode), max_lanes)
