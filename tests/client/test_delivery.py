"""Results on their way, over a transport that the test writes."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path

import pytest
from choral.errors import ChoralError, CorruptTransfer, Declined, OutOfSpace, TrustError, Unreachable, UpdateRefused
from choral.messages import Phase, Receipt, Status, UploadHeader, Verdict, VersionRef
from choral.metrics import Metric
from choral.plan import Kind
from choral.wire import CHUNK_BYTES
from choral_client.backoff import Patience
from choral_client.delivery import Deliveries
from choral_client.outbox import KEPT, Outbox, Parcel
from choral_client.transport import Payload
from structlog.testing import capture_logs

PATIENCE_S = 60.0
PAYLOAD = bytes(range(200))
ACCEPTED = Receipt(Verdict.ACCEPTED)
ID = "run/0/alice"


class AtOnce(random.Random):
    def uniform(self, a: float, b: float) -> float:
        return a


class Slowest(random.Random):
    def uniform(self, a: float, b: float) -> float:
        return 3600.0


def parcel(payload: bytes = PAYLOAD) -> Parcel:
    work, digest = (Metric("train_loss", 0.12345, 5),), hashlib.sha256(payload).digest()
    return Parcel(UploadHeader(ID, "alice", 5, Kind.TRAINING, len(payload), (), work, digest), 7)


class Calls:
    """A transport that answers each call with the next of `answers`, and notes what was asked: `("upload", offset)` or "resume"."""

    def __init__(self, *answers: Receipt | int | ChoralError | asyncio.Event) -> None:
        self.answers = list(answers)
        self.asked: list[object] = []
        self.news = asyncio.Condition()

    async def _answer(self, what: object) -> Receipt | int:
        self.asked.append(what)
        async with self.news:
            self.news.notify_all()
        answer = self.answers.pop(0)
        if isinstance(answer, asyncio.Event):
            await answer.wait()
            return ACCEPTED
        if isinstance(answer, ChoralError):
            raise answer
        return answer

    async def was_asked(self, count: int) -> None:
        async with self.news:
            await self.news.wait_for(lambda: len(self.asked) >= count)

    async def upload(self, header: UploadHeader, payload: Payload) -> Receipt:
        assert hashlib.sha256(payload[:]).digest() == header.digest
        answer = await self._answer(("upload", header.offset))
        assert isinstance(answer, Receipt)
        return answer

    async def resume(self, header: UploadHeader) -> int | Receipt:
        return await self._answer("resume")

    def attend(self, hello: object) -> None: ...

    async def download(self, version: VersionRef, offset: int) -> AsyncGenerator[bytes, None]:
        yield b""


class Sender:
    """Deliveries over `calls`, with what they said."""

    def __init__(self, calls: Calls, folder: Path, rng: random.Random | None = None) -> None:
        self.said: list[Status] = []
        self.outbox = Outbox(folder / "outbox")
        self.patience = Patience(rng or AtOnce())
        self.deliveries = Deliveries(calls, self.outbox, self.patience, self._report, lambda masked, hidden: None)  # type: ignore[arg-type]

    async def _report(self, status: Status) -> None:
        self.said.append(status)

    async def send(self, payload: bytes = PAYLOAD) -> None:
        self.outbox.save(parcel(payload), [payload])
        async with asyncio.timeout(PATIENCE_S):
            await self.deliveries.send(parcel(payload), memoryview(payload))


@pytest.mark.parametrize("verdict", Verdict)
async def test_any_receipt_settles_it_and_the_user_is_told(tmp_path: Path, verdict: Verdict) -> None:
    calls = Calls(Receipt(verdict, "so it is"))
    sender = Sender(calls, tmp_path)
    with capture_logs() as logs:
        await sender.send()
    assert calls.asked == [("upload", 0)]
    assert ID not in sender.outbox
    level = "info" if verdict in (Verdict.ACCEPTED, Verdict.DUPLICATE) else "warning"
    assert logs == [
        {"event": "sent", "log_level": level, "round": 7, "verdict": verdict.value, "reason": "so it is", "train_loss": 0.1235}
    ]
    assert sender.said == []  # nothing but the result itself


async def test_it_goes_on_where_it_broke_for_as_long_as_it_takes(tmp_path: Path) -> None:
    gone, resumed = Unreachable("gone"), []
    for offset in range(0, 100, 5):
        resumed += [gone, OutOfSpace("the coordinator's disk is full"), offset, CorruptTransfer("damaged")]
    calls = Calls(gone, *resumed, 150, ACCEPTED)
    sender = Sender(calls, tmp_path)
    await sender.send()
    uploads = [asked[1] for asked in calls.asked if isinstance(asked, tuple)]
    assert uploads == [0, *range(0, 100, 5), 150]
    assert calls.answers == []


async def test_a_receipt_instead_of_an_offset(tmp_path: Path) -> None:
    calls = Calls(Unreachable("gone before the receipt came"), Receipt(Verdict.DUPLICATE))
    sender = Sender(calls, tmp_path)
    await sender.send()
    assert calls.asked == [("upload", 0), "resume"]
    assert ID not in sender.outbox


@pytest.mark.parametrize("answers", [(), (Unreachable("gone"),), (Unreachable("gone"), 3)])
async def test_a_refusal_is_declined_and_the_result_forgotten(tmp_path: Path, answers: tuple[int | ChoralError, ...]) -> None:
    sender = Sender(Calls(*answers, UpdateRefused("not that one")), tmp_path)
    await sender.send()
    assert sender.said == [Status(ID, Phase.DECLINED, "not that one")]
    assert ID not in sender.outbox


async def test_a_coordinator_that_cannot_be_trusted_does_not_cost_the_result(tmp_path: Path) -> None:
    sender = Sender(Calls(TrustError("another certificate")), tmp_path)
    await sender.send()
    assert ID in sender.outbox


async def test_a_large_result_is_announced(tmp_path: Path) -> None:
    sender = Sender(Calls(ACCEPTED), tmp_path)
    await sender.send(bytes(CHUNK_BYTES + 1))
    assert sender.said == [Status(ID, Phase.UPLOADING)]


async def test_what_an_earlier_start_left_is_offered(tmp_path: Path) -> None:
    earlier = Sender(Calls(Unreachable("gone")), tmp_path, Slowest())
    sending = asyncio.create_task(earlier.send())
    while ID not in earlier.outbox:
        await asyncio.sleep(0)
    await earlier.deliveries.stop()
    sending.cancel()
    calls = Calls(120, ACCEPTED)
    sender = Sender(calls, tmp_path)
    await sender.deliveries.offer_saved()
    await sender.deliveries.linger(PATIENCE_S)
    assert calls.asked == ["resume", ("upload", 120)]
    assert ID not in sender.outbox


async def test_a_result_is_sent_once_however_often_it_is_asked_for(tmp_path: Path) -> None:
    receipt = asyncio.Event()
    calls = Calls(0, receipt)
    sender = Sender(calls, tmp_path)
    sender.outbox.save(parcel(), [PAYLOAD])
    await sender.deliveries.offer_saved()
    await sender.deliveries.offer_saved()
    asked = [asyncio.create_task(sender.deliveries.send_saved(ID)) for _ in range(3)]
    asked.append(asyncio.create_task(sender.deliveries.send(parcel(), memoryview(PAYLOAD))))  # type: ignore[arg-type]
    await calls.was_asked(2)
    asked[0].cancel()  # who waits for it does not own it
    receipt.set()
    assert await asyncio.gather(*asked[1:]) == [True, True, None]
    assert calls.asked == ["resume", ("upload", 0)]


async def test_there_may_be_nothing_to_send(tmp_path: Path) -> None:
    sender = Sender(Calls(), tmp_path)
    assert not await sender.deliveries.send_saved(ID)
    sender.outbox.save(parcel(), [PAYLOAD])
    path = sender.outbox._path(ID)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert not await sender.deliveries.send_saved(ID)


async def test_a_pause_ends_when_the_link_is_back(tmp_path: Path) -> None:
    calls = Calls(Unreachable("gone"), ACCEPTED)
    sender = Sender(calls, tmp_path, Slowest())
    sending = asyncio.create_task(sender.send())
    await calls.was_asked(1)
    sender.patience.link_is_back()
    await sending
    assert calls.asked == [("upload", 0), "resume"]


async def test_what_is_withdrawn_is_forgotten_and_may_come_again(tmp_path: Path) -> None:
    never, calls = asyncio.Event(), Calls()
    sender = Sender(calls, tmp_path)
    calls.answers = [never, ACCEPTED]
    sending = asyncio.create_task(sender.send())
    await calls.was_asked(1)
    assert sender.deliveries.withdraw(ID)
    assert not await sender.deliveries.send_saved(ID)
    assert not sender.deliveries.withdraw(ID)
    await sender.send()
    with pytest.raises(asyncio.CancelledError):
        await sending


async def test_whoever_stops_leaves_the_results_for_later(tmp_path: Path) -> None:
    calls = Calls(asyncio.Event())
    sender = Sender(calls, tmp_path)
    sending = asyncio.create_task(sender.send())
    await calls.was_asked(1)
    await sender.deliveries.linger(0.01)
    await sender.deliveries.stop()
    assert ID in sender.outbox
    with pytest.raises(asyncio.CancelledError):
        await sending


async def test_the_guard_is_asked_before_each_attempt_and_what_it_does_not_allow_is_forgotten(tmp_path: Path) -> None:
    allowed = [True, False]

    def permit(masked: bool, hidden: tuple[str, ...]) -> None:
        assert not masked
        if not allowed.pop(0):
            raise Declined("not from this network")

    calls = Calls(Unreachable("gone"))
    sender = Sender(calls, tmp_path)
    sender.deliveries = Deliveries(calls, sender.outbox, sender.patience, sender._report, permit)  # type: ignore[arg-type]
    await sender.send()
    assert calls.asked == [("upload", 0)]
    assert sender.said == [Status(ID, Phase.DECLINED, "not from this network")]
    assert ID not in sender.outbox


async def test_a_coordinator_that_takes_nothing_does_not_fill_the_memory(tmp_path: Path) -> None:
    never = asyncio.Event()
    calls = Calls(*[never] * 50)
    sender = Sender(calls, tmp_path)
    sending = []
    for number in range(50):
        one = replace(parcel(), header=replace(parcel().header, assignment=f"run/{number}/alice"))
        sender.outbox.save(one, [PAYLOAD])
        sending.append(asyncio.create_task(sender.deliveries.send(one, memoryview(PAYLOAD))))
        async with asyncio.timeout(PATIENCE_S):
            await calls.was_asked(number + 1)
    assert sum(not task.done() for task in sending) == KEPT
    assert set(sender.outbox.assignments()) == {f"run/{number}/alice" for number in range(50 - KEPT, 50)}
    await sender.deliveries.stop()
    await asyncio.gather(*sending, return_exceptions=True)
