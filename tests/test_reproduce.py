# SPDX-License-Identifier: Apache-2.0
"""`runner reproduce`: real processes; the verdict names what is really different."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runner.records.digests import digest_file, digest_manifest
from runner.records.record import read_record
from runner.replay.compare import Replay
from runner.replay.environment import Cause, compare_environments

Run = Callable[..., subprocess.CompletedProcess[str]]
shared = pytest.mark.xdist_group("reproduce")
pytestmark = [shared, pytest.mark.timeout(600)]

ARGS = ("+experiment=dropout", "sinks=none", "train.steps=60", "eval.every=20")
MORE = ("checkpoint.digest_every=20", "model.features=[64]")


class Shell:
    """A directory, and the runner in it.

    Args:
        cwd: Where it is called.
        env: The environment of a user's shell.
    """

    def __init__(self, cwd: Path, env: dict[str, str]) -> None:
        self.cwd, self.env = cwd, env

    def __call__(self, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "runner", *args],
            cwd=self.cwd,
            env={**self.env, **env},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    def reproduce(self, *args: str, **env: str) -> tuple[int, dict[str, Any]]:
        """Exit code and verdict."""
        done = self("reproduce", "--json", *args, **env)
        assert done.returncode in (0, 1), done.stderr
        return done.returncode, json.loads(done.stdout)


@pytest.fixture(scope="module")
def shell(user_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """With a run `made` under a pool of four threads, whatever this machine has."""
    shell = Shell(tmp_path_factory.mktemp("reproduce"), user_env)
    done = shell(*ARGS, *MORE, "hydra.run.dir=made", NPROC="4")
    assert done.returncode == 0, done.stderr
    return shell


@pytest.fixture
def copy(shell: Shell, tmp_path: Path) -> Path:
    """A copy of the run, to be spoiled."""
    return Path(shutil.copytree(shell.cwd / "made", tmp_path / "copy"))


def checks_of(verdict: dict[str, Any]) -> dict[str, bool | None]:
    return {check["what"]: check["equal"] for check in verdict["checks"]}


def test_the_same_machine_is_bit_exact(shell: Shell) -> None:
    done = shell("reproduce", "made", "--out", "again")
    assert (done.returncode, done.stderr) == (0, "")
    *_, verdict, reason, steps, last = done.stdout.splitlines()
    assert verdict == "verdict: bit-exact (promised bit-exact: kept)"
    assert reason == "reason: every bit that was compared is as recorded"
    assert steps == "steps compared: 60 of 60 recorded"
    assert last == str(shell.cwd / "again")
    records = [read_record(str(shell.cwd / name)) for name in ("made", "again")]
    for part in ("keys", "data", "params", "metrics", "states"):
        assert records[0].digests[part] == records[1].digests[part], part
    parent = records[1].manifest["parent"]
    assert parent["run_id"] == records[0].manifest["run_id"]
    assert parent["verb"] == "reproduce"
    stored = json.loads((shell.cwd / "again" / "verdict.json").read_text())
    assert (stored["level"], stored["kept"]) == ("bit-exact", True)
    assert all(check["equal"] for check in stored["checks"])
    assert [check["what"] for check in stored["checks"]] == [
        *("generator", "keys", "data", "batches"),
        *("train", "eval", "states", "params"),
    ]


@pytest.mark.parametrize("cores", [1, 2])
def test_fewer_cores_give_the_same_bits(shell: Shell, cores: int) -> None:
    """The pool is set as recorded: here four threads on one or two cores."""
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < cores:
        pytest.skip(f"needs {cores} cores")
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, set(usable[:cores]))
    try:
        code, verdict = shell.reproduce("made")
    finally:
        os.sched_setaffinity(0, before)
    assert (code, verdict["level"]) == (0, "bit-exact")
    assert verdict["restored"] == {"NPROC": "4"}


@pytest.mark.parametrize("steps_per_call", [1, 7, 64])
def test_another_length_of_call(shell: Shell, steps_per_call: int) -> None:
    change = f"train.steps_per_call={steps_per_call}"
    code, verdict = shell.reproduce("made", "--set", change)
    assert (code, verdict["level"]) == (0, "bit-exact")


def test_another_pool_is_named(
    shell: Shell, pool_sensitive_overrides: list[str]
) -> None:
    done = shell(*pool_sensitive_overrides, "hydra.run.dir=pool", NPROC="4")
    assert done.returncode == 0, done.stderr
    code, verdict = shell.reproduce("pool", NPROC="1")
    assert (code, verdict["level"], verdict["kept"]) == (1, "key-exact", False)
    causes = {each["path"]: each["cause"] for each in verdict["environment"]}
    assert causes["platform.thread_pool"] == Cause.POOL
    assert "another thread pool (platform.thread_pool: 4, here 1)" in verdict["reason"]
    assert verdict["first"]["difference"] > 0
    assert verdict["params"]["first_largest"] > 0
    equal = checks_of(verdict)
    assert equal["keys"] is equal["generator"] is equal["batches"] is True
    assert equal["params"] is False
    code, verdict = shell.reproduce("pool")
    assert (code, verdict["level"]) == (0, "bit-exact")


def test_forced_devices_are_named(shell: Shell) -> None:
    """Eight devices on one machine: the same keys; the pool grows with them."""
    args = ("data.batch_size=512", "model.features=[64,64]", "train.steps=30")
    done = shell(*ARGS, *MORE, *args, "hydra.run.dir=one", NPROC="4")
    assert done.returncode == 0, done.stderr
    code, verdict = shell.reproduce("one", JAX_NUM_CPU_DEVICES="8")
    assert (code, verdict["level"]) == (1, "key-exact")
    causes = {each["path"]: each["cause"] for each in verdict["environment"]}
    assert causes["platform.device_count"] == Cause.MESH
    equal = checks_of(verdict)
    assert equal["keys"] is equal["generator"] is equal["batches"] is True
    assert verdict["steps"]["compared"] == 30  # it goes on, and measures
    sizes = {f"{d['phase']}/{d['metric']}": d["difference"] for d in verdict["largest"]}
    assert 0 < max(sizes.values()) < 1e-3
    assert 0 < verdict["params"]["first_largest"] < 1e-3


def test_what_was_promised_no_bits_is_compared_to_the_end(
    shell: Shell, copy: Path
) -> None:
    """Without the promise, a float that differs is no reason to look no further."""
    file, manifest = copy / "metrics.jsonl", json.loads((copy / "run.json").read_text())
    rows = file.read_text().splitlines(keepends=True)
    rows[3] = json.dumps({**json.loads(rows[3]), "loss": 2.5}) + "\n"
    file.write_text("".join(rows))
    shutil.rmtree(copy / "checkpoints")  # they vouch for the file as it was
    manifest["digests"]["metrics"] = digest_file(file)
    compared = {}
    for level in ("bit-exact", "key-exact"):
        manifest["guarantee"]["level"] = level
        manifest["digest"] = digest_manifest(manifest)
        (copy / "run.json").write_text(json.dumps(manifest))
        code, verdict = shell.reproduce(str(copy))
        assert (verdict["level"], verdict["first"]["step"]) == ("key-exact", 3)
        assert verdict["kept"] is (code == 0) is (level == "key-exact")
        compared[level] = verdict["steps"]["compared"]
    assert compared["bit-exact"] < compared["key-exact"] == 60


def test_a_flag_of_the_environment_is_named(shell: Shell) -> None:
    flag = "--xla_cpu_enable_fast_math=true"
    _, verdict = shell.reproduce("made", XLA_FLAGS=flag)
    found = {each["path"]: each for each in verdict["environment"]}
    assert found["platform.xla_flags.xla_cpu_enable_fast_math"]["cause"] == Cause.FLAG
    _, verdict = shell.reproduce("made", JAX_DEFAULT_PRNG_IMPL="rbg")
    found = {each["path"]: each for each in verdict["environment"]}
    impl = found["platform.jax_config.jax_default_prng_impl"]
    assert (impl["recorded"], impl["here"]) == ("threefry2x32", "rbg")
    assert verdict["level"] == "bit-exact"  # the config says the impl, and it counts


def test_another_generator_is_different(shell: Shell) -> None:
    """A seed offset moves every key: the canary says so before anything runs."""
    code, verdict = shell.reproduce("made", JAX_RANDOM_SEED_OFFSET="1")
    assert (code, verdict["level"]) == (1, "different")
    assert checks_of(verdict)["generator"] is False
    assert verdict["directory"] is None
    assert "another generator (rng.canary: other bits, " in verdict["reason"]
    assert "another flag (platform.jax_config.jax_random_seed" in verdict["reason"]
    assert verdict["restored"] == {"NPROC": "4"}


def test_a_warning_is_in_the_log_of_the_new_run(shell: Shell) -> None:
    unused = "+rng.streams.spare={phases: [train], per: [step]}"
    done = shell(*ARGS, *MORE, unused, "hydra.run.dir=spare")
    assert done.returncode == 0, done.stderr
    done = shell("reproduce", "spare", "--steps", "2", "--out", "spare again")
    assert done.stderr.startswith("WARNING: R005: rng.streams.spare: ")
    log = (shell.cwd / "spare again" / "runner.log").read_text()
    assert " WARNING R005: rng.streams.spare: " in log


@pytest.mark.parametrize("steps", [1, 20, 33])
def test_a_prefix(shell: Shell, steps: int) -> None:
    code, verdict = shell.reproduce("made", "--steps", str(steps))
    assert (code, verdict["level"]) == (0, "bit-exact")
    assert verdict["steps"] == {"compared": steps, "recorded": 60}
    assert checks_of(verdict)["train"] is True


def test_a_sweeps_job_and_an_archive(shell: Shell) -> None:
    done = shell(*ARGS, *MORE, "-m", "seed=3,4", "hydra.sweep.dir=sweep")
    assert done.returncode == 0, done.stderr
    archive = shell.cwd / "job.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted((shell.cwd / "sweep" / "1").rglob("*")):
            if path.is_file():
                file.write(path, path.relative_to(shell.cwd))
    for run in ("sweep/0", str(archive)):
        code, verdict = shell.reproduce(run)
        assert (code, verdict["level"]) == (0, "bit-exact"), run
    assert verdict["run"]["experiment"] == "dropout"


def test_what_wandb_kept(shell: Shell, tmp_path: Path) -> None:
    """The ledger artifact is a whole record."""
    args = (*ARGS, *MORE, "sinks=default", "sinks.terminal.mode=disabled")
    done = shell(*args, "hydra.run.dir=mirrored", WANDB_MODE="offline")
    assert (done.returncode, done.stderr) == (0, "")
    data = shell.cwd / "mirrored" / "wandb" / "data"
    staged = [path for path in data.rglob("*") if path.is_file()]
    sizes = {p.stat().st_size: p for p in staged}
    names = ("run.json", "config.yaml", "metrics.jsonl", "states.jsonl")
    for name in (*names, "keys/ledger.json"):
        original = shell.cwd / "mirrored" / name
        target = tmp_path / "artifact" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(sizes[original.stat().st_size], target)
        assert target.read_bytes() == original.read_bytes(), name
    code, verdict = shell.reproduce(str(tmp_path / "artifact"))
    assert (code, verdict["level"]) == (0, "bit-exact")


@pytest.mark.parametrize(
    "name",
    [
        *("run.json", "config.yaml", "keys/ledger.json", "metrics.jsonl"),
        *("states.jsonl", "checkpoints/60.json", "checkpoints/60/default/_METADATA"),
    ],
)
def test_an_altered_file_is_named(shell: Shell, copy: Path, name: str) -> None:
    content = (copy / name).read_bytes()
    assert b"0" in content
    at = content.rindex(b"0")
    (copy / name).write_bytes(content[:at] + b"1" + content[at + 1 :])
    code, verdict = shell.reproduce(str(copy))
    assert (code, verdict["level"]) == (1, "different")
    assert f"{name} is not the file that was recorded" in verdict["reason"]
    assert verdict["directory"] is None


def test_other_rows_are_refused(shell: Shell, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    arrays = {
        "x_train": draw.normal(size=(64, 4)).astype(np.float32),
        "y_train": draw.integers(0, 3, 64),
        "x_test": draw.normal(size=(16, 4)).astype(np.float32),
        "y_test": draw.integers(0, 3, 16),
    }
    path, moved = tmp_path / "data.npz", tmp_path / "moved.npz"
    np.savez(path, **arrays)
    own = ("data=arrays", f"data.path={path}", "data.batch_size=16")
    small = ("train.steps=6", "model.num_outputs=3")
    done = shell(*ARGS, *MORE, *own, *small, "hydra.run.dir=rows")
    assert done.returncode == 0, done.stderr
    path.rename(moved)
    arrays["x_train"][0, 0] += 1
    np.savez(path, **arrays)
    done = shell("reproduce", "rows")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: data.path: the rows are not those of the rec")
    assert done.stderr.count("\n") == 1
    code, verdict = shell.reproduce("rows", "--set", f"data.path={moved}")
    assert (code, verdict["level"]) == (0, "bit-exact")


def test_what_may_not_be_set(shell: Shell) -> None:
    before = sorted(os.listdir(shell.cwd))
    done = shell("reproduce", "made", "--set", "seed=1", "--set", "train.steps=9")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: seed, train.steps: would make it another run")
    assert done.stderr.count("\n") == 1
    assert sorted(os.listdir(shell.cwd)) == before


def test_a_run_that_is_being_written_is_refused(shell: Shell, copy: Path) -> None:
    lock = os.open(copy, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    done = shell("reproduce", str(copy))
    os.close(lock)
    assert (done.returncode, done.stdout) == (2, "")
    assert "another process is writing it. Wait for it" in done.stderr


def test_changed_code_is_found(shell: Shell, tmp_path: Path) -> None:
    """Another dropout means other keys; another scale shows at the first step."""
    package = tmp_path / "mylab"
    package.mkdir()
    model = """
import flax.linen as nn


class Model(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic):
        x = nn.relu(nn.Dense(32)(x.reshape(len(x), -1)))
        x = nn.Dropout(0.5, deterministic=deterministic)(x) * {scale}
        {more}
        return nn.Dense(10)(x)
"""

    def write(scale: float = 1.0, more: str = "pass") -> None:
        (package / "__init__.py").write_text(model.format(scale=scale, more=more))

    path = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{shell.env['PYTHONPATH']}"}
    write()
    own = ("~model", "+model._target_=mylab.Model", "trusted=[mylab]")
    done = shell(*ARGS, *own, "hydra.run.dir=own", PYTHONDONTWRITEBYTECODE="1", **path)
    assert done.returncode == 0, done.stderr
    done = shell("reproduce", "own", **path)
    assert done.returncode == 2
    assert "mylab" in done.stderr
    assert "--trust" in done.stderr
    code, verdict = shell.reproduce("own", "--trust", "mylab", **path)
    assert (code, verdict["level"]) == (0, "bit-exact")
    write(more="x = nn.Dropout(0.1, deterministic=deterministic)(x)")
    code, verdict = shell.reproduce("own", "--trust", "mylab", **path)
    assert (code, verdict["level"]) == (1, "different")
    assert "Dropout_1" in verdict["reason"]
    write(scale=1.5)
    code, verdict = shell.reproduce("own", "--trust", "mylab", **path)
    assert (code, verdict["level"]) == (1, "key-exact")
    assert verdict["first"]["step"] == 0
    assert verdict["steps"]["compared"] < 60  # it stops at the first real difference
    assert "nothing that was recorded says why" in verdict["reason"]


def test_a_probe(shell: Shell) -> None:
    done = shell("+experiment=dropout_tutorial", "sinks=none", "hydra.run.dir=probe")
    assert done.returncode == 0, done.stderr
    code, verdict = shell.reproduce("probe")
    assert (code, verdict["level"]) == (0, "bit-exact")
    assert checks_of(verdict)["outputs"] is True


# --- the comparison by itself


def test_bits_are_compared_not_decimals(shell: Shell) -> None:
    from runner.records.events import EvalRecord, StateRecord, TrainRecord

    record = read_record(str(shell.cwd / "made"))
    rows = [r for r in record.metrics if r["phase"] == "train"][:5]
    loss = np.array([row["loss"] for row in rows], np.float32)
    replay = Replay(record, goes_on=False)
    names = [n for n in rows[0] if n not in ("phase", "step")]
    same = {n: np.array([r[n] for r in rows], np.float32) for n in names}
    replay.take(TrainRecord(0, same))
    assert (replay.stop(), replay.first) == ("", None)
    next_ = np.nextafter(loss[3], np.float32(9))
    changed = {**same, "loss": np.array([*loss[:3], next_, loss[4]], np.float32)}
    replay.take(TrainRecord(0, changed))
    assert replay.first is not None
    assert (replay.first.step, replay.first.metric) == (3, "loss")
    assert replay.stop() == "differs from the run that it reproduces"
    tolerant = Replay(record, goes_on=True)
    tolerant.take(TrainRecord(0, changed))
    assert tolerant.stop() == ""
    state = record.states[0]
    other = StateRecord(state["step"], state["batches"][::-1], state["state"])
    tolerant.take(other)
    assert tolerant.reads_others
    assert tolerant.stop()
    negative = Replay(record, goes_on=False)
    evaluated = next(r for r in record.metrics if r["phase"] == "eval")
    values = {k: v for k, v in evaluated.items() if k not in ("phase", "step")}
    negative.take(EvalRecord(evaluated["step"], values))
    assert not negative.has_other_bits
    negative.take(EvalRecord(evaluated["step"], {**values, "loss": float("nan")}))
    assert negative.has_other_bits


def test_zero_and_minus_zero_differ(shell: Shell) -> None:
    from runner.replay.compare import _same_bits

    assert not _same_bits(0.0, -0.0)
    assert _same_bits(-0.0, -0.0)
    assert _same_bits(None, None)
    assert not _same_bits(None, 0.0)


def test_environments(shell: Shell) -> None:
    manifest = dict(read_record(str(shell.cwd / "made")).manifest)
    assert compare_environments(manifest, manifest) == ()
    versions = {**manifest["versions"], "jax": "0.0.1", "python": "2.7"}
    platform = {**manifest["platform"], "vector": "sse", "cpu_count": 1000}
    rng = {**manifest["rng"], "canary": {}}
    here = {**manifest, "versions": versions, "platform": platform, "rng": rng}
    found = compare_environments(manifest, here)
    assert [(each.path, each.cause) for each in found] == [
        ("rng.canary", Cause.GENERATOR),
        ("platform.vector", Cause.PLATFORM),
        ("versions.jax", Cause.VERSION),
        ("platform.cpu_count", Cause.NONE),
        ("versions.python", Cause.NONE),
    ]
    assert [each.rounds for each in found] == [False, True, True, False, False]
