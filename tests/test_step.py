# SPDX-License-Identifier: Apache-2.0
"""Pure step functions, on models that are plain functions of their variables."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.spec import RegressionSpec
from runner.step import (
    Batch,
    Parts,
    State,
    constrain_norms,
    make_eval_step,
    make_step,
)
from runner.tasks import make_task

ROWS, WIDTH = 12, 3


def to_bits(tree: Any) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    def raw(x: Any) -> np.ndarray:
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x)

    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path): (str(x.dtype), x.shape, raw(x).tobytes())
        for path, x in leaves
    }


def values(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def network(
    variables: Any, x: Any, rngs: Any, hypers: Any, *, train: bool
) -> tuple[Any, Any]:
    """tanh(x W) v, and a count of its calls in training."""
    params, seen = variables["params"], variables["counts"]["seen"]
    outputs = jnp.tanh(x @ params["hidden"]["kernel"]) @ params["last"]["kernel"]
    return outputs, {"counts": {"seen": seen + 1 if train else seen}}


def recording() -> optax.GradientTransformation:
    """Its updates are the gradients, and so is its state."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda grads, state, params=None: (grads, grads),
    )


def split_each(keys: Any, carried: Any, step: Any, part: Any) -> tuple[Any, Any]:
    """One carried stream, `dropout`."""
    pairs = {name: jax.random.split(key) for name, key in carried.items()}
    return (
        {name: pair[0] for name, pair in pairs.items()},
        {name: pair[1] for name, pair in pairs.items()},
    )


def parts(**changes: Any) -> Parts:
    made = Parts(
        apply=network,
        task=make_task(RegressionSpec()),
        optimizer=lambda hypers: optax.with_extra_args_support(
            optax.sgd(hypers["rate"], momentum=0.9)
        ),
        rngs=split_each,
    )
    return replace(made, **changes)


def first_state(made: Parts, **hypers: float) -> State:
    params = {
        "hidden": {"kernel": jnp.asarray(values(WIDTH, 4, seed=1))},
        "last": {"kernel": jnp.asarray(values(4, 1, seed=2))},
    }
    return State(
        step=jnp.int32(0),
        params=params,
        collections={"counts": {"seen": jnp.int32(0)}},
        opt_state=made.optimizer(hypers).init(params),
        carried={"dropout": jax.random.key(5)},
        failed=jnp.int32(-1),
    )


def batch(seed: int = 0) -> Batch:
    return Batch(values(ROWS, WIDTH, seed=seed), values(ROWS, seed=seed + 100))


# --- failure


def poison(good: Batch, what: str) -> Batch:
    x, y = good.x.copy(), good.y.copy()
    if what in ("nan", "inf"):
        x[3, 1] = float(what)
    elif what == "overflow":  # finite data, infinite loss
        y[2] = 3e38
    return Batch(x, y)


@pytest.mark.parametrize("microbatches", [1, 3])
@pytest.mark.parametrize("what", ["nan", "inf", "overflow"])
def test_failed_step_freezes_the_state(what: str, microbatches: int) -> None:
    hypers = {"rate": 0.1}
    made = parts(microbatches=microbatches)
    step = jax.jit(make_step(made))
    state = first_state(made, **hypers)
    for i in range(2):
        state, metrics = step(state, batch(i), {}, hypers)
        assert np.isfinite(metrics["loss"])
        assert int(state.failed) == -1
    assert (int(state.step), int(state.collections["counts"]["seen"])) == (
        2,
        2 * microbatches,
    )
    frozen, metrics = step(state, poison(batch(2), what), {}, hypers)
    if what != "inf":  # tanh(inf) is 1
        assert not np.isfinite(metrics["loss"])
    before = to_bits(state._replace(failed=jnp.int32(2)))
    assert to_bits(frozen) == before
    for bad in (batch(3), poison(batch(4), what), batch(5)):
        frozen, _ = step(frozen, bad, {}, hypers)
        assert to_bits(frozen) == before


def test_good_steps_move_every_part_of_the_state() -> None:
    hypers = {"rate": 0.1}
    made = parts()
    state = first_state(made, **hypers)
    after, _ = jax.jit(make_step(made))(state, batch(), {}, hypers)
    old, new = to_bits(state), to_bits(after)
    assert [path for path in old if old[path] == new[path]] == [".failed"]


def test_update_that_is_not_finite_fails_too() -> None:
    """The loss is 0 and its gradient is NaN: the root of 0."""

    def root(variables: Any, x: Any, *_: Any, train: bool) -> tuple[Any, Any]:
        return jnp.sqrt(x * variables["params"]["w"]), {}

    made = parts(apply=root, rngs=lambda keys, carried, step, part: ({}, carried))
    w = {"w": jnp.ones((1,))}
    opt_state = made.optimizer({"rate": 0.1}).init(w)
    state = State(jnp.int32(7), w, {}, opt_state, {}, jnp.int32(-1))
    zeros = Batch(np.zeros((4, 1), np.float32), np.zeros(4, np.float32))
    after, metrics = jax.jit(make_step(made))(state, zeros, {}, {"rate": 0.1})
    assert float(metrics["loss"]) == 0
    assert to_bits(after) == to_bits(state._replace(failed=jnp.int32(7)))


# --- accumulation


@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("n", [2, 3, 6])
def test_accumulated_gradient(n: int, unroll: bool) -> None:
    made = parts(optimizer=lambda _: optax.with_extra_args_support(recording()))
    state, rows = first_state(made), batch()
    whole, all_metrics = jax.jit(make_step(made))(state, rows, {}, {})
    some = replace(made, microbatches=n, unroll=unroll)
    after, metrics = jax.jit(make_step(some))(state, rows, {}, {})
    for ours, theirs in zip(
        jax.tree.leaves(after.opt_state), jax.tree.leaves(whole.opt_state), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    for name in ("loss", "mae", "grad_norm"):
        assert float(metrics[name]) == pytest.approx(float(all_metrics[name]), rel=1e-5)

    @jax.jit
    def one(params: Any, x: Any, y: Any) -> Any:
        def loss(params: Any) -> Any:
            hidden = jnp.tanh(x @ params["hidden"]["kernel"])
            return jnp.square((hidden @ params["last"]["kernel"])[:, 0] - y).mean()

        return jax.value_and_grad(loss)(params)

    total = jax.tree.map(jnp.zeros_like, state.params)
    losses = []
    for i in range(n):
        at = slice(i * ROWS // n, (i + 1) * ROWS // n)
        loss, grads = one(state.params, rows.x[at], rows.y[at])
        total = jax.tree.map(jnp.add, total, grads)
        losses.append(loss)
    by_hand = jax.tree.map(lambda g: g / n, total)
    assert to_bits(after.opt_state) == to_bits(by_hand)
    assert to_bits(metrics["loss"]) == to_bits(jnp.stack(losses).mean())
    assert int(after.collections["counts"]["seen"]) == n  # carried through the parts
    assert to_bits(after.carried) == to_bits(whole.carried)  # once a step


def test_each_microbatch_gets_its_number_and_rows() -> None:
    seen = []

    def rngs(keys: Any, carried: Any, step: Any, part: Any) -> tuple[Any, Any]:
        jax.debug.callback(lambda s, p: seen.append((int(s), int(p))), step, part)
        return {}, carried

    made = parts(rngs=rngs, microbatches=4, unroll=True)
    hypers = {"rate": 0.1}
    state = first_state(made, **hypers)._replace(step=jnp.int32(9))
    jax.block_until_ready(jax.jit(make_step(made))(state, batch(), {}, hypers))
    jax.effects_barrier()
    assert sorted(seen) == [(9, 0), (9, 1), (9, 2), (9, 3)]


# --- max-norm

KERNELS = st.sampled_from([(4, 3), (1, 2), (5, 1), (2, 2, 3, 2)])
WEIGHTS = st.floats(-(2**20), 2**20, width=32, allow_subnormal=False)


@settings(max_examples=60, deadline=None)
@given(shape=KERNELS, data=st.data(), bound=st.floats(2**-10, 2**10, width=32))
def test_constrained_norms(shape: tuple[int, ...], data: Any, bound: float) -> None:
    size = int(np.prod(shape))
    flat = data.draw(st.lists(WEIGHTS, min_size=size, max_size=size))
    w = np.asarray(flat, np.float32).reshape(shape)
    tree = {"a": {"kernel": w, "bias": w * 7}, "scale": w + 3, "kernel_2": w - 1}
    out = constrain_norms(jax.tree.map(jnp.asarray, tree), max_norm=jnp.float32(bound))
    kernel = np.asarray(out["a"].pop("kernel"))
    tree["a"].pop("kernel")
    assert to_bits(out) == to_bits(jax.tree.map(jnp.asarray, tree))
    axes = tuple(range(w.ndim - 1))
    norms = np.sqrt((w.astype(np.float64) ** 2).sum(axes, keepdims=True))
    after = np.sqrt((kernel.astype(np.float64) ** 2).sum(axes))
    assert (after <= bound * (1 + 1e-6)).all()
    inside = np.broadcast_to(norms < bound * (1 - 1e-6), w.shape)
    assert (kernel[inside] == w[inside]).all()
    factor = np.where(norms > bound, bound / np.maximum(norms, 1e-30), 1.0)
    np.testing.assert_allclose(kernel, w * factor, rtol=1e-5, atol=1e-30)


def test_max_norm_is_used_in_a_step() -> None:
    made = parts(max_norm=True)
    hypers = {"rate": 0.5, "train.max_norm": 0.25}
    state = first_state(made, **hypers)
    plain, _ = jax.jit(make_step(parts()))(state, batch(), {}, hypers)
    after, _ = jax.jit(make_step(made))(state, batch(), {}, hypers)
    by_hand = constrain_norms(plain.params, max_norm=0.25)
    for ours, theirs in zip(
        jax.tree.leaves(after.params), jax.tree.leaves(by_hand), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
        assert (np.linalg.norm(ours, axis=0) <= 0.25 * (1 + 1e-6)).all()
    assert to_bits(plain.params) != to_bits(after.params)


# --- evaluation


def test_eval_weights() -> None:
    made = parts()
    state = first_state(made, rate=0.1)
    rows, weights = batch(), np.array([1.0] * 5 + [0.0] * 7, np.float32)
    sums = make_eval_step(made)(state, rows, weights, {}, {}, 0)
    outputs, _ = network(
        {"params": state.params, **state.collections}, rows.x, {}, {}, train=False
    )
    error = np.asarray(outputs)[:5, 0] - rows.y[:5]
    assert float(sums["loss"]) == pytest.approx(float((error**2).sum()), rel=1e-5)
    assert float(sums["mae"]) == pytest.approx(float(abs(error).sum()), rel=1e-5)


Evaluate = Callable[..., dict[str, float]]


@pytest.fixture(scope="module")
def evaluate(make_spec: Any, tmp_path_factory: pytest.TempPathFactory) -> Evaluate:
    """Evaluates a linear model at step 0: (eval.batch_size, targets) to metrics.

    With `train_rows`, those of rows to train on, too.
    """
    from runner.compile import compile_run
    from runner.course import BEGINNING
    from runner.loop import _Loop

    path: Path = tmp_path_factory.mktemp("eval")

    def run(
        batch_size: int | None, targets: np.ndarray, *, train_rows: int | str = "null"
    ) -> dict[str, float]:
        x = values(ROWS, WIDTH)
        tests = {"x_test": values(len(targets), WIDTH, seed=1), "y_test": targets}
        np.savez(path / "data.npz", x_train=x, y_train=values(ROWS), **tests)
        spec = make_spec(
            "data=arrays",
            f"data.path={path}/data.npz",
            "task=regression",
            "model.features=[]",
            "model.num_outputs=1",
            "data.batch_size=4",
            f"eval.batch_size={'null' if batch_size is None else batch_size}",
            f"eval.train_rows={train_rows}",
        )
        program = compile_run(spec)
        loop = _Loop(program, BEGINNING, lambda: "", None, lambda value: value)
        state, loop.keys, loop.hypers = program.start()
        loop._evaluate(state, 0)
        call = loop.pending.pop()
        assert len(call.result[1]) == program.eval_batches
        found = call.take(None, jax.device_get(call.result)).metrics
        kernel = np.asarray(state.params["Dense_0"]["kernel"])
        error = (tests["x_test"] @ kernel)[:, 0] - targets.astype(np.float64)
        kept = ROWS if train_rows == "all" else train_rows
        ours = (x @ kernel)[:, 0] - values(ROWS)
        return {**found} | {
            "by hand": float(np.square(error).mean()),
            "mae by hand": float(np.abs(error).mean()),
            "train by hand": float(np.square(ours[: int(kept)]).mean())
            if train_rows != "null"
            else 0.0,
        }

    return run


@pytest.mark.promotes
@pytest.mark.parametrize("batch_size", [1, 5, 11, 12, None])
def test_any_eval_batch_size(batch_size: int | None, evaluate: Evaluate) -> None:
    found = evaluate(batch_size, values(11, seed=9))
    assert found["loss"] == pytest.approx(found["by hand"], rel=1e-5)
    assert found["mae"] == pytest.approx(found["mae by hand"], rel=1e-5)


@pytest.mark.promotes
@pytest.mark.parametrize("batch_size", [1, 5, 11])
@pytest.mark.parametrize("train_rows", [7, "all"])
def test_rows_to_train_on_are_evaluated_too(
    batch_size: int, train_rows: int | str, evaluate: Evaluate
) -> None:
    plain = evaluate(batch_size, values(11, seed=9))
    assert not [name for name in plain if name.startswith("train_")]
    found = evaluate(batch_size, values(11, seed=9), train_rows=train_rows)
    assert found["train_loss"] == pytest.approx(found["train by hand"], rel=1e-5)
    assert {k: found[k] for k in ("loss", "mae")} == {
        k: plain[k] for k in ("loss", "mae")
    }
    assert "train_mae" in found


@pytest.mark.promotes
def test_eval_padding_adds_nothing_to_an_infinite_loss(evaluate: Evaluate) -> None:
    """The last row fills the batch up; 0 * inf would be NaN."""
    targets = values(11, seed=9)
    targets[-1] = 3e38
    assert evaluate(5, targets)["loss"] == np.inf
