"""The database: SQLite or PostgreSQL, brought to this release's schema, and transactions that outlast its absence."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from choral.errors import ConfigError, DatabaseGone
from sqlalchemy import Connection, event
from sqlalchemy.exc import (
    DataError,
    DBAPIError,
    IntegrityError,
    InterfaceError,
    NotSupportedError,
    ProgrammingError,
    SQLAlchemyError,
)
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from choral_server.troubles import Troubles

T = TypeVar("T")
Work = Callable[[AsyncConnection], Awaitable[T]]
SUBJECT = "database"
_BUSY_S = 5.0  # for as long SQLite itself waits for another process to finish writing
_WAL_AGAIN_S = 0.02
_SILENT_S = 10.0  # a server that says nothing for so long is gone
_BACKOFF_S = (0.1, 2.0)  # first and longest wait between two attempts
_BEGIN = "choral_begin"
_MIGRATING = 0x63686F72616C  # the advisory lock under which one process at a time migrates: "choral"
_WRONG_SQLSTATES = ("22", "23", "42")  # the data, a constraint or the statement, not the server


class Database:
    """A database in use. `name` is its URL as people may see it, without password."""

    def __init__(self, name: str, engine: AsyncEngine, troubles: Troubles) -> None:
        self.name = name
        self.dialect = engine.dialect.name
        self._engine = engine
        self._reading, self._writing = _readers(engine), engine.execution_options(**{_BEGIN: "BEGIN IMMEDIATE"})
        self._troubles = troubles
        self._turn = asyncio.Lock()  # one writer at a time: on SQLite a second would only wait inside the database
        self._in_memory = isinstance(engine.sync_engine.pool, sa.StaticPool)

    @classmethod
    async def open(cls, url: str, troubles: Troubles, busy_s: float = _BUSY_S, migrate: bool = True) -> Database:
        """Connect, and apply what migrations are missing, if asked. Raises ConfigError: no use can be made of the database.

        `url` is sqlite:///path, sqlite:// (in memory) or postgresql://user:password@host:port/name, the latter with all that
        asyncpg understands. SQLite waits `busy_s` seconds for other processes that write before it counts as gone.
        """
        name = _shown(url)
        engine = _engine(url, name, busy_s)
        database = cls(name, engine, troubles)
        try:
            await database._attempt(database._writing, lambda connection: connection.run_sync(_migrate, name, migrate))
        except BaseException as error:
            await engine.dispose()
            if isinstance(error, SQLAlchemyError | sqlite3.Error | OSError | ValueError) or _is_gone(error):
                raise _unusable(name, error) from error
            raise
        return database

    async def write(self, work: Work[T], then: Callable[[], None] = lambda: None) -> T:
        """Do `work` in one transaction, and `then` right after its COMMIT; while the database is gone, wait and try again.

        `work` must be idempotent: a connection that breaks during COMMIT leaves open whether it was done.
        """
        async with self._turn:
            pause_s, longest_s = _BACKOFF_S
            while True:
                try:
                    result = await _whole(self._attempt(self._writing, work, then))
                except Exception as error:
                    if not _is_gone(error):
                        raise
                    self._troubles.found(SUBJECT, f"{self.name} is gone ({_cause(error)}); what is to be stored waits for it")
                else:
                    self._troubles.over(SUBJECT)
                    return result
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, longest_s)

    async def read(self, work: Work[T]) -> T:
        """Do `work`, which changes nothing, on one state of the database. Raises DatabaseGone."""
        if not self._in_memory:
            return await self._read(work)
        async with self._turn:  # there is one connection, and so one transaction
            return await self._read(work)

    async def close(self) -> None:
        """Close all connections."""
        await self._engine.dispose()

    async def _read(self, work: Work[T]) -> T:
        for stale in (True, False):
            try:
                return await _whole(self._attempt(self._reading, work))
            except Exception as error:
                if stale and isinstance(error, DBAPIError) and error.connection_invalidated:
                    continue  # a connection from before a restart of the server says nothing about the server now
                if _is_gone(error):
                    raise DatabaseGone(f"{self.name} is gone ({_cause(error)}): try again once it is back") from error
                raise
        raise AssertionError("the second attempt returns or raises")

    async def _attempt(self, engine: AsyncEngine, work: Work[T], then: Callable[[], None] = lambda: None) -> T:
        async with engine.connect() as connection:
            try:
                async with connection.begin():
                    result = await work(connection)
            except Exception:
                if not self._in_memory:  # which would be lost with its connection
                    await connection.invalidate()  # in whatever state it is: the next attempt gets a fresh one
                raise
            then()
        return result


async def _whole(attempt: Coroutine[Any, Any, T]) -> T:
    """Await `attempt`; cancelled, let it end first, so that what was committed is known, and no connection is torn down for it."""
    task = asyncio.ensure_future(attempt)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # nobody else asks
        raise


def _is_gone(error: BaseException) -> bool:
    """Whether the same may succeed later: the database does not answer, is locked, full or starting, but the request is right."""
    if isinstance(error, ProgrammingError | IntegrityError | DataError | NotSupportedError):
        return False
    driver = _driver_error(error)
    if isinstance(error, InterfaceError) and isinstance(driver, ValueError):
        return False  # asyncpg cannot encode a value
    if getattr(driver, "sqlite_errorcode", None) == sqlite3.SQLITE_ERROR:
        return False  # the statement is wrong: no such table, no such column
    sqlstate = getattr(driver, "sqlstate", None)
    if isinstance(sqlstate, str):
        return not sqlstate.startswith(_WRONG_SQLSTATES)
    return isinstance(error, DBAPIError | sa.exc.TimeoutError | sqlite3.OperationalError | OSError)


def _driver_error(error: BaseException) -> BaseException:
    """What the driver said, out of SQLAlchemy's wrapping."""
    if isinstance(error, DBAPIError) and error.orig is not None:
        return error.orig.__cause__ or error.orig
    return error


def _cause(error: BaseException) -> str:
    driver = _driver_error(error)
    return str(driver).strip().partition("\n")[0] or type(driver).__name__


def _unusable(name: str, error: BaseException) -> ConfigError:
    return ConfigError(
        f"database: {name} cannot be used ({_cause(error)}): see that it is there, unlocked and whole, and lets this user in; "
        "or restore a backup, or give another"
    )


def _shown(url: str) -> str:
    """The URL without what must not be shown: password and parameters."""
    scheme, _, rest = url.partition("://")
    if scheme == "sqlite":
        return url
    login, at, place = rest.rpartition("@")  # the last: a password may hold anything
    user, colon, _ = login.partition(":")
    return f"{scheme}://{user.partition('?')[0]}{colon and ':***'}{at}{place.partition('?')[0]}"


def _engine(url: str, name: str, busy_s: float) -> AsyncEngine:
    if url.startswith("sqlite://"):
        return _sqlite(url.removeprefix("sqlite://"), name, busy_s)
    if url.startswith(("postgresql://", "postgres://")):
        return _postgresql(url, name)
    raise ConfigError(f"database: {name}: give sqlite:///path, sqlite:// or postgresql://user@host/name")


def _sqlite(rest: str, name: str, busy_s: float) -> AsyncEngine:
    if rest and not rest.startswith("/"):
        raise ConfigError(f"database: {name}: a file is given as sqlite:///path, an absolute one as sqlite:////path")
    path = rest[1:] or ":memory:"
    try:
        sqlite3.connect(
            path
        ).close()  # aiosqlite's thread would outlive an attempt that fails, and complain when the loop is closed
    except sqlite3.Error as error:
        raise _unusable(name, error) from error
    where = sa.URL.create("sqlite+aiosqlite", database=path)
    # isolation_level None: the driver begins no transaction of its own, so that schema changes are part of ours
    # no ROLLBACK when a connection goes back to the pool: each crossing to the connection's thread costs, and _attempt ends all
    driver = {"timeout": busy_s, "isolation_level": None}
    engine = create_async_engine(where, connect_args=driver, pool_reset_on_return=None)

    @event.listens_for(engine.sync_engine, "connect")
    def prepare(connection: Any, _: Any) -> None:
        try:
            connection.run_async(lambda driver: _use_wal(driver, busy_s))
            cursor = connection.cursor()
            for pragma in ("synchronous=FULL", "foreign_keys=ON"):
                cursor.execute(f"PRAGMA {pragma}")
            cursor.close()
        except sqlite3.Error:
            connection.close()  # the pool does not know of it yet
            raise

    @event.listens_for(engine.sync_engine, "begin")
    def begin(connection: Connection) -> None:
        # a write transaction that began as a reader could fail half-way because another process wrote in between
        statement = connection.get_execution_options().get(_BEGIN, "BEGIN")
        there: Any = connection.connection.dbapi_connection
        there.run_async(lambda driver: driver.execute(statement))

    return engine


async def _use_wal(driver: Any, busy_s: float) -> None:
    """Keep a write-ahead log. Of two that begin with it at once SQLite refuses one, without waiting."""
    clock = asyncio.get_running_loop().time
    until = clock() + busy_s
    while True:
        try:
            await (await driver.execute("PRAGMA journal_mode=WAL")).close()
        except sqlite3.OperationalError:
            if clock() >= until:
                raise
            await asyncio.sleep(_WAL_AGAIN_S)
        else:
            return


def _postgresql(url: str, name: str) -> AsyncEngine:
    try:
        import asyncpg
    except ImportError as error:
        raise ConfigError("database: PostgreSQL needs the driver asyncpg: pip install 'choral[postgres]'") from error
    try:
        _ = urlsplit(url).port
    except ValueError:
        # from None: Python's message has a piece of the password
        raise ConfigError(f"database: {name}: is no URL; write special characters in the password as %2F, %40 and so on") from None
    settings = {
        "application_name": "choral coordinator",
        "idle_in_transaction_session_timeout": str(int(2 * _SILENT_S * 1000)),  # a machine that died may not keep its lease locked
        "jit": "off",  # compiling costs more than our statements do
    }
    connect = partial(asyncpg.connect, url, timeout=_SILENT_S, command_timeout=_SILENT_S, server_settings=settings)
    return create_async_engine("postgresql+asyncpg://", async_creator=lambda *_, **__: connect())


def _readers(engine: AsyncEngine) -> AsyncEngine:
    """The engine for transactions that only read, all of it as it was at one moment; SQLite does so anyway."""
    if engine.dialect.name == "sqlite":
        return engine
    return engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)


def _migrate(connection: Connection, name: str, missing: bool) -> None:
    """Bring the schema to this release's, if what is `missing` is to be applied. Raises ConfigError: it is that of a newer one."""
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATING)))
    config = Config()
    config.set_main_option("script_location", "choral_server:migrations")
    config.attributes["connection"] = connection
    script = ScriptDirectory.from_config(config)
    present = set(MigrationContext.configure(connection).get_current_heads())
    unknown = present - {revision.revision for revision in script.walk_revisions()}
    if unknown:
        raise ConfigError(
            f"database: {name} was made by a newer release (its schema is {', '.join(sorted(unknown))}; this one knows up to "
            f"{script.get_current_head()}): run that release or a later one, or give another database"
        )
    if missing and present != set(script.get_heads()):
        command.upgrade(config, "head")
