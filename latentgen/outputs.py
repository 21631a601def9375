"""Whether a file or folder can be written, known before time is spent on what goes into it; names
for pictures; and files that are there whole or not at all."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from .errors import InvalidRequest

__all__ = ["check_file", "check_folder", "in_name", "write_file"]


def check_file(path: Path, field: str = "output") -> None:
    """Refuse a file that cannot be written; nothing is left behind.

    Raises:
        InvalidRequest: it is a folder, its folder is missing, or writing is not allowed.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder; add a file name")
        if path.exists():
            path.open("ab").close()
        else:
            tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise _refused(path, field, error) from error


def check_folder(path: Path, field: str = "output") -> None:
    """Refuse a folder that cannot be made or written into; nothing is left behind.

    Raises:
        InvalidRequest: it or one above it is a file, or writing is not allowed.
    """
    try:
        there = path.absolute()
        while not there.exists():
            there = there.parent
        if not there.is_dir():
            raise NotADirectoryError(f"{there} is a file; name a folder")
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise _refused(path, field, error) from error


def write_file(file: Path, data: bytes) -> None:
    """Write a file, and its folder if need be; it is on the disk when this returns, and whoever
    looks sees all of it or nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    except BaseException:  # on a full disk, above all
        partial.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        folder = os.open(file.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def in_name(text: str) -> str:
    """The words of a prompt as a part of a file's name."""
    return re.sub(r"[\W_]+", "-", text.lower()).strip("-")[:40].strip("-") or "picture"


def _refused(path: Path, field: str, error: OSError) -> InvalidRequest:
    reason = error.strerror or str(error)
    return InvalidRequest(field, str(path), f"cannot be written ({reason})")
