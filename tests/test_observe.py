# SPDX-License-Identifier: Apache-2.0
"""`rng.observe`: the keys of the running program, against every other account of them.

Three accounts that share no code: the keys that come out of the compiled program, an
interpreter that runs the same jaxpr equation by equation, and the ledger.
"""

import copy
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core.scope import Scope
from jax.sharding import PartitionSpec as P
from test_audit import consumed

from runner.audit.walk import Use
from runner.comparison.compare import Comparison
from runner.comparison.planned import PlannedKeys
from runner.compile import compile_run
from runner.keys import derive_key, rng_flags
from runner.ledger import expand, make_ledger, rng_of
from runner.loop import Outcome, train
from runner.observe.observe import Observation, observe, split_places
from runner.observe.rewrite import Hidden, Place
from runner.program import Construct, Program
from runner.recording import record_run
from runner.records.events import EvalRecord, TrainRecord
from runner.records.secrets import Secrets
from runner.spec import Phase, parse_spec

Words = tuple[int, ...]
X = jnp.linspace(-1.0, 1.0, 8).reshape(2, 4)
KEY = jax.random.key(5)
ROWS, WIDTH, CLASSES, STEPS = 40, 6, 3, 20


def drawn(observation: Observation) -> Counter[Words]:
    """How often each key was drawn from."""
    found: Counter[Words] = Counter()
    for part in split_places(observation):
        for *words, flag in part.reshape(-1, part.shape[-1]).tolist():
            assert flag in (0, 1)
            assert flag or not any(words)
            found.update([tuple(words)] * flag)
    return found


def to_bytes(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


# One function at a time -----------------------------------------------------------


class Block(nn.Module):
    """A layer that drops half of its outputs."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dropout(0.5, deterministic=False)(nn.Dense(4)(x))


def scan_of(block: Any) -> Any:
    return nn.scan(
        lambda block, x, _: (block(x), None),
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        length=3,
    )


class Lifts(nn.Module):
    """Remat, jit, a scan over remat, vmap."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.jit(Block)()(nn.remat(Block)()(x))
        x, _ = scan_of(Block)(nn.remat(Block)(name="layers"), x, None)
        many = nn.vmap(
            Block,
            in_axes=None,
            axis_size=5,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
        )
        return nn.relu(many()(x)).sum()


def apply_lifts(params: Any, key: Any) -> Any:
    return Lifts().apply(params, X, rngs={"dropout": key})


LIFTS = Lifts().init({"params": KEY, "dropout": KEY}, X)


@jax.custom_jvp
def noisy(key: Any, x: Any) -> Any:
    return x * jax.random.normal(key, x.shape)


@noisy.defjvp
def _(primals: Any, tangents: Any) -> Any:
    return noisy(*primals), tangents[1]


@jax.custom_vjp
def scaled(key: Any, x: Any) -> Any:
    return x * jax.random.gamma(key, 2.0, x.shape)


scaled.defvjp(lambda key, x: (scaled(key, x), None), lambda _, out: (None, out))


def custom_rules(key: Any, x: Any) -> Any:
    one, other = jax.random.split(key)
    return noisy(one, x) + scaled(other, x)


def loop(key: Any, n: Any, x: Any) -> Any:
    def body(carry: Any) -> Any:
        i, x = carry
        return i + 1, x + jax.random.normal(jax.random.fold_in(key, i), x.shape)

    return jax.lax.while_loop(lambda carry: carry[0] < n, body, (jnp.int32(0), x))[1]


def branches(key: Any, i: Any, x: Any) -> Any:
    one, other = jax.random.split(key)
    draws = [
        lambda: jax.random.normal(one, x.shape),
        lambda: x,
        lambda: jax.random.normal(one, x.shape) + jax.random.uniform(other, x.shape),
    ]
    return jax.lax.switch(i, draws)


def nested(key: Any, x: Any) -> Any:
    """A while loop in a branch in a scan: 0, none, 2, none and 4 draws."""

    def body(x: Any, at: Any) -> Any:
        i, key = at
        return jax.lax.cond(i % 2 == 0, lambda: loop(key, i, x), lambda: x), None

    keys = jax.random.split(key, 5)
    return jax.lax.scan(body, x, (jnp.arange(5), keys), reverse=True)[0]


def many(key: Any, x: Any) -> Any:
    keys = jax.random.split(key, (2, 3))
    return jax.vmap(jax.vmap(lambda k: jax.random.normal(k, x.shape)))(keys) + x


def unused(key: Any, x: Any) -> Any:
    one, other = jax.random.split(key)
    jax.random.normal(one, x.shape)
    return jax.random.normal(other, x.shape)


FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], int]] = {
    "no draw": (lambda x: x + 1, (X,), 0),
    "lifts": (apply_lifts, (LIFTS, KEY), 1 + 1 + 3 + 5),
    # The backward pass draws again what remat forgot.
    "gradient of lifts": (jax.grad(apply_lifts), (LIFTS, KEY), 10 + 1 + 3),
    "custom rules": (custom_rules, (KEY, X), 2),
    "vmap": (many, (KEY, X), 6),
    "no iteration": (loop, (KEY, 0, X), 0),
    "three iterations": (loop, (KEY, 3, X), 3),
    "first branch": (branches, (KEY, 0, X), 1),
    "second branch": (branches, (KEY, 1, X), 0),
    "third branch": (branches, (KEY, 2, X), 2),
    "nested": (nested, (KEY, X), 0 + 2 + 4),
    "unused": (unused, (KEY, X), 1),
    "rbg": (many, (jax.random.key(5, impl="rbg"), X), 6),
}


@pytest.mark.promotes
@pytest.mark.parametrize("name", FUNCTIONS)
def test_observed_keys_are_those_that_are_consumed(name: str) -> None:
    """And no bit of the outputs changes."""
    function, args, count = FUNCTIONS[name]
    outputs, observation = jax.jit(observe(function))(*args)
    found = drawn(observation)
    assert found == consumed(jax.make_jaxpr(function)(*args), *args)
    assert found.total() == count
    assert observation.hidden == ()
    assert to_bytes(outputs) == to_bytes(jax.jit(function)(*args))


@pytest.mark.promotes
def test_every_shard_s_key() -> None:
    """Four keys, each on two shards."""
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("rows", "columns"), axis_types=auto)

    def local(key: Any, x: Any) -> Any:
        key = jax.random.fold_in(key, jax.lax.axis_index("rows"))
        return x * jax.random.normal(key, x.shape)

    spec = P("rows", "columns")
    sharded = jax.shard_map(local, mesh=mesh, in_specs=(P(), spec), out_specs=spec)
    x = jnp.ones((4, 6))
    outputs, observation = jax.jit(observe(sharded))(KEY, x)
    keys = [jax.random.key_data(jax.random.fold_in(KEY, i)) for i in range(4)]
    assert drawn(observation) == {tuple(key.tolist()): 2 for key in keys}
    assert [place.axes for place in observation.places] == [(("mesh", 8),)]
    assert to_bytes(outputs) == to_bytes(jax.jit(sharded)(KEY, x))


@pytest.mark.promotes
def test_a_loop_longer_than_there_is_room_for() -> None:
    """The first 63 iterations and the last."""
    _, observation = jax.jit(observe(loop))(KEY, 100, X)
    shown = [jax.random.fold_in(KEY, i) for i in (*range(63), 99)]
    words = (tuple(jax.random.key_data(key).tolist()) for key in shown)
    assert drawn(observation) == Counter(words)


def test_keys_that_stay_inside_are_named() -> None:
    def condition(carry: Any) -> Any:
        return jax.random.uniform(carry[0]) < 0.9

    def function(key: Any, words: Any) -> Any:
        key, n = jax.lax.while_loop(
            condition,
            lambda carry: (jax.random.fold_in(carry[0], 1), carry[1] + 1),
            (key, jnp.int32(0)),
        )
        _, bits = jax.lax.rng_bit_generator(words, (3,))
        return n, bits, jax.random.bits(key)

    words = jnp.arange(4, dtype=jnp.uint32)
    _, observation = jax.jit(observe(function))(KEY, words)
    assert observation.hidden == (
        Hidden((), "random_bits", "in the condition of a while loop"),
        Hidden((), "rng_bit_generator", "drawn by rng_bit_generator itself"),
    )
    assert drawn(observation).total() == 1


def test_each_branch_has_places_of_its_own() -> None:
    def function(key: Any, i: Any) -> Any:
        draws = [partial(draw_many, key, n) for n in (1, 2, 3)]
        return jax.lax.switch(i, draws)

    def draw_many(key: Any, n: int) -> Any:
        return sum(
            jax.random.bits(jax.random.fold_in(key, i), (n,)).sum() for i in range(n)
        )

    for branch in range(3):
        _, observation = jax.jit(observe(function))(KEY, branch)
        flags = [bool(part[0, 0, -1]) for part in split_places(observation)]
        shapes = [place.use.shape for place in observation.places]
        assert shapes == [(1,), (2,), (2,), (3,), (3,), (3,)]
        assert flags == [shape == (branch + 1,) for shape in shapes]


def test_names_of_places() -> None:
    observation = jax.eval_shape(observe(apply_lifts), LIFTS, KEY)[1]
    found = [("/".join(p.path), p.axes, p.use.shape) for p in observation.places]
    assert found == [
        ("CheckpointBlock_0/Dropout_0", (), (2, 4)),
        ("JitBlock_0/Dropout_0", (), (2, 4)),
        ("layers/layers/Dropout_0", (("scan", 3),), (2, 4)),
        ("VmapBlock_0/Dropout_0", (("vmap", 5),), (2, 4)),
    ]


# Whole runs -----------------------------------------------------------------------

LAB = '''
import flax.linen as nn
import jax
import jax.numpy as jnp

ROGUE = False


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=True):
        return nn.Dropout(0.5, deterministic=deterministic)(nn.Dense(6)(x))


class Layer(nn.Module):
    block: type = Block

    @nn.compact
    def __call__(self, x, deterministic):
        return self.block(name="block")(x, deterministic), None


SPLIT = {"params": True, "dropout": True}


class Scanned(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, x, deterministic=True):
        block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
        layers = nn.scan(
            Layer, variable_axes={"params": 0}, split_rngs=SPLIT,
            in_axes=nn.broadcast, length=3)
        return layers(block, name="layers")(x, deterministic)[0]


class Vmapped(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=True):
        many = nn.vmap(
            Block, in_axes=None, axis_size=5, variable_axes={"params": 0},
            split_rngs=SPLIT)
        return many(name="many")(x, deterministic).mean(0)


class Rematted(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=True):
        return nn.remat(Block, static_argnums=(2,))(name="block")(x, deterministic)


class Jitted(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=True):
        return nn.jit(Block, static_argnums=(2,))(name="block")(x, deterministic)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=True):
        attend = nn.MultiHeadDotProductAttention(num_heads=2, dropout_rate=0.5)
        return attend(x[:, None], deterministic=deterministic)[:, 0]


class Branch(nn.Module):
    """Draws where the rows' mean is above 0."""

    @nn.compact
    def __call__(self, x, deterministic=True):
        if deterministic:
            return x
        key = self.make_rng("dropout")
        return jax.lax.cond(
            x.mean() > 0, lambda: x + jax.random.normal(key, x.shape), lambda: x)


class Computed(nn.Module):
    """A fold that the ledger can't derive: its number depends on the rows."""

    @nn.compact
    def __call__(self, x, deterministic=True):
        if deterministic:
            return x
        key = self.make_rng("dropout")
        key = jax.random.fold_in(key, (x.mean() * 1000).astype(jnp.int32))
        return x + jax.random.normal(key, x.shape)


class Rogue(nn.Module):
    """Draws from a key of its own when told to, which may be after the trace."""

    @nn.compact
    def __call__(self, x, deterministic=True):
        if ROGUE and not deterministic:
            x = x + jax.random.normal(jax.random.key(7), (1, 6))
        return x


class Twice(nn.Module):
    """Draws twice from one key; once in another shape, when told to."""

    @nn.compact
    def __call__(self, x, deterministic=True):
        if deterministic:
            return x
        key = self.make_rng("dropout")
        shape = (1, 6) if ROGUE else x.shape
        return x + jax.random.normal(key, shape)
'''

STREAMS: dict[str, Any] = {
    "params": {"phases": ["init"]},
    "dropout": {"phases": ["train"], "per": ["step", "microbatch"]},
    "noise": {"phases": ["train", "eval"], "per": ["step", "microbatch"]},
    "shuffle": {"kind": "host", "per": ["epoch"]},
    "split": {"kind": "host", "seed": 0},
}
PLAIN = [
    {"_target_": "models.Noise", "scale": 0.1, "name": "blur"},
    {"_target_": "models.Dropout", "rate": 0.5},
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """A user's package of modules."""
    home = tmp_path_factory.mktemp("lab")
    (home / "observed_lab.py").write_text(LAB)
    sys.path.insert(0, str(home))
    import observed_lab  # type: ignore[import-not-found]

    yield observed_lab
    sys.path.remove(str(home))
    sys.modules.pop("observed_lab")


@pytest.fixture(scope="module")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(
        path,
        x_train=rng.normal(size=(ROWS, WIDTH)).astype(np.float32),
        y_train=np.arange(ROWS) % CLASSES,
        x_test=rng.normal(size=(10, WIDTH)).astype(np.float32),
        y_test=np.arange(10) % CLASSES,
    )
    return path


Compile = Callable[..., Program]


@pytest.fixture
def compiled(arrays: Path, lab: ModuleType) -> Compile:
    """Layers before a Dense, and changes of groups or streams, to a program."""

    def compile_layers(
        *layers: Any, streams: dict[str, Any] | None = None, **groups: Any
    ) -> Program:
        named = [
            {"_target_": f"observed_lab.{layer}"} if isinstance(layer, str) else layer
            for layer in layers
        ]
        last = {"_target_": "flax.linen.Dense", "features": CLASSES}
        spec: dict[str, Any] = {
            "experiment": "tiny",
            "trusted": ["observed_lab"],
            "model": {"_target_": "models.Sequential", "layers": [*named, last]},
            "optimizer": {"_target_": "optax.sgd", "learning_rate": 0.1},
            "data": {"name": "arrays", "path": str(arrays), "batch_size": 8},
            "train": {"steps": STEPS, "steps_per_call": 6},
            "eval": {"every": 7, "batch_size": 4},
            "sinks": {"terminal": {"mode": "disabled"}, "wandb": {"mode": "disabled"}},
            "rng": {
                "seed": 3,
                "observe": True,
                "streams": {**copy.deepcopy(STREAMS), **(streams or {})},
            },
        }
        for name, values in groups.items():
            spec[name] |= values
        return compile_run(parse_spec(spec))

    return compile_layers


Recorded = tuple[dict[str, Any], str]


@pytest.fixture
def record(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs a program to its end and reads its `run.json`."""

    def run(program: Program, name: str = "run") -> dict[str, Any]:
        directory = tmp_path / name
        directory.mkdir()
        record_run(program, directory=directory, secrets=Secrets({}, ()))
        found: dict[str, Any] = json.loads((directory / "run.json").read_text())
        return found

    return run


def phases(**counts: tuple[int, int]) -> dict[str, Any]:
    return {n: {"draws": draws, "keys": keys} for n, (draws, keys) in counts.items()}


EVALS, PARTS = 3, 3  # after 7, 14 and 20 steps; 10 rows in batches of 4
NOISE = (1, EVALS * PARTS)
CARRIED = {
    "dropout": {"per": {"step": "carry", "microbatch": "fold_in"}},
    "noise": {"phases": ["train", "eval"], "per": {"step": "carry"}},
}
# name: layers, changes, (draws, keys) of each phase
RUNS: dict[str, tuple[list[Any], dict[str, Any], dict[str, tuple[int, int]]]] = {
    "plain": (PLAIN, {}, {"init": (1, 1), "train": (2, 2 * STEPS), "eval": NOISE}),
    "one step a call": (
        PLAIN,
        {"train": {"steps_per_call": 1}},
        {"init": (1, 1), "train": (2, 2 * STEPS), "eval": NOISE},
    ),
    "accumulation": (
        PLAIN,
        {"train": {"accumulation_steps": 4}},
        {"init": (1, 1), "train": (2, 2 * 4 * STEPS), "eval": NOISE},
    ),
    "carried": (
        PLAIN,
        {"streams": CARRIED, "train": {"accumulation_steps": 2}},
        # One key of noise for both microbatches, and for all parts of an evaluation.
        {"init": (1, 1), "train": (2, (1 + 2) * STEPS), "eval": (1, EVALS)},
    ),
    "rbg": (
        PLAIN,
        {"rng": {"impl": "rbg"}},
        {"init": (1, 1), "train": (2, 2 * STEPS), "eval": NOISE},
    ),
    "unsafe_rbg": (
        PLAIN,
        {"rng": {"impl": "unsafe_rbg"}, "streams": CARRIED},
        {"init": (1, 1), "train": (2, 2 * STEPS), "eval": (1, EVALS)},
    ),
    "not partitionable": (
        ["Scanned"],
        {"rng": {"partitionable": False}},
        {"init": (2, 1 + 3), "train": (1, 3 * STEPS)},
    ),
    "attention": (
        ["Attention"],
        {},
        {"init": (1 + 4, 1 + 4), "train": (1, STEPS)},
    ),
    "scan": (["Scanned"], {}, {"init": (2, 1 + 3), "train": (1, 3 * STEPS)}),
    "scan over remat": (
        [{"_target_": "observed_lab.Scanned", "remat": True}],
        {"train": {"accumulation_steps": 2}},
        {"init": (2, 1 + 3), "train": (1, 3 * 2 * STEPS)},
    ),
    "vmap": (["Vmapped"], {}, {"init": (2, 1 + 5), "train": (1, 5 * STEPS)}),
    "remat": (["Rematted"], {}, {"init": (2, 2), "train": (1, STEPS)}),
    "jit": (["Jitted"], {}, {"init": (2, 2), "train": (1, STEPS)}),
    "jit in front of plain": (
        ["Jitted", *PLAIN],
        {"train": {"accumulation_steps": 2}},
        {"init": (2, 2), "train": (3, 3 * 2 * STEPS), "eval": NOISE},
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_s_keys_are_its_ledger_s(
    name: str, compiled: Compile, record: Callable[..., dict[str, Any]]
) -> None:
    layers, changes, counts = RUNS[name]
    found = record(compiled(*layers, **changes))
    assert (found["status"], found["reason"]) == ("completed", "")
    assert found["observed"] == {
        "status": "equal",
        "draws": sum(draws for draws, _ in counts.values()),
        "keys": sum(keys for _, keys in counts.values()),
        "phases": phases(**counts),
        "beyond": [],
    }


def without_observing(program: Program) -> Program:
    spec = program.spec
    return replace(program, spec=replace(spec, rng=replace(spec.rng, observe=False)))


@pytest.mark.parametrize(
    "name", ["plain", "accumulation", "carried", "scan over remat"]
)
def test_no_bit_changes(
    name: str, compiled: Compile, record: Callable[..., dict[str, Any]]
) -> None:
    layers, changes, _ = RUNS[name]
    program = compiled(*layers, **changes)
    on, off = record(program, "on"), record(without_observing(program), "off")
    assert off["observed"] is None
    assert on["observed"]["status"] == "equal"
    for digest in ("keys", "params", "metrics"):
        assert on["digests"][digest] == off["digests"][digest]
    assert on["metrics"] == off["metrics"]


@pytest.mark.promotes
def test_no_bit_changes_step_by_step(
    make_spec: Any, record: Callable[..., dict[str, Any]]
) -> None:
    """A convolution on CPU: each call takes one step."""
    small = ("train.steps=3", "model.features=[4]", "model.channels=[4]")
    overrides = ("+experiment=cnn", *small, "eval.every=2", "sinks=none")
    program = compile_run(make_spec(*overrides, "rng.observe=true"))
    assert program.construct is Construct.STEP
    on, off = record(program, "on"), record(without_observing(program), "off")
    for digest in ("keys", "params", "metrics"):
        assert on["digests"][digest] == off["digests"][digest]
    draws = len([d for d in make_ledger(program)["draws"] if d["phase"] == "train"])
    assert on["observed"]["phases"]["train"] == {"draws": draws, "keys": 3 * draws}
    assert on["observed"]["status"] == "equal"


def test_off_is_the_very_same_program(compiled: Compile) -> None:
    """No key leaves the program: every output is a state, a metric or a base key."""
    program = without_observing(compiled(*PLAIN))
    with rng_flags(program.spec.rng):
        for lower in (program._lower_setup, program._lower_train, program._lower_eval):
            dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(lower().out_info)}
            assert dtypes <= {"int32", "float32", "key<fry>"}


def test_the_keys_that_make_rng_gives(compiled: Compile) -> None:
    """The same step by hand, without jit: Flax's own keys, as they are handed out."""
    program = compiled(*PLAIN)
    (state, _, hypers), _ = program.start_observed()
    collections = {"params": state.params, **state.collections}
    variables = jax.tree.map(np.array, collections)
    noted: list[Observation] = []

    class Noting:
        def expect(self, phase: Phase, first: int, *, steps: int = 1) -> Any:
            return None

        def compare(self, phase: Phase, first: int, **given: Any) -> str:
            noted.extend(given["observed"] if phase is Phase.TRAIN else [])
            return ""

    *_, outcome = train(program, watch=Noting())
    assert isinstance(outcome, Outcome)
    rows = [row for each in noted for row in np.asarray(each.words)]
    given: list[Words] = []
    original = Scope.make_rng

    def make_rng(self: Scope, name: str = "params") -> Any:
        key = original(self, name)
        given.append(tuple(jax.random.key_data(key).tolist()))
        return key

    with pytest.MonkeyPatch.context() as patch, rng_flags(program.spec.rng):
        patch.setattr(Scope, "make_rng", make_rng)
        for step in (0, 1, 13, 19):
            given.clear()
            rngs = {
                name: derive_key(
                    stream.ops(Phase.TRAIN, program.coordinates[Phase.TRAIN]),
                    impl="threefry2x32",
                    coordinates={"step": step},
                )
                for name, stream in program.plan.in_phase(Phase.TRAIN).items()
            }
            x = np.zeros((8, WIDTH), np.float32)
            program.model.apply(variables, x, rngs, hypers, train=True)
            found = drawn(replace(noted[0], words=rows[step]))
            assert found == Counter(given)
            assert found.total() == 2


def test_planned_keys_are_those_that_expand(compiled: Compile) -> None:
    """Also when asked from the middle, and with gaps; rules take turns."""
    layers = [PLAIN[1], *PLAIN]
    changes: dict[str, Any]
    for changes in (
        {"streams": {"noise": {**STREAMS["noise"], "seed": 7}}},
        {"streams": CARRIED},
        {"train": {"accumulation_steps": 2}},
    ):
        ledger = make_ledger(compiled("Scanned", *layers, **changes))
        planned = PlannedKeys(ledger, Phase.TRAIN, window=50)
        for first, steps in ((0, 3), (3, 40), (100, 1)):
            keys = np.asarray(planned.derive(first, steps=steps))
            for step in {first, first + steps - 1}:
                with rng_flags(rng_of(ledger)):
                    want = [
                        entry["key"]
                        for draw in ledger["draws"]
                        if draw["phase"] == "train"
                        for entry in expand(ledger, draw, step=step)
                    ]
                assert keys[step - first].tolist() == want


# Branches and what no ledger can say ------------------------------------------------


def test_branches_that_are_not_taken(
    compiled: Compile, record: Callable[..., dict[str, Any]]
) -> None:
    """Their keys are planned at every step, and drawn at some."""
    program = compiled("Branch")
    found = record(program)
    taken = 0
    for step in range(STEPS):
        rows = program.order.indices(step, steps=1)[0]
        taken += bool(program.data.x_train[rows].mean() > 0)
    assert 0 < taken < STEPS
    assert found["observed"]["status"] == "equal"
    assert found["observed"]["phases"]["train"] == {"draws": 1, "keys": taken}


def test_a_draw_that_the_ledger_can_not_derive(
    compiled: Compile, record: Callable[..., dict[str, Any]]
) -> None:
    program = compiled("Computed", *PLAIN)
    (untraced,) = (d for d in make_ledger(program)["draws"] if "untraced" in d)
    found = record(program)
    assert (found["status"], found["observed"]["status"]) == ("completed", "partial")
    assert found["observed"]["phases"]["train"] == {"draws": 2, "keys": 2 * STEPS}
    assert found["observed"]["beyond"] == [
        {
            "phase": "train",
            "path": ["layers_0"],
            "primitive": "random_bits",
            "why": untraced["untraced"],
            "keys": STEPS,
        }
    ]


# What goes wrong --------------------------------------------------------------------


def test_a_key_that_was_not_planned(
    compiled: Compile,
    record: Callable[..., dict[str, Any]],
    lab: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A module that draws more than it did when it was traced."""
    program = compiled("Rogue", *PLAIN)
    monkeypatch.setattr(lab, "ROGUE", True)
    found = record(program)
    assert found["status"] == "failed"
    assert found["reason"] == (
        "keys differ from the ledger in train at step 0: layers_0 drew random_bits "
        "[1, 6] from 00000000 00000007, which is not planned"
    )
    assert found["observed"]["status"] == "different"


def test_a_key_of_another_shape(
    compiled: Compile,
    record: Callable[..., dict[str, Any]],
    lab: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = compiled("Twice")
    ledger = make_ledger(program)
    monkeypatch.setattr(lab, "ROGUE", True)
    found = record(program)
    with rng_flags(program.spec.rng):
        (draw,) = (d for d in ledger["draws"] if d["phase"] == "train")
        (entry,) = expand(ledger, draw, step=0)
    key = " ".join(f"{word:08x}" for word in entry["key"])
    assert found["reason"] == (
        f"keys differ from the ledger in train at step 0: layers_0 drew random_bits "
        f"[1, 6] from {key}, the key of dropout layers_0 call 1 (random_bits [8, 6])"
    )


def tampered(program: Program, phase: str, change: Callable[[Any], None]) -> Any:
    """The ledger of a program after a change of one of its derivations."""
    ledger = make_ledger(program)
    (draw, *_) = (d for d in ledger["draws"] if d["phase"] == phase)
    change(draw["derivation"])
    return ledger


def add_one(derivation: Any) -> None:
    derivation[-1]["value"] += 1


def forget_the_step(derivation: Any) -> None:
    (op,) = (op for op in derivation if op.get("coordinate") == "step")
    del op["coordinate"]
    op["value"] = 0


@pytest.mark.parametrize(
    ("phase", "change", "where"),
    [
        ("init", add_one, r"in init: layers_2 drew random_bits \[6, 3\] from"),
        ("train", add_one, r"in train at step 0: blur drew random_bits \[8, 6\] from"),
        ("train", forget_the_step, r"in train at step 1: blur drew random_bits"),
        ("eval", add_one, r"in eval at step 7: blur drew random_bits \[4, 6\] from"),
    ],
)
def test_a_plan_that_was_tampered_with(
    phase: str,
    change: Any,
    where: str,
    compiled: Compile,
    record: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = compiled(*PLAIN)
    ledger = tampered(program, phase, change)
    monkeypatch.setattr("runner.recording.make_ledger", lambda _: ledger)
    found = record(program)
    assert found["status"] == "failed"

    assert re.search(where, found["reason"]), found["reason"]
    assert "which is not planned; " in found["reason"]
    assert "and not drawn" in found["reason"]


def test_a_planned_key_that_is_not_drawn(
    compiled: Compile,
    record: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = compiled(*PLAIN)
    ledger = make_ledger(program)
    (draw, *_) = (d for d in ledger["draws"] if d["phase"] == "train")
    more = copy.deepcopy(draw)
    add_one(more["derivation"])
    ledger["draws"].append({**more, "path": ["ghost"]})
    monkeypatch.setattr("runner.recording.make_ledger", lambda _: ledger)
    found = record(program)
    assert found["status"] == "failed"
    start = "keys differ from the ledger in train at step 0: noise ghost call 1 "
    assert found["reason"].startswith(f"{start}(random_bits [8, 6]) is planned with ")
    assert found["reason"].endswith(" and not drawn")


def test_a_run_that_fails_stops_soon(compiled: Compile) -> None:
    """One call is under way when the first is looked at; no more are made."""
    program = compiled(*PLAIN, eval={"every": None})

    class Suspicious:
        def expect(self, phase: Phase, first: int, *, steps: int = 1) -> Any:
            return None

        def compare(self, phase: Phase, first: int, **_: Any) -> str:
            return "" if phase is Phase.INIT else f"bad {phase} {first}"

    events = list(train(program, watch=Suspicious()))
    outcome = events[-1]
    assert isinstance(outcome, Outcome)
    assert (outcome.status, outcome.reason) == ("failed", "bad train 0")
    assert outcome.step == int(outcome.state.step) == 12  # two calls of six
    assert [e.first_step for e in events if isinstance(e, TrainRecord)] == [0, 6]
    assert not [e for e in events if isinstance(e, EvalRecord)]


def test_the_loop_waits_no_longer_for_the_device(compiled: Compile) -> None:
    """Planned keys are asked for before a call; keys are looked at one call behind."""
    log: list[str] = []

    class Noting:
        def expect(self, phase: Phase, first: int, *, steps: int = 1) -> Any:
            log.append(f"expect {phase} {first}+{steps}")
            return jnp.zeros(())

        def compare(self, phase: Phase, first: int, *, planned: Any, **_: Any) -> str:
            assert isinstance(planned, np.ndarray)  # fetched with all else
            log.append(f"compare {phase} {first}")
            return ""

    program = compiled(*PLAIN, train={"steps": 18}, eval={"every": 12})
    list(train(program, watch=Noting()))
    assert log == [
        "expect init 0+1",
        "compare init 0",
        "expect train 0+6",
        "expect train 6+6",
        "expect eval 12+1",
        "compare train 0",
        "expect train 12+6",
        "expect eval 18+1",
        "compare train 6",
        "compare eval 12",
        "compare train 12",
        "compare eval 18",
    ]


def test_a_step_that_is_not_finite(
    compiled: Compile, record: Callable[..., dict[str, Any]], arrays: Path
) -> None:
    """Steps after it are not taken: their rows repeat its keys, and don't count."""
    with np.load(arrays) as file:
        rows = dict(file)
    rows["x_train"][2 * 8] = 3e38  # twice that, where it is not dropped, is infinite
    np.savez(arrays.with_name("spoiled.npz"), **rows)
    spoiled = {"path": str(arrays.with_name("spoiled.npz")), "shuffle": None}
    found = record(compiled(*PLAIN, data=spoiled))
    assert found["reason"] == "loss or update not finite at step 2"
    assert found["observed"]["status"] == "equal"
    assert found["observed"]["phases"]["train"] == {"draws": 2, "keys": 2 * 3}


# One comparison by hand -------------------------------------------------------------


def ledger_of(*draws: dict[str, Any]) -> dict[str, Any]:
    rng = {"seed": 0, "impl": "threefry2x32"}
    flags = {"partitionable": True, "fix_separator": True}
    return {"rng": {**rng, **flags}, "sizes": {"steps_per_epoch": 5}, "draws": draws}


def draw_of(path: str, seed: int | None, **more: Any) -> dict[str, Any]:
    """A draw of 3 numbers from key(seed); from a key of unknown origin for None."""
    uses = [{"primitive": "random_bits", "shape": [3], "bits": 32}]
    draw = {"phase": "train", "stream": "s", "path": [path], "call": 1, "axes": {}}
    known = {"untraced": "who knows"}
    if seed is not None:
        known = {"derivation": [{"op": "seed", "value": seed}]}  # type: ignore[dict-item]
    return {**draw, "uses": uses, **known, **more}


def seen(*keys: tuple[str, Any], hidden: tuple[Hidden, ...] = ()) -> Observation:
    """One step in which draws of 3 numbers took place."""
    use = Use("random_bits", (3,), 32)
    data = [jax.random.key_data(key).tolist() for _, key in keys]
    places = tuple(
        Place((path,), use, (), len(words))
        for (path, _), words in zip(keys, data, strict=True)
    )
    words = [word for each in data for word in (*each, 1)]
    return Observation(np.array([words], np.uint32), places, hidden)


def compare(ledger: Any, observation: Observation) -> tuple[str, str]:
    """What differs at step 4, and the status."""
    comparison = Comparison(ledger, window=5)
    planned = np.asarray(comparison.expect(Phase.TRAIN, 4))
    what = comparison.compare(Phase.TRAIN, 4, planned=planned, observed=[observation])
    return what, comparison.to_plain()["status"]


ONE, TWO = jax.random.key(1), jax.random.key(2)
AT_4 = "keys differ from the ledger in train at step 4: "
SPELLED = "random_bits [3]"
INSIDE = Hidden(("b",), "random_bits", "inside something")
COMPARISONS: dict[str, tuple[Any, Observation, tuple[str, str]]] = {
    "equal": (ledger_of(draw_of("a", 1)), seen(("a", ONE)), ("", "equal")),
    "again in the backward pass": (
        ledger_of(draw_of("a", 1)),
        seen(("a", ONE), ("x/a", ONE)),
        ("", "equal"),
    ),
    "nothing": (ledger_of(), seen(), ("", "equal")),
    "two draws of one key": (
        ledger_of(draw_of("a", 1), draw_of("b", 1)),
        seen(("a", ONE), ("b", ONE)),
        ("", "equal"),
    ),
    "not planned": (
        ledger_of(draw_of("a", 1)),
        seen(("a", ONE), ("b", TWO)),
        (
            f"{AT_4}b drew {SPELLED} from 00000000 00000002, which is not planned",
            "different",
        ),
    ),
    "of another generator": (
        ledger_of(draw_of("a", 1)),
        seen(("a", ONE), ("b", jax.random.key(1, impl="rbg"))),
        (
            f"{AT_4}b drew {SPELLED} from 00000000 00000001 00000000 00000001, which "
            "is not planned",
            "different",
        ),
    ),
    "not drawn": (
        ledger_of(draw_of("a", 1), draw_of("b", 2)),
        seen(("a", ONE)),
        (
            f"{AT_4}s b call 1 ({SPELLED}) is planned with 00000000 00000002 and not "
            "drawn",
            "different",
        ),
    ),
    "in a branch": (
        ledger_of(draw_of("a", 1), draw_of("b", 2, conditional=True)),
        seen(("a", ONE)),
        ("", "equal"),
    ),
    "hidden": (
        ledger_of(draw_of("a", 1), draw_of("b", 2)),
        seen(("a", ONE), hidden=(INSIDE,)),
        ("", "partial"),
    ),
    "a loop that is longer than there is room for": (
        ledger_of(draw_of("a", 1)),
        Observation(
            np.tile(np.array([0, 1, 1], np.uint32), (1, 64)),
            (Place(("a",), Use("random_bits", (3,), 32), (("while", 64),), 2),),
        ),
        ("", "partial"),
    ),
    "of unknown origin": (
        ledger_of(draw_of("a", 1), draw_of("b", None)),
        seen(("a", ONE), ("b", TWO)),
        ("", "partial"),
    ),
    "of unknown origin, and another's": (
        ledger_of(draw_of("a", 1), draw_of("b", None)),
        seen(("a", ONE), ("b", ONE)),
        (
            f"{AT_4}b drew {SPELLED} from 00000000 00000001, the key of s a call 1 "
            f"({SPELLED})",
            "different",
        ),
    ),
}


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparison(name: str) -> None:
    ledger, observation, expected = COMPARISONS[name]
    assert compare(ledger, observation) == expected


# The command ------------------------------------------------------------------------


def test_the_command(runner: Any, tmp_path: Path) -> None:
    done = runner(
        "+experiment=dropout",
        "rng.observe=true",
        "train.steps=5",
        "sinks.wandb.mode=disabled",
        f"hydra.run.dir={tmp_path / 'run'}",
    )
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = (li for li in done.stdout.splitlines() if li.startswith("observed"))
    said = "3 keys at 3 draws in init, 10 keys at 2 draws in train"
    assert line.split(None, 1)[1] == f"{said}: equal to the ledger"
    found = json.loads((tmp_path / "run" / "run.json").read_text())
    assert found["observed"]["keys"] == 13


def test_plan_is_the_same(runner: Any) -> None:
    plans = [
        json.loads(runner("plan", "+experiment=dropout", "--json", *more).stdout)
        for more in ([], ["rng.observe=true"])
    ]
    for plan in plans:
        del plan["costs"]  # of the compiled program, which has more outputs
    assert plans[0] == plans[1]
