# SPDX-License-Identifier: Apache-2.0
"""The start-up's opponent: one step of the dropout experiment, in plain Flax.

python benchmarks/digits_by_hand.py sklearn|csv CACHE_DIRECTORY
"""

import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax


class MLP(nn.Module):
    """Two hidden layers with dropout."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Logits of ten classes."""
        for features in (512, 256):
            x = nn.relu(nn.Dense(features)(x))
            x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(10)(x)


def load_digits(how: str) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels: as people do, or as quick as can be."""
    if how == "sklearn":
        from sklearn.datasets import load_digits as load

        digits = load()
        x, y = digits.data, digits.target
    else:
        from importlib.util import find_spec
        from pathlib import Path

        spec = find_spec("sklearn")
        assert spec is not None
        assert spec.origin is not None
        file = Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
        x, y = table[:, :-1], table[:, -1]
    return (x / 16).astype(np.float32), y.astype(np.int32)


def main(how: str, cache: str) -> None:
    """Takes a step and prints its loss."""
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    model, tx = MLP(), optax.adam(1e-3)
    x, y = load_digits(how)

    @jax.jit
    def init(key: jax.Array) -> Any:
        params = model.init(key, x[:128], train=False)["params"]
        return params, tx.init(params)

    @jax.jit
    def train_step(
        params: Any, opt_state: Any, x: Any, y: Any, key: Any, step: Any
    ) -> Any:
        key = jax.random.fold_in(key, step)

        def loss_fn(params: Any) -> jax.Array:
            rngs = {"dropout": key}
            logits: Any = model.apply({"params": params}, x, train=True, rngs=rngs)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
            return losses.mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    params, opt_state = init(jax.random.key(0))
    rows = np.random.default_rng(0).permutation(len(x))[:128]
    key = jax.random.key(1)
    _, _, loss = train_step(params, opt_state, x[rows], y[rows], key, jnp.int32(0))
    print(float(loss), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
