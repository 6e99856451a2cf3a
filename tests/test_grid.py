# SPDX-License-Identifier: Apache-2.0
"""`hydra/sweeper=grid`: products, zips, repeats; Hydra's own suites for its sweeper."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra.test_utils.launcher_common_tests import (
    BatchedSweeperTestSuite,
    LauncherTestSuite,
)
from omegaconf import OmegaConf

import hydra_plugins.runner.grid  # noqa: F401 - Hydra's suites find it by this
from hydra_plugins.runner._grid_core import list_jobs
from runner.errors import ConfigError

OURS = "hydra/sweeper=grid"


def jobs_of(*words: str, seed: Any = 7, **options: Any) -> list[list[str]]:
    given = {"params": {}, "zip": [], "repeats": 1, "max_batch_size": None, **options}
    sweeper = SimpleNamespace(
        **given,
        config=OmegaConf.create({"seed": seed}),
        hydra_context=SimpleNamespace(config_loader=None),
    )
    return list_jobs(sweeper, words)


def test_without_options_it_is_hydras_product() -> None:
    assert jobs_of("a=1,2", "+b=x", "c=range(2)") == [
        [f"a={a}", "+b=x", f"c={c}"] for a in (1, 2) for c in (0, 1)
    ]
    assert jobs_of("a=1") == [["a=1"]]
    assert jobs_of() == [[]]


def test_what_is_zipped_goes_together() -> None:
    assert jobs_of("a=1,2", "b=0,1", "c=x,y", zip=["a", "c"]) == [
        *(["a=1", "b=0", "c=x"], ["a=1", "b=1", "c=x"]),
        *(["a=2", "b=0", "c=y"], ["a=2", "b=1", "c=y"]),
    ]
    two = jobs_of("a=1,2", "b=3,4", "c=5,6", "d=7,8", zip=[["a", "b"], ["d", "c"]])
    assert ["a=1", "b=3", "c=6", "d=8"] in two
    assert len(two) == 4


def test_repeats_are_seeds_that_vary_fastest() -> None:
    assert jobs_of("a=1,2", repeats=2) == [
        [f"a={a}", f"seed={seed}"] for a in (1, 2) for seed in (7, 8)
    ]
    assert jobs_of("seed=3", "a=1", repeats=2, seed=3) == [
        *(["seed=3", "a=1"], ["seed=4", "a=1"])
    ]


def test_the_command_line_counts_more_than_the_file() -> None:
    assert jobs_of("a=3", params={"a": "1,2", "b": "choice(4,5)", "c": None}) == [
        *(["a=3", "b=4", "c=null"], ["a=3", "b=5", "c=null"])
    ]


@pytest.mark.parametrize(
    ("words", "options", "says"),
    [
        (["a=1,2", "b=1,2,3"], {"zip": ["a", "b"]}, r"\(a has 2, b has 3\)"),
        (["a=1,2", "b=1"], {"zip": ["a", "b"]}, r"zip: not swept over \(got 'b'\)"),
        (["a=1,2"], {"zip": ["a", "a"]}, r"zip: named twice \(got 'a'\)"),
        (["a=1,2"], {"zip": ["a", ["b"]]}, "zip: must be a list, or lists in one"),
        (["a=1"], {"repeats": 0}, "repeats: must be 1 or more"),
        (["a=1"], {"max_batch_size": 0}, "max_batch_size: must be 1 or more"),
        (["seed=1,2"], {"repeats": 2}, "repeats: seed is swept over already"),
        (["a=1"], {"repeats": 2, "seed": None}, "repeats: need a seed"),
        (["a=interval(0,1)"], {}, "^a: a grid has no place for an interval"),
        (["a=range(0)"], {}, r"^a: an empty sweep \(got 'range\(0\)'\)"),
        ([], {"params": {"a": OmegaConf.create([1])}}, "must be a word in Hydra's"),
    ],
)
def test_what_is_refused(words: Any, options: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        jobs_of(*words, **options)


def test_an_invalid_job_is_named_first_and_stops_no_other(
    runner: Any, tmp_path: Path
) -> None:
    """Also where it is in a batch before theirs."""
    done = runner(
        *("-m", "+experiment=dropout", "train.steps=2", "sinks=none"),
        *("model.dropout_rate=1.5,0.1", "model.features=[8],[9]"),
        "hydra.sweeper.zip=[model.dropout_rate,model.features]",
        *("hydra.sweeper.repeats=2", "hydra.sweep.dir=s"),
        "hydra.sweeper.max_batch_size=1",
    )
    assert done.returncode == 1
    named = [line for line in done.stdout.splitlines() if "will fail: model" in line]
    assert [re.findall(r"Job \d", line) for line in named] == [["Job 0"], ["Job 1"]]
    assert done.stdout.index(named[-1]) < done.stdout.index("Launching")
    runs = [json.loads(path.read_text()) for path in tmp_path.rglob("run.json")]
    assert sorted((run["status"], run["seed"]) for run in runs) == [
        *(("completed", 0), ("completed", 1))
    ]
    (last,) = done.stderr.splitlines()
    assert last.startswith(
        "error: sweep: 2 jobs failed: 0, 1 (model.dropout_rate: must"
    )


@pytest.mark.parametrize(("launcher_name", "overrides"), [("basic", [OURS])])
@pytest.mark.usefixtures("no_version_base")
class TestSweeper(LauncherTestSuite):
    """Hydra's own, by way of our sweeper."""


@pytest.mark.parametrize(
    ("launcher_name", "overrides"),
    [("basic", [OURS, "hydra.sweeper.max_batch_size=2"])],
)
@pytest.mark.usefixtures("no_version_base")
class TestBatches(BatchedSweeperTestSuite):
    """Hydra's own, by way of our sweeper."""
