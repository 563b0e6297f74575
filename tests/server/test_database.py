from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import op
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from choral.errors import ConfigError, DatabaseGone
from choral_server.database import Database
from choral_server.tables import CLIENTS, METADATA, Words
from choral_server.troubles import Troubles
from server.databases import Postgres
from sqlalchemy.ext.asyncio import AsyncConnection

_COUNTING = sa.Table("counting", sa.MetaData(), sa.Column("number", sa.Integer, primary_key=True))


class _Noted(Troubles):
    """Troubles that can be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[dict[str, str]] = []
        self._news = asyncio.Event()
        self.on_change = self._changed

    def _changed(self) -> None:
        self.heard.append(self.present)
        self._news.set()

    async def come(self) -> str:
        """The first trouble's reason, once there is one."""
        async with asyncio.timeout(60):
            while not self.present:
                self._news.clear()
                await self._news.wait()
        return self.present["database"]


@contextlib.asynccontextmanager
async def _opened(url: str, troubles: Troubles | None = None, busy_s: float = 5.0) -> AsyncIterator[Database]:
    database = await Database.open(url, troubles or Troubles(), busy_s)
    try:
        yield database
    finally:
        await database.close()


async def _make(database: Database) -> None:
    await database.write(lambda connection: connection.run_sync(_COUNTING.create))


def _add(number: int) -> Callable[[AsyncConnection], Awaitable[Any]]:
    return lambda connection: connection.execute(sa.insert(_COUNTING), {"number": number})


async def _numbers(connection: AsyncConnection) -> list[int]:
    return list((await connection.scalars(sa.select(_COUNTING.c.number).order_by(_COUNTING.c.number))).all())


# The schema


async def test_migrations_make_the_tables_that_the_code_has(database_url: str) -> None:
    async with _opened(database_url) as database:
        differences = await database.read(
            lambda connection: connection.run_sync(lambda c: compare_metadata(MigrationContext.configure(c), METADATA))
        )
    assert differences == []


async def test_a_second_start_changes_nothing(database_url: str) -> None:
    def schema(connection: sa.Connection) -> object:
        seen = sa.inspect(connection)
        tables = {name: [(c["name"], str(c["type"])) for c in seen.get_columns(name)] for name in seen.get_table_names()}
        return tables, connection.scalars(sa.text("SELECT version_num FROM alembic_version")).all()

    async with _opened(database_url) as database:
        await database.write(lambda c: c.execute(sa.text("INSERT INTO leases VALUES ('x', 'y', 1, 2.5)")))
        first = await database.read(lambda c: c.run_sync(schema))
    async with _opened(database_url) as database:
        assert await database.read(lambda c: c.run_sync(schema)) == first
        assert (await database.read(lambda c: c.execute(sa.text("SELECT * FROM leases")))).all() == [("x", "y", 1, 2.5)]


async def test_two_that_start_at_once_migrate_once(database_url: str) -> None:
    databases = await asyncio.gather(*(Database.open(database_url, Troubles()) for _ in range(3)))
    for database in databases:
        await database.close()


async def test_a_schema_of_a_newer_release_is_refused_and_left_alone(database_url: str) -> None:
    def content(connection: sa.Connection) -> object:
        return sorted(sa.inspect(connection).get_table_names()), connection.scalars(sa.text("SELECT * FROM alembic_version")).all()

    async with _opened(database_url) as database:
        await database.write(lambda c: c.execute(sa.text("UPDATE alembic_version SET version_num = '9001'")))
        await database.write(lambda c: c.execute(sa.text("DROP TABLE leases")))
        before = await database.read(lambda c: c.run_sync(content))
        with pytest.raises(
            ConfigError, match=r"was made by a newer release \(its schema is 9001; .*\): run that release"
        ) as refused:
            await Database.open(database_url, Troubles())
        assert database.name in str(refused.value)
        assert await database.read(lambda c: c.run_sync(content)) == before


async def test_a_migration_that_fails_leaves_nothing_behind(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make = op.create_table

    def create_table(name: str, *columns: Any) -> None:
        if name == "clients":
            raise OSError("no space left")
        make(name, *columns)

    monkeypatch.setattr(op, "create_table", create_table)
    with pytest.raises(ConfigError, match="no space left"):
        await Database.open(database_url, Troubles())
    monkeypatch.undo()
    async with _opened(database_url) as database:
        assert await database.read(lambda c: c.scalar(sa.select(sa.func.count()).select_from(CLIENTS))) == 0


# What cannot be opened


async def test_a_server_that_does_not_answer(unused_tcp_port: int) -> None:
    url = f"postgresql://choral:s3cret@127.0.0.1:{unused_tcp_port}/choral?application_name=s3cret"
    with pytest.raises(
        ConfigError, match=rf"postgresql://choral:\*\*\*@127\.0\.0\.1:{unused_tcp_port}/choral cannot be used"
    ) as refused:
        await Database.open(url, Troubles())
    assert "s3cret" not in str(refused.value)


async def test_a_database_that_the_server_does_not_have(postgres: Postgres) -> None:
    url = postgres.new_database() + "_not"
    with pytest.raises(ConfigError, match="does not exist"):
        await Database.open(url, Troubles())


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("mysql://root:s3cret@host/name", r"mysql://root:\*\*\*@host/name: give sqlite:///path"),
        ("choral.db", "give sqlite:///path"),
        ("sqlite://choral.db", "a file is given as sqlite:///path"),
        ("sqlite:////nowhere/at/all/choral.db", "unable to open database file"),
        ("postgresql://choral:s3cret/@127.0.0.1:port/name", r"postgresql://choral:\*\*\*@127.0.0.1:port/name: is no URL"),
    ],
)
async def test_a_url_of_no_use_is_named_without_its_password(url: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as refused:
        await Database.open(url, Troubles())
    assert "s3cret" not in str(refused.value)


async def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    path = tmp_path / "choral.db"
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(ConfigError, match=r"choral\.db cannot be used \(file is not a database\)"):
        await Database.open(f"sqlite:///{path}", Troubles())
    assert path.read_bytes() == b"not a database" * 100


# Transactions


async def test_sqlite_is_set_to_lose_nothing(tmp_path: Path) -> None:
    async with _opened(f"sqlite:///{tmp_path / 'choral.db'}", busy_s=1.5) as database:
        for pragma, value in {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 1500}.items():
            assert await database.read(lambda c, p=pragma: c.scalar(sa.text(f"PRAGMA {p}"))) == value  # type: ignore[misc]


async def test_a_relative_path_counts_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    async with _opened("sqlite:///here?.db"):
        assert (tmp_path / "here?.db").exists()


async def test_work_that_fails_leaves_nothing(database_url: str) -> None:
    async def half(connection: AsyncConnection) -> None:
        await _add(1)(connection)
        raise RuntimeError("half-way")

    async with _opened(database_url) as database:
        await _make(database)
        with pytest.raises(RuntimeError, match="half-way"):
            await database.write(half)
        await database.write(_add(2))
        assert await database.read(_numbers) == [2]


async def test_what_is_wrong_itself_is_not_tried_again(database_url: str) -> None:
    troubles = Troubles()
    async with _opened(database_url, troubles) as database:
        await _make(database)
        await database.write(_add(1))
        with pytest.raises(sa.exc.IntegrityError):
            await database.write(_add(1))
        with pytest.raises((sa.exc.DBAPIError, OverflowError)):  # the drivers differ
            await database.write(_add(2**70))
        assert troubles.present == {}
        assert await database.read(_numbers) == [1]


async def test_half_a_string_is_wrong_itself_on_postgresql(postgres: Postgres) -> None:
    async with _opened(postgres.new_database()) as database:
        with pytest.raises(sa.exc.DBAPIError, match="invalid byte sequence"):
            await database.read(lambda c: c.execute(sa.select(sa.bindparam("x", "a\0b", sa.Text))))


async def test_a_reader_sees_one_state(database_url: str) -> None:
    written = asyncio.Event()
    reading = asyncio.Event()

    async def look(connection: AsyncConnection) -> tuple[list[int], list[int]]:
        before = await _numbers(connection)
        reading.set()
        await written.wait()
        return before, await _numbers(connection)

    async with _opened(database_url) as database, asyncio.timeout(60):
        await _make(database)
        looking = asyncio.ensure_future(database.read(look))
        await reading.wait()
        await database.write(_add(1))
        written.set()
        assert await looking == ([], [])
        assert await database.read(_numbers) == [1]


@pytest.mark.parametrize("memory", [False, True])
async def test_many_at_once_take_turns(database_url: str, memory: bool) -> None:
    async with _opened("sqlite://" if memory else database_url) as database, asyncio.timeout(60):
        await _make(database)
        readers = (database.read(_numbers) for _ in range(30))
        await asyncio.gather(*(database.write(_add(number)) for number in range(30)), *readers)
        assert await database.read(_numbers) == list(range(30))


async def test_a_cancelled_writer_leaves_all_or_nothing(database_url: str) -> None:
    for url in (database_url, "sqlite://"):
        async with _opened(url) as database, asyncio.timeout(60):
            await _make(database)
            done: list[int] = []
            for number in range(40):
                writing = asyncio.ensure_future(database.write(_add(number), lambda n=number, d=done: d.append(n)))  # type: ignore[misc]
                for _ in range(number):  # so many steps of the loop in
                    await asyncio.wait([writing], timeout=0)
                writing.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await writing
            assert await database.read(_numbers) == done
            reading = asyncio.ensure_future(database.read(_numbers))
            await asyncio.wait([reading], timeout=0)
            reading.cancel()
            await asyncio.wait([reading])
            await database.write(_add(100))
            assert await database.read(_numbers) == [*done, 100]


# Absence


async def test_a_write_waits_until_the_server_is_back(postgres: Postgres) -> None:
    troubles = _Noted()
    done: list[str] = []
    async with _opened(postgres.new_database(), troubles) as database:
        await _make(database)
        await database.write(_add(1))
        await asyncio.to_thread(postgres.stop)
        try:
            with pytest.raises(
                DatabaseGone, match=r"postgresql://choral@127\.0\.0\.1:\d+/\w+ is gone \(.*\): try again once it is back"
            ):
                await database.read(_numbers)
            writing = asyncio.ensure_future(database.write(_add(2), lambda: done.append("done")))
            assert "is gone" in await troubles.come()
            assert not writing.done()
        finally:
            await asyncio.to_thread(postgres.start)
        async with asyncio.timeout(60):
            await writing
        assert done == ["done"]
        assert troubles.present == {}
        assert troubles.heard[-1] == {}
        assert await database.read(_numbers) == [1, 2]


@pytest.mark.parametrize("mode", ["fast", "immediate"])
async def test_a_transaction_that_the_server_breaks_is_done_again_as_a_whole(postgres: Postgres, mode: str) -> None:
    attempts = 0
    midway, go_on = asyncio.Event(), asyncio.Event()

    async def work(connection: AsyncConnection) -> None:
        nonlocal attempts
        attempts += 1
        await _add(1)(connection)
        midway.set()
        await go_on.wait()
        await _add(2)(connection)

    troubles = _Noted()
    async with _opened(postgres.new_database(), troubles) as database, asyncio.timeout(120):
        await _make(database)
        writing = asyncio.ensure_future(database.write(work))
        await midway.wait()
        await asyncio.to_thread(postgres.stop, mode)
        try:
            go_on.set()
            await troubles.come()
        finally:
            await asyncio.to_thread(postgres.start)
        await writing
        assert attempts >= 2
        assert await database.read(_numbers) == [1, 2]


async def test_a_server_that_was_restarted_meanwhile_is_not_gone(postgres: Postgres) -> None:
    async with _opened(postgres.new_database()) as database:
        await _make(database)
        both = asyncio.Barrier(2)

        async def together(connection: AsyncConnection) -> list[int]:
            await both.wait()  # so that two connections are in the pool
            return await _numbers(connection)

        await asyncio.gather(database.read(together), database.read(together))
        await asyncio.to_thread(postgres.restart)
        assert await database.read(_numbers) == []
        assert await database.read(_numbers) == []


async def test_a_write_waits_for_a_lock_that_lasts(tmp_path: Path) -> None:
    path = tmp_path / "choral.db"
    troubles = _Noted()
    async with _opened(f"sqlite:///{path}", troubles, busy_s=0.05) as database:
        await _make(database)
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        writing = asyncio.ensure_future(database.write(_add(1)))
        assert "database is locked" in await troubles.come()
        assert not writing.done()
        assert await database.read(_numbers) == []  # readers need no lock
        other.execute("ROLLBACK")
        other.close()
        async with asyncio.timeout(60):
            await writing
        assert troubles.present == {}
        assert await database.read(_numbers) == [1]


async def test_a_writer_that_waits_can_be_cancelled(tmp_path: Path) -> None:
    path = tmp_path / "choral.db"
    troubles = _Noted()
    async with _opened(f"sqlite:///{path}", troubles, busy_s=0.05) as database:
        await _make(database)
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        writing = asyncio.ensure_future(database.write(_add(1)))
        await troubles.come()
        writing.cancel()
        async with asyncio.timeout(60):
            with pytest.raises(asyncio.CancelledError):
                await writing
        other.execute("ROLLBACK")
        other.close()
        assert await database.read(_numbers) == []


async def test_a_lock_on_a_row_is_waited_for(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("choral_server.database._SILENT_S", 0.2)
    url = postgres.new_database()
    troubles = _Noted()
    async with _opened(url, troubles) as database, _opened(url) as other, asyncio.timeout(60):
        await _make(other)
        locked, go_on = asyncio.Event(), asyncio.Event()

        async def lock(connection: AsyncConnection) -> None:
            await connection.execute(sa.text("SET LOCAL idle_in_transaction_session_timeout = 0"))
            await connection.execute(sa.text("LOCK TABLE counting"))
            locked.set()
            await go_on.wait()

        locking = asyncio.ensure_future(other.write(lock))
        await locked.wait()
        writing = asyncio.ensure_future(database.write(_add(1)))
        await troubles.come()
        go_on.set()
        await locking
        await writing
        assert troubles.present == {}
        assert await other.read(_numbers) == [1]


async def test_text_that_a_database_cannot_hold_is_held_as_far_as_possible(database_url: str) -> None:
    assert isinstance(CLIENTS.c.reason.type, Words)
    table = sa.Table("told", sa.MetaData(), sa.Column("words", Words))
    async with _opened(database_url) as database:
        await database.write(lambda c: c.run_sync(table.create))
        for words in ("Grüße – 你好", "a\0b", "half \ud800 a pair"):
            await database.write(lambda c, w=words: c.execute(sa.insert(table), {"words": w}))  # type: ignore[misc]
        told = await database.read(lambda c: c.scalars(sa.select(table.c.words)))
    assert told.all() == ["Grüße – 你好", "a\ufffdb", "half ? a pair"]
