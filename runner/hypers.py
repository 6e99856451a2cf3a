# SPDX-License-Identifier: Apache-2.0
"""Numbers of the config that enter the program as inputs, so that none is baked in.

A number is named by its config path (`optimizer.learning_rate`). Those that people
sweep and that enter a program as factors or bounds are candidates; a candidate that
the program needs as a constant (a Python `if` on it, say) stays one, as
`runner.compile` finds out by tracing. Other numbers (`b1`, `epsilon`, `momentum`)
stay constants, since 1 - b1 rounds otherwise in float32 than in Python, and a
program written by hand has the latter.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from runner.parse import Frozen
from runner.spec import ClassificationSpec, RunSpec

__all__ = ["OF_TRAIN", "SWEPT", "find_hypers", "insert_hypers"]

OF_TRAIN = ("clip_norm", "max_norm", "l1", "l2")  # under `train`, where they are set

SWEPT = frozenset(
    {
        "dropout_rate",
        "init_value",
        "learning_rate",
        "peak_value",
        "rate",
        "scale",
        "weight",
        "weight_decay",
    }
)


def find_hypers(spec: RunSpec) -> dict[str, float]:
    """The candidates of a run and their values, by config path."""
    found = {**_in_node("model", spec.model), **_in_node("optimizer", spec.optimizer)}
    if isinstance(spec.task, ClassificationSpec):
        found["task.label_smoothing"] = spec.task.label_smoothing
    for name in OF_TRAIN:
        if (value := getattr(spec.train, name)) is not None:
            found[f"train.{name}"] = value
    return found


def insert_hypers(node: Any, hypers: Mapping[str, Any], *, path: str) -> Any:
    """A config node with the values of `hypers` in their places."""
    if path in hypers:
        return hypers[path]
    if isinstance(node, Mapping):
        return Frozen(
            {k: insert_hypers(v, hypers, path=f"{path}.{k}") for k, v in node.items()}
        )
    if isinstance(node, tuple):
        return tuple(
            insert_hypers(v, hypers, path=f"{path}[{i}]") for i, v in enumerate(node)
        )
    return node


def _in_node(path: str, node: Mapping[str, Any]) -> dict[str, float]:
    inner = {"model": "module", "optimizer": "transform"}[path]
    if not {"_target_", "lift"} & set(node) and inner in node:
        path, node = f"{path}.{inner}", node[inner]
    return dict(_walk(path, node))


def _walk(path: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        if value.get("lift") == "jit" and "_target_" not in value:
            return  # Flax hashes the fields of a module under nn.jit
        for key, child in value.items():
            is_number = isinstance(child, int | float) and not isinstance(child, bool)
            if key in SWEPT and is_number:
                yield f"{path}.{key}", float(child)
            if not str(key).endswith(
                ("_init", "init_fn")
            ):  # an initializer's numbers stay
                yield from _walk(f"{path}.{key}", child)
    elif isinstance(value, tuple):
        for i, child in enumerate(value):
            yield from _walk(f"{path}[{i}]", child)
