"""`kill -9` at every step of a round: the run goes on by itself and ends with the same bits."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from choral_server import failpoints
from e2e import exact
from e2e.federation import Federation
from e2e.zygote import Zygote
from server.databases import Postgres
from sqlalchemy.ext.asyncio import create_async_engine

ROUNDS = 3
_COUNTS = "rounds.kind <> 'evaluation'"
ONCE = {"run-begun:before", "run-begun:after", "run-over:before", "run-over:after"}


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> dict[str, Any]:
    """What comes out when nobody dies."""
    return exact.undisturbed(tmp_path_factory.mktemp("calm"), zygote, ROUNDS)


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest) -> str | None:
    if request.param == "sqlite":
        return None
    server: Postgres = request.getfixturevalue("postgres")
    return server.new_database()


def deaths() -> Iterator[str]:
    """Each failpoint where it is first met, and, if it is met again, in the middle of the run too."""
    for name in failpoints.ALL:
        yield name
        if name not in ONCE:
            yield f"{name}#3"


def test_a_calm_run_is_what_it_seems(calm: dict[str, Any]) -> None:
    assert len([name for name in calm["files"] if "optimizer" in name]) == ROUNDS
    assert calm["names"]["latest.safetensors"] == f"{ROUNDS + 1:06d}.safetensors"
    assert "best.safetensors" in calm["names"]


@pytest.mark.parametrize("death", [*deaths()])
def test_killed_at(death: str, quick: Federation, database: str | None, calm: dict[str, Any]) -> None:
    exact.configure(quick, ROUNDS, database=database)
    doomed = quick.start_coordinator(environment={failpoints.VARIABLE: death})
    clients = [exact.start_client(quick, name) for name in exact.CLIENTS]
    assert doomed.code() == -signal.SIGKILL, f"{death} was never reached"
    again = quick.start_coordinator()
    assert again.code() == 0
    if death.startswith("run-over"):  # they may come back too late to hear of it
        for client in clients:
            client.terminate()
    assert [client.code() for client in clients] == [0, 0]
    assert exact.outcome(quick) == calm
    counted(quick, database)
    told(quick)
    for process in (doomed, again, *clients):
        assert "Traceback" not in process.stderr


def counted(federation: Federation, database: str | None) -> None:
    """Each round's results counted once, no round lost. (The last measurement is by whoever is there.)"""
    url = database or f"sqlite:///{federation.folder}/state/choral.db"
    rounds, accepted = asyncio.run(read(url))
    assert rounds == [("statistics", "done"), *[("training", "done")] * ROUNDS]
    assert accepted == [(name, ROUNDS + 1) for name in exact.CLIENTS]


def told(federation: Federation) -> None:
    """The history is whole, agrees with the records, and holds all that the clients were handed."""
    heads = [part for name in exact.CLIENTS for part in ("--head", federation.folder / name / "client" / "heads.jsonl")]
    verified = federation.command("audit", "verify", *heads, "-c", federation.config)
    assert verified.code() == 0, verified.stdout


async def read(url: str) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    engine = create_async_engine(url.replace("://", "+aiosqlite://" if url.startswith("sqlite") else "+asyncpg://"))
    async with engine.connect() as connection:
        rounds = await connection.execute(sa.text(f"SELECT kind, state FROM rounds WHERE {_COUNTS} ORDER BY number"))
        joined = "assignments JOIN rounds ON assignments.run = rounds.run AND assignments.round = rounds.number"
        where = f"WHERE {_COUNTS} AND assignments.state = 'accepted'"
        accepted = await connection.execute(
            sa.text(f"SELECT client, count(*) FROM {joined} {where} GROUP BY client ORDER BY client")
        )
        found = [tuple(row) for row in rounds], [tuple(row) for row in accepted]
    await engine.dispose()
    return found
