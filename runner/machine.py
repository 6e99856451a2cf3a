# SPDX-License-Identifier: Apache-2.0
"""What XLA finds on this machine: its flags, its CPU pool, its vector width. No JAX.

All of it is part of a result's bits, and none of it is in the config.
"""

import os
import platform
import re
import shlex
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path

__all__ = [
    "MAX_ISA",
    "MOST_THREADS",
    "Vector",
    "count_cores",
    "forced_devices",
    "free_memory",
    "is_on",
    "parse_flags",
    "read_cpu_model",
    "read_flags_text",
    "read_vector",
    "size_thread_pool",
    "spell_isa",
]

MAX_ISA = "xla_cpu_max_isa"
_FORCED = "xla_force_host_platform_device_count"
MOST_THREADS = 256  # of XLA's own; a larger NPROC gives no more
_INTEGER = re.compile(r"\s*[+-]?\d{1,12}\s*")
_CPUINFO = Path("/proc/cpuinfo")
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")  # ours, as a container sees it


class Vector(StrEnum):
    """The widest instruction set that XLA may use; of x86, the narrowest first."""

    SSE = "sse"
    AVX = "avx"
    AVX2 = "avx2"
    AVX512 = "avx512"
    NEON = "neon"
    UNKNOWN = "unknown"

    def is_narrower(self, other: "Vector") -> bool:
        """Whether both are of x86, and this is the narrower one."""
        return self in _X86 and other in _X86 and _X86.index(self) < _X86.index(other)


_X86 = (Vector.SSE, Vector.AVX, Vector.AVX2, Vector.AVX512)
_ISA = {Vector.SSE: "SSE4_2", Vector.AVX: "AVX", Vector.AVX2: "AVX2"}


def read_flags_text() -> str:
    """XLA_FLAGS as XLA reads it: what does not begin with `-` names a file of flags."""
    text = os.environ.get("XLA_FLAGS", "")
    if not text.strip() or text.lstrip().startswith("-"):
        return text
    try:
        return Path(text).read_text()
    except (OSError, UnicodeDecodeError):
        return text  # XLA will end the process over it, in its own words


def parse_flags(text: str) -> dict[str, str]:
    """`--name=value` flags by name; the last of a name counts, `--name` is `true`."""
    try:
        words = shlex.split(text)
    except ValueError:
        words = text.split()
    pairs = (word[2:].partition("=") for word in words if word.startswith("--"))
    return {name: value if equals else "true" for name, equals, value in pairs}


def is_on(flags: Mapping[str, str], name: str) -> bool | None:
    """Whether a flag is on; None where it is not given."""
    value = flags.get(name)
    return None if value is None else value.lower() in ("true", "1")


def count_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def free_memory() -> int:
    """Bytes that programs may still take: of the machine, or of our control group.

    What the kernel would give up for them, such as its cache of files, is free.
    """
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        if found := re.search(r"MemAvailable:\s+(\d+) kB", _MEMINFO.read_text()):
            free = int(found.group(1)) * 1024
        most, used = ((_CGROUP / f"memory.{n}").read_text() for n in ("max", "current"))
        free = min(free, int(most) - int(used))
    except (OSError, ValueError):  # elsewhere than on Linux; "max" is no bound
        pass
    return max(free, 0)


def forced_devices() -> int:
    """CPU devices that the environment asks for: 1 if it asks for none."""
    flag = parse_flags(read_flags_text()).get(_FORCED, "")
    asked = (_integer(os.environ.get("JAX_NUM_CPU_DEVICES", "")), _integer(flag))
    return next((number for number in asked if number and number > 0), 1)


def size_thread_pool(*, devices: int) -> int:
    """Threads of the pool that XLA cuts its work for on CPU.

    pool = min(256, max(devices, NPROC, 1)), or the usable cores for NPROC where that
    is unset or no integer

    Args:
        devices: CPU devices of this process.
    """
    asked = _integer(os.environ.get("NPROC", ""))
    return min(MOST_THREADS, max(devices, count_cores() if asked is None else asked, 1))


def _integer(text: str) -> int | None:
    """What XLA takes for a number: a decimal one of 32 bits."""
    if not _INTEGER.fullmatch(text) or not -(2**31) <= int(text) < 2**31:
        return None
    return int(text)


def read_vector() -> Vector:
    """The widest instruction set of this CPU that `--xla_cpu_max_isa` leaves to XLA."""
    widest = _widest_here()
    asked = parse_flags(read_flags_text()).get(MAX_ISA, "").upper()
    named = {isa: vector for vector, isa in _ISA.items()}
    limit = named.get(asked, widest)
    return limit if limit.is_narrower(widest) else widest


def spell_isa(vector: Vector) -> str | None:
    """What `--xla_cpu_max_isa` calls it; None where there is nothing to narrow to."""
    return _ISA.get(vector)


def _widest_here() -> Vector:
    machine = platform.machine().lower()
    if machine in ("arm64", "aarch64"):
        return Vector.NEON
    features = set(_cpuinfo("flags").split())
    if machine not in ("x86_64", "amd64") or not features:
        return Vector.UNKNOWN
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= features:
        return Vector.AVX512
    known = (v for v in (Vector.AVX2, Vector.AVX) if str(v) in features)
    return next(known, Vector.SSE)


def read_cpu_model() -> str:
    """The CPU's name, as the system gives it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(name: str) -> str:
    """The first value of a row of /proc/cpuinfo; empty where there is none."""
    try:
        text = _CPUINFO.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
    rows = (line.partition(":") for line in text.splitlines())
    return next((value.strip() for key, _, value in rows if key.strip() == name), "")
