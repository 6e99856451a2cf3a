# SPDX-License-Identifier: Apache-2.0
"""Runs a program and leaves its record behind."""

import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml

from runner.course import BEGINNING, Start
from runner.errors import RecordError, RunFailedError, in_one_line
from runner.following import begin_together, compare_keys
from runner.hazards.find import Hazard
from runner.kept import keep
from runner.ledger import make_ledger, stream_rows
from runner.loop import Outcome, Snapshot, train
from runner.manifest import first_manifest, now, take_over
from runner.parse import to_plain
from runner.probe.loop import Event, key_rows, run_probe
from runner.probe.probe import Probe
from runner.processes.peers import PeerLostError, peers
from runner.program import Compiled, Program
from runner.records.arrays import write_arrays
from runner.records.checkpoint import FOLDER, Checkpoints, Saved
from runner.records.digests import (
    digest_file,
    digest_leaves,
    digest_manifest,
)
from runner.records.events import (
    EvalRecord,
    Outputs,
    RunEnd,
    RunStart,
    StateRecord,
    TrainRecord,
)
from runner.records.files import clear_unfinished, sync, write_atomically
from runner.records.record import NEXT
from runner.records.restore import named_leaves
from runner.records.secrets import Secrets
from runner.sinks.base import Sinks, make_sinks
from runner.sinks.jsonl import FILES
from runner.step import State

__all__ = ["Recorded", "Resumption", "record_run"]

_RESERVE_FILE = ".reserve"
_RESERVE = 2**14  # bytes set aside: a full disk still takes the last manifest
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


@dataclasses.dataclass(frozen=True)
class Resumption:
    """Where a recorded run goes on, in its own directory.

    Args:
        manifest: Its `run.json` so far.
        start: Its state there, and what led to it.
        metrics: Last value of each metric before it, as `train/loss`.
        sizes: Bytes that stay of each file that the sinks append to.
        saved: The checkpoints up to there.
        mixed: What is another here than where the steps before it were taken; empty
            where that changes no bit.
        notes: What is worth a line: what was passed over, and why.
    """

    manifest: Mapping[str, Any]
    start: Start
    metrics: Mapping[str, float]
    sizes: Mapping[str, int]
    saved: Mapping[int, Saved]
    mixed: str = ""
    notes: tuple[str, ...] = ()


def record_run(
    program: Compiled,
    *,
    directory: Path,
    secrets: Secrets,
    hazards: tuple[Hazard, ...] = (),
    sweep: Mapping[str, Any] | None = None,
    parent: Mapping[str, Any] | None = None,
    resumption: Resumption | None = None,
    stop: Callable[[], str] = lambda: "",
    listen: Callable[[Event], None] = lambda event: None,
    sinks: Sinks | None = None,
) -> Recorded:
    """Runs a program to its end and records it in a directory that is ours alone.

    Args:
        program: What to run.
        directory: The run directory; exists, and is locked by us.
        secrets: What must not be written.
        hazards: What `find_hazards` found, and nobody minded.
        sweep: {id, lane, lanes, mode} of a sweep's job.
        parent: {run_id, verb, ...} of the run that this one is made from.
        resumption: Where a run in this directory goes on.
        stop: Asked between calls; a reason ends the run as `interrupted`.
        listen: Told each event when it has been written.
        sinks: Where records go; as `sinks` of the config says, if not given.

    Raises:
        RunFailedError: the record can't be written.
    """
    recording = _Recording(program, directory, secrets, hazards, resumption)
    recording.open_manifest(sweep=sweep, parent=parent)
    try:
        return recording.run(stop, listen, sinks or make_sinks(program.spec.sinks))
    except RecordError as error:
        raise RunFailedError(str(error)) from error
    except OSError as error:  # of the first or the last manifest
        what = f"{directory}: can't be written ({error.strerror or error})"
        raise RunFailedError(f"{what}.") from error


class _Recording:
    """What is known of a run so far, and where it is written."""

    def __init__(
        self,
        program: Compiled,
        directory: Path,
        secrets: Secrets,
        hazards: tuple[Hazard, ...],
        resumption: Resumption | None,
    ) -> None:
        self.hazards, self.resumption = hazards, resumption
        self.start = resumption.start if resumption else BEGINNING
        self.program, self.directory, self.secrets = program, directory, secrets
        self.config = secrets.redact(to_plain(program.spec))
        self.ledger = make_ledger(program)
        self.metrics = dict(resumption.metrics) if resumption else {}
        self.best: tuple[float, int] | None = None
        self.objective: tuple[int, float] | None = None  # at the last evaluation
        self.outputs: Outputs | None = None
        self.taken = self.start.step  # steps whose metrics are written
        self.comparison = compare_keys(program, self.ledger)
        for record in self.start.evaluated:
            self._take_eval(record)

    def open_manifest(self, *, sweep: Any, parent: Any) -> None:
        self.manifest = first_manifest(
            self.program, config=self.config, ledger=self.ledger, hazards=self.hazards
        )
        if self.resumption is None:
            self.manifest |= {"sweep": sweep, "parent": parent}
        else:
            before, mixed = self.resumption.manifest, self.resumption.mixed
            step = self.start.step
            self.manifest = take_over(self.manifest, before, step=step, mixed=mixed)
        checkpoint, metric = self.program.spec.checkpoint, self.program.spec.objective
        self.checkpoints = Checkpoints(
            self.directory / FOLDER,
            run_id=self.manifest["run_id"],
            keep=checkpoint.keep,
            keep_best=checkpoint.keep_best,
            best=self.program.spec.task.metrics[metric],
        )

    def run(
        self, stop: Callable[[], str], listen: Callable[[Event], None], sinks: Sinks
    ) -> Recorded:
        peers().meet()  # all have read what is now written to
        self._write_start()
        try:
            self._cut_back()
            sinks.start(self._run_start())
            for note in self.resumption.notes if self.resumption else ():
                _log.warning("%s", note)
            for hazard in self.hazards:
                _log.warning("%s", hazard)
            with peers().closing(lambda line: sinks.finish(self._abort(line))):
                begin_together(self.program)
                outcome = self._train(sinks, stop, listen)
                end = self._finish(outcome, sinks)
        except PeerLostError as error:  # what is being saved can't become whole
            sinks.finish(self._abort(str(error)))
            raise
        except BaseException as error:
            what = in_one_line(error)
            with contextlib.suppress(RunFailedError):  # the error at hand came first
                self.checkpoints.close()
            sinks.finish(self._abort(what))
            raise
        sinks.finish(end)
        objective = self.metrics.get(f"eval/{self.program.spec.objective}")
        return Recorded(end.status, end.reason, objective)

    def _train(
        self, sinks: Sinks, stop: Callable[[], str], listen: Callable[[Event], None]
    ) -> Outcome:
        for event in self._events(stop):
            self.checkpoints.check()
            if isinstance(event, Outcome):
                return event
            if isinstance(event, Snapshot):
                self._save(event.step, event.state, sinks)
            elif isinstance(event, Outputs):
                self._keep_outputs(event)
            else:
                self._take(event)
                sinks.write(event)
            listen(event)
        raise AssertionError("the loop ended without an outcome")

    def _events(self, stop: Callable[[], str]) -> Iterator[Event]:
        program, watch = self.program, self.comparison
        if isinstance(program, Probe):
            return run_probe(program, stop=stop, watch=watch)
        assert isinstance(program, Program)
        share = peers().share
        return train(program, start=self.start, stop=stop, watch=watch, share=share)

    def _take(self, record: TrainRecord | EvalRecord | StateRecord) -> None:
        if isinstance(record, TrainRecord):
            last = {f"train/{k}": float(v[-1]) for k, v in record.metrics.items()}
            self.metrics |= last
            self.taken = record.first_step + record.steps
        elif isinstance(record, EvalRecord):
            self._take_eval(record)

    def _take_eval(self, record: EvalRecord) -> None:
        self.metrics |= {f"eval/{k}": v for k, v in record.metrics.items()}
        value = record.metrics[self.program.spec.objective]
        self.objective = (record.step, value)
        if record.best:
            self.best = (value, record.step)

    def _save(self, step: int, state: State, sinks: Sinks) -> None:
        at, value = self.objective or (-1, 0.0)
        objective = _finite(value) if at == step else None
        written = sinks.sync()
        self.checkpoints.save(step, keep(state), objective=objective, written=written)

    def _keep_outputs(self, outputs: Outputs) -> None:
        path = self.directory / "outputs.npz"
        write_arrays(path, outputs.arrays)
        self.manifest["digests"]["outputs"] = digest_file(path)
        self.outputs = outputs

    def _finish(self, outcome: Outcome, sinks: Sinks) -> RunEnd:
        """Saves the last good state, then closes the manifest over it."""
        if self.program.steps:
            self._save(outcome.step, outcome.state, sinks)
        params = jax.tree.map(self.program.layout.fetch, outcome.state.params)
        self.checkpoints.close()
        self.manifest["digests"]["params"] = digest_leaves(named_leaves(params))
        return self._close(
            outcome.status, outcome.reason, outcome.step, outcome.seconds
        )

    def _abort(self, reason: str) -> RunEnd:
        return self._close("failed", self.secrets.blot(reason), self.taken, 0.0)

    def _close(self, status: str, reason: str, steps: int, seconds: float) -> RunEnd:
        for name, file in FILES.items():
            if (self.directory / file).exists():
                digest = digest_file(self.directory / file)
                self.manifest["digests"][name] = digest
        self.manifest |= {
            "status": status,
            "reason": reason,
            "ended": now(),
            "steps": steps,
            "seconds": round(seconds, 3),
            "metrics": {name: _finite(v) for name, v in self.metrics.items()},
            "best": self.best
            and {"value": _finite(self.best[0]), "step": self.best[1]},
            "observed": self.comparison and self.comparison.to_plain(),
        }
        self._write_manifest(room=self.directory / _RESERVE_FILE)
        return RunEnd(
            status=status,
            reason=reason,
            steps=steps,
            seconds=seconds,
            metrics=self.metrics,
            best=self.best,
            outputs=self.outputs,
            observed=str(self.comparison or ""),
        )

    def _write_start(self) -> None:
        """What the run starts from; a kill in between leaves the one before, or this.

        The manifest names the others by their digests: it is written between them and
        their renaming, and a reader takes whichever of the two it names.
        """
        (self.directory / "keys").mkdir(exist_ok=True)
        for name in (".", "keys", ".hydra"):
            clear_unfinished(self.directory / name)
        write_atomically(self.directory / _RESERVE_FILE, bytes(_RESERVE))
        config = yaml.dump(
            self.config, Dumper=yaml.CSafeDumper, sort_keys=False, allow_unicode=True
        )
        ledger = json.dumps(self.ledger, indent=1, allow_nan=False) + "\n"
        texts = {"config.yaml": config, "keys/ledger.json": ledger}
        paths = {self.directory / name: text for name, text in texts.items()}
        for path, text in paths.items():
            write_atomically(path.with_name(path.name + NEXT), text)
        self._write_manifest()
        for path in paths:
            path.with_name(path.name + NEXT).replace(path)
            sync(path.parent)

    def _cut_back(self) -> None:
        """Takes away what lies past the start; checkpoints first, for they vouch for
        what is left of the files.
        """
        self.checkpoints.begin(self.resumption.saved if self.resumption else {})
        for name, size in (self.resumption.sizes if self.resumption else {}).items():
            with contextlib.suppress(FileNotFoundError):
                os.truncate(self.directory / FILES[name], size)

    def _write_manifest(self, *, room: Path | None = None) -> None:
        self.manifest["digest"] = digest_manifest(self.manifest)
        text = json.dumps(self.manifest, indent=2, allow_nan=False)
        write_atomically(self.directory / "run.json", text + "\n", room=room)

    def _run_start(self) -> RunStart:
        program = self.program
        level = self.manifest["guarantee"]["level"]
        platform = self.manifest["platform"]
        devices = f"{platform['device_count']} x {platform['device_kind']}"
        if platform["process_count"] > 1:
            devices += f" in {platform['process_count']} processes"
        return RunStart(
            directory=self.directory,
            run_id=self.manifest["run_id"],
            experiment=program.spec.experiment,
            config=self.config,
            streams=stream_rows(self.ledger),
            parameters=program.parameters,
            steps=program.steps,
            objective=program.spec.objective,
            first_step=self.start.step,
            notes={
                "devices": devices,
                "guarantee": level,
                "construct": str(program.construct),
            },
            keys=key_rows(self.ledger) if isinstance(program, Probe) else (),
        )


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
