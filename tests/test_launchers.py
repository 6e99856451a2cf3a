# SPDX-License-Identifier: Apache-2.0
"""Launchers of others: our jobs run by them as by Hydra's own, bit for bit.

Those of clusters were tried by hand (docs/sweep.md); what a queue does to a job, a
restart in the directory that it has begun, is done here.
"""

import importlib.util
import json
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from runner.errors import (
    ConfigError,
    HazardsRefusedError,
    RecordError,
    RunFailedError,
    UnknownStreamError,
)

pytestmark = pytest.mark.xdist_group("launchers")

SHORT = ("+experiment=dropout", "train.steps=20", "sinks=none", "hydra.sweep.dir=s")
RATES = "model.dropout_rate=1.5,0.1,0.2"  # the first is refused
LAUNCHERS = {
    "joblib": ("hydra_plugins.hydra_joblib_launcher", "hydra.launcher.n_jobs=2"),
    "submitit_local": (
        "hydra_plugins.hydra_submitit_launcher",
        "hydra.launcher.cpus_per_task=1",
    ),
}


def digests(sweep: Path) -> dict[str, tuple[str, str]]:
    runs = {path.parent.name: path for path in sweep.rglob("run.json")}
    found = {name: json.loads(path.read_text()) for name, path in runs.items()}
    return {
        name: (run["digests"]["params"], run["digests"]["keys"])
        for name, run in found.items()
        if run["status"] == "completed"
    }


@pytest.fixture(scope="module")
def basic(
    user_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[str, str]]:
    """Digests of the same jobs, launched by Hydra itself."""
    where = tmp_path_factory.mktemp("basic")
    command = [sys.executable, "-m", "runner", "-m", *SHORT, RATES]
    subprocess.run(command, cwd=where, env=user_env, check=False, capture_output=True)
    return digests(where / "s")


@pytest.mark.parametrize("name", LAUNCHERS)
def test_jobs_are_those_of_hydras_own_launcher(
    name: str, basic: Any, runner: Any, tmp_path: Path
) -> None:
    module, option = LAUNCHERS[name]
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"needs the extra: pip install .[{name.partition('_')[0]}]")
    done = runner("-m", *SHORT, RATES, f"hydra/launcher={name}", option)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: sweep: a job failed: 0 (model.dropout_rate: must be")
    assert "Traceback" not in done.stderr
    assert done.stdout.splitlines()[-1] == "s"
    assert set(basic) == {"1", "2"}
    assert digests(tmp_path / "s") == basic


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("a.b", "must be x", got=1, fix="Set a.b=x"),
        UnknownStreamError("rng.streams.x", "not declared"),
        HazardsRefusedError("R001", is_config=True),
        RunFailedError("run: loss"),
        RecordError("x: no such run."),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_comes_back_whole_from_a_worker(error: Any) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)
    assert again.exit_code == error.exit_code


# --- a job that is put back into the queue


LONG = (
    *("-m", "+experiment=dropout", "sinks=none", "hydra.sweep.dir=s", "seed=3"),
    *("train.steps=600", "eval.every=100", "checkpoint.every=100"),
)
AGAIN = {"SLURM_RESTART_COUNT": "1"}


@pytest.fixture(scope="module")
def killed(
    user_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A sweep of one job, killed after its first checkpoint, and one that was not."""
    where = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-m", "runner", *LONG]
    whole = where / "whole"
    whole.mkdir()
    options: Any = {"env": user_env, "stdout": subprocess.DEVNULL}
    subprocess.run(command, cwd=whole, check=True, **options)
    with subprocess.Popen(command, cwd=where, **options) as process:
        first = where / "s" / "0" / "checkpoints" / "100.json"
        while not first.exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    return where, whole


def test_a_requeued_job_goes_on(killed: Any, runner: Any, tmp_path: Path) -> None:
    where, whole = killed
    shutil.copytree(where / "s", tmp_path / "s")
    done = runner(*LONG, env=AGAIN)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "s" / "0" / "run.json").read_text())
    assert found["resumed"][0]["step"] >= 100
    assert found["sweep"] == {"id": "s", "lane": 0, "lanes": None, "mode": "job"}
    assert digests(tmp_path / "s") == digests(whole / "s")
    before = (tmp_path / "s" / "0" / "run.json").read_bytes()
    assert runner(*LONG, env=AGAIN).returncode == 0  # it had completed
    assert (tmp_path / "s" / "0" / "run.json").read_bytes() == before


def test_nothing_else_goes_on_by_itself(
    killed: Any, runner: Any, tmp_path: Path
) -> None:
    where, _ = killed
    shutil.copytree(where / "s", tmp_path / "s")
    for env, more, says in (
        ({}, "seed=3", "hydra.sweep.dir: holds a run already"),
        (AGAIN, "seed=4", "hydra.sweep.dir: holds another run"),
    ):
        done = runner(*LONG, more, env=env)
        assert done.returncode == 1
        assert says in done.stderr, done.stderr
