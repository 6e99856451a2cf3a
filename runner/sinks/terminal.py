# SPDX-License-Identifier: Apache-2.0
"""The terminal: a live display where there is one to draw on, else plain lines.

Everything goes to stdout, whose last line is the caller's.
"""

import os
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, TextIO

from runner.records.events import EvalRecord, RunEnd, RunStart, TrainRecord
from runner.sinks import text
from runner.spec import TerminalSpec

if TYPE_CHECKING:
    from runner.sinks.live import LiveSink

__all__ = ["LogSink", "PlainSink", "make_terminal_sink"]


class PlainSink:
    """Lines without escapes or a width: for log files, pipes and dumb terminals.

    Args:
        file: Where lines go; stdout by default.
        interval: Seconds that pass between two progress lines, at least.
    """

    def __init__(self, file: TextIO | None = None, *, interval: float = 2.0) -> None:
        self._file = file or sys.stdout
        self._interval = interval

    def start(self, run: RunStart) -> None:
        """Says what will run, and from which keys."""
        self._run, self._said = run, time.monotonic()
        self._since: tuple[int, float] | None = None  # after the first record
        self._say(*text.align(text.summary_rows(run)))
        if run.streams:
            self._say(
                "", *text.align([text.STREAM_COLUMNS, *text.stream_rows(run)]), ""
            )
        if run.keys:
            self._say(*text.align([text.KEY_COLUMNS, *text.key_rows(run)]), "")

    def write(self, record: TrainRecord | EvalRecord) -> None:
        """A line for each evaluation; now and then one for progress."""
        if isinstance(record, EvalRecord):
            best = "  best" if record.best else ""
            shown = text.format_metrics(record.metrics)
            self._say(f"eval at step {record.step:,}  {shown}{best}")
            return
        step, now = record.first_step + record.steps, time.monotonic()
        if self._since is None:  # compilation ends here
            self._since = (step, now)
        if now - self._said >= self._interval:
            self._said = now
            self._say("  ".join(filter(None, self._progress(record, step, now))))

    def finish(self, end: RunEnd) -> None:
        """Says what came out, and how it ended."""
        if end.outputs is not None:
            rows = [text.OUTPUT_COLUMNS, *text.output_rows(end.outputs)]
            self._say(*text.align(rows))
        self._say("", *text.align(text.result_rows(self._run, end)))

    def _progress(self, record: TrainRecord, step: int, now: float) -> Iterable[str]:
        yield f"step {step:,} of {self._run.steps:,}"
        yield text.format_metrics({k: v[-1] for k, v in record.metrics.items()})
        first, since = self._since or (step, now)
        done, seconds = step - first, now - since
        if done and seconds:
            left = seconds / done * (self._run.steps - step)
            yield text.format_rate(done, seconds)
            yield f"{text.format_duration(left)} left"

    def _say(self, *lines: str) -> None:
        encoding = self._file.encoding or "utf-8"
        for line in lines:
            shown = line.encode(encoding, "backslashreplace").decode(encoding)
            print(shown, file=self._file)
        self._file.flush()


class LogSink(PlainSink):
    """The same lines in `runner.log`, whatever the terminal shows."""

    def start(self, run: RunStart) -> None:
        """Opens the file; lines that are logged go there, too."""
        self._file = (run.directory / "runner.log").open("a", encoding="utf-8")
        super().start(run)

    def finish(self, end: RunEnd) -> None:
        """Says how it ended, and closes."""
        super().finish(end)
        self._file.close()


def make_terminal_sink(spec: TerminalSpec) -> "PlainSink | LiveSink | None":
    """The sink, or None where it is disabled. `auto` looks at stdout."""
    if spec.mode == "disabled":
        return None
    if spec.mode == "plain" or (spec.mode == "auto" and not _is_lively(sys.stdout)):
        return PlainSink()
    from runner.sinks.live import LiveSink

    return LiveSink()


def _is_lively(file: TextIO) -> bool:
    dumb = os.environ.get("TERM", "dumb") in ("dumb", "unknown")
    return file.isatty() and not dumb and file.encoding.lower() == "utf-8"
