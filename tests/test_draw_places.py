# SPDX-License-Identifier: Apache-2.0
"""Places that draw, with the sizes of their coordinates, and which pairs are left."""

from itertools import combinations
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_meet import SIZES, derivations

import runner.hazards.places
from runner.audit.lifted import Rule
from runner.audit.trace import Draw, Use
from runner.compile import compile_run
from runner.hazards.meet import SplitRule, link_ops, meet
from runner.hazards.places import Place, find_places, pairs_that_may_meet
from runner.ops import Affine, Op
from runner.spec import Coordinate, Phase


def place(ops: tuple[Op, ...], rule: SplitRule = SplitRule.FOLD) -> Place:
    return Place(
        phase=Phase.TRAIN,
        draw=Draw("s", ops, ("layer",), 1, (), Use("random_bits", (), 32)),
        ops=ops,
        links=link_ops(ops, sizes=SIZES, rule=rule),
        rule=rule,
        sizes=SIZES,
        crossings=(),
    )


@given(
    several=st.lists(derivations, max_size=6),
    rule=st.sampled_from([SplitRule.FOLD, SplitRule.COUNT]),
)
@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
def test_no_pair_that_meets_is_left_out(several: Any, rule: SplitRule) -> None:
    places = tuple(place(ops, rule) for ops in several)
    pairs = [frozenset(map(id, pair)) for pair in pairs_that_may_meet(places)]
    assert len({*pairs}) == len(pairs)
    assert all(len(pair) == 2 for pair in pairs)
    for a, b in combinations(places, 2):
        if meet(a.links, b.links):
            assert frozenset((id(a), id(b))) in pairs


def test_few_pairs_are_left_of_many_paths() -> None:
    """Each derivation ends in the hash of another path."""
    seed, step = Op("seed", 0), Op("fold_in", Coordinate.STEP)
    hashed = tuple(place((seed, step, Op("fold_in", 10**6 + i))) for i in range(500))
    rows = tuple(place((seed, step, Op("split", index=n, of=3))) for n in "ij")
    assert list(pairs_that_may_meet(hashed)) == []
    assert len(list(pairs_that_may_meet((*hashed, *rows)))) == 1


def test_a_loop_at_the_end_may_end_in_any_number() -> None:
    seed, fold = Op("seed", 0), Op("fold_in", 7)
    loop = place((seed, Op("repeat", index=3, body=(fold,), counter="turn")))
    folds = place((seed, fold, fold, fold))
    assert meet(loop.links, folds.links)
    assert list(pairs_that_may_meet((loop, folds))) == [(loop, folds)]


def test_indexed_by_and_repeats() -> None:
    seed, step = Op("seed", 0), Op("fold_in", Coordinate.STEP)
    both = Op("fold_in", Affine(0, (("i", 1), ("j", 1))))
    apart = Op("fold_in", Affine(0, (("i", 3), ("j", 1))))
    assert place((seed, step, apart)).indexed_by == {"step", "i", "j"}
    assert not place((seed, step, apart)).repeats
    assert place((seed, step, both)).repeats
    assert str(place((seed,))) == "train layer"


@pytest.fixture(scope="module")
def program(make_spec: Any) -> Any:
    words = ("+experiment=dropout", "train.steps=50", "eval.batch_size=100")
    streams = ("train.accumulation_steps=4", "rng.streams.dropout.phases=[train,eval]")
    return compile_run(make_spec(*words, *streams, "optimizer=sgd"))


def test_sizes_are_those_of_the_whole_run(program: Any) -> None:
    """An evaluation comes once more, after the last step."""
    places = find_places(program)
    (sizes,) = {tuple(p.sizes.items()) for p in places if p.phase is Phase.TRAIN}
    epochs = -(-50 // program.sizes.steps_per_epoch)
    assert dict(sizes) == {"step": 50, "epoch": epochs, "microbatch": 4}
    after = runner.hazards.places._sizes(program, Phase.EVAL)
    batches = program.sizes.eval_batches
    assert batches > 1
    assert (after["step"], after["microbatch"]) == (51, batches)
    assert all(p.is_traced for p in places)
    drawn = {str(p): p for p in places}
    dropout = drawn["train Dropout_0"]
    assert dropout.indexed_by == {"step", "microbatch"}
    assert [op.op for op in dropout.ops] == ["seed", *["fold_in"] * 4]
    assert dropout.crossings == ()


def test_lifts_around_a_draw(make_spec: Any) -> None:
    program = compile_run(make_spec("+experiment=deep", "optimizer=sgd"))
    inside = {str(p): p.crossings for p in find_places(program) if p.crossings}
    assert set(inside) == {"init blocks/Dense_0", "train blocks/Dropout_0"}
    for crossings in inside.values():
        assert [c.axis for c in crossings] == ["scan:blocks", "remat:blocks"]
        assert [c.rule for c in crossings] == [Rule.SPLIT, Rule.PASSED]
