"""Restoring a backup into an empty database, of either kind, and any artifact store."""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import sqlalchemy as sa
from choral.errors import ConfigError, LeaseLost
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import Table
from sqlalchemy.ext.asyncio import AsyncConnection

from choral_server import history_key
from choral_server.artifacts import Artifacts, open_artifacts
from choral_server.backups.contents import (
    TABLES,
    KeptVersion,
    Progress,
    Summary,
    database_file,
    first_row,
    needed_versions,
    versions_prefix,
)
from choral_server.backups.reading import Backup
from choral_server.checkpoints import BEST, LATEST, Checkpoints
from choral_server.config import ServerConfig
from choral_server.database import Database
from choral_server.facts import told_by
from choral_server.history import History
from choral_server.lease import Lease
from choral_server.records import EventRecord, Record, RunState
from choral_server.rounds import ENDED, Round, RoundState, discarded
from choral_server.standing import consequences
from choral_server.state_folder import locked
from choral_server.store import newest_entry
from choral_server.tables import (
    ASSIGNMENTS,
    EVENTS,
    HISTORY,
    ROUNDS,
    RUNS,
    VERSIONS,
    Row,
    entry_to_row,
    event_to_row,
    part_from_row,
    part_to_row,
    round_from_row,
    round_to_row,
)
from choral_server.troubles import Troubles

WHY = "restored from a backup"
_RELEASE_S = 5.0  # a database that is gone keeps nobody from ending


async def restore(config: ServerConfig, file: Path, now: datetime, progress: Progress = lambda done, total: None) -> Summary:
    """Bring back all that is in a backup into an empty database, and a store that has none of these versions or the same ones.

    Rounds that were under way are abandoned: their uploads are in no backup. Versions are written first and all rows in one
    transaction, so what is interrupted can be done again. Raises ConfigError, and has changed nothing: the file cannot be used, the
    database is not empty or in use, or the store has other files in the versions' place; TrustError: its key of the
    history is none. Raises ArtifactsGone, LeaseLost.
    """
    path = database_file(config)
    with Backup.open(file, progress) as backup, locked(config.state):
        artifacts = await open_artifacts(config.artifacts, config.state)
        if path is None or path.exists():
            await _refuse_if_used(config)
        database = await Database.open(config.database_url, Troubles())
        try:
            async with _leased(database, config.lease_s) as lease:
                key = _history_key(backup, config.state)
                restoration = _Restoration(backup, database, artifacts, config.state, now, key)
                await restoration.write_versions()
                history_key.keep(config.state, key)  # to stay, before a row that it signed is
                await restoration.write_rows(lease)
                restoration.point()
        finally:
            await database.close()
        return restoration.summary


def _history_key(backup: Backup, state: Path) -> Ed25519PrivateKey:
    """The key with which the history goes on. Raises ConfigError: another one is in the state folder."""
    saved, there = backup.history_key, history_key.found(state)
    if saved is None:
        return there if there is not None else Ed25519PrivateKey.generate()
    if there is not None and history_key.public_part(there) != history_key.public_part(saved):
        raise ConfigError(
            f"{history_key.path_of(state)} is there already and another key than the one in the backup, which signed its history: "
            "move it away, or give another state folder"
        )
    return saved


async def _refuse_if_used(config: ServerConfig) -> None:
    """Look before anything is changed, even the schema."""
    database = await Database.open(config.database_url, Troubles(), migrate=False)
    try:
        await database.read(lambda connection: _must_be_empty(connection, database.name))
    finally:
        await database.close()


async def _must_be_empty(connection: AsyncConnection, name: str) -> None:
    there = await connection.run_sync(lambda sync: set(sa.inspect(sync).get_table_names()))
    for table in (RUNS, *TABLES):  # what says most to people first
        if table.name not in there:
            continue
        if count := await connection.scalar(sa.select(sa.func.count()).select_from(table)):
            raise ConfigError(
                f"database: {name} is not empty (it holds {count} {table.name}), and a backup overwrites nothing: "
                "give a new database, or move this one away"
            )


class _Restoration:
    """One restoration, in three steps."""

    def __init__(
        self, backup: Backup, database: Database, artifacts: Artifacts, state: Path, now: datetime, key: Ed25519PrivateKey
    ) -> None:
        self._backup = backup
        self._database = database
        self._artifacts = artifacts
        self._now = now
        self._key = key
        self._checkpoints = {run["name"]: Checkpoints(artifacts, state, run["name"]) for run in backup.runs}
        told = f"from the backup of {backup.taken_at:%Y-%m-%d %H:%M:%S %Z}"
        self._events = [EventRecord(now, "run restored", told, run["name"]) for run in backup.runs]
        self._notes: list[str] = []
        self._size_bytes = 0

    @property
    def summary(self) -> Summary:
        """What was restored."""
        backup = self._backup
        counts = len(backup.runs), len(backup.versions), self._size_bytes
        return Summary(backup.path, backup.taken_at, *counts, tuple(self._notes))

    async def write_versions(self) -> None:
        """Put the versions into the store. Raises ConfigError, before anything is written: something else is in their place."""
        keys = [key for version in self._backup.versions for key in (version.optimizer, version.weights)]
        there = {key for run in self._checkpoints for key in await self._artifacts.list(versions_prefix(run))}
        for key in keys:
            if key in there and await self._digest(key) != self._backup.files.get(key):
                raise ConfigError(
                    f"artifacts: {self._artifacts.location(key)} is there already and another than in the backup: "
                    "move it away, or give another store"
                )
        await self._refuse_newer()
        for key in keys:
            if key in self._backup.files:
                self._size_bytes += await self._put(key, key in there)
        needed = set(needed_versions(self._backup.runs))
        for version in self._backup.versions:
            if version.key in needed:  # the copy that is served, if the store is elsewhere; and to see that the store has it
                await self._checkpoints[version.run].fetch(version.number, version.reference)

    async def _refuse_newer(self) -> None:
        """Raises ConfigError: the store has versions that the run would write over as it goes on."""
        for run in self._backup.runs:
            checkpoints = self._checkpoints[run["name"]]
            if (newest := max(await checkpoints.numbers(), default=0)) > run["latest"]:
                raise ConfigError(
                    f"artifacts: {checkpoints.location(newest)} is newer than the backup, in which the newest version of run "
                    f"{run['name']} is {run['latest']}: move the newer versions away, or give another store"
                )

    async def write_rows(self, lease: Lease) -> None:
        """Write all rows in one transaction, which fails if another has written some meanwhile.

        Raises ConfigError: they contradict each other.
        """
        try:
            await self._database.write(lambda connection: self._write(connection, lease))
        except (sa.exc.StatementError, LookupError, TypeError, ValueError) as error:
            why = getattr(error, "orig", None) or error
            raise ConfigError(
                f"{self._backup.path} cannot be used (its rows do not go together: {why}): give another backup"
            ) from error

    def point(self) -> None:
        """Let the names in the folder follow."""
        for run in self._backup.runs:
            self._checkpoints[run["name"]].point(LATEST, run["latest"])
            if run["best"] is not None:
                self._checkpoints[run["name"]].point(BEST, run["best"])

    async def _put(self, key: str, is_there: bool) -> int:
        """Write a file, unless it is there; its size. In a call of its own, so that one is gone before the next is read."""
        content = await asyncio.to_thread(self._backup.content, key)
        if not is_there:
            await self._artifacts.put(key, content)
        return len(content)

    async def _digest(self, key: str) -> str:
        path = self._artifacts.local(key)
        if path is not None:
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        return hashlib.sha256(await self._artifacts.get(key)).hexdigest()

    async def _write(self, connection: AsyncConnection, lease: Lease) -> None:
        await lease.hold(connection)
        done = sa.select(EVENTS.c.id).where(EVENTS.c.id == self._events[0].id)
        if await first_row(connection, done) is not None:  # the connection broke during our own COMMIT
            return
        await _must_be_empty(connection, self._database.name)
        unfinished = _Unfinished()
        for table in TABLES:
            for rows in self._backup.rows(table):
                unfinished.see(table, rows)
                await connection.execute(sa.insert(table), [self._adapted(table, row) for row in rows])
        if connection.dialect.name == "postgresql":
            await _go_on_counting(connection)
        events, self._notes = [*self._events], []
        rounds = list(unfinished.given_up())
        for given_up in rounds:
            await _update(connection, given_up, unfinished.places)
            events += [event for event in consequences(given_up, (), {}, None, self._now) if isinstance(event, EventRecord)]
            self._notes.append(f"run {given_up.run}: round {given_up.number} was under way and is abandoned")
        await connection.execute(sa.insert(EVENTS), [event_to_row(event) for event in events])
        await self._tell(connection, *rounds, *events)

    async def _tell(self, connection: AsyncConnection, *records: Record) -> None:
        """Let the history go on with what was done here, and with a new key first, if its own is lost."""
        newest = await newest_entry(connection)
        history, told = History(self._key), list(told_by(records, {}))
        if newest is not None:
            history.head = newest.head(history_key.public_part(self._key))
            if not history_key.fits(self._key, newest):
                told.insert(0, history.new_key)
                self._notes.append("the key of the history is not in the backup: it goes on with a new one, and clients will warn")
        await connection.execute(sa.insert(HISTORY), [entry_to_row(entry) for entry in history.next(self._now, told)])

    def _adapted(self, table: Table, row: Row) -> Row:
        """The row as it is true here and now."""
        if table is VERSIONS:
            return row | {"checkpoint": self._artifacts.location(KeptVersion(row["run"], row["number"], b"", 0).weights)}
        if table is RUNS:
            waiting = {"state": RunState.WAITING.value, "reason": ""} if row["state"] == RunState.IN_ROUND.value else {}
            # Clients may be at parts, and have results, of rounds that the backup does not know, and whose numbers are given again.
            return row | waiting | {"nonce": secrets.token_hex(4)}
        return row


@dataclass
class _Unfinished:
    """The rounds that were under way, picked from the rows that go by."""

    rounds: dict[tuple[str, int], Row] = field(default_factory=dict)
    parts: dict[tuple[str, int], list[Row]] = field(default_factory=dict)
    places: dict[str, int] = field(default_factory=dict)

    def see(self, table: Table, rows: Iterable[Row]) -> None:
        """Keep what belongs to such a round; assignments come behind rounds."""
        for row in rows if table in (ROUNDS, ASSIGNMENTS) else ():
            if table is ROUNDS and RoundState(row["state"]) not in ENDED:
                self.rounds[row["run"], row["number"]] = row
            elif table is ASSIGNMENTS and (key := (row["run"], row["round"])) in self.rounds:
                self.parts.setdefault(key, []).append(row)
                self.places[row["assignment"]] = row["place"]

    def given_up(self) -> Iterator[Round]:
        """The rounds as they are stored."""
        for key, row in self.rounds.items():
            parts = sorted(self.parts.get(key, []), key=lambda part: int(part["place"]))
            yield discarded(round_from_row(row, map(part_from_row, parts)), WHY)


async def _update(connection: AsyncConnection, round: Round, places: Mapping[str, int]) -> None:
    where = sa.and_(ROUNDS.c.run == round.run, ROUNDS.c.number == round.number)
    await connection.execute(sa.update(ROUNDS).where(where).values(round_to_row(round)))
    for part in round.parts.values():
        row = part_to_row(part, round.run, round.number, places[part.assignment])
        await connection.execute(sa.update(ASSIGNMENTS).where(ASSIGNMENTS.c.assignment == part.assignment).values(row))


async def _go_on_counting(connection: AsyncConnection) -> None:
    """Let PostgreSQL number events behind those that came with their numbers; SQLite does by itself."""
    counter = sa.func.pg_get_serial_sequence(EVENTS.name, EVENTS.c.sequence.name)
    last = await connection.scalar(sa.select(sa.func.max(EVENTS.c.sequence)))
    if last is not None:
        await connection.execute(sa.select(sa.func.setval(counter, last)))


@asynccontextmanager
async def _leased(database: Database, lease_s: float) -> AsyncIterator[Lease]:
    """The lease on the database, kept until the end. Raises ConfigError: a coordinator has it."""
    lease = await Lease.take(database, f"restore on {os.uname().nodename}", lease_s)
    renewing = asyncio.create_task(lease.renew_forever())
    try:
        yield lease
    finally:
        renewing.cancel()
        with suppress(asyncio.CancelledError, LeaseLost):
            await renewing
        with suppress(LeaseLost, TimeoutError):
            async with asyncio.timeout(_RELEASE_S):
                await lease.give_up()
