"""Whether the history is what was signed, whether the records are what it tells, and where a checkpoint comes from.

Reads the database and changes nothing, whether a coordinator runs or not.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeVar

import sqlalchemy as sa
from choral.canonical import canonical
from choral.errors import ConfigError, HistoryBroken
from choral.heads import Head, fingerprint, is_genuine
from sqlalchemy.ext.asyncio import AsyncConnection

from choral_server import history_key
from choral_server.backups.contents import database_file
from choral_server.config import ServerConfig
from choral_server.database import Database
from choral_server.facts import EVENT, ROUND, VERSION, event_facts, round_facts
from choral_server.history import BEGUN, Chain, Entry, Facts, Fault
from choral_server.rounds import ENDED
from choral_server.tables import (
    ASSIGNMENTS,
    EVENTS,
    HISTORY,
    ROUNDS,
    VERSIONS,
    entry_from_row,
    event_from_row,
    part_from_row,
    round_from_row,
)
from choral_server.troubles import Troubles

T = TypeVar("T")
Key = tuple[Any, ...]
"""which round, version or event"""
Progress = Callable[[int, int], None]
"""called with what is done and what there is in all: entries and records"""
_AT_A_TIME = 500
_NAMED = 3  # things named in one fault
_RESTORE = "restore a backup from before that; until then trust neither"


@dataclass(frozen=True)
class Audit:
    """What an audit found: `keys` by the entry from which on each signs, `heads` how many of clients were held against it."""

    entries: int
    heads: int
    keys: Mapping[int, bytes]
    faults: Sequence[Fault]


@dataclass(frozen=True, slots=True)
class Ancestor:
    """A version in a line: the entry that tells of it, its facts, and those of the round that made it, if one did."""

    entry: int
    at: datetime
    version: Facts
    round: Facts | None


async def audit(config: ServerConfig, heads: Mapping[str, Sequence[Head]], progress: Progress = lambda done, total: None) -> Audit:
    """Verify the history, hold the records against it, and the `heads` that clients were handed, by whose they are.

    Raises ConfigError: there is no database, or none with a history; HistoryBroken: it cannot even be read; DatabaseGone.
    """
    known = history_key.found(config.state)
    key = history_key.public_part(known) if known is not None else b""

    async def work(connection: AsyncConnection) -> Audit:
        chain, told, pace = Chain(key), _Told(), _Pace(progress, await _count(connection, HISTORY, ROUNDS, VERSIONS, EVENTS))
        async for entry in _entries(connection):
            told.add(entry, chain.add(entry))
            pace.step()
        chain.end()
        faults = [*chain.faults, *_of_key(chain, key), *await _of_records(connection, told, chain.last, pace)]
        faults += [fault for name, handed in heads.items() for fault in _of_heads(chain, name, handed)]
        keys = {entry: public for public, entry in chain.keys.items()}
        return Audit(chain.last, sum(map(len, heads.values())), keys, faults)

    return await _read(config, work)


async def newest(config: ServerConfig, limit: int) -> list[Entry]:
    """The newest entries, newest first, as they are. Raises as `audit`."""

    async def work(connection: AsyncConnection) -> list[Entry]:
        query = sa.select(HISTORY).order_by(HISTORY.c.sequence.desc()).limit(limit)
        return [_typed(entry_from_row(row._asdict())) for row in await connection.execute(query)]

    return await _read(config, work)


def _typed(entry: Entry) -> Entry:
    """The entry. Raises ValueError: it has values of other types, as SQLite may have in any column."""
    texts, blobs = (entry.what, entry.facts), (entry.before, entry.digest, entry.signature)
    if not (type(entry.sequence) is int and all(type(one) is str for one in texts) and all(type(one) is bytes for one in blobs)):
        raise ValueError(f"in entry {entry.sequence!r}")
    return entry


async def lineage(config: ServerConfig, digest: bytes, progress: Progress = lambda done, total: None) -> list[Ancestor]:
    """The version whose file has this SHA-256, what it was made from, and so on to the first; all of the history is verified.

    Raises HistoryBroken: the history proves nothing, or does not tell of that file; otherwise as `audit`.
    """
    known = history_key.found(config.state)
    key = history_key.public_part(known) if known is not None else b""

    async def work(connection: AsyncConnection) -> list[Ancestor]:
        chain, pace = Chain(key), _Pace(progress, await _count(connection, HISTORY))
        versions: dict[Key, Entry] = {}
        rounds: dict[Key, Entry] = {}
        async for entry in _entries(connection):
            if chain.add(entry) and entry.what in (VERSION, ROUND):
                found = versions if entry.what == VERSION else rounds
                found[_KEYS[entry.what](_facts(entry))] = entry
            pace.step()
        chain.end()
        if faults := [*chain.faults, *_of_key(chain, key)]:
            raise HistoryBroken(f"history: {faults[0].found}, so it proves nothing: `choral audit verify` says more")
        return list(_line(versions, rounds, digest))

    return await _read(config, work)


def _line(versions: Mapping[Key, Entry], rounds: Mapping[Key, Entry], digest: bytes) -> Iterator[Ancestor]:
    place = next((place for place, entry in versions.items() if entry.content["digest"] == digest.hex()), None)
    if place is None:
        raise HistoryBroken(
            f"history: no version has the SHA-256 {digest.hex()}: the file was changed, or is another federation's or run's; "
            "compare it with `choral versions list`"
        )
    told: set[Key] = set()
    while place is not None:
        entry = versions[place]
        if place in told:
            raise HistoryBroken(f"history: {_NAMES[VERSION](place)} (entry {entry.sequence}) descends from itself: {_RESTORE}")
        told.add(place)
        facts = entry.content
        made_in = rounds.get((facts["run"], facts["round"]))
        yield Ancestor(entry.sequence, entry.at, facts, made_in.content if made_in is not None else None)
        parent = facts["parent"]
        place = (parent["run"], parent["number"]) if parent is not None else None
        if place is not None and parent is not None:
            _must_match(versions.get(place), parent, entry)


def _must_match(entry: Entry | None, parent: Facts, child: Entry) -> None:
    named = f"version {parent['number']} of run {parent['run']}"
    if entry is None:
        raise HistoryBroken(
            f"history: entry {child.sequence} names {named} as parent, which was published before the history began: "
            "the line can be proved from there on only"
        )
    if entry.content["digest"] != parent["digest"]:
        raise HistoryBroken(f"history: entry {child.sequence} names another {named} as parent than entry {entry.sequence} tells of")


_TOLD: Mapping[str, Mapping[str, type]] = {
    VERSION: {"run": str, "number": int, "digest": str},
    ROUND: {"run": str, "round": int, "kind": str, "accepted": int, "asked": int, "plan": str},
}


def _facts(entry: Entry) -> Facts:
    """What an entry tells of a version or a round. Raises ValueError: not what it must; whoever has a key can sign that too."""
    facts = entry.content
    about = [(entry.what, facts)]
    if entry.what == VERSION and facts["parent"] is not None:
        about.append((VERSION, facts["parent"]))
    wrong = [name for what, one in about for name, kind in _TOLD[what].items() if type(one[name]) is not kind]
    if wrong or (entry.what == VERSION and type(facts["round"]) not in (int, type(None))):
        raise ValueError(f"entry {entry.sequence} does not tell what one of a {entry.what} must: {', '.join(wrong) or 'round'}")
    return facts


# What the history tells of records


@dataclass
class _Told:
    """By kind and key, what the history tells of records: the entry, and the digest of its facts (None: they were changed)."""

    records: dict[str, dict[Key, tuple[int, bytes | None]]] = field(default_factory=dict)
    runs_before: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    events_before: int = 0

    def add(self, entry: Entry, whole: bool) -> None:
        """Take note of an entry; of one that is not `whole` only that there is one."""
        try:
            facts = entry.content
            if entry.what == BEGUN and whole:
                self.runs_before = facts["found"].get("runs", {})
                self.events_before = facts["found"].get("events") or 0
            elif entry.what in _KEYS:
                digest = _digest_of(_compared(entry.what, facts)) if whole else None
                self.records.setdefault(entry.what, {})[_KEYS[entry.what](facts)] = entry.sequence, digest
        except (ValueError, KeyError, TypeError, AttributeError):
            return  # the chain has found it faulty already


_KEYS: Mapping[str, Callable[[Facts], Key]] = {
    ROUND: lambda facts: (facts["run"], facts["round"]),
    VERSION: lambda facts: (facts["run"], facts["number"]),
    EVENT: lambda facts: (facts["id"],),
}
_NAMES: Mapping[str, Callable[[Key], str]] = {
    ROUND: lambda key: f"round {key[1]} of run {key[0]}",
    VERSION: lambda key: f"version {key[1]} of run {key[0]}",
    EVENT: lambda key: f"event {key[0]}",
}


def _compared(what: str, facts: Facts) -> Facts:
    """Of the facts, those that a record has too."""
    left_out = {ROUND: {"child"}, VERSION: {"parent", "round"}, EVENT: set[str]()}[what]
    return {name: value for name, value in facts.items() if name not in left_out}


def _digest_of(facts: Facts) -> bytes:
    return hashlib.sha256(canonical(facts).encode()).digest()


async def _of_records(connection: AsyncConnection, told: _Told, last: int, pace: _Pace) -> list[Fault]:
    faults: list[Fault] = []
    for what, records in {ROUND: _rounds(connection), VERSION: _versions(connection), EVENT: _events(connection)}.items():
        expected, untold = dict(told.records.get(what, {})), list[str]()
        async for facts, number in records:
            pace.step()
            key = _KEYS[what](facts)
            sequence, digest = expected.pop(key, (0, None))
            if sequence == 0:
                untold += [] if _is_from_before(what, key, number, told) else [_NAMES[what](key)]
            elif digest is not None and _digest_of(_compared(what, facts)) != digest:
                found = f"{_NAMES[what](key)} in the database is not what entry {sequence} tells: one of the two was changed"
                faults.append(Fault(sequence, found, _RESTORE))
        if untold:
            found = f"no entry tells of {_some(untold)}, which the database has: the history was cut off (it ends at entry {last})"
            faults.append(Fault(None, f"{found}, or entries were taken out of it, or records were put in", _RESTORE))
        if expected:
            first = min(sequence for sequence, _ in expected.values())
            gone = _some([_NAMES[what](key) for key in expected])
            found = f"the history tells of {gone} (entry {first}), which the database does not have: records were deleted"
            faults.append(Fault(first, found, _RESTORE))
    return faults


def _is_from_before(what: str, key: Key, number: int, told: _Told) -> bool:
    """Whether a record is older than the history."""
    if what == EVENT:
        return number <= told.events_before
    before = told.runs_before.get(key[0])
    if before is None:
        return False
    return number <= before["latest"] if what == VERSION else number < before["rounds"]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


async def _rounds(connection: AsyncConnection) -> AsyncIterator[tuple[Facts, int]]:
    """The facts of every round that has ended."""
    query = sa.select(ROUNDS).order_by(ROUNDS.c.run, ROUNDS.c.number)
    ended = query.where(ROUNDS.c.state.in_([state.value for state in ENDED]))
    parts = sa.select(ASSIGNMENTS).where(ASSIGNMENTS.c.run == sa.bindparam("of_run"), ASSIGNMENTS.c.round == sa.bindparam("number"))
    for row in [row._asdict() for row in await connection.execute(ended)]:
        found = await connection.execute(parts.order_by(ASSIGNMENTS.c.place), {"of_run": row["run"], "number": row["number"]})
        yield round_facts(round_from_row(row, [part_from_row(part._asdict()) for part in found])), row["number"]


async def _versions(connection: AsyncConnection) -> AsyncIterator[tuple[Facts, int]]:
    async for row in _stream(connection, sa.select(VERSIONS).order_by(VERSIONS.c.run, VERSIONS.c.number)):
        facts = {"run": row["run"], "number": row["number"], "digest": row["digest"].hex(), "bytes": row["size_bytes"]}
        yield facts, row["number"]


async def _events(connection: AsyncConnection) -> AsyncIterator[tuple[Facts, int]]:
    async for row in _stream(connection, sa.select(EVENTS).order_by(EVENTS.c.sequence)):
        yield event_facts(event_from_row(row)), row["sequence"]


# Keys and heads


def _of_key(chain: Chain, key: bytes) -> Iterator[Fault]:
    if key and chain.key != key:
        yield Fault(
            None,
            f"history.key in the state folder is another key ({fingerprint(key)}) than the one that the history names "
            f"({fingerprint(chain.key)}): the file was replaced, or the history was",
            "put back the file, or the database, that belongs to the other",
        )


def _of_heads(chain: Chain, name: str, heads: Iterable[Head]) -> Iterator[Fault]:
    """What of the heads that a client was handed is not in the history; told once for each kind, for the oldest."""
    seen: set[str] = set()
    for head in sorted(heads, key=lambda head: head.sequence):
        found = _of_head(chain, head)
        if found is not None and found[0] not in seen:
            seen.add(found[0])
            yield Fault(min(head.sequence, chain.last + 1), f"{name}: {found[1]}", found[2])


def _of_head(chain: Chain, head: Head) -> tuple[str, str, str] | None:
    held = f"entry {head.sequence} ({head.digest.hex()[:16]})"
    if not is_genuine(head):
        return "forged", f"the head with {held} has no good signature: the file was changed", "take another client's file"
    if head.key not in chain.keys:
        other = f"the head with {held} is of a history with another key ({fingerprint(head.key)})"
        return "key", other, "give the files of this coordinator's clients; if it is one, the history was replaced"
    if chain.holds(head.sequence, head.digest):
        return None
    if head.sequence > chain.last:
        return "cut", f"it was handed {held}, and the history ends at entry {chain.last}: its end was cut off", _RESTORE
    return (
        "rewritten",
        f"it was handed {held}, and the history has another there: it was written anew",
        _RESTORE,
    )


# Reading


class _Pace:
    """How far it is, told now and then."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def step(self) -> None:
        """One more is done."""
        self._done += 1
        if self._done % 100 == 0 or self._done == self._total:
            self._progress(self._done, self._total)


async def _read(config: ServerConfig, work: Callable[[AsyncConnection], Awaitable[T]]) -> T:
    async with _opened(config) as database:
        try:
            return await database.read(lambda connection: _checked(connection, database.name, work))
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            found = f"database: {database.name} holds something that no coordinator wrote ({error})"
            raise HistoryBroken(f"{found}: {_RESTORE}") from error


async def _checked(connection: AsyncConnection, name: str, work: Callable[[AsyncConnection], Awaitable[T]]) -> T:
    if not await connection.run_sync(lambda sync: sa.inspect(sync).has_table(HISTORY.name)):
        raise ConfigError(f"database: {name} has no history: start this release's `choral server` on it once")
    return await work(connection)


@asynccontextmanager
async def _opened(config: ServerConfig) -> AsyncIterator[Database]:
    path = database_file(config)
    if path is not None and not path.exists():
        raise ConfigError(f"database: {path} does not exist: give the configuration of a coordinator that has run")
    database = await Database.open(config.database_url, Troubles(), migrate=False)
    try:
        yield database
    finally:
        await database.close()


async def _entries(connection: AsyncConnection) -> AsyncIterator[Entry]:
    async for row in _stream(connection, sa.select(HISTORY).order_by(HISTORY.c.sequence)):
        yield entry_from_row(row)


async def _stream(connection: AsyncConnection, query: sa.Select[Any]) -> AsyncIterator[dict[str, Any]]:
    async with connection.stream(query) as result:
        async for rows in result.partitions(_AT_A_TIME):
            for row in rows:
                yield row._asdict()


async def _count(connection: AsyncConnection, *tables: sa.Table) -> int:
    return sum([await connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0 for table in tables])
