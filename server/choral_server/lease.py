"""The lease: of two coordinators on one database, one may write.

A coordinator takes the lease for some seconds and keeps renewing it. Another one may take it once it has expired; each taking
raises its epoch, and every write names the epoch that it belongs to. So a coordinator that was only slow, and comes back after
another has taken over, finds its writes refused (Gray & Cheriton 1989, SOSP; fencing).
"""

from __future__ import annotations

import asyncio

import sqlalchemy as sa
from choral.errors import ConfigError, LeaseLost
from sqlalchemy import Double, bindparam
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import GenericFunction

from choral_server.database import Database
from choral_server.tables import INSERT, LEASES

_NAME = "coordinator"
_NEVER_TAKEN = {"name": _NAME, "holder": "", "epoch": 0, "expires_at": 0.0}


class _Now(GenericFunction[float]):
    """Seconds since 1970 by the database's clock: coordinators on several machines need not agree on theirs."""

    type = Double()
    inherit_cache = True
    name = "choral_now"


@compiles(_Now, "sqlite")
def _sqlite_now(element: _Now, compiler: SQLCompiler, **options: object) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(_Now, "postgresql")
def _postgresql_now(element: _Now, compiler: SQLCompiler, **options: object) -> str:
    return "CAST(extract(epoch FROM clock_timestamp()) AS double precision)"


_FREE = sa.or_(LEASES.c.holder == bindparam("by"), LEASES.c.expires_at <= _Now())
_TAKE = (
    sa.update(LEASES)
    .where(LEASES.c.name == _NAME, _FREE)
    .values(holder=bindparam("by"), epoch=LEASES.c.epoch + 1, expires_at=_Now() + bindparam("for_s", type_=Double))
)
_HOLD = (
    sa.update(LEASES)
    .where(LEASES.c.name == _NAME, LEASES.c.epoch == bindparam("mine"))
    .values(expires_at=_Now() + bindparam("for_s", type_=Double))
)
_STANDING = sa.select(LEASES.c.holder, LEASES.c.epoch, (LEASES.c.expires_at - _Now()).label("left_s")).where(LEASES.c.name == _NAME)


class Lease:
    """The lease on a database, held by this coordinator as long as nobody with a later epoch has it."""

    def __init__(self, database: Database, holder: str, lease_s: float, epoch: int) -> None:
        self.holder = holder
        self.epoch = epoch
        self._database = database
        self._lease_s = lease_s

    @classmethod
    async def take(cls, database: Database, holder: str, lease_s: float) -> Lease:
        """Take the lease for `lease_s` seconds. Raises ConfigError: another holder has it; its own earlier self is no other."""

        async def work(connection: AsyncConnection) -> int:
            await connection.execute(INSERT[database.dialect](LEASES).on_conflict_do_nothing(), [_NEVER_TAKEN])
            taken = await connection.execute(_TAKE, {"by": holder, "for_s": lease_s})
            standing = (await connection.execute(_STANDING)).one()
            if taken.rowcount == 0:
                raise ConfigError(
                    f"database: {database.name} is in use by coordinator {standing.holder}, whose lease lasts another "
                    f"{standing.left_s:.1f} s: stop that one, wait until it has been silent for so long, or give another database"
                )
            return int(standing.epoch)

        return cls(database, holder, lease_s, await database.write(work))

    async def hold(self, connection: AsyncConnection) -> None:
        """Renew the lease as part of a write transaction. Raises LeaseLost, and the transaction must not be committed."""
        await self._expire_in(connection, self._lease_s)

    async def renew_forever(self) -> None:
        """Renew the lease while nothing else is written. Raises LeaseLost."""
        while True:
            await asyncio.sleep(self._lease_s / 3)
            await self._database.write(self.hold)

    async def give_up(self) -> None:
        """Let another coordinator have the lease at once. Raises LeaseLost: one has it already."""
        await self._database.write(lambda connection: self._expire_in(connection, 0.0))

    async def _expire_in(self, connection: AsyncConnection, seconds: float) -> None:
        held = await connection.execute(_HOLD, {"mine": self.epoch, "for_s": seconds})
        if held.rowcount == 0:
            raise LeaseLost(
                f"another coordinator has taken over {self._database.name}, because this one ({self.holder}) was silent for too "
                "long: let it work, or stop it and start this one again"
            )
