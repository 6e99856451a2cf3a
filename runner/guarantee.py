# SPDX-License-Identifier: Apache-2.0
"""The strongest promise that holds for a run, and why no stronger one does."""

from dataclasses import dataclass
from enum import StrEnum

import jax

from runner.program import Compiled, Construct

__all__ = ["Guarantee", "Level", "guarantee_of"]


class Level(StrEnum):
    """What a second run of the same config gives."""

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
    backend = jax.default_backend()
    if backend != "cpu":
        why = f"reductions and algorithm choice on {backend} may round otherwise"
        return Guarantee(Level.KEY_EXACT, (why,))
    reasons = ["on the same versions, vector width and size of XLA's thread pool"]
    if program.construct is Construct.STEP:
        reasons.append("convolutions on CPU: steps are taken one by one")
    return Guarantee(Level.BIT_EXACT, tuple(reasons))
