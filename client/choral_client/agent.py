"""The device's life: connect, wait, work, report; and again."""

from __future__ import annotations

import asyncio
import hashlib
import math
import random
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from io import BufferedIOBase
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import structlog
from choral.codecs import MASKED, Codec, abilities, parse
from choral.errors import ChoralError, Declined, InvalidMessage, NameTaken, Unreachable
from choral.heads import Head
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
from choral.plan import Kind
from choral.secagg.masks import Mask
from choral.secagg.roster import Signer, Vouch
from choral.secagg.summand import Summand
from choral.sum_messages import FromSummand, SumRoster, SumShares, SumSignatures, SumSurvivors, ToSummand
from choral.wire import brief

from choral_client.backoff import CAP_S, Patience, full_jitter
from choral_client.delivery import Deliveries
from choral_client.diary import Diary
from choral_client.guard_file import GuardFile
from choral_client.heads import Heads
from choral_client.model_file import ModelFile
from choral_client.outbox import Outbox, Parcel
from choral_client.oversight import Oversight
from choral_client.privacy_book import hidden_by
from choral_client.residual import About, Feedback, Residual
from choral_client.sums import Sums
from choral_client.thread import WorkThread
from choral_client.train import Stopped
from choral_client.transport import Attendance, Payload, Transport
from choral_client.work import Work

log = structlog.get_logger()
T = TypeVar("T")
_AT_ONCE_S = 0.05
_EAGER_S = 1.0  # the longest pause before the first contact: both may have been started together, and this lasts a minute at most
_WORK_FAILED = "the work failed on this device, whose log says why: in such a round nothing that its data causes is told"
_LAST_RECEIPTS_S = 1.0  # how long a run that is over waits for what is being answered


@dataclass(frozen=True)
class Job:
    """An assignment under way. It outlives the stream that it came on: setting `stop` ends its training at the next batch."""

    assignment: str
    stop: threading.Event
    task: asyncio.Task[None]

    @property
    def goes_on(self) -> bool:
        """Whether it has neither ended nor been told to."""
        return not self.stop.is_set() and not self.task.done()

    def cancel(self) -> None:
        """End it."""
        self.stop.set()
        self.task.cancel()


class Agent:
    """One client. `hello` says who it is; `state` is its folder; `follow`: fetch each version when it is published.

    `oversight` asks the device's guard, by default the one in `state`, before anything is fetched, done or sent. In secure sums it
    signs with `signer`, and `vouch` knows the others' keys.
    """

    def __init__(
        self,
        transport: Transport,
        hello: Hello,
        work: Work,
        state: Path,
        *,
        follow: bool = True,
        first_contact_s: float = 60.0,
        longest_pause_s: float = CAP_S,
        rng: random.Random | None = None,
        oversight: Oversight | None = None,
        signer: Callable[[], Signer] | None = None,
        vouch: Vouch | None = None,
    ) -> None:
        self._transport = transport
        self._hello = hello
        self._work = work
        self._oversight = oversight or Oversight(GuardFile(state), state)
        self._diary = Diary(state)
        self._heads = Heads(state)
        self._follow = follow
        self._first_contact_s = first_contact_s
        self._rng = rng or random.Random()  # noqa: S311 - spreads clients in time; nothing secret
        self._thread = WorkThread()
        self._patience = Patience(self._rng, longest_pause_s)
        self._longest_pause_s = longest_pause_s
        self._models = ModelFile(transport, state, self._patience, work.expected)
        self._outbox = Outbox(state / "outbox")
        self._residual = Residual(state)
        self._sums = Sums(hello.client, state, self._oversight, signer, vouch, self._say_in_sum)
        self._deliveries = Deliveries(
            transport, self._outbox, self._patience, self._report, self._oversight.permit_sending, self._residual.settle
        )
        self._run = ""
        self._stream: Attendance | None = None
        self._status: Status | None = None
        self._welcomed = False
        self._failures = 0
        self._job: Job | None = None
        self._follower: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def live(self) -> str:
        """Attend until the coordinator says that the run is over; returns what it says.

        Raises a Refused if the coordinator does not want this client, Unreachable if it never answered, TrustError if it is not the
        one that the client's `ca` vouches for.
        """
        try:
            return await self._live()
        finally:
            await self._stop()

    async def _live(self) -> str:
        began = time.monotonic()
        while True:
            try:
                farewell = await self._attend()
            except ChoralError as error:
                left_s = math.inf if self._welcomed else self._first_contact_s - (time.monotonic() - began)
                if left_s < 0 or not (error.retryable or isinstance(error, NameTaken)):
                    raise
                self._failures += 1
                longest_s = self._longest_pause_s if self._welcomed else min(_EAGER_S, self._longest_pause_s)
                pause_s = min(full_jitter(self._failures, self._rng, longest_s), left_s)
                log.warning("no link to the coordinator", reason=brief(str(error)), again_in_s=round(pause_s, 2))
                self._diary.write("reconnecting", reason=brief(str(error)))
            else:
                if farewell.after_s is None:
                    log.info("the run is over", reason=farewell.reason)
                    self._diary.write("finished", reason=farewell.reason)
                    return farewell.reason
                pause_s = farewell.after_s + full_jitter(1, self._rng, self._longest_pause_s)
                log.info("sent away", reason=farewell.reason, again_in_s=round(pause_s, 2))
                self._diary.write("waiting to come back", reason=farewell.reason)
            await asyncio.sleep(pause_s)

    async def _attend(self) -> ComeBack:
        """One attendance, from hello to the coordinator's farewell."""
        async with self._transport.attend(replace(self._hello, history=self._heads.newest)) as stream:
            self._stream = stream
            beat: asyncio.Task[None] | None = None
            try:
                async for message in stream.heard():
                    if isinstance(message, Welcome):
                        if beat is not None:
                            raise InvalidMessage("the coordinator welcomes this client twice on one stream")
                        self._welcome(message)
                        beat = asyncio.create_task(self._beat(stream, message.heartbeat_s))
                    elif isinstance(message, ComeBack):
                        await self._finish(message.after_s)
                        return message
                    else:
                        await self._hear(message)
            finally:
                self._stream = None
                if beat is not None:
                    beat.cancel()
        raise Unreachable("the coordinator ended the stream without a farewell")

    def _welcome(self, welcome: Welcome) -> None:
        self._welcomed, self._failures, self._run = True, 0, welcome.run
        log.info("attending", run=welcome.run, version=welcome.version.number)
        self._look_at_history(welcome.history)
        self._diary.write("attending", run=welcome.run)
        self._patience.link_is_back()
        self._aside(self._deliveries.offer_saved())
        self._models.offer(welcome.version)
        self._follow_to(welcome.version)

    async def _hear(self, message: FromCoordinator) -> None:
        job = self._job if self._job is not None and self._job.goes_on else None
        match message:
            case Assignment():
                self._look_at_history(message.history)
                self._models.offer(message.version)
                if job is not None and job.assignment == message.id:
                    log.info("still at it", round=message.round)
                    if self._status is not None and self._status.assignment == message.id:
                        await self._report(self._status)
                    await self._sums.repeat(message.id)
                    return
                if job is not None:
                    job.cancel()
                stop = threading.Event()
                self._job = Job(message.id, stop, asyncio.create_task(self._answer(message, stop)))
            case Cancel(assignment, reason):
                working = job is not None and job.assignment == assignment
                if job is not None and working:
                    job.cancel()
                self._residual.settle(assignment, Verdict.LATE)  # who withdraws a part has not counted its result
                if self._deliveries.withdraw(assignment) or working:
                    log.info("no longer wanted", assignment=assignment, reason=reason)
            case NewVersion(version):
                self._models.offer(version)
                self._follow_to(version)
            case SumRoster() | SumShares() | SumSurvivors() | SumSignatures():
                await self._hear_of_sum(message)

    async def _hear_of_sum(self, message: ToSummand) -> None:
        try:
            await self._sums.hear(message)
        except Declined as error:
            log.warning("declined", assignment=brief(message.assignment), error=type(error).__name__, reason=str(error))
            await self._report(Status(message.assignment, Phase.DECLINED, str(error)))

    def _look_at_history(self, head: Head | None) -> None:
        if (fault := self._heads.take(head)) is not None:
            self._diary.remember(history=fault)
            log.warning("the coordinator's history is not what it was", reason=fault)

    def _follow_to(self, version: VersionRef) -> None:
        if self._follow:
            if self._follower is not None:
                self._follower.cancel()  # an older version is worth nothing any more
            self._follower = self._aside(self._fetch_for_keeping(version))

    def _aside(self, doing: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task that ends with the agent at the latest."""
        task = asyncio.create_task(doing)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _answer(self, assignment: Assignment, stop: threading.Event) -> None:
        """Do an assignment, or find its result done already, and send the result; or say why not."""
        try:
            await self._admit(assignment)
            if not await self._deliveries.send_saved(assignment.id):
                log.info("working", round=assignment.round, kind=assignment.plan.kind.value, version=assignment.version.number)
                if assignment.plan.secure is None:
                    await self._deliveries.send(*await self._produce(assignment, stop))
                else:
                    await self._take_part(assignment, stop)
            self._diary.write("attending", round=assignment.round)
        except ChoralError as error:
            await self._decline(assignment, str(error), type(error).__name__)
        except Stopped:
            log.info("stopped working", round=assignment.round)
        except Exception as error:
            log.exception("work failed", round=assignment.round)
            await self._decline(assignment, f"{type(error).__name__}: {error}", type(error).__name__)

    async def _take_part(self, assignment: Assignment, stop: threading.Event) -> None:
        """Do an assignment whose result is summed securely: it is masked before it is saved, and this client stays for the sum."""
        part = await asyncio.to_thread(self._sums.part, assignment)
        summand = await self._worked(assignment, partial(self._contribute, assignment, stop=stop))
        self._sums.begin(part)
        try:
            mask = await part.masked()
            parcel, payload = await self._thread.do(partial(self._mask_and_save, assignment, summand, mask, stop))
            await self._deliveries.send(parcel, payload)
            await part.reveal()
        except BaseException:
            self._sums.leave()
            raise
        finally:
            part.end()
        log.info("secure sum done", round=assignment.round)

    async def _say_in_sum(self, word: FromSummand) -> None:
        """If there is a stream; if there is none, it is said again on the next."""
        if self._stream is not None:
            with suppress(Unreachable):
                await self._stream.say(word)

    def _contribute(self, assignment: Assignment, checkpoint: BufferedIOBase, stop: threading.Event) -> Summand:
        if stop.is_set():
            raise Stopped
        with checkpoint, self._oversight.watching(assignment.plan, stop), self._telling_nothing(assignment):
            summand = self._work.contribute(assignment.plan, checkpoint, stop)
            self._oversight.charge(assignment.plan, assignment.id)
            return summand

    @contextmanager
    def _telling_nothing(self, assignment: Assignment) -> Iterator[None]:
        """Work of which only the log of this device says why it failed. Raises Declined."""
        try:
            yield
        except ChoralError as error:
            log.warning("work failed", round=assignment.round, reason=str(error))
            raise Declined(_WORK_FAILED) from error
        except Exception as error:
            log.exception("work failed", round=assignment.round)
            raise Declined(_WORK_FAILED) from error

    def _mask_and_save(self, assignment: Assignment, summand: Summand, mask: Mask, stop: threading.Event) -> tuple[Parcel, Payload]:
        if stop.is_set():
            raise Stopped
        summand.add_mask(mask)
        header = UploadHeader(assignment.id, self._hello.client, 0, assignment.plan.kind, 0, (), (), b"", codec=MASKED)
        return self._outbox.save(_parcel(header, assignment), summand.pieces())

    async def _admit(self, assignment: Assignment) -> None:
        """Ask the guard before anything is done. Raises Declined; what an earlier start has saved is then not sent either."""
        try:
            self._work.check(assignment.plan)
            if assignment.plan.secure is None:
                _codec(assignment)
            paid = assignment.id in self._outbox  # or else the losses of a result that waits there would be counted twice
            await asyncio.to_thread(self._oversight.admit, assignment.plan, paid=paid)
        except Declined:
            self._deliveries.withdraw(assignment.id)
            raise

    async def _produce(self, assignment: Assignment, stop: threading.Event) -> tuple[Parcel, Payload]:
        """An assignment's result, saved: from here on it outlives this process."""
        if _codec(assignment).sparse:
            await self._deliveries.settled()  # what is left to be sent depends on what became of the last update
        return await self._worked(assignment, partial(self._work_and_save, assignment, stop=stop))

    async def _worked(self, assignment: Assignment, do: Callable[[BufferedIOBase], T]) -> T:
        """What is done, in the thread for that, with the version that an assignment starts from."""
        if not self._models.holds(assignment.version):
            await self._report(Status(assignment.id, Phase.DOWNLOADING))
        checkpoint = await self._checkpoint(assignment)
        telling = asyncio.create_task(self._tell_of_work(assignment))
        try:
            return await self._thread.do(partial(do, checkpoint))
        finally:
            telling.cancel()

    async def _tell_of_work(self, assignment: Assignment) -> None:
        """Say that the work is under way, if it is not done at once: then its result is the word of it."""
        await asyncio.sleep(_AT_ONCE_S)
        await self._report(Status(assignment.id, Phase.WORKING))

    def _work_and_save(self, assignment: Assignment, checkpoint: BufferedIOBase, stop: threading.Event) -> tuple[Parcel, Payload]:
        if stop.is_set():  # other work was under way until now
            raise Stopped
        codec = _codec(assignment)
        with checkpoint, self._oversight.watching(assignment.plan, stop), self._feedback(assignment, codec) as feedback:
            with self._telling_nothing(assignment) if hidden_by(assignment.plan) else nullcontext():
                result = self._work.do(assignment.plan, checkpoint, stop, codec, feedback)
            header = UploadHeader(
                assignment=assignment.id,
                client=self._hello.client,
                examples=self._work.examples if assignment.plan.private is None else 1,
                kind=assignment.plan.kind,
                payload_bytes=0,
                held_out=result.held_out,
                work=result.work,
                digest=b"",
                codec=assignment.codec,
            )
            if stop.is_set():
                raise Stopped
            self._oversight.charge(assignment.plan, assignment.id)
            return self._outbox.save(_parcel(header, assignment), result.payload)

    def _feedback(self, assignment: Assignment, codec: Codec) -> AbstractContextManager[Feedback | None]:
        if not codec.sparse or assignment.plan.kind is not Kind.TRAINING or hidden_by(assignment.plan):
            return nullcontext()  # what earlier updates left out had no noise on it, or has been paid for
        hello, head = self._hello, self._heads.newest
        whose = repr((self._run, head.key if head is not None else b"", hello.task, hello.task_version, hello.manifest))
        about = About(hashlib.sha256(whose.encode()).hexdigest(), assignment.id, hello.manifest.size)
        return self._residual.feedback(about)

    async def _checkpoint(self, assignment: Assignment) -> BufferedIOBase:
        """What the work starts from, however long the link is broken, as long as the guard allows it."""
        version = assignment.version
        for attempt in count(1):
            try:
                return await self._models.obtain(version, exactly=assignment.plan.secure is not None)
            except Unreachable as error:
                log.warning("waiting for the link", version=version.number, reason=str(error))
            await self._patience.pause(attempt)
            await asyncio.to_thread(self._oversight.admit, assignment.plan)
        raise AssertionError("count never ends")

    async def _report(self, status: Status) -> None:
        """Tell the coordinator, if there is a stream."""
        self._status = status
        if self._stream is not None:
            with suppress(Unreachable):
                await self._stream.say(status)

    async def _decline(self, assignment: Assignment, reason: str, error: str) -> None:
        log.warning("declined", round=assignment.round, error=error, reason=reason)
        await self._report(Status(assignment.id, Phase.DECLINED, reason))

    async def _fetch_for_keeping(self, version: VersionRef) -> None:
        try:
            await asyncio.to_thread(self._oversight.permit_fetching)
            (await self._models.obtain(version)).close()
        except ChoralError as error:
            log.warning("new version not fetched", version=version.number, reason=str(error))

    async def _finish(self, after_s: float | None) -> None:
        """What is done before leaving: the last version is fetched and, if the run is over, receipts on their way are awaited."""
        if after_s is None:
            if self._job is not None:
                self._job.cancel()
            await self._deliveries.linger(_LAST_RECEIPTS_S)
        if self._follower is not None:
            await asyncio.wait([self._follower], timeout=after_s + 1 if after_s is not None else None)

    async def _stop(self) -> None:
        """End everything that is under way. Results without a receipt stay in the outbox."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if self._job is not None:
            self._job.cancel()
            tasks.append(self._job.task)
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._deliveries.stop()

    async def _beat(self, stream: Attendance, heartbeat_s: float) -> None:
        with suppress(Unreachable):  # the reader of the stream meets the same end, and says so
            while True:
                await asyncio.sleep(heartbeat_s)
                self._diary.write("working" if self._job is not None and self._job.goes_on else "attending")
                await stream.say(Heartbeat())


def _parcel(header: UploadHeader, assignment: Assignment) -> Parcel:
    return Parcel(header, assignment.round, tuple(sorted(hidden_by(assignment.plan))))


def _codec(assignment: Assignment) -> Codec:
    """How the update is to be encoded. Raises Declined: this release cannot."""
    try:
        codec = parse(assignment.codec)
    except InvalidMessage as error:
        raise Declined(str(error)) from error
    if missing := codec.abilities.difference(abilities()):
        raise Declined(f"asked for an update as {codec.name}, and {', '.join(sorted(missing))} was not offered: attend again")
    return codec
