# SPDX-License-Identifier: Apache-2.0
"""What README and docs print as commands is run; what they print as YAML is parsed."""

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from runner.parse import to_plain
from runner.spec import parse_spec

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHORT = ("train.steps=2", "sinks=none", "train.compile_cache=null")


def commands() -> list[Any]:
    """Each `python -m runner ...` line that names no file of the reader's."""
    found = {}
    for page in PAGES:
        for line in page.read_text().splitlines():
            match = re.match(r"(?: {4}|\t)(?:\$ )?python -m runner (.*)", line)
            if match:
                words = shlex.split(match.group(1), comments=True)
                name = " ".join(words)
                found[name] = pytest.param(words, id=name)
    return list(found.values())


COMMANDS = commands()


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 6


def example_of(words: list[str], tmp_path: Path) -> list[str]:
    """The command, made short, with files of its own where it names the reader's."""
    given = [word for word in words if "~/data" not in word and word != "data=mnist"]
    if "-cd" in given:
        at = given.index("-cd") + 1
        (tmp_path / given[at] / "model").mkdir(parents=True)
        mine = tmp_path / given[at] / "model" / "mine.yaml"
        shutil.copy(ROOT / "conf" / "model" / "mlp.yaml", mine)
    if given[0] == "plan" or "--help" in given:
        return given
    return [*SHORT, *[w for w in given if not w.startswith("train.steps")]]


OF_A_RUN = ("keys", "reproduce", "resume", "diff", "report")


@pytest.mark.parametrize(
    "words", [p for p in COMMANDS if p.values[0][0] not in OF_A_RUN]
)
def test_commands_run(runner: Any, tmp_path: Path, words: list[str]) -> None:
    done = runner(*example_of(words, tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_keys_command_of_the_readme(runner: Any) -> None:
    """The excerpt of the ledger in the README is what the command prints."""
    text = (ROOT / "README.md").read_text()
    (words,) = (p.values[0] for p in COMMANDS if p.values[0][0] == "keys")
    block = text.split(" ".join(words))[1].split("\n\n")[0]
    trained = runner("+experiment=dropout", *SHORT)
    run = trained.stdout.splitlines()[-1]
    printed = runner("keys", run, *words[2:]).stdout
    for line in block.strip("\n").splitlines():
        assert line.strip() in printed


def test_reproduce_command_of_the_docs(runner: Any) -> None:
    """The verdict in README and docs is what the command prints."""
    trained = runner("+experiment=dropout", "sinks=none")
    run = trained.stdout.splitlines()[-1]
    printed = runner("reproduce", run).stdout.splitlines()
    told = [p for p in COMMANDS if p.values[0][0] == "reproduce"]
    assert told
    for param in told:
        words = " ".join(param.values[0])
        for page in PAGES:
            for block in page.read_text().split(f"python -m runner {words}\n")[1:]:
                lines = re.findall(r"^ {4}(.*)$", block.split("\n\n`")[0], re.M)
                shown = [x for x in lines if not x.startswith("set as recorded")]
                assert {"verdict: bit-exact (promised bit-exact: kept)"} <= set(shown)
                assert set(shown) <= set(printed)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_yaml_parses(page: Path, compose_config: Any) -> None:
    base = compose_config("+experiment=dropout")
    for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.S):
        given = yaml.safe_load(block)
        merged = {**base, **{k: v for k, v in given.items() if k != "rng"}}
        merged["rng"] = {**base["rng"], **given.get("rng", {})}
        resolved = _resolve(merged)
        if "rng" in given:
            streams = resolved["rng"]["streams"]
            streams.setdefault("split", {"kind": "host", "seed": 0})
            streams.setdefault("shuffle", {"kind": "host", "per": ["epoch"]})
        assert to_plain(parse_spec(resolved))["model"] == resolved["model"]


def _resolve(config: dict[str, Any]) -> dict[str, Any]:
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(OmegaConf.create(config), resolve=True)
    assert isinstance(plain, dict)
    return dict(plain)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target
