# SPDX-License-Identifier: Apache-2.0
"""`run.json`: what a run is, and what its bits may depend on, as plain data."""

import datetime
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runner import __version__
from runner.guarantee import Level, guarantee_of
from runner.hazards.find import Hazard
from runner.keys import draw_canary, rng_flags
from runner.program import Compiled
from runner.records.digests import digest_config, digest_plain
from runner.records.environment import read_git, read_platform, read_versions
from runner.records.record import SCHEMA
from runner.spec import RunSpec

__all__ = ["facts_of_process", "first_manifest", "now", "take_over"]


def now() -> str:
    """The time, in UTC, as ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def facts_of_process(spec: RunSpec) -> dict[str, Any]:
    """What a run's bits may depend on besides its config."""
    with rng_flags(spec.rng):
        canary = draw_canary(str(spec.rng.impl))
    return {
        "versions": {"runner": __version__, **read_versions()},
        "platform": read_platform(),
        "git": read_git(Path.cwd()),
        "rng": {
            "impl": str(spec.rng.impl),
            "partitionable": spec.rng.partitionable,
            "fix_separator": spec.rng.fix_separator,
            "canary": canary,
        },
    }


def first_manifest(
    program: Compiled,
    *,
    config: Mapping[str, Any],
    ledger: Mapping[str, Any],
    hazards: tuple[Hazard, ...],
) -> dict[str, Any]:
    """The manifest of a run before its first step."""
    spec, guarantee = program.spec, guarantee_of(program)
    return {
        "schema": SCHEMA,
        "run_id": uuid.uuid4().hex[:12],
        "status": "running",
        "reason": "",
        "experiment": spec.experiment,
        "started": now(),
        "ended": None,
        "steps": 0,
        "seed": spec.seed,
        **facts_of_process(spec),
        "guarantee": {
            "level": str(guarantee.level),
            "reasons": list(guarantee.reasons),
        },
        "hazards": [hazard.to_plain() for hazard in hazards],
        "construct": str(program.construct),
        "inputs": dict(program.hypers),
        "constants": list(program.baked),
        "digests": {
            "config": digest_config(config),
            "keys": digest_plain(ledger),
            "data": program.data_digest,
            "params": None,
            "metrics": None,
            "states": None,
        },
        "metrics": {},
        "best": None,
        "observed": None,
        "parent": None,
        "resumed": [],
        "sweep": None,
    }


def take_over(
    manifest: Mapping[str, Any], before: Mapping[str, Any], *, step: int, mixed: str
) -> dict[str, Any]:
    """The manifest of a run that goes on: it stays the run that it was.

    Args:
        manifest: Of this process, as `first_manifest` makes it.
        before: The run's so far.
        step: Where it goes on.
        mixed: Why the steps before it may have been rounded otherwise than those
            after it; empty where they were not.
    """
    session = {"step": step, "at": now(), "was": before["status"]}
    guarantees = [before["guarantee"], manifest["guarantee"]]
    if mixed:
        why = f"resumed at step {step:,} under {mixed}"
        guarantees.append({"level": str(Level.KEY_EXACT), "reasons": [why]})
    order = [str(level) for level in Level]  # the strongest first
    level = max((each["level"] for each in guarantees), key=order.index)
    reasons = [r for each in guarantees for r in each["reasons"]]
    return {
        **manifest,
        **{name: before[name] for name in ("run_id", "started", "sweep")},
        "guarantee": {"level": level, "reasons": list(dict.fromkeys(reasons))},
        "parent": _parent(before, step),
        "resumed": [*before.get("resumed", []), session],
    }


def _parent(before: Mapping[str, Any], step: int) -> dict[str, Any]:
    """A run that reproduces another still does when it goes on."""
    parent: dict[str, Any] = before.get("parent") or {}
    if parent.get("verb") == "reproduce":
        return parent
    return {"run_id": before["run_id"], "verb": "resume", "step": step}
