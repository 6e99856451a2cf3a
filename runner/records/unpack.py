# SPDX-License-Identifier: Apache-2.0
"""The record in an archive, as files of a directory: what verbs read, no more."""

import re
import shutil
from pathlib import Path

from runner.errors import RecordError
from runner.records.reading import RunFiles

__all__ = ["unpack"]

_BLOCK = 2**20  # bytes
_NAMES = re.compile(
    r"run\.json|config\.yaml|(metrics|states)\.jsonl|outputs\.npz|keys/ledger\.json"
    r"|(config\.yaml|keys/ledger\.json)\.next|checkpoints/\d+(\.json|/[\w./-]+)"
)


def unpack(files: RunFiles, directory: Path) -> None:
    """Copies the files of a record, `run.json` last; links and devices are none.

    Args:
        files: An archive; no name in it leads out of it.
        directory: Where to; exists, and is ours alone.

    Raises:
        RecordError: a file can't be read or written.
    """
    names = sorted(n for n in files.names if _NAMES.fullmatch(n) and n != "run.json")
    for name in (*names, "run.json"):
        target = directory / name
        with files.open(name) as source:
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("xb") as stream:
                    shutil.copyfileobj(source, stream, _BLOCK)
            except OSError as error:
                why = error.strerror or str(error)
                raise RecordError(f"{target}: can't be written ({why}).") from error
