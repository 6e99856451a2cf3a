# SPDX-License-Identifier: Apache-2.0
"""`runner +experiment=NAME [overrides]`: composes, plans, trains, records."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from runner import CONF_DIR
from runner.cli.config import HYDRA_VERSION_BASE, Composed, keys_at, read_composed
from runner.cli.gate import Gate, Refused
from runner.cli.refusal import refusal_of
from runner.errors import RecordError, RunFailedError, RunnerError

if TYPE_CHECKING:
    from runner.hazards import Hazard
    from runner.program import Program

__all__ = ["Prepared", "main", "prepare"]

_INTERRUPTED = 130


@dataclass(frozen=True)
class Prepared:
    """A run that was checked in every respect, and not begun."""

    composed: Composed
    program: "Program"
    hazards: "tuple[Hazard, ...]"


def main(args: list[str]) -> int:
    """Hands the command line to Hydra; its errors come back as one line."""
    app = hydra.main(
        version_base=HYDRA_VERSION_BASE, config_path=str(CONF_DIR), config_name="config"
    )(_job)
    sys.argv = ["runner", *args]
    try:
        with _full_errors():
            app()
    except Refused as refused:
        raise refused.error from None
    except RunnerError as error:  # of a sweep's job; Hydra ran the others, too
        raise RunFailedError(str(error)) from error
    except (HydraException, OmegaConfBaseException) as error:
        raise refusal_of(error, lambda path: keys_at(path, args)) from error
    return 0


def prepare(config: DictConfig, choices: Mapping[str, Any]) -> Prepared:
    """Parses, builds, traces and audits a job; writes nothing.

    Raises:
        RunnerError: the run can't be made, or its keys are hazardous.
    """
    composed = read_composed(config, choices=choices)
    from runner.compile import compile_run
    from runner.hazards import find_hazards, refuse_hazards
    from runner.platforms import set_compile_cache

    set_compile_cache(composed.spec.train.compile_cache)
    program = compile_run(composed.spec)
    hazards = find_hazards(program)
    refuse_hazards(hazards, allow=composed.spec.rng.allow)
    return Prepared(composed, program, hazards)


def _job(config: DictConfig) -> float | None:
    """One job, in the directory that Hydra made for it."""
    from runner.cli.hydra_files import write_hydra_files
    from runner.recording import record_run

    job = HydraConfig.get()
    directory = Path(job.runtime.output_dir)
    if (directory / "run.json").exists():
        raise RecordError(
            f"hydra.sweep: the job's directory holds a run (got {str(directory)!r}). "
            "Set hydra.sweep.dir to a new directory."
        )
    prepared = Gate.prepared or prepare(config, job.runtime.choices)
    Gate.prepared = None
    write_hydra_files(directory, prepared.composed)
    with _stop_signals() as stopped:
        recorded = record_run(
            prepared.program,
            directory=directory,
            hazards=prepared.hazards,
            secrets=prepared.composed.secrets,
            sweep=_sweep(job),
            stop=lambda: bool(stopped),
        )
    print(directory, flush=True)
    if recorded.status == "interrupted":
        raise SystemExit(_INTERRUPTED)
    if recorded.status == "failed":
        error = RunFailedError(f"run: {recorded.reason}. See {directory}.")
        raise error if job.mode == RunMode.MULTIRUN else Refused(error)
    return recorded.objective


def _sweep(job: Any) -> dict[str, Any] | None:
    if job.mode != RunMode.MULTIRUN:
        return None
    return {"id": str(job.sweep.dir), "lane": job.job.num, "lanes": None, "mode": "job"}


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Notes SIGINT and SIGTERM in a list; a second one acts as it always does."""
    seen: list[int] = []

    def note(number: int, _: Any) -> None:
        seen.append(number)
        signal.signal(number, before[number])

    numbers = (int(signal.SIGINT), int(signal.SIGTERM))
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, note)
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _full_errors() -> Iterator[None]:
    """Lets Hydra raise, instead of printing many lines and exiting."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        os.environ.pop("HYDRA_FULL_ERROR")
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before
