"""What clients do, as the coordinator takes it: they come, go, report, and send results."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import timedelta
from typing import NoReturn

import structlog
from choral.errors import ConfigError, DatabaseGone, Unreachable, UpdateRefused, WrongState
from choral.heads import Head, is_genuine
from choral.messages import ComeBack, Hello, Phase, Receipt, Status, UploadHeader, Welcome
from choral.sum_messages import FromSummand
from choral.wire import HEARTBEAT_S

from choral_server.collection import Collection, House
from choral_server.history import differing
from choral_server.places import FULL, HAD_ITS_TURN, Places
from choral_server.records import ClientRecord, EventRecord
from choral_server.rounds import OPEN_PARTS, Part, receipt_after
from choral_server.run import Run
from choral_server.sessions import Session
from choral_server.standing import release

log = structlog.get_logger()


class Attendance:
    """Keeps the clients' records, and passes what they do to the round under way."""

    def __init__(
        self,
        house: House,
        heartbeat_s: float,
        wake: Callable[[], None],
        places: Places | None = None,
        heartbeats_per_s: float = math.inf,
    ) -> None:
        self._house = house
        self._heartbeat_s = heartbeat_s
        self._heartbeats_per_s = heartbeats_per_s
        self._wake = wake
        self._places = places
        self._refused: set[tuple[str, str]] = set()
        self._differing: set[str] = set()
        self._comparing: set[asyncio.Task[None]] = set()
        self.collection: Collection | None = None
        self.settled = False  # whether it is known which round goes on, if any does

    def seat(self, hello: Hello, address: str) -> ComeBack | None:
        """Let a client have a place: None, or when to come back if there is none."""
        if self._places is None:
            return None
        now = self._house.clock()
        if (leaving := self._places.leaves_for(hello.client, now)) is None:
            record = self._record(hello.client, hello.software, address)
            return self._sent_away(record, FULL)
        self._make_room([leaving] if leaving else [])
        self._places.take(hello.client)
        return None

    def turn_over(self) -> None:
        """Between two rounds: let those who have had their turn make room for those who are about to come."""
        if self._places is not None:
            self._make_room(self._places.turn_over(self._house.clock()))

    def _make_room(self, leaving: Iterable[str]) -> None:
        house = self._house
        for name in leaving:
            if (session := house.sessions.of(name)) is not None:
                session.say(self._sent_away(house.store.clients[name], HAD_ITS_TURN))
                house.sessions.leave(session)
                self._gone(name)

    def _sent_away(self, client: ClientRecord, reason: str) -> ComeBack:
        """A client is told to come back, and stands in line until it does."""
        assert self._places is not None
        told, waiting = self._places.send_away(client.name, self._house.clock(), reason)
        away = replace(client, attending=False, heard_at=self._house.clock(), reason=reason)
        self._house.store.later(replace(away, waits_since=waiting.since, away_until=waiting.until))
        log.info("client sent away", client=client.name, reason=reason, seconds=told.after_s)
        return told

    def _record(self, name: str, software: str, address: str) -> ClientRecord:
        """A client that is here now, with what was known of it: how many examples it has, it tells with its results, if ever."""
        now, known = self._house.clock(), self._house.store.clients.get(name)
        if known is None:
            return ClientRecord(name, True, 0, software, address, now)
        told = known.examples, software, address, now, known.accepted, "", known.refused, known.quarantine
        return ClientRecord(name, True, *told)

    def joined(self, session: Session, run: Run) -> Welcome:
        """A client attends; what it is told first. It hears of its part in the round under way right after."""
        house = self._house
        record = self._record(session.client, session.software, session.address)
        house.store.later(record)
        log.info("client attends", client=session.client, address=session.address)
        if self.collection is not None:
            self.collection.returned(session.client)
        self._wake()
        self._compare(session)
        notice = f"this client is quarantined: {record.quarantine}; the coordinator's operator can release it"
        session.heartbeat_s = min(max(self._heartbeat_s, len(house.sessions) / self._heartbeats_per_s), HEARTBEAT_S[1])
        return Welcome(run.record.name, session.heartbeat_s, run.version, notice if record.quarantine else "", house.store.head)

    def _compare(self, session: Session) -> None:
        """See whether the history still has the entry that a client was handed; its welcome does not wait for that."""
        head = session.history
        if head is not None and head != self._house.store.head and session.client not in self._differing:
            comparing = asyncio.create_task(self._find(session.client, head))
            self._comparing.add(comparing)
            comparing.add_done_callback(self._comparing.discard)

    async def _find(self, client: str, head: Head) -> None:
        """Warn, once for each client, if the history is not the one of which it was handed a head."""
        store = self._house.store
        try:
            if await store.holds(head):
                return
        except DatabaseGone as error:
            log.warning("history not compared", client=client, reason=str(error))
            return
        if not is_genuine(head):  # what nobody has signed says nothing of our history
            log.warning("a head of the history that nobody signed", client=client, entry=head.sequence)
            return
        self._differing.add(client)
        told = differing(head, store.head)
        log.warning("history differs", client=client, reason=told)
        await store.commit(EventRecord(self._house.clock(), "history differs", told, client=client))

    def left(self, session: Session, reason: str) -> None:
        """A client's session has ended."""
        house = self._house
        client = house.store.clients[session.client]
        house.store.later(replace(client, attending=False, heard_at=house.clock(), reason=reason))
        log.info("client left", client=session.client, reason=reason)
        self._gone(session.client)

    def _gone(self, client: str) -> None:
        """A client does not attend any more."""
        if self._places is not None:
            self._places.leave(client)
        if self.collection is not None:
            self.collection.left(client)
        self._wake()

    def reported(self, session: Session, status: Status) -> None:
        """A client says how its assignment goes."""
        if status.phase is Phase.DECLINED:
            log.warning("client declines", client=session.client, assignment=status.assignment, reason=status.reason)
        if self.collection is not None:
            self.collection.reported(session.client, status)

    def said(self, session: Session, word: FromSummand) -> None:
        """A client says something in a secure sum."""
        if self.collection is not None:
            self.collection.said(session.client, word)

    def note_heard(self) -> None:
        """Bring the records up to date: when each session was last heard is noted there only, since heartbeats are many."""
        store, now, clock = self._house.store, self._house.clock(), time.monotonic()
        for session in self._house.sessions:
            client, silent_s = store.clients[session.client], clock - session.heard_at
            store.clients[session.client] = replace(client, heard_at=now - timedelta(seconds=silent_s))

    async def expects(self, header: UploadHeader) -> Receipt | Collection:
        """Who takes the bytes of an upload, or the receipt that it gets instead.

        Raises UpdateRefused; Unreachable: that cannot be said yet.
        """
        client = self._house.store.clients.get(header.client)
        if client is not None and client.quarantine:
            await self._refuse(header, "quarantined", f"client {header.client} is quarantined: {client.quarantine}")
        current, part, settled = await self._part(header.assignment)
        if part is None:
            await self._refuse(
                header, "unknown", f"assignment {header.assignment} is unknown: nobody named {header.client} was asked for it"
            )
        if part.client != header.client:
            await self._refuse(
                header, "another's", f"assignment {header.assignment} was given to {part.client}, not to {header.client}"
            )
        if current is not None:
            return current.expects(header) or current
        if part.state in OPEN_PARTS and not settled:
            raise Unreachable(f"the round of assignment {header.assignment} is being taken up: send the result in a moment")
        if part.state in OPEN_PARTS:
            await self._refuse(
                header, "another run's", f"assignment {header.assignment} is of a run that this coordinator is not on"
            )
        return receipt_after(part)

    async def _part(self, assignment: str) -> tuple[Collection | None, Part | None, bool]:
        """The part, with the round under way if it is of that, and whether an earlier process's round has been taken up."""
        while True:
            current, settled = self.collection, self.settled
            if current is not None and assignment in current.round.parts:
                return current, current.round.parts[assignment], settled
            part = await self._house.store.part(assignment)
            if (current, settled) == (self.collection, self.settled):  # or its round was taken up, or closed, during the look
                return None, part, settled

    async def _refuse(self, header: UploadHeader, kind: str, reason: str) -> NoReturn:
        """Say no to what is no result of an open part. Of each kind one per client is an event: strangers fill no disk."""
        house, client = self._house, header.client
        log.warning("upload refused", client=client, assignment=header.assignment, reason=reason)
        if client in house.store.clients and (client, kind) not in self._refused:
            self._refused.add((client, kind))
            await house.store.commit(EventRecord(house.clock(), "result refused", reason, client=client))
        raise UpdateRefused(reason)

    def expel(self, name: str, reason: str) -> None:
        """Somebody does not belong any more: nothing more is awaited from it."""
        if self.collection is not None:
            self.collection.expel(name, reason)
        self._wake()

    async def quarantine(self, name: str, reason: str) -> ClientRecord:
        """Ask and take no result from a client until it is released. Raises ConfigError: it is unknown."""
        async with self._house.judging:
            after = replace(self._known(name), quarantine=reason)
            client = await self._keep(after, EventRecord(self._house.clock(), "client quarantined", reason, client=name))
        if self.collection is not None:
            self.collection.expel(name, f"it is quarantined: {reason}")
        return client

    async def release(self, name: str) -> ClientRecord:
        """Let a quarantined client take part again. Raises ConfigError or WrongState: it is unknown or was not quarantined."""
        async with self._house.judging:
            client = self._known(name)
            if not client.quarantine:
                raise WrongState(f"client {name} is not quarantined; there is nothing to release it from")
            told = f"it was quarantined: {client.quarantine}"
            return await self._keep(release(client), EventRecord(self._house.clock(), "client released", told, client=name))

    def _known(self, name: str) -> ClientRecord:
        known = self._house.store.clients
        if name not in known:
            raise ConfigError(f"client {name!r} is unknown; there are {', '.join(sorted(known)) or 'none yet'}")
        return known[name]

    async def _keep(self, client: ClientRecord, event: EventRecord) -> ClientRecord:
        await self._house.store.commit(client, event)
        log.info(event.what, client=client.name, reason=event.told)
        if self.collection is not None:
            self.collection.recruit()
        self._wake()
        return client
