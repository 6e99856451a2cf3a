# SPDX-License-Identifier: Apache-2.0
"""The draws of a walk, each with its derivation and the names of its axes."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from runner.audit.marks import Here, Path
from runner.audit.refs import Box, Ref, Refs, Space, intersect
from runner.ops import Affine, Op, rename_axes

__all__ = ["Draw", "Log", "Use"]

# What a gradient has for the keys that another branch would leave to it.
_PLACEHOLDER = "passed through empty2"


@dataclass(frozen=True)
class Use:
    """One consumption of a key: `shape` per key, `bits` per element."""

    primitive: str
    shape: tuple[int, ...]
    bits: int


@dataclass(frozen=True)
class Draw:
    """A place in the program that draws.

    Args:
        stream: The stream that the key comes from; None when from no stream.
        ops: From the stream's key to the key that is consumed.
        path: Flax module path.
        call: Count of `make_rng` calls in that module; None outside `make_rng`.
        axes: Name and size of each axis that `ops` are indexed by.
        use: What the key is consumed by.
        untraced: What the key really comes from, or why `ops` is not the whole
            derivation; empty when it is.
        branches: Each `cond` that the draw is in, or that its key comes out of, by
            number, and the branch.
        within: Name and size (None when not known) of each axis that the draw is
            made along, whether or not its key depends on it. `scan:a[1:4]` is a part
            of an axis, counted from 0 again.
    """

    stream: str | None
    ops: tuple[Op, ...]
    path: tuple[str, ...]
    call: int | None
    axes: tuple[tuple[str, int], ...]
    use: Use
    untraced: str = ""
    branches: tuple[tuple[int, int], ...] = ()
    within: tuple[tuple[str, int | None], ...] = ()


@dataclass
class Log:
    """The draws so far, and the names that their axes took."""

    space: Space
    draws: list[Draw] = field(default_factory=list)
    loops: set[str] = field(default_factory=set)
    is_quiet: bool = False
    seen: set[tuple[object, ...]] = field(default_factory=set)

    def new_axis(self, kind: str, path: Path, size: int | None) -> str:
        """Names the axis of a loop: `scan:layers`, `scan:layers#2`."""
        name = next(name for name in _names(kind, path) if name not in self.loops)
        self.loops.add(name)
        self.space.sizes[name] = size
        return name

    @contextlib.contextmanager
    def quietly(self) -> Iterator[None]:
        """Lists nothing for a while, and takes no names."""
        loops, quiet = set(self.loops), self.is_quiet
        self.is_quiet = True
        try:
            yield
        finally:
            self.loops, self.is_quiet = loops, quiet

    def add(self, keys: Refs, use: Use, here: Here) -> None:
        """One draw for each rule of the keys that are consumed."""
        for rule in () if self.is_quiet else keys.rules:
            box = intersect(rule.box, here.box, self.space)
            taken = dict(here.branches)
            if box is None or any(taken.get(c, b) != b for c, b in rule.branches):
                continue
            if rule.untraced == _PLACEHOLDER and (rule.branches or here.again):
                continue  # where that branch is taken, this draw is not made
            names = self._name_dims(keys.dims, here.within, rule.stream)
            branches = tuple(sorted({**taken, **dict(rule.branches)}.items()))
            draw = _close(rule, names, box, self.space)
            path = rule.path if rule.call is not None else here.path
            draw = replace(draw, use=use, path=path, branches=branches)
            meaning = _meaning(draw)
            # A gradient computes a draw again where it did not keep its bits.
            if not here.again or meaning not in self.seen:
                self.draws.append(draw)
            self.seen.add(meaning)

    def _name_dims(
        self, dims: tuple[str, ...], within: tuple[str, ...], stream: str | None
    ) -> dict[str, str]:
        """The axis of each dimension and each loop, in their order.

        The dimension of one split has one name in all draws, and so have those of
        several streams that are split at one place; in one draw no name comes twice.
        """
        space, found = self.space, dict(zip(within, within, strict=True))
        for dim in dims:
            if space.sizes[dim] == 1:
                continue
            name = space.names.get(dim)
            if name is None or name in found.values():
                name = next(
                    name
                    for name in _names("vmap", space.origins.get(dim, ()))
                    if name not in found.values() and self._is_free(name, dim, stream)
                )
            found[dim] = space.names[dim] = name
            space.sizes[name] = space.sizes[dim]
            space.users.setdefault(name, set()).add(stream)
        return found

    def _is_free(self, name: str, dim: str, stream: str | None) -> bool:
        users = self.space.users.get(name, None if name not in self.loops else {stream})
        same = self.space.sizes.get(name) == self.space.sizes[dim]
        return users is None or (same and stream not in users)


def _names(kind: str, path: Path) -> Iterator[str]:
    base, n = f"{kind}:{'/'.join(path)}" if path else kind, 1
    while True:
        yield base if n == 1 else f"{base}#{n}"
        n += 1


def _close(rule: Ref, names: dict[str, str], box: Box, space: Space) -> Draw:
    """A rule as a draw, over named axes that all count from 0."""
    bounds = {variable: (start, stop) for variable, start, stop in box}
    values: dict[str, Affine] = {}
    within: list[tuple[str, int | None]] = []
    for variable, name in names.items():
        size, axis, first = space.sizes[variable], name, 0
        if variable in bounds:
            first, stop = bounds[variable]
            axis = f"{name}[{first}:{'' if stop is None else stop}]"
            size = None if stop is None else stop - first
        one = size == 1
        values[variable] = Affine(first, () if one else ((axis, 1),))
        within.append((axis, size))
    changed = {v: a for v, a in values.items() if a != Affine(0, ((v, 1),))}
    ops = tuple(_explain(op) for op in rename_axes(rule.ops, changed))
    used = {axis for op in ops for axis in op.axes}
    untraced = rule.untraced
    if any(size is None and axis in used for axis, size in within):
        untraced = "in a while loop of unknown length"
    axes = tuple((a, size) for a, size in within if a in used and size is not None)
    return Draw(
        stream=rule.stream,
        ops=() if untraced else ops,
        path=(),
        call=rule.call,
        axes=() if untraced else axes,
        use=Use("", (), 0),
        untraced=untraced,
        within=tuple(within),
    )


def _explain(op: Op) -> Op:
    """An op that depends on axes says which; in the words of the ledger."""
    if op.op == "repeat":
        return replace(op, why=", ".join(op.axes) or "carried on")
    return replace(op, why=", ".join(op.axes)) if op.axes else op


def _meaning(draw: Draw) -> tuple[object, ...]:
    """What makes two draws the same, whatever their axes are called."""
    places = {axis: Affine(0, ((f"#{i}", 1),)) for i, (axis, _) in enumerate(draw.axes)}
    ops = tuple(replace(op, why="") for op in rename_axes(draw.ops, places))
    sizes = tuple(size for _, size in draw.axes)
    return draw.stream, ops, sizes, draw.path, draw.call, draw.use, draw.untraced
