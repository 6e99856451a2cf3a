# SPDX-License-Identifier: Apache-2.0
"""What a program costs: the compiler's own numbers, by name."""

import json
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from runner.compile import compile_run
from runner.costs import estimate_costs

FIELDS = ["flops", "bytes_accessed", "memory", "temporary"]
SMALL = ("+experiment=dropout", "optimizer=sgd", "train.steps=3")


def compiled(function: Any, *shapes: Any, **options: Any) -> Any:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function, **options).lower(*arguments).compile()


def estimate(call: Any) -> dict[str, Any]:
    return estimate_costs({"it": call})["it"]


def test_flops_of_a_product() -> None:
    """m n k multiplications and as many additions."""
    found = estimate(compiled(jnp.matmul, (4, 8), (8, 16)))
    assert list(found) == FIELDS
    assert found["flops"] == 2 * 4 * 8 * 16


def test_memory_of_arguments_and_outputs() -> None:
    found = estimate(compiled(lambda x: x + 1.0, (1024,)))
    assert found["memory"] == 2 * 4096 + found["temporary"]


def test_memory_that_is_shared_counts_once() -> None:
    """A donated argument and the output that takes its place."""
    donated = estimate(compiled(lambda x: x + 1.0, (1024,), donate_argnums=0))
    assert donated["memory"] == 4096 + donated["temporary"]


@pytest.mark.parametrize("cost", [{}, None, {"flops": -1.0}])
@pytest.mark.parametrize("memory", [None, SimpleNamespace(temp_size_in_bytes=3)])
def test_what_a_backend_does_not_say_is_null(cost: Any, memory: Any) -> None:
    call = SimpleNamespace(cost_analysis=lambda: cost, memory_analysis=lambda: memory)
    temporary = None if memory is None else 3
    assert list(estimate(call).values()) == [None, None, None, temporary]


def test_costs_of_a_run_are_those_of_its_programs(make_spec: Any) -> None:
    program = compile_run(make_spec(*SMALL))
    again = compile_run(make_spec(*SMALL))
    found = estimate_costs(program.programs)
    assert list(found) == ["setup", "train", "evaluate", "digest"]
    for name, row in found.items():
        own = again.programs[name].cost_analysis()
        assert row["flops"] == int(own["flops"])
        assert row["bytes_accessed"] == int(own["bytes accessed"])
        memory = again.programs[name].memory_analysis()
        assert row["temporary"] == memory.temp_size_in_bytes
        assert all(isinstance(n, int) and n > 0 for n in row.values())


def test_a_step_of_a_wider_model_costs_more(make_spec: Any) -> None:
    words = (*SMALL, "train.steps_per_call=1")
    narrow, wide = (
        estimate_costs(compile_run(make_spec(*words, f"model.features=[{n}]")).programs)
        for n in (8, 64)
    )
    for name in narrow:
        assert (narrow[name]["flops"] or 0) < (wide[name]["flops"] or 0)


def test_plan_has_costs_and_lifts(runner: Any) -> None:
    words = ("plan", "+experiment=deep", "model.depth=2", "model.features=8", "--json")
    document = json.loads(runner(*words).stdout)
    assert list(document["costs"]) == ["setup", "train", "evaluate", "digest"]
    for row in document["costs"].values():
        assert list(row) == FIELDS
        assert all(isinstance(n, int) and n > 0 for n in row.values())
    trained = [row for row in document["lifts"] if row["phase"] == "train"]
    streams = {row["axis"]: row["streams"] for row in trained}
    assert streams == {
        "scan:blocks": [{"stream": "dropout", "keys": 2, "rule": "split"}],
        "remat:blocks": [{"stream": "dropout", "keys": 1, "rule": "passed"}],
    }
    alone = json.loads(runner(*words, "--no-compile").stdout)
    assert alone == {**document, "costs": None}


def test_plan_prints_both(runner: Any) -> None:
    words = ("plan", "+experiment=deep", "model.depth=2", "model.features=8")
    text = runner(*words).stdout
    assert "dropout: 2 keys over scan:blocks" in text
    assert "changes no key" in text
    assert "program" in text
    assert "FLOPs" in text
    assert "FLOPs" not in runner(*words, "--no-compile").stdout


def test_plan_of_what_can_not_run_has_no_costs(runner: Any) -> None:
    words = ("plan", "+experiment=dropout", "~rng.streams.dropout", "--json")
    done = runner(*words)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [hazard["code"] for hazard in document["hazards"]] == ["R004"]
    assert document["costs"] is None
