# SPDX-License-Identifier: Apache-2.0
"""A config that has a hazard is caught with its code, path and fix; mended, it is not.

Each `Case` is such a pair. The modules that they need stand in `MODULES`, a package of
the user's that the config trusts.
"""

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

from runner import CONF_DIR
from runner.compile import compile_run
from runner.errors import HazardsRefusedError
from runner.hazards.find import Hazard, Severity, find_hazards, refuse_hazards
from runner.spec import parse_spec

SHUFFLE = {"kind": "host", "per": ["epoch"]}
SPLIT = {"kind": "host", "seed": 0}
PARAMS = {"phases": ["init"]}
DROPOUT = {"phases": ["train"], "per": ["step", "microbatch"]}
MODULES = """
import flax.linen as nn
import jax
import jax.numpy as jnp


def normal(key, x):
    return jax.random.normal(key, x.shape)


class Draws(nn.Module):
    stream: str = "dropout"
    always: bool = False  # also where the call is deterministic

    @nn.compact
    def __call__(self, x, *, deterministic=False):
        x = nn.Dense(10)(x.reshape(x.shape[0], -1))
        return x if deterministic and not self.always else x + self.draw(x)

    def draw(self, x):
        return normal(self.make_rng(self.stream), x)


class Twice(Draws):
    split: bool = False

    def draw(self, x):
        one = two = self.make_rng("dropout")
        if self.split:
            one, two = jax.random.split(one)
        return normal(one, x) + normal(two, x)


class TwoLoops(Draws):
    others: bool = False

    def draw(self, x):
        keys = again = jax.random.split(self.make_rng("dropout"), 3)
        if self.others:
            again = jax.random.split(self.make_rng("dropout"), 3)
        body = lambda total, key: (total + normal(key, x), None)
        return jax.lax.scan(body, x, keys)[0] + jax.lax.scan(body, x, again)[0]


class Child(Draws):
    number: int = 1

    def draw(self, x):
        key = self.make_rng("dropout")
        one, two = jax.random.split(key)[1], jax.random.fold_in(key, self.number)
        return normal(one, x) + normal(two, x)


class Splits(Draws):
    def draw(self, x):
        key = self.make_rng("dropout")
        one, two = jax.random.split(key, 2)[0], jax.random.split(key, 3)[0]
        return normal(one, x) + normal(two, x)


class OneOf(Draws):
    def draw(self, x):
        key = self.make_rng("dropout")
        one, two = jax.random.split(key, 1)[0], jax.random.fold_in(key, 1)
        return normal(one, x) + normal(two, x)


class Closes(Draws):
    fold: bool = False

    def draw(self, x):
        key = self.make_rng("dropout")

        def body(total, i):
            own = jax.random.fold_in(key, i) if self.fold else key
            return total + normal(own, x), None

        return jax.lax.scan(body, x, jnp.arange(3))[0]


class Turns(Draws):
    fold: bool = False

    def draw(self, x):
        key = self.make_rng("dropout")

        def body(i, total):
            own = jax.random.fold_in(key, i) if self.fold else key
            return total + normal(own, x)

        return jax.lax.fori_loop(0, 3, body, x)


class Same(Draws):
    by: int = 1

    def draw(self, x):
        key = self.make_rng("dropout")

        def inner(total, at):
            own = jax.random.fold_in(key, self.by * at[0] + at[1])
            return total + normal(own, x), None

        def outer(total, i):
            ones = jnp.full(3, i)
            return jax.lax.scan(inner, total, (ones, jnp.arange(3)))[0], None

        return jax.lax.scan(outer, x, jnp.arange(2))[0]


class Carries(Draws):
    def draw(self, x):
        def body(carry, _):
            key, total = carry
            key, own = jax.random.split(key)
            return (key, total + normal(own, x)), None

        carry = self.make_rng("dropout"), x
        (key, x), _ = jax.lax.scan(body, carry, length=3)
        (key, x), _ = jax.lax.scan(body, (key, x), length=2)
        return normal(jax.random.split(key)[1], x)


class Outside(Draws):
    kind: str = "scan"
    own: bool = False  # draws from the module that the body is given

    def draw(self, x):
        split = {"params": True, "dropout": True}

        def body(module, x, _=None):
            source = module if self.own else self
            x = x + normal(source.make_rng("dropout"), x)
            return (x, None) if self.kind == "scan" else x

        if self.kind == "vmap":
            return nn.vmap(body, split_rngs=split)(self, x)
        return nn.scan(body, split_rngs=split, length=3)(self, x, None)[0]


class Stranger(Draws):
    def draw(self, x):
        return normal(jax.random.key(3), x)


class Constant(Draws):
    def draw(self, x):
        with jax.ensure_compile_time_eval():  # as if it stood outside the class
            key = jax.random.key(7)
        return normal(key, x)


class Shards(Draws):
    fold: bool = False

    def draw(self, x):
        mesh = jax.sharding.Mesh(jax.devices()[:4], ("data",))
        rows = jax.sharding.PartitionSpec("data")

        def part(x, key):
            at = jax.lax.axis_index("data")
            return normal(jax.random.fold_in(key, at) if self.fold else key, x)

        specs = {"in_specs": (rows, jax.sharding.PartitionSpec()), "out_specs": rows}
        return jax.shard_map(part, mesh=mesh, **specs)(x, self.make_rng("dropout"))


class Below(Draws):
    def draw(self, x):
        state = jnp.zeros(4, jnp.uint32)
        bits = jax.lax.rng_bit_generator(state, x.shape)[1]
        return bits.astype(x.dtype)


class TwoStreams(Draws):
    names: tuple = ("dropout", "noise")

    def draw(self, x):
        return sum(normal(self.make_rng(name), x) for name in self.names)


class Branches(Draws):
    def draw(self, x):
        key = self.make_rng("dropout")
        one = lambda k: normal(k, x)
        return jax.lax.cond(x.sum() > 0, one, one, key)


class NextTurn(Draws):
    def draw(self, x):
        key = self.make_rng("dropout")

        def body(total, i):
            now = lambda: normal(jax.random.fold_in(key, i), x)
            then = lambda: normal(jax.random.fold_in(key, i + 1), x)
            return total + jax.lax.cond(total.sum() > 0, now, then), None

        return jax.lax.scan(body, x, jnp.arange(3))[0]


class Kept(Draws):
    start: str = "dropout"  # of a variable that is made in the initialisation

    @nn.compact
    def __call__(self, x, *, deterministic=False):
        first = lambda: jax.random.normal(self.make_rng(self.start), (10,))
        x = nn.Dense(10)(x.reshape(x.shape[0], -1))
        x = x + self.variable("state", "first", first).value
        return x if deterministic else x + normal(self.make_rng("dropout"), x)


class KeptInBranches(Draws):
    @nn.compact
    def __call__(self, x, *, deterministic=False):
        none = lambda k: jnp.zeros(10)
        draw = lambda k: jax.random.normal(k, (10,))
        make = lambda: self.make_rng("dropout")
        x = nn.Dense(10)(x.reshape(x.shape[0], -1))
        first = lambda: jax.lax.cond(x.sum() > 0, draw, none, make())
        x = x + self.variable("state", "first", first).value
        return x if deterministic else x + jax.lax.cond(x.sum() > 0, none, draw, make())


class Adds(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + normal(self.make_rng("dropout"), x), None


class Lifts(Draws):
    split: bool = False

    def draw(self, x):
        return nn.scan(Adds, split_rngs={"dropout": self.split}, length=3)()(x, None)[0]
"""


def module(kind_: str, /, **fields: Any) -> dict[str, Any]:
    return {"_target_": f"hazardlab.{kind_}", **fields}


def mlp(**fields: Any) -> dict[str, Any]:
    sizes = {"features": [4], "num_outputs": 10, "dropout_rate": 0.5}
    return {"_target_": "models.MLP", **sizes, **fields}


def layers(*inner: Any, name: str | None = None) -> dict[str, Any]:
    first = [{"_target_": "models.Flatten"}] if name is None else []
    last = [{"_target_": "flax.linen.Dense", "features": 10}] if name is None else []
    named = {} if name is None else {"name": name}
    return {"_target_": "models.Sequential", "layers": [*first, *inner, *last], **named}


def dropout(name: str | None = None, **fields: Any) -> dict[str, Any]:
    made = {"_target_": "models.Dropout", "rate": 0.5, **fields}
    return made if name is None else {**made, "name": name}


def noise(name: str = "noise") -> dict[str, Any]:
    """Asks for the stream `noise`; in evaluations, too."""
    return {"_target_": "models.Noise", "scale": 0.1, "name": name}


def lifted(lift: str, *, streams: Any = None, **fields: Any) -> dict[str, Any]:
    """Blocks with dropout in a lift that is called `blocks`."""
    block = {"_target_": "models.ResidualMLPBlock", "dropout_rate": 0.5}
    split = {"params": True, **(streams or {})}
    stacked = {"variable_axes": {"params": 0}, "split_rngs": split}
    more = {"length": 3} if lift == "scan" else {}
    node = {"lift": lift, "name": "blocks", "module": block, **stacked, **more}
    return layers({**node, **fields})


def shared(**streams: bool) -> dict[str, Any]:
    """A vmap over rows, with one block for all."""
    axes = {"variable_axes": {"params": None}}
    return lifted("vmap", streams={"params": False, **streams}, **axes)


def find(
    *, model: Any = None, streams: Any = None, rng: Any = None, **rest: Any
) -> tuple[Hazard, ...]:
    """The hazards of a run on the digits."""
    declared = {"params": PARAMS, "dropout": DROPOUT, **(streams or {})}
    declared = {name: value for name, value in declared.items() if value is not None}
    declared |= {"shuffle": SHUFFLE, "split": SPLIT}
    config = {
        "model": model or mlp(),
        "optimizer": {"_target_": "optax.sgd", "learning_rate": 0.1},
        "data": {"name": "digits", "batch_size": 32},
        "rng": {"streams": declared, **(rng or {})},
        "trusted": ["hazardlab"],
        **rest,
    }
    return find_hazards(compile_run(parse_spec(config)))


def codes(**config: Any) -> list[tuple[str, str]]:
    """(code, config path) of each hazard."""
    return [(hazard.code, hazard.path) for hazard in find(**config)]


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hazardlab.py").write_text(MODULES)
    monkeypatch.syspath_prepend(tmp_path)


# A hazard and its mended twin ---------------------------------------------------------

DROPOUT_PATH = "rng.streams.dropout"


@dataclass(frozen=True)
class Case:
    """A config with one hazard, and the same with the fix that is named.

    Args:
        code: Of the hazard.
        path: Its config path.
        what: What it says, from the start.
        fix: The fix that it names, from the start.
        config: Keywords of `find`.
        mended: The same after the fix.
        beside: Hazards that both have.
        also: Hazards that the first has, too.
        severity: Of the hazard.
    """

    code: str
    path: str
    what: str
    fix: str
    config: Mapping[str, Any]
    mended: Mapping[str, Any]
    beside: tuple[tuple[str, str], ...] = ()
    also: tuple[tuple[str, str], ...] = ()
    severity: Severity = Severity.ERROR


UNUSED = (("R005", DROPOUT_PATH),)
WARNING = Severity.WARNING
NOISE = {"phases": ["train", "eval"], "per": ["step", "microbatch"]}
OWN = {"phases": ["train"], "per": ["step", "microbatch"], "seed": 7}
HASHED_ALIKE = ("drop68197", "drop108486")  # as paths: first 4 bytes of their SHA-1
NAMED_ALIKE = ("drop73434", "drop119611")  # as streams: first 4 bytes of their SHA-256

ONE_KEY = "one key is drawn from twice"
EVERY = "one key at every index of"
CASES = {
    "R001-twice": Case(
        "R001",
        DROPOUT_PATH,
        ONE_KEY,
        "Call make_rng once for each draw, or split",
        {"model": module("Twice")},
        {"model": module("Twice", split=True)},
    ),
    "R001-two-loops-over-one-split": Case(
        "R001",
        DROPOUT_PATH,
        ONE_KEY,
        "Call make_rng once for each draw",
        {"model": module("TwoLoops")},
        {"model": module("TwoLoops", others=True)},
    ),
    "R001-joined-paths": Case(
        "R001",
        DROPOUT_PATH,
        "two paths have one key: Flax joins the names in them",
        "Set rng.fix_separator=true",
        {
            "rng": {"fix_separator": False},
            "model": layers(
                layers(dropout("bc"), name="a"), layers(dropout("c"), name="ab")
            ),
        },
        {
            "rng": {"fix_separator": True},
            "model": layers(
                layers(dropout("bc"), name="a"), layers(dropout("c"), name="ab")
            ),
        },
    ),
    "R001-raw-scan": Case(
        "R001",
        DROPOUT_PATH,
        f"{EVERY} scan",
        "Fold the index in, or split the key",
        {"model": module("Closes")},
        {"model": module("Closes", fold=True)},
    ),
    "R001-fori-loop": Case(
        "R001",
        DROPOUT_PATH,
        EVERY,
        "Fold the index in, or split the key",
        {"model": module("Turns")},
        {"model": module("Turns", fold=True)},
    ),
    "R001-sum-of-indices": Case(
        "R001",
        DROPOUT_PATH,
        "two indices fold the same number in",
        "Fold each index in by itself",
        {"model": module("Same", by=1)},
        {"model": module("Same", by=3)},
    ),
    "R001-functional-scan": Case(
        "R001",
        DROPOUT_PATH,
        f"{EVERY} scan: its body closes over the module outside, which the lift",
        "Draw from the module that the body is given",
        {"model": module("Outside")},
        {"model": module("Outside", own=True)},
    ),
    "R001-functional-vmap": Case(
        "R001",
        DROPOUT_PATH,
        f"{EVERY} vmap: its body closes over the module outside",
        "Draw from the module that the body is given",
        {"model": module("Outside", kind="vmap")},
        {"model": module("Outside", kind="vmap", own=True)},
    ),
    "R001-streams-of-one-seed": Case(
        "R001",
        DROPOUT_PATH,
        ONE_KEY,
        "Call make_rng once",
        {"model": module("TwoStreams"), "streams": {"dropout": OWN, "noise": OWN}},
        {
            "model": module("TwoStreams"),
            "streams": {"dropout": OWN, "noise": {**OWN, "seed": 8}},
        },
        also=(("R006", "rng.streams.noise"),),
    ),
    "R002-no-coordinate": Case(
        "R002",
        f"{DROPOUT_PATH}.per",
        "the key is the same at every step",
        f"Add step to {DROPOUT_PATH}.per",
        {"streams": {"dropout": {**DROPOUT, "per": []}}},
        {"streams": {"dropout": {**DROPOUT, "per": ["step"]}}},
    ),
    "R002-epoch": Case(
        "R002",
        f"{DROPOUT_PATH}.per",
        "the key is the same at every step",
        f"Add step to {DROPOUT_PATH}.per",
        {"streams": {"dropout": {**DROPOUT, "per": ["epoch"]}}},
        {"streams": {"dropout": {**DROPOUT, "per": ["epoch", "step"]}}},
    ),
    "R003-microbatches": Case(
        "R003",
        f"{DROPOUT_PATH}.per",
        "the key is the same for 2 microbatches",
        f"Add microbatch to {DROPOUT_PATH}.per",
        {
            "streams": {"dropout": {**DROPOUT, "per": ["step"]}},
            "train": {"accumulation_steps": 2},
        },
        {"train": {"accumulation_steps": 2}},
    ),
    "R003-evaluation": Case(
        "R003",
        "rng.streams.noise.per",
        "the key is the same for 4 batches of an eval",
        "Add microbatch to rng.streams.noise.per",
        {
            "streams": {"noise": {**NOISE, "per": ["step"]}},
            "model": layers(noise()),
            "eval": {"batch_size": 100},
        },
        {
            "streams": {"noise": NOISE},
            "model": layers(noise()),
            "eval": {"batch_size": 100},
        },
        beside=UNUSED,
    ),
    "R003-shards": Case(
        "R003",
        DROPOUT_PATH,
        "one key on every shard of data",
        "Fold jax.lax.axis_index in",
        {"model": module("Shards")},
        {"model": module("Shards", fold=True)},
    ),
    "R004-substituted": Case(
        "R004",
        "rng.streams",
        "the model asks for 'noise', which is not declared: Flax",
        "Set +rng.streams.noise={phases: [init, train, eval], per: [step, microbatch]}",
        {
            "model": layers(noise()),
            "streams": {
                "params": {"phases": ["init", "train", "eval"], "per": ["step"]}
            },
        },
        {
            "model": layers(noise()),
            "streams": {
                "params": PARAMS,
                "noise": {
                    "phases": ["init", "train", "eval"],
                    "per": ["step", "microbatch"],
                },
            },
        },
        beside=UNUSED,
    ),
    "R004-fatal": Case(
        "R004",
        "rng.streams",
        "the model asks for 'mask', which is not declared",
        "Set +rng.streams.mask={phases: [train], per: [step, microbatch]}",
        {"model": module("Draws", stream="mask")},
        {
            "model": module("Draws", stream="mask"),
            "streams": {"mask": {"phases": ["train"], "per": ["step", "microbatch"]}},
        },
        beside=UNUSED,
    ),
    "R004-mistyped": Case(
        "R004",
        "rng.streams",
        "the model asks for 'dropuot', which is not declared",
        "Did you mean 'dropout'?",
        {"model": module("TwoStreams", names=["dropout", "dropuot"])},
        {"model": module("TwoStreams", names=["dropout", "dropout"])},
    ),
    "R005": Case(
        "R005",
        "rng.streams.idle",
        "nothing draws from this stream",
        "Remove it: '~rng.streams.idle'",
        {"streams": {"idle": {}}},
        {},
        severity=WARNING,
    ),
    "R006-seeds": Case(
        "R006",
        "rng.streams.noise",
        "starts from the key of dropout",
        "Set ++rng.streams.noise.derive=name, or another seed",
        {
            "model": layers(dropout(), noise()),
            "streams": {"dropout": OWN, "noise": {**NOISE, "seed": 7}},
        },
        {
            "model": layers(dropout(), noise()),
            "streams": {
                "dropout": OWN,
                "noise": {**NOISE, "seed": 7, "derive": "name"},
            },
        },
        severity=WARNING,
    ),
    "R006-roots": Case(
        "R006",
        "rng.streams.noise",
        "starts from the key of dropout",
        "Set ++rng.streams.noise.derive=name",
        {
            "model": layers(dropout(), noise()),
            "streams": {
                "dropout": {**DROPOUT, "derive": "root"},
                "noise": {**NOISE, "derive": "root"},
            },
        },
        {
            "model": layers(dropout(), noise()),
            "streams": {
                "dropout": {**DROPOUT, "derive": "root"},
                "noise": {**NOISE, "derive": "name"},
            },
        },
        severity=WARNING,
    ),
    "R006-names": Case(
        "R006",
        f"rng.streams.{NAMED_ALIKE[1]}",
        f"starts from the key of {NAMED_ALIKE[0]}",
        f"Rename {NAMED_ALIKE[1]}: both names have one hash",
        {
            "streams": {
                NAMED_ALIKE[0]: DROPOUT,
                NAMED_ALIKE[1]: DROPOUT,
                "dropout": None,
            },
            "model": layers(
                module("Draws", stream=NAMED_ALIKE[0], name="a"),
                module("Draws", stream=NAMED_ALIKE[1], name="b"),
            ),
        },
        {
            "streams": {NAMED_ALIKE[0]: DROPOUT, "other": DROPOUT, "dropout": None},
            "model": layers(
                module("Draws", stream=NAMED_ALIKE[0], name="a"),
                module("Draws", stream="other", name="b"),
            ),
        },
        severity=WARNING,
    ),
    "R007-negative": Case(
        "R007",
        "seed",
        "a negative seed is the same as 4294967295 (got -1)",
        "Set it to a number from 0 to 4294967295",
        {"seed": -1, "rng": {"seed": -1}},
        {"seed": 1, "rng": {"seed": 1}},
    ),
    "R007-large": Case(
        "R007",
        "rng.seed",
        "a seed above 4294967295 is the same as 5 (got 4294967301)",
        "Set it to a number from 0 to 4294967295",
        {"rng": {"seed": 2**32 + 5}},
        {"rng": {"seed": 5}},
    ),
    "R007-of-a-stream": Case(
        "R007",
        f"{DROPOUT_PATH}.seed",
        "a negative seed is the same as 4294967289",
        "Set it to a number from 0 to 4294967295",
        {"streams": {"dropout": {**OWN, "seed": -7}}},
        {"streams": {"dropout": OWN}},
    ),
    "R008-split-is-fold": Case(
        "R008",
        DROPOUT_PATH,
        "two derivations meet: split(key, n)[i] is fold_in(key, i) for any n",
        "Derive both by fold_in, or draw from two streams",
        {"model": module("Child", number=1)},
        {"model": module("Child", number=2)},
    ),
    "R008-two-splits": Case(
        "R008",
        DROPOUT_PATH,
        "two derivations meet: split(key, n)[i] is fold_in",
        "Derive both by fold_in",
        {"model": module("Splits")},
        {"model": module("Child", number=2)},
    ),
    "R008-rbg": Case(
        "R008",
        DROPOUT_PATH,
        "two derivations meet: split(key, n)[i] is fold_in",
        "Derive both by fold_in",
        {"model": module("Child"), "rng": {"impl": "rbg"}},
        {"model": module("Child", number=2), "rng": {"impl": "rbg"}},
    ),
    "R008-not-partitionable": Case(
        "R008",
        DROPOUT_PATH,
        "two derivations meet: split(key, 1)[0] is fold_in(key, 1)",
        "Derive both by fold_in",
        {"model": module("OneOf"), "rng": {"partitionable": False}},
        {"model": module("Splits"), "rng": {"partitionable": False}},
    ),
    "R008-unsafe-rbg-splits": Case(
        "R008",
        DROPOUT_PATH,
        "two derivations meet: split(key, n)[i] is the same for",
        "Derive both by fold_in",
        {"model": module("Splits"), "rng": {"impl": "unsafe_rbg"}},
        {"model": module("Child", number=1), "rng": {"impl": "unsafe_rbg"}},
    ),
    "R008-unsafe-rbg-commutes": Case(
        "R008",
        DROPOUT_PATH,
        "folds commute under unsafe_rbg, so that two indices get",
        "Set rng.impl=threefry2x32",
        {"rng": {"impl": "unsafe_rbg"}, "train": {"accumulation_steps": 2}},
        {"rng": {"impl": "threefry2x32"}, "train": {"accumulation_steps": 2}},
    ),
    "R008-hash-of-paths": Case(
        "R008",
        DROPOUT_PATH,
        f"path {HASHED_ALIKE[0]} call 1 and path {HASHED_ALIKE[1]} call 1 have one",
        "Rename one of them",
        {"model": layers(*map(dropout, HASHED_ALIKE))},
        {"model": layers(dropout(HASHED_ALIKE[0]), dropout("other"))},
    ),
    "R009-scan": Case(
        "R009",
        "model.layers[1].split_rngs.dropout",
        "dropout is drawn from inside scan:blocks, which doesn't split it: every index",
        "Set model.layers.1.split_rngs.dropout=true",
        {"model": lifted("scan", streams={"dropout": False})},
        {"model": lifted("scan", streams={"dropout": True})},
        severity=WARNING,
    ),
    "R009-vmap": Case(
        "R009",
        "model.layers[1].split_rngs.dropout",
        "dropout is drawn from inside vmap:blocks, which doesn't split it",
        "Set model.layers.1.split_rngs.dropout=true",
        {"model": shared(dropout=False)},
        {"model": shared(dropout=True)},
        severity=WARNING,
    ),
    "R009-stacked-parameters": Case(
        "R009",
        "model.layers[1].split_rngs.params",
        "params is drawn from inside scan:blocks, which doesn't split it",
        "Set model.layers.1.split_rngs.params=true",
        {"model": lifted("scan", streams={"params": False, "dropout": True})},
        {"model": lifted("scan", streams={"params": True, "dropout": True})},
        severity=WARNING,
    ),
    "R010-fatal": Case(
        "R010",
        "model.layers[1].split_rngs.dropout",
        "dropout is drawn from inside scan:blocks, which doesn't mention it",
        "Set +model.layers.1.split_rngs.dropout=true",
        {"model": lifted("scan")},
        {"model": lifted("scan", streams={"dropout": True})},
        also=UNUSED,
    ),
    "R011": Case(
        "R011",
        "rng.impl",
        "draws under vmap depend on the layout",
        "Set rng.impl=threefry2x32",
        {"model": shared(dropout=True), "rng": {"impl": "rbg"}},
        {"model": shared(dropout=True)},
    ),
    "R012": Case(
        "R012",
        "model.layers[1].rate",
        "a rate above 0, and nothing is drawn in train",
        "See that the model passes deterministic=False on",
        {"model": layers(dropout(deterministic=True))},
        {"model": layers(dropout())},
        also=UNUSED,
        severity=WARNING,
    ),
    "R013": Case(
        "R013",
        "rng.streams.noise.phases",
        "the evaluation draws from it, and eval is not among its phases",
        "Add eval to rng.streams.noise.phases",
        {
            "model": layers(dropout(), noise()),
            "streams": {"noise": {**NOISE, "phases": ["train"]}},
        },
        {"model": layers(dropout(), noise()), "streams": {"noise": NOISE}},
        severity=WARNING,
    ),
    "R014-seed": Case(
        "R014",
        "model",
        "draws from a key of no declared stream: a constant in the model: key(3)",
        "Draw from make_rng of a declared stream",
        {"model": module("Stranger")},
        {"model": module("Draws")},
        also=UNUSED,
    ),
    "R014-constant": Case(
        "R014",
        "model",
        "draws from a key of no declared stream: a key array closed over",
        "Draw from make_rng of a declared stream",
        {"model": module("Constant")},
        {"model": module("Draws")},
        also=UNUSED,
    ),
    "R014-below": Case(
        "R014",
        "model",
        "draws from a key of no declared stream: drawn by rng_bit_generator itself",
        "Draw from make_rng of a declared stream",
        {"model": module("Below")},
        {"model": module("Draws")},
        also=UNUSED,
    ),
    "R015": Case(
        "R015",
        DROPOUT_PATH,
        "init and train draw from one key",
        f"Give {DROPOUT_PATH}.phases one of them, and the other a stream of its own",
        {
            "model": module("Kept"),
            "streams": {"dropout": {"phases": ["init", "train"]}},
        },
        {
            "model": module("Kept", start="first"),
            "streams": {"first": {"phases": ["init"]}},
        },
        also=(("R002", f"{DROPOUT_PATH}.per"),),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_hazard_is_found_and_its_fix_mends_it(name: str) -> None:
    case = CASES[name]
    found = find(**case.config)
    expected = [(case.code, case.path), *case.beside, *case.also]
    assert sorted((hazard.code, hazard.path) for hazard in found) == sorted(expected)
    (hazard,) = [h for h in found if h.code == case.code]
    assert hazard.severity is case.severity
    assert hazard.what.startswith(case.what)
    assert hazard.fix.startswith(case.fix)
    assert codes(**case.mended) == list(case.beside)


# Near to a hazard, and none -----------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model": module("Branches")},
        {"model": module("Carries")},
        {"streams": {"dropout": {**DROPOUT, "per": {"step": "carry"}}}},
        {"streams": {"dropout": {**DROPOUT, "per": ["epoch", "step"]}}},
        {"model": module("Child"), "rng": {"partitionable": False}},
        {"model": module("Splits"), "rng": {"partitionable": False}},
        {"model": lifted("remat_scan", streams={"dropout": True}, lengths=[2, 2])},
        {"model": shared(dropout=True)},
        {"model": lifted("scan", streams={"dropout": True}, unroll=3)},
    ],
    ids=str,
)  # fmt: skip
def test_no_hazard(config: dict[str, Any]) -> None:
    assert codes(**config) == []


def test_branches_of_one_turn_share_a_key_but_those_of_two_turns_do_not() -> None:
    """fold_in(key, i + 1) in one branch is fold_in(key, i) of the next turn."""
    assert codes(model=module("NextTurn")) == [("R001", DROPOUT_PATH)]


def test_phases_have_branches_of_their_own() -> None:
    """Two phases never run at once: both may number a `cond` alike."""
    streams = {"dropout": {"phases": ["init", "train"]}}
    found = codes(model=module("KeptInBranches"), streams=streams)
    assert ("R015", DROPOUT_PATH) in found


def test_parameters_that_are_shared_are_initialised_from_one_key() -> None:
    """So that R009 is of stacked variables alone, in an initialisation."""
    assert codes(model=shared(dropout=True)) == []


def test_train_and_eval_that_share_a_key_is_made_impossible_by_the_phase() -> None:
    stream = {"noise": {"phases": ["train", "eval"], "per": []}}
    found = [code for code, _ in codes(model=layers(noise()), streams=stream)]
    assert found == ["R002", "R005"]


# Streams that a lift keeps out --------------------------------------------------------


def substituting(**config: Any) -> list[Hazard]:
    """With `params` in every phase, so that Flax has something to take."""
    params = {"phases": ["init", "train", "eval"], "per": ["step"]}
    found = find(streams={"params": params}, **config)
    return [hazard for hazard in found if hazard.code != "R005"]


def test_lift_that_keeps_a_stream_out_where_flax_takes_params() -> None:
    (hazard,) = substituting(model=lifted("scan"))
    assert (hazard.code, hazard.path) == ("R010", "model.layers[1].split_rngs.dropout")
    assert hazard.what.endswith("which doesn't mention it: Flax takes params")
    assert not hazard.is_fatal
    refuse_hazards((hazard,), allow=("R010",))


def test_lift_whose_filter_leaves_a_stream_out() -> None:
    block = {"_target_": "models.ResidualMLPBlock", "dropout_rate": 0.5}
    node = {"lift": "remat", "name": "blocks", "module": block}
    (hazard,) = substituting(model=layers({**node, "rngs": ["params"]}))
    assert (hazard.code, hazard.path) == ("R010", "model.layers[1].rngs")
    assert hazard.fix == "Let model.layers[1].rngs include dropout"
    assert codes(model=layers({**node, "rngs": ["params", "dropout"]})) == []


def nested(**split: Any) -> dict[str, Any]:
    """A scan of scans: `split` is that of the inner one."""
    block = {"_target_": "models.ResidualMLPBlock", "dropout_rate": 0.5}
    stacked = {"lift": "scan", "length": 2, "variable_axes": {"params": 0}}
    inner = {**stacked, "split_rngs": {"params": True, **split}, "module": block}
    both = {"params": True, "dropout": True}
    return layers({**stacked, "name": "m", "split_rngs": both, "module": inner})


def test_the_lift_that_is_named_is_the_one_that_does_not_split() -> None:
    (hazard,) = find(model=nested(dropout=False))
    assert hazard.path == "model.layers[1].module.split_rngs.dropout"
    assert hazard.what.startswith("dropout is drawn from inside scan:m#2, which")
    assert codes(model=nested(dropout=True)) == []
    (hazard,) = substituting(model=nested())
    assert hazard.path == "model.layers[1].module.split_rngs.dropout"


def test_a_lift_in_code_is_mended_in_code() -> None:
    (hazard,) = find(model=module("Lifts", split=False))
    assert (hazard.code, hazard.path) == ("R009", "model")
    assert hazard.fix == "Say split_rngs={'dropout': True} in its nn.scan"
    assert codes(model=module("Lifts", split=True)) == []


# Streams that are not declared --------------------------------------------------------


def test_fallback_params_is_what_flax_does() -> None:
    assert [h.code for h in substituting(model=layers(noise()))] == ["R004"]
    assert substituting(model=layers(noise()), rng={"fallback": "params"}) == []


def test_fallback_params_has_nothing_to_take() -> None:
    found = find(model=module("Draws", stream="mask"), rng={"fallback": "params"})
    assert [hazard.code for hazard in found if hazard.is_fatal] == ["R004"]


def test_a_missing_stream_is_one_hazard_in_all_phases() -> None:
    (hazard,) = [h for h in find(model=layers(noise())) if h.code == "R004"]
    assert hazard.draws == ("init noise", "train noise", "eval noise")
    assert "phases: [init, train, eval], per: [step, microbatch]" in hazard.fix


def test_two_missing_streams_are_two_hazards() -> None:
    found = find(model=module("TwoStreams", names=["one", "two"]))
    fixes = [hazard.fix for hazard in found if hazard.code == "R004"]
    assert [fix[:21] for fix in fixes] == [
        "Set +rng.streams.one=",
        "Set +rng.streams.two=",
    ]


# Which hazard stops a run -------------------------------------------------------------


def made(code: str, **changes: Any) -> Hazard:
    return Hazard(code, Severity.ERROR, "what", "path", "Mend it", **changes)


def test_allow_silences_one_code() -> None:
    found = find(model=module("Twice"), streams={"dropout": {**DROPOUT, "per": []}})
    assert [hazard.code for hazard in found] == ["R001", "R002"]
    for allowed, left in (("R001", "R002"), ("R002", "R001")):
        with pytest.raises(HazardsRefusedError, match=f"^{left}: ") as caught:
            refuse_hazards(found, allow=(allowed,))
        assert f"If that is meant, set rng.allow=[{left}]." in str(caught.value)
        assert allowed not in str(caught.value)
    with pytest.raises(HazardsRefusedError) as caught:
        refuse_hazards(found, allow=("R003",))
    lines = str(caught.value).splitlines()
    assert [line[:5] for line in lines[:2]] == ["R001:", "R002:"]
    assert lines[2:] == ["If that is meant, set rng.allow=[R001,R002]."]
    refuse_hazards(found, allow=("R001", "R002"))


def test_a_warning_never_stops() -> None:
    warnings = [case for case in CASES.values() if case.severity is WARNING]
    assert {case.code for case in warnings} == {"R005", "R006", "R009", "R012", "R013"}
    for case in warnings:
        refuse_hazards(find(**case.config), allow=())


def test_what_is_said_alike_of_several_draws_is_said_once() -> None:
    (hazard,) = find(
        model=mlp(features=[4, 4, 4]),
        rng={"impl": "unsafe_rbg"},
        train={"accumulation_steps": 2},
    )
    assert hazard.draws == tuple(f"train Dropout_{i}" for i in range(3))


def test_a_pair_stays_a_pair() -> None:
    """Four draws that are two and two: the lines say which."""
    pairs = [
        layers(dropout("bc"), name="a"),
        layers(dropout("c"), name="ab"),
        layers(dropout("yz"), name="x"),
        layers(dropout("z"), name="xy"),
    ]
    found = find(model=layers(*pairs), rng={"fix_separator": False})
    assert {hazard.draws for hazard in found} == {
        ("train a/bc", "train ab/c"),
        ("train x/yz", "train xy/z"),
    }


def test_every_code_is_seen() -> None:
    assert {case.code for case in CASES.values()} == {f"R{n:03}" for n in range(1, 16)}


@pytest.mark.parametrize(
    ("found", "code"),
    [
        (["R001"], 1), (["R004"], 2), (["R007"], 2), (["R004", "R007"], 2),
        (["R001", "R004"], 1), (["R010"], 1),
    ],
)  # fmt: skip
def test_mistakes_of_the_config_have_their_exit_code(found: Any, code: int) -> None:
    with pytest.raises(HazardsRefusedError) as caught:
        refuse_hazards(tuple(map(made, found)), allow=())
    assert caught.value.exit_code == code


def test_what_can_not_run_can_not_be_allowed() -> None:
    fatal = made("R004", is_fatal=True)
    with pytest.raises(HazardsRefusedError) as caught:
        refuse_hazards((fatal,), allow=("R004",))
    assert "rng.allow" not in str(caught.value)


def test_a_question_ends_with_its_mark() -> None:
    hazard = Hazard("R004", Severity.ERROR, "what", "path", "Did you mean 'x'?")
    assert str(hazard) == "R004: path: what. Did you mean 'x'?"


# The command --------------------------------------------------------------------------

TO_RUN: dict[str, tuple[dict[str, Any], int]] = {
    "twice": ({"model": module("Twice")}, 1),
    "asks": ({"model": module("Draws", stream="mask")}, 2),
    "seed": ({"seed": -1}, 2),
    "idle": ({"rng": {"streams": {"idle": {}}}}, 0),
}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A user's directory with experiments that have a hazard."""
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    short = {
        "trusted": ["hazardlab"],
        "train": {"steps": 2},
        "sinks": {"wandb": {"mode": "disabled"}},
    }
    for name, (config, _) in TO_RUN.items():
        defaults = ["override /model: null"] if "model" in config else []
        text = yaml.safe_dump({**short, **config})
        head = "# @package _global_\n" + "".join(
            ["defaults:\n", *(f"  - {line}\n" for line in defaults)] if defaults else []
        )
        (tmp_path / "mine" / "experiment" / f"{name}.yaml").write_text(head + text)
    return tmp_path


@pytest.mark.parametrize("name", TO_RUN)
def test_the_command_refuses_and_writes_nothing(
    name: str, home: Path, runner: Any
) -> None:
    done = runner("+experiment=" + name, "-cd", "mine")
    _, code = TO_RUN[name]
    assert done.returncode == code, done.stderr
    if code == 0:
        assert "R005" in done.stderr
        return
    assert re.match(r"error: R\d{3}: \S+: .*\.\n", done.stderr)
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert not (home / "outputs").exists()


def test_the_command_refuses_what_can_not_be_allowed(home: Path, runner: Any) -> None:
    done = runner("+experiment=asks", "-cd", "mine", "rng.allow=[R004]")
    assert done.returncode == 2
    assert done.stderr.startswith("error: R004: rng.streams: the model asks for 'mask'")
    assert not (home / "outputs").exists()


def test_the_command_runs_what_is_allowed(home: Path, runner: Any) -> None:
    done = runner("+experiment=twice", "-cd", "mine", "rng.allow=[R001]")
    assert done.returncode == 0, done.stderr
    record = json.loads((Path(home, done.stdout.split()[-1]) / "run.json").read_text())
    assert [hazard["code"] for hazard in record["hazards"]] == ["R001"]


@pytest.mark.parametrize("name", TO_RUN)
def test_plan_lists_them_and_runs(name: str, home: Path, runner: Any) -> None:
    words = ("plan", "+experiment=" + name, "-cd", "mine", "--no-compile")
    tables, document = runner(*words), runner(*words, "--json")
    assert (tables.returncode, document.returncode) == (0, 0), tables.stderr
    listed = json.loads(document.stdout)["hazards"]
    assert listed
    for hazard in listed:
        line = f"{hazard['code']} {hazard['severity']}: {hazard['path']}: "
        assert line + hazard["what"] in tables.stdout
        assert hazard["fix"] in tables.stdout
    assert not (home / "outputs").exists()


# What is shipped ----------------------------------------------------------------------

SHIPPED = sorted(
    str(path.relative_to(CONF_DIR / "experiment").with_suffix(""))
    for path in (CONF_DIR / "experiment").rglob("*.yaml")
)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """What the regression is told to read."""
    rows = [f"{i % 7},{i % 5},{i}.0" for i in range(400)]
    (tmp_path / "table.csv").write_text("\n".join(["a,b,y", *rows]))
    return tmp_path / "table.csv"


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.promotes  # optax's Adam
def test_an_experiment_has_the_hazards_that_its_header_names(
    name: str, compose_config: Any, table: Path, small_mnist: list[str]
) -> None:
    text = (CONF_DIR / "experiment" / f"{name}.yaml").read_text()
    header = " ".join(re.findall(r"^# .*", text, flags=re.MULTILINE))
    needs = {"regression": [f"data.path={table}", "data.target=y"]}
    if name.startswith("paper/"):
        needs[name] = small_mnist
    config = compose_config(f"+experiment={name}", *needs.get(name, ()))
    found = find_hazards(compile_run(parse_spec(config)))
    assert {hazard.code for hazard in found} == set(re.findall(r"R0\d\d", header))


# What is documented -------------------------------------------------------------------

PAGE = (ROOT / "docs" / "hazards.md").read_text()
EXAMPLES = re.findall(r"```yaml\n([^`]*)```\n\n((?: {4}R0.*\n)+)", PAGE)


@pytest.mark.promotes
@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_the_page_shows_what_is_printed(
    number: int, compose_config: Any, tmp_path: Path
) -> None:
    text, lines = EXAMPLES[number]
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    (tmp_path / "lab.py").write_text(code)
    sys.modules.pop("lab", None)
    base, given = compose_config(), yaml.safe_load(text)
    rng = given.pop("rng", {})
    base["rng"] |= rng | {
        "streams": {**base["rng"]["streams"], **rng.get("streams", {})}
    }
    for name, value in given.items():
        whole = name == "model" or not isinstance(value, dict)
        base[name] = value if whole else {**base[name], **value}
    found = find_hazards(compile_run(parse_spec(base)))
    assert [f"    {hazard}" for hazard in found] == lines.splitlines()


def test_the_page_has_every_code() -> None:
    codes = [f"R{n:03}" for n in range(1, 16)]
    assert re.findall(r"^## (R\d+)", PAGE, re.M) == codes
    assert re.findall(r"^\| \[(R\d+)\]\(#r\d+\)", PAGE, re.M) == codes
    shown = {
        line.split(":")[0].strip() for _, ls in EXAMPLES for line in ls.splitlines()
    }
    assert shown == set(codes)
    for code, line in re.findall(r"^\| \[(R\d+)\]\S+ \| (.*?) \|", PAGE, re.M):
        severities = {case.severity for case in CASES.values() if case.code == code}
        assert {str(severity) for severity in severities} == {line.split(",")[0]}
