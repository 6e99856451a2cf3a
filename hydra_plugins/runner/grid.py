# SPDX-License-Identifier: Apache-2.0
"""`hydra/sweeper=grid`: Hydra's product of values, with values that go together, and
repeats. It is the runner's own choice where none is named.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

__all__ = ["GridSweeper", "GridSweeperConf"]


@dataclass
class GridSweeperConf:
    """`hydra.sweeper`.

    Args:
        params: What to sweep over, as on the command line.
        zip: Fields whose values go together, first with first: `[a, b]`, or a list
            of such lists.
        repeats: Jobs of each setting, with seeds one apart from `seed` on.
        max_batch_size: Jobs that the launcher gets together; null: all.
    """

    _target_: str = "hydra_plugins.runner.grid.GridSweeper"
    params: dict[str, Any] | None = None
    zip: list[Any] = field(default_factory=list)
    repeats: int = 1
    max_batch_size: int | None = None


ConfigStore.instance().store(
    group="hydra/sweeper", name="grid", node=GridSweeperConf, provider="runner"
)


class GridSweeper(Sweeper):
    """Launches a job for each point; one that fails stops none, in no batch."""

    def __init__(
        self,
        params: Any = None,
        zip: Any = (),
        repeats: int = 1,
        max_batch_size: int | None = None,
    ) -> None:
        self.params, self.zip, self.repeats = params or {}, zip, repeats
        self.max_batch_size = max_batch_size

    def setup(
        self,
        *,
        hydra_context: HydraContext,
        task_function: TaskFunction,
        config: DictConfig,
    ) -> None:
        """Makes the launcher."""
        from hydra.core.plugins import Plugins

        self.hydra_context, self.config = hydra_context, config
        self.task_function = task_function
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> list[Sequence[JobReturn]]:
        """Checks every job before the first one starts, then launches them."""
        from ._grid_core import check_jobs, list_jobs, save_config
        from ._refusing import is_ours, refusing

        with refusing(self.task_function):
            jobs = list_jobs(self, arguments)
            check_jobs(self, jobs)
            save_config(self)
        size = self.max_batch_size or len(jobs)
        assert self.launcher is not None
        returned = [
            self.launcher.launch(jobs[first : first + size], initial_job_idx=first)
            for first in range(0, len(jobs), size)
        ]
        for job in (job for batch in returned for job in batch):
            if job.status is JobStatus.FAILED and is_ours(self.task_function):
                raise job._return_value  # `return_value` prints the overrides first
            _ = job.return_value  # raises what the job raised
        return returned
