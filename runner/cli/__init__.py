# SPDX-License-Identifier: Apache-2.0
"""The command line: `python -m runner` or `runner`. A file for each verb.

    runner +experiment=NAME [overrides]      train (all of Hydra's flags work)
    runner plan +experiment=NAME [overrides] trace and report, run nothing
    runner keys RUN [--phase P] ...          every key that a recorded run used

Nothing here imports jax before it is needed.
"""

import os
import sys
import traceback
from collections.abc import Callable, Sequence

from runner.errors import RunnerError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command and exits with its code.

    0 done; 1 a negative verdict; 2 wrong usage, config or record; 130 interrupted.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does: trusted packages
    sys.exit(_guarded(_verb(args), args))


def _verb(args: list[str]) -> Callable[[list[str]], int]:
    if args and args[0] == "plan":
        from runner.cli.plan import main as plan

        return lambda rest: plan(rest[1:])
    if args and args[0] == "keys":
        from runner.cli.keys import main as keys

        return lambda rest: keys(rest[1:])
    from runner.cli.train import main as train

    return train


def _guarded(verb: Callable[[list[str]], int], args: list[str]) -> int:
    """Runs a verb; a mistake of the user's becomes one line on stderr."""
    full = os.environ.get("HYDRA_FULL_ERROR") == "1"
    try:
        return verb(args)
    except RunnerError as error:
        if full:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        sys.stderr.close()
        return 1
