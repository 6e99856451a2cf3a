# SPDX-License-Identifier: Apache-2.0
"""Plain data from files that may come from strangers: nothing in them is run.

    plain = null | bool | int | finite float | str | [plain, ...] | {str: plain, ...}

YAML without tags, anchors, aliases or merges, JSON without NaN; both bounded in
size and depth. A string with an interpolation in it stays that string.
"""

import json
import math
from collections.abc import Iterator
from typing import Any, NoReturn

import yaml

from runner.errors import RecordError

__all__ = ["read_plain_json", "read_plain_yaml"]

_YAML_LIMIT = 4 * 2**20  # bytes
_JSON_LIMIT = 64 * 2**20
_DEPTH = 64
_BITS = 256  # of an integer; the longest that a record has are seeds of 128


def read_plain_yaml(content: bytes, *, name: str) -> Any:
    """The value of a YAML document.

    Args:
        content: The file's bytes.
        name: What to call it in messages.

    Raises:
        RecordError: it is too large, too deep, damaged, or more than plain data.
    """
    if len(content) > _YAML_LIMIT:
        raise RecordError(f"{name}: larger than {_YAML_LIMIT >> 20} MiB.")
    try:
        text = content.decode()
        for what in _not_plain(text):
            raise RecordError(f"{name}: must be plain data (got {what}).")
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        raise RecordError(f"{name}: damaged ({_one_line(error)}).") from error
    for what in _odd_values(value):
        raise RecordError(f"{name}: must be plain data (got {what}).")
    return value


class _Loader(yaml.CSafeLoader):
    """A safe loader to which a key that stands twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        pairs = [(self.construct_object(key, deep=True), 0) for key, _ in node.value]
        _unique(pairs)
        return super().construct_mapping(node, deep=deep)


def _not_plain(text: str) -> Iterator[str]:
    """Yields what a safe loader would still act upon; nothing is built for it."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.CSafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _DEPTH:
            yield f"a depth above {_DEPTH}"
        if isinstance(event, yaml.AliasEvent):
            yield f"the alias *{event.anchor}"
        elif isinstance(event, yaml.NodeEvent) and event.anchor is not None:
            yield f"the anchor &{event.anchor}"
        tag = getattr(event, "tag", None)
        if tag is not None:
            yield f"the tag {tag}"
        if isinstance(event, yaml.ScalarEvent) and event.value == "<<":
            yield "a merge <<"


def read_plain_json(content: bytes, *, name: str) -> Any:
    """The value of a JSON document.

    Raises:
        RecordError: it is too large, too deep, damaged, or has NaN in it.
    """
    if len(content) > _JSON_LIMIT:
        raise RecordError(f"{name}: larger than {_JSON_LIMIT >> 20} MiB.")
    try:
        value = json.loads(content, parse_constant=_refuse, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{name} is damaged ({_one_line(error)}).") from error
    for what in _odd_values(value):
        raise RecordError(f"{name} is damaged (it has {what}).")
    return value


def _odd_values(value: Any) -> Iterator[str]:
    """Yields what JSON can't write again: dates of YAML, 1e999, ..."""
    pending = [(value, 1)]
    while pending:
        each, depth = pending.pop()
        if depth > _DEPTH:
            yield f"a depth above {_DEPTH}"
        elif isinstance(each, dict):
            yield from (f"the key {key!r}" for key in each if not _is_name(key))
            pending.extend((child, depth + 1) for child in each.values())
        elif isinstance(each, list):
            pending.extend((child, depth + 1) for child in each)
        elif isinstance(each, int) and each.bit_length() > _BITS:
            yield f"an integer of more than {_BITS} bits"
        elif isinstance(each, float) and not math.isfinite(each):
            yield f"{each}, which is not finite"
        elif isinstance(each, str) and not _is_text(each):
            yield "half a character"
        elif not isinstance(each, bool | int | float | str | None):
            yield f"a {type(each).__name__}"


def _is_name(key: Any) -> bool:
    if isinstance(key, str):
        return _is_text(key)
    return isinstance(key, int) and key.bit_length() <= _BITS


def _is_text(value: str) -> bool:
    """Whether it can be written: JSON's escapes can spell half of a pair."""
    return value.isascii() or value == value.encode(errors="replace").decode()


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
