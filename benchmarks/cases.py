# SPDX-License-Identifier: Apache-2.0
"""What is timed: one problem for each case, given alike to the runner and by hand."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf, open_dict

from runner.cli.config import compose
from runner.spec import MnistSpec, RunSpec, parse_spec

__all__ = ["CASES", "Case", "make_spec", "mnist_directory", "write_images"]

ROOT = Path(__file__).resolve().parents[1]
_QUIET = ("eval.every=null", "sinks=none")
_TRAIN_ROWS, _TEST_ROWS = 10_000, 128  # a small test set: the loop ends with a test


@dataclass(frozen=True)
class Case:
    """A model on a data set.

    Args:
        name: As the tables show it.
        overrides: Of `+experiment=dropout`.
        steps: Steps in one timing.
        images: Whether it takes images of 28 x 28 instead of the digits.
        convolves: Whether the model has convolutions.
    """

    name: str
    overrides: tuple[str, ...]
    steps: int
    images: bool = False
    convolves: bool = False


CASES = (
    Case("MLP 512-256, digits", (), 600),
    Case("MLP 64, digits", ("model.features=[64]",), 3000),
    Case("CNN, 28 x 28", ("model=cnn",), 12, images=True, convolves=True),
    Case("MLP 1024-1024, 28 x 28", ("model.features=[1024,1024]",), 60, images=True),
)


def make_spec(case: Case, *, steps: int, images: Path) -> RunSpec:
    """The case's spec, as the command line would make it."""
    data = ("data=arrays", f"data.path={images}") if case.images else ()
    overrides = ["+experiment=dropout", f"train.steps={steps}"]
    config = compose([*overrides, *_QUIET, *data, *case.overrides])
    with open_dict(config):
        del config["hydra"]
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    return parse_spec({str(key): value for key, value in plain.items()})


def mnist_directory() -> Path | None:
    """Where the four files of MNIST are, if they are anywhere."""
    return next((d for d in _candidates() if (d / "mnist").is_dir()), None)


def write_images(file: Path) -> str:
    """Writes rows of MNIST, or noise of its shape; says which."""
    directory = mnist_directory()
    if directory is None:
        rng = np.random.default_rng(0)
        arrays: dict[str, Any] = {
            "x_train": rng.random((_TRAIN_ROWS, 28, 28), np.float32),
            "y_train": rng.integers(0, 10, _TRAIN_ROWS, np.int32),
            "x_test": rng.random((_TEST_ROWS, 28, 28), np.float32),
            "y_test": rng.integers(0, 10, _TEST_ROWS, np.int32),
        }
    else:
        from runner.data import load_data

        spec = MnistSpec(path=str(directory / "mnist"), batch_size=1, shuffle=None)
        data = load_data(spec, split=None)
        arrays = {
            "x_train": data.x_train[:_TRAIN_ROWS],
            "y_train": data.y_train[:_TRAIN_ROWS],
            "x_test": data.x_test[:_TEST_ROWS],
            "y_test": data.y_test[:_TEST_ROWS],
        }
    np.savez(file, **arrays)
    return "noise" if directory is None else "MNIST"


def _candidates() -> Iterator[Path]:
    if given := os.environ.get("RUNNER_DATA_DIR"):
        yield Path(given)
    yield ROOT.parent / "shared" / "data"
