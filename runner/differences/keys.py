# SPDX-License-Identifier: Apache-2.0
"""Streams and keys of two ledgers.

Entries meet by (phase, stream, path, call, axes). Equal derivations under equal flags
give equal keys; of others the keys are derived and compared.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runner.differences.leaves import Leaf, Presence, compare_leaves, is_same
from runner.keys import rng_flags
from runner.ledger import expand, first_step, rng_of, spell_derivation
from runner.records.record import Record

__all__ = ["DrawDifference", "KeyDifferences", "StreamDifference", "compare_keys"]

_DERIVED = 256  # entries whose keys are derived; of more, the derivations must do
_PLACES = 4096  # keys of one entry
_IN_STREAM = ("kind", "seed", "derive", "phases", "per", "key", "spawn_key", "used_by")

Ledger = Mapping[str, Any]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class StreamDifference:
    """A stream that one run lacks, or that is declared otherwise."""

    name: str
    presence: Presence
    changed: tuple[Leaf, ...] = ()


@dataclass(frozen=True)
class DrawDifference:
    """An entry of the ledger that one run lacks, or that is another.

    Args:
        phase, stream, path, call, axes: Where it is drawn.
        presence: Which run has it.
        other_keys: Whether the keys differ; False where the same key draws other
            shapes.
        rules: How the key comes about in each run; None where it is absent.
        uses: What is drawn from it in each run; None where it is absent.
        step: The step of `keys`; None in the phase `init`.
        index: Scan and vmap indices and microbatch of `keys`.
        keys: The first keys that differ, as words; None where they were not derived.
    """

    phase: str
    stream: str | None
    path: tuple[str, ...]
    call: int | None
    axes: Mapping[str, int]
    presence: Presence
    other_keys: bool
    rules: tuple[str | None, str | None]
    uses: tuple[Any, Any]
    step: int | None = None
    index: Mapping[str, int] | None = None
    keys: tuple[list[int] | None, list[int] | None] | None = None


@dataclass(frozen=True)
class KeyDifferences:
    """How two ledgers differ.

    Args:
        entries: Entries of each ledger.
        streams: Streams that differ.
        draws: Entries that differ, in the order of the ledgers.
    """

    entries: tuple[int, int]
    streams: tuple[StreamDifference, ...]
    draws: tuple[DrawDifference, ...]

    @property
    def others(self) -> tuple[DrawDifference, ...]:
        """Entries in both runs with other keys."""
        both = (d for d in self.draws if d.presence is Presence.BOTH)
        return tuple(draw for draw in both if draw.other_keys)


def compare_keys(a: Record, b: Record) -> KeyDifferences:
    """Compares the ledgers of two records."""
    draws = a.ledger["draws"], b.ledger["draws"]
    derived = itertools.count()
    found = []
    for pair in _pairs(*draws):
        if None in pair or _may_differ(a.ledger, b.ledger, pair):
            difference = _compare(a.ledger, b.ledger, pair, derived)
            found += [difference] if difference else []
    streams = tuple(_compare_streams(a.ledger["streams"], b.ledger["streams"]))
    return KeyDifferences((len(draws[0]), len(draws[1])), streams, tuple(found))


def _compare_streams(a: Sequence[Row], b: Sequence[Row]) -> Iterator[StreamDifference]:
    ours, theirs = ({stream["name"]: stream for stream in side} for side in (a, b))
    for name in {**ours, **theirs}:
        if name not in ours or name not in theirs:
            yield StreamDifference(name, Presence.A if name in ours else Presence.B)
            continue
        changed = compare_leaves(*(_shown(side[name]) for side in (ours, theirs)))
        if changed:
            yield StreamDifference(name, Presence.BOTH, changed)


def _shown(stream: Row) -> dict[str, Any]:
    """What of a stream is compared; its key as hex words."""
    shown = {field: stream[field] for field in _IN_STREAM if field in stream}
    if "key" in shown:
        shown["key"] = " ".join(f"{word:08x}" for word in shown["key"])
    return shown


def _pairs(
    a: Sequence[Row], b: Sequence[Row]
) -> Iterator[tuple[Row | None, Row | None]]:
    """Entries that meet; where several share a place, equal rules meet first."""
    ours, theirs = _by_place(a), _by_place(b)
    for place in {**ours, **theirs}:
        left, right = ours.get(place, []), theirs.get(place, [])
        for draw in list(left):
            twin = next((d for d in right if _rule(d) == _rule(draw)), None)
            if twin is not None:
                left.remove(draw)
                right.remove(twin)
                yield draw, twin
        yield from itertools.zip_longest(left, right)


def _by_place(draws: Sequence[Row]) -> dict[Any, list[Row]]:
    places: dict[Any, list[Row]] = {}
    for draw in draws:
        path, axes = tuple(draw["path"]), tuple(draw["axes"].items())
        place = (draw["phase"], draw["stream"], path, draw["call"], axes)
        places.setdefault(place, []).append(draw)
    return places


def _rule(draw: Row) -> Any:
    """What its key follows from, without the words beside it."""
    return _bare(draw.get("derivation", draw.get("untraced")))


def _bare(rule: Any) -> Any:
    if isinstance(rule, Mapping):
        return {k: _bare(v) for k, v in rule.items() if k != "why"}
    return [_bare(inner) for inner in rule] if isinstance(rule, list) else rule


def _may_differ(a: Ledger, b: Ledger, pair: tuple[Any, Any]) -> bool:
    ours, theirs = pair
    if _rule(ours) != _rule(theirs) or not is_same(ours["uses"], theirs["uses"]):
        return True
    flags = ("impl", "partitionable", "fix_separator")
    if any(a["rng"][flag] != b["rng"][flag] for flag in flags):
        return True
    used = {row.get("coordinate") for row in ours.get("derivation", ())}
    sizes = [_sizes(ledger, ours["phase"], used) for ledger in (a, b)]
    return sizes[0] != sizes[1]


def _sizes(ledger: Ledger, phase: str, used: set[Any]) -> list[Any]:
    """What of the run's sizes the keys of an entry depend on."""
    sizes, wanted = ledger["sizes"], []
    if "epoch" in used:
        wanted.append(sizes["steps_per_epoch"])
    if "microbatch" in used:
        wanted.append(sizes["microbatches" if phase == "train" else "eval_batches"])
    return wanted


def _compare(
    a: Ledger, b: Ledger, pair: tuple[Any, Any], derived: Iterator[int]
) -> DrawDifference | None:
    ours, theirs = pair
    draw = ours or theirs
    place = {name: draw[name] for name in ("phase", "stream", "call", "axes")}
    place |= {"path": tuple(draw["path"])}
    place |= {"rules": (_spelled(ours), _spelled(theirs))}
    place |= {"uses": tuple(d and d["uses"] for d in pair)}
    if ours is None or theirs is None:
        presence = Presence.A if theirs is None else Presence.B
        return DrawDifference(**place, presence=presence, other_keys=True)
    place |= {"presence": Presence.BOTH}
    if "untraced" in ours or "untraced" in theirs or next(derived) >= _DERIVED:
        other = _rule(ours) != _rule(theirs)
        return DrawDifference(**place, other_keys=other)
    example = _first_other_key(a, b, ours, theirs)
    if example is None:
        same = is_same(ours["uses"], theirs["uses"])
        return None if same else DrawDifference(**place, other_keys=False)
    return DrawDifference(**place, other_keys=True, **example)


def _spelled(draw: Row | None) -> str | None:
    if draw is None:
        return None
    if "derivation" not in draw:
        return f"untraced: {draw['untraced']}"
    return spell_derivation(draw["derivation"])


def _first_other_key(
    a: Ledger, b: Ledger, ours: Row, theirs: Row
) -> dict[str, Any] | None:
    """The first keys that differ: at the first step, or where the epochs part."""
    epochs = min(ledger["sizes"]["steps_per_epoch"] for ledger in (a, b))
    first = max(first_step(a, ours), first_step(b, theirs))
    steps = [first] if ours["phase"] == "init" else sorted({first, epochs})
    for step in steps:
        keys = [_keys(*side, step=step) for side in ((a, ours), (b, theirs))]
        for index in {**keys[0], **keys[1]}:
            left, right = keys[0].get(index), keys[1].get(index)
            if left != right:
                shown = None if ours["phase"] == "init" else step
                return {"step": shown, "index": dict(index), "keys": (left, right)}
    return None


def _keys(ledger: Ledger, draw: Row, *, step: int) -> dict[Any, list[int]]:
    with rng_flags(rng_of(ledger)):
        entries = itertools.islice(expand(ledger, draw, step=step), _PLACES)
        return {tuple(e["index"].items()): e["key"] for e in entries}
