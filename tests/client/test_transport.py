"""The gRPC transport against a real gRPC server whose answers the test writes."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import itertools
import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from choral import Task, wire
from choral.errors import CorruptTransfer, InvalidMessage, NameTaken, Unreachable, UpdateRefused
from choral.manifest import Entry, EntryKind, Manifest
from choral.messages import (
    Assignment,
    Cancel,
    ComeBack,
    Heartbeat,
    Hello,
    Receipt,
    Status,
    UploadHeader,
    Verdict,
    VersionRef,
    Welcome,
)
from choral.metrics import Metric
from choral.plan import Kind, Plan, Training
from choral.status import abort
from choral.v1 import federation_pb2 as pb
from choral.v1 import federation_pb2_grpc
from choral_client.agent import Agent
from choral_client.backoff import Patience
from choral_client.checkpoint import Expected
from choral_client.data import Shard
from choral_client.delivery import Deliveries
from choral_client.model_file import ModelFile
from choral_client.outbox import Outbox, Parcel
from choral_client.transport import GrpcTransport
from choral_client.work import Work
from pieces import pieces, taken
from proxy import Proxy
from safetensors.torch import save
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import TensorDataset

PATIENCE_S = 60.0
CONTENT = bytes(itertools.islice(itertools.cycle(range(251)), (1 << 20) + 1000))  # two chunks
VERSION = VersionRef(3, hashlib.sha256(CONTENT).digest(), len(CONTENT))
TASK = Task("small", lambda: nn.Linear(1, 1), mse_loss, load=lambda path: TensorDataset())
WORK = Work(TASK, Shard(TensorDataset(torch.ones(2, 1), torch.ones(2, 1)), None, 2))
HELLO = Hello(wire.PROTOCOL_VERSION, "alice", "this start", "small", "1", WORK.manifest, 2, "a test")


class Service(federation_pb2_grpc.FederationServicer):
    """Does what the test says."""

    def __init__(self, **calls: Callable[..., Any]) -> None:
        for name, call in calls.items():
            setattr(self, name, at_once(call) if name == "Upload" else call)


def at_once(upload: Callable[..., Any]) -> Callable[..., Any]:
    """An upload whose turn it is."""

    async def turned(requests: AsyncIterator[pb.UploadRequest], context: Any) -> Any:
        await context.send_initial_metadata(())
        return await upload(requests, context)

    return turned


@asynccontextmanager
async def serving(**calls: Callable[..., Any]) -> AsyncIterator[int]:
    """The port of a server with these calls, on loopback."""
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", wire.MESSAGE_BYTES)])
    federation_pb2_grpc.add_FederationServicer_to_server(Service(**calls), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with asyncio.timeout(PATIENCE_S):
            yield port
    finally:
        await server.stop(None)


@asynccontextmanager
async def reaching(**calls: Callable[..., Any]) -> AsyncIterator[GrpcTransport]:
    """A transport to a server with these calls."""
    async with serving(**calls) as port:
        transport = GrpcTransport(f"127.0.0.1:{port}", None, "alice")
        try:
            yield transport
        finally:
            await transport.close()


@asynccontextmanager
async def reaching_over(proxy: Proxy, stall_s: float = PATIENCE_S, **calls: Callable[..., Any]) -> AsyncIterator[GrpcTransport]:
    """The same over a bad link."""
    async with serving(**calls) as port:
        proxy.target = port
        transport = GrpcTransport(proxy.address, None, "alice", stall_s)
        try:
            yield transport
        finally:
            await transport.close()


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with Proxy() as made:
        yield made


async def downloaded(transport: GrpcTransport, version: VersionRef, offset: int = 0) -> bytes:
    """What a whole download brings."""
    async with aclosing(transport.download(version, offset)) as pieces:
        return b"".join([piece async for piece in pieces])


def sending(*chunks: Any, offset: int = 0) -> Callable[..., Any]:
    async def download(request: pb.DownloadRequest, context: Any) -> AsyncIterator[pb.DownloadResponse]:
        assert (request.client, request.version, request.offset) == ("alice", 3, offset)
        for chunk in chunks:
            yield pb.DownloadResponse(chunk=chunk)

    return download


async def test_a_download_is_put_together_from_its_chunks() -> None:
    async with reaching(Download=sending(*pieces(CONTENT))) as transport:
        assert await downloaded(transport, VERSION) == CONTENT


async def test_a_download_begins_where_it_is_asked_to() -> None:
    async with reaching(Download=sending(*pieces(CONTENT, 1000), offset=1000)) as transport:
        assert await downloaded(transport, VERSION, 1000) == CONTENT[1000:]


GOOD = pieces(CONTENT)


@pytest.mark.parametrize(
    ("chunks", "words"),
    [
        ([], "version 3 ended after 0 of 1049576 bytes: fetch the rest"),
        (GOOD[:1], "version 3 ended after 1048576 of 1049576 bytes: fetch the rest"),
        ([*GOOD, GOOD[0]], "a chunk begins at byte 0 where byte 1049576 is next"),
        (GOOD[::-1], "a chunk begins at byte 1048576 where byte 0 is next"),
        (pieces(CONTENT + b"x"), "1049577 bytes arrived where 1049576 were announced"),
        ([type(GOOD[0])(offset=0, data=b"x", crc32=1)], "the chunk at byte 0 does not match its CRC-32C"),
    ],
)
async def test_a_download_that_is_not_what_was_announced_is_corrupt(chunks: list[Any], words: str) -> None:
    async with reaching(Download=sending(*chunks)) as transport:
        with pytest.raises(CorruptTransfer, match=words):
            await downloaded(transport, VERSION)


HEADER = UploadHeader(
    "run/0/alice", "alice", 5, Kind.TRAINING, len(CONTENT), (Metric("loss", 0.5, 3),), (), hashlib.sha256(CONTENT).digest()
)


async def test_an_upload_is_header_chunks_and_trailer() -> None:
    received: list[pb.UploadRequest] = []

    async def upload(requests: AsyncIterator[pb.UploadRequest], context: Any) -> pb.UploadResponse:
        received.extend([request async for request in requests])
        return pb.UploadResponse(verdict=pb.VERDICT_LATE, reason="the round has closed")

    async with reaching(Upload=upload) as transport:
        assert await transport.upload(HEADER, memoryview(CONTENT)) == Receipt(Verdict.LATE, "the round has closed")
    assert wire.header_from_pb(received[0].header) == HEADER
    assert together(received) == CONTENT
    assert received[-1].trailer.chunks == len(received) - 2


def together(received: list[pb.UploadRequest], offset: int = 0) -> bytes:
    """The payload of the chunks between header and trailer, which must be good and without gaps."""
    content = bytearray()
    for part in received[1:-1]:
        content += wire.verified(taken(part.chunk), offset + len(content), len(CONTENT))
    return bytes(content)


@pytest.mark.parametrize("offset", [1, 1000, 1 << 20, len(CONTENT)])
async def test_an_upload_goes_on_at_its_offset(offset: int) -> None:
    received: list[pb.UploadRequest] = []

    async def upload(requests: AsyncIterator[pb.UploadRequest], context: Any) -> pb.UploadResponse:
        received.extend([request async for request in requests])
        return pb.UploadResponse(verdict=pb.VERDICT_ACCEPTED)

    async with reaching(Upload=upload) as transport:
        assert await transport.upload(replace(HEADER, offset=offset), memoryview(CONTENT)) == Receipt(Verdict.ACCEPTED)
    assert received[0].header.offset == offset
    assert together(received, offset) == CONTENT[offset:]
    assert received[-1].trailer.chunks == len(received) - 2


@pytest.mark.parametrize("answer", [0, 1000, len(CONTENT), Receipt(Verdict.LATE, "the round has closed")])
async def test_where_an_upload_goes_on(answer: int | Receipt) -> None:
    asked: list[UploadHeader] = []

    async def resume(request: pb.ResumeUploadRequest, context: Any) -> pb.ResumeUploadResponse:
        asked.append(wire.header_from_pb(request.header))
        return wire.resumption_to_pb(answer)

    async with reaching(ResumeUpload=resume) as transport:
        assert await transport.resume(HEADER) == answer
    assert asked == [HEADER]


@pytest.mark.parametrize("answer", [-1, len(CONTENT) + 1])
async def test_an_upload_cannot_go_on_outside_its_payload(answer: int) -> None:
    async def resume(request: pb.ResumeUploadRequest, context: Any) -> pb.ResumeUploadResponse:
        return wire.resumption_to_pb(answer)

    async with reaching(ResumeUpload=resume) as transport:
        with pytest.raises(InvalidMessage, match=f"asked to go on at byte {answer} of {len(CONTENT)}"):
            await transport.resume(HEADER)


@pytest.mark.parametrize("after", [1, 2, 5])
async def test_a_receipt_may_come_before_all_was_sent(after: int) -> None:
    payload = bytes(40 << 20)  # more than any buffer on the way
    header = replace(HEADER, payload_bytes=len(payload), digest=hashlib.sha256(payload).digest())
    late = Receipt(Verdict.LATE, "the round has closed")
    taken: list[str] = []

    async def upload(requests: AsyncIterator[pb.UploadRequest], context: Any) -> pb.UploadResponse:
        for _ in range(after):
            taken.append((await anext(requests)).WhichOneof("message"))
        return wire.receipt_to_pb(late)

    async def resume(request: pb.ResumeUploadRequest, context: Any) -> pb.ResumeUploadResponse:
        return wire.resumption_to_pb(late)

    async with reaching(Upload=upload, ResumeUpload=resume) as transport:
        for _ in range(20):
            taken.clear()
            assert await transport.upload(header, memoryview(payload)) == late
            assert taken == ["header", *["chunk"] * (after - 1)]


# Bad links


class Taker:
    """Takes in one upload in as many calls as it needs, as a coordinator does: what was verified counts."""

    def __init__(self, total: int) -> None:
        self.content = bytearray()
        self.total = total
        self.calls = 0

    async def upload(self, requests: AsyncIterator[pb.UploadRequest], context: Any) -> pb.UploadResponse:
        self.calls += 1
        header = (await anext(requests)).header
        assert header.offset == len(self.content)
        async for request in requests:
            if request.WhichOneof("message") == "chunk":
                self.content += wire.verified(taken(request.chunk), len(self.content), self.total)
        assert request.WhichOneof("message") == "trailer"
        return pb.UploadResponse(verdict=pb.VERDICT_ACCEPTED)

    async def resume(self, request: pb.ResumeUploadRequest, context: Any) -> pb.ResumeUploadResponse:
        return wire.resumption_to_pb(len(self.content))


class AtOnce(random.Random):
    """Leaves no pause between two attempts."""

    def uniform(self, a: float, b: float) -> float:
        return a


async def unheard(status: Status) -> None:
    """Statuses go nowhere."""


async def test_a_link_that_breaks_costs_an_upload_less_than_a_chunk_each_time(proxy: Proxy, tmp_path: Path) -> None:
    cuts, payload = 10, random.Random(0).randbytes(30 << 20)
    taker = Taker(len(payload))
    proxy.cut_at(up=[(cut + 1) * len(payload) // (cuts + 1) for cut in range(cuts)])
    header = replace(HEADER, payload_bytes=len(payload), digest=hashlib.sha256(payload).digest())
    async with reaching_over(proxy, Upload=taker.upload, ResumeUpload=taker.resume) as transport:
        await Deliveries(transport, Outbox(tmp_path), Patience(AtOnce()), unheard, lambda masked, hidden: None).send(
            Parcel(header, 0), memoryview(payload)
        )
    assert taker.content == payload
    assert taker.calls == cuts + 1
    assert proxy.up - len(payload) < cuts * wire.CHUNK_BYTES


async def test_a_link_that_breaks_costs_a_download_little(proxy: Proxy, tmp_path: Path) -> None:
    cuts, numbers = 10, torch.rand(30 << 18)
    content = save({"numbers": numbers})
    expected = Expected(Manifest((Entry("numbers", "F32", (len(numbers),), 0, EntryKind.AVERAGED),)))
    version = VersionRef(3, hashlib.sha256(content).digest(), len(content))
    proxy.cut_at(down=[(cut + 1) * len(content) // (cuts + 1) for cut in range(cuts)])
    offsets: list[int] = []

    async def download(request: pb.DownloadRequest, context: Any) -> AsyncIterator[pb.DownloadResponse]:
        offsets.append(request.offset)
        for chunk in pieces(content, request.offset):
            yield pb.DownloadResponse(chunk=chunk)

    async with reaching_over(proxy, Download=download) as transport:
        with await ModelFile(transport, tmp_path, Patience(AtOnce()), expected).obtain(version) as file:
            assert file.read() == content
    assert len(offsets) == cuts + 1
    assert offsets == sorted(offsets)
    assert proxy.down - len(content) < 2 * cuts * wire.CHUNK_BYTES
    assert (tmp_path / "model.safetensors").read_bytes() == content


async def test_a_transfer_that_stands_still_is_given_up(proxy: Proxy) -> None:
    taker, payload = Taker(40 << 20), bytes(40 << 20)
    header = replace(HEADER, payload_bytes=len(payload), digest=hashlib.sha256(payload).digest())
    begun = asyncio.Event()

    async def download(request: pb.DownloadRequest, context: Any) -> AsyncIterator[pb.DownloadResponse]:
        yield pb.DownloadResponse(chunk=GOOD[0])
        begun.set()
        await asyncio.Event().wait()

    async def upload(requests: AsyncIterator[pb.UploadRequest], context: Any) -> pb.UploadResponse:
        await anext(requests)
        begun.set()
        await asyncio.Event().wait()
        raise AssertionError

    async with reaching_over(proxy, 0.3, Download=download, Upload=upload, ResumeUpload=taker.resume) as transport:
        assert await transport.resume(header) == 0
        stalled = r"the transfer with the coordinator at 127\.0\.0\.1:\d+ has stood still for (0\.3|6) s"
        for moving in (downloaded(transport, VERSION), transport.upload(header, memoryview(payload))):
            begun.clear()
            with pytest.raises(Unreachable, match=stalled):
                await moving
            assert begun.is_set()
        proxy.hang()
        for held in (transport.resume(header), downloaded(transport, VERSION), transport.upload(header, memoryview(payload))):
            with pytest.raises(Unreachable, match=stalled):
                await held
        proxy.allow()
        assert await transport.resume(header) == 0


async def test_a_receipt_that_never_comes_is_given_up() -> None:
    async def upload(requests: AsyncIterator[pb.UploadRequest], context: Any) -> pb.UploadResponse:
        _ = [request async for request in requests]
        await asyncio.Event().wait()
        raise AssertionError

    async with serving(Upload=upload) as port:
        transport = GrpcTransport(f"127.0.0.1:{port}", None, "alice", stall_s=0.1)
        with pytest.raises(Unreachable, match=r"has stood still for 0\.4 s"):
            await transport.upload(HEADER, memoryview(CONTENT))
        await transport.close()


async def test_whoever_is_cancelled_in_a_transfer_is_cancelled() -> None:
    begun = asyncio.Event()

    async def upload(requests: AsyncIterator[pb.UploadRequest], context: Any) -> pb.UploadResponse:
        begun.set()
        await asyncio.Event().wait()
        raise AssertionError

    async def download(request: pb.DownloadRequest, context: Any) -> AsyncIterator[pb.DownloadResponse]:
        begun.set()
        await asyncio.Event().wait()
        yield

    async with reaching(Upload=upload, Download=download) as transport:
        for moving in (transport.upload(HEADER, memoryview(CONTENT)), downloaded(transport, VERSION)):
            begun.clear()
            task = asyncio.create_task(moving)
            await begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task


async def test_errors_keep_their_names() -> None:
    async def upload(requests: AsyncIterator[pb.UploadRequest], context: Any) -> pb.UploadResponse:
        await abort(context, UpdateRefused("not that one"))

    async def resume(request: pb.ResumeUploadRequest, context: Any) -> pb.ResumeUploadResponse:
        await abort(context, UpdateRefused("not that one"))

    async def attend(requests: AsyncIterator[pb.AttendRequest], context: Any) -> AsyncIterator[pb.AttendResponse]:
        await abort(context, NameTaken("alice attends already"))
        yield

    async with reaching(Upload=upload, ResumeUpload=resume, Attend=attend) as transport:
        with pytest.raises(UpdateRefused, match="not that one"):
            await transport.upload(HEADER, memoryview(CONTENT))
        with pytest.raises(NameTaken, match="alice attends already"):
            async with transport.attend(HELLO) as stream:
                await anext(stream.heard())


async def test_nobody_there() -> None:
    async with reaching() as transport:
        address = transport._address
    transport = GrpcTransport(address, None, "alice")
    with pytest.raises(Unreachable, match=f"no coordinator answers at {address}"):
        async with asyncio.timeout(PATIENCE_S), transport.attend(HELLO) as stream:
            await anext(stream.heard())
    with pytest.raises(Unreachable):
        await downloaded(transport, VERSION)
    with pytest.raises(Unreachable):
        await transport.upload(HEADER, memoryview(b""))
    with pytest.raises(Unreachable):
        await transport.resume(HEADER)
    await transport.close()


async def test_what_is_said_and_heard_on_the_stream() -> None:
    said: list[pb.AttendRequest] = []

    async def attend(requests: AsyncIterator[pb.AttendRequest], context: Any) -> AsyncIterator[pb.AttendResponse]:
        said.append(await anext(requests))
        yield wire.from_coordinator_to_pb(Welcome("run", 15.0, VERSION))
        yield wire.from_coordinator_to_pb(ComeBack(None, "over"))

    async with reaching(Attend=attend) as transport, transport.attend(HELLO) as stream:
        assert [message async for message in stream.heard()] == [Welcome("run", 15.0, VERSION), ComeBack(None, "over")]
    assert [wire.from_client_from_pb(message) for message in said] == [HELLO]


async def test_work_that_is_withdrawn_while_it_is_reported_does_not_end_the_stream(tmp_path: Path) -> None:
    """gRPC cancels a whole call with a write that is cancelled; the coordinator announces and withdraws work in one breath."""
    model = save({"weight": torch.zeros(1, 1), "bias": torch.zeros(1)})
    version = VersionRef(0, hashlib.sha256(model).digest(), len(model))
    plan = Plan(Kind.TRAINING, "small", "1", Training(), 0, evaluate=False)
    attendances = 0

    async def attend(requests: AsyncIterator[pb.AttendRequest], context: Any) -> AsyncIterator[pb.AttendResponse]:
        nonlocal attendances
        attendances += 1
        assert (await anext(requests)).WhichOneof("message") == "hello"
        yield wire.from_coordinator_to_pb(Welcome("run", 0.1, version))  # heartbeats in between
        for round in range(200):
            yield wire.from_coordinator_to_pb(Assignment(f"run/{round}/alice", round, version, plan))
            yield wire.from_coordinator_to_pb(Cancel(f"run/{round}/alice", "closed"))
        yield wire.from_coordinator_to_pb(ComeBack(None, "over"))
        async for _ in requests:  # as a real coordinator: the client closes the stream once it has heard that
            pass

    async def download(request: pb.DownloadRequest, context: Any) -> AsyncIterator[pb.DownloadResponse]:
        for chunk in pieces(model):
            yield pb.DownloadResponse(chunk=chunk)

    async def upload(requests: AsyncIterator[pb.UploadRequest], context: Any) -> pb.UploadResponse:
        return pb.UploadResponse(verdict=pb.VERDICT_LATE)

    async with reaching(Attend=attend, Download=download, Upload=upload) as transport:
        assert await Agent(transport, HELLO, WORK, tmp_path).live() == "over"
    assert attendances == 1


async def test_what_is_not_said_any_more_leaves_no_error_behind() -> None:
    """Work is withdrawn and then the link breaks: nobody waits any more for the words that could not be said."""

    async def attend(requests: AsyncIterator[pb.AttendRequest], context: Any) -> AsyncIterator[pb.AttendResponse]:
        yield wire.from_coordinator_to_pb(Welcome("run", 15.0, VERSION))
        async for _ in requests:
            pass

    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
    async with reaching(Attend=attend) as transport, transport.attend(HELLO) as stream:
        await anext(stream.heard())
        saying = [asyncio.create_task(stream.say(Heartbeat())) for _ in range(50)]
        await asyncio.sleep(0)  # they have begun, and no word has left yet
        for task in saying:
            task.cancel()
        assert all(isinstance(ended, asyncio.CancelledError) for ended in await asyncio.gather(*saying, return_exceptions=True))
    gc.collect()  # asyncio complains of an error that nobody saw when its task is collected
    assert [complaint.get("exception") for complaint in complaints] == []


async def test_a_coordinator_that_does_not_read_does_not_fill_the_memory() -> None:
    async def attend(requests: AsyncIterator[pb.AttendRequest], context: Any) -> AsyncIterator[pb.AttendResponse]:
        yield wire.from_coordinator_to_pb(Welcome("run", 15.0, VERSION))
        await asyncio.Event().wait()

    async with reaching(Attend=attend) as transport, transport.attend(HELLO) as stream:
        await anext(stream.heard())
        saying = [asyncio.create_task(stream.say(Heartbeat())) for _ in range(1000)]
        await asyncio.sleep(0)  # they have begun, and no word has left yet
        with pytest.raises(Unreachable, match="does not read what is said to it"):
            await stream.say(Heartbeat())
        for task in saying:
            task.cancel()
        await asyncio.gather(*saying, return_exceptions=True)
