# SPDX-License-Identifier: Apache-2.0
"""The jobs of a grid: the product of what is swept over, zips and repeats."""

import itertools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from runner.errors import ConfigError, RunnerError, did_you_mean

from ._refusing import is_ours

__all__ = ["check_jobs", "list_jobs", "save_config"]

_log = logging.getLogger(__name__)
_ZIP, _REPEATS = "hydra.sweeper.zip", "hydra.sweeper.repeats"

Job = list[str]


def list_jobs(sweeper: Any, arguments: Sequence[str]) -> list[Job]:
    """The overrides of each job; what is named last varies fastest, repeats first.

    Args:
        sweeper: Its options and config.
        arguments: Overrides of the command line.

    Raises:
        ConfigError: an option is out of range, a sweep is empty or no list, or what
            goes together has not as many values.
    """
    for name in ("repeats", "max_batch_size"):
        value = getattr(sweeper, name)
        if value is not None and value < 1:
            path = f"hydra.sweeper.{name}"
            raise ConfigError(path, "must be 1 or more", got=value)
    words = [f"{key}={_spell(value)}" for key, value in sweeper.params.items()]
    parser = OverridesParser.create(config_loader=sweeper.hydra_context.config_loader)
    overrides = {
        override.get_key_element(): override
        for override in parser.parse_overrides([*words, *arguments])
    }
    choices = {key: _choices(key, each) for key, each in overrides.items()}
    swept = [key for key, each in overrides.items() if each.is_sweep_override()]
    if sweeper.repeats > 1:
        choices["seed"] = _seeds(sweeper, overrides)
    axes = _axes(choices, _zips(sweeper.zip, choices, swept))
    return [
        _in_order(choices, dict(pair for axis in point for pair in axis))
        for point in itertools.product(*axes)
    ]


def _in_order(keys: Mapping[str, Any], words: Mapping[str, str]) -> Job:
    return [words[key] for key in keys]


def _choices(key: str, override: Override) -> list[str]:
    """The words of an override: one for each of its values."""
    given = str(override.input_line)
    if not override.is_sweep_override():
        if override.is_delete() and override.value() is None:
            return [given]
        return [f"{key}={override.get_value_element_as_str()}"]
    if not override.is_discrete_sweep():
        fix = "Give values, or search: hydra/sweeper=optuna"
        got = given.partition("=")[2]
        raise ConfigError(key, "a grid has no place for an interval", got=got, fix=fix)
    words = [f"{key}={value}" for value in override.sweep_string_iterator()]
    if not words:
        got, fix = given.partition("=")[2], "Give it at least one value"
        raise ConfigError(key, "an empty sweep", got=got, fix=fix)
    return words


def _seeds(sweeper: Any, overrides: Mapping[str, Override]) -> list[str]:
    given = overrides.get("seed")
    if given is not None and given.is_sweep_override():
        fix = f"Leave out one of the two: {given.input_line}, {_REPEATS}"
        raise ConfigError(_REPEATS, "seed is swept over already", fix=fix)
    first = OmegaConf.select(sweeper.config, "seed")
    if type(first) is not int:
        raise ConfigError(_REPEATS, "need a seed in the config", got=first)
    return [f"seed={first + i}" for i in range(sweeper.repeats)]


def _zips(given: Any, choices: Mapping[str, Any], swept: list[str]) -> list[list[str]]:
    """The groups of keys that go together."""
    groups = _groups(given)
    seen: list[str] = []
    for key in itertools.chain(*groups):
        if key not in swept:
            known = f"Swept over: {', '.join(swept) or 'nothing'}"
            fix = did_you_mean(key, swept)
            raise ConfigError(_ZIP, "not swept over", got=key, allowed=known, fix=fix)
        if key in seen:
            raise ConfigError(_ZIP, "named twice", got=key)
        seen.append(key)
    for group in groups:
        counts = [len(choices[key]) for key in group]
        if len(set(counts)) > 1:
            said = ", ".join(f"{k} has {n}" for k, n in zip(group, counts, strict=True))
            rule = "what goes together needs as many values"
            raise ConfigError(_ZIP, f"{rule} ({said})", fix="Give each as many")
    return groups


def _groups(given: Any) -> list[list[str]]:
    listed = list(given or ())
    nested = [isinstance(each, ListConfig | list | tuple) for each in listed]
    if any(nested) and not all(nested):
        fix = "Say [a,b], or [[a,b],[c,d]]"
        raise ConfigError(_ZIP, "must be a list, or lists in one", fix=fix)
    groups = [list(each) for each in listed] if any(nested) else [listed]
    return [[str(key) for key in group] for group in groups if group]


def _axes(
    choices: Mapping[str, list[str]], zips: Sequence[Sequence[str]]
) -> list[list[tuple[tuple[str, str], ...]]]:
    """For each axis its points: (key, word) of all keys that it sets."""
    axes, done = [], set[str]()
    for key in choices:
        if key in done:
            continue
        group = next((group for group in zips if key in group), [key])
        done.update(group)
        columns = [[(name, word) for word in choices[name]] for name in group]
        axes.append(list(zip(*columns, strict=True)))
    return axes


def _spell(value: Any) -> str:
    if OmegaConf.is_config(value):
        rule = "must be a word in Hydra's override grammar"
        fix = "Quote it, as in 'choice(0.1, 0.2)'"
        raise ConfigError("hydra.sweeper.params", rule, got=str(value), fix=fix)
    return "null" if value is None else str(value)


def check_jobs(sweeper: Any, jobs: Sequence[Job]) -> None:
    """Composes and checks all jobs, and says which are invalid before any starts.

    These fail when their turn comes, and the others run.

    Raises:
        RunnerError: none is valid.
    """
    invalid: dict[int, RunnerError] = {}
    for number, job in enumerate(jobs):
        config = sweeper.hydra_context.config_loader.load_sweep_config(
            master_config=sweeper.config, sweep_overrides=list(job)
        )
        error = _error_of(config) if is_ours(sweeper.task_function) else None
        if error is not None:
            invalid[number] = error
    if len(invalid) == len(jobs):
        raise next(iter(invalid.values()))
    if not invalid:
        return
    from runner.cli.sweep import Sweeps

    for number, error in invalid.items():
        _log.warning(f"Job {number} will fail: {error}")
        Sweeps.named.add(number)


def _error_of(config: DictConfig) -> RunnerError | None:
    """What is wrong with a job's config, as far as it is known before it starts."""
    from runner.cli.config import read_composed

    with open_dict(config):  # it is nobody else's
        own = config.pop("hydra")
    try:
        read_composed(config, choices=own.runtime.choices)
    except RunnerError as error:
        of_a_job = isinstance(error.__cause__, OmegaConfBaseException)
        return None if of_a_job else error  # ${hydra:...} is known in the job alone
    except Exception:  # it will say so itself
        return None
    return None


def save_config(sweeper: Any) -> None:
    """Writes `multirun.yaml`, as Hydra's own sweeper does."""
    directory = Path(str(sweeper.config.hydra.sweep.dir))
    directory.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(sweeper.config, directory / "multirun.yaml")
