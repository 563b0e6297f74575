"""Many lightweight clients in one process: each has its own name, certificate, connection and attendance stream.

They speak the real protocol over mTLS, and leave out what costs a client and not its coordinator: there is no task, no outbox, no
diary and no guard, and messages that never change are serialised once. What a round asks, they do: they say how far they are,
download the version unless it came with a message, and upload a result of their own.
"""

from __future__ import annotations

import asyncio
import hashlib
import heapq
import os
import random
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from choral import wire
from choral.errors import ChoralError
from choral.manifest import Manifest
from choral.messages import Heartbeat, Hello, Phase, Status, UploadHeader
from choral.plan import Kind
from choral.status import from_rpc
from choral.v1 import federation_pb2 as pb
from choral.v1 import model_pb2 as mb
from choral_server.open_files import allow
from choral_server.trust import CA_CERTIFICATE, CA_KEY, Authority
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

JOINING = 100  # clients that are connecting at a time
_DAY_S = 86_400.0
_LOOK_S = 0.005  # how often it is looked whether heartbeats are due
_OPTIONS = [("grpc.keepalive_time_ms", 30_000), ("grpc.initial_reconnect_backoff_ms", 100)]  # as the client's own
_BEAT = wire.from_client_to_pb(Heartbeat()).SerializeToString()


class Pass:
    """Makes each client's certificate, signed by the authority that the coordinator trusts. One key serves all."""

    def __init__(self, folder: Path) -> None:
        self._authority = Authority.load(folder / CA_CERTIFICATE, folder / CA_KEY)
        self._ca = (folder / CA_CERTIFICATE).read_bytes()
        key = ec.generate_private_key(ec.SECP256R1())
        self._public = key.public_key()
        self._key = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    def of(self, name: str) -> grpc.ChannelCredentials:
        """What the client of this name shows."""
        certificate = self._authority.certify(self._public, name, "device", _DAY_S, datetime.now(UTC))
        return grpc.ssl_channel_credentials(self._ca, self._key, certificate.public_bytes(Encoding.PEM))


class Client:
    """One session."""

    def __init__(self, name: str, address: str, credentials: grpc.ChannelCredentials) -> None:
        self.name = name
        self.channel = grpc.aio.secure_channel(address, credentials, options=_OPTIONS)
        self.call: Any = None
        self.heartbeat_s = 0.0
        self._held = -1  # the version that came with a message
        self._writing = asyncio.Lock()  # gRPC takes one message of a stream at a time

    async def attend(self, hello: bytes) -> None:
        """Open the stream, and wait for the welcome."""
        attend = self.channel.stream_stream("/choral.v1.Federation/Attend", None, pb.AttendResponse.FromString)
        self.call = attend()
        await self._write(hello)
        welcome = await self.call.read()
        self.heartbeat_s = welcome.welcome.heartbeat_s
        self.holds(welcome.welcome.version)

    def holds(self, version: mb.ModelVersion) -> bool:
        """Whether the client has a version that is announced: its content came with this message, or an earlier one."""
        if version.content:
            self._held = version.number
        return self._held == version.number

    async def say(self, assignment: str, phase: Phase) -> None:
        """Tell how the assignment goes."""
        await self._write(wire.from_client_to_pb(Status(assignment, phase)).SerializeToString())

    async def beat(self) -> None:
        """Say that it lives."""
        await self._write(_BEAT)

    async def close(self) -> None:
        """Leave."""
        if self.call is not None:
            self.call.cancel()
        await self.channel.close()

    async def _write(self, message: bytes) -> None:
        async with self._writing:
            await self.call.write(message)


class Swarm:
    """The clients. `announced_at` has, by round, when each of its cohort heard of it (the clock on the wall).

    In `versions` is what was published, once for all.
    """

    def __init__(self, folder: Path, address: str, task: tuple[str, str], manifest: Manifest, params: int) -> None:
        allow(0)  # each connection is an open file
        self.clients: list[Client] = []
        self.announced_at: defaultdict[int, list[float]] = defaultdict(list)
        self.versions: asyncio.Queue[int] = asyncio.Queue()
        self._pass = Pass(folder)
        self._address = address
        self._task = task
        self._manifest = manifest
        self._result = np.random.default_rng(1).normal(0, 1e-3, params).astype(np.float32)
        self._newest = 0
        self._due: list[tuple[float, int]] = []  # heartbeats: when, and of the client in which place
        self._rng = random.Random(1)
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._aside(self._beat())

    async def join(self, count: int, joined: Callable[[], None] = lambda: None) -> float:
        """So many more clients attend; the seconds that took, without making certificates."""
        first = len(self.clients)
        names = [f"session-{number}" for number in range(first, first + count)]
        fresh = [Client(name, self._address, self._pass.of(name)) for name in names]
        self.clients += fresh
        free = asyncio.Semaphore(JOINING)

        async def one(client: Client, place: int) -> None:
            async with free:
                await client.attend(self._hello(client.name))
            heapq.heappush(self._due, (time.monotonic() + self._rng.uniform(0.5, 1) * client.heartbeat_s, place))
            self._aside(self._listen(client))
            joined()

        began = time.perf_counter()
        await self.awaiting(asyncio.gather(*map(one, fresh, range(first, first + count))))
        return time.perf_counter() - began

    async def _beat(self) -> None:
        """Let each client say that it lives, as often as it was asked to."""
        while True:
            while self._due and self._due[0][0] <= time.monotonic():
                at, place = self._due[0]
                client = self.clients[place]
                heapq.heapreplace(self._due, (at + client.heartbeat_s, place))
                await client.beat()
            await asyncio.sleep(_LOOK_S)

    async def awaiting(self, what: Any) -> Any:
        """The result of `what`. Raises ChoralError: a session failed meanwhile."""
        doing = asyncio.ensure_future(what)
        await asyncio.wait({doing, self._failure}, return_when=asyncio.FIRST_COMPLETED)
        if self._failure.done():
            doing.cancel()
            self._failure.result()
        return doing.result()

    async def close(self) -> None:
        """All leave."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(client.close() for client in self.clients))

    def _hello(self, name: str) -> bytes:
        hello = Hello(wire.PROTOCOL_VERSION, name, os.urandom(8).hex(), *self._task, self._manifest, 10, "choral benchmark")
        return wire.from_client_to_pb(hello).SerializeToString()

    async def _listen(self, client: Client) -> None:
        while (said := await client.call.read()) is not grpc.aio.EOF:
            match said.WhichOneof("message"):
                case "assignment":
                    self.announced_at[said.assignment.round].append(time.time())
                    self._aside(self._work(client, said.assignment))
                case "new_version":
                    version = said.new_version.version
                    client.holds(version)
                    if version.number > self._newest:
                        self._newest = version.number
                        self.versions.put_nowait(self._newest)
                case "come_back":
                    await client.call.done_writing()
                    return
        await client.call  # raises what ended it

    async def _work(self, client: Client, assignment: pb.Assignment) -> None:
        """One part of a round. A version that came with a message need not be fetched."""
        version = assignment.version
        if not client.holds(version):
            await client.say(assignment.id, Phase.DOWNLOADING)
            download = client.channel.unary_stream("/choral.v1.Federation/Download", pb.DownloadRequest.SerializeToString, None)
            asked = pb.DownloadRequest(version=version.number, client=client.name)
            got = 0
            async for response in download(asked):
                got += len(wire.read_download(response).data)
            if got != version.size_bytes:
                raise ChoralError(f"{got} of {version.size_bytes} bytes were downloaded")
        await client.say(assignment.id, Phase.WORKING)
        payload = self._result.tobytes()
        digest = hashlib.sha256(payload).digest()
        await client.say(assignment.id, Phase.UPLOADING)
        header = UploadHeader(assignment.id, client.name, 10, Kind.TRAINING, len(payload), (), (), digest)
        upload = client.channel.stream_unary("/choral.v1.Federation/Upload", None, pb.UploadResponse.FromString)
        receipt = await upload(_requests(header, payload))
        if receipt.verdict not in (pb.VERDICT_ACCEPTED, pb.VERDICT_LATE):
            raise ChoralError(f"the result of {client.name} was not accepted: {receipt.reason}")

    def _aside(self, doing: Any) -> None:
        task = asyncio.ensure_future(doing)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None or self._failure.done():
            return
        if isinstance(error, grpc.aio.AioRpcError):
            error = from_rpc(error, self._address)
        self._failure.set_exception(error)


@asynccontextmanager
async def swarm(folder: Path, address: str, task: tuple[str, str], manifest: Manifest, params: int) -> AsyncIterator[Swarm]:
    """A swarm that leaves at the end; `task` is name and version."""
    made = Swarm(folder, address, task, manifest, params)
    try:
        yield made
    finally:
        await made.close()


def _requests(header: UploadHeader, payload: bytes) -> Iterator[bytes]:
    """The messages of an upload: one, if the payload is small."""
    if len(payload) <= wire.SMALL_BYTES:
        yield pb.UploadRequest(header=wire.header_to_pb(header, payload)).SerializeToString()
        return
    yield pb.UploadRequest(header=wire.header_to_pb(header)).SerializeToString()
    offsets = range(0, len(payload), wire.CHUNK_BYTES)
    for offset in offsets:
        yield wire.upload_frame(payload[offset : offset + wire.CHUNK_BYTES], offset)
    yield pb.UploadRequest(trailer=pb.UploadTrailer(chunks=len(offsets))).SerializeToString()
