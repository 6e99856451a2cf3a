# SPDX-License-Identifier: Apache-2.0
"""What a user gets wrong: one line on stderr that says what to do, exit 2, no file.

Each is a process of its own, in a directory that holds a few data files.
"""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Shell = Callable[..., "subprocess.CompletedProcess[str]"]

DROPOUT = "+experiment=dropout"
REGRESSION = "+experiment=regression"
ARRAYS = "data=arrays"
LINE = re.compile(r"error: \S+: .*[.?]")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data good and bad, and a package of the user's."""
    home = tmp_path_factory.mktemp("files")
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(200, 8)), draw.integers(0, 3, 200)
    np.savez(home / "good.npz", x=x, y=y)
    np.savez(home / "uneven.npz", x=x, y=y[:100])
    np.savez(home / "names.npz", inputs=x, targets=y)
    whole = (home / "good.npz").read_bytes()
    (home / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (home / "empty.csv").touch()
    lines = ["a,b,y", *(f"{i},{2 * i},{i / 2}" for i in range(100))]
    (home / "good.csv").write_text("\n".join(lines))
    (home / "bad.csv").write_text("a,b,y\n1,2,3\n1,x,3\n")
    (home / "idx").mkdir()
    (home / "idx" / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03")
    (home / "mylab").mkdir()
    (home / "mylab" / "__init__.py").write_text(
        "import os\n"
        "from os import system\n"
        "from flax import linen as nn\n"
        "LAYERS = 3\n"
        "class Plain:\n"
        "    pass\n"
        "class Broken(nn.Module):\n"
        "    @nn.compact\n"
        "    def __call__(self, x):\n"
        "        return x.no_such_attribute\n"
    )
    return home


@pytest.fixture
def shell(user_env: dict[str, str], files: Path) -> Shell:
    env = user_env | {"PYTHONDONTWRITEBYTECODE": "1"}

    def run(*args: str, **more: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "runner", *args],
            cwd=files,
            env=env | more,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )

    return run


def refusal(shell: Shell, files: Path, *args: str, **env: str) -> str:
    """The one line, when all that is true of every refusal was checked."""
    before = {path: path.stat().st_mtime_ns for path in files.rglob("*")}
    done = shell(*args, **env)
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert (done.returncode, done.stdout) == (2, "")
    assert {path: path.stat().st_mtime_ns for path in files.rglob("*")} == before
    line = done.stderr.rstrip("\n")
    assert LINE.fullmatch(line), line
    assert line.isprintable()
    return line.removeprefix("error: ")


# Each: what is typed, and what the answer must hold.
ISSUE: dict[str, tuple[list[str], str]] = {
    "unknown key": (
        [DROPOUT, "train.step=10"],
        r"train\.step: unknown key.* Known: steps, .*Did you mean 'steps'\?",
    ),
    "unknown key of a node": (
        [DROPOUT, "model.dropuot_rate=0.1"],
        r"model\.dropuot_rate: unknown key.*Did you mean 'dropout_rate'\?",
    ),
    "unknown key, added": (
        [DROPOUT, "+train.step=10"],
        r"train\.step: unknown key \(got 10\).*Did you mean 'steps'\?",
    ),
    "unknown key at the top": (
        [DROPOUT, "sed=1"],
        r"sed: unknown key.*Did you mean 'seed'\?",
    ),
    "unknown experiment": (
        ["+experiment=dropuot"],
        r"experiment: no such choice \(got 'dropuot'\)\. Choices: .*cnn, deep, "
        r".*Did you mean 'dropout'\?",
    ),
    "unknown option": (
        ["model=mpl"],
        r"model: no such choice \(got 'mpl'\)\. Choices: .*Did you mean 'mlp'\?",
    ),
    "wrong type": (
        [DROPOUT, "train.steps=ten"],
        r"train\.steps: must be an integer \(got 'ten'\)\.",
    ),
    "float for int": (
        [DROPOUT, "train.steps=1e3"],
        r"train\.steps: must be an integer \(got 1000\.0\)\.",
    ),
    "wrong type in a node": (
        [DROPOUT, "model.features=wide"],
        r"model\.features: must be list of int for MLP \(got 'wide'\)\.",
    ),
    "rate above 1": (
        [DROPOUT, "model.dropout_rate=1.5"],
        r"model\.dropout_rate: must be a number from 0 to 1 \(got 1\.5\)\.",
    ),
    "rate below 0": (
        [DROPOUT, "model.dropout_rate=-0.1"],
        r"model\.dropout_rate: must be a number from 0 to 1 \(got -0\.1\)\.",
    ),
    "rate that is none": (
        [DROPOUT, "model.dropout_rate=nan"],
        r"model\.dropout_rate: must be finite \(got nan\)\.",
    ),
    "batch larger than the data": (
        [DROPOUT, "data.batch_size=5000"],
        r"data\.batch_size: must not exceed the 1438 rows to train on \(got 5000\)\. "
        r"Set data\.batch_size=1438 or less\.",
    ),
    "untrusted target": (
        [DROPOUT, "model._target_=mylab.Plain"],
        r"model\._target_: not a trusted package \(got 'mylab\.Plain'\)\. Trusted: "
        r".*Add its package to trusted: \[mylab\]",
    ),
    "target of Python's": (
        [DROPOUT, "model._target_=os.system"],
        r"model\._target_: not a trusted package \(got 'os\.system'\)\.",
    ),
    "target that leads elsewhere": (
        [DROPOUT, "trusted=[mylab]", "model._target_=mylab.system"],
        r"model\._target_: leads to (posix|nt)\.system, which is not of a trusted",
    ),
    "missing target": (
        [DROPOUT, "model._target_=models.MLPP"],
        r"model\._target_: models has no MLPP \(got 'models\.MLPP'\)\. "
        r"Did you mean 'MLP'\?",
    ),
    "missing module": (
        [DROPOUT, "trusted=[nolab]", "model._target_=nolab.Net"],
        r"model\._target_: no module nolab \(got 'nolab\.Net'\)\. Is it installed",
    ),
    "target of the wrong kind": (
        ["trusted=[mylab]", "model=batch_norm", "model.module._target_=mylab.LAYERS"],
        r"model\.module\._target_: neither a class nor a function",
    ),
    "wrong argument": (
        [DROPOUT, "+model.featurs=3"],
        r"model\.featurs: not an argument of MLP \(got 'featurs'\)\. Signature: "
        r"MLP\(features, num_outputs, .*Did you mean 'features'\?",
    ),
    "wrong argument to the optimizer": (
        [DROPOUT, "+optimizer.beta=1"],
        r"optimizer\.beta: not an argument of adam \(got 'beta'\)\. Signature: "
        r"adam\(learning_rate, b1=0\.9, .*\.",
    ),
    "missing argument": (
        [DROPOUT, "~model.features"],
        r"model: MLP needs features\. Signature: MLP\(features, ",
    ),
    "undeclared stream": (
        [DROPOUT, "~rng.streams.dropout"],
        r"R004: rng\.streams: the model asks for 'dropout', which is not declared "
        r"\(train Dropout_0, train Dropout_1\)\. Set \+rng\.streams\.dropout=",
    ),
    "undeclared params": (
        [DROPOUT, "~rng.streams.params"],
        r"R004: rng\.streams: the model asks for 'params', which is not declared",
    ),
    "undeclared host stream": (
        [DROPOUT, "~rng.streams.shuffle"],
        r"data\.shuffle: not a declared stream \(got 'shuffle'\)\.",
    ),
    "seed below 0": (
        [DROPOUT, "seed=-1"],
        r"R007: seed: a negative seed is the same as 4294967295 \(got -1\)\. ",
    ),
    "seed above 32 bits": (
        [DROPOUT, "seed=4294967296"],
        r"R007: seed: a seed above 4294967295 is the same as 0 \(got 4294967296\)\. ",
    ),
    "seed of a stream": (
        [DROPOUT, "rng.streams.split.seed=-3"],
        r"R007: rng\.streams\.split\.seed: a negative seed is the same as 4294967293 ",
    ),
    "absent file": (
        [ARRAYS, "data.path=god.npz"],
        r"data\.path: no such file \(got 'god\.npz'\)\. Looked for /.*/god\.npz\. "
        r"Did you mean 'good\.npz'\?",
    ),
    "truncated file": (
        [ARRAYS, "data.path=cut.npz"],
        r"data\.path: cut\.npz is truncated or damaged\. .*again\.",
    ),
    "wrong shape": (
        [ARRAYS, "data.path=uneven.npz"],
        r"data\.path: x and y in uneven\.npz must have equal numbers of rows "
        r"\(got \(200, 100\)\)\.",
    ),
    "wrong shape for the model": (
        ["+experiment=cnn", ARRAYS, "data.path=good.npz"],
        r"model: its code raised ValueError in init: .*\(128, 8\).*",
    ),
    "directory that can't be written": (
        [DROPOUT, "hydra.run.dir=good.csv/out"],
        r"hydra\.run\.dir: can't be written \(got 'good\.csv/out': .*\)\. Set hydra",
    ),
    "metric that is not computed": (
        [DROPOUT, "eval.metric=accuraccy"],
        r"eval\.metric: not computed by task classification \(got 'accuraccy'\)\. "
        r"Computed: accuracy, loss\. Did you mean 'accuracy'\?",
    ),
}

MORE: dict[str, tuple[list[str], str]] = {
    "no mapping for a group": ([DROPOUT, "train=3"], r"train: .*"),
    "null for a group": ([DROPOUT, "model=null"], r"model: .*"),
    "number for a group": ([DROPOUT, "model=3"], r"model: .*"),
    "null": ([DROPOUT, "seed=null"], r"seed: must be an integer \(got None\)\."),
    "bool": ([DROPOUT, "seed=true"], r"seed: must be an integer \(got True\)\."),
    "empty": ([DROPOUT, "train.steps="], r"train\.steps: must be an integer"),
    "zero steps": ([DROPOUT, "train.steps=0"], r"train\.steps: out of range \(got 0\)"),
    "learning rate in words": (
        [DROPOUT, "optimizer.learning_rate=big"],
        r"optimizer\.learning_rate: must be .*\(got 'big'\)\.",
    ),
    "learning rate nan": (
        [DROPOUT, "optimizer.learning_rate=nan", "train.steps=3", "sinks=none"],
        r"optimizer\.learning_rate: must be finite \(got nan\)\.",
    ),
    "accumulation": (
        [DROPOUT, "train.accumulation_steps=3"],
        r"train\.accumulation_steps: must divide data\.batch_size",
    ),
    "outputs for too few classes": (
        [DROPOUT, "model.num_outputs=5"],
        r"model: must return logits .*\(got \(128, 5\)\)\.",
    ),
    "task of the wrong kind": (
        [DROPOUT, "task=regression"],
        r"model: must return 1 value for each row \(got \(128, 10\)\)\.",
    ),
    "model that breaks": (
        [
            "trusted=[mylab]",
            "model=batch_norm",
            "model.module._target_=mylab.Broken",
            "~model.module.layers",
        ],
        r"model: its code raised AttributeError in init: .*no_such_attribute",
    ),
    "class that is no module": (
        [
            "trusted=[mylab]",
            "model=batch_norm",
            "model.module._target_=mylab.Plain",
            "~model.module.layers",
        ],
        r"model\.module\._target_: must make a Flax module \(got 'mylab\.Plain'\)\.",
    ),
    "mode of a sink": (
        [DROPOUT, "sinks.wandb.mode=off"],
        r"sinks\.wandb\.mode: not a choice \(got 'off'\).*'offline'\?",
    ),
    "coordinate": (
        [DROPOUT, "rng.streams.dropout.per=[stepp]"],
        r"rng\.streams\.dropout\.per: not a choice \(got 'stepp'\).*'step'\?",
    ),
    "phase": (
        [DROPOUT, "rng.streams.dropout.phases=[trian]"],
        r"rng\.streams\.dropout\.phases\[0\]: not a choice \(got 'trian'\).*'train'\?",
    ),
    "phase too few": (
        [DROPOUT, "rng.streams.dropout.phases=[eval]"],
        r"rng\.streams\.dropout\.phases: must include train \(got \['eval'\]\)\.",
    ),
    "hazard": ([DROPOUT, "rng.allow=[R099]"], r"rng\.allow\[0\]: not a hazard code"),
    "ours as trusted": (
        [DROPOUT, "trusted=[models]"],
        r"trusted\[0\]: names a package",
    ),
    "path that is missing": (
        [REGRESSION],
        r"data\.path: must be set\. Add data\.path=\.\.\. to the command\.",
    ),
    "column": (
        [REGRESSION, "data.path=good.csv", "data.target=z"],
        r"data\.target: not a column of good\.csv \(got 'z'\)\. Columns: 'a', 'b', 'y'",
    ),
    "cell": (
        [REGRESSION, "data.path=bad.csv", "data.target=y"],
        r"data\.path: line 3, column 'b' of bad\.csv must be a number \(got 'x'\)\.",
    ),
    "empty table": (
        [REGRESSION, "data.path=empty.csv", "data.target=y"],
        r"data\.path: empty\.csv ",
    ),
    "array names": (
        [ARRAYS, "data.path=names.npz"],
        r"data\.path: names\.npz lacks x, y \(got \['inputs', 'targets'\]\)\.",
    ),
    "idx files": (
        ["data=mnist", "data.path=idx"],
        r"data\.path: no train-labels-idx1-ubyte and no .* there \(got 'idx'\)\.",
    ),
    "directory of idx files": (
        ["data=mnist", "data.path=/no/where"],
        r"data\.path: no such directory \(got '/no/where'\)\. .*Put the four files",
    ),
    "interpolation to nowhere": (
        [DROPOUT, "seed=${nope}"],
        r"seed: Interpolation key 'nope' not found\.",
    ),
    "variable that is not set": (
        [DROPOUT, "train.steps=${oc.env:NO_SUCH_VARIABLE}"],
        r"train\.steps: .*NO_SUCH_VARIABLE",
    ),
    "unclosed list": ([DROPOUT, "model.features=[1,2"], r"\S+: .*\[1,2"),
    "config dir": (["-cd", "nowhere", DROPOUT], r"\S+: .*nowhere"),
    "config dir of plan": (["plan", "-cd", "nowhere", DROPOUT], r"\S+: .*nowhere"),
    "plan": (["plan", DROPOUT, "seed=x"], r"seed: must be an integer \(got 'x'\)\."),
    "plan of nothing": (["plan", "+experiment=x", "--json"], r"experiment: no such"),
    "run": (["keys", "nowhere"], r"nowhere: no such run\."),
    "directory of no run": (["keys", "."], r"\.: not a run directory"),
    "file of no run": (["keys", "good.csv"], r"good\.csv: .*archive"),
    "archive of no run": (["keys", "good.npz"], r"good\.npz: not the archive of a run"),
    "newline": (
        [DROPOUT, "seed='a\nb'"],
        r"seed: must be an integer \(got 'a\\nb'\)\.",
    ),
    "escape": (
        [DROPOUT, "model._target_='models.\x1b[31mMLP'"],
        r"model\._target_: must be a name such as flax\.linen\.Dense",
    ),
    "unicode": (
        [DROPOUT, "seed='日本語'"],
        r"seed: must be an integer \(got '日本語'\)\.",
    ),
    "very long value": (
        [DROPOUT, f"seed={'x' * 100_000}"],
        r"seed: must be an integer \(got 'x{50,}\.\.\.\)\.",
    ),
    "sweep of nothing": (["-m", "+experiment=x", "seed=0,1"], r"experiment: no such"),
    "empty sweep": (
        ["-m", DROPOUT, "seed=range(0)"],
        r"seed: an empty sweep \(got 'range\(0\)'\)\. Give it at least one",
    ),
    "sweep over what is not there": (
        ["-m", DROPOUT, "model.dropuot_rate=0.1,0.2"],
        r"model\.dropuot_rate: unknown key.* Did you mean 'dropout_rate'\?",
    ),
    "sweep for what is not computed": (
        ["-m", DROPOUT, "seed=0,1", "eval.metric=f1"],
        r"eval\.metric: not computed by task classification \(got 'f1'\)\.",
    ),
    "sweep of no kind": (
        ["-m", DROPOUT, "seed=0,1", "hydra.sweeper.repeats=two"],
        r"hydra\.sweeper\.repeats: must be an integer \(got 'two'\)\.",
    ),
    "unequal zip": (
        [
            *("-m", DROPOUT, "seed=0,1", "model.dropout_rate=0.1,0.2,0.3"),
            "hydra.sweeper.zip=[seed,model.dropout_rate]",
        ],
        r"hydra\.sweeper\.zip: what goes together needs as many values \(seed has 2, ",
    ),
    "sweep below a file": (
        ["-m", "sinks=none", "train.steps=2", "seed=0", "hydra.sweep.dir=good.csv/x"],
        r"hydra\.sweep\.dir: can't be written",
    ),
}


@pytest.mark.parametrize(("args", "says"), ISSUE.values(), ids=ISSUE)
def test_the_issues_bad_input(
    shell: Shell, files: Path, args: list[str], says: str
) -> None:
    assert re.match(says, refusal(shell, files, *args))


@pytest.mark.parametrize(("args", "says"), MORE.values(), ids=MORE)
def test_bad_input(shell: Shell, files: Path, args: list[str], says: str) -> None:
    line = refusal(shell, files, *args)
    assert re.match(says, line)
    assert len(line) < 1000


def test_bad_environment(shell: Shell, files: Path) -> None:
    args = ("train.steps=2", "sinks.terminal.mode=disabled")
    line = refusal(shell, files, *args, WANDB_MODE="bogus")
    assert re.match(r"sinks\.wandb\.mode: .*WANDB_MODE.*\(got 'bogus'\)\.", line)


def test_a_run_is_never_overwritten(shell: Shell, tmp_path: Path, files: Path) -> None:
    args = ("train.steps=2", "sinks=none", f"hydra.run.dir={tmp_path}/mine")
    assert shell(*args).returncode == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    line = refusal(shell, files, *args)
    assert re.match(r"hydra\.run\.dir: holds a run already \(got '.*/mine'\)\.", line)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_full_error_shows_where(shell: Shell) -> None:
    done = shell(DROPOUT, "seed=-1", HYDRA_FULL_ERROR="1")
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: R007: seed: a negative")


@pytest.mark.parametrize(
    "args",
    [
        ["--jsonn", DROPOUT],
        ["plan", "--jsn"],
        ["keys"],
        ["keys", ".", "--phase", "trian"],
        ["keys", ".", "--step", "x"],
    ],
    ids=" ".join,
)
def test_a_wrong_flag_is_named(shell: Shell, args: list[str]) -> None:
    """argparse prints the usage first; the last line says what is wrong."""
    done = shell(*args)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert re.match(r"runner( plan| keys)?: error: ", done.stderr.splitlines()[-1])
    assert "_step" not in done.stderr.splitlines()[-1]


def test_flags_may_stand_between_overrides(shell: Shell) -> None:
    done = shell("plan", DROPOUT, "--json", "seed=x")
    assert "seed: must be an integer (got 'x')" in done.stderr


CLEAR: dict[str, tuple[list[str], str]] = {
    # A word that is no verb: name it, and the verbs.
    "plam": (["plam", DROPOUT], r"plam: .*Did you mean 'plan'\?"),
    # The commonest slip of all: Hydra wants a plus.
    "plus": (["experiment=dropout"], r"experiment: .*\+experiment=dropout"),
    "value without =": ([DROPOUT, "train.steps"], r"train\.steps: .*="),
    "unquoted unicode": ([DROPOUT, "seed=é"], r"seed: (?!.*Lexer).*'é'"),
    "group twice": ([DROPOUT, "+model=mlp"], r"model: .*\+"),
    "bound and null": ([DROPOUT, "eval.every=0"], r"eval\.every: .*2147483647\. Or: "),
    "no target": ([DROPOUT, "~model._target_"], r"model: must (?!.*Tracer)"),
}


@pytest.mark.parametrize(("args", "says"), CLEAR.values(), ids=CLEAR)
def test_a_newcomer_understands(
    shell: Shell, files: Path, args: list[str], says: str
) -> None:
    line: Any = refusal(shell, files, *args)
    assert re.match(says, line)
    assert "EOF" not in line
