# SPDX-License-Identifier: Apache-2.0
"""Probes against the same programs by hand: what Flax's and JAX's pages teach.

What stands by hand here is plain Flax, JAX and NumPy, none of the runner; its modules
are written out. It runs as those pages run it, without `jit` but for the training
steps. What bits rest on, seen on CPU:

- Keys and initial variables have the same bits with and without `jit`. Updates and
  losses have those of one jitted update and one jitted evaluation; without `jit`, some
  are one rounding off.
- Rates and learning rates are constants of a probe's program, as they are by hand. As
  inputs, they would round otherwise: XLA folds constants into others nearby.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml

from runner import CONF_DIR
from runner.compile import compile_run
from runner.errors import RunnerError
from runner.hazards.find import find_hazards, refuse_hazards
from runner.ledger import make_ledger
from runner.parse import to_plain
from runner.recording import record_run
from runner.records.metrics import read_metrics
from runner.records.secrets import Secrets
from runner.spec import parse_spec

pytestmark = pytest.mark.promotes

HOME = CONF_DIR / "experiment"
NAMES = [
    f"{p.parent.name}/{p.stem}" for d in ("rng", "lift") for p in (HOME / d).iterdir()
]
PROBES = sorted([*NAMES, "dropout_tutorial"])
REFUSED = ("rng/collision",)  # as it stands: to be seen
ALLOWED = {"rng/same_seed": "R001", "rng/key_reuse": "R001", "rng/host_streams": "R014"}
WARNED = (
    *("lift/vmap_equal", "lift/scan_equal"),
    *("lift/vmap_split_params_only", "lift/vmap_shared_variable"),
)

Arrays = dict[str, np.ndarray]


# --- a probe, run and recorded in this process


class Ran:
    """A recorded probe."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.manifest = json.loads((directory / "run.json").read_text())
        with np.load(directory / "outputs.npz") as file:
            self.arrays: Arrays = dict(file)

    @property
    def values(self) -> Arrays:
        """Variables and outputs."""
        return {k: v for k, v in self.arrays.items() if not k.endswith("/loss")}


Probe = Callable[..., Ran]


@pytest.fixture(scope="module")
def probe(make_spec: Any, tmp_path_factory: pytest.TempPathFactory) -> Probe:
    """An experiment and overrides to its record; each is run once."""
    done: dict[tuple[str, ...], Ran] = {}

    def probe(*overrides: str) -> Ran:
        if overrides not in done:
            program = compile_run(make_spec(*overrides, "sinks=none"))
            hazards = find_hazards(program)
            refuse_hazards(hazards, allow=program.spec.rng.allow)
            directory = tmp_path_factory.mktemp("run")
            secrets = Secrets({}, ())
            record_run(program, directory=directory, secrets=secrets, hazards=hazards)
            done[overrides] = Ran(directory)
        return done[overrides]

    return probe


@pytest.fixture(params=[True, False], ids=["separator", "flax_default"])
def separator(request: pytest.FixtureRequest) -> Iterator[str]:
    """The override, with Flax's flag set for what is done by hand."""
    with flax.config.temp_flip_flag("fix_rng_separator", request.param):
        yield f"rng.fix_separator={str(request.param).lower()}"


def named(prefix: str, tree: Any) -> Arrays:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    paths = {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in leaves}
    return {
        "/".join(filter(None, (prefix, k))): np.asarray(x) for k, x in paths.items()
    }


def assert_same(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Same names, shapes, dtypes, bytes."""
    assert ours.keys() == theirs.keys()
    for name in ours:
        a, b = ours[name], np.asarray(theirs[name])
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        assert a.tobytes() == b.tobytes(), name


# --- by hand: keys


def words(*keys: jax.Array) -> dict[str, np.ndarray]:
    return {
        "keys": np.stack([jax.random.key_data(key) for key in keys]),
        "bits": np.stack([jax.random.bits(key) for key in keys]),
    }


class Calls(nn.Module):
    """Asks for keys of its streams in turn, then calls its module."""

    streams: tuple[str, ...]
    inner: Callable[[], Any] = dict

    @nn.compact
    def __call__(self) -> Any:
        return {**words(*map(self.make_rng, self.streams)), **self.inner()}


class RNGSubSubModule(nn.Module):
    @nn.compact
    def __call__(self) -> Any:
        return words(self.make_rng("rng_stream"), self.make_rng("rng_stream"))


class RNGSubModule(nn.Module):
    deeper: bool

    @nn.compact
    def __call__(self) -> Any:
        mine = words(self.make_rng("rng_stream"), self.make_rng("rng_stream"))
        return mine | (
            {"RNGSubSubModule_0": RNGSubSubModule()()} if self.deeper else {}
        )


class RNGModule(nn.Module):
    """Two keys, then one sub-module that has its own, or two that have none."""

    deeper: bool

    @nn.compact
    def __call__(self) -> Any:
        mine = words(self.make_rng("rng_stream"), self.make_rng("rng_stream"))
        for i in range(1 if self.deeper else 2):
            mine |= {f"RNGSubModule_{i}": RNGSubModule(self.deeper)()}
        return mine


ONE, TWO = ("rng_stream",) * 3, ("rng_stream1", "rng_stream2") * 3
KEYS = {
    "rng/one_stream": (Calls(ONE), (0,)),
    "rng/other_seed": (Calls(ONE), (1,)),
    "rng/two_streams": (Calls(TWO), (0, 1)),
    "rng/same_seed": (Calls(TWO), (0, 0)),
    "rng/submodules": (RNGModule(True), (0,)),
    "rng/repeated_submodules": (RNGModule(False), (0,)),
}


@pytest.mark.parametrize("name", KEYS)
def test_keys_are_those_by_hand(name: str, probe: Probe, separator: str) -> None:
    module, seeds = KEYS[name]
    streams = ("rng_stream",) if len(seeds) == 1 else ("rng_stream1", "rng_stream2")
    rngs = dict(zip(streams, map(jax.random.key, seeds), strict=True))
    ran = probe(f"+experiment={name}", separator)
    assert_same(ran.values, named("output", module.apply({}, rngs=rngs)))


def test_keys_are_those_of_the_initialisation(probe: Probe, separator: str) -> None:
    """The guide draws in `init`, the probe in `apply`: Flax counts alike in both."""
    seen = []

    class InInit(nn.Module):
        @nn.compact
        def __call__(self) -> None:
            seen.extend(words(*map(self.make_rng, ONE))["keys"])

    InInit().init({"rng_stream": jax.random.key(0)})
    ran = probe("+experiment=rng/one_stream", separator)
    assert ran.values["output/keys"].tolist() == np.stack(seen).tolist()


def test_streams_count_alone(probe: Probe) -> None:
    """Asked in turns, two streams give what each gives alone."""
    both = probe("+experiment=rng/two_streams").values["output/keys"]
    for first, alone in enumerate(("rng/one_stream", "rng/other_seed")):
        keys = probe(f"+experiment={alone}").values["output/keys"]
        assert both[first::2].tolist() == keys.tolist()


def test_same_seed_is_allowed_to_be_seen(probe: Probe, make_spec: Any) -> None:
    keys = probe("+experiment=rng/same_seed").values["output/keys"]
    assert keys[0::2].tolist() == keys[1::2].tolist()
    program = compile_run(make_spec("+experiment=rng/same_seed"))
    codes = [hazard.code for hazard in find_hazards(program)]
    assert {"R001", "R006"} == set(codes)
    by_name = "+rng.streams.rng_stream2.derive=name"
    program = compile_run(make_spec("+experiment=rng/same_seed", by_name))
    assert not find_hazards(program)


# --- by hand: variables


class Declared(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        normal = jax.random.normal
        x = nn.Dense(2, kernel_init=normal, use_bias=False)(x)
        self.param("model_param", normal, x.shape)
        for name, stream in (
            ("model_variable1", "params"),
            ("model_variable2", "other"),
        ):
            self.variable(
                "other_collection",
                name,
                lambda s=stream: normal(self.make_rng(s), x.shape),
            )
        return nn.Dense(2, kernel_init=normal, bias_init=normal)(x)


def test_param_and_variable(probe: Probe, separator: str) -> None:
    rngs = {"params": jax.random.key(0), "other": jax.random.key(1)}
    x = jnp.ones((2, 2))
    variables = Declared().init(rngs, x)
    outputs = Declared().apply(variables, x)
    ran = probe("+experiment=rng/param_and_variable", separator)
    assert_same(ran.values, named("variables", variables) | named("output", outputs))


# --- by hand: the collision of names


class Leaf(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return x + jax.random.randint(self.make_rng("rng"), (), 0, 100)


class Node(nn.Module):
    leaf: str

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return Leaf(name=self.leaf)(x)


class Tree(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return Node("cdef", name="ab")(x), Node("def", name="abc")(x)


def test_collision(probe: Probe, separator: str) -> None:
    outputs = Tree().apply({}, 0, rngs={"rng": jax.random.key(33)})
    ran = probe("+experiment=rng/collision", separator, "rng.allow=[R001]")
    assert_same(ran.values, named("output", outputs))
    collides = separator.endswith("false")
    assert (ran.values["output/0"] == ran.values["output/1"]) == collides
    assert bool(ran.manifest["hazards"]) == collides


def test_collision_is_refused(runner: Any, tmp_path: Path) -> None:
    done = runner("+experiment=rng/collision")
    assert done.returncode == 1
    assert done.stderr.startswith("error: R001: rng.streams.rng: ")
    assert "ab/cdef" in done.stderr
    assert "abc/def" in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "outputs").exists()


# --- by hand: what JAX's page teaches


def test_host_streams(probe: Probe) -> None:
    ran = probe("+experiment=rng/host_streams")
    by_hand = [host_uniform("bar"), host_uniform("baz")]
    before = np.random.get_state()
    np.random.seed(0)
    by_hand += [np.random.uniform(size=3), np.random.uniform(size=3)]
    np.random.set_state(before)
    assert_same(ran.values, named("output", [x.astype(np.float32) for x in by_hand]))


def host_uniform(stream: str) -> np.ndarray:
    word = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:4], "big")
    sequence = np.random.SeedSequence(0, spawn_key=(word,))
    return np.random.Generator(np.random.Philox(sequence)).uniform(size=3)


def test_host_streams_in_another_order(probe: Probe) -> None:
    """A stream's numbers are its own; the legacy state's go to whoever comes first."""
    first = probe("+experiment=rng/host_streams").values
    inputs = [
        "{uniform:[3],legacy_seed:0}",
        "{uniform:[3],stream:baz}",
        "{uniform:[2],legacy_seed:0}",
        "{uniform:[3],stream:bar}",
    ]
    turned = f"task.inputs=[{','.join(inputs)}]"
    second = probe("+experiment=rng/host_streams", turned).values
    assert second["output/1"].tobytes() == first["output/1"].tobytes()
    assert second["output/3"].tobytes() == first["output/0"].tobytes()
    assert second["output/2"].tolist() == first["output/3"][:2].tolist()


def test_global_state_of_numpy_is_left_alone(probe: Probe) -> None:
    before = np.random.get_state()[1].tobytes()  # type: ignore[index]
    probe("+experiment=rng/host_streams", "seed=5")
    assert np.random.get_state()[1].tobytes() == before  # type: ignore[index]


def test_key_reuse(probe: Probe) -> None:
    once = jax.random.normal(jax.random.key(42))
    ran = probe("+experiment=rng/key_reuse")
    assert_same(ran.values, named("output", (once, once)))


def test_one_by_one(probe: Probe) -> None:
    key = jax.random.key(42)
    by_hand = [jax.random.normal(k) for k in jax.random.split(key, 3)]
    by_hand.append(jax.random.normal(key, (3,)))
    ran = probe("+experiment=rng/one_by_one")
    assert_same(ran.values, named("output", by_hand))


# --- by hand: training


class Sub(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = x + self.param("submodule_kernel", jax.random.normal, x.shape)
        x = nn.Dropout(0.2)(x, deterministic=not train)
        return nn.Dense(3)(x)


class Whole(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        kernel = self.variable(
            "other_collection",
            "module_kernel",
            lambda: jax.random.normal(self.make_rng("other"), x.shape),
        )
        x = Sub(name="SubModule_0")(x + kernel.value, train)
        x = nn.Dropout(0.2)(x, deterministic=not train)
        return nn.Dense(2)(x)


def train_by_hand(jitted: bool) -> tuple[Any, jax.Array, list[jax.Array]]:
    params_rng, other_rng, train_rng = jax.random.split(jax.random.key(0), 3)
    x, y, module = jnp.ones((1, 3)), jnp.ones((1, 2)), Whole()
    rngs = {"params": params_rng, "other": other_rng}
    variables = module.init(rngs, x, train=False)

    def update(variables: Any, rng: Any, x: Any, y: Any) -> Any:
        dropout_rng, next_rng = jax.random.split(rng)

        def loss(params: Any) -> Any:
            rngs = {"dropout": dropout_rng}
            out = module.apply(variables | {"params": params}, x, train=True, rngs=rngs)
            return jnp.mean((y - out) ** 2)

        grads = jax.grad(loss)(variables["params"])
        params = jax.tree.map(lambda p, g: p - 1e-3 * g, variables["params"], grads)
        return variables | {"params": params}, next_rng

    def evaluate(variables: Any, x: Any, y: Any) -> Any:
        out = module.apply(variables, x, train=False)
        return out, jnp.mean((y - out) ** 2)

    if jitted:
        update, evaluate = jax.jit(update), jax.jit(evaluate)
    losses = []
    for _ in range(10):
        variables, train_rng = update(variables, train_rng, x, y)
        out, loss = evaluate(variables, x, y)
        losses.append(loss)
    return variables, out, losses


def test_training_loop(probe: Probe, separator: str) -> None:
    variables, out, losses = train_by_hand(jitted=True)
    ran = probe("+experiment=rng/training_loop", separator)
    assert_same(ran.values, named("variables", variables) | named("output", out))
    assert ran.arrays["eval/loss"].tobytes() == np.stack(losses).tobytes()
    rows = read_metrics(ran.directory / "metrics.jsonl")
    evaluations = [row for row in rows if row["phase"] == "eval"]
    assert [row["step"] for row in evaluations] == list(range(1, 11))
    assert [np.float32(row["loss"]) for row in evaluations] == losses
    assert ran.manifest["metrics"]["eval/loss"] == float(losses[-1])


def test_training_loop_without_jit(probe: Probe, separator: str) -> None:
    """As the guide runs it: one or two roundings off."""
    _, _, losses = train_by_hand(jitted=False)
    ran = probe("+experiment=rng/training_loop", separator)
    np.testing.assert_array_max_ulp(ran.arrays["eval/loss"], np.stack(losses), 2)


class MyModel(nn.Module):
    num_neurons: int

    @nn.compact
    def __call__(self, x: jax.Array, training: bool) -> jax.Array:
        x = nn.Dense(self.num_neurons)(x)
        return nn.Dropout(rate=0.5, deterministic=not training)(x)


LABELS = [[0, 1, 2, 0], [1, 2, 0, 1], [2, 0, 1, 2]]


def test_dropout_tutorial(probe: Probe, separator: str) -> None:
    main_key, params_key, dropout_key = jax.random.split(jax.random.key(0), 3)
    x, labels = jax.random.uniform(main_key, (3, 4, 4)), jnp.array(LABELS)
    module, optimizer = MyModel(3), optax.adam(1e-3)
    params = module.init(params_key, x, training=False)["params"]
    state = optimizer.init(params)
    entropy = optax.softmax_cross_entropy_with_integer_labels

    @jax.jit
    def train_step(params: Any, state: Any, step: Any) -> Any:
        key = jax.random.fold_in(dropout_key, step)

        def loss_fn(params: Any) -> Any:
            rngs = {"dropout": key}
            logits = module.apply({"params": params}, x, training=True, rngs=rngs)
            return entropy(logits, labels).mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for step in range(20):
        params, state, loss = train_step(params, state, step)
        losses.append(loss)
    logits = jax.jit(lambda p: module.apply({"params": p}, x, training=False))(params)
    ran = probe("+experiment=dropout_tutorial", separator)
    theirs = named("variables", {"params": params}) | named("output", logits)
    assert_same(ran.values, theirs)
    assert ran.arrays["train/loss"].tobytes() == np.stack(losses).tobytes()


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_dropout_key(mode: str, probe: Probe, separator: str) -> None:
    main_key, params_key, dropout_key = jax.random.split(jax.random.key(0), 3)
    x, training = jax.random.uniform(main_key, (3, 4, 4)), mode == "train"
    variables = MyModel(3).init(params_key, x, training=False)
    apply = jax.jit(
        lambda v: MyModel(3).apply(v, x, training, rngs={"dropout": dropout_key})
    )
    outputs = apply(variables)
    ran = probe("+experiment=rng/dropout_key", separator, f"task.mode={mode}")
    assert_same(ran.values, named("variables", variables) | named("output", outputs))
    dropped = float((ran.values["output"] == 0).mean())
    assert (0.2 < dropped < 0.8) if training else dropped == 0


# --- by hand: lifted transforms


def batch(module: Any, axes: dict[str, Any], split: dict[str, bool]) -> Any:
    return nn.vmap(module, in_axes=0, out_axes=0, variable_axes=axes, split_rngs=split)


class WithVariable(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(2)(x)
        kernel = self.variable(
            "other_collection",
            "kernel",
            lambda: jax.random.normal(self.make_rng("other"), x.shape),
        )
        return x + kernel.value


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return x + nn.relu(nn.Dense(features=2)(x)), None


def scan(split: bool) -> Any:
    return nn.scan(
        Residual,
        variable_axes={"params": 0},
        variable_broadcast=False,
        split_rngs={"params": split},
        length=3,
    )


OWN, SHARED = ({"params": 0, "other_collection": axis} for axis in (0, None))
LIFTED: dict[str, Any] = {
    "lift/vmap_shared": batch(nn.Dense, {"params": None}, {"params": False})(2),
    "lift/vmap_equal": batch(nn.Dense, {"params": 0}, {"params": False})(2),
    "lift/vmap_split": batch(nn.Dense, {"params": 0}, {"params": True})(2),
    **{
        f"lift/{name}": batch(WithVariable, axes, {"params": True, "other": split})()
        for name, axes, split in (
            ("vmap_variables", OWN, True),
            ("vmap_split_params_only", OWN, False),
            ("vmap_shared_variable", SHARED, False),
        )
    },
    "lift/scan_split": scan(True)(),
    "lift/scan_equal": scan(False)(),
}


@pytest.mark.parametrize("name", LIFTED)
def test_lifted_transforms(name: str, probe: Probe, separator: str) -> None:
    module, x = LIFTED[name], jnp.ones((3, 2))
    rngs = {"params": jax.random.key(0), "other": jax.random.key(1)}
    args = (x, None) if "scan" in name else (x,)
    variables = module.init(rngs, *args)
    outputs = jax.jit(module.apply)(variables, *args)
    outputs = outputs[0] if "scan" in name else outputs
    ran = probe(f"+experiment={name}", separator)
    assert_same(ran.values, named("variables", variables) | named("output", outputs))


def test_what_a_lift_shares(probe: Probe) -> None:
    def kernels(name: str) -> np.ndarray:
        values = probe(f"+experiment=lift/{name}").values
        return next(
            v for k, v in values.items() if k.endswith("/kernel") and "params" in k
        )

    assert kernels("vmap_shared").shape == (2, 2)
    for name, distinct in (
        *(("vmap_equal", 1), ("vmap_split", 3)),
        *(("scan_equal", 1), ("scan_split", 3)),
    ):
        assert kernels(name).shape == (3, 2, 2)
        assert len({kernel.tobytes() for kernel in kernels(name)}) == distinct


# --- every shipped probe


@pytest.fixture(scope="module", params=PROBES)
def compiled(request: pytest.FixtureRequest, compose_config: Any) -> Any:
    config = compose_config(f"+experiment={request.param}")
    return compile_run(parse_spec(config | {"experiment": request.param}))


def test_probe_plans(compiled: Any) -> None:
    name, ledger = compiled.spec.experiment, make_ledger(compiled)
    assert compiled.data_digest
    hazards = find_hazards(compiled)
    allowed = {
        hazard.code for hazard in hazards if hazard.code in compiled.spec.rng.allow
    }
    assert allowed == {code for code in [ALLOWED.get(name)] if code}
    if name not in (*REFUSED, *ALLOWED):
        codes = {"R009"} if name in WARNED else set()
        assert {hazard.code for hazard in hazards} == codes
        assert ledger["draws"]
        assert not [draw for draw in ledger["draws"] if "untraced" in draw]


def test_probe_round_trips_through_yaml(compiled: Any) -> None:
    text = yaml.safe_dump(to_plain(compiled.spec), sort_keys=False)
    again = parse_spec(yaml.safe_load(text))
    assert again == compiled.spec
    assert hash(again) == hash(compiled.spec)


@pytest.mark.parametrize("name", PROBES)
def test_header_says_what_it_teaches(name: str) -> None:
    lines = (HOME / f"{name}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    header = [line for line in lines if line.startswith("# ")]
    assert header == lines[: len(header)]
    assert header[1].startswith("# Purpose: ")
    assert f"# Command: python -m runner +experiment={name}" in header
    assert [line for line in header if line.startswith("# Source: ")]
    if name in (*REFUSED, *ALLOWED, *WARNED):
        assert "hazard R0" in " ".join(" ".join(header).replace("#", "").split())


@pytest.mark.parametrize(
    "name", sorted({*PROBES} - {"rng/one_by_one", "rng/key_reuse"})
)
def test_another_seed_gives_other_numbers(name: str, probe: Probe) -> None:
    allow = ["rng.allow=[R001]"] if name in REFUSED else []
    seeds = ["seed=7"] if name not in REFUSED else ["rng.streams.rng.seed=7"]
    first = probe(f"+experiment={name}", *allow).arrays
    other = probe(f"+experiment={name}", *allow, *seeds).arrays
    assert first.keys() == other.keys()
    assert any(first[k].tobytes() != other[k].tobytes() for k in first)


# --- what is recorded


def test_record_of_one_call(probe: Probe) -> None:
    ran = probe("+experiment=rng/dropout_key")
    manifest, files = ran.manifest, {p.name for p in ran.directory.iterdir()}
    assert files >= {"run.json", "config.yaml", "metrics.jsonl", "keys", "outputs.npz"}
    assert "checkpoints" not in files
    assert (manifest["status"], manifest["steps"]) == ("completed", 0)
    content = (ran.directory / "outputs.npz").read_bytes()
    assert manifest["digests"]["outputs"] == hashlib.sha256(content).hexdigest()
    assert manifest["metrics"] == {}
    assert manifest["construct"] == "call"
    assert (ran.directory / "metrics.jsonl").read_text() == ""


def test_record_of_updates(probe: Probe) -> None:
    ran = probe("+experiment=dropout_tutorial")
    assert ran.manifest["steps"] == 20
    assert (ran.directory / "checkpoints" / "20").is_dir()
    assert ran.manifest["constants"] == [
        "model.module.steps[1].rate",
        "optimizer.learning_rate",
    ]
    rows = read_metrics(ran.directory / "metrics.jsonl")
    assert [r["step"] for r in rows if r["phase"] == "train"] == list(range(20))
    assert [r["step"] for r in rows if r["phase"] == "eval"] == [5, 10, 15, 20]
    losses = [np.float32(r["loss"]) for r in rows if r["phase"] == "train"]
    assert losses == ran.arrays["train/loss"].tolist()
    assert ran.manifest["metrics"]["train/loss"] == losses[-1]


def test_bytes_of_the_outputs_are_the_same_again(
    make_spec: Any, probe: Probe, tmp_path: Path
) -> None:
    first = probe("+experiment=rng/training_loop")
    program = compile_run(make_spec("+experiment=rng/training_loop", "sinks=none"))
    record_run(program, directory=tmp_path, secrets=Secrets({}, ()))
    again = (tmp_path / "outputs.npz").read_bytes()
    assert again == (first.directory / "outputs.npz").read_bytes()


def test_update_that_is_not_finite(make_spec: Any, tmp_path: Path) -> None:
    huge = ["~task.targets", "+task.targets={values:[[3.0e38,3.0e38]]}", "sinks=none"]
    program = compile_run(make_spec("+experiment=rng/training_loop", *huge))
    found = record_run(program, directory=tmp_path, secrets=Secrets({}, ()))
    assert found.status == "failed"
    assert found.reason == "loss or update not finite at step 0"
    assert Ran(tmp_path).manifest["steps"] == 0


def test_stop_leaves_a_record(make_spec: Any, tmp_path: Path) -> None:
    program = compile_run(make_spec("+experiment=rng/training_loop", "sinks=none"))
    options: dict[str, Any] = {"secrets": Secrets({}, ()), "stop": lambda: True}
    assert record_run(program, directory=tmp_path, **options).status == "interrupted"
    ran = Ran(tmp_path)
    assert ran.manifest["steps"] == 1
    assert ran.arrays["train/loss"].shape == (1,)


def test_key_that_is_returned_is_kept_as_words(probe: Probe) -> None:
    inputs = "task.inputs=[{zeros:[2],dtype:int32},{arange:3},{values:[true,false]}]"
    ran = probe("+experiment=rng/key_reuse", inputs, "rng.allow=[]")
    dtypes = [str(ran.values[f"output/{i}"].dtype) for i in range(3)]
    assert dtypes == ["int32", "int32", "bool"]
    assert ran.values["output/1"].tolist() == [0, 1, 2]


# --- keys of a probe, as in training


def derived(draw: Mapping[str, Any]) -> list[int]:
    key: Any = None
    for op in draw["derivation"]:
        if op["op"] == "seed":
            key = jax.random.key(op["value"], impl=draw["impl"])
        elif op["op"] == "fold_in":
            key = jax.random.fold_in(key, np.uint32(op["value"]))
        else:
            key = jax.random.split(key, op["of"])[op["index"]]
    return jax.random.key_data(key).tolist()


def test_keys_command(runner: Any, tmp_path: Path) -> None:
    done = runner("+experiment=rng/training_loop", "sinks.wandb.mode=disabled")
    assert done.returncode == 0, done.stderr
    directory = done.stdout.splitlines()[-1]
    shown = json.loads(runner("keys", directory, "--step", "7", "--json").stdout)
    assert [draw["key"] for draw in shown["draws"]] == list(
        map(derived, shown["draws"])
    )
    key = jax.random.split(jax.random.key(0), 3)[2]
    for _ in range(7):
        key = jax.random.split(key)[1]
    masks = [draw for draw in shown["draws"] if draw["phase"] == "train"]
    assert [draw["path"] for draw in masks] == [
        ["SubModule_0", "Dropout_0"],
        ["Dropout_0"],
    ]
    carried = [len(draw["derivation"]) for draw in masks]
    assert carried == [2 + 7 + 1 + 1] * 2
    assert {draw["step"] for draw in masks} == {7}


def test_policies_are_those_of_training(probe: Probe) -> None:
    """A single call is step 0: it shows the mask of training's first step."""
    ran = probe("+experiment=rng/dropout_key", "+rng.streams.dropout.per=[step]")
    main_key, params_key, dropout_key = jax.random.split(jax.random.key(0), 3)
    x, key = jax.random.uniform(main_key, (3, 4, 4)), jax.random.fold_in(dropout_key, 0)
    with flax.config.temp_flip_flag("fix_rng_separator", True):
        variables = MyModel(3).init(params_key, x, training=False)
        masked = MyModel(3).apply(variables, x, True, rngs={"dropout": key})
    assert ((ran.values["output"] == 0) == (np.asarray(masked) == 0)).all()


@pytest.mark.parametrize(
    "name",
    ["rng/training_loop", "dropout_tutorial", "rng/submodules", "lift/vmap_split"],
)
def test_observed_keys_are_those_of_the_ledger(name: str, probe: Probe) -> None:
    plain = probe(f"+experiment={name}")
    seen = probe(f"+experiment={name}", "rng.observe=true")
    assert seen.manifest["observed"]["status"] == "equal"
    assert seen.manifest["observed"]["keys"] > 0
    assert plain.manifest["observed"] is None
    assert_same(seen.arrays, plain.arrays)


def test_a_repeated_mask_is_refused_in_updates_alone(make_spec: Any) -> None:
    def codes(*overrides: str) -> list[str]:
        return [h.code for h in find_hazards(compile_run(make_spec(*overrides)))]

    assert codes("+experiment=rng/dropout_key") == []
    without = ["+experiment=dropout_tutorial", "rng.streams.dropout.per=[]"]
    assert codes(*without) == ["R002"]


def test_evaluation_has_keys_of_its_own(probe: Probe) -> None:
    """In eval mode, the phase is folded in, as in an evaluation."""
    phases = "+rng.streams.rng_stream.phases=[eval]"
    ran = probe("+experiment=rng/one_stream", "task.mode=eval", phases)
    word = int.from_bytes(hashlib.sha256(b"eval").digest()[:4], "big")
    key = jax.random.fold_in(jax.random.key(0), np.uint32(word))
    with flax.config.temp_flip_flag("fix_rng_separator", True):
        by_hand = Calls(ONE).apply({}, rngs={"rng_stream": key})
    assert_same(ran.values, named("output", by_hand))


# --- the command line


def test_terminal_shows_keys_and_values(runner: Any) -> None:
    done = runner("+experiment=rng/one_stream", "sinks.wandb.mode=disabled")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    ran = Ran(Path(lines[-1]))
    for i, key in enumerate(ran.values["output/keys"]):
        words_ = " ".join(f"{word:08x}" for word in key)
        row = rf"train +0 +rng_stream +\(root\) +{i + 1} +{words_} +random_bits \[\]"
        assert [line for line in lines if re.fullmatch(row, line)]
    bits = " ".join(map(str, ran.values["output/bits"]))
    shown = [line for line in lines if line.startswith("output/bits")]
    assert shown[0].split(maxsplit=3)[1:3] == ["uint32", "[3]"]
    assert shown[0].endswith(f"[{bits}]")
    assert not [
        line for line in lines if line.startswith(("optimizer", "steps", "data"))
    ]


def test_live_terminal_shows_them_too(probe: Probe) -> None:
    from rich.console import Console

    from runner.ledger import stream_rows
    from runner.probe.loop import key_rows
    from runner.records.events import Outputs, RunEnd, RunStart
    from runner.sinks.live import LiveSink

    ran = probe("+experiment=rng/one_stream")
    ledger = json.loads((ran.directory / "keys" / "ledger.json").read_text())
    console = Console(width=150, force_terminal=False, record=True)
    sink = LiveSink(console)
    sink.start(
        RunStart(
            *(ran.directory, "id", "rng/one_stream", {}, stream_rows(ledger), 0, 0),
            objective="loss",
            keys=key_rows(ledger),
        )
    )
    end = RunEnd("completed", "", 0, 0.0, {}, None, Outputs(ran.arrays))
    sink.finish(end)
    text = console.export_text()
    for key in ran.values["output/keys"]:
        assert " ".join(f"{word:08x}" for word in key) in text
    assert "output/bits  uint32  [3]" in text


def test_long_arrays_are_cut_and_many_keys_counted(make_spec: Any) -> None:
    from runner.probe.loop import key_rows
    from runner.records.events import Outputs
    from runner.sinks.text import output_rows

    (row,) = output_rows(Outputs({"output": np.arange(1000).reshape(10, 100)}))
    assert row == ("output", "int64", "[10, 100]", "[0 1 2 ... 997 998 999]")
    many = [
        "+experiment=rng/one_stream",
        f"model.streams=[{','.join(['rng_stream'] * 50)}]",
    ]
    rows = key_rows(make_ledger(compile_run(make_spec(*many))))
    assert len(rows) == 41
    assert rows[-1].key == "and 10 more: runner keys RUN"


def test_plan_of_a_probe(runner: Any, tmp_path: Path) -> None:
    done = runner("plan", "+experiment=rng/param_and_variable", "--json")
    plan = json.loads(done.stdout)
    assert (done.returncode, plan["steps"], plan["hazards"]) == (0, 0, [])
    assert {p["path"] for p in plan["parameters"]} == {
        *("Dense_0/kernel", "Dense_1/bias", "Dense_1/kernel", "model_param")
    }
    assert {draw["phase"] for draw in plan["draws"]} == {"init"}
    assert runner("plan", "+experiment=rng/host_streams").returncode == 0
    assert list(tmp_path.iterdir()) == []


# --- bad input

PROBE = ("data=none", "task=probe", "sinks=none")
REFUSALS = [
    (["task=probe"], "data.name: a probe reads no rows (got 'digits'). Set data=none."),
    (
        ["data=none"],
        "data.name: classification needs rows (got 'none'). Set data=digits",
    ),
    (
        [*PROBE, "task.inputs=[{stream:main}]"],
        "task.inputs[0]: must have exactly one word",
    ),
    (
        [*PROBE, "task.inputs=[{normal:[2],stream:dropuot}]"],
        "task.inputs[0].stream: not a declared stream (got 'dropuot')",
    ),
    (
        [*PROBE, "task.inputs=[{normal:[2],stream:dropout}]"],
        "rng.streams.dropout.phases: must include init, where inputs are drawn",
    ),
    (
        [*PROBE, "task.inputs=[{normal:[2],stream:shuffle}]"],
        "rng.streams.shuffle.per: inputs are drawn once, so this stream has no epoch",
    ),
    ([*PROBE, "task.loss=squared_error"], "task.targets: loss needs targets, too"),
    ([*PROBE, "task.targets={ones:[2]}"], "task.loss: targets needs loss, too"),
    (
        [
            *PROBE,
            "task.loss=squared_error",
            "task.targets={ones:[1]}",
            "task.mode=eval",
        ],
        "task.mode: updates are made in train mode (got 'eval'). Remove it.",
    ),
    (
        [*PROBE, "train.accumulation_steps=2"],
        "train.accumulation_steps: not for a probe",
    ),
    ([*PROBE, "eval.patience=2"], "eval.patience: not for a probe"),
    ([*PROBE, "eval.train_rows=all"], "eval.train_rows: not for a probe"),
    ([*PROBE, "task.inputs=[{one:[2]}]"], "task.inputs[0].one: unknown key (got [2])"),
    ([*PROBE, "task.targets={one:[2]}"], "task.targets.one: unknown key (got [2])"),
    ([*PROBE, "task.inputs=3"], "task.inputs: must be a list"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSALS)
def test_refuses(overrides: list[str], message: str, make_spec: Any) -> None:
    with pytest.raises(RunnerError) as caught:
        make_spec(*overrides)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


MISFITS = [
    (["task.inputs=[]"], "model: its code raised TypeError in init: "),
    (
        ["task.inputs=[{ones:[1,3]},{ones:[1]}]"],
        "model: its code raised TypeError in init: ",
    ),
    (
        ["task.targets={ones:[3]}"],
        "task.targets: must be of the shape of the outputs "
        "(got 'targets of shape (3,)'). The model returns (1, 2).",
    ),
    (
        ["task.loss=cross_entropy"],
        "task.targets: must be integer labels (got 'targets of type float32').",
    ),
    (
        ["task.loss=cross_entropy", "~task.targets", "+task.targets={arange:3}"],
        "task.targets: must have a label for each row of logits",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), MISFITS)
def test_refuses_what_does_not_fit(
    overrides: list[str], message: str, make_spec: Any
) -> None:
    with pytest.raises(RunnerError) as caught:
        compile_run(make_spec("+experiment=rng/training_loop", *overrides))
    assert str(caught.value).startswith(message)


def test_refusal_on_the_command_line(runner: Any, tmp_path: Path) -> None:
    done = runner("+experiment=rng/one_stream", "task.inputs=[{ones:[2],zeros:[2]}]")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: task.inputs[0]: must have exactly one word that says what it holds "
        "(got ['ones', 'zeros']). Words: ones, zeros, values, arange, uniform, normal, "
        "randint.\n"
    )
    assert list(tmp_path.iterdir()) == []
