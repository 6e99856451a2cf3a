# SPDX-License-Identifier: Apache-2.0
"""Times the runner against the same training by hand; asserts no time.

    python benchmarks/loop.py [--quick] [--only loop|start]

Contenders take turns in one process, round after round, so that what else runs on
the machine meets all alike. A ratio is the median over the rounds of the ratio
within a round: above 1 means that the runner is quicker.
"""

import argparse
import contextlib
import json
import os
import platform
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import jax

from benchmarks import by_hand
from benchmarks.by_hand import Problem, Timed, leaf_bytes
from benchmarks.cases import CASES, Case, make_spec, write_images
from benchmarks.startup import measure_startup
from benchmarks.tables import print_table
from runner.compile import compile_run
from runner.loop import Outcome, train
from runner.platforms import set_compile_cache
from runner.program import Program
from runner.recording import record_run
from runner.records.secrets import Secrets

__all__ = ["main", "print_machine"]

_OURS = "runner, no sinks"
_RECORDED = "runner, recorded"


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few rounds")
    parser.add_argument("--only", choices=["loop", "start"])
    parser.add_argument("--case", default="", help="cases with this in their name")
    asked = parser.parse_args()
    print_machine()
    if asked.only != "start":
        _measure_loops(rounds=5 if asked.quick else 9, wanted=asked.case)
    if asked.only != "loop":
        measure_startup(rounds=3 if asked.quick else 7)


def print_machine() -> None:
    """Prints what the figures were measured on."""
    device = jax.devices()[0]
    print(
        f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, load "
        f"{os.getloadavg()[0]:.1f}; Python {platform.python_version()}, "
        f"jax {jax.__version__} on {len(jax.devices())} x {device.device_kind}"
    )


def _measure_loops(*, rounds: int, wanted: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        set_compile_cache(str(Path(scratch) / "xla"))  # each run compiles its start
        images = Path(scratch) / "images.npz"
        print(f"images of 28 x 28: {write_images(images)}")
        for case in CASES:
            if wanted in case.name:
                spec = make_spec(case, steps=case.steps, images=images)
                program = _begun_ready(compile_run(spec))
                _measure_case(case, program, rounds=rounds, scratch=Path(scratch))


def _measure_case(case: Case, program: Program, *, rounds: int, scratch: Path) -> None:
    contenders = _contenders(case, program, scratch)
    ends = {name: run().params for name, run in contenders.items()}  # compiles, too
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for i in range(rounds):
        at = i % len(names)  # nobody always comes after the same one
        for name in names[at:] + names[:at]:
            seconds[name].append(contenders[name]().seconds)
    print(f"\n### {case.name}, batch {program.order.batch_size}\n")
    _print(case, seconds, ends)


def _contenders(
    case: Case, program: Program, scratch: Path
) -> dict[str, Callable[[], Timed]]:
    data = program.data
    problem = Problem.of(program.spec, data.x_train, data.y_train)
    found = {
        _OURS: lambda: _train(program),
        _RECORDED: lambda: _record(program, scratch),
        "by hand, steps, same work": by_hand.make_steps(problem, work="same"),
        "by hand, steps, less work": by_hand.make_steps(problem, work="less"),
    }
    if not (case.convolves and jax.default_backend() == "cpu"):  # 15 times slower
        found |= {
            "by hand, scan, same work": by_hand.make_chunks(problem, work="same"),
            "by hand, scan, less work": by_hand.make_chunks(problem, work="less"),
        }
    return {**found, "tutorial": by_hand.make_tutorial(problem)}


def _begun_ready(program: Program) -> Program:
    """Lets the clock of the loop start when the first state is there, as by hand."""
    start = program.start_observed
    object.__setattr__(
        program, "start_observed", lambda: jax.block_until_ready(start())
    )
    return program


def _train(program: Program) -> Timed:
    for event in train(program):
        if isinstance(event, Outcome):
            return Timed(event.seconds, jax.device_get(event.state.params))
    raise AssertionError("the loop ended without an outcome")


def _record(program: Program, scratch: Path) -> Timed:
    """The loop with every step's metrics written; the checkpoint is not in the time."""
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        record_run(program, directory=Path(name), secrets=Secrets({}, ()))
        manifest = json.loads((Path(name) / "run.json").read_text())
    return Timed(manifest["seconds"], None)


def _print(
    case: Case, seconds: Mapping[str, list[float]], ends: Mapping[str, Any]
) -> None:
    ours = list(leaf_bytes(ends[_OURS]))
    rows = []
    for name, taken in seconds.items():
        ratio = median(b / a for a, b in zip(seconds[_OURS], taken, strict=True))
        same = "" if ends[name] is None else _word(list(leaf_bytes(ends[name])) == ours)
        each = median(taken) / case.steps
        rows.append([name, f"{each * 1e6:,.0f}", f"{1 / each:,.0f}", f"{ratio:.2f}"])
        rows[-1].append(same)
    print_table(["", "us a step", "steps a s", "to runner's", "same bits"], rows)


def _word(equal: bool) -> str:
    return "yes" if equal else "no"


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
