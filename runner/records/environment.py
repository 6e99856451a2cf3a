# SPDX-License-Identifier: Apache-2.0
"""What a run's bits may depend on besides its config."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

__all__ = ["read_git", "read_platform", "read_versions"]

_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "hydra-core",
    "omegaconf",
    "orbax-checkpoint",
    "numpy",
    "jax-runner",
)


def read_versions() -> dict[str, str]:
    """Version of Python and of each package that a run's bits may depend on."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def read_platform() -> dict[str, Any]:
    """The devices, and the flags under which XLA compiles for them."""
    import jax

    devices = jax.devices()
    return {
        "backend": jax.default_backend(),
        "device_kind": devices[0].device_kind,
        "device_count": len(devices),
        "process_count": jax.process_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "machine": platform.machine(),
        "cpu_count": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
    }


def read_git(directory: Path) -> dict[str, Any]:
    """Commit of the code in a directory, and whether it was changed since."""
    commit = _git(directory, "rev-parse", "HEAD")
    status = _git(directory, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if status is None else bool(status)}


def _git(directory: Path, *args: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *args],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
