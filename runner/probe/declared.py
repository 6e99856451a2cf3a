# SPDX-License-Identifier: Apache-2.0
"""The arrays that a probe declares: made by NumPy on the host, or from a key."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, Shaped

from runner.audit.trace import Draw, Use
from runner.inputs import InputSpec
from runner.keys import KeyPlan, host_generator
from runner.spec import ProbeSpec, StreamKind

__all__ = ["draw_arrays", "host_uses", "list_legacy_draws", "make_arrays"]

Source = np.random.Generator | np.random.RandomState

_LEGACY = "drawn by NumPy's legacy generator, in the order of the inputs"


def make_arrays(task: ProbeSpec, plan: KeyPlan) -> tuple[np.ndarray, ...]:
    """The declared arrays, targets last; zeros for those of a jax stream.

    Arrays of one host stream follow each other in it, in the order declared, and so
    do those of one `legacy_seed`.
    """
    sources: dict[str | int, Source] = {}
    arrays = []
    for spec in task.arrays.values():
        source = None
        if spec.legacy_seed is not None:
            seed = spec.legacy_seed
            source = sources.setdefault(seed, np.random.RandomState(seed))
        elif spec.stream is not None and not _is_of_jax(spec, plan):
            generator = host_generator(plan.stream(spec.stream))
            source = sources.setdefault(spec.stream, generator)
        values = _values(spec, source) if source or not spec.is_drawn else None
        dtype = jnp.dtype(spec.type_name)
        made = np.zeros(spec.shape) if values is None else np.asarray(values)
        arrays.append(made.astype(dtype))
    return tuple(arrays)


def _values(spec: InputSpec, source: Source | None) -> Any:
    if spec.kind == "values":
        return spec.values
    if spec.kind == "arange":
        return np.arange(spec.arange or 0)
    if source is None:
        return np.full(spec.shape, spec.kind == "ones")
    if spec.kind == "uniform":
        return source.uniform(size=spec.shape)
    if spec.kind == "normal":
        return source.standard_normal(size=spec.shape)
    if isinstance(source, np.random.RandomState):
        return source.randint(spec.low or 0, spec.high, size=spec.shape)
    return source.integers(spec.low or 0, spec.high, size=spec.shape)


def draw_arrays(
    task: ProbeSpec, plan: KeyPlan, *, keys: Mapping[str, Any], arrays: Any
) -> tuple[Any, ...]:
    """The arrays, with those of jax streams drawn from their streams' base keys."""
    return tuple(
        _draw(spec, keys[str(spec.stream)]) if _is_of_jax(spec, plan) else array
        for spec, array in zip(task.arrays.values(), arrays, strict=True)
    )


def _draw(spec: InputSpec, key: Key[Array, ""]) -> Shaped[Array, "..."]:
    if spec.kind == "randint":
        return jax.random.randint(key, spec.shape, spec.low or 0, spec.high or 0)
    draw = {"uniform": jax.random.uniform, "normal": jax.random.normal}[spec.kind]
    return draw(key, spec.shape, jnp.dtype(spec.type_name))


def host_uses(task: ProbeSpec, plan: KeyPlan) -> dict[str, tuple[str, ...]]:
    """Config paths that draw from each host stream."""
    uses: dict[str, tuple[str, ...]] = {}
    for path, spec in task.arrays.items():
        if spec.stream is not None and not _is_of_jax(spec, plan):
            uses[spec.stream] = (*uses.get(spec.stream, ()), path)
    return uses


def list_legacy_draws(task: ProbeSpec) -> Iterator[Draw]:
    """The draws of arrays with a `legacy_seed`: from no declared stream."""
    for spec in task.arrays.values():
        if spec.legacy_seed is not None:
            use = Use(f"numpy.random.{spec.kind}", spec.shape, 64)
            yield Draw(None, (), (), None, (), use, _LEGACY)


def _is_of_jax(spec: InputSpec, plan: KeyPlan) -> bool:
    name = spec.stream
    return name is not None and plan.stream(name).spec.kind is StreamKind.JAX
