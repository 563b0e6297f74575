"""A transfer on its way into a file: written and hashed in a thread while the next pieces come in."""

from __future__ import annotations

import asyncio
import hashlib
import os
from contextlib import suppress
from pathlib import Path

from choral.errors import CorruptTransfer, Unreachable

_BATCH_BYTES = 1 << 21  # so much may wait while as much is being written
_READ_BYTES = 1 << 20
_WORTH_A_THREAD_BYTES = 1 << 16


class Arrival:
    """Takes the pieces of a transfer into the file at `path`, behind the first `begin` bytes of it, which earlier attempts left.

    Raises CorruptTransfer: the file has fewer; OSError: it cannot be written.
    """

    def __init__(self, path: Path, begin: int) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        held = os.fstat(self._descriptor).st_size
        if not 0 <= begin <= held:
            os.close(self._descriptor)
            raise CorruptTransfer(f"the transfer begins at byte {begin}, but only {held} bytes are here: ask where to begin")
        if (
            begin < held
        ):  # ext4 takes any truncation to nothing for the beginning of a replacement, and flushes the file when it is closed
            os.ftruncate(self._descriptor, begin)
        self._begin = begin
        self._hash = hashlib.sha256()
        self._hashed = 0
        self._batch: list[bytes] = []
        self._batch_bytes = 0
        self._writing: asyncio.Future[None] | None = None
        self._over = False  # nothing more is taken
        self._broken = False  # a batch was not written, and the next would take its place
        self._closed = False

    async def add(self, piece: bytes) -> None:
        """Take the next piece. Raises Unreachable: another attempt took over; OSError: it cannot be written."""
        self._must_go_on()
        self._batch.append(piece)
        self._batch_bytes += len(piece)
        if self._writing is not None and (self._writing.done() or self._batch_bytes >= _BATCH_BYTES):
            await self._written()
            self._must_go_on()
        if self._writing is None:
            self._write_on()

    async def whole(self) -> tuple[int, bytes]:
        """How many bytes the file has now that all have come, and their SHA-256. Raises as `add`."""
        await self._written()
        self._must_go_on()
        self._write_on()
        await self._written()
        self._must_go_on()
        return self._hashed, self._hash.digest()

    async def give_way(self) -> None:
        """Another attempt takes over from here: what has come is written, and nothing more once this returns."""
        self._over = True
        if self._writing is not None:
            await asyncio.wait([self._writing])
        self._flush()

    async def close(self) -> None:
        """Write what has come, for the next attempt."""
        self._over = True
        if self._writing is not None:
            try:
                await asyncio.wait([self._writing])
            except asyncio.CancelledError:
                self._closed = True
                self._writing.add_done_callback(lambda done: os.close(self._descriptor))  # not before, or it wrote elsewhere
                raise
        self._flush()
        if not self._closed:
            self._closed = True
            os.close(self._descriptor)

    def _flush(self) -> None:
        """Write what waits, if that has not been done: of the attempt and of the one that takes over, either may be the first."""
        if self._broken or self._closed:
            return
        batch, self._batch, self._batch_bytes = self._batch, [], 0
        with suppress(OSError):
            self._write(batch)

    def _must_go_on(self) -> None:
        if self._over:
            raise Unreachable("another attempt to send this result took over")

    def _write_on(self) -> None:
        batch, size = self._batch, self._batch_bytes
        self._batch, self._batch_bytes = [], 0
        if size + max(0, self._begin - self._hashed) < _WORTH_A_THREAD_BYTES:
            self._write(batch)
        else:
            self._writing = asyncio.ensure_future(asyncio.to_thread(self._write, batch))

    async def _written(self) -> None:
        """Wait for the batch that is being written."""
        if self._writing is not None:
            writing = self._writing
            await asyncio.shield(writing)
            self._writing = None

    def _write(self, batch: list[bytes]) -> None:
        while self._hashed < self._begin:
            self._count(os.pread(self._descriptor, min(_READ_BYTES, self._begin - self._hashed), self._hashed))
        try:
            for piece in batch:
                _write_at(self._descriptor, piece, self._hashed)
                self._count(piece)
        except OSError:
            self._over = self._broken = True
            raise

    def _count(self, piece: bytes) -> None:
        self._hash.update(piece)
        self._hashed += len(piece)


def _write_at(descriptor: int, piece: bytes, offset: int) -> None:
    rest = memoryview(piece)
    while rest:
        written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written
