# SPDX-License-Identifier: Apache-2.0
"""From the command line's words to a spec, by way of Hydra."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from runner import CONF_DIR
from runner.cli.refusal import refusal_of
from runner.cli.secrecy import keep_secret
from runner.errors import ConfigError
from runner.records.secrets import Secrets, find_secrets
from runner.spec import RunSpec, parse_spec

__all__ = [
    "HYDRA_VERSION_BASE",
    "Composed",
    "compose",
    "read_composed",
    "search_path",
]

HYDRA_VERSION_BASE = "1.3"


@dataclass(frozen=True)
class Composed:
    """One job's config in every form that is needed.

    Args:
        spec: Checked and frozen.
        raw: As Hydra composed it, interpolations and all.
        secrets: What must not be written anywhere.
    """

    spec: RunSpec
    raw: DictConfig
    secrets: Secrets


def read_composed(config: DictConfig, *, choices: Mapping[str, Any]) -> Composed:
    """Checks a job's config.

    Args:
        config: What Hydra composed, without its own node.
        choices: Hydra's record of which choice of each group was taken.

    Raises:
        RunnerError: the config breaks a rule.
    """
    try:
        raw = OmegaConf.to_container(config, resolve=False)
        resolved = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise refusal_of(error, []) from error
    resolved = cast(dict[str, Any], resolved)
    experiment = choices.get("experiment")
    if experiment is not None and "experiment" not in resolved:
        resolved["experiment"] = str(experiment)
    secrets = keep_secret(find_secrets(raw, resolved))
    return Composed(parse_spec(resolved), config, secrets)


def search_path(config_dir: str | None) -> list[str]:
    """The override that adds a directory of a user's groups.

    Raises:
        ConfigError: there is no such directory.
    """
    if config_dir is None:
        return []
    if not Path(config_dir).is_dir():
        raise ConfigError("--config-dir", "no such directory", got=config_dir)
    return [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"]


def compose(overrides: list[str], *, config_dir: str | None = None) -> DictConfig:
    """Composes a config as the command line does, with Hydra's own node in it."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    extra = search_path(config_dir)
    with initialize_config_dir(
        config_dir=str(CONF_DIR), job_name="runner", version_base=HYDRA_VERSION_BASE
    ):
        return hydra_compose("config", [*overrides, *extra], return_hydra_config=True)
