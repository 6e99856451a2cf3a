# SPDX-License-Identifier: Apache-2.0
"""Exact words of every derivation, spelled out by hand with `jax.random` alone."""

import contextlib
import hashlib
import itertools
import threading
import time
from collections.abc import Iterator
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.errors import UnknownStreamError
from runner.keys import (
    KeyPlan,
    Op,
    Stream,
    advance_carry,
    bind_ops,
    derive_base_keys,
    derive_key,
    draw_canary,
    host_generator,
    host_words,
    key_words,
    make_rngs,
    name_id,
    plan_keys,
    rng_flags,
    split_carry,
)
from runner.parse import Frozen
from runner.spec import (
    Coordinate,
    Derive,
    Impl,
    Phase,
    RngSpec,
    Rule,
    StreamKind,
    StreamSpec,
)

COORDINATES = [c for c in Coordinate if c is not Coordinate.PROCESS]  # those of keys
STEP, EPOCH, MICROBATCH = COORDINATES
FOLD, CARRY, SPLIT = Rule
ALL = frozenset(COORDINATES)
IMPLS = [str(impl) for impl in Impl]
SEEDS = [0, 1, 2**31 - 1, 2**31, 2**32 - 1]
STEPS_PER_EPOCH = 2


def per(*coordinates: Coordinate, **rules: Rule) -> Frozen[Rule]:
    folds = dict.fromkeys(coordinates, FOLD)
    return Frozen({Coordinate(c): r for c, r in rules.items()} | folds)


def rng(streams: dict[str, StreamSpec] | None = None, **fields: Any) -> RngSpec:
    return RngSpec(streams=Frozen(streams or {}), **fields)


@contextlib.contextmanager
def flags(spec: RngSpec) -> Iterator[None]:
    with rng_flags(spec):
        yield


def sha(name: str) -> int:
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)


def words(key: Any) -> list[int]:
    return np.asarray(jax.random.key_data(key)).astype(int).tolist()


def at(step: int, microbatch: int = 0) -> dict[str, int]:
    """Coordinates of a microbatch of a step, by hand."""
    return {
        "step": step,
        "epoch": step // STEPS_PER_EPOCH,
        "microbatch": microbatch,
    }


def key_of(
    spec: RngSpec,
    name: str,
    *,
    phase: Phase = Phase.TRAIN,
    has: frozenset[Coordinate] = ALL,
    **coordinates: int,
) -> list[int]:
    """What `runner.keys` derives."""
    plan = plan_keys(spec)
    ops = plan.stream(name).ops(phase, has)
    return key_words(derive_key(ops, impl=plan.impl, coordinates=coordinates))


# By hand --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("dropout", 457968169),
        ("params", 2718651130),
        ("eval", 465377092),
        ("sample", 2938887137),
        ("", 3820012610),
        ("é", 1251562878),
    ],
)
def test_name_id(name: str, number: int) -> None:
    """`printf NAME | sha256sum | head -c 8`, read as a hexadecimal number."""
    assert name_id(name) == sha(name) == number


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("impl", IMPLS)
def test_by_name(seed: int, impl: str) -> None:
    spec = rng({"dropout": StreamSpec()}, seed=seed, impl=Impl(impl))
    root = jax.random.key(seed, impl=impl)
    assert key_of(spec, "dropout") == words(jax.random.fold_in(root, sha("dropout")))


@pytest.mark.parametrize("partitionable", [True, False])
@pytest.mark.parametrize("seed", [0, 2**32 - 1])
@pytest.mark.parametrize("impl", IMPLS)
def test_by_split(impl: str, seed: int, partitionable: bool) -> None:
    """The i-th child over those that say `split`, in the order declared."""
    split = StreamSpec(derive=Derive.SPLIT)
    spec = rng(
        {"b": split, "other": StreamSpec(), "a": split, "c": split},
        seed=seed,
        impl=Impl(impl),
        partitionable=partitionable,
    )
    with flags(spec):
        keys = jax.random.split(jax.random.key(seed, impl=impl), 3)
        for i, name in enumerate(["b", "a", "c"]):
            assert key_of(spec, name) == words(keys[i])


def test_partitionable_changes_a_split() -> None:
    found = set()
    for partitionable in (True, False):
        streams = {name: StreamSpec(derive=Derive.SPLIT) for name in "ab"}
        spec = rng(streams, partitionable=partitionable)
        with flags(spec):
            found.add(tuple(key_of(spec, "b")))
    assert len(found) == 2


@pytest.mark.parametrize("impl", IMPLS)
def test_root(impl: str) -> None:
    spec = rng({"a": StreamSpec(derive=Derive.ROOT)}, seed=3, impl=Impl(impl))
    assert key_of(spec, "a") == words(jax.random.key(3, impl=impl))


@pytest.mark.parametrize("seed", SEEDS)
def test_own_seed(seed: int) -> None:
    """`root` by default; `derive: name` folds the name in."""
    named = StreamSpec(seed=seed, derive=Derive.NAME)
    spec = rng({"a": StreamSpec(seed=seed), "b": named}, seed=1)
    root = jax.random.key(seed)
    assert key_of(spec, "a") == words(root)
    assert key_of(spec, "b") == words(jax.random.fold_in(root, sha("b")))


def test_exact_words() -> None:
    """Numbers, so that no change of `jax.random` passes unseen."""
    streams = {
        "dropout": StreamSpec(per=per(STEP)),
        "noise": StreamSpec(seed=7, per=per(step=CARRY)),
        "a": StreamSpec(derive=Derive.SPLIT),
        "b": StreamSpec(derive=Derive.SPLIT),
    }
    spec = rng(streams)
    with flags(spec):
        assert words(jax.random.key(2**32 - 1)) == [0, 2**32 - 1]
        found = {name: key_of(spec, name, **at(3)) for name in streams}
    assert found == {
        "dropout": [973963574, 3032040930],
        "noise": [3326660486, 421734308],
        "a": [1797259609, 2579123966],
        "b": [928981903, 3453687069],
    }


@pytest.mark.parametrize(
    ("phase", "folds"),
    [
        (Phase.INIT, []),
        (Phase.TRAIN, []),
        (Phase.EVAL, ["eval"]),
        (Phase.SAMPLE, ["sample"]),
    ],
)
@pytest.mark.parametrize("derive", list(Derive))
def test_phases(phase: Phase, folds: list[str], derive: Derive) -> None:
    """Evaluation and sampling never share a key with training."""
    spec = rng({"a": StreamSpec(derive=derive, per=per(STEP))}, seed=4)
    key = jax.random.key(4)
    if derive is Derive.NAME:
        key = jax.random.fold_in(key, sha("a"))
    elif derive is Derive.SPLIT:
        key = jax.random.split(key, 1)[0]
    for name in folds:
        key = jax.random.fold_in(key, sha(name))
    key = jax.random.fold_in(key, 9)
    assert key_of(spec, "a", phase=phase, **at(9)) == words(key)


@pytest.mark.parametrize(
    "order",
    [o for n in range(4) for o in itertools.permutations(COORDINATES, n)],
    ids="-".join,
)
@pytest.mark.parametrize(("step", "microbatch"), [(0, 0), (6, 1), (2**31 - 1, 3)])
def test_coordinates_in_their_order(
    order: tuple[Coordinate, ...], step: int, microbatch: int
) -> None:
    spec = rng({"a": StreamSpec(per=per(*order))})
    here = at(step, microbatch)
    key = jax.random.fold_in(jax.random.key(0), sha("a"))
    for coordinate in order:
        key = jax.random.fold_in(key, here[coordinate])
    assert key_of(spec, "a", **here) == words(key)


def test_a_coordinate_that_a_phase_has_not_is_not_folded() -> None:
    spec = rng({"a": StreamSpec(per=per(STEP, MICROBATCH))})
    base = jax.random.fold_in(jax.random.key(0), sha("a"))
    assert key_of(spec, "a", has=frozenset()) == words(base)
    folded = words(jax.random.fold_in(base, 6))
    assert key_of(spec, "a", has=frozenset({STEP, EPOCH}), **at(6)) == folded


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("step", [0, 1, 2, 7])
def test_carry(step: int, impl: str) -> None:
    """`key, next = split(key)`, as a loop does it; other coordinates come after."""
    stream = StreamSpec(seed=5, per=per(MICROBATCH, step=CARRY))
    spec = rng({"a": stream}, impl=Impl(impl))
    carried = jax.random.key(5, impl=impl)
    for _ in range(step + 1):
        key, carried = jax.random.split(carried)
    key = jax.random.fold_in(key, 3)
    assert key_of(spec, "a", **at(step, 3)) == words(key)


def test_split_and_advance_carry() -> None:
    key = jax.random.key(1)
    low, high = jax.random.split(key)
    now, then = split_carry(key)
    assert (words(now), words(then)) == (words(low), words(high))
    assert words(advance_carry(key, 0)) == words(key)
    assert words(advance_carry(key, 2)) == words(jax.random.split(high)[1])
    traced = jax.jit(advance_carry)(key, jnp.int32(2))
    assert words(traced) == words(advance_carry(key, 2))


# Ops ------------------------------------------------------------------------------


def test_planned_ops() -> None:
    """What the ledger prints is what is replayed."""
    stream = StreamSpec(per=per(EPOCH, step=CARRY))
    planned = plan_keys(rng({"a": stream}, seed=6)).stream("a")
    assert planned.base == (
        Op("seed", 6, why="seed"),
        Op("fold_in", sha("a"), why="stream a"),
    )
    assert planned.ops(Phase.EVAL, ALL)[2:] == (
        Op("fold_in", sha("eval"), why="phase eval"),
        Op("carry", STEP, why="step"),
        Op("fold_in", EPOCH, why="epoch"),
    )
    assert [op.coordinate for op in planned.ops(Phase.TRAIN, ALL)] == [
        None,
        None,
        STEP,
        EPOCH,
    ]


def test_bind_ops() -> None:
    ops = (Op("fold_in", STEP), Op("split", index="scan", of=4), Op("fold_in", 3))
    bound = bind_ops(ops, {"step": 5, "scan": 2})
    assert bound == (Op("fold_in", 5), Op("split", index=2, of=4), Op("fold_in", 3))
    assert bind_ops(bound, {}) == bound
    for lacking in ({"step": 5}, {"scan": 2}):
        with pytest.raises(KeyError):
            bind_ops(ops, lacking)


def test_replay_with_an_index() -> None:
    ops = (Op("seed", 1), Op("split", index="vmap", of=3), Op("fold_in", 2**32 - 1))
    for i in range(3):
        key = jax.random.split(jax.random.key(1), 3)[i]
        expected = words(jax.random.fold_in(key, 2**32 - 1))
        here: Any = {"vmap": i}
        found = derive_key(ops, impl="threefry2x32", coordinates=here)
        assert key_words(found) == expected


def test_replay_from_a_key() -> None:
    start = jax.random.key(8, impl="rbg")
    found = derive_key((Op("fold_in", 1),), impl="threefry2x32", start=start)
    assert key_words(found) == words(jax.random.fold_in(start, 1))
    assert words(derive_key((), impl="", start=start)) == words(start)


@pytest.mark.parametrize("seed", SEEDS)
def test_traced_seed_and_number(seed: int) -> None:
    """Traced or not, a number gives one key; seeds above 2^31 do not wrap."""
    ops = (Op("seed", seed), Op("fold_in", seed))

    def derive(value: Any) -> Any:
        traced = tuple(Op(op.op, value) for op in ops)
        return derive_key(traced, impl="threefry2x32")

    expected = words(jax.random.fold_in(jax.random.key(seed), seed))
    assert words(jax.jit(derive)(np.uint32(seed))) == expected
    assert words(derive_key(ops, impl="threefry2x32")) == expected


def test_key_words() -> None:
    assert key_words(jax.random.key(5)) == [0, 5]
    found = key_words(jax.random.key(5, impl="rbg"))
    assert len(found) == 4
    assert all(type(word) is int for word in found)


# Plans ----------------------------------------------------------------------------

MIXED = {
    "params": StreamSpec((Phase.INIT,)),
    "dropout": StreamSpec(per=per(MICROBATCH, step=CARRY)),
    "noise": StreamSpec((Phase.TRAIN, Phase.EVAL), per=per(STEP), seed=7),
    "late": StreamSpec((Phase.EVAL,), per=per(step=CARRY)),
    "epochal": StreamSpec((Phase.TRAIN, Phase.EVAL), per=per(EPOCH)),
    "shuffle": StreamSpec(kind=StreamKind.HOST, per=per(EPOCH)),
}


def test_streams_of_a_phase() -> None:
    plan = plan_keys(rng(MIXED))
    assert list(plan.in_phase(Phase.INIT)) == ["params"]
    assert list(plan.in_phase(Phase.TRAIN)) == ["dropout", "noise", "epochal"]
    assert list(plan.in_phase(Phase.EVAL)) == ["noise", "late", "epochal"]
    assert list(plan.in_phase(Phase.SAMPLE)) == []
    assert plan.carried() == ("dropout",)
    assert plan.streams["shuffle"].base == ()


def test_unknown_stream() -> None:
    plan = plan_keys(rng(MIXED))
    with pytest.raises(UnknownStreamError) as caught:
        plan.stream("dropuot")
    assert str(caught.value) == (
        "rng.streams.dropuot: not a declared stream (got 'dropuot'). "
        "Declared: params, dropout, noise, late, epochal, shuffle. "
        "Did you mean 'dropout'?"
    )


def test_plans_are_values() -> None:
    assert plan_keys(rng(MIXED)) == plan_keys(rng(MIXED))
    assert plan_keys(rng(MIXED)) != plan_keys(rng(MIXED, seed=1))


@pytest.mark.parametrize("impl", IMPLS)
def test_base_keys(impl: str) -> None:
    """From traced seeds: one program serves all."""
    spec = rng(MIXED, seed=2, impl=Impl(impl))
    plan = plan_keys(spec)
    seeds = {name: np.uint32(s.seed) for name, s in plan.streams.items()}
    keys = jax.jit(lambda s: derive_base_keys(plan, seeds=s))(seeds)
    assert sorted(keys) == ["dropout", "epochal", "late", "noise", "params"]
    for name, key in keys.items():
        eager = derive_key(plan.streams[name].base, impl=impl)
        assert words(key) == words(eager)
        assert str(jax.random.key_impl(key)) == impl
    other = derive_base_keys(plan, seeds={**seeds, "noise": np.uint32(8)})
    assert words(other["noise"]) == words(jax.random.key(8, impl=impl))


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("phase", [Phase.TRAIN, Phase.EVAL])
@pytest.mark.parametrize("has_parts", [True, False])
def test_make_rngs_under_jit(impl: str, phase: Phase, has_parts: bool) -> None:
    """The compiled program's keys are those of an eager derivation, step by step."""
    spec = rng(MIXED, impl=Impl(impl))
    plan = plan_keys(spec)
    has = frozenset({STEP, EPOCH} | ({MICROBATCH} if has_parts else set()))
    derive = jax.jit(
        make_rngs(
            plan,
            phase=phase,
            names=plan.in_phase(phase),
            coordinates=has,
            steps_per_epoch=STEPS_PER_EPOCH,
        )
    )
    keys = derive_base_keys(plan, seeds={n: s.seed for n, s in plan.streams.items()})
    carried = {n: keys[n] for n in plan.carried()} if phase is Phase.TRAIN else {}
    for step in range(3):
        for part in range(2) if has_parts else [None]:
            number = None if part is None else jnp.int32(part)
            found, after = derive(keys, carried, jnp.int32(step), number)
            assert sorted(found) == sorted(plan.in_phase(phase))
            for name, key in found.items():
                expected = key_of(
                    spec, name, phase=phase, has=has, **at(step, part or 0)
                )
                assert words(key) == expected
        assert sorted(after) == sorted(carried)
        carried = after


def test_make_rngs_without_what_is_carried() -> None:
    """A run that is resumed derives the carried key from the step."""
    plan = plan_keys(rng(MIXED))
    derive = make_rngs(
        plan,
        phase=Phase.TRAIN,
        names=plan.in_phase(Phase.TRAIN),
        coordinates=ALL,
        steps_per_epoch=3,
    )
    keys = derive_base_keys(plan, seeds={n: s.seed for n, s in plan.streams.items()})
    carried = {"dropout": advance_carry(keys["dropout"], 4)}
    with_it, after = derive(keys, carried, 4, 1)
    without, _ = derive(keys, {}, 4, 1)
    assert words(with_it["dropout"]) == words(without["dropout"])
    assert words(after["dropout"]) == words(advance_carry(keys["dropout"], 5))


# Host streams ---------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("rule", "epoch"), [((), 0), ((EPOCH,), 0), ((EPOCH,), 41)])
def test_host_generator(seed: int, rule: Any, epoch: int) -> None:
    spec = StreamSpec(kind=StreamKind.HOST, per=per(*rule))
    stream = plan_keys(rng({"shuffle": spec}, seed=seed)).stream("shuffle")
    spawn_key = (sha("shuffle"), epoch) if rule else (sha("shuffle"),)
    sequence = np.random.SeedSequence(seed, spawn_key=spawn_key)
    by_hand = np.random.Generator(np.random.Philox(sequence))
    found = host_generator(stream, epoch=epoch)
    np.testing.assert_equal(found.bit_generator.state, by_hand.bit_generator.state)
    assert (found.permutation(9) == by_hand.permutation(9)).all()
    assert host_words(stream) == [sha("shuffle"), *(["epoch"] if rule else [])]


def test_host_generator_by_epoch() -> None:
    """Without `per: [epoch]` an epoch changes nothing; with it, everything."""
    for rule, count in (((), 1), ((EPOCH,), 4)):
        spec = StreamSpec(kind=StreamKind.HOST, per=per(*rule))
        stream = plan_keys(rng({"a": spec})).stream("a")
        draws = {host_generator(stream, epoch=e).integers(2**63) for e in range(4)}
        assert len(draws) == count


def test_host_generator_starts_anew() -> None:
    spec = StreamSpec(kind=StreamKind.HOST, seed=3)
    stream = plan_keys(rng({"a": spec}, seed=1)).stream("a")
    first = host_generator(stream)
    first.random(5)
    assert host_generator(stream).random() != first.random()
    sequence = np.random.SeedSequence(3, spawn_key=(sha("a"),))
    expected = np.random.Generator(np.random.Philox(sequence)).random()
    assert host_generator(stream).random() == expected


# Independence ---------------------------------------------------------------------

names = st.from_regex(r"[a-z]{1,6}", fullmatch=True).filter(
    lambda n: n not in set(Phase)
)


@st.composite
def stream_specs(draw: Any) -> StreamSpec:
    order = draw(st.permutations(list(COORDINATES)))[: draw(st.integers(0, 3))]
    rules = dict.fromkeys(order, FOLD)
    if draw(st.booleans()):
        rules = {STEP: CARRY} | {c: r for c, r in rules.items() if c is not STEP}
    seed = draw(st.none() | st.integers(0, 2**32 - 1))
    choices = [None, Derive.NAME, Derive.ROOT]
    choices += [Derive.SPLIT] * (seed is None)
    derive = draw(st.sampled_from(choices))
    return StreamSpec(per=Frozen(rules), seed=seed, derive=derive)


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(names, stream_specs(), min_size=2, max_size=5), st.data())
def test_other_streams_move_no_key(streams: Any, data: Any) -> None:
    """Adding, removing, reordering: only the keys of `split` streams may move."""
    order = data.draw(st.permutations(list(streams)))
    kept = order[: data.draw(st.integers(1, len(order)))]
    changed = {name: streams[name] for name in kept}
    if data.draw(st.booleans()):
        changed["zzzzzzz"] = StreamSpec(derive=data.draw(st.sampled_from(Derive)))
    before, after = plan_keys(rng(streams)), plan_keys(rng(changed))
    for name in kept:
        if streams[name].derivation is not Derive.SPLIT:
            assert before.stream(name) == after.stream(name)
    splits = [n for n, s in streams.items() if s.derivation is Derive.SPLIT]
    for i, name in enumerate(splits):
        op = before.stream(name).base[-1]
        assert (op.index, op.of) == (i, len(splits))


@settings(max_examples=60, deadline=None)
@given(
    st.permutations(list(COORDINATES)).flatmap(
        lambda o: st.integers(1, 3).map(lambda n: tuple(o[:n]))
    ),
    st.integers(0, 2**31 - 1),
    st.integers(0, 2**31 - 1),
    st.integers(0, 7),
    st.integers(0, 7),
)
def test_distinct_coordinates_give_distinct_keys(
    order: tuple[Coordinate, ...], step: int, other: int, part: int, other_part: int
) -> None:
    """And equal ones equal keys: a key depends on what `per` lists alone."""
    spec = rng({"a": StreamSpec(per=per(*order))})
    left, right = at(step, part), at(other, other_part)
    same = all(left[c] == right[c] for c in order)
    assert (key_of(spec, "a", **left) == key_of(spec, "a", **right)) is same


@settings(max_examples=30, deadline=None)
@given(
    st.sets(names, min_size=2, max_size=4),
    st.sampled_from([Derive.NAME, Derive.SPLIT]),
    st.integers(0, 2**32 - 1),
)
def test_streams_phases_and_steps_share_no_key(
    chosen: set[str], derive: Derive, seed: int
) -> None:
    spec = rng({n: StreamSpec(per=per(STEP), derive=derive) for n in chosen}, seed=seed)
    keys = [
        tuple(key_of(spec, name, phase=phase, **at(step)))
        for name in chosen
        for phase in (Phase.TRAIN, Phase.EVAL, Phase.SAMPLE)
        for step in range(3)
    ]
    assert len(set(keys)) == len(keys)


def test_init_and_train_share_a_base_key() -> None:
    """A stream of both phases without `step`: one key, by contract."""
    spec = rng({"a": StreamSpec((Phase.INIT, Phase.TRAIN))})
    assert key_of(spec, "a", phase=Phase.INIT) == key_of(spec, "a")


# Flags and the canary -------------------------------------------------------------


def read_flags() -> tuple[Any, ...]:
    return (
        flax.config.flax_fix_rng_separator,
        jax.config.jax_threefry_partitionable,
        jax.config.jax_default_prng_impl,
    )


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_rng_flags(impl: str, fails: bool) -> None:
    """Set within, restored after, also when something is raised."""
    before = read_flags()
    spec = rng(impl=Impl(impl), partitionable=False, fix_separator=False)
    with contextlib.suppress(ZeroDivisionError), rng_flags(spec):
        assert read_flags() == (False, False, impl)
        assert str(jax.random.key_impl(jax.random.key(0))) == impl
        with rng_flags(rng()):
            assert read_flags() == (True, True, "threefry2x32")
        assert read_flags() == (False, False, impl)
        if fails:
            raise ZeroDivisionError
    assert read_flags() == before


def test_rng_flags_of_a_thread_are_its_own() -> None:
    """Flax's are the process's: another thread waits, and no old value comes back."""
    before = read_flags()
    inside, seen = threading.Event(), []

    def other() -> None:
        inside.wait()
        with rng_flags(rng(fix_separator=False)):
            seen.append(read_flags()[0])
            time.sleep(0.1)
            seen.append(read_flags()[0])

    thread = threading.Thread(target=other)
    thread.start()
    with rng_flags(rng(fix_separator=True)):
        inside.set()
        time.sleep(0.05)
        assert read_flags()[0] is True
    thread.join()
    assert seen == [False, False]
    assert read_flags() == before


CANARY = {
    "threefry2x32": "3bb44651bb7d0c5290f45e99370ba21b",
    "rbg": "1dbd26952ee25b27bcd25a0fb63a5010",
    "unsafe_rbg": "1dbd26952ee25b27bcd25a0fb63a5010",
}


@pytest.mark.parametrize("impl", IMPLS)
def test_canary(impl: str) -> None:
    """Fixed hex: the bits of the generators, and of the integers made of them."""
    first, second = draw_canary(impl), draw_canary(impl)
    assert first == second
    assert sorted(first) == ["bits", "normal", "permutation", "uniform"]
    assert [len(first[n]) for n in sorted(first)] == [32, 32, 64, 32]
    assert first["bits"] == CANARY[impl]
    raw = np.frombuffer(bytes.fromhex(first["permutation"]), np.int32)
    assert sorted(raw) == list(range(8))


def test_canaries_tell_impls_apart() -> None:
    assert len({draw_canary(impl)["bits"] for impl in IMPLS}) >= 2


@pytest.mark.parametrize("default", IMPLS)
def test_canary_does_not_depend_on_the_default(default: str) -> None:
    with rng_flags(rng(impl=Impl(default))):
        assert draw_canary("threefry2x32") == draw_canary("threefry2x32")
        assert draw_canary("threefry2x32")["bits"] == CANARY["threefry2x32"]


def test_canary_shows_partitionable() -> None:
    """Threefry draws in another order; a `rbg` permutation splits by threefry."""
    with jax.threefry_partitionable(True):
        on = {impl: draw_canary(impl) for impl in IMPLS}
    with jax.threefry_partitionable(False):
        off = {impl: draw_canary(impl) for impl in IMPLS}
    for name in ("bits", "uniform", "normal", "permutation"):
        assert on["threefry2x32"][name] != off["threefry2x32"][name]
    for impl in ("rbg", "unsafe_rbg"):
        assert on[impl]["bits"] == off[impl]["bits"]


def test_records_are_values() -> None:
    stream = Stream("a", StreamSpec(), 0, ())
    assert KeyPlan("rbg", {"a": stream}) == KeyPlan("rbg", {"a": stream})
    assert hash(Op("fold_in", STEP)) == hash(Op("fold_in", STEP))
