# SPDX-License-Identifier: Apache-2.0
"""The ledger: rules that replay with `jax.random` alone, and Flax's own keys."""

import copy
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core.scope import Scope
from jax.extend.core import ClosedJaxpr, Jaxpr
from runner.models import Dropout, Noise, Sequential
from test_audit import consumed

from runner.audit.trace import trace_draws
from runner.compile import compile_run
from runner.keys import derive_key, rng_flags
from runner.ledger import (
    expand,
    first_step,
    make_ledger,
    rng_of,
    spell_derivation,
    stream_rows,
)
from runner.parse import to_plain
from runner.program import Program, make_parts
from runner.records.digests import digest_config, digest_plain
from runner.spec import Phase, parse_spec
from runner.step import Batch, make_eval_step, make_step

ROWS, WIDTH, CLASSES = 40, 6, 3
STEPS = (0, 3, 12345)

LAYERS = [
    {"_target_": "flax.linen.Dense", "features": 5},
    {"_target_": "models.Noise", "scale": 0.1, "name": "blur"},
    {"_target_": "models.Dropout", "rate": 0.5},
    {
        "_target_": "models.Sequential",
        "layers": [{"_target_": "models.Dropout", "rate": 0.25, "name": "deep"}],
    },
    {"_target_": "flax.linen.Dense", "features": CLASSES},
]
STREAMS: dict[str, Any] = {
    "params": {"phases": ["init"]},
    "dropout": {"phases": ["train"], "per": ["step", "microbatch"]},
    "noise": {"phases": ["train", "eval"], "per": ["step", "microbatch"]},
    "shuffle": {"kind": "host", "per": ["epoch"]},
    "split": {"kind": "host", "seed": 0},
}


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


def config(path: Path, **streams: Any) -> dict[str, Any]:
    return {
        "experiment": "tiny",
        "model": {"_target_": "models.Sequential", "layers": copy.deepcopy(LAYERS)},
        "optimizer": {"_target_": "optax.sgd", "learning_rate": 0.1},
        "data": {"name": "arrays", "path": str(path), "batch_size": 8},
        "train": {"steps": 20},
        "eval": {"every": 7, "batch_size": 4},
        "rng": {"seed": 3, "streams": {**copy.deepcopy(STREAMS), **streams}},
    }


VARIANTS: dict[str, Any] = {
    "default": {},
    "carry": {
        "streams": {
            "dropout": {"per": {"step": "carry", "microbatch": "fold_in"}},
            "noise": {"phases": ["train", "eval"], "per": {"step": "carry"}},
        }
    },
    "split": {
        "streams": {
            name: {**STREAMS[name], "derive": "split"}
            for name in ("params", "dropout", "noise")
        }
    },
    "own_seeds": {
        "streams": {
            "params": {"phases": ["init"], "seed": 2**32 - 1},
            "dropout": {"per": ["epoch", "step"], "seed": 2**31, "derive": "name"},
            "noise": {**STREAMS["noise"], "seed": 7},
        }
    },
    "root": {"streams": {"dropout": {"per": ["step"], "derive": "root"}}},
    "rbg": {"rng": {"impl": "rbg"}},
    "unsafe_rbg": {"rng": {"impl": "unsafe_rbg"}},
    "not_partitionable": {
        "rng": {"partitionable": False},
        "streams": {
            name: {**STREAMS[name], "derive": "split"} for name in ("dropout", "noise")
        },
    },
    "no_separator": {"rng": {"fix_separator": False}},
    "accumulation": {"train": {"accumulation_steps": 4}},
    "bfloat16": {"train": {"compute_dtype": "bfloat16"}},
    "one_eval_batch": {"eval": {"batch_size": 10}},
}


def compile_variant(path: Path, name: str) -> Program:
    variant = VARIANTS[name]
    data = config(path, **variant.get("streams", {}))
    for group in ("rng", "train", "eval"):
        data[group] |= variant.get(group, {})
    return compile_run(parse_spec(data))


@pytest.fixture(scope="module")
def programs(arrays: Path) -> Any:
    """Programs by the name of their variant; each is traced once."""
    made: dict[str, Program] = {}

    def program(name: str) -> Program:
        if name not in made:
            made[name] = compile_variant(arrays, name)
        return made[name]

    return program


def replay(derivation: list[dict[str, Any]], impl: str) -> Any:
    """What a reader does who has `jax.random` and not this project."""
    key: Any = None
    for op in derivation:
        if op["op"] == "seed":
            key = jax.random.key(op["value"], impl=impl)
        elif op["op"] == "fold_in":
            key = jax.random.fold_in(key, op["value"])
        elif op["op"] == "split":
            key = jax.random.split(key, op["of"])[op["index"]]
        else:
            raise AssertionError(op)
    return key


def words(key: Any) -> tuple[int, ...]:
    return tuple(np.asarray(jax.random.key_data(key)).astype(int).tolist())


def entries(ledger: Any, step: int, phase: str | None = None) -> list[dict[str, Any]]:
    with rng_flags(rng_of(ledger)):
        return [
            entry
            for draw in ledger["draws"]
            if phase in (None, draw["phase"])
            for entry in expand(ledger, draw, step=step)
        ]


# Replay ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_derivations_replay(programs: Any, name: str) -> None:
    program = programs(name)
    ledger = json.loads(json.dumps(make_ledger(program), allow_nan=False))
    assert ledger == make_ledger(program)
    rng = ledger["rng"]
    replayed: dict[str, Any] = {}
    steps = (*STEPS[:-1], 77) if name == "carry" else STEPS  # splits for each step
    for step in steps:
        found = entries(ledger, step)
        assert {entry["phase"] for entry in found} == {"init", "train", "eval"}
        with rng_flags(program.spec.rng):
            for entry in found:
                text = json.dumps(entry["derivation"])
                if text not in replayed:
                    replayed[text] = words(replay(entry["derivation"], rng["impl"]))
                assert tuple(entry["key"]) == replayed[text]
                assert entry["impl"] == rng["impl"]
                at_step = None if entry["phase"] == "init" else step
                assert entry["step"] == at_step
                json.dumps(entry, allow_nan=False)


@pytest.mark.parametrize("name", ["default", "split", "accumulation", "one_eval_batch"])
def test_all_keys_are_distinct(programs: Any, name: str) -> None:
    """Over phases, places, steps, microbatches and batches of an evaluation."""
    ledger = make_ledger(programs(name))
    found = [e for step in (0, 1, 5) for e in entries(ledger, step)]
    keys = {tuple(e["key"]) for e in found}
    once = [e for e in found if e["phase"] != "init"]
    assert len(keys) == len(once) + len(entries(ledger, 0, "init"))


def test_a_run_far_beyond_its_end(programs: Any) -> None:
    """A step that was never trained has keys, too."""
    ledger = make_ledger(programs("default"))
    for entry in entries(ledger, 2**31 - 1, "train"):
        assert {"op": "fold_in", "value": 2**31 - 1, "why": "step"} in entry[
            "derivation"
        ]


# Shape ----------------------------------------------------------------------------


def test_ledger_of_the_default(programs: Any) -> None:
    ledger = make_ledger(programs("default"))
    assert ledger["sizes"] == {
        "steps": 20,
        "steps_per_epoch": ROWS // 8,
        "microbatches": 1,
        "eval_batches": 3,
        "eval_every": 7,
    }
    assert ledger["rng"] == {
        "seed": 3,
        "impl": "threefry2x32",
        "partitionable": True,
        "fix_separator": True,
    }
    assert [stream["name"] for stream in ledger["streams"]] == list(STREAMS)
    places = {
        (d["phase"], d["stream"], "/".join(d["path"]), d["call"])
        for d in ledger["draws"]
    }
    assert places == {
        ("init", "params", "layers_0", 1),
        ("init", "params", "layers_4", 1),
        ("train", "noise", "blur", 1),
        ("train", "dropout", "layers_2", 1),
        ("train", "dropout", "layers_3/deep", 1),
        ("eval", "noise", "blur", 1),
    }
    for draw in ledger["draws"]:
        assert "untraced" not in draw
        assert draw["axes"] == {}
        (use,) = draw["uses"]
        assert (use["primitive"], use["bits"]) == ("random_bits", 32)
    rows = {
        (d["phase"], "/".join(d["path"])): d["uses"][0]["shape"]
        for d in ledger["draws"]
    }
    assert rows["train", "layers_2"] == [8, 5]
    assert rows["init", "layers_4"] == [5, CLASSES]


def test_microbatches_and_eval_batches_have_entries(programs: Any) -> None:
    ledger = make_ledger(programs("accumulation"))
    train, evaluation = entries(ledger, 2, "train"), entries(ledger, 2, "eval")
    assert [e["index"] for e in train if e["stream"] == "noise"] == [
        {"microbatch": n} for n in range(4)
    ]
    assert [e["index"] for e in evaluation] == [{"microbatch": n} for n in range(3)]
    assert {tuple(d["uses"][0]["shape"]) for d in ledger["draws"][3:5]} == {(2, 5)}
    ledger = make_ledger(programs("one_eval_batch"))
    assert [e["index"] for e in entries(ledger, 2, "eval")] == [{}]


def test_carry_is_a_chain_of_splits(programs: Any) -> None:
    ledger = make_ledger(programs("carry"))
    (entry,) = (e for e in entries(ledger, 2, "train") if e["path"] == ["layers_2"])
    on = {"op": "split", "index": 1, "of": 2, "why": "carried on"}
    here = {"op": "split", "index": 0, "of": 2, "why": "step 2"}
    assert entry["derivation"][2:5] == [on, on, here]
    (rule,) = (d["derivation"] for d in ledger["draws"] if d["path"] == ["layers_2"])
    assert rule[2] == {"op": "carry", "coordinate": "step", "why": "step"}


@pytest.mark.parametrize(
    ("every", "steps", "first"),
    [(7, 20, 7), (None, 20, 20), (50, 20, 20), (20, 20, 20)],
)
def test_first_step(every: int | None, steps: int, first: int) -> None:
    """Where an entry is first drawn from: an evaluation comes after some steps."""
    ledger = {"sizes": {"eval_every": every, "steps": steps}}
    assert first_step(ledger, {"phase": "eval"}) == first
    assert first_step(ledger, {"phase": "train"}) == 0
    assert first_step(ledger, {"phase": "init"}) == 0


def test_stream_rows(programs: Any) -> None:
    program = programs("own_seeds")
    rows = {row.name: row for row in stream_rows(make_ledger(program))}
    assert list(rows) == list(STREAMS)
    params, dropout, shuffle = rows["params"], rows["dropout"], rows["shuffle"]
    assert params.derivation == "key(4294967295)"
    assert params.key == "00000000 ffffffff"
    assert params.draws == ("init layers_0", "init layers_4")
    assert dropout.derivation == "fold_in(key(2147483648), 457968169)"
    assert (dropout.per, dropout.phases) == ("epoch, step", "train")
    assert (shuffle.kind, shuffle.derivation) == ("host", "Philox(SeedSequence)")
    spawn_key = int.from_bytes(hashlib.sha256(b"shuffle").digest()[:4])
    assert shuffle.key == f"3, ({spawn_key}, epoch)"
    assert rows["split"].key.startswith("0, (")
    assert (shuffle.draws, rows["split"].draws) == (("data.shuffle",), ("data.split",))
    carried = {row.name: row for row in stream_rows(make_ledger(programs("carry")))}
    assert carried["dropout"].per == "step (carry), microbatch"


def test_stream_row_keys_are_base_keys(programs: Any) -> None:
    for name in ("default", "split", "rbg"):
        program = programs(name)
        ledger = make_ledger(program)
        with rng_flags(program.spec.rng):
            for stream in ledger["streams"]:
                if stream["kind"] == "jax":
                    key = replay(stream["derivation"], ledger["rng"]["impl"])
                    assert words(key) == tuple(stream["key"])


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([{"op": "seed", "value": 3}], "key(3)"),
        (
            [{"op": "seed", "value": 3}, {"op": "split", "index": 1, "of": 4}],
            "split(key(3), 4)[1]",
        ),
        (
            [
                {"op": "seed", "value": 0},
                {"op": "carry", "coordinate": "step"},
                {"op": "fold_in", "coordinate": "microbatch"},
                {"op": "split", "index": "scan:layers", "of": 2},
                {"op": "fold_in", "value": 9},
            ],
            "fold_in(split(fold_in(carry(key(0), step), microbatch), 2)[scan:layers], "
            "9)",
        ),
        (
            [
                {"op": "seed", "value": 0},
                {"op": "fold_in", "value": {"offset": -1, "axes": {"b": 3, "a": -1}}},
                {"op": "split", "index": {"offset": 2, "axes": {"a": -2}}, "of": 9},
                {
                    "op": "repeat",
                    "times": {"offset": 2, "axes": {"scan:x": -1}},
                    "counter": "turn",
                    "body": [
                        {"op": "split", "index": 0, "of": 2},
                        {"op": "fold_in", "value": {"offset": 0, "axes": {"turn": 1}}},
                    ],
                },
            ],
            "repeat(split(fold_in(key(0), -a + 3 * b - 1), 9)[-2 * a + 2], "
            "key -> fold_in(split(key, 2)[0], turn), -scan:x + 2)",
        ),
    ],
)
def test_spell_derivation(rows: Any, text: str) -> None:
    assert spell_derivation(rows) == text


def many_ways(rngs: Any) -> Any:
    """Keys of computed numbers, of parts, carried, and out of loops within loops."""
    key, split, fold_in = rngs["noise"], jax.random.split, jax.random.fold_in

    def turn(carry: Any, i: Any) -> Any:
        def inner(c: Any, j: Any) -> Any:
            return fold_in(c, 2 * i + j), jax.random.bits(c)

        last, bits = jax.lax.scan(inner, carry, jnp.arange(2))
        return split(last)[1], (bits, jax.random.bits(fold_in(key, 5 - i)))

    last, bits = jax.lax.scan(turn, key, jnp.arange(3), reverse=True)
    rows = jax.vmap(jax.random.bits)(split(key, (2, 3)).reshape(-1)[1:4])
    parts = jax.vmap(jax.random.bits)(jnp.stack([last, fold_in(last, 2**32 - 1)]))
    return bits, rows, parts


def test_computed_and_carried_keys_replay(arrays: Path) -> None:
    """As rows of JSON, by `jax.random` alone, at each index and step."""
    program = compile_variant(arrays, "carry")
    trace = program.traces[Phase.TRAIN]
    found = trace_draws(many_ways, {"noise": jax.random.key(0)})
    object.__setattr__(trace, "draws", found.draws)
    ledger = json.loads(json.dumps(make_ledger(program), allow_nan=False))
    assert ledger == make_ledger(program)
    noise = program.plan.streams["noise"]
    ops = noise.ops(Phase.TRAIN, program.coordinates[Phase.TRAIN])
    for step in (0, 3):
        start = derive_key(ops, impl="threefry2x32", coordinates={"step": step})
        rngs = {"noise": start}
        real = consumed(jax.make_jaxpr(many_ways)(rngs), rngs)
        rows = entries(ledger, step, "train")
        assert {tuple(row["key"]) for row in rows} == set(real)
        for row in rows:
            assert {op["op"] for op in row["derivation"]} <= {
                "seed",
                "fold_in",
                "split",
            }
            key = replay(row["derivation"], "threefry2x32")
            assert words(key) == tuple(row["key"])
    rule = ledger["draws"][-1]
    assert rule["phase"] == "eval"
    kinds = [op["op"] for d in ledger["draws"] for op in d.get("derivation", ())]
    assert kinds.count("repeat") >= 4


def test_untraced_draws_are_listed() -> None:
    ledger = {
        "rng": {
            "seed": 0,
            "impl": "threefry2x32",
            "partitionable": True,
            "fix_separator": True,
        },
        "sizes": {"steps_per_epoch": 2},
    }
    draw = {
        "phase": "train",
        "stream": None,
        "path": ["a"],
        "call": None,
        "axes": {},
        "uses": [],
        "untraced": "why",
    }
    (entry,) = expand(ledger, draw, step=4)
    assert (entry["key"], entry["derivation"]) == (None, None)
    assert (entry["untraced"], entry["step"], entry["index"]) == ("why", 4, {})


def test_one_key_with_two_uses_is_one_entry(arrays: Path) -> None:
    """Two layers of one name hash can't be had; one key used twice can."""
    data = config(arrays)
    data["model"]["layers"][2] = {
        "_target_": "flax.linen.Dropout",
        "rate": 0.5,
    }
    program = compile_run(parse_spec(data))
    draws = program.traces[Phase.TRAIN].draws
    object.__setattr__(program.traces[Phase.TRAIN], "draws", (*draws, draws[0]))
    ledger = make_ledger(program)
    train = [d for d in ledger["draws"] if d["phase"] == "train"]
    assert sorted(len(d["uses"]) for d in train) == [1, 1, 2]


# Digests --------------------------------------------------------------------------


def changed(data: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    data = copy.deepcopy(data)
    *parents, last = path.split(".")
    node: Any = data
    for name in parents:
        node = node[int(name)] if name.isdigit() else node[name]
    node[last] = value
    return data


@pytest.mark.parametrize("name", ["default", "carry", "accumulation"])
def test_digest_of_two_builds(programs: Any, arrays: Path, name: str) -> None:
    again = make_ledger(compile_variant(arrays, name))
    assert digest_plain(again) == digest_plain(make_ledger(programs(name)))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("rng.seed", 4),
        ("rng.impl", "rbg"),
        ("rng.partitionable", False),
        ("rng.fix_separator", False),
        ("rng.streams.noise.seed", 1),
        ("rng.streams.dropout.per", ["epoch", "step"]),
        ("rng.streams.dropout.derive", "root"),
        ("rng.streams.split.seed", 1),
        ("rng.streams.shuffle.per", []),
        ("rng.streams.extra", {}),
        ("model.layers.0.features", 4),
        ("model.layers.1.name", "fog"),
        ("data.batch_size", 4),
        ("train.steps", 21),
        ("train.accumulation_steps", 2),
        ("eval.batch_size", 5),
    ],
)
def test_what_changes_the_digest(
    programs: Any, arrays: Path, path: str, value: Any
) -> None:
    """All that a key, or the number of draws from it, depends on."""
    data = changed(config(arrays), path, value)
    ledger = make_ledger(compile_run(parse_spec(data)))
    assert digest_plain(ledger) != digest_plain(make_ledger(programs("default")))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("optimizer.learning_rate", 0.7),
        ("model.layers.2.rate", 0.9),
        ("model.layers.2.rate", 0.0),
        ("model.layers.1.scale", 3.0),
        ("train.steps_per_call", 3),
        ("train.clip_norm", 1.0),
        ("train.compile_cache", None),
        ("eval.metric", "loss"),
        ("rng.allow", ["R005"]),
        ("rng.fallback", "params"),
        ("seed", 9),
    ],
)
def test_what_does_not_change_the_digest(
    programs: Any, arrays: Path, path: str, value: Any
) -> None:
    """Rates, step sizes and how the loop is run: the keys are the same."""
    data = changed({**config(arrays), "seed": 0}, path, value)
    ledger = make_ledger(compile_run(parse_spec(data)))
    assert digest_plain(ledger) == digest_plain(make_ledger(programs("default")))


@pytest.mark.parametrize("kind", ["coordinates", "streams"])
def test_config_digest_sees_an_order_that_counts(arrays: Path, kind: str) -> None:
    """Two configs whose keys differ are two configs."""
    data = config(arrays)
    streams = data["rng"]["streams"]
    for name in ("dropout", "noise"):
        streams[name]["derive"] = "split"
    data["train"]["accumulation_steps"] = 2
    left = compile_run(parse_spec(data))
    if kind == "coordinates":
        streams["dropout"]["per"] = ["microbatch", "step"]
    else:
        data["rng"]["streams"] = dict(reversed(streams.items()))
    right = compile_run(parse_spec(data))
    ledgers = [make_ledger(program) for program in (left, right)]
    assert entries(ledgers[0], 1, "train") != entries(ledgers[1], 1, "train")
    assert digest_plain(ledgers[0]) != digest_plain(ledgers[1])
    specs = [digest_config(to_plain(program.spec)) for program in (left, right)]
    assert specs[0] != specs[1]


# Flax by hand ---------------------------------------------------------------------


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """(path, stream, call, key) of each `make_rng` of a model that runs eagerly."""
    calls: list[Any] = []
    original = Scope.make_rng

    def make_rng(self: Scope, name: str = "params") -> Any:
        key = original(self, name)
        calls.append((tuple(self.path), name, self.rng_counters[name], key))
        return key

    monkeypatch.setattr(Scope, "make_rng", make_rng)
    return calls


def hand_written() -> nn.Module:
    return Sequential(
        [
            nn.Dense(5),
            Noise(0.1, name="blur"),
            Dropout(0.5),
            Sequential([Dropout(0.25, name="deep")]),
            nn.Dense(CLASSES),
        ]
    )


def fold_name(key: Any, name: str) -> Any:
    digest = hashlib.sha256(name.encode()).digest()
    return jax.random.fold_in(key, int.from_bytes(digest[:4], "big"))


@pytest.mark.parametrize("name", ["default", "rbg", "no_separator", "accumulation"])
@pytest.mark.parametrize("step", [0, 1, 9])
def test_keys_are_those_of_flax(
    programs: Any, spied: list[Any], name: str, step: int
) -> None:
    """The same model by hand, with the keys that the contract's formulas give."""
    program = programs(name)
    ledger = make_ledger(program)
    spec = program.spec.rng
    parts = program.spec.train.accumulation_steps
    module, x = hand_written(), jnp.zeros((2, WIDTH))
    found = {
        (e["phase"], *e["index"].values(), tuple(e["path"]), e["stream"], e["call"]): (
            tuple(e["key"])
        )
        for e in entries(ledger, step)
    }
    by_hand: dict[Any, Any] = {}

    def run(phase: str, part: tuple[int, ...], function: Any) -> Any:
        spied.clear()
        out = function()
        for path, stream, call, key in spied:
            by_hand[(phase, *part, path, stream, call)] = words(key)
        return out

    with rng_flags(spec):
        root = jax.random.key(3, impl=str(spec.impl))
        base = {n: fold_name(root, n) for n in ("params", "dropout", "noise")}
        rngs = {n: base[n] for n in ("params", "noise")}
        variables = run("init", (), lambda: module.init(rngs, x, deterministic=True))
        for part in range(parts):
            rngs = {n: jax.random.fold_in(base[n], step) for n in ("dropout", "noise")}
            at: tuple[int, ...] = ()
            if parts > 1:
                at = (part,)
                rngs = {n: jax.random.fold_in(key, part) for n, key in rngs.items()}
            run(
                "train",
                at,
                lambda: module.apply(variables, x, deterministic=False, rngs=rngs),  # noqa: B023
            )
        for part in range(3):
            key = jax.random.fold_in(fold_name(base["noise"], "eval"), step)
            rngs = {"noise": jax.random.fold_in(key, part)}
            run(
                "eval",
                (part,),
                lambda: module.apply(variables, x, deterministic=True, rngs=rngs),  # noqa: B023
            )
    # Flax also makes keys that nothing is drawn from: biases are zeros; and noise in
    # `init`, of which no variable is made.
    unused = {place: by_hand.pop(place) for place in set(by_hand) - set(found)}
    assert {(place[0], *place[-2:]) for place in unused} <= {
        ("init", "params", 2),
        ("init", "noise", 1),
    }
    assert found == by_hand


def test_the_compiled_program_draws_these_keys(arrays: Path) -> None:
    """Masks of the first step, by the ledger's keys, give the first step's loss."""
    from runner.loop import train
    from runner.records.events import TrainRecord

    data = config(arrays)
    data["model"] = {
        "_target_": "models.MLP",
        "features": [5],
        "num_outputs": CLASSES,
        "dropout_rate": 0.5,
    }
    data["train"] = {"steps": 2, "compile_cache": None}
    data["eval"] = {}
    del data["rng"]["streams"]["noise"]
    program = compile_run(parse_spec(data))
    ledger = make_ledger(program)
    kernels = {
        e["path"][0]: replay(e["derivation"], "threefry2x32")
        for e in entries(ledger, 0, "init")
    }
    init = nn.initializers.lecun_normal()
    first, last = (
        init(kernels[n], s)
        for n, s in (("Dense_0", (WIDTH, 5)), ("Dense_1", (5, CLASSES)))
    )
    (mask,) = entries(ledger, 0, "train")
    key = replay(mask["derivation"], "threefry2x32")
    rows = program.order.indices(0, steps=1)[0]
    x, y = program.data.x_train[rows], program.data.y_train[rows]
    h = jax.nn.relu(x @ first)
    h = jnp.where(jax.random.bernoulli(key, 0.5, h.shape), h / 0.5, 0.0)
    losses = -jax.nn.log_softmax(h @ last)[jnp.arange(8), y]
    events = [e for e in train(program) if isinstance(e, TrainRecord)]
    np.testing.assert_allclose(events[0].metrics["loss"][0], losses.mean(), rtol=1e-5)


def carried_into(program: Program, step: int) -> dict[str, Any]:
    keys = {}
    for name in program.plan.carried():
        key = program.start()[1][name]
        for _ in range(step):
            key = jax.random.split(key)[1]
        keys[name] = key
    return keys


def closed_steps(program: Program, step: int) -> dict[str, tuple[Any, ...]]:
    """The programs that are compiled, and concrete arguments, by phase."""
    state, keys, hypers = program.start()
    state = state._replace(step=jnp.int32(step), carried=carried_into(program, step))
    x, y = program.data.x_train[:8], program.data.y_train[:8]
    train = make_step(make_parts(program, Phase.TRAIN))
    evaluate = make_eval_step(make_parts(program, Phase.EVAL))
    calls: dict[str, Any] = {"train": [(train, (state, Batch(x, y), keys, hypers))]}
    rows = program.eval_rows
    batch = Batch(program.data.x_test[:rows], program.data.y_test[:rows])
    weights = np.ones(rows, np.float32)
    calls["eval"] = [
        (evaluate, (state, batch, weights, keys, hypers, jnp.int32(part)))
        for part in range(program.eval_batches)
    ]
    return calls


@pytest.mark.parametrize(
    "name", ["default", "carry", "rbg", "accumulation", "bfloat16"]
)
@pytest.mark.parametrize("step", [0, 7])
def test_keys_are_those_of_the_compiled_program(
    programs: Any, name: str, step: int
) -> None:
    """Step and evaluation as they are compiled, gradient and all, run by hand."""
    program = programs(name)
    ledger = make_ledger(program)
    with rng_flags(program.spec.rng):
        for phase, calls in closed_steps(program, step).items():
            real: Counter[Any] = Counter()
            for function, args in calls:
                real |= consumed(jax.make_jaxpr(function)(*args), *args)
            found = {tuple(e["key"]) for e in entries(ledger, step, phase)}
            assert set(real) == found


@pytest.mark.parametrize("name", ["default", "accumulation", "bfloat16"])
@pytest.mark.parametrize("phase", ["train", "eval"])
def test_uses_are_those_of_the_compiled_program(
    programs: Any, name: str, phase: str
) -> None:
    """Shapes and bits, as that program draws them."""
    program = programs(name)
    function, args = closed_steps(program, 0)[phase][0]
    with rng_flags(program.spec.rng):
        closed = jax.make_jaxpr(function)(*args)
    uses = [
        (use["primitive"], tuple(use["shape"]), use["bits"])
        for draw in make_ledger(program)["draws"]
        if draw["phase"] == phase
        for use in draw["uses"]
    ]
    assert sorted(uses) == sorted(consumers(closed.jaxpr))


# Completeness ---------------------------------------------------------------------


def consumers(jaxpr: Any) -> list[tuple[str, tuple[int, ...], int]]:
    """Every `random_bits` in a program and in all programs within it."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "random_bits":
            uses = eqn.params["shape"], eqn.params["bit_width"]
            found.append(("random_bits", *uses))
        values = jax.tree.leaves(
            list(eqn.params.values()),
            is_leaf=lambda v: isinstance(v, Jaxpr | ClosedJaxpr),
        )
        for value in values:
            if isinstance(value, ClosedJaxpr | Jaxpr):
                found += consumers(getattr(value, "jaxpr", value))
    return found


def test_every_consumer_has_a_use(programs: Any) -> None:
    program = programs("default")
    ledger = make_ledger(program)
    x, model, rngs = program.microbatch, program.model, program.keys

    def train(rngs: Any, x: Any) -> Any:
        variables = model.init(rngs, x, {})
        return variables, model.apply(variables, x, rngs, {}, train=True)

    with rng_flags(program.spec.rng):
        closed = jax.make_jaxpr(train)(rngs, x)
    uses = sum(len(draw["uses"]) for draw in ledger["draws"] if draw["phase"] != "eval")
    # Of the six, the noise of `init` is dead: no variable is made of it.
    assert (len(consumers(closed.jaxpr)), uses) == (6, 5)


def test_mlp_by_hand_is_the_recipe(make_spec: Any) -> None:
    """The recipe's streams and draws, as README prints them."""
    ledger = make_ledger(compile_run(make_spec("+experiment=dropout", "optimizer=sgd")))
    assert ledger["experiment"] == "default"
    places = [(d["phase"], d["stream"], *d["path"]) for d in ledger["draws"]]
    assert places == [
        ("init", "params", "Dense_0"),
        ("init", "params", "Dense_1"),
        ("init", "params", "Dense_2"),
        ("train", "dropout", "Dropout_0"),
        ("train", "dropout", "Dropout_1"),
    ]
