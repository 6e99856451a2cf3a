# SPDX-License-Identifier: Apache-2.0
"""The sweep's opponent: all jobs by `vmap` in one hand-written script.

    python benchmarks/sweep_by_hand.py JOBS STEPS CASE CACHE_DIRECTORY [DIRECTORY]

It records nothing; or, where DIRECTORY is given, the losses and a checkpoint of each
job.
"""

import json
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

BATCH, CHUNK = 128, 100


def drop(module: nn.Module, x: jax.Array, rate: Any, *, train: bool) -> jax.Array:
    """Dropout at a rate that is traced."""
    if not train:
        return x
    keep = 1 - rate
    mask = jax.random.bernoulli(module.make_rng("dropout"), keep, x.shape)
    return jnp.where(mask, x / keep, 0)


class MLP(nn.Module):
    """Hidden layers with dropout."""

    features: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array, rate: Any, *, train: bool) -> jax.Array:
        """Logits of ten classes."""
        x = x.reshape(len(x), -1)
        for features in self.features:
            x = drop(self, nn.relu(nn.Dense(features)(x)), rate, train=train)
        return nn.Dense(10)(x)


class CNN(nn.Module):
    """Two convolutions with pooling, and a dense layer with dropout."""

    @nn.compact
    def __call__(self, x: jax.Array, rate: Any, *, train: bool) -> jax.Array:
        """Logits of ten classes."""
        x = x[..., None]
        for channels in (32, 64):
            x = nn.relu(nn.Conv(channels, (3, 3))(x))
            x = nn.avg_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(256)(x.reshape(len(x), -1)))
        return nn.Dense(10)(drop(self, x, rate, train=train))


class Attention(nn.Module):
    """The rows of an image attend to each other."""

    @nn.compact
    def __call__(self, x: jax.Array, rate: Any, *, train: bool) -> jax.Array:
        """Logits of ten classes."""
        x = nn.Dense(32)(x)
        x = nn.LayerNorm()(nn.MultiHeadDotProductAttention(num_heads=4)(x))
        x = drop(self, x, rate, train=train)
        return nn.Dense(10)(x.reshape(len(x), -1))


MODELS: dict[str, nn.Module] = {
    "tiny": MLP((64,)),
    "mlp": MLP((512, 256)),
    "cnn": CNN(),
    "attention": Attention(),
}


def save(directory: Path, losses: np.ndarray, state: Any) -> None:
    """What a script can leave of each job without much ado."""
    import orbax.checkpoint as ocp

    checkpointer = ocp.StandardCheckpointer()
    for job, own in enumerate(losses.tolist()):
        where = directory / str(job)
        where.mkdir(parents=True)
        (where / "losses.json").write_text(json.dumps(own))
        saved = jax.tree.map(lambda leaf, job=job: np.asarray(leaf[job]), state)
        checkpointer.save(where / "checkpoint", saved)
    checkpointer.wait_until_finished()


def main(
    jobs: int, steps: int, case: str, cache: str, directory: str | None = None
) -> None:
    """Trains all, and prints the last accuracy of each."""
    from sklearn.datasets import load_digits

    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    digits = load_digits()
    x, y = (digits.images / 16).astype(np.float32), digits.target.astype(np.int32)
    x_train, y_train = jnp.asarray(x[:1438]), jnp.asarray(y[:1438])
    model, tx = MODELS[case], optax.adam(1e-3)

    def init(seed: Any) -> Any:
        keys = {"params": jax.random.key(seed)}
        params = model.init(keys, x_train[:BATCH], 0.0, train=False)["params"]
        return params, tx.init(params)

    def chunk(state: Any, rows: Any, first: Any, seed: Any, rate: Any) -> Any:
        def step(state: Any, at: Any) -> Any:
            i, rows = at
            params, opt_state = state
            key = jax.random.fold_in(jax.random.key(seed + 1_000), i)

            def loss_fn(params: Any) -> Any:
                logits: Any = model.apply(
                    {"params": params},
                    x_train[rows],
                    rate,
                    train=True,
                    rngs={"dropout": key},
                )
                losses = optax.softmax_cross_entropy_with_integer_labels(
                    logits, y_train[rows]
                )
                return losses.mean()

            loss, grads = jax.value_and_grad(loss_fn)(params)
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), loss

        return jax.lax.scan(step, state, (first + jnp.arange(len(rows)), rows))

    train = jax.jit(jax.vmap(chunk, in_axes=(0, 0, None, 0, 0)), donate_argnums=0)
    test = jax.jit(
        jax.vmap(
            lambda params: (
                model.apply({"params": params}, x[1438:], 0.0, train=False).argmax(-1)
                == y[1438:]
            ).mean()
        )
    )
    seeds, rates = jnp.arange(jobs), jnp.resize(jnp.array([0.0, 0.2, 0.5, 0.8]), jobs)
    state = jax.jit(jax.vmap(init))(seeds)
    draw, losses = np.random.default_rng(0), []
    for first in range(0, steps, CHUNK):
        count = min(CHUNK, steps - first)
        rows = draw.integers(0, len(x_train), (jobs, count, BATCH), np.int32)
        state, own = train(state, rows, first, seeds, rates)
        losses.append(jax.device_get(own))
    print(jax.device_get(test(state[0])))
    if directory is not None:
        every = np.concatenate(losses, axis=1)
        save(Path(directory).absolute(), every, jax.device_get(state))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
