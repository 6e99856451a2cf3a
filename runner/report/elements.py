# SPDX-License-Identifier: Apache-2.0
"""Parts of a page of HTML; every word of a record is escaped."""

import html
from collections.abc import Iterable, Sequence

from runner.report.charts import Chart, draw_chart
from runner.report.drawing import STYLES
from runner.report.sweep_charts import HeatMap, Parallel, Points
from runner.report.sweep_drawings import draw_parallel, draw_points
from runner.report.table import Table, Weight
from runner.sinks.text import clean

__all__ = [
    "chart",
    "figures",
    "heading",
    "heat_figure",
    "parallel_figure",
    "points_figure",
    "section",
    "table",
    "words",
]

_HEAT = "59, 130, 196"  # a color that both inks can be read on, up to this share of it
_MOST_HEAT = 0.7


def words(text: str) -> str:
    """Text of a record: what does not print is an escape, what is markup is text."""
    return html.escape(clean(text), quote=True)


def heading(text: str) -> str:
    """The title of a part."""
    return f"<h2>{words(text)}</h2>"


def section(title: str, inner: str, *, folded: bool) -> str:
    """A part with its title; folded, it is one of many."""
    if folded:
        summary = f"<summary>{words(title)}</summary>"
        return f'<details class="run">\n{summary}\n{inner}\n</details>'
    return f"<section>\n{heading(title)}\n{inner}\n</section>"


def table(content: Table) -> str:
    """A table, folded where it is one that is read when it is asked for."""
    caption = f"<caption>{words(content.caption)}</caption>"
    head = "".join(f'<th scope="col">{words(name)}</th>' for name in content.columns)
    head = f"<thead><tr>{head}</tr></thead>" if any(content.columns) else ""
    rows = "\n".join(map(_row, content.rows))
    inner = f"<table>\n{caption}\n{head}\n<tbody>\n{rows}\n</tbody>\n</table>"
    inner = f'<div class="scroll">\n{inner}\n</div>'
    if content.weight is Weight.OPEN:
        return inner
    summary = f"<summary>{words(content.caption)}</summary>"
    return f"<details>\n{summary}\n{inner}\n</details>"


def _row(cells: Sequence[str]) -> str:
    first, *rest = map(words, cells)
    others = "".join(f"<td>{cell}</td>" for cell in rest)
    return f'<tr><th scope="row">{first}</th>{others}</tr>'


def figures(drawn: Iterable[str]) -> str:
    """Figures beside each other, as many as there is room for."""
    inner = "\n".join(drawn)
    return f'<div class="charts">\n{inner}\n</div>' if inner else ""


def chart(content: Chart) -> str:
    """Curves, with a legend."""
    marks = "".join(
        _mark(line.name, color=line.color, dash=line.dash) for line in content.lines
    )
    names = ", ".join(line.name for line in content.lines)
    label = f"{content.title} over steps: {names}"
    caption = f'{words(content.title)}<ul class="legend">{marks}</ul>'
    return _figure(draw_chart(content), caption=caption, label=label)


def _mark(name: str, *, color: str, dash: str) -> str:
    """A line of a legend."""
    style = f"border-top-style: {dash}; border-top-color: {color}"
    return f'<li><span style="{style}"></span>{words(name)}</li>'


def points_figure(content: Points) -> str:
    """The objective against a number."""
    first, *more = content.series
    title = f"{first.metric} by {content.field}"
    said = "a dot for each job"
    said += "; mean and deviation" if first.means else ""
    marks = "".join(
        _mark(series.metric, color=color, dash="solid")
        for series, (color, _) in zip(content.series, STYLES, strict=False)
        if more
    )
    caption = f'{words(title)}<ul class="legend">{marks}<li>{said}</li></ul>'
    return _figure(draw_points(content), caption=caption, label=title)


def parallel_figure(content: Parallel, *, paths: Sequence[str]) -> str:
    """Settings as lines through all fields."""
    title = f"{content.names[-1]} of each setting"
    legend = f"<li>{words(', '.join(paths))}</li><li>the best one in orange</li>"
    caption = f'{words(title)}<ul class="legend">{legend}</ul>'
    svg = draw_parallel(content)
    return _figure(svg, caption=caption, label=title, kind="wide")


def heat_figure(content: HeatMap, *, metric: str) -> str:
    """Means by two fields, as a colored table."""
    title = f"{metric}, mean by {content.rows} (down) and {content.columns} (across)"
    head = "".join(f'<th scope="col">{words(v)}</th>' for v in content.column_values)
    rows = "\n".join(
        f'<tr><th scope="row">{words(value)}</th>'
        f"{''.join(map(_heat_cell, cells, heats))}</tr>"
        for value, cells, heats in zip(
            content.row_values, content.cells, content.heat, strict=True
        )
    )
    legend = '<ul class="legend"><li>the stronger the better</li></ul>'
    inner = (
        f'<table class="heat">\n<thead><tr><td></td>{head}</tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody>\n</table>"
    )
    caption = f"<figcaption>{words(title)}{legend}</figcaption>"
    return (
        f'<figure class="wide">\n{caption}\n<div class="scroll">{inner}</div></figure>'
    )


def _heat_cell(mean: float | None, heat: float | None) -> str:
    if mean is None or heat is None:
        return "<td></td>"
    style = f"background: rgba({_HEAT}, {_MOST_HEAT * heat:.3f})"
    kind = ' class="best"' if heat == 1.0 else ""
    return f'<td{kind} style="{style}">{mean:.4g}</td>'


def _figure(svg: str, *, caption: str, label: str, kind: str = "") -> str:
    drawn = svg.replace("<svg", f'<svg role="img" aria-label="{words(label)}"', 1)
    mark = f' class="{kind}"' if kind else ""
    return f"<figure{mark}>\n<figcaption>{caption}</figcaption>\n{drawn}\n</figure>"
