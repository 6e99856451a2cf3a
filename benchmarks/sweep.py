# SPDX-License-Identifier: Apache-2.0
"""A sweep as lanes, against the same sweep by other launchers and by hand.

    python benchmarks/sweep.py [--jobs 8 32] [--cases tiny mlp cnn attention]
                               [--ways lanes map vmap basic processes joblib hand]
                               [--rounds 1] [--steps 500]

Each way is one process (or, `processes`, one for each job), from its start to its
end; the ways of a round take turns. All share one compile cache, which a first job
has warmed for all but `vmap` and `hand`. Seeds times four dropout rates are swept;
every way but `hand` leaves a whole record of each job, with its checkpoint.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

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
_CASES = {  # overrides, the swept rate, features for `hand`
    "tiny": (("model.features=[64]",), "model.dropout_rate", "64"),
    "mlp": ((), "model.dropout_rate", "512,256"),
    "cnn": (("model=cnn",), "model.dropout_rate", ""),
    "attention": (_ATTENTION, "model.layers.3.rate", ""),
}
_RATES = (0.0, 0.2, 0.5, 0.8)
_LANES = ("hydra/launcher=vectorized",)


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
        runner = [sys.executable, "-m", "runner", "-m"]
        return [[*runner, *sweep.words, *sweep.swept, place, *words]]

    return commands


def _processes(sweep: Sweep, where: Path) -> list[list[str]]:
    rate = _CASES[sweep.case][1]
    return [
        [
            *(sys.executable, "-m", "runner", *sweep.words),
            *(f"seed={n // len(_RATES)}", f"{rate}={_RATES[n % len(_RATES)]}"),
            f"hydra.run.dir={where / str(n)}",
        ]
        for n in range(sweep.jobs)
    ]


def _by_hand(sweep: Sweep, where: Path) -> list[list[str]]:
    features = _CASES[sweep.case][2]
    if not features:
        return []
    script = str(ROOT / "benchmarks" / "sweep_by_hand.py")
    cache = str(sweep.scratch / "cache")
    words = (str(sweep.jobs), str(sweep.steps), features, cache)
    return [[sys.executable, script, *words]]


_JOBLIB = importlib.util.find_spec("joblib") and importlib.util.find_spec(
    "hydra_plugins.hydra_joblib_launcher"
)
_WAYS: dict[str, Way] = {
    "lanes": _launched(*_LANES),
    "map": _launched(*_LANES, "hydra.launcher.mode=map"),
    "vmap": _launched(*_LANES, "hydra.launcher.mode=vmap"),
    "basic": _launched(),
    "processes": _processes,
    "joblib": _launched("hydra/launcher=joblib"),
    "hand": _by_hand,
}


def main() -> None:
    """Prints a row for each case, number of jobs and way."""
    options = _parse()
    rows = []
    for case in options.cases:
        for jobs in options.jobs:
            found = _rounds(case, jobs, options)
            ours = found.get("lanes", [(1.0, 0)])
            for way, times in found.items():
                seconds = median(s for s, _ in times)
                ratio = median(
                    s / o for (s, _), (o, _) in zip(times, ours, strict=True)
                )
                peak = max(m for _, m in times)
                cells = [f"{seconds:.1f}", f"{1e3 * seconds / jobs:.0f}"]
                rows.append([case, str(jobs), way, *cells, f"{ratio:.2f}", f"{peak}"])
    head = ("case", "jobs", "way", "wall s", "ms a job", "over lanes", "peak MiB")
    print_table(head, rows)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--cases", nargs="+", default=list(_CASES), choices=_CASES)
    parser.add_argument("--ways", nargs="+", default=list(_WAYS), choices=_WAYS)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=500)
    return parser.parse_args()


def _rounds(
    case: str, jobs: int, options: argparse.Namespace
) -> dict[str, list[tuple[float, int]]]:
    found: dict[str, list[tuple[float, int]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        sweep = Sweep(case, jobs, options.steps, Path(scratch))
        _run([[*_processes(sweep, Path(scratch, "warm"))[0]]], sweep)
        for n in range(options.rounds):
            for way in options.ways:
                if way == "joblib" and not _JOBLIB:
                    continue
                commands = _WAYS[way](sweep, Path(scratch, f"{way}{n}"))
                if commands:
                    made = _run(commands, sweep)
                    found.setdefault(way, []).append(made)
                    print(f"{case} {jobs} {way}: {made[0]:.1f} s", file=sys.stderr)
    return found


def _run(commands: list[list[str]], sweep: Sweep) -> tuple[float, int]:
    """Wall seconds of all, as many at a time as there are cores; peak MiB of one."""
    begun = time.perf_counter()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        peaks = list(pool.map(lambda words: _one(words, sweep), commands))
    return time.perf_counter() - begun, max(peaks) >> 10


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
