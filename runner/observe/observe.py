# SPDX-License-Identifier: Apache-2.0
"""A function with the keys that it draws from beside its outputs, as arrays."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.interpreters.partial_eval import dce_jaxpr
from jaxtyping import Array, UInt32

from runner.observe.rewrite import Hidden, Place, open_jaxpr

__all__ = ["Observation", "observe", "split_places"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["words"],
    meta_fields=["places", "hidden"],
)
@dataclass(frozen=True)
class Observation:
    """The keys that one call drew from.

    Args:
        words: For each key of each place in turn, its words and a 1; all are zeros
            where the branch was not taken, or the loop had ended. May be stacked.
        places: Where they were drawn.
        hidden: Draws whose keys are not here.
    """

    words: UInt32[Array, "*calls n"]
    places: tuple[Place, ...]
    hidden: tuple[Hidden, ...] = ()


def observe(function: Callable[..., Any]) -> Callable[..., tuple[Any, Observation]]:
    """`function`, with the keys that it draws from beside its outputs.

    observe(f)(*args) = f(*args), Observation

    What no output depends on is left out, as a compiler does. A draw in a `while`
    loop shows its first 63 iterations and its last.
    """

    @wraps(function)
    def observed(*args: Any) -> tuple[Any, Observation]:
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        every = [True] * len(closed.jaxpr.outvars)
        live, _ = dce_jaxpr(closed.jaxpr, every, instantiate=True)
        given = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
        consts = [given[var] for var in live.constvars]
        opened = open_jaxpr(live)
        call = jaxpr_as_fun(ClosedJaxpr(opened.jaxpr, consts))
        flat = call(*jax.tree.leaves(args))
        outputs, keys = flat[: len(every)], [k.ravel() for k in flat[len(every) :]]
        words = jnp.concatenate(keys) if keys else jnp.zeros((0,), jnp.uint32)
        observation = Observation(words, opened.places, opened.hidden)
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs), observation

    return observed


def split_places(observation: Observation) -> list[UInt32[np.ndarray, "calls keys w"]]:
    """The words of each place's keys, the last one 1 where the key was drawn from."""
    sizes = [place.keys * (place.words + 1) for place in observation.places]
    words = np.asarray(observation.words)
    parts = np.split(words, np.cumsum(sizes)[:-1], axis=-1) if sizes else []
    return [
        part.reshape(-1, place.keys, place.words + 1)
        for part, place in zip(parts, observation.places, strict=True)
    ]
