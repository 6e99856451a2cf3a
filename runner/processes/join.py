# SPDX-License-Identifier: Apache-2.0
"""Makes this process one of a run's, before JAX has a backend."""

import contextlib
import importlib.metadata
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from runner import __version__
from runner.errors import RunFailedError
from runner.machine import forced_devices, read_vector, size_thread_pool
from runner.parse import Frozen, to_plain
from runner.processes.peers import Connected, enter
from runner.processes.place import Place, find_place
from runner.processes.rendezvous import Company, listen, meet
from runner.processes.supervisor import Supervisor
from runner.processes.wire import Wire
from runner.spec import RunSpec

__all__ = ["join"]

_COMPARED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_FAREWELL = 15.0  # seconds that processes launched here have to end
_JAX_HEARTBEAT = 100  # seconds; the supervisors know sooner


def join(
    spec: RunSpec,
    *,
    complain: Callable[[str], None],
    close: Callable[[Path, str], None],
) -> RunSpec:
    """Returns in a process of its own, which JAX has connected with the others.

    The one that called stays behind to watch it, and exits with its code.

    Args:
        spec: The run.
        complain: Says on stderr what went wrong, in one line.
        close: Closes the record in a directory, where its process could not: with the
            line.

    Returns:
        The spec without what differs from process to process.

    Raises:
        ConfigError: the processes do not find each other, or do not agree.
    """
    place = find_place(spec.mesh)
    if place is None:
        return spec
    spec = _common(spec)
    mine = contextlib.ExitStack()
    server = None
    if place.index == 0:
        server = listen(place)
        if place.host is None:
            place = replace(place, host="127.0.0.1", port=server.getsockname()[1])
            place = _launch_others(place, server, mine)
    try:
        company = meet(
            place,
            facts=_facts(spec),
            server=server if place.index == 0 else None,
            timeout=spec.mesh.connect_timeout,
        )
    except BaseException:
        mine.close()
        raise
    number, words = _make_words()
    theirs = _split(company, spec, mine, words, complain=complain, close=close)
    _keep_words(place, number)
    enter(Connected(theirs, index=place.index, count=place.count, words=words))
    _initialize(company)
    return spec


def _common(spec: RunSpec) -> RunSpec:
    asked = spec.mesh.distributed
    if asked == "auto" or asked is None:
        return spec
    asked = replace(asked, coordinator_address=None, process_id=None)
    return replace(spec, mesh=replace(spec.mesh, distributed=asked))


def _facts(spec: RunSpec) -> dict[str, Any]:
    """What must be the same in all processes; of each leaf a digest, not its value."""
    versions = {"python": sys.version.split()[0], "runner": __version__}
    versions["cpu vector width"] = str(read_vector())
    for name in _COMPARED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    leaves = dict(_leaves("", to_plain(spec)))
    return {
        "config": {k: sha256(repr(v).encode()).hexdigest() for k, v in leaves.items()},
        "versions": versions,
        "thread_pool": size_thread_pool(devices=forced_devices()),
    }


def _leaves(path: str, value: Any) -> list[tuple[str, Any]]:
    items: Any = ()
    if isinstance(value, Mapping | Frozen):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    if not items:
        return [(path, value)]
    named = ((f"{path}.{key}" if path else str(key), child) for key, child in items)
    return [leaf for where, child in named for leaf in _leaves(where, child)]


def _launch_others(
    place: Place, server: socket.socket, mine: contextlib.ExitStack
) -> Place:
    """Forks processes 1, 2, ... here; returns in each with its own place.

    They say nothing: what they have to say comes through process 0.
    """
    _flush()
    for index in range(1, place.count):
        child = os.fork()
        if not child:
            mine.pop_all()
            server.close()
            with open(os.devnull, "r+b") as nothing:
                for number in (0, 1, 2):
                    os.dup2(nothing.fileno(), number)
            return replace(place, index=index, is_launched=True)
        mine.callback(_wait_for, child)
    return place


def _wait_for(child: int) -> None:
    end = time.monotonic() + _FAREWELL
    while time.monotonic() < end:
        if os.waitpid(child, os.WNOHANG)[0]:
            return
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def _split(
    company: Company,
    spec: RunSpec,
    mine: contextlib.ExitStack,
    words: Path,
    *,
    complain: Callable[[str], None],
    close: Callable[[Path, str], None],
) -> Wire:
    """Forks: the child goes on, with a wire to the parent, which watches it."""
    ours, theirs = socket.socketpair()
    _flush()
    child = os.fork()
    if child:
        theirs.close()
        heartbeat = spec.mesh.heartbeat_timeout
        watch = Supervisor(
            company, child=child, wire=Wire(ours), words=words, heartbeat=heartbeat
        )
        code, line = watch.run(), ""
        if watch.fault is not None:
            line = watch.say(watch.fault)
            if watch.directory is not None and not company.place.index:
                close(watch.directory, line)
            complain(f"error: {line}")
        if str(words) not in line:
            words.unlink(missing_ok=True)
        mine.close()
        _flush()
        os._exit(code)
    ours.close()
    mine.pop_all()
    for wire in company.wires.values():
        wire.close()
    for number in (signal.SIGINT, signal.SIGTERM):  # the supervisor gets them, too
        signal.signal(number, signal.SIG_IGN)
    return Wire(theirs)


def _make_words() -> tuple[int, Path]:
    number, path = tempfile.mkstemp(prefix="runner-", suffix=".log")
    return number, Path(path)


def _keep_words(place: Place, number: int) -> None:
    """What C++ writes to stdout and stderr goes to a file; Python's words do where
    there is no terminal.
    """
    for name, old in (("stdout", 1), ("stderr", 2)):
        said = os.dup(number if place.is_launched else old)
        os.dup2(number, old)
        errors = getattr(sys, name).errors
        setattr(sys, name, os.fdopen(said, "w", buffering=1, errors=errors))
    os.close(number)


def _initialize(company: Company) -> None:
    os.environ["NPROC"] = str(company.thread_pool)
    import jax

    place = company.place
    logging.getLogger("jax._src.distributed").setLevel(logging.WARNING)
    jax.config.update("jax_enable_preemption_service", False)  # it swallows SIGTERM
    # The coordinator's own wait is over: all are here.
    try:
        jax.distributed.initialize(
            coordinator_address=place.address,
            num_processes=place.count,
            process_id=place.index,
            local_device_ids=company.devices,
            cluster_detection_method="deactivate",
            coordinator_bind_address=place.address,
            initialization_timeout=30,
            heartbeat_timeout_seconds=_JAX_HEARTBEAT,
            shutdown_timeout_seconds=int(_FAREWELL),
        )
    except RuntimeError as error:
        what = str(error).partition("\n")[0]
        raise RunFailedError(
            f"mesh.distributed: JAX can't connect ({what})."
        ) from error


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
