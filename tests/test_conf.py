# SPDX-License-Identifier: Apache-2.0
"""Every YAML file in `conf/`: composes, parses, traces, and answers to its fields."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from runner import CONF_DIR
from runner.compile import compile_run
from runner.ledger import make_ledger
from runner.parse import to_plain
from runner.program import Program
from runner.spec import RunSpec, parse_spec

Make = Callable[..., RunSpec]

FILES = sorted(path.relative_to(CONF_DIR) for path in CONF_DIR.rglob("*.yaml"))
CHOICES = [path for path in FILES if len(path.parts) == 2]
EXPERIMENTS = sorted(  # that train; `test_probe.py` has the probes
    path.relative_to("experiment").with_suffix("").as_posix()
    for path in FILES
    if path.parts[0] == "experiment"
    and "override /task: probe" not in (CONF_DIR / path).read_text()
    and (len(path.parts) == 2 or path.parts[1] == "mesh")
    and not path.stem.endswith("_noise")  # one is a probe by way of the other
)
PARTNERS = {  # what a choice can't do without
    "data=none": ["task=probe"],
    "task=probe": ["data=none"],
    "rng=bare": ["data=none", "task=probe"],
}
GROUPS = {"experiment", "model", "data", "task", "optimizer", "train", "eval", "rng"}
GROUPS |= {"mesh", "sinks", "checkpoint"}

pytestmark = pytest.mark.promotes  # optax's Adam


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that every source of tables or arrays can read a regression from."""
    home = tmp_path_factory.mktemp("data")
    rows = np.random.default_rng(0).normal(size=(120, 3))
    lines = ["a,b,y", *(",".join(map(repr, map(float, row))) for row in rows)]
    (home / "table.csv").write_text("\n".join(lines))
    (home / "other.csv").write_text("\n".join(lines[:-9]))
    return home / "table.csv"


@pytest.fixture
def make(compose_config: Any, table: Path) -> Make:
    """An experiment and overrides to a spec, with data where it needs some."""

    def make(name: str, *overrides: str) -> RunSpec:
        needs = [f"data.path={table}", "data.target=y"] if name == "regression" else []
        config = compose_config(f"+experiment={name}", *needs, *overrides)
        return parse_spec(config | {"experiment": name})

    return make


def test_the_contracts_groups_are_there() -> None:
    assert {path.parts[0] for path in CHOICES} - {"hydra"} == GROUPS
    assert {"dropout", "cnn", "regression", "batch_norm"} <= set(EXPERIMENTS)
    meshes = {"mesh/data8", "mesh/fsdp8", "mesh/data4_model2", "mesh/exact8"}
    assert meshes <= set(EXPERIMENTS)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_file_is_yaml(path: Path) -> None:
    text = (CONF_DIR / path).read_text()
    assert text.endswith("\n")
    assert "\t" not in text
    assert isinstance(yaml.safe_load(text), dict)
    assert max(map(len, text.splitlines())) <= 130


@pytest.mark.parametrize(
    "path", [p for p in CHOICES if p.parts[0] != "experiment"], ids=str
)
def test_every_choice_composes(path: Path, compose_config: Any, table: Path) -> None:
    """Alone: upon the default, as a newcomer tries it."""
    group, choice = path.parts[0], path.stem
    needs = []
    if group == "data" and choice in ("arrays", "csv", "mnist"):
        needs = [f"data.path={table}"]
        needs += ["data.target=y"] if choice == "csv" else []
    needs += PARTNERS.get(f"{group}={choice}", [])
    config = compose_config(f"{group}={choice}", *needs)
    spec = parse_spec(config)
    written = yaml.safe_load((CONF_DIR / path).read_text())
    for key, value in written.items():
        if key == "defaults":
            continue
        if not contains(value, "${") and not contains(value, "???"):
            assert config[group][key] == value
    assert parse_spec(to_plain(spec)) == spec


def contains(value: Any, text: str) -> bool:
    return text in yaml.safe_dump(value)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_header_says_purpose_and_command(name: str) -> None:
    text = (CONF_DIR / "experiment" / f"{name}.yaml").read_text()
    first, *rest = text.splitlines()
    assert first == "# @package _global_"
    header = [line for line in rest if line.startswith("#")]
    assert header == rest[: len(header)]
    assert re.match(r"# Purpose: \S.{20,}", header[0])
    commands = [line for line in header if line.startswith("# Command: ")]
    assert len(commands) == 1
    assert f"# Command: python -m runner +experiment={name}" in commands[0]


@pytest.fixture(scope="module")
def programs() -> dict[str, Program]:
    return {}


@pytest.fixture
def program(
    request: pytest.FixtureRequest, programs: dict[str, Program], make: Make
) -> Program:
    name = request.param
    if name not in programs:
        programs[name] = compile_run(make(name))
    return programs[name]


each_experiment = pytest.mark.parametrize("program", EXPERIMENTS, indirect=True)


@each_experiment
def test_experiment_traces(program: Program) -> None:
    ledger = make_ledger(program)
    assert ledger["draws"]
    assert not [draw for draw in ledger["draws"] if "untraced" in draw]
    phases = {draw["phase"] for draw in ledger["draws"]}
    assert phases == {"init", "train"}
    assert {draw["stream"] for draw in ledger["draws"]} == {"params", "dropout"}
    assert program.parameters > 100
    assert program.baked == ()
    assert any(path.startswith("optimizer.") for path in program.hypers)
    assert any(path.startswith("model.") for path in program.hypers)


@each_experiment
def test_experiment_round_trips_through_yaml(program: Program) -> None:
    text = yaml.safe_dump(to_plain(program.spec), sort_keys=False, allow_unicode=True)
    again = parse_spec(yaml.safe_load(text))
    assert again == program.spec
    assert hash(again) == hash(program.spec)


def leaf(config: Mapping[str, Any], path: str) -> Any:
    value: Any = config
    for part in path.split("."):
        value = value[part]
    return value


# Every experiment answers to these: what is set, and what must become of it.
FIELDS: dict[str, Any] = {
    "seed": 7,
    "train.steps": 77,
    "train.steps_per_call": 3,
    "data.batch_size": 24,
    "optimizer.learning_rate": 0.0625,
    "model.dropout_rate": 0.375,
    "eval.every": 11,
    "rng.seed": 8,
    "rng.impl": "rbg",
    "rng.partitionable": False,
    "rng.fix_separator": False,
    "rng.fallback": "params",
    "rng.streams.dropout.phases": ["train", "eval"],
    "rng.streams.shuffle.per": [],
    "sinks.terminal.mode": "plain",
    "sinks.wandb.mode": "online",
    "sinks.wandb.project": "ours",
    "sinks.tensorboard.mode": "enabled",
}


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("path", FIELDS)
def test_experiment_answers_to_a_field(make: Make, name: str, path: str) -> None:
    value = FIELDS[path]
    shown = yaml.safe_dump(value, default_flow_style=True).split("\n")[0]
    before, after = make(name), make(name, f"{path}={shown}")
    assert before != after
    assert digest(before) != digest(after)
    if not path.startswith("rng.streams."):
        assert leaf(to_plain(after), path) == value


def digest(spec: RunSpec) -> str:
    return yaml.safe_dump(to_plain(spec))


@each_experiment
def test_numbers_reach_the_program(program: Program, make: Make) -> None:
    """What is swept is an input: other values, the same program."""
    rate, step = "model.dropout_rate=0.375", "optimizer.learning_rate=0.0625"
    other = compile_run(make(program.spec.experiment, rate, step))
    assert other.hypers.keys() == program.hypers.keys()
    changed = {k: v for k, v in other.hypers.items() if v != program.hypers[k]}
    assert sorted(set(changed.values())) == [0.0625, 0.375]
    assert make_ledger(other) == make_ledger(program)
