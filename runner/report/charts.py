# SPDX-License-Identifier: Apache-2.0
"""Curves as inline SVG, drawn by matplotlib; equal curves give equal bytes.

No word of a record reaches matplotlib: names stand in the page, around the drawing.
Text and axes take the page's color, so that they can be read on light and on dark.
"""

import contextlib
import io
import logging
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from runner.report.curves import Curve, thin

__all__ = ["STYLES", "Chart", "Line", "draw_chart"]

_COLORS = (
    *("#3b82c4", "#e07a2f", "#3a9d5d", "#c9485b", "#8a63c7"),
    *("#9a6b4b", "#d16ba5", "#808080", "#a09a2c", "#2fa5b0"),
)
_DASHES = ("solid", "dashed", "dotted")
STYLES = tuple((color, dash) for dash in _DASHES for color in _COLORS)
_INK = "#010203"  # stands for the page's text color until the drawing is done
_MARKED = 40  # points; a curve of more needs no dots
_LARGEST = 1e100
_SPREAD = 50.0  # largest by smallest value from which the axis is logarithmic


@dataclass(frozen=True)
class Line:
    """A curve, and how it is drawn.

    Args:
        name: What it is; the page says it.
        curve: Steps and values.
        color, dash: One of `STYLES`.
    """

    name: str
    curve: Curve
    color: str
    dash: str


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
    """The drawing as an `<svg>` element without ids of its own but for its parts."""
    rules = {
        "svg.fonttype": "none",
        "svg.hashsalt": "runner",
        "font.size": 9.0,
        **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor"), _INK),
        **dict.fromkeys(("xtick.color", "ytick.color"), _INK),
    }
    with _quiet():
        import matplotlib.style

        with matplotlib.style.context(["default", rules]):
            return _inline(_draw(chart.lines))


def _draw(lines: Sequence[Line]) -> str:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = Figure(figsize=(6.4, 3.0), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    for line in lines:
        steps, values = thin(line.curve)
        axes.plot(
            steps,
            list(map(_drawn, values)),
            color=line.color,
            linestyle=line.dash,
            linewidth=1.4,
            marker="o" if len(steps) <= _MARKED else None,
            markersize=3.0,
        )
    if _is_wide(value for line in lines for value in line.curve[1]):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
    axes.set_xlabel("step")
    axes.grid(alpha=0.18, color=_INK, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    content = io.StringIO()
    undated: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(content, format="svg", metadata=undated)
    return content.getvalue()


def _drawn(value: float | None) -> float:
    """What no axis can hold is a gap."""
    return math.nan if value is None or abs(value) > _LARGEST else value


def _is_wide(values: Iterable[float | None]) -> bool:
    known = [v for v in map(_drawn, values) if not math.isnan(v)]
    return bool(known) and min(known) > 0 and max(known) / min(known) > _SPREAD


def _inline(svg: str) -> str:
    """The element alone, sized by the page, with the page's color for ink."""
    svg = svg[svg.index("<svg") :].strip().replace(_INK, "currentColor")
    head, mark, body = svg.partition(">")
    box = re.search(r'viewBox="[^"]*"', head)
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    return f"<svg {box.group() if box else ''}{mark}{body}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps matplotlib from telling about its font cache, and about odd numbers."""
    log = logging.getLogger("matplotlib")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)
