# SPDX-License-Identifier: Apache-2.0
"""What a run's bits may depend on besides its config."""

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

from runner.machine import (
    count_cores,
    parse_flags,
    read_cpu_model,
    read_flags_text,
    read_vector,
    size_thread_pool,
)

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

# Environment variables that choose kernels, or the order in which sums are taken.
_VARIABLES = (
    "CUBLAS_WORKSPACE_CONFIG",
    "LIBTPU_INIT_ARGS",
    "NCCL_ALGO",
    "NCCL_PROTO",
    "NPROC",
    "NVIDIA_TF32_OVERRIDE",
    "TF_CUDNN_DETERMINISTIC",
    "TF_CUDNN_USE_AUTOTUNE",
    "TF_DETERMINISTIC_OPS",
)
_AUTOTUNE = "xla_gpu_load_autotune_results_from"

# JAX's settings that change keys, the traced program, or how it is compiled. Left out:
# what only checks, logs, caches, times or moves data. `rng` and `train` of the config
# override some of them while a program is traced; these are the process's own.
_JAX_CONFIG = (
    # keys and draws
    "jax_default_prng_impl",
    "jax_high_dynamic_range_gumbel",
    "jax_random_seed_offset",
    "jax_threefry_gpu_kernel_lowering",
    "jax_threefry_partitionable",
    # dtypes and precision
    "jax_default_matmul_precision",
    "jax_enable_x64",
    "jax_explicit_x64_dtypes",
    "jax_numpy_dtype_promotion",
    # how a program, and its gradient, is traced
    "eager_constant_folding",
    "jax_custom_vjp3",
    "jax_disable_jit",
    "jax_remat3",
    "jax_scan3",
    "jax_softmax_custom_jvp",
    "jax_use_direct_linearize",
    # how it is lowered, compiled and distributed
    "jax_compiler_enable_remat_pass",
    "jax_cpu_collectives_implementation",
    "jax_disable_most_optimizations",
    "jax_enable_pgle",
    "jax_exec_time_optimization_effort",
    "jax_memory_fitting_effort",
    "jax_memory_fitting_level",
    "jax_optimization_level",
    "jax_use_magma",
    "jax_use_shardy_partitioner",
    "jax_xla_profile_version",
)


@cache  # reading them takes 5 ms, and a sweep has many runs
def read_versions() -> Mapping[str, str]:
    """Version of Python and of each package that a run's bits may depend on."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def read_platform() -> dict[str, Any]:
    """The devices, and all under which JAX traces and XLA compiles for them."""
    import jax

    devices, backend = jax.devices(), jax.default_backend()
    flags = read_flags_text()
    own = jax.local_device_count() if backend == "cpu" else 1
    return {
        "backend": backend,
        "device_kind": devices[0].device_kind,
        "device_count": len(devices),
        "process_count": jax.process_count(),
        "xla_flags": flags,
        "machine": platform.machine(),
        "cpu": read_cpu_model(),
        "cpu_count": count_cores(),
        "thread_pool": size_thread_pool(devices=own),
        "vector": str(read_vector()),
        "jax_config": _read_jax_config(),
        "environment": {n: os.environ[n] for n in _VARIABLES if n in os.environ},
        "autotune": _read_autotune(parse_flags(flags).get(_AUTOTUNE)),
    }


def _read_jax_config() -> dict[str, Any]:
    import jax

    values = jax.config.values  # another version of jax may lack one of them
    return {n: _to_plain(values[n]) for n in _JAX_CONFIG if n in values}


def _to_plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.name.lower()
    is_plain = value is None or isinstance(value, bool | int | float | str)
    return value if is_plain else str(value)


def _read_autotune(path: str | None) -> dict[str, str | None] | None:
    """The file that tells XLA which kernels to take, so that it measures none."""
    if not path:
        return None
    try:
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        digest = None
    return {"path": path, "sha256": digest}


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
