# SPDX-License-Identifier: Apache-2.0
"""Damaged bytes in every file of a record: each is found, or changes no answer.

A library for `test_damage.py`, and a script:

    python tests/damage.py --damages 2000 --clean 200 --seed 7

A damage is one of `Outcome`; `silent` is the one that must not be.
"""

import argparse
import contextlib
import hashlib
import io
import os
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from forging import Parts, forge, make_probe, make_run, pack

from runner.errors import RecordError
from runner.records.digests import digest_config, digest_leaves, digest_plain
from runner.records.events import EvalRecord, StateRecord, TrainRecord
from runner.records.record import Record, read_record
from runner.records.restore import list_saved, read_saved
from runner.replay.compare import Replay
from runner.replay.reproduce import check_files

__all__ = [
    "Bench",
    "Kind",
    "Outcome",
    "make_bench",
    "outcome_of",
    "read",
    "table",
    "try_damage",
]

ROOT = Path(__file__).parents[1]
_SECONDS = 20  # for one reading; more is a hang


class Kind(StrEnum):
    """What is done to a file."""

    FLIP = "flip a bit"
    CUT = "cut short"
    DELETE = "delete"
    SWAP_BYTES = "swap two bytes"
    SWAP_FILES = "swap two files"


class Outcome(StrEnum):
    """What came of a damage.

    `found`: the record is refused. `same`: every value that a verb reads is as before.
    `earlier`: a checkpoint, or the end of a killed run's metrics, counts as never
    written; a resumption goes on before it, to the same bytes. `compared`: a killed
    run's metrics, behind its last checkpoint; another number, found by `reproduce`.
    """

    FOUND = "found"
    SAME = "same"
    EARLIER = "earlier"
    COMPARED = "compared"
    SILENT = "SILENT"


@dataclass(frozen=True)
class Values:
    """All that verbs read of a record."""

    rest: str
    metrics: tuple[Mapping[str, Any], ...]
    states: tuple[Mapping[str, Any], ...]
    saved: Mapping[int, str]


@dataclass(frozen=True)
class Bench:
    """Records to be damaged, by their names, and what each holds."""

    records: Mapping[str, Path]
    clean: Mapping[str, Values]


def make_bench(home: Path, *, env: dict[str, str]) -> Bench:
    """A run, one as a kill leaves it, a probe, and archives of the run."""
    run = make_run(home / "run", env=env)

    def kill(parts: Parts) -> None:
        parts.manifest |= {"status": "running", "ended": None, "steps": 0}
        parts.manifest |= {"metrics": {}, "best": None}
        gone = ("params", "metrics", "states")
        parts.manifest["digests"] |= dict.fromkeys(gone)
        parts.keeps = gone

    killed = forge(run, home / "killed", kill)
    shutil.rmtree(killed / "checkpoints" / "24")  # stopped behind step 16
    (killed / "checkpoints" / "24.json").unlink()
    records = {
        "run": run,
        "killed": killed,
        "probe": make_probe(home / "probe", env=env),
        "zip": pack(run, home / "run.zip"),
        "tar.gz": pack(run, home / "run.tar.gz"),
    }
    return Bench(records, {name: read(path) for name, path in records.items()})


def read(path: Path) -> Values:
    """Reads everything, as the verbs together do.

    Raises:
        RecordError: a verb would refuse it.
    """
    with _limited():
        record = read_record(str(path))
        check_files(record)
        outputs = _outputs(record)
        rest = [record.manifest, digest_config(record.config), record.ledger, outputs]
        saved = {step: _saved(record, step) for step in list_saved(record.files)}
        return Values(digest_plain(rest), record.metrics, record.states, saved)


def _saved(record: Record, step: int) -> str:
    saved = read_saved(record.files, step, run_id=record.manifest["run_id"])
    names = (n for n in record.files.names if n.startswith(f"checkpoints/{step}/"))
    contents = {name: record.files.read(name) or b"" for name in names}
    hashed = {name: hashlib.sha256(c).hexdigest() for name, c in contents.items()}
    return digest_plain([saved.to_plain(), hashed])


def _outputs(record: Record) -> str | None:
    content = record.files.read("outputs.npz")
    if content is None:
        return None
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return digest_leaves(dict(arrays))


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done after {_SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def try_damage(
    bench: Bench, draw: random.Random, *, record: str | None = None
) -> tuple[str, str, Kind, Outcome]:
    """Damages one file, reads the record, and mends the file again.

    Returns:
        The record, the file, what was done, and what came of it.
    """
    name = record or draw.choice(list(bench.records))
    path = bench.records[name]
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    victim = draw.choice(sorted(files))
    kind = draw.choice(list(Kind))
    kept = {file: file.read_bytes() for file in files}
    changed = _damage(victim, kind, draw, sorted(files), kept)
    try:
        outcome = outcome_of(path, bench.clean[name])
    finally:
        for file in changed:
            file.write_bytes(kept[file])
    return name, _group(name, path, victim), kind, outcome


def _damage(
    victim: Path,
    kind: Kind,
    draw: random.Random,
    files: list[Path],
    kept: Mapping[Path, bytes],
) -> list[Path]:
    """Does it; returns the files that changed."""
    content = bytearray(kept[victim])
    if kind is Kind.SWAP_FILES and len(files) > 1:
        other = draw.choice([file for file in files if file != victim])
        victim.write_bytes(kept[other])
        other.write_bytes(content)
        return [victim, other]
    if kind is Kind.DELETE:
        victim.unlink()
    elif kind is Kind.CUT:
        victim.write_bytes(content[: draw.randrange(max(len(content), 1))])
    elif kind is Kind.FLIP and content:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        victim.write_bytes(content)
    elif content:
        a, b = (draw.randrange(len(content)) for _ in range(2))
        content[a], content[b] = content[b], content[a]
        victim.write_bytes(content)
    return [victim]


def outcome_of(path: Path, clean: Values) -> Outcome:
    """What reading a record gives that held the values of `clean` before."""
    try:
        found = read(path)
    except RecordError as error:
        is_line = str(error).isprintable()
        return Outcome.FOUND if is_line else Outcome.SILENT
    if found == clean:
        return Outcome.SAME
    if found.rest != clean.rest or not found.saved.items() <= clean.saved.items():
        return Outcome.SILENT
    rows = (found.metrics, clean.metrics), (found.states, clean.states)
    if all(here == there for here, there in rows):
        return Outcome.EARLIER
    if path.name != "killed":  # a digest holds its rows
        return Outcome.SILENT
    if all(here == there[: len(here)] for here, there in rows):
        return Outcome.EARLIER
    return Outcome.COMPARED if _differs(path, clean) else Outcome.SILENT


def _differs(path: Path, clean: Values) -> bool:
    """Whether a reproduction, which gives the clean numbers, finds others."""
    replay = Replay(read_record(str(path)), goes_on=True)
    for row in clean.metrics:
        values = {k: v for k, v in row.items() if k not in ("phase", "step")}
        if row["phase"] == "eval":
            replay.take(EvalRecord(row["step"], values))
        else:
            columns = {k: np.array([v], np.float64) for k, v in values.items()}
            replay.take(TrainRecord(row["step"], columns))
    for row in clean.states:
        replay.take(StateRecord(row["step"], row["batches"], row["state"]))
    return replay.has_other_bits or replay.reads_others


_NOT_READ = (".hydra", "runner.log", "wandb", "tensorboard")


def _group(name: str, path: Path, victim: Path) -> str:
    if path.is_file() or victim == path:
        return name
    parts = victim.relative_to(path).parts
    if parts[0] in _NOT_READ:
        return f"{name}: what no verb reads"
    if parts[0] == "checkpoints":
        return f"{name}: checkpoints/{'*.json' if len(parts) == 2 else '*/'}"
    return f"{name}: {'/'.join(parts)}"


def table(tried: list[tuple[str, str, Kind, Outcome]]) -> list[str]:
    """Counts by file and kind of damage, a line for each pair."""
    counts = Counter((group, kind, outcome) for _, group, kind, outcome in tried)
    pairs = sorted({(group, kind) for _, group, kind, _ in tried})
    lines = []
    for group, kind in pairs:
        found = {o: n for o in Outcome if (n := counts[group, kind, o])}
        told = ", ".join(f"{n} {outcome}" for outcome, n in found.items())
        lines.append(f"{group:32}  {kind:14}  {told}")
    return lines


def main() -> int:
    """Prints the table; 1 where a damage was silent, or a clean record refused."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--damages", type=int, default=2000)
    parser.add_argument("--clean", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="damage-") as home:
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        bench = make_bench(Path(home), env=env)
        refused = _read_clean(bench, options.clean)
        draw = random.Random(options.seed)
        tried = [try_damage(bench, draw) for _ in range(options.damages)]
        refused += _read_clean(bench, 5)
    print("\n".join(table(tried)))
    totals = Counter(outcome for *_, outcome in tried)
    print(", ".join(f"{totals[outcome]} {outcome}" for outcome in Outcome))
    print(f"{options.clean} clean reads: {refused} refused or other")
    print(f"seed {options.seed}")
    return int(totals[Outcome.SILENT] > 0 or refused > 0)


def _read_clean(bench: Bench, number: int) -> int:
    names = list(bench.records)
    every: list[Callable[[], bool]] = [
        lambda name=name: read(bench.records[name]) == bench.clean[name]  # type: ignore[misc]
        for name in (names[i % len(names)] for i in range(number))
    ]
    return sum(not is_same() for is_same in every)


if __name__ == "__main__":
    sys.exit(main())
