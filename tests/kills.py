# SPDX-License-Identifier: Apache-2.0
"""Runs killed at random moments and resumed leave the bytes of one that never was.

A library for `test_kills.py`, and a script, `make faults`:

    python tests/kills.py --kills 200 --jobs 4 --seed 7 --verbose

Each trial kills a run by SIGKILL, then maybe its resumption too, up to twice, and lets
the last one end. Moments are found by what lies in the directory, and by times that
are measured on the machine at hand.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

__all__ = ["CASES", "Bench", "Moment", "Reference", "Trial", "make_reference", "try_it"]

ROOT = Path(__file__).parents[1]
_SAVE = ("checkpoint.every=10", "checkpoint.keep=2", "checkpoint.digest_every=7")
_SMALL = ("sinks=none", "data.batch_size=64", *_SAVE)
_MLP = ("+experiment=dropout", "model.features=[32]", "eval.every=15", *_SMALL)
CASES: dict[str, tuple[str, ...]] = {
    "dropout": (*_MLP, "train.steps=60"),
    "batch_norm": (
        "+experiment=batch_norm",
        "train.steps=50",
        "eval.every=20",
        *_SMALL,
    ),
    "accumulation": (*_MLP, "train.steps=45", "train.accumulation_steps=4"),
    "scan": ("+experiment=deep", "model.depth=2", "train.steps=40", *_SMALL),
    "carry": (
        *(*_MLP, "train.steps=45", "~rng.streams.dropout.per"),
        "+rng.streams.dropout.per={step: carry}",
    ),
    "cnn": ("+experiment=cnn", "train.steps=30", "eval.every=15", *_SMALL),
    "patience": (
        *(*_MLP, "train.steps=200", "optimizer.learning_rate=0.1"),
        *("eval.every=5", "eval.patience=3"),
    ),
    "keep_best": (*_MLP, "train.steps=60", "checkpoint.keep_best=1", "eval.every=7"),
}
_RESUMES = 2  # that may be killed, too
_WAIT = 300.0  # seconds
_AT_ONCE = 0.03  # seconds
_TRIES = 20  # to hit a run that is over too soon


class Moment(StrEnum):
    """When the first kill of a trial comes."""

    START = "start"  # imports, the config, tracing
    RECORD = "record"  # the first files are written
    COMPILE = "compile"  # with nothing in the compile cache
    TRAINING = "training"
    SAVING = "saving"  # Orbax writes
    VOUCHING = "vouching"  # Orbax has written, the step is not listed
    ENDING = "ending"  # the last row is written
    RESUMING = "resuming"  # the resumption of a run that was killed cuts back


@dataclass(frozen=True)
class Bench:
    """Where trials stand.

    Args:
        folder: Directory for all runs.
        env: Environment of a user's shell, with a compile cache.
    """

    folder: Path
    env: dict[str, str]


@dataclass(frozen=True)
class Reference:
    """An uninterrupted run.

    Args:
        left: What a run must leave behind, by its name.
        saves: Steps at which it saved.
        cold: Seconds until its record, first metrics, last metrics and end, without
            compiled programs at hand.
        warm: The same with them.
    """

    left: dict[str, Any]
    saves: tuple[int, ...]
    cold: tuple[float, ...]
    warm: tuple[float, ...]


@dataclass
class Trial:
    """What was done to one run, and what it left."""

    case: str
    moment: Moment
    directory: Path
    kills: list[str] = field(default_factory=list)
    resumed: list[int] = field(default_factory=list)
    fault: str = ""

    def __str__(self) -> str:
        found = self.fault or "equal"
        return (
            f"{self.case}, {self.moment}: killed after {', '.join(self.kills)}; {found}"
        )


class _CommandError(Exception):
    """A command did not end as it has to."""


def make_reference(case: str, bench: Bench) -> Reference:
    """Runs a case twice: first without compiled programs, which are kept for all.

    Raises:
        AssertionError: the two leave other bytes, so that nothing can be compared.
    """
    timed = []
    for name in ("cold", "warm"):
        directory = bench.folder / f"{case}-{name}"
        timed.append(_time(_start(case, directory, bench.env), directory))
    one, two = (left_of(bench.folder / f"{case}-{name}") for name in ("cold", "warm"))
    assert one == two, f"{case}: two runs differ in {_differing(one, two)}"
    every = next(int(w.split("=")[1]) for w in CASES[case] if "checkpoint.every" in w)
    steps = one["steps of run.json"]
    saves = (*range(every, steps, every), steps)
    return Reference(one, saves, timed[0], timed[1])


def left_of(directory: Path) -> dict[str, Any]:
    """What must be the same in every run that came to its end."""
    manifest = json.loads((directory / "run.json").read_text())
    saved = directory.glob("checkpoints/*.json")
    names = ("status", "reason", "steps", "metrics", "best")
    return {
        "params": manifest["digests"]["params"],
        "metrics.jsonl": (directory / "metrics.jsonl").read_bytes(),
        "states.jsonl": (directory / "states.jsonl").read_bytes(),
        **{f"{name} of run.json": manifest[name] for name in names},
        "saved steps": sorted(int(path.stem) for path in saved),
        "files": {p.name for p in directory.iterdir()} - {"runner.log"},
        "checkpoints": {path.name for path in directory.glob("checkpoints/*")},
    }


def try_it(
    case: str, moment: Moment, reference: Reference, bench: Bench, *, seed: object
) -> Trial:
    """Kills a run at a moment, resumes it to its end, and looks at what it left."""
    name = f"{case}-{moment}-{seed}"
    draw = random.Random(name)
    for n in range(_TRIES):
        trial = Trial(case, moment, bench.folder / f"{name}-{n}")
        try:
            if _kill_first(trial, reference, bench, draw):
                _resume_to_end(trial, reference, bench, draw)
                other = _differing(reference.left, left_of(trial.directory))
                trial.fault = f"differs in {other}" if other else ""
                return trial
        except _CommandError as error:
            trial.fault = str(error)
            return trial
        shutil.rmtree(trial.directory)
    trial.fault = f"over before the moment {_TRIES} times"
    return trial


# What is run -------------------------------------------------------------------------


def _start(
    case: str, directory: Path, env: dict[str, str]
) -> "subprocess.Popen[bytes]":
    return _runner(directory, env, *CASES[case], f"hydra.run.dir={directory}")


def _go_on(trial: Trial, env: dict[str, str]) -> "subprocess.Popen[bytes]":
    """Continues a run; one that was killed before it had a record starts again."""
    if (trial.directory / "run.json").exists():
        return _runner(trial.directory, env, "resume", str(trial.directory))
    return _start(trial.case, trial.directory, env)


def _runner(
    directory: Path, env: dict[str, str], *args: str
) -> "subprocess.Popen[bytes]":
    said = directory.with_name(f"{directory.name}.err")
    with said.open("ab") as err:
        return subprocess.Popen(
            [sys.executable, "-m", "runner", *args],
            cwd=directory.parent,
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=err,
        )


def _time(run: "subprocess.Popen[bytes]", directory: Path) -> tuple[float, ...]:
    """Seconds until a run has its record, its first metrics, its last ones, its end."""
    begun = time.monotonic()
    marks, size, metrics = [], 0, directory / "metrics.jsonl"
    _wait(run, (directory / "run.json").exists)
    marks.append(time.monotonic() - begun)
    _wait(run, lambda: _size(metrics) > 0)
    marks += [time.monotonic() - begun] * 2
    while run.poll() is None:
        if size != (size := _size(metrics)):
            marks[2] = time.monotonic() - begun
        time.sleep(0.002)
    _check_end(run, directory)
    return (*marks, time.monotonic() - begun)


# Kills -------------------------------------------------------------------------------


def _kill_first(
    trial: Trial, reference: Reference, bench: Bench, draw: random.Random
) -> bool:
    """Kills the first process of a trial; false where it was over before that."""
    directory, env = trial.directory, bench.env
    recorded, first, last, end = reference.warm
    if trial.moment is Moment.COMPILE:
        recorded, first, last, end = reference.cold
        env = env | {
            "XDG_CACHE_HOME": str(directory.with_name(f"{directory.name}.xdg"))
        }
    run = _start(trial.case, directory, env)
    sign: dict[Moment, tuple[Callable[[], bool], float]] = {
        Moment.START: (lambda: True, recorded),
        Moment.RECORD: (_begins(directory), _AT_ONCE),
        Moment.COMPILE: ((directory / "run.json").exists, first - recorded),
        Moment.TRAINING: (lambda: _has_metrics(directory), end - first),
        Moment.SAVING: (_saves(directory, draw.choice(reference.saves)), _AT_ONCE),
        Moment.VOUCHING: (_vouches(directory, draw.choice(reference.saves)), 0.0),
        Moment.ENDING: (lambda: _is_written(directory, reference), end - last),
        Moment.RESUMING: (lambda: _has_metrics(directory), end - first),
    }
    if not _kill(trial, run, *sign[trial.moment], draw):
        return False
    if trial.moment is not Moment.RESUMING:
        return True
    if _is_completed(directory):  # there is nothing to resume
        return False
    run, begins = _go_on(trial, bench.env), _begins(directory)
    return _kill(trial, run, begins, _AT_ONCE, draw)


def _resume_to_end(
    trial: Trial, reference: Reference, bench: Bench, draw: random.Random
) -> None:
    """Lets a trial come to its end, and may kill it on its way there."""
    for _ in range(_RESUMES):
        if _is_completed(trial.directory):
            return
        if draw.random() < 0.5:
            begins = _begins(trial.directory)
            run = _go_on(trial, bench.env)
            soon = draw.random() < 0.3
            sign = begins if soon else lambda: True
            _kill(trial, run, sign, _AT_ONCE if soon else reference.warm[-1], draw)
    if _is_completed(trial.directory):
        return
    run = _go_on(trial, bench.env)
    run.wait(_WAIT)
    _check_end(run, trial.directory)
    manifest = json.loads((trial.directory / "run.json").read_text())
    trial.resumed = [session["step"] for session in manifest["resumed"]]


def _kill(
    trial: Trial,
    run: "subprocess.Popen[bytes]",
    sign: Callable[[], bool],
    most: float,
    draw: random.Random,
) -> bool:
    """Kills a process at random, up to `most` seconds after a sign.

    Returns:
        False where it was over before.
    """
    begun = time.monotonic()
    if _wait(run, sign):
        time.sleep(draw.uniform(0, most))
    run.kill()  # a process of ours, by its own pid
    run.wait(_WAIT)
    if run.returncode == 0:
        return False
    if run.returncode != -9:
        _check_end(run, trial.directory)
    trial.kills.append(f"{time.monotonic() - begun:.3f} s")
    return True


def _wait(run: "subprocess.Popen[bytes]", condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + _WAIT
    while run.poll() is None and time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.001)
    return condition()


def _check_end(run: "subprocess.Popen[bytes]", directory: Path) -> None:
    """Raises unless a process ended well and had nothing to complain about."""
    said = directory.with_name(f"{directory.name}.err").read_text()
    if run.returncode != 0 or said:
        raise _CommandError(f"exit {run.returncode}: {said.strip() or 'nothing said'}")


# Signs -------------------------------------------------------------------------------


def _begins(directory: Path) -> Callable[[], bool]:
    """Whether a process has begun to write the record, from now on."""
    first = directory / ".reserve"
    before = _stamp(first)
    return lambda: _stamp(first) not in (None, before)


def _saves(directory: Path, step: int) -> Callable[[], bool]:
    folder = directory / "checkpoints"
    return lambda: any(folder.glob(f"{step}.orbax-checkpoint-tmp*"))


def _vouches(directory: Path, step: int) -> Callable[[], bool]:
    return (directory / "checkpoints" / str(step)).exists


def _has_metrics(directory: Path) -> bool:
    return _size(directory / "metrics.jsonl") > 0


def _is_written(directory: Path, reference: Reference) -> bool:
    whole = len(reference.left["metrics.jsonl"])
    return _size(directory / "metrics.jsonl") >= whole


def _is_completed(directory: Path) -> bool:
    record = directory / "run.json"
    return record.exists() and json.loads(record.read_text())["status"] == "completed"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def _differing(one: dict[str, Any], two: dict[str, Any]) -> str:
    return ", ".join(name for name in one if one[name] != two[name])


# The script --------------------------------------------------------------------------


def _plan(kills: int) -> list[tuple[str, Moment]]:
    """Trials in which cases and moments come up alike, however few there are."""
    cases, moments = list(CASES), list(Moment)
    every = [
        (case, moments[(n + turn) % len(moments)])
        for turn in range(len(moments))
        for n, case in enumerate(cases)
    ]
    return [every[n % len(every)] for n in range(kills)]


def _print_table(trials: Sequence[Trial]) -> None:
    rows: dict[tuple[str, str], list[Trial]] = defaultdict(list)
    for trial in trials:
        rows[trial.case, str(trial.moment)].append(trial)
    print(
        f"{'config':14}{'moment':10}{'trials':>7}{'kills':>7}  {'equal':8}resumed from"
    )
    for (case, moment), found in sorted(rows.items()):
        kills = sum(len(trial.kills) for trial in found)
        equal = sum(not trial.fault for trial in found)
        steps = sorted({step for trial in found for step in trial.resumed})
        share = f"{equal}/{len(found)}"
        shown = ", ".join(map(str, steps))
        print(f"{case:14}{moment:10}{len(found):7}{kills:7}  {share:8}{shown}")


def main() -> int:
    """Kills as often as asked; 1 where a run was not the same in the end."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="runs to kill")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="at once")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--verbose", action="store_true", help="a line a run")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="runner-kills-"))
    hidden = ("JAX_", "WANDB_", "XLA_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
    env |= {"XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    bench = Bench(folder, env)
    plan = _plan(options.kills)
    cases = list(dict.fromkeys(case for case, _ in plan))

    def run(number: int) -> Trial:
        case, moment = plan[number]
        seed = f"{options.seed}-{number}"
        trial = try_it(case, moment, references[case], bench, seed=seed)
        if not trial.fault:
            shutil.rmtree(trial.directory)
        if options.verbose or trial.fault:
            print(trial, flush=True)
        return trial

    with ThreadPoolExecutor(options.jobs) as pool:
        made = pool.map(lambda case: make_reference(case, bench), cases)
        references = dict(zip(cases, made, strict=True))
        trials = list(pool.map(run, range(len(plan))))
    _print_table(trials)
    faults = [trial for trial in trials if trial.fault]
    for trial in faults:
        print(f"kept: {trial.directory}")
    kills = sum(len(trial.kills) for trial in trials)
    equal = len(trials) - len(faults)
    print(f"{equal} of {len(trials)} equal, {kills} kills, seed {options.seed}")
    if not faults:
        shutil.rmtree(folder)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
