# SPDX-License-Identifier: Apache-2.0
"""Key bits and losses, as they were when `tests/golden/*.json` was written.

    UPDATE_GOLDEN=1 python -m pytest tests/test_golden.py

rewrites both files. Keys are the same everywhere and always compared. Losses are
compared where all that their bits depend on is the same: backend, machine, vector
width, size of XLA's thread pool, jaxlib.
"""

import json
import os
import platform
from pathlib import Path
from typing import Any

import jax
import jaxlib
import numpy as np
import pytest

from runner.compile import compile_run
from runner.keys import (
    derive_key,
    draw_canary,
    host_generator,
    key_words,
    plan_keys,
    rng_flags,
)
from runner.ledger import expand, make_ledger, rng_of
from runner.loop import Outcome, train
from runner.parse import Frozen
from runner.records.digests import digest_leaves
from runner.records.events import TrainRecord
from runner.spec import Coordinate, Impl, Phase, RngSpec, parse_spec

GOLDEN = Path(__file__).parent / "golden"
WHY_NOT = (
    "{what}: not what tests/golden/{file} holds. {meaning} If that is meant: write it "
    "into CHANGELOG.md, then rewrite the file with UPDATE_GOLDEN=1 python -m pytest "
    "tests/test_golden.py, and commit both. Never rewrite it to make a red test green."
)
KEYS = "Runs that are recorded already would no longer reproduce: their keys move."
LOSSES = "The same program with the same keys on the same platform computes other bits."

STREAMS: dict[str, Any] = {
    "params": {"phases": ["init"]},
    "dropout": {"per": ["step"]},
    "noise": {"per": ["microbatch", "step", "epoch"], "phases": ["train", "eval"]},
    "seeded": {"per": ["step"], "seed": 7},
    "named": {"per": ["epoch"], "seed": 2**32 - 1, "derive": "name"},
    "carried": {"per": {"step": "carry"}},
    "first": {"derive": "split"},
    "second": {"derive": "split", "per": ["step"]},
    "root": {"derive": "root", "per": ["step"]},
    "shuffle": {"kind": "host", "per": ["epoch"]},
    "split": {"kind": "host", "seed": 0},
}


def read(file: str) -> Any:
    return json.loads((GOLDEN / file).read_text())


def compare(found: Any, *, file: str, what: str, meaning: str) -> None:
    """Compares one entry of a golden file, or rewrites it."""
    if os.environ.get("UPDATE_GOLDEN") == "1":
        path = GOLDEN / file
        path.parent.mkdir(exist_ok=True)
        document = read(file) if path.exists() else {}
        document[what] = found
        path.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    expected = read(file).get(what)
    message = WHY_NOT.format(what=what, file=file, meaning=meaning)
    assert found == expected, message


def hexes(words: list[int]) -> str:
    return " ".join(f"{word:08x}" for word in words)


# Keys -----------------------------------------------------------------------------


def rng_spec(**fields: Any) -> RngSpec:
    node = {"_target_": "a.B"}
    data = {"rng": {**fields, "streams": STREAMS}}
    rng: RngSpec = parse_spec({"model": node, "optimizer": node, **data}).rng
    return rng


def derivations(rng: RngSpec) -> dict[str, str]:
    """Each stream in each phase, at some steps."""
    plan, found = plan_keys(rng), {}
    has = frozenset(Coordinate)
    for phase in Phase:
        for name, stream in plan.in_phase(phase).items():
            for step in (0, 3):
                at = {"step": step, "epoch": step // 2, "microbatch": 1}
                ops = stream.ops(phase, has)
                key = derive_key(ops, impl=plan.impl, coordinates=at)
                found[f"{phase} {name} {step}"] = hexes(key_words(key))
    for name in ("shuffle", "split"):
        for epoch in (0, 1):
            order = host_generator(plan.stream(name), epoch=epoch).permutation(8)
            found[f"host {name} {epoch}"] = " ".join(map(str, order))
    return found


@pytest.mark.parametrize("partitionable", [True, False])
@pytest.mark.parametrize("impl", list(Impl))
@pytest.mark.parametrize("seed", [0, 2**31])
def test_derivations(seed: int, impl: Impl, partitionable: bool) -> None:
    rng = rng_spec(seed=seed, impl=str(impl), partitionable=partitionable)
    with rng_flags(rng):
        found = derivations(rng)
    what = f"derivations seed={seed} impl={impl} partitionable={partitionable}"
    compare(found, file="keys.json", what=what, meaning=KEYS)


@pytest.mark.parametrize("experiment", ["dropout", "batch_norm"])
def test_ledger(make_spec: Any, experiment: str) -> None:
    program = compile_run(make_spec(f"+experiment={experiment}", "optimizer=sgd"))
    ledger = make_ledger(program)
    with rng_flags(rng_of(ledger)):
        found = {
            f"step {step}": [
                [
                    e["phase"],
                    e["stream"],
                    "/".join(e["path"]),
                    e["call"],
                    hexes(e["key"]),
                ]
                for draw in ledger["draws"]
                for e in expand(ledger, draw, step=step)
            ]
            for step in (0, 1, 1000)
        }
    compare(found, file="keys.json", what=f"ledger {experiment}", meaning=KEYS)


@pytest.mark.parametrize("impl", list(Impl))
def test_canary(impl: Impl) -> None:
    """Its bits and integers; floats may round otherwise elsewhere."""
    with rng_flags(RngSpec(impl=impl, streams=Frozen())):
        canary = draw_canary(str(impl))
    found = {name: canary[name] for name in ("bits", "permutation")}
    compare(found, file="keys.json", what=f"canary {impl}", meaning=KEYS)


# Losses ---------------------------------------------------------------------------


def read_isa() -> list[str]:
    """The vector extensions that XLA chooses among, where Linux tells them."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    lines = [line for line in text.splitlines() if line.startswith(("flags", "Feat"))]
    flags = set(lines[0].split() if lines else [])
    prefixes = ("avx", "fma", "amx", "sse4", "asimd", "sve")
    return sorted(f for f in flags if f.startswith(prefixes))


def read_bits_of_platform() -> dict[str, Any]:
    """All that the bits of a float depend on, so far as we have seen."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    return {
        "backend": jax.default_backend(),
        "machine": platform.machine(),
        "isa": read_isa(),
        "devices": jax.device_count(),
        "cores": cores or os.cpu_count(),
        "nproc": os.environ.get("NPROC"),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "jaxlib": jaxlib.__version__,
    }


def skip_elsewhere() -> None:
    """Skips where the file was written on another platform, and says what differs."""
    if os.environ.get("UPDATE_GOLDEN") == "1":
        compare(
            read_bits_of_platform(), file="losses.json", what="platform", meaning=LOSSES
        )
        return
    golden, here = read("losses.json")["platform"], read_bits_of_platform()
    differ = [n for n in here if here[n] != golden.get(n)]
    if differ:
        what = "; ".join(
            f"{n}: {golden.get(n)!r} there, {here[n]!r} here" for n in differ
        )
        pytest.skip(f"losses.json is of another platform ({what})")


@pytest.mark.promotes  # Adam
@pytest.mark.parametrize("experiment", ["dropout", "batch_norm"])
def test_losses(make_spec: Any, experiment: str) -> None:
    """First five losses, the last, and the parameters after 20 steps."""
    skip_elsewhere()
    small = ["train.steps=20", "eval.every=null", "train.compile_cache=null"]
    program = compile_run(make_spec(f"+experiment={experiment}", *small))
    losses: list[str] = []
    for event in train(program):
        if isinstance(event, TrainRecord):
            values = event.metrics["loss"]
            assert values.dtype == np.float32
            losses += [float(value).hex() for value in values]
        elif isinstance(event, Outcome):
            leaves = {
                name: digest_leaves({name: np.asarray(leaf)})
                for name, leaf in named_leaves(event.state)
            }
    assert len(losses) == 20
    found = {"first": losses[:5], "last": losses[-1], "leaves": leaves}
    compare(found, file="losses.json", what=experiment, meaning=LOSSES)


def named_leaves(state: Any) -> list[tuple[str, Any]]:
    tree = {"params": state.params, "collections": state.collections}
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


# The files ------------------------------------------------------------------------


def test_the_message_says_how_and_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UPDATE_GOLDEN", raising=False)
    with pytest.raises(AssertionError) as caught:
        compare({}, file="keys.json", what="canary rbg", meaning=KEYS)
    text = str(caught.value)
    for words in ("canary rbg", "keys.json", "UPDATE_GOLDEN=1", "CHANGELOG", "Never"):
        assert words in text


def test_nothing_is_left_over() -> None:
    """Each entry of a golden file is one that a test here compares."""
    derived = {
        f"derivations seed={seed} impl={impl} partitionable={partitionable}"
        for seed in (0, 2**31)
        for impl in Impl
        for partitionable in (True, False)
    }
    ledgers = {f"ledger {name}" for name in ("dropout", "batch_norm")}
    canaries = {f"canary {impl}" for impl in Impl}
    assert set(read("keys.json")) == derived | ledgers | canaries
    assert set(read("losses.json")) == {"platform", "dropout", "batch_norm"}
