# SPDX-License-Identifier: Apache-2.0
"""Times `rng.observe` against the same run without it; asserts no time.

    python benchmarks/observe.py [--quick] [--case NAME]

Both take turns in one process, round after round, and who begins changes. A cost is the
median over the rounds of the ratio within a round, less 1: of the wall clock, and of
the CPU time of all threads, which the rest of the machine disturbs less.
"""

import argparse
import contextlib
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import jax

from benchmarks.by_hand import leaf_bytes
from benchmarks.cases import CASES, Case, make_spec, write_images
from benchmarks.loop import print_machine
from benchmarks.tables import print_table
from runner.comparison.compare import Comparison
from runner.compile import compile_run
from runner.ledger import make_ledger
from runner.loop import Outcome, train
from runner.platforms import set_compile_cache
from runner.program import Program
from runner.spec import RunSpec

__all__ = ["main"]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few rounds")
    parser.add_argument("--case", default="", help="cases with this in their name")
    asked = parser.parse_args()
    print_machine()
    with tempfile.TemporaryDirectory() as scratch:
        set_compile_cache(str(Path(scratch) / "xla"))
        images = Path(scratch) / "images.npz"
        print(f"images of 28 x 28: {write_images(images)}\n")
        rounds = 5 if asked.quick else 25
        head = ["", "us a step, off", "on", "cost", "CPU cost"]
        head += ["keys a step", "same bits"]
        rows = [
            _measure(case, make_spec(case, steps=case.steps, images=images), rounds)
            for case in CASES
            if asked.case in case.name
        ]
        print_table(head, rows)


def _measure(case: Case, spec: RunSpec, rounds: int) -> list[str]:
    programs = {
        word: compile_run(replace(spec, rng=replace(spec.rng, observe=word == "on")))
        for word in ("off", "on")
    }
    ends = {word: _train(program) for word, program in programs.items()}  # compiles
    taken: dict[str, list[_Taken]] = {word: [] for word in programs}
    for i in range(rounds):
        for word in list(programs)[:: 1 if i % 2 else -1]:
            taken[word].append(_train(programs[word]))
    off, on = (median(t.wall for t in taken[w]) / case.steps * 1e6 for w in programs)
    pairs = list(zip(taken["off"], taken["on"], strict=True))
    wall = median(on.wall / off.wall for off, on in pairs) - 1
    cpu = median(on.cpu / off.cpu for off, on in pairs) - 1
    same = "yes" if ends["off"].params == ends["on"].params else "no"
    keys = f"{ends['on'].keys / case.steps:g}"
    shown = (f"{off:,.0f}", f"{on:,.0f}", f"{wall:+.1%}", f"{cpu:+.1%}")
    return [case.name, *shown, keys, same]


@dataclass(frozen=True)
class _Taken:
    """One run: seconds, train keys that were compared, bytes of the parameters."""

    wall: float
    cpu: float
    keys: int
    params: list[bytes]


def _train(program: Program) -> _Taken:
    comparison = Comparison(make_ledger(program), window=program.window)
    _ = program.calls  # compiled before the clock starts
    begun = time.process_time()
    for event in train(program, watch=comparison):
        if isinstance(event, Outcome):
            cpu = time.process_time() - begun
            assert event.status == "completed", event.reason
            keys = comparison.to_plain()["phases"]["train"]["keys"]
            params = list(leaf_bytes(jax.device_get(event.state.params)))
            return _Taken(event.seconds, cpu, keys, params)
    raise AssertionError("the loop ended without an outcome")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
