# SPDX-License-Identifier: Apache-2.0
"""The pictures of a sweep that are no curves over steps."""

from typing import TYPE_CHECKING

from runner.report.charts import is_wide, number_axis
from runner.report.drawing import INK, PAPER, STYLES, draw
from runner.report.sweep_charts import Parallel, Points, Series
from runner.sinks.text import clean

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_parallel", "draw_points"]

_SOFT, _STRONG, _BEST = (0.62, 0.66, 0.72), (0.16, 0.42, 0.72), "#e07a2f"


def draw_points(chart: Points) -> str:
    """The drawing as an `<svg>` element."""

    def paint(axes: "Axes") -> None:
        for series, (color, _) in zip(chart.series, STYLES, strict=False):
            _paint_series(axes, series, color=color)
        x, y = zip(*(at for series in chart.series for at in series.jobs), strict=True)
        if is_wide(x):
            axes.set_xscale("log")
            number_axis(axes.xaxis)
        if is_wide(y):
            axes.set_yscale("log")
            number_axis(axes.yaxis)
        axes.set_xlabel(clean(chart.field))
        axes.set_ylabel(clean(chart.series[0].metric))
        axes.grid(alpha=0.18, color=INK, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)

    return draw(paint, size=(6.4, 3.0))


def _paint_series(axes: "Axes", series: Series, *, color: str) -> None:
    if not series.jobs:
        return
    x, y = zip(*series.jobs, strict=True)
    axes.scatter(x, y, s=14, color=color, alpha=0.35, linewidths=0)
    if series.means:
        at, mean, deviation = zip(*series.means, strict=True)
        bars = deviation if any(deviation) else None
        axes.errorbar(
            at, mean, yerr=bars, color=color, lw=1.4, marker="o", ms=4, capsize=3
        )


def draw_parallel(chart: Parallel) -> str:
    """The drawing as an `<svg>` element; the best setting stands out."""
    width = max(6.4, 1.6 * len(chart.names))

    def paint(axes: "Axes") -> None:
        for heights, heat in zip(chart.lines, chart.heat, strict=True):
            mixed = tuple(
                a + (b - a) * heat for a, b in zip(_SOFT, _STRONG, strict=True)
            )
            is_best = heights is chart.lines[-1]
            axes.plot(
                range(len(heights)),
                heights,
                color=_BEST if is_best else mixed,
                alpha=1.0 if is_best else 0.25 + 0.6 * heat,
                lw=2.4 if is_best else 1.1,
            )
        for i, (name, ticks) in enumerate(zip(chart.names, chart.ticks, strict=True)):
            axes.plot((i, i), (-0.02, 1.02), color=INK, lw=0.8)
            axes.text(i, 1.06, clean(name), ha="center", va="bottom", fontsize=9)
            for height, word in ticks:
                box = {"fc": PAPER, "ec": "none", "alpha": 0.75, "pad": 0.6}
                axes.text(i + 0.03, height, word, va="center", fontsize=7.5, bbox=box)
        axes.set_xlim(-0.2, len(chart.names) - 0.6)
        axes.set_ylim(-0.05, 1.14)
        axes.set_axis_off()

    return draw(paint, size=(width, 3.4))
