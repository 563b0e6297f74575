"""Files that are whole or absent, and there to stay once written: neither `kill -9` nor a power cut leaves half of one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

_BEHIND_BYTES = 32 << 20  # written before the disk is asked for the next of it


def write_durably(path: Path, *pieces: bytes | memoryview) -> None:
    """Put a file with these bytes at `path`, in place of one that is there. Raises OSError, and leaves what was there."""
    with durable_file(path) as write:
        for piece in pieces:
            write(piece)


@contextmanager
def durable_file(path: Path) -> Iterator[Callable[[bytes | memoryview], None]]:
    """What appends to a file that is put at `path`, in place of one that is there, when the context ends well.

    Raises OSError, and leaves what was there.
    """
    beside = aside(path)
    try:
        with beside.open("wb", buffering=0) as file:
            yield lambda piece: write_all(file.fileno(), memoryview(piece).cast("B"))
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


class Steadily:
    """A new file at `path` that goes to the disk while it is written, so that little is left to wait for at the end.

    It is there to stay once the context ends well; its name is once its folder is synced. Raises OSError.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        self._behind: ThreadPoolExecutor | None = None  # a small file needs no second thread
        self._syncing: Future[None] | None = None
        self._unsynced = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if self._behind is not None:
                self._behind.shutdown()
            if kind is None:
                self._await_disk()
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)

    def write(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        """Write bytes at a place, of which nothing else is written."""
        left = memoryview(data)
        while left:
            written = os.pwrite(self._descriptor, left, offset)
            left, offset = left[written:], offset + written
            self._unsynced += written
        if self._unsynced > _BEHIND_BYTES and (self._syncing is None or self._syncing.done()):
            self._await_disk()
            self._behind = self._behind or ThreadPoolExecutor(1)
            self._syncing, self._unsynced = self._behind.submit(os.fsync, self._descriptor), 0

    def _await_disk(self) -> None:
        """Raises what the disk said to what was written before: it says so once only."""
        if self._syncing is not None:
            self._syncing.result()


def make_folder_durably(folder: Path) -> None:
    """Make a folder, and those above it, so that their names are there to stay. Raises OSError."""
    if not folder.is_dir():
        make_folder_durably(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def aside(path: Path) -> Path:
    """Where what is to become `path` is written until it is whole."""
    return path.with_name(f".{path.name}.aside")


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` as durable as the files."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Delete what was written aside in `folder` and never became what it was to be."""
    for path in folder.glob(".*.aside"):
        path.unlink(missing_ok=True)


def write_all(descriptor: int, data: memoryview) -> None:
    """Write all of `data` where the file stands. Raises OSError."""
    while data:
        data = data[os.write(descriptor, data) :]
