# SPDX-License-Identifier: Apache-2.0
"""A fingerprint of the state, computed on the device in one pass.

    word(leaf) = sum_p mix(mix(p + id(leaf)) ^ bits(leaf)[p])     modulo 2^32
    id(leaf)   = first 4 bytes of SHA-256 of its path, dtype and shape

Integer sums, so no order of adding and no sharding changes it. It tells states apart
that differ by accident; what it can't do is withstand someone who wants it equal.

`mix` is the 32-bit finalizer of MurmurHash3 (A. Appleby, public domain).
"""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32

from runner.step import State

__all__ = ["fingerprint", "spell_fingerprint"]

_LANES = 2


def fingerprint(state: State) -> UInt32[Array, " lanes"]:
    """What tells two states apart: parameters, collections, optimizer state.

    Keys that are carried are left out, they follow from the step.
    """
    kept = {name: getattr(state, name) for name in ("params", "collections")}
    leaves = jax.tree_util.tree_leaves_with_path({**kept, "opt_state": state.opt_state})
    total = jnp.zeros(_LANES, jnp.uint32)
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path)
        total += _words(leaf, f"{name} {leaf.dtype} {leaf.shape}")
    return total


def spell_fingerprint(words: Any) -> str:
    """The words as hex, eight digits each."""
    return "".join(f"{int(word):08x}" for word in words)


def _words(leaf: Array, name: str) -> UInt32[Array, " lanes"]:
    bits = _bits(leaf)
    at = jnp.arange(bits.size, dtype=jnp.uint32)
    lanes = []
    for lane in range(_LANES):
        digest = hashlib.sha256(f"{lane} {name}".encode()).digest()
        start = jnp.uint32(int.from_bytes(digest[:4], "big"))
        mixed = _mix(_mix(at + start) ^ bits)
        lanes.append(jnp.sum(mixed, dtype=jnp.uint32) + _mix(start))
    return jnp.stack(lanes)


def _bits(leaf: Array) -> UInt32[Array, " words"]:
    """The bits of an array as words; narrower values are widened."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):  # of an optimizer
        leaf = jax.random.key_data(leaf)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        leaf = jnp.stack([leaf.real, leaf.imag])
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        width = min(32, 8 * leaf.dtype.itemsize)
        leaf = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{width}"))
    return leaf.ravel().astype(jnp.uint32)


def _mix(x: Array) -> Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
