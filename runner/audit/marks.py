# SPDX-License-Identifier: Apache-2.0
"""Flax module paths in the name stack of a traced program.

Flax writes a module's own name there, which leaves open where the module stands: a
lifted module is named twice, a method stands beside its module. While a program is
traced for an audit, whole paths are written instead:

    module@layers:Dropout_0@    within this module
    fork@layers@                the next call may be of a trace that modules share
    make_rng@Dropout_0@layers:Dropout_0@1@    hashed names, module path, count
"""

import re
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import quote, unquote

__all__ = [
    "OPTIMIZER",
    "Here",
    "Mark",
    "Path",
    "mark_fork",
    "mark_make_rng",
    "mark_module",
    "read_marks",
]

Path = tuple[str, ...]

OPTIMIZER: Path = ("optimizer",)
"""The path of what an optimizer draws."""


@dataclass(frozen=True)
class Mark:
    """What a scope of the name stack says.

    Args:
        kind: `module`, `fork` or `make_rng`.
        path: Module path, from the root.
        names: Of a `make_rng`: the part of the path that is hashed.
        count: Of a `make_rng`: calls of the module so far, this one included.
    """

    kind: str
    path: Path
    names: Path = field(default=())
    count: int = 0


def mark_module(path: Path) -> str:
    """Name of the scope in which a module runs."""
    return f"module@{_spell(path)}@"


def mark_fork(path: Path) -> str:
    """Name of the scope in which a module calls a trace that it may share."""
    return f"fork@{_spell(path)}@"


def mark_make_rng(names: Path, path: Path, count: int) -> str:
    """Name of the scope in which one call of `make_rng` folds its number in."""
    return f"make_rng@{_spell(names)}@{_spell(path)}@{count}@"


_MARK = re.compile(r"(module|fork)@([^@/]*)@|make_rng@([^@/]*)@([^@/]*)@(\d+)@")


def read_marks(stack: Any) -> tuple[Mark, ...]:
    """The marks on a name stack, outermost first."""
    return tuple(
        Mark(kind, _read(path))
        if kind
        else Mark("make_rng", _read(at), _read(names), int(count))
        for kind, path, names, at, count in _MARK.findall(str(stack))
    )


def _spell(path: Path) -> str:
    # A transform puts brackets around a name, and slashes stand between names.
    return ":".join(quote(part, safe="") for part in path)


def _read(text: str) -> Path:
    return tuple(map(unquote, text.split(":"))) if text else ()


@dataclass(frozen=True)
class Here:
    """Where in a program the walk over it is.

    Args:
        path: Module path.
        shared: (path in a trace that modules share, path of this module).
        within: Axes of the loops and meshes around.
        mesh: (name of a mesh axis, its axis) of each mesh around.
        branches: Each `cond` around, by number, and the branch.
        box: Where on the axes around the branches are taken.
        again: Whether this is computed again, for a gradient.
    """

    path: Path = ()
    shared: tuple[Path, Path] | None = None
    within: tuple[str, ...] = ()
    mesh: tuple[tuple[str, str], ...] = ()
    branches: tuple[tuple[int, int], ...] = ()
    box: tuple[tuple[str, int, int | None], ...] = ()
    again: bool = False

    def at(self, eqn: Any) -> "Here":
        """The place of an equation within, by its name stack."""
        text = str(eqn.source_info.name_stack)
        if not text:
            return self
        again = self.again or "rematted_computation" in text or "transpose(" in text
        marks = [mark for mark in read_marks(text) if mark.kind != "make_rng"]
        path = self.place(marks[-1].path) if marks else self.path
        return replace(self, path=path, again=again)

    def place(self, path: Path) -> Path:
        """A path that a shared trace has, as it is here."""
        old, new = self.shared or ((), ())
        return (*new, *path[len(old) :]) if path[: len(old)] == old else path

    def call(self, eqn: Any, body: Any) -> "Here":
        """Within a call; several modules may share the trace of its body."""
        marks = read_marks(eqn.source_info.name_stack)
        if not marks or marks[-1].kind != "fork":
            return self
        for inner in body.eqns:
            for mark in read_marks(inner.source_info.name_stack):
                if mark.kind == "module":
                    return replace(self, shared=(mark.path, self.path))
        return self
