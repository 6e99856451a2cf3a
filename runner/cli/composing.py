# SPDX-License-Identifier: Apache-2.0
"""Composes the jobs of a sweep that differ in values alone once.

    compose(overrides) = apply(values, compose(overrides without values))

Hydra applies overrides of values to a config when its groups are composed; a value
whose key is neither a group nor Hydra's own, and that meets no other override's key,
has no part in anything before. So the rest is composed once for all such jobs, and
Hydra's own functions put in the values.
"""

import copy
import pickle
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra._internal.config_repository import IConfigRepository
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

__all__ = ["compose_once"]


def compose_once(loader: ConfigLoader) -> None:
    """Has a loader compose each job of a sweep at most once, and most of them less.

    Only of `load_sweep_config`, and only of Hydra's own loader as it stands today:
    any other is left alone.
    """
    is_done = "load_sweep_config" in vars(loader)
    if isinstance(loader, ConfigLoaderImpl) and not is_done:
        loader.load_sweep_config = _Known(loader).load  # type: ignore[method-assign]


class _Known:
    """What was composed so far."""

    def __init__(self, loader: ConfigLoaderImpl) -> None:
        self._loader = loader
        self._bases: dict[tuple[str, ...], Callable[[], DictConfig]] = {}
        self._repositories: dict[tuple[str, ...], IConfigRepository] = {}
        self._overrides: dict[str, Override] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Without what was composed: another process does so itself."""
        return _Known, (self._loader,)

    def load(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """As Hydra's own; a config that the caller may change."""
        parsed = [self._parse(word) for word in sweep_overrides]
        repository = self._repository_of(master_config)
        late = [each for each in parsed if _is_late(each, parsed, repository)]
        keys = [each.key_or_group for each in late]
        rest = [str(o.input_line) for o in parsed if o.key_or_group not in keys]
        config = self._base(master_config, rest)
        try:
            ConfigLoaderImpl._apply_overrides_to_config(late, config)
        except OmegaConfBaseException as error:  # as `load_configuration` does
            raise ConfigCompositionException() from error
        _say(config, parsed)
        OmegaConf.copy_cache(from_config=master_config, to_config=config)
        return config

    def _parse(self, word: str) -> Override:
        if word not in self._overrides:
            (override,) = OverridesParser.create().parse_overrides([word])
            self._overrides[word] = override
        return self._overrides[word]

    def _base(self, master: DictConfig, overrides: list[str]) -> DictConfig:
        own = _own(master)
        name = (str(master.hydra.job.config_name), *own, "", *overrides)
        if name not in self._bases:
            compose = type(self._loader).load_sweep_config
            self._bases[name] = _copies(compose(self._loader, master, overrides))
        return self._bases[name]()

    def _repository_of(self, master: DictConfig) -> IConfigRepository:
        """Where groups are looked up, with what `hydra.searchpath` adds."""
        own = _own(master)
        if own not in self._repositories:
            _, found = self._loader._parse_overrides_and_create_caching_repo(
                master.hydra.job.config_name, list(own)
            )
            self._repositories[own] = found
        return self._repositories[own]


def _copies(config: DictConfig) -> Callable[[], DictConfig]:
    """Makes copies of a config; reading it back takes a sixth of copying it deeply."""
    try:
        return partial(pickle.loads, pickle.dumps(config))
    except Exception:  # a class of the user's that is nowhere to be found by name
        return partial(copy.deepcopy, config)


def _own(master: DictConfig) -> tuple[str, ...]:
    """The overrides of Hydra's own, with interpolations as they are written."""
    written: Any = OmegaConf.to_container(master.hydra.overrides.hydra)
    return tuple(written)


def _is_late(
    override: Override, all_: Sequence[Override], repository: IConfigRepository
) -> bool:
    """Whether it is a value that nothing else in the config is composed by."""
    key = override.key_or_group
    if (
        override.type is not OverrideType.CHANGE
        or override.package is not None
        or override.is_sweep_override()
        or override.is_hydra_override()
        or isinstance(override.value(), dict)
        or repository.group_exists(key)
    ):
        return False
    others = [each.key_or_group for each in all_ if each is not override]
    return not any(_meet(key, other.replace("/", ".")) for other in others)


def _meet(one: str, other: str) -> bool:
    """Whether one key is the other one, or above it."""
    a, b = (key.replace("[", ".").replace("]", "").split(".") for key in (one, other))
    return all(x == y for x, y in zip(a, b, strict=False))


def _say(config: DictConfig, parsed: Sequence[Override]) -> None:
    """What Hydra notes of the overrides of a job, in their order."""
    task = [each for each in parsed if not each.is_hydra_override()]
    job: Any = config.hydra.job
    config.hydra.overrides.task = [each.input_line for each in task]
    names = job.config.override_dirname
    job.override_dirname = get_overrides_dirname(
        overrides=task,
        kv_sep=names.kv_sep,
        item_sep=names.item_sep,
        exclude_keys=names.exclude_keys,
    )
