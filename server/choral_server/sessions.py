"""Who attends now."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Iterator, Set
from dataclasses import dataclass, field

from choral.errors import InvalidMessage, ManifestMismatch, NameTaken, ProtocolMismatch, TaskMismatch
from choral.heads import Head
from choral.manifest import Manifest, first_difference
from choral.messages import FromCoordinator, Hello
from choral.names import ALLOWED, is_name


@dataclass(eq=False, slots=True)
class Session:
    """One client's open stream. What is said to the client waits in `outbox`, and `wake` is called when it grows, or the stream is
    closed: that ends once all is written.

    Of a client that does not read, no more than `unread` messages wait: then `stop` is called, and `fault` says why.
    `history` is the newest head that the client was handed before, `codecs` its abilities to send an update in fewer bytes,
    `heartbeat_s` how often it is asked to say that it lives, and `heard_at` when it was last heard, by the monotonic clock.
    """

    client: str
    instance: str
    software: str
    address: str
    unread: int
    stop: Callable[[], object] = lambda: None
    fault: str = ""
    history: Head | None = None
    codecs: tuple[str, ...] = ()
    heartbeat_s: float = 15.0
    heard_at: float = field(default_factory=time.monotonic)
    outbox: list[FromCoordinator] = field(default_factory=list)
    closed: bool = False
    wake: Callable[[], object] = lambda: None

    def say(self, message: FromCoordinator) -> None:
        """Send `message` when the stream can take it, unless it is closed."""
        if self.closed:
            return
        if len(self.outbox) < self.unread:
            self.outbox.append(message)
            self.wake()
        elif not self.fault:
            self.fault = f"it has left {self.unread} messages unread (limits.unread)"
            self.stop()

    def close(self) -> None:
        """End the stream after what was said."""
        self.closed = True
        self.wake()


class Sessions:
    """The open streams by client name, for clients of one task, which must offer what it `needs` (`Hello.codecs`)."""

    def __init__(self, task: str, task_version: str, manifest: Manifest, needs: Set[str] = frozenset()) -> None:
        self._needs = needs
        self._task = task
        self._task_version = task_version
        self._manifest = manifest
        self._open: dict[str, Session] = {}
        self._seen: set[str] = set()
        self._any_seen = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[Session]:
        return iter(tuple(self._open.values()))

    def admit(self, hello: Hello, address: str, unread: int = 256) -> Session:
        """Open a session. The same start of a client takes over from its own broken stream.

        Raises InvalidMessage, TaskMismatch, ManifestMismatch or NameTaken.
        """
        self.check(hello)
        if (before := self._open.get(hello.client)) is not None:
            before.close()
        session = Session(
            hello.client,
            hello.instance,
            hello.software,
            address,
            unread,
            history=hello.history,
            codecs=hello.codecs,
        )
        self._open[hello.client] = session
        self._seen.add(hello.client)
        self._any_seen.set()
        self._empty.clear()
        return session

    def leave(self, session: Session) -> bool:
        """End a session; False if another has taken its place."""
        session.close()
        if self._open.get(session.client) is not session:
            return False
        del self._open[session.client]
        if not self._open:
            self._empty.set()
        return True

    def present(self) -> tuple[str, ...]:
        """Names of the clients that attend."""
        return tuple(self._open)

    def codecs(self, client: str) -> tuple[str, ...]:
        """What a client can do to send an update in fewer bytes; nothing, if it does not attend."""
        session = self._open.get(client)
        return session.codecs if session is not None else ()

    def of(self, client: str) -> Session | None:
        """The session of a client, if it attends."""
        return self._open.get(client)

    def say(self, client: str, message: FromCoordinator) -> None:
        """Say something to a client, if it attends."""
        session = self._open.get(client)
        if session is not None:
            session.say(message)

    async def seen(self, clients: Collection[str]) -> None:
        """Wait until each of these has attended since the start."""
        while not self._seen.issuperset(clients):
            self._any_seen.clear()
            await self._any_seen.wait()

    async def emptied(self) -> None:
        """Wait until nobody attends."""
        await self._empty.wait()

    def check(self, hello: Hello) -> None:
        """See whether this client can take part.

        Raises InvalidMessage, TaskMismatch, ManifestMismatch, ProtocolMismatch or NameTaken.
        """
        if not is_name(hello.client):
            raise InvalidMessage(f"client name {hello.client[:80]!r}: use {ALLOWED}")
        if hello.task != self._task:
            raise TaskMismatch(f"this coordinator trains task {self._task}; client {hello.client} has {hello.task}: give it --task")
        if hello.task_version != self._task_version:
            raise TaskMismatch(
                f"this coordinator trains version {self._task_version} of task {self._task}; client {hello.client} has version "
                f"{hello.task_version}: install the same version of the task's code"
            )
        difference = first_difference(self._manifest, hello.manifest)
        if difference is not None:
            raise ManifestMismatch(
                f"the model of client {hello.client} is not the coordinator's: {difference}: "
                "install the same version of the task's code"
            )
        if missing := self._needs - set(hello.codecs):
            raise ProtocolMismatch(
                f"this coordinator sums results securely, and client {hello.client} does not offer {', '.join(sorted(missing))}: "
                "install the same release of Choral there"
            )
        before = self._open.get(hello.client)
        if before is not None and before.instance != hello.instance:
            raise NameTaken(f"a client named {hello.client} attends already, from {before.address}: give this one another name")
