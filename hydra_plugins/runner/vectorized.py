# SPDX-License-Identifier: Apache-2.0
"""`hydra/launcher=vectorized`: the jobs of a sweep as lanes of compiled programs.

Every Hydra application imports this module, so it imports no more than Hydra has.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

__all__ = ["VectorizedConf", "VectorizedLauncher"]


@dataclass
class VectorizedConf:
    """`hydra.launcher`.

    Args:
        mode: `map` computes each lane as the run alone; `vmap` all at once, with the
            same keys and other rounding; `auto` measures which is faster.
        max_lanes: How many lanes are in memory at a time; null: as many as fit.
        lanes_per_job: How many lanes a job of `over` has; null: one job for each that
            `over` is known to run at a time, or for all.
        processes: How many processes of this machine run lanes; null: on CPU one for
            each core, where lanes are many, elsewhere one.
        over: The launcher that ships groups of lanes; null: this process runs all.
    """

    defaults: list[Any] = field(default_factory=lambda: ["_self_", {"over": None}])
    _target_: str = "hydra_plugins.runner.vectorized.VectorizedLauncher"
    mode: str = "auto"
    max_lanes: int | None = None
    lanes_per_job: int | None = None
    processes: int | None = None
    over: Any = None


_STORE = ConfigStore.instance()
_STORE.store(
    group="hydra/launcher", name="vectorized", node=VectorizedConf, provider="runner"
)
for _name in ("joblib", "submitit_local", "submitit_slurm", "ray"):
    # Looked up when it is chosen: it may not be installed.
    _STORE.store(
        group="hydra/launcher/over",
        name=_name,
        node={"defaults": [f"/hydra/launcher/{_name}@_here_"]},
        provider="runner",
    )


class VectorizedLauncher(Launcher):
    """Runs the jobs of a sweep beside each other, in this process or in shares."""

    def __init__(
        self,
        mode: str = "auto",
        max_lanes: int | None = None,
        lanes_per_job: int | None = None,
        processes: int | None = None,
        over: Launcher | None = None,
    ) -> None:
        self.mode, self.max_lanes = mode, max_lanes
        self.lanes_per_job, self.processes = lanes_per_job, processes
        self.over = over

    def setup(
        self,
        *,
        hydra_context: HydraContext,
        task_function: TaskFunction,
        config: DictConfig,
    ) -> None:
        """Checks the options, and keeps what a job is made from.

        The sweeper composes each job, too.
        """
        from hydra_plugins.runner._core import read_options
        from runner.cli.composing import compose_once

        from ._refusing import refusing

        with refusing(task_function):
            self.options = read_options(self, config)
        compose_once(hydra_context.config_loader)
        self.context, self.function, self.config = hydra_context, task_function, config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Runs a batch of jobs to their ends."""
        from hydra_plugins.runner import _core

        return _core.launch(self, job_overrides, initial_job_idx)
