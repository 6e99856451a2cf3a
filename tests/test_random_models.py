# SPDX-License-Identifier: Apache-2.0
"""Random nested models under random streams: four accounts of each run's keys agree.

    ledger = keys by hand = keys of the compiled program = derivations, replayed

By hand means: Flax's `init` and `apply` with streams that are derived here by
`jax.random` alone, and an interpreter of the jaxpr that writes down each key which
reaches a consumer. The models are layers, modules with draws of their own, and lifts
around them, up to three deep.

`RANDOM_MODELS=500 pytest tests/test_random_models.py` tries as many in each test;
`--hypothesis-show-statistics` says what they were made of.
"""

import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.interpreters.partial_eval import dce_jaxpr

from runner.build import build_module
from runner.comparison.compare import Comparison
from runner.compile import compile_run
from runner.errors import ConfigError
from runner.hazards.find import find_hazards
from runner.ledger import expand, make_ledger
from runner.loop import Outcome, train
from runner.observe.observe import Observation, split_places
from runner.program import Program
from runner.spec import HAZARD_CODES, Phase, parse_spec

Words = tuple[int, ...]
At = tuple[str, int]  # phase and step
LAB = "lab_of_random_models"
ROWS, TIME, WIDTH, CLASSES, BATCH, TESTS, STEPS = 8, 2, 4, 3, 4, 6, 3
STREAMS = ("params", "dropout", "noise", "aux")
SHARED = {"R001", "R002", "R003", "R006", "R008", "R009", "R015"}
EXAMPLES = os.environ.get("RANDOM_MODELS")
pytestmark = pytest.mark.timeout(0 if EXAMPLES else 900)  # a failure is made smaller
SETTINGS = settings(
    deadline=None,
    derandomize=True,
    print_blob=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


# A package of modules of the user's -------------------------------------------------

MODULES = '''
import jax
import jax.numpy as jnp
from flax import linen as nn
from functools import partial
from jax import lax
from jax.random import fold_in, key_data, split, wrap_key_data


def positive(x: jax.Array):
    return jnp.mean(x) > 0


def number(x: jax.Array):
    return (jnp.abs(jnp.sum(x)) * 97).astype(jnp.int32) % 3


def consume(kind, key, x):
    """Numbers of the shape and dtype of `x`."""
    if kind == "bernoulli":
        return jax.random.bernoulli(key, 0.5, x.shape).astype(x.dtype)
    if kind == "gamma":
        return jax.random.gamma(key, 2.0, x.shape, x.dtype)
    if kind == "randint":
        return jax.random.randint(key, x.shape, 0, 9).astype(x.dtype)
    if kind == "permutation":
        return jax.random.permutation(key, x)
    if kind == "choice":
        return jax.random.choice(key, 5, x.shape).astype(x.dtype)
    return jax.random.normal(key, x.shape, x.dtype)


def draw(key, x, chain, kind):
    """`x` with noise: a chain of operations on the key, a consumer at its end."""
    if not chain:
        return x + x.dtype.type(0.01) * consume(kind, key, x)
    (op, n), rest = chain[0], chain[1:]
    go = partial(draw, chain=rest, kind=kind)
    turn = lambda x, key: (go(key, x), None)
    if op == "fold":
        return go(fold_in(key, n), x)
    if op == "split":
        return go(split(key, n)[-1], x)
    if op == "grid":
        return go(split(key, (2, n))[1, n - 1], x)
    if op == "both":
        one, other = split(key)
        return go(other, go(one, x))
    if op == "twice":
        return go(key, go(key, x))
    if op == "meet":  # if the flags say that split(key, n)[i] is fold_in(key, i)
        return go(split(key, n)[1], go(fold_in(key, 1), x))
    if op == "words":
        return go(wrap_key_data(key_data(key), impl=jax.random.key_impl(key)), x)
    if op == "clone":
        return go(jax.random.clone(key), x)
    if op == "stack":
        keys = jnp.stack([fold_in(key, 7), *split(key, n)])
        return lax.scan(turn, x, keys[::-1])[0]
    if op == "scan":
        return lax.scan(turn, x, split(key, n), reverse=True)[0]
    if op == "counter":
        count = lambda x, i: (go(fold_in(key, 2 * i + 1), x), None)
        return lax.scan(count, x, jnp.arange(n))[0]
    if op == "index":
        keys = split(key, n)
        return lax.fori_loop(0, n, lambda i, x: go(keys[i], x), x)
    if op == "carry":
        def next_(_, carry):
            x, key = carry
            key, here = split(key)
            return go(here, x), key
        x, key = lax.fori_loop(0, n, next_, (x, key))
        return go(key, x)
    if op == "vmap":
        return jax.vmap(go, in_axes=(0, None))(split(key, n), x).mean(0)
    if op == "map":
        return lax.map(lambda key: go(key, x), split(key, n)).mean(0)
    if op == "cond":
        return lax.cond(positive(x), go, lambda key, x: go(fold_in(key, n), x), key, x)
    if op == "remat":
        return jax.checkpoint(go)(key, x)
    if op == "jit":
        return jax.jit(go)(key, x)
    raise ValueError(op)


class Draws(nn.Module):
    """Draws with `jax.random` from keys of `make_rng`."""

    stream: str
    chain: tuple
    kind: str = "normal"
    holds: str = ""
    always: bool = False

    @nn.compact
    def __call__(self, x, *, deterministic=False):
        last = jnp.zeros(x.shape[-1:], x.dtype)
        fresh = lambda key: draw(key, last, self.chain, self.kind)
        if self.holds == "params":
            return x + self.param("w", fresh).astype(x.dtype)
        if self.holds:
            make = lambda: fresh(self.make_rng(self.stream))
            return x + self.variable(self.holds, "w", make).value
        if deterministic and not self.always:
            return x
        for _ in range(2):
            x = draw(self.make_rng(self.stream), x, self.chain, self.kind)
        return x


class Cell(nn.RNNCellBase):
    """A recurrent cell that draws at each time step."""

    features: int

    @nn.compact
    def __call__(self, carry, x):
        h = nn.tanh(nn.Dense(self.features)(x) + carry)
        h = h + 0.1 * jax.random.normal(self.make_rng("noise"), h.shape, h.dtype)
        return h, h

    def initialize_carry(self, rng, input_shape):
        return jnp.zeros((*input_shape[:-1], self.features))

    @property
    def num_feature_axes(self):
        return 1
'''


@pytest.fixture(scope="module", autouse=True)
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    home = tmp_path_factory.mktemp("lab")
    (home / f"{LAB}.py").write_text(MODULES)
    sys.path.insert(0, str(home))
    yield
    sys.path.remove(str(home))
    sys.modules.pop(LAB, None)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation() -> Iterator[None]:
    """Keys are integers: no optimization changes them."""
    name = "jax_disable_most_optimizations"
    before = jax.config.values[name]
    jax.config.update(name, True)
    yield
    jax.config.update(name, before)


@pytest.fixture(scope="module")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(
        path,
        x_train=rng.normal(size=(ROWS, TIME, WIDTH)).astype(np.float32),
        y_train=np.arange(ROWS) % CLASSES,
        x_test=rng.normal(size=(TESTS, TIME, WIDTH)).astype(np.float32),
        y_test=np.arange(TESTS) % CLASSES,
    )
    return path


# Models: layers and lifts that keep the shape of what they are given ----------------

Node = dict[str, Any]
Dims = tuple[str, ...]  # of an input, the last one left out: rows, time
rates = st.sampled_from([0.3, 0.3, 0.0, 1.0])
drawn_streams = st.sampled_from(["dropout", "noise", "aux"])
ops = st.sampled_from(
    [
        *("fold", "split", "grid", "both", "words", "clone", "stack", "scan", "map"),
        *("counter", "index", "carry", "vmap", "cond", "remat", "jit"),
        *("twice", "meet"),  # one key for two draws: a hazard that must be told
    ]
)
links = st.tuples(ops, st.integers(2, 3)).map(list)
chains = st.lists(links, min_size=1, max_size=3)
kinds = st.sampled_from(
    ["normal", "bernoulli", "gamma", "randint", "permutation", "choice"]
)


def target(name: str, **fields: Any) -> Node:
    return {"_target_": name, **fields}


def layers(dims: Dims) -> st.SearchStrategy[Node]:
    """One layer, for inputs of these dimensions."""
    some = [
        st.just(target("flax.linen.Dense", features=WIDTH)),
        rates.map(lambda r: target("models.Dropout", rate=r)),
        rates.map(lambda r: target("flax.linen.Dropout", rate=r, broadcast_dims=[-1])),
        rates.map(lambda r: target("models.ResidualMLPBlock", dropout_rate=r)),
        drawn_streams.map(lambda s: target("models.Noise", scale=0.1, stream=s)),
        st.sampled_from(["params", "aux"]).map(held_variable),
        *own_draws(),
    ]
    return st.one_of([*some, *sequence_layers()] if dims else some)


def held_variable(stream: str) -> Node:
    """A variable of the collection `offsets`."""
    init_fn = target("flax.linen.initializers.normal")
    held = {"collection": "offsets", "stream": stream, "init_fn": init_fn}
    return target("models.Variable", shape=[WIDTH], **held)


def own_draws() -> list[st.SearchStrategy[Node]]:
    """Modules that draw with `jax.random`: in the call, twice as often; or once."""

    def call(stream: str, chain: Any, kind: str, always: bool) -> Node:
        fields = {"chain": chain, "kind": kind, "always": always}
        return target(f"{LAB}.Draws", stream=stream, **fields)

    def hold(collection: str, chain: Any, kind: str) -> Node:
        fields = {"chain": chain, "kind": kind, "holds": collection}
        return target(f"{LAB}.Draws", stream="aux", **fields)

    calls = st.builds(call, drawn_streams, chains, kinds, st.booleans())
    held = st.builds(hold, st.sampled_from(["params", "offsets"]), chains, kinds)
    return [calls, calls, held]


def sequence_layers() -> list[st.SearchStrategy[Node]]:
    """Layers that need an axis before the last one."""

    def attend(rate: float, broadcast: bool) -> Node:
        fields = {"dropout_rate": rate, "broadcast_dropout": broadcast}
        return target("flax.linen.MultiHeadDotProductAttention", num_heads=2, **fields)

    def recur(cell: str, split: bool, reverse: bool) -> Node:
        split_rngs = {"params": False, "noise": split}
        fields = {"split_rngs": split_rngs, "reverse": reverse}
        return target("flax.linen.RNN", cell=target(cell, features=WIDTH), **fields)

    cells = st.sampled_from(
        ["flax.linen.LSTMCell", "flax.linen.GRUCell", f"{LAB}.Cell"]
    )
    return [
        st.builds(attend, rates, st.booleans()),
        st.builds(recur, cells, st.booleans(), st.booleans()),
    ]


def collections_of(node: Any) -> list[str]:
    """Collections of a node that a lift around it has to name."""
    return ["params", *(["offsets"] if "offsets" in json.dumps(node) else [])]


@st.composite
def nodes(draw: Any, dims: Dims, depth: int) -> Node:
    """A layer, a chain of nodes, or a lift around a node."""
    kind = draw(st.sampled_from(["layer", "chain", "lift", "lift", "lift"]))
    if not depth or kind == "layer":
        node = layers(dims)
    elif kind == "chain":
        node = sequentials(dims, depth - 1)
    else:
        node = lifts(dims, depth)
    made: Node = draw(node)
    return made


@st.composite
def sequentials(draw: Any, dims: Dims, depth: int) -> Node:
    """Up to three nodes; names that join to one text are among theirs."""
    some = draw(st.lists(nodes(dims, depth), min_size=1, max_size=2))
    names = draw(st.permutations(["a", "ab", "b", "bc", "c", "abc"]))
    for node, name in zip(some, names, strict=False):
        if draw(st.integers(0, 2)) == 0:
            node["name"] = name
    return target("models.Sequential", layers=some)


@st.composite
def split_rngs(draw: Any, *, shares: bool, holds: bool) -> dict[str, bool]:
    """Mostly every stream split; seldom one shared, or not mentioned."""
    split = {name: draw(st.integers(0, 9)) > 0 for name in STREAMS}
    if shares:
        split |= {"params": False, **({"aux": False} if holds else {})}
    left_out = draw(st.sampled_from([None] * 9 + ["dropout", "noise"]))
    return {name: each for name, each in split.items() if name != left_out}


@st.composite
def lifts(draw: Any, dims: Dims, depth: int) -> Node:
    """A lift, and in it what has one lift less around it."""
    kinds = ["scan", "scan", "remat", "jit", "remat_scan", "cond", "switch"]
    kind = draw(st.sampled_from([*kinds, *["vmap"] * (2 if dims else 0)]))
    if kind in ("cond", "switch"):
        node = branches(kind, dims, depth - 1)
    elif kind in ("remat", "jit"):
        node = calls(kind, dims, depth - 1)
    else:
        node = loops(kind, dims, depth - 1)
    made: Node = draw(node)
    return made


@st.composite
def calls(draw: Any, kind: str, dims: Dims, depth: int) -> Node:
    fields = draw(policies) if kind == "remat" else {}
    return {"lift": kind, "module": draw(nodes(dims, depth)), **fields}


@st.composite
def loops(draw: Any, kind: str, dims: Dims, depth: int) -> Node:
    axis = draw(st.sampled_from(range(len(dims)))) if kind == "vmap" else None
    node = draw(nodes(tuple(d for i, d in enumerate(dims) if i != axis), depth))
    names = collections_of(node)
    # The number of rows is not that of the initialisation in every phase.
    shares = draw(st.booleans()) or (axis is not None and dims[axis] == "rows")
    out = {
        "lift": kind,
        "module": node,
        "split_rngs": draw(split_rngs(shares=shares, holds="offsets" in names)),
    }
    if kind == "vmap":
        axes = dict.fromkeys(names, None if shares else 0)
        return {**out, "in_axes": axis, "out_axes": axis, "variable_axes": axes}
    if shares:
        out |= {"variable_broadcast": names, "variable_axes": {}}
    else:
        out |= {"variable_axes": dict.fromkeys(names, 0)}
    if kind == "remat_scan":
        return {**out, "lengths": draw(st.sampled_from([[2], [2, 2]]))}
    return {**out, **draw(st.sampled_from(LENGTHS)), **draw(st.sampled_from(ORDERS))}


LENGTHS: tuple[Node, ...] = (
    *({"length": 1}, {"length": 2}, {"length": 3}, {"length": 3, "chunk": 1}),
    *({"length": 2, "chunk": 2}, {"length": 4, "chunk": 2}),
)
ORDERS: tuple[Node, ...] = ({}, {}, {"reverse": True}, {"unroll": 2})
policies = st.sampled_from(
    [
        *({}, {"prevent_cse": False}, {"policy": "dots_saveable"}),
        *({"policy": "nothing_saveable"}, {"policy": "everything_saveable"}),
    ]
)


@st.composite
def branches(draw: Any, kind: str, dims: Dims, depth: int) -> Node:
    some = [draw(nodes(dims, depth)) for _ in range(2 if kind == "cond" else 3)]
    if kind == "switch":
        return {"lift": kind, "index": target(f"{LAB}.number"), "branches": some}
    one, other = some
    choose = {"pred": target(f"{LAB}.positive")}
    return {"lift": kind, **choose, "true_fun": one, "false_fun": other}


@st.composite
def models(draw: Any, *, depth: int) -> Node:
    """A lift and up to two nodes more, in any order, before the last layer."""
    dims = ("rows", "time")
    some = [draw(lifts(dims, depth)), *draw(sequentials(dims, depth))["layers"]]
    some = draw(st.permutations(some))
    last = [target("models.Flatten"), target("flax.linen.Dense", features=CLASSES)]
    return target("models.Sequential", layers=[*some, *last])


# Streams and the rest ---------------------------------------------------------------

PHASES = {
    "params": (["init"], ["init", "train"], ["init", "train", "eval"]),
    "dropout": (["train"], ["train", "eval"], ["init", "train"]),
    "noise": (["train", "eval"], ["train"]),
    "aux": (["init", "train", "eval"], ["init", "train"]),
}
COORDINATES: tuple[list[str], ...] = (
    *[["step", "microbatch"]] * 4,
    *[["epoch", "step", "microbatch"]] * 2,
    *(["microbatch", "step"], ["step", "epoch", "microbatch"]),
    *(["step"], ["epoch"], []),
)


@st.composite
def streams(draw: Any) -> Node:
    """Four streams, each with a policy of its own, in any order."""
    out: Node = {}
    for name in draw(st.permutations(STREAMS)):
        per: Any = draw(st.sampled_from(COORDINATES))
        if per[:1] == ["step"] and draw(st.booleans()):
            per = {"step": "carry", **dict.fromkeys(per[1:], "fold_in")}
        out[name] = {"phases": draw(st.sampled_from(PHASES[name])), "per": per}
        kind = draw(
            st.sampled_from(["name", "name", "name", "split", "root", "own", "both"])
        )
        if kind in ("own", "both"):
            out[name]["seed"] = draw(st.integers(0, 2**32 - 1))
        if kind != "own":
            out[name]["derive"] = "name" if kind == "both" else kind
    return out


@st.composite
def configs(draw: Any, *, depth: int) -> Node:
    """All of a config but for its rows."""
    some = st.sampled_from
    host = {"shuffle": {"kind": "host", "per": ["epoch"]}, "split": {"kind": "host"}}
    return {
        "trusted": [LAB],
        "model": draw(models(depth=depth)),
        "optimizer": target("optax.sgd", learning_rate=1e-9),
        "train": {
            "steps": STEPS,
            "accumulation_steps": draw(some([1, 2])),
            "steps_per_call": draw(some([1, 2, "auto"])),
        },
        "eval": {"every": draw(some([1, 2])), "batch_size": draw(some([2, 4, 6]))},
        "rng": {
            "seed": draw(st.integers(0, 2**32 - 1)),
            "impl": draw(some(["threefry2x32"] * 5 + ["rbg"])),
            "partitionable": draw(st.booleans()),
            "fix_separator": draw(st.booleans()),
            "observe": True,
            "allow": list(HAZARD_CODES),
            "streams": {**draw(streams()), **host},
        },
    }


# By hand ----------------------------------------------------------------------------


def derive_stream(config: Node, name: str, phase: str, at: dict[str, int]) -> Any:
    """The key of a stream, as its declaration says, at a phase's coordinates."""
    rng, stream = config["rng"], config["rng"]["streams"][name]
    key = jax.random.key(stream.get("seed", rng["seed"]), impl=rng["impl"])
    rule = stream.get("derive") or ("root" if "seed" in stream else "name")
    if rule == "name":
        key = jax.random.fold_in(key, hash_of(name))
    elif rule == "split":
        every = [n for n, s in rng["streams"].items() if s.get("derive") == "split"]
        key = jax.random.split(key, len(every))[every.index(name)]
    if phase == "eval":
        key = jax.random.fold_in(key, hash_of(phase))
    per = stream["per"]
    for coordinate in per:
        if coordinate not in at:
            continue
        if isinstance(per, dict) and per[coordinate] == "carry":
            for _ in range(at[coordinate]):
                key = jax.random.split(key)[1]
            key = jax.random.split(key)[0]
        else:
            key = jax.random.fold_in(key, at[coordinate])
    return key


def hash_of(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


class Value:
    """A value that is computed when it is asked for, once."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make

    @functools.cached_property
    def now(self) -> Any:
        return self.make()


@dataclass
class Consumers:
    """Runs a jaxpr and notes the keys that are consumed; every branch is taken.

    Args:
        always: Keys that are consumed whatever the rows are.
        perhaps: Those that are consumed in a branch.
    """

    always: set[Words] = field(default_factory=set)
    perhaps: set[Words] = field(default_factory=set)

    def run(
        self, closed: Any, args: Sequence[Value], *, inside: bool = False
    ) -> list[Value]:
        jaxpr, consts = closed, []
        if isinstance(closed, ClosedJaxpr):
            jaxpr, consts = closed.jaxpr, closed.consts
        env = dict(zip(jaxpr.constvars, map(known, consts), strict=True))
        env |= dict(zip(jaxpr.invars, args, strict=True))

        def read(atom: Any) -> Value:
            return known(atom.val) if isinstance(atom, Literal) else env[atom]

        for eqn in jaxpr.eqns:
            outs = self.step(eqn, list(map(read, eqn.invars)), inside)
            env |= dict(zip(eqn.outvars, outs, strict=True))
        return list(map(read, jaxpr.outvars))

    def step(self, eqn: Any, args: list[Value], inside: bool) -> list[Value]:
        name, params = eqn.primitive.name, eqn.params
        if name in CONSUMING:
            words = np.asarray(jax.random.key_data(args[0].now))
            found = self.perhaps if inside else self.always
            found |= set(map(tuple, words.reshape(-1, words.shape[-1]).tolist()))
        if name == "scan":
            return self.scan(params, args, inside)
        if name == "cond":
            every = [self.run(b, args[1:], inside=True) for b in params["branches"]]
            return [
                Value(lambda i=i: every[int(args[0].now)][i].now)
                for i in range(len(eqn.outvars))
            ]
        if name == "while":
            return self.loop(params, args, inside)
        if name == "select_n" and is_key(eqn.outvars[0]):
            return [Value(functools.partial(select, args))]
        for called in ("jaxpr", "call_jaxpr"):
            if called in params:
                return self.run(params[called], args, inside=inside)

        def bind() -> Any:
            given = eqn.primitive.get_bind_params(params)
            outs = eqn.primitive.bind(*(arg.now for arg in args), **given)
            return outs if eqn.primitive.multiple_results else [outs]

        outs = Value(bind)
        return [Value(lambda i=i: outs.now[i]) for i in range(len(eqn.outvars))]

    def scan(self, params: Any, args: list[Value], inside: bool) -> list[Value]:
        n, c, length = (params[k] for k in ("num_consts", "num_carry", "length"))
        consts, carry, xs = args[:n], args[n : n + c], args[n + c :]
        rows: list[list[Value]] = [[]] * length
        turns = range(length)
        for i in reversed(turns) if params["reverse"] else turns:
            at = [Value(lambda x=x, i=i: x.now[i]) for x in xs]
            outs = self.run(params["jaxpr"], [*consts, *carry, *at], inside=inside)
            carry, rows[i] = outs[:c], outs[c:]
        columns = zip(*rows, strict=True)
        return [*carry, *(Value(functools.partial(stack, c)) for c in columns)]

    def loop(self, params: Any, args: list[Value], inside: bool) -> list[Value]:
        n, m = params["cond_nconsts"], params["body_nconsts"]
        asked, given, carry = args[:n], args[n : n + m], args[n + m :]
        run = functools.partial(self.run, inside=inside)
        while run(params["cond_jaxpr"], [*asked, *carry])[0].now:
            carry = run(params["body_jaxpr"], [*given, *carry])
        return carry


CONSUMING = ("random_bits", "random_gamma")


def known(value: Any) -> Value:
    return Value(lambda: value)


def stack(column: Sequence[Value]) -> Any:
    return jnp.stack([row.now for row in column])


def is_key(var: Any) -> bool:
    return jnp.issubdtype(var.aval.dtype, jax.dtypes.prng_key)


def select(args: Sequence[Value]) -> Any:
    """One of several keys; which one makes no difference where all are equal."""
    first, *others = [arg.now for arg in args[1:]]
    words = jax.random.key_data(first)
    assert all((words == jax.random.key_data(other)).all() for other in others)
    return first


def unknown() -> Any:
    raise AssertionError("a key depends on rows or variables")


def count_consumers(jaxpr: Any) -> int:
    """Places that consume a key, in a jaxpr and in all within it."""
    total = 0
    for eqn in jaxpr.eqns:
        total += eqn.primitive.name in CONSUMING
        inner = jax.tree.leaves(
            list(eqn.params.values()),
            is_leaf=lambda v: isinstance(v, Jaxpr | ClosedJaxpr),
        )
        total += sum(
            count_consumers(getattr(each, "jaxpr", each))
            for each in inner
            if isinstance(each, Jaxpr | ClosedJaxpr)
        )
    return total


class ByHand:
    """The model of a config as Flax calls it, in each phase."""

    def __init__(self, config: Node) -> None:
        self.config, self.parts = config, config["train"]["accumulation_steps"]
        self.eval_rows = config["eval"]["batch_size"]
        module = build_module(config["model"], path="model", trusted=(LAB,))
        # An evaluation is given what it asks for; a warning says if that is not for it.
        self.given = {
            "init": STREAMS,
            "train": [name for name in STREAMS if "train" in self.phases(name)],
            "eval": STREAMS,
        }
        x = jnp.zeros((BATCH // self.parts, TIME, WIDTH))
        test_x = jnp.zeros((self.eval_rows, TIME, WIDTH))

        def init(rngs: Any) -> Any:
            return flax.core.unfreeze(module.init(rngs, x, deterministic=True))

        def train(rngs: Any, variables: Any) -> Any:
            changed = [name for name in variables if name != "params"]
            return module.apply(
                variables, x, rngs=rngs, deterministic=False, mutable=changed
            )

        def evaluate(rngs: Any, variables: Any) -> Any:
            return module.apply(variables, test_x, rngs=rngs, deterministic=True)

        variables = jax.eval_shape(init, self.rngs("init", {}))
        self.programs = {
            "init": self.trace("init", init),
            "train": self.trace("train", train, variables),
            "eval": self.trace("eval", evaluate, variables),
        }

    def phases(self, name: str) -> list[str]:
        found: list[str] = self.config["rng"]["streams"][name]["phases"]
        return found

    def trace(self, phase: str, function: Any, *args: Any) -> ClosedJaxpr:
        closed = jax.make_jaxpr(function)(self.rngs(phase, {}), *args)
        every = [True] * len(closed.jaxpr.outvars)
        live, _ = dce_jaxpr(closed.jaxpr, every, instantiate=True)
        consts = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
        return ClosedJaxpr(live, [consts[var] for var in live.constvars])

    def rngs(self, phase: str, at: dict[str, int]) -> dict[str, Any]:
        names = self.given[phase]
        return {n: derive_stream(self.config, n, phase, at) for n in names}

    def places(self, phase: str) -> int:
        return count_consumers(self.programs[phase].jaxpr)

    def consumed(self, phase: str, step: int) -> Consumers:
        """The keys of one step, over its microbatches or batches."""
        found, program = Consumers(), self.programs[phase]
        parts = {"init": 1, "train": self.parts, "eval": -(-TESTS // self.eval_rows)}
        for part in range(parts[phase]):
            at = {"step": step, "epoch": step * BATCH // ROWS}
            at = at if phase != "init" else {}
            if parts[phase] > 1:
                at["microbatch"] = part
            keys = jax.tree.leaves(self.rngs(phase, at))
            rest = len(program.jaxpr.invars) - len(keys)
            found.run(program, [*map(known, keys), *[Value(unknown)] * rest])
        return found


# The accounts -----------------------------------------------------------------------


class Seen:
    """A watch that writes down the keys of each step, and finds no fault."""

    def __init__(self, ledger: Any, window: int) -> None:
        self.keys: dict[At, set[Words]] = {}

    def expect(self, phase: Phase, first: int, *, steps: int = 1) -> Any:
        return None

    def compare(
        self, phase: Phase, first: int, *, planned: Any, observed: list[Observation]
    ) -> str:
        for part in (part for each in observed for part in split_places(each)):
            for row, keys in enumerate(part.tolist()):
                seen = self.keys.setdefault((str(phase), first + row), set())
                seen |= {tuple(words) for *words, drawn in keys if drawn}
        return ""

    def check(self) -> None:
        """Nothing more was asked for."""


class Compared(Seen):
    """In addition, the runner's own comparison: it has programs to compile."""

    def __init__(self, ledger: Any, window: int) -> None:
        super().__init__(ledger, window)
        self.comparison = Comparison(ledger, window=window)
        self.expect = self.comparison.expect  # type: ignore[method-assign]

    def compare(
        self, phase: Phase, first: int, *, planned: Any, observed: list[Observation]
    ) -> str:
        super().compare(phase, first, planned=planned, observed=observed)
        return self.comparison.compare(phase, first, planned=planned, observed=observed)

    def check(self) -> None:
        found = self.comparison.to_plain()
        assert (found["status"], found["beyond"]) == ("equal", [])
        # A key that two entries share counts for both.
        assert found["keys"] >= sum(map(len, self.keys.values()))


def replay(rows: list[Mapping[str, Any]], impl: str, known: dict[str, Any]) -> Words:
    """What a reader does who has `jax.random` and not this project."""
    key: Any = None
    text = ""
    for row in rows:
        text += json.dumps({k: v for k, v in row.items() if k != "why"})
        if text in known:
            key = known[text]
        elif row["op"] == "seed":
            key = jax.random.key(row["value"], impl=impl)
        elif row["op"] == "fold_in":
            key = jax.random.fold_in(key, row["value"])
        else:
            assert row["op"] == "split"
            key = jax.random.split(key, row["of"])[row["index"]]
        known[text] = key
    return tuple(np.asarray(jax.random.key_data(key)).tolist())


def keys_of(entries: Sequence[Mapping[str, Any]]) -> set[Words]:
    return {tuple(entry["key"]) for entry in entries}


def check(config: Node, *, watch: type[Seen]) -> None:
    """All accounts of one config's keys; returns early where the runner refuses it."""
    try:
        program = compile_run(parse_spec(config))
    except ConfigError as error:
        event(f"refused: {error.rule}"[:60])
        return
    assert isinstance(program, Program)
    hazards = find_hazards(program)
    if any(hazard.is_fatal for hazard in hazards):
        event("refused: fatal hazard")
        return
    rng = config["rng"]
    with (
        flax.config.temp_flip_flag("fix_rng_separator", rng["fix_separator"]),
        jax.threefry_partitionable(rng["partitionable"]),
        jax.default_prng_impl(rng["impl"]),
    ):
        ledger = json.loads(json.dumps(make_ledger(program)))
        by_hand = ByHand(config)
        check_places(ledger, by_hand)
        planned = check_keys(ledger, by_hand)
    check_distinct(planned, hazards)
    check_observed(program, ledger, planned, watch=watch)
    describe(config, ledger, hazards)


def check_places(ledger: Any, by_hand: ByHand) -> None:
    """As many draws as places that consume a key."""
    lost = [draw for draw in ledger["draws"] if "untraced" in draw]
    assert not lost, lost
    stacks = '["stack"' in json.dumps(by_hand.config["model"])
    for phase in ("init", "train", "eval"):
        draws = [draw for draw in ledger["draws"] if draw["phase"] == phase]
        listed = sum(len(draw["uses"]) for draw in draws)
        places = by_hand.places(phase)
        # The keys that `stack` puts side by side are drawn from at one place.
        assert listed >= places if stacks else listed == places, phase


def check_keys(ledger: Any, by_hand: ByHand) -> dict[At, list[Any]]:
    """The ledger's entries of some steps: by hand, the same keys; each replays."""
    planned: dict[At, list[Any]] = {}
    derived: dict[str, Any] = {}
    steps = [("init", 0), ("train", 1), ("train", 2), ("eval", STEPS)]
    for phase, step in steps:
        entries = planned[phase, step] = [
            {**entry, "conditional": draw.get("conditional", False)}
            for draw in ledger["draws"]
            if draw["phase"] == phase
            for entry in expand(ledger, draw, step=step)
        ]
        hand = by_hand.consumed(phase, step)
        assert keys_of(entries) == hand.always | hand.perhaps, (phase, step)
        certain = [entry for entry in entries if not entry["conditional"]]
        assert keys_of(certain) == hand.always, (phase, step)
        for entry in entries:
            key = replay(entry["derivation"], entry["impl"], derived)
            assert key == tuple(entry["key"])
    return planned


def check_distinct(planned: dict[At, list[Any]], hazards: Any) -> None:
    """No two draws share a key, but for what a hazard is told of."""
    if SHARED & {hazard.code for hazard in hazards}:
        return
    entries = [e for some in planned.values() for e in some if not e["conditional"]]
    assert all(len(entry["uses"]) == 1 for entry in entries)
    assert len(keys_of(entries)) == len(entries)


def check_observed(
    program: Program, ledger: Any, planned: dict[At, list[Any]], *, watch: type[Seen]
) -> None:
    """The compiled program draws from these keys, but for branches not taken."""
    seen = watch(ledger, program.window)
    *_, outcome = train(program, watch=seen)
    assert isinstance(outcome, Outcome)
    assert (outcome.status, outcome.reason) == ("completed", "")
    for at, entries in planned.items():
        certain = [entry for entry in entries if not entry["conditional"]]
        assert keys_of(certain) <= seen.keys.get(at, set()) <= keys_of(entries), at
    seen.check()


def describe(config: Node, ledger: Any, hazards: Any) -> None:
    """What examples are made of, for hypothesis's statistics."""
    event(f"lifts: {depth_of(config['model'])} deep")
    event("refusable" if SHARED & {h.code for h in hazards} else "all keys distinct")
    if any(draw.get("conditional") for draw in ledger["draws"]):
        event("branches")
    kinds = {kind for kind in WORDS if f'"{kind}"' in json.dumps(config)}
    for kind in kinds:
        event(f"has {kind}")


WORDS = (
    *("scan", "vmap", "remat", "jit", "remat_scan", "cond", "switch", "chunk"),
    *("flax.linen.RNN", "flax.linen.MultiHeadDotProductAttention", f"{LAB}.Draws"),
)


def depth_of(node: Any) -> int:
    """Lifts around the deepest node."""
    children = node.values() if isinstance(node, dict) else node
    if not isinstance(node, dict | list):
        return 0
    return ("lift" in node) + max(map(depth_of, children), default=0)


watches = st.sampled_from([Seen, Seen, Seen, Compared])


@settings(SETTINGS, max_examples=int(EXAMPLES or 11))
@given(config=configs(depth=3), watch=watches)
def test_lifts_in_lifts(arrays: Path, config: Node, watch: type[Seen]) -> None:
    check({**config, "data": data_of(arrays)}, watch=watch)


@settings(SETTINGS, max_examples=int(EXAMPLES or 14))
@given(config=configs(depth=1), watch=watches)
def test_a_lift_or_none(arrays: Path, config: Node, watch: type[Seen]) -> None:
    check({**config, "data": data_of(arrays)}, watch=watch)


def data_of(arrays: Path) -> Node:
    return {"name": "arrays", "path": str(arrays), "batch_size": BATCH}
