# SPDX-License-Identifier: Apache-2.0
"""Every key of a run, as a pure function of its coordinates.

    base = fold_in(key(seed), id(stream))        derive: name (see `plan_keys`)
    base = fold_in(base, id(phase))              in the phases eval and sample
    key  = fold_in(fold_in(base, step), ...)     what stands in `per`, in its order

A key is planned as a tuple of `Op`s, a value that can be printed, compared and
replayed; `derive_key` is their only interpreter. This is the only file of the
runner that calls `jax.random.key`, `split` or `fold_in`.
"""

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from runner.errors import UnknownStreamError, did_you_mean
from runner.ops import Affine, Op, as_uint32, bind_ops
from runner.spec import Coordinate, Derive, Phase, RngSpec, Rule, StreamKind, StreamSpec

__all__ = [
    "Affine",
    "KeyPlan",
    "Op",
    "Stream",
    "advance_carry",
    "base_key_words",
    "bind_ops",
    "derive_base_keys",
    "derive_key",
    "draw_canary",
    "host_generator",
    "host_words",
    "is_key",
    "key_shape",
    "key_words",
    "make_rngs",
    "name_id",
    "plan_keys",
    "rng_flags",
    "split_carry",
]

_FOLDED_PHASES = (Phase.EVAL, Phase.SAMPLE)
_FLAGS = threading.RLock()


@dataclass(frozen=True)
class Stream:
    """A declared stream with the ops of its base key.

    Args:
        name: Name under `rng.streams`.
        spec: Its policy.
        seed: The seed it starts from.
        base: Ops of its base key; empty for a host stream.
        axes: Size of each axis of the mesh.
    """

    name: str
    spec: StreamSpec
    seed: int
    base: tuple[Op, ...]
    axes: Mapping[str, int] = field(default_factory=dict)

    def ops(self, phase: Phase, coordinates: frozenset[str]) -> tuple[Op, ...]:
        """The ops of its key in a phase that has these coordinates and mesh axes."""
        ops = list(self.base)
        if phase in _FOLDED_PHASES:
            ops.append(Op("fold_in", name_id(phase), why=f"phase {phase}"))
        for name, rule in self.spec.per.items():
            if name in coordinates:
                ops.append(self._op(name, rule))
        return tuple(ops)

    def _op(self, name: str, rule: Rule) -> Op:
        if rule is Rule.SPLIT:
            return Op("split", index=name, of=self.axes[name], why=name)
        if isinstance(name, Coordinate):
            op: Literal["carry", "fold_in"]
            op = "carry" if rule is Rule.CARRY else "fold_in"
            return Op(op, name, why=str(name))
        return Op("fold_in", Affine(0, ((name, 1),)), why=name)


@dataclass(frozen=True)
class KeyPlan:
    """The resolved streams of a run."""

    impl: str
    streams: Mapping[str, Stream]

    def stream(self, name: str) -> Stream:
        """A declared stream by its name.

        Raises:
            UnknownStreamError: `name` is not declared.
        """
        if name not in self.streams:
            raise UnknownStreamError(
                f"rng.streams.{name}",
                "not a declared stream",
                got=name,
                allowed=f"Declared: {', '.join(self.streams)}",
                fix=did_you_mean(name, self.streams),
            )
        return self.streams[name]

    def carried(self) -> tuple[str, ...]:
        """Names of the streams that training carries from step to step."""
        return tuple(
            name
            for name, stream in self.in_phase(Phase.TRAIN).items()
            if stream.spec.per.get(Coordinate.STEP) is Rule.CARRY
        )

    def in_phase(self, phase: Phase) -> dict[str, Stream]:
        """The streams that the compiled program of a phase is given."""
        return {
            name: stream
            for name, stream in self.streams.items()
            if stream.spec.kind is StreamKind.JAX and phase in stream.spec.phases
        }


def name_id(name: str) -> int:
    """First four bytes, big-endian, of SHA-256 of the name; unsigned."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


def plan_keys(rng: RngSpec, *, axes: Mapping[str, int] | None = None) -> KeyPlan:
    """Resolves each stream's base key; seeds are taken modulo 2^32, as JAX does.

    derive: name    fold_in(key(seed), id(name))
    derive: split   split(key(seed), n)[i], over the n streams that say so
    derive: root    key(seed)

    Args:
        rng: The declared streams.
        axes: Size of each axis of the mesh.
    """
    splits = [n for n, s in rng.streams.items() if s.derivation is Derive.SPLIT]
    streams = {}
    for name, spec in rng.streams.items():
        seed = (rng.seed if spec.seed is None else spec.seed) % 2**32
        base: tuple[Op, ...] = (Op("seed", seed, why="seed"),)
        if spec.kind is StreamKind.HOST:
            base = ()
        elif spec.derivation is Derive.NAME:
            base += (Op("fold_in", name_id(name), why=f"stream {name}"),)
        elif spec.derivation is Derive.SPLIT:
            at, n = splits.index(name), len(splits)
            base += (Op("split", index=at, of=n, why=f"stream {name}"),)
        streams[name] = Stream(name, spec, seed, base, dict(axes or {}))
    return KeyPlan(str(rng.impl), streams)


def derive_key(
    ops: tuple[Op, ...],
    *,
    impl: str,
    start: Key[Array, ""] | None = None,
    coordinates: Mapping[str, int | Int[Array, ""]] | None = None,
) -> Key[Array, ""]:
    """Replays a derivation.

    Args:
        ops: What to replay.
        impl: PRNG implementation of a `seed` op.
        start: Key to begin with; None when the first op is a `seed`.
        coordinates: Value, 0-based, of each coordinate and axis that `ops` name;
            may be traced.

    Returns:
        Typed scalar key; equal inputs give equal bits.
    """
    key: Any = start
    for op in bind_ops(ops, coordinates or {}):
        value: Any = op.value
        if op.op == "seed":
            key = jax.random.key(as_uint32(value), impl=impl)
        elif op.op == "fold_in":
            key = jax.random.fold_in(key, as_uint32(value))
        elif op.op == "split":
            key = jax.random.split(key, op.of)[op.index]
        elif op.op == "carry":
            key = split_carry(advance_carry(key, value))[0]
        else:
            key = _repeat(op, impl, key)
    return key


def _repeat(op: Op, impl: str, key: Key[Array, ""]) -> Key[Array, ""]:
    def turn(i: Any, key: Any) -> Any:
        return derive_key(op.body, impl=impl, start=key, coordinates={op.counter: i})

    repeated: Any = jax.lax.fori_loop(np.uint32(0), as_uint32(op.index), turn, key)
    return repeated


def derive_base_keys(
    plan: KeyPlan, *, seeds: Mapping[str, int | Int[Array, ""]]
) -> dict[str, Key[Array, ""]]:
    """The key that each stream of the compiled program starts from.

    Args:
        plan: Resolved streams of this run.
        seeds: Seed of each stream; may be traced, so that one program serves all.
    """
    streams = plan.streams.values()
    return {
        s.name: derive_key(
            (replace(s.base[0], value=seeds[s.name]), *s.base[1:]), impl=plan.impl
        )
        for s in streams
        if s.spec.kind is StreamKind.JAX
    }


def is_key(leaf: Any) -> bool:
    """Whether an array, or the shape of one, holds typed keys."""
    return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def key_shape(impl: str) -> Any:
    """Shape and dtype of one key."""
    return jax.eval_shape(lambda: jax.random.key(0, impl=impl))


def base_key_words(plan: KeyPlan) -> dict[str, list[int]]:
    """`key_words` of each stream's base key, by one compiled program.

    It is compiled once for all seeds: the lanes of a sweep ask for theirs, too.
    """
    streams = [s for s in plan.streams.values() if s.spec.kind is StreamKind.JAX]
    bases = tuple((s.name, (replace(s.base[0], value=0), *s.base[1:])) for s in streams)
    seeds = {stream.name: np.uint32(stream.seed) for stream in streams}
    words = jax.device_get(_base_words(seeds, impl=plan.impl, bases=bases))
    return {name: w.ravel().tolist() for name, w in words.items()}


@partial(jax.jit, static_argnames=("impl", "bases"))
def _base_words(
    seeds: Mapping[str, Any], *, impl: str, bases: tuple[tuple[str, Any], ...]
) -> dict[str, Array]:
    seeded = {n: (replace(ops[0], value=seeds[n]), *ops[1:]) for n, ops in bases}
    return {
        n: jax.random.key_data(derive_key(ops, impl=impl)) for n, ops in seeded.items()
    }


def make_rngs(
    plan: KeyPlan,
    *,
    phase: Phase,
    names: Iterable[str],
    coordinates: frozenset[str],
    steps_per_epoch: int,
) -> Callable[..., tuple[dict[str, Key[Array, ""]], dict[str, Key[Array, ""]]]]:
    """Makes the function that derives the `rngs` of one call of the model.

    Args:
        plan: Resolved streams of this run.
        phase: Phase of the call.
        names: Streams that it is given.
        coordinates: Those that the phase has, axes of the mesh too; others are not
            folded in.
        steps_per_epoch: Number of steps in an epoch.

    Returns:
        (base keys, carried keys, step, microbatch) to the `rngs`, and the carried
        keys of the step after. Without carried keys they are computed from `step`.
    """
    streams = {name: plan.stream(name) for name in names}
    axes = coordinates - frozenset(Coordinate)

    def rngs(
        keys: Mapping[str, Any], carried: Mapping[str, Any], step: Any, microbatch: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        at: dict[str, Any] = {
            Coordinate.STEP: step,
            Coordinate.EPOCH: step // steps_per_epoch,
            Coordinate.MICROBATCH: microbatch,
            **{axis: jax.lax.axis_index(axis) for axis in sorted(axes)},
        }
        out, carried_on = {}, dict(carried)
        for name, stream in streams.items():
            ops = stream.ops(phase, coordinates)[len(stream.base) :]
            key = keys[name]
            if name in carried:
                key, carried_on[name] = split_carry(carried[name])
                ops = ops[1:]
            out[name] = derive_key(ops, impl=plan.impl, start=key, coordinates=at)
        return out, carried_on

    return rngs


def split_carry(key: Key[Array, ""]) -> tuple[Key[Array, ""], Key[Array, ""]]:
    """This step's key and the one to carry on: `key, next = split(key)`."""
    pair: Any = jax.random.split(key)
    return pair[0], pair[1]


def advance_carry(key: Key[Array, ""], steps: int | Int[Array, ""]) -> Key[Array, ""]:
    """The key that is carried into step `steps`."""
    carried: Any = jax.lax.fori_loop(0, steps, lambda _, k: split_carry(k)[1], key)
    return carried


def key_words(key: Key[Array, ""]) -> list[int]:
    """`jax.random.key_data` as a list of unsigned 32-bit words."""
    return [int(word) for word in np.asarray(jax.random.key_data(key)).ravel()]


def host_words(stream: Stream) -> list[int | str]:
    """Spawn key of a host stream; `epoch` stands for the number of the epoch."""
    per_epoch = Coordinate.EPOCH in stream.spec.per
    return [name_id(stream.name), *(["epoch"] if per_epoch else [])]


def host_generator(stream: Stream, *, epoch: int = 0) -> np.random.Generator:
    """Generator of a host stream for one epoch.

    Generator(Philox(SeedSequence(seed, spawn_key=(id(name), epoch))))

    A stream that is not `per: [epoch]` has (id(name),) as its spawn key.
    """
    spawn_key = [epoch if isinstance(w, str) else w for w in host_words(stream)]
    sequence = np.random.SeedSequence(stream.seed, spawn_key=spawn_key)
    return np.random.Generator(np.random.Philox(sequence))


@contextlib.contextmanager
def rng_flags(rng: RngSpec) -> Iterator[None]:
    """Sets JAX's and Flax's generator flags, as `rng` says, for a while.

    One thread at a time: Flax's flag is the process's, not the thread's, and another
    value while a lane is traced would be other keys.
    """
    separator = flax.config.temp_flip_flag("fix_rng_separator", rng.fix_separator)
    partitionable = jax.threefry_partitionable(rng.partitionable)
    impl = jax.default_prng_impl(str(rng.impl))
    with _FLAGS, separator, partitionable, impl:
        yield


def draw_canary(impl: str) -> dict[str, str]:
    """Fixed draws of a fixed key as hex: tells a changed generator from a program."""
    draws = jax.device_get(_draw_all(np.uint32(20), impl=impl))
    return {name: values.tobytes().hex() for name, values in draws.items()}


@partial(jax.jit, static_argnames="impl")  # one by one, they compile twice as long
def _draw_all(seed: Any, *, impl: str) -> dict[str, Array]:
    key = jax.random.key(seed, impl=impl)
    return {
        "bits": jax.random.bits(key, (4,)),
        "uniform": jax.random.uniform(key, (4,)),
        "normal": jax.random.normal(key, (4,)),
        "permutation": jax.random.permutation(key, 8),
    }
