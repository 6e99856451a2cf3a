# SPDX-License-Identifier: Apache-2.0
"""A Hydra callback that checks a run wholly before Hydra writes its first file.

Hydra makes the output directory and its logs before it calls the application. Here
the config is parsed, the model built and traced and the data read before that; then
a directory is claimed that no other run has.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from runner.cli.secrecy import keep_secret
from runner.errors import ConfigError
from runner.processes.peers import peers
from runner.records.secrets import find_secrets

if TYPE_CHECKING:
    from runner.cli.train import Prepared

__all__ = ["Gate", "Refused"]

_USUAL = ("basic", "grid")  # that one of them was named changes nothing


class Refused(BaseException):
    """Carries what was raised past Hydra, which turns an Exception into a warning."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        super().__init__(str(error))


class Gate(Callback):
    """Prepares a single run; the jobs of a sweep prepare themselves."""

    prepared: "Prepared | None" = None
    is_reached = False  # what was raised before is about the command line

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Prepares the run, then claims its directory.

        Raises:
            Refused: the run can't be made.
        """
        from runner.cli.running import share_directory
        from runner.cli.train import prepare
        from runner.records.files import claim_directory

        Gate.is_reached = True
        _refuse_sweeping(config)
        # Hydra's own logging still stands here, and prints which backends JAX lacks.
        logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)
        try:
            HydraConfig.instance().set_config(config)
            own = OmegaConf.to_container(config.hydra, resolve=False)
            keep_secret(find_secrets(own, own))
            Gate.prepared = prepare(_job_config(config), config.hydra.runtime.choices)
            wanted = Path(str(OmegaConf.select(config, "hydra.run.dir")))
            named = any(
                override.lstrip("+").startswith("hydra.run.dir=")
                for override in config.hydra.overrides.hydra
            )
            leads = peers().leads
            directory = share_directory(
                claim_directory(wanted, exact=named) if leads else None
            )
        except Exception as error:
            raise Refused(error) from error
        with read_write(config.hydra):
            config.hydra.run.dir = str(directory)
            if not leads:  # process 0 writes the files of the run
                config.hydra.output_subdir = None
                config.hydra.job_logging = {"version": 1, "root": {"handlers": []}}

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Takes secrets out of what Hydra writes as `multirun.yaml`.

        The jobs are composed again from the files, so they keep theirs.

        Raises:
            Refused: one stands on the command line, which is written as it is.
        """
        raw = OmegaConf.to_container(_job_config(config), resolve=False)
        secrets = find_secrets(raw, raw)
        with read_write(config), open_dict(config):
            for path, shown in secrets.shown.items():
                OmegaConf.update(config, path, shown)
        overrides: Any = config.hydra.overrides.task
        overrides = OmegaConf.to_container(overrides, resolve=False)
        for override in overrides:
            if secrets.blot(override) != override:
                raise Refused(
                    ConfigError(
                        override.lstrip("+").partition("=")[0],
                        "a secret in a sweep's overrides would be in multirun.yaml",
                        fix="Put it into the environment, and say ${oc.env:NAME}",
                    )
                )


def _refuse_sweeping(config: DictConfig) -> None:
    """Hydra has no use for a launcher or a sweeper without `-m`, and says nothing.

    Raises:
        Refused: one was asked for on the command line.
    """
    for override in config.hydra.overrides.hydra:
        group, _, choice = str(override).partition("=")
        if group in ("hydra/launcher", "hydra/sweeper") and choice not in _USUAL:
            rule = "is for sweeps, and this is a single run"
            fix = "Say -m, or leave it out"
            raise Refused(ConfigError(group, rule, got=choice, fix=fix))


def _job_config(config: DictConfig) -> DictConfig:
    job = config.copy()
    with read_write(job), open_dict(job):
        del job["hydra"]
    return job
