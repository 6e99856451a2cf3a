# SPDX-License-Identifier: Apache-2.0
"""A sweep in which jobs raise, give NaN, and one kills the process of them all.

A library for `test_trouble.py`, and a script, `make trouble`:

    python tests/trouble.py --jobs 200 --raising 20 --nan 10

Seeds decide what becomes of a job. Half of those that raise do so while they are
traced, the others in a step of the compiled program that all lanes share. The sweep is
launched until it is through: its second launch is the same words again. What came of
it is then read from the records alone.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

__all__ = ["End", "Trouble", "alone_faults", "faults_of", "launch", "manifests", "plan"]

ROOT = Path(__file__).parents[1]
STEPS = 40
_EVERY = 10  # steps between checkpoints, and between fingerprints
_AT = 25  # calls in training before the kill
_MODEL = """
import os
import signal
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from models import MLP

RAISES, IS_NAN, KILLS = 1, 2, 3
killers = []


def look(scale, _):
    if scale == RAISES:
        raise ValueError("trouble in a step")
    if scale == KILLS:
        killers.append(scale)
        if len(killers) == AT:
            once = Path(__file__).with_name("killed")
            if not once.exists():
                once.touch()
                os.kill(os.getpid(), signal.SIGKILL)
    return np.float32(np.nan if scale == IS_NAN else 1.0)


class Net(nn.Module):
    is_sound: bool
    scale: float

    @nn.compact
    def __call__(self, x, *, deterministic=False):
        if not self.is_sound:
            raise ValueError("trouble in the model")
        x = MLP(features=(16,), num_outputs=10, dropout_rate=0.5)(
            x, deterministic=deterministic
        )
        if deterministic:
            return x
        one = jax.ShapeDtypeStruct((), jnp.float32)
        seen = jax.lax.stop_gradient(x[0, 0])  # else it is called once for all steps
        return x * jax.pure_callback(look, one, jnp.float32(self.scale), seen)
"""


class End(StrEnum):
    """What becomes of a job."""

    FINE = "fine"
    TRACED = "raises while it is traced"
    STEP = "raises in a step"
    NAN = "gives NaN"
    KILL = "kills the process"


_SCALES = {End.STEP: 1.0, End.NAN: 2.0, End.KILL: 3.0}
_REASONS = {
    End.TRACED: "trouble in the model",
    End.STEP: "trouble in a step",
    End.NAN: "loss or update not finite at step 0",
}


@dataclass(frozen=True)
class Trouble:
    """A sweep, and what becomes of each of its jobs, by number."""

    folder: Path
    ends: Mapping[int, End]

    @property
    def sweep(self) -> Path:
        """Its directory."""
        return self.folder / "s"

    @property
    def failing(self) -> list[int]:
        """Numbers of the jobs that can't complete."""
        return [n for n, end in self.ends.items() if end in _REASONS]

    def words(self, *swept: str) -> list[str]:
        """Overrides of a job alone, and what is swept."""
        return [
            *("+experiment=dropout", "~model", "trusted=[trouble_lab]", "sinks=none"),
            "+model={_target_: trouble_lab.Net, is_sound: true, scale: 0.0}",
            *(f"train.steps={STEPS}", "data.batch_size=64", "eval.every=20"),
            *(f"checkpoint.every={_EVERY}", f"checkpoint.digest_every={_EVERY}"),
            *swept,
        ]

    def job(self, number: int) -> list[str]:
        """Overrides of one job alone."""
        end = self.ends[number]
        sound = str(end is not End.TRACED).lower()
        fields = {"seed": number, "model.is_sound": sound, "model.scale": _scale(end)}
        return self.words(*(f"{name}={value}" for name, value in fields.items()))

    def launched(self, *more: str) -> list[str]:
        """The words that launch it: three fields that go together."""
        ends = self.ends.values()
        sounds = ",".join(str(end is not End.TRACED).lower() for end in ends)
        swept = {
            "seed": f"range({len(self.ends)})",
            "model.is_sound": sounds,
            "model.scale": ",".join(str(_scale(end)) for end in ends),
        }
        return [
            "-m",
            *self.words(*(f"{name}={values}" for name, values in swept.items())),
            f"hydra.sweeper.zip=[{','.join(swept)}]",
            "hydra.sweep.dir=s",
            *more,
        ]


def _scale(end: End) -> float:
    return _SCALES.get(end, 0.0)


def plan(folder: Path, *, jobs: int, raising: int, nan: int, seed: int = 0) -> Trouble:
    """Writes the model, and draws which jobs get into trouble; one kills them all.

    That one is of the second half, so that some have ended before it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lab = f"AT = {_AT}\n{_MODEL}"
    (folder / "trouble_lab.py").write_text(lab)
    draw = random.Random(seed)
    killer = draw.randrange(jobs // 2, jobs)
    others = draw.sample([n for n in range(jobs) if n != killer], raising + nan)
    ends = dict.fromkeys(range(jobs), End.FINE)
    ends[killer] = End.KILL
    ends |= dict.fromkeys(others[: raising // 2], End.TRACED)
    ends |= dict.fromkeys(others[raising // 2 : raising], End.STEP)
    ends |= dict.fromkeys(others[raising:], End.NAN)
    return Trouble(folder, ends)


def launch(
    trouble: Trouble, words: list[str], env: Mapping[str, str]
) -> "subprocess.CompletedProcess[str]":
    """Runs the command line in the folder of the sweep."""
    path = f"{trouble.folder}{os.pathsep}{env.get('PYTHONPATH', ROOT)}"
    return subprocess.run(
        [sys.executable, "-m", "runner", *words],
        cwd=trouble.folder,
        env={**env, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


# What is left ------------------------------------------------------------------------


def manifests(trouble: Trouble) -> dict[int, dict[str, Any]]:
    """`run.json` of each job that has one, by its number."""
    paths = {n: trouble.sweep / str(n) / "run.json" for n in trouble.ends}
    return {n: json.loads(p.read_text()) for n, p in paths.items() if p.exists()}


def faults_of(
    trouble: Trouble,
    killed: "subprocess.CompletedProcess[str]",
    before: Mapping[int, dict[str, Any]],
    last: "subprocess.CompletedProcess[str]",
) -> list[str]:
    """What is wrong with a sweep that was killed and launched again; nothing, if well.

    Args:
        trouble: The sweep.
        killed: The launch that was killed.
        before: Manifests as that left them.
        last: The launch that came to its end.
    """
    return [
        *_faults_of_launches(trouble, killed, before, last),
        *_faults_of_listing(trouble, last),
        *(
            f"job {n}, which {end}: {fault}"
            for n, end in trouble.ends.items()
            for fault in _faults_of_job(trouble, n, before.get(n))
        ),
    ]


def _faults_of_launches(
    trouble: Trouble, killed: Any, before: Mapping[int, Any], last: Any
) -> Iterator[str]:
    alone = "hydra.launcher.processes=1" in killed.args  # else others live on
    if killed.returncode != (-signal.SIGKILL if alone else 1):
        yield f"the first launch ended with {killed.returncode}: {killed.stderr}"
    if last.returncode != 1:
        yield f"the last launch ended with {last.returncode}: {last.stderr}"
    if not any(manifest["status"] == "completed" for manifest in before.values()):
        yield "nothing had completed before the kill"
    number = next(n for n, end in trouble.ends.items() if end is End.KILL)
    if before.get(number, {}).get("status") != "running":
        yield "the one that kills was not killed"


def _faults_of_listing(trouble: Trouble, last: Any) -> Iterator[str]:
    """All that failed, in the last line of stderr and in `sweep.json`, each once."""
    failing = trouble.failing
    line = last.stderr.rstrip("\n").rpartition("\n")[2]
    head, _, names = line.partition(" jobs failed: ")
    names = re.sub(r" \([^()]*(\([^()]*\)[^()]*)*\)", "", names)  # the reasons
    named = sorted(map(int, re.findall(r"\d+", names)))
    if (head, named) != (f"error: sweep: {len(failing)}", sorted(failing)):
        yield f"the last line of stderr does not name {failing}: {line}"
    said = [int(n) for n in re.findall(r"^ERROR: job (\d+) \(", last.stderr, re.M)]
    if len(said) > len({*said}) or {*said} - {*failing}:
        yield f"stderr has lines of {said}, and {failing} failed"
    sweep = json.loads((trouble.sweep / "sweep.json").read_text())
    counts = {"completed": len(trouble.ends) - len(failing), "failed": len(failing)}
    if sweep["counts"] != counts:
        yield f"sweep.json counts {sweep['counts']}, not {counts}"
    listed = [int(job["job"]) for job in sweep["jobs"]]
    if listed != list(trouble.ends):
        yield f"sweep.json lists {listed}"
    for job in sweep["jobs"]:
        reason = _REASONS.get(trouble.ends[int(job["job"])], "")
        if reason not in job["reason"] or bool(reason) != bool(job["reason"]):
            yield f"sweep.json says of job {job['job']}: {job['reason']!r}"


def _faults_of_job(
    trouble: Trouble, number: int, before: dict[str, Any] | None
) -> Iterator[str]:
    """Whether it ended as it had to, and took each of its steps once."""
    directory, end = trouble.sweep / str(number), trouble.ends[number]
    if end is End.TRACED:
        names = {path.name for path in directory.iterdir()}
        if names - {"failure.json", "runner.log"}:
            yield f"it was never begun and left {names}"
        return
    now = json.loads((directory / "run.json").read_text())
    status = "failed" if end in _REASONS else "completed"
    if now["status"] != status:
        yield f"{now['status']}, not {status}"
    if before is not None and before["status"] != "running" and now != before:
        yield "it had ended, and its record is another now"
    if before is not None and now["run_id"] != before["run_id"]:
        yield "it was begun twice"
    rows = (directory / "metrics.jsonl").read_text().splitlines()
    events = [json.loads(row) for row in rows]
    steps = [e["step"] for e in events if e["phase"] == "train"]
    evals = [e["step"] for e in events if e["phase"] == "eval"]
    taken = {End.STEP: [0], End.NAN: [1]}.get(end, [STEPS])[0]
    if steps != list(range(taken)):
        yield f"its train steps are {steps}"
    if status == "completed" and (now["steps"] != STEPS or evals != [20, 40]):
        yield f"{now['steps']} steps, evaluated at {evals}"
    log = (directory / "runner.log").read_text()
    begun, resumed = log.count("experiment  dropout"), now.get("resumed", ())
    unsaid = sum(session["step"] == 0 for session in resumed)  # killed before its line
    if not 1 + len(resumed) - unsaid <= begun <= 1 + len(resumed):
        yield f"its log begins {begun} times"


def main() -> int:
    """Launches, launches again, runs some jobs alone; 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--raising", type=int, default=20)
    parser.add_argument("--nan", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of who gets into trouble")
    parser.add_argument("--alone", type=int, default=5, help="jobs to run alone, too")
    parser.add_argument("--processes", type=int, default=1, help="that run lanes")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="runner-trouble-"))
    hidden = ("JAX_", "WANDB_", "XLA_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
    env |= {"XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    trouble = plan(
        folder / "sweep",
        **{name: getattr(options, name) for name in ("jobs", "raising", "nan", "seed")},
    )
    processes = f"hydra.launcher.processes={options.processes}"
    words = trouble.launched("hydra/launcher=vectorized", processes)
    killed = launch(trouble, words, env)
    before = manifests(trouble)
    statuses = [manifest["status"] for manifest in before.values()]
    print("killed:", *(f"{statuses.count(s)} {s}" for s in sorted({*statuses})))
    last = launch(trouble, words, env)
    print("again: ", *last.stderr.splitlines()[-1:])
    faults = faults_of(trouble, killed, before, last)
    faults += alone_faults(trouble, env, count=options.alone)
    print(*faults, f"{len(faults)} faults, in {folder}", sep="\n")
    if not faults:
        shutil.rmtree(folder)
    return 1 if faults else 0


def alone_faults(
    trouble: Trouble, env: Mapping[str, str], *, count: int
) -> Iterator[str]:
    """Runs the job that killed, and some others, alone: all digests must be equal."""
    lanes = manifests(trouble)
    fine = [n for n, end in trouble.ends.items() if end is End.FINE]
    killer = [n for n, end in trouble.ends.items() if end is End.KILL]
    for number in [*killer, *random.Random(0).sample(fine, count)]:
        ran = launch(trouble, trouble.job(number), env)
        alone = json.loads(Path(ran.stdout.splitlines()[-1], "run.json").read_text())
        for name, digest in alone["digests"].items():
            if lanes[number]["digests"].get(name) != digest:
                yield f"job {number}: {name} is not that of the job alone"


if __name__ == "__main__":
    sys.exit(main())
