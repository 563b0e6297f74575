"""How a client reaches its coordinator: the one seam between the device's life and the network."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any, Protocol

import grpc
from choral import wire
from choral.errors import CorruptTransfer, Unreachable
from choral.messages import FromClient, FromCoordinator, Hello, Receipt, UploadHeader, VersionRef
from choral.status import from_rpc
from choral.v1 import federation_pb2 as pb
from choral.v1 import federation_pb2_grpc

_OPTIONS = [
    ("grpc.max_receive_message_length", wire.MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.initial_reconnect_backoff_ms", 100),  # the agent has a backoff of its own
    ("grpc.max_reconnect_backoff_ms", 1_000),
]


class Attendance(Protocol):
    """An open attendance stream."""

    async def say(self, message: FromClient) -> None:
        """Tell the coordinator. Raises Unreachable: the stream has ended; `heard` says why."""

    def heard(self) -> AsyncIterator[FromCoordinator]:
        """What the coordinator says, until it ends the stream. Raises Unreachable or a Refused."""


class Transport(Protocol):
    """The three calls of the contract."""

    def attend(self, hello: Hello) -> AbstractAsyncContextManager[Attendance]:
        """Open the stream with `hello`; leaving the context closes it."""

    async def download(self, version: VersionRef) -> bytes:
        """The checkpoint file of a version, verified. Raises Unreachable, CorruptTransfer or UnknownVersion."""

    async def upload(self, header: UploadHeader, payload: memoryview) -> Receipt:
        """Send a result. Raises Unreachable or CorruptTransfer."""


class GrpcTransport:
    """The contract over gRPC, with TLS unless `ca` is None."""

    def __init__(self, address: str, ca: bytes | None) -> None:
        self._address = address
        if ca is None:
            self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(ca), options=_OPTIONS)
        self._stub: federation_pb2_grpc.FederationAsyncStub = federation_pb2_grpc.FederationStub(self._channel)  # type: ignore[assignment]

    async def close(self) -> None:
        """Close the connection."""
        await self._channel.close()

    @asynccontextmanager
    async def attend(self, hello: Hello) -> AsyncIterator[Attendance]:
        """Open the stream with `hello`; leaving the context closes it."""
        call = self._stub.Attend()
        try:
            stream = _GrpcAttendance(call, self._address)
            with suppress(Unreachable):  # `heard` tells what ended the stream
                await stream.say(hello)
            yield stream
            with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # it may have ended meanwhile
                await call.done_writing()
        finally:
            call.cancel()

    async def download(self, version: VersionRef) -> bytes:
        """The checkpoint file of a version, verified."""
        content = bytearray()
        try:
            async for response in self._stub.Download(pb.DownloadRequest(version=version.number)):
                content += wire.verified(response.chunk, len(content), version.size_bytes)
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, self._address) from error
        if hashlib.sha256(content).digest() != version.digest:
            raise CorruptTransfer(f"version {version.number} arrived with another digest than was announced: fetch it again")
        return bytes(content)

    async def upload(self, header: UploadHeader, payload: memoryview) -> Receipt:
        """Send a result."""
        try:
            return wire.receipt_from_pb(await self._stub.Upload(_upload(header, payload)))
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, self._address) from error


class _GrpcAttendance:
    def __init__(self, call: Any, address: str) -> None:
        self._call = call
        self._address = address
        self._writing = asyncio.Lock()

    async def say(self, message: FromClient) -> None:
        # Shielded: gRPC cancels the whole stream with a write that is cancelled, and work may be withdrawn at any moment.
        writing = asyncio.ensure_future(self._write(message))
        writing.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be left to hear of a failure
        await asyncio.shield(writing)

    async def _write(self, message: FromClient) -> None:
        try:
            async with self._writing:
                await self._call.write(wire.from_client_to_pb(message))
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            raise Unreachable(f"the stream to the coordinator at {self._address} has ended") from error

    async def heard(self) -> AsyncIterator[FromCoordinator]:
        try:
            while (response := await self._call.read()) is not grpc.aio.EOF:
                yield wire.from_coordinator_from_pb(response)
            if await self._call.code() is not grpc.StatusCode.OK:
                await self._call  # raises what ended the stream
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise Unreachable(f"the stream to the coordinator at {self._address} was cancelled") from error
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, self._address) from error


def _upload(header: UploadHeader, payload: memoryview) -> Iterator[pb.UploadRequest]:
    yield pb.UploadRequest(header=wire.header_to_pb(header))
    count = 0
    for chunk in wire.chunks(payload):
        yield pb.UploadRequest(chunk=chunk)
        count += 1
    yield pb.UploadRequest(trailer=pb.UploadTrailer(chunks=count))
