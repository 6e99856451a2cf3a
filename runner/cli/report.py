# SPDX-License-Identifier: Apache-2.0
"""`runner report RUN_OR_SWEEP...`: one self-contained page, and tables here."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from runner.cli import print_last
from runner.errors import ConfigError
from runner.records.files import write_atomically
from runner.sinks.text import align, clean

if TYPE_CHECKING:
    from runner.report.table import Table
    from runner.sweep.sweep import Sweep

__all__ = ["main", "show"]

_SHOWN = 8  # runs whose tables are printed; the page has those of all


def main(args: list[str]) -> int:
    """Writes the page, prints its tables, and its path as the last line.

    A run that can't be read is listed; 2 where none can.
    """
    options = _parser().parse_args(args)
    out = Path(options.out)
    if not out.parent.is_dir() or out.is_dir():
        what = "is a directory" if out.is_dir() else "its directory does not exist"
        raise _unwritable(options.out, what)
    from runner.report.collect import collect_runs
    from runner.report.comparison import runs_table
    from runner.report.page import make_page

    runs = collect_runs(options.runs)
    page = make_page(runs)
    try:
        write_atomically(out, page)
    except OSError as error:
        raise _unwritable(options.out, str(error.strerror or error)) from error
    for found in runs.sweeps:
        _show_sweep(found.sweep)
    if len(runs.read) > 1 and not runs.is_a_sweep:
        show(runs_table(runs.read))
    for run in runs.read if len(runs.read) <= _SHOWN else ():
        print(clean(run.label), end="\n\n")
        for table in run.tables:
            show(table)
    for each in runs.damaged:
        print(f"warning: {clean(each.reason)}", file=sys.stderr)
    print_last(options.out)
    return 0


def _show_sweep(sweep: "Sweep") -> None:
    """Prints its tables, and writes its files where that can be done."""
    from runner.report.sweep_tables import sweep_tables
    from runner.sweep.files import write_sweep

    for table in sweep_tables(sweep):
        show(table)
    try:
        write_sweep(sweep)
    except OSError as error:
        what = f"{sweep.name}: sweep.json can't be written ({error.strerror or error})"
        print(f"warning: {clean(what)}", file=sys.stderr)


def _unwritable(out: str, why: str) -> ConfigError:
    fix = "Give a file in a directory of yours"
    return ConfigError("--out", f"can't be written: {why}", got=out, fix=fix)


def show(table: "Table") -> None:
    """Prints a table; what does not print in it is escaped."""
    print(clean(table.caption))
    head = [table.columns] if any(table.columns) else []
    for line in align(tuple(map(clean, row)) for row in (*head, *table.rows)):
        print(f"  {line}")
    print()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="runner report", description=__doc__)
    help_ = "run directory, .zip or .tar.gz of one, or directory of a sweep"
    parser.add_argument("runs", metavar="RUN_OR_SWEEP", nargs="+", help=help_)
    parser.add_argument("--out", metavar="FILE", default="report.html", help="the page")
    return parser
