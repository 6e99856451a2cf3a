# SPDX-License-Identifier: Apache-2.0
"""What Flax's lifted transforms do to streams, watched while a program is traced.

Every lift of Flax packs the scopes of a module into a function. While it is watched,
each pack leaves a frame: the transform, the module path, and for each stream whether
the lift gives every index a key of its own. A stream that a lift doesn't mention is
not there inside; a scope from outside, closed over, ignores the lift altogether.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import flax.core.lift
import jax
from flax.core.scope import Scope, in_filter

from runner.audit.marks import mark_module

__all__ = ["Crossing", "LiftWatch", "Rule", "watch_lifts"]

_INDEXED = ("scan", "vmap", "while_loop")


class Rule(StrEnum):
    """What a lift does to a stream that is drawn from inside."""

    SPLIT = "split"  # a key of its own for each index
    SHARED = "shared"  # one key for all indices
    PASSED = "passed"  # no index: the stream goes through
    ABSENT = "absent"  # not mentioned, so not there inside
    IGNORED = "ignored"  # drawn from a scope outside, closed over


@dataclass(frozen=True)
class Crossing:
    """One lift between a `make_rng` call and the program.

    Args:
        kind: Name of the transform.
        path: Module path of what is lifted.
        rule: What it does to the stream.
        stacks: Whether it stacks a collection along the index.
        number: Counts nested lifts of one kind at one path, outermost 1.
    """

    kind: str
    path: tuple[str, ...]
    rule: Rule
    stacks: bool
    number: int = 1

    @property
    def indexed(self) -> bool:
        """Whether it has an index at all."""
        return self.kind in _INDEXED

    @property
    def loops(self) -> bool:
        """Whether it is a loop in the program (a vmap leaves none)."""
        return self.kind in ("scan", "while_loop")

    @property
    def axis(self) -> str:
        """The name of its index in the ledger."""
        kind = "while" if self.kind == "while_loop" else self.kind
        base = f"{kind}:{'/'.join(self.path)}" if self.path else kind
        return base if self.number == 1 else f"{base}#{self.number}"


@dataclass
class _Frame:
    """One lift under way; `inner` are the scopes that it made of the `outer` ones."""

    kind: str
    outer: list[Scope]
    filters: tuple[Any, ...]
    splits: tuple[bool, ...] | None
    stacks: bool
    inner: list[Scope] = field(default_factory=list)

    def rule(self, stream: str) -> Rule:
        found = [i for i, f in enumerate(self.filters) if in_filter(f, stream)]
        if not found:
            return Rule.ABSENT
        if self.splits is None or self.kind not in _INDEXED:
            return Rule.PASSED
        return Rule.SPLIT if self.splits[found[0]] else Rule.SHARED

    def holds(self, scope: Scope | None) -> bool:
        while scope is not None:
            if any(scope is each for each in self.inner):
                return True
            scope = scope.parent
        return False


class LiftWatch:
    """The lifts that the traced code is inside of, outermost first."""

    def __init__(self) -> None:
        self.frames: list[_Frame] = []

    def crossings(self, scope: Scope, stream: str) -> tuple[Crossing, ...]:
        """What each of them does to a stream that is drawn from in a scope."""
        rules, scopes = [], [scope]
        for frame in reversed(self.frames):
            held = any(map(frame.holds, scopes))
            rules.append(frame.rule(stream) if held else Rule.IGNORED)
            scopes = frame.outer if held else scopes
        found: list[Crossing] = []
        for frame, rule in zip(self.frames, reversed(rules), strict=True):
            path = tuple(frame.outer[-1].path) if frame.outer else ()
            number = sum((c.kind, c.path) == (frame.kind, path) for c in found) + 1
            found.append(Crossing(frame.kind, path, rule, frame.stacks, number))
        return tuple(found)

    def absent(self, scope: Scope, stream: str) -> Crossing | None:
        """The lift that keeps a stream out, which there is outside of it."""
        crossings = self.crossings(scope, stream)
        for frame, crossing in zip(self.frames, crossings, strict=True):
            outside = any(stream in outer.rngs for outer in frame.outer)
            if crossing.rule is Rule.ABSENT and outside:
                return crossing
        return None


_watches: list[LiftWatch] = []


@contextlib.contextmanager
def watch_lifts() -> Iterator[LiftWatch]:
    """Watches every lift of Flax, also those that were made before.

    Flax keeps what it packed of an `nn.jit` for the next call. It reports to whichever
    watch there is then; one that was called before any watch is not seen.
    """
    watch, original = LiftWatch(), flax.core.lift.pack

    def pack(
        fn: Callable[..., Any],
        in_variable_filters: Any,
        out_variable_filters: Any,
        rng_filters: Any,
        name: str | None = None,
        enable_kwargs: bool = False,
    ) -> Callable[..., Any]:
        def wrapper(scope_tree: Any, *args: Any, **kwargs: Any) -> Any:
            frame = _open_frame(fn, scope_tree, filters=rng_filters, kind=name)
            packed = original(
                functools.partial(_mark, fn, frame),
                in_variable_filters,
                out_variable_filters,
                rng_filters,
                name,
                enable_kwargs,
            )
            if not _watches:
                return packed(scope_tree, *args, **kwargs)
            frames = _watches[-1].frames
            frames.append(frame)
            path = tuple(frame.outer[-1].path) if frame.outer else ()
            try:
                with jax.named_scope(mark_module(path)):
                    return packed(scope_tree, *args, **kwargs)
            finally:
                frames.pop()

        return wrapper

    flax.core.lift.pack = pack
    _watches.append(watch)
    try:
        yield watch
    finally:
        _watches.pop()
        flax.core.lift.pack = original


def _open_frame(
    fn: Callable[..., Any], scope_tree: Any, *, filters: Any, kind: str | None
) -> _Frame:
    """What the function that Flax packs knows of its lift."""
    known = inspect.getclosurevars(fn).nonlocals
    if _watches and "jitted" in known:  # JAX would take a trace of before, unseen
        known["jitted"].clear_cache()
    splits = known.get("rng_splits")
    return _Frame(
        kind=kind or "lift",
        outer=jax.tree.leaves(scope_tree),
        filters=tuple(filters),
        splits=None if splits is None else tuple(map(bool, splits)),
        stacks=any(axis is not None for axis in known.get("variable_out_axes", ())),
    )


def _mark(
    fn: Callable[..., Any], frame: _Frame, scope_fn: Any, *args: Any, **kwargs: Any
) -> Any:
    """Calls the packed function, noting each scope that is made inside."""

    def noting(*inner: Any, **options: Any) -> Any:
        scopes = scope_fn(*inner, **options)
        frame.inner.extend(jax.tree.leaves(scopes))
        return scopes

    return fn(noting, *args, **kwargs)
