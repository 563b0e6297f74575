"""Child processes that never outlive their parent's work."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from choral.errors import ChoralError

_GRACE_S = 10.0


@dataclass(frozen=True)
class Child:
    """A process whose standard error goes to the file `log`."""

    name: str
    process: asyncio.subprocess.Process
    log: Path
    following: asyncio.Task[None]

    async def succeed(self) -> bytes:
        """Wait for the end; returns standard output. Raises ChoralError, with the log's last line, if the exit code is not 0."""
        output, code = await asyncio.gather(_read(self.process.stdout), self.process.wait())
        await self.following
        if code != 0:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines() or ["nothing was logged"]
            raise ChoralError(f"{self.name} ended with exit code {code}: {lines[-1]} (all of it: {self.log})")
        return output


class Children:
    """Starts processes of this Python; `async with started() as children` ends those that are still there at its end."""

    def __init__(self) -> None:
        self._all: list[Child] = []

    async def start(self, name: str, arguments: Sequence[str], log: Path, on_line: Callable[[str], None] | None = None) -> Child:
        """Run the module `arguments[0]` with the rest; each line of its standard error goes to `log` and to `on_line`."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "choral_deploy.tethered", str(os.getpid())),
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        child = Child(name, process, log, asyncio.create_task(_follow(process.stderr, log, on_line)))
        self._all.append(child)
        return child

    async def end(self) -> None:
        """Ask every process that still runs to end, and make sure that it does."""
        running = [child.process for child in self._all if child.process.returncode is None]
        for process in running:
            process.terminate()
        for process in running:
            try:
                async with asyncio.timeout(_GRACE_S):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()
        for child in self._all:
            child.following.cancel()
            with suppress(asyncio.CancelledError):
                await child.following


@asynccontextmanager
async def started() -> AsyncIterator[Children]:
    """Children that end with the context, however it is left."""
    children = Children()
    try:
        yield children
    finally:
        await asyncio.shield(children.end())


async def _follow(stream: asyncio.StreamReader | None, log: Path, on_line: Callable[[str], None] | None) -> None:
    if stream is None:
        return
    with log.open("w", encoding="utf-8", buffering=1) as file:
        async for raw in stream:
            line = raw.decode("utf-8", "replace")
            file.write(line)
            if on_line is not None:
                on_line(line)


async def _read(stream: asyncio.StreamReader | None) -> bytes:
    return await stream.read() if stream is not None else b""
