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
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from runner import CONF_DIR
from runner.cli import print_last
from runner.cli.config import HYDRA_VERSION_BASE, Composed, read_composed
from runner.cli.gate import Gate, Refused
from runner.cli.pruning import prune_by
from runner.cli.refusal import refusal_of
from runner.cli.requeue import find_again, is_requeued, reopen
from runner.cli.running import (
    conclude,
    make_program,
    refuse_processes,
    stop_on_signals,
)
from runner.cli.sweep import concluding_sweep
from runner.errors import RunnerError
from runner.processes.peers import peers
from runner.sweep.objective import objective_of

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
        with _full_errors(), concluding_sweep():
            app()
    except Refused as refused:
        raise refused.error from None
    except RunnerError:
        raise
    except Exception as error:
        if Gate.is_reached and not isinstance(error, _HYDRAS):
            raise
        raise refusal_of(error, args) from error
    return 0


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
    if not peers().leads:
        assert Gate.prepared is not None
        _follow(Gate.prepared.program, directory)
    requeued = is_requeued(directory)
    if Gate.prepared is None:  # a sweep's job: Hydra made the directory
        refuse_processes(config)
        if not requeued:
            claim_directory(directory, exact=True, field="hydra.sweep.dir")
    prepared = Gate.prepared or prepare(config, job.runtime.choices)
    Gate.prepared = None
    resumption = None
    if requeued:
        record = reopen(directory, prepared)
        resumption = find_again(record, prepared)
        if resumption is None:
            print_last(str(directory))
            return objective_of(record.config, record.manifest).last
    write_hydra_files(directory, prepared.composed)
    pruning = prune_by(job, metric=prepared.program.spec.objective)
    with stop_on_signals() as stop:
        recorded = record_run(
            prepared.program,
            directory=directory,
            hazards=prepared.hazards,
            secrets=prepared.composed.secrets,
            sweep=_sweep(job),
            resumption=resumption,
            stop=lambda: stop() or pruning.reason,
            listen=pruning.listen,
        )
    if pruning.stopped(recorded.reason):
        print_last(str(directory))
    else:
        conclude(recorded, directory)
    return recorded.objective


def _follow(program: "Compiled", directory: Path) -> None:
    """Another process than 0 takes the same steps, and leaves as that does."""
    from runner.following import follow_run
    from runner.program import Program

    assert isinstance(program, Program)  # no probe
    conclude(follow_run(program, directory=directory), directory)


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
