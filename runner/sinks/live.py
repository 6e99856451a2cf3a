# SPDX-License-Identifier: Apache-2.0
"""The live display: tables before and after, a progress bar in between (rich).

A record only leaves numbers behind (microseconds); rich's own thread draws them.
"""

import logging
import sys
from collections.abc import Iterable
from typing import Any

from rich import box
from rich.console import Console
from rich.file_proxy import FileProxy
from rich.panel import Panel
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column, Table
from rich.text import Text

from runner.records.events import EvalRecord, RunEnd, RunStart, TrainRecord
from runner.sinks import text

__all__ = ["LiveSink"]

_DRAWN_PER_SECOND = 5
_NEVER_WRAPPED = ("stream", "kind")
_STATUS_STYLES = {"completed": "green", "interrupted": "yellow", "failed": "red"}


class LiveSink:
    """Draws on a terminal.

    Args:
        console: Where to draw; stdout by default, taken for a terminal.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(force_terminal=True)

    def start(self, run: RunStart) -> None:
        """Shows what will run, and from which keys; opens the bar."""
        self._run = run
        self.console.print(_summary(run))
        if run.streams:
            self.console.print(_streams(run), "")
        if run.keys:
            self.console.print(_table(text.KEY_COLUMNS, text.key_rows(run)), "")
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            _Status(table_column=Column(no_wrap=True)),
            console=self.console,
            expand=True,
            transient=True,
            refresh_per_second=_DRAWN_PER_SECOND,
            redirect_stderr=sys.stderr.isatty(),  # else it has a file of its own
        )
        self._bar = self._progress.add_task(
            "compile", total=run.steps, completed=run.first_step, shown="", score=""
        )
        self._progress.start()
        self._moved = _move_handlers()

    def write(self, record: TrainRecord | EvalRecord) -> None:
        """Leaves the newest numbers for the bar."""
        if isinstance(record, EvalRecord):
            objective = self._run.objective
            if objective in record.metrics:
                score = text.format_metrics({objective: record.metrics[objective]})
                self._progress.update(self._bar, score=score)
            return
        values = record.metrics
        shown = {"loss": values["loss"][-1]} if "loss" in values else {}
        self._progress.update(
            self._bar,
            description="train",
            completed=record.first_step + record.steps,
            shown=text.format_metrics(shown),
        )

    def finish(self, end: RunEnd) -> None:
        """Takes the bar away, shows how it ended."""
        self._progress.stop()
        for handler, stream in self._moved:
            handler.setStream(stream)
        if end.outputs is not None:
            rows = text.output_rows(end.outputs)
            self.console.print(_table(text.OUTPUT_COLUMNS, rows), "")
        self.console.print(_results(self._run, end))


class _Status(ProgressColumn):
    """`400/1,000  loss 0.1234  accuracy 0.95  523 steps/s  1.1 s left`."""

    def render(self, task: Task) -> Text:
        total = f"{task.total or 0:,.0f}"
        parts = [f"{task.completed:{len(total)},.0f}/{total}"]
        parts += [task.fields["shown"], task.fields["score"]]
        if task.speed:
            parts.append(text.format_rate(round(task.speed * 1000), 1000.0))
            left = ((task.total or 0) - task.completed) / task.speed
            parts.append(f"{text.format_duration(left)} left")
        return Text("  ".join(filter(None, parts)))


def _summary(run: RunStart) -> Panel:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    _fill(grid, text.summary_rows(run))
    return Panel(grid, box=box.ROUNDED, border_style="dim", expand=False)


def _streams(run: RunStart) -> Table:
    return _table(text.STREAM_COLUMNS, text.stream_rows(run, between="\n"))


def _table(columns: Iterable[str], rows: Iterable[tuple[str, ...]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        table.add_column(name, overflow="fold", no_wrap=name in _NEVER_WRAPPED)
    _fill(table, rows)
    return table


def _results(run: RunStart, end: RunEnd) -> Panel:
    style = _STATUS_STYLES.get(end.status, "red")
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    _fill(grid, text.result_rows(run, end))
    return Panel(grid, box=box.ROUNDED, border_style=style, expand=False)


def _fill(table: Table, rows: Iterable[tuple[str, ...]]) -> None:
    for row in rows:
        table.add_row(*map(Text, row))  # `Text`: no markup, no emoji codes


def _move_handlers() -> list[tuple[Any, Any]]:
    """Points log handlers that write to the bare terminal at the one above the bar.

    A handler holds the stdout or stderr of the time it was made, so rich's
    replacement of `sys.stdout` alone would leave it tearing the bar.

    Returns:
        Each handler that was moved, and the stream to give back to it.
    """
    above = [s for s in (sys.stdout, sys.stderr) if isinstance(s, FileProxy)]
    handlers = logging.getLogger().handlers + logging.getLogger("runner").handlers
    moved = []
    for handler in handlers:
        for proxy in above:
            stream = getattr(handler, "stream", None)
            if stream is proxy.rich_proxied_file:
                moved.append((handler, stream))
                handler.setStream(proxy)  # type: ignore[attr-defined]
    return moved
