"""The spool, on a real disk: what broke goes on, what is whole is durable, what nobody needs is gone."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from choral.errors import CorruptTransfer, OutOfSpace, Unreachable
from choral.messages import UploadHeader
from choral.plan import Kind
from choral_server.rounds import Part, PartState, Round
from choral_server.spool import RoundSpool, Spool
from choral_server.troubles import Troubles

PAYLOAD = b"abcdef"


def header(payload: bytes = PAYLOAD, client: str = "alice", offset: int = 0) -> UploadHeader:
    digest = hashlib.sha256(payload).digest()
    return UploadHeader(f"run/3/{client}", client, 10, Kind.TRAINING, len(payload), (), (), digest, offset)


async def pieces(*given: bytes, then: BaseException | None = None) -> AsyncIterator[bytes]:
    for piece in given:
        yield piece
    if then is not None:
        raise then


@pytest.fixture
def spool(tmp_path: Path) -> RoundSpool:
    return Spool(tmp_path / "spool", Troubles()).of("run", 3)


def names(tmp_path: Path) -> list[str]:
    return sorted(str(path.relative_to(tmp_path / "spool")) for path in tmp_path.rglob("*") if path.is_file())


async def test_pieces_become_one_file_each_client_its_own(tmp_path: Path, spool: RoundSpool) -> None:
    first, second = await spool.store(header(), pieces(b"abc", b"", b"def")), await spool.store(header(b"", "bob"), pieces())
    assert first == spool.path("alice", hashlib.sha256(PAYLOAD).digest())
    assert first.read_bytes() == PAYLOAD
    assert second.read_bytes() == b""
    assert names(tmp_path) == ["run/3/alice.bef57ec7f53a6d40.upload", "run/3/bob.e3b0c44298fc1c14.upload"]


@pytest.mark.parametrize("broken", [CorruptTransfer("CRC"), ConnectionResetError(), KeyboardInterrupt(), asyncio.CancelledError()])
async def test_a_broken_transfer_goes_on_where_it_broke(tmp_path: Path, spool: RoundSpool, broken: BaseException) -> None:
    assert spool.held(header()) == 0
    with pytest.raises((type(broken), CorruptTransfer, Exception)):
        await spool.store(header(), pieces(b"abc", b"d", then=broken))
    assert spool.held(header()) == 4
    again = Spool(tmp_path / "spool", Troubles()).of("run", 3)  # also after a restart
    assert again.held(header()) == 4
    path = await again.store(header(offset=4), pieces(b"ef"))
    assert path.read_bytes() == PAYLOAD


async def test_one_may_begin_before_what_is_held_or_from_the_start(spool: RoundSpool) -> None:
    with pytest.raises(CorruptTransfer):
        await spool.store(header(), pieces(b"abcd", then=CorruptTransfer("cut")))
    with pytest.raises(CorruptTransfer):
        await spool.store(header(offset=2), pieces(b"c", then=CorruptTransfer("cut")))
    assert spool.held(header()) == 3
    assert (await spool.store(header(), pieces(PAYLOAD))).read_bytes() == PAYLOAD


async def test_nobody_can_leave_a_hole(tmp_path: Path, spool: RoundSpool) -> None:
    with pytest.raises(CorruptTransfer, match="begins at byte 5, but only 0 bytes are here"):
        await spool.store(header(offset=5), pieces(b"f"))
    with pytest.raises(CorruptTransfer, match="begins at byte -1"):
        await spool.store(header(offset=-1), pieces(b"f"))
    assert [name for name in names(tmp_path) if name.endswith(".upload")] == []


@pytest.mark.parametrize(("payload", "told"), [(b"abc", "3 bytes arrived where 6"), (b"abcdefg", "7 bytes arrived where 6")])
async def test_another_length_than_announced_is_not_whole(tmp_path: Path, spool: RoundSpool, payload: bytes, told: str) -> None:
    with pytest.raises(CorruptTransfer, match=told):
        await spool.store(header(), pieces(payload))
    assert all(name.endswith(".part") for name in names(tmp_path))


async def test_other_bytes_than_announced_are_dropped(tmp_path: Path, spool: RoundSpool) -> None:
    with pytest.raises(CorruptTransfer, match="not with the digest that was announced: send it again from the start"):
        await spool.store(header(), pieces(b"abcdeX"))
    assert names(tmp_path) == []
    assert spool.held(header()) == 0


async def test_a_second_attempt_takes_over_from_one_that_hangs(spool: RoundSpool) -> None:
    hanging, seen = asyncio.Event(), asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield b"abc"
        seen.set()
        await hanging.wait()
        yield b"def"

    first = asyncio.create_task(spool.store(header(), slow()))
    await seen.wait()
    path = await spool.store(header(offset=3), pieces(b"def"))
    hanging.set()
    with pytest.raises(Unreachable, match="another attempt to send this result took over"):
        await first
    assert path.read_bytes() == PAYLOAD


async def test_another_payload_of_the_same_client_is_begun_anew(tmp_path: Path, spool: RoundSpool) -> None:
    with pytest.raises(CorruptTransfer):
        await spool.store(header(), pieces(b"abc", then=CorruptTransfer("cut")))
    with pytest.raises(CorruptTransfer):
        await spool.store(header(b"uvwxyz"), pieces(b"u", then=CorruptTransfer("cut")))
    assert len(names(tmp_path)) == 1
    assert spool.held(header(b"uvwxyz")) == 1


async def test_a_round_that_ends_meanwhile_is_no_trouble_with_the_disk(tmp_path: Path) -> None:
    troubles = Troubles()
    spool = Spool(tmp_path / "spool", troubles).of("run", 3)

    async def ending() -> AsyncIterator[bytes]:
        yield PAYLOAD
        spool.clear()

    with pytest.raises(Unreachable, match="the round ended while the result arrived"):
        await spool.store(header(), ending())
    assert troubles.present == {}


async def test_a_full_disk_is_a_trouble_until_a_result_fits_and_loses_nothing(small_disk: Path) -> None:
    troubles, payload = Troubles(), bytes(range(256)) * 3000
    spool = Spool(small_disk / "spool", troubles).of("run", 3)
    (small_disk / "other").write_bytes(bytes(500_000))
    told = f"{small_disk}/spool/run/3 cannot be written (No space left on device)"
    with pytest.raises(OutOfSpace) as refused:
        await spool.store(header(payload), pieces(payload[:300_000], payload[300_000:]))
    assert str(refused.value) == f"the coordinator cannot store the result now: {told}; it is taken as soon as that is mended"
    assert troubles.present == {"disk": told}
    held = spool.held(header(payload))
    assert 300_000 <= held < len(payload)
    (small_disk / "other").unlink()
    path = await spool.store(header(payload, offset=held), pieces(payload[held:]))
    assert path.read_bytes() == payload
    assert troubles.present == {}


def accepted(client: str, payload: bytes = PAYLOAD) -> Part:
    return Part(f"run/3/{client}", client, PartState.ACCEPTED, digest=hashlib.sha256(payload).digest())


async def test_at_the_start_only_what_the_round_needs_is_kept(tmp_path: Path, spool: RoundSpool) -> None:
    others = Spool(tmp_path / "spool", Troubles())
    for stray in (others.of("run", 2), others.of("another", 3)):
        await stray.store(header(), pieces(PAYLOAD))
    await spool.store(header(), pieces(PAYLOAD))
    await spool.store(header(b"other", "bob"), pieces(b"other"))  # whole, but the process died before it was accepted
    await spool.store(header(b"fourth", "dave"), pieces(b"fourth"))  # of one who has no part
    with pytest.raises(CorruptTransfer):
        await spool.store(header(b"third", "carol"), pieces(b"th", then=CorruptTransfer("cut")))
    spool.sum_path.write_bytes(b"a sum")
    spool.sum_path.with_name(".sum.aside").write_bytes(b"half a sum")
    (tmp_path / "spool" / "notes.txt").write_text("not ours")
    parts = {part.assignment: part for part in (accepted("alice"), Part("run/3/bob", "bob"), Part("run/3/carol", "carol"))}
    round = Round("run", 3, Kind.TRAINING, 7, 3, 2, parts, datetime.now(UTC))
    others.keep_only(round)
    kept = ["notes.txt", "run/3/alice.bef57ec7f53a6d40.upload", "run/3/bob.", "run/3/carol.", "run/3/sum"]
    assert [name.startswith(expected) for name, expected in zip(names(tmp_path), kept, strict=True)] == [True] * 5
    assert [await spool.holds(part, 9) for part in (accepted("alice"), accepted("bob", b"another"))] == [True, False]
    others.keep_only(None)
    assert names(tmp_path) == ["notes.txt"]


async def test_what_is_refused_goes_and_the_rest_stays(tmp_path: Path, spool: RoundSpool) -> None:
    one, two = await spool.store(header(), pieces(PAYLOAD)), await spool.store(header(b"x", "bob"), pieces(b"x"))
    spool.discard(one)
    spool.discard(one)
    assert not one.exists()
    assert two.exists()
    spool.drop([replace(accepted("bob"), digest=hashlib.sha256(b"x").digest())])
    assert not two.exists()


async def test_an_upload_in_one_piece(tmp_path: Path, spool: RoundSpool) -> None:
    with pytest.raises(CorruptTransfer, match="5 bytes arrived where 6 were announced"):
        await spool.store_whole(header(), PAYLOAD[:5])
    with pytest.raises(CorruptTransfer, match="not with the digest that was announced"):
        await spool.store_whole(header(), PAYLOAD[::-1])
    assert names(tmp_path) == []
    path = await spool.store_whole(header(), PAYLOAD)
    assert path.read_bytes() == PAYLOAD
    assert spool.held(header()) == len(PAYLOAD)
    assert names(tmp_path) == ["run/3/alice.bef57ec7f53a6d40.upload"]


async def test_many_pieces_are_written_in_their_order(spool: RoundSpool) -> None:
    content = bytes(range(256)) * 40_000
    cut = [content[at : at + 300_000] for at in range(0, len(content), 300_000)]
    assert (await spool.store(header(content), pieces(*cut))).read_bytes() == content


async def test_a_whole_upload_is_held_and_taken_as_it_is(spool: RoundSpool) -> None:
    path = await spool.store(header(), pieces(PAYLOAD))
    assert spool.held(header()) == len(PAYLOAD)
    assert await spool.store(header(offset=len(PAYLOAD)), pieces(b"")) == path
    assert path.read_bytes() == PAYLOAD
