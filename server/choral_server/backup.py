"""Backups: one file with all records and versions, taken while a coordinator works, restored into any database and store.

A tar of

    backup.json            what this is: format, release, schema, when, of which database
    runs/RUN/versions/…    the checkpoint files as the artifact store has them, the newest and the best of each run first
    tables/TABLE.jsonl     the rows, all of one moment, a JSON object a line
    contents.json          size and SHA-256 of every file above; one that is not named here does not count

Keys, certificates and the configuration are not in it.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import io
import json
import math
import os
import re
import tarfile
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import sqlalchemy as sa
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from choral import __version__
from choral.durable import sync_folder
from choral.errors import ConfigError, LeaseLost, OutOfSpace, UnknownArtifact
from choral.messages import VersionRef
from choral.metrics import Metric
from sqlalchemy import Table
from sqlalchemy.ext.asyncio import AsyncConnection

from choral_server.artifacts import Artifacts, open_artifacts
from choral_server.checkpoints import BEST, LATEST, Checkpoints
from choral_server.config import ServerConfig
from choral_server.database import Database
from choral_server.lease import Lease
from choral_server.records import EventRecord, RunState
from choral_server.rounds import ENDED, Round, RoundState, discarded
from choral_server.standing import consequences
from choral_server.tables import (
    ASSIGNMENTS,
    EVENTS,
    LEASES,
    METADATA,
    ROUNDS,
    RUNS,
    VERSIONS,
    Metrics,
    Moment,
    Row,
    event_to_row,
    part_from_row,
    part_to_row,
    round_from_row,
    round_to_row,
)
from choral_server.troubles import Troubles

FORMAT = 1
WHY = "restored from a backup"
Progress = Callable[[int, int], None]
"""called with the bytes done and the bytes in all"""
_TABLES = [table for table in METADATA.sorted_tables if table is not LEASES]  # each behind those that it refers to
_ABOUT, _CONTENTS = "backup.json", "contents.json"
_ROWS_AT_A_TIME = 1000
_PIECE_BYTES = 1 << 20
_ATTEMPTS = 5  # of catching the newest versions before a coordinator that keeps few has pruned them
_RUN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")  # it becomes a folder
_RELEASE_S = 5.0  # a database that is gone keeps nobody from ending


@dataclass(frozen=True)
class Summary:
    """What a backup holds, or what a restoration brought back. `notes` says of what, and why, it is less than one may think."""

    file: Path
    taken_at: datetime
    runs: int
    versions: int
    size_bytes: int
    notes: tuple[str, ...] = ()


class _Overtaken(Exception):
    """A version that must be in the backup was pruned between the look at the database and the look at the store."""


# Taking a backup


async def back_up(config: ServerConfig, file: Path, now: datetime, progress: Progress = lambda done, total: None) -> Summary:
    """Write all records and versions to `file`, in place of one that is there: whole, or not at all.

    Raises ConfigError: there is nothing to back up, or the newest or best version of a run is missing or damaged; OutOfSpace: the
    file cannot be written; DatabaseGone, ArtifactsGone.
    """
    path = _database_file(config)
    if path is not None and not path.exists():
        raise ConfigError(f"database: {path} does not exist: give the configuration of a coordinator that has run")
    _check_target(file)
    database = await Database.open(config.database_url, Troubles(), migrate=False)
    try:
        artifacts = await open_artifacts(config.artifacts, config.state)
        for _ in range(_ATTEMPTS):
            with suppress(_Overtaken):
                return await _Taking(database, artifacts, file, now, progress).take()
    finally:
        await database.close()
    raise ConfigError(
        f"run.keep_versions: versions are pruned faster than they can be copied ({_ATTEMPTS} attempts): "
        "keep more of them, or pause the run meanwhile (`choral runs pause`)"
    )


def _check_target(file: Path) -> None:
    if file.is_dir():
        raise ConfigError(f"{file} is a folder: give the name of a file")
    if not file.absolute().parent.is_dir():
        raise ConfigError(f"{file.absolute().parent} does not exist: make that folder, or give a file in another")


@dataclass(frozen=True, slots=True)
class _Version:
    """A version as its row has it."""

    run: str
    number: int
    digest: bytes
    size_bytes: int

    @property
    def weights(self) -> str:
        """The key of the checkpoint file."""
        return f"{_prefix(self.run)}{self.number:06d}.safetensors"

    @property
    def optimizer(self) -> str:
        """The key of the server optimizer's state."""
        return f"{_prefix(self.run)}{self.number:06d}.optimizer.safetensors"

    @property
    def reference(self) -> VersionRef:
        """As it is announced."""
        return VersionRef(self.number, self.digest, self.size_bytes)

    @property
    def key(self) -> tuple[str, int]:
        """Which one it is."""
        return self.run, self.number


class _Taking:
    """One attempt at a backup."""

    def __init__(self, database: Database, artifacts: Artifacts, file: Path, now: datetime, progress: Progress) -> None:
        self._database = database
        self._artifacts = artifacts
        self._file = file
        self._now = now
        self._progress = progress
        self._contents: dict[str, dict[str, Any]] = {}
        self._notes: list[str] = []
        self._done = self._total = 0

    async def take(self) -> Summary:
        """Make the file. Raises _Overtaken."""
        try:
            return await self._take()
        except OSError as error:
            why = error.strerror or str(error)
            raise OutOfSpace(f"{self._file} cannot be written ({why}): make room there, or give another file") from error

    async def _take(self) -> Summary:
        with ExitStack() as stack:
            folder = self._file.absolute().parent
            rows = {table: stack.enter_context(tempfile.TemporaryFile(dir=folder)) for table in _TABLES}
            aside = stack.enter_context(_aside(self._file))
            tar = stack.enter_context(tarfile.TarFile(fileobj=aside, mode="w", copybufsize=_PIECE_BYTES))
            schema = await self._database.read(lambda connection: _dump(connection, rows))
            self._check(schema)
            await self._add_about(tar, schema)
            versions = await self._add_versions(tar, rows)
            for table, content in rows.items():
                await self._add(tar, _member(table), content)
            await self._add(tar, _CONTENTS, _json_file({"files": self._contents, "notes": self._notes}))
            tar.close()
            size_bytes = aside.tell()
            runs = sum(1 for _ in _lines(RUNS, rows[RUNS]))
        return Summary(self._file, self._now, runs, versions, size_bytes, tuple(self._notes))

    def _check(self, schema: str | None) -> None:
        newest = _schemas()[0]
        if schema is None:
            raise ConfigError(f"database: {self._database.name} holds nothing of Choral's: there is nothing to back up")
        if schema != newest:
            raise ConfigError(
                f"database: {self._database.name} was made by an older release (its schema is {schema}, this one's {newest}): "
                "take the backup with that release, or start this one's coordinator first"
            )

    async def _add_about(self, tar: tarfile.TarFile, schema: str | None) -> None:
        about = {
            "format": FORMAT,
            "release": __version__,
            "schema": schema,
            "taken_at": self._now.isoformat(),
            "database": self._database.name,
        }
        await self._add(tar, _ABOUT, _json_file(about))

    async def _add_versions(self, tar: tarfile.TarFile, rows: Mapping[Table, IO[bytes]]) -> int:
        """Add the files of every version that is kept; how many there are. First those that must not be missing."""
        needed = set(_needed(_lines(RUNS, rows[RUNS])))
        if not needed:
            raise ConfigError(f"database: {self._database.name} holds no run: there is nothing to back up")
        listed = {key for run in {run for run, _ in needed} for key in await self._artifacts.list(_prefix(run))}
        kept = [version for version in _versions(rows[VERSIONS]) if version.key in needed or version.weights in listed]
        kept.sort(key=lambda version: version.key not in needed)
        if missing := needed - {version.key for version in kept}:
            run, number = min(missing)
            raise ConfigError(f"run {run}: the database has no version {number}: restore an earlier backup")
        self._total = sum(version.size_bytes for version in kept)
        count = 0
        for version in kept:
            if (fault := await self._add_version(tar, version, version.optimizer in listed)) is None:
                count += 1
            elif version.key not in needed:
                self._notes.append(f"run {version.run}: version {version.number} {fault} and is left out")
            elif fault == _PRUNED and await self._is_not_newest(version):
                raise _Overtaken
            else:
                where = self._artifacts.location(version.weights)
                what = "is missing" if fault == _PRUNED else fault
                raise ConfigError(
                    f"run {version.run}: version {version.number} {what} ({where}): restore it from an earlier backup"
                )
        return count

    async def _add_version(self, tar: tarfile.TarFile, version: _Version, has_optimizer: bool) -> str | None:
        """Add a version's files; what is wrong with it, if it must be left out."""
        # written before the weights and deleted after them: where the weights are afterwards, this is what belongs to them
        optimizer = await self._open(version.optimizer) if has_optimizer else None
        weights = await self._open(version.weights)
        with ExitStack() as stack:
            if optimizer is not None:
                stack.enter_context(optimizer)
            if weights is None:
                return _PRUNED
            stack.enter_context(weights)
            if optimizer is not None:
                await self._add(tar, version.optimizer, optimizer)
            await self._add(tar, version.weights, weights, self._advance)
        found = self._contents[version.weights]
        if (found["sha256"], found["size"]) != (version.digest.hex(), version.size_bytes):
            del self._contents[version.weights]
            self._contents.pop(version.optimizer, None)
            return "is damaged"
        return None

    async def _open(self, key: str) -> IO[bytes] | None:
        """What is kept under `key`, if anything is; a file that is opened stays readable when it is pruned."""
        path = self._artifacts.local(key)
        try:
            return path.open("rb") if path is not None else io.BytesIO(await self._artifacts.get(key))
        except (FileNotFoundError, UnknownArtifact):
            return None

    async def _is_not_newest(self, version: _Version) -> bool:
        """Whether the run has gone on since, so that the version's absence is nothing bad."""
        query = sa.select(RUNS).where(RUNS.c.name == version.run)
        row = await self._database.read(lambda connection: _first(connection, query))
        return row is None or version.key not in set(_needed([row]))

    async def _add(self, tar: tarfile.TarFile, name: str, content: IO[bytes], advance: Callable[[int], None] | None = None) -> None:
        digest = await asyncio.to_thread(_add_to, tar, name, content, self._now, advance)
        self._contents[name] = {"size": content.tell(), "sha256": digest}

    def _advance(self, size_bytes: int) -> None:
        self._done += size_bytes
        self._progress(self._done, self._total)


_PRUNED = "was pruned meanwhile"


class _Hashed:
    """A file that is read from its beginning, and its SHA-256."""

    def __init__(self, file: IO[bytes], advance: Callable[[int], None] | None) -> None:
        self._file = file
        self._advance = advance
        self.digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        piece = self._file.read(size)
        self.digest.update(piece)
        if self._advance is not None:
            self._advance(len(piece))
        return piece


def _add_to(tar: tarfile.TarFile, name: str, content: IO[bytes], now: datetime, advance: Callable[[int], None] | None) -> str:
    """Add a member, in pieces; its SHA-256."""
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.mtime = content.seek(0, os.SEEK_END), 0o600, int(now.timestamp())
    content.seek(0)
    hashed = _Hashed(content, advance)
    tar.addfile(member, hashed)
    return hashed.digest.hexdigest()


async def _dump(connection: AsyncConnection, rows: Mapping[Table, IO[bytes]]) -> str | None:
    """Write the rows of all tables to files; the schema that they are of, None if there is none."""
    schema: str | None = await connection.run_sync(lambda sync: MigrationContext.configure(sync).get_current_revision())
    if schema != _schemas()[0]:
        return schema
    for table, file in rows.items():
        file.seek(0)  # this may be another attempt
        file.truncate()
        async with connection.stream(sa.select(table).order_by(*table.primary_key)) as result:
            async for batch in result.partitions(_ROWS_AT_A_TIME):
                lines = "".join(f"{_encode(table, row._asdict())}\n" for row in batch)
                try:
                    file.write(lines.encode())
                except OSError as error:  # which would be taken for the database's
                    raise OutOfSpace(f"the rows of {table.name} cannot be written ({error.strerror}): make room") from error
    return schema


@contextmanager
def _aside(file: Path) -> Iterator[IO[bytes]]:
    """A file that only its owner may read, and that takes its place once all went well."""
    folder = file.absolute().parent
    descriptor, name = tempfile.mkstemp(dir=folder, prefix=f".{file.name}.", suffix=".aside")
    aside = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as writing:
            yield writing
            writing.flush()
            os.fsync(writing.fileno())
        aside.replace(file)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(folder)


# Rows as JSON


def _encode(table: Table, row: Row) -> str:
    return json.dumps({column.name: _plain(row[column.name]) for column in table.c})


def _plain(value: Any) -> Any:
    match value:
        case datetime():
            return value.isoformat()
        case bytes():
            return value.hex()
        case float():
            return value if math.isfinite(value) else str(value)
        case tuple():
            return [[metric.name, _plain(float(metric.value)), metric.examples] for metric in value]
    return value


def _decode(table: Table, line: bytes) -> Row:
    """Raises ValueError, TypeError or KeyError: it is no row of that table."""
    content = json.loads(line)
    if set(content) != set(table.c.keys()):
        raise ValueError(f"a row of {table.name} has other columns")
    return {column.name: _value(column, content[column.name]) for column in table.c}


def _value(column: sa.Column[Any], plain: Any) -> Any:
    if plain is None:
        return None
    match column.type:
        case Moment():
            return datetime.fromisoformat(plain)
        case Metrics():
            return tuple(Metric(name, float(number), examples) for name, number, examples in plain)
        case sa.LargeBinary():
            return bytes.fromhex(plain)
        case sa.Double():
            return float(plain)
    return plain


def _lines(table: Table, file: IO[bytes]) -> Iterator[Row]:
    """The rows in a file, from its beginning."""
    file.seek(0)
    for line in file:
        yield _decode(table, line)


def _versions(file: IO[bytes]) -> Iterator[_Version]:
    return (_Version(row["run"], row["number"], row["digest"], row["size_bytes"]) for row in _lines(VERSIONS, file))


def _needed(runs: Iterable[Row]) -> Iterator[tuple[str, int]]:
    """The versions without which a run cannot go on as it was: its newest and its best."""
    for run in runs:
        yield run["name"], run["latest"]
        if run["best"] is not None:
            yield run["name"], run["best"]


def _prefix(run: str) -> str:
    return f"runs/{run}/versions/"


def _member(table: Table) -> str:
    return f"tables/{table.name}.jsonl"


def _json_file(content: Any) -> IO[bytes]:
    return io.BytesIO(json.dumps(content, indent=1).encode())


def _schemas() -> list[str]:
    """The schemas that this release knows, the newest first."""
    config = Config()
    config.set_main_option("script_location", "choral_server:migrations")
    return [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()]


async def _first(connection: AsyncConnection, query: sa.Select[Any]) -> Row | None:
    row = (await connection.execute(query)).first()
    return row._asdict() if row is not None else None


# Reading a backup


class Backup:
    """A backup file, opened for reading and found whole. Raises ConfigError wherever it is not what it should be."""

    def __init__(self, path: Path, file: IO[bytes], tar: tarfile.TarFile, progress: Progress) -> None:
        self.path = path
        self._file = file
        self._tar = tar
        self._progress = progress
        self._members: dict[str, tarfile.TarInfo] = {}
        self.files: dict[str, str] = {}
        self.versions: list[_Version] = []
        self.runs: list[Row] = []
        self.taken_at: datetime
        self._done = self._total = 0

    @classmethod
    @contextmanager
    def open(cls, path: Path, progress: Progress) -> Iterator[Backup]:
        """Open and verify it: every byte is read once before anything is done with it."""
        with ExitStack() as stack:
            try:
                file = stack.enter_context(path.open("rb"))
                tar = stack.enter_context(tarfile.open(fileobj=file, mode="r:"))
            except OSError as error:
                raise ConfigError(f"{path} cannot be read ({error.strerror}): give a file that `choral backup` wrote") from error
            except tarfile.TarError as error:
                raise _no_backup(path) from error
            backup = cls(path, file, tar, progress)
            with backup._reading():
                backup._verify()
            yield backup

    def rows(self, table: Table) -> Iterator[list[Row]]:
        """The rows of a table, some at a time."""
        batch: list[Row] = []
        with self._reading(), self._member(_member(table)) as content:
            for row in _lines(table, content):
                batch.append(row)
                if len(batch) == _ROWS_AT_A_TIME:
                    yield batch
                    batch = []
        if batch:
            yield batch

    def content(self, name: str) -> bytes:
        """A file."""
        member = self._members[name]
        with self._reading():
            self._file.seek(member.offset_data)
            content = self._file.read(member.size)
        self.advance(len(content))
        return content

    def advance(self, size_bytes: int) -> None:
        """So much more is done."""
        self._done += size_bytes
        self._progress(self._done, self._total)

    def _verify(self) -> None:
        first = self._tar.next()
        if first is None or first.name != _ABOUT:
            raise _no_backup(self.path)
        with self._member_content(first) as content:
            about = json.load(content)
        self._check(about)
        self.taken_at = datetime.fromisoformat(about["taken_at"])
        self._members = {member.name: member for member in self._tar if member.isreg()}
        with self._member(_CONTENTS) as content:
            contents = json.load(content)["files"]
        versions = {name: found["size"] for name, found in contents.items() if name.startswith("runs/")}
        self._total = 2 * sum(versions.values())  # once here, once when they are written
        for name, found in contents.items():
            self._verify_member(name, found, counts=name in versions)
        self.files = {name: found["sha256"] for name, found in contents.items()}
        for table in _TABLES:
            with self._member(_member(table)) as content:
                for row in _lines(table, content):
                    self._take_note(table, row)
        self._check_runs()

    def _check(self, about: dict[str, Any]) -> None:
        by, schema, known = f"release {about['release']}", about["schema"], _schemas()
        if about["format"] > FORMAT:
            raise ConfigError(
                f"{self.path} was written by {by} in format {about['format']}, and this release ({__version__}) reads up to "
                f"{FORMAT}: restore it with that release or a later one"
            )
        if schema not in known:
            raise ConfigError(
                f"{self.path} was written by {by} with schema {schema}, which this release ({__version__}, schema {known[0]}) "
                "does not know: restore it with that release or a later one"
            )
        if schema != known[0]:
            raise ConfigError(
                f"{self.path} was written by {by} with schema {schema}, and this release ({__version__}) has {known[0]}: "
                "restore it with that release, then let this one's coordinator bring the database up to date"
            )

    def _verify_member(self, name: str, expected: dict[str, Any], counts: bool) -> None:
        digest, size = hashlib.sha256(), 0
        with self._member(name) as content:
            while piece := content.read(_PIECE_BYTES):
                digest.update(piece)
                size += len(piece)
                if counts:
                    self.advance(len(piece))
        if (digest.hexdigest(), size) != (expected["sha256"], expected["size"]):
            raise ValueError(f"{name} is not what was written")

    def _take_note(self, table: Table, row: Row) -> None:
        if table is RUNS:
            if not _RUN_NAME.fullmatch(row["name"]):
                raise ValueError(f"{row['name']!r} is no name of a run")
            self.runs.append(row)
        elif table is VERSIONS:
            version = _Version(row["run"], row["number"], row["digest"], row["size_bytes"])
            if version.weights not in self.files:
                return
            if self.files[version.weights] != version.digest.hex():
                raise ValueError(f"{version.weights} is another than the one published")
            self.versions.append(version)

    def _check_runs(self) -> None:
        if not self.runs:
            raise ValueError("it holds no run")
        if missing := set(_needed(self.runs)) - {version.key for version in self.versions}:
            run, number = min(missing)
            raise ValueError(f"version {number} of run {run} is not in it")

    def _member(self, name: str) -> IO[bytes]:
        return self._member_content(self._members[name])

    def _member_content(self, member: tarfile.TarInfo) -> IO[bytes]:
        content = self._tar.extractfile(member)
        if content is None:
            raise ValueError(f"{member.name} is no file")
        return content

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except KeyError as error:
            raise self._damaged(f"it has no {error.args[0]}: was it cut off?") from error
        except (OSError, tarfile.TarError, ValueError, TypeError, AttributeError) as error:
            raise self._damaged(str(error)) from error

    def _damaged(self, why: str) -> ConfigError:
        return ConfigError(f"{self.path} is damaged ({why}): copy it again from where it was written, or give an earlier backup")


def _no_backup(path: Path) -> ConfigError:
    return ConfigError(f"{path} is no backup: give a file that `choral backup` wrote")


# Restoring


async def restore(config: ServerConfig, file: Path, now: datetime, progress: Progress = lambda done, total: None) -> Summary:
    """Bring back all that is in a backup into an empty database, and a store that has none of these versions or the same ones.

    Rounds that were under way are abandoned: their uploads are in no backup. Versions are written first and all rows in one
    transaction, so what is interrupted can be done again. Raises ConfigError, and has changed nothing: the file cannot be used, the
    database is not empty or in use, or the store has other files in the versions' place. Raises ArtifactsGone, LeaseLost.
    """
    path = _database_file(config)
    with Backup.open(file, progress) as backup, _locked(config.state):
        artifacts = await open_artifacts(config.artifacts, config.state)
        if path is None or path.exists():
            await _refuse_if_used(config)
        database = await Database.open(config.database_url, Troubles())
        try:
            async with _leased(database, config.lease_s) as lease:
                restoration = _Restoration(backup, database, artifacts, config.state, now)
                await restoration.write_versions()
                await restoration.write_rows(lease)
                restoration.point()
        finally:
            await database.close()
        return restoration.summary


async def _refuse_if_used(config: ServerConfig) -> None:
    """Look before anything is changed, even the schema."""
    database = await Database.open(config.database_url, Troubles(), migrate=False)
    try:
        await database.read(lambda connection: _must_be_empty(connection, database.name))
    finally:
        await database.close()


async def _must_be_empty(connection: AsyncConnection, name: str) -> None:
    there = await connection.run_sync(lambda sync: set(sa.inspect(sync).get_table_names()))
    for table in _TABLES:
        if table.name not in there:
            continue
        if count := await connection.scalar(sa.select(sa.func.count()).select_from(table)):
            raise ConfigError(
                f"database: {name} is not empty (it holds {count} {table.name}), and a backup overwrites nothing: "
                "give a new database, or move this one away"
            )


class _Restoration:
    """One restoration, in three steps."""

    def __init__(self, backup: Backup, database: Database, artifacts: Artifacts, state: Path, now: datetime) -> None:
        self._backup = backup
        self._database = database
        self._artifacts = artifacts
        self._now = now
        self._checkpoints = {run["name"]: Checkpoints(artifacts, state, run["name"]) for run in backup.runs}
        told = f"from the backup of {backup.taken_at:%Y-%m-%d %H:%M:%S %Z}"
        self._events = [EventRecord(now, "run restored", told, run["name"]) for run in backup.runs]
        self._abandoned: list[str] = []
        self._size_bytes = 0

    @property
    def summary(self) -> Summary:
        """What was restored."""
        backup = self._backup
        counts = len(backup.runs), len(backup.versions), self._size_bytes
        return Summary(backup.path, backup.taken_at, *counts, tuple(self._abandoned))

    async def write_versions(self) -> None:
        """Put the versions into the store. Raises ConfigError, before anything is written: something else is in their place."""
        keys = [key for version in self._backup.versions for key in (version.optimizer, version.weights)]
        there = {key for run in self._checkpoints for key in await self._artifacts.list(_prefix(run))}
        for key in keys:
            if key in there and await self._digest(key) != self._backup.files.get(key):
                raise ConfigError(
                    f"artifacts: {self._artifacts.location(key)} is there already and another than in the backup: "
                    "move it away, or give another store"
                )
        for key in keys:
            if key in self._backup.files:
                self._size_bytes += await self._put(key, key in there)
        needed = set(_needed(self._backup.runs))
        for version in self._backup.versions:
            if version.key in needed:  # the copy that is served, if the store is elsewhere; and to see that the store has it
                await self._checkpoints[version.run].fetch(version.number, version.reference)

    async def write_rows(self, lease: Lease) -> None:
        """Write all rows in one transaction, which fails if another has written some meanwhile."""
        await self._database.write(lambda connection: self._write(connection, lease))

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
        if await _first(connection, done) is not None:  # the connection broke during our own COMMIT
            return
        await _must_be_empty(connection, self._database.name)
        unfinished = _Unfinished()
        for table in _TABLES:
            for rows in self._backup.rows(table):
                unfinished.see(table, rows)
                await connection.execute(sa.insert(table), [self._adapted(table, row) for row in rows])
        if connection.dialect.name == "postgresql":
            await _go_on_counting(connection)
        events, self._abandoned = [*self._events], []
        for given_up in unfinished.given_up():
            await _update(connection, given_up, unfinished.places)
            events += [event for event in consequences(given_up, (), {}, None, self._now) if isinstance(event, EventRecord)]
            self._abandoned.append(f"run {given_up.run}: round {given_up.number} was under way and is abandoned")
        await connection.execute(sa.insert(EVENTS), [event_to_row(event) for event in events])

    def _adapted(self, table: Table, row: Row) -> Row:
        """The row as it is true here and now."""
        if table is VERSIONS:
            return row | {"checkpoint": self._artifacts.location(_Version(row["run"], row["number"], b"", 0).weights)}
        if table is RUNS:
            waiting = {"state": RunState.WAITING.value, "reason": ""} if row["state"] == RunState.IN_ROUND.value else {}
            return row | waiting | {"next_round": self._next_round(row["next_round"])}
        return row

    def _next_round(self, number: int) -> int:
        """Which number the next round gets: one that no round has had since the backup was taken.

        A part is known by its run, round and client. Clients may still be at parts, and have results, of rounds of which the backup
        knows nothing; were the numbers given again, such a result would be taken for one that starts from another version. (A run
        without any round keeps its 0, which says that it is still to wait for `start_with` clients.)
        """
        return max(number, int(self._now.timestamp())) if number else 0


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


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The state folder, which no coordinator may use meanwhile. Raises ConfigError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ConfigError(f"state: {folder} cannot be used ({error.strerror}): give a folder that this user may write") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise ConfigError(f"state: {folder} is in use by a coordinator: stop it, or give another folder") from error
    finally:
        os.close(lock)


def _database_file(config: ServerConfig) -> Path | None:
    """The file of a database that is one. Raises ConfigError: it is in no file and on no server."""
    scheme, _, rest = config.database_url.partition("://")
    if scheme != "sqlite":
        return None
    if rest in ("", "/", "/:memory:"):
        raise ConfigError("database: sqlite:// is in the memory of the coordinator that uses it: nobody else can read or write it")
    return Path(rest.removeprefix("/"))
