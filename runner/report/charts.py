# SPDX-License-Identifier: Apache-2.0
"""Curves over steps. No word of a record gets into a drawing: names stand around it."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runner.report.curves import Curve, thin
from runner.report.drawing import INK, draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Chart", "Line", "draw_chart", "is_wide", "number_axis"]

_MARKED = 40  # points; a curve of more needs no dots
_LARGEST = 1e100
_SPREAD = 50.0  # largest by smallest value from which an axis is logarithmic,
_EVEN = 0.8  # unless half of them lie above this share of it: they are even as they are


@dataclass(frozen=True)
class Line:
    """A curve, and how it is drawn.

    Args:
        name: What it is; the page says it.
        curve: Steps and values.
        color, dash: One of `STYLES`.
        band: Half the height of a band around it, at each of its steps.
    """

    name: str
    curve: Curve
    color: str
    dash: str
    band: tuple[float, ...] = ()


@dataclass(frozen=True)
class Chart:
    """Curves over steps, in one drawing.

    Args:
        title: What it shows; the page says it.
        lines: The curves.
    """

    title: str
    lines: tuple[Line, ...]


def draw_chart(chart: Chart) -> str:
    """The drawing as an `<svg>` element."""
    return draw(lambda axes: _paint(axes, chart.lines), size=(6.4, 3.0))


def _paint(axes: "Axes", lines: Iterable[Line]) -> None:
    from matplotlib.ticker import MaxNLocator

    lines = tuple(lines)
    for line in lines:
        steps, values = thin(line.curve)
        numbers = list(map(_drawn, values))
        axes.plot(
            steps,
            numbers,
            color=line.color,
            linestyle=line.dash,
            linewidth=1.4,
            marker="o" if len(steps) <= _MARKED else None,
            markersize=3.0,
        )
        if line.band:
            by_step = dict(zip(line.curve[0], line.band, strict=True))
            pairs = [(v, by_step[s]) for s, v in zip(steps, numbers, strict=True)]
            low, high = [v - b for v, b in pairs], [v + b for v, b in pairs]
            axes.fill_between(steps, low, high, color=line.color, alpha=0.15, lw=0)
    if is_wide(value for line in lines for value in line.curve[1]):
        axes.set_yscale("log")
        number_axis(axes.yaxis)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
    axes.set_xlabel("step")
    axes.grid(alpha=0.18, color=INK, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def number_axis(axis: object) -> None:
    """Spells the numbers of a logarithmic axis out."""
    from matplotlib.axis import Axis
    from matplotlib.ticker import FuncFormatter

    assert isinstance(axis, Axis)
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def is_wide(values: Iterable[float | None]) -> bool:
    """Whether values are better shown on a logarithmic axis."""
    known = sorted(v for v in map(_drawn, values) if not math.isnan(v))
    if not known or known[0] <= 0 or known[-1] / known[0] <= _SPREAD:
        return False
    middle = math.log(known[len(known) // 2] / known[0])
    return middle < _EVEN * math.log(known[-1] / known[0])


def _drawn(value: float | None) -> float:
    """What no axis can hold is a gap."""
    return math.nan if value is None or abs(value) > _LARGEST else value
