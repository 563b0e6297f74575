"""Checkpoint files as they go out: each piece is read and encoded once for all who fetch it at about the same time."""

from __future__ import annotations

import asyncio
import os
from collections import OrderedDict
from typing import BinaryIO

from choral import wire

_KEPT_BYTES = 32 << 20


class Frames:
    """Encoded pieces of files that do not change, the last ones that were asked for."""

    def __init__(self, kept_bytes: int = _KEPT_BYTES) -> None:
        self._most = max(2, kept_bytes // wire.CHUNK_BYTES)
        self._kept: OrderedDict[tuple[int, int, int], asyncio.Future[bytes]] = OrderedDict()

    async def frame(self, file: BinaryIO, offset: int) -> bytes:
        """The DownloadResponse with the piece of an open file that begins at byte `offset`. Raises OSError."""
        wanted = self._frame(file, offset)
        if offset + wire.CHUNK_BYTES < os.fstat(file.fileno()).st_size:
            self._frame(file, offset + wire.CHUNK_BYTES)  # read while this one is sent
        return await asyncio.shield(wanted)

    def _frame(self, file: BinaryIO, offset: int) -> asyncio.Future[bytes]:
        status = os.fstat(file.fileno())
        key = status.st_ino, status.st_mtime_ns, offset
        if key not in self._kept:
            reading = asyncio.ensure_future(asyncio.to_thread(_read, os.dup(file.fileno()), offset))
            reading.add_done_callback(lambda done: self._forget_failure(key, done))
            self._kept[key] = reading
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def _forget_failure(self, key: tuple[int, int, int], reading: asyncio.Future[bytes]) -> None:
        if reading.cancelled() or reading.exception() is not None:
            self._kept.pop(key, None)


def _read(descriptor: int, offset: int) -> bytes:
    try:
        return wire.download_frame(os.pread(descriptor, wire.CHUNK_BYTES, offset), offset)
    finally:
        os.close(descriptor)
