# SPDX-License-Identifier: Apache-2.0
"""Where this machine is not the one of a record, and which of it can change bits."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from runner.machine import MAX_ISA, parse_flags

__all__ = ["Cause", "Difference", "compare_environments"]


class Cause(StrEnum):
    """What a difference amounts to, the gravest first."""

    GENERATOR = "another generator"
    PLATFORM = "another platform"
    MESH = "another number of devices or processes"
    FLAG = "another flag"
    POOL = "another thread pool"
    VERSION = "another version"
    CODE = "another commit of the code"
    NONE = "no cause of another bit"


@dataclass(frozen=True)
class Difference:
    """One fact that is not as recorded.

    Args:
        path: Where it stands in `run.json`.
        recorded: Its value there.
        here: Its value in this process.
        cause: What it amounts to.
    """

    path: str
    recorded: Any
    here: Any
    cause: Cause

    @property
    def rounds(self) -> bool:
        """Whether the same program may round otherwise for it."""
        return self.cause not in (Cause.GENERATOR, Cause.CODE, Cause.NONE)

    def __str__(self) -> str:
        return f"{self.cause} ({self.path}: {_spell_both(self.recorded, self.here)})"

    def to_plain(self) -> dict[str, Any]:
        """Itself as plain data."""
        return {**asdict(self), "cause": str(self.cause)}


# By their paths or what these begin with; the first that fits.
_CAUSES = {
    "rng.canary": Cause.GENERATOR,
    "platform.backend": Cause.PLATFORM,
    "platform.device_kind": Cause.PLATFORM,
    "platform.machine": Cause.PLATFORM,
    "platform.vector": Cause.PLATFORM,
    "platform.cpu_count": Cause.NONE,  # `thread_pool` is what counts
    "platform.cpu": Cause.PLATFORM,
    "platform.device_count": Cause.MESH,
    "platform.process_count": Cause.MESH,
    "platform.thread_pool": Cause.POOL,
    "platform": Cause.FLAG,
    "versions.jax-runner": Cause.CODE,
    "versions.runner": Cause.CODE,
    "versions.python": Cause.NONE,
    "versions.hydra-core": Cause.NONE,
    "versions.omegaconf": Cause.NONE,
    "versions.orbax-checkpoint": Cause.NONE,
    "versions": Cause.VERSION,
    "git": Cause.CODE,
}


def compare_environments(
    recorded: Mapping[str, Any], here: Mapping[str, Any]
) -> tuple[Difference, ...]:
    """Differences of `versions`, `platform`, `git` and `rng.canary`, gravest first.

    Args:
        recorded: A run's `run.json`.
        here: The same of a run of this process.
    """
    flat = [dict(_leaves(_facts(manifest))) for manifest in (recorded, here)]
    found = []
    for path in dict.fromkeys([*flat[0], *flat[1]]):
        before, now = (facts.get(path) for facts in flat)
        if before != now:
            found.append(Difference(path, before, now, _cause(path)))
    return tuple(sorted(found, key=lambda each: list(Cause).index(each.cause)))


def _facts(manifest: Mapping[str, Any]) -> dict[str, Any]:
    platform = dict(manifest["platform"])
    flags = parse_flags(str(platform.pop("xla_flags", "")))
    variables = dict(platform.get("environment") or {})
    # both are set to make this process like the record's: what they make is compared
    variables.pop("NPROC", None)
    flags.pop(MAX_ISA, None)
    return {
        "rng": {"canary": manifest["rng"].get("canary")},
        "platform": {**platform, "environment": variables, "xla_flags": flags},
        "versions": manifest["versions"],
        "git": manifest["git"],
    }


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and path != "rng.canary":
        for key, child in value.items():
            yield from _leaves(child, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _cause(path: str) -> Cause:
    for begin, cause in _CAUSES.items():
        if path == begin or path.startswith(f"{begin}."):
            return cause
    return Cause.NONE


def _spell_both(recorded: Any, here: Any) -> str:
    if isinstance(recorded, Mapping) and isinstance(here, Mapping):  # the canary
        names = sorted({*recorded, *here})
        other = [name for name in names if recorded.get(name) != here.get(name)]
        return f"other {', '.join(other)}"
    return f"{_spell(recorded)}, here {_spell(here)}"


def _spell(value: Any) -> str:
    return "not set" if value is None else str(value)
