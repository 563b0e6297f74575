"""Files that are whole or absent, and there to stay once written: neither `kill -9` nor a power cut leaves half of one."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def write_durably(path: Path, *pieces: bytes | memoryview) -> None:
    """Put a file with these bytes at `path`, in place of one that is there. Raises OSError, and leaves what was there."""
    aside = path.with_name(f".{path.name}.aside")
    try:
        with aside.open("wb", buffering=0) as file:
            for piece in pieces:
                write_all(file.fileno(), memoryview(piece))
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` as durable as the files."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Delete what an interrupted `write_durably` left in `folder`."""
    for path in folder.glob(".*.aside"):
        path.unlink(missing_ok=True)


def write_all(descriptor: int, data: memoryview) -> None:
    """Write all of `data` where the file stands. Raises OSError."""
    while data:
        data = data[os.write(descriptor, data) :]
