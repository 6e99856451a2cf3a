# SPDX-License-Identifier: Apache-2.0
"""One job of a sweep that is run as a lane: its config, its directory, its end.

What Hydra's own `run_job` does around a job is here in parts, since lanes begin
together and end in any order.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobRuntime, JobStatus, env_override
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from runner.cli.config import Composed
from runner.spec import RunSpec

if TYPE_CHECKING:
    from runner.hazards.find import Hazard
    from runner.probe.probe import Probe
    from runner.program import Program
    from runner.recording import Resumption

__all__ = ["Job", "compose_job", "standing_in"]


@dataclass
class Job:
    """One job of a sweep, and how far it got.

    Args:
        number: `hydra.job.num`.
        config: What Hydra composed, with its own node.
        directory: The run directory.
        returned: What Hydra is told of it.
        checked: Its config, parsed; None before that.
        program: What is run; None before it is traced.
        hazards: What was found in it.
        resumption: Where it goes on, if it was launched before.
        logging: `hydra.job_logging`, resolved.
        mode: How it is computed: `map`, `vmap`, or `job` by itself.
        is_pruned: Whether the search that it belongs to stopped it.
    """

    number: int
    config: DictConfig
    directory: Path
    returned: JobReturn
    checked: Composed | None = None
    program: "Program | Probe | None" = None
    hazards: "tuple[Hazard, ...]" = ()
    resumption: "Resumption | None" = None
    logging: dict[str, Any] = field(default_factory=dict)
    mode: str = "job"
    is_pruned: bool = False

    @property
    def composed(self) -> Composed:
        """Its config, once it is parsed."""
        assert self.checked is not None
        return self.checked

    @property
    def spec(self) -> RunSpec:
        """What is asked for."""
        return self.composed.spec

    @property
    def made(self) -> "Program | Probe":
        """What is run, once it is traced."""
        assert self.program is not None
        return self.program

    @property
    def is_open(self) -> bool:
        """Whether it has not ended."""
        return self.returned.status is JobStatus.UNKNOWN

    @property
    def environment(self) -> tuple[tuple[str, str], ...]:
        """What `hydra.job.env_set` asks for."""
        return tuple(sorted(self.config.hydra.job.env_set.items()))

    @property
    def changes_directory(self) -> bool:
        """Whether `hydra.job.chdir` asks for a directory of its own to work in."""
        return bool(self.config.hydra.job.chdir)


def compose_job(
    context: HydraContext, master: DictConfig, overrides: Sequence[str], number: int
) -> Job:
    """A job's config, and what Hydra is told of it, as its `run_job` has them.

    Args:
        context: Hydra's own.
        master: The sweep's config.
        overrides: The job's.
        number: Of the job.
    """
    config: Any = context.config_loader.load_sweep_config(master, list(overrides))
    with open_dict(config):
        config.hydra.job.id = number
        config.hydra.job.num = number
    hydra: Any = HydraConfig.instance()
    hydra.cfg = config  # where the directory says ${hydra:...}; a copy takes 10 ms
    sweep = config.hydra.sweep
    directory = Path(str(sweep.dir), str(sweep.subdir)).absolute()
    with read_write(config.hydra.runtime), open_dict(config.hydra.runtime):
        config.hydra.runtime.output_dir = str(directory)
    hydra.set_config(config)
    names: Any = [name for name in config if name != "hydra"]
    task = OmegaConf.masked_copy(config, names)
    OmegaConf.set_struct(task, OmegaConf.is_struct(config))
    OmegaConf.copy_cache(from_config=config, to_config=task)  # `now` is the sweep's
    written: Any = OmegaConf.to_container(config.hydra.overrides.task)
    returned = JobReturn(
        overrides=written,
        cfg=task,
        hydra_cfg=hydra.cfg,  # its own: each `set_config` makes another one
        working_dir=str(directory) if config.hydra.job.chdir else os.getcwd(),
        task_name=JobRuntime.instance().get("name"),
    )
    return Job(number, config, directory, returned)


@contextlib.contextmanager
def standing_in(job: Job) -> Iterator[None]:
    """While this process is the job's, as far as its config and code can tell."""
    hydra: Any = HydraConfig.instance()
    before, where = hydra.cfg, None
    hydra.cfg = job.returned.hydra_cfg
    try:
        with env_override(dict(job.environment)):
            if job.changes_directory and job.directory.is_dir():
                where = os.getcwd()
                os.chdir(job.directory)
            yield
    finally:
        hydra.cfg = before
        if where is not None:
            os.chdir(where)
