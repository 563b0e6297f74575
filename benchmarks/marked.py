"""Processes of somebody else's deployment, known by a mark in their environment, which all that they start inherit (Linux)."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

_NAME = "CHORAL_BENCHMARK_MARK"
_SAMPLE_S = 0.2
_GRACE_S = 8.0
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Process:
    """One of them."""

    pid: int
    parent: int
    command: str


@dataclass
class Deployment:
    """Starts processes in `folder`, each with a log there, and watches the memory of the server's.

    They are those whose own command, or that of a process which they descend from, has the text `server` in it.
    """

    folder: Path
    server: str
    environment: Mapping[str, str]
    peak_bytes: int = 0
    mark: str = field(default_factory=lambda: secrets.token_hex(16))

    async def start(self, name: str, *command: object) -> asyncio.subprocess.Process:
        """Start one; what it says goes to a log of that name."""
        with (self.folder / f"{name}.log").open("wb") as log:
            return await asyncio.create_subprocess_exec(
                *map(str, command),
                cwd=self.folder,
                env={**os.environ, **self.environment, _NAME: self.mark},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def last_words(self, name: str) -> str:
        """The last line of a log."""
        lines = (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")

    def processes(self) -> dict[int, Process]:
        """All that run now, by id."""
        sought = f"{_NAME}={self.mark}".encode()
        found = {}
        for entry in Path("/proc").iterdir():
            with suppress(OSError, ValueError):
                if entry.name.isdecimal() and sought in (entry / "environ").read_bytes().split(b"\0"):
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
                    parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                    found[int(entry.name)] = Process(int(entry.name), parent, command)
        return found

    def sample(self) -> None:
        """Look at the server's memory: what each of its processes has for itself, and once the most that one shares.

        A peak between two looks is not seen, and shared pages are counted once: the figure is not above what is really taken.
        """
        processes = self.processes()
        own, shared = 0, 0
        for process in processes.values():
            if self._serves(process, processes):
                with suppress(OSError):
                    resident, common = map(int, Path(f"/proc/{process.pid}/statm").read_text().split()[1:3])
                    own, shared = own + resident - common, max(shared, common)
        self.peak_bytes = max(self.peak_bytes, (own + shared) * _PAGE_BYTES)

    def _serves(self, process: Process | None, processes: Mapping[int, Process]) -> bool:
        while process is not None:
            if self.server in process.command:
                return True
            process = processes.get(process.parent)
        return False

    async def watch(self) -> None:
        """Sample for ever."""
        while True:
            await asyncio.to_thread(self.sample)
            await asyncio.sleep(_SAMPLE_S)

    async def end(self) -> None:
        """Ask all of them to end, and make sure that they do."""
        for number, patience_s in ((signal.SIGTERM, _GRACE_S), (signal.SIGKILL, _GRACE_S)):
            until = asyncio.get_running_loop().time() + patience_s
            while (left := self.processes()) and asyncio.get_running_loop().time() < until:
                for pid in left:
                    with suppress(ProcessLookupError):
                        os.kill(pid, number)
                await asyncio.sleep(_SAMPLE_S)


@asynccontextmanager
async def deployed(folder: Path, server: str, environment: Mapping[str, str]) -> AsyncIterator[Deployment]:
    """A deployment whose processes all end with the context."""
    made = Deployment(folder, server, environment)
    watching = asyncio.create_task(made.watch())
    try:
        yield made
    finally:
        watching.cancel()
        await asyncio.shield(made.end())
