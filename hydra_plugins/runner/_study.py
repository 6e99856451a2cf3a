# SPDX-License-Identifier: Apache-2.0
"""An Optuna study, its sampler and its pruner, from what the config says."""

import contextlib
import fcntl
import inspect
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.utils import get_class

from runner.errors import ConfigError
from runner.sweep.study import import_optuna, storage_of, study_name_of

__all__ = ["alone", "disconnect", "make", "open_study", "quiet_optuna"]


def open_study(config: Any, direction: str) -> Any:
    """The study, as its database has it, or a new one.

    Raises:
        ConfigError: it can't be opened, or goes in the other direction.
    """
    optuna = import_optuna()
    pruner = config.hydra.sweeper.pruner
    try:
        study = optuna.create_study(
            storage=storage_of(config.hydra),
            study_name=study_name_of(config.hydra),
            direction=direction,
            pruner=None
            if pruner is None
            else make(pruner, path="hydra.sweeper.pruner"),
            load_if_exists=True,
        )
    except ConfigError:
        raise
    except Exception as error:  # of SQLAlchemy or of a driver
        first = str(error).partition("\n")[0]
        rule = f"can't be opened ({first})"
        raise ConfigError("hydra.sweeper.storage", rule) from error
    before = study.direction.name.lower()
    if before != direction:
        raise ConfigError(
            "hydra.sweeper.direction",
            f"the study is there already, and says {before}",
            got=direction,
            fix="Set hydra.sweep.dir to a new directory",
        )
    return study


def disconnect(study: Any) -> None:
    """Closes its connections: a fork must not inherit one to SQLite.

    The next question opens another one.
    https://www.sqlite.org/howtocorrupt.html, section 2.6
    """
    backend = getattr(study._storage, "_backend", study._storage)
    if (engine := getattr(backend, "engine", None)) is not None:
        backend.remove_session()
        engine.dispose()


def make(node: Any, *, path: str) -> Any:
    """An object of Optuna's from its node.

    Raises:
        ConfigError: it can't be made, or is not one of Optuna's.
    """
    given = {str(k): v for k, v in dict(node).items()}
    target = str(given.pop("_target_", None))
    try:
        if not target.startswith("optuna."):
            raise ConfigError(path, "must be one of Optuna's", got=target)
        made = get_class(target)
        known = inspect.signature(made).parameters
        for name in given:
            if name not in known:
                allowed = f"Known: {', '.join(known)}"
                raise ConfigError(f"{path}.{name}", "unknown key", allowed=allowed)
        return made(**given)
    except ConfigError:
        raise
    except Exception as error:
        first = str(error).partition("\n")[0]
        raise ConfigError(path, f"can't be made ({first})", got=target) from error


@contextlib.contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Keeps a second search out of a directory while there is one."""
    lock = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        rule, fix = "another search is running in it", "Wait for it, or set another one"
        path = "hydra.sweep.dir"
        raise ConfigError(path, rule, got=str(directory), fix=fix) from error
    finally:
        os.close(lock)


@contextlib.contextmanager
def quiet_optuna() -> Iterator[None]:
    """Optuna's own lines say what ours do; its experiments are the user's choice."""
    optuna = import_optuna()
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)
