# SPDX-License-Identifier: Apache-2.0
"""Eight forced CPU devices, strict promotion; warnings are errors (pyproject.toml).

A test marked `promotes` runs under JAX's standard promotion: optax's Adam needs it.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

_BEFORE = dict(os.environ)
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["WANDB_MODE"] = "offline"

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """What a verb sets for its process (NPROC, XLA_FLAGS) ends with the test."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(autouse=True)
def promotion(request: pytest.FixtureRequest) -> Iterator[None]:
    """No silent promotion of dtypes in what a test computes."""
    import jax

    rule = "standard" if request.node.get_closest_marker("promotes") else "strict"
    with jax.numpy_dtype_promotion(rule):
        yield


@pytest.fixture
def no_version_base() -> Iterator[None]:
    """As in a process of its own: Hydra's suites name none, other tests here do."""
    from hydra.core.singleton import Singleton
    from hydra.version import VersionBase

    before = Singleton._instances.pop(VersionBase, None)
    yield
    Singleton._instances.pop(VersionBase, None)
    if before is not None:
        Singleton._instances[VersionBase] = before


@pytest.fixture(scope="session")
def compose_config() -> Callable[..., dict[str, Any]]:
    """Overrides, as on the command line, to the resolved config as plain data."""
    from omegaconf import OmegaConf, open_dict

    from runner.cli.config import compose

    def compose_plain(*overrides: str) -> dict[str, Any]:
        config = compose(list(overrides))
        with open_dict(config):
            del config["hydra"]
        plain = OmegaConf.to_container(config, resolve=True)
        assert isinstance(plain, dict)
        return dict(plain)

    return compose_plain


@pytest.fixture(scope="session")
def make_spec(compose_config: Any) -> Callable[..., Any]:
    """Overrides, as on the command line, to a `RunSpec`."""
    from runner.spec import parse_spec

    return lambda *overrides: parse_spec(compose_config(*overrides))


@pytest.fixture(scope="session")
def user_env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a user's shell, with a compile cache of this session's."""
    env = {k: v for k, v in _BEFORE.items() if not k.startswith(("JAX_", "WANDB_"))}
    env["XDG_CACHE_HOME"] = str(tmp_path_factory.getbasetemp().parent / "cache")
    env["PYTHONPATH"] = str(ROOT)
    return env


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def runner(user_env: dict[str, str], tmp_path: Path) -> Run:
    """Runs `python -m runner ARGS` in a directory of its own."""

    def run(
        *args: str, cwd: Path = tmp_path, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "runner", *args],
            cwd=cwd,
            env={**user_env, **(env or {})},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def pool_sensitive_overrides() -> list[str]:
    """A run of seconds whose last parameters differ between NPROC=1 and NPROC=4.

    Its gradient sums over 1,400 rows, which XLA cuts up for the threads it has.
    """
    small = ["data.batch_size=1400", "model.features=[32]", "train.steps=3"]
    return ["+experiment=dropout", *small, "sinks=none"]


@pytest.fixture
def small_mnist(tmp_path: Path) -> list[str]:
    """Overrides that name a small relative of MNIST."""
    draw = np.random.default_rng(0)
    for part, rows in (("train", 60), ("t10k", 20)):
        for kind, shape in (("images-idx3", (rows, 4, 4)), ("labels-idx1", (rows,))):
            array = draw.integers(0, 10, size=shape, dtype=np.uint8)
            head = bytes([0, 0, 8, array.ndim])
            sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
            path = tmp_path / f"{part}-{kind}-ubyte"
            path.write_bytes(head + sizes + array.tobytes())
    small = ["data.train_rows=50", "data.batch_size=10", "train.steps=2"]
    return [f"data.path={tmp_path}", *small]
