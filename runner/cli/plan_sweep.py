# SPDX-License-Identifier: Apache-2.0
"""`runner plan -m ...`: which jobs of a sweep share a compiled program, and why not."""

import json
import sys
from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import setup_globals
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig

from runner import CONF_DIR
from runner.cli.composing import compose_once
from runner.cli.config import HYDRA_VERSION_BASE, read_composed, search_path
from runner.cli.jobs import compose_job, standing_in
from runner.cli.refusal import refusal_of
from runner.cli.tables import print_table
from runner.determinism import settle_backend
from runner.errors import ConfigError, RunnerError
from runner.sinks.text import clean
from runner.spec import RunSpec

if TYPE_CHECKING:
    from runner.lanes.groups import Grouping

__all__ = ["plan_sweep"]

_GRID = "hydra_plugins.runner.grid.GridSweeper"
_BASIC = f"{BasicSweeper.__module__}.{BasicSweeper.__name__}"
_SHOWN = 12  # numbers of jobs in a row


def plan_sweep(overrides: list[str], *, config_dir: str | None, as_json: bool) -> int:
    """Traces a run of each kind, and prints the groups; runs nothing."""
    jobs, specs, errors = _compose_all(overrides, config_dir)
    from runner.lanes.groups import group_runs

    grouping = group_runs(specs)
    document = _document(jobs, specs, grouping, {**errors, **grouping.errors})
    if as_json:
        json.dump(document, sys.stdout, indent=1)
        print()
    else:
        _print_tables(document)
    return 2 if errors or grouping.errors else 0


def _compose_all(
    overrides: list[str], config_dir: str | None
) -> tuple[list[list[str]], dict[int, RunSpec], dict[int, Exception]]:
    """The overrides of each job, and what it asks for or what is wrong with it."""
    specs: dict[int, RunSpec] = {}
    errors: dict[int, Exception] = {}
    setup_globals()
    with initialize_config_dir(
        config_dir=str(CONF_DIR), job_name="runner", version_base=HYDRA_VERSION_BASE
    ):
        loader: Any = GlobalHydra.instance().config_loader()
        words = [*overrides, *search_path(config_dir)]
        try:
            master, jobs = _expand(loader, words)
        except RunnerError:
            raise
        except Exception as error:  # whatever Hydra says of a command line
            raise refusal_of(error, overrides) from error
        compose_once(loader)
        context = HydraContext(config_loader=loader, callbacks=Callbacks())
        for number, own in enumerate(jobs):
            try:
                job = compose_job(context, master, own, number)
                config: Any = job.returned.cfg
                with standing_in(job):
                    choices = job.config.hydra.runtime.choices
                    specs[number] = read_composed(config, choices=choices).spec
                    settle_backend(specs[number])
            except RunnerError as error:
                specs.pop(number, None)
                errors[number] = error
            except Exception as error:
                errors[number] = refusal_of(error, own)
    return jobs, specs, errors


def _expand(loader: Any, words: list[str]) -> tuple[DictConfig, list[list[str]]]:
    """The sweep's config, and the overrides of each job, as Hydra's own sweeper has
    them.
    """
    config = loader.load_configuration("config", words, run_mode=RunMode.MULTIRUN)
    sweeper = config.hydra.sweeper
    target, task = sweeper.get("_target_"), list(config.hydra.overrides.task)
    if target == _GRID:
        from hydra_plugins.runner._grid_core import list_jobs

        options = {name: sweeper[name] for name in ("zip", "repeats", "max_batch_size")}
        context = HydraContext(config_loader=loader, callbacks=Callbacks())
        grid = SimpleNamespace(
            **options,
            params=sweeper.params or {},
            config=config,
            hydra_context=context,
        )
        return config, list_jobs(grid, task)
    if target != _BASIC:
        raise ConfigError(
            "hydra/sweeper",
            "plan lists the jobs of a grid alone",
            got=config.hydra.runtime.choices["hydra/sweeper"],
            fix="Leave it out, or plan one job",
        )
    params = [f"{k}={v}" for k, v in (sweeper.params or {}).items()]
    parsed = OverridesParser.create(loader).parse_overrides([*params, *task])
    batches = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    return config, [job for batch in batches for job in batch]


def _document(
    jobs: list[list[str]],
    specs: Mapping[int, RunSpec],
    grouping: "Grouping",
    errors: Mapping[int, Exception],
) -> dict[str, Any]:
    from runner.lanes.groups import explain, find_differing

    groups = grouping.groups
    return {
        "jobs": [
            {
                "number": number,
                "overrides": own,
                "group": next(
                    (i for i, group in enumerate(groups) if number in group.numbers),
                    None,
                ),
                "error": str(errors[number]) if number in errors else None,
            }
            for number, own in enumerate(jobs)
        ],
        "groups": [
            {
                "jobs": list(group.numbers),
                "lanes": group.alone is None,
                "differ": list(find_differing([specs[n] for n in group.numbers])),
                "why": explain(group, groups[0]) if i else group.why,
            }
            for i, group in enumerate(groups)
        ],
    }


def _print_tables(document: dict[str, Any]) -> None:
    jobs, groups = document["jobs"], document["groups"]
    words = ["job" if len(jobs) == 1 else "jobs", "program"]
    words[1] += "" if len(groups) == 1 else "s"
    print(f"{len(jobs)} {words[0]}, {len(groups)} compiled {words[1]}\n")
    print_table(
        ("group", "jobs", "numbers", "differ in", "not with group 0 for"),
        [
            (
                i,
                len(group["jobs"]),
                _spell_numbers(group["jobs"]),
                clean(", ".join(group["differ"])),
                clean(group["why"]),
            )
            for i, group in enumerate(groups)
        ],
    )
    for job in jobs:
        if job["error"]:
            name = clean(" ".join(job["overrides"]))
            print(f"job {job['number']} ({name}): {clean(job['error'])}")


def _spell_numbers(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:_SHOWN]))
    return shown if len(numbers) <= _SHOWN else f"{shown}, ..."
