# SPDX-License-Identifier: Apache-2.0
"""`strategy: jit`: arrays that lie as declared; for its draws `test_mesh_draws.py`."""

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest
from conftest import Run

from runner.cli import main
from runner.compile import compile_run
from runner.hazards.find import find_hazards
from runner.loop import Outcome, train
from runner.program import Program
from runner.recording import record_run
from runner.records.secrets import Secrets
from runner.shardings import list_shardings
from runner.spec import Impl, RunSpec

Make = Callable[..., RunSpec]
OnDevices = Callable[..., Program]

QUIET = ("sinks=none", "train.compile_cache=null", "eval.every=null")

pytestmark = pytest.mark.promotes


@pytest.fixture
def on_devices(make_spec: Make, monkeypatch: pytest.MonkeyPatch) -> OnDevices:
    """A program over the first so many devices; over none, without a mesh."""

    def compile_on(number: int, *overrides: str) -> Program:
        mesh = ("mesh=data8", f"mesh.axes.data={number}") if number else ()
        found = jax.devices()
        with monkeypatch.context() as patch:
            patch.setattr(jax, "devices", lambda: found[: number or None])
            program = compile_run(make_spec(*overrides, *mesh, *QUIET))
        assert isinstance(program, Program)
        assert program.layout.devices == (number or 1)
        return program

    return compile_on


def last_state(program: Program) -> Any:
    """The state after the last step."""
    *_, outcome = train(program)
    assert isinstance(outcome, Outcome)
    assert outcome.status == "completed"
    return outcome.state


@pytest.mark.xdist_group("mesh")
def test_the_keys_of_the_ledger_are_those_drawn_from(
    on_devices: OnDevices, tmp_path: Path
) -> None:
    overrides = (*("+experiment=dropout", "model.features=[32]"), "train.steps=3")
    program = on_devices(8, *overrides, "rng.observe=true")
    record_run(program, directory=tmp_path, secrets=Secrets({}, ()), hazards=())
    observed = json.loads((tmp_path / "run.json").read_text())["observed"]
    assert observed["status"] == "equal"
    assert observed["phases"]["train"] == {"draws": 1, "keys": 3}


@pytest.mark.xdist_group("mesh")
@pytest.mark.parametrize("mesh", ["data8", "fsdp8", "data4_model2"])
def test_arrays_lie_as_the_plan_says(mesh: str, make_spec: Make) -> None:
    """After steps, and with the bytes that a device really holds."""
    spec = make_spec(
        *(f"+experiment=mesh/{mesh}", "model.features=[32,16]", "train.steps=2"),
        *("model.num_outputs=16", *QUIET),
    )
    program = compile_run(spec)
    assert isinstance(program, Program)
    state = last_state(program)
    planned = {row["path"]: row for row in list_shardings(program)}
    trees = {k: getattr(state, k) for k in ("params", "collections", "opt_state")}
    for path, leaf in jax.tree_util.tree_leaves_with_path(trees):
        row = planned.pop(jax.tree_util.keystr(path, simple=True, separator="/"))
        assert leaf.shape == tuple(row["shape"])
        for shard in leaf.addressable_shards:
            assert shard.data.shape == tuple(row["shard"])
            assert shard.data.nbytes == row["bytes"]
    assert list(planned) == ["batch/x", "activations/MLP/0", "activations/MLP/1"]
    spec_of = {
        "data8": [None, None],
        "fsdp8": ["data", None],
        "data4_model2": [None, "model"],
    }
    kernels = [r for r in list_shardings(program) if r["path"].endswith("kernel")]
    assert len(kernels) == 9  # parameters, and Adam's two moments of each
    assert all(row["spec"] == spec_of[mesh] for row in kernels)


def test_plan_shows_the_mesh(runner: Run) -> None:
    args = ("plan", "+experiment=mesh/fsdp8", "mesh.host_devices=8")
    document = json.loads(runner(*args, "--json").stdout)
    assert document["mesh"] == {"data": 8}
    rows = {row["path"]: row for row in document["shardings"]}
    assert rows["batch/x"]["shard"] == [16, 8, 8]
    assert rows["params/Dense_0/kernel"] == {
        "path": "params/Dense_0/kernel",
        "names": ["embed", "mlp"],
        "shape": [64, 512],
        "dtype": "float32",
        "spec": ["data", None],
        "shard": [8, 512],
        "bytes": 8 * 512 * 4,
    }
    kinds = {row["kind"]: row for row in document["collectives"]}
    assert "all-gather" in kinds
    assert all(row["count"] > 0 and row["bytes"] > 0 for row in kinds.values())
    assert any(
        "on the same mesh (8 data)" in r for r in document["guarantee"]["reasons"]
    )
    text = runner(*args).stdout
    assert "mesh: 8 data\n" in text
    assert "\nactivations/MLP/0 and 1 more\n┌────────┐\n│ CPU 0  │\n" in text
    assert "\nparams/Dense_0/kernel and 2 more\n┌────────┐\n│ CPU 0  │\n" in text


@pytest.mark.xdist_group("mesh_runs")
def test_resume_and_reproduce_give_the_same_bits(runner: Run, tmp_path: Path) -> None:
    args = (
        *("+experiment=mesh/data8", "mesh.host_devices=8", "model.features=[32]"),
        *("sinks=none", "eval.every=10", "checkpoint.digest_every=5"),
    )
    for name, steps in (("whole", 20), ("part", 10)):
        where = f"hydra.run.dir={tmp_path / name}"
        done = runner(*args, f"train.steps={steps}", where)
        assert done.returncode == 0, done.stderr
    done = runner("resume", "part", "train.steps=20")
    assert done.returncode == 0, done.stderr
    for name in ("metrics.jsonl", "states.jsonl"):
        whole, part = (tmp_path / run / name for run in ("whole", "part"))
        assert whole.read_bytes() == part.read_bytes()
    ends = [
        json.loads((tmp_path / n / "run.json").read_text()) for n in ("whole", "part")
    ]
    assert ends[0]["digests"]["params"] == ends[1]["digests"]["params"]
    again = runner("reproduce", "whole")
    assert again.returncode == 0, again.stderr
    assert "verdict: bit-exact (promised bit-exact: kept)" in again.stdout
    other = runner("reproduce", "whole", "--set", "mesh.axes.data=4")
    assert other.returncode == 2
    assert "mesh.axes.data: would make it another run" in other.stderr


DATA8 = "mesh=data8"
BAD = [
    (
        (DATA8, "mesh.axes.data=4"),
        "mesh.axes: the product must equal the device count, 8 (got 4). "
        "Set mesh.axes.data=8 or mesh.host_devices=4.",
    ),
    (
        ("mesh=data4_model2", "mesh.axes.model=3", "mesh.rules={mlp: null}"),
        "mesh.axes: the product must equal the device count, 8 (got 12). "
        "Set mesh.host_devices=12.",
    ),
    (
        (DATA8, "data.batch_size=100"),
        "data.batch_size: must divide into 8 parts over the mesh (got 100). "
        "Set data.batch_size=104.",
    ),
    (
        (DATA8, "data.batch_size=120", "train.accumulation_steps=2"),
        "data.batch_size: must divide into 8 parts over the mesh for each microbatch "
        "(got 120). Set data.batch_size=128.",
    ),
    (
        (DATA8, "+mesh.rules.mlps=data"),
        "mesh.rules.mlps: no array has this logical axis (got 'mlps'). "
        "Logical axes: batch, mlp. Did you mean 'mlp'?",
    ),
    (
        (DATA8, "mesh.rules.batch=dat"),
        "mesh.rules.batch: not an axis of the mesh (got 'dat'). Axes: data. "
        "Did you mean 'data'?",
    ),
    (
        ("+mesh.axes.data=8",),
        "mesh.axes: needs a strategy (got {'data': 8}). "
        "Set mesh.strategy=jit, or mesh.axes={}.",
    ),
    (
        ("mesh.strategy=jit",),
        "mesh.axes: must name at least one axis (got {}). Set +mesh.axes.data=8.",
    ),
    (
        (DATA8, "mesh.host_devices=4"),
        "mesh.host_devices: JAX has started with other devices (got 4). "
        "Start again with JAX_NUM_CPU_DEVICES=4.",
    ),
    (
        ("mesh.axes={data: 8}",),
        "mesh.axes: a value is added to, not replaced, and has no such key "
        "(got '{data: 8}'). Replace it: '~mesh.axes' '+mesh.axes={data: 8}'.",
    ),
]


@pytest.mark.parametrize(("overrides", "line"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_is_one_line(
    overrides: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as raised:
            main(["plan", "+experiment=dropout", "--no-compile", *overrides])
    finally:
        signal.signal(signal.SIGINT, before)
    shown = capsys.readouterr()
    assert shown.err == f"error: {line}\n"
    assert shown.out == ""
    assert raised.value.code == 2


def test_a_generator_of_the_backend_depends_on_the_layout(
    on_devices: OnDevices,
) -> None:
    program = on_devices(8, "+experiment=dropout", "rng.impl=rbg")
    found = [hazard for hazard in find_hazards(program) if hazard.code == "R011"]
    assert found
    assert {(str(h.severity), h.path) for h in found} == {("error", "rng.impl")}
    rng = replace(program.spec.rng, impl=Impl.THREEFRY2X32)
    other = compile_run(replace(program.spec, rng=rng))
    assert "R011" not in {hazard.code for hazard in find_hazards(other)}
