# SPDX-License-Identifier: Apache-2.0
"""Random streams and random small models: the ledger is complete and replays."""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runner.models import Dropout, Noise, Sequential
from test_ledger import consumers, entries, replay, words

from runner.compile import compile_run
from runner.keys import derive_base_keys, rng_flags
from runner.ledger import make_ledger
from runner.parse import to_plain
from runner.records.digests import digest_plain
from runner.spec import Derive, Phase, parse_spec

ROWS, WIDTH, CLASSES = 12, 3, 2
FEW = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
MORE = settings(FEW, max_examples=15)


@pytest.fixture(scope="module")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    x = rng.normal(size=(ROWS, WIDTH)).astype(np.float32)
    y = np.arange(ROWS) % CLASSES
    np.savez(path, x_train=x, y_train=y, x_test=x[:5], y_test=y[:5])
    return path


# Models as trees of config nodes --------------------------------------------------

dense = st.builds(
    lambda n: {"_target_": "flax.linen.Dense", "features": n}, st.integers(1, 4)
)
dropout = st.builds(
    lambda r: {"_target_": "models.Dropout", "rate": r},
    st.sampled_from([0.0, 0.3, 1.0]),
)
noise = st.builds(
    lambda s: {"_target_": "models.Noise", "scale": s}, st.sampled_from([0.0, 0.1])
)
activation = st.just({"_target_": "flax.linen.relu"})
layers = st.recursive(
    st.lists(dense | dropout | noise | activation, min_size=1, max_size=3),
    lambda inner: st.lists(
        dense
        | dropout
        | inner.map(lambda some: {"_target_": "models.Sequential", "layers": some}),
        min_size=1,
        max_size=3,
    ),
    max_leaves=5,
)
HEAD = {"_target_": "flax.linen.Dense", "features": CLASSES}


@st.composite
def streams(draw: Any) -> dict[str, Any]:
    """Streams that a model of the above may draw from, whose keys are all distinct."""
    out: dict[str, Any] = {"params": {"phases": ["init"]}}
    coordinates = draw(st.permutations(["step", "microbatch"]))
    phases = {"dropout": ["train"], "noise": ["train", "eval"]}
    for name in draw(st.permutations(["dropout", "noise"])):
        per: Any = list(coordinates)
        if draw(st.booleans()):
            per = {"step": "carry", "microbatch": "fold_in"}
        out[name] = {"phases": phases[name], "per": per}
        derive = draw(st.sampled_from(["name", "own", *Derive]))
        if derive == "own":
            out[name]["seed"] = draw(st.integers(0, 2**32 - 1))
        else:
            out[name]["derive"] = str(derive)
    if draw(st.booleans()):
        out = dict(reversed(out.items()))
    host = {"shuffle": {"kind": "host", "per": ["epoch"]}, "split": {"kind": "host"}}
    return {**out, **host}


def distinct_bases(declared: dict[str, Any]) -> bool:
    """Two streams at one root are two names for one key: hazard R006 is for those."""
    spec = parse_spec(config(Path("x.npz"), [HEAD], declared))
    roots = [
        s.seed if s.seed is not None else "root"
        for s in spec.rng.streams.values()
        if s.kind == "jax" and s.derivation is Derive.ROOT
    ]
    splits = [s for s in spec.rng.streams.values() if s.derivation is Derive.SPLIT]
    # Children of a split are folds of the root (jax >= 0.5): 0 and 1 are steps, too.
    return len(set(roots)) == len(roots) and not (roots and splits)


def config(path: Path, some: list[Any], declared: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": {"_target_": "models.Sequential", "layers": [*some, HEAD]},
        "optimizer": {"_target_": "optax.sgd", "learning_rate": 0.1},
        "data": {"name": "arrays", "path": str(path), "batch_size": 4},
        "train": {"steps": 4, "accumulation_steps": 2},
        "eval": {"batch_size": 3},
        "rng": {"seed": 11, "streams": declared},
    }


def wants(some: list[Any], last: str) -> int:
    """How many modules of a kind a tree of nodes has."""
    total = 0
    for node in some:
        total += node["_target_"].endswith(last)
        total += wants(node.get("layers", []), last)
    return total


def by_hand(some: list[Any]) -> list[Any]:
    """The same tree as Flax modules."""
    made: list[Any] = []
    for node in some:
        kind = node["_target_"].rpartition(".")[2]
        made.append(
            {
                "Dense": lambda n: nn.Dense(n["features"]),
                "Dropout": lambda n: Dropout(n["rate"]),
                "Noise": lambda n: Noise(n["scale"]),
                "relu": lambda n: nn.relu,
                "Sequential": lambda n: Sequential(by_hand(n["layers"])),
            }[kind](node)
        )
    return made


@MORE
@given(some=layers, declared=streams().filter(distinct_bases))
def test_ledger_of_a_random_program(
    arrays: Path, some: list[Any], declared: dict[str, Any]
) -> None:
    """Compiles; one draw a module; all keys distinct; all derivations replay."""
    data = config(arrays, some, declared)
    program = compile_run(parse_spec(data))
    ledger = make_ledger(program)
    counts = {
        phase: sum(
            len(draw["uses"]) for draw in ledger["draws"] if draw["phase"] == phase
        )
        for phase in ("init", "train", "eval")
    }
    masks, noises = wants(some, "Dropout"), wants(some, "Noise")
    assert counts == {
        "init": wants([*some, HEAD], "Dense"),
        "train": masks + noises,
        "eval": noises,
    }
    assert all("derivation" in draw for draw in ledger["draws"])

    steps = (0, 2)
    found = entries(ledger, 0, "init")
    found += [
        e for s in steps for p in ("train", "eval") for e in entries(ledger, s, p)
    ]
    keys = [tuple(entry["key"]) for entry in found]
    assert len(set(keys)) == len(keys)
    assert len(found) == counts["init"] + len(steps) * (
        2 * counts["train"] + 2 * counts["eval"]
    )
    with rng_flags(program.spec.rng):
        for entry in found[:: max(1, len(found) // 5)]:
            key = replay(entry["derivation"], "threefry2x32")
            assert words(key) == tuple(entry["key"])
    again = make_ledger(compile_run(parse_spec(to_plain(program.spec))))
    assert digest_plain(again) == digest_plain(ledger)


@MORE
@given(some=layers)
def test_as_many_draws_as_consumers(arrays: Path, some: list[Any]) -> None:
    """Counted in the same program by hand, in jaxprs within jaxprs."""
    declared = {
        "params": {"phases": ["init"]},
        "dropout": {"per": ["step"]},
        "noise": {"phases": ["train", "eval"], "per": ["step"]},
        "shuffle": {"kind": "host"},
        "split": {"kind": "host"},
    }
    program = compile_run(parse_spec(config(arrays, some, declared)))
    module = Sequential([*by_hand(some), nn.Dense(CLASSES)])
    seeds = {name: s.seed for name, s in program.plan.streams.items()}
    keys = derive_base_keys(program.plan, seeds=seeds)
    x = jnp.zeros((2, WIDTH))
    variables = jax.eval_shape(lambda k: module.init(k, x, deterministic=True), keys)
    for phase, deterministic in ((Phase.TRAIN, False), (Phase.EVAL, True)):

        def apply(keys: Any, v: Any, off: bool = deterministic) -> Any:
            return module.apply(v, x, deterministic=off, rngs=keys)

        closed = jax.make_jaxpr(apply)(keys, variables)
        draws = program.traces[phase].draws
        uses = [(d.use.primitive, d.use.shape, d.use.bits) for d in draws]
        assert len(uses) == len(consumers(closed.jaxpr))
        assert not any(draw.untraced for draw in draws)


@FEW
@given(some=layers, data=st.data())
def test_another_stream_moves_no_key(arrays: Path, some: list[Any], data: Any) -> None:
    """A declared stream more, anywhere, or another seed of another stream."""
    declared = data.draw(streams())
    for stream in declared.values():
        if stream.get("derive") == "split":
            stream["derive"] = "name"
    name = data.draw(st.sampled_from(["extra", "aaa"]))
    more = {name: {"per": ["step"]}, **declared}
    if data.draw(st.booleans()):
        more = {**declared, name: {"seed": 3}}
    ledgers = [
        make_ledger(compile_run(parse_spec(config(arrays, some, d))))
        for d in (declared, more)
    ]
    assert ledgers[0]["draws"] == ledgers[1]["draws"]
    assert digest_plain(ledgers[0]) != digest_plain(ledgers[1])


@FEW
@given(some=layers, seeds=st.lists(st.integers(0, 2**32 - 1), min_size=2, unique=True))
def test_seeds_share_no_key(arrays: Path, some: list[Any], seeds: list[int]) -> None:
    declared = {
        "params": {"phases": ["init"]},
        "dropout": {"per": ["step"]},
        "noise": {"phases": ["train", "eval"], "per": ["step"]},
        "shuffle": {"kind": "host"},
        "split": {"kind": "host"},
    }
    found: list[tuple[int, ...]] = []
    for seed in seeds[:2]:
        data = config(arrays, some, declared)
        data["rng"]["seed"] = seed
        ledger = make_ledger(compile_run(parse_spec(data)))
        found += {tuple(e["key"]) for e in entries(ledger, 3)}
    assert len(set(found)) == len(found)
