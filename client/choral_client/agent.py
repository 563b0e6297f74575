"""The device's life: connect, wait, work, report; and again."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import structlog
from choral.errors import ChoralError, NameTaken, Unreachable
from choral.messages import (
    Assignment,
    Cancel,
    ComeBack,
    FromCoordinator,
    Heartbeat,
    Hello,
    NewVersion,
    Phase,
    Status,
    UploadHeader,
    Verdict,
    VersionRef,
    Welcome,
)
from choral.wire import CHUNK_BYTES

from choral_client.backoff import full_jitter
from choral_client.diary import Diary
from choral_client.thread import WorkThread
from choral_client.train import Stopped
from choral_client.transport import Attendance, Transport
from choral_client.work import Work

log = structlog.get_logger()
MODEL = "model.safetensors"
_ATTEMPTS = 4
T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """An assignment under way: setting `stop` ends its training at the next batch."""

    assignment: str
    task: asyncio.Task[None]
    stop: threading.Event

    def cancel(self) -> None:
        """End it."""
        self.stop.set()
        self.task.cancel()


class Agent:
    """One client. `hello` says who it is; `state` is its folder; `follow`: fetch each version when it is published."""

    def __init__(
        self,
        transport: Transport,
        hello: Hello,
        work: Work,
        state: Path,
        *,
        follow: bool = True,
        first_contact_s: float = 60.0,
        rng: random.Random | None = None,
    ) -> None:
        self._transport = transport
        self._hello = hello
        self._work = work
        self._model_path = state / MODEL
        self._diary = Diary(state)
        self._follow = follow
        self._first_contact_s = first_contact_s
        self._rng = rng or random.Random()  # noqa: S311 - spreads clients in time; nothing secret
        self._thread = WorkThread()
        self._fetching = asyncio.Lock()
        self._held: tuple[VersionRef, bytes] | None = None
        self._welcomed = False
        self._failures = 0
        self._job: Job | None = None
        self._follower: asyncio.Task[bytes] | None = None

    async def live(self) -> str:
        """Attend until the coordinator says that the run is over; returns what it says.

        Raises a Refused if the coordinator does not want this client, Unreachable if it never answered, TrustError if it is not the
        one that the client's `ca` vouches for.
        """
        began = time.monotonic()
        while True:
            try:
                farewell = await self._attend()
            except ChoralError as error:
                left_s = math.inf if self._welcomed else self._first_contact_s - (time.monotonic() - began)
                if left_s < 0 or not (error.retryable or isinstance(error, NameTaken)):
                    raise
                self._failures += 1
                pause_s = min(full_jitter(self._failures, self._rng), left_s)
                log.warning("no link to the coordinator", reason=str(error), again_in_s=round(pause_s, 2))
                self._diary.write("reconnecting", reason=str(error))
            else:
                if farewell.after_s is None:
                    log.info("the run is over", reason=farewell.reason)
                    self._diary.write("finished", reason=farewell.reason)
                    return farewell.reason
                pause_s = farewell.after_s + full_jitter(1, self._rng)
                log.info("sent away", reason=farewell.reason, again_in_s=round(pause_s, 2))
                self._diary.write("waiting to come back", reason=farewell.reason)
            await asyncio.sleep(pause_s)

    async def _attend(self) -> ComeBack:
        """One attendance, from hello to the coordinator's farewell."""
        async with self._transport.attend(self._hello) as stream:
            beat: asyncio.Task[None] | None = None
            try:
                async for message in stream.heard():
                    if isinstance(message, Welcome):
                        self._welcome(message)
                        beat = asyncio.create_task(self._beat(stream, message.heartbeat_s))
                    elif isinstance(message, ComeBack):
                        await self._finish_fetching()
                        return message
                    else:
                        self._hear(message, stream)
            finally:
                if beat is not None:
                    beat.cancel()
                if self._job is not None:
                    self._job.cancel()
        raise Unreachable("the coordinator ended the stream without a farewell")

    def _welcome(self, welcome: Welcome) -> None:
        self._welcomed, self._failures = True, 0
        log.info("attending", run=welcome.run, version=welcome.version.number)
        self._diary.write("attending", run=welcome.run)
        self._follow_to(welcome.version)

    def _hear(self, message: FromCoordinator, stream: Attendance) -> None:
        match message:
            case Assignment():
                if self._job is not None:
                    self._job.cancel()
                stop = threading.Event()
                self._job = Job(message.id, asyncio.create_task(self._answer(message, stream, stop)), stop)
            case Cancel(assignment, reason):
                if self._job is not None and self._job.assignment == assignment and not self._job.task.done():
                    log.info("no longer wanted", assignment=assignment, reason=reason)
                    self._job.cancel()
            case NewVersion(version):
                self._follow_to(version)

    def _follow_to(self, version: VersionRef) -> None:
        if self._follow:
            self._follower = asyncio.create_task(self._fetch_for_keeping(version))

    async def _answer(self, assignment: Assignment, stream: Attendance, stop: threading.Event) -> None:
        """Do an assignment and send the result, or say why not."""
        log.info("working", round=assignment.round, kind=assignment.plan.kind.value, version=assignment.version.number)
        try:
            if not self._holds(assignment.version):
                await stream.say(Status(assignment.id, Phase.DOWNLOADING))
            checkpoint = await self._obtain(assignment.version)
            await stream.say(Status(assignment.id, Phase.WORKING))
            result = await self._thread.do(partial(self._work.do, assignment.plan, checkpoint, stop))
            if len(result.payload) > CHUNK_BYTES:  # a small one arrives as soon as the word of it
                await stream.say(Status(assignment.id, Phase.UPLOADING))
            header = UploadHeader(
                assignment=assignment.id,
                client=self._hello.client,
                examples=self._hello.examples,
                kind=assignment.plan.kind,
                payload_bytes=len(result.payload),
                held_out=result.held_out,
                work=result.work,
            )
            receipt = await self._patiently("upload", lambda: self._transport.upload(header, result.payload))
        except ChoralError as error:
            await self._decline(assignment, stream, str(error))
        except Stopped:
            log.info("stopped working", round=assignment.round)
        except Exception as error:
            log.exception("work failed", round=assignment.round)
            await self._decline(assignment, stream, f"{type(error).__name__}: {error}")
        else:
            told = log.info if receipt.verdict is Verdict.ACCEPTED else log.warning
            measured = {metric.name: round(metric.value, 4) for metric in (*result.work, *result.held_out)}
            self._diary.write("attending", round=assignment.round)
            told("sent", round=assignment.round, verdict=receipt.verdict.value, reason=receipt.reason, **measured)

    async def _decline(self, assignment: Assignment, stream: Attendance, reason: str) -> None:
        log.warning("declined", round=assignment.round, reason=reason)
        with suppress(Unreachable):
            await stream.say(Status(assignment.id, Phase.DECLINED, reason))

    async def _patiently(self, what: str, transfer: Callable[[], Awaitable[T]]) -> T:
        """The result of a transfer, tried again if the link broke under it or damaged it."""
        for attempt in itertools.count(1):
            try:
                return await transfer()
            except ChoralError as error:
                if not error.retryable or attempt == _ATTEMPTS:
                    raise
                log.warning(f"{what} failed", reason=str(error), attempt=attempt)
                await asyncio.sleep(full_jitter(attempt, self._rng))
        raise AssertionError("count never ends")

    async def _obtain(self, version: VersionRef) -> bytes:
        """The checkpoint of a version: the one held, or a download that is then held. One at a time."""
        async with self._fetching:
            if self._held is None or not self._holds(version):
                content = await self._patiently("download", lambda: self._transport.download(version))
                self._held = version, content
                await self._thread.do(partial(_replace_file, self._model_path, content))
            return self._held[1]

    def _holds(self, version: VersionRef) -> bool:
        return self._held is not None and self._held[0] == version

    async def _fetch_for_keeping(self, version: VersionRef) -> bytes:
        try:
            return await self._obtain(version)
        except ChoralError as error:
            log.warning("new version not fetched", version=version.number, reason=str(error))
            return b""

    async def _finish_fetching(self) -> None:
        if self._follower is not None:
            await self._follower

    async def _beat(self, stream: Attendance, heartbeat_s: float) -> None:
        with suppress(Unreachable):  # the reader of the stream meets the same end, and says so
            while True:
                await asyncio.sleep(heartbeat_s)
                self._diary.write("working" if self._job is not None and not self._job.task.done() else "attending")
                await stream.say(Heartbeat())


def _replace_file(path: Path, content: bytes) -> None:
    aside = path.with_suffix(".part")
    aside.write_bytes(content)
    aside.replace(path)
