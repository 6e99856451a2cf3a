# SPDX-License-Identifier: Apache-2.0
"""What `hydra/launcher=vectorized` does; imported when it launches."""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.utils import (
    JobReturn,
    configure_log,
    filter_overrides,
    run_job,
    setup_globals,
)
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, open_dict

from runner.cli.forks import Forks, count_processes
from runner.cli.gate import Gate
from runner.cli.lanes import launch_lanes
from runner.cli.shares import launch_shares
from runner.cli.train import run_as_job
from runner.errors import ConfigError
from runner.lanes.mode import Options

from ._refusing import refusing

if TYPE_CHECKING:
    from hydra_plugins.runner.vectorized import VectorizedLauncher

__all__ = ["launch", "read_options"]

_log = logging.getLogger(__name__)


def launch(
    launcher: "VectorizedLauncher", job_overrides: Sequence[Sequence[str]], first: int
) -> list[JobReturn]:
    """Runs the runner's own jobs as lanes, and those of any other one by one."""
    setup_globals()
    hydra = launcher.config.hydra
    configure_log(hydra.hydra_logging, hydra.verbose)
    Path(str(hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
    if launcher.function is not run_as_job and launcher.over is not None:
        return _ship_jobs(launcher, job_overrides, first)
    if launcher.function is not run_as_job:
        return [
            _run_one(launcher, overrides, number)
            for number, overrides in enumerate(job_overrides, start=first)
        ]
    Gate.is_reached = True
    own = launcher.context, launcher.function, launcher.config
    jobs = dict(enumerate(job_overrides, start=first))
    over, options = _choose_over(launcher.over, launcher.options, len(jobs))
    if over is not None:
        with refusing(launcher.function):
            returned = launch_shares(*own, jobs, over=over, options=options)
    else:
        _log.info("Launching %s jobs as lanes", len(jobs))
        returned = launch_lanes(*own, jobs, lanes=len(jobs), options=options)
    configure_log(hydra.hydra_logging, hydra.verbose)
    return returned


def read_options(launcher: "VectorizedLauncher", config: DictConfig) -> Options:
    """What `hydra.launcher` says.

    Raises:
        ConfigError: a number is out of range, `over` is no launcher, or there is none
            to ship shares.
    """
    name = "hydra.launcher.over"
    if launcher.over is None and launcher.lanes_per_job is not None:
        raise ConfigError(
            "hydra.launcher.lanes_per_job",
            "is about jobs of another launcher, and there is none",
            got=launcher.lanes_per_job,
            fix="Name one, as in hydra/launcher/over=joblib",
        )
    if launcher.over is not None and launcher.processes is not None:
        raise ConfigError(
            "hydra.launcher.processes",
            "is about this machine, and another launcher ships the lanes",
            got=launcher.processes,
            fix="Leave out one of the two",
        )
    if launcher.over is not None and not isinstance(launcher.over, Launcher):
        fix = "Name one, as in hydra/launcher/over=joblib"
        raise ConfigError(name, "must be a launcher", got=launcher.over, fix=fix)
    if launcher.over is not None and config.hydra.launcher.over.get("n_jobs") == 0:
        raise ConfigError(f"{name}.n_jobs", "must not be 0", got=0)
    return Options.parse(
        launcher.mode,
        max_lanes=launcher.max_lanes,
        lanes_per_job=launcher.lanes_per_job,
        processes=launcher.processes,
    )


def _choose_over(
    over: Launcher | None, options: Options, lanes: int
) -> tuple[Launcher | None, Options]:
    """What ships shares, here or elsewhere; None where this process runs all."""
    if over is not None:
        return over, options
    most = options.max_lanes or lanes
    processes = min(count_processes(lanes, asked=options.processes), most)
    if processes == 1:
        return None, replace(options, processes=None)
    return Forks(), replace(
        options,
        max_lanes=options.max_lanes and most // processes,
        lanes_per_job=math.ceil(lanes / processes),
        processes=processes,
    )


def _ship_jobs(
    launcher: "VectorizedLauncher", job_overrides: Sequence[Sequence[str]], first: int
) -> list[JobReturn]:
    """Jobs of another application, one by one: they are no lanes."""
    assert launcher.over is not None
    launcher.over.setup(
        hydra_context=launcher.context,
        task_function=launcher.function,
        config=launcher.config,
    )
    return list(launcher.over.launch(job_overrides, initial_job_idx=first))


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
