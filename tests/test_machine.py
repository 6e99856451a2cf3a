# SPDX-License-Identifier: Apache-2.0
"""What XLA finds on a machine: our account of it against XLA's own threads."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from runner import machine
from runner.machine import (
    Vector,
    forced_devices,
    free_memory,
    is_on,
    parse_flags,
    read_cpu_model,
    read_flags_text,
    read_vector,
    size_thread_pool,
    spell_isa,
)

X86_FLAGS = {
    Vector.AVX512: "fpu sse4_2 avx avx2 avx512f avx512bw avx512dq avx512vl",
    Vector.AVX2: "fpu sse4_2 avx avx2 avx512f",
    Vector.AVX: "fpu sse4_2 avx",
    Vector.SSE: "fpu sse4_2",
}

COUNT = """
import os, jax
from runner.machine import size_thread_pool
jax.jit(lambda x: x + 1)(1.0).block_until_ready()
tasks = [open(f"/proc/self/task/{t}/comm").read().strip()
         for t in os.listdir("/proc/self/task")]
print(tasks.count("tf_XLAEigen"), size_thread_pool(devices=jax.local_device_count()))
"""


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XLA_FLAGS", "NPROC", "JAX_NUM_CPU_DEVICES"):
        monkeypatch.delenv(name, raising=False)


def cpuinfo(tmp_path: Path, monkeypatch: Any, text: str, kind: str = "x86_64") -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(text)
    monkeypatch.setattr(machine, "_CPUINFO", path)
    monkeypatch.setattr(machine.platform, "machine", lambda: kind)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts on Linux")
@pytest.mark.parametrize(
    "env",
    [
        {},
        {"NPROC": "2"},
        {"NPROC": " +3 "},
        {"NPROC": "0"},
        {"NPROC": "-3"},
        {"NPROC": "3x"},
        {"NPROC": "99999999999"},
        {"NPROC": "300"},
        {"NPROC": "2", "JAX_NUM_CPU_DEVICES": "6"},
        {"NPROC": "9", "XLA_FLAGS": "--xla_force_host_platform_device_count=5"},
    ],
    ids=str,
)
def test_the_pool_is_the_one_that_xla_makes(user_env: Any, env: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", COUNT],
        env={**user_env, **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    theirs, ours = map(int, done.stdout.split())
    assert theirs == ours


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("", {}),
        ("--a=1 --b", {"a": "1", "b": "true"}),
        ("--a=1\n  --a=2", {"a": "2"}),
        ("""--a='x y' --b="z" """, {"a": "x y", "b": "z"}),
        ("--a='x", {"a": "'x"}),
        ("--a=", {"a": ""}),
        ("a=1 -b=2", {}),
    ],
)
def test_flags(text: str, flags: dict[str, str]) -> None:
    assert parse_flags(text) == flags


@pytest.mark.parametrize(
    ("value", "on"),
    [("true", True), ("TRUE", True), ("1", True), ("False", False), ("0", False)],
)
def test_a_flag_is_on(value: str, on: bool) -> None:
    assert is_on({"a": value}, "a") is on
    assert is_on({"a": value}, "b") is None


def test_flags_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "flags"
    path.write_text("--xla_force_host_platform_device_count=3\n")
    monkeypatch.setenv("XLA_FLAGS", str(path))
    assert parse_flags(read_flags_text()) == {
        "xla_force_host_platform_device_count": "3"
    }
    assert forced_devices() == 3
    monkeypatch.setenv("XLA_FLAGS", str(tmp_path / "none"))
    assert read_flags_text() == str(tmp_path / "none")
    assert forced_devices() == 1


def test_forced_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert forced_devices() == 1
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=3")
    assert forced_devices() == 3
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "5")
    assert forced_devices() == 5
    assert size_thread_pool(devices=300) == 256


@pytest.mark.parametrize("vector", X86_FLAGS, ids=str)
def test_vector_of_x86(vector: Vector, tmp_path: Path, monkeypatch: Any) -> None:
    text = f"model name\t: A CPU\nflags\t\t: {X86_FLAGS[vector]}\n"
    cpuinfo(tmp_path, monkeypatch, text)
    assert read_vector() is vector
    assert read_cpu_model() == "A CPU"


def test_vector_of_others(tmp_path: Path, monkeypatch: Any) -> None:
    cpuinfo(tmp_path, monkeypatch, "Features\t: asimd sve\n", "aarch64")
    assert read_vector() is Vector.NEON
    cpuinfo(tmp_path, monkeypatch, "", "x86_64")
    assert read_vector() is Vector.UNKNOWN
    cpuinfo(tmp_path, monkeypatch, "", "riscv64")
    assert read_vector() is Vector.UNKNOWN
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "none")
    assert read_cpu_model()


@pytest.mark.parametrize(
    ("isa", "left"),
    [
        ("SSE4_2", Vector.SSE),
        ("avx", Vector.AVX),
        ("AVX2", Vector.AVX2),
        ("AVX512", Vector.AVX2),  # wider than the CPU
        ("AMX", Vector.AVX2),
        ("NEON", Vector.AVX2),
        ("nonsense", Vector.AVX2),
    ],
)
def test_the_flag_narrows(
    isa: str, left: Vector, tmp_path: Path, monkeypatch: Any
) -> None:
    cpuinfo(tmp_path, monkeypatch, f"flags : {X86_FLAGS[Vector.AVX2]}\n")
    monkeypatch.setenv("XLA_FLAGS", f"--xla_cpu_max_isa={isa}")
    assert read_vector() is left


def test_widths_are_in_order() -> None:
    order = [Vector.SSE, Vector.AVX, Vector.AVX2, Vector.AVX512]
    for i, a in enumerate(order):
        for j, b in enumerate(order):
            assert a.is_narrower(b) is (i < j)
        assert not a.is_narrower(Vector.NEON)
        assert not Vector.UNKNOWN.is_narrower(a)
    assert [spell_isa(v) for v in order] == ["SSE4_2", "AVX", "AVX2", None]


def test_memory_that_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's cache of files is; what the control group does not allow is not."""
    monkeypatch.setattr(machine, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    assert free_memory() > 0  # of a system without either
    text = "MemFree:  100 kB\nMemAvailable:  9000 kB\n"
    (tmp_path / "meminfo").write_text(text)
    assert free_memory() == 9000 * 1024
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory() == 9000 * 1024
    (tmp_path / "memory.max").write_text("5000\n")
    assert free_memory() == 4000
    (tmp_path / "memory.max").write_text("500\n")
    assert free_memory() == 0
