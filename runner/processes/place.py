# SPDX-License-Identifier: Apache-2.0
"""Which of the processes of a run this one is, and where the first one is found."""

from dataclasses import dataclass, replace

from runner.errors import ConfigError
from runner.spec import DistributedSpec, MeshSpec, RunSpec

__all__ = ["Place", "find_place", "in_one_process"]

_PATH = "mesh.distributed"
_MOST_HERE = 64  # processes; a record may be a stranger's
_CLUSTERS = "SLURM, Open MPI, Kubernetes, Cloud TPU"


@dataclass(frozen=True)
class Place:
    """A process among those of a run.

    Args:
        host: Where process 0 listens; None where it launches all the others itself.
        port: At which port.
        count: Number of processes.
        index: Number of this one, from 0.
        is_launched: Whether process 0 has launched it; then it has no terminal.
    """

    host: str | None
    port: int
    count: int
    index: int
    is_launched: bool = False

    @property
    def address(self) -> str:
        """`host:port` of process 0."""
        host = f"[{self.host}]" if self.host and ":" in self.host else self.host
        return f"{host}:{self.port}"


def find_place(mesh: MeshSpec) -> Place | None:
    """The place that `mesh.distributed` gives this process; None where it is alone.

    Raises:
        ConfigError: there is no cluster, or too little is said of one.
    """
    asked = mesh.distributed
    if asked is None:
        return None
    place = _detect(mesh) if asked == "auto" else _place_of(asked)
    if place.count == 1:
        return None
    if not 0 <= place.index < place.count:
        raise ConfigError(
            f"{_PATH}.process_id",
            f"must be below num_processes, {place.count}",
            got=place.index,
            fix=f"Give the processes the numbers 0 to {place.count - 1}",
        )
    return place


def in_one_process(spec: RunSpec) -> RunSpec:
    """The run with all its forced devices in this process, to look at it."""
    mesh = spec.mesh
    if mesh.distributed is None or mesh.distributed == "auto":
        return replace(spec, mesh=replace(mesh, distributed=None))
    devices = mesh.host_devices and mesh.host_devices * mesh.distributed.num_processes
    return replace(spec, mesh=replace(mesh, distributed=None, host_devices=devices))


def _place_of(asked: DistributedSpec) -> Place:
    address, index = asked.coordinator_address, asked.process_id
    if address is None and index is None:
        if asked.num_processes > _MOST_HERE:
            raise ConfigError(
                f"{_PATH}.num_processes",
                "too many to launch on this machine",
                got=asked.num_processes,
                allowed=f"Allowed: at most {_MOST_HERE}",
                fix=f"Set {_PATH}.coordinator_address and {_PATH}.process_id",
            )
        return Place(None, 0, asked.num_processes, 0)
    if address is None:
        raise ConfigError(
            f"{_PATH}.coordinator_address",
            "must say where process 0 listens",
            fix=f"Set {_PATH}.coordinator_address=HOST:PORT; or {_PATH}.process_id=null"
            ", which launches all processes on this machine",
        )
    if index is None:
        raise ConfigError(
            f"{_PATH}.process_id",
            "must say which process this is",
            allowed=f"Allowed: from 0 to {asked.num_processes - 1}",
            fix=f"Set {_PATH}.process_id=..., another one in each; "
            f"or {_PATH}.coordinator_address=null, which launches all on this machine",
        )
    host, port = _split(address, path=f"{_PATH}.coordinator_address")
    return Place(host, port, asked.num_processes, index)


def _split(address: str, *, path: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        fix = "Give it a port, as in node1:29400"
        raise ConfigError(path, "must be HOST:PORT", got=address, fix=fix)
    return host.removeprefix("[").removesuffix("]"), int(port)


def _detect(mesh: MeshSpec) -> Place:
    """What JAX finds in the environment that a cluster's launcher has made."""
    from jax._src import clusters

    try:
        found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, int(mesh.connect_timeout)
        )
    except Exception as error:  # of a cluster's own client, whatever it raises
        what = f"auto found a cluster and could not ask it ({error})"
        raise ConfigError(_PATH, what, fix=_by_hand()) from error
    address, count, index, _ = found
    if address is None or count is None or index is None:
        raise ConfigError(
            _PATH,
            "auto finds no cluster here",
            got="auto",
            allowed=f"Known: {_CLUSTERS}",
            fix=_by_hand(),
        )
    host, port = _split(address, path=_PATH)
    return Place(host, port, count, index)


def _by_hand() -> str:
    names = "{coordinator_address: HOST:PORT, num_processes: N, process_id: I}"
    return f"Set {_PATH}=null to run in one process, or {_PATH}={names}"
