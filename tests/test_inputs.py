# SPDX-License-Identifier: Apache-2.0
"""Declared arrays: what they may say, and what becomes of them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from runner.errors import ConfigError
from runner.inputs import InputSpec, check_input
from runner.keys import derive_base_keys, plan_keys
from runner.parse import build_dataclass, to_plain
from runner.probe.declared import draw_arrays, host_uses, list_legacy_draws, make_arrays
from runner.spec import ProbeSpec, RngSpec

STREAMS = {
    "a": {"phases": ["init"]},
    "b": {"phases": ["init"], "seed": 5},
    "host": {"kind": "host"},
    "other": {"kind": "host"},
}


def parse(value: Any) -> InputSpec:
    spec = build_dataclass(InputSpec, value, path="x")
    check_input(spec, path="x")
    return spec


def make(*inputs: Any) -> list[np.ndarray]:
    """The arrays as the program has them."""
    task = build_dataclass(ProbeSpec, {"inputs": list(inputs)})
    plan = plan_keys(build_dataclass(RngSpec, {"streams": STREAMS}))
    seeds = {name: stream.seed for name, stream in plan.streams.items()}
    keys = derive_base_keys(plan, seeds=seeds)
    made = make_arrays(task, plan)
    return [np.asarray(a) for a in draw_arrays(task, plan, keys=keys, arrays=made)]


FIXED = [
    ({"ones": [3, 2]}, jnp.ones((3, 2))),
    ({"ones": []}, jnp.ones(())),
    ({"zeros": [2], "dtype": "int32"}, jnp.zeros(2, jnp.int32)),
    ({"zeros": [2], "dtype": "bool"}, jnp.zeros(2, bool)),
    ({"ones": [2], "dtype": "bfloat16"}, jnp.ones(2, jnp.bfloat16)),
    ({"values": 0}, jnp.int32(0)),
    ({"values": [[1, 2], [3, 4]]}, jnp.array([[1, 2], [3, 4]])),
    ({"values": [1, 2.5]}, jnp.array([1, 2.5])),
    ({"values": [1, 2], "dtype": "float32"}, jnp.array([1.0, 2.0])),
    ({"values": [True, False]}, jnp.array([True, False])),
    ({"arange": 4}, jnp.arange(4)),
    ({"arange": 4, "dtype": "float32"}, jnp.arange(4.0)),
]


@pytest.mark.parametrize(("declared", "array"), FIXED, ids=str)
def test_fixed_arrays(declared: Any, array: Any) -> None:
    (made,) = make(declared)
    assert (made.dtype, made.shape) == (array.dtype, array.shape)
    assert made.tobytes() == np.asarray(array).tobytes()
    spec = parse(declared)
    assert build_dataclass(InputSpec, to_plain(spec)) == spec
    assert hash(spec) == hash(parse(declared))


def test_arrays_of_jax_streams() -> None:
    made = make(
        {"normal": [2, 3], "stream": "b"},
        {"uniform": [4], "stream": "b", "dtype": "bfloat16"},
        {"randint": [5], "low": -3, "high": 3, "stream": "b"},
    )
    key = jax.random.key(5)
    by_hand = [
        jax.random.normal(key, (2, 3)),
        jax.random.uniform(key, (4,), jnp.bfloat16),
        jax.random.randint(key, (5,), -3, 3),
    ]
    for ours, theirs in zip(made, by_hand, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.tobytes() == np.asarray(theirs).tobytes()


def test_arrays_of_a_host_stream_follow_each_other() -> None:
    parts = make(
        {"uniform": [2], "stream": "host"},
        {"normal": [2], "stream": "other"},
        {"uniform": [3], "stream": "host"},
        {"randint": [2], "low": 0, "high": 9, "stream": "host"},
    )
    (whole,) = make({"uniform": [5], "stream": "host"})
    assert np.concatenate([parts[0], parts[2]]).tobytes() == whole.tobytes()
    assert [part.dtype for part in parts] == [np.float32] * 3 + [np.int32]
    (alone,) = make({"normal": [2], "stream": "other"})
    assert parts[1].tobytes() == alone.tobytes()


def test_legacy_arrays_share_a_state() -> None:
    made = make(
        {"normal": [2], "legacy_seed": 3},
        {"uniform": [], "legacy_seed": 4},
        {"randint": [2], "low": 0, "high": 9, "legacy_seed": 3},
    )
    state = np.random.RandomState(3)
    assert made[0].tobytes() == state.standard_normal(2).astype(np.float32).tobytes()
    assert made[2].tobytes() == state.randint(0, 9, 2).astype(np.int32).tobytes()
    assert made[1] == np.float32(np.random.RandomState(4).uniform())


def test_what_draws_is_told() -> None:
    inputs = [
        {"uniform": [2], "stream": "host"},
        {"uniform": [2], "legacy_seed": 3},
        {"uniform": [2], "stream": "a"},
        {"uniform": [2], "stream": "host"},
    ]
    targets = {"normal": [2], "stream": "other"}
    task = build_dataclass(ProbeSpec, {"inputs": inputs, "targets": targets})
    plan = plan_keys(build_dataclass(RngSpec, {"streams": STREAMS}))
    assert host_uses(task, plan) == {
        "host": ("task.inputs[0]", "task.inputs[3]"),
        "other": ("task.targets",),
    }
    (draw,) = list_legacy_draws(task)
    assert draw.stream is None
    assert draw.untraced


BAD = [
    ({}, "x: must have exactly one word that says what it holds (got {})"),
    ({"ones": [1], "arange": 2}, "x: must have exactly one word"),
    ({"ones": [0]}, "x.ones[0]: out of range (got 0)"),
    ({"ones": 3}, "x.ones: must be a list (got 3)"),
    ({"ones": [1.5]}, "x.ones[0]: must be an integer (got 1.5)"),
    ({"arange": 0}, "x.arange: out of range (got 0)"),
    ({"values": [[1, 2], [3]]}, "x.values: its lists must be of one length"),
    ({"values": [1, [2]]}, "x.values: its lists must be of one length"),
    ({"values": "one"}, "x.values: must be numbers, in nested lists or alone"),
    ({"values": []}, "x.values: must be numbers"),
    ({"values": [1, None]}, "x.values: must be numbers"),
    ({"values": {"a": 1}}, "x.values: must be numbers"),
    ({"values": [1.0, float("nan")]}, "x.values[1]: must be finite"),
    ({"values": [1, True]}, "x.values: mixes truths and numbers"),
    ({"values": [2**31]}, "x.values: no int32 (got 2147483648)"),
    ({"uniform": [2]}, "x.stream: uniform is drawn from one stream (got None)"),
    (
        {"uniform": [2], "stream": "a", "legacy_seed": 1},
        "x.stream: uniform is drawn from one stream (got ['stream', 'legacy_seed'])",
    ),
    (
        {"ones": [2], "stream": "a"},
        "x.stream: ones draws nothing (got 'a'). Remove it.",
    ),
    ({"ones": [2], "legacy_seed": 1}, "x.legacy_seed: ones draws nothing (got 1)"),
    ({"uniform": [2], "stream": "a", "low": 1}, "x.low: only randint has bounds"),
    ({"randint": [2], "stream": "a"}, "x: randint needs low < high (got [None, None])"),
    (
        {"randint": [2], "stream": "a", "low": 3, "high": 3},
        "x: randint needs low < high (got [3, 3]). high is left out.",
    ),
    ({"randint": [2], "stream": "a", "low": 0, "high": 2**31}, "x.high: out of range"),
    ({"uniform": [2], "legacy_seed": -1}, "x.legacy_seed: out of range (got -1)"),
    ({"ones": [2], "dtype": "float64"}, "x.dtype: not a choice (got 'float64')"),
    (
        {"values": [1.5], "dtype": "int32"},
        "x.dtype: these values can't be of that type",
    ),
    (
        {"normal": [2], "stream": "a", "dtype": "int32"},
        "x.dtype: these normal can't be of that type (got 'int32'). "
        "Allowed: float32, bfloat16.",
    ),
    ({"one": [2]}, "x.one: unknown key (got [2])"),
]


@pytest.mark.parametrize(("declared", "message"), BAD, ids=str)
def test_refuses(declared: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(declared)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
