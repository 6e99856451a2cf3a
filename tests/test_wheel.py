# SPDX-License-Identifier: Apache-2.0
"""The wheel: what lies in it, and that it runs beside a user's `models` and `conf`."""

import configparser
import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

from runner import __version__

ROOT = Path(__file__).resolve().parents[1]
OURS = ("PYTHONPATH", "JAX_NUM_CPU_DEVICES", "JAX_NUMPY_DTYPE_PROMOTION")
DIST_INFO = f"jax_runner-{__version__}.dist-info"

pytestmark = pytest.mark.xdist_group("wheel")


USERS_NET = """
import models
from flax import linen as nn


class Net(nn.Module):
    features: tuple[int, ...]
    num_outputs: int
    dropout_rate: float

    @nn.compact
    def __call__(self, x, deterministic):
        x = nn.Dense(models.WIDTH)(x.reshape(x.shape[0], -1))
        x = nn.Dropout(self.dropout_rate)(x, deterministic=deterministic)
        return nn.Dense(self.num_outputs)(x)
"""


def _run(*command: str | Path, cwd: Path) -> str:
    """The stdout of a command that gets nothing of this checkout nor of conftest.py."""
    env = {k: v for k, v in os.environ.items() if k not in OURS}
    done = subprocess.run(
        command, check=False, cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.args}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _build(target: str, *, source: Path, into: Path) -> Path:
    hatchling = (sys.executable, "-m", "hatchling", "build")
    _run(*hatchling, "--target", target, "--directory", into, cwd=source)
    (built,) = into.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build("wheel", source=ROOT, into=tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that has the wheel, our dependencies, and not this checkout.

    The dependencies are those of the running interpreter, reached by a `.pth` file;
    the `.pth` file there of the editable install is not read, as only those in an
    environment's own site-packages are.
    """
    home = tmp_path_factory.mktemp("venv")
    venv.create(home, symlinks=True)
    pip = (sys.executable, "-m", "pip", "--python", home / "bin" / "python")
    _run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=home)
    (own,) = home.glob("lib/python*/site-packages")
    theirs = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (own / "dependencies.pth").write_text("\n".join(theirs))
    return home


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A working directory whose `models` and `conf` must not be imported."""
    for name in ("models", "conf"):
        package = tmp_path / name
        package.mkdir()
        (package / "__init__.py").write_text("raise AssertionError(__file__)\n")
    return tmp_path


def test_wheel_holds_runner_and_hydra_plugins_only(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if not n.startswith(f"{DIST_INFO}/")}

    def files(folder: str) -> set[str]:
        paths = [p for p in (ROOT / folder).rglob("*") if p.is_file()]
        shipped = [p for p in paths if "__pycache__" not in p.parts]
        return {p.relative_to(ROOT).as_posix() for p in shipped}

    inside = {f"runner/{name}" for name in files("conf") | files("models")}
    assert names == files("runner") | files("hydra_plugins") | inside
    assert "runner/conf/experiment/dropout.yaml" in names
    assert "runner/models/__init__.py" in names
    assert "hydra_plugins/runner/__init__.py" in names
    assert "hydra_plugins/__init__.py" not in names


def test_wheel_declares_its_entry_points(wheel: Path) -> None:
    entries = configparser.ConfigParser()
    with zipfile.ZipFile(wheel) as archive:
        entries.read_string(archive.read(f"{DIST_INFO}/entry_points.txt").decode())
    assert {name: dict(entries[name]) for name in entries.sections()} == {
        "console_scripts": {"runner": "runner.__main__:main"},
        "hydra.plugins": {"runner": "hydra_plugins.runner"},
    }


def test_sdist_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "sdist").mkdir()
    (tmp_path / "wheel").mkdir()
    sdist = _build("sdist", source=ROOT, into=tmp_path / "sdist")
    _run("tar", "-xzf", sdist, cwd=tmp_path)
    source = tmp_path / f"jax_runner-{__version__}"
    again = _build("wheel", source=source, into=tmp_path / "wheel")
    assert again.read_bytes() == wheel.read_bytes()
    assert (source / "tests" / Path(__file__).name).is_file()


def test_installed_runner_finds_its_own_models(
    installed: Path, elsewhere: Path
) -> None:
    code = """if True:
        import hydra_plugins.runner, runner.models
        print(runner.__file__, runner.models.__file__, runner.CONF_DIR)
        print(hydra_plugins.runner.__file__)
    """
    printed = _run(installed / "bin" / "python", "-c", code, cwd=elsewhere).split()
    assert len(printed) == 4
    assert all(Path(p).is_relative_to(installed) for p in printed), printed


def _train(python: Path, *overrides: str, cwd: Path) -> dict[str, Any]:
    """The manifest of a short run of the main experiment."""
    short = ("+experiment=dropout", "train.steps=20", "sinks.wandb.mode=disabled")
    stdout = _run(python, "-m", "runner", *short, *overrides, cwd=cwd)
    run = cwd / stdout.splitlines()[-1]
    manifest: dict[str, Any] = json.loads((run / "run.json").read_text())
    return manifest


def test_installed_runner_trains(installed: Path, elsewhere: Path) -> None:
    manifest = _train(installed / "bin" / "python", cwd=elsewhere)
    assert (manifest["status"], manifest["steps"]) == ("completed", 20)


def test_trusted_package_gets_the_models_of_its_user(
    installed: Path, tmp_path: Path
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("WIDTH = 3\n")
    (tmp_path / "mylab.py").write_text(USERS_NET)
    overrides = ("trusted=[mylab]", "model._target_=mylab.Net")
    manifest = _train(installed / "bin" / "python", *overrides, cwd=tmp_path)
    assert manifest["status"] == "completed"


def test_installed_console_script_shows_the_config(
    installed: Path, elsewhere: Path
) -> None:
    stdout = _run(installed / "bin" / "runner", "--cfg", "job", cwd=elsewhere)
    assert "\nrng:\n" in stdout
