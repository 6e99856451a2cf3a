# SPDX-License-Identifier: Apache-2.0
"""Rules for keys: none is drawn from twice, whichever way it is derived.

R001, R002, R003, R008, R011, R014, R015. `runner.hazards.meet` says where keys can be
equal; here stands which of that is a hazard, and what to change.
"""

import itertools
import re
from collections.abc import Iterator

from runner.audit.lifted import Rule
from runner.audit.marks import OPTIMIZER
from runner.audit.trace import NOT_THERE
from runner.hazards.hazard import Hazard, error
from runner.hazards.meet import SplitRule, meet
from runner.hazards.places import Place, pairs_that_may_meet
from runner.ops import Op
from runner.program import Compiled
from runner.spec import Coordinate, Impl, Phase, Strategy

__all__ = ["find_key_hazards"]


def find_key_hazards(program: Compiled, places: tuple[Place, ...]) -> Iterator[Hazard]:
    """What is wrong with the keys that a program draws from."""
    traced = tuple(place for place in places if place.is_traced)
    yield from _find_meetings(program, traced)
    yield from _find_same_at_every_index(program, traced)
    yield from _find_repeats(program, places)
    yield from _find_strangers(program, places)


def _find_meetings(program: Compiled, places: tuple[Place, ...]) -> Iterator[Hazard]:
    """R001, R008, R015: two draws whose keys are equal somewhere in the run."""
    order = {id(place): i for i, place in enumerate(places)}
    for pair in pairs_that_may_meet(places):
        if _exclude(*pair) or not meet(pair[0].links, pair[1].links):
            continue
        a, b = sorted(pair, key=lambda place: order[id(place)])
        stream, draws = f"rng.streams.{a.draw.stream}", (str(a), str(b))
        if a.phase != b.phase:
            what = f"{a.phase} and {b.phase} draw from one key"
            fix = f"Give {stream}.phases one of them, and the other a stream of its own"
            yield error("R015", stream, what, fix, draws=draws)
        elif names := _collide(a.ops, b.ops):
            yield _same_number(a, b, names, separated=program.spec.rng.fix_separator)
        elif _written(a.ops) == _written(b.ops):
            what = "one key is drawn from twice"
            fix = "Call make_rng once for each draw, or split its key"
            yield error("R001", stream, what, fix, draws=draws)
        else:
            what = f"two derivations meet: {_why_met(a, b)}"
            fix = "Derive both by fold_in, or draw from two streams"
            yield error("R008", stream, what, fix, draws=draws)


def _same_number(
    a: Place, b: Place, names: tuple[str, str], *, separated: bool
) -> Hazard:
    """R001, R008: two paths, or two names of streams, that give one number."""
    stream, draws = f"rng.streams.{a.draw.stream}", (str(a), str(b))
    texts = ["".join(place.draw.path) for place in (a, b)]
    if not separated and texts[0] == texts[1] and a.draw.call == b.draw.call:
        what = "two paths have one key: Flax joins the names in them"
        fix = "Set rng.fix_separator=true, or rename a module"
        return error("R001", stream, what, fix, draws=draws)
    what = f"{names[0]} and {names[1]} have one hash, and so one key"
    return error("R008", stream, what, "Rename one of them", draws=draws)


def _exclude(a: Place, b: Place) -> bool:
    """Whether two draws are in different branches of one `cond`.

    Where their keys differ by the turn of a loop, other turns may take other branches.
    """
    taken = dict(a.draw.branches)
    apart = any(taken.get(cond, branch) != branch for cond, branch in b.draw.branches)
    return (
        a.phase == b.phase
        and apart
        and (a.ops == b.ops or not (a.draw.axes or b.draw.axes))
    )


def _written(ops: tuple[Op, ...]) -> tuple[object, ...]:
    """The ops without what their axes are called."""
    return tuple((op.op, op.of, len(op.axes), _written(op.body)) for op in ops)


def _collide(a: tuple[Op, ...], b: tuple[Op, ...]) -> tuple[str, str] | None:
    """The two names in derivations that differ in nothing but a name."""
    if [op.value for op in a] != [op.value for op in b] or _written(a) != _written(b):
        return None
    pairs = ((x.why, y.why) for x, y in zip(a, b, strict=True))
    named = [pair for pair in pairs if pair[0] != pair[1] and all(map(_is_name, pair))]
    return named[0] if named else None


def _is_name(why: str) -> bool:
    return why.startswith(("path ", "stream "))


def _why_met(a: Place, b: Place) -> str:
    if not any(op.op in ("split", "carry", "repeat") for op in (*a.ops, *b.ops)):
        return "both fold the same numbers in"
    if a.rule is SplitRule.INDEX:
        return "split(key, n)[i] is the same for any n"
    if a.rule is SplitRule.COUNT:
        return "split(key, 1)[0] is fold_in(key, 1)"
    return "split(key, n)[i] is fold_in(key, i) for any n"


def _find_same_at_every_index(
    program: Compiled, places: tuple[Place, ...]
) -> Iterator[Hazard]:
    """R001, R003, R008: one key for every index of a loop, or for two of them."""
    for place in places:
        stream, draws = f"rng.streams.{place.draw.stream}", (str(place),)
        shared = [c for c in place.crossings if c.rule is Rule.SHARED]
        ignored = [c for c in place.crossings if c.rule is Rule.IGNORED and c.indexed]
        for crossing in ignored:
            what = f"one key at every index of {crossing.axis}: its body closes over"
            what = f"{what} the module outside, which the lift doesn't reach"
            fix = "Draw from the module that the body is given"
            yield error("R001", stream, what, fix, draws=draws)
        known = sum(c.loops for c in (*shared, *ignored))  # those are R009
        axes = [axis for axis, size in place.draw.within if size != 1]
        known_axes = (*place.indexed_by, *program.spec.mesh.axes)
        axes = [axis for axis in axes if axis not in known_axes]
        loops = [axis for axis in axes if _is_loop(axis)]
        if shards := [axis for axis in axes if axis not in loops]:
            what = f"one key on every shard of {shards[-1]}"
            fix = "Fold jax.lax.axis_index in, or split the key over the mesh"
            yield error("R003", stream, what, fix, draws=draws)
        if len(loops) > known:
            what = f"one key at every index of {loops[-1]}"
            fix = "Fold the index in, or split the key along it"
            yield error("R001", stream, what, fix, draws=draws)
        if place.repeats:
            yield _repeats(place, stream)


def _is_loop(axis: str) -> bool:
    """Whether an axis is one of a loop or a `vmap`, and not of a mesh."""
    return re.split(r"[:#\[]", axis)[0] in ("scan", "while", "condition", "vmap")


def _repeats(place: Place, stream: str) -> Hazard:
    if place.rule is SplitRule.INDEX:
        what = "folds commute under unsafe_rbg, so that two indices get one key"
        fix = "Set rng.impl=threefry2x32"
        return error("R008", stream, what, fix, draws=(str(place),))
    what = "two indices fold the same number in"
    fix = "Fold each index in by itself"
    return error("R001", stream, what, fix, draws=(str(place),))


def _find_repeats(program: Compiled, places: tuple[Place, ...]) -> Iterator[Hazard]:
    """R002, R003: a key that comes again at the next step, or for other rows."""
    counts = {Phase.TRAIN: program.sizes.microbatches}
    counts[Phase.EVAL] = program.sizes.eval_batches
    for name, phase in itertools.product(program.plan.streams, counts):
        here = [
            place
            for place in places
            if place.phase is phase and place.draw.stream == name
        ]
        draws, path = tuple(map(str, here)), f"rng.streams.{name}.per"
        if not here:
            continue
        coordinates = program.plan.streams[name].spec.per
        repeats = phase is Phase.TRAIN and program.steps > 0
        if repeats and Coordinate.STEP not in coordinates:
            what = "the key is the same at every step"
            yield error("R002", path, what, f"Add step to {path}", draws=draws)
        yield from _find_same_on_shards(program, tuple(here), path)
        if counts[phase] > 1 and Coordinate.MICROBATCH not in coordinates:
            parts = (
                "microbatches" if phase is Phase.TRAIN else "batches of an evaluation"
            )
            what = f"the key is the same for {counts[phase]} {parts}"
            yield error("R003", path, what, f"Add microbatch to {path}", draws=draws)


def _find_same_on_shards(
    program: Compiled, places: tuple[Place, ...], path: str
) -> Iterator[Hazard]:
    """R003: one key on shards of the run's own mesh that hold other rows.

    An optimizer sees the gradient of all rows, which is the same on each shard.
    """
    mesh = program.spec.mesh
    if mesh.strategy is not Strategy.SHARD_MAP:
        return
    axis = mesh.rules.get("batch")
    if axis is None or mesh.axes[axis] == 1:
        return
    same = [p for p in places if axis not in p.indexed_by and p.draw.path != OPTIMIZER]
    if same:
        what = f"the key is the same on the {mesh.axes[axis]} shards of {axis}, "
        what = f"{what}which hold different rows"
        yield error(
            "R003", path, what, f"Add {axis} to {path}", draws=tuple(map(str, same))
        )


def _find_strangers(program: Compiled, places: tuple[Place, ...]) -> Iterator[Hazard]:
    """R011, R014: draws that depend on the layout, or come from no stream."""
    for place in places:
        if place.draw.stream is None and place.draw.untraced != NOT_THERE:
            source = place.draw.untraced
            what = f"draws from a key of no declared stream: {source}"
            part, fix = "model", "Draw from make_rng of a declared stream"
            if place.draw.path == OPTIMIZER:
                part, fix = "optimizer", "Use one that draws nothing"
            yield error("R014", part, what, fix, draws=(str(place),))
        spread = program.spec.mesh.strategy is not Strategy.NONE
        if spread and program.spec.rng.impl is not Impl.THREEFRY2X32:
            what = "draws on a mesh depend on the layout"
            fix = "Set rng.impl=threefry2x32"
            yield error("R011", "rng.impl", what, fix, draws=(str(place),))
        mapped = any(name.startswith("vmap") for name, _ in place.draw.axes)
        if mapped and program.spec.rng.impl is not Impl.THREEFRY2X32:
            what = "draws under vmap depend on the layout"
            fix = "Set rng.impl=threefry2x32"
            yield error("R011", "rng.impl", what, fix, draws=(str(place),))
