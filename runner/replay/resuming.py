# SPDX-License-Identifier: Apache-2.0
"""Where a run that was stopped goes on: at its newest checkpoint that is whole.

What was written past it is cut back, so that in the end every file is the one that
an uninterrupted run writes.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from runner.course import BEGINNING, Best, Start
from runner.errors import ConfigError, RecordError
from runner.guarantee import was_seen_exact
from runner.kept import PARTS, restore
from runner.keys import draw_canary, rng_flags
from runner.manifest import facts_of_process
from runner.program import Program
from runner.recording import Resumption
from runner.records.checkpoint import Saved
from runner.records.events import EvalRecord, StateRecord
from runner.records.metrics import Written, parse_lines
from runner.records.record import Record, kind_of_row
from runner.records.restore import (
    check_written,
    list_saved,
    read_saved,
    restore_leaves,
)
from runner.replay.environment import Cause, compare_environments
from runner.replay.sameness import check_data, compare_keys
from runner.sinks.jsonl import FILES
from runner.spec import RunSpec

__all__ = ["find_resumption"]

_ROOM = 2**20  # bytes of a checkpoint besides: its step, at most


def find_resumption(record: Record, program: Program) -> Resumption:
    """The newest checkpoint that is whole, and what led to it.

    Args:
        record: The run; locked by us.
        program: It, compiled here; may have other `train.steps`.

    Raises:
        RecordError: the record was altered, or the run can't go on.
    """
    _check_same_run(record, program)
    contents = {name: record.files.read(file) or b"" for name, file in FILES.items()}
    notes: list[str] = []
    found: dict[int, Saved] = {}
    for step in list_saved(record.files):
        try:
            saved = read_saved(record.files, step, run_id=record.manifest["run_id"])
        except RecordError as error:
            notes.append(f"checkpoint {step:,} can't be used: {error}")
            continue
        if not found:
            check_written(saved, contents, run=record.name)
        found[step] = saved
    step = max(found, default=0)
    steps = program.spec.train.steps
    is_end = steps == record.config["train"]["steps"]
    is_done = record.manifest["status"] == "completed" or not is_end
    if step > steps or (step == steps and is_done):
        raise ConfigError(
            "train.steps",
            f"the run has taken {step:,} steps already",
            got=steps,
            fix=f"Say train.steps=N with N above {step:,} to train it on",
        )
    if notes:
        notes.append(f"going on from step {step:,} instead")
    kept = _restore(record, program, step) if found else None
    if kept is None:
        sizes = dict.fromkeys(FILES, 0)
        return Resumption(record.manifest, BEGINNING, {}, sizes, {}, notes=tuple(notes))
    sizes, rows = _cut(record, contents, program.spec, step)
    start = Start(
        step, kept, _evaluated(rows, program.spec, name=record.name), _said(rows)
    )
    last = _last_metrics(rows)
    found[step] = replace(found[step], written=_written(contents, sizes))
    mixed = _what_is_another(record, program.spec)
    if mixed:
        notes.append(f"{mixed}: steps from {step:,} on may round otherwise")
    return Resumption(
        record.manifest, start, last, sizes, found, mixed=mixed, notes=tuple(notes)
    )


def _check_same_run(record: Record, program: Program) -> None:
    """Refuses a program that would draw other keys, or read other rows."""
    with rng_flags(program.spec.rng):
        if draw_canary(str(program.spec.rng.impl)) != record.manifest["rng"]["canary"]:
            what = "rng.canary: this machine's generator draws other numbers"
            raise RecordError(f"{record.name}: {what}. Use its versions.")
    keys = compare_keys(record, program)
    if not keys.equal:
        what = f"the program no longer draws what was recorded: {keys.found}"
        raise RecordError(f"{record.name}: {what}. Was the model's code changed?")
    check_data(record, program)


def _restore(record: Record, program: Program, step: int) -> dict[str, Any]:
    """The arrays of a checkpoint, as the program's state holds them."""
    wanted = {name: getattr(program.initial, name) for name in PARTS}
    most = sum(math.prod(s.shape) * s.dtype.itemsize for s in jax.tree.leaves(wanted))
    leaves = restore_leaves(record.files, step, most=most + _ROOM)
    return restore(
        leaves,
        like=program.initial,
        impl=program.plan.impl,
        name=f"{record.name}: checkpoints/{step}",
    )


def _what_is_another(record: Record, spec: RunSpec) -> str:
    """What can round otherwise here than where the run was begun; empty for nothing."""
    found = compare_environments(record.manifest, facts_of_process(spec))
    harmless = {Cause.MESH} if was_seen_exact(spec) else set()
    return "; ".join(
        str(each) for each in found if each.rounds and each.cause not in harmless
    )


_Rows = dict[str, list[dict[str, Any]]]


def _cut(
    record: Record, contents: Mapping[str, bytes], spec: RunSpec, step: int
) -> tuple[dict[str, int], _Rows]:
    """Bytes of each file that an uninterrupted run has written before a step."""
    sizes, rows = {}, {}
    for name, content in contents.items():
        kept = []
        for line in content.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            (row,) = parse_lines(line, name=f"{record.name}: {FILES[name]}")
            if kind_of_row(row, name) is None or not _is_before(row, spec, step):
                break
            kept.append((line, row))
        sizes[name] = sum(len(line) for line, _ in kept)
        rows[name] = [row for _, row in kept]
    return sizes, rows


def _written(
    contents: Mapping[str, bytes], sizes: Mapping[str, int]
) -> dict[str, Written]:
    """What the files hold once they are cut: less, where an end was put off."""
    kept = {name: contents[name][:size] for name, size in sizes.items()}
    return {k: Written(len(v), hashlib.sha256(v).hexdigest()) for k, v in kept.items()}


def _is_before(row: Mapping[str, Any], spec: RunSpec, step: int) -> bool:
    """Whether a row belongs before a step, and is not that of an end put off."""
    if row.get("phase") == "train":
        return bool(row["step"] < step)
    every = spec.eval.every if "phase" in row else spec.checkpoint.digest_every
    is_regular = every is not None and row["step"] % every == 0
    at_end = row["step"] == spec.train.steps
    return 0 < row["step"] <= step and (is_regular or at_end)


def _evaluated(rows: _Rows, spec: RunSpec, *, name: str) -> tuple[EvalRecord, ...]:
    best, records = Best(spec, BEGINNING), []
    for row in rows["metrics"]:
        if row["phase"] == "eval":
            values = _values(row)
            if spec.objective not in values:
                what = f"the evaluation at step {row['step']:,} has no {spec.objective}"
                raise RecordError(f"{name}: metrics.jsonl: {what}.")
            is_best = best.take(values, row["step"])
            records.append(EvalRecord(row["step"], values, is_best))
    return tuple(records)


def _said(rows: _Rows) -> StateRecord | None:
    if not rows["states"]:
        return None
    last = rows["states"][-1]
    return StateRecord(last["step"], last["batches"], last["state"])


def _last_metrics(rows: _Rows) -> dict[str, float]:
    last = {row["phase"]: row for row in rows["metrics"]}
    return {
        f"{phase}/{name}": value
        for phase in ("train", "eval")
        if phase in last
        for name, value in _values(last[phase]).items()
    }


def _values(row: Mapping[str, Any]) -> dict[str, float]:
    names = (name for name in row if name not in ("phase", "step"))
    return {n: np.nan if row[n] is None else row[n] for n in names}
