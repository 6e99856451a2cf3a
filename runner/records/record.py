# SPDX-License-Identifier: Apache-2.0
"""A recorded run, read back: every file of it checked against its digest.

`run.json` holds the digests of the other files and one of itself, so a byte that
was changed anywhere in what is read here is found, and its file named.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from runner.errors import AlteredRecordError, RecordError
from runner.records.digests import digest_config, digest_manifest, digest_plain
from runner.records.metrics import parse_lines
from runner.records.plain import read_plain_json, read_plain_yaml
from runner.records.reading import RunFiles, open_run
from runner.records.shapes import LEDGER, MANIFEST, check_shape

__all__ = ["NEXT", "SCHEMA", "Record", "kind_of_row", "read_record"]

NEXT = ".next"  # ends the name of a file that is about to replace another
SCHEMA = 1
_MOST_STEPS = 2**31


@dataclass(frozen=True)
class Record:
    """What a run left behind, as plain data.

    Args:
        files: Where it is read from.
        manifest: `run.json`.
        config: `config.yaml`.
        ledger: `keys/ledger.json`.
    """

    files: RunFiles
    manifest: Mapping[str, Any]
    config: Mapping[str, Any]
    ledger: Mapping[str, Any]

    @property
    def name(self) -> str:
        """What the user called it."""
        return self.files.name

    @property
    def digests(self) -> Mapping[str, str | None]:
        """SHA-256 hex of its parts, by name; None of what was never finished."""
        digests: Mapping[str, str | None] = self.manifest["digests"]
        return digests

    @cached_property
    def metrics(self) -> tuple[Mapping[str, Any], ...]:
        """The rows of `metrics.jsonl`; none where there is no such file.

        Raises:
            RecordError: the file is not the one that was written.
        """
        return self._lines("metrics")

    @cached_property
    def states(self) -> tuple[Mapping[str, Any], ...]:
        """The rows of `states.jsonl`; raises as `metrics` does."""
        return self._lines("states")

    @property
    def trained(self) -> int:
        """Steps whose metrics are recorded."""
        rows = (row["step"] for row in self.metrics if row["phase"] == "train")
        return 1 + max(rows, default=-1)

    def check_file(self, part: str, name: str) -> bytes | None:
        """A file's bytes; None where there is none and none was recorded.

        Raises:
            RecordError: the file is not the one that was written.
        """
        content, digest = self.files.read(name), self.digests.get(part)
        if content is None and digest is not None:
            raise _altered(self.name, name, "is missing")
        if content is None:
            return None
        if digest is None:  # of a run that was killed: no digest yet
            if self.manifest["status"] != "running":
                raise _altered(self.name, name, "was added")
            return content
        if hashlib.sha256(content).hexdigest() != digest:
            raise _altered(self.name, name)
        return content

    def _lines(self, part: str) -> tuple[Mapping[str, Any], ...]:
        name = f"{part}.jsonl"
        content = self.check_file(part, name)
        if content is None:
            return ()
        rows = parse_lines(content, name=f"{self.name}: {name}")
        last = {"train": -1, "eval": -1, "state": -1}  # steps; train leaves none out
        for number, row in enumerate(rows, start=1):
            kind = kind_of_row(row, part)
            gap = 1 if kind == "train" else _MOST_STEPS
            if kind is None or not 0 < row["step"] - last[kind] <= gap:
                what = f"line {number} is damaged, or is not where it belongs"
                raise RecordError(f"{self.name}: {name}: {what}.")
            last[kind] = row["step"]
        return tuple(rows)


def kind_of_row(row: Mapping[str, Any], part: str) -> str | None:
    """`train`, `eval` or `state`; None where a field is not what it should be."""
    if type(row.get("step")) is not int:
        return None
    if part == "states":
        texts = (row.get("batches"), row.get("state"))
        return "state" if all(type(text) is str for text in texts) else None
    phase = row.get("phase")
    values = (v for k, v in row.items() if k not in ("phase", "step"))
    if all(v is None or (type(v) is float and math.isfinite(v)) for v in values):
        return phase if phase in ("train", "eval") else None
    return None


def read_record(path: str) -> Record:
    """Reads a run directory or an archive of one, and checks what it reads.

    Raises:
        RecordError: there is none, or a file is missing, altered or damaged.
    """
    files = open_run(path)
    manifest = _read_manifest(files)
    digests = manifest["digests"]
    ledger = _read_settled(
        files,
        "keys/ledger.json",
        read=read_plain_json,
        digest=lambda value: digest_plain(value) == digests["keys"],
        shape=LEDGER,
    )
    config = _read_settled(
        files,
        "config.yaml",
        read=read_plain_yaml,
        digest=lambda value: digest_config(value) == digests["config"],
    )
    return Record(files, manifest, config, ledger)


def _read_settled(
    files: RunFiles,
    name: str,
    *,
    read: Callable[..., Any],
    digest: Callable[[Any], bool],
    shape: Any = None,
) -> dict[str, Any]:
    """A file that the manifest names by its digest, renamed already or not yet."""
    for there in (name, name + NEXT):
        content = files.read_plain(there)
        if content is None:
            continue
        value = read(content, name=f"{files.name}: {there}")
        if isinstance(value, dict) and digest(value):
            if shape is not None:
                check_shape(value, shape, name=f"{files.name}: {there}")
            return value
    what = None if name in files.names else "is missing"
    raise _altered(files.name, name, what)


def _read_manifest(files: RunFiles) -> dict[str, Any]:
    manifest = files.read_json("run.json")
    where = f"{files.name}: run.json"
    check_shape(manifest, {"schema": int}, name=where)
    if manifest["schema"] != SCHEMA:
        what = f"schema {manifest['schema']}, this runner reads {SCHEMA}"
        raise RecordError(
            f"{where}: another runner's ({what}). Use that one's version."
        )
    if manifest.get("digest") != digest_manifest(manifest):
        raise _altered(files.name, "run.json")
    check_shape(manifest, MANIFEST, name=where)
    return dict(manifest)


def _altered(run: str, file: str, what: str | None = None) -> AlteredRecordError:
    what = what or "is not the file that was recorded"
    return AlteredRecordError(f"{run}: {file} {what}. It was altered or damaged.")
