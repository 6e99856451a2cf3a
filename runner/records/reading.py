# SPDX-License-Identifier: Apache-2.0
"""Files of a recorded run: from its directory, or from an archive of it."""

import bz2
import gzip
import lzma
import os
import struct
import tarfile
import tempfile
import weakref
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from runner.errors import RecordError
from runner.records.plain import read_plain_json

__all__ = ["RunFiles", "open_run"]

_MOST = 4 * 2**30  # bytes of a file that is read as a whole: metrics of a long run
_MOST_PLAIN = 64 * 2**20  # of one that is JSON or YAML
_BLOCK = 2**20
_MOST_FILES = 100_000
_MOST_UNPACKED = 16 * 2**30  # bytes of an archive, all files together
_MOST_RATIO = 200  # by which an archive of more than this may be packed:
_FREE_RATIO = 256 * 2**20
_ANCHOR = "run.json"


@dataclass(frozen=True)
class RunFiles:
    """Reads a run's files by their names; nothing is unpacked to disk.

    Args:
        name: What the user called the run.
        directory: The run directory; None for an archive.
        names: Names of all regular files, as `keys/ledger.json`.
    """

    name: str
    directory: Path | None
    names: frozenset[str]
    _open: Callable[[str], AbstractContextManager[IO[bytes]]]

    def read(self, name: str, *, most: int | None = None) -> bytes | None:
        """A file's bytes; None where there is no such file.

        Args:
            name: The file.
            most: Bytes that it may have.

        Raises:
            RecordError: it can't be read, or is too large for a file of a record.
        """
        if name not in self.names:
            return None
        most, content = most or _MOST, bytearray()
        with self.open(name) as stream:
            while len(content) <= most and (block := stream.read(_BLOCK)):
                content += block  # the size that an archive tells may be a lie
        if len(content) > most:
            what = f"{name} can't be read (larger than {most >> 20:,} MiB)"
            raise RecordError(f"{self.name}: {what}.")
        return bytes(content)

    def read_json(self, name: str) -> Any:
        """The value of a JSON file.

        Raises:
            RecordError: it is absent or not JSON.
        """
        content = self.read_plain(name)
        if content is None:
            raise RecordError(f"{self.name}: {name} is missing, so damaged.")
        return read_plain_json(content, name=f"{self.name}: {name}")

    def read_plain(self, name: str) -> bytes | None:
        """The bytes of a JSON or YAML file, which is never a large one."""
        return self.read(name, most=_MOST_PLAIN)

    @contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """A file as a stream; what fails while it is read is a `RecordError`, too."""
        try:
            with self._open(name) as stream:
                yield stream
        except _DAMAGED as error:
            what = f"{name} can't be read ({_first_line(error)})"
            raise RecordError(f"{self.name}: {what}.") from error


def open_run(path: str) -> RunFiles:
    """Opens a run directory, or a `.zip` or `.tar.gz` of one.

    Raises:
        RecordError: there is no record of a run.
    """
    try:
        where = Path(path).expanduser()
        if where.is_dir():
            return _open_directory(path, where)
        if not where.is_file():  # a pipe might never end
            what = "neither a directory nor a file" if where.exists() else "no such run"
            raise RecordError(f"{path}: {what}. Give a run directory or an archive.")
    except (OSError, RuntimeError, ValueError) as error:  # no such user, a NUL, ...
        raise RecordError(f"{path}: no such run ({_first_line(error)}).") from error
    return _open_archive(path, where)


def _open_directory(path: str, where: Path) -> RunFiles:
    if not (where / _ANCHOR).is_file():
        raise RecordError(f"{path}: not a run directory, it has no {_ANCHOR}.")
    names = set()
    for folder, _, files in os.walk(where):
        inner = Path(folder).relative_to(where)
        names |= {(inner / file).as_posix() for file in files}
        if len(names) > _MOST_FILES:
            raise RecordError(f"{path}: more than {_MOST_FILES:,} files.")
    regular = frozenset(name for name in names if (where / name).is_file())
    return RunFiles(path, where, regular, lambda name: (where / name).open("rb"))


def _open_archive(path: str, where: Path) -> RunFiles:
    try:
        kind = _zip_members if zipfile.is_zipfile(where) else _tar_members
        members, open_member = kind(where)
    except _DAMAGED as error:
        raise RecordError(f"{path}: not an archive ({_first_line(error)}).") from error
    names = {PurePosixPath(name): name for name in members}
    for name in names:
        if name.is_absolute() or ".." in name.parts or "\0" in str(name):
            what = f"a path that leads out of it ({str(name)!r})"
            raise RecordError(f"{path}: not the archive of a run, it has {what}.")
    anchors = [name for name in names if name.name == _ANCHOR]
    if not anchors:
        raise RecordError(f"{path}: not the archive of a run, it has no {_ANCHOR}.")
    root = min(anchors, key=lambda name: (len(name.parts), name)).parent
    inner = {
        name.relative_to(root).as_posix(): member
        for name, member in names.items()
        if name.is_relative_to(root)
    }
    return RunFiles(path, None, frozenset(inner), lambda name: open_member(inner[name]))


_Open = Callable[[str], AbstractContextManager[IO[bytes]]]
_Members = tuple[list[str], _Open]


def _zip_members(where: Path) -> _Members:
    """Members of a zip; each is opened when it is asked for."""
    archive = zipfile.ZipFile(where)
    infos = [info for info in archive.infolist() if not info.is_dir()]
    _check_size(where, unpacked=sum(i.file_size for i in infos), files=len(infos))

    @contextmanager
    def open_member(name: str) -> Iterator[IO[bytes]]:
        with archive.open(name) as stream:
            yield stream

    weakref.finalize(open_member, archive.close)
    return [info.filename for info in infos], open_member


def _tar_members(where: Path) -> _Members:
    """Members of a tar; links and devices are none."""
    plain = _unpack(where)
    try:
        members = _regular_members(where, plain)
    except BaseException:
        plain.close()
        raise

    @contextmanager
    def open_member(name: str) -> Iterator[IO[bytes]]:
        plain.seek(0)
        with tarfile.open(fileobj=plain, mode="r:") as archive:
            stream = archive.extractfile(members[name])
            assert stream is not None  # a regular file
            with stream:
                yield stream

    weakref.finalize(open_member, plain.close)
    return list(members), open_member


_PACKED: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}


def _unpack(where: Path) -> IO[bytes]:
    """The tar without its packing, in a file without a name: there, a member can be
    reached without reading all that come before it."""
    plain: IO[bytes] = where.open("rb")
    head = plain.read(max(map(len, _PACKED)))
    opens = next((o for magic, o in _PACKED.items() if head.startswith(magic)), None)
    if opens is None:
        return plain
    plain.close()
    plain, size = tempfile.TemporaryFile(), 0  # noqa: SIM115 - closed with its reader
    try:
        with opens(where) as packed:
            while block := packed.read(_BLOCK):
                size += plain.write(block)
                _check_size(where, unpacked=size)
    except BaseException:
        plain.close()
        raise
    return plain


class _Headers:
    """What `tarfile` lists a file's members from: no header of one is that long."""

    def __init__(self, file: IO[bytes]) -> None:
        self.seek, self.tell, self._file = file.seek, file.tell, file

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _BLOCK:
            raise ValueError("a header in it is damaged")
        return self._file.read(size)


def _regular_members(where: Path, plain: IO[bytes]) -> dict[str, tarfile.TarInfo]:
    plain.seek(0)
    headers: Any = _Headers(plain)
    members, unpacked = {}, 0
    with tarfile.open(fileobj=headers, mode="r:") as archive:
        for number, member in enumerate(archive, start=1):
            unpacked += max(member.size, 0)
            _check_size(where, unpacked=unpacked, files=number)
            if member.isfile():
                members[member.name] = member
    return members


def _check_size(where: Path, *, unpacked: int, files: int = 0) -> None:
    """Refuses what would fill a memory or a disk, or take forever."""
    packed = where.stat().st_size
    if files > _MOST_FILES:
        raise RecordError(f"{where}: more than {_MOST_FILES:,} files.")
    if unpacked > _MOST_UNPACKED:
        what = f"holds more than {_MOST_UNPACKED >> 30} GiB"
        raise RecordError(f"{where}: {what}. Unpack it, and give the directory.")
    if unpacked > _FREE_RATIO and unpacked > _MOST_RATIO * packed:
        what = f"holds more than {_MOST_RATIO} times its own size"
        raise RecordError(f"{where}: {what}: not the archive of a run.")


_DAMAGED = (
    OSError,
    EOFError,
    LookupError,
    OverflowError,
    RuntimeError,  # an encrypted zip; NotImplementedError is one, too
    ValueError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    tarfile.TarError,
)


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].rstrip(":") or type(error).__name__
