# SPDX-License-Identifier: Apache-2.0
"""Hydra's and OmegaConf's complaints as one line in the words of this project."""

import re
from collections.abc import Callable

from runner.errors import ConfigError, RunnerError, did_you_mean

__all__ = ["refusal_of"]

_OVERRIDE = re.compile(r"Could not override '([^']+)'")
_APPEND = re.compile(r"Could not append to config\. An item is already at '([^']+)'")
_MERGE = re.compile(r"Error merging override \+*([\w.]+)=(.*)")
_CHOICE = re.compile(r"Could not find '([^']+)/([^'/]+(?:/[^'/]+)*)'")
_OPTIONS = re.compile(r"Available options in '([^']+)':((?:\s*\n\t[^\n]+)*)")


def refusal_of(
    error: Exception, keys_at: Callable[[str], list[str]] = lambda _: []
) -> RunnerError:
    """The one-line error for what Hydra or OmegaConf raised.

    Args:
        error: Their exception.
        keys_at: The keys that the config has at a path; for suggestions.
    """
    text = str(error)
    if found := _OPTIONS.search(text):
        return _no_such_choice(text, found)
    if found := _OVERRIDE.search(text):
        path = found.group(1)
        parent, _, leaf = path.rpartition(".")
        known = keys_at(parent)
        allowed = f"Known: {', '.join(known)}" if known else None
        fix = did_you_mean(leaf, known)
        return ConfigError(path, "unknown key", allowed=allowed, fix=fix)
    if found := _APPEND.search(text):
        path = found.group(1)
        return ConfigError(path, "is there already", fix="Leave the + out")
    if found := _MERGE.search(text):
        path, value = found.groups()
        return ConfigError(
            path,
            "a list can't be overridden by a mapping, nor the reverse",
            got=value,
            fix=f"Replace it: '~{path}' '+{path}={value}'",
        )
    path = getattr(error, "full_key", None) or "config"
    first = " ".join(line.strip() for line in text.splitlines() if line.strip())
    first = re.sub(r"\s*(full_key|object_type|reference_type)[:=].*", "", first)
    return RunnerError(f"{path}: {first.rstrip('.')}.")


def _no_such_choice(text: str, options: re.Match[str]) -> ConfigError:
    group = options.group(1)
    choices = sorted(options.group(2).split())
    found = _CHOICE.search(text)
    got = found.group(0).split("'")[1].removeprefix(f"{group}/") if found else ""
    return ConfigError(
        group,
        "no such choice",
        got=got,
        allowed=f"Choices: {', '.join(choices)}",
        fix=did_you_mean(got, choices),
    )
