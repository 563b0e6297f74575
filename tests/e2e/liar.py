"""A coordinator that lies: a man in the middle with its certificate, who changes what clients are told, or what they say.

A client cannot tell him from its coordinator. Behind him is a real one, so that its operators see what comes of a lie.
"""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from types import TracebackType
from typing import Any, Self

import grpc
from choral.identity import read_identity
from choral.v1 import federation_pb2 as pb
from choral_client.enrolment import tls
from e2e.federation import PATIENCE_S, Federation
from pieces import pieces

_SERVICE = "choral.v1.Federation"
_OPTIONS = [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 200)]
Told = pb.AttendResponse | bytes


class Lie:
    """What is done to one round: by default, nothing. Messages may be changed in place; `liar` says others besides."""

    liar: Liar
    models: dict[str, bytes]
    """what a client fetches in place of any version"""

    def __init__(self) -> None:
        self.models = {}

    def told(self, client: str, message: pb.AttendResponse) -> Iterable[Told]:
        """What the client is told when the coordinator tells it this."""
        return (message,)

    def said(self, client: str, message: pb.AttendRequest) -> Iterable[pb.AttendRequest]:
        """What the coordinator is told when the client says this."""
        return (message,)


class Liar:
    """Stands between. All but what `lies` was told of passes as it is. Runs in a thread of its own."""

    def __init__(self, federation: Federation) -> None:
        self._federation = federation
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="liar")
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._up: dict[str, asyncio.Queue[pb.AttendRequest | None]] = {}
        self._down: dict[str, asyncio.Queue[Told | grpc.aio.AioRpcError | None]] = {}
        self._lie, self._round = Lie(), -1
        self._news = threading.Condition()
        self.said: list[tuple[str, pb.AttendRequest]] = []
        """by clients, as they said it"""
        self.told: list[tuple[str, pb.AttendResponse]] = []
        """by the coordinator, as it said it"""
        self.sent: list[pb.UploadHeader] = []
        self.address = ""

    def __enter__(self) -> Self:
        self._thread.start()
        self._do(self._open)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._do(self._close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE_S)
        self._loop.close()

    def lies(self, lie: Lie, round: int) -> None:
        """From now on, about that round."""
        lie.liar = self
        self._lie, self._round = lie, round

    def tell(self, client: str, message: Told) -> None:
        """Tell a client something of one's own."""
        self._loop.call_soon_threadsafe(self._down[client].put_nowait, message)

    def say(self, client: str, message: pb.AttendRequest) -> None:
        """Say something to the coordinator in the name of a client."""
        self._loop.call_soon_threadsafe(self._up[client].put_nowait, message)

    def wait(self, condition: Callable[[], bool]) -> None:
        """Until it is so of what was said, told and sent."""
        with self._news:
            assert self._news.wait_for(condition, PATIENCE_S), f"{len(self.said)} messages, and it did not come to that"

    def heard(self, kind: str, round: int | None = None) -> list[tuple[str, Any]]:
        """What clients have said of this kind, by whom, in one round or in all."""
        found = [(client, getattr(one, kind)) for client, one in list(self.said) if one.WhichOneof("message") == kind]
        return [(client, one) for client, one in found if round is None or round_of(one.assignment) == round]

    def spoken(self, kind: str, round: int | None = None) -> list[tuple[str, Any]]:
        """What the coordinator has told clients of this kind, and whom."""
        found = [(client, getattr(one, kind)) for client, one in list(self.told) if one.WhichOneof("message") == kind]
        return [(client, one) for client, one in found if round is None or round_of(_assignment(one)) == round]

    # In the loop

    def _do(self, action: Callable[[], Any]) -> None:
        asyncio.run_coroutine_threadsafe(action(), self._loop).result(PATIENCE_S)

    async def _open(self) -> None:
        self._server = grpc.aio.server()
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Attend": grpc.stream_stream_rpc_method_handler(self._attend, pb.AttendRequest.FromString, _bytes),
            "Download": grpc.unary_stream_rpc_method_handler(self._download, pb.DownloadRequest.FromString, None),
            "Upload": grpc.stream_unary_rpc_method_handler(self._upload, pb.UploadRequest.FromString, None),
            "ResumeUpload": grpc.unary_unary_rpc_method_handler(self._resume, pb.ResumeUploadRequest.FromString, None),
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, handlers),))
        folder = self._federation.folder
        chain = ((folder / "server.key").read_bytes(), (folder / "server.pem").read_bytes())
        port = self._server.add_secure_port(
            "127.0.0.1:0", grpc.ssl_server_credentials([chain], (folder / "ca.pem").read_bytes(), True)
        )
        await self._server.start()
        self.address = f"127.0.0.1:{port}"

    async def _close(self) -> None:
        await self._server.stop(None)
        for channel in self._channels.values():
            await channel.close()

    def _channel(self, client: str) -> grpc.aio.Channel:
        """To the coordinator, as that client."""
        if client not in self._channels:
            known = read_identity(self._federation.folder / client / "client" / "identity")
            made = grpc.aio.secure_channel(self._federation.address, tls(known.credentials), options=_OPTIONS)
            self._channels[client] = made
        return self._channels[client]

    def _noted(self, where: list[Any], what: Any) -> None:
        with self._news:
            where.append(copy.deepcopy(what))
            self._news.notify_all()

    async def _attend(self, requests: AsyncIterator[pb.AttendRequest], context: Any) -> None:
        hello = await anext(requests)
        client = hello.hello.client
        attend: Any = self._channel(client).stream_stream(
            f"/{_SERVICE}/Attend", pb.AttendRequest.SerializeToString, pb.AttendResponse.FromString
        )
        call = attend()
        up: asyncio.Queue[pb.AttendRequest | None] = asyncio.Queue()
        down: asyncio.Queue[Told | grpc.aio.AioRpcError | None] = asyncio.Queue()
        self._up[client], self._down[client] = up, down
        up.put_nowait(hello)
        doing = [
            asyncio.create_task(one)
            for one in (self._hear(client, requests, up), self._pass_up(up, call), self._pass_down(client, call, down))
        ]
        try:
            while (message := await down.get()) is not None:
                if isinstance(message, grpc.aio.AioRpcError):
                    await _fail(context, message)
                await context.write(message)
        finally:
            for one in doing:
                one.cancel()
            call.cancel()

    async def _hear(
        self, client: str, requests: AsyncIterator[pb.AttendRequest], up: asyncio.Queue[pb.AttendRequest | None]
    ) -> None:
        async for message in requests:
            self._noted(self.said, (client, message))
            for one in self._lie.said(client, message) if self._concerns(message) else (message,):
                up.put_nowait(one)
        up.put_nowait(None)

    async def _pass_up(self, up: asyncio.Queue[pb.AttendRequest | None], call: Any) -> None:
        while (message := await up.get()) is not None:
            await call.write(message)
        await call.done_writing()

    async def _pass_down(self, client: str, call: Any, down: asyncio.Queue[Told | grpc.aio.AioRpcError | None]) -> None:
        try:
            while (message := await call.read()) is not grpc.aio.EOF:
                self._noted(self.told, (client, message))
                for one in self._lie.told(client, message) if self._concerns(message) else (message,):
                    down.put_nowait(one)
        except grpc.aio.AioRpcError as error:
            down.put_nowait(error)
        else:
            down.put_nowait(None)

    def _concerns(self, message: Any) -> bool:
        return round_of(_assignment(getattr(message, message.WhichOneof("message") or "", None))) == self._round

    async def _upload(self, requests: AsyncIterator[pb.UploadRequest], context: Any) -> bytes:
        messages = [message async for message in requests]  # the models of tests are small
        header = messages[0].header
        self._noted(self.sent, header)
        upload: Any = self._channel(header.client).stream_unary(f"/{_SERVICE}/Upload", pb.UploadRequest.SerializeToString)
        return await self._answered(upload(iter(messages)), context)

    async def _resume(self, request: pb.ResumeUploadRequest, context: Any) -> bytes:
        channel = self._channel(request.header.client)
        resume: Any = channel.unary_unary(f"/{_SERVICE}/ResumeUpload", pb.ResumeUploadRequest.SerializeToString)
        return await self._answered(resume(request), context)

    async def _answered(self, call: Any, context: Any) -> bytes:
        try:
            answer: bytes = await call
        except grpc.aio.AioRpcError as error:
            await _fail(context, error)
        return answer

    async def _download(self, request: pb.DownloadRequest, context: Any) -> None:
        if (model := self._lie.models.get(request.client)) is not None:
            for chunk in pieces(model, request.offset):
                await context.write(pb.DownloadResponse(chunk=chunk).SerializeToString())
            return
        download: Any = self._channel(request.client).unary_stream(f"/{_SERVICE}/Download", pb.DownloadRequest.SerializeToString)
        try:
            async for piece in download(request):
                await context.write(piece)
        except grpc.aio.AioRpcError as error:
            await _fail(context, error)


async def _fail(context: Any, error: grpc.aio.AioRpcError) -> None:
    await context.abort(error.code(), error.details() or "", tuple(error.trailing_metadata() or ()))


def _bytes(message: Told) -> bytes:
    return message if isinstance(message, bytes) else message.SerializeToString()


def _assignment(one: Any) -> str:
    named: str = one.id if isinstance(one, pb.Assignment) else getattr(one, "assignment", "")
    return named


def round_of(assignment: str) -> int:
    """Of an assignment's name, run/round/client/nonce; -1 if it is none."""
    parts = assignment.split("/")
    return int(parts[1]) if len(parts) > 1 and parts[1].isdigit() else -1
