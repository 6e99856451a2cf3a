# SPDX-License-Identifier: Apache-2.0
"""What every verb that runs a program does around it: signals, its log, its end."""

import contextlib
import datetime
import logging
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.cli import complain, print_last
from runner.cli.secrecy import BlottingFormatter, blot
from runner.determinism import settle_backend
from runner.errors import ConfigError, RecordError, RunFailedError, UntrustedTargetError
from runner.processes.join import join
from runner.processes.peers import peers
from runner.records.files import claim_directory
from runner.spec import RunSpec

if TYPE_CHECKING:
    from runner.hazards.find import Hazard
    from runner.loop import Outcome
    from runner.program import Compiled
    from runner.recording import Recorded

__all__ = [
    "INTERRUPTED",
    "claim_new",
    "conclude",
    "keep_log",
    "make_program",
    "naming_trust",
    "refuse_processes",
    "share_directory",
    "stop_on_signals",
]

INTERRUPTED = 130
_STOPPED = "stopped by the user"
_SEEN_WITHIN = 10.0  # seconds that a network file system takes to show a directory
_FORMAT = "%(asctime)s %(levelname)s %(message)s"  # as Hydra's job_logging/runner.yaml


def conclude(recorded: "Recorded | Outcome", directory: Path) -> None:
    """Says where the run is, and leaves with what its status asks for."""
    peers().end()
    if not peers().leads:
        codes = {"interrupted": INTERRUPTED, "failed": RunFailedError.exit_code}
        raise SystemExit(codes.get(recorded.status, 0))
    print_last(str(directory))
    if recorded.status == "interrupted":
        raise SystemExit(INTERRUPTED)
    if recorded.status == "failed":
        raise RunFailedError(f"run: {recorded.reason}. See {directory}.")


def refuse_processes(config: Mapping[str, Any]) -> None:
    """Refuses `mesh.distributed` in a job of a sweep.

    Raises:
        ConfigError: it is set.
    """
    if (config.get("mesh") or {}).get("distributed") is not None:
        raise ConfigError(
            "mesh.distributed",
            "not in a sweep, whose jobs share this process",
            fix="Launch each job as a run, or set it to null",
        )


def share_directory(claimed: Path | None) -> Path | None:
    """The run directory that process 0 has claimed, in all processes.

    Args:
        claimed: It; None in the others, and where there is none.

    Raises:
        RecordError: this process can't see it.
    """
    company = peers()
    shared = company.share(str(claimed.resolve()) if claimed else None)
    if shared is None:
        return None
    directory = claimed or Path(shared)
    end = time.monotonic() + _SEEN_WITHIN
    while not directory.is_dir():
        if time.monotonic() > end:
            raise RecordError(
                f"{directory}: {socket.gethostname()} can't see it. Run directories "
                "must be on a file system that all processes share."
            )
        time.sleep(_SEEN_WITHIN / 100)
    company.begin(directory)
    return directory


def make_program(
    spec: RunSpec, *, compile_cache: str | None
) -> "tuple[Compiled, tuple[Hazard, ...]]":
    """Builds, traces and audits a run, and what was found of hazards; writes nothing.

    Args:
        spec: The run.
        compile_cache: `train.compile_cache`, or another one than the spec's: what is
            compiled comes from it and runs, so that a record does not choose it.

    Raises:
        RunnerError: the run can't be made, its keys are hazardous, or it is to be
            strict and can't be.
    """
    settle_backend(spec)
    spec = join(spec, complain=complain, close=_close_record)
    from runner.compile import compile_run
    from runner.following import agree_on_program
    from runner.guarantee import refuse_below_strict
    from runner.hazards.find import find_hazards, refuse_hazards
    from runner.platforms import set_compile_cache
    from runner.sinks.base import make_sinks

    make_sinks(spec.sinks)  # refuses what can't be opened
    set_compile_cache(compile_cache)
    program = compile_run(spec)
    hazards = find_hazards(program)
    refuse_hazards(hazards, allow=spec.rng.allow)
    refuse_below_strict(program)
    agree_on_program(program)
    return program, hazards


def _close_record(directory: Path, line: str) -> None:
    from runner.records.closing import close_record
    from runner.sinks.jsonl import FILES

    # The line at hand is worth more than what a broken record raises.
    with contextlib.suppress(OSError, ValueError, KeyError):
        close_record(directory, blot(line), files=FILES)


def claim_new(spec: RunSpec, out: str | None = None) -> Path:
    """A directory for a run made from a record: as told, or as training names it."""
    if out is not None:
        path = Path(out).expanduser()
        return claim_directory(path, exact=True, field="--out").resolve()
    now = datetime.datetime.now().astimezone()
    names = [n for n in re.split(r"[^\w.-]+", spec.experiment) if n.strip(".")]
    path = Path("outputs", *(names or ["run"]), f"{now:%Y-%m-%d}", f"{now:%H-%M-%S}")
    return claim_directory(path, exact=False, field="outputs").resolve()


@contextlib.contextmanager
def naming_trust() -> Iterator[None]:
    """Says how to trust a package that a record asks for: on the command line alone."""
    try:
        yield
    except UntrustedTargetError as error:
        if not str(error.fix).startswith("Add its package"):  # it can't be trusted
            raise
        package = str(error.got).partition(".")[0]
        raise UntrustedTargetError(
            error.path,
            error.rule,
            got=error.got,
            allowed=error.allowed,
            fix=f"Say --trust {package} if you know what it runs",
        ) from error


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Callable[[], str]]:
    """Yields what says why to stop: after SIGINT or SIGTERM, that the user wants it.

    A second signal acts as it always does.
    """
    seen: list[int] = []

    def note(number: int, _: Any) -> None:
        seen.append(number)
        signal.signal(number, before[number])

    if peers().count > 1:  # the supervisors get them
        yield peers().stop_reason
        return
    numbers = (int(signal.SIGINT), int(signal.SIGTERM))
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, note)
    try:
        yield lambda: _STOPPED if seen else ""
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def keep_log(directory: Path) -> Iterator[None]:
    """Appends what is logged to `runner.log`, and shows warnings, as in training."""
    file = logging.FileHandler(directory / "runner.log")
    file.setFormatter(BlottingFormatter(_FORMAT))
    console = logging.StreamHandler()
    console.setFormatter(BlottingFormatter("%(levelname)s: %(message)s"))
    console.setLevel(logging.WARNING)
    root, ours = logging.getLogger(), logging.getLogger("runner")
    _drop_absls(root)
    before, level = ours.level, root.level
    root.setLevel(logging.WARNING)
    ours.setLevel(logging.INFO)
    for handler in (file, console):
        root.addHandler(handler)
    try:
        yield
    finally:
        for handler in (file, console):
            root.removeHandler(handler)
        file.close()
        ours.setLevel(before)
        root.setLevel(level)


def _drop_absls(root: logging.Logger) -> None:
    """Orbax logs while it is imported, and absl gives a root without handlers one for
    it: that would say each warning twice, once with secrets in it.
    """
    for handler in list(root.handlers):
        if type(handler) is logging.StreamHandler:
            root.removeHandler(handler)
