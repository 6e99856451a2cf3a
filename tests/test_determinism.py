# SPDX-License-Identifier: Apache-2.0
"""What a process is set up with before JAX's first call, and the bits that follow."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest
from conftest import Run

from runner import determinism, machine
from runner.compile import compile_run
from runner.determinism import restore_platform, settle_backend
from runner.errors import ConfigError
from runner.records.environment import read_platform
from runner.spec import Determinism

STRICT = "--xla_gpu_deterministic_ops=true"
RESTORED = """
import json, sys
from runner.determinism import restore_platform
made = restore_platform(json.load(open(sys.argv[1]))["platform"])
assert "jax" not in sys.modules
print(json.dumps(made))
from runner.cli import main
main(sys.argv[2:])
"""

shared = pytest.mark.xdist_group("determinism")


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A process of an AVX2 machine without settings, and without a backend."""
    for name in ("XLA_FLAGS", "NPROC", "JAX_NUM_CPU_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(machine, "_widest_here", lambda: machine.Vector.AVX2)
    monkeypatch.setattr(determinism, "has_backend", lambda: False)

    def set_env(**env: str) -> None:
        for name, value in env.items():
            monkeypatch.setenv(name, value)

    return set_env


# Restoring ---------------------------------------------------------------------------


def test_no_jax_is_imported() -> None:
    code = "import sys, runner.determinism; print('jax' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    ("platform", "made"),
    [
        ({"thread_pool": 3}, {"NPROC": "3"}),
        ({"thread_pool": 256}, {"NPROC": "256"}),
        ({"vector": "sse"}, {"--xla_cpu_max_isa": "SSE4_2"}),
        ({"vector": "avx"}, {"--xla_cpu_max_isa": "AVX"}),
        (
            {"thread_pool": 1, "vector": "avx"},
            {"NPROC": "1", "--xla_cpu_max_isa": "AVX"},
        ),
        ({"vector": "avx2"}, {}),
        ({"vector": "avx512"}, {}),  # nothing widens a CPU
        ({"vector": "neon"}, {}),
        ({"vector": "unknown"}, {}),
        ({}, {}),
    ],
)
def test_what_is_restored(
    bare: Any, platform: dict[str, Any], made: dict[str, str]
) -> None:
    assert restore_platform(platform) == made
    flags = made.get("--xla_cpu_max_isa")
    expected = None if flags is None else f"--xla_cpu_max_isa={flags}"
    assert os.environ.get("XLA_FLAGS") == expected
    assert os.environ.get("NPROC") == made.get("NPROC")


@pytest.mark.parametrize(
    "platform",
    [
        {"thread_pool": value}
        for value in (0, -1, 257, 2**70, True, 2.0, "4", "4 --x", None, [4], {})
    ]
    + [
        {"vector": value}
        for value in ("SSE", "sse --xla_dump_to=/", "AVX", 1, None, ["sse"], {})
    ]
    + [None, [], "thread_pool"],
    ids=str,
)
def test_a_stranger_sets_nothing(bare: Any, platform: Any) -> None:
    before = dict(os.environ)
    assert restore_platform(platform) == {}
    assert dict(os.environ) == before


def test_a_users_own_settings_stand(bare: Any) -> None:
    bare(NPROC="7", XLA_FLAGS="--xla_cpu_max_isa=AVX2")
    assert restore_platform({"thread_pool": 3, "vector": "sse"}) == {}
    assert os.environ["NPROC"] == "7"
    assert os.environ["XLA_FLAGS"] == "--xla_cpu_max_isa=AVX2"


def test_a_flag_is_added_to_others(bare: Any, tmp_path: Path) -> None:
    bare(XLA_FLAGS="--xla_a=1")
    restore_platform({"vector": "sse"})
    assert os.environ["XLA_FLAGS"] == "--xla_a=1 --xla_cpu_max_isa=SSE4_2"
    file = tmp_path / "flags"
    file.write_text("--xla_b=1\n")
    bare(XLA_FLAGS=str(file))
    restore_platform({"vector": "sse"})
    assert os.environ["XLA_FLAGS"] == "--xla_b=1 --xla_cpu_max_isa=SSE4_2"


def test_too_late_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NPROC", raising=False)
    running = read_platform()  # makes the backend
    assert restore_platform(running) == {}
    before = dict(os.environ)
    with pytest.raises(RuntimeError, match="has a backend"):
        restore_platform({**running, "thread_pool": running["thread_pool"] + 1})
    assert dict(os.environ) == before
    if running["vector"] in ("avx", "avx2", "avx512"):
        with pytest.raises(RuntimeError, match="has a backend"):
            restore_platform({**running, "vector": "sse"})
        assert dict(os.environ) == before


def train(run: Run, overrides: list[str], **env: str) -> dict[str, Any]:
    done = run(*overrides, env=env)
    assert done.returncode == 0, done.stderr
    return read(done.stdout)


def read(stdout: str) -> dict[str, Any]:
    path = Path(stdout.splitlines()[-1]) / "run.json"
    return {"path": path, **json.loads(path.read_text())}


def train_restored(
    recorded: dict[str, Any], overrides: list[str], user_env: Any, cwd: Path
) -> tuple[dict[str, str], dict[str, Any]]:
    """In a process that was set up as the record says."""
    done = subprocess.run(
        [sys.executable, "-c", RESTORED, str(recorded["path"]), *overrides],
        cwd=cwd,
        env=user_env,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[0]), read(done.stdout)


@shared
def test_the_pool_is_part_of_the_bits(
    runner: Run, user_env: Any, tmp_path: Path, pool_sensitive_overrides: list[str]
) -> None:
    one = train(runner, pool_sensitive_overrides, NPROC="1")
    four = train(runner, pool_sensitive_overrides, NPROC="4")
    pools = one["platform"]["thread_pool"], four["platform"]["thread_pool"]
    assert pools == (1, 4)
    assert one["digests"]["keys"] == four["digests"]["keys"]
    if one["digests"]["params"] == four["digests"]["params"]:
        pytest.skip("on this CPU the pool changes no bit of this program")
    for recorded in (one, four):
        made, again = train_restored(
            recorded, pool_sensitive_overrides, user_env, tmp_path
        )
        assert made == {"NPROC": str(recorded["platform"]["thread_pool"])}
        assert again["digests"]["params"] == recorded["digests"]["params"]
        assert again["platform"]["environment"] == {"NPROC": made["NPROC"]}


@shared
def test_the_vector_width_is_part_of_the_bits(
    runner: Run, user_env: Any, tmp_path: Path, pool_sensitive_overrides: list[str]
) -> None:
    wide = train(runner, pool_sensitive_overrides)
    if wide["platform"]["vector"] not in ("avx", "avx2", "avx512"):
        pytest.skip("there is nothing to narrow on this CPU")
    flag = "--xla_cpu_max_isa=SSE4_2"
    narrow = train(runner, pool_sensitive_overrides, XLA_FLAGS=flag)
    assert narrow["platform"]["vector"] == "sse"
    assert narrow["digests"]["params"] != wide["digests"]["params"]
    made, again = train_restored(narrow, pool_sensitive_overrides, user_env, tmp_path)
    assert made["--xla_cpu_max_isa"] == "SSE4_2"
    assert again["digests"]["params"] == narrow["digests"]["params"]


# Strict ------------------------------------------------------------------------------


@pytest.fixture
def strict(make_spec: Any) -> Any:
    return make_spec("+experiment=dropout", "determinism=strict")


def test_default_sets_nothing(bare: Any, strict: Any) -> None:
    bare(XLA_FLAGS="--xla_gpu_deterministic_ops=false")
    settle_backend(replace(strict, determinism=Determinism.DEFAULT))
    assert os.environ["XLA_FLAGS"] == "--xla_gpu_deterministic_ops=false"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", STRICT),
        ("--xla_a=1", f"--xla_a=1 {STRICT}"),
        ("--xla_gpu_deterministic_ops", "--xla_gpu_deterministic_ops"),
        (f"--xla_gpu_deterministic_ops=0 {STRICT}",) * 2,  # the last one counts
    ],
)
def test_strict_sets_the_flag_of_a_gpu(
    bare: Any, strict: Any, before: str, after: str
) -> None:
    bare(XLA_FLAGS=before)
    settle_backend(strict)
    assert os.environ["XLA_FLAGS"] == after


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--xla_gpu_deterministic_ops=false", "xla_gpu_deterministic_ops=false"),
        (f"{STRICT} --xla_gpu_deterministic_ops=0", "xla_gpu_deterministic_ops=false"),
        (
            "--xla_gpu_exclude_nondeterministic_ops=False",
            "xla_gpu_exclude_nondeterministic_ops=false",
        ),
        ("--xla_cpu_enable_fast_math", "xla_cpu_enable_fast_math=true"),
        ("--xla_cpu_enable_fast_math=1", "xla_cpu_enable_fast_math=true"),
    ],
)
def test_strict_refuses_what_breaks_it(
    bare: Any, strict: Any, flags: str, named: str
) -> None:
    bare(XLA_FLAGS=flags)
    with pytest.raises(ConfigError, match=re.escape(f"--{named}")) as caught:
        settle_backend(strict)
    assert caught.value.path == "determinism"
    assert os.environ["XLA_FLAGS"] == flags


def test_strict_comes_before_a_gpu_is_started(
    bare: Any, strict: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(determinism, "has_backend", lambda: True)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(ConfigError, match="JAX has started without it"):
        settle_backend(strict)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    settle_backend(strict)
    assert "XLA_FLAGS" not in os.environ


@shared
def test_strict_on_the_command_line(
    runner: Run, pool_sensitive_overrides: list[str]
) -> None:
    """XLA without a GPU takes the flag, and the bits are the same."""
    strict = [*pool_sensitive_overrides, "determinism=strict"]
    plain, kept = train(runner, pool_sensitive_overrides), train(runner, strict)
    assert kept["platform"]["xla_flags"] == STRICT
    assert kept["guarantee"]["level"] == "bit-exact"
    assert kept["digests"]["params"] == plain["digests"]["params"]


def test_strict_refuses_a_flag_on_the_command_line(runner: Run) -> None:
    words = ("+experiment=dropout", "determinism=strict")
    env = {"XLA_FLAGS": "--xla_cpu_enable_fast_math=true"}
    for command in (words, ("plan", *words)):
        done = runner(*command, env=env)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith("error: determinism: strict can't be kept under")
        assert "--xla_cpu_enable_fast_math=true" in done.stderr


def test_strict_is_a_choice(make_spec: Any) -> None:
    assert make_spec("+experiment=dropout").determinism is Determinism.DEFAULT
    with pytest.raises(ConfigError, match=r"determinism: not a choice"):
        make_spec("+experiment=dropout", "determinism=exact")


# Precision ---------------------------------------------------------------------------


@pytest.mark.promotes
@pytest.mark.parametrize(
    ("precision", "word"),
    [(None, "DEFAULT"), ("default", "DEFAULT"), ("high", "HIGH"), ("highest",) * 2],
)
@pytest.mark.parametrize(
    "overrides", [("+experiment=dropout",), ("+experiment=dropout_tutorial",)], ids=str
)
def test_products_carry_the_precision(
    make_spec: Any, overrides: tuple[str, ...], precision: str | None, word: str
) -> None:
    """In every program that multiplies matrices, and in each product of it."""
    value = "null" if precision is None else precision
    spec = make_spec(*overrides, f"train.matmul_precision={value}")
    program = compile_run(spec)
    texts = lowered_texts(program)
    found = [
        set(re.findall(r"precision = \[(\w+), (\w+)\]", line))
        for text in texts
        for line in text.splitlines()
        if "stablehlo.dot_general" in line
    ]
    assert len(found) >= 3
    assert all(pairs == {(word.upper(),) * 2} for pairs in found)
    assert jax.config.jax_default_matmul_precision is None


def lowered_texts(program: Any) -> list[str]:
    """The programs as they go to the compiler."""
    texts: list[str] = []
    original = jax.stages.Lowered.compile

    def compile_(self: Any, *args: Any, **kwargs: Any) -> Any:
        texts.append(self.as_text())
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.stages.Lowered, "compile", compile_)
        _ = program.calls
    return texts


# What is recorded --------------------------------------------------------------------


@pytest.mark.promotes
def test_the_platform_is_plain_data(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NPROC", "XLA_FLAGS", "NCCL_ALGO"):
        monkeypatch.delenv(name, raising=False)
    platform = read_platform()
    assert json.loads(json.dumps(platform, allow_nan=False)) == platform
    assert platform["thread_pool"] == max(platform["cpu_count"], jax.device_count())
    assert platform["vector"] in set(map(str, machine.Vector))
    assert platform["cpu"]
    assert platform["autotune"] is None
    assert platform["environment"] == {}
    settings = platform["jax_config"]
    assert len(settings) == len(set(settings)) >= 20
    assert set(settings) <= set(jax.config.values)
    assert settings["jax_threefry_partitionable"] is True
    assert settings["jax_numpy_dtype_promotion"] == "standard"
    assert settings["jax_default_prng_impl"] == "threefry2x32"


def test_variables_that_change_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NPROC", raising=False)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert read_platform()["environment"] == {"NVIDIA_TF32_OVERRIDE": "0"}


def test_autotune_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.txt"
    flag = f"--xla_gpu_load_autotune_results_from={path}"
    monkeypatch.setenv("XLA_FLAGS", flag)
    assert read_platform()["autotune"] == {"path": str(path), "sha256": None}
    path.write_text("version: 3\n")
    found = read_platform()
    assert found["xla_flags"] == flag
    assert found["autotune"]["path"] == str(path)
    digest = hashlib.sha256(b"version: 3\n").hexdigest()
    assert found["autotune"]["sha256"] == digest
