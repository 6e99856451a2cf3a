# SPDX-License-Identifier: Apache-2.0
"""Damaged bytes are found, or change no answer; the long form is `make damage`."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from damage import Bench, Outcome, make_bench, outcome_of, read, table, try_damage

from runner.errors import AlteredRecordError
from runner.records.record import read_record

pytestmark = pytest.mark.xdist_group("damage")


@pytest.fixture(scope="module")
def bench(user_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_bench(tmp_path_factory.mktemp("bench"), env=user_env)


def test_what_is_whole_is_read(bench: Bench) -> None:
    for name, path in bench.records.items():
        for _ in range(4):
            assert read(path) == bench.clean[name]
    assert bench.clean["zip"] == bench.clean["tar.gz"] == bench.clean["run"]


@pytest.mark.parametrize("seed", range(3))
def test_no_damage_is_silent(bench: Bench, seed: int) -> None:
    draw = random.Random(seed)
    tried = [try_damage(bench, draw) for _ in range(100)]
    counts = Counter(outcome for *_, outcome in tried)
    assert not counts[Outcome.SILENT], "\n".join(table(tried))
    assert counts[Outcome.FOUND] > 40
    for name, path in bench.records.items():  # all is mended again
        assert read(path) == bench.clean[name]


def test_what_no_verb_reads_may_be_damaged(bench: Bench) -> None:
    draw = random.Random(3)
    tried = [try_damage(bench, draw, record="run") for _ in range(60)]
    idle = {outcome for _, group, _, outcome in tried if "no verb" in group}
    assert idle <= {Outcome.SAME, Outcome.FOUND}  # found: swapped with another


@pytest.mark.parametrize(
    ("record", "name", "part"),
    [
        ("run", "metrics.jsonl", "metrics"),
        ("run", "states.jsonl", "states"),
        ("probe", "outputs.npz", "outputs"),
    ],
)
def test_a_file_is_the_one_that_its_digest_names(
    bench: Bench, record: str, name: str, part: str
) -> None:
    """Also where no value in it is another."""
    file = bench.records[record] / name
    kept = file.read_bytes()
    whole = read_record(str(bench.records[record]))
    file.write_bytes(kept.replace(b", ", b",  ", 1) + b"\n" * (part == "outputs"))
    with pytest.raises(AlteredRecordError, match=name):
        whole.check_file(part, name)
    file.unlink()
    with pytest.raises(AlteredRecordError, match=f"{name} is missing"):
        read_record(str(bench.records[record])).check_file(part, name)
    file.write_bytes(kept)


def test_of_a_killed_run_the_metrics_are_compared(bench: Bench) -> None:
    """Behind its last checkpoint no digest holds them; before it, one does."""
    run = bench.records["killed"]
    metrics = run / "metrics.jsonl"
    kept = metrics.read_bytes()
    lines = kept.splitlines(keepends=True)
    for i in range(len(lines)):
        changed = [
            *lines[:i],
            lines[i].replace(b'"loss": ', b'"loss": 1'),
            *lines[i + 1 :],
        ]
        metrics.write_bytes(b"".join(changed))
        outcome = outcome_of(run, bench.clean["killed"])
        is_saved = b"".join(lines[: i + 1]) in kept[: _saved_size(run)]
        assert outcome is (Outcome.FOUND if is_saved else Outcome.COMPARED), i
    metrics.write_bytes(kept)


def _saved_size(run: Path) -> int:
    saved = json.loads((run / "checkpoints" / "16.json").read_text())
    return int(saved["written"]["metrics"]["size"])
