# SPDX-License-Identifier: Apache-2.0
"""Penalties: what training adds to the loss of its task.

l1 * sum |w|  +  l2 * sum w^2  +  sum of all that modules sow into `losses`

over the entries w of all kernels. A term that is not asked for is no part of the
program, so that a run without it has the bits that it always had.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

__all__ = ["LOSSES", "find_penalties", "is_kernel", "split_losses"]

LOSSES = "losses"  # the collection; it is summed up and never carried along

_OF_WEIGHTS: Mapping[str, Callable[[Array], Array]] = {
    "train.l1": lambda w: jnp.sum(jnp.abs(w)),
    "train.l2": lambda w: jnp.sum(jnp.square(w)),
}


def find_penalties(
    params: PyTree, sown: PyTree, hypers: Mapping[str, Any]
) -> list[Float[Array, ""]]:
    """The terms that a run has; none of a run without any.

    Args:
        params: Parameters.
        sown: What the modules sowed.
        hypers: Numbers of the run, by config path; `train.l1` and `train.l2` are there
            where they are set.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    kernels = [leaf for path, leaf in leaves if is_kernel(path)]
    terms = [
        hypers[path] * sum(map(norm, kernels))
        for path, norm in _OF_WEIGHTS.items()
        if path in hypers and kernels
    ]
    return [*terms, *(jnp.sum(leaf) for leaf in jax.tree.leaves(sown))]


def split_losses(collections: Mapping[str, PyTree]) -> tuple[PyTree, dict[str, PyTree]]:
    """What was sown into `losses`, and every other collection."""
    rest = {name: tree for name, tree in collections.items() if name != LOSSES}
    return collections.get(LOSSES, {}), rest


def is_kernel(path: Any) -> bool:
    """Whether a leaf of the parameters is a matrix or filter of weights."""
    return jax.tree_util.keystr(path[-1:], simple=True) == "kernel"
