# SPDX-License-Identifier: Apache-2.0
"""`hydra.launcher.processes`: lanes in several processes of this machine."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from waiting import manifests, wait_for

from runner.cli import forks
from runner.cli.forks import count_processes

in_forks = pytest.mark.xdist_group("forks")
SWEEP = (
    *("-m", "+experiment=dropout", "model.features=[32]", "sinks=none"),
    *("hydra/launcher=vectorized", "hydra.sweep.dir=s"),
)
LONG = (
    *(*SWEEP, "seed=range(4)", "train.steps=20000", "checkpoint.every=100000"),
    *("hydra.launcher.max_lanes=2", "hydra.launcher.processes=2"),
)


def children_of(pid: int) -> list[int]:
    found = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(pid)],
        check=False,
        capture_output=True,
        text=True,
    )
    return [int(each) for each in found.stdout.split()]


@pytest.fixture
def sweep(user_env: dict[str, str], tmp_path: Path) -> Any:
    """Four long jobs in two processes, once a lane of each is under way."""
    process = subprocess.Popen(
        [sys.executable, "-m", "runner", *LONG],
        cwd=tmp_path,
        env=user_env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )

    def are_under_way() -> bool:
        files = [tmp_path / "s" / str(n) / "metrics.jsonl" for n in (0, 2)]
        return all(file.exists() and file.stat().st_size > 9_000 for file in files)

    try:
        wait_for(are_under_way)
        yield process
    finally:
        for child in children_of(process.pid):
            os.kill(child, signal.SIGKILL)
        process.kill()
        process.communicate()


@in_forks
def test_lanes_are_those_of_one_process(runner: Any, tmp_path: Path) -> None:
    rates = "model.dropout_rate=1.5,0.1,0.2"  # the first is refused
    words = (*SWEEP, "train.steps=20", "seed=range(2)", rates)
    found, last = {}, {}
    for count in (1, 2):
        place = f"hydra.sweep.dir=p{count}"
        done = runner(*words, place, f"hydra.launcher.processes={count}")
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert done.stdout.splitlines()[-1] == f"p{count}"
        last[count] = done.stderr.splitlines()[-1]
        found[count] = manifests(tmp_path / f"p{count}")
    assert "sweep: 2 jobs failed: 0, 3 (model.dropout_rate: must be" in last[1]
    assert last[2] == last[1].replace("p1", "p2")
    assert list(found[2]) == list(found[1]) == [1, 2, 4, 5]
    for number, lane in found[2].items():
        for same in ("status", "digests", "metrics", "guarantee", "inputs"):
            assert lane[same] == found[1][number][same]
        assert lane["sweep"] == {**found[1][number]["sweep"], "id": "p2"}
        log = (tmp_path / "p2" / str(number) / "runner.log").read_text()
        assert f"seed        {number // 3}" in log


@in_forks
def test_a_killed_process_takes_its_own_lanes_alone(
    sweep: Any, runner: Any, tmp_path: Path
) -> None:
    os.kill(children_of(sweep.pid)[0], signal.SIGKILL)
    _, said = sweep.communicate(timeout=120)
    assert (sweep.returncode, "Traceback" in said) == (1, False)
    last = said.splitlines()[-1]
    assert "sweep: 2 jobs did not end: 0 (killed before it ended), 1 (killed" in last
    assert "its process was killed with SIGKILL, by the system if memory" in said
    found = manifests(tmp_path / "s")
    assert [found[n]["status"] for n in (0, 2, 3)] == ["running", *["completed"] * 2]
    ended = {n: (tmp_path / "s" / str(n) / "run.json").read_bytes() for n in (2, 3)}
    again = runner(*LONG)
    assert again.returncode == 0, again.stderr
    assert [m["status"] for m in manifests(tmp_path / "s").values()] == [
        "completed"
    ] * 4
    for number, manifest in ended.items():
        assert (tmp_path / "s" / str(number) / "run.json").read_bytes() == manifest


@in_forks
@pytest.mark.parametrize("to", ["all", "parent"])
def test_a_signal_saves_every_lane(sweep: Any, tmp_path: Path, to: str) -> None:
    if to == "all":  # as a terminal does
        os.killpg(sweep.pid, signal.SIGINT)
    else:
        sweep.terminate()
    _, said = sweep.communicate(timeout=60)
    assert (sweep.returncode, "Traceback" in said) == (130, False), said
    found = manifests(tmp_path / "s")
    assert {each["status"] for each in found.values()} == {"interrupted"}
    assert {0, 2} <= set(found)
    assert all(list((tmp_path / "s").glob(f"{n}/checkpoints/*.json")) for n in found)


@in_forks
def test_a_second_signal_ends_it_at_once(sweep: Any, tmp_path: Path) -> None:
    for child in children_of(sweep.pid):
        os.kill(child, signal.SIGSTOP)  # so that they can't save
    for _ in range(2):
        sweep.terminate()
        time.sleep(1.5)
    _, said = sweep.communicate(timeout=30)
    assert (sweep.returncode, "Traceback" in said) == (130, False), said
    found = manifests(tmp_path / "s")
    assert {found[n]["status"] for n in (0, 2)} == {"running"}


@in_forks
def test_a_sweep_is_launched_once_at_a_time(
    sweep: Any, runner: Any, tmp_path: Path
) -> None:
    for child in children_of(sweep.pid):
        os.kill(child, signal.SIGSTOP)  # it takes as long as the test needs
    second = runner(*LONG)
    assert second.returncode == 2
    says = "hydra.sweep.dir: another process runs this sweep (got 's'). Wait for it"
    assert says in second.stderr.splitlines()[-1]
    assert not list((tmp_path / "s").glob("*/failure.json"))
    assert sweep.poll() is None


@in_forks
def test_nobody_runs_on_for_a_parent_that_is_gone(sweep: Any, tmp_path: Path) -> None:
    children = children_of(sweep.pid)
    sweep.kill()
    wait_for(
        lambda: not any(Path(f"/proc/{child}/stat").exists() for child in children)
    )
    found = manifests(tmp_path / "s")
    assert {found[n]["status"] for n in (0, 2)} == {"interrupted"}


def test_processes_are_as_many_as_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    def count(lanes: int, asked: int | None = None) -> int:
        return count_processes(lanes, asked=asked)

    packages = set[str]()
    monkeypatch.setattr(forks, "find_spec", lambda name: name in packages or None)
    monkeypatch.setattr(forks, "entry_points", lambda **_: [])
    monkeypatch.setattr(forks, "has_backend", lambda: False)
    monkeypatch.setattr(forks, "count_cores", lambda: 4)
    monkeypatch.setattr(forks, "free_memory", lambda: 2**40)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert [count(n) for n in (1, 31, 32, 64, 1000)] == [1, 1, 2, 4, 4]
    assert (count(8, 3), count(2, 3), count(1000, 1)) == (3, 2, 1)
    packages.add("libtpu")
    assert (count(1000), count(1000, 2)) == (1, 2)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert count(1000) == 4
    monkeypatch.setattr(forks, "free_memory", lambda: 3 * 2**30)
    assert count(1000) == 3
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    assert count(1000) == 1


def test_no_process_is_forked_off_a_backend(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(forks, "has_backend", lambda: True)
    assert (count_processes(1000, asked=None), caplog.text) == (1, "")
    assert count_processes(1000, asked=2) == 1
    assert "1, not 2, since JAX has a backend already" in caplog.text
