# SPDX-License-Identifier: Apache-2.0
"""Where the Optuna study of a search lies: known to who searches and to each job."""

from pathlib import Path
from typing import Any

from runner.errors import ConfigError

__all__ = [
    "PRUNED",
    "SWEEPER",
    "import_optuna",
    "storage_of",
    "study_name_of",
    "sweep_directory",
]

PRUNED = "pruned"  # set on a trial whose job stopped itself, with the reason
SWEEPER = "hydra_plugins.runner.optuna.OptunaSweeper"
_DATABASE = "study.db"
_OWN_NAME = "search"


def import_optuna() -> Any:
    """The module.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise ConfigError(
            "hydra/sweeper",
            "Optuna is not installed",
            got="optuna",
            fix="Install the extra: pip install 'jax-runner[optuna]'",
        ) from error
    return optuna


def sweep_directory(hydra: Any) -> str:
    """Where the search is: trials that it asked for carry this."""
    return str(Path(str(hydra.sweep.dir)).resolve())


def storage_of(hydra: Any) -> str:
    """URL of the database: as told, or a file in the sweep's directory.

    Args:
        hydra: The config's node of that name.
    """
    told = hydra.sweeper.storage
    if told is not None:
        return str(told)
    return f"sqlite:///{sweep_directory(hydra)}/{_DATABASE}"


def study_name_of(hydra: Any) -> str:
    """The study's name: as told; else of its directory where it shares a database."""
    if hydra.sweeper.study_name is not None:
        return str(hydra.sweeper.study_name)
    return _OWN_NAME if hydra.sweeper.storage is None else str(hydra.sweep.dir)
