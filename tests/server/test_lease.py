from __future__ import annotations

import asyncio
import re
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from choral.errors import ConfigError, LeaseLost
from choral_server.database import Database
from choral_server.lease import Lease
from choral_server.tables import LEASES
from choral_server.troubles import Troubles
from sqlalchemy.ext.asyncio import AsyncConnection

_LONG_S = 3600.0


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    opened = await Database.open(database_url, Troubles())
    yield opened
    await opened.close()


async def _left_s(database: Database) -> float:
    """How long the lease lasts, by the clock of this machine, which is the database's too."""
    now = sa.func.julianday("now") * 86400.0 - 2440587.5 * 86400.0
    if database.dialect == "postgresql":
        now = sa.cast(sa.extract("epoch", sa.func.clock_timestamp()), sa.Double)
    left = await database.read(lambda c: c.scalar(sa.select(LEASES.c.expires_at - now)))
    assert left is not None
    return float(left)


async def test_the_first_has_it_and_a_second_is_told_who_and_for_how_long(database: Database) -> None:
    first = await Lease.take(database, "host-a", _LONG_S)
    assert first.epoch == 1
    with pytest.raises(ConfigError) as refused:
        await Lease.take(database, "host-b", _LONG_S)
    told = re.fullmatch(
        r"database: (?P<name>\S+) is in use by coordinator host-a, whose lease lasts another (?P<left>[\d.]+) s: stop that one, .*",
        str(refused.value),
    )
    assert told is not None
    assert told["name"] == database.name
    assert 3000 < float(told["left"]) <= _LONG_S
    await database.write(first.hold)  # it has not been disturbed


async def test_the_same_holder_has_it_back_at_once_and_its_earlier_self_is_out(database: Database) -> None:
    before = await Lease.take(database, "host-a", _LONG_S)
    after = await Lease.take(database, "host-a", _LONG_S)
    assert (before.epoch, after.epoch) == (1, 2)
    await database.write(after.hold)
    with pytest.raises(LeaseLost, match=r"another coordinator has taken over .* because this one \(host-a\)"):
        await database.write(before.hold)


async def test_an_expired_lease_is_free_and_its_holder_fenced(database: Database) -> None:
    slow = await Lease.take(database, "host-a", 0.0)
    taken = await Lease.take(database, "host-b", _LONG_S)
    assert taken.epoch == 2

    async def late(connection: AsyncConnection) -> None:
        await connection.execute(sa.insert(LEASES), {"name": "late", "holder": "", "epoch": 0, "expires_at": 0.0})
        await slow.hold(connection)

    with pytest.raises(LeaseLost):
        await database.write(late)
    with pytest.raises(LeaseLost):
        await slow.give_up()
    assert await database.read(lambda c: c.scalar(sa.select(sa.func.count()).select_from(LEASES))) == 1
    await database.write(taken.hold)


async def test_who_was_silent_for_too_long_goes_on_if_nobody_came(database: Database) -> None:
    slow = await Lease.take(database, "host-a", 0.0)
    assert await _left_s(database) <= 0.0
    await database.write(slow.hold)


async def test_holding_renews_it(database: Database) -> None:
    await Lease.take(database, "host-a", 1.0)
    lease = await Lease.take(database, "host-a", _LONG_S)
    await database.write(lambda c: c.execute(sa.update(LEASES).values(expires_at=0.0)))
    assert await _left_s(database) < 0
    await database.write(lease.hold)
    assert 3000 < await _left_s(database) <= _LONG_S


async def test_a_lease_given_up_is_free(database: Database) -> None:
    lease = await Lease.take(database, "host-a", _LONG_S)
    await lease.give_up()
    assert (await Lease.take(database, "host-b", _LONG_S)).epoch == 2


async def test_it_is_renewed_until_another_takes_over(database: Database) -> None:
    lease = await Lease.take(database, "host-a", 0.03)
    renewing = asyncio.ensure_future(lease.renew_forever())
    async with asyncio.timeout(60):
        await database.write(lambda c: c.execute(sa.update(LEASES).values(expires_at=0.0)))
        while await database.read(lambda c: c.scalar(sa.select(LEASES.c.expires_at))) == 0.0:
            assert not renewing.done()
        await database.write(lambda c: c.execute(sa.update(LEASES).values(epoch=LEASES.c.epoch + 1)))
        with pytest.raises(LeaseLost):
            await renewing


async def test_of_many_that_want_it_one_gets_it(database_url: str) -> None:
    databases = [await Database.open(database_url, Troubles()) for _ in range(4)]
    taken = await asyncio.gather(
        *(Lease.take(each, f"host-{number}", _LONG_S) for number, each in enumerate(databases)), return_exceptions=True
    )
    for each in databases:
        await each.close()
    assert [isinstance(each, Lease) for each in taken].count(True) == 1
    assert [isinstance(each, ConfigError) for each in taken].count(True) == 3


async def test_it_is_kept_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "choral.db"
    database = await Database.open(f"sqlite:///{path}", Troubles())
    await Lease.take(database, "host-a", _LONG_S)
    await database.close()
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT name, holder, epoch FROM leases").fetchall() == [("coordinator", "host-a", 1)]
