# SPDX-License-Identifier: Apache-2.0
"""`runner resume RUN [train.steps=N]`: goes on where a run was stopped."""

import argparse
from pathlib import Path

from runner.cli import print_last
from runner.cli.changes import parse_changes
from runner.cli.running import (
    claim_new,
    conclude,
    keep_log,
    make_program,
    naming_trust,
    share_directory,
    stop_on_signals,
)
from runner.cli.secrecy import keep_secret
from runner.determinism import restore_platform
from runner.errors import RecordError
from runner.processes.peers import peers
from runner.processes.place import find_place
from runner.records.files import lock_directory, refuse_links
from runner.records.record import Record, read_record
from runner.records.secrets import Secrets
from runner.records.unpack import unpack
from runner.sinks.text import clean
from runner.spec import ProbeSpec, RunSpec

__all__ = ["main"]


def main(args: list[str]) -> int:
    """Continues a run in its own directory, bit for bit; an archive in a new one."""
    options = _parser().parse_intermixed_args(args)
    changes = parse_changes([*options.changes, *options.set])
    directory = Path(options.run).expanduser()
    if (directory / "run.json").is_file():
        refuse_links(directory)
    record = read_record(options.run)
    from runner.replay.changes import IN_RESUME, secrets_of, spec_of

    secrets = keep_secret(secrets_of(record, changes))
    spec = spec_of(
        record,
        trusted=tuple(options.trust),
        changes=changes,
        may_change=IN_RESUME,
    )
    place = find_place(spec.mesh)
    if place is None or place.index == 0:
        _lock(record)
    if isinstance(spec.task, ProbeSpec):
        what = "a probe has nothing to go on from"
        raise RecordError(f"{options.run}: {what}. Use reproduce to run it again.")
    if record.manifest["status"] == "completed" and "train.steps" not in changes:
        return _let_be(record)
    cache = spec.train.compile_cache
    if cache is not None and "train.compile_cache" not in changes:
        cache = "auto"  # a directory that a record names may be anyone's
    return _resume(record, spec, secrets, compile_cache=cache)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="runner resume", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="run directory, .zip or .tar.gz")
    parser.add_argument(
        "changes", nargs="*", metavar="PATH=VALUE", help="train.steps=N, sinks.*, ..."
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="the same: data.path=... where the data lie here",
    )
    parser.add_argument(
        "--trust",
        action="append",
        default=[],
        metavar="PKG",
        help="a package whose `_target_`s may be built",
    )
    return parser


def _lock(record: Record) -> None:
    """Locks a run directory, which must be as it was when it was read."""
    directory = record.files.directory
    if directory is None:
        return
    if not lock_directory(directory):
        what = "another process is writing it"
        raise RecordError(f"{record.name}: {what}. Wait for it, or stop it.")
    if read_record(record.name).manifest["digest"] != record.manifest["digest"]:
        what = "another process has just written it"
        raise RecordError(f"{record.name}: {what}. Say it again.")


def _let_be(record: Record) -> int:
    """A run that took all its steps is as it should be: a script may ask twice."""
    steps, why = record.manifest["steps"], record.manifest["reason"]
    more = f"Say train.steps=N with N above {steps:,} to train it on"
    said = f"the run is complete, it took {steps:,} steps. {clean(why) or more}."
    print(f"{record.name}: {said}")
    directory = record.files.directory
    print_last(record.name if directory is None else str(directory.resolve()))
    return 0


def _resume(
    record: Record, spec: RunSpec, secrets: Secrets, *, compile_cache: str | None
) -> int:
    restore_platform(record.manifest["platform"])
    with naming_trust():
        program, hazards = make_program(spec, compile_cache=compile_cache)
    from runner.following import agree_on, follow_run
    from runner.program import Program
    from runner.recording import record_run
    from runner.replay.resuming import find_resumption

    assert isinstance(program, Program)  # no probe
    resumption = find_resumption(record, program)
    there = {"step": resumption.start.step, "run.json": record.manifest["digest"]}
    agree_on(there)
    directory = share_directory(_claim(record, spec) if peers().leads else None)
    assert directory is not None
    if not peers().leads:
        start, saved = resumption.start, resumption.saved
        end = follow_run(program, directory=directory, start=start, saved=saved)
        conclude(end, directory)
    with keep_log(directory), stop_on_signals() as stop:
        recorded = record_run(
            program,
            directory=directory,
            hazards=hazards,
            secrets=secrets,
            resumption=resumption,
            stop=stop,
        )
    conclude(recorded, directory.resolve())
    return 0


def _claim(record: Record, spec: RunSpec) -> Path:
    if record.files.directory is not None:
        return record.files.directory
    directory = claim_new(spec)
    unpack(record.files, directory)
    return directory
