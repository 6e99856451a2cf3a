# SPDX-License-Identifier: Apache-2.0
"""Two real processes of four devices: what they compute, and what they survive."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner.compile import compile_run
from runner.ledger import make_ledger
from runner.records.digests import digest_plain

pytestmark = pytest.mark.xdist_group("hosts")

Run = Callable[..., subprocess.CompletedProcess[str]]
HOST = re.escape(socket.gethostname())
SMALL = (
    *("model.features=[32]", "sinks=none", "train.steps=60", "eval.every=20"),
    *("checkpoint.every=10", "checkpoint.digest_every=10"),
)
TWO = ("+experiment=mesh/hosts2x4", *SMALL)
EXACT = (*TWO, "mesh.strategy=exact", "train.accumulation_steps=8")
ONE = ("mesh.distributed=null", "mesh.host_devices=8")
EQUAL = ("params", "metrics", "states", "keys")


def read(path: Path) -> Any:
    return json.loads((path / "run.json").read_text())


def digests(path: Path) -> dict[str, str]:
    manifest = read(path)
    assert manifest["status"] == "completed", manifest["reason"]
    return {name: manifest["digests"][name] for name in EQUAL}


@pytest.fixture
def start(
    user_env: dict[str, str], tmp_path: Path
) -> Callable[..., list["subprocess.Popen[str]"]]:
    """Starts processes 0 and 1 as two people would, on one port."""

    def start_both(
        *words: str, of_1: tuple[str, ...] = ()
    ) -> list["subprocess.Popen[str]"]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        return [
            subprocess.Popen(
                [
                    *(sys.executable, "-m", "runner", *words),
                    f"mesh.distributed.coordinator_address={address}",
                    f"mesh.distributed.process_id={index}",
                    *(of_1 if index else ()),
                ],
                cwd=tmp_path,
                env=user_env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in (0, 1)
        ]

    return start_both


def ends(both: list["subprocess.Popen[str]"]) -> tuple[list[int], list[str], list[str]]:
    said = [process.communicate(timeout=120) for process in both]
    codes = [process.returncode for process in both]
    return codes, [out for out, _ in said], [err for _, err in said]


def wait_for(path: Path, both: list["subprocess.Popen[str]"]) -> None:
    end = time.monotonic() + 120
    while not path.exists():
        assert all(process.poll() is None for process in both), ends(both)
        assert time.monotonic() < end
        time.sleep(0.01)


def child_of(process: "subprocess.Popen[str]") -> int:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return int(children.split()[0])


@pytest.fixture(scope="module")
def left_alone(
    user_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run of two processes, launched by one command, that nothing happened to."""
    where = tmp_path_factory.mktemp("hosts") / "left_alone"
    done = subprocess.run(
        [sys.executable, "-m", "runner", *TWO, f"hydra.run.dir={where}"],
        env=user_env,
        cwd=where.parent,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{where}\n"
    return where


@pytest.mark.promotes
def test_one_command_runs_both(left_alone: Path, make_spec: Any) -> None:
    manifest = read(left_alone)
    platform = manifest["platform"]
    assert (platform["process_count"], platform["device_count"]) == (2, 8)
    files = sorted(path.name for path in left_alone.iterdir())
    assert files == [
        *(".hydra", "checkpoints", "config.yaml", "keys", "metrics.jsonl"),
        *("processes", "run.json", "runner.log", "states.jsonl"),
    ]
    folder = left_alone / "checkpoints" / "60" / "default"
    assert {path.name for path in folder.glob("ocdbt.process_*")} == {
        "ocdbt.process_0",
        "ocdbt.process_1",
    }
    ledger = make_ledger(compile_run(make_spec("+experiment=mesh/data8", *SMALL)))
    ledger["experiment"] = manifest["experiment"]
    assert manifest["digests"]["keys"] == digest_plain(ledger)


@pytest.mark.parametrize("strategy", ["jit", "shard_map"])
def test_draws_are_those_of_one_process(
    runner: Run, tmp_path: Path, strategy: str
) -> None:
    """Another mask would move the loss by a hundred thousand times as much."""
    words = (*SMALL[:2], "train.steps=3", "rng.observe=true")
    words = (
        *words,
        "checkpoint.digest_every=1",
        "rng.streams.shuffle.per=[epoch,process]",
    )
    words = (*words, "+experiment=mesh/data8", f"mesh.strategy={strategy}")
    if strategy == "shard_map":
        words = (*words, "rng.streams.dropout.per=[step, microbatch, data]")
    losses, keys, batches = [], [], []
    meshes = (
        ("mesh.host_devices=8",),
        ("mesh.host_devices=4", "mesh.distributed={num_processes: 2}"),
    )
    for name, mesh in zip("ab", meshes, strict=True):
        done = runner(*words, *mesh, f"hydra.run.dir={name}")
        assert (done.returncode, done.stderr) == (0, "")
        rows = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(row)["loss"] for row in rows[:3]])
        rows = (tmp_path / name / "states.jsonl").read_text().splitlines()
        batches.append([json.loads(row)["batches"] for row in rows])
        manifest = read(tmp_path / name)
        keys.append(manifest["digests"]["keys"])
        assert manifest["observed"]["status"] == "equal"
    assert keys[0] == keys[1]
    assert batches[0] == batches[1]
    assert len(batches[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_killed_one_at_a_time_and_resumed(
    start: Any, runner: Run, left_alone: Path, tmp_path: Path
) -> None:
    where = tmp_path / "run"
    both = start(*TWO, f"hydra.run.dir={where}")
    wait_for(where / "checkpoints" / "10.json", both)
    os.kill(child_of(both[1]), signal.SIGKILL)
    codes, out, err = ends(both)
    assert codes == [1, 1]
    assert out == ["", ""]
    line = (
        rf"process 1 of 2 \({HOST}\) was killed by SIGKILL \(code 137\); see .*1\.log"
    )
    assert all(re.fullmatch(rf"error: {line}\n", each) for each in err), err
    manifest = read(where)
    assert manifest["status"] == "failed"
    assert re.fullmatch(line, manifest["reason"])

    both = start("resume", str(where))
    wait_for(where / "checkpoints" / "30.json", both)
    os.kill(child_of(both[0]), signal.SIGKILL)
    codes, _, err = ends(both)
    line = (
        rf"process 0 of 2 \({HOST}\) was killed by SIGKILL \(code 137\); see .*0\.log"
    )
    assert codes == [1, 1]
    assert all(re.fullmatch(rf"error: {line}\n", each) for each in err), err
    assert re.fullmatch(line, read(where)["reason"])

    both = start("resume", str(where))
    wait_for(where / "checkpoints" / "50.json", both)
    both[0].kill()  # with its supervisor nobody is left to write
    codes, _, err = ends(both)
    assert codes == [-signal.SIGKILL, 1]
    line = rf"process 0 of 2 \({HOST}\) was lost \(its connection closed\): killed, .*"
    assert re.fullmatch(rf"error: {line}\n", err[1]), err
    assert read(where)["status"] == "running"

    done = runner("resume", str(where))
    assert done.returncode == 0, done.stderr
    assert digests(where) == digests(left_alone)


def test_told_to_stop_then_on_with_other_processes(
    start: Any, runner: Run, tmp_path: Path
) -> None:
    """In exact mode: the bits of one process with all devices."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    done = runner(*EXACT, *ONE, f"hydra.run.dir={whole}")
    assert done.returncode == 0, done.stderr
    both = start(*EXACT, f"hydra.run.dir={part}")
    wait_for(part / "checkpoints" / "10.json", both)
    both[1].terminate()
    codes, out, err = ends(both)
    assert codes == [130, 130]
    assert out == [f"{part}\n", ""]
    assert err == ["", ""]
    manifest = read(part)
    assert manifest["status"] == "interrupted"
    said = rf"process 1 of 2 \({HOST}\) was told to stop \(SIGTERM\)"
    assert re.fullmatch(said, manifest["reason"])
    assert 10 <= manifest["steps"] < 60

    done = runner("resume", str(part), *ONE)
    assert done.returncode == 0, done.stderr
    assert digests(part) == digests(whole)
    assert read(part)["guarantee"] == read(whole)["guarantee"]
    four = ("mesh.distributed={num_processes: 4}", "mesh.host_devices=2")
    words = [word for value in four for word in ("--set", value)]
    done = runner("reproduce", str(whole), "--json", "--steps", "8", *words)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["level"] == "bit-exact"


def test_the_one_that_raises_is_named_by_both(start: Any, tmp_path: Path) -> None:
    (tmp_path / "boom.py").write_text(
        "import jax\n"
        "from flax import linen as nn\n"
        "class Boom(nn.Module):\n"
        "    @nn.compact\n"
        "    def __call__(self, x):\n"
        "        if jax.process_index() == 1:\n"
        "            raise ValueError('no such luck')\n"
        "        return nn.Dense(10)(x.reshape((len(x), -1)))\n"
    )
    both = start(
        *("+experiment=mesh/hosts2x4", "sinks=none", "train.steps=3"),
        *("trusted=[boom]", "~model", "+model={_target_: boom.Boom}"),
    )
    codes, out, err = ends(both)
    assert out == ["", ""]
    assert codes in ([1, 1], [2, 2])
    said = err[1].splitlines()[-1].removeprefix("error: ")
    assert "no such luck" in said
    assert err[0] == f"error: process 1 of 2 ({socket.gethostname()}): {said}\n"
    assert not list(tmp_path.rglob("run.json"))


def test_other_configs_are_refused_by_both(start: Any, tmp_path: Path) -> None:
    codes, out, err = ends(start(*TWO, of_1=("train.steps=61",)))
    assert (codes, out) == ([2, 2], ["", ""])
    host = socket.gethostname()
    said = (
        f"error: mesh.distributed: process 1 ({host}) has other config than process 0 "
        f"({host}): train.steps. Launch all of them with one config and one "
        "environment.\n"
    )
    assert err == [said, said]
    assert list(tmp_path.iterdir()) == []


def test_no_sweep_of_several_processes(runner: Run) -> None:
    done = runner("-m", *TWO, "seed=1,2", "hydra.sweep.dir=sweep")
    assert done.returncode == 1
    assert "mesh.distributed: not in a sweep, whose jobs share this process" in (
        done.stderr
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("mesh.distributed.process_id=0",),
            "fewer processes than promised came within 1 s (got '1 of 2').",
        ),
        (
            ("mesh.distributed.process_id=1",),
            "no answer from process 0 within 1 s: Connection refused",
        ),
        (("mesh.axes.data=4",), "the product must equal the device count, 8 (got 4)."),
        (
            ("data.batch_size=100",),
            "data.batch_size: must divide into 8 parts over the mesh (got 100).",
        ),
    ],
)
def test_one_line_and_nothing_written(
    runner: Run, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    if "process_id" in words[0]:
        address = "mesh.distributed.coordinator_address=127.0.0.1:28471"
        words = (*words, address, "mesh.connect_timeout=1")
    done = runner(*TWO, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
