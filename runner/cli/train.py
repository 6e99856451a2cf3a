# SPDX-License-Identifier: Apache-2.0
"""`runner +experiment=NAME [overrides]`: composes, plans, trains, records."""

import contextlib
import itertools
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobStatus
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from runner import CONF_DIR
from runner.cli.config import HYDRA_VERSION_BASE, Composed, read_composed
from runner.cli.gate import Gate, Refused
from runner.cli.refusal import refusal_of
from runner.cli.running import conclude, make_program, stop_on_signals
from runner.errors import RunFailedError, RunnerError, in_one_line

if TYPE_CHECKING:
    from runner.hazards.find import Hazard
    from runner.program import Compiled

__all__ = ["Prepared", "main", "prepare", "run_as_job"]

_FLAGS_WITH_VALUE = (
    *("-c", "--cfg", "-p", "--package", "-cp", "--config-path", "-cn"),
    *("--config-name", "-cd", "--config-dir", "--experimental-rerun"),
)
_HYDRAS = (HydraException, OmegaConfBaseException)


@dataclass(frozen=True)
class Prepared:
    """A run that was checked in every respect, and not begun."""

    composed: Composed
    program: "Compiled"
    hazards: "tuple[Hazard, ...]"


def main(args: list[str]) -> int:
    """Hands the command line to Hydra; its errors come back as one line."""
    app = hydra.main(
        version_base=HYDRA_VERSION_BASE, config_path=str(CONF_DIR), config_name="config"
    )(run_as_job)
    sys.argv = ["runner", *_flags_first(args)]
    try:
        with _full_errors():
            app()
    except Refused as refused:
        raise refused.error from None
    except RunnerError as error:  # of a sweep's job; Hydra ran the others, too
        raise RunFailedError(_name_failed() or str(error)) from error
    except Exception as error:
        if failed := _name_failed():
            raise RunFailedError(failed) from error
        if Gate.is_reached and not isinstance(error, _HYDRAS):
            raise
        raise refusal_of(error, args) from error
    return 0


def _name_failed() -> str:
    """Every job of a sweep that failed, and why; empty where none did."""
    failed = {
        int(job.hydra_cfg.hydra.job.num): job
        for job in Gate.ended
        if job.status is JobStatus.FAILED and job.hydra_cfg is not None
    }
    lines = [f"{len(failed)} of {len(Gate.ended)} jobs failed:"]
    for number, job in sorted(failed.items()):
        said = in_one_line(job._return_value)  # `return_value` would raise it
        lines.append(f"job {number} ({' '.join(job.overrides or ())}): {said}")
    return "\n".join(lines) if failed else ""


def _flags_first(args: list[str]) -> list[str]:
    """Hydra takes no override after a flag that follows one; people type them so."""
    flags, overrides = [], []
    words = iter(args)
    for word in words:
        if not word.startswith("-"):
            overrides.append(word)
            continue
        flags.append(word)
        if word in _FLAGS_WITH_VALUE:
            flags.extend(itertools.islice(words, 1))
    return [*flags, *overrides]


def prepare(config: DictConfig, choices: Mapping[str, Any]) -> Prepared:
    """Parses, builds, traces and audits a job; writes nothing.

    Raises:
        RunnerError: the run can't be made, its keys are hazardous, or it is to be
            strict and can't be.
    """
    composed = read_composed(config, choices=choices)
    spec = composed.spec
    program = make_program(spec, compile_cache=spec.train.compile_cache)
    return Prepared(composed, *program)


def run_as_job(config: DictConfig) -> float | None:
    """One job; its mistakes pass by Hydra, unless there are other jobs to run."""
    Gate.is_reached = True
    try:
        return _run_job(config)
    except RunnerError as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            raise
        raise Refused(error) from error


def _run_job(config: DictConfig) -> float | None:
    """Trains in the directory that Hydra made for the job."""
    from runner.cli.hydra_files import write_hydra_files
    from runner.recording import record_run
    from runner.records.files import claim_directory

    job = HydraConfig.get()
    directory = Path(job.runtime.output_dir)
    if Gate.prepared is None:  # a sweep's job: Hydra made the directory
        claim_directory(directory, exact=True, field="hydra.sweep.dir")
    prepared = Gate.prepared or prepare(config, job.runtime.choices)
    Gate.prepared = None
    write_hydra_files(directory, prepared.composed)
    with stop_on_signals() as stop:
        recorded = record_run(
            prepared.program,
            directory=directory,
            hazards=prepared.hazards,
            secrets=prepared.composed.secrets,
            sweep=_sweep(job),
            stop=stop,
        )
    conclude(recorded, directory)
    return recorded.objective


def _sweep(job: Any) -> dict[str, Any] | None:
    if job.mode != RunMode.MULTIRUN:
        return None
    return {"id": str(job.sweep.dir), "lane": job.job.num, "lanes": None, "mode": "job"}


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
