# SPDX-License-Identifier: Apache-2.0
"""Closes the record of a run whose process is gone."""

import datetime
import json
from collections.abc import Mapping
from pathlib import Path

from runner.records.digests import digest_file, digest_manifest
from runner.records.files import write_atomically

__all__ = ["close_record"]


def close_record(directory: Path, reason: str, *, files: Mapping[str, str]) -> None:
    """Says in `run.json` that a run has failed; does nothing where it has ended.

    A line that was not written to its end is cut off.

    Args:
        directory: The run's, whose writer has ended.
        reason: Why, in one line.
        files: Names of the files of lines, by the names of their digests.

    Raises:
        OSError: it can't be read or written.
    """
    path = directory / "run.json"
    manifest = json.loads(path.read_text()) if path.exists() else {}
    if manifest.get("status") != "running":
        return
    steps = manifest["steps"]
    for part, name in files.items():
        file = directory / name
        if not file.exists():
            continue
        whole = file.read_bytes()
        whole = whole[: whole.rfind(b"\n") + 1]
        with file.open("r+b") as opened:
            opened.truncate(len(whole))
        manifest["digests"][part] = digest_file(file)
        if part == "metrics":
            rows = map(json.loads, whole.splitlines())
            steps = max(
                (r["step"] + 1 for r in rows if r["phase"] == "train"), default=0
            )
    ended = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    manifest |= {"status": "failed", "reason": reason, "ended": ended, "steps": steps}
    manifest["digest"] = digest_manifest(manifest)
    write_atomically(path, json.dumps(manifest, indent=2, allow_nan=False) + "\n")
