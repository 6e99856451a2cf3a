# SPDX-License-Identifier: Apache-2.0
"""A YAML program against the same program by hand: same paths, keys, bits.

What stands by hand here is plain Flax and optax, none of the runner. Its loop is the
usual one: a jitted step, called from Python, with a batch from NumPy. Numbers that
people sweep are passed to the step as arguments, since that is what the runner does;
`test_constants_by_hand` says where plain Python numbers give the same bits.
"""

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
from jax import lax

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
    """As Sequential of Flatten, a noise that is on in training alone, Dense."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        x = AlwaysNoise(name="layers_1")(x.reshape(x.shape[0], -1))
        return nn.Dense(10, name="layers_2")(x)


class AlwaysNoise(nn.Module):
    """Noise from the stream `noise`, in training and in evaluations."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
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
    chosen = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return {"accuracy": jnp.argmax(logits, -1) == labels, "loss": chosen}


def squares(outputs: jax.Array, targets: jax.Array, _: Numbers) -> jax.Array:
    return jnp.square(outputs[:, 0] - targets).mean()


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
    n, size, result = hand.microbatches, BATCH, Result()

    def with_numbers(function: Callable[..., Any]) -> Callable[..., Any]:
        jitted = jax.jit(function if traced else lambda _, *a: function(constants, *a))
        constants = hand.numbers
        return lambda *args: jitted(hand.numbers if traced else {}, *args)

    @with_numbers
    def gradients(
        numbers: Numbers, params: Any, collections: Any, x: Any, y: Any, rngs: Any
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
        return grads, loss, after

    @with_numbers
    def update(numbers: Numbers, params: Any, opt_state: Any, grads: Any) -> Any:
        updates, opt_state = hand.optimizer(numbers).update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        if hand.max_norm:
            params = bound_by_hand(params, numbers["max_norm"])
        return params, opt_state, optax.tree.norm(grads)

    variables = jax.jit(lambda: init_by_hand(hand, data.x[: size // n]))()
    params, collections = split(variables)
    result.initial = jax.device_get(variables)
    opt_state = hand.optimizer(hand.numbers).init(params)
    carry = stream_key("dropout")
    for step, rows in enumerate(batches(STEPS, len(data.x), size)):
        keys = {
            name: jax.random.fold_in(stream_key(name), step) for name in hand.streams
        }
        if hand.carried:
            keys["dropout"], carry = jax.random.split(carry)
        if n == 1:
            grads, loss, collections = gradients(
                params, collections, data.x[rows], data.y[rows], keys
            )
        else:
            grads, loss = jax.tree.map(jnp.zeros_like, params), []
            for i, part in enumerate(rows.reshape(n, -1)):
                at = {k: jax.random.fold_in(key, i) for k, key in keys.items()}
                new, one, collections = gradients(
                    params, collections, data.x[part], data.y[part], at
                )
                grads = jax.tree.map(jnp.add, grads, new)
                loss.append(one)
            grads = jax.tree.map(lambda g: g / n, grads)
            loss = jnp.stack(loss).mean()
        params, opt_state, norm = update(params, opt_state, grads)
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
    return {k: float(np.float32(v) / np.float32(TESTS)) for k, v in sums.items()}


@pytest.fixture(autouse=True)
def separator() -> Iterator[None]:
    """As `rng.fix_separator`, which is on by default; Flax has it off."""
    with flax.config.temp_flip_flag("fix_rng_separator", True):
        yield


# --- the runner


def train_by_yaml(make_spec: Any, *overrides: str) -> tuple[Any, Result]:
    from runner.compile import compile_run
    from runner.loop import Outcome, train
    from runner.records.events import TrainRecord

    common = (f"seed={SEED}", f"data.batch_size={BATCH}", f"train.steps={STEPS}")
    common += ("train.steps_per_call=5", "eval.every=null")
    program = compile_run(make_spec(*common, *overrides))
    result = Result()
    state, _, _ = program.start()
    result.initial = jax.device_get({"params": state.params, **state.collections})
    for event in train(program):
        if isinstance(event, TrainRecord):
            result.losses += list(event.metrics["loss"])
            result.norms += list(event.metrics["grad_norm"])
        elif isinstance(event, Outcome):
            assert (event.status, event.step) == ("completed", STEPS)
            last = jax.device_get(event.state)
            result.params, result.collections = last.params, last.collections
        else:
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
NUMBERS = {"learning_rate": 1e-3, "smoothing": 0.0, "rate": 0.5}
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
        ByHand(lambda _: ByHandNorm(), {**NUMBERS, "learning_rate": 0.1}, sgd),
        (
            *chain(
                FLATTEN,
                dense(16),
                BATCH_NORM,
                RELU,
                "{_target_: models.Dropout, rate: 0.25}",
                dense(10),
            ),
            "optimizer=sgd",
        ),
    ),
    "accumulation": (
        ByHand(mlp, NUMBERS, microbatches=4),
        (*MLP, "train.accumulation_steps=4"),
    ),
    "batch norm, accumulated": (
        ByHand(
            lambda _: ByHandNorm(),
            {**NUMBERS, "learning_rate": 0.1},
            sgd,
            microbatches=4,
        ),
        (
            *chain(
                FLATTEN,
                dense(16),
                BATCH_NORM,
                RELU,
                "{_target_: models.Dropout, rate: 0.25}",
                dense(10),
            ),
            "optimizer=sgd",
            "train.accumulation_steps=4",
        ),
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
        (*MLP, "rng.streams.dropout.per={step: carry}"),
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
            *chain(FLATTEN, "{_target_: models.Noise, scale: 0.5}", dense(10)),
            "+rng.streams.noise={phases: [init, train, eval], per: [step]}",
        ),
    ),
    "convolution": (
        ByHand(lambda _: ByHandCNN(), NUMBERS),
        ("model=cnn", "model.channels=[4]", "model.features=[16]"),
    ),
}


@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_probe(name, traced, images, make_spec):
    hand, overrides = CASES[name]
    data = (f"data=arrays", f"data.path={images.path}")
    program, ours = train_by_yaml(make_spec, *data, *overrides)
    theirs = train_by_hand(hand, images, traced=traced)
    out = []
    a, b = to_bits(ours.initial), to_bits(theirs.initial)
    assert a.keys() == b.keys()
    out.append(("init", a == b))
    eager = to_bits(init_by_hand(hand, images.x[:BATCH]))
    out.append(("eager init", a == eager))
    out.append(("losses", np.array(ours.losses).tobytes() == np.array(theirs.losses).tobytes()))
    out.append(("norms", np.array(ours.norms).tobytes() == np.array(theirs.norms).tobytes()))
    out.append(("params", to_bits(ours.params) == to_bits(theirs.params)))
    out.append(("coll", to_bits(ours.collections) == to_bits(theirs.collections)))
    out.append(("eval", ours.eval == theirs.eval))
    diff = max(jax.tree.leaves(jax.tree.map(lambda a, b: float(np.abs(a-b).max()), ours.params, theirs.params)))
    print("PROBE", name, "traced" if traced else "const", program.construct, program.baked, [k for k, v in out if not v], diff)
    if ours.eval != theirs.eval: print("PROBE   ", ours.eval, theirs.eval)
