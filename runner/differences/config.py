# SPDX-License-Identifier: Apache-2.0
"""Config and environment of two runs, and which of it can matter to a bit."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runner.differences.leaves import Leaf, compare_leaves
from runner.records.record import Record

__all__ = ["ConfigDifferences", "compare_configs", "compare_environments", "is_idle"]

# What is written, where and when; how many steps a call takes; what was put up with.
_IDLE = (
    "checkpoint",
    "experiment",
    "rng.allow",
    "sinks",
    "train.compile_cache",
    "train.steps_per_call",
    "trusted",
)
_PATHS = ("data.path", "data.target_path")
_ENVIRONMENT = ("rng", "versions", "platform", "git", "construct", "guarantee")


@dataclass(frozen=True)
class ConfigDifferences:
    """Leaves of the config that differ.

    Args:
        matters: Those that can change a key or a bit.
        idle: Those that can't: sinks, checkpoints, how many steps a call takes.
    """

    matters: tuple[Leaf, ...]
    idle: tuple[Leaf, ...]


def compare_configs(a: Record, b: Record) -> ConfigDifferences:
    """What differs; another path to the same data can't matter."""
    leaves = compare_leaves(a.config, b.config)
    data = a.digests.get("data"), b.digests.get("data")
    idle_paths = _PATHS if data[0] is not None and data[0] == data[1] else ()
    idle = [x for x in leaves if is_idle(x.path) or x.path in idle_paths]
    return ConfigDifferences(
        tuple(leaf for leaf in leaves if leaf not in idle), tuple(idle)
    )


def is_idle(path: str) -> bool:
    """Whether a config leaf can't matter to any bit."""
    return any(path == p or path.startswith((f"{p}.", f"{p}[")) for p in _IDLE)


def compare_environments(a: Record, b: Record) -> tuple[Leaf, ...]:
    """Generator, versions, platform, code and guarantee, as `run.json` has them."""
    return compare_leaves(_environment(a.manifest), _environment(b.manifest))


def _environment(manifest: Mapping[str, Any]) -> dict[str, Any]:
    environment = {name: manifest[name] for name in _ENVIRONMENT}
    platform = dict(environment["platform"])
    variables = dict(platform.get("environment", {}))
    variables.pop("NPROC", None)  # what it sets is there as `thread_pool`
    return {**environment, "platform": {**platform, "environment": variables}}
