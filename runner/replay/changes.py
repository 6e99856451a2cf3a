# SPDX-License-Identifier: Apache-2.0
"""From a recorded config to a spec. A logged config is data; nothing in it is run."""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

from runner.errors import ConfigError, did_you_mean
from runner.parse import to_plain
from runner.records.record import Record
from runner.records.secrets import SECRET, Secrets, find_secrets
from runner.spec import DistributedSpec, RunSpec, Strategy, parse_spec

__all__ = ["IN_REPRODUCE", "IN_RESUME", "Changes", "secrets_of", "spec_of"]

Changes = Mapping[str, Any]

_PROCESSES = (
    "mesh.distributed",
    "mesh.host_devices",
    "mesh.connect_timeout",
    "mesh.heartbeat_timeout",
)
_ELSEWHERE = ("data.path", "data.target_path", "train.steps_per_call", *_PROCESSES)
IN_REPRODUCE = (*_ELSEWHERE, "train.compile_cache")
IN_RESUME = (
    *IN_REPRODUCE,
    "train.steps",
    "sinks",
    "checkpoint.every",
    "checkpoint.keep",
    "checkpoint.keep_best",
)
_OF_EXACT = ("mesh.axes",)  # changes no bit there


def spec_of(
    record: Record,
    *,
    trusted: tuple[str, ...] = (),
    changes: Changes | None = None,
    may_change: tuple[str, ...] = (),
    fixed: Changes | None = None,
) -> RunSpec:
    """What a record says was run.

    Args:
        record: The record; its own `trusted` list does not count.
        trusted: Packages that the person at the keyboard trusts.
        changes: What that person wants otherwise, by config path.
        may_change: Paths that `changes` may name, with all that is below them; and
            any value that the record does not hold. The axes of a mesh that is
            `exact` may change, too.
        fixed: What is otherwise in any case, by config path.

    Raises:
        ConfigError: the config breaks a rule, or a change is not allowed.
    """
    config: Any = copy.deepcopy(record.config)
    _forget_place(config)
    _make_place(config, changes or {})
    unknown = dict(_not_held(config))
    may_change = (*may_change, *_of_mesh(config))
    _refuse_changes(config, changes or {}, unknown, may_change)
    for path, value in {**(fixed or {}), **(changes or {})}.items():
        _put(config, path, value)
    config["trusted"] = list(trusted)
    for path, value in _not_held(config):
        raise ConfigError(
            path,
            "the record does not hold the value, only where it came from",
            got=value,
            fix=f"Give it: {path}=VALUE",
        )
    return parse_spec(config)


def secrets_of(record: Record, changes: Changes) -> Secrets:
    """What a run from a record must not say, and how its own record shows it.

    What a person gives for a leaf that the record does not hold is shown as there.
    """
    config, given = dict(record.config), {}
    for path in changes:
        with contextlib.suppress(ConfigError):  # an unknown key, refused elsewhere
            given[path] = _at(config, path)
    return find_secrets(config, config) | find_secrets(given, dict(changes))


def _refuse_changes(
    config: Any, changes: Changes, unknown: Changes, may_change: tuple[str, ...]
) -> None:
    refused = [
        path
        for path, value in changes.items()
        if not any(path == p or path.startswith(f"{p}.") for p in may_change)
        and path not in unknown
        and _at(config, path) != value
    ]
    if refused:
        raise ConfigError(
            ", ".join(refused),
            "would make it another run",
            got=", ".join(f"{p}={changes[p]}" for p in refused),
            allowed=f"May change: {', '.join(may_change)}",
            fix="Start a new run for that",
        )


def _forget_place(config: Any) -> None:
    """A record does not choose which host this one connects to."""
    mesh = config.get("mesh")
    distributed = mesh.get("distributed") if isinstance(mesh, dict) else None
    if isinstance(distributed, dict):
        distributed |= {"coordinator_address": None, "process_id": None}


def _make_place(config: Any, changes: Changes) -> None:
    """`mesh.distributed.num_processes=2` of a run that had one process."""
    named = any(path.startswith("mesh.distributed.") for path in changes)
    mesh = config.get("mesh")
    if named and isinstance(mesh, dict) and mesh.get("distributed") is None:
        mesh["distributed"] = to_plain(DistributedSpec(num_processes=1))


def _of_mesh(config: Any) -> tuple[str, ...]:
    mesh = config.get("mesh")
    is_exact = isinstance(mesh, dict) and mesh.get("strategy") == Strategy.EXACT
    return _OF_EXACT if is_exact else ()


def _at(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = _child(config, name, path)
    return config


def _put(config: Any, path: str, value: Any) -> None:
    *parents, leaf = path.split(".")
    for name in parents:
        config = _child(config, name, path)
    _child(config, leaf, path)
    config[leaf] = value


def _child(config: Any, name: str, path: str) -> Any:
    if not isinstance(config, dict) or name not in config:
        known = [str(key) for key in config] if isinstance(config, dict) else []
        allowed = f"Known: {', '.join(known)}" if known else None
        fix = did_you_mean(name, known)
        raise ConfigError(path, "unknown key", allowed=allowed, fix=fix)
    return config[name]


def _not_held(config: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Secrets and interpolations: leaves that stand for a value, by their paths."""
    if isinstance(config, dict):
        for key, value in config.items():
            yield from _not_held(value, f"{path}.{key}" if path else str(key))
    elif isinstance(config, list):
        for i, value in enumerate(config):
            yield from _not_held(value, f"{path}[{i}]")
    elif isinstance(config, str) and (SECRET in config or "${" in config):
        yield path, config
