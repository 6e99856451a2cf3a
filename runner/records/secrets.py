# SPDX-License-Identifier: Apache-2.0
"""Secrets never reach a file, a sink or the terminal.

A secret is the value of a leaf that is named like one, or what comes from the
environment (`oc.env`). A record shows the former as `<secret>` and the latter as the
interpolation that it came from; in any other text the value is blotted out, however
it is spelled there.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

__all__ = ["SECRET", "Secrets", "find_secrets"]

SECRET = "<secret>"
_NAMES = re.compile(r"(^|_)(key|token|password|passwd|secret|credentials)$", re.I)
_FROM_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:\s*([^,}\s]+)")
_USER_INFO = re.compile(r"(:/{1,2})[^/\s]+@")
_SHORTEST = 4  # characters; a shorter value would blot out half of any text


@dataclass(frozen=True)
class Secrets:
    """The secret leaves of a config, by path, and what each is shown as."""

    shown: Mapping[str, str]
    values: tuple[str, ...]

    def __or__(self, other: "Secrets") -> "Secrets":
        values = dict.fromkeys((*self.values, *other.values))
        return Secrets({**self.shown, **other.shown}, tuple(values))

    def blot(self, text: str) -> str:
        """The text without any secret value, and without user info in URLs."""
        for spelling in self._spellings:
            text = text.replace(spelling, SECRET)
        return _USER_INFO.sub(rf"\1{SECRET}@", text)

    def redact(self, config: Any, path: str = "") -> Any:
        """Plain data with every secret leaf as it is shown."""
        if path in self.shown:
            return self.shown[path]
        if isinstance(config, Mapping):
            return {k: self.redact(v, _join(path, k)) for k, v in config.items()}
        if isinstance(config, list | tuple):
            return [self.redact(v, f"{path}[{i}]") for i, v in enumerate(config)]
        return self.blot(config) if isinstance(config, str) else config

    @cached_property
    def _spellings(self) -> list[str]:
        """Each value as a text may have it, the longest first."""
        found = set()
        for value in self.values:
            plain = {value, " ".join(value.split()), value.replace("'", "''")}
            escaped = {json.dumps(value)[1:-1], repr(value)[1:-1]}
            found |= plain | escaped | {each.replace("\\", "\\\\") for each in escaped}
        return sorted(found, key=len, reverse=True)


def find_secrets(raw: Any, resolved: Any) -> Secrets:
    """The secrets of a config.

    Args:
        raw: Plain data with its interpolations as they were written.
        resolved: The same with their values.
    """
    shown: dict[str, str] = {}
    values: set[str] = set()
    for path, written, value in _pairs("", raw, resolved):
        named = [n for n in _FROM_ENVIRONMENT.findall(str(written)) if n in os.environ]
        values.update(os.environ[name] for name in named)
        if value is None or isinstance(value, bool) or value == "":
            continue
        if isinstance(value, str) and "${" in value:  # not resolved: no value yet
            continue
        name = path.rsplit(".", 1)[-1]
        if name == "key" and isinstance(value, int):  # a seed of random numbers
            continue
        if _NAMES.search(name):
            shown[path] = SECRET
        elif isinstance(value, str) and _is_shown_otherwise(str(written), value):
            shown[path] = str(written)
        else:
            continue
        values.add(str(value))
    return Secrets(shown, tuple(sorted(v for v in values if len(v) >= _SHORTEST)))


def _is_shown_otherwise(written: str, value: str) -> bool:
    """Whether a value comes from the environment, or was blotted out of a record."""
    is_blotted = SECRET in written and written != value
    return is_blotted or _FROM_ENVIRONMENT.search(written) is not None


def _pairs(path: str, raw: Any, resolved: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(resolved, Mapping):
        for key, value in resolved.items():
            inner = raw.get(key) if isinstance(raw, Mapping) else raw
            yield from _pairs(_join(path, key), inner, value)
    elif isinstance(resolved, list | tuple):
        for i, value in enumerate(resolved):
            inner = raw[i] if isinstance(raw, list | tuple) else raw
            yield from _pairs(f"{path}[{i}]", inner, value)
    else:
        yield path, raw, resolved


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)
