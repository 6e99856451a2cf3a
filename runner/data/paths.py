# SPDX-License-Identifier: Apache-2.0
"""From a path in the config to bytes, with an error for each way to fail."""

import gzip
import os
import stat
import zlib
from pathlib import Path
from typing import BinaryIO

from runner.errors import DataError, did_you_mean

__all__ = ["find_directory", "find_file", "open_file", "read_bytes"]

_GZIP = b"\x1f\x8b"


def find_file(text: str, *, path: str) -> Path:
    """An existing file; `~` is the home, a relative path starts where we stand.

    Args:
        text: As the config has it.
        path: Config leaf that errors name.

    Raises:
        DataError: absent, out of reach, or not a file.
    """
    found = Path(os.path.abspath(os.path.expanduser(text)))
    mode = _mode(found, text=text, path=path, kind="file", fix=None)
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "a special file"
        raise DataError(path, f"must be a file, and is {kind}", got=text)
    return found


def find_directory(text: str, *, path: str, fix: str) -> Path:
    """An existing directory; arguments as `find_file`, and what to do without."""
    found = Path(os.path.abspath(os.path.expanduser(text)))
    mode = _mode(found, text=text, path=path, kind="directory", fix=fix)
    if not stat.S_ISDIR(mode):
        raise DataError(
            path,
            "must be a directory, and is a file",
            got=text,
            fix=f"Set {path}={found.parent}",
        )
    return found


def open_file(file: Path, *, path: str) -> BinaryIO:
    """Opens a file to read bytes from.

    Raises:
        DataError: it can't be opened; the message says why.
    """
    try:
        return file.open("rb")
    except OSError as error:
        raise _unreadable(path, file, error) from error


def read_bytes(file: Path, *, path: str) -> bytes:
    """A whole file; what is gzipped, by its first bytes, is unpacked.

    Raises:
        DataError: unreadable, or gzip data that is truncated or damaged.
    """
    with open_file(file, path=path) as stream:
        try:
            data = stream.read()
        except OSError as error:
            raise _unreadable(path, file, error) from error
    if not data.startswith(_GZIP):
        return data
    try:
        return gzip.decompress(data)
    except (EOFError, OSError, zlib.error) as error:
        ends = isinstance(error, EOFError)
        raise DataError(
            path,
            f"{file.name} {'ends within' if ends else 'holds damaged'} gzip data",
            got=str(file),
            fix="Fetch the file again",
        ) from error


def _mode(found: Path, *, text: str, path: str, kind: str, fix: str | None) -> int:
    try:
        return found.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise DataError(
            path,
            f"no such {kind}",
            got=text,
            allowed=f"Looked for {found}",
            fix=fix or _near(found),
        ) from error
    except OSError as error:
        raise _unreadable(path, found, error) from error


def _near(found: Path) -> str | None:
    try:
        return did_you_mean(found.name, os.listdir(found.parent))
    except (OSError, ValueError):
        return None


def _unreadable(path: str, file: Path, error: OSError) -> DataError:
    return DataError(path, f"can't be read: {error.strerror or error}", got=str(file))
