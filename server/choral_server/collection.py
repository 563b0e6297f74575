"""A round under way: events go in, the state machine says what follows, and that is committed before anyone hears of it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

import structlog
from choral.errors import Deceived, UpdateRefused
from choral.messages import Assignment, Cancel, Phase, Receipt, Status, UploadHeader, Verdict
from choral.metrics import LOSS
from choral.plan import Kind, seed_for
from choral.secagg.roster import Advert
from choral.sum_messages import FromSummand, SumAdvert

from choral_server import cohort
from choral_server.failpoints import Transition
from choral_server.grouped_sum import GroupedSum
from choral_server.intake import Bounds, check_header
from choral_server.records import EventRecord, RunRecord
from choral_server.round_sum import secure_groups
from choral_server.rounds import (
    AWAITED,
    ENDED,
    OPEN_PARTS,
    Action,
    Announce,
    Answer,
    Arrived,
    BeginSum,
    DeadlinePassed,
    Event,
    Extend,
    Fold,
    Left,
    Overdue,
    Part,
    PartState,
    Ready,
    Recruited,
    Rejected,
    Remind,
    Reported,
    Returned,
    Round,
    RoundState,
    Stopped,
    Summed,
    Upload,
    Withdraw,
    as_kept,
    receipt_after,
    resumed,
    step,
    without,
)
from choral_server.run import Masked, Run
from choral_server.secure_groups import SecureGroups
from choral_server.secure_sum import TooLate
from choral_server.sessions import Sessions
from choral_server.spool import DISK, RoundSpool
from choral_server.standing import consequences
from choral_server.store import Store
from choral_server.tally import Tally
from choral_server.transfers import Transfers
from choral_server.troubles import Troubles

log = structlog.get_logger()
_CORRUPT_ATTEMPTS = 5
_TROUBLED_S = 1.0  # how often a deadline that came in bad times is looked at again


@dataclass(frozen=True)
class House:
    """What every round works with. `spool_bytes` of updates stay on disk after they were added; `clock` tells the date."""

    store: Store
    sessions: Sessions
    transfers: Transfers
    troubles: Troubles
    spool_bytes: int
    clock: Callable[[], datetime]
    judging: asyncio.Lock = field(default_factory=asyncio.Lock)
    """held while what a client's results say of it is read, changed and committed"""

    def vouch(self, said: Advert) -> None:
        """See whether an advert's signing key is the one with which its client has enrolled. Raises Deceived."""
        member = self.store.members.get(said.client)
        if member is not None and member.signing_key and member.signing_key != said.key:
            raise Deceived(f"{said.client} has enrolled with another signing key than it shows in the secure sum: enrol it again")

    def eligible(self) -> tuple[str, ...]:
        """Who attends and may be asked."""
        return tuple(name for name in self.sessions.present() if not self.store.clients[name].quarantine)


class Collection:
    """Collects the results of one round."""

    def __init__(self, run: Run, round: Round, spool: RoundSpool, house: House) -> None:
        self.run = run
        self.round = round
        self.spool = spool
        aggregate, size_bytes = (
            run.aggregate(round.kind, run.asked(round), run.spending(round)),
            run.payload_bytes(round.kind, "").most,
        )
        self.tally = Tally(aggregate, spool, size_bytes, house.spool_bytes, house.troubles)
        self._house = house
        self._sum = self._secure_groups(aggregate) if isinstance(aggregate, Masked) else None
        self._left_out: dict[str, str] = {}  # clients whose secure sum came to nothing, and why
        self._left: set[str] = set()  # clients that have left their secure sum after their result was in it
        self._telling: set[asyncio.Task[None]] = set()
        self._inbox: asyncio.Queue[Event] = asyncio.Queue()
        self._waiting_for: dict[int, tuple[Upload, asyncio.Future[Receipt]]] = {}
        self._timers: list[asyncio.TimerHandle] = []
        self._away: dict[str, asyncio.TimerHandle] = {}  # until a client is overdue
        self._corrupt: Counter[str] = Counter()  # attempts by assignment
        self._began = time.monotonic()
        self._troubled_s = house.troubles.lasted_s  # what of it has been added to the deadline
        self._added_s = 0.0

    # The round, from top to bottom

    async def restore(self) -> None:
        """Take up a round that an earlier process left: what was accepted is added again, or asked for again if it was lost."""
        plan = self.run.plan_digest(self.round.kind, self.run.asked(self.round))  # the configuration may have changed meanwhile
        self.round = replace(resumed(self.round), plan=plan)
        lost = await self.tally.restore(part for part in self.round.parts.values() if part.state is PartState.ACCEPTED)
        if lost:
            log.warning("accepted results are lost", round=self.round.number, clients=[part.client for part in lost])
            await self._give_back(lost)

    async def _give_back(self, lost: Sequence[Part]) -> None:
        """Store that these results, which were accepted and are lost, are awaited again and do not count yet."""
        house, after = self._house, without(self.round, lost)
        async with house.judging:
            known = [house.store.clients[part.client] for part in lost if part.client in house.store.clients]
            fewer = [replace(client, accepted=max(0, client.accepted - 1)) for client in known]
            await house.store.commit(after, *fewer, at=Transition.PARTS_CHANGED)
        self.round = after

    async def collect(self) -> Round:
        """Ask the cohort, and take what comes until the round closes."""
        self._meet()
        self._later(self.run.settings.deadline_s, self._deadline)
        try:
            while self.round.state is RoundState.OPEN or not self._inbox.empty():  # what came with the last result is answered too
                after, actions = self.round, list[Action]()
                async for event in self._waiting():  # one commit for all that waits
                    for one in (*self._replacements(after, event), event):
                        after, more = step(after, one)
                        actions += more
                await self._move(after)
                for action in actions:
                    await self._act(action)
                self.recruit()
        finally:
            for timer in (*self._timers, *self._away.values()):
                timer.cancel()
            if self._sum is not None:
                self._sum.end()
        return self.round

    def _secure_groups(self, aggregate: Masked) -> SecureGroups:
        house, stall_s = self._house, self.run.settings.stall_s
        return secure_groups(
            self.run,
            self.round,
            aggregate,
            house.vouch,
            self.longest_s,
            house.sessions.say,
            lambda: house.transfers.advancing(stall_s),
            lambda: self._tell(Summed()),
            lambda reason: self._tell(Stopped(reason)),
            self._leave_out,
        )

    def _leave_out(self, clients: Sequence[str], reason: str) -> None:
        """The secure sum of these came to nothing: they wait in vain."""
        round = self.round
        if round.state is not RoundState.OPEN:
            return  # they have heard that from the round's end, which it comes from
        self._left_out |= dict.fromkeys(clients, reason)
        for client in clients:
            self._cancel_sum(client)
        if isinstance(self.tally.aggregate, GroupedSum):
            self._note(EventRecord(self._house.clock(), "group left out", reason, round.run, round.number))

    def _meet(self) -> None:
        """Tell those who are here of their parts; some may have come or gone while the round was stored or taken up."""
        here = frozenset(self._house.sessions.present())
        for part in self.round.parts.values():
            match part.state, part.client in here:
                case PartState.ANNOUNCED, True:
                    self._announce(part)
                case PartState.ANNOUNCED, False:
                    self.left(part.client)
                case PartState.ABSENT, True:
                    self.returned(part.client)
                case PartState.ABSENT, False:
                    self._expect_back(part.client)

    async def _waiting(self) -> AsyncIterator[Event]:
        yield await self._inbox.get()
        while not self._inbox.empty():
            yield self._inbox.get_nowait()

    async def _move(self, after: Round) -> None:
        """Store what the round has become; nobody has heard of it yet."""
        before, house = self.round, self._house
        if after.state in ENDED:
            after = replace(after, duration_s=self.elapsed_s)
        changed = [part for part in after.parts.since(before.parts) if _differs(before.parts.get(part.assignment), part)]
        if changed or after.state is not before.state:
            ended = [part for part in changed if part.state not in OPEN_PARTS]
            at = Transition.PARTS_CHANGED if after.state is RoundState.OPEN else Transition.ROUND_CLOSED
            async with house.judging:
                others = consequences(after, ended, house.store.clients, self.run.settings.quarantine_after, house.clock())
                await house.store.commit(after, *others, *self.run.returned(before, after), at=at)
        else:
            house.store.tell(after)
        self.round = after
        if self._sum is not None:
            for part in changed:
                if part.state is not PartState.ACCEPTED and part.state not in AWAITED | {PartState.READY}:
                    self._sum.lost(part.client)

    async def _act(self, action: Action) -> None:
        match action:
            case Announce(part):
                self._announce(part)
            case Withdraw(part):
                self._house.sessions.say(part.client, Cancel(part.assignment, part.reason))
            case Answer(upload, receipt):
                self._answer(upload, receipt)
            case Fold(upload):
                await self.tally.add(self.round.parts[upload.assignment])
                if self._sum is not None:
                    self._sum.sent(upload.client)
            case BeginSum(parts) if self._sum is not None:
                there = [part for part in parts if self.round.parts[part.assignment].state is PartState.READY]  # still
                log.info("secure sum begins", round=self.round.number, clients=len(there))
                self._sum.divide(there)
                if isinstance(self.tally.aggregate, GroupedSum):
                    self.tally.aggregate.divide(self._sum.groups)
                self._sum.begin(there)
            case Remind(part) if part.client in self._left_out:
                self._cancel_sum(part.client)
            case Remind(part) if self._sum is not None:
                self._sum.remind(part.client)
            case Extend():
                self._later(min(self.run.settings.stall_s, self._extensible_s()), self._deadline)

    def _announce(self, part: Part) -> None:
        """Tell one client what it is asked to do."""
        run, current = self.run, self.round
        seed = seed_for(run.settings.seed, current.version, part.client)
        plan, head = run.plan(current.kind, run.asked(current), seed), self._house.store.head
        self._house.sessions.say(part.client, Assignment(part.assignment, current.number, run.version, plan, head, part.codec))

    def _answer(self, upload: Upload, receipt: Receipt) -> None:
        if receipt.verdict is not Verdict.ACCEPTED:
            log.warning("upload not counted", client=upload.client, verdict=receipt.verdict.value, reason=receipt.reason)
            self._discard(upload)
            if self._sum is not None:
                self._sum.not_taken(upload.client)
        _, waiting = self._waiting_for.pop(id(upload))
        if not waiting.done():  # its call may have broken
            waiting.set_result(receipt)

    def _discard(self, upload: Upload) -> None:
        """Delete an upload that does not count, unless it is the very file of the one that does."""
        part = self.round.parts.get(upload.assignment)
        if part is None or part.state is not PartState.ACCEPTED or part.digest != upload.digest:
            self.spool.discard(upload.path)

    # Time

    @property
    def elapsed_s(self) -> float:
        """Seconds since the round opened; since the restart, if this process did not open it."""
        return time.monotonic() - self._began

    def timed(self) -> Round:
        """The round with the time that it took until now."""
        return replace(self.round, duration_s=self.elapsed_s)

    def _later(self, seconds: float, call: Callable[[], None]) -> None:
        self._timers.append(asyncio.get_running_loop().call_later(seconds, call))

    def _deadline(self) -> None:
        """Time is up, unless transfers advance, or we are or were in trouble ourselves, which is not the clients' time."""
        troubles = self._house.troubles
        if DISK in troubles.present:
            self.spool.probe()  # nobody may be left whose upload would show that it takes something again
        if troubles.present or troubles.lasted_s > self._troubled_s:
            more_s = max(_TROUBLED_S, troubles.lasted_s - self._troubled_s)
            self._troubled_s = troubles.lasted_s
            self._added_s += more_s
            self._later(more_s, self._deadline)
            return
        settings = self.run.settings
        moving = self._house.transfers.advancing(settings.stall_s) if self._extensible_s() > 0 else frozenset()
        advancing = frozenset(part.assignment for part in self.round.parts.values() if part.client in moving)
        self._tell(DeadlinePassed(settings.deadline_s, advancing))

    @property
    def longest_s(self) -> float:
        """For how long a transfer of this round may go on."""
        settings = self.run.settings
        return (
            settings.deadline_s + (settings.deadline_s if settings.extension_s is None else settings.extension_s) + settings.stall_s
        )

    def _extensible_s(self) -> float:
        """By how much transfers can still move the deadline."""
        settings = self.run.settings
        longest = settings.deadline_s if settings.extension_s is None else settings.extension_s
        return settings.deadline_s + self._added_s + longest - self.elapsed_s

    def recruit(self) -> None:
        """Ask others in place of those who are not waited for any more, if there is time."""
        for event in self._recruits(self.round):
            self._tell(event)

    def _replacements(self, round: Round, event: Event) -> Iterator[Recruited]:
        """Others in place of one who will not or cannot do its part, asked before that ends: or the round might end with it."""
        match event:
            case Reported(assignment, Phase.DECLINED) | Rejected(assignment):
                part = round.parts.get(assignment)
                if part is not None and part.state in AWAITED | {PartState.READY}:
                    yield from self._recruits(round, ending=1)

    def _recruits(self, round: Round, ending: int = 0) -> Iterator[Recruited]:
        """As many as are wanted, and there, when `ending` of those waited for end without a result."""
        settings = self.run.settings
        if (
            round.kind is not Kind.TRAINING
            or settings.privacy is not None  # what is counted is true of those who were drawn
            or round.state is not RoundState.OPEN
            or round.summing
            or self.elapsed_s > settings.deadline_s / 2
        ):
            return
        wanted = round.goal + ending - round.count(PartState.ACCEPTED, PartState.READY, *AWAITED)
        if wanted <= 0:
            return
        taken = {part.client for part in round.parts.values()}
        spare = [client for client in self._house.eligible() if client not in taken]
        for client in cohort.choose(settings.seed, round.number, spare, wanted):
            assignment = assignment_id(self.run.record, round.number, client)
            yield Recruited(Part(assignment, client, codec=self.run.codec(round.kind, self._house.sessions.codecs(client))))

    def _expect_back(self, client: str) -> None:
        """Wait for one who is away; not for ever, unless its result is still arriving."""
        if (before := self._away.pop(client, None)) is not None:
            before.cancel()

        def overdue() -> None:
            if client in self._house.transfers.advancing(self.run.settings.stall_s):
                self._expect_back(client)
            else:
                self._tell(Overdue(client))
                if self._sum is not None and self.round.summing:
                    self._sum.lost(client)

        self._away[client] = asyncio.get_running_loop().call_later(self.run.settings.absence_s, overdue)

    def close_empty(self) -> None:
        """Nobody was drawn: that is a result like any other."""
        self._tell(DeadlinePassed(0.0, frozenset()))

    def _tell(self, event: Event) -> None:
        """Something happened; nobody minds once the round has closed."""
        if self.round.state is RoundState.OPEN:
            self._inbox.put_nowait(event)

    # What clients do

    def returned(self, client: str) -> None:
        """A client attends, again or for the first time."""
        if (overdue := self._away.pop(client, None)) is not None:
            overdue.cancel()
        self._tell(Returned(client))

    def left(self, client: str) -> None:
        """A client's session has ended."""
        self._tell(Left(client))
        if self.round.part_of(client) is not None:
            self._expect_back(client)

    def reported(self, client: str, status: Status) -> None:
        """A client says how its part goes."""
        part = self.round.parts.get(status.assignment)
        if part is not None and part.client == client:
            self._tell(Reported(status.assignment, status.phase, status.reason))
            if self._sum is not None and status.phase is Phase.DECLINED and part.state is PartState.ACCEPTED:
                self._leaves_sum(part, status.reason)

    def _cancel_sum(self, client: str) -> None:
        """Tell one that waits for the next step of a secure sum that there is none, or it would wait until the next round."""
        if (part := self.round.part_of(client)) is not None:
            self._house.sessions.say(client, Cancel(part.assignment, self._left_out[client]))

    def _leaves_sum(self, part: Part, reason: str) -> None:
        """A client whose result is in the sum does not go on: that ends no part, and the operator is told."""
        assert self._sum is not None, "or nothing was left"
        self._sum.lost(part.client)
        if part.client in self._left:
            return  # one event for each: nobody fills the disk
        self._left.add(part.client)
        now, round = self._house.clock(), self.round
        self._note(EventRecord(now, "secure sum left", reason, round.run, round.number, part.client))

    def _note(self, event: EventRecord) -> None:
        log.warning(event.what, round=event.round, client=event.client, reason=event.told)
        telling = asyncio.create_task(self._house.store.commit(event))
        self._telling.add(telling)
        telling.add_done_callback(self._telling.discard)
        telling.add_done_callback(lambda done: done.cancelled() or done.exception())  # whoever holds the lease finds out as well

    def said(self, client: str, word: FromSummand) -> None:
        """A client says something in the round's secure sum."""
        part = self.round.parts.get(word.assignment)
        if part is None or part.client != client or self._sum is None:
            return
        try:
            if not isinstance(word, SumAdvert):
                self._sum.take(client, word)
            elif word.advert.client != client:
                raise UpdateRefused(f"{client} shows keys that are said to be those of {word.advert.client}")
            elif part.state in OPEN_PARTS:
                self._sum.enter(word)
                self._tell(Ready(part.assignment))
        except UpdateRefused as error:
            log.warning("refused in the secure sum", client=client, reason=str(error))
            self._house.sessions.say(client, Cancel(part.assignment, str(error)))
            if part.state in OPEN_PARTS:
                self._tell(Rejected(part.assignment, str(error)))
            else:
                self._leaves_sum(part, str(error))

    def expel(self, client: str, reason: str) -> None:
        """No result of this client is wanted any more."""
        part = self.round.part_of(client)
        if part is not None and part.state in OPEN_PARTS:
            self._house.sessions.say(client, Cancel(part.assignment, reason))
            self._tell(Rejected(part.assignment, reason))

    def stop(self, reason: str) -> None:
        """End the round without a result."""
        self._tell(Stopped(reason))

    def expects(self, header: UploadHeader) -> Receipt | None:
        """Whether to take the bytes of an upload: None, or the receipt that it gets instead. Raises UpdateRefused."""
        part = self.round.parts[header.assignment]
        if part.state not in OPEN_PARTS:
            return receipt_after(part)
        try:
            measured = (LOSS, *self.run.model.blueprint.metrics)
            check_header(header, self.round.kind, part.codec, self.run.payload_bytes(self.round.kind, part.codec), measured)
            if self._sum is not None:
                self._sum.expects(header.client)
        except TooLate as error:  # which is no fault: nobody is to be quarantined for it
            return Receipt(Verdict.LATE, self._left_out.get(header.client, str(error)))
        except UpdateRefused as error:
            self.reject(header, str(error))
            raise
        return None

    def bounds(self) -> Bounds:
        """What a payload is held against."""
        settings, model = self.run.settings, self.run.model
        most, private = max(settings.cohort_size, self.round.goal), settings.privacy
        central, noised = (private is not None and on == private.on_devices for on in (False, True))
        return Bounds(most, model.manifest.size, model.features, settings.max_update_norm, central, noised)

    async def submit(self, upload: Upload) -> Receipt:
        """Offer an admissible result; its receipt, once that is stored."""
        if self.round.state is not RoundState.OPEN:
            self._discard(upload)
            return receipt_after(self.round.parts[upload.assignment])
        if self._sum is not None:
            try:
                self._sum.taking(upload.client)
            except UpdateRefused as error:
                self._discard(upload)
                return Receipt(Verdict.LATE, str(error))
        receipt: asyncio.Future[Receipt] = asyncio.get_running_loop().create_future()
        self._waiting_for[id(upload)] = upload, receipt
        self._inbox.put_nowait(Arrived(upload))
        return await receipt

    def reject(self, header: UploadHeader, reason: str) -> None:
        """A result cannot count."""
        log.warning("upload refused", client=header.client, assignment=header.assignment, reason=reason)
        self._tell(Rejected(header.assignment, reason))

    def corrupt(self, header: UploadHeader, reason: str) -> None:
        """A result arrived damaged. It may be sent again, but not for ever. Raises UpdateRefused: that was the last time."""
        self._corrupt[header.assignment] += 1
        attempts = self._corrupt[header.assignment]
        log.warning("upload corrupt", client=header.client, assignment=header.assignment, reason=reason, attempt=attempts)
        if attempts == _CORRUPT_ATTEMPTS:
            told = f"the result of {header.client} arrived damaged {attempts} times, the last time because {reason}"
            self.reject(header, told)
            raise UpdateRefused(told)


def assignment_id(run: RunRecord, number: int, client: str) -> str:
    """The name of one client's part in one round. The run's nonce keeps apart what once had, or will have, the same names."""
    return f"{run.name}/{number}/{client}/{run.nonce}"


def _differs(before: Part | None, after: Part) -> bool:
    return before is None or as_kept(before) != as_kept(after)
