# SPDX-License-Identifier: Apache-2.0
"""Parameters of two runs, or what came out of two probes, leaf by leaf."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from runner.differences.leaves import Presence
from runner.records.arrays import read_arrays
from runner.records.record import Record
from runner.records.restore import list_saved, read_saved, restore_leaves

__all__ = [
    "ArrayDifferences",
    "compare_outputs",
    "compare_params",
    "compare_params_at",
    "read_outputs",
]


@dataclass(frozen=True)
class ArrayDifferences:
    """How named arrays of two runs differ.

    Args:
        presence: Which run has any; None where neither has.
        equal: By their digests, or all compared; None where neither run has any.
        step: The step of the checkpoints that were compared; None where the digests
            had to do.
        leaves: Leaves that both have.
        differing: How many of them differ in a bit.
        first: The first of these, in the order of names.
        first_largest: Largest |a - b| in it; None where it is not finite.
        largest: Largest |a - b|; None where nothing was compared or is not finite.
        largest_leaf: Its leaf.
        ulps: Largest distance in units of the last place, over float32 leaves.
        missing: Leaves that one run lacks, by name, and which run has them.
        shapes: Leaves of another shape or dtype: [a, b] in words, by name.
    """

    presence: Presence | None
    equal: bool | None
    step: int | None = None
    leaves: int = 0
    differing: int = 0
    first: str | None = None
    first_largest: float | None = None
    largest: float | None = None
    largest_leaf: str | None = None
    ulps: int | None = None
    missing: Mapping[str, Presence] | None = None
    shapes: Mapping[str, tuple[str, str]] | None = None


def compare_params(a: Record, b: Record) -> ArrayDifferences:
    """Final parameters by their digests; where these differ, those of the newest
    step of which both have a checkpoint.

    Raises:
        RecordError: a newest checkpoint is damaged, of either run.
    """
    steps = [_check_newest(record) for record in (a, b)]
    presence, equal = _by_digest(a, b, "params")
    common = max(steps[0] & steps[1], default=None)
    if equal or common is None:
        return ArrayDifferences(presence, equal)
    found = compare_params_at(common, a, b)
    if equal is None:  # both were killed; the checkpoints are all there is
        return found
    return replace(found, presence=presence, equal=False)


def compare_params_at(step: int, a: Record, b: Record) -> ArrayDifferences:
    """Parameters before a step, of which both have a checkpoint.

    Raises:
        RecordError: one of these is damaged.
    """
    return _compare(_params(a, step), _params(b, step), step=step)


def compare_outputs(a: Record, b: Record) -> ArrayDifferences:
    """What came out of two probes.

    Raises:
        RecordError: `outputs.npz` is missing or is not the file that was recorded.
    """
    arrays = [read_outputs(record) for record in (a, b)]
    presence, equal = _by_digest(a, b, "outputs")
    if presence is not Presence.BOTH:
        return ArrayDifferences(presence, equal)
    return _compare(*arrays, step=None)


def _by_digest(a: Record, b: Record, name: str) -> tuple[Presence | None, bool | None]:
    ours, theirs = a.digests.get(name), b.digests.get(name)
    if ours is None and theirs is None:
        return None, None
    if ours is None or theirs is None:
        return Presence.B if ours is None else Presence.A, False
    return Presence.BOTH, ours == theirs


def _check_newest(record: Record) -> frozenset[int]:
    """Steps that have a checkpoint; the newest one's files are checked."""
    steps = list_saved(record.files)
    for step in steps[:1]:
        read_saved(record.files, step, run_id=record.manifest["run_id"])
    return frozenset(steps)


def _params(record: Record, step: int) -> dict[str, np.ndarray]:
    read_saved(record.files, step, run_id=record.manifest["run_id"])
    leaves = restore_leaves(record.files, step)
    return {n: leaf for n, leaf in leaves.items() if n.startswith("params/")}


def read_outputs(record: Record) -> dict[str, np.ndarray]:
    """What came out of a probe; nothing for other runs.

    Raises:
        RecordError: `outputs.npz` is missing, altered or damaged.
    """
    content = record.check_file("outputs", "outputs.npz")
    if content is None:
        return {}
    return read_arrays(content, name=f"{record.name}: outputs.npz")


def _compare(
    a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray], *, step: int | None
) -> ArrayDifferences:
    both = sorted(a.keys() & b.keys())
    kinds = {n: (_kind(a[n]), _kind(b[n])) for n in both}
    shapes = {n: pair for n, pair in kinds.items() if pair[0] != pair[1]}
    same_kind = [n for n in both if n not in shapes]
    other = [n for n in same_kind if a[n].tobytes() != b[n].tobytes()]
    sizes = {n: _largest(a[n], b[n]) for n in other}
    known = {n: size for n, size in sizes.items() if size is not None}
    leaf = max(known, key=lambda n: known[n], default=None)
    ulps = [d for n in other if (d := _ulps(a[n], b[n])) is not None]
    missing = {n: Presence.A if n in a else Presence.B for n in sorted({*a, *b})}
    missing = {n: side for n, side in missing.items() if n not in both}
    differing = sorted([*other, *shapes])
    return ArrayDifferences(
        presence=Presence.BOTH,
        equal=not differing and not missing,
        step=step,
        leaves=len(both),
        differing=len(differing),
        first=differing[0] if differing else None,
        first_largest=known.get(differing[0]) if differing else None,
        largest=None if leaf is None else known[leaf],
        largest_leaf=leaf,
        ulps=max(ulps, default=None),
        missing=missing,
        shapes=shapes,
    )


def _kind(leaf: np.ndarray) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"


def _largest(a: np.ndarray, b: np.ndarray) -> float | None:
    """Largest |a - b|; None where a value is not finite, or no number."""
    try:
        size = np.abs(a.astype(np.float64) - b.astype(np.float64)).max(initial=0.0)
    except (TypeError, ValueError):
        return None
    return float(size) if np.isfinite(size) else None


def _ulps(a: np.ndarray, b: np.ndarray) -> int | None:
    """Largest number of float32 values from one to the other; None for other types."""
    finite = a.dtype == np.float32 and np.isfinite(a).all() and np.isfinite(b).all()
    if not finite:
        return None
    x, y = (_rank(side) for side in (a, b))
    return int(np.abs(x - y).max(initial=0))


def _rank(values: np.ndarray) -> Any:
    """Float32 values as integers in the same order, without a gap: -0.0 meets 0.0."""
    bits = np.ascontiguousarray(values).view(np.int32).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
