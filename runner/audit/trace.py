# SPDX-License-Identifier: Apache-2.0
"""What a traced Flax program draws, read from its jaxpr.

Each key that enters the program is one stream's. Every `random_bits` (and any
other primitive that consumes a key) is followed back to it, through folds,
splits, gathers, calls, branches, loops and meshes. `make_rng` is watched while the
program is traced, and writes the module's path and its count into the name stack, so
that both accounts come from one trace. What can't be followed is reported as such,
never guessed.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
from flax.core.scope import Scope
from flax.linen import module as linen_module
from flax.linen import transforms as linen_transforms
from jax.interpreters.partial_eval import dce_jaxpr
from jaxtyping import Array, Key

from runner.audit.lifted import Crossing, watch_lifts
from runner.audit.marks import mark_fork, mark_make_rng, mark_module
from runner.audit.walk import Draw, Use, walk_jaxpr

__all__ = ["NOT_THERE", "Draw", "Missing", "Trace", "Use", "trace_draws"]

NOT_THERE = "of a stream that is not there"
"""Why a draw is untraced whose stream was missing."""


@dataclass(frozen=True)
class Missing:
    """A `make_rng` of a stream that was not there.

    Args:
        stream: Its name.
        path: Path of the module that asked for it.
        lift: The lift that has the stream outside and doesn't mention it; None where
            the program was not given it.
        substituted: Whether Flax took `params` instead; where it had nothing to
            take, the program can't run.
    """

    stream: str
    path: tuple[str, ...]
    lift: Crossing | None = None
    substituted: bool = False


@dataclass(frozen=True)
class Trace:
    """What one function draws, and what it returns (shapes and dtypes).

    Args:
        draws: Places that draw.
        missing: Calls of `make_rng` that found no such stream.
        outputs: Shapes and dtypes of what the function returns.
        primitives: Names of the primitives in the program.
        streams: Streams that the program was given.
        crossings: Lifts around each `make_rng` call, by (stream, module path, call).
    """

    draws: tuple[Draw, ...]
    missing: tuple[Missing, ...]
    outputs: Any
    primitives: frozenset[str]
    streams: tuple[str, ...] = ()
    crossings: Mapping[Any, tuple[Crossing, ...]] = field(default_factory=dict)


_SPARE = ""  # the name of a key that stands in for streams that are not there


def trace_draws(
    function: Callable[..., Any],
    rngs: Mapping[str, Key[Array, ""]],
    *args: Any,
    spare: Key[Array, ""] | None = None,
) -> Trace:
    """Traces `function(rngs, *args)` abstractly and lists what it draws.

    Args:
        function: Any JAX function; Flax modules may be applied within.
        rngs: Key of each stream, abstract or real.
        args: Its other arguments, abstract or real.
        spare: What `make_rng` gives for a stream that is missing with nothing to
            fall back to, so that the trace goes on; None lets Flax raise.

    Raises:
        flax.errors.InvalidRngError: such a stream, and no `spare`.
    """

    def traced(rngs: Any, spares: Any, *args: Any) -> Any:
        calls.spare = next(iter(spares), None)
        return function(rngs, *args)

    spares = () if spare is None else (spare,)
    with _watch_make_rng() as calls:
        make = jax.make_jaxpr(traced, return_shape=True)
        closed, outputs = make(dict(rngs), spares, *args)
    names = [*sorted(rngs), *[_SPARE for _ in spares]]  # pytree order of a dict
    # What no output depends on, the compiler drops.
    every = [True] * len(closed.jaxpr.outvars)
    live, _ = dce_jaxpr(closed.jaxpr, every, instantiate=True)
    consts = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    draws, primitives = walk_jaxpr(live, streams=names, consts=consts)
    return Trace(
        draws=tuple(map(_without_spare, draws)),
        missing=tuple(dict.fromkeys(calls.missing)),
        outputs=outputs,
        primitives=primitives,
        streams=tuple(rngs),
        crossings=calls.crossings,
    )


def _without_spare(draw: Draw) -> Draw:
    if draw.stream != _SPARE:
        return draw
    return replace(draw, stream=None, ops=(), axes=(), untraced=NOT_THERE)


@dataclass
class _Calls:
    """What `make_rng` was asked for."""

    missing: list[Missing] = field(default_factory=list)
    crossings: dict[Any, tuple[Crossing, ...]] = field(default_factory=dict)
    spare: Any = None


@contextlib.contextmanager
def _watch_make_rng() -> Iterator[_Calls]:
    """Notes each `make_rng`, and has Flax write whole paths in the name stack."""
    calls, original = _Calls(), Scope.make_rng

    def make_rng(self: Scope, name: str = "params") -> Any:
        used = name if self.has_rng(name) else "params"
        there, path = self.has_rng(used), tuple(self.path)
        if used != name or not there:
            lift = lifts.absent(self, name)
            calls.missing.append(Missing(name, path, lift, substituted=there))
        if not there and calls.spare is not None:
            return calls.spare
        count = self.rng_counters.get(used, 0) + 1
        suffix = self.rngs[used].suffix if there else ()
        names = tuple(part for part in suffix if isinstance(part, str))
        with jax.named_scope(mark_make_rng(names, path, count)):
            key = original(self, name)
        calls.crossings[used, path, count] = lifts.crossings(self, used)
        return key

    with contextlib.ExitStack() as patches:
        patches.enter_context(_patched(Scope, "make_rng", make_rng))
        patches.enter_context(_mark_modules())
        lifts = patches.enter_context(watch_lifts())
        yield calls


_WATCHES = itertools.count()


@contextlib.contextmanager
def _mark_modules() -> Iterator[None]:
    """Has Flax write the path of each module, and of each trace that is shared."""
    name_of: Any = linen_module._derive_profiling_name
    fork, fingerprint = linen_transforms.fork_rngs, linen_transforms._module_fingerprint
    watch = next(_WATCHES)

    def derive_profiling_name(module: Any, method: Any) -> str:
        if module.scope is None:
            return name_of(module, method)
        return mark_module(tuple(module.scope.path))

    @contextlib.contextmanager
    def fork_rngs(module: Any) -> Iterator[None]:
        path = () if module.scope is None else tuple(module.scope.path)
        with fork(module), jax.named_scope(mark_fork(path)):
            yield

    def module_fingerprint(module: Any) -> Any:
        # So that nn.jit hands out no trace from before, in which nothing is marked.
        return fingerprint(module), watch

    with contextlib.ExitStack() as patches:
        for holder in (linen_module, linen_transforms):
            name = "_derive_profiling_name"
            patches.enter_context(_patched(holder, name, derive_profiling_name))
        for name, function in (
            ("fork_rngs", fork_rngs),
            ("_module_fingerprint", module_fingerprint),
        ):
            patches.enter_context(_patched(linen_transforms, name, function))
        patches.enter_context(linen_module.override_named_call(True))
        yield


@contextlib.contextmanager
def _patched(holder: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)
