# SPDX-License-Identifier: Apache-2.0
"""Random records, overrides and archives: a value that can run, or one clear line.

A library for `test_fuzz_records.py`, and a script:

    python tests/fuzz.py --cases 10000 --seed 7
"""

import argparse
import contextlib
import copy
import hashlib
import io
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from forging import Parts, forge, make_run, pack
from omegaconf import open_dict

from runner.cli.changes import parse_changes
from runner.cli.config import compose, read_composed
from runner.cli.keys import main as keys
from runner.cli.refusal import refusal_of
from runner.compile import compile_run
from runner.errors import RunnerError
from runner.records.digests import digest_config, digest_manifest, digest_plain
from runner.records.events import EvalRecord, StateRecord, TrainRecord
from runner.records.record import Record, read_record
from runner.records.restore import list_saved, read_saved
from runner.replay.changes import IN_REPRODUCE, IN_RESUME, spec_of
from runner.replay.compare import Replay
from runner.replay.environment import compare_environments
from runner.replay.reproduce import check_files

__all__ = ["CASES", "Bench", "make_bench", "try_case"]

ROOT = Path(__file__).parents[1]
_SECONDS = 30  # for one case; more is a hang
_COMPILED = 0.3  # of the configs that pass


@dataclass(frozen=True)
class Bench:
    """What is mutated.

    Args:
        home: A directory that nothing but a case's own record may change.
        record: A good record, as read.
        parts: Its files.
        archives: It, packed.
    """

    home: Path
    record: Record
    parts: Parts
    archives: tuple[bytes, ...]


def make_bench(home: Path, *, env: dict[str, str]) -> Bench:
    """A run, and archives of it."""
    run = make_run(home / "run", env=env)
    work = forge(run, home / "work")
    kinds = ("x.zip", "x.tar.gz", "x.tar")
    archives = tuple(pack(run, home / kind).read_bytes() for kind in kinds)
    parts = Parts(
        json.loads((run / "run.json").read_text()),
        yaml.safe_load((run / "config.yaml").read_text()),
        json.loads((run / "keys" / "ledger.json").read_text()),
    )
    return Bench(home, read_record(str(work)), parts, archives)


# --- mutations

TOKENS = (
    *("!!python/object/apply:os.system ['touch canary']", "!!binary aa", "!x ", "&a "),
    *("*a", "<<: ", "${oc.env:HOME}", "${seed}", "<secret>", "{", "}", "[", "]", ":"),
    *("- ", "? ", "|", ">", "\x1b[31m", "\0", "\n", "\r", "\t", "\u202e", "\ufeff"),
    *("null", "true", "~", ".nan", ".inf", "1e999", "-0.0", "0x1f", "0o7", "1_0"),
    *("2001-01-01", "1:30", "=", "+", "~~", "++", "@", "'", '"', "\\", "\\u0000", ","),
    *(
        "os.system",
        "_target_",
        "__class__",
        "???",
        "..",
        "/",
        "9" * 400,
        "-1",
        "x" * 99,
    ),
    *("choice(1,2)", "range(1,9)", "glob(*)", "sort(2,1)", "int(3)", "extend_list(1)"),
)
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63), 10**60, 0.5, -0.0, 1e308),
    *("", "x", "???", "${x}", "<secret>", "os.system", "step", "dropout", "auto"),
    *("../../x", "\x1b[31m", "\ud800", "null", [], [[]], {}, [None], {"": 1}),
    *({"_target_": "os.system", "_args_": ["touch canary"]}, {"lift": "remat"}),
    *({"_target_": "models.MLP"}, {"name": "x"}, {"offset": 3, "axes": {"x": 1}}),
)


def mutate_text(text: str, draw: random.Random) -> str:
    """A few characters more, fewer or others."""
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        at, end = sorted(draw.randrange(len(text) + 1) for _ in range(2))
        end = min(end, at + draw.choice([0, 1, 1, 8]))
        piece = draw.choice(
            [draw.choice(TOKENS), chr(draw.randrange(256)), "", text[at:end] * 3]
        )
        text = text[:at] + piece + text[end:]
    return text


def mutate_bytes(content: bytes, draw: random.Random) -> bytes:
    """Bits flipped, and pieces removed, repeated or moved."""
    changed = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 4])):
        at = draw.randrange(len(changed) or 1)
        end = at + draw.choice([0, 1, 4, 64, 512])
        how = draw.randrange(4)
        if how == 0 and changed:
            changed[min(at, len(changed) - 1)] ^= 1 << draw.randrange(8)
        elif how == 1:
            del changed[at:end]
        elif how == 2:
            changed[at:at] = changed[at:end]
        else:
            changed[at:end] = draw.randbytes(end - at)
    return bytes(changed)


def mutate_tree(tree: Any, draw: random.Random) -> Any:
    """Values and keys replaced, removed, added or moved."""
    tree = copy.deepcopy(tree)
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        places = [(None, None), *_places(tree)]
        parent, key = draw.choice(places[1:] or places)
        if parent is None:
            return copy.deepcopy(draw.choice(ODD))
        how = draw.randrange(6)
        if how == 0:
            del parent[key]
        elif how == 1 and isinstance(parent, dict):
            parent[draw.choice(TOKENS)] = parent.pop(key)
        elif how == 2:
            other, name = draw.choice(places[1:])
            parent[key] = copy.deepcopy(other[name])
        elif how == 3 and isinstance(parent, list):
            parent.insert(key, copy.deepcopy(draw.choice(ODD)))
        elif how == 4 and type(parent[key]) is int:
            parent[key] += draw.choice([-(2**32), -1, 1, 2, 2**16, 2**32, 2**40])
        else:
            parent[key] = copy.deepcopy(draw.choice(ODD))
    return tree


def _places(tree: Any) -> list[tuple[Any, Any]]:
    items: Any = ()
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list):
        items = enumerate(tree)
    found = []
    for key, child in list(items):
        found.append((tree, key))
        found.extend(_places(child))
    return found


# --- cases


def _try_override(bench: Bench, draw: random.Random) -> None:
    """What stands on the command line, as Hydra composes it."""
    words = ["+experiment=dropout", _mutate_word(draw)]
    if draw.random() < 0.3:
        words.append(draw.choice(WORDS))
    try:
        config = compose(words)
        choices = config.hydra.runtime.choices
        with open_dict(config):
            del config["hydra"]
        read_composed(config, choices=choices)
    except RunnerError:
        raise
    except Exception as error:  # so it is before a job begins
        raise refusal_of(error, words) from error


def _mutate_word(draw: random.Random) -> str:
    word = draw.choice(WORDS)
    path, _, value = word.partition("=")
    if draw.random() < 0.6:
        return f"{path}={mutate_text(value, draw)}"
    return mutate_text(word, draw)


WORDS = (
    *(
        "train.steps=10",
        "seed=3",
        "model.features=[16,8]",
        "optimizer.learning_rate=0.1",
    ),
    *(
        "data.batch_size=64",
        "rng.streams.dropout.phases=[train]",
        "model.dropout_rate=0",
    ),
    *("+rng.streams.x={phases: [train], per: [step]}", "sinks=none", "~eval.every"),
    *("data.path=/x", "trusted=[mylab]", "experiment=cnn", "+experiment=deep"),
    *("model={_target_: models.MLP}", "+model.note=${oc.env:HOME}", "task=regression"),
)


def _try_change(bench: Bench, draw: random.Random) -> None:
    """`PATH=VALUE` words of `resume` and `reproduce`."""
    changes = parse_changes([_mutate_word(draw)])
    may_change = draw.choice([IN_RESUME, IN_REPRODUCE])
    spec_of(bench.record, changes=changes, may_change=may_change)


def _try_config(bench: Bench, draw: random.Random) -> None:
    config = mutate_tree(bench.parts.config, draw)
    if not isinstance(config, dict):
        raise RunnerError("refused by the digest")
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=False)
    record = _reread(bench, {"config.yaml": text.encode()}, config=config)
    spec = spec_of(record, may_change=IN_REPRODUCE)
    if draw.random() < _COMPILED:
        compile_run(spec)


def _try_yaml(bench: Bench, draw: random.Random) -> None:
    text = yaml.safe_dump(bench.parts.config, sort_keys=False)
    mutated = mutate_text(text, draw).encode(errors="replace")
    try:
        config = yaml.safe_load(mutated)
        digest_config(config)
    except Exception:
        config = bench.parts.config
    spec_of(_reread(bench, {"config.yaml": mutated}, config=config))


def _try_manifest(bench: Bench, draw: random.Random) -> None:
    manifest = mutate_tree(bench.parts.manifest, draw)
    _try_keys(bench, {}, manifest=manifest)
    record = _reread(bench, {}, manifest=manifest)
    compare_environments(record.manifest, bench.parts.manifest)
    check_files(record)


def _try_ledger(bench: Bench, draw: random.Random) -> None:
    ledger = mutate_tree(bench.parts.ledger, draw)
    text = json.dumps(ledger).encode()
    step = draw.choice([[], ["--step", "3"], ["--step", str(2**31 - 1)]])
    _try_keys(bench, {"keys/ledger.json": text}, ledger=ledger, args=step)


def _try_json(bench: Bench, draw: random.Random) -> None:
    name = draw.choice(["run.json", "keys/ledger.json"])
    tree = bench.parts.manifest if name == "run.json" else bench.parts.ledger
    mutated = mutate_text(json.dumps(tree), draw).encode(errors="replace")
    _try_keys(bench, {name: mutated})


def _try_rows(bench: Bench, draw: random.Random) -> None:
    """Metrics and fingerprints, held against the good run's."""
    name = draw.choice(["metrics", "states"])
    good = ((bench.home / "run") / f"{name}.jsonl").read_text().splitlines()
    lines = list(good)
    at = draw.randrange(len(lines))
    if draw.random() < 0.5:
        lines[at] = mutate_text(lines[at], draw)
    else:
        lines[at] = json.dumps(mutate_tree(json.loads(lines[at]), draw))
    content = ("\n".join(lines) + "\n").encode(errors="replace")
    record = _reread(bench, {f"{name}.jsonl": content})
    replay = Replay(record, goes_on=True)
    for row in map(
        json.loads, ((bench.home / "run") / "metrics.jsonl").read_text().splitlines()
    ):
        values = {k: v for k, v in row.items() if k not in ("phase", "step")}
        if row["phase"] == "eval":
            replay.take(EvalRecord(row["step"], values))
        else:
            columns = {k: np.array([v], np.float64) for k, v in values.items()}
            replay.take(TrainRecord(row["step"], columns))
    for row in bench.record.states:
        replay.take(StateRecord(row["step"], row["batches"], row["state"]))
    replay.stop()


def _try_checkpoint(bench: Bench, draw: random.Random) -> None:
    step = draw.choice(list_saved(bench.record.files))
    name = f"checkpoints/{step}.json"
    plain = json.loads(((bench.home / "run") / name).read_text())
    plain = mutate_tree(plain, draw)
    if isinstance(plain, dict):
        rest = {k: v for k, v in plain.items() if k != "digest"}
        plain = {**rest, "digest": digest_plain(rest)}
    with _written(bench, {name: json.dumps(plain).encode()}):
        record = read_record(str(bench.home / "work"))
        for each in list_saved(record.files):
            read_saved(record.files, each, run_id=record.manifest["run_id"])


def _try_archive(bench: Bench, draw: random.Random) -> None:
    archive = bench.home / "case"
    archive.write_bytes(mutate_bytes(draw.choice(bench.archives), draw))
    try:
        check_files(read_record(str(archive)))
    finally:
        archive.unlink()


def _reread(
    bench: Bench,
    texts: dict[str, bytes],
    *,
    manifest: Any = None,
    config: Any = None,
    ledger: Any = None,
) -> Record:
    """The record with other files, and digests that fit; read again."""
    with _written(bench, texts, manifest=manifest, config=config, ledger=ledger):
        record = read_record(str(bench.home / "work"))
        _ = record.metrics, record.states
        return replace(record)


@contextlib.contextmanager
def _written(
    bench: Bench,
    texts: dict[str, bytes],
    *,
    manifest: Any = None,
    config: Any = None,
    ledger: Any = None,
) -> Iterator[None]:
    work = bench.home / "work"
    kept = {name: (work / name).read_bytes() for name in {*texts, "run.json"}}
    manifest = copy.deepcopy(bench.parts.manifest if manifest is None else manifest)
    if isinstance(manifest, dict):
        if isinstance(manifest.get("digests"), dict):
            new = {"config": digest_config(config or bench.parts.config)}
            new |= {"keys": digest_plain(ledger or bench.parts.ledger)}
            for name, content in texts.items():
                if name.endswith(".jsonl"):
                    new[name.removesuffix(".jsonl")] = _sha256(content)
            same = [k for k in new if k in manifest["digests"]]
            manifest["digests"] |= {k: new[k] for k in same if texts}
        manifest["digest"] = digest_manifest(manifest)
    try:
        for name, content in {
            "run.json": json.dumps(manifest).encode(),
            **texts,
        }.items():
            (work / name).write_bytes(content)
        yield
    finally:
        for name, content in kept.items():
            (work / name).write_bytes(content)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _try_keys(
    bench: Bench,
    texts: dict[str, bytes],
    *,
    args: list[str] | None = None,
    **parts: Any,
) -> None:
    with _written(bench, texts, **parts), contextlib.redirect_stdout(io.StringIO()):
        keys([str(bench.home / "work"), *(args or [])])


CASES: dict[str, Callable[[Bench, random.Random], None]] = {
    "override": _try_override,
    "change": _try_change,
    "config": _try_config,
    "yaml": _try_yaml,
    "manifest": _try_manifest,
    "ledger": _try_ledger,
    "json": _try_json,
    "rows": _try_rows,
    "checkpoint": _try_checkpoint,
    "archive": _try_archive,
}


def try_case(bench: Bench, kind: str, draw: random.Random) -> str:
    """`runs`, `refused`, or what went wrong."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done after {_SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    environment, names = dict(os.environ), _names(bench)
    signal.alarm(_SECONDS)
    try:
        CASES[kind](bench, draw)
        outcome = "runs"
    except RunnerError as error:
        outcome = "refused" if "\n" not in str(error) else f"two lines: {error}"
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"[:300]
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    if dict(os.environ) != environment or _names(bench) != names:
        outcome = f"touched what is not its own: {outcome}"
    return outcome


def _names(bench: Bench) -> set[str]:
    return {*os.listdir(bench.home), *os.listdir(bench.home / "work"), *os.listdir()}


def main() -> int:
    """Prints counts by kind; 1 where a case neither runs nor is refused."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    parser.add_argument("--only", choices=list(CASES))
    options = parser.parse_args()
    counts: Counter[tuple[str, str]] = Counter()
    seconds: Counter[str] = Counter()
    wrong = []
    with tempfile.TemporaryDirectory(prefix="fuzz-") as home:
        bench = make_bench(Path(home), env={**os.environ, "PYTHONPATH": str(ROOT)})
        kinds = [options.only] if options.only else list(CASES)
        for i in range(options.cases):
            kind = kinds[i % len(kinds)]
            seed = f"{options.seed}/{i}"
            begin = time.perf_counter()
            outcome = try_case(bench, kind, random.Random(seed))
            seconds[kind] += time.perf_counter() - begin
            known = outcome in ("runs", "refused")
            counts[kind, outcome if known else "WRONG"] += 1
            if not known:
                wrong.append(f"{kind} {seed}: {outcome}")
    for kind, outcome in sorted(counts):
        print(f"{kind:12}  {outcome:8}  {counts[kind, outcome]}")
    print("seconds:", ", ".join(f"{k} {v:.0f}" for k, v in seconds.items()))
    print("\n".join(wrong[:100]))
    print(f"{options.cases} cases, {len(wrong)} wrong; seed {options.seed}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
