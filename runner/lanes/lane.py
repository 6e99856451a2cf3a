# SPDX-License-Identifier: Apache-2.0
"""One run of several that share their compiled programs.

    lane(spec) = program, with the seeds, numbers and order of rows of `spec`

All that a lane does not share enters the compiled program as an input, so a lane has
the keys, and where it is called by itself the bits, of the run alone.
"""

import threading
from dataclasses import dataclass, field
from typing import Any, Protocol

from runner.compile import load_rows, make_order
from runner.data import Dataset
from runner.hypers import find_hypers
from runner.keys import KeyPlan, plan_keys
from runner.program import Calls, Program
from runner.spec import RunSpec
from runner.step import Batch

__all__ = ["Executable", "Lane", "Place", "make_lane"]


class Executable:
    """The compiled programs of a group; whoever asks first compiles them.

    Args:
        program: The run that they are compiled for.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self._lock = threading.Lock()
        self._placed: dict[int, tuple[Dataset, tuple[Batch, Batch]]] = {}

    @property
    def calls(self) -> Calls:
        """The programs; others who ask wait for the one who compiles."""
        with self._lock:
            return self.program.calls

    @property
    def window(self) -> int:
        """Most steps in one call of them."""
        return self.program.window

    def place(self, lane: Program) -> tuple[Batch, Batch]:
        """A lane's rows on the device: once for all lanes that read the same."""
        with self._lock:
            if id(lane.data) not in self._placed:
                placed = Program.place_data(lane)
                self._placed[id(lane.data)] = (lane.data, placed)
            return self._placed[id(lane.data)][1]


class Place(Protocol):
    """A lane's place among those that are computed together."""

    @property
    def calls(self) -> Calls:
        """What stands for the compiled programs; waits for the other lanes."""

    @property
    def window(self) -> int:
        """Steps in one call: the same in all lanes."""

    @property
    def why(self) -> str:
        """Why its floats are not those of the run alone."""


@dataclass(frozen=True, eq=False)
class Lane(Program):
    """A run whose compiled programs are others', too.

    Args:
        executable: They.
        place: Its place among lanes that are computed together; None where it calls
            the programs by itself.
    """

    executable: Executable = field(kw_only=True)
    place: Place | None = field(kw_only=True, default=None)

    @property
    def calls(self) -> Calls:
        """The programs of the group."""
        return (self.place or self.executable).calls

    @property
    def window(self) -> int:
        """Most steps in one call: also more than the run takes."""
        return (self.place or self.executable).window

    def place_data(self) -> tuple[Batch, Batch]:
        """The rows to train on, and those to be tested on, on the device."""
        return self.executable.place(self)

    @property
    def is_paced(self) -> bool:
        """Lanes that are computed together take as many steps as each other."""
        return self.place is None and super().is_paced

    @property
    def rounding(self) -> str:
        """Why floats may round otherwise than in the run alone."""
        return self.place.why if self.place else ""


def make_lane(program: Program, spec: RunSpec, executable: Executable) -> Lane:
    """A run that differs from another one in the inputs of its program alone.

    Args:
        program: The other run.
        spec: What is asked for; as `runner.lanes.groups` finds, of the same family.
        executable: The programs that it is run by.
    """
    plan = plan_keys(spec.rng, axes=spec.mesh.axes)
    wanted = _rows_of(spec, plan)
    data = next(
        (
            known.data
            for known in (executable.program, program)
            if _rows_of(known.spec, known.plan) == wanted
        ),
        None,
    )
    if data is None:
        data = load_rows(spec, plan)
    found: dict[str, Any] = find_hypers(spec)
    return Lane(
        spec=spec,
        plan=plan,
        data=data,
        order=make_order(spec, plan, rows=len(data.x_train)),
        model=program.model,
        hypers={path: found[path] for path in program.hypers},
        baked=program.baked,
        traces=program.traces,
        seeds=program.seeds,
        keys=program.keys,
        layout=program.layout,
        executable=executable,
    )


def _rows_of(spec: RunSpec, plan: KeyPlan) -> Any:
    """What rows depend on: their source, and the stream that chooses the test rows."""
    name = getattr(spec.data, "split", None)
    return spec.data, plan.stream(name) if name else None
