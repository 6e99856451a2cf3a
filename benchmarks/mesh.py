# SPDX-License-Identifier: Apache-2.0
"""Times the runner on meshes against the same sharded loop by hand; asserts no time.

    python benchmarks/mesh.py [--quick] [--counts 1 2 4 8]

On CPU a process is started for each number of forced devices. In it, contenders take
turns, round after round. Forced devices share the cores: more of them are no quicker,
and what is to be seen is the ratio to another loop on as many: above 1, it is slower.
"""

import argparse
import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from statistics import median

import jax
import numpy as np

from benchmarks import by_hand
from benchmarks.by_hand import Problem, Timed, leaf_bytes
from benchmarks.loop import print_machine
from benchmarks.tables import print_table
from runner.compile import compile_run
from runner.loop import Outcome, train
from runner.program import Program

__all__ = ["main"]

_MICROBATCHES = 8
_BASE = ("+experiment=dropout", "eval.every=null", "sinks=none")
_BATCHES = (128, 1024)
_JIT, _JIT_BY_HAND = "jit", "jit by hand"
_SHARDS, _SHARDS_BY_HAND = "shard_map", "shard_map by hand"
_EXACT, _JIT_PARTS = f"exact, {_MICROBATCHES} parts", f"jit, {_MICROBATCHES} parts"
_PAIRS = (
    (_JIT, _JIT_BY_HAND),
    (_SHARDS, _SHARDS_BY_HAND),
    (_EXACT, _JIT),
    (_EXACT, _JIT_PARTS),
)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few rounds and steps")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.here:
        _measure(rounds=5 if asked.quick else 9, steps=200 if asked.quick else 600)
        return
    for count in asked.counts:
        pool = {"NPROC": str(max(_MICROBATCHES, len(os.sched_getaffinity(0))))}
        forced = {"JAX_NUM_CPU_DEVICES": str(count)}
        quick = ["--quick"] if asked.quick else []
        command = [sys.executable, __file__, "--here", *quick]
        subprocess.run(command, check=True, env={**os.environ, **forced, **pool})


def _measure(*, rounds: int, steps: int) -> None:
    print_machine()
    for batch in _BATCHES:
        contenders = _contenders(f"data.batch_size={batch}", f"train.steps={steps}")
        ends = {name: run().params for name, run in contenders.items()}  # compiles
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        names = list(contenders)
        for i in range(rounds):
            at = i % len(names)  # nobody always comes after the same one
            for name in names[at:] + names[:at]:
                seconds[name].append(contenders[name]().seconds)
        print(f"\n### {len(jax.devices())} devices, MLP 512-256, batch {batch}\n")
        each = {name: median(taken) / steps * 1e6 for name, taken in seconds.items()}
        rows = []
        for name, rival in _PAIRS:
            pairs = zip(seconds[name], seconds[rival], strict=True)
            same = list(leaf_bytes(ends[name])) == list(leaf_bytes(ends[rival]))
            rows.append([f"{name}, over {rival}", f"{each[name]:,.0f}"])
            ratio = median(a / b for a, b in pairs)
            rows[-1] += [f"{each[rival]:,.0f}", f"{ratio:.2f}", str(same).lower()]
        print_table(["", "us a step", "the other's", "ratio", "same bits"], rows)


def _contenders(*overrides: str) -> dict[str, Callable[[], Timed]]:
    count = f"mesh.axes.data={len(jax.devices())}"
    parts = f"train.accumulation_steps={_MICROBATCHES}"
    per = "rng.streams.dropout.per=[step,microbatch,data]"
    jit = _compile(*overrides, "mesh=data8", count)
    shards = _compile(*overrides, "mesh=shard_map8", count, per)
    exact = _compile(*overrides, "mesh=exact8", count, parts)
    jit_parts = _compile(*overrides, "mesh=data8", count, parts)
    problem = Problem.of(jit.spec, jit.data.x_train, jit.data.y_train)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    return {
        _JIT: lambda: _train(jit),
        _JIT_BY_HAND: by_hand.make_sharded(problem, mesh),
        _SHARDS: lambda: _train(shards),
        _SHARDS_BY_HAND: by_hand.make_shards(problem, mesh),
        _EXACT: lambda: _train(exact),
        _JIT_PARTS: lambda: _train(jit_parts),
    }


def _compile(*overrides: str) -> Program:
    from omegaconf import OmegaConf, open_dict

    from runner.cli.config import compose
    from runner.spec import parse_spec

    config = compose([*_BASE, *overrides])
    with open_dict(config):
        del config["hydra"]
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    program = compile_run(parse_spec({str(k): value for k, value in plain.items()}))
    assert isinstance(program, Program)
    start = program.start_observed  # the clock starts when the first state is there
    object.__setattr__(
        program, "start_observed", lambda: jax.block_until_ready(start())
    )
    return program


def _train(program: Program) -> Timed:
    for event in train(program):
        if isinstance(event, Outcome):
            return Timed(event.seconds, jax.device_get(event.state.params))
    raise AssertionError("the loop ended without an outcome")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
