# SPDX-License-Identifier: Apache-2.0
"""The processes of a run find each other, and that they agree, before JAX starts.

Process 0 listens at the coordinator's port, each other one says what it is, and all are
told together that it begins, or why not. JAX's coordinator takes the port over.
"""

import contextlib
import errno
import os
import select
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runner.errors import ConfigError, RunnerError
from runner.processes.place import Place
from runner.processes.wire import Wire, WireError

__all__ = ["Company", "listen", "meet"]

_PATH = "mesh.distributed"
_ADDRESS = f"{_PATH}.coordinator_address"
_PROTOCOL = "runner processes 1"
_PAUSE = 0.1  # seconds between two tries
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "JAX_LOCAL_DEVICE_IDS")


@dataclass(frozen=True)
class Company:
    """The processes that have met.

    Args:
        place: Which of them this is.
        names: How to call each: `process 1 of 2 (node2)`.
        wires: To process 0; of process 0, to each of the others, by their numbers.
        devices: The accelerators of this process; None is all that it sees.
        thread_pool: NPROC of all of them.
    """

    place: Place
    names: tuple[str, ...]
    wires: Mapping[int, Wire]
    devices: tuple[int, ...] | None
    thread_pool: int


class _RefusedError(RunnerError):
    """What process 0 says of all."""


def listen(place: Place) -> socket.socket:
    """Takes the coordinator's port, at that address alone.

    Raises:
        ConfigError: it is taken, or no address of this machine.
    """
    host = "127.0.0.1" if place.host is None else place.host
    try:
        family, _, _, _, at = socket.getaddrinfo(
            host, place.port, type=socket.SOCK_STREAM
        )[0]
        return socket.create_server(at[:2], family=family, backlog=place.count)
    except OSError as error:
        raise ConfigError(_ADDRESS, *_why_not(error, place)) from error


def _why_not(error: OSError, place: Place) -> tuple[str]:
    if error.errno == errno.EADDRINUSE:
        what = f"another program has the port {place.port}; name another one"
    elif error.errno == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror):
        what = f"{place.host} is no address of this machine, which is to be process 0"
    else:
        what = f"can't listen at {place.address}: {error.strerror or error}"
    return (what,)


def meet(
    place: Place,
    *,
    facts: Mapping[str, Any],
    server: socket.socket | None,
    timeout: float,
) -> Company:
    """Waits until all processes are there and agree.

    Args:
        place: Which of them this is.
        facts: `config` and `versions`, leaves by their paths, the same in all of
            them; `thread_pool`, of which that of process 0 holds.
        server: What `listen` gave; of process 0.
        timeout: Seconds.

    Raises:
        ConfigError: one does not come, does not answer or is another run's.
    """
    mine = {
        "protocol": _PROTOCOL,
        "process": place.index,
        "count": place.count,
        "host": socket.gethostname(),
        "address": _own_address(),
        "visible": {name: os.environ.get(name) for name in _VISIBLE},
        **facts,
    }
    if place.index:
        wire, welcome = _join(place, mine, timeout=timeout)
        wires = {0: wire}
    else:
        assert server is not None
        wires, welcome = _gather(place, mine, server=server, timeout=timeout)
    hosts, devices = welcome["hosts"], welcome["devices"][place.index]
    of = place.count
    return Company(
        place=place,
        names=tuple(f"process {i} of {of} ({host})" for i, host in enumerate(hosts)),
        wires=wires,
        devices=None if devices is None else tuple(devices),
        thread_pool=welcome["thread_pool"],
    )


def _own_address() -> str:
    with contextlib.suppress(OSError):
        return socket.gethostbyname(socket.gethostname())
    return ""


def _gather(
    place: Place, mine: dict[str, Any], *, server: socket.socket, timeout: float
) -> tuple[dict[int, Wire], dict[str, Any]]:
    """Process 0: waits for all the others, and tells them all."""
    with server:
        arrived = list(_arrivals(server, place.count - 1, timeout=timeout))
    try:
        said = [mine, *(hello for _, hello in arrived)]
        _check(said, timeout=timeout)
        welcome = _welcome(sorted(said, key=lambda hello: hello["process"]))
    except ConfigError as error:
        for wire, _ in arrived:
            with contextlib.suppress(WireError):
                wire.send(refused=str(error))
            wire.close()
        raise
    for wire, _ in arrived:
        with contextlib.suppress(WireError):  # the supervisor finds that out
            wire.send(welcome=welcome)
    return {hello["process"]: wire for wire, hello in arrived}, welcome


def _check(said: list[dict[str, Any]], *, timeout: float) -> None:
    """Refuses processes that are too few, two of one number, or of another run."""
    first, *others = said
    for other in others:
        _compare(first, other)
    hosts: dict[int, list[str]] = {}
    for hello in said:
        hosts.setdefault(hello["process"], []).append(hello["host"])
    for index, on in hosts.items():
        if len(on) > 1:
            raise ConfigError(
                f"{_PATH}.process_id",
                f"{len(on)} processes have the same number (on {', '.join(on)})",
                got=index,
                fix="Give each its own",
            )
    missing = sorted(set(range(first["count"])) - set(hosts))
    if missing:
        raise ConfigError(
            f"{_PATH}.num_processes",
            f"fewer processes than promised came within {timeout:g} s",
            got=f"{len(said)} of {first['count']}",
            allowed=f"Missing: {', '.join(map(str, missing))}",
            fix="Start them, or raise mesh.connect_timeout",
        )


def _arrivals(server: socket.socket, count: int, *, timeout: float) -> Any:
    """Yields (wire, hello) of those that come in time; of strangers nothing."""
    end, waiting = time.monotonic() + timeout, list[Wire]()
    while count and (left := end - time.monotonic()) > 0:
        either: list[Any] = [server, *waiting]
        ready, _, _ = select.select(either, [], [], left)
        if server in ready:
            waiting.append(Wire(server.accept()[0]))
        for one in [wire for wire in waiting if wire in ready]:
            try:
                one.read()
                hellos = one.take()
            except WireError:
                hellos = [{}]
            if not hellos:
                continue
            waiting.remove(one)
            if _is_hello(hellos[0]):
                count -= 1
                yield one, hellos[0]
            else:
                one.close()
    for one in waiting:
        one.close()


def _is_hello(hello: Mapping[str, Any]) -> bool:
    kinds = {"process": int, "count": int, "host": str, "address": str}
    maps = dict.fromkeys(("config", "versions", "visible"), dict)
    return hello.get("protocol") == _PROTOCOL and all(
        isinstance(hello.get(name), kind) for name, kind in (kinds | maps).items()
    )


def _compare(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Refuses a process that is to run something else."""
    who = f"process {theirs['process']} ({theirs['host']})"
    if theirs["count"] != mine["count"]:
        raise ConfigError(
            f"{_PATH}.num_processes",
            f"{who} was told that there are {theirs['count']} processes, "
            f"process 0 ({mine['host']}) that there are {mine['count']}",
            fix="Give all of them one number",
        )
    for what, verb in (("versions", "runs"), ("config", "has")):
        one, other = mine[what], theirs[what]
        odd = sorted(k for k in {*one, *other} if one.get(k) != other.get(k))
        if odd:
            shown = ", ".join(odd[:3]) + (", ..." if len(odd) > 3 else "")
            raise ConfigError(
                _PATH,
                f"{who} {verb} other {what} than process 0 ({mine['host']}): {shown}",
                fix="Launch all of them with one config and one environment",
            )


def _welcome(said: list[dict[str, Any]]) -> dict[str, Any]:
    """What all are told; refuses what JAX would fail over later."""
    hosts = [hello["host"] for hello in said]
    if len(set(hosts)) > 1:
        for hello in said:
            if hello["address"].startswith("127."):
                raise ConfigError(
                    _PATH,
                    f"the name of {hello['host']} is that of a loopback address there "
                    f"({hello['address']}), at which no other host can reach it",
                    fix=f"Mend /etc/hosts on {hello['host']}",
                )
    return {
        "hosts": hosts,
        "devices": [_share_devices(hello, said) for hello in said],
        "thread_pool": said[0]["thread_pool"],
    }


def _share_devices(
    mine: Mapping[str, Any], said: list[dict[str, Any]]
) -> list[int] | None:
    """Processes on one host that see the same accelerators take one each, in order.

    Where JAX_LOCAL_DEVICE_IDS says what one takes, that holds.
    """
    beside = [
        hello["process"]
        for hello in said
        if (hello["host"], hello["visible"]) == (mine["host"], mine["visible"])
    ]
    if len(beside) == 1 or mine["visible"].get("JAX_LOCAL_DEVICE_IDS"):
        return None
    return [beside.index(mine["process"])]


def _join(
    place: Place, mine: Mapping[str, Any], *, timeout: float
) -> tuple[Wire, dict[str, Any]]:
    """Another process than 0: finds process 0, and hears what it says."""
    wire = _connect(place, timeout=timeout)
    try:
        wire.send(**mine)
        answer = wire.receive(timeout + 5)
    except WireError as error:
        wire.close()
        raise ConfigError(
            _ADDRESS,
            f"what listens there is not process 0 of this run, or it ended ({error})",
            got=place.address,
        ) from error
    if "welcome" not in answer:
        wire.close()
        raise _RefusedError(str(answer.get("refused", "process 0 said nothing")))
    return wire, answer["welcome"]


def _connect(place: Place, *, timeout: float) -> Wire:
    assert place.host is not None
    end, why = time.monotonic() + timeout, "nobody answers"
    while time.monotonic() < end:
        left = max(end - time.monotonic(), _PAUSE)
        try:
            to = (place.host, place.port)
            return Wire(socket.create_connection(to, min(left, 5.0)))
        except OSError as error:
            why = error.strerror or str(error)
            time.sleep(_PAUSE)
    raise ConfigError(
        _ADDRESS,
        f"no answer from process 0 within {timeout:g} s: {why}",
        got=place.address,
        fix="Start process 0 there, or raise mesh.connect_timeout",
    )
