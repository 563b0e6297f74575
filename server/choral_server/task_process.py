"""The process in which a task's code runs, as the coordinator starts it and talks to it: a length and JSON, each way.

Imports little, so that it can be started before anything else is imported: torch takes longer than all the rest.
"""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from typing import Any

from choral.errors import TaskProcessGone, by_name

_LENGTH_BYTES = 8


class TaskProcess:
    """A process of its own, which ends with this one, however that ends: it hears the socket close."""

    def __init__(self) -> None:
        self._connection, theirs = socket.socketpair()
        with theirs:
            self._process = launch(theirs.fileno())
        self._asking = asyncio.Lock()
        self._given_up = False
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    @property
    def running(self) -> bool:
        """Whether it still runs, and nobody has given up an answer."""
        return not self._given_up and self._process.poll() is None

    async def ask(self, what: str, **more: Any) -> Any:
        """The answer. Raises what it raised – a ChoralError or OSError –, or TaskProcessGone: it ended before it answered."""
        async with self._asking:
            try:
                told = await self._exchange({"what": what} | more)
            except asyncio.CancelledError:
                self._given_up = True  # or the next to ask would get this answer
                self._process.kill()
                raise
            except (EOFError, ConnectionError) as error:
                raise TaskProcessGone(f"the process that runs the task's code {await self._ending()}") from error
        if "answer" in told:
            return told["answer"]
        if told["error"] == "OSError":
            raise OSError(told["message"])
        raise by_name(told["error"])(told["message"])

    async def _exchange(self, asked: dict[str, Any]) -> dict[str, Any]:
        if self._streams is None:
            self._streams = await asyncio.open_connection(sock=self._connection)
        reader, writer = self._streams
        writer.write(_framed(asked))
        await writer.drain()
        length = int.from_bytes(await reader.readexactly(_LENGTH_BYTES), "big")
        told: dict[str, Any] = json.loads(await reader.readexactly(length))
        return told

    async def _ending(self) -> str:
        code = await asyncio.to_thread(self._process.wait)
        if code >= 0:
            return f"ended with exit code {code} before it answered: see what it printed"
        return f"was ended by {signal.Signals(-code).name} before it answered: see whether this machine has memory enough"

    def end(self) -> None:
        """Make it end; `gone` waits until it has."""
        if self._streams is not None:
            self._streams[1].close()
        else:
            self._connection.close()
        self._process.kill()
        threading.Thread(target=self._process.wait, daemon=True).start()  # its memory takes a while to be given back

    async def gone(self) -> None:
        """Wait until nothing is left of it."""
        await asyncio.to_thread(self._process.wait)


def launch(descriptor: int) -> subprocess.Popen[bytes]:
    """Start the process, which takes over this end of a socket."""
    command = [sys.executable, "-P", "-m", "choral_server.task_host", str(descriptor)]  # -P: the folder's modules are the task's
    return subprocess.Popen(command, pass_fds=[descriptor], stdin=subprocess.DEVNULL)


def send(connection: socket.socket, told: dict[str, Any]) -> None:
    """Say something to the other side; if it is gone, nobody wants to know."""
    with suppress(OSError):
        connection.sendall(_framed(told))


def received(connection: socket.socket) -> dict[str, Any] | None:
    """What the other side says next; None: it is gone."""
    if (length := _read(connection, _LENGTH_BYTES)) is None:
        return None
    content = _read(connection, int.from_bytes(length, "big"))
    told: dict[str, Any] | None = json.loads(content) if content is not None else None
    return told


def _read(connection: socket.socket, length: int) -> bytes | None:
    content = b""
    while len(content) < length:
        try:
            piece = connection.recv(length - len(content))
        except OSError:
            return None
        if not piece:
            return None
        content += piece
    return content


def _framed(told: dict[str, Any]) -> bytes:
    content = json.dumps(told).encode()
    return len(content).to_bytes(_LENGTH_BYTES, "big") + content
