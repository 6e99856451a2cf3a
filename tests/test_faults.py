# SPDX-License-Identifier: Apache-2.0
"""Kills at any moment leave a record that can be read; runs never share a directory."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from waiting import wait_for

from runner.errors import RecordError
from runner.records.digests import digest_plain
from runner.records.metrics import read_metrics
from runner.records.reading import open_run

ENDLESS = (
    "+experiment=dropout",
    "train.steps=2000000000",
    "eval.every=25",
    "checkpoint.every=50",
    "sinks.wandb.mode=disabled",
)
STATUSES = ("running", "completed", "failed", "interrupted")


def start(env: dict[str, str], cwd: Path, *args: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "runner", *args],
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def find(cwd: Path, pattern: str) -> Path | None:
    return next(cwd.glob(f"outputs/dropout/*/*/{pattern}"), None)


def check_record(cwd: Path) -> str:
    """What must be true of a run directory whatever happened; its status."""
    runs = list(cwd.glob("outputs/dropout/*/*"))
    if not runs:
        return "none"
    (run,) = runs
    status = "no manifest"
    if (run / "run.json").exists():
        manifest = json.loads((run / "run.json").read_text())
        status = manifest["status"]
        assert status in STATUSES
        assert (status == "running") == (manifest["ended"] is None)
        files = open_run(str(run))
        try:
            ledger = files.read_json("keys/ledger.json")
        except RecordError:
            assert not (run / "keys" / "ledger.json").exists()
        else:
            assert digest_plain(ledger) == manifest["digests"]["keys"]
    if (run / "metrics.jsonl").exists():
        assert status in STATUSES
        rows = read_metrics(run / "metrics.jsonl")
        trained = [row["step"] for row in rows if row["phase"] == "train"]
        assert trained == list(range(len(trained)))
        evaluated = [row["step"] for row in rows if row["phase"] == "eval"]
        assert evaluated == list(range(25, 25 * len(evaluated) + 1, 25))
    for checkpoint in (run / "checkpoints").glob("[0-9]*"):
        assert checkpoint.stem.isdecimal() or "tmp" in checkpoint.name
    return status


# The moments: what must be there before the clock starts, and how long it runs.
MOMENTS = {
    "start": ("", 0.5),
    "trace": ("", 2.0),
    "directory": (".hydra", 0.1),
    "compile": ("run.json", 0.7),
    "first records": ("metrics.jsonl", 0.3),
    "training": ("metrics.jsonl", 1.5),
    "saving": ("checkpoints", 0.5),
    "saving on": ("checkpoints/[1-9]*", 1.0),
}


@pytest.mark.parametrize(("sign", "most"), MOMENTS.values(), ids=MOMENTS)
def test_a_kill_leaves_a_readable_record(
    user_env: dict[str, str], tmp_path: Path, *, sign: str, most: float
) -> None:
    run = start(user_env, tmp_path, *ENDLESS)
    if sign:
        wait_for(lambda: find(tmp_path, sign))
    delay = random.uniform(0, most)
    time.sleep(delay)
    run.send_signal(signal.SIGKILL)
    out, err = run.communicate(timeout=60)
    assert run.returncode == -signal.SIGKILL, (out, err)
    status = check_record(tmp_path)
    assert status in ("running", "no manifest", "none"), f"after {delay:.3f} s"
    if sign in ("run.json", "metrics.jsonl"):
        assert status == "running"


def test_launches_at_once_get_a_directory_each(
    user_env: dict[str, str], tmp_path: Path
) -> None:
    args = (
        "+experiment=dropout",
        "train.steps=3",
        "sinks=none",
        "hydra.job.name=runner",
    )
    runs = [start(user_env, tmp_path, *args) for _ in range(8)]
    said = [run.communicate(timeout=200) for run in runs]
    assert [
        (run.returncode, err) for run, (_, err) in zip(runs, said, strict=True)
    ] == [(0, "")] * 8
    told = {out.splitlines()[-1] for out, _ in said}
    found = {str(path.parent) for path in tmp_path.rglob("run.json")}
    assert told == found
    assert len(told) == 8
    for run in found:
        assert json.loads(Path(run, "run.json").read_text())["status"] == "completed"


def test_one_named_directory_holds_one_run(
    user_env: dict[str, str], tmp_path: Path
) -> None:
    """Several are told to write to one place: one does, the others are refused."""
    args = ("+experiment=dropout", "train.steps=3", "sinks=none", "hydra.run.dir=mine")
    runs = [start(user_env, tmp_path, *args) for _ in range(3)]
    try:
        said = [run.communicate(timeout=60) for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert sorted(run.returncode for run in runs) == [0, 2, 2], said
    for run, (_, err) in zip(runs, said, strict=True):
        assert ("hydra.run.dir: holds a run already" in err) == (run.returncode == 2)


@pytest.mark.parametrize(
    ("blocks", "status"),
    [(64, "failed"), (16, "no manifest"), (4, "no manifest")],
    ids=["metrics", "first files", "hydra's files"],
)
def test_a_full_disk_is_said(
    user_env: dict[str, str], tmp_path: Path, *, blocks: int, status: str
) -> None:
    """`ulimit -f` stands in for a disk that is full, in blocks of 512 bytes or so."""
    words = " ".join([sys.executable, "-m", "runner", *ENDLESS, "train.steps=3000"])
    script = f"trap '' XFSZ; ulimit -f {blocks}; exec {words}"
    env = user_env | {"XDG_CACHE_HOME": os.devnull}
    done = subprocess.run(
        ["sh", "-c", script, "sh"],
        cwd=tmp_path,
        env=env | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 1
    assert check_record(tmp_path) == status
    assert re.match(r"error: .*: can't be written \(", done.stderr.splitlines()[-1])
