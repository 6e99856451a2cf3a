# SPDX-License-Identifier: Apache-2.0
"""`strategy: shard_map`: keys that differ where `per` says so, and sums over shards.

What stands by hand here is plain Flax, JAX and optax, none of the runner.
"""

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import Run
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from runner.compile import compile_run
from runner.errors import ConfigError
from runner.hazards.find import find_hazards
from runner.hazards.hazard import Hazard
from runner.ledger import expand, make_ledger
from runner.loop import Outcome, train
from runner.mesh import Layout
from runner.program import Program
from runner.recording import record_run
from runner.records.events import EvalRecord, TrainRecord
from runner.records.secrets import Secrets
from runner.shardings import list_collectives
from runner.spec import RunSpec, Strategy

Make = Callable[..., RunSpec]
OnDevices = Callable[..., Program]

PACKAGE = "lab_of_test_shard_map"
COUNTS = (1, 2, 4, 8)
STREAM = "rng.streams.dropout.per"
PATH = ("data", "step")
QUIET = ("sinks=none", "train.compile_cache=null", "eval.every=null")
SMALL = ("+experiment=dropout", "model.features=[32]", "data.batch_size=64")
DRY = ("model.dropout_rate=0", f"{STREAM}=[step,data,microbatch]")
# Greatest difference, relative to the loss, of one device and several: sums of
# float32 in another order. docs/mesh.md has it, too.
ROUNDING = 1e-6

pytestmark = [pytest.mark.promotes, pytest.mark.xdist_group("shard_map")]


class Own(nn.Module):
    """Dropout from a key into which it folds the shard's number by itself."""

    @nn.compact
    def __call__(self, x: Any, *, deterministic: bool = False) -> Any:
        x = nn.Dense(10)(x.reshape(x.shape[0], -1))
        if deterministic:
            return x
        at = jax.lax.axis_index("data")
        key = jax.random.fold_in(self.make_rng("dropout"), at)
        return x * jax.random.bernoulli(key, 0.5, x.shape)


class Counted(nn.Module):
    """A layer that counts its calls, and keeps the mean of its inputs."""

    @nn.compact
    def __call__(self, x: Any, *, deterministic: bool = False) -> Any:
        x = x.reshape(x.shape[0], -1)
        calls = self.variable("counts", "calls", lambda: jnp.int32(0))
        mean = self.variable("counts", "mean", lambda: jnp.float32(0))
        if not deterministic and not self.is_initializing():
            calls.value, mean.value = calls.value + 1, x.mean()
        return nn.Dense(10)(x)


@pytest.fixture(autouse=True, scope="module")
def lab() -> Iterator[None]:
    module: Any = ModuleType(PACKAGE)
    for found in (Own, Counted):
        setattr(module, found.__name__, found)
        found.__module__ = PACKAGE
    sys.modules[PACKAGE] = module
    yield
    del sys.modules[PACKAGE]


@pytest.fixture
def on_devices(make_spec: Make, monkeypatch: pytest.MonkeyPatch) -> OnDevices:
    """A program over the first so many devices, under `shard_map`."""

    def compile_on(number: int, *overrides: str) -> Program:
        mesh = ("mesh=shard_map8", f"mesh.axes.data={number}", "train.steps=4")
        found = jax.devices()
        with monkeypatch.context() as patch:
            patch.setattr(jax, "devices", lambda: found[:number])
            small = SMALL[::2] if "~model" in overrides else SMALL
            program = compile_run(make_spec(*small, *mesh, *QUIET, *overrides))
        assert isinstance(program, Program)
        return program

    return compile_on


def per(*names: str) -> str:
    return f"{STREAM}=[{','.join(names)}]"


def rules(**rules: str) -> tuple[str, str]:
    spelled = ", ".join(f"{name}: {rule}" for name, rule in rules.items())
    return f"~{STREAM}", f"+{STREAM}={{{spelled}}}"


def run(program: Program) -> tuple[dict[str, np.ndarray], dict[str, float], Any]:
    """Metrics of all steps, of the last evaluation, and the last state."""
    events = list(train(program))
    records = [event for event in events if isinstance(event, TrainRecord)]
    evals = [event for event in events if isinstance(event, EvalRecord)]
    outcome = events[-1]
    assert isinstance(outcome, Outcome)
    assert outcome.status == "completed"
    names = records[0].metrics
    metrics = {n: np.concatenate([r.metrics[n] for r in records]) for n in names}
    return metrics, dict(evals[-1].metrics), outcome.state


def entries(program: Program, *, step: int = 0, phase: str = "train") -> list[Any]:
    ledger = make_ledger(program)
    draws = [draw for draw in ledger["draws"] if draw["phase"] == phase]
    return [entry for draw in draws for entry in expand(ledger, draw, step=step)]


def replay(derivation: list[dict[str, Any]]) -> list[int]:
    """The key of a derivation, by `jax.random` alone."""
    key: Any = None
    for op in derivation:
        if op["op"] == "seed":
            key = jax.random.key(op["value"])
        elif op["op"] == "fold_in":
            key = jax.random.fold_in(key, op["value"])
        else:
            key = jax.random.split(key, op["of"])[op["index"]]
    return jax.random.key_data(key).tolist()  # type: ignore[no-any-return]


def words(key: Any) -> list[int]:
    return jax.random.key_data(key).tolist()  # type: ignore[no-any-return]


def base_of(program: Program) -> Any:
    """The key of the stream dropout before any coordinate."""
    (row,) = [r for r in make_ledger(program)["streams"] if r["name"] == "dropout"]
    return jax.random.wrap_key_data(jnp.array(row["key"], jnp.uint32))


def fold(key: Any, *numbers: int) -> Any:
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return key


# --- keys


@pytest.mark.parametrize("number", COUNTS)
@pytest.mark.parametrize(
    ("how", "key_of"),
    [
        ((per("step", "data"),), lambda k, step, i, n: fold(k, step, i)),
        ((per("data", "step"),), lambda k, step, i, n: fold(k, i, step)),
        (
            rules(step="fold_in", data="split"),
            lambda k, step, i, n: jax.random.split(fold(k, step), n)[i],
        ),
        (
            rules(data="split", step="fold_in"),
            lambda k, step, i, n: fold(jax.random.split(k, n)[i], step),
        ),
        (
            rules(step="carry", data="split"),
            lambda k, step, i, n: jax.random.split(carry(k, step), n)[i],
        ),
    ],
    ids=["step_data", "data_step", "split", "split_first", "carry"],
)
def test_keys_are_as_per_says(
    number: int, how: tuple[str, ...], key_of: Any, on_devices: OnDevices
) -> None:
    program = on_devices(number, *how)
    found = entries(program, step=3)
    assert [entry["index"] for entry in found] == [{"data": i} for i in range(number)]
    base = base_of(program)
    for i, entry in enumerate(found):
        (path,) = [o["value"] for o in entry["derivation"] if "path" in o["why"]]
        assert entry["key"] == words(fold(key_of(base, 3, i, number), path))
        assert entry["key"] == replay(entry["derivation"])
        assert entry["uses"][0]["shape"] == [64 // number, 32]


def carry(key: Any, step: int) -> Any:
    for _ in range(step):
        key = jax.random.split(key)[1]
    return jax.random.split(key)[0]


def test_keys_are_shared_along_axes_that_per_leaves_out(on_devices: OnDevices) -> None:
    mesh = ("+mesh.axes.model=2",)
    by_data = on_devices(8, "mesh.axes.data=4", *mesh, per("step", "data"))
    assert [e["index"] for e in entries(by_data)] == [{"data": i} for i in range(4)]
    by_model = on_devices(8, "mesh.axes.data=4", *mesh, per("step", "model"))
    found = entries(by_model)
    assert [e["index"] for e in found] == [{"model": i} for i in range(2)]
    assert found[0]["uses"][0]["shape"] == [16, 32]  # rows are cut by data alone
    both = entries(
        on_devices(8, "mesh.axes.data=4", *mesh, per("model", "step", "data"))
    )
    assert len({tuple(e["key"]) for e in both}) == 8


def test_initialisation_has_no_shards(on_devices: OnDevices, make_spec: Make) -> None:
    alone = compile_run(make_spec(*SMALL, *QUIET))
    assert isinstance(alone, Program)
    program = on_devices(8, per("step", "data"))
    keys = [entries(p, phase="init") for p in (alone, program)]
    assert keys[0] == keys[1]
    states = [p.start()[0].params for p in (alone, program)]
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_under_jit_axes_are_not_folded(make_spec: Make) -> None:
    mesh = ("mesh=data8", *SMALL, *QUIET)
    spec = make_spec(*mesh, *rules(step="fold_in", data="split"))
    draws = [make_ledger(compile_run(s))["draws"] for s in (spec, make_spec(*mesh))]
    assert draws[0] == draws[1]


@pytest.mark.parametrize(
    "more",
    [
        (per("step", "data"),),
        (per("data", "epoch", "step"), "train.clip_norm=1.0"),
        (*rules(step="carry", data="split", microbatch="fold_in"), "+two=2"),
    ],
    ids=["fold", "data_first", "carry"],
)
def test_the_keys_of_the_ledger_are_those_drawn_from(
    more: tuple[str, ...], on_devices: OnDevices, tmp_path: Path
) -> None:
    parts = 2 if "+two=2" in more else 1
    more = tuple(each for each in more if each != "+two=2")
    accumulate = f"train.accumulation_steps={parts}"
    program = on_devices(8, *more, accumulate, "rng.observe=true")
    record_run(program, directory=tmp_path, secrets=Secrets({}, ()), hazards=())
    observed = json.loads((tmp_path / "run.json").read_text())["observed"]
    assert observed["status"] == "equal"
    assert observed["phases"]["train"] == {"draws": 1, "keys": 4 * 8 * parts}


# --- numbers


def by_hand(
    program: Program, key_of: Callable[[Any, int], Any], *, steps: int
) -> tuple[Any, list[float]]:
    """Parameters and losses of a loop with `shard_map`, written for one model."""
    data, order = program.data, program.order
    assert program.layout.mesh is not None
    mesh = program.layout.mesh

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: Any, deterministic: bool) -> Any:
            x = nn.relu(nn.Dense(32)(x.reshape(x.shape[0], -1)))
            x = nn.Dropout(0.5, deterministic=deterministic)(x)
            return nn.Dense(10)(x)

    base, model, optimizer = base_of(program), Model(), optax.sgd(0.1)

    def shard(params: Any, opt_state: Any, x: Any, y: Any, step: Any) -> Any:
        key = key_of(jax.random.fold_in(base, step), jax.lax.axis_index("data"))

        def loss(params: Any) -> Any:
            logits = model.apply({"params": params}, x, False, rngs={"dropout": key})
            entropy = optax.softmax_cross_entropy_with_integer_labels
            return entropy(logits, y).mean()

        found = jax.lax.pmean(jax.value_and_grad(loss)(params), "data")
        updates, opt_state = optimizer.update(found[1], opt_state)
        return optax.apply_updates(params, updates), opt_state, found[0]

    specs = {"in_specs": (P(), P(), P("data"), P("data"), P()), "out_specs": P()}
    call = jax.jit(jax.shard_map(shard, mesh=mesh, check_vma=False, **specs))
    params = program.start()[0].params
    opt_state, losses = optimizer.init(params), []
    for step in range(steps):
        (rows,) = order.indices(step, steps=1)
        batch = data.x_train[rows], data.y_train[rows]
        params, opt_state, loss = call(params, opt_state, *batch, step)
        losses.append(float(loss))
    return params, losses


@pytest.mark.parametrize("number", COUNTS)
def test_masks_and_losses_are_those_by_hand(number: int, on_devices: OnDevices) -> None:
    sgd = ("optimizer=sgd", "optimizer.learning_rate=0.1", "optimizer.momentum=null")
    program = on_devices(number, per("step", "data"), *sgd)
    metrics, _, state = run(program)
    with flax.config.temp_flip_flag("fix_rng_separator", True):
        params, losses = by_hand(program, jax.random.fold_in, steps=4)
        _, others = by_hand(program, lambda key, _: key, steps=4)
    np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-6)
    for a, b in zip(*map(jax.tree.leaves, (state.params, params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    if number > 1:  # shared masks would be seen
        assert np.abs(np.array(others) - losses).max() > 1e-3


@pytest.mark.parametrize(
    "more",
    [(), ("train.accumulation_steps=4",), ("train.clip_norm=0.1",), ("eval.every=2",)],
    ids=["plain", "accumulate", "clip", "eval"],
)
def test_losses_are_those_under_jit(
    more: tuple[str, ...], on_devices: OnDevices, make_spec: Make
) -> None:
    more = (*more, *DRY, "eval.batch_size=50")  # 50 rows don't divide by 8
    jit = make_spec(*SMALL, *QUIET, "mesh=data8", "train.steps=4", *more)
    under_jit = compile_run(jit)
    assert isinstance(under_jit, Program)
    program = on_devices(8, *more)
    assert program.eval_rows == 56
    a, b = run(program), run(under_jit)
    for name in a[0]:
        np.testing.assert_allclose(a[0][name], b[0][name], rtol=ROUNDING)
    for name in a[1]:
        np.testing.assert_allclose(a[1][name], b[1][name], rtol=ROUNDING)


def test_what_a_step_exchanges(on_devices: OnDevices) -> None:
    program = on_devices(8, per("step", "data"))
    (found,) = list_collectives(program.calls.train)
    floats = program.parameters + 2  # loss and accuracy
    assert (found["kind"], found["bytes"]) == ("all-reduce", 4 * floats)


def test_collections_are_the_mean_over_shards(on_devices: OnDevices) -> None:
    program = on_devices(8, *module("Counted"), "~rng.streams.dropout")
    _, _, state = run(program)
    (rows,) = program.order.indices(3, steps=1)
    counts = jax.device_get(state.collections["counts"])
    assert counts["calls"] == 4
    mean = program.data.x_train[rows].mean()
    np.testing.assert_allclose(counts["mean"], mean, rtol=1e-6)


def module(name: str) -> tuple[str, ...]:
    """Overrides that put a module of this file in the model's place."""
    return "~model", f"+model={{_target_: {PACKAGE}.{name}}}", f"trusted=[{PACKAGE}]"


def test_means_and_totals() -> None:
    mesh = jax.make_mesh((4, 2), ("data", "model"), (jax.sharding.AxisType.Auto,) * 2)
    layout = Layout(mesh, (("batch", "data"),), Strategy.SHARD_MAP)

    def shard() -> Any:
        at = jax.lax.axis_index("data")
        own = at.astype(jnp.float32)
        tree = {
            "f": jnp.full((2, 3), own),
            "s": own + 1,
            "h": own.astype(jnp.bfloat16),
            "i": at,
            "b": at == 0,
            "k": jax.random.split(jax.random.key(0), 4)[at],
        }
        return layout.mean(tree), layout.total(own)

    mean, total = jax.jit(layout.on_shards(shard))()
    assert mean["f"].tolist() == [[1.5] * 3] * 2
    assert (float(mean["s"]), mean["h"].dtype) == (2.5, jnp.bfloat16)
    assert (float(mean["h"]), int(mean["i"]), bool(mean["b"])) == (1.5, 0, True)
    assert words(mean["k"]) == words(jax.random.split(jax.random.key(0), 4)[0])
    assert float(total) == 6
    for leaf in jax.tree.leaves(mean):
        shards = [np.asarray(_plain(s.data)) for s in leaf.addressable_shards]
        assert len({each.tobytes() for each in shards}) == 1


def _plain(leaf: Any) -> Any:
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf


# --- hazards


def shared(program: Any) -> list[Hazard]:
    return [hazard for hazard in find_hazards(program) if hazard.code == "R003"]


def test_a_key_that_shards_share_is_refused(on_devices: OnDevices) -> None:
    (hazard,) = shared(on_devices(8))
    assert str(hazard) == (
        f"R003: {STREAM}: the key is the same on the 8 shards of data, which hold "
        f"different rows (train Dropout_0). Add data to {STREAM}."
    )
    assert hazard.severity == "error"


@pytest.mark.parametrize(
    "more",
    [
        (per("step", "data"),),
        rules(step="carry", data="split"),
        ("mesh.axes.data=1", "+mesh.axes.model=8"),
        ("~mesh.rules.batch",),
    ],
    ids=["fold_in", "split", "one_shard", "same_rows"],
)
def test_a_key_that_differs_is_no_hazard(
    more: tuple[str, ...], on_devices: OnDevices
) -> None:
    assert find_hazards(on_devices(8, *more)) == ()


def test_a_key_that_differs_by_another_axis_is_refused(on_devices: OnDevices) -> None:
    mesh = ("mesh.axes.data=4", "+mesh.axes.model=2")
    (hazard,) = shared(on_devices(8, *mesh, per("step", "model")))
    assert "the 4 shards of data" in hazard.what


def test_a_shard_number_that_the_model_folds_is_seen(on_devices: OnDevices) -> None:
    program = on_devices(8, *module("Own"))
    assert shared(program) == []
    assert [entry["index"] for entry in entries(program)] == [
        {"data": i} for i in range(8)
    ]


def test_an_optimizer_draws_alike_on_each_shard(on_devices: OnDevices) -> None:
    """Its gradient is that of all rows: the key of its noise is to be shared."""
    noise = "{_target_: optax.add_noise, eta: 0.1, gamma: 0.5, key: 0}"
    program = on_devices(8, "~optimizer", f"+optimizer={noise}", *DRY)
    codes = {hazard.code for hazard in find_hazards(program)}
    assert codes == {"R014"}
    draws = [draw for trace in program.traces.values() for draw in trace.draws]
    within = {draw.within for draw in draws if draw.stream is None}
    assert within == {(("data", 8),)}  # made on each shard, and not found to be shared


# --- Flax's guide: random numbers on several devices


@pytest.fixture(scope="module")
def outputs(make_spec: Make, tmp_path_factory: Any) -> Callable[..., np.ndarray]:
    def outputs(*overrides: str) -> dict[str, np.ndarray]:
        directory = tmp_path_factory.mktemp("probe")
        program = compile_run(make_spec(*overrides, "sinks=none"))
        assert find_hazards(program) == ()
        record_run(program, directory=directory, secrets=Secrets({}, ()), hazards=())
        with np.load(directory / "outputs.npz") as file:
            return dict(file)

    return outputs  # type: ignore[return-value]


class Guide(nn.Module):
    @nn.compact
    def __call__(self, x: Any, add_noise: Any) -> Any:
        x = nn.Dense(1)(x)
        noise = jax.random.normal(self.make_rng("params"), x.shape)
        return jnp.where(add_noise, x + noise, x)


def guide(separator: bool) -> dict[str, Any]:
    """What the two examples give, with noise and without.

    The page calls the second one without `jit`, and so each operation by itself: the
    same noise, where a sum may be one rounding off.
    """
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    rows = NamedSharding(mesh, P("data"))
    with flax.config.temp_flip_flag("fix_rng_separator", separator):
        init_key, apply_key = jax.random.split(jax.random.key(0))
        module, x = Guide(), jnp.ones((8, 1))
        variables = module.init(init_key, x, False)

        def whole(variables: Any, x: Any, add_noise: Any, key: Any) -> Any:
            return module.apply(variables, x, add_noise, rngs={"params": key})

        def shard(variables: Any, x: Any, add_noise: Any, keys: Any) -> Any:
            return module.apply(variables, x, add_noise, rngs={"params": keys[0]})

        specs = (P(), P("data"), P(), P("data"))
        shardings = {"in_shardings": (None, rows, None, None), "out_shardings": rows}
        by_shard = jax.shard_map(shard, mesh=mesh, in_specs=specs, out_specs=P("data"))
        calls = {
            "jit": (jax.jit(whole, **shardings), apply_key),
            "shard_map": (
                jax.jit(by_shard),
                jax.random.split(apply_key, 8),
            ),
        }
        return {
            "kernel": variables["params"]["Dense_0"]["kernel"],
            "op_by_op": by_shard(variables, x, True, calls["shard_map"][1]),
            **{
                (name, mode): call(variables, x, mode == "train", key)
                for name, (call, key) in calls.items()
                for mode in ("train", "eval")
            },
        }


@pytest.mark.parametrize("separator", [True, False])
def test_the_guide(separator: bool, outputs: Any) -> None:
    expected = guide(separator)
    flag = f"rng.fix_separator={str(separator).lower()}"
    for name, mode in itertools.product(("jit", "shard_map"), ("train", "eval")):
        found = outputs(f"+experiment=mesh/{name}_noise", f"task.mode={mode}", flag)
        for ours, theirs in (
            (found["output"], expected[name, mode]),
            (found["variables/params/Dense_0/kernel"], expected["kernel"]),
        ):
            assert ours.shape == theirs.shape
            assert ours.tobytes() == np.asarray(theirs).tobytes()
        if (name, mode) == ("shard_map", "train"):
            np.testing.assert_allclose(found["output"], expected["op_by_op"], 1e-6)
        assert len(np.unique(found["output"])) == (8 if mode == "train" else 1)


def test_updates_of_a_probe(make_spec: Make, tmp_path: Path) -> None:
    """Losses of a probe that is updated under `shard_map`, and its observed keys."""
    arrays = ("task.inputs=[{ones: [8, 3]}]", "task.targets={ones: [8, 2]}")
    per = "rng.streams.dropout.per"
    rules = (f"~{per}", f"+{per}={{step: carry, data: split}}")
    spec = ("+experiment=rng/training_loop", "mesh=shard_map8", *arrays, *rules)
    program = compile_run(make_spec(*spec, "sinks=none", "rng.observe=true"))
    record_run(program, directory=tmp_path, secrets=Secrets({}, ()), hazards=())
    found = json.loads((tmp_path / "run.json").read_text())
    assert found["observed"]["status"] == "equal"
    assert found["observed"]["phases"]["train"] == {"draws": 2, "keys": 160}
    with np.load(tmp_path / "outputs.npz") as file:
        assert file["train/loss"].shape == (10,)
        assert np.all(np.isfinite(file["train/loss"]))


# --- bad input


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ("mesh=shard_map8", per("step", "dota")),
            f"{STREAM}: not a choice (got 'dota'). "
            "Choices: step, epoch, microbatch, data. Did you mean 'data'?",
        ),
        (
            (per("step", "data"),),
            f"{STREAM}: not a choice (got 'data'). Choices: step, epoch, microbatch. "
            "Axes are those of a mesh: set mesh=data8.",
        ),
        (
            ("mesh=shard_map8", *rules(step="split")),
            f"{STREAM}: only an axis of the mesh can be split over "
            "(got {'step': 'split'}). Axes: data.",
        ),
        (
            ("mesh=shard_map8", *rules(step="fold_in", data="carry")),
            f"{STREAM}: only `step` can be carried "
            "(got {'step': 'fold_in', 'data': 'carry'}).",
        ),
        (
            ("mesh=shard_map8", *rules(data="split", step="carry")),
            f"{STREAM}: a carried `step` must come first "
            "(got {'data': 'split', 'step': 'carry'}).",
        ),
        (
            ("mesh=shard_map8", "rng.streams.shuffle.per=[epoch,data]"),
            "rng.streams.shuffle.per: a host stream can differ by epoch and process "
            "alone (got {'epoch': 'fold_in', 'data': 'fold_in'}). "
            "Set rng.streams.shuffle.per=[epoch] or [].",
        ),
        (
            ("mesh=shard_map8", "+mesh.rules.mlp=data"),
            "mesh.rules.mlp: not for shard_map: each device has whole parameters "
            "(got 'data'). Rules: batch. Remove it: '~mesh.rules.mlp'.",
        ),
        (
            ("mesh=shard_map8", "+mesh.axes.step=1"),
            "mesh.axes.step: already has a meaning, and can't name an axis "
            "(got 'step'). Rename it.",
        ),
    ],
)
def test_bad_specs(overrides: tuple[str, ...], said: str, make_spec: Make) -> None:
    with pytest.raises(ConfigError) as raised:
        make_spec(*SMALL, *overrides)
    assert str(raised.value) == said


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            (*SMALL, "mesh=shard_map8", "data.batch_size=60"),
            "data.batch_size: must divide into 8 parts over the mesh (got 60). "
            "Set data.batch_size=64.",
        ),
        (
            ("+experiment=mesh/shard_map_noise", "task.inputs=[{ones: [6, 1]}]"),
            "task.inputs[0]: its rows must divide into 8 parts over the mesh "
            "(got 'shape [6, 1]'). Declare more rows, or set mesh=none.",
        ),
        (
            ("+experiment=mesh/shard_map_noise", "task.inputs=[{values: 1.0}]"),
            "task.inputs[0]: its rows must divide into 8 parts over the mesh "
            "(got 'shape []'). Declare more rows, or set mesh=none.",
        ),
    ],
)
def test_rows_that_do_not_divide(
    overrides: tuple[str, ...], said: str, make_spec: Make
) -> None:
    with pytest.raises(ConfigError) as raised:
        compile_run(make_spec(*overrides))
    assert str(raised.value) == said


# --- commands


def test_a_run_by_its_commands(runner: Run, tmp_path: Path) -> None:
    words = ("+experiment=dropout", "mesh=shard_map8", "mesh.host_devices=8")
    words = (*words, per("step", "data"), "model.features=[32]", "sinks=none")
    runs = {}
    for name, steps in (("whole", 12), ("half", 6)):
        where = f"hydra.run.dir={tmp_path}/{name}"
        done = runner(*words, where, f"train.steps={steps}")
        assert done.returncode == 0, done.stderr
    done = runner("resume", f"{tmp_path}/half", "train.steps=12")
    assert done.returncode == 0, done.stderr
    for name in ("whole", "half"):
        runs[name] = json.loads((tmp_path / name / "run.json").read_text())
    assert runs["half"]["steps"] == 12
    for digest in ("params", "keys"):
        assert runs["half"]["digests"][digest] == runs["whole"]["digests"][digest]
    done = runner("reproduce", f"{tmp_path}/whole", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["level"] == "bit-exact"
    done = runner("keys", f"{tmp_path}/whole", "--step", "5", "--json")
    listed = [d for d in json.loads(done.stdout)["draws"] if d["phase"] == "train"]
    assert [entry["index"] for entry in listed] == [{"data": i} for i in range(8)]
    assert all(entry["key"] == replay(entry["derivation"]) for entry in listed)


def test_a_refusal_is_a_line(runner: Run) -> None:
    done = runner(*SMALL, "mesh=shard_map8", "mesh.host_devices=8", "sinks=none")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: R003: {STREAM}: ")
    assert f"Add data to {STREAM}." in line
