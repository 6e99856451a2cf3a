# SPDX-License-Identifier: Apache-2.0
"""`strategy: exact`: the same bits on any number of devices.

Eight devices are forced here, and with them the size of XLA's pool for all counts.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from conftest import Run

from models import Dropout
from runner import determinism
from runner.cli import main
from runner.compile import compile_run
from runner.guarantee import Level, guarantee_of
from runner.ledger import make_ledger
from runner.loop import Outcome, train
from runner.program import Program
from runner.records.events import EvalRecord, TrainRecord
from runner.spec import RunSpec

Make = Callable[..., RunSpec]
OnDevices = Callable[..., Program]

PACKAGE = "lab_of_test_exact"
COUNTS = (1, 2, 4, 8)
EXACT = ("mesh=exact8", "train.accumulation_steps=8", "sinks=none")
SMALL = {
    "dropout": ("model.features=[64,32]", "data.batch_size=64", "train.steps=12"),
    "deep": ("model.features=16", "model.depth=3", "train.steps=6"),
    "cnn": ("model.channels=[4,4]", "data.batch_size=16", "train.steps=3"),
}

pytestmark = [pytest.mark.promotes, pytest.mark.xdist_group("exact")]

told: list[bytes] = []


class Telling(nn.Module):
    """A dense layer behind dropout, which tells its masks to the host."""

    @nn.compact
    def __call__(self, x: Any, *, deterministic: bool = False) -> Any:
        x = x.reshape(x.shape[0], -1)
        mask = Dropout(0.5)(x + 1, deterministic=deterministic) > 0
        if not deterministic:
            jax.debug.callback(lambda m: told.append(np.asarray(m).tobytes()), mask)
        return nn.Dense(10)(x * mask)


class Counting(nn.Module):
    """A dense layer that has a constant, and may count its calls."""

    counts: bool = False

    @nn.compact
    def __call__(self, x: Any, *, deterministic: bool = False) -> Any:
        calls = self.variable("calls", "number", lambda: np.float32(1))
        if self.counts and not deterministic:
            calls.value += 1
        return nn.Dense(10)(x.reshape(x.shape[0], -1)) * calls.value


@pytest.fixture(autouse=True, scope="module")
def lab() -> Iterator[None]:
    module: Any = ModuleType(PACKAGE)
    for member in (Telling, Counting):
        setattr(module, member.__name__, member)
        member.__module__ = PACKAGE
    sys.modules[PACKAGE] = module
    yield
    del sys.modules[PACKAGE]


def of_lab(name: str, **fields: Any) -> tuple[str, ...]:
    """Overrides for a model of this file's."""
    node = ", ".join(f"{k}: {v}" for k, v in fields.items())
    model = f"+model={{_target_: {PACKAGE}.{name}, {node}}}".replace(", }", "}")
    return "+experiment=dropout", f"trusted=[{PACKAGE}]", "~model", model


@pytest.fixture
def on_devices(make_spec: Make, monkeypatch: pytest.MonkeyPatch) -> OnDevices:
    """A program that is exact over the first so many devices."""

    def compile_on(number: int, *overrides: str) -> Program:
        found = jax.devices()
        spec = make_spec(*overrides, *EXACT, f"mesh.axes.data={number}")
        with monkeypatch.context() as patch:
            patch.setattr(jax, "devices", lambda: found[:number])
            program = compile_run(spec)
        assert isinstance(program, Program)
        assert program.layout.devices == number
        return program

    return compile_on


def bits_of(program: Program) -> dict[str, bytes]:
    """Every metric of every step and evaluation, and the last state, as bytes."""
    bits: dict[str, bytes] = {}
    for event in train(program):
        if isinstance(event, TrainRecord | EvalRecord):
            at = event.first_step if isinstance(event, TrainRecord) else event.step
            for name, values in event.metrics.items():
                kind = type(event).__name__
                bits[f"{kind}/{at}/{name}"] = np.asarray(values).tobytes()
        if isinstance(event, Outcome):
            assert event.status == "completed"
            state = jax.device_get(event.state._replace(carried={}))
            for path, leaf in jax.tree_util.tree_leaves_with_path(state):
                bits[jax.tree_util.keystr(path)] = leaf.tobytes()
    return bits


@pytest.mark.parametrize("experiment", SMALL)
def test_bits_do_not_depend_on_the_number_of_devices(
    experiment: str, on_devices: OnDevices
) -> None:
    per_call = "train.steps_per_call=3"  # records of the same steps, however quick
    overrides = (f"+experiment={experiment}", *SMALL[experiment], per_call)
    first, *others = (bits_of(on_devices(n, *overrides)) for n in COUNTS)
    assert any(name.startswith("EvalRecord") for name in first)
    assert any("opt_state" in name for name in first)
    for other in others:
        assert other == first


def test_bits_do_depend_on_it_under_jit(on_devices: OnDevices, make_spec: Make) -> None:
    """What the strategy is for: the test above would not hold without it."""
    overrides = ("+experiment=dropout", *SMALL["dropout"], "train.steps_per_call=3")
    jit = compile_run(make_spec(*overrides, "mesh=data8", "sinks=none"))
    alone = compile_run(make_spec(*overrides, "sinks=none"))
    assert isinstance(jit, Program)
    assert isinstance(alone, Program)
    assert bits_of(jit) != bits_of(alone)


def test_carried_keys_and_the_norms_of_gradients_go_along(
    on_devices: OnDevices,
) -> None:
    overrides = (
        *("+experiment=dropout", *SMALL["dropout"], "train.steps_per_call=3"),
        *("~rng.streams.dropout.per", "train.clip_norm=0.5", "train.max_norm=1.0"),
        "+rng.streams.dropout.per={step: carry, microbatch: fold_in}",
    )
    two, eight = (bits_of(on_devices(n, *overrides)) for n in (2, 8))
    assert two == eight


def test_ledger_is_that_of_accumulation_on_one_device(
    on_devices: OnDevices, make_spec: Make
) -> None:
    overrides = ("+experiment=dropout", *SMALL["dropout"])
    alone = make_spec(*overrides, "train.accumulation_steps=8", "sinks=none")
    ledger = make_ledger(compile_run(alone))
    assert ledger["sizes"]["microbatches"] == 8
    for number in COUNTS:
        assert make_ledger(on_devices(number, *overrides)) == ledger


def test_masks_are_those_of_accumulation_on_one_device(
    on_devices: OnDevices, make_spec: Make
) -> None:
    """Each microbatch has its own, wherever it is computed."""
    overrides = (*of_lab("Telling"), "train.steps=3", "eval.every=null")
    alone = make_spec(*overrides, "train.accumulation_steps=8", "sinks=none")
    masks = {}
    for number in (0, *COUNTS):
        told.clear()
        program = on_devices(number, *overrides) if number else compile_run(alone)
        assert isinstance(program, Program)
        bits_of(program)
        jax.effects_barrier()
        masks[number] = sorted(told)
    assert len(set(masks[0])) == len(masks[0]) == 3 * 8
    assert all(found == masks[0] for found in masks.values())


def test_losses_are_those_of_accumulation_but_for_rounding(
    on_devices: OnDevices, make_spec: Make
) -> None:
    overrides = ("+experiment=dropout", *SMALL["dropout"], "train.steps_per_call=12")
    alone = make_spec(*overrides, "train.accumulation_steps=8", "sinks=none")
    program = compile_run(alone)
    assert isinstance(program, Program)
    losses = [
        np.frombuffer(bits_of(each)["TrainRecord/0/loss"], np.float32)
        for each in (program, on_devices(4, *overrides))
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5, atol=0)


def test_a_constant_collection_stays(on_devices: OnDevices) -> None:
    overrides = (*of_lab("Counting"), "train.steps=3", "train.steps_per_call=3")
    two, eight = (bits_of(on_devices(n, *overrides)) for n in (2, 8))
    assert two == eight


def test_guarantee_names_what_was_seen(on_devices: OnDevices) -> None:
    """A model that was never compared is promised its own mesh alone."""
    known = guarantee_of(on_devices(2, "+experiment=dropout"))
    assert known.level is Level.BIT_EXACT
    assert any("on any number of devices" in reason for reason in known.reasons)
    for overrides in (
        of_lab("Telling"),
        ("+experiment=dropout", "train.compute_dtype=bfloat16"),
    ):
        other = guarantee_of(on_devices(2, *overrides))
        assert other.level is Level.BIT_EXACT
        assert any("on the same mesh (2 data)" in reason for reason in other.reasons)


def test_pool_does_not_grow_with_the_devices(
    make_spec: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is that of the microbatches before JAX starts; a user's own stands."""
    spec = make_spec("+experiment=dropout", *EXACT[:1], "train.accumulation_steps=128")
    monkeypatch.setattr(determinism, "has_backend", lambda: False)
    monkeypatch.setenv("NPROC", "3")
    determinism.settle_backend(spec)
    assert os.environ["NPROC"] == "3"
    monkeypatch.delenv("NPROC")
    determinism.settle_backend(spec)
    assert os.environ.pop("NPROC") == "128"


BAD = [
    (
        ("train.accumulation_steps=12",),
        "train.accumulation_steps: must be a multiple of the 8 devices under "
        "mesh.strategy=exact, which spreads microbatches over them (got 12). "
        "Set train.accumulation_steps=16.",
    ),
    (
        ("mesh.rules.batch=null",),
        "mesh.rules.batch: strategy exact must know which axis the microbatches are "
        "spread over (got None). Set mesh.rules.batch=data.",
    ),
    (
        ("+mesh.rules.mlp=data",),
        "mesh.rules.mlp: strategy exact cuts the batch alone (got 'data'). "
        "Remove it, or set mesh.strategy=jit.",
    ),
    (
        ("rng.observe=true",),
        "rng.observe: the keys of a program that is exact over meshes can't be "
        "observed (got True). Set mesh.strategy=jit, or rng.observe=false.",
    ),
    (
        ("model=batch_norm",),
        "mesh.strategy: exact spreads microbatches over devices, and this model hands "
        "batch_stats/layers_2/mean on from one to the next (got 'exact'). "
        "Set mesh.strategy=jit.",
    ),
    (
        (*of_lab("Counting", counts="true")[1:], "data.batch_size=48"),
        "mesh.strategy: exact spreads microbatches over devices, and this model hands "
        "calls/number on from one to the next (got 'exact'). Set mesh.strategy=jit.",
    ),
]


@pytest.mark.parametrize(("overrides", "line"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_is_one_line(
    overrides: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT)
    more = ["+experiment=dropout", "--no-compile", "data.batch_size=96", *EXACT]
    try:
        with pytest.raises(SystemExit) as raised:
            main(["plan", *more, *overrides])
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == f"error: {line}\n"
    assert raised.value.code == 2


SUBPROCESS = (
    *("+experiment=mesh/exact8", "model.features=[64]", "sinks=none"),
    *("eval.every=10", "checkpoint.digest_every=5"),
)


def read(path: Path, name: str = "run.json") -> Any:
    return json.loads((path / name).read_text())


@pytest.mark.xdist_group("exact_runs")
def test_run_on_8_resumed_on_2_reproduced_on_1(runner: Run, tmp_path: Path) -> None:
    """Processes of their own, each with its devices and without NPROC."""

    def start(name: str, devices: int, steps: int) -> Path:
        mesh = (f"mesh.axes.data={devices}", f"mesh.host_devices={devices}")
        where = tmp_path / name
        steps_ = f"train.steps={steps}"
        done = runner(*SUBPROCESS, *mesh, steps_, f"hydra.run.dir={where}")
        assert done.returncode == 0, done.stderr
        return where

    whole, part = start("whole", 1, 40), start("part", 8, 20)
    two = ("mesh.axes.data=2", "mesh.host_devices=2")
    done = runner("resume", "part", "train.steps=40", *two)
    assert done.returncode == 0, done.stderr
    for name in ("metrics.jsonl", "states.jsonl"):
        assert (whole / name).read_bytes() == (part / name).read_bytes()
    ends = [read(whole), read(part)]
    assert ends[0]["digests"]["params"] == ends[1]["digests"]["params"]
    assert [end["platform"]["device_count"] for end in ends] == [1, 2]
    pools = {end["platform"]["thread_pool"] for end in ends}
    assert len(pools) == 1
    assert ends[1]["guarantee"]["level"] == "bit-exact"
    assert not any("resumed" in reason for reason in ends[1]["guarantee"]["reasons"])

    one = ("--set", "mesh.axes={data: 1}", "--set", "mesh.host_devices=1")
    again = runner("reproduce", "part", *one, "--json")
    assert again.returncode == 0, again.stderr
    verdict = json.loads(again.stdout)
    assert verdict["level"] == "bit-exact"
    assert {check["equal"] for check in verdict["checks"]} == {True}
    compared = {check["what"] for check in verdict["checks"]}
    assert {"train", "eval", "states", "params"} <= compared
    (moved,) = [d for d in verdict["environment"] if d["path"].endswith("device_count")]
    assert (moved["recorded"], moved["here"]) == (2, 1)
