# SPDX-License-Identifier: Apache-2.0
"""`PATH=VALUE` words of the verbs that run from a record."""

from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from runner.cli.refusal import refusal_of
from runner.errors import ConfigError

__all__ = ["parse_changes"]


def parse_changes(words: list[str]) -> dict[str, Any]:
    """Values by config path, as Hydra reads them; no interpolation is resolved.

    Raises:
        ConfigError: a word is no plain override.
    """
    changes: dict[str, Any] = {}
    for word in words:
        if "=" not in word and not word.startswith("~"):
            raise ConfigError(word, "needs a value", fix=f"Say {word}=VALUE")
        try:
            override = OverridesParser.create().parse_override(word)
        except HydraException as error:
            raise refusal_of(error, words) from error
        path, value = override.key_or_group, override.value()
        plain = getattr(override.type, "name", "") == "CHANGE"
        if not plain or override.is_sweep_override():
            rule = "a record's config takes plain values"
            raise ConfigError(path, rule, got=word, fix="Say PATH=VALUE")
        changes[path] = _plain(value)
    return changes


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_plain(child) for child in value]
    return value if isinstance(value, bool | int | float | None) else str(value)
