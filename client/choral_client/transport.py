"""How a client reaches its coordinator: the one seam between the device's life and the network."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Protocol

import grpc
from choral import wire
from choral.errors import CorruptTransfer, InvalidMessage, TrustError, Unreachable
from choral.identity import Credentials
from choral.messages import Form, FromClient, FromCoordinator, Hello, Receipt, UploadHeader, VersionRef
from choral.status import from_rpc
from choral.v1 import federation_pb2 as pb
from choral.v1 import federation_pb2_grpc

from choral_client.enrolment import tls

_OPTIONS = [
    ("grpc.max_receive_message_length", wire.MESSAGE_BYTES),
    ("grpc.http2.max_frame_size", wire.CHUNK_BYTES),  # or a chunk would come in sixty-four frames
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.initial_reconnect_backoff_ms", 100),  # the agent has a backoff of its own
    ("grpc.max_reconnect_backoff_ms", 1_000),
]
STALL_S = 30.0
_MOST_UNSAID = 256  # messages: a coordinator that asks and asks, and does not read the answers, must not fill the memory
_CAREFUL_BYTES = wire.CHUNK_BYTES // 4  # what a cut costs: gRPC takes one such piece and has the next in hand
_SERVICE = "/choral.v1.Federation/"
_GRACE_S = 60.0  # for transfers that are under way when the certificate changes
_TURN_STALLS = 20  # until the coordinator begins with a transfer, of which it takes so many at a time; keepalive finds out as well
_RECEIPT_STALLS = 4  # the coordinator may have to verify and store many results at once; keepalive finds out if it is gone


class Payload(Protocol):
    """Bytes, not all of which need be in memory."""

    def __len__(self) -> int:
        """How many."""

    def __getitem__(self, span: slice, /) -> bytes | memoryview:
        """Some of them."""


class Attendance(Protocol):
    """An open attendance stream."""

    async def say(self, message: FromClient) -> None:
        """Tell the coordinator. Raises Unreachable: the stream has ended; `heard` says why."""

    def heard(self) -> AsyncIterator[FromCoordinator]:
        """What the coordinator says, until it ends the stream. Raises Unreachable or a Refused."""


class Transport(Protocol):
    """The four calls of the contract."""

    def attend(self, hello: Hello) -> AbstractAsyncContextManager[Attendance]:
        """Open the stream with `hello`; leaving the context closes it."""

    def download(self, version: VersionRef, offset: int, form: Form | None = None) -> AsyncGenerator[bytes, None]:
        """The checkpoint file of a version, or one of its forms, from byte `offset` on, in verified pieces.

        The digest is for the caller to check.

        Raises Unreachable, CorruptTransfer or UnknownVersion.
        """

    async def upload(self, header: UploadHeader, payload: Payload) -> Receipt:
        """Send a result, of its payload the bytes from `header.offset` on. Raises Unreachable, CorruptTransfer or a Refused."""

    async def resume(self, header: UploadHeader) -> int | Receipt:
        """Where a broken upload goes on, or the receipt of one that need not. Raises Unreachable or a Refused."""


class GrpcTransport:
    """The contract over gRPC for `client`, with TLS unless it has no `credentials`.

    A transfer that stands still for `stall_s` is given up.
    """

    def __init__(self, address: str, credentials: Credentials | None, client: str, stall_s: float = STALL_S) -> None:
        self._address = address
        self._client = client
        self._stall_s = stall_s
        self._attending: Any = None
        self._closing: asyncio.Task[None] | None = None
        self._connect(credentials)

    def _connect(self, credentials: Credentials | None) -> None:
        self._expires_at = credentials.expires_at if credentials is not None else None
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(self._address, options=_OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(self._address, tls(credentials), options=_OPTIONS)
        self._stub: federation_pb2_grpc.FederationAsyncStub = federation_pb2_grpc.FederationStub(self._channel)  # type: ignore[assignment]
        self._download: Any = self._channel.unary_stream(f"{_SERVICE}Download", pb.DownloadRequest.SerializeToString)
        self._upload: Any = self._channel.stream_unary(f"{_SERVICE}Upload", None, pb.UploadResponse.FromString)
        # Of a stream of one message, gRPC makes the same as of a single message, which costs half as much.
        self._upload_whole: Any = self._channel.unary_unary(f"{_SERVICE}Upload", None, pb.UploadResponse.FromString)

    def show(self, credentials: Credentials) -> None:
        """From now on, show a newer certificate: the stream ends, to be opened again; transfers under way end on the old link."""
        before = self._channel
        self._connect(credentials)
        if self._attending is not None:
            self._attending.cancel()
        self._closing = asyncio.create_task(before.close(grace=_GRACE_S))

    async def close(self) -> None:
        """Close the connection."""
        if self._closing is not None:
            self._closing.cancel()
        await self._channel.close()

    @asynccontextmanager
    async def attend(self, hello: Hello) -> AsyncIterator[Attendance]:
        """Open the stream with `hello`; leaving the context closes it. Raises TrustError: the certificate has expired."""
        if self._expires_at is not None and self._expires_at < datetime.now(UTC):
            raise TrustError(
                f"this client's certificate expired on {self._expires_at:%Y-%m-%d %H:%M} UTC: enrol again with a new token from "
                "the coordinator's operator, and look at this device's clock"
            )
        call = self._attending = self._stub.Attend()
        try:
            stream = _GrpcAttendance(call, self._address)
            with suppress(Unreachable):  # `heard` tells what ended the stream
                await stream.say(hello)
            yield stream
            with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # it may have ended meanwhile
                await call.done_writing()
        finally:
            call.cancel()

    async def download(self, version: VersionRef, offset: int, form: Form | None = None) -> AsyncGenerator[bytes, None]:
        """The checkpoint file of a version, or one of its forms, from byte `offset` on, in verified pieces."""
        name, size_bytes = (form.name, form.size_bytes) if form is not None else ("", version.size_bytes)
        call = self._download(pb.DownloadRequest(version=version.number, offset=offset, client=self._client, form=name))
        try:
            await self._turn(call)
            while (message := await self._next(call)) is not None:
                piece = wire.verified(wire.read_download(message), offset, size_bytes)
                offset += len(piece)
                yield piece
        finally:
            call.cancel()
        if offset != size_bytes:
            raise CorruptTransfer(f"version {version.number} ended after {offset} of {size_bytes} bytes: fetch the rest")

    async def upload(self, header: UploadHeader, payload: Payload) -> Receipt:
        """Send a result, of its payload the bytes from `header.offset` on."""
        if len(payload) <= wire.SMALL_BYTES:
            whole = wire.header_to_pb(replace(header, offset=0), bytes(payload[:]))
            async with _named(self._address), self._moving(_RECEIPT_STALLS):
                return wire.receipt_from_pb(await self._upload_whole(_request(whole)))
        call = self._upload()
        interrupted = False
        try:
            async with _named(self._address):
                try:
                    async with self._moving():
                        await call.write(_request(wire.header_to_pb(header)))
                    await self._turn(call)
                    await self._pour(call, header.offset, payload)
                except (grpc.aio.AioRpcError, asyncio.InvalidStateError):  # broken, or the coordinator has answered already
                    interrupted = True
                async with self._moving(_RECEIPT_STALLS):
                    return wire.receipt_from_pb(await call)
        except Unreachable:
            # An answer that crosses a write may be lost in gRPC ("Internal error from Core"): ask for it.
            answer = await self.resume(header) if interrupted else 0
            if isinstance(answer, Receipt):
                return answer
            raise
        finally:
            call.cancel()

    async def resume(self, header: UploadHeader) -> int | Receipt:
        """Where a broken upload goes on, or the receipt of one that need not."""
        async with _named(self._address), self._moving():
            response = await self._stub.ResumeUpload(pb.ResumeUploadRequest(header=wire.header_to_pb(header)))
        answer = wire.resumption_from_pb(response)
        if isinstance(answer, int) and not 0 <= answer <= header.payload_bytes:
            raise InvalidMessage(f"asked to go on at byte {answer} of {header.payload_bytes}: update Choral on both sides")
        return answer

    async def _pour(self, call: Any, begin: int, payload: Payload) -> None:
        """Write the payload from byte `begin` on, piece by piece, so that little more has left than the coordinator has taken.

        Over a link that has broken before, the pieces are small: little of them is sent in vain when it breaks again.
        """
        size = wire.CHUNK_BYTES if begin == 0 else _CAREFUL_BYTES
        offsets = range(begin, len(payload), size)
        for offset in offsets:
            async with self._moving():
                await call.write(wire.upload_frame(bytes(payload[offset : offset + size]), offset))
        async with self._moving():
            await call.write(pb.UploadRequest(trailer=pb.UploadTrailer(chunks=len(offsets))).SerializeToString())
            await call.done_writing()

    async def _turn(self, call: Any) -> None:
        """Wait until the coordinator begins with a transfer, or ends it."""
        async with _named(self._address), self._moving(_TURN_STALLS):
            await call.initial_metadata()

    async def _next(self, call: Any) -> bytes | None:
        async with _named(self._address), self._moving():
            if (response := await call.read()) is not grpc.aio.EOF:
                return response  # type: ignore[no-any-return]
            if await call.code() is not grpc.StatusCode.OK:
                await call  # raises what ended it
            return None

    @asynccontextmanager
    async def _moving(self, stalls: int = 1) -> AsyncIterator[None]:
        """One step of a transfer, bounded in time."""
        try:
            async with asyncio.timeout(stalls * self._stall_s):
                yield
        except TimeoutError as error:
            raise Unreachable(
                f"the transfer with the coordinator at {self._address} has stood still for {stalls * self._stall_s:g} s"
            ) from error


@asynccontextmanager
async def _named(address: str) -> AsyncIterator[None]:
    """A failed call raises the ChoralError behind it."""
    try:
        yield
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise Unreachable(f"the call to the coordinator at {address} was cancelled") from error
    except grpc.aio.AioRpcError as error:
        raise from_rpc(error, address) from error


class _GrpcAttendance:
    def __init__(self, call: Any, address: str) -> None:
        self._call = call
        self._address = address
        self._writing = asyncio.Lock()
        self._unsaid = 0

    async def say(self, message: FromClient) -> None:
        if self._unsaid >= _MOST_UNSAID:
            raise Unreachable(f"the coordinator at {self._address} does not read what is said to it")
        # Shielded: gRPC cancels the whole stream with a write that is cancelled, and work may be withdrawn at any moment.
        writing = asyncio.ensure_future(self._write(message))
        self._unsaid += 1
        writing.add_done_callback(self._was_said)
        await asyncio.shield(writing)

    def _was_said(self, done: asyncio.Future[None]) -> None:
        self._unsaid -= 1
        if not done.cancelled():
            done.exception()  # nobody may be left to hear of a failure

    async def _write(self, message: FromClient) -> None:
        try:
            async with self._writing:
                await self._call.write(wire.from_client_to_pb(message))
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            raise Unreachable(f"the stream to the coordinator at {self._address} has ended") from error

    async def heard(self) -> AsyncIterator[FromCoordinator]:
        while (message := await self._read()) is not None:
            yield message

    async def _read(self) -> FromCoordinator | None:
        async with _named(self._address):
            if (response := await self._call.read()) is not grpc.aio.EOF:
                return wire.from_coordinator_from_pb(response)
            if await self._call.code() is not grpc.StatusCode.OK:
                await self._call  # raises what ended the stream
            return None


def _request(header: pb.UploadHeader) -> bytes:
    return pb.UploadRequest(header=header).SerializeToString()
