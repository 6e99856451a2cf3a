# SPDX-License-Identifier: Apache-2.0
"""Secrets never reach a file, a sink or the terminal.

A secret is the value of a leaf that is named like one, or a string that comes from
the environment (`oc.env`). A record shows the former as `<secret>` and the latter
as the interpolation that it came from; in any other text the value is blotted out.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["SECRET", "Secrets", "find_secrets"]

SECRET = "<secret>"
_NAMES = re.compile(r"(^|_)(key|token|password|passwd|secret|credentials)$", re.I)
_FROM_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:")
_USER_INFO = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_SHORTEST = 4  # characters; a shorter value would blot out half of any text


@dataclass(frozen=True)
class Secrets:
    """The secret leaves of a config, by path, and what each is shown as."""

    shown: Mapping[str, str]
    values: tuple[str, ...]

    def blot(self, text: str) -> str:
        """The text without any secret value, and without user info in URLs."""
        for value in self.values:
            text = text.replace(value, SECRET)
        return _USER_INFO.sub(SECRET, text)

    def redact(self, config: Any, path: str = "") -> Any:
        """Plain data with every secret leaf as it is shown."""
        if path in self.shown:
            return self.shown[path]
        if isinstance(config, Mapping):
            return {k: self.redact(v, _join(path, k)) for k, v in config.items()}
        if isinstance(config, list | tuple):
            return [self.redact(v, f"{path}[{i}]") for i, v in enumerate(config)]
        return self.blot(config) if isinstance(config, str) else config


def find_secrets(raw: Any, resolved: Any) -> Secrets:
    """The secrets of a config.

    Args:
        raw: Plain data with its interpolations as they were written.
        resolved: The same with their values.
    """
    shown: dict[str, str] = {}
    values: set[str] = set()
    for path, written, value in _pairs("", raw, resolved):
        if not isinstance(value, str) or not value:
            continue
        leaf = path.rsplit(".", 1)[-1]
        if isinstance(written, str) and _FROM_ENVIRONMENT.search(written):
            shown[path] = written
        elif _NAMES.search(leaf):
            shown[path] = SECRET
        else:
            continue
        if len(value) >= _SHORTEST:
            values.add(value)
    return Secrets(shown, tuple(sorted(values, key=len, reverse=True)))


def _pairs(path: str, raw: Any, resolved: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(resolved, Mapping):
        for key, value in resolved.items():
            inner = raw.get(key, raw) if isinstance(raw, Mapping) else raw
            yield from _pairs(_join(path, key), inner, value)
    elif isinstance(resolved, list | tuple):
        for i, value in enumerate(resolved):
            inner = raw[i] if isinstance(raw, list | tuple) and i < len(raw) else raw
            yield from _pairs(f"{path}[{i}]", inner, value)
    else:
        yield path, raw, resolved


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)
