# SPDX-License-Identifier: Apache-2.0
"""Waits for what another process does, and reads the jobs of a sweep. For tests."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["manifests", "wait_for"]


def wait_for(condition: Callable[[], Any], *, seconds: float = 90) -> Any:
    """What the condition gives once it is true of something."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.002)  # a moment that is waited for may be short
    raise AssertionError("waited in vain")


def manifests(sweep: Path) -> dict[int, dict[str, Any]]:
    """`run.json` of each job of a sweep, by its number."""
    found = {int(path.parent.name): path for path in sweep.glob("*/run.json")}
    return {n: json.loads(path.read_text()) for n, path in sorted(found.items())}
