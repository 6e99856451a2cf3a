# SPDX-License-Identifier: Apache-2.0
"""A search: trials of an Optuna study, launched in batches by whatever launches jobs.

The study lies in a database, so a search that was killed goes on when it is launched
again into the same directory: what had completed is told, what had not is asked again.
"""

import json
import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from runner.errors import ConfigError, RunFailedError
from runner.sweep.jobs import Status, read_job
from runner.sweep.objective import direction_of
from runner.sweep.study import PRUNED, import_optuna, sweep_directory

from ._space import Space, parse_space
from ._study import alone, disconnect, make, open_study, quiet_optuna

__all__ = ["check_options", "search"]

_log = logging.getLogger(__name__)
_COUNTS = ("n_trials", "n_jobs", "repeats", "max_failures")
_ALL = ("GridSampler", "BruteForceSampler")  # every point there is, once
_SEEDED = (*_ALL, "CmaEsSampler", "QMCSampler")  # one seed for the whole study
_KILLED = "killed"  # set on a trial that is asked again


def check_options(options: Mapping[str, Any]) -> None:
    """Refuses options out of range, before anything is written.

    Raises:
        ConfigError: one is, or Optuna is not installed.
    """
    import_optuna()
    for name in _COUNTS:
        if options[name] < 1:
            path, rule = f"hydra.sweeper.{name}", "must be 1 or more"
            raise ConfigError(path, rule, got=options[name])
    known = ("minimize", "maximize")
    if options["direction"] not in (None, *known):
        raise ConfigError(
            "hydra.sweeper.direction",
            "no such direction",
            got=options["direction"],
            allowed=f"Known: {', '.join(known)}, null",
        )
    if options["pruner"] is not None and options["repeats"] > 1:
        raise ConfigError(
            "hydra.sweeper.pruner",
            "prunes single jobs, and a trial has several",
            got=options["repeats"],
            fix="Set hydra.sweeper.repeats=1",
        )


def search(sweeper: Any, arguments: Sequence[str]) -> list[Any]:
    """Runs a search to its end.

    Args:
        sweeper: Its options, config and launcher.
        arguments: Overrides of the command line.

    Returns:
        What the launcher returned, batch by batch.

    Raises:
        ConfigError: it can't be made.
        RunFailedError: too many trials failed, or none completed.
    """
    space = parse_space(sweeper, arguments)
    direction = sweeper.options["direction"] or direction_of(sweeper.config)
    sweeper.validate_batch_is_legal([space.probe])
    directory = Path(str(sweeper.config.hydra.sweep.dir))
    directory.mkdir(parents=True, exist_ok=True)
    with alone(directory), quiet_optuna():
        OmegaConf.save(sweeper.config, directory / "multirun.yaml")
        found = _Search(sweeper, space, directory, direction)
        found.settle_killed()
        while found.to_go > 0:
            found.run_batch()
        found.conclude()
    return found.returns


@dataclass(frozen=True)
class _Trial:
    """A trial that was asked for, and the jobs that it is made of."""

    trial: Any
    jobs: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class _Ended:
    """What came of a job: a finite value of its objective, or why there is none."""

    value: float | None
    reason: str = ""


class _Search:
    """A study and what is still to be asked of it."""

    def __init__(
        self, sweeper: Any, space: Space, directory: Path, direction: str
    ) -> None:
        self.sweeper, self.space, self.options = sweeper, space, sweeper.options
        self.config = sweeper.config
        self.directory, self.here = directory, sweep_directory(self.config.hydra)
        self.study = open_study(self.config, direction)
        self._check_same()
        self.returns: list[Any] = []

    @property
    def to_go(self) -> int:
        """Trials that the study still lacks."""
        wanted = int(self.options["n_trials"])
        if self.space.size is not None and self.sampler_name in _ALL:
            wanted = min(wanted, self.space.size)
        trials = self.study.get_trials(deepcopy=False)
        return wanted - sum(_KILLED not in t.user_attrs for t in trials if _is_done(t))

    @property
    def sampler_name(self) -> str:
        """The class of the sampler."""
        return str(self.options["sampler"]["_target_"]).rsplit(".", 1)[-1]

    def _check_same(self) -> None:
        """A study whose other values were others has trials of another objective."""
        fixed = list(self.space.fixed)
        before = self.study.user_attrs.get("fixed")
        if before is None:
            self.study.set_user_attr("fixed", fixed)
        elif before != fixed:
            other = sorted(set(before) ^ set(fixed)) or fixed
            raise ConfigError(
                "hydra.sweep.dir",
                f"holds a search with other overrides ({', '.join(other)})",
                got=str(self.directory),
                fix="Set hydra.sweep.dir to a new directory",
            )

    def settle_killed(self) -> None:
        """Ends the trials that this directory's last search left open."""
        optuna = import_optuna()
        for trial in self.study.get_trials(deepcopy=False):
            if _is_done(trial) or not self._is_own(trial):
                continue
            jobs = [self._recorded(n) for n in _jobs(trial)]
            if jobs and all(job is not None for job in jobs):
                self._tell(trial, [job for job in jobs if job is not None])
                continue
            self.study._storage.set_trial_user_attr(trial._trial_id, _KILLED, True)
            self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            self.study.enqueue_trial(trial.params)
            _log.info(f"Trial {trial.number} was killed and is asked again")

    def _is_own(self, trial: Any) -> bool:
        """Whether this directory's search asked for it, and no other in the study."""
        alone = self.here if self.options["storage"] is None else None
        return bool(trial.user_attrs.get("directory", alone) == self.here)

    def _recorded(self, number: int) -> _Ended | None:
        """How a job ended, as its record says; None of one that did not."""
        job = read_job(self.directory / str(number), label=str(number))
        if job.status is Status.FAILED:
            return _Ended(None, job.reason)
        if job.status is not Status.COMPLETED or job.objective is None:
            return None
        return _ended(job.objective.last)

    def run_batch(self) -> None:
        """Asks for trials, launches their jobs, tells what came of them."""
        before = self.study.get_trials(deepcopy=False)
        numbers = [n for t in before if self._is_own(t) for n in _jobs(t)]
        first = 1 + max(numbers, default=-1)
        self.study.sampler = self._make_sampler(len(before))
        batch, number = [], first
        for _ in range(min(self.to_go, int(self.options["n_jobs"]))):
            trial = self._ask()
            jobs = self.space.jobs_of(trial.params, repeats=self.options["repeats"])
            trial.set_user_attr("directory", self.here)
            trial.set_user_attr("jobs", list(range(number, number + len(jobs))))
            number += len(jobs)
            batch.append(_Trial(trial, jobs))
        overrides = [job for each in batch for job in each.jobs]
        returned = self._launch(overrides, first)
        if self.sampler_name in _ALL:  # they would stop a loop that is not Optuna's
            self.study.sampler = import_optuna().samplers.RandomSampler(seed=0)
        self.returns.append(returned)
        rest = iter(returned)
        for each in batch:
            numbers = self.study.trials[each.trial.number].user_attrs["jobs"]
            ended = [self._returned(n, next(rest, None)) for n in numbers]
            self._tell(each.trial, ended)
        self._check_failures()

    def _ask(self) -> Any:
        try:
            return self.study.ask(self.space.distributions)
        except ValueError as error:  # choices that are not those of the study
            rule = f"is not what was searched here before ({error})"
            raise ConfigError("hydra.sweeper.params", rule) from error

    def _make_sampler(self, number: int) -> Any:
        """A sampler whose draws depend on the seed and on the trials so far alone.

        So a search that goes on asks for what it would have asked for, and not for
        its first trials once more.
        """
        node = OmegaConf.to_container(self.options["sampler"], resolve=True)
        assert isinstance(node, dict)
        if node.get("seed") is not None and self.sampler_name not in _SEEDED:
            words = np.random.SeedSequence([int(node["seed"]), number])
            node["seed"] = int(words.generate_state(1)[0])
        if self.sampler_name == "GridSampler":
            node["search_space"] = self.space.grid()
        return make(node, path="hydra.sweeper.sampler")

    def _launch(self, overrides: list[tuple[str, ...]], first: int) -> Sequence[Any]:
        """What the launcher returns; nothing where it gives up for a job's sake."""
        self.sweeper.validate_batch_is_legal(overrides)
        disconnect(self.study)
        try:
            return self.sweeper.launcher.launch(overrides, initial_job_idx=first)
        except Exception as error:  # of a launcher that raises what a job did
            _log.warning(f"The launcher gave up: {error}")
            return ()

    def _returned(self, number: int, returned: JobReturn | None) -> _Ended:
        if returned is None:  # nobody says: its record may
            lost = _Ended(None, "the launcher returned nothing of it")
            return self._recorded(number) or lost
        if returned.status is JobStatus.FAILED:
            return _Ended(None, " ".join(str(returned._return_value).split()))
        return _ended(returned.return_value)

    def _tell(self, trial: Any, ended: Sequence[_Ended]) -> None:
        """A trial's value is the mean over its jobs; one that is no number fails."""
        states, number = import_optuna().trial.TrialState, trial.number
        attributes = self.study.trials[number].user_attrs
        values = [each.value for each in ended if each.value is not None]
        if PRUNED in attributes:
            self.study.tell(number, state=states.PRUNED)
            _log.info(f"Trial {number}: {attributes[PRUNED]}")
        elif len(values) == len(ended):
            value = statistics.fmean(values)
            self.study.tell(number, value)
            _log.info(f"Trial {number}: {value:.6g} with {_said(trial.params)}")
        else:
            reason = next(each.reason for each in ended if each.value is None)
            self.study.tell(number, state=states.FAIL)
            self.study.set_user_attr("failure", reason)
            _log.info(f"Trial {number}: failed ({reason})")

    def _check_failures(self) -> None:
        states = [trial.state.name for trial in self.study.get_trials(deepcopy=False)]
        worked = [number for number, state in enumerate(states) if state != "FAIL"]
        in_a_row = len(states) - 1 - max(worked, default=-1)
        if in_a_row >= self.options["max_failures"]:
            reason = self.study.user_attrs.get("failure")
            what = f"{in_a_row} trials failed one after another"
            raise RunFailedError(f"hydra.sweeper.max_failures: {what} ({reason}).")

    def conclude(self) -> None:
        """Writes `optimization_results.yaml`, as Hydra's sweepers do.

        Raises:
            RunFailedError: no trial completed.
        """
        trials = self.study.get_trials(deepcopy=False)
        done = [trial for trial in trials if trial.state.name == "COMPLETE"]
        if not done:
            reason = self.study.user_attrs.get("failure")
            why = f" ({reason.rstrip('.')})" if reason else ""
            what = f"no trial of {self.directory} completed{why}"
            raise RunFailedError(f"hydra.sweeper: {what}.")
        best = self.study.best_trial
        results = {
            "name": "optuna",
            "best_params": best.params,
            "best_value": best.value,
            "best_trial": best.number,
        }
        path = self.directory / "optimization_results.yaml"
        OmegaConf.save(OmegaConf.create(results), path)
        said = f"{best.value:.6g} with {_said(best.params)}"
        _log.info(f"Best of {len(done)}: trial {best.number}, {said}")


def _ended(value: Any) -> _Ended:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return _Ended(None, f"no number came of it ({value!r})")
    return (
        _Ended(number)
        if math.isfinite(number)
        else _Ended(None, f"{number} came of it")
    )


def _jobs(trial: Any) -> Sequence[int]:
    """Numbers of the jobs that a trial is made of."""
    return list(trial.user_attrs.get("jobs", ()))


def _is_done(trial: Any) -> bool:
    return bool(trial.state.is_finished())


def _said(params: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in params.items()
    )
