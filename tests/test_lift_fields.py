# SPDX-License-Identifier: Apache-2.0
"""What a `lift:` node can't say: one exact message for each rule."""

import re
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from runner.build import build_module
from runner.errors import ConfigError, TargetError, UnknownStreamError
from runner.lift.fields import check_collections, check_streams
from runner.parse import freeze

PACKAGE = "lab_of_test_lift_fields"
X = jnp.linspace(-1, 1, 24).reshape(2, 3, 4)


class Silent(nn.Module):
    """Has no `__call__`."""


class Half(nn.Module):
    """Returns another type than it takes."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(4)(x).astype(jnp.bfloat16)


class Out(nn.Module):
    """Returns a carry and outputs."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(4)(x), x


class Add(nn.Module):
    """Takes two arguments."""

    @nn.compact
    def __call__(self, a: Any, b: Any) -> Any:
        return nn.Dense(4)(a)


class Raising(nn.Module):
    """Has a fault of its own."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        raise LookupError("mine")


@pytest.fixture(scope="module", autouse=True)
def lab() -> Iterator[None]:
    package = ModuleType(PACKAGE)
    for value in (Silent, Half, Out, Add, Raising):
        value.__module__ = PACKAGE
        setattr(package, value.__name__, value)
    sys.modules[PACKAGE] = package
    yield
    del sys.modules[PACKAGE]


def mine(name: str) -> dict[str, Any]:
    return {"_target_": f"{PACKAGE}.{name}"}


def lift(kind: Any, *module: Any, **fields: Any) -> dict[str, Any]:
    return {"lift": kind, **dict(zip(("module",), module, strict=False)), **fields}


def build(node: Any) -> nn.Module:
    frozen = freeze(node, path="model")
    return build_module(frozen, path="model", trusted=(PACKAGE,))


D = {"_target_": "flax.linen.Dense", "features": 4}
N = {"_target_": "flax.linen.Dense", "features": 2}
REL = {"_target_": "flax.linen.relu"}
ADD = mine("Add")
CELL = {"_target_": "flax.linen.SimpleCell", "features": 4}
V: dict[str, Any] = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
LEN: dict[str, Any] = {**V, "length": 3}

POLICIES = (
    "Policies: checkpoint_dots, checkpoint_dots_with_no_batch_dims, "
    "dots_saveable, dots_with_no_batch_dims_saveable, everything_saveable, "
    "nothing_saveable, offload_dot_with_no_batch_dims, "
    "save_and_offload_only_these_names, save_any_names_but_these, "
    "save_anything_except_these_names, save_from_both_policies, "
    "save_only_these_names."
)
KINDS = (
    "Transforms: scan, vmap, remat, remat_scan, jit, while_loop, cond, switch, "
    "map_variables, add_metadata_axis."
)
OF_SCAN = (
    "Arguments: variable_axes, variable_broadcast, variable_carry, split_rngs, "
    "in_axes, out_axes, length, reverse, unroll, data_transform, metadata_params, "
    "methods, _split_transpose, check_constancy_invariants, chunk, name, module."
)
FILTERS = "true, false, a name, a list of names, or {deny: ...}."

REFUSED: dict[str, Any] = {
    "unknown": (
        lift("scann", D),
        (
            "model.lift: not a lifted transform (got 'scann'). "
            + KINDS
            + " Did you mean 'scan'?"
        ),
    ),
    "unknown, far": (
        lift("grad", D),
        ("model.lift: not a lifted transform (got 'grad'). " + KINDS),
    ),
    "no text": (
        lift(3, D),
        ("model.lift: not a lifted transform (got 3). " + KINDS),
    ),
    "null": (
        lift(None, D),
        ("model.lift: not a lifted transform (got None). " + KINDS),
    ),
    "unknown field": (
        lift("scan", D, variable_axis={}),
        (
            "model.variable_axis: not an argument of nn.scan (got 'variable_axis'). "
            + OF_SCAN
            + " Did you mean 'variable_axes'?"
        ),
    ),
    "field of another": (
        lift("vmap", D, length=3),
        (
            "model.length: not an argument of nn.vmap (got 'length'). Arguments: "
            "variable_axes, split_rngs, in_axes, out_axes, axis_size, axis_name, "
            "spmd_axis_name, metadata_params, methods, name, module."
        ),
    ),
    "field that is not YAML's": (
        lift("jit", D, device="cpu"),
        (
            "model.device: not an argument of nn.jit (got 'device'). Arguments: "
            "variables, rngs, static_argnums, static_argnames, donate_argnums, backend,"
            " methods, name, module."
        ),
    ),
    "missing module": (
        lift("scan", length=3),
        ("model: nn.scan needs module. Set model.module."),
    ),
    "module misspelt": (
        lift("scan", modul=D),
        (
            "model.modul: not an argument of nn.scan (got 'modul'). "
            + OF_SCAN
            + " Did you mean 'module'?"
        ),
    ),
    "module null": (
        lift("vmap", None),
        ("model.module: must make a Flax module (got None)."),
    ),
    "module that is a function": (
        lift("vmap", REL),
        ("model.module: must make a Flax module (got 'flax.linen.relu')."),
    ),
    "module that is data": (
        lift("vmap", [D]),
        (
            "model.module: must make a Flax module (got ({'_target_': "
            "'flax.linen.Dense', 'features': 4},))."
        ),
    ),
    "module without a call": (
        lift("vmap", mine("Silent")),
        ("model.module: not a method of Silent that can be lifted (got '__call__')."),
    ),
    "missing lengths": (
        lift("remat_scan", D),
        ("model: nn.remat_scan needs lengths. Set model.lengths."),
    ),
    "missing branch": (
        lift("cond", true_fun=D),
        ("model: nn.cond needs false_fun. Set model.false_fun."),
    ),
    "missing branches": (
        lift("switch"),
        ("model: nn.switch needs branches. Set model.branches."),
    ),
    "missing body": (
        lift("while_loop", cond_fn=REL),
        ("model: nn.while_loop needs body_fn. Set model.body_fn."),
    ),
    "module of control": (
        lift("cond", D, true_fun=D, false_fun=D),
        (
            "model.module: not an argument of nn.cond (got 'module'). Arguments: pred, "
            "true_fun, false_fun, variables, rngs, name."
        ),
    ),
    "name": (
        lift("remat", D, name=3),
        ("model.name: must be a string (got 3)."),
    ),
    "names that differ": (
        lift("remat", {**D, "name": "a"}, name="b"),
        (
            "model.name: the module in a lift has the lift's name (got 'b'). Remove "
            "model.module.name."
        ),
    ),
    "mapping": (
        lift("scan", D, variable_axes=3),
        (
            "model.variable_axes: must be a mapping (got 3). {name: value}, or a list "
            "of pairs [filter, value]."
        ),
    ),
    "mapping that is a list": (
        lift("scan", D, split_rngs=["params"]),
        (
            "model.split_rngs: must be a mapping (got ('params',)). {name: value}, or a"
            " list of pairs [filter, value]."
        ),
    ),
    "axis": (
        lift("vmap", D, variable_axes={"params": "0"}),
        (
            "model.variable_axes.params: not an axis (got '0'). A number, null for no "
            "axis, {in: axis}, {out: axis}."
        ),
    ),
    "axis true": (
        lift("vmap", D, variable_axes={"params": True}),
        (
            "model.variable_axes.params: not an axis (got True). A number, null for no "
            "axis, {in: axis}, {out: axis}."
        ),
    ),
    "axis of a scan": (
        lift("scan", D, variable_axes={"params": None}),
        (
            "model.variable_axes.params: not an axis (got None). A number, {in: axis}, "
            "{out: axis}."
        ),
    ),
    "axis in": (
        lift("scan", D, variable_axes={"params": {"in": None}}),
        (
            "model.variable_axes.params.in: not an axis (got None). A number, {in: "
            "axis}, {out: axis}."
        ),
    ),
    "axis of a word": (
        lift("scan", D, variable_axes={"params": {"inn": 0}}),
        (
            "model.variable_axes.params: not an axis (got {'inn': 0}). A number, {in: "
            "axis}, {out: axis}."
        ),
    ),
    "filter": (
        lift("scan", D, variable_broadcast=3),
        ("model.variable_broadcast: not a filter (got 3). " + FILTERS),
    ),
    "filter of a word": (
        lift("scan", D, variable_carry={"denny": "params"}),
        ("model.variable_carry: not a filter (got {'denny': 'params'}). " + FILTERS),
    ),
    "filter in deny": (
        lift("scan", D, variable_carry={"deny": [1]}),
        ("model.variable_carry.deny: not a filter (got (1,)). " + FILTERS),
    ),
    "filter as key": (
        lift("scan", D, variable_axes={1: 0}),
        ("model.variable_axes: not a filter (got 1). " + FILTERS),
    ),
    "filter in a pair": (
        lift("scan", D, split_rngs=[[{"deny": 1}, True]]),
        ("model.split_rngs[0][0].deny: not a filter (got 1). " + FILTERS),
    ),
    "rngs": (
        lift("remat", D, rngs=1.5),
        ("model.rngs: not a filter (got 1.5). " + FILTERS),
    ),
    "variables": (
        lift("jit", D, variables=[1]),
        ("model.variables: not a filter (got (1,)). " + FILTERS),
    ),
    "mapped_collections": (
        lift("map_variables", D, mapped_collections=None),
        ("model.mapped_collections: not a filter (got None). " + FILTERS),
    ),
    "split": (
        lift("scan", D, split_rngs={"params": 1}),
        ("model.split_rngs.params: must be true or false (got 1)."),
    ),
    "split in a pair": (
        lift("scan", D, split_rngs=[["params", "yes"]]),
        ("model.split_rngs[0][1]: must be true or false (got 'yes')."),
    ),
    "in_axes": (
        lift("vmap", D, in_axes=1.5),
        ("model.in_axes: not an axis (got 1.5). A number, null, or a list of these."),
    ),
    "in_axes in a list": (
        lift("vmap", D, in_axes=[0, "broadcast"]),
        (
            "model.in_axes[1]: not an axis (got 'broadcast'). A number, null, or a list"
            " of these."
        ),
    ),
    "in_axes in a mapping": (
        lift("vmap", D, in_axes=[{"a": "x"}]),
        (
            "model.in_axes[0].a: not an axis (got 'x'). A number, null, or a list of "
            "these."
        ),
    ),
    "in_axes of a scan": (
        lift("scan", D, in_axes=None),
        (
            "model.in_axes: not an axis (got None). A number, broadcast, or a list of "
            "these."
        ),
    ),
    "out_axes": (
        lift("scan", D, out_axes=True),
        (
            "model.out_axes: not an axis (got True). A number, broadcast, or a list of "
            "these."
        ),
    ),
    "length": (
        lift("scan", D, length=0),
        ("model.length: must be an integer above 0 (got 0)."),
    ),
    "length text": (
        lift("scan", D, length="3"),
        ("model.length: must be an integer above 0 (got '3')."),
    ),
    "lengths": (
        lift("remat_scan", D, lengths=3),
        ("model.lengths: must be a list of integers (got 3)."),
    ),
    "lengths empty": (
        lift("remat_scan", D, lengths=[]),
        ("model.lengths: must be a list of integers (got ())."),
    ),
    "lengths zero": (
        lift("remat_scan", D, lengths=[2, 0]),
        ("model.lengths[1]: must be an integer above 0 (got 0)."),
    ),
    "axis_size": (
        lift("vmap", D, axis_size=True),
        ("model.axis_size: must be an integer above 0 (got True)."),
    ),
    "axis_name": (
        lift("vmap", D, axis_name=3),
        ("model.axis_name: must be a string (got 3)."),
    ),
    "spmd_axis_name": (
        lift("vmap", D, spmd_axis_name=["data"]),
        ("model.spmd_axis_name: must be a string (got ('data',))."),
    ),
    "chunk": (
        lift("scan", D, chunk=-2),
        ("model.chunk: must be an integer above 0 (got -2)."),
    ),
    "unroll": (
        lift("scan", D, unroll=0),
        ("model.unroll: must be an integer above 0 (got 0)."),
    ),
    "unroll true": (
        lift("scan", D, unroll=True),
        ("model.unroll: must be an integer above 0 (got True)."),
    ),
    "reverse": (
        lift("scan", D, reverse=1),
        ("model.reverse: must be true or false (got 1)."),
    ),
    "prevent_cse": (
        lift("remat", D, prevent_cse="no"),
        ("model.prevent_cse: must be true or false (got 'no')."),
    ),
    "concrete": (
        lift("remat", D, concrete=0),
        ("model.concrete: must be true or false (got 0)."),
    ),
    "split transpose": (
        lift("scan", D, _split_transpose=1),
        ("model._split_transpose: must be true or false (got 1)."),
    ),
    "check_constancy_invariants": (
        lift("scan", D, check_constancy_invariants=None),
        ("model.check_constancy_invariants: must be true or false (got None)."),
    ),
    "init": (
        lift("map_variables", D, init=1),
        ("model.init: must be true or false (got 1)."),
    ),
    "mutable": (
        lift("map_variables", D, mutable="params"),
        ("model.mutable: must be true or false (got 'params')."),
    ),
    "metadata_params": (
        lift("scan", D, metadata_params=["layer"]),
        ("model.metadata_params: must be a mapping (got ('layer',))."),
    ),
    "static_argnums": (
        lift("remat", D, static_argnums="1"),
        (
            "model.static_argnums: must be a number or a list of numbers of arguments "
            "(got '1')."
        ),
    ),
    "static_argnums list": (
        lift("jit", D, static_argnums=[1, True]),
        (
            "model.static_argnums: must be a number or a list of numbers of arguments "
            "(got (1, True))."
        ),
    ),
    "donate_argnums": (
        lift("jit", D, donate_argnums=0.5),
        (
            "model.donate_argnums: must be a number or a list of numbers of arguments "
            "(got 0.5)."
        ),
    ),
    "static_argnames": (
        lift("jit", D, static_argnames=[1]),
        ("model.static_argnames: must be a list of names (got (1,))."),
    ),
    "static_argnames unknown": (
        lift("jit", D, static_argnames="deterministic"),
        ("model.static_argnames: not an argument of Dense (got 'deterministic')."),
    ),
    "backend": (
        lift("jit", D, backend=0),
        ("model.backend: must be a string (got 0)."),
    ),
    "data_transform": (
        lift("scan", D, data_transform="double"),
        ("model.data_transform: must be a function (got 'double')."),
    ),
    "trans_in_fn": (
        lift("map_variables", D, trans_in_fn=3),
        ("model.trans_in_fn: must be a function (got 3)."),
    ),
    "trans_in_fn module": (
        lift("map_variables", D, trans_in_fn=D),
        (
            "model.trans_in_fn: must be a function (got {'_target_': "
            "'flax.linen.Dense', 'features': 4})."
        ),
    ),
    "true_fun": (
        lift("cond", true_fun=3, false_fun=D),
        ("model.true_fun: must be a module or a function (got 3)."),
    ),
    "pred": (
        lift("cond", pred=3, true_fun=D, false_fun=D),
        ("model.pred: must be a module or a function (got 3)."),
    ),
    "index": (
        lift("switch", index="0", branches=[D]),
        ("model.index: must be a module or a function (got '0')."),
    ),
    "branches": (
        lift("switch", branches=D),
        (
            "model.branches: must be a list of modules (got {'_target_': "
            "'flax.linen.Dense', 'features': 4})."
        ),
    ),
    "branches empty": (
        lift("switch", branches=[]),
        ("model.branches: must be a list of modules (got ())."),
    ),
    "branch": (
        lift("switch", branches=[D, 3]),
        ("model.branches[1]: must be a module or a function (got 3)."),
    ),
    "cond_fn": (
        lift("while_loop", cond_fn=None, body_fn=D),
        ("model.cond_fn: must be a module or a function (got None)."),
    ),
    "policy": (
        lift("remat", D, policy="dots_savable"),
        (
            "model.policy: not a policy of jax.checkpoint_policies (got "
            "'dots_savable'). " + POLICIES + " Did you mean 'dots_saveable'?"
        ),
    ),
    "policy number": (
        lift("remat", D, policy=3),
        ("model.policy: not a policy of jax.checkpoint_policies (got 3). " + POLICIES),
    ),
    "policy list": (
        lift("remat", D, policy=["dots_saveable"]),
        (
            "model.policy: not a policy of jax.checkpoint_policies (got "
            "('dots_saveable',)). " + POLICIES + " Did you mean 'dots_saveable'?"
        ),
    ),
    "policy of two": (
        lift("remat", D, policy={"dots_saveable": [], "x": 1}),
        (
            "model.policy: not a policy of jax.checkpoint_policies (got "
            "{'dots_saveable': (), 'x': 1}). "
            + POLICIES
            + " Did you mean 'dots_saveable'?"
        ),
    ),
    "policy without arguments": (
        lift("remat", D, policy="save_only_these_names"),
        (
            "model.policy: save_only_these_names is made from arguments (got "
            "'save_only_these_names'). Say {save_only_these_names: [...]}."
        ),
    ),
    "policy with arguments": (
        lift("remat", D, policy={"dots_saveable": ["x"]}),
        (
            "model.policy: dots_saveable takes no arguments (got {'dots_saveable': "
            "('x',)}). Say dots_saveable."
        ),
    ),
    "policy of one argument": (
        lift("remat", D, policy={"save_only_these_names": "x"}),
        ("model.policy.save_only_these_names: must be a list of arguments (got 'x')."),
    ),
    "policy of too few": (
        lift("remat", D, policy={"save_from_both_policies": ["dots_saveable"]}),
        (
            "model.policy.save_from_both_policies: missing 1 required positional "
            "argument: 'policy_2' (got ('dots_saveable',)). Signature: "
            "save_from_both_policies(policy_1, policy_2)."
        ),
    ),
    "policy in a policy": (
        lift("remat", D, policy={"save_from_both_policies": ["dots_saveable", "dot"]}),
        (
            "model.policy.save_from_both_policies[1]: not a policy of "
            "jax.checkpoint_policies (got 'dot'). " + POLICIES
        ),
    ),
    "policy in a mapping": (
        lift("remat", D, policy={"save_from_both_policies": {"policy_1": "dot"}}),
        (
            "model.policy.save_from_both_policies.policy_1: not a policy of "
            "jax.checkpoint_policies (got 'dot'). " + POLICIES
        ),
    ),
    "policy of unknown arguments": (
        lift(
            "remat",
            D,
            policy={"offload_dot_with_no_batch_dims": {"offload_sorc": "device"}},
        ),
        (
            "model.policy.offload_dot_with_no_batch_dims: got an unexpected keyword "
            "argument 'offload_sorc' (got {'offload_sorc': 'device'}). Signature: "
            "offload_dot_with_no_batch_dims(offload_src, offload_dst)."
        ),
    ),
    "methods": (
        lift("vmap", D, methods=3),
        ("model.methods: must be a list of names (got 3)."),
    ),
    "methods empty": (
        lift("vmap", D, methods=[]),
        ("model.methods: must name a method (got ())."),
    ),
    "methods unknown": (
        lift("vmap", D, methods=["encode"]),
        ("model.methods: not a method of Dense that can be lifted (got 'encode')."),
    ),
    "methods of Flax": (
        lift("vmap", D, methods=["init"]),
        ("model.methods: not a method of Dense that can be lifted (got 'init')."),
    ),
    "methods field": (
        lift("vmap", D, methods="kernel_init"),
        (
            "model.methods: not a method of Dense that can be lifted (got "
            "'kernel_init')."
        ),
    ),
    "methods without arguments": (
        lift("vmap", D, methods={"__call__": 3}),
        ("model.methods.__call__: must be a mapping (got 3)."),
    ),
    "methods unknown field": (
        lift("vmap", D, methods={"__call__": {"in_axis": 0}}),
        (
            "model.methods.__call__.in_axis: not an argument of nn.vmap (got "
            "'in_axis'). Arguments: variable_axes, split_rngs, in_axes, out_axes, "
            "axis_size, axis_name, spmd_axis_name, metadata_params. Did you mean "
            "'in_axes'?"
        ),
    ),
    "methods bad field": (
        lift("vmap", D, methods={"__call__": {"in_axes": "x"}}),
        (
            "model.methods.__call__.in_axes: not an axis (got 'x'). A number, null, or "
            "a list of these."
        ),
    ),
    "methods and more": (
        lift("vmap", D, methods={"__call__": {}}, in_axes=0),
        (
            "model.in_axes: has no effect beside a mapping of methods (got 0). Move it "
            "into model.methods."
        ),
    ),
    "methods where there are none": (
        lift("remat_scan", D, lengths=[2], methods=["__call__"]),
        (
            "model.methods: not an argument of nn.remat_scan (got 'methods'). "
            "Arguments: lengths, policy, variable_broadcast, variable_carry, "
            "variable_axes, split_rngs, name, module."
        ),
    ),
    "in a lift": (
        lift("scan", lift("remat", D, policy="dots"), **LEN),
        (
            "model.module.policy: not a policy of jax.checkpoint_policies (got 'dots')."
            " " + POLICIES
        ),
    ),
}

REFUSED_CALLS: dict[str, Any] = {
    "returns another shape": (
        lift("scan", N, **LEN),
        (X,),
        (
            "model.module: nn.scan needs a module that returns what it takes (got "
            "'float32[2,3,2]'). It was called with float32[2,3,4]."
        ),
    ),
    "returns another type": (
        lift("scan", mine("Half"), **LEN),
        (X,),
        (
            "model.module: nn.scan needs a module that returns what it takes (got "
            "'bfloat16[2,3,4]'). It was called with float32[2,3,4]."
        ),
    ),
    "returns another shape in remat_scan": (
        lift("remat_scan", N, lengths=[2]),
        (X,),
        (
            "model.module: nn.remat_scan needs a module that returns what it takes (got"
            " 'float32[2,3,2]'). It was called with float32[2,3,4]."
        ),
    ),
    "returns outputs in remat_scan": (
        lift("remat_scan", mine("Out"), lengths=[2]),
        (X,),
        (
            "model.module: nn.remat_scan needs a module that returns what it takes (got"
            " ('float32[2,3,4]', 'float32[2,3,4]')). It was called with float32[2,3,4]."
        ),
    ),
    "no carry": (
        lift("scan", D, **LEN),
        (),
        ("model: nn.scan needs to be called with what it carries."),
    ),
    "no length": (
        lift("scan", D, **V),
        (X,),
        ("model: nn.scan of no mapped argument needs length. Set model.length."),
    ),
    "no length, broadcast": (
        lift("scan", CELL, **V, in_axes="broadcast"),
        (X[0], X[0]),
        ("model: nn.scan of no mapped argument needs length. Set model.length."),
    ),
    "no size": (
        lift("vmap", D, **V, in_axes=None),
        (X,),
        ("model: nn.vmap of no mapped argument needs axis_size. Set model.axis_size."),
    ),
    "no size, shared": (
        lift("vmap", D, variable_axes={"params": None}, in_axes=None),
        (X,),
        ("model: nn.vmap of no mapped argument needs axis_size. Set model.axis_size."),
    ),
    "in_axes beyond": (
        lift("vmap", D, **V, in_axes=3),
        (X,),
        (
            "model.in_axes: not an axis of what the module is called with (got 3). "
            "argument [0] has (2, 3, 4)."
        ),
    ),
    "in_axes far below": (
        lift("vmap", D, **V, in_axes=-4),
        (X,),
        (
            "model.in_axes: not an axis of what the module is called with (got -4). "
            "argument [0] has (2, 3, 4)."
        ),
    ),
    "in_axes of one": (
        lift("vmap", ADD, **V, in_axes=[0, 2]),
        (X, X[0]),
        (
            "model.in_axes[1]: not an axis of what the module is called with (got 2). "
            "argument [1] has (3, 4)."
        ),
    ),
    "in_axes in a mapping": (
        lift("vmap", ADD, **V, in_axes=[0, {"k": 3}]),
        (X, {"k": X}),
        (
            "model.in_axes[1].k: not an axis of what the module is called with (got 3)."
            " argument [1]['k'] has (2, 3, 4)."
        ),
    ),
    "in_axes of a number": (
        lift("vmap", ADD, **V),
        (X, 2.0),
        (
            "model.in_axes: not an axis of what the module is called with (got 0). "
            "argument [1] has ()."
        ),
    ),
    "in_axes too few": (
        lift("vmap", ADD, **V, in_axes=[0]),
        (X, X),
        ("model.in_axes: must have an axis for each argument (got (0,)). There are 2."),
    ),
    "in_axes too many": (
        lift("scan", CELL, **V, in_axes=[0, 0]),
        (X[0], X),
        (
            "model.in_axes: must have an axis for each argument after the carry (got "
            "(0, 0)). There are 1."
        ),
    ),
    "in_axes a mapping": (
        lift("vmap", D, **V, in_axes={"a": 0}),
        (X,),
        (
            "model.in_axes: must have an axis for each argument (got {'a': 0}). There "
            "are 1."
        ),
    ),
    "sizes": (
        lift("vmap", ADD, **V, in_axes=[0, 1]),
        (X, X),
        (
            "model.in_axes: must be axes of one size, and argument [0] has 2. argument "
            "[1] has 3 along the mapped axis."
        ),
    ),
    "sizes in one argument": (
        lift("vmap", ADD, **V),
        (X, {"k": X[0]}),
        (
            "model.in_axes: must be axes of one size, and argument [0] has 2. argument "
            "[1]['k'] has 3 along the mapped axis."
        ),
    ),
    "axis_size": (
        lift("vmap", D, **V, axis_size=5),
        (X,),
        (
            "model.axis_size: must be the size of the mapped axis (got 5). argument [0]"
            " has 2 along the mapped axis."
        ),
    ),
    "length of the data": (
        lift("scan", CELL, **V, length=3),
        (X[0], X),
        (
            "model.length: must be the size of the mapped axis (got 3). argument [0] "
            "after the carry has 2 along the mapped axis."
        ),
    ),
    "chunk of the length": (
        lift("scan", D, **LEN, chunk=2),
        (X,),
        ("model.chunk: must divide the number of iterations, 3 (got 2)."),
    ),
    "out_axes": (
        lift("vmap", D, **V, out_axes=4),
        (X,),
        (
            "model.out_axes: not an axis that every output can be stacked along (got "
            "4). float32[3,4] has -3 to 2."
        ),
    ),
    "out_axes of a scan": (
        lift("scan", CELL, **V, out_axes=-4),
        (X[0], X),
        (
            "model.out_axes: not an axis that every output can be stacked along (got "
            "-4). float32[3,4] has -3 to 2."
        ),
    ),
    "variable axis": (
        lift("vmap", D, **{**V, "variable_axes": {"params": 2}}),
        (X,),
        (
            "model.variable_axes.params: not an axis that every variable can be stacked"
            " along (got 2). bias has shape (4,): -2 to 1."
        ),
    ),
    "variable axis below": (
        lift("scan", D, **{**LEN, "variable_axes": {"params": -3}}),
        (X,),
        (
            "model.variable_axes.params: not an axis that every variable can be stacked"
            " along (got -3). bias has shape (4,): -2 to 1."
        ),
    ),
    "variable axis of a filter": (
        lift("scan", D, **{**LEN, "variable_axes": [[{"deny": "cache"}, 2]]}),
        (X,),
        (
            "model.variable_axes: not an axis that every variable can be stacked along "
            "(got 2). bias has shape (4,): -2 to 1."
        ),
    ),
    "variable axis of a method": (
        lift("vmap", D, methods={"__call__": {**V, "variable_axes": {"params": 2}}}),
        (X,),
        (
            "model.methods.__call__.variable_axes.params: not an axis that every "
            "variable can be stacked along (got 2). bias has shape (4,): -2 to 1."
        ),
    ),
    "no collection": (
        lift("scan", D, length=3, split_rngs={"params": True}),
        (X,),
        (
            "model: nn.scan leaves out a collection that its module has (got 'params')."
            " Add it to model.variable_axes."
        ),
    ),
    "no collection in vmap": (
        lift("vmap", D, split_rngs={"params": True}),
        (X,),
        (
            "model: nn.vmap leaves out a collection that its module has (got 'params')."
            " Add it to model.variable_axes."
        ),
    ),
    "no collection in remat": (
        lift("remat", D, variables="batch_stats"),
        (X,),
        (
            "model: nn.remat leaves out a collection that its module has (got "
            "'params'). Add it to model.variables."
        ),
    ),
    "no collection in remat_scan": (
        lift("remat_scan", D, lengths=[2], variable_axes={"cache": 0}),
        (X,),
        (
            "model: nn.remat_scan leaves out a collection that its module has (got "
            "'params'). Add it to model.variable_axes."
        ),
    ),
    "no collection in the outer": (
        lift("vmap", lift("remat", D)),
        (X,),
        (
            "model: nn.vmap leaves out a collection that its module has (got 'params')."
            " Add it to model.variable_axes."
        ),
    ),
    "variables that nothing makes": (
        lift("map_variables", D, mapped_collections="params"),
        (X,),
        (
            "model: nn.map_variables makes variables only with init or mutable. Set "
            "model.init=true."
        ),
    ),
    "twice": (
        lift("scan", D, **LEN, variable_broadcast="params"),
        (X,),
        (
            "model: nn.scan raised ValueError: broadcasted variable has a data "
            "dependency on the scan body."
        ),
    ),
    "static_argnums": (
        lift("remat", D, static_argnums=5),
        (X,),
        (
            "model: nn.remat raised ValueError: the `static_argnums` argument to "
            "`jax.checkpoint` / `jax.remat` can only take integer values greater than "
            "or equal to `-len(args)` and less than `len(args)`, but got (6,), while "
            "`len(args)` = 3."
        ),
    ),
    "concrete": (
        lift("remat", D, concrete=True),
        (X,),
        (
            "model: nn.remat raised NotImplementedError: The concrete argument is "
            "deprecated. Use static_argnums instead. for more information, see "
            "https://docs.jax.dev/en/latest/jep/11830-new-remat-checkpoint.html."
        ),
    ),
}


@pytest.mark.parametrize(("node", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(node: Any, message: str) -> None:
    with pytest.raises(TargetError) as caught:
        build(node)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("node", "args", "message"), REFUSED_CALLS.values(), ids=REFUSED_CALLS
)
def test_refused_when_called(node: Any, args: Any, message: str) -> None:
    made = build(node)
    with pytest.raises(TargetError) as caught:
        made.init(jax.random.key(0), *args)
    assert str(caught.value) == message


def test_a_lift_needs_no_target_to_be_a_model() -> None:
    """And a node with both is a `_target_` node, whose argument is called `lift`."""
    assert isinstance(build({"module": lift("remat", D), "rate": 0.5}), nn.Dense)
    with pytest.raises(TargetError, match=r"^model\.lift: not an argument of Dense"):
        build({**D, "lift": "remat"})


@pytest.mark.parametrize("kind", ["scan", "vmap", "remat", "jit", "map_variables"])
def test_what_the_module_raises_is_its_own(kind: str) -> None:
    """It comes out as it was raised, through every lift."""
    fields = LEN if kind == "scan" else V if kind == "vmap" else {}
    made = build(lift("remat", lift(kind, mine("Raising"), **fields)))
    with pytest.raises(LookupError) as caught:
        made.init(jax.random.key(0), X)
    assert str(caught.value) == "mine"


# --- names of streams and collections

STREAMS = ["params", "dropout"]
COLLECTIONS = ["params", "batch_stats"]

UNKNOWN_STREAMS: dict[str, Any] = {
    "split_rngs": (
        lift("scan", D, split_rngs={"dropuot": True}),
        "model.split_rngs: not a declared stream (got 'dropuot'). Declared: params, "
        "dropout. Did you mean 'dropout'?",
    ),
    "rngs": (
        lift("jit", D, rngs=["params", "noise"]),
        "model.rngs: not a declared stream (got 'noise'). Declared: params, dropout.",
    ),
    "denied": (
        lift("remat", D, rngs={"deny": "param"}),
        "model.rngs: not a declared stream (got 'param'). Declared: params, dropout. "
        "Did you mean 'params'?",
    ),
    "in a pair": (
        lift("vmap", D, split_rngs=[[["params", "noise"], True]]),
        "model.split_rngs: not a declared stream (got 'noise'). Declared: params, "
        "dropout.",
    ),
    "of a loop": (
        lift("while_loop", cond_fn=REL, body_fn=D, split_rngs={"noise": True}),
        "model.split_rngs: not a declared stream (got 'noise'). Declared: params, "
        "dropout.",
    ),
    "of a method": (
        lift("vmap", D, methods={"__call__": {"split_rngs": {"noise": True}}}),
        "model.methods.__call__.split_rngs: not a declared stream (got 'noise'). "
        "Declared: params, dropout.",
    ),
    "within": (
        {"layers": [D, lift("jit", lift("scan", D, split_rngs={"noise": True}))]},
        "model.layers[1].module.split_rngs: not a declared stream (got 'noise'). "
        "Declared: params, dropout.",
    ),
}

UNKNOWN_COLLECTIONS: dict[str, Any] = {
    **{
        field: (
            lift("scan", D, **{field: value}),
            f"model.{field}: not a collection of this model (got 'parms'). "
            "Collections: params, batch_stats. Did you mean 'params'?",
        )
        for field, value in {
            "variable_axes": {"parms": 0},
            "variable_broadcast": "parms",
            "variable_carry": ["batch_stats", "parms"],
        }.items()
    },
    "variables": (
        lift("remat", D, variables={"deny": ["cache"]}),
        "model.variables: not a collection of this model (got 'cache'). Collections: "
        "params, batch_stats.",
    ),
    "mapped_collections": (
        lift("map_variables", D, mapped_collections="param"),
        "model.mapped_collections: not a collection of this model (got 'param'). "
        "Collections: params, batch_stats. Did you mean 'params'?",
    ),
    "carry_variables": (
        lift("while_loop", cond_fn=REL, body_fn=D, carry_variables="state"),
        "model.carry_variables: not a collection of this model (got 'state'). "
        "Collections: params, batch_stats.",
    ),
    "broadcast_variables": (
        lift("while_loop", cond_fn=REL, body_fn=D, broadcast_variables="state"),
        "model.broadcast_variables: not a collection of this model (got 'state'). "
        "Collections: params, batch_stats.",
    ),
}


@pytest.mark.parametrize(
    ("node", "message"), UNKNOWN_STREAMS.values(), ids=UNKNOWN_STREAMS
)
def test_unknown_streams(node: Any, message: str) -> None:
    with pytest.raises(UnknownStreamError) as caught:
        check_streams(freeze(node, path="model"), path="model", streams=STREAMS)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("node", "message"), UNKNOWN_COLLECTIONS.values(), ids=UNKNOWN_COLLECTIONS
)
def test_unknown_collections(node: Any, message: str) -> None:
    frozen = freeze(node, path="model")
    with pytest.raises(ConfigError) as caught:
        check_collections(frozen, path="model", collections=COLLECTIONS)
    assert str(caught.value) == message


NOTHING: dict[str, Any] = {
    "streams": (
        check_streams,
        {"streams": STREAMS},
        lift("remat", D, rngs={"deny": STREAMS}),
        "model.rngs: a filter that matches no stream (got {'deny': ('params', "
        "'dropout')}). There is params, dropout.",
    ),
    "split": (
        check_streams,
        {"streams": STREAMS},
        lift("scan", D, split_rngs=[[{"deny": True}, True]]),
        "model.split_rngs: a filter that matches no stream (got {'deny': True}). "
        "There is params, dropout.",
    ),
}


@pytest.mark.parametrize(
    ("check", "known", "node", "message"), NOTHING.values(), ids=NOTHING
)
def test_filters_that_match_nothing(
    check: Callable[..., None], known: Any, node: Any, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check(freeze(node, path="model"), path="model", **known)
    assert str(caught.value) == message


def test_known_names() -> None:
    """What Flax makes itself is known; false and an empty list match nothing."""
    node = lift(
        "scan",
        lift("remat", D, variables=False, rngs=[]),
        variable_axes={"params": 0, "intermediates": 0},
        variable_broadcast=[],
        variable_carry="batch_stats",
        split_rngs=[[True, False], [{"deny": "params"}, True]],
    )
    frozen = freeze({"layers": [node]}, path="model")
    check_streams(frozen, path="model", streams=STREAMS)
    check_collections(frozen, path="model", collections=COLLECTIONS)
    other = {"_target_": "x.Y", "lift": 3, "split_rngs": {"no lift": 1}}
    check_streams(other, path="model", streams=STREAMS)


# --- typed as a command

LAYER = """
_target_: models.Sequential
layers:
  - {_target_: models.Flatten}
  - {_target_: flax.linen.Dense, features: 10}
  - lift: scan
    name: deep
    length: 2
    variable_axes: {params: 0}
    split_rngs: {params: true, dropout: true}
    module: {_target_: models.ResidualMLPBlock, dropout_rate: 0.1}
"""

TYPED = {
    "transform": (
        ("lift: scan", "lift: scna"),
        r"model\.layers\[2\]\.lift: not a lifted transform \(got 'scna'\)\..*"
        r"Did you mean 'scan'\?",
    ),
    "stream": (
        ("dropout: true", "dropuot: true"),
        r"model\.layers\[2\]\.split_rngs: not a declared stream \(got 'dropuot'\)\. "
        r"Declared: .*Did you mean 'dropout'\?",
    ),
    "collection": (
        ("    length: 2", "    length: 2\n    variable_broadcast: batch_stats"),
        r"model\.layers\[2\]\.variable_broadcast: not a collection of this model "
        r"\(got 'batch_stats'\)\. Collections: params\.",
    ),
    "shape": (
        ("models.ResidualMLPBlock, dropout_rate: 0.1", "flax.linen.Dense, features: 4"),
        r"model\.layers\[2\]\.module: nn\.scan needs a module that returns what it "
        r"takes \(got 'float32\[128,4\]'\)\. It was called with float32\[128,10\]\.",
    ),
    "name": (
        ("features: 10}", "features: 10, name: deep}"),
        r"model: its code raised NameInUseError in init: .*",
    ),
}


@pytest.mark.parametrize(("change", "line"), TYPED.values(), ids=TYPED)
def test_typed(change: tuple[str, str], line: str, runner: Any, tmp_path: Any) -> None:
    """One line, exit 2, nothing written."""
    assert LAYER.count(change[0]) == 1
    config = tmp_path / "mine" / "model" / "deep_of_mine.yaml"
    config.parent.mkdir(parents=True)
    config.write_text(LAYER.replace(*change))
    done = runner("-cd", "mine", "model=deep_of_mine")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(f"error: {line}\n", done.stderr), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
