# SPDX-License-Identifier: Apache-2.0
"""What the files of a record hold, field by field: checked once, when they are read.

A shape is a type, None, a set of choices, a `Range` of integers, `[shape]` of any
length, `{name: shape}` (a name that ends in `?` may be absent, others may be there),
an `Each(shape)` under any names, `ANY`, or a tuple of shapes of which one fits.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from runner.errors import RecordError
from runner.spec import Coordinate, Derive, Impl, Phase, StreamKind

__all__ = [
    "CHECKPOINT",
    "LEDGER",
    "MANIFEST",
    "check_shape",
]


@dataclass(frozen=True)
class Range:
    """An integer from `low` to `high`, both included."""

    low: int
    high: int


@dataclass(frozen=True)
class Each:
    """A mapping of any names to values of one shape."""

    shape: Any


ANY = object()
_STEP = Range(0, 2**31 - 1)
_COUNT = Range(1, 2**31 - 1)
_WORDS = [Range(0, 2**32 - 1)]
_SCALAR = (None, bool, int, float, str)
_NUMBER = (None, int, float)
_DIGEST = (None, str)
_OPEN = (int, {"offset": int, "axes": Each(int)})  # a number, or one of axes

MANIFEST: Mapping[str, Any] = {
    "schema": int,
    "run_id": str,
    "status": {"running", "completed", "failed", "interrupted"},
    "reason": str,
    "experiment": str,
    "started": str,
    "ended?": (None, str),
    "steps": _STEP,
    "seconds?": _NUMBER,
    "seed": int,
    "versions": Each(str),
    "platform": {
        "backend": str,
        "device_kind": str,
        "device_count": int,
        "process_count": int,
        "xla_flags": str,
        "jax_config?": Each(_SCALAR),
        "environment?": Each(str),
        "autotune?": (None, Each((None, str))),
    },
    "git": {"commit": (None, str), "dirty": (None, bool)},
    "rng": {
        "impl": set(map(str, Impl)),
        "partitionable": bool,
        "fix_separator": bool,
        "canary": Each(str),
    },
    "guarantee": {"level": str, "reasons": [str]},
    "hazards": [{"code": str, "severity": str, "what": str, "path": str, "fix": str}],
    "construct": str,
    "inputs?": Each(ANY),
    "constants?": [str],
    "digests": {
        "config": str,
        "keys": str,
        "data": _DIGEST,
        "params": _DIGEST,
        "metrics": _DIGEST,
        "states?": _DIGEST,
        "outputs?": _DIGEST,
    },
    "metrics": Each(_NUMBER),
    "best?": (None, {"value": _NUMBER, "step": _STEP}),
    "observed?": (None, {"status": str, "draws": int, "keys": int}),
    "parent?": (None, {"run_id": str, "verb": str}),
    "resumed?": [{"step": _STEP, "at": str, "was": str}],
    "sweep": (None, Each(_SCALAR)),
}

_OP: dict[str, Any] = {
    "op": {"seed", "fold_in", "split", "carry", "repeat"},
    "value?": _OPEN,
    "coordinate?": set(map(str, Coordinate)),
    "index?": (*_OPEN, str),
    "of?": Range(1, 2**24),  # a split makes all of them
    "times?": (*_OPEN, str),
    "counter?": str,
    "why?": str,
}
_OP["body?"] = [_OP]

LEDGER: Mapping[str, Any] = {
    "schema": int,
    "experiment": str,
    "rng": {
        "seed": int,
        "impl": set(map(str, Impl)),
        "partitionable": bool,
        "fix_separator": bool,
    },
    "sizes": {
        "steps": _STEP,
        "steps_per_epoch": _COUNT,
        "microbatches": _COUNT,
        "eval_batches": _COUNT,
        "eval_every": (None, _COUNT),
    },
    "streams": [
        {
            "name": str,
            "kind": set(map(str, StreamKind)),
            "seed": (None, int),
            "derive": set(map(str, Derive)),
            "phases": [set(map(str, Phase))],
            "per": Each(str),
            "used_by?": [str],
            "spawn_key?": [(int, str)],
            "derivation?": [_OP],
            "key?": _WORDS,
        }
    ],
    "draws": [
        {
            "phase": set(map(str, Phase)),
            "stream": (None, str),
            "path": [str],
            "call": (None, int),
            "axes": Each(_COUNT),
            "uses": [
                {"primitive": str, "shape": [Range(0, 2**63 - 1)], "bits": (None, int)}
            ],
            "conditional?": bool,
            "untraced?": str,
            "derivation?": [_OP],
        }
    ],
}

CHECKPOINT: Mapping[str, Any] = {
    "run_id": str,
    "step": _STEP,
    "objective": _NUMBER,
    "written": {
        "metrics": {"size": Range(0, 2**63 - 1), "sha256": str},
        "states": {"size": Range(0, 2**63 - 1), "sha256": str},
    },
    "files": Each(str),
    "digest": str,
}


def check_shape(value: Any, shape: Any, *, name: str) -> None:
    """Refuses a value of another shape, and says where.

    Args:
        value: Plain data.
        shape: As above.
        name: What to call the value in messages.

    Raises:
        RecordError: it has not that shape.
    """
    for path, why in _misfits(value, shape, ""):
        where = f" ({path} {why})" if path else f" ({why})"
        raise RecordError(f"{name} is damaged{where}.")


def _misfits(value: Any, shape: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yields each place that does not fit, and what should be there."""
    if isinstance(shape, tuple):
        if not any(_fits(value, each) for each in shape):
            yield path, f"is no {' or '.join(map(_spell, shape))}"
    elif isinstance(shape, Mapping):
        yield from _misfits_of_fields(value, shape, path)
    elif isinstance(shape, Each | list) and _fits(value, _container(shape)):
        inner = shape.shape if isinstance(shape, Each) else shape[0]
        items = value.items() if isinstance(shape, Each) else enumerate(value)
        for key, child in items:
            yield from _misfits(child, inner, _join(path, key))
    elif not _fits(value, _container(shape)):
        yield path, f"is no {_spell(_container(shape))}"


def _misfits_of_fields(
    value: Any, shape: Mapping[str, Any], path: str
) -> Iterator[tuple[str, str]]:
    if type(value) is not dict:
        yield path, "is no dict"
        return
    for field, inner in shape.items():
        name = field.removesuffix("?")
        if name in value:
            yield from _misfits(value[name], inner, _join(path, name))
        elif name == field:
            yield _join(path, name), "is missing"


def _fits(value: Any, shape: Any) -> bool:
    if shape is ANY or shape is None:
        return shape is ANY or value is None
    if isinstance(shape, set):
        return isinstance(value, str) and value in shape
    if isinstance(shape, Range):
        return type(value) is int and shape.low <= value <= shape.high
    if isinstance(shape, type):
        return type(value) is shape
    return next(_misfits(value, shape, ""), None) is None


def _container(shape: Any) -> Any:
    if isinstance(shape, Each | Mapping):
        return dict
    return list if isinstance(shape, list) else shape


def _spell(shape: Any) -> str:
    if isinstance(shape, set):
        return "one of " + ", ".join(sorted(shape))
    if isinstance(shape, Range):
        return f"integer from {shape.low} to {shape.high}"
    shape = _container(shape)
    return "null" if shape is None else str(shape.__name__)


def _join(path: str, key: Any) -> str:
    if isinstance(key, int):
        return f"{path}[{key}]"
    return f"{path}.{key}" if path else str(key)
