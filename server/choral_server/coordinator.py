"""The coordinator: conducts the run and shells around the pure round: timers, storage, announcements, aggregation."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import structlog
from choral.errors import UpdateRefused, WrongState
from choral.messages import Assignment, Cancel, ComeBack, NewVersion, Phase, Receipt, Status, UploadHeader, Verdict, Welcome
from choral.plan import Kind, Plan, seed_for

from choral_server import cohort
from choral_server.aggregate import WeightedSum
from choral_server.intake import check_header, payload_bytes
from choral_server.offload import offload
from choral_server.rounds import (
    OPEN_PARTS,
    Action,
    Announce,
    Answer,
    Arrived,
    DeadlinePassed,
    Event,
    Fold,
    Left,
    Part,
    PartState,
    Rejected,
    Reported,
    Returned,
    Round,
    RoundState,
    Stopped,
    Upload,
    Withdraw,
    receipt_after,
    step,
)
from choral_server.run import Aggregate, Run
from choral_server.schedule import next_due
from choral_server.sessions import Session, Sessions
from choral_server.statistics_sum import StatisticsSum
from choral_server.store import ClientRecord, RunState, Store

log = structlog.get_logger()
RESTART_S = 2.0  # when clients come back after a coordinator that was told to end


class Coordinator:
    """Conducts one run after the other.

    `open_next(rounds, parent)` makes the run that an operator starts after the present one, from the model of `parent` if given.
    """

    def __init__(
        self,
        run: Run,
        sessions: Sessions,
        store: Store,
        heartbeat_s: float,
        open_next: Callable[[int, Run | None], Run],
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.run = run
        self._sessions = sessions
        self._store = store
        self._heartbeat_s = heartbeat_s
        self._open_next = open_next
        self._clock = clock
        self._inbox: asyncio.Queue[Event] = asyncio.Queue()
        self._round: Round | None = None
        self._receipts: dict[Path, asyncio.Future[Receipt]] = {}
        self._wake = asyncio.Event()
        self._triggered = False
        self.draining = False
        self._abandoned = 0
        self._retry_at: datetime | None = None

    # The run

    async def conduct(self) -> None:
        """Open rounds as they become due until the run is over or cannot go on, or the coordinator drains."""
        while self.run.active and not self.draining and (kind := self.run.next_kind()) is not None:
            if await self._due(kind):
                self._count_abandoned(await self.run_round(kind))
        if self.run.active and self.run.next_kind() is None:
            self.run.save(state=RunState.FINISHED, reason=self.run.outcome(), next_round_at=None)
        if not self.run.active:
            log.info("run over", run=self.run.record.name, state=self.run.record.state.value, reason=self.run.record.reason)

    async def rest(self) -> None:
        """After a run: wait until an operator starts another or resumes it, or the coordinator drains."""
        while not self.run.active and not self.draining:
            self._wake.clear()
            await self._wake.wait()

    async def _due(self, kind: Kind) -> bool:
        """Wait until a round may open; False: none will."""
        while self.run.active and not self.draining:
            self._wake.clear()
            why, until = self._hindrance(kind)
            if why is None:
                return True
            self.run.save(state=RunState.PAUSED if self.run.record.paused else RunState.WAITING, reason=why, next_round_at=until)
            wait_s = max(0.0, (until - self._clock()).total_seconds()) if until is not None else None
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._wake.wait()
        return False

    def _hindrance(self, kind: Kind) -> tuple[str | None, datetime | None]:
        """Why no round of this kind can open now, and until when if time alone removes it."""
        settings, record, now = self.run.settings, self.run.record, self._clock()
        if record.paused:
            return "paused by an operator", None
        if kind is Kind.EVALUATION:
            return None, None  # whoever is here measures the last version
        if self._retry_at is not None and now < self._retry_at:
            return f"the last round was abandoned; the next attempt comes {settings.retry_s:g} s after it", self._retry_at
        if kind is Kind.TRAINING and not self._triggered and self._retry_at is None:
            due = next_due(settings.schedule, record.opened_at, record.started_at)
            if now < due:
                return "the schedule opens the next round later", due
        needed = max(settings.needed, settings.start_with or 0) if record.next_round == 0 else settings.needed
        present = len(self._sessions)
        return (f"waiting for clients: {present} of {needed} attend", None) if present < needed else (None, None)

    def _count_abandoned(self, closed: Round) -> None:
        mine = closed.run == self.run.record.name and self.run.active
        if closed.state is RoundState.DONE or closed.kind is Kind.EVALUATION or not mine or self.draining:
            self._abandoned, self._retry_at = 0, None
            return
        self._abandoned += 1
        self._retry_at = self._clock() + timedelta(seconds=self.run.settings.retry_s)
        if self._abandoned >= self.run.settings.max_abandoned:
            reason = f"{self._abandoned} rounds in a row were abandoned, the last because {closed.reason}; mend that, then resume"
            self.run.save(state=RunState.FAILED, reason=reason, next_round_at=None)

    # A round

    async def run_round(self, kind: Kind) -> Round:
        """Announce one round, take what comes until it closes, and publish what it gives."""
        run = self.run  # an operator may stop it and start another while this round ends
        began = time.monotonic()
        current = self._open(run, kind)
        aggregate = run.aggregate(kind)
        for part in current.parts.values():
            self._sessions.say(part.client, _assignment(run, current, part))
        deadline_s = run.settings.deadline_s
        timer = asyncio.get_running_loop().call_later(deadline_s, self._inbox.put_nowait, DeadlinePassed(deadline_s))
        while current.state is RoundState.OPEN or not self._inbox.empty():  # what arrived with the last result is answered too
            current, actions = step(current, await self._inbox.get())
            self._move(current)
            for action in actions:
                await self._act(run, current, action, aggregate)
        timer.cancel()
        run.measured_by_clients(current)
        made = None
        if current.state is RoundState.DONE and aggregate is not None:
            made = await offload(run.version.size_bytes, run.make_version, aggregate)
            run.publish(made, kind, self._clock())
        closed = replace(current, duration_s=time.monotonic() - began)
        self._move(closed)
        _log_round(run, closed)
        if made is not None:
            self._sessions.say_all(NewVersion(made))
            if run.has_test_set:
                measured = await asyncio.to_thread(run.measure)
                run.measured("test", made.number, measured)
                log.info("measured", version=made.number, on="test", **{m.name: round(m.value, 4) for m in measured})
        return closed

    def _open(self, run: Run, kind: Kind) -> Round:
        """Choose the cohort and store the round, before anyone hears of it."""
        settings, record, now = run.settings, run.record, self._clock()
        number, present, goal, quorum = record.next_round, self._sessions.present(), settings.cohort_size, settings.needed
        if kind is Kind.TRAINING:
            size = cohort.selected(settings.cohort_size, settings.over_selection)
            self._triggered = False
        else:  # statistics and the last measurement come from everyone who is here
            size = goal = len(present)
            quorum = quorum if kind is Kind.STATISTICS else 1
        chosen = cohort.choose(settings.seed, number, present, size)
        parts = {f"{record.name}/{number}/{client}": client for client in chosen}
        opened = Round(
            run=record.name,
            number=number,
            kind=kind,
            version=run.version.number,
            goal=min(goal, len(parts)),
            quorum=quorum,
            parts={assignment: Part(assignment, client) for assignment, client in parts.items()},
            opened_at=now,
        )
        self._inbox = asyncio.Queue()
        if not parts:
            self._inbox.put_nowait(Stopped("nobody attends"))
        opened_at = now if kind is Kind.TRAINING else record.opened_at
        run.save(state=RunState.IN_ROUND, reason="", next_round=number + 1, next_round_at=None, opened_at=opened_at)
        self._move(opened)
        return opened

    def _move(self, round: Round) -> None:
        self._round = round
        self._store.save(round)

    async def _act(self, run: Run, current: Round, action: Action, aggregate: Aggregate) -> None:
        match action:
            case Announce(part):
                self._sessions.say(part.client, _assignment(run, current, part))
            case Withdraw(part):
                self._sessions.say(part.client, Cancel(part.assignment, part.reason))
            case Answer(upload, receipt):
                self._answer(upload, receipt)
            case Fold(upload):
                if isinstance(aggregate, WeightedSum):
                    await offload(run.version.size_bytes, aggregate.fold, upload.path, upload.examples)
                elif isinstance(aggregate, StatisticsSum):
                    aggregate.fold(upload.path, upload.client)
                upload.path.unlink()

    def _answer(self, upload: Upload, receipt: Receipt) -> None:
        if receipt.verdict is Verdict.ACCEPTED:
            client = self._store.clients[upload.client]
            self._store.save(replace(client, accepted=client.accepted + 1))
        else:
            log.warning("upload not counted", client=upload.client, verdict=receipt.verdict.value, reason=receipt.reason)
            upload.path.unlink()
        waiting = self._receipts.pop(upload.path, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(receipt)

    # What clients do

    def joined(self, session: Session) -> Welcome:
        """A client attends."""
        before = self._store.clients.get(session.client)
        accepted = before.accepted if before is not None else 0
        now = self._clock()
        self._store.save(ClientRecord(session.client, True, session.examples, session.software, session.address, now, accepted))
        log.info("client attends", client=session.client, address=session.address, examples=session.examples)
        self._inbox.put_nowait(Returned(session.client))
        self._wake.set()
        return Welcome(self.run.record.name, self._heartbeat_s, self.run.version)

    def left(self, session: Session, reason: str) -> None:
        """A client's stream ended."""
        client = self._store.clients[session.client]
        self._store.save(replace(client, attending=False, heard_at=self._clock(), reason=reason))
        log.info("client left", client=session.client, reason=reason)
        self._inbox.put_nowait(Left(session.client))
        self._wake.set()

    def reported(self, session: Session, status: Status) -> None:
        """A client says how its assignment goes."""
        if status.phase is Phase.DECLINED:
            log.warning("client declines", client=session.client, assignment=status.assignment, reason=status.reason)
        part = self._round.parts.get(status.assignment) if self._round is not None else None
        if part is not None and part.client == session.client:
            self._inbox.put_nowait(Reported(status.assignment, status.phase, status.reason))

    def heard(self, session: Session) -> None:
        """A client says that it is alive."""
        client = self._store.clients[session.client]
        self._store.clients[session.client] = replace(client, heard_at=self._clock())

    def expects(self, header: UploadHeader) -> Receipt | None:
        """Whether to take the bytes of an upload: None, or the receipt that it gets instead. Raises UpdateRefused."""
        current = self._round
        if current is None or header.assignment not in current.parts:
            return self._too_late(header)
        part = current.parts[header.assignment]
        if part.client != header.client:
            raise UpdateRefused(f"assignment {header.assignment} was given to {part.client}, not to {header.client}")
        if part.state not in OPEN_PARTS:
            return receipt_after(part)
        try:
            check_header(header, current.kind, payload_bytes(current.kind, self.run.model.manifest.size, self.run.model.features))
        except UpdateRefused as error:
            self.reject(header, str(error))
            raise
        return None

    async def submit(self, upload: Upload) -> Receipt:
        """Offer an admissible result to the round under way; its receipt says what became of it."""
        if self._round is None or self._round.state is not RoundState.OPEN or upload.assignment not in self._round.parts:
            upload.path.unlink()
            return Receipt(Verdict.LATE, "the round has closed")
        receipt: asyncio.Future[Receipt] = asyncio.get_running_loop().create_future()
        self._receipts[upload.path] = receipt
        self._inbox.put_nowait(Arrived(upload))
        return await receipt

    def reject(self, header: UploadHeader, reason: str) -> None:
        """A result of the round under way cannot count."""
        log.warning("upload refused", client=header.client, assignment=header.assignment, reason=reason)
        self._inbox.put_nowait(Rejected(header.assignment, reason))

    def _too_late(self, header: UploadHeader) -> Receipt:
        for closed in reversed(self._store.rounds.values()):
            part = closed.parts.get(header.assignment)
            if part is not None and part.client == header.client:
                return receipt_after(part)
        raise UpdateRefused(f"assignment {header.assignment} is unknown: nobody was asked for it since this coordinator started")

    # What operators do

    def pause(self) -> None:
        """Open no further round until resumed; one under way ends normally. Raises WrongState."""
        self._must_not_be_over("paused")
        in_round = self.run.record.state is RunState.IN_ROUND
        self.run.save(paused=True, reason="pauses when this round ends" if in_round else self.run.record.reason)
        self._wake.set()

    def resume(self) -> None:
        """Go on after a pause or a failure. Raises WrongState."""
        self._must_not_be_over("resumed")
        record = self.run.record
        if not record.paused and record.state is not RunState.FAILED:
            raise WrongState(f"run {record.name} is neither paused nor failed; there is nothing to resume")
        self._abandoned, self._retry_at = 0, None
        self.run.save(paused=False, state=RunState.IN_ROUND if record.state is RunState.IN_ROUND else RunState.WAITING, reason="")
        self._wake.set()

    def trigger(self) -> None:
        """Let the next round open now, whatever the schedule says. Raises WrongState."""
        self._must_not_be_over("given a round")
        if self.run.record.paused or self.run.record.state is RunState.FAILED:
            raise WrongState(f"run {self.run.record.name} is {self.run.record.state.value}; resume it first")
        self._triggered = True
        self._wake.set()

    def stop(self, reason: str = "stopped by an operator") -> None:
        """End the run; a round under way is abandoned. Raises WrongState."""
        self._must_not_be_over("stopped")
        self.run.save(state=RunState.STOPPED, reason=reason, next_round_at=None)
        self._inbox.put_nowait(Stopped(reason))
        self._wake.set()

    def start(self, rounds: int, from_latest: bool) -> None:
        """Begin a further run once the present one is over. Raises WrongState."""
        if not self.run.over:
            raise WrongState(f"run {self.run.record.name} is {self.run.record.state.value}; stop it before starting another")
        self.run = self._open_next(rounds, self.run if from_latest else None)
        self._abandoned, self._retry_at = 0, None
        self._sessions.say_all(NewVersion(self.run.version))
        self._wake.set()

    def drain(self, drain_s: float) -> None:
        """Open no further round, give the one under way `drain_s` seconds, then abandon it and send everyone away."""
        self.draining = True
        self._wake.set()
        if self._round is not None and self._round.state is RoundState.OPEN:
            loop = asyncio.get_running_loop()
            loop.call_later(drain_s, self._inbox.put_nowait, Stopped("the coordinator was told to end"))

    async def dismiss(self, patience_s: float) -> None:
        """Send everyone away, for good unless the coordinator was told to end; wait at most `patience_s` until they are gone."""
        farewell = ComeBack(None, self.run.record.reason) if not self.draining else ComeBack(RESTART_S, "the coordinator restarts")
        self._sessions.say_all(farewell)
        try:
            async with asyncio.timeout(patience_s):
                await self._sessions.emptied()
        except TimeoutError:
            log.warning("clients still here at the end", clients=self._sessions.present())

    def _must_not_be_over(self, what: str) -> None:
        if self.run.over:
            raise WrongState(f"run {self.run.record.name} is {self.run.record.state.value} and cannot be {what}; start another")


def _assignment(run: Run, current: Round, part: Part) -> Assignment:
    """What one client is asked to do."""
    seed = seed_for(run.settings.seed, current.version, part.client)
    evaluate = current.kind is not Kind.STATISTICS and run.clients_measure
    plan = Plan(current.kind, run.record.task, run.record.task_version, run.training, seed, evaluate)
    return Assignment(part.assignment, current.number, run.version, plan)


def _log_round(run: Run, closed: Round) -> None:
    told = {"round": closed.number, "kind": closed.kind.value, "accepted": closed.count(PartState.ACCEPTED)}
    if closed.state is RoundState.ABANDONED:
        log.warning("round abandoned", **told, reason=closed.reason)
    else:
        done = f"{run.record.rounds_done}/{run.record.rounds_planned}"
        log.info("round done", **told, rounds=done, version=run.version.number, seconds=round(closed.duration_s, 3))
