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
from runner.records.secrets import Secrets, find_secrets
from runner.spec import RunSpec, parse_spec

__all__ = ["HYDRA_VERSION_BASE", "Composed", "compose", "keys_at", "read_composed"]

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
        raise refusal_of(error) from error
    resolved = cast(dict[str, Any], resolved)
    experiment = choices.get("experiment")
    if experiment is not None and "experiment" not in resolved:
        resolved["experiment"] = str(experiment)
    return Composed(parse_spec(resolved), config, find_secrets(raw, resolved))


def keys_at(path: str, args: list[str]) -> list[str]:
    """The keys that the config has at a path, for suggestions; none on any error.

    Args:
        path: As in an override; empty for the top.
        args: The command line; its choices of groups count, its values don't.
    """
    choices = [a for a in args if a.startswith("+experiment=")]
    try:
        config = compose(choices)
        node = OmegaConf.select(config, path) if path else config
        return [str(key) for key in node if key != "hydra"]
    except Exception:  # a suggestion is not worth a second error
        return []


def compose(overrides: list[str], *, config_dir: str | None = None) -> DictConfig:
    """Composes a config as the command line does, with Hydra's own node in it."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    extra = []
    if config_dir is not None:
        extra = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"]
    with initialize_config_dir(
        config_dir=str(CONF_DIR), job_name="runner", version_base=HYDRA_VERSION_BASE
    ):
        return hydra_compose("config", [*overrides, *extra], return_hydra_config=True)
