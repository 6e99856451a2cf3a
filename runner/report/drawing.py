# SPDX-License-Identifier: Apache-2.0
"""Drawings as inline SVG, by matplotlib; equal drawings give equal bytes.

Text and axes take the page's color, so that they can be read on light and on dark.
What a record says is drawn as plain text if at all: never as math, and escaped.
"""

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["INK", "PAPER", "STYLES", "draw"]

_COLORS = (
    *("#3b82c4", "#e07a2f", "#3a9d5d", "#c9485b", "#8a63c7"),
    *("#9a6b4b", "#d16ba5", "#808080", "#a09a2c", "#2fa5b0"),
)
_DASHES = ("solid", "dashed", "dotted")
STYLES = tuple((color, dash) for dash in _DASHES for color in _COLORS)
INK = "#010203"  # stands for the page's text color until the drawing is done,
PAPER = "#030201"  # and this one for what is behind it


def draw(paint: Callable[["Axes"], None], *, size: tuple[float, float]) -> str:
    """An `<svg>` element without ids of its own but for its parts.

    Args:
        paint: Draws into the axes that it is given.
        size: Width and height in inches; the page scales it.
    """
    rules = {
        "svg.fonttype": "none",
        "svg.hashsalt": "runner",
        "font.size": 9.0,
        "text.parse_math": False,
        **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor"), INK),
        **dict.fromkeys(("xtick.color", "ytick.color"), INK),
    }
    with _quiet():
        import matplotlib.style

        with matplotlib.style.context(["default", rules]):
            return _inline(_render(paint, size))


def _render(paint: Callable[["Axes"], None], size: tuple[float, float]) -> str:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    paint(axes)
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    content = io.StringIO()
    undated: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(content, format="svg", metadata=undated)
    return content.getvalue()


def _inline(svg: str) -> str:
    """The element alone, sized by the page, with the page's color for ink."""
    svg = svg[svg.index("<svg") :].strip().replace(INK, "currentColor")
    svg = svg.replace(PAPER, "var(--paper)")
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
