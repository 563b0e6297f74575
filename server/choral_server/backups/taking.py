"""Taking a backup, also while a coordinator works."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import sqlalchemy as sa
from alembic.migration import MigrationContext
from choral import __version__
from choral.durable import sync_folder
from choral.errors import ConfigError, OutOfSpace, UnknownArtifact
from sqlalchemy import Table
from sqlalchemy.ext.asyncio import AsyncConnection

from choral_server import history_key
from choral_server.artifacts import Artifacts, open_artifacts
from choral_server.backups.contents import (
    ABOUT,
    CONTENTS,
    FORMAT,
    PIECE_BYTES,
    ROWS_AT_A_TIME,
    TABLES,
    KeptVersion,
    Progress,
    Summary,
    database_file,
    encode,
    first_row,
    known_schemas,
    needed_versions,
    rows_in,
    rows_name,
    versions_prefix,
)
from choral_server.config import ServerConfig
from choral_server.database import Database
from choral_server.tables import RUNS, VERSIONS
from choral_server.troubles import Troubles

_ATTEMPTS = 5  # of catching the newest versions before a coordinator that keeps few has pruned them


class _Overtaken(Exception):
    """A version that must be in the backup was pruned between the look at the database and the look at the store."""


async def back_up(config: ServerConfig, file: Path, now: datetime, progress: Progress = lambda done, total: None) -> Summary:
    """Write all records and versions to `file`, in place of one that is there: whole, or not at all.

    Raises ConfigError: there is nothing to back up, or the newest or best version of a run is missing or damaged; OutOfSpace: the
    file cannot be written; DatabaseGone, ArtifactsGone.
    """
    path = database_file(config)
    if path is not None and not path.exists():
        raise ConfigError(f"database: {path} does not exist: give the configuration of a coordinator that has run")
    _check_target(file)
    database = await Database.open(config.database_url, Troubles(), migrate=False)
    try:
        artifacts = await open_artifacts(config.artifacts, config.state)
        for _ in range(_ATTEMPTS):
            with suppress(_Overtaken):
                return await _Taking(database, artifacts, config.state, file, now, progress).take()
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


class _Taking:
    """One attempt at a backup."""

    def __init__(
        self, database: Database, artifacts: Artifacts, state: Path, file: Path, now: datetime, progress: Progress
    ) -> None:
        self._database = database
        self._artifacts = artifacts
        self._state = state
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
            rows = {table: stack.enter_context(tempfile.TemporaryFile(dir=folder)) for table in TABLES}
            aside = stack.enter_context(_aside(self._file))
            tar = stack.enter_context(tarfile.TarFile(fileobj=aside, mode="w", copybufsize=PIECE_BYTES))
            schema = await self._database.read(lambda connection: _dump(connection, rows))
            self._check(schema)
            await self._add_about(tar, schema)
            versions = await self._add_versions(tar, rows)
            for table, content in rows.items():
                await self._add(tar, rows_name(table), content)
            if (key := history_key.found(self._state)) is not None:
                await self._add(tar, history_key.NAME, io.BytesIO(history_key.written(key)))
            else:
                self._notes.append(f"the key of the history is not in it: {history_key.path_of(self._state)} does not exist")
            await self._add(tar, CONTENTS, _json_file({"files": self._contents, "notes": self._notes}))
            tar.close()
            size_bytes = aside.tell()
            runs = sum(1 for _ in rows_in(RUNS, rows[RUNS]))
        return Summary(self._file, self._now, runs, versions, size_bytes, tuple(self._notes))

    def _check(self, schema: str | None) -> None:
        newest = known_schemas()[0]
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
        await self._add(tar, ABOUT, _json_file(about))

    async def _add_versions(self, tar: tarfile.TarFile, rows: Mapping[Table, IO[bytes]]) -> int:
        """Add the files of every version that is kept; how many there are. First those that must not be missing."""
        needed = set(needed_versions(rows_in(RUNS, rows[RUNS])))
        if not needed:
            raise ConfigError(f"database: {self._database.name} holds no run: there is nothing to back up")
        listed = {key for run in {run for run, _ in needed} for key in await self._artifacts.list(versions_prefix(run))}
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

    async def _add_version(self, tar: tarfile.TarFile, version: KeptVersion, has_optimizer: bool) -> str | None:
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

    async def _is_not_newest(self, version: KeptVersion) -> bool:
        """Whether the run has gone on since, so that the version's absence is nothing bad."""
        query = sa.select(RUNS).where(RUNS.c.name == version.run)
        row = await self._database.read(lambda connection: first_row(connection, query))
        return row is None or version.key not in set(needed_versions([row]))

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
    if schema != known_schemas()[0]:
        return schema
    for table, file in rows.items():
        file.seek(0)  # this may be another attempt
        file.truncate()
        async with connection.stream(sa.select(table).order_by(*table.primary_key)) as result:
            async for batch in result.partitions(ROWS_AT_A_TIME):
                lines = "".join(f"{encode(table, row._asdict())}\n" for row in batch)
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


def _versions(file: IO[bytes]) -> Iterator[KeptVersion]:
    return (KeptVersion(row["run"], row["number"], row["digest"], row["size_bytes"]) for row in rows_in(VERSIONS, file))


def _json_file(content: Any) -> IO[bytes]:
    return io.BytesIO(json.dumps(content, indent=1).encode())
