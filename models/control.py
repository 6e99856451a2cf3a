# SPDX-License-Identifier: Apache-2.0
"""Flax's lifted control flow as modules: a branch, a choice, a loop.

The parts (`true_fun`, `branches`, `body_fn`, ...) are modules or plain functions of
the operands. A part that is a module and has no name is called after its attribute,
with a number in a list: `true_fun`, `branches_0`. Each gets the training flag if its
signature names it. Where parameters are made, every branch is run, and a loop's body
once, since Flax can make none inside.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import Any, ClassVar

import flax.linen as nn
from flax.core.scope import CollectionFilter, PRNGSequenceFilter

from .flags import flags_for

__all__ = ["Cond", "Switch", "WhileLoop"]

Part = Callable[..., Any]


class Cond(nn.Module):
    """`flax.linen.cond`: one of two functions of the operands.

    y = true_fun(*operands) if pred(*operands) else false_fun(*operands)

    Attributes:
        true_fun: What is called where the predicate holds.
        false_fun: What is called where it doesn't.
        pred: Function of the operands, to a scalar bool. None: the first argument
            of the call is the predicate, the others are the operands.
        variable_filter: Collections that the branches see (Flax's `variables`).
        rng_filter: Streams that the branches see (Flax's `rngs`).
    """

    true_fun: Part
    false_fun: Part
    pred: Part | None = None
    variable_filter: CollectionFilter = True
    rng_filter: PRNGSequenceFilter = True

    preserve_adopted_names: ClassVar[bool] = True  # read by Flax

    @nn.compact
    def __call__(self, *operands: Any, deterministic: Any = None) -> Any:
        """Calls one branch; `deterministic` is for the branches that take it."""
        pred, operands = _choose(self.pred, operands)
        true_fun = _part(attrgetter("true_fun"), deterministic)
        false_fun = _part(attrgetter("false_fun"), deterministic)
        _make_parameters(self, (true_fun, false_fun), operands)
        return nn.cond(
            pred,
            true_fun,
            false_fun,
            self,
            *operands,
            variables=self.variable_filter,
            rngs=self.rng_filter,
        )


class Switch(nn.Module):
    """`flax.linen.switch`: one of several functions of the operands.

    y = branches[index(*operands)](*operands)

    Attributes:
        branches: What is called, by number.
        index: Function of the operands, to a scalar integer (clamped into range, as
            in `jax.lax.switch`). None: the first argument of the call is the index,
            the others are the operands.
        variable_filter: Collections that the branches see (Flax's `variables`).
        rng_filter: Streams that the branches see (Flax's `rngs`).
    """

    branches: Sequence[Part]
    index: Part | None = None
    variable_filter: CollectionFilter = True
    rng_filter: PRNGSequenceFilter = True

    preserve_adopted_names: ClassVar[bool] = True  # read by Flax

    @nn.compact
    def __call__(self, *operands: Any, deterministic: Any = None) -> Any:
        """Calls one branch; `deterministic` is for the branches that take it."""
        index, operands = _choose(self.index, operands)
        branches = [
            _part(partial(_branch, number=i), deterministic)
            for i in range(len(self.branches))
        ]
        _make_parameters(self, branches, operands)
        return nn.switch(
            index,
            branches,
            self,
            *operands,
            variables=self.variable_filter,
            rngs=self.rng_filter,
        )


class WhileLoop(nn.Module):
    """`flax.linen.while_loop`: a function of the carry, as long as a condition holds.

    while cond_fn(carry): carry = body_fn(carry)

    JAX can't differentiate it in reverse: it is for evaluation and sampling.

    Attributes:
        cond_fn: Function of the carry, to a scalar bool.
        body_fn: Function of the carry, to the next one.
        carry_variables: Collections that the body changes.
        broadcast_variables: Collections that it reads.
        split_rngs: Streams, by whether each iteration gets a key of its own.
    """

    cond_fn: Part
    body_fn: Part
    carry_variables: CollectionFilter = False
    broadcast_variables: CollectionFilter = True
    split_rngs: Mapping[PRNGSequenceFilter, bool] | None = None

    preserve_adopted_names: ClassVar[bool] = True  # read by Flax

    @nn.compact
    def __call__(self, carry: Any, *, deterministic: Any = None) -> Any:
        """Runs the loop; `deterministic` is for the parts that take it."""
        cond_fn = _part(attrgetter("cond_fn"), deterministic)
        body_fn = _part(attrgetter("body_fn"), deterministic)
        if self.is_mutable_collection("params"):
            cond_fn(self, carry)
            return body_fn(self, carry)
        return nn.while_loop(
            cond_fn,
            body_fn,
            self,
            carry,
            carry_variables=self.carry_variables,
            broadcast_variables=self.broadcast_variables,
            split_rngs=dict(self.split_rngs or {}),
        )


def _choose(chooser: Part | None, operands: tuple[Any, ...]) -> tuple[Any, Any]:
    if chooser is None:
        if not operands:
            raise ValueError(
                "operands: nothing to choose by (got none). "
                "Call it with a predicate or an index first, or give a function."
            )
        return operands[0], operands[1:]
    return chooser(*operands), operands


def _branch(module: Any, *, number: int) -> Part:
    part: Part = module.branches[number]
    return part


def _part(of: Callable[[nn.Module], Part], deterministic: Any) -> Part:
    """A function of (module, *operands), as Flax's control flow takes them."""

    def call(module: nn.Module, *operands: Any) -> Any:
        part = of(module)
        return part(*operands, **flags_for(part, deterministic=deterministic))

    return call


def _make_parameters(
    module: nn.Module, branches: Sequence[Part], operands: Any
) -> None:
    if module.is_mutable_collection("params"):
        for branch in branches:
            branch(module, *operands)
