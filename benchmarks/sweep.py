# SPDX-License-Identifier: Apache-2.0
"""A sweep as lanes, against the same sweep by other launchers and by hand.

    python benchmarks/sweep.py [--jobs 8 32] [--cases tiny mlp cnn attention]
                               [--ways lanes map vmap shares basic cold processes
                                       joblib hand saved]
                               [--rounds 1] [--steps 500]

Each way is one process (or, `processes`, one for each job), from its start to its
end; the ways of a round take turns. All share one compile cache, which a first job
has warmed for all but `vmap`, `hand` and `saved`; `cold` is Hydra's basic launcher
without it. Seeds times four dropout rates are swept. Every way leaves a whole record
of each job, with its checkpoint, but `hand`, which leaves nothing, and `saved`, by
hand with losses and a checkpoint. `compile` and `hydra` are seconds spent in lowering
and XLA, and in composing, of the process that was started.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.tables import print_table  # noqa: E402 - see above

_ATTENTION = (
    "~model",
    "+model={_target_: models.Sequential, layers: ["
    "{_target_: flax.linen.Dense, features: 32}, "
    "{_target_: flax.linen.MultiHeadDotProductAttention, num_heads: 4}, "
    "{_target_: flax.linen.LayerNorm}, {_target_: models.Dropout, rate: 0.1}, "
    "{_target_: models.Flatten}, {_target_: flax.linen.Dense, features: 10}]}",
)
_CASES = {  # overrides, the swept rate
    "tiny": (("model.features=[64]",), "model.dropout_rate"),
    "mlp": ((), "model.dropout_rate"),
    "cnn": (("model=cnn",), "model.dropout_rate"),
    "attention": (_ATTENTION, "model.layers.3.rate"),
}
_RATES = (0.0, 0.2, 0.5, 0.8)
_LANES = ("hydra/launcher=vectorized",)
_PARTS = ("compile", "hydra")


@dataclass(frozen=True)
class Sweep:
    """What is swept, and where it may write."""

    case: str
    jobs: int
    steps: int
    scratch: Path

    @property
    def words(self) -> list[str]:
        """Overrides of every job."""
        return [
            "+experiment=dropout",
            *_CASES[self.case][0],
            f"train.steps={self.steps}",
            "sinks=none",
            f"train.compile_cache={self.scratch / 'cache'}",
        ]

    @property
    def swept(self) -> list[str]:
        """Seeds and rates; one job for each pair of them."""
        seeds = f"seed=range({self.jobs // len(_RATES)})"
        return [seeds, f"{_CASES[self.case][1]}={','.join(map(str, _RATES))}"]


Way = Callable[[Sweep, Path], list[list[str]]]


def _launched(*words: str) -> Way:
    def commands(sweep: Sweep, where: Path) -> list[list[str]]:
        place = f"hydra.sweep.dir={where}"
        return [
            [*_RUNNER, f"{where}.json", "-m", *sweep.words, *sweep.swept, place, *words]
        ]

    return commands


def _processes(sweep: Sweep, where: Path) -> list[list[str]]:
    rate = _CASES[sweep.case][1]
    return [
        [
            *(*_RUNNER, f"{where}-{n}.json", *sweep.words),
            *(f"seed={n // len(_RATES)}", f"{rate}={_RATES[n % len(_RATES)]}"),
            f"hydra.run.dir={where / str(n)}",
        ]
        for n in range(sweep.jobs)
    ]


def _by_hand(sweep: Sweep, where: Path) -> list[list[str]]:
    script = str(ROOT / "benchmarks" / "sweep_by_hand.py")
    cache = str(sweep.scratch / "cache")
    words = (str(sweep.jobs), str(sweep.steps), sweep.case, cache)
    return [[sys.executable, script, *words]]


def _saved_by_hand(sweep: Sweep, where: Path) -> list[list[str]]:
    return [[*_by_hand(sweep, where)[0], str(where)]]


_RUNNER = (sys.executable, str(ROOT / "benchmarks" / "sweep_parts.py"))
_JOBLIB = importlib.util.find_spec("joblib") and importlib.util.find_spec(
    "hydra_plugins.hydra_joblib_launcher"
)
_WAYS: dict[str, Way] = {
    "lanes": _launched(*_LANES),
    "map": _launched(*_LANES, "hydra.launcher.mode=map"),
    "vmap": _launched(*_LANES, "hydra.launcher.mode=vmap"),
    "shares": _launched(*_LANES, "hydra/launcher/over=joblib"),
    "basic": _launched(),
    "cold": _launched("train.compile_cache=null"),
    "processes": _processes,
    "joblib": _launched("hydra/launcher=joblib"),
    "hand": _by_hand,
    "saved": _saved_by_hand,
}


@dataclass(frozen=True)
class Measured:
    """What a way took; seconds on the wall, MiB of its largest process."""

    seconds: float
    peak: int
    parts: Mapping[str, float]

    def cells(self, jobs: int, ours: "Measured | None") -> list[str]:
        """As a row says it."""
        ratio = f"{self.seconds / ours.seconds:.2f}" if ours else ""
        parts = [f"{self.parts[n]:.1f}" if n in self.parts else "" for n in _PARTS]
        each = f"{1e3 * self.seconds / jobs:.0f}"
        return [f"{self.seconds:.1f}", each, ratio, *parts, f"{self.peak}"]


def main() -> None:
    """Prints a row for each case, number of jobs and way."""
    options = _parse()
    rows = []
    for case in options.cases:
        for jobs in options.jobs:
            found = _rounds(case, jobs, options)
            ours = found.get("lanes")
            for way, measured in found.items():
                rows.append([case, str(jobs), way, *measured.cells(jobs, ours)])
    head = ("case", "jobs", "way", "wall s", "ms a job", "over lanes", *_PARTS)
    print_table((*head, "peak MiB"), rows)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--cases", nargs="+", default=list(_CASES), choices=_CASES)
    parser.add_argument("--ways", nargs="+", default=list(_WAYS), choices=_WAYS)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=500)
    return parser.parse_args()


def _rounds(case: str, jobs: int, options: argparse.Namespace) -> dict[str, Measured]:
    """The round of median time of each way."""
    found: dict[str, list[Measured]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        sweep = Sweep(case, jobs, options.steps, Path(scratch))
        _run([[*_processes(sweep, Path(scratch, "warm"))[0]]], sweep, "warm")
        for n in range(options.rounds):
            for way in options.ways:
                if way in ("joblib", "shares") and not _JOBLIB:
                    continue
                commands = _WAYS[way](sweep, Path(scratch, f"{way}{n}"))
                measured = _run(commands, sweep, f"{way}{n}")
                found.setdefault(way, []).append(measured)
                print(f"{case} {jobs} {way}: {measured.seconds:.1f} s", file=sys.stderr)
    return {
        way: sorted(rounds, key=lambda each: each.seconds)[len(rounds) // 2]
        for way, rounds in found.items()
    }


def _run(commands: list[list[str]], sweep: Sweep, name: str) -> Measured:
    """Runs all of them, as many at a time as there are cores."""
    begun = time.perf_counter()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        peaks = list(pool.map(lambda words: _one(words, sweep), commands))
    seconds = time.perf_counter() - begun
    parts: dict[str, float] = {}
    for path in sweep.scratch.glob(f"{name}*.json"):
        for part, spent in json.loads(path.read_text()).items():
            parts[part] = parts.get(part, 0.0) + spent
    return Measured(seconds, max(peaks) >> 10, parts)


def _one(words: list[str], sweep: Sweep) -> int:
    with (sweep.scratch / "said").open("ab") as said:
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            words, cwd=sweep.scratch, env=env, stdout=said, stderr=said
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError((sweep.scratch / "said").read_text())
    return usage.ru_maxrss


if __name__ == "__main__":
    main()
