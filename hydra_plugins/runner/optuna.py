# SPDX-License-Identifier: Apache-2.0
"""`hydra/sweeper=optuna`: asks Optuna for a batch of trials, and launches them.

What needs Optuna lies in `_optuna_core.py`, which Hydra does not scan.
"""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

__all__ = ["OptunaSweeper", "OptunaSweeperConf"]


@dataclass
class OptunaSweeperConf:
    """`hydra.sweeper`.

    Args:
        n_trials: Trials that the study is to have in the end.
        n_jobs: Trials in a batch; the launcher gets them together.
        repeats: Jobs of a trial, with seeds one apart; their mean is its value.
        direction: `minimize` or `maximize`; null: as the task's metric.
        storage: URL of a database; null: `study.db` in the sweep's directory.
        study_name: Its name there; null: the sweep's directory.
        max_failures: Trials that may fail one after another.
        sampler, pruner: `_target_` nodes of Optuna's; a pruner of null prunes none.
        params: What to search over, as on the command line.
    """

    defaults: list[Any] = field(
        default_factory=lambda: [{"sampler": "tpe"}, {"pruner": "none"}, "_self_"]
    )
    _target_: str = "hydra_plugins.runner.optuna.OptunaSweeper"
    _recursive_: bool = False
    n_trials: int = 20
    n_jobs: int = 1
    repeats: int = 1
    direction: str | None = None
    storage: str | None = None
    study_name: str | None = None
    max_failures: int = 10
    params: dict[str, Any] | None = None


_SAMPLERS: dict[str, dict[str, Any]] = {
    "tpe": {"_target_": "optuna.samplers.TPESampler", "seed": 0},
    "random": {"_target_": "optuna.samplers.RandomSampler", "seed": 0},
    "grid": {"_target_": "optuna.samplers.GridSampler", "seed": 0},
}
_PRUNERS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "median": {
        "_target_": "optuna.pruners.MedianPruner",
        "n_startup_trials": 5,
        "n_warmup_steps": 0,
    },
    "halving": {"_target_": "optuna.pruners.SuccessiveHalvingPruner"},
}


class OptunaSweeper(Sweeper):
    """Says what a trial came to when its jobs have ended."""

    def __init__(self, **options: Any) -> None:
        self.options = options

    def setup(
        self,
        *,
        hydra_context: HydraContext,
        task_function: TaskFunction,
        config: DictConfig,
    ) -> None:
        """Checks the options and makes the launcher."""
        from ._optuna_core import check_options
        from ._refusing import refusing

        self.task_function = task_function
        with refusing(task_function):
            check_options(self.options)
        from hydra.core.plugins import Plugins

        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Runs trials until the study has as many as it is to have."""
        from ._optuna_core import search
        from ._refusing import refusing

        with refusing(self.task_function):
            return search(self, arguments)


def _store() -> None:
    store = ConfigStore.instance().store
    package = {"provider": "runner"}
    store(group="hydra/sweeper", name="optuna", node=OptunaSweeperConf, **package)
    for name, sampler in _SAMPLERS.items():
        store(group="hydra/sweeper/sampler", name=name, node=sampler, **package)
    for name, pruner in _PRUNERS.items():
        store(
            group="hydra/sweeper/pruner",
            name=name,
            node={"pruner": pruner},
            package="hydra.sweeper",
            **package,
        )


_store()
