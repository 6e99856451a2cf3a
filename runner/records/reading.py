# SPDX-License-Identifier: Apache-2.0
"""Files of a recorded run: from its directory, or from an archive of it."""

import json
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

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
    kind = _Zip if zipfile.is_zipfile(where) else _Tar
    try:
        names = [PurePosixPath(name) for name in kind.names(where)]
    except _DAMAGED as error:
        raise RecordError(f"{path}: not an archive ({_first_line(error)}).") from error
    anchors = [name for name in names if name.name == _ANCHOR]
    if not anchors:
        raise RecordError(f"{path}: not the archive of a run, it has no {_ANCHOR}.")
    root = min(anchors, key=lambda name: len(name.parts)).parent

    def read(name: str) -> bytes | None:
        try:
            return kind.read(where, root / name)
        except _DAMAGED as error:
            what = f"{name} can't be read ({_first_line(error)})"
            raise RecordError(f"{path}: {what}.") from error

    return RunFiles(path, read)


_DAMAGED = (
    OSError,
    EOFError,
    RuntimeError,  # an encrypted zip; NotImplementedError is one, too
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    tarfile.TarError,
)


class _Zip:
    """Members of a zip, each read when it is asked for."""

    @staticmethod
    def names(path: Path) -> list[str]:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()

    @staticmethod
    def read(path: Path, name: PurePosixPath) -> bytes | None:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if PurePosixPath(info.filename) == name:
                    return _limited(archive.open(info), size=info.file_size)
        return None


class _Tar:
    """Members of a tar; links and devices are none."""

    @staticmethod
    def names(path: Path) -> list[str]:
        with tarfile.open(path, "r:*") as archive:
            return [member.name for member in archive if member.isfile()]

    @staticmethod
    def read(path: Path, name: PurePosixPath) -> bytes | None:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                if member.isfile() and PurePosixPath(member.name) == name:
                    stream = archive.extractfile(member)
                    if stream is not None:
                        return _limited(stream, size=member.size)
        return None


def _limited(stream: IO[bytes], *, size: int) -> bytes:
    with stream:
        content = stream.read(min(size, _LIMIT) + 1)  # the size may be a lie
    if len(content) > _LIMIT:
        raise ValueError(f"larger than {_LIMIT >> 20} MiB")
    return content


def _read_file(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].rstrip(":") or type(error).__name__
