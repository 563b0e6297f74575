"""The Federation servicer: translate, check the bytes, call the coordinator. No decisions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import structlog
from choral import wire
from choral.errors import (
    ArtifactsGone,
    ChoralError,
    ConfigError,
    CorruptTransfer,
    InvalidMessage,
    LimitExceeded,
    NotAllowed,
    UnknownVersion,
    Unreachable,
    UpdateRefused,
)
from choral.frames import Piece
from choral.messages import ComeBack, Hello, Receipt, Status, UploadHeader, Verdict, Welcome
from choral.status import abort
from choral.sum_messages import SumAdvert, SumRevealed, SumShares, SumSignature
from choral.v1 import federation_pb2 as pb
from choral.v1 import federation_pb2_grpc

from choral_server.access import CALL, Call
from choral_server.announcements import Announcements, Contents
from choral_server.caller import CALLER
from choral_server.collection import Collection
from choral_server.config import Limits
from choral_server.coordinator import Coordinator
from choral_server.frames import Frames
from choral_server.intake import check_payload
from choral_server.offload import offload
from choral_server.rounds import Upload
from choral_server.run import Run
from choral_server.sessions import Session, Sessions
from choral_server.transfers import Transfer, Transfers
from choral_server.version_forms import path_of

log = structlog.get_logger()
Context = grpc.aio.ServicerContext[Any, Any]
_SILENT_BEATS = 3  # heartbeats that may be missing


def handler_of(service: FederationService) -> grpc.GenericRpcHandler:
    """The service as gRPC serves it. Unlike with the generated code, chunks pass as encoded bytes: see `choral.frames`."""
    methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Attend": grpc.stream_stream_rpc_method_handler(
            service.Attend, pb.AttendRequest.FromString, pb.AttendResponse.SerializeToString
        ),
        "Download": grpc.unary_stream_rpc_method_handler(service.Download, pb.DownloadRequest.FromString, None),
        "Upload": grpc.stream_unary_rpc_method_handler(service.Upload, None, pb.UploadResponse.SerializeToString),
        "ResumeUpload": grpc.unary_unary_rpc_method_handler(
            service.ResumeUpload, pb.ResumeUploadRequest.FromString, pb.ResumeUploadResponse.SerializeToString
        ),
    }
    return grpc.method_handlers_generic_handler("choral.v1.Federation", methods)


class FederationService(federation_pb2_grpc.FederationServicer):
    """What clients reach."""

    def __init__(self, coordinator: Coordinator, sessions: Sessions, transfers: Transfers, limits: Limits) -> None:
        self._coordinator = coordinator
        self._attendance = coordinator.attendance
        self._sessions = sessions
        self._transfers = transfers
        self._limits = limits
        self._frames = Frames()
        self._contents = Contents(lambda number: coordinator.run.checkpoints.path(number))

    async def Attend(self, requests: AsyncIterator[pb.AttendRequest], context: Context) -> None:  # type: ignore[override]
        """Admit the client, then pass on what is said until either side ends the stream."""
        try:
            session = await self._admit(requests, context.peer())
        except ChoralError as error:
            log.warning("client refused", address=context.peer(), reason=str(error))
            await abort(context, error)
        if isinstance(session, ComeBack):
            await context.write(wire.from_coordinator_to_pb(session))
            return
        call = CALL.get()
        session.stop = lambda: call.end(LimitExceeded(f"{session.client}: {session.fault}"))
        voice, why = Voice(session, context, call, Announcements(self._contents)), "the link broke"
        try:
            await voice.begin(self._attendance.joined(session, self._coordinator.run))
            try:
                await self._listen(session, requests, call)
                why = "it left"
            finally:
                voice.ends_call = False
                session.close()
            await voice.finish()
        except ChoralError as error:
            why = str(error)
            await voice.finish()
            await abort(context, error)
        except asyncio.CancelledError:
            if call.error is not None or not voice.finished:
                raise
            call.task.uncancel()  # it was we who closed it, and all is said
        finally:
            voice.stop()
            if self._sessions.leave(session):
                self._attendance.left(session, session.fault or (str(call.error) if call.error is not None else why))

    async def Download(self, request: pb.DownloadRequest, context: Context) -> None:  # type: ignore[override]
        """Send a checkpoint file's bytes as they lie."""
        run, client = self._coordinator.run, request.client
        try:
            if client:
                CALLER.get().must_be(client)
            path = await _file_of(run, request)
            size = path.stat().st_size
            if not 0 <= request.offset <= size:
                raise InvalidMessage(
                    f"offset {request.offset} is outside the {size} bytes of version {request.version}: begin at 0"
                )
            async with self._transfers.turn(client, size - request.offset) as transfer:
                with path.open("rb") as file:  # not before: who waits holds no file
                    await context.send_initial_metadata(())
                    for offset in range(request.offset, size, wire.CHUNK_BYTES):
                        frame = await self._frames.frame(file, offset)
                        async with asyncio.timeout(run.settings.stall_s):  # or who does not read would hold on to a turn and a file
                            await context.write(frame)
                        transfer.moved(len(frame))
        except (ArtifactsGone, NotAllowed, InvalidMessage) as error:
            await abort(context, error)
        except (ConfigError, FileNotFoundError):
            what = f"{wire.brief(request.form)} of version" if request.form else "version"
            await abort(context, UnknownVersion(f"{what} {request.version} is not kept any more: ask for the one announced last"))
        except TimeoutError:
            told = f"nothing of version {request.version} was read for {run.settings.stall_s:g} s: fetch the rest"
            log.warning("download broken", client=client, address=context.peer(), reason=told)
            await abort(context, Unreachable(told))

    async def Upload(self, requests: AsyncIterator[bytes], context: Context) -> pb.UploadResponse:  # type: ignore[override]
        """Take in one result and answer with its receipt."""
        try:
            first = await _next(requests, self._limits.first_message_s)
            if not isinstance(first, pb.UploadRequest) or first.WhichOneof("message") != "header":
                raise InvalidMessage("an upload begins with its header")
            header = _header(first.header)
            return wire.receipt_to_pb(await self._take(header, first.header.content, requests, context))
        except ChoralError as error:
            log.warning("upload broken", address=context.peer(), reason=str(error))
            await abort(context, error)

    async def ResumeUpload(self, request: pb.ResumeUploadRequest, context: Context) -> pb.ResumeUploadResponse:
        """Say whether a result is still wanted, and how much of it is here."""
        try:
            header = _header(request.header)
            answer = await self._attendance.expects(header)
            return wire.resumption_to_pb(answer.spool.held(header) if isinstance(answer, Collection) else answer)
        except UpdateRefused as error:
            return wire.resumption_to_pb(Receipt(Verdict.REFUSED, str(error)))
        except ChoralError as error:
            await abort(context, error)

    async def _admit(self, requests: AsyncIterator[pb.AttendRequest], address: str) -> Session | ComeBack:
        try:
            async with asyncio.timeout(self._limits.first_message_s):
                first = await anext(requests, None)
        except TimeoutError:
            raise LimitExceeded(f"no hello came within {self._limits.first_message_s:g} s (limits.first_message_s)") from None
        hello = wire.from_client_from_pb(first) if first is not None else None
        if not isinstance(hello, Hello):
            raise InvalidMessage("an attendance begins with a hello")
        CALLER.get().must_be(hello.client)
        if self._coordinator.draining:
            raise Unreachable("the coordinator is about to end: it is there again when it has been restarted")
        self._sessions.check(hello)
        if (come_back := self._attendance.seat(hello, address)) is not None:
            return come_back
        return self._sessions.admit(hello, address, self._limits.unread)

    async def _listen(self, session: Session, requests: AsyncIterator[pb.AttendRequest], call: Call) -> None:
        """Read what the client says until it stops, or breaks the contract; end the call if it falls silent."""
        silence = Silence(session, call)
        try:
            while (request := await anext(requests, None)) is not None:
                session.heard_at = time.monotonic()
                match wire.from_client_from_pb(request):
                    case Status() as status:
                        self._attendance.reported(session, status)
                    case Hello():
                        raise InvalidMessage("a second hello on one stream")
                    case SumAdvert() | SumShares() | SumSignature() | SumRevealed() as word:
                        self._attendance.said(session, word)
        finally:
            silence.end()

    async def _take(self, header: UploadHeader, content: bytes, requests: AsyncIterator[bytes], context: Context) -> Receipt:
        """Store an upload, check it, and offer it to the round."""
        try:
            collection = await self._attendance.expects(header)
            if isinstance(collection, Receipt):
                told = {"verdict": collection.verdict.value, "reason": collection.reason}
                log.info("upload not wanted", client=header.client, assignment=header.assignment, **told)
                return collection
            try:
                if content or not header.payload_bytes:
                    path = await collection.spool.store_whole(header, content)
                else:
                    path = await self._receive(collection, header, requests, context)
            except CorruptTransfer as error:
                collection.corrupt(header, str(error))
                raise
            try:
                bounds = collection.bounds()
                size_bytes = max(header.payload_bytes, 4 * bounds.size)  # a few bytes may stand for all of the model
                await offload(size_bytes, check_payload, header, path, bounds)
            except UpdateRefused as error:
                collection.spool.discard(path)
                collection.reject(header, str(error))
                raise
            except FileNotFoundError as error:
                raise Unreachable("another attempt to send this result was faster: ask what became of it") from error
        except UpdateRefused as error:
            return Receipt(Verdict.REFUSED, str(error))
        return await collection.submit(
            Upload(
                header.assignment,
                header.client,
                header.examples,
                header.held_out,
                header.work,
                header.digest,
                path,
                header.payload_bytes,
            )
        )

    async def _receive(
        self, collection: Collection, header: UploadHeader, requests: AsyncIterator[bytes], context: Context
    ) -> Path:
        """Take in a payload that comes in pieces, when it is its turn. Raises LimitExceeded, and as `RoundSpool.store`."""
        async with self._transfers.turn(header.client, max(0, header.payload_bytes - header.offset)) as transfer:
            if collection.expects(header) is not None:  # it has ended while we waited
                raise Unreachable("the round ended while the result waited for its turn: ask what became of it")
            await context.send_initial_metadata(())  # the client waits for this
            try:
                async with asyncio.timeout(collection.longest_s):
                    return await collection.spool.store(header, self._pieces(header, requests, transfer))
            except TimeoutError:
                raise LimitExceeded(f"the upload took longer than a round may: {collection.longest_s:g} s") from None

    async def _pieces(self, header: UploadHeader, requests: AsyncIterator[bytes], transfer: Transfer) -> AsyncIterator[bytes]:
        """The verified bytes of an upload's chunks, up to its trailer. Raises CorruptTransfer, InvalidMessage or Unreachable."""
        received, count, stall_s = header.offset, 0, self._coordinator.run.settings.stall_s
        while (message := await _next(requests, stall_s)) is not None:
            if isinstance(message, Piece):
                length = len(message.data)
                if length > self._limits.chunk_bytes:
                    raise LimitExceeded(f"a chunk of {length} bytes: at most {self._limits.chunk_bytes} (limits.chunk_bytes)")
                yield wire.verified(message, received, header.payload_bytes)
                received += length
                count += 1
                transfer.moved(length)
            elif message.WhichOneof("message") != "trailer":
                raise InvalidMessage("an upload is one header, its chunks, and one trailer")
            elif message.trailer.chunks != count:
                raise CorruptTransfer(f"{count} chunks arrived where {message.trailer.chunks} were sent: send it again")
            else:
                return
        raise Unreachable("the upload ended without its trailer: send the rest")


async def _file_of(run: Run, request: pb.DownloadRequest) -> Path:
    """The file that is asked for; the newest is fetched, should the copy here be lost. Raises ArtifactsGone or ConfigError."""
    if request.version == run.version.number:
        path = await run.checkpoints.fetch(request.version)
    else:
        path = run.checkpoints.path(request.version)
    return path_of(path, request.form) if request.form else path


def _header(message: pb.UploadHeader) -> UploadHeader:
    """The header of the caller's own upload. Raises InvalidMessage or NotAllowed."""
    header = wire.header_from_pb(message)
    CALLER.get().must_be(header.client)
    return header


async def _next(requests: AsyncIterator[bytes], stall_s: float) -> Piece | pb.UploadRequest | None:
    try:
        async with asyncio.timeout(stall_s):
            message = await anext(requests, None)
        return wire.read_upload(message) if message is not None else None
    except TimeoutError:
        raise Unreachable(f"nothing of the upload arrived for {stall_s:g} s: send the rest") from None


class Voice:
    """Writes what is said to a session: in a task that is there only while there is something to write.

    Once the session is closed and all is written, it has `finished`, and ends the call if that is to end with it (`ends_call`).
    """

    def __init__(self, session: Session, context: Context, call: Call, announcements: Announcements) -> None:
        self._session = session
        self._context = context
        self._call = call
        self._announcements = announcements
        self._writing: asyncio.Task[None] | None = None
        self._broken = False
        self.finished = False
        self.ends_call = True

    async def begin(self, welcome: Welcome) -> None:
        """Say the welcome, and from then on what waits in the outbox."""
        await self._context.write(wire.from_coordinator_to_pb(self._announcements.complete(welcome)))
        self._session.wake = self._wake
        self._wake()

    async def finish(self) -> None:
        """Wait until all is written."""
        while self._writing is not None:
            await asyncio.wait([self._writing])

    def stop(self) -> None:
        """Write no more."""
        self._session.wake = lambda: None
        if self._writing is not None:
            self._writing.cancel()

    def _wake(self) -> None:
        done = self.finished or self._broken
        if not done and self._writing is None and (self._session.outbox or self._session.closed):
            self._writing = asyncio.create_task(self._write())
            self._writing.add_done_callback(self._written)

    async def _write(self) -> None:
        outbox = self._session.outbox
        while outbox:
            await self._context.write(wire.from_coordinator_to_pb(self._announcements.complete(outbox[0])))
            del outbox[0]

    def _written(self, writing: asyncio.Task[None]) -> None:
        self._writing = None
        if writing.cancelled() or writing.exception() is not None:
            self._broken = True  # the call has ended, and whoever reads hears of it
        elif self._session.outbox:
            self._wake()
        elif self._session.closed:
            self.finished = True
            if self.ends_call:
                self._call.task.cancel()


class Silence:
    """Ends the call of a session that says nothing for too long: one timer, which looks again when that may have happened."""

    def __init__(self, session: Session, call: Call) -> None:
        self._session = session
        self._call = call
        self._longest_s = _SILENT_BEATS * session.heartbeat_s
        self._timer = self._again_in(self._longest_s)

    def end(self) -> None:
        """Look no more."""
        self._timer.cancel()

    def _again_in(self, seconds: float) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(seconds, self._look)

    def _look(self) -> None:
        left_s = self._session.heard_at + self._longest_s - time.monotonic()
        if left_s > 0:
            self._timer = self._again_in(left_s)
            return
        # not the client's fault if a machine was suspended, its own or ours: it may come back
        told = f"nothing heard for {self._longest_s:g} s; heartbeats are due three times as often"
        self._call.end(Unreachable(told))
