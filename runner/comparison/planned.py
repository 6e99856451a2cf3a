# SPDX-License-Identifier: Apache-2.0
"""The keys that a ledger plans, many at once, by one compiled program for each phase.

    keys[i, k] = the derivation of entry k at step first + i

The same as `runner.ledger.expand` for every entry and a range of steps. Entries whose
derivations differ by numbers alone are derived side by side.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from runner.keys import Op, advance_carry, derive_key, rng_flags, split_carry
from runner.ledger import bind_places, rng_of
from runner.spec import Coordinate, Impl, Phase

__all__ = ["Entry", "PlannedKeys"]

_BLOCK = 32  # steps that are derived side by side
_NUMBER = {"seed": "value", "fold_in": "value", "split": "index", "repeat": "index"}


@dataclass(frozen=True)
class Entry:
    """One key of each step: a draw of the ledger, at one microbatch and index."""

    draw: Mapping[str, Any]
    index: Mapping[str, int]

    def __str__(self) -> str:
        path = "/".join(self.draw["path"]) or "(root)"
        call = f" call {self.draw['call']}" if self.draw["call"] else ""
        at = "".join(f" {name} {n}" for name, n in self.index.items())
        return f"{self.draw['stream']} {path}{call}{at}"


class PlannedKeys:
    """What a ledger plans for one phase; its program is compiled here.

    Args:
        ledger: As `make_ledger` returns it.
        phase: Which of its draws.
        window: Most steps that are asked for at once.

    Attributes:
        entries: The keys of one step, in the order in which they are derived.
    """

    def __init__(self, ledger: Mapping[str, Any], phase: Phase, *, window: int) -> None:
        bound = [
            (Entry(draw, index), ops)
            for draw in ledger["draws"]
            if draw["phase"] == phase and "derivation" in draw
            for index, ops in bind_places(ledger, draw)
        ]
        self.entries = tuple(entry for entry, _ in bound)
        self._window = window
        if not bound:
            return
        impl, epoch = ledger["rng"]["impl"], ledger["sizes"]["steps_per_epoch"]
        groups = tuple(_group([ops for _, ops in bound]))
        derive = _make_derive(groups, impl=impl, steps_per_epoch=epoch, window=window)
        with rng_flags(rng_of(ledger)):  # they count while a program is traced
            starts = jax.jit(lambda: [_derive_heads(g, impl=impl) for g in groups])()
            self._at: tuple[np.int32, Any] = (np.int32(0), starts)
            args = (*self._at, np.int32(0), np.int32(0))
            self._derive = jax.jit(derive).lower(*args).compile()

    def derive(self, first: int, *, steps: int) -> Any:
        """The keys of `steps` steps from step `first` on; later rows mean nothing.

        A carried stream goes on from where it was last asked for: ask forwards.

        Returns:
            uint32 of shape [rows, entries, words]; nothing waits for it.
        """
        if not self.entries:
            return np.zeros((self._window, 0, 0), np.uint32)
        keys, starts = self._derive(*self._at, np.int32(first), np.int32(steps))
        self._at = (np.int32(first), starts)
        return keys


@dataclass(frozen=True)
class _Group:
    """Entries with equal ops but for their numbers.

    Args:
        head: Ops before a carried step; none where no step is carried.
        tail: Ops after it, or all.
        carries: The op in between, if there is one.
        numbers: Those of head and tail.
        members: Places of the entries among all.
    """

    head: tuple[Op, ...]
    tail: tuple[Op, ...]
    carries: bool
    numbers: UInt32[np.ndarray, "members ops"]
    members: tuple[int, ...]


def _group(derivations: Sequence[tuple[Op, ...]]) -> Iterator[_Group]:
    alike: dict[tuple[Op, ...], list[int]] = {}
    for i, ops in enumerate(derivations):
        blank = tuple(replace(_put(op, 0), why="") for op in ops)
        alike.setdefault(blank, []).append(i)
    for blank, members in alike.items():
        kinds = [op.op for op in blank]
        at = kinds.index("carry") if "carry" in kinds else 0
        carries = "carry" in kinds
        rows = [[_number(op) for op in derivations[i]] for i in members]
        numbers = np.delete(np.array(rows, np.uint32), [at] if carries else [], axis=1)
        head, tail = blank[:at], blank[at + carries :]
        yield _Group(head, tail, carries, numbers, tuple(members))


def _number(op: Op) -> int:
    value = getattr(op, _NUMBER.get(op.op, ""), 0)
    return value if isinstance(value, int) else 0


def _put(op: Op, number: Any) -> Op:
    """The op with another number, where it has one; a coordinate stays."""
    field = _NUMBER.get(op.op, "")
    is_number = isinstance(getattr(op, field, None), int)
    return replace(op, **{field: number}) if is_number else op


def _make_derive(
    groups: tuple[_Group, ...], *, impl: str, steps_per_epoch: int, window: int
) -> Callable[..., Any]:
    """(last, starts at `last`, first, steps) to keys, and the starts at `first`."""
    order = np.argsort([i for group in groups for i in group.members], kind="stable")
    size = min(_BLOCK, window)

    def derive(last: Any, starts: Any, first: Any, steps: Any) -> Any:
        advance = partial(advance_carry, steps=first - last)
        starts = [s if s is None else _each(advance, s, impl=impl) for s in starts]

        def block(i: Any, state: Any) -> Any:
            carried, out = state
            at = first + i * size + jnp.arange(size, dtype=jnp.int32)
            on, keys = [], []
            for group, start in zip(groups, carried, strict=True):
                after, here = _take_block(start, size=size, impl=impl)
                on.append(after)
                keys.append(_derive_tails(group, at, here, impl, steps_per_epoch))
            rows = jnp.concatenate(keys, axis=1)[:, order]
            put = jax.lax.dynamic_update_slice_in_dim
            return on, put(out, rows, i * size, 0)

        shapes = jax.eval_shape(lambda: _key_words(impl=impl))
        rows = -(-window // size) * size
        out = jnp.zeros((rows, len(order), *shapes.shape), jnp.uint32)
        count = (steps + size - 1) // size
        _, out = jax.lax.fori_loop(0, count, block, (starts, out))
        return out, starts

    return derive


def _derive_heads(group: _Group, *, impl: str) -> Any:
    """The keys that a group carries into step 0; None where no step is carried."""
    if not group.carries:
        return None

    def head(numbers: Any) -> Any:
        return derive_key(_fill(group.head, numbers), impl=impl)

    return _each(head, jnp.asarray(group.numbers[:, : len(group.head)]), impl=impl)


def _derive_tails(
    group: _Group, at: Any, here: Any, impl: str, steps_per_epoch: int
) -> UInt32[Array, "steps members words"]:
    numbers = jnp.asarray(group.numbers[:, len(group.head) :])

    def at_step(args: Any) -> Any:
        step, starts = args
        epoch = step // jnp.int32(steps_per_epoch)
        coordinates: dict[str, Any] = {Coordinate.STEP: step, Coordinate.EPOCH: epoch}

        def tail(args: Any) -> Any:
            ops, start = _fill(group.tail, args[0]), args[1]
            key = derive_key(ops, impl=impl, start=start, coordinates=coordinates)
            return jax.random.key_data(key)

        return _each(tail, (numbers, starts), impl=impl)

    return _each(at_step, (at, here), impl=impl)


def _take_block(start: Any, *, size: int, impl: str) -> tuple[Any, Any]:
    """Keys that are carried on after a block of steps, and those of its steps."""
    if start is None:
        return None, None

    def step(keys: Any, _: None) -> Any:
        here, on = _each(split_carry, keys, impl=impl)
        return on, here

    return jax.lax.scan(step, start, length=size)


def _fill(ops: tuple[Op, ...], numbers: Any) -> tuple[Op, ...]:
    index = numbers.astype(jnp.int32)
    filled = [
        _put(op, index[i] if _NUMBER.get(op.op) == "index" else numbers[i])
        for i, op in enumerate(ops)
    ]
    return tuple(filled)


def _each(function: Callable[[Any], Any], rows: Any, *, impl: str) -> Any:
    """`function` of each row; unsafe_rbg derives other keys under `vmap`."""
    if impl == Impl.UNSAFE_RBG:
        return jax.lax.map(function, rows)
    return jax.vmap(function)(rows)


def _key_words(*, impl: str) -> Any:
    return jax.random.key_data(derive_key((Op("seed", 0),), impl=impl))
