# SPDX-License-Identifier: Apache-2.0
"""`runner reproduce RUN`: runs it again from its record, and gives a verdict."""

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from runner.cli import print_last
from runner.cli.changes import parse_changes
from runner.cli.running import (
    claim_new,
    keep_log,
    make_program,
    naming_trust,
    share_directory,
    stop_on_signals,
)
from runner.cli.secrecy import keep_secret
from runner.cli.tables import print_table
from runner.determinism import restore_platform
from runner.errors import AlteredRecordError, RunFailedError
from runner.parse import to_plain
from runner.processes.peers import peers
from runner.records.files import refuse_writer, write_atomically
from runner.records.record import Record, read_record
from runner.sinks.text import clean
from runner.spec import CheckpointSpec, SinksSpec, TerminalSpec, WandbSpec

if TYPE_CHECKING:
    from runner.program import Compiled
    from runner.replay.verdict import Verdict

__all__ = ["main"]

_INTERRUPTED = 130


def main(args: list[str]) -> int:
    """Prints the verdict; 0 where no less was reached than was promised, else 1."""
    options = _parser().parse_args(args)
    try:
        record = read_record(options.run)
        if record.files.directory is not None:
            refuse_writer(record.files.directory)  # what is compared must not change
        verdict, was_stopped = _reproduce(record, options)
    except AlteredRecordError as error:
        from runner.replay.verdict import Verdict

        verdict, was_stopped = Verdict.of_altered(options.run, str(error)), False
    code = _INTERRUPTED if was_stopped else int(not verdict.is_kept)
    peers().share(code)
    peers().end()
    document = verdict.to_plain()
    if verdict.directory is not None:
        _write(document, Path(verdict.directory, "verdict.json"))
    if options.json:
        json.dump(document, sys.stdout, indent=1, allow_nan=False)
        print()
    else:
        _print(verdict)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="runner reproduce", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="run directory, .zip or .tar.gz")
    parser.add_argument("--out", metavar="DIR", help="directory of the new run")
    parser.add_argument("--steps", type=_count, metavar="N", help="the first N alone")
    parser.add_argument(
        "--trust",
        action="append",
        default=[],
        metavar="PKG",
        help="a package whose `_target_`s may be built",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="data.path=... where the data lie here",
    )
    parser.add_argument("--json", action="store_true", help="one JSON document")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"must be from 1 to 2147483647 (got {text!r})")
    return int(text)


def _reproduce(record: Record, options: argparse.Namespace) -> "tuple[Verdict, bool]":
    from runner.replay.changes import IN_REPRODUCE, secrets_of, spec_of

    changes = parse_changes(options.set)
    secrets = keep_secret(secrets_of(record, changes))
    spec = spec_of(
        record,
        trusted=tuple(options.trust),
        changes=changes,
        may_change=IN_REPRODUCE,
        fixed=_fixed(record, quiet=options.json),
    )
    restored = restore_platform(record.manifest["platform"])
    from runner.replay.reproduce import check_files, reproduce, shorten

    check_files(record)
    spec = shorten(spec, record, steps=options.steps)
    with naming_trust():
        program, hazards = make_program(spec, compile_cache=spec.train.compile_cache)
    if not peers().leads:
        _follow(program)
    with contextlib.ExitStack() as stack, stop_on_signals() as stop:

        def claim() -> Path:
            directory = share_directory(claim_new(spec, options.out))
            assert directory is not None
            stack.enter_context(keep_log(directory))
            return directory

        verdict = reproduce(
            record,
            program,
            directory=claim,
            hazards=hazards,
            secrets=secrets,
            stop=stop,
            restored=restored,
        )
        if verdict.directory is None:
            share_directory(None)
        return verdict, bool(stop())


def _follow(program: "Compiled") -> NoReturn:
    """What another process than 0 does: it takes the steps, if there are to be any."""
    from runner.following import follow_run
    from runner.program import Program

    assert isinstance(program, Program)  # no probe
    directory = share_directory(None)
    if directory is not None:
        follow_run(program, directory=directory)
    code = peers().share(1)
    peers().end()
    raise SystemExit(code)


def _write(document: Any, path: Path) -> None:
    text = json.dumps(document, indent=1, allow_nan=False)
    try:
        write_atomically(path, text + "\n")
    except OSError as error:
        raise RunFailedError(f"{path}: can't be written ({error.strerror}).") from error


def _fixed(record: Record, *, quiet: bool) -> dict[str, Any]:
    """What a record does not decide: where metrics go, what is cached and kept."""
    terminal = TerminalSpec("disabled" if quiet else "auto")
    sinks = SinksSpec(terminal=terminal, wandb=WandbSpec(mode="disabled"))
    checkpoint = to_plain(CheckpointSpec(every=None))
    recorded = record.config.get("checkpoint")
    if isinstance(recorded, dict) and "digest_every" in recorded:
        checkpoint["digest_every"] = recorded["digest_every"]
    return {
        "sinks": to_plain(sinks),
        "checkpoint": checkpoint,
        "train.compile_cache": "auto",
    }


def _print(verdict: "Verdict") -> None:
    print()
    if verdict.checks:
        print_table(
            ("check", "equal", "compared", "found"),
            [(c.what, _EQUAL[c.equal], c.compared, c.found) for c in verdict.checks],
        )
        print()
    if verdict.largest:
        print_table(
            ("metric", "largest difference", "step"),
            [
                (f"{d.phase}/{d.metric}", f"{d.size:.3g}", d.step)
                for d in verdict.largest
            ],
        )
        print()
    if verdict.environment:
        print_table(
            ("differs here", "recorded", "here", "amounts to"),
            [
                (d.path, _short(d.recorded), _short(d.here), d.cause)
                for d in verdict.environment
            ],
        )
        print()
    if verdict.restored:
        made = " ".join(f"{name}={value}" for name, value in verdict.restored.items())
        print(f"set as recorded: {made}")
    promise = "kept" if verdict.is_kept else "not kept"
    print(f"verdict: {verdict.level} (promised {clean(verdict.promised)}: {promise})")
    print(f"reason: {clean(verdict.reason)}")
    if verdict.steps or verdict.recorded:
        print(f"steps compared: {verdict.steps:,} of {verdict.recorded:,} recorded")
    if verdict.directory is not None:
        print_last(verdict.directory)


_EQUAL = {True: "yes", False: "NO", None: "not compared"}


def _short(value: Any) -> str:
    text = "not set" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
