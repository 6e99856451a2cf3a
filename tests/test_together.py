# SPDX-License-Identifier: Apache-2.0
"""Lanes by `vmap`: keys of the runs alone, floats near them, ends of their own."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runner.compile import compile_run
from runner.course import Start
from runner.kept import PARTS
from runner.lanes.choose import choose, why_not_together
from runner.lanes.groups import group_runs
from runner.lanes.lane import Executable, Lane, make_lane
from runner.lanes.mode import Mode, Options
from runner.lanes.pool import run_beside
from runner.lanes.stacked import Stacked
from runner.lanes.together import Together
from runner.loop import Outcome, train
from runner.recording import record_run
from runner.records.events import TrainRecord
from runner.records.secrets import Secrets

pytestmark = [pytest.mark.promotes, pytest.mark.xdist_group("together")]

WORDS = (
    *("+experiment=dropout", "model.features=[16]", "train.steps=30", "sinks=none"),
    *("eval.every=10", "checkpoint.digest_every=10", "data.batch_size=64"),
    "eval.batch_size=256",  # two parts
)
WIDTH = 4


def lanes_of(specs: list[Any]) -> list[Lane]:
    (found,) = group_runs(dict(enumerate(specs))).groups
    executable = Executable(found.families[0].program)
    made = {
        n: make_lane(family.program, specs[n], executable)
        for family in found.families
        for n in family.numbers
    }
    return [made[n] for n in sorted(made)]


@pytest.fixture(scope="module")
def stacked(make_spec: Any) -> Stacked:
    """Compiled once for all tests here."""
    (lane,) = lanes_of([make_spec(*WORDS)])
    return Stacked(lane.executable, width=WIDTH)


class Watched:
    """A compiled `train` that says how many lanes it is called with."""

    def __init__(self, train: Any, called: list[int]) -> None:
        self.train, self.called = train, called

    def __call__(self, state: Any, takes: Any, *args: Any) -> Any:
        self.called.append(len(takes))
        return self.train(state, takes, *args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.train, name)


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of the programs of `train`, one for each call."""
    called: list[int] = []
    calls: Any = Stacked.__dict__["calls"].__get__

    def watched(stacked: Stacked) -> Any:
        found = calls(stacked)
        return found._replace(train=Watched(found.train, called))

    monkeypatch.setattr(Stacked, "calls", property(watched))
    return called


def run_together(
    stacked: Stacked, specs: list[Any], directory: Path
) -> list[dict[str, Any]]:
    """The manifests of runs that are computed together."""
    lanes = [
        make_lane(stacked.program, spec, Executable(stacked.program)) for spec in specs
    ]
    together = Together(stacked, steps=[s.train.steps for s in specs], why="together")

    def run(n: int, lane: Lane) -> None:
        where = directory / str(n)
        where.mkdir(parents=True)
        try:
            placed = replace(lane, place=together.place(n))
            record_run(placed, directory=where, secrets=Secrets({}, ()))
        finally:
            together.leave(n)

    batch = [(n, partial(run, n, lane)) for n, lane in enumerate(lanes)]
    assert [each for _, each in run_beside([batch], workers=1)] == [None] * len(lanes)
    texts = [(directory / str(n) / "run.json").read_text() for n in range(len(lanes))]
    return [json.loads(text) for text in texts]


def losses(directory: Path) -> np.ndarray:
    rows = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return np.array([row["loss"] for row in rows])


def test_keys_are_equal_and_floats_near(
    make_spec: Any, stacked: Stacked, tmp_path: Path
) -> None:
    differ = ["seed=0", "seed=1 optimizer.learning_rate=0.1", "model.dropout_rate=0"]
    specs = [make_spec(*WORDS, *each.split()) for each in differ]
    made = run_together(stacked, specs, tmp_path)
    for n, spec in enumerate(specs):
        where = tmp_path / f"alone{n}"
        where.mkdir()
        record_run(compile_run(spec), directory=where, secrets=Secrets({}, ()))
        alone = json.loads((where / "run.json").read_text())
        for equal in ("keys", "data", "config"):
            assert made[n]["digests"][equal] == alone["digests"][equal]
        batches = [
            [json.loads(line)["batches"] for line in path.read_text().splitlines()]
            for path in (where / "states.jsonl", tmp_path / str(n) / "states.jsonl")
        ]
        assert batches[0] == batches[1]
        near = np.abs(losses(where) - losses(tmp_path / str(n)))
        assert near.max() < 1e-4
        assert made[n]["steps"] == alone["steps"] == 30
        assert made[n]["guarantee"]["level"] == "key-exact"
        assert "together" in made[n]["guarantee"]["reasons"]
        assert alone["guarantee"]["level"] == "bit-exact"


def test_lanes_end_by_themselves(
    make_spec: Any, stacked: Stacked, tmp_path: Path
) -> None:
    """One diverges, one stops early, one saves and evaluates at other steps: the
    others end with the bits that they have beside well-behaved neighbours.
    """
    calm = ["seed=0", "seed=1", "seed=2", "seed=3"]
    wild = [
        "seed=0",
        "seed=1 optimizer.learning_rate=1e20",
        "seed=2 eval.patience=1 eval.min_delta=1",
        "seed=3 eval.every=7 checkpoint.every=4",
    ]
    specs = [[make_spec(*WORDS, *e.split()) for e in each] for each in (calm, wild)]
    before = run_together(stacked, specs[0], tmp_path / "calm")
    after = run_together(stacked, specs[1], tmp_path / "wild")
    assert [each["status"] for each in before] == ["completed"] * 4
    statuses = ["completed", "failed", "completed", "completed"]
    assert [each["status"] for each in after] == statuses
    assert "not finite at step" in after[1]["reason"]
    assert "early stop at step 20" in after[2]["reason"]
    assert (after[2]["steps"], after[0]["steps"]) == (20, 30)
    for n in (0, 3):
        assert before[n]["digests"]["params"] == after[n]["digests"]["params"]


COMPILING = "runner.lanes.stacked._COMPILING"


def test_lanes_that_are_left_move_to_fewer(
    make_spec: Any,
    stacked: Stacked,
    widths: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where it pays; then with their own states, keys and numbers."""
    differ = ["steps=10", "steps=20", "steps=10", "steps=30 model.dropout_rate=0.2"]
    specs = [
        make_spec(*WORDS, f"seed={n}", *f"train.{each}".split())
        for n, each in enumerate(differ)
    ]
    stayed = run_together(stacked, specs, tmp_path / "stayed")
    assert widths == [4, 4, 4]
    widths.clear()
    monkeypatch.setattr(COMPILING, 0)
    moved = run_together(stacked, specs, tmp_path / "moved")
    assert widths == [4, 2, 1]
    for n, (ours, theirs) in enumerate(zip(moved, stayed, strict=True)):
        assert ours["steps"] == theirs["steps"] == specs[n].train.steps
        assert ours["digests"]["keys"] == theirs["digests"]["keys"]
        places = [tmp_path / each / str(n) for each in ("moved", "stayed")]
        states = [(each / "states.jsonl").read_text().splitlines() for each in places]
        batches = [[json.loads(line)["batches"] for line in each] for each in states]
        assert batches[0] == batches[1]
        assert np.abs(losses(places[0]) - losses(places[1])).max() < 1e-4
        evaluated = [each["metrics"]["eval/loss"] for each in (ours, theirs)]
        assert evaluated[0] == pytest.approx(evaluated[1], abs=1e-4)
        if specs[n].train.steps == 10:
            assert ours["digests"]["params"] == theirs["digests"]["params"]


def test_lanes_stay_where_fewer_can_not_be_compiled(
    make_spec: Any, stacked: Stacked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lower = Stacked._lower_eval
    tried = []

    def refuse(self: Stacked) -> Any:
        if self.width < WIDTH:
            tried.append(self.width)
            raise MemoryError("no room")
        return lower(self)

    monkeypatch.setattr(COMPILING, 0)
    monkeypatch.setattr(stacked, "_narrower", {})
    monkeypatch.setattr(Stacked, "_lower_eval", refuse)
    specs = [make_spec(*WORDS, f"train.steps={n}") for n in (10, 10, 20, 30)]
    made = run_together(stacked, specs, tmp_path)
    assert [each["status"] for each in made] == ["completed"] * 4
    assert tried == [2, 1]  # each once


def test_a_lane_that_diverges_or_stops_early_frees_its_share(
    make_spec: Any,
    stacked: Stacked,
    widths: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(COMPILING, 0)
    differ = [
        "train.steps=10",
        "optimizer.learning_rate=1e20",
        "eval.patience=1 eval.min_delta=1",
        "train.steps=50",
    ]
    specs = [make_spec(*WORDS, *each.split()) for each in differ]
    made = run_together(stacked, specs, tmp_path)
    assert "not finite at step" in made[1]["reason"]
    assert "early stop at step 20" in made[2]["reason"]
    assert [each["status"] for each in made][::3] == ["completed"] * 2
    assert (widths[0], widths[-1]) == (4, 1)


def test_an_evaluation_is_ended_before_lanes_move(
    make_spec: Any,
    stacked: Stacked,
    widths: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Lane 3 asks for `train` with two lanes left, lane 0 for a second part of two:
    that has to wait until both ask for `train`.
    """
    differ = ["checkpoint.every=4", "train.steps=10", "train.steps=10", "seed=3"]
    specs = [make_spec(*WORDS, each) for each in differ]
    stayed = run_together(stacked, specs, tmp_path / "stayed")
    widths.clear()
    monkeypatch.setattr(COMPILING, 0)
    moved = run_together(stacked, specs, tmp_path / "moved")
    assert widths == [4] * 7 + [2] * 2 + [1] * 3
    for ours, theirs in zip(moved, stayed, strict=True):
        assert ours["metrics"] == pytest.approx(theirs["metrics"], abs=1e-4)


def test_what_pays(stacked: Stacked) -> None:
    narrower = stacked.narrower(2, steps=10**8)
    assert narrower is not None
    assert narrower.width == 2
    assert stacked.narrower(2, steps=10**8) is narrower  # compiled once for all
    assert stacked.narrower(2, steps=1000) is None
    assert stacked.narrower(3, steps=10**8) is None


@pytest.mark.parametrize("compiling", [np.inf, 0])
def test_a_lane_goes_on_from_a_checkpoint(
    make_spec: Any,
    stacked: Stacked,
    compiling: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beside one that begins: each takes steps of its own, and they end as before,
    also where they move to fewer lanes first.
    """
    monkeypatch.setattr(COMPILING, compiling)
    specs = [make_spec(*WORDS, f"seed={n}") for n in range(2)]
    lanes = [make_lane(stacked.program, s, Executable(stacked.program)) for s in specs]

    def run(starts: list[Start]) -> list[list[Any]]:
        together = Together(stacked, steps=[30, 30, 30], why="together")
        together.leave(0)

        def one(n: int) -> list[Any]:
            try:
                placed = replace(lanes[n], place=together.place(n + 1))
                events = list(train(placed, start=starts[n]))
                end = events[-1]
                assert isinstance(end, Outcome)
                events[-1] = {p: getattr(end.state, p) for p in PARTS}
                return events
            finally:
                together.leave(n + 1)

        batch = [(n, partial(one, n)) for n in range(2)]
        return [events for _, events in sorted(run_beside([batch], workers=1))]

    whole = run([Start(), Start()])
    halves = [
        replace(lane, spec=replace(s, train=replace(s.train, steps=20)))
        for lane, s in zip(lanes, specs, strict=True)
    ]
    lanes, kept_lanes = halves, lanes
    half = run([Start(), Start()])
    lanes = kept_lanes
    gone_on = run([Start(), Start(20, half[1][-1])])
    for ours, theirs in zip(gone_on, whole, strict=True):
        first, second = (
            [np.asarray(leaf) for leaf in _leaves(events[-1])]
            for events in (ours, theirs)
        )
        assert all(
            a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True)
        )
    steps = [e.first_step for e in gone_on[1] if isinstance(e, TrainRecord)]
    assert steps[0] == 20


def _leaves(tree: Any) -> list[Any]:
    import jax

    return list(jax.tree.leaves(tree))


def test_what_a_call_raises_ends_every_lane(make_spec: Any) -> None:
    lanes = lanes_of([make_spec(*WORDS, f"seed={n}") for n in range(2)])

    class Broken(Stacked):
        @property
        def calls(self) -> Any:
            raise ValueError("no memory")

    together = Together(Broken(lanes[0].executable, width=2), steps=[30, 30], why="")

    def one(n: int) -> None:
        try:
            list(train(replace(lanes[n], place=together.place(n))))
        finally:
            together.leave(n)

    batch = [(n, partial(one, n)) for n in range(2)]
    found = [str(error) for _, error in run_beside([batch], workers=1)]
    assert found == ["no memory"] * 2


# --- the choice


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("+experiment=cnn data=digits", "convolutions on CPU are slow together"),
        ("rng.impl=rbg", "rng.impl rbg draws other bits under vmap"),
        ("rng.observe=true", "keys of lanes together can't be observed"),
    ],
)
def test_what_is_not_for_vmap_is_mapped(make_spec: Any, words: str, why: str) -> None:
    common = [word for word in WORDS if word.split("=")[0] != "model.features"]
    lanes = lanes_of(
        [
            make_spec(*common[(words[:1] == "+") :], *words.split(), f"seed={n}")
            for n in range(2)
        ]
    )
    assert why_not_together(lanes) == why
    assert choose(lanes, options=Options(Mode.VMAP), workers=2).mode is Mode.MAP


def test_a_short_sweep_is_not_measured(make_spec: Any) -> None:
    lanes = lanes_of([make_spec(*WORDS, f"seed={n}") for n in range(2)])
    assert choose(lanes, options=Options(Mode.AUTO), workers=2).mode is Mode.MAP


def test_a_lane_that_raises_while_it_is_measured_ends_no_other(
    make_spec: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(*_: Any, **__: Any) -> None:
        raise ValueError("no luck")

    monkeypatch.setattr("runner.lanes.choose._measure", raises)
    lanes = lanes_of([make_spec(*WORDS, f"seed={n}") for n in range(8)])
    chosen = choose(lanes, options=Options(Mode.AUTO), workers=2)
    assert (chosen.mode, chosen.why) == (Mode.MAP, "ValueError: no luck")


def test_other_rows_are_not_for_vmap(make_spec: Any) -> None:
    words = [[*WORDS, f"rng.streams.split.seed={n}"] for n in range(2)]
    lanes = lanes_of([make_spec(*each) for each in words])
    assert why_not_together(lanes) == "they read other rows"


@pytest.mark.parametrize(
    ("most", "width"), [(None, 3), (4, 2)], ids=["all at a time", "max_lanes"]
)
def test_lanes_are_spread_evenly(
    make_spec: Any, monkeypatch: pytest.MonkeyPatch, most: int | None, width: int
) -> None:
    monkeypatch.setattr("runner.lanes.choose._compare", lambda *_: "")  # compiles
    lanes = lanes_of([make_spec(*WORDS, f"seed={n}") for n in range(5)])
    chosen = choose(lanes, options=Options(Mode.VMAP, most), workers=2)
    assert chosen.stacked is not None
    assert chosen.stacked.width == width
