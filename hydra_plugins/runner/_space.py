# SPDX-License-Identifier: Apache-2.0
"""From Hydra's override grammar to what Optuna searches over.

a, b, c    choice(...)    glob(*)    shuffled ranges     one of them
range(1, 10, 2)                                          an integer, or a float
interval(0.1, 0.9)    int(interval(1, 8))                a float, an integer
tag(log, interval(1e-4, 1e-1))                           the same, on a log scale
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from runner.errors import ConfigError
from runner.sweep.study import import_optuna

__all__ = ["Space", "parse_space"]


@dataclass(frozen=True)
class Space:
    """What is searched over, and what stays.

    Args:
        distributions: Optuna's, by the key of an override.
        fixed: The other overrides, in the order given.
        order: All keys in the order given, that is that of a job's overrides.
        seed: The first seed where a trial has several jobs; None without one.
    """

    distributions: Mapping[str, Any]
    fixed: tuple[str, ...]
    order: tuple[str, ...]
    seed: int | None

    @property
    def size(self) -> int | None:
        """Points of the grid; None where there is no end of them."""
        count = 1
        for distribution in self.distributions.values():
            values = _values(distribution)
            if values is None:
                return None
            count *= len(values)
        return count

    def grid(self) -> dict[str, list[Any]]:
        """All values of each.

        Raises:
            ConfigError: one is an interval.
        """
        found: dict[str, list[Any]] = {}
        for key, distribution in self.distributions.items():
            values = _values(distribution)
            if values is None:
                fix = "Give values, or a range with a step"
                raise ConfigError(key, "a grid has no place for an interval", fix=fix)
            found[key] = values
        return found

    @property
    def probe(self) -> tuple[str, ...]:
        """The overrides of a job, to see whether one can be composed."""
        params = {
            key: d.choices[0] if hasattr(d, "choices") else d.low
            for key, d in self.distributions.items()
        }
        return self.jobs_of(params, repeats=1)[0]

    def jobs_of(
        self, params: Mapping[str, Any], *, repeats: int
    ) -> tuple[tuple[str, ...], ...]:
        """Overrides of each job of a trial."""
        fixed = {word.partition("=")[0]: word for word in self.fixed}
        words = [
            fixed[key] if key in fixed else f"{key}={params[key]}" for key in self.order
        ]
        if repeats == 1 or self.seed is None:
            return (tuple(words),)
        words = [word for word in words if not word.startswith("seed=")]
        return tuple((*words, f"seed={self.seed + i}") for i in range(repeats))


def parse_space(sweeper: Any, arguments: Sequence[str]) -> Space:
    """What `hydra.sweeper.params` and the command line say; the latter counts more.

    Raises:
        ConfigError: there is nothing to search over, or what is not a space.
    """
    params = sweeper.options["params"] or {}
    words = [f"{key}={_spell(value)}" for key, value in params.items()]
    parser = OverridesParser.create(config_loader=sweeper.hydra_context.config_loader)
    overrides = {
        override.get_key_element(): override
        for override in parser.parse_overrides([*words, *arguments])
    }
    distributions, fixed = {}, []
    for key, override in overrides.items():
        if override.is_sweep_override() and key == "seed":
            fix = "For jobs that differ in it, set hydra.sweeper.repeats"
            raise ConfigError(key, "a seed is nothing to search over", fix=fix)
        if override.is_sweep_override():
            distributions[key] = _distribution(key, override)
        else:
            fixed.append(_word(override))
    if not distributions:
        raise ConfigError(
            "hydra.sweeper.params",
            "nothing to search over",
            fix="Say what, as optimizer.learning_rate='tag(log,interval(1e-4,1e-1))'",
        )
    return Space(distributions, tuple(fixed), tuple(overrides), _seed(sweeper))


def _word(override: Override) -> str:
    if override.value() is None and override.is_delete():
        return str(override.input_line)
    return f"{override.get_key_element()}={override.get_value_element_as_str()}"


def _spell(value: Any) -> str:
    if OmegaConf.is_config(value):
        rule = "must be a word in Hydra's override grammar"
        fix = "Quote it, as in 'choice(0.1, 0.2)'"
        raise ConfigError("hydra.sweeper.params", rule, got=str(value), fix=fix)
    return "null" if value is None else str(value)


def _seed(sweeper: Any) -> int | None:
    """The seed that a trial's first job has."""
    if sweeper.options["repeats"] == 1:
        return None
    return int(OmegaConf.select(sweeper.config, "seed", default=0))


def _distribution(key: str, override: Override) -> Any:
    optuna = import_optuna()
    d = optuna.distributions
    value: Any = override.value()
    try:
        if override.is_interval_sweep():
            is_int = isinstance(value.start, int) and isinstance(value.end, int)
            kind = d.IntDistribution if is_int else d.FloatDistribution
            return kind(value.start, value.end, log="log" in value.tags)
        words = list(override.sweep_string_iterator())
        if not words:
            given = str(override.input_line).partition("=")[2]
            fix = "Give it at least one value"
            raise ConfigError(key, "an empty sweep", got=given, fix=fix)
        if override.is_range_sweep() and not value.shuffle and len(words) > 1:
            numbers: list[Any] = list(override.sweep_iterator())
            low, high = min(numbers), max(numbers)
            is_int = all(isinstance(number, int) for number in numbers)
            kind = d.IntDistribution if is_int else d.FloatDistribution
            return kind(low, high, step=abs(value.step))
        return d.CategoricalDistribution(words)
    except ValueError as error:
        given = str(override.input_line).partition("=")[2]
        raise ConfigError(
            key, f"can't be searched over ({error})", got=given
        ) from error


def _values(distribution: Any) -> list[Any] | None:
    """All values, in order; None of an interval."""
    d = import_optuna().distributions
    if isinstance(distribution, d.CategoricalDistribution):
        return list(distribution.choices)
    if distribution.log or distribution.step is None:
        return None
    count = round((distribution.high - distribution.low) / distribution.step) + 1
    return [distribution.low + i * distribution.step for i in range(count)]
