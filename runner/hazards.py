# SPDX-License-Identifier: Apache-2.0
"""Key hazards of a program, found in its derivations before step 0.

A key is compared with every other key of the whole run by its derivation, not by
sampling. `fold_in(key, .)` is a bijection of a counter, so children of one key are
distinct when their numbers are; and under partitionable threefry
`split(key, n)[i]` is `fold_in(key, i)`, so that both are written as folds here. Two
derivations meet when they are equally long and the numbers at each place can be
equal. What follows from different parents may only collide by chance (2^-64).
"""

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from runner.audit import Draw
from runner.errors import HazardsRefusedError
from runner.hypers import find_hypers
from runner.keys import Op
from runner.program import Program
from runner.spec import Coordinate, Impl, Phase, StreamKind

__all__ = ["Hazard", "Severity", "find_hazards", "refuse_hazards"]


class Severity(StrEnum):
    """Whether a hazard stops a run."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True)
class Hazard:
    """One hazard.

    Args:
        code: `R001` to `R015`; `rng.allow` takes it.
        severity: An error stops the run unless its code is allowed.
        what: What is wrong, in words that follow the path.
        path: Config path to change.
        fix: One change that mends it.
        draws: Places in the program, as `train Dropout_0`.
    """

    code: str
    severity: Severity
    what: str
    path: str
    fix: str
    draws: tuple[str, ...] = ()

    def to_plain(self) -> dict[str, Any]:
        """As `run.json` and `plan --json` have it."""
        return {**asdict(self), "severity": str(self.severity)}

    def __str__(self) -> str:
        at = f" ({', '.join(self.draws)})" if self.draws else ""
        return f"{self.code}: {self.path}: {self.what}{at}. {self.fix}."


def refuse_hazards(hazards: tuple[Hazard, ...], *, allow: tuple[str, ...]) -> None:
    """Stops a run that has an error among its hazards.

    Raises:
        HazardsRefusedError: one that `rng.allow` does not name.
    """
    errors = [
        hazard
        for hazard in hazards
        if hazard.severity is Severity.ERROR and hazard.code not in allow
    ]
    if errors:
        codes = ",".join(sorted({hazard.code for hazard in errors}))
        lines = [str(hazard) for hazard in errors]
        hint = f"If that is meant, set rng.allow=[{codes}]."
        raise HazardsRefusedError("\n".join([*lines, hint]))


def find_hazards(program: Program) -> tuple[Hazard, ...]:
    """Every hazard of a program, in the order of their codes."""
    places = list(_places(program))
    found = [
        *_find_meetings(places),
        *_find_repeats(program, places),
        *_find_unused(program, places),
        *_find_equal_streams(program),
        *_find_strangers(program, places),
    ]
    return tuple(sorted(found, key=lambda hazard: (hazard.code, hazard.path)))


@dataclass(frozen=True)
class _Place:
    """A draw with its whole derivation, as written and as folds alone."""

    phase: Phase
    draw: Draw
    ops: tuple[Op, ...]
    folds: tuple[Any, ...]

    def __str__(self) -> str:
        return f"{self.phase} {'/'.join(self.draw.path) or '(root)'}"

    @property
    def is_traced(self) -> bool:
        return self.draw.stream is not None and not self.draw.untraced

    def depends_on(self, coordinate: Coordinate) -> bool:
        return coordinate in [op.coordinate for op in self.ops]


def _places(program: Program) -> Iterator[_Place]:
    for phase, trace in program.traces.items():
        for draw in trace.draws:
            ops = draw.ops
            if draw.stream is not None:
                stream = program.plan.streams[draw.stream]
                ops = (*stream.ops(phase, program.coordinates[phase]), *ops)
            sizes = {**_sizes(program, phase), **dict(draw.axes)}
            folds = tuple(_as_fold(op, sizes, program) for op in ops)
            yield _Place(phase, draw, ops, folds)


def _sizes(program: Program, phase: Phase) -> dict[str, int]:
    """How many values each coordinate takes in the whole planned run."""
    steps = program.spec.train.steps + (phase is Phase.EVAL)
    return {
        Coordinate.STEP: steps,
        Coordinate.EPOCH: -(-steps // program.order.steps_per_epoch),
        Coordinate.MICROBATCH: (
            program.eval_batches
            if phase is Phase.EVAL
            else program.spec.train.accumulation_steps
        ),
    }


def _as_fold(op: Op, sizes: dict[str, int], program: Program) -> Any:
    """(kind, numbers): the numbers are a range of those that the op may take."""
    rng = program.spec.rng
    counts = rng.impl is Impl.THREEFRY2X32 and rng.partitionable
    if op.op == "split":
        kind = "fold" if counts else f"split {op.of}"
        return kind, _numbers(op.index, sizes)
    if op.op == "fold_in":
        return "fold", _numbers(op.coordinate or op.value, sizes)
    if op.op == "carry":  # by its first link, to 0 (drawn) or 1 (carried on)
        return ("fold" if counts else "split 2"), range(2)
    return "seed", _numbers(op.value, sizes)


def _numbers(value: int | str, sizes: dict[str, int]) -> range:
    if isinstance(value, str):
        return range(sizes[value])
    return range(value, value + 1)


def _meet(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return len(a) == len(b) and all(
        one[0] == other[0]
        and max(one[1][0], other[1][0]) <= min(one[1][-1], other[1][-1])
        for one, other in zip(a, b, strict=True)
    )


def _exclude(a: Draw, b: Draw) -> bool:
    """Whether two draws are in different branches of one `cond`."""
    taken = dict(a.branches)
    return any(taken.get(cond, branch) != branch for cond, branch in b.branches)


def _written(ops: tuple[Op, ...]) -> tuple[Any, ...]:
    return tuple((op.op, op.value, op.index, op.of) for op in ops)


def _find_meetings(places: list[_Place]) -> Iterator[Hazard]:
    """R001, R008, R015: two draws whose keys are equal somewhere in the run."""
    traced = [place for place in places if place.is_traced]
    for a, b in itertools.combinations(traced, 2):
        if not _meet(a.folds, b.folds) or _exclude(a.draw, b.draw):
            continue
        stream, draws = f"rng.streams.{a.draw.stream}", (str(a), str(b))
        if a.phase != b.phase:
            what = f"{a.phase} and {b.phase} draw from one key"
            fix = f"Give {stream}.phases one of them, and the other a stream of its own"
            yield Hazard("R015", Severity.ERROR, what, stream, fix, draws)
        elif _written(a.ops) == _written(b.ops):
            what = "one key is drawn from twice"
            fix = "Call make_rng once for each draw, or split its key"
            yield Hazard("R001", Severity.ERROR, what, stream, fix, draws)
        else:
            what = "two derivations meet: split(key, n)[i] is fold_in(key, i) for any n"
            fix = "Derive both by fold_in, or draw from two streams"
            yield Hazard("R008", Severity.ERROR, what, stream, fix, draws)


def _find_repeats(program: Program, places: list[_Place]) -> Iterator[Hazard]:
    """R002, R003: a key that comes again at the next step, or for other rows."""
    counts = {Phase.TRAIN: program.spec.train.accumulation_steps}
    counts[Phase.EVAL] = program.eval_batches
    for name, phase in itertools.product(program.plan.streams, counts):
        here = [
            place
            for place in places
            if place.phase is phase and place.draw.stream == name
        ]
        draws, path = tuple(map(str, here)), f"rng.streams.{name}.per"
        if not here:
            continue
        if phase is Phase.TRAIN and not here[0].depends_on(Coordinate.STEP):
            what = "the key is the same at every step"
            fix = f"Add step to {path}"
            yield Hazard("R002", Severity.ERROR, what, path, fix, draws)
        if counts[phase] > 1 and not here[0].depends_on(Coordinate.MICROBATCH):
            parts = (
                "microbatches" if phase is Phase.TRAIN else "batches of an evaluation"
            )
            what = f"the key is the same for {counts[phase]} {parts}"
            fix = f"Add microbatch to {path}"
            yield Hazard("R003", Severity.ERROR, what, path, fix, draws)


def _find_unused(program: Program, places: list[_Place]) -> Iterator[Hazard]:
    """R005, R012: a stream, or a dropout rate, without a draw."""
    drawn = {place.draw.stream for place in places}
    for name, stream in program.plan.streams.items():
        if stream.spec.kind is StreamKind.JAX and name not in drawn:
            path = f"rng.streams.{name}"
            what, fix = "nothing draws from this stream", f"Remove it: '~{path}'"
            yield Hazard("R005", Severity.WARNING, what, path, fix)
    rates = [
        path
        for path, value in find_hypers(program.spec).items()
        if path.rsplit(".", 1)[-1] in ("rate", "dropout_rate") and value > 0
    ]
    if rates and not any(place.phase is Phase.TRAIN for place in places):
        what = "a rate above 0, and nothing is drawn in training"
        fix = "See that the model passes deterministic=False on"
        yield Hazard("R012", Severity.WARNING, what, rates[0], fix)


def _find_equal_streams(program: Program) -> Iterator[Hazard]:
    """R006: two streams that start from one key."""
    bases = {
        name: tuple(_as_fold(op, {}, program) for op in stream.base)
        for name, stream in program.plan.streams.items()
        if stream.spec.kind is StreamKind.JAX
    }
    for (a, first), (b, second) in itertools.combinations(bases.items(), 2):
        if first == second:
            what = f"starts from the key of {a}"
            fix = f"Set rng.streams.{b}.derive=name, or another seed"
            yield Hazard("R006", Severity.WARNING, what, f"rng.streams.{b}", fix)


def _find_strangers(program: Program, places: list[_Place]) -> Iterator[Hazard]:
    """R011, R014: draws that depend on the layout, or come from no stream."""
    for place in places:
        if place.draw.stream is None:
            what = "draws from a key of no declared stream"
            fix = "Draw from make_rng of a declared stream"
            yield Hazard("R014", Severity.ERROR, what, "model", fix, (str(place),))
        mapped = any(name.startswith("vmap") for name, _ in place.draw.axes)
        if mapped and program.spec.rng.impl is not Impl.THREEFRY2X32:
            what = "draws under vmap depend on the layout"
            fix = "Set rng.impl=threefry2x32"
            yield Hazard("R011", Severity.ERROR, what, "rng.impl", fix, (str(place),))
