# SPDX-License-Identifier: Apache-2.0
"""The command line: `python -m runner` or `runner`. A file for each verb.

    runner +experiment=NAME [overrides]      train (all of Hydra's flags work)
    runner plan +experiment=NAME [overrides] trace and report, run nothing
    runner keys RUN [--phase P] ...          every key that a recorded run used
    runner reproduce RUN                     run again from its record; a verdict
    runner resume RUN [train.steps=N]        go on where it was stopped
    runner diff RUN RUN                      why are these two runs different
    runner report RUN_OR_SWEEP...            one self-contained report.html

Nothing here imports jax before it is needed.
"""

import importlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from runner.cli.secrecy import blot
from runner.errors import RunnerError
from runner.processes.peers import peers

__all__ = ["VERBS", "complain", "main", "print_last"]

VERBS = ("plan", "keys", "reproduce", "resume", "diff", "report")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command and exits with its code.

    0 done; 1 a negative verdict; 2 wrong usage, config or record; 130 interrupted.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    _settle_streams()
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does: trusted packages
    try:
        code = _guarded(_verb(args), args)
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    peers().fail(f"it left with code {code}", code or 1)  # unless all have ended
    sys.exit(code)


def _settle_streams() -> None:
    """What a shell may do to us before there is a run: `>&-`, `| head`."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - until exit
    logging.raiseExceptions = False


def print_last(line: str) -> None:
    """Prints to a stdout that may have been closed by whoever read it."""
    try:
        print(line, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _verb(args: list[str]) -> Callable[[list[str]], int]:
    if args and args[0] in VERBS:
        verb = importlib.import_module(f"runner.cli.{args[0]}").main
        return lambda rest: int(verb(rest[1:]))
    from runner.cli.train import main as train

    return train


def _guarded(verb: Callable[[list[str]], int], args: list[str]) -> int:
    """Runs a verb; a mistake of the user's becomes one line on stderr."""
    full = os.environ.get("HYDRA_FULL_ERROR") == "1"
    try:
        return verb(args)
    except RunnerError as error:
        if full:
            complain(traceback.format_exc().rstrip("\n"))
        peers().fail(str(error), error.exit_code)
        complain(f"error: {error}")
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # of ours or of a model's code: all that is known
        complain(traceback.format_exc().rstrip("\n"))
        line = f"{type(error).__name__}: {error}"
        peers().fail(line.partition("\n")[0], 1)
        complain(f"error: {line}")
        return 1


def complain(text: str) -> None:
    """Lines on stderr; what comes from a record or a model can't steer the terminal."""
    from runner.sinks.text import clean

    for line in blot(text).split("\n"):
        print(clean(line), file=sys.stderr)
