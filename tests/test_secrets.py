# SPDX-License-Identifier: Apache-2.0
"""Secrets planted in a config: not a byte of them in any file or on a screen."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from runner.records.metrics import read_metrics

SHORT = ("+experiment=batch_norm", "train.steps=12", "eval.every=6")

# What each is, and why it is hard to find again in a text.
SECRETS = {
    "ENTITY": "entity-4f1d",
    "PROJECT": "proj3ct with a space, and so long that YAML folds it over two lines"
    " when it writes eighty columns",
    "QUOTED": 'it\'s "quoted" \\ and\ttabbed',
    "UNICODE": "schlüssel-日本",
    "COLON": "a: b # c",
    "FOLDER": "private-b7c2",
    "NAMED": "sk-live-9e8d7c",
    "PHRASE": "correct horse",
    "DIGITS": "31415926",
}


def spellings(secret: str) -> set[bytes]:
    """A secret as a file may spell it."""
    texts = {secret, json.dumps(secret)[1:-1], repr(secret)[1:-1]}
    texts |= {yaml.safe_dump(secret).removesuffix("\n...\n").strip()}
    texts |= {secret.replace("'", "''")}
    texts |= {secret.replace("\\", "\\\\").replace("'", "\\'")}
    if " " in secret:
        texts |= {part for part in secret.split(" ") if len(part) > 9}
    return {text.encode() for text in texts}


def leaks(home: Path, *said: str, secrets: dict[str, str]) -> list[str]:
    """Where which secret can be read."""
    files = [path for path in home.rglob("*") if path.is_file()]
    contents = {str(path.relative_to(home)): path.read_bytes() for path in files}
    contents |= {f"said {i}": text.encode() for i, text in enumerate(said)}
    # A line may be folded anywhere.
    contents = {k: v + b"\n" + b" ".join(v.split()) for k, v in contents.items()}
    contents |= {f"name {path}": str(path).encode() for path in contents}
    return [
        f"{name} in {where}"
        for name, secret in secrets.items()
        for where, content in contents.items()
        if any(spelling in content for spelling in spellings(secret))
    ]


def is_told(leak: str, names: tuple[str, ...]) -> bool:
    name, _, where = leak.partition(" in ")
    return name in names and "/wandb/" in where


@pytest.fixture
def start(
    user_env: dict[str, str], tmp_path: Path
) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    def start(*args: str, **env: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "runner", *args],
            cwd=tmp_path,
            env=user_env | env,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )

    return start


def save_digits(path: Path) -> None:
    path.parent.mkdir(parents=True)
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(300, 8)), draw.integers(0, 10, 300)
    np.savez(path, x=x.astype(np.float32), y=y)


def test_secrets_reach_no_file_and_no_screen(
    start: Any, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("elsewhere") / SECRETS["FOLDER"]
    save_digits(folder / "digits.npz")
    from_environment = {
        "sinks.wandb.entity": "ENTITY",
        "sinks.wandb.project": "PROJECT",
        "sinks.wandb.group": "QUOTED",
        "+model.note": "UNICODE",
        "+model.other_note": "COLON",
    }
    done = start(
        *SHORT,
        *(f"{path}=${{oc.env:{name}}}" for path, name in from_environment.items()),
        "data=arrays",
        "data.batch_size=32",
        "data.path=${oc.env:FOLDER}/digits.npz",
        f"+model.api_token={SECRETS['NAMED']}",
        f"+model.notes=[{SECRETS['NAMED']},x]",
        f"+model.password={SECRETS['PHRASE']}",
        f"+model.db_key='{SECRETS['DIGITS']}'",
        "+model.home='https://bob:hunter2-e5@example.org/x'",
        **(SECRETS | {"FOLDER": str(folder)}),
    )
    assert (done.returncode, done.stderr) == (0, "")
    planted = SECRETS | {"USERINFO": "hunter2-e5"}
    found = leaks(tmp_path, done.stdout, done.stderr, secrets=planted)
    # W&B is told its own entity, project and group: its files can't do without.
    told = ("ENTITY", "PROJECT", "QUOTED")
    found = [leak for leak in found if not is_told(leak, told)]
    assert not found, "\n".join(found)
    (run,) = (path.parent for path in tmp_path.rglob("run.json"))
    assert len(read_metrics(run / "metrics.jsonl")) == 14
    assert list(run.glob("wandb/offline-run-*/*.wandb"))
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["data"]["path"] == "${oc.env:FOLDER}/digits.npz"
    assert config["sinks"]["wandb"]["entity"] == "${oc.env:ENTITY}"
    assert config["model"]["api_token"] == "<secret>"
    assert config["model"]["home"] == "https://<secret>@example.org/x"
    # The model's own text is left alone.
    assert config["model"]["module"]["layers"][1]["features"] == 128


def test_a_secret_that_is_a_number(start: Any, tmp_path: Path) -> None:
    args = ("+model.password=271828182", "+model.pin_token=161803398", "sinks=none")
    done = start(*SHORT, *args)
    assert done.returncode == 0, done.stderr
    planted = {"password": "271828182", "token": "161803398"}
    assert not leaks(tmp_path, done.stdout, done.stderr, secrets=planted)


def test_a_secret_for_hydra(start: Any, tmp_path: Path) -> None:
    """What Hydra is told to set in the environment of a job."""
    done = start(*SHORT, "sinks=none", "+hydra.job.env_set.MY_API_KEY=sk-9f8e7d6c")
    assert done.returncode == 0, done.stderr
    assert not leaks(tmp_path, done.stdout, secrets={"KEY": "sk-9f8e7d6c"})


def test_a_secret_in_a_sweep(start: Any, tmp_path: Path) -> None:
    """Hydra announces each job with its overrides, and keeps them in a file."""
    planted = {"token": "sk-9f8e7d6c"}
    args = ("-m", *SHORT, "sinks=none", "seed=0")
    done = start(*args, "+model.api_token=sk-9f8e7d6c")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "multirun.yaml" in done.stderr
    assert not leaks(tmp_path, done.stdout, done.stderr, secrets=planted)
    done = start(*args, "+model.api_token=${oc.env:TOKEN}", TOKEN="sk-9f8e7d6c")
    assert done.returncode == 0, done.stderr
    assert not leaks(tmp_path, done.stdout, done.stderr, secrets=planted)


REFUSED = {
    "path": ["data=arrays", "data.path=${oc.env:SECRET}"],
    "part of a path": ["data=arrays", "data.path=/data/${oc.env:SECRET}/x.npz"],
    "path to be normalised": ["data=arrays", "data.path=../x/../${oc.env:SECRET}"],
    "user info": ["data=arrays", "data.path=https://bob:sk-77aa88bb@host/x.npz"],
    "wrong type": ["seed=${oc.env:SECRET}"],
    "not a choice": ["sinks.wandb.mode=${oc.env:SECRET}"],
    "wrong argument": ["model.features=${oc.env:SECRET}"],
    "named": ["+train.api_key=sk-77aa88bb"],
    "named in a node": ["+model.hidden={api_token: sk-77aa88bb}"],
    "module's own words": [
        "trusted=[mylab]",
        "model=batch_norm",
        "~model.module.layers",
        "model.module._target_=mylab.Net",
        "+model.module.token=${oc.env:SECRET}",
    ],
    "traced back": ["hydra.run.dir=/dev/null/${oc.env:SECRET}"],
}


@pytest.mark.parametrize("args", REFUSED.values(), ids=REFUSED)
def test_refusals_tell_no_secret(start: Any, tmp_path: Path, args: list[str]) -> None:
    (tmp_path / "mylab").mkdir()
    (tmp_path / "mylab" / "__init__.py").write_text(
        "from flax import linen as nn\n"
        "class Net(nn.Module):\n"
        "    token: str\n"
        "    @nn.compact\n"
        "    def __call__(self, x):\n"
        "        raise PermissionError(f'no such account: {self.token}')\n"
    )
    done = start(*args, SECRET="sk-77aa88bb")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert not leaks(tmp_path, done.stdout, done.stderr, secrets={"S": "sk-77aa88bb"})


def test_a_crash_tells_no_secret(start: Any, tmp_path: Path) -> None:
    """A model that raises in the middle of a run, where no check comes first."""
    (tmp_path / "mylab").mkdir()
    (tmp_path / "mylab" / "__init__.py").write_text(
        "import jax\n"
        "from flax import linen as nn\n"
        "def fail(token, x):\n"
        "    raise PermissionError(f'no such account: {token}')\n"
        "class Net(nn.Module):\n"
        "    token: str\n"
        "    @nn.compact\n"
        "    def __call__(self, x):\n"
        "        x = nn.Dense(10)(x.reshape(len(x), -1))\n"
        "        jax.debug.callback(lambda x: fail(self.token, x), x)\n"
        "        return x\n"
    )
    done = start(
        "trusted=[mylab]",
        "model=batch_norm",
        "~model.module.layers",
        "model.module._target_=mylab.Net",
        "+model.module.token=${oc.env:SECRET}",
        "train.steps=5",
        "sinks=none",
        SECRET="sk-77aa88bb",
    )
    assert done.returncode == 1
    (manifest,) = (json.loads(p.read_text()) for p in tmp_path.rglob("run.json"))
    assert manifest["status"] == "failed"
    planted = {"S": "sk-77aa88bb"}
    (tmp_path / "mylab").rename(tmp_path.parent / f"{tmp_path.name}-mylab")
    assert not leaks(tmp_path, secrets=planted)
    assert not leaks(tmp_path, done.stdout, done.stderr, secrets=planted)


def test_thirty_secrets_in_all_that_a_run_goes_through(
    start: Any, tmp_path: Path
) -> None:
    """Trained, resumed and reproduced, with the values given again by hand."""
    planted = {f"PLANT_{i}": f"pl4nt-{i:02}-{'q7' * 6}" for i in range(30)}
    values = list(planted.values())
    trained: dict[str, str] = {}  # as training is told
    given: dict[str, str] = {}  # as whoever runs the record again is
    for i, (name, value) in enumerate(planted.items()):
        kinds = {
            f"note_{i}": (f"${{oc.env:{name}}}", value),
            f"part_{i}": (f"/data/${{oc.env:{name}}}/x", f"/data/{value}/x"),
            f"named_{i}_token": (value, value),
            f"url_{i}": (f"https://bob:{value}@h.org/x",) * 2,
        }
        path, (told, again) = list(kinds.items())[i % 4]
        trained[f"+model.{path}"] = f"'{told}'"
        given[f"model.{path}"] = f"'{again}'"
    words = [f"{path}={value}" for path, value in trained.items()]
    again = [f"{path}={value}" for path, value in given.items()]
    by_hand = [word for each in again for word in ("--set", each)]
    done = start(*SHORT, *words, "checkpoint.every=6", **planted)
    (run,) = (path.parent for path in tmp_path.rglob("run.json"))
    config = yaml.safe_load((run / "config.yaml").read_text())["model"]
    assert config["note_0"] == "${oc.env:PLANT_0}"
    assert config["named_2_token"] == "<secret>"
    assert config["url_3"] == "https://<secret>@h.org/x"
    more = start("resume", str(run), "train.steps=18", *again)
    twice = start("reproduce", str(run), *by_hand)
    stages = (done, more, twice)
    assert [(each.returncode, each.stderr) for each in stages] == [(0, "")] * 3
    (verdict,) = tmp_path.rglob("verdict.json")
    shown = yaml.safe_load(verdict.with_name("config.yaml").read_text())["model"]
    assert shown == config
    assert list(run.glob("wandb/offline-run-*/*.wandb"))
    refused = start("reproduce", str(run), *by_hand, "--set", f"seed={values[0]}")
    assert refused.returncode == 2
    missing = start("reproduce", str(run), *by_hand[2:])
    assert missing.returncode == 2
    every = (*stages, refused, missing)
    said = [text for each in every for text in (each.stdout, each.stderr)]
    found = leaks(tmp_path, *said, secrets=planted)
    assert not found, "\n".join(found)
