# SPDX-License-Identifier: Apache-2.0
"""From nothing to the first step: a new process, with and without a compile cache.

The first step is over when its loss can be read: on the standard output by hand, in
`metrics.jsonl` of the runner. A process is looked at from outside, by Linux's
`/proc`; none is changed.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.tables import print_table

__all__ = ["measure_startup"]

ROOT = Path(__file__).resolve().parents[1]
_OVERRIDES = (
    "+experiment=dropout",
    "train.steps=1",
    "eval.every=null",
    "sinks.terminal.mode=disabled",
    "sinks.wandb.mode=disabled",
)
_TICK = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Start:
    """One process; seconds.

    Args:
        wall: From its start to the end of the first step.
        cpu: User and system time of all its threads until then.
        whole_wall: From its start to its end.
        whole_cpu: User and system time in all, its children's included.
    """

    wall: float
    cpu: float
    whole_wall: float
    whole_cpu: float


Command = Callable[[Path, Path], list[str]]


def measure_startup(*, rounds: int) -> None:
    """Prints a table for a cold compile cache and one for a warm one."""
    for label, make_caches in (("cold", _cold), ("warm", _warm)):
        print(f"\n### Start-up, {label} compile cache\n")
        with tempfile.TemporaryDirectory() as scratch:
            found = _rounds(rounds, make_caches(Path(scratch)), Path(scratch))
        _print(found)


def _rounds(
    rounds: int, caches: Callable[[str, int], Path], scratch: Path
) -> dict[str, list[Start]]:
    found: dict[str, list[Start]] = {name: [] for name in _COMMANDS}
    for i in range(rounds):
        for name, command in _COMMANDS.items():
            directory = scratch / f"{name.split()[-1]}-{i}"
            directory.mkdir()
            found[name].append(_start(command, directory, caches(name, i)))
    return found


def _cold(scratch: Path) -> Callable[[str, int], Path]:
    return lambda name, i: scratch / f"cache-{name.split()[-1]}-{i}"


def _warm(scratch: Path) -> Callable[[str, int], Path]:
    for name, command in _COMMANDS.items():
        directory = scratch / f"{name.split()[-1]}-warm"
        directory.mkdir()
        _start(command, directory, scratch / f"cache-{name.split()[-1]}")
    return lambda name, _: scratch / f"cache-{name.split()[-1]}"


def _by_hand(how: str) -> Command:
    script = str(ROOT / "benchmarks" / "digits_by_hand.py")
    return lambda _, cache: [sys.executable, script, how, str(cache)]


def _runner(directory: Path, cache: Path) -> list[str]:
    places = [f"hydra.run.dir={directory}", f"train.compile_cache={cache}"]
    return [sys.executable, "-m", "runner", *_OVERRIDES, *places]


_COMMANDS: dict[str, Command] = {
    "runner": _runner,
    "by hand, sklearn": _by_hand("sklearn"),
    "by hand, csv": _by_hand("csv"),
}


def _start(command: Command, directory: Path, cache: Path) -> Start:
    cache.mkdir(exist_ok=True)
    begun = time.perf_counter()
    out, err = directory / "stdout", directory / "stderr"
    with out.open("wb") as stdout, err.open("wb") as stderr:
        process = subprocess.Popen(
            command(directory, cache), cwd=ROOT, stdout=stdout, stderr=stderr
        )
        signs = (directory / "metrics.jsonl", out)
        while not any(_has_text(f) for f in signs) and not _ended(process.pid):
            time.sleep(0.002)
        wall, cpu = time.perf_counter() - begun, _cpu(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or not any(_has_text(f) for f in signs):
        raise RuntimeError(err.read_text())
    whole = usage.ru_utime + usage.ru_stime
    return Start(wall, cpu, time.perf_counter() - begun, whole)


def _has_text(file: Path) -> bool:
    return file.exists() and file.stat().st_size > 0


def _ended(pid: int) -> bool:
    return _stat(pid)[0] == "Z"


def _cpu(pid: int) -> float:
    """User and system seconds of a process; it may have ended, unwaited for."""
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) * _TICK


def _stat(pid: int) -> list[str]:
    """The fields of `/proc/PID/stat` from the third on: state, parent, ..."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _print(found: dict[str, list[Start]]) -> None:
    names = ("cpu", "wall", "whole_cpu", "whole_wall")
    head = ["", "CPU s to step 1", "wall s", "CPU s in all", "wall s in all"]
    head.append("runner's CPU above it")
    rows = []
    for name, starts in found.items():
        cells = [f"{median(getattr(s, n) for s in starts):.2f}" for n in names]
        above = median(_above(found["runner"], starts))
        rows.append([name, *cells, "" if name == "runner" else f"{above:+.2f}"])
    print_table(head, rows)


def _above(ours: list[Start], theirs: list[Start]) -> Iterator[float]:
    return (a.cpu - b.cpu for a, b in zip(ours, theirs, strict=True))
