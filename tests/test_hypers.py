# SPDX-License-Identifier: Apache-2.0
"""Numbers of the config that enter the program as inputs."""

from typing import Any

import pytest

from runner.hypers import SWEPT, find_hypers, insert_hypers
from runner.parse import Frozen, Node, freeze
from runner.spec import RunSpec, parse_spec

LAYERS = [
    {"_target_": "models.Dropout", "rate": 0.25},
    {"_target_": "flax.linen.Dense", "features": 4},
    {"_target_": "x.Pair", "inner": [{"_target_": "models.Dropout", "rate": 0}]},
]
CHAIN = {"_target_": "models.Sequential", "layers": LAYERS}
SCHEDULE = {"_target_": "optax.constant_schedule", "init_value": 1, "decay_steps": 9}
ADAMW = {"_target_": "optax.adamw", "learning_rate": SCHEDULE, "weight_decay": 1e-4}


def spec(model: Any = CHAIN, optimizer: Any = ADAMW, **rest: Any) -> RunSpec:
    streams = {"shuffle": {"kind": "host"}, "split": {"kind": "host"}}
    rng = {"streams": streams}
    return parse_spec({"model": model, "optimizer": optimizer, "rng": rng, **rest})


FOUND = {
    "model.layers[0].rate": 0.25,
    "model.layers[2].inner[0].rate": 0.0,
    "optimizer.learning_rate.init_value": 1.0,
    "optimizer.weight_decay": 1e-4,
    "task.label_smoothing": 0.0,
}


def test_candidates_by_path() -> None:
    found = find_hypers(spec())
    assert found == FOUND
    assert {type(value) for value in found.values()} == {float}


def test_roots_that_wrap() -> None:
    """What stands beside `module` and `transform` is only there to be interpolated."""
    found = find_hypers(
        spec(
            {"dropout_rate": 0.9, "module": CHAIN},
            {"learning_rate": 9.0, "weight_decay": 8.0, "transform": ADAMW},
        )
    )
    assert found == {
        path.replace("model.", "model.module.").replace(
            "optimizer.", "optimizer.transform."
        ): value
        for path, value in FOUND.items()
    }


def test_module_that_is_an_argument_is_no_wrapper() -> None:
    model = {"_target_": "x.Wrap", "rate": 0.5, "module": LAYERS[0]}
    found = find_hypers(spec(model))
    assert found["model.rate"] == 0.5
    assert found["model.module.rate"] == 0.25


def test_bounds_of_train() -> None:
    found = find_hypers(spec(train={"clip_norm": 2, "max_norm": 3.5}))
    assert (found["train.clip_norm"], found["train.max_norm"]) == (2.0, 3.5)
    assert not {"train.clip_norm", "train.max_norm"} & set(find_hypers(spec()))


def test_regression_has_no_label_smoothing() -> None:
    assert "task.label_smoothing" not in find_hypers(spec(task={"name": "regression"}))


@pytest.mark.parametrize("value", [True, None, "0.5", [0.5]])
def test_only_numbers_are_candidates(value: Any) -> None:
    optimizer = {"_target_": "optax.adamw", "learning_rate": value, "b1": 0.9}
    assert not [p for p in find_hypers(spec(CHAIN, optimizer)) if "optimizer" in p]


def test_insert_reaches_what_find_found() -> None:
    for made in (spec(), spec({"module": CHAIN}, {"transform": ADAMW})):
        found = find_hypers(made)
        signs = {path: object() for path in found}
        trees = {name: getattr(made, name) for name in ("model", "optimizer")}
        new = {n: insert_hypers(tree, signs, path=n) for n, tree in trees.items()}
        for path, sign in signs.items():
            if path.startswith(("model", "optimizer")):
                assert at(new, path) is sign
                assert at(trees, path) == found[path]  # the spec is as it was
        assert insert_hypers(made.model, {}, path="model") == made.model


def test_insert_leaves_the_rest() -> None:
    node = Node(
        freeze({"a": {"rate": 1.0}, "b": [1, {"rate": 2.0}], "c": "x"}, path="")
    )
    new = insert_hypers(node, {"m.b[1].rate": 5, "m.absent": 6}, path="m")
    assert new == Frozen(
        {"a": Frozen({"rate": 1.0}), "b": (1, Frozen({"rate": 5})), "c": "x"}
    )


def at(tree: Any, path: str) -> Any:
    for part in path.replace("[", ".[").split("."):
        tree = tree[int(part[1:-1]) if part.startswith("[") else part]
    return tree


def test_swept_names() -> None:
    """`b1`, `momentum` and the like stay constants: 1 - b1 is taken in Python."""
    assert {"learning_rate", "weight_decay", "dropout_rate", "rate"} <= SWEPT
    assert not {"b1", "b2", "eps", "momentum", "decay"} & SWEPT
