# SPDX-License-Identifier: Apache-2.0
"""A run in this process, with every sink off but the run directory."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from runner.compile import compile_run
from runner.loop import train
from runner.recording import Recorded, record_run
from runner.records.digests import digest_leaves
from runner.records.metrics import read_metrics
from runner.records.secrets import Secrets

STEPS = 9
SMALL = (
    *("task=regression", "model.num_outputs=1", "model.features=[16]", "sinks=none"),
    *("data=arrays", "data.batch_size=8", "data.shuffle=null", "eval.every=4"),
    *(f"train.steps={STEPS}", "train.steps_per_call=3"),
)

pytestmark = pytest.mark.promotes


def write(path: Path, change: Callable[[dict[str, np.ndarray]], None]) -> str:
    draw = np.random.default_rng(0)
    arrays = {
        f"{kind}_{part}": draw.normal(size=(n, 3)[: 2 if kind == "x" else 1]).astype(
            "f4"
        )
        for part, n in (("train", 80), ("test", 20))
        for kind in ("x", "y")
    }
    change(arrays)
    np.savez(path, **arrays)
    return f"data.path={path}"


@pytest.fixture(scope="module")
def program(make_spec: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("data") / "good.npz"
    return compile_run(make_spec(*SMALL, write(path, lambda arrays: None)))


@pytest.fixture(scope="module")
def failing(make_spec: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Its loss is infinite at step 6."""

    def spoil(arrays: dict[str, np.ndarray]) -> None:
        arrays["y_train"][6 * 8] = 3e38

    path = tmp_path_factory.mktemp("data") / "bad.npz"
    return compile_run(make_spec(*SMALL, write(path, spoil)))


def with_checkpoints(program: Any, every: int, keep: int = 9) -> Any:
    """The same compiled program; checkpoints are no part of it."""
    checkpoint = replace(program.spec.checkpoint, every=every, keep=keep)
    made = replace(program, spec=replace(program.spec, checkpoint=checkpoint))
    vars(made)["calls"] = program.calls
    return made


@pytest.fixture(autouse=True)
def closed_logs() -> Iterator[None]:
    """A run that breaks leaves its log open; it must not break other tests."""
    before = list(logging.getLogger().handlers)
    yield
    for handler in set(logging.getLogger().handlers) - set(before):
        logging.getLogger().removeHandler(handler)
        handler.close()


Record = Callable[..., tuple[Recorded, Path]]


@pytest.fixture
def record(tmp_path: Path) -> Record:
    def record(program: Any, name: str = "run", **options: Any) -> Any:
        (tmp_path / name).mkdir()
        directory = tmp_path / name
        secrets = Secrets({}, ())
        found = record_run(program, directory=directory, secrets=secrets, **options)
        return found, directory

    return record


def manifest(directory: Path) -> dict[str, Any]:
    def refuse(word: str) -> None:
        raise ValueError(word)

    return json.loads((directory / "run.json").read_text(), parse_constant=refuse)


def restore(directory: Path, step: int | None = None) -> tuple[int, dict[str, Any]]:
    with ocp.CheckpointManager((directory / "checkpoints").resolve()) as manager:
        step = manager.latest_step() if step is None else step
        state = manager.restore(step, args=ocp.args.StandardRestore())
    return step, jax.device_get(state)


def digest(tree: Any) -> str:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return digest_leaves(
        {
            jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
            for path, leaf in leaves
        }
    )


def test_two_runs(program: Any, record: Record) -> None:
    recorded, one = record(program, "one")
    again, two = record(program, "two")
    first, second = manifest(one), manifest(two)
    assert (recorded.status, recorded.reason) == ("completed", "")
    assert recorded == again
    assert recorded.objective == first["metrics"]["eval/loss"]
    assert first["digests"] == second["digests"]
    assert all(len(value) == 64 for value in first["digests"].values())
    assert first["run_id"] != second["run_id"]

    assert first["status"] == "completed"
    assert first["steps"] == STEPS
    assert first["guarantee"]["level"] == "bit-exact"
    assert first["guarantee"]["reasons"]
    assert first["construct"] == "loop"
    assert first["inputs"] == dict(program.hypers)
    assert first["constants"] == []
    assert first["seed"] == 0
    assert set(first["metrics"]) >= {"train/loss", "eval/loss", "eval/mae"}
    assert first["started"] <= first["ended"]

    rows = read_metrics(one / "metrics.jsonl")
    trained = [row["step"] for row in rows if row["phase"] == "train"]
    evaluated = {row["step"]: row["loss"] for row in rows if row["phase"] == "eval"}
    assert trained == list(range(STEPS))
    assert list(evaluated) == [4, 8, 9]
    best = min(evaluated, key=lambda step: evaluated[step])
    assert first["best"] == {"value": evaluated[best], "step": best}
    text = (one / "metrics.jsonl").read_bytes()
    assert first["digests"]["metrics"] == hashlib.sha256(text).hexdigest()
    assert json.loads((one / "keys" / "ledger.json").read_text())["streams"]
    assert (one / "config.yaml").exists()

    step, state = restore(one)
    assert step == STEPS == int(state["step"])
    assert digest(state["params"]) == first["digests"]["params"]
    *_, outcome = train(program)
    assert digest(outcome.state.params) == first["digests"]["params"]


def test_checkpoints_restore_to_their_steps(program: Any, record: Record) -> None:
    often = with_checkpoints(program, every=3)
    _, directory = record(often)
    for want in (3, 6, 9):
        step, state = restore(directory, want)
        assert int(state["step"]) == step == want
    *_, outcome = train(program)
    assert digest(restore(directory, 9)[1]["params"]) == digest(outcome.state.params)
    early = digest(restore(directory, 3)[1]["params"])
    assert early != digest(restore(directory, 6)[1]["params"])


def test_only_the_newest_checkpoints_stay(program: Any, record: Record) -> None:
    _, directory = record(with_checkpoints(program, every=2, keep=2))
    kept = sorted(
        p.name for p in (directory / "checkpoints").iterdir() if p.name.isdigit()
    )
    assert kept == ["8", "9"]


def test_failed_run_keeps_its_last_good_state(failing: Any, record: Record) -> None:
    recorded, directory = record(failing)
    found = manifest(directory)
    assert recorded.status == found["status"] == "failed"
    assert found["reason"] == "loss or update not finite at step 6"
    assert found["steps"] == 6
    assert found["metrics"]["train/loss"] is None
    assert read_metrics(directory / "metrics.jsonl")[-1]["loss"] is None
    step, state = restore(directory)
    assert step == int(state["step"]) == 6
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state["params"]))
    assert digest(state["params"]) == found["digests"]["params"]


@pytest.mark.parametrize("every", [2, 3, 4, 6])
def test_failed_run_with_checkpoints(every: int, failing: Any, record: Record) -> None:
    """The newest checkpoint is the last good state, under its own step."""
    recorded, directory = record(with_checkpoints(failing, every))
    assert recorded.status == "failed"
    step, state = restore(directory)
    assert step == int(state["step"]) == 6
    assert digest(state["params"]) == manifest(directory)["digests"]["params"]


@pytest.mark.parametrize("moment", [0, 1, 2, 3])
def test_interrupted_run_with_checkpoints(
    moment: int, program: Any, record: Record
) -> None:
    """Also where the user stops a run at a step that was just saved."""
    asked = iter(range(100))
    recorded, directory = record(
        with_checkpoints(program, 3), stop=lambda: next(asked) == moment
    )
    found = manifest(directory)
    assert recorded.status == found["status"] == "interrupted"
    step, state = restore(directory)
    assert step == int(state["step"]) == found["steps"]
    assert digest(state["params"]) == found["digests"]["params"]
    rows = read_metrics(directory / "metrics.jsonl")
    assert sum(row["phase"] == "train" for row in rows) == found["steps"]


def test_infinite_evaluation_is_recorded(
    make_spec: Any, tmp_path: Path, record: Record
) -> None:
    """A test row that the model can't reach: strict JSON knows no infinity."""

    def spoil(arrays: dict[str, np.ndarray]) -> None:
        arrays["y_test"][0] = 3e38

    program = compile_run(make_spec(*SMALL, write(tmp_path / "far.npz", spoil)))
    recorded, directory = record(program)
    found = manifest(directory)
    assert recorded.status == found["status"] == "completed"
    assert found["metrics"]["eval/loss"] is None


def test_error_of_ours_closes_the_record(
    program: Any, record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr("runner.recording.Checkpoints.save", broken)
    with pytest.raises(RuntimeError, match="out of luck"):
        record(program)
    found = manifest(tmp_path / "run")
    assert found["status"] == "failed"
    assert "out of luck" in found["reason"]
