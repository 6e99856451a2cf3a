# SPDX-License-Identifier: Apache-2.0
"""Runs a record again in a directory of its own, and says what came of it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from runner.differences.arrays import (
    ArrayDifferences,
    compare_outputs,
    compare_params_at,
    read_outputs,
)
from runner.guarantee import Level
from runner.hazards.find import Hazard
from runner.manifest import facts_of_process
from runner.probe.probe import Probe
from runner.program import Compiled
from runner.recording import record_run
from runner.records.record import Record, read_record
from runner.records.restore import (
    check_written,
    list_saved,
    read_saved,
)
from runner.records.secrets import Secrets
from runner.replay.compare import Replay
from runner.replay.environment import Cause, Difference, compare_environments
from runner.replay.sameness import check_data, compare_keys
from runner.replay.verdict import Check, Reached, Verdict
from runner.sinks.jsonl import FILES
from runner.spec import RunSpec

__all__ = ["check_files", "reproduce", "shorten"]


def shorten(spec: RunSpec, record: Record, *, steps: int | None) -> RunSpec:
    """The spec of the steps that can be compared; at most as many as asked for.

    A run that did not complete is compared as far as its metrics go.
    """
    is_whole = record.manifest["status"] == "completed"
    there = spec.train.steps if is_whole else max(record.trained, 1)
    least = min(spec.train.steps, there, steps or there)
    return replace(spec, train=replace(spec.train, steps=least))


def check_files(record: Record) -> None:
    """Reads what `read_record` has not: every file that has a digest.

    Raises:
        RecordError: one of them is missing, altered or damaged.
    """
    _ = record.metrics, record.states
    if record.check_file("outputs", "outputs.npz") is not None:
        read_outputs(record)
    contents = {name: record.files.read(file) or b"" for name, file in FILES.items()}
    for step in list_saved(record.files):
        saved = read_saved(record.files, step, run_id=record.manifest["run_id"])
        check_written(saved, contents, run=record.name)


def reproduce(
    record: Record,
    program: Compiled,
    *,
    directory: Callable[[], Path],
    hazards: tuple[Hazard, ...],
    secrets: Secrets,
    stop: Callable[[], str],
    restored: Mapping[str, str],
) -> Verdict:
    """Runs a record again as far as can be compared, and compares it on the way.

    Args:
        record: The record; all its files are checked.
        program: It, compiled here as `shorten` has it.
        directory: Makes the directory of the new run, when there is to be one.
        hazards: What `find_hazards` found.
        secrets: What must not be written.
        stop: Why the user wants it to stop; empty while it goes on.
        restored: What was set for this process to be like the record's machine.

    Raises:
        ConfigError: the data are not those of the record.
        RunFailedError: the new run can't be recorded.
    """
    check_data(record, program)
    here = facts_of_process(program.spec)
    environment = compare_environments(record.manifest, here)
    checks = [_check_generator(environment), compare_keys(record, program)]
    if not all(check.equal for check in checks):
        return replace(_verdict(record, checks, environment), restored=dict(restored))
    checks.append(Check("data", True, "digest of all rows"))
    is_exact = record.manifest["guarantee"]["level"] == Level.BIT_EXACT
    goes_on = not is_exact or any(each.rounds for each in environment)
    replay, where = Replay(record, goes_on=goes_on), directory()
    record_run(
        program,
        directory=where,
        hazards=hazards,
        secrets=secrets,
        parent={
            "run_id": record.manifest["run_id"],
            "verb": "reproduce",
            "steps": program.steps,
        },
        stop=lambda: stop() or replay.stop(),
        listen=replay.take,
    )
    made = read_record(str(where))
    params, at_end = _compare_params(record, made)
    checks += _checks_of(replay)
    checks += [params] if program.steps else []
    checks += _check_observed(made)
    checks += [_compare_outputs(record, made)] if isinstance(program, Probe) else []
    verdict = _verdict(record, checks, environment, replay, made, at_end)
    return replace(verdict, restored=dict(restored))


def _check_generator(environment: tuple[Difference, ...]) -> Check:
    other = [str(each) for each in environment if each.cause is Cause.GENERATOR]
    what = "bits, uniform, normal and permutation of a fixed key"
    return Check("generator", not other, what, "; ".join(other))


def _check_observed(made: Record) -> Iterator[Check]:
    """With `rng.observe`: whether the keys that were used are those of the ledger."""
    observed = made.manifest.get("observed")
    if observed:
        what = f"{observed['keys']:,} keys as they were used"
        differs = observed["status"] == "different"
        found = made.manifest["reason"] if differs else ""
        yield Check("observed", not differs, what, found)


def _checks_of(replay: Replay) -> Iterator[Check]:
    units = {
        "batches": ("digest", "of row numbers"),
        "train": ("step", "bit by bit"),
        "eval": ("evaluation", "bit by bit"),
        "states": ("fingerprint", "of the state"),
    }
    for name, (unit, rest) in units.items():
        found = replay.compared[name]
        if found.number:
            each = unit if found.number == 1 else f"{unit}s"
            what = f"{found.number:,} {each} {rest}"
            yield Check(name, not found.differ, what, str(found))


def _compare_params(
    record: Record, made: Record
) -> tuple[Check, ArrayDifferences | None]:
    """The parameters after the last step of the new run, where the record has them."""
    step = made.manifest["steps"]
    is_end = record.manifest["steps"] == step and record.digests.get("params")
    if is_end and record.digests["params"] == made.digests["params"]:
        return Check("params", True, f"all bits after {step:,} steps"), None
    if step not in list_saved(record.files):
        if is_end:
            return Check("params", False, "their digest", "another digest"), None
        return Check("params", None, f"none recorded after {step:,} steps"), None
    found = compare_params_at(step, record, made)
    what = f"{found.leaves:,} arrays after {step:,} steps"
    return Check("params", found.equal, what, _spell(found)), found


def _compare_outputs(record: Record, made: Record) -> Check:
    if not record.digests.get("outputs") or not made.digests.get("outputs"):
        return Check("outputs", None, "none recorded")
    if record.digests["outputs"] == made.digests["outputs"]:
        return Check("outputs", True, "all bits of outputs.npz")
    found = compare_outputs(record, made)
    return Check("outputs", False, "arrays of outputs.npz", _spell(found))


def _spell(found: ArrayDifferences) -> str:
    if found.equal:
        return ""
    if found.first is None:
        return "other arrays"
    size = found.first_largest
    by = "of another shape" if size is None else f"by up to {size:.3g}"
    return f"{found.differing:,} of {found.leaves:,} arrays, first {found.first}: {by}"


def _verdict(
    record: Record,
    checks: list[Check],
    environment: tuple[Difference, ...],
    replay: Replay | None = None,
    made: Record | None = None,
    params: ArrayDifferences | None = None,
) -> Verdict:
    level = _level(checks)
    manifest = record.manifest
    names = ("run_id", "experiment", "status")
    return Verdict(
        level=level,
        promised=str(manifest["guarantee"].get("level")),
        reason=_reason(level, checks, environment, replay, record),
        run={"name": record.name, **{name: manifest[name] for name in names}},
        directory=str(made.files.directory) if made else None,
        steps=replay.compared["train"].number if replay else 0,
        recorded=record.trained,
        checks=tuple(checks),
        first=replay.first if replay else None,
        largest=tuple(replay.largest.values()) if replay else (),
        params=params,
        environment=environment,
    )


_KEYS = ("generator", "keys", "data", "batches", "observed")


def _level(checks: list[Check]) -> Reached:
    if any(check.equal is False for check in checks if check.what in _KEYS):
        return Reached.DIFFERENT
    floats = [check.equal for check in checks if check.what not in _KEYS]
    if any(equal is False for equal in floats) or True not in floats:
        return Reached.KEY_EXACT
    return Reached.BIT_EXACT


def _reason(
    level: Reached,
    checks: list[Check],
    environment: tuple[Difference, ...],
    replay: Replay | None,
    record: Record,
) -> str:
    told = (Cause.NONE, Cause.GENERATOR)  # another generator is a check of its own
    causes = [each for each in environment if each.cause not in told]
    why = "; ".join(map(str, causes[:3])) or _why_of(record)
    if level is Reached.BIT_EXACT:
        return "every bit that was compared is as recorded"
    if level is Reached.DIFFERENT:
        found = next(c for c in checks if c.equal is False and c.what in _KEYS)
        what = f"{found.what} differ{'s' if found.what == 'generator' else ''}"
        return f"{what}: {found.found}. {why}"
    others = [check for check in checks if check.equal is False]
    if not others:
        return "keys are as recorded; there was no number to compare"
    first = replay and replay.first
    where = str(first) if first else f"{others[0].what}: {others[0].found}"
    return f"keys and draws are as recorded; floats differ from {where}. {why}"


def _why_of(record: Record) -> str:
    """What the record itself says of floats that are others."""
    sweep = record.manifest.get("sweep")
    if isinstance(sweep, Mapping) and sweep.get("mode") == "vmap":
        return "it was computed with other lanes by vmap"
    return "nothing that was recorded says why"
