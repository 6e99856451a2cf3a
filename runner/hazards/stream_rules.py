# SPDX-License-Identifier: Apache-2.0
"""Rules for streams: each is declared, drawn from, and reaches what asks for it.

R004, R005, R006, R007, R009, R010, R012, R013.
"""

import itertools
import re
from collections.abc import Iterator
from typing import Any

from runner.audit.lifted import Crossing, Rule
from runner.audit.trace import Missing
from runner.errors import did_you_mean
from runner.hazards.hazard import Hazard, error, warning
from runner.hazards.meet import link_ops, split_rule
from runner.hazards.places import Place
from runner.hypers import find_hypers
from runner.keys import Stream
from runner.lift.fields import find_lifts
from runner.program import Compiled
from runner.spec import Derive, Phase, StreamKind

__all__ = ["find_stream_hazards"]


def find_stream_hazards(
    program: Compiled, places: tuple[Place, ...]
) -> Iterator[Hazard]:
    """What is wrong with the streams of a program, and where it asks for them."""
    yield from _find_missing(program)
    yield from _find_unused(program, places)
    yield from _find_equal(program)
    yield from _find_bad_seeds(program)
    yield from _find_unsplit(program, places)
    yield from _find_evaluated(program, places)


def _find_missing(program: Compiled) -> Iterator[Hazard]:
    """R004, R010: a stream that a module asks for and doesn't get."""
    streams = program.plan.streams
    for (name, kept_out), found in _missing(program).items():
        draws = tuple(f"{phase} {'/'.join(m.path) or '(root)'}" for phase, m in found)
        draws = tuple(dict.fromkeys(draws))
        is_fatal = not all(m.substituted for _, m in found)
        instead = "" if is_fatal else ": Flax takes params"
        if kept_out is not None and name in streams:
            path, fix = _split_field(program, kept_out, name)
            what = f"{name} is drawn from inside {kept_out.axis}, which doesn't"
            what = f"{what} mention it{instead}"
            yield error("R010", path, what, fix, draws=draws, is_fatal=is_fatal)
        elif is_fatal or program.spec.rng.fallback == "error":
            what = f"the model asks for {name!r}, which is not declared{instead}"
            phases = list(dict.fromkeys(str(phase) for phase, _ in found))
            per = ", per: [step, microbatch]" if phases != ["init"] else ""
            fix = f"Set +rng.streams.{name}={{phases: [{', '.join(phases)}]{per}}}"
            fix = did_you_mean(name, streams) or fix
            path = "rng.streams"
            yield error("R004", path, what, fix, draws=draws, is_fatal=is_fatal)


def _missing(program: Compiled) -> dict[Any, list[tuple[Phase, Missing]]]:
    """Where what was missing, by stream and the lift that kept it out."""
    found: dict[Any, list[tuple[Phase, Missing]]] = {}
    for phase, trace in program.traces.items():
        for missing in trace.missing:
            key = (missing.stream, missing.lift)
            found.setdefault(key, []).append((phase, missing))
    return found


def _find_unsplit(program: Compiled, places: tuple[Place, ...]) -> Iterator[Hazard]:
    """R009: one key for every index of a lift.

    In an initialisation that is how variables are shared, unless they are stacked.
    """
    warned: dict[tuple[str, Crossing], list[str]] = {}
    for place in places:
        for crossing in place.crossings:
            matters = crossing.stacks or place.phase is not Phase.INIT
            if crossing.rule is Rule.SHARED and matters:
                key = (str(place.draw.stream), crossing)
                warned.setdefault(key, []).append(str(place))
    for (name, crossing), where in warned.items():
        path, fix = _split_field(program, crossing, name)
        what = f"{name} is drawn from inside {crossing.axis}, which doesn't split it"
        what = f"{what}: every index gets one key"
        draws = tuple(dict.fromkeys(where))
        yield warning("R009", path, what, fix, draws=draws)


def _split_field(program: Compiled, lift: Crossing, name: str) -> tuple[str, str]:
    """Config path of what a lift does to a stream, and how to have it split."""
    found = _lift_paths(program, lift)
    if len(found) != 1:
        return "model", f"Say split_rngs={{{name!r}: True}} in its nn.{lift.kind}"
    if not lift.indexed:
        return f"{found[0]}.rngs", f"Let {found[0]}.rngs include {name}"
    path = f"{found[0]}.split_rngs.{name}"
    dotted = path.replace("[", ".").replace("]", "")  # as Hydra takes it
    add = "+" if lift.rule is Rule.ABSENT else ""
    return path, f"Set {add}{dotted}=true"


def _lift_paths(program: Compiled, lift: Crossing) -> list[str]:
    """Config paths of the lifts that it may be; one where that is clear."""
    kinds = [lift.kind, *(["remat_scan"] if lift.kind in ("scan", "remat") else [])]
    names: dict[str, str | None] = {}
    same: list[str] = []
    for path, kind, name in find_lifts(program.spec.model, path="model"):
        # A lift of a lift is called as the one around it.
        names[path] = name or names.get(path.removesuffix(".module"))
        same += [path] if kind in kinds else []
    last = lift.path[-1] if lift.path else None
    found = [path for path in same if last is not None and names[path] == last] or same
    around = {re.sub(r"(\.module)+$", "", path) for path in found}
    return found[lift.number - 1 : lift.number] if len(around) == 1 else found


def _find_unused(program: Compiled, places: tuple[Place, ...]) -> Iterator[Hazard]:
    """R005, R012: a stream, or a dropout rate, without a draw."""
    drawn = {place.draw.stream for place in places}
    for name, stream in program.plan.streams.items():
        if stream.spec.kind is StreamKind.JAX and name not in drawn:
            path = f"rng.streams.{name}"
            what, fix = "nothing draws from this stream", f"Remove it: '~{path}'"
            yield warning("R005", path, what, fix)
    rates = [
        path
        for path, value in find_hypers(program.spec).items()
        if path.rsplit(".", 1)[-1] in ("rate", "dropout_rate") and value > 0
    ]
    trains = Phase.TRAIN in program.traces
    if rates and trains and not any(place.phase is Phase.TRAIN for place in places):
        what = "a rate above 0, and nothing is drawn in training"
        fix = "See that the model passes deterministic=False on"
        yield warning("R012", rates[0], what, fix)


def _find_equal(program: Compiled) -> Iterator[Hazard]:
    """R006: two streams that start from one key."""
    rule = split_rule(program.spec.rng)
    bases = {
        name: link_ops(stream.base, sizes={}, rule=rule)
        for name, stream in program.plan.streams.items()
        if stream.spec.kind is StreamKind.JAX
    }
    for (a, first), (b, second) in itertools.combinations(bases.items(), 2):
        if first == second:
            pair = program.plan.streams[a], program.plan.streams[b]
            what = f"starts from the key of {a}"
            yield warning("R006", f"rng.streams.{b}", what, _part(*pair))


def _part(a: Stream, b: Stream) -> str:
    """How to have two streams start from other keys."""
    if a.spec.derivation is b.spec.derivation is Derive.NAME:
        return f"Rename {b.name}: both names have one hash"
    return f"Set ++rng.streams.{b.name}.derive=name, or another seed"


def _find_bad_seeds(program: Compiled) -> Iterator[Hazard]:
    """R007: a seed that is another one modulo 2^32."""
    spec = program.spec
    root = "seed" if spec.seed == spec.rng.seed else "rng.seed"
    seeds = {root: spec.rng.seed}
    for name, stream in spec.rng.streams.items():
        if stream.seed is not None:
            seeds[f"rng.streams.{name}.seed"] = stream.seed
    for path, seed in seeds.items():
        if seed != seed % 2**32:
            kind = "a negative seed" if seed < 0 else "a seed above 4294967295"
            what = f"{kind} is the same as {seed % 2**32} (got {seed})"
            yield error("R007", path, what, "Set it to a number from 0 to 4294967295")


def _find_evaluated(program: Compiled, places: tuple[Place, ...]) -> Iterator[Hazard]:
    """R013: an evaluation that draws from a stream which isn't for it."""
    found: dict[str, list[str]] = {}
    for place in places:
        name = place.draw.stream
        if place.phase is not Phase.EVAL or name is None:
            continue
        if Phase.EVAL not in program.plan.streams[name].spec.phases:
            found.setdefault(name, []).append(str(place))
    for name, draws in found.items():
        path = f"rng.streams.{name}.phases"
        what = "the evaluation draws from it, and eval is not among its phases"
        fix = f"Add eval to {path}, or see that the model is deterministic there"
        yield warning("R013", path, what, fix, draws=tuple(draws))
