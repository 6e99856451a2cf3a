# SPDX-License-Identifier: Apache-2.0
"""The command line as its users meet it: processes, exit codes, last lines, files.

Runs are shared: each fixture that trains does so once, in a process of its own.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import yaml
from waiting import wait_for

import runner.cli
from runner import CONF_DIR
from runner.records.digests import (
    digest_config,
    digest_file,
    digest_leaves,
)
from runner.records.metrics import read_metrics
from runner.spec import parse_spec

PLAIN = "sinks.wandb.mode=disabled"
SHORT = ("+experiment=dropout", "train.steps=40", "eval.every=20")
SCRIPT = Path(sys.executable).with_name("runner")
SHA256 = re.compile(r"[0-9a-f]{64}")

shared = pytest.mark.xdist_group("cli")


@dataclass(frozen=True)
class Ran:
    """What a process left: its words, its exit code, and where it stood."""

    code: int
    out: str
    err: str
    cwd: Path

    @property
    def directory(self) -> Path:
        """The run directory: the last line of stdout."""
        return Path(self.out.splitlines()[-1])

    @property
    def manifest(self) -> dict[str, Any]:
        return dict(json.loads((self.directory / "run.json").read_text()))


@dataclass(frozen=True)
class Shell:
    """A user's shell, standing in `cwd`."""

    env: dict[str, str]
    cwd: Path
    extra: dict[str, str] = field(default_factory=dict)

    def __call__(self, *args: str | Path, ok: bool = True) -> Ran:
        """Runs `python -m runner ARGS`."""
        return self.exec(sys.executable, "-m", "runner", *args, ok=ok)

    def exec(self, *command: str | Path, ok: bool = True, **extra: str) -> Ran:
        done = subprocess.run(
            command,
            cwd=self.cwd,
            env={**self.env, **self.extra, **extra},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        ran = Ran(done.returncode, done.stdout, done.stderr, self.cwd)
        assert not ok or (ran.code, ran.err) == (0, ""), ran
        return ran

    def start(self, *args: str | Path) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "runner", *args],
            cwd=self.cwd,
            env={**self.env, **self.extra},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@pytest.fixture(scope="module")
def make_shell(
    user_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Shell]:
    return lambda name: Shell(user_env, tmp_path_factory.mktemp(name))


@pytest.fixture
def shell(user_env: dict[str, str], tmp_path: Path) -> Shell:
    return Shell(user_env, tmp_path)


def call(monkeypatch: Any, capsys: Any, *args: str | Path) -> tuple[int, str, str]:
    """Runs a verb in this process."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as caught:
        runner.cli.main([str(arg) for arg in args])
    return (int(caught.value.code or 0), *capsys.readouterr())


def tree(directory: Path) -> list[str]:
    """Everything below a directory, but for what Python caches."""
    paths = sorted(str(p.relative_to(directory)) for p in directory.rglob("*"))
    return [p for p in paths if "__pycache__" not in p]


def restore(directory: Path) -> tuple[int, Any]:
    with ocp.CheckpointManager(directory / "checkpoints") as manager:
        step = manager.latest_step()
        assert step is not None
        return step, manager.restore(step, args=ocp.args.StandardRestore())


# --- a run and its directory


@pytest.fixture(scope="module")
def default(make_shell: Callable[[str], Shell]) -> Ran:
    """`python -m runner` and nothing else: W&B offline, as a newcomer has it."""
    return make_shell("default")()


@pytest.fixture(scope="module")
def short(make_shell: Callable[[str], Shell]) -> Ran:
    return make_shell("short")(*SHORT, PLAIN)


@shared
def test_no_arguments_train_the_default(default: Ran) -> None:
    assert (default.code, default.err) == (0, "")
    assert default.directory.is_dir()
    assert re.fullmatch(
        r"outputs/default/\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d",
        str(default.directory.relative_to(default.cwd)),
    )
    assert os.listdir(default.cwd) == ["outputs"]
    assert default.manifest["metrics"]["eval/accuracy"] > 0.95


@shared
def test_run_directory_has_everything_of_the_contract(default: Ran) -> None:
    assert sorted(os.listdir(default.directory)) == [
        ".hydra",
        "checkpoints",
        "config.yaml",
        "keys",
        "metrics.jsonl",
        "run.json",
        "runner.log",
        "states.jsonl",
        "wandb",
    ]
    hydras = ["config.yaml", "hydra.yaml", "overrides.yaml"]
    assert sorted(os.listdir(default.directory / ".hydra")) == hydras
    for name in hydras:
        assert yaml.safe_load((default.directory / ".hydra" / name).read_text()) != ""
    assert list((default.directory / "wandb").glob("offline-run-*/*.wandb"))


FIELDS: dict[str, type | tuple[type, ...]] = {
    "schema": int,
    "run_id": str,
    "status": str,
    "experiment": str,
    "started": str,
    "ended": str,
    "steps": int,
    "seed": int,
    "versions": dict,
    "platform": dict,
    "git": dict,
    "rng": dict,
    "guarantee": dict,
    "digests": dict,
    "metrics": dict,
    "parent": (str, type(None)),
    "sweep": (dict, type(None)),
}


@shared
def test_manifest_has_the_contracts_fields(default: Ran) -> None:
    run = default.manifest
    for name, kind in FIELDS.items():
        assert isinstance(run[name], kind), name
        assert not isinstance(run[name], bool), name
    assert run["status"] == "completed"
    assert (run["experiment"], run["seed"], run["steps"]) == ("default", 0, 1000)
    assert run["started"] < run["ended"]
    needed = {"python", "jax", "jaxlib", "flax", "optax", "hydra-core"}
    assert needed <= run["versions"].keys()
    assert run["versions"]["jax"] == jax.__version__
    platform = run["platform"]
    assert platform["backend"] == "cpu"
    assert platform["device_kind"] == "cpu"
    assert (platform["device_count"], platform["process_count"]) == (1, 1)
    assert platform["xla_flags"] == ""
    assert run["git"].keys() == {"commit", "dirty"}
    assert run["guarantee"]["level"] in ("bit-exact", "key-exact", "statistical")
    assert run["guarantee"]["reasons"]
    for name in ("config", "keys", "params", "metrics"):
        assert SHA256.fullmatch(run["digests"][name]), name


@shared
def test_canary_is_what_jax_draws(default: Ran) -> None:
    rng = default.manifest["rng"]
    assert rng["impl"] == "threefry2x32"
    assert (rng["partitionable"], rng["fix_separator"]) == (True, True)
    canary = rng["canary"]
    assert canary.keys() == {"bits", "uniform", "normal", "permutation"}
    sizes = {name: len(bytes.fromhex(text)) for name, text in canary.items()}
    assert min(sizes.values()) >= 8
    order = np.frombuffer(bytes.fromhex(canary["permutation"]), "<i4")
    assert sorted(order) == list(range(len(order)))


@shared
def test_metrics_are_lines_of_the_contract(default: Ran) -> None:
    path = default.directory / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == read_metrics(path)
    assert {row["phase"] for row in rows} == {"train", "eval"}
    steps = [row["step"] for row in rows if row["phase"] == "train"]
    assert steps == list(range(1000))
    evals = [row for row in rows if row["phase"] == "eval"]
    assert [row["step"] for row in evals] == list(range(100, 1001, 100))
    for row in rows:
        assert all(type(v) is float for k, v in row.items() if k not in PLACE)
    last = {f"eval/{k}": v for k, v in evals[-1].items() if k not in PLACE}
    last |= {
        f"train/{k}": v
        for k, v in [r for r in rows if r["phase"] == "train"][-1].items()
        if k not in PLACE
    }
    assert default.manifest["metrics"] == last
    best = max(evals, key=lambda row: row["accuracy"])
    assert default.manifest["best"] == {"value": best["accuracy"], "step": best["step"]}
    assert digest_file(path) == default.manifest["digests"]["metrics"]


PLACE = ("phase", "step")


@shared
def test_log_says_what_the_terminal_said(default: Ran) -> None:
    def said(text: str) -> list[str]:  # progress is said every two seconds, by a clock
        return [line for line in text.splitlines() if not line.startswith("step ")]

    log = (default.directory / "runner.log").read_text()
    assert said(log) == said(default.out)[:-1]
    assert "eval at step 1,000" in log


@shared
def test_config_alone_rebuilds_the_spec(short: Ran, compose_config: Any) -> None:
    text = (short.directory / "config.yaml").read_text()
    config = yaml.safe_load(text)
    composed = compose_config(*SHORT, PLAIN) | {"experiment": "dropout"}
    assert parse_spec(config) == parse_spec(composed)
    assert hash(parse_spec(config)) == hash(parse_spec(composed))
    assert "${" not in text
    assert digest_config(config) == short.manifest["digests"]["config"]


@shared
def test_hydras_files_say_how_it_was_called(short: Ran) -> None:
    folder = short.directory / ".hydra"
    assert yaml.safe_load((folder / "overrides.yaml").read_text()) == [*SHORT, PLAIN]
    hydra = yaml.safe_load((folder / "hydra.yaml").read_text())["hydra"]
    assert hydra["runtime"]["choices"]["experiment"] == "dropout"
    assert hydra["run"]["dir"] == str(short.directory.relative_to(short.cwd))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["train"]["steps"] == 40
    assert config["rng"]["seed"] == "${seed}"


@shared
def test_checkpoint_is_the_state_at_the_end(short: Ran) -> None:
    step, state = restore(short.directory)
    assert step == int(state["step"]) == 40
    leaves = jax.tree_util.tree_leaves_with_path(state["params"])
    named = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in leaves
    }
    assert digest_leaves(named) == short.manifest["digests"]["params"]
    assert not [leaf for leaf in jax.tree.leaves(state) if "key<" in str(leaf.dtype)]


# --- the same bits again


def results(ran: Ran) -> dict[str, Any]:
    """All that another process must give again, bit by bit."""
    digests = ran.manifest["digests"]
    rows = read_metrics(ran.directory / "metrics.jsonl")
    return {k: digests[k] for k in ("keys", "params", "data")} | {"rows": rows}


@shared
def test_a_fresh_process_gives_the_same_bits(short: Ran, shell: Shell) -> None:
    again = shell(*SHORT, PLAIN)
    assert results(again) == results(short)
    digests = [ran.manifest["digests"] for ran in (again, short)]
    assert digests[0] == digests[1]
    assert again.manifest["run_id"] != short.manifest["run_id"]


@shared
@pytest.mark.parametrize("steps", ["1", "7"])
def test_steps_per_call_change_no_bit(short: Ran, shell: Shell, steps: str) -> None:
    other = shell(*SHORT, PLAIN, f"train.steps_per_call={steps}")
    assert results(other) == results(short)
    assert other.manifest["digests"]["config"] != short.manifest["digests"]["config"]


@shared
@pytest.mark.parametrize("rate", ["0", "0.1"])
def test_dropout_rate_changes_no_key(short: Ran, shell: Shell, rate: str) -> None:
    other = shell(*SHORT, PLAIN, f"model.dropout_rate={rate}")
    ours, theirs = other.manifest["digests"], short.manifest["digests"]
    assert ours["keys"] == theirs["keys"]
    assert ours["params"] != theirs["params"]
    assert ours["config"] != theirs["config"]


# --- Hydra's own flags, without jax


@pytest.fixture
def no_jax(shell: Shell) -> Iterator[Shell]:
    """A shell in which every Python process leaves the names of its modules."""
    site = shell.cwd / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import atexit, os, sys\n"
        "def leave():\n"
        "    with open(os.environ['LEAVE'], 'w') as file:\n"
        "        file.write(' '.join(sys.modules))\n"
        "atexit.register(leave)\n"
    )
    left = shell.cwd / "modules.txt"
    path = os.pathsep.join([str(site), shell.env["PYTHONPATH"]])
    yield Shell(shell.env, shell.cwd, {"PYTHONPATH": path, "LEAVE": str(left)})
    modules = left.read_text().split()
    assert "runner.cli" in modules
    heavy = {"jax", "jaxlib", "flax", "optax", "orbax", "wandb", "sklearn", "numpy"}
    assert not heavy.intersection(modules)
    assert not (shell.cwd / "outputs").exists()


def test_help_explains_groups_and_fields(no_jax: Shell) -> None:
    out = no_jax("--help").out
    groups = "checkpoint data eval experiment mesh model optimizer rng sinks task train"
    for group in groups.split():
        assert f"{group}: " in out
    for name in (path.stem for path in (CONF_DIR / "experiment").iterdir()):
        assert name in out
    fields = re.findall(r"^  ([a-z_]+(?:\.[A-Za-z_]+)*) {2,}\S", out, re.M)
    assert len(fields) == 11
    answered = "seed train.steps data.batch_size data.path optimizer.learning_rate"
    answered += " model.dropout_rate eval.every train.steps_per_call"
    assert set(answered.split()) <= set(fields)
    assert "runner plan" in out
    assert "runner keys" in out


def test_cfg_shows_what_would_run(no_jax: Shell) -> None:
    args = ("+experiment=dropout", "seed=3", "--cfg", "job", "--resolve")
    config = yaml.safe_load(no_jax(*args).out)
    assert (config["seed"], config["rng"]["seed"]) == (3, 3)
    assert parse_spec(config | {"experiment": "dropout"}).seed == 3


def test_info_says_where_config_comes_from(no_jax: Shell) -> None:
    out = no_jax("--info").out
    assert f"file://{CONF_DIR}" in out
    assert "BasicLauncher" in out


@pytest.fixture
def own_groups(shell: Shell) -> Path:
    folder = shell.cwd / "mine"
    (folder / "optimizer").mkdir(parents=True)
    (folder / "experiment").mkdir()
    (folder / "optimizer" / "slow.yaml").write_text(
        "_target_: optax.sgd\nlearning_rate: 0.001\n"
    )
    (folder / "experiment" / "ours.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /optimizer: slow\nseed: 5\n"
    )
    return folder


def test_config_dir_adds_groups(no_jax: Shell, own_groups: Path) -> None:
    args = ("-cd", own_groups, "+experiment=ours", "--cfg", "job")
    config = yaml.safe_load(no_jax(*args).out)
    assert config["optimizer"] == {"_target_": "optax.sgd", "learning_rate": 0.001}
    assert config["seed"] == 5


def test_config_dir_adds_groups_to_plan(shell: Shell, own_groups: Path) -> None:
    args = ("plan", "-cd", "mine", "+experiment=ours", "--json")
    plan = json.loads(shell(*args).out)
    assert plan["experiment"] == "ours"
    assert plan["inputs"]["optimizer.learning_rate"] == 0.001


@pytest.mark.skipif(not SCRIPT.exists(), reason="the console script is not installed")
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("runner +experiment=dr", {"+experiment=dropout"}),
        ("runner model=", {"model=batch_norm", "model=cnn", "model=mlp"}),
        ("runner optimizer.lea", {"optimizer.learning_rate="}),
    ],
)
def test_tab_completes(no_jax: Shell, line: str, offered: set[str]) -> None:
    ran = no_jax.exec(SCRIPT, "-sc", "query=bash", COMP_LINE=line)
    assert offered <= set(ran.out.split())


# --- plan


@pytest.fixture(scope="module")
def plan(make_shell: Callable[[str], Shell]) -> Ran:
    return make_shell("plan")("plan", *SHORT, PLAIN, "--json")


@shared
def test_plan_prints_one_json_document_and_writes_nothing(plan: Ran) -> None:
    document = json.loads(plan.out)
    assert plan.out.startswith("{")
    assert tree(plan.cwd) == []
    needed = {"streams", "draws", "hazards", "parameters", "shardings", "guarantee"}
    assert needed <= document.keys()
    assert document["guarantee"]["level"] == "bit-exact"
    sizes = {p["path"]: p["size"] for p in document["parameters"]}
    assert sizes["Dense_0/kernel"] == 64 * 512
    assert document["inputs"]["model.dropout_rate"] == 0.5


@shared
def test_plan_is_what_the_run_does(plan: Ran, short: Ran) -> None:
    document = json.loads(plan.out)
    ledger = json.loads((short.directory / "keys" / "ledger.json").read_text())
    assert document["streams"] == ledger["streams"]
    assert document["draws"] == ledger["draws"]
    assert document["guarantee"] == short.manifest["guarantee"]


LOWERED = (jax.stages.Lowered, "compile")


@pytest.mark.promotes
@pytest.mark.parametrize(
    ("flag", "forbidden"),
    [([], (jax.stages.Compiled, "__call__")), (["--no-compile"], LOWERED)],
    ids=["runs nothing", "compiles nothing"],
)
def test_plan(
    monkeypatch: Any, capsys: Any, tmp_path: Path, flag: list[str], forbidden: Any
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("not in a plan")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(*forbidden, refuse)
    code, out, err = call(monkeypatch, capsys, "plan", *SHORT, PLAIN, *flag)
    assert (code, err) == (0, "")
    for word in ("dropout: 40 steps, 167,178 parameters", "bit-exact", "Dropout_1"):
        assert word in out
    assert "Dense_2/kernel  [256, 10]   float32  2,560" in out
    assert ("FLOPs" in out) is not bool(flag)
    assert tree(tmp_path) == []


# --- keys


def replay(derivation: list[dict[str, Any]]) -> jax.Array:
    """A key from its derivation, by `jax.random` alone."""
    key = None
    for op in derivation:
        if op["op"] == "seed":
            key = jax.random.key(op["value"], impl="threefry2x32")
        elif op["op"] == "fold_in":
            key = jax.random.fold_in(key, np.uint32(op["value"]))
        elif op["op"] == "split":
            key = jax.random.split(key, op["of"])[op["index"]]
        else:
            assert op["op"] == "clone"
    assert key is not None
    return key


@pytest.fixture
def keys(monkeypatch: Any, capsys: Any) -> Callable[..., Any]:
    """`runner keys RUN ... --json` in this process, and its draws."""

    def read(*args: str | Path) -> list[dict[str, Any]]:
        code, out, err = call(monkeypatch, capsys, "keys", *args, "--json")
        assert (code, err) == (0, "")
        return list(json.loads(out)["draws"])

    return read


ENTRY = {"phase", "step", "stream", "path", "call"}
ENTRY |= {"index", "impl", "key", "uses", "derivation"}


@shared
def test_keys_print_the_contracts_document(short: Ran, shell: Shell) -> None:
    document = json.loads(shell("keys", short.directory, "--json").out)
    assert tree(shell.cwd) == []
    assert {"run", "streams", "draws"} <= document.keys()
    assert document["run"]["run_id"] == short.manifest["run_id"]
    names = [stream["name"] for stream in document["streams"]]
    assert names == ["params", "dropout", "shuffle", "split"]
    for draw in document["draws"]:
        assert draw.keys() >= ENTRY
        assert draw["impl"] == "threefry2x32"
        assert type(draw["path"]) is list
        assert type(draw["index"]) is dict
        assert len(draw["key"]) == 2
        assert all(0 <= word < 2**32 for word in draw["key"])
        for use in draw["uses"]:
            assert use.keys() == {"primitive", "shape", "bits"}
        first, *rest = draw["derivation"]
        assert first["op"] == "seed"
        for op in rest:
            needed = {"op", "index", "of"} if op["op"] == "split" else {"op", "value"}
            assert needed | {"why"} == op.keys()
    drawn = [
        (d["phase"], d["step"], d["stream"], *d["path"]) for d in document["draws"]
    ]
    assert drawn == [
        ("init", None, "params", "Dense_0"),
        ("init", None, "params", "Dense_1"),
        ("init", None, "params", "Dense_2"),
        ("train", 0, "dropout", "Dropout_0"),
        ("train", 0, "dropout", "Dropout_1"),
    ]
    assert all("rule" in draw for draw in document["draws"])


@shared
@pytest.mark.parametrize("step", [[], ["--step", "3"], ["--step", "2147483647"]])
def test_derivations_replay(short: Ran, keys: Any, step: list[str]) -> None:
    draws = keys(short.directory, *step)
    assert len(draws) == 5
    for draw in draws:
        words = np.asarray(jax.random.key_data(replay(draw["derivation"])))
        assert words.tolist() == draw["key"]
    steps = {draw["step"] for draw in draws if draw["phase"] == "train"}
    assert steps == {int(step[1]) if step else 0}


@shared
def test_keys_filter(short: Ran, keys: Any) -> None:
    run = short.directory
    everything = keys(run)
    for option, value, wanted in [
        ("--phase", "train", lambda d: d["phase"] == "train"),
        ("--phase", "eval", lambda d: False),
        ("--stream", "params", lambda d: d["stream"] == "params"),
        ("--path", "Dropout_*", lambda d: d["path"][0].startswith("Dropout_")),
        ("--path", "*_1", lambda d: d["path"][0].endswith("_1")),
        ("--path", "dropout_1", lambda d: False),
    ]:
        assert keys(run, option, value) == [d for d in everything if wanted(d)]
    assert keys(run, "--stream", "dropout", "--path", "Dense_0") == []
    assert [d["key"] for d in keys(run, "--step", "1")[3:]] != [
        d["key"] for d in everything[3:]
    ]


@shared
def test_keys_as_a_table(short: Ran, monkeypatch: Any, capsys: Any) -> None:
    args = ("keys", short.directory, "--step", "3")
    code, out, err = call(monkeypatch, capsys, *args)
    assert (code, err) == (0, "")
    (row,) = [line for line in out.splitlines() if "Dropout_1" in line]
    code, out, _ = call(monkeypatch, capsys, *args, "--json", "--path", "Dropout_1")
    (draw,) = json.loads(out)["draws"]
    assert row.split()[:5] == ["train", "3", "dropout", "Dropout_1", "1"]
    assert " ".join(f"{word:08x}" for word in draw["key"]) in row


@shared
@pytest.mark.parametrize("kind", ["zip", "gztar"])
@pytest.mark.parametrize("inside", [True, False], ids=["folder", "bare"])
def test_keys_of_an_archive(
    short: Ran, keys: Any, tmp_path: Path, kind: str, inside: bool
) -> None:
    run = short.directory
    top = (run.parent, run.name) if inside else (run, ".")
    archive = shutil.make_archive(str(tmp_path / "run"), kind, *top)
    assert keys(archive) == keys(run)
    assert os.listdir(tmp_path) == [Path(archive).name]


@shared
@pytest.mark.parametrize(
    ("file", "before", "after"),
    [
        ("keys/ledger.json", '"value": 0', '"value": 1'),
        ("keys/ledger.json", "]", ""),
        ("keys/ledger.json", '"value": 0', '"value": NaN'),
        ("run.json", '"keys": "', '"keys": "0'),
        ("run.json", '"schema": 1', ""),
        ("run.json", '"run_id"', '"gone"'),
    ],
)
def test_keys_refuse_a_damaged_record(
    short: Ran,
    monkeypatch: Any,
    capsys: Any,
    tmp_path: Path,
    *,
    file: str,
    before: str,
    after: str,
) -> None:
    for name in ("run.json", "keys/ledger.json"):
        text = (short.directory / name).read_text()
        if name == file:
            assert before in text
            text = text.replace(before, after, 1)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    code, out, err = call(monkeypatch, capsys, "keys", tmp_path, "--json")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert str(tmp_path) in err


@shared
@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--stream", "dropuot"], "Did you mean 'dropout'"),
        (["--step", "-1"], "must be from 0"),
        (["--phase", "trian"], "choose from"),
    ],
)
def test_keys_refuse_bad_options(
    short: Ran, monkeypatch: Any, capsys: Any, args: list[str], says: str
) -> None:
    code, out, err = call(monkeypatch, capsys, "keys", short.directory, *args)
    assert (code, out) == (2, "")
    assert says in err


# --- sweeps


def test_sweep_leaves_a_run_for_each_seed(shell: Shell) -> None:
    ran = shell("-m", *SHORT, "sinks=none", "seed=0,1,2")
    runs = sorted(path.parent for path in shell.cwd.rglob("run.json"))
    assert [run.name for run in runs] == ["0", "1", "2"]
    manifests = [json.loads((run / "run.json").read_text()) for run in runs]
    assert [run["seed"] for run in manifests] == [0, 1, 2]
    assert {run["status"] for run in manifests} == {"completed"}
    assert len({run["digests"]["params"] for run in manifests}) == 3
    assert [run["sweep"]["lane"] for run in manifests] == [0, 1, 2]
    assert len({run["sweep"]["id"] for run in manifests}) == 1
    assert {"id", "lane", "lanes", "mode"} == manifests[0]["sweep"].keys()
    assert ran.cwd / ran.directory == runs[-1].parent  # the sweep's, last
    assert f"\n{runs[-1]}\n" in ran.out


def test_a_failing_job_stops_no_other(shell: Shell) -> None:
    rates = "optimizer.learning_rate=1e20,1e-3"
    ran = shell("-m", *SHORT, "sinks=none", rates, ok=False)
    assert ran.code == 1
    assert "Traceback" not in ran.err
    assert "not finite at step" in ran.err
    found = [json.loads(path.read_text()) for path in shell.cwd.rglob("run.json")]
    assert sorted(run["status"] for run in found) == ["completed", "failed"]


def test_a_refused_job_stops_no_other(shell: Shell) -> None:
    ran = shell("-m", *SHORT, "sinks=none", "seed=-1,3", ok=False)
    assert ran.code == 1
    assert "R007: seed: a negative seed is the same as 4294967295" in ran.err
    assert "Traceback" not in ran.err
    (run,) = shell.cwd.rglob("run.json")
    assert json.loads(run.read_text())["seed"] == 3


def test_sweeps_at_once_share_no_run_directory(shell: Shell) -> None:
    """One name for all, as sweeps that start in one second have."""
    args = ("-m", "train.steps=30", "sinks=none", "seed=0,1", "hydra.sweep.dir=same")
    sweeps = [shell.start(*args) for _ in range(3)]
    try:
        said = [sweep.communicate(timeout=120) for sweep in sweeps]
    finally:
        for sweep in sweeps:
            sweep.kill()
    assert "Traceback" not in "".join(err for _, err in said)
    told = [line for out, _ in said for line in out.splitlines() if line[:1] == "/"]
    assert len(told) >= 2
    assert len(set(told)) == len(told)
    runs = {str(path.parent): path for path in shell.cwd.rglob("run.json")}
    assert set(told) == set(runs)
    for path in runs.values():
        assert json.loads(path.read_text())["status"] == "completed"


# --- ends that are no completion


def test_ctrl_c_saves_the_state(shell: Shell) -> None:
    endless = ("+experiment=dropout", "train.steps=2000000000", "eval.every=50")
    run = shell.start(*endless, PLAIN)
    file = wait_for(lambda: next(shell.cwd.rglob("metrics.jsonl"), None))
    wait_for(lambda: file.stat().st_size > 20_000)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    ended = Ran(run.returncode, out, err, shell.cwd)
    assert (ended.code, ended.err) == (130, "")
    assert ended.directory == file.parent
    manifest = ended.manifest
    assert manifest["status"] == "interrupted"
    steps = [r["step"] for r in read_metrics(file) if r["phase"] == "train"]
    assert steps == list(range(manifest["steps"]))
    assert file.read_bytes().endswith(b"}\n")
    assert digest_file(file) == manifest["digests"]["metrics"]
    step, state = restore(ended.directory)
    assert step == int(state["step"]) == manifest["steps"]
    assert "interrupted" in out
    with pytest.raises(ProcessLookupError):
        os.kill(run.pid, 0)


@pytest.mark.parametrize("last", ["runner.errors", "hydra.core.utils", "jax._src.core"])
def test_ctrl_c_while_it_still_imports_says_nothing(shell: Shell, last: str) -> None:
    """Python tells each import that it has done, so that the moment is no accident."""
    shell.extra["PYTHONPROFILEIMPORTTIME"] = "1"
    run = shell.start("+experiment=dropout", PLAIN)
    assert run.stderr is not None
    for line in run.stderr:
        if line.endswith(f" {last}\n"):
            run.send_signal(signal.SIGINT)
            break
    _, rest = run.communicate(timeout=60)
    assert run.returncode == 130
    said = [line for line in rest.splitlines() if not line.startswith("import time:")]
    assert said == []


def test_non_finite_loss_fails_and_keeps_the_last_good_state(shell: Shell) -> None:
    args = ("+experiment=dropout", "train.steps=50", PLAIN)
    ran = shell(*args, "optimizer.learning_rate=1e20", ok=False)
    assert ran.code == 1
    run = ran.manifest
    assert run["status"] == "failed"
    bad = run["steps"]
    assert re.search(rf"not finite at step {bad}\b", run["reason"])
    assert re.fullmatch(r"error: .*not finite at step \d+.*\n", ran.err)
    rows = read_metrics(ran.directory / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(bad + 1))
    assert rows[-1]["loss"] is None
    assert all(row["loss"] is not None for row in rows[:-1])
    step, state = restore(ran.directory)
    assert step == int(state["step"]) == bad
    leaves = jax.tree.leaves(state)
    assert len(leaves) > 6
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in leaves)


PIPED = {
    "train": (*SHORT, PLAIN),
    "help": ("--help",),
    "info": ("--info",),
    "cfg": ("--cfg", "job"),
    "plan": ("plan", *SHORT),
    "plan-json": ("plan", *SHORT, "--json"),
}


@pytest.mark.parametrize("args", PIPED.values(), ids=PIPED)
def test_a_reader_that_leaves_is_no_error(shell: Shell, args: tuple[str, ...]) -> None:
    words = " ".join([sys.executable, "-m", "runner", *args])
    ran = shell.exec("sh", "-c", f"{words} | head -1", ok=False)
    assert "Traceback" not in ran.err
    assert "Error" not in re.sub(r"\(BrokenPipeError[^)]*\)", "", ran.err)
    for run in shell.cwd.rglob("run.json"):
        assert json.loads(run.read_text())["status"] == "completed"


def test_a_closed_stdout_is_no_error(shell: Shell) -> None:
    words = " ".join([sys.executable, "-m", "runner", *SHORT, PLAIN])
    ran = shell.exec("sh", "-c", f"{words} >&-", ok=False)
    assert "Traceback" not in ran.err
    (run,) = shell.cwd.rglob("run.json")
    assert json.loads(run.read_text())["status"] == "completed"
    assert ran.code == 0


# --- beside the user's own files


@pytest.fixture
def lab(shell: Shell) -> Shell:
    """A directory of the user's: a package to trust, and names like ours."""
    (shell.cwd / "mylab").mkdir()
    (shell.cwd / "mylab" / "__init__.py").write_text(
        "from flax import linen as nn\n"
        "class Net(nn.Module):\n"
        "    features: int = 16\n"
        "    @nn.compact\n"
        "    def __call__(self, x, deterministic):\n"
        "        x = nn.relu(nn.Dense(self.features)(x.reshape(len(x), -1)))\n"
        "        x = nn.Dropout(0.2)(x, deterministic=deterministic)\n"
        "        return nn.Dense(10)(x)\n"
    )
    for name in ("models", "conf"):
        (shell.cwd / name).mkdir()
        (shell.cwd / name / "__init__.py").write_text(
            "open(__file__ + '.imported', 'w')\n"
            "raise ImportError('a decoy of the user was imported')\n"
        )
    (shell.cwd / "conf" / "config.yaml").write_text("seed: decoy\n")
    return shell


OWN = ("trusted=[mylab]", "model._target_=mylab.Net", "model.features=24")


@pytest.mark.parametrize("command", ["module", "script"])
def test_a_trusted_package_trains(lab: Shell, command: str) -> None:
    start: tuple[str | Path, ...] = (sys.executable, "-m", "runner")
    if command == "script":
        if not SCRIPT.exists():
            pytest.skip("the console script is not installed")
        start = (SCRIPT,)
    drop = ("~model.num_outputs", "~model.dropout_rate")
    ran = lab.exec(*start, *SHORT, *OWN, *drop, "sinks=none")
    assert ran.manifest["status"] == "completed"
    ledger = json.loads((ran.directory / "keys" / "ledger.json").read_text())
    paths = [draw["path"] for draw in ledger["draws"] if draw["phase"] == "train"]
    assert paths == [["Dropout_0"]]
    assert not list(lab.cwd.rglob("*.imported"))


def test_decoys_are_not_imported(lab: Shell) -> None:
    ran = lab(*SHORT, "sinks=none")
    assert ran.manifest["seed"] == 0
    assert not list(lab.cwd.rglob("*.imported"))
