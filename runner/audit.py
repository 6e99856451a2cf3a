# SPDX-License-Identifier: Apache-2.0
"""What a traced Flax program draws, read from its jaxpr.

Each key that enters the program is one stream's. Every `random_bits` (and any
other primitive that consumes a key) is followed back to it, through folds,
splits, slices, calls, scans and vmaps. A fold whose number is the hash of a
module path and call count, as Flax's `make_rng` computes it, gets that path;
`make_rng` is watched while the program is traced, so that both accounts come
from one trace. What can't be followed is reported as such, never guessed.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import flax
import jax
from flax.core.scope import Scope
from jax.interpreters.partial_eval import dce_jaxpr
from jaxtyping import Array, Key

from runner.walk import Call, Draw, Use, walk_jaxpr

__all__ = ["Draw", "Missing", "Trace", "Use", "trace_draws"]


@dataclass(frozen=True)
class Missing:
    """A `make_rng` of a stream that the program was not given."""

    stream: str
    path: tuple[str, ...]


@dataclass(frozen=True)
class Trace:
    """What one function draws, and what it returns (shapes and dtypes)."""

    draws: tuple[Draw, ...]
    missing: tuple[Missing, ...]
    outputs: Any
    primitives: frozenset[str]


def trace_draws(
    function: Callable[..., Any], rngs: Mapping[str, Key[Array, ""]], *args: Any
) -> Trace:
    """Traces `function(rngs, *args)` abstractly and lists what it draws.

    Args:
        function: Any JAX function; Flax modules may be applied within.
        rngs: Key of each stream, abstract or real.
        args: Its other arguments, abstract or real.

    Raises:
        flax.errors.InvalidRngError: a stream is missing with nothing to fall back
            to; the exception's `missing` lists all that were missing so far.
    """
    with _watch_make_rng() as calls:
        try:
            closed, outputs = jax.make_jaxpr(function, return_shape=True)(
                dict(rngs), *args
            )
        except flax.errors.InvalidRngError as error:
            error.missing = tuple(calls.missing)  # type: ignore[attr-defined]
            raise
    names = sorted(rngs)  # pytree order of a dict
    # What no output depends on, the compiler drops.
    every = [True] * len(closed.jaxpr.outvars)
    live, _ = dce_jaxpr(closed.jaxpr, every, instantiate=True)
    draws, primitives = walk_jaxpr(live, streams=names, calls=calls.by_hash)
    return Trace(draws, tuple(calls.missing), outputs, primitives)


@dataclass
class _Calls:
    """`make_rng` calls by the number that Flax folds into the stream's key."""

    by_hash: dict[int, list[Call]] = field(default_factory=dict)
    missing: list[Missing] = field(default_factory=list)


@contextlib.contextmanager
def _watch_make_rng() -> Iterator[_Calls]:
    calls, original = _Calls(), Scope.make_rng

    def make_rng(self: Scope, name: str = "params") -> Any:
        used = name if self.has_rng(name) else "params"
        if used != name or not self.has_rng(used):
            calls.missing.append(Missing(name, tuple(self.path)))
        key = original(self, name)
        count = self.rng_counters[used]
        suffix = (*self.rngs[used].suffix, count)
        found = calls.by_hash.setdefault(_flax_hash(suffix), [])
        names = tuple(part for part in suffix if isinstance(part, str))
        if (call := Call(names, tuple(self.path), count)) not in found:
            found.append(call)
        return key

    Scope.make_rng = make_rng  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        Scope.make_rng = original  # type: ignore[method-assign]


def _flax_hash(suffix: tuple[str | int, ...]) -> int:
    """First four bytes of SHA-1 over path and count (flax.core.scope)."""
    digest = hashlib.sha1()
    for part in suffix:
        if flax.config.flax_fix_rng_separator:
            digest.update(b"\00")
        if isinstance(part, str):
            digest.update(part.encode())
        else:
            digest.update(part.to_bytes((part.bit_length() + 7) // 8, "big"))
    return int.from_bytes(digest.digest()[:4], "big")
