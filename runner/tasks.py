# SPDX-License-Identifier: Apache-2.0
"""What a model is trained for: a loss and metrics for each row of a batch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Num

from runner.errors import ConfigError
from runner.spec import ClassificationSpec, ProbeSpec, TaskSpec

__all__ = ["Task", "make_task"]

Hypers = Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """Pure functions of one task; all return a value for each row (a probe's: one).

    Args:
        loss: (outputs, targets, hypers) to the loss that is trained on.
        metrics: (outputs, targets) to the metrics; `loss` is the plain loss, without
            label smoothing, that evaluations report.
        check: (outputs, targets, classes) raises ConfigError where a model's outputs
            don't fit the targets; `classes` is None for targets that aren't labels.
    """

    loss: Callable[[Array, Array, Hypers], Float[Array, " rows"]]
    metrics: Callable[[Array, Array], dict[str, Float[Array, " rows"]]]
    check: Callable[[Any, np.ndarray, int | None], None]


def make_task(spec: TaskSpec) -> Task:
    """The functions of the declared task."""
    if isinstance(spec, ClassificationSpec):
        return Task(_smooth_entropy, _class_metrics, _check_logits)
    if isinstance(spec, ProbeSpec):
        return _make_probe_task(spec)
    return Task(
        lambda outputs, targets, _: _squared_error(outputs, targets),
        _value_metrics,
        _check_values,
    )


def _smooth_entropy(
    logits: Float[Array, "rows classes"], labels: Array, hypers: Hypers
) -> Float[Array, " rows"]:
    """Cross-entropy with smoothed labels (Szegedy et al. 2016, section 7).

    (1 - s) * -log p[label]  +  s * mean over classes of -log p
    """
    smoothing = hypers["task.label_smoothing"]
    losses = -jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(losses, labels[:, None], axis=-1)[:, 0]
    return (1 - smoothing) * chosen + smoothing * losses.mean(axis=-1)


def _class_metrics(logits: Array, labels: Array) -> dict[str, Float[Array, " rows"]]:
    losses = -jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(losses, labels[:, None], axis=-1)[:, 0]
    right = jnp.argmax(logits, axis=-1) == labels
    return {"loss": chosen, "accuracy": right.astype(jnp.float32)}


def _value_metrics(outputs: Array, targets: Array) -> dict[str, Float[Array, " rows"]]:
    error = jnp.abs(_as_rows(outputs) - _as_rows(targets))
    return {"loss": _squared_error(outputs, targets), "mae": error.mean(axis=-1)}


def _squared_error(outputs: Array, targets: Array) -> Float[Array, " rows"]:
    return jnp.square(_as_rows(outputs) - _as_rows(targets)).mean(axis=-1)


def _as_rows(values: Num[Array, "rows ..."]) -> Float[Array, "rows values"]:
    return values.reshape(values.shape[0], -1).astype(jnp.float32)


def _check_logits(outputs: Any, targets: np.ndarray, classes: int | None) -> None:
    if classes is None:
        raise ConfigError(
            "task.name",
            "classification needs integer labels",
            got=f"targets of type {targets.dtype}",
            fix="Set task=regression",
        )
    if targets.ndim != 1:
        raise ConfigError(
            "data",
            "classification needs one label for each row",
            got=f"targets of shape {targets.shape}",
            fix="Save them with shape (rows,)",
        )
    shape = getattr(outputs, "shape", None)
    if shape is None or len(shape) != 2 or shape[1] < classes:
        raise ConfigError(
            "model",
            f"must return logits of shape (rows, at least {classes} classes)",
            got=shape if shape is not None else type(outputs).__name__,
            fix=f"Give its last layer {classes} features",
        )


def _check_values(outputs: Any, targets: np.ndarray, _: int | None) -> None:
    shape = getattr(outputs, "shape", None)
    want = int(np.prod(targets.shape[1:], dtype=int))
    if not shape or int(np.prod(shape[1:], dtype=int)) != want:
        raise ConfigError(
            "model",
            f"must return {want} value{'s' * (want != 1)} for each row",
            got=shape if shape is not None else type(outputs).__name__,
            fix=f"Give its last layer {want} feature{'s' * (want != 1)}",
        )


def _make_probe_task(spec: ProbeSpec) -> Task:
    """The loss of a probe, one for all that the model returns.

    squared_error: mean((targets - outputs)^2)
    cross_entropy: mean(-log_softmax(outputs)[targets])
    """
    of_labels = spec.loss == "cross_entropy"

    def loss(outputs: Array, targets: Array, _: Hypers) -> Float[Array, ""]:
        if of_labels:
            entropy = optax.softmax_cross_entropy_with_integer_labels
            mean: Float[Array, ""] = entropy(outputs, targets).mean()
            return mean
        return jnp.mean((targets - outputs) ** 2)

    def check(outputs: Any, targets: np.ndarray, _: int | None) -> None:
        shape = getattr(outputs, "shape", None)
        if of_labels and targets.dtype != np.int32:
            got = f"targets of type {targets.dtype}"
            raise ConfigError("task.targets", "must be integer labels", got=got)
        wanted = shape[:-1] if of_labels and shape else shape
        if wanted != targets.shape:
            what = "have a label for each row of logits"
            raise ConfigError(
                "task.targets",
                f"must {what if of_labels else 'be of the shape of the outputs'}",
                got=f"targets of shape {targets.shape}",
                allowed=f"The model returns {shape or type(outputs).__name__}",
            )

    return Task(loss, lambda *_: {}, check)
