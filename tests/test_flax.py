# SPDX-License-Identifier: Apache-2.0
"""A YAML program against the same program by hand: same paths, keys, bits.

What stands by hand here is plain Flax and optax, none of the runner. Its loop is the
usual one: one jitted step, called from Python, with a batch from NumPy. What bits
rest on, seen on CPU:

- Numbers that people sweep are arguments of the step by hand, as they are in the
  runner. Python constants give the same bits but for label smoothing
  (`test_constants_by_hand`): XLA folds 1 - s and the mean's 1 / classes.
- The runner keeps the old state where a step is not finite. With batch
  normalisation that `where` changes what XLA fuses, so the step by hand has one
  there (`guarded`); without it, losses are one rounding off. The table is like that.
- The runner's rows lie on the device, and each step takes its own. On a table of few
  columns XLA fuses that into the first matrix product, so the step by hand takes its
  rows there, too (`on_device`).
- Gradient and update belong to one jitted function. In two, accumulation, bfloat16
  and batch normalisation are one rounding off.
- Evaluation takes -log_softmax[label]; optax's function for it rounds otherwise.
- `model.init` gives the same bits with and without `jit`.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

STEPS, ROWS, TESTS, BATCH, SEED = 12, 150, 37, 32, 3

pytestmark = pytest.mark.promotes


def to_bits(tree: Any) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path): (str(x.dtype), x.shape, np.asarray(x).tobytes())
        for path, x in leaves
    }


def assert_same(ours: Any, theirs: Any) -> None:
    """Same paths, shapes, dtypes, bytes."""
    ours, theirs = to_bits(ours), to_bits(theirs)
    assert ours.keys() == theirs.keys()
    assert not [path for path in ours if ours[path] != theirs[path]]


# --- by hand: data, keys


@dataclass(frozen=True)
class Data:
    """Arrays, and where they lie for the runner."""

    path: Path
    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Data:
    draw = np.random.default_rng(0)
    x = draw.normal(size=(ROWS + TESTS, 8, 8)).astype(np.float32)
    y = draw.integers(0, 10, size=ROWS + TESTS).astype(np.int32)
    path = tmp_path_factory.mktemp("data") / "images.npz"
    cut = slice(None, ROWS), slice(ROWS, None)
    np.savez(
        path, x_train=x[cut[0]], y_train=y[cut[0]], x_test=x[cut[1]], y_test=y[cut[1]]
    )
    return Data(path, x[cut[0]], y[cut[0]], x[cut[1]], y[cut[1]])


def number_of(name: str) -> np.uint32:
    return np.uint32(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big"))


def stream_key(name: str, seed: int = SEED) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), number_of(name))


def batches(steps: int, rows: int, batch_size: int) -> Iterator[np.ndarray]:
    """The rows of each step: a permutation of all for each epoch."""
    per_epoch = rows // batch_size
    for step in range(steps):
        epoch, at = divmod(step, per_epoch)
        words = (int(number_of("shuffle")), epoch)
        bits = np.random.Philox(np.random.SeedSequence(SEED, spawn_key=words))
        order = np.random.Generator(bits).permutation(rows)
        yield order[at * batch_size : (at + 1) * batch_size]


# --- by hand: models


class ByHandMLP(nn.Module):
    """As models.MLP; Flax's own Dropout where the rate is a Python number."""

    rate: Any
    features: tuple[int, ...] = (16,)
    num_outputs: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        x = x.reshape(x.shape[0], -1)
        for features in self.features:
            x = nn.relu(nn.Dense(features)(x))
            if isinstance(self.rate, float):
                x = nn.Dropout(self.rate)(x, deterministic=not train)
            else:
                x = TracedDropout(self.rate, name="Dropout_0")(x, train=train)
        return nn.Dense(self.num_outputs)(x)


class TracedDropout(nn.Module):
    """What people write when Flax's Dropout refuses a traced rate."""

    rate: jax.Array

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        if not train:
            return x
        keep = 1.0 - self.rate
        mask = jax.random.bernoulli(self.make_rng("dropout"), keep, x.shape)
        return jnp.where(mask, x * (1.0 / keep), 0.0)


class ByHandChain(nn.Module):
    """As Sequential of Flatten, Dense, relu, flax.linen.Dropout, Dense."""

    rate: float = 0.5

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        x = nn.relu(nn.Dense(16, name="layers_1")(x.reshape(x.shape[0], -1)))
        x = nn.Dropout(self.rate, name="layers_3")(x, deterministic=not train)
        return nn.Dense(10, name="layers_4")(x)


class ByHandNorm(nn.Module):
    """As model=batch_norm with 16 features."""

    rate: float = 0.25

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        x = nn.Dense(16, name="layers_1")(x.reshape(x.shape[0], -1))
        norm = nn.BatchNorm(momentum=0.9, name="layers_2")
        x = nn.relu(norm(x, use_running_average=not train))
        x = nn.Dropout(self.rate, name="layers_4")(x, deterministic=not train)
        return nn.Dense(10, name="layers_5")(x)


class ByHandNoisy(nn.Module):
    """As Sequential of Flatten, Noise, a Dropout that is always on, Dense."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        x = ByHandNoise(name="layers_1")(x.reshape(x.shape[0], -1), train=train)
        x = nn.Dropout(0.25, rng_collection="noise", name="layers_2")(
            x, deterministic=False
        )
        return nn.Dense(10, name="layers_3")(x)


class ByHandNoise(nn.Module):
    """Noise in training alone."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        if not train:
            return x
        return x + 0.5 * jax.random.normal(self.make_rng("noise"), x.shape)


class ByHandCNN(nn.Module):
    """As models.CNN with one convolution; Flax's pooling is the same division."""

    rate: float = 0.5

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        x = nn.relu(nn.Conv(4, kernel_size=(3, 3))(x[..., None]))
        x = nn.avg_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(16)(x.reshape(x.shape[0], -1)))
        x = nn.Dropout(self.rate)(x, deterministic=not train)
        return nn.Dense(10)(x)


# --- by hand: the program

Numbers = Mapping[str, Any]


def entropy(logits: jax.Array, labels: jax.Array, numbers: Numbers) -> jax.Array:
    losses = -jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(losses, labels[:, None], axis=-1)[:, 0]
    smoothing = numbers["smoothing"]
    return ((1 - smoothing) * chosen + smoothing * losses.mean(axis=-1)).mean()


def classes_of(logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    losses = -jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(losses, labels[:, None], axis=-1)[:, 0]
    return {"accuracy": jnp.argmax(logits, -1) == labels, "loss": chosen}


def squares(outputs: jax.Array, targets: jax.Array, _: Numbers) -> jax.Array:
    return jnp.square(outputs - targets[:, None]).mean(axis=-1).mean()


def errors_of(outputs: jax.Array, targets: jax.Array) -> dict[str, jax.Array]:
    error = outputs[:, 0] - targets
    return {"loss": jnp.square(error), "mae": jnp.abs(error)}


def adam(numbers: Numbers) -> optax.GradientTransformation:
    return optax.adam(numbers["learning_rate"])


@dataclass(frozen=True)
class ByHand:
    """A program by hand.

    `rngs_at` gives the streams of a step (None: for init), a microbatch, a phase.
    """

    model: Callable[[Numbers], nn.Module]
    numbers: dict[str, float]
    optimizer: Callable[[Numbers], optax.GradientTransformation] = adam
    loss: Callable[..., jax.Array] = entropy
    metrics: Callable[..., dict[str, jax.Array]] = classes_of
    streams: tuple[str, ...] = ("dropout",)
    eval_streams: tuple[str, ...] = ()
    init_streams: tuple[str, ...] = ("params",)
    carried: bool = False
    microbatches: int = 1
    max_norm: bool = False
    compute_dtype: Any = jnp.float32
    guarded: bool = False
    on_device: bool = False


@dataclass
class Result:
    """What a program leaves."""

    initial: Any = None
    losses: list[np.ndarray] = field(default_factory=list)
    norms: list[np.ndarray] = field(default_factory=list)
    params: Any = None
    collections: Any = None
    eval: dict[str, float] = field(default_factory=dict)


def split(variables: Any) -> tuple[Any, Any]:
    rest = {k: v for k, v in variables.items() if k != "params"}
    return variables["params"], rest


def cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda a: a.astype(dtype), tree)


def init_by_hand(hand: ByHand, x: np.ndarray) -> Any:
    model = hand.model(hand.numbers)
    rngs = {name: stream_key(name) for name in hand.init_streams}
    return model.init(rngs, jnp.zeros(x.shape, x.dtype), train=False)


def train_by_hand(hand: ByHand, data: Data, *, traced: bool = True) -> Result:
    """The tutorial's loop; numbers are arguments of the step, or else constants."""
    n, result = hand.microbatches, Result()
    constants = hand.numbers

    def gradients(
        params: Any, collections: Any, x: Any, y: Any, rngs: Any, numbers: Numbers
    ) -> Any:
        def loss_fn(params: Any) -> Any:
            variables = {"params": cast(params, hand.compute_dtype), **collections}
            outputs, after = hand.model(numbers).apply(
                variables,
                x.astype(hand.compute_dtype),
                train=True,
                rngs=rngs,
                mutable=list(collections),
            )
            return hand.loss(outputs.astype(jnp.float32), y, numbers), after

        (loss, after), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        return grads, after, loss

    def accumulated(
        params: Any, collections: Any, x: Any, y: Any, rngs: Any, numbers: Numbers
    ) -> Any:
        def one(carry: Any, part: Any) -> Any:
            total, collections = carry
            i, x, y = part
            at = {name: jax.random.fold_in(key, i) for name, key in rngs.items()}
            grads, after, loss = gradients(params, collections, x, y, at, numbers)
            return (jax.tree.map(jnp.add, total, grads), after), loss

        cut = [a.reshape(n, -1, *a.shape[1:]) for a in (x, y)]
        zeros = jax.tree.map(jnp.zeros_like, params)
        first = (zeros, collections)
        (total, collections), loss = jax.lax.scan(one, first, (jnp.arange(n), *cut))
        return jax.tree.map(lambda g: g / n, total), collections, loss.mean()

    def step(
        params: Any, collections: Any, opt_state: Any, batch: Any, *rest: Any
    ) -> Any:
        x, y = [jnp.take(a, batch, axis=0) for a in held] if hand.on_device else batch
        rngs, numbers = rest if traced else (*rest, constants)
        old = params, collections, opt_state
        find = gradients if n == 1 else accumulated
        grads, after, loss = find(params, collections, x, y, rngs, numbers)
        updates, opt_state = hand.optimizer(numbers).update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        if hand.max_norm:
            params = bound_by_hand(params, numbers["max_norm"])
        if hand.guarded:
            finite = [jnp.isfinite(a).all() for a in jax.tree.leaves((loss, updates))]
            params, after, opt_state = jax.tree.map(
                lambda new, old: jnp.where(jnp.stack(finite).all(), new, old),
                (params, after, opt_state),
                old,
            )
        return params, after, opt_state, loss, optax.tree.norm(grads)

    held = jax.device_put((data.x, data.y))
    train_step = jax.jit(step)
    variables = jax.jit(lambda: init_by_hand(hand, data.x[: BATCH // n]))()
    params, collections = split(variables)
    result.initial = jax.device_get(variables)
    opt_state = hand.optimizer(hand.numbers).init(params)
    carry = stream_key("dropout")
    for i, rows in enumerate(batches(STEPS, len(data.x), BATCH)):
        rngs = {name: jax.random.fold_in(stream_key(name), i) for name in hand.streams}
        if hand.carried:
            rngs["dropout"], carry = jax.random.split(carry)
        rest = (rngs, hand.numbers) if traced else (rngs,)
        batch = rows if hand.on_device else (data.x[rows], data.y[rows])
        state = params, collections, opt_state
        params, collections, opt_state, loss, norm = train_step(*state, batch, *rest)
        result.losses.append(np.asarray(loss))
        result.norms.append(np.asarray(norm))
    result.params, result.collections = jax.device_get((params, collections))
    result.eval = evaluate_by_hand(hand, data, params, collections)
    return result


def bound_by_hand(params: Any, max_norm: Any) -> Any:
    bounded = flax.traverse_util.flatten_dict(params)
    for path, w in bounded.items():
        if path[-1] == "kernel":
            norms = jnp.sqrt((w**2).sum(axis=tuple(range(w.ndim - 1)), keepdims=True))
            bounded[path] = w * jnp.where(norms > max_norm, max_norm / norms, 1.0)
    return flax.traverse_util.unflatten_dict(bounded)


def evaluate_by_hand(
    hand: ByHand, data: Data, params: Any, collections: Any
) -> dict[str, float]:
    @jax.jit
    def evaluate(params: Any, collections: Any, x: Any, y: Any, rngs: Any) -> Any:
        variables = {"params": cast(params, hand.compute_dtype), **collections}
        outputs = hand.model(hand.numbers).apply(
            variables, x.astype(hand.compute_dtype), train=False, rngs=rngs
        )
        values = hand.metrics(outputs.astype(jnp.float32), y)
        return {name: v.astype(jnp.float32).sum() for name, v in values.items()}

    rngs = {
        name: jax.random.fold_in(
            jax.random.fold_in(stream_key(name), number_of("eval")), STEPS
        )
        for name in hand.eval_streams
    }
    sums = evaluate(params, collections, data.x_test, data.y_test, rngs)
    return {
        k: float(np.float32(v) / np.float32(len(data.x_test))) for k, v in sums.items()
    }


@pytest.fixture(autouse=True)
def separator() -> Iterator[None]:
    """As `rng.fix_separator`, which is on by default; Flax has it off."""
    with flax.config.temp_flip_flag("fix_rng_separator", True):
        yield


# --- the runner


def train_by_yaml(make_spec: Any, *overrides: str) -> tuple[Any, Result]:
    from runner.compile import compile_run
    from runner.loop import Outcome, train
    from runner.records.events import EvalRecord, TrainRecord

    common = (f"seed={SEED}", f"data.batch_size={BATCH}", f"train.steps={STEPS}")
    common += ("train.steps_per_call=5", "eval.every=null")
    program = compile_run(make_spec(*common, *overrides))
    result = Result()
    state, *rest = program.start()
    variables = {"params": state.params, **state.collections}
    result.initial = jax.tree.map(np.array, variables)  # copies: the state is donated
    started = (state, *rest), None
    vars(program)["start_observed"] = lambda: started  # not compiled a second time
    for event in train(program):
        if isinstance(event, TrainRecord):
            result.losses += list(event.metrics["loss"])
            result.norms += list(event.metrics["grad_norm"])
        elif isinstance(event, Outcome):
            assert (event.status, event.step) == ("completed", STEPS)
            last = jax.device_get(event.state)
            result.params, result.collections = last.params, last.collections
        elif isinstance(event, EvalRecord):
            result.eval = dict(event.metrics)
    return program, result


def chain(*layers: str) -> tuple[str, str]:
    """Overrides that make the model a Sequential."""
    return "model=batch_norm", f"model.module.layers=[{', '.join(layers)}]"


def dense(features: int) -> str:
    return f"{{_target_: flax.linen.Dense, features: {features}}}"


FLATTEN = "{_target_: models.Flatten}"
RELU = "{_target_: flax.linen.relu}"
BATCH_NORM = "{_target_: flax.linen.BatchNorm, momentum: 0.9}"
DROPOUT = "{_target_: models.Dropout, rate: 0.25}"
NORM = chain(FLATTEN, dense(16), BATCH_NORM, RELU, DROPOUT, dense(10))
NUMBERS = {"learning_rate": 1e-3, "smoothing": 0.0, "rate": 0.5}
SGD = {**NUMBERS, "learning_rate": 0.1}
MLP = ("model.features=[16]", "model.dropout_rate=0.5")


def mlp(numbers: Numbers) -> nn.Module:
    return ByHandMLP(0.5)


def traced_mlp(numbers: Numbers) -> nn.Module:
    return ByHandMLP(numbers["rate"])


def clipped(numbers: Numbers) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(numbers["clip"]), adam(numbers))


def sgd(numbers: Numbers) -> optax.GradientTransformation:
    return optax.sgd(numbers["learning_rate"], momentum=0.9)


def cosine(numbers: Numbers) -> optax.GradientTransformation:
    schedule = optax.cosine_decay_schedule(numbers["learning_rate"], STEPS)
    return optax.adamw(schedule, weight_decay=numbers["weight_decay"])


CASES: dict[str, tuple[ByHand, tuple[str, ...]]] = {
    "models.Dropout": (ByHand(mlp, NUMBERS), MLP),
    "traced rate": (
        ByHand(traced_mlp, {**NUMBERS, "rate": 0.3}),
        (*MLP[:1], "model.dropout_rate=0.3"),
    ),
    "flax.linen.Dropout": (
        ByHand(lambda _: ByHandChain(), NUMBERS),
        chain(
            FLATTEN,
            dense(16),
            RELU,
            "{_target_: flax.linen.Dropout, rate: 0.5}",
            dense(10),
        ),
    ),
    "batch norm": (
        ByHand(lambda _: ByHandNorm(), SGD, sgd, guarded=True),
        (*NORM, "optimizer=sgd"),
    ),
    "accumulation": (
        ByHand(mlp, NUMBERS, microbatches=4),
        (*MLP, "train.accumulation_steps=4"),
    ),
    "batch norm, accumulated": (
        ByHand(lambda _: ByHandNorm(), SGD, sgd, microbatches=4),
        (*NORM, "optimizer=sgd", "train.accumulation_steps=4"),
    ),
    "clip_norm": (
        ByHand(mlp, {**NUMBERS, "clip": 0.7}, clipped),
        (*MLP, "train.clip_norm=0.7"),
    ),
    "max_norm": (
        ByHand(mlp, {**NUMBERS, "max_norm": 0.9}, max_norm=True),
        (*MLP, "train.max_norm=0.9"),
    ),
    "label smoothing": (
        ByHand(mlp, {**NUMBERS, "smoothing": 0.1}),
        (*MLP, "task.label_smoothing=0.1"),
    ),
    "schedule": (
        ByHand(mlp, {**NUMBERS, "weight_decay": 1e-4}, cosine),
        (*MLP, "optimizer=adamw_cosine"),
    ),
    "bfloat16": (
        ByHand(mlp, NUMBERS, compute_dtype=jnp.bfloat16),
        (*MLP, "train.compute_dtype=bfloat16"),
    ),
    "carried stream": (
        ByHand(mlp, NUMBERS, carried=True),
        (
            *MLP,
            "~rng.streams.dropout.per",
            "+rng.streams.dropout.per={step: carry}",
        ),
    ),
    "noise stream": (
        ByHand(
            lambda _: ByHandNoisy(),
            NUMBERS,
            streams=("noise",),
            eval_streams=("noise",),
            init_streams=("params", "noise"),
        ),
        (
            *chain(
                FLATTEN,
                "{_target_: models.Noise, scale: 0.5}",
                "{_target_: models.Dropout, rate: 0.25, deterministic: false, "
                "rng_collection: noise}",
                dense(10),
            ),
            "+rng.streams.noise={phases: [init, train, eval], per: [step]}",
        ),
    ),
    "convolution": (
        ByHand(lambda _: ByHandCNN(), NUMBERS),
        ("model=cnn", "model.channels=[4]", "model.features=[16]"),
    ),
}


@pytest.fixture(scope="module")
def by_yaml(make_spec: Any, images: Data) -> Callable[[str], tuple[Any, Result]]:
    """What the runner makes of a case; computed once."""

    @functools.cache
    def run(name: str) -> tuple[Any, Result]:
        data = ("data=arrays", f"data.path={images.path}")
        return train_by_yaml(make_spec, *data, *CASES[name][1])

    return run


@pytest.mark.parametrize("name", CASES)
def test_same_bits(name: str, by_yaml: Any, images: Data) -> None:
    program, ours = by_yaml(name)
    theirs = train_by_hand(CASES[name][0], images)
    assert str(program.construct) == ("step" if name == "convolution" else "loop")
    assert_same(ours.initial, theirs.initial)
    assert_same(ours.losses, theirs.losses)
    assert_same(ours.norms, theirs.norms)
    assert_same(ours.params, theirs.params)
    assert_same(ours.collections, theirs.collections)
    assert ours.eval == theirs.eval
    assert len(ours.losses) == STEPS
    assert len(np.unique(ours.losses)) == STEPS


@pytest.mark.parametrize("name", ["models.Dropout", "convolution"])
def test_eager_init(name: str, by_yaml: Any, images: Data) -> None:
    by_hand = init_by_hand(CASES[name][0], images.x[:BATCH])
    assert_same(by_yaml(name)[1].initial, by_hand)


@pytest.mark.parametrize("name", ["traced rate", "schedule", "label smoothing"])
def test_constants_by_hand(name: str, by_yaml: Any, images: Data) -> None:
    """Python numbers in the program by hand, and Flax's own Dropout."""
    _, ours = by_yaml(name)
    theirs = train_by_hand(CASES[name][0], images, traced=False)
    assert_same(ours.initial, theirs.initial)
    if name == "label smoothing":
        np.testing.assert_allclose(ours.losses, theirs.losses, rtol=1e-6)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, atol=1e-6),
            ours.params,
            theirs.params,
        )
    else:
        assert_same(ours.losses, theirs.losses)
        assert_same(ours.params, theirs.params)


# --- a table of numbers


def test_regression_on_a_table(make_spec: Any, tmp_path: Path) -> None:
    rows = ROWS
    table = np.random.default_rng(1).normal(2, 3, size=(rows, 4)).round(3)
    path = tmp_path / "table.csv"
    np.savetxt(path, table, "%.3f", ",", header="a,b,target,c", comments="")
    spec = (
        "data=csv",
        f"data.path={path}",
        "data.target=target",
        "task=regression",
        "optimizer=adamw",
        "model.num_outputs=1",
        *MLP,
    )
    _, ours = train_by_yaml(make_spec, *spec)

    words = np.random.SeedSequence(0, spawn_key=(int(number_of("split")),))
    order = np.random.Generator(np.random.Philox(words)).permutation(rows)
    tests = round(rows * 0.2)
    train, test = np.sort(order[:-tests]), np.sort(order[-tests:])
    x, y = np.delete(table, 2, axis=1), table[:, 2].astype(np.float32)
    x = ((x - x[train].mean(axis=0)) / x[train].std(axis=0)).astype(np.float32)
    data = Data(path, x[train], y[train], x[test], y[test])

    def adamw(numbers: Numbers) -> optax.GradientTransformation:
        decay = numbers["weight_decay"]
        return optax.adamw(numbers["learning_rate"], weight_decay=decay)

    hand = ByHand(
        lambda _: ByHandMLP(0.5, num_outputs=1),
        {"learning_rate": 1e-3, "weight_decay": 1e-4},
        adamw,
        loss=squares,
        metrics=errors_of,
        guarded=True,
        on_device=True,
    )
    theirs = train_by_hand(hand, data)
    assert len(train) == 120
    assert_same(ours.initial, theirs.initial)
    assert_same(ours.losses, theirs.losses)
    assert_same(ours.params, theirs.params)
    assert ours.eval == pytest.approx(theirs.eval, rel=1e-6)  # rows by hand: whole


# --- keys


def keys_by_hand(
    hand: ByHand, x: np.ndarray, rngs: Any, monkeypatch: Any, *, train: bool
) -> list[list[int]]:
    """Words of the keys that masks and noise are drawn with, in order."""
    seen: list[list[int]] = []
    for name in ("bernoulli", "normal"):
        original = getattr(jax.random, name)

        def spy(key: Any, *args: Any, original: Any = original, **kwargs: Any) -> Any:
            seen.append([int(word) for word in jax.random.key_data(key)])
            return original(key, *args, **kwargs)

        monkeypatch.setattr(jax.random, name, spy)
    model = hand.model(hand.numbers)
    variables = init_by_hand(hand, x)
    seen.clear()
    model.apply(
        variables, jnp.asarray(x), train=train, rngs=rngs, mutable=["batch_stats"]
    )
    monkeypatch.undo()
    return seen


@pytest.mark.parametrize("name", ["models.Dropout", "flax.linen.Dropout", "batch norm"])
@pytest.mark.parametrize("step", [0, 7])
def test_keys(
    name: str, step: int, make_spec: Any, images: Data, monkeypatch: Any
) -> None:
    hand = CASES[name][0]
    rngs = {"dropout": jax.random.fold_in(stream_key("dropout"), step)}
    x = images.x[:2]
    theirs = keys_by_hand(hand, x, rngs, monkeypatch, train=True)
    ours = keys_by_yaml(make_spec, images, *CASES[name][1], phase="train", step=step)
    assert [entry["key"] for entry in ours] == theirs
    assert len(theirs) == 1


def test_keys_of_carried_stream(make_spec: Any, images: Data, monkeypatch: Any) -> None:
    hand, overrides = CASES["carried stream"]
    carry, step = stream_key("dropout"), 3
    for _ in range(step + 1):
        key, carry = jax.random.split(carry)
    rngs = {"dropout": key}
    theirs = keys_by_hand(hand, images.x[:2], rngs, monkeypatch, train=True)
    ours = keys_by_yaml(make_spec, images, *overrides, phase="train", step=step)
    assert [entry["key"] for entry in ours] == theirs


def test_keys_of_microbatches(make_spec: Any, images: Data, monkeypatch: Any) -> None:
    hand, overrides = CASES["accumulation"]
    entries = keys_by_yaml(make_spec, images, *overrides, phase="train", step=5)
    at_step = jax.random.fold_in(stream_key("dropout"), 5)
    for i, entry in enumerate(entries):
        rngs = {"dropout": jax.random.fold_in(at_step, i)}
        theirs = keys_by_hand(hand, images.x[:2], rngs, monkeypatch, train=True)
        assert [entry["key"]] == theirs
        assert entry["index"] == {"microbatch": i}
    assert len(entries) == 4


@pytest.mark.parametrize("phase", ["train", "eval"])
def test_keys_of_own_stream(
    phase: str, make_spec: Any, images: Data, monkeypatch: Any
) -> None:
    """Two draws in training. In evaluations the runner's Noise draws, and drops."""
    hand, overrides = CASES["noise stream"]
    key = stream_key("noise")
    if phase == "eval":
        key = jax.random.fold_in(key, number_of("eval"))
    rngs = {"noise": jax.random.fold_in(key, 4)}
    train = phase == "train"
    theirs = keys_by_hand(hand, images.x[:2], rngs, monkeypatch, train=train)
    ours = keys_by_yaml(make_spec, images, *overrides, phase=phase, step=4)
    assert [entry["path"] for entry in ours] == [["layers_1"], ["layers_2"]]
    assert [entry["key"] for entry in ours][-len(theirs) :] == theirs
    assert len(theirs) == (2 if train else 1)


def keys_by_yaml(
    make_spec: Any, data: Data, *overrides: str, phase: str, step: int
) -> list[dict[str, Any]]:
    from runner.compile import compile_run
    from runner.ledger import expand, make_ledger

    common = (f"seed={SEED}", f"data.batch_size={BATCH}", "data=arrays")
    spec = make_spec(*common, f"data.path={data.path}", *overrides)
    ledger = make_ledger(compile_run(spec))
    return [
        entry
        for draw in ledger["draws"]
        if draw["phase"] == phase
        for entry in expand(ledger, draw, step=step)
    ]
