# SPDX-License-Identifier: Apache-2.0
"""How many keys come out of each lift: counted here by looking at the keys."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner.compile import compile_run
from runner.ledger import expand, make_ledger
from runner.lift_keys import count_lift_keys
from runner.spec import parse_spec

SPLIT = {"params": True, "dropout": True}
SHARED = {"params": True, "dropout": False}
BLOCK = {"_target_": "models.ResidualMLPBlock", "dropout_rate": 0.5}
Rows = dict[tuple[str, str], dict[str, Any]]


def scan(module: Any, *, length: int = 3, **fields: Any) -> dict[str, Any]:
    axes = {"variable_axes": {"params": 0}, "split_rngs": SPLIT}
    return {"lift": "scan", "module": module, "length": length, **axes, **fields}


def vmap(module: Any, **fields: Any) -> dict[str, Any]:
    axes = {"variable_axes": {"params": 0}, "split_rngs": SPLIT}
    return {"lift": "vmap", "module": module, **axes, **fields}


def lift(kind: str, module: Any, **fields: Any) -> dict[str, Any]:
    return {"lift": kind, "module": module, **fields}


@pytest.fixture
def probe(compose_config: Any) -> Callable[[Any], Any]:
    """A program that calls a model once with four rows of two."""

    def probe(model: Any) -> Any:
        config = compose_config("+experiment=lift/scan_split")
        config["task"] |= {"inputs": [{"ones": [4, 2]}], "mode": "train"}
        config["rng"]["streams"] = {
            "params": {"phases": ["init"]},
            "dropout": {"phases": ["train"], "per": ["step"]},
        }
        return compile_run(
            parse_spec({**config, "model": model, "trusted": ["lab_of_lift_keys"]})
        )

    return probe


def rows(program: Any) -> Rows:
    """By phase and axis."""
    counted = count_lift_keys(program)
    found = {(row["phase"], row["axis"]): row for row in counted}
    assert len(found) == len(counted)
    return found


def keys(row: dict[str, Any]) -> dict[str, Any]:
    """Keys and rule of each stream."""
    return {s["stream"]: (s["keys"], s["rule"]) for s in row["streams"]}


def test_a_row_says_all(probe: Any) -> None:
    found = count_lift_keys(probe({**scan(BLOCK), "name": "layers"}))
    assert found == [
        {
            "phase": phase,
            "lift": "scan",
            "path": [],
            "axis": "scan",
            "streams": [{"stream": stream, "keys": 3, "rule": "split"}],
            "note": "",
        }
        for phase, stream in (("init", "params"), ("train", "dropout"))
    ]
    json.dumps(found)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (scan(BLOCK, split_rngs=SHARED), {"scan": (1, "shared")}),
        (vmap(BLOCK), {"vmap": (4, "split")}),
        (vmap(BLOCK, split_rngs=SHARED), {"vmap": (1, "shared")}),
        (lift("remat", BLOCK), {"remat": (1, "passed")}),
        (lift("jit", BLOCK), {"jit": (1, "passed")}),
        (
            scan(lift("remat", BLOCK)),
            {"scan": (3, "split"), "remat": (1, "passed")},
        ),
        (
            vmap(scan(lift("jit", lift("remat", BLOCK)), length=5)),
            {
                "vmap": (4, "split"),
                "scan": (5, "split"),
                "jit": (1, "passed"),
                "remat": (1, "passed"),
            },
        ),
        (
            scan(scan(BLOCK, length=2, split_rngs=SHARED)),
            {"scan": (3, "split"), "scan#2": (1, "shared")},
        ),
        (
            scan(scan(BLOCK, length=2), split_rngs=SHARED),
            {"scan": (1, "shared"), "scan#2": (2, "split")},
        ),
    ],
    ids=[
        *("scan-shared", "vmap", "vmap-shared", "remat", "jit", "scan-remat"),
        *("vmap-scan-jit-remat", "scan-scan-shared", "scan-shared-scan"),
    ],
)
def test_keys_of_each_lift(probe: Any, model: Any, expected: Any) -> None:
    program = probe(model)
    found = rows(program)
    trained = {axis: row for (phase, axis), row in found.items() if phase == "train"}
    assert {axis: keys(row)["dropout"] for axis, row in trained.items()} == expected
    assert list(trained) == list(expected)  # outermost first
    drawn = [d for d in make_ledger(program)["draws"] if d["phase"] == "train"]
    assert distinct(program, drawn) == product(n for n, _ in expected.values())


def distinct(program: Any, draws: list[dict[str, Any]]) -> int:
    """How many keys a ledger's draws have at step 0."""
    ledger = make_ledger(program)
    entries = [entry for draw in draws for entry in expand(ledger, draw, step=0)]
    return len({tuple(entry["key"]) for entry in entries})


def product(numbers: Any) -> int:
    total = 1
    for number in numbers:
        total *= number
    return total


def test_notes_say_what_has_no_index(probe: Any) -> None:
    found = rows(probe(lift("jit", lift("remat", scan(BLOCK)))))
    notes = {axis: row["note"] for (_, axis), row in found.items()}
    assert notes == {
        "jit": "forks every stream: other keys than without it",
        "remat": "changes no key",
        "scan": "",
    }


@pytest.mark.parametrize("split", [True, False])
def test_keys_of_a_while_loop(probe: Any, split: bool) -> None:
    found = rows(probe({"_target_": "lab_of_lift_keys.Turns", "split": split}))
    expected = (3, "split") if split else (1, "shared")
    assert keys(found["train", "while"]) == {"dropout": expected}
    assert found["train", "while"]["lift"] == "while_loop"
    assert (
        found["train", "while"]["note"] == "a key that is split is folded with the turn"
    )


def test_a_loop_of_unknown_length_has_unknown_keys(probe: Any) -> None:
    found = rows(
        probe({"_target_": "lab_of_lift_keys.Turns", "split": True, "known": False})
    )
    assert keys(found["train", "while"]) == {"dropout": (None, "split")}


@pytest.fixture(autouse=True)
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's package with a loop of three turns."""
    text = """
import flax.linen as nn
import jax


class Turns(nn.Module):
    split: bool
    known: bool = True

    @nn.compact
    def __call__(self, x):
        last = 3 if self.known else x.sum()

        def body(module, carry):
            key = module.make_rng("dropout")
            return carry[0] + 1, carry[1] + jax.random.normal(key, x.shape)

        if self.is_initializing():
            return x
        more, split = lambda _, carry: carry[0] < last, {"dropout": self.split}
        return nn.while_loop(more, body, self, (0, x), split_rngs=split)[1]
"""
    (tmp_path / "lab_of_lift_keys.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)


def test_no_lift_no_row(make_spec: Any) -> None:
    assert count_lift_keys(compile_run(make_spec("optimizer=sgd"))) == []
