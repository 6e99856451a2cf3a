# SPDX-License-Identifier: Apache-2.0
"""Files of a recorded run: from its directory, or from an archive of it."""

import json
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from runner.errors import RecordError

__all__ = ["RunFiles", "open_run"]

_LIMIT = 256 * 2**20  # bytes that one file of a record may have
_ANCHOR = "run.json"


@dataclass(frozen=True)
class RunFiles:
    """Reads a run's files by their names; nothing is unpacked to disk."""

    name: str
    _read: Callable[[str], bytes | None]

    def read_json(self, name: str) -> Any:
        """The value of a JSON file.

        Raises:
            RecordError: it is absent or not JSON.
        """
        content = self._read(name)
        if content is None:
            raise RecordError(f"{self.name}: {name} is missing, so damaged.")
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise RecordError(f"{self.name}: {name} is damaged ({error}).") from error


def open_run(path: str) -> RunFiles:
    """Opens a run directory, or a `.zip` or `.tar.gz` of one.

    Raises:
        RecordError: there is no record of a run.
    """
    where = Path(path).expanduser()
    if where.is_dir():
        if not (where / _ANCHOR).is_file():
            raise RecordError(f"{path}: not a run directory, it has no {_ANCHOR}.")
        return RunFiles(path, lambda name: _read_file(where / name))
    if not where.exists():
        raise RecordError(f"{path}: no such run. Give a run directory or an archive.")
    try:
        members = _read_archive(where)
    except (OSError, zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise RecordError(f"{path}: can't be read as an archive ({error}).") from error
    anchors = [PurePosixPath(n) for n in members if PurePosixPath(n).name == _ANCHOR]
    if not anchors:
        raise RecordError(f"{path}: not the archive of a run, it has no {_ANCHOR}.")
    root = min(anchors, key=lambda p: len(p.parts)).parent
    return RunFiles(path, lambda name: members.get(str(root / name)))


def _read_file(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _read_archive(path: Path) -> dict[str, bytes]:
    """The JSON files of an archive; links and larger files are left out."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return {
                str(PurePosixPath(info.filename)): archive.read(info)
                for info in archive.infolist()
                if info.filename.endswith(".json") and info.file_size <= _LIMIT
            }
    with tarfile.open(path, "r:*") as tar:
        found = {}
        for member in tar:
            if member.isfile() and member.name.endswith(".json"):
                stream = tar.extractfile(member)
                if stream is not None and member.size <= _LIMIT:
                    found[str(PurePosixPath(member.name))] = stream.read()
        return found
