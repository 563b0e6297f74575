"""The coordinator's memory: records are committed to the database before anyone hears of them, and watched as they change.

Runs and clients are few and all held in memory; rounds are while they are open, with how their parts go at the moment, which is
not worth writing. Everything else is asked of the database.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from choral.heads import Head
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import Table, bindparam
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.sql.dml import Insert

from choral_server import failpoints
from choral_server.database import Database
from choral_server.facts import CONFIGURATION, configuration_facts, found_before, told_by
from choral_server.failpoints import Transition
from choral_server.history import Entry, Facts, History, Telling
from choral_server.lease import Lease
from choral_server.records import (
    ClientRecord,
    EventRecord,
    MemberRecord,
    Record,
    RunRecord,
    SpendingRecord,
    TokenRecord,
    Told,
    VersionRecord,
)
from choral_server.rounds import ENDED, Part, Parts, PartState, Round, RoundState, as_kept
from choral_server.tables import (
    ASSIGNMENTS,
    CLIENTS,
    EVENTS,
    HISTORY,
    INSERT,
    MEMBERS,
    ROUNDS,
    RUNS,
    SPENDINGS,
    TOKENS,
    VERSIONS,
    Row,
    Words,
    client_from_row,
    client_to_row,
    entry_from_row,
    entry_to_row,
    event_from_row,
    event_to_row,
    member_from_row,
    member_to_row,
    part_from_row,
    part_to_row,
    round_from_row,
    round_to_row,
    run_from_row,
    run_to_row,
    spending_from_row,
    spending_to_row,
    token_from_row,
    token_to_row,
    version_from_row,
    version_to_row,
)

RoundKey = tuple[str, int]
_LATELY = 1000  # entries of the history whose digests are at hand
_UNREAD = 10_000  # states that a slow watcher may be behind; older ones are dropped
_WRITTEN = (
    RUNS,
    SPENDINGS,
    ROUNDS,
    ASSIGNMENTS,
    VERSIONS,
    CLIENTS,
    MEMBERS,
    TOKENS,
    EVENTS,
    HISTORY,
)  # in order: what refers, and to what

_RUN = bindparam("of_run", type_=Words)
_LIMIT = bindparam("at_most", type_=sa.BigInteger)
_NUMBER = bindparam("number", type_=sa.BigInteger)
_ROUNDS = sa.select(ROUNDS).where(ROUNDS.c.run == _RUN).order_by(ROUNDS.c.number.desc()).limit(_LIMIT)
_ROUND = sa.select(ROUNDS).where(ROUNDS.c.run == _RUN, ROUNDS.c.number == _NUMBER)
_UNFINISHED = _ROUNDS.where(ROUNDS.c.state.not_in([state.value for state in ENDED]))
_PARTS = (
    sa.select(ASSIGNMENTS)
    .where(ASSIGNMENTS.c.run == _RUN, ASSIGNMENTS.c.round.between(bindparam("first"), bindparam("last")))
    .order_by(ASSIGNMENTS.c.round, ASSIGNMENTS.c.place)
)
_ACCEPTED_OF = (
    sa.select(ASSIGNMENTS.c.run, ASSIGNMENTS.c.round)
    .where(ASSIGNMENTS.c.client == bindparam("of_client", type_=Words), ASSIGNMENTS.c.state == PartState.ACCEPTED.value)
    .distinct()
)
_UNPROTECTED = (
    sa.select(sa.func.count().label("number"))
    .select_from(ROUNDS.outerjoin(SPENDINGS, sa.and_(SPENDINGS.c.run == ROUNDS.c.run, SPENDINGS.c.round == ROUNDS.c.number)))
    .where(ROUNDS.c.state == RoundState.DONE.value, SPENDINGS.c.run.is_(None))
)
_PART = sa.select(ASSIGNMENTS).where(ASSIGNMENTS.c.assignment == bindparam("id"))
_VERSIONS = sa.select(VERSIONS).where(VERSIONS.c.run == _RUN).order_by(VERSIONS.c.number.desc()).limit(_LIMIT)
_VERSION = sa.select(VERSIONS).where(VERSIONS.c.run == _RUN, VERSIONS.c.number == _NUMBER)
_EVENTS = sa.select(EVENTS).order_by(EVENTS.c.sequence.desc()).limit(_LIMIT)
_ENTRY = sa.select(HISTORY.c.digest).where(HISTORY.c.sequence == _NUMBER)
_NEWEST = sa.select(HISTORY).order_by(HISTORY.c.sequence.desc()).limit(1)
_OF_WHAT = _NEWEST.where(HISTORY.c.what == bindparam("of_what", type_=Words))
_LAST_EVENT = sa.select(sa.func.max(EVENTS.c.sequence))
_OF_CLIENT = EVENTS.c.client == bindparam("of_client")


@dataclass(slots=True)
class _Batch:
    """What one commit writes: rows by table, and what is true once it is done."""

    rows: dict[Table, list[Row]] = field(default_factory=dict)
    rounds: dict[RoundKey, _KeptRound] = field(default_factory=dict)
    clients: dict[str, ClientRecord] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)

    def add(self, table: Table, row: Row) -> None:
        self.rows.setdefault(table, []).append(row)


@dataclass(frozen=True, slots=True)
class _KeptRound:
    """A round as it was last written: its own row, and its parts."""

    row: Row
    parts: Parts


class Store:
    """The records. `runs` in order of creation, `clients` and `members` by name, `tokens` by digest, `spendings` by run and round.

    What `commit` has written, all readers see at once.
    """

    def __init__(
        self,
        database: Database,
        lease: Lease,
        runs: Iterable[RunRecord],
        clients: Iterable[ClientRecord],
        members: Iterable[MemberRecord],
        tokens: Iterable[TokenRecord],
        spendings: Iterable[SpendingRecord],
        history: History,
        clock: Callable[[], datetime],
    ) -> None:
        self.runs = {run.name: run for run in runs}
        self.clients = {client.name: client for client in clients}
        self.members = {member.name: member for member in members}
        self.tokens = {token.digest: token for token in tokens}
        self.spendings = {(spending.run, spending.round): spending for spending in spendings}
        self._database = database
        self._lease = lease
        self._upserts = {table: _upsert(INSERT[database.dialect], table) for table in _WRITTEN}
        self._places = {name: place for place, name in enumerate(self.runs)}
        self._history = history
        self._clock = clock
        self._in_doubt = False  # whether the database may have entries that we do not know to be stored
        self._lately: dict[int, bytes] = {}
        self._turn = asyncio.Lock()
        self._unwritten: dict[str, ClientRecord] = {}
        self._written: dict[RoundKey, _KeptRound] = {}
        self._live: dict[RoundKey, Round] = {}
        self._watchers: set[_Watcher] = set()

    @classmethod
    async def open(
        cls, database: Database, lease: Lease, key: Ed25519PrivateKey, clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> Store:
        """The store with what earlier processes left; `key` signs the history. Raises DatabaseGone."""

        async def work(connection: AsyncConnection) -> Store:
            runs = await _fetch(connection, sa.select(RUNS).order_by(RUNS.c.place))
            clients = await _fetch(connection, sa.select(CLIENTS).order_by(CLIENTS.c.name))
            members = await _fetch(connection, sa.select(MEMBERS).order_by(MEMBERS.c.name))
            tokens = await _fetch(connection, sa.select(TOKENS))
            spendings = await _fetch(connection, sa.select(SPENDINGS).order_by(SPENDINGS.c.at, SPENDINGS.c.run, SPENDINGS.c.round))
            last_event = await connection.scalar(_LAST_EVENT)
            records = [run_from_row(row) for row in runs]
            history = History(key, await _newest_head(connection, key), found_before(records, last_event))
            known = map(client_from_row, clients), map(member_from_row, members), map(token_from_row, tokens)
            return cls(database, lease, records, *known, map(spending_from_row, spendings), history, clock)

        return await database.read(work)

    # Writing

    async def commit(self, *records: Record, at: Transition | None = None) -> None:
        """Write the records in one transaction, each in place of its predecessor, then let readers and watchers know them.

        Waits as long as the database is gone. Raises LeaseLost.
        """
        async with self._turn:
            written = {_key(record): record for record in (*self._unwritten.values(), *records)}.values()
            batch = self._batch(written)
            seen = {name: self.clients.get(name) for name in batch.clients}
            await self._add_entries(batch, told_by(written, self.runs))

            async def work(connection: AsyncConnection) -> None:
                await self._write(connection, batch)
                if at is not None:
                    failpoints.reach(at.before)

            def then() -> None:
                if at is not None:
                    failpoints.reach(at.after)
                self._settle(batch)
                for record in records:
                    self.tell(_since(record, seen, self.clients) if isinstance(record, ClientRecord) else record)

            await self._database.write(work, then)

    async def configure(self, values: Mapping[str, Any]) -> None:
        """Let the history tell the configuration, by key, and what of it changed, if anything did. Raises LeaseLost."""
        newest = next(map(entry_from_row, await self._rows(_OF_WHAT, {"of_what": CONFIGURATION})), None)
        if (told := configuration_facts(newest.content if newest is not None else None, values)) is None:
            return
        await self._enter(CONFIGURATION, told)

    async def replace_key(self) -> None:
        """Let the history tell that another key signs from here on: this store's. Raises LeaseLost."""
        await self._enter(*self._history.new_key)

    async def _enter(self, what: str, facts: Facts) -> None:
        """Write an entry of the history that tells of no record."""
        async with self._turn:
            batch = _Batch()
            await self._add_entries(batch, [(what, facts)])
            await self._database.write(lambda connection: self._write(connection, batch), lambda: self._settle(batch))

    @property
    def head(self) -> Head | None:
        """Where the history stands."""
        return self._history.head

    async def holds(self, head: Head) -> bool:
        """Whether the history has that entry. Raises DatabaseGone."""
        if (digest := self._lately.get(head.sequence)) is None:
            digest = next((row["digest"] for row in await self._rows(_ENTRY, {"number": head.sequence})), None)
        return digest == head.digest

    async def _add_entries(self, batch: _Batch, tellings: Iterable[Telling]) -> None:
        """Add the entries of the history that tell what is written; waits as long as it is in doubt what the newest one is."""
        told = list(tellings)
        if not told:
            return
        if self._in_doubt:
            key = self._history.key
            self._history.head = await self._database.write(lambda connection: _newest_head(connection, key))
        self._in_doubt = True
        batch.entries = self._history.next(self._clock(), told)
        for entry in batch.entries:
            batch.add(HISTORY, entry_to_row(entry))

    def tell(self, *records: Record) -> None:
        """Let readers and watchers know the records, which are not written."""
        for record in records:
            match record:
                case RunRecord():
                    self.runs[record.name] = record
                case ClientRecord():
                    self.clients[record.name] = record
                case MemberRecord():
                    self.members[record.name] = record
                case TokenRecord():
                    self.tokens[record.digest] = record
                case SpendingRecord():
                    self.spendings[record.run, record.round] = record
                case Round() if record.state not in ENDED:
                    self._live[_round_key(record)] = record
            if isinstance(record, TokenRecord):
                continue  # the business of nobody
            for watcher in self._watchers:
                watcher.tell(record)

    def later(self, *records: ClientRecord) -> None:
        """Let readers and watchers know the clients now; they are written with the next commit, or by `flush`."""
        self.tell(*records)
        self._unwritten.update((record.name, record) for record in records)

    async def flush(self) -> None:
        """Write what `later` has left. Raises LeaseLost."""
        if self._unwritten:
            await self.commit()

    async def _write(self, connection: AsyncConnection, batch: _Batch) -> None:
        await self._lease.hold(connection)
        for table in _WRITTEN:
            if rows := batch.rows.get(table):
                await connection.execute(self._upserts[table], rows)

    def _batch(self, records: Iterable[Record]) -> _Batch:
        batch = _Batch()
        for record in records:
            match record:
                case RunRecord():
                    place = self._places.setdefault(record.name, len(self._places))
                    batch.add(RUNS, run_to_row(record, place))
                case Round():
                    self._add_round(batch, record)
                case VersionRecord():
                    batch.add(VERSIONS, version_to_row(record))
                case ClientRecord():
                    batch.clients[record.name] = record
                    batch.add(CLIENTS, client_to_row(record))
                case EventRecord():
                    batch.add(EVENTS, event_to_row(record))
                case MemberRecord():
                    batch.add(MEMBERS, member_to_row(record))
                case TokenRecord():
                    batch.add(TOKENS, token_to_row(record))
                case SpendingRecord():
                    batch.add(SPENDINGS, spending_to_row(record))
        return batch

    def _add_round(self, batch: _Batch, record: Round) -> None:
        """Add what differs from what was last written of the round; how open parts go is not written, so never differs."""
        key = _round_key(record)
        before = self._written.get(key, _KeptRound({}, Parts()))
        kept = _KeptRound(round_to_row(record), record.parts)
        batch.rounds[key] = kept
        if kept.row != before.row:
            batch.add(ROUNDS, kept.row)
        for part in record.parts.since(before.parts):
            earlier = before.parts.get(part.assignment)
            if earlier is None or as_kept(earlier) != as_kept(part):
                place = record.parts.place(part.assignment)
                batch.add(ASSIGNMENTS, part_to_row(as_kept(part), record.run, record.number, place))

    def _settle(self, batch: _Batch) -> None:
        """Note what has been written."""
        if batch.entries:
            self._in_doubt = False
            self._history.appended(batch.entries)
            self._lately.update((entry.sequence, entry.digest) for entry in batch.entries)
            while len(self._lately) > _LATELY:
                del self._lately[next(iter(self._lately))]
        for key, kept in batch.rounds.items():
            self._written[key] = kept
            if RoundState(kept.row["state"]) in ENDED:
                del self._written[key]
                self._live.pop(key, None)
        for name, client in batch.clients.items():
            if self._unwritten.get(name) in (None, client):
                self._unwritten.pop(name, None)
            else:  # told of again since this commit began
                self._unwritten[name] = _merged(client, self._unwritten[name])

    # Reading

    async def rounds(self, run: str, limit: int) -> list[Round]:
        """The newest rounds of a run, newest first. Raises DatabaseGone."""
        return await self._read_rounds(_ROUNDS, {"of_run": run, "at_most": limit})

    async def round(self, run: str, number: int) -> Round | None:
        """A round. Raises DatabaseGone."""
        return next(iter(await self._read_rounds(_ROUND, {"of_run": run, "number": number})), None)

    async def unfinished(self, run: str) -> Round | None:
        """The newest round of a run that is neither done nor abandoned. Raises DatabaseGone."""
        return next(iter(await self._read_rounds(_UNFINISHED, {"of_run": run, "at_most": 1})), None)

    async def part(self, assignment: str) -> Part | None:
        """A part of any round. Raises DatabaseGone."""
        for round in self._live.values():
            if assignment in round.parts:
                return round.parts[assignment]
        return next(map(part_from_row, await self._rows(_PART, {"id": assignment})), None)

    async def versions(self, run: str, limit: int) -> list[VersionRecord]:
        """The newest versions of a run, newest first. Raises DatabaseGone."""
        return list(map(version_from_row, await self._rows(_VERSIONS, {"of_run": run, "at_most": limit})))

    async def version(self, run: str, number: int) -> VersionRecord | None:
        """A version. Raises DatabaseGone."""
        return next(map(version_from_row, await self._rows(_VERSION, {"of_run": run, "number": number})), None)

    async def events(self, limit: int, run: str = "", client: str = "") -> list[EventRecord]:
        """The newest events, of a run or client if given, newest first. Raises DatabaseGone."""
        query = _EVENTS.where(EVENTS.c.run == _RUN) if run else _EVENTS
        query = query.where(_OF_CLIENT) if client else query
        wanted = {"at_most": limit} | ({"of_run": run} if run else {}) | ({"of_client": client} if client else {})
        return list(map(event_from_row, await self._rows(query, wanted)))

    async def unprotected(self) -> int:
        """How many rounds were done without noise. Raises DatabaseGone."""
        return int((await self._rows(_UNPROTECTED, {}))[0]["number"])

    async def spent_by(self, client: str) -> list[SpendingRecord]:
        """What the rounds cost in which a result of this client counts. Raises DatabaseGone."""
        rounds = [(row["run"], row["round"]) for row in await self._rows(_ACCEPTED_OF, {"of_client": client})]
        return [self.spendings[key] for key in sorted(rounds) if key in self.spendings]

    async def _rows(self, query: sa.Select[Any], wanted: Row) -> list[Row]:
        return await self._database.read(lambda connection: _fetch(connection, query, wanted))

    async def _read_rounds(self, query: sa.Select[Any], wanted: Row) -> list[Round]:
        async def work(connection: AsyncConnection) -> list[Round]:
            rows = await _fetch(connection, query, wanted)
            if not rows:
                return []
            limits = {"of_run": wanted["of_run"], "first": rows[-1]["number"], "last": rows[0]["number"]}
            parts: dict[int, list[Part]] = {row["number"]: [] for row in rows}
            for row in await _fetch(connection, _PARTS, limits):
                parts[row["round"]].append(part_from_row(row))
            return [round_from_row(row, parts[row["number"]]) for row in rows]

        return [self._live.get(_round_key(round), round) for round in await self._database.read(work)]

    def belonging(self) -> dict[str, ClientRecord]:
        """The clients without those that were revoked: nobody need wait for them."""
        gone = {name for name, member in self.members.items() if member.revoked_at is not None}
        return {name: client for name, client in self.clients.items() if name not in gone}

    # Watching

    async def watch(self) -> AsyncIterator[Told]:
        """All runs, clients and members as they are, then every change; who is behind gets only the newest state of each."""
        watcher = _Watcher()
        present: list[Told] = [*self.runs.values(), *self.clients.values(), *self.members.values()]
        for record in present:
            watcher.tell(record)
        self._watchers.add(watcher)
        try:
            while not watcher.ended or watcher.behind:
                for record in await watcher.news():
                    yield record
        finally:
            self._watchers.discard(watcher)

    def end_watches(self) -> bool:
        """End every watch after what it has not read yet; whether there are any."""
        for watcher in self._watchers:
            watcher.end()
        return bool(self._watchers)


class _Watcher:
    """What one reader has not read yet: the newest state of each thing that changed."""

    def __init__(self) -> None:
        self.ended = False
        self._news: dict[tuple[object, ...], Told] = {}
        self._any = asyncio.Event()

    @property
    def behind(self) -> bool:
        return bool(self._news)

    def tell(self, record: Told) -> None:
        key = _key(record)
        self._news.pop(key, None)  # so that it moves to the end
        self._news[key] = record
        if len(self._news) > _UNREAD:
            del self._news[next(iter(self._news))]
        self._any.set()

    def end(self) -> None:
        self.ended = True
        self._any.set()

    async def news(self) -> list[Told]:
        await self._any.wait()
        self._any.clear()
        unread, self._news = self._news, {}
        return list(unread.values())


async def newest_entry(connection: AsyncConnection) -> Entry | None:
    """Where the history stands; None: there is no entry."""
    return next(map(entry_from_row, await _fetch(connection, _NEWEST)), None)


async def _newest_head(connection: AsyncConnection, key: Ed25519PrivateKey) -> Head | None:
    newest = await newest_entry(connection)
    return newest.head(key.public_key().public_bytes_raw()) if newest is not None else None


async def _fetch(connection: AsyncConnection, query: sa.Select[Any], wanted: Row | None = None) -> list[Row]:
    return [row._asdict() for row in await connection.execute(query, wanted)]


def _key(record: Record) -> tuple[object, ...]:
    match record:
        case Round():
            return Round, *_round_key(record)
        case VersionRecord():
            return VersionRecord, record.run, record.version.number
        case EventRecord():
            return EventRecord, record.id
        case SpendingRecord():
            return SpendingRecord, record.run, record.round
        case RunRecord() | ClientRecord() | MemberRecord():
            return type(record), record.name
        case TokenRecord():
            return TokenRecord, record.digest


def _round_key(record: Round) -> RoundKey:
    return record.run, record.number


def _since(committed: ClientRecord, before: Mapping[str, ClientRecord | None], now: Mapping[str, ClientRecord]) -> ClientRecord:
    """A client whose commit is done, with what was told of it while that was under way."""
    told = now.get(committed.name)
    return committed if told is None or told is before.get(committed.name) else _merged(committed, told)


def _merged(committed: ClientRecord, told: ClientRecord) -> ClientRecord:
    """Whether and how the client attends, as told last; how its results are received, as committed."""
    return replace(told, accepted=committed.accepted, refused=committed.refused, quarantine=committed.quarantine)


def _upsert(insert: Callable[[Table], Any], table: Table) -> Insert:
    """Insert rows, each in place of that with the same key; an event, or an entry of the history, that is there stays as it is."""
    statement = insert(table)
    if table is EVENTS:
        return statement.on_conflict_do_nothing(index_elements=[EVENTS.c.id])  # type: ignore[no-any-return]
    if table is HISTORY:
        return statement.on_conflict_do_nothing()  # type: ignore[no-any-return]
    keys = list(table.primary_key)
    changes = {column.name: statement.excluded[column.name] for column in table.c if column not in keys}
    return statement.on_conflict_do_update(index_elements=keys, set_=changes)  # type: ignore[no-any-return]
