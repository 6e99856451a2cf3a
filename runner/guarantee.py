# SPDX-License-Identifier: Apache-2.0
"""The strongest promise that holds for a run, and why no stronger one does.

level = the weakest of what the backend, its flags and the traced program allow

Reasons say what the level rests on, or what lowers it. Nothing is run to find it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import jax

from runner.audit.marks import OPTIMIZER
from runner.audit.trace import NOT_THERE, Draw
from runner.determinism import DETERMINISTIC_OPS
from runner.errors import ConfigError
from runner.machine import is_on, parse_flags, read_flags_text
from runner.program import Compiled, Construct, Program
from runner.spec import Determinism, Impl, Phase, RunSpec, Strategy

__all__ = [
    "Guarantee",
    "Level",
    "guarantee_of",
    "refuse_below_strict",
    "was_seen_exact",
]


class Level(StrEnum):
    """What a second run of the same config gives; the strongest first."""

    BIT_EXACT = "bit-exact"
    KEY_EXACT = "key-exact"
    STATISTICAL = "statistical"


@dataclass(frozen=True)
class Guarantee:
    """A level, and what it rests on."""

    level: Level
    reasons: tuple[str, ...]


def guarantee_of(program: Compiled) -> Guarantee:
    """What holds for a program on the devices of this process."""
    return _weakest(_find(program))


def refuse_below_strict(program: Compiled) -> None:
    """Stops a run that is to be strict, and whose bits can't be promised.

    Raises:
        ConfigError: `determinism` is strict, and the guarantee is not `bit-exact`.
    """
    if program.spec.determinism is not Determinism.STRICT:
        return
    lower = [one for one in _find(program) if one.level is not Level.BIT_EXACT]
    if lower:
        level, reasons = _weakest(lower).level, _weakest(lower).reasons
        raise ConfigError(
            "determinism",
            f"a bit-exact run is asked for, and this one is {level}: "
            + "; ".join(reasons),
            got="strict",
            fix="Change what lowers it, or set determinism=default",
        )


def _find(program: Compiled) -> list[Guarantee]:
    """What each part of a run allows by itself."""
    found = [_on_backend(jax.default_backend()), *_in_program(program)]
    floats = _weakest(found).level
    for phase, draw in _untraced(program):
        found.extend(_of_draw(program.spec, phase, draw, floats))
    return found


def _weakest(found: Sequence[Guarantee]) -> Guarantee:
    level = max((one.level for one in found), key=list(Level).index)
    reasons = dict.fromkeys(reason for one in found for reason in one.reasons)
    return Guarantee(level, tuple(reasons))


def _on_backend(backend: str) -> Guarantee:
    """What a backend allows, whatever the program is."""
    if backend == "cpu":
        why = "on the same versions, flags, vector width and size of XLA's thread pool"
        return Guarantee(Level.BIT_EXACT, (why,))
    if backend == "gpu" and is_on(parse_flags(read_flags_text()), DETERMINISTIC_OPS):
        why = (
            "on the same versions, flags, driver and kind of GPU, as XLA says of "
            f"--{DETERMINISTIC_OPS}; the runner was never tried on a GPU"
        )
        return Guarantee(Level.BIT_EXACT, (why,))
    why = f"reductions and algorithm choice on {backend} may round otherwise"
    return Guarantee(Level.KEY_EXACT, (why,))


def _in_program(program: Compiled) -> Iterator[Guarantee]:
    """What the primitives of a program, and its generator, allow."""
    if isinstance(program, Program) and program.rounding:
        yield Guarantee(Level.KEY_EXACT, (program.rounding,))
    if program.construct is Construct.STEP:
        why = "convolutions on CPU: steps are taken one by one"
        yield Guarantee(Level.BIT_EXACT, (why,))
    if program.spec.mesh.strategy is Strategy.EXACT:
        yield _of_exact(program.spec)
    elif program.spec.mesh.strategy is not Strategy.NONE:
        axes = " x ".join(f"{n} {axis}" for axis, n in program.spec.mesh.axes.items())
        count = jax.process_count()
        axes += f" in {count} processes" if count > 1 else ""
        why = f"on the same mesh ({axes}): another adds in another order"
        yield Guarantee(Level.BIT_EXACT, (why,))
    if program.spec.rng.impl is not Impl.THREEFRY2X32:
        impl = program.spec.rng.impl
        why = f"rng.impl {impl}: the bits of a key are the backend's own, and XLA's"
        yield Guarantee(Level.BIT_EXACT, (f"{why} next version may draw others",))
    names = {n for trace in program.traces.values() for n in trace.primitives}
    for name in sorted(filter(_is_foreign, names)):
        why = f"{name}: code outside the program computes part of it"
        yield Guarantee(Level.KEY_EXACT, (why,))


# Models whose bits were compared on 1, 2, 4 and 8 forced CPU devices, and were equal.
_SEEN_EXACT = frozenset(
    {
        *("models.CNN", "models.Dropout", "models.Flatten", "models.MLP"),
        *("models.ResidualMLPBlock", "models.Sequential", "flax.linen.Dense"),
    }
)


def was_seen_exact(spec: RunSpec) -> bool:
    """Whether the bits of `strategy: exact` are known to be the same on any mesh.

    That is, for models of the kinds that were compared, in float32, on CPU.
    """
    targets = {str(v) for name, v in _leaves(spec.model) if name == "_target_"}
    return (
        spec.mesh.strategy is Strategy.EXACT
        and spec.train.compute_dtype == "float32"
        and jax.default_backend() == "cpu"
        and targets <= _SEEN_EXACT
    )


def _of_exact(spec: RunSpec) -> Guarantee:
    """What a fixed order of all sums allows."""
    n, sizes = spec.train.accumulation_steps, spec.mesh.axes.items()
    axes = " x ".join(f"{size} {axis}" for axis, size in sizes)
    why = (
        f"on the same mesh ({axes}): whether another number of devices gives the same "
        "bits was not checked for such a model"
    )
    if was_seen_exact(spec):
        why = (
            f"on any number of devices that divides the {n} microbatches, and one size "
            "of the pool: seen for such models on 1, 2, 4 and 8 forced CPU devices"
        )
    return Guarantee(Level.BIT_EXACT, (why,))


def _is_foreign(primitive: str) -> bool:
    """Whether it brings values in that XLA does not compute.

    A debug callback returns none; whether an `io_callback` does is not in its name.
    """
    is_callback = "callback" in primitive and not primitive.startswith("debug_")
    return is_callback or primitive == "ffi_call"


def _untraced(program: Compiled) -> Iterator[tuple[Phase, Draw]]:
    for phase, trace in program.traces.items():
        for draw in trace.draws:
            if draw.untraced and draw.untraced != NOT_THERE:
                yield phase, draw


def _of_draw(
    spec: RunSpec, phase: Phase, draw: Draw, floats: Level
) -> Iterator[Guarantee]:
    """What a draw allows whose key the ledger can't derive.

    Its key may be made of a stream's and of floats that the program computes: where
    these may round otherwise, the key may be another one.
    """
    place = "optimizer" if draw.path == OPTIMIZER else "/".join(draw.path)
    place = f"{phase} {place or '(root)'}"
    if draw.stream is None:
        if not _is_of_config(spec, draw):
            why = f"{place} draws from a key that no declared stream gives"
            yield Guarantee(Level.STATISTICAL, (f"{why}: {draw.untraced}",))
    elif floats is not Level.BIT_EXACT:
        why = f"{place} draws from a key of {draw.stream} that the program makes"
        yield Guarantee(Level.STATISTICAL, (f"{why}: {draw.untraced}",))


def _is_of_config(spec: RunSpec, draw: Draw) -> bool:
    """Whether the config says what a draw of no stream is made from.

    So it is for an array that NumPy's legacy generator draws from a seed in the
    config, for optax's own noise, which keeps a key in its state that is made of its
    arguments, and for a constant key whose seed stands in the node. Any other may
    have come from a clock when the program was traced.
    """
    if draw.use.primitive.startswith("numpy."):
        return True
    node = spec.optimizer if draw.path == OPTIMIZER else spec.model
    leaves = list(_leaves(node))
    if draw.path == OPTIMIZER:
        targets = [str(value) for name, value in leaves if name == "_target_"]
        if all(target.startswith("optax.") for target in targets):
            return True
    seed = re.fullmatch(r"a constant in the model: key\((\d+)\)", draw.untraced)
    seeds = [str(v) for n, v in leaves if re.search("key|seed|rng", n.lower())]
    return seed is not None and seed[1] in seeds


def _leaves(node: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The values in a config node, each with the name that it stands under."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _leaves(value, str(key))
    elif isinstance(node, tuple):
        for value in node:
            yield from _leaves(value, name)
    else:
        yield name, node
