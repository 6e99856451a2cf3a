# SPDX-License-Identifier: Apache-2.0
"""What the compiled programs of a run cost, as XLA estimates it; runs nothing."""

from collections.abc import Mapping
from typing import Any

__all__ = ["estimate_costs"]

_MEMORY = ("argument", "output", "alias", "temp")


def estimate_costs(calls: Mapping[str, Any]) -> dict[str, dict[str, int | None]]:
    """FLOPs and bytes of each compiled call; null where the backend gives none.

    memory = arguments + outputs - those that share the arguments' place + temporaries

    A loop of unknown length counts once, so that `train` is one step of many.

    Args:
        calls: `jax.stages.Compiled`, by name.
    """
    return {name: _estimate(call) for name, call in calls.items()}


def _estimate(call: Any) -> dict[str, int | None]:
    cost, memory = call.cost_analysis() or {}, call.memory_analysis()
    sizes: dict[str, int | None]
    sizes = {name: getattr(memory, f"{name}_size_in_bytes", None) for name in _MEMORY}
    known = {name: size for name, size in sizes.items() if size is not None}
    total = None
    if len(known) == len(sizes):
        total = sum(known.values()) - 2 * known["alias"]
    return {
        "flops": _count(cost.get("flops")),
        "bytes_accessed": _count(cost.get("bytes accessed")),
        "memory": total,
        "temporary": sizes["temp"],
    }


def _count(value: float | None) -> int | None:
    """XLA says -1 where it can't tell."""
    return None if value is None or value < 0 else int(value)
