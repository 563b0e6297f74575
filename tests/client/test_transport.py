"""The gRPC transport against a real gRPC server whose answers the test writes."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from choral import Task, wire
from choral.errors import CorruptTransfer, NameTaken, Unreachable, UpdateRefused
from choral.messages import Assignment, Cancel, ComeBack, Heartbeat, Hello, Receipt, UploadHeader, Verdict, VersionRef, Welcome
from choral.metrics import Metric
from choral.plan import Kind, Plan, Training
from choral.status import abort
from choral.v1 import federation_pb2 as pb
from choral.v1 import federation_pb2_grpc
from choral_client.agent import Agent
from choral_client.data import Shard
from choral_client.transport import GrpcTransport
from choral_client.work import Work
from safetensors.torch import save
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import TensorDataset

PATIENCE_S = 60.0
CONTENT = bytes(itertools.islice(itertools.cycle(range(251)), (1 << 20) + 1000))  # two chunks
VERSION = VersionRef(3, hashlib.sha256(CONTENT).digest(), len(CONTENT))
TASK = Task("small", lambda: nn.Linear(1, 1), mse_loss, load=lambda path: TensorDataset())
WORK = Work(TASK, Shard(TensorDataset(torch.ones(2, 1), torch.ones(2, 1)), None, 2))
HELLO = Hello(1, "alice", "this start", "small", "1", WORK.manifest, 2, "a test")


class Service(federation_pb2_grpc.FederationServicer):
    """Does what the test says."""

    def __init__(self, **calls: Callable[..., Any]) -> None:
        for name, call in calls.items():
            setattr(self, name, call)


@asynccontextmanager
async def reaching(**calls: Callable[..., Any]) -> AsyncIterator[GrpcTransport]:
    """A transport to a server with these calls, on loopback."""
    server = grpc.aio.server()
    federation_pb2_grpc.add_FederationServicer_to_server(Service(**calls), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    transport = GrpcTransport(f"127.0.0.1:{port}", None)
    try:
        async with asyncio.timeout(PATIENCE_S):
            yield transport
    finally:
        await transport.close()
        await server.stop(None)


def sending(*chunks: Any) -> Callable[..., Any]:
    async def download(request: pb.DownloadRequest, context: Any) -> AsyncIterator[pb.DownloadResponse]:
        assert (request.version, request.offset) == (3, 0)
        for chunk in chunks:
            yield pb.DownloadResponse(chunk=chunk)

    return download


async def test_a_download_is_put_together_from_its_chunks() -> None:
    async with reaching(Download=sending(*wire.chunks(memoryview(CONTENT)))) as transport:
        assert await transport.download(VERSION) == CONTENT


GOOD = list(wire.chunks(memoryview(CONTENT)))


@pytest.mark.parametrize(
    ("chunks", "words"),
    [
        ([], "arrived with another digest than was announced"),
        (GOOD[:1], "arrived with another digest than was announced"),
        ([*GOOD, GOOD[0]], "a chunk begins at byte 0 where byte 1049576 is next"),
        (GOOD[::-1], "a chunk begins at byte 1048576 where byte 0 is next"),
        (list(wire.chunks(memoryview(CONTENT + b"x"))), "1049577 bytes arrived where 1049576 were announced"),
        (list(wire.chunks(memoryview(CONTENT[:-1] + b"x"))), "arrived with another digest than was announced"),
        ([type(GOOD[0])(offset=0, data=b"x", crc32=1)], "the chunk at byte 0 does not match its CRC-32"),
    ],
)
async def test_a_download_that_is_not_what_was_announced_is_corrupt(chunks: list[Any], words: str) -> None:
    async with reaching(Download=sending(*chunks)) as transport:
        with pytest.raises(CorruptTransfer, match=words):
            await transport.download(VERSION)


HEADER = UploadHeader("run/0/alice", "alice", 5, Kind.TRAINING, len(CONTENT), (Metric("loss", 0.5, 3),), ())


async def test_an_upload_is_header_chunks_and_trailer() -> None:
    received: list[pb.UploadRequest] = []

    async def upload(requests: AsyncIterator[pb.UploadRequest], context: Any) -> pb.UploadResponse:
        received.extend([request async for request in requests])
        return pb.UploadResponse(verdict=pb.VERDICT_LATE, reason="the round has closed")

    async with reaching(Upload=upload) as transport:
        assert await transport.upload(HEADER, memoryview(CONTENT)) == Receipt(Verdict.LATE, "the round has closed")
    assert wire.header_from_pb(received[0].header) == HEADER
    assert b"".join(wire.verified(part.chunk, part.chunk.offset, len(CONTENT)) for part in received[1:-1]) == CONTENT
    assert received[-1].trailer.chunks == 2


async def test_errors_keep_their_names() -> None:
    async def upload(requests: AsyncIterator[pb.UploadRequest], context: Any) -> pb.UploadResponse:
        await abort(context, UpdateRefused("not that one"))

    async def attend(requests: AsyncIterator[pb.AttendRequest], context: Any) -> AsyncIterator[pb.AttendResponse]:
        await abort(context, NameTaken("alice attends already"))
        yield

    async with reaching(Upload=upload, Attend=attend) as transport:
        with pytest.raises(UpdateRefused, match="not that one"):
            await transport.upload(HEADER, memoryview(CONTENT))
        with pytest.raises(NameTaken, match="alice attends already"):
            async with transport.attend(HELLO) as stream:
                await anext(stream.heard())


async def test_nobody_there() -> None:
    async with reaching() as transport:
        address = transport._address
    transport = GrpcTransport(address, None)
    with pytest.raises(Unreachable, match=f"no coordinator answers at {address}"):
        async with asyncio.timeout(PATIENCE_S), transport.attend(HELLO) as stream:
            await anext(stream.heard())
    with pytest.raises(Unreachable):
        await transport.download(VERSION)
    with pytest.raises(Unreachable):
        await transport.upload(HEADER, memoryview(b""))
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
        yield wire.from_coordinator_to_pb(Welcome("run", 0.001, version))  # heartbeats in between
        for round in range(200):
            yield wire.from_coordinator_to_pb(Assignment(f"run/{round}/alice", round, version, plan))
            yield wire.from_coordinator_to_pb(Cancel(f"run/{round}/alice", "closed"))
        yield wire.from_coordinator_to_pb(ComeBack(None, "over"))
        async for _ in requests:  # as a real coordinator: the client closes the stream once it has heard that
            pass

    async def download(request: pb.DownloadRequest, context: Any) -> AsyncIterator[pb.DownloadResponse]:
        for chunk in wire.chunks(memoryview(model)):
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
