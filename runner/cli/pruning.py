# SPDX-License-Identifier: Apache-2.0
"""A job of a search that stops itself, when the search's pruner has seen enough of it.

The job reports each evaluation to the study and asks the pruner, which compares it
with the other trials. So it does not matter who launched the job, nor where, as long
as the study's database can be reached from there.
"""

import logging
import math
import warnings
from typing import Any

from hydra.types import RunMode

from runner.sweep.study import (
    PRUNED,
    SWEEPER,
    import_optuna,
    storage_of,
    study_name_of,
    sweep_directory,
)

__all__ = ["Pruning", "prune_by"]

_log = logging.getLogger("runner")


class Pruning:
    """Listens to a run, and says why to stop it.

    Args:
        trial: The run's trial in its study; None where nothing is pruned.
        metric: The objective.
    """

    def __init__(self, trial: Any, metric: str) -> None:
        self._trial, self._metric = trial, metric
        self.reason = ""

    def listen(self, event: object) -> None:
        """Reports an evaluation, and asks."""
        from runner.records.events import EvalRecord

        if self._trial is None or self.reason or not isinstance(event, EvalRecord):
            return
        value = float(event.metrics[self._metric])
        if not math.isfinite(value):
            return
        try:
            self._trial.report(value, event.step)
            if self._trial.should_prune():
                said = f"{self._metric} {value:.6g}"
                self.reason = f"pruned at step {event.step}: {said}"
        except Exception as error:  # a run is worth more than the search's database
            first = str(error).partition("\n")[0]
            _log.warning("not pruned any more: %s", first)
            self._trial = None

    def stopped(self, reason: str) -> bool:
        """Whether it was this that stopped the run; then the study is told so.

        Args:
            reason: Why the run ended; one that had ended by then was not pruned.
        """
        if not self.reason or reason != self.reason:
            return False
        self._trial.set_user_attr(PRUNED, reason)
        return True


def prune_by(hydra: Any, *, metric: str) -> Pruning:
    """What prunes a job of a sweep.

    Args:
        hydra: The job's own node of that name in its config.
        metric: Its objective.
    """
    sweeper = hydra.sweeper
    is_search = hydra.mode == RunMode.MULTIRUN and sweeper.get("_target_") == SWEEPER
    if not is_search or sweeper.pruner is None:
        return Pruning(None, "")
    optuna = import_optuna()
    from hydra.utils import instantiate

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study = optuna.load_study(
            storage=storage_of(hydra),
            study_name=study_name_of(hydra),
            sampler=optuna.samplers.RandomSampler(seed=0),  # asked for nothing
            pruner=instantiate(sweeper.pruner),
        )
    found = [
        trial
        for trial in study.get_trials(deepcopy=False)
        if not trial.state.is_finished()
        and hydra.job.num in trial.user_attrs.get("jobs", ())
        and trial.user_attrs.get("directory") == sweep_directory(hydra)
    ]
    trial = optuna.trial.Trial(study, found[-1]._trial_id) if found else None
    return Pruning(trial, metric)
