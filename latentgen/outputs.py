"""Whether a file or folder can be written, known before time is spent on what goes into it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from .errors import InvalidRequest

__all__ = ["check_file", "check_folder"]


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


def _refused(path: Path, field: str, error: OSError) -> InvalidRequest:
    reason = error.strerror or str(error)
    return InvalidRequest(field, str(path), f"cannot be written ({reason})")
