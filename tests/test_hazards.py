# SPDX-License-Identifier: Apache-2.0
"""A config that has a hazard is caught; its mended twin is not."""

from pathlib import Path
from typing import Any

import pytest

from runner.compile import compile_run
from runner.errors import HazardsRefusedError
from runner.hazards import Severity, find_hazards, refuse_hazards
from runner.spec import parse_spec

SHUFFLE = {"kind": "host", "per": ["epoch"]}
SPLIT = {"kind": "host", "seed": 0}
PARAMS = {"phases": ["init"]}
DROPOUT = {"phases": ["train"], "per": ["step", "microbatch"]}
DRAWS = """
import flax.linen as nn
import jax


class Twice(nn.Module):
    split: bool = False

    @nn.compact
    def __call__(self, x, *, deterministic=False):
        x = nn.Dense(10)(x.reshape(x.shape[0], -1))
        if deterministic:
            return x
        one = two = self.make_rng("dropout")
        if self.split:
            one, two = jax.random.split(one)
        return x + jax.random.normal(one, x.shape) + jax.random.normal(two, x.shape)


class Meets(nn.Module):
    number: int = 1

    @nn.compact
    def __call__(self, x, *, deterministic=False):
        x = nn.Dense(10)(x.reshape(x.shape[0], -1))
        if deterministic:
            return x
        key = self.make_rng("dropout")
        one, two = jax.random.split(key)[1], jax.random.fold_in(key, self.number)
        return x + jax.random.normal(one, x.shape) + jax.random.normal(two, x.shape)


class Splits(nn.Module):
    @nn.compact
    def __call__(self, x, *, deterministic=False):
        x = nn.Dense(10)(x.reshape(x.shape[0], -1))
        if deterministic:
            return x
        key = self.make_rng("dropout")
        one, two = jax.random.split(key, 2)[0], jax.random.split(key, 3)[0]
        return x + jax.random.normal(one, x.shape) + jax.random.normal(two, x.shape)


class Stranger(nn.Module):
    @nn.compact
    def __call__(self, x, *, deterministic=False):
        x = nn.Dense(10)(x.reshape(x.shape[0], -1))
        return x + jax.random.normal(jax.random.key(3), x.shape)


class TwoStreams(nn.Module):
    @nn.compact
    def __call__(self, x, *, deterministic=False):
        x = nn.Dense(10)(x.reshape(x.shape[0], -1))
        if deterministic:
            return x
        one, two = self.make_rng("dropout"), self.make_rng("noise")
        return x + jax.random.normal(one, x.shape) + jax.random.normal(two, x.shape)


class Branches(nn.Module):
    @nn.compact
    def __call__(self, x, *, deterministic=False):
        x = nn.Dense(10)(x.reshape(x.shape[0], -1))
        if deterministic:
            return x
        key = self.make_rng("dropout")
        draws = [lambda k: jax.random.normal(k, x.shape)] * 2
        return x + jax.lax.cond(x.sum() > 0, *draws, key)
"""


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hazardlab.py").write_text(DRAWS)
    monkeypatch.syspath_prepend(tmp_path)


def dense(**model: Any) -> dict[str, Any]:
    return {
        "_target_": "models.MLP",
        "features": [4],
        "num_outputs": 10,
        "dropout_rate": 0.5,
        **model,
    }


def noisy() -> dict[str, Any]:
    """Draws from `noise` in training and in evaluations."""
    noise = {"_target_": "models.Noise", "scale": 0.1, "name": "noise"}
    layers = [{"_target_": "models.Flatten"}, noise]
    layers.append({"_target_": "flax.linen.Dense", "features": 10})
    return {"_target_": "models.Sequential", "layers": layers}


def nested(*names: tuple[str, str]) -> dict[str, Any]:
    """A Dropout within a Sequential for each pair of names."""
    blocks = [
        {
            "_target_": "models.Sequential",
            "name": outer,
            "layers": [{"_target_": "models.Dropout", "rate": 0.5, "name": inner}],
        }
        for outer, inner in names
    ]
    first = {"_target_": "models.Flatten"}
    last = {"_target_": "flax.linen.Dense", "features": 10}
    return {"_target_": "models.Sequential", "layers": [first, *blocks, last]}


def hazards(
    *, model: Any = None, streams: Any = None, rng: Any = None, **rest: Any
) -> list[tuple[str, str]]:
    """(code, config path) of each hazard of a run."""
    declared = {"params": PARAMS, "dropout": DROPOUT, **(streams or {})}
    declared |= {"shuffle": SHUFFLE, "split": SPLIT}
    config = {
        "model": model or dense(),
        "optimizer": {"_target_": "optax.sgd", "learning_rate": 0.1},
        "data": {"name": "digits", "batch_size": 32},
        "rng": {"streams": declared, **(rng or {})},
        "trusted": ["hazardlab"],
        **rest,
    }
    found = find_hazards(compile_run(parse_spec(config)))
    return [(hazard.code, hazard.path) for hazard in found]


def test_shipped_defaults_have_none() -> None:
    assert hazards() == []


def test_one_key_drawn_from_twice() -> None:
    found = hazards(model={"_target_": "hazardlab.Twice"})
    assert found == [("R001", "rng.streams.dropout")]
    assert hazards(model={"_target_": "hazardlab.Twice", "split": True}) == []


def test_paths_that_hash_alike_without_a_separator() -> None:
    model = nested(("a", "bc"), ("ab", "c"))
    found = hazards(model=model, rng={"fix_separator": False})
    assert found == [("R001", "rng.streams.dropout")]
    assert hazards(model=model) == []


def test_branches_of_a_cond_may_share_a_key() -> None:
    assert hazards(model={"_target_": "hazardlab.Branches"}) == []


@pytest.mark.parametrize("per", [[], ["epoch"], ["microbatch"]])
def test_key_that_does_not_depend_on_the_step(per: list[str]) -> None:
    found = hazards(streams={"dropout": {**DROPOUT, "per": per}})
    assert found == [("R002", "rng.streams.dropout.per")]


@pytest.mark.parametrize("per", [["step"], {"step": "carry"}, ["epoch", "step"]])
def test_key_that_depends_on_the_step(per: Any) -> None:
    assert hazards(streams={"dropout": {**DROPOUT, "per": per}}) == []


def test_microbatches_that_share_a_key() -> None:
    shared = {"dropout": {**DROPOUT, "per": ["step"]}}
    train = {"accumulation_steps": 2}
    assert hazards(streams=shared, train=train) == [("R003", "rng.streams.dropout.per")]
    assert hazards(train=train) == []


def test_batches_of_an_evaluation_that_share_a_key() -> None:
    noise = {"phases": ["train", "eval"], "per": ["step"]}
    streams, rest = {"noise": noise}, {"model": noisy(), "eval": {"batch_size": 100}}
    unused = ("R005", "rng.streams.dropout")
    found = hazards(streams=streams, **rest)
    # models.Noise is switched off in evaluations, but its key is drawn all the same
    assert found == [("R003", "rng.streams.noise.per"), unused]
    mended = {"noise": {**noise, "per": ["step", "microbatch"]}}
    assert hazards(streams=mended, **rest) == [unused]


def test_stream_that_nothing_draws_from() -> None:
    assert hazards(streams={"idle": {}}) == [("R005", "rng.streams.idle")]


def test_streams_that_start_from_one_key() -> None:
    one = {"phases": ["train"], "per": ["step", "microbatch"], "seed": 7}
    streams = {"dropout": one, "twin": {**one, "seed": 7}}
    found = hazards(streams=streams)
    assert found == [("R005", "rng.streams.twin"), ("R006", "rng.streams.twin")]
    streams["twin"] = {**one, "seed": 8}
    assert hazards(streams=streams) == [("R005", "rng.streams.twin")]


def test_split_child_that_is_a_fold_in_child() -> None:
    model = {"_target_": "hazardlab.Meets", "number": 1}
    assert hazards(model=model) == [("R008", "rng.streams.dropout")]
    assert hazards(model={**model, "number": 2}) == []
    assert hazards(model=model, rng={"partitionable": False}) == []


def test_splits_of_one_key_into_other_numbers_share_children() -> None:
    """split(key, 2)[0] is split(key, 3)[0]; without counters it is not."""
    model = {"_target_": "hazardlab.Splits"}
    assert hazards(model=model) == [("R008", "rng.streams.dropout")]
    assert hazards(model=model, rng={"partitionable": False}) == []


def test_step_that_meets_a_split_of_the_root() -> None:
    """fold_in(root, step) of one stream is split(root, 1)[0] of another at step 0."""
    noise = {"phases": ["train"], "derive": "split"}
    streams = {"dropout": {**DROPOUT, "derive": "root", "per": ["step"]}}
    model = {"_target_": "hazardlab.TwoStreams"}
    found = hazards(model=model, streams={**streams, "noise": noise})
    assert found == [("R002", "rng.streams.noise.per"), ("R008", "rng.streams.dropout")]
    mended = {**streams, "noise": {**noise, "derive": "name", "per": ["step"]}}
    assert hazards(model=model, streams=mended) == []


def test_draw_from_no_stream() -> None:
    found = hazards(model={"_target_": "hazardlab.Stranger"})
    assert ("R014", "model") in found
    assert ("R005", "rng.streams.dropout") in found


def test_train_and_eval_that_share_a_key_is_made_impossible_by_the_phase() -> None:
    noise = {"phases": ["train", "eval"], "per": []}
    found = hazards(model=noisy(), streams={"noise": noise}, rng={"allow": ["R002"]})
    assert "R015" not in [code for code, _ in found]


def test_dropout_rate_without_a_draw() -> None:
    layers = [
        {"_target_": "models.Flatten"},
        {"_target_": "models.Dropout", "rate": 0.5, "deterministic": True},
        {"_target_": "flax.linen.Dense", "features": 10},
    ]
    model = {"_target_": "models.Sequential", "layers": layers}
    codes = [code for code, _ in hazards(model=model)]
    assert codes == ["R005", "R012"]


def test_an_error_stops_the_run_unless_allowed() -> None:
    config = {
        "model": dense(),
        "optimizer": {"_target_": "optax.sgd", "learning_rate": 0.1},
        "data": {"name": "digits", "shuffle": None, "batch_size": 32},
        "rng": {
            "streams": {
                "params": PARAMS,
                "dropout": {**DROPOUT, "per": []},
                "split": SPLIT,
            }
        },
    }
    found = find_hazards(compile_run(parse_spec(config)))
    assert [hazard.severity for hazard in found] == [Severity.ERROR]
    with pytest.raises(
        HazardsRefusedError, match=r"^R002: rng\.streams\.dropout\.per: "
    ):
        refuse_hazards(found, allow=("R001",))
    refuse_hazards(found, allow=("R002",))
