"""Transfers on their way into a file: what is in it is what came, whoever takes over and whenever."""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
from pathlib import Path

import pytest
from choral.arrival import Arrival
from choral.errors import CorruptTransfer, Unreachable

MIB = 1 << 20
CONTENT = os.urandom(8 * MIB + 5)
PIECES = [CONTENT[at : at + MIB] for at in range(0, len(CONTENT), MIB)]


class Slow:
    """Lets writes to the disk wait until the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go_on = threading.Event()
        self.begun = threading.Event()
        self._pwrite = os.pwrite
        monkeypatch.setattr(os, "pwrite", self._write)

    def _write(self, descriptor: int, data: bytes, offset: int) -> int:
        self.begun.set()
        assert self.go_on.wait(60)
        return self._pwrite(descriptor, data, offset)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "part"


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Slow:
    return Slow(monkeypatch)


async def test_all_that_comes_is_written_and_hashed(path: Path) -> None:
    arrival = Arrival(path, 0)
    for piece in PIECES:
        await arrival.add(piece)
    assert await arrival.whole() == (len(CONTENT), hashlib.sha256(CONTENT).digest())
    await arrival.close()
    assert path.read_bytes() == CONTENT


async def test_what_was_here_before_is_hashed_too(path: Path) -> None:
    path.write_bytes(CONTENT[: 3 * MIB] + b"more than is wanted")
    arrival = Arrival(path, 3 * MIB)
    await arrival.add(CONTENT[3 * MIB :])
    assert await arrival.whole() == (len(CONTENT), hashlib.sha256(CONTENT).digest())
    await arrival.close()
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("begin", [-1, 6])
def test_none_begins_where_nothing_is(path: Path, begin: int) -> None:
    path.write_bytes(b"12345")
    with pytest.raises(CorruptTransfer, match=f"begins at byte {begin}, but only 5 bytes are here"):
        Arrival(path, begin)


async def test_who_takes_over_finds_what_had_come_and_nobody_writing(path: Path, slow: Slow) -> None:
    arrival = Arrival(path, 0)
    adding = asyncio.create_task(added(arrival, PIECES))
    await asyncio.to_thread(slow.begun.wait, 60)
    while not adding.done() and len(arrival._batch) < 2:  # it waits for the disk now
        await asyncio.sleep(0)
    taking_over = asyncio.create_task(arrival.give_way())
    await asyncio.sleep(0)
    slow.go_on.set()
    await taking_over
    size = path.stat().st_size
    assert size >= 3 * MIB
    assert path.read_bytes() == CONTENT[:size]
    with pytest.raises(Unreachable, match="another attempt to send this result took over"):
        await adding
    await arrival.close()
    assert path.read_bytes() == CONTENT[:size]


async def added(arrival: Arrival, pieces: list[bytes]) -> None:
    for piece in pieces:
        await arrival.add(piece)


async def test_whoever_closes_it_twice_over_writes_to_no_other_file(path: Path, slow: Slow, tmp_path: Path) -> None:
    """The number of a closed file is given to the next one that is opened."""
    arrival = Arrival(path, 0)
    await arrival.add(PIECES[0])
    await asyncio.to_thread(slow.begun.wait, 60)
    await arrival.add(PIECES[1])
    closing = asyncio.create_task(arrival.close())
    await asyncio.sleep(0)
    closing.cancel()  # while it waits for the disk
    with pytest.raises(asyncio.CancelledError):
        await closing
    slow.go_on.set()
    assert arrival._writing is not None
    await asyncio.wait([arrival._writing])
    await asyncio.sleep(0)  # the file is closed now
    others = [(tmp_path / str(number)).open("wb+") for number in range(5)]
    await arrival.give_way()
    await arrival.close()
    assert [file.read() for file in others] == [b""] * 5
    for file in others:
        file.close()
    assert path.read_bytes() == PIECES[0]


async def test_a_disk_that_fails_leaves_no_hole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: bytes, offset: int) -> int:
        raise OSError(28, "No space left on device")

    arrival = Arrival(path, 0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space left"):
            await added(arrival, PIECES)
    await arrival.close()
    assert path.read_bytes() == b""
