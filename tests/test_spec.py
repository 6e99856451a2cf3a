# SPDX-License-Identifier: Apache-2.0
"""`parse_spec`: each rule with its path and message; specs as values."""

import copy
import json
import pickle
import re
import subprocess
import sys
from typing import Any

import pytest
import yaml
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.errors import ConfigError, UnknownStreamError
from runner.parse import Frozen, to_plain
from runner.spec import (
    HAZARD_CODES,
    ArraysSpec,
    ClassificationSpec,
    Coordinate,
    CsvSpec,
    Derive,
    DigitsSpec,
    Impl,
    MnistSpec,
    Phase,
    RegressionSpec,
    Rule,
    RunSpec,
    StreamKind,
    StreamSpec,
    parse_spec,
)

MINIMAL: dict[str, Any] = {
    "model": {"_target_": "models.MLP", "features": [8], "num_outputs": 10},
    "optimizer": {"_target_": "optax.sgd", "learning_rate": 0.1},
    "rng": {
        "streams": {
            "params": {"phases": ["init"]},
            "dropout": {"per": ["step"]},
            "shuffle": {"kind": "host", "per": ["epoch"]},
            "split": {"kind": "host", "seed": 0},
        }
    },
}


def config(**leaves: Any) -> dict[str, Any]:
    """The minimal config, with leaves set by path (`a__b` is `a.b`)."""
    tree = copy.deepcopy(MINIMAL)
    for path, value in leaves.items():
        *parents, last = path.split("__")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = value
    return tree


def refusal(**leaves: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse_spec(config(**leaves))
    return caught.value


def stream(**fields: Any) -> StreamSpec:
    spec: StreamSpec = parse_spec(config(rng__streams__noise=fields)).rng.streams[
        "noise"
    ]
    return spec


def test_defaults() -> None:
    """The default of every field is what `conf/` says, too."""
    spec = parse_spec(config())
    assert spec.data == DigitsSpec()
    assert spec.task == ClassificationSpec()
    assert spec.objective == "accuracy"
    assert spec.rng.impl is Impl.THREEFRY2X32
    assert (spec.rng.partitionable, spec.rng.fix_separator) == (True, True)
    assert (spec.rng.fallback, spec.rng.allow, spec.trusted) == ("error", (), ())


def test_defaults_are_those_of_conf(compose_config: Any) -> None:
    """A group that is left out means what its file says."""
    composed = compose_config()
    spec = parse_spec(composed)
    for group in ("data", "task", "train", "checkpoint", "sinks"):
        bare = copy.deepcopy(composed)
        del bare[group]
        assert parse_spec(bare) == spec


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, StreamSpec()),
        ({"phases": ["init", "eval"]}, StreamSpec((Phase.INIT, Phase.EVAL))),
        ({"phases": []}, StreamSpec(())),
        (
            {"per": ["step", "microbatch"]},
            StreamSpec(per=Frozen({"step": "fold_in", "microbatch": "fold_in"})),
        ),
        (
            {"per": ["microbatch", "step"]},
            StreamSpec(per=Frozen({"microbatch": "fold_in", "step": "fold_in"})),
        ),
        (
            {"per": {"step": "carry", "epoch": "fold_in"}},
            StreamSpec(per=Frozen({"step": "carry", "epoch": "fold_in"})),
        ),
        ({"seed": 2**32 - 1}, StreamSpec(seed=2**32 - 1)),
        ({"derive": "split"}, StreamSpec(derive=Derive.SPLIT)),
        ({"derive": "name", "seed": 3}, StreamSpec(seed=3, derive=Derive.NAME)),
        (
            {"kind": "host", "per": {"epoch": "fold_in"}, "derive": "name"},
            StreamSpec(
                per=Frozen({"epoch": "fold_in"}),
                kind=StreamKind.HOST,
                derive=Derive.NAME,
            ),
        ),
    ],
)
def test_streams(fields: Any, expected: StreamSpec) -> None:
    built = stream(**fields)
    assert built == expected
    assert all(isinstance(c, Coordinate) for c in built.per)
    assert all(isinstance(r, Rule) for r in built.per.values())


def test_per_as_list_and_as_mapping_are_one() -> None:
    mapping = {"step": "fold_in", "epoch": "fold_in"}
    assert stream(per=["step", "epoch"]) == stream(per=mapping)


@pytest.mark.parametrize(
    ("seed", "derive", "in_force"),
    [
        (None, None, Derive.NAME),
        (7, None, Derive.ROOT),
        (0, None, Derive.ROOT),
        (7, Derive.NAME, Derive.NAME),
        (None, Derive.ROOT, Derive.ROOT),
        (None, Derive.SPLIT, Derive.SPLIT),
    ],
)
def test_derivation_in_force(seed: Any, derive: Any, in_force: Derive) -> None:
    assert StreamSpec(seed=seed, derive=derive).derivation is in_force


NO = "rng.streams.noise"

SEEDS = "Allowed: from -9223372036854775808 to 9223372036854775807."

REFUSED = [
    # keys and types
    ({"sed": 1}, "sed: unknown key (got 1). Known: model, optimizer, experiment,"),
    ({"train__stepz": 1}, "train.stepz: unknown key (got 1). Known: steps, "),
    ({"train": None}, "train: must be a mapping (got None)."),
    ({"model": "models.MLP"}, "model: must be a `_target_` node (got 'models.MLP')."),
    ({"optimizer": None}, "optimizer: must be a `_target_` node (got None)."),
    ({"seed": True}, "seed: must be an integer (got True)."),
    ({"seed": "0"}, "seed: must be an integer (got '0')."),
    ({"seed": 2**63}, "seed: out of range (got 9223372036854775808). " + SEEDS),
    (
        {"rng__seed": -(2**63) - 1},
        "rng.seed: out of range (got -9223372036854775809). " + SEEDS,
    ),
    ({"experiment": 3}, "experiment: must be a string (got 3)."),
    ({"trusted": "mylab"}, "trusted: must be a list (got 'mylab')."),
    # unions
    (
        {"train__steps_per_call": 0},
        "train.steps_per_call: out of range (got 0). "
        "Allowed: from 1 to 2147483647. Or: 'auto'.",
    ),
    (
        {"train__steps_per_call": None},
        "train.steps_per_call: must be an integer (got None). Or: 'auto'.",
    ),
    ({"train__steps": "auto"}, "train.steps: must be an integer (got 'auto')."),
    (
        {"train__steps": 2**31},
        "train.steps: out of range (got 2147483648). Allowed: from 1 to 2147483647.",
    ),
    (
        {"train__clip_norm": -1},
        "train.clip_norm: out of range (got -1). Allowed: above 0. Or: null.",
    ),
    (
        {"train__max_norm": float("inf")},
        "train.max_norm: must be finite (got inf). Or: null.",
    ),
    (
        {"train__compute_dtype": "float16"},
        "train.compute_dtype: not a choice (got 'float16'). "
        "Choices: float32, bfloat16. Did you mean 'bfloat16'?",
    ),
    ({"eval__every": 0}, "eval.every: out of range (got 0). Allowed: from 1 to "),
    ({"eval__min_delta": -1}, "eval.min_delta: out of range (got -1.0). Allowed: at "),
    (
        {"sinks__wandb__mode": "onlin"},
        "sinks.wandb.mode: not a choice (got 'onlin'). "
        "Choices: auto, offline, online, disabled. Did you mean 'online'?",
    ),
    # tagged unions
    (
        {"data": {"batch_size": 3}},
        "data: must be a mapping with a `name` (got {'batch_size': 3}).",
    ),
    ({"data": "digits"}, "data: must be a mapping with a `name` (got 'digits')."),
    (
        {"data": {"name": "digit"}},
        "data.name: not a choice (got 'digit'). "
        "Choices: digits, arrays, mnist, csv, none. Did you mean 'digits'?",
    ),
    (
        {"data": {"name": "digits", "path": "x"}},
        "data.path: unknown key (got 'x'). Known: batch_size, shuffle, name, ",
    ),
    (
        {"data": {"name": "mnist", "path": "x", "split": "split"}},
        "data.split: unknown key (got 'split'). Known: ",
    ),
    ({"task": {"name": True}}, "task.name: not a choice (got True). Choices: "),
    (
        {"task": {"name": "regression", "label_smoothing": 0}},
        "task.label_smoothing: unknown key (got 0). Known: name.",
    ),
    (
        {"task": {"name": "classification", "label_smoothing": 1.5}},
        "task.label_smoothing: out of range (got 1.5). Allowed: from 0 to 1.",
    ),
    (
        {"data": {"name": "digits", "test_fraction": 1}},
        "data.test_fraction: out of range (got 1.0). "
        "Allowed: from 0 to 1, without the ends.",
    ),
    # not set
    (
        {"data": {"name": "csv", "path": "???"}},
        "data.path: must be set. Add data.path=",
    ),
    ({"model": "???"}, "model: must be set. Add model=... to the command."),
    (
        {"model__features": [8, "???"]},
        "model.features[1]: must be set. Add model.features[1]=... to the command.",
    ),
    # rng
    (
        {"rng__impl": "rgb"},
        "rng.impl: not a choice (got 'rgb'). "
        "Choices: threefry2x32, rbg, unsafe_rbg. Did you mean 'rbg'?",
    ),
    ({"rng__partitionable": 1}, "rng.partitionable: must be true or false (got 1)."),
    (
        {"rng__fallback": "param"},
        "rng.fallback: not a choice (got 'param'). "
        "Choices: error, params. Did you mean 'params'?",
    ),
    (
        {"rng__allow": ["R002", "R016"]},
        "rng.allow[1]: not a hazard code (got 'R016'). Codes: R001 to R015.",
    ),
    (
        {"rng__allow": ["r002"]},
        "rng.allow[0]: not a hazard code (got 'r002'). Codes: R001 to R015.",
    ),
    ({"rng__allow": "R002"}, "rng.allow: must be a list (got 'R002')."),
    ({"rng__streams": ["noise"]}, "rng.streams: must be a mapping (got ['noise'])."),
    # streams
    ({"rng__streams__noise": None}, f"{NO}: must be a mapping (got None)."),
    (
        {"rng__streams__noise": {"phase": ["init"]}},
        f"{NO}.phase: unknown key (got ['init']). "
        "Known: phases, per, kind, seed, derive. Did you mean 'phases'?",
    ),
    (
        {"rng__streams__noise": {"phases": "train"}},
        f"{NO}.phases: must be a list (got 'train').",
    ),
    (
        {"rng__streams__noise": {"phases": ["init", "trian"]}},
        f"{NO}.phases[1]: not a choice (got 'trian'). "
        "Choices: init, train, eval, sample. Did you mean 'train'?",
    ),
    (
        {"rng__streams__noise": {"per": "step"}},
        f"{NO}.per: must be a mapping (got 'step').",
    ),
    (
        {"rng__streams__noise": {"per": ["stp"]}},
        f"{NO}.per: not a choice (got 'stp'). "
        "Choices: step, epoch, microbatch. Did you mean 'step'?",
    ),
    (
        {"rng__streams__noise": {"per": ["step", "process"]}},
        f"{NO}.per: not a choice (got 'process'). Choices: step, epoch, microbatch. "
        "Name an axis of the mesh that goes over processes.",
    ),
    (
        {"rng__streams__noise": {"per": {"step": "fold"}}},
        f"{NO}.per.step: not a choice (got 'fold'). "
        "Choices: fold_in, carry, split. Did you mean 'fold_in'?",
    ),
    (
        {"rng__streams__noise": {"per": {"epoch": "carry"}}},
        f"{NO}.per: only `step` can be carried (got {{'epoch': 'carry'}}).",
    ),
    (
        {"rng__streams__noise": {"per": {"step": "carry", "epoch": "carry"}}},
        f"{NO}.per: only `step` can be carried "
        "(got {'step': 'carry', 'epoch': 'carry'}).",
    ),
    (
        {"rng__streams__noise": {"per": {"step": "fold_in", "epoch": "carry"}}},
        f"{NO}.per: only `step` can be carried "
        "(got {'step': 'fold_in', 'epoch': 'carry'}).",
    ),
    (
        {"rng__streams__noise": {"per": {"epoch": "fold_in", "step": "carry"}}},
        f"{NO}.per: a carried `step` must come first "
        "(got {'epoch': 'fold_in', 'step': 'carry'}).",
    ),
    (
        {"rng__streams__noise": {"seed": 2**63}},
        f"{NO}.seed: out of range (got 9223372036854775808). {SEEDS} Or: null.",
    ),
    (
        {"rng__streams__noise": {"derive": "nam"}},
        f"{NO}.derive: not a choice (got 'nam'). "
        "Choices: name, split, root. Or: null. Did you mean 'name'?",
    ),
    (
        {"rng__streams__noise": {"derive": "split", "seed": 0}},
        f"{NO}.derive: a stream with a seed of its own has no siblings to split with "
        f"(got 'split'). Remove {NO}.seed, or say derive: name.",
    ),
    (
        {"rng__streams__noise": {"kind": "hots"}},
        f"{NO}.kind: not a choice (got 'hots'). "
        "Choices: jax, host. Did you mean 'host'?",
    ),
    *(
        (
            {f"rng__streams__{phase}": {}},
            f"rng.streams.{phase}: a phase's name would meet that phase's keys "
            f"(got '{phase}'). Name the stream after what it is used for.",
        )
        for phase in ("init", "train", "eval", "sample")
    ),
    # host streams
    (
        {"rng__streams__noise": {"kind": "host", "per": ["epoch", "step"]}},
        f"{NO}.per: a host stream can differ by epoch and process alone "
        "(got {'epoch': 'fold_in', 'step': 'fold_in'}). "
        f"Set {NO}.per=[epoch] or [].",
    ),
    (
        {"rng__streams__noise": {"kind": "host", "per": {"epoch": "carry"}}},
        f"{NO}: a host stream is seeded by its name and epoch, with no other rule. "
        f"Remove {NO}.derive and rules in {NO}.per.",
    ),
    *(
        (
            {"rng__streams__noise": {"kind": "host", "derive": derive}},
            f"{NO}: a host stream is seeded by its name and epoch, with no other rule."
            f" Remove {NO}.derive and rules in {NO}.per.",
        )
        for derive in ("root", "split")
    ),
    # streams that the data needs
    (
        {"data": {"name": "digits", "shuffle": "shufle"}},
        "data.shuffle: not a declared stream (got 'shufle'). "
        "Declared: dropout, params, shuffle, split. Did you mean 'shuffle'?",
    ),
    (
        {"data": {"name": "digits", "split": "zzz"}},
        "data.split: not a declared stream (got 'zzz'). "
        "Declared: dropout, params, shuffle, split. "
        "Set +rng.streams.zzz={kind: host}.",
    ),
    (
        {"rng__streams": {}},
        "data.shuffle: not a declared stream (got 'shuffle'). Declared: none. "
        "Set +rng.streams.shuffle={kind: host}.",
    ),
    (
        {"rng__streams": {}, "data": {"name": "digits", "shuffle": None}},
        "data.split: not a declared stream (got 'split'). Declared: none. "
        "Set +rng.streams.split={kind: host}.",
    ),
    (
        {"data": {"name": "digits", "split": None}},
        "data.split: must be a string (got None).",
    ),
    (
        {"data": {"name": "digits", "shuffle": "dropout"}},
        "rng.streams.dropout.kind: rows are ordered on the host (got 'jax'). "
        "Set rng.streams.dropout.kind=host.",
    ),
    (
        {"rng__streams__split": {"kind": "host", "per": ["epoch"]}},
        "rng.streams.split.per: test rows are chosen once, so this stream has no epoch "
        "(got {'epoch': 'fold_in'}). Set it to [].",
    ),
    # trusted
    *(
        (
            {"trusted": ["mylab", name]},
            f"trusted[1]: names a package of the runner itself (got '{name}').",
        )
        for name in ("models", "runner", "conf", "hydra_plugins", "models.mine")
    ),
    *(
        (
            {"trusted": [name]},
            f"trusted[0]: must be the import name of a package (got '{name}').",
        )
        for name in ("", "my-lab", "a..b", ".a", "a b", "3d")
    ),
    ({"trusted": [3]}, "trusted[0]: must be a string (got 3)."),
    # rates
    *(
        (
            {f"model__{name}": value},
            f"model.{name}: must be a number from 0 to 1 (got {value!r}). 0 keeps all.",
        )
        for name in ("rate", "dropout_rate", "attention_dropout_rate")
        for value in (1.5, -0.1, 2, True, None, "0.1")
    ),
    (
        {"model__layers": [{"a": 1}, {"inner": {"rate": 1.5}}]},
        "model.layers[1].inner.rate: must be a number from 0 to 1 (got 1.5). ",
    ),
    # task, eval
    (
        {"eval__metric": "accurcy"},
        "eval.metric: not computed by task classification (got 'accurcy'). "
        "Computed: accuracy, loss. Did you mean 'accuracy'?",
    ),
    (
        {"eval__metric": "mae"},
        "eval.metric: not computed by task classification (got 'mae'). Computed: ",
    ),
    (
        {"task": {"name": "regression"}, "eval__metric": "accuracy"},
        "eval.metric: not computed by task regression (got 'accuracy'). "
        "Computed: loss, mae.",
    ),
    (
        {"eval__patience": 2},
        "eval.patience: needs evaluations before the end (got 2). "
        "Set eval.every to a number of steps.",
    ),
    (
        {"eval__patience": 0, "eval__every": 1},
        "eval.patience: out of range (got 0). Allowed: from 1 to 2147483647. Or: null.",
    ),
    # batches and files
    (
        {"train__accumulation_steps": 3},
        "train.accumulation_steps: must divide data.batch_size (128) (got 3). "
        "Set data.batch_size=129.",
    ),
    (
        {"train__accumulation_steps": 256},
        "train.accumulation_steps: must divide data.batch_size (128) (got 256). "
        "Set data.batch_size=256.",
    ),
    *(
        (
            {
                "data": {"name": name, "target": "y"}
                if name == "csv"
                else {"name": name}
            },
            f"data.path: must say where the {name} files are (got ''). "
            "Set data.path=/where/they/are.",
        )
        for name in ("arrays", "mnist", "csv")
    ),
    (
        {"data": {"name": "csv", "path": "x.csv"}},
        "data.target: must name the target's column (got ''). Set it.",
    ),
]


@pytest.mark.parametrize(("leaves", "message"), REFUSED)
def test_refuses(leaves: dict[str, Any], message: str) -> None:
    error = refusal(**leaves)
    assert str(error).startswith(message)
    if message.endswith((".", "?")):
        assert str(error).startswith(message.removesuffix("."))
    assert error.path == message.partition(": ")[0]
    assert "\n" not in str(error)


def test_undeclared_streams_have_an_error_of_their_own() -> None:
    error = refusal(data={"name": "digits", "shuffle": "zzz"})
    assert isinstance(error, UnknownStreamError)


@pytest.mark.parametrize("missing", ["model", "optimizer"])
def test_must_be_given(missing: str) -> None:
    data = config()
    del data[missing]
    with pytest.raises(ConfigError, match=rf"^{missing}: must be given\.$"):
        parse_spec(data)


@pytest.mark.parametrize(
    "leaves",
    [
        {"model__dropout_rate": 0},
        {"model__dropout_rate": 1.0},
        {"model__layers": [{"rate": 0.5}]},
        {"model__generate": 7},  # `rate` is the end of another word
        {"model__learning_rate": 7},
        {"optimizer__rate": 7},
        {"train__accumulation_steps": 128},
        {"eval__patience": 1, "eval__every": 1},
        {"eval__metric": "loss"},
        {"rng__allow": list(HAZARD_CODES)},
        {"trusted": ["mylab", "my_lab.deep.models"]},
        {"data": {"name": "digits", "shuffle": None}},
        {"data": {"name": "mnist", "path": "x"}, "rng__streams__split": {}},
        {"rng__streams__noise": {"kind": "host"}},
    ],
)
def test_accepts(leaves: dict[str, Any]) -> None:
    parse_spec(config(**leaves))


@pytest.mark.parametrize(
    ("data", "cls"),
    [
        ({"name": "digits"}, DigitsSpec),
        ({"name": "arrays", "path": "x.npz"}, ArraysSpec),
        ({"name": "mnist", "path": "x"}, MnistSpec),
        ({"name": "csv", "path": "x", "target": "y"}, CsvSpec),
    ],
)
def test_data_by_name(data: Any, cls: type) -> None:
    assert type(parse_spec(config(data=data)).data) is cls


@pytest.mark.parametrize(
    ("task", "metric", "objective"),
    [
        ("classification", None, "accuracy"),
        ("classification", "loss", "loss"),
        ("regression", None, "loss"),
        ("regression", "mae", "mae"),
    ],
)
def test_objective(task: str, metric: str | None, objective: str) -> None:
    spec = parse_spec(config(task={"name": task}, eval__metric=metric))
    assert spec.objective == objective
    assert (
        spec.task
        == {
            "classification": ClassificationSpec(),
            "regression": RegressionSpec(),
        }[task]
    )


@pytest.mark.parametrize(
    "where", ["model__scale", "model__dropout_rate", "optimizer__learning_rate"]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_no_leaf_of_a_node_is_infinite(where: str, value: float) -> None:
    """Neither JSON nor a comparison of specs can hold one."""
    error = refusal(**{where: value})
    assert error.path == where.replace("__", ".")


# Specs are values -----------------------------------------------------------------

names = st.from_regex(r"[a-z]{1,8}", fullmatch=True)
seeds = st.integers(0, 2**32 - 1)


@st.composite
def stream_specs(draw: Any) -> dict[str, Any]:
    phases = draw(st.lists(st.sampled_from(list(Phase)), unique=True))
    out: dict[str, Any] = {"phases": [str(p) for p in phases]}
    if draw(st.booleans()):
        per = draw(st.sampled_from([[], ["epoch"]]))
        return {**out, "kind": "host", "per": per}
    order = draw(st.permutations(["step", "epoch", "microbatch"]))
    per = dict.fromkeys(order[: draw(st.integers(0, 3))], "fold_in")
    if draw(st.booleans()):
        per = {"step": "carry"} | {c: r for c, r in per.items() if c != "step"}
    out["per"] = per
    if draw(st.booleans()):
        return {
            **out,
            "seed": draw(seeds),
            "derive": draw(st.sampled_from(["name", None])),
        }
    return {**out, "derive": draw(st.sampled_from(["name", "split", "root", None]))}


leaf_values = (
    st.none()
    | st.booleans()
    | st.integers(-(10**6), 10**6)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=6).filter(lambda s: s != "???")
)
trees = st.recursive(
    leaf_values,
    lambda t: st.lists(t, max_size=3) | st.dictionaries(names, t, max_size=3),
    max_leaves=8,
)


def has_rate(tree: Any) -> bool:
    if isinstance(tree, dict):
        words = any(k == "rate" or k.endswith("dropout_rate") for k in tree)
        return words or any(map(has_rate, tree.values()))
    return isinstance(tree, list) and any(map(has_rate, tree))


@st.composite
def configs(draw: Any) -> dict[str, Any]:
    reserved = {*map(str, Phase), "shuffle", "split"}
    streams = draw(
        st.dictionaries(
            names.filter(lambda n: n not in reserved), stream_specs(), max_size=4
        )
    )
    streams |= {"shuffle": {"kind": "host"}, "split": {"kind": "host"}}
    parts = draw(st.integers(1, 8))
    task = draw(st.sampled_from(["classification", "regression"]))
    data = draw(
        st.sampled_from(
            [
                {"name": "digits", "test_fraction": 0.25},
                {"name": "arrays", "path": "x.npz", "shuffle": None},
                {"name": "csv", "path": "x", "target": "y"},
            ]
        )
    )
    tree = draw(st.dictionaries(names, trees, max_size=3))
    return config(
        seed=draw(seeds),
        model={"_target_": "a.B"} | (tree if not has_rate(tree) else {}),
        data={**data, "batch_size": parts * draw(st.integers(1, 64))},
        task={"name": task},
        train={
            "steps": draw(st.integers(1, 2**31 - 1)),
            "steps_per_call": draw(st.integers(1, 9) | st.just("auto")),
            "accumulation_steps": parts,
            "clip_norm": draw(st.none() | st.floats(1e-6, 1e6)),
        },
        eval={
            "every": draw(st.integers(1, 99)),
            "patience": draw(st.none() | st.integers(1, 9)),
            "metric": draw(st.none() | st.just("loss")),
        },
        rng={
            "seed": draw(seeds),
            "impl": draw(st.sampled_from([str(i) for i in Impl])),
            "partitionable": draw(st.booleans()),
            "fallback": draw(st.sampled_from(["error", "params"])),
            "allow": draw(st.lists(st.sampled_from(HAZARD_CODES), max_size=3)),
            "streams": streams,
        },
    )


@settings(max_examples=60, deadline=None)
@given(configs())
def test_round_trips(data: dict[str, Any]) -> None:
    """A spec hashes, compares, and comes back from plain data, JSON and YAML."""
    spec = parse_spec(data)
    plain = to_plain(spec)
    for again in (
        parse_spec(data),
        parse_spec(plain),
        parse_spec(json.loads(json.dumps(plain, allow_nan=False))),
        parse_spec(yaml.safe_load(yaml.safe_dump(plain, sort_keys=False))),
        pickle.loads(pickle.dumps(spec)),
        copy.deepcopy(spec),
    ):
        assert again == spec
        assert hash(again) == hash(spec)
        assert to_plain(again) == plain
        # The order of streams and coordinates is part of a run.
        assert list(again.rng.streams) == list(spec.rng.streams)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("seed", 1),
        ("model__features", [9]),
        ("optimizer__learning_rate", 0.2),
        ("rng__impl", "rbg"),
        ("rng__streams__dropout", {"per": []}),
        ("data", {"name": "digits", "batch_size": 64}),
        ("task", {"name": "regression"}),
        ("train__steps", 2),
        ("sinks__wandb__project", "x"),
    ],
)
def test_specs_that_differ(path: str, value: Any) -> None:
    assert parse_spec(config(**{path: value})) != parse_spec(config())


def test_order_of_streams_and_coordinates_counts() -> None:
    """`split` goes by the order of streams, keys by that of coordinates."""
    data = config()
    streams = data["rng"]["streams"]
    data["rng"]["streams"] = dict(reversed(streams.items()))
    assert parse_spec(data) != parse_spec(config())
    assert stream(per=["step", "epoch"]) != stream(per=["epoch", "step"])


def test_specs_are_frozen() -> None:
    spec = parse_spec(config())
    with pytest.raises(AttributeError):
        spec.seed = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        spec.rng.streams["dropout"] = StreamSpec()  # type: ignore[index]


def test_parsing_changes_nothing_of_the_config() -> None:
    data = config()
    before = copy.deepcopy(data)
    parse_spec(data)
    assert data == before


@pytest.mark.parametrize("experiment", ["dropout", "cnn", "batch_norm"])
def test_recipes_round_trip(make_spec: Any, experiment: str) -> None:
    spec = make_spec(f"+experiment={experiment}")
    assert isinstance(spec, RunSpec)
    assert parse_spec(to_plain(spec)) == spec


def test_no_jax() -> None:
    """Specs, parsing and errors take no time to import."""
    code = (
        "import sys, runner.spec, runner.parse, runner.errors\n"
        "heavy = {'jax', 'jaxlib', 'flax', 'optax', 'orbax', 'numpy', 'hydra',"
        " 'omegaconf', 'wandb', 'sklearn', 'yaml'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_messages_keep_the_template() -> None:
    """`<path>: <rule> (got <value>). <Allowed>. <fix>.`, sentences with full stops."""
    for leaves, _ in REFUSED:
        text = str(refusal(**leaves))
        assert re.match(r"^[\w.\[\]]+: \S", text), text
        assert text[-1] in ".?", text
        assert not re.search(r"[a-z0-9)] Or: ", text), text
