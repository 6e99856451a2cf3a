# SPDX-License-Identifier: Apache-2.0
"""One page of HTML: no script, nothing from elsewhere, every word escaped."""

from collections.abc import Iterator, Sequence

from runner.report.charts import Chart, Line
from runner.report.collect import Run, Runs, SweepRuns
from runner.report.comparison import damaged_table, runs_table
from runner.report.drawing import STYLES
from runner.report.elements import (
    chart,
    figures,
    heading,
    heat_figure,
    parallel_figure,
    points_figure,
    section,
    table,
    words,
)
from runner.report.sweep_charts import curves_by_value, heat_map, parallel, points
from runner.report.sweep_tables import jobs_table, setting_of, sweep_tables
from runner.sweep.sweep import Sweep

__all__ = ["make_page"]

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_DRAWN = 20  # runs that get drawings of their own
_TOGETHER = 10  # jobs of a sweep whose curves get a drawing together

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
figure.wide { grid-column: 1 / -1; }
table.heat { border-collapse: separate; border-spacing: 3px; margin-top: .5rem; }
table.heat th, table.heat td { border: 0; text-align: center; padding: .45rem .7rem; }
table.heat td { border-radius: 4px; background: var(--band); }
table.heat thead td { background: none; }
table.heat td.best { outline: 2px solid #e07a2f; font-weight: 600; }
details.run > summary { font-size: 1.05rem; border-top: 1px solid var(--line);
  padding: .6rem 0; overflow-wrap: anywhere; }
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
<title>{words(_title(runs.read))}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{words(_title(runs.read))}</h1>
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
        yield table(damaged_table(runs))
    for each in runs.sweeps:
        yield from _sweep(each, is_named=len(runs.sweeps) > 1 or not runs.is_a_sweep)
    if len(runs.read) > 1 and not runs.is_a_sweep:
        yield table(runs_table(runs.read))
    if 1 < len(runs.read) <= _TOGETHER or (runs.read and not runs.is_a_sweep):
        yield figures(map(chart, _shared_charts(runs.read)))
    settings = _settings(runs.sweeps[0].sweep) if runs.is_a_sweep else {}
    for i, run in enumerate(runs.read):
        drawn = figures(map(chart, _own_charts(run))) if i < _DRAWN else ""
        inner = "\n".join([drawn, *map(table, run.tables)])
        title = settings.get(run.label, run.label)
        yield section(title, inner, folded=runs.is_a_sweep)


def _settings(sweep: Sweep) -> dict[str, str]:
    """Titles of jobs, by their labels."""
    return {job.label: f"{job.label}: {setting_of(job, sweep)}" for job in sweep.jobs}


def _sweep(each: SweepRuns, *, is_named: bool) -> Iterator[str]:
    sweep = each.sweep
    if is_named:
        yield heading(sweep.name)
    yield from map(table, sweep_tables(sweep))
    yield figures(_pictures(each))
    yield table(jobs_table(sweep))


def _pictures(each: SweepRuns) -> Iterator[str]:
    sweep = each.sweep
    yield from map(points_figure, points(sweep))
    if (found := heat_map(sweep)) is not None:
        yield heat_figure(found, metric=sweep.metric)
    if (lines := parallel(sweep)) is not None:
        yield parallel_figure(lines, paths=[field.path for field in sweep.fields])
    yield from map(chart, curves_by_value(sweep, each.curves))


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
