# SPDX-License-Identifier: Apache-2.0
"""One page of HTML: no script, nothing from elsewhere, every word escaped."""

import html
from collections.abc import Iterable, Iterator, Sequence

from runner.report.charts import STYLES, Chart, Line, draw_chart
from runner.report.collect import Run, Runs
from runner.report.comparison import damaged_table, runs_table
from runner.report.table import Table, Weight
from runner.sinks.text import clean

__all__ = ["make_page"]

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_DRAWN = 20  # runs that get drawings of their own

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5c6675; --line: #d8dde5;
  --paper: #ffffff; --band: #f4f6f9; }
@media (prefers-color-scheme: dark) { :root { --ink: #dfe4ec; --soft: #98a2b3;
  --line: #333b47; --paper: #14181f; --band: #1c222b; } }
body { color: var(--ink); background: var(--paper); margin: 0 auto; max-width: 70rem;
  padding: 1rem; font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem;
  border-top: 1px solid var(--line); padding-top: 1.2rem; overflow-wrap: anywhere; }
p.note { color: var(--soft); }
.scroll { overflow-x: auto; margin: 0 0 1.2rem; }
table { border-collapse: collapse; font-size: .88rem; }
caption, summary { text-align: left; font-weight: 600; padding: .3rem 0; }
summary { cursor: pointer; }
details caption { display: none; }
th, td { text-align: left; vertical-align: top; padding: .22rem .9rem .22rem .4rem;
  border-bottom: 1px solid var(--line); unicode-bidi: isolate; }
th { color: var(--soft); font-weight: 500; white-space: nowrap; }
td { font-family: ui-monospace, monospace; overflow-wrap: anywhere; min-width: 3rem; }
tbody tr:nth-child(odd) { background: var(--band); }
.charts { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
figure { margin: 0; } figcaption { font-weight: 600; overflow-wrap: anywhere; }
figure svg { width: 100%; height: auto; }
figure svg text { font-family: system-ui, sans-serif !important; }
ul.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1rem;
  margin: .2rem 0; padding: 0; font-size: .85rem; font-weight: 400; }
ul.legend span { display: inline-block; width: 1.4rem; vertical-align: middle;
  margin-right: .4rem; border-top-width: 2px; }
"""


def make_page(runs: Runs) -> str:
    """The page of a report; equal runs give equal bytes."""
    count = f"{len(runs.read)} run{'s' if len(runs.read) != 1 else ''}"
    body = "\n".join(_body(runs))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_words(_title(runs.read))}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{_words(_title(runs.read))}</h1>
<p class="note">{count}</p>
{body}
</body>
</html>
"""


def _title(runs: Sequence[Run]) -> str:
    names = dict.fromkeys(run.record.manifest["experiment"] for run in runs)
    return ", ".join(names)


def _body(runs: Runs) -> Iterator[str]:
    if runs.damaged:
        yield _table(damaged_table(runs))
    if len(runs.read) > 1:
        yield _table(runs_table(runs.read))
        yield _charts(_shared_charts(runs.read))
    for i, run in enumerate(runs.read):
        yield f"<section>\n<h2>{_words(run.label)}</h2>"
        if i < _DRAWN:
            yield _charts(_own_charts(run))
        yield from map(_table, run.tables)
        yield "</section>"


def _own_charts(run: Run) -> Iterator[Chart]:
    """Loss and objective; the train steps and the evaluations in one drawing."""
    for metric in dict.fromkeys(("loss", run.objective.metric)):
        phases = [phase for phase, name in run.curves if name == metric]
        lines = [
            Line(phase, run.curves[phase, metric], *style)
            for phase, style in zip(phases, STYLES, strict=False)
        ]
        if lines:
            yield Chart(metric, tuple(lines))


def _shared_charts(runs: Sequence[Run]) -> Iterator[Chart]:
    """Loss and objective of all runs, a drawing for each phase."""
    metrics = dict.fromkeys(["loss", *(run.objective.metric for run in runs)])
    places = dict.fromkeys(place for run in runs for place in run.curves)
    for metric in metrics:
        for phase in [phase for phase, name in places if name == metric]:
            lines = [
                Line(run.label, run.curves[phase, metric], *STYLES[i % len(STYLES)])
                for i, run in enumerate(runs)
                if (phase, metric) in run.curves
            ]
            yield Chart(f"{phase} {metric}", tuple(lines))


def _charts(charts: Iterable[Chart]) -> str:
    figures = "\n".join(map(_figure, charts))
    return f'<div class="charts">\n{figures}\n</div>' if figures else ""


def _figure(chart: Chart) -> str:
    marks = "".join(
        f'<li><span style="border-top-style: {line.dash}; '
        f'border-top-color: {line.color}"></span>{_words(line.name)}</li>'
        for line in chart.lines
    )
    names = ", ".join(line.name for line in chart.lines)
    label = _words(f"{chart.title} over steps: {names}")
    svg = draw_chart(chart).replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    caption = f'{_words(chart.title)}<ul class="legend">{marks}</ul>'
    return f"<figure>\n<figcaption>{caption}</figcaption>\n{svg}\n</figure>"


def _table(table: Table) -> str:
    caption = f"<caption>{_words(table.caption)}</caption>"
    head = "".join(f'<th scope="col">{_words(name)}</th>' for name in table.columns)
    head = f"<thead><tr>{head}</tr></thead>" if any(table.columns) else ""
    rows = "\n".join(map(_row, table.rows))
    inner = f"<table>\n{caption}\n{head}\n<tbody>\n{rows}\n</tbody>\n</table>"
    inner = f'<div class="scroll">\n{inner}\n</div>'
    if table.weight is Weight.OPEN:
        return inner
    summary = f"<summary>{_words(table.caption)}</summary>"
    return f"<details>\n{summary}\n{inner}\n</details>"


def _row(cells: Sequence[str]) -> str:
    first, *rest = map(_words, cells)
    others = "".join(f"<td>{cell}</td>" for cell in rest)
    return f'<tr><th scope="row">{first}</th>{others}</tr>'


def _words(text: str) -> str:
    """Text of a record: what does not print is an escape, what is markup is text."""
    return html.escape(clean(text), quote=True)
