# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint keeps of the state, and the way back.

Keys of streams are not kept, they follow from the step. A key of an optimizer's own is,
as its words: Orbax takes no typed keys.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from runner.errors import RecordError
from runner.keys import is_key
from runner.step import State

__all__ = ["PARTS", "keep", "restore"]

PARTS = ("params", "collections", "opt_state")


def keep(state: State) -> dict[str, Any]:
    """The arrays of a state, to be given to Orbax, which copies them as it is called.

    Where one device has all, they are views of the host's: half the work for Orbax.
    """
    kept = {name: getattr(state, name) for name in ("step", *PARTS)}
    words = jax.tree.map(_words, kept)
    if any(map(_is_spread, jax.tree.leaves(words))):
        return words  # each process writes its own part of it
    held: dict[str, Any] = jax.device_get(words)
    return held


def restore(
    leaves: Mapping[str, np.ndarray], *, like: State, impl: str, name: str
) -> dict[str, Any]:
    """`params`, `collections` and `opt_state` of a state.

    Args:
        leaves: Arrays by their paths, as `params/Dense_0/kernel`.
        like: Shapes and dtypes of the state.
        impl: PRNG implementation of keys in it.
        name: What to call the checkpoint in messages.

    Raises:
        RecordError: an array is missing, too many, or of another shape or dtype.
    """
    left = {path: leaf for path, leaf in leaves.items() if path != "step"}

    def take(path: Any, shape: Any) -> Any:
        at = jax.tree_util.keystr(path, simple=True, separator="/")
        leaf, want = left.pop(at, None), jax.eval_shape(_words, shape)
        if leaf is None or leaf.shape != want.shape or leaf.dtype != want.dtype:
            what = f"{at} is not an array of the model"
            want_ = f"{want.dtype}{list(want.shape)}"
            raise RecordError(f"{name}: {what} (want {want_}).")
        if is_key(shape):
            return jax.random.wrap_key_data(jnp.asarray(leaf), impl=impl)
        return leaf

    wanted = {part: getattr(like, part) for part in PARTS}
    kept: dict[str, Any] = jax.tree_util.tree_map_with_path(take, wanted)
    if left:
        raise RecordError(f"{name}: {min(left)} is no array of the model.")
    return kept


def _words(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def _is_spread(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1
