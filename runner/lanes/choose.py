# SPDX-License-Identifier: Apache-2.0
"""Whether the lanes of a group are computed beside each other, or together.

What is faster depends on the model, the number of lanes and the device, so both are
measured, on the real programs and for a few steps, where there is enough to be won.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from runner.errors import in_one_line
from runner.lanes.lane import Executable, Lane
from runner.lanes.mode import Mode, Options
from runner.lanes.pool import free_bytes
from runner.lanes.stacked import Stacked
from runner.program import Construct
from runner.spec import Determinism, Impl

__all__ = ["Chosen", "choose", "why_not_together"]

_LEAST = 8  # lanes of a group for which a second program may pay
_WORTH = 6.0  # seconds of training that are left, for each that measuring takes
_GAIN = 0.8  # of the time: what other rounding has to win
_RECORD = (
    0.25  # seconds of a lane's record, which mapped lanes write while others train
)
_SECONDS = 0.2  # of a measurement
_GLANCE = 0.05  # of one that says whether others are worth it
_COMPARED = 8  # steps after which floats are compared
_MEMORY = 0.5  # of what is free


@dataclass(frozen=True)
class Chosen:
    """How the lanes of a group are computed.

    Args:
        mode: `map` or `vmap`.
        stacked: The programs of `vmap`.
        workers: How many threads call them.
        why: Of `vmap`, what its floats differ by from those of the runs alone; of
            `map`, why it can't be the other one.
    """

    mode: Mode
    stacked: Stacked | None = None
    workers: int = 1
    why: str = ""


def why_not_together(lanes: Sequence[Lane]) -> str:
    """Why lanes can't be computed together; empty where they can."""
    first = lanes[0]
    if first.construct is not Construct.LOOP:
        return "convolutions on CPU are slow together"
    if first.spec.rng.observe:
        return "keys of lanes together can't be observed"
    if first.spec.rng.impl is not Impl.THREEFRY2X32:
        return f"rng.impl {first.spec.rng.impl} draws other bits under vmap"
    if any(lane.data is not first.data for lane in lanes):
        return "they read other rows"
    return ""


def choose(lanes: Sequence[Lane], *, options: Options, workers: int) -> Chosen:
    """Measures what has to be measured, and decides.

    Args:
        lanes: Those of one group.
        options: What the user wants.
        workers: How many threads call a program that is not stacked.
    """
    strict = any(lane.spec.determinism is Determinism.STRICT for lane in lanes)
    if options.mode is Mode.MAP or len(lanes) == 1:
        return Chosen(Mode.MAP)
    if options.mode is Mode.AUTO and (strict or len(lanes) < _LEAST):
        return Chosen(Mode.MAP)
    if why := why_not_together(lanes):
        return Chosen(Mode.MAP, why=why)
    try:
        return _weigh(lanes, options=options, workers=workers)
    except Exception as error:  # of a lane's own code: by itself, it will say so
        return Chosen(Mode.MAP, why=in_one_line(error))


def _weigh(lanes: Sequence[Lane], *, options: Options, workers: int) -> Chosen:
    """Compiles for all, and times both if it is left to us."""
    executable = lanes[0].executable
    begun = time.perf_counter()
    _ = executable.calls
    compiled = time.perf_counter() - begun
    stacks = workers if jax.default_backend() == "cpu" else 1
    width = _width(executable, len(lanes), workers=stacks, options=options)
    stacked = Stacked(executable, width=width)
    if options.mode is Mode.AUTO:
        if width < 2:
            return Chosen(Mode.MAP)
        takes = [_Alone(lane).take for lane in lanes[:workers]]
        steps, record = sum(n.spec.train.steps for n in lanes), _RECORD * len(lanes)
        seconds = _measure(takes, spent=_GLANCE) / len(takes)
        if steps * seconds < _WORTH * max(compiled, 1.0) + record:
            return Chosen(Mode.MAP)
        seconds = _measure(takes) / len(takes)
        groups = [_Stack(stacked, lanes[i::stacks]) for i in range(stacks)]
        ours = _measure([group.take for group in groups])
        ours /= sum(min(width, len(group.lanes)) for group in groups)
        if steps * ours + record > _GAIN * steps * seconds:
            return Chosen(Mode.MAP)
    return Chosen(Mode.VMAP, stacked, stacks, _compare(stacked, lanes))


def _width(
    executable: Executable, lanes: int, *, workers: int, options: Options
) -> int:
    """Lanes of one call: all, spread over the threads, or as many as fit."""
    train: Any = executable.calls.train  # a `jax.stages.Compiled`
    memory = train.memory_analysis()
    each = 1 if memory is None else memory.output_size_in_bytes * 2
    each += 0 if memory is None else memory.temp_size_in_bytes
    free = _MEMORY * free_bytes(options.processes or 1)
    fit = int(free / max(each, 1) / workers)
    all_ = -(-lanes // workers)
    most = all_ if options.max_lanes is None else options.max_lanes // workers
    return max(1, min(all_, fit, most))


def _measure(takes: Sequence[Callable[[], int]], *, spent: float = _SECONDS) -> float:
    """Seconds of a step, of calls that threads make beside each other."""
    with ThreadPoolExecutor(len(takes)) as pool:
        list(pool.map(lambda take: take(), takes))  # the first call is slower
        begun, steps = time.perf_counter(), 0
        while (seconds := time.perf_counter() - begun) < spent:
            steps += next(iter(list(pool.map(lambda take: take(), takes))))
    return seconds / steps


class _Alone:
    """A few steps of a run that is not recorded, by the programs of the group."""

    def __init__(self, lane: Lane) -> None:
        self.lane, self.calls = lane, lane.executable.calls
        (self.state, self.keys), _ = self.calls.setup(*_arguments(lane))
        self.hypers = _arguments(lane)[1]
        self.data, _ = lane.place_data()

    def take(self, steps: int = _COMPARED) -> int:
        window = _window(self.lane, steps, size=self.lane.executable.window)
        self.state, self.rows, _ = self.calls.train(
            self.state, window, self.data, self.keys, self.hypers
        )
        jax.block_until_ready(self.state)
        return steps


class _Stack:
    """The same of lanes together."""

    def __init__(self, stacked: Stacked, lanes: Sequence[Lane]) -> None:
        filled = [lanes[i % len(lanes)] for i in range(stacked.width)]
        self.stacked, self.lanes, self._filled = stacked, lanes, filled
        seeds, self.hypers = _stack([_arguments(lane) for lane in filled])
        (self.state, self.keys), _ = stacked.calls.setup(seeds, self.hypers)
        self.data, _ = lanes[0].place_data()

    def take(self, steps: int = _COMPARED) -> int:
        windows = [_window(n, steps, size=self.stacked.window) for n in self._filled]
        rows = _stack([window["rows"] for window in windows])
        takes = np.ones(self.stacked.width, np.bool_)
        self.state, self.rows, _ = self.stacked.calls.train(
            self.state,
            takes,
            {**windows[0], "rows": rows},
            self.data,
            self.keys,
            self.hypers,
        )
        jax.block_until_ready(self.state)
        return steps


def _arguments(lane: Lane) -> tuple[Any, Any]:
    seeds = {name: np.uint32(s.seed) for name, s in lane.plan.streams.items()}
    return seeds, {path: jnp.asarray(value) for path, value in lane.hypers.items()}


def _window(lane: Lane, steps: int, *, size: int) -> dict[str, Any]:
    steps = min(steps, size)
    numbers = lane.order.indices(0, steps=steps)
    rows = np.zeros((size, numbers.shape[1]), np.int32)
    rows[:steps] = numbers
    return {"first": np.int32(0), "rows": rows, "steps": np.int32(steps)}


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *each: np.stack(each), *trees)


def _compare(stacked: Stacked, lanes: Sequence[Lane]) -> str:
    """What the floats of the first lane differ by after a few steps, in words."""
    alone, together = _Alone(lanes[0]), _Stack(stacked, lanes[:1])
    alone.take()
    together.take()
    trees = [alone.state.params, jax.tree.map(lambda a: a[0], together.state.params)]
    pairs = [jax.tree.leaves(jax.device_get(tree)) for tree in trees]
    largest = max(
        (float(np.max(np.abs(a - b))) / max(float(np.max(np.abs(a))), 1e-30), a.size)
        for a, b in zip(*pairs, strict=True)
    )[0]
    return (
        f"computed with {stacked.width - 1} other lanes by vmap: after {_COMPARED} "
        f"steps parameters differed from the run alone by up to {largest:.1g} of the "
        "largest of their array"
    )
