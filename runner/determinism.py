# SPDX-License-Identifier: Apache-2.0
"""Settles what bits depend on and no config says, before JAX's first call. No JAX.

XLA reads XLA_FLAGS once, and makes its pool of threads with the first backend; so
both functions here write the environment, and a process that has a backend already is
too late for them.
"""

import os
import sys
from collections.abc import Mapping

from runner.errors import ConfigError
from runner.machine import (
    MAX_ISA,
    MOST_THREADS,
    Vector,
    forced_devices,
    is_on,
    parse_flags,
    read_flags_text,
    read_vector,
    size_thread_pool,
    spell_isa,
)
from runner.spec import Determinism, RunSpec, Strategy

__all__ = ["DETERMINISTIC_OPS", "has_backend", "restore_platform", "settle_backend"]

DETERMINISTIC_OPS = "xla_gpu_deterministic_ops"

# Flags that undo what `strict` asks for, by the value that does it, and why.
_BREAKING = (
    # https://openxla.org/xla/determinism: scatters, GEMMs, convolutions and attention
    # of a GPU are free to differ from run to run without it.
    (DETERMINISTIC_OPS, False, "lets a GPU add in any order"),
    # https://github.com/openxla/xla/pull/12520: a part of the flag above; the two
    # would ask for opposite things.
    ("xla_gpu_exclude_nondeterministic_ops", False, "lets a GPU add in any order"),
    # https://github.com/jax-ml/jax/issues/276: nothing in it is random, but sums are
    # taken in another order on each CPU, and a check for NaN may be compiled away.
    ("xla_cpu_enable_fast_math", True, "lets a CPU reorder sums and ignore NaN"),
)


def restore_platform(platform: object) -> dict[str, str]:
    """Sets this process up as the platform of a record was, where that is possible.

    NPROC is set to its `thread_pool`; where its `vector` is narrower than this CPU's,
    `--xla_cpu_max_isa` is added to XLA_FLAGS. A user's own NPROC or flag stands. A
    record may come from a stranger: a number in bounds and a name in a list are all
    that is taken from it.

    Args:
        platform: `platform` of a run's `run.json`; anything at all.

    Returns:
        What was set, by its name.

    Raises:
        RuntimeError: something has to be set, and JAX has a backend already.
    """
    made: dict[str, str] = {}
    if not isinstance(platform, Mapping):  # a stranger's
        return made
    pool = platform.get("thread_pool")
    if "NPROC" not in os.environ and _is_count(pool):
        made["NPROC"] = str(pool)
    isa = _narrower(platform.get("vector"))
    if isa is not None:
        made[f"--{MAX_ISA}"] = isa
    if made and has_backend():
        if isa is None and _running_pool() == pool:
            return {}
        raise RuntimeError("JAX has a backend: its pool and flags are settled")
    if isa is not None:
        _add_flag(MAX_ISA, isa)
    if "NPROC" in made:
        os.environ["NPROC"] = made["NPROC"]
    return made


def settle_backend(spec: RunSpec) -> None:
    """Makes the devices of `mesh.host_devices`, fixes the thread pool of a mesh that is
    `exact`, and adds what `determinism: strict` needs to XLA_FLAGS.

    Raises:
        ConfigError: the environment asks for the opposite, or JAX has a backend that
            can't be changed any more.
    """
    if spec.mesh.host_devices is not None:
        _force_devices(spec.mesh.host_devices)
    if spec.mesh.strategy is Strategy.EXACT:
        _fix_pool(spec.train.accumulation_steps)
    if spec.determinism is not Determinism.STRICT:
        return
    flags = parse_flags(read_flags_text())
    for name, value, why in _BREAKING:
        if is_on(flags, name) is value:
            raise ConfigError(
                "determinism",
                f"strict can't be kept under --{name}={str(value).lower()} of XLA_FLAGS"
                f", which {why}",
                got="strict",
                fix="Remove that flag, or set determinism=default",
            )
    if is_on(flags, DETERMINISTIC_OPS):
        return
    if has_backend():
        if _backend() == "cpu":  # the flag would change nothing
            return
        raise ConfigError(
            "determinism",
            f"strict needs --{DETERMINISTIC_OPS}, and JAX has started without it",
            got="strict",
            fix=f"Start again with XLA_FLAGS=--{DETERMINISTIC_OPS}=true",
        )
    _add_flag(DETERMINISTIC_OPS, "true")


def _force_devices(number: int) -> None:
    """Takes the CPU for a number of devices."""
    if has_backend():
        if _backend() == "cpu" and sys.modules["jax"].device_count() == number:
            return
        raise ConfigError(
            "mesh.host_devices",
            "JAX has started with other devices",
            got=number,
            fix=f"Start again with JAX_NUM_CPU_DEVICES={number}",
        )
    os.environ["JAX_NUM_CPU_DEVICES"] = str(number)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if "jax" in sys.modules:  # it read them when it was imported
        config = sys.modules["jax"].config
        config.update("jax_num_cpu_devices", number)
        config.update("jax_platforms", os.environ["JAX_PLATFORMS"])


def _fix_pool(shards: int) -> None:
    """A pool of one size for any number of devices up to that of the microbatches.

    Forced devices raise it to their number; a user's own NPROC stands.
    """
    if "NPROC" not in os.environ and not has_backend():
        pool = size_thread_pool(devices=forced_devices())
        os.environ["NPROC"] = str(min(MOST_THREADS, max(pool, shards)))


def _is_count(value: object) -> bool:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    return is_integer and 1 <= value <= MOST_THREADS  # type: ignore[operator]


def _narrower(recorded: object) -> str | None:
    """The flag's value that narrows this CPU to a recorded vector width."""
    names = [str(vector) for vector in Vector]
    if not isinstance(recorded, str) or recorded not in names:
        return None
    vector = Vector(recorded)
    if MAX_ISA in parse_flags(read_flags_text()):
        return None
    return spell_isa(vector) if vector.is_narrower(read_vector()) else None


def _add_flag(name: str, value: str) -> None:
    """Appends a flag; where XLA_FLAGS named a file, its text stands there instead."""
    words = [read_flags_text().strip(), f"--{name}={value}"]
    os.environ["XLA_FLAGS"] = " ".join(filter(None, words))


def has_backend() -> bool:
    """Whether JAX was called already; looks where JAX is, and never imports it."""
    bridge = sys.modules.get("jax._src.xla_bridge")
    return bridge is not None and bool(bridge.backends_are_initialized())


def _backend() -> str:
    return str(sys.modules["jax"].default_backend())


def _running_pool() -> int:
    is_cpu = _backend() == "cpu"
    devices = sys.modules["jax"].local_device_count() if is_cpu else forced_devices()
    return size_thread_pool(devices=devices)
