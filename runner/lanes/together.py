# SPDX-License-Identifier: Apache-2.0
"""Lanes that are computed together: `vmap` over the compiled programs of a group.

Each lane runs the loop of a run alone, in a thread of its own, and calls what stands
here for its programs. The last lane that calls runs the call of all; the states stay
on the device, stacked, and a lane gets a view of its own. When few lanes are left, and
it pays, they move to programs of fewer lanes.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np

from runner.lanes.stacked import Stacked
from runner.program import Calls
from runner.step import State

__all__ = ["Together"]


class Together:
    """Lanes that wait for each other before each call.

    Args:
        stacked: Their programs; those of fewer lanes, once most have ended.
        steps: At which each of them ends, if not before; at most as many lanes as the
            width of the programs.
        why: Why their floats are not those of the runs alone.
    """

    def __init__(self, stacked: Stacked, *, steps: Sequence[int], why: str) -> None:
        self.stacked, self.why = stacked, why
        self._steps = steps
        self._slots = {n: n for n in range(len(steps))}  # of the lanes that are live
        self._asked: dict[int, _Request] = {}
        self._answers: dict[int, Any] = {}
        self._turn = threading.Condition()
        self._error: BaseException | None = None
        self.state: Any = None
        self._keys: Any = None
        self._hypers: Any = None

    def place(self, lane: int) -> "_Place":
        """What a lane calls."""
        return _Place(self, lane)

    def leave(self, lane: int) -> None:
        """A lane has ended: nobody waits for it any more."""
        with self._turn:
            del self._slots[lane]
            self._run_when_all_asked()

    def ask(self, lane: int, request: "_Request") -> Any:
        """Waits until every lane asks for something; what the call gives this lane.

        Raises:
            Exception: the call of all lanes raised.
        """
        with self._turn:
            self._asked[lane] = request
            self._run_when_all_asked()
            while lane not in self._answers and self._error is None:
                self._turn.wait()
            if self._error is not None:
                raise self._error
            return self._answers.pop(lane)

    def slot(self, lane: int) -> int:
        """Where a lane lies in the arrays of all."""
        return self._slots[lane]

    def _run_when_all_asked(self) -> None:
        if not self._slots or self._asked.keys() != self._slots.keys():
            return
        asked, self._asked = self._asked, {}
        alike: dict[tuple[str, tuple[int, ...]], dict[int, _Request]] = {}
        for lane, request in asked.items():
            alike.setdefault((request.kind, request.at), {})[lane] = request
        try:
            if all(kind == "train" for kind, _ in alike):
                self._move(asked)  # nobody has sums of an evaluation, of this width
            for (kind, _), requests in alike.items():
                self._answers |= getattr(self, f"_{kind}")(requests)
        except BaseException as error:  # of the device: no lane can go on
            self._error = error
        self._turn.notify_all()

    def _move(self, asked: Mapping[int, "_Request"]) -> None:
        """To programs of the lanes that are left, if that pays.

        What it depends on is known beforehand or computed, never timed: floats round
        otherwise from here on, and must do so whenever the sweep is run.
        """
        left = max(self._steps[n] - request.at[0] for n, request in asked.items())
        narrower = self.stacked.narrower(len(asked), steps=left)
        if narrower is None:
            return
        lanes = sorted(asked)
        slots = np.array([self._slots[n] for n in lanes])
        whole = (self.state, self._keys, self._hypers)
        self.state, self._keys, self._hypers = _get(whole, slots)
        self._slots = {lane: slot for slot, lane in enumerate(lanes)}
        self.stacked = narrower

    def _setup(self, asked: Mapping[int, "_Request"]) -> dict[int, Any]:
        seeds, hypers = (self._stack(asked, i) for i in (0, 1))
        (state, keys), _ = self.stacked.calls.setup(seeds, hypers)
        self.state, self._keys, self._hypers = state, keys, hypers
        return {n: ((_State(self, n), None), None) for n in asked}

    def _train(self, asked: Mapping[int, "_Request"]) -> dict[int, Any]:
        for lane, request in asked.items():
            self._put(lane, request.args[0])
        slots = [self._slots[n] for n in asked]
        takes = np.isin(np.arange(self.stacked.width), slots)
        rows = self._stack(asked, 1, "rows")
        first, *_ = asked.values()
        window = {**first.args[1], "rows": rows}
        self.state, metrics, failed = self.stacked.calls.train(
            self.state, takes, window, first.args[2], self._keys, self._hypers
        )
        fetched = _Fetched((metrics, failed))
        return {n: (_State(self, n), *fetched.of(self._slots[n])) for n in asked}

    def _evaluate(self, asked: Mapping[int, "_Request"]) -> dict[int, Any]:
        first, *_ = asked.values()
        before = first.args[0]
        sums = {
            name: value.whole
            if isinstance(value, _Slice)
            else np.zeros(self.stacked.width, np.float32)
            for name, value in before.items()
        }
        after, _ = self.stacked.calls.evaluate(
            sums, self.state, first.args[2], first.args[3], self._keys, self._hypers
        )
        fetched = _Fetched(after)
        return {n: (fetched.of(self._slots[n]), None) for n in asked}

    def _digest(self, asked: Mapping[int, "_Request"]) -> dict[int, Any]:
        fetched = _Fetched(self.stacked.calls.digest(self.state))
        return {n: fetched.of(self._slots[n]) for n in asked}

    def _stack(self, asked: Mapping[int, "_Request"], i: int, name: str = "") -> Any:
        """An argument of all lanes; those that did not ask are given some lane's."""
        given = {
            self._slots[n]: r.args[i][name] if name else r.args[i]
            for n, r in asked.items()
        }
        some = next(iter(given.values()))
        every = [given.get(slot, some) for slot in range(self.stacked.width)]
        return jax.tree.map(lambda *each: np.stack(each), *every)

    def _put(self, lane: int, state: Any) -> None:
        """A state from elsewhere, where a lane goes on from a checkpoint."""
        if not isinstance(state, _State):
            self.state = _set(self.state, self._slots[lane], state)


@partial(jax.jit, donate_argnums=0)
def _set(stacked: Any, slot: Any, state: Any) -> Any:
    return jax.tree.map(lambda all_, one: all_.at[slot].set(one), stacked, state)


@jax.jit
def _get(stacked: Any, slot: Any) -> Any:
    """Of one slot, or of several."""
    return jax.tree.map(lambda all_: all_[slot], stacked)


@dataclass(frozen=True)
class _Request:
    """A call that a lane asks for; those of one kind, at one place, are one call."""

    kind: str
    args: tuple[Any, ...]
    at: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Place:
    """What a lane calls in place of compiled programs of its own."""

    together: Together
    lane: int

    @property
    def calls(self) -> Calls:
        return Calls(self._setup, self._train, self._evaluate, self._digest)

    @property
    def window(self) -> int:
        return self.together.stacked.window

    @property
    def why(self) -> str:
        return self.together.why

    def _setup(self, *args: Any) -> Any:
        return self._ask("setup", args)

    def _train(self, *args: Any) -> Any:
        window = args[1]
        return self._ask("train", args, (int(window["first"]), int(window["steps"])))

    def _evaluate(self, *args: Any) -> Any:
        return self._ask("evaluate", args, (int(args[2]["part"]),))

    def _digest(self, *args: Any) -> Any:
        return self._ask("digest", args)

    def _ask(self, kind: str, args: tuple[Any, ...], at: tuple[int, ...] = ()) -> Any:
        return self.together.ask(self.lane, _Request(kind, args, at))


class _State:
    """A lane's state, as a view of the stacked one; sliced when it is looked at."""

    def __init__(self, together: Together, lane: int) -> None:
        self._together, self._lane = together, lane

    def __getattr__(self, name: str) -> Any:
        whole, slot = self._together.state, self._together.slot(self._lane)
        if name in State._fields:
            return _get(getattr(whole, name), slot)
        return getattr(_get(whole, slot), name)


class _Fetched:
    """What a call gave to all lanes, copied from the device once for all."""

    def __init__(self, tree: Any) -> None:
        self.tree = tree
        self._lock = threading.Lock()
        for leaf in jax.tree.leaves(tree):
            leaf.copy_to_host_async()

    def of(self, slot: int) -> Any:
        """The same tree, of one lane."""
        leaves, structure = jax.tree.flatten(self.tree)
        own = [_Slice(self, i, slot) for i in range(len(leaves))]
        return jax.tree.unflatten(structure, own)

    @cached_property
    def _arrays(self) -> list[np.ndarray]:
        return [np.asarray(leaf) for leaf in jax.tree.leaves(self.tree)]

    def array(self, leaf: int) -> np.ndarray:
        """One of its arrays, on the host."""
        with self._lock:
            return self._arrays[leaf]


@dataclass(frozen=True)
class _Slice:
    """A lane's part of an array of all lanes; `jax.device_get` asks for the array."""

    fetched: _Fetched
    leaf: int
    slot: int

    @property
    def whole(self) -> Any:
        """Of all lanes, on the device."""
        return jax.tree.leaves(self.fetched.tree)[self.leaf]

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        return np.asarray(self.fetched.array(self.leaf)[self.slot])
