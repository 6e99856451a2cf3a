# SPDX-License-Identifier: Apache-2.0
"""Branches, choices and loops as modules, against Flax's functional form by hand."""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from runner import models
from runner.build import build_module
from runner.parse import freeze

PACKAGE = "lab_of_test_control"
X = jnp.linspace(-1, 1, 12).reshape(3, 4)


def rngs() -> dict[str, jax.Array]:
    names = ("params", "dropout", "noise")
    return {name: jax.random.key(i) for i, name in enumerate(names)}


class Drop(nn.Module):
    """Dense and dropout."""

    @nn.compact
    def __call__(self, x: Any, deterministic: bool = False) -> Any:
        return nn.Dropout(0.5)(nn.Dense(4)(x), deterministic=deterministic)


class Train(nn.Module):
    """Another word for the flag."""

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        return nn.Dropout(0.5)(x, deterministic=not train)


class Count(nn.Module):
    """Counts its calls, and draws noise."""

    @nn.compact
    def __call__(self, carry: Any, deterministic: bool = False) -> Any:
        turn, x = carry
        calls = self.variable("counts", "calls", lambda: jnp.int32(0))
        calls.value = calls.value + 1
        x = nn.Dense(4)(x)
        if not deterministic:
            x = x + jax.random.normal(self.make_rng("noise"), x.shape)
        return turn + 1, x


class Keys(nn.Module):
    """Leaves the key of each turn."""

    @nn.compact
    def __call__(self, carry: Any) -> Any:
        turn, keys = carry
        if not self.has_rng("noise"):
            return turn + 1, keys
        data = jax.random.key_data(self.make_rng("noise"))
        return turn + 1, keys.at[turn].set(data)


def is_positive(x: Any) -> Any:
    return x.sum() > 0


def number_of(x: Any) -> Any:
    return jnp.int32(x[0, 0] * 10)


def is_small(x: Any) -> Any:
    return x.sum() < 10


def below_three(carry: Any) -> Any:
    return carry[0] < 3


def double(x: Any) -> Any:
    return 2 * x


CLASSES = (
    Drop,
    Train,
    Count,
    Keys,
    is_positive,
    number_of,
    is_small,
    below_three,
    double,
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


def mine(of: Any, **arguments: Any) -> dict[str, Any]:
    return {"_target_": f"{PACKAGE}.{of.__name__}", **arguments}


def build(node: Any) -> nn.Module:
    frozen = freeze(node, path="model")
    return build_module(frozen, path="model", trusted=(PACKAGE,))


def assert_same(ours: Any, theirs: Any) -> None:
    ours, theirs = map(flax.core.unfreeze, (ours, theirs))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for one, other in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def names_of(variables: Any, collection: str = "params") -> list[str]:
    return sorted(variables[collection])


# --- by hand


class CondByHand(nn.Module):
    """As Flax's documentation has it: each branch is called once where it is made."""

    deterministic: bool
    more: tuple[tuple[str, Any], ...] = ()

    def setup(self) -> None:
        self.true_fun, self.false_fun = Drop(), nn.Dense(4)

    def __call__(self, pred: Any, x: Any) -> Any:
        def yes(module: Any, x: Any) -> Any:
            return module.true_fun(x, deterministic=self.deterministic)

        def no(module: Any, x: Any) -> Any:
            return module.false_fun(x)

        if self.is_mutable_collection("params"):
            yes(self, x)
            no(self, x)
        return nn.cond(pred, yes, no, self, x, **dict(self.more))


class SwitchByHand(nn.Module):
    deterministic: bool

    def setup(self) -> None:
        self.branches = [Drop(), double, nn.Dense(4)]

    def __call__(self, index: Any, x: Any) -> Any:
        def first(module: Any, x: Any) -> Any:
            return module.branches[0](x, deterministic=self.deterministic)

        def last(module: Any, x: Any) -> Any:
            return module.branches[2](x)

        branches = [first, lambda module, x: double(x), last]
        if self.is_mutable_collection("params"):
            for branch in branches:
                branch(self, x)
        return nn.switch(index, branches, self, x)


class WhileByHand(nn.Module):
    deterministic: bool
    split: bool = True

    def setup(self) -> None:
        self.body_fn = Count()

    def __call__(self, carry: Any) -> Any:
        def body(module: Any, carry: Any) -> Any:
            return module.body_fn(carry, deterministic=self.deterministic)

        if self.is_mutable_collection("params"):
            return body(self, carry)
        return nn.while_loop(
            lambda module, carry: below_three(carry),
            body,
            self,
            carry,
            carry_variables="counts",
            broadcast_variables="params",
            split_rngs={"noise": self.split},
        )


# --- cond

COND = {"lift": "cond", "true_fun": mine(Drop),
        "false_fun": {"_target_": "flax.linen.Dense", "features": 4}}  # fmt: skip


@pytest.mark.parametrize("pred", [True, False])
def test_cond(pred: bool) -> None:
    made = build(COND)
    variables = made.init(rngs(), pred, X, deterministic=True)
    assert names_of(variables) == ["false_fun", "true_fun"]
    assert_same(variables, CondByHand(True).init(rngs(), pred, X))
    for flag in (True, False):
        ours = made.apply(variables, pred, X, deterministic=flag, rngs=rngs())
        theirs = CondByHand(flag).apply(variables, pred, X, rngs=rngs())
        assert_same(ours, theirs)
    assert (ours == 0).any() == pred  # dropped, in one branch alone


def test_cond_of_a_traced_predicate() -> None:
    made = build(COND)
    variables = made.init(rngs(), True, X, deterministic=True)

    @jax.jit
    def call(pred: Any) -> Any:
        return made.apply(variables, pred, X, deterministic=True)

    for pred in (True, False):
        name = "true_fun" if pred else "false_fun"
        branch = Drop() if pred else nn.Dense(4)
        flags = {"deterministic": True} if pred else {}
        inner = {"params": variables["params"][name]}
        np.testing.assert_allclose(
            call(pred),
            branch.apply(inner, X, **flags),
            rtol=1e-6,  # type: ignore
        )


def test_cond_by_a_function_of_the_operands() -> None:
    made = build({**COND, "pred": mine(is_positive)})
    variables = made.init(rngs(), X + 1, deterministic=True)
    apply = partial(CondByHand(True).apply, variables)
    for x in (X + 1, X - 1):
        out = made.apply(variables, x, deterministic=True)
        assert_same(out, apply(is_positive(x), x))


@pytest.mark.parametrize("rng_filter", ["params", ["params", "dropout"], {"deny": "x"}])
def test_filters_of_cond(rng_filter: Any) -> None:
    """A stream that is left out is not there inside: Flax takes `params` instead."""
    node = {**COND, "rngs": rng_filter, "variables": ["params"]}
    variables = build(COND).init(rngs(), True, X, deterministic=True)
    given = flax.core.DenyList("x") if isinstance(rng_filter, dict) else rng_filter
    more = (("rngs", given), ("variables", ["params"]))
    theirs = CondByHand(False, more).apply(variables, True, X, rngs=rngs())
    ours = build(node).apply(variables, True, X, deterministic=False, rngs=rngs())
    assert_same(ours, theirs)
    whole = build(COND).apply(variables, True, X, deterministic=False, rngs=rngs())
    assert bool((ours == whole).all()) is (rng_filter != "params")


def test_gradients_reach_the_branch_that_was_taken() -> None:
    made = build(COND)
    variables = made.init(rngs(), True, X, deterministic=True)
    grads = jax.grad(lambda v: made.apply(v, True, X, deterministic=True).sum())(
        variables
    )["params"]
    assert jnp.abs(grads["true_fun"]["Dense_0"]["kernel"]).sum() > 0
    assert jnp.abs(grads["false_fun"]["kernel"]).sum() == 0


# --- switch

SWITCH = {"lift": "switch", "branches": [
    mine(Drop), mine(double), {"_target_": "flax.linen.Dense", "features": 4}
]}  # fmt: skip


@pytest.mark.parametrize("index", [-1, 0, 1, 2, 9])
def test_switch(index: int) -> None:
    """An index out of range is clamped, as in `jax.lax.switch`."""
    made = build(SWITCH)
    variables = made.init(rngs(), index, X, deterministic=True)
    assert names_of(variables) == ["branches_0", "branches_2"]
    assert_same(variables, SwitchByHand(True).init(rngs(), index, X))
    for flag in (True, False):
        ours = made.apply(variables, index, X, deterministic=flag, rngs=rngs())
        theirs = SwitchByHand(flag).apply(variables, index, X, rngs=rngs())
        assert_same(ours, theirs)
    clamped = min(max(index, 0), 2)
    same = made.apply(variables, clamped, X, deterministic=False, rngs=rngs())
    assert_same(ours, same)


def test_switch_by_a_function_of_the_operands() -> None:
    made = build({**SWITCH, "index": mine(number_of)})
    x = X.at[0, 0].set(0.1)
    variables = made.init(rngs(), x, deterministic=True)
    assert_same(made.apply(variables, x, deterministic=True), 2 * x)


def test_names_of_branches() -> None:
    branches = [{**mine(Drop), "name": "left"}, mine(Drop),
                {"lift": "remat", "module": mine(Drop), "name": "right"}]  # fmt: skip
    made = build({"lift": "switch", "branches": branches, "name": "choice"})
    variables = made.init(rngs(), 0, X, deterministic=True)
    assert names_of(variables) == ["branches_1", "left", "right"]
    chain = build({"_target_": "models.Sequential", "layers": [
        {**COND, "pred": mine(is_positive), "name": "choice"},
        {"lift": "cond", "pred": mine(is_positive), "true_fun": mine(Drop),
         "false_fun": mine(double)},
    ]})  # fmt: skip
    assert names_of(chain.init(rngs(), X, deterministic=True)) == ["choice", "layers_1"]


def test_two_branches_of_one_name() -> None:
    branches = [{**mine(Drop), "name": "same"}, {**mine(Drop), "name": "same"}]
    made = build({"lift": "switch", "branches": branches})
    with pytest.raises(flax.errors.NameInUseError, match="same"):
        made.init(rngs(), 0, X, deterministic=True)


# --- while_loop

LOOP = {
    "lift": "while_loop",
    "cond_fn": mine(below_three),
    "body_fn": mine(Count),
    "carry_variables": "counts",
    "broadcast_variables": "params",
    "split_rngs": {"noise": True},
}


@pytest.mark.parametrize("split", [True, False])
def test_while_loop(split: bool) -> None:
    made, carry = build({**LOOP, "split_rngs": {"noise": split}}), (jnp.int32(0), X)
    variables = made.init(rngs(), carry, deterministic=True)
    assert names_of(variables) == names_of(variables, "counts") == ["body_fn"]
    assert_same(variables, WhileByHand(True).init(rngs(), carry))
    for flag in (True, False):
        apply = partial(made.apply, variables, carry, rngs=rngs(), mutable=["counts"])
        hand = WhileByHand(flag, split)
        theirs = hand.apply(variables, carry, rngs=rngs(), mutable=["counts"])
        ours = apply(deterministic=flag)
        assert_same(ours, theirs)
        (turns, _), after = ours
        assert turns == 3
        before = variables["counts"]["body_fn"]["calls"]
        assert after["counts"]["body_fn"]["calls"] == before + 3


@pytest.mark.parametrize(("split", "distinct"), [(True, 3), (False, 1)])
def test_keys_of_the_turns(split: bool, distinct: int) -> None:
    node = {"lift": "while_loop", "cond_fn": mine(below_three), "body_fn": mine(Keys),
            "split_rngs": {"noise": split}}  # fmt: skip
    carry = (jnp.int32(0), jnp.zeros((3, 2), jnp.uint32))
    _, keys = build(node).apply({}, carry, rngs=rngs())
    assert len(np.unique(np.asarray(keys), axis=0)) == distinct


def test_a_loop_of_functions() -> None:
    node = {"lift": "while_loop", "cond_fn": mine(is_small), "body_fn": mine(double)}
    made = build(node)
    assert made.apply({}, jnp.ones(3)).tolist() == [4, 4, 4]
    with pytest.raises(ValueError, match="Reverse-mode differentiation"):
        jax.grad(lambda x: made.apply({}, x).sum())(jnp.ones(3))


# --- flags, and by `_target_`


@pytest.mark.parametrize("kind", ["cond", "switch", "while_loop"])
def test_flags_reach_the_parts(kind: str) -> None:
    """Each by the word that it knows; a part without one gets none."""
    made: Any = {
        "cond": lambda part: models.Cond(true_fun=part, false_fun=double),
        "switch": lambda part: models.Switch(branches=[part, double]),
        "while_loop": lambda part: models.WhileLoop(
            cond_fn=lambda x: x[0, 0] < 0, body_fn=part
        ),
    }[kind](Train())
    first: tuple[Any, ...] = {"cond": (True,), "switch": (0,)}.get(kind, ())
    call: Callable[..., Any] = partial(made.apply, {}, *first, X + 0.5, rngs=rngs())
    if kind == "while_loop":
        call = partial(made.init_with_output, rngs(), X + 0.5)
        assert (call(deterministic=False)[0] == 0).any()
        assert not (call(deterministic=True)[0] == 0).any()
        return
    assert (call(deterministic=False) == 0).any()
    assert not (call(deterministic=True) == 0).any()
    assert not (call() == 0).any()  # Train's own default


def test_the_same_by_target() -> None:
    by_target = {
        "_target_": "models.Cond",
        **{key: value for key, value in COND.items() if key != "lift"},
        "rng_filter": ["params", "dropout"],
    }
    by_lift = {**COND, "rngs": ["params", "dropout"]}
    results = []
    for node in (by_target, by_lift):
        made = build(node)
        variables = made.init(rngs(), True, X, deterministic=True)
        flags: dict[str, Any] = {"deterministic": False, "rngs": rngs()}
        results.append((variables, made.apply(variables, True, X, **flags)))
    assert_same(*results)


@pytest.mark.parametrize("made", [models.Cond(double, double), models.Switch([double])])
def test_nothing_to_choose_by(made: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"^operands: nothing to choose by"):
        made.apply({})


@pytest.mark.parametrize("outer", ["scan", "vmap", "remat", "jit"])
def test_in_a_lift(outer: str) -> None:
    """Each turn and member makes its choice."""
    axes = {"variable_axes": {"params": 0},
            "split_rngs": {"params": True, "dropout": True}}  # fmt: skip
    fields = {"scan": {**axes, "length": 3}, "vmap": axes}.get(outer, {})
    inner = {**COND, "pred": mine(is_positive)}
    made = build({"lift": outer, "module": inner, **fields})
    x = jnp.stack([X, -X + 1])
    variables = made.init(rngs(), x, deterministic=True)
    assert names_of(variables) == ["false_fun", "true_fun"]
    out = made.apply(variables, x, deterministic=False, rngs=rngs())
    assert out.shape == x.shape
