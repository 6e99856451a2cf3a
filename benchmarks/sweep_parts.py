# SPDX-License-Identifier: Apache-2.0
"""The runner, and how long it composed configs and compiled programs.

    python benchmarks/sweep_parts.py FILE ARGUMENT...

runs `runner ARGUMENT...` and writes both times to FILE, in seconds of this process
alone: where another launcher has processes of its own, theirs are not in it.
"""

import functools
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl

_COMPILING = (  # by XLA, or from its cache
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)
_spent = {"hydra": 0.0, "compile": 0.0}
_inside = threading.local()


def _timed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the time of calls that are in no other one."""

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        if getattr(_inside, "hydra", False):
            return function(*args, **options)
        _inside.hydra, begun = True, time.perf_counter()
        try:
            return function(*args, **options)
        finally:
            _inside.hydra = False
            _spent["hydra"] += time.perf_counter() - begun

    return call


def _listen(event: str, seconds: float, **_: Any) -> None:
    if event in _COMPILING:
        _spent["compile"] += seconds


def main(path: Path, arguments: list[str]) -> None:
    """Runs the command, and exits with its code."""
    from runner.cli import composing

    for owner, name in (
        (ConfigLoaderImpl, "load_configuration"),
        (ConfigLoaderImpl, "load_sweep_config"),
        (composing._Known, "load"),
    ):
        setattr(owner, name, _timed(getattr(owner, name)))
    import jax

    jax.monitoring.register_event_duration_secs_listener(_listen)
    from runner.cli import main as run

    sys.argv = ["runner", *arguments]
    try:
        run()
    finally:
        path.write_text(json.dumps(_spent))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
