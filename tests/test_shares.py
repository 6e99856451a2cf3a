# SPDX-License-Identifier: Apache-2.0
"""`hydra/launcher/over`: groups of lanes that another launcher ships.

SLURM and Ray were tried by hand (docs/lanes.md); all that a share does where something
ends it is done here, by launchers that need no cluster.
"""

import contextlib
import fcntl
import importlib.util
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from waiting import manifests, wait_for

from runner.cli import shares
from runner.cli.share import ended, portable
from runner.cli.shares import cut_shares
from runner.errors import RunFailedError
from runner.sweep.jobs import SHARES, find_jobs

of_shares = pytest.mark.xdist_group("shares")
LANES = "hydra/launcher=vectorized"
SHORT = (
    *("-m", "+experiment=dropout", "model.features=[32]", "sinks=none", LANES),
    "hydra.sweep.dir=s",
)
SWEPT = ("train.steps=20", "seed=range(2)", "model.dropout_rate=1.5,0.1,0.2")
OVER = {
    "joblib": ("hydra_plugins.hydra_joblib_launcher", "hydra.launcher.over.n_jobs=2"),
    "submitit_local": (
        "hydra_plugins.hydra_submitit_launcher",
        "hydra.launcher.lanes_per_job=3",
    ),
}


def over(name: str) -> tuple[str, ...]:
    module, option = OVER[name]
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"needs the extra: pip install .[{name.partition('_')[0]}]")
    return f"hydra/launcher/over={name}", option


def share_pid(sweep: Path, share: int) -> int:
    """The process of a share that was begun last."""
    log = (sweep / SHARES / str(share) / "runner.log").read_text()
    return int(re.findall(r"process (\d+) runs jobs", log)[-1])


def parent_of(pid: int) -> int:
    return int(subprocess.check_output(["ps", "-o", "ppid=", "-p", str(pid)]))


# --- what a share leaves behind


@pytest.fixture(scope="module")
def here(
    user_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[int, dict[str, Any]]:
    """The same jobs, as lanes of one process."""
    where = tmp_path_factory.mktemp("here")
    command = [sys.executable, "-m", "runner", *SHORT, *SWEPT]
    subprocess.run(command, cwd=where, env=user_env, check=False, capture_output=True)
    return manifests(where / "s")


@of_shares
@pytest.mark.parametrize("name", OVER)
def test_lanes_are_those_of_one_process(
    name: str, here: Any, runner: Any, tmp_path: Path
) -> None:
    done = runner(*SHORT, *SWEPT, *over(name))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    rate = r"\(model.dropout_rate: must be a number from 0 to 1 \(got 1.5\)"
    assert re.match(rf"error: sweep: 2 jobs failed: 0, 3 {rate}", last), last
    assert done.stdout.splitlines()[-1] == "s"
    found = manifests(tmp_path / "s")
    assert list(found) == list(here) == [1, 2, 4, 5]
    for number, lane in found.items():
        assert lane["status"] == "completed"
        for same in ("digests", "metrics", "guarantee", "inputs", "sweep"):
            assert lane[same] == here[number][same]
        assert lane["sweep"]["lanes"] == 6
        log = (tmp_path / "s" / str(number) / "runner.log").read_text()
        assert f"seed        {number // 3}" in log
    assert {p.name for p in (tmp_path / "s" / SHARES).iterdir()} == {"0", "3"}
    assert share_pid(tmp_path / "s", 0) != share_pid(tmp_path / "s", 3)
    jobs = [path.name for path in find_jobs(tmp_path / "s")]
    assert jobs == ["0", "1", "2", "3", "4", "5"]  # no share among them


# --- shares that are ended from outside

LONG = (*SHORT, "checkpoint.every=100", "hydra.launcher.max_lanes=1")


def launch(*words: str, where: Path, env: dict[str, str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "runner", *words],
        cwd=where,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@of_shares
def test_a_killed_share_harms_no_other_and_goes_on(
    user_env: dict[str, str], runner: Any, tmp_path: Path
) -> None:
    words = (*LONG, "seed=range(4)", "train.steps=1000", *over("joblib"))
    sweep = tmp_path / "s"
    process = launch(*words, where=tmp_path, env=user_env)
    try:
        wait_for((sweep / "0" / "checkpoints" / "200.json").exists)
        os.kill(share_pid(sweep, 0), signal.SIGKILL)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert (process.returncode, "Traceback" in said) == (1, False)
    last = said.splitlines()[-1]
    assert "sweep: 2 jobs did not end: 0 (killed before it ended), 1 (killed" in last
    assert "its process was killed with SIGKILL, by the system if memory" in last
    before = manifests(sweep)
    assert [before[n]["status"] for n in (0, 2, 3)] == ["running", *["completed"] * 2]
    ended = {n: (sweep / str(n) / "run.json").read_bytes() for n in (2, 3)}
    again = runner(*words)
    assert again.returncode == 0, again.stderr
    after = manifests(sweep)
    assert [each["status"] for each in after.values()] == ["completed"] * 4
    assert {n: (sweep / str(n) / "run.json").read_bytes() for n in (2, 3)} == ended
    assert after[0]["resumed"][0]["step"] >= 200
    assert after[0]["sweep"] == before[0]["sweep"]


def wait_for_steps(sweep: Path, job: int) -> None:
    file = sweep / str(job) / "metrics.jsonl"
    wait_for(lambda: file.exists() and file.stat().st_size > 0)


@of_shares
def test_a_share_that_a_queue_puts_back_goes_on_from_that_step(
    user_env: dict[str, str], tmp_path: Path
) -> None:
    """Its lane is saved at the signal: it has no checkpoint else."""
    name, _ = over("submitit_local")
    words = (*LONG, "seed=0", "train.steps=4000", "checkpoint.every=4000", name)
    process = launch(*words, where=tmp_path, env=user_env)
    try:
        wait_for_steps(tmp_path / "s", 0)
        os.kill(parent_of(share_pid(tmp_path / "s", 0)), signal.SIGUSR2)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, said
    lane = manifests(tmp_path / "s")[0]
    assert lane["status"] == "completed"
    assert 0 < lane["resumed"][0]["step"] < 4000


@of_shares
def test_a_share_that_nobody_waits_for_saves_its_lanes(
    user_env: dict[str, str], tmp_path: Path
) -> None:
    name, _ = over("joblib")
    words = (*LONG, "seed=0,1", "train.steps=2000000000", name)
    process = launch(
        *words, "hydra.launcher.over.n_jobs=1", where=tmp_path, env=user_env
    )
    try:
        wait_for_steps(tmp_path / "s", 0)
    finally:
        process.kill()
        process.communicate()
    share = share_pid(tmp_path / "s", 0)
    try:
        wait_for(lambda: manifests(tmp_path / "s")[0]["status"] != "running")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(share, signal.SIGKILL)
    lane = manifests(tmp_path / "s")[0]
    assert (lane["status"], lane["reason"]) == ("interrupted", "stopped by SIGTERM")


def test_shares_that_run_are_waited_for_when_a_launcher_gives_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(shares, "_QUIET", 0.3)
    share = tmp_path / SHARES / "0"
    share.mkdir(parents=True)
    lock = os.open(share, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    timer = threading.Timer(0.5, os.close, [lock])  # as when its process ends

    class Giving:
        def launch(self, *_: Any, **__: Any) -> Any:
            timer.start()
            raise OSError("a node is gone")

    returned = shares._launch(Giving(), [[], []], tmp_path)  # type: ignore[arg-type]
    assert timer.finished.is_set()
    said = [str(each._return_value) for each in returned]
    assert said == ["OSError: a node is gone"] * 2


@pytest.mark.parametrize("code", [130, -signal.SIGTERM, -signal.SIGUSR2])
def test_a_share_that_was_stopped_returns_nothing(code: int) -> None:
    """Or a queue that is about to run it again would take that for its result."""
    assert isinstance(ended(code), SystemExit)


def test_an_error_that_no_other_process_can_read_comes_as_its_line() -> None:
    class OfAModelError(Exception):
        pass

    assert isinstance(portable(ValueError("x")), ValueError)
    found = portable(OfAModelError("too wide"))
    assert str(pickle.loads(pickle.dumps(found))) == "OfAModelError: too wide"
    assert isinstance(found, RunFailedError)


# --- what is in a share


def test_jobs_that_differ_in_numbers_alone_come_first() -> None:
    words = [
        ["seed=0", "model=mlp"],
        ["seed=0", "model=cnn"],
        ["seed=1", "model=mlp"],
        ["seed=1", "model=cnn"],
        ["seed=2.5", "model=mlp"],
    ]
    jobs = dict(enumerate(words, start=10))
    cut = cut_shares(jobs, size=2)
    assert [list(share) for share in cut] == [[10, 12], [14, 11], [13]]
    assert {number: job for share in cut for number, job in share.items()} == jobs
    assert [list(share) for share in cut_shares(jobs, size=9)] == [[10, 12, 14, 11, 13]]


# --- bad input

JOBLIB = "hydra/launcher/over=joblib"
SINGLE = SHORT[1:]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((*SINGLE, JOBLIB), "hydra/launcher: is for sweeps, and this is a single run"),
        (
            (*SHORT, JOBLIB, "hydra.launcher.lanes_per_job=0"),
            "hydra.launcher.lanes_per_job: must be at least 1 (got 0)",
        ),
        (
            (*SHORT, "hydra.launcher.lanes_per_job=2"),
            "there is none (got 2). Name one, as in hydra/launcher/over=joblib.",
        ),
        (
            (*SHORT, "hydra/launcher/over=nqs"),
            "Choices: joblib, ray, submitit_local, submitit_slurm.",
        ),
        (
            (*SHORT, "hydra.launcher.over=joblib"),
            "hydra.launcher.over: must be a launcher (got 'joblib').",
        ),
        (
            (*SHORT, JOBLIB, "hydra.launcher.over.n_jobs=0"),
            "hydra.launcher.over.n_jobs: must not be 0 (got 0).",
        ),
        (
            (*(word for word in SHORT if word != LANES), JOBLIB),
            "which is not there. Add hydra/launcher=vectorized.",
        ),
        (
            (*SHORT, "hydra/launcher/over=ray"),
            "hydra/launcher/over: not installed (got 'ray'). "
            "Say pip install 'jax-runner[ray]'.",
        ),
    ],
)
def test_bad_input_is_one_line(
    runner: Any, tmp_path: Path, words: tuple[str, ...], says: str
) -> None:
    for name in ("joblib", "ray"):
        there = importlib.util.find_spec(f"hydra_plugins.hydra_{name}_launcher")
        if f"hydra/launcher/over={name}" in words and bool(there) == (name == "ray"):
            pytest.skip("needs the extra joblib, and the extra ray not to be there")
    done = runner(*words, "seed=0,1" if "-m" in words else "seed=0")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert says in done.stderr
    assert not list(tmp_path.rglob("run.json"))
