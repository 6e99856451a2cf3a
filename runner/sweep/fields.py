# SPDX-License-Identifier: Apache-2.0
"""What was swept over: the leaves in which the configs of the jobs differ.

They are read from the records: a choice of a group sweeps over all of its leaves, a
default that follows another leaf over itself, and an override of a file over nothing
that the command line says.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runner.differences.config import is_idle
from runner.differences.leaves import is_same

__all__ = ["ABSENT", "Field", "differing_leaves", "fields_of", "is_seed"]

_WRAPPERS = ("model.module", "optimizer.transform")

ABSENT: Any = object()  # the value of a leaf that a config does not have


@dataclass(frozen=True)
class Field:
    """Leaves that vary together: one axis of the sweep.

    Args:
        path: The first of them, by which the field is called.
        others: The rest: jobs that agree in `path` agree in these.
    """

    path: str
    others: tuple[str, ...] = ()


def differing_leaves(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The leaves whose values are not all the same and can matter to a bit.

    Args:
        configs: Leaves by path, a mapping for each run.

    Returns:
        For each path a value for each run, `ABSENT` where it has none. One that only
        follows another is left out: `rng.seed` after `seed`, and what lies below
        `model.module` or `optimizer.transform` after a name beside it. `experiment`
        comes first.
    """
    found: dict[str, list[Any]] = {}
    for path in dict.fromkeys(path for config in configs for path in config):
        values = [config.get(path, ABSENT) for config in configs]
        is_one = all(_is_equal(value, values[0]) for value in values[1:])
        if is_one or (is_idle(path) and path != "experiment"):
            continue
        found[path] = values
    kept = (path for path in found if not _follows(path, found))
    return {path: found[path] for path in sorted(kept, key=_is_not_experiment)}


def _follows(path: str, found: Mapping[str, list[Any]]) -> bool:
    """Whether a leaf has the value of another one in every run, as one that is made
    from it by interpolation.
    """
    if path == "rng.seed":
        return found[path] == found.get("seed")
    root = next((root for root in _WRAPPERS if _is_below(path, root)), None)
    if root is None:
        return False
    group = root.partition(".")[0]
    beside = (p for p in found if p.startswith(f"{group}.") and not _is_below(p, root))
    return any(found[p] == found[path] for p in beside)


def _is_below(path: str, root: str) -> bool:
    return path.startswith(f"{root}.")


def fields_of(leaves: Mapping[str, Sequence[Any]]) -> tuple[Field, ...]:
    """The axes of a sweep; seeds are none, they repeat a job.

    Args:
        leaves: As `differing_leaves` gives them.
    """
    together: dict[tuple[Any, ...], list[str]] = {}
    for path, values in leaves.items():
        if not is_seed(path):
            together.setdefault(_axis(path, values), []).append(path)
    return tuple(Field(first, tuple(rest)) for first, *rest in together.values())


def _axis(path: str, values: Sequence[Any]) -> tuple[Any, ...]:
    """Equal for leaves that vary together, and do not only seem to.

    Where every job has a value of its own, any two leaves seem to: numbers are then
    taken for axes of their own, words for a choice of a group and what it brought.
    """
    partition = _partition(values)
    if len(set(partition)) < len(partition):
        return partition
    is_number = all(type(value) in (int, float) for value in values)
    return (path,) if is_number else (*partition, path.partition(".")[0])


def is_seed(path: str) -> bool:
    """Whether jobs that differ in this leaf alone are repeats of each other."""
    return path == "seed" or path.endswith(".seed")


def _partition(values: Sequence[Any]) -> tuple[int, ...]:
    """For each value the index of the first one that is spelled like it."""
    first: dict[str | None, int] = {}
    return tuple(first.setdefault(_key(v), i) for i, v in enumerate(values))


def _key(value: Any) -> str | None:
    return None if value is ABSENT else json.dumps(value, default=repr)


def _is_equal(a: Any, b: Any) -> bool:
    return a is b if a is ABSENT or b is ABSENT else is_same(a, b)


def _is_not_experiment(path: str) -> bool:
    return path != "experiment"
