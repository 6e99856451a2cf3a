# SPDX-License-Identifier: Apache-2.0
"""What `hydra/launcher=vectorized` does; imported when it launches."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.utils import (
    JobReturn,
    configure_log,
    filter_overrides,
    run_job,
    setup_globals,
)
from omegaconf import open_dict

from runner.cli.gate import Gate
from runner.cli.lanes import launch_lanes
from runner.cli.train import run_as_job

if TYPE_CHECKING:
    from hydra_plugins.runner.vectorized import VectorizedLauncher

__all__ = ["launch"]

_log = logging.getLogger(__name__)


def launch(
    launcher: "VectorizedLauncher", job_overrides: Sequence[Sequence[str]], first: int
) -> list[JobReturn]:
    """Runs the runner's own jobs as lanes, and those of any other one by one."""
    setup_globals()
    hydra = launcher.config.hydra
    configure_log(hydra.hydra_logging, hydra.verbose)
    Path(str(hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
    if launcher.function is not run_as_job:
        return [
            _run_one(launcher, overrides, number)
            for number, overrides in enumerate(job_overrides, start=first)
        ]
    Gate.is_reached = True
    _log.info("Launching %s jobs as lanes", len(job_overrides))
    returned = launch_lanes(
        launcher.context,
        launcher.function,
        launcher.config,
        job_overrides,
        first=first,
        options=launcher.options,
    )
    configure_log(hydra.hydra_logging, hydra.verbose)
    return returned


def _run_one(
    launcher: "VectorizedLauncher", overrides: Sequence[str], number: int
) -> JobReturn:
    """A job of another application: what it is made of is not known here."""
    config, context = launcher.config, launcher.context
    _log.info("\t#%s : %s", number, " ".join(filter_overrides(overrides)))
    job = context.config_loader.load_sweep_config(config, list(overrides))
    with open_dict(job):
        job.hydra.job.id = job.hydra.job.num = number
    returned = run_job(
        hydra_context=context,
        task_function=launcher.function,
        config=job,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )
    configure_log(config.hydra.hydra_logging, config.hydra.verbose)
    return returned
