# SPDX-License-Identifier: Apache-2.0
"""Which runs can be lanes of one compiled program, and why others can't.

Two runs are of one family where their specs are the same but for what enters the
program as an input: seeds, and the numbers that `runner.compile` found by tracing.
Families whose programs come out alike, word for word, are one group; so a leaf that
the compiled program never sees (`eval.every`, `sinks`) parts no lanes, and nobody
has to list such leaves.
"""

import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from runner.compile import compile_run
from runner.hypers import OF_TRAIN, find_hypers, insert_hypers
from runner.parse import Frozen, Node, to_plain
from runner.probe.probe import Probe
from runner.program import Program
from runner.spec import ClassificationSpec, RunSpec

__all__ = ["Family", "Group", "Grouping", "explain", "find_differing", "group_runs"]

_MOST_REASONS = 3


@dataclass(frozen=True, eq=False)
class Family:
    """Runs whose specs differ in inputs of the program alone.

    Args:
        program: The first of them.
        numbers: They.
    """

    program: Program
    numbers: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that one compiled program serves; or one run by itself.

    Args:
        families: Runs whose programs are the same.
        alone: The run that can't be a lane, or None.
        why: Why it can't be.
    """

    families: tuple[Family, ...] = ()
    alone: Program | Probe | None = None
    number: int | None = None
    why: str = ""

    @property
    def numbers(self) -> tuple[int, ...]:
        """The runs."""
        if self.number is not None:
            return (self.number,)
        return tuple(sorted(n for family in self.families for n in family.numbers))

    @property
    def spec(self) -> RunSpec:
        """That of the first family, or of the run by itself."""
        program = self.alone or self.families[0].program
        return program.spec


@dataclass(frozen=True, eq=False)
class Grouping:
    """The groups of a sweep, and what keeps runs from being made at all.

    Args:
        groups: In the order of their first runs.
        errors: What was raised for a run, by its number.
    """

    groups: tuple[Group, ...]
    errors: Mapping[int, Exception] = field(default_factory=dict)


def group_runs(specs: Mapping[int, RunSpec]) -> Grouping:
    """Traces one run of each family, and compares the programs; compiles nothing.

    Args:
        specs: What is asked for, by number.
    """
    errors: dict[int, Exception] = {}
    groups: list[Group] = []
    alike: dict[str, list[Family]] = {}
    for numbers in _bucket(specs, {n: tuple(find_hypers(s)) for n, s in specs.items()}):
        try:
            for part in _make(specs, numbers):
                if isinstance(part, Group):
                    groups.append(part)
                else:
                    alike.setdefault(_digest(part.program), []).append(part)
        except Exception as error:  # what a model's code raises, too
            errors |= dict.fromkeys(numbers, error)
    groups += [Group(tuple(families)) for families in alike.values()]
    return Grouping(tuple(sorted(groups, key=lambda g: g.numbers[0])), errors)


def _make(
    specs: Mapping[int, RunSpec], numbers: tuple[int, ...]
) -> Iterator[Family | Group]:
    """The families of runs that differ in candidates alone: constants part them."""
    first = compile_run(specs[numbers[0]])
    why = _why_alone(first)
    if why:
        for n in numbers:
            made = first if n == numbers[0] else compile_run(specs[n])
            yield Group(alone=made, number=n, why=why)
        return
    assert isinstance(first, Program)
    for part in _bucket(
        {n: specs[n] for n in numbers}, dict.fromkeys(numbers, tuple(first.hypers))
    ):
        made = first if part[0] == numbers[0] else compile_run(specs[part[0]])
        assert isinstance(made, Program)
        yield Family(made, part)


def _why_alone(program: Program | Probe) -> str:
    if isinstance(program, Probe):
        return "a probe is one call"
    if program.layout.mesh is not None:
        return "its mesh takes all devices"
    return ""


def _bucket(
    specs: Mapping[int, RunSpec], inputs: Mapping[int, Collection[str]]
) -> Iterator[tuple[int, ...]]:
    """Runs that are equal without their inputs."""
    found: dict[RunSpec, list[int]] = {}
    for number, spec in specs.items():
        found.setdefault(_blank(spec, inputs[number]), []).append(number)
    for numbers in found.values():
        yield tuple(numbers)


def _blank(spec: RunSpec, inputs: Collection[str]) -> RunSpec:
    """A spec without its seeds, and without the numbers at some config paths."""
    zeros = dict.fromkeys(inputs, 0.0)
    task = spec.task
    if "task.label_smoothing" in zeros:
        assert isinstance(task, ClassificationSpec)
        task = replace(task, label_smoothing=0.0)
    given: dict[str, Any] = {n: 0.0 for n in OF_TRAIN if f"train.{n}" in zeros}
    streams = {
        name: replace(stream, seed=None if stream.seed is None else 0)
        for name, stream in spec.rng.streams.items()
    }
    return replace(
        spec,
        seed=0,
        rng=replace(spec.rng, seed=0, streams=Frozen(streams)),
        model=Node(insert_hypers(spec.model, zeros, path="model")),
        optimizer=Node(insert_hypers(spec.optimizer, zeros, path="optimizer")),
        task=task,
        train=replace(spec.train, **given),
    )


def _digest(program: Program) -> str:
    """SHA-256 hex of all that is compiled, and of how arrays go in and come out."""
    digest = hashlib.sha256()
    for lowered in program.lowered:
        for text in (lowered.as_text(), str(lowered.in_tree), str(lowered.out_tree)):
            digest.update(text.encode())
    return digest.hexdigest()


def explain(group: Group, first: Group) -> str:
    """Why the runs of a group are not lanes of the first one's program.

    In words: the leaves that are constants of both programs, and differ.
    """
    if group.why or first.why:
        return group.why or first.why
    paths = [g.families[0].program.hypers for g in (group, first)]
    inputs = [p for p in paths[0] if p in paths[1]]
    here, there = (
        dict(_leaves(to_plain(_blank(g.spec, inputs)))) for g in (group, first)
    )
    differing = [p for p in {**here, **there} if here.get(p) != there.get(p)]
    shown = [
        f"{p} ({_spell(here.get(p))}, not {_spell(there.get(p))})"
        for p in differing[:_MOST_REASONS]
    ]
    more = len(differing) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def find_differing(specs: Collection[RunSpec]) -> tuple[str, ...]:
    """Config paths of the leaves that are not the same in all of some runs."""
    flat = [dict(_leaves(to_plain(spec))) for spec in specs]
    paths = dict.fromkeys(path for each in flat for path in each)
    return tuple(p for p in paths if any(e.get(p) != flat[0].get(p) for e in flat))


def _spell(value: Any) -> str:
    return "null" if value is None else str(value)


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, child in value.items():
            yield from _leaves(child, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and value:
        for i, child in enumerate(value):
            yield from _leaves(child, f"{path}[{i}]")
    else:
        yield path, value
