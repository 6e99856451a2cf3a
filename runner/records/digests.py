# SPDX-License-Identifier: Apache-2.0
"""SHA-256 over values, bit by bit."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from runner.records.files import canonical_json

__all__ = [
    "digest_config",
    "digest_file",
    "digest_leaves",
    "digest_manifest",
    "digest_plain",
    "digest_stream",
]


def digest_plain(value: Any) -> str:
    """SHA-256 hex of plain data, over its canonical JSON; the order of keys is none."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def digest_config(config: Any) -> str:
    """SHA-256 hex of a config, whose order counts: streams that split, `per`."""
    return digest_plain(_as_pairs(config))


def _as_pairs(value: Any) -> Any:
    if isinstance(value, Mapping):
        return [[str(key), _as_pairs(child)] for key, child in value.items()]
    return list(map(_as_pairs, value)) if isinstance(value, list | tuple) else value


def digest_manifest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 hex of all of `run.json` but its `digest`, where this stands."""
    return digest_plain({k: v for k, v in manifest.items() if k != "digest"})


def digest_leaves(leaves: dict[str, np.ndarray]) -> str:
    """SHA-256 hex of named arrays: names in order, each with dtype, shape, bytes."""
    digest = hashlib.sha256()
    for name in sorted(leaves):
        leaf = np.asarray(leaves[name])
        head = canonical_json([name, leaf.dtype.str, list(leaf.shape)])
        digest.update(head.encode() + b"\n")
        digest.update(leaf.tobytes())
    return digest.hexdigest()


def digest_file(path: Path) -> str:
    """SHA-256 hex of a file's bytes."""
    with path.open("rb") as stream:
        return digest_stream(stream)


def digest_stream(stream: IO[bytes]) -> str:
    """SHA-256 hex of what is left of a stream."""
    digest = hashlib.sha256()
    while block := stream.read(2**20):
        digest.update(block)
    return digest.hexdigest()
