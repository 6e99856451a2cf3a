# SPDX-License-Identifier: Apache-2.0
"""The loop: on fake programs that count their calls, and on small real ones."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.compilation_cache import compilation_cache

from runner.data import BatchOrder, Dataset
from runner.loop import Outcome, Snapshot, train
from runner.mesh import ONE_DEVICE
from runner.platforms import set_compile_cache
from runner.program import Construct
from runner.records.events import EvalRecord, TrainRecord
from runner.spec import RegressionSpec, RunSpec
from runner.step import Batch

Events = list[Any]


def to_bits(tree: Any) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path): (str(x.dtype), x.shape, np.asarray(x).tobytes())
        for path, x in leaves
    }


def rows_of(events: Events) -> list[tuple[int, dict[str, bytes]]]:
    """Each train step with the bits of its metrics."""
    return [
        (event.first_step + i, {k: v[i].tobytes() for k, v in event.metrics.items()})
        for event in events
        if isinstance(event, TrainRecord)
        for i in range(event.steps)
    ]


def evals_of(events: Events) -> list[tuple[int, dict[str, float], bool]]:
    found = [event for event in events if isinstance(event, EvalRecord)]
    return [(event.step, dict(event.metrics), event.best) for event in found]


# --- fake programs


class Fake:
    """A program whose state is its step, and whose metrics are as they are told.

    Args:
        spec: Its `train`, `eval`, `checkpoint` and `task` count.
        fails: Step that is not finite.
        values: Evaluated loss, by step.
    """

    def __init__(
        self,
        spec: RunSpec,
        *,
        construct: Construct = Construct.LOOP,
        fails: int | None = None,
        values: Callable[[int], float] = float,
    ) -> None:
        x, y = np.zeros((6, 1), np.float32), np.zeros(6, np.float32)
        self.spec, self.construct = spec, construct
        self.data = Dataset(x, y, x[:4], y[:4], classes=None)
        self.order = BatchOrder(6, 2, lambda epoch: None)
        per_call = spec.train.steps_per_call
        most = 512 if per_call == "auto" else per_call
        self.window = min(most, spec.train.steps)
        self.is_paced = per_call == "auto"
        self.eval_rows, self.eval_sets = 4, {"": range(4)}
        self.fails, self.values, self.layout = fails, values, ONE_DEVICE
        self.log: list[str] = []
        self.calls = SimpleNamespace(
            train=self.take_steps, evaluate=self.evaluate, digest=self.digest
        )

    def start_observed(self) -> tuple[Any, None]:
        return (0, {}, {}), None

    def place_data(self) -> tuple[Batch, Batch]:
        data = self.data
        return Batch(data.x_train, data.y_train), Batch(data.x_test, data.y_test)

    def take_steps(
        self, state: int, window: Any, data: Any, keys: Any, hypers: Any
    ) -> tuple[int, Any, Any]:
        first, rows = int(window["first"]), np.asarray(window["rows"])
        count = int(window["steps"]) if self.construct is Construct.LOOP else 1
        for step in range(first, first + int(window["steps"])):
            at = 2 * (step % 3)
            assert rows[step - first].tolist() == [at, at + 1]
        taken = range(state, state + count)
        self.log.append(f"call {taken.start}")
        failed = -1
        if self.fails is not None and taken.stop > self.fails:
            failed, taken = self.fails, range(taken.start, min(taken.stop, self.fails))
        metrics: Any = np.zeros(self.window, np.float32)
        metrics[:count] = np.arange(state, state + count)
        if self.construct is Construct.STEP:
            metrics = metrics[0]
        fetched = Fetched(np.int32(failed), self.log, f"fetch {taken.start}")
        after = max(taken.stop, min(state, taken.start))
        return after, ({"loss": metrics}, None), fetched

    def digest(self, state: int) -> np.ndarray:
        return np.array([state, 7], np.uint32)

    def evaluate(
        self, sums: Any, state: int, at: Any, data: Any, keys: Any, hypers: Any
    ) -> Any:
        self.log.append(f"eval {state}")
        total = np.float32(self.values(state)) * at["weights"].sum()
        return {name: value + total for name, value in sums.items()}, None


class Fetched:
    """An array that notes when the host asks for it."""

    def __init__(self, value: Any, log: list[str], what: str) -> None:
        self.value, self.log, self.what = value, log, what

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        self.log.append(self.what)
        return np.asarray(self.value)


@pytest.fixture(scope="module")
def fake_spec(make_spec: Any) -> Callable[..., RunSpec]:
    base = make_spec("task=regression", "data=csv", "data.path=x", "data.target=y")

    def change(
        steps: int,
        per_call: int | str = 1,
        save: int | None = None,
        **evaluation: Any,
    ) -> RunSpec:
        return replace(
            base,
            task=RegressionSpec(),
            train=replace(base.train, steps=steps, steps_per_call=per_call),
            eval=replace(base.eval, **{"every": None, **evaluation}),
            checkpoint=replace(base.checkpoint, every=save, digest_every=None),
        )

    return change


EVERY = st.none() | st.integers(1, 9)


@settings(max_examples=150, deadline=None)
@given(
    steps=st.integers(1, 25),
    per_call=st.integers(1, 30) | st.just("auto"),
    every=EVERY,
    save=EVERY,
    end=st.tuples(st.sampled_from(["", "fails", "stops"]), st.integers(0, 24)),
    construct=st.sampled_from(Construct),
)
def test_records_are_complete_and_in_order(
    steps: int,
    per_call: Any,
    every: int | None,
    save: int | None,
    end: tuple[str, int],
    construct: Construct,
    fake_spec: Any,
) -> None:
    fails = end[1] if end[0] == "fails" and end[1] < steps else None
    if fails is not None:
        save = None  # see test_no_snapshot_after_a_failure
    calls = iter(range(1000))
    spec = fake_spec(steps, per_call, save, every=every)
    program = Fake(spec, construct=construct, fails=fails)
    stops = end[0] == "stops"

    def stop() -> str:
        return "enough" if stops and next(calls) >= end[1] else ""

    *events, outcome = train(program, stop=stop)
    assert isinstance(outcome, Outcome)
    assert not [event for event in events if isinstance(event, Outcome)]
    assert outcome.state == outcome.step  # the fake's state is its step
    status = "completed"
    if fails is not None:
        assert outcome.step == fails
        status = "failed"
    elif outcome.reason:
        status = "interrupted"
        assert stops
        assert outcome.reason == "enough"
    else:
        assert outcome.step == steps
    assert outcome.status == status

    rows = [
        (step, float(np.frombuffer(r["loss"], "f4")[0])) for step, r in rows_of(events)
    ]
    taken = outcome.step + (status == "failed")
    assert rows == [(step, float(step)) for step in range(taken)]

    due = {s for s in range(1, steps + 1) if s == steps or (every and s % every == 0)}
    seen = [event.step for event in events if isinstance(event, EvalRecord)]
    assert seen == sorted(s for s in due if s <= outcome.step)
    assert [e.metrics["loss"] for e in events if isinstance(e, EvalRecord)] == seen

    saved = {s for s in range(1, steps) if save and s % save == 0}
    shots = [(e.step, e.state) for e in events if isinstance(e, Snapshot)]
    assert shots == sorted((s, s) for s in saved if s <= outcome.step)

    at = 0  # an evaluation or a snapshot comes after the steps before it, and no later
    for event in events:
        if isinstance(event, TrainRecord):
            assert event.first_step == at
            at += event.steps
        else:
            assert event.step == at
    if construct is Construct.LOOP:
        longest = max(e.steps for e in events if isinstance(e, TrainRecord))
        assert longest <= (512 if per_call == "auto" else per_call)


def reference_stop(
    values: list[float], sign: int, patience: int, min_delta: float
) -> tuple[int | None, list[bool]]:
    """Index of the evaluation after which to stop, and which ones were best."""
    best, since, bests = None, 0, []
    for i, value in enumerate(values):
        if best is None or sign * (value - best) > min_delta:
            best, since = value, 0
            bests.append(True)
        else:
            since += 1
            bests.append(False)
        if since == patience:
            return i, bests
    return None, bests


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.integers(-8, 8).map(lambda n: n / 4), min_size=6, max_size=6),
    patience=st.integers(1, 4),
    min_delta=st.sampled_from([0.0, 0.5]),
    per_call=st.integers(1, 7),
)
def test_early_stop(
    values: list[float],
    patience: int,
    min_delta: float,
    per_call: int,
    fake_spec: Any,
) -> None:
    spec = fake_spec(
        18, per_call, None, every=3, patience=patience, min_delta=min_delta
    )
    program = Fake(spec, values=lambda step: values[step // 3 - 1])
    *events, outcome = train(program)
    last, bests = reference_stop(values, -1, patience, min_delta)
    want = 18 if last is None else 3 * (last + 1)
    assert (outcome.status, outcome.step, outcome.state) == ("completed", want, want)
    assert [best for _, _, best in evals_of(events)] == bests
    assert [step for step, _ in rows_of(events)] == list(range(want))
    assert ("early stop" in outcome.reason) == (last is not None)
    if last is not None:
        assert outcome.reason.startswith(f"early stop at step {want}: ")
        assert program.log[-1].split()[0] != "call"  # nothing was started after it


def test_metric_that_grows(make_spec: Any) -> None:
    base = make_spec("eval.every=1", "eval.patience=2", "train.steps=6")
    values = [0.1, 0.5, 0.5, 0.4, 0.9, 0.9]
    program = Fake(base, values=lambda step: values[step - 1])
    program.spec = replace(base, train=replace(base.train, steps_per_call=1))
    *events, outcome = train(program)
    assert [best for *_, best in evals_of(events)] == [True, True, False, False]
    assert outcome.step == 4
    assert "accuracy not better in 2 evaluations" in outcome.reason


def test_best_after_a_metric_that_is_no_number(fake_spec: Any) -> None:
    """A model that is NaN on one evaluation may still have a best one later."""
    values = [np.nan, 3.0, np.nan, 2.0]
    program = Fake(fake_spec(4, 1, None, every=1), values=lambda step: values[step - 1])
    best = [step for step, _, best in evals_of(list(train(program))) if best]
    assert best[-1] == 4
    assert 3 not in best


def test_no_snapshot_after_a_failure(fake_spec: Any) -> None:
    """The state at step 4 is that of step 3, frozen: no checkpoint of step 4."""
    program = Fake(fake_spec(8, 2, 2), fails=3)
    events = list(train(program))
    shots = [(e.step, e.state) for e in events if isinstance(e, Snapshot)]
    assert shots == [(2, 2)]


def test_stop_before_a_failure_is_seen(fake_spec: Any) -> None:
    program = Fake(fake_spec(8, 2), fails=1)
    *events, outcome = train(program, stop=lambda: "enough")
    assert (outcome.status, outcome.step) == ("failed", 1)
    assert [step for step, _ in rows_of(events)] == [0, 1]


@pytest.mark.parametrize("construct", Construct)
def test_host_waits_only_for_the_call_before_the_last(
    construct: Construct, fake_spec: Any
) -> None:
    program = Fake(fake_spec(6, 1), construct=construct)
    list(train(program))
    pairs = [(f"call {k + 1}", f"fetch {k}") for k in range(4)]
    rest = [word for pair in pairs for word in pair]
    last = ["call 5", "eval 6", "fetch 4", "fetch 5"]
    assert program.log == ["call 0", *rest, *last]


def test_evaluation_is_queued_before_the_host_waits(fake_spec: Any) -> None:
    program = Fake(fake_spec(6, 2, every=2))
    list(train(program))
    for k in (0, 2, 4):
        fetch = program.log.index(f"fetch {k}")
        assert program.log.index(f"eval {k + 2}") < fetch
    assert program.log.index("call 2") < program.log.index("fetch 0")


def test_auto_pace_grows_and_shrinks(fake_spec: Any, monkeypatch: Any) -> None:
    now = SimpleNamespace(seconds=0.0, per_step=0.001)
    program = Fake(fake_spec(3000, "auto"))
    call = program.calls.train

    def timed(state: int, window: Any, *args: Any) -> Any:
        now.seconds += now.per_step * int(window["steps"])
        if state > 1500:
            now.per_step = 0.05
        return call(state, window, *args)

    monkeypatch.setattr(program.calls, "train", timed)
    monkeypatch.setattr("runner.course.time.perf_counter", lambda: now.seconds)
    events = list(train(program))
    counts = [e.steps for e in events if isinstance(e, TrainRecord)]
    assert counts[0] == 8  # the first call is short, since nothing is known
    assert 150 <= max(counts) <= 512
    assert max(b / a for a, b in pairwise(counts)) <= 4
    assert counts[-2] <= 8
    assert sum(counts) == 3000


# --- real programs

STEPS, EVERY_EVAL = 13, 5
LOOP = ("model.features=[16]", "model.dropout_rate=0.5")
STEP = ("model=cnn", "model.channels=[2]", "model.features=[8]")
LENGTHS = [("loop", n) for n in (1, 2, 3, 7, "auto", 50)]
LENGTHS += [("step", n) for n in (3, "auto")]

Compile = Callable[..., Any]


@contextlib.contextmanager
def compile_cache(directory: Path) -> Iterator[None]:
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    compilation_cache.reset_cache()
    set_compile_cache(str(directory))
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Of what the programs here share; warm or cold, bits are the same."""
    with compile_cache(tmp_path_factory.mktemp("cache")):
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    draw = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "data.npz"
    x = draw.normal(size=(96, 8, 8)).astype(np.float32)
    y = draw.integers(0, 10, 96)
    np.savez(path, x_train=x[:70], y_train=y[:70], x_test=x[70:], y_test=y[70:])
    return "data=arrays", f"data.path={path}"


@pytest.fixture(scope="module")
def compile_(make_spec: Any, data: tuple[str, str], cache: None) -> Compile:
    from runner.compile import compile_run

    def compile_(*overrides: str) -> Any:
        common = ("seed=1", "data.batch_size=16", f"train.steps={STEPS}")
        return compile_run(make_spec(*common, *data, *overrides))

    return compile_


@pytest.fixture(scope="module")
def reference(compile_: Compile) -> Callable[[str], tuple[Any, Events, Outcome]]:
    """A program of each construct (in calls of 4 steps), and what it yields."""
    made: dict[str, tuple[Any, Events, Outcome]] = {}

    def run(construct: str) -> tuple[Any, Events, Outcome]:
        if construct not in made:
            model = LOOP if construct == "loop" else STEP
            every = f"eval.every={EVERY_EVAL}"
            program = compile_(*model, every, "train.steps_per_call=4")
            assert str(program.construct) == construct
            *events, outcome = train(program)
            made[construct] = program, events, outcome
        return made[construct]

    return run


@pytest.mark.promotes
@pytest.mark.parametrize(("construct", "per_call"), LENGTHS)
def test_chunk_length_changes_no_bit(
    construct: str, per_call: int | str, compile_: Compile, reference: Any
) -> None:
    _, want, end = reference(construct)
    model = LOOP if construct == "loop" else STEP
    every = f"eval.every={EVERY_EVAL}"
    program = compile_(*model, every, f"train.steps_per_call={per_call}")
    *events, outcome = train(program)
    assert rows_of(events) == rows_of(want)
    assert [step for step, _ in rows_of(events)] == list(range(STEPS))
    assert evals_of(events) == evals_of(want)
    assert [step for step, *_ in evals_of(events)] == [5, 10, 13]
    assert to_bits(outcome.state) == to_bits(end.state)
    assert (outcome.status, outcome.step, outcome.reason) == ("completed", STEPS, "")


@pytest.mark.promotes
@pytest.mark.parametrize("construct", ["loop", "step"])
def test_stop_at_any_moment(construct: str, reference: Any) -> None:
    program, want, _ = reference(construct)
    seen = set()
    for moment in range(5):
        asked = iter(range(100))
        *events, outcome = train(
            program, stop=lambda a=asked, m=moment: "enough" * (next(a) == m)
        )
        assert outcome.status == "interrupted"
        assert outcome.step == int(outcome.state.step) == len(rows_of(events))
        assert rows_of(events) == rows_of(want)[: outcome.step]
        evals = [row for row in evals_of(want) if row[0] <= outcome.step]
        assert evals_of(events) == evals
        seen.add(outcome.step)
    assert seen == {4, 5, 9, 10, 13}


@pytest.mark.promotes
def test_snapshot_is_the_state_of_its_step(reference: Any) -> None:
    program, _, _ = reference("loop")
    spec = program.spec
    often = replace(
        program, spec=replace(spec, checkpoint=replace(spec.checkpoint, every=3))
    )
    often.__dict__["calls"] = program.calls
    shots, events = {}, []
    for event in train(often):
        if isinstance(event, Snapshot):
            shots[event.step] = to_bits(jax.device_get(event.state))
        events.append(event)
    assert list(shots) == [3, 6, 9, 12]
    assert rows_of(events) == rows_of(reference("loop")[1])
    for step, bits in shots.items():
        assert to_bits(state_after(program, step)) == bits


def state_after(program: Any, steps: int) -> Any:
    """The state after so many calls of one step."""
    state, keys, hypers = program.start()
    held = jax.device_put(Batch(program.data.x_train, program.data.y_train))
    for step in range(steps):
        rows = np.zeros((program.window, program.order.batch_size), np.int32)
        rows[0] = program.order.indices(step, steps=1)
        window = {"first": np.int32(step), "rows": rows, "steps": np.int32(1)}
        args = (jax.device_put(window), held, keys, hypers)
        state, _, _ = program.calls.train(state, *args)
    return state


@pytest.mark.promotes
def test_state_is_donated(reference: Any) -> None:
    program, _, _ = reference("loop")
    state, keys, hypers = program.start()
    x, y = program.data.x_train, program.data.y_train
    rows = np.zeros((program.window, 16), np.int32)
    window = {"first": np.int32(0), "rows": rows, "steps": np.int32(2)}
    held = jax.device_put(Batch(x, y))
    after, _, _ = program.calls.train(state, window, held, keys, hypers)
    jax.block_until_ready(after)
    kept = [k for k, leaf in _leaves(state) if not leaf.is_deleted()]
    assert kept == []
    kept = [k for k, leaf in _leaves((after, held, keys, hypers)) if leaf.is_deleted()]
    assert kept == []


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves]


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """Names of the functions that XLA compiles meanwhile."""
    names: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if text.startswith("Finished XLA compilation of "):
                names.append(text.split()[4])

    listener, log = Listener(), logging.getLogger("jax")
    log.addHandler(listener)
    jax.config.update("jax_log_compiles", True)  # in every thread
    yield names
    jax.config.update("jax_log_compiles", False)
    log.removeHandler(listener)


@pytest.mark.promotes
def test_one_train_program_whatever_the_chunks(
    compile_: Compile, compilations: list[str]
) -> None:
    program = compile_(
        *("model.features=[]", "train.steps_per_call=4", "eval.every=5"),
        *("checkpoint.every=3", "eval.batch_size=7"),
    )
    assert compilations == []  # a compiled run runs nothing
    lengths, after_first = set(), None
    for event in train(program):
        if isinstance(event, TrainRecord):
            lengths.add(event.steps)
            after_first = after_first or len(compilations)
    assert lengths == {1, 2, 3}
    assert sorted(n for n in compilations if "call" in n or "setup" in n) == [
        "jit(call)",
        "jit(call)",
        "jit(setup)",
    ]
    assert compilations[after_first:] == []


CHANGES = [
    "seed=7",
    "optimizer.learning_rate=0.02",
    "optimizer.weight_decay=0.3",
    "model.dropout_rate=0.1",
    "model.dropout_rate=0",
    "task.label_smoothing=0.2",
    "train.clip_norm=0.5",
    "train.max_norm=1.5",
    "rng.streams.dropout.seed=4",
]


@pytest.mark.promotes
def test_values_change_no_compiled_program(compile_: Compile, tmp_path: Path) -> None:
    base = ("model.features=[4]", "optimizer=adamw", "train.steps_per_call=4")
    base += ("train.clip_norm=1", "train.max_norm=2", "+rng.streams.dropout.seed=9")

    def entries(*changes: str) -> set[str]:
        jax.clear_caches()
        program = compile_(*base, *changes)
        program.start()
        return {p.name for p in tmp_path.iterdir() if p.name.endswith("-cache")}

    with compile_cache(tmp_path):
        first = entries()
        assert len([n for n in first if n.startswith(("jit_call", "jit_setup"))]) == 3
        new = {change: entries(change) - first for change in CHANGES}
        assert new == {change: set() for change in CHANGES}
        other = entries("train.steps_per_call=5") - first  # what does change one
        assert [n for n in other if n.startswith("jit_call")]


# --- non-finite


@pytest.mark.promotes
@pytest.mark.parametrize("per_call", [1, 4, 20])
def test_failed_run_ends_after_the_failing_row(
    per_call: int, make_spec: Any, tmp_path: Path
) -> None:
    """Finite data, an infinite loss at step 6."""
    from runner.compile import compile_run

    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(60, 3)).astype("f4"), draw.normal(size=60).astype("f4")
    y[6 * 4 + 1] = 3e38
    path = tmp_path / "data.npz"
    np.savez(path, x_train=x, y_train=y, x_test=x[:5], y_test=y[:5])
    overrides = (
        *("data=arrays", f"data.path={path}", "task=regression", "data.shuffle=null"),
        *("model.num_outputs=1", "model.features=[]", "data.batch_size=4"),
        *("train.steps=12", "eval.every=2", f"train.steps_per_call={per_call}"),
    )
    program = compile_run(make_spec(*overrides))
    *events, outcome = train(program)
    assert (outcome.status, outcome.step) == ("failed", 6)
    assert outcome.reason == "loss or update not finite at step 6"
    assert [step for step, _ in rows_of(events)] == list(range(7))
    losses = [
        value
        for e in events
        if isinstance(e, TrainRecord)
        for value in e.metrics["loss"]
    ]
    assert np.isfinite(losses).tolist() == [True] * 6 + [False]
    assert [step for step, *_ in evals_of(events)] == [2, 4, 6]
    state = outcome.state
    assert (int(state.step), int(state.failed)) == (6, 6)
    want = state_after(program, 6)._replace(failed=np.int32(6))
    assert to_bits(state) == to_bits(want)


# --- hypers that are constants


@pytest.mark.promotes
def test_a_rate_that_python_must_know_is_a_constant(compile_: Compile) -> None:
    layers = (
        "{_target_: models.Flatten}",
        "{_target_: flax.linen.Dropout, rate: 0.3}",
        "{_target_: models.Dropout, rate: 0.2}",
        "{_target_: flax.linen.Dense, features: 10}",
    )
    listed = f"model.module.layers=[{', '.join(layers)}]"
    program = compile_("model=batch_norm", listed)
    assert program.baked == ("model.module.layers[1].rate",)
    assert dict(program.hypers) == {
        "model.module.layers[2].rate": 0.2,
        "optimizer.learning_rate": 0.001,
        "task.label_smoothing": 0.0,
    }
    _, _, hypers = program.start()
    assert {k: float(v) for k, v in hypers.items()} == pytest.approx(program.hypers)
