# SPDX-License-Identifier: Apache-2.0
"""Every model that ships, on 1, 2, 4 and 8 devices: its keys, its masks, its losses.

Masks are told to the host by the running program; what they must be is drawn by
`jax.random` alone, from the keys that the ledger lists.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import test_exact

from runner.compile import compile_run
from runner.errors import ConfigError
from runner.guarantee import was_seen_exact
from runner.ledger import expand, make_ledger
from runner.loop import Outcome, train
from runner.program import Program
from runner.records.events import TrainRecord
from runner.spec import RunSpec

Make = Callable[..., RunSpec]
OnDevices = Callable[..., Program]
Masks = dict[tuple[int, ...], set[bytes]]

ROOT = Path(__file__).parents[1]
COUNTS = (1, 2, 4, 8)
STEPS = 4
BERNOULLI = jax.random.bernoulli
PER = "rng.streams.dropout.per=[step,data,microbatch]"
QUIET = ("sinks=none", "train.compile_cache=null", "eval.every=null")
# Each model in the recipe that ships it, made small; how often it drops in a step.
SMALL = {
    "mlp": ("+experiment=dropout", "model.features=[32,16]", "data.batch_size=64"),
    "deep": (
        *("+experiment=deep", "model.features=16", "model.depth=3"),
        "data.batch_size=64",
    ),
    "cnn": (
        *("+experiment=cnn", "model.channels=[4,4]", "model.features=[16]"),
        "data.batch_size=16",
    ),
    "batch_norm": ("+experiment=batch_norm", "data.batch_size=64"),
}
DROPS = {"mlp": 2, "deep": 3, "cnn": 1, "batch_norm": 1}
HANDS_ON = ("batch_norm",)  # what `exact` refuses
# Greatest difference, relative to the loss, of one device and several: sums of
# float32 in another order. docs/mesh.md has it, too.
ROUNDING = 1e-6

pytestmark = [pytest.mark.promotes, pytest.mark.xdist_group("mesh_draws")]


class Told:
    """The masks that a running program drew, by the place on the mesh of the device."""

    def __init__(self) -> None:
        self.masks: Masks = {}
        self.axes: tuple[str, ...] = ()

    def take(self, mask: Any, *place: Any) -> None:
        where = tuple(int(i) for i in place)
        self.masks.setdefault(where, set()).add(np.asarray(mask).tobytes())


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    """Listens to each mask; `axes` are those that devices have programs along."""
    told = Told()

    def telling(*args: Any, **kwargs: Any) -> Any:
        mask = BERNOULLI(*args, **kwargs)
        place = [jax.lax.axis_index(name) for name in told.axes]
        jax.debug.callback(told.take, mask, *place)
        return mask

    monkeypatch.setattr(jax.random, "bernoulli", telling)
    return told


@pytest.fixture
def on_devices(make_spec: Make, monkeypatch: pytest.MonkeyPatch) -> OnDevices:
    """A program over the first so many devices; over none, without a mesh."""

    def compile_on(number: int, *overrides: str) -> Program:
        found = jax.devices()
        with monkeypatch.context() as patch:
            patch.setattr(jax, "devices", lambda: found[: number or None])
            spec = make_spec(*overrides, f"train.steps={STEPS}", *QUIET)
            program = compile_run(spec)
        assert isinstance(program, Program)
        assert program.layout.devices == (number or 1)
        return program

    return compile_on


def losses_of(program: Program) -> np.ndarray:
    """Losses of all steps."""
    events = list(train(program))
    assert isinstance(events[-1], Outcome)
    assert events[-1].status == "completed"
    jax.effects_barrier()
    records = [event for event in events if isinstance(event, TrainRecord)]
    return np.concatenate([record.metrics["loss"] for record in records])


def entries_of(program: Program) -> Iterator[dict[str, Any]]:
    """What the ledger lists of each mask."""
    ledger = make_ledger(program)
    for draw in ledger["draws"]:
        for step in range(STEPS) if draw["phase"] == "train" else ():
            yield from expand(ledger, draw, step=step)


def replay(derivation: list[dict[str, Any]]) -> Any:
    """The key of a derivation, by `jax.random` alone."""
    key: Any = None
    for op in derivation:
        if op["op"] == "seed":
            key = jax.random.key(op["value"])
        elif op["op"] == "fold_in":
            key = jax.random.fold_in(key, op["value"])
        else:
            key = jax.random.split(key, op["of"])[op["index"]]
    return key


def masks_of(program: Program, *axes: str) -> Masks:
    """What the masks must be, by place: drawn from the ledger, by `jax.random`."""
    rate: Any = program.spec.model["dropout_rate"]
    found: Masks = {}
    for entry in entries_of(program):
        key = replay(entry["derivation"])
        assert jax.random.key_data(key).tolist() == entry["key"]
        (use,) = entry["uses"]
        mask = BERNOULLI(key, 1 - rate, tuple(use["shape"]))
        at = tuple(entry["index"][name] for name in axes)
        found.setdefault(at, set()).add(np.asarray(mask).tobytes())
    return found


def test_every_model_that_ships_is_here() -> None:
    assert set(SMALL) == {path.stem for path in (ROOT / "conf/model").glob("*.yaml")}


@pytest.mark.parametrize("model", SMALL)
def test_jit_draws_as_one_device(model: str, on_devices: OnDevices, told: Told) -> None:
    """Keys and masks are those of the whole batch; losses are but for rounding."""
    alone = on_devices(0, *SMALL[model])
    ledger, expected = make_ledger(alone), masks_of(alone)
    assert len(expected[()]) == STEPS * DROPS[model]
    losses = losses_of(alone)
    assert told.masks == expected
    for number in COUNTS:
        mesh = ("mesh=data8", f"mesh.axes.data={number}")
        program = on_devices(number, *SMALL[model], *mesh)
        assert make_ledger(program) == ledger
        if number > 1:
            told.masks.clear()
            np.testing.assert_allclose(
                losses_of(program), losses, rtol=ROUNDING, atol=0
            )
            assert told.masks == expected


@pytest.mark.parametrize("mesh", ["data4_model2", "fsdp8"])
def test_jit_draws_alike_however_arrays_are_cut(
    mesh: str, on_devices: OnDevices, told: Told
) -> None:
    """Also where a mask is cut along its width, or parameters along their inputs."""
    expected = masks_of(on_devices(0, *SMALL["mlp"]))
    losses_of(on_devices(8, f"+experiment=mesh/{mesh}", *SMALL["mlp"][1:]))
    assert told.masks == expected


@pytest.mark.parametrize("model", SMALL)
def test_shard_map_draws_as_per_says(
    model: str, on_devices: OnDevices, told: Told
) -> None:
    """Each device draws for its own rows, from a key that is folded with its number."""
    told.axes = ("data",)
    for number in COUNTS:
        mesh = ("mesh=shard_map8", f"mesh.axes.data={number}", PER)
        program = on_devices(number, *SMALL[model], *mesh)
        expected = masks_of(program, "data")
        assert set(expected) == {(i,) for i in range(number)}
        for entry in entries_of(program):
            _, stream, *folds = entry["derivation"][:4]
            assert stream["why"] == "stream dropout"
            at = [("step", entry["step"]), ("data", entry["index"]["data"])]
            assert [(op["why"], op["value"]) for op in folds] == at
        if number == 8:
            told.masks.clear()
            losses_of(program)
            assert told.masks == expected


def test_shard_map_shares_along_axes_that_per_leaves_out(
    on_devices: OnDevices, told: Told
) -> None:
    told.axes = ("data", "model")
    mesh = ("mesh=shard_map8", "mesh.axes.data=4", "+mesh.axes.model=2", PER)
    program = on_devices(8, *SMALL["mlp"], *mesh)
    losses_of(program)
    expected = masks_of(program, "data")
    assert told.masks == {(*i, j): m for i, m in expected.items() for j in range(2)}
    assert not set.intersection(*expected.values())


@pytest.mark.parametrize("model", SMALL)
def test_exact_promises_what_was_compared(model: str, on_devices: OnDevices) -> None:
    """Its bits are compared in `tests/test_exact.py`; here, none is left out there."""
    mesh = ("mesh=exact8", "train.accumulation_steps=8")
    if model in HANDS_ON:
        with pytest.raises(ConfigError, match=r"hands .+ on from one to the next"):
            on_devices(8, *SMALL[model], *mesh)
        return
    program = on_devices(8, *SMALL[model], *mesh)
    assert was_seen_exact(program.spec)
    assert SMALL[model][0].removeprefix("+experiment=") in test_exact.SMALL
