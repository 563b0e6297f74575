"""The floor under a round: how fast bare gRPC moves the same bytes between as many processes, to a server that throws them away.

It is measured by `rounds.py`, which starts this file as a server and as its clients. In each repetition all clients fetch so many
bytes, and then send as many, in messages of 1 MiB that nothing packs or looks at. The clock runs in the server, from the moment
when all clients have asked until the last byte of the last client has come.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
from choral.errors import ChoralError
from choral_deploy.processes import Child, started

MESSAGE_BYTES = 1 << 20
_DOWN, _UP = "/floor/Down", "/floor/Up"
_SERVER, _CLIENT = "server", "client"


async def floor_s(clients: int, size_bytes: int, repetitions: int, folder: Path, tls: bool) -> list[float]:
    """Seconds of each repetition. `folder` takes the logs; with `tls` it holds the keys and certificates of both sides.

    Raises ChoralError: a process failed.
    """
    try:
        return await _floor_s(clients, size_bytes, repetitions, folder, tls)
    except* ChoralError as failures:
        raise failures.exceptions[0] from None


async def _floor_s(clients: int, size_bytes: int, repetitions: int, folder: Path, tls: bool) -> list[float]:
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def listen(line: str) -> None:
        if not ready.done() and line.startswith("127."):
            ready.set_result(line.strip())

    rest = [str(clients), str(size_bytes), str(repetitions), str(folder) if tls else ""]
    async with started() as children, asyncio.TaskGroup() as processes:
        server = await children.start("floor", ["floor", _SERVER, "", *rest], folder / "floor.log", listen)
        told = processes.create_task(server.succeed())
        address = await _or_its_end(ready, told)
        for number in range(clients):
            name = f"floor-client-{number}"
            child: Child = await children.start(name, ["floor", _CLIENT, address, *rest], folder / f"{name}.log")
            processes.create_task(child.succeed())
    return list(json.loads(told.result()))


async def _or_its_end(ready: asyncio.Future[str], ended: asyncio.Task[bytes]) -> str:
    both: list[asyncio.Future[Any]] = [ready, ended]
    await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    if not ready.done():
        ended.result()  # raises what went wrong
    return await ready


async def serve(clients: int, size_bytes: int, repetitions: int, folder: Path | None) -> list[float]:
    """Be the server; returns the seconds of each repetition."""
    everybody = asyncio.Barrier(clients)
    begun, seconds = 0.0, list[float]()
    left = clients * repetitions
    over = asyncio.Event()

    async def down(_: bytes, context: Any) -> AsyncIterator[bytes]:
        nonlocal begun
        if await everybody.wait() == 0:
            begun = time.perf_counter()
        for piece in pieces(size_bytes):
            yield piece

    async def up(messages: AsyncIterator[bytes], context: Any) -> bytes:
        nonlocal left
        async for _ in messages:
            pass
        left -= 1
        if left % clients == 0:
            seconds.append(time.perf_counter() - begun)
        if left == 0:
            over.set()
        return b""

    server = grpc.aio.server()
    methods: dict[str, Any] = {"Down": grpc.unary_stream_rpc_method_handler(down), "Up": grpc.stream_unary_rpc_method_handler(up)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("floor", methods),))
    if folder is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        ca, certificate, key = (folder / name for name in ("ca.pem", "server.pem", "server.key"))
        pair = (key.read_bytes(), certificate.read_bytes())
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair], ca.read_bytes(), require_client_auth=True))
    await server.start()
    print(f"127.0.0.1:{port}", file=sys.stderr, flush=True)
    await over.wait()
    await server.stop(grace=5)
    return seconds


async def move(address: str, size_bytes: int, repetitions: int, folder: Path | None) -> None:
    """Be a client."""
    if folder is None:
        channel = grpc.aio.insecure_channel(address)
    else:
        ca, certificate, key = ((folder / name).read_bytes() for name in ("ca.pem", "client-0.pem", "client-0.key"))
        channel = grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(ca, key, certificate))
    async with channel:
        down: Any = channel.unary_stream(_DOWN)
        up: Any = channel.stream_unary(_UP)
        for _ in range(repetitions):
            async for _ in down(b"", wait_for_ready=True):
                pass
            await up(pieces(size_bytes))


def pieces(size_bytes: int) -> list[bytes]:
    """So many bytes in messages; all of them are one piece of memory."""
    whole, rest = divmod(size_bytes, MESSAGE_BYTES)
    piece = bytes(MESSAGE_BYTES)
    return [piece] * whole + ([piece[:rest]] if rest else [])


def main() -> None:
    """Be what the command line says."""
    what, address, clients, size_bytes, repetitions, folder = sys.argv[1:]
    keys = Path(folder) if folder else None
    if what == _SERVER:
        print(json.dumps(asyncio.run(serve(int(clients), int(size_bytes), int(repetitions), keys))))
    else:
        asyncio.run(move(address, int(size_bytes), int(repetitions), keys))


if __name__ == "__main__":
    main()
