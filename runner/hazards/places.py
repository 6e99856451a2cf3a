# SPDX-License-Identifier: Apache-2.0
"""Every place of a program that draws, with the derivation of its keys."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from runner.audit.lifted import Crossing
from runner.audit.trace import Draw
from runner.hazards.meet import Link, SplitRule, is_distinct, link_ops, split_rule
from runner.hazards.numbers import Number, overlap
from runner.ops import Op
from runner.program import Compiled
from runner.spec import Coordinate, Phase

__all__ = ["Place", "find_places", "pairs_that_may_meet"]


@dataclass(frozen=True)
class Place:
    """A draw with its whole derivation.

    Args:
        phase: Phase of the program that draws.
        draw: What the audit found.
        ops: From the seed to the key that is consumed.
        links: The same, to be compared.
        rule: What a split gives.
        sizes: How many values each coordinate and axis takes; None is unknown.
        crossings: Lifts of Flax around its `make_rng`, outermost first.
    """

    phase: Phase
    draw: Draw
    ops: tuple[Op, ...]
    links: tuple[Link, ...]
    rule: SplitRule
    sizes: Mapping[str, int | None]
    crossings: tuple[Crossing, ...]

    def __str__(self) -> str:
        return f"{self.phase} {'/'.join(self.draw.path) or '(root)'}"

    @property
    def is_traced(self) -> bool:
        """Whether its derivation is known."""
        return self.draw.stream is not None and not self.draw.untraced

    @cached_property
    def indexed_by(self) -> frozenset[str]:
        """The coordinates and axes that its key depends on."""
        coordinates = {op.coordinate for op in self.ops if op.coordinate}
        return frozenset(coordinates.union(*(op.axes for op in self.ops)))

    @property
    def repeats(self) -> bool:
        """Whether two indices may get one key, though the key depends on both."""
        return not is_distinct(self.links, rule=self.rule)


def find_places(program: Compiled) -> tuple[Place, ...]:
    """Every place that draws, in every phase."""
    return tuple(_find(program))


def _find(program: Compiled) -> Iterator[Place]:
    rule = split_rule(program.spec.rng)
    for phase, trace in program.traces.items():
        for draw in trace.draws:
            ops = draw.ops
            if draw.stream is not None:
                stream = program.plan.streams[draw.stream]
                ops = (*stream.ops(phase, program.coordinates[phase]), *ops)
            sizes: dict[str, int | None] = {**program.spec.mesh.axes}
            sizes |= {**_sizes(program, phase), **dict(draw.within), **dict(draw.axes)}
            call = (draw.stream, draw.path, draw.call)
            yield Place(
                phase=phase,
                draw=draw,
                ops=ops,
                links=link_ops(ops, sizes=sizes, rule=rule),
                rule=rule,
                sizes=sizes,
                crossings=trace.crossings.get(call, ()),
            )


def _sizes(program: Compiled, phase: Phase) -> dict[str, int]:
    """How many values each coordinate takes in the whole planned run."""
    steps = program.sizes.steps + (phase is Phase.EVAL)
    return {
        Coordinate.STEP: steps,
        Coordinate.EPOCH: -(-steps // program.sizes.steps_per_epoch),
        Coordinate.MICROBATCH: (
            program.sizes.eval_batches
            if phase is Phase.EVAL
            else program.sizes.microbatches
        ),
    }


def pairs_that_may_meet(places: tuple[Place, ...]) -> Iterator[tuple[Place, Place]]:
    """Pairs of places, but for those whose last numbers can't be equal.

    Most derivations end in the hash of a module path, so that few pairs are left.
    """
    by_last: dict[int, list[Place]] = {}
    ranges: list[Place] = []
    for place in places:
        last = place.links[-1]
        if last.body or last.number.terms:
            ranges.append(place)
        else:
            by_last.setdefault(last.number.offset % 2**32, []).append(place)
    for same in by_last.values():
        yield from ((a, b) for i, a in enumerate(same) for b in same[i + 1 :])
    for i, place in enumerate(ranges):
        last = place.links[-1]
        for number, same in by_last.items():
            if last.body or overlap(last.number, Number(number)):
                yield from ((place, each) for each in same)
        yield from ((place, each) for each in ranges[i + 1 :])
