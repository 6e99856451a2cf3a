# SPDX-License-Identifier: Apache-2.0
"""`hydra/launcher=vectorized`: sweeps in processes of their own."""

import copy
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf
from waiting import manifests, wait_for

from runner import CONF_DIR
from runner.cli.composing import compose_once

LANES = "hydra/launcher=vectorized"
SHORT = (
    *("+experiment=dropout", "model.features=[32]", "train.steps=40", "sinks=none"),
    *("eval.every=10", "checkpoint.digest_every=10"),
)
of_sweeps = pytest.mark.xdist_group("lanes")
RECORD = ("metrics.jsonl", "states.jsonl", "keys/ledger.json", "config.yaml")


# --- what a lane leaves behind


@pytest.fixture(scope="module")
def sweeps(
    user_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The same six jobs, as lanes and one after the other."""
    here = tmp_path_factory.mktemp("sweeps")
    swept = ("seed=range(3)", "model.dropout_rate=0.0,0.5")
    made: dict[str, Any] = {"cwd": here}
    for launcher in ("vectorized", "basic"):
        words = ("-m", *SHORT, *swept, f"hydra/launcher={launcher}")
        made[launcher] = subprocess.run(
            [sys.executable, "-m", "runner", *words, f"hydra.sweep.dir={launcher}"],
            cwd=here,
            env=user_env,
            capture_output=True,
            text=True,
            timeout=240,
            check=True,
        )
    return made


@of_sweeps
def test_every_lane_is_the_job_run_alone(sweeps: dict[str, Any]) -> None:
    lanes, jobs = (manifests(sweeps["cwd"] / n) for n in ("vectorized", "basic"))
    assert list(lanes) == list(jobs) == list(range(6))
    for n, lane in lanes.items():
        assert lane["status"] == "completed"
        assert lane["digests"] == jobs[n]["digests"]
        for same in ("metrics", "best", "inputs", "seed", "steps", "guarantee"):
            assert lane[same] == jobs[n][same]
        for name in RECORD:
            paths = [
                sweeps["cwd"] / kind / str(n) / name for kind in ("vectorized", "basic")
            ]
            assert paths[0].read_bytes() == paths[1].read_bytes()
    assert len({lane["digests"]["params"] for lane in lanes.values()}) == 6


@of_sweeps
def test_every_lane_says_where_it_belongs(sweeps: dict[str, Any]) -> None:
    for n, lane in manifests(sweeps["cwd"] / "vectorized").items():
        place = {"id": "vectorized", "lane": n, "lanes": 6, "mode": "map"}
        assert lane["sweep"] == place


@of_sweeps
def test_every_lane_has_its_own_log_and_hydra_files(sweeps: dict[str, Any]) -> None:
    for n in range(6):
        lane, job = (sweeps["cwd"] / k / str(n) for k in ("vectorized", "basic"))
        said = (lane / "runner.log").read_text()
        assert f"seed        {n // 2}" in said
        assert said.count("eval at step 40") == 1
        for name in ("config.yaml", "overrides.yaml"):
            files = [each / ".hydra" / name for each in (lane, job)]
            assert files[0].read_text() == files[1].read_text()
        hydra = OmegaConf.load(lane / ".hydra" / "hydra.yaml").hydra
        assert (hydra.job.num, hydra.job.id) == (n, str(n))
        assert hydra.runtime.output_dir == str(lane)


@of_sweeps
def test_stdout_names_every_run(sweeps: dict[str, Any]) -> None:
    lines = sweeps["vectorized"].stdout.splitlines()
    found = {line for line in lines if line.startswith("/")}
    assert found == {str(sweeps["cwd"] / "vectorized" / str(n)) for n in range(6)}
    assert sweeps["vectorized"].stderr == ""


@of_sweeps
def test_one_lane_reproduces_alone(sweeps: dict[str, Any], runner: Any) -> None:
    ran = runner("reproduce", str(sweeps["cwd"] / "vectorized" / "3"))
    assert ran.returncode == 0, ran.stderr
    assert "verdict: bit-exact (promised bit-exact: kept)" in ran.stdout


def test_lanes_together_keep_the_keys(runner: Any, tmp_path: Path) -> None:
    """By vmap, in batches, in directories that the user names."""
    words = (
        *("-m", *SHORT, "seed=4,5,6", LANES, "hydra.launcher.mode=vmap"),
        *("hydra.sweep.dir=s", "hydra.sweeper.max_batch_size=2"),
        "hydra.sweep.subdir=n${hydra.job.num}_seed${seed}",
    )
    ran = runner(*words)
    assert ran.returncode == 0, ran.stderr
    names = ["n0_seed4", "n1_seed5", "n2_seed6"]
    paths = [tmp_path / "s" / name for name in names]
    found = [json.loads((path / "run.json").read_text()) for path in paths]
    assert [each["sweep"]["mode"] for each in found] == ["vmap", "vmap", "job"]
    assert [each["sweep"]["lane"] for each in found] == [0, 1, 2]
    levels = [each["guarantee"]["level"] for each in found]
    assert levels == ["key-exact", "key-exact", "bit-exact"]
    assert "by vmap: after 8 steps" in str(found[0]["guarantee"]["reasons"])
    again = runner("reproduce", str(paths[1]))
    assert "verdict: key-exact (promised key-exact: kept)" in again.stdout
    assert "it was computed with other lanes by vmap" in again.stdout


def test_each_job_can_have_a_working_directory(runner: Any, tmp_path: Path) -> None:
    """What a job reads by a relative path is its own; such jobs run one by one."""
    for n in range(2):
        rows = {k: np.full((40, 2), n + 1, "f4") for k in ("x", "y")}
        (tmp_path / "s" / str(n)).mkdir(parents=True)
        np.savez(tmp_path / "s" / str(n) / "mine.npz", **rows)
    words = (
        *("-m", "task=regression", "model.num_outputs=2", "model.features=[4]"),
        *("data=arrays", "data.path=mine.npz", "data.batch_size=8", "train.steps=3"),
        *("seed=0,1", "sinks=none", "hydra.sweep.dir=s", "hydra.job.chdir=true", LANES),
    )
    ran = runner(*words)
    assert ran.returncode == 0, ran.stderr
    found = manifests(tmp_path / "s")
    assert found[0]["digests"]["data"] != found[1]["digests"]["data"]


def test_plan_shows_groups_and_why_there_is_more_than_one(runner: Any) -> None:
    words = ("seed=0,1", "model.features=[32],[8]", "model.dropout_rate=0.1,2")
    ran = runner("plan", "-m", "--json", *SHORT, *words)
    assert ran.returncode == 2  # half of them can't be made
    document = json.loads(ran.stdout)
    assert [group["jobs"] for group in document["groups"]] == [[0, 2], [4, 6]]
    assert [group["lanes"] for group in document["groups"]] == [True, True]
    assert document["groups"][0]["differ"] == ["seed", "rng.seed"]
    assert document["groups"][1]["why"] == "model.features[0] (8, not 32)"
    wrong = [job["number"] for job in document["jobs"] if job["error"]]
    assert wrong == [1, 3, 5, 7]
    assert document["jobs"][4]["group"] == 1
    said = runner("plan", "-m", *SHORT, *words).stdout
    assert "8 jobs, 2 compiled programs" in said
    assert "model.features[0] (8, not 32)" in said


# --- jobs that fail


def test_all_that_fail_are_named_and_harm_no_other(runner: Any, tmp_path: Path) -> None:
    swept = ("seed=-1,4", "optimizer.learning_rate=1e-3,1e20", "model.dropout_rate=0,3")
    ran = runner("-m", *SHORT, *swept, LANES, "hydra.sweep.dir=s")
    assert ran.returncode == 1
    assert "Traceback" not in ran.stderr
    last = ran.stderr.splitlines()[-1]
    assert last.startswith("error: sweep: 7 jobs failed: 0, 2 (R007: seed")
    listed = ran.stdout.split("not completed\n")[1].splitlines()[1:8]
    reasons = {int(line.split()[0]): line.split("failed", 1)[1] for line in listed}
    assert list(reasons) == [0, 1, 2, 3, 5, 6, 7]
    assert all("R007: seed" in reasons[n] for n in (0, 2))
    rate = "model.dropout_rate: must be a number from 0 to 1 (got 3)"
    assert all(rate in reasons[n] for n in (1, 3, 5, 7))
    assert "loss or update not finite at step" in reasons[6]
    before, launching, _ = ran.stdout.partition("Launching 8 jobs")
    assert launching
    assert re.findall(r"Job (\d) will fail: ", before) == list("1357")
    errors = ran.stderr.splitlines()[:-1]  # of what is seen when they are traced
    assert [line.partition(" (")[0] for line in errors] == [
        *("ERROR: job 0", "ERROR: job 2")
    ]
    found = {n: each["status"] for n, each in manifests(tmp_path / "s").items()}
    assert found == {4: "completed", 6: "failed"}


def test_other_generators_are_not_for_vmap(runner: Any, tmp_path: Path) -> None:
    """R011 stops them; where it is allowed, they are mapped, and draw as alone."""
    ran = runner(
        *("-m", *SHORT, "train.steps=6", "rng.impl=threefry2x32,rbg", "seed=0,1"),
        *("rng.allow=[],[R011]", LANES, "hydra.launcher.mode=vmap"),
        "hydra.sweep.dir=s",
    )
    assert ran.returncode == 1
    modes = {n: m["sweep"]["mode"] for n, m in manifests(tmp_path / "s").items()}
    assert modes == {**dict.fromkeys(range(4), "vmap"), 5: "map", 7: "map"}
    said = "R011: rng.impl: rbg draws other bits for lanes under vmap. Set hydra.lau"
    errors = [line for line in ran.stderr.splitlines() if line.startswith("ERROR: ")]
    assert [said in line for line in errors] == [True, True]
    assert "WARNING: hydra.launcher.mode: map, not vmap, since rng.impl rbg" in (
        ran.stderr
    )


# --- sweeps that are launched again


def test_a_killed_sweep_goes_on_where_it_was(
    runner: Any, user_env: dict[str, str], tmp_path: Path
) -> None:
    """Lanes that ended stay as they are, one is resumed, others begin."""
    words = (
        *("-m", *SHORT, "train.steps=1500", "checkpoint.every=100", LANES),
        *("seed=range(4)", "optimizer.learning_rate=1e-3,1e20", "hydra.sweep.dir=s"),
        "hydra.launcher.max_lanes=1",
    )
    sweep = subprocess.Popen(
        [sys.executable, "-m", "runner", *words],
        cwd=tmp_path,
        env=user_env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        where = tmp_path / "s"
        wait_for((where / "2" / "checkpoints" / "200.json").exists)
    finally:
        sweep.send_signal(signal.SIGKILL)
        sweep.wait()
    before = manifests(where)
    assert {n: each["status"] for n, each in before.items()} == {
        0: "completed",
        1: "failed",
        2: "running",
    }
    ended = {n: (where / str(n) / "run.json").read_bytes() for n in (0, 1)}
    ran = runner(*words)
    assert ran.returncode == 1
    assert "error: sweep: 4 jobs failed: 1, 3, 5, 7 (loss" in ran.stderr
    after = manifests(where)
    assert [after[n]["status"] for n in range(8)] == ["completed", "failed"] * 4
    assert {n: (where / str(n) / "run.json").read_bytes() for n in (0, 1)} == ended
    assert after[2]["resumed"][0]["step"] >= 200
    assert after[2]["run_id"] == before[2]["run_id"]
    assert after[2]["sweep"] == before[2]["sweep"]
    steps = [
        json.loads(line)["step"]
        for line in (where / "2" / "metrics.jsonl").read_text().splitlines()
        if '"train"' in line
    ]
    assert steps == list(range(1500))
    other = runner(*words[:-3], "optimizer.learning_rate=0.5", *words[-2:])
    assert other.returncode == 1
    assert "hydra.sweep.dir: holds another run already" in other.stderr


def test_ctrl_c_saves_every_lane(
    user_env: dict[str, str], tmp_path: Path, runner: Any
) -> None:
    words = ("-m", *SHORT, "train.steps=2000000000", "seed=0,1,2", LANES)
    options = ("hydra.sweep.dir=s", "hydra.launcher.max_lanes=2")
    sweep = subprocess.Popen(
        [sys.executable, "-m", "runner", *words, *options],
        cwd=tmp_path,
        env=user_env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    files = [tmp_path / "s" / str(n) / "metrics.jsonl" for n in (0, 1)]
    try:
        wait_for(lambda: all(f.exists() and f.stat().st_size > 20_000 for f in files))
        sweep.send_signal(signal.SIGINT)
        _, err = sweep.communicate(timeout=60)
    finally:
        sweep.kill()
    assert (sweep.returncode, "Traceback" in err) == (130, False)
    found = manifests(tmp_path / "s")
    assert {n: each["status"] for n, each in found.items()} == dict.fromkeys(
        (0, 1), "interrupted"
    )
    jobs = json.loads((tmp_path / "s" / "sweep.json").read_text())["jobs"]
    said = [(job["status"], job["reason"]) for job in jobs]
    assert said[2] == ("interrupted", "before it began")


# --- bad input


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("seed=0", LANES), "hydra/launcher: is for sweeps, and this is a single run"),
        (("seed=0", "hydra/sweeper=optuna"), "hydra/sweeper: is for sweeps, and"),
        (
            ("-m", "seed=0,1", LANES, "hydra.launcher.mode=fast"),
            "hydra.launcher.mode: not a choice (got 'fast')",
        ),
        (
            ("-m", "seed=0,1", LANES, "hydra.launcher.max_lanes=0"),
            "hydra.launcher.max_lanes: must be at least 1 (got 0)",
        ),
        (
            ("-m", "seed=0,1", LANES, "hydra.launcher.mode=null"),
            "hydra.launcher.mode: must be something else than null",
        ),
        (
            ("-m", "seed=0,1", LANES, "hydra.launcher.lanes=3"),
            "hydra.launcher.lanes: unknown key. Known: _target_, mode, max_lanes,",
        ),
    ],
)
def test_bad_input_is_one_line(
    runner: Any, tmp_path: Path, words: tuple[str, ...], says: str
) -> None:
    ran = runner(*SHORT, *words)
    assert (ran.returncode, ran.stderr.count("\n")) == (2, 1)
    assert says in ran.stderr
    assert list(tmp_path.iterdir()) == []


# --- composing


@pytest.mark.parametrize(
    "words",
    [
        "+experiment=dropout seed=3",
        "+experiment=dropout seed=3 model.dropout_rate=0.4 sinks=none",
        "+experiment=dropout optimizer=sgd optimizer.learning_rate=0.1",
        "+a=1 seed=2 ~model.dropout_rate",
        "seed=1 seed=2",
        "mesh=data8 mesh.axes.data=4 seed=1",
        "rng.streams.dropout.per=[step] model.features=[3]",
        "rng.streams.shuffle={kind:host} train.steps=5",
        "train.steps=${seed}",
        "no.such=3",
        "experiment=dropout",
    ],
)
def test_composing_once_gives_what_hydra_composes(words: str) -> None:
    """Twice each: the second one is made from the first."""

    def compose(loader: Any) -> Any:
        try:
            config = loader.load_sweep_config(master, words.split())
        except Exception as error:
            return type(error), str(error)
        return OmegaConf.to_yaml(config), OmegaConf.is_struct(config)

    with initialize_config_dir(
        config_dir=str(CONF_DIR), job_name="runner", version_base="1.3"
    ):
        loader: Any = GlobalHydra.instance().config_loader()
        overrides = ["seed=0", "hydra.sweep.subdir=x_${hydra.job.num}"]
        master = loader.load_configuration("config", overrides, RunMode.MULTIRUN)
        alone = compose(loader)
        compose_once(loader)
        assert [compose(loader) for _ in range(2)] == [alone, alone]


def test_composing_once_copies_what_can_not_be_pickled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @dataclass
    class Local:
        size: int = 1

    with initialize_config_dir(
        config_dir=str(CONF_DIR), job_name="runner", version_base="1.3"
    ):
        loader: Any = GlobalHydra.instance().config_loader()
        store = ConfigStore.instance()
        monkeypatch.setattr(store, "repo", copy.deepcopy(store.repo))
        store.store("local", Local, group="data")
        words = ["+experiment=dropout", "data=local", "data.size=2"]
        master = loader.load_configuration("config", [], RunMode.MULTIRUN)
        compose_once(loader)
        configs = [loader.load_sweep_config(master, words) for _ in range(2)]
        configs[0].data.size = 3
        again = loader.load_sweep_config(master, words)
    assert [c.data.size for c in (*configs, again)] == [3, 2, 2]
    assert OmegaConf.get_type(again.data) is Local


def test_the_plugin_is_light(user_env: dict[str, str]) -> None:
    code = (
        "import sys, hydra_plugins.runner.vectorized\n"
        "print([m for m in ('jax', 'flax', 'runner') if m in sys.modules])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **user_env},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.strip() == "[]"
