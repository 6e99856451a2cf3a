# SPDX-License-Identifier: Apache-2.0
"""Losses and metrics against numpy and optax; outputs that don't fit the targets."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from runner.errors import ConfigError
from runner.spec import ClassificationSpec, RegressionSpec
from runner.tasks import make_task

CLASSES = make_task(ClassificationSpec())
VALUES = make_task(RegressionSpec())
LABELS = np.array([2, 3, 2, 1, 1], np.int32)


def logits() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 3, size=(5, 4)).astype(np.float32)


@pytest.mark.promotes
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5, 1.0])
def test_label_smoothing(smoothing: float, traced: bool) -> None:
    def loss(value: Any) -> Any:
        return CLASSES.loss(logits(), LABELS, {"task.label_smoothing": value})

    ours = jax.jit(loss)(smoothing) if traced else loss(smoothing)
    targets = optax.smooth_labels(jax.nn.one_hot(LABELS, 4), smoothing)
    theirs = optax.losses.softmax_cross_entropy(logits(), targets)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)
    assert ours.shape == (5,)


def test_class_metrics() -> None:
    found = CLASSES.metrics(logits(), LABELS)
    wide = logits().astype(np.float64)
    p = np.exp(wide) / np.exp(wide).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found["loss"], -np.log(p[range(5), LABELS]), rtol=1e-5)
    right = (wide.argmax(axis=1) == LABELS).astype(np.float32)
    assert found["accuracy"].tolist() == right.tolist()
    assert 0 < right.sum() < 5  # neither all nor none
    assert set(found) == set(ClassificationSpec.metrics)


def test_losses_of_sure_logits_stay_finite() -> None:
    sure = np.array([[1e4, 0.0], [0.0, 1e4]], np.float32)
    loss = CLASSES.loss(sure, np.array([0, 0]), {"task.label_smoothing": 0.0})
    assert loss.tolist() == [0.0, 1e4]


SHAPES = [((5,), (5,)), ((5, 1), (5,)), ((5,), (5, 1)), ((5, 2), (5, 2))]
SHAPES += [((5, 6), (5, 2, 3)), ((5, 2, 3), (5, 6))]


@pytest.mark.parametrize(("outputs", "targets"), SHAPES)
def test_value_metrics(outputs: tuple[int, ...], targets: tuple[int, ...]) -> None:
    """A squared error for each row, never a broadcast of rows against rows."""
    draw = np.random.default_rng(1)
    o, t = (draw.normal(size=s).astype(np.float32) for s in (outputs, targets))
    found = VALUES.metrics(jnp.asarray(o), jnp.asarray(t))
    error = o.reshape(5, -1) - t.reshape(5, -1)
    np.testing.assert_allclose(found["loss"], (error**2).mean(axis=1), rtol=1e-6)
    np.testing.assert_allclose(found["mae"], abs(error).mean(axis=1), rtol=1e-6)
    loss = VALUES.loss(jnp.asarray(o), jnp.asarray(t), {})
    assert loss.tolist() == found["loss"].tolist()
    assert loss.shape == (5,)
    assert set(found) == set(RegressionSpec.metrics)
    VALUES.check(o, t, None)


def test_whole_targets_are_values_too() -> None:
    found = VALUES.metrics(jnp.asarray([1.5, 2.0]), jnp.asarray([1, 4]))
    assert found["mae"].tolist() == [0.5, 2.0]


def shaped(*shape: int) -> Any:
    return SimpleNamespace(shape=shape)


REFUSED = [
    (CLASSES, shaped(5, 4), np.zeros(5, np.float32), None, "needs integer labels"),
    (CLASSES, shaped(5, 3), LABELS, 4, "at least 4 classes"),
    (CLASSES, shaped(5), LABELS, 4, "at least 4 classes"),
    (CLASSES, shaped(5, 1, 4), LABELS, 4, "at least 4 classes"),
    (CLASSES, (shaped(5, 4), shaped(5, 4)), LABELS, 4, "got 'tuple'"),
    (VALUES, shaped(5, 2), np.zeros(5), None, "1 value for each row"),
    (VALUES, shaped(5, 2), np.zeros((5, 3)), None, "3 values for each row"),
    (VALUES, shaped(), np.zeros(5), None, "1 value for each row"),
    (VALUES, {"a": 1}, np.zeros(5), None, "got 'dict'"),
]


@pytest.mark.parametrize(("task", "outputs", "targets", "classes", "says"), REFUSED)
def test_refusals(
    task: Any, outputs: Any, targets: Any, classes: int | None, says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        task.check(outputs, targets, classes)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_more_logits_than_classes_are_fine() -> None:
    CLASSES.check(shaped(5, 9), LABELS, 4)


def test_labels_must_be_one_for_each_row() -> None:
    """A column of labels would meet the logits in `take_along_axis`."""
    with pytest.raises(ConfigError):
        CLASSES.check(shaped(5, 4), LABELS[:, None], 4)
