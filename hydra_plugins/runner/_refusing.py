# SPDX-License-Identifier: Apache-2.0
"""What a sweeper refuses, told from what one of its jobs raised."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from runner.errors import RunnerError

__all__ = ["is_ours", "refusing"]


def is_ours(task_function: Any) -> bool:
    """Whether it is the runner that sweeps, and no other application of Hydra's."""
    return getattr(task_function, "__module__", "") == "runner.cli.train"


@contextmanager
def refusing(task_function: Any) -> Iterator[None]:
    """Carries an error past Hydra to the runner's command line; raises it elsewhere."""
    try:
        yield
    except RunnerError as error:
        if not is_ours(task_function):
            raise
        from runner.cli.gate import Refused

        raise Refused(error) from error
