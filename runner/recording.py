# SPDX-License-Identifier: Apache-2.0
"""Runs a program and leaves its record behind."""

import dataclasses
import datetime
import json
import logging
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml

from runner import __version__
from runner.comparison.compare import Comparison
from runner.guarantee import guarantee_of
from runner.hazards.find import Hazard
from runner.keys import draw_canary, rng_flags
from runner.ledger import make_ledger, stream_rows
from runner.loop import Outcome, Snapshot, train
from runner.parse import to_plain
from runner.probe.loop import Event, key_rows, run_probe
from runner.probe.probe import Probe
from runner.program import Compiled, Program
from runner.records.arrays import write_arrays
from runner.records.checkpoint import Checkpoints
from runner.records.digests import (
    digest_config,
    digest_file,
    digest_leaves,
    digest_plain,
)
from runner.records.environment import read_git, read_platform, read_versions
from runner.records.events import Outputs, RunEnd, RunStart, TrainRecord
from runner.records.files import write_atomically
from runner.records.secrets import Secrets
from runner.sinks.base import Sinks, make_sinks
from runner.step import State

__all__ = ["Recorded", "record_run"]

SCHEMA = 1
_log = logging.getLogger("runner")


@dataclasses.dataclass(frozen=True)
class Recorded:
    """How a recorded run ended.

    Args:
        status: `completed`, `failed` or `interrupted`.
        reason: Why, in one line.
        objective: Last value of the metric that counts; None before the first.
    """

    status: str
    reason: str
    objective: float | None


def record_run(
    program: Compiled,
    *,
    directory: Path,
    secrets: Secrets,
    hazards: tuple[Hazard, ...] = (),
    sweep: Mapping[str, Any] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Recorded:
    """Runs a program to its end and records it in a directory that is ours alone.

    Args:
        program: What to run.
        directory: The run directory; exists.
        secrets: What must not be written.
        hazards: What `find_hazards` found, and nobody minded.
        sweep: {id, lane, lanes, mode} of a sweep's job.
        stop: Asked between calls; true ends the run as `interrupted`.

    Raises:
        RecordError: the record can't be written.
    """
    return _Recording(program, directory, secrets, hazards, sweep).run(stop)


class _Recording:
    """What is known of a run so far, and where it is written."""

    def __init__(
        self,
        program: Compiled,
        directory: Path,
        secrets: Secrets,
        hazards: tuple[Hazard, ...],
        sweep: Any,
    ) -> None:
        self.hazards = hazards
        self.program, self.directory, self.secrets = program, directory, secrets
        self.config = secrets.redact(to_plain(program.spec))
        self.ledger = make_ledger(program)
        self.metrics: dict[str, float] = {}
        self.best: tuple[float, int] | None = None
        self.outputs: Outputs | None = None
        self.taken = 0  # steps whose metrics are written
        self.comparison = _compare_keys(program, self.ledger)
        keep = program.spec.checkpoint.keep
        self.checkpoints = Checkpoints(directory / "checkpoints", keep=keep)
        self.manifest = self._first_manifest(sweep)

    def run(self, stop: Callable[[], bool]) -> Recorded:
        self._write_start()
        sinks = make_sinks(self.program.spec.sinks)
        try:
            sinks.start(self._run_start())
            for hazard in self.hazards:
                _log.warning("%s", hazard)
            outcome = self._train(sinks, stop)
            end = self._finish(outcome)
        except BaseException as error:
            what = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
            sinks.finish(self._abort(what))
            raise
        sinks.finish(end)
        objective = self.metrics.get(f"eval/{self.program.spec.objective}")
        return Recorded(end.status, end.reason, objective)

    def _train(self, sinks: Sinks, stop: Callable[[], bool]) -> Outcome:
        for event in _events(self.program, stop, self.comparison):
            if isinstance(event, Outcome):
                return event
            if isinstance(event, Snapshot):
                self.checkpoints.save(event.step, _saved(event.state))
                continue
            if isinstance(event, Outputs):
                self._keep_outputs(event)
                continue
            if isinstance(event, TrainRecord):
                last = {f"train/{k}": float(v[-1]) for k, v in event.metrics.items()}
                self.taken = event.first_step + event.steps
            else:
                last = {f"eval/{k}": v for k, v in event.metrics.items()}
                if event.best:
                    best = event.metrics[self.program.spec.objective]
                    self.best = (best, event.step)
            self.metrics |= last
            sinks.write(event)
        raise AssertionError("the loop ended without an outcome")

    def _keep_outputs(self, outputs: Outputs) -> None:
        path = self.directory / "outputs.npz"
        write_arrays(path, outputs.arrays)
        self.manifest["digests"]["outputs"] = digest_file(path)
        self.outputs = outputs

    def _finish(self, outcome: Outcome) -> RunEnd:
        """Saves the last good state, then closes the manifest over it."""
        if self.program.steps:
            self.checkpoints.save(outcome.step, _saved(outcome.state))
        params = _named_leaves(outcome.state.params)
        self.checkpoints.close()
        self.manifest["digests"]["params"] = digest_leaves(params)
        return self._close(
            outcome.status, outcome.reason, outcome.step, outcome.seconds
        )

    def _abort(self, reason: str) -> RunEnd:
        return self._close("failed", self.secrets.blot(reason), self.taken, 0.0)

    def _close(self, status: str, reason: str, steps: int, seconds: float) -> RunEnd:
        metrics = self.directory / "metrics.jsonl"
        if metrics.exists():
            self.manifest["digests"]["metrics"] = digest_file(metrics)
        self.manifest |= {
            "status": status,
            "reason": reason,
            "ended": _now(),
            "steps": steps,
            "seconds": round(seconds, 3),
            "metrics": {name: _finite(v) for name, v in self.metrics.items()},
            "best": self.best
            and {"value": _finite(self.best[0]), "step": self.best[1]},
            "observed": self.comparison and self.comparison.to_plain(),
        }
        self._write_manifest()
        return RunEnd(
            status=status,
            reason=reason,
            steps=steps,
            seconds=seconds,
            metrics=self.metrics,
            best=self.best,
            ledger=self.directory / "keys",
            outputs=self.outputs,
            observed=str(self.comparison or ""),
        )

    def _write_start(self) -> None:
        """Config and ledger, then the manifest that makes this a run directory."""
        text = yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True)
        write_atomically(self.directory / "config.yaml", text)
        keys = self.directory / "keys"
        keys.mkdir(exist_ok=True)
        text = json.dumps(self.ledger, indent=1, allow_nan=False)
        write_atomically(keys / "ledger.json", text + "\n")
        self._write_manifest()

    def _write_manifest(self) -> None:
        text = json.dumps(self.manifest, indent=2, allow_nan=False)
        write_atomically(self.directory / "run.json", text + "\n")

    def _first_manifest(self, sweep: Any) -> dict[str, Any]:
        program, spec = self.program, self.program.spec
        guarantee = guarantee_of(program)
        with rng_flags(spec.rng):
            canary = draw_canary(str(spec.rng.impl))
        return {
            "schema": SCHEMA,
            "run_id": uuid.uuid4().hex[:12],
            "status": "running",
            "reason": "",
            "experiment": spec.experiment,
            "started": _now(),
            "ended": None,
            "steps": 0,
            "seed": spec.seed,
            "versions": {"runner": __version__, **read_versions()},
            "platform": read_platform(),
            "git": read_git(Path.cwd()),
            "rng": {
                "impl": str(spec.rng.impl),
                "partitionable": spec.rng.partitionable,
                "fix_separator": spec.rng.fix_separator,
                "canary": canary,
            },
            "guarantee": {
                "level": str(guarantee.level),
                "reasons": list(guarantee.reasons),
            },
            "hazards": [hazard.to_plain() for hazard in self.hazards],
            "construct": str(program.construct),
            "inputs": dict(program.hypers),
            "constants": list(program.baked),
            "digests": {
                "config": digest_config(self.config),
                "keys": digest_plain(self.ledger),
                "data": program.data_digest,
                "params": None,
                "metrics": None,
            },
            "metrics": {},
            "best": None,
            "observed": None,
            "parent": None,
            "sweep": sweep,
        }

    def _run_start(self) -> RunStart:
        program = self.program
        level = self.manifest["guarantee"]["level"]
        platform = self.manifest["platform"]
        devices = f"{platform['device_count']} x {platform['device_kind']}"
        return RunStart(
            directory=self.directory,
            run_id=self.manifest["run_id"],
            experiment=program.spec.experiment,
            config=self.config,
            streams=stream_rows(self.ledger),
            parameters=program.parameters,
            steps=program.steps,
            objective=program.spec.objective,
            notes={
                "devices": devices,
                "guarantee": level,
                "construct": str(program.construct),
            },
            keys=key_rows(self.ledger) if isinstance(program, Probe) else (),
        )


def _compare_keys(program: Compiled, ledger: Mapping[str, Any]) -> Comparison | None:
    """What compares the keys of the running program, where `rng.observe` says so."""
    if not program.spec.rng.observe:
        return None
    window = program.window if isinstance(program, Program) else 1
    return Comparison(ledger, window=window)


def _events(
    program: Compiled, stop: Callable[[], bool], comparison: Comparison | None
) -> Iterator[Event]:
    if isinstance(program, Probe):
        return run_probe(program, stop=stop, watch=comparison)
    assert isinstance(program, Program)
    return train(program, stop=stop, watch=comparison)


def _saved(state: State) -> dict[str, Any]:
    """What a checkpoint holds; no key is in it, they follow from the step."""
    kept = ("step", "params", "collections", "opt_state")
    return {name: getattr(state, name) for name in kept}


def _named_leaves(tree: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in leaves
    }


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
