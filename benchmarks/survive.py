# SPDX-License-Identifier: Apache-2.0
"""Times what surviving costs: fingerprints of the state, and checkpoints.

    python benchmarks/survive.py [--quick] [--case NAME]

A run without either, one with a fingerprint every 100 steps, one that saves every 100
steps, too, take turns in one process, round after round, and who begins changes. A cost
is the median over the rounds of the ratio to the bare run of its round, less 1: of the
wall clock, and of the CPU time of all threads. Then a save by itself: how long the loop
waits for it, until it is on the disk with its digests, and until it is read back with
every byte checked.
"""

import argparse
import contextlib
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import jax

from benchmarks.by_hand import leaf_bytes
from benchmarks.cases import CASES, Case, make_spec, write_images
from benchmarks.loop import print_machine
from benchmarks.tables import print_table
from runner.compile import compile_run
from runner.kept import keep
from runner.loop import Outcome, Snapshot, train
from runner.platforms import set_compile_cache
from runner.program import Program
from runner.records.checkpoint import Checkpoints
from runner.records.metrics import Written
from runner.records.reading import open_run
from runner.records.restore import read_saved, restore_leaves
from runner.spec import CheckpointSpec, RunSpec

__all__ = ["main"]

_EVERY = 100
_KINDS = {
    "bare": CheckpointSpec(every=None, digest_every=None),
    "fingerprints": CheckpointSpec(every=None, digest_every=_EVERY),
    "checkpoints": CheckpointSpec(every=_EVERY, digest_every=_EVERY),
}
_NOTHING = dict.fromkeys(("metrics", "states"), Written(0, "0" * 64))


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
        rounds = 3 if asked.quick else 15
        head = ["", "us a step, bare", "fingerprints", "CPU", "and checkpoints", "CPU"]
        head += ["same bits", "state", "save waits", "is written", "is read"]
        rows = [
            _measure(case, make_spec(case, steps=case.steps, images=images), rounds)
            for case in CASES
            if asked.case in case.name
        ]
        print_table(head, rows)


def _measure(case: Case, spec: RunSpec, rounds: int) -> list[str]:
    programs = {
        word: compile_run(replace(spec, checkpoint=kind))
        for word, kind in _KINDS.items()
    }
    ends = {word: _train(program) for word, program in programs.items()}  # compiles
    taken: dict[str, list[_Taken]] = {word: [] for word in programs}
    for i in range(rounds):
        for word in list(programs)[:: 1 if i % 2 else -1]:
            taken[word].append(_train(programs[word]))
    bare = taken.pop("bare")
    shown = [f"{median(each.wall for each in bare) / case.steps * 1e6:,.0f}"]
    for runs in taken.values():
        pairs = list(zip(bare, runs, strict=True))
        shown.append(f"{median(b.wall / a.wall for a, b in pairs) - 1:+.1%}")
        shown.append(f"{median(b.cpu / a.cpu for a, b in pairs) - 1:+.1%}")
    same = all(each.params == ends["bare"].params for each in ends.values())
    saves = [_save(ends["bare"].state) for _ in range(rounds)]
    times = [f"{median(column) * 1e3:,.0f} ms" for column in zip(*saves, strict=True)]
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(ends["bare"].state))
    shown += ["yes" if same else "no", f"{size / 1e6:.1f} MB", *times]
    return [case.name, *shown]


@dataclass(frozen=True)
class _Taken:
    """One run: seconds, what a checkpoint of its end holds, bytes of the parameters."""

    wall: float
    cpu: float
    state: dict[str, Any]
    params: list[bytes]


def _train(program: Any) -> _Taken:
    assert isinstance(program, Program)
    _ = program.calls  # compiled before the clock starts
    begun = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = _checkpoints(Path(folder))
        for event in train(program):
            if isinstance(event, Snapshot):
                state = keep(event.state)
                checkpoints.save(event.step, state, written=_NOTHING)
            if isinstance(event, Outcome):
                cpu = time.process_time() - begun
                checkpoints.close()
                assert event.status == "completed", event.reason
                params = list(leaf_bytes(jax.device_get(event.state.params)))
                return _Taken(event.seconds, cpu, keep(event.state), params)
    raise AssertionError("the loop ended without an outcome")


def _save(state: dict[str, Any]) -> tuple[float, float, float]:
    """Seconds until the loop goes on, until it is on the disk, to read it back."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "run.json").write_text("{}")
        begun = time.perf_counter()
        checkpoints = _checkpoints(Path(folder))
        checkpoints.save(1, state, written=_NOTHING)
        waited = time.perf_counter() - begun
        checkpoints.close()
        written = time.perf_counter() - begun
        begun, files = time.perf_counter(), open_run(folder)
        read_saved(files, 1, run_id="benchmark")
        restore_leaves(files, 1)
        return waited, written, time.perf_counter() - begun


def _checkpoints(folder: Path) -> Checkpoints:
    where = folder / "checkpoints"
    return Checkpoints(where, run_id="benchmark", keep=2, keep_best=0, best="max")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
