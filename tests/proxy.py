"""A bad link: a TCP proxy on loopback that can be cut, closed and hung, and that counts what goes through it."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self

PATIENCE_S = 90.0
_PIECE_BYTES = 16 << 10
_BUFFER_BYTES = 64 << 10  # of the sockets, so that little is on its way when the link is cut


class Proxy:
    """Forwards connections to `port` of this machine. Its loop runs in a thread; every method may be called from any thread.

    `port` is the proxy's own; `up` and `down` count the bytes taken from clients and from the other side, `connections` those
    accepted so far. The other side need not be there yet: connections are closed until it is, as on a link that leads nowhere.
    """

    def __init__(self, port: int = 0) -> None:
        self.target = port
        self.up = self.down = self.connections = 0
        self._cut_at: dict[str, list[int]] = {"up": [], "down": []}
        self._links: set[tuple[asyncio.StreamWriter, ...]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._news = threading.Condition()
        self._loop = asyncio.new_event_loop()
        self._flows = asyncio.Event()
        self._flows.set()
        self._socket = _listening(0)
        self.port: int = self._socket.getsockname()[1]
        self._server: asyncio.Server | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="proxy")

    def __enter__(self) -> Self:
        self._thread.start()
        self._do(self._open)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._do(self._end)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE_S)
        self._loop.close()

    @property
    def address(self) -> str:
        """Where clients connect to."""
        return f"127.0.0.1:{self.port}"

    def cut(self) -> None:
        """Break the connections that there are, with a reset on both sides; new ones are accepted."""
        self._do(self._break)

    def cut_at(self, *, up: Iterable[int] = (), down: Iterable[int] = ()) -> None:
        """Cut once `up` or `down` has reached each of these numbers; the piece that reaches it is lost."""
        with self._news:
            self._cut_at["up"] = sorted([*self._cut_at["up"], *up])
            self._cut_at["down"] = sorted([*self._cut_at["down"], *down])

    def refuse(self) -> None:
        """Break the connections that there are and accept no more: connecting fails at once."""
        self._do(self._close)

    def hang(self) -> None:
        """Keep the connections and accept new ones, but let no byte through, as a link does whose far end has vanished."""
        self._do(self._hold)

    def allow(self) -> None:
        """A good link again, after `refuse` or `hang`. What was held back goes on."""
        self._do(self._open)

    def wait(self, condition: Callable[[Self], bool]) -> None:
        """Until it is so of the counts, as in `proxy.wait(lambda it: it.up > 1000)`. For synchronous tests."""
        with self._news:
            assert self._news.wait_for(lambda: condition(self), PATIENCE_S), f"up {self.up}, down {self.down}"

    # In the loop

    def _do(self, action: Callable[[], Any]) -> None:
        async def act() -> None:
            await action()

        asyncio.run_coroutine_threadsafe(act(), self._loop).result(PATIENCE_S)

    async def _open(self) -> None:
        self._flows.set()
        if self._server is None:
            if self._socket.fileno() == -1:
                self._socket = _listening(self.port)
            self._server = await asyncio.start_server(self._accept, sock=self._socket)

    async def _hold(self) -> None:
        await self._open()
        self._flows.clear()

    async def _break(self) -> None:
        self._reset_all()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        self._socket.close()
        await self._break()

    async def _end(self) -> None:
        await self._close()
        await self._loop.shutdown_asyncgens()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        with self._news:
            self.connections += 1
            self._news.notify_all()
        link: tuple[asyncio.StreamWriter, ...] = (writer,)
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self.target, limit=_PIECE_BYTES)
            for end in (writer, back):
                _narrow(end)
            link = (writer, back)
            self._links.add(link)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._forward(reader, back, "up"))
                group.create_task(self._forward(there, writer, "down"))
        except* (OSError, asyncio.CancelledError):
            pass  # one of the ends has gone, or the link was cut
        finally:
            self._links.discard(link)
            self._tasks.discard(task)
            for end in link:
                _reset(end)

    def _count(self, way: str, size: int) -> bool:
        """Returns whether a cut is due."""
        with self._news:
            total = getattr(self, way) + size
            setattr(self, way, total)
            self._news.notify_all()
            due = [at for at in self._cut_at[way] if at <= total]
            self._cut_at[way] = self._cut_at[way][len(due) :]
            return bool(due)

    def _reset_all(self) -> None:
        for link in self._links:
            for end in link:
                _reset(end)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str) -> None:
        while True:
            await self._flows.wait()
            piece = await reader.read(_PIECE_BYTES)
            if not piece:
                break
            await self._flows.wait()
            if self._count(way, len(piece)):
                self._reset_all()
                raise ConnectionAbortedError
            writer.write(piece)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()


def _listening(port: int) -> socket.socket:
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)  # accepted connections inherit it
    made.bind(("127.0.0.1", port))
    return made


def _narrow(writer: asyncio.StreamWriter) -> None:
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
    writer.transport.set_write_buffer_limits(high=_PIECE_BYTES)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close it so that the other end meets ECONNRESET."""
    connection = writer.get_extra_info("socket")
    if not writer.transport.is_closing() and connection.fileno() != -1:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
