# SPDX-License-Identifier: Apache-2.0
"""A `lift:` node against the same program by hand, in Flax's class form, bit for bit.

By hand means `nn.scan(Body, ...)(...)`: the transform of the class, with its arguments
in Python. Each case has dropout on, so that a key that moves is seen in the outputs;
`Tap` returns the keys themselves.
"""

import inspect
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax.core import DenyList
from flax.typing import In, Out
from jax.ad_checkpoint import checkpoint_name

from runner.build import build_module
from runner.errors import TargetError
from runner.lift.fields import KINDS
from runner.parse import freeze

PACKAGE = "lab_of_test_lift"
X = jnp.linspace(-1, 1, 24).reshape(2, 3, 4)
SPLIT = {"params": True, "dropout": True}
AXES: dict[str, Any] = {"variable_axes": {"params": 0}, "split_rngs": SPLIT}
SHARED: dict[str, Any] = {
    "variable_broadcast": "params",
    "split_rngs": {"params": False, "dropout": True},
}


def rngs() -> dict[str, jax.Array]:
    names = ("params", "dropout", "noise")
    return {name: jax.random.key(i) for i, name in enumerate(names)}


def residual(x: Any, deterministic: bool | None, rate: float = 0.5) -> Any:
    h = checkpoint_name(nn.relu(nn.Dense(x.shape[-1])(jnp.sin(x))), "hidden")
    return x + nn.Dropout(rate)(h, deterministic=deterministic)


class Block(nn.Module):
    """A layer: takes x, returns x."""

    deterministic: bool | None = None

    @nn.compact
    def __call__(self, x: Any, deterministic: bool | None = None) -> Any:
        flag = nn.merge_param("deterministic", self.deterministic, deterministic)
        return residual(x, flag)


class Body(Block):
    """The body of a scan without inputs."""

    @nn.compact
    def __call__(self, carry: Any, _: Any, deterministic: bool | None = None) -> Any:
        flag = nn.merge_param("deterministic", self.deterministic, deterministic)
        return residual(carry, flag), None


class Step(Block):
    """The body of a scan with inputs and outputs."""

    @nn.compact
    def __call__(self, carry: Any, x: Any, deterministic: bool | None = None) -> Any:
        flag = nn.merge_param("deterministic", self.deterministic, deterministic)
        carry = residual(carry + x, flag)
        return carry, 2 * carry


class Steps(Block):
    """Two inputs, two outputs."""

    @nn.compact
    def __call__(
        self, carry: Any, x: Any, bias: Any, deterministic: bool | None = None
    ) -> Any:
        flag = nn.merge_param("deterministic", self.deterministic, deterministic)
        carry = residual(carry + x, flag) + bias
        return carry, (carry, 2 * carry)


class Swap(Block):
    """A pair as carry."""

    @nn.compact
    def __call__(self, pair: Any, deterministic: bool | None = None) -> Any:
        flag = nn.merge_param("deterministic", self.deterministic, deterministic)
        return residual(pair[1], flag), pair[0]


class Pair(Block):
    """Takes a mapping."""

    @nn.compact
    def __call__(self, pair: Any, deterministic: bool | None = None) -> Any:
        flag = nn.merge_param("deterministic", self.deterministic, deterministic)
        return residual(pair["x"] + pair["y"], flag)


class Tap(Block):
    """Returns the key that it would draw with."""

    @nn.compact
    def __call__(
        self, carry: Any, _: Any = None, deterministic: bool | None = None
    ) -> Any:
        if self.has_rng("dropout"):
            return carry, jax.random.key_data(self.make_rng("dropout"))
        return carry, jnp.zeros(2, jnp.uint32)


class Counted(Block):
    """Counts its training calls, which enter its output, and keeps statistics."""

    @nn.compact
    def __call__(self, x: Any, _: Any = None, deterministic: bool | None = None) -> Any:
        flag = nn.merge_param("deterministic", self.deterministic, deterministic)
        count = self.variable("counts", "calls", lambda: jnp.float32(0))
        norm = nn.BatchNorm(use_running_average=flag, momentum=0.5, name="norm")
        x = norm(residual(x, flag)) + count.value
        if not flag:
            count.value += 1
        return x, None


class Normed(Block):
    """Statistics over an axis that vmap names."""

    @nn.compact
    def __call__(self, x: Any, deterministic: bool | None = None) -> Any:
        flag = nn.merge_param("deterministic", self.deterministic, deterministic)
        x = residual(x, flag)
        norm = nn.BatchNorm(
            use_running_average=flag,
            momentum=0.5,
            axis_name=None if self.is_initializing() else "members",
        )
        return norm(x)


class Looked(Block):
    """Reads a table, and leaves what it saw."""

    @nn.compact
    def __call__(self, x: Any, _: Any = None, deterministic: bool | None = None) -> Any:
        flag = nn.merge_param("deterministic", self.deterministic, deterministic)
        row = self.variable("table", "row", lambda: jnp.arange(4.0)).value
        x = residual(x, flag) + row
        if self.is_mutable_collection("seen") and not self.is_initializing():
            self.variable("seen", "x", lambda: x)
        return x, None


class Boxed(Block):
    """A kernel with the names of its axes."""

    @nn.compact
    def __call__(self, x: Any, _: Any = None, deterministic: bool | None = None) -> Any:
        flag = nn.merge_param("deterministic", self.deterministic, deterministic)
        init = nn.with_partitioning(nn.initializers.normal(), ("in", "out"))
        x = nn.Dropout(0.5)(nn.Dense(4, kernel_init=init)(x), deterministic=flag)
        return x, None


class Coder(Block):
    """Methods that call one another."""

    def setup(self) -> None:
        self.dense, self.drop = nn.Dense(4), nn.Dropout(0.5)

    def encode(self, x: Any, deterministic: bool | None = None) -> Any:
        flag = nn.merge_param("deterministic", self.deterministic, deterministic)
        return self.drop(self.dense(x), deterministic=flag)

    def decode(self, x: Any, deterministic: bool | None = None) -> Any:
        return 2 * self.encode(x, deterministic)

    def __call__(self, x: Any, deterministic: bool | None = None) -> Any:
        return self.decode(self.encode(x, deterministic), deterministic)


class Noisy(Block):
    """Draws from two streams."""

    @nn.compact
    def __call__(self, x: Any, deterministic: bool | None = None) -> Any:
        flag = nn.merge_param("deterministic", self.deterministic, deterministic)
        x = residual(x, flag)
        return x if flag else x + jax.random.normal(self.make_rng("noise"), x.shape)


class Static(Block):
    """Python knows its second argument."""

    @nn.compact
    def __call__(self, x: Any, power: int, deterministic: bool | None = None) -> Any:
        flag = nn.merge_param("deterministic", self.deterministic, deterministic)
        return residual(x, flag) ** int(power)


class Pinned(Block):
    """An output that is pinned to devices."""

    @nn.compact
    def __call__(self, x: Any, deterministic: bool | None = None) -> Any:
        mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,))
        spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        return jax.lax.with_sharding_constraint(nn.Dense(4)(x), spec)


class Named(Block):
    """Values with names for a policy."""

    @nn.compact
    def __call__(self, x: Any, deterministic: bool | None = None) -> Any:
        h = checkpoint_name(nn.Dense(4)(x), "inner")
        h = checkpoint_name(jnp.sin(h), "outer")
        return jnp.sin(nn.Dense(4)(h))


class Holder(nn.Module):
    """Calls a part that is lifted, and one that has no name."""

    part: nn.Module

    @nn.compact
    def __call__(self, x: Any, deterministic: bool | None = None) -> Any:
        return nn.Dense(2)(self.part(x, deterministic=deterministic))


def double(variable_groups: Any, rng_groups: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf * 2, variable_groups), rng_groups


def halve(tree: Any) -> Any:
    assert isinstance(tree, Mapping)  # a collection, not one array
    return jax.tree.map(lambda leaf: leaf / 2, tree)


def twice(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf * 2, tree)


CLASSES = (
    *(Block, Body, Step, Steps, Swap, Pair, Tap, Counted, Normed, Looked, Boxed, Coder),
    *(Noisy, Static, Pinned, Named, Holder, double, halve, twice),
)


@pytest.fixture(scope="module", autouse=True)
def lab() -> Iterator[None]:
    package = ModuleType(PACKAGE)
    for value in CLASSES:
        value.__module__ = PACKAGE
        setattr(package, value.__name__, value)
    sys.modules[PACKAGE] = package
    yield
    del sys.modules[PACKAGE]


def target(of: str, /, **arguments: Any) -> dict[str, Any]:
    return {"_target_": of, **arguments}


def mine(of: Any, /, **arguments: Any) -> dict[str, Any]:
    return target(f"{PACKAGE}.{of.__name__}", **arguments)


def lift(kind: str, module: Any, /, **fields: Any) -> dict[str, Any]:
    return {"lift": kind, "module": module, **fields}


def build(node: Any) -> nn.Module:
    frozen = freeze(node, path="model")
    return build_module(frozen, path="model", trusted=(PACKAGE,))


def to_bits(tree: Any) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(flax.core.unfreeze(tree))
    return {
        jax.tree_util.keystr(path): (str(x.dtype), x.shape, np.asarray(x).tobytes())
        for path, x in leaves
    }


def assert_same(ours: Any, theirs: Any) -> None:
    """Same containers, paths, shapes, dtypes, bytes."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    ours, theirs = to_bits(ours), to_bits(theirs)
    assert ours.keys() == theirs.keys()
    assert not [path for path in ours if ours[path] != theirs[path]]


@dataclass(frozen=True)
class Case:
    """A node, and the same by hand.

    Args:
        node: As YAML gives it.
        hand: The same, given `deterministic`.
        args: What both are called with.
        more: What the one by hand needs besides (a scan body's empty input).
        changes: Collections that the call changes.
        matters: Fields without which the result is another.
    """

    node: Mapping[str, Any]
    hand: Callable[[bool], nn.Module]
    args: tuple[Any, ...] = (X,)
    more: tuple[Any, ...] = ()
    changes: tuple[str, ...] = ()
    matters: tuple[str, ...] = ()


def yaml_of(value: Any) -> Any:
    """How YAML spells an argument of Flax."""
    if value is nn.broadcast:
        return "broadcast"
    if isinstance(value, In | Out):
        return {"in" if isinstance(value, In) else "out": value.axis}
    if isinstance(value, DenyList):
        return {"deny": yaml_of(value.deny)}
    if isinstance(value, tuple):
        return [yaml_of(each) for each in value]
    if isinstance(value, Mapping):
        pairs = [(yaml_of(k), yaml_of(v)) for k, v in value.items()]
        is_plain = all(isinstance(k, str | bool) for k, _ in pairs)
        return dict(pairs) if is_plain else [list(pair) for pair in pairs]
    return mine(value) if callable(value) else value


def same(kind: str, of: type[nn.Module], *args: Any, **fields: Any) -> Case:
    """The case of a class whose arguments YAML spells as Python does."""
    names = ("more", "changes", "matters")
    extra = {name: fields.pop(name) for name in names if name in fields}
    plain = {name: yaml_of(value) for name, value in fields.items()}

    def hand(deterministic: bool) -> nn.Module:
        made: nn.Module = getattr(nn, kind)(of, **fields)(deterministic=deterministic)
        return made

    return Case(lift(kind, mine(of), **plain), hand, args or (X,), **extra)


def ours_of(case: Case, node: Any) -> tuple[Any, Any]:
    """Variables; and (outputs, changed collections) of a call with dropout on."""
    made, args = build(node), case.args
    variables = made.init(rngs(), *args, deterministic=True)
    apply = partial(made.apply, rngs=rngs(), mutable=list(case.changes))
    return variables, apply(variables, *args, deterministic=False)


def theirs_of(case: Case) -> tuple[Any, Any]:
    args = (*case.args, *case.more)
    variables = case.hand(True).init(rngs(), *args)
    apply = partial(case.hand(False).apply, rngs=rngs(), mutable=list(case.changes))
    outputs, changed = apply(variables, *args)
    return variables, (as_ours(case, outputs), changed)


def as_ours(case: Case, outputs: Any) -> Any:
    """A scan without outputs is a layer like any: it returns its carry."""
    is_alone = case.node["lift"] == "scan" and outputs[1] is None
    return outputs[0] if is_alone else outputs


NONE: tuple[Any, ...] = (None,)
LENGTH: dict[str, Any] = {"length": 3, "more": NONE}
XS = jnp.linspace(0, 1, 20).reshape(5, 4)  # 5 steps of what is added to rows of 4

SCANS = {
    "length": same("scan", Body, **AXES, **LENGTH, matters=("length",)),
    "axis 1": same("scan", Body, variable_axes={"params": 1}, split_rngs=SPLIT,
                   **LENGTH, matters=("variable_axes",)),
    "axis -1": same("scan", Body, variable_axes={"params": -1}, split_rngs=SPLIT,
                    **LENGTH),
    "shared parameters": same("scan", Body, **SHARED, **LENGTH,
                              matters=("variable_broadcast",)),
    "shared mask": same("scan", Body, variable_axes={"params": 0}, **LENGTH,
                        split_rngs={"params": True, "dropout": False}),
    "shared everything": same("scan", Body, variable_broadcast="params", **LENGTH,
                              split_rngs={"params": False, "dropout": False}),
    "statistics of each": same(
        "scan", Counted, variable_axes={"params": 0, "batch_stats": 0, "counts": 0},
        split_rngs=SPLIT, **LENGTH, changes=("batch_stats", "counts")),
    "filters": same(
        "scan", Counted, split_rngs={DenyList("params"): True, "params": True},
        variable_axes={("params", "batch_stats"): 1, DenyList("params"): 0},
        **LENGTH, changes=("batch_stats", "counts")),
    "all collections": same("scan", Counted, variable_axes={True: 0}, **LENGTH,
                            split_rngs={True: True},
                            changes=("batch_stats", "counts")),
    "in and out": same(
        "scan", Looked, split_rngs=SPLIT, length=3, changes=("seen",),
        variable_axes={"params": 0, "table": 0, "seen": Out(0)}),
    "in only": same(
        "scan", Looked, split_rngs=SPLIT, length=3, variable_broadcast="table",
        variable_axes={"params": 0, "seen": In(0)}),
    "inputs": same("scan", Step, X[0, 0], XS, **AXES),
    "inputs on axis 1": same("scan", Step, X[0, 0], XS.T, **AXES, in_axes=1,
                             matters=("in_axes",)),
    "outputs on axis 1": same("scan", Step, X[0, 0], XS, **AXES, out_axes=1,
                              matters=("out_axes",)),
    "outputs on axis -1": same("scan", Step, X[0], XS, **AXES, out_axes=-1,
                               matters=("out_axes",)),
    "one input": same("scan", Step, X[0, 0], XS[0], **AXES, in_axes=nn.broadcast,
                      length=3, matters=("in_axes", "length")),
    "inputs of two kinds": same(
        "scan", Steps, X[0, 0], XS.T, XS[1], **AXES, in_axes=(-1, nn.broadcast),
        out_axes=(0, 1), matters=("in_axes", "out_axes")),
    "reverse": same("scan", Step, X[0, 0], XS, **AXES, reverse=True,
                    matters=("reverse",)),
    "unrolled": same("scan", Step, X[0, 0], XS, **AXES, unroll=2),
    "data_transform": same("scan", Body, **AXES, **LENGTH, data_transform=double,
                           matters=("data_transform",)),
    "metadata_params": same("scan", Boxed, **AXES, **LENGTH,
                            metadata_params={"partition_name": "layer"},
                            matters=("metadata_params",)),
    "split transpose": same("scan", Step, X[0, 0], XS, **AXES, _split_transpose=True),
    "unchecked": same("scan", Body, **AXES, **LENGTH,
                      check_constancy_invariants=False),
}  # fmt: skip

VMAPS = {
    "axis 0": same("vmap", Block, **AXES, matters=("variable_axes", "split_rngs")),
    "axis 1": same("vmap", Block, variable_axes={"params": 1}, split_rngs=SPLIT),
    "axis -1": same("vmap", Block, variable_axes={"params": -1}, split_rngs=SPLIT),
    "shared parameters": same(
        "vmap", Block, variable_axes={"params": None},
        split_rngs={"params": False, "dropout": True}),
    "shared mask": same("vmap", Block, variable_axes={"params": 0},
                        split_rngs={"params": True, "dropout": False}),
    "in_axes 1, out_axes -1": same("vmap", Block, **AXES, in_axes=1, out_axes=-1,
                                   matters=("in_axes", "out_axes")),
    "in_axes null": same("vmap", Block, **AXES, in_axes=None, axis_size=5,
                         matters=("axis_size", "in_axes")),
    "in_axes list": same("vmap", Step, X, X[0], **AXES, in_axes=(0, None),
                         out_axes=(0, 1), matters=("in_axes", "out_axes")),
    "in_axes of a mapping": same(
        "vmap", Pair, {"x": X, "y": X[0]}, **AXES, in_axes=({"x": 0, "y": None},),
        matters=("in_axes",)),
    "axis_name": same(
        "vmap", Normed, variable_axes={"params": 0, "batch_stats": None},
        split_rngs=SPLIT, axis_name="members", changes=("batch_stats",),
        matters=("axis_name",)),
    "metadata_params": same("vmap", Boxed, **AXES, matters=("metadata_params",),
                            metadata_params={"partition_name": "member"}),
    "in and out": same(
        "vmap", Looked, split_rngs=SPLIT, changes=("seen",),
        variable_axes={"params": 0, "table": None, "seen": Out(1)}),
    "filters": same(
        "vmap", Counted, variable_axes={DenyList(("batch_stats", "counts")): 1,
                                        ("batch_stats", "counts"): 0},
        split_rngs={True: True}, changes=("batch_stats", "counts")),
}  # fmt: skip

OTHERS = {
    "remat": same("remat", Block),
    "remat: statistics": same("remat", Counted, changes=("batch_stats", "counts")),
    "remat: variables": same("remat", Counted, changes=("batch_stats", "counts"),
                             variables=("params", "batch_stats", "counts")),
    "remat: rngs": same("remat", Noisy, rngs=("params", "dropout"), matters=("rngs",)),
    "remat: concrete": same("remat", Block, concrete=False),
    "remat: static_argnums": same("remat", Static, X, 2, static_argnums=2,
                                  matters=("static_argnums",)),
    "jit": same("jit", Block),
    "jit: statistics": same("jit", Counted, changes=("batch_stats", "counts")),
    "jit: variables": same("jit", Counted, variables=DenyList("table"),
                           changes=("batch_stats", "counts")),
    "jit: rngs": same("jit", Noisy, rngs=DenyList("noise"), matters=("rngs",)),
    "jit: static_argnums": same("jit", Static, X, 2, static_argnums=(2,),
                                matters=("static_argnums",)),
    "jit: static_argnames": same("jit", Block, static_argnames=("deterministic",)),
    "jit: donate_argnums": same("jit", Block, donate_argnums=()),
    "remat_scan": same("remat_scan", Block, lengths=(3,)),
    "remat_scan: lengths": same("remat_scan", Block, lengths=(2, 3)),
    "remat_scan: axes": same("remat_scan", Block, lengths=(2, 3), split_rngs=SPLIT,
                             variable_axes={"params": -1}, matters=("variable_axes",)),
    "remat_scan: shared": same(
        "remat_scan", Block, lengths=(2, 2), variable_axes={},
        variable_broadcast="params", matters=("variable_broadcast", "split_rngs"),
        split_rngs={"params": False, "dropout": True}),
    "remat_scan: shared mask": same(
        "remat_scan", Block, lengths=(2, 2), matters=("split_rngs",),
        split_rngs={"params": True, "dropout": False}),
    "remat_scan: pair": same("remat_scan", Swap, (X[0], X[1]), lengths=(2, 2)),
    "map_variables": same("map_variables", Block, mapped_collections="params",
                          trans_in_fn=halve, init=True, matters=("trans_in_fn",)),
    "map_variables: mutable": same(
        "map_variables", Block, mapped_collections="params", trans_in_fn=halve,
        trans_out_fn=twice, mutable=True, matters=("trans_out_fn",)),
    "map_variables: both": same(
        "map_variables", Counted, mapped_collections=("params", "batch_stats"),
        trans_in_fn=halve, trans_out_fn=twice, mutable=True,
        changes=("batch_stats", "counts"), matters=("mapped_collections",)),
    "map_variables: init beside statistics": Case(
        lift("map_variables", mine(Counted), mapped_collections="params",
             trans_in_fn=mine(halve), init=True),
        lambda flag: nn.map_variables(  # as Flax's documentation has it
            Counted, "params", trans_in_fn=halve, init=flag)(deterministic=flag),
        changes=("batch_stats", "counts")),
    "map_variables: rngs": same(
        "map_variables", Noisy, mapped_collections="params", trans_in_fn=halve,
        init=True, rngs=("params", "dropout"), matters=("rngs",)),
    "map_variables: variables": same(
        "map_variables", Counted, mapped_collections="params", trans_in_fn=halve,
        mutable=True, variables=("batch_stats", "counts"),
        changes=("batch_stats", "counts")),
    "add_metadata_axis": same("add_metadata_axis", Boxed, variable_axes={"params": 0},
                              metadata_params={"partition_name": "stage"},
                              matters=("variable_axes", "metadata_params")),
    "add_metadata_axis: at the end": same(
        "add_metadata_axis", Boxed, variable_axes={"params": 2},
        metadata_params={"partition_name": "stage"}),
}  # fmt: skip


def cases(groups: dict[str, dict[str, Case]]) -> list[Any]:
    return [
        pytest.param(case, id=f"{group}: {name}" if group else name)
        for group, of in groups.items()
        for name, case in of.items()
    ]


def text_of(function: Callable[..., Any], *args: Any) -> tuple[str, Any]:
    """A program as text, but for the names of jitted functions; what it returns."""
    program, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    text = "".join(str(program).split())  # lines are broken by the length of names
    return re.sub(r"core_fn|__call__", "jitted", text), shapes


def program_of(
    init: Callable[[], Any], apply: Callable[[Any], Any]
) -> tuple[str, str, str, str]:
    """Both programs, and what they return (boxes with their names), as text."""
    made, variables = text_of(init)
    called, outputs = text_of(apply, variables)
    trees = map(str, map(jax.tree.structure, (variables, outputs)))
    return (made, called, *trees)


def our_program(case: Case, node: Any) -> tuple[str, str, str, str]:
    made, args, mutable = build(node), case.args, list(case.changes)

    def apply(variables: Any) -> Any:
        flags: dict[str, Any] = {"deterministic": False, "mutable": mutable}
        return made.apply(variables, *args, rngs=rngs(), **flags)

    return program_of(lambda: made.init(rngs(), *args, deterministic=True), apply)


def their_program(case: Case) -> tuple[str, str, str, str]:
    args, mutable = (*case.args, *case.more), list(case.changes)

    def apply(variables: Any) -> Any:
        made = case.hand(False)
        outputs, after = made.apply(variables, *args, rngs=rngs(), mutable=mutable)
        return as_ours(case, outputs), after

    return program_of(lambda: case.hand(True).init(rngs(), *args), apply)


EVERY = cases({"scan": SCANS, "vmap": VMAPS, "": OTHERS})
RUN = ("length", "reverse", "statistics", "axis_name", "metadata_params", "filters",
       "remat_scan", "map_variables", "add_metadata_axis")  # fmt: skip


@pytest.mark.parametrize("case", EVERY)
def test_equals_the_class_form(case: Case) -> None:
    """Equation by equation; without a field that it is about, it is another."""
    ours = our_program(case, case.node)
    assert ours == their_program(case)
    assert "random_bits" in ours[1]  # dropout is on
    for name in case.matters:
        less = {key: value for key, value in case.node.items() if key != name}
        try:
            other = our_program(case, less)
        except Exception:
            continue
        assert other != ours, name


@pytest.mark.parametrize("case", [p for p in EVERY if str(p.id).endswith(RUN)])
def test_runs_as_the_class_form(case: Case) -> None:
    """Bit for bit."""
    ours, theirs = ours_of(case, case.node), theirs_of(case)
    assert_same(ours[0], theirs[0])
    assert_same(ours[1], theirs[1])


# --- nested


LIFTS: dict[str, tuple[dict[str, Any], Callable[[Any], Any]]] = {
    "scan": ({**AXES, "length": 3}, partial(nn.scan, **AXES, length=3)),
    "vmap": (AXES, partial(nn.vmap, **AXES)),
    "remat": ({}, nn.remat),
    "jit": ({}, nn.jit),
}
ORDERS = [
    *itertools.permutations(LIFTS, 2),
    *itertools.permutations(("scan", "vmap", "remat"), 3),
    *[("jit", "scan", "remat"), ("scan", "jit", "vmap"), ("vmap", "remat", "jit")],
    *[("scan", "scan"), ("vmap", "vmap", "remat"), ("scan", "vmap", "scan")],
]


def nested(order: tuple[str, ...], of: type[nn.Module]) -> tuple[Any, Any]:
    """The node of lifts in lifts, outermost first; and the class by hand."""
    node, hand = mine(of), of
    for kind in reversed(order):
        fields, transform = LIFTS[kind]
        node, hand = lift(kind, node, **fields), transform(hand)
    return node, hand


@pytest.mark.parametrize("order", ORDERS, ids=" of ".join)
def test_nested(order: tuple[str, ...]) -> None:
    """The same program, equation by equation."""
    node, hand = nested(order, Body)
    made, x = build(node), jnp.stack([X, -X])
    args = (x,) if "scan" in order else (x, None)
    ours, variables = text_of(lambda: made.init(rngs(), *args, deterministic=True))
    on, off = (hand(deterministic=flag) for flag in (False, True))
    assert text_of(lambda: off.init(rngs(), x, None)) == (ours, variables)
    ours, _ = text_of(
        lambda v: made.apply(v, *args, deterministic=False, rngs=rngs()), variables
    )
    theirs, _ = text_of(lambda v: on.apply(v, x, None, rngs=rngs()), variables)
    assert ours == theirs
    assert "random_bits" in ours


@pytest.mark.parametrize("order", ORDERS, ids=" of ".join)
def test_nested_keys(order: tuple[str, ...]) -> None:
    """The keys themselves, and that each turn and member has its own."""
    if "jit" in order:  # its traces outlive a test that flips Flax's separator
        jax.clear_caches()
    node, hand = nested(order, Tap)
    x = jnp.stack([X, -X])
    _, ours = build(node).apply({}, x, deterministic=False, rngs=rngs())
    _, theirs = hand(deterministic=False).apply({}, x, None, rngs=rngs())
    assert_same(ours, theirs)
    keys = np.asarray(ours).reshape(-1, 2)
    expected = 3 ** order.count("scan") * 2 ** order.count("vmap")
    assert len(keys) == len(np.unique(keys, axis=0)) == expected


def tapped(node: Any) -> Any:
    return np.asarray(build(node).apply({}, X, rngs=rngs())[1])


def test_keys_that_do_not_move() -> None:
    """remat and unroll leave keys alone; jit forks, and so moves them."""
    plain = tapped(mine(Tap))
    assert (tapped(lift("remat", mine(Tap))) == plain).all()
    assert (tapped(lift("jit", mine(Tap))) != plain).any()
    scanned = tapped(lift("scan", mine(Tap), **AXES, length=3))
    assert (scanned != plain).all()
    for more in ({"unroll": 2}, {"unroll": 3}, {"reverse": True}, {"chunk": 3}):
        node = lift("scan", mine(Tap), **AXES, length=3, **more)
        assert (tapped(node) == scanned).all()
    for kind in ("map_variables", "add_metadata_axis"):
        assert (tapped(lift(kind, mine(Tap))) == plain).all()
    inner = lift("scan", lift("remat", mine(Tap)), **AXES, length=3)
    assert (tapped(inner) == scanned).all()


def test_keys_of_two_loops() -> None:
    """By (outer, inner): remat_scan of [2, 3] is a scan of 2 of a scan of 3."""
    scans = lift("scan", lift("scan", mine(Block), **AXES, length=3), **AXES, length=2)
    made = build(lift("remat_scan", mine(Block), lengths=[2, 3]))
    variables = made.init(rngs(), X, deterministic=True)
    assert_same(variables, build(scans).init(rngs(), X, deterministic=True))
    for flag in (True, False):
        flags: dict[str, Any] = {"deterministic": flag, "rngs": rngs()}
        same = build(scans).apply(variables, X, **flags)
        assert_same(made.apply(variables, X, **flags), same)
    keys = tapped(lift("scan", lift("scan", mine(Tap), **AXES, length=3), **AXES,
                       length=2))  # fmt: skip
    once = tapped(lift("scan", mine(Tap), **AXES, length=6))
    assert keys.shape == (2, 3, 2)
    assert not {tuple(k) for k in keys.reshape(6, 2)} & {tuple(k) for k in once}


# --- what a scan carries


@pytest.mark.parametrize(("kind", "size"), [("scan", 3), ("remat_scan", [3])])
def test_carried_statistics(kind: str, size: Any) -> None:
    """By hand, Flax can't make what it carries: here the variables are given."""
    fields: dict[str, Any] = {**AXES, "variable_carry": ("batch_stats", "counts")}
    fields["lengths" if kind == "remat_scan" else "length"] = size
    made = build(
        lift(kind, mine(Counted), **{k: yaml_of(v) for k, v in fields.items()})
    )
    variables = made.init(rngs(), X, deterministic=True)
    one = Counted(deterministic=True).init(rngs(), X)
    for name in ("batch_stats", "counts"):
        assert_same(variables[name], one[name])  # one, not a stack
    stacked = {"params": 0, "batch_stats": 0, "counts": 0}
    scan = partial(nn.scan, split_rngs=SPLIT, length=3)
    initial = scan(Counted, variable_axes=stacked)(deterministic=True).init(rngs(), X)
    assert_same(variables["params"], initial["params"])

    ours = made.apply(
        variables,
        X,
        deterministic=False,
        rngs=rngs(),
        mutable=["batch_stats", "counts"],
    )
    hand = scan(
        Counted, variable_axes={"params": 0}, variable_carry=fields["variable_carry"]
    )
    theirs = hand(deterministic=False).apply(
        variables, X, rngs=rngs(), mutable=["batch_stats", "counts"]
    )
    assert_same(ours, (theirs[0][0], theirs[1]))
    assert ours[1]["counts"]["calls"] == 3


def test_a_carried_collection_is_made_once_in_nested_loops() -> None:
    node = lift("remat_scan", mine(Counted), lengths=[2, 3],
                variable_carry=["batch_stats", "counts"])  # fmt: skip
    variables = build(node).init(rngs(), X, deterministic=True)
    assert variables["counts"]["calls"].shape == ()
    assert variables["params"]["Dense_0"]["bias"].shape == (2, 3, 4)


def test_a_call_that_may_not_change_what_is_carried() -> None:
    """Flax by hand refuses it: an evaluation reads the statistics, no more."""
    node = lift("scan", mine(Counted), **AXES, length=3,
                variable_carry=["batch_stats", "counts"])  # fmt: skip
    made = build(node)
    variables = made.init(rngs(), X, deterministic=True)
    shared = {**node, "variable_carry": False}
    shared["variable_broadcast"] = node["variable_carry"]
    other = build(shared)
    out = made.apply(variables, X, deterministic=True)
    assert_same(out, other.apply(variables, X, deterministic=True))


def test_everything_is_carried() -> None:
    node = lift("scan", mine(Counted), length=3, variable_carry=True,
                split_rngs={"params": False, "dropout": True})  # fmt: skip
    made = build(node)
    variables = made.init(rngs(), X, deterministic=True)
    assert variables["params"]["Dense_0"]["bias"].shape == (4,)
    apply = partial(made.apply, rngs=rngs(), mutable=["counts", "batch_stats"])
    _, after = apply(variables, X, deterministic=False)
    assert after["counts"]["calls"] == 3


def test_a_pair_is_a_carry_where_it_was_one() -> None:
    """And (carry, outputs) where it wasn't."""
    node = lift("scan", mine(Swap), **AXES, length=2)
    out = build(node).init_with_output(rngs(), (X[0], X[1]), deterministic=True)[0]
    assert [leaf.shape for leaf in out] == [(3, 4), (3, 4)]
    carry, outputs = build(lift("scan", mine(Step), **AXES)).init_with_output(
        rngs(), X[0, 0], XS, deterministic=True
    )[0]
    assert (carry.shape, outputs.shape) == ((4,), (5, 4))


# --- around any module


class Attend(nn.MultiHeadDotProductAttention):
    """Flax's attention as the body of a scan."""

    def __call__(self, x: Any, _: Any = None) -> Any:
        return super().__call__(x), None


class Recur(nn.RNN):
    """Flax's RNN as the body of a scan."""

    def __call__(self, x: Any, _: Any = None) -> Any:
        return super().__call__(x), None


class Chain(nn.Module):
    """models.Sequential of Dense, Dropout, BatchNorm as the body of a scan."""

    deterministic: bool

    @nn.compact
    def __call__(self, x: Any, _: Any = None) -> Any:
        x = nn.Dense(4, name="layers_0")(x)
        x = nn.Dropout(0.5, name="drop")(x, deterministic=self.deterministic)
        norm = nn.BatchNorm(use_running_average=self.deterministic, name="layers_2")
        return norm(x), None


class Perceptron(nn.Module):
    """models.MLP."""

    deterministic: bool

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.relu(nn.Dense(8)(x.reshape(x.shape[0], -1)))
        x = nn.Dropout(0.5)(x, deterministic=self.deterministic)
        return nn.Dense(2)(x)


ATTENTION = target("flax.linen.MultiHeadDotProductAttention", num_heads=2,
                   dropout_rate=0.5)  # fmt: skip
ALL = {"params": 0, "batch_stats": 0}
LAYERS = [
    target("flax.linen.Dense", features=4),
    target("models.Dropout", rate=0.5, name="drop"),
    target("flax.linen.BatchNorm"),
]
CELL = target("flax.linen.LSTMCell", features=4)
LSTM_STATE = (X[:, 0], X[:, 1])

AROUND = {
    "vmap of Dense": Case(
        lift("vmap", target("flax.linen.Dense", features=2), **AXES),
        lambda _: nn.vmap(nn.Dense, **AXES)(2)),
    "scan of attention": Case(
        lift("scan", ATTENTION, **AXES, length=3),
        lambda flag: nn.scan(Attend, **AXES, length=3)(
            num_heads=2, dropout_rate=0.5, deterministic=flag)),
    "vmap of remat of attention": Case(
        lift("vmap", lift("remat", ATTENTION), **AXES),
        lambda flag: nn.vmap(nn.remat(nn.MultiHeadDotProductAttention), **AXES)(
            num_heads=2, dropout_rate=0.5, deterministic=flag), (X[None],)),
    "remat of RNN": Case(
        lift("remat", target("flax.linen.RNN", cell=CELL)),
        lambda _: nn.remat(nn.RNN)(nn.LSTMCell(4))),
    "vmap of RNN": Case(
        lift("vmap", target("flax.linen.RNN", cell=CELL), **AXES),
        lambda _: nn.vmap(nn.RNN, **AXES)(nn.LSTMCell(4)), (X[None],)),
    "scan of LSTMCell": Case(
        lift("scan", CELL, variable_broadcast="params", split_rngs={"params": False},
             in_axes=1, out_axes=1),
        lambda _: nn.scan(nn.LSTMCell, variable_broadcast="params", in_axes=1,
                          split_rngs={"params": False}, out_axes=1)(4),
        (LSTM_STATE, X)),
    "remat of scan of LSTMCell": Case(
        lift("remat", lift("scan", CELL, **AXES, in_axes=1)),
        lambda _: nn.remat(nn.scan(nn.LSTMCell, **AXES, in_axes=1))(4),
        (LSTM_STATE, X)),
    "scan of RNN": Case(
        lift("scan", target("flax.linen.RNN", cell=CELL), **AXES, length=3),
        lambda _: nn.scan(Recur, **AXES, length=3)(nn.LSTMCell(4)),
    ),
    "vmap of BatchNorm": Case(
        lift("vmap", target("flax.linen.BatchNorm", use_running_average=False),
             variable_axes=ALL, split_rngs={"params": True}, in_axes=1, out_axes=1),
        lambda _: nn.vmap(nn.BatchNorm, variable_axes=ALL, in_axes=1, out_axes=1,
                          split_rngs={"params": True})(use_running_average=False),
        changes=("batch_stats",)),
    "scan of Sequential": Case(
        lift("scan", target("models.Sequential", layers=LAYERS), variable_axes=ALL,
             split_rngs=SPLIT, length=3),
        nn.scan(Chain, variable_axes=ALL, split_rngs=SPLIT, length=3),
        changes=("batch_stats",)),
    "vmap of jit of MLP": Case(
        lift("vmap", lift("jit", target("models.MLP", features=[8], num_outputs=2,
                                        dropout_rate=0.5)), **AXES),
        nn.vmap(nn.jit(Perceptron), **AXES)),
}  # fmt: skip


@pytest.mark.parametrize("case", cases({"": AROUND}))
def test_around_any_module(case: Case) -> None:
    """Equation by equation."""
    made, args, mutable = build(case.node), case.args, list(case.changes)
    takes = "deterministic" in inspect.signature(made.__call__).parameters
    for flag in (True, False):
        flags = {"deterministic": flag} if takes else {}
        ours = partial(made.apply, rngs=rngs(), mutable=mutable, **flags)
        theirs = partial(case.hand(flag).apply, rngs=rngs(), mutable=mutable)

        def hand(variables: Any, theirs: Any = theirs) -> Any:
            outputs, changed = theirs(variables, *args)
            is_scan = isinstance(outputs, tuple) and outputs[1] is None
            return outputs[0] if is_scan else outputs, changed

        made_by_us, variables = text_of(partial(made.init, **flags), rngs(), *args)
        by_hand = text_of(case.hand(flag).init, rngs(), *args)
        assert (made_by_us, variables) == by_hand
        program = text_of(lambda v, ours=ours: ours(v, *args), variables)
        assert program == text_of(hand, variables)
        assert ("random_bits" in program[0]) is (takes and not flag)


# --- names and methods


def test_names() -> None:
    """The lift's name, or its module's, or else what Flax gives the module."""
    block = mine(Block)
    layers = [
        block,
        lift("remat", block),
        lift("remat", block, name="third"),
        lift("remat", {**block, "name": "fourth"}),
        lift("jit", lift("remat", {**block, "name": "fifth"})),
        lift("scan", lift("remat", block), **AXES, length=2, name="sixth"),
    ]
    chain = build(target("models.Sequential", layers=layers))
    variables = chain.init(rngs(), X, deterministic=True)
    names = ["fifth", "fourth", "layers_0", "layers_1", "sixth", "third"]
    assert sorted(variables["params"]) == names
    held = build(mine(Holder, part=lift("remat", block)))
    made = held.init(rngs(), X, deterministic=True)
    assert sorted(made["params"]) == ["Dense_0", "part"]


def test_automatic_names_stay() -> None:
    """Flax's own would be called CheckpointBlock_0, and so have other keys."""

    class Root(nn.Module):
        of: nn.Module

        @nn.compact
        def __call__(self, x: Any) -> Any:
            return type(self.of)()(x, deterministic=True)

    made = Root(build(lift("remat", mine(Block)))).init(rngs(), X)
    assert_same(made, Root(Block()).init(rngs(), X))
    assert list(made["params"]) == ["Block_0"]


@pytest.mark.parametrize("methods", [("__call__", "encode", "decode"), ("encode",)])
def test_methods(methods: tuple[str, ...]) -> None:
    """What a lifted method calls is not lifted again, as in the class form."""
    made = build(lift("vmap", mine(Coder), **AXES, methods=list(methods)))
    hand = partial(nn.vmap(Coder, **AXES, methods=methods))
    theirs = hand(deterministic=True).init(rngs(), X, method=methods[0])
    ours = made.init(rngs(), X, deterministic=True, method=methods[0])
    assert_same(ours, theirs)
    for method in methods:
        apply = partial(made.apply, ours, X, rngs=rngs(), method=method)
        by_hand = hand(deterministic=False).apply(ours, X, rngs=rngs(), method=method)
        assert_same(apply(deterministic=False), by_hand)


def test_methods_of_their_own() -> None:
    by_method: dict[str, Any] = {
        "encode": {**AXES, "out_axes": 1},
        "decode": {**AXES, "in_axes": 1, "out_axes": 2},
    }
    made = build(lift("vmap", mine(Coder), methods=by_method))
    hand = nn.vmap(Coder, methods=by_method)
    ours = made.init(rngs(), X, deterministic=True, method="encode")
    assert_same(ours, hand(deterministic=True).init(rngs(), X, method="encode"))
    y = jnp.swapaxes(X, 0, 1)
    for method, x, shape in (("encode", X, (3, 2, 4)), ("decode", y, (3, 4, 2))):
        flags: dict[str, Any] = {"rngs": rngs(), "method": method}
        out = made.apply(ours, x, deterministic=False, **flags)
        assert out.shape == shape
        assert_same(out, hand(deterministic=False).apply(ours, x, **flags))


def test_a_method_by_keyword() -> None:
    made = build(lift("scan", mine(Coder), **AXES, length=2, methods="encode"))
    out, _ = made.init_with_output(rngs(), X, deterministic=True, method="encode")
    assert out.shape == X.shape
    assert inspect.signature(made.encode) == inspect.signature(Coder().encode)
    assert made.encode.__doc__ == Coder.encode.__doc__


def test_captured_outputs_are_there_once() -> None:
    fields = {**AXES, "variable_axes": {"params": 0, "intermediates": 0}}
    made = build(lift("vmap", mine(Block), **fields))
    variables = made.init(rngs(), X, deterministic=True)
    _, ours = made.apply(variables, X, deterministic=True, capture_intermediates=True)
    hand = nn.vmap(Block, **fields)(deterministic=True)
    assert_same(ours, hand.apply(variables, X, capture_intermediates=True)[1])


def test_the_lifted_class_is_as_its_module() -> None:
    made = build(lift("scan", target("flax.linen.Dense", features=4), **AXES, length=2))
    assert isinstance(made, nn.Dense)
    assert (type(made).__name__, made.features) == ("Dense", 4)
    assert made.parent is None
    assert made.name is None


# --- what is only seen in the program


def equations(jaxpr: Any) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from equations(inner)


def params_of(node: Any, primitive: str, *args: Any) -> dict[str, Any]:
    """The parameters of the first such equation in the program of a call."""
    made = build(node)
    args = args or (X,)
    variables = jax.eval_shape(lambda: made.init(rngs(), *args, deterministic=True))
    flags: dict[str, Any] = {"deterministic": True}
    program = jax.make_jaxpr(lambda v: made.apply(v, *args, **flags))(variables)
    found = (
        e.params for e in equations(program.jaxpr) if e.primitive.name == primitive
    )
    return next(found)


POLICIES: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    **{
        name: (name, lambda p, name=name: getattr(p, name))
        for name in (
            *("checkpoint_dots", "checkpoint_dots_with_no_batch_dims"),
            *("dots_saveable", "dots_with_no_batch_dims_saveable"),
            *("everything_saveable", "nothing_saveable"),
        )
    },
    "only": (
        {"save_only_these_names": ["inner"]},
        lambda p: p.save_only_these_names("inner"),
    ),
    "any but": (
        {"save_any_names_but_these": ["inner"]},
        lambda p: p.save_any_names_but_these("inner"),
    ),
    "anything except": (
        {"save_anything_except_these_names": ["inner", "outer"]},
        lambda p: p.save_anything_except_these_names("inner", "outer"),
    ),
    "both": (
        {
            "save_from_both_policies": [
                "dots_saveable", {"save_only_these_names": ["outer"]},
            ]
        },
        lambda p: p.save_from_both_policies(
            p.dots_saveable, p.save_only_these_names("outer")
        ),
    ),
    "offload": (
        {"offload_dot_with_no_batch_dims": ["device", "pinned_host"]},
        lambda p: p.offload_dot_with_no_batch_dims("device", "pinned_host"),
    ),
    "offload names": (
        {
            "save_and_offload_only_these_names": {
                "names_which_can_be_saved": ["inner"],
                "names_which_can_be_offloaded": ["outer"],
                "offload_src": "device",
                "offload_dst": "pinned_host",
            }
        },
        lambda p: p.save_and_offload_only_these_names(
            names_which_can_be_saved=["inner"],
            names_which_can_be_offloaded=["outer"],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    ),
}  # fmt: skip


def saved(module: nn.Module, capsys: Any, **flags: Any) -> list[str]:
    """What the backward pass keeps of the forward pass."""
    variables = Named().init(rngs(), X)
    jax.ad_checkpoint.print_saved_residuals(
        lambda v: module.apply(v, X, **flags).sum(), variables
    )
    return sorted(capsys.readouterr().out.splitlines())


def sign_of(policy: Any) -> Any:
    """What two policies that were made alike have in common."""
    if not inspect.isfunction(policy):
        return repr(policy)
    cells = [cell.cell_contents for cell in policy.__closure__ or ()]
    return policy.__qualname__, list(map(sign_of, cells))


@pytest.mark.parametrize(("policy", "by_hand"), POLICIES.values(), ids=POLICIES)
def test_policies(
    policy: Any, by_hand: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = by_hand(jax.checkpoint_policies)
    got = params_of(lift("remat", mine(Named), policy=policy), "remat2")["policy"]
    assert sign_of(got) == sign_of(wanted)
    if "offload" not in str(policy):
        ours = saved(build(lift("remat", mine(Named), policy=policy)), capsys)
        theirs = saved(nn.remat(Named, policy=wanted)(), capsys)
        assert ours == theirs


def test_policies_keep_what_they_say(capsys: pytest.CaptureFixture[str]) -> None:
    def kept(policy: Any) -> str:
        lines = saved(build(lift("remat", mine(Named), policy=policy)), capsys)
        return "\n".join(line for line in lines if "argument" not in line)

    assert "inner" in kept({"save_only_these_names": ["inner"]})
    assert "outer" not in kept({"save_only_these_names": ["inner"]})
    assert "outer" in kept({"save_only_these_names": ["outer"]})
    sizes = [
        len(kept(policy).splitlines())
        for policy in ("everything_saveable", "dots_saveable", "nothing_saveable")
    ]
    assert sizes[0] > sizes[1] > sizes[2]
    assert kept(None) == kept("nothing_saveable")


def test_policy_of_remat_scan() -> None:
    node = lift("remat_scan", mine(Named), lengths=[2, 2], policy="dots_saveable")
    policy = params_of(node, "remat2")["policy"]
    assert policy is jax.checkpoint_policies.dots_saveable


@pytest.mark.parametrize("value", [True, False])
def test_prevent_cse(value: bool) -> None:
    node = lift("remat", mine(Block), prevent_cse=value)
    assert params_of(node, "remat2")["prevent_cse"] is value


@pytest.mark.parametrize(("field", "value"), [("unroll", 2), ("reverse", True)])
def test_arguments_of_the_loop(field: str, value: Any) -> None:
    node = lift("scan", mine(Step), **AXES, **{field: value})
    assert params_of(node, "scan", X[0, 0], XS)[field] == value


def test_spmd_axis_name() -> None:
    def spec(node: Any) -> Any:
        return params_of(node, "sharding_constraint")["sharding"].spec

    named = lift("vmap", mine(Pinned), **AXES, spmd_axis_name="data")
    assert spec(named)[0] == "data"
    assert spec(lift("vmap", mine(Pinned), **AXES)) != spec(named)


def test_unchecked_loops_are_traced_once_less() -> None:
    calls: list[int] = []

    class Loud(nn.Module):
        @nn.compact
        def __call__(self, x: Any, deterministic: bool | None = None) -> Any:
            calls.append(1)
            return nn.Dense(4)(x)

    def count(**fields: Any) -> int:
        vars(sys.modules[PACKAGE])["Loud"] = Loud
        Loud.__module__ = PACKAGE
        made = build(lift("scan", mine(Loud), **AXES, length=2, **fields))
        calls.clear()
        jax.eval_shape(lambda: made.init(rngs(), X))
        return len(calls)

    assert count(check_constancy_invariants=False) < count()


def test_donated() -> None:
    donated = params_of(lift("jit", mine(Block), donate_argnums=[1]), "jit")
    assert sum(donated["donated_invars"]) == 1
    plain = params_of(lift("jit", mine(Block)), "jit")
    assert sum(plain["donated_invars"]) == 0


def test_backend() -> None:
    """JAX itself advises against it."""
    with pytest.warns(DeprecationWarning, match="backend"):
        params_of(lift("jit", mine(Block), backend="cpu"), "jit")


# --- what changes nothing

DEEP: dict[str, Any] = {**AXES, "length": 4}
SAME_AS_SCAN = {
    "remat": lift("scan", lift("remat", mine(Block)), **DEEP),
    "remat of scan": lift("remat", lift("scan", mine(Block), **DEEP)),
    "remat twice": lift("scan", lift("remat", lift("remat", mine(Block))), **DEEP),
    "unroll 2": lift("scan", mine(Block), **DEEP, unroll=2),
    "unroll all": lift("scan", mine(Block), **DEEP, unroll=4),
    "prevent_cse": lift("scan", lift("remat", mine(Block), prevent_cse=False), **DEEP),
    "split transpose": lift("scan", mine(Block), **DEEP, _split_transpose=True),
    "chunk": lift("scan", mine(Block), **DEEP, chunk=2),
    "chunk of remat": lift("scan", lift("remat", mine(Block)), **DEEP, chunk=2),
    "remat_scan": lift("remat_scan", mine(Block), lengths=[4]),
    **{
        name: lift("scan", lift("remat", mine(Block), policy=policy), **DEEP)
        for name, (policy, _) in POLICIES.items()
        if "offload" not in name
    },
}


@pytest.fixture(scope="module")
def of_scan() -> tuple[Any, Any]:
    case = Case(lift("scan", mine(Block), **DEEP), lambda _: Block())
    return ours_of(case, case.node)


@pytest.mark.parametrize("node", SAME_AS_SCAN.values(), ids=SAME_AS_SCAN)
def test_what_changes_nothing(node: Any, of_scan: tuple[Any, Any]) -> None:
    """No key, no initial value, no bit of what the forward pass returns."""
    case = Case(node, lambda _: Block())
    variables, (outputs, _) = ours_of(case, node)
    assert_same(variables, of_scan[0])
    assert_same(outputs, of_scan[1][0])


def test_remat_of_a_layer_changes_nothing() -> None:
    case = Case(mine(Block), lambda _: Block())
    plain = ours_of(case, case.node)
    for fields in ({}, {"policy": "dots_saveable"}, {"prevent_cse": False}):
        assert_same(ours_of(case, lift("remat", mine(Block), **fields)), plain)


# --- flags and rates in a program


@pytest.fixture(scope="module")
def program_of_model(make_spec: Any) -> Callable[..., Any]:
    """A layer between two others, as a compiled program on the digits."""
    from runner.compile import compile_run
    from runner.parse import Node

    small = ("data.batch_size=32", "train.steps=3", "eval.every=3")

    def compile_(layer: Any, *overrides: str) -> Any:
        spec = make_spec(*small, f"trusted=[{PACKAGE}]", *overrides)
        layers = [
            target("models.Flatten"),
            target("flax.linen.Dense", features=8),
            layer,
            target("flax.linen.Dense", features=10),
        ]
        node = Node(freeze(target("models.Sequential", layers=layers), path="model"))
        return compile_run(replace(spec, model=node))

    return compile_


RESIDUAL = target("models.ResidualMLPBlock", dropout_rate=0.5)
DROPS: dict[str, Any] = {
    "scan": lift("scan", RESIDUAL, **DEEP),
    "vmap": lift("vmap", RESIDUAL, variable_axes={"params": None}, in_axes=-1,
                 out_axes=-1, split_rngs={"params": False, "dropout": True}),
    "remat": lift("remat", RESIDUAL),
    "remat_scan": lift("remat_scan", RESIDUAL, lengths=[2, 2]),
    "map_variables": lift("map_variables", RESIDUAL, mapped_collections="params",
                          trans_in_fn=target("jax.numpy.tanh"), init=True),
    "add_metadata_axis": lift("add_metadata_axis", RESIDUAL,
                              variable_axes={"params": 0}),
    "scan of remat": lift("scan", lift("remat", RESIDUAL), **DEEP),
    "jit": lift("jit", RESIDUAL),
    "scan of jit": lift("scan", lift("jit", RESIDUAL), **DEEP),
    "jit of scan": lift("jit", lift("scan", RESIDUAL, **DEEP)),
}  # fmt: skip
DROPS["vmap"]["module"] = target(
    "models.Sequential",
    layers=[target("models.Dropout", rate=0.5), target("flax.linen.tanh")],
)


@pytest.mark.promotes
@pytest.mark.parametrize("name", DROPS)
def test_flags_and_rates(name: str, program_of_model: Any) -> None:
    """Dropout in training alone; its rate is an input, but not under jit."""
    from runner.loop import train
    from runner.records.events import EvalRecord

    program = program_of_model(DROPS[name])
    drawn = {str(p): {d.stream for d in t.draws} for p, t in program.traces.items()}
    assert drawn == {"init": {"params"}, "train": {"dropout"}, "eval": set()}
    rates = [path for path in program.hypers if path.endswith("rate")]
    rates.remove("optimizer.learning_rate")
    assert program.baked == ()
    if "jit" in name:
        assert rates == []
    else:
        assert len(rates) == 1
        assert rates[0].startswith("model.layers[2].module")
    before = program.initial.params
    *events, outcome = train(program)
    assert (outcome.status, outcome.step) == ("completed", 3)
    assert jax.tree.map(jnp.shape, outcome.state.params) == jax.tree.map(
        jnp.shape, before
    )
    assert sum(isinstance(event, EvalRecord) for event in events) >= 1


@pytest.mark.promotes
@pytest.mark.parametrize("name", ["scan", "remat", "remat_scan", "jit", "jit of scan"])
def test_one_program_for_every_rate(name: str, program_of_model: Any) -> None:
    """But for jit, since Flax hashes the fields of a module that it compiles."""
    x = jnp.linspace(-1, 1, 128).reshape(2, 64)

    def program(rate: float) -> tuple[Any, dict[str, Any], Any]:
        text = json.dumps(DROPS[name]).replace("0.5", str(rate))
        made = program_of_model(json.loads(text))
        model, hypers = made.model, dict(made.hypers)
        variables = model.init(rngs(), x, hypers)

        def call(hypers: Any, train: bool = True) -> Any:
            return model.apply(variables, x, rngs(), hypers, train=train)[0]

        return call, hypers, jax.make_jaxpr(call)(hypers)

    (call, hypers, one), (_, others, other) = program(0.5), program(0.25)
    assert (str(one) == str(other)) is ("jit" not in name)
    if "jit" not in name:
        rate = next(path for path in hypers if path.endswith("dropout_rate"))
        assert (hypers[rate], others[rate]) == (0.5, 0.25)
        at_zero = call({**hypers, rate: jnp.float32(0)})
        assert_same(at_zero, call(hypers, train=False))
        assert to_bits(at_zero) != to_bits(call({**hypers, rate: jnp.float32(0.5)}))


@pytest.mark.promotes
def test_statistics_are_carried_through_training(program_of_model: Any) -> None:
    from runner.loop import train

    layer = lift("scan", mine(Counted), **AXES, length=4,
                 variable_carry=["batch_stats", "counts"])  # fmt: skip
    *_, outcome = train(program_of_model(layer))
    assert outcome.status == "completed"
    (calls,) = (
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(outcome.state.collections)
        if "calls" in jax.tree_util.keystr(path)
    )
    assert float(calls) == 3 * 4  # three steps of four turns


# --- docs/lifts.md

PAGE = (Path(__file__).parents[1] / "docs" / "lifts.md").read_text()


def test_the_program_of_the_docs() -> None:
    """The page's YAML against the page's Python."""
    (node,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    scope: dict[str, Any] = {"nn": nn, "jax": jax, "__name__": PACKAGE}
    exec(code, scope)
    made, hand = build(yaml.safe_load(node)["model"]), scope["Model"]()
    x = jnp.linspace(-1, 1, 128).reshape(2, 8, 8)
    variables = made.init(rngs(), x, deterministic=True)
    assert_same(variables, hand.init(rngs(), x, True))
    for flag in (True, False):
        ours = made.apply(variables, x, deterministic=flag, rngs=rngs())
        assert_same(ours, hand.apply(variables, x, flag, rngs=rngs()))


def test_the_fields_of_the_docs() -> None:
    """The table has each transform, with exactly its fields."""
    rows = re.findall(r"^\| `(\w+)` \| `([\w ]+)`.*\|$", PAGE, re.M)
    table = {kind: tuple(fields.split()) for kind, fields in rows}
    assert table.keys() == set(KINDS)
    for kind, fields in table.items():
        with pytest.raises(TargetError) as caught:
            build({"lift": kind, "no such field": 1})
        named = re.search(r"Arguments: (.*?)\.(?: |$)", str(caught.value))
        assert named
        others = ("name", "module", "chunk")
        known = [name for name in named[1].split(", ") if name not in others]
        assert sorted(fields) == sorted(known)
