"""The coordinator: conducts the run – when a round opens, who is asked, what a round gives – and obeys its operators."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path

import structlog
from choral.errors import ConfigError, UnknownVersion, WrongState
from choral.messages import ComeBack
from choral.plan import Kind
from choral.privacy.accounting import Sampling

from choral_server import cohort, disk
from choral_server.attendance import Attendance
from choral_server.cohort import Draw
from choral_server.collection import Collection, House, assignment_id
from choral_server.config import Limits
from choral_server.database import SUBJECT as DATABASE
from choral_server.diagnosis import Condition
from choral_server.failpoints import Transition
from choral_server.herald import Herald
from choral_server.pace import Rhythm
from choral_server.patience import patiently
from choral_server.places import Places
from choral_server.records import EventRecord, RunState, SpendingRecord
from choral_server.rounds import OPEN_PARTS, Part, Parts, PartState, Round, RoundState, discarded
from choral_server.run import ARTIFACTS, Run
from choral_server.schedule import next_due
from choral_server.spool import DISK, Spool
from choral_server.standing import consequences
from choral_server.state_folder import lock_of

log = structlog.get_logger()
RESTART_S = 2.0  # when clients come back after a coordinator that was told to end
_LATELY = 3  # rounds
_ANEW = "the coordinator was started again, and of a secure sum nothing is kept: the round is done anew, with other keys"
_OTHERWISE = "the coordinator was started with another run.privacy than the round was opened with"
_STANDSTILL_S = 60.0  # when clients for which there is no place look again while no round will open by itself
_LOOK_AGAIN_S = 2.0  # how often a full disk is looked at


class Coordinator:
    """Conducts one run after the other.

    `open_next(rounds, parent)` makes the run that an operator starts after the present one, from the model of `parent` if given.
    """

    def __init__(
        self,
        run: Run,
        house: House,
        spool: Spool,
        state: Path,
        heartbeat_s: float,
        open_next: Callable[[int, Run | None], Awaitable[Run]],
        limits: Limits | None = None,
    ) -> None:
        limits = limits or Limits()
        self.run = run
        self._herald = Herald(house.sessions)
        self.places = Places(limits.places, limits.returns_per_s, house.store.clients, self._at_work, self._rhythm)
        self.attendance = Attendance(house, heartbeat_s, self.wake, self.places, limits.heartbeats_per_s)
        self._returns_per_s = limits.returns_per_s
        self._round_s = self._cycle_s = 1.0  # of the last round: how long it took, and since the opening of the one before
        self._opened_at: datetime | None = None
        self._house = house
        self._spool = spool
        self._state = state
        self._open_next = open_next
        self._awake = asyncio.Event()
        self._triggered = False
        self.draining = False
        self._retry_at: datetime | None = None
        self._starting = asyncio.Lock()
        house.troubles.on_change = self.wake

    # The run

    async def conduct(self) -> None:
        """Open rounds as they become due until the run is over or cannot go on, or the coordinator drains."""
        run = self.run
        await self._take_up(run)
        self.attendance.settled = True
        while self._goes_on(run):
            if run.record.back_to is not None:
                await self._roll_back(run, run.record.back_to)
            elif (kind := run.next_kind()) is None:
                break
            elif await self._due(kind) and (collection := await self._open(run, kind)) is not None:
                await self._count_abandoned(run, await self.run_round(run, collection))
        if self._goes_on(run):
            await run.save(at=Transition.RUN_OVER, state=RunState.FINISHED, reason=run.outcome(), next_round_at=None)
        if not run.active:
            log.info("run over", run=run.record.name, state=run.record.state.value, reason=run.record.reason)

    async def rest(self) -> None:
        """After a run: wait until an operator starts another or resumes it, or the coordinator drains."""
        while not self.run.active and not self.draining:
            self._awake.clear()
            await self._awake.wait()

    def wake(self) -> None:
        """Something has changed that may let the run go on."""
        self._awake.set()

    def _goes_on(self, run: Run) -> bool:
        return run.active and not self.draining

    async def _take_up(self, run: Run) -> None:
        """Go on where an earlier process was: with its round, if one was under way, and with what was left to measure."""
        house = self._house
        unfinished = await patiently(house.troubles, DATABASE, lambda: house.store.unfinished(run.record.name))
        self._spool.keep_only(unfinished)
        if unfinished is None:
            if run.record.latest > 0:
                await self._measure(run)  # the earlier process may not have got round to it
        elif not run.active:
            await self._give_up(run, unfinished, run.record.reason)
        elif unfinished.masked or run.settings.secure_aggregation is not None:
            await self._give_up(run, unfinished, _ANEW)
        elif not run.suits(unfinished):
            await self._give_up(run, unfinished, _OTHERWISE)
        else:
            log.info("round taken up", run=run.record.name, round=unfinished.number, state=unfinished.state.value)
            await run.save(state=RunState.IN_ROUND, reason="")
            collection = self._collection(run, unfinished)
            await collection.restore()
            await self._count_abandoned(run, await self.run_round(run, collection))

    async def _due(self, kind: Kind) -> bool:
        """Wait until a round may open; False: none will, or something else comes first."""
        while self.run.active and not self.draining and self.run.record.back_to is None:
            self._awake.clear()
            why, until = self._hindrance(kind)
            if why is None:
                return True
            paused = self.run.record.paused
            await self.run.save(state=RunState.PAUSED if paused else RunState.WAITING, reason=why, next_round_at=until)
            wait_s = max(0.0, (until - self._house.clock()).total_seconds()) if until is not None else None
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._awake.wait()
        return False

    def _hindrance(self, kind: Kind) -> tuple[str | None, datetime | None]:
        """Why no round of this kind can open now, and until when if time alone may remove it."""
        settings, record, now = self.run.settings, self.run.record, self._house.clock()
        if record.paused:
            return "paused by an operator", None
        self._look_at_disk()
        if troubles := self._house.troubles.present:
            return "; ".join(f"{subject}: {reason}" for subject, reason in troubles.items()), now + timedelta(seconds=_LOOK_AGAIN_S)
        if kind is Kind.EVALUATION:
            return None, None  # whoever is here measures the last version
        if self._retry_at is not None and now < self._retry_at:
            return f"the last round was abandoned; the next attempt comes {settings.retry_s:g} s after it", self._retry_at
        if kind is Kind.TRAINING and not self._triggered and self._retry_at is None:
            due = next_due(settings.schedule, record.opened_at, record.started_at)
            if now < due:
                return "the schedule opens the next round later", due
        needed, present = self._needed(), len(self._house.eligible())
        if present >= needed:
            return None, None
        quarantined = len(self._house.sessions) - present
        others = f", and {quarantined} quarantined" if quarantined else ""
        return f"waiting for clients: {present} of {needed} attend{others}", None

    def _needed(self) -> int:
        """How many eligible clients must attend before a round opens."""
        settings = self.run.settings
        return max(settings.needed, settings.start_with or 0) if self.run.record.next_round == 0 else settings.needed

    def _look_at_disk(self) -> None:
        if (reason := self._shortage()) is not None:
            self._house.troubles.found(DISK, reason)
        else:
            self._house.troubles.over(DISK)

    def _shortage(self) -> str | None:
        """Why the disk cannot take another round."""
        if not lock_of(self._state).exists():
            return (
                f"{self._state} is gone, or not the folder that it was at the start: put it back, or stop and start the coordinator"
            )
        settings = self.run.settings
        upload = self.run.payload_bytes(Kind.TRAINING, "").most  # of a client that cannot compress
        asked = cohort.selected(settings.cohort_size, settings.over_selection)
        needed = disk.needed_bytes(asked, upload, self._house.spool_bytes, self.run.version.size_bytes)
        return disk.shortage(self._state, needed)

    async def _count_abandoned(self, run: Run, closed: Round) -> None:
        if (
            closed.state is RoundState.DONE
            or closed.kind is Kind.EVALUATION
            or not self._goes_on(run)
            or run.record.back_to is not None
        ):
            self._retry_at = None
            if run.record.abandoned:
                await run.save(abandoned=0)
            return
        abandoned = run.record.abandoned + 1
        self._retry_at = self._house.clock() + timedelta(seconds=run.settings.retry_s)
        if abandoned < run.settings.max_abandoned:
            await run.save(abandoned=abandoned)
            return
        reason = f"{abandoned} rounds in a row were abandoned, the last because {closed.reason}; mend that, then resume"
        await run.save(at=Transition.RUN_OVER, abandoned=abandoned, state=RunState.FAILED, reason=reason, next_round_at=None)

    # A round

    async def run_round(self, run: Run, collection: Collection) -> Round:
        """Collect one round, publish what it gives, and measure that."""
        self.attendance.collection, self.attendance.settled = collection, True
        try:
            closed = await self._closed(run, collection)
        finally:
            self.attendance.collection = None
        self._round_s = closed.duration_s or self._round_s
        collection.spool.clear()
        _log_round(run, closed)
        if closed.state is RoundState.DONE and closed.kind is not Kind.EVALUATION:
            self._herald.proclaim(run.version)
        await self._measure(run)
        if self._goes_on(run) and run.next_kind() is Kind.TRAINING:
            self.attendance.turn_over()
        return closed

    async def _closed(self, run: Run, collection: Collection) -> Round:
        """The round once it is over, and what it gives published."""
        if not collection.round.parts and collection.round.quorum > 0:
            collection.stop("nobody attends")
        elif not run.active:  # said by an operator while it was opened
            collection.stop(run.record.reason)
        elif run.record.back_to is not None:
            collection.stop(_going_back(run.record.back_to))
        elif not collection.round.parts:
            collection.close_empty()
        closed = collection.round
        if closed.state is RoundState.OPEN:
            closed = await collection.collect()
        if closed.state is RoundState.CLOSED:
            closed = await run.settle(collection.timed(), collection.tally.aggregate, self._house.clock())
        return closed

    async def _open(self, run: Run, kind: Kind) -> Collection | None:
        """Choose the cohort and store the round, before anyone hears of it; None: it would cost more privacy than there is left."""
        settings, record = run.settings, run.record
        spending: SpendingRecord | None = None
        draw = Draw((), 0, 0)
        number, present, goal, quorum = record.next_round, self._house.eligible(), settings.cohort_size, settings.needed
        if kind is Kind.TRAINING:
            size = cohort.selected(settings.cohort_size, settings.over_selection)
            self._triggered = False
        else:  # statistics and the last measurement come from everyone who is here
            size = goal = len(present)
            quorum = quorum if kind is Kind.STATISTICS else 1
            if (secure := settings.secure_aggregation) is not None:
                size = goal = min(goal, secure.largest_cohort)
                quorum = max(quorum, secure.minimum_cohort)
        chosen = cohort.choose(settings.seed, number, present, size)
        if (private := settings.privacy) is not None:
            draw = Draw(chosen, len(chosen), len(present))
            if kind is Kind.TRAINING and private.drawn_by is not Sampling.NONE:
                draw = cohort.drawn(private.drawn_by, present, size)
                chosen = draw.clients
                quorum = 0  # to draw again until enough answer would be to draw those who answer
            goal = len(chosen)
            spending = await self._within_budget(run, kind, draw)
            if spending is None:
                return None
        offered = self._house.sessions.codecs
        parts = Parts(Part(assignment_id(record, number, name), name, codec=run.codec(kind, offered(name))) for name in chosen)
        opened = Round(
            run=record.name,
            number=number,
            kind=kind,
            version=run.version.number,
            goal=min(goal, len(parts)),
            quorum=quorum,
            parts=parts,
            opened_at=self._house.clock(),
            plan=run.plan_digest(kind, draw.expected if private is not None else min(goal, len(parts))),
            parent=run.version.digest,
        )
        await run.open(opened, spending)
        self._count_turn(opened.opened_at)
        return self._collection(run, opened)

    async def _within_budget(self, run: Run, kind: Kind, draw: Draw) -> SpendingRecord | None:
        """What a round costs in privacy; None: more than there is left, and the run is over."""
        assert run.private is not None, "it is"
        spending = await run.private.price(run.record.next_round, kind, draw, self._house.clock())
        if (reason := await asyncio.to_thread(run.private.ledger.overspent, spending)) is None:
            return spending
        log.warning("privacy budget spent", run=run.record.name, reason=reason)
        event = EventRecord(self._house.clock(), "privacy budget spent", reason, run.record.name)
        await run.save(at=Transition.RUN_OVER, others=(event,), state=RunState.FINISHED, reason=reason, next_round_at=None)
        return None

    def _count_turn(self, opened_at: datetime) -> None:
        self.places.opened(opened_at)
        if self._opened_at is not None:
            self._cycle_s = (opened_at - self._opened_at).total_seconds()
        self._opened_at = opened_at

    def _rhythm(self) -> Rhythm:
        """What those who are sent away can expect."""
        settings, record = self.run.settings, self.run.record
        if record.paused or not self.run.active:
            return Rhythm(max(_STANDSTILL_S, self._round_s), max(_STANDSTILL_S, self._cycle_s))
        due = record.next_round_at
        if due is None:
            return Rhythm(self._round_s, self._cycle_s)
        wait_s = (due - self._house.clock()).total_seconds()
        cycle_s = (next_due(settings.schedule, due, due) - due).total_seconds()
        return Rhythm(max(0.0, wait_s) + self._round_s, max(cycle_s, self._round_s))

    def _at_work(self, client: str) -> bool:
        """Whether something is awaited from a client."""
        collection = self.attendance.collection
        part = collection.round.part_of(client) if collection is not None else None
        return part is not None and part.state in OPEN_PARTS

    def _collection(self, run: Run, round: Round) -> Collection:
        return Collection(run, round, self._spool.of(round.run, round.number), self._house)

    async def _give_up(self, run: Run, unfinished: Round, reason: str) -> Round:
        given_up = discarded(unfinished, reason)
        others = consequences(given_up, (), self._house.store.clients, None, self._house.clock())
        await self._house.store.commit(given_up, *others, *run.returned(unfinished, given_up), at=Transition.ROUND_CLOSED)
        self._spool.of(unfinished.run, unfinished.number).clear()
        _log_round(run, given_up)
        return given_up

    async def _measure(self, run: Run) -> None:
        if measured := await run.measure():
            log.info("measured", version=run.version.number, on="test", **{m.name: round(m.value, 4) for m in measured})

    async def _roll_back(self, run: Run, number: int) -> None:
        house = self._house
        try:
            await patiently(house.troubles, ARTIFACTS, lambda: run.roll_back(number, house.clock()))
        except (UnknownVersion, ConfigError) as error:  # gone or damaged since it was asked for
            log.warning("not rolled back", reason=str(error))
            event = EventRecord(house.clock(), "not rolled back", str(error), run.record.name)
            await run.save(back_to=None, others=(event,))
            return
        log.info("rolled back", to=number, version=run.version.number)
        self._herald.proclaim(run.version)
        await self._measure(run)

    # What operators do

    async def pause(self) -> None:
        """Open no further round until resumed; one under way ends normally. Raises WrongState."""
        self._must_not_be_over("paused")
        in_round = self.run.record.state is RunState.IN_ROUND
        reason = "pauses when this round ends" if in_round else self.run.record.reason
        await self.run.save(paused=True, reason=reason, others=self._noted("run paused"))
        self.wake()

    async def resume(self) -> None:
        """Go on after a pause or a failure. Raises WrongState."""
        self._must_not_be_over("resumed")
        record = self.run.record
        if not record.paused and record.state is not RunState.FAILED:
            raise WrongState(f"run {record.name} is neither paused nor failed; there is nothing to resume")
        self._retry_at = None
        state = RunState.IN_ROUND if record.state is RunState.IN_ROUND else RunState.WAITING
        await self.run.save(paused=False, abandoned=0, state=state, reason="", others=self._noted("run resumed"))
        self.wake()

    async def trigger(self) -> None:
        """Let the next round open now, whatever the schedule says. Raises WrongState."""
        self._must_not_be_over("given a round")
        if self.run.record.paused or self.run.record.state is RunState.FAILED:
            raise WrongState(f"run {self.run.record.name} is {self.run.record.state.value}; resume it first")
        await self.run.save(others=self._noted("round asked for"))
        self._triggered = True
        self.wake()

    async def stop(self, reason: str = "stopped by an operator") -> None:
        """End the run; a round under way is abandoned. Raises WrongState."""
        self._must_not_be_over("stopped")
        await self.run.save(
            at=Transition.RUN_OVER, state=RunState.STOPPED, reason=reason, next_round_at=None, others=self._noted("run stopped")
        )
        self._stop_round(reason)
        self.wake()

    async def start(self, rounds: int, from_latest: bool) -> None:
        """Begin a further run once the present one is over. Raises WrongState."""
        async with self._starting:
            if not self.run.over:
                raise WrongState(f"run {self.run.record.name} is {self.run.record.state.value}; stop it before starting another")
            self.run = await self._open_next(rounds, self.run if from_latest else None)
        self._retry_at = None
        self._herald.proclaim(self.run.version)
        self.wake()

    async def roll_back(self, number: int) -> None:
        """Publish an earlier version as the newest; a round under way is abandoned. Raises WrongState, or that it is not kept."""
        self._must_not_be_over("rolled back")
        if self.run.record.state is RunState.FAILED:
            raise WrongState(f"run {self.run.record.name} is failed; resume it first")
        await self.run.can_go_back_to(number)
        await self.run.save(back_to=number, others=self._noted("rollback asked for", f"to version {number}"))
        self._stop_round(_going_back(number))
        self.wake()

    async def charge(self, rounds: int, reason: str) -> SpendingRecord:
        """Count private rounds that were made and are not known here, as after a restored backup. Raises ConfigError."""
        run = self.run
        if run.ledger is None:
            raise ConfigError(f"run {run.record.name} keeps nothing private: there is no ledger to charge (run.privacy)")
        spending = await asyncio.to_thread(run.ledger.charge, run.record.name, rounds, self._house.clock())
        told = f"{rounds} rounds{f': {reason}' if reason else ''}"
        await run.save(others=(spending, *self._noted("privacy charged", told)))
        return spending

    def drain(self) -> None:
        """Open no further round. One under way goes on; whoever cancels `conduct` leaves it to the next start."""
        self.draining = True
        self.wake()

    async def await_return(self, patience_s: float) -> None:
        """Wait at most `patience_s` for those who took part lately, but not since a restart: they do not know that it is over."""
        house = self._house
        last = await patiently(house.troubles, DATABASE, lambda: house.store.rounds(self.run.record.name, _LATELY))
        clients = {part.client for round in last for part in round.parts.values() if part.state is PartState.ACCEPTED}
        with suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await self._house.sessions.seen(clients)

    async def dismiss(self, patience_s: float) -> None:
        """Send everyone away, for good if the run is what ends; wait at most `patience_s` until they are gone."""
        for_good = not self.run.active and not self.draining
        self._herald.finish()
        here = self._house.sessions.present()
        for number, client in enumerate(here):
            after_s = RESTART_S + number / self._returns_per_s  # or all would knock at once
            farewell = ComeBack(None, self.run.record.reason) if for_good else ComeBack(after_s, "the coordinator restarts")
            self._house.sessions.say(client, farewell)
        try:
            async with asyncio.timeout(patience_s):
                await self._house.sessions.emptied()
        except TimeoutError:
            log.warning("clients still here at the end", clients=self._house.sessions.present())

    @property
    def troubles(self) -> Mapping[str, str]:
        """What keeps the coordinator from going on, by subject."""
        return self._house.troubles.present

    def condition(self) -> Condition:
        """How things stand, for a diagnosis."""
        collection, house = self.attendance.collection, self._house
        current = collection.round if collection is not None else None
        troubles = house.troubles.present
        if current is None and (shortage := self._shortage()) is not None:
            troubles = {DISK: shortage} | troubles
        return Condition(self.run.record, current, house.store.belonging(), house.sessions.present(), self._needed(), troubles)

    def _stop_round(self, reason: str) -> None:
        if self.attendance.collection is not None:
            self.attendance.collection.stop(reason)

    def _noted(self, what: str, told: str = "") -> tuple[EventRecord]:
        return (EventRecord(self._house.clock(), what, told, self.run.record.name),)

    def _must_not_be_over(self, what: str) -> None:
        if self.run.over:
            raise WrongState(f"run {self.run.record.name} is {self.run.record.state.value} and cannot be {what}; start another")


def _going_back(number: int) -> str:
    return f"an operator went back to version {number}"


def _log_round(run: Run, closed: Round) -> None:
    told = {"round": closed.number, "kind": closed.kind.value, "accepted": closed.count(PartState.ACCEPTED)}
    if closed.state is RoundState.ABANDONED:
        log.warning("round abandoned", **told, reason=closed.reason)
    else:
        done = f"{run.record.rounds_done}/{run.record.rounds_planned}"
        log.info("round done", **told, rounds=done, version=run.version.number, seconds=round(closed.duration_s, 3))
