# SPDX-License-Identifier: Apache-2.0
"""Which runs share a program, and that a lane of it is the run alone, to the bit."""

import json
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from runner.compile import compile_run
from runner.lanes.groups import Group, Grouping, explain, group_runs
from runner.lanes.lane import Executable, Lane, make_lane
from runner.lanes.pool import count_workers, run_beside
from runner.recording import record_run
from runner.records.secrets import Secrets

pytestmark = pytest.mark.promotes

TINY = ("model.features=[8]", "train.steps=5", "eval.every=2", "sinks=none")


def group(make_spec: Any, *jobs: str) -> Grouping:
    """Each job in words, besides what all have."""
    specs = {n: make_spec(*TINY, *job.split()) for n, job in enumerate(jobs)}
    return group_runs(specs)


def numbers(found: Grouping) -> list[tuple[int, ...]]:
    return [each.numbers for each in found.groups]


# --- groups


def test_inputs_of_the_program_part_no_runs(make_spec: Any) -> None:
    found = group(
        make_spec,
        "seed=0",
        "seed=7 optimizer.learning_rate=0.1",
        "model.dropout_rate=0",
        "task.label_smoothing=0.1",
        "rng.streams.split.seed=3",
    )
    assert numbers(found) == [(0, 1, 2, 3, 4)]


@pytest.mark.parametrize("name", ["clip_norm", "max_norm", "l1", "l2"])
def test_numbers_of_train_are_of_one_family(make_spec: Any, name: str) -> None:
    """Traced once, with one data set: else their lanes can't be computed together."""
    found = group(make_spec, f"train.{name}=0.5", f"train.{name}=0.25", "seed=3")
    assert numbers(found) == [(0, 1), (2,)]
    assert [len(each.families) for each in found.groups] == [1, 1]


def test_what_is_not_compiled_parts_no_runs(make_spec: Any) -> None:
    """It comes out of the compiled programs: no list names these leaves."""
    found = group(
        make_spec,
        "eval.every=2",
        "eval.every=5 eval.patience=3",
        "checkpoint.keep=7",
        "determinism=strict",
        "train.steps_per_call=5",
    )
    assert numbers(found) == [(0, 1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("job", "why"),
    [
        ("model.features=[9]", "model.features[0] (9, not 8)"),
        ("+optimizer.b1=0.8", "optimizer.b1 (0.8, not null)"),
        ("train.steps=6", "train.steps (6, not 5)"),
        ("train.clip_norm=1.0", "train.clip_norm (1.0, not null)"),
        ("+rng.streams.dropout.seed=3", "rng.streams.dropout.seed (0, not null)"),
        (
            "data.batch_size=64 eval.batch_size=9",
            "data.batch_size (64, not 128), eval.batch_size (9, not null)",
        ),
    ],
)
def test_a_constant_of_the_program_parts_runs(
    make_spec: Any, job: str, why: str
) -> None:
    found = group(make_spec, "seed=0", job)
    assert numbers(found) == [(0,), (1,)]
    assert explain(found.groups[1], found.groups[0]) == why


def test_numbers_that_python_must_know_part_runs(make_spec: Any) -> None:
    """`flax.linen.Dropout` has an `if` on its rate."""
    layers = (
        "model={_target_: models.Sequential, layers: [{_target_: models.Flatten}, "
        "{_target_: flax.linen.Dropout, rate: RATE}, "
        "{_target_: flax.linen.Dense, features: 10}]}"
    )
    base = ("~model", "train.steps=3", "sinks=none")
    specs = {
        n: make_spec(*base, "+" + layers.replace("RATE", rate), f"seed={n}")
        for n, rate in enumerate(("0.1", "0.2", "0.1"))
    }
    found = group_runs(specs)
    assert not found.errors
    assert numbers(found) == [(0, 2), (1,)]
    assert "rate (0.2, not 0.1)" in explain(found.groups[1], found.groups[0])


def test_a_run_that_cannot_be_made_stops_no_other(make_spec: Any) -> None:
    found = group(make_spec, "data.batch_size=5000", "seed=1", "seed=2")
    assert numbers(found) == [(1, 2)]
    assert "must not exceed" in str(found.errors[0])


def test_probes_and_meshes_run_by_themselves(make_spec: Any) -> None:
    specs = {
        0: make_spec("+experiment=rng/one_stream", "sinks=none"),
        1: make_spec("+experiment=rng/one_stream", "sinks=none", "seed=1"),
        2: make_spec(*TINY, "mesh=data8"),
    }
    found = group_runs(specs)
    assert [each.why for each in found.groups] == [
        "a probe is one call",
        "a probe is one call",
        "its mesh takes all devices",
    ]


# --- lanes


def record(program: Any, directory: Path, **more: Any) -> dict[str, Any]:
    directory.mkdir(parents=True)
    record_run(program, directory=directory, secrets=Secrets({}, ()), **more)
    return dict(json.loads((directory / "run.json").read_text()))


def lanes_of(specs: dict[int, Any]) -> dict[int, Lane]:
    (found,) = group_runs(specs).groups
    assert isinstance(found, Group)
    executable = Executable(found.families[0].program)
    return {
        n: make_lane(family.program, specs[n], executable)
        for family in found.families
        for n in family.numbers
    }


@pytest.mark.parametrize(
    "words",
    [
        ("+experiment=dropout", "model.features=[64,32]", "train.steps=60"),
        ("+experiment=cnn", "data=digits", "train.steps=4", "data.batch_size=32"),
        ("+experiment=deep", "train.steps=8", "data.batch_size=16"),
        ("+experiment=batch_norm", "train.steps=6", "rng.impl=rbg"),
    ],
    ids=lambda words: words[0],
)
def test_lanes_beside_each_other_are_the_runs_alone(
    make_spec: Any, tmp_path: Path, words: tuple[str, ...]
) -> None:
    """All bits that a run records: config, keys, data, metrics, states, parameters."""
    differ = ("seed=0", "seed=5 optimizer.learning_rate=0.01")
    specs = {
        n: make_spec(*words, "sinks=none", *more.split())
        for n, more in enumerate(differ)
    }
    tasks = [
        [(n, partial(record, lane, tmp_path / "lanes" / str(n)))]
        for n, lane in lanes_of(specs).items()
    ]
    together = dict(run_beside(tasks, workers=2))
    alone = record(compile_run(specs[1]), tmp_path / "alone")
    assert together[1]["digests"] == alone["digests"]
    for same in ("status", "steps", "inputs", "constants", "construct", "best"):
        assert together[1][same] == alone[same]
    assert together[1]["guarantee"] == alone["guarantee"]
    assert together[0]["digests"]["params"] != alone["digests"]["params"]


def test_lanes_may_evaluate_and_save_at_steps_of_their_own(
    make_spec: Any, tmp_path: Path
) -> None:
    specs = {
        0: make_spec(*TINY, "seed=0"),
        1: make_spec(*TINY, "seed=1", "eval.every=3", "checkpoint.every=2"),
    }
    lane = record(lanes_of(specs)[1], tmp_path / "lane")
    alone = record(compile_run(specs[1]), tmp_path / "alone")
    assert lane["digests"] == alone["digests"]


def test_lanes_share_their_rows_on_the_device(make_spec: Any) -> None:
    """Also those whose specs differ in what is not compiled."""
    differ = ("seed=0", "seed=1", "eval.every=5")
    lanes = lanes_of({n: make_spec(*TINY, each) for n, each in enumerate(differ)})
    assert len({id(lane.place_data()) for lane in lanes.values()}) == 1
    assert len({id(lane.data) for lane in lanes.values()}) == 1


def test_rows_are_the_lanes_own_where_a_seed_splits_them(make_spec: Any) -> None:
    specs = {n: make_spec(*TINY, f"rng.streams.split.seed={n}") for n in range(2)}
    lanes = lanes_of(specs)
    for n, spec in specs.items():
        assert lanes[n].data_digest == compile_run(spec).data_digest
    assert lanes[0].data_digest != lanes[1].data_digest
    assert lanes[0].place_data() is not lanes[1].place_data()


# --- the pool


def test_what_a_task_raises_ends_no_other() -> None:
    def fail() -> None:
        raise ValueError("no")

    def leave() -> None:
        raise SystemExit(3)

    tasks: list[Any] = [[("a", fail), ("b", lambda: 2)], [("c", lambda: 3)]]
    ended = dict(run_beside([*tasks, [("d", leave)]], workers=2))
    assert str(ended.pop("a")) == "no"
    assert str(ended.pop("d")) == "SystemExit(3)"
    assert ended == {"b": 2, "c": 3}


def test_tasks_are_named_as_they_end_and_run_beside_each_other() -> None:
    both = threading.Barrier(2, timeout=30)
    slow = ("slow", lambda: (both.wait(), time.sleep(0.2)))
    quick = ("quick", both.wait)
    beside, at_once = [[slow], [quick]], [[slow, quick]]
    tasks: list[Any]
    for tasks, workers in ((beside, 2), (at_once, 1)):
        ended = [name for name, _ in run_beside(tasks, workers=workers)]
        assert ended == ["quick", "slow"]


def test_workers_are_no_more_than_lanes_and_what_the_user_says() -> None:
    assert count_workers(1, most=None) == 1
    assert count_workers(10_000, most=3) <= 3
