"""The pieces of a checkpoint file, encoded once for all who ask."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from choral import wire
from choral_server import frames
from choral_server.frames import Frames

CONTENT = os.urandom(3 * wire.CHUNK_BYTES + 7)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "version"
    path.write_bytes(CONTENT)
    return path


async def fetched(pieces: Frames, path: Path, begin: int = 0) -> bytes:
    content = b""
    with path.open("rb") as file:
        for offset in range(begin, len(CONTENT), wire.CHUNK_BYTES):
            piece = wire.read_download(await pieces.frame(file, offset))
            content += wire.verified(piece, offset, len(CONTENT))
    return content


async def test_a_file_is_read_once_for_all(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    original = frames._read
    monkeypatch.setattr(frames, "_read", lambda descriptor, offset: (read.append(offset), original(descriptor, offset))[1])
    pieces = Frames()
    assert await asyncio.gather(*(fetched(pieces, path) for _ in range(5))) == [CONTENT] * 5
    assert sorted(read) == list(range(0, len(CONTENT), wire.CHUNK_BYTES))


async def test_little_is_kept_and_what_was_dropped_is_read_again(path: Path) -> None:
    pieces = Frames(2 * wire.CHUNK_BYTES)
    assert await fetched(pieces, path) == CONTENT
    assert len(pieces._kept) == 2
    assert await fetched(pieces, path) == CONTENT


async def test_another_file_of_the_same_name_is_another_file(path: Path) -> None:
    pieces = Frames()
    assert await fetched(pieces, path) == CONTENT
    path.unlink()
    path.write_bytes(CONTENT[::-1])
    os.utime(path, ns=(1, 1))
    assert await fetched(pieces, path) == CONTENT[::-1]


async def test_anywhere_in_the_file(path: Path) -> None:
    assert await fetched(Frames(), path, 1000) == CONTENT[1000:]


async def test_who_is_cancelled_takes_nothing_from_others(path: Path) -> None:
    pieces = Frames()
    with path.open("rb") as file:
        first, second = (asyncio.create_task(pieces.frame(file, 0)) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        assert wire.read_download(await second).data == CONTENT[: wire.CHUNK_BYTES]


async def test_a_file_that_cannot_be_read_is_asked_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int, offset: int) -> bytes:
        os.close(descriptor)
        raise OSError("the disk is gone")

    pieces, original = Frames(), frames._read
    with path.open("rb") as file:
        monkeypatch.setattr(frames, "_read", broken)
        with pytest.raises(OSError, match="the disk is gone"):
            await pieces.frame(file, 3 * wire.CHUNK_BYTES)
        monkeypatch.setattr(frames, "_read", original)
        assert wire.read_download(await pieces.frame(file, 3 * wire.CHUNK_BYTES)).data == CONTENT[-7:]
