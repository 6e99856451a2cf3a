# SPDX-License-Identifier: Apache-2.0
"""Hydra's and OmegaConf's complaints as one line in the words of this project."""

import re
from typing import Any

from runner import CONF_DIR
from runner.cli import VERBS
from runner.errors import ConfigError, RunnerError, did_you_mean

__all__ = ["refusal_of"]

_UNKNOWN = re.compile(r"Could not override '([^']+)'")
_THERE = re.compile(r"Could not append to config\. An item is already at '([^']+)'")
_CHOICE = re.compile(r"Could not find '([^']+)'")
_OPTIONS = re.compile(r"Available options in '([^']+)':((?:\s*\n\t[^\n]+)*)")
_MERGE = re.compile(r"Error merging override \+*([\w.]+)=(.*)")
_KIND = re.compile(
    r"could not be converted to (\w+)|is not a (ListConfig)"
    r"|to (string): |is not (Optional)"
)
_KINDS = {
    "Integer": "an integer",
    "Float": "a number",
    "Boolean": "true or false",
    "ListConfig": "a list",
    "string": "a word",
    "Optional": "something else than null",
}
_TWICE = re.compile(r"(\S+) appears more than once in the final defaults list")
_NO_EQUALS = re.compile(r"Error parsing override '([^']*)'\s+missing EQUAL")
_LAUNCHER = re.compile(r"Could not (?:find|load) 'hydra/launcher/(\w+)'")
_OF_LANES = tuple(
    f"hydra.launcher.{name}"
    for name in ("mode", "max_lanes", "processes", "lanes_per_job")
)
_OVER = "hydra/launcher/over"
_EXTRAS = {  # of pyproject.toml, by the launchers that they bring
    "joblib": "joblib",
    "ray": "ray",
    "submitit_local": "submitit",
    "submitit_slurm": "submitit",
}
_NOISE = re.compile(r"\s*(full_key|object_type|reference_type|See https?)[:= ].*")


def refusal_of(error: Exception, args: list[str]) -> RunnerError:
    """The one-line error for what Hydra or OmegaConf raised.

    Args:
        error: Their exception.
        args: The command line.
    """
    text = str(error)
    if (found := _LAUNCHER.search(text)) and found.group(1) in _EXTRAS:
        return _not_installed(found.group(1), is_over=_OVER in text)
    if found := _OPTIONS.search(text):
        return _no_such_choice(text, found)
    if found := _UNKNOWN.search(text):
        return _unknown_key(found.group(1), args)
    if found := _THERE.search(text):
        return ConfigError(found.group(1), "is there already", fix="Leave the + out")
    if found := _MERGE.search(text):
        path, value = found.groups()
        if kind := _KIND.search(str(error.__cause__)):
            what = _KINDS.get(kind[kind.lastindex or 0], "of another kind")
            return ConfigError(path, f"must be {what}", got=value)
        rule = "a list can't be overridden by a mapping, nor the reverse"
        fix = f"Replace it: '~{path}' '+{path}={value}'"
        return ConfigError(path, rule, got=value, fix=fix)
    if found := _TWICE.search(text):
        group = found.group(1).rsplit("/", 1)[-1]
        fix = f"Leave the + out: {group}=CHOICE"
        return ConfigError(group, "has a choice already", fix=fix)
    if found := _NO_EQUALS.search(text):
        return _no_value(found.group(1))
    if override := getattr(error, "override", None):
        path, _, value = str(override).lstrip("+~").partition("=")
        fix = f"Quote it: {path}=\"'...'\""
        return ConfigError(path, "can't be read as a value", got=value, fix=fix)
    return _anything_else(error, text, args)


def _not_installed(launcher: str, *, is_over: bool) -> ConfigError:
    return ConfigError(
        _OVER if is_over else "hydra/launcher",
        "not installed",
        got=launcher,
        fix=f"Say pip install 'jax-runner[{_EXTRAS[launcher]}]'",
    )


def _no_such_choice(text: str, options: re.Match[str]) -> ConfigError:
    group = options.group(1)
    choices = sorted({*options.group(2).split(), *_nested(group)})
    found = _CHOICE.search(text)
    got = found.group(1).removeprefix(f"{group}/") if found else ""
    return ConfigError(
        group,
        "no such choice",
        got=got,
        allowed=f"Choices: {', '.join(choices)}",
        fix=did_you_mean(got, choices),
    )


def _nested(group: str) -> list[str]:
    """Our choices in folders of a group, which Hydra leaves out of its list."""
    folder = CONF_DIR / group
    files = (file.relative_to(folder) for file in folder.glob("*/**/*.yaml"))
    return [file.with_suffix("").as_posix() for file in files]


def _unknown_key(path: str, args: list[str]) -> ConfigError:
    parent, _, leaf = path.rpartition(".")
    if path == "experiment":
        given = next(
            (a for a in args if a.startswith("experiment=")), "experiment=NAME"
        )
        return ConfigError(path, "no recipe to replace", fix=f"Add one: +{given}")
    if path == _OVER:
        rule = "ships the lanes of hydra/launcher=vectorized, which is not there"
        return ConfigError(path, rule, fix="Add hydra/launcher=vectorized")
    if path in _OF_LANES and "hydra/launcher=vectorized" not in args:
        rule = "is of hydra/launcher=vectorized, which is not there"
        return ConfigError(path, rule, fix="Add hydra/launcher=vectorized")
    known = _keys_at(parent, args)
    if leaf in known:  # a mapping, given keys that it does not have
        given = next((a for a in args if a.startswith(f"{path}=")), f"{path}={{}}")
        rule = "a value is added to, not replaced, and has no such key"
        fix = f"Replace it: '~{path}' '+{given}'"
        return ConfigError(path, rule, got=given.partition("=")[2], fix=fix)
    allowed = f"Known: {', '.join(known)}" if known else None
    return ConfigError(
        path, "unknown key", allowed=allowed, fix=did_you_mean(leaf, known)
    )


def _no_value(word: str) -> ConfigError:
    if "." in word or word.startswith(("+", "~")):
        path = word.lstrip("+~")
        return ConfigError(path, "needs a value", fix=f"Say {word}=VALUE")
    return ConfigError(
        word,
        "neither a verb nor an override",
        allowed=f"Verbs: {', '.join(VERBS)}; overrides: NAME=VALUE",
        fix=did_you_mean(word, VERBS),
    )


def _anything_else(error: Exception, text: str, args: list[str]) -> RunnerError:
    path = getattr(error, "full_key", None)
    if isinstance(error, OSError):
        rule = f"can't be written: {error.strerror}"
        return ConfigError("hydra.sweep.dir", rule, got=error.filename)
    if path is None:  # a value where a group's choice is due: say whose
        groups = [a.partition("=")[0] for a in args if re.match(r"\w+=(\d+|null)$", a)]
        path = groups[0] if "group" in text.lower() and groups else "config"
    first = " ".join(line.strip() for line in text.splitlines() if line.strip())
    return RunnerError(f"{path}: {_NOISE.sub('', first).rstrip('. ')}.")


def _keys_at(path: str, args: list[str]) -> list[str]:
    """The keys that the config has at a path, for suggestions; none on any error."""
    from omegaconf import OmegaConf

    from runner.cli.config import compose

    try:
        config = compose([a for a in args if a.startswith(("+experiment=", "hydra/"))])
        node: Any = OmegaConf.select(config, path) if path else config
        return [str(key) for key in node if key != "hydra"]
    except Exception:  # a suggestion is not worth a second error
        return []
